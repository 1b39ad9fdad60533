"""Q_uu^-1 of a layer in batch DDP, as an operator D, and its products with single samples' rows.

With the rows g a' of a weight (W1), d the entries of D in the eigenvectors of the layer (the unit
vectors for a diagonal D), and a, g turned into them,

    (DD2)  N = G'D G,   N_(sc)(s'c') = sum_ij g_sci g_s'c'i a_sj a_s'j d_ij
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from deqlqr.controls import Controls
from deqlqr.kronecker import Block, KroneckerMetric
from deqlqr.rows import Outer, Part, Plain, Rows
from deqlqr.sites import Member


class Inverse:
    """D, a layer's Q_uu^-1."""

    @abstractmethod
    def times(self, v: Tensor) -> Tensor:
        """Return D v for v `(*, m)`."""

    @abstractmethod
    def gram(self, rows: Rows, whole: bool) -> Tensor:
        """Return N of (DD2).

        Args:
            rows: G', of batch x r rows.
            whole: Between all samples, `(1, batch r, batch r)`; else within each, `(batch, r, r)`.
        """

    def project(self, rows: Rows, v: Tensor) -> Tensor:
        """Return G'D v `(batch, r)` for v `(m,)`."""
        return rows.times(self.times(v))

    def spread(self, rows: Rows, c: Tensor) -> Tensor:
        """Return D G c `(m,)` for c `(batch, r)`."""
        return self.times(rows.transpose_times(c))


@dataclass(frozen=True)
class Diagonal(Inverse):
    """A diagonal D.

    Attributes:
        d: `(m,)`, or one number for all.
    """

    d: Tensor

    def times(self, v: Tensor) -> Tensor:
        """Return D v."""
        return self.d * v

    def gram(self, rows: Rows, whole: bool) -> Tensor:
        """Return N of (DD2)."""
        if self.d.dim() == 0 and whole:
            return self.d * rows.gram()[None]
        weights = self.d.expand(sum(rows.sizes)).split(rows.sizes)
        parts = [_gram(part, d, whole) for part, d in zip(rows.parts, weights, strict=True)]
        return sum(parts[1:], parts[0])


def _gram(part: Part, d: Tensor, whole: bool) -> Tensor:
    if isinstance(part, Plain):
        return plain_gram(part.rows, d, whole)
    out, inside = part.g.shape[-1], part.a.shape[-1]
    d = d.view(inside, out).mT if part.transposed else d.view(out, inside)
    return outer_gram(part.a, part.g, d, whole)


def plain_gram(rows: Tensor, d: Tensor, whole: bool) -> Tensor:
    """Return N of rows `(batch, r, m)` and d `(m,)`."""
    flat = rows.reshape(1, -1, rows.shape[-1]) if whole else rows
    return (flat * d) @ flat.mT


def outer_gram(a: Tensor, g: Tensor, d: Tensor, whole: bool) -> Tensor:
    """Return N of rows g a' (DD2), a `(batch, in)`, g `(batch, r, out)`, d `(out, in)`."""
    if not whole:
        return (g * (a.square() @ d.mT)[:, None]) @ g.mT
    batch, r, out = g.shape
    pairs = (a[:, None] * a).view(batch * batch, -1) @ d.mT
    wide = (g[:, None] * pairs.view(batch, batch, 1, out)) @ g.mT  # (s, s', r, r)
    return wide.transpose(1, 2).reshape(1, batch * r, batch * r)


class KroneckerInverse(Inverse):
    """lr (U diag(s) U' + delta I)^-1 of a layer (DD1).

    What of (K6) reaches beyond the layer, the numbers made from parameters, is left out.

    Args:
        controls: The layer's parameters.
        where: Their entries in u, `(m,)`.
        metric: The metric.
        delta: Damping.
        lr: Learning rate.
    """

    def __init__(
        self, controls: Controls, where: Tensor, metric: KroneckerMetric, delta: float, lr: float
    ) -> None:
        self._sizes, self._names, self._lr = controls.sizes, controls.names, lr
        self._blocks = [
            (block, lr / (block.spectrum + delta)) for block in metric._blocks
            if any(member.name in self._names for member in block.members)
        ]  # fmt: skip
        covered = {member.name for block, _ in self._blocks for member in block.members}
        self._others, self._delta = [n for n in self._names if n not in covered], delta
        self._small, self._inverse = self._joint(where, metric)
        self._none = metric.gradient
        self._last: tuple[Rows, tuple[Tensor, Tensor] | None] | None = None

    def _joint(self, where: Tensor, metric: KroneckerMetric) -> tuple[Tensor, Tensor | None]:
        """Return which entries lie in the block (K6), and its inverse."""
        joint = metric._joint
        if joint is None or not len(joint.places):
            return where[:0], None
        place = where.new_full((metric.controls.m,), -1)
        place[where] = torch.arange(len(where), device=where.device)
        local = place[joint.places]
        mine = (local >= 0).nonzero()[:, 0]
        if not len(mine):
            return where[:0], None
        M = joint.S[mine[:, None], mine]
        M = M + self._delta * torch.eye(len(mine), dtype=M.dtype, device=M.device)
        return local[mine], self._lr * torch.linalg.inv_ex(M).inverse

    def times(self, v: Tensor) -> Tensor:
        """Return D v."""
        named = dict(zip(self._names, v.split(self._sizes, dim=-1), strict=True))
        found = {name: named[name] * (self._lr / self._delta) for name in self._others}
        for block, d in self._blocks:
            found |= _values(block, d * _coordinates(block, named))
        x = torch.cat([found[name] for name in self._names], dim=-1)
        if self._inverse is not None:
            return x.index_copy(-1, self._small, v[..., self._small] @ self._inverse)
        return x

    def gram(self, rows: Rows, whole: bool) -> Tensor:
        """Return N of (DD2)."""
        turned = self._turned(rows)
        if turned is not None:
            return outer_gram(*turned, self._blocks[0][1], whole)
        parts = dict(zip(self._names, rows.parts, strict=True))
        terms = [self._block_gram(block, d, parts, whole) for block, d in self._blocks]
        if self._inverse is not None:
            dense = torch.cat([parts[name].dense() for name in self._names], -1)
            w = dense[..., self._small]
            w = w.reshape(1, -1, w.shape[-1]) if whole else w
            terms.append(w @ self._inverse @ w.mT)
        batch, r = rows.count
        shape = (1, batch * r, batch * r) if whole else (batch, r, r)
        return sum(terms, self._none.new_zeros(shape))

    def project(self, rows: Rows, v: Tensor) -> Tensor:
        """Return G'D v."""
        turned = self._turned(rows)
        if turned is None:
            return super().project(rows, v)
        (block, d), a, g = self._blocks[0], *turned
        named = dict(zip(self._names, v.split(self._sizes), strict=True))
        return ((g @ (d * _coordinates(block, named))) * a[:, None]).sum(-1)

    def spread(self, rows: Rows, c: Tensor) -> Tensor:
        """Return D G c."""
        turned = self._turned(rows)
        if turned is None:
            return super().spread(rows, c)
        (block, d), a, g = self._blocks[0], *turned
        found = _values(block, d * ((c[:, None] @ g)[:, 0].mT @ a))
        return torch.cat([found[name] for name in self._names])

    def _turned(self, rows: Rows) -> tuple[Tensor, Tensor] | None:
        """Return a and g of the rows in the eigenvectors, if the layer is one block of such."""
        if len(self._blocks) != 1 or len(self._blocks[0][0].members) != len(self._names):
            return None
        if self._last is None or self._last[0] is not rows:
            block, found = self._blocks[0][0], None
            merged = _merged(block, dict(zip(self._names, rows.parts, strict=True)))
            if merged is not None and block.basis is not None:
                found = merged[0] @ block.basis[1], merged[1] @ block.basis[0]
            self._last = rows, found
        return self._last[1]

    @staticmethod
    def _block_gram(block: Block, d: Tensor, parts: dict[str, Part], whole: bool) -> Tensor:
        merged = _merged(block, parts)
        if merged is not None and block.basis is not None:
            a, g = merged
            U_G, U_A = block.basis
            return outer_gram(a @ U_A, g @ U_G, d, whole)
        here = [member.name for member in block.members if member.name in parts]
        dense = _coordinates(block, {name: parts[name].dense() for name in here})
        shape = parts[here[0]].dense().shape[:2]
        return plain_gram(dense.reshape(*shape, -1), d.reshape(-1), whole)


def _merged(block: Block, parts: dict[str, Part]) -> tuple[Tensor, Tensor] | None:
    """Return [a 1] and g of a weight and its bias, or `None` where the rows are no such product."""
    found = [parts.get(member.name) for member in block.members]
    weight = found[0]
    if not isinstance(weight, Outer) or len(found) > 2:
        return None
    if len(found) == 1:
        return weight.a, weight.g
    bias = found[1]
    if not isinstance(bias, Plain) or not torch.equal(bias.rows, weight.g):
        return None
    return torch.cat([weight.a, torch.ones_like(weight.a[:, :1])], 1), weight.g


def _coordinates(block: Block, named: dict[str, Tensor]) -> Tensor:
    """Return U'v `(*, out, columns)`, or flat for a diagonal block, from values `(*, entries)`."""
    if block.basis is None:
        value = named[block.members[0].name]
        return value.view(*value.shape[:-1], *block.spectrum.shape)
    U_G, U_A = block.basis
    some = next(named[member.name] for member in block.members if member.name in named)
    columns = []
    for member in block.members:
        piece = named.get(member.name)
        if piece is None:  # the parameter is another layer's
            piece = some.new_zeros(*some.shape[:-1], member.shape.numel())
        columns.append(_matrix(member, piece))
    return U_G.mT @ torch.cat(columns, -1) @ U_A


def _matrix(member: Member, value: Tensor) -> Tensor:
    """Return `(*, out, columns)` from `(*, entries)`."""
    lead = value.shape[:-1]
    if member.stored == "in-out":
        return value.reshape(*lead, *member.shape).mT
    return value.reshape(*lead, -1, member.columns)


def _values(block: Block, c: Tensor) -> dict[str, Tensor]:
    """Return U c by name, flat."""
    if block.basis is None:
        return {block.members[0].name: c.flatten(-block.spectrum.dim())}
    U_G, U_A = block.basis
    pieces = (U_G @ c @ U_A.mT).split([member.columns for member in block.members], dim=-1)
    return {
        member.name: (piece.mT if member.stored == "in-out" else piece).flatten(-2)
        for member, piece in zip(block.members, pieces, strict=True)
    }
