"""Tests for `deqlqr/equivalence.py`: equilibria, explicit networks, and the link between them."""

import json

import pytest
import torch
from torch import nn

import deqlqr.adjoint as adjoint
import deqlqr.deq_equivalence as deq_equivalence
from deqlqr import (
    DEQ,
    LQR,
    Controls,
    ConvergenceError,
    DenseBlock,
    InputCost,
    check_equivalence,
    solve_finite_lqr,
    static_step,
)
from deqlqr.horizons import free_rows

from .problems import Cell, conv_batch, conv_model, dense_batch, dense_model, make_lqr, randn

BATCHES = {"dense": (dense_model, dense_batch), "conv": (conv_model, conv_batch)}


@pytest.mark.parametrize("kind", BATCHES)
def test_every_row_holds_and_the_model_is_left_alone(kind):
    make, batch = BATCHES[kind]
    model, (x, y) = make(), batch()
    before = Controls(model).vector
    report = check_equivalence(model, x, y)
    assert report.passed and report.complete, str(report)
    assert len(report.rows) == 15
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
    real = deq_equivalence.steady_state

    def wrong(lqr, dare=None):
        state = real(lqr, dare)
        object.__setattr__(state, "u", state.u * (1 + 1e-5))
        return state

    monkeypatch.setattr(deq_equivalence, "steady_state", wrong)
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


def horizon_rows(n=5, m=4, rho=0.8, batch=2, seed=0, delta=0.1):
    """Rows of an LQR with a large Q and a readout whose controls do not drive the state."""
    lqr = make_lqr(n, m, (batch,), rho, seed)
    B, M = lqr.B.clone(), lqr.M.clone()
    R, b = lqr.R.clone(), lqr.b.clone()
    B[..., 2:], M[..., :2, :], R[..., :2, :], R[..., :2], b[..., :2] = 0, 0, 0, 0, 0
    lqr = LQR(lqr.A, B, lqr.Q, InputCost.of(R), M, lqr.a, b)
    return lqr, free_rows("step", lqr, delta), delta


@pytest.mark.parametrize("seed", range(4))
def test_horizons_with_running_cost_approach_the_steady_state_those_with_terminal_cost_do_not(seed):
    _, (running, terminal), _ = horizon_rows(seed=seed)
    assert running.passed and running.error < 1e-9 and "falls by" in running.note
    assert terminal.passed and terminal.error < 1e-9
    cosines = [float(text) for text in terminal.note.split("(F3): ")[1].split(", ")]
    assert min(cosines) < 0.97


def test_the_sum_of_the_controls_for_a_terminal_cost_without_curvature_is_the_gradient():
    lqr, _, delta = horizon_rows()
    N, zero = 200, [torch.zeros_like(X) for X in (lqr.Q, lqr.a)]
    R = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
    found = solve_finite_lqr(
        [lqr.A] * N, [lqr.B] * N, [zero[0]] * (N + 1), [R] * N, a=[*[zero[1]] * N, lqr.a]
    )
    adjoint = torch.linalg.solve(torch.eye(5) - lqr.A.mT, lqr.a[..., None])
    gradient = (lqr.B.mT @ adjoint)[..., 0]
    assert torch.allclose(torch.stack(found.u).sum(0), -gradient, rtol=0, atol=1e-12)


def test_a_wrong_turnpike_fails_its_row(monkeypatch):
    import deqlqr.horizons as horizons

    monkeypatch.setattr(horizons, "static_step", lambda lqr: static_step(lqr) * (1 + 1e-6))
    _, (running, terminal), _ = horizon_rows()
    assert running.passed is False and terminal.passed


def test_horizons_that_are_too_long_or_unstable_are_skipped_with_a_reason():
    for rho, word in ((0.9999, "too close to 1"), (1.1, "not below 1")):
        terminal = horizon_rows(rho=rho)[1][1]
        assert terminal.passed is None and word in terminal.note
    wide = horizon_rows(n=257, m=3, rho=0.5, batch=1)[1]
    assert all(row.passed is None and "above 256" in row.note for row in wide)


def network(kind):
    torch.manual_seed(1)
    if kind == "conv":
        return nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2)),
            nn.GroupNorm(1, 3),
            nn.Flatten(),
            nn.Linear(12, 6),
            nn.Tanh(),
            nn.Linear(6, 3),
        ), torch.randn(4, 1, 6, 6)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(4, 6)


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_every_row_of_an_explicit_network_holds(kind):
    (net, x), y = network(kind), torch.tensor([0, 1, 2, 1])
    before = Controls(net).vector
    report = check_equivalence(net, x, y)
    assert report.passed and report.complete and len(report.rows) == 9, str(report)
    assert all(row.error < 1e-9 for row in report.rows)
    assert torch.equal(Controls(net).vector, before)
    assert report.facts["layers"] == (2 if kind == "dense" else 4)
    assert "layers = " in str(report) and json.dumps(report.to_dict())


def test_other_losses_and_divergences_of_an_explicit_network():
    (net, x), y = network("dense"), randn(4, 3)
    assert check_equivalence(net, x, y, loss="mse").passed
    square = lambda y, r: (y - r).square().sum() / 2
    assert check_equivalence(net, x, y, loss="mse", divergence=square).complete
    report = check_equivalence(net, x, y, loss="mse", divergence="euclidean")
    assert report.passed and len(report.rows) == 2


def test_a_wrong_recursion_fails_every_row_it_is_in(monkeypatch):
    import deqlqr.finite_route as finite_route

    def wrong(*args, **options):
        found = solve_finite_lqr(*args, **options)
        object.__setattr__(found, "u", tuple(u * (1 + 1e-5) for u in found.u))
        return found

    monkeypatch.setattr(finite_route, "solve_finite_lqr", wrong)
    (net, x), y = network("dense"), torch.tensor([0, 1, 2, 1])
    report = check_equivalence(net, x, y)
    failed = [row for row in report.rows if row.passed is False]
    assert len(failed) == 6 and {row.quantity for row in failed} == {
        "gradient", "CategoricalKL step", "Newton step"}  # fmt: skip


def test_networks_without_phases_or_too_large_ones_say_so():
    class Opaque(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network("dense")[0]

        def forward(self, x):
            return self.net(x)

    (net, x), y = network("dense"), torch.tensor([0, 1, 2, 1])
    report = check_equivalence(Opaque(), x, y)
    skipped = [row for row in report.rows if row.passed is None]
    assert report.passed and len(skipped) == 7
    assert all("has no phases" in row.note for row in skipped)
    with pytest.raises(ValueError, match="max_states = 8, got 20"):
        check_equivalence(net, x, y, max_states=8)
    with pytest.raises(ValueError, match="y must hold labels"):
        check_equivalence(net, x, y + 5)
    rows = check_equivalence(net, x, y, max_controls=10).rows
    assert any(row.passed is None and "max_controls" in row.note for row in rows)
