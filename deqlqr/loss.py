"""Training losses: the cost J, averaged over the batch, and the divergence that matches it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deqlqr.divergence import CategoricalKL, Divergence, GaussianKL

LossFunction = Callable[[Tensor, Tensor], Tensor]
LossLike = str | LossFunction


@dataclass(frozen=True)
class Loss:
    """A loss with its target check and its natural divergence.

    Attributes:
        name: How it is called in messages.
        function: `(outputs, targets) -> scalar`, a mean over the batch.
        divergence: The divergence that makes steepest descent natural, or `None`.
    """

    name: str
    function: LossFunction
    divergence: Divergence | None

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the scalar loss.

        Raises:
            ValueError: If the function does not return a scalar.
        """
        value = self.function(outputs, targets)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss must return a scalar tensor, got {got}.")
        return value.reshape(())

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Check targets against the model's outputs (batch, k).

        Raises:
            ValueError: If shapes, dtypes or label values do not fit.
        """
        if outputs.dim() != 2:
            wanted = "classes" if self.name == "cross_entropy" else "k"
            raise ValueError(
                f"the model must return (batch, {wanted}), got {tuple(outputs.shape)}."
            )
        batch = outputs.shape[0]
        if not isinstance(targets, Tensor) or targets.dim() < 1 or targets.shape[0] != batch:
            got = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise ValueError(f"y must have batch size {batch} like x, got {got}.")
        if self.name == "cross_entropy":
            _check_labels(outputs, targets)
        elif self.name == "mse":
            if targets.shape != outputs.shape:
                raise ValueError(
                    f"y must have the shape of the output {tuple(outputs.shape)} for 'mse', got "
                    f"{tuple(targets.shape)}."
                )
            if not targets.is_floating_point():
                raise ValueError(f"y must be floating point for 'mse', got {targets.dtype}.")
        if targets.is_floating_point() and not bool(targets.isfinite().all()):
            raise ValueError("y holds NaN or infinite values.")


def _check_labels(outputs: Tensor, targets: Tensor) -> None:
    if targets.dim() != 1 or targets.dtype not in (torch.int64, torch.uint8):
        raise ValueError(
            "y must be class labels, int64 of shape (batch,), for 'cross_entropy', got "
            f"{targets.dtype} of shape {tuple(targets.shape)}."
        )
    if targets.numel():
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= outputs.shape[1]:
            raise ValueError(
                f"y must hold labels in [0, {outputs.shape[1] - 1}], got values in [{low}, {high}]."
            )


def make_loss(loss: LossLike) -> Loss:
    """Return a loss from a name or a function `(outputs, targets) -> scalar`.

    Raises:
        ValueError: If the name is unknown or the argument is neither.
    """
    if loss == "cross_entropy":
        return Loss("cross_entropy", F.cross_entropy, CategoricalKL())
    if loss == "mse":
        return Loss("mse", F.mse_loss, GaussianKL(variance=None))
    if callable(loss):
        return Loss("callable", loss, None)
    raise ValueError(f"loss must be 'cross_entropy', 'mse' or a function, got {loss!r}.")
