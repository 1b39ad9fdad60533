"""`deqlqr bench ddp`: what the feedback of DDP adds to the time of its base optimiser's step."""

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from threadpoolctl import threadpool_limits
from torch import nn

from deqlqr.batch import Batch
from deqlqr.ddp import DDP
from deqlqr.ddp_base import EKFAC, SGD, Base, RMSprop
from deqlqr.ddp_forward import Rules
from deqlqr.sensitivity import Sensitivity

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


# Where EKFAC and DDP on it pass forward: what they linearise, the check and the roll-out.
_FORWARD: tuple[tuple[type, str], ...] = (
    (Sensitivity, "__init__"), (Batch, "loss_now"), (Rules, "searched"),
)  # fmt: skip


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
        backward: The same of the steps less their forward passes, with EKFAC.
    """

    batch: int
    width: int
    depth: int
    base: str
    seconds: float
    over: dict[str, float]
    backward: dict[str, float]


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
                    whole, backward = _times(*size, base)
                    plain = whole[""]
                    if not base.startswith("ekfac"):
                        backward = {}
                    yield DDPRow(*size, base, plain, _over(whole), _over(backward))
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
        if r.backward:
            yield f"{'':17}  {'  backward':<16}{'':8}" + "".join(
                f"{r.backward[name]:8.2f}x" for name in VARIANTS
            )
    yield "ms: of the base's step. The others: the step with feedback over it."
    yield "backward: both without their forward passes (linearised, roll-out, check of the loss)."


def _over(seconds: dict[str, float]) -> dict[str, float]:
    return {name: spent / seconds[""] for name, spent in seconds.items() if name}


def _times(
    batch: int, width: int, depth: int, base: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the seconds of the base's step, "", and of each variant, whole and backward."""
    steps = {
        name: _step(batch, width, depth, base, options)
        for name, options in {"": {"feedback": False}, **VARIANTS}.items()
    }
    whole = {name: [float("inf")] * _STEPS for name in steps}
    backward = {name: [float("inf")] * _STEPS for name in steps}
    with _forward_timed() as forward:
        for round_ in range(_ROUNDS + 1):
            for j in range(_STEPS):
                for name, step in steps.items():
                    forward.clear()
                    begin = time.process_time()
                    step()
                    spent = time.process_time() - begin
                    if round_:
                        whole[name][j] = min(whole[name][j], spent)
                        backward[name][j] = min(backward[name][j], spent - sum(forward))
    mean = lambda seconds: {name: sum(each) / _STEPS for name, each in seconds.items()}
    return mean(whole), mean(backward)


@contextmanager
def _forward_timed() -> Generator[list[float], None, None]:
    """Within this context the seconds of every forward pass of `_FORWARD` are put into a list."""
    seconds: list[float] = []

    def timed(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            begin = time.process_time()
            found = run(*args, **options)
            seconds.append(time.process_time() - begin)
            return found

        return call

    with ExitStack() as stack:
        for owner, name in _FORWARD:
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name))))
        yield seconds


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
