"""A model at its fixed point, linearised sample by sample: A, B, Q, R, M and a, b.

The model may have an encoder before and a readout after its DEQ layer; every trainable parameter
is a control. With the layer's output replaced by a free z, one evaluation of the
model gives both maps that are linearised, sample by sample:

    f(z, u) = block(z, injection(x; u); u),     y = h(z, u) = readout

    (N1)  A = f_z,  B = f_u,  a = h_z' dJ/dy,  b = h_u' dJ/dy
    (N2)  exact minibatch: one u for all samples, states stacked
              A = blockdiag(A_s),  B = stack(B_s),  Q = blockdiag(Q_s),  M = [M_1 ... M_N],
              R = sum R_s,  every cost carrying the 1/batch of the mean loss
    (N3)  per sample: one LQR for each sample, with the sample's own cost
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import grad, jacrev

from deqlqr._linalg import sym
from deqlqr.controls import Controls
from deqlqr.deq import DEQ, Tap, find_deq
from deqlqr.divergence import (
    Divergence,
    DivergenceLike,
    Euclidean,
    Newton,
    OutputDivergence,
    make_divergence,
)
from deqlqr.input_cost import InputCost
from deqlqr.loss import Loss, LossLike, make_loss
from deqlqr.lqr import LQR
from deqlqr.solver import FixedPointSolution
from deqlqr.state import StateShape
from deqlqr.substitution import called_with

Minibatch = Literal["exact", "per-sample"]
# (u, z_s, x_s) -> (f, y) of one sample: z_s is (n,), f (n,), y (k,)
LocalMap = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Linearization:
    """A model linearised at its fixed point, sample by sample; costs are those of single samples.

    Attributes:
        A: `(batch, n, n)`.
        B: `(batch, n, m)`.
        a: Gradient of the sample's loss with respect to z, `(batch, n)`.
        b: Its direct gradient with respect to u, `(batch, m)`.
        Q: State cost `(batch, n, n)`.
        M: Cross cost `(batch, m, n)`.
        R: Input cost `(batch, m, m)`.
        loss: The mean loss J.
        solution: Fixed point and certificate of every sample.
    """

    A: Tensor
    B: Tensor
    a: Tensor
    b: Tensor
    Q: Tensor
    M: Tensor
    R: InputCost
    loss: Tensor
    solution: FixedPointSolution

    def exact(self) -> LQR:
        """Return the augmented-state problem of the whole batch (N2)."""
        return LQR(**stacked(self.A, self.B, self.Q, self.R, self.M, self.a, self.b))

    def per_sample(self, samples: slice = slice(None)) -> LQR:
        """Return a batch of problems, one for each sample of the slice (N3)."""
        return LQR(
            A=self.A[samples],
            B=self.B[samples],
            Q=self.Q[samples],
            R=self.R[samples],
            M=self.M[samples],
            a=self.a[samples],
            b=self.b[samples],
        )


def stacked(
    A: Tensor, B: Tensor, Q: Tensor, R: InputCost, M: Tensor, a: Tensor, b: Tensor
) -> dict[str, Any]:
    """Return the matrices of (N2) from those of the samples (batch, ...)."""
    batch = len(A)
    return {
        "A": torch.block_diag(*A),
        "B": B.flatten(0, 1),
        "Q": torch.block_diag(*Q) / batch,
        "R": R.mean(),
        "M": M.permute(1, 0, 2).flatten(1) / batch,
        "a": a.flatten() / batch,
        "b": b.mean(0),
    }


def choose_divergence(loss: LossLike, divergence: DivergenceLike | None) -> Divergence:
    """Return the divergence asked for, or the one that matches the loss.

    Raises:
        ValueError: If none is given and the loss is the user's own.
    """
    if divergence is not None:
        return make_divergence(divergence)
    natural = make_loss(loss).divergence
    if natural is None:
        raise ValueError("divergence must be given when loss is a function.")
    return natural


def linearize_samples(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Loss,
    divergence: Divergence,
    *,
    max_states: int | None = None,
) -> Linearization:
    """Linearise a model at its fixed point, sample by sample (N1).

    Returns:
        A `Linearization`, from which both kinds of minibatch problem are formed.

    Raises:
        ValueError: If data and model do not fit together, the samples are not independent, or a
            sample has more than `max_states` states.
        ConvergenceError: If a sample has no fixed point.
    """
    layer, controls, outputs, solution = solved(model, x)
    loss.check(outputs, y)
    state, u = StateShape.of(solution.value), controls.vector
    z, local = state.flatten(solution.value), _local_map(model, layer, controls, state)
    if max_states is not None and z.shape[1] > max_states:
        raise ValueError(
            f"x: {z.shape[0]} samples of {z.shape[1]} states are too many for the dense LQR "
            "(Dare(max_states=...)). Take a smaller batch, or route 'output', 'sampled', 'krylov' "
            "or 'kronecker'."
        )
    first = _first_order(local, u, z, x)
    require_independent(model, x, solution, first.fz, first.y)
    outputs = first.y.detach().requires_grad_()
    cost = loss(outputs, y)
    (dJ,) = torch.autograd.grad(cost, outputs)
    dJ = dJ * x.shape[0]  # the sample's own gradient, without the 1/batch of the mean
    a = torch.einsum("bk,bkn->bn", dJ, first.hz)  # (N1)
    b = torch.einsum("bk,bkm->bm", dJ, first.hu)
    Q, M, R = _quadratic_terms(local, first, u, z, x, y, a, loss, divergence)
    return Linearization(first.A, first.B, a, b, Q, M, R, cost.detach(), solution)


def solved(model: nn.Module, x: Tensor) -> tuple[DEQ, Controls, Tensor, FixedPointSolution]:
    """Solve a model's forward pass.

    Returns:
        Its layer, its controls, its outputs `(batch, k)`, and the fixed points.

    Raises:
        ValueError: If x does not fit, or the model has no DEQ layer, several, or does not call it.
        ConvergenceError: If a sample has no fixed point.
    """
    layer, controls = find_deq(model), Controls(model)
    check_input(x, controls)
    with torch.no_grad():
        outputs = model(x)
    if layer.solution is None:
        raise ValueError("model did not call its DEQ layer.")
    return layer, controls, outputs, layer.solution.raise_if_failed("fixed point of the block")


def sample_by_sample(function: Callable[..., Any], *batched: Tensor) -> Any:
    """Evaluate sample by sample, by `torch.vmap`.

    Returns:
        What the function returns, stacked.

    Raises:
        ValueError: If torch.vmap refuses the model.
    """
    try:
        return torch.vmap(function)(*batched)
    except RuntimeError as error:
        raise ValueError(
            "model cannot be linearised sample by sample (torch.vmap refused it): switch active "
            f"dropout and batch statistics off with model.eval(). torch said: {error}"
        ) from error


def check_input(x: Tensor, controls: Controls) -> None:
    """Check inputs against the model's parameters.

    Raises:
        ValueError: If x is no tensor, is empty, not finite, or on another device or dtype.
    """
    if not isinstance(x, Tensor) or x.dim() < 1 or x.shape[0] == 0:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a non-empty tensor (batch, ...), got {got}.")
    parameter = controls.parameters[0]
    if x.device != parameter.device:
        raise ValueError(f"x must be on {parameter.device} like the model, got {x.device}.")
    if x.is_floating_point():
        if x.dtype != parameter.dtype:
            raise ValueError(f"x must be {parameter.dtype} like the model, got {x.dtype}.")
        if not bool(x.isfinite().all()):
            raise ValueError("x holds NaN or infinite values.")


@dataclass(frozen=True)
class _FirstOrder:
    A: Tensor
    B: Tensor
    hz: Tensor  # (batch, k, n)
    hu: Tensor  # (batch, k, m)
    fz: Tensor  # (batch, n)
    y: Tensor  # (batch, k)


def _local_map(model: nn.Module, layer: DEQ, controls: Controls, state: StateShape) -> LocalMap:
    """Return (u, z, x_s) -> (f, y) for one sample: z is (n,), f (n,), y (k,)."""

    def local(u: Tensor, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        with layer.tapped(Tap(state.unflatten(z[None]))) as tap:
            y = called_with(model, controls.unflatten(u), x[None])
        if tap.fz is None:
            raise ValueError("model did not call its DEQ layer.")
        return state.flatten(tap.fz)[0], y.reshape(-1)

    return local


def _first_order(local: LocalMap, u: Tensor, z: Tensor, x: Tensor) -> _FirstOrder:
    def with_values(u: Tensor, z: Tensor, x: Tensor) -> tuple[Any, Any]:
        values = local(u, z, x)
        return values, values

    jacobians = jacrev(with_values, argnums=(0, 1), has_aux=True)
    ((B, A), (hu, hz)), (fz, y) = sample_by_sample(lambda z, x: jacobians(u, z, x), z, x)
    return _FirstOrder(A, B, hz, hu, fz, y)


def require_independent(
    model: nn.Module, x: Tensor, solution: FixedPointSolution, fz: Tensor, y: Tensor
) -> None:
    """Refuse a model whose batch and single samples disagree.

    Args:
        model: The model.
        x: Inputs.
        solution: Fixed points.
        fz: f(z, x) from single samples, `(batch, n)`.
        y: Outputs from single samples, `(batch, k)`.

    Raises:
        ValueError: If the batch gives other f(z, x) or outputs than the samples one by one.
    """
    with torch.no_grad(), find_deq(model).tapped(Tap(solution.value)) as tap:
        together = model(x)
    require_same_samples(fz, StateShape.of(solution.value).flatten(tap.fz))
    require_same_samples(y, together)


def require_same_samples(alone: Tensor, together: Tensor) -> None:
    """Refuse a model whose batch and single samples disagree: (N1) would be another model's.

    Raises:
        ValueError: If they do.
    """
    gap = float((alone - together).abs().max())
    tolerance = 1e3 * torch.finfo(together.dtype).eps
    if not gap <= tolerance * max(1.0, float(together.abs().max())):
        raise ValueError(
            f"model mixes the samples of a batch or is random (outputs differ by {gap:.1e} "
            "when samples go through alone): switch batch statistics and dropout off with "
            "model.eval()."
        )


def _quadratic_terms(
    local: LocalMap,
    first: _FirstOrder,
    u: Tensor,
    z: Tensor,
    x: Tensor,
    y: Tensor,
    a: Tensor,
    loss: Loss,
    divergence: Divergence,
) -> tuple[Tensor, Tensor, InputCost]:
    """Return Q (batch, n, n), M (batch, m, n) and R (batch, m, m)."""
    batch, n, m = first.B.shape
    if isinstance(divergence, Euclidean):
        ones, none = u.new_ones(batch, m), torch.arange(0, device=u.device)
        R = InputCost(ones, none, u.new_zeros(batch, 0, 0))
        return z.new_zeros(batch, n, n), z.new_zeros(batch, m, n), R
    if isinstance(divergence, OutputDivergence):
        return pulled_back(divergence.metric(first.y), first.hz, first.hu)
    if isinstance(divergence, Newton):
        return _newton_terms(local, first, u, z, x, y, a, loss)
    raise ValueError(f"divergence {type(divergence).__name__} has no quadratic terms.")


def pulled_back(Lambda: Tensor, hz: Tensor, hu: Tensor) -> tuple[Tensor, Tensor, InputCost]:
    """Return Q, M and R of (H3): the metric Lambda (batch, k, k) of the output, in z and u."""
    # The output depends directly on few controls, the readout's: only their rows are not 0.
    direct = (hu != 0).flatten(0, 1).any(0).nonzero()[:, 0]
    Lz, hd = Lambda @ hz, hu[..., direct]
    M = hz.new_zeros(len(hz), hu.shape[-1], hz.shape[-1])
    Q, M[:, direct] = sym(hz.mT @ Lz), hd.mT @ Lz  # (H3)
    R = InputCost(hz.new_zeros(len(hz), hu.shape[-1]), direct, sym(hd.mT @ (Lambda @ hd)))
    return Q, M, R


def _newton_terms(
    local: LocalMap,
    first: _FirstOrder,
    u: Tensor,
    z: Tensor,
    x: Tensor,
    y: Tensor,
    a: Tensor,
    loss: Loss,
) -> tuple[Tensor, Tensor, InputCost]:
    """Return Q, M and R of (H2) for D = J, one sample after the other."""
    require_mean(loss, first.y, y)
    n = z.shape[1]
    eye = torch.eye(n, dtype=z.dtype, device=z.device)
    p = torch.linalg.solve(eye - first.A.mT, a)  # (H1)

    def hamiltonian(v: Tensor, s: int) -> Tensor:
        fz, out = local(v[n:], v[:n], x[s])
        return loss(out[None], y[s : s + 1]) + fz @ p[s]  # (H1)

    points = torch.cat([z, u.expand(len(z), -1)], dim=1)
    return hessian_terms(hamiltonian, points, n)


def require_mean(loss: Loss, outputs: Tensor, y: Tensor) -> None:
    """Refuse a loss that is not a mean over the batch.

    Raises:
        ValueError: If it is not.
    """
    single = torch.stack([loss(outputs[s : s + 1], y[s : s + 1]) for s in range(len(y))])
    if not torch.allclose(single.mean(), loss(outputs, y), rtol=1e-4):
        raise ValueError("loss must be a mean over the batch for the Newton divergence.")


def hessian_terms(
    hamiltonian: Callable[[Tensor, int], Tensor], points: Tensor, n: int
) -> tuple[Tensor, Tensor, InputCost]:
    """Return Q, M and R of (H2), one sample after the other.

    Args:
        hamiltonian: `(v, s)` -> H of sample s at v = (z, u).
        points: (z, u) of every sample, `(batch, n + m)`.
        n: Number of states.
    """
    full = sym(torch.stack([jacrev(grad(hamiltonian))(v, s) for s, v in enumerate(points)]))
    return full[:, :n, :n], full[:, n:, :n], InputCost.of(full[:, n:, n:])
