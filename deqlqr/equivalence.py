"""Every route to the same step, compared on the user's own model and batch, in float64.

    (E1)  gradient: implicit differentiation = LQR with Q = 0, M = 0, R = I (theorem 4.2.1)
    (E2)  damped step: DARE = static problem (F3) = explicitly formed curvature of the whole model
    (E3)  N steps unrolled from z* with one tied control and terminal cost: the step of (E2) with
          S_N = (I + A + ... + A^(N-1)) B in place of S; it approaches (F3) like rho(A)^N

Free controls with a terminal cost do not approach the damped natural step (docs/maths.md), so
that problem is no row here.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from deqlqr._checks import at_least
from deqlqr.batch import Batch
from deqlqr.controls import Controls
from deqlqr.deq import DEQ, find_deq
from deqlqr.direction import Local
from deqlqr.divergence import Divergence, DivergenceLike, Euclidean, Newton, OutputDivergence
from deqlqr.fixed_point import fixed_point
from deqlqr.kronecker import KroneckerMetric, dense_metric
from deqlqr.linearize_samples import choose_divergence, linearize_samples
from deqlqr.loss import Loss, LossLike, make_loss
from deqlqr.lqr import LQR
from deqlqr.phases import has_phases
from deqlqr.riccati import solve_dare
from deqlqr.routes import Cyclic, Kronecker, Krylov, Memory, Output, Route, Sampled
from deqlqr.solution import ConvergenceError
from deqlqr.solvers import Anderson, Picard
from deqlqr.spectral import spectral_radius
from deqlqr.steady_state import curvature, static_step, steady_state

_GRADIENT_TOLERANCE = 1e-9
_STEP_TOLERANCE = 1e-7
_TIGHT = Krylov(max_steps=2000, progress=0.0, tol=1e-11)

Vector = Tensor | Callable[[], Tensor]  # a vector, or what computes it and may fail


@dataclass(frozen=True)
class EquivalenceRow:
    """Two routes to one vector, and how far apart they are.

    Attributes:
        quantity: What is computed.
        left: First route.
        right: Second route.
        error: `||left - right|| / ||right||`; NaN where the row was skipped.
        tolerance: Largest error that counts as equal.
        passed: Whether the row holds; `None` where it was skipped.
        note: What else was measured, or why the row was skipped.
    """

    quantity: str
    left: str
    right: str
    error: float
    tolerance: float
    passed: bool | None
    note: str = ""


@dataclass(frozen=True)
class EquivalenceReport:
    """The rows of one check; `print` shows them as a table.

    Attributes:
        rows: The comparisons.
        facts: Sizes and constants of the checked problem.
    """

    rows: tuple[EquivalenceRow, ...]
    facts: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether every row that ran holds."""
        return all(row.passed is not False for row in self.rows)

    @property
    def complete(self) -> bool:
        """Whether every row ran."""
        return all(row.passed is not None for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "passed": self.passed,
            "complete": self.complete,
            "facts": self.facts,
            "rows": [
                asdict(row) | {"error": row.error if isfinite(row.error) else None}
                for row in self.rows
            ],
        }

    def __str__(self) -> str:
        """Return the table."""
        cells = [("quantity", "route", "compared with", "error", "limit", "")]
        words = {True: "holds", False: "FAILS", None: "skipped"}
        for r in self.rows:
            error = "-" if r.passed is None else f"{r.error:.1e}"
            cells.append((
                r.quantity,
                r.left,
                r.right,
                error,
                f"{r.tolerance:.0e}",
                words[r.passed],
            ))
        widths = [max(len(row[i]) for row in cells) for i in range(6)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        notes = [f"  {r.quantity}, {r.left}: {r.note}" for r in self.rows if r.note]
        facts = ", ".join(f"{k} = {v}" for k, v in self.facts.items())
        verdict = "every row holds" if self.passed else "NOT every row holds"
        if not self.complete:
            verdict += ", some were skipped"
        return "\n".join([*lines, *notes, f"{facts}: {verdict}"])


def check_equivalence(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: LossLike = "cross_entropy",
    divergence: DivergenceLike | None = None,
    damping: float = 1e-2,
    max_states: int = 2048,
    max_controls: int = 6144,
) -> EquivalenceReport:
    """Compare all routes to the gradient and to the damped step of a model on one batch.

    Works on a float64 copy with fixed points solved to 1e-13; the model is not changed.

    Args:
        model: Module with exactly one `DEQ` layer; outputs `(batch, k)`.
        x: Inputs `(batch, ...)`; a few samples are enough.
        y: Targets.
        loss: As in `linearize`.
        divergence: As in `linearize`: that of the damped step. Newton is compared in any case.
        damping: delta of R_bar = R + delta I, above 0.
        max_states: Largest batch x state size; the dense routes cost its cube.
        max_controls: Rows that form a dense m x m curvature are skipped above this m.

    Returns:
        An `EquivalenceReport`.

    Raises:
        ValueError: If the data, the options or the sizes do not fit.
        ConvergenceError: If a sample has no fixed point.

    Example:
        >>> from deqlqr import DEQ, DenseBlock
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(DEQ(DenseBlock(3)), nn.Linear(3, 2))
        >>> report = check_equivalence(model, torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
        >>> report.passed, len(report.rows)
        (True, 13)
    """
    damping = at_least("damping", damping, 0.0, strict=True)
    chosen = choose_divergence(loss, divergence)
    check = _Check(model, x, y, make_loss(loss), damping, max_controls)
    if check.states > max_states:
        raise ValueError(
            f"x: batch x state size must be at most max_states = {max_states}, got "
            f"{check.states}; check fewer samples."
        )
    rows = check.gradient_rows()
    if not isinstance(chosen, Euclidean | Newton):
        rows += check.damped_rows(chosen)
    rows += check.newton_rows()
    return EquivalenceReport(tuple(rows), check.facts())


class _Check:
    """A float64 copy of the model with its batch, and the routes on it."""

    _NO_LIMIT = 2**31  # what fits the composed problem is checked before

    def __init__(
        self, model: nn.Module, x: Tensor, y: Tensor, loss: Loss, damping: float, limit: int
    ) -> None:
        self.model = deepcopy(model).double()
        self.x = x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        self.y = y.double() if isinstance(y, Tensor) and y.is_floating_point() else y
        self.loss, self.damping, self.limit = loss, damping, limit
        self.layer: DEQ = find_deq(self.model)
        self.layer.solver = Anderson(tol=1e-13, max_steps=5000)
        self.layer.on_failure = "raise"
        self.controls = Controls(self.model)
        self.euclidean = linearize_samples(self.model, self.x, self.y, loss, Euclidean())
        self.states = self.euclidean.A.shape[0] * self.euclidean.A.shape[1]
        self.rho = float(spectral_radius(self.euclidean.A, squarings=26).max())

    def facts(self) -> dict[str, Any]:
        batch, n, m = self.euclidean.B.shape
        rho = round(self.rho, 4)
        return {"batch": batch, "n": n, "m": m, "damping": self.damping, "rho(A)": rho}

    def gradient(self) -> Tensor:
        """Return the gradient of the loss by autograd through the model as it is."""
        return self.controls.pull(self.loss(self.model(self.x), self.y))

    def gradient_rows(self) -> list[EquivalenceRow]:
        """Return the rows of (E1)."""
        self.layer.backward = "implicit"
        implicit = self.gradient()
        row = lambda right, value, note="": _row(
            "gradient", "implicit differentiation", right, implicit, value,
            _GRADIENT_TOLERANCE, note,
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
            raise _Skip("plain iteration does not converge on this model")
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

    def damped_rows(self, divergence: Divergence) -> list[EquivalenceRow]:
        """Return the rows of (E2) and (E3)."""
        local = linearize_samples(self.model, self.x, self.y, self.loss, divergence)
        lqr = local.exact().damped(self.damping)
        static = static_step(lqr)
        name = f"{type(divergence).__name__} step"
        row = lambda left, right, a, b: _row(name, left, right, a, b, _STEP_TOLERANCE)
        dare = lambda: _dare_step(lqr)
        rows = [row("DARE steady state", "static problem (F3)", dare, static)]
        if isinstance(divergence, OutputDivergence):
            explicit = lambda: self._explicit_step(divergence)
            rows.append(row("DARE steady state", "explicit damped metric, dense", dare, explicit))
            cyclic = lambda: self._cyclic_step(divergence)
            rows.append(row("DARE steady state", "cyclic DARE, layer by layer (C4)", dare, cyclic))
            output = lambda: self._step_by(Output(), divergence)
            rows.append(row("DARE steady state", "output space (W3)", dare, output))
            krylov = lambda: self._step_by(_TIGHT, divergence)
            rows.append(row("DARE steady state", "conjugate gradients (K2)", dare, krylov))
            rows += self._estimate_rows(row, divergence)
        rows.append(self._tied_row(name, lqr, static))
        return rows

    def _estimate_rows(
        self, row: Callable[..., EquivalenceRow], divergence: OutputDivergence
    ) -> list[EquivalenceRow]:
        """Return the rows of the routes with a metric of their own, each beside it, explicit."""
        kron = self._local(Kronecker(), divergence)
        assert isinstance(kron, KroneckerMetric)  # noqa: S101
        sampled = lambda: self._step_by(Sampled(), divergence)
        same = lambda: self._explicit_step(divergence, sampled=True)
        solved = lambda: self._solved(kron)
        explicit = lambda: self._damped(dense_metric(kron.factors))
        return [
            row("sampled outputs (W3)", "explicit metric of the same samples", sampled, same),
            row("Kronecker factors (K5)", "explicit Kronecker products, dense", solved, explicit),
        ]

    def _local(self, route: Route, divergence: OutputDivergence) -> Local:
        at = Batch(self.model, self.controls, self.loss, [(self.x, self.y)])
        return route.local(at, divergence, torch.float64, Memory())

    def _solved(self, local: Local) -> Tensor:
        u = local.solve([self.damping] * len(self.controls.parameters)).u
        assert u is not None  # noqa: S101
        return u

    def _step_by(self, route: Route, divergence: OutputDivergence) -> Tensor:
        """Return the step of `ImplicitNGD` by a route."""
        return self._solved(self._local(route, divergence))

    def _cyclic_step(self, divergence: OutputDivergence) -> Tensor:
        """Return the step of the block's layers (F5)."""
        if not has_phases(self.layer.block):
            raise _Skip(f"the block {type(self.layer.block).__name__} has no phases")
        try:
            return self._step_by(Cyclic(max_states=self._NO_LIMIT), divergence)
        except ValueError as error:  # phases that are not the block's
            raise ConvergenceError(str(error)) from error

    def _explicit_step(self, divergence: OutputDivergence, *, sampled: bool = False) -> Tensor:
        """Return the step with the metric J'Lambda J / batch, J = dy/du by autograd.

        Lambda is c c' if sampled, c the random cotangents of the route `Sampled()`.
        """
        self._require_few()
        y = self.model(self.x)
        rows = [self.controls.pull(output) for output in y.reshape(-1)]
        J = torch.stack(rows).reshape(*y.shape, self.controls.m)
        if sampled:
            generator = torch.Generator(y.device).manual_seed(0)
            c = divergence.sample(y.detach(), generator)
            Lambda = c[:, :, None] * c[:, None]
        else:
            Lambda = divergence.metric(y.detach())
        return self._damped(torch.einsum("bkm,bkl,bln->mn", J, Lambda, J) / y.shape[0])

    def _damped(self, C: Tensor) -> Tensor:
        """Return -(C + delta I)^-1 g."""
        self._require_few()
        eye = torch.eye(len(C), dtype=C.dtype, device=C.device)
        return -torch.linalg.solve(C + self.damping * eye, self.gradient())

    def _require_few(self) -> None:
        if self.controls.m > self.limit:
            raise self._too_many()

    def _too_many(self) -> "_Skip":
        return _Skip(f"m = {self.controls.m} is above max_controls = {self.limit}")

    def _tied_row(self, name: str, lqr: LQR, static: Tensor) -> EquivalenceRow:
        """Return the row of (E3), with N = 1, 2, 4, ... until the error is at its floor."""
        if self.rho >= 1:
            reason = lambda: _raise(_Skip("rho(A) is not below 1: the unrolled network diverges"))
            return _row(name, "N steps, tied control", "static problem (F3)", reason, static, 1e-7)
        power, S, N = lqr.A, lqr.B, 1
        history: list[tuple[int, float]] = []
        while True:
            error = _relative(_tied_step(lqr, S), static)
            history.append((N, error))
            if error < 1e-10 or N >= 2**24:
                break
            S, power, N = S + power @ S, power @ power, 2 * N
        above = [(n, e) for n, e in history if e > 1e-10]
        note = f"error {history[-1][1]:.1e} at N = {history[-1][0]}"
        fast_enough = True
        if len(above) > 1:
            (n1, e1), (n2, e2) = above[-2:]
            rate = (e2 / e1) ** (1 / (n2 - n1))
            # The constant in front of rho^N may move by a factor of ten between n1 and n2.
            fast_enough = rate <= self.rho * 10 ** (1 / (n2 - n1))
            note += f"; falls by {rate:.4f} per step, rho(A) = {self.rho:.4f}"
        row = _row(
            name, "N steps, tied control", "static problem (F3)", _tied_step(lqr, S), static,
            _STEP_TOLERANCE, note,
        )  # fmt: skip
        return replace(row, passed=bool(row.passed) and fast_enough)

    def newton_rows(self) -> list[EquivalenceRow]:
        """Return the rows of (E2) for the Hessian of the loss."""
        name = "Newton step"
        if self.controls.m > self.limit:
            skip = lambda: _raise(self._too_many())
            return [_row(name, "DARE steady state", "static problem (F3)", skip, skip, 1e-7)]
        newton = linearize_samples(self.model, self.x, self.y, self.loss, Newton()).exact()
        damping, step, note = self._first_stabilising(newton)
        static = static_step(newton.damped(damping))
        rows = [
            _row(name, "DARE steady state", "static problem (F3)", step, static, 1e-7, note),
            _row(
                "Hessian products", "Hamiltonian: Q, R, M", "double backward through the layer",
                lambda: _hessian(newton) @ self._probes(), self._hessian_products, 1e-7,
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
        skip = _Skip(f"no stabilising solution up to damping {damping:g} (F4)")
        return self.damping, lambda: _raise(skip), ""

    def _probes(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(self.controls.m, 3, generator=generator, dtype=torch.float64)
        return probes.to(self.euclidean.A.device)

    def _hessian_products(self) -> Tensor:
        """Return the Hessian of the loss times the probes, by double backward."""
        gradient = self.controls.pull(self.loss(self.model(self.x), self.y), again=True)
        products = [self.controls.pull(gradient @ v) for v in self._probes().T]
        return torch.stack(products, dim=1)


class _Skip(Exception):
    """A row cannot run, and why."""


def _raise(error: Exception) -> Tensor:
    raise error


def _row(
    quantity: str,
    left: str,
    right: str,
    a: Vector,
    b: Vector,
    tolerance: float,
    note: str = "",
) -> EquivalenceRow:
    try:
        error = _relative(a() if callable(a) else a, b() if callable(b) else b)
    except _Skip as skip:
        return EquivalenceRow(quantity, left, right, float("nan"), tolerance, None, str(skip))
    except ConvergenceError as failure:
        return EquivalenceRow(
            quantity, left, right, float("nan"), tolerance, False, f"failed: {failure}"
        )
    return EquivalenceRow(quantity, left, right, error, tolerance, error <= tolerance, note)


def _relative(a: Tensor, b: Tensor) -> float:
    scale = float(b.norm())
    return float((a - b).norm()) / (scale if scale > 0 else 1.0)


def _dare_step(lqr: LQR) -> Tensor:
    return steady_state(lqr).u


def _tied_step(lqr: LQR, S: Tensor) -> Tensor:
    """Return u of (E3) for the sensitivity S = S_N."""
    return -torch.linalg.solve(curvature(lqr, S), S.mT @ lqr.a + lqr.b)


def _hessian(lqr: LQR) -> Tensor:
    """Return the Hessian in u (m, m) of the static problem."""
    eye = torch.eye(lqr.n, dtype=lqr.A.dtype, device=lqr.A.device)
    return curvature(lqr, torch.linalg.solve(eye - lqr.A, lqr.B))
