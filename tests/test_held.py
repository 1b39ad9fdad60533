"""Tests for `deqlqr/held.py`: weights made once in a solve, and nowhere else."""

import torch
from torch import nn

from deqlqr import DEQ, DenseBlock
from deqlqr.held import held, holding

from .problems import randn


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.V = nn.Parameter(0.4 * torch.eye(5, dtype=torch.float64) + 0.05)
        self.made = 0

    def _make(self):
        self.made += 1
        return self.V / (1 + self.V.square().sum())

    def forward(self, z, x):
        return torch.tanh(z @ held("counting", self._make, self.V) + x)


def test_a_solve_makes_a_weight_once_and_its_derivative_makes_its_own():
    block = Counting()
    layer, x = DEQ(block), randn(3, 5)
    with torch.no_grad():
        layer(x)
    assert layer.solution.evaluations.min() > 3 and block.made == 1
    with torch.no_grad():
        layer(x)  # another solve
    assert block.made == 2
    layer(x).square().sum().backward()
    (found,) = [block.V.grad.clone()]
    z = torch.zeros_like(x)
    for _ in range(200):
        z = block(z, x)
    (expected,) = torch.autograd.grad(z.square().sum(), block.V)
    assert torch.allclose(found, expected, rtol=1e-8)


def test_changed_tensors_are_made_anew_and_nothing_is_kept_outside_or_with_derivatives():
    V, made = torch.ones(2), []
    make = lambda: made.append(1) or float(V.sum())
    store = {}
    with torch.no_grad(), holding(store):
        assert held("sum", make, V) == held("sum", make, V) == 2.0 and len(made) == 1
        V.mul_(3)
        assert held("sum", make, V) == 6.0
        with holding(None):
            held("sum", make, V)
        assert len(made) == 3
    with holding(store):
        held("sum", make, V)
    held("sum", make, V)
    assert len(made) == 5


def test_transforms_and_inference_mode_see_their_own_weights():
    layer, x = DEQ(DenseBlock(4)).double(), randn(3, 4)
    weights = torch.stack([s * layer.block.state.weight.detach() for s in (0.5, 3.0, 8.0)])

    def of(weight):
        named = {"block.state.weight": weight}
        return torch.func.functional_call(layer, named, (x,))

    together = torch.vmap(of)(weights)
    for weight, z in zip(weights, together, strict=True):
        assert torch.allclose(of(weight), z, atol=1e-9)
    with torch.inference_mode():
        inside = layer(x)
    assert torch.allclose(inside, layer(x).detach(), atol=1e-9)
