"""Tests for `deqlqr/stiefel.py`, and for orthogonal weights in models that are trained."""

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev
from torch.nn.utils import parametrizations

from deqlqr import DEQ, Anderson, Cyclic, DenseBlock, ImplicitNGD, check_equivalence
from deqlqr.stiefel import Stiefel, orthonormal, polar

from .problems import dense_batch, exact, randn, relative
from .test_spectral_bound import assert_routes_take_the_dense_step

SHAPES = [(4, 2), (2, 4), (3, 3), (4, 1)]
MAPS = {
    "polar": orthonormal,
    "matrix_exp": lambda m: parametrizations.orthogonal(m, orthogonal_map="matrix_exp"),
    "cayley": lambda m: parametrizations.orthogonal(m, orthogonal_map="cayley"),
    "householder": lambda m: parametrizations.orthogonal(m, orthogonal_map="householder"),
}


def away_from_identity(W):
    """The distance of W'W, or WW' of a wide W, from I."""
    tall = W if W.shape[0] >= W.shape[1] else W.mT
    return float((tall.mT @ tall - torch.eye(tall.shape[1]).double()).norm().detach())


def model_of(hold):
    """Encoder (tall), state matrix (square) and readout (tall), all orthonormal."""
    torch.manual_seed(0)
    block = DenseBlock(4)
    model = nn.Sequential(nn.Linear(3, 4), DEQ(block), nn.Linear(4, 5)).double()
    for layer in (model[0], block.state, model[2]):
        hold(layer)
    return exact(model)


def held(model):
    return [model[0].weight, model[1].block.state.weight, model[2].weight]


def batch(samples=6):
    x, y = dense_batch(samples, width=3)
    return x.double(), y


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(SHAPES), st.floats(-3, 3), st.integers(0, 100))
def test_the_polar_factor_is_that_of_scipy_and_the_closest(shape, log_scale, seed):
    V = 10.0**log_scale * randn(*shape, seed=seed)
    Q = polar(V)
    side = "right" if shape[0] >= shape[1] else "left"
    np.testing.assert_allclose(Q, scipy.linalg.polar(V.numpy(), side=side)[0], atol=1e-11)
    assert away_from_identity(Q) < 1e-13
    other = polar(randn(*shape, seed=seed + 1000))
    assert float((V - Q).norm()) <= float((V - other).norm()) * (1 + 1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("orthonormal_point", [False, True])
def test_derivatives_of_first_and_second_order(shape, orthonormal_point):
    V = randn(*shape, seed=2)
    V = (polar(V) if orthonormal_point else V).requires_grad_()
    assert gradcheck(polar, (V,), check_forward_ad=True)
    assert gradgradcheck(polar, (V,), check_fwd_over_rev=True)


def test_third_derivatives_and_transforms():
    Q, C = polar(randn(4, 3)), randn(4, 3, seed=1)
    g = lambda V: (C * polar(V)).sum()
    assert gradgradcheck(grad(g), (Q.clone().requires_grad_(),), fast_mode=True)
    want = jacrev(jacrev(g))(Q)
    for found in (hessian(g)(Q), jacrev(jacfwd(g))(Q), torch.vmap(hessian(g))(Q[None])[0]):
        assert relative(found, want) < 1e-12
    with pytest.raises(RuntimeError, match="forward derivative of a forward derivative"):
        jacfwd(jacfwd(g))(Q)


def test_a_small_step_is_the_riemannian_one():
    Q, D = polar(randn(5, 3)), randn(5, 3, seed=1)
    tangent = D - Q @ (Q.mT @ D + D.mT @ Q) / 2
    moved = lambda t: (polar(Q + t * D) - Q) / t
    assert relative(moved(1e-7), tangent) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    V = randn(8, 5).float()
    with torch.autocast("cpu", dtype):
        assert relative(polar(V), polar(V.double()).float()) < 1e-5
    assert polar(V.to(dtype)).dtype == dtype
    assert relative(polar(V.to(dtype)).float(), polar(V.to(dtype).float())) < 0.01


def test_assigning_keeps_an_orthonormal_weight_and_wrong_calls_are_named():
    layer = orthonormal(nn.Linear(3, 5).double())
    Q = polar(randn(5, 3))
    layer.weight = Q
    assert relative(layer.weight, Q) < 1e-14
    with pytest.raises(ValueError, match="W must have full rank"):
        layer.weight = torch.ones(5, 3).double()
    with pytest.raises(ValueError, match="name must be that of a parameter"):
        orthonormal(nn.Linear(3, 3), "gain")
    with pytest.raises(ValueError, match="weight must be a real floating-point matrix"):
        orthonormal(nn.Conv2d(3, 3, 3))
    with pytest.raises(ValueError, match="V must be a real floating-point matrix"):
        polar(torch.ones(3, 3, dtype=torch.long))
    zero = nn.Linear(3, 3)
    nn.init.zeros_(zero.weight)
    with pytest.raises(ValueError, match="full rank"):
        orthonormal(zero)
    assert isinstance(layer.parametrizations.weight[0], Stiefel)


def train(model, x, y, kind):
    losses = []
    if kind in ("SGD", "Adam"):
        rate = {"SGD": 0.5, "Adam": 0.03}[kind]
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=rate)
    elif kind == "LBFGS":
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3, line_search_fn="strong_wolfe")
    else:
        route = Cyclic() if kind == "cyclic" else kind
        optimizer = ImplicitNGD(model, route=route, damping=0.3)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(10):
        ours = isinstance(optimizer, ImplicitNGD)
        losses.append(float((optimizer.step(x, y) if ours else optimizer.step(closure)).detach()))
    return losses


CASES = [("polar", kind) for kind in ("SGD", "Adam", "LBFGS", "output")]
CASES += [("matrix_exp", "krylov"), ("cayley", "cyclic")]
CASES += [("householder", "dare"), ("householder", "sampled")]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's householder in vmap
@pytest.mark.parametrize("name, kind", CASES)
def test_every_optimiser_stays_on_the_manifold(name, kind):
    model, (x, y) = model_of(MAPS[name]), batch(4)
    model[1].solver = Anderson(tol=1e-7)
    start = [W.detach().clone() for W in held(model)]
    losses = train(model, x, y, kind)
    assert losses[-1] < 0.9 * losses[0]
    for W, before in zip(held(model), start, strict=True):
        assert away_from_identity(W) < 1e-10 and relative(W, before) > 1e-3
    W = model[1].block.weight
    assert away_from_identity(W / 0.9) < 1e-10


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", MAPS)
def test_every_route_takes_the_dense_step(name):
    assert_routes_take_the_dense_step(model_of(MAPS[name]), *batch(2))


def test_every_row_of_the_equivalence_holds():
    report = check_equivalence(model_of(orthonormal), *batch(2))
    assert report.passed, str(report)
