"""Tests for `deqlqr/unrolled.py`: the warm-up of a DEQ by a few iterations of its block."""

import os
import signal
from collections import Counter

import pytest
import torch
from torch import nn

from deqlqr import DEQ, DenseBlock, ImplicitNGD
from deqlqr.checkpoint import load_checkpoint
from deqlqr.deq import layers_of
from deqlqr.gradient_step import GradientStep
from deqlqr.training import CHECKPOINT, TrainConfig, Trainer, resume_config
from deqlqr.unrolled import Unrolled, unrolled

from .problems import dense_batch, dense_model, randn, relative

ROUTES = ("output", "kronecker", "krylov", "sampled")


class Shifted(nn.Module):
    """A block with two inputs, a keyword and two states."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3, 3)

    def state_shape(self, x, w):
        return (3,), (2,)

    def forward(self, z, x, w, *, scale=1.0):
        a, b = z
        return torch.tanh(0.3 * self.mix(a) + x + b.sum(1, True)), 0.2 * scale * b + w


def iterated(block, z, depth, *inputs, **shared):
    """(D5), written out."""
    for _ in range(depth):
        z = block(z, *inputs, **shared)
    return z


@pytest.mark.parametrize("depth", [1, 4])
def test_gradients_are_those_of_all_the_iterations(depth):
    model = dense_model().double()
    x, y = dense_batch(samples=6)
    x = x.double()
    encoder, layer, readout = model
    z = iterated(layer.block, torch.zeros(6, 4, dtype=x.dtype), depth, encoder(x))
    expected = nn.functional.cross_entropy(readout(z), y)
    exact = torch.autograd.grad(expected, list(model.parameters()))
    with unrolled(model, depth):
        loss = nn.functional.cross_entropy(model(x), y)
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert torch.equal(loss, expected)
    for g, e in zip(found, exact, strict=True):
        assert relative(g, e) < 1e-12 if e.norm() else not g.any()


def test_in_the_limit_the_gradient_is_that_of_the_equilibrium():
    model = dense_model().double()
    model[1].solver = type(model[1].solver)(tol=1e-13)
    x, y = dense_batch(samples=6)
    found = []
    for depth in (None, 300):
        model.zero_grad()
        if depth is None:
            nn.functional.cross_entropy(model(x.double()), y).backward()
        else:
            with unrolled(model, depth):
                nn.functional.cross_entropy(model(x.double()), y).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative(found[1], found[0]) < 1e-9


def test_the_parameters_keep_their_names_and_are_the_same_objects():
    model = nn.Sequential(dense_model(), DEQ(DenseBlock(3)))
    before = [(name, id(p)) for name, p in model.named_parameters()]
    state = list(model.state_dict())
    with unrolled(model, 3):
        assert not layers_of(model)
        assert [(name, id(p)) for name, p in model.named_parameters()] == before
        assert list(model.state_dict()) == state
    assert len(layers_of(model)) == 2
    assert [(name, id(p)) for name, p in model.named_parameters()] == before


class Sharing(nn.Module):
    """One layer under two names, and once more inside another module."""

    def __init__(self):
        super().__init__()
        self.one = DEQ(DenseBlock(4))
        self.other = self.one
        self.inner = nn.Sequential(self.one)

    def forward(self, x):
        return self.one(x), self.other(x), self.inner(x)


def test_a_shared_layer_is_unrolled_at_every_place():
    model, x = Sharing().double(), randn(5, 4)
    layer = model.one
    expected = iterated(layer.block, torch.zeros_like(x), 2, x)
    with unrolled(model, 2):
        assert all(torch.equal(z, expected) for z in model(x))
    assert model.one is layer and model.other is layer and model.inner[0] is layer


def test_the_layers_are_back_after_an_error():
    model = dense_model()
    layer = model[1]
    with pytest.raises(RuntimeError, match="in the middle"):
        with unrolled(model, 3):
            assert model[1] is not layer
            raise RuntimeError("in the middle")
    assert model[1] is layer
    with pytest.raises(ValueError, match="depth must be"):
        with unrolled(model, 0):
            pass
    assert model[1] is layer


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(training):
    model = dense_model().train(training)
    layer = model[1]
    with unrolled(model, 3):
        assert all(module.training == training for module in model.modules())
    assert layer.training == layer.block.training == training


def test_it_takes_what_the_layer_takes():
    block = Shifted().double()
    layer, model = DEQ(block), nn.ModuleList([DEQ(block)])
    x, w = randn(5, 3), randn(5, 2, seed=1)
    start = (randn(5, 3, seed=2), randn(5, 2, seed=3))
    zero = (torch.zeros_like(x), torch.zeros_like(w))
    with unrolled(model, 3):
        z = model[0](x, w, scale=0.5, key="a batch")
        near = model[0](x, w, z0=start)
    assert same(z, iterated(block, zero, 3, x, w, scale=0.5))
    assert same(near, iterated(block, start, 3, x, w))
    fixed = Unrolled(layer, 200)(x, w)
    assert all(relative(a, b) < 1e-6 for a, b in zip(fixed, layer(x, w), strict=True))


def same(a, b):
    """Whether nested containers of tensors agree in every bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_it_works_under_the_transforms_of_torch():
    model, x = dense_model().double(), randn(5, 6)
    named = {name: 1.1 * p.detach() for name, p in model.named_parameters()}
    with unrolled(model, 3):
        call = lambda x: torch.func.functional_call(model, named, (x,))
        _, pushed = torch.func.jvp(call, (x,), (torch.ones_like(x),))
        _, pull = torch.func.vjp(call, x)
        rows = torch.func.vmap(lambda row: call(row[None])[0])(x)
    c = randn(5, 3, seed=1)
    assert float((c * pushed).sum()) == pytest.approx(float(pull(c)[0].sum()))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(named[name])
    with unrolled(model, 3):
        assert relative(rows, model(x)) < 1e-12


@pytest.mark.parametrize("depth", [0, -1, 2.5, True, None])
def test_a_bad_depth_is_refused(depth):
    with pytest.raises(ValueError, match="^depth must"):
        Unrolled(DEQ(DenseBlock(4)), depth)
    with pytest.raises(ValueError, match="^depth must"):
        with unrolled(dense_model(), depth):
            pass


def test_a_bare_layer_is_refused():
    with pytest.raises(ValueError, match="model must hold its DEQ layer"):
        with unrolled(DEQ(DenseBlock(4)), 3):
            pass


def test_a_model_without_layers_stays_as_it_is():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), torch.ones(2, 4)
    before = model(x)
    with unrolled(model, 3):
        assert torch.equal(model(x), before)


# --- optimizers ------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [0.0, 0.1])
@pytest.mark.parametrize("name", ["adam", *ROUTES])
def test_one_optimizer_steps_through_the_warm_up_and_after_it(name, penalty):
    model = dense_model().double()
    x, y = dense_batch(samples=12)
    x = x.double()
    if name == "adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        stepper = GradientStep(model, optimizer, penalty=penalty)
    else:
        stepper = ImplicitNGD(model, lr=0.5, damping=0.3, route=name, penalty=penalty)
    losses = []
    for taken in range(8):
        if taken < 4:
            with unrolled(model, 3):
                losses.append(float(stepper.step(x, y)))
                if taken == 0:
                    shallow = float(nn.functional.cross_entropy(model(x), y).detach())
                    assert shallow < losses[0]  # the step was one of the shallow network
        else:
            losses.append(float(stepper.step(x, y)))
        if name != "adam":
            assert stepper.last_step.accepted and not stepper.last_step.rolled_back
            assert (stepper.last_step.evaluations == 0) == (taken < 4)
    assert losses[-1] < losses[4] < losses[0]
    assert float(nn.functional.cross_entropy(model(x), y).detach()) < losses[-1]


def test_the_kronecker_memory_holds_every_parameter_once_after_the_warm_up():
    model = dense_model().double()
    x, y = dense_batch(samples=12)
    optimizer = ImplicitNGD(model, lr=0.3, damping=0.3, route="kronecker")
    names = [name for name, _ in model.named_parameters()]

    def known():
        layers = optimizer.state[optimizer.controls.parameters[0]]["layers"]
        tokens = [t for key in layers for t in key.replace("&", "+").split("+") if t]
        return Counter(token.removesuffix("'") for token in tokens)

    with unrolled(model, 3):
        for _ in range(3):
            optimizer.step(x.double(), y)
        assert known() == Counter(names)
    for _ in range(12):  # the metric is not looked at in every step
        optimizer.step(x.double(), y)
    assert known() == Counter(names)
    with unrolled(model, 3):
        for _ in range(12):
            optimizer.step(x.double(), y)
        assert known() == Counter(names)


@pytest.mark.parametrize("route", ["dare", "cyclic"])
def test_routes_that_need_the_layer_say_so_within_the_warm_up(route):
    model = dense_model().double()
    x, y = dense_batch(samples=6)
    optimizer = ImplicitNGD(model, route=route)
    before = [p.detach().clone() for p in model.parameters()]
    with unrolled(model, 3), pytest.raises(ValueError, match="DEQ layer"):
        optimizer.step(x.double(), y)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# --- a run -----------------------------------------------------------------------------------


def config(optimizer):
    options = {"lr": 0.01} if optimizer == "adam" else {"lr": 0.5, "route": "kronecker"}
    return TrainConfig(
        optimizer=optimizer, batch_size=8, train_size=40, epochs=2, log_every=2, eval_size=20,
        warmup=4, warmup_depth=3, penalty=0.05, **options,
    )  # fmt: skip


def start(folder, optimizer):
    return Trainer(config(optimizer), folder, torch.device("cpu"))


@pytest.mark.parametrize("optimizer", ["adam", "ingd"])
@pytest.mark.parametrize("stop", [2, 4])
def test_a_run_interrupted_in_the_warm_up_goes_on_to_the_same_numbers(
    tmp_path, monkeypatch, optimizer, stop
):
    monkeypatch.setattr("deqlqr.training.plot_curves", lambda *_: None)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trainer, depths = start(whole, optimizer), []
    inner = trainer.stepper.step

    def seen(x, y):
        depths.append(len(layers_of(trainer.model)))
        return inner(x, y)

    monkeypatch.setattr(trainer.stepper, "step", seen)
    assert trainer.run(quiet=True).steps == 10
    assert depths == [0] * 4 + [1] * 6

    trainer = start(cut, optimizer)
    step = trainer.stepper.step

    def interrupted(x, y):
        if trainer.step == stop - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(x, y)

    monkeypatch.setattr(trainer.stepper, "step", interrupted)
    result = trainer.run(quiet=True)
    assert result.interrupted and result.steps == stop
    assert len(layers_of(trainer.model)) == 1
    stored, content, folder = resume_config(cut, None)
    assert Trainer(stored, folder, torch.device("cpu"), content).run(quiet=True).steps == 10
    first, second = (load_checkpoint(f / CHECKPOINT) | {"seconds": 0} for f in (whole, cut))
    assert same(first, second)
