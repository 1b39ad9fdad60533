"""Training that keeps its fixed points, with any optimizer.

Every few steps the guard looks at the model on the batch just used: whether all samples have a
fixed point, whether everything is finite, and at the spectral radius rho of A = df/dz of the
samples that converge slowest. What passes is remembered. Where a look fails, the way gone since the
last that passed is shortened,

    (GU1)  theta <- good + 2^-j (theta - good),   j = 1, 2, ...,   until a look passes,

or taken back, the optimizer's memory returns to what it was there, and its step length is halved;
it recovers while looks pass. So that there is room to go on, the Jacobian penalty of the slowest
samples is then brought down, at their states z as they are,

    (GU2)  theta <- theta - J1 / 5 g / |g|^2,   g = dJ1/dtheta,   until rho <= 0.9 of the largest.
"""

import copy
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from deqlqr._checks import at_least, count
from deqlqr.batch import statistics_held
from deqlqr.controls import Controls
from deqlqr.layer_calls import LayerCall, calls_recorded, failures_returned, layers_of
from deqlqr.monitor import jacobian_radius, penalty_of
from deqlqr.solution import ConvergenceError

_SHORTENINGS = 4  # 2^-j of (GU1) before the way is taken back
_KEPT = 3  # states that have passed, to fall back on
_RECOVERY = 1.2  # of the step length, at a look that passes
_ROOM = 0.9  # of the largest radius, to which (GU2) brings it down
_DECREASE = 0.2  # of the penalty, in a step of (GU2)
_ROUNDS = 20  # steps of (GU2)
_PERSISTENCE = 12  # looks in a row that fail before training stops


class Stepper(Protocol):
    """What takes steps: an `ImplicitNGD`, or a `GradientStep`."""

    model: nn.Module

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Take a step and return the loss before it."""


def _radius(call: LayerCall) -> float:
    radii = jacobian_radius(call.layer, call.z, *call.inputs, **call.shared)
    return float(radii.nan_to_num(nan=float("inf")).max())


@dataclass(frozen=True)
class Look:
    """What a look at the model on a batch found.

    Attributes:
        failed: Share of samples without a fixed point.
        finite: Whether outputs and parameters are.
        radius: Largest spectral radius of A over the samples looked at; NaN without a DEQ layer.
        reason: Why it does not pass, or `None`.
    """

    failed: float
    finite: bool
    radius: float
    reason: str | None


class Guard:
    """Takes steps by an optimizer, and does not let the fixed points get lost.

    Args:
        stepper: `ImplicitNGD`, or a torch optimizer in a `GradientStep`.
        max_radius: Largest spectral radius of A allowed.
        every: Steps between two looks, each the cost of a forward pass and of some 50 products
            with A for each of the samples looked at (A itself for states of up to 64).
        samples: Samples whose A is looked at: those that took most evaluations.
        max_failed: Largest share of samples without a fixed point allowed.

    Attributes:
        last_look: The last `Look`, or `None`.
        scale: Factor on the step length.
        counts: How many looks there were, how often the way was shortened or taken back, and how
            many steps of (GU2) were taken.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> from deqlqr import DEQ, DenseBlock
        >>> from deqlqr.gradient_step import GradientStep
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(DEQ(DenseBlock(4, max_norm=None)), nn.Linear(4, 3))
        >>> sgd = torch.optim.SGD(model.parameters(), lr=1e3)  # far too long
        >>> guard = Guard(GradientStep(model, sgd), every=1)
        >>> x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> for _ in range(5):
        ...     loss = guard.step(x, y)
        >>> guard.look(x).reason is None, guard.scale < 1
        (True, True)
    """

    def __init__(
        self,
        stepper: Stepper,
        *,
        max_radius: float = 0.98,
        every: int = 10,
        samples: int = 4,
        max_failed: float = 1e-3,
    ) -> None:
        self.stepper, self.model = stepper, stepper.model
        inner = stepper if isinstance(stepper, torch.optim.Optimizer) else None
        self.optimizer: torch.optim.Optimizer = inner or getattr(stepper, "optimizer")  # noqa: B009
        self.max_radius = at_least("max_radius", max_radius, 0.0, strict=True)
        self.every, self.samples = count("every", every), count("samples", samples)
        self.max_failed = at_least("max_failed", max_failed, 0.0)
        self.last_look: Look | None = None
        self.scale = 1.0
        self.counts = {"looks": 0, "shortened": 0, "taken back": 0, "calmed": 0}
        self._since = 0  # steps since the last look
        self._interval = self.every  # steps to the next: fewer after failures
        self._failures = 0  # looks and steps in a row that failed
        self._good: deque[dict[str, Any]] = deque(maxlen=_KEPT)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Take one step on the batch (x, y), and look at it if it is time to.

        Args:
            x: Inputs `(batch, ...)`.
            y: Targets `(batch, ...)`.

        Returns:
            The loss before the step.

        Raises:
            ValueError: If the data do not fit the model.
            ConvergenceError: If there is no way on that keeps the fixed points. The model has the
                last parameters that had them, unless it had none from the start.
        """
        if not self._good:
            look = self.look(x)
            if look.reason is not None:
                raise ConvergenceError(f"training cannot start: {look.reason}.")
            self._remember()
        while True:
            try:
                with self._rates_scaled():
                    loss = self.stepper.step(x, y)
                break
            except ConvergenceError as error:
                if not self._calmed(x):
                    self.take_back(str(error))
                    self._calmed(x)
        self._since += 1
        if self._since >= self._interval:
            self.check(x)
        return loss

    def check(self, x: Tensor) -> Look:
        """Look at the model on a batch now, and shorten the way or take it back if it must be.

        Args:
            x: Inputs `(batch, ...)`.

        Returns:
            What the look found before anything was done.

        Raises:
            ConvergenceError: As `step`.
        """
        found = self.look(x)
        if found.reason is None:
            self._since = self._failures = 0
            self._interval = min(self.every, 2 * self._interval)
            self.scale = min(1.0, self.scale * _RECOVERY)
            self._remember()
        elif not self._calmed(x) and not self._shorten(x):
            self.take_back(found.reason)
            self._calmed(x)
        return found

    @torch.no_grad()
    def look(self, x: Tensor) -> Look:
        """Return what can be said of the model on a batch; nothing changes.

        Args:
            x: Inputs `(batch, ...)`.
        """
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices), statistics_held(self.model):
            with failures_returned(self.model), calls_recorded(self.model) as calls:
                outputs = self.model(x)
        finite = all(bool(t.isfinite().all()) for t in (outputs, *self.model.parameters()))
        failed, radius = 0.0, float("nan")
        for call in calls:
            assert call.layer.solution is not None  # noqa: S101
            failed = max(failed, 1.0 - float(call.layer.solution.converged.double().mean()))
        if finite and calls:
            radius = max(_radius(self._slowest(call)) for call in calls)
        self.counts["looks"] += 1
        self.last_look = Look(failed, finite, radius, self._reason(failed, finite, radius))
        return self.last_look

    def _slowest(self, call: LayerCall) -> LayerCall:
        """Return the samples of a call that took most evaluations."""
        solution = call.layer.solution
        assert solution is not None  # noqa: S101
        batch = len(solution.evaluations)
        slowest = solution.evaluations.topk(min(self.samples, batch)).indices

        def part(value: Any) -> Any:
            sample = isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch
            return value[slowest].detach() if sample else value

        z, inputs = tree_map(part, call.z), tree_map(part, call.inputs)
        return LayerCall(call.layer, inputs, call.shared, z)

    def _reason(self, failed: float, finite: bool, radius: float) -> str | None:
        if not finite:
            return "outputs or parameters are not finite"
        if failed > self.max_failed:
            return f"{failed:.2%} of the samples have no fixed point"
        if radius > self.max_radius:
            return f"the spectral radius of A reached {radius:.3f}, above {self.max_radius:g}"
        return None

    def _shorten(self, x: Tensor) -> bool:
        """Shorten the way since the last good state (GU1); return whether a look passes then."""
        controls, good = Controls(self.model), self._good[-1]
        end, start = controls.vector, good["parameters"]
        if len(end) != len(start) or not bool(end.isfinite().all()):
            return False
        for j in range(1, _SHORTENINGS + 1):
            controls.assign(start + 2.0**-j * (end - start))  # (GU1)
            if self.look(x).reason is None:
                self._restore_optimizer(good)
                self._remember()
                self._fail(f"the way is shortened by {2**j}", "shortened")
                return True
        return False

    def _calmed(self, x: Tensor) -> bool:
        """Bring the radius of A down on a batch (GU2); return whether a look passes then."""
        before = Controls(self.model).vector
        blocks = {id(p): p for layer in layers_of(self.model) for p in layer.block.parameters()}
        parameters = [p for p in blocks.values() if p.requires_grad]
        for seed in range(_ROUNDS):
            with calls_recorded(self.model) as calls:
                look = self.look(x)
            if look.reason is None and not look.radius > _ROOM * self.max_radius:
                break
            if not look.finite or not self._penalty_lowered(calls, parameters, seed):
                break
            self.counts["calmed"] += 1
        if look.reason is not None:
            Controls(self.model).assign(before)
            return False
        self._remember()
        self._slow_down()
        return True

    def _penalty_lowered(self, calls: list[LayerCall], among: Sequence[Tensor], seed: int) -> bool:
        """Take a step of (GU2), if there is one."""
        with torch.enable_grad():
            penalty = penalty_of([self._slowest(call) for call in calls], seed)
        if not isinstance(penalty, Tensor) or not penalty.requires_grad:
            return False
        found = torch.autograd.grad(penalty, among, allow_unused=True)
        square = sum(float(g.square().sum()) for g in found if g is not None)
        if not 0 < square < float("inf"):
            return False
        with torch.no_grad():
            for p, g in zip(among, found, strict=True):
                if g is not None:
                    p.sub_(g, alpha=_DECREASE * float(penalty) / square)  # (GU2)
        return True

    def take_back(self, reason: str) -> None:
        """Go back to the last good state; where no step was taken since, to the one before it.

        Args:
            reason: Why, for the message if training cannot go on.

        Raises:
            ConvergenceError: After too many attempts in a row; the model is back all the same.
        """
        if self._since == 0 and len(self._good) > 1:
            self._good.pop()
        good = self._good[-1]
        self.model.load_state_dict(good["model"])
        self._restore_optimizer(good)
        self._fail(reason, "taken back")

    def _fail(self, reason: str, what: str) -> None:
        self.counts[what] += 1
        self._failures += 1
        self._slow_down()
        if self._failures >= _PERSISTENCE:
            raise ConvergenceError(
                f"training cannot go on without losing the fixed points ({reason}), after "
                f"{self._failures} attempts with ever shorter steps. The model has the last "
                "parameters with fixed points. Lower the learning rate, add a Jacobian penalty, or "
                "take a block that is a contraction."
            )

    def _slow_down(self) -> None:
        self._since = 0
        self._interval = max(1, self._interval // 2)
        self.scale *= 0.5

    def _restore_optimizer(self, good: dict[str, Any]) -> None:
        """Return the optimizer's memory; its options stay."""
        options = [
            {k: v for k, v in g.items() if k in _OPTIONS} for g in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(copy.deepcopy(good["optimizer"]))
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)

    def _remember(self) -> None:
        self._good.append({
            "parameters": Controls(self.model).vector,
            "model": copy.deepcopy(self.model.state_dict()),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
        })

    @contextmanager
    def _rates_scaled(self) -> Generator[None, None, None]:
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * self.scale
        try:
            yield
        finally:
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """Return what makes a resumed run repeat the uninterrupted one."""
        return {
            "scale": self.scale,
            "counts": dict(self.counts),
            "since": self._since,
            "interval": self._interval,
            "failures": self._failures,
            "good": list(self._good),
            "last_look": None if self.last_look is None else asdict(self.last_look),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.scale, self.counts = state["scale"], dict(state["counts"])
        self._since, self._failures = state["since"], state["failures"]
        self._interval = state["interval"]
        self._good = deque(state["good"], maxlen=_KEPT)
        self.last_look = None if state["last_look"] is None else Look(**state["last_look"])


_OPTIONS = ("lr", "momentum", "weight_decay")
