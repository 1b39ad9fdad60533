"""Figure 3 of the paper on differential dynamic programming: the spectrum of a feedback policy.

Source: G.-H. Liu, T. Chen, E. A. Theodorou (2020), Differential dynamic programming neural
optimizer, arXiv:2002.08809, section 5.1.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from deqlqr.data import CLUSTER_SETS, load_data
from deqlqr.ddp import DDP
from deqlqr.ddp_runs import dense_network

matplotlib.use("Agg")

WIDTH, DEPTH = 20, 3
BATCH = 16
LR, DAMPING = 0.5, 0.1
SHOWN = 4  # samples of each cluster that the policy is looked at on
THRESHOLD = 1e-3  # of the largest singular value, for what counts as nontrivial
OTHERS = (1e-1, 1e-2, 1e-4)  # at which it is counted too
FLOOR = 1e-2  # of the largest: where the widest gap is looked for
_DRAWN = 60  # singular values


def reproduce_ddp_fig3(data_root: Path | None, out: Path, steps: int) -> str:
    """Train on k clusters by full DDP and look at the last layer's K at four points of training.

    Args:
        data_root: Not used.
        out: Folder of `ddp-fig3.png`, `ddp-fig3.json`, and what was found for each k.
        steps: Of a training.

    Returns:
        The line that sums it up: what the paper reports, and what was measured.
    """
    out.mkdir(parents=True, exist_ok=True)
    panels = {}
    for name in CLUSTER_SETS:
        path = out / f"{name}-steps{steps}.json"
        if not path.exists():
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(spectra(name, steps)) + "\n")
            temporary.replace(path)
        panels[name] = json.loads(path.read_text())
    _plot(panels, out / "ddp-fig3.png")
    rows, parts = [], []
    for name, snapshots in panels.items():
        k, end = int(name.removeprefix("clusters")), snapshots[-1]
        counts = {f"{t:g}": nontrivial(end["spectrum"], t) for t in (*OTHERS, THRESHOLD)}
        gap = widest_gap(end["spectrum"])
        rows.append({
            "k": k,
            "counts": counts,
            "before the widest gap": gap,
            "snapshots": snapshots,
        })
        others = " / ".join(str(counts[f"{t:g}"]) for t in OTHERS)
        parts.append(
            f"k = {k}: {counts[f'{THRESHOLD:g}']} ({others}; widest gap after "
            f"{gap}; training error {end['error']:.1%})"
        )
    right = sum(row["counts"][f"{THRESHOLD:g}"] == row["k"] for row in rows)
    gaps = sum(row["before the widest gap"] == row["k"] for row in rows)
    line = (
        "The paper reports as many nontrivial eigenvalues of the last layer's feedback as there "
        f"are clusters. Measured after {steps} steps, singular values above {THRESHOLD:g} of the "
        f"largest (above {' / '.join(f'{t:g}' for t in OTHERS)}): {'; '.join(parts)}. They are k "
        f"in {right} of {len(rows)} cases, those before the widest gap in {gaps}."
    )
    content = {"threshold": THRESHOLD, "rows": rows, "line": line}
    (out / "ddp-fig3.json").write_text(json.dumps(content, indent=2) + "\n")
    return line


def spectra(name: str, steps: int) -> list[dict[str, Any]]:
    """Train from scratch, and return step, loss, error and singular values at four steps."""
    data = load_data(name)
    model = dense_network(data.train_x.shape[1], WIDTH, DEPTH, data.outputs, seed=0)
    optimizer = DDP(model, base="full", lr=LR, damping=DAMPING)
    generator, found = torch.Generator().manual_seed(0), []
    looks = {0, steps // 8, steps // 2, steps}
    own = slice(SHOWN * data.outputs)  # the classes take turns
    for step in tqdm(range(steps + 1), desc=name, disable=None):
        if step in looks:
            values = optimizer.policy(data.train_x[own], data.train_y[own]).spectrum(-1)
            loss, error = _measured(model, data.train_x, data.train_y)
            found.append({"step": step, "loss": loss, "error": error, "spectrum": values.tolist()})
        chosen = torch.randint(len(data.train_x), (BATCH,), generator=generator)
        optimizer.step(data.train_x[chosen], data.train_y[chosen])
    return found


@torch.no_grad()
def _measured(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    outputs = model(x)
    wrong = (outputs.argmax(1) != y).double().mean()
    return float(nn.functional.cross_entropy(outputs, y)), float(wrong)


def nontrivial(spectrum: Sequence[float], threshold: float) -> int:
    """Return how many singular values, in descending order, are above so much of the largest.

    Example:
        >>> nontrivial([2.0, 1.0, 0.01], 0.1)
        2
    """
    return sum(value > threshold * spectrum[0] for value in spectrum)


def widest_gap(spectrum: Sequence[float]) -> int:
    """Return how many singular values come before the largest ratio of neighbours.

    Only those above `FLOOR` of the largest are looked at: further down few are left to compare.

    Example:
        >>> widest_gap([2.0, 1.0, 0.1, 0.05])
        2
    """
    above = [value for value in spectrum if value > FLOOR * spectrum[0]]
    ratios = [a / b for a, b in zip(above, above[1:], strict=False)]
    return 1 + ratios.index(max(ratios)) if ratios else len(above)


def _plot(panels: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the largest singular values at each snapshot, and k."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axis, (name, snapshots) in zip(
        figure.subplots(2, -(-len(panels) // 2), squeeze=False).flat, panels.items(), strict=False
    ):
        k = int(name.removeprefix("clusters"))
        for number, shot in enumerate(snapshots):
            values = shot["spectrum"][:_DRAWN]
            axis.plot(range(1, len(values) + 1), values, ".-", color=f"C{number}",
                      label=f"step {shot['step']}, loss {shot['loss']:.2g}")  # fmt: skip
        axis.axvline(k, color="0.3", linestyle="--", linewidth=1)
        axis.set(yscale="log", title=f"k = {k}", xlabel="number", ylabel="singular value of K")
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.suptitle("last layer's feedback on k clusters; dashed: k")
    figure.savefig(path, dpi=120)
