"""Tests for `deqlqr/linearize.py`, `deqlqr/divergence.py`, `deqlqr/loss.py`, `controls.py`."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from deqlqr import (
    DEQ,
    Controls,
    ConvergenceError,
    DenseBlock,
    FiniteLQR,
    ImplicitNGD,
    linearize,
    solve_finite_lqr,
    static_step,
)

from .problems import conv_batch, conv_model, dense_batch, dense_model, randn, relative

D = 0.1


def double(model, x, y):
    model = model.double()
    layer = next(m for m in model.modules() if isinstance(m, DEQ))
    layer.solver = type(layer.solver)(tol=1e-13, max_steps=2000)
    return model, x.double(), y


def unrolled_outputs(model, u, x):
    """The model's outputs as a function of u by plain iteration: no implicit function theorem."""
    controls = Controls(model)
    layer = next(m for m in model.modules() if isinstance(m, DEQ))

    def iterate(module, args, output):
        z = torch.zeros_like(output)
        for _ in range(300):
            z = layer.block(z, args[0])
        return z

    handle = layer.register_forward_hook(iterate)
    try:
        with torch.no_grad():
            model(x)  # finds the state's shape outside of autograd
        return functional_call(model, controls.unflatten(u), (x,))
    finally:
        handle.remove()


CASES = {
    "encoder, block, head": lambda: double(dense_model(), *dense_batch()),
    "block, head": lambda: double(dense_model(encoder=False), *dense_batch(width=5)),
    "conv": lambda: double(conv_model(), *conv_batch()),
}


@pytest.mark.parametrize("case", CASES)
def test_natural_step_is_the_damped_fisher_step_of_the_unrolled_model(case):
    model, x, y = CASES[case]()
    u = Controls(model).vector
    J = torch.autograd.functional.jacobian(lambda u: unrolled_outputs(model, u, x), u)
    p = model(x).detach().softmax(-1)
    metric = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    fisher = torch.einsum("bkm,bkl,bln->mn", J, metric, J) / len(x)
    dJ = (p - F.one_hot(y, 3)) / len(x)
    gradient = torch.einsum("bk,bkm->m", dJ, J)
    expected = -torch.linalg.solve(fisher + D * torch.eye(len(u)).double(), gradient)
    assert relative(static_step(linearize(model, x, y, damping=D)), expected) < 1e-7


def test_least_squares_step_is_the_damped_gauss_newton_step():
    model, x, _ = CASES["encoder, block, head"]()
    y = randn(5, 3, seed=3)
    u = Controls(model).vector
    J = torch.autograd.functional.jacobian(lambda u: unrolled_outputs(model, u, x), u)
    normal = torch.einsum("bkm,bkn->mn", J, J) / len(x)
    gradient = torch.einsum("bk,bkm->m", 2 * (model(x).detach() - y) / y.numel(), J)
    expected = -torch.linalg.solve(2 / 3 * normal + D * torch.eye(len(u)).double(), gradient)
    ours = static_step(linearize(model, x, y, loss="mse", damping=D))
    assert relative(ours, expected) < 1e-8


def test_newton_problem_is_the_hessian_of_the_unrolled_loss():
    model, x, y = CASES["encoder, block, head"]()
    u = Controls(model).vector
    loss = lambda u: F.cross_entropy(unrolled_outputs(model, u, x), y)
    H = torch.autograd.functional.hessian(loss, u)
    g = torch.autograd.functional.jacobian(loss, u)
    expected = -torch.linalg.solve(H + 2.0 * torch.eye(len(u)).double(), g)
    ours = static_step(linearize(model, x, y, divergence="newton", damping=2.0))
    assert relative(ours, expected) < 1e-7


def test_euclidean_problem_is_theorem_4_2_1():
    model, x, y = CASES["conv"]()
    lqr = linearize(model, x, y, divergence="euclidean")
    assert lqr.Q.norm() == 0 and lqr.M.norm() == 0
    assert torch.equal(lqr.R, torch.eye(lqr.m, dtype=torch.float64))
    gradient = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    flat = torch.cat([g.reshape(-1) for g in gradient])
    assert relative(-static_step(lqr), flat) < 1e-9


def test_a_users_divergence_gives_its_own_metric():
    model, x, y = CASES["block, head"]()
    kl = lambda y, ref: (ref.softmax(-1) * (ref.log_softmax(-1) - y.log_softmax(-1))).sum()
    reverse = lambda y, ref: kl(ref, y)  # another function, the same metric at y = y_ref
    expected = linearize(model, x, y, damping=D)
    for divergence in (kl, reverse):
        lqr = linearize(model, x, y, divergence=divergence, damping=D)
        for name in "QRM":
            torch.testing.assert_close(getattr(lqr, name), getattr(expected, name))
    scaled = linearize(model, x, y, divergence=lambda y, r: 3 * kl(y, r))
    torch.testing.assert_close(scaled.Q, 3 * expected.Q)


def test_exact_minibatch_is_stacked_and_per_sample_is_not():
    model, x, y = CASES["block, head"]()
    exact, single = (
        linearize(model, x, y, minibatch=k, damping=D) for k in ("exact", "per-sample")
    )
    n, batch = 4, 5
    assert exact.A.shape == (batch * n, batch * n) and single.A.shape == (batch, n, n)
    torch.testing.assert_close(exact.A, torch.block_diag(*single.A))
    torch.testing.assert_close(exact.B, single.B.reshape(-1, single.m))
    torch.testing.assert_close(exact.a, single.a.reshape(-1) / batch)
    torch.testing.assert_close(exact.R, single.R.mean(0))
    alone = linearize(model, x[2:3], y[2:3], damping=D)
    torch.testing.assert_close(static_step(single)[2], static_step(alone))
    cosine = F.cosine_similarity(static_step(exact), static_step(single).mean(0), dim=0)
    assert 0.1 < cosine < 0.999  # F6: two different directions, both of descent


def test_a_loss_of_the_users_own_equals_the_named_one():
    model, x, y = CASES["block, head"]()
    own = lambda out, y: -out.log_softmax(-1)[torch.arange(len(y)), y].mean()
    a, b = (
        linearize(model, x, y, loss=l, divergence="categorical") for l in (own, "cross_entropy")
    )
    torch.testing.assert_close(a.a, b.a)
    torch.testing.assert_close(a.b, b.b)


def test_controls_are_in_the_documented_order_and_leave_frozen_ones_out():
    model = dense_model()
    model[0].bias.requires_grad_(False)
    controls = Controls(model)
    assert controls.names == [n for n, p in model.named_parameters() if p.requires_grad]
    u = controls.vector
    named = controls.unflatten(u)
    assert all(torch.equal(named[n], dict(model.named_parameters())[n]) for n in named)
    assert torch.equal(controls.flatten(named), u)
    controls.assign(2 * u)
    torch.testing.assert_close(controls.vector, 2 * u)
    x, y = dense_batch()
    assert linearize(model, x, y).m == controls.m == len(u)


class Picky(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.deq, self.head = DEQ(DenseBlock(4)), head

    def forward(self, x):
        return self.head(self.deq(x))


X, Y = randn(5, 4).float(), torch.tensor([0, 1, 2, 0, 1])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": X.double()}, "x must be torch.float32"),
        ({"x": X.where(X < 0.5, torch.nan)}, "x holds NaN"),
        ({"x": X[:0]}, "x must be a non-empty tensor"),
        ({"x": [1.0]}, "x must be a non-empty tensor"),
        ({"y": Y[:3]}, "y must have batch size 5"),
        ({"y": Y + 1}, r"labels in \[0, 2\], got values in \[1, 3\]"),
        ({"y": Y - 1}, r"labels in \[0, 2\]"),
        ({"y": Y.float()}, "y must be class labels"),
        ({"y": X, "loss": "mse"}, "y must have the shape of the output"),
        ({"y": X[:, :3] / 0, "loss": "mse"}, "y holds NaN or infinite"),
        ({"loss": "hinge"}, "loss must be"),
        ({"loss": lambda o, y: o, "divergence": "gaussian"}, "loss must return a scalar"),
        ({"loss": lambda o, y: o.mean()}, "divergence must be given"),
        ({"divergence": "fisher"}, "divergence must be one of"),
        ({"divergence": 3}, "divergence must be a name"),
        ({"divergence": lambda y, r: y.sum()}, "zero gradient at y = y_ref"),
        ({"divergence": lambda y, r: -(y - r).square().sum()}, "must have a minimum"),
        ({"minibatch": "mean"}, "minibatch must be one of"),
        ({"damping": -1.0}, "damping must be finite and at least 0"),
        ({"damping": "big"}, "damping must be a number"),
        ({"model": nn.Linear(4, 3)}, "model Linear has no phases"),
        ({"model": nn.Sequential(DEQ(DenseBlock(4)), DEQ(DenseBlock(4)))}, "found 2"),
        ({"model": Picky(nn.Unflatten(1, (2, 2)))}, r"must return \(batch, classes\)"),
        ({"model": Picky(nn.BatchNorm1d(4))}, "model.eval()"),
        ({"model": Picky(nn.Dropout(0.5))}, "model.eval()"),
    ],
)  # fmt: skip
def test_misuse_names_the_argument(change, message):
    arguments = {"model": Picky(nn.Linear(4, 3)), "x": X, "y": Y} | change
    with pytest.raises(ValueError, match=message):
        linearize(**arguments)


def test_batch_norm_and_dropout_are_fine_in_eval_mode():
    model = Picky(nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))).eval()
    assert linearize(model, X, Y).A.shape == (20, 20)


def test_a_block_without_fixed_point_is_a_convergence_error():
    block = DenseBlock(4, activation="relu", max_norm=None)
    with torch.no_grad():
        block.state.weight.copy_(3 * torch.eye(4))
    model = nn.Sequential(DEQ(block), nn.Linear(4, 3))
    with pytest.raises(ConvergenceError, match="fixed point of the block"):
        linearize(model, X.abs(), Y)


@pytest.mark.parametrize("minibatch", ["exact", "per-sample"])
def test_an_explicit_network_is_a_finite_horizon(minibatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    net.register_parameter("unused", nn.Parameter(torch.ones(2)))
    net, (x, y) = net.double(), dense_batch()
    x = x.double()
    lqr = linearize(net, x, y, damping=D, minibatch=minibatch)
    exact = minibatch == "exact"
    assert isinstance(lqr, FiniteLQR) and lqr.N == 3
    assert lqr.n == ((0, 25, 20, 15) if exact else (0, 5, 4, 3)) and sum(lqr.m) == Controls(net).m
    assert lqr.to(torch.float32).B[0].dtype == torch.float32 and lqr.c is None
    if not exact:
        assert lqr.B[1].shape == (5, 4, 24)
        return
    matrices = lqr.A, lqr.B, lqr.Q, lqr.R, lqr.M, lqr.a, lqr.b
    found = solve_finite_lqr(*matrices).u
    u = lqr.join(found)
    assert all(torch.equal(p, q) for p, q in zip(lqr.split(u), found, strict=True))
    J = torch.func.jacrev(lambda u: functional_call(net, Controls(net).unflatten(u), (x,)))(
        Controls(net).vector
    )
    p = functional_call(net, {}, (x,)).softmax(-1)
    Lambda = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    C = torch.einsum("bkm,bkl,bln->mn", J, Lambda, J) / 5 + D * torch.eye(len(u)).double()
    g = Controls(net).pull(F.cross_entropy(net(x), y))
    assert relative(u, -torch.linalg.solve(C, g)) < 1e-9
    euclidean = linearize(net, x, y, divergence="euclidean")
    u = euclidean.join(solve_finite_lqr(*matrices[:2], euclidean.Q, euclidean.R, a=lqr.a).u)
    assert relative(u, -g) < 1e-9
    with pytest.raises(ValueError, match="cyclic needs a model with a DEQ layer"):
        linearize(net, x, y, cyclic=True)


def test_finite_problems_check_their_shapes():
    I = torch.eye(2)
    parts = {"A": [I], "B": [I], "Q": [I, I], "R": [I], "M": [I], "a": [I[0], I[0]], "b": [I[0]]}
    assert FiniteLQR(**parts).damped(1.0).R[0][0, 0] == 2
    with pytest.raises(ValueError, match=r"Q must hold 2"):
        FiniteLQR(**parts | {"Q": [I]})
    with pytest.raises(ValueError, match="controls must hold the numbers 0 to 1 once"):
        FiniteLQR(**parts, controls=[torch.tensor([0, 2])])


@pytest.mark.parametrize("route", ["dare", "cyclic", "riccati"])
def test_dense_routes_work_without_gradients_and_under_autocast(route):
    model, (x, y) = dense_model(), dense_batch()
    if route == "riccati":
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    before = Controls(model).vector
    steps = []
    for context in (torch.enable_grad(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        Controls(model).assign(before)
        with context:
            ImplicitNGD(model, route=route, damping=D, max_increase=1.0).step(x, y)
        steps.append(Controls(model).vector - before)
    assert relative(steps[1], steps[0]) < 1e-6 and relative(steps[2], steps[0]) < 1e-4
