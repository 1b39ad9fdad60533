"""Paired trainings with DDP's feedback and without: runs in files, learning rates, differences.

A pair has the same initial parameters, batches and options. A learning rate is chosen for the base
without feedback, on a seed of its own, as DDP adds a policy to a base that works.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from math import isfinite, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from scipy.stats import t as student
from torch import nn
from tqdm import tqdm

from deqlqr.data import Data, load_data
from deqlqr.ddp import DDP
from deqlqr.ddp_base import EKFAC
from deqlqr.optim import ImplicitNGD
from deqlqr.solution import ConvergenceError

BASES = ("sgd", "rmsprop", "ekfac")
SETS = ("wine", "iris", "digits", "mnist")
WIDTHS = {"wine": 10, "iris": 10, "digits": 20, "mnist": 32}
BATCHES = {"wine": 32, "iris": 32, "digits": 8, "mnist": 16}
# Learning rates and dampings that a search begins with, and all that it may go to.
LRS: dict[str, tuple[float, ...]] = {
    "sgd": (0.1, 0.3, 1.0),
    "rmsprop": (0.003, 0.01, 0.03),
    "kfac": (0.003, 0.01, 0.03),
    "ekfac": (0.003, 0.01, 0.03),
    "full": (0.1, 0.3, 1.0),
}
DAMPINGS: dict[str, tuple[float, ...]] = {
    "kfac": (0.003, 0.01, 0.03),
    "ekfac": (0.003, 0.01, 0.03),
    "full": (0.3, 1.0, 3.0),
}
LADDER = tuple(float(f"{digit}e{power}") for power in range(-5, 3) for digit in (1, 3))
BEYOND = 2  # learning rates above those searched, where failures are counted
# The base step of SGD and RMSprop has none: there it is of the feedback only.
OF_FEEDBACK = (0.0, 1.0)
DEPTH = 5
GRID_SEED = 100  # not one of those compared
LOOKS = 20  # at all samples, in a training
CONFIDENCE = 0.95
_TAIL = 3  # looks over which a run is judged
_NO_LIMIT = 1e300  # of the rise of the loss, as in DDP

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A training.

    Attributes:
        data: Name of the data set.
        base: The base optimiser of `DDP`, or `"kfac"`, which takes no feedback.
        feedback: Whether K is applied.
        lr: Learning rate.
        damping: Of Q_uu.
        seed: Of parameters and batches.
        steps: Batches.
    """

    data: str
    base: str
    feedback: bool
    lr: float
    damping: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """A file's name with all options."""
        way = "feedback" if self.feedback else "plain"
        return (
            f"{self.data}-{self.base}-{way}-lr{self.lr:g}-damping{self.damping:g}"
            f"-seed{self.seed}-steps{self.steps}"
        )


def dense_network(
    inputs: int,
    width: int,
    depth: int,
    outputs: int,
    seed: int,
    *,
    activation: type[nn.Module] = nn.Tanh,
    squashed: bool = False,
) -> nn.Sequential:
    """Return linear layers, an activation between them, and a sigmoid at the end if `squashed`."""
    sizes = [inputs, *[width] * (depth - 1), outputs]
    layers: list[nn.Module] = [nn.Flatten()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for before, after in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1], *([nn.Sigmoid()] if squashed else []))


def train(run: Run, data_root: Path | None = None) -> Row:
    """Train the paper's network (appendix D: a sigmoid at the end for wine, ReLU for MNIST).

    Args:
        run: The training.
        data_root: For MNIST, as for `load_data`.

    Returns:
        The run's options, the steps `at` which all samples were looked at, training `loss` and test
        `accuracy` there, how many steps were `rejected`, `rolled back` and `given up`, and why it
        ended early, or `None`, as `failure`.
    """
    data = _loaded(run.data, data_root)
    model = dense_network(
        data.train_x[0].numel(), WIDTHS[run.data], DEPTH, data.outputs, run.seed,
        activation=nn.ReLU if run.data == "mnist" else nn.Tanh, squashed=run.data == "wine",
    )  # fmt: skip
    optimizer = _optimizer(run, model)
    generator = torch.Generator().manual_seed(run.seed)
    failure = None
    looks: dict[str, list[Any]] = {"at": [0]}
    looks |= {name: [value] for name, value in _measured(model, data).items()}
    for step in range(1, run.steps + 1):
        chosen = torch.randint(len(data.train_x), (BATCHES[run.data],), generator=generator)
        try:
            optimizer.step(data.train_x[chosen], data.train_y[chosen])
        except (ConvergenceError, torch.linalg.LinAlgError) as error:
            failure = f"step {step}: {type(error).__name__}: {error}"
            break
        if step % max(1, run.steps // LOOKS) == 0 or step == run.steps:
            looks["at"].append(step)
            for name, value in _measured(model, data).items():
                looks[name].append(value)
    counts = {n: optimizer.counts[n] for n in ("rejected", "rolled back", "given up")}
    return {**asdict(run), **looks, **counts, "failure": failure}


@lru_cache
def _loaded(name: str, data_root: Path | None) -> Data:
    """Return a data set; of MNIST half the training samples, as in the paper."""
    data = load_data(name, data_root)
    return data.first(len(data.train_x) // 2) if name == "mnist" else data


def _optimizer(run: Run, model: nn.Module) -> Any:
    options: dict[str, Any] = {"lr": run.lr, "damping": run.damping}
    if run.base != "kfac":
        return DDP(model, base=run.base, feedback=run.feedback, seed=run.seed, **options)
    route = replace(EKFAC().route(), corrected=False)  # all else as the base `"ekfac"` has it
    return ImplicitNGD(model, route=route, max_increase=_NO_LIMIT, **options)


@torch.no_grad()
def _measured(model: nn.Module, data: Data) -> dict[str, float | None]:
    """Return loss of all training samples, `None` if not finite, and accuracy of the test's."""
    loss = float(nn.functional.cross_entropy(model(data.train_x), data.train_y))
    right = model(data.test_x).argmax(1) == data.test_y
    return {"loss": loss if isfinite(loss) else None, "accuracy": float(right.double().mean())}


def judged(row: Row) -> float:
    """Return the mean training loss of a run's last looks, infinite if it failed."""
    last = row["loss"][-_TAIL:]
    return float("inf") if row["failure"] or None in last else mean(last)


@dataclass(frozen=True)
class Choice:
    """The options with which a base itself ends lowest, and those it was compared with.

    Attributes:
        lr: Learning rate.
        damping: Of Q_uu.
        lrs: All learning rates, ascending.
        dampings: All dampings, ascending.
    """

    lr: float
    damping: float
    lrs: tuple[float, ...]
    dampings: tuple[float, ...]

    @property
    def at_the_edge(self) -> bool:
        """Whether the best may lie beyond what was compared."""
        searched = len(self.dampings) > 1 and self.damping in (self.dampings[0], self.dampings[-1])
        return searched or self.lr in (self.lrs[0], self.lrs[-1])


@dataclass(frozen=True)
class Study:
    """Trainings of as many steps, each kept in a file; one that has its file is not repeated.

    Attributes:
        out: Folder of the files.
        steps: Of a training.
        data_root: For MNIST, as for `load_data`.
    """

    out: Path
    steps: int
    data_root: Path | None = None

    def trained(self, runs: Sequence[Run], label: str) -> list[Row]:
        """Return what `train` says of each run."""
        self.out.mkdir(parents=True, exist_ok=True)
        rows = []
        for run in tqdm(runs, desc=label, disable=None):
            path = self.out / f"{run.name}.json"
            if not path.exists():
                temporary = path.with_suffix(".tmp")
                temporary.write_text(json.dumps(train(run, self.data_root)) + "\n")
                temporary.replace(path)
            rows.append(json.loads(path.read_text()))
        return rows

    def best(self, data: str, base: str) -> Choice:
        """Return the options of a grid with which the base itself ends lowest.

        The grid grows along the ladder until its best lies within. The damping of a base without
        one is 0.
        """
        lrs, dampings = LRS[base], DAMPINGS.get(base, (0.0,))
        while True:
            rows = self._grid(data, base, False, lrs, dampings)
            found = min(rows, key=judged)
            wider = _widened(lrs, found["lr"]), _widened(dampings, found["damping"])
            if wider == (lrs, dampings):
                return Choice(found["lr"], found["damping"], lrs, dampings)
            lrs, dampings = wider

    def feedback_grid(
        self, data: str, base: str, lrs: Sequence[float], dampings: Sequence[float]
    ) -> list[Row]:
        """Return the runs with feedback over learning rates, and some above them, and dampings.

        A base without damping takes those of `OF_FEEDBACK`.
        """
        above = [lr for lr in LADDER if lr > max(lrs)][:BEYOND]
        dampings = dampings if base in DAMPINGS else OF_FEEDBACK
        return self._grid(data, base, True, (*lrs, *above), dampings)

    def _grid(
        self, data: str, base: str, on: bool, lrs: Sequence[float], dampings: Sequence[float]
    ) -> list[Row]:
        runs = [
            Run(data, base, on, lr, damping, GRID_SEED, self.steps)
            for lr in lrs for damping in dampings
        ]  # fmt: skip
        return self.trained(runs, f"{data}, {base}, grid{' with feedback' if on else ''}")

    def seeds(
        self, data: str, base: str, on: bool, lr: float, damping: float, seeds: int
    ) -> list[Row]:
        """Return the runs of each seed."""
        runs = [Run(data, base, on, lr, damping, seed, self.steps) for seed in range(seeds)]
        way = "feedback" if on else "plain"
        return self.trained(runs, f"{data}, {base}, {way}, lr {lr:g}")

    def pairs(
        self, data: str, base: str, lr: float, damping: float, seeds: int
    ) -> dict[str, list[Row]]:
        """Return the runs of each seed, `plain` and with `feedback`."""
        run = lambda on: self.seeds(data, base, on, lr, damping, seeds)
        return {"plain": run(False), "feedback": run(True)}


def _widened(values: tuple[float, ...], best: float) -> tuple[float, ...]:
    """Return ascending values, with the ladder's next where the best lies at an end of several."""
    if len(values) == 1:
        return values
    if best == values[0]:
        return (*[v for v in LADDER if v < best][-1:], *values)
    if best == values[-1]:
        return (*values, *[v for v in LADDER if v > best][:1])
    return values


def failures(rows: Sequence[Row]) -> Row:
    """Count runs: ended by an error, with a loss not finite, above the loss they began with."""
    return {
        "runs": len(rows),
        "errors": sum(row["failure"] is not None for row in rows),
        "not finite": sum(None in row["loss"] for row in rows),
        "above the start": sum(judged(row) > row["loss"][0] for row in rows),
        "steps rejected": sum(row["rejected"] for row in rows),
        "steps given up": sum(row["given up"] for row in rows),
    }


def paired_difference(plain: Sequence[float], feedback: Sequence[float]) -> tuple[float, float]:
    """Return the mean of feedback minus plain and half its 95 % confidence interval (Student's t).

    Raises:
        ValueError: If there are not two pairs, or a different number of each.
    """
    if len(plain) != len(feedback) or len(plain) < 2:
        raise ValueError(
            f"plain and feedback must be pairs, at least two, got {len(plain)} and "
            f"{len(feedback)} numbers."
        )
    change = [f - p for p, f in zip(plain, feedback, strict=True)]
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, len(change) - 1))
    return mean(change), quantile * stdev(change) / sqrt(len(change))


def last(rows: Mapping[str, Sequence[Row]], measure: str) -> dict[str, list[float]]:
    """Return a measure at the end, of the seeds whose runs both have one that is finite."""
    ended = {way: [_end(row, measure) for row in own] for way, own in rows.items()}
    whole = [None not in pair for pair in zip(*ended.values(), strict=True)]
    return {
        way: [v for v, take in zip(values, whole, strict=True) if take and v is not None]
        for way, values in ended.items()
    }


def _end(row: Row, measure: str) -> float | None:
    if row["failure"] is not None or row["loss"][-1] is None:
        return None
    return float(row[measure][-1])
