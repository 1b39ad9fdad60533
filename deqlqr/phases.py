"""A block as a chain of phases, f = f_{p-1} o ... o f_0: what a cyclic LQR is made of.

A phase takes a state, a tensor (batch, ...) or a tuple of such, to the next; what is needed later,
as by a skip connection, it hands on in its state. So f(z, x) = z + g_1(g_0(z) + x) has the phases

    z -> (z, g_0(z) + x),      (z, y) -> z + g_1(y)

Source: thesis section 4.3.
"""

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from deqlqr.state import StateShape

PhaseMap = Callable[[Any], Any]  # state -> state


@runtime_checkable
class Phased(Protocol):
    """A block that says what its phases are."""

    def phases(self, *inputs: Any, **shared: Any) -> Sequence[PhaseMap]:
        """Return functions state -> state that, applied in turn to z, give f(z, *inputs).

        Called anew for every evaluation, with the inputs and parameters of the moment.
        """


def phases_of(block: nn.Module, z: Any, inputs: Sequence[Any], shared: dict[str, Any]) -> Phased:
    """Return what gives the phases of a block: itself, or the layers of an `nn.Sequential`.

    Args:
        block: The block.
        z: A state, `(batch, *state)`.
        inputs: What the block takes after z.
        shared: Its keywords.

    Raises:
        ValueError: If the block has no phases.
    """
    if _declares(block):
        assert isinstance(block, Phased)  # noqa: S101
        return block
    if has_phases(block):
        assert isinstance(block, nn.Sequential)  # noqa: S101
        return LayerPhases(block, z, inputs, shared)
    raise ValueError(
        f"block {type(block).__name__} has no phases: a cyclic LQR needs an nn.Sequential subclass "
        "with forward(z, x), or a block with a method phases(*inputs) that returns functions "
        "state -> state (see deqlqr.phases). Route 'dare' takes any block."
    )


def has_phases(block: nn.Module) -> bool:
    """Return whether a block declares phases or is an `nn.Sequential` with layers."""
    return _declares(block) or (isinstance(block, nn.Sequential) and len(block) > 0)


def _declares(block: nn.Module) -> bool:
    return callable(getattr(type(block), "phases", None))


class LayerPhases:
    """The layers of an `nn.Sequential` as phases.

    The layers of a plain `nn.Sequential` among them count one by one. A layer without trainable
    parameters belongs to the phase before it. What a subclass does in
    `forward` before its layers belongs to the first phase and what it does after them to the last;
    if it uses z again there, z is part of every state between.

    Raises:
        ValueError: If `forward` does not call the layers exactly once.
    """

    def __init__(
        self, block: nn.Sequential, z: Any, inputs: Sequence[Any], shared: dict[str, Any]
    ) -> None:
        self._block, self._groups, self._shape = block, grouped(block), StateShape.of(z)
        with torch.enable_grad():
            flat = self._shape.flatten(z).detach().requires_grad_()
            value = self._before(self._shape.unflatten(flat), inputs, shared)
            for layers in self._groups:
                value = through(layers, value)
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"the layers of {type(block).__name__} must return a tensor, got "
                    f"{type(value).__name__}; give it a method phases(*inputs) that returns "
                    "functions state -> state."
                )
            value = value.detach().requires_grad_()
            result = self._after(self._shape.unflatten(flat), value, inputs, shared)
            summed = StateShape.of(result).flatten(result).sum()
            _, again = torch.autograd.grad(summed, [value, flat], allow_unused=True)
        self._keeps_z = again is not None

    def phases(self, *inputs: Any, **shared: Any) -> list[PhaseMap]:
        """Return the functions state -> state."""
        groups, last = self._groups, len(self._groups) - 1

        def phase(k: int) -> PhaseMap:
            def step(state: Any) -> Any:
                z, value = self._unpacked(state) if k > 0 else (state, None)
                if k == 0:
                    value = self._before(z, inputs, shared)
                value = through(groups[k], value)
                if k == last:
                    return self._after(z, value, inputs, shared)
                return self._packed(z, value)

            return step

        return [phase(k) for k in range(last + 1)]

    def _packed(self, z: Any, value: Tensor) -> Any:
        if not self._keeps_z:
            return value
        return (*((z,) if self._shape.single else z), value)

    def _unpacked(self, state: Any) -> tuple[Any, Tensor]:
        if self._keeps_z:
            *z, value = state
            return z[0] if self._shape.single else tuple(z), value
        # The block's work on z before the layers is for nothing, so any z will do.
        return self._shape.unflatten(state.new_zeros(len(state), self._shape.size)), state

    def _before(self, z: Any, inputs: Sequence[Any], shared: dict[str, Any]) -> Any:
        """Return what the block gives its first layer."""
        catch = _Catch()
        with _layers_replaced(self._block, catch):
            try:
                self._run(z, inputs, shared)
            except _Caught:
                return catch.value
        raise ValueError(f"{type(self._block).__name__}.forward does not run its layers.")

    def _run(self, z: Any, inputs: Sequence[Any], shared: dict[str, Any]) -> Any:
        try:
            return self._block(z, *inputs, **shared)
        except (AttributeError, IndexError, KeyError) as error:
            raise ValueError(
                f"{type(self._block).__name__}.forward does not run its layers one after the other "
                f"({error}); give it a method phases(*inputs) that returns functions "
                "state -> state."
            ) from error

    def _after(self, z: Any, value: Any, inputs: Sequence[Any], shared: dict[str, Any]) -> Any:
        """Return what the block makes of its last layer's output."""
        give = _Give(value)
        with _layers_replaced(self._block, give):
            result = self._run(z, inputs, shared)
        if give.calls != 1:
            raise ValueError(
                f"{type(self._block).__name__}.forward runs its layers {give.calls} times; give it "
                "a method phases(*inputs) that returns functions state -> state."
            )
        return result


def grouped(block: nn.Sequential) -> list[list[nn.Module]]:
    """Return the layers by phases, each with trainable parameters (but where there are none)."""
    groups: list[list[nn.Module]] = [[]]
    for layer in unnested(block):
        trains = lambda layers: any(p.requires_grad for m in layers for p in m.parameters())
        if trains([layer]) and trains(groups[-1]):
            groups.append([])
        groups[-1].append(layer)
    return groups


def unnested(block: nn.Sequential) -> Iterator[nn.Module]:
    """Return the layers, those of a plain `nn.Sequential` within in its place."""
    for layer in block:
        if type(layer) is nn.Sequential:
            yield from unnested(layer)
        else:
            yield layer


class Phase(nn.Module):
    """Phase k of a model, so that `Substitution` reaches the model's parameters.

    Args:
        model: The model; its parameters are named `model.`...
        chain: What gives its phases.
        k: Number of the phase, from 0.
    """

    def __init__(self, model: nn.Module, chain: Phased, k: int) -> None:
        super().__init__()
        self.model, self._chain, self._k = model, chain, k

    def forward(self, state: Any) -> Any:
        """Return what the phase makes of a state."""
        return self._chain.phases()[self._k](state)


def through(layers: Sequence[nn.Module], value: Any) -> Any:
    """Return what the layers make of a value, one after the other."""
    for layer in layers:
        value = layer(value)
    return value


class _Caught(Exception):
    """The first layer was reached."""


class _Catch(nn.Module):
    """Stands in for all layers: keeps what they are given."""

    def forward(self, value: Any) -> Any:
        """Keep the value and go no further."""
        self.value = value
        raise _Caught


class _Give(nn.Module):
    """Stands in for all layers: returns what they would."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value, self.calls = value, 0

    def forward(self, _: Any) -> Any:
        """Return the value."""
        self.calls += 1
        return self.value


@contextmanager
def _layers_replaced(block: nn.Sequential, stand_in: nn.Module) -> Generator[None, None, None]:
    layers = block._modules
    block._modules = OrderedDict([("0", stand_in)])
    try:
        yield
    finally:
        block._modules = layers
