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

from deqlqr.controls import Controls
from deqlqr.ddp_inverse import Inverse
from deqlqr.ddp_rows import LayerRows
from deqlqr.ddp_value import AppliedRecursion, FormedRecursion, Recursion, Value

_CALLS = 4e6  # operations in the time that torch needs to begin those of a product with N


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
        D: The layer's Q_uu^-1, with G'.
        S: See (DD6).
        C: C', `(batch, r, n)`.
    """

    D: Inverse
    S: Value
    C: Tensor

    def times(self, dX: Tensor) -> Tensor:
        """Return K dX."""
        seen = (self.C @ dX[..., None].to(self.C.dtype))[..., 0]
        return self.D.rows.flat(self.D.spread(-self.S.times(seen)))

    def dense(self) -> Tensor:
        """Return K."""
        (batch, r, n), rows = self.C.shape, self.D.rows
        DG = rows.flat(self.D.times(rows.matrix(rows.dense()))).flatten(0, 1)  # (batch r, m)
        eye = torch.eye(batch * r, dtype=DG.dtype, device=DG.device)
        S = torch.stack([self.S.times(column.view(batch, r)) for column in eye])
        SC = torch.einsum("ibr,brn->ibn", S, self.C)
        return -DG.mT @ SC.reshape(batch * r, batch * n)


InverseOf = Callable[[int, LayerRows, Tensor], Inverse]  # (t, G', Q_u) -> D of layer t


@dataclass(frozen=True)
class Swept:
    """The value recursion (DD6), before the base has taken its step.

    Attributes:
        Q_u: Of each layer, without l_u, flat; `None` without parameters.
        gains: K of each layer.
        regularised: Layers at which (DD7) was needed.
    """

    Q_u: Sequence[Tensor | None]
    gains: Sequence[Gain | None]
    regularised: int


def sweep(
    layers: Sequence[LayerRows | None],
    C: Sequence[Tensor],
    l_u: Sequence[Tensor] | None,
    inverse: InverseOf,
    *,
    mu: float,
    whole: bool,
    scalar: bool = False,
) -> Swept:
    """Run (DD6) backward through the layers.

    Args:
        layers: G' and the gradient of each layer; `None` for one without parameters.
        C: C' of the state that enters each layer but the first, `(batch, r, n_t)`.
        l_u: Of each layer, flat; `None` for 0.
        inverse: Gives D of a layer, never asked for one without parameters.
        mu: Of (DD9).
        whole: Couple all samples; else S keeps the blocks of single samples only.
        scalar: D is one number, with which N costs little.

    Returns:
        Q_u and the gains.
    """
    found = None
    if whole and _sooner_applied([rows for rows in layers[1:] if rows is not None], scalar):
        found = _swept(layers, C, l_u, inverse, AppliedRecursion(mu))
    if found is None:
        found = _swept(layers, C, l_u, inverse, FormedRecursion(mu, whole))
    assert found is not None  # noqa: S101  only what is not formed is given up
    return found


def _swept(
    layers: Sequence[LayerRows | None],
    C: Sequence[Tensor],
    l_u: Sequence[Tensor] | None,
    inverse: InverseOf,
    value: Recursion,
) -> Swept | None:
    """Return what `sweep` does, or `None` if the recursion needs S itself and has not formed it."""
    Q_u: list[Tensor | None] = [None] * len(layers)
    gains: list[Gain | None] = [None] * len(layers)
    for t in reversed(range(len(layers))):
        rows = layers[t]
        if rows is None:
            continue
        q = rows.gradient(value.xi)
        Q_u[t] = rows.flat(q)
        if t > 0:
            D = inverse(t, rows, q)
            if l_u is not None:
                q = q + rows.matrix(l_u[t])
            S = value.before(D, q)
            if S is None:
                return None
            gains[t] = Factored(D, S, C[t - 1])
    return Swept(Q_u, gains, value.regularised)


def _sooner_applied(layers: Sequence[LayerRows], scalar: bool) -> bool:
    """Return whether products with S, not formed, cost less than S, by their operations.

    Formed: for each layer N, 2 m batch^2 if D is no number; four times the cube of batch r between
    two layers. Applied: for the j-th layer from the end 2^j products with some N, for xi and again
    in the forward pass, each of 8 m operations for every sample.
    """
    if not layers:
        return False
    (batch, r), count = layers[0].count, len(layers)
    m = max(rows.size for rows in layers)
    formed = 4 * (batch * r) ** 3 * (count - 2) + (0 if scalar else 2 * m * batch**2 * count)
    return 2 ** (count + 1) * (8 * m * batch + _CALLS) < formed
