"""Training runs: options, metrics, reproducibility, interruption and resume."""

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from torch import Tensor

from deqlqr.checkpoint import load_checkpoint, save_checkpoint
from deqlqr.data import Data, load_data
from deqlqr.deq import find_deq
from deqlqr.metrics import MetricsFile, read_metrics
from deqlqr.models import make_model
from deqlqr.solution import ConvergenceError
from deqlqr.training import (
    CHECKPOINT,
    CURVES,
    METRICS,
    OPTIMIZERS,
    TrainConfig,
    Trainer,
    TrainResult,
    evaluate,
    resume_config,
)

# 40 samples in batches of 8: 5 steps an epoch.
SMALL = TrainConfig(batch_size=8, train_size=40, epochs=2, log_every=2, eval_size=10)
RATE = {"ingd": 0.5, "gd": 0.3, "sgd": 0.1, "adam": 0.01, "lbfgs": 1.0}


@pytest.fixture
def figures() -> None:
    """Asked for by the tests that look at the curves; the others do without, for speed."""


@pytest.fixture(autouse=True)
def _figures_on_demand(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "figures" not in request.fixturenames:
        monkeypatch.setattr("deqlqr.training.plot_curves", lambda *_: None)


def few_to_test(*args: Any) -> Data:
    """The data with 20 samples to test, for speed."""
    data = load_data(*args)
    return replace(data, test_x=data.test_x[:20], test_y=data.test_y[:20])


@pytest.fixture(autouse=True)
def _few_to_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deqlqr.training.load_data", few_to_test)


@pytest.fixture(scope="module")
def whole_run(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[Path, TrainResult]]:
    """The folder and the result of an uninterrupted run of an optimizer, made once."""

    @cache
    def of(optimizer: str) -> tuple[Path, TrainResult]:
        folder = tmp_path_factory.mktemp(f"whole-{optimizer}")
        return folder, run(small(optimizer), folder)

    return of


def small(optimizer: str = "ingd", **options: Any) -> TrainConfig:
    return replace(SMALL, optimizer=optimizer, lr=RATE[optimizer], **options)


def start(config: TrainConfig, folder: Path) -> Trainer:
    return Trainer(config, folder, torch.device("cpu"))


def resume(folder: Path, epochs: int | None = None) -> Trainer:
    config, content, found = resume_config(folder, epochs)
    return Trainer(config, found, torch.device("cpu"), content)


def run(config: TrainConfig, folder: Path) -> TrainResult:
    return start(config, folder).run(quiet=True)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics lines without the time they took."""
    lines = read_metrics(folder / METRICS)
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def same(a: object, b: object) -> bool:
    """Whether nested containers of tensors agree in every bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_state(a: Path, b: Path) -> bool:
    first, second = load_checkpoint(a / CHECKPOINT), load_checkpoint(b / CHECKPOINT)
    return same(*({**c, "seconds": None} for c in (first, second)))


def disturb(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, after: int, act: Any) -> None:
    """Call `act` in the middle of the step that follows `after` steps, once learning has begun."""
    step = trainer.stepper.step

    def disturbed(x: Tensor, y: Tensor) -> Tensor:
        loss = step(x, y)
        if trainer.step == after:
            act()
        return loss

    monkeypatch.setattr(trainer.stepper, "step", disturbed)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


# --- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, "no such") for name in ("data", "model", "optimizer", "minibatch", "schedule")],
        ("route", "krylof"),
        *[("momentum", v) for v in (-1.0, "x")],
        *[("trust_region", v) for v in (0.0, -1.0, math.inf)],
        *[("check_every", v) for v in (0, 2.5, None)],
        *[(n, v) for n in ("lr", "damping") for v in (0.0, -1.0, math.nan, math.inf, "x")],
        *[
            (n, v)
            for n in ("batch_size", "epochs", "log_every", "eval_size", "train_size", "max_steps")
            for v in (0, -1, 2.5, "x", True)
        ],
        *[(n, None) for n in ("batch_size", "epochs", "log_every", "eval_size")],
        *[("seed", v) for v in (-1, 2**32, 10**30, 0.5, None)],
    ],
)
def test_a_bad_option_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        TrainConfig(**{name: value})  # type: ignore[arg-type]


def test_a_config_survives_the_way_through_a_checkpoint() -> None:
    assert TrainConfig.from_dict(asdict(SMALL)) == SMALL


def test_a_checkpoint_with_other_options_is_refused() -> None:
    values = asdict(SMALL)
    with pytest.raises(ValueError, match="nesterov"):
        TrainConfig.from_dict(values | {"nesterov": 0.9})
    del values["lr"]
    with pytest.raises(ValueError, match="lr"):
        TrainConfig.from_dict(values)


def test_sizes_that_do_not_fit_the_data_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="batch_size must be at most the 40"):
        start(replace(SMALL, batch_size=41), folder)
    with pytest.raises(ValueError, match="train_size"):
        start(replace(SMALL, train_size=10**6), folder)
    assert not folder.exists()


# --- what a run writes -----------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["ingd", "adam"])
def test_a_run_writes_metrics_curves_and_checkpoint(
    tmp_path: Path, figures: None, optimizer: str
) -> None:
    result = run(small(optimizer, epochs=1), tmp_path)
    assert (result.steps, result.interrupted, result.folder) == (5, False, tmp_path)
    assert 0 <= result.score <= 1 and result.seconds > 0
    lines = read_metrics(tmp_path / METRICS)
    shown = [(line["kind"], line["step"]) for line in lines]
    assert shown == [("step", 2), ("step", 4), ("step", 5), ("epoch", 5)]
    for line in lines:
        assert math.isfinite(line["loss"]) and 0 <= line["accuracy"] <= 1
        assert line["epoch"] == 1 and line["test_not_converged"] == 0
        assert line["evaluations"] >= 1 and 0 <= line["residual"] < 1e-3
        if optimizer == "ingd":
            assert 0 < line["closed_loop_radius"] < 1 and line["damping"] >= SMALL.damping
            assert line["rejections"] >= 0
        else:
            assert line["closed_loop_radius"] is line["damping"] is line["rejections"] is None
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert lines[-1]["accuracy"] == result.score
    assert (tmp_path / CURVES).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert matplotlib.image.imread(tmp_path / CURVES).std() > 0.01
    assert load_checkpoint(tmp_path / CHECKPOINT)["step"] == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([METRICS, CURVES, CHECKPOINT])


@pytest.mark.parametrize("optimizer", ["ingd", "gd"])
def test_metrics_report_the_training_solve_not_that_of_the_test_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    trainer = start(small(optimizer, max_steps=5), tmp_path)
    seen: list[dict[str, float]] = []
    step = trainer.stepper.step

    def watched(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            trainer.model(x)
        solution = find_deq(trainer.model).solution
        assert solution is not None
        seen.append({
            "evaluations": float(solution.evaluations.double().mean()),
            "residual": float(solution.residual.max()),
        })
        return step(x, y)

    monkeypatch.setattr(trainer.stepper, "step", watched)
    trainer.run(quiet=True)
    for line in metrics(tmp_path):
        assert {k: line[k] for k in ("evaluations", "residual")} == seen[line["step"] - 1]


def test_a_quiet_run_prints_nothing_and_a_loud_one_each_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small("gd", epochs=1)
    start(config, tmp_path / "a").run(quiet=True)
    assert capsys.readouterr() == ("", "")
    start(config, tmp_path / "b").run()
    assert capsys.readouterr().out.startswith("epoch 1: loss ")


def test_an_interrupt_before_the_first_metrics_line_still_ends_cleanly(
    tmp_path: Path, figures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = start(replace(SMALL, log_every=100), tmp_path)
    disturb(trainer, monkeypatch, 0, interrupt)
    assert trainer.run(quiet=True).interrupted
    assert read_metrics(tmp_path / METRICS) == []
    assert matplotlib.image.imread(tmp_path / CURVES).ndim == 3


# --- learning --------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["dense", "conv"])
@pytest.mark.parametrize(
    ("optimizer", "minibatch"),
    [("ingd", "exact"), ("ingd", "per-sample"), *[(o, "exact") for o in OPTIMIZERS[1:]]],
)
def test_every_optimizer_changes_the_parameters_of_every_model(
    tmp_path: Path, optimizer: str, minibatch: str, model: str
) -> None:
    steps = 1 if optimizer == "lbfgs" else 2  # one has 20 iterations
    config = small(optimizer, model=model, minibatch=minibatch, max_steps=steps)
    config = replace(config, batch_size=4, log_every=1)
    trainer = start(config, tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    assert trainer.run(quiet=True).steps == steps
    lines = read_metrics(tmp_path / METRICS)
    assert len(lines) == steps and all(math.isfinite(line["loss"]) for line in lines)
    for name, p in trainer.model.named_parameters():
        assert bool(p.isfinite().all()) and not torch.equal(p, before[name]), name


def test_both_routes_train_to_the_same_parameters(tmp_path: Path) -> None:
    ends = {}
    for route in ("dare", "output"):
        trainer = start(small(route=route, max_steps=4), tmp_path / route)
        trainer.run(quiet=True)
        ends[route] = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert (ends["dare"] - ends["output"]).norm() < 1e-3 * ends["dare"].norm()
    assert all(
        line["closed_loop_radius"] is None for line in read_metrics(tmp_path / "output" / METRICS)
    )


@pytest.mark.parametrize(
    ("model", "route", "epochs"), [("dense", "dare", 3), ("conv", "output", 6)]
)
def test_the_loss_on_the_training_data_falls(
    tmp_path: Path, model: str, route: str, epochs: int
) -> None:
    trainer = start(small(model=model, route=route, damping=0.1, epochs=epochs), tmp_path)
    data = trainer.data

    def loss() -> float:
        with torch.no_grad():
            outputs = trainer.model(data.train_x)
        return float(torch.nn.functional.cross_entropy(outputs, data.train_y))

    before = loss()
    trainer.run(quiet=True)
    assert loss() < 0.8 * before


@pytest.mark.parametrize("optimizer", ["ingd", "sgd"])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_step_length_follows_the_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str, optimizer: str
) -> None:
    config = small(optimizer, schedule=schedule)
    trainer = start(config, tmp_path)
    seen: list[float] = []

    def watched(x: Tensor, y: Tensor) -> Tensor:
        seen.append(trainer.optimizer.param_groups[0]["lr"])
        return torch.zeros(())

    monkeypatch.setattr(trainer.stepper, "step", watched)
    trainer.run(quiet=True)
    assert len(seen) == 10 and seen[0] == config.lr
    if schedule == "constant":
        assert set(seen) == {config.lr}
    else:
        assert seen == sorted(seen, reverse=True) and 0 < seen[-1] < 0.05 * config.lr
        assert seen[5] == pytest.approx(config.lr / 2)


# --- reproducibility and resume --------------------------------------------------------------


def test_the_seed_and_nothing_else_decides_the_numbers(tmp_path: Path) -> None:
    config = small("gd", epochs=1)
    torch.manual_seed(5)
    run(config, tmp_path / "a")
    torch.manual_seed(6)
    run(config, tmp_path / "b")
    run(replace(config, seed=1), tmp_path / "c")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert same_state(tmp_path / "a", tmp_path / "b")
    losses = [[line["loss"] for line in metrics(tmp_path / f)] for f in "ac"]
    assert all(a != c for a, c in zip(*losses, strict=True))


def test_the_epochs_see_every_sample_once_in_another_order(tmp_path: Path) -> None:
    trainer = start(small("gd"), tmp_path)
    first, second = trainer._order(0), trainer._order(1)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(40))
    assert not torch.equal(first, second)
    assert torch.equal(first, trainer._order(0))


# 3 lies between two metrics lines, 4 on one, 5 at the end of an epoch, 1 before the first line.
@pytest.mark.parametrize(
    ("optimizer", "stop"), [("ingd", 3), ("adam", 1), ("adam", 4), ("adam", 5)]
)
def test_an_interrupted_and_resumed_run_equals_the_uninterrupted_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole_run: Callable[[str], tuple[Path, TrainResult]],
    optimizer: str,
    stop: int,
) -> None:
    (whole, expected), parts = whole_run(optimizer), tmp_path
    previous = signal.getsignal(signal.SIGINT)
    trainer = start(small(optimizer), parts)
    disturb(trainer, monkeypatch, stop - 1, interrupt)
    first = trainer.run(quiet=True)
    assert signal.getsignal(signal.SIGINT) is previous
    assert first.interrupted and first.steps == stop
    assert load_checkpoint(parts / CHECKPOINT)["step"] == stop
    assert not same_state(whole, parts)
    second = resume(parts).run(quiet=True)
    assert (second.interrupted, second.steps) == (False, expected.steps)
    assert second.score == expected.score and second.seconds > first.seconds
    assert same_state(whole, parts)
    assert metrics(whole) == metrics(parts)


def test_an_interrupt_in_the_last_step_does_not_make_the_run_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = start(small("gd"), tmp_path)
    disturb(trainer, monkeypatch, 9, interrupt)
    assert not trainer.run(quiet=True).interrupted


@pytest.mark.parametrize("optimizer", ["ingd", "adam"])
def test_a_second_interrupt_in_the_middle_of_a_step_leaves_the_last_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole_run: Callable[[str], tuple[Path, TrainResult]],
    optimizer: str,
) -> None:
    (whole, _), parts = whole_run(optimizer), tmp_path
    trainer = start(small(optimizer), parts)
    disturb(trainer, monkeypatch, 6, lambda: (interrupt(), interrupt()))
    with pytest.raises(KeyboardInterrupt):
        trainer.run(quiet=True)
    assert load_checkpoint(parts / CHECKPOINT)["step"] == 6
    resume(parts).run(quiet=True)
    assert same_state(whole, parts)
    assert metrics(whole) == metrics(parts)


def test_a_kill_between_two_lines_of_metrics_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(small("gd"), log_every=5)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(config, whole)
    trainer = start(config, parts)
    write = trainer.metrics.write

    def killed(line: dict[str, Any]) -> None:
        if line["kind"] == "epoch" and line["epoch"] == 2:
            raise KeyboardInterrupt
        write(line)

    monkeypatch.setattr(trainer.metrics, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(quiet=True)
    resume(parts).run(quiet=True)
    assert metrics(whole) == metrics(parts)


def test_resuming_cuts_the_metrics_later_than_the_checkpoint(tmp_path: Path) -> None:
    config = small("gd")
    run(config, tmp_path)
    kept = metrics(tmp_path)
    content = load_checkpoint(tmp_path / CHECKPOINT)
    save_checkpoint(tmp_path / CHECKPOINT, content | {"step": 5})
    resume(tmp_path)
    assert metrics(tmp_path) == [line for line in kept if line["step"] <= 5]
    assert 0 < len(metrics(tmp_path)) < len(kept)


def test_a_finished_run_resumes_to_the_same_result_without_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(small("gd"), tmp_path)
    lines = metrics(tmp_path)
    trainer = resume(tmp_path)
    monkeypatch.setattr(trainer, "_train_step", lambda *_: pytest.fail("took a step"))
    assert trainer.run(quiet=True) == first
    assert metrics(tmp_path) == lines


def test_more_epochs_of_a_constant_schedule_equal_a_longer_run(tmp_path: Path) -> None:
    longer = small("sgd", schedule="constant")
    run(longer, tmp_path / "long")
    run(replace(longer, epochs=1), tmp_path / "short")
    resume(tmp_path / "short", epochs=2).run(quiet=True)
    assert same_state(tmp_path / "long", tmp_path / "short")


def test_more_epochs_of_a_cosine_schedule_are_refused(tmp_path: Path) -> None:
    start(SMALL, tmp_path).save()
    with pytest.raises(ValueError, match="epochs.*cosine"):
        resume_config(tmp_path, SMALL.epochs + 1)
    assert resume_config(tmp_path, SMALL.epochs)[0] == SMALL


@pytest.mark.parametrize(
    "damage",
    [
        {"model": {}},
        {"model": None},
        {"optimizer": "text"},
        {"optimizer": {}},
        {"optimizer": None},
        {"step": None},
        {"seconds": "x"},
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    tmp_path: Path, damage: dict[str, object]
) -> None:
    trainer = start(small("adam"), tmp_path)
    trainer.save()
    save_checkpoint(tmp_path / CHECKPOINT, load_checkpoint(tmp_path / CHECKPOINT) | damage)
    with pytest.raises(ValueError, match="checkpoint does not fit"):
        resume(tmp_path)


def test_a_checkpoint_without_a_run_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / CHECKPOINT, {"weights": torch.ones(2)})
    with pytest.raises(ValueError, match="holds no run"):
        resume_config(tmp_path, None)


def test_a_failing_step_leaves_the_state_before_it_in_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = start(small("gd"), tmp_path)
    step = trainer.stepper.step

    def failing(x: Tensor, y: Tensor) -> Tensor:
        if trainer.step == 3:
            raise ConvergenceError("no fixed point")
        return step(x, y)

    monkeypatch.setattr(trainer.stepper, "step", failing)
    with pytest.raises(ConvergenceError, match="no fixed point"):
        trainer.run(quiet=True)
    content = load_checkpoint(tmp_path / CHECKPOINT)
    assert content["step"] == 3 and same(content["model"], dict(trainer.model.state_dict()))


def test_a_gradient_step_with_an_infinite_loss_changes_nothing(tmp_path: Path) -> None:
    trainer = start(small("adam"), tmp_path)
    with torch.no_grad():
        trainer.model[-1].bias[0] = math.inf  # type: ignore[index,union-attr]
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    with pytest.raises(ConvergenceError, match="loss is"):
        trainer.stepper.step(trainer.data.train_x[:8], trainer.data.train_y[:8])
    assert same(before, dict(trainer.model.state_dict()))


# --- outer momentum --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outer": "leap-frog"}, "outer must be one of"),
        ({"friction": -0.5}, "friction must be"),
        ({"speed": 0.0}, "speed must be"),
        ({"outer": "nesterov", "optimizer": "lbfgs"}, "outer must be 'none' with optimizer"),
        ({"outer": "heavy-ball", "momentum": 0.5}, "momentum must be 0 with outer 'heavy-ball'"),
    ],
)
def test_an_outer_momentum_that_does_not_fit_is_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


@pytest.mark.parametrize("optimizer", ["ingd", "gd", "sgd", "adam"])
def test_an_outer_momentum_acts_and_its_run_goes_on_to_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    scheme = {"ingd": "leapfrog", "sgd": "nesterov"}.get(optimizer, "heavy-ball")
    config = small(optimizer, outer=scheme, speed=0.3, penalty=0.01, max_steps=6)
    run(config, tmp_path / "whole")
    run(replace(config, outer="none"), tmp_path / "without")
    trainer = start(config, tmp_path / "cut")
    disturb(trainer, monkeypatch, 2, interrupt)
    assert trainer.run(quiet=True).interrupted
    resume(tmp_path / "cut").run(quiet=True)
    assert same_state(tmp_path / "whole", tmp_path / "cut")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    losses = [[line["loss"] for line in metrics(tmp_path / f)] for f in ("whole", "without")]
    assert losses[0] != losses[1]
    line = metrics(tmp_path / "whole")[0]
    assert (line["damping"] is None) == (optimizer != "ingd") and line["evaluations"] >= 1


# --- least squares ---------------------------------------------------------------------------

SURFACE = TrainConfig(
    data="sine2d", train_size=30, batch_size=30, epochs=2, schedule="constant", log_every=1
)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_least_squares_are_trained_by_every_optimizer(
    tmp_path: Path, figures: None, optimizer: str
) -> None:
    natural = {"route": "output", "adaptive": True, "acceleration": True, "damping": 0.1}
    rate = {"ingd": 1.0, "lbfgs": 1.0}.get(optimizer, 0.01)
    options = natural if optimizer == "ingd" else {}
    result = run(replace(SURFACE, optimizer=optimizer, lr=rate, **options), tmp_path)
    lines = read_metrics(tmp_path / METRICS)
    losses = [line["loss"] for line in lines]
    assert losses[-1] < losses[0] and lines[-1]["error"] == result.score
    assert "accuracy" not in lines[0] and matplotlib.image.imread(tmp_path / CURVES).std() > 0.01
    trainer = start(SURFACE, tmp_path / "other")
    assert trainer.data.train_x.dtype == torch.float64
    assert next(trainer.model.parameters()).dtype == torch.float64
    assert sum(p.numel() for p in trainer.model.parameters()) == 1185


def test_the_error_on_the_test_set_is_the_mean_square_and_a_lost_sample_makes_it_infinite() -> None:
    data = load_data("sine2d")
    model = make_model("dense", (2,), 1).double()
    x, y = data.test_x[:30].clone(), data.test_y[:30]
    with torch.no_grad():
        expected = float((model(x) - y).square().mean())
    assert evaluate(model, x, y, batch=7) == (pytest.approx(expected), 0)
    x[3] = math.nan
    assert evaluate(model, x, y, batch=7) == (math.inf, 1)


@pytest.mark.parametrize("optimizer", ["ingd", "lbfgs"])
def test_an_interrupted_run_of_least_squares_goes_on_to_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    natural = {"route": "sampled", "adaptive": True, "damping": 0.1, "momentum": 0.5}
    options = natural if optimizer == "ingd" else {}
    config = replace(SURFACE, optimizer=optimizer, lr=1.0, **options)
    run(config, tmp_path / "whole")
    trainer = start(config, tmp_path / "cut")
    disturb(trainer, monkeypatch, 0, interrupt)
    assert trainer.run(quiet=True).interrupted
    resume(tmp_path / "cut").run(quiet=True)
    assert same_state(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("model", ["dense-large", "conv-large"])
@pytest.mark.parametrize("route", ["output", "sampled", "krylov", "kronecker"])
def test_large_models_train_by_every_route_but_the_dense_one(
    tmp_path: Path, model: str, route: str
) -> None:
    config = small(model=model, route=route, trust_region=1e-2, max_steps=2)
    assert run(config, tmp_path).steps == 2
    assert all(line["rejections"] == 0 for line in read_metrics(tmp_path / METRICS))


# --- evaluation and metrics file -------------------------------------------------------------


@pytest.mark.parametrize("policy", ["raise", "warn", "return"])
def test_evaluate_counts_samples_without_fixed_point_as_wrong(policy: str) -> None:
    data = load_data("digits")
    model = make_model("dense", (1, 8, 8), 10)
    x, y = data.test_x[:30].clone(), data.test_y[:30]
    with torch.no_grad():
        predicted = model(x).argmax(-1)
    assert evaluate(model, x, predicted, batch=7) == (1.0, 0)
    layer = find_deq(model)
    layer.on_failure = policy  # type: ignore[assignment]
    x[[2, 9, 29]] = math.nan
    assert evaluate(model, x, predicted, batch=7) == (27 / 30, 3)
    assert layer.on_failure == policy
    with pytest.raises(RuntimeError):
        evaluate(model, x.reshape(15, 2, 8, 8), y)
    assert layer.on_failure == policy


def test_the_metrics_file_is_json_and_a_cut_off_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    file = MetricsFile(path, keep_steps=0)
    file.write({"step": 1, "residual": math.nan, "loss": math.inf})
    file.write({"step": 2, "residual": 0.5, "loss": 1.0})

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    for text in path.read_text().splitlines():
        json.loads(text, parse_constant=refuse)
    assert read_metrics(path)[0] == {"step": 1, "residual": None, "loss": None}
    with path.open("a") as stream:
        stream.write('{"step": 3, "resid')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    MetricsFile(path, keep_steps=1)
    assert [line["step"] for line in read_metrics(path)] == [1]
    MetricsFile(path, keep_steps=0)
    assert path.read_text() == ""
    assert read_metrics(tmp_path / "absent") == []
