"""The damped step by conjugate gradients: nothing of the size of J, any divergence.

    (K2)  (C + D) u = -g,    C v = J' Lambda J v / batch,    D the damping

Each product with C is one implicit Jacobian-vector and one vector-Jacobian product (J2). For the
Newton divergence C is the Hessian of the loss, by double backward through the fixed point.

The iteration ends when the quadratic model has all but stopped to fall,

    (K3)  phi(u) = g'u + u'(C + D)u / 2,    phi_i - phi_(i-k) > k progress phi_i,  k = max(10, i/10)

Source of (K3): J. Martens (2010), Deep learning via Hessian-free optimization, ICML, section 4.4.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deqlqr._checks import Options, at_least, count
from deqlqr.batch import Batch, Chunk
from deqlqr.direction import Direction, expanded, promised
from deqlqr.divergence import Divergence, Newton, OutputDivergence
from deqlqr.solver import FixedPointSolution

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ConjugateGradients(Options):
    """Rules of the iteration.

    Attributes:
        max_steps: Most products with C.
        progress: Smallest gain of the model per step, relative to all so far (K3); 0 switches it
            off.
        tol: Relative residual that is good enough.

    Raises:
        ValueError: If one is out of range.
    """

    max_steps: int = 50
    progress: float = 5e-4
    tol: float = 1e-8

    def __post_init__(self) -> None:
        count("max_steps", self.max_steps)
        at_least("progress", self.progress, 0.0)
        at_least("tol", self.tol, 0.0)

    def solve(
        self, product: Product, shift: Tensor, g: Tensor, start: Tensor | None
    ) -> tuple[Tensor, Tensor, int, bool]:
        """Solve (K2), preconditioned by D.

        Returns:
            u, C u, the products spent, and whether a direction of negative curvature was met.
        """
        spent = 0
        u = torch.zeros_like(g) if start is None else start
        Cu = torch.zeros_like(g)
        if start is not None:
            Cu, spent = product(u), 1
        r = -g - Cu - shift * u
        y = r / shift
        p, rho = y, float(r @ y)
        # Below some rounding units a residual is noise, and directions made from it are too.
        reach = max(self.tol, 10 * torch.finfo(g.dtype).eps)
        goal = reach * float(torch.linalg.vector_norm(g))
        values: list[float] = []
        while spent < self.max_steps and float(torch.linalg.vector_norm(r)) > goal:
            Cp, spent = product(p), spent + 1
            bend = float(p @ Cp + p @ (shift * p))
            if not bend > 0:
                return u, Cu, spent, True
            step = rho / bend
            u, Cu = u + step * p, Cu + step * Cp
            r = r - step * (Cp + shift * p)
            y = r / shift
            rho, last = float(r @ y), rho
            p = y + rho / last * p
            values.append(float((g - r) @ u) / 2)  # phi, for r = -g - (C + D) u
            if self._settled(values):
                break
        return u, Cu, spent, False

    def _settled(self, values: list[float]) -> bool:
        k = max(10, len(values) // 10)
        if self.progress == 0 or len(values) <= k or values[-1] >= 0:
            return False
        return values[-1] - values[-1 - k] > k * self.progress * values[-1]  # (K3)


class KrylovSystem:
    """A batch linearised, and the products with its metric C.

    Attributes:
        loss: The mean loss.
        gradient: Its gradient `(m,)`.
        solutions: The forward solves of the model's DEQ layers.
        last: u of the last solve.
    """

    def __init__(
        self, at: Batch, divergence: Divergence, rules: ConjugateGradients, start: Tensor | None
    ) -> None:
        self.rules, self.last, self._sizes = rules, start, at.controls.sizes
        self._terms: list[Product] = []

        def take(chunk: Chunk) -> None:
            if isinstance(divergence, OutputDivergence):
                self._terms.append(_gauss_newton(chunk, divergence.metric(chunk.at.outputs), at))
            else:
                assert isinstance(divergence, Newton)  # noqa: S101  chosen by the route
                self._terms.append(_hessian(chunk, at))

        self.loss, self.gradient, found = at.visit(take)
        self.solutions: Sequence[FixedPointSolution] = found

    def times(self, v: Tensor) -> Tensor:
        """Return C v."""
        return torch.stack([term(v) for term in self._terms]).sum(0)

    def metric(self, d: Tensor) -> float:
        """Return d'C d."""
        return float(d @ self.times(d))

    def solve(self, shifts: Sequence[float]) -> Direction:
        """Return u of (K2) for the damping of each parameter."""
        g = self.gradient
        shift = expanded(shifts, self._sizes, g)
        u, product, spent, negative = self.rules.solve(self.times, shift, g, self.last)
        if negative:
            return Direction(
                None, float("nan"), iterations=spent,
                reason="negative curvature: the damped Hessian is not positive definite",
            )  # fmt: skip
        self.last = u
        return promised(u, g, product, shift, iterations=spent)


def _gauss_newton(chunk: Chunk, Lambda: Tensor, at: Batch) -> Product:
    def product(v: Tensor) -> Tensor:
        c = (Lambda @ chunk.at.push(v)[..., None])[..., 0]
        return chunk.at.pull(c / at.count)

    return product


def _hessian(chunk: Chunk, at: Batch) -> Product:
    with torch.enable_grad():
        cost = at.loss(at.model(chunk.x), chunk.y) * (len(chunk.x) / at.count)
        gradient = at.controls.pull(cost, again=True)
    return lambda v: at.controls.pull(gradient, v)
