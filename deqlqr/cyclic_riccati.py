"""`solve_cyclic_dare`: the stabilising solution of a cycle of Riccati equations (C1)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from deqlqr._checks import choice, count, one_forward_level
from deqlqr.cyclic_lqr import CyclicLQR, check_phases
from deqlqr.dare import Gain
from deqlqr.input_cost import InputCost
from deqlqr.riccati_solve import Costs, Options, Solved, solve, solve_once
from deqlqr.search import Doubling
from deqlqr.solution import ConvergenceError, DareResult, describe_failures

CyclicMethod = Literal["doubling", "value-iteration", "scipy"]


@dataclass(frozen=True)
class CyclicDareSolution:
    """A solution of a cyclic DARE with its certificate, per batch element.

    Attributes:
        P: Stabilising solution of every phase, symmetric, `(*batch, n_k, n_k)`. NaN where `result`
            is not 0: what is not a stabilising solution is never handed out as one.
        K: Feedback gains of u_k = -K_k x_k, `(*batch, m_k, n_k)`. NaN where `result` is not 0.
        loop: Closed loop around the cycle, the product of all A_k - B_k K_k, from a phase with
            the fewest states on, `(*batch, n, n)`; also where the solve failed.
        closed_loop_radius: Its spectral radius, `(*batch,)`. What certifies stability is its upper
            bound by `spectral_radius`; this is the estimate of that bound's limit.
        residual: The largest relative residual over the phases: Frobenius norm of each equation's
            error over that of its largest term, `(*batch,)`.
        iterations: Doubling steps of the whole cycle, Newton steps after a warm start, or sweeps
            of value iteration, `(*batch,)`.
        result: A `DareResult` code, int64, `(*batch,)`.
        gains: The factors that gave K; only from `factored_cyclic_dare`.
    """

    P: tuple[Tensor, ...]
    K: tuple[Tensor, ...]
    loop: Tensor
    closed_loop_radius: Tensor
    residual: Tensor
    iterations: Tensor
    result: Tensor
    gains: Sequence[Gain] | None = field(default=None, repr=False)

    @property
    def stabilising(self) -> Tensor:
        """Boolean per batch element: P is the stabilising solution."""
        return self.result == DareResult.STABILISING

    @property
    def multipliers(self) -> Tensor:
        """Floquet multipliers, the eigenvalues of `loop`, largest first, complex `(*batch, n)`.

        There are as many as the smallest phase has states; at the other phases the rest are 0.
        NaN where `loop` is not finite.
        """
        finite = self.loop.isfinite().all(-1).all(-1)
        loop = self.loop.masked_fill(~finite[..., None, None], 0.0)
        values = torch.linalg.eigvals(loop)
        order = values.abs().argsort(dim=-1, descending=True)
        return values.gather(-1, order).masked_fill(~finite[..., None], float("nan"))

    def raise_if_failed(self) -> "CyclicDareSolution":
        """Return `self`, or raise naming the elements that failed.

        Raises:
            ConvergenceError: If any element has no stabilising solution.
        """
        message = describe_failures(self.result, DareResult, "cyclic DARE")
        if message is not None:
            raise ConvergenceError(message, self)
        return self


def solve_cyclic_dare(
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    Q: Sequence[Tensor],
    R: Costs,
    M: Sequence[Tensor] | None = None,
    *,
    method: CyclicMethod = "doubling",
    solver: Doubling = Doubling(),
    max_sweeps: int = 10_000,
    P0: Sequence[Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
    throw: bool = True,
) -> CyclicDareSolution:
    """Solve the cyclic (periodic) DARE (C1) for its stabilising solution, one P for each phase.

    Phase k takes x_k to x_{k+1} = A_k x_k + B_k u_k, the last one back to x_0. The numbers of
    states n_k and of controls m_k may differ from phase to phase; m_k = 0 is a phase without
    controls. One phase is `solve_dare`.

    P and K are differentiable in every matrix, reverse to every order and forward once (R9),
    (R10), and work under `torch.func`, as in `solve_dare`.

    Args:
        A: State matrices, `(*batch, n_{k+1}, n_k)`.
        B: Input matrices, `(*batch, n_{k+1}, m_k)`.
        Q: State costs, symmetric, `(*batch, n_k, n_k)`.
        R: Input costs, symmetric, `(*batch, m_k, m_k)`, or an `InputCost` each.
        M: Cross costs, `(*batch, m_k, n_k)`; zero if `None`.
        method: `"doubling"`: the phases composed in a tree, then doubled; batched, on the tensors'
            own device. `"value-iteration"`: backward sweeps around the cycle. `"scipy"`: the
            lifted DARE of all phases side by side by QZ, for cross-checks.
        solver: Tolerances and steps of `"doubling"`; the tolerance, `polish` and `refine` of
            `"value-iteration"`.
        max_sweeps: Most sweeps of `"value-iteration"`.
        P0: P of a nearby problem, `(*batch, n_k, n_k)`: elements whose old gains still stabilise
            take Newton steps from it; the others are solved afresh. Value iteration starts from
            that of the phase with the fewest states.
        out_dtype: Type of P and K; `None` takes that of A.
        throw: Raise if an element has no stabilising solution. If `False`, inspect `result`.

    Returns:
        A `CyclicDareSolution`.

    Raises:
        ValueError: If lengths, shapes, dtypes or devices do not fit, or a Q or R is not symmetric.
        ConvergenceError: If `throw` and an element failed.
        RuntimeError: Within forward mode of forward mode.

    Example:
        >>> A = [torch.tensor([[2.0], [1.0]]), torch.tensor([[1.0, 1.0]])]  # 1 -> 2 -> 1 states
        >>> B = [torch.tensor([[1.0], [0.0]]), torch.zeros(1, 0)]
        >>> Q, R = [torch.eye(1), torch.eye(2)], [torch.eye(1), torch.zeros(0, 0)]
        >>> dare = solve_cyclic_dare(A, B, Q, R)
        >>> [tuple(P.shape) for P in dare.P], dare.multipliers.abs().item() < 1
        ([(1, 1), (2, 2)], True)
    """
    M = _checked(A, B, Q, R, M, P0)
    one_forward_level("solve_cyclic_dare")
    choice("method", method, get_args(CyclicMethod))
    count("max_sweeps", max_sweeps)
    if out_dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"out_dtype must be float32, float64 or None, got {out_dtype}.")
    options = Options(
        method,
        solver,
        out_dtype or A[0].dtype,
        max_sweeps,
        solution=_solution if throw else None,
    )
    return _solution(solve(A, B, Q, R, M, P0, options))


def factored_cyclic_dare(
    lqr: CyclicLQR, *, solver: Doubling = Doubling(), P0: Sequence[Tensor] | None = None
) -> CyclicDareSolution:
    """Solve as `solve_cyclic_dare` does, and keep the factors that a steady state reuses.

    Not differentiable; never raises for a failure.

    Returns:
        A `CyclicDareSolution`; inspect `result`.
    """
    # An InputCost each keeps the phases apart, and with them their factors.
    A, B, Q, R, M = lqr.A, lqr.B, lqr.Q, [InputCost.of(R) for R in lqr.R], lqr.M
    _checked(A, B, Q, R, M, P0)
    options = Options("doubling", solver, A[0].dtype, factors=True)
    with torch.no_grad():
        return _solution(solve_once(A, B, Q, R, M, P0, options))


def _solution(solved: Solved) -> CyclicDareSolution:
    return CyclicDareSolution(*solved)


def _checked(
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    Q: Sequence[Tensor],
    R: Costs,
    M: Sequence[Tensor] | None,
    P0: Sequence[Tensor] | None,
) -> Sequence[Tensor]:
    """Check everything but the values.

    Returns:
        M, zero if it is `None`.

    Raises:
        ValueError: If something does not fit.
    """
    check_phases(A, B, Q, R, M=M, P0=P0)
    if not any(X.shape[-1] for X in B):
        raise ValueError("B must have a column in at least one phase, got none.")
    if M is not None:
        return M
    return [a.new_zeros(*a.shape[:-2], b.shape[-1], a.shape[-1]) for a, b in zip(A, B, strict=True)]
