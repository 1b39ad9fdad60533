"""Tests for `deqlqr/linearize_phases.py`, `cyclic_lqr.py` and `cyclic_steady_state.py`."""

import numpy as np
import pytest
import torch
from scipy.linalg import block_diag
from torch import nn

from deqlqr import (
    DEQ,
    Controls,
    ConvergenceError,
    CyclicLQR,
    InputCost,
    cyclic_steady_state,
    linearize,
    solve_cyclic_dare,
    solve_dare,
    static_step,
    steady_state,
)
from deqlqr.phases import phases_of

from .problems import conv_model, dense_model, exact, randn, relative
from .test_cyclic_dare import make_cycle
from .test_phases import Halves, Plain, Residual, Twice, flat, frozen, layers

D = 0.1


class Skip(nn.Module):
    """The encoder feeds the readout too."""

    def __init__(self, block, n=4):
        super().__init__()
        self.enc, self.deq, self.head = nn.Linear(6, n), DEQ(block), nn.Linear(n, 3)

    def forward(self, x):
        h = self.enc(x)
        return self.head(self.deq(h) + h)


class Tupled(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
        self.deq = DEQ(Halves(*layers(5)), state_shape=((3,), (2,)))

    def forward(self, x):
        return self.head(torch.cat(self.deq(self.enc(x)), dim=-1))


def around(block):
    return nn.Sequential(nn.Linear(6, 4), DEQ(block), nn.Linear(4, 3))


def unbounded():
    model = conv_model()
    model[1].block.max_lipschitz = None
    with torch.no_grad():
        model[1].block.norm3.weight *= 0.3  # a contraction without the bound
    return model


def with_an_unused_parameter():
    model = around(Residual(*layers()))
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    return model


def without_its_encoder():
    model = around(frozen(Residual(*layers()), 2))
    model[0].requires_grad_(False)
    return model


MODELS = {
    "dense": dense_model,
    "conv": conv_model,
    "conv, no bound": unbounded,
    "plain": lambda: around(Plain(*layers())),
    "residual": lambda: around(Residual(*layers())),
    "shared weight": lambda: around(Twice()),
    "encoder to readout": lambda: Skip(Residual(*layers())),
    "both": lambda: Skip(Twice()),
    "frozen": without_its_encoder,
    "unused parameter": with_an_unused_parameter,
    "tuple": Tupled,
}
SHARED = {"shared weight", "encoder to readout", "both"}  # no cyclic Newton problem
COMPARED = ("A", "B", "Q", "R", "M", "a", "b")
models = pytest.mark.parametrize("name", MODELS)
minibatches = pytest.mark.parametrize("minibatch", ["exact", "per-sample"])


def problem(name, samples=3):
    torch.manual_seed(0)
    model = exact(MODELS[name]())
    shape = (1, 6, 6) if "conv" in name else (6,)
    return model, randn(samples, *shape, seed=5), torch.arange(samples) % 3


def both(name, **options):
    model, x, y = problem(name)
    if options.get("loss") == "mse":
        y = randn(3, 3, seed=9)
    return (linearize(model, x, y, cyclic=cyclic, **options) for cyclic in (False, True))


def largest_error(ours, exact):
    pairs = [(getattr(ours, name), getattr(exact, name)) for name in COMPARED]
    return max(float((a - b).norm() / (b.norm() or 1.0)) for a, b in pairs)


PAIRS = [(name, "categorical") for name in MODELS]
PAIRS += [(name, "newton") for name in MODELS if name not in SHARED]
PAIRS += [(name, kind) for name in ("conv", "residual") for kind in ("gaussian", "euclidean")]


@minibatches
@pytest.mark.parametrize("name, divergence", PAIRS)
def test_the_phases_compose_to_the_problem_of_the_model(name, minibatch, divergence):
    lqr, cyclic = both(name, divergence=divergence, minibatch=minibatch, damping=D)
    composed = cyclic.composed()
    assert composed.A.shape == lqr.A.shape and composed.m == lqr.m == sum(cyclic.m)
    assert largest_error(composed, lqr) < 1e-12


@minibatches
@pytest.mark.parametrize(
    "name, divergence",
    [*((name, "categorical") for name in MODELS), ("conv", "euclidean"), ("residual", "euclidean")],
)
def test_the_steady_state_is_the_step_of_the_model(name, minibatch, divergence):
    lqr, cyclic = both(name, divergence=divergence, minibatch=minibatch, damping=D)
    state = cyclic_steady_state(cyclic)
    assert relative(cyclic.join(state.u), static_step(lqr)) < 1e-8
    assert (state.residual < 1e-10).all()
    for u, x, lam, n, m in zip(state.u, state.x, state.lam, cyclic.n, cyclic.m, strict=True):
        assert x.shape == lam.shape == (*lqr.a.shape[:-1], n) and u.shape[-1] == m


@minibatches
@pytest.mark.parametrize("name", ["conv", "residual", "both"])
def test_the_first_phase_has_the_composed_P_and_step(name, minibatch):
    lqr, cyclic = both(name, minibatch=minibatch, damping=D)
    dare, composed = solve_cyclic_dare(*(getattr(cyclic, k) for k in "ABQRM")), cyclic.composed()
    whole = solve_dare(*(getattr(composed, k) for k in "ABQRM"))
    assert relative(dare.P[0], whole.P) < 1e-9  # (F5)
    joined = cyclic.join(cyclic_steady_state(cyclic, dare).u)
    assert relative(joined, steady_state(composed, whole).u) < 1e-8
    assert relative(joined, steady_state(lqr).u) < 1e-8


@minibatches
def test_least_squares_have_the_same_phases(minibatch):
    lqr, cyclic = both("residual", loss="mse", minibatch=minibatch, damping=D)
    assert largest_error(cyclic.composed(), lqr) < 1e-12
    assert relative(cyclic.join(cyclic_steady_state(cyclic).u), static_step(lqr)) < 1e-8


@minibatches
@pytest.mark.parametrize("name", ["dense", "plain", "residual", "frozen", "tuple"])
def test_the_newton_step_is_that_of_the_model(name, minibatch):
    lqr, cyclic = both(name, divergence="newton", minibatch=minibatch, damping=5.0)
    state = cyclic_steady_state(cyclic)
    assert relative(cyclic.join(state.u), static_step(lqr)) < 1e-8
    assert (state.residual < 1e-10).all() and max(float(Q.norm()) for Q in cyclic.Q[1:]) > 0


@pytest.mark.parametrize(
    "name, message",
    [
        ("shared weight", r"1\.block\.a\.weight, 1\.block\.a\.bias, again in phase 3"),
        ("encoder to readout", r"\(enc\.weight, enc\.bias, again in phase 1\)"),
        ("both", r"enc\.weight, enc\.bias, again in phase \d.*route 'krylov'"),
    ],
)
def test_newton_names_a_parameter_that_acts_in_several_phases(name, message):
    with pytest.raises(ValueError, match=message):
        list(both(name, divergence="newton"))


def test_costs_but_newtons_are_read_where_the_output_is():
    _, cyclic = both("residual", minibatch="per-sample")
    assert cyclic.p == 4 and cyclic.n == (4, 4, 11, 7)
    assert torch.equal(cyclic.A[0], torch.eye(4).double().expand(3, 4, 4))
    assert float(cyclic.B[0].norm()) == 0
    for k in range(1, 4):
        parts = (cyclic.Q[k], cyclic.R[k], cyclic.M[k], cyclic.a[k], cyclic.b[k])
        assert all(float(X.norm()) == 0 for X in parts)


def chain(model, x, states=None):
    """What enters each phase of a model's block, flat, and what leaves the last."""
    z = model[:2](x).detach() if states is None else states[0]
    h, values = model[0](x), [flat(z)]
    for k, phase in enumerate(phases_of(model[1].block, z, (h,), {}).phases(h)):
        entering = values[-1] if states is None else states[k]
        if k > 0:
            entering = tuple(entering.split([4, entering.shape[1] - 4], dim=1))
        values.append(flat(phase(entering)))
    return [value.detach() for value in values]


def test_the_matrices_are_the_difference_quotients_of_the_layers():
    model, x, y = problem("residual")
    lqr = linearize(model, x, y, cyclic=True, minibatch="per-sample")
    states, controls, eps = chain(model, x)[:-1], Controls(model), 1e-6
    for k, state in enumerate(states, 1):
        for j in range(state.shape[1]):
            ends = []
            for sign in (eps, -eps):
                moved = [s.clone() for s in states]
                moved[k - 1][:, j] += sign
                ends.append(chain(model, x, moved)[k])
            quotient = (ends[0] - ends[1]) / (2 * eps)
            torch.testing.assert_close(lqr.A[k][..., j], quotient, rtol=1e-7, atol=1e-8)
    u, numbers = controls.vector, [index.tolist() for index in lqr.controls]
    for i in range(controls.m):
        ends = []
        for sign in (eps, -eps):
            controls.assign(u + sign * torch.eye(controls.m).double()[i])
            ends.append(chain(model, x, states)[1:])
        for k, (up, down) in enumerate(zip(*ends, strict=True), 1):
            quotient = (up - down) / (2 * eps)
            own = numbers[k].index(i) if i in numbers[k] else None
            expected = torch.zeros_like(quotient) if own is None else lqr.B[k][..., own]
            torch.testing.assert_close(quotient, expected, rtol=1e-7, atol=1e-8)


@models
def test_join_and_split_are_inverse_and_every_control_is_in_one_phase(name):
    _, cyclic = both(name)
    m = sum(cyclic.m)
    assert torch.equal(torch.cat(list(cyclic.controls)).sort().values, torch.arange(m))
    for u in (randn(m), randn(2, m)):
        parts = cyclic.split(u)
        assert [part.shape[-1] for part in parts] == list(cyclic.m)
        assert torch.equal(cyclic.join(parts), u)


def test_an_encoder_belongs_to_the_layer_into_which_it_feeds():
    model, x, y = problem("residual")
    lqr, names = linearize(model, x, y, cyclic=True), Controls(model).names
    sizes = Controls(model).sizes
    of = torch.repeat_interleave(torch.arange(len(names)), torch.tensor(sizes))
    phases = [{names[i].rsplit(".", 1)[0] for i in of[index]} for index in lqr.controls]
    assert phases == [{"2"}, {"0", "1.block.0"}, {"1.block.2"}, {"1.block.4"}]


def test_frozen_parameters_are_no_controls_and_an_unused_one_is_left_where_it_is():
    (lqr, frozen), (_, unused) = both("frozen", damping=D), both("unused parameter", damping=D)
    assert lqr.m == 66 and frozen.m == (15, 35, 16)  # readout, first and last layer
    u = cyclic_steady_state(unused).u
    first = Controls(problem("unused parameter")[0]).unflatten(unused.join(u))
    assert float(first["unused"].norm()) == 0


def test_damping_has_a_number_or_a_vector_for_each_phase():
    _, cyclic = both("residual")
    shift = torch.cat([torch.full((m,), 0.1 * (k + 1)) for k, m in enumerate(cyclic.m)]).double()
    vectors = shift.split(cyclic.m)
    numbers = [0.1, 0.2, 0.30000000000000004, 0.4]
    expected = cyclic.composed().damped(cyclic.join(vectors))
    for damping in (numbers, vectors):
        damped = cyclic.damped(damping)
        assert relative(damped.composed().R, expected.R) < 1e-7
        step = cyclic.join(cyclic_steady_state(damped).u)
        assert relative(step, static_step(expected)) < 1e-6
    with pytest.raises(ValueError, match="delta must have 4 phases like A, got 2"):
        cyclic.damped([0.1, 0.2])


def random_problem(n, m, batch=(), seed=0):
    """Costs, linear terms and all, in every phase."""
    A, B, Q, R, M = make_cycle(n, m, batch, seed=seed)
    a = [randn(*batch, size, seed=seed + 10 * k) for k, size in enumerate(n)]
    b = [randn(*batch, size, seed=seed + 10 * k + 5) for k, size in enumerate(m)]
    return CyclicLQR(A, B, Q, R, M, a, b)


def kkt(lqr):
    """u of all phases from the dense optimality system of one steady round."""
    turn = lambda Xs: np.roll(block_diag(*(X.numpy() for X in Xs)), lqr.n[0], axis=0)
    costs = [block_diag(*(X.numpy() for X in Xs)) for Xs in (lqr.Q, lqr.M, lqr.R)]
    Q, M, R = costs
    E = np.hstack([turn(lqr.A) - np.eye(len(Q)), turn(lqr.B)])
    H = np.block([[Q, M.T], [M, R]])
    c = np.concatenate([X.numpy() for X in (*lqr.a, *lqr.b)])
    system = np.block([[H, E.T], [E, np.zeros((len(E), len(E)))]])
    solution = np.linalg.solve(system, np.concatenate([-c, np.zeros(len(E))]))
    return torch.as_tensor(solution[len(Q) : len(H)]), torch.as_tensor(solution[: len(Q)])


SIZES = {
    "p=1": ([3], [2]),
    "p=2": ([2, 4], [3, 1]),
    "p=3, controls in one phase": ([3, 1, 2], [0, 2, 0]),
    "p=3": ([2, 3, 2], [5, 0, 7]),
    "p=6": ([4, 2, 5, 1, 3, 3], [1, 0, 2, 3, 0, 1]),
}
sizes = pytest.mark.parametrize("n, m", SIZES.values(), ids=SIZES)


@sizes
@pytest.mark.parametrize("seed", range(3))
def test_costs_in_every_phase_have_the_steady_state_of_the_optimality_system(n, m, seed):
    lqr = random_problem(n, m, seed=seed)
    state, (u, x) = cyclic_steady_state(lqr), kkt(lqr)
    assert relative(lqr.join(state.u), u) < 1e-8 and relative(torch.cat(state.x), x) < 1e-8
    assert state.residual < 1e-10
    assert relative(static_step(lqr.composed()), u) < 1e-8
    assert relative(steady_state(lqr.composed()).u, u) < 1e-8
    assert lqr.n == tuple(n) and lqr.m == tuple(m) and lqr.p == len(n)


@sizes
def test_a_batch_of_cycles_equals_its_elements(n, m):
    lqr = random_problem(n, m, (3,))
    state, composed = cyclic_steady_state(lqr), lqr.composed()
    assert relative(static_step(composed), lqr.join(state.u)) < 1e-8
    for i in range(3):
        alone = CyclicLQR(*([X[i] for X in getattr(lqr, name)] for name in COMPARED))
        assert relative(lqr.join(state.u)[i], lqr.join(cyclic_steady_state(alone).u)) < 1e-9
        assert largest_error(alone.composed(), composed_at(composed, i)) < 1e-12


def composed_at(lqr, i):
    return type(lqr)(*(getattr(lqr, name)[i] for name in COMPARED))


def test_an_input_cost_stands_in_for_its_matrix_and_single_precision_comes_near():
    lqr = random_problem([2, 3], [3, 2])
    sparse = CyclicLQR(lqr.A, lqr.B, lqr.Q, [InputCost.of(R) for R in lqr.R], lqr.M, lqr.a, lqr.b)
    u = lqr.join(cyclic_steady_state(lqr.damped(D)).u)
    assert relative(sparse.join(cyclic_steady_state(sparse.damped(D)).u), u) < 1e-12
    assert largest_error(sparse.composed(), lqr.composed()) < 1e-14
    assert largest_error(sparse.dense().composed(), lqr.composed()) < 1e-14
    narrow = cyclic_steady_state(sparse.damped(D).to(torch.float32))
    assert narrow.u[0].dtype == torch.float32 and narrow.residual < 1e-4
    assert relative(lqr.join(narrow.u).double(), u) < 1e-3


def test_a_cycle_without_a_stabilising_solution_is_a_convergence_error():
    A, B = torch.diag(torch.tensor([1.5, 0.5])).double(), torch.tensor([[0.0], [1.0]]).double()
    O, one, zero = torch.zeros(2, 2).double(), torch.eye(1).double(), torch.zeros(1, 2).double()
    a, b = torch.ones(2).double(), torch.ones(1).double()
    lqr = CyclicLQR(*([X, X] for X in (A, B, O, one, zero, a, b)))
    with pytest.raises(ConvergenceError, match="cyclic DARE"):
        cyclic_steady_state(lqr)


@pytest.mark.parametrize("n, m", [([2, 4], [3, 2]), ([2, 4, 1], [3, 1, 1]), ([3, 4], [3, 1])])
def test_a_dare_of_another_shape_is_refused(n, m):
    other = random_problem(n, m)
    dare = solve_cyclic_dare(*(getattr(other, name) for name in "ABQRM"))
    lqr = random_problem([2, 4], [3, 1])
    with pytest.raises(ValueError, match="dare must be of a problem with K"):
        cyclic_steady_state(lqr, dare)


def given(**changes):
    lqr = random_problem([2, 4], [3, 1])
    return {name: list(getattr(lqr, name)) for name in COMPARED} | changes


O = torch.zeros(2, 2).double()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"A": []}, "A must have at least one phase"),
        ({"A": O}, "A must be a sequence"),
        ({"a": [O[0]]}, "a must have 2 phases like A, got 1"),
        ({"Q": [O, O]}, r"Q\[1\] must have shape \(4, 4\).*got \(2, 2\)"),
        ({"M": [O, O]}, r"M\[0\] must have shape \(3, 2\)"),
        ({"b": [O[0], O[0, :1]]}, r"b\[0\] must have shape \(3,\)"),
        ({"a": [O, O]}, r"a\[0\] must have shape \(2,\)"),
        ({"b": [O[0, :1].expand(3).float(), O[0, :1]]}, r"b\[0\] must be torch.float64"),
        ({"A": [O[:1], O]}, r"[AB]\[\d\] must have shape"),
        ({"R": [O[0], O]}, r"R\[0\] must be a tensor"),
        ({"B": [3.0, O]}, r"B\[0\] must be a tensor"),
    ],
)
def test_shapes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        CyclicLQR(**given(**changes))
