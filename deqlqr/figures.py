"""Figures: training curves of one run, a measure by iteration of several, updates compared."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

matplotlib.use("Agg")

_FIRST_ORDER = ("gradient descent", "SGD", "Adam", "L-BFGS")  # drawn thin


def plot_curves(lines: list[dict[str, Any]], path: str | Path, title: str) -> None:
    """Draw loss, test accuracy (or error) and the certificates of one run's metrics into a PNG."""
    steps = [line for line in lines if line["kind"] == "step"]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots(2, 2)
    error = any("error" in line for line in steps)
    measure = ("error", "test error", "log") if error else ("accuracy", "test accuracy", "linear")
    panels = (
        ("loss", "training loss (batch)", "log"),
        measure,
        ("evaluations", "evaluations of f per sample", "linear"),
        ("closed_loop_radius", "closed-loop spectral radius", "linear"),
    )
    for axis, (key, label, scale) in zip(axes.flat, panels, strict=True):
        points = [(line["step"], line[key]) for line in steps if line.get(key) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), color="tab:blue", linewidth=1.2)
        else:
            axis.text(0.5, 0.5, "not measured by\nthis optimizer", ha="center", va="center",
                      transform=axis.transAxes, color="grey")  # fmt: skip
        # A log axis needs a positive number.
        scale = scale if any(y > 0 for _, y in points) else "linear"
        axis.set(xlabel="iteration", ylabel=label, yscale=scale)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def plot_runs(
    runs: dict[str, list[dict[str, Any]]],
    path: str | Path,
    title: str,
    measure: str,
    target: float,
    scale: str = "linear",
    alike: Sequence[str] = (),
    until: int | None = None,
) -> None:
    """Draw a measure by iteration and by seconds, one curve for each named run.

    Args:
        runs: Metrics by the run's name.
        path: The PNG.
        title: Over both panels.
        measure: Key of the metrics.
        target: Value of the measure that is marked.
        scale: Of both axes of the left panel.
        alike: Runs whose curves may coincide: each is drawn narrower, on top of those before.
        until: Last iteration shown; `None` for all.
    """
    widths = {name: 1.5 + 1.5 * i for i, name in enumerate(reversed(alike))}
    figure = Figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, lines in runs.items():
        steps = [line for line in lines if line["kind"] == "step"]
        values = [float("nan") if line[measure] is None else line[measure] for line in steps]
        ours = not name.startswith(_FIRST_ORDER)
        style: dict[str, Any] = {
            "linewidth": widths.get(name, 2.0 if ours else 1.2),
            "linestyle": "-" if ours else "--",
            "marker": "o" if len(steps) < 3 else None,  # or it would not be seen
        }  # fmt: skip
        left.plot([line["step"] for line in steps], values, label=name, **style)
        right.plot([line["seconds"] for line in steps], values, **style)
    for axis, label in ((left, "iteration"), (right, "seconds of training")):
        axis.axhline(target, color="grey", linestyle=":", linewidth=1)
        axis.set(xlabel=label)
        axis.grid(alpha=0.3)
    if any(runs.values()):
        right.set_xscale("log")
        right.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        right.xaxis.set_major_formatter("{x:g}")
        right.xaxis.set_minor_formatter(NullFormatter())
        left.set_xlim(right=until)
        left.set_xscale(scale)
        left.set_yscale(scale)
    names = {"accuracy": "test accuracy", "loss": "mean squared error", "error": "test error"}
    left.set(ylabel=names[measure])
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def plot_seeds(
    panels: dict[str, dict[str, list[list[dict[str, Any]]]]], path: str | Path, title: str
) -> None:
    """Draw test accuracy by iteration, a panel for each group: mean and range of the seeds.

    Args:
        panels: Metrics of the runs, by panel, by curve, by seed.
        path: The PNG.
        title: Over all panels.
    """
    figure = Figure(figsize=(5 * len(panels), 4.8), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for number, (axis, (name, curves)) in enumerate(zip(axes, panels.items(), strict=True)):
        # Curves that may coincide: the first wide, the next narrow on top of it.
        wide = [1.0, 5.0] * len(curves)
        for curve, seeds in curves.items():
            by_step: dict[int, list[float]] = {}
            for lines in seeds:
                for line in lines:
                    if line["kind"] == "step":
                        by_step.setdefault(line["step"], []).append(line["accuracy"])
            # Where a seed has failed the curve ends: a mean of the others would flatter it.
            steps = sorted(step for step, found in by_step.items() if len(found) == len(seeds))
            values = [by_step[step] for step in steps]
            style, width = ("--", 1.5) if curve.startswith("fixed") else ("-", wide.pop())
            means = [sum(v) / len(v) for v in values]
            (drawn,) = axis.plot(
                steps, means, style, linewidth=width, label=None if number else curve
            )
            axis.fill_between(
                steps, [min(v) for v in values], [max(v) for v in values],
                color=drawn.get_color(), alpha=0.12, linewidth=0,
            )  # fmt: skip
        axis.set(xlabel="iteration", title=name)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="test accuracy")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def plot_misalignments(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    path: str | Path,
    title: str,
    limits: Mapping[str, float],
    reported: float,
) -> None:
    """Draw test accuracy, loss and 1 - cos of the updates by iteration, a row for each run.

    Args:
        runs: Metrics of every step, by the run's name; accuracy not in all of them.
        path: The PNG.
        title: Over all panels.
        limits: For each key of 1 - cos in the metrics what it may not exceed.
        reported: What the thesis reports for it.
    """
    figure = Figure(figsize=(13, 3.2 * len(runs) + 1.2), layout="constrained")
    axes = figure.subplots(len(runs), 3, squeeze=False, sharex="row", sharey="col")
    for row, (name, lines) in zip(axes, runs.items(), strict=True):
        steps = [line["step"] for line in lines]
        accuracies = [(line["step"], line["accuracy"]) for line in lines if "accuracy" in line]
        row[0].plot(*zip(*accuracies, strict=True), color="tab:blue", linewidth=1.2)
        losses = [line["loss"] for line in lines]
        row[1].plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.6)
        wide = max(1, len(lines) // 30)
        row[1].plot(steps, _mean_of_last(losses, wide), color="tab:blue", linewidth=1.2,
                    label=f"mean of the last {wide}")  # fmt: skip
        row[1].legend(fontsize=8)
        for key in limits:
            row[2].plot(steps, [line[key] for line in lines], linewidth=0.7, label=key)
        for limit in sorted(set(limits.values())):
            row[2].axhline(limit, color="black", linestyle="--", linewidth=1,
                           label=f"at most {limit:g}")  # fmt: skip
        row[2].axhline(
            reported, color="grey", linestyle=":", linewidth=1.2, label=f"thesis, {reported:g}"
        )
        row[2].set_yscale("log")
        for axis, label in zip(row, ("test accuracy", "training loss (batch)", "1 - cos"),
                               strict=True):  # fmt: skip
            axis.set(xlabel="iteration", ylabel=label, title=name)
            axis.grid(alpha=0.3)
    handles, labels = axes[0][2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=6, fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def _mean_of_last(values: Sequence[float], wide: int) -> list[float]:
    sums = [0.0, *accumulate(values)]
    return [(sums[i] - sums[max(0, i - wide)]) / min(i, wide) for i in range(1, len(values) + 1)]
