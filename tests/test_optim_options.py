"""Tests for the options of `ImplicitNGD`: damping, groups, momentum, chunks, checks, state."""

import copy

import pytest
import torch
from torch import nn

from deqlqr import (
    DEQ,
    Controls,
    ConvBlock,
    DenseBlock,
    ImplicitNGD,
    Kronecker,
    Krylov,
    Output,
    Sampled,
)
from deqlqr.adaptation import LEAST, MOST, next_factor, raised
from deqlqr.output_space import OutputSpace

from .problems import dense_batch, dense_model, exact, randn, relative

ROUTES = {"dare": "dare", "output": Output(), "sampled": Sampled(), "krylov": Krylov(),
          "kronecker": Kronecker(update_every=2, refresh_every=3)}  # fmt: skip


def fresh(samples=12, **options):
    model, (x, y) = exact(dense_model()), dense_batch(samples)
    settings = {"lr": 0.5, "damping": 0.1, "route": Output()} | options
    return model, ImplicitNGD(model, **settings), x.double(), y


def change(model, optimizer, x, y):
    before = Controls(model).vector
    optimizer.step(x, y)
    return Controls(model).vector - before


@pytest.mark.parametrize("route", ROUTES)
def test_state_dict_resumes_bit_for_bit(route):
    options = {"route": ROUTES[route], "momentum": 0.5, "adaptive": True, "weight_decay": 1e-3}
    model, optimizer, x, y = fresh(**options)
    for _ in range(4):
        optimizer.step(x, y)
    other = copy.deepcopy(model)
    twin = ImplicitNGD(other, lr=9.0, damping=9.0, **({"route": ROUTES[route], "adaptive": True}))
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(4):
        assert torch.equal(optimizer.step(x, y), twin.step(x, y))
    assert torch.equal(Controls(model).vector, Controls(other).vector)


@pytest.mark.parametrize("route", ["output", "krylov", "kronecker"])
@pytest.mark.parametrize("layers", [0, 2])
def test_any_number_of_layers(route, layers):
    torch.manual_seed(0)
    parts = [DEQ(DenseBlock(4)) for _ in range(layers)] or [nn.Tanh()]
    model = nn.Sequential(nn.Linear(6, 4), *parts, nn.Linear(4, 3))
    x, y = dense_batch(20)
    optimizer = ImplicitNGD(model, lr=0.5, damping=0.1, route=ROUTES[route])
    losses = [float(optimizer.step(x, y)) for _ in range(10)]
    assert losses[-1] < 0.9 * losses[0]
    assert (optimizer.last_step.evaluations == 0) == (layers == 0)


def test_chunks_and_accumulated_batches_are_one_step():
    whole, chunked, gathered = fresh(), fresh(chunk_size=5), fresh()
    expected = change(whole[0], *whole[1:])
    assert relative(change(chunked[0], *chunked[1:]), expected) < 1e-9
    model, optimizer, x, y = gathered
    before = Controls(model).vector
    optimizer.accumulate(x[:3], y[:3])
    optimizer.accumulate(x[3:], y[3:])
    loss = optimizer.step()
    assert relative(Controls(model).vector - before, expected) < 1e-9
    assert float(loss) == pytest.approx(whole[1].last_step.loss)
    with pytest.raises(ValueError, match="needs a batch"):
        optimizer.step()
    with pytest.raises(ValueError, match="not a closure"):
        optimizer.step(lambda: 0.0)


def test_momentum_and_weight_decay_are_those_of_the_docs():
    model, optimizer, x, y = fresh(momentum=0.9, weight_decay=0.01)
    twin, plain, *_ = fresh()
    theta = Controls(model).vector
    u = change(twin, plain, x, y) / 0.5
    assert relative(change(model, optimizer, x, y), 0.5 * (u - 0.01 * theta)) < 1e-9
    theta = Controls(model).vector
    Controls(twin).assign(theta)
    second = change(twin, plain, x, y) / 0.5
    assert relative(change(model, optimizer, x, y), 0.5 * (0.9 * u + second - 0.01 * theta)) < 1e-8


def test_groups_have_their_own_options():
    model = exact(dense_model())
    x, y = dense_batch(12)
    groups = [{"params": model[0].parameters(), "lr": 0.25, "damping": 1e6}]
    optimizer = ImplicitNGD(model, lr=0.5, damping=0.1, route="output", param_groups=groups)
    assert len(optimizer.param_groups) == 2
    moved = Controls(model).unflatten(change(model, optimizer, x.double(), y))
    assert float(moved["0.weight"].norm()) < 1e-6 < 1e-3 < float(moved["2.weight"].norm())
    with pytest.raises(ValueError, match="no option 'rate'"):
        ImplicitNGD(model, param_groups=[{"params": model[0].parameters(), "rate": 1.0}])


def test_freezing_between_steps():
    model, optimizer, x, y = fresh(momentum=0.5)
    optimizer.step(x, y)
    model[0].requires_grad_(False)
    held = model[0].weight.clone()
    optimizer.step(x, y)
    assert torch.equal(held, model[0].weight)
    model[0].requires_grad_(True)
    optimizer.step(x, y)
    assert not torch.equal(held, model[0].weight)
    model.add_module("new", nn.Linear(3, 3).double())
    with pytest.raises(ValueError, match="add_param_group"):
        optimizer.step(x, y)


@pytest.mark.parametrize("route", ROUTES)
def test_the_trust_region_bounds_the_divergence(route):
    model, optimizer, x, y = fresh(route=ROUTES[route], trust_region=1e-4, lr=1.0)
    before = torch.log_softmax(model(x), -1).detach()
    optimizer.step(x, y)
    after = torch.log_softmax(model(x), -1).detach()
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    assert optimizer.last_step.shortened < 1
    # A random estimate of the metric bounds its own value, which is not quite the divergence.
    loose = 20.0 if route in {"sampled", "kronecker"} else 1.2
    assert 1e-4 / loose < divergence < 1e-4 * loose


def test_adaptive_damping_follows_the_model():
    torch.manual_seed(0)
    x, y = randn(30, 3), randn(30, 2, seed=1)
    model = nn.Linear(3, 2).double()  # its loss is its quadratic model
    optimizer = ImplicitNGD(model, loss="mse", route="output", damping=1.0, adaptive=True)
    optimizer.step(x, y)
    assert optimizer.last_step.ratio == pytest.approx(1.0, abs=1e-6)
    assert optimizer.current_damping == pytest.approx(1 / 3)
    bent, optimizer, x, y = fresh(adaptive=True, damping=1e-4, lr=3.0, max_increase=10.0)
    optimizer.step(x, y)
    assert optimizer.last_step.ratio < 0.25 and optimizer.current_damping >= 3e-4


def test_the_acceleration_takes_the_bend_of_the_outputs_back():
    torch.manual_seed(0)
    x = torch.cartesian_prod(*2 * [torch.linspace(-1, 1, 8, dtype=torch.float64)])
    y = ((3 * x[:, 0]).sin() * (2 * x[:, 1]).cos())[:, None]
    losses = {}
    for acceleration in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(DEQ(DenseBlock(10, 2, max_norm=None)), nn.Linear(10, 1)).double()
        optimizer = ImplicitNGD(
            model, loss="mse", route="output", damping=0.1, adaptive=True, max_increase=0.0,
            damping_increase=3.0, acceleration=acceleration, max_rejections=12,
        )  # fmt: skip
        losses[acceleration] = [float(optimizer.step(x, y)) for _ in range(25)][-1]
    assert losses[True] < 0.5 * losses[False]


def test_unchecked_steps_are_undone_when_they_turn_out_bad():
    model, optimizer, x, y = fresh(check_every=100, lr=0.5)
    optimizer.step(x, y)
    assert optimizer.last_step.loss_after != optimizer.last_step.loss_after  # was not looked at
    good = optimizer._recall("previous").clone()
    with torch.no_grad():
        model[2].weight.mul_(100.0)
    optimizer.step(x, y)
    assert optimizer.last_step.rolled_back and optimizer.counts["rolled back"] == 1
    assert float((Controls(model).vector - good).norm()) < 5.0
    assert optimizer.last_step.damping == pytest.approx(1.0)
    steps = [optimizer.step(x, y) for _ in range(3)]
    assert optimizer.counts["steps"] == 5 and len(steps) == 3


def test_events_are_counted_and_logged(caplog):
    model, optimizer, x, y = fresh(max_rejections=1, step_tolerance=1e-30)
    with caplog.at_level("INFO", logger="deqlqr"):
        optimizer.step(x, y)
    assert optimizer.counts == {"steps": 1, "rejected": 2, "rolled back": 0, "given up": 1}
    assert "step rejected at damping" in caplog.text and "step given up" in caplog.text


def test_dropout_outside_the_layer_is_the_same_in_step_and_check():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), DEQ(DenseBlock(4, 8)), nn.Linear(4, 3))
    x, y = dense_batch(20)
    optimizer = ImplicitNGD(model, lr=1e-6, damping=1.0, route="output")
    optimizer.step(x, y)
    assert optimizer.last_step.loss_after == pytest.approx(optimizer.last_step.loss, rel=1e-4)


def test_linear_algebra_that_fails_rejects_the_attempt(monkeypatch):
    model, optimizer, x, y = fresh(max_rejections=3)
    solve, tried = OutputSpace.solve, []

    def failing(self, shifts):
        tried.append(shifts[0])
        if len(tried) < 3:
            raise torch.linalg.LinAlgError("did not converge")
        return solve(self, shifts)

    monkeypatch.setattr(OutputSpace, "solve", failing)
    optimizer.step(x, y)
    assert tried == pytest.approx([0.1, 1.0, 10.0]) and optimizer.last_step.accepted
    assert optimizer.last_step.rejections == ("linear algebra failed: did not converge",) * 2


def test_parameters_survive_an_error_in_the_middle_of_a_step(monkeypatch):
    model, optimizer, x, y = fresh()
    before = Controls(model).vector

    def interrupted(self, start):
        raise KeyboardInterrupt

    monkeypatch.setattr(ImplicitNGD, "_checked", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(x, y)
    assert torch.equal(Controls(model).vector, before)


@pytest.mark.parametrize("route", ["output", "sampled", "krylov", "kronecker"])
def test_a_step_under_autocast_is_that_in_single_precision_but_for_the_models_rounding(route):
    losses = {}
    for half in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1), DEQ(ConvBlock(4)), nn.Flatten(),
            nn.Linear(4 * 16, 5),
        )  # fmt: skip
        x, y = torch.randn(16, 1, 8, 8), torch.arange(16) % 5
        optimizer = ImplicitNGD(model, route=route, lr=0.5, damping=0.1)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses[half] = [float(optimizer.step(x, y)) for _ in range(6)]
        assert optimizer.counts["rejected"] == 0
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses[True] == pytest.approx(losses[False], rel=0.02)
    assert losses[True][-1] < 0.9 * losses[True][0]


def test_layers_that_meet_are_one_under_autocast_too():
    keys = set()
    for half in (False, True):
        model, (x, y) = dense_model(), dense_batch(12)
        optimizer = ImplicitNGD(model, route=Kronecker(), damping=0.1)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            optimizer.step(x, y)
        keys.add(tuple(optimizer.state[optimizer.controls.parameters[0]]["layers"]))
    assert len(keys) == 1 and len(next(iter(keys))) == 3


def test_the_factor_on_the_damping_keeps_within_its_limits_and_finds_back():
    factor = 1.0
    for _ in range(20):
        factor = raised(factor, 10.0)
    assert factor == MOST and next_factor(factor, rejected=True, increase=10.0) == MOST
    for _ in range(24):
        factor = next_factor(factor, rejected=False, increase=10.0)
    assert factor == pytest.approx(1.0)
    good = {"rejected": False, "increase": 10.0, "adaptive": True}
    assert next_factor(1.0, ratio=0.9, **good) == pytest.approx(1 / 3)
    assert next_factor(1.0, ratio=0.5, **good) == 1.0 == next_factor(1.0, ratio=None, **good)
    assert next_factor(1.0, ratio=0.1, **good) == 3.0
    assert next_factor(LEAST, ratio=0.9, **good) == LEAST


@pytest.mark.parametrize("route", ["sampled", "kronecker", "output"])
def test_outputs_that_overflow_are_a_step_given_up_not_an_error(route):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    opt = ImplicitNGD(model, route=route, lr=0.1, damping=0.1)
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    opt.step(x, y)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1e20)
    before = [p.clone() for p in model.parameters()]
    opt.step(1e3 * x, y)
    assert not opt.last_step.accepted
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
