"""Tests for `deqlqr/random_fields.py`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import least_squares
from torch import nn
from torch.func import functional_call, jacrev, vmap

from deqlqr import DEQ, Controls, ImplicitNGD, Picard, check_equivalence
from deqlqr.random_fields import ControlledODE, RandomFieldBlock, RandomFields

from .problems import randn, relative

CLAIM = settings(max_examples=25, deadline=None, derandomize=True)


def double_block(*args, u=None, **options):
    torch.manual_seed(0)
    block = RandomFieldBlock(*args, **options).double()
    if u is not None:
        block.u = nn.Parameter(u)
    return block


@pytest.mark.parametrize("activation", ["tanh", "polynomial"])
def test_the_combination_is_the_sum_of_its_fields(activation):
    fields = RandomFields(3, 5, activation=activation, seed=4).double()
    z, u = randn(6, 3), randn(5, seed=1)
    sigma = [torch.tanh] * 5 if activation == "tanh" else [lambda r: r] * 3 + [torch.square] * 2
    expected = torch.stack([
        sum(
            u[i] * sigma[i](fields.C[i] @ z[s] + fields.d[i]) for i in range(5)
        ) for s in range(6)
    ])  # fmt: skip
    assert torch.allclose(fields(z, u), expected, rtol=1e-13, atol=1e-13)
    one_by_one = vmap(lambda v: fields(v[None], u)[0])(z)
    assert torch.allclose(fields(z, u), one_by_one, rtol=1e-13, atol=1e-13)


def test_fields_depend_on_their_seed_alone_and_leave_the_global_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = RandomFields(4, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = RandomFields(4, seed=3), RandomFields(4, seed=5)
    assert torch.equal(one.C, again.C) and torch.equal(one.d, again.d)
    assert not torch.equal(one.C, other.C) and not torch.equal(one.d, other.d)
    assert not torch.equal(one.C[0], one.C[1])
    blocks = [RandomFieldBlock(4, input_size=3, seed=3) for _ in range(2)]
    assert torch.equal(blocks[0].U, blocks[1].U)
    C = torch.linalg.matrix_norm(one.C.flatten(0, 1), 2) * blocks[0].vector_fields.C
    assert torch.allclose(C, one.C, rtol=1e-5) and torch.equal(blocks[0].vector_fields.d, one.d)
    assert not torch.equal(blocks[0].u, blocks[1].u)
    large = RandomFields(60, 7).double()
    assert float(large.C.var()) == pytest.approx(1 / 60, rel=0.05)
    assert float(large.d.var()) == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("maker", [
    lambda: nn.Sequential(DEQ(RandomFieldBlock(4, input_size=2)), nn.Linear(4, 3)),
    lambda: nn.Sequential(ControlledODE(2, depth=4), nn.Linear(2, 3)),
])  # fmt: skip
def test_training_leaves_the_buffers_and_they_are_saved(maker):
    torch.manual_seed(0)
    model = maker().double()
    before = copy.deepcopy(model.state_dict())
    x, y = randn(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    opt = ImplicitNGD(model, route="output", damping=0.1)
    for _ in range(3):
        opt.step(x, y)
    after = model.state_dict()
    frozen = {name for name, _ in model.named_buffers()}
    assert {name.rsplit(".")[-1] for name in frozen} >= {"C", "d"}
    for name, value in after.items():
        assert torch.equal(value, before[name]) == (name in frozen), name
    torch.manual_seed(9)
    other = maker().double()
    for buffer in other.buffers():
        buffer += 1.0
    other.load_state_dict(after)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("width", [None, 4])
def test_the_block_is_the_promised_sum(width):
    block = double_block(3, 5, width, u=4 * randn(5))
    z, x, w = randn(6, 3), randn(6, width or 3, seed=1), 0.9 * block.u / block.u.norm()
    C, d = block.vector_fields.C, block.vector_fields.d
    for s in range(6):
        inside = [torch.zeros(3) if width is None else block.U[i] @ x[s] for i in range(5)]
        fields = sum(w[i] * torch.tanh(C[i] @ z[s] + inside[i] + d[i]) for i in range(5))
        expected = fields + (x[s] if width is None else 0)
        assert torch.allclose(block(z, x)[s], expected, rtol=1e-12, atol=1e-12)


@CLAIM
@given(
    st.integers(0, 10**6), st.sampled_from([1e-3, 1.0, 30.0, 1e3]), st.sampled_from([1, 3, 7]),
    st.sampled_from([1, 2, 5]), st.sampled_from([0.5, 0.9, 0.99]), st.sampled_from([1.0, 1e3]),
    st.sampled_from([None, 4]),
)  # fmt: skip
def test_the_block_is_a_contraction_for_all_controls(seed, size, fields, n, q, far, width):
    u = size * randn(fields, seed=seed)
    block = double_block(n, fields, width, max_lipschitz=q, seed=seed, u=u)
    z, x = far * randn(2, 8, n, seed=seed + 1), randn(8, width or n, seed=seed + 2)
    change = (block(z[0], x) - block(z[1], x)).norm(dim=1)
    assert block.contraction == q
    assert bool((change <= q * (z[0] - z[1]).norm(dim=1) + 1e-12).all())
    A = vmap(jacrev(lambda v, i: block(v[None], i[None])[0]))(randn(8, n, seed=seed + 3), x)
    assert bool((torch.linalg.matrix_norm(A, 2) <= q + 1e-12).all())
    stacked = torch.linalg.matrix_norm(block.vector_fields.C.flatten(0, 1), 2)
    assert 1 - 1e-5 < float(stacked) <= 1
    assert float(block.lipschitz_bound().detach()) == pytest.approx(float(u.norm()), rel=1e-12)
    unchanged = bool(torch.equal(block.weights, u))
    assert unchanged == bool(block.lipschitz_bound() <= q)


def test_the_bound_is_reached_by_one_orthogonal_field_at_the_origin():
    block = double_block(3, 1, max_lipschitz=0.8, u=torch.tensor([50.0], dtype=torch.float64))
    block.vector_fields.C.copy_(torch.linalg.qr(randn(3, 3)).Q)
    block.vector_fields.d.zero_()
    A = jacrev(lambda z: block(z[None], torch.zeros(1, 3, dtype=z.dtype))[0])(
        torch.zeros(3, dtype=torch.float64)
    )
    assert float(torch.linalg.matrix_norm(A.detach(), 2)) == pytest.approx(0.8, rel=1e-12)


def test_without_a_bound_u_enters_as_it_is():
    block = double_block(3, max_lipschitz=None, u=100 * randn(7))
    assert block.contraction is None and torch.equal(block.weights, block.u)


@pytest.mark.parametrize("size", [0.0, 0.01, 100.0])
def test_the_gradient_is_that_of_finite_differences_and_finite_at_zero(size):
    block, z, x = double_block(3, 4), randn(5, 3), randn(5, 3, seed=1)

    def f(u, z):
        return functional_call(block, {"u": u}, (z, x))

    u = (size * randn(4, seed=2)).requires_grad_()
    assert torch.autograd.gradcheck(f, (u, z.requires_grad_()))
    if size > 0:
        assert torch.autograd.gradgradcheck(f, (u, z))


def test_the_gain_is_the_initial_bound_and_the_fixed_point_comes_at_the_promised_rate():
    block = double_block(6, 7, 4, gain=0.3)
    assert float(block.lipschitz_bound().detach()) == pytest.approx(0.3, rel=1e-5)
    block.u = nn.Parameter(1e3 * randn(7))
    layer, x = DEQ(block, solver=Picard(), tol=1e-12), randn(9, 4)
    assert layer.initial_state(x).shape == (9, 6)
    z = layer(x).detach()
    residual = [z.new_zeros(9, 6)]
    for _ in range(20):
        residual.append(block(residual[-1], x))
    errors = torch.stack([(state - z).norm(dim=1) for state in residual])
    assert bool((errors[1:] <= 0.9 * errors[:-1] + 1e-11).all())
    assert len(block.phases(x)) == 1 and torch.equal(block.phases(x)[0](z), block(z, x))


def test_a_step_by_the_riccati_equation_is_the_dense_damped_natural_step():
    model = nn.Sequential(DEQ(double_block(4, 7, 3), tol=1e-13), nn.Linear(4, 3).double())
    x, y = randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    controls = Controls(model)
    u = controls.vector
    assert controls.m == 7 + 15
    outputs = lambda v: functional_call(model, controls.unflatten(v), (x,))
    J, p = jacrev(outputs)(u), F.softmax(outputs(u), 1).detach()
    fisher = torch.einsum("skm,skl,sln->mn", J, torch.diag_embed(p) - p[:, :, None] * p[:, None], J)
    gradient = jacrev(lambda v: F.cross_entropy(outputs(v), y))(u)
    expected = -torch.linalg.solve(fisher / 6 + 0.05 * torch.eye(22, dtype=u.dtype), gradient)
    opt = ImplicitNGD(model, route="dare", lr=1.0, damping=0.05)
    opt.step(x, y)
    assert opt.last_step.accepted
    assert relative(Controls(model).vector - u, expected) < 1e-8


def test_every_route_agrees_on_a_net_of_random_fields():
    torch.manual_seed(0)
    model = nn.Sequential(DEQ(RandomFieldBlock(3, 5, 2)), nn.Linear(3, 3))
    report = check_equivalence(model, randn(4, 2), torch.tensor([0, 1, 2, 0]))
    assert report.passed and report.complete, str(report)


@pytest.mark.parametrize("relative_output", [True, False])
def test_the_net_takes_euler_steps_of_the_same_fields(relative_output):
    torch.manual_seed(0)
    net = ControlledODE(3, 4, 5, relative=relative_output, seed=2).double()
    assert sum(p.numel() for p in net.parameters()) == 5 * 4 + relative_output
    x = randn(6, 3)
    if relative_output:
        net.lam = nn.Parameter(torch.tensor(1.7, dtype=torch.float64))
    X = x
    states = [x]
    for t in range(5):
        X = X + 0.2 * RandomFields(3, 4, seed=2).double()(X, net.u[t])
        states.append(X)
    assert torch.allclose(net.trajectory(x), torch.stack(states), rtol=1e-12, atol=1e-12)
    y = 1.7 * (X - x) if relative_output else X
    assert torch.allclose(net(x), y, rtol=1e-12, atol=1e-12)
    one_by_one = vmap(lambda v: net(v[None])[0])(x)
    assert torch.allclose(net(x), one_by_one, rtol=1e-12, atol=1e-12)
    named = dict(net.named_parameters())
    call = lambda *values: functional_call(net, dict(zip(named, values, strict=True)), (x,))
    assert torch.autograd.gradcheck(call, tuple(named.values()), fast_mode=True)


def test_other_methods_follow_the_flow_more_closely():
    def last(method, repeats):
        torch.manual_seed(0)
        net = ControlledODE(2, 5, 4 * repeats, relative=False, method=method).double()
        net.u = nn.Parameter(u.repeat_interleave(repeats, 0))
        return net(x).detach()

    u, x = randn(4, 5), randn(6, 2, seed=1)
    exact = last("kutta4", 40)
    errors = [float((last(method, 1) - exact).norm()) for method in ("euler", "kutta4")]
    assert errors[1] < 0.01 * errors[0]
    assert float((last("kutta4", 2) - exact).norm()) < errors[1] / 10


@pytest.mark.parametrize("activation", ["tanh", "polynomial"])
def test_the_net_interpolates_five_generic_points_of_the_plane(activation):
    torch.manual_seed(0)
    net = ControlledODE(2, 7, 20, activation=activation).double()
    x, y = torch.rand(2, 5, 2, dtype=torch.float64) * 2 - 1
    controls = Controls(net)

    def residual(u):
        return (functional_call(net, controls.unflatten(u), (x,)) - y).flatten()

    found = least_squares(
        lambda u: residual(torch.as_tensor(u)).detach().numpy(), controls.vector.numpy(),
        jac=lambda u: jacrev(residual)(torch.as_tensor(u)).detach().numpy(),
        ftol=1e-15, xtol=1e-15, gtol=1e-15, max_nfev=300,
    )  # fmt: skip
    controls.assign(torch.as_tensor(found.x))
    assert controls.m == 141
    assert float((net(x) - y).detach().abs().max()) < 1e-8


def test_options_out_of_range_are_refused():
    for options, message in (
        ({"state_size": 0}, "state_size"),
        ({"fields": 0}, "fields"),
        ({"activation": "relu"}, "activation"),
        ({"activation": "polynomial", "fields": 3}, "fields must be at least 4"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(ValueError, match=message):
            RandomFields(**({"state_size": 3} | options))
    for options, message in (
        ({"max_lipschitz": 1.0}, "max_lipschitz"),
        ({"max_lipschitz": 0.0}, "max_lipschitz"),
        ({"gain": 0.0}, "gain"),
        ({"input_size": 0}, "input_size"),
        ({"fields": 0}, "fields"),
    ):
        with pytest.raises(ValueError, match=message):
            RandomFieldBlock(3, **options)
    for options, message in (
        ({"depth": 0}, "depth"),
        ({"init_scale": 0.0}, "init_scale"),
        ({"method": "leapfrog"}, "method"),
        ({"activation": "relu"}, "activation"),
    ):
        with pytest.raises(ValueError, match=message):
            ControlledODE(3, **options)


def test_tensors_that_do_not_fit_are_refused():
    fields = RandomFields(3)
    with pytest.raises(ValueError, match=r"u must have shape \(7,\), got \(6,\)"):
        fields(torch.zeros(2, 3), torch.zeros(6))
    with pytest.raises(ValueError, match=r"z must have shape \(batch, 3\), got \(2, 4\)"):
        fields(torch.zeros(2, 4), torch.zeros(7))
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 3\), got \(2, 4\)"):
        RandomFieldBlock(3)(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 2\), got \(2, 3\)"):
        RandomFieldBlock(3, input_size=2)(torch.zeros(2, 3), torch.zeros(2, 3))
    for method in ("forward", "trajectory"):
        with pytest.raises(ValueError, match=r"z must have shape \(batch, 3\)"):
            getattr(ControlledODE(3), method)(torch.zeros(2, 2))
