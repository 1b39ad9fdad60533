"""Figures of the thesis, repeated: each writes its figure, a JSON of the numbers, and a line."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from deqlqr._checks import at_least
from deqlqr.figures import plot_runs, plot_seeds
from deqlqr.metrics import read_metrics
from deqlqr.reproduce_points import reproduce_fields, reproduce_spiral
from deqlqr.solution import ConvergenceError
from deqlqr.training import METRICS, SCHEDULES, TrainConfig, finish

TARGET = 0.95
BATCH = 64
GD_GRID = (0.1, 0.3, 1.0, 3.0)
STEP_LENGTHS = (0.1, 0.01)  # the thesis'
DAMPING_GRID = (1.0, 0.1, 0.01, 0.001)
LEAST_DAMPING = 1e-4  # below which damping by layer does not go
MARGIN = 2.0
SMALL_BATCH = 8
SEEDS = (0, 1, 2)
GD_BUDGET = 5  # gradient descent may take so many times the steps
_SAMPLES = 60000  # of MNIST's training set


def reproduce(figure: str, data_root: Path | None, out: Path, steps: int | None = None) -> str:
    """Run a figure's experiment under `out`.

    Returns:
        The line that sums it up: what the thesis reports, and what was measured.

    Raises:
        ValueError: If the figure is unknown, `steps` is below 1, or the data are missing.
    """
    if figure not in FIGURES:
        raise ValueError(f"figure must be one of {tuple(FIGURES)}, got {figure!r}.")
    run, usual = FIGURES[figure]
    if data_root is None and figure in OF_MNIST:
        raise ValueError(f"figure {figure!r} needs a data root: the folder that holds MNIST/raw.")
    steps = usual if steps is None else steps
    at_least("steps", steps, 1)
    return run(data_root, out, steps)


def _fig4_1(data_root: Path | None, out: Path, steps: int) -> str:
    runs: dict[str, list[dict[str, Any]]] = {}
    failures: dict[str, str] = {}
    for name, config in fig4_1_configs(data_root, steps).items():
        lines, failure = _run(config, out / _folder(name))
        runs[name] = lines
        failures |= {} if failure is None else {name: failure}
    summary = {name: _summary(lines) for name, lines in runs.items()}
    line = _verdict(summary, failures)
    title = "MNIST, toy convolutional DEQ block, 12 inner channels"
    plot_runs(runs, out / "fig4.1.png", title, "accuracy", TARGET)
    content = {"target": TARGET, "runs": summary, "failures": failures, "line": line}
    (out / "fig4.1.json").write_text(json.dumps(content, indent=2) + "\n")
    return line


def _run(config: TrainConfig, folder: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Return the metrics of a run, which is not repeated if it is finished, and why it failed."""
    failure = None
    try:
        finish(config, folder)
    except ConvergenceError as error:
        failure = str(error)
    return read_metrics(folder / METRICS), failure


def _folder(name: str) -> str:
    return name.replace(" ", "-").replace(",", "")


def fig4_1_configs(data_root: Path | None, steps: int) -> dict[str, TrainConfig]:
    """Return the runs of figure 4.1: the same model, batches and seed for all.

    Gradient descent runs with each step length of the grid, kept and falling (cosine) as ours does.
    """
    common: dict[str, Any] = {
        "data": "mnist",
        "data_root": str(data_root),
        "model": "conv",
        "batch_size": BATCH,
        "log_every": 10,
        "eval_size": 10000,
    }
    ours = TrainConfig(optimizer="ingd", lr=1.0, damping=0.3, **common, **_budget(steps))
    configs = {f"implicit NGD, lr {ours.lr:g}, damping {ours.damping:g}": ours}
    for schedule in SCHEDULES:
        for lr in GD_GRID:
            name = f"gradient descent, lr {lr:g}, {schedule}"
            budget = _budget(GD_BUDGET * steps)
            configs[name] = TrainConfig(
                optimizer="gd", lr=lr, schedule=schedule, **common, **budget
            )
    return configs


def _budget(steps: int) -> dict[str, Any]:
    return {"max_steps": steps, "epochs": -(-steps // (_SAMPLES // BATCH))}


def _summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    steps = [line for line in lines if line["kind"] == "step"]
    reached = next((line for line in steps if line["accuracy"] >= TARGET), None)
    return {
        "iterations_to_target": reached and reached["step"],
        "seconds_to_target": reached and reached["seconds"],
        "best_accuracy": max((line["accuracy"] for line in steps), default=None),
        "last_step": steps[-1]["step"] if steps else 0,
        "seconds": steps[-1]["seconds"] if steps else 0.0,
    }


def _verdict(summary: dict[str, dict[str, Any]], failures: dict[str, str]) -> str:
    def reached(item: tuple[str, dict[str, Any]]) -> float:
        steps = item[1]["iterations_to_target"]
        return float("inf") if steps is None else float(steps)

    def text(name: str) -> str:
        row = summary[name]
        if row["iterations_to_target"] is None:
            best = row["best_accuracy"]
            return f"{name}: not in {row['last_step']} iterations (best {best or 0:.1%})"
        seconds = row["seconds_to_target"]
        return f"{name}: {row['iterations_to_target']} iterations, {seconds:.0f} s"

    ours = next(name for name in summary if name.startswith("implicit"))
    rivals = {name: row for name, row in summary.items() if name != ours}
    best = min(rivals.items(), key=reached)[0]
    failed = f"; failed: {', '.join(failures)}" if failures else ""
    return (
        "The thesis reports that NGD converges in fewer iterations than GD and is 10 times slower "
        f"per iteration. Measured, to {TARGET:.0%} test accuracy: {text(ours)}; best of GD, "
        f"{text(best)}{failed}."
    )


def _fig5_1(data_root: Path | None, out: Path, steps: int) -> str:
    panels: dict[str, dict[str, list[list[dict[str, Any]]]]] = {}
    rows: list[dict[str, Any]] = []
    for (lr, name), configs in fig5_1_configs(data_root, steps).items():
        found = [_run(config, out / _folder(f"{name} lr {lr:g} seed {config.seed}"))
                 for config in configs]  # fmt: skip
        panels.setdefault(f"learning rate {lr:g}", {})[name] = [lines for lines, _ in found]
        rows.append(_seeds_row(lr, name, found))
    line = _verdict_5_1(rows)
    title = f"MNIST, toy convolutional DEQ, batches of {SMALL_BATCH}: mean and range of seeds"
    plot_seeds(panels, out / "fig5.1.png", title)
    (out / "fig5.1.json").write_text(json.dumps({"rows": rows, "line": line}, indent=2) + "\n")
    (out / "fig5.1.md").write_text("\n".join(_markdown(rows)) + "\n")
    return line


def fig5_1_configs(
    data_root: Path | None, steps: int
) -> dict[tuple[float, str], list[TrainConfig]]:
    """Return the runs of figure 5.1 in the infinite horizon, by step length and by damping.

    The thesis mixes two effects, a damping by layer and a series in place of the inverse; here the
    first also runs with the exact inverse.
    """
    kinds: dict[str, dict[str, Any]] = {
        f"fixed damping {delta:g}": {"damping": delta} for delta in DAMPING_GRID
    }
    adaptive = {"damping": LEAST_DAMPING, "route": "cyclic", "margin": MARGIN}
    kinds["damping by layer, exact inverse"] = adaptive
    kinds["damping by layer, Neumann series"] = adaptive | {"inverse": "neumann"}
    common: dict[str, Any] = {
        "data": "mnist",
        "data_root": str(data_root),
        "model": "conv",
        "optimizer": "ingd",
        "batch_size": SMALL_BATCH,
        "schedule": "constant",
        "max_steps": steps,
        "log_every": 10,
        "eval_size": 2000,
    }
    return {
        (lr, name): [TrainConfig(lr=lr, seed=seed, **(common | kind)) for seed in SEEDS]
        for lr in STEP_LENGTHS
        for name, kind in kinds.items()
    }


def _seeds_row(
    lr: float, name: str, found: list[tuple[list[dict[str, Any]], str | None]]
) -> dict[str, Any]:
    ends, seconds, failures = [], [], []
    for lines, failure in found:
        steps = [line for line in lines if line["kind"] == "step"]
        ends.append(mean(line["accuracy"] for line in steps[-3:]) if steps else 0.0)
        seconds += [steps[-1]["seconds"] / steps[-1]["step"]] if steps else []
        failures += [] if failure is None else [failure]
    return {
        "lr": lr,
        "damping": name,
        "accuracy": mean(ends),
        "lowest": min(ends),
        "highest": max(ends),
        "seconds_per_step": mean(seconds) if seconds else None,
        "failures": failures,
    }


def _markdown(rows: list[dict[str, Any]]) -> Iterable[str]:
    yield "| learning rate | damping | accuracy, mean of seeds (range) | s a step | failed |"
    yield "|---|---|---|---|---|"
    for r in rows:
        yield (
            f"| {r['lr']:g} | {r['damping']} | {r['accuracy']:.1%} ({r['lowest']:.1%} to "
            f"{r['highest']:.1%}) | {r['seconds_per_step'] or 0.0:.2f} | {len(r['failures'])} |"
        )


def _verdict_5_1(rows: list[dict[str, Any]]) -> str:
    parts = []
    for lr in STEP_LENGTHS:
        own = [row for row in rows if row["lr"] == lr]
        fixed = [row for row in own if row["damping"].startswith("fixed")]
        by_layer = [row for row in own if not row["damping"].startswith("fixed")]
        best, worst = (pick(fixed, key=lambda row: row["accuracy"]) for pick in (max, min))
        text = f"learning rate {lr:g}: fixed, best {best['accuracy']:.1%} ({best['damping']}), "
        text += f"worst {worst['accuracy']:.1%} ({worst['damping']})"
        parts.append("; ".join([text, *(f"{r['damping']} {r['accuracy']:.1%}" for r in by_layer)]))
    return (
        "The thesis reports (finite horizon) that damping by layer through the Neumann series "
        "stabilises training without a damping to tune. Measured in the infinite horizon, "
        f"{' | '.join(parts)}."
    )


# name -> (experiment, usual number of steps)
FIGURES: dict[str, tuple[Callable[[Path | None, Path, int], str], int]] = {
    "fig4.1": (_fig4_1, 200),
    "fig5.1-deq": (_fig5_1, 100),
    "spiral": (reproduce_spiral, 120),
    "fields": (reproduce_fields, 60),
}
OF_MNIST = ("fig4.1", "fig5.1-deq")
