"""Tests for `deqlqr/bench.py` and the command `deqlqr bench dare`. They time nothing."""

import json
import sys

import pytest
import torch
from click.testing import CliRunner

from deqlqr import bench, bench_cyclic, bench_fixed_point, bench_step
from deqlqr.cli import main


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(bench, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(bench, "_ROUNDS", 1)


def test_every_row_is_measured_and_the_solvers_agree():
    threads = torch.get_num_threads()
    rows = list(bench.bench_dare(((3, 4), (1, 6))))
    assert [(r.batch, r.n, r.m) for r in rows] == [(3, 4, 2), (1, 6, 3)]
    for r in rows:
        assert min(r.forward, r.backward, r.scipy) > 0
        assert max(r.residual, r.scipy_residual, r.difference) < 1e-9
    assert torch.get_num_threads() == threads


def test_the_command_prints_a_table_or_json():
    sizes = ["--batch", "2", "--n", "4", "--batch", "1", "--n", "5", "--device", "cpu"]
    shown = CliRunner().invoke(main, ["bench", "dare", *sizes])
    assert shown.exit_code == 0 and len(shown.stdout.splitlines()) == 4
    assert "scipy" in shown.stdout.splitlines()[0]
    result = CliRunner().invoke(main, ["bench", "dare", *sizes, "--json"])
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["n"] for row in rows] == [4, 5] and rows[0]["forward"] > 0


def test_sizes_that_do_not_pair_are_refused():
    result = CliRunner().invoke(main, ["bench", "dare", "--batch", "2"])
    assert result.exit_code == 2 and "n must be given once for each batch" in result.stderr


def test_cycles_are_timed_beside_the_lift():
    name = "p 5, n 10 to 2"
    (row,) = bench_cyclic.bench_cyclic([name])
    assert (row.phases, row.states) == (5, 30)
    assert min(row.forward, row.backward, row.sweeps, row.lift) > 0
    assert max(row.residual, row.lift_residual, row.difference) < 1e-9
    result = CliRunner().invoke(main, ["bench", "cyclic", "--cycle", name, "--device", "cpu"])
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 3
    result = CliRunner().invoke(main, ["bench", "cyclic", "--cycle", name, "--json"])
    assert json.loads(result.stdout.splitlines()[0])["name"] == name


def test_fixed_points_are_counted_beside_plain_iteration_and_torchdeq():
    name = "linear, rho 0.95"
    rows = {r.solver: r for r in bench_fixed_point.bench_fixed_point([name])}
    assert set(rows) == set(bench_fixed_point.SOLVERS)
    assert all(r.converged == 1.0 and min(r.seconds, r.plain_seconds) > 0 for r in rows.values())
    ours = rows["anderson"]
    assert ours.evaluations < rows["picard"].evaluations < rows["torchdeq:anderson"].evaluations
    assert ours.rows <= 1.1 * ours.least_rows
    result = CliRunner().invoke(main, ["bench", "fixed-point", "--problem", name])
    assert result.exit_code == 0 and "torchdeq:broyden" in result.stdout
    result = CliRunner().invoke(main, ["bench", "fixed-point", "--problem", name, "--json"])
    assert json.loads(result.stdout.splitlines()[0])["solver"] == "picard"


def test_every_kind_of_step_is_timed_beside_gradient_descent(monkeypatch):
    monkeypatch.setattr(bench_step, "_ROUNDS", 1)
    monkeypatch.setattr(bench_step, "_STEPS", {name: 1 for name in bench_step.VARIANTS})
    monkeypatch.setattr(bench_step, "_memory_on", lambda device, name, *_: 1.0 + len(name))
    result = CliRunner().invoke(main, ["bench", "step", "--batch", "2", "--side", "8", "--json"])
    rows = {row["step"]: row for row in map(json.loads, result.stdout.splitlines())}
    assert list(rows) == ["gradient descent", *bench_step.VARIANTS]
    base = rows["gradient descent"]
    assert base["over"] == base["memory_over"] == 1.0
    for row in rows.values():
        assert row["over"] == pytest.approx(row["seconds"] / base["seconds"])
        assert row["memory_over"] == pytest.approx(row["memory"] / base["memory"])
    assert len(list(bench_step.table([bench_step.StepRow("a", 1.0, 1.0, 1.0, 1.0)]))) == 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_peak_of_memory_is_that_of_the_step(capsys):
    bench_step.peak("gradient descent", 16, False)
    whole = float(capsys.readouterr().out)
    state = 128 * 8 * 16 * 16 * 4 / 2**20
    assert state < whole < 500 * state


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True])
def test_steps_are_measured_on_a_gpu(half):
    rows = list(bench_step.bench_step(8, 8, "cuda", half=half))
    assert all(row.seconds > 0 and row.memory > 0 for row in rows)
