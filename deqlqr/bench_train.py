"""`deqlqr bench train` and `deqlqr bench regression`: every route beside first-order optimizers."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from deqlqr._checks import choice
from deqlqr.race import Options, Race

MNIST_MODELS = ("dense-large", "conv-large")

# Step length, damping and trust region of the Kronecker route, by model.
_KRONECKER = {
    "dense-large": ((0.2, 0.03, 1e-3), (0.2, 0.1, 1e-3)),
    "conv-large": ((0.5, 0.03, 2e-3), (0.3, 0.03, 2e-3)),
}
_DENSE = "batch x state size is above 4096 states (figure 4.1 has it, on a small state)"


def mnist_race(model: str, root: Path, *, train_size: int | None = None) -> Race:
    """Return the race on MNIST: steps and seconds to a test accuracy.

    Batches of 128, step lengths that fall with the cosine, over 3 epochs or over 700 steps. The
    exact routes cost 10 to 15 times as much a step, so they take 50.

    Args:
        model: `"dense-large"` or `"conv-large"`.
        root: Folder that holds MNIST/raw.
        train_size: Use only so many training samples.

    Raises:
        ValueError: If there is no such model.
    """
    choice("model", model, MNIST_MODELS)
    common: dict[str, Any] = {
        "data": "mnist", "data_root": str(root), "model": model, "batch_size": 128, "epochs": 3,
        "train_size": train_size, "log_every": 50, "eval_size": 10000, "schedule": "cosine",
    }  # fmt: skip

    def ours(route: str, grid: Sequence[Sequence[float]], **limits: Any) -> list[Options]:
        return [
            {"optimizer": "ingd", "route": route, "lr": lr, "damping": damping,
             "trust_region": region, "check_every": 10, **limits}
            for lr, damping, region in grid
        ]  # fmt: skip

    exact = ((0.3, 0.3, 3e-3), (0.5, 0.1, 1e-2))
    methods = {
        "gradient descent": _first_order("gd", (0.3, 1.0)),
        "SGD, momentum 0.9": [
            *_first_order("sgd", (0.03, 0.1, 0.3)),
            *_first_order("sgd", (0.1,), max_steps=700),
        ],
        "Adam": [
            *_first_order("adam", (1e-3, 3e-3, 1e-2)),
            *_first_order("adam", (1e-2,), max_steps=700),
        ],
        "kronecker": [
            *ours("kronecker", _KRONECKER[model]),
            *ours("kronecker", _KRONECKER[model][:1], max_steps=700),
        ],
        "sampled": ours("sampled", ((0.3, 0.3, 3e-3), (0.3, 1.0, 3e-3)), epochs=1),
        "output": ours("output", exact, max_steps=50),
        "krylov": ours("krylov", exact, max_steps=50),
    }
    targets: tuple[float, ...] = (0.95, 0.97, 0.98)
    if model == "dense-large":
        targets = (0.95, 0.97, 0.973)
    return Race(
        title=f"MNIST, {model} model, batches of 128, the first seed",
        common=common,
        methods=methods,
        measure="accuracy",
        targets=targets,
        refused={"dare": _DENSE},
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
            "Adam": _first_order("adam", (1e-3, 3e-3, 1e-2), epochs=3000, log_every=10),
            "SGD, momentum 0.9": _first_order("sgd", (0.01, 0.03, 0.1), epochs=3000, log_every=10),
            "L-BFGS, 20 iterations a step": _first_order("lbfgs", (1.0,), epochs=60),
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


def _first_order(optimizer: str, rates: Sequence[float], **limits: Any) -> list[Options]:
    return [{"optimizer": optimizer, "lr": lr, **limits} for lr in rates]
