"""The damped step by the cyclic LQR of the block's layers: one equation for each layer.

With the optimizer's damping the step is that of (O1) (F5). Damping by layer (V4) is another step,
and the Neumann series (V3) another way to it.

Source: thesis sections 4.3 and 5.1, with the corrections of docs/maths.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from deqlqr._linalg import full_precision
from deqlqr.batch import Batch
from deqlqr.cyclic_lqr import CyclicLQR
from deqlqr.cyclic_riccati import factored_cyclic_dare
from deqlqr.cyclic_steady_state import around_cycle, cyclic_steady_state
from deqlqr.direction import Direction, expanded
from deqlqr.divergence import Divergence
from deqlqr.layer_inverse import Inverse, NeumannInverse, Phase
from deqlqr.linearize_phases import PhaseLinearization, linearize_phases
from deqlqr.linearize_samples import Minibatch
from deqlqr.search import Doubling
from deqlqr.solution import ConvergenceError, DareResult, describe_failures
from deqlqr.solver import FixedPointSolution
from deqlqr.staged_lqr import joined, split_up
from deqlqr.sweeps import LayerDamping, Swept, as_phases, sweep_cycle

# What the step needs of P is judged by the steady state, in whatever type it is computed.
_AS_IT_IS = Doubling(refine=0)


@dataclass(frozen=True)
class SweepOptions:
    """How `sweep_cycle` solves.

    Attributes:
        inverse: Of (V1).
        adapt: Damping by layer; `None` for the optimizer's.
        tol: Relative change of P that counts as converged, around a cycle.
        max_sweeps: Most sweeps around it.
    """

    inverse: Inverse
    adapt: LayerDamping | None
    tol: float
    max_sweeps: int


class CyclicProblem:
    """A batch as cyclic LQR problems without damping.

    Attributes:
        loss: The mean loss.
        solutions: The forward solve of the model's DEQ layer.

    Args:
        local: The linearisation.
        minibatch: One problem for the batch, or one for each sample.
        dtype: Type of the linear algebra.
        sizes: Sizes of the parameters.
        sweeps: How to solve by sweeps; `None` for doubling.
    """

    def __init__(
        self,
        local: PhaseLinearization,
        minibatch: Minibatch,
        dtype: torch.dtype,
        sizes: Sequence[int],
        sweeps: SweepOptions | None,
    ) -> None:
        self.loss = local.loss
        self.solutions: Sequence[FixedPointSolution] = local.solutions
        self._sizes, self._sweeps, self._controls = sizes, sweeps, local.controls
        self._lqr: CyclicLQR | None = None
        if local.B is None:
            self._phases: Sequence[Phase] = local.by_products(minibatch, dtype)
        else:
            self._lqr = local.lqr(minibatch, dtype)
            self._phases = as_phases(self._lqr)

    @cached_property
    def gradient(self) -> Tensor:
        """The gradient of the loss (m,), by (F1)."""
        steps = [(phase.A.mT, phase.a[..., None]) for phase in reversed(self._phases)]
        lam, _ = around_cycle(*zip(*steps, strict=True))
        p = len(lam)
        parts = [
            phase.B.adjoint(lam[-(k + 1) % p])[..., 0] + phase.b
            for k, phase in enumerate(self._phases)
        ]
        return _mean(joined(parts, self._controls))

    def metric(self, d: Tensor) -> float:
        """Return d'C d for a change d (m,)."""
        first = self._phases[0]
        wide = d.to(first.A.dtype).expand(*first.A.shape[:-2], -1)
        parts = [part[..., None] for part in split_up(wide, self._controls)]
        drives = [phase.B.times(u) for phase, u in zip(self._phases, parts, strict=True)]
        x, _ = around_cycle([phase.A for phase in self._phases], drives)
        terms = [
            u.mT @ (phase.R @ u + 2 * (phase.M @ x_k)) + x_k.mT @ (phase.Q @ x_k)
            for phase, u, x_k in zip(self._phases, parts, x, strict=True)
        ]
        return float(torch.stack(terms).sum(0).mean())

    def solve(self, shifts: Sequence[float]) -> Direction:
        """Return u of (C4) for the damping of each parameter."""
        shift = expanded(shifts, self._sizes, self._phases[0].A)
        parts = split_up(shift, self._controls)
        if self._sweeps is None:
            return self._exactly(parts)
        return self._by_sweeps(parts, self._sweeps)

    def _stored(self) -> CyclicLQR:
        assert self._lqr is not None  # noqa: S101  B is stored for what is solved exactly
        return self._lqr

    def _exactly(self, shifts: Sequence[Tensor]) -> Direction:
        lqr = self._stored().damped(shifts)
        dare = factored_cyclic_dare(lqr, solver=_AS_IT_IS)
        known = Direction(
            None,
            float("nan"),
            reason=describe_failures(dare.result, DareResult, "cyclic DARE"),
            closed_loop_radius=float(dare.closed_loop_radius.max()),
            dare_residual=float(dare.residual.max()),
            dare_iterations=int(dare.iterations.max()),
        )
        if known.reason is not None:
            return known
        try:
            state = cyclic_steady_state(lqr, dare)
        except ConvergenceError as error:
            return replace(known, reason=str(error))
        return self._completed(known, state.u, state.x, state.residual, shifts)

    def _by_sweeps(self, shifts: Sequence[Tensor], how: SweepOptions) -> Direction:
        first = self._phases[0].A
        least = [_one_number(part).expand(first.shape[:-2]) for part in shifts]
        swept = self._swept(least, how)
        radius = swept.closed_loop_radius
        known = Direction(
            None,
            float("nan"),
            reason=_why_not(swept, how),
            closed_loop_radius=None if radius is None else float(radius.max()),
            dare_iterations=swept.sweeps,
            truncation=float(swept.truncation.max()),
            layer_damping=tuple(
                float(delta.mean()) if len(part) else float("nan")
                for delta, part in zip(swept.delta, shifts, strict=True)
            ),
        )
        if known.reason is not None:
            return known
        used = [
            delta[..., None].expand_as(u) for delta, u in zip(swept.delta, swept.u, strict=True)
        ]
        return self._completed(known, swept.u, swept.x, swept.residual, used)

    def _swept(self, least: Sequence[Tensor], how: SweepOptions) -> Swept:
        return sweep_cycle(
            self._phases, least, inverse=how.inverse, adapt=how.adapt, tol=how.tol,
            max_sweeps=how.max_sweeps,
        )  # fmt: skip

    def _completed(
        self,
        known: Direction,
        u: Sequence[Tensor],
        x: Sequence[Tensor],
        residual: Tensor,
        shifts: Sequence[Tensor],
    ) -> Direction:
        """Return what is known with the step, its slope and its curvature."""
        slope = damped = torch.zeros_like(residual)
        # The KKT point: slope = -u'(C + D)u.
        for phase, u_k, x_k, shift in zip(self._phases, u, x, shifts, strict=True):
            slope = slope + (phase.a * x_k).sum(-1) + (phase.b * u_k).sum(-1)
            damped = damped + (shift * u_k.square()).sum(-1)
        # A stabilising P of an indefinite problem leads to a saddle.
        reason = "the step does not descend" if bool((slope > 0).any()) else None
        return replace(
            known,
            u=_mean(joined(u, self._controls)),
            residual=float(residual.max()),
            slope=float(slope.mean()),
            curvature=float((-slope - damped).mean()),
            reason=reason,
        )


def _why_not(swept: Swept, how: SweepOptions) -> str | None:
    """Return why there is no step, or `None`."""
    if not bool((swept.truncation < 1).all()):
        pairs = enumerate(zip(swept.rho, swept.delta, strict=True))
        above = [(float((rho / delta).max()), k) for k, (rho, delta) in pairs]
        # The least that is above 1: others may be large only because P already diverges.
        ratio, phase = min((pair for pair in above if not pair[0] < 1), default=(float("nan"), 0))
        return (
            f"the Neumann series diverges: rho / delta = {ratio:.3g} in phase {phase}; raise the "
            "damping, or take damping='adaptive-layer'"
        )
    radius = swept.closed_loop_radius
    if radius is not None and not bool((radius < 1).all()):
        return "the closed loop is not stable, or P not finite"
    if not bool(swept.converged.all()):
        return f"P has not settled within {how.max_sweeps} sweeps"
    return None


def linearize_cyclic(
    at: Batch,
    divergence: Divergence,
    dtype: torch.dtype,
    minibatch: Minibatch,
    max_states: int,
    sweeps: SweepOptions | None,
    make: type[CyclicProblem] = CyclicProblem,
) -> CyclicProblem:
    """Linearise the model on a batch, layer by layer, all its chunks together.

    Returns:
        A problem of the class `make`.

    Raises:
        ValueError: If data and model do not fit together, the samples are not independent, the
            block has no phases, or there are more states than `max_states`.
        ConvergenceError: If a sample has no fixed point.
    """
    x, y = (torch.cat(parts) for parts in zip(*at.pieces, strict=True))
    each = max_states // len(x) if minibatch == "exact" else max_states
    by_products = sweeps is not None and isinstance(sweeps.inverse, NeumannInverse)
    with torch.enable_grad(), full_precision(x):
        local = linearize_phases(
            at.model, x, y, at.loss, divergence, max_states=each, stored=not by_products
        )
    return make(local, minibatch, dtype, at.controls.sizes, sweeps)


def _mean(u: Tensor) -> Tensor:
    return u if u.dim() == 1 else u.mean(0)


def _one_number(shift: Tensor) -> Tensor:
    """Return the damping that all controls of a phase share.

    Raises:
        ValueError: If they differ.
    """
    if not len(shift):
        return shift.new_ones(())  # of no consequence
    if bool((shift != shift[0]).any()):
        raise ValueError(
            "damping by layer and the Neumann series take one damping for all parameters of "
            f"a layer, got {shift.min().item():g} to {shift.max().item():g} from the groups."
        )
    return shift[0]
