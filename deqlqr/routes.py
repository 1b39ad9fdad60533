"""The routes to one and the same damped step, each named for what it computes."""

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from deqlqr._checks import Options, at_least, choice, count
from deqlqr._linalg import full_precision
from deqlqr.batch import Batch, Chunk
from deqlqr.cyclic_route import SweepOptions, linearize_cyclic
from deqlqr.deq import layers_of
from deqlqr.direction import Local, Steepest
from deqlqr.divergence import Divergence, Euclidean, Newton, OutputDivergence
from deqlqr.finite_route import FiniteProblem
from deqlqr.kronecker import Factors, KroneckerMetric
from deqlqr.krylov import ConjugateGradients, KrylovSystem
from deqlqr.layer_inverse import ExactInverse, InverseLike, make_inverse
from deqlqr.linearize_samples import Minibatch
from deqlqr.output_space import linearize_outputs
from deqlqr.riccati_route import linearize_riccati
from deqlqr.sweeps import LayerDamping


@dataclass
class Memory:
    """What a route keeps from step to step; the optimizer saves and restores it.

    Attributes:
        step: Steps taken before.
        u: The last direction, or `None`.
        layers: The Kronecker route's averages.
    """

    step: int = 0
    u: Tensor | None = None
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)


@runtime_checkable
class Route(Protocol):
    """A way to compute u."""

    def refuses(self, model: nn.Module, divergence: Divergence) -> str | None:
        """Return why this route cannot serve the model or the divergence, or `None`."""

    def local(self, at: Batch, divergence: Divergence, dtype: torch.dtype, memory: Memory) -> Local:
        """Linearise the model on a batch."""


@dataclass(frozen=True)
class Dare(Options):
    """The dense discrete algebraic Riccati equation: exact, for small problems.

    Attributes:
        minibatch: `"exact"`: one augmented LQR for the whole batch, dense in batch x state size.
            `"per-sample"`: the mean of the samples' own steps, another direction; its DAREs are
            of the state size.
        max_states: Largest batch x state size (state size, if per sample) it takes on: a DARE of
            4096 states in float64 takes minutes and gigabytes.

    Raises:
        ValueError: If an option is out of range.
    """

    minibatch: Minibatch = "exact"
    max_states: int = 4096

    def __post_init__(self) -> None:
        choice("minibatch", self.minibatch, get_args(Minibatch))
        count("max_states", self.max_states)

    def refuses(self, model: nn.Module, divergence: Divergence) -> str | None:
        """Refuse a model without a layer, or with several: they are no one LQR."""
        return _one_layer(model)

    def local(self, at: Batch, divergence: Divergence, dtype: torch.dtype, memory: Memory) -> Local:
        """Return A, B, Q, R, M, a, b of the batch."""
        return linearize_riccati(at, divergence, dtype, self.minibatch, self.max_states)


LayerDampingLike = Literal["fixed", "adaptive-layer"] | LayerDamping


@dataclass(frozen=True)
class _ByLayers(Options):
    """Options of the routes that solve one Riccati equation for each layer."""

    minibatch: Minibatch = "exact"
    inverse: InverseLike = "exact"
    damping: LayerDampingLike | None = None
    max_states: int = 4096

    def __post_init__(self) -> None:
        choice("minibatch", self.minibatch, get_args(Minibatch))
        make_inverse(self.inverse)
        if self.damping is not None and not isinstance(self.damping, LayerDamping):
            choice("damping", self.damping, ("fixed", "adaptive-layer"))
        count("max_states", self.max_states)

    def _sweeps(self, tol: float, max_sweeps: int) -> SweepOptions | None:
        """Return how to sweep, or `None` for the exact solution with one damping."""
        inverse = make_inverse(self.inverse)
        exact = isinstance(inverse, ExactInverse)
        damping = ("fixed" if exact else "adaptive-layer") if self.damping is None else self.damping
        if exact and damping == "fixed":
            return None
        adapt = damping if isinstance(damping, LayerDamping) else None
        if damping == "adaptive-layer":
            adapt = LayerDamping()
        return SweepOptions(inverse, adapt, tol, max_sweeps)


@dataclass(frozen=True)
class Cyclic(_ByLayers):
    """The cyclic Riccati equations of the block's layers: the step of `Dare`, layer by layer.

    Takes blocks with phases: the package's, an `nn.Sequential` subclass with `forward(z, x)`, or
    one that declares them (see `deqlqr.phases`). By sweeps, a layer's parameters need one damping.

    Attributes:
        minibatch: As for `Dare`.
        inverse: Of R_k + delta_k I + B_k'P B_k: `"exact"`, or `"neumann"` (V3), with options
            `NeumannInverse(terms=20)`: no matrix is inverted and no B_k formed.
        damping: `"fixed"`: the optimizer's delta for all layers. `"adaptive-layer"`: by each
            layer's own curvature (V4) and at least the optimizer's, with options
            `LayerDamping(margin=2.0)`; another step than that of `Dare`. `None` takes the second
            with a series, which diverges where delta is too small, else the first.
        max_states: Largest batch x states between two layers (states, if per sample).
        tol: Relative change of P in a sweep that counts as converged, where sweeps are what
            solves: with any option but `"exact"` and `"fixed"`.
        max_sweeps: Most sweeps.

    Raises:
        ValueError: If an option is out of range.
    """

    tol: float = 1e-8
    max_sweeps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        count("max_sweeps", self.max_sweeps)
        at_least("tol", self.tol, 0.0, strict=True)

    def refuses(self, model: nn.Module, divergence: Divergence) -> str | None:
        """Refuse a model without a layer, or with several: they are no one LQR."""
        return _one_layer(model)

    def local(self, at: Batch, divergence: Divergence, dtype: torch.dtype, memory: Memory) -> Local:
        """Return A, B, Q, R, M, a, b of the batch, layer by layer."""
        refusal = _one_layer(at.model)
        if refusal is not None:  # a layer may be gone for a while, as within `unrolled`
            raise ValueError(f"route 'cyclic' {refusal}.")
        sweeps = self._sweeps(self.tol, self.max_sweeps)
        return linearize_cyclic(at, divergence, dtype, self.minibatch, self.max_states, sweeps)


@dataclass(frozen=True)
class Riccati(_ByLayers):
    """The finite-horizon Riccati recursion of an explicit network's layers (L7): exact.

    Takes an `nn.Sequential` without DEQ layer, or a module with a method `phases()` (see
    `deqlqr.phases`). Dense in batch x state between two layers: for small layers. By another option
    than `"exact"` and `"fixed"`, a layer's parameters need one damping.

    Attributes:
        minibatch: `"exact"`: one augmented LQR for the whole batch. `"per-sample"`: the mean of the
            samples' own steps, another direction.
        inverse: As for `Cyclic`.
        damping: As for `Cyclic`.
        max_states: As for `Cyclic`.

    Raises:
        ValueError: If an option is out of range.
    """

    def refuses(self, model: nn.Module, divergence: Divergence) -> str | None:
        """Refuse a model with DEQ layers."""
        layers = len(layers_of(model))
        if layers == 0:
            return None
        return (
            f"needs a network without DEQ layer, found {layers}; routes 'dare' and 'cyclic' take "
            "one, 'output', 'sampled', 'krylov' and 'kronecker' any number"
        )

    def local(self, at: Batch, divergence: Divergence, dtype: torch.dtype, memory: Memory) -> Local:
        """Return A, B, Q, R, M, a, b of the batch, layer by layer."""
        sweeps = self._sweeps(0.0, 1)  # one sweep is all
        return linearize_cyclic(
            at, divergence, dtype, self.minibatch, self.max_states, sweeps, FiniteProblem
        )


def _one_layer(model: nn.Module) -> str | None:
    layers = len(layers_of(model))
    if layers == 1:
        return None
    return (
        f"needs a model with exactly one DEQ layer, found {layers}; the routes "
        "'output', 'sampled', 'krylov' and 'kronecker' take any number, 'riccati' none"
    )


class _OfOutputs:
    """Base of the routes that need a metric of the output."""

    def refuses(self, model: nn.Module, divergence: Divergence) -> str | None:
        """Refuse the Newton divergence."""
        if isinstance(divergence, (Euclidean, OutputDivergence)):
            return None
        return (
            "needs a divergence of the output (natural gradient), got "
            f"{type(divergence).__name__}; 'dare', 'cyclic', 'riccati' and 'krylov' take it"
        )


@dataclass(frozen=True)
class Output(_OfOutputs, Options):
    """The exact step from a system of batch x outputs unknowns (W3)."""

    def local(self, at: Batch, divergence: Divergence, dtype: torch.dtype, memory: Memory) -> Local:
        """Return the gradient and the rows of the batch."""
        if isinstance(divergence, Euclidean):
            return _steepest(at)
        assert isinstance(divergence, OutputDivergence)  # noqa: S101  see `refuses`
        return linearize_outputs(at, divergence, dtype)


@dataclass(frozen=True)
class Sampled(_OfOutputs, Options):
    """The step of (W3) with an estimate of the metric: random outputs in place of all.

    The Fisher matrix is unbiased, its inverse and so the step are not. A system of batch x samples
    unknowns.

    Attributes:
        samples: Random outputs for each example.
        seed: Of their generator; with the number of the step it determines them.
        tol: Relative residual of the random outputs' adjoint solves; `None` takes the DEQ layers'.
            The estimate's own noise is far larger; the gradient is not touched.

    Raises:
        ValueError: If an option is out of range.
    """

    samples: int = 1
    seed: int = 0
    tol: float | None = 0.1

    def __post_init__(self) -> None:
        count("samples", self.samples)
        count("seed", self.seed, 0)
        if self.tol is not None:
            at_least("tol", self.tol, 0.0, strict=True)

    def local(self, at: Batch, divergence: Divergence, dtype: torch.dtype, memory: Memory) -> Local:
        """Return the gradient and the sampled rows of the batch."""
        if isinstance(divergence, Euclidean):
            return _steepest(at)
        assert isinstance(divergence, OutputDivergence)  # noqa: S101  see `refuses`
        chosen, generator = divergence, _generator(self.seed, memory.step, at)

        def draw(y: Tensor) -> Tensor:
            drawn = [chosen.sample(y, generator) for _ in range(self.samples)]
            return torch.stack(drawn, dim=-1) / self.samples**0.5

        return linearize_outputs(at, chosen, dtype, draw, self.tol)


@dataclass(frozen=True)
class Krylov(ConjugateGradients):
    """Conjugate gradients on (K2): any divergence, any number of outputs, nothing stored.

    Attributes:
        max_steps: Most products with the metric.
        progress: Smallest gain of the quadratic model per step, relative to all so far (K3); 0
            switches it off.
        tol: Relative residual that is good enough.
        warm_start: Start from the last step's direction times this; 0 starts from nothing. Not
            used for the Newton divergence.

    Raises:
        ValueError: If an option is out of range.
    """

    warm_start: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("warm_start", self.warm_start, 0.0)

    def refuses(self, model: nn.Module, divergence: Divergence) -> str | None:
        """Return `None`: it serves every divergence."""
        return None

    def local(self, at: Batch, divergence: Divergence, dtype: torch.dtype, memory: Memory) -> Local:
        """Return the gradient of the batch and products with its metric."""
        if isinstance(divergence, Euclidean):
            return _steepest(at)
        warm = self.warm_start > 0 and memory.u is not None and not isinstance(divergence, Newton)
        start = self.warm_start * memory.u if warm and memory.u is not None else None
        return KrylovSystem(at, divergence, self, start)


Fisher = Literal["sampled", "exact"]


@dataclass(frozen=True)
class Kronecker(_OfOutputs, Options):
    """A Kronecker-factored metric, layer by layer (K4): the cheapest, and an approximation.

    Attributes:
        update_every: Steps between looks at the metric.
        refresh_every: Steps between computations of its eigenvectors, cubic in a layer's width.
            Both happen at the steps 1, 2, 4, 8, ... too, while the metric changes fast.
        decay: Weight of the past in the averages, for each step between two looks.
        corrected: Estimate the eigenvalues themselves (EKFAC).
        fisher: `"sampled"`: one random output per example; `"exact"`: all.
        seed: Of the random outputs' generator.

    Raises:
        ValueError: If an option is out of range.
    """

    update_every: int = 10
    refresh_every: int = 50
    decay: float = 0.98
    corrected: bool = False
    fisher: Fisher = "sampled"
    seed: int = 0

    def __post_init__(self) -> None:
        count("update_every", self.update_every)
        count("refresh_every", self.refresh_every)
        count("seed", self.seed, 0)
        choice("fisher", self.fisher, get_args(Fisher))
        if not 0 <= at_least("decay", self.decay, 0.0) < 1:
            raise ValueError(f"decay must lie in [0, 1), got {self.decay}.")

    def local(self, at: Batch, divergence: Divergence, dtype: torch.dtype, memory: Memory) -> Local:
        """Return the gradient of the batch and the metric, with what the batch adds to it."""
        if isinstance(divergence, Euclidean):
            return _steepest(at)
        assert isinstance(divergence, OutputDivergence)  # noqa: S101  see `refuses`
        chosen, generator = divergence, _generator(self.seed, memory.step, at)
        keep = self.decay**self.update_every
        factors = Factors(memory.layers, at.controls, keep, self.corrected)
        early = memory.step & (memory.step - 1) == 0
        look = early or memory.step % self.update_every == 0 or not factors.complete

        def take(chunk: Chunk) -> None:
            factors.begin(chunk.at)
            if look:
                y = chunk.at.outputs
                root = chosen.root(y) if self.fisher == "exact" else None
                drawn = (
                    [chosen.sample(y, generator)] if root is None
                    else list((root * root.shape[-1] ** 0.5).unbind(-1))
                )  # fmt: skip
                factors.see(chunk.at, drawn, at.count)

        loss, gradient, solutions = at.visit(take)
        if look:
            factors.commit()
        with full_precision(gradient):
            if early or memory.step % self.refresh_every == 0 or not factors.ready:
                factors.refresh()
            return KroneckerMetric(loss, gradient, solutions, at.controls, factors)


_BY_NAME: dict[str, type] = {
    "dare": Dare,
    "cyclic": Cyclic,
    "riccati": Riccati,
    "output": Output,
    "sampled": Sampled,
    "krylov": Krylov,
    "kronecker": Kronecker,
}
ROUTES = tuple(_BY_NAME)


def make_route(route: "str | Route") -> Route:
    """Return the route that a name or an object stands for.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(route, str):
        return _BY_NAME[choice("route", route, ROUTES)]()
    if isinstance(route, type) or not isinstance(route, Route):
        raise ValueError(f"route must be a name or an object such as Sampled(), got {route!r}.")
    return route


def _steepest(at: Batch) -> Local:
    loss, gradient, solutions = at.visit(lambda chunk: None)
    return Steepest(loss, gradient, solutions, at.controls.sizes)


def _generator(seed: int, step: int, at: Batch) -> torch.Generator:
    device = at.controls.parameters[0].device
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) % 2**63)
