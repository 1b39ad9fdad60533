"""The steps of `ImplicitNGD` beside damped solves with the curvature of curvlinops."""

import pytest
import torch
from torch import nn

from deqlqr import Controls, ImplicitNGD, Krylov

from .problems import dense_batch, dense_model, exact, randn, relative

curvlinops = pytest.importorskip("curvlinops")

ROUTES = {"output": "output", "krylov": Krylov(max_steps=500, progress=0.0, tol=1e-12)}


def explicit(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def deq(outputs=3):
    model = exact(dense_model())
    model[-1] = nn.Linear(4, outputs).double()
    return model


def damped_solve(operator, model, x, y, loss, delta):
    """Return -(C + delta I)^-1 g, C the curvature that curvlinops gives."""
    controls = Controls(model)
    eye = torch.eye(controls.m).double()
    with torch.no_grad():
        curvature = operator(
            model, loss, list(model.parameters()), [(x, y)], check_deterministic=False
        )
        C = curvature @ eye
    return -torch.linalg.solve(C + delta * eye, controls.pull(loss(model(x), y)).detach())


def own_step(model, x, y, **options):
    before = Controls(model).vector
    ImplicitNGD(model, lr=1.0, max_increase=100.0, **options).step(x, y)
    return Controls(model).vector - before


@pytest.mark.parametrize("route", ROUTES.values(), ids=list(ROUTES))
@pytest.mark.parametrize("make", [explicit, deq])
def test_natural_steps_equal_those_of_its_gauss_newton_matrix(make, route):
    x, labels = dense_batch(8)
    x, values = x.double(), randn(8, 2, seed=1)
    ggn = curvlinops.GGNLinearOperator  # for these losses the Fisher matrix too
    expected = damped_solve(ggn, make(), x, labels, nn.CrossEntropyLoss(), 0.05)
    found = own_step(make(), x, labels, damping=0.05, route=route)
    assert relative(found, expected) < 1e-6
    expected = damped_solve(ggn, make(2), x, values, nn.MSELoss(), 0.05)
    found = own_step(make(2), x, values, loss="mse", damping=0.05, route=route)
    assert relative(found, expected) < 1e-6


@pytest.mark.parametrize("make", [explicit, deq])
def test_newton_steps_equal_those_of_its_hessian(make):
    x, y = dense_batch(8)
    expected = damped_solve(
        curvlinops.HessianLinearOperator, make(), x.double(), y, nn.CrossEntropyLoss(), 3.0
    )
    found = own_step(
        make(), x.double(), y, divergence="newton", damping=3.0, route=ROUTES["krylov"]
    )
    assert relative(found, expected) < 1e-6
