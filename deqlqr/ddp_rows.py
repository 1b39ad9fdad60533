"""The rows G' of one layer in DDP's recursion (DD6), with the gradient of the loss beside them.

A layer that is one weight W, used once on vectors, and perhaps its bias has the rows g [a 1]' of
(W1), of the shape of [W b]: what is said of its parameters is said by matrices `(out, columns)`.
Other layers' rows are kept parameter by parameter, and vectors of their parameters are flat.

    (DD2)  N = G'D G,   N_(sc)(s'c') = sum_ij g_sci g_s'c'i a_sj a_s'j d_ij   for a diagonal D

Where d_ij is one number, the sums over i and j part, and N is the product of two small Gram
matrices, entry by entry. In the basis of a damped Kronecker-factored metric it is one number, to
rounding, in all columns j but a few: 1 / damping.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deqlqr.rows import Outer, Part, Plain, Rows

_LARGE = 8e6  # products of numbers in (DD2), from which a look at d is worth its time
_ROUNDING = 8  # units by which numbers that are taken for one may differ


@dataclass(frozen=True)
class Affine:
    """Rows g a' of a weight and its bias together.

    Attributes:
        a: What goes in, with a column of ones for a bias, `(batch, columns)`.
        g: Cotangents of what comes out, `(batch, r, out)`.
        p: That of the loss, `(batch, out)`.
        weight: Place of the weight among the layer's parameters.
        transposed: The weight is (in, out), not (out, in).
        bias: Whether there is one, the other parameter.
    """

    a: Tensor
    g: Tensor
    p: Tensor
    weight: int
    transposed: bool
    bias: bool

    @property
    def count(self) -> tuple[int, int]:
        """Samples and cotangents, (batch, r)."""
        return self.g.shape[0], self.g.shape[1]

    @property
    def size(self) -> int:
        """Number m of parameters."""
        return self.g.shape[-1] * self.a.shape[-1]

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and device."""
        return self.g

    @property
    def parts(self) -> tuple[Part, ...]:
        """The rows of each parameter."""
        a = self.a[:, :-1] if self.bias else self.a
        found: list[Part] = [Plain(self.g)] if self.bias else []
        found.insert(self.weight, Outer(a, self.g, self.transposed))
        return tuple(found)

    def gradient(self, xi: Tensor | None) -> Tensor:
        """Return g - G xi of (DD6), `(out, columns)`, for xi `(batch, r)`; `None` is 0."""
        w = self.p if xi is None else self.p - (xi[:, None] @ self.g)[:, 0]
        return w.mT @ self.a

    def matrix(self, u: Tensor) -> Tensor:
        """Return a vector of the layer's parameters `(*, m)` as `(*, out, columns)`."""
        out, columns = self.g.shape[-1], self.a.shape[-1] - self.bias
        first, other = 0 if self.weight == 0 else out, out * columns if self.weight == 0 else 0
        W = u[..., first : first + out * columns]
        W = W.unflatten(-1, (columns, out)).mT if self.transposed else W.unflatten(-1, (out, -1))
        return torch.cat([W, u[..., other : other + out, None]], -1) if self.bias else W

    def flat(self, q: Tensor) -> Tensor:
        """Return `(*, out, columns)` as a vector of the layer's parameters, `(*, m)`."""
        W = q[..., :-1] if self.bias else q
        W = (W.mT if self.transposed else W).flatten(-2)
        if not self.bias:
            return W
        b = q[..., -1]
        return torch.cat([W, b] if self.weight == 0 else [b, W], -1)

    def times(self, q: Tensor) -> Tensor:
        """Return G'q `(batch, r)` for q `(out, columns)`."""
        return (self.g @ (self.a @ q.mT)[..., None])[..., 0]

    def transpose_times(self, c: Tensor) -> Tensor:
        """Return G c `(out, columns)` for c `(batch, r)`."""
        return (c[:, None] @ self.g)[:, 0].mT @ self.a

    def gram(self, d: Tensor, whole: bool) -> Tensor:
        """Return (DD2) for d, one number or `(out, columns)`.

        Args:
            d: The diagonal.
            whole: Between all samples, `(1, batch r, batch r)`; else within each, `(batch, r, r)`.
        """
        a, g, (batch, r, out) = self.a, self.g, self.g.shape
        if whole and d.dim() and batch**2 * self.size > _LARGE:
            number = d.amax()
            equal = d.amin(0) >= (1 - _ROUNDING * torch.finfo(d.dtype).eps) * number
            same, others = equal.nonzero()[:, 0], (~equal).nonzero()[:, 0]
            if len(same) > len(others):
                N = replace(self, a=a[:, same]).gram(number, whole)
                few = replace(self, a=a[:, others])
                return N + few.gram(d[:, others], whole) if len(others) else N
        if not whole and d.dim() == 0:
            return (g * (d * a.square().sum(-1))[:, None, None]) @ g.mT
        if not whole:
            return (g * (a.square() @ d.mT)[:, None]) @ g.mT
        if d.dim() == 0:
            N = (g.flatten(0, 1) @ g.flatten(0, 1).mT).view(batch, r, batch, r)
            N = N * (d * (a @ a.mT))[:, None, :, None]
            return N.view(1, batch * r, batch * r)
        if r == 1 and 2 * self.size < batch * (a.shape[1] + 2 * out):  # fewer numbers on the way
            rows = g.mT * a[:, None]  # (batch, out, columns)
            return plain_gram(rows.view(batch, 1, -1), d.reshape(-1), whole)
        pairs = ((a[:, None] * a).flatten(0, 1) @ d.mT).view(batch, batch, 1, out)
        # For each sample s' those of all s, in one product.
        N = (pairs * g).view(batch, batch * r, out) @ g.mT
        return N.transpose(0, 1).reshape(1, batch * r, batch * r)

    def turned(self, basis: tuple[Tensor, Tensor]) -> "Affine":
        """Return the rows in the eigenvectors U_G, U_A of (K5), those of p left out."""
        U_G, U_A = basis
        return replace(self, a=self.a @ U_A, g=self.g @ U_G)

    def dense(self) -> Tensor:
        """Return G' `(batch, r, m)`."""
        return self.flat(self.g[..., None] * self.a[:, None, None])


@dataclass(frozen=True)
class General:
    """Rows of any layer.

    Attributes:
        rows: Those of each parameter.
        g: Gradient of the loss, `(m,)`.
    """

    rows: Rows
    g: Tensor

    @property
    def count(self) -> tuple[int, int]:
        """Samples and cotangents, (batch, r)."""
        return self.rows.count

    @property
    def size(self) -> int:
        """Number m of parameters."""
        return len(self.g)

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and device."""
        return self.g

    @property
    def parts(self) -> tuple[Part, ...]:
        """The rows of each parameter."""
        return self.rows.parts

    def gradient(self, xi: Tensor | None) -> Tensor:
        """Return g - G xi of (DD6), `(m,)`."""
        return self.g if xi is None else self.g - self.rows.transpose_times(xi)

    def matrix(self, u: Tensor) -> Tensor:
        """Return u."""
        return u

    def flat(self, q: Tensor) -> Tensor:
        """Return q."""
        return q

    def times(self, q: Tensor) -> Tensor:
        """Return G'q `(batch, r)` for q `(m,)`."""
        return self.rows.times(q)

    def transpose_times(self, c: Tensor) -> Tensor:
        """Return G c `(m,)` for c `(batch, r)`."""
        return self.rows.transpose_times(c)

    def gram(self, d: Tensor, whole: bool) -> Tensor:
        """Return (DD2) for d, one number or `(m,)`."""
        parts, sizes = self.parts, self.rows.sizes
        weights = d.split(sizes) if d.dim() else [d] * len(parts)
        terms = [_gram(part, w, whole) for part, w in zip(parts, weights, strict=True)]
        return sum(terms[1:], terms[0])

    def dense(self) -> Tensor:
        """Return G' `(batch, r, m)`."""
        return self.rows.dense()


LayerRows = Affine | General


def _gram(part: Part, d: Tensor, whole: bool) -> Tensor:
    if isinstance(part, Plain):
        return plain_gram(part.rows, d, whole)
    alone = Affine(part.a, part.g, part.g[:, 0], 0, part.transposed, False)
    return alone.gram(alone.matrix(d) if d.dim() else d, whole)


def plain_gram(rows: Tensor, d: Tensor, whole: bool) -> Tensor:
    """Return (DD2) for rows `(batch, r, m)` and d, one number or `(m,)`."""
    flat = rows.reshape(1, -1, rows.shape[-1]) if whole else rows
    return (flat * d) @ flat.mT
