"""Figure 3.1: at every step of a training the update of the LQR beside that of autograd.

A network of three convolutions and two dense layers learns MNIST in batches of 5, by gradient
descent and by natural gradient descent, and every update is the LQR's, in float64. Beside it stands
the update of `deqlqr.autograd_update` on the same batch. Both are computed again from parameters
and batch cast to float32, and compared there; and the LQR's in float32 with autograd's in float64,
to which neither can be close where the loss is nearly 0: the softmax less the label cancels.

Source: thesis section 3.3.
"""

import json
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from deqlqr._checks import at_least, choice, count
from deqlqr.autograd_update import gradient_update, misalignment, natural_update
from deqlqr.batch import Batch
from deqlqr.checkpoint import load_checkpoint, save_checkpoint
from deqlqr.controls import Controls
from deqlqr.data import Data, load_data
from deqlqr.divergence import CategoricalKL, Divergence, Euclidean
from deqlqr.evaluation import evaluate
from deqlqr.figures import plot_misalignments
from deqlqr.interrupt import interruptible
from deqlqr.loss import make_loss
from deqlqr.metrics import MetricsFile, read_metrics
from deqlqr.models import check_seed, make_model
from deqlqr.routes import Memory, Riccati
from deqlqr.solution import ConvergenceError

BATCH = 5  # the thesis'
# On 1 - cos: LQR and autograd both in a type, and the first in float32, the other in float64.
LIMITS = {"float64": 1e-12, "float32": 1e-6, "float32 to float64": 1e-6}
THESIS = 1e-5
METHODS = ("SGD", "NGD")
_CHECKPOINT, _METRICS = "checkpoint.pt", "metrics.jsonl"


@dataclass(frozen=True)
class CosineConfig:
    """Everything that determines the numbers of one of the trainings.

    Attributes:
        method: `"SGD"`, by (AU1), or `"NGD"`, by (AU2).
        lr: Step length.
        damping: delta of (AU2); 0 for `"SGD"`.
        steps: How many.
        batch_size: Samples of a step.
        save_every: Steps between checkpoints.
        eval_every: Steps between looks at the test set.
        eval_size: Test samples of such a look.
        seed: Of parameters and sample order.

    Raises:
        ValueError: If an option is unknown or out of range.
    """

    method: str
    lr: float
    damping: float
    steps: int
    batch_size: int = BATCH
    save_every: int = 50
    eval_every: int = 10
    eval_size: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        choice("method", self.method, METHODS)
        at_least("lr", self.lr, 0.0, strict=True)
        at_least("damping", self.damping, 0.0, strict=self.method == "NGD")
        if self.method == "SGD" and self.damping:
            raise ValueError(f"damping must be 0 for method 'SGD', got {self.damping}.")
        for name in ("steps", "batch_size", "save_every", "eval_every", "eval_size"):
            count(name, getattr(self, name))
        check_seed(self.seed)

    @property
    def divergence(self) -> Divergence:
        """What "steepest" is measured in."""
        return Euclidean() if self.method == "SGD" else CategoricalKL()


class CosineRun:
    """One training in one folder, gone on with from the checkpoint there, if there is one.

    Args:
        config: What to run.
        data: Images and labels.
        folder: Where metrics and checkpoint lie.

    Raises:
        ValueError: If the folder holds another run, or there are fewer samples than in a batch.
    """

    def __init__(self, config: CosineConfig, data: Data, folder: Path) -> None:
        self.config, self.data, self.folder = config, data, folder
        if config.batch_size > len(data.train_x):
            raise ValueError(
                f"batch_size must be at most the {len(data.train_x)} training samples, got "
                f"{config.batch_size}."
            )
        shape = data.train_x.shape[1:]
        self.model = make_model("convnet", shape, data.outputs, seed=config.seed).double()
        self.step = 0
        if (folder / _CHECKPOINT).exists():
            content = load_checkpoint(folder / _CHECKPOINT)
            if content.get("config") != asdict(config):
                raise ValueError(f"out {str(folder)!r} holds another run; choose another --out.")
            self.model.load_state_dict(content["model"])
            self.step = content["step"]
        self.metrics = MetricsFile(folder / _METRICS, keep_steps=self.step)
        self._rounded = deepcopy(self.model).float()
        self._test = data.test_x[: config.eval_size].double(), data.test_y[: config.eval_size]

    def run(self, *, quiet: bool = False) -> list[dict[str, Any]]:
        """Train to the end, or until an interrupt, after which it can be gone on with.

        Returns:
            The metrics of every step.

        Raises:
            ConvergenceError: If the LQR of a step cannot be solved.
            KeyboardInterrupt: If it was interrupted.
        """
        config = self.config
        per_epoch = len(self.data.train_x) // config.batch_size
        order_epoch, order = -1, torch.empty(0)
        bar = tqdm(total=config.steps, initial=self.step, unit="step", desc=config.method,
                   disable=True if quiet else None)  # fmt: skip
        with interruptible() as stop, bar:
            while self.step < config.steps and not stop.is_set():
                epoch, index = divmod(self.step, per_epoch)
                if epoch != order_epoch:
                    order_epoch, order = epoch, self._order(epoch)
                line = self._take(order[index * config.batch_size :][: config.batch_size])
                self.step += 1
                if self.step % config.eval_every == 0 or self.step == config.steps:
                    line["accuracy"], _ = evaluate(self.model, *self._test)
                self.metrics.write({"kind": "step", "step": self.step} | line)
                if self.step % config.save_every == 0:
                    self._save()
                bar.update()
                bar.set_postfix(loss=f"{line['loss']:.3g}", refresh=False)
            self._save()
        if self.step < config.steps:
            raise KeyboardInterrupt
        return [line for line in read_metrics(self.metrics.path) if line["kind"] == "step"]

    def _save(self) -> None:
        content = {"config": asdict(self.config), "model": self.model.state_dict()}
        save_checkpoint(self.folder / _CHECKPOINT, {**content, "step": self.step})

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * self.config.seed + epoch)
        return torch.randperm(len(self.data.train_x), generator=generator)

    def _take(self, samples: Tensor) -> dict[str, Any]:
        """Compare the updates on a batch, take the LQR's, and return what was measured."""
        x, y = self.data.train_x[samples].double(), self.data.train_y[samples]
        with torch.no_grad():
            for rounded, p in zip(self._rounded.parameters(), self.model.parameters(), strict=True):
                rounded.copy_(p)
        start = time.perf_counter()
        loss, update = self._by_lqr(self.model, x, y)
        first = time.perf_counter()
        expected = self._by_autograd(self.model, x, y)
        second = time.perf_counter()
        _, update_32 = self._by_lqr(self._rounded, x.float(), y)
        third = time.perf_counter()
        expected_32 = self._by_autograd(self._rounded, x.float(), y)
        with torch.no_grad():
            Controls(self.model).assign(Controls(self.model).vector + self.config.lr * update)
        return {
            "loss": loss,
            "float64": misalignment(update, expected),
            "float32": misalignment(update_32, expected_32),
            "float32 to float64": misalignment(update_32, expected),
            "seconds": {
                "LQR, float64": first - start,
                "autograd, float64": second - first,
                "LQR, float32": third - second,
            },
        }

    def _by_lqr(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, Tensor]:
        at = Batch(model, Controls(model), make_loss("cross_entropy"), [(x, y)])
        local = Riccati().local(at, self.config.divergence, x.dtype, Memory())
        found = local.solve([self.config.damping] * len(at.controls.parameters))
        if found.u is None or found.reason is not None:
            self._save()
            raise ConvergenceError(f"step {self.step + 1}: {found.reason}")
        return float(local.loss), found.u

    def _by_autograd(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if self.config.method == "SGD":
            return gradient_update(model, x, y)
        return natural_update(model, x, y, self.config.damping)


def cosine_configs(steps: int) -> dict[str, CosineConfig]:
    """Return the two trainings of the figure."""
    every = max(10, steps // 100)
    return {
        "SGD": CosineConfig("SGD", lr=0.05, damping=0.0, steps=steps, eval_every=every),
        "NGD": CosineConfig("NGD", lr=0.05, damping=1.0, steps=steps, eval_every=every),
    }


def reproduce_cosine(data_root: Path | None, out: Path, steps: int) -> str:
    """Run both trainings under `out` and write `fig3.1.png` and `fig3.1.json`.

    Returns:
        The line that sums it up.
    """
    data = load_data("mnist", data_root)
    configs = cosine_configs(steps)
    runs = {name: CosineRun(config, data, out / name).run() for name, config in configs.items()}
    rows = {name: {"config": asdict(configs[name])} | _row(lines) for name, lines in runs.items()}
    title = f"MNIST, 3 convolutions and 2 dense layers, batches of {BATCH}: updates by the LQR"
    plot_misalignments(runs, out / "fig3.1.png", title, LIMITS, THESIS)
    line = _line(rows, steps)
    content = {"limits": LIMITS, "runs": rows, "line": line}
    (out / "fig3.1.json").write_text(json.dumps(content, indent=2) + "\n")
    return line


def _row(lines: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, limit in LIMITS.items():
        worst = max(lines, key=lambda line: line[kind])
        found[kind] = {
            "largest": worst[kind],
            "at_step": worst["step"],
            "median": median(line[kind] for line in lines),
            "steps_above_limit": sum(line[kind] > limit for line in lines),
        }
    accuracies = [line["accuracy"] for line in lines if "accuracy" in line]
    pace = {name: median(line["seconds"][name] for line in lines) for name in lines[0]["seconds"]}
    return found | {
        "accuracy": accuracies[-1],
        "best_accuracy": max(accuracies),
        "seconds_per_step": pace,
    }


def _line(rows: dict[str, dict[str, Any]], steps: int) -> str:
    def of(name: str, row: dict[str, Any]) -> str:
        largest = ", ".join(
            f"{kind} {row[kind]['largest']:.1e}"
            + (f" ({row[kind]['steps_above_limit']} steps above {limit:g})"
               if row[kind]["steps_above_limit"] else "")
            for kind, limit in LIMITS.items()
        )  # fmt: skip
        pace = row["seconds_per_step"]
        return (
            f"{name}: {largest}; test accuracy {row['accuracy']:.1%}; a step of the LQR "
            f"{1e3 * pace['LQR, float64']:.0f} ms in float64, of autograd "
            f"{1e3 * pace['autograd, float64']:.0f} ms"
        )

    return (
        f"The thesis reports a cosine within {THESIS:g} of 1 at every step. Measured, largest "
        f"1 - cos of {steps} steps, {' | '.join(of(name, row) for name, row in rows.items())}."
    )
