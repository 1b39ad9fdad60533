"""The layer in unusual company: mixing and bad samples, moving buffers, nests of tensors."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.func import hessian, jacfwd, jacrev, vmap

from deqlqr import (
    DEQ,
    Anderson,
    ConvergenceError,
    DenseBlock,
    Fallback,
    FixedPointResult,
    Implicit,
    Neumann,
    NewtonKrylov,
    Picard,
    fixed_point,
)

from .problems import randn, relative, unrolled

TIGHT = {"tol": 1e-12, "max_steps": 1000}


class Gate(nn.Module):
    """f(z, x) = tanh(W z / 2 + g mean over the batch of z + x)."""

    def __init__(self, gate: float, n: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.gate = nn.Linear(n, n), nn.Parameter(torch.tensor(gate))

    def forward(self, z, x):
        return torch.tanh(0.5 * self.mix(z) + self.gate * z.mean(0, keepdim=True) + x)


SCALES = torch.logspace(-6, 0, 16, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("solver", ["anderson", "picard", "broyden", "newton-krylov", "fallback"])
def test_certificates_are_true_when_mixing_sets_in_later(solver):
    block, x = Gate(0.0).double(), SCALES * randn(16, 3)
    layer = DEQ(block, solver=solver)
    for gate in (0.0, 1e-6, 0.5, 0.5):
        with torch.no_grad():
            block.gate.fill_(gate)
        z = layer(x).detach()
        residual = (block(z, x) - z).norm(dim=-1).detach()
        assert layer.solution.converged.all()
        assert (residual <= 1e-9).all()
        assert torch.allclose(residual, layer.solution.residual, atol=1e-9)
    closure = fixed_point(lambda z: block(z, x).detach(), torch.zeros_like(x), solver=solver)
    assert (block(closure.value, x) - closure.value).norm() < 1e-8


@pytest.mark.parametrize("gate, batch", [(0.0, 5), (0.4, 1), (0.4, 5)])
def test_transforms_keep_the_samples_of_different_calls_apart(gate, batch):
    block, x = Gate(gate).double(), randn(batch, 3)
    layer = DEQ(block, **TIGHT)
    ours, theirs = (lambda x: layer(x)), (lambda x: unrolled(block, x, 80))
    for transform in (jacrev, jacfwd):
        assert relative(transform(ours)(x), transform(theirs)(x)) < 1e-9
    second = lambda F: hessian(lambda x: F(x).sin().sum())(x)
    assert relative(second(ours), second(theirs)) < 1e-9
    many = torch.stack([x, x + 0.3])
    assert relative(vmap(ours)(many), vmap(theirs)(many)) < 1e-9


def test_batch_normalisation_in_training_has_the_gradient_of_the_map_that_was_solved():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, z, x):
            return torch.tanh(0.4 * self.norm(self.mix(z) + x))

    torch.manual_seed(0)
    block, x = Normed().double(), (2 * randn(6, 3) + 1).requires_grad_()
    before = copy.deepcopy(block).eval()
    layer = DEQ(block, **TIGHT)
    z = layer(x)
    ours = torch.autograd.grad(z.sum(), [x, block.mix.weight], create_graph=True)
    theirs = torch.autograd.grad(
        unrolled(before, x).sum(), [x, before.mix.weight], create_graph=True
    )
    assert all(relative(a, b) < 1e-9 for a, b in zip(ours, theirs, strict=True))
    again = torch.autograd.grad(ours[0].square().sum(), x)[0]
    assert relative(again, torch.autograd.grad(theirs[0].square().sum(), x)[0]) < 1e-9
    (layer(x).sum() + layer(x + 1).sum()).backward()
    layer(layer(x)).sum().backward()
    assert block.norm.num_batches_tracked == 5


def test_buffers_that_evaluations_change_are_held_within_a_solve():
    torch.manual_seed(0)

    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.utils.parametrizations.spectral_norm(nn.Linear(30, 30))
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, z, x):
            self.calls += 1
            return 0.8 * torch.tanh(self.mix(z)) + x

    block, x = Spectral().double(), randn(8, 30)
    layer = DEQ(block, tol=1e-11)
    for forwards in (1, 2, 3):
        z = layer(x)
        assert layer.solution.converged.all()
        assert block.calls == forwards
    loss = (layer(x) + layer(x + 1)).square().sum()
    loss.backward()
    assert block.mix.parametrizations.weight.original.grad.isfinite().all()
    block.eval()
    assert relative(layer(x), z) < 1e-2


def test_a_chain_goes_on_with_the_map_it_began_with():
    class Drop(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.drop = nn.Linear(20, 20), nn.Dropout(0.4)

        def forward(self, z, x):
            return 0.8 * torch.tanh(self.drop(self.mix(z))) + x

    torch.manual_seed(0)
    chain = Fallback(solvers=(Anderson(max_steps=4), Picard(max_steps=500)))
    drop, x = Drop().double(), randn(16, 20)
    x[0] = 0.0
    with torch.no_grad():
        drop.mix.bias.zero_()  # the first sample starts at its fixed point
    layer = DEQ(drop, solver=chain)
    state = torch.get_rng_state()
    z = layer(x).detach()
    torch.set_rng_state(state)
    assert (drop(z, x) - z).norm(dim=-1).max() < 1e-8
    block, x = Gate(0.5).double(), SCALES * randn(16, 3)
    layer = DEQ(block, solver=Fallback(solvers=(Anderson(max_steps=9), Picard(max_steps=500))))
    z = layer(x)
    assert (block(z, x) - z).norm(dim=-1).max() < 1e-8


def test_tensors_in_nests_have_their_gradient_and_hidden_ones_are_refused():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.extra = nn.Linear(3, 3), None

        def forward(self, z, x, pair=None, options=None):
            value = 0.4 * torch.tanh(self.mix(z)) + x
            if pair is not None:
                value = value + pair[0] * pair[1]["scale"]
            if options is not None:
                value = value + options["shift"]
            return value if self.extra is None else value + self.extra

    torch.manual_seed(0)
    block, x = Nested().double(), randn(4, 3)
    a, s = randn(4, 3, seed=1).requires_grad_(), randn(4, 3, seed=2).requires_grad_()
    shift = randn(3, seed=3).requires_grad_()
    layer = DEQ(block, **TIGHT)
    call = lambda F: F(x, (a, {"scale": s}), options={"shift": shift, "name": "b"})
    ours = torch.autograd.grad(call(layer).square().sum(), [a, s, shift])
    z = torch.zeros_like(x)
    for _ in range(200):
        z = call(lambda *args, z=z, **shared: block(z, *args, **shared))
    theirs = torch.autograd.grad(z.square().sum(), [a, s, shift])
    assert all(relative(p, q) < 1e-9 for p, q in zip(ours, theirs, strict=True))
    block.extra = 2 * shift
    with pytest.raises(RuntimeError, match="neither an argument nor a parameter"):
        layer(x).sum().backward()


def test_the_start_is_left_as_it_was():
    x, z0 = randn(16, 3), torch.ones(16, 3, dtype=torch.float64)
    x[0, 0] = torch.nan
    for solver in ("anderson", "picard", "broyden", "fallback"):
        f = lambda z, x: torch.tanh(0.5 * z + x)
        fixed_point(f, z0, inputs=(x,), solver=solver, throw=False)
        assert (z0 == 1).all()
    layer = DEQ(DenseBlock(3), warm_start=True)
    x = randn(2, 3).float()
    z = layer(x, key=0)
    with torch.no_grad():
        z.fill_(torch.nan)
    assert layer(x, key=0).isfinite().all() and layer.solution.value.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [DenseBlock(40), DenseBlock(40, 40)], ids=["bare", "injected"])
def test_autocast_works_whatever_dtype_the_block_returns(block, dtype):
    layer, x = DEQ(block), randn(32, 40).float()
    with torch.autocast("cpu", dtype):
        loss = layer(x).float().sin().sum()
    loss.backward()
    assert layer.solution.converged.all()
    exact = torch.autograd.grad(DEQ(block)(x).sin().sum(), block.state.weight)[0]
    assert relative(block.state.weight.grad, exact) < 0.2
    block.zero_grad()


@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_what_steers_a_solve_stays_in_single_precision_under_autocast(solver):
    A, x = randn(40, 40).float(), randn(32, 40).float()
    A = 0.9 * A / torch.linalg.matrix_norm(A, 2)

    def f(z, x):
        with torch.autocast("cpu", enabled=False):
            return z @ A + x

    solve = lambda: fixed_point(f, torch.zeros_like(x), inputs=(x,), solver=solver, tol=1e-5)
    plain = solve()
    with torch.autocast("cpu", torch.bfloat16):
        under = solve()
    assert torch.equal(under.evaluations, plain.evaluations)
    assert torch.equal(under.value, plain.value) and under.value.dtype == torch.float32


@pytest.mark.parametrize("n", [4, 40])
@pytest.mark.parametrize("backward", ["implicit", "neumann"])
def test_a_bad_sample_spoils_neither_values_nor_gradients_of_the_others(n, backward):
    torch.manual_seed(0)
    block, x = DenseBlock(n).double(), randn(6, n)
    layer = DEQ(block, on_failure="return", backward=backward, **TIGHT)
    keep = [0, 1, 3, 4, 5]
    wanted = torch.autograd.grad(layer(x[keep]).sin().sum(), list(block.parameters()))
    x[2] = torch.nan
    z = layer(x)
    good = layer.solution.converged
    assert good.tolist() == [True, True, False, True, True, True]
    ours = torch.autograd.grad(z[good].sin().sum(), list(block.parameters()))
    assert all(relative(a, b) < 1e-9 for a, b in zip(ours, wanted, strict=True))
    layer.on_failure = "raise"
    with pytest.raises(ConvergenceError, match="NON_FINITE"):
        layer(x)


def test_an_overflowed_cotangent_is_passed_on_as_gradient_scalers_want():
    layer, x = DEQ(DenseBlock(5)), randn(3, 5).float()
    (layer(x).sum() * torch.inf).backward()
    assert not layer.block.state.weight.grad.isfinite().all()


def test_nothing_keeps_the_inputs_of_past_calls_alive():
    layer, head = DEQ(DenseBlock(5)), nn.Linear(5, 5)
    gc.collect()
    gc.disable()
    try:
        past = []
        for _ in range(3):
            x = head(randn(3, 5).float())
            past.append(weakref.ref(x))
            layer(x).sum().backward()
            del x
        assert all(ref() is None for ref in past)
    finally:
        gc.enable()
    assert not layer.solution.value.requires_grad
    layer.solution.value.numpy()


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: Fallback(solvers=()), ValueError, "at least one"),
        (lambda: Fallback(solvers=("anderson",)), ValueError, "solver objects"),
        (lambda: DEQ(DenseBlock(3), backward=Implicit), ValueError, "a name or an Adjoint"),
        (lambda: Anderson(ridge=-1.0), ValueError, "ridge must be at least 0"),
        (lambda: Anderson(period=2.0), ValueError, "period must be an int"),
        (lambda: Implicit(tol=-1.0), ValueError, "tol must be finite and above 0"),
        (lambda: Implicit(max_step=3), TypeError, "did you mean 'max_steps'"),
        (lambda: Neumann(2.5), ValueError, "terms must be an int"),
        (lambda: NewtonKrylov(inner_tol=-1.0), ValueError, "inner_tol must be finite and above"),
        (lambda: DEQ(nn.Bilinear(3, 3, 3), state_shape=3)(torch.ones(2, 4)), ValueError,
         "block raised at its first evaluation"),
        (lambda: DEQ(DenseBlock(3))(x=torch.ones(2, 3)), ValueError, "first positional argument"),
    ],
)  # fmt: skip
def test_misuse_names_what_is_wrong(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_blocks_that_write_into_the_state_or_take_our_names_are_refused():
    class InPlace(nn.Module):
        def forward(self, z, x):
            return z.relu_() * 0.5 + x

    class Key(nn.Module):
        def forward(self, z, x, key=None):
            return x

    with pytest.raises(ValueError, match="changes z in place"):
        DEQ(InPlace())(torch.ones(2, 3))
    with pytest.raises(ValueError, match="argument named 'key'"):
        DEQ(Key())


def test_a_chain_is_bounded_by_its_own_limit():
    chain = Fallback(solvers=(Picard(), Anderson()), max_steps=3, tol=1e-10)
    layer = DEQ(DenseBlock(20), solver=chain, on_failure="return")
    layer(randn(4, 20).float())
    assert (layer.solution.result == FixedPointResult.MAX_STEPS).all()
    assert (layer.solution.evaluations == 6).all()
