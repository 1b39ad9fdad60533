"""The backward pass of batch DDP: value derivatives and feedback policies, layer by layer.

The state X_t of all samples goes through the layers X_{t+1} = f_t(X_t, u_t) to the outputs X_T,
with the cost Phi(X_T) + sum l_t(u_t), l_t = weight_decay u_t'u_t / 2. In Gauss-Newton form, with
Lambda the metric of the outputs, + marking what belongs to layer t + 1,

    (DD3)  V_X^T = Phi_X,   V_XX^T = blockdiag(Lambda_s) / batch = C_T C_T'
    (DD4)  Q_u = l_u + F_u'V_X+,         Q_X = F_X'V_X+,
           Q_uu = l_uu + F_u'V_XX+ F_u,  Q_uX = F_u'V_XX+ F_X,   Q_XX = F_X'V_XX+ F_X
    (DD5)  k = -D Q_u,   K = -D Q_uX,   D = Q_uu^-1
           V_X = Q_X - Q_uX'D Q_u,   V_XX = Q_XX - Q_uX'D Q_uX

The paper prints Q_uX in its k. With p_t = F_X'...Phi_X, C_t = F_X'...C_T, block-diagonal over the
samples, and the rows G_t = F_u'C_{t+1} (W1), all of it lives in the span of C: nothing of the size
of V_XX or Q_uu is formed, and Q_u is a correction of the gradient g_t = l_u + F_u'p_{t+1}.

    (DD6)  V_XX = C_t S_t C_t',  S_T = I,    V_X = p_t - C_t xi_t,  xi_T = 0,
           Q_u = g_t - G xi+,    Q_uX = G S+ C',   N = G'D G,
           xi = xi+ + S+ G'D Q_u,   S = S+ - S+ N S+

If D is no inverse of Q_uu but that of another optimiser, S+ - S+ N S+ may be indefinite. D is then
regularised to (D^-1 + G S+ G')^-1, its own inverse with the curvature of (DD4) added, which is

    (DD7)  S = (I + S+ N)^-1 S+,   also in place of S+ in K and xi

With second derivatives of the layers (full DDP only) Q_XX, Q_uX and Q_uu each gain

    (DD8)  V_X+ . F_XX,   V_X+ . F_uX,   V_X+ . F_uu

Tikhonov regularisation of V_XX by mu, a cost of leaving the trajectory, at every layer:

    (DD9)  full: V_XX + mu I;   else S + mu I, in what the outputs see of the state

Source: G.-H. Liu, T. Chen, E. A. Theodorou (2020), Differential dynamic programming neural
optimizer, arXiv:2002.08809, eq. 6 to 8, 13 and 29 to 37.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from deqlqr._linalg import identity_like, lu_factor, sym
from deqlqr.controls import Controls
from deqlqr.ddp_inverse import Inverse
from deqlqr.rows import Rows


class Gain(Protocol):
    """K of a layer."""

    def times(self, dX: Tensor) -> Tensor:
        """Return K dX `(m,)` for the change dX `(batch, n)` of the layer's state."""

    def dense(self) -> Tensor:
        """Return K `(m, batch n)`."""


@dataclass(frozen=True)
class Policy:
    """u_t + k_t + K_t (X_t* - X_t) of every layer.

    Attributes:
        controls: The parameters.
        own: Numbers of those of each layer.
        k: Change of all parameters with the states held, `(m,)`.
        gains: K of each layer; `None` where it is 0, as at the first, whose state does not move.
        states: X_t, what enters each layer, `(batch, n_t)`.
        Q_u: Of all layers, `(m,)`.
        slope: Q_u'k.
        curvature: k'Q_uu k, NaN where it is not known.
        regularised: Layers at which (DD7) was needed.
        reason: Why it must not be taken, or `None`.
    """

    controls: Controls
    own: Sequence[Sequence[int]]
    k: Tensor
    gains: Sequence[Gain | None]
    states: Sequence[Tensor]
    Q_u: Tensor
    slope: float
    curvature: float
    regularised: int
    reason: str | None

    def spectrum(self, t: int) -> Tensor:
        """Return the singular values of K_t in descending order; of layer -1 for the last.

        Raises:
            ValueError: If there is no such layer.
        """
        if not -len(self.gains) <= t < len(self.gains):
            raise ValueError(f"t must be one of {len(self.gains)} layers, got {t}.")
        gain = self.gains[t]
        if gain is None:
            return self.k.new_zeros(0)
        K = gain.dense()
        # Of the smaller Gram matrix.
        values = torch.linalg.eigvalsh(K @ K.mT if len(K) <= K.shape[1] else K.mT @ K)
        return values.clamp(min=0.0).sqrt().flip(0)

    def promised(self, length: float) -> float:
        """Return the decrease of the cost that `length` times k promises."""
        return -(length * self.slope + length**2 * self.curvature / 2)


@dataclass(frozen=True)
class Factored:
    """-D G S C' of (DD6), or with S of (DD7).

    Attributes:
        D: The layer's Q_uu^-1.
        rows: G'.
        S: `(1, batch r, batch r)`, or `(batch, r, r)` if samples are not coupled.
        C: `(batch, n, r)`.
    """

    D: Inverse
    rows: Rows
    S: Tensor
    C: Tensor

    def times(self, dX: Tensor) -> Tensor:
        """Return K dX."""
        seen = (dX[:, None].to(self.C.dtype) @ self.C)[:, 0]
        return -self.D.spread(self.rows, _applied(self.S, seen))

    def dense(self) -> Tensor:
        """Return K."""
        batch, n, r = self.C.shape
        DG = self.D.times(self.rows.dense().flatten(0, 1))  # (batch r, m)
        S = self.S[0] if len(self.S) == 1 else torch.block_diag(*self.S)
        SC = torch.einsum("ibr,bnr->ibn", S.view(batch * r, batch, r), self.C)
        return -DG.mT @ SC.reshape(batch * r, batch * n)


def _applied(S: Tensor, v: Tensor) -> Tensor:
    """Return S v for v (batch, r)."""
    return (S @ v.reshape(len(S), -1, 1)).view(v.shape)


InverseOf = Callable[[int, Tensor], Inverse]  # (t, Q_u) -> D of layer t


@dataclass(frozen=True)
class Swept:
    """The value recursion (DD6), before the base has taken its step.

    Attributes:
        Q_u: Of all layers, without l_u, `(m,)`.
        gains: K of each layer.
        regularised: Layers at which (DD7) was needed.
    """

    Q_u: Tensor
    gains: Sequence[Gain | None]
    regularised: int


def sweep(
    rows: Rows,
    C: Sequence[Tensor],
    own: Sequence[Sequence[int]],
    g: Tensor,
    l_u: Tensor,
    inverse: InverseOf,
    *,
    mu: float,
    whole: bool,
) -> Swept:
    """Run (DD6) backward through the layers.

    Args:
        rows: G' of all parameters.
        C: Of the state that enters each layer but the first, `(batch, n_t, r)`.
        own: Numbers of the parameters of each layer.
        g: Gradient of the loss, `(m,)`.
        l_u: Gradient of sum l_t, `(m,)`.
        inverse: Gives D of a layer, never asked for one without parameters.
        mu: Of (DD9).
        whole: Couple all samples; else S keeps the blocks of single samples only.

    Returns:
        Q_u and the gains.
    """
    batch, r = rows.count
    blocks, size = (1, batch * r) if whole else (batch, r)
    eye = torch.eye(size, dtype=g.dtype, device=g.device)
    S, xi = ((1 + mu) * eye).expand(blocks, -1, -1), g.new_zeros(batch, r)
    gains: list[Gain | None] = [None] * len(own)
    parts, decay = list(g.split(rows.sizes)), l_u.split(rows.sizes)
    regularised = 0
    for t in reversed(range(len(own))):
        if not own[t]:
            continue
        part = Rows(tuple(rows.parts[i] for i in own[t]), rows.count)
        q = torch.cat([parts[i] for i in own[t]])
        if t < len(own) - 1:
            q = q - part.transpose_times(xi)
            for i, piece in zip(own[t], q.split(part.sizes), strict=True):
                parts[i] = piece
        if t > 0:
            D = inverse(t, q)
            S_gain, S, bad = _next(S, D.gram(part, whole))
            q = q + torch.cat([decay[i] for i in own[t]])
            gains[t] = Factored(D, part, S_gain, C[t - 1])
            xi = xi + _applied(S_gain, D.project(part, q))
            regularised += bad
            if mu:
                S = S + mu * eye  # (DD9)
    return Swept(torch.cat(parts), gains, regularised)


def _next(S: Tensor, N: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return S of K and xi, S of the layer before, and whether (DD7) was needed."""
    SN = S @ N
    less = sym(S - SN @ S)  # (DD6)
    scale = S.diagonal(dim1=-2, dim2=-1).abs().amax(-1)[..., None, None]
    shift = 10 * S.shape[-1] * torch.finfo(S.dtype).eps * scale
    _, info = torch.linalg.cholesky_ex(less + shift * identity_like(S))
    bad = (info != 0)[:, None, None]
    if not bool(bad.any()):
        return S, less, 0
    damped = sym(lu_factor(identity_like(S) + SN).solve(S.contiguous()))  # (DD7)
    return torch.where(bad, damped, S), torch.where(bad, damped, less), 1
