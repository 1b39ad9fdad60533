"""The data sets of the command line: digits, MNIST, a sine, a surface, points in the plane.

The points fall into two classes c = 0, 1, which a gap parts. With s a thin uniform spread,

    donut1d  (t, s): |t| <= 0.45 (c = 1) between the two sides 0.55 <= |t| <= 1 (c = 0)
    donut2d  the disk |p| <= 0.5 (c = 1) in the ring 0.6 <= |p| <= 1 (c = 0)
    squares  the four squares 0.05 <= |p_1|, |p_2| <= 1: c = 1 where p_1 p_2 > 0
    spiral   (r + s) (cos a, sin a), a = 3 pi r + pi c, 0.1 <= r <= 1: two arms of 1.35 turns

each uniform: donut1d in t, the arms in r^2 (about evenly along them), the others in area. The
clusters are k normal distributions in R^30, each with variance 1 about a centre whose components
are normal with variance 4.

Source of the four problems: M. Benning, E. Celledoni, M. J. Ehrhardt, B. Owren, C.-B. Schoenlieb
(2019), Deep learning as optimal control problems, arXiv:1904.05657.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

POINT_SETS = ("donut1d", "donut2d", "squares", "spiral")
CLUSTER_SETS = ("clusters5", "clusters8", "clusters12", "clusters15")
TABLES = ("wine", "iris")
DATASETS = ("digits", "mnist", "sine", "sine2d", *POINT_SETS, *TABLES, *CLUSTER_SETS)
_TRAIN, _TEST = 500, 1000  # points
_INPUTS, _EACH = 30, 40  # of the clusters: components, points of a class


@dataclass(frozen=True)
class Data:
    """Samples to train on and to test with.

    Images `(samples, 1, height, width)` or points `(samples, inputs)`, both in float32, with labels
    `(samples,)` in int64; or points with values `(samples, outputs)`, both in float64.

    Attributes:
        train_x: Inputs to train on.
        train_y: Their targets.
        test_x: Inputs to test with.
        test_y: Their targets.
        outputs: Classes, or values a point.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    outputs: int = 10

    @property
    def loss(self) -> str:
        """The loss that goes with the targets: `"mse"` or `"cross_entropy"`."""
        return "mse" if self.train_y.is_floating_point() else "cross_entropy"

    def to(self, device: torch.device) -> "Data":
        """Return the data on a device."""
        move = lambda t: t.to(device)
        return Data(
            move(self.train_x), move(self.train_y), move(self.test_x), move(self.test_y),
            self.outputs,
        )  # fmt: skip

    def first(self, samples: int | None) -> "Data":
        """Return the data with only the first training samples."""
        if samples is None:
            return self
        if not 1 <= samples <= len(self.train_x):
            raise ValueError(f"train_size must lie in [1, {len(self.train_x)}], got {samples}.")
        x, y = self.train_x[:samples], self.train_y[:samples]
        return Data(x, y, self.test_x, self.test_y, self.outputs)


def load_data(name: str, root: str | Path | None = None) -> Data:
    """Load a data set by name.

    Args:
        name: `"digits"`, `"mnist"`, `"sine"`, `"sine2d"`, `"donut1d"`, `"donut2d"`, `"squares"` or
            `"spiral"`. Of the last four the two classes take turns, 500 points to train with and
            1000 to test with. `"wine"` and `"iris"`: rows of numbers. `"clusters5"`, `"clusters8"`,
            `"clusters12"` or `"clusters15"`: so many classes, 40 points of each to train with and
            as many to test with.
        root: For MNIST, the folder torchvision's `MNIST(root=...)` reads; nothing is downloaded.

    Returns:
        Standardised images and labels, or points and labels or values, split into training and
        test.

    Raises:
        ValueError: If the name is unknown, `root` is missing, or MNIST is not under it.
    """
    if name == "digits":
        return _digits()
    if name == "mnist":
        return _mnist(root)
    if name == "sine":
        return _sine()
    if name == "sine2d":
        return _sine2d()
    if name in POINT_SETS:
        return _points(name)
    if name in TABLES:
        return _table(name)
    if name in CLUSTER_SETS:
        return _clusters(int(name.removeprefix("clusters")))
    raise ValueError(f"data must be one of {DATASETS}, got {name!r}.")


def _digits() -> Data:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.as_tensor(digits.target, dtype=torch.int64)
    train, test = train_test_split(
        range(len(labels)), test_size=0.2, random_state=0, stratify=labels.numpy()
    )
    images = images - images[train].mean()
    return Data(images[train], labels[train], images[test], labels[test])


def _sine() -> Data:
    """Return sin x at 1000 evenly spaced points of [-pi, pi], and at 1000 random ones."""
    train = torch.linspace(-math.pi, math.pi, 1000, dtype=torch.float64)[:, None]
    generator = torch.Generator().manual_seed(0)
    test = math.pi * (2 * torch.rand(1000, 1, generator=generator, dtype=torch.float64) - 1)
    return Data(train, train.sin(), test, test.sin(), outputs=1)


def _sine2d() -> Data:
    """Return sin(3 x1) cos(2 x2) + 0.3 x1 x2 on a grid of 20 x 20, and at 1000 random points."""
    axis = torch.linspace(-1, 1, 20, dtype=torch.float64)
    train = torch.cartesian_prod(axis, axis)
    generator = torch.Generator().manual_seed(0)
    test = 2 * torch.rand(1000, 2, generator=generator, dtype=torch.float64) - 1
    surface = lambda x: (3 * x[:, :1]).sin() * (2 * x[:, 1:]).cos() + 0.3 * x[:, :1] * x[:, 1:]
    return Data(train, surface(train), test, surface(test), outputs=1)


def _table(name: str) -> Data:
    """Return rows standardised by the mean and deviation of those to train with, a fifth apart."""
    from sklearn.datasets import load_iris, load_wine
    from sklearn.model_selection import train_test_split

    rows, classes = (load_wine if name == "wine" else load_iris)(return_X_y=True)
    x, y = torch.as_tensor(rows), torch.as_tensor(classes, dtype=torch.int64)
    train, test = train_test_split(range(len(y)), test_size=0.2, random_state=0, stratify=classes)
    x = ((x - x[train].mean(0)) / x[train].std(0)).float()
    return Data(x[train], y[train], x[test], y[test], outputs=3)


def _clusters(k: int) -> Data:
    generator = torch.Generator().manual_seed(k)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    centres, labels = 2 * draw(k, _INPUTS), torch.arange(k * _EACH) % k
    points = lambda: (centres[labels] + draw(len(labels), _INPUTS)).float()
    return Data(points(), labels, points(), labels.clone(), outputs=k)


def _points(name: str) -> Data:
    generator = torch.Generator().manual_seed(0)

    def draw(size: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(size) % 2
        draws = torch.rand(3, size, generator=generator, dtype=torch.float64)
        return _BY_CLASS[name](draws, labels == 1).float(), labels

    return Data(*draw(_TRAIN), *draw(_TEST), outputs=2)


# Each takes uniform numbers (3, samples) and whether c = 1, to points (samples, 2).


def _donut1d(draws: Tensor, inner: Tensor) -> Tensor:
    size = torch.where(inner, 0.45 * draws[0], 0.55 + 0.45 * draws[0])
    return torch.stack([_signed(size, draws[1]), 0.1 * draws[2] - 0.05], 1)


def _donut2d(draws: Tensor, inner: Tensor) -> Tensor:
    # |p|^2 is uniform where p is uniform in area.
    square = torch.where(inner, 0.25 * draws[0], 0.36 + 0.64 * draws[0])
    return _polar(square.sqrt(), 2 * math.pi * draws[1])


def _squares(draws: Tensor, same: Tensor) -> Tensor:
    first, second = 0.05 + 0.95 * draws[:2]
    sides = torch.stack([first, torch.where(same, second, -second)], 1)
    return _signed(sides, draws[2][:, None])


def _spiral(draws: Tensor, second: Tensor) -> Tensor:
    r, spread = (0.01 + 0.99 * draws[0]).sqrt(), 0.08 * draws[1] - 0.04
    return _polar(r + spread, 3 * math.pi * r + math.pi * second)


def _signed(value: Tensor, draw: Tensor) -> Tensor:
    return torch.where(draw < 0.5, value, -value)


def _polar(radius: Tensor, angle: Tensor) -> Tensor:
    return radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)


_BY_CLASS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "donut1d": _donut1d,
    "donut2d": _donut2d,
    "squares": _squares,
    "spiral": _spiral,
}


def _mnist(root: str | Path | None) -> Data:
    if root is None:
        raise ValueError("data 'mnist' needs a data root: the folder that holds MNIST/raw.")
    if not Path(root).is_dir():
        raise ValueError(f"data root {str(root)!r} is not a folder.")
    from torchvision.datasets import MNIST

    parts = []
    for train in (True, False):
        try:
            part = MNIST(root=str(root), train=train, download=False)
        except (RuntimeError, OSError, ValueError, KeyError, AssertionError) as error:
            raise ValueError(
                f"no readable MNIST under data root {str(root)!r}: {error!r}"
            ) from error
        # The usual mean and standard deviation of MNIST's training pixels.
        parts += [(part.data[:, None].float() / 255 - 0.1307) / 0.3081, part.targets.long()]
    return Data(*parts)
