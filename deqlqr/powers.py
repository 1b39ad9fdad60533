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
            to, `(k, batch)`; `None` before, and where a right side has not come to it.
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
        self,
        x: Tensor | None,
        r: Tensor,
        count: int,
        product: Callable[[Tensor], Tensor],
        goal: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return x moved by r, L r, ... L^(count - 1) r so that its residual r is least.

        Args:
            x: `(k, batch, n)`, for k right sides; `None` for zero.
            r: Its residual.
            count: How many powers.
            product: v (batch, n) -> L v.
            goal: Norm of r that is enough, `(k, batch)`.
        """
        sides, shape = len(r), r.shape
        if self._block.shape != (count + 1, *shape):
            self._block = r.new_empty(count + 1, *shape)
        P = self._block
        P[0] = r
        for j in range(count):
            for i in range(sides):
                P[j + 1, i] = product(P[j, i])
        with full_precision(r):
            move, r = self._lowered(
                r.flatten(0, 1), P.flatten(1, 2).transpose(0, 1), goal.flatten(), sides
            )
        move = move.view(shape)
        return move if x is None else x + move, r.view(shape)

    def clear(self) -> None:
        """Give back the memory of the powers."""
        self._block = self._block.new_empty(0)

    def _lowered(self, r: Tensor, P: Tensor, goal: Tensor, sides: int) -> tuple[Tensor, Tensor]:
        """Return how x moves for the least r, and r, by powers P (sides batch, count + 1, n)."""
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
            self._inverse_norm = self._bounded(gram, scale, L).view(sides, -1).amax(0)
        norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        terms = (found[..., 0].abs() * norms[:, :-1]).sum(-1) / norms[:, 0]
        self.bound = torch.maximum(self._inverse_norm, terms.nan_to_num(1.0).view(sides, -1))
        return torch.bmm(found.mT, P[:, :-1])[:, 0], r

    @staticmethod
    def _bounded(gram: Tensor, scale: Tensor, L: Tensor) -> Tensor:
        """Return a bound of the norm of the p that belong to orthonormal q."""
        half = torch.linalg.solve_triangular(L, scale * gram[:, :-1, :-1], upper=False)
        inner = torch.linalg.solve_triangular(L, scale * half.mT, upper=False)
        return inner.abs().sum(-1).amax(-1).clamp(min=1.0).sqrt().nan_to_num(1.0)
