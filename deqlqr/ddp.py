"""Differential dynamic programming: a network's layers are steps in time, and its weights a policy.

The backward pass (DD3) to (DD9) gives each layer a step k and a feedback K on its state; the
forward pass then goes through the layers again, and each answers what those before it have done:

    (DD10)  u_t* = u_t + length k_t + K_t (X_t* - X_t),   X_{t+1}* = f_t(X_t*, u_t*),   X_0* = X_0

Source: G.-H. Liu, T. Chen, E. A. Theodorou (2020), Differential dynamic programming neural
optimizer, arXiv:2002.08809, algorithm 1; Y. Tassa, T. Erez, E. Todorov (2012),
doi:10.1109/IROS.2012.6386025 (line search and regularisation).
"""

import copy
import logging
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deqlqr._checks import at_least, choice, count, require_no_cache
from deqlqr._linalg import all_finite
from deqlqr.adaptation import next_factor, raised
from deqlqr.batch import Chunk
from deqlqr.controls import Controls
from deqlqr.ddp_backward import Policy
from deqlqr.ddp_base import (
    EKFAC,
    SGD,
    Base,
    BaseLike,
    Full,
    RMSprop,
    Running,
    make_base,
    start,
)
from deqlqr.ddp_dense import Weights, dense_policy
from deqlqr.ddp_forward import Rules
from deqlqr.ddp_network import Known
from deqlqr.ddp_policy import based_policy, linearized
from deqlqr.ddp_trajectory import Linearized
from deqlqr.deq import layers_of
from deqlqr.divergence import DivergenceLike, OutputDivergence
from deqlqr.gradient_step import GradientStep
from deqlqr.linearize_samples import choose_divergence
from deqlqr.loss import LossLike, make_loss
from deqlqr.optim import ImplicitNGD
from deqlqr.routes import Fisher
from deqlqr.solution import ConvergenceError

logger = logging.getLogger("deqlqr")

Coupling = Literal["batch", "sample"]
_FEW_LAYERS = 10  # up to which S is applied, not formed
_FEW_OUTPUTS = 100  # of a batch: a matrix of that size costs next to nothing


@dataclass(frozen=True)
class DDPReport:
    """What one step did.

    Attributes:
        loss: Loss before the step.
        loss_after: Loss on the same batch after it, NaN where it was not looked at: without
            feedback, or if the step was given up.
        accepted: Whether the parameters were changed.
        length: Factor on k that the line search ended with.
        damping_factor: Factor on damping and state damping of the last attempt; with SGD and
            RMSprop on 1 / lr.
        feedback: Norm of what the feedback changed over that of length k; 0 without.
        regularised: Layers at which (DD7) was needed.
        ratio: Decrease of the cost over what k promised; `None` where that is not known.
        rejections: The reason of each rejected attempt, in order.
        rolled_back: Whether the previous step was undone first.
    """

    loss: float
    loss_after: float
    accepted: bool
    length: float
    damping_factor: float
    feedback: float
    regularised: int
    ratio: float | None
    rejections: tuple[str, ...]
    rolled_back: bool


class DDP(torch.optim.Optimizer):
    """Batch DDP, in full or with feedback on top of SGD, RMSprop or EKFAC.

    The network is an `nn.Sequential`, or a module with a method `phases()` (see `deqlqr.phases`),
    without `DEQ` layer. Every layer has its own parameters. Without feedback a variant is its base
    optimiser, bit for bit, as long as nothing overflows; full DDP is then stage-wise Newton.

    A step after which loss or parameters are not finite, or the loss has risen by more than
    `max_increase`, is rejected: the parameters stay as they were, the damping rises by
    `damping_increase` (for SGD and RMSprop: the learning rate falls by it) and the step is tried
    again, at most `max_rejections` times. It recovers by the root of that factor each step.

    Args:
        model: Module with outputs `(batch, k)`.
        base: Where Q_uu^-1 comes from: `"full"`, `"sgd"`, `"rmsprop"`, `"ekfac"`, or an object
            with options such as `SGD(momentum=0.9)`.
        feedback: Apply K.
        loss: `"cross_entropy"`, `"mse"` or a function `(outputs, targets) -> scalar`, a mean over
            the batch.
        lr: Learning rate of the base; of full DDP the first length of k.
        damping: Tikhonov regularisation of Q_uu; above 0 for `"full"` and `"ekfac"`. The base
            step of SGD and RMSprop has none.
        state_damping: mu, Tikhonov regularisation of V_XX (DD9).
        weight_decay: As in the base: of the cost for SGD, RMSprop and full DDP, decoupled for
            EKFAC.
        coupling: `"batch"`: the policy of the whole batch, cubic in batch x outputs. `"sample"`:
            V_XX keeps the blocks of single samples only, an approximation at a fraction of the
            cost. Full DDP always couples.
        fisher: `"exact"`: all of Lambda. `"sampled"`: one random output cotangent c for each
            sample, E[c c'] = Lambda: a backward pass and batch in place of batch x outputs.
            `"auto"` is exact but where that takes many times as long: more than 10 layers with
            parameters, coupled, and batch x outputs above 100. Full DDP is always exact.
        divergence: Gives Lambda; `None` takes the one that matches the loss, whose Lambda is the
            Hessian of the loss in the outputs.
        line_search: Halve `length` until the cost falls by 1e-4 of what was promised.
        adaptive: Adapt the damping by how the cost followed its quadratic model, for `"full"` and
            `"ekfac"`.
        max_increase: Largest relative rise of the batch's own loss; `None` for no limit.
        damping_increase: Factor on the damping at a rejection.
        max_rejections: Attempts after the first before a step is given up.
        seed: Of the random cotangents; with the number of the step it determines them.

    Attributes:
        last_step: The `DDPReport` of the last call of `step`, or `None`.

    Raises:
        ValueError: If an option is unknown or out of range, or the model does not fit.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        >>> x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> opt = DDP(model, base="sgd", lr=0.5)
        >>> losses = [float(opt.step(x, y)) for _ in range(5)]
        >>> losses[-1] < losses[0] and opt.last_step.feedback > 0
        True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        base: BaseLike = "ekfac",
        feedback: bool = True,
        loss: LossLike = "cross_entropy",
        lr: float = 1.0,
        damping: float = 1e-2,
        state_damping: float = 0.0,
        weight_decay: float = 0.0,
        coupling: Coupling = "batch",
        fisher: Fisher | Literal["auto"] = "auto",
        divergence: DivergenceLike | None = None,
        line_search: bool = False,
        adaptive: bool = False,
        max_increase: float | None = None,
        damping_increase: float = 10.0,
        max_rejections: int = 6,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be an nn.Module, got {type(model).__name__}.")
        self.model, self.base = model, make_base(base)
        self.feedback, self.loss, self._loss = bool(feedback), make_loss(loss), loss
        found = choose_divergence(loss, divergence)
        if not isinstance(found, OutputDivergence):
            raise ValueError(
                f"divergence must be one of the output, which has a Lambda, got "
                f"{type(found).__name__}."
            )
        self.divergence = found
        self.coupling: Coupling = choice("coupling", coupling, ("batch", "sample"))
        self.fisher = choice("fisher", fisher, ("auto", "exact", "sampled"))
        self.line_search, self.adaptive = bool(line_search), bool(adaptive)
        damped = not _first_order(self.base)
        if adaptive and not damped:
            raise ValueError(f"adaptive needs base 'full' or 'ekfac', got {base!r}.")
        for name, wanted in (("line_search", line_search), ("adaptive", adaptive)):
            if wanted and not self._by_layers:
                raise ValueError(f"{name} needs feedback=True, or base 'full', got {base!r}.")
        if max_increase is not None:
            at_least("max_increase", max_increase, 0.0)
        self.max_increase = max_increase
        self.damping_increase = at_least("damping_increase", damping_increase, 1.0, strict=True)
        self.max_rejections = count("max_rejections", max_rejections, 0)
        self.seed = count("seed", seed, 0)
        if self._by_layers and layers_of(model):
            raise ValueError(
                f"model must have no DEQ layer, found {len(layers_of(model))}; ImplicitNGD takes "
                "any number."
            )
        self.last_step: DDPReport | None = None
        self._known = Known(model, self.base)
        self._previous: Tensor | None = None
        self._held = controls = Controls(model)
        self._kind = [(p.dtype, p.device) for p in controls.parameters[:1]]
        numbers = {
            "lr": at_least("lr", lr, 0.0, strict=True),
            "damping": at_least("damping", damping, 0.0, strict=damped),
            "state_damping": at_least("state_damping", state_damping, 0.0),
            "weight_decay": at_least("weight_decay", weight_decay, 0.0),
        }
        super().__init__(controls.parameters, dict(numbers))
        self._running: Running | None = None
        if not isinstance(self.base, Full):
            del numbers["state_damping"]
            self._running = start(
                self.base, model, controls.parameters, loss=loss, divergence=self.divergence,
                max_increase=max_increase, damping_increase=damping_increase,
                max_rejections=max_rejections, **numbers,
            )  # fmt: skip
            inner = self._running.optimizer
            inner.param_groups[0] |= {"damping": damping, "state_damping": state_damping}
            self.param_groups, self.state = inner.param_groups, inner.state
        # What `state_dict` is to hold lives in the group; `ImplicitNGD` has the same there.
        self.param_groups[0].update(step=0, damping_factor=1.0, counts={}, unchecked=None)

    @property
    def _by_layers(self) -> bool:
        return self.feedback or isinstance(self.base, Full)

    @property
    def counts(self) -> dict[str, int]:
        """How many steps there were, and attempts rejected, steps rolled back and given up."""
        zeros = dict.fromkeys(("steps", "rejected", "rolled back", "given up"), 0)
        first = self.param_groups[0]
        return {**zeros, **first["counts"], "steps": first["step"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._previous = None
        if self._running is not None:
            inner = self._running.optimizer
            inner.param_groups, inner.state = self.param_groups, self.state

    def policy(self, x: Tensor, y: Tensor) -> Policy:
        """Return the policy on a batch; nothing is changed.

        Args:
            x: Inputs `(batch, ...)`.
            y: Targets `(batch, ...)`.

        Raises:
            ValueError: If the data do not fit the model or the loss, or there is no feedback.
            ConvergenceError: If the loss is not finite.
        """
        if not self._by_layers:
            raise ValueError("policy needs feedback=True, or base 'full', got feedback=False.")
        if self._running is None:
            return self._policy_at(x, y)
        inner, state = self._running.optimizer, self.state
        inner.state = defaultdict(dict, {p: copy.deepcopy(v) for p, v in state.items()})
        try:
            return self._policy_at(x, y)
        finally:
            inner.state = state

    def _policy_at(self, x: Tensor, y: Tensor) -> Policy:
        at = self._linearized(x, y)
        return self._policy(at, at.controls.vector, 1.0)

    def step(self, x: Any = None, y: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Take one step on the batch (x, y) and return the loss before it, a scalar tensor.

        Args:
            x: Inputs `(batch, ...)`.
            y: Targets `(batch, ...)`.

        Returns:
            The loss before the step; `last_step` says what was done.

        Raises:
            ValueError: If the data do not fit the model or the loss, or within
                `torch.nn.utils.parametrize.cached`; nothing has changed then.
            ConvergenceError: If the loss is not finite at the current parameters, nor at those
                before the last step; the parameters are the former.
        """
        if callable(x) or x is None or y is None:
            raise ValueError("step takes a batch (x, y).")
        require_no_cache()
        controls = self._controls()
        before, take = controls.vector, self._step if self._by_layers else self._plain
        previous = self._previous
        try:
            report = take(x, y, before)
        except ConvergenceError:
            if previous is None or len(previous) != len(before):
                controls.assign(before)
                raise
            controls.assign(previous)
            try:
                report = take(x, y, previous, True)
            except BaseException:
                controls.assign(before)
                raise
            logger.info("the last step is undone: the loss was not finite")
        except BaseException:
            controls.assign(before)
            raise
        if report.accepted:
            self._previous = previous if report.rolled_back else before
        first, counts = self.param_groups[0], {"rolled back": int(report.rolled_back)}
        if self._by_layers or not isinstance(self.base, EKFAC):  # which counts by itself
            counts |= {"rejected": len(report.rejections), "given up": int(not report.accepted)}
        past = first["counts"]
        first["counts"] = past | {n: past.get(n, 0) + times for n, times in counts.items()}
        self.last_step = report
        return before.new_tensor(report.loss)

    def _controls(self) -> Controls:
        """Return the parameters that are trained now; the same object while they are the same."""
        now = [p for p in self.model.parameters() if p.requires_grad]
        kind = [(p.dtype, p.device) for p in now[:1]]
        if kind != self._kind or [id(p) for p in now] != [id(p) for p in self._held.parameters]:
            known = {id(p) for p in self.param_groups[0]["params"]}
            if any(id(p) not in known for p in now):
                raise ValueError(
                    "model has a trainable parameter that the optimizer was not given."
                )
            self._held, self._kind = Controls(self.model), kind
        return self._held

    def _plain(self, x: Tensor, y: Tensor, before: Tensor, again: bool = False) -> DDPReport:
        """Take the base's own step from the parameters `before`, the current ones."""
        assert self._running is not None  # noqa: S101
        inner, controls = self._running.optimizer, self._held
        accepted, reasons = True, list[str]()
        if isinstance(inner, ImplicitNGD):
            loss = float(inner.step(x, y))
            if not math.isfinite(loss):
                raise ConvergenceError(f"the loss is {loss}.")
            assert inner.last_step is not None  # noqa: S101
            accepted, reasons = inner.last_step.accepted, [*inner.last_step.rejections]
        else:
            loss = float(GradientStep(self.model, inner, self._loss).step(x, y))
            self.param_groups[0]["step"] += 1
        if not all_finite(controls.parameters):
            # What made them so is in the base's memory too.
            controls.assign(before)
            self.state.clear()
            accepted, reasons = False, [*reasons, "the parameters are not finite"]
        nan = float("nan")
        return DDPReport(loss, nan, accepted, 1.0, 1.0, 0.0, 0, None, tuple(reasons), again)

    def _step(self, x: Tensor, y: Tensor, before: Tensor, again: bool = False) -> DDPReport:
        """Take a step with feedback, or one of full DDP, from `before`, the current parameters."""
        first = self.param_groups[0]
        at = self._linearized(x, y)
        if at.controls.m != len(before):  # not all have an effect
            before = at.controls.vector
        factor = first["damping_factor"] * (self.damping_increase if again else 1.0)
        rejections: list[str] = []
        rules = self._rules()
        while True:
            policy = self._policy(at, before, factor)
            tried = rules.searched(at, policy, before)
            if tried.reason is None:
                break
            at.controls.try_out(before)
            if policy.reason is None and self._running is not None:
                self._running.restore()
            rejections.append(tried.reason)
            logger.info("step rejected at damping factor %.1e: %s", factor, tried.reason)
            if len(rejections) > self.max_rejections:
                break
            factor = raised(factor, self.damping_increase)
        accepted = tried.reason is None
        if accepted:
            for p in at.controls.parameters:  # now for good: graphs that hold them are to notice
                torch.autograd.graph.increment_version(p)
        ratio = rules.ratio(at, policy, tried, before) if accepted else None
        first["damping_factor"] = next_factor(
            factor, rejected=bool(rejections), increase=self.damping_increase,
            adaptive=self.adaptive, ratio=ratio,
        )  # fmt: skip
        first["step"] += 1
        return DDPReport(
            at.loss, tried.loss if accepted else float("nan"), accepted, tried.length, factor,
            tried.feedback, policy.regularised, ratio, tuple(rejections), again,
        )  # fmt: skip

    def _linearized(self, x: Tensor, y: Tensor) -> Linearized:
        """Return the model on a batch.

        Raises:
            ValueError: If the data do not fit.
            ConvergenceError: If the loss is not finite.
        """
        at = linearized(self._known, self._controls(), self.loss, x, y)
        if at.trajectory is not None and self._running is not None:
            chunk = Chunk(at.trajectory, x, y, at.V_X)
            self._running.look(at.trajectory, chunk, self.param_groups[0]["step"])
        return at

    def _policy(self, at: Linearized, before: Tensor, factor: float) -> Policy:
        """Return the policy from the parameters `before`, at a factor on the damping."""
        group = self.param_groups[0]
        damping, mu, decay = (group[n] for n in ("damping", "state_damping", "weight_decay"))
        if isinstance(self.base, Full):
            assert at.net is not None  # noqa: S101
            weights = Weights(damping * factor, decay, mu * factor)
            return dense_policy(
                at.net, at.y, self.loss, self.divergence, weights=weights,
                second_order=self.base.second_order, feedback=self.feedback,
            )  # fmt: skip
        assert self._running is not None  # noqa: S101
        layers = sum(map(bool, at.network.own))
        columns = lambda y: self._cotangents(y, layers)
        return based_policy(
            at, self._running, columns, before, factor, mu=mu, weight_decay=decay,
            whole=self.coupling == "batch", measured=self.adaptive,
        )  # fmt: skip

    def _cotangents(self, y: Tensor, layers: int) -> list[Tensor]:
        """Return the columns of C_T (DD3), or a random one, for outputs y."""
        if self.fisher != "sampled":
            root = self.divergence.root(y) / len(y) ** 0.5
            few = layers <= _FEW_LAYERS or len(y) * root.shape[-1] <= _FEW_OUTPUTS
            if self.fisher == "exact" or self.coupling == "sample" or few:
                return list(root.unbind(-1))  # (DD3)
        seed = (self.seed * 1_000_003 + self.param_groups[0]["step"]) % 2**63
        generator = torch.Generator(y.device).manual_seed(seed)
        return [self.divergence.sample(y, generator) / len(y) ** 0.5]

    def _rules(self) -> Rules:
        first, running = self.param_groups[0], self._running
        return Rules(
            loss=self.loss,
            length=first["lr"] if running is None else 1.0,
            line_search=self.line_search,
            max_increase=self.max_increase,
            weight_decay=first["weight_decay"] if running is None or running.l2 else 0.0,
        )


def _first_order(base: Base) -> bool:
    return isinstance(base, SGD | RMSprop)
