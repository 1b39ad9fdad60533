"""The method of successive approximations (MSA): each layer maximises its own Hamiltonian.

    (MS3)  H_n(theta) = <p_{n+1}, g_n(x_n, theta)> - L_n(theta),   L_n = weight_decay |theta|^2 / 2
    (MS4)  H~_n = H_n - rho/2 |g_n(x_n, theta) - x_{n+1}|^2
                      - rho/2 |(dg_n/dx)(x_n, theta)' p_{n+1} - p_n|^2
    (MS5)  theta_n <- theta_n + lr (argmax H~_n - theta_n),   all with the old x and p

H~_n is the mean over the samples of the batch, each with the costate of its own loss (MS1): neither
its maximum nor what a rho does depends on the size of the batch. mu, the sum of the rises of H_n,
bounds what becomes of the cost J = loss + sum L_n,

    (MS6)  J_new <= J - mu + C e,   e = sum_n |g_n - x_{n+1}|^2 + |(dg_n/dx)' p_{n+1} - p_n|^2

where e (means over samples) says how far the old x and p are from solving (MS1) with the new theta.
As mu >= rho/2 e at the maximum, J falls by (1 - 2 C / rho) mu at least if rho > 2 C.

Source: Q. Li, L. Chen, C. Tai and W. E (2018), Maximum principle based algorithms for deep
learning, Journal of Machine Learning Research 18(165), arXiv:1710.09513: algorithms 1 to 3, lemma 1
(MS6), theorem 2. In its section 4.2 J must be Phi + delta sum L; its rho is that of (MS4).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from deqlqr._checks import at_least, choice, count, require_no_cache
from deqlqr._linalg import all_finite
from deqlqr.adaptation import LEAST, raised
from deqlqr.batch import Batch
from deqlqr.controls import Controls
from deqlqr.loss import LossLike, make_loss
from deqlqr.solution import ConvergenceError
from deqlqr.trajectory import Chain, Point, Trajectory

Maximise = Literal["lbfgs", "gradient"]

_EVALUATIONS = 25  # most of an iteration of L-BFGS
_WALL = 1e3  # stands for a loss of H~ that is not finite: a line search turns back there


@dataclass(frozen=True)
class MSAReport:
    """What one step did.

    Attributes:
        loss: Loss before the step.
        cost: J before the step: the loss, and the running cost of all layers.
        cost_after: J on the same batch after an accepted step with `adaptive`, else NaN.
        accepted: Whether the parameters were changed.
        rho: Penalty of the last attempt.
        rejections: Attempts after which J was higher, taken back.
        rise: mu of (MS6), of the last attempt, like the next three.
        state_error: First sum of e in (MS6).
        costate_error: Second sum.
        kept: Layers that kept their parameters, as no higher H~ was found, by number from 0.
    """

    loss: float
    cost: float
    cost_after: float
    accepted: bool
    rho: float
    rejections: int
    rise: float
    state_error: float
    costate_error: float
    kept: tuple[int, ...]


@dataclass(frozen=True)
class _Found:
    """New parameters of a layer, and what they do to its Hamiltonian; `None` for the old ones."""

    values: list[Tensor] | None
    rise: float = 0.0
    state_error: float = 0.0
    costate_error: float = 0.0


class MSA(torch.optim.Optimizer):
    """Training by maximised Hamiltonians, layer by layer: MSA (rho = 0) and extended MSA.

    A step takes states and costates of the batch, one pass forward and one back; then each layer
    maximises (MS4) over its own parameters, apart from the others. A DEQ layer does so once, at the
    fixed point: its g is the block, its state (z, x), its costate the adjoint lam (MS2). All
    layers' maxima are found with the old trajectory, whatever their order.

    With `"gradient"` in place of the maximisation, one step along grad H_n, MSA is gradient descent
    with back-propagation or implicit differentiation (proposition 2): both penalties have gradient
    0 at the old parameters, so that rho does nothing.

    A layer keeps its parameters if no higher H~_n is found, or one that is not finite. With rho = 0
    a layer that is linear in its parameters, as a readout is, has no maximum: it runs away, and
    keeps its parameters only where numbers overflow.

    Args:
        model: An `nn.Sequential`, or a module with a method `phases()`, with outputs `(batch, k)`;
            or a plain `nn.Sequential` of layers some of which are `DEQ`. Layers without parameters
            belong to the layer before them.
        loss: As for `ImplicitNGD`, a mean over the batch.
        rho: Penalty, 0 or above. For residual layers x + delta f it is that of (MS4), 1 / delta
            times that of the paper's continuous time.
        adaptive: Look at J after the step. If it rose, though all Hamiltonians did, the step is
            taken back and tried again with rho `increase` times larger; after good steps rho falls
            by the fourth root of that. Needs rho > 0 and a maximisation.
        maximise: `"lbfgs"` (torch's, with strong Wolfe conditions), or `"gradient"`.
        lr: Share of the way to the maximiser (MS5); with `"gradient"` the step length.
        weight_decay: Of the running cost, for every layer; coupled, as in `torch.optim.SGD`.
        max_iter: Iterations of L-BFGS for each layer.
        history_size: Pairs that L-BFGS remembers.
        increase: See `adaptive`; above 1.
        max_rejections: Attempts after the first before a step is given up.

    Attributes:
        last_step: The `MSAReport` of the last step, or `None`.

    Raises:
        ValueError: If an option is unknown or out of range.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> msa = MSA(model, rho=1.0, adaptive=True)
        >>> losses = [float(msa.step(x, y)) for _ in range(5)]
        >>> losses[-1] < losses[0] and msa.last_step.rise > 0
        True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: LossLike = "cross_entropy",
        rho: float = 1.0,
        adaptive: bool = False,
        maximise: Maximise = "lbfgs",
        lr: float = 1.0,
        weight_decay: float = 0.0,
        max_iter: int = 10,
        history_size: int = 10,
        increase: float = 4.0,
        max_rejections: int = 6,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be an nn.Module, got {type(model).__name__}.")
        Controls(model)
        self.model, self.loss = model, make_loss(loss)
        self.maximise = choice("maximise", maximise, get_args(Maximise))
        self.adaptive = bool(adaptive)
        if adaptive and (maximise == "gradient" or not at_least("rho", rho, 0.0) > 0):
            raise ValueError(
                "adaptive needs rho above 0 and maximise='lbfgs', as it changes rho; got rho "
                f"{rho} and {maximise!r}."
            )
        self.max_iter = count("max_iter", max_iter)
        self.history_size = count("history_size", history_size)
        self.increase = at_least("increase", increase, 1.0, strict=True)
        self.max_rejections = count("max_rejections", max_rejections, 0)
        self.last_step: MSAReport | None = None
        self._made: tuple[Any, Chain] | None = None
        defaults = {
            "lr": at_least("lr", lr, 0.0, strict=True),
            "rho": at_least("rho", rho, 0.0),
            "weight_decay": at_least("weight_decay", weight_decay, 0.0),
        }
        super().__init__(list(model.parameters()), defaults)
        # Here `state_dict` holds them.
        self.param_groups[0].update(rho_factor=1.0, counts={})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the model's parameters, all in one group.

        Raises:
            ValueError: If there is one already.
        """
        if self.param_groups:
            raise ValueError("MSA has one group, of all the model's parameters; got another.")
        super().add_param_group(param_group)

    @property
    def current_rho(self) -> float:
        """Penalty that the next step starts with: `rho` times a factor if `adaptive`."""
        return self.param_groups[0]["rho"] * self.param_groups[0]["rho_factor"]

    @property
    def counts(self) -> dict[str, int]:
        """How many steps there were, attempts rejected, steps given up, and layers kept."""
        zeros = dict.fromkeys(("steps", "rejected", "given up", "layers kept"), 0)
        return {**zeros, **self.param_groups[0]["counts"]}

    def step(self, x: Any = None, y: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Take one step on the batch (x, y); if it fails, the parameters stay as they were.

        Args:
            x: Inputs `(batch, ...)`.
            y: Targets `(batch, ...)`.

        Returns:
            The loss before the step, a scalar tensor; `last_step` says what was done.

        Raises:
            ValueError: If model or data do not fit (see `Chain`), or within
                `torch.nn.utils.parametrize.cached`.
            ConvergenceError: If a sample has no fixed point, or the loss is not finite.
        """
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            got = type(x).__name__, type(y).__name__
            raise ValueError(f"step takes a batch of tensors (x, y), got {got}.")
        require_no_cache()
        at = self._chain(x).trajectory(x, y, self.loss)
        if not bool(at.loss.isfinite()):
            raise ConvergenceError(f"the loss is {float(at.loss)}.")
        batch = Batch(self.model, Controls(self.model), self.loss, [(x, y)])
        before, cost = batch.controls.vector, float(at.loss) + self._running_cost(at)
        tolerance = 8 * torch.finfo(x.dtype).eps * abs(cost)
        factor, rejections = self.param_groups[0]["rho_factor"], 0
        while True:
            rho, after = self.param_groups[0]["rho"] * factor, float("nan")
            found = [self._maximised(point, rho) for point in at.points]
            try:
                self._assign(at, found)
                if self.adaptive:
                    after = self._cost_now(batch, at)
            except BaseException:
                batch.controls.assign(before)
                raise
            accepted = not self.adaptive or after <= cost + tolerance
            if accepted:
                break
            batch.controls.assign(before)
            rejections += 1
            factor = raised(factor, self.increase)
            if rejections > self.max_rejections:
                break
        if self.adaptive and not rejections:
            factor = max(factor / self.increase**0.25, LEAST)
        self.param_groups[0]["rho_factor"] = factor
        self._report(at, (cost, after), accepted, rho, rejections, found)
        return at.loss

    def _chain(self, x: Tensor) -> Chain:
        """Return the layers, told apart anew only if the model or the samples have changed."""
        modules = [(id(m), m.training) for m in self.model.modules()]
        trained = [(id(p), p.requires_grad) for p in self.model.parameters()]
        key = modules, trained, x.shape[1:], len(x) > 1  # a single sample cannot be mixed
        if self._made is None or self._made[0] != key:
            known = {id(p) for p in self.param_groups[0]["params"]}
            if any(id(p) not in known for p in self.model.parameters()):
                raise ValueError("model has a parameter that it had not when MSA was made.")
            self._made = key, Chain(self.model, x)
        return self._made[1]

    def _running_cost(self, at: Trajectory) -> float:
        decay = self.param_groups[0]["weight_decay"]
        squares = [p.detach().square().sum() for point in at.points for p in point.link.parameters]
        return decay / 2 * float(torch.stack(squares).sum())  # (MS3)

    def _cost_now(self, batch: Batch, at: Trajectory) -> float:
        try:
            return batch.loss_now() + self._running_cost(at)
        except ConvergenceError:
            return float("inf")

    @torch.no_grad()
    def _assign(self, at: Trajectory, found: Sequence[_Found]) -> None:
        for point, new in zip(at.points, found, strict=True):
            for p, value in zip(point.link.parameters, new.values or (), strict=False):
                p.copy_(value)

    def _maximised(self, point: Point, rho: float) -> _Found:
        """Return new parameters of a layer by (MS5)."""
        first = self.param_groups[0]
        by_gradient = self.maximise == "gradient"
        H = _Hamiltonian(point, 0.0 if by_gradient else rho, first["weight_decay"])
        if not H.old:
            return _Found([])
        try:
            ways = H.gradient() if by_gradient else self._to_maximum(H)
            values = [p + first["lr"] * way for p, way in zip(H.old, ways, strict=True)]  # (MS5)
            rise, state_error, costate_error = H.terms(values)
        except torch.linalg.LinAlgError:  # as of a weight made from parameters that overflowed
            return _Found(None)
        e = state_error + costate_error
        higher = by_gradient or rise > rho / 2 * e
        if not (higher and isfinite(rise - e) and all_finite(values)):
            return _Found(None)
        return _Found(values, rise, state_error, costate_error)

    def _to_maximum(self, H: "_Hamiltonian") -> list[Tensor]:
        """Return what leads from the old parameters to those that maximise H~."""
        trial = [p.clone().requires_grad_() for p in H.old]
        lbfgs = torch.optim.LBFGS(
            trial,
            max_iter=self.max_iter,
            max_eval=_EVALUATIONS * self.max_iter,
            history_size=self.history_size,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            rise = H.augmented(trial)
            if bool(rise.isfinite()):
                slopes = torch.autograd.grad(rise, trial, materialize_grads=True)
            else:
                rise, slopes = torch.full_like(rise, -_WALL), tuple(map(torch.zeros_like, trial))
            for p, slope in zip(trial, slopes, strict=True):
                p.grad = -slope.contiguous()  # as L-BFGS wants it
            return -rise.detach()

        lbfgs.step(closure)
        return [new.detach() - p for new, p in zip(trial, H.old, strict=True)]

    def _report(
        self,
        at: Trajectory,
        cost: tuple[float, float],
        accepted: bool,
        rho: float,
        rejections: int,
        found: Sequence[_Found],
    ) -> None:
        kept = tuple(number for number, new in enumerate(found) if new.values is None)
        events = {"steps": 1, "rejected": rejections, "given up": int(not accepted),
                  "layers kept": len(kept)}  # fmt: skip
        first, before = self.param_groups[0], self.counts
        first["counts"] = {name: before[name] + times for name, times in events.items()}
        self.last_step = MSAReport(
            loss=float(at.loss),
            cost=cost[0],
            cost_after=cost[1] if accepted else float("nan"),
            accepted=accepted,
            rho=rho,
            rejections=rejections,
            rise=sum(new.rise for new in found),
            state_error=sum(new.state_error for new in found),
            costate_error=sum(new.costate_error for new in found),
            kept=kept,
        )


class _Hamiltonian:
    """(MS4) of a layer at its point of the trajectory, less what it is at the old parameters.

    Attributes:
        old: The old parameters.
    """

    def __init__(self, point: Point, rho: float, weight_decay: float) -> None:
        self.point, self.rho, self.weight_decay = point, rho, weight_decay
        self.old = [p.detach().clone() for p in point.link.parameters]

    def augmented(self, values: Sequence[Tensor]) -> Tensor:
        """Return the rise of H~, a scalar, differentiable in the parameters."""
        with torch.enable_grad():
            rise, moved, pulled = self._parts(values, self.rho > 0)
            if pulled is None:
                return rise
            errors = _mean_square(moved) + _mean_square(pulled - self.point.q)
            return rise - self.rho / 2 * errors  # (MS4)

    def terms(self, values: Sequence[Tensor]) -> tuple[float, float, float]:
        """Return the rise of H, and the layer's shares of the two sums of e in (MS6)."""
        with torch.enable_grad():
            rise, moved, pulled = self._parts(values, True)
        assert pulled is not None  # noqa: S101
        state_error, costate_error = _mean_square(moved), _mean_square(pulled - self.point.q)
        return float(rise.detach()), float(state_error.detach()), float(costate_error.detach())

    def gradient(self) -> list[Tensor]:
        """Return the gradient of H in the parameters, at the old ones."""
        trial = [p.clone().requires_grad_() for p in self.old]
        return list(torch.autograd.grad(self.augmented(trial), trial, materialize_grads=True))

    def _parts(
        self, values: Sequence[Tensor], with_costate: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the rise of H, g_n - x_{n+1}, and (dg_n/dx)' p_{n+1} if asked for."""
        point, given = self.point, dict(zip(self.point.link.names, values, strict=True))
        s = point.state.clone().requires_grad_(with_costate)
        value = point.link.value(s, given)
        moved, pulled = value - point.value, None
        if with_costate:
            pulled = _pulled(value, s, point.p)
        rise = (point.p * moved).sum(1).mean()
        if self.weight_decay:
            decays = [((v - p) * (v + p)).sum() for v, p in zip(values, self.old, strict=True)]
            rise = rise - self.weight_decay / 2 * torch.stack(decays).sum()
        return rise, moved, pulled  # (MS3)


def _pulled(value: Tensor, s: Tensor, p: Tensor) -> Tensor:
    """Return (dvalue/ds)' p, differentiable; 0 for a value that does not depend on s."""
    if not value.requires_grad:
        return torch.zeros_like(s)
    return torch.autograd.grad(value, s, p, create_graph=True, materialize_grads=True)[0]


def _mean_square(rows: Tensor) -> Tensor:
    """Return the mean over the samples of their squared norms."""
    return rows.square().sum(1).mean()
