"""Figure 3.1: updates of the LQR beside those of autograd, on random images."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from torch import Tensor

from deqlqr.autograd_update import gradient_update, natural_update
from deqlqr.checkpoint import load_checkpoint
from deqlqr.controls import Controls
from deqlqr.data import Data
from deqlqr.direction import Direction
from deqlqr.models import make_model
from deqlqr.reproduce_cosine import LIMITS, CosineConfig, CosineRun, reproduce_cosine
from deqlqr.solution import ConvergenceError

from .images import random_images

GRADIENT = CosineConfig("SGD", lr=0.1, damping=0.0, steps=3, save_every=2, eval_every=2)
NATURAL = CosineConfig("NGD", lr=0.1, damping=0.1, steps=3, save_every=2, eval_every=2)
both = pytest.mark.parametrize("config", [GRADIENT, NATURAL], ids=lambda config: config.method)


@pytest.fixture(scope="module")
def data() -> Data:
    return random_images(16, 20)


def run(config: CosineConfig, data: Data, folder: Path) -> list[dict[str, Any]]:
    return CosineRun(config, data, folder).run(quiet=True)


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def parameters(folder: Path) -> dict[str, Tensor]:
    model: dict[str, Tensor] = load_checkpoint(folder / "checkpoint.pt")["model"]
    return model


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "name, value",
    [
        ("method", "Adam"),
        ("lr", 0.0),
        ("damping", 0.0),
        ("steps", 0),
        ("batch_size", 0),
        ("save_every", 2.5),
        ("eval_every", 0),
        ("eval_size", True),
        ("seed", -1),
    ],
)
def test_an_option_out_of_range_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        replace(NATURAL, **{name: value})  # type: ignore[arg-type]


def test_damping_is_of_no_use_to_gradient_descent() -> None:
    with pytest.raises(ValueError, match="damping must be 0"):
        replace(GRADIENT, damping=0.1)


@both
def test_the_updates_agree_and_the_training_is_that_of_autograd(
    config: CosineConfig, data: Data, tmp_path: Path
) -> None:
    lines = run(config, data, tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert all(line[kind] <= limit for kind, limit in LIMITS.items())
        # Other types, not the same numbers.
        assert line["float32 to float64"] > line["float64"] >= 0 and line["float32"] > 0
        assert all(seconds > 0 for seconds in line["seconds"].values())
    assert [line["step"] for line in lines if "accuracy" in line] == [2, 3]

    model = make_model("convnet", (1, 16, 16), 10, seed=0).double()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    for i in range(3):
        x, y = (
            data.train_x[order[5 * i : 5 * i + 5]].double(),
            data.train_y[order][5 * i : 5 * i + 5],
        )
        natural = config.method == "NGD"
        u = natural_update(model, x, y, 0.1) if natural else gradient_update(model, x, y)
        Controls(model).assign(Controls(model).vector + 0.1 * u)
    for name, p in parameters(tmp_path).items():
        assert torch.allclose(model.state_dict()[name], p, rtol=1e-9, atol=1e-12)


@both
def test_an_interrupted_training_repeats_the_uninterrupted_one_bit_for_bit(
    config: CosineConfig, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, steps=5, batch_size=6, save_every=3)  # over an epoch of 3 steps
    expected = run(config, data, tmp_path / "whole")
    take = CosineRun._take

    def interrupted(self: CosineRun, samples: Tensor) -> dict[str, Any]:
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        if self.step == 4:
            raise MemoryError
        return take(self, samples)

    monkeypatch.setattr(CosineRun, "_take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config, data, tmp_path / "parts")
    assert load_checkpoint(tmp_path / "parts" / "checkpoint.pt")["step"] == 2
    with pytest.raises(MemoryError):  # after the checkpoint of step 3
        run(config, data, tmp_path / "parts")
    monkeypatch.setattr(CosineRun, "_take", take)
    assert timeless(run(config, data, tmp_path / "parts")) == timeless(expected)
    assert same(parameters(tmp_path / "parts"), parameters(tmp_path / "whole"))


def test_where_the_loss_vanishes_float32_itself_is_what_differs(data: Data, tmp_path: Path) -> None:
    sure = CosineRun(GRADIENT, replace(data, train_y=torch.zeros(20, dtype=torch.int64)), tmp_path)
    with torch.no_grad():
        list(sure.model.parameters())[-1][0] = 17.0  # its class, for every image
    for line in sure.run(quiet=True):
        assert line["loss"] < 1e-4 and line["float64"] < 1e-24
        assert line["float32"] < 1e-9 < LIMITS["float32 to float64"] < line["float32 to float64"]


def test_a_finished_training_is_kept_and_another_does_not_overwrite_it(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(GRADIENT, steps=1)
    lines = run(config, data, tmp_path)
    monkeypatch.setattr(CosineRun, "_take", lambda *_: pytest.fail("ran again"))
    assert run(config, data, tmp_path) == lines
    with pytest.raises(ValueError, match="holds another run"):
        run(replace(config, lr=0.2), data, tmp_path)


def test_a_batch_of_more_samples_than_there_are_is_refused(data: Data, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be at most the 20"):
        CosineRun(replace(GRADIENT, batch_size=21), data, tmp_path)


def test_a_step_that_cannot_be_solved_ends_the_training_and_is_named(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = Direction(None, float("nan"), reason="no minimum")
    monkeypatch.setattr("deqlqr.finite_route.FiniteProblem.solve", lambda *_: failed)
    with pytest.raises(ConvergenceError, match="step 1: no minimum"):
        run(GRADIENT, data, tmp_path)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 0


def test_it_writes_figure_numbers_and_line(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deqlqr.reproduce_cosine.load_data", lambda *_: data)
    line = reproduce_cosine(None, tmp_path, 2)
    assert matplotlib.image.imread(tmp_path / "fig3.1.png").std() > 0.01
    content = json.loads((tmp_path / "fig3.1.json").read_text())
    assert content["line"] == line and content["limits"] == LIMITS
    assert "within 1e-05 of 1" in line and "2 steps" in line and "above" not in line
    for method, row in content["runs"].items():
        assert f"{method}: float64 {row['float64']['largest']:.1e}" in line
        for kind, limit in LIMITS.items():
            assert 0 <= row[kind]["median"] <= row[kind]["largest"] <= limit
            assert row[kind]["steps_above_limit"] == 0 and row[kind]["at_step"] in (1, 2)
        assert 0 <= row["accuracy"] <= row["best_accuracy"] <= 1
    monkeypatch.setattr("deqlqr.reproduce_cosine.plot_misalignments", lambda *_: None)
    monkeypatch.setattr("deqlqr.reproduce_cosine.LIMITS", dict.fromkeys(LIMITS, 0.0))
    assert "float64" in reproduce_cosine(None, tmp_path, 2).partition("(2 steps above 0)")[0]
