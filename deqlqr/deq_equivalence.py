"""A model with one DEQ layer: implicit differentiation, the DARE, the static problem, horizons.

(E1)  gradient: implicit differentiation = LQR with Q = 0, M = 0, R = I (theorem 4.2.1)
(E2)  damped step: DARE = static problem (F3) = explicitly formed curvature of the whole model
"""

from typing import Any

import torch
from torch import Tensor, nn

from deqlqr.deq import DEQ, find_deq
from deqlqr.divergence import Divergence, Euclidean, Newton, OutputDivergence
from deqlqr.equivalence_case import GRADIENT_TOLERANCE, NO_LIMIT, STEP_TOLERANCE, Case
from deqlqr.equivalence_rows import EquivalenceRow, Skipped, Vector, compared, raising
from deqlqr.fixed_point import fixed_point
from deqlqr.horizons import free_rows, tied_row
from deqlqr.linearize_samples import linearize_samples
from deqlqr.lqr import LQR
from deqlqr.phases import has_phases
from deqlqr.riccati import solve_dare
from deqlqr.routes import Cyclic
from deqlqr.solution import ConvergenceError
from deqlqr.solvers import Anderson, Picard
from deqlqr.spectral import spectral_radius
from deqlqr.steady_state import curvature, static_step, steady_state


class EquilibriumCase(Case):
    """A model with exactly one DEQ layer, its fixed points solved to 1e-13.

    Raises:
        ValueError: If there are more than `max_states` states in the batch.
        ConvergenceError: If a sample has no fixed point.
    """

    def prepare(self) -> None:
        """Find the fixed points."""
        self.layer: DEQ = find_deq(self.model)
        self.layer.solver = Anderson(tol=1e-13, max_steps=5000)
        self.layer.on_failure = "raise"
        self.euclidean = linearize_samples(self.model, self.x, self.y, self.loss, Euclidean())
        batch, n = self.euclidean.A.shape[:2]
        self.require_states(batch * n, "state size")
        self.rho = float(spectral_radius(self.euclidean.A, squarings=26).max())

    def rows(self, divergence: Divergence) -> list[EquivalenceRow]:
        """Return the rows of gradient, damped step and Newton step."""
        rows = self._gradient_rows()
        if not isinstance(divergence, Euclidean | Newton):
            rows += self._damped_rows(divergence)
        return rows + self._newton_rows()

    def facts(self) -> dict[str, Any]:
        """Return sizes and constants."""
        batch, n, m = self.euclidean.B.shape
        rho = round(self.rho, 4)
        return {"batch": batch, "n": n, "m": m, "damping": self.damping, "rho(A)": rho}

    def _gradient_rows(self) -> list[EquivalenceRow]:
        """Return the rows of (E1)."""
        self.layer.backward = "implicit"
        implicit = self.gradient()
        row = lambda right, value, note="": compared(
            "gradient", "implicit differentiation", right, implicit, value,
            GRADIENT_TOLERANCE, note,
        )  # fmt: skip
        rows = [
            row("LQR steady state, Q = M = 0, R = I", lambda: -_dare_step(self.euclidean.exact()))
        ]
        self.layer.backward = "lqr"
        rows.append(row("DEQ(backward='lqr')", self.gradient))
        self.layer.backward = "implicit"
        rows.append(row("autograd through plain iteration", self._unrolled_gradient))
        return rows

    def _unrolled_gradient(self) -> Tensor:
        """Return the gradient by back-propagation through the plain iteration."""
        assert self.layer.solution is not None  # noqa: S101
        start = torch.zeros_like(self.layer.solution.value)
        tapped: list[Tensor] = []
        handle = self.layer.register_forward_pre_hook(lambda _, args: tapped.append(args[0]))
        try:
            self.model(self.x)
        finally:
            handle.remove()
        solver = Picard(tol=1e-13, max_steps=2000)
        found = fixed_point(self.layer.block, start, inputs=tapped[:1], solver=solver, throw=False)
        if not bool(found.converged.all()):
            raise Skipped("plain iteration does not converge on this model")
        steps = 2 * int(found.evaluations.max())

        def unrolled(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            z = start
            for _step in range(steps):
                z = self.layer.block(z, args[0])
            return z

        handle = self.layer.register_forward_hook(unrolled)
        try:
            return self.gradient()
        finally:
            handle.remove()

    def _damped_rows(self, divergence: Divergence) -> list[EquivalenceRow]:
        """Return the rows of (E2) and of the horizons."""
        local = linearize_samples(self.model, self.x, self.y, self.loss, divergence)
        lqr = local.exact().damped(self.damping)
        static = static_step(lqr)
        name, left = f"{type(divergence).__name__} step", "DARE steady state"
        dare = lambda: _dare_step(lqr)
        row = lambda right, b: compared(name, left, right, dare, b, STEP_TOLERANCE)
        rows = [row("static problem (F3)", static)]
        if isinstance(divergence, OutputDivergence):
            rows.append(
                row("explicit damped metric, dense", lambda: self.explicit_step(divergence))
            )
            cyclic = lambda: self._cyclic_step(divergence)
            rows.append(row("cyclic DARE, layer by layer (C4)", cyclic))
            rows += self.matrix_free_rows(name, left, dare, divergence)
        rows.append(tied_row(name, lqr, static, self.rho))
        return rows + free_rows(name, local.per_sample(), self.damping)

    def _cyclic_step(self, divergence: OutputDivergence) -> Tensor:
        """Return the step of the block's layers (F5)."""
        if not has_phases(self.layer.block):
            raise Skipped(f"the block {type(self.layer.block).__name__} has no phases")
        try:
            return self.step_by(Cyclic(max_states=NO_LIMIT), divergence)
        except ValueError as error:  # phases that are not the block's
            raise ConvergenceError(str(error)) from error

    def _newton_rows(self) -> list[EquivalenceRow]:
        """Return the rows of (E2) for the Hessian of the loss."""
        name = "Newton step"
        if self.controls.m > self.limit:
            skip = lambda: raising(self.too_many())
            return [compared(name, "DARE steady state", "static problem (F3)", skip, skip, 1e-7)]
        newton = linearize_samples(self.model, self.x, self.y, self.loss, Newton()).exact()
        damping, step, note = self._first_stabilising(newton)
        static = static_step(newton.damped(damping))
        rows = [
            compared(name, "DARE steady state", "static problem (F3)", step, static, 1e-7, note),
            compared(
                "Hessian products", "Hamiltonian: Q, R, M", "double backward through the layer",
                lambda: _hessian(newton) @ self.probes(),
                lambda: self.hessian_products(self.probes()), 1e-7,
            ),
        ]  # fmt: skip
        return rows

    def _first_stabilising(self, lqr: LQR) -> tuple[float, Vector, str]:
        """Return a damping at which the DARE is solvable: an indefinite Hessian needs more (F4)."""
        for power in range(8):
            damping = self.damping * 10**power
            damped = lqr.damped(damping)
            dare = solve_dare(damped.A, damped.B, damped.Q, damped.R, damped.M, throw=False)
            if bool(dare.stabilising.all()):
                note = f"indefinite at damping {self.damping:g}, so at {damping:g}" if power else ""
                return damping, steady_state(damped, dare).u, note
        skip = Skipped(f"no stabilising solution up to damping {damping:g} (F4)")
        return self.damping, lambda: raising(skip), ""


def _dare_step(lqr: LQR) -> Tensor:
    return steady_state(lqr).u


def _hessian(lqr: LQR) -> Tensor:
    """Return the Hessian in u (m, m) of the static problem."""
    eye = torch.eye(lqr.n, dtype=lqr.A.dtype, device=lqr.A.device)
    return curvature(lqr, torch.linalg.solve(eye - lqr.A, lqr.B))
