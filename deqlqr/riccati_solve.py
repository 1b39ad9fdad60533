"""Cycles of Riccati equations (C1), solved and differentiated; the DARE is the cycle of one phase.

A candidate P comes from doubling, from Newton's method, from value iteration or from SciPy;
whatever its source, it is judged on the equation and on the closed loop before it is handed out.
Derivatives are those of the equation, not of the algorithm. With S = R + B'P+B, A_cl = A - B K,
P of a phase and P+ of the next:

    (R9)  dP = A_cl' dP+ A_cl + dQ - dM'K - K'dM + K'dR K + T + T',   T = A_cl' P+ (dA - dB K)
          dK = S^-1 (dM - dR K + dB'P+ A_cl + B'P+ (dA - dB K) + B' dP+ A_cl)
    (R10) W = S^-1 K_bar,   Y+ = A_cl Y A_cl' + sym(P+_bar + B W A_cl'),
          Q_bar = Y,   R_bar = K Y K' - sym(W K'),   M_bar = W - 2 K Y,
          A_bar = 2 P+ A_cl Y + P+ B W,   B_bar = P+ A_cl W' - A_bar K'

Source: T.-C. Kao, G. Hennequin (2020), Automatic differentiation of Sylvester, Lyapunov, and
algebraic Riccati equations, arXiv:2011.11430; here for every phase.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from deqlqr._linalg import batch_first, identity_like, largest, norm, sym, zeros_if_none
from deqlqr.cycle import Cycle, Found
from deqlqr.dare import Gain
from deqlqr.input_cost import InputCost
from deqlqr.scan import following, in_groups
from deqlqr.search import (
    Doubling,
    by_doubling,
    by_scipy,
    by_value_iteration,
    polished,
    refined,
)
from deqlqr.stein import cotangent_of, solve_cyclic_stein

Costs = Sequence[Tensor | InputCost]
_STEIN_STEPS = 60


@dataclass(frozen=True)
class Options:
    """How to solve."""

    method: Literal["doubling", "value-iteration", "scipy"]
    solver: Doubling
    out_dtype: torch.dtype
    max_sweeps: int = 10_000
    factors: bool = False  # keep those of the gains; a large batch is then solved in one piece
    # Makes the solution that raises if an element failed; nothing is raised if `None`.
    solution: Callable[["Solved"], Any] | None = None


class Solved(NamedTuple):
    """P, K and what certifies them, per batch element; NaN where there is no stabilising P."""

    P: tuple[Tensor, ...]
    K: tuple[Tensor, ...]
    loop: Tensor
    closed_loop_radius: Tensor
    residual: Tensor
    iterations: Tensor
    result: Tensor
    gains: Sequence[Gain] | None = None

    @property
    def flat(self) -> tuple[Tensor, ...]:
        """All tensors but the gains."""
        return *self.P, *self.K, *self[2:7]

    @staticmethod
    def of(flat: Sequence[Tensor]) -> "Solved":
        """Return what `flat` was made from."""
        p = (len(flat) - 5) // 2
        loop, radius, residual, iterations, result = flat[2 * p :]
        P, K = tuple(flat[:p]), tuple(flat[p : 2 * p])
        return Solved(P, K, loop, radius, residual, iterations, result)


def solve(
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    Q: Sequence[Tensor],
    R: Costs,
    M: Sequence[Tensor],
    P0: Sequence[Tensor] | None,
    options: Options,
) -> Solved:
    """Solve (C1), differentiably.

    Returns:
        What was found.

    Raises:
        ValueError: If Q or R is not symmetric.
        ConvergenceError: If `options.solution` is given and an element failed.
    """
    start = [None] * len(A) if P0 is None else P0
    return Solved.of(_Riccati.apply(options, len(A), *A, *B, *Q, *R, *M, *start))


def solve_once(
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    Q: Sequence[Tensor],
    R: Costs,
    M: Sequence[Tensor],
    P0: Sequence[Tensor] | None,
    options: Options,
) -> Solved:
    """Solve (C1) without derivatives."""
    Q, R = _symmetric_costs(Q, R)
    p, start = len(A), min(range(len(A)), key=lambda k: A[k].shape[-1])
    turned = [[X[(start + k) % p] for k in range(p)] for X in (A, B, Q, R, M)]
    P0 = None if P0 is None else [P0[(start + k) % p] for k in range(p)]
    cycle = Cycle.of(*turned)  # from a phase with the fewest states
    found = (_solve if options.factors else _in_pieces)(cycle, P0, options)
    back = [(k - start) % p for k in range(p)]
    P, K = (tuple(X[k] for k in back) for X in (found.P, found.K))
    gains = found.gains
    if gains is not None:
        gains = [gains[k] for k in back] if len(cycle.groups) == p else None
    return found._replace(P=P, K=K, gains=gains)


def _in_pieces(cycle: Cycle, P0: list[Tensor] | None, options: Options) -> Solved:
    """Solve a large batch in pieces that fit a CPU's cache, each with its own number of steps."""
    weights = (
        len(group.phases) * max(group.dare.B.shape[-2:]) * group.dare.B.shape[-2]
        for group in cycle.groups
    )
    size, count = max(32, 2**16 // max(1, sum(weights))), cycle.batch.numel()
    if count <= size or cycle.device.type != "cpu":
        return _solve(cycle, P0, options)
    starts = None if P0 is None else [P.reshape(count, *P.shape[-2:]) for P in P0]
    pieces = [
        _solve(cycle.pick(part), None if starts is None else [P[part] for P in starts], options)
        for part in (slice(i, i + size) for i in range(0, count, size))
    ]
    whole = (torch.cat(parts) for parts in zip(*(piece.flat for piece in pieces), strict=True))
    return Solved.of([X.reshape(*cycle.batch, *X.shape[1:]) for X in whole])


def _solve(cycle: Cycle, P0: list[Tensor] | None, options: Options) -> Solved:
    """Solve and certify one batch of equations."""
    solver, single = options.solver, cycle.dtype == torch.float32
    mixed = single and solver.refine > 0 and options.method != "scipy"
    coarse = 1e-4 if single else 1e-8
    rtol = coarse if mixed or solver.rtol is None else solver.rtol
    if options.method == "scipy":
        found = by_scipy(cycle, rtol)
    elif options.method == "doubling":
        found = by_doubling(cycle, P0, rtol, solver.max_steps)
        found = polished(cycle, found, rtol, solver.polish)
    else:
        found = by_value_iteration(cycle, P0, rtol, options.max_sweeps)
        found = polished(cycle, found, rtol, solver.polish)
    if mixed:
        found = refined(cycle, found, 1e-8 if solver.rtol is None else solver.rtol, solver.refine)
    return _masked(found, cycle.dtype, options.out_dtype)


def _masked(found: Found, dtype: torch.dtype, out_dtype: torch.dtype) -> Solved:
    P, K = (tuple(X.to(out_dtype) for X in Xs) for Xs in (found.P, found.K))
    if not bool(found.stabilising.all()):
        bad = (~found.stabilising)[..., None, None]
        P, K = (tuple(X.masked_fill(bad, float("nan")) for X in Xs) for Xs in (P, K))
    _, _, loop, radius, residual, result = found.certificate
    gains = found.gains if out_dtype == found.P[0].dtype else None
    return Solved(
        P, K, loop.to(out_dtype), radius.to(dtype), residual.to(dtype), found.iterations, result,
        gains,
    )  # fmt: skip


class _Riccati(torch.autograd.Function):
    """(C1) forward, by any algorithm; its derivatives (R9), (R10) know only P and K."""

    @staticmethod
    def forward(options: Options, p: int, *inputs: Any) -> tuple[Tensor, ...]:
        # Raised here: under torch.vmap only this sees which elements failed.
        A, B, *costs = _by_kind(inputs, p)
        start = costs.pop()
        P0 = None if start[0] is None else start
        Q, R, M = costs
        Q, R, M, P0, scale = _scaled(Q, R, M, P0)
        found = solve_once(A, B, Q, R, M, P0, options)
        wide = scale.to(options.out_dtype)[..., None, None]
        found = found._replace(P=tuple(P * wide for P in found.P))
        if options.solution is not None:
            options.solution(found).raise_if_failed()
        return found.flat

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _, p, *tensors = inputs
        A, B, _, R, M, _ = _by_kind(tensors, p)
        found = Solved.of(output)
        ctx.mark_non_differentiable(*found[2:7])
        ctx.set_materialize_grads(False)
        ctx.p, ctx.dtype, ctx.out_dtype = p, A[0].dtype, output[0].dtype
        R = [X.dense() if isinstance(X, InputCost) else X for X in R]
        ctx.save_for_backward(*A, *B, *R, *M, *found.P, *found.K)
        ctx.save_for_forward(*A, *B, *R, *M, *found.P, *found.K)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple:
        p, dtype = ctx.p, ctx.dtype
        A, B, R, _, P, K = _by_kind(_same_dtype(ctx.saved_tensors), p)
        if all(X is None for X in cotangents[: 2 * p]):
            return (None,) * (2 + 6 * p)
        P_bar, K_bar = (
            [zeros_if_none(X_bar, X).to(X.dtype) for X, X_bar in zip(Xs, given, strict=True)]
            for Xs, given in ((P, cotangents[:p]), (K, cotangents[p : 2 * p]))
        )
        # A failed element is NaN. If nobody asks about it, it must pass on 0, not 0 times NaN.
        failed = P[0].isnan().any(-1).any(-1)[..., None, None]
        unasked = [(X == 0).all(-1).all(-1) for X in (*P_bar, *K_bar)]
        idle = torch.stack(unasked).all(0)[..., None, None]
        P, K = ([X.masked_fill(failed, 0.0) for X in Xs] for Xs in (P, K))
        asked = any(X is not None for X in cotangents[p : 2 * p])

        def driven(
            A: Tensor, B: Tensor, R: Tensor, P_next: Tensor, K: Tensor, K_bar: Tensor
        ) -> tuple[Tensor, ...]:
            A_cl = (A - B @ K).masked_fill(failed, 0.0)
            if not asked:
                return A_cl, torch.zeros_like(K), torch.zeros_like(P_next)
            S = sym(R) + B.mT @ P_next @ B
            S = torch.where(failed, identity_like(S), S)  # what is unknown may be singular
            W = torch.linalg.solve(S, K_bar).masked_fill(failed, 0.0)
            return A_cl, W, B @ W @ A_cl.mT

        P_next = following(P)
        parts = in_groups(driven, list(zip(A, B, R, P_next, K, K_bar, strict=True)))
        A_cl, W, drive = (list(column) for column in zip(*parts, strict=True))
        before = [drive[k - 1] for k in range(p)]
        right = [sym(X + extra) for X, extra in zip(P_bar, before, strict=True)]
        Y = cotangent_of(A_cl, right, _STEIN_STEPS)  # (R10)
        grads = in_groups(_gradients, list(zip(B, P_next, K, A_cl, W, Y, strict=True)))
        unknown = torch.where(failed & ~idle, float("nan"), 0.0).to(P[0].dtype)
        flat = [X for kind in zip(*grads, strict=True) for X in kind]
        wanted = zip(flat, ctx.needs_input_grad[2:], strict=False)
        found = ((X + unknown).to(dtype) if need else None for X, need in wanted)
        return None, None, *found, *(None,) * p

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple:
        p = ctx.p
        A, B, R, M, P, K = _by_kind(_same_dtype(ctx.saved_tensors), p)
        likes = (A, B, P, R, M)
        dA, dB, dQ, dR, dM = (
            [zeros_if_none(dX, X).to(X.dtype) for X, dX in zip(Xs, dXs, strict=True)]
            for Xs, dXs in zip(likes, _by_kind(tangents[2 : 2 + 5 * p], p), strict=True)
        )
        A_cl, right, drives, P_next = [], [], [], following(P)
        for k in range(p):
            A_cl.append(A[k] - B[k] @ K[k])
            drives.append(dA[k] - dB[k] @ K[k])
            T, dMK = A_cl[k].mT @ P_next[k] @ drives[k], dM[k].mT @ K[k]
            curved = K[k].mT @ sym(dR[k]) @ K[k]
            right.append(sym(dQ[k]) - dMK - dMK.mT + curved + T + T.mT)
        dP = solve_cyclic_stein(A_cl, right, throw=False).X  # (R9)
        dK, failed = [], P[0].isnan().any(-1).any(-1)[..., None, None]
        for k, dP_next in enumerate(following(dP)):
            PA, S = P_next[k] @ A_cl[k], sym(R[k]) + B[k].mT @ P_next[k] @ B[k]
            mixed = dM[k] - sym(dR[k]) @ K[k] + dB[k].mT @ PA
            mixed = mixed + B[k].mT @ (P_next[k] @ drives[k] + dP_next @ A_cl[k])
            S = torch.where(failed, identity_like(S), S)
            dK.append(torch.linalg.solve(S, mixed).masked_fill(failed, float("nan")))
        return *(X.to(ctx.out_dtype) for X in (*dP, *dK)), *(None,) * 5

    @staticmethod
    def vmap(info: Any, in_dims: tuple, options: Options, p: int, *inputs: Any) -> tuple:
        moved = (
            None if X is None else batch_first(X, dim, info.batch_size)
            for X, dim in zip(inputs, in_dims[2:], strict=True)
        )
        return _Riccati.apply(options, p, *moved), (0,) * (2 * p + 5)


def _gradients(
    B: Tensor, P_next: Tensor, K: Tensor, A_cl: Tensor, W: Tensor, Y: Tensor
) -> tuple[Tensor, ...]:
    """Return the cotangents of A, B, Q, R, M of one phase (R10)."""
    KY, PA = K @ Y, P_next @ A_cl
    A_bar = 2 * PA @ Y + P_next @ B @ W
    B_bar = PA @ W.mT - A_bar @ K.mT
    return A_bar, B_bar, Y, KY @ K.mT - sym(W @ K.mT), W - 2 * KY


def _by_kind(tensors: Sequence[Any], p: int) -> list[list[Any]]:
    """Return lists over phases from their concatenation."""
    return [list(tensors[i : i + p]) for i in range(0, len(tensors), p)]


def _scaled(
    Q: list[Tensor], R: list[Any], M: list[Tensor], P0: list[Tensor] | None
) -> tuple[list[Tensor], list[Any], list[Tensor], list[Tensor] | None, Tensor]:
    """Return the costs divided by a power of 2 near their size, and it, `(*batch,)`.

    P scales with the costs and K does not change; without this, norms overflow or vanish.
    """
    sizes = [largest(X) for X in (*Q, *M)]
    for X in R:
        blocks = (X.block, X.diagonal[..., None]) if isinstance(X, InputCost) else (X,)
        sizes += [largest(block) for block in blocks]
    size = torch.stack(sizes).amax(0)
    one = torch.ones_like(size)
    size = torch.where((size > 0) & (size < torch.inf), size, one)
    scale = torch.ldexp(one, torch.frexp(size).exponent - 1)
    if torch.equal(scale, one):
        return Q, R, M, P0, scale
    wide = scale[..., None, None]
    R = [X.divided(scale) if isinstance(X, InputCost) else X / wide for X in R]
    P0 = None if P0 is None else [X / wide for X in P0]
    return [X / wide for X in Q], R, [X / wide for X in M], P0, scale


def _symmetric_costs(Q: Sequence[Tensor], R: Costs) -> tuple[list[Tensor], list[Any]]:
    costs: list[Any] = []
    for k, X in enumerate(R):
        name = "R" if len(R) == 1 else f"R[{k}]"
        if isinstance(X, InputCost):
            if not bool((X.coupled.diff() > 0).all()):
                raise ValueError(f"{name}.coupled must be in increasing order.")
            X = replace(X, block=_symmetric(name, X.block))  # noqa: PLW2901
        else:
            X = _symmetric(name, X)  # noqa: PLW2901
        costs.append(X)
    return [_symmetric("Q" if len(Q) == 1 else f"Q[{k}]", X) for k, X in enumerate(Q)], costs


def _symmetric(name: str, X: Tensor) -> Tensor:
    if torch.equal(X, X.mT):
        return X
    even = sym(X)
    if (norm(X - even) > 0.5 * torch.finfo(X.dtype).eps ** 0.5 * norm(X)).any():
        raise ValueError(f"{name} must be symmetric.")
    return even


def _same_dtype(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the tensors in the widest of their types: P and K may be float64 by `out_dtype`."""
    dtype = max((X.dtype for X in tensors), key=lambda d: torch.finfo(d).bits)
    return tuple(X.to(dtype) for X in tensors)
