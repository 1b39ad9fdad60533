"""The discrete algebraic Riccati equation (DARE): its coefficients, its gain, its error.

One phase of a cycle takes n states to n+ states; P belongs to its start and P+ to its end, and the
DARE is the cycle of one phase, where P+ = P. Shapes: A (*batch, n+, n), B (*batch, n+, m),
Q and P (*batch, n, n), P+ (*batch, n+, n+), R (*batch, m, m), M and K (*batch, m, n).

    (R1)  P = A'P+A + Q - (M + B'P+A)' K,   K = (R + B'P+B)^-1 (M + B'P+A),   A_cl = A - B K
          that is  P = A'P+ A_cl + Q - M'K,   R K = M + B'P+ A_cl
          or     P = A_cl'P+ A_cl + K'R K + Q - M'K - K'M
    (R4)  A_0 = A - B R^-1 M,   G_0 = B R^-1 B',   H_0 = Q - M' R^-1 M
    (R7)  K = R^-1 M + R^-1 B' (I + P+G_0)^-1 P+ A_0
          (R + B'P+B)^-1 r = R^-1 r - R^-1 B' (I + P+G_0)^-1 P+B R^-1 r

(R7) is (R1)'s gain by the matrix inversion lemma: R is factorised once and everything after it is
n+ x n+, which pays where controls outnumber states.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from deqlqr._linalg import (
    LUFactor,
    identity_like,
    is_finite,
    lu_factor,
    norm,
    relative,
    sym,
    times,
)
from deqlqr.input_cost import InputCost, InputCostFactor


class Dare(NamedTuple):
    """The coefficients of (R1)."""

    A: Tensor
    B: Tensor
    Q: Tensor
    R: InputCost
    M: Tensor

    def to(self, dtype: torch.dtype) -> "Dare":
        """Return the equation in another dtype."""
        A, B, Q, R, M = self
        return Dare(A.to(dtype), B.to(dtype), Q.to(dtype), R.to(dtype), M.to(dtype))

    def dense(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return A, B, Q, R, M with R as a matrix."""
        return self.A, self.B, self.Q, self.R.dense(), self.M

    def pick(self, index: Tensor | slice, batch: int) -> "Dare":
        """Return equations of the flattened batch; of the dimensions before it, all."""
        A, B, Q, R, M = self
        lead = A.shape[: A.dim() - 2 - batch]
        picked = (*(slice(None),) * len(lead), index)

        def flat(X: Tensor) -> Tensor:
            rest = X.shape[len(lead) + batch :]
            size = math.prod(X.shape[len(lead) : len(lead) + batch])
            return X.reshape(*lead, size, *rest)[picked]

        R = InputCost(flat(R.diagonal), R.coupled, flat(R.block))
        return Dare(flat(A), flat(B), flat(Q), R, flat(M))

    def shifted(self, alpha: Tensor) -> "Dare":
        """Return the equation of D = P - alpha I, alpha (*batch,): (R6) in `doubling`."""
        A, B, Q, R, M = self
        shift = alpha[..., None, None]
        eye = identity_like(Q)
        R_shifted = InputCost.of(R.dense() + shift * (B.mT @ B))
        return Dare(A, B, Q + shift * (A.mT @ A - eye), R_shifted, M + shift * (B.mT @ A))

    def is_finite(self) -> Tensor:
        """Return per batch element whether all coefficients are finite."""
        tensors = (self.A, self.B, self.Q, self.R.block, self.M, self.R.diagonal[..., None])
        return torch.stack([is_finite(X) for X in tensors]).all(0)


class Gain(Protocol):
    """K of (R1), and what solves with R + B'PB."""

    @property
    def K(self) -> Tensor:
        """K `(*batch, m, n)`."""

    @property
    def mixed(self) -> Tensor | None:
        """M + B'PA `(*batch, m, n)`, where it has been formed."""

    def solve(self, right: Tensor) -> Tensor:
        """Return (R + B'PB)^-1 right (*batch, m, k)."""


@dataclass(frozen=True)
class DirectGain:
    """(R1) through the LU factors of R + B'PB."""

    K: Tensor
    mixed: Tensor
    factor: LUFactor

    @staticmethod
    def of(dare: Dare, P: Tensor) -> "DirectGain":
        """Return the gain that belongs to P+."""
        A, B, _, R, M = dare
        PB = P @ B
        factor = lu_factor(sym(R.dense() + B.mT @ PB))
        mixed = M + PB.mT @ A
        return DirectGain(factor.solve(mixed), mixed, factor)

    def solve(self, right: Tensor) -> Tensor:
        """Return (R + B'PB)^-1 right (*batch, m, k)."""
        return self.factor.solve(right)


@dataclass(frozen=True)
class Eliminated:
    """A DARE with its input cost eliminated (R4), and what led there."""

    A: Tensor
    G: Tensor
    H: Tensor
    cost: InputCostFactor
    RB: Tensor  # R^-1 B'
    RM: Tensor  # R^-1 M

    @staticmethod
    def of(dare: Dare) -> "Eliminated":
        """Eliminate; where R is singular the result is not finite."""
        A, B, Q, R, M = dare
        cost = R.factorise()
        if not M.count_nonzero():
            RB = cost.solve(B.mT)
            return Eliminated(A, sym(B @ RB), Q, cost, RB, M)
        solved = cost.solve(torch.cat([B.mT, M], dim=-1))
        RB, RM = solved[..., : A.shape[-2]], solved[..., A.shape[-2] :]
        A_0, H_0 = A - times(B, RM), sym(Q - times(M.mT, RM))
        return Eliminated(A_0, sym(B @ RB), H_0, cost, RB, RM)  # (R4)


@dataclass(frozen=True)
class EliminatedGain:
    """(R1) through (R7)."""

    K: Tensor
    B: Tensor
    P: Tensor  # P+
    eliminated: Eliminated
    loop: LUFactor  # of I + P+G_0
    mixed: None = None

    @staticmethod
    def of(dare: Dare, P: Tensor, eliminated: Eliminated) -> "EliminatedGain":
        """Return the gain that belongs to P+."""
        loop = lu_factor(identity_like(P) + P @ eliminated.G)
        K = eliminated.RM + eliminated.RB @ loop.solve(P @ eliminated.A)  # (R7)
        return EliminatedGain(K, dare.B, P, eliminated, loop)

    def solve(self, right: Tensor) -> Tensor:
        """Return (R + B'PB)^-1 right (*batch, m, k) (R7)."""
        solved = self.eliminated.cost.solve(right)
        return solved - self.eliminated.RB @ self.loop.solve(self.P @ (self.B @ solved))


@dataclass(frozen=True)
class EitherGain:
    """One of two gains, element by element."""

    take: Tensor  # boolean (*batch,): first, where true
    first: EliminatedGain
    second: DirectGain
    mixed: None = None

    @property
    def K(self) -> Tensor:
        """K `(*batch, m, n)`."""
        return torch.where(self.take[..., None, None], self.first.K, self.second.K)

    def solve(self, right: Tensor) -> Tensor:
        """Return (R + B'PB)^-1 right (*batch, m, k)."""
        both = self.first.solve(right), self.second.solve(right)
        return torch.where(self.take[..., None, None], *both)


def gain_of(dare: Dare, P: Tensor, eliminated: Eliminated | None = None) -> Gain:
    """Return the gain that belongs to P+: by (R7) where controls clearly outnumber states.

    There it is not only cheaper: R + B'PB is a small R plus a matrix of rank n, and its
    factors lose the digits in which K is well determined. Elements whose R is singular go directly.
    """
    n, m = dare.B.shape[-2:]
    if m <= 2 * n:
        return DirectGain.of(dare, P)
    eliminated = eliminated or Eliminated.of(dare)
    first = EliminatedGain.of(dare, P, eliminated)
    if not bool(eliminated.cost.singular.any()):
        return first
    return EitherGain(~eliminated.cost.singular, first, DirectGain.of(dare, P))


class Error(NamedTuple):
    """By how much P, P+ and K miss (R1)."""

    A_cl: Tensor
    defect: Tensor  # right side less left side, (*batch, n, n)
    residual: Tensor  # the larger relative residual of the two equations, (*batch,)


def error_of(dare: Dare, P: Tensor, P_next: Tensor, gain: Gain) -> Error:
    """Return the error of (R1); how P, P+ and K were found does not matter.

    Args:
        dare: The equation.
        P: At its start, `(*batch, n, n)`.
        P_next: P+, at its end; P itself for a cycle of one phase.
        gain: The gain that belongs to P+.
    """
    (A, B, Q, R, M), K = dare, gain.K
    A_cl = A - B @ K
    PA = P_next @ A_cl
    BPA, RK, MK = B.mT @ PA, R @ K, times(K.mT, M).mT
    mixed = _mixed_size(dare, P_next, gain, MK, A_cl) if gain.mixed is None else norm(gain.mixed)
    # Where a large P+ comes down to a small P, no large terms cancel in this form of (R1).
    APA, KRK = A_cl.mT @ PA, K.mT @ RK
    gain_error = norm(RK - M - BPA)
    scale = torch.stack([norm(RK), norm(M), norm(BPA), mixed]).amax(0)
    gain_error = gain_error / scale.clamp(min=torch.finfo(P.dtype).tiny)
    defect = (APA + KRK).add_(Q).sub_(MK).sub_(MK.mT).sub_(P)
    residual = torch.maximum(relative(defect, APA, KRK, Q, MK, P), gain_error)
    return Error(A_cl, defect, residual)


def _mixed_size(dare: Dare, P: Tensor, gain: Gain, MK: Tensor, A_cl: Tensor) -> Tensor:
    """Return the size of M + B'PA, or less: below it the second equation is all rounding."""
    # |(M + B'PA)'K| / |K|, which needs no further product with m rows.
    size = norm(gain.K).clamp(min=torch.finfo(P.dtype).tiny)
    return norm(MK + dare.A.mT @ (P @ (dare.A - A_cl))) / size
