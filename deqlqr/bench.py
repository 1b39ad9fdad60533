"""`deqlqr bench dare`: `solve_dare` beside SciPy and SLICOT, in one run and on one thread."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.linalg import solve_discrete_are
from threadpoolctl import threadpool_limits
from torch import Tensor

from deqlqr._linalg import norm
from deqlqr.riccati import solve_dare

try:
    from slycot import sb02od
except ImportError:
    sb02od = None

BATCHES = ((256, 4), (256, 16), (256, 32), (256, 64))
SINGLES = tuple((1, n) for n in (16, 32, 64, 128, 256, 512))
_LEAST_SECONDS = 0.5  # a solver is repeated for so long, at least twice, and its best time counts
_ROUNDS = 6  # of all solvers in turn
_LONG_SECONDS = 4.0  # where they take so long together, one round does


@dataclass(frozen=True)
class DareRow:
    """One line: a batch of problems with n states and m = n / 2 inputs; times in seconds.

    Attributes:
        device: Where `solve_dare` ran; the peers run on the CPU.
        batch: Number of problems.
        n: States.
        m: Inputs.
        forward: `solve_dare`, with its certificate.
        backward: Gradient of a weighted sum of P with respect to A, B, Q, R.
        scipy: `scipy.linalg.solve_discrete_are`, one problem after the other.
        sb02od: SLICOT's routine through slycot, the same; `None` without slycot.
        residual: Largest relative residual of P in the Riccati equation, ours.
        scipy_residual: SciPy's.
        difference: Largest relative difference between the two P.
    """

    device: str
    batch: int
    n: int
    m: int
    forward: float
    backward: float
    scipy: float
    sb02od: float | None
    residual: float
    scipy_residual: float
    difference: float


def bench_dare(
    sizes: Iterable[tuple[int, int]] = BATCHES + SINGLES, device: str = "cpu"
) -> Iterable[DareRow]:
    """Measure, one row after the other, in float64.

    Args:
        sizes: Pairs (batch, n).
        device: Device of `solve_dare`; on the CPU it has one thread, like the peers.

    Yields:
        A `DareRow` for each pair.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            for batch, n in sizes:
                yield _row(batch, n, max(1, n // 2), device)
    finally:
        torch.set_num_threads(threads)


def random_problem(batch: int, n: int, m: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Return A, B, Q, R of unstable, stabilisable problems, in float64."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(batch, *shape, generator=g, dtype=torch.float64)
    A = rand(n, n) * 1.1 / n**0.5
    C = rand(n, n) / n**0.5
    eye = torch.eye(m, dtype=torch.float64)
    return A, rand(n, m), C.mT @ C, (1 + rand(1, 1) ** 2) * eye


def table(rows: Iterable[DareRow]) -> Iterable[str]:
    """Yield the lines of a table, each as soon as its row is there."""
    yield (
        f"{'device':>7} {'batch':>5} {'n':>4} {'m':>4} {'deqlqr ms':>10} {'backward':>9} "
        f"{'scipy':>8} {'sb02od':>8} {'residual':>9} {'scipy res':>9} {'P differs':>9}"
    )
    for r in rows:
        sb02od = "-" if r.sb02od is None else f"{r.sb02od / r.forward:.1f}x"
        yield (
            f"{r.device:>7} {r.batch:5d} {r.n:4d} {r.m:4d} {1e3 * r.forward:10.2f} "
            f"{r.backward / r.forward:8.2f}x {r.scipy / r.forward:7.1f}x {sb02od:>8} "
            f"{r.residual:9.1e} {r.scipy_residual:9.1e} {r.difference:9.1e}"
        )
    yield "backward, scipy, sb02od: their time over that of deqlqr's forward solve"


def _row(batch: int, n: int, m: int, device: str) -> DareRow:
    pieces = random_problem(batch, n, m)
    ours = tuple(X.to(device) for X in pieces)
    sync = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    arrays = [X.numpy() for X in pieces]
    problems = [tuple(X[i] for X in arrays) for i in range(batch)]
    works: list[Callable[[], Any]] = [
        lambda: solve_dare(*ours),
        _backward(ours),
        lambda: [solve_discrete_are(*p) for p in problems],
    ]
    if sb02od is not None:
        works.append(lambda: [sb02od(n, m, *p, "D")[0] for p in problems])
    (forward, dare), (backward, _), (scipy, theirs), *slicot = in_turn(works, sync)
    P, P_scipy = dare.P.cpu(), torch.as_tensor(np.stack(theirs))
    differs = float((norm(P - P_scipy) / norm(P)).max())
    for _, found in slicot:
        worst = float((norm(torch.as_tensor(np.stack(found)) - P) / norm(P)).max())
        if not worst < 1e-6:
            raise RuntimeError(f"sb02od and solve_dare differ by {worst:.1e}.")
    return DareRow(
        device, batch, n, m, forward, backward, scipy, slicot[0][0] if slicot else None,
        _residual(pieces, P), _residual(pieces, P_scipy), differs,
    )  # fmt: skip


def _backward(pieces: tuple[Tensor, ...]) -> Callable[[], Any]:
    leaves = tuple(X.detach().requires_grad_() for X in pieces)
    P = solve_dare(*leaves).P
    weights = torch.ones_like(P)
    return lambda: torch.autograd.grad(P, leaves, weights, retain_graph=True)


def _residual(pieces: tuple[Tensor, ...], P: Tensor) -> float:
    A, B, Q, R = pieces
    mixed = B.mT @ P @ A
    K = torch.linalg.solve(R + B.mT @ P @ B, mixed)
    return float((norm(A.mT @ P @ A + Q - mixed.mT @ K - P) / norm(P)).max())


def in_turn(
    works: Sequence[Callable[[], Any]], sync: Callable[[], None] = lambda: None
) -> list[tuple[float, Any]]:
    """Return `timed` of each work, the best of rounds in which one comes after the other.

    What else a machine does then slows one down as much as the other.
    """
    found = [timed(work, sync) for work in works]
    if sum(seconds for seconds, _ in found) > _LONG_SECONDS:
        return found
    for _ in range(_ROUNDS - 1):
        again = [timed(work, sync) for work in works]
        found = [min(a, b, key=lambda pair: pair[0]) for a, b in zip(found, again, strict=True)]
    return found


def timed(work: Callable[[], Any], sync: Callable[[], None] = lambda: None) -> tuple[float, Any]:
    """Return the best seconds of repeated runs, and the last result."""
    result, best, spent, runs = None, float("inf"), 0.0, 0
    while runs < 2 or spent < _LEAST_SECONDS:
        sync()
        start = time.perf_counter()
        result = work()
        sync()
        seconds = time.perf_counter() - start
        best, spent, runs = min(best, seconds), spent + seconds, runs + 1
        if seconds > 20 * _LEAST_SECONDS:
            break
    return best, result
