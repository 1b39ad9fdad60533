"""Tests for `deqlqr/_linalg.py`."""

import pytest
import torch

from deqlqr._linalg import gram, not_finite

from .problems import randn, relative


@pytest.mark.parametrize("rows", [0, 1, 255, 256, 301])
def test_the_product_of_a_matrix_with_its_transpose(rows):
    W = randn(rows, 40)
    assert gram([W]).shape == (rows, rows)
    assert rows == 0 or relative(gram([W]), W @ W.mT) < 1e-14
    both = torch.cat([W, V := randn(rows, 7, seed=1)], 1)
    assert rows == 0 or relative(gram([W, V]), both @ both.mT) < 1e-14
    wide = randn(40, 600).mT
    assert relative(gram([wide]), wide @ wide.mT) < 1e-14


def test_rows_that_are_not_finite_are_found():
    x = randn(6, 50).float()
    assert not_finite(x) is None
    x[0] = 3e38  # finite, but its sum is not
    assert not_finite(x) is None
    x[1, 7], x[2, 3], x[3, 49] = float("nan"), float("inf"), -float("inf")
    x[4, 0], x[4, 1] = float("inf"), -float("inf")
    assert not_finite(x).tolist() == [False, True, True, True, True, False]
