"""The damped step by the dense DARE (O1): a batch as an LQR, or one LQR for each sample.

    (O1)  u of (R3), from the DARE at R_bar = R + delta I

Source: thesis algorithm 1, with the corrections of docs/maths.md.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from deqlqr._linalg import LUFactor, full_precision, identity_like, lu_factor
from deqlqr.batch import Batch
from deqlqr.direction import Direction, expanded
from deqlqr.divergence import Divergence
from deqlqr.linearize_samples import Minibatch, linearize_samples
from deqlqr.lqr import LQR
from deqlqr.riccati import factored_dare
from deqlqr.search import Doubling
from deqlqr.solution import ConvergenceError, DareResult, describe_failures
from deqlqr.solver import FixedPointSolution
from deqlqr.steady_state import steady_state

# What the step needs of P is judged by the steady state, in whatever type it is computed.
_AS_IT_IS = Doubling(refine=0)


class RiccatiProblem:
    """A batch as LQR problems without damping.

    Attributes:
        lqr: One problem, or one for each sample.
        loss: The mean loss.
        solutions: The forward solve of the model's DEQ layer.
    """

    def __init__(
        self, lqr: LQR, loss: Tensor, solutions: Sequence[FixedPointSolution], sizes: Sequence[int]
    ) -> None:
        self.lqr, self.loss, self.solutions, self._sizes = lqr, loss, solutions, sizes

    @cached_property
    def _resolvent(self) -> LUFactor:
        return lu_factor(identity_like(self.lqr.A) - self.lqr.A)

    @cached_property
    def gradient(self) -> Tensor:
        """The gradient of the loss (m,), by (F1)."""
        lam = self._resolvent.solve(self.lqr.a[..., None], adjoint=True)
        return _mean((self.lqr.B.mT @ lam)[..., 0] + self.lqr.b)

    def foreseen(self, d: Tensor) -> Tensor:
        """Return S d (*batch, n), the change of z* that a change d (m,) makes to first order."""
        wide = d.to(self.lqr.A.dtype).expand(*self.lqr.b.shape)[..., None]
        return self._resolvent.solve(self.lqr.B @ wide)[..., 0]

    def metric(self, d: Tensor) -> float:
        """Return d'C d for a change d (m,)."""
        lqr = self.lqr
        wide = d.to(lqr.A.dtype).expand(*lqr.b.shape)[..., None]
        x = self.foreseen(d)[..., None]
        Cd = wide.mT @ (lqr.R @ wide + 2 * (lqr.M @ x)) + x.mT @ (lqr.Q @ x)
        return float(Cd.mean())

    def solve(self, shifts: Sequence[float]) -> Direction:
        """Return u of (O1) for the damping of each parameter."""
        lqr = self.lqr.damped(expanded(shifts, self._sizes, self.lqr.b))
        dare = factored_dare(lqr.A, lqr.B, lqr.Q, lqr.R, lqr.M, solver=_AS_IT_IS)
        radius = float(dare.closed_loop_radius.max())
        facts = radius, float(dare.residual.max()), int(dare.iterations.max())
        failure = describe_failures(dare.result, DareResult, "DARE")
        if failure is not None:
            return _none(failure, *facts)
        try:
            state = steady_state(lqr, dare)
        except ConvergenceError as error:
            return _none(str(error), *facts)
        slope = (lqr.a * state.x).sum(-1) + (lqr.b * state.u).sum(-1)
        reason = None
        if bool((slope > 0).any()):  # a stabilising P of an indefinite problem: a saddle
            reason = "the step does not descend"
        # The KKT point: slope = -u'(C + D)u.
        shift = expanded(shifts, self._sizes, self.lqr.b)
        curvature = -slope - (shift * state.u.square()).sum(-1)
        return Direction(
            _mean(state.u), float(state.residual.max()), float(slope.mean()),
            float(curvature.mean()), reason, *facts,
            K=dare.K if lqr.b.dim() == 1 else None,
        )  # fmt: skip


def linearize_riccati(
    at: Batch, divergence: Divergence, dtype: torch.dtype, minibatch: Minibatch, max_states: int
) -> RiccatiProblem:
    """Linearise the model on a batch, all its chunks together.

    Returns:
        A `RiccatiProblem`.

    Raises:
        ValueError: If data and model do not fit together, the samples are not independent, or
            there are more states than `max_states`.
        ConvergenceError: If a sample has no fixed point.
    """
    x, y = (torch.cat(parts) for parts in zip(*at.pieces, strict=True))
    each = max_states // len(x) if minibatch == "exact" else max_states
    with torch.enable_grad(), full_precision(x):
        local = linearize_samples(at.model, x, y, at.loss, divergence, max_states=each)
    lqr = local.exact() if minibatch == "exact" else local.per_sample()
    return RiccatiProblem(lqr.to(dtype), local.loss, [local.solution], at.controls.sizes)


def _mean(u: Tensor) -> Tensor:
    return u if u.dim() == 1 else u.mean(0)


def _none(reason: str, radius: float, residual: float, iterations: int) -> Direction:
    nan = float("nan")
    return Direction(None, nan, nan, nan, reason, radius, residual, iterations)
