"""Newton's method on the DARE (Kleinman): one Stein equation of the closed loop a step.

    (R8)  E = right side of (R1) less left side,   dP = A_cl' dP+ A_cl + E,   P <- P + dP

P + dP is the solution of the Stein equation that Kleinman's step solves for P itself; solving for
the small dP keeps the digits that P has already. E may be formed in a higher precision than dP:
then it is iterative refinement.

Source: D. L. Kleinman (1968), doi:10.1109/TAC.1968.1098829; G. A. Hewer (1971), An iterative
technique for the computation of the steady state gains for the discrete optimal regulator, IEEE
Trans. Automat. Control 16(4), doi:10.1109/TAC.1971.1099755.
"""

import torch
from torch import Tensor

from deqlqr._linalg import norm, sym
from deqlqr.cycle import Cycle, Found, choose, judge
from deqlqr.solution import SteinResult
from deqlqr.stein import solve_cyclic_stein


def newton_step(
    cycle: Cycle,
    found: Found,
    rtol: float,
    *,
    monotone: bool = True,
    above: float = 0.0,
    stein_dtype: torch.dtype | None = None,
) -> tuple[Found, Tensor]:
    """Take one step (R8) in the elements whose closed loop is stable.

    Args:
        cycle: The equations.
        found: Where to start.
        rtol: Largest residual that counts as a solution.
        monotone: Keep the step only where the residual falls.
        above: Step only where the residual is above this.
        stein_dtype: Type in which dP is solved for; `None` takes that of the equation.

    Returns:
        The candidate, and per batch element whether it changed.
    """
    A_cl, defect, _, _, before, _ = found.certificate
    dtype = stein_dtype or cycle.dtype
    size = torch.stack([norm(E) for E in defect]).amax(0)
    scale = size.clamp(min=torch.finfo(size.dtype).tiny)[..., None, None]
    stein = solve_cyclic_stein(
        [X.to(dtype) for X in A_cl], [(sym(E) / scale).to(dtype) for E in defect], throw=False
    )
    P = [sym(P + scale * dP.to(P.dtype)) for P, dP in zip(found.P, stein.X, strict=True)]  # (R8)
    new = judge(cycle, P, found.iterations + 1, torch.zeros_like(found.iterations), rtol)
    # A step that does not reach a solution leaves the reason of the failure as it was.
    known = new.stabilising | found.stabilising
    new = new.with_result(torch.where(known, new.certificate.result, found.certificate.result))
    better = (stein.result == SteinResult.SOLVED) & (before > above)
    if monotone:
        better = better & (new.certificate.residual < before)
    return choose(better, new, found), better
