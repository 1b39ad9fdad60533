"""A model as a chain of layers on a batch: states forward, costates backward, each layer by itself.

    (MS1)  x_{n+1} = g_n(x_n, theta_n),    p_N = -grad phi(x_N),    p_n = (dg_n/dx)' p_{n+1}

phi is the sample's own loss, so that costates do not carry the 1/batch of the mean loss. A DEQ
layer is one link of the chain, whose state is (z, x_n) at the fixed point z = f(z, x_n, theta_n):

    (MS2)  lam = p_{n+1} + A' lam,    p_n = (df/dx)' lam,    A = df/dz

Source: Q. Li, L. Chen, C. Tai and W. E (2018), Maximum principle based algorithms for deep
learning, Journal of Machine Learning Research 18(165), arXiv:1710.09513, section 4.1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from deqlqr.batch import statistics_held
from deqlqr.call import Call
from deqlqr.controls import Controls
from deqlqr.deq import DEQ, layers_of
from deqlqr.equilibrium import pullback_at
from deqlqr.layers import listed_phases, walked
from deqlqr.linearize_samples import check_input
from deqlqr.loss import Loss
from deqlqr.phases import Phase, has_phases, phases_of, unnested
from deqlqr.solution import ConvergenceError
from deqlqr.state import StateShape
from deqlqr.substitution import Substitution


class Link:
    """One layer g_n as a function of its state and of its own parameters.

    Attributes:
        names: Of the trainable parameters it uses, for `value`.
        parameters: These.
        after: Shape of what it returns.
    """

    def __init__(self, module: nn.Module, before: StateShape, after: StateShape) -> None:
        self._module, self._before, self.after = module, before, after
        self.names: list[str] = []
        self.parameters: list[nn.Parameter] = []
        self._with = Substitution(module, {})

    def value(self, s: Tensor, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return g_n(s), `(batch, n+)`.

        Args:
            s: State, `(batch, n)`.
            given: Values by `names` in place of the model's own.
        """
        state = self._unflattened(s)
        out = self._with(given, state, {}) if given else self._module(*state)
        return self.after.flatten(out)

    def start(self, x: Tensor) -> Tensor:
        """Return the state that belongs to what enters the layer, `(batch, n)`."""
        return x

    def costate(self, s: Tensor, p: Tensor) -> Tensor:
        """Return the costate that g_n is multiplied by, from that of what the layer returns."""
        return p

    def entering(self, pulled: Tensor) -> Tensor:
        """Return, of a costate of the state, that of what enters the layer."""
        return pulled

    def find_own(self, s: Tensor) -> None:
        """Find the trainable parameters that g_n depends on."""
        named = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        with torch.enable_grad():
            total = self.value(s).sum()
        if not total.requires_grad:
            return
        grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        own = [item for item, g in zip(named.items(), grads, strict=True) if g is not None]
        self.names, self.parameters = [name for name, _ in own], [p for _, p in own]
        self._with = Substitution(self._module, dict(own))

    def _unflattened(self, s: Tensor) -> tuple[Any, ...]:
        return (self._before.unflatten(s),)


class EquilibriumLink(Link):
    """A DEQ layer: its block at the fixed point, as a function of (z, x).

    Args:
        layer: The layer.
        before: Shape of its input x.
        after: Shape of z.
    """

    def __init__(self, layer: DEQ, before: StateShape, after: StateShape) -> None:
        super().__init__(layer.block, before, after)
        self.layer = layer

    def start(self, x: Tensor) -> Tensor:
        """Return (z, x) at the fixed point.

        Raises:
            ConvergenceError: If a sample has none.
        """
        with torch.no_grad():
            z = self.layer(self._before.unflatten(x))
        assert self.layer.solution is not None  # noqa: S101
        self.layer.solution.raise_if_failed("fixed point of the block")
        return torch.cat([self.after.flatten(z), x], dim=1)

    def costate(self, s: Tensor, p: Tensor) -> Tensor:
        """Return lam of (MS2), by the layer's own adjoint.

        Raises:
            ConvergenceError: If it fails.
        """
        z, x = self._unflattened(s)
        call = Call(self.layer, (x,), {}, z)
        product = pullback_at(call.evaluate, call.start, call.tensors)
        lam = call.solve_linear(product, p)  # (MS2)
        assert self.layer.backward_solution is not None  # noqa: S101
        self.layer.backward_solution.raise_if_failed("adjoint (MS2) of the block")
        return lam

    def entering(self, pulled: Tensor) -> Tensor:
        """Return the part of x."""
        return pulled[:, self.after.size :]

    def _unflattened(self, s: Tensor) -> tuple[Any, ...]:
        size = self.after.size
        return self.after.unflatten(s[:, :size]), self._before.unflatten(s[:, size:])


@dataclass(frozen=True)
class Point:
    """A layer on the trajectory, every tensor cut off from the parameters.

    Attributes:
        link: The layer.
        state: What its Hamiltonian is taken at: x_n, or (z, x_n); `(batch, n)`.
        value: g_n there, `(batch, n+)`.
        p: What it is multiplied by: p_{n+1}, or lam; `(batch, n+)`.
        q: (dg_n/dstate)' p: p_n, or (lam - p_{n+1}, p_n); `(batch, n)`.
    """

    link: Link
    state: Tensor
    value: Tensor
    p: Tensor
    q: Tensor

    @property
    def costate(self) -> Tensor:
        """p_n of what enters the layer."""
        return self.link.entering(self.q)


@dataclass(frozen=True)
class Trajectory:
    """States and costates of a batch.

    Attributes:
        loss: The mean loss.
        outputs: x_N, `(batch, k)`.
        points: One for each layer.
    """

    loss: Tensor
    outputs: Tensor
    points: Sequence[Point]


class Chain:
    """A model as a chain of layers, checked to be the model.

    It is made for samples of one shape, the modules' modes, and what is trainable at the moment.

    Args:
        model: An `nn.Sequential`, a module with a method `phases()`, or an `nn.Sequential` of
            layers some of which are `DEQ`.
        x: Inputs `(batch, ...)`.

    Attributes:
        links: The layers.

    Raises:
        ValueError: If model or x do not fit, a parameter is used by two layers, the samples of a
            batch depend on each other, or the layers are not the model.
        ConvergenceError: If a sample has no fixed point, or outputs are not finite.

    Example:
        >>> from deqlqr.loss import make_loss
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
        >>> x, y = torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])
        >>> way = Chain(model, x).trajectory(x, y, make_loss("cross_entropy"))
        >>> [tuple(point.p.shape) for point in way.points], tuple(way.points[0].costate.shape)
        ([(5, 4), (5, 3)], (5, 2))
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self._model, self._controls = model, Controls(model)
        check_input(x, self._controls)
        self.links: list[Link] = []
        with statistics_held(model):
            value: Any = x
            for segment in _segments(model):
                value = self._add(segment, value)
            self._require_tensor(value)
            self._require_own(x)
            self._require_model(x)

    def trajectory(self, x: Tensor, y: Tensor, loss: Loss) -> Trajectory:
        """Return states and costates of a batch.

        Args:
            x: Inputs `(batch, ...)`.
            y: Targets `(batch, ...)`.
            loss: A mean over the batch.

        Raises:
            ValueError: If the data do not fit.
            ConvergenceError: If a sample has no fixed point, or an adjoint solve fails.
        """
        check_input(x, self._controls)
        states = self._forward(x)
        outputs = self.links[-1].after.unflatten(states[-1][1]).detach().requires_grad_()
        loss.check(outputs, y)
        with torch.enable_grad():
            cost = loss(outputs, y)
        (gradient,) = torch.autograd.grad(cost, outputs)
        points = self._backward(states, -len(x) * gradient)  # (MS1)
        return Trajectory(cost.detach(), outputs.detach(), points)

    def _forward(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return state and value of each layer, the value in the graph of the state."""
        states, value = [], StateShape.of(x, "x").flatten(x)
        for link in self.links:
            s = link.start(value.detach()).requires_grad_()
            with torch.enable_grad():
                value = link.value(s)  # (MS1)
            states.append((s, value))
        return states

    def _backward(self, states: Sequence[tuple[Tensor, Tensor]], p: Tensor) -> list[Point]:
        points: list[Point] = []
        for link, (s, value) in zip(reversed(self.links), reversed(states), strict=True):
            p = link.costate(s.detach(), p)
            (q,) = _pulled(value, [s], p)
            points.insert(0, Point(link, s.detach(), value.detach(), p, q))
            p = link.entering(q)  # (MS1)
        return points

    def _add(self, segment: nn.Module, value: Any) -> Any:
        """Add the layers of a part of the model; return what they make of a value."""
        if isinstance(segment, DEQ):
            before = StateShape.of(value, "the DEQ layer's input")
            with torch.no_grad():
                out = segment(value)
            self.links.append(EquilibriumLink(segment, before, StateShape.of(out)))
            return out
        name = type(segment).__name__
        with torch.no_grad():
            chain = phases_of(segment, value, (), {})
            phases = listed_phases(chain, name, (), {})
            walk = walked(phases, value, name, f"what the last phase of {name} returns")
        for k, (before, after) in enumerate(pairwise(walk.shapes)):
            self.links.append(Link(Phase(segment, chain, k), before, after))
        return walk.results[-1]

    def _require_tensor(self, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise ValueError(
                f"the layers of {type(self._model).__name__} must end in a tensor, got "
                f"{type(value).__name__}."
            )

    def _require_own(self, x: Tensor) -> None:
        """Find the layers' parameters; refuse one that two of them use."""
        names = dict(zip(map(id, self._controls.parameters), self._controls.names, strict=True))
        users: dict[int, int] = {}
        for number, (link, (s, _)) in enumerate(zip(self.links, self._forward(x), strict=True)):
            link.find_own(s.detach())
            for p in link.parameters:
                if users.setdefault(id(p), number) != number:
                    raise ValueError(
                        f"model uses the parameter {names[id(p)]!r} in its layers "
                        f"{users[id(p)]} and {number}: MSA maximises layer by layer, so that "
                        "each parameter must belong to one layer."
                    )
        if not users:
            raise ValueError("model has no layer with trainable parameters.")

    def _require_model(self, x: Tensor) -> None:
        """Refuse layers that are not the model's, and samples that depend on each other."""
        name, eps = type(self._model).__name__, torch.finfo(x.dtype).eps
        tol = max((la.solver.tolerance(x.dtype) for la in layers_of(self._model)), default=0.0)
        with torch.enable_grad():
            y = self._model(x)
        states = self._forward(x)
        last = self.links[-1].after.unflatten(states[-1][1])
        if not isinstance(y, Tensor) or y.shape != last.shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"the layers of {name} must end in its output, {got}; got {tuple(last.shape)}."
            )
        if not bool(y.isfinite().all()):
            raise ConvergenceError("the model's outputs are not finite.")
        gap = float((y - last).detach().abs().max())
        if not gap <= max(1e3 * eps, 1e3 * tol) * max(1.0, float(y.detach().abs().max())):
            raise ValueError(
                f"the layers of {name}, one after the other, must give its output; they differ by "
                f"{gap:.1e} (with active dropout they cannot: call model.eval())."
            )
        half = (len(x) + 1) // 2
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
        g[half:] = 0.0
        points = self._backward(states, g.flatten(1))
        for point in points:
            if not float(point.q[half:].norm()) <= 1e-5 * float(point.q.norm()):
                raise ValueError(
                    "model mixes the samples of a batch, so that its Hamiltonian is no sum over "
                    "samples: switch batch statistics off with model.eval()."
                )
        of_model = self._controls.pull(y, g)
        of_links = self._gradient(points)
        gap, size = float((of_model - of_links).norm()), float(of_model.norm() + g.norm())
        if not gap <= max(1e4 * eps, 1e3 * tol) * size:
            raise ValueError(
                f"the layers of {name} have another derivative than the model: they differ by "
                f"{gap:.1e}. Does a phase detach?"
            )

    def _gradient(self, points: Sequence[Point]) -> Tensor:
        """Return the gradient (m,) of sum <p, g_n>, layer by layer, in all parameters."""
        found: dict[int, Tensor] = {}
        for point in points:
            own = point.link.parameters
            with torch.enable_grad():
                value = point.link.value(point.state)
            found |= dict(zip(map(id, own), _pulled(value, own, point.p), strict=True))
        parts = [found.get(id(p), torch.zeros_like(p)) for p in self._controls.parameters]
        return torch.cat([part.reshape(-1) for part in parts])


def _segments(model: nn.Module) -> list[nn.Module]:
    """Return the model, or, if it has DEQ layers, these and the layers between them.

    Raises:
        ValueError: If the model has no phases, or a DEQ layer is not one of its layers.
    """
    name = type(model).__name__
    if not layers_of(model):
        if not has_phases(model):
            raise ValueError(
                f"model {name} has no layers to be told apart: MSA needs an nn.Sequential, or a "
                "module with a method phases() that returns functions state -> state, the first "
                "of the input (see deqlqr.phases)."
            )
        return [model]
    if not isinstance(model, nn.Sequential) or type(model).forward is not nn.Sequential.forward:
        raise ValueError(f"model must be a plain nn.Sequential if it has a DEQ layer, got {name}.")
    segments: list[nn.Module] = []
    between: list[nn.Module] = []
    for layer in unnested(model):
        if isinstance(layer, DEQ):
            segments += [nn.Sequential(*between), layer] if between else [layer]
            between = []
        elif layers_of(layer):
            raise ValueError(
                f"a DEQ layer must be one of the layers of the nn.Sequential, got one within "
                f"{type(layer).__name__}."
            )
        else:
            between.append(layer)
    return [*segments, nn.Sequential(*between)] if between else segments


def _pulled(value: Tensor, into: Sequence[Tensor], cotangent: Tensor) -> tuple[Tensor, ...]:
    """Return the cotangents of tensors, 0 for what the value does not depend on."""
    if not value.requires_grad:
        return tuple(torch.zeros_like(t) for t in into)
    return torch.autograd.grad(value, into, cotangent, retain_graph=True, materialize_grads=True)
