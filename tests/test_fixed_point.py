"""Tests for `deqlqr/fixed_point.py`."""

import pytest
import torch

from deqlqr import Anderson, ConvergenceError, FixedPointResult, Picard, TorchDEQ, fixed_point

from .problems import DTYPES, linear_map, randn

NAMES = ("anderson", "picard", "torchdeq:anderson", "torchdeq:broyden")


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
