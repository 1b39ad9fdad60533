"""Optimizers side by side: each over its grid of options, the best of it over further seeds.

A method's best options are those that reach the hardest target of all its grid, in fewest steps.
Runs are kept in folders of their own, so an interrupted race goes on where it stopped.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from deqlqr.figures import plot_runs
from deqlqr.metrics import read_metrics
from deqlqr.solution import ConvergenceError
from deqlqr.training import METRICS, TrainConfig, finish

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Race:
    """What is raced.

    Attributes:
        title: For the figure.
        common: Options of `TrainConfig` that all runs share.
        methods: For each method its grid, options of `TrainConfig` over the common ones.
        measure: Key of the metrics: `"accuracy"`, `"loss"` or `"error"`.
        targets: From easy to hard; the measure has to reach them.
        refused: Methods that cannot take part, and why.
    """

    title: str
    common: Options
    methods: Mapping[str, Sequence[Options]]
    measure: str
    targets: tuple[float, ...]
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def rising(self) -> bool:
        """Whether more of the measure is better."""
        return self.measure == "accuracy"

    def reached(self, value: float | None, target: float) -> bool:
        """Return whether a value of the measure meets a target."""
        if value is None:
            return False
        return value >= target if self.rising else value <= target


@dataclass(frozen=True)
class Run:
    """One run, summed up.

    Attributes:
        steps: Steps to each target, `None` where it was not reached.
        seconds: Seconds of training to each target.
        best: Best value of the measure.
        step_seconds: Mean seconds a step.
        failure: Why it ended early, if it did.
    """

    steps: tuple[int | None, ...]
    seconds: tuple[float | None, ...]
    best: float | None
    step_seconds: float
    failure: str | None

    @property
    def rank(self) -> tuple[float, ...]:
        """Sorts the best run first."""
        missed = sum(step is None for step in self.steps)
        return (missed, *(float("inf") if step is None else step for step in self.steps[::-1]))


@dataclass(frozen=True)
class Row:
    """A method at its best options.

    Attributes:
        method: Its name.
        options: The best of its grid.
        tried: Size of the grid.
        runs: One for each seed.
    """

    method: str
    options: Options
    tried: int
    runs: tuple[Run, ...]


def race(what: Race, out: Path, seeds: int) -> Iterable[Row]:
    """Run every method under `out`, on one thread.

    Args:
        what: The race.
        out: Folder of the runs, of `race.png` and `race.json`.
        seeds: How many; the grid is run on the first.

    Yields:
        The row of each method, as soon as it is there.

    Raises:
        ValueError: If `out` holds runs of another race.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows, curves = [], {}
    try:
        with threadpool_limits(1):
            for method, grid in what.methods.items():
                row, lines = _row(
                    what, method, grid, out / method.replace(" ", "-").replace(",", ""), seeds
                )
                rows.append(row)
                curves[method] = lines
                yield row
    finally:
        torch.set_num_threads(threads)
    scale = "linear" if what.rising else "log"
    plot_runs(curves, out / "race.png", what.title, what.measure, what.targets[-1], scale)
    (out / "race.json").write_text(json.dumps(_to_dict(what, rows), indent=2) + "\n")


def table(what: Race, rows: Iterable[Row]) -> Iterable[str]:
    """Yield the lines of a table: medians over the seeds, each line as soon as its row is there."""
    wide = max(map(len, (*what.methods, *what.refused)))
    shown = [f"{t:.1%}" if what.rising else f"{t:g}" for t in what.targets]
    yield f"{'method':<{wide}} {'ms/step':>8} " + "".join(
        f"{'steps to ' + t:>17} {'seconds':>8} " for t in shown
    ) + f"{'best':>9}  options (of a grid of)"  # fmt: skip
    for row in rows:
        cells = "".join(
            f"{_middle([r.steps[i] for r in row.runs], '.0f'):>17} "
            f"{_middle([r.seconds[i] for r in row.runs], '.1f'):>8} "
            for i in range(len(shown))
        )
        best = _middle([r.best for r in row.runs], ".2%" if what.rising else ".1e")
        speed = 1e3 * median(r.step_seconds for r in row.runs)
        options = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}"
                            for k, v in row.options.items())  # fmt: skip
        failed = "".join(f"; failed: {r.failure}" for r in row.runs if r.failure)
        yield f"{row.method:<{wide}} {speed:8.1f} {cells}{best:>9}  {options} ({row.tried}){failed}"
    for method, why in what.refused.items():
        yield f"{method:<{wide}} not run: {why}"


def _middle(values: Sequence[float | None], form: str) -> str:
    """Return the median, a value that is missing counting as the worst."""
    known = [v for v in values if v is not None]
    if 2 * len(known) <= len(values):
        return "-"
    ordered = sorted(known) + [float("inf")] * (len(values) - len(known))
    return format(median(ordered), form)


def _row(
    what: Race, method: str, grid: Sequence[Options], folder: Path, seeds: int
) -> tuple[Row, list[dict[str, Any]]]:
    tried = [_run(what, options, folder / f"{i}-0", 0) for i, options in enumerate(grid)]
    sign = -1 if what.rising else 1
    worst = float("inf")
    score = lambda run: (*run.rank, worst if run.best is None else sign * run.best)
    best = min(range(len(grid)), key=lambda i: score(tried[i][0]))
    first, lines = tried[best]
    others = [
        _run(what, grid[best], folder / f"{best}-{seed}", seed)[0] for seed in range(1, seeds)
    ]
    return Row(method, grid[best], len(grid), (first, *others)), lines


def _run(what: Race, options: Options, folder: Path, seed: int) -> tuple[Run, list[dict[str, Any]]]:
    failure = None
    try:
        finish(TrainConfig(**{**what.common, **options, "seed": seed}), folder, quiet=True)
    except ConvergenceError as error:
        failure = str(error)
    lines = [line for line in read_metrics(folder / METRICS) if line["kind"] == "step"]
    firsts = [
        next((line for line in lines if what.reached(line[what.measure], target)), None)
        for target in what.targets
    ]
    values = [line[what.measure] for line in lines if line[what.measure] is not None]
    best = (max if what.rising else min)(values, default=None)
    pace = lines[-1]["seconds"] / lines[-1]["step"] if lines else 0.0
    steps = tuple(None if line is None else line["step"] for line in firsts)
    seconds = tuple(None if line is None else line["seconds"] for line in firsts)
    return Run(steps, seconds, best, pace, failure), lines


def _to_dict(what: Race, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "common": dict(what.common),
        "measure": what.measure,
        "targets": what.targets,
        "refused": dict(what.refused),
        "methods": {
            row.method: {
                "options": dict(row.options),
                "tried": row.tried,
                "runs": [vars(run) for run in row.runs],
            }
            for row in rows
        },
    }
