"""The command line: `deqlqr train`, `check`, `reproduce` and `bench`."""

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import click
import torch
from torch import nn

import deqlqr
from deqlqr.bench import BATCHES, SINGLES, bench_dare, table
from deqlqr.bench_cyclic import CYCLES, bench_cyclic
from deqlqr.bench_cyclic import table as cyclic_table
from deqlqr.bench_ddp import BASES as DDP_BASES
from deqlqr.bench_ddp import bench_ddp
from deqlqr.bench_ddp import table as ddp_table
from deqlqr.bench_fixed_point import bench_fixed_point, problems
from deqlqr.bench_fixed_point import table as fixed_point_table
from deqlqr.bench_step import bench_step
from deqlqr.bench_step import table as step_table
from deqlqr.bench_train import MNIST_RACES, mnist_race, only, regression_race
from deqlqr.data import DATASETS, POINT_SETS, load_data
from deqlqr.equivalence import check_equivalence
from deqlqr.layer_inverse import INVERSES
from deqlqr.models import MODELS, SMALL_MODELS, make_model
from deqlqr.race import race
from deqlqr.race import table as race_table
from deqlqr.reproduce import FIGURES, reproduce
from deqlqr.reproduce_points import POINT_OPTIONS
from deqlqr.routes import ROUTES
from deqlqr.solution import ConvergenceError
from deqlqr.stability import CASES, run_stability
from deqlqr.stability import table as stability_table
from deqlqr.training import OPTIMIZERS, OUTER, SCHEDULES, TrainConfig, Trainer, resume_config

_DEFAULT = TrainConfig()
_PATH = click.Path(path_type=Path)


def _reported(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn errors into one line on standard error: exit 2 misuse, 1 failure, 130 interrupt."""

    def stop(message: object, code: int) -> NoReturn:
        click.echo(f"deqlqr: {' '.join(str(message).split())}", err=True)
        sys.exit(code)

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except ValueError as error:
            stop(error, 2)
        except (ConvergenceError, OSError) as error:
            stop(error, 1)
        except KeyboardInterrupt:
            stop("interrupted.", 130)

    return wrapped


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(deqlqr.__version__, prog_name="deqlqr")
def main() -> None:
    """Train deep-equilibrium models by optimal control."""


@main.command(context_settings={"show_default": True})
@click.option("--data", type=click.Choice(DATASETS), default=_DEFAULT.data, help="Data set.")
@click.option("--data-root", type=_PATH, help="Folder that holds MNIST/raw (for --data mnist).")
@click.option(
    "--model", type=click.Choice(MODELS), show_default="dense; conv for mnist, gradient for points",
    help="dense, conv: a tanh block, or the thesis' convolutional one, with a small state. Larger, "
    "for other routes than dare: dense-large, conv-large; dense-free, without a bound; gradient, "
    "monotone, random-fields: blocks with a fixed point by construction. Explicit networks: "
    "convnet, of 5 layers; for points in the plane, of 15 layers, net, and the Runge-Kutta "
    "networks from resnet on.",
)  # fmt: skip
@click.option(
    "--optimizer", type=click.Choice(OPTIMIZERS), default=_DEFAULT.optimizer,
    help="Implicit natural gradient; gradient descent; the same with momentum 0.9; Adam; L-BFGS.",
)  # fmt: skip
@click.option("--lr", type=float, show_default="ingd 1.5, gd 0.3, sgd 0.1, adam 0.01, lbfgs 1",
              help="Step length.")  # fmt: skip
@click.option("--damping", type=float, default=_DEFAULT.damping, help="delta of R + delta I.")
@click.option(
    "--minibatch", type=click.Choice(["exact", "per-sample"]), default=_DEFAULT.minibatch,
    help="One LQR for the whole batch, or the mean of the samples' own steps.",
)  # fmt: skip
@click.option("--route", type=click.Choice(ROUTES), default=_DEFAULT.route,
              help="How the step is computed: Riccati equation, of the block or by layers; output "
              "space, exact or sampled; conjugate gradients; Kronecker factors.")  # fmt: skip
@click.option("--inverse", type=click.Choice(INVERSES), default=_DEFAULT.inverse,
              help="Of the route cyclic: exact, or by a Neumann series.")  # fmt: skip
@click.option("--margin", type=float, help="Of the route cyclic: damping by layer, this times the "
              "layer's curvature and at least --damping.")  # fmt: skip
@click.option("--feedback", is_flag=True, default=_DEFAULT.feedback,
              help="Of the route dare: block and readout answer what the encoder's part of a step "
              "has really done.")  # fmt: skip
@click.option("--momentum", type=float, default=_DEFAULT.momentum, help="Of the natural gradient.")
@click.option(
    "--adaptive",
    is_flag=True,
    default=_DEFAULT.adaptive,
    help="Adapt the damping by how the loss followed.",
)
@click.option("--acceleration", is_flag=True, default=_DEFAULT.acceleration,
              help="Geodesic acceleration, for the routes output and sampled.")  # fmt: skip
@click.option("--trust-region", type=float, help="Most divergence of a step, e.g. 1e-3.")
@click.option("--check-every", type=int, default=_DEFAULT.check_every,
              help="Steps between checks of the loss after a step.")  # fmt: skip
@click.option("--penalty", type=float, default=_DEFAULT.penalty,
              help="Factor on the Jacobian penalty, with any optimizer.")  # fmt: skip
@click.option("--outer", type=click.Choice(OUTER), default=_DEFAULT.outer,
              help="Momentum around the steps of any optimizer but L-BFGS.")  # fmt: skip
@click.option("--friction", type=float, default=_DEFAULT.friction,
              help="Of --outer: a step keeps e^-friction of the momentum.")  # fmt: skip
@click.option("--speed", type=float, help="Of --outer: most length of a step (relativistic).")
@click.option("--guard/--no-guard", default=_DEFAULT.guard,
              help="Keep the fixed points: shorten or take back what loses them.")  # fmt: skip
@click.option("--max-radius", type=float, default=_DEFAULT.max_radius,
              help="Largest spectral radius of df/dz that the guard allows.")  # fmt: skip
@click.option("--guard-every", type=int, default=_DEFAULT.guard_every,
              help="Steps between looks of the guard.")  # fmt: skip
@click.option("--warmup", type=int, default=_DEFAULT.warmup,
              help="First steps that train a few iterations of the block instead.")  # fmt: skip
@click.option("--warmup-depth", type=int, default=_DEFAULT.warmup_depth,
              help="How many iterations.")  # fmt: skip
@click.option("--batch-size", type=int, default=_DEFAULT.batch_size, help="Samples of a step.")
@click.option("--epochs", type=int, default=_DEFAULT.epochs, help="Passes over the data.")
@click.option("--schedule", type=click.Choice(SCHEDULES), default=_DEFAULT.schedule,
              help="How the step length goes on.")  # fmt: skip
@click.option("--train-size", type=int, help="Use only the first training samples.")
@click.option("--max-steps", type=int, help="Stop after so many steps.")
@click.option("--log-every", type=int, default=_DEFAULT.log_every,
              help="Steps between metrics lines and checkpoints.")  # fmt: skip
@click.option("--eval-size", type=int, default=_DEFAULT.eval_size,
              help="Test samples of a metrics line between epochs.")  # fmt: skip
@click.option("--seed", type=int, default=_DEFAULT.seed, help="Of parameters and sample order.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto",
              help="auto takes CUDA where there is one.")  # fmt: skip
@click.option("--out", type=_PATH, show_default="runs/DATA-OPTIMIZER[-N]",
              help="Folder for metrics, curves and checkpoint; must be new or empty.")  # fmt: skip
@click.option("--resume", type=_PATH, help="Go on from a run's folder or checkpoint; its options "
              "are the run's own, only --epochs and --device may be given.")  # fmt: skip
@_reported
@click.pass_context
def train(context: click.Context, **options: Any) -> None:
    """Train a DEQ; without options: digits, dense model, implicit natural gradient.

    With --data sine2d (least squares, float64) the defaults are full batches, 40 epochs, a constant
    step length of 1, damping 0.1, the route output, adaptive and accelerated. With points in the
    plane (donut1d, donut2d, squares, spiral) they are the model gradient, full batches, 120 epochs,
    a constant step length of 1, damping 0.01, the route output, adaptive.
    """
    device = _device(options.pop("device"))
    out, resume = options.pop("out"), options.pop("resume")
    if resume is not None:
        allowed = ("resume", "epochs", "device")
        _refuse(context, [n for n in context.params if n not in allowed], "--resume")
        epochs = options["epochs"] if _given(context, "epochs") else None
        config, content, folder = resume_config(resume, epochs)
        trainer = Trainer(config, folder, device, content)
    else:
        if options["optimizer"] != "ingd":
            _unused(context, _ONLY_INGD, f"--optimizer {options['optimizer']}")
        if options["outer"] == "none":
            _unused(context, ("friction", "speed"), "--outer none")
        if not options["guard"]:
            _unused(context, ("max_radius", "guard_every"), "--no-guard")
        if options["data"] != "mnist":
            _unused(context, ("data_root",), f"--data {options['data']}")
        config = _config(context, options)
        folder = _new_folder(out, config)
        trainer = Trainer(config, folder, device)
    result = trainer.run()
    click.echo(
        f"{trainer.judged(result.score)} after {result.steps} steps, "
        f"{result.seconds:.1f} s of training on {device.type}; see {result.folder}"
    )
    if result.interrupted:
        click.echo(f"interrupted; go on with: deqlqr train --resume {result.folder}")
        sys.exit(130)


@main.command(context_settings={"show_default": True})
@click.option(
    "--model",
    type=click.Choice([*MODELS, "all"]),
    default="all",
    help=f"Which model; all: {' and '.join(SMALL_MODELS)}.",
)
@click.option("--data", type=click.Choice(DATASETS), default="digits", help="Data set.")
@click.option("--data-root", type=_PATH, help="Folder that holds MNIST/raw (for --data mnist).")
@click.option("--samples", type=int, default=4, help="Batch size of the check.")
@click.option("--damping", type=float, default=1e-2, help="delta of R + delta I.")
@click.option("--checkpoint", type=_PATH, help="Check a trained model: a run's folder or file.")
@click.option("--seed", type=int, default=0, help="Of the models' parameters.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@_reported
@click.pass_context
def check(
    context: click.Context,
    model: str,
    data: str,
    data_root: Path | None,
    samples: int,
    damping: float,
    checkpoint: Path | None,
    seed: int,
    as_json: bool,
) -> None:
    """Compare every route to the same step, in float64; exit status 0 only if every row holds."""
    trained = None
    names = list(SMALL_MODELS) if model == "all" else [model]
    if checkpoint is not None:
        _refuse(context, ("model", "data", "seed"), "--checkpoint")
        config, trained, _ = resume_config(checkpoint, None)
        names, data, data_root = [config.model], config.data, _as_path(config.data_root, data_root)
    images = load_data(data, data_root)
    if not 1 <= samples <= len(images.train_x):
        raise ValueError(f"samples must lie in [1, {len(images.train_x)}], got {samples}.")
    x, y = images.train_x[:samples], images.train_y[:samples]
    reports = {}
    for name in names:
        network = make_model(name, tuple(x.shape[1:]), images.outputs, seed=seed)
        if trained is not None:
            _load(network, trained, checkpoint)
        reports[name] = check_equivalence(network, x, y, damping=damping)
        if not as_json:
            click.echo(f"{name} model on {data}\n{reports[name]}\n")
    if as_json:
        click.echo(json.dumps({name: report.to_dict() for name, report in reports.items()}))
    if not all(report.passed and report.complete for report in reports.values()):
        sys.exit(1)


@main.command("reproduce", context_settings={"show_default": True})
@click.argument("figure", type=click.Choice(list(FIGURES)))
@click.option("--data-root", type=_PATH, help="Folder that holds MNIST/raw, for the figures "
              "of the thesis, emsa-fig2, and the rows of MNIST in ddp-table3 and "
              "ddp-table4.")  # fmt: skip
@click.option("--out", type=_PATH, show_default="runs/FIGURE", help="Folder for its results.")
@click.option(
    "--steps", type=int, show_default=", ".join(f"{f.steps} for {n}" for n, f in FIGURES.items()),
    help="Steps of a training; gradient descent in fig4.1 takes five times as many.",
)  # fmt: skip
@click.option(
    "--full", is_flag=True,
    help="The source's scale, hours: an epoch of batches of 5 for fig3.1 and fig5.1, 2500 steps "
    "for fig4.1, 200 and 5500 iterations for extended MSA, 2000 steps and ten seeds for DDP, 500 "
    "for ddp-fig3.",
)  # fmt: skip
@_reported
def reproduce_command(
    figure: str, data_root: Path | None, out: Path | None, steps: int | None, full: bool
) -> None:
    """Repeat a figure of the thesis, the slides or the papers.

    Finished runs in --out are not run again, interrupted ones go on. Times are of one thread.

    fig3.1: the updates of the finite-horizon LQR beside those of autograd at every step, of SGD and
    of NGD on MNIST, three convolutions and two dense layers, batches of 5. Some minutes.

    fig4.1: test accuracy by iteration of implicit natural gradient by every route, and of gradient
    descent at each learning rate of a grid, on MNIST with the toy convolutional block, batches of
    16. A quarter of an hour.

    fig5.1: fixed damping over a grid beside damping by layer, with the exact inverse and with the
    Neumann series, on the network of fig3.1, three seeds. A quarter of an hour.

    fig5.1-deq: the same in the infinite horizon, on the block of fig4.1, batches of 8. About an
    hour.

    emsa-fig1, emsa-fig2: extended MSA beside gradient methods, on a sine from good and from zero
    parameters, and on MNIST with a residual network. A quarter of an hour each.

    ddp-table3, ddp-table4, ddp-fig3, ddp-fig5: SGD, RMSprop and EKFAC with the feedback of DDP and
    without, in pairs of seeds on wine, iris, digits and, with --data-root, MNIST, beside KFAC:
    losses, accuracies, variances, and learning rates above the best; the spectrum of the feedback
    on clusters. Up to a quarter of an hour each, with --full hours.

    ddp-deq: implicit natural gradient with the feedback of DDP and without, in pairs of seeds:
    single steps and trainings of a small DEQ, trainings on the digits. A quarter of an hour.

    spiral: points in the plane, classified by Runge-Kutta networks of 15 layers and by equilibria;
    predictions, transformed points, transitions. A quarter of an hour.

    fields: accuracy on the digits against the number of trained scalars, all else random and
    frozen. Some minutes.
    """
    click.echo(reproduce(figure, data_root, out or Path("runs") / figure, steps, full))


@main.group()
def bench() -> None:
    """Measure against the peers."""


@bench.command("fixed-point", context_settings={"show_default": True})
@click.option("--problem", type=click.Choice(list(problems())), multiple=True,
              help="Repeat for several; all if not given.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print a JSON line for each row.")
@_reported
def bench_fixed_point_command(problem: tuple[str, ...], as_json: bool) -> None:
    """Count evaluations and rows, and time, beside plain iteration and torchdeq.

    One thread, float64; both sides in the same run.
    """
    rows = bench_fixed_point(problem or None)
    for line in (json.dumps(asdict(r)) for r in rows) if as_json else fixed_point_table(rows):
        click.echo(line)


@bench.command("dare", context_settings={"show_default": True})
@click.option("--batch", type=click.IntRange(1), multiple=True, help="Problems in a call; repeat "
              "for several. Given with --n instead of the usual sizes.")  # fmt: skip
@click.option("--n", type=click.IntRange(1), multiple=True, help="States, one for each --batch.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto",
              help="auto measures on the CPU, and on CUDA where there is one.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print a JSON line for each row.")
@_reported
def bench_dare_command(
    batch: tuple[int, ...], n: tuple[int, ...], device: str, as_json: bool
) -> None:
    """Time solve_dare beside scipy.linalg.solve_discrete_are and, with slycot, SLICOT's sb02od.

    float64, one CPU thread, m = n / 2 inputs. The usual sizes take some minutes.
    """
    sizes = _sizes(batch, n)
    devices = ["cpu", "cuda"] if device == "auto" and torch.cuda.is_available() else [device]
    for name in devices:
        rows = bench_dare(sizes, _device("cpu" if name == "auto" else name).type)
        for line in (json.dumps(asdict(r)) for r in rows) if as_json else table(rows):
            click.echo(line)


@bench.command("cyclic", context_settings={"show_default": True})
@click.option("--cycle", type=click.Choice(list(CYCLES)), multiple=True,
              help="Repeat for several; all if not given.")  # fmt: skip
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto",
              help="auto measures on the CPU, and on CUDA where there is one.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print a JSON line for each row.")
@_reported
def bench_cyclic_command(cycle: tuple[str, ...], device: str, as_json: bool) -> None:
    """Time solve_cyclic_dare beside SciPy's solve_discrete_are on the lifted problem.

    float64, one CPU thread; n are the states of the phases. About a minute.
    """
    devices = ["cpu", "cuda"] if device == "auto" and torch.cuda.is_available() else [device]
    for name in devices:
        rows = bench_cyclic(cycle or None, _device("cpu" if name == "auto" else name).type)
        for line in (json.dumps(asdict(r)) for r in rows) if as_json else cyclic_table(rows):
            click.echo(line)


@bench.command("ddp", context_settings={"show_default": True})
@click.option("--base", type=click.Choice(list(DDP_BASES)), multiple=True,
              help="Repeat for several; all if not given.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print a JSON line for each row.")
@_reported
def bench_ddp_command(base: tuple[str, ...], as_json: bool) -> None:
    """Time a step of DDP with feedback beside that of its base optimiser; some minutes.

    Tanh networks of 64 inputs and 10 classes, float32, one CPU thread; processor time.
    """
    rows = bench_ddp(bases=base or tuple(DDP_BASES))
    for line in (json.dumps(asdict(r)) for r in rows) if as_json else ddp_table(rows):
        click.echo(line)


@bench.command("step", context_settings={"show_default": True})
@click.option("--batch", type=click.IntRange(1), default=64, help="Samples of a step.")
@click.option("--side", type=click.IntRange(4), default=14, help="Pixels of the state, a side.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="cpu",
              help="auto takes CUDA where there is one.")  # fmt: skip
@click.option("--bf16", is_flag=True, help="Under bfloat16 autocast.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON line for each row.")
@_reported
def bench_step_command(batch: int, side: int, device: str, bf16: bool, as_json: bool) -> None:
    """Time and memory of a step by each route, over those of gradient descent.

    The thesis' convolutional block with 8 channels, 12 inner. One thread on the CPU.
    """
    rows = bench_step(batch, side, str(_device(device)), half=bf16)
    for line in (json.dumps(asdict(r)) for r in rows) if as_json else step_table(rows):
        click.echo(line)


@bench.command("stability", context_settings={"show_default": True})
@click.option("--data-root", type=_PATH, required=True, help="Folder that holds MNIST/raw.")
@click.option("--case", type=click.Choice(list(CASES)), multiple=True,
              help="Repeat for several; all if not given.")  # fmt: skip
@click.option("--epochs", type=click.IntRange(1), default=4, help="Passes over the data.")
@click.option("--out", type=_PATH, default=Path("runs/stability"), help="Folder for its results; "
              "finished runs in it are not run again.")  # fmt: skip
@_reported
def bench_stability_command(data_root: Path, case: tuple[str, ...], epochs: int, out: Path) -> None:
    """Who keeps the fixed points: learning rates over two decades, with and without guard.

    MNIST, dense blocks with 87 states, SGD, Adam and implicit NGD. One thread; about an hour.
    """
    for line in stability_table(run_stability(data_root, out, case, epochs)):
        click.echo(line)


_SEEDS = click.option("--seeds", type=click.IntRange(1), default=3,
                     help="Runs of each method at its best options.")  # fmt: skip
_METHOD = click.option("--method", multiple=True, help="Repeat for several; all if not given.")


@bench.command("train", context_settings={"show_default": True})
@click.option("--data-root", type=_PATH, required=True, help="Folder that holds MNIST/raw.")
@click.option("--race", "name", type=click.Choice(MNIST_RACES), default=MNIST_RACES[0],
              help="Dense model, the same in batches of 512, or convolutional model.")  # fmt: skip
@click.option("--train-size", type=int, help="Use only the first training samples.")
@click.option("--out", type=_PATH, show_default="runs/race-RACE", help="Folder for its results; "
              "finished runs in it are not run again.")  # fmt: skip
@_SEEDS
@_METHOD
@_reported
def bench_train_command(
    data_root: Path,
    name: str,
    train_size: int | None,
    out: Path | None,
    seeds: int,
    method: tuple[str, ...],
) -> None:
    """MNIST: steps and seconds to a test accuracy, every route beside first-order optimizers.

    Each method runs its grid of options on one seed and the best of it on the others. One thread;
    half an hour to an hour.
    """
    what = only(mnist_race(name, data_root, train_size=train_size), method)
    for line in race_table(what, race(what, out or Path(f"runs/race-{name}"), seeds)):
        click.echo(line)


@bench.command("regression", context_settings={"show_default": True})
@click.option("--out", type=_PATH, default=Path("runs/race-regression"), help="Folder for its "
              "results; finished runs in it are not run again.")  # fmt: skip
@_SEEDS
@_METHOD
@_reported
def bench_regression_command(out: Path, seeds: int, method: tuple[str, ...]) -> None:
    """Least squares to high accuracy: steps and seconds to an error, every route beside others.

    A surface of 400 points, full batch, float64. One thread; about twenty minutes.
    """
    what = only(regression_race(), method)
    for line in race_table(what, race(what, out, seeds)):
        click.echo(line)


def _sizes(batch: tuple[int, ...], n: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    if len(batch) != len(n):
        raise ValueError(f"n must be given once for each batch, got {len(n)} and {len(batch)}.")
    return tuple(zip(batch, n, strict=True)) or BATCHES + SINGLES


_ONLY_INGD = ("damping", "minibatch", "route", "inverse", "margin", "feedback", "momentum",
              "adaptive", "acceleration", "trust_region", "check_every")  # fmt: skip
_LR = {"ingd": _DEFAULT.lr, "gd": 0.3, "sgd": 0.1, "adam": 0.01, "lbfgs": 1.0}
_MODEL = {"mnist": "conv"}
_LEAST_SQUARES = {"batch_size": 400, "epochs": 40, "schedule": "constant", "log_every": 1}
_LEAST_SQUARES_INGD = {"lr": 1.0, "damping": 0.1, "route": "output", "adaptive": True,
                       "acceleration": True}  # fmt: skip


def _config(context: click.Context, options: dict[str, Any]) -> TrainConfig:
    if options["data"] == "sine2d":
        own = _LEAST_SQUARES | (_LEAST_SQUARES_INGD if options["optimizer"] == "ingd" else {})
        options |= {name: value for name, value in own.items() if not _given(context, name)}
        if options["route"] not in ("output", "sampled") and not _given(context, "acceleration"):
            options["acceleration"] = False
    if options["data"] in POINT_SETS:
        ours = {"lr", "damping", "route", "adaptive"} if options["optimizer"] != "ingd" else set()
        own = {k: v for k, v in POINT_OPTIONS.items() if k not in ours} | {"epochs": 120}
        options |= {name: value for name, value in own.items() if not _given(context, name)}
    if options["lr"] is None:
        options["lr"] = _LR[options["optimizer"]]
    if options["model"] is None:
        points = options["data"] in POINT_SETS
        options["model"] = _MODEL.get(options["data"], "gradient" if points else "dense")
    root = options["data_root"]
    return TrainConfig(**{**options, "data_root": None if root is None else str(root)})


def _new_folder(out: Path | None, config: TrainConfig) -> Path:
    if out is not None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"out {str(out)!r} exists and is not empty; --resume goes on with it.")
        if any(parent.is_file() for parent in out.parents):
            raise ValueError(f"out {str(out)!r} lies inside a file.")
        return out
    stem = Path("runs") / f"{config.data}-{config.optimizer}"
    folder, number = stem, 1
    while folder.exists():
        number += 1
        folder = Path(f"{stem}-{number}")
    return folder


def _given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


def _refuse(context: click.Context, fixed: Iterable[str], source: str) -> None:
    given = ["--" + n.replace("_", "-") for n in fixed if _given(context, n)]
    if given:
        raise ValueError(f"{', '.join(given)} cannot be given with {source}: the run has its own.")


def _unused(context: click.Context, names: Iterable[str], by: str) -> None:
    given = ["--" + n.replace("_", "-") for n in names if _given(context, n)]
    if given:
        raise ValueError(f"{', '.join(given)} has no effect with {by}.")


def _load(network: nn.Module, content: dict[str, Any], checkpoint: Path | None) -> None:
    try:
        network.load_state_dict(content["model"])
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"checkpoint {str(checkpoint)!r} does not fit: {error!r}") from error


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' is not available on this machine.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _as_path(stored: str | None, given: Path | None) -> Path | None:
    return given if given is not None else None if stored is None else Path(stored)
