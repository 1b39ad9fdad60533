"""Monotone operator equilibrium blocks: one fixed point whatever the parameters, dense or conv.

The equilibrium is that of a relu layer whose I - W is strongly monotone for every A and S:

    (MO1)  z = relu(W z + c),   I - W = G = m I + A'A - K,   K = S - S',   c = U x + b,   m > 0

Splittings turn it into maps with the same z, which contract at the rate q:

    (MO2)  forward-backward:   f(z, x) = relu(z - alpha (G z - c))
    (MO3)  Peaceman-Rachford:  f(u, x) = 2 (I + alpha G)^-1 (|u| + alpha c) - |u|,   z = relu(u)

With ||A|| <= s, ||K|| <= k, M = m + s^2, p = (m + M)/2, r = (M - m)/2, and w = sqrt(m M),
g = sqrt(w^2 + k^2), the best q that holds for all such A and S, and the best q for a given alpha:

    (MO4)  q = alpha r + sqrt((1 - alpha p)^2 + alpha^2 k^2),   alpha = m (g + r M/(g + k)) / (g d)
    (MO5)  q = (delta + t) / (1 + delta t),                     alpha = 1/g

where d = p^2 + k^2, delta^2 = ((1 - alpha w)^2 + alpha^2 k^2) / ((1 + alpha w)^2 + alpha^2 k^2) and
t = (sqrt(M) - sqrt(m)) / (sqrt(M) + sqrt(m)).

Source: E. Winston and J. Z. Kolter (2020), Monotone operator equilibrium networks,
arXiv:2006.08591; the constants are derived below.
"""

from abc import abstractmethod
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deqlqr._checks import at_least, choice, count, injection
from deqlqr.held import held
from deqlqr.phases import PhaseMap
from deqlqr.spectral_bound import operator_norm, within

SPLITTINGS = ("forward-backward", "peaceman-rachford")
PADDINGS = ("zeros", "circular")
_START = 0.5  # initial norms of A and of 2 S, relative to their bounds

# Why the maps have the equilibrium as their fixed point. Relu is the resolvent of N, the normal
# cone of z >= 0, and (MO1) says 0 in G z - c + N(z). (MO2): z - alpha (G z - c) in z + N(z), and
# alpha N = N. (MO3) is the reflected resolvent of G - c after that of N, which is 2 relu(u) - u
# = |u|: with z = relu(u) and y = (I + alpha G)^-1 (|u| + alpha c), u = 2 y - |u| = 2 y - 2 z + u
# gives y = z; then u - z in N(z) and |u| = 2 z - u give z - u + alpha (G z - c) = 0, the sum 0.
#
# Why the constants hold. For a unit vector v write G v = a v + h e with e orthogonal to v. Of A'A,
# whose spectrum lies in [0, s^2], comes a component of at most sqrt((a - m)(M - a)) along e, of K
# one of at most k, so a + ih lies in the disk with centre p + ik and radius r, or nearer the real
# axis. Both numbers are attained at once (n >= 2), so the suprema over A and S are those over the
# disk: of ||(I - alpha G) v|| = |1 - alpha (a + ih)| for (MO2), |.| of its farthest point; and of
# |1 - alpha (a + ih)| / |1 + alpha (a + ih)| for (I - alpha G)(I + alpha G)^-1 in (MO3). The latter
# is the pseudo-hyperbolic distance of the half-plane a > 0 from 1/alpha, in which the disk has
# centre w + ik, at the distance delta, and radius t; distances add like velocities. The nearest
# point of the real axis to w + ik is |w + ik|. Relu, |.| and additions do not expand.


def best_step(splitting: str, margin: Any, norm: Any, skew: Any) -> Any:
    """Return the alpha that makes the constant q smallest, for m, s and k (floats or tensors)."""
    top = margin + norm**2
    g = (margin * top + skew**2) ** 0.5
    if splitting == "peaceman-rachford":
        return 1 / g  # (MO5)
    d = (margin + norm**2 / 2) ** 2 + skew**2
    return margin * (g + norm**2 / 2 * top / (g + skew)) / (g * d)  # (MO4)


def rate(splitting: str, alpha: Any, margin: Any, norm: Any, skew: Any) -> Any:
    """Return the constant q of a step alpha, for m, s and k (floats or tensors)."""
    top, turn = margin + norm**2, (alpha * skew) ** 2
    if splitting == "forward-backward":
        mid = (margin + top) / 2
        return alpha * norm**2 / 2 + ((1 - alpha * mid) ** 2 + turn) ** 0.5  # (MO4)
    w = (margin * top) ** 0.5
    delta = (((1 - alpha * w) ** 2 + turn) / ((1 + alpha * w) ** 2 + turn)) ** 0.5
    t = (top**0.5 - margin**0.5) / (top**0.5 + margin**0.5)
    return (delta + t) / (1 + delta * t)  # (MO5)


class _Monotone(nn.Module):
    """What the dense and the convolutional block share: A, K, alpha and q."""

    bias: nn.Parameter
    input: nn.Module | None

    def __init__(
        self,
        shape: tuple[int, ...],
        margin: float,
        max_norm: float | None,
        max_skew: float | None,
        splitting: str,
    ) -> None:
        super().__init__()
        self.margin = at_least("margin", margin, 0.0, strict=True)
        for name, value in (("max_norm", max_norm), ("max_skew", max_skew)):
            if value is not None:
                at_least(name, value, 0.0, strict=True)
        self.max_norm, self.max_skew = max_norm, max_skew
        self.splitting = choice("splitting", splitting, SPLITTINGS)
        self.root = nn.Parameter(_start(shape, max_norm))
        self.skew = nn.Parameter(_start(shape, max_skew) / 2)
        self.contraction: float | None = None
        if max_norm is not None and max_skew is not None:
            sizes = self.margin, max_norm, max_skew
            alpha = best_step(self.splitting, *sizes)
            self.contraction = rate(self.splitting, alpha, *sizes)

    def weights(self) -> tuple[Tensor, Tensor]:
        """Return A and K, as matrices or as kernels."""
        bounds = self.max_norm, self.max_skew
        return held(("monotone", bounds), self._weights, self.root, self.skew)

    def _weights(self) -> tuple[Tensor, Tensor]:
        A = self.root if self.max_norm is None else within(self.root, self.max_norm)
        # S is scaled, not K: the norm of a skew matrix, a double singular value, has no second
        # derivative. Every K with ||K|| <= max_skew is reached, by S = K/2.
        S = self.skew if self.max_skew is None else within(self.skew, self.max_skew / 2)
        return A, S - _adjoint(S)

    def step_size(self) -> float | Tensor:
        """Return alpha.

        It is a constant where both norms are bounded, else the best for the current parameters.
        """
        return self._step_size(*self.weights())

    def lipschitz_bound(self) -> Tensor:
        """Return q, a Lipschitz constant of f in its state for the current parameters, below 1."""
        A, K = self.weights()
        alpha = self._step_size(A, K)
        return rate(self.splitting, alpha, self.margin, operator_norm(A), operator_norm(K))

    def output(self, u: Tensor) -> Tensor:
        """Return z = relu(u) for the fixed point u of (MO3); that of (MO2) stays as it is."""
        return F.relu(u)

    def phases(self, x: Tensor) -> list[PhaseMap]:
        """Return f(., x) as the one phase of a cyclic LQR."""
        return [lambda z: self(z, x)]

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Return f(z, x), (MO2) or (MO3), of the shape of z.

        Raises:
            ValueError: If x does not have the shape that the block takes.
        """
        self._check(x)
        A, K = self.weights()
        alpha = self._step_size(A, K)
        c = (x if self.input is None else self.input(x)) + self.bias
        if self.splitting == "forward-backward":
            return F.relu(z - alpha * (self._times(z, A, K) - c))  # (MO2)
        return 2 * self._solve(z.abs() + alpha * c, alpha, A, K) - z.abs()  # (MO3)

    def monotone(self, z: Tensor) -> Tensor:
        """Return G z = (I - W) z, of the shape of z."""
        return self._times(z, *self.weights())

    def _step_size(self, A: Tensor, K: Tensor) -> float | Tensor:
        sizes = (
            operator_norm(weight) if bound is None else bound
            for weight, bound in ((A, self.max_norm), (K, self.max_skew))
        )
        return best_step(self.splitting, self.margin, *sizes)

    @abstractmethod
    def _check(self, x: Tensor) -> None: ...

    @abstractmethod
    def _times(self, z: Tensor, A: Tensor, K: Tensor) -> Tensor:
        """Return G z."""

    @abstractmethod
    def _solve(self, y: Tensor, alpha: float | Tensor, A: Tensor, K: Tensor) -> Tensor:
        """Return (I + alpha G)^-1 y."""


class MonotoneBlock(_Monotone):
    """monDEQ: the equilibrium z = relu(W z + U x + b) (MO1), which exists and is unique.

    W = (1 - m) I - A'A + S - S' for trained A and S of any size; their norms enter scaled down
    where ||A|| exceeds `max_norm` or ||S|| exceeds `max_skew / 2`. As z is also the fixed point
    of a contraction, it can be found by plain iteration and cannot be lost in training. With
    `splitting="peaceman-rachford"`, which contracts faster at the cost of an n x n solve for each
    evaluation, the state is u, and the model reads z = relu(u), so put an `nn.ReLU()`
    behind the DEQ layer.

    Args:
        state_size: n, the size of z.
        input_size: Size of x. `None`: x is added as it is (U = I) and must have n components.
        margin: m, above 0: the symmetric part of I - W is at least m I. z amplifies its input
            by at most 1/m.
        max_norm: Bound s on ||A||_2, above 0; `None` lifts it: alpha then follows the parameters,
            and q < 1 still, but no q < 1 holds for all of them.
        max_skew: Bound k on ||S - S'||_2, above 0, or `None` likewise.
        splitting: `"forward-backward"` (MO2) or `"peaceman-rachford"` (MO3).

    Attributes:
        contraction: q of (MO4) or (MO5), the Lipschitz constant of f in its state that holds
            whatever the parameters, and if n > 1 no smaller one does; 0.8 or 0.5 for the defaults.
            `None` where a norm is not bounded.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> from deqlqr import DEQ
        >>> block = MonotoneBlock(4, input_size=2, splitting="peaceman-rachford")
        >>> model = nn.Sequential(DEQ(block), nn.ReLU())
        >>> z = model(x := torch.ones(3, 2))
        >>> W = torch.eye(4) - torch.func.jacrev(block.monotone)(z[0])
        >>> residual = z - torch.relu(z @ W.mT + block.input(x) + block.bias)
        >>> round(block.contraction, 12), bool(residual.norm() < 1e-4)
        (0.5, True)
    """

    def __init__(
        self,
        state_size: int,
        input_size: int | None = None,
        *,
        margin: float = 0.5,
        max_norm: float | None = 1.0,
        max_skew: float | None = 0.5,
        splitting: str = "forward-backward",
    ) -> None:
        n = count("state_size", state_size)
        if input_size is not None:
            count("input_size", input_size)
        super().__init__((n, n), margin, max_norm, max_skew, splitting)
        self.state_size, self.input_size = state_size, input_size
        self.bias = nn.Parameter(torch.zeros(n))
        self.input = None if input_size is None else nn.Linear(input_size, n, bias=False)

    def state_shape(self, x: Tensor) -> tuple[int, ...]:
        """Return the shape of one sample's state, `(n,)`."""
        return (self.state_size,)

    def _check(self, x: Tensor) -> None:
        width = self.state_size if self.input_size is None else self.input_size
        injection(x, width)

    def _times(self, z: Tensor, A: Tensor, K: Tensor) -> Tensor:
        return self.margin * z + F.linear(F.linear(z, A), A.mT) - F.linear(z, K)

    def _solve(self, y: Tensor, alpha: float | Tensor, A: Tensor, K: Tensor) -> Tensor:
        # One matrix for all samples, well conditioned because G is monotone.
        inverse = held(("resolvent", self.margin), lambda: self._inverse(alpha, A, K), A, K)
        return F.linear(y, inverse.to(y.dtype))

    def _inverse(self, alpha: float | Tensor, A: Tensor, K: Tensor) -> Tensor:
        I = torch.eye(self.state_size, dtype=A.dtype, device=A.device)
        G = self.margin * I + A.mT @ A - K
        wide = torch.promote_types(G.dtype, torch.float32)  # half precision has no inverse
        return torch.linalg.inv((I + alpha * G).to(wide))


class ConvMonotoneBlock(_Monotone):
    """monDEQ with convolutions: as `MonotoneBlock`, on states (channels, height, width).

    A and S are convolutions with stride 1, and A' and S' their exact adjoints, on images of any
    size. Their norms are bounded by `operator_norm` of their kernels. With zero padding the
    splitting is forward-backward; with circular padding Peaceman-Rachford's solve is one of
    channels x channels for each frequency of the image.

    Args:
        channels: Channels of z.
        input_channels: Channels of x, which goes through a convolution U with zero padding;
            `None`: x is added as it is and must have `channels` channels.
        kernel_size: Height and width of the kernels, odd. Circular images are no smaller.
        margin: m, as in `MonotoneBlock`.
        max_norm: Bound s on ||A||, or `None`, as there.
        max_skew: Bound k on ||S - S'||, or `None`, as there.
        splitting: `"forward-backward"` (MO2) or, with circular padding, `"peaceman-rachford"`.
        padding: `"zeros"` or `"circular"`.

    Attributes:
        contraction: q of (MO4) or (MO5), as in `MonotoneBlock`; on images of any size.

    Raises:
        ValueError: If an option is out of range, or `splitting="peaceman-rachford"` comes with
            zero padding.

    Source: Winston and Kolter (2020), arXiv:2006.08591, section 4.

    Example:
        >>> block = ConvMonotoneBlock(4, input_channels=1)
        >>> block(torch.zeros(2, 4, 6, 6), torch.ones(2, 1, 6, 6)).shape
        torch.Size([2, 4, 6, 6])
    """

    def __init__(
        self,
        channels: int,
        input_channels: int | None = None,
        kernel_size: int = 3,
        *,
        margin: float = 0.5,
        max_norm: float | None = 1.0,
        max_skew: float | None = 0.5,
        splitting: str = "forward-backward",
        padding: str = "zeros",
    ) -> None:
        n, k = count("channels", channels), count("kernel_size", kernel_size)
        if input_channels is not None:
            count("input_channels", input_channels)
        if k % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {k}.")
        choice("padding", padding, PADDINGS)
        if splitting == "peaceman-rachford" and padding != "circular":
            raise ValueError(
                "splitting 'peaceman-rachford' of a convolutional block needs padding 'circular', "
                f"with which its linear equations separate by frequency, got {padding!r}."
            )
        super().__init__((n, n, k, k), margin, max_norm, max_skew, splitting)
        self.channels, self.input_channels = channels, input_channels
        self.kernel_size, self.padding = kernel_size, padding
        self.bias = nn.Parameter(torch.zeros(n, 1, 1))
        self.input = (
            None
            if input_channels is None
            else nn.Conv2d(input_channels, n, k, padding=k // 2, bias=False)
        )

    def state_shape(self, x: Tensor) -> tuple[int, ...]:
        """Return the shape of one sample's state, `(channels, height, width)`."""
        return (self.channels, *x.shape[2:])

    def _check(self, x: Tensor) -> None:
        width = self.channels if self.input_channels is None else self.input_channels
        injection(x, width, image=True)
        if self.padding == "circular" and min(x.shape[2:]) < self.kernel_size:
            raise ValueError(
                f"x must have at least {self.kernel_size} x {self.kernel_size} pixels, the size of "
                f"the circular kernels, got {tuple(x.shape)}."
            )

    def _times(self, z: Tensor, A: Tensor, K: Tensor) -> Tensor:
        AAz = self._convolve(self._convolve(z, A), _adjoint(A))
        return self.margin * z + AAz - self._convolve(z, K)

    def _convolve(self, z: Tensor, kernel: Tensor) -> Tensor:
        k = self.kernel_size // 2
        if self.padding == "circular":
            return F.conv2d(F.pad(z, (k, k, k, k), mode="circular"), kernel)
        return F.conv2d(z, kernel, padding=k)

    def _solve(self, y: Tensor, alpha: float | Tensor, A: Tensor, K: Tensor) -> Tensor:
        # A circular convolution multiplies the Fourier coefficients of each frequency by a matrix.
        size, wide = y.shape[2:], torch.promote_types(y.dtype, torch.float32)
        make = lambda: self._inverse(alpha, A.to(wide), K.to(wide), size)
        inverse = held(("resolvent", self.margin, size), make, A, K)
        y_hat = torch.einsum("hwoi,bihw->bohw", inverse, torch.fft.rfft2(y.to(wide)))
        return torch.fft.irfft2(y_hat, s=tuple(size)).to(y.dtype)

    def _inverse(self, alpha: float | Tensor, A: Tensor, K: Tensor, size: torch.Size) -> Tensor:
        """Return (I + alpha G)^-1, `(height, width/2 + 1, channels, channels)`."""
        A_hat, K_hat = (self._transfer(kernel, size) for kernel in (A, K))
        I = torch.eye(self.channels, dtype=A_hat.dtype, device=A_hat.device)
        G = self.margin * I + A_hat.mH @ A_hat - K_hat
        return torch.linalg.inv(I + alpha * G)

    def _transfer(self, kernel: Tensor, size: torch.Size) -> Tensor:
        """Return the matrices (height, width/2 + 1, channels, channels) of a circular kernel."""
        k, (height, width) = self.kernel_size, size
        image = F.pad(kernel, (0, width - k, 0, height - k)).roll((-(k // 2),) * 2, (2, 3))
        # The conjugate, for the layer is a correlation.
        return torch.fft.rfft2(image).conj().permute(2, 3, 0, 1)


def _adjoint(weight: Tensor) -> Tensor:
    """Return the weight of the adjoint map: transposed, kernels flipped as well."""
    return weight.transpose(0, 1).flip(tuple(range(2, weight.dim())))


def _start(shape: tuple[int, ...], bound: float | None) -> Tensor:
    """Return a normal initial weight, its norm half of the bound, or of 1."""
    weight = torch.randn(shape) / prod(shape[1:]) ** 0.5
    return weight * (_START * (1.0 if bound is None else bound) / operator_norm(weight))
