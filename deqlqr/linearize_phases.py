"""A model at its fixed point, linearised layer by layer: one LQR phase for each.

    (N4)  phase 0      reads the output:  x_1 = x_0 = dz,  with all costs:  Q, M, R of (H3), a, b
          phase k > 0  is the block's layer f_k:  A_k = df_k/ds_k,  B_k = df_k/du_k

s_k is what enters layer k, s_1 = z. A parameter is a control of the first phase that uses it: the
readout's of phase 0, the block's own of their layer, an encoder's of the layer into which it feeds.
What it does at a later layer j, as a weight used twice does, is carried there in the state,

    (N5)  e_j <- e_j + df_j/du u,     s_{j+1} = A_j s_j + B_j u_j + e_j

so that the cycle has the block's own derivatives whatever its structure, and (F5) holds exactly.
For the Newton divergence the layers' Hamiltonians f_k'p_{k+1} give Q_k, R_k, M_k, with the costates
p_k = A_k'p_{k+1}; there a parameter may enter only one phase.

Source: thesis section 4.3, with the corrections of docs/maths.md.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp

from deqlqr._linalg import identity_like
from deqlqr.controls import Controls
from deqlqr.cyclic_lqr import CyclicLQR
from deqlqr.deq import DEQ, Tap, find_deq
from deqlqr.divergence import Divergence, Euclidean, Newton, OutputDivergence
from deqlqr.input_cost import InputCost
from deqlqr.input_map import InputMap, ProductMap, StoredMap
from deqlqr.linearize_samples import (
    Minibatch,
    check_input,
    hessian_terms,
    pulled_back,
    require_independent,
    require_mean,
    sample_by_sample,
    stacked,
)
from deqlqr.loss import Loss
from deqlqr.phases import Phased, phases_of
from deqlqr.solver import FixedPointSolution
from deqlqr.state import StateShape
from deqlqr.sweeps import Phase

LocalPhase = Callable[[Tensor, Tensor, Tensor], Tensor]  # (u, s, x) -> s+ of one sample


@dataclass(frozen=True)
class PhaseLinearization:
    """A model linearised phase by phase and sample by sample; costs are those of single samples.

    Attributes:
        A: `(batch, n_{k+1}, n_k)` of every phase, like the next ones.
        B: `(batch, n_{k+1}, m_k)`, or `None` where B is known by products only.
        Q: `(batch, n_k, n_k)`.
        R: `(batch, m_k, m_k)`.
        M: `(batch, m_k, n_k)`.
        a: `(batch, n_k)`.
        b: `(batch, m_k)`.
        controls: Which entries of u are the controls of each phase, `(m_k,)`.
        loss: The mean loss J.
        solution: Fixed point and certificate of every sample.
    """

    A: list[Tensor]
    B: list[Tensor] | None
    Q: list[Tensor]
    R: list[InputCost]
    M: list[Tensor]
    a: list[Tensor]
    b: list[Tensor]
    controls: list[Tensor]
    loss: Tensor
    solution: FixedPointSolution
    plan: "Plan" = field(repr=False)

    def exact(self) -> CyclicLQR:
        """Return the augmented-state problem of the whole batch (N2)."""
        assert self.B is not None  # noqa: S101
        matrices = zip(self.A, self.B, self.Q, self.R, self.M, self.a, self.b, strict=True)
        phases = [stacked(*phase) for phase in matrices]
        joined = {name: [phase[name] for phase in phases] for name in phases[0]}
        return CyclicLQR(**joined, controls=self.controls)

    def per_sample(self) -> CyclicLQR:
        """Return a batch of problems, one for each sample (N3)."""
        assert self.B is not None  # noqa: S101
        return CyclicLQR(
            self.A, self.B, self.Q, self.R, self.M, self.a, self.b, controls=self.controls
        )

    def phases(self, minibatch: Minibatch, dtype: torch.dtype) -> list[Phase]:
        """Return the phases for sweeps, with B by its products."""
        found = []
        rest = zip(self.A, self.Q, self.R, self.M, self.a, self.b, strict=True)
        for k, (A, Q, R, M, a, b) in enumerate(rest):
            B = A.new_zeros(*A.shape[:2], 0) if self.B is None else self.B[k]
            own = {"A": A, "B": B, "Q": Q, "R": R, "M": M, "a": a, "b": b}
            if minibatch == "exact":
                own = stacked(**own)
            own = {name: X.to(dtype) for name, X in own.items()}
            if self.B is None:
                own["B"] = self.plan.products(k, minibatch, own["A"])
            else:
                own["B"] = StoredMap(own["B"])
            found.append(Phase(**own))
        return found


def linearize_phases(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Loss,
    divergence: Divergence,
    *,
    max_states: int | None = None,
    stored: bool = True,
) -> PhaseLinearization:
    """Linearise a model at its fixed point, phase by phase and sample by sample (N4).

    Args:
        model: The model.
        x: Inputs.
        y: Targets.
        loss: The loss.
        divergence: What gives Q, R and M.
        max_states: Most states of a sample in a phase.
        stored: Form the matrices B; if not, they are known by products only, for `phases`.

    Returns:
        A `PhaseLinearization`, from which both kinds of minibatch problem are formed.

    Raises:
        ValueError: If data and model do not fit together, the samples are not independent, the
            block has no phases or wrong ones, or a phase has more states than `max_states`.
        ConvergenceError: If a sample has no fixed point.
    """
    at = _Model(model, x)
    loss.check(at.outputs, y)
    if max_states is not None and max(at.sizes) > max_states:
        raise ValueError(
            f"x: {len(x)} samples of up to {max(at.sizes)} states between two layers are too many "
            f"for the dense cyclic LQR, which takes {max_states} a sample here "
            "(Cyclic(max_states=...)). Take a smaller batch, or route 'output', 'sampled', "
            "'krylov' or 'kronecker'."
        )
    layers = [at.layer(k, stored) for k in range(1, len(at.used))]
    plan = Plan(at, layers)
    read = at.readout(plan.own[0])
    require_independent(model, x, at.solution, layers[-1].value, read.value)
    outputs = read.value.detach().requires_grad_()
    cost = loss(outputs, y)
    (dJ,) = torch.autograd.grad(cost, outputs)
    dJ = dJ * len(x)  # the sample's own gradient, without the 1/batch of the mean
    A = plan.state_matrices()
    a, b = ([read.A.new_zeros(len(x), size) for size in sizes] for sizes in plan.sizes(A))
    a[0] = torch.einsum("bk,bkn->bn", dJ, read.A)
    b[0] = torch.einsum("bk,bkm->bm", dJ, read.B)
    if isinstance(divergence, Newton):
        plan.require_single_use()
        Q, M, R = at.newton_terms(layers, plan.own, y, loss, a[0])
    else:
        Q, M, R = _costs(divergence, read, *plan.sizes(A))
    B = plan.input_matrices(A) if stored else None
    return PhaseLinearization(A, B, Q, R, M, a, b, plan.controls, cost.detach(), at.solution, plan)


@dataclass(frozen=True)
class _Layer:
    """A layer, or the readout, of every sample.

    Attributes:
        value: What it returns, `(batch, n+)`.
        A: Its derivative in the state, `(batch, n+, n)`.
        B: In the parameters it uses, `(batch, n+, m)`.
        columns: Which columns of B belong to a parameter, by its number.
    """

    value: Tensor
    A: Tensor
    B: Tensor
    columns: dict[int, slice]

    def by(self, parameters: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Return the derivative in some parameters, 0 for those that the layer does not use."""
        batch, n = self.A.shape[:2]
        parts = [self.A.new_zeros(batch, n, 0)]
        for i in parameters:
            if i in self.columns:
                parts.append(self.B[..., self.columns[i]])
            else:
                parts.append(self.A.new_zeros(batch, n, sizes[i]))
        return torch.cat(parts, dim=-1)


class _Chain(Tap):
    """Runs a block phase by phase; what goes into a phase is cut off from what came before."""

    def evaluate(self, block: nn.Module, inputs: tuple[Any, ...], shared: dict[str, Any]) -> Any:
        """Keep what goes into each phase and what comes out."""
        self.chain = phases_of(block, self.z, inputs, shared)
        self.shapes: list[StateShape] = []
        self.states: list[Tensor] = []
        self.results: list[Any] = []
        value = self.z
        for phase in self.chain.phases(*inputs, **shared):
            shape = StateShape.of(value, f"state of phase {len(self.states)} of the block")
            flat = shape.flatten(value).detach()
            value = phase(shape.unflatten(flat))
            self.shapes.append(shape)
            self.states.append(flat)
            self.results.append(value)
        if not self.results:
            raise ValueError(f"{type(block).__name__}.phases returned no phase.")
        self.shapes.append(StateShape.of(value, "f(z, x) by the block's phases"))
        return block(self.z, *inputs, **shared)


class _One(Tap):
    """Evaluates one phase of a block, at a state of its own."""

    def __init__(self, z: Any, chain: Phased, k: int, state: Any) -> None:
        super().__init__(z)
        self._chain, self._k, self._state = chain, k, state

    def evaluate(self, block: nn.Module, inputs: tuple[Any, ...], shared: dict[str, Any]) -> Any:
        """Return what comes out of the phase."""
        return self._chain.phases(*inputs, **shared)[self._k](self._state)


class _Model:
    """A model at its fixed point, and its layers.

    Attributes:
        outputs: `(batch, k)`.
        solution: Fixed point of every sample.
        used: Numbers of the parameters that the readout (first) and each layer use.
        sizes: States of every layer.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model, x
        self.block_layer: DEQ = find_deq(model)
        self.controls = Controls(model)
        check_input(x, self.controls)
        with torch.no_grad():
            self.outputs = model(x)
        if self.block_layer.solution is None:
            raise ValueError("model did not call its DEQ layer.")
        self.solution = self.block_layer.solution.raise_if_failed("fixed point of the block")
        tap = _Chain(self.solution.value)
        with torch.enable_grad(), self.block_layer.tapped(tap):
            y = model(x)
        self._chain, self._shapes, self._states = tap.chain, tap.shapes, tap.states
        self._require_same(tap)
        self.sizes = [shape.size for shape in tap.shapes[:-1]]
        results = [
            shape.flatten(value) for shape, value in zip(tap.shapes[1:], tap.results, strict=True)
        ]
        self.used = [self._uses(value) for value in (y, *results)]

    def _require_same(self, tap: _Chain) -> None:
        """Refuse phases that are not those of the block."""
        name = type(self.block_layer.block).__name__
        shape, last = StateShape.of(tap.fz), tap.shapes[-1]
        if last != shape:
            raise ValueError(
                f"the phases of {name} must end in the shape of f(z, x), {shape.shapes}; got "
                f"{last.shapes}."
            )
        fz, by_phases = shape.flatten(tap.fz).detach(), shape.flatten(tap.results[-1]).detach()
        gap, size = float((fz - by_phases).abs().max()), float(fz.abs().max())
        if not gap <= 1e3 * torch.finfo(fz.dtype).eps * max(1.0, size):
            raise ValueError(
                f"the phases of {name}, one after the other, must give f(z, x); they differ by "
                f"{gap:.1e}."
            )

    def _uses(self, value: Tensor) -> list[int]:
        if not value.requires_grad:
            return []
        grads = torch.autograd.grad(
            value.sum(), self.controls.parameters, allow_unused=True, retain_graph=True
        )
        return [i for i, grad in enumerate(grads) if grad is not None]

    def layer(self, k: int, stored: bool) -> _Layer:
        """Return layer k, from 1 on, linearised in its state, and if `stored` in its parameters."""
        used = self.used[k] if stored else []
        return self._linearized(self.local(k, used), self.states(k), used)

    def states(self, k: int) -> Tensor:
        """Return what enters layer k, `(batch, n)`."""
        return self._states[k - 1]

    def readout(self, parameters: Sequence[int]) -> _Layer:
        """Return the readout linearised in z and in some parameters."""
        part, shape = self.controls.part(parameters), self._shapes[0]

        def local(u: Tensor, z: Tensor, x: Tensor) -> Tensor:
            with self.block_layer.tapped(Tap(shape.unflatten(z[None]))):
                return functional_call(self.model, part.unflatten(u), (x[None],)).reshape(-1)

        return self._linearized(local, self._states[0], parameters)

    def local(self, k: int, parameters: Sequence[int]) -> LocalPhase:
        """Return (u, s, x) -> s+ for one sample and layer k: s is (n,), s+ (n+,)."""
        part = self.controls.part(parameters)
        before, after, zshape = self._shapes[k - 1], self._shapes[k], self._shapes[0]
        z = zshape.unflatten(self._states[0][:1])

        def local(u: Tensor, s: Tensor, x: Tensor) -> Tensor:
            tap = _One(z, self._chain, k - 1, before.unflatten(s[None]))
            with self.block_layer.tapped(tap):
                functional_call(self.model, part.unflatten(u), (x[None],))
            return after.flatten(tap.fz)[0]

        return local

    def _linearized(self, local: LocalPhase, states: Tensor, used: Sequence[int]) -> _Layer:
        part = self.controls.part(used)
        u = part.vector

        def with_value(u: Tensor, s: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            value = local(u, s, x)
            return value, value

        jacobians = jacrev(with_value, argnums=(0, 1), has_aux=True)
        (B, A), value = sample_by_sample(lambda s, x: jacobians(u, s, x), states, self.x)
        A, B, value = A.detach(), B.detach(), value.detach()  # parameters that are not in u
        ends = list(itertools.accumulate(part.sizes, initial=0))
        columns = {i: slice(*ends[j : j + 2]) for j, i in enumerate(used)}
        return _Layer(value, A, B, columns)

    def newton_terms(
        self,
        layers: Sequence[_Layer],
        own: Sequence[Sequence[int]],
        y: Tensor,
        loss: Loss,
        a: Tensor,
    ) -> tuple[list[Tensor], list[Tensor], list[InputCost]]:
        """Return Q_k, M_k and R_k of the layers' Hamiltonians."""
        require_mean(loss, self.outputs, y)
        costates = _costates([layer.A for layer in layers], a)
        part, zshape = self.controls.part(own[0]), self._shapes[0]
        n = self.sizes[0]

        def read(v: Tensor, s: int) -> Tensor:
            with self.block_layer.tapped(Tap(zshape.unflatten(v[None, :n]))):
                out = functional_call(self.model, part.unflatten(v[n:]), (self.x[s : s + 1],))
            return loss(out, y[s : s + 1])

        terms = [hessian_terms(read, self._points(0, part), n)]
        for k in range(1, len(self.used)):
            layer_part = self.controls.part(own[k])
            local, size, p = self.local(k, own[k]), self.sizes[k - 1], costates[k]

            def hamiltonian(
                v: Tensor, s: int, local: Any = local, size: int = size, p: Tensor = p
            ) -> Tensor:
                return local(v[size:], v[:size], self.x[s]) @ p[s]

            terms.append(hessian_terms(hamiltonian, self._points(k - 1, layer_part), size))
        Q, M, R = map(list, zip(*terms, strict=True))
        return Q, M, R

    def _points(self, k: int, part: Controls) -> Tensor:
        """Return (s, u) of every sample."""
        states = self._states[k]
        return torch.cat([states, part.vector.expand(len(states), -1)], dim=1)


def _costates(A: Sequence[Tensor], a: Tensor) -> list[Tensor]:
    """Return p_{k+1} of what layer k returns, for k = 1 ... (and first, unused, that of z)."""
    whole = A[0]
    for A_k in A[1:]:
        whole = A_k @ whole
    p = [torch.linalg.solve(identity_like(whole) - whole.mT, a)]  # (H1)
    for A_k in reversed(A[1:]):
        p.insert(0, (A_k.mT @ p[0][..., None])[..., 0])
    return [p[-1], *p]


class Plan:
    """Which parameters are the controls of which phase, and what the states carry (N5).

    Attributes:
        own: Numbers of the parameters that are each phase's controls; phase 0 reads the output.
        controls: Their entries in u.
    """

    def __init__(self, at: _Model, layers: Sequence[_Layer]) -> None:
        self._at, self._layers = at, layers
        self._sizes, self._names = at.controls.sizes, at.controls.names
        self._widths = {k: layer.A.shape[-2] for k, layer in enumerate(layers, 1)}
        used, count = at.used, len(at.controls.parameters)
        # What acts on the output directly, or on nothing, is a control where the output is read.
        first = [next((k for k, some in enumerate(used) if i in some), 0) for i in range(count)]
        self.own = [[i for i in range(count) if first[i] == k] for k in range(len(used))]
        begins = {
            k: min(first[i] for i in some if first[i] < k)
            for k, some in enumerate(used) if any(first[i] < k for i in some)
        }  # fmt: skip
        # carried[j]: the layers whose e is part of the state that goes into phase j
        self._carried = [
            [k for k, begin in begins.items() if begin < j <= k] for j in range(len(used))
        ]
        self._late = {k: [i for i in used[k] if first[i] < k] for k in begins}
        ends = list(itertools.accumulate(self._sizes, initial=0))
        device = layers[0].A.device
        self.controls = [
            torch.cat([torch.arange(*ends[i : i + 2], device=device) for i in some]) if some
            else torch.arange(0, device=device)
            for some in self.own
        ]  # fmt: skip

    def sizes(self, A: Sequence[Tensor]) -> tuple[list[int], list[int]]:
        """Return the numbers of states and of controls of every phase."""
        return [X.shape[-1] for X in A], [len(index) for index in self.controls]

    def state_matrices(self) -> list[Tensor]:
        """Return A of every phase."""
        return [self._state_matrix(j) for j in range(len(self.own))]

    def _state_matrix(self, j: int) -> Tensor:
        layer = self._layers[max(j, 1) - 1]
        eye = lambda n: torch.eye(n, dtype=layer.A.dtype, device=layer.A.device)
        n, carried = layer.A.shape[-1], self._carried[j]
        rows, columns = self._rows(j), _places(n, carried, self._widths)
        A = layer.A.new_zeros(len(layer.A), _end(rows), _end(columns))
        A[:, rows[None], columns[None]] = eye(n) if j == 0 else layer.A
        for k in carried:
            A[:, rows.get(k, rows[None]), columns[k]] = eye(self._widths[k])
        return A

    def _rows(self, j: int) -> dict[int | None, slice]:
        """Return where the state and what is carried stand after phase j."""
        A = self._layers[max(j, 1) - 1].A
        on = self._carried[j + 1] if j + 1 < len(self._carried) else []
        return _places(A.shape[-1 if j == 0 else -2], on, self._widths)

    def _effects(self, j: int) -> list[tuple[slice, int]]:
        """Return which rows of phase j's B are the derivatives of which layer."""
        rows = self._rows(j)
        return [(where, j if k is None else k) for k, where in rows.items() if k or j]

    def input_matrices(self, A: Sequence[Tensor]) -> list[Tensor]:
        """Return B of every phase."""
        found = []
        for j, A_j in enumerate(A):
            B = A_j.new_zeros(*A_j.shape[:2], len(self.controls[j]))
            for where, k in self._effects(j):
                B[:, where] = self._layers[k - 1].by(self.own[j], self._sizes)
            found.append(B)
        return found

    def products(self, j: int, minibatch: Minibatch, like: Tensor) -> InputMap:
        """Return B of phase j by its products, in the type of `like` (*batch, n+, n)."""
        parts = [
            (where, _LayerProducts(self._at, k, self.own[j], minibatch))
            for where, k in self._effects(j)
        ]
        m, exact = len(self.controls[j]), minibatch == "exact"
        batch, rows = len(self._layers[0].A), _end(self._rows(j))

        def push(v: Tensor) -> Tensor:
            out = v.new_zeros(batch, rows, v.shape[-1])
            for where, part in parts:
                out[:, where] = part.push(v)
            return out.flatten(0, 1) if exact else out

        def pull(w: Tensor) -> Tensor:
            w = w.reshape(batch, rows, w.shape[-1])
            out = w.new_zeros(*(() if exact else (batch,)), m, w.shape[-1])
            for where, part in parts:
                out = out + part.pull(w[:, where])
            return out

        return ProductMap(m, push, pull, like)

    def require_single_use(self) -> None:
        """Refuse a parameter that acts in several phases.

        Raises:
            ValueError: If there is one.
        """
        for k, some in self._late.items():
            names = ", ".join(self._names[i] for i in some)
            raise ValueError(
                f"parameters that act in several phases ({names}, again in phase {k}) have no "
                "cyclic Newton problem: let the block's phases hand on what the parameters make, "
                "as ConvBlock.phases does, or take route 'dare'."
            )


class _LayerProducts:
    """Products with a layer's derivative in some parameters, of all samples."""

    def __init__(self, at: _Model, k: int, parameters: Sequence[int], minibatch: Minibatch) -> None:
        part, used = at.controls.part(parameters), at.used[k]
        kept = [i for i in parameters if i in used]
        entries = zip(parameters, torch.arange(part.m).split(part.sizes), strict=True)
        self._m, self._entries = part.m, [index for i, index in entries if i in kept]
        self._u = at.controls.part(kept).vector
        self._local, self._at, self._k = at.local(k, kept), at, k
        self._exact = minibatch == "exact"

    def push(self, v: Tensor) -> Tensor:
        """Return B v `(batch, n+, j)` for v `(m, j)`, or `(batch, m, j)` for one each."""
        states, x = self._at.states(self._k), self._at.x
        kept = v[..., self._index(v.device), :].to(states.dtype)

        def one(s: Tensor, x: Tensor, direction: Tensor) -> Tensor:
            return jvp(lambda u: self._local(u, s, x), (self._u,), (direction,))[1]

        own = None if self._exact else 0
        samples = torch.vmap(one, (0, 0, own))
        return torch.vmap(lambda d: samples(states, x, d), -1, -1)(kept).to(v.dtype)

    def pull(self, w: Tensor) -> Tensor:
        """Return B'w `(m, j)`, or `(batch, m, j)`, for w `(batch, n+, j)`."""
        states, x = self._at.states(self._k), self._at.x

        def one(s: Tensor, x: Tensor, cotangent: Tensor) -> Tensor:
            return vjp(lambda u: self._local(u, s, x), self._u)[1](cotangent)[0]

        samples = torch.vmap(one)
        total = lambda c: samples(states, x, c).sum(0) if self._exact else samples(states, x, c)
        pulled = torch.vmap(total, -1, -1)(w.to(states.dtype)).to(w.dtype)
        out = w.new_zeros(*pulled.shape[:-2], self._m, w.shape[-1])
        return out.index_copy_(-2, self._index(w.device), pulled)

    def _index(self, device: torch.device) -> Tensor:
        if not self._entries:
            return torch.arange(0, device=device)
        return torch.cat(self._entries).to(device)


def _places(n: int, carried: Sequence[int], width: dict[int, int]) -> dict[int | None, slice]:
    """Return where the state (None) and what is carried stand."""
    places: dict[int | None, slice] = {None: slice(0, n)}
    end = n
    for k in carried:
        places[k] = slice(end, end + width[k])
        end += width[k]
    return places


def _end(places: dict[int | None, slice]) -> int:
    return max(place.stop for place in places.values())


def _costs(
    divergence: Divergence, read: _Layer, n: Sequence[int], m: Sequence[int]
) -> tuple[list[Tensor], list[Tensor], list[InputCost]]:
    """Return Q_k, M_k and R_k of a divergence of the output, or of the Euclidean one."""
    like, euclidean = read.A, isinstance(divergence, Euclidean)
    batch, none = len(like), torch.arange(0, device=like.device)
    Q = [like.new_zeros(batch, size, size) for size in n]
    M = [like.new_zeros(batch, *size) for size in zip(m, n, strict=True)]
    R = [
        InputCost(like.new_full((batch, size), float(euclidean)), none, like.new_zeros(batch, 0, 0))
        for size in m
    ]
    if isinstance(divergence, OutputDivergence):
        Q[0], M[0], R[0] = pulled_back(divergence.metric(read.value), read.A, read.B)
    elif not euclidean:
        raise ValueError(f"divergence {type(divergence).__name__} has no quadratic terms.")
    return Q, M, R
