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
    A, G, H = problem.A, problem.G, problem.H
    n = A.shape[-1]
    eye = identity_like(A)
    broken = torch.where(problem.cost.singular, DareResult.NONE, 0).long()
    running = broken == 0
    iterations = torch.zeros_like(broken)
    change = torch.zeros_like(A[..., 0, 0]) if n else A.new_zeros(A.shape[:-2])
    # The next step would change H by about the square of this one's relative change.
    floor = torch.finfo(A.dtype).eps ** 0.75
    check_every = 1 if A.device.type == "cpu" else 3
    for step in range(max_steps):
        W_solved, _ = torch.linalg.solve_ex(eye + G @ H, torch.cat([A, G], dim=-1))
        WA, WG = W_solved[..., :n], W_solved[..., n:]
        dH = sym(A.mT @ H @ WA)
        H_next = H + dH  # (R5)
        size = norm(H_next)
        change = torch.where(running, norm(dH) / size.clamp(min=torch.finfo(A.dtype).tiny), change)
        finite = size.isfinite()
        iterations += running
        # A finite problem whose iterates overflow or break down has P at infinity.
        broken = torch.where(running & ~finite, DareResult.NONE, broken)
        running = running & finite
        H = torch.where(running[..., None, None], H_next, H)
        running = running & (change > floor)
        if (step + 1) % check_every == 0 and not running.any():
            break
        keep = running[..., None, None]
        A_next, G_next = A @ WA, sym(G + A @ WG @ A.mT)  # (R5)
        A, G = torch.where(keep, A_next, A), torch.where(keep, G_next, G)
    # Steps that still change H by much do not approach a limit: an uncontrolled mode lets P grow.
    stuck = torch.where(change > 1e-3, DareResult.NONE, DareResult.NOT_CONVERGED)
    return H, iterations, torch.where(running, stuck, broken)
