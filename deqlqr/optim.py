"""Implicit natural-gradient descent: a training step is the steady state of an LQR.

    (O2)  v <- momentum v + u,    d = lr (v - weight_decay theta - penalty grad J1),
          theta <- theta + d

u solves (F3) at R_bar = R + delta I, by any of the routes; J1 is the Jacobian penalty of the DEQ
layers. The quadratic model of the loss,

    (O3)  q(d) = g'd + d'C d / 2

says what d promises. With a trust region, d is shortened to d'C d / 2 <= radius. With adaptive
damping, delta falls where the loss fell by more than 3/4 of -q(d), and rises below 1/4.

Source: thesis algorithm 1; J. More (1978), The Levenberg-Marquardt algorithm, Lecture Notes in
Mathematics 630, for the adaptation; J. Martens, R. Grosse (2015), arXiv:1503.05671, section 6.
"""

import logging
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deqlqr._checks import at_least, count
from deqlqr._linalg import full_precision
from deqlqr.batch import Batch, require_independent, statistics_held
from deqlqr.controls import Controls
from deqlqr.direction import Direction, Local, expanded
from deqlqr.divergence import DivergenceLike
from deqlqr.layer_calls import calls_recorded
from deqlqr.linearize_samples import choose_divergence
from deqlqr.loss import LossLike, make_loss
from deqlqr.monitor import penalty_of
from deqlqr.output_space import OutputSpace
from deqlqr.routes import Krylov, Memory, Output, Route, Sampled, make_route
from deqlqr.solution import ConvergenceError

logger = logging.getLogger("deqlqr")

_ADAPTATION = 3.0  # factor on an adaptive damping
_LEAST, _MOST = 1e-12, 1e12  # limits of the factor on the damping
_PROBE = 0.1  # of the step, at which the bend of the outputs is looked at
_LARGEST_CORRECTION = 0.75  # of the step
_SUSPICIOUS = 2.0  # times the loss before: an unchecked step is looked at, and undone


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


@dataclass(frozen=True)
class _Start:
    """Where a step begins: batch, linearisation, parameters, random numbers, decoupled decay."""

    at: Batch
    local: Local
    parameters: Tensor
    random: Tensor
    decay: Tensor  # what the decoupled terms of (O2) take off


@dataclass
class _Attempt:
    """A change of the parameters, and how it went."""

    direction: Direction
    reason: str | None
    shortened: float = 1.0
    promised: float | None = None  # decrease of the loss
    loss_after: float = float("nan")


class ImplicitNGD(torch.optim.Optimizer):
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
        self.model, self.controls = model, Controls(model)
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
        defaults = {
            "lr": at_least("lr", lr, 0.0, strict=True),
            "damping": at_least("damping", damping, 0.0, strict=True),
            "momentum": _below_one("momentum", momentum),
            "weight_decay": at_least("weight_decay", weight_decay, 0.0),
        }
        super().__init__(self._grouped(param_groups), defaults)
        # What belongs to all groups lives in the first, so that `state_dict` holds it.
        self.param_groups[0].update(step=0, damping_factor=1.0, counts={}, unchecked=None)

    def _grouped(self, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the user's groups, and one of all other parameters."""
        found = [{**group, "params": list(group["params"])} for group in groups]
        taken = {id(p) for group in found for p in group["params"]}
        known = {id(p) for p in self.model.parameters()}
        if not taken <= known:
            raise ValueError("param_groups must hold parameters of the model only.")
        rest = [p for p in self.controls.parameters if id(p) not in taken]
        for group in found:
            for name in group.keys() - {"params", "lr", "damping", "momentum", "weight_decay"}:
                raise ValueError(f"param_groups: no option {name!r} for a group.")
        return [*found, {"params": rest}] if rest else found

    @property
    def current_damping(self) -> float:
        """The damping the next step starts from: `damping` times a factor that goes with events."""
        first = self.param_groups[0]
        return first["damping"] * first["damping_factor"]

    @property
    def counts(self) -> dict[str, int]:
        """How many steps there were, and attempts rejected, steps rolled back and given up."""
        zeros = dict.fromkeys(("steps", "rejected", "rolled back", "given up"), 0)
        first = self.param_groups[0]
        return {**zeros, "steps": first["step"], **first["counts"]}

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
        _require_no_cache()
        self._keep_up_with_freezing()
        at = self._batch(x, y)
        local, rolled_back = self._linearize(at)
        first = self.param_groups[0]
        factor = first["damping_factor"] * (self.damping_increase if rolled_back else 1.0)
        before = self.controls.vector
        start = _Start(at, local, before, self._random, self._decay(at, before))
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
            factor = min(factor * self.damping_increase, _MOST)
        accepted = tried.reason is None
        if accepted:
            self.controls.assign(self.controls.vector)  # now for good
        ratio = _ratio(float(local.loss), tried) if accepted else None
        self.last_step = self._report(
            local, tried, accepted, ratio, self._damping(factor), tuple(rejections), rolled_back
        )
        self._remember("previous", before if accepted else None)
        # The loss before a step that was taken and not looked at.
        first["unchecked"] = float(local.loss) if accepted and not checked else None
        first["damping_factor"] = self._next_factor(factor, bool(rejections), ratio)
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

    def _keep_up_with_freezing(self) -> None:
        """Leave out parameters frozen since the last step, and take in those freed again."""
        now = [p for p in self.model.parameters() if p.requires_grad]
        if [id(p) for p in now] == [id(p) for p in self.controls.parameters]:
            return
        known = {id(p) for group in self.param_groups for p in group["params"]}
        if any(id(p) not in known for p in now):
            raise ValueError(
                "model has a trainable parameter that the optimizer was not given; call "
                "add_param_group."
            )
        self.controls = Controls(self.model)

    def _linearize(self, at: Batch) -> tuple[Local, bool]:
        """Linearise at the current parameters, or, if they are bad, at those before the last step.

        Bad are parameters without a fixed point, and those of an unchecked step after which the
        loss is twice that of the same batch before it.

        Returns:
            The linearisation, and whether the parameters before the last step are back.

        Raises:
            ConvergenceError: If there is no fixed point here nor there.
        """
        current, previous = self.controls.vector, self._recall("previous")
        try:
            local: Local | None = self._linearize_here(at)
        except ConvergenceError:
            if previous is None:
                raise
            local = None
        if previous is None or not (local is None or self._worse(at, local, current, previous)):
            assert local is not None  # noqa: S101
            return local, False
        self.controls.assign(previous)
        try:
            local = self._linearize_here(at)
        except BaseException:
            self.controls.assign(current)
            raise
        self._remember("velocity", None)
        self._count("rolled back", 1)
        logger.info("the last step is undone: it lost the fixed point, or raised the loss")
        return local, True

    def _worse(self, at: Batch, local: Local, current: Tensor, previous: Tensor) -> bool:
        last = self.param_groups[0]["unchecked"]
        now = float(local.loss)
        if last is None or now <= _SUSPICIOUS * max(last, 1e-6):
            return False
        self.controls.try_out(previous)
        try:
            return not now <= _SUSPICIOUS * at.loss_now()
        except ConvergenceError:
            return False
        finally:
            self.controls.try_out(current)

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

    def _attempt(self, start: _Start, factor: float, checked: bool, again: bool) -> _Attempt:
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
            return _Attempt(direction, reason)
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
        self.controls.try_out(before + d)
        tried = _Attempt(direction, None, shortened, promised)
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
                with torch.enable_grad(), _random_numbers_of(self._random):
                    self.model(x)
                    at.solutions()
                    term = penalty_of(calls, self.param_groups[0]["step"])
            if isinstance(term, Tensor):
                share = self.penalty * len(x) / at.count
                decay = decay + share * self.controls.pull(term)
        return decay

    def _acceleration(self, start: _Start, local: OutputSpace, d: Tensor, factor: float) -> Tensor:
        """Return what (W4) adds to d; nothing where it is no small correction."""
        self.controls.try_out(start.parameters + _PROBE * d)
        try:
            with _random_numbers_of(start.random):
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
    def _checked(self, start: _Start) -> tuple[float, str | None]:
        """Return the loss at the trial parameters, and why they are rejected (or `None`)."""
        try:
            with _random_numbers_of(start.random):
                # From the layers' own start: near the last z* a solve may succeed that will not
                # succeed again.
                after = start.at.loss_now()
        except ConvergenceError as error:
            return float("nan"), str(error)
        loss = float(start.local.loss)
        if not after <= loss + self.max_increase * max(abs(loss), 1e-6):
            return after, f"the loss of the batch rose from {loss:.3e} to {after:.3e}"
        return after, None

    def _next_factor(self, factor: float, rejected: bool, ratio: float | None) -> float:
        """Return the factor on the damping that the next step starts from."""
        if rejected:
            return factor
        if not self.adaptive:
            return max(1.0, factor / self.damping_increase**0.5)
        if ratio is None:
            return factor
        # The acceleration makes good what a low ratio warns of: only a rise of the loss counts.
        low, high = (0.0, 0.25) if self.acceleration else (0.25, 0.75)
        if ratio > high:
            factor /= _ADAPTATION
        elif ratio < low:
            factor *= _ADAPTATION
        return min(max(factor, _LEAST), _MOST)

    def _damping(self, factor: float) -> float:
        return self.param_groups[0]["damping"] * factor

    def _each(self, name: str, factor: float = 1.0) -> list[float]:
        """Return an option of the groups for each parameter, in the order of the controls."""
        strict = name == "damping"
        of = {
            id(p): at_least(name, group[name], 0.0, strict=strict) * factor
            for group in self.param_groups
            for p in group["params"]
        }
        return [of[id(p)] for p in self.controls.parameters]

    def _entries(self, name: str, like: Tensor) -> Tensor:
        """Return an option of the groups for each entry of u; a scalar where all agree."""
        values = self._each(name)
        if len(set(values)) == 1:
            return like.new_tensor(values[0])
        return expanded(values, self.controls.sizes, like)

    def _recall(self, what: str) -> Tensor | None:
        """Return a vector kept in `state`, so that it is saved, or `None`."""
        parts = [self.state[p].get(what) for p in self.controls.parameters]
        if any(part is None for part in parts):
            return None
        return torch.cat([part.reshape(-1) for part in parts if part is not None])

    def _remember(self, what: str, u: Tensor | None) -> None:
        named = {} if u is None else self.controls.unflatten(u)
        for name, p in zip(self.controls.names, self.controls.parameters, strict=True):
            if u is None:
                self.state[p].pop(what, None)
            else:
                self.state[p][what] = named[name].clone()

    def _count(self, event: str, times: int) -> None:
        if times:
            counts = self.param_groups[0]["counts"]
            counts[event] = counts.get(event, 0) + times

    def _report(
        self,
        local: Local,
        tried: _Attempt,
        accepted: bool,
        ratio: float | None,
        damping: float,
        rejections: tuple[str, ...],
        rolled_back: bool,
    ) -> StepReport:
        solutions, direction = local.solutions, tried.direction
        evaluations = [s.evaluations.double().mean() for s in solutions]
        return StepReport(
            loss=float(local.loss),
            accepted=accepted,
            loss_after=tried.loss_after if accepted else float("nan"),
            damping=damping,
            rejections=rejections,
            rolled_back=rolled_back,
            evaluations=float(torch.stack(evaluations).mean()) if evaluations else 0.0,
            residual=max((float(s.residual.max()) for s in solutions), default=0.0),
            step_residual=direction.residual,
            shortened=tried.shortened,
            ratio=ratio,
            closed_loop_radius=direction.closed_loop_radius,
            dare_residual=direction.dare_residual,
            dare_iterations=direction.dare_iterations,
            iterations=direction.iterations,
            truncation=direction.truncation,
            layer_damping=direction.layer_damping,
        )


def _require_no_cache() -> None:
    """Refuse torch's cache: it would keep weights made before the parameters moved."""
    if parametrize._cache_enabled:
        raise ValueError(
            "step must be called outside torch.nn.utils.parametrize.cached(), whose weights stay "
            "as they were before the parameters changed, got a call inside."
        )


@contextmanager
def _random_numbers_of(state: Tensor) -> Generator[None, None, None]:
    """Draw the numbers (dropout) that were drawn from a state, and go on as if it had not been."""
    now = torch.get_rng_state()
    torch.set_rng_state(state)
    try:
        yield
    finally:
        torch.set_rng_state(now)


def _ratio(loss: float, tried: _Attempt) -> float | None:
    if tried.promised is None or tried.loss_after != tried.loss_after:
        return None
    return (loss - tried.loss_after) / tried.promised if tried.promised > 0 else 0.0


def _below_one(name: str, value: float) -> float:
    number = at_least(name, value, 0.0)
    if number >= 1:
        raise ValueError(f"{name} must be below 1, got {value}.")
    return number
