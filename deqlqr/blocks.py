"""Residual blocks f(z, x) to start from, and initial weights that give them a fixed point."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deqlqr._checks import choice, injection
from deqlqr.held import held
from deqlqr.phases import PhaseMap
from deqlqr.spectral_bound import operator_norm, within

_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}


class DenseBlock(nn.Module):
    """f(z, x) = sigma(W z + U x + c), sigma = tanh or relu, with ||W||_2 held at `max_norm`.

    The trained matrix V enters as W = V min(1, max_norm / ||V||_2). As sigma is 1-Lipschitz, f is
    a contraction in z with constant `max_norm`, so its fixed point exists, is unique, and cannot
    be lost in training. The rescaling is differentiated like everything else.

    Args:
        state_size: n, the size of z.
        input_size: Size of x. `None`: x is added as it is (U = I) and must have n components.
        activation: `"tanh"` or `"relu"`.
        max_norm: Bound on ||W||_2, in (0, 1); `None` lifts it, and with it the guarantee.
        gain: Norm of the initial V, in (0, 1).

    Attributes:
        contraction: `max_norm`, the Lipschitz constant in z that holds whatever the parameters.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> block = DenseBlock(4, input_size=2)
        >>> block(torch.zeros(3, 4), torch.ones(3, 2)).shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        state_size: int,
        input_size: int | None = None,
        *,
        activation: str = "tanh",
        max_norm: float | None = 0.9,
        gain: float = 0.5,
    ) -> None:
        super().__init__()
        for name, value in (("max_norm", max_norm), ("gain", gain)):
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} must lie in (0, 1), got {value}.")
        self.activation = choice("activation", activation, tuple(_ACTIVATIONS))
        self.state_size, self.input_size, self.max_norm = state_size, input_size, max_norm
        self.contraction = max_norm
        self.state = nn.Linear(state_size, state_size)
        # Not orthogonal: equal singular values have no second derivative, which Newton needs.
        nn.init.normal_(self.state.weight)
        with torch.no_grad():
            self.state.weight *= gain / torch.linalg.matrix_norm(self.state.weight, 2)
        nn.init.zeros_(self.state.bias)
        self.input = None if input_size is None else nn.Linear(input_size, state_size, bias=False)

    def state_shape(self, x: Tensor) -> tuple[int, ...]:
        """Return the shape of one sample's state, `(n,)`."""
        return (self.state_size,)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Return f(z, x) (batch, n) for z (batch, n) and x (batch, input_size).

        Raises:
            ValueError: If x does not have shape `(batch, input_size)`.
        """
        width = self.state_size if self.input_size is None else self.input_size
        injection(x, width)
        injected = x if self.input is None else self.input(x)
        return _ACTIVATIONS[self.activation](F.linear(z, self.weight, self.state.bias) + injected)

    def phases(self, x: Tensor) -> list[PhaseMap]:
        """Return f(., x), which is one layer, as the one phase of a cyclic LQR."""
        return [lambda z: self(z, x)]

    @property
    def weight(self) -> Tensor:
        """W (n, n), the trained matrix scaled down to the norm `max_norm` where it exceeds it."""
        V = self.state.weight
        return V if self.max_norm is None else within(V, self.max_norm)


class ConvBlock(nn.Module):
    """The thesis' toy (figure 4.1): a convolutional ResNet block with group normalisation.

        f(z, x) = s N3(relu(z + N2(x + C2 N1(relu(C1 z))))),    s = min(1, max_lipschitz / L)

    C1 maps `channels` to `inner_channels`, C2 back, both 3 x 3 with padding; N are group norms with
    epsilon 1. A group norm divides by sqrt(variance + epsilon), so its Lipschitz constant is at
    most max |weight| / sqrt(epsilon), and so at most g = ||weight||_8 / sqrt(epsilon), which unlike
    the maximum is smooth where weights tie. That of a 3 x 3 convolution is at most
    k = 3 ||weight as a matrix (out, in 9)||_2. Hence without s the block's is at most

        L = g3 (1 + g2 k2 g1 k1),

    and with s it is at most `max_lipschitz`: the fixed point exists, is unique, and cannot be lost
    in training. The rescaling is differentiated like everything else.

    Args:
        channels: Channels of the state z (and of x).
        inner_channels: Channels inside; 12 in the thesis.
        groups: Groups of N2 and N3; divides `channels`.
        inner_groups: Groups of N1; divides `inner_channels`.
        max_lipschitz: Bound on the Lipschitz constant in z, in (0, 1); `None` lifts it, and with
            it the guarantee.
        init_scale: Standard deviation of the initial convolution weights.

    Attributes:
        contraction: `max_lipschitz`, which holds whatever the parameters.

    Raises:
        ValueError: If an option is out of range or the groups do not divide the channels.

    Source: thesis section 4.4; the layout follows the residual block of Bai, Koltun and Kolter
    (2020), Multiscale Deep Equilibrium Models, arXiv:2006.08656.
    """

    def __init__(
        self,
        channels: int,
        inner_channels: int = 12,
        *,
        groups: int = 1,
        inner_groups: int = 4,
        max_lipschitz: float | None = 0.9,
        init_scale: float = 0.05,
    ) -> None:
        super().__init__()
        for name, count, name_g, g in (
            ("channels", channels, "groups", groups),
            ("inner_channels", inner_channels, "inner_groups", inner_groups),
        ):
            if g < 1 or count < 1 or count % g:
                raise ValueError(f"{name_g} must divide {name}, got {g} and {count}.")
        if max_lipschitz is not None and not 0 < max_lipschitz < 1:
            raise ValueError(f"max_lipschitz must lie in (0, 1), got {max_lipschitz}.")
        self.channels, self.max_lipschitz = channels, max_lipschitz
        self.contraction = max_lipschitz
        self.conv1 = nn.Conv2d(channels, inner_channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(inner_channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(inner_groups, inner_channels, eps=1.0)
        self.norm2 = nn.GroupNorm(groups, channels, eps=1.0)
        self.norm3 = nn.GroupNorm(groups, channels, eps=1.0)
        for conv in (self.conv1, self.conv2):
            nn.init.normal_(conv.weight, std=init_scale)

    def lipschitz_bound(self) -> Tensor:
        """Return L, the bound on the unscaled block's Lipschitz constant in z, a scalar tensor."""
        g1, g2, g3 = (_gain(norm) for norm in (self.norm1, self.norm2, self.norm3))
        k1, k2 = (_conv_bound(conv) for conv in (self.conv1, self.conv2))
        return g3 * (1 + g2 * k2 * g1 * k1)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Return f(z, x) for z and x of shape (batch, channels, height, width).

        Raises:
            ValueError: If x does not have that shape.
        """
        injection(x, self.channels, image=True)
        inner = self.norm1(F.relu(self.conv1(z)))
        fz = self.norm3(F.relu(z + self.norm2(x + self.conv2(inner))))
        if self.max_lipschitz is None:
            return fz
        return fz * (self.max_lipschitz / self.lipschitz_bound()).clamp(max=1.0)

    def phases(self, x: Tensor) -> list[PhaseMap]:
        """Return f(., x) as three phases, each with one layer's own parameters.

            z -> (z, y, l_1),   (z, y, l_1) -> (w, l_2),   (w, l_2) -> s N3(w)

        with y = N1(relu(C1 z)), w = relu(z + N2(x + C2 y)), and the bound's l_1 = g1 k1 and
        l_2 = 1 + g2 k2 l_1 handed on, `(batch, 1)` each, where the block is rescaled.
        """
        scaled = self.max_lipschitz is not None

        def handed_on(value: Tensor, number: Tensor) -> tuple[Tensor, ...]:
            return (value, number.expand(len(value), 1)) if scaled else (value,)

        def first(z: Tensor) -> tuple[Tensor, ...]:
            y = self.norm1(F.relu(self.conv1(z)))
            return z, *handed_on(y, _gain(self.norm1) * _conv_bound(self.conv1))

        def second(state: tuple[Tensor, ...]) -> Any:
            z, y, *bound = state
            w = F.relu(z + self.norm2(x + self.conv2(y)))
            if not bound:
                return w
            return w, 1 + _gain(self.norm2) * _conv_bound(self.conv2) * bound[0]

        def third(state: Any) -> Tensor:
            w, *bound = (state,) if isinstance(state, Tensor) else state
            fz = self.norm3(w)
            if not bound:
                return fz
            scale = (self.max_lipschitz / (_gain(self.norm3) * bound[0])).clamp(max=1.0)
            return fz * scale.reshape(-1, 1, 1, 1)

        return [first, second, third]


def _gain(norm: nn.GroupNorm) -> Tensor:
    """Return g, a bound on the Lipschitz constant of a group norm."""
    return torch.linalg.vector_norm(norm.weight, 8) / norm.eps**0.5


def _conv_bound(conv: nn.Conv2d) -> Tensor:
    """Return k, a bound on the Lipschitz constant of a 3 x 3 convolution."""
    norm = lambda: 3 * operator_norm(conv.weight.flatten(1))
    return held("convolution bound", norm, conv.weight)
