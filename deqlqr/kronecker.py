"""The damped step with a Kronecker-factored metric, from activations and adjoints at equilibrium.

A layer that brings a to what comes out by the weight W, at one or several positions p, has in the
metric of (F3), R + B'PB layer by layer, the block

    (K4)  E[ sum_p sum_q (a_p a_q') x (g_p g_q') ]  ~  A x G,
          A = E[ sum_p a_p a_p' ],   G = E[ mean_p g_p g_p' ]

g the cotangent of what came out, through the adjoint (D1) of a random output cotangent c,
E[c c'] = Lambda. Weights whose results are added (W z + U x + b) are one layer with the input
[z; x; 1]. With A = U_A diag(l_A) U_A' and G = U_G diag(l_G) U_G' the damped step is exact in the
factors:

    (K5)  u = -U_G [ (U_G' grad U_A) / (s + delta) ] U_A',   s = l_G l_A'

or, corrected, s = E[ (U_G' (sum_p g_p a_p') U_A)^2 ]. The few entries w of norms and other small
parameters form one full block. So do, with them, the few numbers r that a model makes from its
parameters (a bound on a norm), which couple layers: with V = dr/du in the layers

    (K6)  S = E[ q q' ],  q = [c'dy/dw; c'dy/dr],    C = (K4) + T'S T,  T = [I on w; V]

If w has many entries its block is the diagonal E[(c'dy/dw)^2]. A parameter V that enters through a
tensor made from it (an orthogonal weight), or with its transpose, has its own rows D = c'dy/dV and

    (K7)  G = E[ D D' ],   A = E[ D'D ] / tr G,

which is (K4) where D is one g a'. A, G, S are moving averages.

Source: J. Martens, R. Grosse (2015), arXiv:1503.05671; R. Grosse, J. Martens (2016),
arXiv:1602.01407 (convolutions); T. George et al. (2018), arXiv:1806.03884 (corrected);
D. Morwani et al. (2024), arXiv:2406.17748 (K7).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deqlqr.controls import Controls
from deqlqr.direction import Direction, expanded
from deqlqr.rows import rows_of_uses
from deqlqr.sensitivity import Sensitivity
from deqlqr.sites import Member, Sites, numbers_of
from deqlqr.solver import FixedPointSolution

_WIDE = 512  # up to here eigenvalues are computed in float64, above in the type of the factors
_SMALL = 512  # entries up to which all small parameters form one full block
_JOINT = "&"  # begins, and parts, the names of that block in the memory
Memory = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Block:
    """A block of the metric in its eigenvectors, U diag(s) U'.

    Attributes:
        members: The parameters of a layer, or one that is in no layer.
        spectrum: s: `(out, columns)`, or of the parameter's shape.
        basis: U_G and U_A of (K5); `None` for a diagonal block.
        defect: What these lack in orthogonality.
    """

    members: tuple[Member, ...]
    spectrum: Tensor
    basis: tuple[Tensor, Tensor] | None
    defect: Tensor | None

    def coordinates(self, named: dict[str, Tensor]) -> Tensor:
        """Return U'v for values v of the parameters, by name."""
        if self.basis is None:
            return named[self.members[0].name]
        U_G, U_A = self.basis
        V = torch.cat([member.matrix(named[member.name]) for member in self.members], dim=1)
        return U_G.mT @ V @ U_A

    def values(self, c: Tensor) -> dict[str, Tensor]:
        """Return U c, by name."""
        if self.basis is None:
            return {self.members[0].name: c}
        U_G, U_A = self.basis
        pieces = (U_G @ c @ U_A.mT).split([member.columns for member in self.members], dim=1)
        return {m.name: m.value(piece) for m, piece in zip(self.members, pieces, strict=True)}


@dataclass(frozen=True)
class Joint:
    """The block of small parameters and numbers (K6).

    Attributes:
        places: Where w lies in u, `(entries,)`.
        S: `(entries + numbers, entries + numbers)`.
        V: `(numbers, m)`, zero on w.
    """

    places: Tensor
    S: Tensor
    V: Tensor

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the parts of S: w with w, w with r, r with r."""
        R = len(self.places)
        return self.S[:R, :R], self.S[:R, R:], self.S[R:, R:]

    def times(self, v: Tensor) -> Tensor:
        """Return T'S T v."""
        M, p, S = self.parts()
        w, r = v[self.places], self.V @ v
        product = (p.mT @ w + S @ r) @ self.V
        product[self.places] = M @ w + p @ r
        return product

    def solve(self, g: Tensor, shift: Tensor, inner: Callable[[Tensor], Tensor]) -> Tensor:
        """Return (C + D)^-1 g.

        Args:
            g: `(m,)`.
            shift: D, `(m,)`.
            inner: Applies (K4 + D)^-1 to what lies outside w.
        """
        M, p, S = self.parts()
        R, e = p.shape
        x = inner(g.index_fill(0, self.places, 0.0))
        Y = torch.stack([inner(row) for row in self.V]) if e else self.V
        F = self.V @ Y.mT
        # Unknown: w, and the change of r.
        top = torch.cat([M + torch.diag(shift[self.places]), p], 1)
        low = torch.cat([F @ p.mT, torch.eye(e, dtype=g.dtype, device=g.device) + F @ S], 1)
        found = torch.linalg.solve(torch.cat([top, low]), torch.cat([g[self.places], self.V @ x]))
        x = x - (p.mT @ found[:R] + S @ found[R:]) @ Y
        return x.index_copy(0, self.places, found[:R])


class Factors:
    """The moving averages of (K4) and (K6), and the eigenvectors of (K5).

    Args:
        memory: Where they are kept, a dictionary for each layer or parameter; the optimizer saves
            it.
        controls: The parameters.
        keep: Weight of the past in the averages at this look.
        corrected: Estimate s itself.
    """

    def __init__(self, memory: Memory, controls: Controls, keep: float, corrected: bool) -> None:
        self.memory, self.keep, self.corrected = memory, keep, corrected
        self.controls = controls
        self._shapes = dict(zip(controls.names, controls.shapes, strict=True))
        self._new: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self._V: Tensor | None = None

    @property
    def complete(self) -> bool:
        """Whether every parameter has its block."""
        names = {member.name for block in self.blocks() for member in block.members}
        for key in self.memory:
            names |= set(_names(key))
        return names >= set(self._shapes)

    @property
    def ready(self) -> bool:
        """Whether every layer has its eigenvectors."""
        return all("U_A" in state for state in self.memory.values() if "A" in state)

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks of layers and of single parameters."""
        for key, state in self.memory.items():
            tokens = key.split("+")
            if key.startswith(_JOINT) or not self._known(tokens):
                continue
            members = tuple(Member.of(token, self._shapes) for token in tokens)
            basis = (state["U_G"], state["U_A"]) if "U_A" in state else None
            if basis is not None or "D" in state:
                yield Block(members, self.spectrum(key), basis, state.get("defect"))

    def _known(self, tokens: Sequence[str]) -> bool:
        """Return whether the parameters are trained: some may have been frozen since."""
        return all(token.removesuffix("'") in self._shapes for token in tokens)

    def begin(self, at: Sensitivity) -> None:
        """Take V of (K6) from a chunk of the batch; it is the same for all."""
        if self._V is None:
            operands = [at.uses[places[0]].operand for places in numbers_of(at)]
            rows = [at.controls.pull(entry) for r in operands for entry in r.reshape(-1)]
            self._V = torch.stack(rows) if rows else at.outputs.new_zeros(0, at.controls.m)

    @property
    def number_jacobian(self) -> Tensor:
        """V of (K6), `(numbers, m)`."""
        assert self._V is not None  # noqa: S101  see `begin`
        return self._V

    def joint(self) -> Joint | None:
        """Return the block of small parameters and numbers, if there is one."""
        V = self.number_jacobian
        for key, state in self.memory.items():
            names = _names(key)
            if key.startswith(_JOINT) and self._known(names):
                places = self._places(names)
                if len(state["S"]) == len(places) + len(V):
                    S = state["S"] / state["weight"]
                    return Joint(places, S, V.index_fill(1, places, 0.0))
        return None

    def _places(self, names: Sequence[str]) -> Tensor:
        parts = torch.arange(self.controls.m).split(self.controls.sizes)
        by_name = dict(zip(self.controls.names, parts, strict=True))
        none = torch.arange(0)
        device = self.controls.parameters[0].device
        return torch.cat([none, *(by_name[name] for name in names)]).to(device)

    @torch.no_grad()
    def see(self, at: Sensitivity, cotangents: Sequence[Tensor], count: int) -> None:
        """Add a chunk of a batch of `count` samples.

        Args:
            at: The chunk.
            cotangents: Of its outputs, each (batch, k); the mean of c c' is the metric Lambda.
            count: Samples in all chunks.
        """
        share = 1.0 / (count * len(cotangents))
        inputs: dict[str, Tensor] = {}
        sites = None
        for c in cotangents:
            found = at.cotangents(c)
            if sites is None:
                sites = Sites(at, found)
                for key, group in sites.layers.items():
                    inputs[key] = torch.cat([site.inputs() for site in group], 1)
                    a = inputs[key].flatten(0, 1)
                    self._add(key, "A", a.mT @ a / count)
            for key, group in sites.layers.items():
                pieces = [
                    site.outputs(found[i]) for site, i in zip(group, sites.places[key], strict=True)
                ]
                self._see_outputs(key, inputs[key], torch.cat(pieces, 1), share)
            self._see_made(at, sites, found, share)
            self._see_rest(at, sites, found, share)

    def _see_made(
        self, at: Sensitivity, sites: Sites, found: Sequence[Tensor | None], share: float
    ) -> None:
        """Add to the blocks (K7)."""
        for name, rows in rows_of_uses(at, sorted(sites.made), found).items():
            member = Member.of(name, self._shapes)
            D = rows.view(len(rows), -1, member.columns)
            self._add(name, "G", (D @ D.mT).sum(0) * share)
            self._add(name, "A", (D.mT @ D).sum(0) * share)
            self._add(name, "trace", D.square().sum() * share)
            state = self.memory.get(name, {})
            if self.corrected and "U_A" in state:
                turned = state["U_G"].mT @ D @ state["U_A"]
                self._add(name, "s", turned.square().sum(0) * share)

    def _see_rest(
        self, at: Sensitivity, sites: Sites, found: Sequence[Tensor | None], share: float
    ) -> None:
        """Add to the blocks of the parameters outside the layers."""
        V = self.number_jacobian
        rest = {name: _summed(at, places, found) for name, places in sites.rest.items()}
        names = list(rest) if sum(rows.shape[1] for rows in rest.values()) <= _SMALL else []
        for name in rest if not names else ():
            diagonal = rest[name].square().sum(0).view(self._shapes[name])
            self._add(name, "D", diagonal * share)
        r = (
            torch.cat([_summed(at, places, found) for places in sites.numbers], 1)
            if len(V)
            else at.outputs.new_zeros(len(at.outputs), 0)
        )
        if names or len(V):
            w = torch.cat([rest[name] for name in names], 1) if names else r[:, :0]
            q = torch.cat([w + r @ V[:, self._places(names)], r], 1)  # (K6)
            self._add(_JOINT + _JOINT.join(names), "S", q.mT @ q * share)

    def _see_outputs(self, key: str, a: Tensor, g: Tensor, share: float) -> None:
        flat = g.flatten(0, 1)
        self._add(key, "G", flat.mT @ flat * (share / g.shape[1]))
        state = self.memory.get(key, {})
        if self.corrected and "U_A" in state:
            rows = (g @ state["U_G"]).mT @ (a @ state["U_A"])
            self._add(key, "s", rows.square().sum(0) * share)

    def _add(self, key: str, what: str, value: Tensor) -> None:
        new = self._new[key]
        new[what] = new[what] + value if what in new else value

    @torch.no_grad()
    def commit(self) -> None:
        """Take what was seen into the averages; nothing that is not finite gets in."""
        self._drop_others()
        for key, new in self._new.items():
            if not all(bool(value.isfinite().all()) for value in new.values()):
                continue
            state = self.memory.setdefault(key, {"weight": 0.0})
            state["weight"] = self.keep * state["weight"] + (1 - self.keep)
            for what, value in new.items():
                keep = self.keep
                if what == "s":  # which starts as the product of the factors' eigenvalues
                    state["looks"] = state["looks"] + 1
                    keep = min(keep, 1 - 1 / state["looks"])
                past = state.get(what, torch.zeros_like(value))
                state[what] = keep * past + (1 - keep) * value
        self._new.clear()

    def _drop_others(self) -> None:
        """Drop layers whose parameters now act together in other ways (`unrolled`)."""
        now = {name for key in self._new for name in _parameters(key)}
        for key in [key for key in self.memory if key not in self._new]:
            if now & set(_parameters(key)):
                del self.memory[key]

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute the eigenvectors anew."""
        for state in self.memory.values():
            if "A" not in state:
                continue
            (l_A, U_A), (l_G, U_G) = (_eigen(X) for X in _averages(state))
            defect = torch.maximum(_defect(U_A), _defect(U_G))
            state.update(U_A=U_A, U_G=U_G, s=l_G[:, None] * l_A, looks=1, defect=defect)

    def spectrum(self, key: str) -> Tensor:
        """Return s of (K5), or the diagonal of a parameter that is in no layer."""
        state = self.memory[key]
        return state["s"] if "s" in state else state["D"] / state["weight"]


def _averages(state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return A and G of a layer (K4), or of a parameter with rows of its own (K7)."""
    weight = state["weight"]
    A, G = state["A"] / weight, state["G"] / weight
    if "trace" in state:
        A = A / (state["trace"] / weight).clamp(min=torch.finfo(A.dtype).tiny)
    return A, G


def _parameters(key: str) -> list[str]:
    """Return the parameters that a key of the memory is about."""
    if key.startswith(_JOINT):
        return _names(key)
    return [token.removesuffix("'") for token in key.split("+")]


def _names(key: str) -> list[str]:
    """Return the small parameters that a key of the memory names; none for a layer's."""
    return [name for name in key.split(_JOINT)[1:] if name]


def dense_metric(factors: Factors) -> Tensor:
    """Return C of (K6), (m, m), from the Kronecker products themselves: to check the rest by."""
    controls = factors.controls
    numbers = controls.unflatten(torch.arange(controls.m))
    V = factors.number_jacobian
    C = V.new_zeros(controls.m, controls.m)
    for block in factors.blocks():
        state = factors.memory["+".join(member.token for member in block.members)]
        if block.basis is None:
            place = numbers[block.members[0].name].reshape(-1)
            C[place, place] += state["D"].reshape(-1) / state["weight"]
        else:
            columns = [member.matrix(numbers[member.name]) for member in block.members]
            place = torch.cat(columns, dim=1).reshape(-1)
            A, G = _averages(state)
            C[place[:, None], place] += torch.kron(G, A)
    joint = factors.joint()
    if joint is not None:
        R, m = len(joint.places), controls.m
        unit = torch.eye(m, dtype=V.dtype, device=V.device)[joint.places]
        T = torch.cat([unit.view(R, m), joint.V])
        C += T.mT @ joint.S @ T
    return C


def _summed(at: Sensitivity, places: Sequence[int], found: Sequence[Tensor | None]) -> Tensor:
    """Return c'dy/dr (batch, entries) of a tensor r over its uses."""
    size, batch = at.uses[places[0]].operand.numel(), len(at.outputs)
    rows = [at.uses[i].rows(g).reshape(batch, size) for i in places if (g := found[i]) is not None]
    return torch.stack(rows).sum(0) if rows else at.outputs.new_zeros(batch, size)


def _defect(U: Tensor) -> Tensor:
    """Return the largest entry of U'U - I."""
    product = U.mT @ U
    product.diagonal().sub_(1.0)
    return product.abs().amax()


def _eigen(X: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, not below 0, and eigenvectors of a symmetric positive X."""
    wide = X.double() if len(X) <= _WIDE else X
    try:
        values, vectors = torch.linalg.eigh((wide + wide.mT) / 2)
    except torch.linalg.LinAlgError:  # in single precision it can fail to converge
        values, vectors = torch.linalg.eigh((X + X.mT).double() / 2)
    return values.clamp(min=0.0).to(X.dtype), vectors.to(X.dtype)


class KroneckerMetric:
    """A gradient, and the metric C of (K6).

    Attributes:
        loss: The mean loss.
        gradient: Its gradient `(m,)`.
        solutions: The forward solves of the model's DEQ layers.
        controls: The parameters.
        factors: The blocks of C.
    """

    def __init__(
        self,
        loss: Tensor,
        gradient: Tensor,
        solutions: Sequence[FixedPointSolution],
        controls: Controls,
        factors: Factors,
    ) -> None:
        self.loss, self.gradient, self.solutions = loss, gradient, solutions
        self.controls, self.factors = controls, factors
        self._blocks, self._joint = list(factors.blocks()), factors.joint()

    def solve(self, shifts: Sequence[float]) -> Direction:
        """Return the step for the damping of each parameter, one for each layer.

        Its residual is what the eigenvectors lack in orthogonality.
        """
        by_name = dict(zip(self.controls.names, shifts, strict=True))
        g, shift = self.gradient, expanded(shifts, self.controls.sizes, self.gradient)
        inner = lambda v: self._block_solve(v, by_name)
        u = -(inner(g) if self._joint is None else self._joint.solve(g, shift, inner))
        defects = [block.defect for block in self._blocks if block.defect is not None]
        # As (C + D) u = -g: u'C u = -g'u - u'D u.
        numbers = [max(defects, default=g.new_zeros(())), g @ u, u @ (shift * u)]
        residual, slope, damped = torch.stack(numbers).tolist()
        return Direction(u, residual, slope, max(-slope - damped, 0.0))

    def _block_solve(self, v: Tensor, shifts: dict[str, float]) -> Tensor:
        """Return (K4 + D)^-1 v, by (K5)."""
        named = self.controls.unflatten(v)
        x = {name: value / shifts[name] for name, value in named.items()}
        for block in self._blocks:
            shift = _one(shifts, tuple(member.name for member in block.members))
            x |= block.values(block.coordinates(named) / (block.spectrum + shift))
        return self.controls.flatten(x)

    def times(self, v: Tensor) -> Tensor:
        """Return C v."""
        named = self.controls.unflatten(v)
        product: dict[str, Tensor] = {}
        for block in self._blocks:
            product |= block.values(block.spectrum * block.coordinates(named))
        flat = self.controls.flatten(product)
        return flat if self._joint is None else flat + self._joint.times(v)

    def metric(self, d: Tensor) -> float:
        """Return d'C d."""
        return float(d @ self.times(d))


def _one(shifts: dict[str, float], names: tuple[str, ...]) -> float:
    values = {shifts[name] for name in names}
    if len(values) > 1:
        raise ValueError(
            f"damping must be the same for {', '.join(names)}, which are one layer of the metric, "
            f"got {sorted(values)}."
        )
    return values.pop()
