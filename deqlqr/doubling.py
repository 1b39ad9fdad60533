"""The DARE by structure-preserving doubling: matrix products and LU, on the tensors' own device.

With (R4)'s A, G, H of a phase, P = H + A'P+ (I + G P+)^-1 A. Such maps compose (first, then):

    (C2)  W = I + G H+,   A <- A+ W^-1 A,   G <- G+ + A+ W^-1 G A+',   H <- H + A'H+ W^-1 A

Composed around the cycle they are one map of P to itself; composing that with itself is doubling:

    (R5)  W = I + G H,   A <- A W^-1 A,   G <- G + A W^-1 G A',   H <- H + A' H W^-1 A,   H -> P
          from A_0, G_0, H_0 of (R4)
    (R6)  P = alpha I + D, with D of the DARE (A, B, Q + alpha (A'A - I), R + alpha B'B,
          M + alpha B'A): the same closed loop, and an R that may be invertible where R was not;
          in a cycle with the same alpha at every phase

Each step of (R5) squares the closed loop, so the error after k steps is O(rho(A_cl)^(2^k)).
Where controls are clearly fewer than states, the first step of a DARE takes m x m factors, not
n x n, by the matrix inversion lemma:

    (R5a) S = R + B'H_0 B,   W^-1 A_0 = A_0 - B S^-1 B'H_0 A_0,   W^-1 G_0 = B S^-1 B'

Source: Chu, Fan, Lin, Wang (2004), Structure-preserving algorithms for periodic discrete-time
algebraic Riccati equations, Int. J. Control 77(8). doi:10.1080/00207170410001714988.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from deqlqr._linalg import LUFactor, identity_like, lu_factor, norm, sym
from deqlqr.cycle import Cycle
from deqlqr.dare import Dare, Eliminated
from deqlqr.scan import Chain
from deqlqr.solution import DareResult

_LATE = 15
_MOST = 1e30  # size of P, where that of the costs is 1, above which P counts as infinite


class Limit(NamedTuple):
    """What (R5) came to."""

    P: list[Tensor]
    iterations: Tensor
    broken: Tensor  # 0, or the `DareResult` code with which it gave up
    eliminated: list[Eliminated] | None  # of the equations as posed, where there was no shift


def double(cycle: Cycle, max_steps: int, alpha: Tensor | None = None) -> Limit:
    """Return the limit of (R5), through the shift (R6) by alpha (*batch,) if there is one.

    The limit may be another solution than the stabilising one, or none: it wants certifying.
    The first phase, at which (R5) runs, should be one with the fewest states.
    """
    posed = [group.dare if alpha is None else group.dare.shifted(alpha) for group in cycle.groups]
    eliminated = [Eliminated.of(dare) for dare in posed]
    singular = cycle.reduce((problem.cost.singular for problem in eliminated), torch.any)
    chain = Chain(cycle.unbind((e.A, e.G, e.H) for e in eliminated), _composed)
    A, G, H = chain.whole
    n, m = posed[0].B.shape[-2:]
    thin = posed[0] if len(cycle.sizes) == 1 and 4 * m <= 3 * n else None
    first, iterations, broken = _double(A, G, H, singular, max_steps, thin)
    ends = chain.ends(first, _start)
    P = [ends[-1], *ends[:-1]]
    if alpha is None:
        return Limit(P, iterations, broken, eliminated)
    shift = alpha[..., None, None]
    return Limit([D + shift * identity_like(D) for D in P], iterations, broken, None)  # (R6)


def shift_of(cycle: Cycle) -> Tensor:
    """Return alpha of (R6) at the scale of the costs; far above it costs digits."""
    sizes = (
        torch.stack([norm(Q), R.norm(), norm(M)]).amax(0)
        for _, _, Q, R, M in (group.dare for group in cycle.groups)
    )
    costs = cycle.reduce(sizes, torch.amax)
    return torch.where(costs > 0, costs, torch.ones_like(costs))


def _composed(first: tuple[Tensor, ...], then: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the map (C2) of two neighbours."""
    A, G, H = first
    A_next, G_next, H_next = then
    n = A.shape[-1]
    W = identity_like(G) + G @ H_next
    solved, _ = torch.linalg.solve_ex(W, torch.cat([A, G], dim=-1))
    WA, WG = solved[..., :n], solved[..., n:]
    G_both = G_next + sym(A_next @ WG @ A_next.mT)
    return A_next @ WA, G_both, H + sym(A.mT @ (H_next @ WA))


def _start(link: tuple[Tensor, ...], P_next: Tensor) -> Tensor:
    """Return P at the start of a map from P+ at its end."""
    A, G, H = link
    solved, _ = torch.linalg.solve_ex(identity_like(G) + G @ P_next, A)
    return H + sym(A.mT @ (P_next @ solved))


class _Full(NamedTuple):
    """W^-1 of (R5) by its own factors."""

    W: LUFactor

    @staticmethod
    def of(G: Tensor, H: Tensor, eye: Tensor) -> "_Full":
        # W' = I + H G is what is stored: LAPACK, which counts by columns, then takes it as it is.
        return _Full(lu_factor(torch.baddbmm(eye, H, G.mT).mT))

    def loop(self, A: Tensor) -> Tensor:
        """Return W^-1 A."""
        return self.W.solve(A)

    def grown(self, G: Tensor, A: Tensor) -> Tensor:
        """Return the next G."""
        return torch.baddbmm(G, torch.bmm(A, self.W.solve(G.mT)), A.mT)

    def pick(self, index: Tensor) -> "_Full":
        """Return elements of the batch."""
        return _Full(LUFactor(*(X[index] for X in self.W)))


class _Thin(NamedTuple):
    """W^-1 of the first step by (R5a)."""

    S: LUFactor
    B: Tensor
    HB: Tensor

    @staticmethod
    def of(dare: Dare, H: Tensor) -> "_Thin":
        B, R = dare.B, dare.R.dense()
        B, R = (X.reshape(len(H), *X.shape[-2:]) for X in (B, R))
        HB = torch.bmm(H, B)
        return _Thin(lu_factor(sym(torch.baddbmm(R, B.mT, HB))), B, HB)

    def loop(self, A: Tensor) -> Tensor:
        """Return W^-1 A."""
        BHA = torch.bmm(self.HB.mT, A)
        return torch.baddbmm(A.mT, self.S.solve(BHA).mT, self.B.mT, alpha=-1).mT

    def grown(self, G: Tensor, A: Tensor) -> Tensor:
        """Return the next G."""
        AB = torch.bmm(A, self.B)
        return torch.baddbmm(G, AB, self.S.solve(AB.mT))

    def pick(self, index: Tensor) -> "_Thin":
        """Return elements of the batch."""
        return _Thin(LUFactor(*(X[index] for X in self.S)), self.B[index], self.HB[index])


def _double(
    A: Tensor, G: Tensor, H: Tensor, singular: Tensor, max_steps: int, thin: Dare | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the limit, the steps and the codes; elements that are done leave the batch.

    Args:
        A: (R4)'s, with G and H, of the phase or of all composed.
        G: See A.
        H: See A.
        singular: Elements that are not to be solved.
        max_steps: Most steps.
        thin: The DARE itself, if its first step is (R5a).
    """
    *batch, n = A.shape[:-1]
    flat = lambda X: X.reshape(math.prod(batch), n, n)
    broken = torch.where(singular, DareResult.NONE, 0).flatten()
    done = broken != 0
    # G and H are symmetric, H made so at the end. Products are fastest of a matrix stored by rows
    # and one stored by columns, as LU solves leave theirs.
    A, G, H = flat(A), flat(G), flat(H)
    eye = identity_like(H)
    W: _Full | _Thin
    P, steps = H, torch.zeros_like(broken)
    code, taken = broken, steps
    index = torch.arange(len(P), device=P.device)  # of the elements still in the batch
    rounding = max(n, 2) * torch.finfo(P.dtype).eps
    least = torch.full_like(broken, rounding, dtype=P.dtype)  # change that asks for another step
    on_cpu = P.device.type == "cpu"
    live = on_cpu and not bool(done.any())  # no element in the batch is done
    for step in range(max_steps):
        W = _Full.of(G, H, eye) if step or thin is None else _Thin.of(thin, H)
        WA = W.loop(A)
        dH = torch.bmm(A.mT, torch.bmm(H, WA))
        H_next = H + dH  # (R5)
        size = norm(H_next)
        ratio = norm(dH) / size
        # Changes go as r <- c r^2, so the next is foreseen from two; one that drowns in rounding
        # is left out. Where that misjudges, the certificate asks for a Newton step.
        moving = (ratio > least) & (size < _MOST)
        least = (ratio.pow(2 / 3) * rounding ** (1 / 3)).clamp_(min=rounding)
        if live and bool(moving.all()):
            H, taken = H_next, taken + 1
        else:
            taken = taken + ~done
            # A finite problem whose iterates outgrow its costs without bound, or break down, has P
            # at infinity: of the costs no digit is left in H then.
            lost = ~done & ~(size < _MOST)
            code = code.masked_fill(lost, DareResult.NONE)
            if live and not bool(lost.any()):
                H = H_next
            else:
                H = torch.where((done | lost)[:, None, None], H, H_next)  # what is done stays
            done = done | ~moving
            if (on_cpu or step % 3 == 2) and bool(done.any()):
                P, steps, broken = _stored((P, steps, broken), index, (H, taken, code))
                keep = (~done).nonzero()[:, 0]
                if len(keep) == 0:
                    break
                index, taken, code, done = index[keep], taken[keep], code[keep], done[keep]
                ratio, least = ratio[keep], least[keep]
                H, A, G, WA = (X[keep] for X in (H, A, G, WA))
                W = W.pick(keep)
                live = on_cpu
        # Only now, for the last step of an element does not ask for it.
        G = W.grown(G, A)
        A = torch.bmm(A, WA)
    else:
        # Late steps, of 2^step of the recursion's, that still change H by much approach no limit:
        # a mode that is not controlled lets P grow.
        stuck = (ratio > 1e-3) & (max_steps > _LATE)
        unfinished = torch.where(stuck, DareResult.NONE, DareResult.NOT_CONVERGED)
        code = torch.where(done, code, unfinished)
        P, steps, broken = _stored((P, steps, broken), index, (H, taken, code))
    return sym(P).reshape(*batch, n, n), steps.reshape(batch), broken.reshape(batch)


def _stored(
    whole: tuple[Tensor, ...], index: Tensor, parts: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Return tensors with some of their elements, or all, replaced."""
    if len(index) == len(whole[0]):
        return parts
    return tuple(X.index_copy(0, index, part) for X, part in zip(whole, parts, strict=True))
