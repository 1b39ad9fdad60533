"""How the adjoint (D1) is solved: exactly by default, cheaper and inexactly only by name.

    (D1)  lam = g + A' lam
    (D3)  truncated:  lam = g + A'g + ... + A'^k g;  k = 0 is the one-step (Jacobian-free) gradient

Source of (D3): S. W. Fung et al. (2022), JFB: Jacobian-free backpropagation for implicit networks,
arXiv:2103.12803; Z. Geng et al. (2021), On training implicit models, arXiv:2111.05177.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from deqlqr._checks import Options, at_least, choice, count
from deqlqr._linalg import identity_like
from deqlqr.linear_solution import LinearSolution
from deqlqr.lqr import LQR
from deqlqr.resolvent import Product, Resolvent, matrix_of
from deqlqr.solution import ConvergenceError, FixedPointResult
from deqlqr.steady_state import steady_state

Method = Literal["auto", "dense", "krylov"]


@runtime_checkable
class Adjoint(Protocol):
    """Solves (D1), and the tangent equation, which has A in place of A'."""

    def solve(
        self, product: Product, right: Tensor, tol: float, start: Tensor | None = None
    ) -> LinearSolution:
        """Return lam (batch, n) for the right side g = `right`, from products with A'."""


@dataclass(frozen=True)
class Implicit(Options):
    """The exact adjoint, by factorisation for few states and a Krylov method for many.

    Attributes:
        method: `"dense"` forms A (n products), `"krylov"` does not; `"auto"` goes by `dense_up_to`.
        dense_up_to: Largest state for which `"auto"` forms A.
        tol: Relative residual; `None` takes the layer's tolerance.
        max_steps: Most products of a Krylov solve.

    Raises:
        ValueError: If an option is out of range.
    """

    method: Method = "auto"
    dense_up_to: int = 24
    tol: float | None = None
    max_steps: int = 200

    def __post_init__(self) -> None:
        choice("method", self.method, get_args(Method))
        count("max_steps", self.max_steps)
        count("dense_up_to", self.dense_up_to, 0)
        if self.tol is not None:
            at_least("tol", self.tol, 0.0, strict=True)

    def resolvent(self, product: Product, n: int, tol: float) -> Resolvent:
        """Return (I - A')^-1, for one right side or many."""
        dense = self.method == "dense" or (self.method == "auto" and n <= self.dense_up_to)
        return Resolvent(product, tol=self.tol or tol, max_steps=self.max_steps, dense=dense)

    def solve(
        self, product: Product, right: Tensor, tol: float, start: Tensor | None = None
    ) -> LinearSolution:
        """Solve (D1), with the bound (G2) of the error."""
        resolvent = self.resolvent(product, right.shape[1], tol)
        return self.solve_by(resolvent, product, right, start)

    def solve_by(
        self,
        resolvent: Resolvent,
        product: Product,
        right: Tensor,
        start: Tensor | None = None,
        tol: float | None = None,
    ) -> LinearSolution:
        """Solve (D1) by a resolvent that may have served before, to its tolerance or another."""
        found = resolvent.solve(right, start, tol)
        if resolvent.dense and not found.converged.all():
            # Samples that depend on each other have no A of their own.
            krylov = Resolvent(product, tol=resolvent.tol, max_steps=self.max_steps, dense=False)
            return krylov.solve(right, start, tol)
        return found


@dataclass(frozen=True)
class Neumann(Options):
    """The truncated series (D3): inexact, cheap; `terms=0` is the one-step gradient.

    The bound of the error is not known and reported as NaN. Differentiated again it is the
    derivative of the truncated series.

    Attributes:
        terms: k, the number of products.
    """

    terms: int = 5

    def __post_init__(self) -> None:
        count("terms", self.terms, 0)

    def solve(
        self, product: Product, right: Tensor, tol: float, start: Tensor | None = None
    ) -> LinearSolution:
        """Return (D3)."""
        lam = term = right.clone()
        for _ in range(self.terms):
            term = product(term)
            lam = lam + term
        good = lam.isfinite().all(-1)
        result = torch.where(good, FixedPointResult.CONVERGED, FixedPointResult.NON_FINITE)
        unknown = torch.full(right.shape[:1], float("nan"), dtype=lam.dtype, device=right.device)
        evaluations = torch.full_like(result, self.terms)
        return LinearSolution(lam, result, evaluations, unknown, unknown)


@dataclass(frozen=True)
class Costate:
    """The exact adjoint as the costate of the LQR with Q = 0, M = 0, R = I (theorem 4.2.1)."""

    def solve(
        self, product: Product, right: Tensor, tol: float, start: Tensor | None = None
    ) -> LinearSolution:
        """Form A by n products and take lam from the steady state (R2).

        Returns:
            lam and its certificate.

        Raises:
            ConvergenceError: If the LQR has no steady state, or the samples are not independent.
        """
        batch, n = right.shape
        A = matrix_of(product, right).mT
        # B enters (R2) only through P, which is zero: one control is enough to state the problem.
        zeros = A.new_zeros
        lqr = LQR(
            A=A,
            B=zeros(batch, n, 1),
            Q=zeros(batch, n, n),
            R=torch.ones_like(zeros(batch, 1, 1)),
            M=zeros(batch, 1, n),
            a=right,
            b=zeros(batch, 1),
        )
        lam = steady_state(lqr).lam
        defect = torch.linalg.vector_norm(right + product(lam) - lam, dim=-1)
        size = torch.linalg.vector_norm(lam, dim=-1) + torch.linalg.vector_norm(right, dim=-1)
        if not bool((defect <= 1e3 * torch.finfo(lam.dtype).eps * n * size.clamp(min=1e-30)).all()):
            raise ConvergenceError(
                f"LQR backward path: (D1) holds only to {float(defect.max()):.2e}; the block mixes "
                "the samples of a batch (batch normalisation in training mode?), or I - A is "
                "singular."
            )
        inverse = torch.linalg.vector_norm(torch.linalg.inv(identity_like(A) - A), dim=(-2, -1))
        code = torch.full((batch,), int(FixedPointResult.CONVERGED), device=right.device)
        norm = lambda v: torch.linalg.vector_norm(v, dim=-1).clamp(min=1e-30)
        return LinearSolution(
            lam, code, torch.full_like(code, n), defect / norm(right), inverse * defect / norm(lam)
        )


_BY_NAME: dict[str, Adjoint] = {
    "implicit": Implicit(),
    "lqr": Costate(),
    "neumann": Neumann(),
    "one-step": Neumann(terms=0),
}


def make_adjoint(backward: "str | Adjoint") -> Adjoint:
    """Return the adjoint solver that a name or an object stands for.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(backward, str):
        return _BY_NAME[choice("backward", backward, tuple(_BY_NAME))]
    if isinstance(backward, type) or not isinstance(backward, Adjoint):
        raise ValueError(
            f"backward must be a name or an Adjoint such as Implicit(), got {backward!r}."
        )
    return backward
