"""The damped step of an explicit network by its finite-horizon LQR: one equation for each layer.

    (L7)  the step (F3) of the whole network, from the recursion (L4), (L5) over its layers at
          R_k + delta I, with the cost of the output at the end and x_0 = 0

Damping by layer (V4) is another step, and the Neumann series (V3) another way to it.

Source: thesis sections 3.2 and 5.1, with the corrections of docs/maths.md.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from deqlqr.cyclic_route import CyclicProblem, SweepOptions
from deqlqr.direction import Direction
from deqlqr.finite_lqr import opened
from deqlqr.finite_riccati import solve_finite_lqr
from deqlqr.solution import FiniteResult, describe_failures
from deqlqr.sweeps import Swept, sweep_chain


class FiniteProblem(CyclicProblem):
    """A batch as finite-horizon LQR problems without damping.

    Phase 0 is the cost of the output, and comes last; the phases after it are the layers.
    """

    def _exactly(self, shifts: Sequence[Tensor]) -> Direction:
        lqr = opened(self._stored()).damped(shifts[1:])
        found = solve_finite_lqr(lqr.A, lqr.B, lqr.Q, lqr.R, lqr.M, lqr.a, lqr.b, throw=False)
        reason = describe_failures(found.result, FiniteResult, "finite LQR")
        known = Direction(None, float("nan"), reason=reason)
        if reason is not None:
            return known
        first = self._phases[0]  # without controls; its state is the last one
        none, unmoved = torch.zeros_like(first.b), torch.zeros_like(self._phases[1].a)
        x = [found.x[-1], unmoved, *found.x[1:-1]]
        return self._completed(known, [none, *found.u], x, found.residual, shifts)

    def _swept(self, least: Sequence[Tensor], how: SweepOptions) -> Swept:
        first, *layers = self._phases
        swept = sweep_chain(
            layers, least[1:], first.Q, first.a, inverse=how.inverse, adapt=how.adapt
        )
        *x, x_last = swept.x
        none = torch.zeros_like(first.b)
        return replace(
            swept,
            u=(none, *swept.u),
            x=(x_last, *x),
            lam=(first.a, *swept.lam),
            P=(first.Q, *swept.P),
            delta=(least[0], *swept.delta),
            rho=(torch.zeros_like(least[0]), *swept.rho),
        )
