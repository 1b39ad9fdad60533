"""Gradient and natural gradient by automatic differentiation, with nothing of the LQR in it.

    (AU1)  gradient descent          u = -g
    (AU2)  natural gradient descent  u = -(J' Lambda J / b + delta I)^-1 g

g is the gradient of the mean cross-entropy of b samples, J = dy/du of all their outputs y, and
Lambda their metrics diag(p) - p p', p = softmax(y), on its diagonal. By Woodbury's identity, from a
system of b x classes unknowns:

    (AU3)  u = -(g - J' (delta b I + Lambda J J')^-1 Lambda J g) / delta

Source: S. Amari (1998), doi:10.1162/089976698300017746.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from deqlqr._checks import at_least


def gradient_update(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return u of (AU1), `(m,)`, in the order of `model.parameters()`.

    Args:
        model: With outputs `(batch, classes)`; all its parameters train.
        x: Inputs `(batch, ...)`.
        y: Labels `(batch,)`.
    """
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    return -torch.cat([g.reshape(-1) for g in gradients])


def natural_update(model: nn.Module, x: Tensor, y: Tensor, damping: float) -> Tensor:
    """Return u of (AU2), `(m,)`, in the order of `model.parameters()`.

    Derivatives have the model's type, the linear algebra is in float64.

    Args:
        model: With outputs `(batch, classes)`; all its parameters train.
        x: Inputs `(batch, ...)`.
        y: Labels `(batch,)`.
        damping: delta, above 0.

    Raises:
        ValueError: If the damping is out of range.
    """
    at_least("damping", damping, 0.0, strict=True)
    named = {name: p.detach() for name, p in model.named_parameters()}
    parts = jacrev(lambda own: functional_call(model, own, (x,)))(named)
    J = torch.cat([part.flatten(2) for part in parts.values()], dim=-1).flatten(0, 1).double()
    g = -gradient_update(model, x, y).double()
    with torch.no_grad():
        p = model(x).double().softmax(-1)
        Lambda = torch.block_diag(*(torch.diag(q) - torch.outer(q, q) for q in p))
        system = Lambda @ (J @ J.T)
        system.diagonal().add_(damping * len(x))
        return -(g - J.T @ torch.linalg.solve(system, Lambda @ (J @ g))) / damping  # (AU3)


def misalignment(u: Tensor, v: Tensor) -> float:
    """Return 1 - cos of the angle between two vectors (m,), without cancellation.

    |u/|u| - v/|v||^2 / 2 is accurate to some roundings of the unit vectors, however small it is.

    Raises:
        ValueError: If one of them is zero or not finite: it has no direction.
    """
    lengths = [float(w.double().norm()) for w in (u, v)]
    if not all(0.0 < length < float("inf") for length in lengths):
        raise ValueError(f"u and v must be finite and not zero, got the lengths {lengths}.")
    u, v = (w.double() / length for w, length in zip((u, v), lengths, strict=True))
    return float((u - v).square().sum()) / 2
