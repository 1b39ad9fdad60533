"""The directions that solves by (G1) leave, p and q = p - L p, with the q orthonormal."""

import torch
from torch import Tensor

from deqlqr._linalg import least_norm

MOST_PAIRS = 60  # kept; then the oldest give way
_SQUARINGS = 5  # of a Gram matrix, for its leading vector


class Pairs:
    """The pairs (p, q) of (G1), q = p - L p orthonormal, in one block of memory each."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget them."""
        self.count = 0
        self._p = self._q = torch.empty(0)

    @property
    def p(self) -> Tensor:
        """All p, `(batch, count, n)`."""
        return self._p[:, : self.count]

    @property
    def q(self) -> Tensor:
        """All q, `(batch, count, n)`."""
        return self._q[:, : self.count]

    def add(self, p: Tensor, q: Tensor) -> None:
        """Take in a pair, each (batch, n)."""
        if self.count == MOST_PAIRS:
            self._p, self._q = self._p.roll(-1, 1), self._q.roll(-1, 1)
            self.count -= 1
        elif self.count == 0 or self.count == self._p.shape[1]:
            room = p.new_empty(len(p), min(MOST_PAIRS, max(6, 2 * self.count)), p.shape[1])
            wide_p, wide_q = room, torch.empty_like(room)
            if self.count:
                wide_p[:, : self.count], wide_q[:, : self.count] = self._p, self._q
            self._p, self._q = wide_p, wide_q
        self._p[:, self.count], self._q[:, self.count] = p, q
        self.count += 1

    def orthogonalise(self, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the pair with q made orthogonal to all q, ||q||, and what it was before."""
        before = size = torch.linalg.vector_norm(q, dim=-1)
        for _ in range(2 if self.count else 0):
            # A row times a matrix: BLAS takes ten times as long over a matrix times a column.
            share = torch.bmm(q[:, None], self.q.mT)
            q = torch.baddbmm(q[:, None], share, self.q, alpha=-1)[:, 0]
            p = torch.baddbmm(p[:, None], share, self.p, alpha=-1)[:, 0]
            last, size = size, torch.linalg.vector_norm(q, dim=-1)
            if (size > 0.5 * last).all():  # little was taken away, so little is left
                break
        return p, q, size, before

    def reduce(self, x: Tensor, r: Tensor, last: int | None = None) -> tuple[Tensor, Tensor]:
        """Return x moved in the span of the p so that its residual r is orthogonal to all q.

        Args:
            x: `(batch, k, n)`.
            r: Its residual.
            last: Take no more than the last so many pairs; r is orthogonal to the others' q.
        """
        p, q = (self.p, self.q) if last is None else (self.p[:, -last:], self.q[:, -last:])
        share = torch.bmm(r, q.mT)
        return torch.baddbmm(x, share, p), torch.baddbmm(r, share, q, alpha=-1)

    def left(self, r: Tensor) -> Tensor:
        """Return the norms (batch, k) of what `reduce` would leave of r (batch, k, n)."""
        size = lambda v: torch.linalg.vector_norm(v, dim=-1)
        whole, share = size(r), size(torch.bmm(r, self.q.mT))
        return ((whole - share) * (whole + share)).clamp(min=0.0).sqrt()


def leading(r: Tensor, weights: Tensor) -> Tensor:
    """Return p (batch, n) of (G4), from residuals r (batch, k, n) and what they count for."""
    gram = (r @ r.mT) * weights[..., None] * weights[:, None]
    for _ in range(_SQUARINGS):
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        gram = gram / trace.clamp(min=least_norm(r))
        gram = gram @ gram
    largest = gram.diagonal(dim1=-2, dim2=-1).argmax(-1)[:, None, None]
    w = gram.take_along_dim(largest, 1)[:, 0].nan_to_num(0.0)
    return torch.bmm((w * weights)[:, None], r)[:, 0]
