"""Hamiltonian descent in training: a torch optimizer, and momentum around any step.

Both follow (HD3) with the decay and weight of a scheme of `hamiltonian`, one gradient a step.
"""

from collections.abc import Callable, Sequence
from math import exp
from typing import Any

import torch
from torch import Tensor, nn

from deqlqr._checks import at_least, choice
from deqlqr._linalg import all_finite
from deqlqr.guard import Guard, Stepper
from deqlqr.hamiltonian import (
    SCHEMES,
    Classical,
    Kinetic,
    Relativistic,
    kick,
    require_kinetic,
    total_norm,
)
from deqlqr.optim import ImplicitNGD
from deqlqr.solution import ConvergenceError


def _drift(momenta: Sequence[Tensor], kinetic: Kinetic, lengths: Sequence[float]) -> list[Tensor]:
    """Return h grad K(p) for each part of p, with its h."""
    inertia = kinetic.inertia(total_norm(momenta))
    return [p * (h / inertia).to(p) for p, h in zip(momenta, lengths, strict=True)]


class HamiltonianDescent(torch.optim.Optimizer):
    """Descent by a particle with friction: heavy ball, Nesterov or leapfrog, of any mass and speed.

        (HD1)  p' = -grad J(u) - gamma p,   u' = grad K(p)

    With `Classical(m)`, `"heavy-ball"` is `torch.optim.SGD` with lr h^2 / m and momentum
    mu = e^(-gamma h), and `"nesterov"` the same with `nesterov=True`. `"leapfrog"` is of second
    order at the same cost. `Relativistic` bounds the length of a step by h c, all parameters
    together: with it a step length that is too long oscillates, where it would diverge without.

    The gradient is wanted where the parameters are, so the usual loop, `loss.backward()` and
    `step()`, serves all schemes. With `"heavy-ball"` and `"leapfrog"` the parameters between steps
    are the positions u_n. With `"nesterov"` they are the points ahead, y of (HD5), as in torch's
    SGD; `restart` takes them back to u_n, at the end of training say. A parameter without gradient
    stays where it is, keeps its momentum, and does not count in |p|.

    Args:
        params: Parameters, or groups of them with their own `lr` or `friction`.
        lr: h, the step length.
        friction: gamma. mu = e^(-gamma h) is the usual momentum: for 0.9, gamma = 0.105 / h.
        kinetic: `Classical` or `Relativistic`, of all parameters together.
        scheme: `"heavy-ball"`, `"nesterov"` or `"leapfrog"`.

    Raises:
        ValueError: If an option is unknown or out of range, or a group has a scheme, mass or speed
            of its own.

    Example:
        >>> u = nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = HamiltonianDescent([u], lr=0.3, friction=1.0, kinetic=Relativistic())
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     u.square().sum().backward()
        ...     _ = optimizer.step()
        >>> float(u.detach().norm()) < 1e-3
        True
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        *,
        friction: float = 1.0,
        kinetic: Kinetic = Classical(),
        scheme: str = "heavy-ball",
    ) -> None:
        require_kinetic(kinetic)
        # Plain values in the groups: what is there is saved, pickled and copied by torch.
        defaults = {
            "lr": at_least("lr", lr, 0.0),
            "friction": at_least("friction", friction, 0.0),
            "scheme": choice("scheme", scheme, SCHEMES),
            "mass": kinetic.mass,
            "speed": kinetic.speed if isinstance(kinetic, Relativistic) else None,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as for every torch optimizer.

        Args:
            param_group: Its `params`, and `lr` or `friction` if they are its own.

        Raises:
            ValueError: If one is out of range, or the group has another scheme, mass or speed.
        """
        for name in ("lr", "friction"):
            at_least(name, param_group.get(name, self.defaults[name]), 0.0)
        for name in ("scheme", "mass", "speed"):
            value, common = param_group.get(name, self.defaults[name]), self.defaults[name]
            if value != common:
                raise ValueError(f"{name} must be {common!r} in all groups, got {value!r}.")
        super().add_param_group(param_group)

    @property
    def kinetic(self) -> Kinetic:
        """The kinetic energy."""
        mass, speed = self.param_groups[0]["mass"], self.param_groups[0]["speed"]
        return Classical(mass) if speed is None else Relativistic(mass, speed)

    @torch.no_grad()
    def kinetic_energy(self) -> float:
        """Return K(p) after the last step, 0 before the first.

        Between steps of `"leapfrog"` p is the momentum halfway.
        """
        momenta = [state["momentum"] for state in self.state.values()]
        return float(self.kinetic.energy(total_norm(momenta))) if momenta else 0.0

    @torch.no_grad()
    def restart(self) -> None:
        """Set the momentum to 0; parameters that are ahead go back to their positions u_n."""
        for p, state in self.state.items():
            if "ahead" in state:
                p.sub_(state["ahead"])
        self.state.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step along the gradients in the parameters.

        Args:
            closure: Evaluates the model anew, fills the gradients and returns the loss; called
                once, at the parameters as they are.

        Returns:
            What `closure` returned, or `None`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not moving:
            return loss
        for group, p in moving:
            state, h = self.state[p], group["lr"]
            if not state:
                state.update(momentum=torch.zeros_like(p), before=0.0)
            decay, weight = kick(group["scheme"], h, group["friction"], state["before"])
            state["momentum"].mul_(decay).add_(p.grad, alpha=-weight)  # (HD3)
            state["before"] = h
        momenta, lengths = self._momenta(moving)
        for (_, p), way in zip(moving, _drift(momenta, self.kinetic, lengths), strict=True):
            if "ahead" in self.state[p]:
                p.sub_(self.state[p]["ahead"])
            p.add_(way)  # (HD3)
        if self.param_groups[0]["scheme"] == "nesterov":
            decayed = [
                momentum * exp(-group["friction"] * group["lr"])
                for momentum, (group, _) in zip(momenta, moving, strict=True)
            ]
            for (_, p), ahead in zip(moving, _drift(decayed, self.kinetic, lengths), strict=True):
                self.state[p]["ahead"] = ahead
                p.add_(ahead)  # (HD5)
        return loss

    def _momenta(self, moving: Sequence[tuple[Any, Tensor]]) -> tuple[list[Tensor], list[float]]:
        return [self.state[p]["momentum"] for _, p in moving], [g["lr"] for g, _ in moving]


class OuterMomentum:
    """Momentum around any step of the library: its change d takes the place of -h^2 grad J.

        (HD7)  p <- a p + (w/h) d/h,   u_{n+1} = u_n + h grad K(p),   a, w of (HD3)

    d is what the inner step changes from u_n, with `"nesterov"` from u_n + h grad K(mu p).

    With h = m = 1, `"heavy-ball"` and plain gradient steps inside this is gradient descent with
    momentum mu = e^(-gamma); with enough friction it is the inner step. Around `ImplicitNGD` it is
    natural gradient with momentum; with `Relativistic(speed=c)` no step is longer than h c, all
    parameters together.

    The inner step is checked where it ends, the parameters after (HD7) only when the next step
    begins. Put it into a `Guard` (not the other way round), which takes back steps that lose the
    fixed points, and restarts the momentum then. An inner step that is rejected has d = 0: p decays
    and carries the parameters on. Where `ImplicitNGD` finds that it must go back to before its last
    step, its step from there is left as it is and the momentum restarts.

    Args:
        stepper: `ImplicitNGD` with momentum 0, or a `GradientStep` of any optimizer but L-BFGS.
        friction: gamma, per step if h = 1: for the usual momentum 0.9, 0.105.
        kinetic: `Classical` or `Relativistic`, of all parameters together.
        scheme: `"heavy-ball"`, `"nesterov"` or `"leapfrog"`; the first step of the last is half a
            step.
        lr: h.

    Attributes:
        inner: The stepper.
        model: Its model.
        momentum: p, by the names of the trained parameters; empty before the first step.

    Raises:
        ValueError: If an option is unknown or out of range, or the stepper is none, has a momentum
            of its own, or searches along lines.

    Example:
        >>> from deqlqr import DEQ, DenseBlock
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(DEQ(DenseBlock(4)), nn.Linear(4, 3))
        >>> x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> natural = ImplicitNGD(model, lr=0.5, damping=0.1, route="output")
        >>> outer = OuterMomentum(natural, friction=1.0, kinetic=Relativistic(speed=0.5))
        >>> guard = Guard(outer)
        >>> losses = [float(guard.step(x, y)) for _ in range(5)]
        >>> losses[-1] < losses[0]
        True
    """

    def __init__(
        self,
        stepper: Stepper,
        *,
        friction: float = 0.5,
        kinetic: Kinetic = Classical(),
        scheme: str = "heavy-ball",
        lr: float = 1.0,
    ) -> None:
        self._optimizer = _optimizer_of(stepper)
        require_kinetic(kinetic)
        self.inner, self.model = stepper, stepper.model
        self.friction = at_least("friction", friction, 0.0)
        self.kinetic, self.scheme = kinetic, choice("scheme", scheme, SCHEMES)
        self.lr = at_least("lr", lr, 0.0, strict=True)
        self.momentum: dict[str, Tensor] = {}
        self._before = 0.0  # h_b of `kick`

    @property
    def optimizer(self) -> "_WithoutMomentum":
        """The inner optimizer as a `Guard` takes it: going back restarts the momentum."""
        return _WithoutMomentum(self)

    def kinetic_energy(self) -> float:
        """Return K(p) after the last step, 0 before the first."""
        momenta = list(self.momentum.values())
        return float(self.kinetic.energy(total_norm(momenta))) if momenta else 0.0

    def restart(self) -> None:
        """Set the momentum to 0."""
        self.momentum, self._before = {}, 0.0

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Take one step; if it fails, parameters and momentum p stay as they were.

        Args:
            x: Inputs `(batch, ...)`.
            y: Targets `(batch, ...)`.

        Returns:
            The loss before the inner step: with `"nesterov"`, at the point ahead.

        Raises:
            ValueError: If the data do not fit the model or the loss.
            ConvergenceError: If the inner step raises it, or the step is not finite.
        """
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        start = {n: p.detach().clone() for n, p in named.items()}
        held = [self._momentum_of(n, p) for n, p in named.items()]
        lengths = [self.lr] * len(held)
        try:
            ahead = [torch.zeros_like(p) for p in held]
            if self.scheme == "nesterov":
                decayed = [p * exp(-self.friction * self.lr) for p in held]
                ahead = _drift(decayed, self.kinetic, lengths)
                for p, way in zip(named.values(), ahead, strict=True):
                    p.add_(way)
            at = [p.detach().clone() for p in named.values()]
            with torch.enable_grad():
                loss = self.inner.step(x, y)
            if self._gone_back():
                self.restart()
                return loss
            changes = [p - a for p, a in zip(named.values(), at, strict=True)]
            decay, weight = kick(self.scheme, self.lr, self.friction, self._before)
            factor = weight / self.lr / self.lr
            momenta = [decay * p + factor * d for p, d in zip(held, changes, strict=True)]
            ways = _drift(momenta, self.kinetic, lengths)
            for p, way, d, a in zip(named.values(), ways, changes, ahead, strict=True):
                p.add_(way - d - a)  # (HD7); exactly the inner step if it is d
            if not all_finite(named.values()):
                raise ConvergenceError("the step with its momentum is not finite.")
        except BaseException:
            for n, p in named.items():
                p.copy_(start[n])
            raise
        self.momentum, self._before = dict(zip(named, momenta, strict=True)), self.lr
        return loss

    def _momentum_of(self, name: str, p: nn.Parameter) -> Tensor:
        """Return a parameter's momentum: 0 where it was frozen, or not there, in the last step."""
        known = self.momentum.get(name)
        return torch.zeros_like(p) if known is None else known.to(p)

    def _gone_back(self) -> bool:
        """Return whether the inner step first went back to before the one before."""
        report = self.inner.last_step if isinstance(self.inner, ImplicitNGD) else None
        return report is not None and report.rolled_back

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state and the momentum, without the options."""
        return {
            "inner": self._optimizer.state_dict(),
            "momentum": dict(self.momentum),
            "before": self._before,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Args:
            state: For the same model.

        Raises:
            ValueError: If the momentum does not fit the model's parameters.
        """
        shapes = {n: p.shape for n, p in self.model.named_parameters()}
        for name, p in state["momentum"].items():
            if shapes.get(name) != p.shape:
                raise ValueError(
                    f"state must have momentum of the model's parameters, got {name!r} of shape "
                    f"{tuple(p.shape)}."
                )
        self._optimizer.load_state_dict(state["inner"])
        self.momentum = {name: p.clone() for name, p in state["momentum"].items()}
        self._before = float(state["before"])


class _WithoutMomentum:
    """What a `Guard` scales, remembers and goes back with."""

    def __init__(self, outer: OuterMomentum) -> None:
        self._outer = outer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._outer._optimizer.param_groups

    def state_dict(self) -> dict[str, Any]:
        return self._outer._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._outer._optimizer.load_state_dict(state)
        self._outer.restart()


def _optimizer_of(stepper: object) -> torch.optim.Optimizer:
    """Return the torch optimizer in a stepper.

    Raises:
        ValueError: If there is none, or it does not go with a momentum around it.
    """
    optimizer = (
        stepper
        if isinstance(stepper, torch.optim.Optimizer)
        else getattr(stepper, "optimizer", None)
    )
    model = getattr(stepper, "model", None)
    if not isinstance(optimizer, torch.optim.Optimizer) or not isinstance(model, nn.Module):
        raise ValueError(
            f"stepper must be an ImplicitNGD or a GradientStep, got {type(stepper).__name__}; put "
            "a torch optimizer into GradientStep(model, optimizer, loss)."
        )
    if isinstance(stepper, Guard):
        raise ValueError("stepper must not be a Guard: put the OuterMomentum into the Guard.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("stepper must not be L-BFGS, whose curvature needs its own steps.")
    momenta = [group["momentum"] for group in optimizer.param_groups if "momentum" in group]
    if isinstance(stepper, ImplicitNGD) and any(momenta):
        raise ValueError(
            f"stepper must have momentum 0, as OuterMomentum has its own, got an ImplicitNGD with "
            f"momentum {max(momenta):g}."
        )
    return optimizer
