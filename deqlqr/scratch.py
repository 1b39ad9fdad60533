"""Memory that a solve needs for itself, on the CPU kept from one solve to the next.

An allocator gives large blocks back to the system, and the pages that come in their place cost
more than what is written to them: for the states of a convolution up to half the time of its
evaluations. On a GPU torch keeps blocks by itself.
"""

import contextlib
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

_LEAST = 2**18  # bytes from which a block is worth keeping


class Scratch:
    """Tensors in one block of memory, which is kept for others when the object goes.

    Of blocks that nobody uses one is kept, the last.

    Attributes:
        tensors: The tensors; their content is arbitrary.
    """

    _kept: ClassVar[list[Tensor]] = []

    def __init__(self, like: Tensor, *shapes: tuple[int, ...], dtype: torch.dtype) -> None:
        """Take memory for tensors of some shapes and one dtype, on the device of `like`."""
        sizes = [prod(shape) for shape in shapes]
        size = sum(sizes) * dtype.itemsize
        self._block: Tensor | None = None
        if like.device.type != "cpu" or type(like) is not Tensor or size < _LEAST:
            self.tensors = [like.new_empty(shape, dtype=dtype) for shape in shapes]
            return
        with contextlib.suppress(IndexError):
            self._block = self._kept.pop()
        if self._block is None or len(self._block) < size:
            with torch.inference_mode(False):
                self._block = torch.empty(size, dtype=torch.uint8)
        parts = self._block[:size].view(dtype).split(sizes)
        self.tensors = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def __del__(self) -> None:
        """Keep the block, in place of the one that was kept."""
        if self._block is not None:
            self._kept[:] = [self._block]
