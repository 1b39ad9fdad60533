"""The command line's models: encoder, DEQ layer, readout, small enough for the dense DARE.

The exact minibatch step solves a DARE of batch x state size, so the state is kept small and the
encoder brings the image down to it.
"""

from collections.abc import Sequence

import torch
from torch import nn

from deqlqr.blocks import ConvBlock, DenseBlock
from deqlqr.deq import DEQ

MODELS = ("dense", "conv")


def make_model(name: str, image: Sequence[int], classes: int, *, seed: int = 0) -> nn.Module:
    """Return a freshly initialised model for images (channels, height, width).

    Args:
        name: `"dense"`: a tanh `DenseBlock` with 16 states behind one convolution;
            `"conv"`: the thesis' toy `ConvBlock` with 12 inner channels, on a state of
            8 channels and 2 x 2 pixels.
        image: Shape of one image; at least 8 x 8.
        classes: Number of outputs.
        seed: Of the initial parameters.

    Raises:
        ValueError: If the name is unknown, the image too small, or the seed out of range.
    """
    check_seed(seed)
    if name not in MODELS:
        raise ValueError(f"model must be one of {MODELS}, got {name!r}.")
    if min(image[1:]) < 8:
        raise ValueError(f"image must be at least 8 x 8, got {image}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _dense(image, classes) if name == "dense" else _conv(image, classes)


def check_seed(seed: int) -> None:
    """Refuse a seed that torch's generators do not take.

    Raises:
        ValueError: If it is no whole number in [0, 2^32).
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be a whole number in [0, 2^32), got {seed!r}.")


def _dense(image: Sequence[int], classes: int, states: int = 16) -> nn.Module:
    encoder = nn.Sequential(
        nn.Conv2d(image[0], 8, 3, padding=1), nn.Tanh(), nn.AdaptiveMaxPool2d(4), nn.Flatten()
    )
    return nn.Sequential(encoder, DEQ(DenseBlock(states, 128)), nn.Linear(states, classes))


def _conv(image: Sequence[int], classes: int, channels: int = 8) -> nn.Module:
    pooled = 6 if min(image[1:]) >= 16 else 4
    encoder = nn.Sequential(
        nn.Conv2d(image[0], 12, pooled - 1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(pooled),
        nn.Conv2d(12, channels, pooled - 1),
    )
    return nn.Sequential(
        encoder, DEQ(ConvBlock(channels)), nn.Flatten(), nn.Linear(4 * channels, classes)
    )
