"""Tests for `deqlqr/fixed_point.py`, the solvers and their loop."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deqlqr import (
    Anderson,
    Broyden,
    ConvergenceError,
    DenseBlock,
    Fallback,
    FixedPointResult,
    NewtonKrylov,
    Picard,
    TorchDEQ,
    fixed_point,
)

from .problems import DTYPES, linear_map, randn, relative

OURS = ("anderson", "picard", "broyden", "newton-krylov", "fallback")
NAMES = (*OURS, "torchdeq:anderson", "torchdeq:broyden")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*NAMES, "torchdeq:fixed_point_iter"])
def test_solution_is_the_fixed_point_and_its_certificate_is_true(name, dtype):
    A, c = linear_map(0.5)
    A, c = A.to(dtype), c.to(dtype)
    tol = 1e-4 if dtype == torch.float32 else 1e-8
    f = lambda z: z @ A + c
    solution = fixed_point(f, torch.zeros_like(c), solver=name, tol=tol, max_steps=200)
    exact = torch.linalg.solve(torch.eye(20, dtype=dtype) - A, c.mT).mT
    assert solution.converged.all()
    assert (solution.value - exact).norm() < 10 * tol * exact.norm()
    residual = (f(solution.value) - solution.value).norm(dim=-1)
    torch.testing.assert_close(solution.residual, residual, rtol=1e-2, atol=tol * 1e-2)
    assert (residual <= tol * f(solution.value).norm(dim=-1).clamp(min=1)).all()


def test_simple_torchdeq_iteration_is_certified_too():
    A, c = linear_map(0.5)
    solution = fixed_point(
        lambda z: z @ A + c, torch.zeros_like(c), solver="torchdeq:simple_fixed_point_iter",
        max_steps=60,
    )  # fmt: skip
    assert solution.converged.all()


@pytest.mark.parametrize("rho", [0.3, 0.5, 0.8, 0.9, 0.95, 0.99])
def test_anderson_never_needs_more_evaluations_than_plain_iteration(rho):
    A, c = linear_map(rho, batch=8)
    counts = {}
    for solver in (Anderson(tol=1e-6, max_steps=5000), Picard(tol=1e-6, max_steps=5000)):
        counts[type(solver)] = fixed_point(lambda z: z @ A + c, 0 * c, solver=solver).evaluations
    assert (counts[Anderson] <= counts[Picard]).all()


def contractive_blocks():
    """Yield maps f(z, x) with inputs: tanh and relu; symmetric, orthogonal and triangular."""
    n = 60
    for activation in (torch.tanh, torch.relu):
        for rho in (0.5, 0.9, 0.99):
            for kind in ("normal", "rotation", "triangular"):
                W = randn(n, n, seed=3)
                if kind == "rotation":
                    W = torch.linalg.qr(W)[0]
                elif kind == "triangular":
                    W = torch.triu(W)
                W = W * rho / torch.linalg.matrix_norm(W, 2)
                f = lambda z, x, W=W, activation=activation: activation(z @ W.mT + x)
                yield f"{activation.__name__} {rho} {kind}", f, 0.5 * randn(8, n, seed=5)


@pytest.mark.parametrize(
    "name, f, x", list(contractive_blocks()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_anderson_needs_no_more_than_plain_iteration_and_little_more_than_broyden(name, f, x):
    counts = {
        type(s): fixed_point(f, 0 * x, inputs=(x,), solver=s).evaluations.double()
        for s in (Anderson(tol=1e-8), Picard(tol=1e-8), Broyden(tol=1e-8))
    }
    assert counts[Anderson].sum() <= counts[Picard].sum()
    assert counts[Anderson].mean() <= 1.3 * counts[Broyden].mean()


def test_samples_that_are_done_leave_the_batch():
    n = 50
    turn = torch.linalg.qr(randn(n, n))[0]
    rate, x = torch.linspace(0.1, 0.99, 64, dtype=torch.float64)[:, None], 0.1 * randn(64, n)
    f = lambda z, x, rate: torch.tanh(rate * (z @ turn)) + x
    for solver in ("picard", "anderson", "broyden"):
        found = fixed_point(f, 0 * x, inputs=(x, rate), solver=solver, tol=1e-6, max_steps=1000)
        assert found.converged.all()
        assert found.rows <= 1.1 * int(found.evaluations.sum())
        assert (f(found.value, x, rate) - found.value).norm(dim=-1).max() < 1e-5


def test_a_sample_alone_gives_what_it_gives_in_company():
    x = 0.5 * randn(6, 12)
    W = torch.linalg.qr(randn(12, 12, seed=2))[0] * 0.95
    f = lambda z, x: torch.tanh(z @ W + x)
    bad = torch.cat([x[:3], torch.full_like(x[:1], torch.nan), x[3:]])
    for solver in OURS:
        solve = lambda x, s=solver: fixed_point(
            f, 0 * x.nan_to_num(), inputs=(x,), solver=s, throw=False
        )
        together, spoilt = solve(x), solve(bad)
        keep = [0, 1, 2, 4, 5, 6]
        assert spoilt.result[3] == FixedPointResult.NON_FINITE
        assert relative(spoilt.value[keep], together.value) < 1e-9
        # BLAS rounds differently for another number of rows, which Broyden's updates amplify.
        more = (spoilt.evaluations[keep] - together.evaluations).abs().max()
        assert more <= (2 if solver == "broyden" else 0)
        for i in range(6):
            alone = solve(x[i : i + 1])
            assert relative(alone.value[0], together.value[i]) < 1e-9


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000), n=st.integers(1, 12), batch=st.integers(1, 5),
    norm=st.floats(0.05, 0.95), activation=st.sampled_from(["tanh", "relu"]),
)  # fmt: skip
def test_solvers_agree_on_random_contractive_blocks(seed, n, batch, norm, activation):
    torch.manual_seed(seed)
    block = DenseBlock(n, activation=activation, gain=norm).double()
    x = randn(batch, n, seed=seed)
    z0 = torch.zeros_like(x)
    solve = lambda s, x, z0: fixed_point(
        block, z0, inputs=(x,), solver=s, max_steps=2000, throw=False
    )
    found = {s: solve(s, x, z0) for s in ("picard", "anderson", "broyden")}
    for solution in found.values():
        assert solution.converged.all()
        gap = (solution.value - found["picard"].value).norm(dim=-1)
        assert (gap <= 1e-8 * (1 + solution.value.norm(dim=-1))).all()
    spoilt = torch.cat([x, torch.full((1, n), torch.nan, dtype=x.dtype)])
    for s, solution in found.items():
        again = solve(s, spoilt, torch.cat([z0, z0[:1]]))
        assert again.result[-1] == FixedPointResult.NON_FINITE
        assert (again.value[:-1] - solution.value).norm() <= 1e-8 * (1 + solution.value.norm())


@pytest.mark.parametrize("solver", OURS)
def test_maps_that_mix_samples_are_solved_as_one(solver):
    x = randn(8, 3) * torch.linspace(0, 1, 8, dtype=torch.float64)[:, None] ** 8
    f = lambda z, x: 0.4 * (z + z.roll(1, 0)) + x
    found = fixed_point(f, 0 * x, inputs=(x,), solver=solver, throw=False, max_steps=400)
    assert found.converged.all()
    assert (f(found.value, x) - found.value).norm() < 1e-9


def test_a_map_that_insists_on_the_whole_batch_is_given_it():
    x, rate = randn(8, 3), torch.linspace(0, 0.9, 8, dtype=torch.float64)[:, None]
    found = fixed_point(lambda z, x: rate * z + x, 0 * x, inputs=(x,), solver="picard")
    assert relative(found.value, x / (1 - rate)) < 1e-8
    assert found.rows >= 8 * int(found.evaluations.max())


def test_newton_finds_fixed_points_that_repel_and_the_chain_falls_back_to_it():
    S = randn(10, 10)
    W, x = 1.5 * (S - S.mT), randn(6, 10, seed=1)
    f = lambda z, x: torch.tanh(z @ W) + x
    plain = fixed_point(f, 0 * x, inputs=(x,), solver="picard", throw=False)
    assert not plain.converged.all()
    newton = fixed_point(f, 0 * x, inputs=(x,), solver="newton-krylov")
    chain = fixed_point(f, 0 * x, inputs=(x,), solver="fallback")
    first = fixed_point(f, 0 * x, inputs=(x,), solver="anderson", throw=False)
    assert newton.converged.all() and chain.converged.all() and not first.converged.all()
    assert (chain.evaluations >= first.evaluations).all()
    assert torch.equal(chain.evaluations[first.converged], first.evaluations[first.converged])
    whole = fixed_point(lambda z: f(z, x), 0 * x, solver="fallback")
    assert whole.converged.all()


@pytest.mark.parametrize("memory, period", [(15, 5), (12, 3), (7, 5), (4, 6)])
def test_anderson_extrapolates_at_once_where_a_residual_rises(memory, period):
    solver = Anderson(memory=memory, period=period, max_steps=500)
    for rho in (1.3, 2.0, 3.0):
        A, c = linear_map(rho, batch=6, n=6)
        c[3:] = 0.0  # at its fixed point already: has left when the others rise
        found = fixed_point(lambda z, c, A=A: z @ A + c, 0 * c, inputs=(c,), solver=solver)
        exact = torch.linalg.solve(torch.eye(6).double() - A, c.mT).mT
        assert relative(found.value, exact) < 1e-7
    # Those that converge do not notice those whose residuals rise beside them.
    rate = torch.tensor([0.2, 0.3, 1.0, 0.25]).double()[:, None]
    A, c = linear_map(3.0, batch=4, n=6)
    f = lambda z, c, rate: rate * (z @ A) + c
    together = fixed_point(f, 0 * c, inputs=(c, rate), solver=solver, throw=False)
    rate[2] = 0.1
    apart = fixed_point(f, 0 * c, inputs=(c, rate), solver=solver)
    assert torch.equal(together.evaluations[[0, 1, 3]], apart.evaluations[[0, 1, 3]])
    assert relative(together.value[[0, 1, 3]], apart.value[[0, 1, 3]]) < 1e-12


def iterates_of_anderson(f, z, memory, period, tol, steps):
    """Return the iterates of the docstring's schedule, by least squares on lists."""
    zs, fs, turn = [], [], 0
    for step in range(1, steps + 1):
        zs.append(z)
        fs.append(f(z))
        sizes = [float((b - a).norm()) for a, b in zip(zs, fs, strict=True)]
        enough = tol * max(1.0, float(fs[-1].norm()))
        if sizes[-1] <= enough:
            break
        z, known = fs[-1], step - 1
        if known - turn == period or (turn == 0 and known == 2):
            turn = known
            if sizes[-1] ** 2 > min(sizes[:-1]) * enough:
                dF = torch.stack([b - a for a, b in zip(fs, fs[1:], strict=False)][-memory:])
                r = [b - a for a, b in zip(zs, fs, strict=True)]
                dR = torch.stack([b - a for a, b in zip(r, r[1:], strict=False)][-memory:])
                z = fs[-1] - torch.linalg.lstsq(dR.mT, r[-1][:, None]).solution[:, 0] @ dF
    return torch.stack(zs)


@pytest.mark.parametrize(
    "memory, period", [(16, 4), (3, 4), (4, 4), (5, 2), (2, 3), (1, 4), (4, 1)]
)
def test_anderson_follows_its_schedule(memory, period):
    W = torch.linalg.qr(randn(40, 40, seed=3))[0]
    x, tol = 0.5 * randn(40), 1e-5
    f = lambda z: torch.tanh(0.8 * z @ W + x)
    seen = []

    def noting(z):
        seen.append(z[0].clone())
        return f(z)

    solver = Anderson(memory=memory, period=period, tol=tol)
    found = fixed_point(noting, torch.zeros(1, 40).double(), solver=solver)
    expected = iterates_of_anderson(f, torch.zeros(40).double(), memory, period, tol, 200)
    assert int(found.evaluations) == len(expected) == len(seen) > 8
    assert relative(torch.stack(seen), expected) < 1e-9


def test_a_restart_below_every_rise_is_no_error():
    W = 1.03 * torch.linalg.qr(randn(8, 8))[0]
    x = randn(2, 8)
    solver = Anderson(restart_ratio=1.02, max_steps=60)
    found = fixed_point(lambda z, x: z @ W + x, 0 * x, inputs=(x,), solver=solver, throw=False)
    assert (found.residual <= x.norm(dim=-1)).all()


def test_what_is_enough_and_what_is_no_better_are_seen_at_once():
    zero, solve = torch.zeros(1, 1).double(), fixed_point
    enough = solve(lambda z: z + 0.5, zero, solver=Picard(tol=0.5))  # as large as the tolerance
    assert int(enough.evaluations) == 1
    larger = solve(lambda z: z + 1.0, zero, solver=Picard(tol=0.1))  # enough above the best
    assert int(larger.evaluations) == 10
    f = lambda z: z - z.sign() * z.abs().sqrt()  # a whole step leaves the residual as it is
    halved = solve(f, zero + 0.25, solver=NewtonKrylov())
    assert int(halved.evaluations) < 10
    lost = solve(lambda z: 1e30 * z + 1e30, zero.float() + 1, solver=Picard(), throw=False)
    assert float(lost.value) == 1.0 and lost.result[0] == FixedPointResult.NON_FINITE


def test_rows_that_are_done_leave_before_they_cost_much():
    A, c = linear_map(0.99, batch=64, n=30)
    rate = torch.full((64, 1), 0.1).double()
    rate[::2] = 1.0  # one half needs many times the evaluations of the other
    f = lambda z, c, rate: rate * (z @ A) + c
    for solver in ("picard", "anderson", "broyden"):
        found = fixed_point(f, 0 * c, inputs=(c, rate), solver=solver, max_steps=3000)
        assert found.rows <= 1.06 * int(found.evaluations.sum()) + 8


def test_damping_makes_an_oscillating_iteration_converge():
    f = lambda z: 1.0 - 1.3 * z
    z0 = torch.zeros(2, 3, dtype=torch.float64)
    assert not fixed_point(f, z0, solver="picard", throw=False).converged.any()
    found = fixed_point(f, z0, solver=Picard(relaxation=0.5))
    assert relative(found.value, torch.full_like(z0, 1 / 2.3)) < 1e-9


def test_broyden_goes_on_when_its_memory_is_used_up():
    A, c = linear_map(0.95)
    found = fixed_point(lambda z: z @ A + c, 0 * c, solver=Broyden(memory=4), max_steps=1000)
    assert relative(found.value, torch.linalg.solve(torch.eye(20).double() - A, c.mT).mT) < 1e-8


def test_a_tolerance_below_rounding_or_a_cycle_is_a_stall():
    W, x = (0.9 * torch.linalg.qr(randn(30, 30))[0]).float(), randn(4, 30).float()
    stalled = fixed_point(
        lambda z, x: torch.tanh(z @ W + x), 0 * x, inputs=(x,), tol=1e-12, throw=False,
        max_steps=2000,
    )  # fmt: skip
    assert set(stalled.result.tolist()) <= {FixedPointResult.STALLED, FixedPointResult.CONVERGED}
    assert (stalled.result == FixedPointResult.STALLED).any() and stalled.residual.max() < 1e-5
    cycle = fixed_point(lambda z: 1 - z, torch.zeros(1, 2), solver="picard", throw=False)
    assert cycle.result.tolist() == [FixedPointResult.STALLED] and cycle.evaluations <= 100


@pytest.mark.parametrize("solver", OURS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_states_are_solved(solver, dtype):
    x = randn(5, 16).to(dtype)
    W = (torch.linalg.qr(randn(16, 16))[0] * 0.7).to(dtype)
    found = fixed_point(lambda z, x: torch.tanh(z @ W + x), 0 * x, inputs=(x,), solver=solver)
    exact = fixed_point(
        lambda z, x: torch.tanh(z @ W.double() + x), 0 * x.double(), inputs=(x.double(),)
    ).value
    assert found.value.dtype == dtype and relative(found.value.double(), exact) < 0.1


def test_states_may_be_tuples_of_tensors():
    u, v = randn(3, 4), randn(3, 2, 2, seed=1)
    f = lambda z, x: (0.5 * torch.cos(z[0]) + x, 0.3 * z[1] + z[0].reshape(3, 2, 2))
    start = (torch.zeros_like(u), torch.zeros_like(v))
    found = fixed_point(lambda z: f(z, u), start)
    assert isinstance(found.value, tuple)
    for a, b in zip(found.value, f(found.value, u), strict=True):
        assert (a - b).norm() < 1e-8
    with pytest.raises(ValueError, match=r"expected \[\(3, 4\), \(3, 2, 2\)\], got \(3, 4\)"):
        fixed_point(lambda z: z[0], start)
    with pytest.raises(ValueError, match="z0 must have one batch size, dtype and device"):
        fixed_point(lambda z: z, (torch.zeros(2, 3), torch.zeros(3, 3)))


def test_solvers_are_values():
    for solver in (Anderson(), Picard(), Broyden(), NewtonKrylov(), Fallback(), TorchDEQ()):
        assert pickle.loads(pickle.dumps(solver)) == solver
    with pytest.raises(TypeError, match="Anderson has no option 'memroy'; did you mean 'memory'"):
        Anderson(memroy=3)


def test_one_step_is_one_evaluation():
    found = fixed_point(torch.cos, torch.zeros(2, 3), max_steps=1, throw=False)
    assert found.result.tolist() == [FixedPointResult.MAX_STEPS] * 2
    assert found.evaluations.tolist() == [1, 1]


def test_evaluations_are_counted_per_sample():
    A, c = linear_map(0.9)
    rates = torch.tensor([0.1, 0.5, 1.0, 0.0])[:, None]
    calls = []
    f = lambda z: calls.append(1) or rates * (z @ A) + c
    solution = fixed_point(f, torch.zeros_like(c), solver="picard", tol=1e-8, max_steps=500)
    assert solution.evaluations.max() == len(calls)
    assert solution.evaluations[3] < solution.evaluations[0] < solution.evaluations[1]


@pytest.mark.parametrize("solver", [Anderson(max_steps=300), Picard(max_steps=300)], ids=str)
def test_every_code_is_reported_and_a_bad_sample_leaves_the_others_as_they_are(solver):
    A, c = linear_map(0.5)
    good = fixed_point(lambda z: z @ A + c, torch.zeros_like(c), solver=solver)

    def f(z):
        fz = z @ A + c
        diverging = z[1:2] ** 2 + z[1:2] + 1  # no real fixed point
        return torch.cat([fz[:1], diverging, fz[2:3] / 0.0, fz[3:]])

    solution = fixed_point(f, torch.zeros_like(c), solver=solver, throw=False)
    codes = solution.result.tolist()
    assert codes[0] == codes[3] == FixedPointResult.CONVERGED
    assert codes[1] in (FixedPointResult.DIVERGED, FixedPointResult.STALLED)
    assert codes[2] == FixedPointResult.NON_FINITE
    assert torch.equal(solution.value[[0, 3]], good.value[[0, 3]])
    assert torch.equal(solution.evaluations[[0, 3]], good.evaluations[[0, 3]])
    assert solution.value.isfinite().all()
    with pytest.raises(ConvergenceError, match=r"2 of 4 batch elements failed \(elements 1, 2\)"):
        fixed_point(f, torch.zeros_like(c), solver=solver)


def test_plain_iteration_reports_divergence_and_exhaustion():
    solve = lambda rate, steps: fixed_point(
        lambda z: rate * z + 1, torch.zeros(1, 2), solver=Picard(max_steps=steps), throw=False
    )
    assert solve(1.5, 200).result.tolist() == [FixedPointResult.DIVERGED]
    assert solve(0.999, 20).result.tolist() == [FixedPointResult.MAX_STEPS]
    assert solve(0.999, 20).evaluations.tolist() == [20]


def test_no_gradient_is_recorded_and_the_state_keeps_its_shape():
    z0 = randn(2, 3, 4, 4).requires_grad_()
    solution = fixed_point(lambda z: 0.5 * z.cos(), z0)
    assert solution.value.shape == z0.shape and not solution.value.requires_grad


def test_scalar_states_and_an_empty_batch_are_allowed():
    assert fixed_point(torch.cos, torch.zeros(3)).converged.all()
    assert fixed_point(torch.cos, torch.zeros(0, 3)).value.shape == (0, 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fixed_point(torch.cos, torch.zeros(2, 3), solver="newton"), "solver must be one"),
        (lambda: fixed_point(torch.cos, torch.zeros(2, 3), solver=3), "solver must be a name or"),
        (lambda: fixed_point(torch.cos, torch.zeros(2, 3), tol=-1.0), "tol must be positive"),
        (lambda: fixed_point(torch.cos, torch.zeros(2, 3), max_steps=0), "max_steps must be at"),
        (lambda: fixed_point(torch.cos, torch.zeros(2, 3), max_steps=2.5), "max_steps must be an"),
        (lambda: fixed_point(torch.cos, torch.zeros(2, 3).long()), "z0 must be a floating-point"),
        (lambda: fixed_point(lambda z: z[:, :1], torch.zeros(2, 3)), "f must keep the shape of z"),
        (lambda: Anderson(memory=0), "memory must be at least 1"),
        (lambda: Anderson(ridge=-1.0), "ridge must be at least 0, got -1.0"),
        (lambda: Anderson(period=0), "period must be at least 1"),
        (lambda: Broyden(memory=0), "memory must be at least 1"),
        (lambda: Picard(relaxation=1.5), r"relaxation must lie in \(0, 1\]"),
        (lambda: Picard(patience=0), "patience must be at least 1"),
        (
            lambda: fixed_point(torch.add, torch.zeros(2, 3), inputs=(torch.zeros(3, 3),)),
            r"inputs\[0\] must be a tensor of batch size 2, got \(3, 3\)",
        ),
        (
            lambda: fixed_point(torch.cos, torch.zeros(2, 3), solver="andersen"),
            "Did you mean 'anderson'",
        ),
        (lambda: TorchDEQ(name="newton"), "name must be one of"),
    ],
)
def test_misuse_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_torchdeq_failure_is_our_exception():
    with pytest.raises(ConvergenceError):
        fixed_point(lambda z: 1e30 * (z + 1) ** 3, torch.ones(2, 3), solver="torchdeq:anderson")


@pytest.mark.gpu
def test_fixed_point_on_the_gpu_agrees_with_the_cpu():
    A, c = linear_map(0.9)
    on = lambda device: fixed_point(
        lambda z: z @ A.to(device) + c.to(device), torch.zeros_like(c, device=device), tol=1e-9
    ).value.cpu()
    torch.testing.assert_close(on("cuda"), on("cpu"), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("solver", ["anderson", "picard", "broyden"])
def test_a_solution_is_a_tensor_of_its_own(solver):
    x, z0 = randn(4, 3), torch.zeros(4, 3).double()
    given = fixed_point(lambda z, x: x, z0, inputs=(x,), solver=solver).value
    kept = fixed_point(lambda z: z, z0, solver=solver).value
    before = x.clone()
    given.add_(1.0), kept.add_(1.0)
    assert torch.equal(x, before) and not z0.any()
