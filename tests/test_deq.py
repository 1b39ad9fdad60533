"""Tests for `deqlqr/deq.py` and `deqlqr/blocks.py`."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deqlqr import DEQ, Anderson, ConvBlock, ConvergenceError, DenseBlock, Implicit, Picard

from .problems import Cell, randn, relative, unrolled

TIGHT = {"tol": 1e-13, "max_steps": 1000}


def grads(output, module, x, weight):
    return torch.autograd.grad((output * weight).sum(), [x, *module.parameters()])


@pytest.mark.parametrize("backward", ["implicit", "lqr"])
@pytest.mark.parametrize("solver", ["anderson", "picard", "torchdeq:anderson"])
def test_gradient_equals_that_of_the_unrolled_iteration(solver, backward):
    block, x = Cell().double(), 0.3 * randn(4, 3)
    x.requires_grad_()
    tol = 1e-11 if solver.startswith("torchdeq") else 1e-13
    layer = DEQ(block, solver=solver, backward=backward, tol=tol, max_steps=1000)
    weight = randn(4, 3, seed=1)
    ours = grads(layer(x), block, x, weight)
    theirs = grads(unrolled(block, x), block, x, weight)
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a, b) < 1e-9


@pytest.mark.parametrize("backward", ["implicit", "lqr"])
@pytest.mark.parametrize("name", ["dense", "relu", "conv", "cell"])
def test_gradcheck_and_gradgradcheck(name, backward):
    torch.manual_seed(1)
    block, x = {
        "dense": (DenseBlock(3, 2), randn(2, 2)),
        "relu": (DenseBlock(3, 2, activation="relu"), randn(2, 2)),
        "conv": (ConvBlock(2, 4, inner_groups=2, init_scale=0.1), randn(2, 2, 3, 3)),
        "cell": (Cell(), 0.3 * randn(2, 3)),
    }[name]
    layer = DEQ(block.double(), backward=backward, **TIGHT)
    names = [n for n, _ in layer.named_parameters()]
    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    inputs = (x.requires_grad_(), *parameters)
    assert torch.autograd.gradcheck(call, inputs, atol=1e-6, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, atol=1e-5, fast_mode=True)


def test_third_derivative_equals_the_unrolled_one():
    block = Cell(1).double()
    layer = DEQ(block, **TIGHT)

    def third(f):
        x = torch.tensor([[0.4]], dtype=torch.float64, requires_grad=True)
        y = f(x)
        for _ in range(3):
            (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y.item()

    assert third(layer) == pytest.approx(third(lambda x: unrolled(block, x)), rel=1e-8)


def test_any_order_of_forwards_and_backwards_and_two_uses_in_one_graph():
    block, layer = Cell().double(), None
    layer = DEQ(block, **TIGHT)
    x1, x2 = (0.3 * randn(2, 3, seed=s) for s in (1, 2))
    loss = lambda x: layer(x).square().sum()
    alone = [torch.autograd.grad(loss(x), list(block.parameters())) for x in (x1, x2)]
    first, second = loss(x1), loss(x2)
    crossed = [torch.autograd.grad(v, list(block.parameters())) for v in (second, first)]
    for a, b in zip(alone[0] + alone[1], crossed[1] + crossed[0], strict=True):
        assert torch.equal(a, b)
    twice = torch.autograd.grad(layer(layer(x1)).sum(), list(block.parameters()))
    nested = torch.autograd.grad(
        unrolled(block, unrolled(block, x1)).sum(), list(block.parameters())
    )
    assert all(relative(a, b) < 1e-9 for a, b in zip(twice, nested, strict=True))


def test_gradient_is_exact_in_eval_mode_and_absent_under_no_grad():
    layer = DEQ(Cell()).eval()
    x = 0.3 * randn(2, 3).float()
    assert layer(x).requires_grad
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_frozen_parameters_get_no_gradient_and_the_others_theirs():
    block = Cell().double()
    block.mix.weight.requires_grad_(False)
    layer, x = DEQ(block, **TIGHT), 0.3 * randn(2, 3)
    layer(x).sum().backward()
    assert block.mix.weight.grad is None
    wanted = torch.autograd.grad(unrolled(block, x).sum(), block.scale)
    assert relative(block.scale.grad, wanted[0]) < 1e-9


def test_samples_without_a_fixed_point_follow_the_policy():
    class Bad(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.tensor(1.0))

        def forward(self, z, x):
            return torch.where(x > 0, z**2 + z + self.shift, 0.5 * z + self.shift)

    x = torch.tensor([[1.0], [-1.0]])
    with pytest.raises(ConvergenceError, match=r"1 of 2 batch elements failed \(elements 0\)"):
        DEQ(Bad())(x)
    with pytest.warns(RuntimeWarning, match="elements 0"):
        DEQ(Bad(), on_failure="warn")(x)
    layer = DEQ(Bad(), on_failure="return")
    z = layer(x)
    assert layer.solution.converged.tolist() == [False, True]
    assert z[1].item() == pytest.approx(2.0, abs=1e-4)


def test_a_failed_adjoint_solve_is_reported():
    block = DenseBlock(6, gain=0.5, max_norm=None)
    with torch.no_grad():
        block.state.weight.copy_(0.95 * torch.linalg.qr(randn(6, 6))[0])
    layer = DEQ(block, solver=Picard(tol=1e-5, max_steps=400))
    layer.backward = Implicit(method="krylov", max_steps=3)
    x = 0.01 * randn(3, 6).float()
    with pytest.raises(ConvergenceError, match=r"adjoint \(D1\).*Relative error up to"):
        layer(x).sum().backward()


def test_lqr_path_refuses_a_block_that_mixes_samples():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.3))

        def forward(self, z, x):
            return self.scale * (z + z.roll(1, 0)) + x

    x = randn(3, 2).float()
    DEQ(Mixing(), solver="picard")(x).sum().backward()
    with pytest.raises(ConvergenceError, match="mixes the samples"):
        (DEQ(Mixing(), solver="picard", backward="lqr")(x) * x).sum().backward()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: DEQ(torch.tanh), "block must be an nn.Module"),
        (lambda: DEQ(Cell(), backward="exact"), "backward must be one of"),
        (lambda: DEQ(Cell(), on_failure="ignore"), "on_failure must be one of"),
        (lambda: DEQ(Cell(), solver="andersen"), "solver must be one of"),
        (lambda: DEQ(Cell(), tolerance=1e-3), "no option 'tolerance'; did you mean 'tol'"),
        (lambda: DEQ(Cell(), backward=3), "backward must be a name or an Adjoint"),
        (lambda: DEQ(nn.Bilinear(3, 3, 2))(torch.ones(2, 3)), r"expected \(2, 3\), got \(2, 2\)"),
        (lambda: DEQ(Cell())(torch.ones(2, 3), z0=torch.ones(1, 3)), "z0 must have batch size 2"),
        (lambda: DenseBlock(3, gain=1.5), "gain must lie in"),
        (lambda: DenseBlock(3, max_norm=1.0), "max_norm must lie in"),
        (lambda: DenseBlock(3, activation="gelu"), "activation must be one of"),
        (lambda: DEQ(DenseBlock(3, 2))(torch.ones(2, 5)), r"x must have shape \(batch, 2\)"),
        (lambda: ConvBlock(3, 12, groups=2), "groups must divide channels"),
        (lambda: ConvBlock(2, max_lipschitz=1.5), "max_lipschitz must lie in"),
        (lambda: DEQ(ConvBlock(2, 12))(torch.ones(2, 5)), "x must have shape"),
    ],
)
def test_misuse_names_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_nan_input_is_a_convergence_error_that_says_so():
    with pytest.raises(ConvergenceError, match="NON_FINITE.*Largest residual inf"):
        DEQ(Cell())(torch.full((2, 3), float("nan")))


class Multiscale(nn.Module):
    """A vector and an image that drive each other."""

    def __init__(self) -> None:
        super().__init__()
        self.vector, self.image = nn.Linear(4, 4), nn.Conv2d(2, 2, 3, padding=1)
        self.down = nn.Linear(4, 2)

    def forward(self, z, x):
        u, v = z
        return (
            0.4 * torch.tanh(self.vector(u) + x + v.mean((2, 3)).repeat(1, 2)),
            0.3 * torch.tanh(self.image(v) + self.down(u)[:, :, None, None]),
        )


@pytest.mark.parametrize("backward", ["implicit", "lqr", Implicit(method="krylov")], ids=str)
def test_states_of_several_tensors_have_the_unrolled_gradient(backward):
    torch.manual_seed(0)
    block, x = Multiscale().double(), randn(3, 4).requires_grad_()
    layer = DEQ(block, state_shape=((4,), (2, 3, 3)), tol=1e-12, backward=backward)
    wanted = [x, *block.parameters()]
    u, v = layer(x)
    ours = torch.autograd.grad(u.sum() + v.square().sum(), wanted)
    z = (torch.zeros(3, 4).double(), torch.zeros(3, 2, 3, 3).double())
    for _ in range(200):
        z = block(z, x)
    theirs = torch.autograd.grad(z[0].sum() + z[1].square().sum(), wanted)
    assert all(relative(a, b) < 1e-9 for a, b in zip(ours, theirs, strict=True))
    assert isinstance(layer.solution.value, tuple)


def test_blocks_take_several_inputs_and_shared_keywords():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(3, 3)

        def forward(self, z, x, labels, gate=None, power=1):
            return 0.5 * torch.tanh(self.mix(z) * gate + x) ** power + 0.1 * labels[:, None]

    torch.manual_seed(0)
    block, x, labels = Two().double(), randn(4, 3), torch.arange(4)
    gate = randn(3, seed=1).requires_grad_()
    layer = DEQ(block, **TIGHT)
    z = torch.zeros(4, 3, dtype=torch.float64)
    for _ in range(300):
        z = block(z, x, labels, gate=gate, power=3)
    wanted = torch.autograd.grad(z.square().sum(), [gate, *block.parameters()])
    out = layer(x, labels, gate=gate, power=3)
    ours = torch.autograd.grad(out.square().sum(), [gate, *block.parameters()])
    assert all(relative(a, b) < 1e-9 for a, b in zip(ours, wanted, strict=True))
    with pytest.raises(ValueError, match="positional tensors must have batch size 4"):
        layer(x, torch.arange(3))
    with pytest.raises(ValueError, match="needs a tensor x"):
        layer()


def test_the_backward_pass_keeps_one_evaluation_whatever_the_number_of_steps():
    block, x = DenseBlock(64, 64, gain=0.9).double(), randn(32, 64)
    sizes = {}
    for tol in (1e-2, 1e-12):
        layer = DEQ(block, solver=Picard(tol=tol, max_steps=1000))
        kept = []
        pack = lambda t, kept=kept: (kept.append(t.numel()), t)[1]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x)
        sizes[int(layer.solution.evaluations.max())] = sum(kept)
    (few, small), (many, large) = sorted(sizes.items())
    assert many > 4 * few and small == large


def test_warm_starts_save_evaluations_and_change_nothing_else():
    torch.manual_seed(0)
    x = [randn(8, 40, seed=s) for s in range(3)]
    counts, losses = {}, {}
    for warm in (False, True):
        torch.manual_seed(1)
        layer = DEQ(DenseBlock(40, gain=0.9).double(), warm_start=warm, tol=1e-8)
        optimizer = torch.optim.SGD(layer.parameters(), 1e-3)
        forward = backward = 0
        for _ in range(3):
            for key, batch in enumerate(x):
                optimizer.zero_grad()
                loss = layer(batch, key=key).square().mean()
                loss.backward()
                optimizer.step()
                forward += int(layer.solution.evaluations.sum())
                backward += int(layer.backward_solution.evaluations.sum())
        counts[warm], losses[warm] = (forward, backward), loss.item()
        assert len(layer._warm) == (6 if warm else 0)
        layer.forget()
        assert not layer._warm
    assert losses[True] == pytest.approx(losses[False], rel=1e-6)
    assert counts[True][0] < 0.85 * counts[False][0] and counts[True][1] < counts[False][1]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 20), norm=st.floats(0.05, 0.85))
def test_random_contractive_blocks_have_the_unrolled_gradient(seed, n, norm):
    torch.manual_seed(seed)
    block, x = DenseBlock(n, gain=norm).double(), randn(3, n, seed=seed).requires_grad_()
    weight = randn(3, n, seed=seed + 1)
    theirs = grads(unrolled(block, x, 250), block, x, weight)
    for solver in ("anderson", "broyden"):
        ours = grads(DEQ(block, solver=solver, **TIGHT)(x), block, x, weight)
        assert all(relative(a, b) < 1e-8 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("n", [6, 60])
def test_one_resolvent_serves_the_gradient_and_many_other_cotangents(n):
    torch.manual_seed(0)
    block, x = DenseBlock(n, gain=0.85).double(), randn(4, n)
    layer = DEQ(block, tol=1e-12)
    z = layer(x)
    resolvent = layer.resolvent(z, x)
    g = randn(4, 5, n, seed=2)
    lam = resolvent.solve(g)
    A = torch.func.vmap(torch.func.jacrev(lambda z, x: block(z[None], x[None])[0]))(z.detach(), x)
    exact = torch.linalg.solve(torch.eye(n).double() - A.mT, g.mT).mT
    assert lam.converged.all() and relative(lam.value, exact) < 1e-9
    alone = sum(int(layer.resolvent(z, x).solve(g[:, k]).evaluations[0]) for k in range(5))
    assert int(lam.evaluations[0]) < alone
    with pytest.raises(ValueError, match="resolvent needs backward='implicit'"):
        DEQ(block, backward="lqr").resolvent(z, x)


def test_state_shape_comes_from_the_argument_the_block_or_the_input():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, 2)

        def forward(self, z, x):
            return 0.5 * torch.tanh(z + self.inner(x))

    x = torch.ones(3, 5)
    assert DEQ(Pooled(), state_shape=(2,))(x).shape == (3, 2)
    assert DEQ(DenseBlock(4, 5))(x).shape == (3, 4)
    assert DEQ(Cell(5))(0.1 * x).shape == (3, 5)


def test_copies_and_pickles_leave_solutions_behind():
    layer = DEQ(Cell(), solver=Anderson(memory=3))
    layer(0.1 * torch.ones(2, 3)).sum().backward()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.solution is None and other.solver == layer.solver
    assert layer.solution is not None


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_dense_block_is_a_contraction_whatever_its_parameters(activation):
    block = DenseBlock(6, 4, activation=activation, max_norm=0.9).double()
    with torch.no_grad():
        block.state.weight.copy_(20 * randn(6, 6))
    x, z1, z2 = randn(50, 4), 3 * randn(50, 6, seed=1), 3 * randn(50, 6, seed=2)
    ratio = (block(z1, x) - block(z2, x)).norm(dim=-1) / (z1 - z2).norm(dim=-1)
    assert ratio.max() <= 0.9 + 1e-12
    assert torch.linalg.matrix_norm(block.weight, 2).item() == pytest.approx(0.9)
    assert DEQ(block)(x).isfinite().all()


def test_conv_block_is_a_contraction_whatever_its_parameters():
    block = ConvBlock(2, 12).double()
    for scale in (0.1, 1.0, 10.0):
        with torch.no_grad():
            for seed, p in enumerate(block.parameters()):
                p.copy_(scale * randn(*p.shape, seed=seed))
        x, z1, z2 = (randn(40, 2, 4, 4, seed=s) for s in (7, 8, 9))
        near = z1 + 1e-5 * z2  # the Jacobian's norm shows at small distances
        for z in (z2, near):
            gap = (block(z1, x) - block(z, x)).flatten(1).norm(dim=-1)
            assert (gap <= 0.9 * (z1 - z).flatten(1).norm(dim=-1) * (1 + 1e-9)).all()
        assert DEQ(block)(x).isfinite().all()
    assert ConvBlock(2, max_lipschitz=None)(x.float(), x.float()).shape == x.shape


def test_conv_block_is_the_thesis_toy_by_default():
    block = ConvBlock(2)
    assert block.conv1.out_channels == 12 and isinstance(block.norm1, nn.GroupNorm)
    layer = DEQ(block)
    assert layer(randn(3, 2, 4, 4).float()).shape == (3, 2, 4, 4)
    assert layer.solution.converged.all()


@pytest.mark.gpu
@pytest.mark.parametrize("backward", ["implicit", "lqr"])
def test_gradient_on_the_gpu_agrees_with_the_cpu(backward):
    block, x = Cell().double(), 0.3 * randn(4, 3)
    here = torch.autograd.grad(DEQ(block, **TIGHT)(x).sum(), list(block.parameters()))
    block = block.cuda()
    layer = DEQ(block, backward=backward, **TIGHT)
    there = torch.autograd.grad(layer(x.cuda()).sum(), list(block.parameters()))
    assert all(relative(b.cpu(), a) < 1e-9 for a, b in zip(here, there, strict=True))
