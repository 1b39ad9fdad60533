"""Equilibrium warm-up: a DEQ as a few iterations of its block, for the first steps of training.

    (D5)  z_{k+1} = f(z_k, x),   k = 0, ..., depth - 1,   differentiated through all of them

An untrained block may be far from a good fixed point, or have none; the shallow network with the
same weights trains from anywhere, and leaves weights that a fixed-point solve can start from.

Source: S. Bai, J. Z. Kolter, V. Koltun (2019), Deep equilibrium models, arXiv:1909.01377.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import nn

from deqlqr._checks import count
from deqlqr.deq import DEQ


class Unrolled(nn.Module):
    """A few iterations of a DEQ layer's block, from the layer's own start (D5).

    Args:
        layer: The layer; its block is shared.
        depth: Evaluations of the block.

    Raises:
        ValueError: If `depth` is below 1.

    Example:
        >>> import torch
        >>> from deqlqr.blocks import DenseBlock
        >>> layer, x = DEQ(DenseBlock(4)), torch.ones(3, 4)
        >>> bool((Unrolled(layer, 200)(x) - layer(x)).norm() < 1e-3)
        True
    """

    def __init__(self, layer: DEQ, depth: int) -> None:
        super().__init__()
        self.block, self.depth = layer.block, count("depth", depth)
        self._start = layer.initial_state

    def forward(self, *inputs: Any, z0: Any = None, key: Any = None, **shared: Any) -> Any:
        """Return z after `depth` evaluations; takes what the layer takes, `key` has no effect."""
        z = self._start(*inputs) if z0 is None else z0
        for _ in range(self.depth):
            z = self.block(z, *inputs, **shared)
        return z


@contextmanager
def unrolled(model: nn.Module, depth: int) -> Generator[None, None, None]:
    """Within the context every DEQ layer inside the model is `Unrolled`; the weights are the same.

    Any optimizer steps as on an explicit network. Of the routes of `ImplicitNGD`, `"dare"` and
    `"cyclic"` need the layer itself.

    Args:
        model: A model that holds DEQ layers.
        depth: Evaluations of a block.

    Raises:
        ValueError: If the model is itself a DEQ layer, or `depth` is below 1.
    """
    if isinstance(model, DEQ):
        raise ValueError(
            "model must hold its DEQ layer, got the layer itself: wrap it in a module."
        )
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, DEQ)
    ]
    made = [(parent, name, child, Unrolled(child, depth)) for parent, name, child in places]
    for parent, name, child, shallow in made:
        setattr(parent, name, shallow.train(child.training))
    try:
        yield
    finally:
        for parent, name, child, _ in made:
            setattr(parent, name, child)
