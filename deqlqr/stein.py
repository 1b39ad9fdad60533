"""Stein (discrete Lyapunov) equation by squaring, batched and differentiable; cycles of them.

    (S1)  X_k = A_k'X_{k+1}A_k + Q_k,   k = 0 ... p-1 and X_p = X_0;   p = 1: X = A'X A + Q
    (S2)  X <- X + A'X A,  A <- A A       after k steps X is the sum of A'^i Q A^i over i < 2^k
    (S3)  tangent:  dX of (S1) with dQ + dA'X+A + A'X+dA in place of Q,   X+ = X_{k+1}
    (S4)  cotangent: Y+ = A Y A' + X+_bar,   Q_bar = Y,   A_bar = X+'A Y + X+ A Y'
    (S5)  two phases, one after the other:  A <- A+ A,   Q <- Q + A'Q+A

(S5) composes a cycle to one equation for the X of its first phase, which (S2) solves.

Matrix products only, on the tensors' own device; Q need not be symmetric.
Source: R. A. Smith (1968), Matrix equation XA + BX = C, SIAM J. Appl. Math. 16(1).
doi:10.1137/0116017.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deqlqr._checks import one_forward_level, phase_count
from deqlqr._linalg import batch_first, is_finite, norm, relative, zeros_if_none
from deqlqr.scan import Chain, following, halves, in_groups
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
        _raise_if_failed(self, self.result)
        return self


@dataclass(frozen=True)
class CyclicSteinSolution:
    """Solution of a cycle of Stein equations, per batch element.

    Attributes:
        X: Solutions X_k of (S1), `(*batch, n_k, n_k)`; differentiable. NaN where `result` is not 0.
        residual: The largest over phases of (S1)'s error over its largest term, `(*batch,)`.
        iterations: Squarings of the product around the cycle, `(*batch,)`.
        result: A `SteinResult` code of that product, int64, `(*batch,)`.
    """

    X: tuple[Tensor, ...]
    residual: Tensor
    iterations: Tensor
    result: Tensor

    def raise_if_failed(self) -> "CyclicSteinSolution":
        """Return `self`, or raise naming the elements that failed.

        Raises:
            ConvergenceError: If any element has no solution.
        """
        _raise_if_failed(self, self.result)
        return self


def _raise_if_failed(solution: SteinSolution | CyclicSteinSolution, result: Tensor) -> None:
    message = describe_failures(result, SteinResult, "Stein equation")
    if message is not None:
        raise ConvergenceError(message, solution)


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
        _require_matrix(name, X, square=True)
    if A.shape != Q.shape or A.dtype != Q.dtype or A.device != Q.device:
        raise ValueError(
            f"Q must be {tuple(A.shape)}, {A.dtype} on {A.device} like A, got {tuple(Q.shape)}, "
            f"{Q.dtype} on {Q.device}."
        )
    one_forward_level("solve_stein")
    return SteinSolution(*_Stein.apply(max_steps, throw, A, Q))


def solve_cyclic_stein(
    A: Sequence[Tensor], Q: Sequence[Tensor], *, max_steps: int = 60, throw: bool = True
) -> CyclicSteinSolution:
    """Solve a cycle of Stein equations (S1), X_k = A_k'X_{k+1}A_k + Q_k.

    Derivatives and transforms as in `solve_stein`.

    Args:
        A: One matrix a phase, `(*batch, n_{k+1}, n_k)`; the product of all around the cycle must
            have a spectral radius below 1, each by itself need not.
        Q: One matrix a phase, `(*batch, n_k, n_k)`.
        max_steps: Most squarings of the product around the cycle.
        throw: Raise if an element fails. If `False`, inspect `result`.

    Returns:
        A `CyclicSteinSolution`.

    Raises:
        ValueError: If lengths, shapes, dtypes or devices do not fit.
        ConvergenceError: If `throw` and an element failed.
        RuntimeError: Within forward mode of forward mode.

    Example:
        >>> A = [torch.tensor([[2.0], [1.0]]), torch.tensor([[0.1, 0.2]])]
        >>> Q = [torch.eye(1), torch.eye(2)]
        >>> X = solve_cyclic_stein(A, Q).X
        >>> bool((A[0].mT @ X[1] @ A[0] + Q[0] - X[0]).norm() < 1e-5)
        True
    """
    p = phase_count(A=A, Q=Q)
    for name, Xs in (("A", A), ("Q", Q)):
        for k, X in enumerate(Xs):
            _require_matrix(f"{name}[{k}]", X, square=False)
    like, sizes = A[0], [X.shape[-1] for X in A]
    for k in range(p):
        n, ahead = sizes[k], sizes[(k + 1) % p]
        for name, X, shape in ((f"A[{k}]", A[k], (ahead, n)), (f"Q[{k}]", Q[k], (n, n))):
            expected = (*like.shape[:-2], *shape)
            if X.shape != expected or X.dtype != like.dtype or X.device != like.device:
                raise ValueError(
                    f"{name} must be {expected}, {like.dtype} on {like.device}, got "
                    f"{tuple(X.shape)}, {X.dtype} on {X.device}."
                )
    one_forward_level("solve_cyclic_stein")
    *X, residual, iterations, result = _Stein.apply(max_steps, throw, *A, *Q)
    return CyclicSteinSolution(tuple(X), residual, iterations, result)


def _require_matrix(name: str, X: Tensor, *, square: bool) -> None:
    if not isinstance(X, Tensor) or X.dim() < 2 or (square and X.shape[-1] != X.shape[-2]):
        got = str(tuple(X.shape)) if isinstance(X, Tensor) else type(X).__name__
        shape = "(*batch, n, n)" if square else "(*batch, rows, columns)"
        raise ValueError(f"{name} must be a tensor of shape {shape}, got {got}.")
    if X.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be float32 or float64, got {X.dtype}.")


class _Stein(torch.autograd.Function):
    """(S1) forward by (S2), (S5); its derivatives are cycles of Stein equations again."""

    @staticmethod
    def forward(max_steps: int, throw: bool, *matrices: Tensor) -> tuple[Tensor, ...]:
        # Raised here: under torch.vmap only this sees which elements failed.
        A, Q = halves(matrices)
        found = _solve(A, Q, max_steps)
        if throw:
            CyclicSteinSolution(*found).raise_if_failed()
        return *found[0], *found[1:]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.max_steps, _, *matrices = inputs
        A, _ = halves(matrices)
        *X, residual, iterations, result = output
        ctx.mark_non_differentiable(residual, iterations, result)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*A, *X)
        ctx.save_for_forward(*A, *X)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple:
        A, X = halves(ctx.saved_tensors)
        p = len(A)
        if all(X_bar is None for X_bar in cotangents[:p]):
            return (None,) * (2 + 2 * p)
        X_bar = [zeros_if_none(g, like) for g, like in zip(cotangents, X, strict=False)]
        Y = cotangent_of(A, X_bar, ctx.max_steps)  # (S4)
        A_bar = [
            ahead.mT @ a @ y + ahead @ a @ y.mT if ctx.needs_input_grad[2 + k] else None
            for k, (a, y, ahead) in enumerate(zip(A, Y, following(X), strict=True))
        ]
        return None, None, *A_bar, *Y

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple:
        A, X = halves(ctx.saved_tensors)
        dA, dQ = halves(tangents[2:])
        right = []
        for k, (a, ahead) in enumerate(zip(A, following(X), strict=True)):
            drive = zeros_if_none(dQ[k], X[k])
            if (da := dA[k]) is not None:
                drive = drive + da.mT @ ahead @ a + a.mT @ ahead @ da
            right.append(drive)
        return *_Stein.apply(ctx.max_steps, False, *A, *right)[: len(A)], None, None, None  # (S3)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, max_steps: int, throw: bool, *matrices: Tensor) -> tuple:
        moved = (
            batch_first(X, dim, info.batch_size)
            for X, dim in zip(matrices, in_dims[2:], strict=True)
        )
        return _Stein.apply(max_steps, throw, *moved), (0,) * (len(matrices) // 2 + 3)


def cotangent_of(A: Sequence[Tensor], X_bar: Sequence[Tensor], max_steps: int) -> list[Tensor]:
    """Return Y of (S4), Y_{k+1} = A_k Y_k A_k' + X_bar_{k+1}: (S1), the cycle reversed."""
    p = len(A)
    order = [-k % p for k in range(p)]
    against = [A[k - 1].mT for k in order], [X_bar[k] for k in order]
    Y = _Stein.apply(max_steps, False, *against[0], *against[1])
    return [Y[k] for k in order]


def _composed(first: tuple[Tensor, ...], then: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the equation (S5) of two neighbours."""
    (A, Q), (A_next, Q_next) = first, then
    return A_next @ A, Q + A.mT @ Q_next @ A


def _solve(
    A: Sequence[Tensor], Q: Sequence[Tensor], max_steps: int
) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor]:
    """Return X of every phase, residual, squarings and result."""
    p, start = len(A), min(range(len(A)), key=lambda k: A[k].shape[-1])
    order = [(start + k) % p for k in range(p)]
    chain = Chain([(A[k], Q[k]) for k in order], _composed)
    whole, gathered = chain.whole
    first, iterations, result = _square(whole, gathered, max_steps)
    ends = chain.ends(first, lambda link, X: link[1] + link[0].mT @ X @ link[0])
    X = [ends[(k - start - 1) % p] for k in range(p)]
    errors = in_groups(_error, list(zip(A, Q, X, following(X), strict=True)))
    residual, given, sound = (torch.stack(parts) for parts in zip(*errors, strict=True))
    finite = given.all(0) & (sound.all(0) | (result != SteinResult.SOLVED))
    result = torch.where(finite, result, SteinResult.NON_FINITE)
    bad = (result != SteinResult.SOLVED)[..., None, None]
    X = [Y.masked_fill(bad, float("nan")) for Y in X]
    return tuple(X), residual.amax(0), iterations, result


def _error(A: Tensor, Q: Tensor, X: Tensor, X_next: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the relative residual of (S1), and whether A and Q, and X, are finite."""
    AXA = A.mT @ X_next @ A
    residual = relative(AXA + Q - X, AXA, Q, X)
    return residual, is_finite(A) & is_finite(Q), is_finite(X)


def _square(A: Tensor, Q: Tensor, max_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return X, squarings and result of (S2).

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
    result = torch.where(size < 1, SteinResult.NOT_CONVERGED, SteinResult.UNSTABLE)
    return X, iterations, torch.where(size <= small, SteinResult.SOLVED, result)
