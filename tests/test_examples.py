"""Runs every example from the command line; each checks its own claim."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_and_its_check_holds(path):
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_is_one_example_for_each_use():
    names = [path.stem for path in EXAMPLES]
    assert names == [
        "check_equivalence", "fit_a_surface", "recover_coefficients", "train_ingd",
        "watch_and_warm_start", "wrap_a_block",
    ]  # fmt: skip
