"""What "steepest" is measured in: the divergence D whose Hamiltonian gives Q, R and M.

    (H1)  H(z, u) = D(h(z, u)) + f(z, u)'p,   p = A'p + dD/dz
    (H2)  Q = H_zz,   R = H_uu,   M = H_uz

For a divergence of the model's own output, D(y, y_ref) with y_ref = y, the gradient of D vanishes,
so p = 0 and (H2) is the metric Lambda = d2D/dy2 pulled back through the output y = h(z, u):

    (H3)  [Q M'; M R] = [h_z h_u]' Lambda [h_z h_u]

Source: thesis sections 3.2 and 4.4; S. Amari (1998), doi:10.1162/089976698300017746.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


class Divergence:
    """Base of all divergences."""


class Euclidean(Divergence):
    """||du||^2 / 2: gradient descent. Q = 0, M = 0, R = I (theorem 4.2.1)."""


class Newton(Divergence):
    """The loss itself: Q, R, M are its full Hessian through (H1), which may be indefinite."""


class OutputDivergence(Divergence):
    """A divergence of the model's output from itself; (H3) holds."""

    @abstractmethod
    def metric(self, y: Tensor) -> Tensor:
        """Return Lambda (batch, k, k), symmetric, for outputs y (batch, k)."""

    def root(self, y: Tensor) -> Tensor:
        """Return C (batch, k, r) with C C' = Lambda, r at most k."""
        values, vectors = torch.linalg.eigh(self.metric(y))
        return vectors * values.clamp(min=0.0).sqrt()[..., None, :]

    def coordinates(self, y: Tensor, c: Tensor) -> Tensor:
        """Return w (batch, r) with C w = c, for c (batch, k) in the range of Lambda."""
        return (torch.linalg.pinv(self.root(y)) @ c[..., None])[..., 0]

    def sample(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """Return a random c (batch, k) with mean 0 and covariance Lambda."""
        C = self.root(y)
        shape = (len(C), C.shape[-1], 1)
        signs = torch.randint(0, 2, shape, generator=generator, device=y.device) * 2 - 1
        return (C @ signs.to(C.dtype))[..., 0]


class CategoricalKL(OutputDivergence):
    """KL divergence of a categorical output with logits y: natural gradient."""

    def metric(self, y: Tensor) -> Tensor:
        """Return diag(p) - p p', p = softmax(y)."""
        p = y.softmax(-1)
        return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]

    def root(self, y: Tensor) -> Tensor:
        """Return a root of k - 1 columns."""
        p = y.softmax(-1)
        q = p.sqrt()
        C = torch.diag_embed(q) - p[..., :, None] * q[..., None, :]
        # C q = 0: the reflection that takes q to an axis leaves nothing in that axis' column. With
        # the axis of the likeliest class, columns stay apart however unlikely a class is.
        order = _likeliest_last(p)
        q, C = q.gather(-1, order), C.gather(-1, order[..., None, :].expand_as(C))
        return C[..., :-1] - C[..., -1:] * (q[..., :-1] / (1 + q[..., -1:]))[..., None, :]

    def coordinates(self, y: Tensor, c: Tensor) -> Tensor:
        """Return w with C w = c for c that sums to zero: what the reflection makes of c / q."""
        p = y.softmax(-1)
        order = _likeliest_last(p)
        q, c = p.sqrt().gather(-1, order), c.gather(-1, order)
        v = torch.where(c == 0, 0.0, c / q)
        return v[..., :-1] - q[..., :-1] * (v[..., -1:] / (1 + q[..., -1:]))

    def sample(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """Return the gradient in y of -log p of a class drawn from the model, `(batch, k)`."""
        p = y.softmax(-1)
        # Of a p that is not finite c is not either; multinomial would raise.
        drawn = torch.multinomial(p.where(p.isfinite(), 1.0), 1, generator=generator)
        return p.scatter_add(-1, drawn, torch.full_like(p[..., :1], -1.0))


def _likeliest_last(p: Tensor) -> Tensor:
    """Return the order of the classes in which the likeliest and the last have changed places."""
    order = torch.arange(p.shape[-1], device=p.device).expand(p.shape)
    likeliest = p.argmax(-1, keepdim=True)
    last = torch.full_like(likeliest, p.shape[-1] - 1)
    return order.scatter(-1, likeliest, last).scatter(-1, last, likeliest)


@dataclass(frozen=True)
class GaussianKL(OutputDivergence):
    """KL divergence of a Gaussian output with mean y: least squares.

    Attributes:
        variance: Of each of the k outputs; `None` takes k / 2, for which the mean-squared error is
            the negative log-likelihood, so that the metric is its Gauss-Newton matrix.
    """

    variance: float | None = 1.0

    def metric(self, y: Tensor) -> Tensor:
        """Return the identity over the variance."""
        k = y.shape[-1]
        variance = k / 2 if self.variance is None else self.variance
        eye = torch.eye(k, dtype=y.dtype, device=y.device) / variance
        return eye.expand(*y.shape, k)

    def root(self, y: Tensor) -> Tensor:
        """Return the root of the metric, a multiple of the identity."""
        return self.metric(y).sqrt()

    def coordinates(self, y: Tensor, c: Tensor) -> Tensor:
        """Return w with C w = c."""
        variance = y.shape[-1] / 2 if self.variance is None else self.variance
        return c * variance**0.5


@dataclass(frozen=True)
class Custom(OutputDivergence):
    """A user's own divergence.

    Attributes:
        function: `D(y, y_ref)` on one sample's output, two tensors `(k,)` to a scalar, twice
            differentiable, with D(y, y) = 0 and a minimum there.
    """

    function: Callable[[Tensor, Tensor], Tensor]

    def metric(self, y: Tensor) -> Tensor:
        """Return d2D/dy2 at y = y_ref.

        Raises:
            ValueError: If D has no minimum at y = y_ref, so that it is no divergence.
        """
        y = y.detach()
        gradient = torch.vmap(torch.func.grad(self.function))(y, y)
        Lambda = torch.vmap(torch.func.jacrev(torch.func.grad(self.function)))(y, y)
        if not bool(Lambda.isfinite().all()):
            raise ValueError("divergence: the Hessian of D(y, y_ref) at y = y_ref is not finite.")
        loose = torch.finfo(y.dtype).eps ** 0.5
        if float(gradient.abs().max()) > loose * max(1.0, float(Lambda.abs().max())):
            raise ValueError(
                "divergence: D(y, y_ref) must have zero gradient at y = y_ref, got one of size "
                f"{float(gradient.abs().max()):.2e}."
            )
        smallest = torch.linalg.eigvalsh(Lambda).min()
        if float(smallest) < -loose * max(1.0, float(Lambda.abs().max())):
            raise ValueError(
                "divergence: D(y, y_ref) must have a minimum at y = y_ref, but its Hessian there "
                f"has the eigenvalue {float(smallest):.2e}."
            )
        return Lambda


DivergenceLike = str | Divergence | Callable[[Tensor, Tensor], Tensor]

_BY_NAME: dict[str, type[Divergence]] = {
    "euclidean": Euclidean,
    "categorical": CategoricalKL,
    "gaussian": GaussianKL,
    "newton": Newton,
}


def make_divergence(divergence: DivergenceLike) -> Divergence:
    """Return a divergence from an object, a name, or a user's function D(y, y_ref).

    Raises:
        ValueError: If the name is unknown or the argument is none of these.
    """
    if isinstance(divergence, Divergence):
        return divergence
    if isinstance(divergence, str):
        if divergence not in _BY_NAME:
            raise ValueError(f"divergence must be one of {sorted(_BY_NAME)}, got {divergence!r}.")
        return _BY_NAME[divergence]()
    if callable(divergence):
        return Custom(divergence)
    raise ValueError(
        f"divergence must be a name, a Divergence or a function D(y, y_ref), got {divergence!r}."
    )
