"""Newton-Krylov, for fixed points that no iteration contracts to, and the fall-back chain.

    (FP5)  (I - A) dz = f(z) - z   by (G1),   z <- z + t dz,   t halved until the residual falls

Source: D. A. Knoll, D. E. Keyes (2004), Jacobian-free Newton-Krylov methods, J. Comput. Phys.
193(2), doi:10.1016/j.jcp.2003.08.010.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from deqlqr._checks import at_least, count
from deqlqr.resolvent import Resolvent
from deqlqr.solution import FixedPointResult
from deqlqr.solver import FixedPointSolution, Memory, RowMap, Solver
from deqlqr.solvers import Anderson, Picard


@dataclass(frozen=True)
class NewtonKrylov(Solver):
    """Newton's method (FP5) with products A v by forward-mode differentiation of f.

    Finds fixed points that repel plain iteration too; f must support `torch.func.jvp`. `max_steps`
    bounds the steps and their halvings; `evaluations` counts the products too.

    Attributes:
        inner_tol: Relative residual to which each linear system is solved.
        inner_steps: Most products a linear system may take.
    """

    inner_tol: float = 1e-2
    inner_steps: int = 40
    every_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse options out of range.

        Raises:
            ValueError: If `inner_tol` is not positive or `inner_steps` is below 1.
        """
        super().__post_init__()
        at_least("inner_tol", self.inner_tol, 0.0, strict=True)
        count("inner_steps", self.inner_steps)

    def start(self, z: Tensor) -> Memory:
        """Return the memory of the line search."""
        return _NewtonKrylov(self, z)


class _NewtonKrylov(Memory):
    def __init__(self, solver: NewtonKrylov, z: Tensor) -> None:
        self.solver, self.work = solver, 0
        self.base, self.dz = z, torch.zeros_like(z)
        self.length = torch.ones_like(z[:, :1])

    def pick(self, keep: Tensor) -> Memory:
        for name in ("base", "dz", "length"):
            setattr(self, name, getattr(self, name)[keep])
        return self

    def propose(
        self,
        f: RowMap,
        z: Tensor,
        fz: Tensor,
        r: Tensor,
        growth: Tensor | None,
        best_fz: Tensor,
    ) -> Tensor:
        back = None if growth is None else ~(growth < 1)[:, None]
        system = Resolvent(
            lambda v: (
                torch.func.jvp(f.f_at, (z,), (v,))[1].to(v.dtype)
                if back is None
                else torch.where(back, 0.0, torch.func.jvp(f.f_at, (z,), (v,))[1].to(v.dtype))
            ),
            tol=self.solver.inner_tol,
            max_steps=self.solver.inner_steps,
            dense=False,
        )
        clean = r if back is None else torch.where(back, 0.0, r)
        dz = system.solve(clean).value
        self.work += system.products
        f.rows += system.products * len(z)
        if back is None:
            self.base, self.dz, self.length = z, dz, torch.ones_like(self.length)
        else:
            self.base = torch.where(back, self.base, z)
            self.dz = torch.where(back, self.dz, dz)
            self.length = torch.where(back, self.length / 2, 1.0)
        return self.base + self.length * self.dz


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
