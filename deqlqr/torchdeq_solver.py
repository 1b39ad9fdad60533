"""The solvers of the package torchdeq, behind our interface and judged by our certificate."""

from dataclasses import dataclass

import torch
from torch import Tensor

from deqlqr._checks import choice
from deqlqr.solution import ConvergenceError, FixedPointResult
from deqlqr.solver import FixedPointSolution, Memory, RowMap, Solver

TORCHDEQ = ("anderson", "broyden", "fixed_point_iter", "simple_fixed_point_iter")


@dataclass(frozen=True)
class TorchDEQ(Solver):
    """A solver of the package torchdeq, certified like our own.

    torchdeq iterates the batch until its slowest sample is done, so `evaluations` is one number
    for all samples (the last one is the certificate's). Its `tol` is taken on the relative
    residual; (FP1) then decides what counts as converged.

    Attributes:
        name: `"anderson"`, `"broyden"`, `"fixed_point_iter"` or `"simple_fixed_point_iter"`.
    """

    name: str = "anderson"

    def __post_init__(self) -> None:
        """Refuse names torchdeq does not have.

        Raises:
            ValueError: If `name` is unknown.
        """
        super().__post_init__()
        choice("name", self.name, TORCHDEQ)

    def start(self, z: Tensor) -> Memory:
        """Not used: torchdeq keeps its own memory."""
        raise NotImplementedError

    def solve(self, f: RowMap, z: Tensor) -> FixedPointSolution:
        """Run torchdeq from z (batch, n), then evaluate f once more for the certificate.

        Returns:
            A `FixedPointSolution`; `MAX_STEPS` where (FP1) does not hold.

        Raises:
            ConvergenceError: If torchdeq itself raises (its Anderson does on overflow).
        """
        from torchdeq.solver import get_solver

        count = 0

        def counted(z: Tensor, tau: float = 1.0) -> Tensor:  # one solver passes its damping, 1
            nonlocal count
            count += 1
            return f(z)

        tol = self.tolerance(z.dtype)
        steps = max(self.max_steps - 1, 1)
        try:
            value, _, _ = get_solver(self.name)(
                counted, z, max_iter=steps, tol=tol, stop_mode="rel"
            )
        except RuntimeError as error:
            raise ConvergenceError(f"torchdeq's solver {self.name!r} raised: {error}") from error
        fz = counted(value)
        residual = torch.linalg.vector_norm(fz - value, dim=-1)
        done = residual <= tol * torch.linalg.vector_norm(fz, dim=-1).clamp(min=1.0)  # (FP1)
        result = torch.where(done, FixedPointResult.CONVERGED, FixedPointResult.MAX_STEPS)
        result = torch.where(residual.isfinite(), result, FixedPointResult.NON_FINITE)
        return FixedPointSolution(value, result, torch.full_like(result, count), residual, f.rows)
