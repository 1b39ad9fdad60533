"""The DEQ layer: z* = f(z*, x) forward, and two exact backward paths.

With g the cotangent of z* and A = df/dz at z*, the gradient of the equilibrium is

    (D1)  lam = g + A' lam                      the costate of the LQR with P = 0, i.e. (R2)
    (D2)  cotangent of the controls = B' lam    = -u, u of (R3) with R = I (theorem 4.2.1)

`backward="implicit"` solves (D1) with the layer's fixed-point solver, from products with A' only.
`backward="lqr"` forms A, builds the LQR of theorem 4.2.1 and takes lam from its steady state.
Both are exact; higher derivatives come from applying the same rule to (D1) itself, which is again
a fixed-point equation.

Source: Bai, Kolter and Koltun (2019), arXiv:1909.01377; thesis section 2.4.1 and theorem 4.2.1.
"""

import math
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deqlqr._checks import choice
from deqlqr.fixed_point import FixedPointSolution, Map, Solver, fixed_point, make_solver
from deqlqr.lqr import LQR
from deqlqr.solution import ConvergenceError
from deqlqr.steady_state import steady_state

Backward = Literal["implicit", "lqr"]
OnFailure = Literal["raise", "warn", "return"]
SolveAdjoint = Callable[[Map, Tensor], Tensor]


class DEQ(nn.Module):
    """Deep-equilibrium layer around a residual block f(z, x).

    The state starts from zero. Its shape is that of x, unless `state_shape` is given or the block
    has a method `state_shape(x)` that returns the shape of one sample's state.

    Args:
        block: Any module f(z, x) whose output has the shape of z. Samples must be independent.
        solver: A solver object or its name (see `fixed_point`), used forward and backward.
        tol: Tolerance (FP1) of both solves; `None` takes 1e-5 in float32, 1e-10 in float64.
        max_steps: Limit on evaluations of both solves.
        backward: Which path autograd takes: `"implicit"` (adjoint solve) or `"lqr"` (theorem
            4.2.1; forms the dense A of every sample).
        on_failure: What a sample without a fixed point does, forward and backward: `"raise"` a
            `ConvergenceError`, `"warn"`, or `"return"` silently (read `layer.solution`).
        state_shape: Shape of one sample's state.

    Attributes:
        solution: The `FixedPointSolution` of the last forward solve, or `None`.
        backward_solution: The same of the last adjoint solve (`"implicit"` only).

    Raises:
        ValueError: If an option is unknown or `block` is not a module.

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
        backward: Backward = "implicit",
        on_failure: OnFailure = "raise",
        state_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(block, nn.Module):
            raise ValueError(f"block must be an nn.Module f(z, x), got {type(block).__name__}.")
        self.block = block
        self.solver = make_solver(solver, tol, max_steps)
        self.backward = choice("backward", backward, get_args(Backward))
        self.on_failure = choice("on_failure", on_failure, get_args(OnFailure))
        self.state_shape = None if state_shape is None else tuple(state_shape)
        self.solution: FixedPointSolution | None = None
        self.backward_solution: FixedPointSolution | None = None
        self._tap: Tap | None = None

    def forward(self, x: Tensor, z0: Tensor | None = None) -> Tensor:
        """Return z* (batch, *state) for the injection x (batch, ...).

        Args:
            x: Injection, handed to the block as its second argument.
            z0: Start of the forward solve; zeros if `None`. It carries no gradient.

        Returns:
            z*, certified by `solution`.

        Raises:
            ValueError: If the block changes the shape of z, or z0 has another shape.
            ConvergenceError: If a sample has no fixed point and `on_failure` is `"raise"`.
        """
        if self._tap is not None:
            return self._tap.record(self.block, x)
        start = self.initial_state(x) if z0 is None else z0
        if start.shape[0] != x.shape[0]:
            raise ValueError(f"z0 must have batch size {x.shape[0]}, got {start.shape[0]}.")
        solve = lambda z: self._checked(z, x)
        self.solution = fixed_point(solve, start, solver=self.solver, throw=False)
        self._report(self.solution, "fixed point of the block")
        named = {name: p for name, p in self.block.named_parameters() if p.requires_grad}

        def f(z: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
            return functional_call(self.block, dict(zip(named, parameters, strict=True)), (z, x))

        return equilibrium(f, self.solution.value, (x, *named.values()), self._solve_adjoint)

    def initial_state(self, x: Tensor) -> Tensor:
        """Return the zero state (batch, *state) that belongs to the injection x."""
        if self.state_shape is not None:
            shape = self.state_shape
        elif callable(own := getattr(self.block, "state_shape", None)):
            shape = tuple(own(x))
        else:
            shape = tuple(x.shape[1:])
        return x.new_zeros(x.shape[0], *shape)

    @contextmanager
    def tapped(self, z: Tensor) -> Generator["Tap", None, None]:
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

    def _checked(self, z: Tensor, x: Tensor) -> Tensor:
        fz = self.block(z, x)
        if not isinstance(fz, Tensor) or fz.shape != z.shape:
            got = tuple(fz.shape) if isinstance(fz, Tensor) else type(fz).__name__
            raise ValueError(
                f"block must return f(z, x) with the shape of z: expected {tuple(z.shape)}, got "
                f"{got}. If the state differs in shape from the input, give DEQ state_shape=... "
                "or the block a method state_shape(x)."
            )
        return fz

    def _solve_adjoint(self, vjp: Map, cotangent: Tensor) -> Tensor:
        if self.backward == "lqr":
            return lqr_costate(vjp, cotangent)
        step = lambda lam: cotangent + vjp(lam)  # (D1)
        # The cotangent sets the scale of (D1); at unit scale (FP1) is a relative test.
        scale = torch.linalg.vector_norm(cotangent.flatten(1), dim=-1)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        scale = scale.view(-1, *[1] * (cotangent.dim() - 1))
        unit = lambda lam: step(lam * scale) / scale
        found = fixed_point(unit, cotangent / scale, solver=self.solver, throw=False)
        self.backward_solution = found
        self._report(found, "adjoint (D1) of the block")
        return found.value * scale

    def _report(self, solution: FixedPointSolution, what: str) -> None:
        if self.on_failure == "raise":
            solution.raise_if_failed(what)
        elif self.on_failure == "warn":
            try:
                solution.raise_if_failed(what)
            except ConvergenceError as error:
                warnings.warn(str(error), RuntimeWarning, stacklevel=3)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the last solutions out of copies and pickles."""
        return {**super().__getstate__(), "solution": None, "backward_solution": None}


class Tap:
    """Stands in for a DEQ layer while its model is linearised: gives z, keeps f(z, x)."""

    def __init__(self, z: Tensor) -> None:
        self.z = z
        self.fz: Tensor | None = None

    def record(self, block: nn.Module, x: Tensor) -> Tensor:
        """Evaluate the block at the tap's state.

        Returns:
            That state, in place of a fixed point.

        Raises:
            ValueError: If the model calls the layer more than once.
        """
        if self.fz is not None:
            raise ValueError("the model calls its DEQ layer more than once in one forward pass.")
        self.fz = block(self.z, x)
        return self.z


def equilibrium(
    f: Callable[..., Tensor], z: Tensor, inputs: Sequence[Tensor], solve_adjoint: SolveAdjoint
) -> Tensor:
    """Return the fixed point z with the gradient of the equilibrium in its graph.

    Args:
        f: `(z, *inputs) -> f(z)`, differentiable in every argument.
        z: Fixed point of `f(., *inputs)`, detached.
        inputs: All tensors the fixed point depends on and that may need a gradient.
        solve_adjoint: `(vjp, cotangent) -> lam` that solves (D1).
    """
    return _Equilibrium.apply(f, z, solve_adjoint, *inputs)


class _Equilibrium(torch.autograd.Function):
    """Forward hands z* through; backward is (D1), (D2).

    Under `create_graph` lam is itself an equilibrium, of lam = g + A' lam with the inputs g, z*
    and those of f, so derivatives of every order are exact.
    """

    @staticmethod
    def forward(f: Callable, z: Tensor, solve_adjoint: SolveAdjoint, *inputs: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.f, _, ctx.solve_adjoint, *tensors = inputs
        ctx.save_for_backward(output, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        (g,) = cotangents
        saved = ctx.saved_tensors
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views: derivatives with respect to them are partial, yet they keep their history,
            # so that a second derivative reaches the inputs through z* too.
            z, *inputs = (t.view_as(t) if t.requires_grad else t for t in saved)
            if not z.requires_grad:
                z.requires_grad_()
            fz = ctx.f(z, *inputs)

        def vjp(lam: Tensor) -> Tensor:
            return torch.autograd.grad(fz, z, lam, retain_graph=True)[0]

        with torch.no_grad():
            lam = ctx.solve_adjoint(vjp, g.detach())
        if differentiable:
            adjoint = lambda lam, g, z, *inputs: g + _vjp_in_z(ctx.f, lam, z, *inputs)
            lam = equilibrium(adjoint, lam, (g, z, *inputs), ctx.solve_adjoint)
        wanted = [t for t in inputs if t.requires_grad]
        grads = iter(
            torch.autograd.grad(fz, wanted, lam, create_graph=differentiable, allow_unused=True)
            if wanted
            else ()
        )  # (D2)
        return None, None, None, *(next(grads) if t.requires_grad else None for t in inputs)


def _vjp_in_z(f: Callable[..., Tensor], lam: Tensor, z: Tensor, *inputs: Tensor) -> Tensor:
    """Return A' lam, differentiable in every argument."""
    with torch.enable_grad():
        at = z.view_as(z) if z.requires_grad else z.detach().requires_grad_()
        return torch.autograd.grad(f(at, *inputs), at, lam, create_graph=True)[0]


def lqr_costate(vjp: Map, cotangent: Tensor) -> Tensor:
    """Return lam of (D1) as the costate of the LQR with Q = 0, M = 0, R = I (theorem 4.2.1).

    Args:
        vjp: `lam -> A' lam`, batched; it is called once per state component to form A.
        cotangent: a, shape `(batch, *state)`.

    Raises:
        ConvergenceError: If the LQR has no steady state, or the samples are not independent.
    """
    batch, n = cotangent.shape[0], math.prod(cotangent.shape[1:])
    eye = torch.eye(n, dtype=cotangent.dtype, device=cotangent.device)
    rows = [vjp(e.expand(batch, n).reshape(cotangent.shape)) for e in eye]
    A = torch.stack([row.reshape(batch, n) for row in rows], dim=-2)
    # B enters (R2) only through P, which is zero: one control is enough to state the problem.
    zeros = A.new_zeros
    lqr = LQR(
        A=A,
        B=zeros(batch, n, 1),
        Q=zeros(batch, n, n),
        R=torch.ones_like(zeros(batch, 1, 1)),
        M=zeros(batch, 1, n),
        a=cotangent.reshape(batch, n),
        b=zeros(batch, 1),
    )
    lam = steady_state(lqr).lam.reshape(cotangent.shape)
    residual = float((cotangent + vjp(lam) - lam).norm())
    scale = float(lam.norm()) + float(cotangent.norm())
    if not residual <= 1e3 * torch.finfo(lam.dtype).eps * n * max(scale, 1e-30):
        raise ConvergenceError(
            f"LQR backward path: (D1) holds only to {residual:.2e}; the block mixes the samples "
            "of a batch (batch normalisation in training mode?), or I - A is singular."
        )
    return lam


def find_deq(model: nn.Module) -> DEQ:
    """Return the one DEQ layer of a model.

    Raises:
        ValueError: If the model has none or several.
    """
    layers = [module for module in model.modules() if isinstance(module, DEQ)]
    if len(layers) != 1:
        raise ValueError(f"model must contain exactly one DEQ layer, found {len(layers)}.")
    return layers[0]
