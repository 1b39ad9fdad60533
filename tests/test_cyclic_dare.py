"""Tests for `solve_cyclic_dare` and `solve_cyclic_stein`."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import block_diag, solve_discrete_are, solve_discrete_lyapunov
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from deqlqr import (
    ConvergenceError,
    DareResult,
    Doubling,
    SteinResult,
    solve_cyclic_dare,
    solve_cyclic_stein,
    solve_dare,
    solve_stein,
)

from .problems import DTYPES, generator, make_lqr, randn, relative
from .test_dare_derivatives import full, half
from .test_riccati import NONE

TOL = {torch.float32: 1e-3, torch.float64: 1e-9}
ONE = torch.eye(1, dtype=torch.float64)
I2 = torch.eye(2, dtype=torch.float64)
Cycle = tuple[tuple[Tensor, ...], ...]
# sizes of the states and numbers of the controls, phase by phase
SIZES = {
    "p=1": ([3], [2]),
    "p=2": ([2, 4], [3, 1]),
    "p=3, a control in one phase": ([3, 1, 2], [0, 2, 0]),
    "p=3, more controls than states": ([2, 2, 2], [5, 1, 7]),
    "p=7": ([4, 2, 5, 1, 3, 3, 2], [1, 0, 2, 3, 0, 1, 1]),
}
sizes = pytest.mark.parametrize("n, m", SIZES.values(), ids=SIZES)


def make_cycle(n, m, batch=(), gain=0.9, seed=0) -> Cycle:
    """Random phases with [Q M'; M R] positive definite; A multiplies a random state by `gain`."""
    g = generator(seed)
    rand = lambda *s: torch.randn(*batch, *s, generator=g, dtype=torch.float64)
    phases = []
    for k, (rows, controls) in enumerate(zip(n, m, strict=True)):
        following, both = n[(k + 1) % len(n)], rows + controls
        C = rand(both, both)
        W = C @ C.mT / both + 0.1 * torch.eye(both, dtype=torch.float64)
        A, B = gain * rand(following, rows) / following**0.5, rand(following, controls)
        x, u = slice(0, rows), slice(rows, None)
        phases.append((A, B, W[..., x, x], W[..., u, u], W[..., u, x]))
    return tuple(zip(*phases, strict=True))


def answered(n, m, seed=0) -> tuple[Cycle, list[Tensor]]:
    """Phases whose stabilising solution P was chosen first; it and the costs are indefinite."""
    F, B, W, S, K = make_cycle(n, m, seed=seed)
    F = [0.8 * f / torch.linalg.matrix_norm(f, 2) for f in F]
    P = [X - 0.8 * torch.eye(len(X)) for X in W]
    following = P[1:] + P[:1]
    A = tuple(f + b @ k for f, b, k in zip(F, B, K, strict=True))
    R = tuple(s - b.mT @ Y @ b for s, b, Y in zip(S, B, following, strict=True))
    M = tuple(s @ k - b.mT @ Y @ a for s, k, b, Y, a in zip(S, K, B, following, A, strict=True))
    Q = tuple(X - a.mT @ Y @ a + k.mT @ s @ k
              for X, a, Y, k, s in zip(P, A, following, K, S, strict=True))  # fmt: skip
    return (A, B, tuple((X + X.mT) / 2 for X in Q), tuple((X + X.mT) / 2 for X in R), M), P


def constant(p, *matrices) -> Cycle:
    return tuple((X,) * p for X in matrices)


def diagonal(*entries: float) -> Tensor:
    return torch.diag(torch.tensor(entries, dtype=torch.float64))


def at(index, cycle: Cycle) -> Cycle:
    return tuple(tuple(X[index] for X in matrices) for matrices in cycle)


def to(dtype, cycle: Cycle) -> Cycle:
    return tuple(tuple(X.to(dtype) for X in matrices) for matrices in cycle)


def arrays(cycle):
    return [[X.detach().double().numpy() for X in matrices] for matrices in cycle]


def blocks(P, Q) -> list[Tensor]:
    ends = np.cumsum([0, *map(len, Q)])
    return [torch.as_tensor(P[i:j, i:j]) for i, j in pairwise(ends)]


def lift(cycle: Cycle) -> list[Tensor]:
    """SciPy's solution for the stacked phases, x_k in block k: its diagonal blocks."""
    A, B, Q, R, M = arrays(cycle)
    a, b = (np.roll(block_diag(*X), len(Q[0]), axis=0) for X in (A, B))
    P = solve_discrete_are(a, b, block_diag(*Q), block_diag(*R), s=block_diag(*M).T)
    return blocks(P, Q)


def backward(phase, following):
    A, B, Q, R, M = phase
    mixed = M + B.T @ following @ A
    K = np.linalg.solve(R + B.T @ following @ B, mixed)
    return A.T @ following @ A, mixed.T @ K, K


def swept(cycle: Cycle, sweeps=200) -> list[Tensor]:
    """P after backward sweeps from P = 0, each P the cost of its gain: no term cancels."""
    phases = list(zip(*arrays(cycle), strict=True))
    P = [np.zeros_like(phase[2]) for phase in phases]
    for _ in range(sweeps):
        before = P[0]
        for k in reversed(range(len(P))):
            (A, B, Q, R, M), following = phases[k], P[(k + 1) % len(P)]
            _, _, K = backward(phases[k], following)
            loop = A - B @ K
            P[k] = loop.T @ following @ loop + Q - M.T @ K - K.T @ M + K.T @ R @ K
            P[k] = (P[k] + P[k].T) / 2
        if np.linalg.norm(P[0] - before) <= 1e-14 * np.linalg.norm(P[0]):
            break
    return [torch.as_tensor(X) for X in P]


def certificate(cycle: Cycle, P) -> tuple[float, np.ndarray]:
    """Largest residual of (R1c), relative to its largest term, and the Floquet multipliers."""
    phases, P = list(zip(*arrays(cycle), strict=True)), arrays([P])[0]
    p, least = len(P), min(range(len(P)), key=lambda k: len(P[k]))
    residuals, loop = [], np.eye(len(P[least]))
    for k in (*range(least, p), *range(least)):
        A, B, Q, _, _ = phases[k]
        reached, saved, K = backward(phases[k], P[(k + 1) % p])
        largest = max(map(np.linalg.norm, (reached, saved, Q, P[k])))
        residuals.append(np.linalg.norm(reached + Q - saved - P[k]) / (largest or 1.0))
        loop = (A - B @ K) @ loop
    return max(residuals), np.linalg.eigvals(loop)


def chunks(matrices, p: int) -> Cycle:
    return tuple(tuple(matrices[i : i + p]) for i in range(0, len(matrices), p))


def solve(cycle: Cycle, **options):
    return solve_cyclic_dare(*cycle, **options)


def distance(P, exact) -> float:
    return max(relative(X.double(), Y) for X, Y in zip(P, exact, strict=True))


def failed(solution) -> bool:
    nan = all(X.isnan().all() for X in (*solution.P, *solution.K))
    return bool(nan and not solution.stabilising.any())


def solved(cycle: Cycle, solution, tolerance=1e-11) -> bool:
    residual, multipliers = certificate(cycle, solution.P)
    return bool(solution.stabilising and residual < tolerance and (abs(multipliers) < 1).all())


CASES = json.loads((Path(__file__).parent / "data" / "cyclic_dare.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_cases_of_the_literature_have_the_digits_of_the_lift(case):
    as_tensors = lambda key: tuple(torch.tensor(X, dtype=torch.float64) for X in case[key])
    cycle = (*map(as_tensors, "ABQR"), tuple(S.mT for S in as_tensors("S")))
    solution = solve(cycle)
    assert solved(cycle, solution)
    assert distance(solution.P, lift(cycle)) < 1e-9
    if case["P"] is not None:  # all digits of these are right, more than the lift's
        assert distance(solution.P, as_tensors("P")) < 1e-10


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gain", [0.6, 1.3], ids=["stable", "unstable"])
@sizes
def test_agrees_with_the_lift_and_its_certificate_is_true(n, m, gain, dtype):
    cycle = make_cycle(n, m, gain=gain)
    solution, exact = solve(to(dtype, cycle)), lift(cycle)
    assert distance(solution.P, exact) < TOL[dtype]
    for X, K, rows, controls in zip(solution.P, solution.K, n, m, strict=True):
        assert torch.equal(X, X.mT) and X.shape == (rows, rows) and K.shape == (controls, rows)
        assert X.dtype == K.dtype == dtype
    phases = zip(*arrays(cycle), exact[1:] + exact[:1], strict=True)
    gains = [torch.as_tensor(backward(phase, X.numpy())[2]) for *phase, X in phases]
    error = sum((K.double() - L).norm() for K, L in zip(solution.K, gains, strict=True))
    assert error < TOL[dtype] * sum(L.norm() for L in gains)
    assert solution.result == DareResult.STABILISING and solution.residual < TOL[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@sizes
def test_the_multipliers_are_those_of_the_closed_loop(n, m, dtype):
    cycle = make_cycle(n, m, gain=1.1)
    solution = solve(to(dtype, cycle))
    ours, (_, exact) = solution.multipliers, certificate(cycle, lift(cycle))
    assert ours.is_complex() and ours.shape == (min(n),)
    assert (ours.abs().diff() <= 1e-12).all()  # the largest first
    np.testing.assert_allclose(np.poly(ours.numpy()), np.poly(exact), atol=TOL[dtype])
    assert solution.closed_loop_radius == pytest.approx(abs(exact).max(), rel=1e-2)


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(1, 6), st.floats(0.0, 1.3), st.integers(0, 999))
def test_residual_and_stability_hold_on_random_cycles(data, p, gain, seed):
    n = data.draw(st.lists(st.integers(1, 4), min_size=p, max_size=p))
    m = data.draw(st.lists(st.integers(0, 3), min_size=p, max_size=p).filter(any))
    cycle = make_cycle(n, m, gain=gain, seed=seed)
    assert solved(cycle, solve(cycle))


@settings(max_examples=30, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(0, 999))
def test_indefinite_costs_are_solved_where_a_stabilising_solution_exists(data, p, seed):
    n = data.draw(st.lists(st.integers(1, 3), min_size=p, max_size=p))
    m = data.draw(st.lists(st.integers(0, 3), min_size=p, max_size=p).filter(any))
    cycle, P = answered(n, m, seed)
    solution = solve(cycle)
    assert solution.stabilising and distance(solution.P, P) < 1e-9


LONG = {
    "one control each": ([4] * 120, [1] * 120),
    "varying sizes": ([3, 5, 1, 4, 2, 6] * 20, [1, 0, 2, 1, 0] * 24),
}


@pytest.mark.parametrize("n, m", LONG.values(), ids=LONG)
@pytest.mark.parametrize("gain", [0.6, 1.1])
def test_a_long_cycle_has_the_limit_of_the_backward_sweeps(n, m, gain):
    cycle = make_cycle(n, m, gain=gain)
    solution = solve(cycle)
    assert solved(cycle, solution) and distance(solution.P, swept(cycle)) < 1e-10


def test_an_open_loop_that_overflows_around_the_cycle_is_controlled():
    turns = torch.linalg.qr(randn(200, 2, 2)).Q
    _, B, Q, R = constant(200, I2, I2, I2, I2)
    solution = solve_cyclic_dare(tuple(100 * turns), B, Q, R)  # 100**200 = inf
    exact = (1e4 + (1e8 + 4) ** 0.5) / 2  # p = a^2 p / (1 + p) + 1
    assert distance(solution.P, [exact * I2] * 200) < 1e-11


@pytest.mark.parametrize("rho", [0.5, 1.2])
def test_one_phase_is_the_equation_of_solve_dare(rho):
    lqr = make_lqr(4, 2, (3,), rho=rho)
    pieces = [X.clone() for X in (lqr.A, lqr.B, lqr.Q, lqr.R, lqr.M)]
    pieces[0][1], pieces[1][1] = 2 * torch.eye(4), 0.0
    cyclic = solve_cyclic_dare(*([X] for X in pieces), throw=False)
    plain = solve_dare(*pieces, throw=False)
    assert cyclic.result.tolist() == plain.result.tolist() == [0, DareResult.NONE, 0]
    torch.testing.assert_close(cyclic.P[0], plain.P, rtol=1e-11, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(cyclic.K[0], plain.K, rtol=1e-11, atol=1e-12, equal_nan=True)
    without = solve_cyclic_dare(*([X] for X in pieces[:4]), throw=False).P[0][[0, 2]]
    torch.testing.assert_close(without, solve_dare(*pieces[:4], throw=False).P[[0, 2]])


@pytest.mark.parametrize("batch", [(3,), (2, 3)])
def test_a_batch_equals_its_elements(batch):
    cycle = make_cycle([3, 1, 2], [1, 0, 2], batch, gain=1.1)
    solution = solve(cycle)
    assert [X.shape for X in solution.P] == [(*batch, n, n) for n in (3, 1, 2)]
    assert solution.multipliers.shape == (*batch, 1)
    for field in ("closed_loop_radius", "residual", "iterations", "result"):
        assert getattr(solution, field).shape == batch
    for index in np.ndindex(batch):
        alone = solve(at(index, cycle))
        whole = [X[index] for X in (*solution.P, *solution.K)]
        torch.testing.assert_close(whole, [*alone.P, *alone.K], rtol=1e-10, atol=1e-12)


def test_an_empty_batch_has_an_empty_solution():
    solution = solve(make_cycle([3, 2], [1, 0], (2, 0)))
    assert solution.P[1].shape == (2, 0, 2, 2) and solution.K[1].shape == (2, 0, 0, 2)
    assert solution.result.shape == (2, 0)


@pytest.mark.parametrize("p", [2, 60])
def test_every_failure_has_its_code_and_leaves_the_others_exact(p):
    good = make_cycle([2] * p, [1] * p, (5,), gain=1.1)
    bad = tuple(tuple(X.clone() for X in matrices) for matrices in good)
    for matrices, none in zip(bad, (NONE.A, NONE.B, NONE.Q, NONE.R, NONE.M), strict=True):
        for X in matrices:
            X[2] = none
    for A, B, Q, _, M in zip(*bad, strict=True):
        A[1], B[1], Q[1], M[1] = diagonal(1.5, 0.5), I2[:, 1:], I2, 0.0
    bad[2][1][3, 0, 0] = float("nan")
    before, after = solve(good), solve(bad, throw=False)
    assert after.result[[0, 1, 3, 4]].tolist() == [0, DareResult.NONE, DareResult.NON_FINITE, 0]
    assert after.stabilising.tolist() == [True, False, False, False, True]
    for X, Y in zip((*before.P, *before.K), (*after.P, *after.K), strict=True):
        assert Y[1:4].isnan().all() and torch.equal(X[[0, 4]], Y[[0, 4]])
    with pytest.raises(ConvergenceError, match=r"3 of 5 batch elements failed \(elements 1, 2, 3"):
        solve(bad)
    with pytest.raises(ConvergenceError, match="DARE"):
        after.raise_if_failed()


@pytest.mark.parametrize("method", ["doubling", "value-iteration", "scipy"])
@pytest.mark.parametrize("p", [1, 3, 10])
def test_an_unstable_product_without_control_or_cost_has_no_solution(p, method):
    A, B, Q = diagonal(1.5, 0.5), I2[:, 1:], diagonal(0.0, 1.0)
    solution = solve(constant(p, A, B, Q, ONE), method=method, throw=False)  # P = diag(0, .) fits
    assert failed(solution)
    assert method == "scipy" or solution.result == DareResult.NONE


@pytest.mark.parametrize("a, p", [(1.5, 200), (1.01, 120), (100.0, 200)])
def test_neither_has_a_long_cycle(a, p):
    A, B, Q = diagonal(a, 0.5), I2[:, 1:], diagonal(0.0, 1.0)
    for cost in (Q, I2):
        solution = solve(constant(p, A, B, cost, ONE), throw=False)
        assert failed(solution)
        assert solution.result == DareResult.NONE or a == 100.0  # 100**200 = inf


@pytest.mark.parametrize("p", [1, 2, 6, 120])
@pytest.mark.parametrize("cost", [0.0, 1.0])
def test_an_uncontrolled_multiplier_on_the_unit_circle_is_no_stabilising_solution(cost, p):
    a = [1.0] if p == 1 else [2.0, 0.5] * (p // 2)
    A = tuple(diagonal(x, 0.5) for x in a)
    _, B, Q, R = constant(p, I2, I2[:, 1:], cost * I2, ONE)
    assert failed(solve_cyclic_dare(A, B, Q, R, throw=False))
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    assert failed(solve(constant(p, turn, 0 * I2[:, 1:], cost * I2, ONE), throw=False))


def test_unstable_phases_with_a_stable_product_need_no_control():
    A = (diagonal(4.0, 0.1), diagonal(0.1, 4.0))
    _, B, Q, R = constant(2, I2, 0 * I2[:, 1:], I2, ONE)
    solution = solve_cyclic_dare(A, B, Q, R)
    exact = [diagonal(17.0, 1.01) / 0.84, diagonal(1.01, 17.0) / 0.84]
    assert distance(solution.P, exact) < 1e-14 and max(K.norm() for K in solution.K) == 0
    assert solution.multipliers.tolist() == pytest.approx([0.4, 0.4])
    other = solve_cyclic_dare(A, (B[0], B[1][:, :0]), Q, (R[0], R[1][:0, :0]))
    assert distance(other.P, exact) < 1e-14


def test_stable_phases_with_an_unstable_product_need_control():
    step = torch.tensor([[0.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    A, Q, R = (step, step.mT.contiguous()), (I2, I2), (ONE, ONE)
    assert failed(solve_cyclic_dare(A, (0 * I2[:, :1],) * 2, Q, R, throw=False))
    assert failed(solve_cyclic_dare(A, (I2[:, 1:], I2[:, :1]), (0 * I2,) * 2, R, throw=False))
    cycle = (A, (I2[:, :1],) * 2, Q, R, (torch.zeros(1, 2).double(),) * 2)
    assert solved(cycle, solve(cycle)) and distance(solve(cycle).P, lift(cycle)) < 1e-12


@pytest.mark.parametrize("singular", [(1,), (0, 1, 2)])
@pytest.mark.parametrize("gain", [0.6, 1.3])
def test_a_singular_input_cost_is_no_obstacle_where_the_future_weighs_the_controls(gain, singular):
    A, B, Q, R, M = make_cycle([3, 2, 4], [2, 2, 1], gain=gain)
    free = lambda matrices: tuple(0 * X if k in singular else X for k, X in enumerate(matrices))
    cycle = (A, B, Q, free(R), free(M))
    solution = solve(cycle)
    assert solved(cycle, solution) and distance(solution.P, lift(cycle)) < 1e-9


@pytest.mark.parametrize("controlled", [(0,), (0, 1, 2)])
def test_undetectable_unstable_modes_give_the_stabilising_not_the_minimal_solution(controlled):
    A, _, Q, _ = constant(3, diagonal(2.0, 0.5), I2, 0 * I2, ONE)
    B = tuple(torch.ones(2, int(k in controlled)).double() for k in range(3))
    R = tuple(torch.eye(b.shape[1]).double() for b in B)
    cycle = (A, B, Q, R, tuple(torch.zeros_like(b.mT) for b in B))
    solution = solve(cycle)
    assert min(X.norm() for X in solution.P) > 1  # P = 0 has residual 0 and does not stabilise
    assert solved(cycle, solution) and distance(solution.P, lift(cycle)) < 1e-9
    sweeps = solve(cycle, method="value-iteration", throw=False)
    assert failed(sweeps) or solved(cycle, sweeps)


def test_one_controlled_phase_holds_what_grows_in_all_the_others():
    A = tuple(2 * torch.linalg.qr(randn(10, 3, 3)).Q)
    eye = torch.eye(3, dtype=torch.float64)
    B = tuple(eye[:, : 3 * (k == 4)] for k in range(10))
    R = tuple(torch.eye(b.shape[1], dtype=torch.float64) for b in B)
    solution = solve_cyclic_dare(A, B, (eye,) * 10, R)
    P = [0.0] * 10
    for _ in range(5):
        for k in reversed(range(10)):  # P is p I
            following = P[(k + 1) % 10]
            P[k] = 1 + 4 * following / (1 + following if k == 4 else 1)
    assert distance(solution.P, [p * eye for p in P]) < 1e-9
    assert solution.closed_loop_radius == pytest.approx(2**10 / (1 + P[5]), rel=0.02)


def test_one_control_holds_two_states_that_grow_a_thousandfold_around_the_cycle():
    A, B = tuple(2 * torch.linalg.qr(randn(10, 2, 2)).Q), randn(2, 1, seed=9)
    B, R = (tuple(X[:, : k == 4] for k in range(10)) for X in (B, ONE))
    R = tuple(X[: X.shape[1]] for X in R)
    cycle = (A, B, (I2,) * 10, R, tuple(0 * X.mT for X in B))
    solution, exact = solve(cycle), swept(cycle)
    assert solved(cycle, solution, tolerance=1e-9)
    gain = backward([X[4].numpy() for X in cycle], exact[5].numpy())[2]
    assert relative(solution.K[4], torch.as_tensor(gain)) < 1e-8
    assert distance(solution.P, exact) < 1e-8


@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_many_controls_lose_no_digits_where_unstable_phases_multiply_up(m):
    A = tuple(a * ONE for a in (1e4, 1e4, 1e4, 5e3, 1e-4, 0.01))
    B = tuple(randn(1, m, seed=k) for k in range(6))
    R = (torch.eye(m, dtype=torch.float64),) * 6
    cycle = (A, B, (ONE,) * 6, R, tuple(0 * X.mT for X in B))
    for method in ("doubling", "value-iteration"):
        assert distance(solve(cycle, method=method).P, swept(cycle)) < 1e-11


def test_a_failed_element_with_singular_costs_leaves_the_gradients_of_the_others():
    A = torch.stack([ONE / 2, 2 * ONE]).requires_grad_()
    B, none = torch.stack([ONE, 0 * ONE]), torch.zeros(2, 1, 1).double()
    solution = solve_dare(A, B, torch.ones_like(none), none, throw=False)
    (gradient,) = torch.autograd.grad(solution.K[0].sum(), A)
    assert solution.stabilising.tolist() == [True, False]
    assert gradient[0] == pytest.approx(1.0) and gradient[1] == 0


@pytest.mark.parametrize("p", [2, 120])
@pytest.mark.parametrize("eps, tolerance", [(1e-2, 1e-13), (1e-4, 1e-11), (1e-6, 1e-9)])
def test_closed_loops_near_the_unit_circle(eps, tolerance, p):
    turns, _ = torch.linalg.qr(randn(p, 3, 3))
    eye = torch.eye(3, dtype=torch.float64)
    solution = solve_cyclic_dare(turns.unbind(), *constant(p, eye, eps**2 * eye, eye))
    exact = (eps**2 + (eps**4 + 4 * eps**2) ** 0.5) / 2  # p^2 - eps^2 p - eps^2 = 0
    assert distance(solution.P, [exact * eye] * p) < tolerance
    assert 1 - solution.closed_loop_radius == pytest.approx(1 - (1 + exact) ** -p, rel=0.02)


@pytest.mark.parametrize("scale", [1e-150, 1e-20, 1e20, 1e150])
def test_the_scale_of_the_costs_does_not_matter(scale):
    A, B, Q, R, M = make_cycle([3, 1, 2], [1, 0, 2], gain=1.1)
    plain = solve((A, B, Q, R, M))
    costs = (tuple(scale * X for X in matrices) for matrices in (Q, R, M))
    scaled = solve_cyclic_dare(A, B, *costs)
    assert distance([X / scale for X in scaled.P], plain.P) < 1e-10
    assert distance(scaled.K[::2], plain.K[::2]) < 1e-10


@pytest.mark.parametrize("gain", [0.9, 1.2])
def test_float32_is_refined_to_the_digits_of_float64(gain):
    cycle = to(torch.float32, make_cycle([6, 4, 5], [2, 0, 3], gain=gain))
    exact = lift(cycle)
    coarse = solve(cycle, solver=Doubling(refine=0), out_dtype=torch.float64)
    refined, rounded = solve(cycle, out_dtype=torch.float64), solve(cycle)
    assert refined.P[0].dtype == torch.float64 and rounded.P[0].dtype == torch.float32
    assert distance(coarse.P, exact) > 1e-9 > 1e-11 > distance(refined.P, exact)
    assert distance(rounded.P, exact) < 2 * torch.finfo(torch.float32).eps
    assert certificate(cycle, refined.P)[0] < 1e-11


@pytest.mark.parametrize("method", ["value-iteration", "scipy"])
def test_the_other_methods_find_the_same_and_are_certified_alike(method):
    cycle = make_cycle([3, 1, 2], [1, 0, 2], (3,), gain=1.1)
    cycle[2][1][1, 0, 0] = float("nan")
    ours, other = solve(cycle, throw=False), solve(cycle, method=method, throw=False)
    assert ours.result.tolist() == other.result.tolist() == [0, DareResult.NON_FINITE, 0]
    for X, Y in zip((*ours.P, *ours.K), (*other.P, *other.K), strict=True):
        torch.testing.assert_close(X, Y, rtol=1e-9, atol=1e-10, equal_nan=True)


def test_too_few_steps_are_a_failure_not_an_answer():
    cycle = make_cycle([3, 1, 2], [1, 0, 2], gain=1.1)
    few = solve(cycle, method="value-iteration", max_sweeps=1, throw=False)
    assert failed(few) and few.result == DareResult.NOT_CONVERGED
    slow = constant(2, 0.999 * I2, I2, 1e-9 * I2, I2)
    assert failed(solve(slow, solver=Doubling(max_steps=1), throw=False))


def test_a_warm_start_takes_fewer_steps_and_falls_back_where_the_old_gain_fails():
    A, *rest = make_cycle([3, 1, 2], [1, 0, 2], (4,), gain=1.3)
    start = [X.clone() for X in solve((A, *rest)).P]
    start[0][2], start[1][2], start[2][2] = 0.0, float("nan"), 0.0
    A = tuple(X + 1e-4 * randn(*X.shape, seed=k) for k, X in enumerate(A))
    cold, warm = solve((A, *rest)), solve((A, *rest), P0=start)
    good = [0, 1, 3]
    assert (warm.iterations[good] < cold.iterations[good]).all()
    assert distance(warm.P, cold.P) < 1e-11 and warm.stabilising.all()
    again = solve((A, *rest), P0=cold.P)
    assert again.iterations.max() <= 1 and distance(again.P, cold.P) < 1e-12
    with pytest.raises(ValueError, match=r"P0\[0\] must have shape \(4, 3, 3\)"):
        solve((A, *rest), P0=[X[0] for X in start])


def P_and_K(*matrices: Tensor) -> tuple[Tensor, ...]:
    p = len(matrices) // 5
    solution = solve_cyclic_dare(*chunks(matrices, p))
    return *solution.P, *(K for K in solution.K if K.numel())


def flat(cycle: Cycle) -> tuple[Tensor, ...]:
    return tuple(X for matrices in cycle for X in matrices)


def halved(cycle: Cycle) -> tuple[Tensor, ...]:
    """Return the free entries, as leaves: Q and R by their lower triangles."""
    A, B, Q, R, M = cycle
    parts = (*A, *B, *map(half, Q), *map(half, R), *M)
    return tuple(X.clone().requires_grad_() for X in parts)


def of_halves(n, m):
    def function(*free: Tensor) -> tuple[Tensor, ...]:
        A, B, q, r, M = chunks(free, len(n))
        return P_and_K(*A, *B, *map(full, q, n), *map(full, r, m), *M)

    return function


@pytest.mark.parametrize(
    "n, m, batch",
    [([2], [1], ()), ([2], [1], (2,)), ([2, 1], [1, 0], ()), ([1, 2, 1], [1, 0, 2], ())],
)
def test_first_and_second_derivatives_of_P_and_K(n, m, batch):
    free = halved(make_cycle(n, m, batch, gain=1.1))
    function = of_halves(n, m)
    assert gradcheck(function, free, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, free, fast_mode=len(n) > 1 or len(batch) > 0)


def test_the_gradient_equals_the_slope_of_the_lift():
    cycle = make_cycle([3, 1, 2], [2, 0, 1], gain=1.1)
    matrices = tuple(X.clone().requires_grad_() for X in flat(cycle))
    weights = [randn(n, n, seed=n) for n in (3, 1, 2)]
    value = lambda P: sum((W * X).sum() for W, X in zip(weights, P, strict=True))
    gradient = torch.autograd.grad(value(P_and_K(*matrices)[:3]), matrices)

    def slope(i: int, direction: Tensor, step: float = 1e-5) -> Tensor:
        moved = ([X + t * direction if j == i else X for j, X in enumerate(flat(cycle))]
                 for t in (-step, step))  # fmt: skip
        below, above = (value(lift(chunks(matrices, 3))) for matrices in moved)
        return (above - below) / (2 * step)

    for i, X in enumerate(gradient):
        direction = randn(*X.shape, seed=i)
        direction = direction + direction.mT if 6 <= i < 12 else direction  # of Q and R
        ours = (X * direction).sum()
        torch.testing.assert_close(ours, slope(i, direction), rtol=1e-6, atol=1e-6)


def test_derivatives_are_found_where_doubling_finds_the_minimal_solution():
    A = diagonal(2.0, 0.5).requires_grad_()
    B, Q, R = (torch.ones(2, 1).double(),) * 2, (0 * I2,) * 2, (ONE, ONE)
    assert gradcheck(lambda A: solve_cyclic_dare((A, A.mT), B, Q, R).P, (A,))


def test_torch_func_goes_through_it():
    cycle = make_cycle([2, 1, 3], [1, 0, 2], (4,))
    matrices = flat(cycle)
    whole = P_and_K(*matrices)
    torch.testing.assert_close(torch.func.vmap(P_and_K)(*matrices), whole)
    one = [X[0] for X in matrices]
    cost = lambda A: sum(X.square().sum() for X in P_and_K(A, *one[1:]))
    gradient = torch.func.vmap(torch.func.grad(cost))(matrices[0])
    leaf = one[0].clone().requires_grad_()
    torch.testing.assert_close(gradient[0], torch.autograd.grad(cost(leaf), leaf)[0])
    direction, step = randn(1, 2, seed=5), 1e-5
    along = torch.func.jvp(cost, (one[0],), (direction,))[1]
    slope = (cost(one[0] + step * direction) - cost(one[0] - step * direction)) / (2 * step)
    torch.testing.assert_close(along, slope, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close((gradient[0] * direction).sum(), along)
    hessian = torch.func.hessian(cost)(one[0]).reshape(2, 2)
    torch.testing.assert_close(hessian, hessian.mT)


def test_a_long_cycle_has_a_gradient():
    n, m = [2, 3] * 60, [1, 0] * 60
    cycle = make_cycle(n, m, gain=1.1)
    leaf = cycle[0][77].clone().requires_grad_()
    cost = lambda X: solve_cyclic_dare((*cycle[0][:77], X, *cycle[0][78:]), *cycle[1:]).P[70].sum()
    (gradient,) = torch.autograd.grad(cost(leaf), leaf)
    direction, step = randn(2, 3, seed=5), 1e-6
    slope = (cost(leaf + step * direction) - cost(leaf - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope.detach(), rtol=1e-6, atol=1e-9)


def test_gradients_of_a_float32_cycle_have_its_type_and_its_accuracy():
    single = [X.requires_grad_() for X in flat(to(torch.float32, make_cycle([3, 1], [2, 0])))]
    double = [X.detach().double().requires_grad_() for X in single]
    value = lambda matrices: sum(X.sum() for X in P_and_K(*matrices))
    ours, exact = (torch.autograd.grad(value(X), X) for X in (single, double))
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() <= 1e-4 * b.norm()


def test_a_failed_element_does_not_spoil_the_gradient_of_the_others():
    A, B, Q, R, M = make_cycle([2, 3], [1, 2], (3,))
    A, B = (tuple(X.clone() for X in matrices) for matrices in (A, B))
    for X, Y in zip(A, B, strict=True):
        X[1], Y[1] = 2 * torch.eye(*X.shape[1:]), 0.0
    shared = torch.ones((), dtype=torch.float64, requires_grad=True)
    solution = solve_cyclic_dare([shared * X for X in A], B, Q, R, M, throw=False)
    good = solution.stabilising
    assert good.tolist() == [True, False, True]
    sum(X[good].sum() for X in (*solution.P, *solution.K)).backward()
    alone = torch.ones((), dtype=torch.float64, requires_grad=True)
    rest = at(good, (A, B, Q, R, M))
    part = solve_cyclic_dare([alone * X for X in rest[0]], *rest[1:])
    sum(X.sum() for X in (*part.P, *part.K)).backward()
    torch.testing.assert_close(shared.grad, alone.grad)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c | {"B": c["B"][:2]}, "B must have 3 phases .*got 2"),
        (lambda c: c | {"M": c["M"][:2]}, "M must have 3 phases .*got 2"),
        (lambda c: {name: () for name in c}, "A must .*(at least one|empty)"),
        (lambda c: {"A": [ONE], "B": [ONE[:, :0]], "Q": [ONE], "R": [ONE[:0, :0]]}, "column"),
        (lambda c: c | {"A": (c["A"][0], ONE, c["A"][2])}, r"A\[1\] must have shape \(2, 1\)"),
        (lambda c: c | {"B": (c["A"][0], *c["B"][1:])}, r"B\[0\] must have shape \(1, 1\)"),
        (lambda c: c | {"B": (*c["B"][:2], c["B"][0])}, r"B\[2\] must have shape \(3, "),
        (lambda c: c | {"Q": (*c["Q"][:2], c["Q"][0])}, r"Q\[2\] must have shape"),
        (lambda c: c | {"R": (*c["R"][:2], c["R"][1])}, r"R\[2\] must have shape \(2, 2\)"),
        (lambda c: c | {"M": (c["M"][0].mT, *c["M"][1:])}, r"M\[0\] must have shape \(1, 3\)"),
        (lambda c: c | {"Q": (c["Q"][0].triu(), *c["Q"][1:])}, r"Q\[0\] must be symmetric"),
        (lambda c: c | {"R": (*c["R"][:2], c["R"][2].triu())}, r"R\[2\] must be symmetric"),
        (lambda c: c | {"B": (c["B"][0].float(), *c["B"][1:])}, r"B\[0\] must be torch.float64"),
        (lambda c: c | {"A": tuple(X.long() for X in c["A"])}, r"A\[0\] must be float32 or"),
        (lambda c: c | {"Q": c["Q"][0]}, "Q must be a sequence"),
        (lambda c: c | {"B": None}, "B must be a sequence"),
        (lambda c: c | {"A": ([[1.0]], *c["A"][1:])}, r"A\[0\] must"),
        (lambda c: c | {"method": "qz"}, "method must be one of.*'qz'"),
        (lambda c: c | {"out_dtype": torch.float16}, "out_dtype must be"),
        (lambda c: c | {"P0": c["Q"][:2]}, r"P0 must have 3 phases .*got 2"),
    ],
)  # fmt: skip
def test_misuse_names_the_argument(change, message):
    arguments = dict(zip("ABQRM", make_cycle([3, 1, 2], [1, 0, 2]), strict=True))
    with pytest.raises(ValueError, match=message):
        solve_cyclic_dare(**change(arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gpu_agrees_with_the_lift(dtype):
    cycle = make_cycle([4, 2, 5], [1, 0, 2], gain=1.2)
    solution = solve(tuple(tuple(X.to("cuda", dtype) for X in matrices) for matrices in cycle))
    assert solution.P[0].is_cuda
    assert distance([X.cpu() for X in solution.P], lift(cycle)) < TOL[dtype]


def make_stein(n, batch=(), gain=0.5, seed=0) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    A = make_cycle(n, [0] * len(n), batch, gain, seed)[0]
    return A, tuple(randn(*batch, X, X, seed=k) for k, X in enumerate(n))


def stein_lift(A, Q) -> list[Tensor]:
    a, q = (block_diag(*X) for X in arrays((A, Q)))
    return blocks(solve_discrete_lyapunov(np.roll(a, len(Q[0]), axis=0).T, q), Q)


def stein_residual(A, Q, X) -> float:
    following = X[1:] + X[:1]
    equations = zip(A, Q, X, following, strict=True)
    terms = [(a.mT @ Z @ a + q - Y, Y.norm() + q.norm()) for a, q, Y, Z in equations]
    return max(float(defect.norm() / scale) for defect, scale in terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("n", [[3], [2, 4], [3, 1, 2], [4, 2, 5, 1, 3, 3, 2]], ids=str)
def test_stein_agrees_with_the_lift_also_for_a_right_side_that_is_not_symmetric(n, batch, dtype):
    A, Q = make_stein(n, batch)
    found = solve_cyclic_stein(*to(dtype, (A, Q)))
    for i in np.ndindex(batch):
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        assert distance([X[i] for X in found.X], stein_lift(*at(i, (A, Q)))) < tolerance
    assert found.X[0].dtype == dtype and found.result.shape == found.residual.shape == batch
    assert (found.residual < TOL[dtype]).all() and (found.result == SteinResult.SOLVED).all()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.floats(0, 0.8), st.integers(0, 999))
def test_the_residual_of_stein_is_at_rounding_level_on_random_cycles(n, gain, seed):
    A, Q = make_stein(n, gain=gain, seed=seed)
    found = solve_cyclic_stein(A, Q, throw=False)
    loop = torch.linalg.multi_dot([*reversed(A), torch.eye(n[0]).double()])
    if torch.linalg.eigvals(loop).abs().max() < 0.99:
        assert found.result == SteinResult.SOLVED and stein_residual(A, Q, found.X) < 1e-11


def test_stein_of_one_phase_is_the_plain_equation():
    A, Q = make_stein([4], (3,))
    torch.testing.assert_close(solve_cyclic_stein(A, Q).X[0], solve_stein(A[0], Q[0]).X)


@pytest.mark.parametrize("p", [2, 200])
def test_of_stein_only_the_product_decides(p):
    swap = [diagonal(4.0, 0.1), diagonal(0.1, 4.0)]
    A, Q = tuple(swap * (p // 2)), (I2,) * p
    X = solve_cyclic_stein(A, Q).X
    exact = [diagonal(17.0, 1.01) / 0.84, diagonal(1.01, 17.0) / 0.84]
    assert distance(X, exact * (p // 2)) < 1e-13
    grow = torch.tensor([[0.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    found = solve_cyclic_stein((grow, grow.mT) * (p // 2), Q, throw=False)
    assert found.result == SteinResult.UNSTABLE and found.X[0].isnan().all()


@pytest.mark.parametrize("p", [2, 200])
def test_every_failure_of_stein_has_its_code_and_leaves_the_others_exact(p):
    good = make_stein([2] * p, (5,), gain=0.7)
    A, Q = (tuple(X.clone() for X in matrices) for matrices in good)
    for X, Y in zip(A, Q, strict=True):
        X[1], X[2] = diagonal(1.5, 0.5), I2
        Y[1:3] = 0.0  # X = 0 fits
    Q[1][3, 0, 0] = float("inf")
    before, after = solve_cyclic_stein(*good), solve_cyclic_stein(A, Q, throw=False)
    S = SteinResult
    assert after.result.tolist() == [S.SOLVED, S.UNSTABLE, S.UNSTABLE, S.NON_FINITE, S.SOLVED]
    for X, Y in zip(before.X, after.X, strict=True):
        assert Y[1:4].isnan().all() and torch.equal(X[[0, 4]], Y[[0, 4]])
    with pytest.raises(ConvergenceError, match=r"3 of 5 batch elements failed"):
        solve_cyclic_stein(A, Q)
    early = solve_cyclic_stein(constant(2, 0.999 * I2)[0], (I2, I2), max_steps=2, throw=False)
    assert early.result in (S.NOT_CONVERGED, S.UNSTABLE) and early.X[0].isnan().all()


def X_of(*matrices: Tensor) -> tuple[Tensor, ...]:
    return solve_cyclic_stein(*chunks(matrices, len(matrices) // 2)).X


def test_every_derivative_of_stein_is_that_of_the_equation():
    matrices = tuple(X.clone().requires_grad_() for X in flat(make_stein([2, 1, 3])))
    assert gradcheck(X_of, matrices, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(X_of, matrices)
    batch = flat(make_stein([2, 1, 3], (4,)))
    torch.testing.assert_close(torch.func.vmap(X_of)(*batch), X_of(*batch))


@pytest.mark.parametrize(
    "A, Q, message",
    [
        ((I2, I2), (I2,), "Q .*(1|2)"),
        ((), (), "A must"),
        (I2, (I2, I2), "A must be a sequence"),
        ((I2, I2), (I2, ONE), r"(A|Q)\[\d\] must"),
        ((I2[:1], I2), (I2, I2), r"(A|Q)\[\d\] must"),
        ((I2, I2), (I2, I2.float()), r"Q\[1\] must be .*float64"),
        ((I2.long(),) * 2, (I2.long(),) * 2, r"A\[0\] must be float32 or float64"),
    ],
)
def test_misuse_of_stein_names_the_argument(A, Q, message):
    with pytest.raises(ValueError, match=message):
        solve_cyclic_stein(A, Q)
