"""S and xi of the value of batch DDP (DD6): as matrices, or by their products only.

With n = batch r, S of the whole batch is n x n, and a layer costs it two products of such matrices,
4 n^3. But all that is asked for are products with vectors,

    (DD12)  S v = w - S+ N w,   w = S+ v,   N w = G'(D (G w)),

at the j-th layer from the end 2^j with some N, each of the cost of a layer's own pass. Without S
being formed, S+ - S+ N S+ is known to have no negative eigenvalue while none of N is above that of
1 / S+: while the sum of them, or the root of the sum of their squares, is not.

Source: G.-H. Liu, T. Chen, E. A. Theodorou (2020), Differential dynamic programming neural
optimizer, arXiv:2002.08809, eq. 8; the form of S is ours.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deqlqr._linalg import identity_like, lu_factor, sym
from deqlqr.ddp_inverse import Inverse


class Value:
    """S."""

    @abstractmethod
    def times(self, v: Tensor) -> Tensor:
        """Return S v for v `(batch, r)`."""


@dataclass(frozen=True)
class Formed(Value):
    """S as it is.

    Attributes:
        S: `(1, batch r, batch r)`, `(batch, r, r)` if samples are not coupled, or one number, a
            multiple of the identity.
    """

    S: Tensor

    def times(self, v: Tensor) -> Tensor:
        """Return S v."""
        if self.S.dim() == 0:
            return self.S * v
        return (self.S @ v.reshape(len(self.S), -1, 1)).view(v.shape)


@dataclass(frozen=True)
class Applied(Value):
    """S+ - S+ N S+ + mu I by its products.

    Attributes:
        after: S+.
        D: Of the layer.
        mu: Of (DD9).
    """

    after: Value
    D: Inverse
    mu: float

    def times(self, v: Tensor) -> Tensor:
        """Return S v."""
        w = self.after.times(v)
        w = w - self.after.times(self.D.inner(w))  # (DD12)
        return w + self.mu * v if self.mu else w  # (DD9)


class Recursion:
    """Goes backward through the layers.

    Attributes:
        xi: `(batch, r)`, or `None` for 0.
        regularised: Layers at which (DD7) was needed.
    """

    def __init__(self, mu: float) -> None:
        self.xi: Tensor | None = None
        self.regularised = 0
        self._mu = mu

    def before(self, D: Inverse, q: Tensor) -> Value | None:
        """Go to the state before a layer.

        Args:
            D: The layer's.
            q: Its Q_u.

        Returns:
            S of its K, or `None` if that cannot be said without forming it.
        """
        S = self._value(D)
        if S is not None:
            step = S.times(D.project(q))
            self.xi = step if self.xi is None else self.xi + step
        return S

    @abstractmethod
    def _value(self, D: Inverse) -> Value | None:
        """Go on to S of the state before a layer, and return that of its K."""


class FormedRecursion(Recursion):
    """S is formed.

    Args:
        mu: Of (DD9).
        whole: Couple all samples; else S keeps the blocks of single samples only.
    """

    def __init__(self, mu: float, whole: bool) -> None:
        super().__init__(mu)
        self._whole = whole
        self._S: Callable[[Tensor], Tensor] = lambda N: N.new_ones(())  # S_T = I

    def _value(self, D: Inverse) -> Value:
        N = D.gram(self._whole)
        S = self._S(N)
        if self._mu:  # (DD9)
            S = S + self._mu * (identity_like(S) if S.dim() else 1.0)
        damped = regularised(S, N)
        if damped is not None:
            S, before = damped
            self.regularised += 1
            self._S = lambda _: before
        else:
            self._S = lambda _: less(S, N)  # not before a layer asks for it
        return Formed(S)


class AppliedRecursion(Recursion):
    """S of the whole batch is applied only."""

    def __init__(self, mu: float) -> None:
        super().__init__(mu)
        self._S: Value | None = None
        self._bound = 1.0  # of its eigenvalues

    def _value(self, D: Inverse) -> Value | None:
        if self._S is None:
            self._bound += self._mu
            self._S = Formed(D.rows.like.new_tensor(self._bound))
        if not bool(self._bound * D.trace() <= 1) and not bool(
            self._bound * torch.linalg.matrix_norm(D.gram(True)).amax() <= 1
        ):
            return None  # (DD7) may be needed
        S = self._S
        self._S, self._bound = Applied(S, D, self._mu), self._bound + self._mu
        return S


def less(S: Tensor, N: Tensor) -> Tensor:
    """Return S - S N S (DD6) for S `(*, n, n)` or one number, N `(*, n, n)`."""
    if S.dim() == 0:
        found = -S * S * N
        found.diagonal(dim1=-2, dim2=-1).add_(S)
        return found
    return sym(S - S @ N @ S)


def regularised(S: Tensor, N: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return S of K and xi, and S of the layer before, by (DD7) where that is needed.

    Args:
        S: `(*, n, n)`, or one number.
        N: `(*, n, n)`.

    Returns:
        The two, or `None` if it is needed nowhere.
    """
    trace = (S * N).sum((-2, -1)) if S.dim() else S * N.diagonal(dim1=-2, dim2=-1).sum(-1)
    if bool((trace <= 1).all()):  # as then are the eigenvalues of S^1/2 N S^1/2, none below 0
        return None
    reduced, eye = less(S, N), identity_like(N)
    S = S if S.dim() else S * eye.expand_as(N)
    scale = S.diagonal(dim1=-2, dim2=-1).abs().amax(-1)[..., None, None]
    shift = 10 * S.shape[-1] * torch.finfo(S.dtype).eps * scale
    _, info = torch.linalg.cholesky_ex(reduced + shift * eye)
    bad = (info != 0)[..., None, None]
    if not bool(bad.any()):
        return None
    damped = sym(lu_factor(eye + S @ N).solve(S.contiguous()))  # (DD7)
    return torch.where(bad, damped, S), torch.where(bad, damped, reduced)
