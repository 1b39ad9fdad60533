"""`linearize`: a model on a batch, and at its fixed point, as the LQR that one training step is."""

from typing import get_args

import torch
from torch import Tensor, nn

from deqlqr._checks import at_least, choice
from deqlqr.cyclic_lqr import CyclicLQR
from deqlqr.deq import layers_of
from deqlqr.divergence import DivergenceLike
from deqlqr.finite_lqr import FiniteLQR, opened
from deqlqr.linearize_phases import linearize_phases
from deqlqr.linearize_samples import Minibatch, choose_divergence, linearize_samples
from deqlqr.loss import LossLike, make_loss
from deqlqr.lqr import LQR


def linearize(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: LossLike = "cross_entropy",
    divergence: DivergenceLike | None = None,
    damping: float = 0.0,
    minibatch: Minibatch = "exact",
    cyclic: bool = False,
) -> LQR | CyclicLQR | FiniteLQR:
    """Return the LQR problem that one training step of the model is.

    Args:
        model: Module with exactly one `DEQ` layer, or none (an `nn.Sequential`, or a module with a
            method `phases`); outputs `(batch, k)`. Samples must be independent and the model
            deterministic (no batch statistics, no active dropout).
        x: Inputs `(batch, ...)`.
        y: Targets of the loss, `(batch, ...)`.
        loss: `"cross_entropy"`, `"mse"` or a function `(outputs, targets) -> scalar` that is a
            mean over the batch.
        divergence: `"euclidean"`, `"categorical"`, `"gaussian"`, `"newton"`, a `Divergence`, or
            a function `D(y, y_ref)` of one sample's outputs. `None`: the one that matches the loss.
        damping: delta of R_bar = R + delta I.
        minibatch: `"exact"` for the one augmented problem of the batch (N2), with n = batch times
            the state size; `"per-sample"` for a batch of problems (N3).
        cyclic: Take the block apart into its layers (N4): a `CyclicLQR`, whose phase 0 reads the
            output and phase k is the k-th layer with parameters. For subclasses of `nn.Sequential`
            with `forward(z, x)`, the package's blocks, and blocks with a method `phases` (see
            `deqlqr.phases`).

    Returns:
        An `LQR`, its controls in the order of `Controls`; or a `CyclicLQR`, or for a model without
        `DEQ` layer a `FiniteLQR`, a stage for each layer, whose `join` brings them into that order.

    Raises:
        ValueError: If data, options or model do not fit together.
        ConvergenceError: If a sample has no fixed point.

    Example:
        >>> import torch
        >>> from deqlqr import DEQ, DenseBlock, steady_state
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(DEQ(DenseBlock(4)), nn.Linear(4, 3))
        >>> lqr = linearize(model, torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]), damping=0.1)
        >>> lqr.A.shape, lqr.m
        (torch.Size([20, 20]), 35)
        >>> bool((steady_state(lqr).u @ lqr.b) < 0)
        True
    """
    choice("minibatch", minibatch, get_args(Minibatch))
    damping = at_least("damping", damping, 0.0)
    horizon = not layers_of(model)
    if horizon and cyclic:
        raise ValueError("cyclic needs a model with a DEQ layer, got one without.")
    how = linearize_phases if cyclic or horizon else linearize_samples
    with torch.enable_grad():
        local = how(model, x, y, make_loss(loss), choose_divergence(loss, divergence))
    lqr = local.exact() if minibatch == "exact" else local.per_sample()
    found = opened(lqr) if horizon and isinstance(lqr, CyclicLQR) else lqr
    return found.damped(damping).dense()
