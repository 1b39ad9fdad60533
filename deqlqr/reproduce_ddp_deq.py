"""DDP on a DEQ: steps with feedback (DD11) beside steps without it, in pairs of the same seed.

Three times: how far the loss falls in one step from the same parameters, however long the step;
trainings of that small problem; trainings on the digits as `deqlqr train` runs them. No source has
such numbers.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log10
from pathlib import Path
from statistics import mean, median
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from deqlqr.blocks import DenseBlock
from deqlqr.ddp_runs import paired_difference
from deqlqr.deq import DEQ
from deqlqr.kept_runs import kept_run
from deqlqr.optim import ImplicitNGD
from deqlqr.training import TrainConfig

matplotlib.use("Agg")

SEEDS = 10
DIGITS_SEEDS = 5
SCALES = (1.0, 2.0)  # of torch's initial parameters
ONE_STEP = tuple((delta, lr) for delta in (1.0, 0.1, 0.01, 0.001) for lr in (0.5, 1.0, 2.0))
TRAININGS = tuple((delta, lr) for delta in (0.3, 0.1, 0.03) for lr in (1.0, 2.0))
DIGITS = ((0.5, 1.5), (0.1, 1.0), (0.1, 2.0))  # the first is that of `deqlqr train`
WAYS = ("plain", "feedback")
_LAST = 10  # steps of the digits whose losses are averaged, each of another batch
_LEGEND = """Small problem: 12 samples, float64, ten seeds.
Above: fall of the loss in one step with feedback
minus without, mean and 95% interval.

Below: training loss, mean of the logarithms,
solid with feedback, dashed without.

Digits: five seeds, batches of 16,
mean of five steps."""
_NO_LIMIT = 1e6  # times the loss: a single step stays, however bad


@dataclass(frozen=True)
class Run:
    """What a training with or without feedback came to.

    Attributes:
        losses: Before each step.
        end: What is compared: the logarithm of the last loss; digits: the mean of the last.
        seconds: Per step.
        rejections: Attempts rejected.
        size: Median of the reports' `feedback`.
        accuracy: On test samples; `None` on the small problem.
    """

    losses: Sequence[float]
    end: float
    seconds: float
    rejections: int
    size: float | None
    accuracy: float | None = None


def reproduce_ddp_deq(data_root: Path | None, out: Path, steps: int) -> str:
    """Compare feedback with none.

    Args:
        data_root: Not used.
        out: Folder of the digits' runs, of `ddp-deq.png`, `ddp-deq.json` and `ddp-deq.md`.
        steps: Of a training.

    Returns:
        The line that sums it up.
    """
    out.mkdir(parents=True, exist_ok=True)
    falls = [_fall_row(*case) for case in _cases(ONE_STEP)]
    small = {case: _small_runs(*case, steps) for case in _cases(TRAININGS)}
    digits = {case: _digits_runs(*case, steps, out) for case in DIGITS}
    content: dict[str, Any] = {
        "steps": steps,
        "one_step": falls,
        "small": [_row(runs, *case) for case, runs in small.items()],
        "digits": [_row(runs, 1.0, *case) for case, runs in digits.items()],
    }
    content["line"] = _verdict(content)
    (out / "ddp-deq.json").write_text(json.dumps(content, indent=2) + "\n")
    (out / "ddp-deq.md").write_text("\n".join(_markdown(content)) + "\n")
    _plot(falls, small, digits, out / "ddp-deq.png")
    return content["line"]


def small_problem(scale: float, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a model of 90 parameters in float64, its 12 samples and their random labels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = DEQ(DenseBlock(4, 5), tol=1e-12, max_steps=2000)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), layer, nn.Linear(4, 3)).double()
        x, y = torch.randn(12, 6, dtype=torch.float64), torch.randint(0, 3, (12,))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    return model, x, y


def fall_of_one_step(
    scale: float, damping: float, lr: float, seed: int, feedback: bool
) -> tuple[float, float | None] | None:
    """Return by how much one step lowers the loss, and how large the feedback was.

    Returns:
        Both, or `None` where there is no step.
    """
    model, x, y = small_problem(scale, seed)
    opt = ImplicitNGD(
        model, damping=damping, lr=lr, feedback=feedback, max_rejections=0, max_increase=_NO_LIMIT
    )
    opt.step(x, y)
    report = opt.last_step
    assert report is not None  # noqa: S101
    return (report.loss - report.loss_after, report.feedback) if report.accepted else None


def _cases(grid: Iterable[tuple[float, float]]) -> list[tuple[float, float, float]]:
    grid = tuple(grid)
    return [(scale, *point) for scale in SCALES for point in grid]


def _fall_row(scale: float, damping: float, lr: float) -> dict[str, Any]:
    tried = [
        [fall_of_one_step(scale, damping, lr, seed, way == "feedback") for way in WAYS]
        for seed in range(SEEDS)
    ]
    both = [(p, f) for p, f in tried if p is not None and f is not None]
    falls = [[p[0] for p, _ in both], [f[0] for _, f in both]]
    return {
        "scale": scale, "damping": damping, "lr": lr, **_compared(*falls),
        "better": sum(f > p for p, f in zip(*falls, strict=True)),
        "size": median(f[1] or 0.0 for _, f in both) if both else None,
    }  # fmt: skip


def _compared(plain: Sequence[float], feedback: Sequence[float]) -> dict[str, Any]:
    """Return both means, and the paired difference with half its 95% interval."""
    if len(plain) < 2:
        return {"pairs": len(plain)} | dict.fromkeys((*WAYS, "difference", "interval"))
    difference, interval = paired_difference(plain, feedback)
    return {
        "pairs": len(plain), "plain": mean(plain), "feedback": mean(feedback),
        "difference": difference, "interval": interval,
    }  # fmt: skip


def _small_runs(scale: float, damping: float, lr: float, steps: int) -> dict[str, list[Run]]:
    # One way after the other for each seed: what else the machine does slows both.
    pairs = [
        [_small_run(scale, damping, lr, steps, seed, way == "feedback") for way in WAYS]
        for seed in range(SEEDS)
    ]
    return {way: [pair[i] for pair in pairs] for i, way in enumerate(WAYS)}


def _small_run(
    scale: float, damping: float, lr: float, steps: int, seed: int, feedback: bool
) -> Run:
    model, x, y = small_problem(scale, seed)
    opt = ImplicitNGD(model, damping=damping, lr=lr, feedback=feedback)
    losses, sizes, begin = [], [], time.perf_counter()
    for _ in range(steps):
        losses.append(float(opt.step(x, y)))
        assert opt.last_step is not None  # noqa: S101
        sizes.append(opt.last_step.feedback)
    seconds = (time.perf_counter() - begin) / steps
    return Run(losses, log10(losses[-1]), seconds, opt.counts["rejected"], _median(sizes))


def _digits_runs(damping: float, lr: float, steps: int, out: Path) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {way: [] for way in WAYS}
    for seed in range(DIGITS_SEEDS):
        for way in WAYS:
            config = TrainConfig(
                damping=damping, lr=lr, seed=seed, schedule="constant", max_steps=steps,
                log_every=1, eval_size=360, feedback=way == "feedback",
            )  # fmt: skip
            name = f"{way} damping {damping:g} lr {lr:g} seed {seed} steps {steps}"
            lines, failure = kept_run(config, out / "runs", name)
            if failure is None:
                found[way].append(_of_lines(lines))
            else:
                losses = [line["loss"] for line in lines]
                found[way].append(Run(losses, float("nan"), float("nan"), 0, None))
    return found


def _of_lines(lines: Sequence[Mapping[str, Any]]) -> Run:
    losses = [line["loss"] for line in lines]
    return Run(
        losses,
        mean(losses[-_LAST:]),
        lines[-1]["seconds"] / lines[-1]["step"],
        sum(line["rejections"] for line in lines),
        _median([line.get("feedback") for line in lines]),
        lines[-1]["accuracy"],
    )


def _median(sizes: Iterable[float | None]) -> float | None:
    known = [size for size in sizes if size is not None]
    return median(known) if known else None


def _row(
    runs: Mapping[str, Sequence[Run]], scale: float, damping: float, lr: float
) -> dict[str, Any]:
    pairs = [
        (p, f) for p, f in zip(runs["plain"], runs["feedback"], strict=True)
        if p.end == p.end and f.end == f.end
    ]  # fmt: skip
    row: dict[str, Any] = {"scale": scale, "damping": damping, "lr": lr}
    row |= _compared([p.end for p, _ in pairs], [f.end for _, f in pairs])
    row["failed"] = len(runs["plain"]) - len(pairs)
    row["size"] = _median([run.size for run in runs["feedback"]])
    for i, way in enumerate(WAYS):
        own = [pair[i] for pair in pairs]
        row[f"rejections_{way}"] = sum(run.rejections for run in own)
        row[f"seconds_{way}"] = _median([run.seconds for run in own])
    accuracies = [
        [run.accuracy for run in pair if run.accuracy is not None] for pair in pairs
    ]  # fmt: skip
    if accuracies and all(len(pair) == len(WAYS) for pair in accuracies):
        row["accuracy"] = _compared(*(list(way) for way in zip(*accuracies, strict=True)))
    return row


def _told(row: Mapping[str, Any]) -> str:
    if row["difference"] is None:
        return "fewer than two pairs"
    return f"{row['difference']:+.2g} +- {row['interval']:.2g}"


def _verdict(content: Mapping[str, Any]) -> str:
    def counted(rows: Sequence[Mapping[str, Any]], sign: int) -> str:
        known = [row for row in rows if row["difference"] is not None]
        clear = [
            row["difference"] * sign for row in known if abs(row["difference"]) > row["interval"]
        ]
        better, worse = sum(v > 0 for v in clear), sum(v < 0 for v in clear)
        return f"better beyond the 95% interval in {better} of {len(known)} cases, worse in {worse}"

    falls, small, digits = (content[name] for name in ("one_step", "small", "digits"))
    useful = [r for r in falls if r["plain"] is not None and r["plain"] > 0]
    useless = [r for r in falls if r["plain"] is not None and r["plain"] <= 0]
    told = "; ".join(f"damping {r['damping']:g}, lr {r['lr']:g}: {_told(r)}" for r in digits)
    return (
        "No source has numbers. Measured, the loss after one step with feedback: where the step "
        f"without lowers the mean loss, {counted(useful, 1)}; where that step is too long and "
        f"raises it, {counted(useless, 1)}. Loss of the small problem after {content['steps']} "
        f"steps: {counted(small, -1)}. Digits, training loss with feedback minus without: {told} "
        f"({counted(digits, -1)})."
    )


def _markdown(content: Mapping[str, Any]) -> Iterable[str]:
    yield "| scale | damping | lr | fall, plain | fall, feedback | difference | better | feedback |"
    yield "|---|---|---|---|---|---|---|---|"
    for r in content["one_step"]:
        yield (
            f"| {r['scale']:g} | {r['damping']:g} | {r['lr']:g} | {_number(r['plain'])} | "
            f"{_number(r['feedback'])} | {_told(r)} | {r['better']} of {r['pairs']} | "
            f"{_number(r['size'])} |"
        )
    for name, what in (("small", "log10 loss"), ("digits", "loss")):
        yield ""
        yield (
            f"| {name}: scale | damping | lr | {what}, plain | {what}, feedback | difference | "
            "rejected, plain / feedback | ms a step, plain / feedback | accuracy | feedback |"
        )
        yield "|---|---|---|---|---|---|---|---|---|---|"
        for r in content[name]:
            seconds = " / ".join(_number((r[f"seconds_{way}"] or 0.0) * 1e3) for way in WAYS)
            rejected = " / ".join(str(r[f"rejections_{way}"]) for way in WAYS)
            accuracy = _told(r["accuracy"]) if "accuracy" in r else "-"
            yield (
                f"| {r['scale']:g} | {r['damping']:g} | {r['lr']:g} | {_number(r['plain'])} | "
                f"{_number(r['feedback'])} | {_told(r)} | {rejected} | {seconds} | {accuracy} | "
                f"{_number(r['size'])} |"
            )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _plot(
    falls: Sequence[Mapping[str, Any]],
    small: Mapping[tuple[float, float, float], Mapping[str, Sequence[Run]]],
    digits: Mapping[tuple[float, float], Mapping[str, Sequence[Run]]],
    path: Path,
) -> None:
    figure = Figure(figsize=(14, 8.5), layout="constrained")
    axes = figure.subplots(2, 3)
    for axis, scale in zip(axes[0], SCALES, strict=False):
        _draw_falls(axis, [row for row in falls if row["scale"] == scale])
        axis.set_title(f"one step, initial parameters x {scale:g}")
    for axis, scale in zip(axes[1], SCALES, strict=False):
        own = {case[1:]: runs for case, runs in small.items() if case[0] == scale}
        _draw_runs(axis, own)
        axis.set_title(f"training, initial parameters x {scale:g}")
    axes[0][2].axis("off")
    axes[0][2].text(0.02, 0.95, _LEGEND, va="top")
    _draw_runs(axes[1][2], digits, window=5)
    axes[1][2].set_title("digits")
    figure.savefig(path, dpi=110)


def _draw_falls(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    known = [row for row in rows if row["difference"] is not None]
    rates = sorted({row["lr"] for row in known})
    for i, lr in enumerate(rates):
        own = [row for row in known if row["lr"] == lr]
        # Beside each other, or the intervals would hide one another.
        places = [row["damping"] * 1.12 ** (i - (len(rates) - 1) / 2) for row in own]
        axis.errorbar(
            places, [row["difference"] for row in own], [row["interval"] for row in own],
            marker="o", linestyle="none", capsize=3, label=f"lr {lr:g}",
        )  # fmt: skip
    axis.axhline(0.0, color="black", linewidth=0.8)
    axis.set(xscale="log", xlabel="damping", ylabel="fall with feedback minus without")
    axis.set_yscale("symlog", linthresh=0.01)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _draw_runs(
    axis: Any, cases: Mapping[tuple[float, float], Mapping[str, Sequence[Run]]], window: int = 1
) -> None:
    for number, ((damping, lr), runs) in enumerate(cases.items()):
        for way in WAYS:
            losses = [run.losses for run in runs[way] if len(run.losses)]
            shortest = min((len(each) for each in losses), default=0)
            # The mean of logarithms: a single bad seed would be all that one saw.
            means = [mean(log10(each[t]) for each in losses) for t in range(shortest)]
            smooth = [10 ** mean(means[max(0, t - window + 1) : t + 1]) for t in range(shortest)]
            axis.plot(
                range(shortest), smooth, "-" if way == "feedback" else "--", color=f"C{number}",
                label=f"damping {damping:g}, lr {lr:g}" if way == "feedback" else None,
            )  # fmt: skip
    axis.set(xlabel="step", ylabel="training loss", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
