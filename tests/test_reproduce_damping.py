"""Figure 5.1, in both horizons: its trainings, what is written, what fails."""

import json
from dataclasses import asdict
from pathlib import Path

import matplotlib.image
import pytest
from torch import Tensor

from deqlqr.reproduce_damping import FINITE, INFINITE, Horizon, damping_configs, reproduce_damping
from deqlqr.solution import ConvergenceError
from deqlqr.training import Trainer

from .images import random_images

horizons = pytest.mark.parametrize("horizon", [FINITE, INFINITE], ids=lambda h: h.words)


@horizons
def test_the_runs_differ_in_nothing_but_the_damping(horizon: Horizon) -> None:
    groups = damping_configs(horizon, Path("x"), 7)
    assert len(groups) == 2 * 6
    for (lr, name), configs in groups.items():
        assert [c.seed for c in configs] == [0, 1, 2] and {c.lr for c in configs} == {lr}
        by_layer = name.startswith("damping by layer")
        route = horizon.by_layer if by_layer else horizon.fixed
        assert all((c.route, c.margin is None) == (route, not by_layer) for c in configs)
        assert all((c.inverse == "neumann") == name.endswith("Neumann series") for c in configs)
    free = {"lr", "seed", "damping", "route", "margin", "inverse"}
    every = [asdict(config) for configs in groups.values() for config in configs]
    shared = [{k: v for k, v in config.items() if k not in free} for config in every]
    assert all(one == shared[0] for one in shared) and shared[0]["max_steps"] == 7


def test_the_thesis_convnet_takes_batches_of_five() -> None:
    (config, *_), *_ = damping_configs(FINITE, Path("x"), 7).values()
    assert (config.model, config.batch_size, config.route) == ("convnet", 5, "riccati")


@horizons
def test_it_writes_figure_numbers_and_table_and_names_what_fails(
    horizon: Horizon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = random_images(16)
    monkeypatch.setattr("deqlqr.training.load_data", lambda *_: images)
    monkeypatch.setattr("deqlqr.training.plot_curves", lambda *_: None)
    for name, value in (("STEP_LENGTHS", (0.1,)), ("DAMPING_GRID", (0.1,)), ("SEEDS", (0,))):
        monkeypatch.setattr(f"deqlqr.reproduce_damping.{name}", value)
    step = Trainer._train_step

    def failing(self: Trainer, samples: Tensor, total: int) -> float:
        if self.config.margin is None:
            raise ConvergenceError("no fixed point")
        return step(self, samples[:2], total)

    monkeypatch.setattr(Trainer, "_train_step", failing)
    line = reproduce_damping(horizon, Path("x"), tmp_path, 1)
    assert "damping by layer, Neumann series" in line and f"in the {horizon.words} horizon" in line
    content = json.loads((tmp_path / f"{horizon.figure}.json").read_text())
    fixed, exact, series = content["rows"]
    assert fixed["failures"] == ["no fixed point"] and fixed["seconds_per_step"] is None
    assert exact["accuracy"] == series["accuracy"] and exact["seconds_per_step"] > 0
    assert fixed["rejected"] is None and 0 <= exact["rejected"] <= 1
    assert len((tmp_path / f"{horizon.figure}.md").read_text().splitlines()) == 2 + 3
    assert matplotlib.image.imread(tmp_path / f"{horizon.figure}.png").std() > 0.01
