"""A linear solve of few products at once (G3): the powers L^k r and one small system a sample."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from deqlqr._linalg import full_precision, least_norm

_RIDGE = 8  # times the rounding unit, of the small system's diagonal


class Powers:
    """The least residual in the span of r, L r, ... (G3), from one small system for each sample.

    Attributes:
        bound: Of ||(I - L)^-1|| on the first such span, and of what rounding in the last amounts
            to; `None` before, and where a right side has not come to it.
    """

    def __init__(self) -> None:
        self.bound: Tensor | None = None
        self._inverse_norm: Tensor | None = None
        self._block = torch.empty(0)

    @staticmethod
    def most(dtype: torch.dtype) -> int:
        """Return how many powers span their space well enough for normal equations."""
        return 8 if dtype == torch.float64 else 4

    def reduce(
        self, x: Tensor, r: Tensor, count: int, product: Callable[[Tensor], Tensor], goal: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return x moved by r, L r, ... L^(count - 1) r so that its residual r is least."""
        if self._block.shape != (count + 1, *r.shape):
            self._block = r.new_empty(count + 1, *r.shape)
        power = self._block[0].copy_(r)
        for k in range(count):
            power = product(power)
            self._block[k + 1] = power
        with full_precision(r):
            return self._lowered(x, r, self._block.transpose(0, 1), goal)

    def _lowered(self, x: Tensor, r: Tensor, P: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and r moved for the least r, from the powers P (batch, count + 1, n)."""
        gram = P @ P.mT
        QP = gram[:, :-1] - gram[:, 1:]  # q_k = p_k - p_(k + 1)
        QQ = QP[..., :-1] - QP[..., 1:]
        squares = QQ.diagonal(dim1=-2, dim2=-1)[..., None]
        # A power that has vanished, or depends on others but for rounding, adds nothing.
        scale = torch.where(squares > least_norm(r) ** 2, squares.rsqrt(), 0.0)
        system = QQ * scale * scale.mT
        system.diagonal(dim1=-2, dim2=-1).fill_(1 + _RIDGE * torch.finfo(r.dtype).eps)
        L, info = torch.linalg.cholesky_ex(system)
        L = torch.where((info == 0)[:, None, None], L, float("inf"))  # moves nothing
        found, share = torch.zeros_like(scale), QP[..., :1]
        for again in (True, False):
            step = scale * torch.cholesky_solve(scale * share, L)
            step = step.nan_to_num(0.0, 0.0, 0.0)
            found = found + step
            difference = F.pad(step, (0, 0, 1, 0)) - F.pad(step, (0, 0, 0, 1))  # Q step = -P it
            r = torch.baddbmm(r[:, None], difference.mT, P)[:, 0]
            if not again or (torch.linalg.vector_norm(r, dim=-1) <= goal).all():
                break
            rest = torch.bmm(r[:, None], P.mT).mT  # squaring the condition in QQ has cost digits
            share = rest[:, :-1] - rest[:, 1:]
        if self._inverse_norm is None:
            self._inverse_norm = self._bounded(gram, scale, L)
        norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        terms = (found[..., 0].abs() * norms[:, :-1]).sum(-1) / norms[:, 0]
        self.bound = torch.maximum(self._inverse_norm, terms.nan_to_num(1.0))
        return torch.baddbmm(x[:, None], found.mT, P[:, :-1])[:, 0], r

    @staticmethod
    def _bounded(gram: Tensor, scale: Tensor, L: Tensor) -> Tensor:
        """Return a bound of the norm of the p that belong to orthonormal q."""
        half = torch.linalg.solve_triangular(L, scale * gram[:, :-1, :-1], upper=False)
        inner = torch.linalg.solve_triangular(L, scale * half.mT, upper=False)
        return inner.abs().sum(-1).amax(-1).clamp(min=1.0).sqrt().nan_to_num(1.0)
