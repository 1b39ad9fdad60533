"""Implicit natural-gradient descent: a training step is the steady state of an LQR.

    (O2)  v <- momentum v + u,    d = lr (v - weight_decay theta - penalty grad J1),
          theta <- theta + d

u solves (F3) at R_bar = R + delta I, by any of the routes; J1 is the Jacobian penalty of the DEQ
layers. The quadratic model of the loss,

    (O3)  q(d) = g'd + d'C d / 2

says what d promises. With a trust region, d is shortened to d'C d / 2 <= radius. With adaptive
damping, delta falls where the loss fell by more than 3/4 of -q(d), and rises below 1/4.
With feedback, (DD11) of `deqlqr.feedback` adds to d last.

Source: thesis algorithm 1; J. More (1978), The Levenberg-Marquardt algorithm, Lecture Notes in
Mathematics 630, for the adaptation; J. Martens, R. Grosse (2015), arXiv:1503.05671, section 6.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from deqlqr._checks import at_least, count, require_no_cache
from deqlqr._linalg import full_precision
from deqlqr.adaptation import next_factor, raised
from deqlqr.batch import Batch, require_independent, statistics_held
from deqlqr.controls_optimizer import ControlsOptimizer
from deqlqr.direction import Direction, Local
from deqlqr.divergence import DivergenceLike
from deqlqr.feedback import answer, feedback_refusal, injected
from deqlqr.layer_calls import calls_recorded
from deqlqr.linearize_samples import choose_divergence
from deqlqr.loss import LossLike, make_loss
from deqlqr.monitor import penalty_of
from deqlqr.output_space import OutputSpace
from deqlqr.riccati_route import RiccatiProblem
from deqlqr.roll_back import linearized_or_rolled_back
from deqlqr.routes import Krylov, Memory, Output, Route, Sampled, make_route
from deqlqr.solution import ConvergenceError
from deqlqr.step_report import Attempt, Start, StepReport, random_numbers_of

logger = logging.getLogger("deqlqr")

_PROBE = 0.1  # of the step, at which the bend of the outputs is looked at
_LARGEST_CORRECTION = 0.75  # of the step


class ImplicitNGD(ControlsOptimizer):
    """Steepest descent in a divergence, each step solved as an infinite-horizon LQR.

    All trainable parameters of the model (encoder, block, readout) are controls. The model may hold
    any number of `DEQ` layers, or none. A step whose linear algebra fails, that is not finite, or
    after which the batch has no fixed point or a higher loss, is rejected: the parameters stay as
    they were, the damping rises by `damping_increase` and the step is tried again, at most
    `max_rejections` times. After accepted steps a raised damping falls back towards `damping` by
    the square root of that factor, or goes by the quadratic model if `adaptive`.

    A step can be taken on several batches at once: `accumulate` each, then call `step()`.

    Args:
        model: Module with outputs `(batch, k)`; routes `"dare"` and `"cyclic"` want exactly one
            `DEQ` layer, `"riccati"` none.
        loss: `"cross_entropy"`, `"mse"` or a function `(outputs, targets) -> scalar`, a mean over
            the batch.
        lr: Step length; 1 takes the damped step as it is.
        damping: delta of R_bar = R + delta I, above 0.
        route: How u is computed: `"dare"`, `"cyclic"`, `"riccati"`, `"output"`, `"sampled"`,
            `"krylov"`, `"kronecker"`, or an object with options such as
            `Kronecker(refresh_every=50)`. All but the last compute or estimate one and the same
            step; it approximates the metric.
        divergence: What "steepest" is measured in (see `linearize`); `None` takes the one that
            matches the loss, which makes this natural gradient descent.
        momentum: Share of the last velocity in the next (O2).
        weight_decay: Decoupled (O2).
        penalty: Factor on the gradient of the Jacobian penalty (J1) of the DEQ layers, decoupled
            (O2): it keeps the spectral radius of A down, at the cost of another gradient.
        adaptive: Adapt the damping by how the loss followed the quadratic model (O3).
        acceleration: Correct u for the bend of the outputs along it (W4), at the cost of a forward
            pass; for the routes `"output"` and `"sampled"`. Least squares to high accuracy take far
            fewer steps.
        feedback: Let block and readout answer what the encoder's part of the step has really done
            to z* (DD11), by the gain K of the DARE, at the cost of a forward solve; for the route
            `"dare"` with `minibatch="exact"`, one `lr` for all groups, and models with trained
            parameters before the DEQ layer. It comes after momentum, decay and trust region, and
            enters none of them.
        trust_region: Largest d'C d / 2, the divergence of the outputs in quadratic approximation;
            `None` for no limit.
        param_groups: Groups of parameters with their own `lr`, `damping`, `momentum` or
            `weight_decay`, as for `torch.optim`; parameters in none of them form a last group.
        chunk_size: Most samples that are linearised together, which bounds the memory; `None` takes
            each batch whole.
        check_every: Steps between checks of the loss after the step, each the cost of a forward
            pass. An unchecked step is undone at the next one if the fixed point is lost, or if the
            loss of the batch is twice what it was before the step.
        linalg_dtype: Type of the linear algebra; `None` takes the model's.
        damping_increase: Factor on the damping at a rejection.
        max_increase: Largest relative rise of the batch's own loss that a step may cause.
        step_tolerance: Largest residual of the equations of u accepted.
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
        >>> opt = ImplicitNGD(model, loss="cross_entropy", lr=1.0, damping=0.1, route="output")
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
        route: str | Route = "dare",
        divergence: DivergenceLike | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        penalty: float = 0.0,
        adaptive: bool = False,
        acceleration: bool = False,
        feedback: bool = False,
        trust_region: float | None = None,
        param_groups: Iterable[dict[str, Any]] = (),
        chunk_size: int | None = None,
        check_every: int = 1,
        linalg_dtype: torch.dtype | None = None,
        damping_increase: float = 10.0,
        max_increase: float = 0.1,
        step_tolerance: float = 1e-3,
        max_rejections: int = 6,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be an nn.Module, got {type(model).__name__}.")
        defaults = {
            "lr": at_least("lr", lr, 0.0, strict=True),
            "damping": at_least("damping", damping, 0.0, strict=True),
            "momentum": _below_one("momentum", momentum),
            "weight_decay": at_least("weight_decay", weight_decay, 0.0),
        }
        super().__init__(model, param_groups, defaults)
        self.loss = make_loss(loss)
        self.divergence = choose_divergence(loss, divergence)
        self.route = make_route(route)
        refusal = self.route.refuses(model, self.divergence)
        if refusal is not None:
            raise ValueError(f"route {route!r} {refusal}.")
        if linalg_dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"linalg_dtype must be float32, float64 or None, got {linalg_dtype}.")
        self.linalg_dtype = linalg_dtype or self.controls.parameters[0].dtype
        self.penalty = at_least("penalty", penalty, 0.0)
        self.adaptive = bool(adaptive)
        self.acceleration = bool(acceleration)
        if acceleration and not isinstance(self.route, (Output, Sampled)):
            raise ValueError(f"acceleration needs route 'output' or 'sampled', got {route!r}.")
        self.feedback = bool(feedback)
        refusal = feedback_refusal(self.route, self.divergence) if feedback else None
        if refusal is not None:
            raise ValueError(f"feedback {refusal}.")
        self.trust_region = trust_region
        if trust_region is not None:
            at_least("trust_region", trust_region, 0.0, strict=True)
        self.chunk_size = None if chunk_size is None else count("chunk_size", chunk_size)
        self.check_every = count("check_every", check_every)
        self.damping_increase = at_least("damping_increase", damping_increase, 1.0, strict=True)
        self.max_increase = at_least("max_increase", max_increase, 0.0)
        self.step_tolerance = at_least("step_tolerance", step_tolerance, 0.0, strict=True)
        self.max_rejections = int(at_least("max_rejections", max_rejections, 0))
        self.last_step: StepReport | None = None
        self._random = torch.empty(0)  # state of the generator before the model was linearised
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._independent: tuple[bool, ...] | None = None  # the modes it was checked in

    @property
    def current_damping(self) -> float:
        """The damping the next step starts from: `damping` times a factor that goes with events."""
        first = self.param_groups[0]
        return first["damping"] * first["damping_factor"]

    def accumulate(self, x: Tensor, y: Tensor) -> None:
        """Keep a batch for the next `step`, which takes all kept ones as one.

        Args:
            x: Inputs `(batch, ...)`.
            y: Targets `(batch, ...)`.
        """
        size = self.chunk_size
        if size is None or not isinstance(x, Tensor) or x.dim() < 1 or len(x) <= size:
            self._pending.append((x, y))
        else:
            self._pending += zip(x.split(size), y.split(size), strict=True)

    def step(self, x: Any = None, y: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Take one step on the batch (x, y) and return the loss before it, a scalar tensor.

        Args:
            x: Inputs `(batch, ...)`; `None` for what was accumulated.
            y: Targets `(batch, ...)`.

        Returns:
            The loss before the step; `last_step` says what was done.

        Raises:
            ValueError: If the data do not fit the model or the loss, or within
                `torch.nn.utils.parametrize.cached`; nothing has changed then.
            ConvergenceError: If a sample has no fixed point at the current parameters, nor at
                those before the last step; the parameters are the former.
        """
        if callable(x):
            raise ValueError("step takes a batch (x, y), not a closure.")
        require_no_cache()
        self._keep_up_with_freezing()
        at = self._batch(x, y)
        local, rolled_back = self._linearize(at)
        first = self.param_groups[0]
        factor = first["damping_factor"] * (self.damping_increase if rolled_back else 1.0)
        before = self.controls.vector
        moved = self._injected(at, local) if self.feedback else None
        start = Start(at, local, before, self._random, self._decay(at, before), moved)
        checked = (first["step"] + 1) % self.check_every == 0
        rejections: list[str] = []
        while True:
            try:
                tried = self._attempt(start, factor, checked, bool(rejections))
            except BaseException:
                self.controls.assign(before)
                raise
            if tried.reason is None:
                break
            self.controls.try_out(before)
            rejections.append(tried.reason)
            logger.info("step rejected at damping %.1e: %s", self._damping(factor), tried.reason)
            if len(rejections) > self.max_rejections:
                break
            factor = raised(factor, self.damping_increase)
        accepted = tried.reason is None
        if accepted:
            self.controls.assign(self.controls.vector)  # now for good
        self.last_step = report = tried.report(
            local, self._damping(factor), tuple(rejections), rolled_back
        )
        self._remember("previous", before if accepted else None)
        # The loss before a step that was taken and not looked at.
        first["unchecked"] = float(local.loss) if accepted and not checked else None
        # The acceleration makes good what a low ratio warns of: only a rise of the loss counts.
        low, high = (0.0, 0.25) if self.acceleration else (0.25, 0.75)
        first["damping_factor"] = next_factor(
            factor, rejected=bool(rejections), increase=self.damping_increase,
            adaptive=self.adaptive, ratio=report.ratio, low=low, high=high,
        )  # fmt: skip
        first["step"] += 1
        self._count("rejected", len(rejections))
        self._count("given up", int(not accepted))
        if not accepted:
            logger.info("step given up: %s", rejections[-1])
        return local.loss

    def _batch(self, x: Any, y: Any) -> Batch:
        held = self._pending
        self._pending = [] if x is None else list(held)
        if x is not None:
            self.accumulate(x, y)
            held, self._pending = self._pending, []
        if not held:
            raise ValueError("step needs a batch (x, y), or batches accumulated before.")
        return Batch(self.model, self.controls, self.loss, held)

    def _linearize(self, at: Batch) -> tuple[Local, bool]:
        """Linearise, after undoing the last step if it turns out bad (see `roll_back`).

        Returns:
            The linearisation, and whether the parameters before the last step are back.

        Raises:
            ConvergenceError: If there is no fixed point at either.
        """
        previous, loss = self._recall("previous"), self.param_groups[0]["unchecked"]
        local, rolled_back = linearized_or_rolled_back(
            lambda: self._linearize_here(at), at, self.controls, previous, loss
        )
        if rolled_back:
            self._remember("velocity", None)
            self._count("rolled back", 1)
            logger.info("the last step is undone: it lost the fixed point, or raised the loss")
        return local, rolled_back

    def _injected(self, at: Batch, local: Local) -> Tensor:
        """Return which controls move first (DD11).

        Raises:
            ValueError: If the groups do not have one step length, or the model does not fit.
        """
        rates = sorted({group["lr"] for group in self.param_groups})
        if len(rates) > 1:
            # K answers by all controls together: a group held back by its lr would not follow.
            raise ValueError(f"feedback takes one lr for all groups, got {rates}.")
        assert isinstance(local, RiccatiProblem)  # noqa: S101  see `feedback_refusal`
        return injected(at, local)

    def _linearize_here(self, at: Batch) -> Local:
        if isinstance(self.route, (Output, Sampled)):
            modes = tuple(module.training for module in self.model.modules())
            if modes != self._independent:
                require_independent(at)
                self._independent = modes
        self._random = torch.get_rng_state()
        first = self.param_groups[0]
        layers = self.state[self.controls.parameters[0]].setdefault("layers", {})
        memory = Memory(first["step"], self._recall("direction"), layers)
        return self.route.local(at, self.divergence, self.linalg_dtype, memory)

    def _attempt(self, start: Start, factor: float, checked: bool, again: bool) -> Attempt:
        """Solve for u, move the parameters along it, and say whether they may stay there."""
        local, before = start.local, start.parameters
        shifts = self._each("damping", factor)
        try:
            with full_precision(before):
                direction = local.solve(shifts)
        except torch.linalg.LinAlgError as error:
            direction = Direction(None, float("nan"), reason=f"linear algebra failed: {error}")
        reason = direction.reason
        if reason is None and not direction.residual <= self.step_tolerance:
            reason = f"the step's equations hold only to {direction.residual:.1e}"
        if reason is not None or direction.u is None:
            return Attempt(direction, reason)
        u = direction.u.to(before.dtype)
        velocity = None if again else self._recall("velocity")  # a rejected step has no momentum
        momentum = self._entries("momentum", u)
        if velocity is not None:
            u = momentum * velocity + u
        d = self._entries("lr", u) * (u - start.decay)  # (O2)
        with full_precision(before):
            d, shortened, promised = self._within_reach(local, direction, d, u)
        if self.acceleration and isinstance(local, OutputSpace):
            d = d + self._acceleration(start, local, d, factor)
        tried = Attempt(direction, None, shortened, promised)
        if start.injected is not None and bool(d.isfinite().all()):
            try:
                d, tried.feedback = self._answered(start, direction, d, start.injected)
            except ConvergenceError as error:
                tried.reason = f"the encoder's part of the step: {error}"
                return tried
        self.controls.try_out(before + d)
        if not bool(d.isfinite().all()):
            tried.reason = "the step is not finite"
        elif checked:
            tried.loss_after, tried.reason = self._checked(start)
        if tried.reason is None:
            self._remember("velocity", u if bool((momentum > 0).any()) else None)
            if isinstance(self.route, Krylov):
                self._remember("direction", direction.u)
        return tried

    def _decay(self, at: Batch, parameters: Tensor) -> Tensor:
        """Return weight_decay theta + penalty grad J1 of (O2)."""
        decay = self._entries("weight_decay", parameters) * parameters
        if not self.penalty:
            return decay
        for x, _ in at.pieces:
            with statistics_held(self.model), calls_recorded(self.model) as calls:
                with torch.enable_grad(), random_numbers_of(self._random):
                    self.model(x)
                    at.solutions()
                    term = penalty_of(calls, self.param_groups[0]["step"])
            if isinstance(term, Tensor):
                share = self.penalty * len(x) / at.count
                decay = decay + share * self.controls.pull(term)
        return decay

    def _acceleration(self, start: Start, local: OutputSpace, d: Tensor, factor: float) -> Tensor:
        """Return what (W4) adds to d; nothing where it is no small correction."""
        self.controls.try_out(start.parameters + _PROBE * d)
        try:
            with random_numbers_of(start.random):
                after = torch.cat([y for y, _ in start.at.outputs_now(local.solutions)])
        except ConvergenceError:
            return torch.zeros_like(d)
        wide = d.to(self.linalg_dtype)
        with full_precision(d):
            a = local.correction(wide, after, _PROBE, self._each("damping", factor)).to(d.dtype)
        size = torch.linalg.vector_norm
        if not bool(size(a) <= _LARGEST_CORRECTION * size(d)):
            return torch.zeros_like(d)
        return a

    def _answered(
        self, start: Start, direction: Direction, d: Tensor, moved: Tensor
    ) -> tuple[Tensor, float]:
        """Return d with the feedback (DD11), and the size of that relative to d.

        Raises:
            ConvergenceError: If the encoder's part of d loses a fixed point.
        """
        assert isinstance(start.local, RiccatiProblem) and direction.K is not None  # noqa: S101
        with full_precision(d), random_numbers_of(start.random):
            added = answer(start.at, start.local, direction.K, moved, d)
        size = float(torch.linalg.vector_norm(d))
        return d + added, float(torch.linalg.vector_norm(added)) / size if size else 0.0

    def _within_reach(
        self, local: Local, direction: Direction, d: Tensor, u: Tensor
    ) -> tuple[Tensor, float, float | None]:
        """Shorten d to the trust region.

        Returns:
            d, the factor on it, and the decrease of the loss that (O3) promises, where it is asked
            for.
        """
        if self.trust_region is None and not self.adaptive:
            return d, 1.0, None
        rates = {group["lr"] for group in self.param_groups}
        decays = self.penalty or any(group["weight_decay"] for group in self.param_groups)
        plain = u is direction.u and len(rates) == 1 and not decays
        if plain:
            lr = rates.pop()
            slope, bend = lr * direction.slope, lr**2 * direction.curvature
        else:
            wide = d.to(self.linalg_dtype)
            slope, bend = float(local.gradient @ wide), local.metric(wide)
        reach = 1.0
        if self.trust_region is not None and bend > 2 * self.trust_region:
            reach = (2 * self.trust_region / bend) ** 0.5
        return d * reach, reach, -(reach * slope + reach**2 * bend / 2)  # (O3)

    @torch.no_grad()
    def _checked(self, start: Start) -> tuple[float, str | None]:
        """Return the loss at the trial parameters, and why they are rejected (or `None`)."""
        try:
            with random_numbers_of(start.random):
                # From the layers' own start: near the last z* a solve may succeed that will not
                # succeed again.
                after = start.at.loss_now()
        except ConvergenceError as error:
            return float("nan"), str(error)
        loss = float(start.local.loss)
        if not after <= loss + self.max_increase * max(abs(loss), 1e-6):
            return after, f"the loss of the batch rose from {loss:.3e} to {after:.3e}"
        return after, None

    def _damping(self, factor: float) -> float:
        return self.param_groups[0]["damping"] * factor


def _below_one(name: str, value: float) -> float:
    number = at_least(name, value, 0.0)
    if number >= 1:
        raise ValueError(f"{name} must be below 1, got {value}.")
    return number
