"""The fall-back chain: several fixed-point solvers, each for the samples the earlier ones lost."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deqlqr.newton_krylov import NewtonKrylov
from deqlqr.solution import FixedPointResult
from deqlqr.solver import FixedPointSolution, Memory, RowMap, Solver
from deqlqr.solvers import Anderson, Picard


@dataclass(frozen=True)
class Fallback(Solver):
    """Several solvers, each for the samples at which those before it failed.

    A sample that ran out of steps or stalled goes on from its best iterate; one that diverged or
    overflowed starts anew. `tol` holds where a solver has none of its own; `max_steps` bounds each.

    Attributes:
        solvers: In the order in which they are tried.
    """

    max_steps: int = 500

    solvers: tuple[Solver, ...] = (
        Anderson(),
        Picard(relaxation=0.5, max_steps=500),
        NewtonKrylov(),
    )

    def __post_init__(self) -> None:
        """Refuse what is not a chain of solvers.

        Raises:
            ValueError: If `solvers` is empty or holds something else.
        """
        super().__post_init__()
        wrong = [s for s in self.solvers if not isinstance(s, Solver)]
        if not self.solvers or wrong:
            raise ValueError(f"solvers must be solver objects, at least one, got {self.solvers}.")

    def start(self, z: Tensor) -> Memory:
        """Not used: each solver starts for itself."""
        raise NotImplementedError

    def solve(self, f: RowMap, z: Tensor) -> FixedPointSolution:
        """Run the solvers one after the other.

        Returns:
            The solution; evaluations are those of all solvers.
        """
        first, *others = (
            replace(s, tol=s.tol or self.tol, max_steps=min(s.max_steps, self.max_steps))
            for s in self.solvers
        )
        found = first.solve(f, z)
        for solver in others:
            failed = (~found.converged).nonzero()[:, 0]
            if len(failed) == 0:
                break
            afresh = (found.result == FixedPointResult.DIVERGED) | (
                found.result == FixedPointResult.NON_FINITE
            )
            start = torch.where(afresh[:, None], z, found.value)
            f.rows = found.rows
            part = f.split(failed, found.value, f(found.value), solver.tolerance(z.dtype))
            if part is f:  # samples may depend on each other: all of one solution, or none
                again = solver.solve(f, start)
                failed = torch.arange(len(start), device=start.device)
            else:
                again = solver.solve(part, start[failed])
            found = _merged(found, again, failed)
        return found


def _merged(
    found: FixedPointSolution, again: FixedPointSolution, failed: Tensor
) -> FixedPointSolution:
    """Return the solution in which the samples `failed` were solved again."""
    better = again.converged | (again.residual < found.residual[failed])
    value, result, residual = found.value.clone(), found.result.clone(), found.residual.clone()
    take = failed[better]
    value[take], residual[take] = again.value[better], again.residual[better]
    result[take] = again.result[better]
    evaluations = found.evaluations.index_add(0, failed, again.evaluations)
    return FixedPointSolution(value, result, evaluations, residual, again.rows)
