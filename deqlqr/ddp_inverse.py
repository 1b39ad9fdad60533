"""Q_uu^-1 of a layer in batch DDP, as an operator D, and its products with the layer's rows."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deqlqr.controls import Controls
from deqlqr.ddp_rows import Affine, LayerRows, plain_gram
from deqlqr.kronecker import Block, KroneckerMetric
from deqlqr.rows import Outer, Part, Plain
from deqlqr.sites import Member


class Inverse:
    """D, a layer's Q_uu^-1, beside the rows G' of the layer, whose form its vectors have."""

    rows: LayerRows

    @abstractmethod
    def times(self, v: Tensor) -> Tensor:
        """Return D v for v `(*, out, columns)` or `(*, m)`."""

    @abstractmethod
    def gram(self, whole: bool) -> Tensor:
        """Return N of (DD2).

        Args:
            whole: Between all samples, `(1, batch r, batch r)`; else within each, `(batch, r, r)`.
        """

    def project(self, q: Tensor) -> Tensor:
        """Return G'D q `(batch, r)`."""
        return self.rows.times(self.times(q))

    def spread(self, c: Tensor) -> Tensor:
        """Return D G c for c `(batch, r)`."""
        return self.times(self.rows.transpose_times(c))

    def inner(self, c: Tensor) -> Tensor:
        """Return N c `(batch, r)` for c `(batch, r)`."""
        return self.rows.times(self.spread(c))

    def trace(self) -> Tensor:
        """Return the sum of the eigenvalues of N between all samples."""
        return self.gram(False).diagonal(dim1=-2, dim2=-1).sum()


@dataclass(frozen=True)
class Diagonal(Inverse):
    """A diagonal D.

    Attributes:
        rows: G'.
        d: One number for all, or of the form of the rows' vectors.
    """

    rows: LayerRows
    d: Tensor

    def times(self, v: Tensor) -> Tensor:
        """Return D v."""
        return self.d * v

    def gram(self, whole: bool) -> Tensor:
        """Return N of (DD2)."""
        return self.rows.gram(self.d, whole)


class Turned(Inverse):
    """A D that is diagonal in the eigenvectors of one Kronecker product (K5).

    Args:
        rows: G'.
        d: Its entries there, `(out, columns)`.
        basis: U_G and U_A.
    """

    def __init__(self, rows: Affine, d: Tensor, basis: tuple[Tensor, Tensor]) -> None:
        self.rows: LayerRows = rows
        self._basis, self._there = basis, Diagonal(rows.turned(basis), d)

    def times(self, v: Tensor) -> Tensor:
        """Return D v."""
        return self._back(self._there.times(self._to(v)))

    def gram(self, whole: bool) -> Tensor:
        """Return N of (DD2)."""
        return self._there.gram(whole)

    def project(self, q: Tensor) -> Tensor:
        """Return G'D q."""
        return self._there.project(self._to(q))

    def spread(self, c: Tensor) -> Tensor:
        """Return D G c."""
        return self._back(self._there.spread(c))

    def inner(self, c: Tensor) -> Tensor:
        """Return N c."""
        return self._there.inner(c)

    def _to(self, v: Tensor) -> Tensor:
        return self._basis[0].mT @ v @ self._basis[1]

    def _back(self, v: Tensor) -> Tensor:
        return self._basis[0] @ v @ self._basis[1].mT


def kronecker_inverse(
    rows: LayerRows,
    controls: Controls,
    where: Tensor,
    metric: KroneckerMetric,
    blocks: Mapping[str, Block],
    delta: float,
    lr: float,
) -> Inverse:
    """Return lr (U diag(s) U' + delta I)^-1 of a layer (DD1).

    What of (K6) reaches beyond the layer, the numbers made from parameters, is left out.

    Args:
        rows: G'.
        controls: The layer's parameters.
        where: Their entries in u, `(m,)`.
        metric: The metric.
        blocks: Its blocks, by the name of every parameter in them.
        delta: Damping.
        lr: Learning rate.
    """
    block = blocks.get(controls.names[0])
    if isinstance(rows, Affine) and block is not None and block.basis is not None:
        named = controls.names[:: -1 if rows.weight else 1]
        if [member.name for member in block.members] == named:
            return Turned(rows, lr / (block.spectrum + delta), block.basis)
    return KroneckerInverse(rows, controls, where, metric, delta, lr)


class KroneckerInverse(Inverse):
    """That of `kronecker_inverse` for a layer of any blocks.

    Args:
        rows: G'.
        controls: The layer's parameters.
        where: Their entries in u, `(m,)`.
        metric: The metric.
        delta: Damping.
        lr: Learning rate.
    """

    def __init__(
        self,
        rows: LayerRows,
        controls: Controls,
        where: Tensor,
        metric: KroneckerMetric,
        delta: float,
        lr: float,
    ) -> None:
        self.rows = rows
        self._sizes, self._names, self._lr = controls.sizes, controls.names, lr
        self._blocks = [
            (block, lr / (block.spectrum + delta)) for block in metric._blocks
            if any(member.name in self._names for member in block.members)
        ]  # fmt: skip
        covered = {member.name for block, _ in self._blocks for member in block.members}
        self._others, self._delta = [n for n in self._names if n not in covered], delta
        self._small, self._inverse = self._joint(where, metric)
        self._none = metric.gradient

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
        v = self.rows.flat(v)
        named = dict(zip(self._names, v.split(self._sizes, dim=-1), strict=True))
        found = {name: named[name] * (self._lr / self._delta) for name in self._others}
        for block, d in self._blocks:
            found |= _values(block, d * _coordinates(block, named))
        x = torch.cat([found[name] for name in self._names], dim=-1)
        if self._inverse is not None:
            x = x.index_copy(-1, self._small, v[..., self._small] @ self._inverse)
        return self.rows.matrix(x)

    def gram(self, whole: bool) -> Tensor:
        """Return N of (DD2)."""
        batch, r = self.rows.count
        parts = dict(zip(self._names, self.rows.parts, strict=True))
        terms = [self._block_gram(block, d, parts, whole) for block, d in self._blocks]
        if self._inverse is not None:
            dense = torch.cat([parts[name].dense() for name in self._names], -1)
            w = dense[..., self._small]
            w = w.reshape(1, -1, w.shape[-1]) if whole else w
            terms.append(w @ self._inverse @ w.mT)
        shape = (1, batch * r, batch * r) if whole else (batch, r, r)
        return sum(terms, self._none.new_zeros(shape))

    @staticmethod
    def _block_gram(block: Block, d: Tensor, parts: dict[str, Part], whole: bool) -> Tensor:
        merged = _merged(block, parts)
        if merged is not None and block.basis is not None:
            a, g = merged
            U_G, U_A = block.basis
            return Affine(a @ U_A, g @ U_G, g[:, 0], 0, False, False).gram(d, whole)
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
