"""The data sets of the command line: 8x8 digits that ship with scikit-learn, and MNIST."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DATASETS = ("digits", "mnist")


@dataclass(frozen=True)
class ImageData:
    """Images `(samples, 1, height, width)` in float32 and labels `(samples,)` in int64."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int = 10

    def to(self, device: torch.device) -> "ImageData":
        """Return the data on a device."""
        move = lambda t: t.to(device)
        return ImageData(
            move(self.train_x), move(self.train_y), move(self.test_x), move(self.test_y),
            self.classes,
        )  # fmt: skip

    def first(self, samples: int | None) -> "ImageData":
        """Return the data with only the first training samples."""
        if samples is None:
            return self
        if not 1 <= samples <= len(self.train_x):
            raise ValueError(f"train_size must lie in [1, {len(self.train_x)}], got {samples}.")
        x, y = self.train_x[:samples], self.train_y[:samples]
        return ImageData(x, y, self.test_x, self.test_y, self.classes)


def load_data(name: str, root: str | Path | None = None) -> ImageData:
    """Load a data set by name.

    Args:
        name: `"digits"` or `"mnist"`.
        root: For MNIST, the folder torchvision's `MNIST(root=...)` reads; nothing is downloaded.

    Returns:
        Standardised images and labels, split into training and test.

    Raises:
        ValueError: If the name is unknown, `root` is missing, or MNIST is not under it.
    """
    if name == "digits":
        return _digits()
    if name == "mnist":
        return _mnist(root)
    raise ValueError(f"data must be one of {DATASETS}, got {name!r}.")


def _digits() -> ImageData:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.as_tensor(digits.target, dtype=torch.int64)
    train, test = train_test_split(
        range(len(labels)), test_size=0.2, random_state=0, stratify=labels.numpy()
    )
    images = images - images[train].mean()
    return ImageData(images[train], labels[train], images[test], labels[test])


def _mnist(root: str | Path | None) -> ImageData:
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
    return ImageData(*parts)
