"""Every route to the same step, compared on the user's own model and batch, in float64."""

from torch import Tensor, nn

from deqlqr._checks import at_least
from deqlqr.deq import layers_of
from deqlqr.deq_equivalence import EquilibriumCase
from deqlqr.divergence import DivergenceLike
from deqlqr.equivalence_rows import EquivalenceReport, EquivalenceRow
from deqlqr.linearize_samples import choose_divergence
from deqlqr.loss import LossLike, make_loss
from deqlqr.net_equivalence import NetCase

__all__ = ["EquivalenceReport", "EquivalenceRow", "check_equivalence"]


def check_equivalence(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: LossLike = "cross_entropy",
    divergence: DivergenceLike | None = None,
    damping: float = 1e-2,
    max_states: int = 2048,
    max_controls: int = 6144,
) -> EquivalenceReport:
    """Compare all routes to the gradient and to the damped step of a model on one batch.

    Works on a float64 copy with fixed points solved to 1e-13; the model is not changed. A model
    without DEQ layer is checked as a finite horizon, layer by layer.

    Args:
        model: Module with one `DEQ` layer or none; outputs `(batch, k)`.
        x: Inputs `(batch, ...)`; a few samples are enough.
        y: Targets.
        loss: As in `linearize`.
        divergence: As in `linearize`: that of the damped step. Newton is compared in any case.
        damping: delta of R_bar = R + delta I, above 0.
        max_states: Largest batch x state size (between two layers, if there is no DEQ layer); the
            dense routes cost its cube.
        max_controls: Rows that form a dense m x m curvature are skipped above this m.

    Returns:
        An `EquivalenceReport`.

    Raises:
        ValueError: If the data, the options or the sizes do not fit.
        ConvergenceError: If a sample has no fixed point.

    Example:
        >>> import torch
        >>> from deqlqr import DEQ, DenseBlock
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(DEQ(DenseBlock(3)), nn.Linear(3, 2))
        >>> report = check_equivalence(model, torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
        >>> report.passed, len(report.rows)
        (True, 15)
    """
    damping = at_least("damping", damping, 0.0, strict=True)
    chosen = choose_divergence(loss, divergence)
    make = EquilibriumCase if layers_of(model) else NetCase
    case = make(model, x, y, make_loss(loss), damping, max_controls, max_states)
    return EquivalenceReport(tuple(case.rows(chosen)), case.facts())
