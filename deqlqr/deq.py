"""The DEQ layer: z* = f(z*, x) forward, and its exact derivative by implicit differentiation.

With g the cotangent of z* and A = df/dz at z*, the gradient of the equilibrium is

    (D1)  lam = g + A' lam                      the costate of the LQR with P = 0, i.e. (R2)
    (D2)  cotangent of the controls = B' lam    = -u, u of (R3) with R = I (theorem 4.2.1)

Source: Bai, Kolter and Koltun (2019), arXiv:1909.01377; thesis section 2.4.1 and theorem 4.2.1.
"""

import inspect
import warnings
from collections.abc import Generator, Hashable, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from deqlqr._checks import choice, one_forward_level, unknown_option
from deqlqr.adjoint import Adjoint, Implicit, make_adjoint
from deqlqr.call import Call
from deqlqr.equilibrium import equilibrium, pullback_at
from deqlqr.fixed_point import make_solver
from deqlqr.linear_solution import LinearSolution
from deqlqr.pinned import pinned
from deqlqr.resolvent import Resolvent
from deqlqr.solution import ConvergenceError
from deqlqr.solver import FixedPointSolution, Solver
from deqlqr.state import StateShape
from deqlqr.uses import Uses

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
            or estimate of its error.

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
        if type(block).forward is nn.Sequential.forward:
            raise ValueError(
                "block must take z and x, and a plain nn.Sequential takes one: subclass it with "
                "def forward(self, z, x): return super().forward(z + x)"
            )
        self.block = block
        self.solver = make_solver(solver, tol, max_steps)
        self.backward = backward
        make_adjoint(backward)
        taken = {"z0", "key"} & set(list(inspect.signature(block.forward).parameters)[1:])
        if taken:
            raise ValueError(
                f"block.forward has an argument named {taken.pop()!r}, a name that the layer's own "
                "forward takes; rename it."
            )
        self.on_failure = choice("on_failure", on_failure, get_args(OnFailure))
        self.state_shape = None if state_shape is None else StateShape.declared(state_shape)
        self.warm_start = warm_start
        self.solution: FixedPointSolution | None = None
        self.backward_solution: LinearSolution | None = None
        self._tap: Tap | None = None
        self._uses: Uses | None = None
        self._near: Any = None
        self._warm: dict[tuple[str, Hashable], Tensor] = {}

    def forward(self, *inputs: Any, z0: Any = None, key: Hashable = None, **shared: Any) -> Any:
        """Return z* (batch, *state) for the injection x (batch, ...).

        Args:
            inputs: What the block takes after z; tensors are per sample, the first is x. Tuples,
                lists and dictionaries of tensors are looked into.
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
        if self._uses is not None and not self._uses.paused:
            return pinned(call, self._uses)
        z = equilibrium(call.problem(), call.start, call.tensors)
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
        # Made from x, so that a look at what a model does with its data sees it as data.
        return shape.unflatten(x.new_zeros(x.shape[0], shape.size, dtype=real.dtype))

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
    def tapped(self, tap: "Tap") -> Generator["Tap", None, None]:
        """Within the context the layer hands its block and inputs to the tap instead of solving."""
        if self._tap is not None:
            raise ValueError("the DEQ layer is being linearised already.")
        with self._holding("_tap", tap):
            yield tap

    def starting_near(self, z: Any) -> AbstractContextManager[Any]:
        """Within the context the forward solve starts from z, unless a call says otherwise."""
        return self._holding("_near", z)

    def pinning(self, uses: Uses) -> AbstractContextManager[Uses]:
        """Within the context the layer's output is pinned at its fixed point (see `pinned`)."""
        return self._holding("_uses", uses)

    @contextmanager
    def _holding(self, name: str, value: Any) -> Generator[Any, None, None]:
        setattr(self, name, value)
        try:
            yield value
        finally:
            setattr(self, name, None)

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


class Tap:
    """Stands in for a DEQ layer while its model is linearised: gives z, keeps f(z, x).

    Attributes:
        z: What the layer returns.
        fz: What `evaluate` made of it.
    """

    def __init__(self, z: Any) -> None:
        self.z = z
        self.fz: Any = None

    def record(self, block: nn.Module, *inputs: Any, **shared: Any) -> Any:
        """Evaluate the block.

        Returns:
            z, in place of a fixed point.

        Raises:
            ValueError: If the model calls the layer more than once.
        """
        if self.fz is not None:
            raise ValueError("the model calls its DEQ layer more than once in one forward pass.")
        self.fz = self.evaluate(block, inputs, shared)
        return self.z

    def evaluate(self, block: nn.Module, inputs: tuple[Any, ...], shared: dict[str, Any]) -> Any:
        """Return f(z, x)."""
        return block(self.z, *inputs, **shared)


def layers_of(model: nn.Module) -> list[DEQ]:
    """Return the DEQ layers of a model."""
    return [module for module in model.modules() if isinstance(module, DEQ)]


def find_deq(model: nn.Module) -> DEQ:
    """Return the one DEQ layer of a model.

    Raises:
        ValueError: If the model has none or several.
    """
    layers = layers_of(model)
    if len(layers) != 1:
        raise ValueError(f"model must contain exactly one DEQ layer, found {len(layers)}.")
    return layers[0]
