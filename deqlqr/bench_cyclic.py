"""`deqlqr bench cyclic`: `solve_cyclic_dare` beside the lifted DARE through SciPy."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from scipy.linalg import solve_discrete_are
from threadpoolctl import threadpool_limits
from torch import Tensor

from deqlqr._linalg import norm, sym
from deqlqr.bench import timed
from deqlqr.cyclic_riccati import solve_cyclic_dare
from deqlqr.scan import following
from deqlqr.search import lifted

Cycle = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]

# name -> states and controls of the phases
CYCLES: dict[str, tuple[list[int], list[int]]] = {
    "p 3, n 8": ([8] * 3, [2] * 3),
    "p 5, n 10 to 2": ([10, 8, 6, 4, 2], [5] * 5),
    "p 10, n 10": ([10] * 10, [5] * 10),
    "p 4, n 64 to 8": ([64, 32, 8, 32], [16, 0, 16, 4]),
    "p 40, n 4": ([4] * 40, [1] * 40),
    "p 120, n 4": ([4] * 120, [1] * 120),
}


@dataclass(frozen=True)
class CyclicRow:
    """One line: a cycle, and the times in seconds.

    Attributes:
        name: Of the cycle.
        device: Where `solve_cyclic_dare` ran; the lift runs on the CPU.
        phases: Number of phases.
        states: Number of states of all phases: the size of the lift.
        forward: `solve_cyclic_dare`, with its certificate.
        backward: Gradient of the sum of all P with respect to A, B, Q, R.
        sweeps: The same by value iteration.
        lift: `scipy.linalg.solve_discrete_are` on the lifted problem.
        residual: Largest relative residual of P, ours.
        lift_residual: That of the lift.
        difference: Largest relative difference between the two P.
    """

    name: str
    device: str
    phases: int
    states: int
    forward: float
    backward: float
    sweeps: float
    lift: float
    residual: float
    lift_residual: float
    difference: float


def bench_cyclic(names: Iterable[str] | None = None, device: str = "cpu") -> Iterable[CyclicRow]:
    """Measure, one row after the other, in float64.

    Args:
        names: Of `CYCLES`; all if `None`.
        device: Device of `solve_cyclic_dare`; on the CPU it has one thread, like the lift.

    Yields:
        A `CyclicRow` for each.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            for name in CYCLES if names is None else names:
                yield _row(name, device)
    finally:
        torch.set_num_threads(threads)


def random_cycle(n: Sequence[int], m: Sequence[int], seed: int = 0) -> Cycle:
    """Return A, B, Q, R of a random cycle whose phases are unstable where n does not fall."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    ahead = following(n)
    A = [rand(j, i) * 1.1 / max(i, j) ** 0.5 for i, j in zip(n, ahead, strict=True)]
    B = [rand(j, k) for j, k in zip(ahead, m, strict=True)]
    C = [rand(i, i) / i**0.5 for i in n]
    R = [torch.eye(k, dtype=torch.float64) for k in m]
    return A, B, [X.mT @ X for X in C], R


def table(rows: Iterable[CyclicRow]) -> Iterable[str]:
    """Yield the lines of a table, each as soon as its row is there."""
    yield (
        f"{'cycle':<15} {'device':>6} {'deqlqr ms':>10} {'backward':>9} {'sweeps':>8} {'lift':>9} "
        f"{'residual':>9} {'lift res':>9} {'P differs':>9}"
    )
    for r in rows:
        yield (
            f"{r.name:<15} {r.device:>6} {1e3 * r.forward:10.2f} {r.backward / r.forward:8.2f}x "
            f"{r.sweeps / r.forward:7.1f}x {r.lift / r.forward:8.1f}x {r.residual:9.1e} "
            f"{r.lift_residual:9.1e} {r.difference:9.1e}"
        )
    yield "backward, sweeps (value iteration), lift (SciPy): their time over that of the solve"


def _row(name: str, device: str) -> CyclicRow:
    n, m = CYCLES[name]
    cycle = random_cycle(n, m)
    ours = [[X.to(device) for X in Xs] for Xs in cycle]
    sync = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    forward, dare = timed(lambda: solve_cyclic_dare(*ours), sync)
    sweeps, _ = timed(lambda: solve_cyclic_dare(*ours, method="value-iteration"), sync)
    leaves = [[X.detach().requires_grad_() for X in Xs] for Xs in ours]
    total = torch.stack([P.sum() for P in solve_cyclic_dare(*leaves).P]).sum()
    flat = [X for Xs in leaves for X in Xs if X.numel()]
    backward, _ = timed(lambda: torch.autograd.grad(total, flat, retain_graph=True), sync)
    phases = [
        (A, B, Q, R, B.new_zeros(B.shape[1], A.shape[1])) for A, B, Q, R in zip(*cycle, strict=True)
    ]
    whole = [X.numpy() for X in lifted(phases)[:4]]
    lift, stacked = timed(lambda: solve_discrete_are(*whole))
    ends = itertools.pairwise(itertools.accumulate(n, initial=0))
    theirs = [torch.as_tensor(stacked[i:j, i:j]) for i, j in ends]
    P = [X.cpu() for X in dare.P]
    differs = max(float(norm(x - y) / norm(y)) for x, y in zip(P, theirs, strict=True))
    return CyclicRow(
        name, device, len(n), sum(n), forward, backward, sweeps, lift, _residual(cycle, P),
        _residual(cycle, [sym(X) for X in theirs]), differs,
    )  # fmt: skip


def _residual(cycle: Cycle, P: Sequence[Tensor]) -> float:
    worst = 0.0
    for A, B, Q, R, X, ahead in zip(*cycle, P, following(P), strict=True):
        mixed = B.mT @ ahead @ A
        K = torch.linalg.solve(R + B.mT @ ahead @ B, mixed)
        worst = max(worst, float(norm(A.mT @ ahead @ A + Q - mixed.mT @ K - X) / norm(X)))
    return worst
