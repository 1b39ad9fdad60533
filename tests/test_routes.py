"""Tests for `routes.py`, `output_space.py`, `krylov.py` and `kronecker.py`."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import deqlqr
from deqlqr import (
    DEQ,
    CategoricalKL,
    Controls,
    Custom,
    Dare,
    DenseBlock,
    Euclidean,
    GaussianKL,
    Implicit,
    ImplicitNGD,
    Kronecker,
    Krylov,
    Newton,
    Output,
    Sampled,
    linearize,
    static_step,
)
from deqlqr.batch import Batch
from deqlqr.krylov import ConjugateGradients
from deqlqr.loss import make_loss
from deqlqr.resolvent import Resolvent
from deqlqr.routes import Memory
from deqlqr.sensitivity import Sensitivity

from .problems import (
    Squared,
    conv_batch,
    conv_model,
    dense_batch,
    dense_model,
    exact,
    randn,
    relative,
)
from .test_sensitivity import CASES, jacobian

TIGHT = Krylov(max_steps=500, progress=0.0, tol=1e-13)
OWN = Custom(lambda y, r: ((y - r) ** 2 * torch.arange(1, 4)).sum())
DIVERGENCES = {"categorical": CategoricalKL(), "gaussian": GaussianKL(), "own": OWN}


def local(route, model, x, y, divergence, *, loss="cross_entropy", pieces=1, memory=None):
    parts = list(zip(x.chunk(pieces), y.chunk(pieces), strict=True))
    at = Batch(model, Controls(model), make_loss(loss), parts)
    return route.local(at, divergence, torch.float64, memory or Memory())


def step(route, model, x, y, divergence, delta=0.1, **options):
    found = local(route, model, x, y, divergence, **options)
    return found.solve([delta] * len(Controls(model).parameters))


def explicit_step(model, x, y, divergence, delta, loss="cross_entropy", metric=None):
    """The dense damped solve, from the Jacobian by autograd."""
    controls = Controls(model)
    J, outputs = jacobian(model, controls, x), model(x)
    Lambda = divergence.metric(outputs.detach()) if metric is None else metric
    C = torch.einsum("bkm,bkl,bln->mn", J, Lambda, J) / len(x)
    grads = torch.autograd.grad(make_loss(loss)(outputs, y), controls.parameters)
    g = controls.flatten(dict(zip(controls.names, grads, strict=True)))
    return -torch.linalg.solve(C + delta * torch.eye(controls.m).double(), g), C


@pytest.mark.parametrize(
    "name, divergence",
    [*((name, "categorical") for name in CASES), ("dense", "gaussian"), ("dense", "own"),
     ("conv", "own")],
)  # fmt: skip
@pytest.mark.parametrize("route", [Output(), TIGHT], ids=["output", "krylov"])
def test_exact_routes_equal_the_explicit_damped_solve(name, divergence, route):
    make, batch = CASES[name]
    model, (x, y) = exact(make()), batch()
    x = x.double()
    expected, C = explicit_step(model, x, y, DIVERGENCES[divergence], 0.1)
    found = step(route, model, x, y, DIVERGENCES[divergence])
    assert relative(found.u, expected) < 1e-8 and found.residual < 1e-9
    assert found.curvature == pytest.approx(float(expected @ C @ expected), rel=1e-7)
    chunks = step(route, model, x, y, DIVERGENCES[divergence], pieces=2)
    assert relative(chunks.u, expected) < 1e-8


@pytest.mark.parametrize("delta", [1e-6, 10.0])
@pytest.mark.parametrize("samples", [3, 40])  # fewer and more rows than controls
def test_output_space_holds_at_any_damping_and_shape(delta, samples):
    model, (x, y) = exact(dense_model()), dense_batch(samples)
    found = step(Output(), model, x.double(), y, CategoricalKL(), delta)
    expected, _ = explicit_step(model, x.double(), y, CategoricalKL(), delta)
    assert relative(found.u, expected) < 1e-8 and found.residual < 1e-9


@pytest.mark.parametrize("route", [Dare(), Output(), TIGHT, Kronecker()])
def test_each_parameter_can_have_its_own_damping(route):
    model, (x, y) = exact(dense_model()), dense_batch()
    x, count = x.double(), len(Controls(model).parameters)
    if isinstance(route, Kronecker):
        with pytest.raises(ValueError, match="damping must be the same"):
            local(route, model, x, y, CategoricalKL()).solve([0.1 * (i + 1) for i in range(count)])
        return
    shifts = [0.1 * (i + 1) for i in range(count)]
    found = local(route, model, x, y, CategoricalKL()).solve(shifts)
    _, C = explicit_step(model, x, y, CategoricalKL(), 0.1)
    controls = Controls(model)
    D = torch.cat([torch.full((n,), s) for n, s in zip(controls.sizes, shifts, strict=True)])
    g = local(Output(), model, x, y, CategoricalKL()).gradient
    assert relative(found.u, -torch.linalg.solve(C + torch.diag(D.double()), g)) < 1e-7


@pytest.mark.parametrize("route", [Output(), Sampled(), Krylov(), Kronecker()])
def test_the_euclidean_divergence_is_gradient_descent(route):
    model, (x, y) = exact(dense_model()), dense_batch()
    found = local(route, model, x.double(), y, Euclidean())
    assert (
        relative(found.solve([0.25] * len(Controls(model).parameters)).u, -found.gradient / 1.25)
        < 1e-12
    )
    d = randn(Controls(model).m)
    assert found.metric(d) == pytest.approx(float(d @ d))


def test_sampled_step_is_the_damped_solve_with_the_same_samples_and_its_metric_is_unbiased():
    model, (x, y) = exact(dense_model()), dense_batch(4)
    x, controls = x.double(), Controls(model)
    _, C = explicit_step(model, x, y, CategoricalKL(), 0.1)
    mean, count = torch.zeros_like(C), 25
    for number in range(count):
        found = local(Sampled(samples=32), model, x, y, CategoricalKL(), memory=Memory(step=number))
        W = found.rows.dense().flatten(0, 1)
        mean += W.mT @ W / count
        if number == 0:
            u = found.solve([0.1] * len(controls.parameters)).u
            eye = torch.eye(controls.m).double()
            assert relative(u, -torch.linalg.solve(W.mT @ W + 0.1 * eye, found.gradient)) < 1e-8
    assert relative(mean, C) < 0.1
    again = local(Sampled(samples=2), model, x, y, CategoricalKL(), memory=Memory(step=0))
    other = local(Sampled(samples=2, seed=1), model, x, y, CategoricalKL(), memory=Memory(step=0))
    first = local(Sampled(samples=2), model, x, y, CategoricalKL(), memory=Memory(step=0))
    assert torch.equal(again.rows.dense(), first.rows.dense())
    assert not torch.equal(other.rows.dense(), first.rows.dense())


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=list(DIVERGENCES))
def test_random_cotangents_have_the_metric_as_covariance(divergence):
    y, generator = randn(2, 3), torch.Generator().manual_seed(0)
    metric, root = divergence.metric(y), divergence.root(y)
    assert relative(root @ root.mT, metric) < 1e-12
    c = divergence.sample(y.repeat(4000, 1), generator).view(4000, 2, 3)
    assert relative(torch.einsum("sbi,sbj->bij", c, c) / 4000, metric) < 0.1


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=list(DIVERGENCES))
def test_the_coordinates_of_a_gradient_in_the_root(divergence, scale):
    y, target = scale * randn(40, 3), torch.arange(40) % 3  # every class, likely or not
    c = y.softmax(-1) - nn.functional.one_hot(target, 3)
    w, C = divergence.coordinates(y, c), divergence.root(y)
    assert relative((C @ w[..., None])[..., 0], c) < 1e-9
    if isinstance(divergence, CategoricalKL):
        terms = (w * C.norm(dim=-2)).norm(dim=-1)
        assert (terms <= 1.5 * c.norm(dim=-1)).all()  # nothing cancels


class Shifted(nn.Module):
    """Cross entropy and a multiple of the outputs' sum, which is not in the metric's range."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, y, target):
        return nn.functional.cross_entropy(y, target) + self.share * y.sum(-1).mean()


@pytest.mark.parametrize("share, pulls", [(0.0, 0), (0.5, 2)])
@pytest.mark.parametrize("name", ["dense", "conv"])
def test_the_gradient_comes_from_the_rows_where_the_metric_has_it(share, pulls, name, monkeypatch):
    model, (x, y) = exact(CASES[name][0]()), CASES[name][1]()
    x, done, pull = x.double(), [], Sensitivity.pull
    monkeypatch.setattr(Sensitivity, "pull", lambda self, c: done.append(1) or pull(self, c))
    loss = Shifted(share)
    found = local(Output(), model, x, y, CategoricalKL(), loss=loss, pieces=2)
    assert len(done) == pulls  # of two chunks
    controls = Controls(model)
    grads = torch.autograd.grad(loss(model(x), y), controls.parameters)
    g = controls.flatten(dict(zip(controls.names, grads, strict=True)))
    assert relative(found.gradient, g) < 1e-9
    done.clear()
    sampled = local(Sampled(), model, x, y, CategoricalKL(), loss=loss)
    assert len(done) == 1 and relative(sampled.gradient, g) < 1e-9


@pytest.mark.parametrize("gap", [2.0, 15.0, 30.0, 60.0, 85.0, 95.0, 120.0])
@pytest.mark.parametrize("precision", [torch.float32, torch.float16, torch.bfloat16])
def test_classes_however_rare_have_their_gradient(gap, precision):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), DEQ(DenseBlock(32, 32)), nn.Linear(32, 3))
    with torch.no_grad():
        model[-1].bias.copy_(torch.tensor([gap, 0.0, -1.0]))
    x, y = randn(8, 6).float(), torch.arange(8) % 2 + 1  # the rare ones are right
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        at = Batch(model, Controls(model), make_loss("cross_entropy"), [(x, y)])
        found = Output().local(at, CategoricalKL(), torch.float32, Memory())
        _, pulled, _ = at.visit(lambda chunk: None)
    assert relative(found.gradient, pulled) < (1e-4 if precision == torch.float32 else 3e-2)


def test_newton_by_conjugate_gradients_equals_the_static_problem():
    model, (x, y) = exact(dense_model()), dense_batch()
    lqr = linearize(model, x.double(), y, divergence="newton", damping=3.0)
    assert relative(step(TIGHT, model, x.double(), y, Newton(), 3.0).u, static_step(lqr)) < 1e-8
    found = step(TIGHT, model, x.double(), y, Newton(), 1e-6)
    assert found.u is None and "negative curvature" in found.reason


def test_conjugate_gradients_stop_by_the_models_decrease_and_start_warm():
    A = torch.diag(torch.logspace(-6, 0, 200, dtype=torch.float64))
    g, shift = randn(200), torch.full((200,), 1e-6).double()
    exact_u = -torch.linalg.solve(A + torch.diag(shift), g)
    model = lambda u: float(g @ u + u @ (A @ u + shift * u) / 2)
    few = ConjugateGradients(max_steps=500, progress=0.05, tol=0.0)
    many = ConjugateGradients(max_steps=500, progress=5e-4, tol=0.0)
    solve = lambda rules, start=None: rules.solve(lambda v: A @ v, shift, g, start)
    u_few, _, spent_few, _ = solve(few)
    u_many, product, spent_many, _ = solve(many)
    assert spent_few < spent_many < 500
    assert model(u_few) > model(u_many) > model(exact_u)
    assert relative(product, A @ u_many) < 1e-9
    warm = solve(ConjugateGradients(max_steps=500, progress=0.0, tol=1e-2), exact_u * 0.999)
    cold = solve(ConjugateGradients(max_steps=500, progress=0.0, tol=1e-2))
    assert warm[2] < cold[2] and relative(warm[0], exact_u) < 2e-3


def layer_blocks(model, x, divergence):
    """A and G of (K4) of each linear layer, by autograd and hooks on an explicit network."""
    inputs, outputs = {}, {}
    handles = [
        module.register_forward_hook(
            lambda module, args, out, name=name: (
                inputs.__setitem__(name, args[0].detach()), outputs.__setitem__(name, out)
            )
            and None
        )
        for name, module in model.named_modules() if isinstance(module, nn.Linear)
    ]  # fmt: skip
    y = model(x)
    for handle in handles:
        handle.remove()
    C = divergence.root(y.detach())
    blocks = {}
    for name, a in inputs.items():
        a = torch.cat([a, torch.ones(len(a), 1).double()], 1)
        g = [torch.autograd.grad(y, outputs[name], c, retain_graph=True)[0] for c in C.unbind(-1)]
        blocks[name] = a.mT @ a / len(x), sum(v.mT @ v for v in g) / len(x)
    return blocks


def test_kronecker_step_is_the_explicit_kronecker_solve():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)
    ).double()
    x, y = dense_batch(20)
    x = x.double()
    found = local(Kronecker(fisher="exact"), model, x, y, CategoricalKL())
    u = Controls(model).unflatten(found.solve([0.05] * 6).u)
    g = Controls(model).unflatten(found.gradient)
    for name, (A, G) in layer_blocks(model, x, CategoricalKL()).items():
        gradient = torch.cat([g[f"{name}.weight"], g[f"{name}.bias"][:, None]], 1)
        K = torch.kron(G, A)
        expected = -torch.linalg.solve(K + 0.05 * torch.eye(len(K)).double(), gradient.flatten())
        ours = torch.cat([u[f"{name}.weight"], u[f"{name}.bias"][:, None]], 1)
        assert relative(ours.flatten(), expected) < 1e-8


def test_weights_that_meet_are_one_layer_and_one_sample_makes_it_exact():
    """For one sample and one output the Kronecker product is the metric of a layer."""
    torch.manual_seed(0)
    model = exact(nn.Sequential(DEQ(DenseBlock(4, 6)), nn.Linear(4, 1)))
    model[1].requires_grad_(False)
    x, y = randn(1, 6), randn(1, 1)
    memory = Memory()
    found = local(Kronecker(fisher="exact"), model, x, y, GaussianKL(), loss="mse", memory=memory)
    assert len(memory.layers) == 1
    expected, _ = explicit_step_of(model, x, y)
    assert relative(found.solve([0.1] * 3).u, expected) < 1e-8


def explicit_step_of(model, x, y):
    controls = Controls(model)
    J = jacobian(model, controls, x)[0]
    g = 2 * (model(x) - y).detach()[0, 0] * J[0]
    return -torch.linalg.solve(J.mT @ J + 0.1 * torch.eye(controls.m).double(), g), J


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", ["dense", "conv", "wide", "explicit", "rescaled"])
def test_kronecker_is_a_metric_that_sees_every_parameter(name, corrected):
    make, batch = CASES[name]
    model, (x, y) = exact(make()), batch(8)
    memory, route = Memory(), Kronecker(fisher="exact", corrected=corrected, update_every=1)
    for memory.step in range(3):
        found = local(route, model, x.double(), y, CategoricalKL(), memory=memory, pieces=2)
    v = randn(Controls(model).m)
    covered = Controls(model).unflatten(found.times(v))
    assert all(float(part.norm()) > 0 for part in covered.values())
    assert found.metric(v) > 0 and found.solve([0.1] * len(covered)).residual < 1e-9


def test_the_corrected_eigenvalues_are_those_of_the_rows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3)).double()
    (x, y), memory = dense_batch(20), Memory()
    route = Kronecker(fisher="exact", corrected=True, update_every=1, refresh_every=100, decay=0.5)
    for memory.step in range(60):  # the last refresh is at 32
        found = local(route, model, x.double(), y, CategoricalKL(), memory=memory)
    (state,) = memory.layers.values()
    basis = torch.kron(state["U_G"], state["U_A"])
    rows = local(Output(), model, x.double(), y, CategoricalKL()).rows
    W, b = (part.dense().flatten(0, 1) for part in rows.parts)
    joined = torch.cat([W.view(-1, 3, 6), b[..., None]], 2).flatten(1)
    diagonal = (joined @ basis).square().sum(0).view(3, 7)
    assert relative(found.factors.spectrum(next(iter(memory.layers))), diagonal) < 1e-6


@pytest.mark.parametrize("scaled", [False, True])
def test_norms_and_the_numbers_made_of_parameters_are_exact_together(scaled):
    """Without layers of weights the Kronecker metric is the metric itself, bound and all."""
    model, (x, y) = exact(conv_model()), conv_batch(12)
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name)
    if not scaled:
        model[1].block.max_lipschitz = None
        with torch.no_grad():
            model[1].block.norm3.weight *= 0.3  # a contraction without the bound
    assert model[1].block.lipschitz_bound().item() > 0.9 or not scaled
    route = Kronecker(fisher="exact", update_every=1)
    ours = local(route, model, x.double(), y, CategoricalKL())
    exact_one = local(Output(), model, x.double(), y, CategoricalKL())
    shifts = [0.01 * (i + 1) for i in range(6)]
    assert relative(ours.solve(shifts).u, exact_one.solve(shifts).u) < 1e-8
    v = randn(Controls(model).m)
    assert ours.metric(v) == pytest.approx(exact_one.metric(v), rel=1e-8)
    assert ours.solve(shifts).curvature == pytest.approx(exact_one.solve(shifts).curvature, 1e-8)


def test_the_bound_of_a_block_is_seen_by_its_convolutions():
    """The output depends on the weights through the bound more than directly."""
    model, (x, y) = exact(conv_model()), conv_batch(12)
    x = x.double()
    found = local(Kronecker(fisher="exact"), model, x, y, CategoricalKL())
    true = local(Output(), model, x, y, CategoricalKL())
    radial = {n: p.detach() * (".conv" in n) for n, p in model.named_parameters()}
    d = Controls(model).flatten(radial)
    assert 0.3 < found.metric(d) / true.metric(d) < 3
    blind = sum(float((block.spectrum * block.coordinates(radial).square()).sum())
                for block in found.factors.blocks())  # fmt: skip
    assert blind < 0.5 * true.metric(d)
    # The step solves the coupled equations.
    step = found.solve([0.1] * len(radial))
    left = found.times(step.u) + 0.1 * step.u
    assert relative(left, -found.gradient) < 1e-9


def test_many_small_parameters_have_a_diagonal_and_still_the_coupling(monkeypatch):
    monkeypatch.setattr("deqlqr.kronecker._SMALL", 4)
    model, (x, y) = exact(conv_model()), conv_batch(12)
    found = local(Kronecker(fisher="exact"), model, x.double(), y, CategoricalKL())
    step = found.solve([0.1] * len(Controls(model).names))
    assert relative(found.times(step.u) + 0.1 * step.u, -found.gradient) < 1e-9


def test_a_layer_frozen_or_freed_on_the_way_is_looked_at_again():
    model, (x, y) = dense_model(), dense_batch(12)
    optimizer = ImplicitNGD(model, damping=0.1, route=Kronecker(update_every=100))
    optimizer.step(x, y)
    held = model[0].weight.clone()
    for layer, wanted in ((model[0], False), (model[0], True)):
        layer.requires_grad_(wanted)
        for _ in range(3):
            optimizer.step(x, y)
        assert optimizer.last_step.accepted
        assert torch.equal(model[0].weight, held) != wanted


class Turned(nn.Module):
    """A weight that enters by its transpose."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return nn.functional.linear(x, self.weight.mT)


@pytest.mark.parametrize("corrected", [False, True])
def test_a_parameter_that_enters_through_a_tensor_made_from_it_has_its_own_factors(corrected):
    torch.manual_seed(0)
    model = nn.Sequential(Turned(), nn.Tanh(), nn.Linear(6, 1)).double()
    model[2].requires_grad_(False)
    x, y = randn(9, 6), randn(9, 1)
    found = local(Kronecker(fisher="exact"), model, x, y, GaussianKL(), loss="mse")
    v = randn(36)
    a, g = x, (1 - model[0](x).tanh() ** 2) * model[2].weight
    D = a[:, :, None] * g[:, None, :].detach()
    G, A = (D @ D.mT).mean(0), (D.mT @ D).mean(0) / D.square().sum((1, 2)).mean()
    assert relative(found.times(v), torch.kron(G, A) @ v) < 1e-9  # (K7)
    # For one sample and one output it is the metric itself.
    one = local(Kronecker(corrected=corrected), model, x[:1], y[:1], GaussianKL(), loss="mse")
    expected, _ = explicit_step_of(model, x[:1], y[:1])
    assert relative(one.solve([0.1]).u, expected) < 1e-8


def test_every_parametrised_weight_has_a_block_in_the_kronecker_metric():
    torch.manual_seed(0)
    orthogonal, weight_norm = parametrizations.orthogonal, parametrizations.weight_norm
    model = nn.Sequential(
        orthogonal(nn.Linear(6, 5)), nn.Tanh(), weight_norm(nn.Linear(5, 6)), Squared(), Turned(),
        DEQ(DenseBlock(4, 6)), nn.Linear(4, 3),
    )  # fmt: skip
    orthogonal(model[5].block.state)
    model, (x, y) = exact(model), dense_batch(12)
    memory, route = Memory(), Kronecker(fisher="exact", update_every=1)
    for memory.step in range(3):
        found = local(route, model, x.double(), y, CategoricalKL(), memory=memory)
    controls = Controls(model)
    covered = controls.unflatten(found.times(randn(controls.m)))
    assert all(float(part.norm()) > 0 for part in covered.values())
    step = found.solve([0.1] * len(covered))
    assert relative(found.times(step.u) + 0.1 * step.u, -found.gradient) < 1e-9
    # A fair share of the true metric along the gradient.
    true = local(Output(), model, x.double(), y, CategoricalKL())
    assert 0.2 < found.metric(found.gradient) / true.metric(true.gradient) < 5


class Tanh(nn.Module):
    def __init__(self, n=12):
        super().__init__()
        self.state, self.input = nn.Linear(n, n), nn.Linear(8, n)

    def forward(self, z, x):
        return torch.tanh(self.state(z) + self.input(x))


def quality(found, u, delta):
    """The decrease of the quadratic model at the best step length along u, over the best of all."""
    best = found.solve([delta] * 6)
    square = found.metric(u) + delta * float(u @ u)
    return float(found.gradient @ u) ** 2 / square / -best.slope


def test_random_rows_may_be_rough_and_the_gradient_is_not(monkeypatch):
    products, times = [], Resolvent._times
    monkeypatch.setattr(Resolvent, "_times", lambda self, x: products.append(1) or times(self, x))
    torch.manual_seed(0)
    layer = DEQ(Tanh(40), state_shape=(40,), backward=Implicit(method="krylov"))
    model = exact(nn.Sequential(layer, nn.Linear(40, 3)))
    x, y = randn(64, 8), torch.randint(0, 3, (64,))
    found, scores, counts = [], [], []
    whole = local(Output(), model, x, y, CategoricalKL())
    for tol in (None, 1e-2):
        products.clear()
        found.append(local(Sampled(tol=tol), model, x, y, CategoricalKL()))
        counts.append(len(products))
        assert float(layer.backward_solution.residual.max()) < 1e-9
        u = found[-1].solve([1e-2] * len(Controls(model).parameters)).u
        scores.append(quality(whole, u, 1e-2))
    assert torch.equal(found[0].gradient, found[1].gradient)
    error = relative(found[1].rows.dense(), found[0].rows.dense())
    assert 1e-6 < error < 2e-2 and abs(scores[0] - scores[1]) < 5e-3
    assert counts[1] < 0.8 * counts[0]


@pytest.mark.parametrize("route", [Dare(), Output(), Sampled(), Krylov(), Kronecker()])
def test_no_graph_outlives_its_step(route):
    model, (x, y) = dense_model(), dense_batch()
    optimizer = ImplicitNGD(model, route=route, damping=0.1)
    alive = []
    for _ in range(4):
        optimizer.step(x, y)
        gc.collect()
        alive.append(sum(type(o).__name__ in ("_Pin", "Call") for o in gc.get_objects()))
    assert alive[-1] <= alive[0]  # less, where an earlier test's have gone meanwhile


@pytest.mark.parametrize("seed", range(4))
def test_quality_of_the_directions(seed):
    torch.manual_seed(seed)
    model = exact(nn.Sequential(DEQ(Tanh(), state_shape=(12,)), nn.Linear(12, 3)))
    x, y = randn(64, 8, seed=seed), torch.randint(0, 3, (64,))
    found = local(Output(), model, x, y, CategoricalKL())
    gradient = quality(found, -found.gradient, 1e-2)
    score = lambda route: quality(found, step(route, model, x, y, CategoricalKL(), 1e-2).u, 1e-2)
    assert score(Output()) > 1 - 1e-9 and score(Krylov()) > 0.999
    assert quality(found, static_step(linearize(model, x, y, damping=1e-2)), 1e-2) > 1 - 1e-7
    assert gradient < score(Sampled()) and score(Sampled()) >= 0.69
    assert score(Sampled(samples=2)) >= 0.77
    for corrected in (False, True):
        memory = Memory()
        for memory.step in range(10):
            kron = local(
                Kronecker(corrected=corrected, update_every=1, refresh_every=5), model, x, y,
                CategoricalKL(), memory=memory,
            )  # fmt: skip
        assert quality(found, kron.solve([1e-2] * 6).u, 1e-2) >= 0.77


def test_the_dense_route_refuses_what_would_fill_the_memory():
    (x, y), model = dense_batch(8), dense_model()  # 4 states
    for route, fits in ((Dare(max_states=31), False), (Dare(max_states=32), True)):
        optimizer = ImplicitNGD(model, route=route, damping=0.1)
        if fits:
            assert float(optimizer.step(x, y)) > 0
        else:
            with pytest.raises(ValueError, match="8 samples of 4 states are too many"):
                optimizer.step(x, y)
    assert ImplicitNGD(model, route=Dare("per-sample", max_states=4)).step(x, y) > 0


def test_least_squares_matches_the_loss():
    """The metric that goes with "mse" is its Gauss-Newton matrix."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2).double(), randn(20, 3), randn(20, 2, seed=1)
    optimizer = ImplicitNGD(model, loss="mse", route="output", lr=1.0, damping=1e-9)
    optimizer.step(x, y)
    ones = torch.cat([x, torch.ones(20, 1).double()], 1)
    best = torch.linalg.lstsq(ones, y).solution
    assert relative(model.weight, best[:3].mT) < 1e-6 and relative(model.bias, best[3]) < 1e-6


@pytest.mark.parametrize("divergence", ["newton", Newton()])
@pytest.mark.parametrize("route", ["output", "sampled", "kronecker"])
def test_what_a_route_cannot_do_is_refused(route, divergence):
    with pytest.raises(ValueError, match="needs a divergence of the output"):
        ImplicitNGD(dense_model(), route=route, divergence=divergence)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Sampled(samples=0), "samples must be at least 1"),
        (lambda: Sampled(seed=-1), "seed must be at least 0"),
        (lambda: Sampled(tol=0.0), "tol must be finite and above 0"),
        (lambda: Krylov(max_steps=0), "max_steps must be at least 1"),
        (lambda: Krylov(tol=-1.0), "tol must be"),
        (lambda: Kronecker(decay=1.0), r"decay must lie in \[0, 1\)"),
        (lambda: Kronecker(fisher="empirical"), "fisher must be one of"),
        (lambda: Kronecker(refresh_every=0), "refresh_every must be"),
        (lambda: Dare("mean"), "minibatch must be one of"),
        (lambda: Dare(max_states=0), "max_states must be at least 1"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_routes_without_the_dare_train_to_the_same_parameters():
    model, (x, y) = exact(dense_model()), dense_batch(12)
    twins = {route: copy.deepcopy(model) for route in ("dare", "output", TIGHT)}
    for route, twin in twins.items():
        optimizer = ImplicitNGD(twin, lr=1.0, damping=0.3, route=route)
        losses = [float(optimizer.step(x.double(), y)) for _ in range(5)]
        assert losses[-1] < losses[0] and optimizer.last_step.step_residual < 1e-8
        assert (optimizer.last_step.closed_loop_radius is None) == (route != "dare")
    first, *others = (Controls(twin).vector for twin in twins.values())
    assert all(relative(other, first) < 1e-9 for other in others)


def test_convolutional_blocks_train_by_every_route():
    for route in (Output(), Sampled(), Krylov(), Kronecker(), Kronecker(corrected=True)):
        model, (x, y) = conv_model(), conv_batch(6)
        optimizer = ImplicitNGD(model, lr=0.5, damping=0.1, route=route, trust_region=0.05)
        losses = [float(optimizer.step(x, y)) for _ in range(8)]
        assert losses[-1] < 0.9 * losses[0], route


@pytest.mark.parametrize("name", ["gradient", "gradient conv", "monotone", "orthonormal", "torch"])
def test_kronecker_trains_blocks_whose_weights_enter_in_other_ways(name):
    torch.manual_seed(0)
    x, y = dense_batch(24)
    orthonormal = {"orthonormal": deqlqr.orthonormal, "torch": parametrizations.orthogonal}
    if name == "gradient conv":
        x, y = conv_batch(12)
        block = deqlqr.ConvGradientBlock(3, 4, x.shape[1])
        model = nn.Sequential(DEQ(block), nn.Flatten(), nn.LazyLinear(3))
        model(x)
    else:
        made = {
            "gradient": lambda: deqlqr.GradientBlock(5, 7, 6, skew=0.5),
            "monotone": lambda: deqlqr.MonotoneBlock(5, 6),
        }
        block = made.get(name, lambda: DenseBlock(5, 6))()
        model = nn.Sequential(DEQ(block), nn.Linear(5, 3))
    model, x = exact(model), x.double()
    if name in orthonormal:
        orthonormal[name](model[0].block.state)
    optimizer = ImplicitNGD(model, lr=0.5, damping=0.1, route=Kronecker(update_every=1))
    losses = [float(optimizer.step(x, y)) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0] and optimizer.counts["given up"] == 0
    if name in orthonormal:
        W = model[0].block.state.weight
        assert relative(W.mT @ W, torch.eye(5).double()) < 1e-10
