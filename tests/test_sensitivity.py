"""Tests for `deqlqr/sensitivity.py`, `rows.py`, `uses.py` and `pinned.py`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deqlqr import (
    DEQ,
    Controls,
    ConvergenceError,
    DenseBlock,
    Implicit,
    ImplicitNGD,
    Neumann,
    Resolvent,
)
from deqlqr.batch import Batch, require_independent
from deqlqr.loss import make_loss
from deqlqr.rows import Outer, Rows
from deqlqr.sensitivity import Sensitivity
from deqlqr.sites import Sites

from .problems import Cell, conv_batch, conv_model, dense_batch, dense_model, exact, randn, relative


class Odd(nn.Module):
    """Uses its parameters in most ways there are."""

    def __init__(self):
        super().__init__()
        self.lin, self.act, self.norm = nn.Linear(5, 5), nn.PReLU(), nn.LayerNorm(5)
        self.w = nn.Parameter(0.1 * torch.randn(5, 5))
        self.shift, self.mix = nn.Parameter(torch.randn(1, 5)), nn.Parameter(torch.randn(2, 5))

    def forward(self, x):
        h = self.act(self.lin(x) + self.shift) @ self.w
        h = self.norm(h) * torch.einsum("bi,ji->bi", x, self.mix).tanh()
        kernel = self.w[:1, None, :3]  # made from a parameter that is used by itself too
        return F.relu_(h) + torch.conv1d(x[:, None], kernel, padding=1)[:, 0]


def odd_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 5),
        Odd(),
        DEQ(DenseBlock(4, 5)),
        nn.Linear(4, 5),
        DEQ(Cell(5)),
        nn.Linear(5, 3),
    )


def image_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(64, 3),
    ).eval()  # fmt: skip


def wide_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), DEQ(DenseBlock(30, 5)), nn.Linear(30, 3))


class Transposed(nn.Module):
    """Uses a kernel by a convolution and by its transpose, and strides."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(0.3 * torch.randn(3, 1, 3, 3))
        self.up = nn.ConvTranspose2d(1, 2, 3, stride=2, padding=1, output_padding=1)

    def forward(self, x):
        y = F.conv_transpose2d(torch.tanh(F.conv2d(x, self.kernel)), self.kernel)
        return torch.tanh(self.up(y))


def transposed_model():
    torch.manual_seed(0)
    return nn.Sequential(Transposed(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(18, 3))


def rescaled_model():
    """The block's weight is above its largest norm, so it is used rescaled."""
    model = dense_model()
    with torch.no_grad():
        model[1].block.state.weight *= 4
    return model


class Around(nn.Module):
    """DEQ layers with other ways beside them, one after the other, and one called twice."""

    def __init__(self):
        super().__init__()
        self.encoder, self.gate, self.head = nn.Linear(6, 70), nn.Linear(6, 70), nn.Linear(70, 3)
        self.first = DEQ(DenseBlock(70, gain=0.1))
        self.second = DEQ(DenseBlock(70, gain=0.05))
        self.third = DEQ(DenseBlock(5, 70))
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        h = self.encoder(x) + self.gate(x)
        z = self.second(h + torch.tanh(self.first(h)))
        return self.head(z + h) + self.last(self.third(self.first(z))) * h[:, :3]


def around_model():
    torch.manual_seed(0)
    return Around()


class Nested(nn.Module):
    """A block whose value is itself the fixed point of another."""

    def __init__(self):
        super().__init__()
        self.inner, self.mix = DEQ(DenseBlock(70, gain=0.3)), nn.Linear(70, 70)

    def forward(self, z, x):
        return 0.5 * torch.tanh(self.inner(0.3 * self.mix(z) + x))


def nested_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 70), DEQ(Nested()), nn.Linear(70, 3))


CASES = {
    "a layer in a layer": (nested_model, dense_batch),
    "ways beside the layers": (around_model, dense_batch),
    "dense": (dense_model, dense_batch),
    "conv": (conv_model, conv_batch),
    "wide": (wide_model, dense_batch),
    "rescaled": (rescaled_model, dense_batch),
    "two layers, odd parts": (odd_model, dense_batch),
    "explicit": (image_model, conv_batch),
    "transposed": (transposed_model, conv_batch),
}


def jacobian(model, controls, x):
    y = model(x)
    grads = [
        torch.autograd.grad(v, controls.parameters, retain_graph=True, allow_unused=True)
        for v in y.reshape(-1)
    ]
    rows = [controls.flatten(dict(zip(controls.names, g, strict=True))) for g in grads]
    return torch.stack(rows).reshape(*y.shape, -1)


@pytest.mark.parametrize("name", CASES)
def test_products_and_rows_are_those_of_the_jacobian(name):
    make, batch = CASES[name]
    model, x = exact(make()), batch()[0].double()
    controls = Controls(model)
    J, at = jacobian(model, controls, x), Sensitivity(model, controls, x)
    c, e = randn(*at.outputs.shape, seed=1), randn(*at.outputs.shape, seed=2)
    v = randn(controls.m, seed=3)
    assert relative(at.outputs, model(x).detach()) < 1e-9
    assert relative(at.pull(c), torch.einsum("bk,bkm->m", c, J)) < 1e-9
    assert relative(at.push(v), J @ v) < 1e-9
    rows = Rows.of(at, [c, e])
    W = torch.einsum("rbk,bkm->brm", torch.stack([c, e]), J)
    assert relative(rows.dense(), W) < 1e-9
    flat, weights = W.flatten(0, 1), randn(*rows.count, seed=4)
    assert relative(rows.gram(), flat @ flat.mT) < 1e-9
    assert relative(rows.times(v), W @ v) < 1e-9
    assert relative(rows.transpose_times(weights), torch.einsum("br,brm->m", weights, W)) < 1e-9
    one, two = Rows.of(at, [c]), Rows.of(at, [c])
    assert (
        relative(
            Rows.joined([one, two]).gram(), torch.cat([W[:, 0]] * 2) @ torch.cat([W[:, 0]] * 2).mT
        )
        < 1e-9
    )


def test_every_layer_solves_for_many_cotangents_together(monkeypatch):
    solved, solve = [], Resolvent.solve
    monkeypatch.setattr(
        Resolvent, "solve",
        lambda self, right, *rest: solved.append(tuple(right.shape)) or solve(self, right, *rest),
    )  # fmt: skip
    model, x = exact(around_model()), dense_batch()[0].double()
    at = Sensitivity(model, Controls(model), x)
    cs = list(randn(20, *at.outputs.shape, seed=1))
    one_by_one = [at.cotangents(c) for c in cs]
    assert len(solved) == 80
    solved.clear()
    together = at.cotangents_of_each(cs)
    rights = sorted((k, n) for _, k, n in solved)
    assert rights == [(4, 5), *[(4, 70)] * 3, (16, 5), *[(16, 70)] * 3]
    for gs, others in zip(one_by_one, together, strict=True):
        assert [g is None for g in gs] == [g is None for g in others]
        for g, other in zip(gs, others, strict=True):
            assert g is None or relative(other, g) < 1e-9
    # Layers whose results are added are known by their one cotangent, whatever ways lead to it.
    sites = Sites(at, together[0])
    assert "encoder.weight+gate.weight+encoder.bias+gate.bias" in sites.layers


@pytest.mark.parametrize("backward", ["lqr", "neumann", "implicit"])
def test_cotangents_of_each_take_the_layers_own_backward(backward):
    model, x = exact(dense_model()), dense_batch()[0].double()
    model[1].backward = backward
    controls = Controls(model)
    at, y = Sensitivity(model, controls, x), model(x)
    found = Rows.of(at, list(torch.eye(y.shape[1]).double()[:, None].expand(-1, *y.shape)))
    for j in range(y.shape[1]):
        grads = torch.autograd.grad(y[:, j].sum(), controls.parameters, retain_graph=True)
        expected = controls.flatten(dict(zip(controls.names, grads, strict=True)))
        assert relative(found.dense()[:, j].sum(0), expected) < 1e-9


def test_a_layer_that_needs_no_gradient_is_none_of_it():
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.deq, self.head = nn.Linear(6, 6), DEQ(Cell(6)), nn.Linear(6, 2)

        def forward(self, x):
            with torch.no_grad():
                z = self.deq(self.encoder(x))
            return self.head(z)

    model, x = exact(Features()), dense_batch()[0].double()
    at = Sensitivity(model, Controls(model), x)
    rows = Rows.of(at, [torch.ones_like(at.outputs)]).dense()
    assert relative(rows[:, 0].sum(0), at.pull(torch.ones_like(at.outputs))) < 1e-12


def test_after_rows_the_layers_pull_back_as_ever():
    model, x = exact(around_model()), dense_batch()[0].double()
    at = Sensitivity(model, Controls(model), x)
    c = randn(*at.outputs.shape, seed=1)
    before = at.pull(c)
    model.first.backward = Implicit(method="krylov", max_steps=1, tol=1e-14)
    with pytest.raises(ConvergenceError):
        Sensitivity(model, at.controls, x).cotangents(c)
    assert torch.equal(at.pull(c), before) or relative(at.pull(c), before) < 1e-9
    at.cotangents_of_each([c, 2 * c])
    assert relative(at.pull(c), before) < 1e-9


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 1, "padding": 2},
        {"kernel_size": (2, 3), "padding": (0, 1), "dilation": (2, 1)},
        {"kernel_size": (3, 2), "padding": (2, 0), "dilation": (1, 3)},
        {"kernel_size": 3, "stride": (2, 1), "padding": 1},
        {"kernel_size": (7, 8)},  # one position
    ],
)
def test_rows_of_a_convolution_are_those_of_autograd(options, layout):
    conv = nn.Conv2d(3, 4, **options).double()
    x = randn(5, 3, 7, 8).to(memory_format=layout)
    at = Sensitivity(nn.Sequential(conv, nn.Flatten()), Controls(conv), x)
    c = randn(*at.outputs.shape, seed=1)
    rows = Rows.of(at, [c]).dense()[:, 0]
    for s in range(len(x)):
        grads = torch.autograd.grad((conv(x[s : s + 1]).flatten(1) * c[s]).sum(), conv.parameters())
        assert relative(rows[s], torch.cat([g.flatten() for g in grads])) < 1e-12


def test_a_large_weight_is_kept_as_a_product():
    model, (x, _) = dense_model(), dense_batch()
    at = Sensitivity(model, Controls(model), x)
    rows = Rows.of(at, [torch.ones_like(at.outputs)])
    kinds = dict(zip(at.controls.names, (type(part) for part in rows.parts), strict=True))
    assert kinds["0.weight"] is kinds["2.weight"] is kinds["1.block.input.weight"] is Outer


def test_an_inexact_layer_is_linearised_as_it_differentiates():
    model = dense_model().double()
    model[1].backward = Neumann(terms=2)
    x = dense_batch()[0].double()
    controls = Controls(model)
    at, y = Sensitivity(model, controls, x), model(x)
    c = torch.ones_like(y)
    grads = torch.autograd.grad(y, controls.parameters, c)
    expected = controls.flatten(dict(zip(controls.names, grads, strict=True)))
    assert relative(at.pull(c), expected) < 1e-12


def test_batch_statistics_are_held_in_trials_though_a_graph_hangs_on_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    x, y = dense_batch(12)
    with pytest.raises(ValueError, match="mixes the samples"):
        ImplicitNGD(model, route="output").step(x, y)
    optimizer = ImplicitNGD(model, route="krylov", lr=50.0, damping=1e-4)  # which is too far
    optimizer.step(x, y)
    assert optimizer.last_step.rejections and optimizer.last_step.accepted
    twin = copy.deepcopy(model)
    held = model[1].running_mean.clone()
    optimizer = ImplicitNGD(twin, route="krylov", damping=1.0)
    optimizer.step(x, y)
    expected = 0.9 * held + 0.1 * model[0](x).mean(0)
    assert torch.allclose(twin[1].running_mean, expected, atol=1e-6)  # moved once


@pytest.mark.parametrize("layer", [DEQ(DenseBlock(3)), nn.BatchNorm1d(3)])
def test_independence_is_found_out(layer):
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.Linear(3, 3)).double()
    at = Batch(model, Controls(model), make_loss("mse"), [(randn(6, 3), randn(6, 3, seed=1))])
    if isinstance(layer, DEQ):
        require_independent(at)
        return
    held = layer.running_mean.clone()
    with pytest.raises(ValueError, match="mixes the samples"):
        require_independent(at)
    assert torch.equal(held, layer.running_mean)


class Mixing(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


def test_mixing_that_no_operation_gives_away_is_found_out():
    model = nn.Sequential(nn.Linear(3, 3), Mixing()).double()
    at = Batch(model, Controls(model), make_loss("mse"), [(randn(6, 3), randn(6, 3, seed=1))])
    with pytest.raises(ValueError, match="mixes the samples"):
        require_independent(at)


class OwnRow(nn.Module):
    """A parameter with an entry for each sample."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.ones(5, 6))

    def forward(self, x):
        return x * self.rows


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(5, 5)

    def forward(self, x):
        return self.lin(x.mT).mT


@pytest.mark.parametrize(
    "part, message", [(OwnRow(), "is a sample's own"), (Turned(), "has not the batch first")]
)
def test_a_use_without_gradients_of_samples_is_refused(part, message):
    model, x = nn.Sequential(part, nn.Linear(6, 2)), dense_batch()[0]
    at = Sensitivity(model, Controls(model), x)
    c = torch.ones_like(at.outputs)
    with pytest.raises(ValueError, match=message):
        at.cotangents(c)
    assert relative(at.pull(c), Controls(model).pull(model(x), c)) < 1e-6  # products need none
