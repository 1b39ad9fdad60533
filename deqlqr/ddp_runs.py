"""Paired trainings with DDP's feedback and without: runs in files, learning rates, differences.

A pair has the same initial parameters, batches and options. A learning rate is chosen for the base
without feedback, on a seed of its own, as DDP adds a policy to a base that works.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
from deqlqr.solution import ConvergenceError

BASES = ("sgd", "rmsprop", "ekfac")
SETS = ("wine", "iris", "digits")
WIDTHS = {"wine": 10, "iris": 10, "digits": 20}
BATCHES = {"wine": 32, "iris": 32, "digits": 8}
LRS = {
    "sgd": (0.1, 0.4, 1.6, 6.4),
    "rmsprop": (0.001, 0.003, 0.01, 0.03),
    "ekfac": (0.03, 0.1, 0.3, 1.0),
}
# The base step of SGD and RMSprop has none: there it is of the feedback only.
DAMPINGS = {"sgd": (0.0, 1.0), "rmsprop": (0.0, 1.0), "ekfac": (0.03, 0.3)}
DEPTH = 5
GRID_SEED = 100  # not one of those compared
LOOKS = 20  # at all samples, in a training
CONFIDENCE = 0.95
_TAIL = 3  # looks over which a run is judged

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A training.

    Attributes:
        data: Name of the data set.
        base: The base optimiser.
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
    inputs: int, width: int, depth: int, outputs: int, seed: int, *, squashed: bool = False
) -> nn.Sequential:
    """Return linear layers with tanh between them, and a sigmoid at the end if `squashed`."""
    sizes = [inputs, *[width] * (depth - 1), outputs]
    layers: list[nn.Module] = [nn.Flatten()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for before, after in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1], *([nn.Sigmoid()] if squashed else []))


def train(run: Run) -> Row:
    """Train the paper's network (appendix D: a sigmoid at the end for wine).

    Returns:
        The run's options, the steps `at` which all samples were looked at, training `loss` and test
        `accuracy` there, how many steps were `rejected`, `rolled back` and `given up`, and why it
        ended early, or `None`, as `failure`.
    """
    data = load_data(run.data)
    model = dense_network(
        data.train_x[0].numel(), WIDTHS[run.data], DEPTH, data.outputs, run.seed,
        squashed=run.data == "wine",
    )  # fmt: skip
    optimizer: Any = DDP(
        model, base=run.base, feedback=run.feedback, lr=run.lr,
        damping=run.damping, seed=run.seed,
    )  # fmt: skip
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


@torch.no_grad()
def _measured(model: nn.Module, data: Data) -> dict[str, float | None]:
    """Return loss of all training samples, `None` if not finite, and accuracy of the test's."""
    loss = float(nn.functional.cross_entropy(model(data.train_x), data.train_y))
    right = model(data.test_x).argmax(1) == data.test_y
    return {"loss": loss if isfinite(loss) else None, "accuracy": float(right.double().mean())}


def trained(runs: Sequence[Run], out: Path, label: str) -> list[Row]:
    """Return what `train` says of each run; those with a file in the folder are not repeated."""
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for run in tqdm(runs, desc=label, disable=None):
        path = out / f"{run.name}.json"
        if not path.exists():
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(train(run)) + "\n")
            temporary.replace(path)
        rows.append(json.loads(path.read_text()))
    return rows


def judged(row: Row) -> float:
    """Return the mean training loss of a run's last looks, infinite if it failed."""
    last = row["loss"][-_TAIL:]
    return float("inf") if row["failure"] or None in last else mean(last)


def best_options(data: str, base: str, steps: int, out: Path) -> tuple[float, float]:
    """Return learning rate and damping of a grid with which the base itself ends lowest.

    The damping of a base without one is the first.
    """
    dampings = DAMPINGS[base] if base == "ekfac" else DAMPINGS[base][:1]
    runs = [
        Run(data, base, False, lr, damping, GRID_SEED, steps)
        for lr in LRS[base] for damping in dampings
    ]  # fmt: skip
    best = min(trained(runs, out, f"{data}, {base}, learning rates"), key=judged)
    return best["lr"], best["damping"]


def feedback_grid(data: str, base: str, steps: int, out: Path) -> list[Row]:
    """Return the runs with feedback over all learning rates and dampings."""
    runs = [
        Run(data, base, True, lr, damping, GRID_SEED, steps)
        for lr in LRS[base] for damping in DAMPINGS[base]
    ]  # fmt: skip
    return trained(runs, out, f"{data}, {base}, grid with feedback")


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


def pairs(
    data: str, base: str, lr: float, damping: float, seeds: int, steps: int, out: Path
) -> dict[str, list[Row]]:
    """Return the runs of each seed, `plain` and with `feedback`."""
    return {
        way: trained(
            [Run(data, base, way == "feedback", lr, damping, s, steps) for s in range(seeds)],
            out, f"{data}, {base}, {way}, lr {lr:g}",
        )
        for way in ("plain", "feedback")
    }  # fmt: skip


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
