"""The command line's models: encoder, DEQ layer, readout; and explicit networks.

The exact minibatch step by dense Riccati equations solves problems of batch x state size, so in
three of them the state is small and the first layers bring the image down to it.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from deqlqr._checks import choice
from deqlqr.blocks import ConvBlock, DenseBlock
from deqlqr.deq import DEQ
from deqlqr.monotone import MonotoneBlock
from deqlqr.random_fields import RandomFieldBlock
from deqlqr.runge_kutta import GradientBlock, RungeKuttaNet

SMALL_MODELS = ("dense", "conv")
_LARGE = ("dense-large", "dense-free", "gradient", "gradient-kutta4", "monotone", "random-fields")
# The slides' explicit networks: method and step sizes.
NETS = {
    "resnet": ("euler", "fixed"),
    "improved-euler": ("improved-euler", "fixed"),
    "kutta3": ("kutta3", "fixed"),
    "kutta4": ("kutta4", "fixed"),
    "odenet": ("euler", "learned"),
    "odenet-simplex": ("euler", "simplex"),
}
EXPLICIT = ("convnet", "net", *NETS)  # without a DEQ layer
MODELS = (*SMALL_MODELS, *_LARGE, "conv-large", *EXPLICIT)
_LOOSE = 1e-3
_FASTER = 6.0  # the initial weights of vectors, whose classes lie close together
_LAYERS, _TIME = 15, 8.0  # of the slides' networks: layers, and the sum of their steps


def make_model(name: str, shape: Sequence[int], outputs: int, *, seed: int = 0) -> nn.Module:
    """Return a freshly initialised model for images (channels, height, width) or vectors (inputs,).

    Args:
        name: `"dense"`: a tanh `DenseBlock`, for images with 16 states behind one convolution, for
            vectors with 32 states, and no bound on its norm if there is one output; `"conv"`: the
            thesis' toy `ConvBlock` with 12 inner channels, on a state of 8 channels and 2 x 2
            pixels. Larger ones, which solve to 1e-3, with 87 states straight from the pixels (32
            for vectors): `"dense-large"`: a `DenseBlock`; `"dense-free"`: the same without a bound;
            `"gradient"` and `"gradient-kutta4"`: a `GradientBlock` by two methods; `"monotone"`: a
            `MonotoneBlock`; `"random-fields"`: a `RandomFieldBlock` of 7 fields. `"conv-large"`:
            the toy block on 8 channels at a quarter of the resolution. `"convnet"`: the thesis'
            explicit network of three convolutions and two dense layers, at most 96 states a
            sample between them. Explicit networks of 15 layers in the plane, for vectors: `"net"`,
            a plain one, and those of `NETS`, Runge-Kutta steps with fixed or trained lengths.
        shape: Shape of one sample; images at least 8 x 8, for `"convnet"` 16 x 16.
        outputs: Number of outputs.
        seed: Of the initial parameters.

    Raises:
        ValueError: If the name is unknown, the shape does not fit, or the seed is out of range.
    """
    check_seed(seed)
    choice("model", name, MODELS)
    image = len(shape) == 3
    least = 16 if name == "convnet" else 8
    if image and min(shape[1:]) < least:
        raise ValueError(
            f"shape of an image must be at least {least} x {least} for model {name!r}, got "
            f"{tuple(shape)}."
        )
    of_vectors = name == "net" or name in NETS
    if image and of_vectors:
        raise ValueError(f"model {name!r} takes vectors, got samples of shape {tuple(shape)}.")
    if not image and (len(shape) != 1 or "conv" in name):
        raise ValueError(f"model {name!r} takes images, got samples of shape {tuple(shape)}.")
    makers = {
        "dense": _dense if image else _surface,
        "conv": _conv,
        "conv-large": _conv_large,
        "convnet": _convnet,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if of_vectors:
            return _net(name, shape[0], outputs)
        if name in makers:
            return makers[name](shape, outputs)
        return _large(name, shape, outputs)


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


def _large(name: str, shape: Sequence[int], outputs: int) -> nn.Module:
    inputs, image = math.prod(shape), len(shape) == 3
    states = 87 if image else 32
    block: nn.Module
    if name == "monotone":
        block = MonotoneBlock(states, inputs, splitting="peaceman-rachford")
    elif name.startswith("gradient"):
        method = "kutta4" if name.endswith("kutta4") else "euler"
        if image:
            block = GradientBlock(states, None, inputs, method=method)
        else:
            block = GradientBlock(states, 2 * states, inputs, method=method, max_norm=4.0)
    elif name == "random-fields":
        block = RandomFieldBlock(states, 7, inputs)
    else:
        block = DenseBlock(states, inputs, max_norm=None if name == "dense-free" else 0.9)
    if not image:
        _vary_faster(block, inputs)
    after = [nn.ReLU()] if name == "monotone" else []
    layer = DEQ(block, tol=_LOOSE if image else None)
    return nn.Sequential(nn.Flatten(), layer, *after, nn.Linear(states, outputs))


@torch.no_grad()
def _vary_faster(block: nn.Module, inputs: int) -> None:
    """Let the initial state vary over the distances between classes of points in the plane."""
    for module in block.modules():
        if isinstance(module, nn.Linear) and module.in_features == inputs:
            module.weight *= _FASTER


def _net(name: str, inputs: int, outputs: int) -> nn.Module:
    if name == "net":
        layers = [layer for _ in range(_LAYERS) for layer in (nn.Linear(inputs, inputs), nn.Tanh())]
        return nn.Sequential(*layers, nn.Linear(inputs, outputs))
    method, steps = NETS[name]
    net = RungeKuttaNet.of_layers(inputs, _LAYERS, method, total=_TIME, steps=steps)
    return nn.Sequential(net, nn.Linear(inputs, outputs))


def _conv_large(image: Sequence[int], outputs: int, channels: int = 8) -> nn.Module:
    encoder = nn.Sequential(
        nn.Conv2d(image[0], channels, 5, stride=2, padding=2), nn.ReLU(), nn.MaxPool2d(2)
    )
    height, width = ((((side + 1) // 2) // 2) for side in image[1:])
    readout = nn.Linear(channels * height * width, outputs)
    return nn.Sequential(encoder, DEQ(ConvBlock(channels), tol=_LOOSE), nn.Flatten(), readout)


def _convnet(image: Sequence[int], outputs: int) -> nn.Module:
    # What is pooled at once is no state: 6 x 4 x 4, then 8 x 2 x 2, 16 and 16 are.
    return nn.Sequential(
        nn.Conv2d(image[0], 6, 5), nn.ReLU(), nn.AdaptiveMaxPool2d(4),
        nn.Conv2d(6, 8, 3), nn.ReLU(),
        nn.Conv2d(8, 16, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, 16), nn.ReLU(),
        nn.Linear(16, outputs),
    )  # fmt: skip


def _surface(shape: Sequence[int], outputs: int, states: int = 32) -> nn.Module:
    block = DenseBlock(states, max_norm=None if outputs == 1 else 0.9)
    return nn.Sequential(nn.Linear(shape[0], states), DEQ(block), nn.Linear(states, outputs))
