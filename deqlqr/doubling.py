"""The DARE by structure-preserving doubling: matrix products and LU, on the tensors' own device.

    (R5)  W = I + G H,   A <- A W^-1 A,   G <- G + A W^-1 G A',   H <- H + A' H W^-1 A,   H -> P
          from A_0, G_0, H_0 of (R4)
    (R6)  P = alpha I + D, with D of the DARE (A, B, Q + alpha (A'A - I), R + alpha B'B,
          M + alpha B'A): the same closed loop, and an R that may be invertible where R was not

Each step of (R5) squares the closed loop, so the error after k steps is O(rho(A_cl)^(2^k)).

Source: Chu, Fan, Lin, Wang (2004), Structure-preserving algorithms for periodic discrete-time
algebraic Riccati equations, Int. J. Control 77(8). doi:10.1080/00207170410001714988.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from deqlqr._linalg import identity_like, norm, sym
from deqlqr.dare import Dare, Eliminated
from deqlqr.solution import DareResult

_LATE = 15


class Limit(NamedTuple):
    """What (R5) came to."""

    P: Tensor
    iterations: Tensor
    broken: Tensor  # 0, or the `DareResult` code with which it gave up
    eliminated: Eliminated | None  # of the equation as posed, where there was no shift


def double(dare: Dare, max_steps: int, alpha: Tensor | None = None) -> Limit:
    """Return the limit of (R5), through the shift (R6) by alpha (*batch,) if there is one.

    The limit may be another solution than the stabilising one, or none: it wants certifying.
    """
    if alpha is None:
        problem = Eliminated.of(dare)
        return Limit(*_double(problem, max_steps), problem)
    D, iterations, broken = _double(Eliminated.of(dare.shifted(alpha)), max_steps)
    return Limit(alpha[..., None, None] * identity_like(D) + D, iterations, broken, None)  # (R6)


def shift_of(dare: Dare) -> Tensor:
    """Return alpha of (R6) at the scale of the costs; far above it costs digits."""
    costs = torch.stack([norm(dare.Q), dare.R.norm(), norm(dare.M)]).amax(0)
    return torch.where(costs > 0, costs, torch.ones_like(costs))


def _double(problem: Eliminated, max_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    # T = A' and W' = I + H G are what is stored: LAPACK, which counts by columns, then takes them
    # without a copy. G and H are symmetric; H is made so once, at the end.
    T, G, H = problem.A.mT.contiguous(), problem.G, problem.H
    n = T.shape[-1]
    broken = torch.where(problem.cost.singular, DareResult.NONE, 0).long()
    running = broken == 0
    iterations = torch.zeros_like(broken)
    stuck = torch.zeros_like(running)
    # The next step would change H by about the square of this one's relative change, so it is
    # left out; where that misjudges, the residual shows it and asks for a Newton step.
    floor = torch.finfo(T.dtype).eps ** 0.5
    check_every = 1 if T.device.type == "cpu" else 3
    for step in range(max_steps):
        W_transposed = H @ G
        W_transposed.diagonal(dim1=-2, dim2=-1).add_(1)
        solved, _ = torch.linalg.solve_ex(W_transposed.mT, torch.cat([T, G], dim=-2).mT)
        AW_GW = solved.mT  # (W^-1 A)' above (W^-1 G)'
        dH = T @ (AW_GW[..., :n, :] @ H).mT
        H_next = H + dH  # (R5)
        size, change = norm(H_next), norm(dH)
        finite = size.isfinite()
        iterations += running
        # A finite problem whose iterates overflow or break down has P at infinity.
        broken = torch.where(running & ~finite, DareResult.NONE, broken)
        running = running & finite
        H = _where(running, H_next, H)
        # Late steps, of 2^step of the recursion's, that still change H by much approach no limit:
        # a mode that is not controlled lets P grow.
        stuck = running & (change > 1e-3 * size) & (step >= _LATE)
        running = running & (change > floor * size)
        if (step + 1) % check_every == 0 and not running.any():
            break
        both = AW_GW @ T
        G_next = G + both[..., n:, :].mT @ T  # (R5)
        T, G = _where(running, both[..., :n, :], T), _where(running, G_next, G)
    unfinished = torch.where(stuck, DareResult.NONE, DareResult.NOT_CONVERGED)
    return sym(H), iterations, torch.where(running, unfinished, broken)


def _where(take: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return new where `take`, else old: an element that is done must not change any more."""
    if take.device.type == "cpu" and take.all():
        return new
    return torch.where(take[..., None, None], new, old)
