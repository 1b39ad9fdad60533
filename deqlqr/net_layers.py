"""An explicit network (no DEQ) on a batch: its layers, and what reads their last state, y itself.

It is the block of a DEQ that does not use its z: what enters layer 1 is y, without effect, A_1 = 0.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deqlqr.batch import statistics_held
from deqlqr.controls import Controls
from deqlqr.layers import Layer, Layers, LocalPhase, listed_phases, walked
from deqlqr.linearize_samples import check_input
from deqlqr.phases import Phase, has_phases, phases_of
from deqlqr.substitution import called_with


class NetLayers(Layers):
    """An explicit network: an `nn.Sequential`, or a module with a method `phases()`.

    Attributes:
        shapes: The `StateShape` of the input and of what leaves each layer.

    Raises:
        ValueError: If the model or x does not fit, or the model has no phases or wrong ones.
    """

    spare = 1  # the readout, which is y itself, has no controls

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        name = type(model).__name__
        if not has_phases(model):
            raise ValueError(
                f"model {name} has no phases: a finite-horizon LQR needs an nn.Sequential, or a "
                "module with a method phases() that returns functions state -> state, the first "
                "of the input (see deqlqr.phases). Routes 'output', 'sampled', 'krylov' and "
                "'kronecker' take any model."
            )
        self.model, self.x, self.controls = model, x, Controls(model)
        check_input(x, self.controls)
        if not x.is_floating_point():
            raise ValueError(
                f"x must be floating point, a state like those between the layers, got {x.dtype}. "
                "Routes 'output', 'sampled', 'krylov' and 'kronecker' take any."
            )
        self.solutions = []
        with torch.enable_grad(), statistics_held(model):
            y = model(x)
            self._chain = phases_of(model, x, (), {})
            phases = listed_phases(self._chain, name, (), {})
            self._phases = [Phase(model, self._chain, k) for k in range(len(phases))]
            walk = walked(phases, x, name, "the model's output")
            results = walk.flat_results
            self._require_same(y, walk.results[-1], self._connected(x))
        self.outputs = y.detach()
        # The output's place in front of layer 1, which does not look at it.
        self.shapes = walk.shapes
        self._values = [value.detach() for value in results]
        self._states = [self._values[-1], *walk.states[1:]]
        self.sizes = [state.shape[1] for state in self._states]
        self.used = [[], *(self._uses(value) for value in results)]

    def _connected(self, x: Tensor) -> Any:
        value: Any = x
        for phase in self._chain.phases():
            value = phase(value)
        return value

    def _require_same(self, y: Tensor, last: Any, connected: Any) -> None:
        """Refuse phases that are not those of the model, in value or in derivative."""
        name = type(self.model).__name__
        if not isinstance(y, Tensor) or not isinstance(last, Tensor) or y.shape != last.shape:
            output, end = (
                tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in (y, last)
            )
            raise ValueError(f"the phases of {name} must end in its output, {output}; got {end}.")
        eps = torch.finfo(y.dtype).eps
        gap = float((y - last).detach().abs().max())
        if not gap <= 1e3 * eps * max(1.0, float(y.detach().abs().max())):
            raise ValueError(
                f"the phases of {name}, one after the other, must give its output; they differ by "
                f"{gap:.1e} (with active dropout they cannot: call model.eval())."
            )
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
        of_model, of_phases = (self.controls.pull(value, g) for value in (y, connected))
        gap = float((of_model - of_phases).norm())
        if not gap <= 1e4 * eps * max(float(of_model.norm()), float(g.norm())):
            raise ValueError(
                f"the phases of {name} have another derivative than the model: they differ by "
                f"{gap:.1e}. Does a phase detach?"
            )

    def require_derivatives(self, layers: Sequence[Layer]) -> None:
        """Do nothing: that of the whole is compared where the phases are."""

    def local(self, k: int, parameters: Sequence[int]) -> LocalPhase:
        """Return (u, s, x) -> s+ for one sample and layer k: s is (n,), s+ (n+,)."""
        part = self.controls.part(parameters)
        before, after = self.shapes[k - 1], self.shapes[k]

        def local(u: Tensor, s: Tensor, x: Tensor) -> Tensor:
            value = x[None] if k == 1 else before.unflatten(s[None])
            named = {f"model.{name}": value for name, value in part.unflatten(u).items()}
            return after.flatten(called_with(self._phases[k - 1], named, value))[0]

        return local

    def local_readout(self, parameters: Sequence[int]) -> LocalPhase:
        """Return (u, y, x) -> y for one sample."""
        return lambda u, y, x: y
