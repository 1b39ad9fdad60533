"""A model on a batch, taken apart into layers and a readout, each linearised sample by sample.

Each is a function of its own state and of the parameters it uses; what comes before it is held.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev

from deqlqr._linalg import identity_like
from deqlqr.controls import Controls
from deqlqr.input_cost import InputCost
from deqlqr.linearize_samples import (
    hessian_terms,
    require_mean,
    require_same_samples,
    sample_by_sample,
)
from deqlqr.loss import Loss
from deqlqr.phases import Phased, PhaseMap
from deqlqr.solver import FixedPointSolution
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


class Layers:
    """A model on a batch: its layers, and the readout that follows them.

    Attributes:
        model: The model.
        x: Inputs.
        controls: Its parameters.
        outputs: `(batch, k)`.
        solutions: Fixed points of every sample, of its DEQ layer.
        used: Numbers of the parameters that the readout (first) and each layer use.
        sizes: States that enter each layer.
        spare: Which of these, the readout (0) or a layer, takes parameters that act on nothing.
    """

    model: nn.Module
    x: Tensor
    controls: Controls
    outputs: Tensor
    solutions: Sequence[FixedPointSolution]
    used: list[list[int]]
    sizes: list[int]
    spare = 0
    _states: list[Tensor]  # what enters each layer, (batch, n)
    _values: list[Tensor]  # what each returns, (batch, n+)

    def local(self, k: int, parameters: Sequence[int]) -> LocalPhase:
        """Return (u, s, x) -> s+ for one sample and layer k, from 1 on: s is (n,), s+ (n+,)."""
        raise NotImplementedError

    def local_readout(self, parameters: Sequence[int]) -> LocalPhase:
        """Return (u, s, x) -> y for one sample: s, (n,), is what enters layer 1, y (k,)."""
        raise NotImplementedError

    def require_derivatives(self, layers: Sequence[Layer]) -> None:
        """Refuse layers whose derivatives are not those of the model.

        Raises:
            ValueError: If they differ, as with a phase that detaches.
        """
        raise NotImplementedError

    def require_independent(self, layers: Sequence[Layer], readout: Layer) -> None:
        """Refuse a model whose batch and single samples disagree.

        Raises:
            ValueError: If they do.
        """
        for layer, value in zip(layers, self._values, strict=True):
            require_same_samples(layer.value, value)
        require_same_samples(readout.value, self.outputs)

    def states(self, k: int) -> Tensor:
        """Return what enters layer k, `(batch, n)`."""
        return self._states[k - 1]

    def layer(self, k: int, stored: bool) -> Layer:
        """Return layer k, from 1 on, linearised in its state, and if `stored` in its parameters."""
        used = self.used[k] if stored else []
        return self._linearized(self.local(k, used), self.states(k), used)

    def readout(self, parameters: Sequence[int]) -> Layer:
        """Return the readout linearised in z and in some parameters."""
        return self._linearized(self.local_readout(parameters), self._states[0], parameters)

    def _uses(self, value: Tensor) -> list[int]:
        if not value.requires_grad:
            return []
        grads = torch.autograd.grad(
            value.sum(), self.controls.parameters, allow_unused=True, retain_graph=True
        )
        return [i for i, grad in enumerate(grads) if grad is not None]

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
        local_y, n = self.local_readout(own[0]), self.sizes[0]

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


def listed_phases(
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
            f"{name}.phases must take the block's inputs, those of forward after z (a model's "
            f"takes none); it raised: {error}."
        ) from error
    if not isinstance(phases, Sequence) or not phases or not all(map(callable, phases)):
        raise ValueError(
            f"{name}.phases must return a list of at least one function state -> state, got "
            f"{phases!r}."
        )
    return phases


@dataclass
class Walk:
    """What went into each phase of a chain and what came out, each cut off from what came before.

    Attributes:
        shapes: Of every state, first to last.
        states: What entered each phase, `(batch, n)`.
        results: What each returned, in the graph of its parameters.
    """

    shapes: list[StateShape]
    states: list[Tensor]
    results: list[Any]

    @property
    def flat_results(self) -> list[Tensor]:
        """What each phase returned, `(batch, n+)`."""
        pairs = zip(self.shapes[1:], self.results, strict=True)
        return [shape.flatten(value) for shape, value in pairs]


def walked(phases: Sequence[PhaseMap], value: Any, name: str, last: str) -> Walk:
    """Run phases one after the other, each on its own.

    Args:
        phases: The phases.
        value: What enters the first.
        name: Of what they are the phases, for messages.
        last: What the last one returns, for messages.

    Returns:
        What went in and came out.

    Raises:
        ValueError: If a phase takes or returns something else than a state.
    """
    walk = Walk([], [], [])
    for number, phase in enumerate(phases):
        shape = StateShape.of(value, f"state of phase {number} of {name}")
        flat = shape.flatten(value).detach()
        try:
            value = phase(shape.unflatten(flat))
        except TypeError as error:
            raise ValueError(
                f"phase {number} of {name} must take one state, a tensor or a tuple of tensors "
                f"as the phase before returns it; it raised: {error}."
            ) from error
        walk.shapes.append(shape)
        walk.states.append(flat)
        walk.results.append(value)
    walk.shapes.append(StateShape.of(value, last))
    return walk


def _costates(A: Sequence[Tensor], a: Tensor) -> list[Tensor]:
    """Return p_{k+1} of what layer k returns, for k = 1 ... (and first, unused, that of z)."""
    whole = A[0]
    for A_k in A[1:]:
        whole = A_k @ whole
    p = [torch.linalg.solve(identity_like(whole) - whole.mT, a)]  # (H1)
    for A_k in reversed(A[1:]):
        p.insert(0, (A_k.mT @ p[0][..., None])[..., 0])
    return [p[-1], *p]
