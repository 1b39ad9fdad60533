"""`solve_dare`: the stabilising solution of the DARE, with certificate and derivatives.

A candidate P comes from doubling, from Newton's method or from SciPy; whatever its source, it is
judged on the equation (R1) and on the closed loop before it is handed out. Derivatives are those
of the equation, not of the algorithm. With S = R + B'PB and A_cl = A - B K:

    (R9)  dP = A_cl' dP A_cl + dQ - dM'K - K'dM + K'dR K + T + T',   T = A_cl' P (dA - dB K)
          dK = S^-1 (dM - dR K + dB'P A_cl + B'P (dA - dB K) + B' dP A_cl)
    (R10) W = S^-1 K_bar,   Y = A_cl Y A_cl' + sym(P_bar + B W A_cl'),
          Q_bar = Y,   R_bar = K Y K' - sym(W K'),   M_bar = W - 2 K Y,
          A_bar = 2 P A_cl Y + P B W,   B_bar = P A_cl W' - A_bar K'

Source: T.-C. Kao, G. Hennequin (2020), Automatic differentiation of Sylvester, Lyapunov, and
algebraic Riccati equations, arXiv:2011.11430.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from scipy.linalg import LinAlgError, solve_discrete_are
from torch import Tensor

from deqlqr._checks import choice, one_forward_level
from deqlqr._linalg import batch_first, largest, norm, sym
from deqlqr.dare import Dare, Gain
from deqlqr.doubling import double, shift_of
from deqlqr.input_cost import InputCost
from deqlqr.newton import Found, choose, judge, newton_step
from deqlqr.solution import ConvergenceError, DareResult, describe_failures
from deqlqr.stein import solve_stein

Method = Literal["doubling", "scipy"]
_SHIFTS = (1.0, 1e2, 1e-2)  # of the scale of the costs; tried in this order where doubling fails
_WARM_STEPS = 8


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


@dataclass(frozen=True)
class Doubling:
    """How `solve_dare` solves: doubling (R5), the exact shift (R6) where it fails, Newton (R8).

    Attributes:
        rtol: Largest residual accepted; `None` takes 1e-8, or 1e-4 for float32 without `refine`.
        max_steps: Most doubling steps.
        polish: Take one Newton step (R8) at the end; `None` takes it where the residual is above
            what rounding explains. A step that does not lower the residual is dropped.
        refine: For float32: Newton steps (R8) with the residual in float64 and the correction in
            float32. 0 leaves the solution at the accuracy of float32.
    """

    rtol: float | None = None
    max_steps: int = 40
    polish: bool | None = None
    refine: int = 2


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
    options = _Options(method, solver, out_dtype or A.dtype, throw)
    return DareSolution(*_Dare.apply(A, B, Q, R, M, P0, options))


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
    options = _Options("doubling", solver, A.dtype, False)
    with torch.no_grad():
        return _solve(_symmetric_dare(A, B, Q, R, M), P0, options)


@dataclass(frozen=True)
class _Options:
    method: Method
    solver: Doubling
    out_dtype: torch.dtype
    throw: bool


def _in_pieces(dare: Dare, P0: Tensor | None, options: _Options) -> DareSolution:
    """Solve a large batch in pieces that fit a CPU's cache, each with its own number of steps."""
    *batch, n, m = dare.B.shape
    size, count = max(32, 2**16 // max(1, n * max(n, m))), math.prod(batch)
    if count <= size or dare.A.device.type != "cpu":
        return _solve(dare, P0, options)
    starts = None if P0 is None else P0.reshape(count, n, n)
    pieces = [
        _solve(dare.pick(part), None if starts is None else starts[part], options)
        for part in (slice(i, i + size) for i in range(0, count, size))
    ]

    def joined(name: str) -> Tensor:
        whole = torch.cat([getattr(piece, name) for piece in pieces])
        return whole.reshape(*batch, *whole.shape[1:])

    return DareSolution(
        joined("P"), joined("K"), joined("closed_loop_radius"), joined("residual"),
        joined("iterations"), joined("result"),
    )  # fmt: skip


def _solve(dare: Dare, P0: Tensor | None, options: _Options) -> DareSolution:
    """Solve and certify one batch of equations."""
    solver = options.solver
    mixed = dare.A.dtype == torch.float32 and solver.refine > 0 and options.method == "doubling"
    coarse = 1e-4 if dare.A.dtype == torch.float32 else 1e-8
    rtol = coarse if mixed or solver.rtol is None else solver.rtol
    if options.method == "scipy":
        found = _by_scipy(dare, rtol)
    else:
        found = _by_doubling(dare, P0, rtol, solver.max_steps)
        found = _polished(dare, found, rtol, solver.polish)
    if mixed:
        found = _refined(dare, found, 1e-8 if solver.rtol is None else solver.rtol, solver.refine)
    bad = (~found.stabilising)[..., None, None]
    P, K = (X.masked_fill(bad, float("nan")) for X in (found.P, found.K))
    _, _, radius, residual, result = found.certificate
    return DareSolution(
        P.to(options.out_dtype), K.to(options.out_dtype), radius.to(dare.A.dtype),
        residual.to(dare.A.dtype), found.iterations, result,
        found.gain if options.out_dtype == found.P.dtype else None,
    )  # fmt: skip


def _by_doubling(dare: Dare, P0: Tensor | None, rtol: float, max_steps: int) -> Found:
    warm = None if P0 is None else _warm(dare, P0, rtol)
    if warm is not None and warm.stabilising.all():
        return warm
    limit = double(dare, max_steps)
    found = judge(dare, limit.P, limit.iterations, limit.broken, rtol, limit.eliminated)
    if warm is not None:
        found = choose(warm.stabilising, warm, found)
    for factor in _SHIFTS:
        wrong = (found.certificate.result != 0) & (
            found.certificate.result != DareResult.NON_FINITE
        )
        if not wrong.any():
            break
        found = _retried(dare, found, wrong, factor, rtol, max_steps)
    return found


def _warm(dare: Dare, P0: Tensor, rtol: float) -> Found:
    """Return Newton's limit from P0; elements it does not serve are not stabilising."""
    zero = torch.zeros(dare.A.shape[:-2], dtype=torch.int64, device=dare.A.device)
    found = judge(dare, sym(P0).to(dare.A.dtype), zero, zero, rtol)
    enough = _rounding(dare)
    for _ in range(_WARM_STEPS):
        stable = found.certificate.closed_loop_radius < 1
        if not (stable & (found.certificate.residual > enough)).any():
            break
        found, _ = newton_step(dare, found, rtol, monotone=False, above=enough)
    # Short of rounding level Newton has not converged, whatever rtol allows.
    slow = found.certificate.residual > 1e3 * enough
    result = found.certificate.result.masked_fill(slow, DareResult.NOT_CONVERGED)
    return found._replace(certificate=found.certificate._replace(result=result))


def _polished(dare: Dare, found: Found, rtol: float, polish: bool | None) -> Found:
    # A residual of P is an error of P that is larger by 1 / (1 - rho^2).
    radius, eps = found.certificate.closed_loop_radius, torch.finfo(dare.A.dtype).eps
    level = (1e3 + 10 * dare.A.shape[-1]) * eps
    wanted = (level * (1 - radius**2)).clamp(min=10 * eps, max=rtol)
    asked = found.certificate.residual > wanted
    stable = radius < 1
    if polish is False or (polish is None and not (asked & stable).any()):
        return found
    return newton_step(dare, found, rtol)[0]


def _refined(dare: Dare, found: Found, rtol: float, steps: int) -> Found:
    """Return the solution in float64, by Newton steps that are corrected in float32."""
    exact = dare.to(torch.float64)
    broken = torch.where(found.stabilising, 0, found.certificate.result)
    precise = judge(exact, found.P.double(), found.iterations, broken, rtol)
    for _ in range(steps):
        precise, better = newton_step(exact, precise, rtol, stein_dtype=torch.float32)
        if not better.any():
            break
    # What failed in float32 keeps its code: a limit of Newton's steps was not looked for.
    result = torch.where(found.stabilising, precise.certificate.result, found.certificate.result)
    return precise._replace(certificate=precise.certificate._replace(result=result))


def _retried(
    dare: Dare, found: Found, wrong: Tensor, factor: float, rtol: float, max_steps: int
) -> Found:
    """Solve the elements `wrong` through the shift (R6); the others are not touched."""
    index = wrong.reshape(-1).nonzero()[:, 0]
    part = dare.pick(index)
    limit = double(part, max_steps, factor * shift_of(part))
    again = judge(part, limit.P, limit.iterations, limit.broken, rtol)

    def spread(whole: Tensor, piece: Tensor) -> Tensor:
        flat = whole.reshape(-1, *whole.shape[wrong.dim() :])
        return flat.index_copy(0, index, piece).reshape(whole.shape)

    # Where both fail, the verdict on the problem as posed stands.
    solved = found.zip_with(spread, again)
    return choose(wrong & solved.stabilising, solved, found)


def _by_scipy(dare: Dare, rtol: float) -> Found:
    """Return SciPy's solutions, judged as any other; NaN where it raises."""
    A, B, Q, R, M = (X.to("cpu", torch.float64) for X in dare.dense())
    P = torch.full_like(A, float("nan"))
    broken = torch.full(A.shape[:-2], int(DareResult.NONE))
    for i in np.ndindex(A.shape[:-2]):
        try:
            arrays = (X[i].numpy() for X in (A, B, Q, R))
            P[i] = torch.as_tensor(solve_discrete_are(*arrays, s=M[i].mT.numpy()))
            broken[i] = 0
        except (LinAlgError, ValueError):  # no solution, or not finite
            continue
    P, broken = P.to(dare.A), broken.to(dare.A.device)
    return judge(dare, sym(P), torch.zeros_like(broken), broken, rtol)


class _Dare(torch.autograd.Function):
    """(R1) forward, by any algorithm; its derivatives (R9), (R10) know only P and K."""

    @staticmethod
    def forward(
        A: Tensor,
        B: Tensor,
        Q: Tensor,
        R: Tensor | InputCost,
        M: Tensor,
        P0: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, ...]:
        # Raised here: under torch.vmap only this sees which elements failed.
        Q, R, M, P0, scale = _scaled(Q, R, M, P0)
        found = _in_pieces(_symmetric_dare(A, B, Q, R, M), P0, options)
        found = replace(found, P=found.P * scale.to(found.P.dtype)[..., None, None])
        if options.throw:
            found.raise_if_failed()
        return (found.P, found.K, found.closed_loop_radius, found.residual, found.iterations,
                found.result)  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        A, B, _, R, M, _, _ = inputs
        P, K, *certificate = output
        ctx.mark_non_differentiable(*certificate)
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.out_dtype = A.dtype, P.dtype
        R = R.dense() if isinstance(R, InputCost) else R
        ctx.save_for_backward(A, B, R, M, P, K)
        ctx.save_for_forward(A, B, R, M, P, K)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple:
        A, B, R, _, P, K = _same_dtype(ctx.saved_tensors)
        if cotangents[0] is None and cotangents[1] is None:
            return (None,) * 7
        P_bar, K_bar = (
            torch.zeros_like(X) if X_bar is None else X_bar.to(A.dtype)
            for X, X_bar in zip((P, K), cotangents, strict=False)
        )
        # A failed element is NaN. If nobody asks about it, it must pass on 0, not 0 times NaN.
        failed = P.isnan().any(-1).any(-1)[..., None, None]
        idle = ((P_bar == 0).all(-1).all(-1) & (K_bar == 0).all(-1).all(-1))[..., None, None]
        S, P, K = sym(R) + B.mT @ P @ B, P.masked_fill(failed, 0.0), K.masked_fill(failed, 0.0)
        A_cl, right = (A - B @ K).masked_fill(failed, 0.0), P_bar
        W = torch.zeros_like(K)
        if cotangents[1] is not None:
            W = torch.linalg.solve(S, K_bar).masked_fill(failed, 0.0)
            right = right + B @ W @ A_cl.mT
        Y = solve_stein(A_cl.mT, sym(right), throw=False).X  # (R10)
        KY = K @ Y
        A_bar = 2 * P @ A_cl @ Y + P @ B @ W
        B_bar = P @ A_cl @ W.mT - A_bar @ K.mT
        grads = (A_bar, B_bar, Y, KY @ K.mT - sym(W @ K.mT), W - 2 * KY)
        unknown = torch.where(failed & ~idle, float("nan"), 0.0).to(A.dtype)
        wanted = zip(grads, ctx.needs_input_grad, strict=False)
        return *((X + unknown).to(ctx.dtype) if need else None for X, need in wanted), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple:
        A, B, R, M, P, K = _same_dtype(ctx.saved_tensors)
        dA, dB, dQ, dR, dM = (
            torch.zeros_like(X) if dX is None else dX.to(A.dtype)
            for X, dX in zip((A, B, A, R, M), tangents[:5], strict=True)
        )
        A_cl, R, dR = A - B @ K, sym(R), sym(dR)
        drive = dA - dB @ K
        T, dMK = A_cl.mT @ P @ drive, dM.mT @ K
        right = sym(dQ) - dMK - dMK.mT + K.mT @ dR @ K + T + T.mT
        dP = solve_stein(A_cl, right, throw=False).X  # (R9)
        mixed = dM - dR @ K + dB.mT @ P @ A_cl + B.mT @ P @ drive + B.mT @ dP @ A_cl
        dK = torch.linalg.solve(R + B.mT @ P @ B, mixed)
        return dP.to(ctx.out_dtype), dK.to(ctx.out_dtype), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple:
        *tensors, options = inputs
        moved = (
            None if X is None else batch_first(X, dim, info.batch_size)
            for X, dim in zip(tensors, in_dims, strict=False)
        )
        return _Dare.apply(*moved, options), (0,) * 6


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


def _scaled(
    Q: Tensor, R: Tensor | InputCost, M: Tensor, P0: Tensor | None
) -> tuple[Tensor, Tensor | InputCost, Tensor, Tensor | None, Tensor]:
    """Return the costs divided by a power of 2 near their size, and it, `(*batch,)`.

    P scales with the costs and K does not change; without this, norms overflow or vanish.
    """
    blocks = (R.block, R.diagonal[..., None]) if isinstance(R, InputCost) else (R,)
    size = torch.stack([largest(X) for X in (Q, *blocks, M)]).amax(0)
    usable = size.isfinite() & (size > 0)
    size = torch.where(usable, size, torch.ones_like(size))
    scale = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent - 1)
    wide = scale[..., None, None]
    R = R.divided(scale) if isinstance(R, InputCost) else R / wide
    return Q / wide, R, M / wide, None if P0 is None else P0 / wide, scale


def _symmetric_dare(A: Tensor, B: Tensor, Q: Tensor, R: Tensor | InputCost, M: Tensor) -> Dare:
    Q = _symmetric("Q", Q)
    if isinstance(R, InputCost):
        if not bool((R.coupled.diff() > 0).all()):
            raise ValueError("R.coupled must be in increasing order.")
        return Dare(A, B, Q, replace(R, block=_symmetric("R", R.block)), M)
    return Dare(A, B, Q, InputCost.of(_symmetric("R", R)), M)


def _symmetric(name: str, X: Tensor) -> Tensor:
    skew = norm(X - X.mT)
    if not (skew > 0).any():
        return X
    if (skew > torch.finfo(X.dtype).eps ** 0.5 * norm(X)).any():
        raise ValueError(f"{name} must be symmetric.")
    return sym(X)


def _rounding(dare: Dare) -> float:
    """Return the residual that rounding alone explains."""
    return 100 * torch.finfo(dare.A.dtype).eps


def _same_dtype(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the tensors in the widest of their types: P and K may be float64 by `out_dtype`."""
    dtype = max((X.dtype for X in tensors), key=lambda d: torch.finfo(d).bits)
    return tuple(X.to(dtype) for X in tensors)
