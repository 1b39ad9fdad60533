"""`deqlqr bench step`: time and memory of a step by each route, over those of gradient descent."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits
from torch import nn

from deqlqr.blocks import ConvBlock
from deqlqr.deq import DEQ
from deqlqr.optim import ImplicitNGD
from deqlqr.routes import Kronecker, Krylov, Sampled

_ROUNDS = 4  # each step is timed so many times, in turn; the best counts
_STEPS = {"kronecker": 50}  # a round: what happens every 50 steps is in it once

# Options beside the route; the first step of each kind is the plainest.
VARIANTS: dict[str, dict[str, Any]] = {
    "kronecker": {"route": Kronecker(), "check_every": 10},
    "sampled": {"route": "sampled", "check_every": 10},
    "sampled, checked": {"route": "sampled"},
    "sampled, exact rows": {"route": Sampled(tol=None), "check_every": 10},
    "output": {"route": "output", "check_every": 10},
    "krylov, 10 iterations": {
        "route": Krylov(max_steps=10, progress=0.0, tol=0.0), "check_every": 10,
    },
}  # fmt: skip


@dataclass(frozen=True)
class StepRow:
    """One kind of step.

    Attributes:
        step: Its name.
        seconds: Time.
        over: Time over that of gradient descent.
        memory: Peak memory over that of the loaded model, MiB.
        memory_over: The same over that of gradient descent.
    """

    step: str
    seconds: float
    over: float
    memory: float
    memory_over: float


def bench_step(
    batch: int = 64, side: int = 14, device: str = "cpu", *, half: bool = False
) -> Iterable[StepRow]:
    """Measure on the thesis' block: 8 channels, 12 inner, `side` x `side` pixels, 10 classes.

    On the CPU one thread; memory at a batch of 128, each kind of step in a process of its own
    (Linux: the peak of the resident set).

    Args:
        batch: Samples of a timed step.
        side: Pixels.
        device: Where.
        half: Under bfloat16 autocast.

    Yields:
        A `StepRow` for gradient descent, then for each variant.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            seconds = _times(batch, side, device, half)
    finally:
        torch.set_num_threads(threads)
    base = 0.0
    for name, spent in seconds.items():
        memory = _memory_on(device, name, side, half)
        base = base or memory
        plain = seconds["gradient descent"]
        yield StepRow(name, spent, spent / plain, memory, memory / base)


def table(rows: Iterable[StepRow]) -> Iterable[str]:
    """Yield the lines of a table, each as soon as its row is there."""
    yield f"{'step':<24}{'ms':>9} {'over':>7} {'peak MiB':>9} {'over':>7}"
    for r in rows:
        yield (
            f"{r.step:<24}{1e3 * r.seconds:9.1f} {r.over:6.2f}x {r.memory:9.0f} "
            f"{r.memory_over:6.2f}x"
        )
    yield "over: of gradient descent. ms amortised over 50 steps for kronecker."


def _times(batch: int, side: int, device: str, half: bool) -> dict[str, float]:
    """Return the best seconds of each kind of step, all measured in turn."""
    sync = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    steps = {
        name: _step(name, batch, side, device, half) for name in ("gradient descent", *VARIANTS)
    }
    best = dict.fromkeys(steps, float("inf"))
    for round_ in range(_ROUNDS + 1):  # the first warms up
        for name, step in steps.items():
            count = _STEPS.get(name, 10 if "checked" not in name else 3)
            sync()
            start = time.perf_counter()
            for _ in range(count):
                step()
            sync()
            if round_:
                best[name] = min(best[name], (time.perf_counter() - start) / count)
    return best


def _step(name: str, batch: int, side: int, device: str, half: bool) -> Callable[[], object]:
    """Return what takes one step on a batch of noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1), DEQ(ConvBlock(8)),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10),
        ).to(device)  # fmt: skip
        x = torch.randn(batch, 1, 2 * side, 2 * side).to(device)
        y = torch.randint(0, 10, (batch,)).to(device)
    cast = lambda: torch.autocast(device.split(":")[0], torch.bfloat16, enabled=half)
    if name == "gradient descent":
        sgd = torch.optim.SGD(model.parameters(), lr=0.01)

        def descend() -> None:
            sgd.zero_grad()
            with cast():
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            sgd.step()

        return descend
    optimizer = ImplicitNGD(model, lr=0.05, damping=0.3, **VARIANTS[name])

    def step() -> None:
        with cast():
            optimizer.step(x, y)

    return step


def _memory_on(device: str, name: str, side: int, half: bool) -> float:
    """Return the peak MiB of some steps at a batch of 128, over what was there before."""
    if device.startswith("cuda"):
        step = _step(name, 128, side, device, half)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(4):
            step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    code = f"from deqlqr.bench_step import peak; peak({name!r}, {side}, {half})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


def peak(name: str, side: int, half: bool) -> None:
    """Print the peak MiB of some steps on the CPU; for a process of its own."""
    torch.set_num_threads(1)
    step = _step(name, 128, side, "cpu", half)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    for _ in range(4):
        step()
    print((_status("VmHWM") - before) / 1024)


def _status(name: str) -> int:
    """Return a line of /proc/self/status, KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))
