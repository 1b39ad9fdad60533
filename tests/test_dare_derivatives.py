"""Tests for the derivatives of `solve_dare` (R9), (R10)."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from deqlqr import LQR, InputCost, solve_dare, solve_stein, steady_state

from .problems import make_lqr, randn, relative


def half(X: Tensor) -> Tensor:
    """Return the lower triangle of a symmetric X as a vector: its free entries."""
    i, j = torch.tril_indices(X.shape[-1], X.shape[-1])
    return X[..., i, j]


def full(v: Tensor, n: int) -> Tensor:
    i, j = torch.tril_indices(n, n)
    X = v.new_zeros(*v.shape[:-1], n, n)
    X[..., i, j] = v
    return X + X.mT - torch.diag_embed(X.diagonal(dim1=-2, dim2=-1))


def pieces(lqr: LQR) -> tuple[Tensor, ...]:
    return lqr.A, lqr.B, lqr.Q, lqr.R, lqr.M


def P_and_K(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    dare = solve_dare(*arguments)
    return dare.P, dare.K


@pytest.mark.parametrize("n, m, rho", [(1, 1, 0.5), (3, 2, 1.1), (2, 5, 0.9)])
def test_first_and_second_derivatives_of_P_and_K(n, m, rho):
    lqr = make_lqr(n, m, (2,), rho=rho)

    def function(A: Tensor, B: Tensor, q: Tensor, r: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
        return P_and_K(A, B, full(q, n), full(r, m), M)

    free = (lqr.A, lqr.B, half(lqr.Q), half(lqr.R), lqr.M)
    free = tuple(X.clone().requires_grad_() for X in free)
    assert gradcheck(function, free, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, free, fast_mode=m > n)


def test_the_gradient_equals_the_one_through_the_riccati_recursion():
    lqr = make_lqr(4, 2, rho=0.6)
    arguments = tuple(X.clone().requires_grad_() for X in pieces(lqr))
    A, B, Q, R, M = arguments
    Q, R = (Q + Q.mT) / 2, (R + R.mT) / 2
    P = torch.zeros_like(Q)
    for _ in range(200):
        mixed = M + B.mT @ P @ A
        P = A.mT @ P @ A + Q - mixed.mT @ torch.linalg.solve(R + B.mT @ P @ B, mixed)
    weights = randn(4, 4)
    weights = weights + weights.mT
    unrolled = torch.autograd.grad((P * weights).sum(), arguments)
    ours = torch.autograd.grad((solve_dare(*arguments).P * weights).sum(), arguments)
    for a, b in zip(ours, unrolled, strict=True):
        assert (
            relative(a, (b + b.mT) / 2 if b.shape == b.mT.shape and a is not ours[0] else b) < 1e-9
        )


def test_derivatives_are_found_where_doubling_needs_its_shift():
    A = torch.diag(torch.tensor([2.0, 0.5])).double().requires_grad_()
    B, Q = torch.ones(2, 1).double(), torch.zeros(2, 2).double()
    assert gradcheck(lambda A: P_and_K(A, B, Q, torch.eye(1).double()), (A,))


def test_torch_func_goes_through_it():
    lqr = make_lqr(3, 2, (4,))
    arguments = pieces(lqr)
    P, K = P_and_K(*arguments)
    each = torch.func.vmap(P_and_K)(*arguments)
    torch.testing.assert_close(each, (P, K))
    one = [X[0] for X in arguments]
    shared = torch.func.vmap(lambda A: solve_dare(A, *one[1:]).P)(lqr.A)
    torch.testing.assert_close(shared[2], solve_dare(lqr.A[2], *one[1:]).P)
    cost = lambda A: solve_dare(A, *one[1:]).K.square().sum()
    gradient = torch.func.vmap(torch.func.grad(cost))(lqr.A)
    assert gradient.shape == lqr.A.shape
    direction, step = randn(3, 3, seed=5), 1e-5
    along = torch.func.jvp(cost, (lqr.A[0],), (direction,))[1]
    slope = (cost(lqr.A[0] + step * direction) - cost(lqr.A[0] - step * direction)) / (2 * step)
    torch.testing.assert_close(along, slope, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close((gradient[0] * direction).sum(), along)
    hessian = torch.func.hessian(cost)(lqr.A[0]).reshape(9, 9)
    torch.testing.assert_close(hessian, hessian.mT)


def test_the_steady_state_is_differentiable():
    lqr = make_lqr(3, 2)

    def u(A: Tensor, B: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return steady_state(LQR(A, B, lqr.Q, lqr.R, lqr.M, a, b)).u

    free = tuple(X.clone().requires_grad_() for X in (lqr.A, lqr.B, lqr.a, lqr.b))
    assert gradcheck(u, free)


def test_a_failed_element_does_not_spoil_the_gradient_of_the_others():
    lqr = make_lqr(3, 2, (3,))
    A, B = lqr.A.clone(), lqr.B.clone()
    A[1], B[1] = 2 * torch.eye(3), 0.0
    A.requires_grad_()
    dare = solve_dare(A, B, lqr.Q, lqr.R, lqr.M, throw=False)
    assert dare.stabilising.tolist() == [True, False, True]
    dare.P.sum().backward()
    alone = lqr.A[2].clone().requires_grad_()
    solve_dare(alone, lqr.B[2], lqr.Q[2], lqr.R[2], lqr.M[2]).P.sum().backward()
    assert A.grad[1].isnan().all()
    torch.testing.assert_close(A.grad[2], alone.grad)


def test_gradients_of_a_float32_problem_have_its_type_and_its_accuracy():
    lqr = make_lqr(5, 3)
    single = [X.float().requires_grad_() for X in pieces(lqr)]
    double = [X.detach().double().requires_grad_() for X in single]
    for out_dtype in (None, torch.float64):
        ours = torch.autograd.grad(solve_dare(*single, out_dtype=out_dtype).P.sum(), single)
        exact = torch.autograd.grad(solve_dare(*double).P.sum(), double)
        for a, b in zip(ours, exact, strict=True):
            assert a.dtype == torch.float32 and relative(a.double(), b) < 1e-4


def test_a_structured_input_cost_passes_gradients_to_the_rest():
    lqr = make_lqr(3, 2)
    A = lqr.A.clone().requires_grad_()
    ours = solve_dare(A, lqr.B, lqr.Q, InputCost.of(lqr.R), lqr.M).P.sum()
    dense = solve_dare(A, lqr.B, lqr.Q, lqr.R, lqr.M).P.sum()
    torch.testing.assert_close(*(torch.autograd.grad(P, A)[0] for P in (ours, dense)))


def test_an_element_that_failed_and_is_left_out_passes_on_no_nan():
    lqr = make_lqr(3, 2, (3,))
    A, B = lqr.A.clone(), lqr.B.clone()
    A[1], B[1] = 2 * torch.eye(3), 0.0
    shared = torch.ones((), dtype=torch.float64, requires_grad=True)
    dare = solve_dare(A, B, shared * lqr.Q, lqr.R, lqr.M, throw=False)
    good = dare.stabilising
    (dare.P[good].sum() + dare.K[good].sum()).backward()
    alone = torch.ones((), dtype=torch.float64, requires_grad=True)
    P, K = P_and_K(A[good], B[good], alone * lqr.Q[good], lqr.R[good], lqr.M[good])
    (P.sum() + K.sum()).backward()
    torch.testing.assert_close(shared.grad, alone.grad)


def test_a_diagonal_R_has_a_gradient_off_its_diagonal():
    lqr = make_lqr(3, 2)

    def u(D: Tensor) -> Tensor:
        R = D @ D.mT + torch.eye(2, dtype=torch.float64)
        return steady_state(LQR(lqr.A, lqr.B, lqr.Q, R, 0.1 * lqr.M, lqr.a, lqr.b)).u

    assert gradcheck(u, (torch.eye(2, dtype=torch.float64, requires_grad=True),))


def test_of_R_only_the_symmetric_part_is_differentiated():
    lqr = make_lqr(3, 2)
    cost = lambda R: solve_dare(lqr.A, lqr.B, lqr.Q, R, lqr.M).K.square().sum()
    hessian = torch.func.hessian(cost)(lqr.R).reshape(4, 4)
    torch.testing.assert_close(hessian, hessian.mT)
    swap = [0, 2, 1, 3]  # R and R' have the same K
    torch.testing.assert_close(hessian, hessian[swap])


def test_vmap_takes_a_structured_input_cost_that_all_elements_share():
    lqr = make_lqr(3, 2, (4,))
    cost = InputCost.of(lqr.R[0])
    mapped = torch.func.vmap(lambda A: solve_dare(A, lqr.B[0], lqr.Q[0], cost).P)(lqr.A)
    alone = solve_dare(lqr.A[3], lqr.B[0], lqr.Q[0], lqr.R[0]).P
    torch.testing.assert_close(mapped[3], alone)


def test_forward_over_forward_is_refused_and_reverse_over_forward_is_right():
    A = torch.tensor([[0.5, 0.3], [0.0, 1.2]], dtype=torch.float64)
    B, eye = torch.ones(2, 1, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    P = lambda A: solve_dare(A, B, eye, eye[:1, :1]).P.sum()
    X = lambda A: solve_stein(A / 2, eye).X.sum()
    for f, name in ((P, "solve_dare"), (X, "solve_stein")):
        with pytest.raises(RuntimeError, match=f"{name} has no forward derivative of a forward"):
            torch.func.jacfwd(torch.func.jacfwd(f))(A)
        exact = torch.func.jacrev(torch.func.jacrev(f))(A)
        assert torch.allclose(torch.func.jacrev(torch.func.jacfwd(f))(A), exact, rtol=1e-9)
        assert torch.allclose(torch.func.jacfwd(torch.func.jacrev(f))(A), exact, rtol=1e-9)
