"""How good a model is on a test set."""

import torch
from torch import Tensor, nn

from deqlqr.layer_calls import failures_returned, layers_of


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor, batch: int = 1000) -> tuple[float, int]:
    """Judge a model on a test set.

    Args:
        model: The model, with any number of DEQ layers.
        x: Inputs `(samples, ...)`.
        y: Labels `(samples,)` or values `(samples, outputs)`.
        batch: Samples that go through together.

    Returns:
        Accuracy for labels y, mean squared error for values y, and how many samples had no fixed
        point: they count as wrong, and leave no finite error.
    """
    layers, total, lost = layers_of(model), 0.0, 0
    with failures_returned(model):
        for start in range(0, len(x), batch):
            piece = slice(start, start + batch)
            outputs = model(x[piece])
            converged = torch.ones(len(outputs), dtype=torch.bool, device=outputs.device)
            for layer in layers:
                assert layer.solution is not None  # noqa: S101
                converged &= layer.solution.converged
            if y.is_floating_point():
                total += float((outputs - y[piece]).square().mean(-1).sum())
            else:
                total += float(((outputs.argmax(-1) == y[piece]) & converged).sum())
            lost += int((~converged).sum())
    return (float("inf") if lost and y.is_floating_point() else total / len(x)), lost
