"""Tests for `solve_finite_lqr`: `finite_riccati.py` and `finite_stages.py`."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deqlqr import ConvergenceError, FiniteResult, InputCost, solve_dare, solve_finite_lqr

from .problems import DTYPES, TOL, generator, randn, relative

SIZES = {
    "square": ([3, 3, 3], [2, 2]),
    "more controls": ([2, 3, 2], [4, 7]),
    "one state": ([1, 1, 1], [1, 3]),
    "one control": ([3, 4, 2, 3], [1, 1, 1]),
    "none in one": ([3, 2, 4], [0, 5]),
    "none at all": ([3, 2], [0]),
    "one stage": ([1, 5], [9]),
    "growing": ([1, 2, 4, 8], [1, 6, 3]),
}
sizes = pytest.mark.parametrize("n, m", SIZES.values(), ids=SIZES)
forms = pytest.mark.parametrize("reduced", [False, True], ids=["dense", "InputCost"])
MATRICES = ("A", "B", "Q", "R", "M", "a", "b", "c")


def costs(n, m, batch, g):
    """Q, R, M of a stage, [Q M'; M R] positive definite."""
    C = torch.randn(*batch, n + m, n + m, generator=g, dtype=torch.float64)
    W = C @ C.mT / max(n + m, 1) + 0.1 * torch.eye(n + m, dtype=torch.float64)
    return W[..., :n, :n], W[..., n:, n:], W[..., n:, :n]


def make(n, m, batch=(), seed=0):
    """A problem with everything."""
    g = generator(seed)
    rand = lambda *s: torch.randn(*batch, *s, generator=g, dtype=torch.float64)
    Q, R, M = map(list, zip(*(costs(*k, batch, g) for k in zip(n, m, strict=False)), strict=True))
    Q.append(costs(n[-1], 0, batch, g)[0])
    return {
        "A": [rand(n[k + 1], n[k]) for k in range(len(m))],
        "B": [rand(n[k + 1], m[k]) for k in range(len(m))],
        "Q": Q, "R": R, "M": M,
        "a": [rand(size) for size in n],
        "b": [rand(size) for size in m],
        "c": [rand(size) for size in n[1:]],
        "x0": rand(n[0]),
    }  # fmt: skip


def of_form(problem, reduced):
    """R as `InputCost`, or as it is."""
    return problem | ({"R": [InputCost.of(R) for R in problem["R"]]} if reduced else {})


def changed(problem, **entries):
    """One matrix of each named kind replaced: `Q=(k, X)`."""
    new = dict(problem)
    for name, (k, X) in entries.items():
        new[name] = [X if i == k else Y for i, Y in enumerate(problem[name])]
    return new


def element(problem, *i):
    picked = {name: [X[i] for X in problem[name]] for name in MATRICES}
    return picked | {"x0": problem["x0"][i]}


def stacked(problem):
    """H, h of the cost v'Hv/2 + h'v and E, e of E v = e, for v = (x_0 ... x_N, u_0 ...)."""
    p = {k: v if k == "x0" else [X.numpy() for X in v] for k, v in problem.items()}
    n, N = sum(len(a) for a in p["a"]), len(p["A"])
    Q, R = (scipy.linalg.block_diag(*p[name]) for name in "QR")
    M = np.hstack([scipy.linalg.block_diag(*p["M"]), np.zeros((len(R), len(p["a"][-1])))])
    first = len(p["x0"])
    shifted = lambda Xs: np.vstack([np.zeros((first, sum(X.shape[1] for X in Xs))),
                                    scipy.linalg.block_diag(*Xs)])  # fmt: skip
    along = np.hstack([shifted(p["A"]), np.zeros((n, len(p["a"][-1])))]) - np.eye(n)
    H = np.block([[Q, M.T], [M, R]])
    h = np.concatenate([*p["a"], *p["b"]])
    E = np.hstack([along, shifted(p["B"])])
    e = -np.concatenate([p["x0"].numpy(), *p["c"]])
    ends = np.cumsum([len(v) for v in (*p["a"], *p["b"])])[:-1]
    return H, h, E, e, lambda v: (np.split(v, ends)[: N + 1], np.split(v, ends)[N + 1 :])


def kkt(problem):
    """x, u and the cost from the dense optimality system."""
    H, h, E, e, parts = stacked(problem)
    system = np.block([[H, E.T], [E, np.zeros((len(E), len(E)))]])
    v = np.linalg.solve(system, np.concatenate([-h, e]))[: len(h)]
    return *parts(v), v @ H @ v / 2 + h @ v


def gap(found, expected):
    """Largest error of a tuple of vectors."""
    return max(
        float((a - torch.as_tensor(b)).abs().max()) if a.numel() else 0.0
        for a, b in zip(found, expected, strict=True)
    )


def cost_of(problem, u, x0=None):
    """The cost of controls, from the definition."""
    x, total = problem["x0"] if x0 is None else x0, 0.0
    for k, u_k in enumerate(u):
        A, B, Q, R, M, a, b, c = (problem[name][k] for name in MATRICES)
        total = total + a @ x + b @ u_k + x @ Q @ x / 2 + u_k @ M @ x + u_k @ R @ u_k / 2
        x = A @ x + B @ u_k + c
    return total + problem["a"][-1] @ x + x @ problem["Q"][-1] @ x / 2


@sizes
@forms
@pytest.mark.parametrize("seed", range(2))
def test_the_optimum_is_that_of_the_dense_optimality_system(n, m, reduced, seed):
    problem = make(n, m, seed=seed)
    found = solve_finite_lqr(**of_form(problem, reduced))
    x, u, cost = kkt(problem)
    assert gap(found.x, x) < 1e-11 and gap(found.u, u) < 1e-11
    assert float(found.cost) == pytest.approx(cost, rel=1e-11)
    assert float(found.cost) == pytest.approx(float(cost_of(problem, found.u)), rel=1e-11)
    assert found.residual < 1e-12 and found.solved and found.result == FiniteResult.SOLVED
    assert [K.shape for K in found.K] == [M.shape for M in problem["M"]]


@sizes
@forms
def test_the_optimum_is_that_of_least_squares(n, m, reduced):
    """The cost is a sum of squares |F (u - target)|^2 / 2 in the controls alone."""
    problem = make(n, m)
    H, h, E, e, parts = stacked(problem)
    states = sum(n)
    along, drive = E[:, :states], E[:, states:]
    x_of_u, x_rest = np.linalg.solve(along, -drive), np.linalg.solve(along, e)
    basis = np.vstack([x_of_u, np.eye(sum(m))])
    root = np.linalg.cholesky(H).T
    target = -np.linalg.solve(root.T, h) - root @ np.concatenate([x_rest, np.zeros(sum(m))])
    u = scipy.linalg.lstsq(root @ basis, target)[0]
    found = solve_finite_lqr(**of_form(problem, reduced))
    expected = parts(np.concatenate([x_of_u @ u + x_rest, u]))
    assert gap(found.x, expected[0]) < 1e-10 and gap(found.u, expected[1]) < 1e-10


@st.composite
def problems(draw):
    N = draw(st.integers(1, 4))
    n = draw(st.lists(st.integers(1, 4), min_size=N + 1, max_size=N + 1))
    m = draw(st.lists(st.integers(0, 6), min_size=N, max_size=N))
    return make(n, m, seed=draw(st.integers(0, 2**20)))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(problems(), st.booleans())
def test_any_sizes_have_the_optimum_of_the_optimality_system(problem, reduced):
    found = solve_finite_lqr(**of_form(problem, reduced))
    x, u, cost = kkt(problem)
    scale = 1 + max(float(np.abs(part).max(initial=0.0)) for part in (*x, *u))
    assert gap(found.u, u) < 1e-9 * scale and gap(found.x, x) < 1e-9 * scale
    assert float(found.cost) == pytest.approx(cost, rel=1e-9, abs=1e-9)


@forms
@pytest.mark.parametrize("batch", [(3,), (2, 3), (0,), (2, 0)], ids=str)
def test_batch_dimensions(batch, reduced):
    problem = make([2, 3, 2], [4, 1], batch)
    found = solve_finite_lqr(**of_form(problem, reduced))
    assert found.cost.shape == found.residual.shape == found.result.shape == batch
    assert [u.shape for u in found.u] == [(*batch, 4), (*batch, 1)]
    assert [K.shape for K in found.K] == [(*batch, 4, 2), (*batch, 1, 3)]
    assert [P.shape for P in found.P] == [(*batch, k, k) for k in (2, 3, 2)]
    for i in np.ndindex(batch):
        alone = solve_finite_lqr(**element(problem, *i))
        for name in ("u", "x", "P", "lam", "feedforward", "K"):
            pairs = zip(getattr(found, name), getattr(alone, name), strict=True)
            assert max(float((a[i] - b).abs().max()) for a, b in pairs) < 1e-11
        assert float(found.cost[i]) == pytest.approx(float(alone.cost))


def test_what_is_left_out_is_zero():
    problem = make([2, 3, 2], [4, 1])
    kept = {name: problem[name] for name in "ABQR"}
    zeros = {name: [torch.zeros_like(X) for X in problem[name]] for name in ("M", "a", "b", "c")}
    found = solve_finite_lqr(**kept, x0=problem["x0"])
    expected = kkt(kept | zeros | {"x0": problem["x0"]})
    assert gap(found.u, expected[1]) < 1e-12
    at_rest = solve_finite_lqr(**kept)
    assert all(float(X.abs().max()) == 0 for X in (*at_rest.u, *at_rest.x)) and at_rest.cost == 0
    assert torch.equal(at_rest.P[0], found.P[0]) and at_rest.residual == 0


@forms
def test_the_cost_to_go_is_the_least_cost_from_another_state(reduced):
    problem = make([3, 2, 4], [2, 6])
    found = solve_finite_lqr(**of_form(problem, reduced))
    to_go = lambda x: x @ found.P[0] @ x / 2 + found.lam[0] @ x
    for seed in (1, 2):
        x0 = randn(3, seed=seed)
        other = solve_finite_lqr(**(of_form(problem, reduced) | {"x0": x0}))
        rise = to_go(x0) - to_go(problem["x0"])
        assert float(other.cost - found.cost) == pytest.approx(float(rise), rel=1e-10)
    # From stage 1 on, the rest of the problem is one of its own.
    rest = {name: problem[name][1:] for name in MATRICES} | {"x0": found.x[1]}
    later = solve_finite_lqr(**of_form(rest, reduced))
    assert relative(later.P[0], found.P[1]) < 1e-12 and relative(later.u[0], found.u[1]) < 1e-10
    assert torch.equal(found.lam[-1], problem["a"][-1])
    assert relative(found.P[-1], problem["Q"][-1]) < 1e-15


@sizes
@forms
def test_the_policy_is_optimal_from_any_state(n, m, reduced):
    problem = make(n, m)
    found = solve_finite_lqr(**of_form(problem, reduced))
    x0 = randn(n[0], seed=9)
    x, u = x0, []
    for k, (K, feedforward) in enumerate(zip(found.K, found.feedforward, strict=True)):
        u.append(-K @ x - feedforward)
        x = problem["A"][k] @ x + problem["B"][k] @ u[-1] + problem["c"][k]
    assert gap(u, kkt(problem | {"x0": x0})[1]) < 1e-10


@pytest.mark.parametrize("n", [2, 8], ids=["more controls", "more states"])
@pytest.mark.parametrize("coupled", [[], [1, 4], [0, 1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("batch", [(), (3,)], ids=["one", "batch"])
def test_an_input_cost_is_the_matrix_that_it_stands_for(n, coupled, batch):
    problem, index = make([n, n], [5], batch), torch.tensor(coupled, dtype=torch.int64)
    R = InputCost(
        randn(*batch, 5).abs() + 0.1, index, costs(0, len(coupled), batch, generator(1))[1]
    )
    dense = changed(problem, R=(0, R.dense() + 5 * torch.eye(5).double()))
    found = solve_finite_lqr(**changed(problem, R=(0, R.damped(5.0))))
    expected = solve_finite_lqr(**dense)
    for name in ("u", "x", "P", "lam", "K", "feedforward"):
        assert gap(getattr(found, name), getattr(expected, name)) < 1e-11
    assert found.residual.max() < 1e-12


def test_a_matrix_R_with_more_controls_than_states_may_be_indefinite_alone():
    """The other form would invert R; what counts is R + B'PB."""
    problem = make([2, 2], [3])
    R = torch.diag(torch.tensor([-0.05, 1.0, 1.0])).double()
    B = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]).double()
    convex = changed(problem, R=(0, R), B=(0, B), Q=(1, torch.eye(2).double()))
    convex = changed(convex, M=(0, torch.zeros(3, 2).double()))
    for reduced in (False, True):
        found = solve_finite_lqr(**of_form(convex, reduced))
        assert gap(found.u, kkt(convex)[1]) < 1e-11


@forms
@pytest.mark.parametrize("m", [1, 4], ids=["more states", "more controls"])
def test_an_indefinite_Q_with_a_minimum_is_solved(m, reduced):
    problem = make([3, 2, 2], [m, m])
    for k, size in ((1, 2), (2, 2)):
        problem = changed(problem, Q=(k, -0.02 * torch.eye(size).double()))
    for k in range(2):
        small = 0.1 * torch.ones(m, 1).double() * problem["M"][k]
        problem = changed(problem, R=(k, torch.eye(m).double()), M=(k, small))
    H, _, E, _, _ = stacked(problem)
    free = scipy.linalg.null_space(E)
    assert np.linalg.eigvalsh(H).min() < 0 < np.linalg.eigvalsh(free.T @ H @ free).min()
    found = solve_finite_lqr(**of_form(problem, reduced))
    assert torch.linalg.eigvalsh(found.P[1]).min() < 0
    x, u, cost = kkt(problem)
    assert gap(found.u, u) < 1e-11 and float(found.cost) == pytest.approx(cost)


FIELDS = ("u", "x", "P", "lam", "feedforward", "K")


def values(found, i):
    parts = [X[i].flatten() for name in FIELDS for X in getattr(found, name)]
    return torch.cat([*parts, found.cost[i, None], found.residual[i, None]])


@forms
@pytest.mark.parametrize("m", [2, 5], ids=["more states", "more controls"])
def test_one_element_without_a_minimum_leaves_the_others_as_they_are(m, reduced):
    good = make([3, 4, 3], [m, m], (3,))
    Q = good["Q"][2].clone()
    Q[1] = -100 * torch.eye(3)
    bad = changed(good, Q=(2, Q))
    found = solve_finite_lqr(**of_form(bad, reduced), throw=False)
    expected = solve_finite_lqr(**of_form(good, reduced))
    assert found.result.tolist() == [0, FiniteResult.INDEFINITE, 0]
    assert found.solved.tolist() == [True, False, True]
    assert values(found, 1).isnan().all()
    for i in (0, 2):
        assert torch.equal(values(found, i), values(expected, i))
    with pytest.raises(ConvergenceError, match=r"finite LQR: 1 of 3 .*elements 1\).*INDEFINITE"):
        solve_finite_lqr(**of_form(bad, reduced))


@pytest.mark.parametrize("sign", [1.0, -0.01], ids=["positive", "negative"])
def test_the_device_is_looked_at_as_often_for_any_number_of_stages(sign, monkeypatch):
    """P+ = -0.01 I somewhere makes every stage ask whether R + B'P+B is positive definite."""
    looks, usual = [], torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda t: looks.append(t) or usual(t))
    A, B, I = 0.5 * torch.eye(2).double(), randn(2, 5), torch.eye(2).double()
    R, counts = InputCost.of(torch.eye(5).double()), []
    for stages in (2, 9):
        looks.clear()
        Q = [*[I] * stages, sign * I]
        found = solve_finite_lqr([A] * stages, [B] * stages, Q, [R] * stages, throw=False)
        counts.append(len(looks))
        assert found.result == FiniteResult.SOLVED
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", [*MATRICES, "x0"])
@forms
def test_what_is_not_finite_is_named_and_kept_apart(name, reduced):
    problem = make([2, 3, 2], [4, 1], (2,))
    for number in (float("nan"), float("inf")):
        entry = (problem["x0"] if name == "x0" else problem[name][0]).clone()
        entry[1].view(-1)[-1] = number
        bad = problem | {"x0": entry} if name == "x0" else changed(problem, **{name: (0, entry)})
        found = solve_finite_lqr(**of_form(bad, reduced), throw=False)
        assert found.result.tolist() == [0, FiniteResult.NON_FINITE]
        assert values(found, 1).isnan().all()
        alone = solve_finite_lqr(**element(problem, 0))
        assert gap([u[0] for u in found.u], alone.u) < 1e-11


@forms
def test_a_recursion_that_overflows_is_not_called_indefinite(reduced):
    problem = make([2, 2, 2], [3, 3])
    problem["A"] = [1e160 * A for A in problem["A"]]
    with pytest.raises(ConvergenceError, match="NON_FINITE"):
        solve_finite_lqr(**of_form(problem, reduced))


@forms
def test_free_controls_with_an_effect_have_an_optimum_and_without_have_none(reduced):
    problem = make([4, 4, 4], [2, 2])
    O, none = torch.zeros(2, 2).double(), torch.zeros(2, 4).double()
    for k in range(2):
        problem = changed(problem, R=(k, O), M=(k, none))
    found = solve_finite_lqr(**of_form(problem, reduced))
    assert gap(found.u, kkt(problem)[1]) < 1e-10
    idle = changed(problem, B=(1, torch.zeros(4, 2).double()))
    assert solve_finite_lqr(**of_form(idle, reduced), throw=False).result == FiniteResult.INDEFINITE


@forms
def test_single_precision_comes_near(reduced):
    problem = make([3, 5, 3], [7, 2])
    narrow = {k: v.float() if k == "x0" else [X.float() for X in v] for k, v in problem.items()}
    found = solve_finite_lqr(**of_form(narrow, reduced))
    assert found.cost.dtype == found.P[0].dtype == found.K[0].dtype == torch.float32
    assert gap([u.double() for u in found.u], kkt(problem)[1]) < 1e-4 and found.residual < 1e-5


def test_the_residual_tells_of_controls_that_rounding_has_spoiled():
    """Nearly free controls: what moves the state is then the difference of large numbers."""
    problem = make([2, 2, 2], [3, 3])
    for k in range(2):
        tiny = 1e-15 * torch.eye(3).double()
        problem = changed(problem, R=(k, tiny), M=(k, torch.zeros(3, 2).double()))
    found = solve_finite_lqr(**of_form(problem, True))
    ends = [
        found.x[k + 1] - problem["A"][k] @ x - problem["B"][k] @ found.u[k] - problem["c"][k]
        for k, x in enumerate(found.x[:-1])
    ]
    assert found.residual > 1e-3 * max(float(end.norm()) for end in ends) > 1e-6


@forms
@pytest.mark.parametrize("m", [2, 6], ids=["more states", "more controls"])
def test_a_long_horizon_leads_to_the_stabilising_solution(m, reduced):
    A, B = randn(4, 4), randn(4, m, seed=1)
    Q, R, M = costs(4, m, (), generator(2))
    N = 100
    R_k = InputCost.of(R) if reduced else R
    found = solve_finite_lqr([A] * N, [B] * N, [Q] * (N + 1), [R_k] * N, [M] * N, x0=randn(4))
    dare = solve_dare(A, B, Q, R, M)
    assert relative(found.P[0], dare.P) < 1e-10 and relative(found.K[0], dare.K) < 1e-9
    assert found.x[-1].norm() < 1e-3 * found.x[0].norm() and found.residual < 1e-12
    # The same numbers in tensors of their own.
    copies = solve_finite_lqr(
        [A.clone() for _ in range(N)], [B] * N, [Q] * (N + 1), [R_k] * N, [M] * N, x0=randn(4)
    )
    assert torch.equal(copies.P[0], found.P[0]) and torch.equal(copies.u[0], found.u[0])


def symmetric(X):
    return (X + X.mT) / 2


def function_of(name, reduced, sizes=((2, 1), (2,))):
    """u, x, P, K and the cost as a function of one argument's first entry; the entry."""
    problem = make(*sizes)

    def function(X):
        new = problem | {"x0": X} if name == "x0" else changed(problem, **{name: (0, X)})
        new["Q"], new["R"] = ([symmetric(Y) for Y in new[key]] for key in "QR")
        found = solve_finite_lqr(**of_form(new, reduced), throw=False)
        return *found.u, *found.x[1:], found.P[0], found.K[0], found.feedforward[0], found.cost

    return function, problem["x0"] if name == "x0" else problem[name][0]


@forms
@pytest.mark.parametrize("name", [*MATRICES, "x0"])
def test_derivatives_of_every_order(name, reduced):
    function, X = function_of(name, reduced)
    X = X.clone().requires_grad_()
    assert torch.autograd.gradcheck(function, (X,))
    last = lambda Y: (function(Y)[0], function(Y)[-1])
    assert torch.autograd.gradgradcheck(last, (X,))


@forms
def test_the_gradient_of_the_cost_in_the_first_state_is_the_costate(reduced):
    problem = make([3, 2, 4], [2, 6])
    x0 = problem["x0"].requires_grad_()
    found = solve_finite_lqr(**of_form(problem, reduced))
    (gradient,) = torch.autograd.grad(found.cost, x0)
    assert relative(gradient, found.P[0] @ x0 + found.lam[0]) < 1e-12


@forms
def test_an_element_that_failed_gives_no_gradient_to_the_others(reduced):
    problem = make([2, 3, 2], [4, 5], (3,))
    Q = problem["Q"][2].clone()
    Q[1] = -100 * torch.eye(2)
    A = problem["A"][0].requires_grad_()
    found = solve_finite_lqr(**of_form(changed(problem, Q=(2, Q)), reduced), throw=False)
    (gradient,) = torch.autograd.grad(found.cost[found.solved].sum(), A)
    for i in (0, 2):
        alone = solve_finite_lqr(**element(problem, i))
        (own,) = torch.autograd.grad(alone.cost, A)
        assert relative(gradient[i], own[i]) < 1e-10


@forms
@pytest.mark.parametrize("name", ["A", "R", "x0"])
def test_the_transforms_of_torch_func_agree(name, reduced):
    function, X = function_of(name, reduced, ([2, 2, 2], [3, 1]))
    cost = lambda Y: function(Y)[-1]
    leaf = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(cost(leaf), leaf)
    assert relative(torch.func.grad(cost)(X), expected) < 1e-12
    v = randn(*X.shape, seed=3)
    value, tangent = torch.func.jvp(cost, (X,), (v,))
    assert float(tangent) == pytest.approx(float((expected * v).sum()), rel=1e-10)
    pulled = torch.func.vjp(cost, X)[1](torch.ones_like(value))[0]
    assert relative(pulled, expected) < 1e-12
    hessian = torch.func.hessian(cost)(X).reshape(X.numel(), -1)
    by_autograd = torch.autograd.functional.hessian(cost, X).reshape(X.numel(), -1)
    assert relative(hessian, by_autograd) < 1e-10 and relative(hessian, hessian.mT) < 1e-10


@pytest.mark.parametrize("name", ["A", "Q", "R", "x0"])
def test_vmap_is_a_batch(name):
    function, X = function_of(name, False, ([2, 2, 2], [3, 1]))
    shifted = torch.stack([X * s for s in (0.9, 1.0, 1.2)])
    mapped = torch.vmap(function)(shifted)
    for i, Y in enumerate(shifted):
        assert gap([part[i] for part in mapped], function(Y)) < 1e-12
    gradients = torch.vmap(torch.func.grad(lambda Y: function(Y)[-1]))(shifted)
    for i, Y in enumerate(shifted):
        assert relative(gradients[i], torch.func.grad(lambda Y: function(Y)[-1])(Y)) < 1e-12


I = torch.eye(2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"A": []}, "A must hold at least 1, one for each stage, got 0"),
        ({"A": I}, "A must be a sequence, one for each stage, got Tensor"),
        ({"A": 3}, "A must be a sequence, one for each stage, got int"),
        ({"M": I}, "M must be a sequence"),
        ({"B": [I]}, "B must hold 2, one for each stage, got 1"),
        ({"R": [I] * 3}, "R must hold 2"),
        ({"Q": [I] * 2}, "Q must hold 3, one for each stage, and one for the last state, got 2"),
        ({"a": [I[0]] * 2}, "a must hold 3, one for each stage, and one for the last state"),
        ({"A": [I, 3.0]}, r"A\[1\] must be a tensor \(\*batch, rows, columns\), got float"),
        ({"B": [I, I[0]]}, r"B\[1\] must be a tensor \(\*batch, rows, columns\), got \(2,\)"),
        ({"A": [I.int()] * 2}, r"A\[0\] must be float32 or float64, got torch.int32"),
        ({"A": [I, I.double()]}, r"A\[1\] must be torch.float32 on cpu like A\[0\]"),
        ({"A": [I[None]] * 2}, r"B\[0\] must have shape \(1, 2, 2\), got \(2, 2\)"),
        ({"A": [torch.zeros(2, 3), I]}, r"Q\[0\] must have shape \(3, 3\), got \(2, 2\)"),
        ({"B": [I, I[:, :1]]}, r"R\[1\] must have shape \(1, 1\), got \(2, 2\)"),
        ({"R": [I, 3.0]}, r"R\[1\] must have shape \(2, 2\), got float"),
        ({"R": [I, InputCost.of(torch.eye(3))]}, r"R\[1\] must have shape \(2, 2\), got \(3, 3\)"),
        ({"R": [I, InputCost.of(I.double())]}, r"R\[1\] must be torch.float32.*got torch.float64"),
        ({"Q": [InputCost.of(I)] * 3}, r"Q\[0\] must have shape \(2, 2\), got InputCost"),
        ({"M": [None, I]}, r"M\[0\] must have shape \(2, 2\), got NoneType"),
        ({"a": [I[0], I[0], I]}, r"a\[2\] must have shape \(2,\), got \(2, 2\)"),
        ({"b": [I, I]}, r"b\[0\] must have shape \(2,\)"),
        ({"c": [I[0], I[0, :1]]}, r"c\[1\] must have shape \(2,\)"),
        ({"x0": I}, r"x0 must have shape \(2,\), got \(2, 2\)"),
        ({"x0": 3.0}, r"x0 must have shape \(2,\), got float"),
        ({"x0": I[0].double()}, "x0 must be torch.float32 on cpu"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    given = {"A": [I] * 2, "B": [I] * 2, "Q": [I] * 3, "R": [I] * 2}
    assert solve_finite_lqr(**given).solved
    with pytest.raises(ValueError, match=message):
        solve_finite_lqr(**given | changes)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@forms
def test_the_gpu_agrees_with_the_optimality_system(dtype, reduced):
    problem = make([6, 5, 6], [4, 9])
    to = lambda X: X.to("cuda", dtype)
    moved = {k: to(v) if k == "x0" else [to(X) for X in v] for k, v in problem.items()}
    found = solve_finite_lqr(**of_form(moved, reduced))
    assert found.u[0].is_cuda and found.cost.dtype == dtype
    for u, expected in zip(found.u, kkt(problem)[1], strict=True):
        torch.testing.assert_close(u.double().cpu(), torch.as_tensor(expected), **TOL[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_controls_without_a_curved_cost_are_the_gradient(dtype):
    n, m = 40, 60
    A, B = (randn(n, k, seed=k).to(dtype) for k in (n, m))
    ones, none = torch.ones(m, dtype=dtype), torch.arange(0)
    R = InputCost(ones, none, ones.new_zeros(0, 0))
    zero, a = torch.zeros(n, n, dtype=dtype), randn(n).to(dtype)
    found = solve_finite_lqr([A] * 3, [B] * 3, [zero] * 4, [R] * 3, a=[a * 0] * 3 + [a])
    assert found.solved.all() and all(bool((P == 0).all()) for P in found.P)
    for k, u in enumerate(reversed(found.u)):
        assert relative(u, -B.mT @ torch.linalg.matrix_power(A.mT, k) @ a) < TOL[dtype]["rtol"]
