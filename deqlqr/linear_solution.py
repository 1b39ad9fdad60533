"""What a linear solve returns: x of x = c + L x, and its certificate."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deqlqr._linalg import least_norm, not_finite
from deqlqr.solution import ConvergenceError, FixedPointResult, describe_failures


@dataclass(frozen=True)
class LinearSolution:
    """x = c + L x per sample, with its certificate.

    Attributes:
        value: x, `(batch, n)`, or `(batch, k, n)` for k right sides.
        result: A `FixedPointResult` code per sample, `(batch,)`.
        evaluations: Products with L, `(batch,)`.
        residual: `||c + L x - x|| / ||c||`, the largest of the right sides, `(batch,)`.
        error: (G2) over `||x||`, the same: a bound of the relative error where I - L was
            factorised, else an estimate of it; inf where nothing can be said.
    """

    value: Tensor
    result: Tensor
    evaluations: Tensor
    residual: Tensor
    error: Tensor

    @property
    def converged(self) -> Tensor:
        """Boolean per sample, shape `(batch,)`."""
        return self.result == FixedPointResult.CONVERGED

    def raise_if_failed(self, what: str = "linear solve") -> "LinearSolution":
        """Return `self`, or raise naming the samples that failed.

        Raises:
            ConvergenceError: If any sample did not converge.
        """
        message = describe_failures(self.result, FixedPointResult, what)
        if message is not None:
            worst = float(self.error.nan_to_num(nan=float("inf"), posinf=float("inf")).max())
            raise ConvergenceError(f"{message} Relative error up to {worst:.1e}.", self)
        return self


def certified(
    rights: Tensor,
    x: Tensor,
    r: Tensor,
    inverse_norm: Tensor,
    products: int,
    tol: float,
) -> LinearSolution:
    """Return x with its certificate.

    Args:
        rights: c, `(batch, k, n)`.
        x: The same.
        r: c + L x - x, the same.
        inverse_norm: Of I - L, or an estimate, `(batch, k)` or `(batch, 1)`.
        products: That were taken.
        tol: Relative residual.
    """
    size = lambda v: torch.linalg.vector_norm(v, dim=-1)
    least, size_r = least_norm(x), size(r)
    residual = (size_r / size(rights).clamp(min=least)).amax(-1)
    error = (inverse_norm * size_r / size(x).clamp(min=least)).amax(-1)
    # Rounding alone leaves what it leaves, however small tol is.
    reach = max(2 * tol, 1e2 * torch.finfo(x.dtype).eps)
    result = torch.where(
        residual <= reach, int(FixedPointResult.CONVERGED), int(FixedPointResult.MAX_STEPS)
    )
    result = result.masked_fill(~residual.isfinite(), int(FixedPointResult.NON_FINITE))
    lost = not_finite(x)
    if lost is not None:
        result = result.masked_fill(lost.any(-1), int(FixedPointResult.NON_FINITE))
    return LinearSolution(x, result, torch.full_like(result, products), residual, error)


def side_by_side(parts: Sequence[LinearSolution]) -> LinearSolution:
    """Return the solution of all right sides from those of each, `(batch, 1, n)`."""
    return LinearSolution(
        # One right side after the other in memory, as they are used.
        torch.cat([p.value.transpose(0, 1) for p in parts]).transpose(0, 1),
        torch.stack([p.result for p in parts]).amax(0),
        torch.stack([p.evaluations for p in parts]).sum(0),
        torch.stack([p.residual for p in parts]).amax(0),
        torch.stack([p.error for p in parts]).amax(0),
    )
