"""Tests for `deqlqr/stability.py` and the models of the grid."""

from pathlib import Path

import pytest
import torch

from deqlqr import stability
from deqlqr.deq import layers_of
from deqlqr.models import EXPLICIT, MODELS, make_model
from deqlqr.stability import CASES, RATES, configs, run_stability, table
from deqlqr.training import TrainConfig


def test_the_grid_is_five_rates_over_two_decades_for_each_optimizer_and_case():
    grid = configs(Path("data"))
    assert len(grid) == 5 * 3 * len(CASES)
    for rates in RATES.values():
        assert len(rates) == 5 and rates[-1] / rates[0] == pytest.approx(100, rel=0.01)
    for (case, optimizer, lr), config in grid.items():
        assert (config.optimizer, config.lr, config.epochs) == (optimizer, lr, 4)
        assert config.guard == ("no guard" not in case)
        (layer,) = layers_of(make_model(config.model, (1, 28, 28), 10))
        promised = getattr(layer.block, "contraction", None)
        assert (promised is None) == case.startswith("no bound")


def test_a_run_that_loses_its_fixed_point_is_told_from_one_that_ends(tmp_path, monkeypatch):
    common = {"data": "digits", "batch_size": 20, "train_size": 100, "epochs": 1, "log_every": 1,
              "eval_size": 20, "optimizer": "sgd", "schedule": "constant"}  # fmt: skip
    grid = {
        ("no bound, no guard", "sgd", 30.0): TrainConfig(
            model="dense-free", guard=False, lr=30.0, **common
        ),
        ("no bound, guard", "sgd", 30.0): TrainConfig(model="dense-free", lr=30.0, **common),
        ("DenseBlock", "sgd", 0.1): TrainConfig(model="dense-large", lr=0.1, **common),
    }
    monkeypatch.setattr(stability, "configs", lambda *_: grid)
    found = run_stability(Path("data"), tmp_path)
    lost, kept, bounded = found.values()
    assert lost.failure is not None and lost.steps < 5
    assert kept.failure is None and kept.lost <= 1e-3 and kept.steps == 5
    assert (
        bounded.failure is None
        and bounded.lost == 0
        and bounded.shortened == bounded.taken_back == 0
    )
    lines = table(found)
    assert f"stopped after {lost.steps} steps" in lines[2]
    assert f"0.1: {bounded.accuracy:.1%}" in lines[-1]
    assert run_stability(Path("data"), tmp_path) == found  # a run that stopped is not gone on with
    with pytest.raises(ValueError, match="case"):
        run_stability(Path("data"), tmp_path, ["none"])


@pytest.mark.parametrize("name", MODELS)
def test_every_model_runs_on_images_or_vectors_and_says_what_it_does_not_take(name):
    taken = 0
    for shape in ((1, 28, 28), (2,)):
        try:
            model = make_model(name, shape, 3)
        except ValueError as error:
            assert "takes" in str(error)
            continue
        taken += 1
        outputs = model(torch.randn(4, *shape))
        assert outputs.shape == (4, 3) and outputs.isfinite().all()
        assert len(layers_of(model)) == (0 if name in EXPLICIT else 1)
    assert taken == (1 if "conv" in name or name in EXPLICIT else 2)
