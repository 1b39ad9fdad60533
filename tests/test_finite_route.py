"""Tests for `finite_route.py`, `net_layers.py` and the route "riccati"."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from deqlqr import (
    DEQ,
    CategoricalKL,
    Controls,
    Custom,
    DenseBlock,
    Euclidean,
    GaussianKL,
    ImplicitNGD,
    Krylov,
    LayerDamping,
    NeumannInverse,
    Newton,
    Output,
    Riccati,
    bound_norm,
)
from deqlqr.loss import make_loss
from deqlqr.training import METRICS, TrainConfig, Trainer

from .problems import randn, relative
from .test_routes import TIGHT, local, step

KL = CategoricalKL()
OWN = Custom(lambda y, r: ((y - r) ** 2 * torch.arange(1, 4)).sum())
minibatches = pytest.mark.parametrize("minibatch", ["exact", "per-sample"])


class Residual(nn.Module):
    """A residual block: one layer."""

    def __init__(self, n=4):
        super().__init__()
        self.a, self.b = nn.Linear(n, n), nn.Linear(n, n)

    def forward(self, x):
        return x + self.b(torch.tanh(self.a(x)))


class Scaled(nn.Sequential):
    """With a forward of its own, and the input in every state."""

    def forward(self, x):
        return super().forward(2 * x) + 0.5 * x[:, :3]


class Phased(nn.Module):
    """Declares its phases: a pair between them, and a bias that two of them use."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 4), nn.Linear(4, 5), nn.Linear(5, 3)

    def phases(self):
        return [
            lambda x: (torch.tanh(self.a(x)), x[:, :3]),
            lambda s: (torch.tanh(self.b(s[0])), s[1]),
            lambda s: self.c(s[0]) + s[1] * self.a.bias[:3],
        ]

    def forward(self, x):
        for phase in self.phases():
            x = phase(x)
        return x


class Plain(nn.Module):
    """Two layers whose phases are given."""

    def __init__(self, *phases):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 3)
        self.given = phases

    def phases(self):
        return [lambda x, f=f: f(self, x) for f in self.given]

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def mlp(*inner):
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), *inner, nn.Linear(4, 3))


def the_same_layer_twice():
    layer = nn.Linear(4, 4)
    return mlp(layer, nn.Tanh(), layer, nn.Tanh())


def one_weight_in_two_layers():
    model = mlp(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
    model[4].weight = model[2].weight
    return model


def frozen(*which):
    model = mlp(nn.Linear(4, 4), nn.Tanh())
    for number in which:
        model[number].requires_grad_(False)
    return model


def unused():
    model = mlp()
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    return model


def with_statistics(*layers):
    """Batch normalisation with statistics that are not the first ones."""
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


# The input is a vector of 6, or an image of 1 x 6 x 6.
VECTORS = {
    "mlp": lambda: mlp(nn.Linear(4, 4), nn.Tanh()),
    "one layer": lambda: nn.Sequential(nn.Linear(6, 3)),
    "no activation": lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)),
    "in place": lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)),
    "more states than controls": lambda: nn.Sequential(
        nn.Linear(6, 1), nn.Tanh(), nn.Linear(1, 30), nn.Tanh(), nn.Linear(30, 3)
    ),
    "batch norm": lambda: with_statistics(
        nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)
    ),
    "layer norm": lambda: mlp(nn.LayerNorm(4)),
    "residual": lambda: mlp(Residual(), Residual()),
    "nested": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(6, 4), nn.Tanh()),
        nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3)),
    ),
    "own forward": lambda: Scaled(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)),
    "declared": Phased,
    "layer twice": the_same_layer_twice,
    "weight twice": one_weight_in_two_layers,
    "frozen first": lambda: frozen(0),
    "frozen last": lambda: frozen(4),
    "unused": unused,
    "spectral norm": lambda: nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 3)
    ).eval(),
    "bounded norm": lambda: nn.Sequential(
        bound_norm(nn.Linear(6, 4), max_norm=0.5), nn.Tanh(), nn.Linear(4, 3)
    ),
    "dropout": lambda: mlp(nn.Dropout(0.5)).eval(),
}
IMAGES = {
    "conv": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)
    ),
    "conv, batch norm": lambda: with_statistics(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(8, 3),
    ),
    "conv, group norm": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    ),
    "flatten first": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3)),
}  # fmt: skip
NETS = VECTORS | IMAGES
TWICE = {"layer twice", "weight twice", "declared"}
nets = pytest.mark.parametrize("name", NETS)
few = pytest.mark.parametrize("name", ["mlp", "residual", "layer twice", "conv"])


def problem(name, samples=3):
    torch.manual_seed(0)
    model = NETS[name]().double()
    shape = (1, 6, 6) if name in IMAGES else (6,)
    return model, randn(samples, *shape, seed=5), torch.arange(samples) % 3


def jacobian(model, x):
    """dy/du, `(batch, outputs, m)`, by autograd."""
    controls, y = Controls(model), model(x)
    return torch.stack([torch.stack([controls.pull(one) for one in row]) for row in y])


def gradient(model, x, y, loss="cross_entropy"):
    return Controls(model).pull(make_loss(loss)(model(x), y))


def explicit(model, x, y, divergence, damping=0.1, loss="cross_entropy"):
    """The dense damped solve, its metric and gradient; damping a number or one for each control."""
    controls = Controls(model)
    if isinstance(divergence, Euclidean):
        C = torch.eye(controls.m).double()
    else:
        J, Lambda = jacobian(model, x), divergence.metric(model(x).detach())
        C = torch.einsum("bkm,bkl,bln->mn", J, Lambda, J) / len(x)
    g = gradient(model, x, y, loss)
    D = torch.diag(torch.as_tensor(damping, dtype=torch.float64).expand(controls.m))
    return -torch.linalg.solve(C + D, g), C, g


def per_layer(found, model, layer_of):
    """The damping of every entry of u, from the report of a step."""
    controls = Controls(model)
    parts = [
        torch.full((size,), found.layer_damping[layer_of[name]], dtype=torch.float64)
        for name, size in zip(controls.names, controls.sizes, strict=True)
    ]
    return torch.cat(parts)


def trained(route, model, x, y, steps=3, **options):
    twin = copy.deepcopy(model)
    optimizer = ImplicitNGD(twin, route=route, **({"lr": 0.5, "damping": 0.1} | options))
    losses = [float(optimizer.step(x, y)) for _ in range(steps)]
    return Controls(twin).vector, losses, optimizer


@nets
def test_the_step_is_the_explicit_damped_solve(name):
    model, x, y = problem(name)
    expected, C, g = explicit(model, x, y, KL)
    ours = local(Riccati(), model, x, y, KL, pieces=2)
    found = ours.solve([0.1] * len(Controls(model).parameters))
    assert relative(found.u, expected) < 1e-10 and found.residual < 1e-11 and found.reason is None
    assert relative(ours.gradient, g) < 1e-11
    loss = make_loss("cross_entropy")(model(x), y).detach()
    assert float(ours.loss) == pytest.approx(float(loss))
    v = randn(len(g))
    assert ours.metric(v) == pytest.approx(float(v @ C @ v), rel=1e-10)
    assert found.slope == pytest.approx(float(g @ expected), rel=1e-9)
    assert found.curvature == pytest.approx(float(expected @ C @ expected), rel=1e-8)
    assert found.truncation is None is found.layer_damping
    assert found.closed_loop_radius is None is found.dare_iterations


@pytest.mark.parametrize(
    "divergence, loss",
    [(GaussianKL(), "mse"), (GaussianKL(None), "mse"), (OWN, "mse"), (Euclidean(), "mse"),
     (OWN, "cross_entropy"), (Euclidean(), "cross_entropy")],
    ids=["gaussian", "gaussian of mse", "own", "euclidean", "own, cross entropy", "plain gradient"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["residual", "weight twice", "unused"])
def test_other_divergences_have_their_explicit_step(name, divergence, loss):
    model, x, y = problem(name)
    y = randn(3, 3, seed=9) if loss == "mse" else y
    expected, C, g = explicit(model, x, y, divergence, loss=loss)
    found = step(Riccati(), model, x, y, divergence, loss=loss)
    assert relative(found.u, expected) < 1e-10 and found.residual < 1e-11
    assert found.slope == pytest.approx(float(g @ expected), rel=1e-9)
    assert found.curvature == pytest.approx(float(expected @ C @ expected), rel=1e-8)


@pytest.mark.parametrize("name", ["mlp", "residual", "conv", "spectral norm"])
def test_newton_has_the_dense_hessian(name):
    model, x, y = problem(name)
    controls, loss = Controls(model), make_loss("cross_entropy")

    def of(u):
        return loss(torch.func.functional_call(model, controls.unflatten(u), (x,)), y)

    H, g = torch.autograd.functional.hessian(of, controls.vector), gradient(model, x, y)
    found = step(Riccati(), model, x, y, Newton(), 3.0)
    expected = -torch.linalg.solve(H + 3 * torch.eye(len(g)), g)
    assert relative(found.u, expected) < 1e-9 and found.residual < 1e-10
    assert found.curvature == pytest.approx(float(expected @ H @ expected), rel=1e-7)
    least = -float(torch.linalg.eigvalsh(H)[0])
    if least > 1e-3:  # without a minimum there is no step
        failed = step(Riccati(), model, x, y, Newton(), 0.5 * least)
        assert failed.u is None and "finite LQR: 1 of 1" in failed.reason
        assert "Raise the damping" in failed.reason


@few
@pytest.mark.parametrize("divergence", [KL, Euclidean()], ids=["natural", "euclidean"])
def test_per_sample_is_the_mean_of_the_samples_own_steps(name, divergence):
    model, x, y = problem(name)
    found = step(Riccati("per-sample"), model, x, y, divergence)
    alone = [explicit(model, x[s : s + 1], y[s : s + 1], divergence)[0] for s in range(3)]
    assert relative(found.u, torch.stack(alone).mean(0)) < 1e-10
    if divergence is KL:
        assert relative(found.u, explicit(model, x, y, divergence)[0]) > 1e-2


@few
def test_groups_of_parameters_may_have_dampings_of_their_own(name):
    model, x, y = problem(name)
    controls = Controls(model)
    shifts = [0.05 + 0.1 * i for i in range(len(controls.parameters))]
    shift = torch.tensor(shifts, dtype=torch.float64)
    each = shift.repeat_interleave(torch.tensor(controls.sizes))
    found = local(Riccati(), model, x, y, KL).solve(shifts)
    assert relative(found.u, explicit(model, x, y, KL, each)[0]) < 1e-10
    with_groups = [{"params": [controls.parameters[0]], "damping": 5.0}]
    vectors = []
    for route in ("riccati", "output"):
        twin, groups = copy.deepcopy((model, with_groups))
        ImplicitNGD(twin, route=route, damping=0.1, param_groups=groups).step(x, y)
        vectors.append(Controls(twin).vector)
    assert relative(*vectors) < 1e-10


@nets
def test_the_other_routes_agree(name):
    model, x, y = problem(name)
    found = step(Riccati(), model, x, y, KL, 0.01)
    for route in (Output(), TIGHT):
        assert relative(found.u, step(route, model, x, y, KL, 0.01).u) < 1e-8


def test_krylov_agrees_on_newton():
    model, x, y = problem("residual")
    tight = Krylov(max_steps=500, progress=0.0, tol=1e-13)
    ours, other = (step(route, model, x, y, Newton(), 5.0) for route in (Riccati(), tight))
    assert relative(ours.u, other.u) < 1e-8


@pytest.mark.parametrize(
    "name",
    ["mlp", "no activation", "residual", "own forward", "declared", "layer twice", "weight twice",
     "frozen last", "unused", "bounded norm", "conv"],
)  # fmt: skip
@minibatches
def test_the_series_gives_the_exact_step_of_the_same_damping(name, minibatch):
    model, x, y = problem(name)
    damping = LayerDamping(margin=1.5)
    exact = step(Riccati(minibatch, damping=damping), model, x, y, KL, 1e-2)
    series = step(Riccati(minibatch, NeumannInverse(60), damping), model, x, y, KL, 1e-2)
    assert exact.reason is None is series.reason and exact.residual < 1e-10
    assert relative(series.u, exact.u) < 1e-8
    assert exact.truncation == 0 < series.truncation <= 1.5**-60 * (1 + 1e-9)
    assert series.layer_damping == pytest.approx(exact.layer_damping, rel=1e-8, nan_ok=True)


def layers_of_net(model, x):
    """A and B of every layer of a net of Linear, Tanh, ..., Linear, samples stacked; its output."""
    net, found = list(model), []
    parts = [net[k : k + 2] for k in range(0, len(net), 2)]
    s = x
    for part in parts:
        layer = nn.Sequential(*part)
        controls = Controls(layer)

        def of(s, layer=layer):
            return layer(s)

        A = torch.block_diag(*[torch.autograd.functional.jacobian(of, v) for v in s])
        B = jacobian(layer, s).flatten(0, 1)
        assert B.shape == (len(A), controls.m)
        found.append((A, B))
        s = layer(s).detach()
    return found, s


@pytest.mark.parametrize("margin", [1.1, 3.0])
def test_the_damping_keeps_its_margin_over_the_layers_own_curvature(margin):
    """By a recursion of its own, with the dampings that were reported."""
    model, x, y = problem("mlp")
    route = Riccati(damping=LayerDamping(margin))
    found = step(route, model, x, y, KL, 1e-3)
    chain, outputs = layers_of_net(model, x)
    P = torch.block_diag(*KL.metric(outputs)) / len(x)
    assert len(found.layer_damping) == len(chain) + 1
    asked = 0
    for delta, (A, B) in zip(found.layer_damping[:0:-1], reversed(chain), strict=True):
        C = B.mT @ P @ B
        radius = float(torch.linalg.eigvalsh(C)[-1])
        assert delta >= max(1e-3, margin * radius)
        asked += delta > 1e-3
        assert delta == pytest.approx(max(1e-3, margin * radius), rel=0.02)
        inner = torch.linalg.inv(C + delta * torch.eye(len(C)))
        P = A.mT @ (P - P @ B @ inner @ B.mT @ P) @ A
    assert asked >= 2


@pytest.mark.parametrize("inverse", ["exact", NeumannInverse(80)], ids=["exact", "neumann"])
@pytest.mark.parametrize("name", ["mlp", "layer twice", "frozen first"])
def test_the_step_with_damping_by_layer_is_the_dense_one_with_these_dampings(name, inverse):
    model, x, y = problem(name)
    found = step(Riccati("exact", inverse, LayerDamping(1.5)), model, x, y, KL, 1e-3)
    layers = {"0": 1, "2": 2, "4": 3, "6": 4 if name == "layer twice" else 3}
    if name == "frozen first":  # it belongs to the layer after it
        layers = {"2": 1, "4": 2}
    layer_of = {each: layers[each.split(".")[0]] for each in Controls(model).names}
    each = per_layer(found, model, layer_of)
    expected, C, g = explicit(model, x, y, KL, each)
    assert relative(found.u, expected) < 1e-8
    assert len(each.unique()) > 1 and each.min() >= 1e-3
    assert found.slope == pytest.approx(float(g @ expected), rel=1e-7)
    assert found.curvature == pytest.approx(float(expected @ C @ expected), rel=1e-6)


def test_one_damping_by_sweeps_is_the_exact_step():
    model, x, y = problem("residual")
    high = step(Riccati(inverse=NeumannInverse(60), damping="fixed"), model, x, y, KL, 20.0)
    assert relative(high.u, explicit(model, x, y, KL, 20.0)[0]) < 1e-10
    assert high.layer_damping[1:] == pytest.approx([20.0] * 4) and high.truncation < 1e-10
    assert high.layer_damping[0] != high.layer_damping[0]  # no controls read the output


def test_a_series_that_diverges_is_a_rejection_and_more_damping_ends_it():
    model, x, y = problem("mlp")
    route = Riccati(inverse="neumann", damping="fixed")
    report = trained(route, model, x, y, steps=1, damping=1e-3)[2].last_step
    assert report.accepted and report.truncation < 1 and len(report.rejections) >= 1
    assert "Neumann series diverges: rho / delta = " in report.rejections[0]
    report = trained(Riccati(inverse="neumann"), model, x, y, steps=1, damping=1e-3)[2].last_step
    assert report.accepted and not report.rejections and report.truncation <= 2**-20 * (1 + 1e-6)


def test_damping_by_layer_serves_newton_where_one_damping_does_not():
    model, x, y = problem("mlp")
    found = step(Riccati(damping="adaptive-layer"), model, x, y, Newton(), 1e-3)
    assert found.reason is None and found.slope < 0


NEUMANN = Riccati(inverse="neumann")
ROUTES = {"exact": "riccati", "per sample": Riccati("per-sample"), "neumann": NEUMANN}
routes = pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)


@routes
@pytest.mark.parametrize(
    "name, dtype",
    [("mlp", torch.float64), ("layer twice", torch.float32), ("conv", torch.float32)],
    ids=str,
)
def test_the_loss_falls(route, name, dtype):
    model, x, y = problem(name, 6)
    model, x = model.to(dtype), x.to(dtype)
    _, losses, optimizer = trained(route, model, x, y, steps=4, lr=1.0)
    assert losses[-1] < 0.9 * losses[0] and optimizer.counts["rejected"] == 0
    report = optimizer.last_step
    assert report.evaluations == 0 and report.residual == 0 and report.step_residual < 1e-5
    assert report.closed_loop_radius is None is report.dare_residual
    assert (report.layer_damping is None) == (route is not NEUMANN)


def test_a_model_that_holds_a_layer_twice_keeps_its_parameters():
    model, x, y = problem("layer twice")
    weight = model[2].weight
    optimizer = ImplicitNGD(model, route="riccati", damping=0.1)
    for _ in range(2):
        optimizer.step(x, y)
    assert model[2].weight is model[4].weight is weight


def test_single_precision_with_double_precision_algebra():
    model, x, y = problem("residual")
    wide, narrow = (
        trained("riccati", m, v, y, steps=1, linalg_dtype=torch.float64)[0] - Controls(m).vector
        for m, v in ((model, x), (copy.deepcopy(model).float(), x.float()))
    )
    assert narrow.dtype == torch.float32 and relative(narrow.double(), wide) < 1e-4


@pytest.mark.parametrize("route", ["riccati", NEUMANN], ids=["exact", "neumann"])
def test_state_dict_resumes_bit_for_bit(route):
    model, x, y = problem("residual")
    options = {"momentum": 0.5, "adaptive": True, "weight_decay": 1e-3}
    optimizer = ImplicitNGD(model, route=route, damping=0.1, lr=0.5, **options)
    for _ in range(2):
        optimizer.step(x, y)
    other = copy.deepcopy(model)
    twin = ImplicitNGD(other, route=route, lr=9.0, damping=9.0, adaptive=True)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        assert torch.equal(optimizer.step(x, y), twin.step(x, y))
    assert torch.equal(Controls(model).vector, Controls(other).vector)


@pytest.mark.parametrize(
    "options",
    [{"momentum": 0.5}, {"adaptive": True}, {"trust_region": 1e-3}, {"weight_decay": 0.1},
     {"check_every": 2}, {"chunk_size": 2}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_options_of_the_optimizer_do_what_they_do_on_the_route_output(options):
    model, x, y = problem("mlp", 5)
    ours, losses, optimizer = trained("riccati", model, x, y, **options)
    other, expected, reference = trained("output", model, x, y, **options)
    assert relative(ours, other) < 1e-9 and losses == pytest.approx(expected, rel=1e-9)
    mine, theirs = optimizer.last_step, reference.last_step
    assert mine.shortened == pytest.approx(theirs.shortened)
    assert (mine.ratio is None) == (theirs.ratio is None)
    assert ("trust_region" in options) == (mine.shortened < 1)


def test_accumulated_batches_are_one_batch():
    model, x, y = problem("conv", 5)
    whole = trained("riccati", model, x, y, steps=1)[0]
    optimizer = ImplicitNGD(model, route="riccati", lr=0.5, damping=0.1)
    for part in (slice(0, 2), slice(2, 5)):
        optimizer.accumulate(x[part], y[part])
    optimizer.step()
    assert relative(Controls(model).vector, whole) < 1e-12


def test_an_unchecked_step_that_raised_the_loss_is_undone():
    model, x, y = problem("mlp", 6)
    optimizer = ImplicitNGD(model, route="riccati", lr=200.0, damping=0.1, check_every=3)
    before = Controls(model).vector
    optimizer.step(x, y)
    assert optimizer.last_step.accepted and not torch.equal(Controls(model).vector, before)
    optimizer.step(x, y)
    assert optimizer.last_step.rolled_back and optimizer.counts["rolled back"] == 1


def test_layers_frozen_between_steps_stay():
    model, x, y = problem("mlp")
    optimizer = ImplicitNGD(model, route="riccati", damping=0.1)
    optimizer.step(x, y)
    model[0].requires_grad_(False)
    held = model[0].weight.clone()
    optimizer.step(x, y)
    assert torch.equal(model[0].weight, held) and optimizer.last_step.accepted


def refused(model, x=None, y=None, route="riccati", **options):
    """The message of the first step, or of the constructor, which leave the model as it was."""
    x = randn(3, 6).float() if x is None else x
    y = torch.arange(3) if y is None else y
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as error:
        ImplicitNGD(model, route=route, damping=0.1, **options).step(x, y)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    return str(error.value)


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x)


FIRST, LAST = (lambda self, x: torch.tanh(self.a(x))), (lambda self, x: self.b(x))


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: mlp(DEQ(DenseBlock(4))),
            "needs a network without DEQ layer, found 1; routes 'dare' and 'cyclic' take one",
        ),
        (Opaque, "model Opaque has no phases: a finite-horizon LQR needs an nn.Sequential"),
        (lambda: mlp(nn.BatchNorm1d(4)), r"with model.eval\(\)"),
        (lambda: mlp(nn.Dropout(0.5)), r"differ by .* \(with active dropout.*call model.eval\(\)"),
        (lambda: mlp(nn.Softmax(0)), "model mixes the samples of a batch"),
        (lambda: Plain(FIRST), r"phases of Plain must end in its output, \(3, 3\); got \(3, 4\)"),
        (lambda: Plain(FIRST, lambda s, x: (s.b(x),)), "must end in its output.*got tuple"),
        (lambda: Plain(lambda s, x: s.a(x), LAST), "must give its output; they differ by"),
        (
            lambda: Plain(lambda s, x: FIRST(s, x).detach(), LAST),
            "phases of Plain have another derivative than the model.*Does a phase detach",
        ),
        (lambda: Plain(), r"Plain.phases must return a list of at least one function"),
        (
            lambda: nn.Sequential(nn.LSTM(6, 3)),
            "layers of Sequential must return a tensor, got tuple",
        ),
        (
            lambda: mlp(nn.Linear(4, 1500), nn.Tanh(), nn.Linear(1500, 4)),
            "3 samples of up to 1500 states between two layers.*'output', 'sampled', 'krylov' or",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused(make, message):
    torch.manual_seed(0)
    found = refused(make())
    assert re.search(message, found), found


def test_phases_with_arguments_are_no_phases_of_a_model():
    class Asking(Plain):
        def phases(self, x):
            return [FIRST]

    assert "Asking.phases must take the block's inputs" in refused(Asking())


def test_numbers_that_are_no_state_are_refused():
    model = nn.Sequential(nn.Embedding(7, 2), nn.Flatten(), nn.Linear(6, 3))
    found = refused(model, torch.arange(9).reshape(3, 3) % 7)
    assert "x must be floating point" in found and "'output', 'sampled', 'krylov'" in found


@pytest.mark.parametrize(
    "most, minibatch, fits",
    [(12, "exact", True), (11, "exact", False), (4, "per-sample", True), (3, "per-sample", False)],
)
def test_too_many_states_are_refused(most, minibatch, fits):
    model, x, y = problem("mlp")
    for options in ({}, {"inverse": "neumann"}):
        route = Riccati(minibatch, max_states=most, **options)
        if fits:
            assert step(route, model, x, y, KL).reason is None
        else:
            with pytest.raises(ValueError, match="3 samples of up to 4 states between two layers"):
                step(route, model, x, y, KL)


@pytest.mark.parametrize(
    "most, route, divergence, fits",
    [  # the largest layer: 6 to 4 states... 28 parameters from the output's 3 places to 4 states
        (3 * 28 * 4, Riccati(), KL, True),
        (3 * 28 * 4 - 1, Riccati(), KL, False),
        (3 * 28 * 3, NEUMANN, KL, True),
        (3 * 28 * 3 - 1, NEUMANN, KL, False),
        (3 * 28 * 31, Riccati(), Newton(), True),
        (3 * 28 * 31 - 1, Riccati(), Newton(), False),
    ],
)
def test_too_large_layers_are_refused(most, route, divergence, fits, monkeypatch):
    model, x, y = problem("mlp")
    monkeypatch.setattr("deqlqr.linearize_phases._MOST_ENTRIES", most)
    if fits:
        local(route, model, x, y, divergence)
        return
    others = "'krylov'" if isinstance(divergence, Newton) else "'output', 'sampled', 'krylov' or"
    with pytest.raises(ValueError, match=f"layer 1, from 3 to 4 states with 28.*route {others}"):
        local(route, model, x, y, divergence)


@pytest.mark.parametrize("name", sorted(TWICE))
def test_newton_names_a_parameter_of_several_layers(name):
    model, x, y = problem(name)
    found = refused(model, x, y, divergence="newton")
    assert "parameters that act in several phases (" in found and "again in phase 3" in found


def test_damping_by_layer_wants_one_damping_in_each():
    model, x, y = problem("mlp")
    groups = [{"params": [model[0].bias], "damping": 3.0}]
    for route in (NEUMANN, Riccati(damping="adaptive-layer")):
        found = refused(model, x, y, route, param_groups=groups)
        assert "one damping for all parameters of a layer, got 0.1 to 3" in found


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Riccati("mean"), "minibatch must be one of"),
        (lambda: Riccati(inverse="newman"), "inverse must be one of.*Did you mean 'neumann'"),
        (lambda: Riccati(damping=0.1), "damping must be one of"),
        (lambda: Riccati(max_states=0), "max_states must be at least 1"),
        (lambda: ImplicitNGD(mlp(), route="ricatti"), "route must be one of.*mean 'riccati'"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_option_that_does_not_exist_is_named():
    with pytest.raises(TypeError, match="Riccati has no option 'tol'; it has minibatch, inverse"):
        Riccati(tol=1e-3)


@pytest.mark.parametrize(
    "options, by_layer",
    [
        ({}, False),
        ({"minibatch": "per-sample"}, False),
        ({"margin": 4.0}, True),
        ({"inverse": "neumann", "margin": 1.2}, True),
    ],
    ids=str,
)
def test_the_command_line_trains_a_net(options, by_layer, tmp_path, monkeypatch):
    monkeypatch.setattr("deqlqr.training.plot_curves", lambda *_: None)
    config = TrainConfig(
        data="spiral", model="net", route="riccati", batch_size=8, max_steps=2, log_every=1,
        eval_size=10, **options,
    )  # fmt: skip
    result = Trainer(config, tmp_path, torch.device("cpu")).run(quiet=True)
    assert not result.interrupted
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert any('"layer_damping"' in line for line in lines) == by_layer


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mlp", "conv"])
@routes
def test_a_step_on_the_gpu_agrees_with_the_cpu(name, route):
    model, x, y = problem(name)
    expected = trained(route, model, x, y, steps=1)[0]
    found = trained(route, model.cuda(), x.cuda(), y.cuda(), steps=1)[0]
    assert relative(found.cpu(), expected) < 1e-8
