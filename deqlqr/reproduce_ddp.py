"""Tables 3 and 4 and figure 5 of the paper on differential dynamic programming, repeated.

The loss is that of all training samples and the accuracy that of the test samples, after as many
steps for each base with feedback and without, in pairs (`deqlqr.ddp_runs`); beside them KFAC.

Source: G.-H. Liu, T. Chen, E. A. Theodorou (2020), Differential dynamic programming neural
optimizer, arXiv:2002.08809, section 5 and appendix D.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, variance
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from deqlqr.ddp_runs import (
    BASES,
    GRID_SEED,
    SETS,
    Choice,
    Row,
    Study,
    failures,
    last,
    paired_difference,
)

matplotlib.use("Agg")

FULL_STEPS = 2000  # the paper names no number of steps
SEEDS = {"wine": 10, "iris": 10, "digits": 10, "mnist": 3}
PERTURBED_SEEDS = 5
PERTURBED = (1.0, 2.0, 4.0)  # times the best learning rate
PERTURBED_SETS = ("iris", "digits")
GRID_SETS = ("wine", "iris", "digits")  # whose failures are counted over a whole grid
RESAMPLES = 2000  # of the seeds, for the interval of a variance
# The paper's training loss and test accuracy in percent, without feedback and with.
TABLE_3 = {
    ("wine", "sgd"): ((0.5654, 94.35), (0.5657, 94.29)),
    ("wine", "rmsprop"): ((0.5515, 98.10), (0.5515, 98.10)),
    ("wine", "ekfac"): ((0.5610, 94.60), (0.5610, 94.60)),
    ("iris", "sgd"): ((0.0514, 93.00), (0.0505, 93.79)),
    ("iris", "rmsprop"): ((0.0942, 91.48), (0.0515, 94.81)),
    ("iris", "ekfac"): ((0.0514, 94.86), (0.0567, 92.72)),
    ("digits", "sgd"): ((0.0400, 95.28), (0.0364, 95.43)),
    ("digits", "rmsprop"): ((0.0562, 94.52), (0.0450, 94.71)),
    ("digits", "ekfac"): ((0.0864, 94.53), (0.0666, 95.36)),
    ("mnist", "sgd"): ((0.2321, 92.60), (0.2242, 92.84)),
    ("mnist", "rmsprop"): ((0.2742, 91.30), (0.2291, 92.42)),
    ("mnist", "ekfac"): ((0.2392, 92.79), (0.2365, 92.67)),
    # Without feedback only, and full DDP, whose stage-wise Newton step it has not.
    ("wine", "kfac"): ((0.5601, 97.78), None),
    ("iris", "kfac"): ((0.0588, 94.28), None),
    ("digits", "kfac"): ((0.4474, 84.61), None),
    ("mnist", "kfac"): ((0.2964, 92.02), None),
    ("wine", "full"): (None, (0.5649, 98.00)),
    ("iris", "full"): (None, (0.0552, 94.44)),
    ("digits", "full"): (None, (0.2197, 91.94)),
}
# Its changes of the variance of loss and accuracy, in percent.
TABLE_4 = {
    ("wine", "sgd"): (-1.312, -0.732),
    ("wine", "rmsprop"): (9.263, -1.813),
    ("wine", "ekfac"): (0.179, 0.177),
    ("iris", "sgd"): (-2.474, -4.021),
    ("iris", "rmsprop"): (1.038, -1.854),
    ("iris", "ekfac"): (-4.601, -0.713),
    ("digits", "sgd"): (-1.514, -6.743),
    ("digits", "rmsprop"): (-3.165, -6.468),
    ("digits", "ekfac"): (-9.020, -39.971),
    ("mnist", "sgd"): (0.331, -5.263),
    ("mnist", "rmsprop"): (-1.352, -32.503),
    ("mnist", "ekfac"): (-0.216, 6.344),
}
MEASURES = ("loss", "accuracy")


def reproduce_ddp_table3(data_root: Path | None, out: Path, steps: int) -> str:
    """Compare each base with feedback and without, and KFAC, on wine, iris, digits and MNIST.

    From `FULL_STEPS` on with full DDP too, but for MNIST.

    Args:
        data_root: For MNIST, which is left out without it.
        out: Folder of the runs, of `ddp-table3.md` and `ddp-table3.json`.
        steps: Of a training.

    Returns:
        The line that sums it up: what the paper reports, and what was measured.
    """
    study = Study(out / "runs", steps, data_root)
    rows = []
    for data in _sets(data_root):
        whole = steps >= FULL_STEPS and data != "mnist"
        for base in (*BASES, *(("full",) if whole else ())):
            row, _ = _pair(study, data, base)
            tried = row["lrs"], row["dampings"]
            grid = study.feedback_grid(data, base, *tried) if data in GRID_SETS else []
            rows.append(row | {"paper": TABLE_3[data, base], "grid": failures(grid)})
        rows.append(_alone(study, data, "kfac") | {"paper": TABLE_3[data, "kfac"]})
    (out / "ddp-table3.md").write_text(_table_3(rows))
    return _written({"grid_seed": GRID_SEED, "rows": rows}, _told_3(rows), out / "ddp-table3.json")


def _told_3(rows: Sequence[Row]) -> str:
    """Return what table 3 comes to."""
    pairs = [row for row in rows if "grid" in row]
    parts = []
    for data in dict.fromkeys(row["data"] for row in rows):
        own = [row for row in pairs if row["data"] == data]
        paper = max(row["paper"][1][1] for row in own)
        known = [row for row in own if row["accuracy"]]
        best = max(known, key=lambda row: row["accuracy"]["feedback"], default=None)
        if best is None:
            parts.append(f"{data}: every pair failed (paper {paper:.1f}%)")
            continue
        told = best["accuracy"]
        parts.append(
            f"{data} {told['feedback']:.1%} ({best['base']}; paper {paper:.1f}%), "
            f"{told['difference']:+.1%} +- {told['interval']:.1%} against its base"
        )
    totals = {n: sum(row["grid"][n] for row in pairs) for n in pairs[0]["grid"]}
    apart = [
        f"{r['data']} {r['base']} {r['loss']['difference']:+.2g} +- {r['loss']['interval']:.2g}"
        for r in pairs if r["loss"] and abs(r["loss"]["difference"]) > r["loss"]["interval"]
    ]  # fmt: skip
    edges = [f"{row['data']} {row['base']}" for row in rows if row["at the edge"]]
    return (
        "The paper reports results as good or better with feedback, and minor differences in "
        "training loss. Measured, test accuracy of the best base with feedback: "
        f"{'; '.join(parts)}. Training loss differs beyond its 95% interval in {len(apart)} of "
        f"{len(pairs)} pairs{': ' if apart else ''}{', '.join(apart)}. Of {totals['runs']} runs "
        f"over learning rates and dampings {totals['errors']} ended in an error, "
        f"{totals['not finite']} with a loss that is not finite, {totals['above the start']} above "
        "the loss they began with. Best options at the edge of what was compared: "
        f"{', '.join(edges) or 'none'}.{_left_out(rows)}"
    )


def reproduce_ddp_table4(data_root: Path | None, out: Path, steps: int) -> str:
    """Compare the variance over seeds of each base with feedback and without.

    At every look at all samples after the first, then the mean over the looks; the interval comes
    from seeds drawn with replacement.

    Args:
        data_root: For MNIST, which is left out without it.
        out: Folder of the runs, of `ddp-table4.md` and `ddp-table4.json`.
        steps: Of a training.

    Returns:
        The line that sums it up.
    """
    study = Study(out / "runs", steps, data_root)
    rows = []
    for data in _sets(data_root):
        for base in BASES:
            row, pair = _pair(study, data, base)
            changes = {measure: variance_change(pair, measure) for measure in MEASURES}
            rows.append(row | changes | {"paper": TABLE_4[data, base]})
    parts = []
    for measure in MEASURES:
        known = [row[measure] for row in rows if row[measure]]
        less = sum(found["high"] < 0 for found in known)
        more = sum(found["low"] > 0 for found in known)
        below = sum(found["change"] < 0 for found in known)
        parts.append(
            f"of {measure} lower in {below} of {len(known)} cases, beyond the 95% interval in "
            f"{less} (higher in {more})"
        )
    line = (
        "The paper reports changes of the variance over seeds by some percent, most of them "
        f"reductions. Measured, the variance with feedback: {'; '.join(parts)}.{_left_out(rows)}"
    )
    (out / "ddp-table4.md").write_text(_table_4(rows))
    return _written({"rows": rows}, line, out / "ddp-table4.json")


def reproduce_ddp_fig5(data_root: Path | None, out: Path, steps: int) -> str:
    """Compare each base with feedback and without at learning rates above the best.

    Args:
        data_root: Not used.
        out: Folder of the runs, of `ddp-fig5.png` and `ddp-fig5.json`.
        steps: Of a training.

    Returns:
        The line that sums it up.
    """
    study = Study(out / "runs", steps)
    seeds = None if steps >= FULL_STEPS else PERTURBED_SEEDS
    rows: list[Row] = []
    curves: dict[tuple[str, str, float], dict[str, list[Row]]] = {}
    for data in PERTURBED_SETS:
        for base in BASES:
            for times in PERTURBED:
                row, curves[data, base, times] = _pair(study, data, base, times, seeds)
                rows.append(row)
    parts = []
    for times in PERTURBED:
        own = [row["loss"] for row in rows if row["times"] == times and row["loss"]]
        lower = sum(found["difference"] < -found["interval"] for found in own)
        higher = sum(found["difference"] > found["interval"] for found in own)
        texts = [
            f"{row['data']} {row['base']} {row['loss']['plain']:.2g} to "
            f"{row['loss']['feedback']:.2g}"
            for row in rows if row["times"] == times and row["loss"]
        ]  # fmt: skip
        parts.append(
            f"{times:g} times the best learning rate {', '.join(texts)} (lower beyond the 95% "
            f"interval in {lower} of {len(own)}, higher in {higher})"
        )
    line = (
        "The paper reports that feedback stabilises training where the learning rate is perturbed. "
        f"Measured, mean training loss without and with feedback: {'; '.join(parts)}."
    )
    _plot_curves(curves, out / "ddp-fig5.png")
    return _written({"rows": rows}, line, out / "ddp-fig5.json")


def _sets(data_root: Path | None) -> list[str]:
    return [data for data in SETS if data != "mnist" or data_root is not None]


def _left_out(rows: Sequence[Row]) -> str:
    """Return what is to be said of a data set that is not among the rows."""
    if any(row["data"] == "mnist" for row in rows):
        return ""
    return " MNIST is left out, as no data root was given."


def _pair(
    study: Study, data: str, base: str, times: float = 1.0, seeds: int | None = None
) -> tuple[Row, dict[str, list[Row]]]:
    """Return a base compared with itself with feedback, and the runs.

    Args:
        study: Where the runs are.
        data: Data set.
        base: The base.
        times: Factor on its best learning rate.
        seeds: How many; `None` for all.
    """
    choice, seeds = study.best(data, base), SEEDS[data] if seeds is None else seeds
    lr = times * choice.lr
    pair = study.pairs(data, base, lr, choice.damping, seeds)
    row = _options(study, data, base, lr, choice) | {"times": times, "seeds": seeds}
    return row | _compared(pair) | {"failures": failures([*pair["plain"], *pair["feedback"]])}, pair


def _alone(study: Study, data: str, base: str) -> Row:
    """Return what a base without feedback ends with."""
    choice, seeds = study.best(data, base), SEEDS[data]
    runs = study.seeds(data, base, False, choice.lr, choice.damping, seeds)
    ended = {measure: last({"plain": runs}, measure)["plain"] for measure in MEASURES}
    means = {n: {"plain": mean(v), "seeds": len(v)} if v else None for n, v in ended.items()}
    row = _options(study, data, base, choice.lr, choice) | {"seeds": seeds}
    return row | means | {"failures": failures(runs)}


def _options(study: Study, data: str, base: str, lr: float, choice: Choice) -> Row:
    return {
        "data": data, "base": base, "steps": study.steps, "lr": lr, "damping": choice.damping,
        "lrs": choice.lrs, "dampings": choice.dampings, "at the edge": choice.at_the_edge,
    }  # fmt: skip


def _compared(pair: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Return means, paired difference and its interval of each measure; `None` below two pairs."""
    found: dict[str, Any] = {}
    for measure in MEASURES:
        ended = last(pair, measure)
        if len(ended["plain"]) < 2:
            found[measure] = None
            continue
        difference, interval = paired_difference(ended["plain"], ended["feedback"])
        found[measure] = {
            "plain": mean(ended["plain"]), "feedback": mean(ended["feedback"]),
            "difference": difference, "interval": interval, "pairs": len(ended["plain"]),
            "spread": {way: variance(values) ** 0.5 for way, values in ended.items()},
        }  # fmt: skip
    return found


def variance_change(pair: Mapping[str, Sequence[Row]], measure: str) -> dict[str, float] | None:
    """Return (Var_feedback - Var_plain) / Var_plain over seeds, and the ends of its 95 % interval.

    Only pairs that both ended count; `None` if fewer than three did, or if plain has no variance.
    """
    whole = [
        (p[measure], f[measure])
        for p, f in zip(pair["plain"], pair["feedback"], strict=True)
        if all(row["failure"] is None and None not in row["loss"] for row in (p, f))
    ]
    if len(whole) < 3:
        return None
    values = torch.tensor(whole, dtype=torch.float64)[:, :, 1:]  # (seeds, 2, looks)
    plain, feedback = values.var(0).mean(-1).tolist()
    if plain == 0:
        return None
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    again = values[drawn].var(1).mean(-1)  # (resamples, 2)
    again = again[again[:, 0] > 0]
    ratios = again[:, 1] / again[:, 0]
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"change": feedback / plain - 1, "low": low - 1, "high": high - 1, "pairs": len(whole)}


def _written(content: dict[str, Any], line: str, path: Path) -> str:
    path.write_text(json.dumps({**content, "line": line}, indent=2) + "\n")
    return line


def _table_3(rows: Sequence[Row]) -> str:
    """Return table 3 in Markdown."""
    lines = []
    for row in rows:
        loss, accuracy = row["loss"] or {}, row["accuracy"] or {}
        lines.append([
            row["data"], row["base"], f"{row['lr']:g}", f"{row['damping']:g}",
            _number(loss, "plain", ".4f"), _number(loss, "feedback", ".4f"),
            _difference(loss, "+.4f", ".4f"),
            _number(accuracy, "plain", ".1%"), _number(accuracy, "feedback", ".1%"),
            _difference(accuracy, "+.1%", ".1%"), *(_reported(p) for p in row["paper"]),
        ])  # fmt: skip
    return _markdown(
        ("data", "base", "lr", "damping", "loss: base", "with feedback", "difference",
         "accuracy: base", "with feedback", "difference", "paper: base", "with feedback"), lines,
    )  # fmt: skip


def _table_4(rows: Sequence[Row]) -> str:
    """Return table 4 in Markdown."""
    change = lambda at: f"{at['change']:+.0%} ({at['low']:+.0%} to {at['high']:+.0%})" if at else ""
    lines = [
        [row["data"], row["base"], *(change(row[name]) for name in MEASURES),
         *(f"{percent:+.1f}%" for percent in row["paper"])]
        for row in rows
    ]  # fmt: skip
    return _markdown(("data", "base", *MEASURES, "paper: loss", "accuracy"), lines)


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _number(found: Row, name: str, form: str) -> str:
    return format(found[name], form) if name in found else ""


def _difference(found: Row, form: str, half: str) -> str:
    if "difference" not in found:
        return ""
    return f"{found['difference']:{form}} +- {found['interval']:{half}}"


def _reported(pair: tuple[float, float] | None) -> str:
    return "" if pair is None else f"{pair[0]:.4f} ({pair[1]:.1f}%)"


def _plot_curves(
    curves: Mapping[tuple[str, str, float], Mapping[str, Sequence[Row]]], path: Path
) -> None:
    """Draw the training loss by step, each seed thin and their median thick."""
    kinds = list(dict.fromkeys((data, base) for data, base, _ in curves))
    figure = Figure(figsize=(11, 2.8 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), len(PERTURBED), squeeze=False, sharey="row")
    for (data, base, times), pair in curves.items():
        axis = axes[kinds.index((data, base)), PERTURBED.index(times)]
        for colour, (way, rows) in zip(("C3", "C0"), pair.items(), strict=True):
            lines = [[float("nan") if v is None else v for v in row["loss"]] for row in rows]
            for row, line in zip(rows, lines, strict=True):
                axis.plot(row["at"], line, color=colour, linewidth=0.6, alpha=0.4)
            longest = max(rows, key=lambda row: len(row["at"]))["at"]
            whole = [line for line in lines if len(line) == len(longest)]
            median = torch.tensor(whole, dtype=torch.float64).nanmedian(0).values
            axis.plot(longest, median, color=colour, linewidth=2, label=way)
        axis.set(yscale="log", title=f"{data}, {base}, {times:g} times the best")
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    for axis in axes[:, 0]:
        axis.set_ylabel("training loss")
    axes[0, 0].legend()
    figure.suptitle("learning rate perturbed from its best: seeds thin, their median thick")
    figure.savefig(path, dpi=90)
