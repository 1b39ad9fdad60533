"""Training that keeps its fixed points, with any optimizer.

Every few steps the guard looks at the model on the batch just used: whether all samples have a
fixed point, whether everything is finite, and at the spectral radius rho of A = df/dz of the
samples that converge slowest. Those that were slowest where a look failed go with every later look.
What passes is remembered. Where a look fails, the guard first tries to go on from there: it brings
down the growth (J3) of the slowest samples, at their states z,

    (GU1)  theta <- theta - 2/5 J3 g / |g|^2,   g = dJ3/dtheta,   until rho <= 0.9 of the largest,

and steps become a little shorter. If no look passes then, the way gone since the last good state is
shortened,

    (GU2)  theta <- good + 2^-j (theta - good),   j = 1, 2, ...,   until a look passes,

or taken back, with the optimizer's memory, and the step length is halved. It recovers while looks
pass. After a failure the looks come closer together, up to one after each step. The loss is the
optimizer's business: only that it is finite is asked for.
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
from deqlqr._linalg import all_finite
from deqlqr.batch import statistics_held
from deqlqr.deq import layers_of
from deqlqr.layer_calls import LayerCall, calls_recorded, failures_returned
from deqlqr.monitor import jacobian_growth, jacobian_radius
from deqlqr.solution import ConvergenceError

_SHORTENINGS = 4  # 2^-j of (GU2) before the way is taken back
_KEPT = 3  # states that have passed, to fall back on
_CAUTION = 0.8  # factor on the step length after (GU1)
_RECOVERY = 1.2  # of the step length, at a look that passes
_ROOM = 0.9  # of the largest radius, to which (GU1) brings it down
_DECREASE = 0.4  # of the growth, in a step of (GU1)
_WIDER = 2  # times the samples of a look take part in (GU1): once it is done, others are slowest
_ROUNDS = 20  # steps of (GU1)
_HARDEST = 16  # samples that go with every look
_SHORTEST = 2.0**-10  # factor on the step length
_PERSISTENCE = 12  # looks in a row that fail before training stops
_MEMORY = ("damping_factor", "unchecked")  # of `ImplicitNGD`, kept among a group's options


class Stepper(Protocol):
    """What takes steps: an `ImplicitNGD`, or a `GradientStep`."""

    model: nn.Module

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Take a step and return the loss before it, or raise and leave the parameters alone."""


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
            many steps of (GU1) were taken.

    Raises:
        ValueError: If an option is out of range, or `stepper` is a bare torch optimizer.

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
        samples: int = 16,
        max_failed: float = 1e-3,
    ) -> None:
        if not isinstance(getattr(stepper, "model", None), nn.Module):
            raise ValueError(
                f"stepper must be an ImplicitNGD or a GradientStep, got {type(stepper).__name__}; "
                "put a torch optimizer into GradientStep(model, optimizer, loss)."
            )
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
        self._hard: Tensor | None = None  # the slowest samples of the looks that failed

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
            if look.reason is None:
                self._remember()
            elif not self._calmed(x):
                raise ConvergenceError(f"training cannot start: {look.reason}.")
        while True:
            try:
                with self._rates_scaled():
                    loss = self.stepper.step(x, y)
                break
            except ConvergenceError as error:
                if self._calmed(x):
                    self._fail(str(error))
                else:
                    self.take_back(str(error))
                    self._calmed(x)
        self._since += 1
        if self._since >= self._interval or not all_finite(self.model.parameters()):
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
        elif self._calmed(x):
            self._failures = 0  # a step was taken, and is kept
        elif not self._shorten(x):
            self.take_back(found.reason)
            self._calmed(x)
        return found

    @torch.no_grad()
    def look(self, x: Tensor) -> Look:
        """Return what can be said of the model on a batch; the model stays as it is.

        Args:
            x: Inputs `(batch, ...)`.
        """
        self.counts["looks"] += 1
        if not all_finite(self.model.parameters()):  # a block may not even run with such parameters
            self.last_look = Look(1.0, False, float("nan"), "parameters are not finite")
            return self.last_look
        x = self._with_hard(x)
        with _left_alone(self.model, x.device), failures_returned(self.model):
            with calls_recorded(self.model) as calls:
                outputs = self.model(x)
            finite, failed, radius = bool(outputs.isfinite().all()), 0.0, float("nan")
            for call in calls:
                assert call.solution is not None  # noqa: S101
                converged = call.solution.converged
                failed = max(failed, int((~converged).sum()) / max(len(converged), 1))
            if finite and calls:
                radius = max(_radius(self._slowest(call, self.samples)) for call in calls)
        self.last_look = Look(failed, finite, radius, self._reason(failed, finite, radius))
        if finite and calls and self.last_look.reason is not None:
            self._keep_hard(x, calls[0])
        return self.last_look

    def _with_hard(self, x: Tensor) -> Tensor:
        hard = self._hard
        fits = hard is not None and x.shape[1:] == hard.shape[1:] and x.dtype == hard.dtype
        return torch.cat([x, hard.to(x.device)]) if hard is not None and fits else x

    def _keep_hard(self, x: Tensor, call: LayerCall) -> None:
        """Keep the samples that took most evaluations."""
        assert call.solution is not None  # noqa: S101
        evaluations = call.solution.evaluations
        if len(evaluations) == len(x):
            self._hard = x[evaluations.topk(min(_HARDEST, len(x))).indices].detach().clone()

    @staticmethod
    def _slowest(call: LayerCall, samples: int) -> LayerCall:
        """Return the samples of a call that took most evaluations."""
        assert call.solution is not None  # noqa: S101
        batch = len(call.solution.evaluations)
        slowest = call.solution.evaluations.topk(min(samples, batch)).indices

        def part(value: Any) -> Any:
            sample = isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch
            return value[slowest].detach() if sample else value

        z, inputs = tree_map(part, call.z), tree_map(part, call.inputs)
        return LayerCall(call.layer, inputs, call.shared, z, None)

    def _reason(self, failed: float, finite: bool, radius: float) -> str | None:
        if not finite:
            return "outputs are not finite"
        if failed > self.max_failed:
            return f"{failed:.2%} of the samples have no fixed point"
        if radius > self.max_radius:
            return f"the spectral radius of A reached {radius:.3f}, above {self.max_radius:g}"
        return None

    def _shorten(self, x: Tensor) -> bool:
        """Shorten the way since the last good state (GU2); return whether a look passes then."""
        if not self._good or not all_finite(self.model.parameters()):
            return False
        end, start = _values(self.model), self._good[-1]["model"]
        for j in range(1, _SHORTENINGS + 1):
            share = 2.0**-j
            _assign(self.model, {n: torch.lerp(start[n].to(v), v, share) for n, v in end.items()})
            if self.look(x).reason is None:  # (GU2)
                self._restore_optimizer(self._good[-1])
                self._remember()
                self.counts["shortened"] += 1
                self._fail(f"the way is shortened by {2**j}")
                return True
        return False

    def _calmed(self, x: Tensor) -> bool:
        """Bring the radius of A down on a batch (GU1); return whether that made a look pass."""
        before, steps = _values(self.model), 0
        blocks = {id(p): p for layer in layers_of(self.model) for p in layer.block.parameters()}
        parameters = [p for p in blocks.values() if p.requires_grad]
        while True:
            with calls_recorded(self.model) as calls:
                look = self.look(x)
            room = steps == 0 or not look.radius > _ROOM * self.max_radius
            if (look.reason is None and room) or steps == _ROUNDS or not look.finite:
                break
            if not self._growth_lowered(calls, parameters):
                break
            steps += 1
        self.counts["calmed"] += steps
        if look.reason is not None:
            _assign(self.model, before)
        elif steps:
            self._remember()
            self._slow_down(_CAUTION)
        return look.reason is None and steps > 0

    def _growth_lowered(self, calls: Sequence[LayerCall], among: Sequence[Tensor]) -> bool:
        """Take a step of (GU1), if there is one."""
        with torch.enable_grad():
            parts = [self._slowest(call, _WIDER * self.samples) for call in calls]
            grown = [jacobian_growth(c.layer, c.z, *c.inputs, **c.shared) for c in parts]
        growth = torch.stack(grown).sum() if grown else torch.zeros(())
        if not growth.requires_grad:
            return False
        found = torch.autograd.grad(growth, among, allow_unused=True)
        squares = [g.square().sum() for g in found if g is not None]
        square = float(torch.stack(squares).sum()) if squares else 0.0
        if not 0 < square < float("inf"):
            return False
        with torch.no_grad():
            for p, g in zip(among, found, strict=True):
                if g is not None:
                    p.sub_(g, alpha=_DECREASE * float(growth) / square)  # (GU1)
        return True

    def take_back(self, reason: str) -> None:
        """Go back to the last good state; where no step was taken since, to the one before it.

        Args:
            reason: Why, for the message if training cannot go on.

        Raises:
            ConvergenceError: After too many attempts in a row; the model is back all the same.
        """
        if not self._good:
            raise ConvergenceError(f"there are no parameters to go back to: {reason}.")
        if self._since == 0 and len(self._good) > 1:
            self._good.pop()
        good = self._good[-1]
        self.model.load_state_dict(good["model"])
        self._restore_optimizer(good)
        self.counts["taken back"] += 1
        self._fail(reason)

    def _fail(self, reason: str) -> None:
        self._failures += 1
        self._slow_down(0.5)
        if self._failures >= _PERSISTENCE:
            raise ConvergenceError(
                f"training cannot go on without losing the fixed points ({reason}), after "
                f"{self._failures} attempts with ever shorter steps. The model has the last "
                "parameters with fixed points. Lower the learning rate, add a Jacobian penalty, or "
                "take a block that is a contraction."
            )

    def _slow_down(self, factor: float) -> None:
        """Take shorter steps, and look more often."""
        self._since, self._interval = 0, max(1, self._interval // 2)
        self.scale = max(factor * self.scale, _SHORTEST)

    def _restore_optimizer(self, good: dict[str, Any]) -> None:
        """Return the optimizer's memory; its options stay."""
        saved, now = copy.deepcopy(good["optimizer"]), self.optimizer.state_dict()
        groups = zip(now["param_groups"], saved["param_groups"], strict=False)
        for group, old in groups:
            group.update({name: old[name] for name in _MEMORY if name in old})
        self.optimizer.load_state_dict({**saved, "param_groups": now["param_groups"]})

    def _remember(self) -> None:
        self._good.append({
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
            "hard": self._hard,
            "last_look": None if self.last_look is None else asdict(self.last_look),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.scale, self.counts = state["scale"], dict(state["counts"])
        self._since, self._failures = state["since"], state["failures"]
        self._interval = state["interval"]
        self._good, self._hard = deque(state["good"], maxlen=_KEPT), state["hard"]
        self.last_look = None if state["last_look"] is None else Look(**state["last_look"])


def _values(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the trained parameters."""
    named = model.named_parameters()
    return {name: p.detach().clone() for name, p in named if p.requires_grad}


@torch.no_grad()
def _assign(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        if name in values:
            p.copy_(values[name])


@contextmanager
def _left_alone(model: nn.Module, device: torch.device) -> Generator[None, None, None]:
    """Leave random numbers, buffers, and what the layers remember as they are."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    layers = [(layer, layer.solution, dict(layer._warm)) for layer in layers_of(model)]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), statistics_held(model):
        try:
            yield
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)
            for layer, solution, warm in layers:
                layer.solution, layer._warm = solution, warm
