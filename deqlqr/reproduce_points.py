"""The slides' pictures: points in the plane by Runge-Kutta networks and by equilibria; few scalars.

Source: E. Celledoni (2020), Deep learning as optimal control problems and Riemannian discrete
gradient descent; M. Benning et al. (2019), arXiv:1904.05657. C. Cuchiero, M. Larsson, J. Teichmann
(2020), arXiv:1908.07838.
"""

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from torch import nn

from deqlqr.checkpoint import load_checkpoint
from deqlqr.data import POINT_SETS, load_data
from deqlqr.evaluation import evaluate
from deqlqr.models import make_model
from deqlqr.point_figures import plot_accuracy_by_size, plot_points, plot_transition
from deqlqr.random_field_study import StudyOptions, study
from deqlqr.training import CHECKPOINT, TrainConfig, finish

# What suits full batches of some hundred points.
POINT_OPTIONS: dict[str, Any] = {
    "batch_size": 500,
    "schedule": "constant",
    "lr": 1.0,
    "damping": 1e-2,
    "route": "output",
    "adaptive": True,
    "log_every": 10,
}
_METHODS = {
    "Euler": "resnet",
    "improved Euler": "improved-euler",
    "Kutta(3)": "kutta3",
    "Kutta(4)": "kutta4",
}
_EQUILIBRIA = {
    "DEQ, Euler": "gradient",
    "DEQ, Kutta(4)": "gradient-kutta4",
    "DEQ, monotone": "monotone",
}
_STEP_SIZES = {
    "Net": "net",
    "ResNet": "resnet",
    "ODENet": "odenet",
    "ODENet+simplex": "odenet-simplex",
}


def reproduce_spiral(data_root: Path | None, out: Path, steps: int) -> str:
    """Train the slides' networks, and equilibria, on their point sets, and draw them.

    Returns:
        The line that sums it up.
    """
    kinds = {**_METHODS, **_STEP_SIZES, **_EQUILIBRIA}
    runs = {(kind, "spiral"): name for kind, name in kinds.items()}
    runs |= {("DEQ, Euler", data): "gradient" for data in POINT_SETS}
    models: dict[tuple[str, str], nn.Module] = {}
    rows = []
    for (kind, data), name in runs.items():
        config = TrainConfig(data=data, model=name, epochs=steps, **POINT_OPTIONS)
        models[kind, data], row = _trained(config, out / f"{data}-{name}")
        rows.append({"kind": kind, "data": data, **row})
    spiral = load_data("spiral")
    panels = lambda kinds: [(kind, models[kind, "spiral"], spiral) for kind in kinds]
    plot_points(panels(_METHODS), out / "spiral.png", "spiral, 15 layers")
    plot_points(panels(_STEP_SIZES), out / "odenet.png", "spiral, 15 layers, Euler")
    plot_points(panels(_EQUILIBRIA), out / "spiral-deq.png", "spiral, equilibria of 32 states")
    net = models["Kutta(4)", "spiral"]
    assert isinstance(net, nn.Sequential)  # noqa: S101
    plot_transition(net[0], spiral, out / "transition.png", title="Kutta(4), layer by layer")  # type: ignore[arg-type]
    of_sets = [(data, models["DEQ, Euler", data], load_data(data)) for data in POINT_SETS]
    plot_points(of_sets, out / "points.png", "one DEQ for the slides' four problems")
    line = _points_line(rows, steps)
    (out / "spiral.json").write_text(json.dumps({"rows": rows, "line": line}, indent=2) + "\n")
    return line


def _trained(config: TrainConfig, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model of a run, which is not repeated if it is finished, and how good it is."""
    finish(config, folder)
    content = load_checkpoint(folder / CHECKPOINT)
    data = load_data(config.data)
    model = make_model(config.model, data.train_x.shape[1:], data.outputs, seed=config.seed)
    model.load_state_dict(content["model"])
    return model, {
        "model": config.model,
        "training_accuracy": evaluate(model, data.train_x, data.train_y)[0],
        "test_accuracy": evaluate(model, data.test_x, data.test_y)[0],
        "seconds": content["seconds"],
    }


def _points_line(rows: list[dict[str, Any]], steps: int) -> str:
    def least(kinds: dict[str, str]) -> str:
        own = [r for r in rows if r["data"] == "spiral" and r["kind"] in kinds]
        worst = min(own, key=lambda row: row["training_accuracy"])
        return f"at least {worst['training_accuracy']:.1%} ({worst['kind']})"

    sets = min(r["training_accuracy"] for r in rows if r["kind"] == "DEQ, Euler")
    without = {kind: name for kind, name in _STEP_SIZES.items() if name != "net"}
    return (
        "The slides show pictures without numbers, and that methods of all orders perform alike. "
        f"Measured, training accuracy after {steps} steps of implicit NGD: Runge-Kutta methods "
        f"{least(_METHODS)}; fixed, learned and simplex steps {least(without)}; "
        f"plain network {least({'Net': 'net'})}; equilibria {least(_EQUILIBRIA)}; the DEQ on all "
        f"four sets at least {sets:.1%}."
    )


def reproduce_fields(data_root: Path | None, out: Path, steps: int) -> str:
    """Draw accuracy on the digits against the number of trained scalars of random vector fields.

    Returns:
        The line that sums it up.
    """
    options = replace(StudyOptions(), steps=steps)
    found = study(options=options)
    names = {"layers": "7 fields, more layers", "fields": "2 layers, more fields",
             "deq": "equilibrium of more fields"}  # fmt: skip
    curves = {names[name]: curve for name, curve in found.items()}
    out.mkdir(parents=True, exist_ok=True)
    title = "digits: all weights random and frozen but for a few scalars"
    plot_accuracy_by_size(curves, out / "fields.png", title)
    parts = []
    for name, curve in curves.items():
        few, many = min(curve), max(curve)
        parts.append(f"{name}: {mean(curve[few]):.1%} with {few}, {mean(curve[many]):.1%} "
                     f"with {many}")  # fmt: skip
    line = (
        "The slides claim that a few trained scalars of random vector fields go far. Measured, "
        f"mean test accuracy of three seeds, {'; '.join(parts)} scalars."
    )
    (out / "fields.json").write_text(json.dumps({"curves": curves, "line": line}, indent=2) + "\n")
    return line
