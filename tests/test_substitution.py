"""Tests for `deqlqr/substitution.py`: modules that stand in several places stay what they are."""

import torch
from torch import nn

from deqlqr import DEQ, Controls, DenseBlock, ImplicitNGD, linearize
from deqlqr.substitution import Substitution, called_with

from .problems import dense_batch, randn, relative


class Twice(nn.Module):
    """A module under two names, and a weight that two modules share."""

    def __init__(self, n=4):
        super().__init__()
        self.first = nn.Linear(n, n)
        self.again = nn.Sequential(self.first, nn.Tanh())
        self.other = nn.Linear(n, n, bias=False)
        self.other.weight = self.first.weight
        self.register_buffer("scale", torch.tensor(0.25))

    def forward(self, z, x):
        return self.scale * self.again(self.first(z) + self.other(z) + x)


def test_every_place_gets_the_value_and_the_module_is_left_as_it_was():
    block = Twice().double()
    named = dict(block.named_parameters())
    weight, bias = named["first.weight"], named["first.bias"]
    W, b, z, x = randn(4, 4), randn(4, seed=1), randn(3, 4, seed=2), randn(3, 4, seed=3)
    got = called_with(block, {"first.weight": W, "first.bias": b}, z, x)
    inner = z @ W.T + b + z @ W.T + x
    assert relative(got, 0.25 * torch.tanh(inner @ W.T + b)) < 1e-14
    assert block.first.weight is weight is block.again[0].weight is block.other.weight
    assert block.first.bias is bias and isinstance(weight, nn.Parameter)
    scaled = Substitution(block, {"scale": block.scale})({"scale": torch.tensor(0.5)}, (z, x), {})
    assert relative(scaled, 2 * block(z, x)) < 1e-14


def test_a_block_that_holds_a_module_twice_trains():
    model = nn.Sequential(nn.Linear(6, 4), DEQ(Twice()), nn.Linear(4, 3)).double()
    (x, y), block = dense_batch(), model[1].block
    x = x.double()
    layer = model[1]
    model(x).square().sum().backward()
    assert isinstance(block.first.weight, nn.Parameter) and block.first.weight is block.other.weight
    exact = block.first.weight.grad.clone()
    model.zero_grad()
    z = torch.zeros(len(x), 4, dtype=torch.float64)
    for _ in range(200):
        z = block(z, model[0](x))
    model[2](z).square().sum().backward()
    assert relative(block.first.weight.grad, exact) < 1e-6 and layer.solution.converged.all()
    losses = [float(ImplicitNGD(model, damping=0.1).step(x, y)) for _ in range(3)]
    assert losses[-1] < losses[0]


def test_linearize_leaves_a_model_that_holds_a_module_twice_as_it_was():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Sequential(self.a, nn.Tanh())
            self.deq, self.head = DEQ(DenseBlock(4)), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.deq(self.b(self.a(x))))

    model, (x, y) = Model().double(), dense_batch(width=4)
    before = Controls(model)
    lqr = linearize(model, x.double(), y)
    after = Controls(model)
    assert all(p is q for p, q in zip(before.parameters, after.parameters, strict=True))
    p = torch.linalg.solve(torch.eye(lqr.n) - lqr.A.mT, lqr.a)
    gradient = after.pull(nn.functional.cross_entropy(model(x.double()), y))
    assert relative(lqr.B.mT @ p + lqr.b, gradient) < 1e-5
