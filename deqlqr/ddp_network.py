"""What DDP finds out about a network once: its layers, and which parameters are whose."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deqlqr._linalg import all_finite
from deqlqr.controls import Controls
from deqlqr.ddp_base import Base, Full
from deqlqr.net_layers import NetLayers
from deqlqr.phases import PhaseMap, grouped, phases_of, through
from deqlqr.solution import ConvergenceError
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
        standard: All its modules are torch's own, whose derivatives `torch.vmap` takes.
    """

    model: nn.Module
    layers: Callable[[], Sequence[PhaseMap]]
    shapes: Sequence[StateShape]
    controls: Controls
    own: Sequence[Sequence[int]]
    parts: Sequence[Controls]
    places: Sequence[Tensor]
    standard: bool

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
        standard = all(type(m).__module__.startswith("torch.nn.modules.") for m in model.modules())
        shapes = net.shapes[:-1]
        return Network(model, chain.phases, shapes, controls, own, parts, places, standard)

    def joined(self, layers: Sequence[Tensor | None]) -> Tensor:
        """Return u (m,) from the entries of each layer; `None` for one without parameters."""
        pieces: dict[int, Tensor] = {}
        for part, own, u in zip(self.parts, self.own, layers, strict=True):
            if u is not None:
                pieces |= zip(own, u.split(part.sizes), strict=True)
        return torch.cat([pieces[i] for i in range(len(pieces))])


class _Groups:
    """The phases of a plain `nn.Sequential`, without those of its subclasses' detours."""

    def __init__(self, model: nn.Sequential) -> None:
        self._groups = grouped(model)

    def phases(self) -> list[PhaseMap]:
        """Return the functions state -> state."""
        return [partial(through, group) for group in self._groups]


class Known:
    """What is known of a model, found out anew where it has changed.

    Args:
        model: The model.
        base: Full DDP looks at the layers of every batch.

    Attributes:
        full: Whether that is the base.
    """

    def __init__(self, model: nn.Module, base: Base) -> None:
        self._model, self._base = model, base
        self.full = isinstance(base, Full)
        self._found: tuple[Any, Network] | None = None  # and what it was found out for

    def at(self, x: Tensor, controls: Controls) -> tuple[Network, NetLayers | None]:
        """Return the network, and its layers on x where they were looked at.

        Raises:
            ValueError: If a parameter acts in several layers, or the model has no layers.
            ConvergenceError: If parameters are not finite.
        """
        modes = tuple(module.training for module in self._model.modules())
        key = (x.shape[1:] if isinstance(x, Tensor) else None, controls, modes)
        if not self.full and self._found is not None and self._found[0] == key:
            return self._found[1], None
        if not all_finite(self._model.parameters()):
            raise ConvergenceError("the parameters are not finite.")
        net = NetLayers(self._model, x)
        if isinstance(self._base, Full) and max(net.sizes) * len(x) > self._base.max_states:
            raise ValueError(
                f"x: {len(x)} samples of up to {max(net.sizes)} states are too many for full DDP, "
                f"which takes {self._base.max_states} in all (Full(max_states=...)). Take a "
                "smaller batch, or base 'sgd', 'rmsprop' or 'ekfac'."
            )
        self._found = key, Network.of(net)
        return self._found[1], net
