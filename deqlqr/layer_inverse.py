"""(delta I + R + B'P+B)^-1 of a phase: itself, or by a Neumann series of products.

    (V2)  without R and M:  A_cl = (I + B B'P+/delta)^-1 A,   P = Q + A'P+ A_cl
    (V3)  (delta I + C)^-1 = 1/delta sum_{j < terms} (-C/delta)^j,   C = R + B'P+B,
          with a relative error of at most (rho/delta)^terms, rho = rho(C) < delta

In (V2) the series of (V3) becomes that of B B'P+/delta, term by term, on n+ x n rather than m x n.
B enters by products only.

Source: thesis section 5.1, with 1/delta as a factor in eq. 5.1.4.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from deqlqr._checks import Options, choice, count
from deqlqr._linalg import identity_like, sym
from deqlqr.input_cost import InputCost
from deqlqr.input_map import InputMap, StoredMap


@dataclass(frozen=True)
class Phase:
    """One phase of a chain or a cycle; its R holds no damping.

    Attributes:
        A: `(*batch, n+, n)`.
        B: `(*batch, n+, m)`, by its products.
        Q: `(*batch, n, n)`.
        R: `(*batch, m, m)`.
        M: `(*batch, m, n)`.
        a: `(*batch, n)`.
        b: `(*batch, m)`.
    """

    A: Tensor
    B: InputMap
    Q: Tensor
    R: InputCost
    M: Tensor
    a: Tensor
    b: Tensor

    @staticmethod
    def of(
        A: Tensor, B: Tensor, Q: Tensor, R: Tensor | InputCost, M: Tensor, a: Tensor, b: Tensor
    ) -> "Phase":
        """Return the phase of matrices, B and R among them."""
        return Phase(A, StoredMap(B), Q, InputCost.of(R), M, a, b)


class Inverse(Protocol):
    """How (delta I + C)^-1 is applied."""

    def closed_loop(self, A: Tensor, BBP: Tensor, delta: Tensor) -> Tensor:
        """Return A_cl of (V2) for BBP = B B'P+."""

    def solve(self, system: "System", right: Tensor) -> Tensor:
        """Return (delta I + R + B'P+B)^-1 right."""

    def truncation(self, rho: Tensor, delta: Tensor) -> Tensor:
        """Return a bound on the relative error of `solve`, `(*batch,)`, for rho of (V3)."""


@dataclass(frozen=True)
class System:
    """delta I + C of a phase, C = R + B'P+B.

    Attributes:
        phase: The phase.
        P: P+.
        delta: Damping, `(*batch,)`.
        BBP: B B'P+ where R and M are 0, else `None`.
    """

    phase: Phase
    P: Tensor
    delta: Tensor
    BBP: Tensor | None

    def curved(self, v: Tensor) -> Tensor:
        """Return C v."""
        Cv = self.phase.B.adjoint(self.P @ self.phase.B.times(v))
        return Cv if self.BBP is not None else Cv + self.phase.R @ v


@dataclass(frozen=True)
class ExactInverse:
    """The inverse itself, by factorisation: of an m x m matrix where R or M is not 0."""

    def closed_loop(self, A: Tensor, BBP: Tensor, delta: Tensor) -> Tensor:
        """Return A_cl of (V2)."""
        return torch.linalg.solve_ex(identity_like(BBP) + BBP / delta[..., None, None], A)[0]

    def solve(self, system: System, right: Tensor) -> Tensor:
        """Return (delta I + R + B'P+B)^-1 right."""
        wide, B = system.delta[..., None, None], system.phase.B
        if system.BBP is not None:  # by the n+ x n+ matrix of (V2)
            loop = wide * identity_like(system.BBP) + system.BBP
            inner = torch.linalg.solve_ex(loop, B.times(right))[0]
            return (right - B.adjoint(system.P @ inner)) / wide
        m = right.shape[-2]
        eye = torch.eye(m, dtype=right.dtype, device=right.device)
        eye = eye.expand(*right.shape[:-2], m, m)
        return torch.linalg.solve_ex(wide * eye + sym(system.curved(eye)), right)[0]

    def truncation(self, rho: Tensor, delta: Tensor) -> Tensor:
        """Return 0."""
        return torch.zeros_like(rho)


@dataclass(frozen=True)
class NeumannInverse(Options):
    """The truncated series (V3): products only.

    Attributes:
        terms: Number of terms.

    Raises:
        ValueError: If it is below 1.
    """

    terms: int = 20

    def __post_init__(self) -> None:
        count("terms", self.terms)

    def closed_loop(self, A: Tensor, BBP: Tensor, delta: Tensor) -> Tensor:
        """Return A_cl of (V2)."""
        step, total, term = -BBP / delta[..., None, None], A, A
        for _ in range(self.terms):
            term = step @ term
            total = total + term
        return total

    def solve(self, system: System, right: Tensor) -> Tensor:
        """Return (delta I + R + B'P+B)^-1 right."""
        wide, B = system.delta[..., None, None], system.phase.B
        if system.BBP is not None:  # on n+ x n+ matrices, as in (V2): B enters twice
            term = B.times(right) / wide
            inner = torch.zeros_like(term)
            for _ in range(self.terms - 1):
                inner = inner + term
                term = -(system.BBP @ term) / wide
            return (right - B.adjoint(system.P @ inner)) / wide
        total = term = right / wide
        for _ in range(self.terms - 1):
            term = -system.curved(term) / wide
            total = total + term
        return total

    def truncation(self, rho: Tensor, delta: Tensor) -> Tensor:
        """Return the bound (V3)."""
        return (rho / delta) ** self.terms


INVERSES = ("exact", "neumann")
InverseLike = Literal["exact", "neumann"] | Inverse


def make_inverse(inverse: str | Inverse) -> Inverse:
    """Return the inverse that a name or an object stands for.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(inverse, str):
        choice("inverse", inverse, INVERSES)
        return ExactInverse() if inverse == "exact" else NeumannInverse()
    if isinstance(inverse, type) or not hasattr(inverse, "closed_loop"):
        raise ValueError(
            f"inverse must be 'exact', 'neumann' or NeumannInverse(), got {inverse!r}."
        )
    return inverse
