"""Ways to a stabilising P of a cycle (C1), tried in order; what they find is judged alike.

Doubling first, on the equations as posed; then through the exact shift (R6), where they have no
stabilising solution that doubling finds; then Newton steps (R8), where rounding is not the limit.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import LinAlgError, solve_discrete_are
from torch import Tensor

from deqlqr._linalg import identity_like, norm, sym
from deqlqr.cycle import Cycle, Found, choose, judge
from deqlqr.dare import Dare, DirectGain
from deqlqr.doubling import double, shift_of
from deqlqr.newton import newton_step
from deqlqr.solution import DareResult

_SHIFTS = (1.0, 1e2, 1e-2)  # of the scale of the costs; tried in this order where doubling fails
_WARM_STEPS = 8
_POLISHING_STEPS = 4


@dataclass(frozen=True)
class Doubling:
    """How `solve_dare` solves: doubling (R5), the exact shift (R6) where it fails, Newton (R8).

    Attributes:
        rtol: Largest residual accepted; `None` takes 1e-8, or 1e-4 for float32 without `refine`.
        max_steps: Most doubling steps.
        polish: Take one Newton step (R8) at the end; `None` takes up to four while the residual is
            above what rounding explains. A step that does not lower the residual is dropped.
        refine: For float32: Newton steps (R8) with the residual in float64 and the correction in
            float32. 0 leaves the solution at the accuracy of float32.
    """

    rtol: float | None = None
    max_steps: int = 40
    polish: bool | None = None
    refine: int = 2


def by_doubling(cycle: Cycle, P0: list[Tensor] | None, rtol: float, max_steps: int) -> Found:
    """Return what doubling finds; elements that P0 serves take Newton steps from it instead."""
    warm = None if P0 is None else _warm(cycle, P0, rtol)
    if warm is not None and warm.stabilising.all():
        return warm
    limit = double(cycle, max_steps)
    found = judge(cycle, limit.P, limit.iterations, limit.broken, rtol, limit.eliminated)
    if warm is not None:
        found = choose(warm.stabilising, warm, found)
    for factor in _SHIFTS:
        wrong = (found.certificate.result != 0) & (
            found.certificate.result != DareResult.NON_FINITE
        )
        if not wrong.any():
            break
        found = _retried(cycle, found, wrong, factor, rtol, max_steps)
    return found


def _warm(cycle: Cycle, P0: list[Tensor], rtol: float) -> Found:
    """Return Newton's limit from P0; elements it does not serve are not stabilising."""
    zero = torch.zeros(cycle.batch, dtype=torch.int64, device=cycle.device)
    found = judge(cycle, [sym(P).to(cycle.dtype) for P in P0], zero, zero, rtol)
    enough = 100 * torch.finfo(cycle.dtype).eps  # what rounding alone explains
    for _ in range(_WARM_STEPS):
        stable = found.certificate.closed_loop_radius < 1
        if not (stable & (found.certificate.residual > enough)).any():
            break
        found, _ = newton_step(cycle, found, rtol, monotone=False, above=enough)
    # Short of rounding level Newton has not converged, whatever rtol allows.
    slow = found.certificate.residual > 1e3 * enough
    return found.with_result(found.certificate.result.masked_fill(slow, DareResult.NOT_CONVERGED))


def polished(cycle: Cycle, found: Found, rtol: float, polish: bool | None) -> Found:
    """Return the candidate after Newton steps, if asked for or while the residual asks for one."""
    if polish is False:
        return found
    eps = torch.finfo(cycle.dtype).eps
    level = (1e3 + 10 * max(cycle.sizes)) * eps
    for step in range(1 if polish else _POLISHING_STEPS):
        # A residual of P is an error of P that is larger by 1 / (1 - rho^2).
        _, _, _, radius, residual, _ = found.certificate
        wanted = (level * (1 - radius**2)).clamp(min=10 * eps, max=rtol)
        asked = (residual > wanted) & (radius < 1)
        if step > 0:  # one step may finish what doubling began; others only add digits
            asked = asked & found.stabilising
        if polish is None and not asked.any():
            break
        found, better = newton_step(cycle, found, rtol)
        if not better.any():
            break
    return found


def refined(cycle: Cycle, found: Found, rtol: float, steps: int) -> Found:
    """Return the solution in float64, by Newton steps that are corrected in float32."""
    exact = cycle.to(torch.float64)
    broken = torch.where(found.stabilising, 0, found.certificate.result)
    precise = judge(exact, [P.double() for P in found.P], found.iterations, broken, rtol)
    for _ in range(steps):
        precise, better = newton_step(exact, precise, rtol, stein_dtype=torch.float32)
        if not better.any():
            break
    # What failed in float32 keeps its code, unless it is certified now.
    known = found.stabilising | precise.stabilising
    return precise.with_result(
        torch.where(known, precise.certificate.result, found.certificate.result)
    )


def _retried(
    cycle: Cycle, found: Found, wrong: Tensor, factor: float, rtol: float, max_steps: int
) -> Found:
    """Solve the elements `wrong` through the shift (R6); the others are not touched."""
    index = wrong.reshape(-1).nonzero()[:, 0]
    part = cycle.pick(index)
    limit = double(part, max_steps, factor * shift_of(part))
    again = judge(part, limit.P, limit.iterations, limit.broken, rtol)

    def spread(whole: Tensor, piece: Tensor) -> Tensor:
        flat = whole.reshape(wrong.numel(), *whole.shape[wrong.dim() :])
        return flat.index_copy(0, index, piece).reshape(whole.shape)

    # Where both fail, the verdict on the problem as posed stands.
    solved = found.zip_with(spread, again)
    return choose(wrong & solved.stabilising, solved, found)


def by_value_iteration(
    cycle: Cycle, P0: list[Tensor] | None, rtol: float, max_sweeps: int
) -> Found:
    """Return the limit of backward sweeps around the cycle, by (C1) as it stands.

    They start from a multiple of I at the scale of the costs: from a positive definite P they go
    to the stabilising solution even where a mode is not seen by the costs.
    """
    phases, eps = cycle.phases(), torch.finfo(cycle.dtype).eps
    if P0 is None:
        last = shift_of(cycle)[..., None, None] * identity_like(phases[0].Q)
    else:
        last = sym(P0[0]).to(cycle.dtype)
    P: list[Tensor] = []
    running = torch.ones(cycle.batch, dtype=torch.bool, device=cycle.device)
    sweeps, slack = torch.zeros_like(running, dtype=torch.int64), norm(last) * float("inf")
    check_every = 1 if cycle.device.type == "cpu" else 8
    for sweep in range(max_sweeps):
        swept = [last]
        for dare in reversed(phases):
            swept.insert(0, value_step(dare, swept[0]))
        take, (*swept, _) = running[..., None, None], swept
        P = [torch.where(take, new, old) for new, old in zip(swept, P or swept, strict=True)]
        change, size = norm(P[0] - last), norm(P[0])
        last, sweeps = P[0], sweeps + running
        # Changes shrink steadily until they are rounding; what is rounding shrinks no more.
        settled = (change <= 10 * eps * size) | ((change <= eps**0.5 * size) & (change >= slack))
        running, slack = running & ~settled & size.isfinite(), change
        if (sweep + 1) % check_every == 0 and not running.any():
            break
    overflow = torch.stack([~norm(X).isfinite() for X in P]).any(0)
    return judge(cycle, P, sweeps, torch.where(overflow, DareResult.NONE, 0).long(), rtol)


def value_step(dare: Dare, P_next: Tensor) -> Tensor:
    """Return P at the start of a phase from P+ at its end, by (R1)."""
    gain = DirectGain.of(dare, P_next)
    return sym(dare.A.mT @ P_next @ dare.A + dare.Q - gain.mixed.mT @ gain.K)


def by_scipy(cycle: Cycle, rtol: float) -> Found:
    """Return SciPy's solutions of the lifted DARE, judged as any other; NaN where it raises.

    The lift has the states of all phases side by side, and one step of it moves every phase on.
    """
    phases = [tuple(X.to("cpu", torch.float64) for X in dare.dense()) for dare in cycle.phases()]
    P = [torch.full_like(Q, float("nan")) for _, _, Q, _, _ in phases]
    broken = torch.full(cycle.batch, int(DareResult.NONE))
    ends = list(itertools.accumulate(cycle.sizes, initial=0))
    for i in np.ndindex(cycle.batch):
        try:
            arrays = lifted([tuple(X[i] for X in phase) for phase in phases])
            A, B, Q, R, M = (X.numpy() for X in arrays)
            whole = torch.as_tensor(solve_discrete_are(A, B, Q, R, s=M.T))
        except (LinAlgError, ValueError):  # no solution, or not finite
            continue
        broken[i] = 0
        for k, (begin, end) in enumerate(itertools.pairwise(ends)):
            P[k][i] = whole[begin:end, begin:end]
    like = phases[0][0].new_empty(0, dtype=cycle.dtype, device=cycle.device)
    broken = broken.to(cycle.device)
    return judge(cycle, [sym(X).to(like) for X in P], torch.zeros_like(broken), broken, rtol)


def lifted(phases: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Return A, B, Q, R, M of the lift; A, B, Q, R, M of each phase are single matrices."""
    A, B, Q, R, M = map(list, zip(*phases, strict=True))
    # Block k of the states moves to block k + 1: the last block row of diag(A) comes first.
    rows = A[-1].shape[0]
    turned = [X.roll(rows, 0) for X in (torch.block_diag(*A), torch.block_diag(*B))]
    return *turned, torch.block_diag(*Q), torch.block_diag(*R), torch.block_diag(*M)
