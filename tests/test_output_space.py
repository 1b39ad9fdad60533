"""Tests for `deqlqr/output_space.py` and `ImplicitNGD(route="output")`."""

import copy

import pytest
import torch
from torch import nn

from deqlqr import DEQ, Anderson, Controls, DenseBlock, ImplicitNGD, static_step
from deqlqr.divergence import CategoricalKL, Custom, GaussianKL
from deqlqr.linearize import linearize_samples
from deqlqr.loss import make_loss
from deqlqr.output_space import linearize_outputs

from .problems import conv_batch, conv_model, dense_batch, dense_model, randn, relative

MODELS = {
    "dense": (dense_model, dense_batch),
    "without encoder": (lambda: dense_model(encoder=False), lambda: dense_batch(width=5)),
    "conv": (conv_model, conv_batch),
}
SQUARE = Custom(lambda y, r: ((y - r) ** 2 * torch.arange(1, 4)).sum())


def exact(model):
    model = model.double()
    for module in model.modules():
        if isinstance(module, DEQ):
            module.solver = Anderson(tol=1e-13, max_steps=1000)
    return model


@pytest.mark.parametrize(
    "divergence", [CategoricalKL(), GaussianKL(), SQUARE], ids=["cat", "gauss", "own"]
)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("damping", [1e-3, 0.3])
def test_the_step_is_that_of_the_static_problem(name, divergence, damping):
    make, batch = MODELS[name]
    model, (x, y) = exact(make()), batch()
    loss = make_loss("cross_entropy")
    outputs = linearize_outputs(model, x.double(), y, loss, divergence)
    u, residual = outputs.step(damping)
    lqr = linearize_samples(model, x.double(), y, loss, divergence).exact().damped(damping)
    assert relative(u, static_step(lqr)) < 1e-9 and residual < 1e-9
    model.zero_grad()
    nn.functional.cross_entropy(model(x.double()), y).backward()
    named = {k: p.grad for k, p in model.named_parameters()}
    assert relative(outputs.gradient, Controls(model).flatten(named)) < 1e-9


def test_a_wide_state_goes_by_the_krylov_route():
    torch.manual_seed(0)
    model = exact(nn.Sequential(DEQ(DenseBlock(60, 5)), nn.Linear(60, 3)))
    x, y = randn(4, 5), torch.arange(4) % 3
    outputs = linearize_outputs(model, x, y, make_loss("cross_entropy"), CategoricalKL())
    lqr = linearize_samples(model, x, y, make_loss("cross_entropy"), CategoricalKL()).exact()
    assert relative(outputs.step(0.1)[0], static_step(lqr.damped(0.1))) < 1e-9


def test_both_routes_train_to_the_same_parameters():
    model, (x, y) = exact(dense_model()), dense_batch(12)
    twins = {route: copy.deepcopy(model) for route in ("dare", "output")}
    for route, twin in twins.items():
        optimizer = ImplicitNGD(twin, lr=1.0, damping=0.3, route=route)
        losses = [float(optimizer.step(x.double(), y)) for _ in range(5)]
        assert losses[-1] < losses[0] and optimizer.last_step.step_residual < 1e-8
        assert (optimizer.last_step.closed_loop_radius is None) == (route == "output")
    a, b = (Controls(twin).vector for twin in twins.values())
    assert relative(a, b) < 1e-9


def test_float32_and_a_step_that_is_rejected():
    model, (x, y) = dense_model(), dense_batch()
    optimizer = ImplicitNGD(model, lr=1.0, damping=1e-2, route="output")
    before = Controls(model).vector
    assert float(optimizer.step(x, y)) > 0 and optimizer.last_step.accepted
    assert not torch.equal(Controls(model).vector, before)
    strict = ImplicitNGD(
        model, lr=1.0, damping=1e-2, route="output", step_tolerance=1e-30, max_rejections=1
    )
    before = Controls(model).vector
    strict.step(x, y)
    assert not strict.last_step.accepted and torch.equal(Controls(model).vector, before)
    assert "hold only to" in strict.last_step.rejections[0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"divergence": "newton"}, "needs a divergence of the output"),
        ({"divergence": "euclidean"}, "needs a divergence of the output"),
        ({"minibatch": "per-sample"}, "needs minibatch"),
    ],
)
def test_what_the_route_cannot_do_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ImplicitNGD(dense_model(), route="output", **options)


def test_a_model_that_mixes_samples_is_refused():
    model = nn.Sequential(DEQ(DenseBlock(3)), nn.BatchNorm1d(3), nn.Linear(3, 3))
    optimizer = ImplicitNGD(model, route="output")
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        optimizer.step(randn(6, 3).float(), torch.arange(6) % 3)
