"""A network on a batch as a trajectory: its layers, the states between them, their cotangents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deqlqr.controls import Controls
from deqlqr.net_layers import NetLayers
from deqlqr.phases import PhaseMap, _grouped, _through, phases_of
from deqlqr.rows import Rows
from deqlqr.sensitivity import Sensitivity
from deqlqr.state import StateShape


@dataclass(frozen=True)
class Network:
    """What is found out once about a network.

    Attributes:
        model: The model.
        layers: Returns its layers, functions state -> state.
        shapes: Of what enters each layer.
        controls: The parameters that have an effect.
        own: Numbers of those of each layer.
        parts: Those of each layer.
        places: Their entries in u.
    """

    model: nn.Module
    layers: Callable[[], Sequence[PhaseMap]]
    shapes: Sequence[StateShape]
    controls: Controls
    own: Sequence[Sequence[int]]
    parts: Sequence[Controls]
    places: Sequence[Tensor]

    @staticmethod
    def of(net: NetLayers) -> "Network":
        """Return what there is to know.

        Raises:
            ValueError: If a parameter acts in several layers.
        """
        used = [i for some in net.used for i in some]
        twice = sorted({net.controls.names[i] for i in used if used.count(i) > 1})
        if twice:
            raise ValueError(
                f"model must have each parameter in one layer only, got {', '.join(twice)} in more."
            )
        place = {i: j for j, i in enumerate(sorted(used))}
        own = [[place[i] for i in some] for some in net.used[1:]]
        controls, model = net.controls.part(sorted(used)), net.model
        chain = _Groups(model) if type(model) is nn.Sequential else phases_of(model, net.x, (), {})
        entries = torch.arange(controls.m, device=net.x.device).split(controls.sizes)
        places = [torch.cat([entries[0][:0], *(entries[i] for i in some)]) for some in own]
        parts = [controls.part(some) for some in own]
        return Network(model, chain.phases, net._shapes[:-1], controls, own, parts, places)


class _Groups:
    """The phases of a plain `nn.Sequential`, without those of its subclasses' detours."""

    def __init__(self, model: nn.Sequential) -> None:
        self._groups = _grouped(model)

    def phases(self) -> list[PhaseMap]:
        """Return the functions state -> state."""
        return [partial(_through, group) for group in self._groups]


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
        self._inner, self._seen = walker.states[1:], list[Sequence[Tensor | None]]()
        self.states = [state.detach() for state in walker.states]

    def cotangents(self, c: Tensor) -> list[Tensor | None]:
        """Return g of every use; those of the states are kept for `factors`."""
        places: list[Any] = [*(use.edge for use in self.uses), *self._inner]
        found = torch.autograd.grad(
            self._y, places, c.to(self._y.dtype), retain_graph=True, allow_unused=True
        )
        self._seen.append(found[len(self.uses) :])
        return list(found[: len(self.uses)])

    def factors(self, cotangents: Sequence[Tensor]) -> tuple[Rows, list[Tensor]]:
        """Return the rows of cotangents, each (batch, k), and C_t of (DD6).

        Args:
            cotangents: Of the outputs, r of them.

        Returns:
            G' of all parameters, and C of what enters each layer but the first,
            `(batch, n_t, r)`.

        Raises:
            ValueError: If single samples have no gradient.
        """
        if self.mixing is not None:
            raise ValueError(
                f"model mixes the samples of a batch ({self.mixing} in training mode), so that "
                "they have no feedback of their own: call model.eval()."
            )
        self._seen = []
        rows, C = Rows.of(self, cotangents), []
        for t, state in enumerate(self.states[1:]):
            parts = [seen[t] for seen in self._seen]
            C.append(torch.stack([torch.zeros_like(state) if g is None else g for g in parts], -1))
        return rows, C


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
    _rows: list[tuple[Rows, list[Tensor], Tensor]] = field(default_factory=list)

    def rows(
        self, cotangents: Callable[[Tensor], Sequence[Tensor]]
    ) -> tuple[Rows, list[Tensor], Tensor]:
        """Return G', C and g of (DD6); computed once."""
        at = self.trajectory
        assert at is not None  # noqa: S101
        if not self._rows:
            self._rows.append((*at.factors(cotangents(at.outputs)), at.pull(self.V_X)))
        return self._rows[0]
