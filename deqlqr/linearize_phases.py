"""A model linearised layer by layer, a DEQ at its fixed point: one LQR phase for each.

    (N4)  phase 0      reads the output:  x_1 = x_0 = dz,  with all costs:  Q, M, R of (H3), a, b
          phase k > 0  is the block's layer f_k:  A_k = df_k/ds_k,  B_k = df_k/du_k

s_k is what enters layer k, s_1 = z. A parameter is a control of the first phase that uses it: the
readout's of phase 0, the block's own of their layer, an encoder's of the layer into which it feeds.
What it does at a later layer j, as a weight used twice does, is carried there in the state,

    (N5)  e_j <- e_j + df_j/du u,     s_{j+1} = A_j s_j + B_j u_j + e_j

so that the cycle has the block's own derivatives whatever its structure, and (F5) holds exactly.
An explicit network is a block that does not use its z: A_1 = 0, the readout is the identity, and
the cycle falls apart into a finite horizon (L3): phases 1 to p, the costs of phase 0 at its end.

For the Newton divergence the layers' Hamiltonians f_k'p_{k+1} give Q_k, R_k, M_k, with the costates
p_k = A_k'p_{k+1}; there a parameter may enter only one phase.

Source: thesis sections 3.2 and 4.3, with the corrections of docs/maths.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from deqlqr.block_layers import BlockLayers
from deqlqr.cyclic_lqr import CyclicLQR
from deqlqr.deq import layers_of
from deqlqr.divergence import Divergence, Euclidean, Newton, OutputDivergence
from deqlqr.input_cost import InputCost
from deqlqr.layer_inverse import Phase
from deqlqr.layers import Layer, Layers
from deqlqr.linearize_samples import Minibatch, pulled_back, stacked
from deqlqr.loss import Loss
from deqlqr.net_layers import NetLayers
from deqlqr.phase_plan import Plan
from deqlqr.solver import FixedPointSolution

_MOST_ENTRIES = 2**28  # of a layer's B, M or R: two gigabytes in float64


@dataclass(frozen=True)
class PhaseLinearization:
    """A model linearised phase by phase and sample by sample; costs are those of single samples.

    Attributes:
        A: `(batch, n_{k+1}, n_k)` of every phase, like the next ones.
        B: `(batch, n_{k+1}, m_k)`, or `None` where B is known by products only.
        Q: `(batch, n_k, n_k)`.
        R: `(batch, m_k, m_k)`.
        M: `(batch, m_k, n_k)`.
        a: `(batch, n_k)`.
        b: `(batch, m_k)`.
        controls: Which entries of u are the controls of each phase, `(m_k,)`.
        loss: The mean loss J.
        solutions: Fixed points and certificates of every sample, of the DEQ layer if there is one.
    """

    A: list[Tensor]
    B: list[Tensor] | None
    Q: list[Tensor]
    R: list[InputCost]
    M: list[Tensor]
    a: list[Tensor]
    b: list[Tensor]
    controls: list[Tensor]
    loss: Tensor
    solutions: Sequence[FixedPointSolution]
    plan: "Plan" = field(repr=False)

    def exact(self) -> CyclicLQR:
        """Return the augmented-state problem of the whole batch (N2)."""
        assert self.B is not None  # noqa: S101
        matrices = zip(self.A, self.B, self.Q, self.R, self.M, self.a, self.b, strict=True)
        phases = [stacked(*phase) for phase in matrices]
        joined = {name: [phase[name] for phase in phases] for name in phases[0]}
        return CyclicLQR(**joined, controls=self.controls)

    def per_sample(self) -> CyclicLQR:
        """Return a batch of problems, one for each sample (N3)."""
        assert self.B is not None  # noqa: S101
        return CyclicLQR(
            self.A, self.B, self.Q, self.R, self.M, self.a, self.b, controls=self.controls
        )

    def lqr(self, minibatch: Minibatch, dtype: torch.dtype) -> CyclicLQR:
        """Return the problem of the batch or those of its samples, in a type."""
        return (self.exact() if minibatch == "exact" else self.per_sample()).to(dtype)

    def by_products(self, minibatch: Minibatch, dtype: torch.dtype) -> list[Phase]:
        """Return the phases for sweeps, with B by its products."""
        found = []
        rest = zip(self.A, self.Q, self.R, self.M, self.a, self.b, strict=True)
        for k, (A, Q, R, M, a, b) in enumerate(rest):
            own = {
                "A": A,
                "B": A.new_zeros(*A.shape[:2], 0),
                "Q": Q,
                "R": R,
                "M": M,
                "a": a,
                "b": b,
            }
            if minibatch == "exact":
                own = stacked(**own)
            own = {name: X.to(dtype) for name, X in own.items()}
            found.append(Phase(**own | {"B": self.plan.products(k, minibatch, own["A"])}))
        return found


def linearize_phases(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Loss,
    divergence: Divergence,
    *,
    max_states: int | None = None,
    stored: bool = True,
) -> PhaseLinearization:
    """Linearise a model at its fixed point, phase by phase and sample by sample (N4).

    Args:
        model: The model.
        x: Inputs.
        y: Targets.
        loss: The loss.
        divergence: What gives Q, R and M.
        max_states: Most states of a sample in a phase.
        stored: Form the matrices B; if not, they are known by products only, for `by_products`.

    Returns:
        A `PhaseLinearization`, from which both kinds of minibatch problem are formed.

    Raises:
        ValueError: If data and model do not fit together, the samples are not independent, the
            block has no phases or wrong ones, or a phase has more states than `max_states`.
        ConvergenceError: If a sample has no fixed point.
    """
    at: Layers = BlockLayers(model, x) if layers_of(model) else NetLayers(model, x)
    loss.check(at.outputs, y)
    if max_states is not None and max(at.sizes) > max_states:
        raise ValueError(
            f"x: {len(x)} samples of up to {max(at.sizes)} states between two layers are too many "
            "for a dense LQR, layer by layer (max_states of the route). Take a smaller batch, or "
            "route 'output', 'sampled', 'krylov' or 'kronecker'."
        )
    _require_small(at, stored, isinstance(divergence, Newton))
    layers = [at.layer(k, stored) for k in range(1, len(at.used))]
    at.require_derivatives(layers)
    plan = Plan(at, layers)
    read = at.readout(plan.own[0])
    at.require_independent(layers, read)
    outputs = read.value.detach().requires_grad_()
    cost = loss(outputs, y)
    (dJ,) = torch.autograd.grad(cost, outputs)
    dJ = dJ * len(x)  # the sample's own gradient, without the 1/batch of the mean
    A = plan.state_matrices()
    a, b = ([read.A.new_zeros(len(x), size) for size in sizes] for sizes in plan.sizes(A))
    a[0] = torch.einsum("bk,bkn->bn", dJ, read.A)
    b[0] = torch.einsum("bk,bkm->bm", dJ, read.B)
    if isinstance(divergence, Newton):
        plan.require_single_use()
        Q, M, R = at.newton_terms(layers, plan.own, y, loss, a[0])
    else:
        Q, M, R = _costs(divergence, read, *plan.sizes(A))
    B = plan.input_matrices(A) if stored else None
    return PhaseLinearization(A, B, Q, R, M, a, b, plan.controls, cost.detach(), at.solutions, plan)


def _require_small(at: Layers, stored: bool, newton: bool) -> None:
    """Refuse layers whose matrices would fill the memory.

    Args:
        at: The layers.
        stored: Whether B is formed.
        newton: Whether R is dense.

    Raises:
        ValueError: If there is one.
    """
    for k, used in enumerate(at.used[1:], 1):
        m = sum(at.controls.sizes[i] for i in used)
        before, after = at.sizes[k - 1], at.sizes[k % len(at.sizes)]
        wide = (before + m if newton else before, after if stored else 0)
        entries = len(at.x) * m * max(wide)
        if entries > _MOST_ENTRIES:
            others = "'krylov'" if newton else "'output', 'sampled', 'krylov' or 'kronecker'"
            raise ValueError(
                f"x: {len(at.x)} samples make a matrix of layer {k}, from {before} to {after} "
                f"states with {m} parameters, of {entries:.1e} numbers, more than "
                f"{_MOST_ENTRIES:.1e}. Take a smaller batch, or route {others}."
            )


def _costs(
    divergence: Divergence, read: Layer, n: Sequence[int], m: Sequence[int]
) -> tuple[list[Tensor], list[Tensor], list[InputCost]]:
    """Return Q_k, M_k and R_k of a divergence of the output, or of the Euclidean one."""
    like, euclidean = read.A, isinstance(divergence, Euclidean)
    batch, none = len(like), torch.arange(0, device=like.device)
    Q = [like.new_zeros(batch, size, size) for size in n]
    M = [like.new_zeros(batch, *size) for size in zip(m, n, strict=True)]
    R = [
        InputCost(like.new_full((batch, size), float(euclidean)), none, like.new_zeros(batch, 0, 0))
        for size in m
    ]
    if isinstance(divergence, OutputDivergence):
        Q[0], M[0], R[0] = pulled_back(divergence.metric(read.value), read.A, read.B)
    elif not euclidean:
        raise ValueError(f"divergence {type(divergence).__name__} has no quadratic terms.")
    return Q, M, R
