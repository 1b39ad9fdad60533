"""The cyclic LQR problem as plain data, with shape checks.

    (L2)  min sum_i sum_k  a_k'x + b_k'u + 1/2 x'Q_k x + u'M_k x + 1/2 u'R_k u,   x, u of phase k
          with x_{k+1} = A_k x_k + B_k u_k,  k = 0 ... p-1,  and phase p the next round's phase 0

Source: thesis eq. 4.3.1, with linear terms wherever a cost is read.
"""

from dataclasses import dataclass
from statistics import mode
from typing import Any

import torch
from torch import Tensor

from deqlqr._checks import phase_count
from deqlqr.input_cost import InputCost
from deqlqr.lqr import LQR
from deqlqr.staged_lqr import StagedLQR


@dataclass(frozen=True)
class CyclicLQR(StagedLQR):
    """A cyclic infinite-horizon LQR (L2): one entry for each phase; batch dimensions are free.

    Attributes:
        A: State matrices, `(*batch, n_{k+1}, n_k)`.
        B: Input matrices, `(*batch, n_{k+1}, m_k)`.
        Q: State costs, symmetric, `(*batch, n_k, n_k)`.
        R: Input costs, symmetric, `(*batch, m_k, m_k)`, or an `InputCost` each.
        M: Cross costs, `(*batch, m_k, n_k)`.
        a: Linear state costs, `(*batch, n_k)`.
        b: Linear input costs, `(*batch, m_k)`.
        controls: Which entries of a model's u are the controls of each phase, int64, `(m_k,)`;
            `None` where they are simply one phase's after the other's.

    Raises:
        ValueError: If lengths, shapes, dtypes or devices do not fit together.
    """

    def _check(self) -> None:
        check_phases(self.A, self.B, self.Q, self.R, M=self.M, a=self.a, b=self.b)

    @property
    def p(self) -> int:
        """Number of phases."""
        return len(self.A)

    def composed(self) -> LQR:
        """Return the LQR of one round: its state that of phase 0, its controls those of all phases.

        Its controls are in the order of `join`; its steady state is the cycle's (F5).
        """
        batch, n = self.A[0].shape[:-2], self.n[0]
        offsets = [sum(self.m[:k]) for k in range(self.p)]
        m = sum(self.m)
        # x_k = Phi x_0 + Gamma u, and the cost of phase k is one of (x_k, u_k).
        Phi = torch.eye(n, dtype=self.A[0].dtype, device=self.A[0].device).expand(*batch, n, n)
        Gamma = Phi.new_zeros(*batch, n, m)
        Q, M, R = Gamma.new_zeros(*batch, n, n), Gamma.mT.clone(), Gamma.new_zeros(*batch, m, m)
        a, b = Gamma.new_zeros(*batch, n), Gamma.new_zeros(*batch, m)
        costs = self._dense_R
        for k in range(self.p):
            own = slice(offsets[k], offsets[k] + self.m[k])
            MG = self.M[k] @ Gamma
            Q = Q + Phi.mT @ self.Q[k] @ Phi
            M = M + Gamma.mT @ self.Q[k] @ Phi
            M[..., own, :] += self.M[k] @ Phi
            R = R + Gamma.mT @ self.Q[k] @ Gamma
            R[..., own, :] += MG
            R[..., own] += MG.mT
            R[..., own, own] += costs[k]
            a = a + (Phi.mT @ self.a[k][..., None])[..., 0]
            b = b + (Gamma.mT @ self.a[k][..., None])[..., 0]
            b[..., own] += self.b[k]
            Phi, Gamma = self.A[k] @ Phi, self.A[k] @ Gamma
            Gamma[..., own] += self.B[k]
        if self.controls is not None:
            order = torch.cat(list(self.controls)).argsort()
            Gamma, M, b = Gamma[..., order], M[..., order, :], b[..., order]
            R = R[..., order, :][..., order]
        return LQR(Phi, Gamma, Q, R, M, a, b)


def check_phases(A: Any, B: Any, Q: Any, R: Any, **others: Any) -> None:
    """Check lengths, shapes, dtypes and devices of what belongs to the phases of a cycle.

    Args:
        A: State matrices.
        B: Input matrices.
        Q: State costs.
        R: Input costs.
        others: M, P0, a or b; what is `None` is not looked at.

    Raises:
        ValueError: If something does not fit.
    """
    given = {"A": A, "B": B, "Q": Q, "R": R} | {
        name: X for name, X in others.items() if X is not None
    }
    p = phase_count(**given)
    for name in ("A", "B", "Q", "R", "M"):
        kinds = (Tensor, InputCost) if name == "R" else (Tensor,)
        for k, X in enumerate(given.get(name, ())):
            if not isinstance(X, kinds) or len(X.shape) < 2:
                got = str(tuple(X.shape)) if isinstance(X, kinds) else type(X).__name__
                raise ValueError(
                    f"{name}[{k}] must be a tensor (*batch, rows, columns), got {got}."
                )
    like = A[0]
    batch = like.shape[:-2]
    # Sizes by what most matrices say, so that the one that does not fit is the one named.
    n = [mode((Q[k].shape[-1], A[k].shape[-1], A[k - 1].shape[-2])) for k in range(p)]
    crossed = given.get("M", B)
    m = [
        mode((B[k].shape[-1], R[k].shape[-1], crossed[k].shape[-1 if crossed is B else -2]))
        for k in range(p)
    ]
    if like.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"A[0] must be float32 or float64, got {like.dtype}.")
    if min(n) == 0:
        raise ValueError(f"A[{n.index(0)}] must have at least one column, got none.")
    shapes = {
        "A": lambda k: (n[(k + 1) % p], n[k]),
        "B": lambda k: (n[(k + 1) % p], m[k]),
        "Q": lambda k: (n[k], n[k]),
        "R": lambda k: (m[k], m[k]),
        "M": lambda k: (m[k], n[k]),
        "P0": lambda k: (n[k], n[k]),
        "a": lambda k: (n[k],),
        "b": lambda k: (m[k],),
    }
    for name, sequence in given.items():
        kinds = (Tensor, InputCost) if name == "R" else (Tensor,)
        for k, X in enumerate(sequence):
            expected = (*batch, *shapes[name](k))
            if not isinstance(X, kinds) or tuple(X.shape) != expected:
                got = str(tuple(X.shape)) if isinstance(X, kinds) else type(X).__name__
                raise ValueError(
                    f"{name}[{k}] must have shape {expected}, for phases of n = {n} states and "
                    f"m = {m} controls; got {got}."
                )
            if X.dtype != like.dtype or X.device != like.device:
                raise ValueError(
                    f"{name}[{k}] must be {like.dtype} on {like.device} like A[0], got {X.dtype} "
                    f"on {X.device}."
                )
