"""Tests for `deqlqr/riccati.py`, `deqlqr/lqr.py` and `deqlqr/steady_state.py`."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deqlqr import (
    LQR,
    ConvergenceError,
    DareResult,
    Doubling,
    InputCost,
    solve_dare,
    spectral_radius,
    static_step,
    steady_state,
)
from deqlqr.dare import Dare, Eliminated
from deqlqr.doubling import _Full, _Thin
from deqlqr.spectral import closed_loop_radius

from .problems import DTYPES, make_lqr, randn, relative

TOL = {torch.float32: 1e-3, torch.float64: 1e-9}
I2 = torch.eye(2, dtype=torch.float64)
# a = 1/2, b = r = 1, q = -1 in the first state: p^2 + (1 - a^2 - q) p - q = 0 has no real root.
NONE = LQR(I2 / 2, I2[:, :1], torch.diag(torch.tensor([-1.0, 1.0])).double(), I2[:1, :1],
           torch.zeros(1, 2).double(), I2[0] + I2[1], I2[0, :1])  # fmt: skip


def solve(lqr, **options):
    return solve_dare(lqr.A, lqr.B, lqr.Q, lqr.R, lqr.M, **options)


def scipy_dare(lqr):
    arrays = (X.numpy() for X in (lqr.A, lqr.B, lqr.Q, lqr.R))
    return torch.as_tensor(scipy.linalg.solve_discrete_are(*arrays, s=lqr.M.mT.numpy()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rho", [0.5, 1.2], ids=["stable", "unstable"])
@pytest.mark.parametrize("n, m", [(1, 1), (5, 2), (4, 9), (12, 40)])
def test_agrees_with_scipy_and_its_certificate_is_true(n, m, rho, dtype):
    lqr = make_lqr(n, m, rho=rho)
    dare = solve(lqr.to(dtype))
    assert dare.P.dtype == dtype
    assert relative(dare.P.double(), scipy_dare(lqr)) < TOL[dtype]
    A_cl = lqr.A - lqr.B @ dare.K.double()
    radius = torch.linalg.eigvals(A_cl).abs().max()
    assert abs(dare.closed_loop_radius.double() - radius) < 1e-2 and radius < 1
    assert dare.result == DareResult.STABILISING and dare.residual < TOL[dtype]
    assert torch.equal(dare.P, dare.P.mT)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 6), m=st.integers(1, 6), rho=st.floats(0.0, 1.5), seed=st.integers(0, 999))
def test_residual_and_stability_hold_on_random_problems(n, m, rho, seed):
    lqr = make_lqr(n, m, rho=rho, seed=seed)
    dare = solve(lqr)
    P, K = dare.P, dare.K
    mixed = lqr.M + lqr.B.mT @ P @ lqr.A
    scale = max(1.0, float(P.norm()))
    assert ((lqr.R + lqr.B.mT @ P @ lqr.B) @ K - mixed).norm() < 1e-8 * scale * (1 + K.norm())
    assert (lqr.A.mT @ P @ lqr.A + lqr.Q - mixed.mT @ K - P).norm() < 1e-8 * scale
    assert torch.linalg.eigvals(lqr.A - lqr.B @ K).abs().max() < 1


@pytest.mark.parametrize("batch", [(3,), (2, 3)])
def test_a_batch_equals_its_elements(batch):
    lqr = make_lqr(4, 2, batch)
    dare = solve(lqr)
    assert dare.P.shape == (*batch, 4, 4) and dare.result.shape == batch
    for index in np.ndindex(batch):
        alone = solve_dare(*(X[index] for X in (lqr.A, lqr.B, lqr.Q, lqr.R, lqr.M)))
        torch.testing.assert_close(dare.P[index], alone.P, rtol=1e-10, atol=1e-12)


def test_singular_input_cost_is_solved_through_the_exact_shift():
    A, B = torch.tensor([[2.0, -1.0], [1.0, 0.0]]).double(), torch.tensor([[1.0], [0.0]]).double()
    Q, R = torch.diag(torch.tensor([0.0, 1.0])).double(), torch.zeros(1, 1).double()
    torch.testing.assert_close(solve_dare(A, B, Q, R).P, I2)  # DAREX 1.1: P = I


def test_undetectable_unstable_mode_gives_the_stabilising_not_the_minimal_solution():
    A, B = torch.diag(torch.tensor([2.0, 0.5])).double(), torch.ones(2, 1).double()
    dare = solve_dare(A, B, 0 * I2, torch.eye(1).double())
    assert dare.P.norm() > 1  # the minimal solution P = 0 has residual 0 and does not stabilise
    assert torch.linalg.eigvals(A - B @ dare.K).abs().max() < 1


@pytest.mark.parametrize("n, m", [(2, 1), (4, 2), (6, 3), (8, 8)])
def test_a_mode_that_costs_and_is_not_controlled_has_no_solution(n, m):
    A, B = randn(20, n, n) / n**0.5, randn(20, n, m)
    A[:, 0], B[:, 0] = 0, 0
    A[:, 0, 0] = torch.linspace(1.05, 3.0, 20)
    Q, R = torch.eye(n).double().expand(20, n, n), torch.eye(m).double().expand(20, m, m)
    assert (solve_dare(A, B, Q, R, throw=False).result == DareResult.NONE).all()


@pytest.mark.parametrize("n", [1, 3], ids=["full", "thin"])
@pytest.mark.parametrize("b", [1e-4, 1e-7, 1e-10])
def test_a_mode_that_is_hardly_controlled_is_solved(b, n):
    A, B = torch.zeros(n, n).double(), torch.zeros(n, 1).double()
    A[0, 0], B[0, 0] = 1.5, b
    P = solve_dare(A, B, torch.eye(n).double(), torch.ones(1, 1).double()).P
    linear = 1 - 1.5**2 - b**2  # b^2 p^2 + (1 - a^2 - b^2) p - 1 = 0
    exact = (-linear + (linear**2 + 4 * b**2) ** 0.5) / (2 * b**2)
    assert float(P[0, 0]) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_step_by_factors_of_the_controls_is_that_of_the_states(dtype):
    lqr = make_lqr(8, 3, (4,), rho=1.2).to(dtype)
    dare = Dare(lqr.A, lqr.B, lqr.Q, InputCost.of(lqr.R), lqr.M)
    eliminated = Eliminated.of(dare)
    A, G, H = eliminated.A, eliminated.G, eliminated.H
    thin, full = _Thin.of(dare, H), _Full.of(G, H, torch.eye(8, dtype=dtype))
    tol = {torch.float32: 1e-4, torch.float64: 1e-11}[dtype]
    assert relative(thin.loop(A), full.loop(A)) < tol
    assert relative(thin.grown(G, A), full.grown(G, A)) < tol
    kept = torch.tensor([0, 3])
    assert torch.equal(thin.pick(kept).grown(G[kept], A[kept]), thin.grown(G, A)[kept])


def test_every_failure_has_its_code_and_leaves_the_others_exact():
    lqr = make_lqr(2, 1, (5,), rho=0.5)
    A, B, Q, R, M = (X.clone() for X in (lqr.A, lqr.B, lqr.Q, lqr.R, lqr.M))
    A[1], B[1] = torch.diag(torch.tensor([1.5, 0.5])), torch.tensor([[0.0], [1.0]])
    A[2], B[2], Q[2], R[2], M[2] = NONE.A, NONE.B, NONE.Q, NONE.R, NONE.M
    Q[3, 0, 0] = float("nan")
    dare = solve_dare(A, B, Q, R, M, throw=False)
    good, none = DareResult.STABILISING, DareResult.NONE
    assert dare.result.tolist() == [good, none, none, DareResult.NON_FINITE, good]
    assert dare.P[1:4].isnan().all() and dare.K[1:4].isnan().all()
    for i in (0, 4):
        alone = solve_dare(A[i], B[i], Q[i], R[i], M[i])
        assert torch.equal(dare.P[i], alone.P) and torch.equal(dare.K[i], alone.K)
    with pytest.raises(ConvergenceError, match=r"3 of 5 batch elements failed \(elements 1, 2, 3"):
        solve_dare(A, B, Q, R, M)


def test_uncontrolled_mode_on_the_unit_circle_is_no_stabilising_solution():
    A, B = torch.diag(torch.tensor([1.0, 0.5])).double(), torch.tensor([[0.0], [1.0]]).double()
    assert solve_dare(A, B, I2, torch.eye(1).double(), throw=False).result != 0
    zero = solve_dare(A, B, 0 * I2, torch.eye(1).double(), throw=False)
    assert zero.result == DareResult.BOUNDARY


def test_too_few_steps_is_a_failure_not_an_answer():
    dare = solve(make_lqr(5, 2, rho=1.2), solver=Doubling(max_steps=1), throw=False)
    assert dare.result == DareResult.NOT_CONVERGED and dare.P.isnan().all()


CASES = json.loads((Path(__file__).parent / "data" / "dare.json").read_text())


def matrices(case):
    A, B, Q, R = (torch.tensor(case[k], dtype=torch.float64) for k in "ABQR")
    S = case["S"]
    M = B.new_zeros(B.mT.shape) if S is None else torch.tensor(S, dtype=torch.float64).mT
    return A, B, (Q + Q.mT) / 2, (R + R.mT) / 2, M


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_cases_of_the_literature_alone_and_inside_a_batch_of_good_problems(case):
    problem = matrices(case)
    n, m = problem[1].shape
    good = make_lqr(n, m, (2,), rho=1.1)
    beside = [torch.stack([X[0], Y, X[1]]) for X, Y in
              zip((good.A, good.B, good.Q, good.R, good.M), problem, strict=True)]  # fmt: skip
    batch = solve_dare(*beside, throw=False)
    assert batch.stabilising[0] and batch.stabilising[2]
    for dare in (solve_dare(*problem, throw=False), batch):
        result = int(dare.result if dare is not batch else dare.result[1])
        P = dare.P if dare is not batch else dare.P[1]
        if case["expect"] == "stabilizing":
            assert result == DareResult.STABILISING
            exact = torch.tensor(case["P"], dtype=torch.float64)
            assert (P - exact).norm() <= 1e-9 * exact.norm()
        else:
            code = {"none": DareResult.NONE, "boundary": DareResult.BOUNDARY}[case["expect"]]
            assert result == code and P.isnan().all()


def near_the_circle(eps, n=8):
    """A orthogonal, B = R = I, Q = eps^2 I: P = p I with p^2 - eps^2 p - eps^2 = 0."""
    A, _ = torch.linalg.qr(randn(n, n))
    eye = torch.eye(n, dtype=torch.float64)
    p = (eps**2 + (eps**4 + 4 * eps**2) ** 0.5) / 2
    return (A, eye, eps**2 * eye, eye), p * eye


@pytest.mark.parametrize("eps, tolerance", [(1e-2, 1e-13), (5e-5, 1e-11), (1e-6, 1e-9)])
@pytest.mark.parametrize("polish", [None, True])
def test_closed_loops_near_the_unit_circle(eps, tolerance, polish):
    problem, exact = near_the_circle(eps)
    dare = solve_dare(*problem, solver=Doubling(polish=polish))
    assert (dare.P - exact).norm() < tolerance * exact.norm()
    assert 1 - dare.closed_loop_radius == pytest.approx(eps, rel=0.02)


@pytest.mark.parametrize("q", [1e-6, 1e-9, 1e-13])
@pytest.mark.parametrize("slow", [0.99, 0.99999])
def test_slow_modes_of_little_cost_are_not_lost_behind_fast_ones(q, slow):
    a, b, costs = randn(4, seed=1).new_tensor([
        [1.2, 0.3, slow, 0.99 * slow],
        [1.0, 1.0, 1e-3, 1e-3],
        [1.0, 1.0, q, q],
    ])
    half = (1 - a**2 - costs * b**2) / 2  # b^2 p^2 + 2 half p - q = 0
    root = (half**2 + b**2 * costs).sqrt()
    exact = torch.where(half > 0, costs / (root + half), (root - half) / b**2)
    basis, _ = torch.linalg.qr(randn(4, 4))
    turned = lambda d: basis @ torch.diag(d) @ basis.mT
    eye = torch.eye(4, dtype=torch.float64)
    dare = solve_dare(turned(a), basis @ torch.diag(b), turned(costs), eye)
    assert relative(dare.P, turned(exact)) < 1e-16 / (1 - slow**2) * 50


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e3, 1e6])
def test_states_in_other_units_give_the_same_gain(scale):
    lqr = make_lqr(4, 2, rho=1.1)
    T = torch.diag(torch.tensor([1.0, scale, 1.0, scale**0.5], dtype=torch.float64))
    inverse = torch.diag(1 / T.diagonal())
    plain = solve(lqr)
    scaled = solve_dare(
        T @ lqr.A @ inverse, T @ lqr.B, inverse @ lqr.Q @ inverse, lqr.R, lqr.M @ inverse
    )
    assert relative(scaled.K @ T, plain.K) < 1e-6
    assert scaled.closed_loop_radius == pytest.approx(float(plain.closed_loop_radius), rel=1e-2)


@pytest.mark.parametrize("batch, n, m", [((0,), 3, 2), ((2, 0), 3, 2), ((2,), 0, 2), ((), 0, 1)])
def test_empty_problems_have_empty_solutions(batch, n, m):
    zeros = lambda *shape: torch.zeros(*batch, *shape, dtype=torch.float64)
    R = zeros(m, m) + torch.eye(m).double()
    dare = solve_dare(zeros(n, n), zeros(n, m), zeros(n, n), R)
    assert dare.P.shape == (*batch, n, n) and dare.K.shape == (*batch, m, n)
    assert dare.result.shape == batch


@pytest.mark.parametrize("rho", [0.9, 1.2])
def test_float32_is_refined_to_the_digits_of_float64(rho):
    lqr = make_lqr(12, 5, (3,), rho=rho).to(torch.float32)
    exact = solve(lqr.to(torch.float64)).P
    errors = []
    for steps in (0, 1, 2):
        dare = solve(lqr, solver=Doubling(refine=steps), out_dtype=torch.float64)
        assert dare.P.dtype == torch.float64 and dare.stabilising.all()
        errors.append(relative(dare.P, exact))
    assert errors[0] > 1e-9 > 1e-12 > errors[2] and errors[1] < errors[0] / 100
    rounded = solve(lqr)
    assert rounded.P.dtype == torch.float32
    assert relative(rounded.P.double(), exact) < 2 * torch.finfo(torch.float32).eps


def test_refining_rescues_what_float32_alone_cannot_solve():
    problem, _ = near_the_circle(1e-4)
    rounded = [X.float() for X in problem]
    assert solve_dare(*rounded, solver=Doubling(refine=0), throw=False).result != 0
    dare = solve_dare(*rounded, out_dtype=torch.float64)
    assert relative(dare.P, solve_dare(*(X.double() for X in rounded)).P) < 1e-10


def test_float32_that_cannot_be_refined_is_a_failure_not_an_answer():
    problem, _ = near_the_circle(1e-6)  # float32 cannot tell this closed loop from the circle
    dare = solve_dare(*(X.float() for X in problem), throw=False)
    assert dare.result != 0 and dare.P.isnan().all()


def test_polish_lowers_a_residual_and_keeps_nothing_that_does_not():
    lqr = make_lqr(6, 3, (4,), rho=1.1)
    rough = solve(lqr, solver=Doubling(rtol=1e-2, max_steps=4, polish=False), throw=False)
    polished = solve(lqr, solver=Doubling(rtol=1e-2, max_steps=4, polish=True), throw=False)
    assert (polished.residual <= rough.residual).all()
    assert (polished.residual < rough.residual / 100).any()
    best = solve(lqr)
    again = solve(lqr, solver=Doubling(polish=True))
    assert (again.residual <= best.residual).all()


def test_a_warm_start_takes_newton_steps_and_falls_back_where_the_old_gain_fails():
    lqr = make_lqr(6, 3, (4,), rho=1.2)
    start = solve(lqr).P
    start[2] = 0.0  # its gain leaves an unstable A as it is
    A = lqr.A + 1e-3 * randn(4, 6, 6, seed=7)
    warm = solve_dare(A, lqr.B, lqr.Q, lqr.R, lqr.M, P0=start)
    cold = solve_dare(A, lqr.B, lqr.Q, lqr.R, lqr.M)
    assert relative(warm.P, cold.P) < 1e-12 and (warm.residual < 1e-12).all()
    assert (warm.iterations[[0, 1, 3]] <= 4).all() and warm.iterations[2] == cold.iterations[2]
    hopeless = solve_dare(*(X[None] for X in (NONE.A, NONE.B, NONE.Q, NONE.R, NONE.M)),
                          P0=torch.eye(2).double()[None], throw=False)  # fmt: skip
    assert hopeless.result == DareResult.NONE  # the verdict is the fresh solve's
    nan = solve_dare(A, lqr.B, lqr.Q, lqr.R, lqr.M, P0=start * float("nan"))
    assert relative(nan.P, cold.P) < 1e-12
    with pytest.raises(ValueError, match=r"P0 must have shape \(4, 6, 6\)"):
        solve_dare(A, lqr.B, lqr.Q, lqr.R, lqr.M, P0=start[0])


def test_scipy_as_a_method_is_certified_like_the_other():
    lqr = make_lqr(5, 2, (3,), rho=1.2)
    lqr.Q[1, 0, 0] = float("nan")
    by_scipy = solve(lqr, method="scipy", throw=False)
    ours = solve(lqr, throw=False)
    assert by_scipy.result.tolist() == ours.result.tolist() == [0, DareResult.NON_FINITE, 0]
    assert relative(by_scipy.P[[0, 2]], ours.P[[0, 2]]) < 1e-9
    none = solve_dare(NONE.A, NONE.B, NONE.Q, NONE.R, NONE.M, method="scipy", throw=False)
    assert none.result != 0 and none.P.isnan().all()  # SciPy returns a matrix all the same


def test_unknown_options_are_refused():
    lqr = make_lqr(3, 2)
    with pytest.raises(ValueError, match="method must be one of.*'qz'"):
        solve(lqr, method="qz")
    with pytest.raises(ValueError, match="out_dtype must be"):
        solve(lqr, out_dtype=torch.float16)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("A", torch.ones(3, 2).double(), r"A must have shape \(3, 3\)"),
        ("Q", torch.ones(2, 2).double(), r"Q must have shape \(3, 3\)"),
        ("R", torch.ones(1).double(), r"R must have shape \(2, 2\)"),
        ("M", torch.ones(3, 2).double(), r"M must have shape \(2, 3\)"),
        ("B", torch.ones(3).double(), r"B must be a tensor of shape"),
        ("A", torch.ones(3, 3), "A must be torch.float64"),
        ("A", torch.ones(3, 3).long(), "A must be float32 or float64"),
        ("Q", torch.triu(torch.ones(3, 3).double()), "Q must be symmetric"),
        ("R", torch.tensor([[1.0, 2.0], [0.0, 1.0]]).double(), "R must be symmetric"),
        ("A", [[1.0]], "A must have shape"),
    ],
)
def test_misuse_names_the_argument(name, value, message):
    lqr = make_lqr(3, 2)
    arguments = {k: getattr(lqr, k) for k in "ABQRM"} | {name: value}
    with pytest.raises(ValueError, match=message):
        solve_dare(**arguments)


def test_spectral_radius_is_an_upper_bound_and_tight():
    for seed in range(20):
        A = randn(6, 6, seed=seed)
        exact = torch.linalg.eigvals(A).abs().max()
        assert exact * (1 - 1e-12) <= spectral_radius(A) <= exact * 1.002
        assert spectral_radius(A, squarings=26) <= exact * (1 + 1e-6)
    assert spectral_radius(torch.zeros(3, 3)) < 1e-3
    large = torch.full((4, 4), 2.5e307, dtype=torch.float64)
    assert float(spectral_radius(large, squarings=26)) == pytest.approx(1e308)
    assert spectral_radius(torch.tensor([[0.0, 1.0], [0.0, 0.0]])) < 0.1  # nilpotent
    assert spectral_radius(torch.full((2, 2), float("nan"))).isnan()


def test_each_closed_loop_of_a_batch_has_its_radius_whatever_the_others_need():
    radii = torch.tensor([0.2, 0.7, 0.85, 0.93, 1 - 1e-6, 1.0, 1.3, 0.4]).double()
    loops = randn(8, 6, 6)
    loops = loops * (radii / torch.linalg.eigvals(loops).abs().amax(-1))[:, None, None]
    scale = torch.tensor([0.0, 500.0, 0.0, -500.0, 0.0, 0.0, 0.0, 0.0]).double()
    bound, estimate = closed_loop_radius(loops * (-scale).exp()[:, None, None], scale)
    assert ((radii * (1 - 1e-12) <= bound) & (bound <= radii * 1.5)).all()
    assert ((bound < 1) == (radii < 1)).all()
    assert torch.allclose(estimate, radii, rtol=0.02, atol=0)
    assert torch.allclose(estimate[4:7], radii[4:7], rtol=1e-7, atol=0)
    for i in range(8):
        alone = closed_loop_radius(loops[i], torch.zeros(()).double())
        assert torch.allclose(torch.stack(alone), torch.stack([bound[i], estimate[i]]), rtol=1e-9)
    rotation = 0.9 * torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double()
    assert float(closed_loop_radius(rotation, torch.zeros(()))[1]) == pytest.approx(0.9, rel=1e-6)


def fixed_by_elimination(lqr):
    """Solve the KKT system of the static problem: an independent route to u, x and lam."""
    n, m = lqr.n, lqr.m
    K = torch.zeros(2 * n + m, 2 * n + m, dtype=torch.float64)
    x, u, p = slice(0, n), slice(n, n + m), slice(n + m, None)
    eye = torch.eye(n, dtype=torch.float64)
    K[x, x], K[x, u], K[x, p] = lqr.Q, lqr.M.mT, (lqr.A - eye).mT
    K[u, x], K[u, u], K[u, p] = lqr.M, lqr.R, lqr.B.mT
    K[p, x], K[p, u] = lqr.A - eye, lqr.B
    solved = torch.linalg.solve(K, -torch.cat([lqr.a, lqr.b, torch.zeros(n).double()]))
    return solved[u], solved[x]


@pytest.mark.parametrize("rho", [0.3, 0.9, 1.2])
@pytest.mark.parametrize("n, m", [(4, 2), (3, 8)])
def test_steady_state_equals_the_static_step_and_the_dense_kkt_system(n, m, rho):
    lqr = make_lqr(n, m, rho=rho)
    state = steady_state(lqr)
    u, x = fixed_by_elimination(lqr)
    assert relative(state.u, u) < 1e-9 and relative(state.x, x) < 1e-9
    assert relative(static_step(lqr), u) < 1e-9
    torch.testing.assert_close(state.x, lqr.A @ state.x + lqr.B @ state.u)  # (R3)
    dare = solve(lqr)
    lam = lqr.a + lqr.A.mT @ state.lam - dare.K.mT @ (lqr.b + lqr.B.mT @ state.lam)
    torch.testing.assert_close(state.lam, lam)  # (R2)


def test_steady_state_is_where_the_controlled_system_goes():
    lqr = make_lqr(4, 2)
    dare = solve(lqr)
    state = steady_state(lqr, dare)
    drive = state.u + dare.K @ state.x
    x = torch.zeros(4, dtype=torch.float64)
    for _ in range(500):
        x = lqr.A @ x + lqr.B @ (drive - dare.K @ x)
    torch.testing.assert_close(x, state.x)


def test_a_wrong_riccati_matrix_gives_a_wrong_step():
    lqr = make_lqr(4, 2)
    shorter = solve(LQR(lqr.A, lqr.B, 2 * lqr.Q, lqr.R, lqr.M, lqr.a, lqr.b))
    assert relative(steady_state(lqr, shorter).u, static_step(lqr)) > 1e-3


def test_zero_state_cost_gives_minus_the_implicit_gradient():
    lqr = make_lqr(5, 3)
    eye = torch.eye(3, dtype=torch.float64)
    plain = LQR(lqr.A, lqr.B, 0 * lqr.Q, eye, 0 * lqr.M, lqr.a, 0 * lqr.b)
    implicit = lqr.B.mT @ torch.linalg.solve(torch.eye(5).double() - lqr.A.mT, lqr.a)
    assert relative(steady_state(plain).u, -implicit) < 1e-12  # theorem 4.2.1
    assert solve(plain).P.norm() == 0


def test_static_step_survives_where_no_stabilising_solution_exists():
    with pytest.raises(ConvergenceError, match="DARE"):
        steady_state(NONE)
    assert relative(static_step(NONE), fixed_by_elimination(NONE)[0]) < 1e-9  # F4


def test_static_step_reports_a_singular_system():
    lqr = make_lqr(3, 2)
    eye = torch.eye(3).double()
    with pytest.raises(ConvergenceError, match="static step"):
        static_step(LQR(eye, lqr.B, lqr.Q, lqr.R, lqr.M, lqr.a, lqr.b))


def test_lqr_checks_its_shapes_and_types():
    lqr = make_lqr(3, 2)
    parts = {k: getattr(lqr, k) for k in ("A", "B", "Q", "R", "M", "a", "b")}
    with pytest.raises(ValueError, match=r"a must have shape \(3,\)"):
        LQR(**(parts | {"a": lqr.b}))
    with pytest.raises(ValueError, match="R must be torch.float64"):
        LQR(**(parts | {"R": lqr.R.float()}))
    with pytest.raises(ValueError, match="B must have shape"):
        LQR(**(parts | {"B": lqr.b}))
    with pytest.raises(ValueError, match="dare must be of a problem with K"):
        steady_state(lqr, solve(make_lqr(4, 2)))
    damped = lqr.damped(0.5)
    torch.testing.assert_close(damped.R - lqr.R, 0.5 * torch.eye(2).double())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gpu_agrees_with_scipy(dtype):
    lqr = make_lqr(12, 5, rho=1.2)
    on_gpu = [X.to("cuda", dtype) for X in (lqr.A, lqr.B, lqr.Q, lqr.R, lqr.M)]
    dare = solve_dare(*on_gpu)
    assert dare.P.is_cuda
    assert relative(dare.P.double().cpu(), scipy_dare(lqr)) < TOL[dtype]


def test_a_batch_larger_than_a_cache_is_solved_in_pieces_without_a_trace():
    lqr = make_lqr(40, 20, (3, 20), rho=1.05)
    A, B = lqr.A.clone(), lqr.B.clone()
    A[1, 2], B[1, 2] = 2 * torch.eye(40), 0.0
    dare = solve_dare(A, B, lqr.Q, lqr.R, lqr.M, throw=False)
    assert dare.P.shape == (3, 20, 40, 40) and dare.result.shape == (3, 20)
    assert dare.result.nonzero().tolist() == [[1, 2]]
    alone = solve_dare(A[2, 19], B[2, 19], lqr.Q[2, 19], lqr.R[2, 19], lqr.M[2, 19])
    assert relative(dare.P[2, 19], alone.P) < 1e-12
    warm = solve_dare(A, B, lqr.Q, lqr.R, lqr.M, P0=dare.P, throw=False)
    assert relative(warm.P[2], dare.P[2]) < 1e-12 and warm.iterations[2].max() <= 1


@pytest.mark.parametrize("scale", [1e-170, 1e-20, 1e20, 1e160])
@pytest.mark.parametrize("method", ["doubling", "scipy"])
def test_the_scale_of_the_costs_does_not_matter(scale, method):
    lqr = make_lqr(4, 2, rho=1.1)
    plain = solve(lqr)
    scaled = solve_dare(
        lqr.A, lqr.B, scale * lqr.Q, scale * lqr.R, scale * lqr.M, method=method, P0=None
    )
    assert relative(scaled.P / scale, plain.P) < 1e-9 and relative(scaled.K, plain.K) < 1e-9
    warm = solve_dare(lqr.A, lqr.B, scale * lqr.Q, scale * lqr.R, scale * lqr.M, P0=scaled.P)
    assert relative(warm.K, plain.K) < 1e-9


@pytest.mark.parametrize("r", [1e-3, 1e-9, 1e-12])
@pytest.mark.parametrize("options", [{}, {"solver": Doubling(polish=True)}, {"method": "scipy"}])
def test_many_controls_with_a_small_cost_have_an_exact_gain(r, options):
    lqr = make_lqr(3, 20, rho=1.1)
    R = r * torch.eye(20).double()
    dare = solve_dare(lqr.A, lqr.B, lqr.Q, R, **options)
    eye = torch.eye(3).double()
    inner = torch.linalg.solve(r * eye + dare.P @ lqr.B @ lqr.B.mT, dare.P @ lqr.A)
    assert relative(dare.K, lqr.B.mT @ inner) < 1e-11  # (R7) with R = r I


def test_a_singular_neighbour_does_not_change_the_gain_of_others():
    lqr = make_lqr(3, 20, (2,), rho=0.9)
    R = 1e-10 * torch.eye(20).double().repeat(2, 1, 1)
    before = solve_dare(lqr.A, lqr.B, lqr.Q, R)
    R[1, 3, 3] = 0.0
    after = solve_dare(lqr.A, lqr.B, lqr.Q, R, throw=False)
    assert relative(after.K[0], before.K[0]) < 1e-12


def test_a_warm_start_never_outlives_its_certificate():
    g = torch.Generator().manual_seed(5)
    rand = lambda *shape: torch.randn(300, *shape, generator=g)
    A, B = 1.5 * rand(4, 4), rand(4, 1)
    Q, R = torch.eye(4).expand(300, 4, 4), torch.eye(1).expand(300, 1, 1)
    start = solve_dare(A, B, Q, R, throw=False).P * 1.02
    dare = solve_dare(A, B, Q, R, P0=start, solver=Doubling(refine=0), throw=False)
    assert (dare.residual[dare.stabilising] <= 1e-4).all()
    assert (dare.closed_loop_radius[dare.stabilising] < 1).all()


def test_no_controls_and_controls_out_of_order_are_refused():
    eye = torch.eye(2)
    with pytest.raises(ValueError, match="B must have at least one column"):
        solve_dare(eye / 2, torch.zeros(2, 0), eye, torch.zeros(0, 0))
    cost = InputCost(torch.ones(2), torch.tensor([1, 0]), eye)
    with pytest.raises(ValueError, match="R.coupled must be in increasing order"):
        solve_dare(eye / 2, eye, eye, cost)
