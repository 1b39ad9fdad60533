"""The steady state of an LQR: costate, control and state; and the static route to the same u.

    (R2)  lam = a + A'lam - K'(b + B'lam)            that is  (I - A_cl)' lam = a - K'b
    (R3)  u = -K x - (R + B'PB)^-1 (b + B'lam),   x = A x + B u
    (F3)  u = -(S'QS + S'M' + M S + R)^-1 (S'a + b),   S = (I - A)^-1 B
    (K1)  p = A'p + Q x + M'u + a,   0 = B'p + M x + R u + b,   x = A x + B u,   p = P x + lam

(R3) needs the stabilising P; (F3) needs neither P nor a Riccati equation, and gives the same u
when P exists (docs/maths.md; checked in the tests to 1e-9). Source: thesis eq. 4.1.7, 4.1.12.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deqlqr._linalg import lu_factor
from deqlqr.dare import Dare, DirectGain
from deqlqr.input_cost import InputCost
from deqlqr.lqr import LQR
from deqlqr.riccati import DareSolution, solve_dare
from deqlqr.solution import ConvergenceError


@dataclass(frozen=True)
class SteadyState:
    """Steady state of the optimally controlled LQR.

    Attributes:
        u: Control, `(*batch, m)`: the update of the parameters at unit step length.
        x: State, `(*batch, n)`: the first-order change of z* that u causes.
        lam: Linear part of the costate, `(*batch, n)`.
        residual: Largest relative residual of the static problem's optimality conditions (K1)
            at (x, u), `(*batch,)`: how well u solves what it is meant to solve, P set aside.
    """

    u: Tensor
    x: Tensor
    lam: Tensor
    residual: Tensor


def steady_state(lqr: LQR, dare: DareSolution | None = None) -> SteadyState:
    """Return the steady state (R2), (R3) of the LQR (L1).

    Args:
        lqr: The problem; its R must hold the damping already.
        dare: The solution of its DARE; solved for if `None`.

    Returns:
        A `SteadyState`.

    Raises:
        ValueError: If `dare` belongs to a problem of another shape.
        ConvergenceError: If the DARE has no stabilising solution, or I - A_cl is singular.

    Example:
        >>> A, B = torch.tensor([[0.5]]), torch.tensor([[1.0]])
        >>> I, O, one = torch.eye(1), torch.zeros(1, 1), torch.ones(1)
        >>> s = steady_state(LQR(A, B, Q=O, R=I, M=O, a=one, b=0 * one))
        >>> s.u.item()  # minus the gradient B'(I - A')^-1 a
        -2.0
    """
    if dare is None:
        dare = solve_dare(lqr.A, lqr.B, lqr.Q, lqr.R, lqr.M)
    if dare.K.shape != lqr.M.shape:
        raise ValueError(
            f"dare must be of a problem with K {tuple(lqr.M.shape)}, got {tuple(dare.K.shape)}."
        )
    A, B = lqr.A, lqr.B
    P, K = dare.P.to(A.dtype), dare.K.to(A.dtype)
    loop = lu_factor(torch.eye(lqr.n, dtype=A.dtype, device=A.device) - (A - B @ K))
    cost = lqr.a[..., None] - K.mT @ lqr.b[..., None]
    lam = loop.solve(cost, adjoint=True)  # (R2)
    gain = dare.gain or DirectGain.of(Dare(A, B, lqr.Q, all_coupled(lqr.R), lqr.M), P)
    drive = gain.solve(lqr.b[..., None] + B.mT @ lam)
    x = loop.solve(-(B @ drive))
    u = -(K @ x) - drive  # (R3)
    require_regular("steady state", u, loop.info)
    p = P @ x + lam
    residual = _optimality(lqr, x, u, p)
    return SteadyState(u[..., 0], x[..., 0], lam[..., 0], residual)


def static_step(lqr: LQR) -> Tensor:
    """Return u (*batch, m) of the static problem (F3), without a Riccati equation.

    Raises:
        ConvergenceError: If I - A or the m x m system is singular.
    """
    eye = torch.eye(lqr.n, dtype=lqr.A.dtype, device=lqr.A.device)
    S, info_S = torch.linalg.solve_ex(eye - lqr.A, lqr.B)
    gradient = S.mT @ lqr.a[..., None] + lqr.b[..., None]
    step, info = torch.linalg.solve_ex(curvature(lqr, S), gradient)
    require_regular("static step", step, info_S, info)
    return -step[..., 0]  # (F3)


def curvature(lqr: LQR, S: Tensor) -> Tensor:
    """Return the matrix of (F3), S'QS + S'M' + M S + R (*batch, m, m), for S (*batch, n, m)."""
    MS = lqr.M @ S
    R = lqr.R.dense() if isinstance(lqr.R, InputCost) else lqr.R
    return S.mT @ lqr.Q @ S + MS + MS.mT + R


def all_coupled(R: Tensor | InputCost) -> InputCost:
    """Return R with no entry left out: one that is 0 has a gradient all the same."""
    if isinstance(R, InputCost):
        return R
    return InputCost(R.diagonal(dim1=-2, dim2=-1), torch.arange(R.shape[-1], device=R.device), R)


def _optimality(lqr: LQR, x: Tensor, u: Tensor, p: Tensor) -> Tensor:
    """Return the largest of (K1)'s three residuals, each relative to its largest term."""
    a, b = lqr.a[..., None], lqr.b[..., None]
    equations = (
        (lqr.A.mT @ p, lqr.Q @ x, lqr.M.mT @ u, a, -p),
        (lqr.B.mT @ p, lqr.M @ x, lqr.R @ u, b),
        (lqr.A @ x, lqr.B @ u, -x),
    )
    worst = torch.zeros_like(x[..., 0, 0])
    for terms in equations:
        scale = torch.stack([term.norm(dim=(-2, -1)) for term in terms]).amax(0)
        error = torch.stack(terms).sum(0).norm(dim=(-2, -1))
        worst = torch.maximum(worst, error / scale.clamp(min=torch.finfo(p.dtype).tiny))
    return worst


def require_regular(what: str, result: Tensor, *infos: Tensor) -> None:
    """Refuse the result of a singular system.

    Raises:
        ConvergenceError: If an info is not 0 or the result is not finite.
    """
    singular = any(bool((info != 0).any()) for info in infos)
    if singular or not bool(result.isfinite().all()):
        raise ConvergenceError(f"{what}: singular linear system or non-finite result.")
