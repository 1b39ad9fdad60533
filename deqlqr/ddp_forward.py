"""The forward pass of DDP (DD10): the network runs again, and every layer answers its new state.

Source: G.-H. Liu, T. Chen, E. A. Theodorou (2020), Differential dynamic programming neural
optimizer, arXiv:2002.08809, algorithm 1.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deqlqr._linalg import all_finite
from deqlqr.batch import statistics_held
from deqlqr.ddp_backward import Policy
from deqlqr.ddp_network import Network
from deqlqr.ddp_trajectory import Linearized
from deqlqr.loss import Loss

_HALVINGS = 8  # of the line search
_ARMIJO = 1e-4  # share of the promised decrease that a line search asks for


@torch.no_grad()
def roll_out(network: Network, policy: Policy, x: Tensor, length: float) -> tuple[Tensor, Tensor]:
    """Move the parameters by the policy, layer by layer, as the states come by.

    They are written unnoticed by graphs that hold them (`Controls.try_out`).

    Args:
        network: The network; its parameters are those of the trajectory.
        policy: The policy on that batch.
        x: The batch's inputs.
        length: Factor on k.

    Returns:
        The outputs with the new parameters `(batch, k)`, and the changes K_t (X_t* - X_t) of all
        parameters, flat.
    """
    answers = [policy.k.new_zeros(0)]
    k = policy.k.split(policy.controls.sizes)
    for p, change in zip(policy.controls.parameters, k, strict=True):
        p.data.add_(change.view_as(p), alpha=length)  # (DD10)
    state: Any = x
    with statistics_held(network.model):
        for t, layer in enumerate(network.layers()):
            gain = policy.gains[t]
            if gain is not None:
                answer = gain.times(network.shapes[t].flatten(state) - policy.states[t])
                answers.append(answer)
                part = network.parts[t]
                for p, change in zip(part.parameters, answer.split(part.sizes), strict=True):
                    p.data.add_(change.view_as(p))
            state = layer(state)
    return state, torch.cat(answers)


@dataclass(frozen=True)
class Tried:
    """A roll-out.

    Attributes:
        length: Factor on k.
        loss: Loss after it.
        feedback: Norm of what the feedback changed over that of length k.
        reason: Why it must not stay, or `None`.
    """

    length: float
    loss: float
    feedback: float
    reason: str | None


@dataclass(frozen=True)
class Rules:
    """Which roll-outs may stay.

    Attributes:
        loss: The loss.
        length: First factor on k.
        line_search: Halve it until the cost falls.
        max_increase: Largest relative rise of the loss, or `None`.
        weight_decay: What is in the cost beside the loss.
    """

    loss: Loss
    length: float
    line_search: bool
    max_increase: float | None
    weight_decay: float

    def searched(self, at: Linearized, policy: Policy, before: Tensor) -> Tried:
        """Return the first roll-out that may stay, or the last one; its parameters are there."""
        if policy.reason is not None:
            return Tried(0.0, float("nan"), 0.0, policy.reason)
        for j in range(_HALVINGS + 1 if self.line_search else 1):
            at.controls.try_out(before)
            tried = self._tried(at, policy, self.length * 0.5**j, before)
            if tried.reason is None:
                break
        return tried

    def _tried(self, at: Linearized, policy: Policy, length: float, before: Tensor) -> Tried:
        outputs, answers = roll_out(at.network, policy, at.x, length)
        with torch.no_grad():
            loss = float(self.loss(outputs, at.y))
        size = float(policy.k.norm()) * length
        feedback = float(answers.norm()) / size if size else 0.0
        reason = None
        if not (math.isfinite(loss) and all_finite([at.controls.vector])):
            reason = "the loss or the parameters are not finite"
        elif self.max_increase is not None and not loss <= (
            at.loss + self.max_increase * max(abs(at.loss), 1e-6)
        ):
            reason = f"the loss of the batch rose from {at.loss:.3e} to {loss:.3e}"
        elif self.line_search:
            least = _ARMIJO * max(0.0, -length * policy.slope)
            if not self._fall(at, loss, before) > least:
                reason = f"no length down to {length:.1e} makes the cost fall"
        return Tried(length, loss, feedback, reason)

    def _fall(self, at: Linearized, loss: float, before: Tensor) -> float:
        """Return the decrease of the cost, with sum l_u where weight decay is part of it."""
        now = at.controls.vector
        return at.loss - loss + self.weight_decay / 2 * float(before @ before - now @ now)

    def ratio(self, at: Linearized, policy: Policy, tried: Tried, before: Tensor) -> float | None:
        """Return the decrease of the cost over the promised one, `None` where that is unknown."""
        promised = policy.promised(tried.length)
        if not math.isfinite(promised):
            return None
        return self._fall(at, tried.loss, before) / promised if promised > 0 else 0.0
