"""Tests for `deqlqr/spectral_bound.py`, and for parametrised weights in a DEQ solve."""

import copy
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, hessian, jacfwd, jacrev
from torch.nn.utils import parametrizations, parametrize

from deqlqr import DEQ, CategoricalKL, Cyclic, ImplicitNGD, Krylov, Picard, check_equivalence
from deqlqr.spectral_bound import (
    SpectralBound,
    SpectralProjection,
    SpectralSphere,
    bound_norm,
    clipped,
    operator_norm,
    within,
)

from .problems import conv_batch, dense_batch, exact, generator, randn, relative

HOWS = ("scale", "project", "normalise")
FUNCTIONS = {
    "norm": operator_norm,
    "scale": lambda V: within(V, 0.7),
    "project": lambda V: clipped(V, 1.5),
    "normalise": SpectralSphere(0.7),
}
SHAPES = [(4, 3), (3, 4), (3, 3), (2, 3, 2), (2, 2, 2, 2)]


def orthonormal_columns(m, n, seed=0):
    return torch.linalg.qr(randn(m, n, seed=seed))[0]


def matrix_of(linear, shape):
    """The matrix of the linear part of an affine map of one sample."""
    size = int(np.prod(shape))
    out = linear(torch.eye(size).double().view(size, *shape)).flatten(1)
    return (out - linear(torch.zeros(1, *shape).double()).flatten(1)).mT


class Inject(nn.Sequential):
    """A user's block: its layers, and the injection added."""

    def forward(self, z, x):
        return super().forward(z) + x


def dense_block(how, bound=0.9):
    layers = nn.Linear(3, 4), nn.Linear(4, 3)
    for layer in layers:
        bound_norm(layer, max_norm=bound, how=how)
    return Inject(layers[0], nn.Tanh(), layers[1])


def conv_block(how, bound=0.9):
    layers = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1)
    for layer in layers:
        bound_norm(layer, max_norm=bound, how=how)
    return Inject(layers[0], nn.Tanh(), layers[1])


def dense_model(how):
    torch.manual_seed(0)
    encoder = bound_norm(nn.Linear(6, 3), max_norm=2.0, how=how)
    return nn.Sequential(encoder, DEQ(dense_block(how)), nn.Linear(3, 3))


def conv_model(how):
    torch.manual_seed(0)
    encoder = nn.Conv2d(1, 1, 2, stride=2)
    bound_norm(encoder, max_norm=2.0, how=how)
    return nn.Sequential(encoder, DEQ(conv_block(how)), nn.Flatten(), nn.Linear(9, 3))


MODELS = {"dense": (dense_model, dense_batch), "conv": (conv_model, conv_batch)}


def grown(model):
    """The model with weights above their bounds, so that these are active."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("original"):
                p.mul_(4.0)
    return model


# the norm


def test_the_norm_of_a_matrix_is_exact_and_that_of_a_kernel_the_least_of_its_four_matrices():
    W = randn(5, 3)
    assert float(operator_norm(W)) == pytest.approx(np.linalg.norm(W.numpy(), 2), rel=1e-14)
    K = randn(4, 3, 3, 2).numpy()
    matrices = [
        K.reshape(4, 18),
        K.transpose(0, 2, 1, 3).reshape(12, 6),
        K.transpose(0, 3, 1, 2).reshape(8, 9),
        K.transpose(0, 2, 3, 1).reshape(24, 3),
    ]
    least = min(np.linalg.norm(matrix, 2) for matrix in matrices) * 6**0.5
    assert float(operator_norm(torch.from_numpy(K))) == pytest.approx(least, rel=1e-14)
    assert float(operator_norm(W[..., None, None])) == pytest.approx(float(operator_norm(W)))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(1, 2),
    st.sampled_from(("zeros", "circular", "transposed")),
    st.sampled_from(("normal", "ones", "tap")),
    st.integers(0, 1000),
)
def test_no_convolution_exceeds_the_bound(d, k, stride, dilation, groups, mode, kind, seed):
    options = {"stride": stride, "dilation": dilation, "groups": groups}
    padding = dilation * (k - 1) // 2
    convs = [(nn.Conv1d, nn.ConvTranspose1d), (nn.Conv2d, nn.ConvTranspose2d)][d - 1]
    if mode == "transposed":
        conv = convs[1](2, 4, k, padding=padding, output_padding=stride - 1, **options)
    else:
        conv = convs[0](2, 4, k, padding=padding, padding_mode=mode, **options)
    conv.double()
    torch.manual_seed(seed)
    with torch.no_grad():
        if kind == "ones":
            conv.weight.fill_(1.0)
        elif kind == "tap":
            conv.weight.zero_()[..., -1] = 1.0
        else:
            nn.init.normal_(conv.weight, std=10.0 ** float(torch.rand(()) * 6 - 3))
    bound_norm(conv, max_norm=1e9)  # not refused
    with torch.no_grad():
        exact_norm = torch.linalg.matrix_norm(matrix_of(conv, (2, *[5] * d)), 2)
        assert float(exact_norm) <= float(operator_norm(conv.weight)) * (1 + 1e-12)


REFUSED = {
    "reflect": (2, "padding_mode 'zeros' or 'circular'"),
    "replicate": (2, "padding_mode 'zeros' or 'circular'"),
    "circular": (4, "outputs come twice"),
}


@pytest.mark.parametrize("mode", REFUSED)
@torch.no_grad()
def test_paddings_for_which_the_bound_fails_are_refused(mode):
    padding, message = REFUSED[mode]
    conv = nn.Conv1d(1, 1, 5, padding=padding, padding_mode=mode).double()
    conv.weight.fill_(1.0)
    exceeding = torch.linalg.matrix_norm(matrix_of(conv, (1, 5)), 2)
    assert float(exceeding) > 1.001 * float(operator_norm(conv.weight))
    with pytest.raises(ValueError, match=message):
        bound_norm(conv, max_norm=1.0)


# derivatives


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_first_and_second_derivatives(name, shape):
    f, V = FUNCTIONS[name], randn(*shape, seed=3).requires_grad_()
    assert gradcheck(f, (V,), check_forward_ad=True)
    assert gradgradcheck(f, (V,), check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms_agree(name):
    f, Vs = FUNCTIONS[name], randn(3, 4, 3)
    assert relative(torch.vmap(f)(Vs), torch.stack([f(V) for V in Vs])) < 1e-14
    g = lambda V: f(V).square().sum()
    want = jacrev(jacrev(g))(Vs[0])
    for found in (hessian(g)(Vs[0]), jacrev(jacfwd(g))(Vs[0]), torch.vmap(hessian(g))(Vs)[0]):
        assert relative(found, want) < 1e-10
    with pytest.raises(RuntimeError, match="forward derivative of a forward derivative"):
        jacfwd(jacfwd(g))(Vs[0])


def test_derivatives_are_right_where_singular_values_are_equal():
    V = (2.0 * orthonormal_columns(4, 3)).requires_grad_()  # all above both bounds
    assert gradcheck(FUNCTIONS["project"], (V,))
    # Along orthogonal matrices the norm is constant, and the scaled matrix is the matrix times it.
    X = randn(3, 3, seed=1)
    turned = lambda t: V.detach() @ torch.linalg.matrix_exp(t * (X - X.mT))
    t = torch.tensor(0.3).double()
    for order in (jacrev, lambda f: jacrev(jacrev(f))):
        assert order(lambda t: operator_norm(turned(t)))(t).abs() < 1e-12
        wanted = order(lambda t: 0.35 * turned(t))(t)
        assert relative(order(lambda t: within(turned(t), 0.7))(t), wanted) < 1e-12


@pytest.mark.parametrize("name", FUNCTIONS)
def test_zero_is_safe(name):
    V = torch.zeros(4, 3).double()
    value, slope = FUNCTIONS[name](V), jacrev(FUNCTIONS[name])(V)
    assert torch.equal(value, torch.zeros_like(value)) and bool(slope.isfinite().all())
    if name in ("scale", "project"):
        assert relative(slope.view(12, 12), torch.eye(12).double()) < 1e-14
        assert hessian(within)(V, 0.7).isfinite().all()


# the parametrisations


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(SHAPES), st.floats(-3, 3), st.floats(-1, 2), st.integers(0, 100))
def test_the_projection_is_the_nearest_weight_within_the_bound(shape, log_scale, log_bound, seed):
    bound = 10.0**log_bound
    V = 10.0**log_scale * randn(*shape, seed=seed)
    P = clipped(V, bound)
    taps = int(np.prod(shape[2:]))
    assert float(operator_norm(P)) <= bound * (1 + 1e-12)
    for other in range(5):  # a point of a convex set is the nearest where this angle is obtuse
        Y = randn(*shape, seed=1000 + other).flatten(1)
        Y = (Y * bound / taps**0.5 / torch.linalg.matrix_norm(Y, 2)).view(shape)
        assert float(((V - P) * (Y - P)).sum()) <= 1e-10 * float(V.norm() * bound)
    S = np.linalg.svd(V.flatten(1).numpy(), compute_uv=False)
    wanted = np.minimum(S, bound / taps**0.5)
    found = np.linalg.svd(P.flatten(1).numpy(), compute_uv=False)
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-13 * S[0])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(SHAPES), st.floats(-3, 3), st.integers(0, 100))
def test_bounds_hold_at_any_scale_and_the_sphere_is_met(shape, log_scale, seed):
    V = 10.0**log_scale * randn(*shape, seed=seed)
    norm = float(operator_norm(V))
    assert float(operator_norm(within(V, 0.8))) == pytest.approx(min(norm, 0.8), rel=1e-12)
    assert float(operator_norm(SpectralSphere(0.8)(V))) == pytest.approx(0.8, rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [SpectralBound, SpectralProjection])
def test_an_assigned_weight_within_the_bound_is_kept_to_the_last_digit(kind, shape):
    module = nn.Module()
    module.weight = nn.Parameter(randn(*shape))
    parametrize.register_parametrization(module, "weight", kind(0.9))
    # For a kernel the projection's ball is that of one of its matrices.
    matrix = randn(*shape, seed=5).flatten(1)
    W = 0.8 * matrix / torch.linalg.matrix_norm(matrix, 2) / np.prod(shape[2:]) ** 0.5
    module.weight = W.view(shape)
    assert torch.equal(module.weight, W.view(shape))
    assert repr(module.parametrizations.weight[0]) == f"{kind.__name__}(max_norm=0.9)"
    if kind is SpectralBound and len(shape) > 2:
        assert float(operator_norm(module.weight).detach()) <= 0.8 + 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", HOWS)
def test_half_precision_and_autocast(how, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(20, 20)
    nn.init.normal_(layer.weight)
    bound_norm(layer, max_norm=0.9, how=how)
    wanted = layer.weight.detach()
    with torch.autocast("cpu", dtype):
        assert relative(layer.weight, wanted) < 1e-6  # the bound itself is not cast
    layer.to(dtype)
    assert layer.weight.dtype == dtype and relative(layer.weight.float(), wanted) < 0.02
    layer(torch.ones(2, 20, dtype=dtype)).sum().backward()
    assert layer.parametrizations.weight.original.grad.isfinite().all()


def test_wrong_calls_are_named():
    linear = nn.Linear(3, 3)
    for options, message in [
        ({"max_norm": 0.0}, "max_norm must be finite and above 0, got 0.0"),
        ({"max_norm": float("inf")}, "max_norm must be finite"),
        ({"max_norm": 1.0, "how": "clip"}, "how must be one of"),
        ({"max_norm": 1.0, "name": "weigth"}, "name must be that of a parameter"),
        ({"max_norm": 1.0, "name": "bias"}, "bias must have 2 to 5 dimensions"),
        ({"max_norm": 1.0, "name": "in_features"}, "name must be that of a parameter"),
    ]:
        with pytest.raises(ValueError, match=message):
            bound_norm(linear, **options)
    assert not parametrize.is_parametrized(linear)
    with pytest.raises(ValueError, match="linear, and nn.Bilinear is not"):
        bound_norm(nn.Bilinear(2, 2, 2), max_norm=1.0)
    with pytest.raises(ValueError, match="no shape before"):
        bound_norm(nn.LazyLinear(2), max_norm=1.0)
    whole = nn.Module()
    whole.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.long), requires_grad=False)
    with pytest.raises(ValueError, match=r"must be real and floating-point, got torch.int64"):
        bound_norm(whole, max_norm=1.0)
    with pytest.raises(ValueError, match="2 to 5 dimensions"):
        operator_norm(torch.ones(3))
    with pytest.raises(ValueError, match="real and floating-point"):
        clipped(torch.ones(3, 3, dtype=torch.complex64), 1.0)
    nn.init.zeros_(linear.weight)
    with pytest.raises(ValueError, match="must not be zero with how='normalise'"):
        bound_norm(linear, max_norm=1.0, how="normalise")


# a user's block


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from((dense_block, conv_block)),
    st.sampled_from(HOWS),
    st.floats(-3, 3),
    st.integers(0, 100),
)
def test_a_block_of_bounded_layers_cannot_lose_its_fixed_point(make, how, log_scale, seed):
    block, q = make(how, 0.8).double(), 0.64
    g = generator(seed)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(10.0**log_scale * torch.randn(p.shape, generator=g, dtype=p.dtype))
    shape = (3,) if make is dense_block else (1, 3, 3)
    z, x = randn(2, 1, *shape, seed=seed) * torch.tensor([1.0, 1e3]).view(
        2, *[1] * (1 + len(shape))
    )
    A = jacrev(lambda z: block(z, x))(z).detach().reshape(z.numel(), z.numel())
    assert float(torch.linalg.matrix_norm(A, 2)) <= q * (1 + 1e-12)
    layer = DEQ(block, solver=Picard(tol=1e-9, max_steps=60))  # 0.64^60 < 1e-11
    layer(x)
    assert bool(layer.solution.converged.all())


def dense_steps(model, x, y, delta):
    """-(C + delta)^-1 g in the originals by torch.func, with C whole and from sampled outputs."""
    names, p = zip(*model.named_parameters(), strict=True)
    u = torch.cat([v.detach().flatten() for v in p])

    def outputs(u):
        parts = u.split([v.numel() for v in p])
        given = {n: w.view_as(v) for n, w, v in zip(names, parts, p, strict=True)}
        return functional_call(model, given, (x,))

    J, out = jacrev(outputs)(u), outputs(u).detach()
    share = out.softmax(1)
    metric = torch.diag_embed(share) - share[:, :, None] * share[:, None]
    C = torch.einsum("bkm,bkl,bln->mn", J, metric, J) / len(x)
    drawn = CategoricalKL().sample(out, generator(0))  # the generator of the first step
    W = torch.einsum("bkm,bk->bm", J, drawn)
    g = torch.einsum("bkm,bk->m", J, share - F.one_hot(y, out.shape[1])) / len(x)
    damped = lambda C: -torch.linalg.solve(C + delta * torch.eye(len(u)).double(), g)
    return u, damped(C), damped(W.mT @ W / len(x))


def assert_routes_take_the_dense_step(model, x, y):
    before, whole, sampled = dense_steps(model, x, y, 0.1)
    for route in ROUTES:
        ours = copy.deepcopy(model)
        optimizer = ImplicitNGD(ours, route=route, damping=0.1, max_increase=1e6)
        optimizer.step(x, y)
        assert optimizer.last_step.accepted and not optimizer.last_step.rejections
        after = torch.cat([p.detach().flatten() for p in ours.parameters()])
        assert relative(after - before, sampled if route == "sampled" else whole) < 1e-7, route


ROUTES = ["dare", "output", "sampled", Krylov(max_steps=500, progress=0.0, tol=1e-12), Cyclic()]


@pytest.mark.parametrize("how", ["scale", "project"])
def test_every_row_of_the_equivalence_holds(how):
    report = check_equivalence(exact(grown(dense_model(how))), *dense_batch(2))
    assert report.passed and (report.complete or how != "scale"), str(report)


CASES = [("dense", "scale"), ("dense", "project"), ("dense", "normalise"), ("conv", "scale"),
         ("conv", "project")]  # fmt: skip


@pytest.mark.parametrize("kind, how", CASES)
def test_every_route_takes_the_dense_step(kind, how):
    make, batch = MODELS[kind]
    x, y = batch(2)
    assert_routes_take_the_dense_step(exact(grown(make(how))), x.double(), y)


def test_the_kronecker_route_takes_scaled_weights():
    model, (x, y) = exact(grown(dense_model("scale"))), dense_batch(6)
    optimizer = ImplicitNGD(model, route="kronecker", damping=0.1)
    losses = [float(optimizer.step(x.double(), y)) for _ in range(6)]
    assert losses[-1] < 0.7 * losses[0]


# parametrize.cached


class Held(nn.Module):
    """Counts how often it makes a weight."""

    def __init__(self, drop=0.0):
        super().__init__()
        self.made, self.drop = 0, nn.Dropout(drop)

    def forward(self, V):
        self.made += 1
        return self.drop(torch.tanh(V))


def counted(drop=0.0):
    torch.manual_seed(0)
    block = Inject(nn.Linear(3, 3), nn.Dropout(drop)).double()
    with torch.no_grad():
        block[0].weight *= 0.5
    parametrize.register_parametrization(block[0], "weight", Held(drop))
    return DEQ(block, tol=1e-13, max_steps=300)


def spectral():
    torch.manual_seed(0)
    linear = parametrizations.spectral_norm(nn.Linear(3, 3).double())
    return DEQ(Inject(linear, nn.Tanh(), bound_norm(nn.Linear(3, 3), max_norm=0.7).double()),
               tol=1e-13, max_steps=300)  # fmt: skip


def bounded():
    torch.manual_seed(0)
    return DEQ(grown(dense_block("project")).double(), tol=1e-13)


@pytest.mark.parametrize("make", [counted, lambda: counted(0.3), spectral, bounded])
@pytest.mark.parametrize("backward_within", [True, False])
def test_cached_weights_leave_gradients_random_numbers_and_buffers_as_they_are(
    make, backward_within
):
    x, results = randn(5, 3), []
    for cached in (True, False):
        layer = make()  # not a copy: torch caches the weights of copies under one key
        torch.manual_seed(1)
        if not cached:
            z = layer(x)
            z.square().sum().backward()
        else:
            with parametrize.cached():
                z = layer(x)
                if backward_within:
                    z.square().sum().backward()
            if not backward_within:
                z.square().sum().backward()
        results.append([z, *(p.grad for p in layer.parameters()), *layer.buffers(), torch.rand(1)])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    assert all(p.grad.norm() > 1e-6 for p in layer.parameters())


def test_within_cached_a_solve_makes_each_weight_once():
    layer = counted()
    held = layer.block[0].parametrizations.weight[0]
    held.made = 0
    with parametrize.cached():
        z = layer(randn(5, 3))
        assert int(layer.solution.evaluations.max()) > 3 and held.made == 1
        z.sum().backward()
        assert held.made == 2


def test_within_cached_replaced_parameters_and_transforms_count():
    layer, x = counted(), randn(5, 3)
    own = {name: p.detach() for name, p in layer.named_parameters()}
    other = {name: 0.5 * p for name, p in own.items()}
    f = lambda given: functional_call(layer, given, (x,)).square().sum()
    wanted = [torch.func.grad(f)(given) for given in (own, other)]
    stacked = {name: torch.stack([own[name], other[name]]) for name in own}
    with parametrize.cached():
        layer(x)
        found = [torch.func.grad(f)(given) for given in (own, other)]
        both = torch.vmap(torch.func.grad(f))(stacked)
    for i, name in product(range(2), own):
        assert relative(found[i][name], wanted[i][name]) < 1e-12
        assert relative(both[name][i], wanted[i][name]) < 1e-10


def test_a_weight_shared_with_the_block_keeps_its_graph_outside():
    layer, x = counted(), randn(5, 3)
    linear = layer.block[0]
    with parametrize.cached():
        outside = linear.weight
        layer(x)
        assert linear.weight is outside and outside.requires_grad
