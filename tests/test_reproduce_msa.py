"""Tests for `deqlqr/reproduce_msa.py` and `deqlqr/msa_networks.py`: runs, resuming, the line."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from deqlqr.data import Data, load_data
from deqlqr.metrics import read_metrics
from deqlqr.msa import MSA
from deqlqr.msa_networks import image_network, sine_loss, sine_network
from deqlqr.reproduce_msa import (
    BUDGET,
    Method,
    Problem,
    chosen,
    finish,
    methods,
    reproduce_emsa_fig1,
    reproduce_emsa_fig2,
)


@pytest.fixture
def few_layers(monkeypatch):
    monkeypatch.setattr("deqlqr.msa_networks.LAYERS", 2)
    monkeypatch.setattr("deqlqr.msa_networks.RESIDUAL_LAYERS", 1)


@pytest.fixture
def small(monkeypatch, few_layers):
    """Small networks, few options for each method, and few points of the sine."""
    grid = {"SGD": (0.01, 1e38), "Adam": (0.01,)}
    monkeypatch.setattr("deqlqr.reproduce_msa.LR_GRID", grid)
    monkeypatch.setattr("deqlqr.reproduce_msa.LR_GRID_MNIST", grid)
    monkeypatch.setattr("deqlqr.reproduce_msa.RHO_GRID_MNIST", (1.0,))
    whole = load_data("sine")
    few = Data(*(t[::50] for t in (whole.train_x, whole.train_y, whole.test_x, whole.test_y)), 1)
    monkeypatch.setattr("deqlqr.reproduce_msa.load_data", lambda name, root=None: few)


def sine_problem():
    data = load_data("sine")
    data = Data(*(t[::50].float() for t in (data.train_x, data.train_y, data.test_x, data.test_y)))
    return Problem("p", lambda: sine_network("good"), data, sine_loss, 20, 1, 20)


def test_the_networks_are_the_papers():
    net = sine_network("good")
    assert len(net) == 21 and sum(p.numel() for p in net.parameters()) == 20 * 30
    weights = torch.cat([p.flatten() for p in net.parameters() if p.dim() == 2]).detach()
    biases = torch.cat([p for p in net.parameters() if p.dim() == 1]).detach()
    assert float(weights.abs().max()) <= 0.2 and 0.08 < float(weights.std()) < 0.1
    assert torch.allclose(biases, torch.full_like(biases, 0.1))
    x = torch.randn(3, 1)
    states = sine_network("zero")(x)
    assert torch.equal(states, x.expand(3, 5))  # from zero parameters nothing moves
    assert torch.allclose(sine_loss(states, 4 * x), x.square().mean(), rtol=1e-5)
    assert torch.allclose(net[1](x.expand(3, 5)) - x, net[1].layer(x.expand(3, 5)).tanh() / 4)
    with pytest.raises(ValueError, match="initial must be"):
        sine_network("bad")
    net = image_network(32)
    assert net(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    kernels = [p.shape for p in net.parameters() if p.dim() == 4]
    assert kernels == [(32, 1, 3, 3)] + 8 * [(32, 32, 3, 3)]


def test_e_msa_takes_the_image_network():
    torch.manual_seed(0)
    model, x, y = image_network(2), torch.randn(10, 1, 28, 28), torch.arange(10)
    msa = MSA(model, rho=1.0, max_iter=2)
    losses = [float(msa.step(x, y)) for _ in range(3)]
    assert losses[-1] < losses[0] and msa.last_step.kept == ()


def test_figure_1_is_drawn_with_numbers_and_finished_runs_are_kept(small, tmp_path, monkeypatch):
    line = reproduce_emsa_fig1(None, tmp_path, 2)
    assert "paper reports" in line and "good parameters: E-MSA" in line and "after 10" in line
    assert (tmp_path / "emsa-fig1.png").read_bytes()[:4] == b"\x89PNG"
    content = json.loads((tmp_path / "emsa-fig1.json").read_text())
    assert content["line"] == line and set(content["panels"]) == {"good", "zero"}
    rows = content["panels"]["zero"]
    assert [row["label"] for row in rows] == [
        "E-MSA, rho 10", "E-MSA, rho adaptive", "SGD, lr 0.01", "SGD, lr 1e+38", "Adam, lr 0.01"
    ]  # fmt: skip
    assert [rows[i]["steps"] for i in (0, 1, 2, 4)] == [2, 2, 2 * BUDGET, 2 * BUDGET]
    assert sum(row["chosen"] for row in rows) == 3 and not rows[3]["chosen"]
    assert rows[3]["failure"] is not None and rows[3]["judged"] is None
    monkeypatch.setattr(Method, "stepper", refusing(Method.stepper))
    assert reproduce_emsa_fig1(None, tmp_path, 2) == line
    with pytest.raises(ValueError, match="holds another run"):
        reproduce_emsa_fig1(None, tmp_path, 3)


def refusing(stepper):
    def refuse(self, model, loss):
        found, optimizer = stepper(self, model, loss)
        found.step = lambda x, y: pytest.fail("ran again")
        return found, optimizer

    return refuse


@pytest.mark.parametrize(
    "method", [Method("E-MSA", 4, rho=1.0, adaptive=True), Method("Adam", 4, lr=0.01)]
)
def test_an_interrupted_run_goes_on_bit_for_bit(method, tmp_path, monkeypatch, few_layers):
    problem = sine_problem()
    assert finish(problem, method, tmp_path / "whole", quiet=True) is None
    made = Method.stepper

    def interrupting(self, model, loss):
        stepper, optimizer = made(self, model, loss)
        step, taken = stepper.step, []

        def count(x, y):
            taken.append(None)
            if len(taken) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return step(x, y)

        stepper.step = count
        return stepper, optimizer

    monkeypatch.setattr(Method, "stepper", interrupting)
    with pytest.raises(KeyboardInterrupt):
        finish(problem, method, tmp_path / "parts", quiet=True)
    assert len(read_metrics(tmp_path / "parts" / "metrics.jsonl")) == 3
    monkeypatch.setattr(Method, "stepper", made)
    assert finish(problem, method, tmp_path / "parts", quiet=True) is None
    whole, parts = (read_metrics(tmp_path / n / "metrics.jsonl") for n in ("whole", "parts"))
    plain = lambda lines: [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    assert plain(whole) == plain(parts) and len(whole) == 5
    assert whole[-1]["loss"] < whole[0]["loss"] and whole[-1]["seconds"] > 0


def test_the_best_of_each_grid_is_chosen_and_a_failed_run_only_if_all_failed():
    row = lambda method, judged: {"method": method, "judged": judged}
    rows = [row("SGD", 2.0), row("SGD", 1.0), row("Adam", float("inf")), row("SGD", float("inf"))]
    assert chosen(rows) == [rows[1], rows[2]]
    found = methods([Method("E-MSA", 7, rho=1.0)], {"SGD": (0.1, 0.3)})
    assert [m.label for m in found] == ["E-MSA, rho 1", "SGD, lr 0.1", "SGD, lr 0.3"]
    assert [m.steps for m in found] == [7, 7 * BUDGET, 7 * BUDGET]


@pytest.fixture
def images(small, monkeypatch):
    torch.manual_seed(0)
    x, y = torch.randn(400, 1, 28, 28), torch.arange(400) % 10
    data = Data(x[:300], y[:300], x[300:], y[300:])
    monkeypatch.setattr("deqlqr.reproduce_msa.SAMPLES", 300)
    monkeypatch.setattr("deqlqr.reproduce_msa.BATCH", 20)
    monkeypatch.setattr("deqlqr.reproduce_msa.FEW", 1)
    monkeypatch.setattr("deqlqr.reproduce_msa.load_data", lambda name, root=None: data)


def test_figure_2_compares_by_iteration_and_by_second(images, tmp_path):
    line = reproduce_emsa_fig2(Path("mnist"), tmp_path, 2)
    assert "1 channels" in line and "after 2" in line and " s" in line
    assert (tmp_path / "emsa-fig2.png").exists()
    (rows,) = json.loads((tmp_path / "emsa-fig2.json").read_text())["panels"].values()
    assert {row["method"] for row in rows} == {"E-MSA", "SGD", "Adam"}
    assert rows[0]["seconds_per_step"] > rows[1]["seconds_per_step"]
    assert 0 <= rows[0]["lines"]["test_accuracy"] <= 1
