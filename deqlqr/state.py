"""States of any shape, one tensor or several, as the (batch, n) that solvers work on."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StateShape:
    """Shape of one sample's state: of one tensor, or of each of a tuple of tensors.

    Attributes:
        shapes: One shape for each tensor.
        single: The state is a tensor, not a tuple.
    """

    shapes: tuple[tuple[int, ...], ...]
    single: bool

    @staticmethod
    def of(z: Any, name: str = "z") -> "StateShape":
        """Return the shape of z, a tensor (batch, *state) or a tuple of such.

        Raises:
            ValueError: If z is neither, or its tensors differ in batch, dtype or device.
        """
        parts = (z,) if isinstance(z, Tensor) else z
        fits = isinstance(parts, tuple) and len(parts) > 0 and all(
            isinstance(part, Tensor) and part.dim() > 0 and part.is_floating_point()
            for part in parts
        )  # fmt: skip
        if not fits:
            raise ValueError(
                f"{name} must be a floating-point tensor (batch, *state) or a tuple of such, "
                f"got {_described(z)}."
            )
        if len({(part.shape[0], part.dtype, part.device) for part in parts}) > 1:
            raise ValueError(
                f"{name} must have one batch size, dtype and device, got {_described(z)}."
            )
        return StateShape(tuple(tuple(part.shape[1:]) for part in parts), isinstance(z, Tensor))

    @staticmethod
    def declared(shape: Any) -> "StateShape":
        """Return what the option `state_shape` says: a shape, or a tuple of shapes."""
        if isinstance(shape, int):
            shape = (shape,)
        several = len(shape) > 0 and not isinstance(shape[0], int)
        shapes = tuple(tuple(s) for s in shape) if several else (tuple(shape),)
        return StateShape(shapes, not several)

    @cached_property
    def size(self) -> int:
        """Number n of a sample's components."""
        return sum(math.prod(shape) for shape in self.shapes)

    def flatten(self, z: Any) -> Tensor:
        """Return z as (batch, n)."""
        if self.single:
            return z if z.dim() == 2 else z.reshape(z.shape[0], self.size)
        return torch.cat([part.flatten(1) for part in z], dim=1)

    def unflatten(self, flat: Tensor) -> Any:
        """Return the tensor or tuple that flat (batch, n) holds."""
        if self.single:
            shape = self.shapes[0]
            return flat if len(shape) == 1 else flat.reshape(flat.shape[0], *shape)
        parts = flat.split([math.prod(shape) for shape in self.shapes], dim=1)
        # Contiguous: torch 2.6 has norms that refuse a view of columns under torch.vmap.
        return tuple(
            part.reshape(flat.shape[0], *shape).clone(memory_format=torch.contiguous_format)
            for part, shape in zip(parts, self.shapes, strict=True)
        )

    def require(self, fz: Any, batch: int, what: str, hint: str = "") -> Tensor:
        """Return fz flattened.

        Raises:
            ValueError: If fz does not have this shape.
        """
        if self.single and isinstance(fz, Tensor) and fz.shape == (batch, *self.shapes[0]):
            return self.flatten(fz)
        parts = (fz,) if isinstance(fz, Tensor) else fz
        expected = [(batch, *shape) for shape in self.shapes]
        fits = (
            isinstance(fz, Tensor) == self.single
            and isinstance(parts, tuple)
            and all(isinstance(part, Tensor) for part in parts)
            and [tuple(part.shape) for part in parts] == expected
        )
        if not fits:
            wanted = expected[0] if self.single else expected
            raise ValueError(f"{what}: expected {wanted}, got {_described(fz)}.{hint}")
        return self.flatten(fz)


def _described(z: Any) -> str:
    if isinstance(z, Tensor):
        return f"{tuple(z.shape)}" if z.is_floating_point() else f"{z.dtype} of {tuple(z.shape)}"
    if isinstance(z, (tuple, list)):
        return f"{type(z).__name__} of " + ", ".join(_described(part) for part in z)
    return type(z).__name__
