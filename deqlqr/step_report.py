"""What a step of `ImplicitNGD` starts from, tries, and reports."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from deqlqr.batch import Batch
from deqlqr.direction import Direction, Local


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Attributes:
        loss: Loss before the step.
        accepted: Whether the parameters were changed.
        loss_after: Loss on the same batch after an accepted step that was checked, else NaN.
        damping: Damping of the last attempt, of the first parameter group.
        rejections: The reason of each rejected attempt, in order.
        rolled_back: Whether the previous step was undone first.
        evaluations: Mean evaluations of f per sample in the forward solves, 0 without a DEQ.
        residual: Largest fixed-point residual of the batch.
        step_residual: Relative residual of the equations of u, of the last attempt.
        shortened: Factor that the trust region put on the step.
        ratio: Decrease of the loss over what (O3) promised, where it was measured.
        closed_loop_radius: Largest spectral radius of A - BK, of the last attempt; `None` on
            routes without a DARE, like the next two.
        dare_residual: Largest residual of the DARE, of the last attempt.
        dare_iterations: Most doubling steps or sweeps, of the last attempt.
        iterations: Products with the metric, on the Krylov route.
        truncation: Bound on the relative error of the inverses, on the routes "cyclic" by sweeps
            and "riccati" with damping by layer or a series.
        layer_damping: Damping of every phase there: of what reads the output, then of the layers;
            NaN where there are no controls.
        feedback: Norm of what the feedback added (DD11) over that of the rest of the step, of the
            last attempt; `None` without feedback, or where no attempt came so far.
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
    shortened: float
    ratio: float | None
    closed_loop_radius: float | None
    dare_residual: float | None
    dare_iterations: int | None
    iterations: int | None
    truncation: float | None
    layer_damping: tuple[float, ...] | None
    feedback: float | None


@dataclass(frozen=True)
class Start:
    """Where a step begins.

    Attributes:
        at: The batch.
        local: The model linearised on it.
        parameters: All of them.
        random: State of the generator before the model was linearised.
        decay: What the decoupled terms of (O2) take off.
        injected: The controls that move first, where there is feedback (see `injected`).
    """

    at: Batch
    local: Local
    parameters: Tensor
    random: Tensor
    decay: Tensor
    injected: Tensor | None


@dataclass
class Attempt:
    """A change of the parameters, and how it went.

    Attributes:
        direction: What the route proposed.
        reason: Why it must not stay, or `None`.
        shortened: Factor of the trust region.
        promised: Decrease of the loss by (O3), where it is asked for.
        loss_after: Loss after it, NaN where it was not looked at.
        feedback: As in `StepReport`.
    """

    direction: Direction
    reason: str | None
    shortened: float = 1.0
    promised: float | None = None
    loss_after: float = float("nan")
    feedback: float | None = None

    def ratio(self, loss: float) -> float | None:
        """Return the decrease of the loss over the promised one, where both are known."""
        if self.reason is not None or self.promised is None or self.loss_after != self.loss_after:
            return None
        return (loss - self.loss_after) / self.promised if self.promised > 0 else 0.0

    def report(
        self, local: Local, damping: float, rejections: tuple[str, ...], rolled_back: bool
    ) -> StepReport:
        """Return what there is to say of a step that ended with this attempt."""
        solutions, direction, accepted = local.solutions, self.direction, self.reason is None
        evaluations = [s.evaluations.double().mean() for s in solutions]
        return StepReport(
            loss=float(local.loss),
            accepted=accepted,
            loss_after=self.loss_after if accepted else float("nan"),
            damping=damping,
            rejections=rejections,
            rolled_back=rolled_back,
            evaluations=float(torch.stack(evaluations).mean()) if evaluations else 0.0,
            residual=max((float(s.residual.max()) for s in solutions), default=0.0),
            step_residual=direction.residual,
            shortened=self.shortened,
            ratio=self.ratio(float(local.loss)),
            closed_loop_radius=direction.closed_loop_radius,
            dare_residual=direction.dare_residual,
            dare_iterations=direction.dare_iterations,
            iterations=direction.iterations,
            truncation=direction.truncation,
            layer_damping=direction.layer_damping,
            feedback=self.feedback,
        )


@contextmanager
def random_numbers_of(state: Tensor) -> Generator[None, None, None]:
    """Draw the numbers (dropout) that were drawn from a state, and go on as if it had not been."""
    now = torch.get_rng_state()
    torch.set_rng_state(state)
    try:
        yield
    finally:
        torch.set_rng_state(now)
