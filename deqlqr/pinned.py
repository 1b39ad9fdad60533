"""A DEQ layer pinned at its fixed point: one evaluation of f in the graph stands for the solve.

    z = z*, with the derivative of  (I - A)^-1 f(z*, ., .)   in everything but z

First derivatives are exact, to any number of cotangents: (D1) is solved for each, from the
directions that earlier ones have left, or for several together. Differentiated once more with
respect to the cotangent, the pinned layer gives Jacobian-vector products, by (D4).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from deqlqr.adjoint import Implicit, make_adjoint
from deqlqr.call import Call
from deqlqr.resolvent import Product, Resolvent
from deqlqr.uses import Cut, Uses


def pinned(call: Call, uses: Uses) -> Any:
    """Solve a forward pass of a layer, and return z* in a graph of one evaluation.

    Args:
        call: The forward pass.
        uses: Records the parameters that the one evaluation uses, not those of the solve.

    Returns:
        z*, in the layer's shape.
    """
    with uses.pausing(), torch.no_grad():
        z = call.solve().detach().requires_grad_()
    uses.mark(z)
    fz = call.direct(z)
    pin = _Pin(call, z, fz, uses.cut)
    fixed = _AtFixedPoint.apply(fz, pin)
    if fixed.requires_grad:
        uses.pins.append((get_gradient_edge(fixed), pin))
    return call.shape.unflatten(fixed)


class _Pin:
    """(I - A')^-1 and (I - A)^-1 of one forward pass."""

    def __init__(self, call: Call, z: Tensor, fz: Tensor, cut: Cut) -> None:
        self.call, self.z, self.fz, self.cut = call, z, fz, cut
        self._solvers: dict[str, Resolvent] = {}
        self._pulled: tuple[Tensor, Tensor] | None = None

    def adjoint(self, g: Tensor) -> Tensor:
        """Return lam of (D1)."""
        return self._solve("adjoint", self._pull, g)

    def costates(self, cotangents: Sequence[Tensor], tol: float | None) -> Sequence[Tensor]:
        """Return lam of (D1) for several cotangents, for a tolerance in place of the layer's."""
        several = len(cotangents) > 1
        if not several or not isinstance(make_adjoint(self.call.layer.backward), Implicit):
            found = [self._solve("adjoint", self._pull, g, tol) for g in cotangents]
        else:
            right = torch.stack(list(cotangents)).transpose(0, 1)
            found = list(self._solve("adjoint", self._pull, right, tol).unbind(1))
        return [lam.to(self.fz.dtype) for lam in found]

    def tangent(self, right: Tensor) -> Tensor:
        """Return dz of (D4) for f_t dt = `right`."""
        return self._solve("tangent", self._push, right)

    def _pull(self, lam: Tensor) -> Tensor:
        """Return A' lam."""
        (grad,) = torch.autograd.grad(
            self.fz, self.z, lam.to(self.fz.dtype), retain_graph=True, materialize_grads=True
        )
        return grad.to(lam.dtype)

    def _push(self, dz: Tensor) -> Tensor:
        """Return A dz: the derivative of A'w with respect to w."""
        if self._pulled is None:
            with torch.enable_grad():
                w = torch.zeros_like(self.fz, requires_grad=True)
                (pulled,) = torch.autograd.grad(
                    self.fz, self.z, w, create_graph=True, materialize_grads=True
                )
            self._pulled = pulled, w
        pulled, w = self._pulled
        if not pulled.requires_grad:
            return torch.zeros_like(dz)
        (pushed,) = torch.autograd.grad(pulled, w, dz.to(pulled.dtype), retain_graph=True)
        return pushed.to(dz.dtype)

    def _solve(
        self, kind: str, product: Product, right: Tensor, rough: float | None = None
    ) -> Tensor:
        layer = self.call.layer
        adjoint = make_adjoint(layer.backward)
        if not isinstance(adjoint, Implicit):
            return self.call.solve_linear(product, right)
        if kind not in self._solvers:
            tol = layer.solver.tolerance(right.dtype)
            self._solvers[kind] = adjoint.resolvent(product, self.z.shape[1], tol)
        return self.call.solve_linear(product, right, self._solvers[kind], rough)


class _AtFixedPoint(torch.autograd.Function):
    """f(z*) -> z*; the cotangent goes through (D1)."""

    @staticmethod
    def forward(ctx: Any, fz: Tensor, pin: _Pin) -> Tensor:
        ctx.pin, ctx.dtype = pin, fz.dtype
        return pin.z.detach().clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        if ctx.pin.cut.on:
            return None, None
        return _Costate.apply(cotangents[0], ctx.pin).to(ctx.dtype), None


class _Costate(torch.autograd.Function):
    """g -> lam of (D1); its derivative is (D4)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, pin: _Pin) -> Tensor:
        ctx.pin = pin
        return pin.adjoint(g)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        return ctx.pin.tangent(cotangents[0]), None
