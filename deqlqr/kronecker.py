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

or, corrected, s = E[ (U_G' (sum_p g_p a_p') U_A)^2 ]. A norm's scale and other parameters have the
diagonal E[(c'dy/du)^2]. Where a model makes a few numbers r from its parameters, as a bound on a
norm, these couple layers: with V = dr/du

    (K6)  C = (K4) + V' S V,    S = E[ (c'dy/dr)' (c'dy/dr) ]

which Woodbury's formula takes along. A, G, S and the diagonals are moving averages.

Source: J. Martens, R. Grosse (2015), arXiv:1503.05671; R. Grosse, J. Martens (2016),
arXiv:1602.01407 (convolutions); T. George et al. (2018), arXiv:1806.03884 (corrected).
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deqlqr.controls import Controls
from deqlqr.direction import Direction, expanded
from deqlqr.sensitivity import Sensitivity
from deqlqr.sites import Member, Sites, numbers_of
from deqlqr.solver import FixedPointSolution

_WIDE = 512  # up to here eigenvalues are computed in float64, above in the type of the factors
_NUMBERS = ""  # their name in the memory
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


class Factors:
    """The moving averages of (K4), and the eigenvectors of (K5).

    Args:
        memory: Where they are kept, a dictionary for each layer or parameter; the optimizer saves
            it.
        controls: The parameters.
        keep: Weight of the past in the averages at this look.
        corrected: Estimate s itself.
    """

    def __init__(self, memory: Memory, controls: Controls, keep: float, corrected: bool) -> None:
        self.memory, self.keep, self.corrected = memory, keep, corrected
        self._shapes = dict(zip(controls.names, controls.shapes, strict=True))
        self._new: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self._jacobian: Tensor | None = None

    @property
    def ready(self) -> bool:
        """Whether every layer has its eigenvectors."""
        return all("U_A" in state for state in self.memory.values() if "A" in state)

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks of the metric."""
        for key, state in self.memory.items():
            if key == _NUMBERS:
                continue
            members = tuple(Member.of(token, self._shapes) for token in key.split("+"))
            basis = (state["U_G"], state["U_A"]) if "A" in state else None
            yield Block(members, self.spectrum(key), basis, state.get("defect"))

    def begin(self, at: Sensitivity) -> None:
        """Take V of (K6) from a chunk of the batch; it is the same for all."""
        if self._jacobian is None:
            operands = [at.uses[places[0]].operand for places in numbers_of(at)]
            rows = [at.controls.pull(entry) for r in operands for entry in r.reshape(-1)]
            self._jacobian = torch.stack(rows) if rows else at.outputs.new_zeros(0, at.controls.m)

    def coupling(self) -> Tensor:
        """Return S^(1/2) V of (K6), a row for each number."""
        assert self._jacobian is not None  # noqa: S101  see `begin`
        V, state = self._jacobian, self.memory.get(_NUMBERS)
        if not len(V) or state is None or len(state["S"]) != len(V):
            return V[:0]
        values, vectors = _eigen(state["S"] / float(state["weight"]))
        return values.sqrt()[:, None] * (vectors.mT @ V)

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
            for name, places in sites.rest.items():
                rows = [at.uses[i].rows(g) for i in places if (g := found[i]) is not None]
                if rows:
                    self._add(name, "D", torch.stack(rows).sum(0).square().sum(0) * share)
            if sites.numbers:
                r = torch.cat([_summed(at, places, found) for places in sites.numbers], 1)
                self._add(_NUMBERS, "S", r.mT @ r * share)

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
        for key, new in self._new.items():
            if not all(bool(value.isfinite().all()) for value in new.values()):
                continue
            state = self.memory.setdefault(key, {"weight": torch.zeros((), dtype=torch.float64)})
            state["weight"] = self.keep * state["weight"] + (1 - self.keep)
            for what, value in new.items():
                keep = self.keep
                if what == "s":  # which starts as the product of the factors' eigenvalues
                    state["looks"] = state["looks"] + 1
                    keep = min(keep, 1 - 1 / float(state["looks"]))
                past = state.get(what, torch.zeros_like(value))
                state[what] = keep * past + (1 - keep) * value
        self._new.clear()

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute the eigenvectors anew."""
        for state in self.memory.values():
            if "A" not in state:
                continue
            weight = float(state["weight"])
            (l_A, U_A), (l_G, U_G) = (_eigen(state[name] / weight) for name in ("A", "G"))
            defect = torch.maximum(_defect(U_A), _defect(U_G))
            looks = torch.ones((), dtype=torch.float64)
            state.update(U_A=U_A, U_G=U_G, s=l_G[:, None] * l_A, looks=looks, defect=defect)

    def spectrum(self, key: str) -> Tensor:
        """Return s of (K5), or the diagonal of a parameter that is in no layer."""
        state = self.memory[key]
        return state["s"] if "s" in state else state["D"] / float(state["weight"])


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
    values, vectors = torch.linalg.eigh((wide + wide.mT) / 2)
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
        self._blocks, self._coupling = list(factors.blocks()), factors.coupling()

    def solve(self, shifts: Sequence[float]) -> Direction:
        """Return the step for the damping of each parameter, one for each layer.

        Its residual is what the eigenvectors lack in orthogonality.
        """
        by_name = dict(zip(self.controls.names, shifts, strict=True))
        g, W = self.gradient, self._coupling
        u = -self._block_solve(g, by_name)
        if len(W):
            Y = torch.stack([self._block_solve(w, by_name) for w in W])
            small = torch.eye(len(W), dtype=g.dtype, device=g.device) + W @ Y.mT
            u = u - torch.linalg.solve(small, W @ u) @ Y
        shift = expanded(shifts, self.controls.sizes, g)
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
        return self.controls.flatten(product) + (self._coupling @ v) @ self._coupling

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
