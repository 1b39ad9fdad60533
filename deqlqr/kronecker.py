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
diagonal E[(c'dy/du)^2]. All are moving averages.

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
from deqlqr.direction import Direction
from deqlqr.sensitivity import Sensitivity
from deqlqr.solver import FixedPointSolution
from deqlqr.uses import Factored, MatMul, Shift, Use, leaves_of

_WIDE = 512  # up to here eigenvalues are computed in float64, above in the type of the factors
Memory = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Member:
    """A parameter's columns in the matrix of its layer.

    Attributes:
        name: Its name.
        shape: Its shape.
        columns: How many.
        stored: `"out-in"`, `"in-out"` or `"bias"`.
    """

    name: str
    shape: torch.Size
    columns: int
    stored: str

    @staticmethod
    def of(token: str, shapes: dict[str, torch.Size]) -> "Member":
        """Return the parameter that a token stands for: its name, primed if stored (in, out)."""
        name = token.removesuffix("'")
        shape = shapes[name]
        if len(shape) == 1:
            return Member(name, shape, 1, "bias")
        if name != token:
            return Member(name, shape, shape[0], "in-out")
        return Member(name, shape, shape[1:].numel(), "out-in")

    @property
    def token(self) -> str:
        """What stands for the parameter in the name of its layer."""
        return self.name + ("'" if self.stored == "in-out" else "")

    def matrix(self, value: Tensor) -> Tensor:
        """Return a value of the parameter as (out, columns)."""
        if self.stored == "bias":
            return value[:, None]
        return value.mT if self.stored == "in-out" else value.flatten(1)

    def value(self, matrix: Tensor) -> Tensor:
        """Return a value of the parameter from its columns."""
        return (matrix.mT if self.stored == "in-out" else matrix).reshape(self.shape)


@dataclass(frozen=True)
class Site:
    """A place where weights and biases act together: their results are added.

    Attributes:
        members: The parameters.
        uses: The use of each, and how many times the parameter its operand is.
    """

    members: tuple[Member, ...]
    uses: tuple[tuple[Use, float], ...]

    def inputs(self) -> Tensor:
        """Return [a_1 a_2 ... 1], `(batch, positions, columns)`."""
        wide = [use.inputs() * s for use, s in self.uses if isinstance(use, Factored)]
        if len(wide) < len(self.uses):
            ones = wide[0].new_ones(*wide[0].shape[:2], 1)
            wide += [ones] * (len(self.uses) - len(wide))
        return torch.cat(wide, dim=2) if len(wide) > 1 else wide[0]


class Sites:
    """The layers of a model on one batch, and the parameters that are in none.

    Attributes:
        layers: For each layer (by its members' names, joined) the sites that share its weights.
        places: For each layer the number of the use whose cotangent each site reads.
        rest: The uses of each other parameter, by name.

    Raises:
        ValueError: If a parameter enters in a way that has neither.
    """

    def __init__(self, at: Sensitivity, found: Sequence[Tensor | None]) -> None:
        controls = at.controls
        self._names = {id(p): n for n, p in zip(controls.names, controls.parameters, strict=True)}
        shapes = dict(zip(controls.names, controls.shapes, strict=True))
        grouped: dict[Any, list[int]] = defaultdict(list)
        for i, (use, g) in enumerate(zip(at.uses, found, strict=True)):
            if isinstance(use, Factored) and g is not None:
                grouped[g.data_ptr(), g.shape, g.stride()].append(i)
        count: dict[str, int] = defaultdict(int)
        owners: dict[int, tuple[str, float]] = {}
        for i, use in enumerate(at.uses):
            if isinstance(use, Factored):
                owners[i] = self._owner(use, controls)
                count[owners[i][0]] += 1
        self.layers: dict[str, list[Site]] = defaultdict(list)
        self.places: dict[str, list[int]] = defaultdict(list)
        taken: set[int] = set()
        for places in grouped.values():
            # A weight used at several sites has its layer to itself.
            groups = (
                [places] if all(count[owners[i][0]] == 1 for i in places) else [[i] for i in places]
            )
            for group in groups:
                alone = count[owners[group[0]][0]] == 1
                biases = self._biases(at.uses, group) if alone else []
                prime = lambda use: "'" if isinstance(use, MatMul) else ""
                tokens = [owners[i][0] + prime(at.uses[i]) for i in group]
                tokens += [self._names[id(at.uses[j].operand)] for j in biases]
                members = [Member.of(token, shapes) for token in tokens]
                uses = [(at.uses[i], owners[i][1]) for i in group] + [
                    (at.uses[j], 1.0) for j in biases
                ]
                taken |= set(group) | set(biases)
                key = "+".join(tokens)
                self.layers[key].append(Site(tuple(members), tuple(uses)))
                self.places[key].append(group[0])
        self.rest: dict[str, list[int]] = defaultdict(list)
        covered = {m.name for sites in self.layers.values() for m in sites[0].members}
        for i, use in enumerate(at.uses):
            name = self._names.get(id(use.operand))
            if i not in taken and name is not None and name not in covered:
                self.rest[name].append(i)
        self._require_all(at, covered | set(self.rest))

    def _owner(self, use: Use, controls: Controls) -> tuple[str, float]:
        """Return the parameter that a weight is, or is a multiple of, and how many times."""
        if id(use.operand) in self._names:
            return self._names[id(use.operand)], 1.0
        W = use.operand.detach()
        for leaf in leaves_of(use.operand):
            if id(leaf) in self._names and leaf.shape == W.shape:
                V = leaf.detach()
                scale = float((W * V).sum() / V.square().sum().clamp(min=1e-30))
                if float((W - scale * V).norm()) <= 1e-4 * float(W.norm()):
                    return self._names[id(leaf)], scale
        names = sorted(self._names[id(v)] for v in leaves_of(use.operand) if id(v) in self._names)
        raise ValueError(
            f"route='kronecker' has no block for a weight of shape {tuple(W.shape)} made from "
            f"{', '.join(names)}: take route='sampled' or 'krylov'."
        )

    def _biases(self, uses: Sequence[Use], group: Sequence[int]) -> list[int]:
        edges = [uses[i].edge for i in group]
        return [
            j for j, use in enumerate(uses)
            if isinstance(use, Shift) and use.edge in edges and id(use.operand) in self._names
            and sum(other.operand is use.operand for other in uses) == 1
        ]  # fmt: skip

    def _require_all(self, at: Sensitivity, covered: set[str]) -> None:
        for use in at.uses:
            for leaf in leaves_of(use.operand) if id(use.operand) not in self._names else ():
                name = self._names.get(id(leaf))
                if name is not None and name not in covered:
                    raise ValueError(
                        f"route='kronecker' has no block for {name!r}, which the model uses only "
                        "through other tensors: take route='sampled' or 'krylov'."
                    )


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
        decay: Weight of the past in the averages.
        corrected: Estimate s itself.
    """

    def __init__(self, memory: Memory, controls: Controls, decay: float, corrected: bool) -> None:
        self.memory, self.decay, self.corrected = memory, decay, corrected
        self._shapes = dict(zip(controls.names, controls.shapes, strict=True))
        self._new: dict[str, dict[str, Tensor]] = defaultdict(dict)

    @property
    def ready(self) -> bool:
        """Whether every layer has its eigenvectors."""
        return all("U_A" in state for state in self.memory.values() if "A" in state)

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks of the metric."""
        for key, state in self.memory.items():
            members = tuple(Member.of(token, self._shapes) for token in key.split("+"))
            basis = (state["U_G"], state["U_A"]) if "A" in state else None
            yield Block(members, self.spectrum(key), basis, state.get("defect"))

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
                    _outputs(site, found[i])
                    for site, i in zip(group, sites.places[key], strict=True)
                ]
                self._see_outputs(key, inputs[key], torch.cat(pieces, 1), share)
            for name, places in sites.rest.items():
                rows = [at.uses[i].rows(g) for i in places if (g := found[i]) is not None]
                if rows:
                    self._add(name, "D", torch.stack(rows).sum(0).square().sum(0) * share)

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
            state["weight"] = self.decay * state["weight"] + (1 - self.decay)
            for what, value in new.items():
                keep = self.decay
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


def _outputs(site: Site, g: Tensor | None) -> Tensor:
    use = next(use for use, _ in site.uses if isinstance(use, Factored))
    assert isinstance(use, Factored)  # noqa: S101
    if g is None:
        a = use.inputs()
        out = use.operand.shape[1 if isinstance(use, MatMul) else 0]
        return a.new_zeros(*a.shape[:2], out)
    return use.outputs(g)


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


@dataclass
class KroneckerMetric:
    """A gradient, and the metric C of (K4) with its diagonal parts.

    Attributes:
        loss: The mean loss.
        gradient: Its gradient `(m,)`.
        solutions: The forward solves of the model's DEQ layers.
        controls: The parameters.
        factors: The metric.
    """

    loss: Tensor
    gradient: Tensor
    solutions: Sequence[FixedPointSolution]
    controls: Controls
    factors: Factors

    def solve(self, shifts: Sequence[float]) -> Direction:
        """Return u of (K5) for the damping of each parameter, one for each layer.

        Its residual is what the eigenvectors lack in orthogonality.
        """
        g = self.gradient
        by_name = dict(zip(self.controls.names, shifts, strict=True))
        named = self.controls.unflatten(g)
        u = {name: -value / by_name[name] for name, value in named.items()}
        bends, defects = [g.new_zeros(())], [g.new_zeros(())]
        for block in self.factors.blocks():
            c = block.coordinates(named)
            shift = _one(by_name, tuple(member.name for member in block.members))
            found = -c / (block.spectrum + shift)  # (K5)
            bends.append((block.spectrum * found.square()).sum())
            defects += [] if block.defect is None else [block.defect]
            u |= block.values(found)
        flat = self.controls.flatten(u)
        numbers = torch.stack(defects).amax(), g @ flat, torch.stack(bends).sum()
        return Direction(flat, *torch.stack(numbers).tolist())

    def times(self, v: Tensor) -> Tensor:
        """Return C v."""
        named = self.controls.unflatten(v)
        product: dict[str, Tensor] = {}
        for block in self.factors.blocks():
            product |= block.values(block.spectrum * block.coordinates(named))
        return self.controls.flatten(product)

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
