"""`deqlqr bench ddp`: what the feedback of DDP adds to the time of its base optimiser's step."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch import nn

from deqlqr.ddp import DDP
from deqlqr.ddp_base import EKFAC, SGD, Base, RMSprop

_ROUNDS = 6  # after one that warms up
_STEPS = 10  # a round, of which each is timed by itself; one has a look at the metric of EKFAC

SIZES = tuple(
    (batch, width, depth) for depth in (5, 20) for width in (20, 128) for batch in (8, 64)
)
# The metric of EKFAC is looked at in every step, as in the paper's, or in every tenth.
BASES: dict[str, tuple[Base, dict[str, Any]]] = {
    "sgd": (SGD(), {"lr": 0.01}),
    "rmsprop": (RMSprop(), {"lr": 1e-4}),
    "ekfac": (EKFAC(update_every=1), {"lr": 0.01, "damping": 0.3}),
    "ekfac, every 10": (EKFAC(), {"lr": 0.01, "damping": 0.3}),
}
# Options beside the base; the first is the exact policy.
VARIANTS: dict[str, dict[str, Any]] = {
    "exact": {"coupling": "batch", "fisher": "exact"},
    "sample": {"coupling": "sample", "fisher": "exact"},
    "sampled": {"coupling": "batch", "fisher": "sampled"},
    "both": {"coupling": "sample", "fisher": "sampled"},
}


@dataclass(frozen=True)
class DDPRow:
    """One kind of step on one network.

    Attributes:
        batch: Samples.
        width: Of the hidden layers.
        depth: Layers.
        base: The base optimiser.
        seconds: Time of its step.
        over: Time of the step with feedback over that, for each of `VARIANTS`.
    """

    batch: int
    width: int
    depth: int
    base: str
    seconds: float
    over: dict[str, float]


def bench_ddp(
    sizes: Sequence[tuple[int, int, int]] = SIZES, bases: Sequence[str] = tuple(BASES)
) -> Iterable[DDPRow]:
    """Measure on dense networks, 64 inputs, 10 classes, tanh, one thread.

    What is timed is the processor's time of a whole step. All kinds take their j-th step of a round
    one after the other; of its times in the rounds the least counts, which other work on the
    machine disturbs least.

    Args:
        sizes: Batch, width and depth of each network.
        bases: Of `BASES`.

    Yields:
        A `DDPRow` for each network and base.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            for size in sizes:
                for base in bases:
                    seconds = _times(*size, base)
                    plain = seconds.pop("")
                    over = {name: spent / plain for name, spent in seconds.items()}
                    yield DDPRow(*size, base, plain, over)
    finally:
        torch.set_num_threads(threads)


def table(rows: Iterable[DDPRow]) -> Iterable[str]:
    """Yield the lines of a table, each as soon as its row is there."""
    yield f"{'batch':>5} {'width':>5} {'depth':>5}  {'base':<16}{'ms':>8}" + "".join(
        f"{name:>9}" for name in VARIANTS
    )
    for r in rows:
        yield f"{r.batch:5} {r.width:5} {r.depth:5}  {r.base:<16}{1e3 * r.seconds:8.2f}" + "".join(
            f"{r.over[name]:8.2f}x" for name in VARIANTS
        )
    yield "ms: of the base's step. The others: the step with feedback over it."


def _times(batch: int, width: int, depth: int, base: str) -> dict[str, float]:
    """Return the seconds of the base's step, "", and of each variant."""
    steps = {
        name: _step(batch, width, depth, base, options)
        for name, options in {"": {"feedback": False}, **VARIANTS}.items()
    }
    least = {name: [float("inf")] * _STEPS for name in steps}
    for round_ in range(_ROUNDS + 1):
        for j in range(_STEPS):
            for name, step in steps.items():
                begin = time.process_time()
                step()
                if round_:
                    least[name][j] = min(least[name][j], time.process_time() - begin)
    return {name: sum(spent) / _STEPS for name, spent in least.items()}


def _step(
    batch: int, width: int, depth: int, base: str, options: dict[str, Any]
) -> Callable[[], object]:
    """Return what takes one step on a batch of noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = [64, *[width] * (depth - 1), 10]
        layers: list[nn.Module] = []
        for before, after in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(before, after), nn.Tanh()]
        model = nn.Sequential(*layers[:-1])
        x, y = torch.randn(batch, 64), torch.randint(0, 10, (batch,))
    chosen, numbers = BASES[base]
    optimizer = DDP(model, base=chosen, **numbers, **options)
    return lambda: optimizer.step(x, y)
