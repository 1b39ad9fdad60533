"""The derivative of a fixed point z = f(z, *tensors), to every order, both ways, under torch.func.

    (D1)  lam = g + A' lam,   (D2)  cotangents of the tensors:  f_t' lam
    (D4)  dz = A dz + f_t dt  for tangents dt

(D1) and (D4) are fixed points again, linear ones, of maps made from f by one vector-Jacobian or
Jacobian-vector product. They go through the same function, so their derivatives are exact too.
Every solve happens in `forward`, which torch.func calls with plain tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deqlqr._checks import transformed
from deqlqr._linalg import batch_first
from deqlqr.adjoint import Neumann
from deqlqr.resolvent import Product

Flat = Callable[..., Tensor]
Solve = Callable[[Flat, Tensor, tuple[Tensor, ...], bool], Tensor]
SolveLinear = Callable[[Product, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """z = f(z, *tensors), with z (batch, n).

    Attributes:
        f: Deterministic and differentiable in every floating-point argument.
        per_sample: For each tensor whether its first dimension is the batch; the others are
            shared by all samples.
        solve: `(f, z0, tensors, divisible)` to z, in plain tensors; `divisible` is false where f
            must be given the whole batch.
        solve_linear: `(product, right)` to x = right + product(x).
        neumann: The truncated series to be differentiated instead of (D1), if any.
        divisible: Whether f may be given a part of the batch.
    """

    f: Flat
    per_sample: tuple[bool, ...]
    solve: Solve
    solve_linear: SolveLinear
    neumann: Neumann | None = None
    divisible: bool = True

    def adjoint(self) -> "Problem":
        """Return (D1) as a problem in lam with the tensors g, z and those of f."""

        def f(lam: Tensor, g: Tensor, z: Tensor, *tensors: Tensor) -> Tensor:
            value, pull = pullback(lambda z: self.f(z, *tensors), z)
            return g + pull(lam.to(value.dtype))[0]

        def solve(given: Flat, lam: Tensor, tensors: tuple[Tensor, ...], divisible: bool) -> Tensor:
            g, z, *rest = tensors
            if given is f:
                return self.solve_linear(_pullback(self.f, z, rest)[0], g)
            return self.solve_linear(*_affine(given, lam, tensors))

        return replace(self, f=f, per_sample=(True, True, *self.per_sample), solve=solve)

    def tangent(self, floating: list[bool]) -> "Problem":
        """Return (D4) as a problem in dz with the tensors z, those of f, and their tangents."""
        count = len(self.per_sample)

        def f(dz: Tensor, z: Tensor, *tensors: Tensor) -> Tensor:
            return _push(self.f, z, tensors[:count], dz, tensors[count:], floating)

        def solve(given: Flat, dz: Tensor, tensors: tuple[Tensor, ...], divisible: bool) -> Tensor:
            return self.solve_linear(*_affine(given, dz, tensors))

        tangents = tuple(s for s, real in zip(self.per_sample, floating, strict=True) if real)
        return replace(self, f=f, per_sample=(True, *self.per_sample, *tangents), solve=solve)


def equilibrium(problem: Problem, z0: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
    """Return the fixed point from z0 (batch, n), differentiable in the tensors."""
    return _Equilibrium.apply(problem, z0, *tensors)


class _Equilibrium(torch.autograd.Function):
    """Forward solves; backward is (D1), (D2); jvp is (D4)."""

    @staticmethod
    def forward(problem: Problem, z0: Tensor, *tensors: Tensor) -> Tensor:
        with torch.no_grad():
            z = problem.solve(problem.f, z0, tensors, problem.divisible)
        return z.clone() if any(z is t for t in (z0, *tensors)) else z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.problem, _, *tensors = inputs
        ctx.save_for_backward(output, *tensors)
        ctx.save_for_forward(output, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        (g,) = cotangents
        problem, (z, *tensors) = ctx.problem, ctx.saved_tensors
        wanted = [
            i for i, need in enumerate(ctx.needs_input_grad[2:]) if need
        ]  # integers have no gradient and need none
        if not torch.is_grad_enabled() and not transformed():
            product, fz, leaves = _pullback(problem.f, z, tensors, wanted)
            lam = problem.solve_linear(product, g)
            grads = torch.autograd.grad(
                fz, [leaves[i] for i in wanted], lam.to(fz.dtype), allow_unused=True
            ) if wanted else ()  # (D2)  # fmt: skip
        else:
            lam = _differentiable_adjoint(problem, g, z, tensors)

            def of_wanted(*values: Tensor) -> Tensor:
                given = list(tensors)
                for i, value in zip(wanted, values, strict=True):
                    given[i] = value
                return problem.f(z, *given)

            fz, pull = pullback(of_wanted, *(tensors[i] for i in wanted))
            grads = pull(lam.to(fz.dtype))  # (D2)
        placed = dict(zip(wanted, grads, strict=True))
        return None, None, *(placed.get(i) for i in range(len(tensors)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        problem, (z, *tensors) = ctx.problem, ctx.saved_tensors
        floating = [t.is_floating_point() for t in tensors]
        moving = [
            torch.zeros_like(t) if dt is None else dt
            for t, dt, real in zip(tensors, tangents[2:], floating, strict=True)
            if real
        ]
        tangent = problem.tangent(floating)
        if problem.neumann is not None:
            dz = term = tangent.f(torch.zeros_like(z), z, *tensors, *moving)
            still = [torch.zeros_like(dt) for dt in moving]
            for _ in range(problem.neumann.terms):
                term = tangent.f(term, z, *tensors, *still)
                dz = dz + term
            return dz
        return _Equilibrium.apply(tangent, torch.zeros_like(z), z, *tensors, *moving)  # (D4)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, problem: Problem, z0: Tensor, *tensors: Tensor) -> tuple:
        _, z_dim, *dims = in_dims
        size = info.batch_size
        z0 = batch_first(z0, z_dim, size)
        batch = z0.shape[1]
        mapped = [
            t if dim is None and not own else batch_first(t, dim, size)
            for t, dim, own in zip(tensors, dims, problem.per_sample, strict=True)
        ]
        folded = [
            t.flatten(0, 1) if own else t for t, own in zip(mapped, problem.per_sample, strict=True)
        ]
        shared = [
            0 if dim is not None and not own else None
            for dim, own in zip(dims, problem.per_sample, strict=True)
        ]
        if any(dim is not None for dim in shared):
            problem = _with_many(problem, size, shared)
        z = _Equilibrium.apply(problem, z0.flatten(0, 1), *folded)
        return z.unflatten(0, (size, batch)), 0


def _with_many(problem: Problem, size: int, shared: list[int | None]) -> Problem:
    """Return the problem in which shared tensors differ between `size` groups of samples."""
    axes = [0 if own else dim for own, dim in zip(problem.per_sample, shared, strict=True)]

    def f(z: Tensor, *tensors: Tensor) -> Tensor:
        groups = [
            t.unflatten(0, (size, -1)) if own else t
            for t, own in zip(tensors, problem.per_sample, strict=True)
        ]
        many = torch.vmap(problem.f, in_dims=(0, *axes))
        return many(z.unflatten(0, (size, -1)), *groups).flatten(0, 1)

    return replace(problem, f=f, divisible=False)


def _differentiable_adjoint(
    problem: Problem, g: Tensor, z: Tensor, tensors: list[Tensor]
) -> Tensor:
    if problem.neumann is None:
        return _Equilibrium.apply(problem.adjoint(), torch.zeros_like(g), g, z, *tensors)  # (D1)
    fz, pull = pullback(lambda z: problem.f(z, *tensors), z)
    lam = term = g
    for _ in range(problem.neumann.terms):
        (term,) = pull(term.to(fz.dtype))
        lam = lam + term
    return lam  # (D3)


def _pullback(
    f: Flat, z: Tensor, tensors: Any, wanted: list[int] | tuple[()] = ()
) -> tuple[Product, Tensor, list[Tensor]]:
    """Evaluate f once; return products with A', f(z), and the leaves of the graph."""
    with torch.enable_grad():
        at = z.detach().requires_grad_()
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        fz = f(at, *leaves)

    def product(lam: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(
            fz, at, lam.to(fz.dtype), retain_graph=True, allow_unused=True
        ) if fz.requires_grad else (None,)  # fmt: skip
        return torch.zeros_like(lam) if grad is None else grad.to(lam.dtype)

    return product, fz, leaves


def pullback(f: Flat, *primals: Tensor) -> tuple[Tensor, Callable[..., tuple[Tensor, ...]]]:
    """Return f(*primals) and the function that pulls cotangents of it back to the primals."""
    value, pull = torch.func.vjp(f, *primals)  # type: ignore[misc]
    return value, pull


def pullback_at(f: Flat, z: Tensor, tensors: Any) -> Product:
    """Return lam -> A' lam at z, from one evaluation of f; not differentiable."""
    return _pullback(f, z, tensors)[0]


def _affine(f: Flat, zero: Tensor, tensors: Any) -> tuple[Product, Tensor]:
    """Return the linear part of x -> f(x, *tensors) and its value at zero."""
    right = f(zero, *tensors)
    return lambda v: f(v, *tensors) - right, right


def _push(
    f: Flat, z: Tensor, tensors: Any, dz: Tensor, moving: Any, floating: list[bool]
) -> Tensor:
    """Return the derivative of f along dz and the tangents of its floating-point tensors."""
    real = [t for t, yes in zip(tensors, floating, strict=True) if yes]

    def of_real(z: Tensor, *values: Tensor) -> Tensor:
        given = iter(values)
        return f(z, *(next(given) if yes else t for t, yes in zip(tensors, floating, strict=True)))

    return torch.func.jvp(of_real, (z, *real), (dz.to(z.dtype), *moving))[1].to(z.dtype)
