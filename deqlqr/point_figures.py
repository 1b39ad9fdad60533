"""Figures of points in the plane: what a net predicts, what it makes of them, layer by layer.

The pictures are those of M. Benning, E. Celledoni, M. J. Ehrhardt, B. Owren, C.-B. Schoenlieb
(2019), Deep learning as optimal control problems, arXiv:1904.05657.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator
from torch import Tensor, nn

from deqlqr._checks import count
from deqlqr.data import Data

matplotlib.use("Agg")

_COLORS = ("tab:blue", "tab:orange")  # of the classes 0 and 1
_SHADES = LinearSegmentedColormap.from_list("classes", ["#a9cbe6", "#f7f7f7", "#ffcf9f"])
_PIXELS = 201  # of the background, along each side


class HasTrajectory(Protocol):
    """A net that gives its states after every layer."""

    def trajectory(self, z: Tensor) -> Tensor:
        """Return `(layers + 1, batch, n)` for z (batch, n)."""


def plot_points(
    panels: Sequence[tuple[str, nn.Module, Data]], path: str | Path, title: str = ""
) -> None:
    """Draw prediction (top) and transformed points (bottom) of models for points in the plane.

    Top: the training points on the probability of class 1 at each place. Bottom: the training
    points as they come to the linear readout, with its decision line and probabilities; features
    of more than two dimensions are projected onto the line's normal w = W_1 - W_0 (across) and the
    first principal component orthogonal to it (up).

    Args:
        panels: For each column its title, its model and its data. A model is an `nn.Sequential`
            that ends in `nn.Linear(features, 2)`.
        path: The PNG.
        title: Over all panels.

    Raises:
        ValueError: If there is no panel, a model is not such, its readout is the same for both
            classes, or its data are not points in the plane with two classes.
    """
    if not panels:
        raise ValueError("panels must have at least one panel, got none.")
    for name, model, data in panels:
        _require(name, model, data)
    figure = Figure(figsize=(2.9 * len(panels) + 0.5, 6.3), layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False)
    for (name, model, data), top, bottom in zip(panels, *axes, strict=True):
        _prediction(top, model, data)
        _transformed(bottom, model, data)
        top.set_title(name)
    axes[0][0].set_ylabel("prediction")
    axes[1][0].set_ylabel("transformed points")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def plot_transition(
    net: HasTrajectory, data: Data, path: str | Path, steps: int = 6, title: str = ""
) -> None:
    """Draw the training points after some of a net's layers, the first to the last.

    Args:
        net: With a method `trajectory(z)` that returns `(layers + 1, batch, 2)`.
        data: Points in the plane with two classes.
        path: The PNG.
        steps: Number of pictures, evenly spread over the layers; at least 2, and all if there are
            fewer.
        title: Over all panels.

    Raises:
        ValueError: If `steps` is below 2, the net leaves the plane, or the data do not fit.
    """
    count("steps", steps, 2)
    _require_points("data", data)
    with torch.no_grad():
        states = net.trajectory(data.train_x)
    if states.dim() != 3 or states.shape[1:] != data.train_x.shape:
        raise ValueError(
            f"net.trajectory must return (layers + 1, {len(data.train_x)}, 2), got "
            f"{tuple(states.shape)}."
        )
    layers = len(states) - 1
    shown = torch.linspace(0, layers, min(steps, layers + 1)).round().int().tolist()
    figure = Figure(figsize=(2.1 * len(shown) + 0.3, 2.75), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, layer in zip(axes, shown, strict=True):
        _scatter(axis, states[layer], data.train_y, size=5)
        _frame(axis, _square(states[layer]))
        axis.set_title("input" if layer == 0 else f"layer {layer}", fontsize=10)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def plot_accuracy_by_size(
    curves: Mapping[str, Mapping[int, Sequence[float]]], path: str | Path, title: str = ""
) -> None:
    """Draw accuracy against the number of trained scalars: mean and range of the seeds.

    Args:
        curves: By name of the curve: by number of trained scalars the accuracies, one a seed.
        path: The PNG.
        title: Over the picture.

    Raises:
        ValueError: If there is no curve, or one has no point.
    """
    if not curves or not all(curve and all(curve.values()) for curve in curves.values()):
        raise ValueError("curves must have an accuracy for each size, and at least one curve.")
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axis = figure.subplots()
    for name, curve in curves.items():
        sizes = sorted(curve)
        values = [curve[size] for size in sizes]
        (drawn,) = axis.plot(
            sizes, [sum(v) / len(v) for v in values], marker="o", markersize=4, linewidth=1.5,
            label=name,
        )  # fmt: skip
        axis.fill_between(
            sizes, [min(v) for v in values], [max(v) for v in values], color=drawn.get_color(),
            alpha=0.15, linewidth=0,
        )  # fmt: skip
    axis.set(xlabel="trained scalars", ylabel="test accuracy", xscale="log")
    ticks = _apart(sorted({size for curve in curves.values() for size in curve}))
    axis.set_xticks(ticks, [str(size) for size in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3)
    axis.legend(loc="best", fontsize=9)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def _require(name: str, model: nn.Module, data: Data) -> None:
    """Refuse a panel that cannot be drawn."""
    last = model[-1] if isinstance(model, nn.Sequential) and len(model) else None
    if not isinstance(last, nn.Linear) or last.out_features != 2 or last.in_features < 2:
        raise ValueError(
            f"model of panel {name!r} must be an nn.Sequential whose last module is "
            f"nn.Linear(features, 2) with at least 2 features, got {last or type(model).__name__}."
        )
    if not float((last.weight[1] - last.weight[0]).detach().norm()) > 0:
        raise ValueError(f"model of panel {name!r} has a readout that is the same for both classes")
    _require_points(f"data of panel {name!r}", data)


def _require_points(name: str, data: Data) -> None:
    if data.train_x.dim() != 2 or data.train_x.shape[1] != 2 or data.loss == "mse":
        raise ValueError(
            f"{name} must be points (samples, 2) with labels, got train_x of shape "
            f"{tuple(data.train_x.shape)} and train_y of {data.train_y.dtype}."
        )
    if data.outputs != 2:
        raise ValueError(f"{name} must have 2 classes, got {data.outputs}.")


@torch.no_grad()
def _prediction(axis: Axes, model: nn.Module, data: Data) -> None:
    """Draw the probability of class 1 over the plane, and the training points on it."""
    box = _square(data.train_x)
    places = _grid(box).to(data.train_x)
    probability = torch.softmax(model(places), 1)[:, 1].reshape(_PIXELS, _PIXELS)
    _shade(axis, box, probability)
    _scatter(axis, data.train_x, data.train_y)
    _frame(axis, box)


@torch.no_grad()
def _transformed(axis: Axes, model: Any, data: Data) -> None:
    """Draw the training points as the readout sees them, and what it says at each place."""
    features = model[:-1](data.train_x)
    flat, w, offset = _view(features, model[-1])
    box = _square(flat)
    probability = torch.sigmoid(_grid(box).to(flat) @ w + offset).reshape(_PIXELS, _PIXELS)
    _shade(axis, box, probability)
    _scatter(axis, flat, data.train_y)
    _frame(axis, box)


def _view(features: Tensor, readout: nn.Linear) -> tuple[Tensor, Tensor, Tensor]:
    """Return the features in the plane (batch, 2), and the logit's slope (2,) and offset there.

    The logit of class 1 is w . features + c with w = W_1 - W_0. In more than two dimensions the
    plane is spanned by w / ||w||, on which alone the logit depends, and by the direction of most
    variance orthogonal to it.
    """
    w = readout.weight[1] - readout.weight[0]
    offset = torch.zeros_like(w[0]) if readout.bias is None else readout.bias[1] - readout.bias[0]
    if len(w) == 2:
        return features, w, offset
    length = w.norm()
    across = features @ w / length
    centred = features - features.mean(0)
    rest = centred - torch.outer(centred @ w, w) / length**2
    up = rest @ torch.linalg.svd(rest, full_matrices=False).Vh[0]
    return torch.stack([across, up], 1), torch.stack([length, torch.zeros_like(length)]), offset


def _square(points: Tensor) -> tuple[float, float, float, float]:
    """Return the limits (left, right, bottom, top) of a square around points (batch, 2)."""
    low, high = points.detach().amin(0), points.detach().amax(0)
    half = 0.58 * float((high - low).max()) or 1.0
    (x, y) = ((low + high) / 2).tolist()
    return x - half, x + half, y - half, y + half


def _grid(box: tuple[float, float, float, float]) -> Tensor:
    """Return places (_PIXELS^2, 2) of a square, row by row from below."""
    left, right, bottom, top = box
    along = torch.linspace(left, right, _PIXELS, dtype=torch.float64)
    up = torch.linspace(bottom, top, _PIXELS, dtype=torch.float64)
    y, x = torch.meshgrid(up, along, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def _shade(axis: Axes, box: tuple[float, float, float, float], probability: Tensor) -> None:
    """Draw the probability of class 1 as the background, and the line where it is 1/2."""
    values = probability.double().numpy()
    axis.imshow(
        values, extent=box, origin="lower", cmap=_SHADES, vmin=0, vmax=1, interpolation="bilinear"
    )
    if values.min() < 0.5 < values.max():
        axis.contour(values, levels=[0.5], extent=box, colors="black", linewidths=1.0, alpha=0.7)


def _scatter(axis: Axes, points: Tensor, labels: Tensor, size: float = 7) -> None:
    # In the order of the samples, in which the classes take turns: neither hides the other.
    colors = [_COLORS[label] for label in labels.tolist()]
    x, y = points.detach().double().numpy().T
    axis.scatter(x, y, s=size, c=colors, edgecolors="white", linewidths=0.2)


def _frame(axis: Axes, box: tuple[float, float, float, float]) -> None:
    """Show the square with both axes to one scale, without numbers."""
    axis.set(xlim=box[:2], ylim=box[2:], aspect="equal", xticks=[], yticks=[])


def _apart(sizes: Sequence[int]) -> list[int]:
    """Return those of ascending sizes that are far enough apart to be written below a log axis."""
    kept: list[int] = []
    for size in sizes:
        if not kept or size >= 1.4 * kept[-1]:
            kept.append(size)
    return kept
