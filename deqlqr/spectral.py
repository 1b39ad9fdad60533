"""The spectral radius, from above, by repeated squaring."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from deqlqr._linalg import largest, norm

_NEAR = math.log(0.9)  # log of the bound above which more squarings follow
_STAGES = (4, 5, 7, 26)  # squarings after which the bound of a closed loop is looked at
_PROBES, _TIMES = 4, 8  # vectors, and how often a power is applied to them


def spectral_radius(A: Tensor, squarings: int = 12) -> Tensor:
    """Return the spectral radius of A (*batch, n, n) from above, by repeated squaring.

    By Gelfand's formula rho(A) <= ||A^k||_F^(1/k) for every k; here k = 2^squarings, which is
    tight to a relative error of about log(n cond)/k. Products only, so it stays on the device;
    a value below 1 certifies stability. Returns NaN for a matrix that holds NaN or inf.

    Args:
        A: `(*batch, n, n)`.
        squarings: Number of squarings.

    Example:
        >>> float(spectral_radius(torch.diag(torch.tensor([0.5, -0.9])))) - 0.9 < 1e-3
        True
    """
    *batch, n = A.shape[:-1]
    power = _Power.of(A.reshape(A.shape[:-2].numel(), n, n))
    return power.squared(squarings).log_bound.exp().reshape(batch)


def closed_loop_radius(A_cl: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bound that certifies the closed loop, and the estimate that is reported.

    The loop is A_cl times exp(log_scale), `(*batch,)`, which may be too large for a number.
    """
    *batch, n = A_cl.shape[:-1]
    log_scale = log_scale.flatten()
    power = _Power.of(A_cl.reshape(len(log_scale), n, n), log_scale).squared(_STAGES[0])
    logs = torch.stack([power.log_bound, power.log_estimate()])
    index = torch.arange(len(log_scale), device=log_scale.device)
    for squarings in _STAGES[1:]:
        # Near 1 the bound must not be what keeps a stable loop from passing.
        near = (power.log_bound > _NEAR).nonzero()[:, 0]
        if len(near) == 0:
            break
        index, power = index[near], power.pick(near).squared(squarings)
        logs[:, index] = torch.stack([power.log_bound, power.log_estimate()])
    bound, estimate = logs.exp().reshape(2, *batch)
    return bound, estimate


class _Power(NamedTuple):
    """A^k for k = 2^squarings, over its Frobenius norm."""

    A: Tensor  # (batch, n, n)
    log_bound: Tensor  # log of ||A^k||_F^(1/k), Gelfand's bound of the spectral radius
    squarings: int

    @staticmethod
    def of(A: Tensor, log_scale: Tensor | float = 0.0) -> "_Power":
        """Return A times exp(log_scale), `(batch,)`, itself."""
        tiny = torch.finfo(A.dtype).tiny
        top = largest(A) + tiny  # so that no square in the norm vanishes or overflows
        A = A / top[:, None, None]
        size = norm(A) + tiny
        return _Power(A.div_(size[:, None, None]), top.log() + size.log() + log_scale, 0)

    def squared(self, squarings: int) -> "_Power":
        """Return the power 2^squarings."""
        A, tiny = self.A, torch.finfo(self.A.dtype).tiny
        log_bound = self.log_bound
        for k in range(self.squarings, squarings):
            A = torch.bmm(A, A)
            size = norm(A) + tiny
            A.mul_(size.reciprocal()[:, None, None])
            log_bound = torch.add(log_bound, size.log_(), alpha=0.5 ** (k + 1))
        return _Power(A, log_bound, squarings)

    def log_estimate(self) -> Tensor:
        """Return the log of the rate at which a few vectors grow, which tends to the radius."""
        A, tiny = self.A, torch.finfo(self.A.dtype).tiny
        batch, n = A.shape[:2]
        wave = torch.arange(n * _PROBES, dtype=A.dtype, device=A.device).square_().sin_()
        # Rows times A' are several times as fast as A times columns.
        X = torch.bmm(wave.reshape(1, _PROBES, n).expand(batch, -1, -1), A.mT)
        X.div_((norm(X) + tiny)[:, None, None])
        for _ in range(_TIMES):
            X = torch.bmm(X, A.mT)
        return self.log_bound + (norm(X) + tiny).log() / (_TIMES * 2**self.squarings)

    def pick(self, index: Tensor) -> "_Power":
        """Return elements of the batch."""
        return _Power(self.A[index], self.log_bound[index], self.squarings)
