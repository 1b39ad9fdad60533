"""Figures of the papers, repeated: each writes its figure, its numbers, and a line.

The experiments: `deqlqr.reproduce_cosine` (figure 3.1), `deqlqr.reproduce_routes` (4.1),
`deqlqr.reproduce_damping` (5.1), `deqlqr.reproduce_msa` (extended MSA), `deqlqr.reproduce_ddp` and
`deqlqr.reproduce_ddp_spectrum` (DDP), `deqlqr.reproduce_ddp_deq` (DDP on a DEQ),
`deqlqr.reproduce_points` (the slides).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from deqlqr._checks import at_least, choice
from deqlqr.reproduce_cosine import reproduce_cosine
from deqlqr.reproduce_damping import FINITE, INFINITE, reproduce_damping
from deqlqr.reproduce_ddp import (
    FULL_STEPS,
    reproduce_ddp_fig5,
    reproduce_ddp_table3,
    reproduce_ddp_table4,
)
from deqlqr.reproduce_ddp_deq import reproduce_ddp_deq
from deqlqr.reproduce_ddp_spectrum import reproduce_ddp_fig3
from deqlqr.reproduce_msa import reproduce_emsa_fig1, reproduce_emsa_fig2
from deqlqr.reproduce_points import reproduce_fields, reproduce_spiral
from deqlqr.reproduce_routes import THESIS_STEPS, reproduce_routes

EPOCH = 12_000  # steps of a pass over MNIST in batches of 5


@dataclass(frozen=True)
class Experiment:
    """A figure's experiment.

    Attributes:
        run: Takes the data root, the folder of the results and the steps, and returns the line.
        steps: How many by default.
        full: How many the thesis took; `None` where the source names no scale of its own.
        mnist: Whether it needs MNIST.
    """

    run: Callable[[Path | None, Path, int], str]
    steps: int
    full: int | None
    mnist: bool


FIGURES = {
    "fig3.1": Experiment(reproduce_cosine, 600, EPOCH, mnist=True),
    "fig4.1": Experiment(reproduce_routes, 200, THESIS_STEPS, mnist=True),
    "fig5.1": Experiment(partial(reproduce_damping, FINITE), 100, EPOCH, mnist=True),
    "fig5.1-deq": Experiment(partial(reproduce_damping, INFINITE), 100, None, mnist=True),
    "emsa-fig1": Experiment(reproduce_emsa_fig1, 60, 200, mnist=False),
    "emsa-fig2": Experiment(reproduce_emsa_fig2, 40, 5500, mnist=True),
    "ddp-table3": Experiment(reproduce_ddp_table3, 200, FULL_STEPS, mnist=False),
    "ddp-table4": Experiment(reproduce_ddp_table4, 200, FULL_STEPS, mnist=False),
    "ddp-fig3": Experiment(reproduce_ddp_fig3, 100, 500, mnist=False),
    "ddp-fig5": Experiment(reproduce_ddp_fig5, 200, FULL_STEPS, mnist=False),
    "ddp-deq": Experiment(reproduce_ddp_deq, 30, None, mnist=False),
    "spiral": Experiment(reproduce_spiral, 120, None, mnist=False),
    "fields": Experiment(reproduce_fields, 60, None, mnist=False),
}


def reproduce(
    figure: str,
    data_root: Path | None,
    out: Path,
    steps: int | None = None,
    full: bool = False,
) -> str:
    """Run a figure's experiment under `out`.

    Args:
        figure: One of `FIGURES`.
        data_root: The folder that holds MNIST/raw, for the figures that need it.
        out: Folder of the results; finished runs in it are not repeated, interrupted ones go on.
        steps: Steps of a training; `None` takes the usual number.
        full: Take the thesis' number instead.

    Returns:
        The line that sums it up: what the source reports, and what was measured.

    Raises:
        ValueError: If the figure is unknown, `steps` is below 1 or given with `full`, the figure
            has no full scale, or the data are missing.
    """
    found = FIGURES[choice("figure", figure, tuple(FIGURES))]
    if data_root is None and found.mnist:
        raise ValueError(f"figure {figure!r} needs a data root: the folder that holds MNIST/raw.")
    if full and steps is not None:
        raise ValueError(f"steps cannot be given with full, which has its own, got {steps}.")
    if full and found.full is None:
        raise ValueError(
            f"full is for {', '.join(n for n, f in FIGURES.items() if f.full)}: figure {figure!r} "
            "has one scale only, but for steps."
        )
    usual = found.full if full and found.full is not None else found.steps
    steps = usual if steps is None else steps
    at_least("steps", steps, 1)
    return found.run(data_root, out, steps)
