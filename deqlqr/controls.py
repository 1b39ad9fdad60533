"""The controls u: a model's trainable parameters as one vector, in a fixed order.

The order is that of `model.named_parameters()`, shared parameters once, frozen ones left out;
each parameter is flattened row by row.
"""

import math
from collections.abc import Mapping, Sequence
from copy import copy

import torch
from torch import Tensor, nn


class Controls:
    """Maps between the vector u and the parameters of a model.

    Attributes:
        names: Parameter names, in the order of u.
        shapes: Their shapes.
        m: Length of u.

    Raises:
        ValueError: If the model has no trainable parameter, or parameters of several dtypes or
            devices.
    """

    def __init__(self, model: nn.Module) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError("model has no trainable parameters.")
        kinds = {(p.dtype, p.device) for p in named.values()}
        if len(kinds) > 1:
            raise ValueError(f"model parameters must share one dtype and device, got {kinds}.")
        self.parameters = list(named.values())
        self.names = list(named)
        self.shapes = [p.shape for p in self.parameters]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.m = sum(self.sizes)
        self._none = self.parameters[0].detach().new_empty(0)

    @property
    def vector(self) -> Tensor:
        """A detached copy of u, shape `(m,)`."""
        return torch.cat([self._none, *(p.detach().reshape(-1) for p in self.parameters)])

    def part(self, which: Sequence[int]) -> "Controls":
        """Return some of the controls, by the numbers of their parameters."""
        part = copy(self)
        for name in ("parameters", "names", "shapes", "sizes"):
            setattr(part, name, [getattr(self, name)[i] for i in which])
        part.m = sum(part.sizes)
        return part

    def unflatten(self, u: Tensor) -> dict[str, Tensor]:
        """Return the parameters that u (m,) holds, by name; differentiable."""
        parts = u.split(self.sizes)
        return {
            name: part.view(shape)
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }

    def flatten(self, named: Mapping[str, Tensor]) -> Tensor:
        """Return u (m,) from tensors by name; a missing or `None` one counts as zero."""
        parts = []
        for name, p in zip(self.names, self.parameters, strict=True):
            value = named.get(name)
            parts.append(torch.zeros_like(p).reshape(-1) if value is None else value.reshape(-1))
        return torch.cat(parts)

    def pull(self, of: Tensor, cotangent: Tensor | None = None, *, again: bool = False) -> Tensor:
        """Return the gradient (m,) of a tensor, the graph kept.

        Args:
            of: What is differentiated.
            cotangent: Of its shape; may be left out for a scalar.
            again: Whether the gradient is to be differentiated in turn.
        """
        grads = torch.autograd.grad(
            of, self.parameters, cotangent, retain_graph=True, create_graph=again,
            allow_unused=True,
        )  # fmt: skip
        return self.flatten(dict(zip(self.names, grads, strict=True)))

    @torch.no_grad()
    def assign(self, u: Tensor) -> None:
        """Write u (m,) into the model's parameters in place."""
        for p, part in zip(self.parameters, u.split(self.sizes), strict=True):
            p.copy_(part.view_as(p))

    @torch.no_grad()
    def try_out(self, u: Tensor) -> None:
        """Write u (m,) like `assign`, unnoticed by graphs that hold the parameters.

        For trials: with the parameters put back as they were, such graphs are right again.
        """
        for p, part in zip(self.parameters, u.split(self.sizes), strict=True):
            p.data.copy_(part.view_as(p))
