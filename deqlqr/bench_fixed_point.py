"""`deqlqr bench fixed-point`: our solvers beside plain iteration and torchdeq, on one thread."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from deqlqr.bench import in_turn
from deqlqr.fixed_point import fixed_point
from deqlqr.solution import ConvergenceError

SOLVERS = ("picard", "anderson", "broyden", "torchdeq:anderson", "torchdeq:broyden",
           "torchdeq:fixed_point_iter")  # fmt: skip
_TOL = 1e-6


@dataclass(frozen=True)
class FixedPointRow:
    """One solver on one problem; times in seconds.

    Attributes:
        problem: Name of the problem.
        solver: Name of the solver.
        converged: Share of samples that meet (FP1) at 1e-6.
        evaluations: Evaluations of f of the slowest sample.
        rows: Samples given to f over all evaluations.
        least_rows: Evaluations the samples needed, summed: no solver can do with fewer rows.
        seconds: Time of the solve.
        plain_seconds: Time of a bare loop z = f(z) of as many evaluations on the whole batch.
    """

    problem: str
    solver: str
    converged: float
    evaluations: int
    rows: int
    least_rows: int
    seconds: float
    plain_seconds: float


def problems() -> dict[str, tuple[Callable[..., Tensor], Tensor, tuple[Tensor, ...]]]:
    """Return the maps, starts and inputs, in float64, by name."""
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    found: dict[str, tuple[Callable[..., Tensor], Tensor, tuple[Tensor, ...]]] = {}
    S = rand(20, 20)
    A = 0.95 * (S + S.mT) / torch.linalg.eigvalsh(S + S.mT).abs().max()
    c = rand(16, 20)
    found["linear, rho 0.95"] = lambda z, c: z @ A + c, torch.zeros_like(c), (c,)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mlp = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)).double()
        conv = nn.Conv2d(12, 12, 3, padding=1).double()
    x = rand(64, 128)
    found["MLP d128 b64"] = lambda z, x: torch.tanh(1.5 * mlp(z) + x), torch.zeros_like(x), (x,)
    images = rand(32, 12, 28, 28)
    found["conv 12x28x28 b32"] = (
        lambda z, x: torch.relu(0.9 * conv(z) + x), torch.zeros_like(images), (images,)
    )  # fmt: skip
    turn = torch.linalg.qr(rand(50, 50))[0]
    rate, x = torch.linspace(0.1, 0.99, 64, dtype=torch.float64)[:, None], 0.1 * rand(64, 50)
    found["64 of mixed difficulty"] = (
        lambda z, x, rate: torch.tanh(rate * (z @ turn)) + x, torch.zeros_like(x), (x, rate)
    )  # fmt: skip
    return found


def bench_fixed_point(names: Iterable[str] | None = None) -> Iterable[FixedPointRow]:
    """Measure every solver on every problem, on one CPU thread.

    Args:
        names: Problems by name; all if `None`.

    Yields:
        A `FixedPointRow` for each pair.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1), torch.no_grad():
            for name, (f, z0, inputs) in problems().items():
                if names is None or name in names:
                    for solver in SOLVERS:
                        yield _row(name, solver, f, z0, inputs)
    finally:
        torch.set_num_threads(threads)


def table(rows: Iterable[FixedPointRow]) -> Iterable[str]:
    """Yield the lines of a table, each as soon as its row is there."""
    yield (
        f"{'problem':<24}{'solver':<26}{'converged':>9} {'evaluations':>11} {'rows':>7} "
        f"{'/least':>6} {'ms':>8} {'/plain':>7}"
    )
    for r in rows:
        yield (
            f"{r.problem:<24}{r.solver:<26}{r.converged:9.0%} {r.evaluations:11d} {r.rows:7d} "
            f"{r.rows / r.least_rows:6.2f} {1e3 * r.seconds:8.2f} "
            f"{r.seconds / r.plain_seconds:6.2f}x"
        )
    yield "/least: rows over the sum of what each sample needs. /plain: time over that of a bare"
    yield "loop of as many evaluations. Tolerance 1e-6."


def _row(
    problem: str, solver: str, f: Callable[..., Tensor], z0: Tensor, inputs: tuple[Tensor, ...]
) -> FixedPointRow:
    solve = lambda: fixed_point(
        f, z0, inputs=inputs, solver=solver, tol=_TOL, max_steps=1000, throw=False
    )
    try:
        found = solve()
    except ConvergenceError as error:
        raise RuntimeError(f"{solver} failed on {problem!r}: {error}") from error

    def plain() -> Tensor:
        z = z0
        for _ in range(int(found.evaluations.max())):
            z = f(z, *inputs)
        return z

    (seconds, _), (plain_seconds, _) = in_turn([solve, plain])
    return FixedPointRow(
        problem=problem,
        solver=solver,
        converged=float(found.converged.double().mean()),
        evaluations=int(found.evaluations.max()),
        rows=found.rows,
        least_rows=int(found.evaluations.sum()),
        seconds=seconds,
        plain_seconds=plain_seconds,
    )
