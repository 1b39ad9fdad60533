"""DDP on a DEQ beside none: pairs, what is written, what fails."""

import json
from pathlib import Path

import matplotlib.image
import pytest
import torch

import deqlqr.reproduce_ddp_deq as study
from deqlqr import Controls
from deqlqr.solution import ConvergenceError
from deqlqr.training import Trainer

from .images import random_images


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SEEDS": 2, "DIGITS_SEEDS": 2, "SCALES": (1.0, 2.0), "ONE_STEP": ((0.1, 1.0), (0.1, 2.0)),
        "TRAININGS": ((0.1, 1.0),), "DIGITS": ((0.1, 1.0),),
    }.items():  # fmt: skip
        monkeypatch.setattr(study, name, value)
    images = random_images(16)
    monkeypatch.setattr("deqlqr.training.load_data", lambda *_: images)
    monkeypatch.setattr("deqlqr.training.plot_curves", lambda *_: None)


def test_a_problem_is_a_function_of_its_seed_and_scale() -> None:
    before = torch.get_rng_state()
    (a, x, y), (b, x2, y2) = (study.small_problem(scale, 3) for scale in (1.0, 2.0))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(x, x2) and torch.equal(y, y2)
    assert torch.equal(2 * Controls(a).vector, Controls(b).vector)
    other = Controls(study.small_problem(1.0, 4)[0]).vector
    assert not torch.equal(Controls(a).vector, other)


def test_single_steps_stay_however_long_and_differ_by_the_feedback_only() -> None:
    plain = study.fall_of_one_step(2.0, 1e-3, 2.0, 0, feedback=False)
    answered = study.fall_of_one_step(2.0, 1e-3, 2.0, 0, feedback=True)
    assert plain is not None and answered is not None
    assert plain[0] < 0 and plain[1] is None and answered[1] is not None and answered[1] > 0.01
    short = [study.fall_of_one_step(1.0, 1.0, 1e-3, 0, feedback=f) for f in (False, True)]
    assert short[0] is not None and short[1] is not None
    assert short[0][0] == pytest.approx(short[1][0], rel=1e-4)


def test_it_writes_figure_numbers_and_table(small: None, tmp_path: Path) -> None:
    line = study.reproduce_ddp_deq(None, tmp_path, 2)
    content = json.loads((tmp_path / "ddp-deq.json").read_text())
    assert content["line"] == line and "Digits, training loss" in line
    assert [len(content[name]) for name in ("one_step", "small", "digits")] == [4, 2, 1]
    for row in content["one_step"]:
        assert row["difference"] == pytest.approx(row["feedback"] - row["plain"])
        assert row["pairs"] == 2 and row["size"] > 0
    assert all(row["failed"] == 0 and row["seconds_feedback"] > 0 for row in content["small"])
    assert content["digits"][0]["accuracy"]["pairs"] == 2
    assert matplotlib.image.imread(tmp_path / "ddp-deq.png").std() > 0.01
    table = (tmp_path / "ddp-deq.md").read_text().splitlines()
    assert len(table) == 2 + 4 + 3 + 2 + 3 + 1


def test_a_training_that_fails_is_counted_and_its_pair_left_out(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._train_step

    def failing(self: Trainer, samples: torch.Tensor, total: int) -> float:
        if self.config.feedback and self.config.seed == 1:
            raise ConvergenceError("no fixed point")
        return step(self, samples, total)

    monkeypatch.setattr(Trainer, "_train_step", failing)
    study.reproduce_ddp_deq(None, tmp_path, 2)
    (row,) = json.loads((tmp_path / "ddp-deq.json").read_text())["digits"]
    assert row["failed"] == 1 and row["pairs"] == 1 and row["difference"] is None
    assert "fewer than two pairs" in (tmp_path / "ddp-deq.md").read_text()
