"""The DEQ layer: z* = f(z*, x) forward, and its exact derivative by implicit differentiation.

With g the cotangent of z* and A = df/dz at z*, the gradient of the equilibrium is

    (D1)  lam = g + A' lam                      the costate of the LQR with P = 0, i.e. (R2)
    (D2)  cotangent of the controls = B' lam    = -u, u of (R3) with R = I (theorem 4.2.1)

Source: Bai, Kolter and Koltun (2019), arXiv:1909.01377; thesis section 2.4.1 and theorem 4.2.1.
"""

import inspect
import warnings
from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deqlqr._checks import choice, one_forward_level, unknown_option
from deqlqr.adjoint import Adjoint, Implicit, Neumann, make_adjoint
from deqlqr.equilibrium import Flat, Problem, equilibrium, pullback_at
from deqlqr.fixed_point import make_solver, solve_flat
from deqlqr.frozen import Frozen
from deqlqr.resolvent import LinearSolution, Product, Resolvent
from deqlqr.solution import ConvergenceError
from deqlqr.solver import FixedPointSolution, RowMap, Solver
from deqlqr.state import StateShape

OnFailure = Literal["raise", "warn", "return"]


class DEQ(nn.Module):
    """Deep-equilibrium layer around a residual block f(z, x).

    Called as `layer(x)`, or `layer(x1, x2, ..., name=value)` for a block f(z, x1, x2, ..., name):
    positional tensors are per sample (batch first), keywords are shared by all samples. The state
    starts from zero. Its shape is that of x, unless `state_shape` is given or the block has a
    method `state_shape(*inputs)` that returns the shape of one sample's state. A tuple of shapes
    makes the state a tuple of tensors.

    The gradient is that of the equilibrium, in eval mode too, whatever solver found it, to every
    order, and under `torch.func` (one forward level). During a solve random numbers are held and
    batch normalisation uses its running statistics, so that all evaluations see one map.

    Args:
        block: Any module f(z, *inputs) whose output has the shape of z. Samples should be
            independent; a block that mixes them is given the whole batch to the end.
        solver: A solver object or its name (see `fixed_point`).
        tol: Tolerance (FP1) of the forward solve and relative residual of the backward solve;
            `None` takes 1e-5 in float32, 1e-10 in float64.
        max_steps: Limit on the evaluations of the forward solve.
        backward: How (D1) is solved: `"implicit"` (exact: factorised for small states, Krylov for
            others), `"lqr"` (exact, theorem 4.2.1; forms the dense A of every sample), `"neumann"`
            or `"one-step"` (inexact, cheaper), or an object such as `Implicit(max_steps=50)`.
        on_failure: What a sample without a fixed point does, forward and backward: `"raise"` a
            `ConvergenceError`, `"warn"`, or `"return"` silently (read `layer.solution`).
        state_shape: Shape of one sample's state, or a tuple of shapes.
        warm_start: Start from the last z and lam of the same `key` (see `forward`).

    Attributes:
        solution: The `FixedPointSolution` of the last forward solve, or `None`.
        backward_solution: The `LinearSolution` of the last adjoint or tangent solve, with a bound
            of its error.

    Raises:
        ValueError: If an option's value is unknown or `block` is not a module.
        TypeError: If there is no such option.

    Example:
        >>> from deqlqr.blocks import DenseBlock
        >>> layer = DEQ(DenseBlock(3), solver="picard", tol=1e-6)
        >>> x = torch.ones(2, 3)
        >>> z = layer(x)
        >>> bool((layer.block(z, x) - z).norm() < 1e-5), layer.solution.converged.tolist()
        (True, [True, True])
    """

    def __init__(
        self,
        block: nn.Module,
        *,
        solver: str | Solver = "anderson",
        tol: float | None = None,
        max_steps: int | None = None,
        backward: str | Adjoint = "implicit",
        on_failure: OnFailure = "raise",
        state_shape: Sequence[Any] | None = None,
        warm_start: bool = False,
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name in unknown:
            known = list(inspect.signature(DEQ.__init__).parameters)[1:-1]
            raise TypeError(unknown_option("DEQ", name, known))
        if not isinstance(block, nn.Module):
            raise ValueError(f"block must be an nn.Module f(z, x), got {type(block).__name__}.")
        self.block = block
        self.solver = make_solver(solver, tol, max_steps)
        self.backward = backward
        make_adjoint(backward)
        self.on_failure = choice("on_failure", on_failure, get_args(OnFailure))
        self.state_shape = None if state_shape is None else StateShape.declared(state_shape)
        self.warm_start = warm_start
        self.solution: FixedPointSolution | None = None
        self.backward_solution: LinearSolution | None = None
        self._tap: Tap | None = None
        self._warm: dict[tuple[str, Hashable], Tensor] = {}
        self._divisible: dict[bool, bool | None] = {}  # by training mode

    def forward(self, *inputs: Any, z0: Any = None, key: Hashable = None, **shared: Any) -> Any:
        """Return z* (batch, *state) for the injection x (batch, ...).

        Args:
            inputs: What the block takes after z; tensors are per sample, the first is x.
            z0: Start of the forward solve, `(batch, *state)`; zeros if `None`. No gradient.
            key: Names the batch for `warm_start`, e.g. its number in a fixed order of the data.
            shared: Keywords of the block, the same for all samples.

        Returns:
            z*, certified by `solution`; a tuple if the state is one.

        Raises:
            ValueError: If the block changes the shape of z, or z0 or an input does not fit.
            ConvergenceError: If a sample has no fixed point and `on_failure` is `"raise"`.
        """
        if self._tap is not None:
            return self._tap.record(self.block, *inputs, **shared)
        one_forward_level("the DEQ layer")
        call = Call(self, inputs, shared, z0, key)
        z = equilibrium(call.problem, call.start, call.tensors)
        return call.shape.unflatten(z)

    def initial_state(self, *inputs: Any) -> Any:
        """Return the zero state (batch, *state) that belongs to the inputs."""
        x = inputs[0]
        if self.state_shape is not None:
            shape = self.state_shape
        elif callable(own := getattr(self.block, "state_shape", None)):
            shape = StateShape.declared(own(*inputs))
        else:
            shape = StateShape((tuple(x.shape[1:]),), True)
        real = x if x.is_floating_point() else next(self.block.parameters(), torch.empty(0))
        return shape.unflatten(
            torch.zeros(x.shape[0], shape.size, dtype=real.dtype, device=x.device)
        )

    def resolvent(self, z: Any, *inputs: Any, **shared: Any) -> Resolvent:
        """Return (I - A')^-1 at the fixed point z, for any number of cotangents.

        One factorisation or Krylov space serves them all: the gradient's cotangent, and those of
        a natural gradient.

        Args:
            z: Output of the layer for the inputs.
            inputs: The layer's inputs.
            shared: Its keywords.

        Returns:
            A `Resolvent`: `solve(g)` gives lam of (D1), flat, for g (batch, n) or (batch, k, n).

        Raises:
            ValueError: If `backward` is an inexact one, or `"lqr"`.
        """
        adjoint = make_adjoint(self.backward)
        if not isinstance(adjoint, Implicit):
            raise ValueError(f"resolvent needs backward='implicit', got {self.backward!r}.")
        call = Call(self, inputs, shared, z)
        product = pullback_at(call.evaluate, call.start, call.tensors)
        tol = self.solver.tolerance(call.start.dtype)
        return adjoint.resolvent(product, call.start.shape[1], tol)

    def forget(self) -> None:
        """Drop what `warm_start` has kept."""
        self._warm.clear()

    @contextmanager
    def tapped(self, z: Any) -> Generator["Tap", None, None]:
        """Within the context the layer returns z and records f(z, x) instead of solving."""
        if self._tap is not None:
            raise ValueError("the DEQ layer is being linearised already.")
        self._tap = Tap(z)
        try:
            yield self._tap
        finally:
            self._tap = None

    def extra_repr(self) -> str:
        """Show the options."""
        return f"solver={self.solver}, backward={self.backward!r}, on_failure={self.on_failure!r}"

    def report(self, solution: FixedPointSolution | LinearSolution, what: str) -> None:
        """Do with failed samples what `on_failure` says."""
        if self.on_failure == "raise":
            solution.raise_if_failed(what)
        elif self.on_failure == "warn":
            try:
                solution.raise_if_failed(what)
            except ConvergenceError as error:
                warnings.warn(str(error), RuntimeWarning, stacklevel=3)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the last solutions out of copies and pickles."""
        state = super().__getstate__()
        return {**state, "solution": None, "backward_solution": None, "_warm": {}}


class Call:
    """One forward pass: the block as a flat map of its tensors, and how it is solved.

    Attributes:
        problem: The `Problem`.
        start: z0 (batch, n).
        tensors: Per-sample inputs, then shared tensors, parameters and buffers.
        shape: Shape of the state.
    """

    def __init__(
        self,
        layer: DEQ,
        inputs: tuple[Any, ...],
        shared: dict[str, Any],
        z0: Any = None,
        key: Hashable = None,
    ) -> None:
        if not inputs or not isinstance(inputs[0], Tensor) or inputs[0].dim() < 1:
            raise ValueError(
                "the DEQ layer needs an input tensor x (batch, ...) to be called with."
            )
        self.layer, self.inputs, self.shared, self.key = layer, inputs, shared, key
        batch = inputs[0].shape[0]
        for i, x in enumerate(inputs):
            if isinstance(x, Tensor) and (x.dim() < 1 or x.shape[0] != batch):
                raise ValueError(
                    f"input {i} must have batch size {batch} like input 0, got {tuple(x.shape)}; "
                    "what all samples share is given by keyword."
                )
        start = layer.initial_state(*inputs) if z0 is None else z0
        self.shape = StateShape.of(start, "z0")
        first = start if self.shape.single else start[0]
        if first.shape[0] != batch:
            raise ValueError(f"z0 must have batch size {batch}, got {first.shape[0]}.")
        cold = self.shape.flatten(start).detach()
        self.start = cold if z0 is not None else self._warmed("z", cold, cold)
        self.frozen = Frozen(layer.block, first.device)
        own = [x for x in inputs if isinstance(x, Tensor)]
        keywords = {name: v for name, v in shared.items() if isinstance(v, Tensor)}
        self.named = tensors_of(layer.block)
        self.keywords, self.count = list(keywords), len(own)
        self.tensors = (*own, *keywords.values(), *self.named.values())
        adjoint = make_adjoint(layer.backward)
        self.adjoint = adjoint
        self.problem = Problem(
            f=self.evaluate,
            per_sample=(True,) * len(own) + (False,) * (len(self.tensors) - len(own)),
            solve=self._solve,
            solve_linear=self._solve_linear,
            neumann=adjoint if isinstance(adjoint, Neumann) else None,
        )

    def evaluate(self, z: Tensor, *tensors: Tensor) -> Tensor:
        """Return f(z) flat, with the tensors given in place of the layer's own."""
        own, rest = tensors[: self.count], tensors[self.count :]
        keywords = dict(zip(self.keywords, rest, strict=False))
        given = dict(zip(self.named, rest[len(keywords) :], strict=True))
        inputs, shared = self._arguments(own, keywords)
        state = self.shape.unflatten(z)
        return self._checked(
            lambda: functional_call(self.layer.block, given, (state, *inputs), shared), len(z)
        )

    def _direct(self, z: Tensor, *own: Tensor) -> Tensor:
        """Return f(z) flat of the block as it stands: as `evaluate`, without its overhead."""
        inputs, shared = self._arguments(own, {})
        state = self.shape.unflatten(z)
        return self._checked(lambda: self.layer.block(state, *inputs, **shared), len(z))

    def _arguments(
        self, own: tuple[Tensor, ...], keywords: dict[str, Tensor]
    ) -> tuple[list[Any], dict[str, Any]]:
        if len(own) == len(self.inputs):
            return list(own), {**self.shared, **keywords}
        tensors = iter(own)
        inputs = [next(tensors) if isinstance(x, Tensor) else x for x in self.inputs]
        return inputs, {**self.shared, **keywords}

    def _checked(self, evaluate: Callable[[], Any], batch: int) -> Tensor:
        return self.shape.require(
            self.frozen(evaluate), batch, "block must return f(z, x) with the shape of z", _HINT
        )

    def _solve(self, f: Flat, z0: Tensor, tensors: tuple[Tensor, ...], divisible: bool) -> Tensor:
        layer, block = self.layer, self.layer.block
        direct = f == self.evaluate and all(
            a is b for a, b in zip(tensors, self.tensors, strict=True)
        )
        own, rest = tensors[: self.count], tensors[self.count :]
        probe = (lambda z, *x: self._direct(z, *x)) if direct else (lambda z, *x: f(z, *x, *rest))
        known = layer._divisible.get(block.training) if divisible else False
        rows = _Rows(probe, own, known, self.frozen)
        found = solve_flat(rows, z0, layer.solver)
        if divisible and not self.frozen.random:
            layer._divisible[block.training] = rows.divisible
        if self.frozen.autocast[0]:
            torch.clear_autocast_cache()  # weights cast without a graph must not be used with one
        if direct and self.frozen.norms:
            self.frozen.update_statistics(lambda: self._direct(found.value, *own))
        if self.frozen.random:
            self.frozen.advance()
        layer.solution = FixedPointSolution(
            self.shape.unflatten(found.value), found.result, found.evaluations, found.residual,
            found.rows,
        )  # fmt: skip
        self._keep("z", found.value)
        layer.report(layer.solution, "fixed point of the block")
        return found.value

    def _solve_linear(self, product: Product, right: Tensor) -> Tensor:
        layer, dtype = self.layer, right.dtype
        work = right.float() if torch.finfo(dtype).bits < 32 else right
        start = self._warmed("lam", work, None)
        tol = layer.solver.tolerance(dtype)
        with torch.no_grad():
            found = self.adjoint.solve(product, work, tol, start)
        layer.backward_solution = found
        self._keep("lam", found.value)
        layer.report(found, "adjoint (D1) of the block")
        return found.value.to(dtype)

    def _warmed(self, kind: str, like: Tensor, cold: Tensor | None) -> Any:
        kept = self.layer._warm.get((kind, self.key)) if self.layer.warm_start else None
        if kept is None or kept.shape != like.shape or kept.device != like.device:
            return cold
        return kept.to(like.dtype)

    def _keep(self, kind: str, value: Tensor) -> None:
        if self.layer.warm_start and bool(value.isfinite().all()):
            self.layer._warm[kind, self.key] = value.detach()


_HINT = (
    " If the state differs in shape from the input, give DEQ state_shape=... or the block a method "
    "state_shape(x)."
)


class _Rows(RowMap):
    """A map that turns out after its first evaluation to draw random numbers, which have rows."""

    def __init__(
        self, f: Flat, inputs: tuple[Tensor, ...], divisible: bool | None, frozen: Frozen
    ) -> None:
        super().__init__(f, inputs, divisible)
        self.frozen = frozen

    def split(self, keep: Tensor, z: Tensor, fz: Tensor) -> RowMap:
        if self.frozen.random:
            self.divisible = False
        return super().split(keep, z, fz)


class Tap:
    """Stands in for a DEQ layer while its model is linearised: gives z, keeps f(z, x)."""

    def __init__(self, z: Any) -> None:
        self.z = z
        self.fz: Any = None

    def record(self, block: nn.Module, *inputs: Any, **shared: Any) -> Any:
        """Evaluate the block at the tap's state.

        Returns:
            That state, in place of a fixed point.

        Raises:
            ValueError: If the model calls the layer more than once.
        """
        if self.fz is not None:
            raise ValueError("the model calls its DEQ layer more than once in one forward pass.")
        self.fz = block(self.z, *inputs, **shared)
        return self.z


def tensors_of(block: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, those of a `DataParallel` replica too."""
    named: dict[str, Tensor] = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    for prefix, module in block.named_modules():
        # In a replica parameters are plain attributes, so that gradients reach the original.
        for name, p in getattr(module, "_former_parameters", {}).items():
            named[f"{prefix}.{name}" if prefix else name] = p
    return named


def find_deq(model: nn.Module) -> DEQ:
    """Return the one DEQ layer of a model.

    Raises:
        ValueError: If the model has none or several.
    """
    layers = [module for module in model.modules() if isinstance(module, DEQ)]
    if len(layers) != 1:
        raise ValueError(f"model must contain exactly one DEQ layer, found {len(layers)}.")
    return layers[0]
