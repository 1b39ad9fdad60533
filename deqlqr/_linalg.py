"""Small pieces of linear algebra on batches of matrices, shared by the solvers."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

_BLOCKS = 256  # rows from which a symmetric product is formed in blocks


class LUFactor(NamedTuple):
    """LU factors of a batch of square matrices, and whether each is singular."""

    LU: Tensor
    pivots: Tensor
    info: Tensor

    def solve(self, right: Tensor, *, adjoint: bool = False) -> Tensor:
        """Return X^-1 right (*batch, n, k), or X^-T right."""
        return torch.linalg.lu_solve(self.LU, self.pivots, right, adjoint=adjoint)


def lu_factor(X: Tensor) -> LUFactor:
    """Return the LU factors of X (*batch, n, n); a singular one is marked, not raised."""
    return LUFactor(*torch.linalg.lu_factor_ex(X))


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast, on the device of a tensor."""
    device = like.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def not_finite(x: Tensor) -> Tensor | None:
    """Return which rows of x (*batch, n) have an entry that is not finite, `None` if none has."""
    if x.sum(-1).isfinite().all():  # a tenth of the time of a look at every entry
        return None
    bad = ~x.isfinite().all(-1)
    return bad if bad.any() else None


def gram(parts: Sequence[Tensor]) -> Tensor:
    """Return W W' for W = [W_1 W_2 ...], each (i, j): on the CPU little more than its lower half.

    The upper half is a copy.
    """
    first, *rest = parts
    n = len(first)
    if first.device.type != "cpu" or n < _BLOCKS:
        products = [W @ W.mT for W in parts]
        return sum(products[1:], products[0])
    found, ends = first.new_empty(n, n), [n * k // 8 for k in range(9)]
    for begin, end in pairwise(ends):
        below = found[begin:end, :end]
        torch.mm(first[begin:end], first[:end].mT, out=below)
        for W in rest:
            below.addmm_(W[begin:end], W[:end].mT)
        found[:begin, begin:end] = found[begin:end, :begin].mT
    return found


def identity_like(X: Tensor) -> Tensor:
    """Return the n x n identity for X (*batch, n, n)."""
    return torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)


def sym(X: Tensor) -> Tensor:
    """Return the symmetric part of X."""
    return (X + X.mT).mul_(0.5)


def norm(X: Tensor) -> Tensor:
    """Return the Frobenius norm of X (*batch, i, j)."""
    return torch.linalg.vector_norm(X, dim=(-2, -1))


def largest(X: Tensor) -> Tensor:
    """Return the largest magnitude in X (*batch, i, j); NaN and inf come through."""
    if X.shape[-1] * X.shape[-2] == 0:
        return X.new_zeros(X.shape[:-2])
    return X.abs().amax((-2, -1))


def is_finite(X: Tensor) -> Tensor:
    """Return per batch element whether X (*batch, i, j) is finite."""
    return largest(X).isfinite()


def relative(error: Tensor, *terms: Tensor) -> Tensor:
    """Return the norm of an equation's error over that of its largest term."""
    scale = torch.stack([norm(term) for term in terms]).amax(0)
    return norm(error) / scale.clamp(min=torch.finfo(error.dtype).tiny)


def times(X: Tensor, Y: Tensor) -> Tensor:
    """Return X Y; rows of Y that are zero, as most of M in a training step, cost nothing."""
    used = Y.any(-1)
    rows = (used.flatten(0, -2).any(0) if used.dim() > 1 else used).nonzero()[:, 0]
    if len(rows) == 0:
        return X.new_zeros(*X.shape[:-1], Y.shape[-1])
    if 2 * len(rows) > Y.shape[-2]:
        return X @ Y
    return X[..., rows] @ Y[..., rows, :]


def batch_first(X: Any, dim: int | None, size: int) -> Any:
    """Return X with the dimension that `torch.vmap` maps over in front."""
    return X.expand(size, *X.shape) if dim is None else X.movedim(dim, 0)


def zeros_if_none(X: Tensor | None, like: Tensor) -> Tensor:
    """Return X, or zeros for a derivative that autograd leaves out."""
    return torch.zeros_like(like) if X is None else X


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether all entries of all tensors are finite; one look at the device for all."""
    found = [t.isfinite().all() for t in tensors]
    return not found or bool(torch.stack(found).all())


def least_norm(like: Tensor) -> float:
    """Return the size below which squares underflow: no right side counts as smaller.

    The cotangent of a sample that is right already can be.
    """
    return torch.finfo(like.dtype).tiny ** 0.5
