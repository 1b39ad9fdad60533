"""Tests for `deqlqr/sweeps.py` and `deqlqr/input_map.py`."""

import pytest
import torch

from deqlqr import (
    CategoricalKL,
    CyclicLQR,
    InputCost,
    LayerDamping,
    NeumannInverse,
    cyclic_steady_state,
)
from deqlqr.input_map import StoredMap
from deqlqr.layer_inverse import ExactInverse, Phase, System, make_inverse
from deqlqr.linearize_phases import linearize_phases
from deqlqr.loss import make_loss
from deqlqr.sweeps import as_phases, sweep_chain, sweep_cycle

from .problems import make_lqr, randn, relative
from .test_linearize_phases import COMPARED, kkt, problem, random_problem

TERMS = 20
NEUMANN = NeumannInverse(TERMS)
DOUBLE = LayerDamping(margin=2.0)
SIZES = {
    "p=1": ([4], [3]),
    "p=3": ([4, 5, 3], [4, 3, 6]),
    "p=4, no controls in two": ([3, 2, 4, 3], [0, 4, 0, 2]),
}
sizes = pytest.mark.parametrize("n, m", SIZES.values(), ids=SIZES)
batches = pytest.mark.parametrize("batch", [(), (3,)], ids=["one", "batch"])
minibatches = pytest.mark.parametrize("minibatch", ["exact", "per-sample"])


def stable(n, m, batch=(), seed=0):
    """Contractions, as a block is: for an unstable A a damping that grows with P has no limit."""
    lqr = random_problem(n, m, batch, seed)
    for A in lqr.A:
        A.mul_(0.9 / torch.linalg.matrix_norm(A, 2)[..., None, None])
    return lqr


def output_read_in_phase_0(n, m, batch=(), seed=0):
    """A problem like a model's: costs in phase 0, where the controls move no state."""
    lqr = stable(n, m, batch, seed)
    for k in range(lqr.p):
        for X in (lqr.Q, lqr.R, lqr.M, lqr.a, lqr.b):
            X[k].mul_(float(k == 0))
    for X in (lqr.B,) if lqr.p > 1 else (lqr.R, lqr.M):
        X[0].zero_()
    return lqr


PROBLEMS = {"all costs": stable, "as of a model": output_read_in_phase_0}
problems = pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS)


def phases(lqr):
    rows = zip(lqr.A, lqr.B, lqr.Q, lqr.R, lqr.M, lqr.a, lqr.b, strict=True)
    return [Phase(A, StoredMap(B), Q, InputCost.of(R), M, a, b) for A, B, Q, R, M, a, b in rows]


def dampings(lqr, values=(0.1, 0.3, 0.2, 0.4)):
    like = lqr.A[0]
    return [like.new_full(like.shape[:-2], value) for value in values[: lqr.p]]


def after(P, k):
    return P[(k + 1) % len(P)]


def curvatures(lqr, P):
    """R + B'P+B of every phase."""
    return [R + B.mT @ after(P, k) @ B for k, (R, B) in enumerate(zip(lqr.R, lqr.B, strict=True))]


def top(C):
    return torch.linalg.eigvalsh(C)[..., -1] if C.shape[-1] else C.new_zeros(C.shape[:-2])


def ratios(swept, least):
    """delta / rho where the layer decides, not the least damping."""
    found = []
    for delta, rho, lowest in zip(swept.delta, swept.rho, least, strict=True):
        found.append((delta / rho)[(rho > 0) & (delta > lowest)])
    return torch.cat(found)


@sizes
@batches
@problems
def test_a_fixed_damping_gives_the_steady_state_by_doubling(n, m, batch, make):
    lqr = make(n, m, batch)
    values = [0.1, 0.3, 0.2, 0.4][: lqr.p]
    swept = sweep_cycle(phases(lqr), dampings(lqr))
    state = cyclic_steady_state(lqr.damped(values))
    assert relative(lqr.join(swept.u), lqr.join(state.u)) < 1e-10
    assert relative(torch.cat(swept.x, -1), torch.cat(state.x, -1)) < 1e-9
    assert relative(torch.cat(swept.lam, -1), torch.cat(state.lam, -1)) < 1e-9
    assert swept.converged.all() and (swept.residual < 1e-10).all()
    assert (swept.truncation == 0).all() and (swept.closed_loop_radius < 1).all()
    if not batch:
        assert relative(lqr.join(swept.u), kkt(lqr.damped(values))[0]) < 1e-8


@sizes
@batches
@problems
@pytest.mark.parametrize("inverse", ["exact", NEUMANN], ids=["exact", "neumann"])
def test_damping_by_layer_keeps_its_margin_and_its_problem_is_solved(n, m, batch, make, inverse):
    lqr = make(n, m, batch)
    least = dampings(lqr, (1e-3, 2e-3, 1e-3, 1e-3))
    swept = sweep_cycle(phases(lqr), least, inverse=inverse, adapt=DOUBLE)
    assert swept.converged.all()
    for delta, rho, lowest in zip(swept.delta, swept.rho, least, strict=True):
        assert (delta >= lowest).all() and (delta >= 2 * rho).all()
    assert (ratios(swept, least) < 2.02).all() and len(ratios(swept, least)) > 0
    wide = [delta[..., None].expand_as(b) for delta, b in zip(swept.delta, lqr.b, strict=True)]
    for i in range(batch[0] if batch else 1):
        one = at(lqr, i) if batch else lqr
        shifts = [delta[i] if batch else delta for delta in wide]
        u = lqr.join(swept.u)[i] if batch else lqr.join(swept.u)
        assert relative(u, one.join(cyclic_steady_state(one.damped(shifts)).u)) < 1e-5


def at(lqr, i):
    return CyclicLQR(*([X[i] for X in getattr(lqr, name)] for name in COMPARED))


@sizes
@problems
def test_the_bound_on_the_curvature_is_one_and_is_tight(n, m, make):
    lqr = make(n, m, (3,))
    swept = sweep_cycle(phases(lqr), dampings(lqr), adapt=DOUBLE)
    for k, (C, rho) in enumerate(zip(curvatures(lqr, swept.P), swept.rho, strict=True)):
        exact = top(C)
        assert (rho >= exact * (1 - 1e-12)).all()
        alone = float(lqr.R[k].norm()) == 0 or float(lqr.B[k].norm()) == 0
        apart = top(lqr.R[k]) + top(C - lqr.R[k])
        assert (rho <= 1.01 * (exact if alone else apart) + 1e-12).all()


@sizes
@problems
def test_a_truncated_series_has_the_error_that_is_promised(n, m, make):
    lqr = make(n, m)
    swept = sweep_cycle(phases(lqr), dampings(lqr, (1e-3,) * 4), adapt=DOUBLE)
    short = sweep_cycle(phases(lqr), list(swept.delta), inverse=NEUMANN)
    assert swept.converged and short.converged
    assert 0 < short.truncation <= 2.0**-TERMS
    assert relative(lqr.join(short.u), lqr.join(swept.u)) < 1e-5
    plain = [float(R.norm()) == float(M.norm()) == 0 for R, M in zip(lqr.R, lqr.M, strict=True)]
    for k, (phase, delta, rho) in enumerate(zip(phases(lqr), swept.delta, swept.rho, strict=True)):
        P, bound = after(swept.P, k), (rho / delta) ** TERMS
        BBP = phase.B.gram() @ P
        system = System(phase, P, delta, BBP if plain[k] else None)
        right = randn(lqr.m[k], 4, seed=k)
        exact, series = (inverse.solve(system, right) for inverse in (ExactInverse(), NEUMANN))
        if lqr.m[k] == 0:
            assert exact.shape == series.shape == (0, 4)
            continue
        assert ((exact - series).norm(dim=0) <= 1.0001 * bound * exact.norm(dim=0)).all()
        C = delta * torch.eye(lqr.m[k]).double() + curvatures(lqr, swept.P)[k]
        assert relative(exact, torch.linalg.solve(C, right)) < 1e-11
        if plain[k]:  # (V2) is (V1) term by term
            root = torch.linalg.cholesky(P + 1e-14 * torch.eye(len(P)).double() * P.trace()).mT
            loops = [how.closed_loop(phase.A, BBP, delta) for how in (ExactInverse(), NEUMANN)]
            for loop, how in zip(loops, (ExactInverse(), NEUMANN), strict=True):
                K = how.solve(system, phase.B.adjoint(P @ phase.A))
                assert relative(loop, phase.A - phase.B.times(K)) < 1e-11
            error = root @ (loops[0] - loops[1])
            assert (error.norm(dim=0) <= 1.0001 * bound * (root @ loops[0]).norm(dim=0)).all()


def test_more_terms_are_more_digits():
    lqr = stable([4, 5], [3, 2])
    swept = sweep_cycle(phases(lqr), dampings(lqr), adapt=DOUBLE)
    errors = []
    for terms in (5, 10, 20, 50):
        short = sweep_cycle(phases(lqr), list(swept.delta), inverse=NeumannInverse(terms))
        errors.append(relative(lqr.join(short.u), lqr.join(swept.u)))
        assert short.truncation <= 2.0**-terms
    assert all(b < a / 5 for a, b in zip(errors, errors[1:], strict=False)) and errors[-1] < 1e-12


@problems
def test_a_rarer_look_at_the_curvature_comes_to_the_same_damping(make):
    lqr = make([4, 5, 3], [4, 3, 6])
    each, third = (
        sweep_cycle(phases(lqr), dampings(lqr), adapt=LayerDamping(refresh_every=every))
        for every in (1, 3)
    )
    assert each.converged and third.converged
    for a, b in zip(each.delta, third.delta, strict=True):
        assert abs(float(a / b) - 1) < 1e-2
    assert relative(lqr.join(third.u), lqr.join(each.u)) < 1e-2
    wide = sweep_cycle(phases(lqr), dampings(lqr), adapt=LayerDamping(margin=5.0))
    assert (ratios(wide, dampings(lqr)) >= 5).all() and (ratios(wide, dampings(lqr)) < 5.05).all()


def test_a_least_damping_that_suffices_is_kept():
    lqr = random_problem([3, 2], [2, 2])
    high = dampings(lqr, (1e4, 1e4))
    adapted, fixed = (sweep_cycle(phases(lqr), high, adapt=adapt) for adapt in (DOUBLE, None))
    assert adapted.delta == tuple(high) and torch.equal(lqr.join(adapted.u), lqr.join(fixed.u))


@batches
@problems
def test_a_series_that_diverges_says_so(batch, make):
    lqr = make([4, 5, 3], [4, 3, 6], batch)
    swept = sweep_cycle(phases(lqr), dampings(lqr), inverse=NEUMANN)
    assert (swept.truncation >= 1).all() and not swept.converged.any()
    assert swept.sweeps < 100  # and soon


def test_too_few_sweeps_are_not_converged():
    lqr = random_problem([4, 5, 3], [4, 3, 6])
    assert not sweep_cycle(phases(lqr), dampings(lqr), max_sweeps=2).converged
    assert not sweep_cycle(phases(lqr), dampings(lqr), adapt=DOUBLE, max_sweeps=2).converged
    loose = sweep_cycle(phases(lqr), dampings(lqr), tol=1e-2)
    tight = sweep_cycle(phases(lqr), dampings(lqr))
    assert loose.converged and loose.sweeps < tight.sweeps


def test_no_fixed_point_is_not_converged_and_leaves_the_others():
    lqr = output_read_in_phase_0([2, 2], [2, 2], (2,))
    lqr.A[0][0], lqr.A[1][0], lqr.B[1][0] = 1.5 * torch.eye(2), torch.eye(2), 0.0
    swept = sweep_cycle(phases(lqr), dampings(lqr), max_sweeps=300)
    assert swept.converged.tolist() == [False, True]
    alone = sweep_cycle(phases(at(lqr, 1)), dampings(at(lqr, 1)))
    assert relative(lqr.join(swept.u)[1], lqr.join(alone.u)) < 1e-10


def test_a_near_P_takes_fewer_sweeps():
    lqr = random_problem([4, 5, 3], [1, 1, 0])
    cold = sweep_cycle(phases(lqr), dampings(lqr))
    warm = sweep_cycle(phases(lqr), dampings(lqr), P0=cold.P[0] * (1 + 1e-6))
    assert warm.converged and warm.sweeps < cold.sweeps
    assert relative(lqr.join(warm.u), lqr.join(cold.u)) < 1e-10


@problems
@pytest.mark.parametrize("adapt", [None, DOUBLE], ids=["fixed", "by layer"])
@pytest.mark.parametrize("inverse", ["exact", "neumann"])
def test_a_batch_equals_its_elements(make, adapt, inverse):
    lqr = make([4, 5, 3], [4, 3, 6], (3,))
    values = (0.1, 0.3, 0.2) if inverse == "exact" or adapt else (1e4, 1e4, 1e4)
    swept = sweep_cycle(phases(lqr), dampings(lqr, values), inverse=inverse, adapt=adapt)
    assert swept.converged.all()
    for i in range(3):
        one = at(lqr, i)
        alone = sweep_cycle(phases(one), dampings(one, values), inverse=inverse, adapt=adapt)
        close = 1e-10 if adapt is None else 5e-3  # sweeps after it has settled move the margin
        assert relative(lqr.join(swept.u)[i], lqr.join(alone.u)) < close
        for name in ("rho", "delta"):
            for a, b in zip(getattr(swept, name), getattr(alone, name), strict=True):
                torch.testing.assert_close(a[i], b, rtol=close, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_no_element_holds_up_the_others(dtype, seed):
    lqr = stable([3, 2], [2, 2], (12,), seed).to(dtype)
    swept = sweep_cycle(phases(lqr), dampings(lqr), adapt=DOUBLE, max_sweeps=400)
    assert swept.converged.all() and swept.sweeps < 200


def test_single_precision_comes_near():
    lqr = output_read_in_phase_0([4, 5, 3], [4, 3, 6])
    exact = sweep_cycle(phases(lqr), dampings(lqr))
    narrow = lqr.to(torch.float32)
    swept = sweep_cycle(phases(narrow), dampings(narrow))
    assert swept.converged and swept.u[0].dtype == torch.float32
    assert relative(lqr.join(swept.u).double(), lqr.join(exact.u)) < 1e-4


def open_chain(n=4, stages=5, seed=0):
    """Stages with costs, linear terms and sizes of their own, and a cost of the end."""
    widths = [n, 3, 5, 2, 4, n][: stages + 1]
    parts = []
    for k, (rows, ahead) in enumerate(zip(widths, widths[1:], strict=False)):
        lqr = make_lqr(rows, [3, 0, 5, 2, 4][k], seed=seed + k)
        A, B = randn(ahead, rows, seed=k) / 2, randn(ahead, lqr.m, seed=k + 50)
        parts.append(Phase(A, StoredMap(B), lqr.Q, InputCost.of(lqr.R), lqr.M, lqr.a, lqr.b))
    end = randn(widths[-1], widths[-1], seed=99)
    return parts, end @ end.mT, randn(widths[-1], seed=98), randn(n, seed=97)


def rolled_out(stages, deltas, P_end, lam_end, x0):
    """The minimiser of the total cost, as a least-squares problem in all controls at once."""

    def cost(u):
        x, total, states = x0, 0.0, []
        for stage, delta, part in zip(
            stages, deltas, u.split([s.B.m for s in stages]), strict=True
        ):
            R = stage.R.dense() + delta * torch.eye(len(part)).double()
            total = total + x @ stage.Q @ x / 2 + part @ stage.M @ x + part @ R @ part / 2
            total = total + stage.a @ x + stage.b @ part
            states.append(x)
            x = stage.A @ x + stage.B.B @ part
        return total + x @ P_end @ x / 2 + lam_end @ x, torch.cat(states)

    u = torch.zeros(sum(stage.B.m for stage in stages)).double()
    H = torch.func.hessian(lambda u: cost(u)[0])(u)
    u = -torch.linalg.solve(H, torch.func.grad(lambda u: cost(u)[0])(u))
    return u, cost(u)[1], cost(u)[0]


@pytest.mark.parametrize("start", [True, False], ids=["x0", "zero"])
@pytest.mark.parametrize("inverse", ["exact", NEUMANN], ids=["exact", "neumann"])
@pytest.mark.parametrize("adapt", [None, DOUBLE], ids=["fixed", "by layer"])
def test_an_open_chain_is_the_minimum_over_all_controls(start, inverse, adapt):
    stages, P_end, lam_end, x0 = open_chain()
    x0 = x0 if start else None
    value = 0.1 if inverse == "exact" or adapt else 1e3
    least = [torch.tensor(value).double()] * len(stages)
    swept = sweep_chain(
        stages, least, P_end, lam_end, x0=x0, inverse=inverse, adapt=adapt
    )  # fmt: skip
    x0 = torch.zeros(4).double() if x0 is None else x0
    u, x, _ = rolled_out(stages, swept.delta, P_end, lam_end, x0)
    close = 1e-9 if inverse == "exact" else 1e-5
    assert relative(torch.cat(swept.u), u) < close and relative(torch.cat(swept.x[:-1]), x) < close
    assert swept.residual < 10 * close and swept.closed_loop_radius is None
    assert swept.converged and swept.truncation <= (0 if inverse == "exact" else 2.0**-TERMS)
    if adapt:
        assert all(delta >= 2 * rho for delta, rho in zip(swept.delta, swept.rho, strict=True))


def test_the_chains_value_function_is_its_cost_to_go():
    stages, P_end, lam_end, x0 = open_chain()
    least = [torch.tensor(0.1).double()] * len(stages)
    swept = sweep_chain(stages, least, P_end, lam_end)
    J = lambda x: rolled_out(stages, least, P_end, lam_end, x)[2]
    zero, step = torch.zeros_like(x0), torch.eye(4).double()
    for i in range(4):
        up, down = J(step[i]), J(-step[i])
        assert float((up - down) / 2 - swept.lam[0][i]) == pytest.approx(0, abs=1e-9)
        curved = float(up + down - 2 * J(zero))
        assert curved == pytest.approx(float(swept.P[0][i, i]), rel=1e-9)


def test_a_long_chain_of_rounds_has_the_P_of_the_cycle():
    lqr = random_problem([4, 3], [2, 2])
    rounds = phases(lqr) * 60
    least = dampings(lqr) * 60
    chain = sweep_chain(rounds, least, torch.zeros(4, 4).double(), torch.zeros(4).double())
    cycle = sweep_cycle(phases(lqr), dampings(lqr))
    assert relative(chain.P[0], cycle.P[0]) < 1e-10 and relative(chain.P[1], cycle.P[1]) < 1e-10


MAPPED = ["dense", "conv", "residual", "shared weight", "both", "frozen", "tuple"]


def both_ways(model, x, y, minibatch):
    """The phases with B stored, and with B by its products."""
    loss = make_loss("cross_entropy")
    stored, products = (
        linearize_phases(model, x, y, loss, CategoricalKL(), stored=flag) for flag in (True, False)
    )
    lqr = stored.lqr(minibatch, torch.float64)
    return lqr, as_phases(lqr), products.by_products(minibatch, torch.float64)


@minibatches
@pytest.mark.parametrize("name", MAPPED)
def test_products_with_B_are_those_of_the_stored_matrix(name, minibatch):
    _, stored, products = both_ways(*problem(name), minibatch)
    for k, (one, other) in enumerate(zip(stored, products, strict=True)):
        B, map_ = one.B.B, other.B
        batch = B.shape[:-2]
        assert map_.m == one.B.m == B.shape[-1]
        v, w = randn(*batch, map_.m, 2, seed=k), randn(*batch, B.shape[-2], 3, seed=k)
        pairs = [
            (map_.times(v), B @ v), (map_.adjoint(w), B.mT @ w), (map_.gram(), B @ B.mT),
            *((getattr(other, X), getattr(one, X)) for X in ("A", "Q", "M", "a", "b")),
        ]  # fmt: skip
        for ours, exact in pairs:
            torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-12)


def test_no_graph_hangs_on_what_is_known_by_products():
    model, x, y = problem("residual")
    local = linearize_phases(model, x, y, make_loss("cross_entropy"), CategoricalKL(), stored=False)
    for phase in local.by_products("exact", torch.float64):
        found = (phase.A, phase.Q, phase.M, phase.a, phase.b, phase.R.block, phase.B.gram())
        assert not any(X.requires_grad for X in found)


@minibatches
def test_a_model_is_solved_by_products_as_with_its_matrices(minibatch):
    lqr, *ways = both_ways(*problem("both"), minibatch)
    us = [torch.cat(sweep_cycle(phases, 0.1).u, dim=-1) for phases in ways]
    exact = torch.cat(cyclic_steady_state(lqr.damped(0.1)).u, dim=-1)
    assert relative(us[0], exact) < 1e-9 and relative(us[1], exact) < 1e-9


def test_inverses_have_names():
    assert make_inverse("exact") == ExactInverse() and make_inverse("neumann") == NEUMANN
    assert make_inverse(NeumannInverse(3)).terms == 3
    for bad in ("newman", 3, None):
        with pytest.raises(ValueError, match="inverse must be"):
            make_inverse(bad)


def test_sweeps_that_settle_on_an_unstable_loop_have_not_converged():
    A, one = torch.diag(torch.tensor([1.5, 0.5])).double(), torch.ones(2, 1).double()
    B, Q = one * torch.tensor([[0.0], [1.0]]), torch.diag(torch.tensor([0.0, 1.0])).double()
    phase = Phase.of(A, B, Q, one[:1] * 0, one.mT * 0, one[:, 0], one[:1, 0] * 0)
    swept = sweep_cycle([phase], 0.1)
    assert not swept.converged and swept.closed_loop_radius >= 1.5 - 1e-9
