"""What to watch while a DEQ trains: evaluations, residual, failures, and the spectral radius of A.

    (J1)  penalty = E ||A'e||_2^2 / n,   e standard normal:  ||A||_F^2 / n
    (J3)  growth = mean ||A'e||_2^2,   e = (A')^k r / ||(A')^k r||,  r random

Plain iteration converges while the spectral radius of A = df/dz at the fixed point is below 1, and
an adjoint error is amplified by about 1 / (1 - radius). The radius is a limit, not a Rayleigh
quotient, so that it is right for matrices that are not normal. The growth (J3) is about radius^2
for large k; to lower it with e held is the shortest way to a smaller radius.

Source of (J1): S. Bai, V. Koltun, J. Z. Kolter (2021), Stabilizing equilibrium models by Jacobian
regularization, arXiv:2106.14342.
"""

import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deqlqr._checks import at_least
from deqlqr.call import Call
from deqlqr.deq import DEQ
from deqlqr.equilibrium import pullback, pullback_at
from deqlqr.layer_calls import LayerCall
from deqlqr.resolvent import Product, matrix_of

_KRYLOV = 24  # dimension of the space whose Ritz values are taken
_POWERS = 24  # products before it, which turn the start towards the dominant part


@dataclass(frozen=True)
class Observation:
    """One look at a DEQ layer, ready to be logged: `vars(observation)` is a flat dictionary.

    Attributes:
        evaluations: Mean evaluations of f a sample needed, forward.
        residual: Largest residual.
        failed: Share of samples without a fixed point.
        radius: Largest spectral radius of A over the samples looked at whose A is finite.
        backward_evaluations: Mean products of the last adjoint solve, or `None` before one.
        backward_error: Largest `error` of the last adjoint solve, or `None`.
    """

    evaluations: float
    residual: float
    failed: float
    radius: float
    backward_evaluations: float | None
    backward_error: float | None


class Monitor:
    """Looks at a layer's last solve and warns before the fixed point is lost.

    Args:
        layer: The DEQ layer.
        alarm: Warn (`RuntimeWarning`) when the spectral radius reaches this.
        samples: Samples whose A is looked at.

    Raises:
        ValueError: If `alarm` is not positive or `samples` is below 1.

    Example:
        >>> from deqlqr.blocks import DenseBlock
        >>> layer = DEQ(DenseBlock(4))
        >>> monitor = Monitor(layer)
        >>> x = torch.ones(3, 4)
        >>> _ = layer(x)
        >>> monitor.observe(x).failed
        0.0
    """

    def __init__(self, layer: DEQ, *, alarm: float = 0.98, samples: int = 4) -> None:
        self.layer, self.alarm = layer, at_least("alarm", alarm, 0.0, strict=True)
        self.samples = int(at_least("samples", samples, 1))

    def observe(self, *inputs: Any, **shared: Any) -> Observation:
        """Return what is known of the layer's last solve, which was for these inputs.

        Raises:
            ValueError: If the layer has not been called yet.
        """
        solution, back = self.layer.solution, self.layer.backward_solution
        if solution is None:
            raise ValueError("the layer has not been called yet.")
        part = lambda t: t[: self.samples] if isinstance(t, Tensor) else t
        z = solution.value
        z = part(z) if isinstance(z, Tensor) else tuple(part(t) for t in z)
        radii = jacobian_radius(self.layer, z, *map(part, inputs), **shared)
        radius = float(radii.nan_to_num(nan=float("-inf")).max())
        if radius >= self.alarm:
            warnings.warn(
                f"the spectral radius of df/dz at the fixed point has reached {radius:.3f}: the "
                "fixed point is about to be lost. Lower the learning rate, add jacobian_penalty, "
                "or use a block that is a contraction.",
                RuntimeWarning,
                stacklevel=2,
            )
        mean = lambda t: float(t.double().mean())
        return Observation(
            evaluations=mean(solution.evaluations),
            residual=float(solution.residual.max()),
            failed=1.0 - mean(solution.converged),
            radius=radius,
            backward_evaluations=None if back is None else mean(back.evaluations),
            backward_error=None if back is None else float(back.error.max()),
        )


def jacobian_radius(layer: DEQ, z: Any, *inputs: Any, **shared: Any) -> Tensor:
    """Return the spectral radius of A = df/dz at z per sample, `(batch,)`.

    Exact (from A itself) for states of up to 64 components; else the largest Ritz value of a
    Krylov space that starts where many products have led.

    Args:
        layer: The DEQ layer.
        z: State, `(batch, *state)` or a tuple of such.
        inputs: The layer's inputs, of the same samples.
        shared: Its keywords.
    """
    call = Call(layer, inputs, shared, z)
    at = call.start
    with torch.no_grad(), _random_numbers_kept(at):
        product = pullback_at(call.evaluate, at, call.tensors)  # A', which has the same eigenvalues
        if at.shape[1] <= 64:
            return _eigenvalue_radius(matrix_of(product, at))
        return _ritz_radius(product, at)


@contextmanager
def _random_numbers_kept(like: Tensor) -> Generator[None, None, None]:
    devices = [like.device] if like.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield


def _eigenvalue_radius(A: Tensor) -> Tensor:
    """Return the largest magnitude of the eigenvalues; NaN where A is not finite."""
    lost = ~A.flatten(1).isfinite().all(-1)
    radius = torch.linalg.eigvals(A.masked_fill(lost[:, None, None], 0.0)).abs().amax(-1)
    return radius.masked_fill(lost, float("nan"))


def _ritz_radius(product: Product, like: Tensor) -> Tensor:
    """Return the largest Ritz value by Arnoldi's process, after a power iteration."""
    norm = lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    tiny = torch.finfo(like.dtype).tiny
    v = _led(product, like)
    basis, H = [v], like.new_zeros(len(like), _KRYLOV + 1, _KRYLOV)
    for k in range(_KRYLOV):
        w = product(basis[-1])
        V = torch.stack(basis, 1)
        for _ in range(2):
            share = torch.bmm(w[:, None], V.mT)
            H[:, : k + 1, k] += share[:, 0]
            w = w - torch.bmm(share, V)[:, 0]
        size = norm(w)
        H[:, k + 1, k] = size[:, 0]
        # An exhausted space goes on with zeros, which add eigenvalues 0.
        small = size <= 1e2 * torch.finfo(w.dtype).eps * norm(H[:, : k + 1, k])
        basis.append(torch.where(small, 0.0, w / size.clamp(min=tiny)))
    return _eigenvalue_radius(H[:, :-1])


def _led(product: Product, like: Tensor) -> Tensor:
    """Return unit vectors (batch, n) near the dominant part of a matrix, by a power iteration."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
    tiny = torch.finfo(like.dtype).tiny
    for _ in range(_POWERS + 1):
        v = v / torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp(min=tiny)
        last, v = v, product(v)
    return last


def jacobian_growth(layer: DEQ, z: Any, *inputs: Any, **shared: Any) -> Tensor:
    """Return (J3), a scalar; differentiable in the parameters, the inputs and z.

    Args:
        layer: The DEQ layer.
        z: State, `(batch, *state)` or a tuple of such.
        inputs: The layer's inputs, of the same samples.
        shared: Its keywords.
    """
    call = Call(layer, inputs, shared, z)
    with torch.no_grad(), _random_numbers_kept(call.start):
        e = _led(pullback_at(call.evaluate, call.start, call.tensors), call.start)
    at = call.shape.flatten(z)
    _, pull = pullback(lambda z: call.evaluate(z, *call.tensors), at)
    return pull(e.to(at.dtype))[0].square().sum() / len(at)


def jacobian_penalty(
    layer: DEQ,
    z: Any,
    *inputs: Any,
    samples: int = 1,
    generator: torch.Generator | None = None,
    **shared: Any,
) -> Tensor:
    """Return the estimate of ||A||_F^2 / n (J1), a scalar to add to a loss.

    Differentiable in z, the inputs and the parameters; the mean over the batch.

    Args:
        layer: The DEQ layer.
        z: Its output for the inputs.
        inputs: The layer's inputs.
        samples: Random vectors e; the estimate is unbiased for any number.
        generator: Draws e.
        shared: The layer's keywords.

    Raises:
        ValueError: If `samples` is below 1.
    """
    count = int(at_least("samples", samples, 1))
    call = Call(layer, inputs, shared, z)
    at = call.shape.flatten(z)
    fz, pull = pullback(lambda z: call.evaluate(z, *call.tensors), at)
    total = at.new_zeros(())
    for _ in range(count):
        e = torch.randn(fz.shape, generator=generator, dtype=fz.dtype, device=fz.device)
        total = total + pull(e)[0].square().sum()
    return total / (count * at.numel())


def penalty_of(calls: Sequence[LayerCall], seed: int) -> Tensor | float:
    """Return the sum of (J1) over calls of DEQ layers; 0 if there are none.

    Args:
        calls: What was recorded of a forward pass.
        seed: Of the random vectors.
    """
    total: Tensor | float = 0.0
    for call in calls:
        start = call.z if isinstance(call.z, Tensor) else call.z[0]
        generator = torch.Generator(start.device).manual_seed(seed)
        total = total + jacobian_penalty(
            call.layer, call.z, *call.inputs, generator=generator, **call.shared
        )
    return total
