"""Vector fields v(z, x) for a state to flow along, and what is known of them whatever is trained.

A field is monotone with constants alpha >= 0, beta > 0 if, for every x and any two states, with dz
and dv the differences of the states and of the field at them,

    (VF1)  <dv, dz> <= -alpha |dz|^2 - beta |dv|^2

Then solutions of z' = v(z, x) approach each other, and so do Runge-Kutta steps that are short
enough (`deqlqr.runge_kutta`). Fields of the form

    (VF2)  v(z, x) = -leak z - A' sigma(A z + W x + b) + (S - S') z + U x + c

keep such constants in training, as the norms of A and S are bounded.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deqlqr._checks import at_least, choice, count, injection
from deqlqr.spectral_bound import operator_norm, within

_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}  # with slopes in [0, 1], as (VF2) needs


@dataclass(frozen=True)
class Monotonicity:
    """Constants of (VF1) that hold for all parameters.

    Attributes:
        alpha: At least 0.
        beta: Above 0. As <dv, dz> >= -|dv| |dz|, alpha beta is at most 1/4.

    Raises:
        ValueError: If one is out of range or their product is.

    Example:
        >>> Monotonicity(alpha=0.75, beta=0.25).slopes
        (1.0, 3.0)
    """

    alpha: float
    beta: float

    def __post_init__(self) -> None:
        """Refuse constants that no field has.

        Raises:
            ValueError: If one is out of range or their product is.
        """
        at_least("alpha", self.alpha, 0.0)
        at_least("beta", self.beta, 0.0, strict=True)
        if self.alpha * self.beta > 0.25 * (1 + 1e-12):
            raise ValueError(
                f"alpha beta must be at most 1/4, got {self.alpha * self.beta} "
                f"(alpha={self.alpha}, beta={self.beta})."
            )

    @property
    def slopes(self) -> tuple[float, float]:
        """Bounds on |dv| / |dz|: the roots t of beta t^2 - t + alpha, by (VF1) and Cauchy-Schwarz.

        For a gradient field they are the constants of strong convexity and of smoothness.
        """
        root = max(0.0, 1 - 4 * self.alpha * self.beta) ** 0.5
        return 2 * self.alpha / (1 + root), (1 + root) / (2 * self.beta)


class Field(nn.Module, ABC):
    """Base of vector fields v(z, x) on states z (batch, *state).

    A field defines `at`; calling it evaluates v at one state.
    """

    @abstractmethod
    def at(self, x: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """Return v(., x), with what does not depend on the state computed once."""

    def forward(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """Return v(z, x), of the shape of z (batch, *state)."""
        return self.at(x)(z)

    def state_shape(self, x: Tensor) -> tuple[int, ...]:
        """Return the shape of one sample's state; that of x unless a field says otherwise."""
        return tuple(x.shape[1:])

    def monotonicity(self) -> Monotonicity | None:
        """Return constants of (VF1) that hold for all parameters; `None` if there are none."""
        return None


class _BoundedField(Field):
    """(VF2) but for the kind of its linear maps.

    Attributes:
        state: V and b of the inner map; A = V min(1, max_norm / ||V||).
        input: W, and
        direct: U; both `None` where x is added as it is.
        offset: c.
        rotation: The map whose weight, brought within skew / 2, is S; `None` without.
    """

    state: nn.Linear | nn.Conv2d
    input: nn.Module | None
    direct: nn.Module | None
    rotation: nn.Linear | nn.Conv2d | None
    offset: nn.Parameter

    def __init__(
        self, *, activation: str, leak: float, max_norm: float, skew: float, gain: float
    ) -> None:
        super().__init__()
        self.activation = choice("activation", activation, tuple(_ACTIVATIONS))
        self.leak, self.skew = at_least("leak", leak, 0.0), at_least("skew", skew, 0.0)
        self.max_norm = at_least("max_norm", max_norm, 0.0, strict=True)
        self.gain = at_least("gain", gain, 0.0, strict=True)

    def at(self, x: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """Return v(., x) (VF2).

        Args:
            x: `None`, for nothing to be injected, only where x is added as it is.

        Raises:
            ValueError: If x does not fit.
        """
        self._require_input(x)
        sigma, A = _ACTIVATIONS[self.activation], self.weight
        S = None if self.rotation is None else within(self.rotation.weight, self.skew / 2)
        inner = None if self.input is None else self.input(x)
        outer = x if self.direct is None else self.direct(x)

        def v(z: Tensor) -> Tensor:
            y = self._linear(z, A, self.state.bias)
            y = y if inner is None else y + inner
            value = self.offset - self.leak * z - self._adjoint(sigma(y), A)  # (VF2)
            if S is not None:
                value = value + self._linear(z, S) - self._adjoint(z, S)
            return value if outer is None else value + outer

        return v

    @property
    def weight(self) -> Tensor:
        """A, the trained weight V scaled down to the norm `max_norm` where it exceeds it."""
        return within(self.state.weight, self.max_norm)

    def monotonicity(self) -> Monotonicity | None:
        """Return the constants of (VF1); `None` where `leak` is 0 and `skew` is not.

        With mu = leak, N = max_norm^2, s = skew and m = 2 mu + N, without a skew part

            (VF3)  alpha = mu (mu + N) / m,    beta = 1 / m

        and with one, for any c > 0,

            (VF4)  beta = 1 / (m + c),    alpha = beta (mu (mu + N + c) - s^2 - s^2 N / c)
        """
        # v = K z - g(z), K = S - S', ||K|| <= s, g the gradient of a mu-strongly convex function.
        # w = dg - mu dz is the difference of a gradient of a convex, N-smooth one, so
        # <w, dz> >= |w|^2 / N (Baillon and Haddad). As <K dz, dz> = 0,
        #     <dv, dz> = -<w, dz> - mu |dz|^2,
        #     |dv|^2 <= |w|^2 + 2 mu <w, dz> + 2 s |w| |dz| + (mu^2 + s^2) |dz|^2.
        # Hence (VF1) holds if, for all numbers |w| and |dz|,
        #     c_w |w|^2 - 2 beta s |w| |dz| + (mu - alpha - beta (mu^2 + s^2)) |dz|^2 >= 0
        # with c_w = (1 - 2 beta mu) / N - beta = beta c / N, which is (VF4). Its alpha beta is
        # largest at a root of a cubic in c; the c below is within 7 percent of that, exact where
        # s -> 0, and keeps alpha > 0.
        mu, N, s = self.leak, self.max_norm**2, self.skew
        m = 2 * mu + N
        if s == 0:
            return Monotonicity(mu * (mu + N) / m, 1 / m)  # (VF3)
        if mu == 0:
            return None  # a rotation alone: its Euler steps move away
        c = s * (m / mu) ** 0.5 + 2 * s**2 / mu
        beta = 1 / (m + c)
        return Monotonicity(beta * (mu * (mu + N + c) - s**2 - s**2 * N / c), beta)  # (VF4)

    def _start(self) -> None:
        """Set the initial weights: V of norm `gain`, S of half its bound, no biases."""
        with torch.no_grad():
            for layer, norm in ((self.state, self.gain), (self.rotation, self.skew / 4)):
                if layer is not None:
                    # Not orthogonal: equal singular values have no second derivative.
                    nn.init.normal_(layer.weight)
                    layer.weight *= norm / operator_norm(layer.weight)
            nn.init.zeros_(self.state.bias)  # type: ignore[arg-type]

    @abstractmethod
    def _linear(self, z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return A z + b."""

    @abstractmethod
    def _adjoint(self, y: Tensor, weight: Tensor) -> Tensor:
        """Return A' y."""

    @abstractmethod
    def _require_input(self, x: Tensor | None) -> None:
        """Refuse an x that does not fit."""


class GradientField(_BoundedField):
    """v(z, x) = -leak z - A' sigma(A z + W x + b) + U x + c with ||A||_2 held at `max_norm`.

    It is minus the gradient in z of a function that is convex with constant mu = `leak` and smooth
    with constant L = `leak` + `max_norm`^2, whatever the parameters; hence it has the constants
    alpha = mu L / (mu + L), beta = 1 / (mu + L) of (VF1), and exactly one zero if leak > 0. The
    trained matrix V enters as A = V min(1, max_norm / ||V||_2).

    Args:
        state_size: n, the size of z.
        hidden: Rows of A; `None` takes n.
        input_size: Size of x. `None`: there is no W, x is added as it is (U = I) if it is given.
        activation: sigma, `"tanh"` or `"relu"`.
        leak: At least 0. At 0 solutions do not part, but need not approach each other.
        max_norm: Bound on ||A||_2, above 0.
        skew: Bound on the norm of a term (S - S') z that is added, which turns the flow and makes
            the field no gradient; 0 for none. Costs contraction (VF4).
        gain: Norm of the initial V, above 0.

    Raises:
        ValueError: If an option is out of range.

    Source: E. Celledoni, M. Ehrhardt, C. Etmann, R. McLachlan, B. Owren, C.-B. Schoenlieb and F.
    Sherry (2021). Structure-preserving deep learning. arXiv:2006.03364.

    Example:
        >>> field = GradientField(4, hidden=6, input_size=2)
        >>> field(torch.zeros(3, 4), torch.ones(3, 2)).shape
        torch.Size([3, 4])
        >>> [round(t, 6) for t in field.monotonicity().slopes]
        [1.0, 5.0]
    """

    def __init__(
        self,
        state_size: int,
        hidden: int | None = None,
        input_size: int | None = None,
        *,
        activation: str = "tanh",
        leak: float = 1.0,
        max_norm: float = 2.0,
        skew: float = 0.0,
        gain: float = 1.0,
    ) -> None:
        super().__init__(activation=activation, leak=leak, max_norm=max_norm, skew=skew, gain=gain)
        n = self.state_size = count("state_size", state_size)
        hidden = n if hidden is None else count("hidden", hidden)
        self.input_size = None if input_size is None else count("input_size", input_size)
        self.state = nn.Linear(n, hidden)
        linear = lambda size: (
            None if input_size is None else nn.Linear(input_size, size, bias=False)
        )
        self.input, self.direct = linear(hidden), linear(n)
        self.rotation = nn.Linear(n, n, bias=False) if self.skew else None
        self.offset = nn.Parameter(torch.zeros(n))
        self._start()

    def state_shape(self, x: Tensor) -> tuple[int, ...]:
        """Return the shape of one sample's state, `(n,)`."""
        return (self.state_size,)

    def _linear(self, z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(z, weight, bias)

    def _adjoint(self, y: Tensor, weight: Tensor) -> Tensor:
        return y @ weight

    def _require_input(self, x: Tensor | None) -> None:
        _require_vectors(x, self.state_size, self.input_size)


class ConvGradientField(_BoundedField):
    """`GradientField` on images: A, W, U and S are convolutions, zero-padded to keep the size.

    A' is the exact adjoint of A, a transposed convolution with the same kernel. The kernel of A is
    scaled down where a bound on its norm that holds for images of any size (`operator_norm`)
    exceeds `max_norm`, so the constants are those of `GradientField`.

    Args:
        channels: Channels of the state z.
        hidden_channels: Channels of A z; `None` takes `channels`.
        input_channels: Channels of x. `None`: there is no W, x is added as it is if it is given.
        kernel_size: Odd.
        activation: sigma, `"tanh"` or `"relu"`.
        leak: At least 0.
        max_norm: Bound on the norm of A, above 0.
        skew: Bound on the norm of S - S'; 0 for none.
        gain: Bound on the norm of the initial A, above 0.

    Raises:
        ValueError: If an option is out of range.

    Source: as for `GradientField`.

    Example:
        >>> field = ConvGradientField(4, input_channels=1)
        >>> field(torch.zeros(2, 4, 8, 8), torch.ones(2, 1, 8, 8)).shape
        torch.Size([2, 4, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: int | None = None,
        input_channels: int | None = None,
        kernel_size: int = 3,
        *,
        activation: str = "tanh",
        leak: float = 1.0,
        max_norm: float = 2.0,
        skew: float = 0.0,
        gain: float = 1.0,
    ) -> None:
        super().__init__(activation=activation, leak=leak, max_norm=max_norm, skew=skew, gain=gain)
        c = self.channels = count("channels", channels)
        hidden = c if hidden_channels is None else count("hidden_channels", hidden_channels)
        if count("kernel_size", kernel_size) % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}.")
        self.input_channels = (
            None if input_channels is None else count("input_channels", input_channels)
        )
        self.padding = kernel_size // 2
        conv = lambda size_in, size, bias=False: nn.Conv2d(
            size_in, size, kernel_size, padding=self.padding, bias=bias
        )
        self.state = conv(c, hidden, bias=True)
        self.input = None if input_channels is None else conv(input_channels, hidden)
        self.direct = None if input_channels is None else conv(input_channels, c)
        self.rotation = conv(c, c) if self.skew else None
        self.offset = nn.Parameter(torch.zeros(c, 1, 1))
        self._start()

    def state_shape(self, x: Tensor) -> tuple[int, ...]:
        """Return the shape of one sample's state, `(channels, height, width)`."""
        return (self.channels, *x.shape[2:])

    def _linear(self, z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(z, weight, bias, padding=self.padding)

    def _adjoint(self, y: Tensor, weight: Tensor) -> Tensor:
        return F.conv_transpose2d(y, weight, padding=self.padding)

    def _require_input(self, x: Tensor | None) -> None:
        if x is not None or self.input_channels is not None:
            injection(x, self.input_channels or self.channels, image=True)


class LayerField(Field):
    """v(z, x) = sigma(K z + U x + b), the field of a residual network; promises nothing.

    Args:
        state_size: n, the size of z.
        input_size: Size of x. `None`: x is added as it is (U = I) if it is given.
        activation: sigma, `"tanh"` or `"relu"`.

    Raises:
        ValueError: If an option is out of range.

    Source: M. Benning, E. Celledoni, M. Ehrhardt, B. Owren and C.-B. Schoenlieb (2019). Deep
    learning as optimal control problems: models and numerical methods. arXiv:1904.05657.

    Example:
        >>> field = LayerField(2)
        >>> field(torch.zeros(3, 2)).shape, field.monotonicity()
        (torch.Size([3, 2]), None)
    """

    def __init__(
        self, state_size: int, input_size: int | None = None, *, activation: str = "tanh"
    ) -> None:
        super().__init__()
        self.activation = choice("activation", activation, tuple(_ACTIVATIONS))
        self.state_size = count("state_size", state_size)
        self.input_size = None if input_size is None else count("input_size", input_size)
        self.state = nn.Linear(state_size, state_size)
        self.input = None if input_size is None else nn.Linear(input_size, state_size, bias=False)

    def state_shape(self, x: Tensor) -> tuple[int, ...]:
        """Return the shape of one sample's state, `(n,)`."""
        return (self.state_size,)

    def at(self, x: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """Return v(., x).

        Args:
            x: (batch, input_size); `None`, for nothing to be injected, only where it is added as it
                is.

        Raises:
            ValueError: If x does not fit.
        """
        _require_vectors(x, self.state_size, self.input_size)
        injected = x if self.input is None else self.input(x)
        sigma = _ACTIVATIONS[self.activation]
        if injected is None:
            return lambda z: sigma(self.state(z))
        return lambda z: sigma(self.state(z) + injected)


def _require_vectors(x: Tensor | None, state_size: int, input_size: int | None) -> None:
    """Refuse an x that is not (batch, input_size), or (batch, n) or nothing without that size."""
    if x is not None or input_size is not None:
        injection(x, input_size or state_size)
