"""Tests for `deqlqr/runge_kutta.py` and `deqlqr/fields.py`."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, jacrev, jvp, vmap

from deqlqr import DEQ, ImplicitNGD, check_equivalence
from deqlqr.costate import costate_step
from deqlqr.fields import ConvGradientField, GradientField, LayerField, Monotonicity
from deqlqr.runge_kutta import (
    ConvGradientBlock,
    GradientBlock,
    RungeKuttaBlock,
    RungeKuttaNet,
    contraction_constant,
    runge_kutta_step,
)
from deqlqr.spectral_bound import operator_norm
from deqlqr.tableau import TABLEAUS, Tableau, make_tableau

from .problems import dense_batch, exact, randn, relative

METHODS = tuple(TABLEAUS)
BLOCKS = {
    **{method: partial(GradientBlock, 4, 3, 2, method=method) for method in METHODS},
    "relu": partial(GradientBlock, 4, 5, activation="relu", leak=0.3, max_norm=1.5),
    "long step": partial(GradientBlock, 4, step=0.38),
    "skew": partial(GradientBlock, 4, 6, 2, skew=1.0),
    "skew kutta4": partial(GradientBlock, 4, leak=2.0, max_norm=1.0, skew=3.0, method="kutta4"),
    "conv": partial(ConvGradientBlock, 2, 3, 1),
    "conv kutta3": partial(ConvGradientBlock, 2, activation="relu", method="kutta3"),
    "conv skew": partial(ConvGradientBlock, 2, 3, kernel_size=1, skew=0.5),
}
MIDPOINT = Tableau(((0, 0), (0.5, 0)), (0, 1), 2, "midpoint")


def made(name, seed, size):
    """A block with parameters up to `size`, and inputs and states likewise."""
    block = BLOCKS[name]().double().requires_grad_(False)
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: size * (2 * torch.rand(*shape, generator=g, dtype=torch.float64) - 1)
    for p in block.parameters():
        p.copy_(rand(*p.shape))
    if isinstance(block, ConvGradientBlock):
        c = 1 if block.field.input_channels else 2
        return block, rand(3, c, 3, 4), rand(2, 3, 2, 3, 4)
    return block, rand(3, block.field.input_size or 4), rand(2, 3, 4)


def jacobians(f, z, x):
    """The Jacobian of f(., x) for each sample, (batch, n, n)."""
    one = lambda z, x: f(z[None], x[None])[0].flatten()
    return vmap(jacrev(one))(z, x).flatten(2)


def length(z):
    return z.flatten(1).norm(dim=1)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(BLOCKS)), st.integers(0, 10**6), st.floats(-3, 3))
def test_a_block_contracts_by_its_constant_whatever_its_parameters(name, seed, exponent):
    block, x, (z1, z2) = made(name, seed, 10**exponent)
    q = block.contraction
    assert 0 < q < 1
    f1, f2 = block(z1, x), block(z2, x)
    rounding = 1e-12 * (1 + length(f1) + length(f2) + length(block.field(z1, x)))
    assert (length(f1 - f2) <= q * length(z1 - z2) + rounding).all()
    near = z1 / 10**exponent / 100  # where tanh is not saturated
    for z in (z1, near):
        norms = torch.linalg.matrix_norm(jacobians(block, z, x), 2)
        assert (norms <= q + 1e-12).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(BLOCKS)), st.integers(0, 10**6), st.floats(-3, 3))
def test_the_fields_constants_hold_whatever_its_parameters(name, seed, exponent):
    block, x, (z1, z2) = made(name, seed, 10**exponent)
    field, promise = block.field, block.field.monotonicity()
    V = jacobians(field, z1 / 10**exponent / 100, x)
    assert (torch.linalg.eigvalsh((V + V.mT) / 2) <= -field.leak + 1e-12).all()
    # (VF1) for the linearised field: the matrix of the form is negative semidefinite.
    form = (
        (V + V.mT) / 2
        + promise.alpha * torch.eye(V.shape[1], dtype=V.dtype)
        + promise.beta * V.mT @ V
    )
    assert (torch.linalg.eigvalsh(form) <= 1e-12).all()
    dz, dv = (z1 - z2).flatten(1), (field(z1, x) - field(z2, x)).flatten(1)
    bound = -promise.alpha * dz.square().sum(1) - promise.beta * dv.square().sum(1)
    rounding = 1e-12 * (1 + length(field(z1, x)) + length(field(z2, x))) * length(dz)
    assert ((dv * dz).sum(1) <= bound + rounding).all()
    low, high = promise.slopes
    slope = torch.linalg.svdvals(V)
    assert (slope >= low - 1e-12).all() and (slope <= high + 1e-12).all()


def test_the_constant_of_eulers_method_is_reached():
    # A' A has the eigenvalues max_norm^2 and 0, and where z = 0 the slope of tanh is 1.
    block = GradientBlock(4, 2, leak=0.5, max_norm=3.0).double()
    block.field.state.weight.data = 3 * torch.eye(2, 4, dtype=torch.float64)
    at = torch.zeros(1, 4, dtype=torch.float64), randn(1, 4)
    norm = lambda: float(torch.linalg.matrix_norm(jacobians(block, *at), 2).detach())
    assert norm() == pytest.approx(block.contraction, abs=1e-12)
    assert block.contraction == pytest.approx(9.0 / 10.0)
    for step in (0.05, 0.15, 0.2):
        block = RungeKuttaBlock(block.field, step=step)
        expected = max(abs(1 - step * 0.5), abs(1 - step * 9.5))
        assert norm() == pytest.approx(expected) == block.contraction


def test_the_same_zero_is_the_fixed_point_of_every_method():
    field, x = GradientField(4, 6, 2, gain=2.0).double(), randn(5, 2)
    layers = [DEQ(RungeKuttaBlock(field, method), tol=1e-12) for method in METHODS]
    z = layers[0](x)
    assert length(field(z, x)).max() < 1e-10
    assert all(length(layer(x) - z).max() < 1e-9 for layer in layers[1:])


def test_the_field_is_minus_a_gradient_without_skew_and_none_with():
    for field, x in (
        (GradientField(4, 3, 2).double(), randn(3, 2)),
        (ConvGradientField(2, 3).double(), randn(3, 2, 3, 3)),
    ):
        z = randn(3, *field.state_shape(x), seed=1)
        V = jacobians(field, z, x)
        assert (V - V.mT).abs().max() < 1e-14
    turned = GradientField(4, skew=0.8).double()
    V = jacobians(turned, randn(3, 4), randn(3, 4))
    K = (V - V.mT) / 2
    assert 0.01 < torch.linalg.matrix_norm(K, 2).max() <= 0.8


def test_the_convolutions_adjoint_is_exact():
    for size in (1, 3, 5):
        field = ConvGradientField(2, 3, kernel_size=size).double()
        A, z, y = field.weight, randn(4, 2, 5, 6), randn(4, 3, 5, 6, seed=1)
        Az, Aty = F.conv2d(z, A, padding=size // 2), field._adjoint(y, A)
        assert torch.allclose((Az * y).sum(), (z * Aty).sum(), rtol=1e-13)
        assert Aty.shape == z.shape


@pytest.mark.parametrize("skew", [0.0, 0.7])
def test_the_field_is_the_formula(skew):
    field = GradientField(3, 5, 2, skew=skew, gain=4.0).double()
    with torch.no_grad():
        for p in field.parameters():
            p += 0.1 * torch.randn_like(p)
    z, x = randn(4, 3), randn(4, 2)
    V, W, U = field.state.weight, field.input.weight, field.direct.weight
    A = V * min(1.0, 2.0 / float(torch.linalg.svdvals(V.detach())[0]))
    expected = -z - torch.tanh(z @ A.T + x @ W.T + field.state.bias) @ A + x @ U.T + field.offset
    if skew:
        S = field.rotation.weight
        S = S * min(1.0, skew / 2 / float(torch.linalg.svdvals(S.detach())[0]))
        expected = expected + z @ (S - S.T).T
    assert torch.allclose(field(z, x), expected, rtol=1e-13)
    gain = operator_norm(GradientField(4, gain=0.3).weight.detach())
    assert float(gain) == pytest.approx(0.3, rel=1e-5)
    layer = LayerField(3, 2, activation="relu").double()
    expected = torch.relu(z @ layer.state.weight.T + layer.state.bias + x @ layer.input.weight.T)
    assert torch.allclose(layer(z, x), expected, rtol=1e-13)
    tied = LayerField(3).double()
    assert torch.allclose(tied(z, z), torch.tanh(tied.state(z) + z), rtol=1e-13)


def test_a_skew_part_costs_no_more_than_the_simple_bound_does():
    for leak in (0.1, 1.0, 10.0):
        for skew in (0.0, 0.01, 0.3, 5.0, 100.0):
            promise = GradientField(2, leak=leak, max_norm=2.0, skew=skew).monotonicity()
            lipschitz = leak + 4.0 + skew
            # <dv, dz> <= -leak |dz|^2 and |dv| <= lipschitz |dz|, shared equally
            assert promise.alpha * promise.beta >= (leak / 2 / lipschitz) ** 2
    without = GradientField(2, max_norm=2.0).monotonicity()
    barely = GradientField(2, max_norm=2.0, skew=1e-9).monotonicity()
    assert (without.alpha, without.beta) == pytest.approx((5 / 6, 1 / 6))
    assert (barely.alpha, barely.beta) == pytest.approx((5 / 6, 1 / 6))
    assert GradientField(2, leak=0.0).monotonicity() == Monotonicity(0.0, 0.25)
    assert GradientField(2, leak=0.0, skew=1.0).monotonicity() is None


@pytest.mark.parametrize("method", METHODS)
def test_the_costate_is_backpropagation(method):
    tableau = make_tableau(method)
    fields = (
        (GradientField(4, 3, 2, skew=0.5).double(), randn(5, 2), (5, 4)),
        (ConvGradientField(2, 3).double(), randn(2, 2, 3, 3), (2, 2, 3, 3)),
        (LayerField(3).double(), None, (4, 3)),
    )
    for field, x, shape in fields:
        z, p = randn(*shape, seed=1).requires_grad_(), randn(*shape, seed=2)
        h = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        loss = (p * runge_kutta_step(field.at(x), z, h, tableau)).sum()
        names = [name for name, _ in field.named_parameters()]
        wanted = torch.autograd.grad(loss, [z, h, *field.parameters()])
        got = costate_step(field, z.detach(), x, 0.4, tableau, p)
        assert relative(got.p, wanted[0]) < 1e-14 and relative(got.step, wanted[1]) < 1e-14
        assert list(got.parameters) == names
        for name, value in zip(names, wanted[2:], strict=True):
            assert relative(got.parameters[name], value) < 1e-14


@pytest.mark.parametrize("method", METHODS)
def test_the_costate_is_the_partner_scheme_on_the_adjoint_equation(method):
    tableau, h, n = make_tableau(method), 0.4, 4
    s, field = tableau.stages, GradientField(n, 3).double()
    z, p = randn(n), randn(n, seed=1)
    v = lambda z: field(z[None])[0]
    slopes, V = [], []
    for row in tableau.a:
        Y = z + h * sum((float(a) * k for a, k in zip(row, slopes, strict=False)), 0 * z)
        slopes.append(v(Y).detach())
        V.append(jacrev(v)(Y).detach())
    rows, weights = tableau.partner()
    a = torch.tensor([[float(w) for w in row] for row in rows], dtype=torch.float64)
    b = torch.tensor([float(w) for w in weights], dtype=torch.float64)
    # l_i = -V_i' (p0 + h sum_j a~_ij l_j) and p = p0 + h sum_i b_i l_i, in (p0, l_1, ..., l_s)
    system = torch.eye((s + 1) * n, dtype=torch.float64)
    for i in range(s):
        at = slice((i + 1) * n, (i + 2) * n)
        system[at, :n] += V[i].mT
        for j in range(s):
            system[at, (j + 1) * n : (j + 2) * n] += h * a[i, j] * V[i].mT
        system[:n, at].diagonal().add_(h * b[i])
    before = torch.linalg.solve(system, torch.cat([p, torch.zeros(s * n, dtype=torch.float64)]))
    got = costate_step(field, z[None], None, h, tableau, p[None])
    assert relative(got.p[0], before[:n]) < 1e-13


def test_a_costate_sweep_through_a_network_gives_its_gradient():
    net = RungeKuttaNet.of_layers(3, 4, "kutta3", steps="learned").double()
    z, target = randn(5, 3), randn(5, 3, seed=1)
    states = net.trajectory(z)
    loss = (states[-1] - target).square().sum() / 2
    names = [name for name, _ in net.named_parameters()]
    wanted = dict(zip(names, torch.autograd.grad(loss, list(net.parameters())), strict=True))
    p = (states[-1] - target).detach()
    for k in reversed(range(4)):
        h, field = float(net.step_sizes[k].detach()), net.fields[k]
        with torch.no_grad():
            p, parameters, step = costate_step(field, states[k], None, h, net.tableau, p)
        assert not p.requires_grad
        assert abs(float(step - wanted["raw_steps"][k])) < 1e-13
        for name, value in parameters.items():
            assert relative(value, wanted[f"fields.{k}.{name}"]) < 1e-13


@pytest.mark.parametrize("name", ["improved-euler", "skew", "conv"])
def test_a_layer_around_a_block_has_the_gradient_of_the_unrolled_iteration(name):
    block = BLOCKS[name]().double()
    x = made(name, 0, 1.0)[1]
    z = DEQ(block, tol=1e-13, max_steps=2000)(x)
    weight = randn(*z.shape, seed=3)
    got = torch.autograd.grad((weight * z).sum(), list(block.parameters()))
    y = torch.zeros_like(z)
    for _ in range(math.ceil(math.log(1e-10) / math.log(block.contraction))):
        y = block(y, x)
    wanted = torch.autograd.grad((weight * y).sum(), list(block.parameters()))
    for a, b in zip(got, wanted, strict=True):
        assert relative(a, b) < 1e-8


def test_all_routes_agree_on_a_model_with_a_block():
    x, y = dense_batch(2, width=2)
    block = GradientBlock(3, 2, 2, skew=1.0)
    model = exact(nn.Sequential(DEQ(block), nn.Linear(3, 3)))
    report = check_equivalence(model, x.double(), y)
    assert report.passed, str(report)


def test_all_routes_agree_on_a_model_with_a_convolutional_block():
    torch.manual_seed(0)
    block = ConvGradientBlock(2, 1, 1, gain=2.5)
    model = exact(nn.Sequential(DEQ(block), nn.Flatten(), nn.Linear(8, 2)))
    report = check_equivalence(model, randn(2, 1, 2, 2), torch.tensor([0, 1]))
    assert report.passed, str(report)


@pytest.mark.parametrize(
    "route, method",
    [
        ("dare", "kutta4"),
        ("cyclic", "euler"),
        ("output", "kutta3"),
        ("sampled", "improved-euler"),
        ("krylov", "euler"),
    ],
)
def test_a_block_trains_by_natural_gradient(route, method):
    x, y = dense_batch()
    block = GradientBlock(4, 3, 5, method=method)
    model = nn.Sequential(nn.Linear(6, 5), DEQ(block), nn.Linear(block.field.state_size, 3))
    opt = ImplicitNGD(model.double(), damping=0.1, route=route)
    losses = [float(opt.step(x.double(), y)) for _ in range(3)]
    assert opt.last_step.accepted and losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", ["skew kutta4", "conv kutta3"])
def test_a_block_is_right_under_transforms_and_with_replaced_parameters(name):
    block, x, (z, dz) = made(name, 0, 1.0)
    f = block(z, x)
    alone = vmap(lambda z, x: block(z[None], x[None])[0])(z, x)
    assert torch.allclose(alone, f, rtol=1e-12)
    (phase,) = block.phases(x)
    assert torch.equal(phase(z), f)
    _, tangent = jvp(lambda z: block(z, x), (z,), (dz,))
    A = jacobians(block, z, x)
    assert torch.allclose(tangent.flatten(1), (A @ dz.flatten(1)[..., None])[..., 0])
    doubled = {name: 2 * p for name, p in block.named_parameters()}
    replaced = functional_call(block, doubled, (z, x))
    for p in block.parameters():
        p *= 2
    assert torch.allclose(block(z, x), replaced, rtol=1e-13) and relative(replaced, f) > 1e-2


def test_derivatives_of_a_step_in_everything_are_those_of_finite_differences():
    field, tableau = (
        GradientField(2, 2, 1, skew=0.3, gain=3.0).double(),
        make_tableau("improved-euler"),
    )
    names = [name for name, _ in field.named_parameters()]

    def step(z, x, h, *values):
        flow = lambda y: functional_call(field, dict(zip(names, values, strict=True)), (y, x))
        return runge_kutta_step(flow, z, h, tableau)

    h = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    values = [p.detach().clone().requires_grad_() for p in field.parameters()]
    inputs = (randn(1, 2).requires_grad_(), randn(1, 1).requires_grad_(), h, *values)
    assert torch.autograd.gradcheck(step, inputs)
    assert torch.autograd.gradgradcheck(step, inputs, fast_mode=True)


def test_a_learned_step_is_positive_trains_in_a_network_and_promises_nothing():
    block = RungeKuttaBlock(GradientField(3).double(), step=0.25, learn_step=True).double()
    assert block.contraction is None and block.step.item() == pytest.approx(0.25, rel=1e-6)
    assert RungeKuttaBlock(GradientField(3), "kutta3", learn_step=True).step < 0.17
    z, x = randn(4, 3), randn(4, 3, seed=1)
    (grad,) = torch.autograd.grad(block(z, x).square().sum(), block.log_step)
    assert abs(float(grad)) > 1e-2
    at_rest = DEQ(block, tol=1e-13)(x)
    (grad,) = torch.autograd.grad(at_rest.square().sum(), block.log_step)
    assert abs(float(grad)) < 1e-10  # as the docstring says
    with torch.no_grad():
        block.log_step.fill_(-9.0)
    assert 0 < block.step.item() < 2e-4
    assert "step=learned" in repr(block) and "contraction=0.66" in repr(GradientBlock(2))


def test_what_is_promised_ends_with_the_step():
    field = GradientField(3)  # mu = 1, L = 5
    limit = {"euler": 0.4, "improved-euler": 0.4, "kutta3": 0.2, "kutta4": 0.4}
    for method, end in limit.items():
        assert RungeKuttaBlock(field, method, step=0.99 * end).contraction < 1
        assert RungeKuttaBlock(field, method, step=1.01 * end).contraction is None
    assert RungeKuttaBlock(field, MIDPOINT, step=0.1).contraction is None
    assert RungeKuttaBlock(LayerField(3), step=0.1).contraction is None
    assert RungeKuttaBlock(GradientField(3, leak=0.0)).contraction is None
    assert contraction_constant(Monotonicity(0.0, 0.25), 0.1, "kutta4") is None


def test_without_a_leak_states_do_not_part():
    block = RungeKuttaBlock(GradientField(4, 3, leak=0.0, gain=9.0).double(), "kutta4")
    z1, z2, x = 5 * randn(50, 4), 5 * randn(50, 4, seed=1), randn(50, 4, seed=2)
    assert (length(block(z1, x) - block(z2, x)) <= length(z1 - z2) + 1e-12).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_step_sizes_of_a_network(method):
    z = randn(5, 3)
    for steps in ("fixed", "learned", "simplex"):
        net = RungeKuttaNet.of_layers(3, 4, method, total=2.0, steps=steps).double()
        assert net.step_sizes.tolist() == pytest.approx([0.5] * 4)
        y = z
        for field in net.fields:
            y = runge_kutta_step(lambda z, v=field: v(z), y, 0.5, net.tableau)
        assert torch.allclose(net(z), y, rtol=1e-13)
        path = net.trajectory(z)
        assert path.shape == (5, 5, 3)
        assert torch.equal(path[0], z) and torch.equal(path[-1], net(z))
        trained = sum(p.numel() for p in net.parameters())
        assert trained == 4 * 12 + (0 if steps == "fixed" else 4)


def test_the_step_sizes_of_a_simplex_stay_on_it_and_train():
    net = RungeKuttaNet.of_layers(2, 3, total=1.5, steps="simplex").double()
    z, target = randn(8, 2), randn(8, 2, seed=1)
    opt = torch.optim.SGD(net.parameters(), lr=0.5)
    losses = []
    for _ in range(30):
        opt.zero_grad()
        loss = (net(z) - target).square().mean()
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] and net.raw_steps.abs().max() > 1e-3
    assert (net.step_sizes > 0).all() and net.step_sizes.sum().item() == pytest.approx(1.5)


def test_a_network_without_a_fixed_point_layer_trains_by_natural_gradient():
    x, y = dense_batch(width=3)
    model = nn.Sequential(RungeKuttaNet.of_layers(3, 3, steps="learned"), nn.Linear(3, 3)).double()
    opt = ImplicitNGD(model, damping=0.1, route="output")
    losses = [float(opt.step(x.double(), y)) for _ in range(3)]
    assert losses[-1] < losses[0]


X2, X3 = torch.zeros(2, 2), torch.zeros(2, 3)
IMAGE = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: GradientField(0), "state_size must be at least 1"),
        (lambda: GradientField(2, 0), "hidden must be at least 1"),
        (lambda: GradientField(2, input_size=0), "input_size must be at least 1"),
        (lambda: GradientField(2, activation="elu"), "activation must be one of"),
        (lambda: GradientField(2, leak=-1.0), "leak must be finite and at least 0"),
        (lambda: GradientField(2, max_norm=0.0), "max_norm must be finite and above 0"),
        (lambda: GradientField(2, skew=-0.1), "skew must be finite and at least 0"),
        (lambda: GradientField(2, gain=0.0), "gain must be finite and above 0"),
        (lambda: ConvGradientField(0), "channels must be at least 1"),
        (lambda: ConvGradientField(2, 0), "hidden_channels must be at least 1"),
        (lambda: ConvGradientField(2, 2, 0), "input_channels must be at least 1"),
        (lambda: ConvGradientField(2, kernel_size=2), "kernel_size must be odd, got 2"),
        (lambda: LayerField(0), "state_size must be at least 1"),
        (lambda: LayerField(2, 0), "input_size must be at least 1"),
        (lambda: LayerField(2, activation="elu"), "activation must be one of"),
        (lambda: GradientField(2)(X2, X3), r"x must have shape \(batch, 2\), got \(2, 3\)"),
        (lambda: GradientField(2, 2, 3)(X2, X2), r"x must have shape \(batch, 3\), got \(2, 2\)"),
        (lambda: GradientField(2, 2, 3)(X2), r"x must have shape \(batch, 3\), got None"),
        (lambda: LayerField(2, 3)(X2), r"x must have shape \(batch, 3\), got None"),
        (lambda: LayerField(2)(X2, X2[0]), r"x must have shape \(batch, 2\), got \(2,\)"),
        (lambda: ConvGradientField(3)(IMAGE, IMAGE[:, :2]), r"\(batch, 3, height, width\), got"),
        (lambda: ConvGradientField(3, 3, 1)(IMAGE), "1, height, width.*got None"),
        (lambda: Monotonicity(-1.0, 1.0), "alpha must be finite and at least 0"),
        (lambda: Monotonicity(0.0, 0.0), "beta must be finite and above 0"),
        (lambda: Monotonicity(1.0, 0.3), "alpha beta must be at most 1/4, got 0.3"),
        (lambda: RungeKuttaBlock(nn.Linear(2, 2)), "field must be a .*Field, got Linear"),
        (lambda: RungeKuttaBlock(LayerField(2)), "step must be given: for LayerField .*'euler'"),
        (lambda: RungeKuttaBlock(GradientField(2), MIDPOINT), "step must be given.*'midpoint'"),
        (lambda: RungeKuttaBlock(GradientField(2), step=0.0), "step must be finite and above 0"),
        (lambda: RungeKuttaBlock(GradientField(2), "rk4"), "method must be one of"),
        (lambda: GradientBlock(2, leak=0.0), "leak must be finite and above 0"),
        (lambda: ConvGradientBlock(2, leak=0.0), "leak must be finite and above 0"),
        (lambda: contraction_constant(Monotonicity(0.0, 1.0), -1.0), "step must be finite"),
        (lambda: contraction_constant(Monotonicity(0.0, 1.0), 1.0, "x"), "method must be one of"),
        (lambda: RungeKuttaNet([]), "fields must have at least one field"),
        (lambda: RungeKuttaNet([LayerField(2), nn.Tanh()]), r"fields\[1\] must be a .*got Tanh"),
        (lambda: RungeKuttaNet([LayerField(2)], total=0.0), "total must be finite and above 0"),
        (lambda: RungeKuttaNet([LayerField(2)], steps="free"), "steps must be one of"),
        (lambda: RungeKuttaNet.of_layers(2, 0), "layers must be at least 1"),
        (
            lambda: costate_step(LayerField(2), X2, None, 0.1, make_tableau("euler"), X3),
            r"p must have the shape \(2, 2\) of z, got \(2, 3\)",
        ),
        (
            lambda: costate_step(LayerField(2), X2, None, 0.1, MIDPOINT, X2),
            "partner needs weights b that are positive",
        ),
    ],
)
def test_misuse_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
