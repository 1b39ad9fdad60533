"""B as products with B and B', whether it is stored or not."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from deqlqr._linalg import sym

_CHUNK = 64  # columns of B that are held at a time


class InputMap(Protocol):
    """B of a phase, `(*batch, n+, m)`, known by its products."""

    @property
    def m(self) -> int:
        """Number of controls."""

    def times(self, v: Tensor) -> Tensor:
        """Return B v `(*batch, n+, j)` for v `(*batch, m, j)`."""

    def adjoint(self, w: Tensor) -> Tensor:
        """Return B'w `(*batch, m, j)` for w `(*batch, n+, j)`."""

    def gram(self) -> Tensor:
        """Return B B' `(*batch, n+, n+)`."""


@dataclass(frozen=True)
class StoredMap:
    """B as a matrix."""

    B: Tensor

    @property
    def m(self) -> int:
        """Number of controls."""
        return self.B.shape[-1]

    def times(self, v: Tensor) -> Tensor:
        """Return B v."""
        return self.B @ v

    def adjoint(self, w: Tensor) -> Tensor:
        """Return B'w."""
        return self.B.mT @ w

    def gram(self) -> Tensor:
        """Return B B'."""
        return self.B @ self.B.mT


@dataclass(frozen=True)
class ProductMap:
    """B as the derivative of a function: a product is a derivative along a vector.

    Attributes:
        m: Number of controls.
        push: v `(*batch, m, j)` -> B v.
        pull: w `(*batch, n+, j)` -> B'w.
        like: A tensor `(*batch, n+, any)` of B's type, for its shape.
    """

    m: int
    push: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor], Tensor]
    like: Tensor

    def times(self, v: Tensor) -> Tensor:
        """Return B v."""
        return self.push(v)

    def adjoint(self, w: Tensor) -> Tensor:
        """Return B'w."""
        return self.pull(w)

    def gram(self) -> Tensor:
        """Return B B', some columns at a time."""
        *batch, n = self.like.shape[:-1]
        eye = torch.eye(n, dtype=self.like.dtype, device=self.like.device)
        columns = eye.expand(*batch, n, n).split(_CHUNK, dim=-1)
        return sym(torch.cat([self.times(self.adjoint(part)) for part in columns], dim=-1))
