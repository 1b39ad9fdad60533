"""How far a few trained scalars go: accuracy on digits by their number, all else random and frozen.

Three models see the 64 pixels, and a frozen random readout turns their output y into logits,

    (FS1)  logits = scale G y,    G G' = I, G (10, n) random

so that nothing but the scalars is trained: `"layers"`, the controlled equation with 7 fields and
more and more steps (the theorem's way to more parameters); `"fields"`, the same in two steps with
more and more fields; `"deq"`, a DEQ block of more and more fields with 16 states.

Source: C. Cuchiero, M. Larsson, J. Teichmann (2020), arXiv:1908.07838, which proves that 7 fields
and enough steps interpolate any generic data; how well that generalises is measured here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from deqlqr._checks import at_least, choice, count
from deqlqr.data import Data, load_data
from deqlqr.deq import DEQ
from deqlqr.evaluation import evaluate
from deqlqr.models import check_seed
from deqlqr.optim import ImplicitNGD
from deqlqr.random_fields import ControlledODE, RandomFieldBlock
from deqlqr.routes import ROUTES

STUDY_MODELS = ("layers", "fields", "deq")
READOUTS = ("frozen", "trained")
_LAYER_FIELDS, _FIELD_STEPS = 7, 2
_STATES = 16  # of the DEQ
_TOL = 1e-4  # of its fixed points


@dataclass(frozen=True)
class StudyOptions:
    """What all runs of a study share.

    Attributes:
        readout: `"frozen"` (FS1), or `"trained"`: a linear readout from zero, whose weights are
            trained scalars too and counted with the others.
        scale: Of (FS1).
        steps: Steps of `ImplicitNGD` in each run; its step length falls from `lr` with the cosine.
        batch_size: Samples of a step.
        lr: First step length.
        damping: delta of R_bar = R + delta I.
        route: How the step is computed, one of `ROUTES`.

    Raises:
        ValueError: If an option is out of range.
    """

    readout: str = "frozen"
    scale: float = 4.0
    steps: int = 60
    batch_size: int = 128
    lr: float = 1.0
    damping: float = 1e-3
    route: str = "output"

    def __post_init__(self) -> None:
        choice("readout", self.readout, READOUTS)
        choice("route", self.route, ROUTES)
        count("steps", self.steps)
        count("batch_size", self.batch_size)
        for name in ("scale", "lr", "damping"):
            at_least(name, getattr(self, name), 0.0, strict=True)


def study(
    sizes: Sequence[int] = (14, 28, 56, 112, 224),
    seeds: Sequence[int] = (0, 1, 2),
    *,
    models: Sequence[str] = STUDY_MODELS,
    options: StudyOptions = StudyOptions(),
    data: Data | None = None,
    quiet: bool = False,
) -> dict[str, dict[int, list[float]]]:
    """Train every model at every size from every seed, and return the test accuracies.

    Args:
        sizes: Numbers of fields' scalars u: multiples of 14 (7 fields by steps, 2 steps by fields).
        seeds: Of the fields, the readout, the initial scalars and the batches.
        models: Which models, of `STUDY_MODELS`.
        options: What all runs share.
        data: Images or vectors with labels, of at most 16 classes and no more than an input has
            components; `None` takes the digits.
        quiet: Whether to show no progress bar.

    Returns:
        By model, by number of trained scalars: the accuracies, one a seed. The controlled equation
        trains lam of (RF7) beside u.

    Raises:
        ValueError: If a size is no multiple of 14, a model is unknown, a seed is out of range,
            there is none of them, or the data do not fit.
    """
    _require(sizes, seeds, models)
    data = _flat(load_data("digits") if data is None else data)
    if options.batch_size > len(data.train_x):
        raise ValueError(
            f"batch_size must be at most the {len(data.train_x)} training samples, got "
            f"{options.batch_size}."
        )
    found: dict[str, dict[int, list[float]]] = {name: {} for name in models}
    runs = [(name, size, seed) for name in models for size in sizes for seed in seeds]
    bar = tqdm(runs, unit="run", disable=True if quiet else None)
    for name, size, seed in bar:
        bar.set_description(f"{name}, {size}")
        model = study_model(name, size, data, seed=seed, options=options)
        _train(model, data, seed, options)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found[name].setdefault(trained, []).append(evaluate(model, data.test_x, data.test_y)[0])
    return found


def study_model(
    name: str, size: int, data: Data, *, seed: int = 0, options: StudyOptions = StudyOptions()
) -> nn.Sequential:
    """Return a freshly initialised model of the study for vectors (samples, inputs) with labels.

    Args:
        name: One of `STUDY_MODELS`.
        size: Number of scalars u, a multiple of 14.
        data: What it is to be trained on; the shapes are used.
        seed: Of fields, readout and initial scalars.
        options: `readout` and `scale` are used.

    Raises:
        ValueError: If an argument is out of range.
    """
    _require([size], [seed], [name])
    inputs = data.train_x.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "deq":
            n, block = _STATES, RandomFieldBlock(_STATES, size, inputs, seed=seed)
            body: nn.Module = DEQ(block, tol=_TOL)
        else:
            layers = name == "layers"
            fields = _LAYER_FIELDS if layers else size // _FIELD_STEPS
            n, body = inputs, ControlledODE(inputs, fields, size // fields, seed=seed)
        readout = nn.Linear(n, data.outputs)
        nn.init.zeros_(readout.bias)
        if options.readout == "trained":
            nn.init.zeros_(readout.weight)
        else:
            nn.init.orthogonal_(readout.weight, options.scale)  # (FS1)
            readout.requires_grad_(False)
    return nn.Sequential(body, readout)


def _require(sizes: Sequence[int], seeds: Sequence[int], models: Sequence[str]) -> None:
    """Refuse runs that there are not."""
    for name, given in (("sizes", sizes), ("seeds", seeds), ("models", models)):
        if not given:
            raise ValueError(f"{name} must hold at least one, got {given!r}.")
    unit = _LAYER_FIELDS * _FIELD_STEPS
    for size in sizes:
        if count("sizes", size) % unit:
            raise ValueError(f"sizes must be multiples of {unit}, got {size}.")
    for seed in seeds:
        check_seed(seed)
    for model in models:
        choice("models", model, STUDY_MODELS)


def _flat(data: Data) -> Data:
    """Return data as vectors whose components have variance 1 on average."""
    most = min(_STATES, data.train_x[0].numel())  # or G of (FS1) had no orthonormal rows
    if data.loss != "cross_entropy" or data.outputs > most:
        raise ValueError(
            f"data must have labels of at most {most} classes, got {data.train_y.dtype} with "
            f"{data.outputs} outputs."
        )
    scale = data.train_x.std()
    flat = lambda x: x.flatten(1) / scale
    return replace(data, train_x=flat(data.train_x), test_x=flat(data.test_x))


def _train(model: nn.Module, data: Data, seed: int, options: StudyOptions) -> None:
    """Take the steps, on batches from a random order that is drawn anew when it is used up."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = ImplicitNGD(model, damping=options.damping, route=options.route)
    batches: list[Tensor] = []
    for step in range(options.steps):
        if not batches:
            order = torch.randperm(len(data.train_x), generator=generator)
            full = len(order) // options.batch_size * options.batch_size
            batches = list(order[:full].split(options.batch_size))
        samples = batches.pop()
        lr = options.lr * (1 + math.cos(math.pi * step / options.steps)) / 2
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step(data.train_x[samples], data.train_y[samples])
