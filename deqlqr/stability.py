"""Who keeps the fixed points: learning rates over two decades, with and without guard, on MNIST."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deqlqr._checks import choice
from deqlqr.checkpoint import load_checkpoint
from deqlqr.metrics import read_metrics
from deqlqr.solution import ConvergenceError
from deqlqr.training import CHECKPOINT, METRICS, TrainConfig, finish

CASES = {
    "no bound, no guard": ("dense-free", False),
    "no bound, guard": ("dense-free", True),
    "DenseBlock": ("dense-large", True),
    "GradientBlock": ("gradient", True),
    "MonotoneBlock": ("monotone", True),
}
RATES = {
    "sgd": (0.03, 0.1, 0.3, 1.0, 3.0),
    "adam": (0.0003, 0.001, 0.003, 0.01, 0.03),
    "ingd": (0.03, 0.1, 0.3, 1.0, 3.0),
}
_INGD: dict[str, Any] = {"route": "kronecker", "damping": 0.1, "trust_region": 1e-2,
                         "check_every": 10}  # fmt: skip

_TEST_SAMPLES = 10000


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        steps: Steps taken.
        failure: Why it stopped early, or `None`.
        accuracy: On the test set, after its last whole epoch; `None` if it finished none.
        lost: Share of the test samples without a fixed point then.
        shortened: Times that the guard shortened the way; `None` without one.
        taken_back: Times that it took it back.
    """

    steps: int
    failure: str | None
    accuracy: float | None
    lost: float | None
    shortened: int | None
    taken_back: int | None


def configs(data_root: Path, epochs: int = 4) -> dict[tuple[str, str, float], TrainConfig]:
    """Return the run of each case, optimizer and learning rate, all else equal."""
    return {
        (case, optimizer, lr): TrainConfig(
            data="mnist",
            data_root=str(data_root),
            model=model,
            optimizer=optimizer,
            lr=lr,
            guard=guard,
            batch_size=256,
            epochs=epochs,
            schedule="constant",
            log_every=200,
            **(_INGD if optimizer == "ingd" else {}),
        )
        for case, (model, guard) in CASES.items()
        for optimizer, rates in RATES.items()
        for lr in rates
    }


def run_stability(
    data_root: Path, out: Path, cases: Sequence[str] | None = None, epochs: int = 4
) -> dict[tuple[str, str, float], Outcome]:
    """Run the grid under `out`; finished runs there are not run again.

    Args:
        data_root: Folder that holds MNIST/raw.
        out: Folder of the runs.
        cases: Some of `CASES`; `None` for all.
        epochs: Passes over the data.

    Returns:
        How each run ended, by case, optimizer and learning rate.

    Raises:
        ValueError: If a case is unknown or the data are missing.
        KeyboardInterrupt: If it was interrupted.
    """
    for case in cases or ():
        choice("case", case, tuple(CASES))
    return {
        key: _outcome(config, out / f"{key[0]}-{key[1]}-{key[2]:g}".replace(" ", "-"))
        for key, config in configs(data_root, epochs).items()
        if not cases or key[0] in cases
    }


def _outcome(config: TrainConfig, folder: Path) -> Outcome:
    stopped, failure = folder / "stopped.txt", None
    if stopped.exists():  # going on from there would be another run
        failure = stopped.read_text()
    else:
        try:
            finish(config, folder)
        except ConvergenceError as error:
            failure = str(error)
            stopped.write_text(failure)
    step = int(load_checkpoint(folder / CHECKPOINT)["step"])
    lines = read_metrics(folder / METRICS)
    epochs = [line for line in lines if line["kind"] == "epoch"]
    last = epochs[-1] if epochs else None
    looked = [line for line in lines if line["radius"] is not None]
    return Outcome(
        steps=step,
        failure=failure,
        accuracy=None if last is None else last["accuracy"],
        lost=None if last is None else last["test_not_converged"] / _TEST_SAMPLES,
        shortened=looked[-1]["shortened"] if looked else None,
        taken_back=looked[-1]["taken_back"] if looked else None,
    )


def table(outcomes: dict[tuple[str, str, float], Outcome]) -> list[str]:
    """Return a Markdown table: a row for each case and optimizer, a column for each rate.

    In brackets: how often the guard shortened the way, and took it back.
    """
    rows: dict[tuple[str, str], list[str]] = {}
    for (case, optimizer, lr), outcome in outcomes.items():
        rows.setdefault((case, optimizer), []).append(f"{lr:g}: {_cell(outcome)}")
    most = max(len(cells) for cells in rows.values())
    return [
        "| block | optimizer | learning rate: test accuracy" + " |" * most,
        "|---|---|" + "---|" * most,
        *(f"| {case} | {name} | {' | '.join(cells)} |" for (case, name), cells in rows.items()),
    ]


def _cell(outcome: Outcome) -> str:
    if outcome.failure is not None:
        return f"stopped after {outcome.steps} steps"
    assert outcome.accuracy is not None and outcome.lost is not None  # noqa: S101
    lost = f", {outcome.lost:.2%} lost" if outcome.lost > 0 else ""
    done = f" [{outcome.shortened}+{outcome.taken_back}]"
    return f"{outcome.accuracy:.1%}{lost}{done if outcome.shortened or outcome.taken_back else ''}"
