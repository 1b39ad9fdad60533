"""The damped step in output space: exact, without A, B, P or any m x m matrix.

With J_s = dy_s/du the Jacobian of a sample's outputs at its equilibrium, and Lambda_s = C_s C_s'
the divergence's metric,

    (W1)  J_s = lam_s B_s + h_u,   lam_s = h_z (I - A_s)^-1     one adjoint solve per output
    (W2)  W = stack_s C_s' J_s / sqrt(batch),   W'W = S'QS + ... of the static problem (F3)
    (W3)  (W'W + delta I) u = -g   by   u = -(g - W' (delta I + W W')^-1 W g) / delta

(W3) is the matrix inversion lemma: a system of batch x outputs unknowns in place of m.

Source: Y. Ren, D. Goldfarb (2019), Efficient subsampled Gauss-Newton and natural gradient methods
for training neural networks, arXiv:1906.02353, for (W3).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deqlqr._linalg import identity_like
from deqlqr.adjoint import Implicit
from deqlqr.divergence import OutputDivergence
from deqlqr.equilibrium import pullback
from deqlqr.linearize import per_sample, prepare
from deqlqr.loss import Loss
from deqlqr.solver import FixedPointSolution


@dataclass(frozen=True)
class OutputLinearization:
    """A model's outputs linearised in its controls, through the fixed point.

    Attributes:
        J: Jacobian of each sample's outputs, `(batch, k, m)`.
        metric: Lambda `(batch, k, k)`.
        cotangent: Gradient of each sample's loss with respect to its outputs, `(batch, k)`.
        loss: The mean loss.
        solution: Fixed point and certificate of every sample.
    """

    J: Tensor
    metric: Tensor
    cotangent: Tensor
    loss: Tensor
    solution: FixedPointSolution

    @property
    def gradient(self) -> Tensor:
        """Gradient of the mean loss, `(m,)`."""
        return torch.einsum("bk,bkm->m", self.cotangent, self.J) / len(self.J)

    def to(self, dtype: torch.dtype) -> "OutputLinearization":
        """Return the linearisation in another dtype."""
        J, metric, cotangent = (X.to(dtype) for X in (self.J, self.metric, self.cotangent))
        return OutputLinearization(J, metric, cotangent, self.loss, self.solution)

    def step(self, damping: float) -> tuple[Tensor, float]:
        """Return u (m,) of (W3) and the relative residual of its equation."""
        values, vectors = torch.linalg.eigh(self.metric)
        C = vectors * values.clamp(min=0.0).sqrt()[..., None, :]
        W = (C.mT @ self.J).flatten(0, 1) / len(self.J) ** 0.5  # (W2)
        g = self.gradient
        gram = W @ W.mT
        L, info = torch.linalg.cholesky_ex(gram + damping * identity_like(gram))
        u = -(g - W.mT @ torch.cholesky_solve((W @ g)[:, None], L)[:, 0]) / damping  # (W3)
        defect = W.mT @ (W @ u) + damping * u + g
        size = torch.linalg.vector_norm(g).clamp(min=torch.finfo(g.dtype).tiny)
        residual = torch.where(info == 0, torch.linalg.vector_norm(defect) / size, float("nan"))
        return u, float(residual)


def linearize_outputs(
    model: nn.Module, x: Tensor, y: Tensor, loss: Loss, divergence: OutputDivergence
) -> OutputLinearization:
    """Linearise the outputs of a model at its fixed point (W1).

    The adjoint equations of all outputs of a sample are solved together.

    Returns:
        An `OutputLinearization`.

    Raises:
        ValueError: If data and model do not fit together, or the samples are not independent.
        ConvergenceError: If a sample has no fixed point, or an adjoint solve fails.
    """
    at = prepare(model, x, y, loss)
    values = lambda z: per_sample(lambda z, x: at.local(at.u, z, x), z, x)
    (fz, outputs), pull = pullback(values, at.z)
    at.require_independent(fz.detach(), outputs.detach())
    k = outputs.shape[1]
    unit = torch.eye(k, dtype=outputs.dtype, device=outputs.device)
    nothing_f, nothing_y = torch.zeros_like(fz), torch.zeros_like(outputs)
    with torch.no_grad():
        hz = torch.stack([pull((nothing_f, e.expand_as(outputs)))[0] for e in unit], dim=1)
        adjoint = at.layer.backward if isinstance(at.layer.backward, Implicit) else Implicit()
        resolvent = adjoint.resolvent(
            lambda lam: pull((lam, nothing_y))[0], at.z.shape[1], at.layer.solver.tolerance(x.dtype)
        )
        lam = resolvent.solve(hz).raise_if_failed("adjoint of the outputs").value

        def rows(z: Tensor, x: Tensor, lam: Tensor) -> Tensor:
            _, pull_u = pullback(lambda u: at.local(u, z, x), at.u)
            return torch.vmap(lambda l, e: pull_u((l, e))[0])(lam, unit)

        J = per_sample(rows, at.z, x, lam)  # (W1)
    outputs = outputs.detach().requires_grad_()
    cost = loss(outputs, y)
    (cotangent,) = torch.autograd.grad(cost, outputs)
    return OutputLinearization(
        J.detach(),
        divergence.metric(outputs.detach()),
        cotangent * len(x),
        cost.detach(),
        at.solution,
    )
