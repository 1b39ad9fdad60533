"""The command line: help, misuse, folders, interruption and resume, the check's exit status."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import deqlqr.deq_equivalence
from deqlqr import DEQ, DenseBlock
from deqlqr.checkpoint import load_checkpoint, save_checkpoint
from deqlqr.cli import main
from deqlqr.metrics import read_metrics
from deqlqr.solution import ConvergenceError
from deqlqr.training import CHECKPOINT, CURVES, METRICS, TrainConfig, Trainer

FAST = (
    "--optimizer gd --train-size 40 --batch-size 8 --epochs 1 --log-every 2 --eval-size 20"
).split()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deqlqr.training.plot_curves", lambda *_: None)


def tiny(name: str, shape: tuple[int, ...], outputs: int, *, seed: int = 0) -> nn.Module:
    """A model of few controls in the place of any other."""
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(encoder, DEQ(DenseBlock(3, 4)), nn.Linear(3, outputs))


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check has that model, for speed; one test has the models' own."""
    monkeypatch.setattr("deqlqr.cli.make_model", tiny)
    monkeypatch.setattr("deqlqr.training.make_model", tiny)


@pytest.fixture
def trained() -> Path:
    """A run's folder with a checkpoint of its beginning."""
    config = TrainConfig(optimizer="gd", train_size=40, batch_size=8, epochs=1)
    Trainer(config, Path("run"), torch.device("cpu")).save()
    return Path("run")


def call(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def misuse(result: Result, *words: str, code: int = 2) -> None:
    """The result is one line on standard error that holds the words."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("deqlqr: ") and result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


def console(*args: str) -> list[str]:
    return [sys.executable, "-c", "from deqlqr.cli import main; main()", *args]


# --- help and options ------------------------------------------------------------------------


def test_the_group_lists_its_commands_and_its_version() -> None:
    shown = call("--help").output
    assert all(name in shown for name in ("train", "check", "reproduce"))
    assert deqlqr.__version__ in call("--version").output


@pytest.mark.parametrize("command", ["train", "check", "reproduce"])
def test_help_lists_every_option_with_a_help_text(command: str) -> None:
    for flag in ("--help", "-h"):
        result = call(command, flag)
        assert result.exit_code == 0
    for parameter in main.commands[command].params:  # type: ignore[attr-defined]
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert all(name in result.output for name in parameter.opts)


def test_every_option_of_a_run_can_be_given_and_has_the_same_default() -> None:
    options = {p.name: p for p in main.commands["train"].params}  # type: ignore[attr-defined]
    for field in fields(TrainConfig):
        assert field.name in options
        # lr and model depend on other options.
        if field.name not in ("lr", "model") and field.default is not None:
            assert options[field.name].default == field.default


@pytest.mark.parametrize(
    "args",
    [
        ["train", "--learning-rate", "1"],
        ["train", "--optimiser", "ingd"],
        ["check", "--sample", "3x"],
        ["reproduce", "fig4.1", "--data_root", "."],
        ["reproduce", "fig9.9", "--data-root", "."],
        ["reproduce"],
        ["tran"],
        ["train", "extra"],
        ["train", "--optimizer", "newton"],
        ["train", "--lr", "fast"],
        ["train", "--batch-size", "2.5"],
    ],
)
def test_a_misspelt_option_is_refused(args: list[str]) -> None:
    result = call(*args)
    assert result.exit_code == 2 and "Error: " in result.stderr
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", "0"),
        ("lr", "nan"),
        ("damping", "-1"),
        ("damping", "inf"),
        ("batch-size", "0"),
        ("batch-size", "99999"),
        ("epochs", "0"),
        ("train-size", "0"),
        ("train-size", "99999"),
        ("max-steps", "0"),
        ("log-every", "0"),
        ("eval-size", "-3"),
        ("seed", "-1"),
        ("seed", "99999999999999999999"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: str) -> None:
    misuse(call("train", f"--{name}", value), name.replace("-", "_"), value)
    assert not Path("runs").exists()


def test_mnist_without_its_folder_is_refused() -> None:
    misuse(call("train", "--data", "mnist"), "data root")
    misuse(call("train", "--data", "mnist", "--data-root", "absent"), "data root 'absent'")
    misuse(call("check", "--data", "mnist", "--data-root", "."), "data root '.'")
    misuse(call("reproduce", "fig4.1", "--data-root", "absent", "--steps", "1"), "'absent'")
    misuse(call("reproduce", "fig4.1", "--data-root", ".", "--steps", "0"), "steps", "0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_refused() -> None:
    misuse(call("train", "--device", "cuda"), "device 'cuda'")


# --- folders ---------------------------------------------------------------------------------


def test_a_folder_that_is_not_empty_is_refused_and_left_alone() -> None:
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    misuse(call("train", *FAST, "--out", "full"), "out 'full'", "--resume")
    assert [p.name for p in Path("full").iterdir()] == ["notes.txt"]
    misuse(call("train", *FAST, "--out", "full/notes.txt"), "out 'full/notes.txt'")
    misuse(call("train", *FAST, "--out", "full/notes.txt/run"), "out 'full/notes.txt/run'")
    assert Path("full/notes.txt").read_text() == "mine"


def test_a_run_goes_into_an_empty_or_new_folder() -> None:
    Path("empty").mkdir()
    for out in ("empty", "new/one"):
        result = call("train", *FAST, "--max-steps", 1, "--out", out)
        assert result.exit_code == 0, result.output
        assert {p.name for p in Path(out).iterdir()} == {METRICS, CURVES, CHECKPOINT}
        assert "after 1 steps" in result.stdout and result.stdout.strip().endswith(out)


def test_least_squares_has_defaults_of_its_own(no_figures: None) -> None:
    result = call("train", "--data", "sine2d", "--max-steps", 2, "--out", "run")
    assert result.exit_code == 0, result.output
    assert "test error" in result.stdout
    config = load_checkpoint(Path("run", CHECKPOINT))["config"]
    chosen = {"route": "output", "adaptive": True, "acceleration": True, "batch_size": 400}
    assert config.items() >= {**chosen, "schedule": "constant", "lr": 1.0}.items()
    args = ["--data", "sine2d", "--max-steps", 1, "--route", "sampled", "--lr", 0.5]
    assert call("train", *args, "--out", "own").exit_code == 0
    assert load_checkpoint(Path("own", CHECKPOINT))["config"]["lr"] == 0.5
    adam = ["--data", "sine2d", "--max-steps", 1, "--optimizer", "adam", "--out", "adam"]
    assert call("train", *adam).exit_code == 0
    assert load_checkpoint(Path("adam", CHECKPOINT))["config"]["lr"] == 0.01


def test_default_folders_are_numbered_and_none_is_used_twice(no_figures: None) -> None:
    for _ in range(3):
        assert call("train", *FAST, "--max-steps", 1).exit_code == 0
    names = {"digits-gd", "digits-gd-2", "digits-gd-3"}
    assert {p.name for p in Path("runs").iterdir()} == names
    assert all(len(read_metrics(Path("runs") / name / METRICS)) == 1 for name in names)


# --- failure ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConvergenceError("no fixed\npoint"), 1),
        (OSError(28, "No space left"), 1),
        (ValueError("x is\nbad"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_every_error_becomes_one_line_and_an_exit_status(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def fail(self: Trainer) -> None:
        raise error

    monkeypatch.setattr(Trainer, "run", fail)
    misuse(call("train", *FAST), code=code)


# --- resume ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [["--lr", "0.5"], ["--seed", "0"], ["--out", "x"], ["--data", "digits"], ["--max-steps", "3"]],
)
def test_resume_refuses_the_runs_own_options(trained: Path, option: list[str]) -> None:
    misuse(call("train", "--resume", trained, *option), option[0], "--resume")


def test_resume_refuses_all_wrong_options_at_once(trained: Path) -> None:
    result = call("train", "--resume", trained, "--batch-size", 3, "--log-every", 1)
    misuse(result, "--batch-size", "--log-every")


def test_resume_refuses_other_epochs_under_the_cosine_schedule(trained: Path) -> None:
    misuse(call("train", "--resume", trained, "--epochs", 7), "epochs", "cosine")


@pytest.mark.parametrize("junk", [b"", b"junk" * 99])
def test_resume_and_check_refuse_a_corrupt_checkpoint(trained: Path, junk: bytes) -> None:
    (trained / CHECKPOINT).write_bytes(junk)
    for args in (["train", "--resume"], ["check", "--checkpoint"]):
        misuse(call(*args, trained), str(trained / CHECKPOINT), "corrupt")
        misuse(call(*args, trained / CHECKPOINT), str(trained / CHECKPOINT), "corrupt")


def test_resume_and_check_refuse_a_foreign_or_missing_checkpoint(trained: Path) -> None:
    torch.save({"weights": torch.ones(3)}, "foreign.pt")
    save_checkpoint("other.pt", {"weights": torch.ones(3)})
    for args in (["train", "--resume"], ["check", "--checkpoint"]):
        misuse(call(*args, "foreign.pt"), "'foreign.pt'", "not written by deqlqr")
        misuse(call(*args, "other.pt"), "'other.pt'", "no run")
        misuse(call(*args, "absent"), "'absent'", "does not exist")


def test_resume_and_check_refuse_parameters_that_do_not_fit(trained: Path) -> None:
    content = load_checkpoint(trained / CHECKPOINT)
    for broken in (None, {}, {"0.weight": torch.ones(2)}):
        save_checkpoint(trained / CHECKPOINT, content | {"model": broken})
        misuse(call("train", "--resume", trained), "checkpoint", "not fit")
        misuse(call("check", "--checkpoint", trained), "checkpoint", "not fit")


def test_a_constant_schedule_can_be_resumed_for_more_epochs(no_figures: None) -> None:
    assert call("train", *FAST, "--schedule", "constant", "--out", "run").exit_code == 0
    result = call("train", "--resume", "run", "--epochs", 2)
    assert result.exit_code == 0 and "after 10 steps" in result.stdout


def test_ctrl_c_ends_with_130_says_how_to_resume_and_the_resume_finishes(
    no_figures: None,
) -> None:
    options = [*FAST, "--epochs", "400", "--schedule", "constant", "--out", "run"]
    process = subprocess.Popen(
        console("train", *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        limit = time.monotonic() + 60
        while not Path("run", CHECKPOINT).exists():
            assert process.poll() is None and time.monotonic() < limit, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "deqlqr train --resume run" in out and "Traceback" not in err
    step = load_checkpoint(Path("run", CHECKPOINT))["step"]
    assert 0 < step < 2000
    epochs = step // 5 + 1
    result = call("train", "--resume", "run", "--epochs", epochs)
    assert result.exit_code == 0 and f"after {5 * epochs} steps" in result.stdout
    lines = read_metrics(Path("run", METRICS))
    assert [line["epoch"] for line in lines if line["kind"] == "epoch"] == [*range(1, epochs + 1)]
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps) and steps[-1] == 5 * epochs


def test_the_console_script_reports_misuse_without_a_traceback() -> None:
    script = Path(sys.executable).with_name("deqlqr")
    command = [str(script)] if script.exists() else console()
    found = subprocess.run(
        [*command, "check", "--samples", "0"], capture_output=True, text=True, timeout=60
    )
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.splitlines()[-1].startswith("deqlqr: samples must lie in")
    assert "Traceback" not in found.stderr


# --- check -----------------------------------------------------------------------------------


def test_check_prints_the_table_and_succeeds() -> None:
    result = call("check", "--model", "dense", "--samples", 1)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("dense model on digits\nquantity")
    assert "every row holds" in result.stdout and "FAILS" not in result.stdout


def test_check_prints_json_that_says_the_same(tiny_model: None) -> None:
    result = call("check", "--model", "dense", "--samples", 2, "--json")
    assert result.exit_code == 0, result.output

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    report = json.loads(result.stdout, parse_constant=refuse)["dense"]
    assert report["passed"] is report["complete"] is True
    assert report["facts"]["batch"] == 2 and report["facts"]["damping"] == 1e-2
    assert all(row["error"] <= row["tolerance"] for row in report["rows"])
    assert len(report["rows"]) >= 8


@pytest.mark.parametrize("tolerance", ["STEP_TOLERANCE", "GRADIENT_TOLERANCE"])
def test_check_fails_if_one_row_fails(
    tiny_model: None, monkeypatch: pytest.MonkeyPatch, tolerance: str
) -> None:
    monkeypatch.setattr(deqlqr.deq_equivalence, tolerance, 0.0)
    result = call("check", "--model", "dense", "--samples", 2)
    assert result.exit_code == 1
    assert "FAILS" in result.stdout and "NOT every row holds" in result.stdout


def test_check_takes_a_trained_model(
    tiny_model: None, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = load_checkpoint(trained / CHECKPOINT)
    # A model of its own: half the readout of the fresh one.
    content["model"]["2.weight"] *= 0.5
    save_checkpoint(trained / CHECKPOINT, content)
    seen = []
    original = deqlqr.cli.check_equivalence

    def watched(model: torch.nn.Module, *args: object, **options: object) -> object:
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return original(model, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(deqlqr.cli, "check_equivalence", watched)
    result = call("check", "--checkpoint", trained, "--samples", 2)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("dense model on digits") and len(seen) == 1
    assert all(torch.equal(v, content["model"][k]) for k, v in seen[0].items())


@pytest.mark.parametrize("option", [["--model", "conv"], ["--seed", "3"], ["--data", "digits"]])
def test_check_refuses_the_trained_models_own_options(trained: Path, option: list[str]) -> None:
    misuse(call("check", "--checkpoint", trained, *option), option[0], "--checkpoint")


@pytest.mark.parametrize(
    ("name", "value"),
    [("samples", "0"), ("samples", "99999"), ("damping", "0"), ("damping", "nan"), ("seed", "-1")],
)
def test_check_refuses_a_value_out_of_range(name: str, value: str) -> None:
    misuse(call("check", "--model", "dense", f"--{name}", value), name, value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--optimizer", "gd", "--damping", "1"], "--damping has no effect with --optimizer gd"),
        (["--data-root", "x"], "--data-root has no effect with --data digits"),
        (["--speed", "1"], "--speed has no effect with --outer none"),
        (["--optimizer", "adam", "--adaptive"], "--adaptive has no effect with --optimizer adam"),
        (["--data", "sine2d", "--model", "conv"], "model 'conv' takes images"),
        (["--data", "sine2d", "--route", "dare"], "400 samples of 32 states are too many"),
        (["--route", "krylov", "--acceleration"], "acceleration needs route 'output' or 'sampled'"),
    ],
)
def test_an_option_without_effect_is_refused(arguments, message):
    result = CliRunner().invoke(main, ["train", *arguments])
    assert result.exit_code == 2 and message in result.stderr


def test_points_in_the_plane_have_defaults_of_their_own(no_figures: None) -> None:
    assert call("train", "--data", "spiral", "--epochs", 2, "--out", "spiral").exit_code == 0
    config = TrainConfig.from_dict(load_checkpoint(Path("spiral") / CHECKPOINT)["config"])
    assert (config.model, config.route, config.adaptive, config.lr) == (
        "gradient", "output", True, 1.0,
    )  # fmt: skip
    assert (config.batch_size, config.epochs, config.damping) == (500, 2, 1e-2)
    options = "--data spiral --model kutta4 --optimizer adam --epochs 2 --out adam"
    assert call("train", *options.split()).exit_code == 0
    config = TrainConfig.from_dict(load_checkpoint(Path("adam") / CHECKPOINT)["config"])
    assert (config.model, config.lr, config.schedule) == ("kutta4", 0.01, "constant")


def test_an_outer_momentum_is_an_option_of_a_run(no_figures: None) -> None:
    options = "--outer nesterov --friction 0.3 --speed 0.5 --out run"
    assert call("train", *FAST, *options.split()).exit_code == 0
    config = TrainConfig.from_dict(load_checkpoint(Path("run") / CHECKPOINT)["config"])
    assert (config.outer, config.friction, config.speed) == ("nesterov", 0.3, 0.5)
    misuse(call("train", "--outer", "leapfrog", "--momentum", 0.5), "momentum", "'leapfrog'")


def test_guard_warmup_and_penalty_are_options_of_a_run(no_figures: None) -> None:
    options = "--penalty 0.1 --no-guard --warmup 1 --warmup-depth 2 --out run"
    assert call("train", *FAST, *options.split()).exit_code == 0
    config = TrainConfig.from_dict(load_checkpoint(Path("run") / CHECKPOINT)["config"])
    assert (config.penalty, config.guard, config.warmup, config.warmup_depth) == (0.1, False, 1, 2)
    misuse(call("train", "--warmup", 3), "warmup", "'dare'")
