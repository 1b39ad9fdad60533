"""From a batch to the policy of DDP on top of another optimiser: forward, backward, base's step.

Source: G.-H. Liu, T. Chen, E. A. Theodorou (2020), Differential dynamic programming neural
optimizer, arXiv:2002.08809, algorithm 1.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deqlqr._linalg import all_finite
from deqlqr.controls import Controls
from deqlqr.ddp_backward import Policy, sweep
from deqlqr.ddp_base import Running
from deqlqr.ddp_inverse import Inverse
from deqlqr.ddp_network import Known
from deqlqr.ddp_rows import LayerRows
from deqlqr.ddp_trajectory import Linearized, Trajectory
from deqlqr.loss import Loss
from deqlqr.solution import ConvergenceError


def linearized(known: Known, controls: Controls, loss: Loss, x: Tensor, y: Tensor) -> Linearized:
    """Return a model on a batch.

    Args:
        known: What is known of the model.
        controls: The parameters that are trained now.
        loss: The loss.
        x: Inputs.
        y: Targets.

    Raises:
        ValueError: If the data do not fit.
        ConvergenceError: If the loss is not finite.
    """
    network, net = known.at(x, controls)
    trajectory = Trajectory(network, x) if net is None or not known.full else None
    if trajectory is None:
        assert net is not None  # noqa: S101  full DDP looks at the layers of every batch
        outputs, used = net.outputs, net.controls
    else:
        outputs, used = trajectory.outputs, network.controls
    loss.check(outputs, y)
    leaf = outputs.clone().requires_grad_()
    with torch.enable_grad():
        cost = loss(leaf, y)
    value = float(cost.detach())
    if not math.isfinite(value):
        raise ConvergenceError(f"the loss is {value}.")
    (V_X,) = torch.autograd.grad(cost, leaf)
    return Linearized(network, net, trajectory, used, x, y, value, V_X)


def based_policy(
    at: Linearized,
    running: Running,
    cotangents: Callable[[Tensor], Sequence[Tensor]],
    before: Tensor,
    factor: float,
    *,
    mu: float,
    weight_decay: float,
    whole: bool,
    measured: bool,
) -> Policy:
    """Return the policy whose D and k are another optimiser's.

    Args:
        at: The model on a batch.
        running: The optimiser at work.
        cotangents: Gives the columns of C_T for outputs.
        before: The current parameters, `(m,)`.
        factor: On the damping.
        mu: Of (DD9).
        weight_decay: Of l_u where that is a part of the cost.
        whole: Couple all samples.
        measured: Ask the base for k'Q_uu k.
    """
    network, trajectory = at.network, at.trajectory
    assert trajectory is not None  # noqa: S101
    rows, C = at.rows(cotangents)
    l_u = weight_decay * before if weight_decay and running.l2 else None

    def inverse(t: int, rows: LayerRows, q: Tensor) -> Inverse:
        return running.inverse(rows, q, network.parts[t], network.places[t], factor)

    by_layers = None if l_u is None else [l_u[i] for i in network.places]
    swept = sweep(rows, C, by_layers, inverse, mu=mu, whole=whole, scalar=running.scalar)
    q = network.joined(swept.Q_u)
    k, bend = torch.zeros_like(q), float("nan")
    reason = None if all_finite([q]) else "Q_u is not finite"
    if reason is None:
        k, bend = running.propose(at.controls, before, q, factor, measured)
    Q_u = q if l_u is None else q + l_u
    return Policy(
        at.controls, network.own, k, swept.gains, trajectory.states, Q_u, float(Q_u @ k), bend,
        swept.regularised, reason,
    )  # fmt: skip
