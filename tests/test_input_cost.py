"""Tests for `deqlqr/input_cost.py`."""

import pytest
import torch

from deqlqr import InputCost, linearize, solve_dare, steady_state
from deqlqr.linearize_samples import choose_divergence, linearize_samples
from deqlqr.loss import make_loss

from .problems import dense_batch, dense_model, make_lqr, randn


def some_R(batch=(), m=6, coupled=(1, 4, 5), seed=0):
    """A symmetric matrix with off-diagonal entries among `coupled` only."""
    rest = [i for i in range(m) if i not in coupled]
    R = torch.diag_embed(randn(*batch, m, seed=seed))
    block = randn(*batch, len(coupled), len(coupled), seed=seed + 1)
    index = torch.tensor(coupled, dtype=torch.int64)
    R[..., index[:, None], index] = block + block.mT
    assert rest == [] or R[..., rest, :].count_nonzero() == R[..., rest, rest].count_nonzero()
    return R


COUPLED = {"none": (), "some": (1, 4, 5), "all": tuple(range(6))}


@pytest.mark.parametrize("coupled", COUPLED.values(), ids=COUPLED)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_it_is_the_dense_matrix(batch, coupled):
    R = some_R(batch, coupled=coupled)
    cost, right = InputCost.of(R), randn(*batch, 6, 2, seed=5)
    assert cost.coupled.tolist() == list(coupled)
    assert cost.shape == R.shape and cost.dtype == R.dtype and cost.device == R.device
    torch.testing.assert_close(cost.dense(), R)
    torch.testing.assert_close(cost @ right, R @ right)
    torch.testing.assert_close(cost.factorise().solve(right), torch.linalg.solve(R, right))
    torch.testing.assert_close(cost.damped(0.5).dense(), R + 0.5 * torch.eye(6).double())
    torch.testing.assert_close(cost.norm(), torch.linalg.matrix_norm(R))
    torch.testing.assert_close(cost.to(torch.float32).dense(), R.float())
    assert InputCost.of(cost) is cost
    if batch:
        torch.testing.assert_close(cost.mean().dense(), R.mean(0))
        torch.testing.assert_close(cost[1:].dense(), R[1:])


@pytest.mark.parametrize("where", [(0, 0), (4, 4)], ids=["diagonal", "block"])
def test_a_singular_cost_is_marked_element_by_element(where):
    R = some_R((3,)) if where == (0, 0) else torch.diag_embed(torch.ones(3, 6).double())
    if where == (4, 4):
        R[:, 1, 4] = R[:, 4, 1] = 1.0  # singular together with the diagonal's ones
        R[0, 4, 4] = R[2, 4, 4] = -1.0
    else:
        R[1][where] = 0.0
    assert InputCost.of(R).factorise().singular.tolist() == [False, True, False]


def test_a_nan_is_never_lost_among_the_zeros():
    R = torch.eye(4).double()
    R[0, 3] = R[3, 0] = float("nan")
    assert InputCost.of(R).dense().isnan().sum() == 2


@pytest.mark.parametrize("coupled", COUPLED.values(), ids=COUPLED)
def test_a_riccati_equation_takes_it_in_place_of_the_matrix(coupled):
    lqr = make_lqr(4, 6)
    R = some_R(coupled=coupled)
    R = R @ R.mT + torch.eye(6).double()
    dense = solve_dare(lqr.A, lqr.B, lqr.Q, R)
    ours = solve_dare(lqr.A, lqr.B, lqr.Q, InputCost.of(R))
    torch.testing.assert_close(ours.P, dense.P)
    torch.testing.assert_close(ours.K, dense.K)
    with pytest.raises(ValueError, match=r"R must have shape \(6, 6\)"):
        solve_dare(lqr.A, lqr.B, lqr.Q, InputCost.of(R[1:, 1:]))
    if coupled:
        block = InputCost.of(R).block.triu()
        with pytest.raises(ValueError, match="R must be symmetric"):
            solve_dare(lqr.A, lqr.B, lqr.Q, InputCost(R.diagonal(), torch.tensor(coupled), block))


@pytest.mark.parametrize("divergence", ["euclidean", "categorical", "newton"])
def test_the_problem_of_a_training_step_couples_only_the_readout(divergence):
    model = dense_model().double()
    x, y = dense_batch()
    x = x.double()
    local = linearize_samples(
        model, x, y, make_loss("cross_entropy"), choose_divergence("cross_entropy", divergence)
    )
    lqr = linearize(model, x, y, divergence=divergence, damping=1.0)
    assert isinstance(local.R, InputCost) and isinstance(lqr.R, torch.Tensor)
    readout = sum(p.numel() for p in model[-1].parameters())
    sizes = {"euclidean": 0, "categorical": readout, "newton": lqr.m}
    assert len(local.R.coupled) == sizes[divergence]
    torch.testing.assert_close(local.exact().damped(1.0).R.dense(), lqr.R)
    if divergence != "newton":  # whose Hessian may be indefinite
        torch.testing.assert_close(steady_state(local.exact().damped(1.0)).u, steady_state(lqr).u)
