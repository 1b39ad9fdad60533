"""What a model gives its DEQ layers and what they return, for those who look from outside."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from deqlqr.deq import DEQ, layers_of
from deqlqr.solver import FixedPointSolution


@dataclass(frozen=True)
class LayerCall:
    """One call of a DEQ layer.

    Attributes:
        layer: The layer.
        inputs: Its inputs.
        shared: Its keywords, but for `z0` and `key`.
        z: What it returned.
        solution: Its forward solve; `None` where there was none, as while it is linearised.
    """

    layer: DEQ
    inputs: tuple[Any, ...]
    shared: dict[str, Any]
    z: Any
    solution: FixedPointSolution | None


@contextmanager
def calls_recorded(model: nn.Module) -> Generator[list[LayerCall], None, None]:
    """Within the context every call of a DEQ layer is added to the list."""
    calls: list[LayerCall] = []

    def record(layer: DEQ, inputs: tuple[Any, ...], shared: dict[str, Any], z: Any) -> None:
        own = {name: value for name, value in shared.items() if name not in ("z0", "key")}
        calls.append(LayerCall(layer, inputs, own, z, layer.solution))

    hooks = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers_of(model)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def failures_returned(model: nn.Module) -> Generator[None, None, None]:
    """Within the context no DEQ layer raises or warns: failures are in `layer.solution`."""
    held = [(layer, layer.on_failure) for layer in layers_of(model)]
    for layer, _ in held:
        layer.on_failure = "return"
    try:
        yield
    finally:
        for layer, policy in held:
            layer.on_failure = policy
