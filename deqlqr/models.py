"""The command line's models: encoder, DEQ layer, readout.

The exact minibatch step by the dense DARE solves a problem of batch x state size, so in two of them
the state is small and the encoder brings the image down to it.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from deqlqr._checks import choice
from deqlqr.blocks import ConvBlock, DenseBlock
from deqlqr.deq import DEQ

SMALL_MODELS = ("dense", "conv")
MODELS = (*SMALL_MODELS, "dense-large", "dense-free", "conv-large")
_LOOSE = 1e-3


def make_model(name: str, shape: Sequence[int], outputs: int, *, seed: int = 0) -> nn.Module:
    """Return a freshly initialised model for images (channels, height, width) or vectors (inputs,).

    Args:
        name: `"dense"`: a tanh `DenseBlock`, for images with 16 states behind one convolution, for
            vectors with 32 states and no bound on its norm; `"conv"`: the thesis' toy `ConvBlock`
            with 12 inner channels, on a state of 8 channels and 2 x 2 pixels; `"dense-large"`: a
            `DenseBlock` with 87 states straight from the pixels; `"conv-large"`: the toy block on
            8 channels at a quarter of the resolution. The large ones solve to 1e-3.
        shape: Shape of one sample; images at least 8 x 8.
        outputs: Number of outputs.
        seed: Of the initial parameters.

    Raises:
        ValueError: If the name is unknown, the shape does not fit, or the seed is out of range.
    """
    check_seed(seed)
    choice("model", name, MODELS)
    image = len(shape) == 3
    if image and min(shape[1:]) < 8:
        raise ValueError(f"shape of an image must be at least 8 x 8, got {tuple(shape)}.")
    if not image and (len(shape) != 1 or name != "dense"):
        raise ValueError(f"model {name!r} takes images, got samples of shape {tuple(shape)}.")
    makers = {
        "dense": _dense,
        "conv": _conv,
        "dense-large": _dense_large,
        "dense-free": _dense_free,
        "conv-large": _conv_large,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return (makers[name] if image else _surface)(shape, outputs)


def check_seed(seed: int) -> None:
    """Refuse a seed that torch's generators do not take.

    Raises:
        ValueError: If it is no whole number in [0, 2^32).
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be a whole number in [0, 2^32), got {seed!r}.")


def _dense(image: Sequence[int], outputs: int, states: int = 16) -> nn.Module:
    encoder = nn.Sequential(
        nn.Conv2d(image[0], 8, 3, padding=1), nn.Tanh(), nn.AdaptiveMaxPool2d(4), nn.Flatten()
    )
    return nn.Sequential(encoder, DEQ(DenseBlock(states, 128)), nn.Linear(states, outputs))


def _conv(image: Sequence[int], outputs: int, channels: int = 8) -> nn.Module:
    pooled = 6 if min(image[1:]) >= 16 else 4
    encoder = nn.Sequential(
        nn.Conv2d(image[0], 12, pooled - 1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(pooled),
        nn.Conv2d(12, channels, pooled - 1),
    )
    return nn.Sequential(
        encoder, DEQ(ConvBlock(channels)), nn.Flatten(), nn.Linear(4 * channels, outputs)
    )


def _dense_large(image: Sequence[int], outputs: int, states: int = 87) -> nn.Module:
    block = DenseBlock(states, math.prod(image))
    return nn.Sequential(nn.Flatten(), DEQ(block, tol=_LOOSE), nn.Linear(states, outputs))


def _dense_free(image: Sequence[int], outputs: int, states: int = 87) -> nn.Module:
    block = DenseBlock(states, math.prod(image), max_norm=None)
    return nn.Sequential(nn.Flatten(), DEQ(block, tol=_LOOSE), nn.Linear(states, outputs))


def _conv_large(image: Sequence[int], outputs: int, channels: int = 8) -> nn.Module:
    encoder = nn.Sequential(
        nn.Conv2d(image[0], channels, 5, stride=2, padding=2), nn.ReLU(), nn.MaxPool2d(2)
    )
    height, width = ((((side + 1) // 2) // 2) for side in image[1:])
    readout = nn.Linear(channels * height * width, outputs)
    return nn.Sequential(encoder, DEQ(ConvBlock(channels), tol=_LOOSE), nn.Flatten(), readout)


def _surface(shape: Sequence[int], outputs: int, states: int = 32) -> nn.Module:
    block = DenseBlock(states, max_norm=None)
    return nn.Sequential(nn.Linear(shape[0], states), DEQ(block), nn.Linear(states, outputs))
