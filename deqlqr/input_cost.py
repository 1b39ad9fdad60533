"""The input cost R of an LQR, kept as what it is in a training step: a diagonal and one block.

The output depends directly on few controls, the readout's; damping adds a multiple of I. So R is
diagonal but for the block of those controls, and no m x m matrix needs to be formed or read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deqlqr._linalg import LUFactor, lu_factor
from deqlqr.spectral import spectral_radius


@dataclass(frozen=True)
class InputCost:
    """Symmetric R (*batch, m, m) in which only the controls `coupled` have off-diagonal entries.

    Stands in for the dense R in `LQR`, `solve_dare` and `steady_state`.

    Attributes:
        diagonal: Diagonal of R, `(*batch, m)`; its entries at `coupled` are not read.
        coupled: Indices of the coupled controls in increasing order, int64, `(c,)`.
        block: R among them, symmetric, `(*batch, c, c)`.
    """

    diagonal: Tensor
    coupled: Tensor
    block: Tensor

    @staticmethod
    def of(R: "Tensor | InputCost") -> "InputCost":
        """Return R (*batch, m, m) with its coupled controls found; an `InputCost` as it is."""
        if isinstance(R, InputCost):
            return R
        diagonal = R.diagonal(dim1=-2, dim2=-1)
        off_diagonal = (R != 0).sum(-1) > (diagonal != 0)  # NaN counts: it is not equal to 0
        coupled = off_diagonal.flatten(0, -2).any(0) if R.dim() > 2 else off_diagonal
        coupled = coupled.nonzero()[:, 0]
        everything = len(coupled) == R.shape[-1]
        return InputCost(diagonal, coupled, R if everything else R[..., coupled[:, None], coupled])

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense R."""
        return self.diagonal.shape + self.diagonal.shape[-1:]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the entries."""
        return self.block.dtype

    @property
    def device(self) -> torch.device:
        """Device of the entries."""
        return self.block.device

    def dense(self) -> Tensor:
        """Return R `(*batch, m, m)`."""
        if self._everything:
            return self.block
        R = torch.diag_embed(self.diagonal)
        if len(self.coupled):
            R[..., self.coupled[:, None], self.coupled] = self.block
        return R

    def damped(self, delta: float | Tensor) -> "InputCost":
        """Return R + delta I, or R + diag(delta) for a delta (m,)."""
        eye = torch.eye(len(self.coupled), dtype=self.dtype, device=self.device)
        among = delta[self.coupled] if isinstance(delta, Tensor) else delta
        return InputCost(self.diagonal + delta, self.coupled, self.block + among * eye)

    def to(self, dtype: torch.dtype) -> "InputCost":
        """Return R in another dtype."""
        return InputCost(self.diagonal.to(dtype), self.coupled, self.block.to(dtype))

    def divided(self, scale: Tensor) -> "InputCost":
        """Return R / scale, scale (*batch,)."""
        block = self.block / scale[..., None, None]
        return InputCost(self.diagonal / scale[..., None], self.coupled, block)

    def expand(self, size: int, *_: int) -> "InputCost":
        """Return R with a leading batch dimension of the size."""
        diagonal = self.diagonal.expand(size, *self.diagonal.shape)
        return InputCost(diagonal, self.coupled, self.block.expand(size, *self.block.shape))

    def mean(self) -> "InputCost":
        """Return the mean of R over the first batch dimension."""
        return InputCost(self.diagonal.mean(0), self.coupled, self.block.mean(0))

    def __getitem__(self, samples: slice) -> "InputCost":
        """Return R of some elements of the first batch dimension."""
        return InputCost(self.diagonal[samples], self.coupled, self.block[samples])

    def __matmul__(self, right: Tensor) -> Tensor:
        """Return R right (*batch, m, k)."""
        if self._everything:
            return self.block @ right
        product = right * self.diagonal[..., None]
        if len(self.coupled):
            product[..., self.coupled, :] = self.block @ right[..., self.coupled, :]
        return product

    def norm(self) -> Tensor:
        """Return the Frobenius norm of R, `(*batch,)`."""
        rest = self.diagonal.index_fill(-1, self.coupled, 0.0)
        block = torch.linalg.matrix_norm(self.block)
        return torch.hypot(block, torch.linalg.vector_norm(rest, dim=-1))

    def radius(self) -> Tensor:
        """Return a bound on the spectral radius of R, `(*batch,)`, from above."""
        rest = self.diagonal.abs().index_fill(-1, self.coupled, 0.0)
        largest = rest.amax(-1) if rest.shape[-1] else rest.sum(-1)
        if not len(self.coupled):
            return largest
        return torch.maximum(largest, spectral_radius(self.block))

    def factorise(self) -> "InputCostFactor":
        """Return what solves with R."""
        return InputCostFactor.of(self)

    @property
    def _everything(self) -> bool:
        return len(self.coupled) == self.diagonal.shape[-1]


@dataclass(frozen=True)
class InputCostFactor:
    """R factorised: Cholesky where its block is positive definite, LU where it is not.

    Attributes:
        cost: R.
        L: Cholesky factor of the block, `(*batch, c, c)`.
        indefinite: Where there is none, boolean `(*batch,)`.
        LU: The block's LU factors, if `indefinite` is true somewhere.
        singular: Where R is singular, boolean `(*batch,)`.
    """

    cost: InputCost
    L: Tensor
    indefinite: Tensor
    LU: LUFactor | None
    singular: Tensor

    @staticmethod
    def of(cost: InputCost) -> "InputCostFactor":
        """Factorise; a singular R is marked, not raised."""
        L, info = torch.linalg.cholesky_ex(cost.block)
        indefinite, LU = info != 0, None
        if not len(cost.coupled):
            return InputCostFactor(cost, L, indefinite, LU, (cost.diagonal == 0).any(-1))
        singular = (cost.diagonal == 0).index_fill(-1, cost.coupled, False).any(-1)
        if bool(indefinite.any()):
            LU = lu_factor(cost.block)
            singular = singular | (indefinite & (LU.info != 0))
        return InputCostFactor(cost, L, indefinite, LU, singular)

    def solve(self, right: Tensor) -> Tensor:
        """Return R^-1 right (*batch, m, k)."""
        if self.cost._everything:
            return self._solve_block(right)
        solved = right / self.cost.diagonal[..., None]
        if len(self.cost.coupled):
            solved[..., self.cost.coupled, :] = self._solve_block(right[..., self.cost.coupled, :])
        return solved

    def _solve_block(self, right: Tensor) -> Tensor:
        solved = torch.cholesky_solve(right, self.L)
        if self.LU is None:
            return solved
        return torch.where(self.indefinite[..., None, None], self.LU.solve(right), solved)
