"""Tests for `race.py` and `bench_train.py`: what runs, what is kept, what the table says."""

import json
import math
from pathlib import Path

import matplotlib.image
import pytest
from click.testing import CliRunner

from deqlqr.bench_train import MNIST_RACES, mnist_race, only, regression_race
from deqlqr.cli import main
from deqlqr.race import Race, Run, race, table
from deqlqr.solution import ConvergenceError
from deqlqr.training import TrainConfig, Trainer

COMMON = {
    "data": "sine2d", "train_size": 40, "batch_size": 40, "schedule": "constant", "epochs": 3,
    "log_every": 1, "eval_size": 1,
}  # fmt: skip
NATURAL = {"optimizer": "ingd", "route": "output", "lr": 1.0, "damping": 0.1}
METHODS = {
    "output": [NATURAL],
    "Adam": [{"optimizer": "adam", "lr": lr} for lr in (1e-9, 1e-2)],
}


def small(**changes) -> Race:
    options = {"title": "small", "common": COMMON, "methods": METHODS, "measure": "loss",
               "targets": (0.2, 1e-9), "refused": {"dare": "too many states"}}  # fmt: skip
    return Race(**{**options, **changes})


def test_the_grid_runs_on_one_seed_and_its_best_on_all(tmp_path: Path) -> None:
    rows = {row.method: row for row in race(small(), tmp_path, seeds=2)}
    assert list(rows) == ["output", "Adam"]
    folders = {
        str(path.parent.relative_to(tmp_path)) for path in tmp_path.glob("*/*/metrics.jsonl")
    }
    assert folders == {"output/0-0", "output/0-1", "Adam/0-0", "Adam/1-0", "Adam/1-1"}
    assert rows["Adam"].options["lr"] == 1e-2 and rows["Adam"].tried == 2
    ours = rows["output"].runs[0]
    assert ours.steps[1] is None and ours.best < rows["Adam"].runs[0].best
    assert all(run.step_seconds > 0 and run.failure is None for run in rows["output"].runs)
    assert rows["output"].runs[0].best != rows["output"].runs[1].best
    content = json.loads((tmp_path / "race.json").read_text())
    assert content["methods"]["Adam"]["options"]["lr"] == 1e-2
    assert content["methods"]["output"]["runs"][0]["best"] == ours.best
    assert matplotlib.image.imread(tmp_path / "race.png").std() > 0.01


def test_finished_runs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(race(small(), tmp_path, seeds=1))
    monkeypatch.setattr(Trainer, "_train_step", lambda *_: pytest.fail("ran again"))
    assert list(race(small(), tmp_path, seeds=1)) == before
    other = small(common={**COMMON, "epochs": 4})
    with pytest.raises(ValueError, match="holds another run"):
        list(race(other, tmp_path, seeds=1))


def test_a_run_that_fails_is_named_and_the_others_still_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._train_step

    def failing(self, samples, total):
        if self.config.optimizer == "ingd":
            raise ConvergenceError("no fixed point")
        return step(self, samples, total)

    monkeypatch.setattr(Trainer, "_train_step", failing)
    lines = list(table(small(), race(small(), tmp_path, seeds=1)))
    assert "failed: no fixed point" in lines[1] and "failed" not in lines[2]
    assert lines[3].split(None, 1) == ["dare", "not run: too many states"]


def run(steps: int | None, best: float) -> Run:
    return Run((steps,), (None if steps is None else steps / 2,), best, 0.5, None)


def test_the_table_shows_medians_and_a_target_missed_by_most_as_missed() -> None:
    from deqlqr.race import Row

    what = small(measure="accuracy", targets=(0.95,), refused={})
    mostly = Row("a", {"lr": 0.1}, 1, (run(10, 0.96), run(None, 0.9), run(30, 0.97)))
    rarely = Row("b", {"lr": 0.1}, 1, (run(10, 0.96), run(None, 0.9), run(None, 0.9)))
    _, first, second = table(what, [mostly, rarely])
    assert first.split()[1:5] == ["500.0", "30", "15.0", "96.00%"]
    assert second.split()[1:5] == ["500.0", "-", "-", "90.00%"]


def test_the_best_reaches_the_hardest_target_in_fewest_steps() -> None:
    both = Run((10, 50), (1.0, 2.0), 0.98, 0.1, None)
    fast = Run((5, None), (1.0, None), 0.97, 0.1, None)
    late = Run((5, 60), (1.0, 2.0), 0.98, 0.1, None)
    assert sorted([fast, late, both], key=lambda r: r.rank) == [both, late, fast]
    assert math.isinf(fast.rank[1])


@pytest.mark.parametrize(
    "what", [regression_race(), *[mnist_race(name, Path("x")) for name in MNIST_RACES]]
)
def test_every_run_of_a_race_is_valid_and_every_route_is_in_it(what: Race) -> None:
    configs = {
        name: [TrainConfig(**{**what.common, **options}) for options in grid]
        for name, grid in what.methods.items()
    }
    routes = {c.route for grid in configs.values() for c in grid if c.optimizer == "ingd"}
    assert routes | set(what.refused) == {"dare", "output", "sampled", "krylov", "kronecker"}
    assert {c.optimizer for grid in configs.values() for c in grid} >= {"ingd", "sgd", "adam"}
    assert len({(c.data, c.model, c.batch_size) for grid in configs.values() for c in grid}) == 1
    assert all(len({str(c) for c in grid}) == len(grid) for grid in configs.values())


def test_a_race_of_some_methods() -> None:
    assert list(only(regression_race(), ["Adam", "output"]).methods) == ["output", "Adam"]
    assert only(regression_race(), []).refused
    with pytest.raises(ValueError, match="method must be one of"):
        only(regression_race(), ["adam"])


def test_the_commands_say_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call = lambda *args: CliRunner().invoke(main, ["bench", *args])
    assert "method must be one of" in call("regression", "--method", "adam").stderr
    assert "Did you mean 'Adam'" in call("regression", "--method", "adam").stderr
    missing = call("train", "--data-root", "absent")
    assert missing.exit_code == 2 and "data root 'absent' is not a folder" in missing.stderr
    assert call("train").exit_code == 2 and call("regression", "--seeds", "0").exit_code == 2
