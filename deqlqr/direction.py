"""What every route returns: a control u, how well it solves its equations, what it promises."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from deqlqr.solver import FixedPointSolution


@dataclass(frozen=True)
class Direction:
    """A step of length 1 that a route proposes.

    Attributes:
        u: `(m,)`, or `None` where there is none.
        residual: Relative residual of the equations of u, NaN where they have no answer.
        slope: g'u, g the gradient of the loss.
        curvature: u'C u, C the route's metric without damping.
        reason: Why it must not be taken, or `None`.
        closed_loop_radius: As in `StepReport`, like the next three.
        dare_residual: See there.
        dare_iterations: See there.
        iterations: See there.
        truncation: See there.
        layer_damping: See there.
        K: Gain of u = -K x, (m, n), of the route that has one for the whole batch.
    """

    u: Tensor | None
    residual: float
    slope: float = float("nan")
    curvature: float = float("nan")
    reason: str | None = None
    closed_loop_radius: float | None = None
    dare_residual: float | None = None
    dare_iterations: int | None = None
    iterations: int | None = None
    truncation: float | None = None
    layer_damping: tuple[float, ...] | None = None
    K: Tensor | None = None


class Local(Protocol):
    """A model at its fixed point on one batch, in the form that a route needs.

    Attributes:
        loss: The mean loss, a scalar tensor.
        solutions: The forward solves of its DEQ layers.
    """

    loss: Tensor
    solutions: Sequence[FixedPointSolution]

    @property
    def gradient(self) -> Tensor:
        """Gradient of the loss, `(m,)`."""

    def solve(self, shifts: Sequence[float]) -> Direction:
        """Return the step for the damping of each parameter."""

    def metric(self, d: Tensor) -> float:
        """Return d'C d for a change d (m,), C the metric without damping."""


class Steepest:
    """The Euclidean divergence: C = I, so u = -g / (1 + delta)."""

    def __init__(
        self, loss: Tensor, gradient: Tensor, solutions: Sequence[FixedPointSolution],
        sizes: Sequence[int],
    ) -> None:  # fmt: skip
        self.loss, self.gradient, self.solutions, self._sizes = loss, gradient, solutions, sizes

    def solve(self, shifts: Sequence[float]) -> Direction:
        """Return u for the damping of each parameter."""
        g = self.gradient
        shift = expanded(shifts, self._sizes, g)
        u = -g / (1 + shift)
        return promised(u, g, u, shift)

    def metric(self, d: Tensor) -> float:
        """Return d'd."""
        return float(d @ d)


def expanded(shifts: Sequence[float], sizes: Sequence[int], like: Tensor) -> Tensor:
    """Return one damping for each entry of u, from one for each parameter."""
    return torch.cat([
        torch.full((size,), shift, dtype=like.dtype, device=like.device)
        for shift, size in zip(shifts, sizes, strict=True)
    ])


def promised(
    u: Tensor, g: Tensor, product: Tensor, shift: Tensor, iterations: int | None = None
) -> Direction:
    """Return the direction u with the residual of (C + shift) u = -g, for C u = `product`."""
    size = torch.linalg.vector_norm(g).clamp(min=torch.finfo(g.dtype).tiny)
    residual = torch.linalg.vector_norm(product + shift * u + g) / size
    residual, slope, curvature = torch.stack([residual, g @ u, u @ product]).tolist()
    return Direction(u, residual, slope, curvature, iterations=iterations)
