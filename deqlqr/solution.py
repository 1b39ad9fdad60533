"""What a solve can end with: result codes per batch element, and the one exception type."""

from enum import IntEnum
from typing import Any, TypeVar

from torch import Tensor


class ResultCode(IntEnum):
    """Outcome of one solve; `message` says what it means and what to try next."""

    message: str

    def __new__(cls, code: int, message: str) -> "ResultCode":
        """Attach the message to the integer code."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.message = message
        return member


class FixedPointResult(ResultCode):
    """Outcome of one sample's fixed-point solve."""

    CONVERGED = 0, "The residual is below the tolerance."
    MAX_STEPS = (
        1,
        "Not converged within `max_steps`. Raise `max_steps`, loosen `tol`, or make the block a "
        "contraction (smaller weights, normalisation).",
    )
    DIVERGED = 2, "The residual grew without bound: the block has no attracting fixed point here."
    NON_FINITE = 3, "The block returned inf or NaN (check the input and the parameters)."
    STALLED = (
        4,
        "The residual has not fallen for `patience` evaluations: `tol` is below what the dtype can "
        "resolve, or the iteration runs in a cycle (try solver `fallback`).",
    )


class DareResult(ResultCode):
    """Outcome of one Riccati solve."""

    STABILISING = 0, "P solves the DARE and the closed loop A - BK is stable."
    NONE = (
        1,
        "No stabilising solution was found: (A, B) may not be stabilisable, or [Q M'; M R] be "
        "indefinite (Newton with a bad Hessian). Raise the damping.",
    )
    NOT_CONVERGED = 2, "Not converged within `max_steps`, or the residual is above `rtol`."
    NON_FINITE = 3, "A, B, Q, R or M holds inf or NaN, or the iteration overflowed."
    BOUNDARY = (
        4,
        "P solves the DARE, but the closed loop's spectral radius is 1 to working precision: a "
        "mode on the unit circle is not controlled.",
    )


class SteinResult(ResultCode):
    """Outcome of one Stein equation."""

    SOLVED = 0, "X solves the equation and the spectral radius of A is below 1."
    UNSTABLE = 1, "The spectral radius of A is not below 1."
    NOT_CONVERGED = 2, "Not converged within `max_steps`: the spectral radius of A is close to 1."
    NON_FINITE = 3, "A or Q holds inf or NaN, or X overflows."


class FiniteResult(ResultCode):
    """Outcome of one finite-horizon LQR."""

    SOLVED = 0, "The controls are the minimum."
    INDEFINITE = (
        1,
        "R + B'PB is not positive definite at a stage: the cost has no minimum (Newton with a bad "
        "Hessian). Raise the damping.",
    )
    NON_FINITE = 2, "A matrix holds inf or NaN, or the recursion overflowed."


class ConvergenceError(RuntimeError):
    """A solve failed for at least one batch element and the caller asked to raise.

    Attributes:
        solution: The solution object of the failed solve, or `None`.
    """

    def __init__(self, message: str, solution: Any = None) -> None:
        super().__init__(message)
        self.solution = solution


Code = TypeVar("Code", bound=ResultCode)


def describe_failures(result: Tensor, codes: type[Code], what: str) -> str | None:
    """Return a sentence on the elements of `result` that are not code 0, or `None` if all are.

    Reads the codes on the host, so this synchronises a CUDA device once.
    """
    flat = result.flatten().tolist()
    failed = [i for i, code in enumerate(flat) if code != 0]
    if not failed:
        return None
    first = next(code for code in codes if code == flat[failed[0]])
    where = ", ".join(map(str, failed[:8])) + (", ..." if len(failed) > 8 else "")
    return (
        f"{what}: {len(failed)} of {len(flat)} batch elements failed (elements {where}); "
        f"first: {first.name}. {first.message}"
    )
