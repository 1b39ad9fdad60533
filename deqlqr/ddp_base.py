"""Where Q_uu^-1 of batch DDP comes from: SGD, RMSprop or EKFAC, layer by layer.

    (DD1)  SGD      D = lr I
           RMSprop  D = lr diag(1 / (sqrt(v) + eps)),   v = alpha v_old + (1 - alpha) Q_u^2
           EKFAC    D = lr (U diag(s) U' + delta I)^-1,   U diag(s) U' of (K5)

D of a layer is of its own parameters only. A damping delta of SGD and RMSprop, whose own steps have
none, makes D = (D^-1 + delta I)^-1 here.

The step that goes with k_t is taken by the base optimiser itself, with its own memory.

Source: G.-H. Liu, T. Chen, E. A. Theodorou (2020), Differential dynamic programming neural
optimizer, arXiv:2002.08809, section 4.2; T. George et al. (2018), arXiv:1806.03884 (EKFAC).
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from deqlqr._checks import Options, at_least, choice, count
from deqlqr.batch import Batch, Chunk
from deqlqr.controls import Controls
from deqlqr.ddp_inverse import Diagonal, Inverse, kronecker_inverse
from deqlqr.ddp_rows import LayerRows
from deqlqr.divergence import OutputDivergence
from deqlqr.kronecker import Block, KroneckerMetric
from deqlqr.optim import ImplicitNGD
from deqlqr.routes import Fisher, Kronecker, Memory
from deqlqr.sensitivity import Sensitivity
from deqlqr.solver import FixedPointSolution

_NO_LIMIT = 1e300  # of the rise of the loss


class Running:
    """A base optimiser at work.

    Attributes:
        optimizer: The optimiser whose steps it takes.
        l2: Weight decay is a part of the cost, l_u = weight_decay u; else it is decoupled.
        scalar: D is one number.
    """

    optimizer: torch.optim.Optimizer
    l2: bool
    scalar = False

    def look(self, at: Sensitivity, chunk: Chunk, step: int) -> None:
        """See a batch."""

    @abstractmethod
    def inverse(
        self, rows: LayerRows, q: Tensor, part: Controls, where: Tensor, factor: float
    ) -> Inverse:
        """Return D of a layer.

        Args:
            rows: G' of the layer.
            q: Its Q_u, in the form of the rows.
            part: Its parameters.
            where: Their entries in u.
            factor: On the damping; without one, on D^-1.
        """

    @abstractmethod
    def propose(
        self, controls: Controls, before: Tensor, q: Tensor, factor: float, measured: bool
    ) -> tuple[Tensor, float]:
        """Return the base's own change d (m,) for the gradient q, and, if `measured`, d'C d.

        `before` are the current parameters (m,). C is the base's metric; without one that is NaN.
        The base's memory goes on; `restore` brings it back.
        """

    @abstractmethod
    def restore(self) -> None:
        """Bring the base's memory back to what it was before `propose`."""


class _OfTorch(Running):
    """SGD or RMSprop of torch."""

    l2 = True

    def __init__(self, optimizer: torch.optim.Optimizer, damping: float) -> None:
        self.optimizer, self._damping = optimizer, damping
        self._before: list[tuple[Tensor, dict[str, Any]]] = []

    def propose(
        self, controls: Controls, before: Tensor, q: Tensor, factor: float, measured: bool
    ) -> tuple[Tensor, float]:
        """Take the step and take it back."""
        copied = lambda v: v.clone() if isinstance(v, Tensor) else v
        state = self.optimizer.state
        self._before = [
            (p, {k: copied(v) for k, v in state[p].items()} if p in state else {})
            for p in controls.parameters
        ]
        own = [p.grad for p in controls.parameters]
        named = controls.unflatten(q)
        try:
            for name, p in zip(controls.names, controls.parameters, strict=True):
                p.grad = named[name].clone()
            self.optimizer.step()
            change = controls.vector - before
        finally:
            controls.try_out(before)
            for p, grad in zip(controls.parameters, own, strict=True):
                p.grad = grad
        return change / factor, float("nan")

    def restore(self) -> None:
        """Put the buffers back."""
        for p, values in self._before:
            self.optimizer.state[p] = values

    @property
    def _group(self) -> dict[str, Any]:
        return self.optimizer.param_groups[0]


class _RunningSGD(_OfTorch):
    scalar = True

    def inverse(
        self, rows: LayerRows, q: Tensor, part: Controls, where: Tensor, factor: float
    ) -> Inverse:
        d = 1 / (factor / self._group["lr"] + self._damping)
        return Diagonal(rows, q.new_tensor(d))  # (DD1)


class _RunningRMSprop(_OfTorch):
    def inverse(
        self, rows: LayerRows, q: Tensor, part: Controls, where: Tensor, factor: float
    ) -> Inverse:
        group = self._group
        past = [
            self.optimizer.state.get(p, {}).get("square_avg", torch.zeros_like(p)).reshape(-1)
            for p in part.parameters
        ]
        v = group["alpha"] * rows.matrix(torch.cat(past)) + (1 - group["alpha"]) * q.square()
        d = group["lr"] / (v.sqrt() + group["eps"])
        return Diagonal(rows, 1 / (factor / d + self._damping))  # (DD1)


@dataclass(frozen=True)
class _Seen(Batch):
    """A batch that is linearised already; its gradient is not asked for."""

    chunk: Chunk

    def visit(
        self, take: Any, *, gradient_first: bool = True
    ) -> tuple[Tensor, Tensor, list[FixedPointSolution]]:
        """Hand the one chunk to `take`."""
        take(self.chunk)
        none = self.controls.parameters[0].detach().new_zeros(self.controls.m)
        return none[0], none, []


class _RunningEKFAC(Running):
    l2 = False

    def __init__(self, optimizer: ImplicitNGD, route: Kronecker) -> None:
        self.optimizer: ImplicitNGD = optimizer
        self._route = route
        self._metric: KroneckerMetric | None = None
        self._blocks: dict[str, Block] = {}
        self._velocity: Tensor | None = None

    def look(self, at: Sensitivity, chunk: Chunk, step: int) -> None:
        """Add what the batch says of the metric."""
        ngd = self.optimizer
        layers = ngd.state[at.controls.parameters[0]].setdefault("layers", {})
        batch = _Seen(ngd.model, at.controls, ngd.loss, [(chunk.x, chunk.y)], chunk)
        found = self._route.local(
            batch, ngd.divergence, ngd.linalg_dtype, Memory(step, None, layers)
        )
        assert isinstance(found, KroneckerMetric)  # noqa: S101
        self._metric = found
        self._blocks = {member.name: block for block in found._blocks for member in block.members}

    def inverse(
        self, rows: LayerRows, q: Tensor, part: Controls, where: Tensor, factor: float
    ) -> Inverse:
        group, metric = self.optimizer.param_groups[0], self._metric
        assert metric is not None  # noqa: S101  see `look`
        return kronecker_inverse(
            rows, part, where, metric, self._blocks, group["damping"] * factor, group["lr"]
        )

    def propose(
        self, controls: Controls, before: Tensor, q: Tensor, factor: float, measured: bool
    ) -> tuple[Tensor, float]:
        """Return d of (O2) for the gradient q."""
        ngd, metric, group = self.optimizer, self._metric, self.optimizer.param_groups[0]
        assert metric is not None  # noqa: S101
        metric.gradient = q
        try:
            u = metric.solve([group["damping"] * factor] * len(controls.sizes)).u
        except torch.linalg.LinAlgError:
            u = None
        if u is None:
            return torch.full_like(q, float("nan")), float("nan")
        self._velocity = ngd._recall("velocity")
        if group["momentum"]:
            u = u if self._velocity is None else group["momentum"] * self._velocity + u
            ngd._remember("velocity", u)
        d = group["lr"] * (u - group["weight_decay"] * before)  # (O2)
        return d, metric.metric(d) if measured else float("nan")

    def restore(self) -> None:
        """Put the velocity back."""
        self.optimizer._remember("velocity", self._velocity)


@dataclass(frozen=True)
class SGD(Options):
    """Q_uu^-1 = lr I: `torch.optim.SGD`.

    Attributes:
        momentum: Of the base's step; D stays lr I.

    Raises:
        ValueError: If an option is out of range.
    """

    momentum: float = 0.0

    def __post_init__(self) -> None:
        at_least("momentum", self.momentum, 0.0)


@dataclass(frozen=True)
class RMSprop(Options):
    """Q_uu^-1 = lr diag(1 / (sqrt(v) + eps)): `torch.optim.RMSprop`.

    Attributes:
        alpha: Weight of the past in v, below 1.
        eps: See (DD1).
        momentum: Of the base's step.

    Raises:
        ValueError: If an option is out of range.
    """

    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= at_least("alpha", self.alpha, 0.0) < 1:
            raise ValueError(f"alpha must lie in [0, 1), got {self.alpha}.")
        at_least("eps", self.eps, 0.0, strict=True)
        at_least("momentum", self.momentum, 0.0)


@dataclass(frozen=True)
class EKFAC(Options):
    """Q_uu^-1 from `ImplicitNGD` on the route `Kronecker(corrected=True)`, whose step it takes.

    Attributes:
        update_every: As for `Kronecker`, like the rest.
        refresh_every: See there.
        decay: See there.
        fisher: See there.
        seed: See there.
        momentum: Of the base's step.

    Raises:
        ValueError: If an option is out of range.
    """

    update_every: int = 10
    refresh_every: int = 50
    decay: float = 0.98
    fisher: Fisher = "sampled"
    seed: int = 0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        choice("fisher", self.fisher, get_args(Fisher))
        self.route()
        if at_least("momentum", self.momentum, 0.0) >= 1:
            raise ValueError(f"momentum must be below 1, got {self.momentum}.")

    def route(self) -> Kronecker:
        """Return the route of `ImplicitNGD`."""
        return Kronecker(
            self.update_every, self.refresh_every, self.decay, True, self.fisher, self.seed
        )


@dataclass(frozen=True)
class Full(Options):
    """Q_uu itself, damped, of the whole batch: exact, for small networks.

    Attributes:
        second_order: Add V_X times the second derivatives of the layers to Q_XX, Q_uX and Q_uu
            (DD8), which may make Q_uu indefinite; else Gauss-Newton.
        max_states: Largest batch x states between two layers.

    Raises:
        ValueError: If an option is out of range.
    """

    second_order: bool = False
    max_states: int = 4096

    def __post_init__(self) -> None:
        count("max_states", self.max_states)


Base = Full | SGD | RMSprop | EKFAC
BaseLike = str | Base
_BY_NAME: dict[str, type] = {"full": Full, "sgd": SGD, "rmsprop": RMSprop, "ekfac": EKFAC}
BASES = tuple(_BY_NAME)


def make_base(base: BaseLike) -> Base:
    """Return the base that a name or an object stands for.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(base, str):
        return _BY_NAME[choice("base", base, BASES)]()
    if not isinstance(base, Base):
        raise ValueError(f"base must be a name or an object such as SGD(), got {base!r}.")
    return base


def start(
    base: SGD | RMSprop | EKFAC,
    model: nn.Module,
    parameters: Sequence[Tensor],
    *,
    loss: Any,
    divergence: OutputDivergence,
    lr: float,
    damping: float,
    weight_decay: float,
    max_increase: float | None,
    damping_increase: float,
    max_rejections: int,
) -> Running:
    """Return a base at work on a model's parameters."""
    if isinstance(base, SGD):
        sgd = torch.optim.SGD(parameters, lr, base.momentum, weight_decay=weight_decay)
        return _RunningSGD(sgd, damping)
    if isinstance(base, RMSprop):
        rmsprop = torch.optim.RMSprop(
            parameters, lr, base.alpha, base.eps, weight_decay, base.momentum
        )
        return _RunningRMSprop(rmsprop, damping)
    ngd = ImplicitNGD(
        model, loss=loss, lr=lr, damping=damping, route=base.route(), divergence=divergence,
        momentum=base.momentum, weight_decay=weight_decay,
        max_increase=_NO_LIMIT if max_increase is None else max_increase,
        damping_increase=damping_increase, max_rejections=max_rejections,
    )  # fmt: skip
    return _RunningEKFAC(ngd, base.route())
