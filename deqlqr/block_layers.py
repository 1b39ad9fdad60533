"""A model at its fixed point: the layers of its DEQ block, and the readout around the block."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deqlqr.deq import Tap
from deqlqr.layers import (
    Layer,
    Layers,
    LocalPhase,
    Walk,
    listed_phases,
    walked,
)
from deqlqr.linearize_samples import solved
from deqlqr.phases import Phased, phases_of
from deqlqr.state import StateShape
from deqlqr.substitution import called_with


class _Chain(Tap):
    """Runs a block phase by phase; what goes into a phase is cut off from what came before."""

    def evaluate(self, block: nn.Module, inputs: tuple[Any, ...], shared: dict[str, Any]) -> Any:
        """Keep what goes into each phase and what comes out."""
        name = type(block).__name__
        self.chain = phases_of(block, self.z, inputs, shared)
        phases = listed_phases(self.chain, name, inputs, shared)
        self.walk = walked(phases, self.z, name, "f(z, x) by the block's phases")
        return block(self.z, *inputs, **shared)


class _One(Tap):
    """Evaluates one phase of a block, at a state of its own."""

    def __init__(self, z: Any, chain: Phased, k: int, state: Any) -> None:
        super().__init__(z)
        self._chain, self._k, self._state = chain, k, state

    def evaluate(self, block: nn.Module, inputs: tuple[Any, ...], shared: dict[str, Any]) -> Any:
        """Return what comes out of the phase."""
        return self._chain.phases(*inputs, **shared)[self._k](self._state)


class BlockLayers(Layers):
    """A model with one DEQ layer, at its fixed point.

    Raises:
        ValueError: If the model or x does not fit, or the block has no phases or wrong ones.
        ConvergenceError: If a sample has no fixed point.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model, x
        self.block_layer, self.controls, self.outputs, solution = solved(model, x)
        self.solutions = [solution]
        shape = StateShape.of(solution.value)
        with torch.enable_grad():
            z = shape.flatten(solution.value).detach().requires_grad_()
            tap = _Chain(shape.unflatten(z))
            with self.block_layer.tapped(tap):
                y = model(x)
            fz = shape.flatten(tap.fz)
            # A random cotangent through the block, for `require_derivatives`; no graph is kept.
            self._g = torch.randn(fz.shape, generator=torch.Generator().manual_seed(0)).to(fz)
            (self._pulled,) = torch.autograd.grad(
                fz, z, self._g, retain_graph=True, materialize_grads=True
            )
        self._chain, walk = tap.chain, tap.walk
        self._require_same(shape, tap.fz, walk)
        self._shapes, self._states = walk.shapes, walk.states
        self.sizes = [shape.size for shape in walk.shapes[:-1]]
        results = walk.flat_results
        self.used = [self._uses(value) for value in (y, *results)]
        self._values = [value.detach() for value in results]

    def _require_same(self, shape: StateShape, value: Any, walk: Walk) -> None:
        """Refuse phases that are not those of the block."""
        name, last = type(self.block_layer.block).__name__, walk.shapes[-1]
        if last != shape:
            raise ValueError(
                f"the phases of {name} must end in the shape of f(z, x), {shape.shapes}; got "
                f"{last.shapes}."
            )
        fz, by_phases = shape.flatten(value).detach(), walk.flat_results[-1].detach()
        gap, size = float((fz - by_phases).abs().max()), float(fz.abs().max())
        if not gap <= 1e3 * torch.finfo(fz.dtype).eps * max(1.0, size):
            raise ValueError(
                f"the phases of {name}, one after the other, must give f(z, x); they differ by "
                f"{gap:.1e} (with active dropout they cannot: call model.eval())."
            )

    def require_derivatives(self, layers: Sequence[Layer]) -> None:
        """Refuse phases whose derivative in the state is not that of the block.

        Raises:
            ValueError: If they differ, as with a phase that detaches.
        """
        g, by_block = self._g, self._pulled
        by_phases = g[..., None]
        for layer in reversed(layers):
            by_phases = layer.A.mT @ by_phases
        gap = float((by_block - by_phases[..., 0]).norm())
        if not gap <= 1e4 * torch.finfo(g.dtype).eps * float(g.norm() + by_block.norm()):
            raise ValueError(
                f"the phases of {type(self.block_layer.block).__name__} have another derivative "
                f"than f(z, x): they differ by {gap:.1e} along a random direction. Does a phase "
                "detach, or mix samples?"
            )

    def local_readout(self, parameters: Sequence[int]) -> LocalPhase:
        """Return (u, z, x) -> y for one sample: z is (n,), y (k,)."""
        part, shape = self.controls.part(parameters), self._shapes[0]

        def local(u: Tensor, z: Tensor, x: Tensor) -> Tensor:
            with self.block_layer.tapped(Tap(shape.unflatten(z[None]))):
                return called_with(self.model, part.unflatten(u), x[None]).reshape(-1)

        return local

    def local(self, k: int, parameters: Sequence[int]) -> LocalPhase:
        """Return (u, s, x) -> s+ for one sample and layer k: s is (n,), s+ (n+,)."""
        part = self.controls.part(parameters)
        before, after, zshape = self._shapes[k - 1], self._shapes[k], self._shapes[0]
        z = zshape.unflatten(self._states[0][:1])

        def local(u: Tensor, s: Tensor, x: Tensor) -> Tensor:
            tap = _One(z, self._chain, k - 1, before.unflatten(s[None]))
            with self.block_layer.tapped(tap):
                called_with(self.model, part.unflatten(u), x[None])
            return after.flatten(tap.fz)[0]

        return local
