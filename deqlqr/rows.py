"""Every sample's own rows of a Jacobian, W = C'J, kept small: products, and the Gram matrix W W'.

    (W1)  row of sample s and cotangent c:  W_sc = c' dy_s/du

A weight that a model uses once, at one position, has the rows g a' of (U1): only g and a are kept,
and their part of the Gram matrix is (a a') (g g'), entry by entry. Other parameters' rows are kept
as they are. Parameters that enter through others (a weight that is rescaled) get theirs by the
chain rule.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deqlqr._linalg import gram
from deqlqr.sensitivity import Sensitivity
from deqlqr.uses import Linear, MatMul, Use, leaves_of

_NARROW = 256  # entries below which rows of several parameters are joined for a product
FEW = 16  # entries up to which the Jacobian of a tensor made from parameters is formed


@dataclass(frozen=True)
class Outer:
    """Rows g a' of a weight.

    Attributes:
        a: `(batch, in)`.
        g: `(batch, r, out)`.
        transposed: The weight is (in, out), not (out, in).
    """

    a: Tensor
    g: Tensor
    transposed: bool

    @staticmethod
    def of(use: Linear, g: Tensor) -> "Outer":
        """Return the rows of a use at one position from its g (batch, r, out)."""
        return Outer(use.inputs()[:, 0], g, isinstance(use, MatMul))

    @staticmethod
    def width(use: Linear) -> int:
        """Return the size of what comes out of a use."""
        return use.operand.shape[1 if isinstance(use, MatMul) else 0]

    def gram(self) -> Tensor:
        """Return (a a')(g g'), `(batch r, batch r)`."""
        g = self.g.flatten(0, 1)
        count, r = self.g.shape[:2]
        both = (g @ g.mT).view(count, r, count, r)
        return (both * (self.a @ self.a.mT)[:, None, :, None]).view(count * r, count * r)

    def times(self, v: Tensor) -> Tensor:
        """Return W v (batch, r) for the weight's part v of a vector."""
        right = self.a @ self._matrix(v).mT
        return torch.einsum("bro,bo->br", self.g, right)

    def transpose_times(self, c: Tensor) -> Tensor:
        """Return W'c, flat, for c (batch, r)."""
        product = torch.einsum("br,bro->bo", c, self.g).mT @ self.a
        return (product.mT if self.transposed else product).reshape(-1)

    def _matrix(self, v: Tensor) -> Tensor:
        out, inside = self.g.shape[-1], self.a.shape[-1]
        return v.view(inside, out).mT if self.transposed else v.view(out, inside)

    def dense(self) -> Tensor:
        """Return W (batch, r, entries)."""
        outer = torch.einsum("bro,bi->broi", self.g, self.a)
        return (outer.mT if self.transposed else outer).flatten(2)

    def to(self, dtype: torch.dtype) -> "Outer":
        """Return the rows in another dtype."""
        return replace(self, a=self.a.to(dtype), g=self.g.to(dtype))

    def scaled(self, factor: Tensor) -> "Outer":
        """Return the rows times a factor (batch, r) each."""
        return replace(self, g=self.g * factor[..., None])

    def joined(self, others: "Sequence[Outer]") -> "Outer":
        """Return the rows of further samples below these."""
        every = [self, *others]
        return replace(self, a=torch.cat([o.a for o in every]), g=torch.cat([o.g for o in every]))


@dataclass(frozen=True)
class Plain:
    """Rows as they are, `(batch, r, entries)`."""

    rows: Tensor

    def times(self, v: Tensor) -> Tensor:
        """Return W v (batch, r)."""
        return self.rows @ v

    def transpose_times(self, c: Tensor) -> Tensor:
        """Return W'c for c (batch, r)."""
        return c.flatten() @ self.rows.flatten(0, 1)

    def dense(self) -> Tensor:
        """Return W."""
        return self.rows

    def to(self, dtype: torch.dtype) -> "Plain":
        """Return the rows in another dtype."""
        return Plain(self.rows.to(dtype))

    def scaled(self, factor: Tensor) -> "Plain":
        """Return the rows times a factor (batch, r) each."""
        return Plain(self.rows * factor[..., None])

    def joined(self, others: "Sequence[Plain]") -> "Plain":
        """Return the rows of further samples below these."""
        return Plain(torch.cat([self.rows, *(o.rows for o in others)]))


Part = Outer | Plain


@dataclass(frozen=True)
class Rows:
    """W of (W1), parameter by parameter.

    Attributes:
        parts: The rows of each parameter, in the order of the controls.
        count: Samples and cotangents, (batch, r).
    """

    parts: tuple[Part, ...]
    count: tuple[int, int]

    @staticmethod
    def of(at: Sensitivity, cotangents: Sequence[Tensor], tol: float | None = None) -> "Rows":
        """Form the rows of the cotangents, each (batch, k), one backward pass for each.

        Args:
            at: The model on a batch.
            cotangents: Of the outputs.
            tol: Relative residual of the adjoint solves; `None` takes the layers'.

        Returns:
            The rows.

        Raises:
            ValueError: If the model mixes the samples of a batch.
        """
        if at.mixing is not None:
            raise ValueError(
                f"model mixes the samples of a batch ({at.mixing} in training mode): single "
                "samples have no gradient. Call model.eval(), or take route='krylov'."
            )
        plan = _Plan(at)
        found = plan.pieces(at.cotangents_of_each(cotangents, tol))
        outer = {key: Outer.of(use, found.pop(key)) for key, use in plan.alone.items()}
        chained = plan.derived.chain(found)
        parts: list[Part] = []
        for p in at.controls.parameters:
            key = id(p)
            if key in outer:
                parts.append(outer[key])
                continue
            terms = [rows[key] for rows in (found, chained) if key in rows]
            none = p.new_zeros(1, 1, 1).expand(len(at.outputs), len(cotangents), p.numel())
            parts.append(Plain(sum(terms[1:], terms[0]) if terms else none))
        return Rows(tuple(parts), (len(at.outputs), len(cotangents)))

    @property
    def sizes(self) -> list[int]:
        """Entries of each parameter."""
        return [
            part.a.shape[-1] * part.g.shape[-1] if isinstance(part, Outer) else part.rows.shape[-1]
            for part in self.parts
        ]

    def to(self, dtype: torch.dtype) -> "Rows":
        """Return the rows in another dtype."""
        return replace(self, parts=tuple(part.to(dtype) for part in self.parts))

    def scaled(self, factor: Tensor) -> "Rows":
        """Return the rows times a factor (batch, r) each."""
        return replace(self, parts=tuple(part.scaled(factor) for part in self.parts))

    @staticmethod
    def joined(chunks: "Sequence[Rows]") -> "Rows":
        """Return the rows of several chunks of samples, one below the other."""
        first, *rest = chunks
        if not rest:
            return first
        parts = [
            own.joined(others)
            for own, *others in zip(*(chunk.parts for chunk in chunks), strict=True)
        ]
        return Rows(tuple(parts), (sum(chunk.count[0] for chunk in chunks), first.count[1]))

    def gram(self, places: Sequence[int] | None = None) -> Tensor:
        """Return W W' (batch r, batch r), of some parameters by their places, or of all."""
        chosen = self.parts if places is None else [self.parts[i] for i in places]
        plain = [part.rows.flatten(0, 1) for part in chosen if isinstance(part, Plain)]
        terms = [part.gram() for part in chosen if isinstance(part, Outer)]
        narrow = [W for W in plain if W.shape[1] < _NARROW]
        wide = [W for W in plain if W.shape[1] >= _NARROW]
        joined = [torch.cat(narrow, dim=1)] if narrow else []
        terms += [gram([*wide, *joined])] if plain else []
        return sum(terms[1:], terms[0])

    def times(self, v: Tensor) -> Tensor:
        """Return W v (batch, r) for v (m,)."""
        pieces = v.split(self.sizes)
        total = v.new_zeros(self.count)
        for part, piece in zip(self.parts, pieces, strict=True):
            total = total + part.times(piece)
        return total

    def transpose_times(self, c: Tensor) -> Tensor:
        """Return W'c (m,) for c (batch, r)."""
        return torch.cat([part.transpose_times(c) for part in self.parts])

    def dense(self) -> Tensor:
        """Return W (batch, r, m)."""
        return torch.cat([part.dense() for part in self.parts], dim=-1)


def rows_of_uses(
    at: Sensitivity, places: Sequence[int], found: Sequence[Tensor | None]
) -> dict[str, Tensor]:
    """Return what some uses bring to the rows of the parameters that they reach.

    Args:
        at: The model on a batch.
        places: The numbers of the uses.
        found: The cotangent of every use of the model.

    Returns:
        Rows `(batch, entries)` by the parameter's name.
    """
    direct: dict[int, Tensor] = {}
    for i in places:
        use, g = at.uses[i], found[i]
        size = len(at.outputs), use.operand.numel()
        part = at.outputs.new_zeros(size) if g is None else use.rows(g).reshape(size)
        key = id(use.operand)
        direct[key] = direct[key] + part if key in direct else part
    derived = _Derived(at, [at.uses[i] for i in places])
    chained = derived.chain({key: direct[key][:, None] for key in derived.operands})
    total = {}
    for name, p in zip(at.controls.names, at.controls.parameters, strict=True):
        terms = [direct[id(p)]] if id(p) in direct else []
        terms += [chained[id(p)][:, 0]] if id(p) in chained else []
        if terms:
            total[name] = sum(terms[1:], terms[0])
    return total


class _Plan:
    """Which uses bring the rows of which parameter.

    Attributes:
        uses_of: The numbers of the uses of each operand, by its id.
        derived: The operands that are made from parameters.
        alone: The use of an operand that has but one, at one position: its rows are g a'..
    """

    def __init__(self, at: Sensitivity) -> None:
        self.uses, self.batch = at.uses, len(at.outputs)
        self.uses_of: dict[int, list[int]] = defaultdict(list)
        for i, use in enumerate(at.uses):
            self.uses_of[id(use.operand)].append(i)
        direct = {id(p) for p in at.controls.parameters}
        self.derived = _Derived(at, at.uses)
        self.alone: dict[int, Linear] = {}
        for key, (first, *others) in self.uses_of.items():
            use = self.uses[first]
            only = not others and key in direct - self.derived.reached
            if only and isinstance(use, Linear) and use.a.dim() == 2:
                self.alone[key] = use

    def pieces(self, found: Sequence[Sequence[Tensor | None]]) -> dict[int, Tensor]:
        """Return g (batch, r, out) of each operand used alone, else its rows (batch, r, entries).

        Args:
            found: The cotangent of every use, for each of r cotangents of the outputs.
        """
        result, count = {}, (self.batch, len(found))
        for key, places in self.uses_of.items():
            seen = [(self.uses[i], gs) for i in places if (gs := _of_use(found, i))]
            if key in self.alone:
                terms = [torch.stack(gs, 1) for _, gs in seen]
                width = Outer.width(self.alone[key])
            else:
                terms = [use.rows_of_each(gs).reshape(*count, -1) for use, gs in seen]
                width = self.uses[places[0]].operand.numel()
            zero = self.uses[places[0]].operand.new_zeros(*count, width)
            result[key] = sum(terms[1:], terms[0]) if terms else zero
        return result


def _of_use(found: Sequence[Sequence[Tensor | None]], i: int) -> list[Tensor]:
    """Return the cotangents of a use, none if all are without effect."""
    gs = [every[i] for every in found]
    like = next((g for g in gs if g is not None), None)
    return [] if like is None else [torch.zeros_like(like) if g is None else g for g in gs]


class _Derived:
    """The tensors made from parameters that a model uses, and the chain rule through them."""

    def __init__(self, at: Sensitivity, uses: Sequence[Use]) -> None:
        self.parameters = at.controls.parameters
        direct = {id(p) for p in self.parameters}
        self.operands: dict[int, Tensor] = {
            id(use.operand): use.operand for use in uses if id(use.operand) not in direct
        }
        self.reached: set[int] = set()
        for operand in self.operands.values():
            self.reached |= {id(leaf) for leaf in leaves_of(operand)} & direct

    def chain(self, rows: dict[int, Tensor]) -> dict[int, Tensor]:
        """Return rows (batch, r, entries) of parameters from those of what is made from them."""
        total: dict[int, Tensor] = {}
        for key, operand in self.operands.items():
            for p, part in self._through(operand, rows[key]):
                total[id(p)] = total[id(p)] + part if id(p) in total else part
        return total

    def _through(self, operand: Tensor, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        flat = rows.reshape(-1, *operand.shape)
        few = operand.numel() < min(FEW, len(flat))
        if few:
            size = operand.numel()
            weights = torch.eye(size, dtype=rows.dtype, device=rows.device)
            weights = weights.view(size, *operand.shape)
        else:
            weights = flat
        batched = len(weights) != 1  # at a price, which one number does not pay
        grads = torch.autograd.grad(
            operand, self.parameters, weights if batched else weights[0], retain_graph=True,
            allow_unused=True, is_grads_batched=batched,
        )  # fmt: skip
        if not batched:
            grads = tuple(None if grad is None else grad[None] for grad in grads)
        found: list[tuple[Tensor, Tensor]] = []
        for p, grad in zip(self.parameters, grads, strict=True):
            if grad is not None:
                wide = grad.reshape(len(grad), -1)
                wide = flat.reshape(len(flat), -1) @ wide if few else wide
                found.append((p, wide.view(*rows.shape[:2], -1)))
        return found
