"""The training loop of the command line: minibatches, metrics, checkpoints, interruption.

A run is a function of its `TrainConfig`: the order of the samples comes from (seed, epoch), the
step length from the step's number, so a resumed run repeats the uninterrupted one.
"""

import time
from dataclasses import asdict, dataclass, fields
from math import cos, isnan, pi
from pathlib import Path
from statistics import mean
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from deqlqr._checks import at_least, choice, count
from deqlqr.checkpoint import load_checkpoint, save_checkpoint
from deqlqr.data import DATASETS, load_data
from deqlqr.deq import layers_of
from deqlqr.evaluation import evaluate
from deqlqr.figures import plot_curves
from deqlqr.gradient_step import GradientStep
from deqlqr.guard import Guard, Stepper
from deqlqr.hamiltonian import SCHEMES, Classical, Relativistic
from deqlqr.hamiltonian_descent import OuterMomentum
from deqlqr.interrupt import interruptible
from deqlqr.layer_inverse import INVERSES, make_inverse
from deqlqr.linearize_samples import Minibatch
from deqlqr.metrics import MetricsFile, read_metrics
from deqlqr.models import EXPLICIT, MODELS, check_seed, make_model
from deqlqr.optim import ImplicitNGD
from deqlqr.routes import ROUTES, Cyclic, Dare, Riccati, Route, make_route
from deqlqr.solution import ConvergenceError
from deqlqr.sweeps import LayerDamping
from deqlqr.unrolled import unrolled

OPTIMIZERS = ("ingd", "gd", "sgd", "adam", "lbfgs")
OUTER = ("none", *SCHEMES)
SCHEDULES = ("cosine", "constant")
CHECKPOINT, METRICS, CURVES = "checkpoint.pt", "metrics.jsonl", "curves.png"


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a run's numbers.

    Attributes:
        data: One of `DATASETS`.
        data_root: MNIST's folder.
        model: One of `MODELS` (see `make_model`).
        optimizer: `"ingd"` (implicit natural gradient), `"gd"` (plain gradient descent), `"sgd"`
            (momentum 0.9), `"adam"` or `"lbfgs"` (20 iterations a step, strong Wolfe line search).
        lr: Step length.
        damping: delta of R_bar = R + delta I; used by `"ingd"` like the next ten.
        minibatch: `"exact"` or `"per-sample"`, of the routes `"dare"`, `"cyclic"` and `"riccati"`.
        route: How the step is computed, one of `ROUTES`.
        inverse: Of the routes `"cyclic"` and `"riccati"`: `"exact"` or `"neumann"`.
        margin: Of the same: damping by layer with this margin (`LayerDamping`); `None` takes it
            with the usual margin for `"neumann"`, else the one damping.
        feedback: Of the route `"dare"`, see `ImplicitNGD`.
        momentum: See there, like the next four.
        adaptive: See there. A step may not raise the loss then.
        acceleration: See there.
        trust_region: See there.
        check_every: See there.
        penalty: Factor on the Jacobian penalty, of any optimizer.
        outer: Momentum around the steps of any optimizer but `"lbfgs"`: `"none"`, or a scheme of
            `OuterMomentum`, its step length 1.
        friction: Its friction, per step.
        speed: Most length of its steps, of all parameters together; `None` for no limit.
        guard: Keep the fixed points (see `Guard`): shorten or take back steps that lose them.
        max_radius: Largest spectral radius of A that the guard allows.
        guard_every: Steps between its looks.
        warmup: First steps, in which the DEQ layer is `warmup_depth` iterations of its block.
        warmup_depth: See there.
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
    inverse: str = "exact"
    margin: float | None = None
    feedback: bool = False
    momentum: float = 0.0
    adaptive: bool = False
    acceleration: bool = False
    trust_region: float | None = None
    check_every: int = 1
    penalty: float = 0.0
    outer: str = "none"
    friction: float = 0.5
    speed: float | None = None
    guard: bool = True
    max_radius: float = 0.98
    guard_every: int = 10
    warmup: int = 0
    warmup_depth: int = 5
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
            ("inverse", INVERSES),
            ("outer", OUTER),
            ("schedule", SCHEDULES),
        ):
            choice(name, getattr(self, name), allowed)
        for name in ("lr", "damping"):
            at_least(name, getattr(self, name), 0.0, strict=True)
        for name in ("momentum", "penalty", "friction"):
            at_least(name, getattr(self, name), 0.0)
        self._check_outer()
        at_least("max_radius", self.max_radius, 0.0, strict=True)
        count("warmup", self.warmup, 0)
        if self.model in EXPLICIT and (self.warmup or self.penalty):
            raise ValueError(
                f"warmup and penalty are for DEQ layers, and model {self.model!r} has none."
            )
        if self.warmup and self.optimizer == "ingd" and self.route in ("dare", "cyclic"):
            raise ValueError(
                f"warmup steps are those of a network without DEQ layer, which route "
                f"{self.route!r} does not take: take another route."
            )
        if self.margin is not None:
            at_least("margin", self.margin, 1.0, strict=True)
        by_layers = self.route in ("cyclic", "riccati")
        if not by_layers and (self.inverse != "exact" or self.margin is not None):
            raise ValueError(
                f"inverse and margin are options of routes 'cyclic' and 'riccati', not "
                f"{self.route!r}."
            )
        if self.feedback and (self.route, self.minibatch) != ("dare", "exact"):
            raise ValueError(
                "feedback is an option of route 'dare' with minibatch 'exact', not of "
                f"{self.route!r} with {self.minibatch!r}."
            )
        if self.trust_region is not None:
            at_least("trust_region", self.trust_region, 0.0, strict=True)
        for name in ("batch_size", "epochs", "log_every", "eval_size", "train_size", "max_steps",
                     "check_every", "guard_every", "warmup_depth"):  # fmt: skip
            value = getattr(self, name)
            if value is not None or name not in ("train_size", "max_steps"):
                count(name, value)
        check_seed(self.seed)

    def _check_outer(self) -> None:
        if self.speed is not None:
            at_least("speed", self.speed, 0.0, strict=True)
        if self.outer == "none":
            return
        if self.optimizer == "lbfgs":
            raise ValueError("outer must be 'none' with optimizer 'lbfgs', whose curvature needs "
                             f"its own steps, got {self.outer!r}.")  # fmt: skip
        if self.optimizer == "ingd" and self.momentum:
            raise ValueError(
                f"momentum must be 0 with outer {self.outer!r}, which has its own, got "
                f"{self.momentum}."
            )

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


def _route(config: TrainConfig) -> Route:
    minibatch = cast(Minibatch, config.minibatch)
    if config.route == "dare":
        return Dare(minibatch)
    if config.route in ("cyclic", "riccati"):
        adapt = None if config.margin is None else LayerDamping(config.margin)
        kind = Cyclic if config.route == "cyclic" else Riccati
        return kind(minibatch, make_inverse(config.inverse), adapt)
    return make_route(config.route)


def make_optimizer(
    model: nn.Module, config: TrainConfig, loss: str
) -> tuple[Stepper, torch.optim.Optimizer]:
    """Return the object whose `step(x, y)` trains the model, and the torch optimizer inside."""
    stepper, optimizer = _inner(model, config, loss)
    if config.outer != "none":
        kinetic = Classical() if config.speed is None else Relativistic(speed=config.speed)
        stepper = OuterMomentum(
            stepper, friction=config.friction, kinetic=kinetic, scheme=config.outer
        )
    return stepper, optimizer


def _inner(
    model: nn.Module, config: TrainConfig, loss: str
) -> tuple[Stepper, torch.optim.Optimizer]:
    if config.optimizer == "ingd":
        ingd = ImplicitNGD(
            model,
            loss=loss,
            lr=config.lr,
            damping=config.damping,
            route=_route(config),
            momentum=config.momentum,
            penalty=config.penalty,
            adaptive=config.adaptive,
            acceleration=config.acceleration,
            feedback=config.feedback,
            trust_region=config.trust_region,
            check_every=config.check_every,
            max_increase=0.0 if config.adaptive else 0.1,
        )
        return ingd, ingd
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(parameters, lr=config.lr)
    elif config.optimizer == "lbfgs":
        optimizer = torch.optim.LBFGS(
            parameters, lr=config.lr, line_search_fn="strong_wolfe", tolerance_grad=0.0,
            tolerance_change=0.0,
        )  # fmt: skip
    else:
        momentum = 0.9 if config.optimizer == "sgd" else 0.0
        optimizer = torch.optim.SGD(parameters, lr=config.lr, momentum=momentum)
    return GradientStep(model, optimizer, loss, penalty=config.penalty), optimizer


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        score: On the whole test set: accuracy, or mean squared error.
        steps: Steps taken, in all.
        seconds: Seconds of training, evaluation left out.
        interrupted: Whether it was stopped before its end; it can be resumed.
        folder: Where metrics, curves and checkpoint lie.
    """

    score: float
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
        shape = tuple(data.train_x.shape[1:])
        self.model = make_model(config.model, shape, data.outputs, seed=config.seed)
        self.model.to(device, data.train_x.dtype)
        self.stepper, self.optimizer = make_optimizer(self.model, config, data.loss)
        outer = self.stepper if isinstance(self.stepper, OuterMomentum) else None
        self.inner = self.stepper if outer is None else outer.inner
        self._memory = self.optimizer if outer is None else outer  # what a checkpoint holds
        self.guard: Guard | None = None
        if config.guard:
            self.guard = Guard(self.stepper, max_radius=config.max_radius, every=config.guard_every)
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
        per_epoch = self._per_epoch
        total = per_epoch * config.epochs
        if config.max_steps is not None:
            total = min(total, config.max_steps)
        order_epoch, order = -1, torch.empty(0)
        bar = tqdm(total=total, initial=self.step, unit="step", disable=True if quiet else None)
        with interruptible() as stop, bar:
            try:
                while self.step < total and not stop.is_set():
                    epoch, index = divmod(self.step, per_epoch)
                    if epoch != order_epoch:
                        order_epoch, order = epoch, self._order(epoch)
                    piece = order[index * config.batch_size : (index + 1) * config.batch_size]
                    loss = self._train_step(piece, total)
                    bar.update()
                    bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
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
        score, _ = evaluate(self.model, self.data.test_x, self.data.test_y)
        return TrainResult(score, self.step, self.seconds, self.step < total, self.folder)

    def save(self) -> None:
        """Write the checkpoint."""
        save_checkpoint(
            self.folder / CHECKPOINT,
            {
                "config": asdict(self.config),
                "model": self.model.state_dict(),
                "optimizer": self._memory.state_dict(),
                "guard": None if self.guard is None else self.guard.state_dict(),
                "step": self.step,
                "seconds": self.seconds,
            },
        )

    @property
    def _per_epoch(self) -> int:
        return len(self.data.train_x) // self.config.batch_size

    @property
    def measure(self) -> str:
        """What the test set is judged by: `"accuracy"` or `"error"`."""
        return "error" if self.data.loss == "mse" else "accuracy"

    def judged(self, score: float) -> str:
        """Return the score on the test set in words."""
        return (
            f"test error {score:.2e}" if self.measure == "error" else f"test accuracy {score:.2%}"
        )

    def _restore(self, content: dict[str, Any]) -> None:
        try:
            self.model.load_state_dict(content["model"])
            self._memory.load_state_dict(content["optimizer"])
            if self.guard is not None:
                self.guard.load_state_dict(content["guard"])
            self.step, self.seconds = int(content["step"]), float(content["seconds"])
            if isinstance(self.inner, GradientStep):
                self.inner.taken = self.step
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
        batch = self.data.train_x[samples], self.data.train_y[samples]
        if self.step < self.config.warmup:
            with unrolled(self.model, self.config.warmup_depth):
                loss = float(self.stepper.step(*batch))
        else:
            loss = float((self.guard or self.stepper).step(*batch))
            ends = (self.step + 1) % self._per_epoch == 0 or self.step + 1 == self.config.max_steps
            if self.guard is not None and ends:
                self.guard.check(batch[0])  # of the last steps
        self.seconds += time.perf_counter() - start
        self.step += 1
        return loss

    def _log(self, kind: str, line: dict[str, Any], samples: int) -> str:
        x, y = self.data.test_x[:samples], self.data.test_y[:samples]
        score, lost = evaluate(self.model, x, y)
        reason = self._too_many_lost(lost, len(x)) if kind == "epoch" else None
        if reason is not None and self.guard is not None:
            self.guard.take_back(reason)
            score, lost = evaluate(self.model, x, y)
            reason = self._too_many_lost(lost, len(x))
        measured = {self.measure: score, "test_not_converged": lost}
        self.metrics.write({"kind": kind} | line | measured)
        if reason is not None:
            raise ConvergenceError(
                f"{reason}, and so before: the guard looks at training samples only. Lower "
                "max_radius, add a penalty, or take a block that is a contraction."
            )
        return (
            f"epoch {line['epoch']}: loss {line['loss']:.4g}, {self.judged(score)}, "
            f"{self.seconds:.1f} s" + (f", {lost} test samples without fixed point" if lost else "")
        )

    def _too_many_lost(self, lost: int, samples: int) -> str | None:
        """Return why a guarded run cannot go on like this, or `None`."""
        if self.guard is None or self.step <= self.config.warmup:
            return None
        if lost <= self.guard.max_failed * samples:
            return None
        return f"{lost} of {samples} test samples have no fixed point"

    def _line(self, epoch: int, loss: float) -> dict[str, Any]:
        """Return what the step just taken measured; to be read before the layer solves again."""
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
            "radius": None,
            "shortened": None,
            "taken_back": None,
        }
        if self.guard is not None and self.guard.last_look is not None:
            radius = self.guard.last_look.radius
            line["radius"] = None if isnan(radius) else radius
            line["shortened"] = self.guard.counts["shortened"]
            line["taken_back"] = self.guard.counts["taken back"]
        solutions = [s for layer in layers_of(self.model) if (s := layer.solution) is not None]
        if isinstance(self.inner, ImplicitNGD) and self.inner.last_step is not None:
            report = self.inner.last_step
            for key in ("evaluations", "residual", "closed_loop_radius", "damping"):
                line[key] = getattr(report, key)
            line["rejections"] = len(report.rejections)
            if report.feedback is not None:
                line["feedback"] = report.feedback
            if report.layer_damping is not None:
                known = [None if isnan(delta) else delta for delta in report.layer_damping]
                line |= {"layer_damping": known, "truncation": report.truncation}
        elif solutions:
            line["evaluations"] = mean(float(s.evaluations.double().mean()) for s in solutions)
            line["residual"] = max(float(s.residual.max()) for s in solutions)
        return line

    def _title(self) -> str:
        c = self.config
        extra = f", damping {c.damping:g}" if c.optimizer == "ingd" else ""
        outer = "" if c.outer == "none" else f", outer {c.outer}"
        return (
            f"{c.data}, {c.model} model, {c.optimizer}, lr {c.lr:g}{extra}{outer}, "
            f"batch {c.batch_size}"
        )


def finish(config: TrainConfig, folder: Path, *, quiet: bool = False) -> None:
    """Run to the end, from a checkpoint in the folder if there is one; quiet prints nothing.

    Raises:
        ValueError: If the folder holds another run.
        ConvergenceError: If training cannot go on.
        KeyboardInterrupt: If it was interrupted.
    """
    content = None
    if (folder / CHECKPOINT).exists():
        stored, content, _ = resume_config(folder, None)
        if stored != config:
            raise ValueError(f"out {str(folder)!r} holds another run; choose another --out.")
    result = Trainer(config, folder, torch.device("cpu"), content).run(quiet=quiet)
    if result.interrupted:
        raise KeyboardInterrupt


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
