"""Implicit natural-gradient descent: a training step is the steady state of an LQR.

    (O1)  u of (R3), from the DARE at R_bar = R + delta I;   theta <- theta + lr * u

The same u comes by another route from output space (W3), without a DARE.

Source: thesis algorithm 1, with the corrections of docs/maths.md.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from deqlqr._checks import at_least, choice
from deqlqr.controls import Controls
from deqlqr.deq import find_deq
from deqlqr.divergence import DivergenceLike, OutputDivergence
from deqlqr.linearize import (
    Linearization,
    Minibatch,
    check_input,
    choose_divergence,
    linearize_samples,
)
from deqlqr.loss import LossLike, make_loss
from deqlqr.output_space import OutputLinearization, linearize_outputs
from deqlqr.riccati import DareSolution, Doubling, factored_dare
from deqlqr.solution import ConvergenceError, DareResult, FixedPointResult, describe_failures
from deqlqr.solver import FixedPointSolution
from deqlqr.steady_state import steady_state

Route = Literal["dare", "output"]
# What the step needs of P is judged by the steady state, in whatever type it is computed.
_AS_IT_IS = Doubling(refine=0)


class _Found(NamedTuple):
    """u (m,), the residual of its equations, and why it is not to be taken (or `None`)."""

    u: Tensor | None
    residual: float
    dare: DareSolution | None = None
    reason: str | None = None


AnyLinearization = Linearization | OutputLinearization


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Attributes:
        loss: Loss before the step.
        accepted: Whether the parameters were changed.
        loss_after: Loss on the same batch after an accepted step, else NaN.
        damping: Damping of the last attempt.
        rejections: The reason of each rejected attempt, in order.
        rolled_back: Whether the previous step was undone because this batch had no fixed point.
        evaluations: Mean evaluations of f per sample in the forward solve.
        residual: Largest fixed-point residual of the batch.
        step_residual: Relative residual of the equations of u, of the last attempt.
        closed_loop_radius: Largest spectral radius of A - BK, of the last attempt; `None` on
            routes without a DARE, like the next two.
        dare_residual: Largest residual of the DARE, of the last attempt.
        dare_iterations: Most doubling steps, of the last attempt.
    """

    loss: float
    accepted: bool
    loss_after: float
    damping: float
    rejections: tuple[str, ...]
    rolled_back: bool
    evaluations: float
    residual: float
    step_residual: float
    closed_loop_radius: float | None
    dare_residual: float | None
    dare_iterations: int | None


class ImplicitNGD(torch.optim.Optimizer):
    """Steepest descent in a divergence, each step solved as an infinite-horizon LQR.

    All trainable parameters of the model (encoder, block, readout) are controls. A step whose
    linear algebra fails, or after which the batch has no fixed point or a higher loss, is
    rejected: the parameters stay as they were, the damping rises by `damping_increase` and the
    step is tried again, at most `max_rejections` times. After accepted steps a raised damping
    falls back towards `damping` by the square root of that factor.

    Args:
        model: Module with exactly one `DEQ` layer, outputs `(batch, k)`.
        loss: `"cross_entropy"`, `"mse"` or a function `(outputs, targets) -> scalar`, a mean over
            the batch.
        lr: Step length; 1 takes the damped step as it is.
        damping: delta of R_bar = R + delta I, above 0.
        route: How u is computed: `"dare"`, the dense Riccati equation; `"output"`, the same u from
            a system of batch x outputs unknowns, for divergences of the output and the exact
            minibatch.
        divergence: What "steepest" is measured in (see `linearize`); `None` takes the one that
            matches the loss, which makes this natural gradient descent.
        minibatch: `"exact"`: one augmented LQR for the whole batch, dense in batch x state size.
            `"per-sample"`: the mean of the samples' own steps, another direction; its DAREs are of
            the state size.
        linalg_dtype: Type of the LQR's linear algebra; `None` takes the model's.
        damping_increase: Factor on the damping at a rejection.
        max_increase: Largest relative rise of the batch's own loss that a step may cause.
        step_tolerance: Largest residual of the equations of u accepted (`SteadyState.residual`).
        max_rejections: Attempts after the first before a step is given up.

    Attributes:
        last_step: The `StepReport` of the last call of `step`, or `None`.

    Raises:
        ValueError: If an option is unknown or out of range, or the model does not fit.

    Example:
        >>> from deqlqr import DEQ, DenseBlock
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(DEQ(DenseBlock(4)), nn.Linear(4, 3))
        >>> x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> opt = ImplicitNGD(model, loss="cross_entropy", lr=1.0, damping=0.1)
        >>> losses = [float(opt.step(x, y)) for _ in range(5)]
        >>> losses[-1] < losses[0] and opt.last_step.accepted
        True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: LossLike = "cross_entropy",
        lr: float = 1.0,
        damping: float = 1e-2,
        route: Route = "dare",
        divergence: DivergenceLike | None = None,
        minibatch: Minibatch = "exact",
        linalg_dtype: torch.dtype | None = None,
        damping_increase: float = 10.0,
        max_increase: float = 0.1,
        step_tolerance: float = 1e-3,
        max_rejections: int = 6,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be an nn.Module, got {type(model).__name__}.")
        self.model, self.layer, self.controls = model, find_deq(model), Controls(model)
        self.loss = make_loss(loss)
        self.divergence = choose_divergence(loss, divergence)
        self.route: Route = choice("route", route, get_args(Route))
        self.minibatch: Minibatch = choice("minibatch", minibatch, get_args(Minibatch))
        if self.route == "output":
            if not isinstance(self.divergence, OutputDivergence):
                raise ValueError(
                    'route="output" needs a divergence of the output (natural gradient), got '
                    f"{type(self.divergence).__name__}."
                )
            if self.minibatch != "exact":
                raise ValueError(f'route="output" needs minibatch="exact", got {minibatch!r}.')
        if linalg_dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"linalg_dtype must be float32, float64 or None, got {linalg_dtype}.")
        self.linalg_dtype = linalg_dtype or self.controls.parameters[0].dtype
        self.damping_increase = at_least("damping_increase", damping_increase, 1.0, strict=True)
        self.max_increase = at_least("max_increase", max_increase, 0.0)
        self.step_tolerance = at_least("step_tolerance", step_tolerance, 0.0, strict=True)
        self.max_rejections = int(at_least("max_rejections", max_rejections, 0))
        self.last_step: StepReport | None = None
        delta = at_least("damping", damping, 0.0, strict=True)
        defaults = {
            "lr": at_least("lr", lr, 0.0, strict=True),
            "damping": delta,
            "current_damping": delta,
        }
        super().__init__(self.controls.parameters, defaults)

    @property
    def current_damping(self) -> float:
        """The damping the next step starts from: `damping`, or more after rejections."""
        return self.param_groups[0]["current_damping"]

    @property
    def _previous(self) -> Tensor | None:
        """The parameters before the last accepted step, kept in `state` so that it is saved."""
        parts = [self.state[p].get("previous") for p in self.controls.parameters]
        if any(part is None for part in parts):
            return None
        return torch.cat([part.reshape(-1) for part in parts])

    def _remember(self, u: Tensor | None) -> None:
        named = {} if u is None else self.controls.unflatten(u)
        for name, p in zip(self.controls.names, self.controls.parameters, strict=True):
            self.state[p] = {} if u is None else {"previous": named[name].clone()}

    def step(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """Take one step on the batch (x, y) and return the loss before it, a scalar tensor.

        Args:
            x: Inputs `(batch, ...)`.
            y: Targets `(batch, ...)`.

        Returns:
            The loss before the step; `last_step` says what was done.

        Raises:
            ValueError: If the data do not fit the model or the loss; nothing has changed then.
            ConvergenceError: If a sample has no fixed point at the current parameters, nor at
                those before the last step; the parameters are the former.
        """
        local, rolled_back = self._linearize(x, y)
        group = self.param_groups[0]
        base = at_least("damping", group["damping"], 0.0, strict=True)
        lr = at_least("lr", group["lr"], 0.0)
        damping = max(self.current_damping, base) * (self.damping_increase if rolled_back else 1)
        before, loss = self.controls.vector, local.loss
        rejections: list[str] = []
        loss_after = float("nan")
        for attempt in range(self.max_rejections + 1):
            if attempt:
                damping *= self.damping_increase
            found = self._solve(local, damping)
            reason = found.reason
            if reason is None:
                assert found.u is not None  # noqa: S101
                u = found.u
                self.controls.assign(before + lr * u.to(before.dtype))
                loss_after, reason = self._trial(x, y, float(loss))
            if reason is None:
                break
            self.controls.assign(before)
            rejections.append(reason)
        accepted = len(rejections) <= self.max_rejections
        self._remember(before if accepted else None)
        relaxed = max(base, damping / self.damping_increase**0.5)
        group["current_damping"] = damping if rejections else relaxed
        self.last_step = _report(
            local.solution, found, float(loss), loss_after if accepted else float("nan"), accepted,
            damping, tuple(rejections), rolled_back,
        )  # fmt: skip
        return loss

    def _linearize(self, x: Tensor, y: Tensor) -> tuple[AnyLinearization, bool]:
        """Linearise at the current parameters, or at the previous ones if these lost z*."""
        check_input(x, self.controls)
        try:
            return self._linearize_here(x, y), False
        except ConvergenceError:
            current, previous = self.controls.vector, self._previous
            if previous is None:
                raise
            self.controls.assign(previous)
            try:
                return self._linearize_here(x, y), True
            except BaseException:
                self.controls.assign(current)
                raise

    def _linearize_here(self, x: Tensor, y: Tensor) -> AnyLinearization:
        if self.route == "output":
            assert isinstance(self.divergence, OutputDivergence)  # noqa: S101  checked above
            return linearize_outputs(self.model, x, y, self.loss, self.divergence)
        return linearize_samples(self.model, x, y, self.loss, self.divergence)

    def _solve(self, local: AnyLinearization, damping: float) -> _Found:
        """Return u (m,) for a damping, or why there is none."""
        if isinstance(local, OutputLinearization):
            u, gap = local.to(self.linalg_dtype).step(damping)
            return self._judged(_Found(u, gap))
        exact = self.minibatch == "exact"
        lqr = local.exact() if exact else local.per_sample()
        lqr = lqr.to(self.linalg_dtype).damped(damping)
        dare = factored_dare(lqr.A, lqr.B, lqr.Q, lqr.R, lqr.M, solver=_AS_IT_IS)
        failure = describe_failures(dare.result, DareResult, "DARE")
        if failure is not None:
            return _Found(None, float("nan"), dare, failure)
        try:
            state = steady_state(lqr, dare)
        except ConvergenceError as error:
            return _Found(None, float("nan"), dare, str(error))
        slope = (lqr.a * state.x).sum(-1) + (lqr.b * state.u).sum(-1)
        gap = float(state.residual.max())
        if bool((slope > 0).any()):  # a stabilising P of an indefinite problem: a saddle
            return _Found(None, gap, dare, "the step does not descend")
        return self._judged(_Found(state.u if exact else state.u.mean(0), gap, dare))

    def _judged(self, found: _Found) -> _Found:
        if found.residual <= self.step_tolerance:
            return found
        return found._replace(reason=f"the step's equations hold only to {found.residual:.1e}")

    @torch.no_grad()
    def _trial(self, x: Tensor, y: Tensor, loss: float) -> tuple[float, str | None]:
        """Return the loss at the trial parameters, and why they are rejected (or `None`)."""
        if not bool(self.controls.vector.isfinite().all()):
            return float("nan"), "the step is not finite"
        try:
            outputs = self.model(x)
        except ConvergenceError as error:
            return float("nan"), str(error)
        assert self.layer.solution is not None  # noqa: S101
        lost = describe_failures(self.layer.solution.result, FixedPointResult, "fixed point")
        if lost is not None:
            return float("nan"), lost
        after = float(self.loss(outputs, y))
        if not after <= loss + self.max_increase * max(abs(loss), 1e-6):
            return after, f"the loss of the batch rose from {loss:.3e} to {after:.3e}"
        return after, None


def _report(
    solution: FixedPointSolution,
    found: _Found,
    loss: float,
    loss_after: float,
    accepted: bool,
    damping: float,
    rejections: tuple[str, ...],
    rolled_back: bool,
) -> StepReport:
    dare = found.dare
    return StepReport(
        loss=loss,
        accepted=accepted,
        loss_after=loss_after,
        damping=damping,
        rejections=rejections,
        rolled_back=rolled_back,
        evaluations=float(solution.evaluations.double().mean()),
        residual=float(solution.residual.max()),
        step_residual=found.residual,
        closed_loop_radius=None if dare is None else float(dare.closed_loop_radius.max()),
        dare_residual=None if dare is None else float(dare.residual.max()),
        dare_iterations=None if dare is None else int(dare.iterations.max()),
    )
