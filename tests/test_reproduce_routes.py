"""Figure 4.1: its trainings, what is written, that finished ones are kept, the numbers."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from torch import Tensor

from deqlqr.metrics import read_metrics
from deqlqr.reproduce_routes import (
    _ROUTES,
    GD_BUDGET,
    TARGETS,
    THESIS_STEPS,
    _best,
    _row,
    _verdict,
    reproduce_routes,
    routes_configs,
)
from deqlqr.routes import ROUTES
from deqlqr.solution import ConvergenceError
from deqlqr.training import METRICS, Trainer

from .images import random_images

ROOT = Path("data")
STEPS = 2
ALL = {route for route in ROUTES if route != "riccati"}  # which is for explicit networks


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the routes, one training of gradient descent, batches of 4 random images."""
    images = random_images(8)
    monkeypatch.setattr("deqlqr.training.load_data", lambda *_: images)
    monkeypatch.setattr("deqlqr.training.plot_curves", lambda *_: None)
    few = {name: _ROUTES[name] for name in ("dare", "output")}
    monkeypatch.setattr("deqlqr.reproduce_routes._ROUTES", few)
    monkeypatch.setattr("deqlqr.reproduce_routes.GD_GRID", (0.3,))
    monkeypatch.setattr("deqlqr.reproduce_routes.SCHEDULES", ("constant",))
    monkeypatch.setattr("deqlqr.reproduce_routes.BATCH", 4)


def lines(*points: tuple[int, float]) -> list[dict[str, Any]]:
    """Metrics of a run with the accuracies at the steps, at two steps a second."""
    return [{"kind": "step", "step": s, "seconds": s / 2, "accuracy": a} for s, a in points]


@pytest.mark.parametrize("steps", [1, 200, 2500, 3750, 10000])
def test_the_runs_share_model_and_batches_and_take_all_steps(steps: int) -> None:
    configs = routes_configs(ROOT, steps)
    first = next(iter(configs.values()))
    assert {name for name, c in configs.items() if c.optimizer == "ingd"} == ALL
    descents = [c for c in configs.values() if c.optimizer == "gd"]
    assert len({(c.lr, c.schedule) for c in descents}) == len(descents) >= 2
    assert {c.schedule for c in descents} == {"cosine", "constant"}
    more = max(steps, min(GD_BUDGET * steps, THESIS_STEPS))
    for name, c in configs.items():
        assert c.max_steps == (more if c.optimizer == "gd" else steps)
        assert c.max_steps <= c.epochs * (60000 // c.batch_size)
        assert (c.data, c.model) == ("mnist", "conv")
        assert (c.seed, c.batch_size, c.eval_size) == (
            first.seed,
            first.batch_size,
            first.eval_size,
        )
        assert c.optimizer == "gd" or c.route == name


def test_the_line_names_every_route_and_the_best_of_gradient_descent() -> None:
    target = TARGETS[0]
    below, above = target - 0.1, target + 0.01
    rows = {
        "dare": _row(lines((10, below), (20, above), (30, below))),
        "output": _row(lines((20, 0.5), (25, 0.25))),
        "krylov": _row([]),
        "gradient late": _row(lines((10, below), (60, target))),
        "gradient fast": _row(lines((10, below), (40, above))),
        "gradient never": _row(lines((10, below))),
    }
    assert rows["dare"]["reached"][0] == {"accuracy": target, "iterations": 20, "seconds": 10.0}
    best = _best([name for name in rows if name.startswith("gradient")], rows)
    assert best == "gradient fast"
    line = _verdict(rows, best, {"krylov": "no fixed point"})
    assert "dare: 20 iterations, 10 s, 500 ms each" in line
    assert "output: not in 25 iterations (best 50.0%)" in line
    assert "best of GD, gradient fast: 40 iterations, 20 s" in line
    assert "late" not in line and "failed: krylov" in line


def test_without_any_at_the_target_the_closest_is_the_best() -> None:
    rows = {"a": _row(lines((10, 0.2))), "b": _row(lines((10, 0.3))), "c": _row([])}
    assert _best(["a", "b", "c"], rows) == "b"


def test_it_writes_figure_numbers_and_table_and_keeps_finished_runs(
    short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = reproduce_routes(ROOT, tmp_path, STEPS)
    assert matplotlib.image.imread(tmp_path / "fig4.1.png").std() > 0.01
    content = json.loads((tmp_path / "fig4.1.json").read_text())
    assert content["line"] == line and content["failures"] == {}
    assert list(content["runs"]) == ["dare", "output", content["best_of_gd"]]
    steps = (STEPS, STEPS, GD_BUDGET * STEPS)
    for row, taken in zip(content["runs"].values(), steps, strict=True):
        assert row["last_step"] == taken and row["seconds_per_step"] > 0
        assert 0 <= row["best_accuracy"] <= 1
    assert len((tmp_path / "fig4.1.md").read_text().splitlines()) == 2 + 3
    written = {p: p.read_bytes() for p in tmp_path.glob(f"*/{METRICS}")}
    assert len(written) == 3
    monkeypatch.setattr(Trainer, "_train_step", lambda *_: pytest.fail("ran again"))
    monkeypatch.setattr("deqlqr.reproduce_routes.plot_runs", lambda *_, **__: None)
    assert reproduce_routes(ROOT, tmp_path, STEPS) == line
    assert {p: p.read_bytes() for p in tmp_path.glob(f"*/{METRICS}")} == written
    with pytest.raises(ValueError, match="holds another run"):
        reproduce_routes(ROOT, tmp_path, STEPS + 1)


def test_a_run_that_fails_is_named_and_the_others_still_run(
    short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._train_step

    def failing(self: Trainer, samples: Tensor, total: int) -> float:
        if self.folder.name == "dare":
            raise ConvergenceError("no fixed point")
        return step(self, samples, total)

    monkeypatch.setattr(Trainer, "_train_step", failing)
    line = reproduce_routes(ROOT, tmp_path, STEPS)
    content = json.loads((tmp_path / "fig4.1.json").read_text())
    assert content["failures"] == {"dare": "no fixed point"} and "failed: dare." in line
    assert [row["last_step"] for row in content["runs"].values()] == [0, STEPS, GD_BUDGET * STEPS]
    assert (tmp_path / "fig4.1.png").exists()


def test_an_interrupted_figure_goes_on_where_it_stopped(
    short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, taken = Trainer._train_step, []

    def interrupted(self: Trainer, samples: Tensor, total: int) -> float:
        taken.append(self.folder.name)
        if len(taken) == 2 * STEPS - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, samples, total)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    monkeypatch.setattr("deqlqr.reproduce_routes.plot_runs", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        reproduce_routes(ROOT, tmp_path, STEPS)
    assert taken == ["dare"] * STEPS + ["output"] and not (tmp_path / "fig4.1.json").exists()
    reproduce_routes(ROOT, tmp_path, STEPS)
    descent = taken[-1]
    assert taken == ["dare"] * STEPS + ["output"] * STEPS + [descent] * GD_BUDGET * STEPS
    last = {read_metrics(path)[-1]["step"] for path in tmp_path.glob(f"*/{METRICS}")}
    assert last == {STEPS, GD_BUDGET * STEPS}
