"""Tests for `deqlqr/resolvent.py` and `deqlqr/adjoint.py`."""

import pytest
import torch

from deqlqr import (
    DEQ,
    ConvergenceError,
    Costate,
    DenseBlock,
    FixedPointResult,
    Implicit,
    Neumann,
    Resolvent,
)
from deqlqr.pairs import leading
from deqlqr.powers import Powers

from .problems import randn, relative


def contraction(n=40, batch=5, rho=0.9, seed=0):
    """L (batch, n, n), not normal, with spectral radius rho."""
    L = randn(batch, n, n, seed=seed)
    return L * rho / torch.linalg.eigvals(L).abs().amax(-1)[:, None, None]


def product_with(L, calls=None):
    def product(x):
        if calls is not None:
            calls.append(len(x))
        return (L @ x[..., None])[..., 0]

    return product


def exact(L, c):
    return torch.linalg.solve(torch.eye(L.shape[-1], dtype=L.dtype) - L, c)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("rho", [0.3, 0.9, 1.5])
def test_one_and_several_right_sides_are_solved(dense, rho):
    L, c = contraction(rho=rho), randn(5, 3, 40, seed=1)
    one = Resolvent(product_with(L), tol=1e-12, max_steps=200, dense=dense)
    found = one.solve(c[:, 0])
    assert found.converged.all() and relative(found.value, exact(L, c[:, 0])) < 1e-9
    many = Resolvent(product_with(L), tol=1e-12, max_steps=200, dense=dense).solve(c)
    for k in range(3):
        assert relative(many.value[:, k], exact(L, c[:, k])) < 1e-9
    assert many.value.shape == c.shape and many.converged.all()


@pytest.mark.parametrize("dense", [True, False])
def test_what_one_right_side_has_built_serves_the_next(dense):
    L, calls = contraction(rho=0.95), []
    resolvent = Resolvent(product_with(L, calls), tol=1e-10, max_steps=200, dense=dense)
    c = randn(5, 40, seed=1)
    first = resolvent.solve(c)
    used = len(calls)
    near = c + 1e-3 * randn(5, 40, seed=2)
    again = resolvent.solve(near)
    assert relative(again.value, exact(L, near)) < 1e-8
    assert len(calls) - used < 0.8 * used
    assert int(first.evaluations[0]) == used
    assert int(again.evaluations[0]) == len(calls) - used


def test_pairs_that_spare_no_products_are_not_kept():
    L, c = contraction(n=300, rho=0.2), randn(5, 12, 300, seed=2)
    calls = []
    resolvent = Resolvent(product_with(L, calls), tol=1e-8, max_steps=100, dense=False)
    counts = []
    for k in range(12):
        before = len(calls)
        found = resolvent.solve(c[:, k])
        counts.append(len(calls) - before)
        assert found.converged.all() and relative(found.value, exact(L, c[:, k])) < 1e-7
    assert max(counts) <= counts[0] + 1  # right sides at random have nothing to say of others
    assert resolvent._pairs.count <= 2 * counts[0]  # not those of twelve
    # Where they do help, they stay: here all right sides lie in two directions.
    few = torch.einsum("bkn,jk->bjn", c[:, :2], randn(12, 2, seed=3))
    resolvent = Resolvent(product_with(L, calls), tol=1e-8, max_steps=100, dense=False)
    before = len(calls)
    assert resolvent.solve(few).converged.all()
    assert len(calls) - before < 5 * counts[0]


@pytest.mark.parametrize("rho", [0.3, 0.95, 1.05])
@pytest.mark.parametrize("tol", [1e-4, 1e-5, 1e-6])
def test_residuals_that_are_not_formed_anew_are_true_in_single_precision(rho, tol):
    L, rights = contraction(n=80, rho=rho).float(), randn(5, 12, 80, seed=1).float()
    resolvent = Resolvent(product_with(L), tol=tol, max_steps=200, dense=False)
    for c in rights.unbind(1):
        found = resolvent.solve(c)
        r = c + product_with(L)(found.value) - found.value
        true = torch.linalg.vector_norm(r, dim=-1) / torch.linalg.vector_norm(c, dim=-1)
        assert found.converged.all() and (true <= 2 * max(tol, 6e-6)).all()
        assert (true <= 2 * found.residual + tol).all()


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.float64, 1e-8)])
@pytest.mark.parametrize("size", [0.02, 0.05, 0.1])
def test_short_solves_are_done_at_once(dtype, tol, size, monkeypatch):
    n, used, reduce = 100, [], Powers.reduce
    noting = lambda *args: used.append(args[3]) or reduce(*args)
    monkeypatch.setattr(Powers, "reduce", noting)
    L = randn(6, n, n)
    L = size * L / torch.linalg.matrix_norm(L, 2)[:, None, None]
    L[1] = 0.0  # solved in no product, in one, and by a nilpotent map: powers vanish
    L[2] = size * torch.eye(n)
    L[3] = torch.diag_embed(torch.full((n - 1,), size).double(), 1)
    L[4] = 0.0
    L[4, 0, 1] = size
    calls, counts = [], []
    product = product_with(L.to(dtype), calls)
    resolvent = Resolvent(product, tol=tol, max_steps=50, dense=False)
    for k in range(6):
        c, before = randn(6, n, seed=k).to(dtype), len(calls)
        c[5] *= 1e-6
        if k == 3:
            c[5] = 0.0
        found = resolvent.solve(c)
        counts.append(len(calls) - before)
        r = c.double() + product_with(L)(found.value.double()) - found.value.double()
        true = r.norm(dim=-1) / c.double().norm(dim=-1).clamp(min=1e-30)
        assert found.converged.all() and (true <= 1.1 * tol).all()
        assert ((true - found.residual).abs() <= 0.1 * tol).all()
        assert relative(found.value.double(), exact(L, c.double())) < 3 * tol
        error = (found.value.double() - exact(L, c.double())).norm(dim=-1)
        assert (error <= 1.1 * (found.error + 0.1 * tol) * found.value.double().norm(dim=-1)).all()
    at_once = counts[0] - 1 <= Powers.most(dtype)
    assert len(used) == (5 if at_once else 0) and (at_once or size == 0.1)
    if at_once:  # the first had its residual formed anew
        assert counts[1:] == [counts[0] - 1] * 5 and resolvent._pairs.count == 0


def test_what_is_not_done_at_once_is_finished_step_by_step():
    L, calls = contraction(n=100, rho=0.02), []
    resolvent = Resolvent(product_with(L, calls), tol=1e-8, max_steps=50, dense=False)
    easy = randn(5, 100, seed=1)
    easy = easy - product_with(L)(easy)  # solved by one step
    resolvent.solve(1e-9 * randn(5, 100, seed=2) + easy)
    hard = randn(5, 100, seed=3)
    found = resolvent.solve(hard)
    assert found.converged.all() and relative(found.value, exact(L, hard)) < 1e-7
    hard[2, 0] = float("nan")
    found = resolvent.solve(hard)
    good = [0, 1, 3, 4]
    assert found.converged.tolist() == [True, True, False, True, True]
    assert found.result[2] == FixedPointResult.NON_FINITE
    assert relative(found.value[good], exact(L, hard)[good]) < 1e-7


def spread(size, n=100, batch=6):
    """L (batch, n, n), of norm `size`, among them zero and nilpotent ones."""
    L = randn(batch, n, n)
    L = size * L / torch.linalg.matrix_norm(L, 2)[:, None, None]
    L[1] = 0.0
    L[2] = size * torch.eye(n)
    L[3] = torch.diag_embed(torch.full((n - 1,), size).double(), 1)
    return L


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("size", [0.02, 0.05])
def test_right_sides_are_solved_together(dtype, tol, size, warm):
    L, calls = spread(size), []
    product = product_with(L.to(dtype), calls)
    c = randn(6, 9, 100, seed=1).to(dtype)
    c[5] *= 1e-6
    c[4, 3] = 0.0
    c[0, 7] = c[0, 1]  # depend on each other
    c[0, 8] = c[0, 1] - 2 * c[0, 2]
    start = 0.9 * exact_each(L, c.double()).to(dtype) if warm else None
    kept = c.clone()
    found = Resolvent(product, tol=tol, max_steps=50, dense=False).solve(c, start)
    spent = len(calls)
    assert (found.evaluations == spent).all() and torch.equal(c, kept)
    x = found.value.double()
    r = c.double() + torch.einsum("bij,bkj->bki", L, x) - x
    true = r.norm(dim=-1) / c.double().norm(dim=-1).clamp(min=1e-30)
    assert found.converged.all() and (true <= 1.1 * tol).all()
    assert ((true.amax(-1) - found.residual).abs() <= 0.1 * tol).all()
    errors = (x - exact_each(L, c.double())).norm(dim=-1)
    assert (errors <= 1.1 * (found.error[:, None] + 0.1 * tol) * x.norm(dim=-1)).all()
    calls.clear()
    for k in range(9):
        alone = Resolvent(product, tol=tol, max_steps=50, dense=False)
        alone.solve(c[:, k], None if start is None else start[:, k])
    assert spent < 0.9 * len(calls)


def exact_each(L, c):
    return torch.linalg.solve(torch.eye(L.shape[-1], dtype=L.dtype) - L, c.mT).mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_common_steps_go_where_most_of_the_residuals_lies(dtype, size):
    r, weights = randn(7, 5, 30), randn(7, 5, seed=1).abs() + 0.1
    r[:, 3] += 4 * r[:, 1]
    r[2], r[4, 1:] = 0.0, 0.0
    p = leading((size * r).to(dtype), (weights / size).to(dtype)).double()
    assert torch.equal(p[2], torch.zeros(30).double())
    right = torch.linalg.svd(weights[..., None] * r)[2][:, 0]
    for s in (0, 1, 3, 4, 5, 6):
        assert abs(float(p[s] @ right[s])) > 0.99 * float(p[s].norm()) > 0


def test_together_no_power_is_taken_where_pairs_do():
    L, V = low_rank([0.9, 0.5, -0.5], 90)
    calls, c = [], (V @ randn(5, 3, 12, seed=1)).mT
    found = Resolvent(product_with(L, calls), tol=1e-8, max_steps=50, dense=False).solve(c)
    assert found.converged.all() and relative(found.value, exact_each(L, c)) < 1e-7
    assert len(calls) == 4  # three directions, and one to see that it is true


def test_what_is_not_solved_together_is_solved_alone():
    # The first right side is easy, so no more is expected of the others, which are not.
    L, calls = contraction(n=100, rho=0.6), []
    product = product_with(L, calls)
    vector = torch.linalg.eigh(L @ L.mT)[1][..., :1].mT  # L' takes it nearly to zero
    c = torch.cat([vector - (L @ vector.mT).mT, randn(5, 3, 100)], 1)
    c[:, 0] += 1e-7 * randn(5, 100, seed=3)
    found = Resolvent(product, tol=1e-8, max_steps=99, dense=False).solve(c)
    assert found.converged.all() and relative(found.value, exact_each(L, c)) < 1e-6
    bad = c.clone()
    bad[2, 1, 0] = float("nan")
    found = Resolvent(product, tol=1e-8, max_steps=99, dense=False).solve(bad)
    assert found.converged.tolist() == [True, True, False, True, True]
    assert found.result[2] == FixedPointResult.NON_FINITE
    good = [0, 1, 3, 4]
    assert relative(found.value[good], exact_each(L, c)[good]) < 1e-6
    few = Resolvent(product, tol=1e-8, max_steps=2, dense=False).solve(c)
    assert not few.converged.any() and (few.result == FixedPointResult.MAX_STEPS).all()


def test_samples_that_depend_on_each_other_are_noticed_when_solved_together():
    L = randn(1, 400, 400)
    L = 0.05 * L / torch.linalg.matrix_norm(L, 2)
    calls = []
    mixed = product_with(L, calls)
    product = lambda v: mixed(v.reshape(1, 400)).view(4, 100)
    c = randn(4, 6, 100, seed=1)
    found = Resolvent(product, tol=1e-8, max_steps=60, dense=False).solve(c)
    joint = exact(L.expand(6, 400, 400), c.transpose(0, 1).reshape(6, 400))
    assert found.converged.all()
    assert relative(found.value.transpose(0, 1).reshape(6, 400), joint) < 1e-7


@pytest.mark.parametrize("others", [[0.0], [1.0, -1.0], [0.0, 0.0, 0.0]])
@pytest.mark.parametrize("tol", [1e-5, 1e-6])
def test_right_sides_that_cancel_do_not_speak_for_each_other(others, tol):
    # Samples that depend on each other, so that what a solve alone says is not true.
    W, rates = 0.02 * torch.linalg.qr(randn(100, 100))[0], 0.015 * torch.arange(1, 7).double()
    product = lambda v: v @ W + rates[: len(v), None] * v.roll(1, 0)
    first, other = randn(2, 6, 100, seed=1)
    c = torch.stack([first, *(share * other for share in others)], 1)
    resolvent = Resolvent(product, tol=tol, max_steps=200, dense=False)
    for _ in range(2):
        found = resolvent.solve(c)
        for k in range(c.shape[1]):
            x = found.value[:, k]
            true = (c[:, k] + product(x) - x).norm(dim=-1) / c[:, k].norm(dim=-1).clamp(min=1e-9)
            # The residual that is reported is the whole batch's then.
            assert found.converged.all() and (true <= 4 * tol).all()


def test_what_was_not_solved_together_is_no_proof_of_anything():
    # A nilpotent map far from normal: (I - L)^-1 has a norm of some 100.
    L = torch.zeros(3, 64, 64).double()
    L[:, :20, 20:40], L[:, 20:40, 40:] = randn(3, 20, 20), randn(3, 20, 24, seed=1)
    for k in (2, 9, 17):
        resolvent, c = (
            Resolvent(product_with(L), tol=1e-8, max_steps=60, dense=False),
            randn(3, k, 64),
        )
        for _ in range(2):
            found = resolvent.solve(c)
            x = found.value
            true = (c + torch.einsum("bij,bkj->bki", L, x) - x).norm(dim=-1) / c.norm(dim=-1)
            assert found.converged.all() and (true.amax(-1) <= found.residual + 1e-9).all()


def test_no_samples_have_an_answer_too():
    for shape in ((0, 100), (0, 3, 100)):
        found = Resolvent(lambda v: 0.1 * v, tol=1e-8, max_steps=9, dense=False).solve(
            torch.zeros(shape)
        )
        assert found.value.shape == shape and found.converged.all()
    layer, x = DEQ(DenseBlock(40, 40)), torch.zeros(0, 40, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (0, 40)


def test_a_start_does_not_keep_zero_from_its_answer():
    L, start = contraction(n=100, rho=0.3), randn(5, 3, 100)
    c = randn(5, 3, 100, seed=1)
    c[2], c[3, 1] = 0.0, 0.0
    for right, near in ((c, start), (c[:, 1], start[:, 1])):
        found = Resolvent(product_with(L), tol=1e-10, max_steps=60, dense=False).solve(right, near)
        assert found.converged.all() and not found.value[2].any()
    layer, x = DEQ(DenseBlock(70), warm_start=True), randn(3, 70).float().requires_grad_()
    for zero in (False, True):
        g = torch.ones(3, 70)
        g[1] *= not zero
        (grad,) = torch.autograd.grad(layer(x, key=0), x, g)
        assert bool(grad[1].any()) is not zero


def test_steps_at_one_tolerance_say_nothing_of_another():
    L = spread(0.05)
    c = randn(6, 5, 100, seed=1)
    resolvent = Resolvent(product_with(L), tol=1e-5, max_steps=50, dense=False)
    for tol in (1e-5, 1e-13, 1e-2, 1e-5, 1e-9):
        for right in (c, c[:, 0]):
            found = resolvent.solve(right, tol=tol)
            expected = exact_each(L, c)
            expected = expected if right.dim() == 3 else expected[:, 0]
            assert found.converged.all() and relative(found.value, expected) < 3 * tol


def test_rounding_that_wears_the_residuals_of_many_is_noticed():
    # A product that is not linear in its last digits: what the recursions say is not true.
    L = spread(0.1)
    product = lambda v: (
        product_with(L)(v) + 3e-7 * v.norm(dim=-1, keepdim=True) * torch.sin(1e3 * v)
    )
    c = randn(6, 5, 100, seed=1)
    found = Resolvent(product, tol=1e-7, max_steps=30, dense=False).solve(c)
    for k in range(5):
        x = found.value[:, k]
        true = (c[:, k] + product(x) - x).norm(dim=-1) / c[:, k].norm(dim=-1)
        assert (found.residual[found.converged] >= 0.5 * true[found.converged]).all()


def low_rank(eigenvalues, n, seed=0):
    """L (5, n, n), zero but for some eigenvalues, and their vectors."""
    V = torch.linalg.qr(randn(5, n, n, seed=seed))[0][..., : len(eigenvalues)]
    return V @ torch.diag(torch.tensor(eigenvalues).double()) @ V.mT, V


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_a_slow_mode_is_not_left_to_normal_equations(dtype, tol):
    calls, counts = [], []
    L, V = low_rank([0.999, 0.5, -0.5], 90)
    product = product_with(L.to(dtype), calls)
    resolvent = Resolvent(product, tol=tol, max_steps=100, dense=False)
    always = randn(5, 90, seed=9)
    for k in range(6):
        # The right sides differ in the slow directions only, which the pairs know.
        c = (always + (V @ randn(5, 3, 1, seed=k))[..., 0]).to(dtype)
        before, found = len(calls), resolvent.solve(c)
        counts.append(len(calls) - before)
        error = (found.value.double() - exact(L, c.double())).norm(dim=-1)
        assert found.converged.all()
        assert (error <= 4 * found.error * found.value.double().norm(dim=-1)).all()
    assert max(counts[1:]) <= 2 < counts[0]  # the pairs are kept


def test_what_is_solved_already_takes_no_products():
    L, calls = contraction(n=100, rho=0.02), []
    resolvent = Resolvent(product_with(L, calls), tol=1e-6, max_steps=9, dense=False)
    for k in range(3):  # the third is done at once
        resolvent.solve(randn(5, 100, seed=k))
    before = len(calls)
    assert resolvent.solve(torch.zeros(5, 100).double()).converged.all()
    assert len(calls) == before
    c = randn(5, 100, seed=4)
    assert resolvent.solve(c, start=exact(L, c)).converged.all()
    assert len(calls) == before + 1  # of the start's residual


def test_products_are_formed_in_the_callers_precision():
    W = 0.05 * torch.linalg.qr(randn(100, 100))[0].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        product = lambda v: torch.nn.functional.linear(v, W).float()
        resolvent = Resolvent(product, tol=1e-2, max_steps=20, dense=False)
        for k in range(4):
            c = randn(3, 100, seed=k).float()
            found = resolvent.solve(c)
            assert found.converged.all() and found.value.dtype == torch.float32
            assert relative(found.value, exact(W.float().expand(3, 100, 100), c)) < 3e-2


def test_a_solution_is_a_tensor_of_its_own():
    L, c = contraction(rho=0.3), randn(5, 40, seed=1)
    start = exact(L, c)
    kept = start.clone()
    Resolvent(product_with(L), tol=1e-6, max_steps=9, dense=False).solve(c, start).value.zero_()
    assert torch.equal(start, kept)
    layer = DEQ(DenseBlock(8, 8), backward="one-step")
    given = randn(3, 8).float()
    layer(randn(3, 8, seed=1).float().requires_grad_()).backward(given)
    before = layer.backward_solution.value.clone()
    given.zero_()
    assert torch.equal(layer.backward_solution.value, before) and before.norm() > 0


def test_a_start_near_the_solution_saves_products():
    L, c = contraction(n=80, rho=0.95), randn(5, 80, seed=1)
    cold = Resolvent(product_with(L), tol=1e-8, max_steps=200, dense=False).solve(c)
    warm = Resolvent(product_with(L), tol=1e-8, max_steps=200, dense=False).solve(
        c, start=exact(L, c) * (1 + 1e-5)
    )
    assert warm.evaluations[0] < 0.7 * cold.evaluations[0] and warm.converged.all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 20])
def test_the_bound_of_the_error_is_one_and_is_close(steps, seed):
    L, c = contraction(rho=0.8, seed=seed), randn(5, 40, seed=seed + 9)
    found = Resolvent(product_with(L), tol=1e-12, max_steps=steps, dense=False).solve(c)
    truth = exact(L, c)
    error = (found.value - truth).norm(dim=-1) / found.value.norm(dim=-1)
    assert (found.result == FixedPointResult.MAX_STEPS).all()
    assert (found.error >= 0.8 * error).all() and (found.error <= 3 * error).all()
    with pytest.raises(ConvergenceError, match="Relative error up to"):
        found.raise_if_failed()


def test_the_bound_holds_where_the_solve_converged():
    L, c = contraction(n=20, rho=0.9), randn(5, 20)
    for dense in (True, False):
        found = Resolvent(product_with(L), tol=1e-6, max_steps=100, dense=dense).solve(c)
        error = (found.value - exact(L, c)).norm(dim=-1) / found.value.norm(dim=-1)
        assert found.converged.all() and (found.error >= error * 0.99 - 1e-14).all()


def test_skew_maps_which_stall_conjugate_residuals_are_solved():
    n = 30
    S = randn(4, n, n)
    S = S - S.mT
    L = torch.eye(n, dtype=torch.float64) - 0.5 * S  # I - L is skew: its residual step is zero
    c = randn(4, n, seed=1)
    found = Resolvent(product_with(L), tol=1e-10, max_steps=300, dense=False).solve(c)
    assert found.converged.all() and relative(found.value, exact(L, c)) < 1e-6


def test_coupled_samples_are_solved_by_iteration_and_non_finite_ones_reported():
    mixing = lambda x: 0.4 * (x + x.roll(1, 0))
    c = randn(6, 30)
    found = Implicit().solve(mixing, c, 1e-10)
    assert found.converged.all()
    assert relative(c + mixing(found.value), found.value) < 1e-8
    found = Resolvent(lambda x: x / 0.0, tol=1e-8, max_steps=9, dense=False).solve(c)
    assert (found.result == FixedPointResult.NON_FINITE).all()


def test_all_exact_adjoints_agree_and_zero_has_the_answer_zero():
    L, c = contraction(n=12), randn(5, 12)
    for adjoint in (Implicit("dense"), Implicit("krylov"), Implicit(), Costate()):
        found = adjoint.solve(product_with(L), c, 1e-12)
        assert relative(found.value, exact(L, c)) < 1e-9 and (found.error < 1e-8).all()
        assert adjoint.solve(product_with(L), 0 * c, 1e-12).value.abs().max() == 0
    truncated = Neumann(2).solve(product_with(L), c, 1e-12)
    times = product_with(L)
    assert relative(truncated.value, c + times(c) + times(times(c))) < 1e-14
    assert truncated.error.isnan().all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Implicit(method="lu"), "method must be one of"),
        (lambda: Implicit(max_steps=0), "max_steps must be at least 1"),
        (lambda: Neumann(-1), "terms must be at least 0"),
    ],
)
def test_misuse_names_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("size", [1.0, 1e18])
def test_the_bound_of_the_inverse_on_the_pairs_holds_and_survives_large_numbers(size):
    solver = Resolvent(lambda x: x, tol=1e-6, max_steps=10, dense=False)
    torch.manual_seed(0)
    P = size * torch.randn(3, 5, 8)
    for i in range(5):
        solver._pairs.add(P[:, i], P[:, i])
    bound = solver._inverse_norm(P[:, 0])
    true = size * torch.linalg.matrix_norm((P / size).double(), 2)
    assert bool(bound.isfinite().all()) and bool((bound >= 0.999 * true).all())
    assert bool((bound <= 5**0.5 * 1.001 * true).all())


@pytest.mark.parametrize("n", [6, 40])  # factorised, Krylov
def test_a_right_side_whose_square_is_zero_is_solved_as_any_other(n):
    torch.manual_seed(0)
    layer = DEQ(DenseBlock(n), tol=1e-4)
    x = torch.randn(4, n)
    z = layer(x)
    g = torch.randn(4, n)
    small = torch.tensor([1.0, 1e-25, 1e-36, 0.0])[:, None]
    expected = layer.resolvent(z, x).solve(g)
    found = layer.resolvent(z, x).solve(g * small)
    assert found.converged.all() and found.error.isfinite().all()
    assert torch.allclose(found.value[0], expected.value[0], rtol=1e-3, atol=1e-3)
    assert found.value[1:].abs().max() < 1e-18
    (z * small * g).sum().backward()  # raises if an adjoint solve fails
