"""The networks of the paper on extended MSA: residual layers on a sine, and on MNIST.

Source: Q. Li, L. Chen, C. Tai and W. E (2018), arXiv:1710.09513, section 5.
"""

import torch
from torch import Tensor, nn

from deqlqr._checks import choice

LAYERS, STEP, STATES = 20, 0.25, 5  # for the sine: T = 5
RESIDUAL_LAYERS, RESIDUAL_STEP = 7, 0.5  # for MNIST: T = 3.5
INITIAL = ("good", "zero")


class Residual(nn.Module):
    """x + h tanh(layer(x)), Euler's method along a field.

    Args:
        layer: Linear or convolution, from states to states.
        step: h.

    Example:
        >>> Residual(nn.Linear(5, 5), 0.25)(torch.ones(2, 5)).shape
        torch.Size([2, 5])
    """

    def __init__(self, layer: nn.Module, step: float) -> None:
        super().__init__()
        self.layer, self.step = layer, step

    def forward(self, x: Tensor) -> Tensor:
        """Return the next state, of the shape of x."""
        return x + self.step * self.layer(x).tanh()


class _Repeat(nn.Module):
    """Takes a number to a state of equal entries."""

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(-1, STATES)


def sine_network(initial: str) -> nn.Sequential:
    """Return the paper's residual network for the sine, whose output is the sum of its last state.

    Args:
        initial: `"good"`: weights from a normal distribution of deviation 0.1, truncated at 0.2,
            biases 0.1; or `"zero"`.

    Raises:
        ValueError: If it is neither.
    """
    choice("initial", initial, INITIAL)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [Residual(nn.Linear(STATES, STATES), STEP) for _ in range(LAYERS)]
        for p in (p for layer in layers for p in layer.parameters()):
            if initial == "zero":
                nn.init.zeros_(p)
            elif p.dim() == 1:
                nn.init.constant_(p, 0.1)
            else:
                nn.init.trunc_normal_(p, std=0.1, a=-0.2, b=0.2)
    return nn.Sequential(_Repeat(), *layers)


def sine_loss(states: Tensor, y: Tensor) -> Tensor:
    """Return the mean of (sum of the last state - y)^2, so that the sum is no layer."""
    return (states.sum(1, keepdim=True) - y).square().mean()


def image_network(channels: int) -> nn.Sequential:
    """Return the paper's residual network for MNIST, two projections in front."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for inputs in (1, channels):
            layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        for _ in range(RESIDUAL_LAYERS):
            layers.append(Residual(nn.Conv2d(channels, channels, 3, padding=1), RESIDUAL_STEP))
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(49 * channels, 10))
