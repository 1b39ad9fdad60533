"""Tests for `deqlqr/monitor.py`."""

import pytest
import torch
from torch import nn

from deqlqr import DEQ, ConvBlock, DenseBlock, Monitor, jacobian_penalty, jacobian_radius

from .problems import randn


class Linear(nn.Module):
    """f(z, x) = W z + x."""

    def __init__(self, W):
        super().__init__()
        self.W = nn.Parameter(W)

    def forward(self, z, x):
        return z @ self.W.mT + x


def matrices():
    rotation = 0.9 * torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    yield "rotation", rotation
    yield "nilpotent", torch.tensor([[0.0, 5.0], [0.0, 0.0]], dtype=torch.float64)
    for n in (30, 100, 200):
        W = randn(n, n, seed=n)
        yield f"random {n}", 0.9 * W / torch.linalg.eigvals(W).abs().max()
        T = torch.triu(randn(n, n, seed=n)) / n**0.5
        T.diagonal().copy_(torch.linspace(-0.8, 0.7, n))
        yield f"triangular {n}", T


@pytest.mark.parametrize("name, W", list(matrices()), ids=lambda v: v if isinstance(v, str) else "")
def test_the_radius_is_that_of_the_dense_jacobian(name, W):
    layer = DEQ(Linear(W))
    x = randn(3, len(W))
    exact = float(torch.linalg.eigvals(W).abs().max())
    radius = jacobian_radius(layer, 0 * x, x)
    assert radius.shape == (3,)
    assert torch.allclose(radius, torch.full_like(radius, exact), rtol=0.05, atol=1e-6)


def test_the_radius_of_a_convolutional_state_agrees_with_its_dense_jacobian():
    torch.manual_seed(0)
    block = ConvBlock(4, 12, init_scale=0.2).double()
    layer, x = DEQ(block), randn(2, 4, 6, 6)
    z = layer(x).detach()
    A = torch.stack([
        torch.func.jacrev(lambda v, s=s: block(v[None], x[s : s + 1])[0])(z[s]).reshape(144, 144)
        for s in range(2)
    ])
    exact = torch.linalg.eigvals(A).abs().amax(-1)
    assert torch.allclose(jacobian_radius(layer, z, x), exact, rtol=0.05)


def test_an_observation_is_flat_and_the_alarm_rings_before_the_fixed_point_is_lost():
    W = torch.diag(torch.tensor([0.5, 0.97], dtype=torch.float64))
    layer, x = DEQ(Linear(W), solver="picard", max_steps=3000), randn(6, 2)
    monitor = Monitor(layer, alarm=0.99)
    with pytest.raises(ValueError, match="has not been called"):
        monitor.observe(x)
    layer(x).sum().backward()
    seen = vars(monitor.observe(x))
    assert seen["radius"] == pytest.approx(0.97) and seen["failed"] == 0
    assert seen["evaluations"] > 100 and seen["residual"] < 1e-8
    assert seen["backward_evaluations"] > 0 and seen["backward_error"] < 1e-8
    with pytest.warns(RuntimeWarning, match="has reached 0.970"):
        Monitor(layer, alarm=0.95).observe(x)
    layer.on_failure, layer.solver = "return", type(layer.solver)(max_steps=2)
    layer(x)
    assert monitor.observe(x).failed == 1.0


def test_the_penalty_is_the_dense_one_and_trains():
    torch.manual_seed(0)
    block, x = DenseBlock(6, max_norm=None, gain=0.9).double(), randn(4, 6)
    layer = DEQ(block, tol=1e-12)
    z = layer(x)

    def dense(z):
        A = torch.stack([
            torch.func.jacrev(lambda v, s=s: block(v[None], x[s : s + 1])[0])(z[s])
            for s in range(4)
        ])
        return A.square().sum() / (4 * 6)

    generator = torch.Generator().manual_seed(0)
    estimate = jacobian_penalty(layer, z, x, samples=4000, generator=generator)
    assert float(estimate.detach()) == pytest.approx(float(dense(z).detach()), rel=0.03)
    generator = torch.Generator().manual_seed(1)
    (ours,) = torch.autograd.grad(
        jacobian_penalty(layer, layer(x), x, samples=4000, generator=generator), block.state.weight
    )
    (exact,) = torch.autograd.grad(dense(layer(x)), block.state.weight)
    assert (ours - exact).norm() < 0.1 * exact.norm()
    with pytest.raises(ValueError, match="samples must be"):
        jacobian_penalty(layer, z, x, samples=0)
    with pytest.raises(ValueError, match="alarm must be"):
        Monitor(layer, alarm=0.0)
