"""The training loop of the command line: minibatches, metrics, checkpoints, interruption.

A run is a function of its `TrainConfig`: the order of the samples comes from (seed, epoch), the
step length from the step's number, so a resumed run repeats the uninterrupted one.
"""

import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from math import cos, pi
from pathlib import Path
from typing import Any, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from deqlqr._checks import at_least, choice
from deqlqr.checkpoint import load_checkpoint, save_checkpoint
from deqlqr.data import DATASETS, load_data
from deqlqr.deq import find_deq
from deqlqr.figures import plot_curves
from deqlqr.linearize import Minibatch
from deqlqr.metrics import MetricsFile, read_metrics
from deqlqr.models import MODELS, check_seed, make_model
from deqlqr.optim import ImplicitNGD
from deqlqr.routes import ROUTES, Dare
from deqlqr.solution import ConvergenceError

OPTIMIZERS = ("ingd", "gd", "sgd", "adam")
SCHEDULES = ("cosine", "constant")
CHECKPOINT, METRICS, CURVES = "checkpoint.pt", "metrics.jsonl", "curves.png"


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a run's numbers.

    Attributes:
        data: `"digits"` or `"mnist"`.
        data_root: MNIST's folder.
        model: `"dense"` or `"conv"`.
        optimizer: `"ingd"` (implicit natural gradient), `"gd"` (plain gradient descent), `"sgd"`
            (momentum 0.9) or `"adam"`.
        lr: Step length.
        damping: delta of R_bar = R + delta I; used by `"ingd"`.
        minibatch: `"exact"` or `"per-sample"`; used by `"ingd"`.
        route: `"dare"` or `"output"` (see `ImplicitNGD`); used by `"ingd"`.
        batch_size: Samples of a step; a last smaller batch of an epoch is left out.
        epochs: Passes over the training data.
        schedule: `"cosine"` lets the step length fall to 0, `"constant"` keeps it.
        train_size: Use only the first training samples; `None` for all.
        max_steps: Stop after so many steps; `None` for no limit.
        log_every: Steps between metrics lines and checkpoints.
        eval_size: Test samples of a metrics line between epochs.
        seed: Of parameters and sample order.
    """

    data: str = "digits"
    data_root: str | None = None
    model: str = "dense"
    optimizer: str = "ingd"
    lr: float = 1.5
    damping: float = 0.5
    minibatch: str = "exact"
    route: str = "dare"
    batch_size: int = 16
    epochs: int = 5
    schedule: str = "cosine"
    train_size: int | None = None
    max_steps: int | None = None
    log_every: int = 10
    eval_size: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every option before anything is loaded.

        Raises:
            ValueError: If one is unknown or out of range.
        """
        for name, allowed in (
            ("data", DATASETS),
            ("model", MODELS),
            ("optimizer", OPTIMIZERS),
            ("minibatch", get_args(Minibatch)),
            ("route", ROUTES),
            ("schedule", SCHEDULES),
        ):
            choice(name, getattr(self, name), allowed)
        for name in ("lr", "damping"):
            at_least(name, getattr(self, name), 0.0, strict=True)
        for name in ("batch_size", "epochs", "log_every", "eval_size", "train_size", "max_steps"):
            value = getattr(self, name)
            if value is None and name in ("train_size", "max_steps"):
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} must be a whole number, got {value!r}.")
            at_least(name, value, 1)
        check_seed(self.seed)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "TrainConfig":
        """Return the config a checkpoint holds.

        Raises:
            ValueError: If its options are not those of this version.
        """
        known = {field.name for field in fields(TrainConfig)}
        if set(values) != known:
            raise ValueError(f"checkpoint has options {sorted(set(values) ^ known)} amiss.")
        return TrainConfig(**values)


class _Stepper(Protocol):
    def step(self, x: Tensor, y: Tensor) -> Tensor: ...


class GradientStep:
    """A first-order torch optimizer behind the interface of `ImplicitNGD.step`."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Take one step; nothing changes if the loss is not finite.

        Returns:
            The loss before the step.

        Raises:
            ConvergenceError: If a sample has no fixed point or the loss is not finite.
        """
        loss = F.cross_entropy(self.model(x), y)
        if not bool(loss.isfinite()):
            raise ConvergenceError(f"the loss is {float(loss.detach())}.")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def make_optimizer(model: nn.Module, config: TrainConfig) -> tuple[_Stepper, torch.optim.Optimizer]:
    """Return the object whose `step(x, y)` trains the model, and the torch optimizer inside."""
    if config.optimizer == "ingd":
        ingd = ImplicitNGD(
            model,
            lr=config.lr,
            damping=config.damping,
            route=Dare(config.minibatch) if config.route == "dare" else config.route,  # type: ignore[arg-type]
        )
        return ingd, ingd
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(parameters, lr=config.lr)
    else:
        momentum = 0.9 if config.optimizer == "sgd" else 0.0
        optimizer = torch.optim.SGD(parameters, lr=config.lr, momentum=momentum)
    return GradientStep(model, optimizer), optimizer


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor, batch: int = 1000) -> tuple[float, int]:
    """Return test accuracy, and how many samples had no fixed point (they count as wrong)."""
    layer = find_deq(model)
    policy, layer.on_failure = layer.on_failure, "return"
    right = lost = 0
    try:
        for start in range(0, len(x), batch):
            piece = slice(start, start + batch)
            predicted = model(x[piece]).argmax(-1)
            assert layer.solution is not None  # noqa: S101
            converged = layer.solution.converged
            right += int(((predicted == y[piece]) & converged).sum())
            lost += int((~converged).sum())
    finally:
        layer.on_failure = policy
    return right / len(x), lost


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        accuracy: On the whole test set.
        steps: Steps taken, in all.
        seconds: Seconds of training, evaluation left out.
        interrupted: Whether it was stopped before its end; it can be resumed.
        folder: Where metrics, curves and checkpoint lie.
    """

    accuracy: float
    steps: int
    seconds: float
    interrupted: bool
    folder: Path


class Trainer:
    """One run in one folder.

    Args:
        config: What to run.
        folder: Where it writes.
        device: Device of model and data.
        resume: A checkpoint's content to go on from.

    Raises:
        ValueError: If data or checkpoint do not fit the config.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        device: torch.device,
        resume: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.folder = config, folder
        data = load_data(config.data, config.data_root).first(config.train_size)
        if config.batch_size > len(data.train_x):
            raise ValueError(
                f"batch_size must be at most the {len(data.train_x)} training samples, got "
                f"{config.batch_size}."
            )
        self.data = data.to(device)
        image = tuple(data.train_x.shape[1:])
        self.model = make_model(config.model, image, data.classes, seed=config.seed).to(device)
        self.stepper, self.optimizer = make_optimizer(self.model, config)
        self.step, self.seconds = 0, 0.0
        if resume is not None:
            self._restore(resume)
        self.metrics = MetricsFile(folder / METRICS, keep_steps=self.step)

    def run(self, *, quiet: bool = False) -> TrainResult:
        """Train to the end, or until an interrupt; either way nothing learned is lost.

        Only a second interrupt, which may come in the middle of a step, leaves the last checkpoint.

        Returns:
            How the run ended.

        Raises:
            ConvergenceError: If training cannot go on; the state before is in the checkpoint.
        """
        config = self.config
        per_epoch = len(self.data.train_x) // config.batch_size
        total = per_epoch * config.epochs
        if config.max_steps is not None:
            total = min(total, config.max_steps)
        order_epoch, order = -1, torch.empty(0)
        bar = tqdm(total=total, initial=self.step, unit="step", disable=True if quiet else None)
        with _interruptible() as stop, bar:
            try:
                while self.step < total and not stop.is_set():
                    epoch, index = divmod(self.step, per_epoch)
                    if epoch != order_epoch:
                        order_epoch, order = epoch, self._order(epoch)
                    piece = order[index * config.batch_size : (index + 1) * config.batch_size]
                    loss = self._train_step(piece, total)
                    bar.update()
                    bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                    line = self._line(epoch, loss)
                    logged = self.step % config.log_every == 0 or self.step == total
                    if logged:
                        self._log("step", line, config.eval_size)
                    if index == per_epoch - 1:
                        text = self._log("epoch", line, len(self.data.test_x))
                        if not quiet:
                            bar.write(text)
                    if logged:
                        self.save()
            except ConvergenceError:
                self.save()
                raise
            self.save()
        plot_curves(read_metrics(self.metrics.path), self.folder / CURVES, self._title())
        accuracy, _ = evaluate(self.model, self.data.test_x, self.data.test_y)
        return TrainResult(accuracy, self.step, self.seconds, self.step < total, self.folder)

    def save(self) -> None:
        """Write the checkpoint."""
        save_checkpoint(
            self.folder / CHECKPOINT,
            {
                "config": asdict(self.config),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "seconds": self.seconds,
            },
        )

    def _restore(self, content: dict[str, Any]) -> None:
        try:
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.step, self.seconds = int(content["step"]), float(content["seconds"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ValueError(f"checkpoint does not fit its model: {error!r}") from error

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * self.config.seed + epoch)
        return torch.randperm(len(self.data.train_x), generator=generator)

    def _train_step(self, samples: Tensor, total: int) -> float:
        lr = self.config.lr
        if self.config.schedule == "cosine":
            lr *= (1 + cos(pi * self.step / total)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        samples = samples.to(self.data.train_x.device)
        start = time.perf_counter()
        loss = float(self.stepper.step(self.data.train_x[samples], self.data.train_y[samples]))
        self.seconds += time.perf_counter() - start
        self.step += 1
        return loss

    def _log(self, kind: str, line: dict[str, Any], samples: int) -> str:
        x, y = self.data.test_x[:samples], self.data.test_y[:samples]
        accuracy, lost = evaluate(self.model, x, y)
        measured = {"accuracy": accuracy, "test_not_converged": lost}
        self.metrics.write({"kind": kind} | line | measured)
        return (
            f"epoch {line['epoch']}: loss {line['loss']:.4f}, test accuracy {accuracy:.2%}, "
            f"{self.seconds:.1f} s" + (f", {lost} test samples without fixed point" if lost else "")
        )

    def _line(self, epoch: int, loss: float) -> dict[str, Any]:
        """Return what the step just taken measured; to be read before the layer solves again."""
        layer = find_deq(self.model)
        line: dict[str, Any] = {
            "step": self.step,
            "epoch": epoch + 1,
            "loss": loss,
            "seconds": self.seconds,
            "evaluations": None,
            "residual": None,
            "closed_loop_radius": None,
            "damping": None,
            "rejections": None,
        }
        if isinstance(self.stepper, ImplicitNGD) and self.stepper.last_step is not None:
            report = self.stepper.last_step
            for key in ("evaluations", "residual", "closed_loop_radius", "damping"):
                line[key] = getattr(report, key)
            line["rejections"] = len(report.rejections)
        elif layer.solution is not None:
            line["evaluations"] = float(layer.solution.evaluations.double().mean())
            line["residual"] = float(layer.solution.residual.max())
        return line

    def _title(self) -> str:
        c = self.config
        extra = f", damping {c.damping:g}" if c.optimizer == "ingd" else ""
        return f"{c.data}, {c.model} model, {c.optimizer}, lr {c.lr:g}{extra}, batch {c.batch_size}"


@contextmanager
def _interruptible() -> Generator[threading.Event, None, None]:
    """Let the first Ctrl-C (or SIGTERM) finish the step; a second one interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def resume_config(path: Path, epochs: int | None) -> tuple[TrainConfig, dict[str, Any], Path]:
    """Return config, content and folder of a checkpoint, given as a file or its folder.

    Args:
        path: A run's folder, or the checkpoint in it.
        epochs: More epochs than the run was made for; needs the schedule `"constant"`.

    Raises:
        ValueError: If the checkpoint cannot be read, or `epochs` would change the past.
    """
    file = path / CHECKPOINT if path.is_dir() else path
    content = load_checkpoint(file)
    if not isinstance(content.get("config"), dict):
        raise ValueError(f"checkpoint {str(file)!r} holds no run of `deqlqr train`.")
    values = dict(content["config"])
    if epochs is not None and epochs != values.get("epochs"):
        if values.get("schedule") == "cosine":
            raise ValueError("epochs cannot change on resume with the schedule 'cosine'.")
        values["epochs"] = epochs
    return TrainConfig.from_dict(values), content, file.parent
