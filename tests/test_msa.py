"""Tests for `deqlqr/trajectory.py` and `deqlqr/msa.py`, by autograd and dense linear algebra."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from deqlqr import (
    DEQ,
    ConvergenceError,
    DenseBlock,
    GradientStep,
    Guard,
    RungeKuttaNet,
    bound_norm,
    runge_kutta_step,
)
from deqlqr.loss import make_loss
from deqlqr.msa import MSA
from deqlqr.trajectory import Chain

from .problems import Cell, randn

CROSS_ENTROPY = make_loss("cross_entropy")


class Residual(nn.Module):
    """x + h tanh(W x + b)."""

    def __init__(self, n, h=0.5, max_norm=None):
        super().__init__()
        self.layer, self.h = nn.Linear(n, n), h
        if max_norm is not None:
            bound_norm(self.layer, max_norm=max_norm)

    def forward(self, x):
        return x + self.h * torch.tanh(self.layer(x))


class Around(nn.Sequential):
    """Layers with a skip connection around all of them: x is part of every state."""

    def forward(self, x):
        return 0.5 * x[:, :3] + super().forward(2 * x)


class Steps(nn.Module):
    """A Runge-Kutta net whose phases are its layers, the last with the readout's."""

    def __init__(self, n=4, layers=3):
        super().__init__()
        self.net, self.readout = RungeKuttaNet.of_layers(n, layers, "kutta4"), nn.Linear(n, 3)

    def forward(self, x):
        return self.readout(self.net(x))

    def phases(self):
        def step(field):
            return lambda z: runge_kutta_step(field.at(), z, 1 / 3, self.net.tableau)

        return [*(step(field) for field in self.net.fields), self.readout]


def networks():
    torch.manual_seed(0)
    yield "mlp", nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    convolutions = (nn.Conv2d(1, 3, 2, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    yield "conv", nn.Sequential(nn.Unflatten(1, (1, 2, 2)), *convolutions, nn.Flatten(),
                                nn.Linear(3, 3))  # fmt: skip
    yield "residual", nn.Sequential(Residual(4), nn.Sequential(Residual(4), nn.Linear(4, 3)))
    net = RungeKuttaNet.of_layers(4, 5, "improved-euler", steps="simplex")
    yield "runge-kutta", nn.Sequential(net, nn.Linear(4, 3))
    yield "runge-kutta phases", Steps()
    yield "skip", Around(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3))
    bounded = bound_norm(nn.Linear(4, 4), max_norm=0.5)
    yield "parametrized", nn.Sequential(bounded, nn.Tanh(), nn.Linear(4, 3))


def equilibria():
    torch.manual_seed(0)
    deq = lambda block: DEQ(block, tol=1e-13)
    yield "deq", nn.Sequential(nn.Linear(4, 5), nn.Tanh(), deq(DenseBlock(5)), nn.Linear(5, 3))
    yield "deq first", nn.Sequential(deq(DenseBlock(5, 4)), nn.Linear(5, 3))
    yield (
        "two deqs",
        nn.Sequential(
            nn.Sequential(deq(DenseBlock(5, 4)), nn.Tanh()), deq(DenseBlock(5)), nn.Linear(5, 3)
        ),
    )
    yield "own block", nn.Sequential(nn.Linear(4, 3), deq(Cell()))


NETWORKS = {name: model.double() for name, model in networks()}
EQUILIBRIA = {name: model.double() for name, model in equilibria()}


def problem(model, batch=6):
    """A copy of a model, inputs and labels."""
    return copy.deepcopy(model), randn(batch, 4), torch.arange(batch) % 3


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def mean_square(rows):
    return rows.square().flatten(1).sum(1).mean()


# The trajectory


@pytest.mark.parametrize("name", NETWORKS)
def test_states_and_costates_are_those_of_autograd(name):
    model, x, y = problem(NETWORKS[name])
    way = Chain(model, x).trajectory(x, y, CROSS_ENTROPY)
    assert torch.allclose(way.outputs, model(x), atol=1e-14)
    assert torch.allclose(way.loss, nn.functional.cross_entropy(model(x), y))
    value = x.requires_grad_()
    kept = []
    for point in way.points:
        kept.append(value)
        value = point.link.value(value)
        if value.dim() == 2:
            value.retain_grad()
        assert torch.allclose(value, point.value, atol=1e-14)
    nn.functional.cross_entropy(value, y).backward()
    for point, entering, after in zip(way.points, kept, [*kept[1:], value], strict=True):
        assert torch.allclose(point.costate, -len(x) * entering.grad, atol=1e-13)
        assert torch.allclose(point.p, -len(x) * after.grad, atol=1e-13)
        assert torch.equal(point.costate, point.q)
    assert sum(len(point.link.parameters) for point in way.points) == len(list(model.parameters()))


@pytest.mark.parametrize("name", EQUILIBRIA)
def test_the_costate_of_a_fixed_point_is_the_dense_adjoint(name):
    model, x, y = problem(EQUILIBRIA[name])
    way = Chain(model, x).trajectory(x, y, CROSS_ENTROPY)
    following = -len(x) * torch.eye(3, dtype=x.dtype)[y]
    following = -following / len(x) - way.outputs.softmax(1)  # -grad of the sample's own loss
    for point in reversed(way.points):
        if not hasattr(point.link, "layer"):
            assert torch.allclose(point.p, following, atol=1e-11)
            following = point.costate
            continue
        block, n = point.link.layer.block, point.value.shape[1]
        z, inputs = point.state[:, :n], point.state[:, n:]
        assert torch.allclose(block(z, inputs), z, atol=1e-11)
        for s in range(len(x)):
            f = lambda z, v: block(z[None], v[None])[0]  # noqa: B023
            A, G = torch.func.jacrev(f, argnums=(0, 1))(z[s], inputs[s])
            lam = torch.linalg.solve(torch.eye(n, dtype=x.dtype) - A.mT, following[s])
            assert torch.allclose(point.p[s], lam, atol=1e-9)
            assert torch.allclose(point.q[s, :n], lam - following[s], atol=1e-9)
            assert torch.allclose(point.costate[s], G.mT @ lam, atol=1e-9)
        following = point.costate


# Proposition 2


@pytest.mark.parametrize("name", [*NETWORKS, *EQUILIBRIA])
@pytest.mark.parametrize("rho", [0.0, 2.0])
def test_one_gradient_step_is_gradient_descent_with_weight_decay(name, rho):
    tol = 1e-12 if name in NETWORKS else 1e-9
    model, x, y = problem((NETWORKS | EQUILIBRIA)[name])
    other = copy.deepcopy(model)
    msa = MSA(model, rho=rho, maximise="gradient", lr=0.3, weight_decay=0.1)
    sgd = torch.optim.SGD(other.parameters(), lr=0.3, weight_decay=0.1)
    before = parameters(model)
    for _ in range(2):
        loss, usual = msa.step(x, y), GradientStep(other, sgd, "cross_entropy").step(x, y)
        assert torch.allclose(loss, usual, atol=tol)
    assert float((parameters(model) - parameters(other)).abs().max()) <= tol
    assert float((parameters(model) - before).abs().max()) > 1e-3
    assert msa.last_step.accepted and msa.last_step.kept == ()


# Theorem 2


LAYERS, STEP, WIDTH = 3, 0.5, 3


def bounded_network(seed):
    """Layers x + h tanh(W x + b) with |W| <= 1, whatever the parameters: (A1) and (A2) hold."""
    torch.manual_seed(seed)
    return nn.Sequential(*(Residual(WIDTH, STEP, max_norm=1.0) for _ in range(LAYERS))).double()


def constant():
    """C of (MS6) from the network's Lipschitz constants, as derived in docs/maths.md."""
    slope, bend = 1 + STEP, 4 / 27**0.5 * STEP  # of g_n: |W| <= 1, |tanh''| <= 4 / 27^1/2
    gain = [sum(slope ** (2 * j) for j in range(n)) for n in range(LAYERS + 1)]
    costate = [2**0.5 * slope ** (LAYERS - n) for n in range(LAYERS + 1)]  # of cross-entropy
    inner = range(1, LAYERS)
    return max(
        0.5,
        sum(gain[n] / 2 for n in inner)
        + sum(costate[n + 1] * bend / 2 * gain[n] for n in inner)
        + 0.5 / 2 * gain[LAYERS],
    )


def full_batches(seed, rho, steps, max_iter=5, **options):
    """J before and after each full-batch step, and its report."""
    model = bounded_network(seed)
    x, y = 2 * randn(8, WIDTH, seed=seed), torch.arange(8) % 3
    msa, costs, reports = MSA(model, rho=rho, max_iter=max_iter, **options), [], []
    for _ in range(steps):
        msa.step(x, y)
        reports.append(msa.last_step)
        costs.append(msa.last_step.cost)
    loss = float(nn.functional.cross_entropy(model(x), y).detach())
    decay = msa.param_groups[0]["weight_decay"] / 2
    costs.append(loss + decay * float(parameters(model).square().sum()))
    return costs, reports


def test_above_the_bound_the_cost_falls_by_theorem_2_and_basic_msa_lets_it_rise():
    C = constant()
    assert 4 < C < 10
    rises = 0
    for seed in (2, 3):
        for rho, weight_decay in ((2 * C, 0.0), (5 * C, 0.02)):
            costs, reports = full_batches(seed, rho, 4, weight_decay=weight_decay)
            for before, after, report in zip(costs[:-1], costs[1:], reports, strict=True):
                assert report.rise > 0
                assert after - before <= -(1 - 2 * C / rho) * report.rise + 1e-14
            assert costs[-1] < costs[0]
        costs, _ = full_batches(seed, 0.0, 4)
        pairs = zip(costs[:-1], costs[1:], strict=True)
        rises += sum(after > before + 1e-3 for before, after in pairs)
    assert rises >= 2


@given(
    seed=st.integers(0, 10**6), rho=st.sampled_from([0.0, 0.1, 1.0, 10.0]), lr=st.floats(0.1, 1.0)
)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_lemma_1_holds_for_any_penalty(seed, rho, lr):
    costs, reports = full_batches(seed, rho, 1, lr=lr, weight_decay=0.01)
    for before, after, report in zip(costs[:-1], costs[1:], reports, strict=True):
        e = report.state_error + report.costate_error
        assert report.rise >= rho / 2 * e - 1e-15
        assert after <= before - report.rise + constant() * e + 1e-12


# The maximisation


def augmented(point, values, rho, weight_decay):
    """(MS4) of a layer from its formula, by autograd of the whole layer."""
    s = point.state.clone().requires_grad_()
    value = point.link.value(s, dict(zip(point.link.names, values, strict=True)))
    along = (point.p * value).sum(1)
    (pulled,) = torch.autograd.grad(along.sum(), s, create_graph=True)
    decay = sum(v.square().sum() for v in values)
    return (
        along.mean()
        - weight_decay / 2 * decay
        - rho / 2 * (mean_square(value - point.value) + mean_square(pulled - point.q))
    )


@pytest.mark.parametrize("name", ["mlp", "runge-kutta phases", "skip", "deq"])
def test_at_the_end_the_gradient_of_the_augmented_hamiltonian_is_zero(name):
    model, x, y = problem((NETWORKS | EQUILIBRIA)[name])
    points = Chain(model, x).trajectory(x, y, CROSS_ENTROPY).points
    old = [[p.detach().clone() for p in point.link.parameters] for point in points]
    msa = MSA(model, rho=2.0, weight_decay=0.1, max_iter=80)
    msa.step(x, y)
    rise, error = 0.0, 0.0
    for point, before in zip(points, old, strict=True):
        values = [p.detach().clone().requires_grad_() for p in point.link.parameters]
        at_end, at_start = (augmented(point, v, 2.0, 0.1) for v in (values, before))
        grads = torch.autograd.grad(at_end, values)
        start = [p.clone().requires_grad_() for p in before]
        first = torch.autograd.grad(augmented(point, start, 2.0, 0.1), start)
        size = lambda of: sum(float(g.square().sum()) for g in of) ** 0.5
        assert size(grads) < 1e-5 * max(size(first), 1e-3)
        assert at_end > at_start
        plain = augmented(point, values, 0.0, 0.1) - augmented(point, before, 0.0, 0.1)
        rise += float(plain.detach())
        given = dict(zip(point.link.names, values, strict=True))
        moved = point.link.value(point.state, given).detach() - point.value
        error += float(mean_square(moved))
    assert msa.last_step.rise == pytest.approx(rise, rel=1e-6)
    assert msa.last_step.state_error == pytest.approx(error, rel=1e-6)
    assert msa.last_step.costate_error > 0


def test_the_maximiser_of_a_linear_layer_solves_its_normal_equations():
    torch.manual_seed(0)
    x, y, rho = randn(7, 4), randn(7, 3, seed=1), 0.7
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    W = model[0].weight.detach().clone()
    P = -2 / 3 * (x @ W.mT - y)  # costates of the mean of squares over 3 outputs
    # H~ = <D, P'x> - rho/2 (|D x|^2 + |D'p|^2), mean over samples, D the change of W:
    #     rho (D X + Y D) = P'x / 7  with X = x'x / 7 and Y = P'P / 7.
    X, Y, right = x.mT @ x / 7, P.mT @ P / 7, P.mT @ x / 7
    eye = lambda n: torch.eye(n, dtype=x.dtype)
    system = rho * (torch.kron(eye(3), X) + torch.kron(Y, eye(4)))
    D = torch.linalg.solve(system, right.flatten()).view(3, 4)
    MSA(model, loss="mse", rho=rho, max_iter=100).step(x, y)
    assert torch.allclose(model[0].weight, W + D, atol=1e-8)
    # H has no maximum, and how far L-BFGS runs away depends on torch: so far that numbers overflow.
    msa = MSA(model, loss="mse", rho=0.0, lr=1e300)
    msa.step(x, y)
    assert msa.last_step.kept == (0,) and torch.allclose(model[0].weight, W + D, atol=1e-8)
    MSA(model, loss="mse", rho=0.0, max_iter=1).step(x, y)
    assert float(model[0].weight.detach().abs().max()) > 1e3


def test_a_smaller_step_length_goes_a_share_of_the_way():
    whole, x, y = problem(NETWORKS["mlp"])
    half, start = copy.deepcopy(whole), parameters(whole)
    MSA(whole, lr=1.0).step(x, y)
    MSA(half, lr=0.25).step(x, y)
    assert torch.allclose(parameters(half) - start, (parameters(whole) - start) / 4, atol=1e-14)


def backwards(chain, *batch, usual=Chain.trajectory):
    way = usual(chain, *batch)
    return replace(way, points=list(reversed(way.points)))


def test_the_order_of_the_layers_and_the_size_of_the_batch_do_not_matter(monkeypatch):
    steps = []
    for case in ("usual", "reversed", "doubled"):
        model, x, y = problem(EQUILIBRIA["deq"])
        if case == "doubled":
            x, y = torch.cat([x, x]), torch.cat([y, y])
        if case == "reversed":
            monkeypatch.setattr(Chain, "trajectory", backwards)
        MSA(model, rho=0.5, max_iter=4).step(x, y)
        monkeypatch.undo()
        steps.append(parameters(model))
    assert torch.equal(steps[0], steps[1])
    assert torch.allclose(steps[0], steps[2], atol=1e-8)


def test_penalties_keep_the_old_trajectory_close():
    errors = []
    for rho in (0.1, 1.0, 10.0):
        model, x, y = problem(EQUILIBRIA["deq"])
        msa = MSA(model, rho=rho)
        msa.step(x, y)
        errors.append(msa.last_step.state_error + msa.last_step.costate_error)
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


# Training


@pytest.mark.parametrize("name", ["mlp", "conv", "deq"])
def test_adaptive_msa_never_lets_the_cost_rise_and_trains(name):
    model, x, y = problem((NETWORKS | EQUILIBRIA)[name])
    msa = MSA(model, rho=1e-3, adaptive=True, weight_decay=1e-3, max_iter=3)
    costs, rhos = [], [msa.current_rho]
    for _ in range(8):
        msa.step(x, y)
        step = msa.last_step
        costs.append(step.cost)
        rhos.append(msa.current_rho)
        if step.accepted:
            assert step.cost_after <= step.cost + 1e-12
        if step.rejections:
            assert rhos[-1] == pytest.approx(rhos[-2] * 4**step.rejections)
        else:
            assert rhos[-1] == pytest.approx(rhos[-2] / 4**0.25)
    assert costs[-1] < 0.7 * costs[0]
    assert all(b <= a + 1e-12 for a, b in zip(costs, costs[1:], strict=False))
    assert msa.counts["steps"] == 8 and msa.counts["rejected"] > 0


def test_a_step_that_is_given_up_leaves_the_parameters():
    model, x, y = problem(NETWORKS["mlp"])
    msa = MSA(model, rho=1e-9, adaptive=True, max_rejections=0)
    before = parameters(model)
    msa.step(x, y)
    assert not msa.last_step.accepted and msa.counts["given up"] == 1
    assert torch.equal(parameters(model), before) and msa.current_rho == pytest.approx(4e-9)
    assert msa.last_step.cost_after != msa.last_step.cost_after


def test_a_step_that_loses_the_fixed_point_is_taken_back():
    torch.manual_seed(0)
    block = DenseBlock(5, 4, max_norm=None, gain=0.9)
    model = nn.Sequential(DEQ(block, tol=1e-8, max_steps=60), nn.Linear(5, 3)).double()
    x, y = 3 * randn(6, 4), torch.arange(6) % 3
    msa = MSA(model, rho=1e-4, adaptive=True, max_rejections=20)
    costs = [float(msa.step(x, y)) for _ in range(4)]
    assert msa.counts["rejected"] > 0 and costs[-1] < costs[0]
    assert bool(model[0].solution.converged.all())


def test_minibatches_of_a_deq_train_in_single_precision_under_a_guard():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), DEQ(DenseBlock(8)), nn.Linear(8, 3))
    x = randn(48, 4).float()
    y = (x[:, :3] + x[:, 1:]).argmax(1)
    guard = Guard(MSA(model, rho=1.0), every=2)
    batches = list(zip(x.split(16), y.split(16), strict=True))
    losses = [sum(float(guard.step(*batch)) for batch in batches) for _ in range(3)]
    assert losses[-1] < 0.8 * losses[0]


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit():
    model, x, y = problem(EQUILIBRIA["deq"])
    options = {"rho": 1e-2, "adaptive": True, "max_iter": 4, "lr": 0.9}
    msa = MSA(model, **options)
    for _ in range(3):
        msa.step(x, y)
    held = copy.deepcopy((model.state_dict(), msa.state_dict()))
    for _ in range(3):
        msa.step(x, y)
    other, _, _ = problem(EQUILIBRIA["deq"])
    again = MSA(other, **(options | {"rho": 5.0, "lr": 0.1}))
    other.load_state_dict(held[0])
    again.load_state_dict(held[1])
    for _ in range(3):
        again.step(x, y)
    assert torch.equal(parameters(model), parameters(other))
    assert again.counts == msa.counts and again.current_rho == msa.current_rho
    assert again.last_step == msa.last_step


def test_frozen_parameters_stay_and_freed_ones_move():
    model, x, y = problem(NETWORKS["mlp"])
    model[0].requires_grad_(False)
    msa = MSA(model)
    frozen, before = model[0].weight.clone(), model[2].weight.detach().clone()
    msa.step(x, y)
    assert torch.equal(model[0].weight, frozen) and not torch.equal(model[2].weight, before)
    model[0].requires_grad_(True)
    msa.step(x, y)
    assert not torch.equal(model[0].weight, frozen)


def test_gradients_and_mode_of_the_model_are_left_alone():
    model, x, y = problem(NETWORKS["mlp"])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with torch.no_grad():
        MSA(model).step(x, y)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert model.training


# What fails


class Wild(nn.Module):
    """Not finite anywhere but at the initial parameters."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x):
        off = (self.weight - 1).abs().sum()
        return x * self.weight + torch.where(off > 0, torch.nan, 0.0)


class Singular(nn.Module):
    """Raises anywhere but at the initial parameters."""

    def __init__(self, error):
        super().__init__()
        self.weight, self.error = nn.Parameter(torch.ones(3, dtype=torch.float64)), error

    def forward(self, x):
        if not torch.equal(self.weight.detach(), torch.ones_like(self.weight)):
            raise self.error
        return x * self.weight


@pytest.mark.parametrize("layer", [Wild(), Singular(torch.linalg.LinAlgError("singular"))])
@pytest.mark.parametrize("maximise", ["lbfgs", "gradient"])
def test_a_layer_whose_maximisation_fails_keeps_its_parameters(layer, maximise):
    model = nn.Sequential(nn.Linear(4, 3).double(), copy.deepcopy(layer), Residual(3).double())
    _, x, y = problem(model)
    msa, before = MSA(model, maximise=maximise, lr=0.5), parameters(model)
    msa.step(x, y)
    assert msa.last_step.kept == (1,) and msa.counts["layers kept"] == 1
    changed = parameters(model) != before
    assert not changed[15:18].any() and changed[:15].all() and changed[18:].all()


def test_after_an_exception_the_parameters_are_as_before(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 3).double(), Singular(KeyError("mine")))
    _, x, y = problem(model)
    msa, before = MSA(model, adaptive=True), parameters(model)
    with pytest.raises(KeyError):
        msa.step(x, y)
    assert torch.equal(parameters(model), before)
    model, x, y = problem(NETWORKS["mlp"])
    msa, before = MSA(model, adaptive=True), parameters(model)
    monkeypatch.setattr("deqlqr.msa.Batch.loss_now", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        msa.step(x, y)
    assert torch.equal(parameters(model), before) and msa.counts["steps"] == 0


def test_no_fixed_point_and_no_finite_loss_are_errors_and_change_nothing():
    model = nn.Sequential(nn.Linear(4, 3), DEQ(Cell(scale=0.5), max_steps=30)).double()
    _, x, y = problem(model)
    msa = MSA(model)
    msa.step(x, y)
    with torch.no_grad():
        model[1].block.scale.fill_(50.0)
    before = parameters(model)
    with pytest.raises(ConvergenceError):
        msa.step(x, y)
    assert torch.equal(parameters(model), before)
    model, x, y = problem(NETWORKS["mlp"])
    msa = MSA(model)
    msa.step(x, y)
    with torch.no_grad():
        model[2].weight[0] = float("inf")
    with pytest.raises(ConvergenceError, match="the loss is"):
        msa.step(x, y)
    with pytest.raises(ConvergenceError, match="outputs are not finite"):
        MSA(model).step(x, y)


class Detached(nn.Sequential):
    """Phases that are another model's, in value or in derivative."""

    def __init__(self, how):
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 3))
        self.how = how

    def forward(self, x):
        return self[1](self[0](x))

    def phases(self):
        if self.how == "nothing":
            return []
        if self.how == "inputs":
            return [lambda z, x: z]
        if self.how == "tuple":
            return [self[0], lambda z: (self[1](z), z)]
        last = {
            "value": lambda z: self[1](z) + 1,
            "shape": lambda z: self[1](z)[:, :2],
            "gradient": lambda z: self[1](z.detach()),
            "integers": lambda z: self[1](z).long(),
        }[self.how]
        return [self[0], last]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.deq = DEQ(DenseBlock(4))

    def forward(self, x):
        return self.deq(x)


class Custom(nn.Sequential):
    def forward(self, x):
        return super().forward(2 * x)


SHARED = nn.Linear(4, 4)


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Sequential(SHARED, nn.Tanh(), SHARED, nn.Linear(4, 3)), "'0.weight' in its layers 0"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), "mixes the samples"),
        (nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.5), nn.Linear(9, 3)), "dropout"),
        (nn.Linear(4, 3), "model Linear has no layers"),
        (nn.Sequential(Twice(), nn.Linear(4, 3)), "one within Twice"),
        (Custom(DEQ(DenseBlock(4)), nn.Linear(4, 3)), "plain nn.Sequential if it has a DEQ"),
        (nn.Sequential(nn.Linear(4, 3), nn.Unflatten(1, (3, 1))), "must return .batch"),
        (Detached("nothing"), "phases must return a list"),
        (Detached("inputs"), "phase 0 of Detached must take one state"),
        (Detached("tuple"), "must end in a tensor, got tuple"),
        (Detached("value"), "must give its output; they differ by 1.0"),
        (Detached("shape"), "must end in its output"),
        (Detached("gradient"), "another derivative"),
        (Detached("integers"), "what the last phase of Detached returns must be a floating-point"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_models_that_are_no_chain_of_layers_are_refused(model, message):
    model, x, y = problem(model.double())
    before = parameters(model)
    with pytest.raises(ValueError, match=message):
        MSA(model).step(x, y)
    assert torch.equal(parameters(model), before)


def test_batch_normalisation_is_taken_in_evaluation_mode_and_its_statistics_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    _, x, y = problem(model)
    statistics = copy.deepcopy(model[1].running_mean)
    msa = MSA(model)
    with pytest.raises(ValueError, match="mixes"):
        msa.step(x, y)
    assert torch.equal(model[1].running_mean, statistics)
    model.eval()
    msa.step(x[:1], y[:1])
    assert msa.step(x, y) > msa.step(x, y)
    model.train()
    with pytest.raises(ValueError, match="mixes"):
        msa.step(x, y)


def test_a_layer_without_parameters_and_one_that_ignores_its_state_are_taken():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def forward(self, x):
            return self.value.expand(len(x), 3)

    model = nn.Sequential(nn.Linear(4, 3).double(), Constant())
    _, x, y = problem(model)
    msa, held = MSA(model, rho=0.1), copy.deepcopy(model[0].weight)
    msa.step(x, torch.zeros_like(y))
    assert torch.equal(model[0].weight, held) and msa.last_step.kept == (0,)
    assert float(model[1].value.detach()[0]) > 0.1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss": "huber"}, "loss must be"),
        ({"rho": -1.0}, "rho must be"),
        ({"adaptive": True, "rho": 0.0}, "adaptive needs rho above 0"),
        ({"adaptive": True, "maximise": "gradient"}, "adaptive needs .*'gradient'"),
        ({"maximise": "newton"}, "maximise must be one of"),
        ({"lr": 0.0}, "lr must be"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"max_iter": 0}, "max_iter must be"),
        ({"history_size": 0}, "history_size must be"),
        ({"increase": 1.0}, "increase must be"),
        ({"max_rejections": -1}, "max_rejections must be"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MSA(nn.Sequential(nn.Linear(2, 2)), **options)


def test_what_is_no_model_or_no_batch_is_refused():
    with pytest.raises(ValueError, match="model must be an nn.Module"):
        MSA("model")
    with pytest.raises(ValueError, match="no trainable parameters"):
        MSA(nn.Sequential(nn.Tanh()))
    model, x, y = problem(NETWORKS["mlp"])
    msa = MSA(model)
    for batch in ((), (x,), (lambda: 0.0,), ([1.0], y)):
        with pytest.raises(ValueError, match="step takes a batch of tensors"):
            msa.step(*batch)
    with pytest.raises(ValueError, match="x must be"):
        msa.step(x.float(), y)
    with pytest.raises(ValueError, match="y must have batch size"):
        msa.step(x, y[:-1])
    with pytest.raises(ValueError, match="one group"):
        msa.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with parametrize.cached(), pytest.raises(ValueError, match="cached"):
        msa.step(x, y)
    model.append(nn.Linear(3, 3).double())
    with pytest.raises(ValueError, match="a parameter that it had not"):
        msa.step(x, y)
