"""Tests for `deqlqr/monotone.py`."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import nn

from deqlqr import DEQ, ImplicitNGD, check_equivalence, fixed_point
from deqlqr.monotone import ConvMonotoneBlock, MonotoneBlock, best_step, rate
from deqlqr.spectral_bound import operator_norm

from .problems import exact, randn, relative

FB, PR = "forward-backward", "peaceman-rachford"
BOTH = pytest.mark.parametrize("splitting", [FB, PR])
MAKERS = {
    "dense FB": lambda **o: MonotoneBlock(5, 3, **o),
    "dense PR": lambda **o: MonotoneBlock(5, 3, splitting=PR, **o),
    "conv FB": lambda **o: ConvMonotoneBlock(2, 1, **o),
    "circular FB": lambda **o: ConvMonotoneBlock(2, 1, padding="circular", **o),
    "circular PR": lambda **o: ConvMonotoneBlock(2, 1, padding="circular", splitting=PR, **o),
}
KINDS = pytest.mark.parametrize("kind", MAKERS)
CHEAP = pytest.mark.parametrize("kind", ["dense FB", "dense PR", "circular PR"])
sizes = st.floats(-3, 3).map(lambda e: 10.0**e)


def make(kind, scale=1.0, seed=0, batch=2, **options):
    """A block with normal parameters of one size, inputs, and two batches of states."""
    block = MAKERS[kind](**options).double()
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: scale * torch.randn(*shape, generator=g, dtype=torch.float64)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(normal(*p.shape))
    x = normal(batch, 3) if "dense" in kind else normal(batch, 1, 3, 4)
    shape = block.state_shape(x)
    return block, x, normal(batch, *shape), normal(batch, *shape)


def dense(block, shape):
    """G = I - W as a matrix."""
    I = torch.eye(math.prod(shape), dtype=torch.float64)
    with torch.no_grad():
        return block.monotone(I.view(-1, *shape)).flatten(1).T


def injected(block, x):
    return (block.input(x) + block.bias).detach()


def complementary(G, c):
    """z >= 0, G z - c >= 0, z'(G z - c) = 0 by least-index pivoting, which ends as G > 0."""
    scale, active = np.abs(c).max() / np.abs(G).max(), np.zeros(len(c), dtype=bool)
    while True:
        z = np.zeros_like(c)
        z[active] = np.linalg.solve(G[np.ix_(active, active)], c[active])
        slack = (G @ z - c) / np.abs(G).max()
        wrong = np.flatnonzero(np.where(active, z, slack) < -1e-13 * scale)
        if len(wrong) == 0:
            return z
        active[wrong[0]] ^= True


def solved(block, x, q, z0=None):
    """The fixed point by plain iteration, and whether it came as soon as q says."""
    start = torch.zeros(len(x), *block.state_shape(x), dtype=x.dtype) if z0 is None else z0
    found = fixed_point(block, start, inputs=(x,), solver="picard", max_steps=2000, throw=False)
    first = (block(start, x) - start).flatten(1).norm(dim=1)
    enough = 1e-10 * (0.99 * found.value.flatten(1).norm(dim=1)).clamp(min=1.0)  # (FP1)
    steps = ((enough / first).log() / math.log(q)).ceil().clamp(min=0) + 1
    assert found.converged.all()
    return found, bool((found.evaluations <= steps + 1).all())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(m=sizes, s=sizes, k=sizes, splitting=st.sampled_from([FB, PR]))
def test_the_step_is_the_best_and_its_rate_is_attained(m, s, k, splitting):
    alpha = best_step(splitting, m, s, k)
    q = rate(splitting, alpha, m, s, k)
    assert 0 < q < 1
    best = minimize_scalar(
        lambda e: rate(splitting, alpha * math.exp(e), m, s, k), (-0.5, 0.5), tol=1e-9
    )
    assert q <= best.fun * (1 + 1e-14) and abs(best.x) < 1e-4
    for factor in (1.0, 0.3, 2.0):
        # With n = 2 all rotations commute with K, so this is the worst there is.
        G = np.array([[m + s**2, -k], [k, m]])
        E = np.eye(2) - factor * alpha * G
        if splitting == PR:
            E = E @ np.linalg.inv(np.eye(2) + factor * alpha * G)
        assert np.linalg.norm(E, 2) == pytest.approx(
            rate(splitting, factor * alpha, m, s, k), rel=1e-10
        )


@BOTH
def test_rates_for_known_cases(splitting):
    q = rate(splitting, best_step(splitting, 0.5, 1.0, 0.5), 0.5, 1.0, 0.5)
    assert q == pytest.approx({FB: 0.8, PR: 0.5}[splitting], rel=1e-14)
    mu, L = 0.5, 4.5  # no K: the textbook constants of a gradient
    q = rate(splitting, best_step(splitting, mu, 2.0, 0.0), mu, 2.0, 0.0)
    condition = {FB: L / mu, PR: (L / mu) ** 0.5}[splitting]
    assert q == pytest.approx((condition - 1) / (condition + 1), rel=1e-14)


@BOTH
@pytest.mark.parametrize("bounds", [(0.5, 1.0, 0.5), (0.1, 3.0, 2.0), (2.0, 0.3, 5.0)])
def test_no_smaller_contraction_holds(splitting, bounds):
    m, s, k = bounds
    block = MonotoneBlock(2, margin=m, max_norm=s, max_skew=k, splitting=splitting).double()
    with torch.no_grad():
        block.root.copy_(torch.tensor([[100.0, 0.0], [0.0, 0.0]]))
        block.skew.copy_(torch.tensor([[0.0, 100.0], [-100.0, 0.0]]))
        x = torch.full((1, 2), 1e3).double()  # at which both relus are active
        J = torch.func.jacrev(lambda z: block(z[None], x)[0])(torch.ones(2).double())
    assert float(torch.linalg.matrix_norm(J, 2)) == pytest.approx(block.contraction, rel=1e-12)


@KINDS
@settings(max_examples=5, deadline=None, derandomize=True)
@given(scale=sizes, seed=st.integers(0, 1000), bounded=st.booleans())
def test_whatever_the_parameters_g_is_monotone_and_f_contracts(kind, scale, seed, bounded):
    bounds = {} if bounded else {"max_norm": None, "max_skew": None}
    block, x, z1, z2 = make(kind, scale, seed, **bounds)
    shape = block.state_shape(x)
    G = dense(block, shape)
    least = torch.linalg.eigvalsh((G + G.T) / 2)[0]
    assert least >= block.margin - 1e-14 * torch.linalg.matrix_norm(G, 2)
    q = block.lipschitz_bound().detach()
    if bounded:
        assert q <= block.contraction + 1e-14
    else:
        assert block.contraction is None and q < 1
    flat = lambda v: v.detach().flatten(1).norm(dim=1)
    rounding = 1e-13 * (1 + flat(z1) + flat(z2) + flat(block(z1, x)) + flat(block(z2, x)))
    assert (flat(block(z1, x) - block(z2, x)) <= q * flat(z1 - z2) + rounding).all()
    with torch.no_grad():
        J = torch.func.jacrev(lambda z: block(z[None], x[:1])[0])(z1[0])
    assert torch.linalg.matrix_norm(J.reshape(len(G), len(G)), 2) <= q + 1e-12


@KINDS
@settings(max_examples=3, deadline=None, derandomize=True)
@given(scale=sizes, seed=st.integers(0, 1000))
def test_plain_iteration_finds_the_only_equilibrium_in_time(kind, scale, seed):
    block, x, z1, _ = make(kind, scale, seed)
    found, in_time = solved(block, x, block.contraction)
    assert in_time
    again, in_time = solved(block, x, block.contraction, z1)
    assert in_time
    apart = (found.value - again.value).flatten(1).norm(dim=1)
    size = found.value.flatten(1).norm(dim=1)
    error = (found.residual + again.residual + 1e-14 * size) / (1 - block.contraction)
    assert (apart <= error).all()
    G, c = dense(block, block.state_shape(x)).numpy(), injected(block, x).flatten(1).numpy()
    z = block.output(found.value).detach().flatten(1)
    for s in range(len(x)):
        reference = torch.from_numpy(complementary(G, c[s]))
        assert (z[s] - reference).norm() <= error[s] + 1e-12 * reference.norm()


@pytest.mark.parametrize(
    "kind, max_norm, max_skew",
    [
        ("dense FB", None, None),
        ("dense FB", 0.5, None),
        ("dense PR", None, 0.5),
        ("dense PR", None, None),
        ("conv FB", None, 0.5),
        ("circular PR", None, None),
    ],
)
def test_without_bounds_the_rate_of_the_moment_holds(kind, max_norm, max_skew):
    block, x, *_ = make(kind, 0.15, max_norm=max_norm, max_skew=max_skew)
    assert block.contraction is None
    found, in_time = solved(block, x, float(block.lipschitz_bound().detach()))
    assert in_time
    G, c = dense(block, block.state_shape(x)).numpy(), injected(block, x).flatten(1).numpy()
    z = block.output(found.value).detach().flatten(1)
    reference = torch.from_numpy(np.stack([complementary(G, row) for row in c]))
    assert torch.allclose(z, reference, atol=1e-7)


@pytest.mark.parametrize("one, other", [("dense FB", "dense PR"), ("circular FB", "circular PR")])
def test_both_splittings_have_one_equilibrium_and_one_gradient(one, other):
    results = []
    for kind in (one, other):
        block, x, *_ = make(kind)
        z = F.relu(DEQ(block, tol=1e-13, max_steps=1000)(x))
        grads = torch.autograd.grad(z.pow(2).sum(), list(block.parameters()))
        results.append([z.detach(), *grads])
    for a, b in zip(*results, strict=True):
        assert relative(a, b) < 1e-10


@pytest.mark.parametrize("padding", ["zeros", "circular"])
def test_a_and_k_are_what_they_say(padding):
    block = ConvMonotoneBlock(3, kernel_size=5, padding=padding).double()
    z = randn(2, 3, 6, 7)
    A, K = (weight.detach() for weight in block.weights())
    for start, norm in ((block.root, 0.5), (block.skew, 0.125)):  # half of the bounds
        assert float(operator_norm(start.detach())) == pytest.approx(norm)
    if padding == "zeros":
        S = block.skew
        expected = 0.5 * z + F.conv_transpose2d(F.conv2d(z, A, padding=2), A, padding=2)
        expected = expected - F.conv2d(z, S, padding=2) + F.conv_transpose2d(z, S, padding=2)
        assert torch.allclose(block.monotone(z), expected, rtol=0, atol=1e-14)
    G = dense(block, (3, 6, 7))
    skew = (G - G.T) / 2
    with torch.no_grad():
        kernel = ConvMonotoneBlock(3, kernel_size=5, padding=padding).double()
        kernel.load_state_dict(block.state_dict())
        kernel.skew.zero_()
        assert torch.allclose(dense(kernel, (3, 6, 7)), G - skew, rtol=0, atol=1e-14)
        assert torch.linalg.matrix_norm(skew, 2) <= operator_norm(K)
    assert torch.linalg.matrix_norm(skew, 2) > 0.05


@CHEAP
def test_the_gradient_is_that_of_finite_differences_and_of_the_unrolled_iteration(kind):
    block, x, z, _ = make(kind)
    layer = DEQ(block, tol=1e-13, max_steps=500)
    weights = randn(*z.shape, seed=5)
    loss = lambda: (weights * block.output(layer(x))).sum()
    grads = torch.autograd.grad(loss(), list(block.parameters()))
    z = torch.zeros_like(z)
    for _ in range(140):
        z = block(z, x)
    unrolled = torch.autograd.grad((weights * block.output(z)).sum(), list(block.parameters()))
    for p, ours, theirs in zip(block.parameters(), grads, unrolled, strict=True):
        assert (ours - theirs).norm() <= 1e-8 * (1 + theirs.norm())
        direction, h = randn(*p.shape, seed=7), 1e-5
        with torch.no_grad():
            p += h * direction
            ahead = loss()
            p -= 2 * h * direction
            slope = (ahead - loss()) / (2 * h)
            p += h * direction
        assert (ours * direction).sum() == pytest.approx(float(slope), rel=1e-6, abs=1e-7)


def test_without_bounds_the_gradient_is_the_same_and_that_of_u_is_right_too():
    grads = []
    for bound in (None, 100.0):
        block, x, *_ = make("dense PR", 1.0, max_norm=bound, max_skew=bound)
        z = F.relu(DEQ(block, solver="newton-krylov", tol=1e-13)(x))
        grads.append(torch.autograd.grad(z.pow(2).sum(), list(block.parameters())))
    for a, b in zip(*grads, strict=True):
        assert relative(a, b) < 1e-9
    block, x, *_ = make("dense PR", 1.0, max_norm=None, max_skew=None)
    layer = DEQ(block, solver="newton-krylov", tol=1e-13)
    direction, weights = torch.randn_like(block.root), torch.randn_like(layer(x))
    (grad,) = torch.autograd.grad((layer(x) * weights).sum(), block.root)
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            block.root += sign * 1e-6 * direction
            ends.append((layer(x) * weights).sum())
            block.root -= sign * 1e-6 * direction
    slope = (ends[0] - ends[1]) / 2e-6
    assert relative((grad * direction).sum(), slope) < 1e-6


@CHEAP
def test_second_derivatives_where_the_weights_are_scaled(kind):
    block, x, z, _ = make(kind, 2.0, batch=1)
    names = [name for name, _ in block.named_parameters()]

    def f(z, x, *values):
        given_names = dict(zip(names, values, strict=True))
        return torch.func.functional_call(block, given_names, (z, x))

    inputs = [v.detach().requires_grad_() for v in (z, x, *block.parameters())]
    assert torch.autograd.gradgradcheck(f, inputs, atol=1e-5, fast_mode=True)


@KINDS
def test_transforms_of_torch_func(kind):
    block, x, z, _ = make(kind, 0.5)
    parameters = {name: p.detach() for name, p in block.named_parameters()}
    f = lambda values, z: torch.func.functional_call(block, values, (z, x))
    forward, reverse = torch.func.jacfwd(f)(parameters, z), torch.func.jacrev(f)(parameters, z)
    stacked = {n: torch.stack([p, 3 * p]) for n, p in parameters.items()}
    both = torch.vmap(f, in_dims=(0, None))(stacked, z)
    for name in parameters:
        assert torch.allclose(forward[name], reverse[name], atol=1e-12)
    assert torch.allclose(both[1], f({n: 3 * p for n, p in parameters.items()}, z), atol=1e-12)
    alone = torch.cat([block(z[s : s + 1], x[s : s + 1]) for s in range(2)])
    assert torch.allclose(block(z, x), alone, atol=1e-14)
    assert torch.equal(block.phases(x)[0](z), block(z, x))
    half = block.bfloat16()(z.bfloat16(), x.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.allclose(half.double(), alone, atol=0.05)


def model_of(kind, seed=0, **options):
    torch.manual_seed(seed)
    if "dense" in kind:
        layers = [nn.Linear(6, 3), DEQ(MAKERS[kind](**options)), nn.ReLU(), nn.Linear(5, 3)]
        return nn.Sequential(*layers), randn(5, 6).float(), torch.arange(5) % 3
    layers = [DEQ(MAKERS[kind](**options)), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)]
    return nn.Sequential(*layers), randn(2, 1, 3, 3).float(), torch.arange(2)


@pytest.mark.parametrize("kind, bound", [("dense FB", 0.3), ("dense PR", None)])
def test_all_routes_agree(kind, bound):
    model, x, y = model_of(kind, max_norm=bound, max_skew=bound)
    with torch.no_grad():
        model[1].block.root.mul_(3)
        model[1].block.skew.mul_(3)
    assert check_equivalence(model, x, y).passed


@pytest.mark.parametrize("kind", ["dense PR", "circular PR"])
def test_steps_of_all_routes(kind):
    steps = {}
    for route in ("dare", "output", "krylov", "sampled"):
        model, x, y = model_of(kind)
        model, x = exact(model), x.double()
        opt = ImplicitNGD(model, route=route, damping=0.1)
        losses = [float(opt.step(x, y))]
        steps[route] = nn.utils.parameters_to_vector(model.parameters()).detach()
        losses.append(float(opt.step(x, y)))
        assert opt.last_step.accepted and losses[1] < losses[0]
    assert relative(steps["output"], steps["dare"]) < 1e-9
    assert relative(steps["krylov"], steps["dare"]) < 1e-4


@KINDS
def test_the_first_equilibrium_neither_vanishes_nor_blows_up(kind):
    torch.manual_seed(0)
    block = MAKERS[kind]()
    x = torch.randn(4, 3) if "dense" in kind else torch.randn(4, 1, 3, 4)
    z = block.output(DEQ(block)(x)).detach()
    assert 0.5 < z.norm() / F.relu(injected(block, x)).norm() < 2


@BOTH
def test_it_trains_with_adam(splitting):
    model, x, y = model_of("dense FB" if splitting == FB else "dense PR")
    opt = torch.optim.Adam(model.parameters(), lr=0.1)
    losses = []
    for _ in range(15):
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.4 * losses[0]


@BOTH
def test_an_input_of_the_states_own_size_is_added_as_it_is(splitting):
    block = MonotoneBlock(4, splitting=splitting).double()
    assert block.input is None
    z = F.relu(DEQ(block, tol=1e-13)(x := randn(3, 4)))
    W = torch.eye(4, dtype=torch.float64) - dense(block, (4,))
    assert torch.allclose(z, F.relu(z @ W.T + x + block.bias), atol=1e-11)
    conv = ConvMonotoneBlock(2, splitting=splitting, padding="circular").double()
    z = F.relu(DEQ(conv, tol=1e-13)(x := randn(2, 2, 3, 3)))
    assert torch.allclose(z, F.relu(z - conv.monotone(z) + x + conv.bias), atol=1e-11)


@pytest.mark.parametrize(
    "make_block, message",
    [
        (lambda: MonotoneBlock(0), "state_size must be at least 1"),
        (lambda: MonotoneBlock(3, 0), "input_size must be at least 1"),
        (lambda: MonotoneBlock(3, margin=0.0), "margin must be finite and above 0"),
        (lambda: MonotoneBlock(3, max_norm=0.0), "max_norm must be finite and above 0"),
        (lambda: MonotoneBlock(3, max_skew=-1.0), "max_skew must be finite and above 0"),
        (lambda: MonotoneBlock(3, splitting="peaceman"), "splitting must be one of"),
        (lambda: ConvMonotoneBlock(0), "channels must be at least 1"),
        (lambda: ConvMonotoneBlock(2, 0), "input_channels must be at least 1"),
        (lambda: ConvMonotoneBlock(2, kernel_size=4), "kernel_size must be odd, got 4"),
        (lambda: ConvMonotoneBlock(2, padding="same"), "padding must be one of"),
        (lambda: ConvMonotoneBlock(2, splitting=PR), "needs padding 'circular'"),
        (lambda: MonotoneBlock(3)(torch.zeros(2, 3), torch.zeros(2, 4)), "x must have shape"),
        (lambda: MonotoneBlock(3, 2)(torch.zeros(2, 3), torch.zeros(2)), "x must have shape"),
        (
            lambda: ConvMonotoneBlock(2)(torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 4, 4)),
            "x must have shape",
        ),
        (
            lambda: ConvMonotoneBlock(2, padding="circular")(
                torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2, 4)
            ),
            "at least 3 x 3 pixels",
        ),
    ],
)
def test_misuse(make_block, message):
    with pytest.raises(ValueError, match=message):
        make_block()
