"""A model at its fixed point, taken apart into its block's layers and its readout.

Each is a function of its own state and of the parameters it uses, linearised sample by sample; what
comes before it is held.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from deqlqr._linalg import identity_like
from deqlqr.deq import Tap
from deqlqr.input_cost import InputCost
from deqlqr.linearize_samples import hessian_terms, require_mean, sample_by_sample, solved
from deqlqr.loss import Loss
from deqlqr.phases import Phased, PhaseMap, phases_of
from deqlqr.state import StateShape

LocalPhase = Callable[[Tensor, Tensor, Tensor], Tensor]  # (u, s, x) -> s+ of one sample


@dataclass(frozen=True)
class Layer:
    """A layer, or the readout, of every sample.

    Attributes:
        value: What it returns, `(batch, n+)`.
        A: Its derivative in the state, `(batch, n+, n)`.
        B: In the parameters it uses, `(batch, n+, m)`.
        columns: Which columns of B belong to a parameter, by its number.
    """

    value: Tensor
    A: Tensor
    B: Tensor
    columns: dict[int, slice]

    def by(self, parameters: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Return the derivative in some parameters, 0 for those that the layer does not use."""
        batch, n = self.A.shape[:2]
        parts = [self.A.new_zeros(batch, n, 0)]
        for i in parameters:
            if i in self.columns:
                parts.append(self.B[..., self.columns[i]])
            else:
                parts.append(self.A.new_zeros(batch, n, sizes[i]))
        return torch.cat(parts, dim=-1)


class _Chain(Tap):
    """Runs a block phase by phase; what goes into a phase is cut off from what came before."""

    def evaluate(self, block: nn.Module, inputs: tuple[Any, ...], shared: dict[str, Any]) -> Any:
        """Keep what goes into each phase and what comes out."""
        name = type(block).__name__
        self.chain = phases_of(block, self.z, inputs, shared)
        self.shapes: list[StateShape] = []
        self.states: list[Tensor] = []
        self.results: list[Any] = []
        value = self.z
        for number, phase in enumerate(_listed(self.chain, name, inputs, shared)):
            shape = StateShape.of(value, f"state of phase {number} of {name}")
            flat = shape.flatten(value).detach()
            try:
                value = phase(shape.unflatten(flat))
            except TypeError as error:
                raise ValueError(
                    f"phase {number} of {name} must take one state, a tensor or a tuple of tensors "
                    f"as the phase before returns it; it raised: {error}."
                ) from error
            self.shapes.append(shape)
            self.states.append(flat)
            self.results.append(value)
        self.shapes.append(StateShape.of(value, "f(z, x) by the block's phases"))
        return block(self.z, *inputs, **shared)


def _listed(
    chain: Phased, name: str, inputs: tuple[Any, ...], shared: dict[str, Any]
) -> Sequence[PhaseMap]:
    """Return the phases.

    Raises:
        ValueError: If they are no list of functions.
    """
    try:
        phases = chain.phases(*inputs, **shared)
    except TypeError as error:
        raise ValueError(
            f"{name}.phases must take the block's inputs, those of forward after z; it raised: "
            f"{error}."
        ) from error
    if not isinstance(phases, Sequence) or not phases or not all(map(callable, phases)):
        raise ValueError(
            f"{name}.phases must return a list of at least one function state -> state, got "
            f"{phases!r}."
        )
    return phases


class _One(Tap):
    """Evaluates one phase of a block, at a state of its own."""

    def __init__(self, z: Any, chain: Phased, k: int, state: Any) -> None:
        super().__init__(z)
        self._chain, self._k, self._state = chain, k, state

    def evaluate(self, block: nn.Module, inputs: tuple[Any, ...], shared: dict[str, Any]) -> Any:
        """Return what comes out of the phase."""
        return self._chain.phases(*inputs, **shared)[self._k](self._state)


class Layers:
    """A model at its fixed point, and its layers.

    Attributes:
        outputs: `(batch, k)`.
        solution: Fixed point of every sample.
        used: Numbers of the parameters that the readout (first) and each layer use.
        sizes: States of every layer.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model, x
        self.block_layer, self.controls, self.outputs, self.solution = solved(model, x)
        shape = StateShape.of(self.solution.value)
        with torch.enable_grad():
            z = shape.flatten(self.solution.value).detach().requires_grad_()
            tap = _Chain(shape.unflatten(z))
            with self.block_layer.tapped(tap):
                y = model(x)
            fz = shape.flatten(tap.fz)
            # A random cotangent through the block, for `require_derivatives`; no graph is kept.
            self._g = torch.randn(fz.shape, generator=torch.Generator().manual_seed(0)).to(fz)
            (self._pulled,) = torch.autograd.grad(
                fz, z, self._g, retain_graph=True, materialize_grads=True
            )
        self._chain, self._shapes, self._states = tap.chain, tap.shapes, tap.states
        self._require_same(tap)
        self.sizes = [shape.size for shape in tap.shapes[:-1]]
        results = [
            shape.flatten(value) for shape, value in zip(tap.shapes[1:], tap.results, strict=True)
        ]
        self.used = [self._uses(value) for value in (y, *results)]

    def _require_same(self, tap: _Chain) -> None:
        """Refuse phases that are not those of the block."""
        name = type(self.block_layer.block).__name__
        shape, last = StateShape.of(tap.fz), tap.shapes[-1]
        if last != shape:
            raise ValueError(
                f"the phases of {name} must end in the shape of f(z, x), {shape.shapes}; got "
                f"{last.shapes}."
            )
        fz, by_phases = shape.flatten(tap.fz).detach(), shape.flatten(tap.results[-1]).detach()
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

    def _uses(self, value: Tensor) -> list[int]:
        if not value.requires_grad:
            return []
        grads = torch.autograd.grad(
            value.sum(), self.controls.parameters, allow_unused=True, retain_graph=True
        )
        return [i for i, grad in enumerate(grads) if grad is not None]

    def layer(self, k: int, stored: bool) -> Layer:
        """Return layer k, from 1 on, linearised in its state, and if `stored` in its parameters."""
        used = self.used[k] if stored else []
        return self._linearized(self.local(k, used), self.states(k), used)

    def states(self, k: int) -> Tensor:
        """Return what enters layer k, `(batch, n)`."""
        return self._states[k - 1]

    def readout(self, parameters: Sequence[int]) -> Layer:
        """Return the readout linearised in z and in some parameters."""
        return self._linearized(self._read(parameters), self._states[0], parameters)

    def _read(self, parameters: Sequence[int]) -> LocalPhase:
        """Return (u, z, x) -> y for one sample: z is (n,), y (k,)."""
        part, shape = self.controls.part(parameters), self._shapes[0]

        def local(u: Tensor, z: Tensor, x: Tensor) -> Tensor:
            with self.block_layer.tapped(Tap(shape.unflatten(z[None]))):
                return functional_call(self.model, part.unflatten(u), (x[None],)).reshape(-1)

        return local

    def local(self, k: int, parameters: Sequence[int]) -> LocalPhase:
        """Return (u, s, x) -> s+ for one sample and layer k: s is (n,), s+ (n+,)."""
        part = self.controls.part(parameters)
        before, after, zshape = self._shapes[k - 1], self._shapes[k], self._shapes[0]
        z = zshape.unflatten(self._states[0][:1])

        def local(u: Tensor, s: Tensor, x: Tensor) -> Tensor:
            tap = _One(z, self._chain, k - 1, before.unflatten(s[None]))
            with self.block_layer.tapped(tap):
                functional_call(self.model, part.unflatten(u), (x[None],))
            return after.flatten(tap.fz)[0]

        return local

    def _linearized(self, local: LocalPhase, states: Tensor, used: Sequence[int]) -> Layer:
        part = self.controls.part(used)
        u = part.vector

        def with_value(u: Tensor, s: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            value = local(u, s, x)
            return value, value

        jacobians = jacrev(with_value, argnums=(0, 1), has_aux=True)
        (B, A), value = sample_by_sample(lambda s, x: jacobians(u, s, x), states, self.x)
        A, B, value = A.detach(), B.detach(), value.detach()  # parameters that are not in u
        ends = list(itertools.accumulate(part.sizes, initial=0))
        columns = {i: slice(*ends[j : j + 2]) for j, i in enumerate(used)}
        return Layer(value, A, B, columns)

    def newton_terms(
        self,
        layers: Sequence[Layer],
        own: Sequence[Sequence[int]],
        y: Tensor,
        loss: Loss,
        a: Tensor,
    ) -> tuple[list[Tensor], list[Tensor], list[InputCost]]:
        """Return Q_k, M_k and R_k of the layers' Hamiltonians."""
        require_mean(loss, self.outputs, y)
        costates = _costates([layer.A for layer in layers], a)
        local_y, n = self._read(own[0]), self.sizes[0]

        def read(v: Tensor, s: int) -> Tensor:
            return loss(local_y(v[n:], v[:n], self.x[s])[None], y[s : s + 1])

        terms = [hessian_terms(read, self._points(0, own[0]), n)]
        for k in range(1, len(self.used)):
            local, size, p = self.local(k, own[k]), self.sizes[k - 1], costates[k]

            def hamiltonian(
                v: Tensor, s: int, local: Any = local, size: int = size, p: Tensor = p
            ) -> Tensor:
                return local(v[size:], v[:size], self.x[s]) @ p[s]

            terms.append(hessian_terms(hamiltonian, self._points(k - 1, own[k]), size))
        Q, M, R = map(list, zip(*terms, strict=True))
        return Q, M, R

    def _points(self, k: int, parameters: Sequence[int]) -> Tensor:
        """Return (s, u) of every sample."""
        states, u = self._states[k], self.controls.part(parameters).vector
        return torch.cat([states, u.expand(len(states), -1)], dim=1)


def _costates(A: Sequence[Tensor], a: Tensor) -> list[Tensor]:
    """Return p_{k+1} of what layer k returns, for k = 1 ... (and first, unused, that of z)."""
    whole = A[0]
    for A_k in A[1:]:
        whole = A_k @ whole
    p = [torch.linalg.solve(identity_like(whole) - whole.mT, a)]  # (H1)
    for A_k in reversed(A[1:]):
        p.insert(0, (A_k.mT @ p[0][..., None])[..., 0])
    return [p[-1], *p]
