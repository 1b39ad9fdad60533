"""Tests for `deqlqr/equivalence.py`."""

import json

import pytest
import torch
from torch import nn

import deqlqr.adjoint as adjoint
import deqlqr.equivalence as equivalence
from deqlqr import DEQ, Controls, ConvergenceError, DenseBlock, check_equivalence

from .problems import Cell, conv_batch, conv_model, dense_batch, dense_model, randn

BATCHES = {"dense": (dense_model, dense_batch), "conv": (conv_model, conv_batch)}


@pytest.mark.parametrize("kind", BATCHES)
def test_every_row_holds_and_the_model_is_left_alone(kind):
    make, batch = BATCHES[kind]
    model, (x, y) = make(), batch()
    before = Controls(model).vector
    report = check_equivalence(model, x, y)
    assert report.passed and report.complete, str(report)
    assert len(report.rows) == 13
    gradient = [row for row in report.rows if row.quantity == "gradient"]
    assert len(gradient) == 3 and all(row.error < 1e-9 for row in gradient)
    assert all(row.error < 1e-7 for row in report.rows)
    assert torch.equal(Controls(model).vector, before) and before.dtype == torch.float32


def test_a_row_that_a_model_does_not_allow_is_skipped_and_says_why():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), DEQ(Cell(5)), nn.Linear(5, 3))
    report = check_equivalence(model, *dense_batch())
    assert report.passed and not report.complete
    (skipped,) = [row for row in report.rows if row.passed is None]
    assert skipped.right == "cyclic DARE, layer by layer (C4)" and "has no phases" in skipped.note


def test_the_tied_row_reports_the_rate_of_the_spectral_radius():
    report = check_equivalence(conv_model(), *conv_batch())
    (row,) = [r for r in report.rows if r.left == "N steps, tied control"]
    assert "falls by" in row.note and str(round(report.facts["rho(A)"], 2))[:4] in row.note


def test_least_squares_and_users_divergences_are_checked_too():
    model, (x, _) = dense_model(), dense_batch()
    assert check_equivalence(model, x, randn(5, 3), loss="mse").passed
    square = lambda y, r: (y - r).square().sum() / 2
    report = check_equivalence(model, x, randn(5, 3), loss="mse", divergence=square)
    assert report.passed and any(row.quantity == "Custom step" for row in report.rows)


def test_a_wrong_route_fails_its_row(monkeypatch):
    real = equivalence.steady_state

    def wrong(lqr, dare=None):
        state = real(lqr, dare)
        object.__setattr__(state, "u", state.u * (1 + 1e-5))
        return state

    monkeypatch.setattr(equivalence, "steady_state", wrong)
    report = check_equivalence(dense_model(), *dense_batch())
    failed = {row.quantity for row in report.rows if row.passed is False}
    assert not report.passed
    assert failed == {"gradient", "CategoricalKL step", "Newton step"}
    assert "FAILS" in str(report) and "NOT every row holds" in str(report)


def test_a_wrong_layer_gradient_fails_its_rows(monkeypatch):
    one_step = adjoint.Neumann(terms=0).solve
    monkeypatch.setattr(adjoint.Implicit, "solve", lambda _, *given: one_step(*given))
    rows = check_equivalence(dense_model(), *dense_batch()).rows
    assert all(row.passed is False for row in rows if row.quantity == "gradient")


def test_what_is_too_large_is_skipped_and_said():
    report = check_equivalence(dense_model(), *dense_batch(), max_controls=10)
    skipped = [row for row in report.rows if row.passed is None]
    assert skipped and not report.complete and report.passed
    assert all("max_controls" in row.note for row in skipped)
    assert "skipped" in str(report)


def test_an_expanding_block_is_reported_not_passed_over():
    class Expanding(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(1.3))

        def forward(self, z, x):
            return self.rate * z + x

    model = nn.Sequential(DEQ(Expanding()), nn.Linear(4, 3))
    report = check_equivalence(model, *dense_batch(width=4))
    assert not (report.passed and report.complete)


def test_report_is_plain_data_for_json():
    report = check_equivalence(dense_model(), *dense_batch())
    content = json.loads(json.dumps(report.to_dict()))
    assert content["passed"] is True and len(content["rows"]) == len(report.rows)


def test_misuse_names_the_argument():
    model, (x, y) = dense_model(), dense_batch()
    with pytest.raises(ValueError, match="max_states = 3"):
        check_equivalence(model, x, y, max_states=3)
    with pytest.raises(ValueError, match="damping must be finite and above 0"):
        check_equivalence(model, x, y, damping=0.0)
    with pytest.raises(ValueError, match="y must hold labels"):
        check_equivalence(model, x, y + 5)
    block = DenseBlock(4, activation="relu", max_norm=None)
    with torch.no_grad():
        block.state.weight.copy_(-3 * torch.ones(4, 4))
        block.state.bias.fill_(1.0)
    lost = nn.Sequential(DEQ(block, solver="picard"), nn.Linear(4, 3))
    with torch.no_grad():
        block.state.weight.copy_(3 * torch.eye(4))
    with pytest.raises(ConvergenceError):
        check_equivalence(lost, x[:, :4].abs(), y)
