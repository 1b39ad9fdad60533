"""A network on a batch as a trajectory: the states between its layers, and their cotangents."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deqlqr.controls import Controls
from deqlqr.ddp_network import Network
from deqlqr.ddp_rows import Affine, General, LayerRows
from deqlqr.net_layers import NetLayers
from deqlqr.rows import Outer, Rows
from deqlqr.sensitivity import Sensitivity
from deqlqr.uses import Linear, MatMul, Shift, leaves_of

_MANY = 3  # cotangents from which on one pass for all of them is faster than one for each


class _Walker(nn.Module):
    """Runs a network layer by layer and keeps the states."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.model, self._network = network.model, network
        self.states: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        value: Any = x
        self.states = []
        for layer, shape in zip(self._network.layers(), self._network.shapes, strict=True):
            if len(shape.shapes) == 1 and len(shape.shapes[0]) == 1:
                flat = value if shape.single else value[0]
            else:
                flat = shape.flatten(value)
                value = shape.unflatten(flat)
            self.states.append(flat)
            value = layer(value)
        return value


class Trajectory(Sensitivity):
    """A network on a batch, with the states between its layers in the graph.

    Attributes:
        states: What enters each layer, `(batch, n_t)`, detached.
    """

    def __init__(self, network: Network, x: Tensor) -> None:
        walker = _Walker(network)
        super().__init__(walker, network.controls, x)
        self._network, self._inner = network, walker.states[1:]
        self._columns: list[Tensor] = []
        self.states = [state.detach() for state in walker.states]

    def cotangents_of_each(
        self, cs: Sequence[Tensor], tol: float | None = None
    ) -> list[list[Tensor | None]]:
        """Return g of every use for each c."""
        known = {id(c): j for j, c in enumerate(self._columns)}  # those of `factors`
        if not all(id(c) in known for c in cs):
            return super().cotangents_of_each(cs, tol)
        return [[None if g is None else g[:, known[id(c)]] for g in self._g] for c in cs]

    def factors(
        self, cotangents: Sequence[Tensor], V_X: Tensor
    ) -> tuple[list[LayerRows | None], list[Tensor]]:
        """Return the rows and the gradient of each layer, and C_t of (DD6).

        Args:
            cotangents: Of the outputs, r of them, each (batch, k).
            V_X: That of the loss.

        Returns:
            G' of each layer, `None` for one without parameters, and C' of what enters each layer
            but the first, `(batch, r, n_t)`.

        Raises:
            ValueError: If single samples have no gradient.
        """
        if self.mixing is not None:
            raise ValueError(
                f"model mixes the samples of a batch ({self.mixing} in training mode), so that "
                "they have no feedback of their own: call model.eval()."
            )
        last, once = super().cotangents(V_X), self._used_once()
        self._columns = list(cotangents)
        self._g, C = self._pulled_back()
        layers: list[LayerRows | None] = [None] * len(self._network.parts)
        others = []
        for t, part in enumerate(self._network.parts):
            numbers = [once.get(id(p), -1) for p in part.parameters]
            weight = self._weight(numbers)
            if weight is not None:
                layers[t] = self._affine(numbers, weight, last)
            elif numbers:
                others.append(t)
        if others:
            rows, g = Rows.of(self, cotangents), self.pull(V_X).split(self.controls.sizes)
            for t in others:
                own = self._network.own[t]
                some = Rows(tuple(rows.parts[i] for i in own), rows.count)
                layers[t] = General(some, torch.cat([g[i] for i in own]))
        return layers, C

    def _pulled_back(self) -> tuple[list[Tensor | None], list[Tensor]]:
        """Return the columns' g of every use and C' of every inner state, `(batch, r, ...)`."""
        places: list[Any] = [*(use.edge for use in self.uses), *self._inner]
        pull = partial(
            torch.autograd.grad, self._y, places, retain_graph=True, allow_unused=True
        )  # fmt: skip
        columns = [c.to(self._y.dtype) for c in self._columns]
        if len(columns) >= _MANY and self._network.standard:
            found = pull(torch.stack(columns), is_grads_batched=True)
            wide: list[Tensor | None] = [
                None if g is None else g.transpose(0, 1).contiguous() for g in found
            ]
        else:
            each = zip(*(pull(c) for c in columns), strict=True)
            wide = [None if gs[0] is None else torch.stack(gs, 1) for gs in each]
        kinds = [use.operand.dtype for use in self.uses]
        g = [v if v is None else v.to(kind) for v, kind in zip(wide, kinds, strict=False)]
        none = lambda state: state.new_zeros(len(state), len(columns), *state.shape[1:])
        inner = zip(wide[len(kinds) :], self.states[1:], strict=True)
        return g, [none(state) if v is None else v for v, state in inner]

    def _used_once(self) -> dict[int, int]:
        """Return the number of the one use of each tensor that is used once, by its id."""
        times = Counter(id(use.operand) for use in self.uses)
        for use in self.uses:
            if use.operand.grad_fn is not None:  # the leaves it is made from are used here too
                times.update(id(leaf) for leaf in leaves_of(use.operand))
        numbers = {id(use.operand): i for i, use in enumerate(self.uses)}
        return {key: i for key, i in numbers.items() if times[key] == 1}

    def _weight(self, numbers: Sequence[int]) -> int | None:
        """Return which parameter of a layer is its weight, if its rows are of the form `Affine`.

        Args:
            numbers: Of the one use of each parameter; -1 if there are several.
        """
        if -1 in numbers or not 1 <= len(numbers) <= 2:
            return None
        uses = [self.uses[i] for i in numbers]
        for place, use in enumerate(uses):
            if isinstance(use, Linear) and use.a.dim() == 2:
                rest = uses[:place] + uses[place + 1 :]
                fits = all(isinstance(o, Shift) and o.edge == use.edge for o in rest)
                return place if fits else None
        return None

    def _affine(self, numbers: Sequence[int], weight: int, last: Sequence[Tensor | None]) -> Affine:
        """Return the rows of a layer.

        Args:
            numbers: Of the one use of each parameter.
            weight: Which of them is the weight's.
            last: Cotangents of every use, from V_X.
        """
        number, bias = numbers[weight], len(numbers) > 1
        use, g, p = self.uses[number], self._g[number], last[number]
        assert isinstance(use, Linear)  # noqa: S101  see `_weight`
        a = use.inputs()[:, 0]
        none = a.new_zeros(len(a), len(self._columns), Outer.width(use))
        g, p = none if g is None else g, none[:, 0] if p is None else p
        if bias:
            a = torch.cat([a, torch.ones_like(a[:, :1])], 1)
        return Affine(a, g, p, weight, isinstance(use, MatMul), bias)


@dataclass(frozen=True)
class Linearized:
    """A network on a batch.

    Attributes:
        network: The network.
        net: Its layers, for full DDP; `None` where they are known.
        trajectory: For the other bases.
        controls: The parameters.
        x: Inputs.
        y: Targets.
        loss: The mean loss.
        V_X: Its gradient in the outputs, `(batch, k)`.
    """

    network: Network
    net: NetLayers | None
    trajectory: Trajectory | None
    controls: Controls
    x: Tensor
    y: Tensor
    loss: float
    V_X: Tensor
    _rows: list[tuple[list[LayerRows | None], list[Tensor]]] = field(default_factory=list)

    def rows(
        self, cotangents: Callable[[Tensor], Sequence[Tensor]]
    ) -> tuple[list[LayerRows | None], list[Tensor]]:
        """Return G' and g of each layer, and C' of (DD6); computed once."""
        at = self.trajectory
        assert at is not None  # noqa: S101
        if not self._rows:
            self._rows.append(at.factors(cotangents(at.outputs), self.V_X))
        return self._rows[0]
