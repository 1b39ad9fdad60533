"""Newton's method on the DARE (Kleinman): one Stein equation of the closed loop a step.

    (R8)  E = A'P A_cl + Q - M'K - P,   dP = A_cl' dP A_cl + E,   P <- P + dP

P + dP is the solution of the Stein equation that Kleinman's step solves for P itself; solving for
the small dP keeps the digits that P has already. E may be formed in a higher precision than dP:
then it is iterative refinement.

Source: D. L. Kleinman (1968), doi:10.1109/TAC.1968.1098829; G. A. Hewer (1971), An iterative
technique for the computation of the steady state gains for the discrete optimal regulator, IEEE
Trans. Automat. Control 16(4), doi:10.1109/TAC.1971.1099755.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from deqlqr._linalg import norm, sym
from deqlqr.dare import Certificate, Dare, Eliminated, Gain, certify, gain_of
from deqlqr.solution import DareResult, SteinResult
from deqlqr.stein import solve_stein


class Found(NamedTuple):
    """A candidate P with its gain and certificate."""

    P: Tensor
    K: Tensor
    certificate: Certificate
    iterations: Tensor
    gain: Gain | None = None  # absent where elements come from different solves

    @property
    def stabilising(self) -> Tensor:
        """Boolean per batch element."""
        return self.certificate.result == DareResult.STABILISING

    def zip_with(self, combine: Callable[[Tensor, Tensor], Tensor], other: "Found") -> "Found":
        """Return the candidate whose tensors are `combine(mine, theirs)`."""
        return Found(
            combine(self.P, other.P),
            combine(self.K, other.K),
            Certificate(*map(combine, self.certificate, other.certificate)),
            combine(self.iterations, other.iterations),
        )


def judge(
    dare: Dare,
    P: Tensor,
    iterations: Tensor,
    broken: Tensor,
    rtol: float,
    eliminated: Eliminated | None = None,
) -> Found:
    """Return a candidate P with its gain and certificate."""
    gain = gain_of(dare, P, eliminated)
    return Found(P, gain.K, certify(dare, P, gain, broken, rtol), iterations, gain)


def newton_step(
    dare: Dare,
    found: Found,
    rtol: float,
    *,
    monotone: bool = True,
    above: float = 0.0,
    stein_dtype: torch.dtype | None = None,
) -> tuple[Found, Tensor]:
    """Take one step (R8) in the elements whose closed loop is stable.

    Args:
        dare: The equation.
        found: Where to start.
        rtol: Largest residual that counts as a solution.
        monotone: Keep the step only where the residual falls.
        above: Step only where the residual is above this.
        stein_dtype: Type in which dP is solved for; `None` takes that of the equation.

    Returns:
        The candidate, and per batch element whether it changed.
    """
    A_cl, defect, _, before, _ = found.certificate
    dtype = stein_dtype or A_cl.dtype
    scale = norm(defect).clamp(min=torch.finfo(defect.dtype).tiny)[..., None, None]
    stein = solve_stein(A_cl.to(dtype), (sym(defect) / scale).to(dtype), throw=False)
    P = sym(found.P + scale * stein.X.to(defect.dtype))  # (R8)
    new = judge(dare, P, found.iterations + 1, torch.zeros_like(found.iterations), rtol)
    # A step that does not reach a solution leaves the reason of the failure as it was.
    known = new.stabilising | found.stabilising
    result = torch.where(known, new.certificate.result, found.certificate.result)
    new = new._replace(certificate=new.certificate._replace(result=result))
    better = (stein.result == SteinResult.SOLVED) & (before > above)
    if monotone:
        better = better & (new.certificate.residual < before)
    return choose(better, new, found), better


def choose(take: Tensor, a: Found, b: Found) -> Found:
    """Return a in the elements `take`, else b."""
    if take.all():
        return a
    if not take.any():
        return b

    def pick(x: Tensor, y: Tensor) -> Tensor:
        return torch.where(take.reshape(take.shape + (1,) * (x.dim() - take.dim())), x, y)

    return a.zip_with(pick, b)
