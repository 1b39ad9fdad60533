"""The adjoint of a Runge-Kutta step, by the symplectic partner of the method (RK5)."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vjp

from deqlqr.fields import Field
from deqlqr.runge_kutta import moved
from deqlqr.substitution import called_with
from deqlqr.tableau import Tableau


class StepCostate(NamedTuple):
    """What `costate_step` returns.

    Attributes:
        p: The costate before the step, `(batch, *state)`.
        parameters: Gradient of the loss in each of the field's parameters, by name.
        step: Gradient of the loss in the step size, a scalar.
    """

    p: Tensor
    parameters: dict[str, Tensor]
    step: Tensor


def costate_step(
    field: Field,
    z: Tensor,
    x: Tensor | None,
    h: float | Tensor,
    tableau: Tableau,
    p: Tensor,
) -> StepCostate:
    """Take the costate back over one step (RK1) by the symplectic partner (RK3) of the method.

    With V_i = dv/dz and D_i = dv/dparameters at the stage Y_i, backwards from the last stage,

        (RK5)  P_i = p+ + h sum_j (b_j a_ji / b_i) V_j' P_j,     p = p+ + h sum_i b_i V_i' P_i,
               parameters = h sum_i b_i D_i' P_i,                step = sum_i b_i <P_i, v_i>

    which is what backpropagation through the step gives. The last sum is the mean of the
    Hamiltonian <p, v> over the stages. All of it can be differentiated; where it need not be, call
    within `torch.no_grad()`.

    Args:
        field: v.
        z: State before the step, `(batch, *state)`.
        x: Injection, or `None`.
        h: Step size.
        tableau: The method, with positive weights.
        p: p+, gradient of the loss in the state after the step, `(batch, *state)`.

    Returns:
        p, and the gradients in the parameters and in h, summed over the batch.

    Raises:
        ValueError: If a weight of the method is not positive or p has not the shape of z.

    Source: M. Benning, E. Celledoni, M. Ehrhardt, B. Owren and C.-B. Schoenlieb (2019). Deep
    learning as optimal control problems: models and numerical methods. arXiv:1904.05657. Its
    lam_i are -V_i' P_i.
    """
    if p.shape != z.shape:
        raise ValueError(f"p must have the shape {tuple(z.shape)} of z, got {tuple(p.shape)}.")
    a, (_, b) = tableau.a, tableau.partner()
    parameters = dict(field.named_parameters())
    v = lambda values, y: called_with(field, values, y, x)
    slopes: list[Tensor] = []
    pullbacks = []
    for row in a:
        stage = vjp(v, parameters, moved(z, h, row, slopes))
        slopes.append(stage[0])
        pullbacks.append(stage[1])
    pulled: list[Tensor] = []  # V_j' P_j of the stages after i, the last one first
    at_parameters = {name: torch.zeros_like(value) for name, value in parameters.items()}
    at_step = p.new_zeros(())
    for i in reversed(range(tableau.stages)):
        later = [b[j] * a[j][i] / b[i] for j in reversed(range(i + 1, tableau.stages))]
        P = moved(p, h, later, pulled)  # (RK5)
        in_parameters, in_state = pullbacks[i](P)
        pulled.append(in_state)
        for name, value in in_parameters.items():
            at_parameters[name] = at_parameters[name] + h * float(b[i]) * value
        at_step = at_step + float(b[i]) * (P * slopes[i]).sum()
    return StepCostate(moved(p, h, b[::-1], pulled), at_parameters, at_step)
