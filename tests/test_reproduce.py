"""Figures repeated: which experiment runs, at which scale, what is refused; the slides' figures."""

import json
from pathlib import Path

import matplotlib.image
import pytest
from click.testing import CliRunner, Result

from deqlqr.cli import main
from deqlqr.reproduce import FIGURES, Experiment, reproduce
from deqlqr.training import Trainer

SCALED = {
    "fig3.1": 12_000, "fig4.1": 2500, "fig5.1": 12_000, "emsa-fig1": 200, "emsa-fig2": 5500,
    "ddp-table3": 2000, "ddp-table4": 2000, "ddp-fig3": 500, "ddp-fig5": 2000,
}  # fmt: skip


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that experiments were run with; nothing is run."""
    steps: list[int] = []

    def run(data_root: Path | None, out: Path, given: int) -> str:
        steps.append(given)
        return f"{data_root} {out}"

    for name, known in FIGURES.items():
        monkeypatch.setitem(FIGURES, name, Experiment(run, known.steps, known.full, known.mnist))
    return steps


def test_an_unknown_figure_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="figure must .*'fig9'"):
        reproduce("fig9", tmp_path, tmp_path, 1)


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_refused_before_anything_is_written(tmp_path: Path, steps: int) -> None:
    with pytest.raises(ValueError, match="steps must"):
        reproduce("fig4.1", tmp_path, tmp_path / "out", steps)
    assert not (tmp_path / "out").exists()


def test_the_figures_of_mnist_want_it(tmp_path: Path) -> None:
    for name in ("fig3.1", "fig4.1", "fig5.1", "fig5.1-deq", "emsa-fig2"):
        with pytest.raises(ValueError, match=f"figure '{name}' needs a data root"):
            reproduce(name, None, tmp_path, 1)


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_has_its_usual_steps_or_those_given(name: str, taken: list[int]) -> None:
    assert reproduce(name, Path("data"), Path("out")) == "data out"
    reproduce(name, Path("data"), Path("out"), 7)
    assert taken == [FIGURES[name].steps, 7]


@pytest.mark.parametrize("name", FIGURES)
def test_full_is_the_scale_of_the_paper(name: str, taken: list[int]) -> None:
    if name in SCALED:
        reproduce(name, Path("data"), Path("out"), full=True)
        assert taken == [SCALED[name]]
        with pytest.raises(ValueError, match="steps cannot be given with full, .* got 7"):
            reproduce(name, Path("data"), Path("out"), 7, full=True)
    else:
        with pytest.raises(ValueError, match=f"full is for .*'{name}' has one scale"):
            reproduce(name, Path("data"), Path("out"), full=True)
        assert taken == []


def test_the_command_line_hands_on_steps_and_scale(taken: list[int]) -> None:
    def call(*args: str) -> Result:
        return CliRunner().invoke(main, ["reproduce", "fig3.1", "--data-root", "data", *args])

    assert call("--full").output == f"data {Path('runs') / 'fig3.1'}\n"
    assert call("--steps", "7", "--out", "there").output == "data there\n"
    assert taken == [12_000, 7]
    both = call("--full", "--steps", "7")
    assert both.exit_code == 2 and "steps cannot be given with full" in both.stderr
    assert len(taken) == 2


def test_the_spiral_writes_its_pictures_and_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deqlqr.reproduce_points._METHODS", {"Kutta(4)": "kutta4"})
    monkeypatch.setattr("deqlqr.reproduce_points._STEP_SIZES", {"Net": "net", "ODENet": "odenet"})
    monkeypatch.setattr("deqlqr.reproduce_points._EQUILIBRIA", {"DEQ, Euler": "gradient"})
    monkeypatch.setattr("deqlqr.reproduce_points.POINT_SETS", ("spiral", "donut1d"))
    monkeypatch.setattr("deqlqr.training.plot_curves", lambda *_: None)
    monkeypatch.setattr("deqlqr.point_figures._PIXELS", 21)
    line = reproduce("spiral", None, tmp_path, 2)
    names = ("spiral", "odenet", "spiral-deq", "transition", "points")
    assert all(matplotlib.image.imread(tmp_path / f"{name}.png").ndim == 3 for name in names)
    content = json.loads((tmp_path / "spiral.json").read_text())
    assert content["line"] == line and "2 steps" in line
    assert {(row["kind"], row["data"]) for row in content["rows"]} == {
        ("Kutta(4)", "spiral"), ("Net", "spiral"), ("ODENet", "spiral"), ("DEQ, Euler", "spiral"),
        ("DEQ, Euler", "donut1d"),
    }  # fmt: skip
    monkeypatch.setattr(Trainer, "_train_step", lambda *_: pytest.fail("ran again"))
    for name in ("plot_points", "plot_transition"):
        monkeypatch.setattr(f"deqlqr.reproduce_points.{name}", lambda *_, **__: None)
    assert reproduce("spiral", None, tmp_path, 2) == line
    with pytest.raises(ValueError, match="holds another run"):
        reproduce("spiral", None, tmp_path, 3)


def test_the_fields_write_their_picture_and_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {name: {14: [0.2, 0.3], 28: [0.4, 0.5]} for name in ("layers", "fields", "deq")}
    monkeypatch.setattr("deqlqr.reproduce_points.study", lambda options: found)
    line = reproduce("fields", None, tmp_path / "out", 1)
    assert "25.0% with 14, 45.0% with 28" in line
    assert matplotlib.image.imread(tmp_path / "out" / "fields.png").ndim == 3
    curves = json.loads((tmp_path / "out" / "fields.json").read_text())["curves"]
    assert len(curves) == 3 and all(curve["28"] == [0.4, 0.5] for curve in curves.values())
