"""Tests for `deqlqr/stein.py`."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from deqlqr import ConvergenceError, SteinResult, solve_stein

from .problems import DTYPES, randn, relative

TOL = {torch.float32: 1e-5, torch.float64: 1e-12}


def stable(n: int, *batch: int, rho: float = 0.8, seed: int = 0) -> Tensor:
    A = randn(*batch, n, n, seed=seed)
    return A * rho / torch.linalg.eigvals(A).abs().amax(-1)[..., None, None]


def X_of(A: Tensor, Q: Tensor) -> Tensor:
    return solve_stein(A, Q).X


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_agrees_with_scipy_also_for_a_right_side_that_is_not_symmetric(batch, dtype):
    A, Q = stable(5, *batch), randn(*batch, 5, 5, seed=1)
    found = solve_stein(A.to(dtype), Q.to(dtype))
    assert found.X.dtype == dtype and found.result.shape == batch
    for i in np.ndindex(batch):
        exact = scipy.linalg.solve_discrete_lyapunov(A[i].mT.numpy(), Q[i].numpy())
        assert relative(found.X[i].double(), torch.as_tensor(exact)) < TOL[dtype]
    assert (found.residual < TOL[dtype]).all() and (found.result == SteinResult.SOLVED).all()


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 7), rho=st.floats(0.0, 0.999), seed=st.integers(0, 999))
def test_the_residual_is_at_rounding_level_on_random_problems(n, rho, seed):
    A, Q = stable(n, rho=rho, seed=seed), randn(n, n, seed=seed + 1)
    X = X_of(A, Q)
    assert (A.mT @ X @ A + Q - X).norm() <= 1e-11 * (X.norm() + Q.norm())


def test_squaring_converges_quadratically():
    steps = [int(solve_stein(stable(4, rho=r), torch.eye(4).double()).iterations)
             for r in (0.5, 0.5**0.5, 0.5**0.25)]  # fmt: skip
    assert steps[1] - steps[0] in (0, 1, 2) and steps[2] - steps[1] in (0, 1, 2)
    assert solve_stein(0 * stable(4), torch.eye(4).double()).iterations == 0


def test_every_derivative_is_that_of_the_equation():
    A, Q = stable(3, 2).requires_grad_(), randn(2, 3, 3, seed=1).requires_grad_()
    assert gradcheck(X_of, (A, Q), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(X_of, (A, Q))


def test_the_gradient_equals_the_one_through_the_unrolled_sum():
    A, Q = stable(3, rho=0.5).requires_grad_(), randn(3, 3, seed=1).requires_grad_()
    X = Q
    for _ in range(80):
        X = A.mT @ X @ A + Q
    weights = randn(3, 3, seed=2)
    unrolled = torch.autograd.grad((X * weights).sum(), (A, Q))
    ours = torch.autograd.grad((X_of(A, Q) * weights).sum(), (A, Q))
    for a, b in zip(ours, unrolled, strict=True):
        assert relative(a, b) < 1e-12


def test_torch_func_goes_through_it():
    A, Q = stable(3, 4), randn(4, 3, 3, seed=1)
    torch.testing.assert_close(torch.func.vmap(X_of)(A, Q), X_of(A, Q))
    shared = torch.func.vmap(X_of, in_dims=(None, 1), out_dims=1)(A[0], Q.movedim(0, 1))
    torch.testing.assert_close(shared[:, 2], X_of(A[0], Q[2]))
    square = lambda A, Q: X_of(A, Q).square().sum()
    each = torch.func.vmap(torch.func.grad(square))(A, Q)
    leaf = A.clone().requires_grad_()
    square(leaf, Q).backward()
    torch.testing.assert_close(each, leaf.grad)
    _, tangent = torch.func.jvp(lambda A: X_of(A, Q), (A,), (Q,))
    step = 1e-6
    torch.testing.assert_close(
        tangent, (X_of(A + step * Q, Q) - X_of(A - step * Q, Q)) / (2 * step), rtol=1e-5, atol=1e-5
    )


def test_every_failure_has_its_code_and_leaves_the_others_exact():
    A, Q = stable(3, 5, rho=0.9), randn(5, 3, 3, seed=1)
    A[1] *= 1.5
    A[2] = torch.eye(3)
    Q[3, 0, 0] = float("inf")
    found = solve_stein(A, Q, throw=False)
    S = SteinResult
    assert found.result.tolist() == [S.SOLVED, S.UNSTABLE, S.UNSTABLE, S.NON_FINITE, S.SOLVED]
    assert found.X[1:4].isnan().all()
    for i in (0, 4):
        assert torch.equal(found.X[i], X_of(A[i], Q[i]))
    with pytest.raises(ConvergenceError, match=r"Stein equation: 3 of 5 .*\(elements 1, 2, 3\)"):
        solve_stein(A, Q)
    early = solve_stein(stable(3, rho=0.99), Q[0], max_steps=2, throw=False)
    assert early.result in (S.NOT_CONVERGED, S.UNSTABLE) and early.X.isnan().all()


def test_a_zero_right_side_does_not_hide_an_unstable_matrix():
    found = solve_stein(2 * torch.eye(2), torch.zeros(2, 2), throw=False)
    assert found.result == SteinResult.UNSTABLE and found.X.isnan().all()


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 0), (0, 0)], ids=str)
def test_empty_problems_have_empty_solutions(shape):
    assert solve_stein(torch.zeros(shape), torch.zeros(shape)).X.shape == shape


@pytest.mark.parametrize(
    "A, Q, message",
    [
        ([[1.0]], torch.eye(1), "A must be a tensor of shape"),
        (torch.ones(2, 3), torch.eye(2), "A must be a tensor of shape"),
        (torch.eye(2), torch.ones(2), "Q must be a tensor of shape"),
        (torch.eye(2), torch.eye(3), r"Q must be \(2, 2\)"),
        (torch.eye(2), torch.eye(2).double(), "Q must be .*float32"),
        (torch.eye(2).long(), torch.eye(2).long(), "A must be float32 or float64"),
    ],
)
def test_misuse_names_the_argument(A, Q, message):
    with pytest.raises(ValueError, match=message):
        solve_stein(A, Q)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gpu_agrees_with_the_cpu(dtype):
    A, Q = stable(6, 10).to(dtype), randn(10, 6, 6, seed=1).to(dtype)
    X = solve_stein(A.cuda(), Q.cuda()).X
    assert X.is_cuda and relative(X.cpu().double(), X_of(A.double(), Q.double())) < TOL[dtype]
