"""Figure 5.1: a damping fixed over a grid beside damping by layer (V4), on three seeds.

The thesis mixes two effects, a damping by layer and a series in place of the inverse; here the
first also runs with the exact inverse. Twice: in the finite horizon, the thesis' own, on the
explicit network of figure 3.1, and in the infinite horizon on the toy DEQ of figure 4.1.

Source: thesis section 5.1.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from deqlqr.figures import plot_seeds
from deqlqr.kept_runs import Lines, kept_run
from deqlqr.training import TrainConfig

STEP_LENGTHS = (0.1, 0.01)  # the thesis'
DAMPING_GRID = (1.0, 0.1, 0.01, 0.001)
LEAST_DAMPING = 1e-4  # below which damping by layer does not go
MARGIN = 2.0
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Horizon:
    """A figure 5.1.

    Attributes:
        figure: Its name.
        words: Of the horizon.
        model: The model that trains.
        model_words: It, in words.
        batch: Samples of a step.
        fixed: Route of the fixed damping.
        by_layer: Route of damping by layer.
    """

    figure: str
    words: str
    model: str
    model_words: str
    batch: int
    fixed: str
    by_layer: str


FINITE = Horizon(
    "fig5.1", "finite", "convnet", "3 convolutions and 2 dense layers", 5, "riccati", "riccati"
)
INFINITE = Horizon(
    "fig5.1-deq", "infinite", "conv", "toy convolutional DEQ", 8, "dare", "cyclic"
)  # fmt: skip


def reproduce_damping(horizon: Horizon, data_root: Path | None, out: Path, steps: int) -> str:
    """Run all trainings under `out`, then write the figure, its numbers and a table.

    Returns:
        The line that sums it up.
    """
    panels: dict[str, dict[str, list[Lines]]] = {}
    rows: list[dict[str, Any]] = []
    for (lr, name), configs in damping_configs(horizon, data_root, steps).items():
        runs = [kept_run(config, out, f"{name} lr {lr:g} seed {config.seed}") for config in configs]
        panels.setdefault(f"learning rate {lr:g}", {})[name] = [lines for lines, _ in runs]
        rows.append(_row(lr, name, runs))
    line = _verdict(horizon, rows)
    title = f"MNIST, {horizon.model_words}, batches of {horizon.batch}: mean and range of seeds"
    plot_seeds(panels, out / f"{horizon.figure}.png", title)
    content = {"steps": steps, "rows": rows, "line": line}
    (out / f"{horizon.figure}.json").write_text(json.dumps(content, indent=2) + "\n")
    (out / f"{horizon.figure}.md").write_text("\n".join(_markdown(rows)) + "\n")
    return line


def damping_configs(
    horizon: Horizon, data_root: Path | None, steps: int
) -> dict[tuple[float, str], list[TrainConfig]]:
    """Return the trainings of the figure, by step length and by damping, one for each seed."""
    kinds: dict[str, dict[str, Any]] = {
        f"fixed damping {delta:g}": {"damping": delta, "route": horizon.fixed}
        for delta in DAMPING_GRID
    }
    adaptive = {"damping": LEAST_DAMPING, "route": horizon.by_layer, "margin": MARGIN}
    kinds["damping by layer, exact inverse"] = adaptive
    kinds["damping by layer, Neumann series"] = adaptive | {"inverse": "neumann"}
    common: dict[str, Any] = {
        "data": "mnist",
        "data_root": str(data_root),
        "model": horizon.model,
        "optimizer": "ingd",
        "batch_size": horizon.batch,
        "schedule": "constant",
        "max_steps": steps,
        "log_every": max(10, steps // 100),
        "eval_size": 2000,
    }
    return {
        (lr, name): [TrainConfig(lr=lr, seed=seed, **(common | kind)) for seed in SEEDS]
        for lr in STEP_LENGTHS
        for name, kind in kinds.items()
    }


def _row(lr: float, name: str, runs: list[tuple[Lines, str | None]]) -> dict[str, Any]:
    ends, seconds, rejected, failures = [], [], [], []
    for lines, failure in runs:
        ends.append(mean(line["accuracy"] for line in lines[-3:]) if lines else 0.0)
        seconds += [lines[-1]["seconds"] / lines[-1]["step"]] if lines else []
        rejected += [line["rejections"] > 0 for line in lines]
        failures += [] if failure is None else [failure]
    return {
        "lr": lr,
        "damping": name,
        "accuracy": mean(ends),
        "lowest": min(ends),
        "highest": max(ends),
        "rejected": mean(rejected) if rejected else None,
        "seconds_per_step": mean(seconds) if seconds else None,
        "failures": failures,
    }


def _markdown(rows: list[dict[str, Any]]) -> Iterable[str]:
    yield (
        "| learning rate | damping | accuracy, mean of seeds (range) | steps first rejected | "
        "s a step | failed |"
    )
    yield "|---|---|---|---|---|---|"
    for r in rows:
        yield (
            f"| {r['lr']:g} | {r['damping']} | {r['accuracy']:.1%} ({r['lowest']:.1%} to "
            f"{r['highest']:.1%}) | {r['rejected'] or 0.0:.0%} | "
            f"{r['seconds_per_step'] or 0.0:.2f} | {len(r['failures'])} |"
        )


def _verdict(horizon: Horizon, rows: list[dict[str, Any]]) -> str:
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
        "stabilises training without a damping to tune. Measured in the "
        f"{horizon.words} horizon, {' | '.join(parts)}."
    )
