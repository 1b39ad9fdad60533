"""`deqlqr bench train` and `deqlqr bench regression`: every route beside first-order optimizers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deqlqr._checks import choice
from deqlqr.race import Options, Race


@dataclass(frozen=True)
class _Mnist:
    """A race on MNIST.

    Attributes:
        model: Which model.
        batch: Samples of a step.
        epochs: Budget of the first-order optimizers, and ours.
        grid: Step length, damping and trust region of the Kronecker route.
        targets: Test accuracies.
        rates: Learning rates of SGD and of Adam that are raced over shorter budgets too.
        lengths: Those budgets, in steps.
        short: Options as in `grid` that are raced over a shorter budget, and that in steps.
        all_routes: Whether the other routes take part.
    """

    model: str
    batch: int
    epochs: tuple[int, int]
    grid: tuple[tuple[float, float, float], ...]
    targets: tuple[float, ...]
    rates: tuple[float, float]
    lengths: tuple[int, ...]
    short: tuple[tuple[tuple[float, float, float], ...], int]
    all_routes: bool = True


_MNIST = {
    "dense": _Mnist(
        "dense-large", 128, (3, 3), ((0.2, 0.03, 1e-3), (0.2, 0.1, 1e-3)), (0.95, 0.97, 0.973),
        rates=(0.1, 1e-2), lengths=(700,), short=(((0.2, 0.03, 1e-3),), 700),
    ),
    "dense-512": _Mnist(
        "dense-large", 512, (6, 4), ((0.5, 0.03, 3e-3), (0.5, 0.1, 3e-3)), (0.95, 0.97, 0.973),
        rates=(0.3, 3e-3), lengths=(351, 468),
        short=(((0.5, 0.03, 3e-3), (0.5, 0.05, 1e-2)), 234), all_routes=False,
    ),
    "conv": _Mnist(
        "conv-large", 128, (3, 3), ((0.5, 0.03, 2e-3), (0.3, 0.03, 2e-3)), (0.95, 0.97, 0.98),
        rates=(0.1, 1e-2), lengths=(700,), short=(((0.5, 0.03, 2e-3),), 700),
    ),
}  # fmt: skip
MNIST_RACES = tuple(_MNIST)
_DENSE = "batch x state size is above 4096 states (figure 4.1 has it, on a small state)"


def mnist_race(name: str, root: Path, *, train_size: int | None = None) -> Race:
    """Return a race on MNIST: steps and seconds to a test accuracy.

    Step lengths fall with the cosine, over whole budgets and over shorter ones. The exact routes
    cost 4 to 15 times as much a step, so they take 50.

    Args:
        name: `"dense"`, `"dense-512"` (larger batches) or `"conv"`.
        root: Folder that holds MNIST/raw.
        train_size: Use only so many training samples.

    Raises:
        ValueError: If there is no such race.
    """
    it = _MNIST[choice("race", name, MNIST_RACES)]
    common: dict[str, Any] = {
        "data": "mnist", "data_root": str(root), "model": it.model, "batch_size": it.batch,
        "epochs": it.epochs[1], "train_size": train_size, "eval_size": 10000,
        "log_every": 50 if it.batch == 128 else 25, "schedule": "cosine",
    }  # fmt: skip

    def ours(route: str, grid: Sequence[Sequence[float]], **limits: Any) -> list[Options]:
        return [
            {"optimizer": "ingd", "route": route, "lr": lr, "damping": damping,
             "trust_region": region, "check_every": 10, **limits}
            for lr, damping, region in grid
        ]  # fmt: skip

    def first_order(
        optimizer: str, rates: Sequence[float], short: Sequence[float] = ()
    ) -> list[Options]:
        found = _grid(optimizer, rates, epochs=it.epochs[0])
        for length in it.lengths:
            found += _grid(optimizer, short, max_steps=length)
        return found

    methods = {
        "gradient descent": first_order("gd", (0.3, 1.0)),
        "SGD, momentum 0.9": first_order("sgd", (0.03, 0.1, 0.3), it.rates[:1]),
        "Adam": first_order("adam", (1e-3, 3e-3, 1e-2), it.rates[1:]),
        "kronecker": ours("kronecker", it.grid)
        + ours("kronecker", it.short[0], max_steps=it.short[1]),
    }
    refused = {"dare": _DENSE}
    if it.all_routes:
        exact = ((0.3, 0.3, 3e-3), (0.5, 0.1, 1e-2))
        methods["sampled"] = ours("sampled", ((0.3, 0.3, 3e-3), (0.3, 1.0, 3e-3)), epochs=1)
        methods["output"] = ours("output", exact, max_steps=50)
        methods["krylov"] = ours("krylov", exact, max_steps=50)
    else:
        refused |= dict.fromkeys(("sampled", "output", "krylov"), "see the race 'dense'")
    return Race(
        title=f"MNIST, {it.model} model, batches of {it.batch}, the first seed",
        common=common,
        methods=methods,
        measure="accuracy",
        targets=it.targets,
        refused=refused,
    )


def regression_race() -> Race:
    """Return the race on the surface of 400 points: steps and seconds to a mean squared error."""
    common: dict[str, Any] = {
        "data": "sine2d", "model": "dense", "batch_size": 400, "schedule": "constant", "epochs": 1,
        "log_every": 1, "eval_size": 1,
    }  # fmt: skip
    ours = lambda route, steps, dampings, acceleration=False: [
        {"optimizer": "ingd", "route": route, "lr": 1.0, "damping": damping, "adaptive": True,
         "acceleration": acceleration, "epochs": steps}
        for damping in dampings
    ]  # fmt: skip
    return Race(
        title="A surface of 400 points, full batch, float64, the first seed",
        common=common,
        methods={
            "output, accelerated": ours("output", 40, (0.1,), acceleration=True),
            "output": ours("output", 100, (0.1, 1e-2)),
            "krylov": ours("krylov", 100, (0.1, 1e-2)),
            "sampled": ours("sampled", 100, (0.1, 1e-2)),
            "kronecker": ours("kronecker", 400, (0.1, 1e-2)),
            "Adam": _grid("adam", (1e-3, 3e-3, 1e-2), epochs=3000, log_every=10),
            "SGD, momentum 0.9": _grid("sgd", (0.01, 0.03, 0.1), epochs=1000, log_every=10),
            "L-BFGS, 20 iterations a step": _grid("lbfgs", (1.0,), epochs=60),
        },
        measure="loss",
        targets=(1e-4, 1e-6, 1e-8),
        refused={"dare": _DENSE},
    )


def only(race: Race, methods: Iterable[str]) -> Race:
    """Return a race of some methods, or of all if none is named.

    Raises:
        ValueError: If one is unknown.
    """
    named = [choice("method", name, tuple(race.methods)) for name in methods]
    if not named:
        return race
    chosen = {name: grid for name, grid in race.methods.items() if name in named}
    return Race(race.title, race.common, chosen, race.measure, race.targets)


def _grid(optimizer: str, rates: Sequence[float], **limits: Any) -> list[Options]:
    return [{"optimizer": optimizer, "lr": lr, **limits} for lr in rates]
