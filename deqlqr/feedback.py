"""DDP on a DEQ: block and readout answer what the encoder's part of a step has really done to z*.

    (DD11)  e = z*(theta + d_1) - z* - S d_1,    d_2 <- d_2 - K_2 e,    S = (I - A)^-1 B

d_1 is the part of the step d whose controls reach f by its inputs only, d_2 all other controls, K_2
their rows of the gain of u = -K x, and z* that of the whole batch.

Source: the roll-out of G.-H. Liu, T. Chen, E. A. Theodorou (2020), Differential dynamic programming
neural optimizer, arXiv:2002.08809, algorithm 1, on the infinite horizon of the thesis.
"""

import torch
from torch import Tensor

from deqlqr.batch import Batch, statistics_held
from deqlqr.deq import Tap, find_deq
from deqlqr.divergence import Divergence, Euclidean
from deqlqr.riccati_route import RiccatiProblem
from deqlqr.routes import Cyclic, Dare, Riccati, Route
from deqlqr.state import StateShape


def feedback_refusal(route: Route, divergence: Divergence) -> str | None:
    """Return why there is no feedback on this route with this divergence, or `None`."""
    if isinstance(route, Dare) and route.minibatch == "exact":
        if isinstance(divergence, Euclidean):
            return "needs a divergence of a loss or output: with 'euclidean' the gain K is 0"
        return None
    if isinstance(route, Dare):
        reason = "each sample's policy foresees the sample's own step, not the mean that is taken"
    elif isinstance(route, Cyclic):
        reason = "its gains are on the states between the block's layers, not on z"
    elif isinstance(route, Riccati):
        reason = "it is for networks without DEQ layer, whose feedback is that of DDP"
    else:
        reason = "it has no gain K"
    return f"needs route 'dare' with minibatch 'exact', got {route!r}: {reason}"


def injected(at: Batch, local: RiccatiProblem) -> Tensor:
    """Return which controls reach f by its inputs only, boolean (m,).

    Raises:
        ValueError: If none does, or none of the others is trained.
    """
    layer = find_deq(at.model)
    with torch.enable_grad(), layer.tapped(Tap(local.solutions[0].value)) as tap:
        at.model(_inputs(at))
        fz = StateShape.of(tap.fz).flatten(tap.fz)
    own = {id(p) for p in layer.block.parameters()}
    reached = torch.autograd.grad(fz.sum(), at.controls.parameters, allow_unused=True)
    first = [
        g is not None and id(p) not in own
        for g, p in zip(reached, at.controls.parameters, strict=True)
    ]
    if all(first) or not any(first):
        missing = "to answer, in the block or after it" if all(first) else "before the DEQ layer"
        raise ValueError(
            "feedback lets block and readout answer what the parameters before the DEQ layer have "
            f"done; model has no trainable parameter {missing}: take feedback=False."
        )
    sizes = torch.tensor(at.controls.sizes, device=fz.device)
    return torch.tensor(first, device=fz.device).repeat_interleave(sizes)


@torch.no_grad()
def answer(at: Batch, local: RiccatiProblem, K: Tensor, moved: Tensor, d: Tensor) -> Tensor:
    """Return what (DD11) adds to a step, (m,), and leave d_1 in the parameters.

    Args:
        at: The batch.
        local: The model linearised on it.
        K: Gain (m, n).
        moved: Which controls move first, (m,).
        d: The step (m,), from the parameters as they stand.

    Raises:
        ConvergenceError: If a sample has no fixed point once they have moved.
    """
    ahead = torch.where(moved, d, 0.0)
    e = deviation(at, local, ahead)
    return torch.where(moved, 0.0, -(K @ e).to(d.dtype))  # (DD11)


def deviation(at: Batch, local: RiccatiProblem, d: Tensor) -> Tensor:
    """Return e of (DD11), (n,), for a change d of the parameters; the change stays there.

    Raises:
        ConvergenceError: If a sample has no fixed point then.
    """
    layer, z = find_deq(at.model), local.solutions[0].value
    shape = StateShape.of(z)
    flat = shape.flatten(z)
    foreseen = local.foreseen(d)
    # From where z* should be now: what is nearer to it than the tolerance is no deviation.
    start = flat + foreseen.view_as(flat).to(flat.dtype)
    at.controls.try_out(at.controls.vector + d)
    with statistics_held(at.model), layer.starting_near(shape.unflatten(start)):
        at.model(_inputs(at))
    (solution,) = at.solutions()
    return (shape.flatten(solution.value) - flat).reshape(-1).to(foreseen.dtype) - foreseen


def _inputs(at: Batch) -> Tensor:
    return torch.cat([x for x, _ in at.pieces])
