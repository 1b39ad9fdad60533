"""Full DDP: the backward pass (DD3) to (DD5) on the augmented state of the whole batch, dense.

Source: G.-H. Liu, T. Chen, E. A. Theodorou (2020), Differential dynamic programming neural
optimizer, arXiv:2002.08809, eq. 29 to 37.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deqlqr._linalg import identity_like, sym
from deqlqr.ddp_backward import Gain, Policy
from deqlqr.divergence import OutputDivergence
from deqlqr.finite_riccati import solve_finite_lqr
from deqlqr.input_cost import InputCost
from deqlqr.linearize_samples import hessian_terms
from deqlqr.loss import Loss
from deqlqr.net_layers import NetLayers


@dataclass(frozen=True)
class Weights:
    """Regularisation.

    Attributes:
        damping: Of Q_uu.
        weight_decay: Of l_u.
        mu: Of V_XX (DD9).
    """

    damping: float
    weight_decay: float
    mu: float


@dataclass(frozen=True)
class Dense:
    """A gain K as it is, `(m, batch n)`."""

    K: Tensor

    def times(self, dX: Tensor) -> Tensor:
        """Return K dX."""
        return self.K @ dX.reshape(-1)

    def dense(self) -> Tensor:
        """Return K."""
        return self.K


@dataclass(frozen=True)
class _Stage:
    """What full DDP finds at a layer: Q_u, k, K, and V_X and V_XX before it; `None` if nothing."""

    q: Tensor
    k: Tensor
    K: Tensor
    V_X: Tensor
    V_XX: Tensor


def dense_policy(
    at: NetLayers,
    y: Tensor,
    loss: Loss,
    divergence: OutputDivergence,
    *,
    weights: Weights,
    second_order: bool,
    feedback: bool,
) -> Policy:
    """Return the policy (DD5) of the augmented state, with Q_uu + damping I, all dense.

    Without `feedback`, Q_uX = 0: the stage-wise Newton step (proposition 5).

    Args:
        at: The network on a batch.
        y: Targets.
        loss: The loss.
        divergence: Gives Lambda.
        weights: Regularisation.
        second_order: With (DD8).
        feedback: With Q_uX.
    """
    outputs = at.outputs.clone().requires_grad_()
    with torch.enable_grad():
        (V_X,) = torch.autograd.grad(loss(outputs, y), outputs)
    V_XX = torch.block_diag(*divergence.metric(at.outputs)) / len(V_X)  # (DD3)
    V_X, own, sizes = V_X.reshape(-1), at.used[1:], at.controls.sizes
    k, Q_u = torch.zeros_like(at.controls.vector), torch.zeros_like(at.controls.vector)
    gains: list[Gain | None] = []
    reason = None
    for t in reversed(range(len(own))):
        V_XX = V_XX + weights.mu * identity_like(V_XX)  # (DD9)
        stage = _stage(at, t, V_X, V_XX, weights, second_order, feedback)
        if stage is None:
            reason = f"Q_uu of layer {t + 1} of {len(own)} is not positive definite, or not finite"
            break
        for whole, mine in ((k, stage.k), (Q_u, stage.q)):
            pieces = mine.split([sizes[i] for i in own[t]])
            for i, piece in zip(own[t], pieces, strict=True):
                whole.split(sizes)[i].copy_(piece)
        gains.insert(0, Dense(stage.K) if feedback and t > 0 else None)
        V_X, V_XX = stage.V_X, stage.V_XX
    slope = float(Q_u @ k)
    states = [at.x.flatten(1), *(at.states(t) for t in range(2, len(own) + 1))]
    return Policy(at.controls, own, k, gains, states, Q_u, slope, -slope, 0, reason)


def _stage(
    at: NetLayers,
    t: int,
    V_X: Tensor,
    V_XX: Tensor,
    weights: Weights,
    second_order: bool,
    feedback: bool,
) -> _Stage | None:
    """Run (DD4), (DD5) for a layer, an LQR of one stage."""
    layer, part = at.layer(t + 1, True), at.controls.part(at.used[t + 1])
    A, B = torch.block_diag(*layer.A), layer.B.flatten(0, 1)
    batch, n = len(layer.A), A.shape[1]
    l_u = weights.weight_decay * part.vector
    shift = torch.full_like(l_u, weights.damping + weights.weight_decay)
    Q, M = A.new_zeros(n, n), A.new_zeros(part.m, n)
    R: Tensor | InputCost = InputCost(shift, torch.arange(0, device=A.device), A.new_zeros(0, 0))
    if second_order:
        Q, M, curvature = _bend(at, t, V_X.view(batch, -1))
        R = curvature + torch.diag(shift)
    seen = (A, Q, M) if feedback else (torch.zeros_like(X) for X in (A, Q, M))
    A_seen, Q_seen, M_seen = seen
    found = solve_finite_lqr(
        [A_seen], [B], [Q_seen, V_XX], [R], [M_seen], [V_X.new_zeros(n), V_X], [l_u], throw=False
    )
    if not bool(found.solved):
        return None
    q, before = l_u + B.mT @ V_X, (found.lam[0], found.P[0])
    if not feedback:
        before = A.mT @ V_X, sym(Q + A.mT @ V_XX @ A)
    return _Stage(q, -found.feedforward[0], -found.K[0], *before)


def _bend(at: NetLayers, t: int, V_X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (DD8) of a layer for V_X (batch, n+)."""
    part, states = at.controls.part(at.used[t + 1]), at.states(t + 1)
    local, n = at.local(t + 1, at.used[t + 1]), states.shape[1]

    def hamiltonian(v: Tensor, s: int) -> Tensor:
        return local(v[n:], v[:n], at.x[s]) @ V_X[s]

    points = torch.cat([states, part.vector.expand(len(states), -1)], dim=1)
    Q, M, R = hessian_terms(hamiltonian, points, n)
    return torch.block_diag(*Q), M.permute(1, 0, 2).flatten(1), R.dense().sum(0)  # (DD8)
