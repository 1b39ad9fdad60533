"""One forward pass of a DEQ layer: its block as a flat map of tensors, and how it is solved."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from deqlqr._linalg import not_finite
from deqlqr.adjoint import Implicit, Neumann, make_adjoint
from deqlqr.equilibrium import Flat, Problem
from deqlqr.fixed_point import solve_flat
from deqlqr.frozen import Frozen
from deqlqr.resolvent import Product, Resolvent
from deqlqr.solution import FixedPointResult
from deqlqr.solver import RowMap
from deqlqr.state import StateShape
from deqlqr.substitution import Substitution

if TYPE_CHECKING:
    from deqlqr.deq import DEQ


class Call:
    """One forward pass: the block as a flat map of its tensors, and how it is solved.

    Attributes:
        start: z0 (batch, n).
        tensors: Per-sample inputs, then shared tensors, parameters and buffers.
        shape: Shape of the state.
    """

    def __init__(
        self,
        layer: "DEQ",
        inputs: tuple[Any, ...],
        shared: dict[str, Any],
        z0: Any = None,
        key: Hashable = None,
    ) -> None:
        if not inputs or not isinstance(inputs[0], Tensor) or inputs[0].dim() < 1:
            raise ValueError(
                "the DEQ layer needs a tensor x (batch, ...) as its first positional argument."
            )
        self.layer, self.key = layer, key
        z0 = layer._near if z0 is None else z0
        self._own = _Tensors(inputs)
        self._shared = _Tensors(shared)
        batch = inputs[0].shape[0]
        for x in self._own.tensors:
            if x.dim() < 1 or x.shape[0] != batch:
                raise ValueError(
                    f"positional tensors must have batch size {batch} like the first, got "
                    f"{tuple(x.shape)}; what all samples share is given by keyword."
                )
        start = layer.initial_state(*inputs) if z0 is None else z0
        self.shape = StateShape.of(start, "z0")
        first = start if self.shape.single else start[0]
        if first.shape[0] != batch:
            raise ValueError(f"z0 must have batch size {batch}, got {first.shape[0]}.")
        cold = self.shape.flatten(start).detach()
        self.start = cold if z0 is not None else self._warmed("z", cold, cold)
        self.frozen = Frozen(layer.block, first.device)
        named = tensors_of(layer.block)
        self._block = Substitution(layer.block, named)
        # The block's own change at the end of the solve; the derivative is that of the solve.
        self.buffers = {name for name, _ in layer.block.named_buffers()}
        copied = self.buffers if layer.block.training else set()
        self.named = {k: v.clone() if k in copied else v for k, v in named.items()}
        self.tensors = (*self._own.tensors, *self._shared.tensors, *self.named.values())

    def problem(self) -> Problem:
        """Return the fixed-point problem with its rules of solution."""
        count = len(self._own.tensors)
        adjoint = make_adjoint(self.layer.backward)
        return Problem(
            f=self.evaluate,
            per_sample=(True,) * count + (False,) * (len(self.tensors) - count),
            solve=self._solve,
            solve_linear=self.solve_linear,
            neumann=adjoint if isinstance(adjoint, Neumann) else None,
        )

    def evaluate(self, z: Tensor, *tensors: Tensor) -> Tensor:
        """Return f(z) flat, with the tensors given in place of the layer's own."""
        own, keywords = len(self._own.tensors), len(self._shared.tensors)
        named = tensors[own + keywords :]
        given = dict(zip(self.named, named, strict=True))
        if self.frozen.moves:
            given = {k: v.clone() if k in self.buffers else v for k, v in given.items()}
        inputs = self._own.filled(tensors[:own])
        shared = self._shared.filled(tensors[own : own + keywords])
        state = self.shape.unflatten(z)
        return self._checked(
            lambda: self._block(given, (state, *inputs), shared),
            state,
            len(z),
        )

    def direct(self, z: Tensor) -> Tensor:
        """Return f(z) flat of the block and the inputs as they stand."""
        return self._direct(z, *self._own.tensors)

    def _direct(self, z: Tensor, *own: Tensor) -> Tensor:
        inputs, shared = self._own.filled(own), self._shared.whole
        state = self.shape.unflatten(z)
        return self._checked(lambda: self.layer.block(state, *inputs, **shared), state, len(z))

    def _checked(self, evaluate: Callable[[], Any], state: Any, batch: int) -> Tensor:
        if self.frozen.random is not None:
            return self.shape.require(self.frozen(evaluate), batch, _SHAPE, _HINT)
        parts = (state,) if self.shape.single else state
        version = lambda part: None if part.is_inference() else part._version
        versions = [version(part) for part in parts]
        try:
            fz = self.frozen(evaluate)
        except (RuntimeError, TypeError) as error:
            shapes = [tuple(x.shape) for x in self._own.tensors]
            raise ValueError(
                f"block raised at its first evaluation, with z of shape "
                f"{[tuple(part.shape) for part in parts]} and inputs of shapes {shapes}: {error}."
                f"{_HINT}"
            ) from error
        if versions != [version(part) for part in parts]:
            raise ValueError("block changes z in place; it must leave z as it is.")
        return self.shape.require(fz, batch, _SHAPE, _HINT)

    def solve(self) -> Tensor:
        """Return z* flat, in plain tensors."""
        return self._solve(self.evaluate, self.start, self.tensors)

    def _solve(self, f: Flat, z0: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        layer, alone = self.layer, f == self.evaluate
        direct = alone and all(a is b for a, b in zip(tensors, self.tensors, strict=True))
        count = len(self._own.tensors)
        own, rest = tensors[:count], tensors[count:]
        probe = self._direct if direct else lambda z, *x: f(z, *x, *rest)
        rows = _Rows(probe, own, None if alone else False, self.frozen)
        found = solve_flat(rows, z0, replace(layer.solver, tol=self._tolerance(z0.dtype)))
        if self.frozen.autocast[0]:
            torch.clear_autocast_cache()  # weights cast without a graph must not be used with one
        if direct:
            self.frozen.update_statistics(lambda: self._direct(found.value, *own))
        self.frozen.advance()
        value = found.value.clone()  # the caller may change what it is given
        layer.solution = replace(found, value=self.shape.unflatten(value))
        self._keep("z", value)
        layer.report(layer.solution, "fixed point of the block")
        return found.value

    def _tolerance(self, dtype: torch.dtype) -> float | None:
        """Return the layer's tolerance: under autocast that of the type it computes in."""
        solver, (enabled, low) = self.layer.solver, self.frozen.autocast
        return solver.tolerance(low) if enabled else solver.tol

    def solve_linear(
        self,
        product: Product,
        right: Tensor,
        resolvent: Resolvent | None = None,
        rough: float | None = None,
    ) -> Tensor:
        """Return x = right + L x by the layer's adjoint solver and rules of failure.

        Args:
            product: x -> L x.
            right: `(batch, n)`, or `(batch, k, n)` for k right sides, where a resolvent is given.
            resolvent: (I - L)^-1, where one is at hand.
            rough: A tolerance in place of the layer's; `backward_solution` stays as it is.
        """
        layer, dtype = self.layer, right.dtype
        work = right.float() if torch.finfo(dtype).bits < 32 else right
        # What is not finite (an overflow that a gradient scaler looks for) is passed on as it is.
        lost = not_finite(work)
        if lost is not None:
            work = work.masked_fill(lost[..., None], 0.0)
        start = self._warmed("lam", work, None)
        tol = self._tolerance(dtype) or layer.solver.tolerance(dtype)
        with torch.no_grad():
            solver = make_adjoint(layer.backward)
            if resolvent is not None and isinstance(solver, Implicit):
                found = solver.solve_by(resolvent, product, work, start, rough)
            else:
                found = solver.solve(product, work, tol, start)
        idle = not_finite(found.value)
        if idle is not None:
            # Nobody asks about a sample whose A is not finite: its part is nothing.
            idle = idle.view(len(work), -1).any(-1) & (work == 0).flatten(1).all(-1)
            codes = found.result.masked_fill(idle, int(FixedPointResult.CONVERGED))
            value = found.value.masked_fill(idle.view(-1, *[1] * (right.dim() - 1)), 0.0)
            found = replace(found, value=value, result=codes)
        if rough is None:
            layer.backward_solution = found
            self._keep("lam", found.value)
        layer.report(found, "adjoint (D1) of the block")
        if lost is not None:
            return found.value.masked_fill(lost[..., None], float("nan")).to(dtype)
        return found.value.to(dtype, copy=True)

    def _warmed(self, kind: str, like: Tensor, cold: Tensor | None) -> Any:
        kept = self.layer._warm.get((kind, self.key)) if self.layer.warm_start else None
        if kept is None or kept.shape != like.shape or kept.device != like.device:
            return cold
        return kept.to(like.dtype)

    def _keep(self, kind: str, value: Tensor) -> None:
        if self.layer.warm_start and bool(value.isfinite().all()):
            self.layer._warm[kind, self.key] = value.detach()


_SHAPE = "block must return f(z, x) with the shape of z"
_HINT = (
    " If the state differs in shape from the input, give DEQ state_shape=... or the block a method "
    "state_shape(x)."
)


class _Tensors:
    """The tensors in a nest of tuples, lists and dictionaries, and the nest to put others in."""

    def __init__(self, whole: Any) -> None:
        self.whole = whole
        self._leaves, self._nest = tree_flatten(whole)
        self.tensors = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        """Return the nest with these tensors."""
        if len(self.tensors) == len(self._leaves):
            return tree_unflatten(list(tensors), self._nest)
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return tree_unflatten(leaves, self._nest)


class _Rows(RowMap):
    """A map that turns out after its first evaluation to draw random numbers, which have rows."""

    def __init__(
        self, f: Flat, inputs: tuple[Tensor, ...], divisible: bool | None, frozen: Frozen
    ) -> None:
        super().__init__(f, inputs, divisible)
        self.frozen = frozen

    def split(self, keep: Tensor, z: Tensor, fz: Tensor, tol: float) -> RowMap:
        if self.frozen.random:
            self.divisible = False
        return super().split(keep, z, fz, tol)


def tensors_of(block: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, those of a `DataParallel` replica too."""
    named: dict[str, Tensor] = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    for prefix, module in block.named_modules():
        # In a replica parameters are plain attributes, so that gradients reach the original.
        for name, p in getattr(module, "_former_parameters", {}).items():
            named[f"{prefix}.{name}" if prefix else name] = p
    return named
