"""Figures 1 and 2 of the paper on extended MSA: a sine by a residual network, MNIST by another.

E-MSA beside torch's SGD, Adagrad and Adam, by iteration and by second, each method at the best
penalty or step length of a small grid. The gradient methods may take more iterations, as one of
theirs costs far less.

Source: Q. Li, L. Chen, C. Tai and W. E (2018), Maximum principle based algorithms for deep
learning, Journal of Machine Learning Research 18(165), arXiv:1710.09513, section 5.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from deqlqr.checkpoint import load_checkpoint, save_checkpoint
from deqlqr.data import Data, load_data
from deqlqr.gradient_step import GradientStep
from deqlqr.guard import Stepper
from deqlqr.interrupt import interruptible
from deqlqr.loss import LossLike, make_loss
from deqlqr.metrics import MetricsFile, read_metrics
from deqlqr.msa import MSA
from deqlqr.msa_networks import INITIAL, image_network, sine_loss, sine_network
from deqlqr.solution import ConvergenceError

matplotlib.use("Agg")

OURS = "E-MSA"
GRADIENT_METHODS = {
    "SGD": torch.optim.SGD,
    "Adagrad": torch.optim.Adagrad,
    "Adam": torch.optim.Adam,
}
LR_GRID = {"SGD": (0.003, 0.01, 0.03), "Adagrad": (0.01, 0.03, 0.1), "Adam": (0.003, 0.01, 0.03)}
LR_GRID_MNIST = {
    "SGD": (0.03, 0.1, 0.3),
    "Adagrad": (0.01, 0.03, 0.1),
    "Adam": (0.001, 0.003, 0.01),
}
RHO_GRID, RHO_GRID_MNIST = (10.0,), (0.3, 1.0)
ADAPTIVE_FROM = 1.0  # rho
BUDGET = 5  # gradient methods may take so many times the iterations
CHANNELS, FEW = 32, 8  # of the network for MNIST: the paper's, and for few iterations
BATCH, SAMPLES = 100, 55_000
PASS = SAMPLES // BATCH
_CHECKPOINT, _METRICS = "checkpoint.pt", "metrics.jsonl"
_SAVED_AFTER = 5.0  # seconds
_TAIL = 5  # lines at the end over which a run is judged


@dataclass(frozen=True)
class Problem:
    """What all methods of a panel train.

    Attributes:
        name: For its folder.
        make: Makes the model.
        data: The samples.
        loss: As for `MSA`.
        batch_size: Samples of a step.
        every: Iterations between looks at all data.
        looked_at: Most samples of such a look, for training and for test.
    """

    name: str
    make: Callable[[], nn.Module]
    data: Data
    loss: LossLike
    batch_size: int
    every: int
    looked_at: int


@dataclass(frozen=True)
class Method:
    """A method with its options.

    Attributes:
        name: `"E-MSA"` or one of `GRADIENT_METHODS`.
        steps: Iterations.
        lr: Step length, of gradient methods.
        rho: Penalty, of E-MSA.
        adaptive: Whether it adapts.
    """

    name: str
    steps: int
    lr: float | None = None
    rho: float | None = None
    adaptive: bool = False

    @property
    def label(self) -> str:
        """Its name with its options."""
        if self.rho is None:
            return f"{self.name}, lr {self.lr:g}"
        return f"{self.name}, rho {'adaptive' if self.adaptive else f'{self.rho:g}'}"

    def stepper(self, model: nn.Module, loss: LossLike) -> tuple[Stepper, torch.optim.Optimizer]:
        """Return what takes steps, and the torch optimizer inside."""
        if self.rho is not None:
            msa = MSA(model, loss=loss, rho=self.rho, adaptive=self.adaptive)
            return msa, msa
        make: Any = GRADIENT_METHODS[self.name]
        optimizer = make(model.parameters(), lr=self.lr)
        return GradientStep(model, optimizer, loss), optimizer


def methods(ours: Sequence[Method], lrs: Mapping[str, Sequence[float]]) -> list[Method]:
    """Return our runs, and gradient methods over their grids with more iterations."""
    steps = BUDGET * ours[0].steps
    return [*ours, *(Method(name, steps, lr=lr) for name in lrs for lr in lrs[name])]


def reproduce_emsa_fig1(data_root: Path | None, out: Path, steps: int) -> str:
    """Run figure 1: a sine from good parameters, and from zeros, by full batches.

    Args:
        data_root: Not used.
        out: Folder of the runs, of `emsa-fig1.png` and `emsa-fig1.json`.
        steps: Iterations of E-MSA; the paper's are 200.

    Returns:
        The line that sums it up: what the paper reports, and what was measured.
    """
    data = _single(load_data("sine"))
    ours = [Method(OURS, steps, rho=rho) for rho in RHO_GRID]
    ours.append(Method(OURS, steps, rho=ADAPTIVE_FROM, adaptive=True))
    panels: dict[str, list[dict[str, Any]]] = {}
    for initial in INITIAL:
        make = partial(sine_network, initial)
        problem = Problem(initial, make, data, sine_loss, len(data.train_x), 1, 1000)
        panels[initial] = _rows(problem, methods(ours, LR_GRID), out)
    titles = {f"{name} initial parameters": chosen(rows) for name, rows in panels.items()}
    _plot(titles, out / "emsa-fig1.png", "sine, 20 residual layers: training (line), test (dots)",
          ("loss",))  # fmt: skip
    line = (
        "The paper reports that E-MSA converges faster per iteration, and that from zero "
        "parameters gradient methods stall where E-MSA escapes. Measured, training loss after "
        f"{steps} iterations: {_verdict(panels, steps)}."
    )
    return _written(panels, line, out / "emsa-fig1.json")


def reproduce_emsa_fig2(data_root: Path | None, out: Path, steps: int) -> str:
    """Run figure 2: MNIST by a residual network of convolutions, minibatches of 100.

    From a pass over the data on, 550 iterations, the network has the paper's 32 channels, else 8.

    Args:
        data_root: MNIST's folder.
        out: Folder of the runs, of `emsa-fig2.png` and `emsa-fig2.json`.
        steps: Iterations of E-MSA.

    Returns:
        The line that sums it up.

    Raises:
        ValueError: If MNIST is not there.
    """
    data = load_data("mnist", data_root).first(SAMPLES)
    full = steps >= PASS
    channels, looked_at = (CHANNELS, len(data.test_x)) if full else (FEW, 1000)
    ours = [Method(OURS, steps, rho=rho) for rho in RHO_GRID_MNIST]
    name, make = f"{channels} channels", partial(image_network, channels)
    every = max(1, steps // 10)
    problem = Problem(name, make, data, "cross_entropy", BATCH, every, looked_at)
    rows = _rows(problem, methods(ours, LR_GRID_MNIST), out)
    title = f"MNIST, residual CNN, {channels} channels: training (line), test (dots)"
    _plot({"": chosen(rows)}, out / "emsa-fig2.png", title, ("loss", "accuracy"))
    line = (
        "The paper reports that E-MSA is ahead per iteration in early iterations, and behind per "
        f"second. Measured, {name}, test accuracy: {_early(rows, steps)}."
    )
    return _written({name: rows}, line, out / "emsa-fig2.json")


def _single(data: Data) -> Data:
    """Return data in float32: from zero parameters only rounding parts the states' entries."""
    train_x, train_y = data.train_x.float(), data.train_y.float()
    return Data(train_x, train_y, data.test_x.float(), data.test_y.float(), data.outputs)


def finish(problem: Problem, method: Method, folder: Path, *, quiet: bool = False) -> str | None:
    """Run a method to its end, from a checkpoint in the folder if there is one.

    Args:
        problem: What it trains.
        method: The method.
        folder: Where metrics and checkpoint are.
        quiet: Show no progress bar.

    Returns:
        Why it failed, or `None`.

    Raises:
        ValueError: If the folder holds another run.
        KeyboardInterrupt: If it was interrupted; the same call goes on from there.
    """
    model, data, config = problem.make(), problem.data, asdict(method)
    stepper, optimizer = method.stepper(model, problem.loss)
    step, seconds, failure = 0, 0.0, None
    if (folder / _CHECKPOINT).exists():
        content = load_checkpoint(folder / _CHECKPOINT)
        if content["config"] != config:
            raise ValueError(f"out {str(folder)!r} holds another run; choose another --out.")
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        step, seconds, failure = content["step"], content["seconds"], content["failure"]
    metrics = MetricsFile(folder / _METRICS, keep_steps=step)

    def save() -> None:
        held = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        told = {"step": step, "seconds": seconds, "failure": failure, "config": config}
        save_checkpoint(folder / _CHECKPOINT, {**held, **told})

    def log() -> None:
        if step % problem.every == 0 or step == method.steps:
            metrics.write({"step": step, "seconds": seconds, **_measured(problem, model)})

    if step == 0:
        log()
    saved = time.perf_counter()
    bar = tqdm(total=method.steps, initial=step, desc=method.label, disable=True if quiet else None)
    with interruptible() as stop, bar:
        while step < method.steps and failure is None and not stop.is_set():
            samples = _samples(step, len(data.train_x), problem.batch_size)
            start = time.perf_counter()
            try:
                stepper.step(data.train_x[samples], data.train_y[samples])
            except ConvergenceError as error:
                failure = str(error)
                break
            seconds += time.perf_counter() - start
            step += 1
            bar.update()
            log()
            if time.perf_counter() - saved > _SAVED_AFTER:
                save()
                saved = time.perf_counter()
        save()
    if step < method.steps and failure is None:
        raise KeyboardInterrupt
    return failure


def _samples(step: int, size: int, batch_size: int) -> Tensor:
    """Return the samples of a step, in a random order for each pass; whole batches in theirs."""
    if batch_size == size:
        return torch.arange(size)
    epoch, index = divmod(step, size // batch_size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(epoch))
    return order[index * batch_size : (index + 1) * batch_size]


@torch.no_grad()
def _measured(problem: Problem, model: nn.Module) -> dict[str, Any]:
    """Return loss, and accuracy for labels, on training and test samples."""
    data, loss, line = problem.data, make_loss(problem.loss), {}
    for name, x, y in (("", data.train_x, data.train_y), ("test_", data.test_x, data.test_y)):
        x, y = x[: problem.looked_at], y[: problem.looked_at]
        outputs = torch.cat([model(part) for part in x.split(1000)])
        line[f"{name}loss"] = float(loss(outputs, y))
        if not y.is_floating_point():
            line[f"{name}accuracy"] = float((outputs.argmax(1) == y).double().mean())
    return line


def _rows(problem: Problem, of: Sequence[Method], out: Path) -> list[dict[str, Any]]:
    """Return what each method did, with its metrics as `lines`; finished runs are not repeated."""
    rows = []
    for method in of:
        folder = out / f"{problem.name} {method.label}".replace(",", "").replace(" ", "-")
        failure = finish(problem, method, folder)
        lines = read_metrics(folder / _METRICS)
        last = lines[-_TAIL:]
        mean = sum(line["loss"] or float("inf") for line in last) / len(last)
        judged = float("inf") if failure is not None or mean != mean else mean
        rows.append({
            "method": method.name,
            "label": method.label,
            "steps": lines[-1]["step"],
            "seconds_per_step": lines[-1]["seconds"] / max(lines[-1]["step"], 1),
            "judged": judged,
            "failure": failure,
            "lines": lines,
        })
    return rows


def chosen(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the row of each method with the lowest training loss at its end."""
    names = dict.fromkeys(row["method"] for row in rows)
    return [
        min((row for row in rows if row["method"] == name), key=lambda row: row["judged"])
        for name in names
    ]


def _at(row: dict[str, Any], step: int, key: str) -> float:
    """Return a measure at a step, or at the last line before it."""
    value = [line for line in row["lines"] if line["step"] <= step][-1][key]
    return float("nan") if value is None else value


def _verdict(panels: dict[str, list[dict[str, Any]]], steps: int) -> str:
    parts = []
    for name, rows in panels.items():
        texts = []
        for row in chosen(rows):
            text, last = f"{row['label']} {_at(row, steps, 'loss'):.2g}", row["steps"]
            more = f" ({_at(row, last, 'loss'):.2g} after {last})" if last > steps else ""
            texts.append(text + more)
        parts.append(f"{name} parameters: {'; '.join(texts)}")
    return " | ".join(parts)


def _early(rows: Sequence[dict[str, Any]], steps: int) -> str:
    """Compare accuracies at a fifth of the iterations, at all, and at the same seconds."""
    best = chosen(rows)
    spent = best[0]["lines"][-1]["seconds"]
    texts = []
    for row in best:
        then = [line for line in row["lines"] if line["seconds"] <= spent][-1]
        texts.append(
            f"{row['label']} {_at(row, steps // 5, 'test_accuracy'):.1%} after {steps // 5} "
            f"iterations, {_at(row, steps, 'test_accuracy'):.1%} after {steps}, "
            f"{then['test_accuracy']:.1%} after {then['step']} iterations in at most {spent:.0f} s"
        )
    return "; ".join(texts)


def _written(panels: dict[str, list[dict[str, Any]]], line: str, path: Path) -> str:
    best = {id(row) for rows in panels.values() for row in chosen(rows)}
    plain = {
        name: [
            {**row, "chosen": id(row) in best, "lines": row["lines"][-1],
             "judged": row["judged"] if row["judged"] < float("inf") else None}
            for row in rows
        ]
        for name, rows in panels.items()
    }  # fmt: skip
    path.write_text(json.dumps({"panels": plain, "line": line}, indent=2) + "\n")
    return line


def _plot(
    panels: dict[str, list[dict[str, Any]]], path: Path, title: str, measures: Sequence[str]
) -> None:
    """Draw each measure by iteration (left) and by second (right), a row of axes for each panel."""
    figure = Figure(figsize=(10, 0.8 + 3.6 * len(panels) * len(measures)), layout="constrained")
    axes = figure.subplots(len(panels) * len(measures), 2, sharey="row", squeeze=False)
    pairs = [(name, measure) for name in panels for measure in measures]
    for (name, measure), (left, right) in zip(pairs, axes, strict=True):
        for number, row in enumerate(panels[name]):
            lines = row["lines"]
            for axis, key in ((left, "step"), (right, "seconds")):
                for kind, style in ((measure, "-"), (f"test_{measure}", ":")):
                    axis.plot(
                        [line[key] for line in lines],
                        [float("nan") if line[kind] is None else line[kind] for line in lines],
                        style, color=f"C{number}", linewidth=2.0 if number == 0 else 1.2,
                        label=row["label"] if style == "-" and axis is left else None,
                    )  # fmt: skip
        left.set(xlabel="iteration", ylabel=measure, title=name)
        right.set(xlabel="seconds of training", xscale="log")
        left.set_xscale("log")
        if measure == "loss":
            left.set_yscale("log")
        left.legend(fontsize=7)
        for axis in (left, right):
            axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
