"""The steady state of a cyclic LQR: costates, controls and states of every phase.

    (C3)  lam_k = a_k + A_k'lam_{k+1} - K_k'(b_k + B_k'lam_{k+1})
    (C4)  u_k = -K_k x_k - (R_k + B_k'P_{k+1}B_k)^-1 (b_k + B_k'lam_{k+1}),
          x_{k+1} = A_k x_k + B_k u_k
    (C5)  p_k = A_k'p_{k+1} + Q_k x_k + M_k'u_k + a_k,   0 = B_k'p_{k+1} + M_k x_k + R_k u_k + b_k,
          p_k = P_k x_k + lam_k

that is (R2), (R3) and (K1) at every phase. Source: thesis eq. 4.3.3 and 4.3.4, with the indices of
docs/maths.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deqlqr._linalg import identity_like, lu_factor, norm
from deqlqr.cyclic_lqr import CyclicLQR
from deqlqr.cyclic_riccati import CyclicDareSolution, solve_cyclic_dare
from deqlqr.dare import Dare, DirectGain
from deqlqr.scan import following
from deqlqr.steady_state import all_coupled, require_regular


@dataclass(frozen=True)
class CyclicSteadyState:
    """Steady state of the optimally controlled cyclic LQR.

    Attributes:
        u: Controls of every phase, `(*batch, m_k)`.
        x: States, `(*batch, n_k)`: the first-order changes inside the block that u causes.
        lam: Linear parts of the costates, `(*batch, n_k)`.
        residual: Largest relative residual of the optimality conditions (C5), `(*batch,)`.
    """

    u: tuple[Tensor, ...]
    x: tuple[Tensor, ...]
    lam: tuple[Tensor, ...]
    residual: Tensor


def cyclic_steady_state(
    lqr: CyclicLQR, dare: CyclicDareSolution | None = None
) -> CyclicSteadyState:
    """Return the steady state (C3), (C4) of the cyclic LQR (L2).

    Args:
        lqr: The problem; its R must hold the damping already.
        dare: The solution of its cyclic DARE; solved for if `None`.

    Returns:
        A `CyclicSteadyState`.

    Raises:
        ValueError: If `dare` belongs to a problem of another shape.
        ConvergenceError: If the DARE has no stabilising solution, or a system is singular.

    Example:
        >>> I, O, one = torch.eye(1), torch.zeros(1, 1), torch.ones(1)
        >>> a, b = [one, 0 * one], [0 * one, 0 * one]
        >>> lqr = CyclicLQR([I / 2, I], [I, I], [O, O], [I, I], [O, O], a, b)
        >>> [u.item() for u in cyclic_steady_state(lqr).u]  # minus the gradient, layer by layer
        [-2.0, -2.0]
    """
    if dare is None:
        dare = solve_cyclic_dare(lqr.A, lqr.B, lqr.Q, lqr.R, lqr.M)
    if [K.shape for K in dare.K] != [M.shape for M in lqr.M]:
        raise ValueError(
            f"dare must be of a problem with K {[tuple(M.shape) for M in lqr.M]}, got "
            f"{[tuple(K.shape) for K in dare.K]}."
        )
    dtype = lqr.A[0].dtype
    P, K = ([X.to(dtype) for X in Xs] for Xs in (dare.P, dare.K))
    gains = dare.gains or [
        DirectGain.of(Dare(A, B, Q, all_coupled(R), M), P_next)
        for A, B, Q, R, M, P_next in zip(
            lqr.A, lqr.B, lqr.Q, lqr.R, lqr.M, following(P), strict=True
        )
    ]
    A_cl = [A - B @ k for A, B, k in zip(lqr.A, lqr.B, K, strict=True)]
    a, b = ([X[..., None] for X in Xs] for Xs in (lqr.a, lqr.b))
    cost = [a_k - k.mT @ b_k for a_k, k, b_k in zip(a, K, b, strict=True)]
    turned = [X.mT for X in A_cl]
    # Against the sense of the cycle, lam_k follows lam_{k+1}.
    lam, info = around_cycle(turned[::-1], cost[::-1])
    lam = [lam[-k % len(lam)] for k in range(len(lam))]
    drive = [
        gain.solve(b_k + B.mT @ ahead)
        for gain, b_k, B, ahead in zip(gains, b, lqr.B, following(lam), strict=True)
    ]
    x, info_x = around_cycle(A_cl, [-(B @ d) for B, d in zip(lqr.B, drive, strict=True)])
    u = [-(k @ x_k) - d for k, x_k, d in zip(K, x, drive, strict=True)]  # (C4)
    require_regular("steady state", torch.cat(u, dim=-2), info, info_x)
    p = [P_k @ x_k + lam_k for P_k, x_k, lam_k in zip(P, x, lam, strict=True)]
    controls, states, linear = (tuple(X[..., 0] for X in Xs) for Xs in (u, x, lam))
    return CyclicSteadyState(controls, states, linear, _optimality(lqr, x, u, p))


def around_cycle(F: Sequence[Tensor], c: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return y_k with y_{k+1} = F_k y_k + c_k around the cycle, and whether it is singular.

    Args:
        F: `(*batch, n_{k+1}, n_k)`.
        c: `(*batch, n_{k+1}, j)`.
    """
    whole, drift = F[0], c[0]
    for F_k, c_k in zip(F[1:], c[1:], strict=True):
        whole, drift = F_k @ whole, F_k @ drift + c_k
    loop = lu_factor(identity_like(whole) - whole)
    y = [loop.solve(drift)]
    for F_k, c_k in zip(F[:-1], c[:-1], strict=True):
        y.append(F_k @ y[-1] + c_k)
    return y, loop.info


def _optimality(
    lqr: CyclicLQR, x: Sequence[Tensor], u: Sequence[Tensor], p: Sequence[Tensor]
) -> Tensor:
    """Return the largest residual of (C5) and of the dynamics."""
    kinds = []
    for k in range(lqr.p):
        x_next, p_next = x[(k + 1) % lqr.p], p[(k + 1) % lqr.p]
        A, B, Q, R, M = lqr.A[k], lqr.B[k], lqr.Q[k], lqr.R[k], lqr.M[k]
        a, b = lqr.a[k][..., None], lqr.b[k][..., None]
        kinds.append((
            (A.mT @ p_next, Q @ x[k], M.mT @ u[k], a, -p[k]),
            (B.mT @ p_next, M @ x[k], R @ u[k], b),
            (A @ x[k], B @ u[k], -x_next),
        ))
    return worst_residual(kinds)


def worst_residual(phases: Sequence[Sequence[tuple[Tensor, ...]]]) -> Tensor:
    """Return the largest error of the phases' equations, `(*batch,)`.

    Args:
        phases: The equations of each phase, as terms `(*batch, n, 1)` that should sum to 0. Errors
            are relative to the largest term of the same equation in any phase, since in one phase
            all its terms may be rounding.
    """
    worst = []
    for equations in zip(*phases, strict=True):
        sizes = torch.stack([norm(term) for terms in equations for term in terms]).amax(0)
        errors = torch.stack([norm(torch.stack(terms).sum(0)) for terms in equations]).amax(0)
        worst.append(errors / sizes.clamp(min=torch.finfo(errors.dtype).tiny))
    return torch.stack(worst).amax(0)
