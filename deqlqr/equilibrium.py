"""The derivative of a fixed point z = f(z, *tensors), to every order, both ways, under torch.func.

    (D1)  lam = g + A' lam,   (D2)  cotangents of the tensors:  f_t' lam
    (D4)  dz = A dz + f_t dt  for tangents dt

(D1) and (D4) are fixed points again, linear ones, of maps made from f by one vector-Jacobian or
Jacobian-vector product. They go through the same function, so their derivatives are exact too.
Every solve happens in `forward`, which torch.func calls with plain tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

from deqlqr._checks import transformed
from deqlqr._linalg import batch_first, not_finite
from deqlqr.adjoint import Neumann
from deqlqr.resolvent import Product

Flat = Callable[..., Tensor]
Solve = Callable[[Flat, Tensor, tuple[Tensor, ...]], Tensor]
SolveLinear = Callable[[Product, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """z = f(z, *tensors), with z (batch, n).

    Attributes:
        f: Deterministic and differentiable in every floating-point argument.
        per_sample: For each tensor whether its first dimension is the batch; the others are
            shared by all samples.
        solve: `(f, z0, tensors)` to z, in plain tensors; f is the problem's own, or several of it
            side by side, which want the whole batch.
        solve_linear: `(product, right)` to x = right + product(x).
        neumann: The truncated series to be differentiated instead of (D1), if any.
    """

    f: Flat
    per_sample: tuple[bool, ...]
    solve: Solve
    solve_linear: SolveLinear
    neumann: Neumann | None = None

    def adjoint(self) -> "Problem":
        """Return (D1) as a problem in lam with the tensors g, z and those of f."""

        def f(lam: Tensor, g: Tensor, z: Tensor, *tensors: Tensor) -> Tensor:
            value, pull = pullback(lambda z: self.f(z, *tensors), z)
            return g + pull(lam.to(value.dtype))[0]

        def solve(given: Flat, lam: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
            g, z, *rest = tensors
            if given is f:
                return self.solve_linear(_evaluated(self.f, z, rest).product, g)
            return self.solve_linear(*_affine(given, lam, tensors))

        return replace(self, f=f, per_sample=(True, True, *self.per_sample), solve=solve)

    def tangent(self, floating: list[bool]) -> "Problem":
        """Return (D4) as a problem in dz with the tensors z, those of f, and their tangents."""
        count = len(self.per_sample)

        def f(dz: Tensor, z: Tensor, *tensors: Tensor) -> Tensor:
            return _push(self.f, z, tensors[:count], dz, tensors[count:], floating)

        def solve(given: Flat, dz: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
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
            z = problem.solve(problem.f, z0, tensors)
        return z.clone() if any(z is t for t in (z0, *tensors)) else z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.problem, _, *tensors = inputs
        ctx.save_for_backward(output, *tensors)
        ctx.save_for_forward(output, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        (g,) = cotangents
        if is_legacy_batchedtensor(g):
            raise RuntimeError(
                "the DEQ layer cannot be differentiated with is_grads_batched=True; use torch.vmap "
                "over torch.func.vjp instead."
            )
        problem, (z, *tensors) = ctx.problem, ctx.saved_tensors
        wanted = [
            i for i, need in enumerate(ctx.needs_input_grad[2:]) if need
        ]  # integers have no gradient and need none
        if not torch.is_grad_enabled() and not transformed():
            at = _evaluated(problem.f, z, tensors, wanted)
            lost = not_finite(at.fz.detach())
            lost = None if lost is None else lost & (g == 0).all(-1)
            # 0 times NaN would reach shared parameters.
            if lost is not None and lost.any() and not lost.all():
                z, *tensors = _filled(lost, (z, *tensors), (True, *problem.per_sample))
                at = _evaluated(problem.f, z, tensors, wanted)
            _require_complete(at)
            lam = problem.solve_linear(at.product, g)
            leaves = [at.leaves[i] for i in wanted]
            grads = torch.autograd.grad(at.fz, leaves, lam.to(at.fz.dtype), allow_unused=True)
            # (D2)
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
        size, own = info.batch_size, problem.per_sample
        z0 = batch_first(z0, z_dim, size)
        batch = z0.shape[1]
        axes = [0 if mine or dim is not None else None for dim, mine in zip(dims, own, strict=True)]
        mapped = [
            t if axis is None else batch_first(t, dim, size).contiguous()
            for t, dim, axis in zip(tensors, dims, axes, strict=True)
        ]
        folded = [t.flatten(0, 1) if mine else t for t, mine in zip(mapped, own, strict=True)]
        many = _with_many(problem, size, axes)
        z = _Equilibrium.apply(many, z0.contiguous().flatten(0, 1), *folded)
        return z.unflatten(0, (size, batch)), 0


def _with_many(problem: Problem, size: int, axes: list[int | None]) -> Problem:
    """Return `size` problems side by side; samples of different ones never see each other."""

    def f(z: Tensor, *tensors: Tensor) -> Tensor:
        groups = [
            t.unflatten(0, (size, -1)) if own else t
            for t, own in zip(tensors, problem.per_sample, strict=True)
        ]
        # "same": the groups are one solve, and its random numbers are held.
        many = torch.vmap(problem.f, in_dims=(0, *axes), randomness="same")
        return many(z.unflatten(0, (size, -1)), *groups).flatten(0, 1)

    return replace(problem, f=f)


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


class _Evaluation(NamedTuple):
    """f evaluated once: its graph, and what hangs on it."""

    fz: Tensor
    z: Tensor
    leaves: list[Tensor]

    def product(self, lam: Tensor) -> Tensor:
        """Return A' lam."""
        if not self.fz.requires_grad:
            return torch.zeros_like(lam)
        (grad,) = torch.autograd.grad(
            self.fz, self.z, lam.to(self.fz.dtype), retain_graph=True, allow_unused=True
        )
        return torch.zeros_like(lam) if grad is None else grad.to(lam.dtype)


def _evaluated(f: Flat, z: Tensor, tensors: Any, wanted: list[int] | tuple[()] = ()) -> _Evaluation:
    """Evaluate f once, with a graph."""
    with torch.enable_grad():
        at = z.detach().requires_grad_()
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        return _Evaluation(f(at, *leaves), at, leaves)


def _filled(lost: Tensor, tensors: Any, per_sample: tuple[bool, ...]) -> list[Tensor]:
    """Return the tensors with the samples `lost` replaced by one that is not."""
    good = int((~lost).nonzero()[0, 0])
    wide = lambda t: lost.view(-1, *[1] * (t.dim() - 1))
    return [
        torch.where(wide(t), t[good], t) if own else t
        for t, own in zip(tensors, per_sample, strict=True)
    ]


def _require_complete(at: _Evaluation) -> None:
    """Refuse a block whose output depends on a tensor that would get no gradient.

    Raises:
        RuntimeError: If f(z) has a leaf in its graph that is no argument, parameter or buffer.
    """
    known = {id(leaf) for leaf in (at.z, *at.leaves)}
    nodes, seen = [at.fz.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            raise RuntimeError(
                "the block uses a tensor that requires a gradient but is neither an argument nor "
                f"a parameter (shape {tuple(variable.shape)}, or made from it): it would get "
                "none. Pass it to the layer as an argument."
            )
        nodes.extend(next_node for next_node, _ in node.next_functions)


def pullback(
    f: Callable[..., Any], *primals: Tensor
) -> tuple[Any, Callable[..., tuple[Tensor, ...]]]:
    """Return f(*primals) and the function that pulls cotangents of it back to the primals."""
    value, pull = torch.func.vjp(f, *primals)  # type: ignore[misc]
    return value, pull


def pullback_at(f: Flat, z: Tensor, tensors: Any) -> Product:
    """Return lam -> A' lam at z, from one evaluation of f; not differentiable."""
    return _evaluated(f, z, tensors).product


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

    primals, tangents = (z, *real), (dz.to(z.dtype), *moving)
    if not forward_ad._current_level >= 0 or transformed():
        return torch.func.jvp(of_real, primals, tangents)[1].to(z.dtype)
    # Forward-mode levels do not nest: the transposed map, transposed, is the map.
    fz, pull = pullback(of_real, *primals)
    _, push = pullback(lambda c: pull(c), torch.zeros_like(fz))
    return push(tangents)[0].to(z.dtype)
