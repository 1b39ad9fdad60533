"""Tests for `deqlqr/autograd_update.py`."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, hessian

from deqlqr.autograd_update import gradient_update, misalignment, natural_update

from .problems import randn


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, randn(5, 3), torch.tensor([0, 2, 1, 1, 0])


def at(model, u):
    """Return the model's parameters, by name, moved by u (m,)."""
    parts = u.split([p.numel() for p in model.parameters()])
    named = model.named_parameters()
    return {
        name: p.detach() + part.view_as(p) for (name, p), part in zip(named, parts, strict=True)
    }


def size(model):
    return sum(p.numel() for p in model.parameters())


def test_the_gradient_is_that_of_finite_differences(problem):
    model, x, y = problem
    loss = lambda u: F.cross_entropy(functional_call(model, at(model, u), (x,)), y)
    steps = 1e-5 * torch.eye(size(model), dtype=torch.float64)
    slopes = torch.stack([(loss(h) - loss(-h)) / 2e-5 for h in steps])
    assert torch.allclose(gradient_update(model, x, y), -slopes, atol=1e-9)


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_the_natural_step_is_that_of_the_hessian_of_the_divergence(problem, damping):
    model, x, y = problem
    with torch.no_grad():
        reference = model(x).log_softmax(-1)

    def divergence(u):
        moved = functional_call(model, at(model, u), (x,)).log_softmax(-1)
        return (reference.exp() * (reference - moved)).sum(-1).mean()

    fisher = hessian(divergence)(torch.zeros(size(model), dtype=torch.float64))
    damped = fisher + damping * torch.eye(len(fisher), dtype=torch.float64)
    expected = torch.linalg.solve(damped, gradient_update(model, x, y))
    found = natural_update(model, x, y, damping)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12 / damping)


@pytest.mark.parametrize("damping", [0.0, -1.0, math.inf, math.nan])
def test_a_damping_that_is_not_positive_is_refused(problem, damping):
    with pytest.raises(ValueError, match="damping must"):
        natural_update(*problem, damping)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.floats(-15.0, math.log10(math.pi)), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_the_misalignment_is_one_minus_the_cosine_of_any_angle(log_angle, factor, seed):
    angle = 10**log_angle
    u, v = torch.linalg.qr(randn(7, 2, seed=seed))[0].unbind(-1)
    turned = math.cos(angle) * u + math.sin(angle) * v
    found = misalignment(u, factor * turned)
    # 1 - cos t = 2 sin^2(t / 2), to the roundings of the vectors.
    assert math.isclose(math.sqrt(found), math.sqrt(2) * math.sin(angle / 2), abs_tol=1e-15)


@pytest.mark.parametrize("worse", [0.0, math.inf, math.nan])
def test_a_vector_without_direction_is_refused(worse):
    u = torch.ones(3)
    for pair in ((u, worse * u), (worse * u, u)):
        with pytest.raises(ValueError, match="u and v must"):
            misalignment(*pair)
