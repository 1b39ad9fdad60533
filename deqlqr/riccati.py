"""`solve_dare`: the stabilising solution of the DARE, with certificate and derivatives."""

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from deqlqr._checks import choice, one_forward_level
from deqlqr.dare import Gain
from deqlqr.input_cost import InputCost
from deqlqr.riccati_solve import Options, Solved, solve, solve_once
from deqlqr.search import Doubling
from deqlqr.solution import ConvergenceError, DareResult, describe_failures

Method = Literal["doubling", "scipy"]


@dataclass(frozen=True)
class DareSolution:
    """A solution of the DARE with its certificate, per batch element.

    Attributes:
        P: Stabilising solution, symmetric, `(*batch, n, n)`. NaN where `result` is not 0: what
            is not a stabilising solution is never handed out as one.
        K: Feedback gain of u = -K x, `(*batch, m, n)`. NaN where `result` is not 0.
        closed_loop_radius: Spectral radius of A - BK, `(*batch,)`. What certifies stability is
            its upper bound by `spectral_radius`; this is the estimate of that bound's limit.
        residual: The larger relative residual of (R1)'s two equations: Frobenius norm over that
            of the largest term, `(*batch,)`.
        iterations: Doubling steps, or Newton steps after a warm start, `(*batch,)`.
        result: A `DareResult` code, int64, `(*batch,)`.
        gain: The factors that gave K, for a following `steady_state`; only from `factored_dare`.
    """

    P: Tensor
    K: Tensor
    closed_loop_radius: Tensor
    residual: Tensor
    iterations: Tensor
    result: Tensor
    gain: Gain | None = field(default=None, repr=False)

    @property
    def stabilising(self) -> Tensor:
        """Boolean per batch element: P is the stabilising solution."""
        return self.result == DareResult.STABILISING

    def raise_if_failed(self) -> "DareSolution":
        """Return `self`, or raise naming the elements that failed.

        Raises:
            ConvergenceError: If any element has no stabilising solution.
        """
        message = describe_failures(self.result, DareResult, "DARE")
        if message is not None:
            raise ConvergenceError(message, self)
        return self


def solve_dare(
    A: Tensor,
    B: Tensor,
    Q: Tensor,
    R: Tensor | InputCost,
    M: Tensor | None = None,
    *,
    method: Method = "doubling",
    solver: Doubling = Doubling(),
    P0: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    throw: bool = True,
) -> DareSolution:
    """Solve the DARE (R1) for its stabilising solution P.

    P and K are differentiable in A, B, Q, R and M, reverse to every order and forward once, mixed
    as you like (R9), (R10), and work under `torch.func`. Forward over forward (`jacfwd` of
    `jacfwd`) raises: a custom function would lose the outer tangent. An `InputCost` is
    not differentiated. The linear terms of an LQR do not enter here: see `steady_state`.

    Args:
        A: State matrix, `(*batch, n, n)`; (A, B) must be stabilisable.
        B: Input matrix, `(*batch, n, m)`.
        Q: State cost, symmetric, `(*batch, n, n)`.
        R: Input cost, symmetric, `(*batch, m, m)`; damping belongs here (R_bar). An `InputCost`
            saves finding out which controls it couples.
        M: Cross cost, `(*batch, m, n)`; zero if `None`. SciPy's `s` is its transpose.
        method: `"doubling"`: batched, on the tensors' own device. `"scipy"`: QZ, one problem
            after the other on the CPU in float64, for cross-checks.
        solver: Tolerances and steps of `"doubling"`, and the tolerance of both.
        P0: P of a nearby problem, `(*batch, n, n)`: elements whose old gain still stabilises take
            Newton steps from it; the others are solved afresh.
        out_dtype: Type of P and K; `None` takes that of A. float64 keeps all digits that `refine`
            finds for a float32 problem.
        throw: Raise if an element has no stabilising solution. If `False`, inspect `result`.

    Returns:
        A `DareSolution`.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, or Q or R is not symmetric.
        ConvergenceError: If `throw` and an element failed.
        RuntimeError: Within forward mode of forward mode.

    Example:
        >>> A, B = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.0], [1.0]])
        >>> Q, R = torch.tensor([[1.0, 2.0], [2.0, 4.0]]), torch.tensor([[1.0]])
        >>> dare = solve_dare(A, B, Q, R)
        >>> residual = A.mT @ dare.P @ A + Q - (B.mT @ dare.P @ A).mT @ dare.K - dare.P
        >>> bool(residual.abs().max() < 1e-5), dare.closed_loop_radius.item() < 1
        (True, True)
    """
    A, B, Q, R, M = _checked(A, B, Q, R, M, P0)
    one_forward_level("solve_dare")
    choice("method", method, get_args(Method))
    if out_dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"out_dtype must be float32, float64 or None, got {out_dtype}.")
    options = Options(method, solver, out_dtype or A.dtype, solution=_solution if throw else None)
    return _solution(solve([A], [B], [Q], [R], [M], None if P0 is None else [P0], options))


def factored_dare(
    A: Tensor,
    B: Tensor,
    Q: Tensor,
    R: Tensor | InputCost,
    M: Tensor,
    *,
    solver: Doubling = Doubling(),
    P0: Tensor | None = None,
) -> DareSolution:
    """Solve the DARE as `solve_dare` does, and keep the factors that `steady_state` reuses.

    Not differentiable; never raises for a failure.

    Returns:
        A `DareSolution`; inspect `result`.
    """
    A, B, Q, R, M = _checked(A, B, Q, R, M, P0)
    options = Options("doubling", solver, A.dtype, factors=True)
    with torch.no_grad():
        return _solution(solve_once([A], [B], [Q], [R], [M], None if P0 is None else [P0], options))


def _solution(solved: Solved) -> DareSolution:
    gain = None if solved.gains is None else solved.gains[0]
    return DareSolution(solved.P[0], solved.K[0], *solved[3:7], gain)


def _checked(
    A: Tensor,
    B: Tensor,
    Q: Tensor,
    R: Tensor | InputCost,
    M: Tensor | None,
    P0: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | InputCost, Tensor]:
    """Check everything but the values."""
    if not isinstance(B, Tensor) or B.dim() < 2:
        got = str(tuple(B.shape)) if isinstance(B, Tensor) else type(B).__name__
        raise ValueError(f"B must be a tensor of shape (*batch, n, m), got {got}.")
    *batch, n, m = B.shape
    if m == 0:
        raise ValueError(f"B must have at least one column, got {tuple(B.shape)}.")
    if M is None:
        M = B.new_zeros(*batch, m, n)
    expected = {
        "A": (A, (*batch, n, n)),
        "B": (B, (*batch, n, m)),
        "Q": (Q, (*batch, n, n)),
        "R": (R, (*batch, m, m)),
        "M": (M, (*batch, m, n)),
    } | ({} if P0 is None else {"P0": (P0, (*batch, n, n))})
    for name, (X, shape) in expected.items():
        right_type = isinstance(X, (Tensor, InputCost) if name == "R" else Tensor)
        if not right_type or X.shape != shape:
            got = str(tuple(X.shape)) if right_type else type(X).__name__
            raise ValueError(f"{name} must have shape {shape} to match B, got {got}.")
        if X.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} must be float32 or float64, got {X.dtype}.")
        if X.dtype != B.dtype or X.device != B.device:
            raise ValueError(
                f"{name} must be {B.dtype} on {B.device} like B, got {X.dtype} on {X.device}."
            )
    return A, B, Q, R, M
