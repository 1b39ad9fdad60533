"""The spectral radius, from above, by repeated squaring."""

import torch
from torch import Tensor

from deqlqr._linalg import largest, norm


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
    return _gelfand(A, squarings)[0]


def closed_loop_radius(A_cl: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bound that certifies the closed loop, and the estimate that is reported.

    The loop is A_cl times exp(log_scale), `(*batch,)`, which may be too large for a number.
    """
    bound, estimate = _gelfand(A_cl, 7, log_scale)
    near = bound > 0.9  # there the bound must not be what keeps a stable loop from passing
    if near.any():
        bound[near], estimate[near] = _gelfand(A_cl[near], 26, log_scale[near])
    return bound, estimate


def _gelfand(A: Tensor, squarings: int, log_scale: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Return Gelfand's bound of the spectral radius, and an estimate of what it tends to.

    If ||A^k|| goes as c rho^k, then b_2k^2 / b_k of the bounds b is rho.
    """
    tiny = torch.finfo(A.dtype).tiny
    batch, n = A.shape[:-2], A.shape[-1]
    A = A.reshape(batch.numel(), n, n)  # a batched product in one call
    top = largest(A) + tiny  # so that no square vanishes or overflows
    A = A / top[:, None, None]
    sizes = [norm(A) + tiny]
    for _ in range(squarings):
        # A^(2^k) is a matrix that is squared here, times the power by which it was scaled.
        A = A / sizes[-1][:, None, None]
        A = torch.bmm(A, A)
        sizes.append(norm(A) + tiny)
    powers = 0.5 ** torch.arange(squarings + 1, dtype=A.dtype, device=A.device)
    terms = powers * torch.stack(sizes, -1).log()
    bound = (top.log() + terms.sum(-1)).reshape(batch) + log_scale
    last = terms[:, -1].reshape(batch)
    return bound.exp(), (bound + last).exp()
