"""Stein (discrete Lyapunov) equation by squaring, batched and differentiable.

    (S1)  X = A'X A + Q
    (S2)  X <- X + A'X A,  A <- A A       after k steps X is the sum of A'^i Q A^i over i < 2^k
    (S3)  tangent:  dX of (S1) with dQ + dA'X A + A'X dA in place of Q
    (S4)  cotangent: Y = A Y A' + X_bar,   Q_bar = Y,   A_bar = X'A Y + X A Y'

Matrix products only, on the tensors' own device; Q need not be symmetric.
Source: R. A. Smith (1968), Matrix equation XA + BX = C, SIAM J. Appl. Math. 16(1).
doi:10.1137/0116017.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deqlqr._checks import one_forward_level
from deqlqr._linalg import batch_first, is_finite, norm, relative
from deqlqr.solution import ConvergenceError, SteinResult, describe_failures


@dataclass(frozen=True)
class SteinSolution:
    """Solution of a Stein equation, per batch element.

    Attributes:
        X: Solution of (S1), `(*batch, n, n)`; differentiable. NaN where `result` is not 0.
        residual: Frobenius norm of (S1)'s error over that of its largest term, `(*batch,)`.
        iterations: Squarings, `(*batch,)`.
        result: A `SteinResult` code, int64, `(*batch,)`.
    """

    X: Tensor
    residual: Tensor
    iterations: Tensor
    result: Tensor

    def raise_if_failed(self) -> "SteinSolution":
        """Return `self`, or raise naming the elements that failed.

        Raises:
            ConvergenceError: If any element has no solution.
        """
        message = describe_failures(self.result, SteinResult, "Stein equation")
        if message is not None:
            raise ConvergenceError(message, self)
        return self


def solve_stein(A: Tensor, Q: Tensor, *, max_steps: int = 60, throw: bool = True) -> SteinSolution:
    """Solve the Stein equation (S1) for A with spectral radius below 1.

    Gradients, reverse to every order and forward once, and `torch.func` transforms go through X by
    the implicit function theorem (S3), (S4). Forward over forward (`jacfwd` of `jacfwd`)
    raises: a custom function would lose the outer tangent.

    Args:
        A: `(*batch, n, n)`, spectral radius below 1.
        Q: `(*batch, n, n)`.
        max_steps: Most squarings; 60 serve a spectral radius of 1 - 1e-15.
        throw: Raise if an element fails. If `False`, inspect `result`.

    Returns:
        A `SteinSolution`.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit.
        ConvergenceError: If `throw` and an element failed.
        RuntimeError: Within forward mode of forward mode.

    Example:
        >>> A, Q = torch.tensor([[0.5, 1.0], [0.0, 0.5]]), torch.eye(2)
        >>> X = solve_stein(A, Q).X
        >>> bool((A.mT @ X @ A + Q - X).norm() < 1e-5)
        True
    """
    for name, X in (("A", A), ("Q", Q)):
        if not isinstance(X, Tensor) or X.dim() < 2 or X.shape[-1] != X.shape[-2]:
            got = str(tuple(X.shape)) if isinstance(X, Tensor) else type(X).__name__
            raise ValueError(f"{name} must be a tensor of shape (*batch, n, n), got {got}.")
        if X.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} must be float32 or float64, got {X.dtype}.")
    if A.shape != Q.shape or A.dtype != Q.dtype or A.device != Q.device:
        raise ValueError(
            f"Q must be {tuple(A.shape)}, {A.dtype} on {A.device} like A, got {tuple(Q.shape)}, "
            f"{Q.dtype} on {Q.device}."
        )
    one_forward_level("solve_stein")
    return SteinSolution(*_Stein.apply(A, Q, max_steps, throw))


class _Stein(torch.autograd.Function):
    """(S1) forward by (S2); its derivatives are Stein equations again."""

    @staticmethod
    def forward(
        A: Tensor, Q: Tensor, max_steps: int, throw: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Raised here: under torch.vmap only this sees which elements failed.
        found = _square(A, Q, max_steps)
        if throw:
            SteinSolution(*found).raise_if_failed()
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        A, _, ctx.max_steps, _ = inputs
        X, *certificate = output
        ctx.mark_non_differentiable(*certificate)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(A, X)
        ctx.save_for_forward(A, X)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple:
        A, X = ctx.saved_tensors
        X_bar = cotangents[0]
        if X_bar is None:
            return None, None, None, None
        Y = _Stein.apply(A.mT, X_bar, ctx.max_steps, False)[0]  # (S4)
        A_bar = X.mT @ A @ Y + X @ A @ Y.mT if ctx.needs_input_grad[0] else None
        return A_bar, Y, None, None

    @staticmethod
    def jvp(ctx: Any, dA: Tensor | None, dQ: Tensor | None, *_: None) -> tuple:
        A, X = ctx.saved_tensors
        right = torch.zeros_like(X) if dQ is None else dQ
        if dA is not None:
            right = right + dA.mT @ X @ A + A.mT @ X @ dA
        return _Stein.apply(A, right, ctx.max_steps, False)[0], None, None, None  # (S3)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, A: Tensor, Q: Tensor, *options: Any) -> tuple:
        A, Q = (
            batch_first(X, dim, info.batch_size) for X, dim in zip((A, Q), in_dims[:2], strict=True)
        )
        return _Stein.apply(A, Q, *options), (0, 0, 0, 0)


def _square(A: Tensor, Q: Tensor, max_steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return X, residual, squarings and result of (S2).

    No element is frozen: one that has converged has a power of A too small to change its X, and
    one that has overflowed spoils no other.
    """
    X, power = Q, A
    size = norm(power)
    # The part of the sum that is left out is at most size^2 / (1 - size^2) times X.
    small = torch.finfo(A.dtype).eps ** 0.5 / 2
    iterations = torch.zeros_like(size, dtype=torch.int64)
    check_every = 1 if A.device.type == "cpu" else 4
    for step in range(max_steps):
        running = (size > small) & size.isfinite()
        if step % check_every == 0 and not bool(running.any()):
            break
        iterations += running
        X = X + power.mT @ X @ power
        power = power @ power
        size = norm(power)
    AXA = A.mT @ X @ A
    residual = relative(AXA + Q - X, AXA, Q, X)
    result = torch.where(size < 1, SteinResult.NOT_CONVERGED, SteinResult.UNSTABLE)
    result = torch.where(size <= small, SteinResult.SOLVED, result)
    finite = is_finite(A) & is_finite(Q) & (is_finite(X) | (result != SteinResult.SOLVED))
    result = torch.where(finite, result, SteinResult.NON_FINITE)
    bad = (result != SteinResult.SOLVED)[..., None, None]
    return X.masked_fill(bad, float("nan")), residual, iterations, result
