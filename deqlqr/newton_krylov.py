"""Newton-Krylov, for fixed points that no iteration contracts to.

    (FP5)  (I - A) dz = f(z) - z   by (G1),   z <- z + t dz,   t halved until the residual falls

Source: D. A. Knoll, D. E. Keyes (2004), Jacobian-free Newton-Krylov methods, J. Comput. Phys.
193(2), doi:10.1016/j.jcp.2003.08.010.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deqlqr._checks import at_least, count
from deqlqr.resolvent import Resolvent
from deqlqr.solver import Iterate, Memory, RowMap, Solver


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
    rows = ("base", "dz", "length")

    def __init__(self, solver: NewtonKrylov, z: Tensor) -> None:
        self.solver, self.work = solver, 0
        self.base, self.dz = z, torch.zeros_like(z)
        self.length = torch.ones_like(z[:, :1])

    def propose(self, f: RowMap, at: Iterate) -> Tensor:
        back = None if at.growth is None else ~(at.growth < 1)[:, None]
        forth = lambda v: v if back is None else torch.where(back, 0.0, v)
        system = Resolvent(
            lambda v: forth(torch.func.jvp(f.f_at, (at.z,), (v,))[1].to(v.dtype)),
            tol=self.solver.inner_tol,
            max_steps=self.solver.inner_steps,
            dense=False,
        )
        dz = system.solve(forth(at.r)).value
        self.work += system.products
        f.rows += system.products * len(at.z)
        if back is None:
            self.base, self.dz, self.length = at.z, dz, torch.ones_like(self.length)
        else:
            self.base = torch.where(back, self.base, at.z)
            self.dz = torch.where(back, self.dz, dz)
            self.length = torch.where(back, self.length / 2, 1.0)
        return self.base + self.length * self.dz
