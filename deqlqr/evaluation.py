"""How good a model is on a test set."""

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from deqlqr.layer_calls import calls_recorded, failures_returned


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor, batch: int = 1000) -> tuple[float, int]:
    """Judge a model on a test set, in evaluation mode.

    Args:
        model: The model, with any number of DEQ layers.
        x: Inputs `(samples, ...)`.
        y: Labels `(samples,)` or values `(samples, outputs)`.
        batch: Samples that go through together.

    Returns:
        Accuracy for labels y, mean squared error for values y, and how many samples had no fixed
        point: they count as wrong, and leave no finite error.
    """
    total, lost = 0.0, 0
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with failures_returned(model), ExitStack() as stack:
        stack.callback(_restore, modes)
        for start in range(0, len(x), batch):
            piece = slice(start, start + batch)
            with calls_recorded(model) as calls:
                outputs = model(x[piece])
            converged = torch.ones(len(outputs), dtype=torch.bool, device=outputs.device)
            for call in calls:
                if call.solution is not None:
                    converged &= call.solution.converged
            if y.is_floating_point():
                total += float((outputs - y[piece]).square().mean(-1).sum())
            else:
                total += float(((outputs.argmax(-1) == y[piece]) & converged).sum())
            lost += int((~converged).sum())
    return (float("inf") if lost and y.is_floating_point() else total / len(x)), lost


def _restore(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training
