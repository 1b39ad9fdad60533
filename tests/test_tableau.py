"""Tests for `deqlqr/tableau.py`."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deqlqr.runge_kutta import runge_kutta_step
from deqlqr.tableau import TABLEAUS, Tableau, make_tableau

from .problems import randn

METHODS = tuple(TABLEAUS)
HEUN = ((0, 0), (1, 0))
HALF = (0.5, 0.5)


def arrays(tableau):
    a = np.array([[float(v) for v in row] for row in tableau.a])
    return a, np.array([float(v) for v in tableau.b])


@pytest.mark.parametrize("method", METHODS)
def test_the_error_falls_with_the_order_claimed(method):
    # r' = -r^2 has r = 1 / (1 + t); (x, y) turns at the rate r, so by the angle log(1 + t).
    tableau = make_tableau(method)

    def v(z):
        r, x, y = z
        return torch.stack([-(r**2), -y * r, x * r])

    def error(steps):
        z = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
        for _ in range(steps):
            z = runge_kutta_step(v, z, 1.0 / steps, tableau)
        angle = torch.log(torch.tensor(2.0, dtype=torch.float64))
        exact = torch.stack([torch.tensor(0.5), angle.cos(), angle.sin()])
        return float((z - exact).norm())

    measured = np.log2(error(40) / error(80))
    assert measured == pytest.approx(tableau.order, abs=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_field_gives_the_stability_polynomial(method):
    tableau, A, z, h = make_tableau(method), randn(3, 3), randn(3, seed=1), 0.3
    a, b = arrays(tableau)
    s = tableau.stages
    stacked = np.eye(3 * s) - h * np.kron(a, A.numpy())
    Y = np.linalg.solve(stacked, np.tile(z.numpy(), s)).reshape(s, 3)
    expected = z.numpy() + h * b @ (Y @ A.numpy().T)
    got = runge_kutta_step(lambda y: A @ y, z, h, tableau)
    assert np.abs(got.numpy() - expected).max() < 1e-14


def test_the_abscissae_are_exact_row_sums():
    assert make_tableau("kutta3").c == (0, Fraction(1, 2), 1)
    assert make_tableau("kutta4").c == (0, Fraction(1, 2), Fraction(1, 2), 1)
    own = Tableau(HEUN, HALF, 2, "own")
    assert make_tableau(own) is own and own.c == (0, 1)


@pytest.mark.parametrize(
    "method, r", [("euler", 1.0), ("improved-euler", 1.0), ("kutta3", 0.5), ("kutta4", 1.0)]
)
def test_the_radius_makes_the_energy_identity_an_inequality_and_is_the_largest(method, r):
    tableau = make_tableau(method)
    a, b = arrays(tableau)
    M = b[:, None] * a + (b[:, None] * a).T - np.outer(b, b)
    assert tableau.contractivity_radius == pytest.approx(r, abs=1e-12)
    smallest = lambda radius: np.linalg.eigvalsh(M + np.diag(b) / radius)[0]
    assert smallest(r) > -1e-14 and smallest(r * 1.01) < -1e-5


def test_a_step_obeys_the_energy_identity():
    tableau, h = make_tableau("kutta4"), 0.4
    a, b = arrays(tableau)
    A, z1, z2 = randn(4, 4), randn(4, seed=1), randn(4, seed=2)
    v = lambda z: torch.tanh(A @ z)
    stages = []
    for z in (z1, z2):
        slopes, Ys = [], []
        for i in range(4):
            Ys.append(z + h * sum(a[i, j] * slopes[j] for j in range(i)))
            slopes.append(v(Ys[i]))
        stages.append((torch.stack(Ys), torch.stack(slopes)))
    dY, dv = stages[0][0] - stages[1][0], stages[0][1] - stages[1][1]
    M = torch.tensor(b[:, None] * a + (b[:, None] * a).T - np.outer(b, b))
    b = torch.tensor(b)
    wanted = (
        (z1 - z2).square().sum()
        + 2 * h * (b * (dv * dY).sum(1)).sum()
        - h**2 * (M * (dv @ dv.T)).sum()
    )
    after = runge_kutta_step(v, z1, h, tableau) - runge_kutta_step(v, z2, h, tableau)
    assert abs(float(after.square().sum() - wanted)) < 1e-13


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from(METHODS),
    st.integers(0, 10**6),
    st.floats(0.1, 1.0),
    st.floats(0.01, 100.0),
    st.booleans(),
)
def test_steps_within_the_radius_bring_no_states_further_apart(method, seed, part, beta, linear):
    tableau = make_tableau(method)
    g = torch.Generator().manual_seed(seed)
    # F is firmly non-expansive, <F d, d> >= |F d|^2, so v = -F / beta has the constant beta:
    # F = (I - N) / 2 with N of norm 1.
    X = torch.randn(3, 3, generator=g, dtype=torch.float64)
    X = X / torch.linalg.matrix_norm(X, 2)
    N = (lambda z: z @ X.mT) if linear else (lambda z: (z @ X.mT).sin() @ X)
    v = lambda z: -(z - N(z)) / 2 / beta
    h = 2 * part * tableau.contractivity_radius * beta
    z = 3 * torch.randn(2, 50, 3, generator=g, dtype=torch.float64)
    dz, dv = z[0] - z[1], v(z[0]) - v(z[1])
    assert ((dv * dz).sum(-1) <= -beta * dv.square().sum(-1) + 1e-12).all()
    after = runge_kutta_step(v, z[0], h, tableau) - runge_kutta_step(v, z[1], h, tableau)
    assert (after.norm(dim=-1) <= dz.norm(dim=-1) * (1 + 1e-12)).all()


def test_eulers_radius_is_sharp():
    beta, z = 0.5, torch.ones(1, dtype=torch.float64)
    v = lambda z: -z / beta  # <dv, dz> = -beta |dv|^2
    grows = lambda h: float(runge_kutta_step(v, z, h, make_tableau("euler")).abs()) > 1
    assert grows(2 * beta * 1.001) and not grows(2 * beta * 0.999)


@pytest.mark.parametrize("method", METHODS)
def test_the_partner_makes_a_symplectic_pair(method):
    tableau = make_tableau(method)
    a, b = arrays(tableau)
    rows, weights = tableau.partner()
    partner = np.array([[float(v) for v in row] for row in rows])
    # b_i a~_ij + b~_j a_ji = b_i b~_j
    defect = b[:, None] * partner + (b[:, None] * a).T - np.outer(b, b)
    assert weights == tableau.b and np.abs(defect).max() < 1e-15


@pytest.mark.parametrize(
    "a, b, order, message",
    [
        ((), (), 1, "a must have as many rows"),
        (((0,), (0,)), (1,), 1, "a must have as many rows"),
        (((0, 0), (1,)), HALF, 1, "a must have as many rows"),
        (((0.5,),), (1,), 1, "a must be zero on and above its diagonal"),
        (((0, 1), (1, 0)), HALF, 1, "a must be zero on and above its diagonal"),
        (HEUN, HALF, 0, "order must be 1, 2, 3 or 4, got 0"),
        (HEUN, HALF, 5, "order must be 1, 2, 3 or 4, got 5"),
        (HEUN, (0.5, 0.4), 1, "order 1 needs sum b_i = 1, got 0.9"),
        (((0,),), (float("nan"),), 1, "order 1 needs sum b_i = 1, got nan"),
        (((0,),), (1,), 2, r"order 2 needs sum b_i c_i = 1/2, got 0"),
        (HEUN, HALF, 3, r"order 3 needs sum b_i c_i\^2 = 1/3"),
    ],
)
def test_a_table_that_is_wrong_says_where(a, b, order, message):
    with pytest.raises(ValueError, match=message):
        Tableau(a, b, order, "wrong")


@pytest.mark.parametrize("method", METHODS[:3])
def test_no_method_has_a_higher_order_than_its_table_claims(method):
    t = make_tableau(method)
    with pytest.raises(ValueError, match=f"order {t.order + 1} needs"):
        Tableau(t.a, t.b, t.order + 1, t.name)


@pytest.mark.parametrize(
    "c2, c3, condition", [(0.5, 0.75, "sum b_i c_i^3"), (0.5, 1.0, "sum b_i c_i a_ij c_j")]
)
def test_the_condition_of_order_four_that_three_stages_miss_is_named(c2, c3, condition):
    b3 = (1 / 3 - c2 / 2) / (c3 * (c3 - c2))
    b2 = (0.5 - b3 * c3) / c2
    a32 = 1 / (6 * b3 * c2)
    rows, b = ((0, 0, 0), (c2, 0, 0), (c3 - a32, a32, 0)), (1 - b2 - b3, b2, b3)
    assert Tableau(rows, b, 3, "three stages").order == 3
    with pytest.raises(ValueError, match=f"needs {re.escape(condition)} = "):
        Tableau(rows, b, 4, "three stages")


def test_the_last_condition_of_order_four_is_checked():
    t = make_tableau("kutta4")
    bent = (*t.a[:3], (0, 0.1, 0.9, 0))  # this misses no other condition
    with pytest.raises(ValueError, match="needs sum b_i a_ij a_jk c_k = 1/24, got 0.0375"):
        Tableau(bent, t.b, 4, "bent")


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="method must be one of"):
        make_tableau("kutta5")
    midpoint = Tableau(((0, 0), (0.5, 0)), (0, 1), 2, "midpoint")
    with pytest.raises(ValueError, match="contractivity_radius needs weights b that are positive"):
        _ = midpoint.contractivity_radius
    with pytest.raises(ValueError, match="partner needs weights b that are positive"):
        midpoint.partner()
