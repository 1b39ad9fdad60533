"""Figures 4.1 and 5.1: their runs, what is written, that finished runs are kept, the numbers."""

import json
import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from torch import Tensor

from deqlqr.metrics import read_metrics
from deqlqr.reproduce import (
    GD_BUDGET,
    TARGET,
    _summary,
    _verdict,
    fig4_1_configs,
    fig5_1_configs,
    reproduce,
)
from deqlqr.solution import ConvergenceError
from deqlqr.training import METRICS, Trainer

STEPS = 10


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Path:
    """MNIST's folder; one run of gradient descent, small batches, evaluation on few samples."""
    monkeypatch.setattr("deqlqr.reproduce.GD_GRID", (0.3,))
    monkeypatch.setattr("deqlqr.reproduce.SCHEDULES", ("constant",))
    monkeypatch.setattr("deqlqr.reproduce.BATCH", 4)
    full = Trainer.__init__

    def few(self: Trainer, *args: Any, **options: Any) -> None:
        full(self, *args, **options)
        object.__setattr__(self.data, "test_x", self.data.test_x[:100])
        object.__setattr__(self.data, "test_y", self.data.test_y[:100])

    monkeypatch.setattr(Trainer, "__init__", few)
    return Path(os.environ["DEQLQR_MNIST_ROOT"])


def refuse_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_train_step", lambda *_: pytest.fail("ran again"))


def lines(*points: tuple[int, float]) -> list[dict[str, Any]]:
    """Metrics of a run with the accuracies at the steps, at two steps a second."""
    return [{"kind": "step", "step": s, "seconds": s / 2, "accuracy": a} for s, a in points]


def test_an_unknown_figure_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="figure must .*'fig9'"):
        reproduce("fig9", tmp_path, tmp_path, 1)


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_refused_before_anything_is_written(tmp_path: Path, steps: int) -> None:
    with pytest.raises(ValueError, match="steps must"):
        reproduce("fig4.1", tmp_path, tmp_path / "out", steps)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("steps", [1, 400, 3750, 3751, 10000])
def test_the_runs_share_model_and_batches_and_take_all_steps(steps: int) -> None:
    configs = list(fig4_1_configs(Path("x"), steps).values())
    assert [c.optimizer for c in configs] == ["ingd", *["gd"] * (len(configs) - 1)]
    assert len({(c.lr, c.schedule) for c in configs[1:]}) == len(configs) - 1 >= 2
    assert {c.schedule for c in configs} == {"cosine", "constant"}
    for c in configs:
        assert c.max_steps == (steps if c.optimizer == "ingd" else GD_BUDGET * steps)
        assert c.max_steps <= c.epochs * (60000 // c.batch_size)
        assert (c.data, c.model) == ("mnist", "conv")
        assert (c.seed, c.batch_size, c.eval_size) == (
            configs[0].seed,
            configs[0].batch_size,
            configs[0].eval_size,
        )


def test_the_line_names_the_first_step_at_the_target_and_the_best_of_gd() -> None:
    below, above = TARGET - 0.1, TARGET + 0.01
    summary = {
        "implicit NGD": _summary(lines((10, below), (20, above), (30, below))),
        "late": _summary(lines((10, below), (60, TARGET))),
        "fast": _summary(lines((10, below), (40, above))),
        "never": _summary(lines((10, below))),
        "empty": _summary([]),
    }
    assert summary["implicit NGD"]["iterations_to_target"] == 20
    assert summary["implicit NGD"]["seconds_to_target"] == 10.0
    line = _verdict(summary, {"empty": "no fixed point"})
    assert "implicit NGD: 20 iterations, 10 s" in line
    assert "fast: 40 iterations, 20 s" in line and "late" not in line
    assert "failed: empty" in line


def test_the_line_says_that_the_target_was_not_reached() -> None:
    summary = {
        "implicit NGD": _summary(lines((10, 0.5), (20, 0.25))),
        "gradient descent": _summary([]),
    }
    line = _verdict(summary, {})
    assert "implicit NGD: not in 20 iterations (best 50.0%)" in line
    assert "gradient descent: not in 0 iterations" in line and "failed" not in line


@pytest.mark.mnist
def test_it_writes_figure_numbers_and_line_and_keeps_finished_runs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    line = reproduce("fig4.1", root, out, STEPS)
    assert matplotlib.image.imread(out / "fig4.1.png").std() > 0.01
    content = json.loads((out / "fig4.1.json").read_text())
    assert content["line"] == line and content["failures"] == {}
    assert set(content["runs"]) == set(fig4_1_configs(root, STEPS)) and len(content["runs"]) == 2
    for row, steps in zip(content["runs"].values(), (STEPS, GD_BUDGET * STEPS), strict=True):
        assert row["last_step"] == steps and 0 <= row["best_accuracy"] <= 1 and row["seconds"] > 0
    written = {p: p.read_bytes() for p in out.glob(f"*/{METRICS}")}
    assert len(written) == 2
    refuse_steps(monkeypatch)
    assert reproduce("fig4.1", root, out, STEPS) == line
    assert {p: p.read_bytes() for p in out.glob(f"*/{METRICS}")} == written
    with pytest.raises(ValueError, match="holds another run"):
        reproduce("fig4.1", root, out, STEPS + 1)


@pytest.mark.mnist
def test_a_run_that_fails_is_named_and_the_others_still_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._train_step

    def failing(self: Trainer, samples: Tensor, total: int) -> float:
        if self.config.optimizer == "ingd":
            raise ConvergenceError("no fixed point")
        return step(self, samples, total)

    monkeypatch.setattr(Trainer, "_train_step", failing)
    line = reproduce("fig4.1", root, tmp_path, 3)
    content = json.loads((tmp_path / "fig4.1.json").read_text())
    (failed,) = content["failures"].items()
    assert failed[0].startswith("implicit") and failed[1] == "no fixed point"
    assert f"failed: {failed[0]}" in line
    assert [row["last_step"] for row in content["runs"].values()] == [0, 3 * GD_BUDGET]
    assert (tmp_path / "fig4.1.png").exists()


@pytest.mark.mnist
def test_the_figure_is_drawn_even_if_every_run_fails(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> float:
        raise ConvergenceError("no fixed point")

    monkeypatch.setattr(Trainer, "_train_step", failing)
    reproduce("fig4.1", root, tmp_path, 3)
    assert (tmp_path / "fig4.1.png").exists()


@pytest.mark.mnist
def test_an_interrupted_figure_goes_on_where_it_stopped(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, taken = Trainer._train_step, []

    def interrupted(self: Trainer, samples: Tensor, total: int) -> float:
        taken.append(self.config.optimizer)
        if len(taken) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, samples, total)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reproduce("fig4.1", root, tmp_path, 3)
    assert taken == ["ingd"] * 2 and not (tmp_path / "fig4.1.json").exists()
    reproduce("fig4.1", root, tmp_path, 3)
    assert taken == ["ingd"] * 3 + ["gd"] * 3 * GD_BUDGET
    last = {read_metrics(path)[-1]["step"] for path in tmp_path.glob(f"*/{METRICS}")}
    assert last == {3, 3 * GD_BUDGET}


def short_figure_5_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deqlqr.reproduce.STEP_LENGTHS", (0.1,))
    monkeypatch.setattr("deqlqr.reproduce.DAMPING_GRID", (0.1,))
    monkeypatch.setattr("deqlqr.reproduce.SEEDS", (0,))
    monkeypatch.setattr("deqlqr.reproduce.SMALL_BATCH", 2)


def test_the_runs_of_figure_5_1_differ_in_nothing_but_the_damping() -> None:
    groups = fig5_1_configs(Path("x"), 7)
    for (lr, name), configs in groups.items():
        assert [c.seed for c in configs] == [0, 1, 2] and {c.lr for c in configs} == {lr}
        kind = ("cyclic", False) if name.startswith("damping by layer") else ("dare", True)
        assert all((c.route, c.margin is None) == kind for c in configs)
        assert all((c.inverse == "neumann") == name.endswith("Neumann series") for c in configs)
    free = {"lr", "seed", "damping", "route", "margin", "inverse"}
    every = [asdict(config) for configs in groups.values() for config in configs]
    shared = [{k: v for k, v in config.items() if k not in free} for config in every]
    assert all(one == shared[0] for one in shared) and shared[0]["max_steps"] == 7


@pytest.mark.mnist
def test_figure_5_1_writes_figure_numbers_and_table_and_names_what_fails(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_figure_5_1(monkeypatch)
    step = Trainer._train_step

    def failing(self: Trainer, samples: Tensor, total: int) -> float:
        if self.config.route == "dare":
            raise ConvergenceError("no fixed point")
        return step(self, samples, total)

    monkeypatch.setattr(Trainer, "_train_step", failing)
    line = reproduce("fig5.1-deq", root, tmp_path, 2)
    assert "damping by layer, Neumann series" in line
    content = json.loads((tmp_path / "fig5.1.json").read_text())
    fixed, exact, series = content["rows"]
    assert fixed["failures"] == ["no fixed point"] and fixed["seconds_per_step"] is None
    assert exact["accuracy"] == series["accuracy"] and exact["seconds_per_step"] > 0
    assert len((tmp_path / "fig5.1.md").read_text().splitlines()) == 2 + 3
    assert matplotlib.image.imread(tmp_path / "fig5.1.png").std() > 0.01


def test_the_thesis_figures_want_mnist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="figure 'fig4.1' needs a data root"):
        reproduce("fig4.1", None, tmp_path, 1)


def test_the_spiral_writes_its_pictures_and_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deqlqr.reproduce_points._METHODS", {"Kutta(4)": "kutta4"})
    monkeypatch.setattr("deqlqr.reproduce_points._STEP_SIZES", {"Net": "net", "ODENet": "odenet"})
    monkeypatch.setattr("deqlqr.reproduce_points._EQUILIBRIA", {"DEQ, Euler": "gradient"})
    monkeypatch.setattr("deqlqr.reproduce_points.POINT_SETS", ("spiral", "donut1d"))
    line = reproduce("spiral", None, tmp_path, 2)
    names = ("spiral", "odenet", "spiral-deq", "transition", "points")
    assert all(matplotlib.image.imread(tmp_path / f"{name}.png").ndim == 3 for name in names)
    content = json.loads((tmp_path / "spiral.json").read_text())
    assert content["line"] == line and "2 steps" in line
    assert {(row["kind"], row["data"]) for row in content["rows"]} == {
        ("Kutta(4)", "spiral"), ("Net", "spiral"), ("ODENet", "spiral"), ("DEQ, Euler", "spiral"),
        ("DEQ, Euler", "donut1d"),
    }  # fmt: skip
    refuse_steps(monkeypatch)
    assert reproduce("spiral", None, tmp_path, 2) == line
    with pytest.raises(ValueError, match="holds another run"):
        reproduce("spiral", None, tmp_path, 3)


def test_the_fields_write_their_picture_and_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {name: {14: [0.2, 0.3], 28: [0.4, 0.5]} for name in ("layers", "fields", "deq")}
    monkeypatch.setattr("deqlqr.reproduce_points.study", lambda options: found)
    line = reproduce("fields", None, tmp_path / "out", 1)
    assert "25.0% with 14, 45.0% with 28" in line
    assert matplotlib.image.imread(tmp_path / "out" / "fields.png").ndim == 3
    curves = json.loads((tmp_path / "out" / "fields.json").read_text())["curves"]
    assert len(curves) == 3 and all(curve["28"] == [0.4, 0.5] for curve in curves.values())
