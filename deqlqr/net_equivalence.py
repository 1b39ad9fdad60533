"""An explicit network: backpropagation, finite-horizon Riccati recursion, and the other routes.

(E6)  gradient: autograd = finite-horizon LQR with Q = 0, M = 0, R = I (theorem 3.1.1)
(E7)  damped step: Riccati recursion (L7) = explicitly formed curvature of the whole network
(E8)  damped Newton step: the recursion with the layers' Hamiltonians solves (H + delta I) u = -g
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deqlqr.batch import Batch
from deqlqr.cyclic_route import linearize_cyclic
from deqlqr.divergence import Divergence, Euclidean, Newton, OutputDivergence
from deqlqr.equivalence_case import GRADIENT_TOLERANCE, NO_LIMIT, STEP_TOLERANCE, Case
from deqlqr.equivalence_rows import EquivalenceRow, Skipped, compared
from deqlqr.layer_inverse import NeumannInverse
from deqlqr.net_layers import NetLayers
from deqlqr.phases import has_phases
from deqlqr.routes import Riccati
from deqlqr.solution import ConvergenceError
from deqlqr.sweeps import LayerDamping

_RECURSION = "Riccati recursion (L7)"
_EXACT = Riccati(max_states=NO_LIMIT)
_MARGIN = 2.0
_TERMS = 40  # with that margin an error of 2^-40


class NetCase(Case):
    """A model without DEQ layer.

    Raises:
        ValueError: If there are more than `max_states` states between two layers of the batch.
    """

    def prepare(self) -> None:
        """Tell the layers apart, where the model has phases."""
        self.loss.check(self.model(self.x), self.y)
        self.sizes: list[int] = []
        if has_phases(self.model):
            self.sizes = NetLayers(self.model, self.x).sizes
            self.require_states(len(self.x) * max(self.sizes), "states between two layers")

    def rows(self, divergence: Divergence) -> list[EquivalenceRow]:
        """Return the rows of gradient, damped step and Newton step."""
        gradient = lambda: -self._by_recursion(Euclidean()) * (1 + self.damping)
        rows = [
            compared("gradient", "finite-horizon LQR, Q = M = 0, R = I", "autograd", gradient,
                     self.gradient(), GRADIENT_TOLERANCE)
        ]  # fmt: skip
        if isinstance(divergence, OutputDivergence):
            rows += self._damped_rows(divergence)
        return [*rows, self._newton_row()]

    def facts(self) -> dict[str, Any]:
        """Return sizes and constants."""
        states = " ".join(map(str, [*self.sizes[1:], *self.sizes[:1]]))
        return {"batch": len(self.x), "layers": len(self.sizes), "states": states or "unknown",
                "m": self.controls.m, "damping": self.damping}  # fmt: skip

    def _damped_rows(self, divergence: OutputDivergence) -> list[EquivalenceRow]:
        """Return the rows of (E7)."""
        name, step = f"{type(divergence).__name__} step", lambda: self._by_recursion(divergence)
        row = lambda left, right, a, b: compared(name, left, right, a, b, STEP_TOLERANCE)
        explicit = lambda: self.explicit_step(divergence)
        by_layer = Riccati(damping=LayerDamping(_MARGIN), max_states=NO_LIMIT)
        series = replace(by_layer, inverse=NeumannInverse(_TERMS))
        return [
            row(_RECURSION, "explicit damped metric, dense", step, explicit),
            row(_RECURSION, "cyclic DARE of the same layers (C4)", step,
                lambda: self._by_cycle(divergence)),
            row("damping by layer: Neumann series (V3)", "the same with the exact inverse",
                lambda: self._by_recursion(divergence, series),
                lambda: self._by_recursion(divergence, by_layer)),
            *self.matrix_free_rows(name, _RECURSION, step, divergence),
        ]  # fmt: skip

    def _by_recursion(self, divergence: Divergence, route: Riccati = _EXACT) -> Tensor:
        """Return the step of the route `Riccati`."""
        if not self.sizes:
            raise Skipped(f"the model {type(self.model).__name__} has no phases")
        try:
            return self.step_by(route, divergence)
        except ValueError as error:  # phases that are not the model's
            raise ConvergenceError(str(error)) from error

    def _by_cycle(self, divergence: OutputDivergence) -> Tensor:
        """Return the step of the layers closed to a cycle, whose first does not see the last."""
        if not self.sizes:
            raise Skipped(f"the model {type(self.model).__name__} has no phases")
        at = Batch(self.model, self.controls, self.loss, [(self.x, self.y)])
        local = linearize_cyclic(at, divergence, torch.float64, "exact", NO_LIMIT, None)
        return self._solved(local)

    def _newton_row(self) -> EquivalenceRow:
        """Return the row of (E8)."""
        against = "Newton step", _RECURSION, "damped equations, double backward"
        note: list[str] = []

        def left() -> Tensor:
            u, damping = self._first_minimum()
            if damping > self.damping:
                note.append(f"indefinite at damping {self.damping:g}, so at {damping:g}")
            return self.hessian_products(u[:, None])[:, 0] + damping * u

        row = compared(*against, left, lambda: -self.gradient(), STEP_TOLERANCE)
        return replace(row, note=" ".join([row.note, *note]).strip())

    def _first_minimum(self) -> tuple[Tensor, float]:
        """Return Newton's step, and a damping at which the Hessian is positive definite."""
        usual = self.damping
        try:
            for power in range(8):
                self.damping = usual * 10**power
                try:
                    return self._by_recursion(Newton()), self.damping
                except Skipped:
                    if not self.sizes:
                        raise
        finally:
            self.damping = usual
        raise Skipped(f"no minimum up to damping {usual * 1e7:g}")
