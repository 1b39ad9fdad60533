"""The data sets of the command line: 8 x 8 digits that ship with scikit-learn, MNIST, a surface."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DATASETS = ("digits", "mnist", "sine2d")


@dataclass(frozen=True)
class Data:
    """Samples to train on and to test with.

    Images `(samples, 1, height, width)` in float32 with labels `(samples,)` in int64, or points
    `(samples, inputs)` with values `(samples, outputs)`, both in float64.

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
        name: `"digits"`, `"mnist"` or `"sine2d"`.
        root: For MNIST, the folder torchvision's `MNIST(root=...)` reads; nothing is downloaded.

    Returns:
        Standardised images and labels, or points and values, split into training and test.

    Raises:
        ValueError: If the name is unknown, `root` is missing, or MNIST is not under it.
    """
    if name == "digits":
        return _digits()
    if name == "mnist":
        return _mnist(root)
    if name == "sine2d":
        return _sine2d()
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


def _sine2d() -> Data:
    """Return sin(3 x1) cos(2 x2) + 0.3 x1 x2 on a grid of 20 x 20, and at 1000 random points."""
    axis = torch.linspace(-1, 1, 20, dtype=torch.float64)
    train = torch.cartesian_prod(axis, axis)
    generator = torch.Generator().manual_seed(0)
    test = 2 * torch.rand(1000, 2, generator=generator, dtype=torch.float64) - 1
    surface = lambda x: (3 * x[:, :1]).sin() * (2 * x[:, 1:]).cos() + 0.3 * x[:, :1] * x[:, 1:]
    return Data(train, surface(train), test, surface(test), outputs=1)


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
