"""Where a model's parameters act together: the layers of the Kronecker-factored metric."""

from collections import Counter, defaultdict
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deqlqr.rows import FEW
from deqlqr.sensitivity import Sensitivity
from deqlqr.uses import Factored, MatMul, Shift, Use, leaves_of


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

    def outputs(self, g: Tensor | None) -> Tensor:
        """Return g as `(batch, positions, out)`; zeros for a site without effect."""
        use = next(use for use, _ in self.uses if isinstance(use, Factored))
        if g is not None:
            return use.outputs(g)
        a = use.inputs()
        return a.new_zeros(*a.shape[:2], use.operand.shape[1 if isinstance(use, MatMul) else 0])


class Sites:
    """The layers of a model on one batch, and the parameters that are in none.

    Attributes:
        layers: For each layer (by its members' names, joined) the sites that share its weights.
        places: For each layer the number of the use whose cotangent each site reads.
        rest: The uses of each other parameter, by name.
        numbers: The uses of the few numbers that are made from parameters.
        made: The uses of parameters that enter, somewhere, through a tensor made from them that is
            no multiple of one, or both as a weight and as its transpose.
    """

    def __init__(self, at: Sensitivity, found: Sequence[Tensor | None]) -> None:
        controls = at.controls
        self._names = {id(p): n for n, p in zip(controls.names, controls.parameters, strict=True)}
        self._shapes = dict(zip(controls.names, controls.shapes, strict=True))
        self.numbers = numbers_of(at)
        owners = {i: self._owner(u) for i, u in enumerate(at.uses) if isinstance(u, Factored)}
        self.made = self._made(at.uses, owners)
        owners = {i: owner for i, owner in owners.items() if i not in self.made}
        often = Counter(owner[0] for owner in owners.values() if owner is not None)
        self.layers: dict[str, list[Site]] = defaultdict(list)
        self.places: dict[str, list[int]] = defaultdict(list)
        taken: set[int] = set(self.made)
        known = {i: owner for i, owner in owners.items() if owner is not None}
        for met in _meeting(at.uses, found, known):
            # A weight used at several sites has its layer to itself.
            together = all(often[known[i][0]] == 1 for i in met)
            for group in [met] if together else [[i] for i in met]:
                once = often[known[group[0]][0]] == 1
                biases = self._biases(at.uses, group) if once else []
                self._add(at.uses, group, biases, known)
                taken |= {*group, *biases}
        covered = {m.name for sites in self.layers.values() for m in sites[0].members}
        self.rest: dict[str, list[int]] = defaultdict(list)
        for i, use in enumerate(at.uses):
            name = self._names.get(id(use.operand))
            if i not in taken and name is not None and name not in covered:
                self.rest[name].append(i)

    def _add(
        self,
        uses: Sequence[Use],
        group: Sequence[int],
        biases: Sequence[int],
        owners: dict[int, tuple[str, float]],
    ) -> None:
        """Take weights and biases whose results are added as a site of their layer."""
        prime = lambda use: "'" if isinstance(use, MatMul) else ""
        tokens = [owners[i][0] + prime(uses[i]) for i in group]
        tokens += [self._names[id(uses[j].operand)] for j in biases]
        members = tuple(Member.of(token, self._shapes) for token in tokens)
        times = [(uses[i], owners[i][1]) for i in group] + [(uses[j], 1.0) for j in biases]
        key = "+".join(tokens)
        self.layers[key].append(Site(members, tuple(times)))
        self.places[key].append(group[0])

    def _owner(self, use: Use) -> tuple[str, float] | None:
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
        return None

    def _made(self, uses: Sequence[Use], owners: dict[int, tuple[str, float] | None]) -> set[int]:
        """Return the uses of all parameters of which one use has no place in a layer."""
        numbers = {i for places in self.numbers for i in places}
        reached = {i: self._reached(use) for i, use in enumerate(uses) if i not in numbers}
        ways: dict[str, set[bool]] = defaultdict(set)
        for i, owner in owners.items():
            if owner is not None:
                ways[owner[0]].add(isinstance(uses[i], MatMul))
        both = {name for name, found in ways.items() if len(found) > 1}
        covered = set(ways)
        made = {
            i for i, names in reached.items()
            if names & both or (id(uses[i].operand) not in self._names
                                and (owners.get(i) is None or not names <= covered))
        }  # fmt: skip
        while True:
            names = set().union(*(reached[i] for i in made))
            more = {i for i in reached if reached[i] & names}
            if more <= made:
                return made
            made |= more

    def _reached(self, use: Use) -> set[str]:
        """Return the parameters that an operand is, or is made from."""
        if id(use.operand) in self._names:
            return {self._names[id(use.operand)]}
        return {self._names[id(v)] for v in leaves_of(use.operand) if id(v) in self._names}

    def _biases(self, uses: Sequence[Use], group: Sequence[int]) -> list[int]:
        edges = [uses[i].edge for i in group]
        return [
            j for j, use in enumerate(uses)
            if isinstance(use, Shift) and use.edge in edges and id(use.operand) in self._names
            and sum(other.operand is use.operand for other in uses) == 1
        ]  # fmt: skip


def _meeting(
    uses: Sequence[Use], found: Sequence[Tensor | None], among: Container[int]
) -> list[list[int]]:
    """Return the uses of weights whose results are added: their cotangent is the same tensor."""
    grouped: dict[Any, list[int]] = defaultdict(list)
    for i, (use, g) in enumerate(zip(uses, found, strict=True)):
        if i in among and isinstance(use, Factored) and g is not None:
            grouped[g.data_ptr(), g.shape, g.stride()].append(i)
    return list(grouped.values())


def numbers_of(at: Sensitivity) -> list[list[int]]:
    """Return the uses of each tensor of few entries that a model makes from its parameters."""
    own = {id(p) for p in at.controls.parameters}
    found: dict[int, list[int]] = defaultdict(list)
    for i, use in enumerate(at.uses):
        operand = use.operand
        if id(operand) not in own and not isinstance(use, Factored) and operand.numel() <= FEW:
            found[id(operand)].append(i)
    return list(found.values())
