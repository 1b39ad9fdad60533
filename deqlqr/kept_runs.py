"""Trainings in folders of their own: finished ones are not repeated, interrupted ones go on."""

from pathlib import Path
from typing import Any

from deqlqr.metrics import read_metrics
from deqlqr.solution import ConvergenceError
from deqlqr.training import METRICS, TrainConfig, finish

Lines = list[dict[str, Any]]


def kept_run(config: TrainConfig, out: Path, name: str) -> tuple[Lines, str | None]:
    """Run to the end, in a folder under `out` that has the run's name.

    Returns:
        The metrics of its steps, and why it failed, if it did.

    Raises:
        ValueError: If the folder holds another run.
        KeyboardInterrupt: If it was interrupted.
    """
    folder, failure = out / name.replace(" ", "-").replace(",", ""), None
    try:
        finish(config, folder)
    except ConvergenceError as error:
        failure = str(error)
    return [line for line in read_metrics(folder / METRICS) if line["kind"] == "step"], failure
