"""Runs every example as a script, in this process for speed; each checks its own claim."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.fixture
def _default_dtype_restored():
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.mark.usefixtures("_default_dtype_restored")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_and_its_check_holds(path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")


def test_there_is_one_example_for_each_use():
    names = [path.stem for path in EXAMPLES]
    assert names == [
        "check_equivalence", "fit_a_surface", "hamiltonian_descent", "keep_the_fixed_point",
        "recover_coefficients",
        "train_ingd",
        "watch_and_warm_start", "wrap_a_block",
    ]  # fmt: skip
