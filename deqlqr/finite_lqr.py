"""The finite-horizon LQR problem (L3) as plain data, with shape checks."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from deqlqr.cyclic_lqr import CyclicLQR
from deqlqr.finite_stages import finite_stages
from deqlqr.staged_lqr import StagedLQR


@dataclass(frozen=True)
class FiniteLQR(StagedLQR):
    """A finite-horizon LQR (L3) of N stages; batch dimensions are free.

    Attributes:
        A: State matrices, `(*batch, n_{k+1}, n_k)`, N of them.
        B: Input matrices, `(*batch, n_{k+1}, m_k)`, N.
        Q: State costs, symmetric, `(*batch, n_k, n_k)`: N + 1, the last that of x_N.
        R: Input costs, symmetric, `(*batch, m_k, m_k)`, N, or an `InputCost` each.
        M: Cross costs, `(*batch, m_k, n_k)`, N.
        a: Linear state costs, `(*batch, n_k)`, N + 1.
        b: Linear input costs, `(*batch, m_k)`, N.
        controls: Which entries of a model's u are the controls of each stage, int64, `(m_k,)`;
            `None` where they are simply one stage's after the other's.
        c: Drifts of the states, `(*batch, n_{k+1})`, N; `None` for none.

    Raises:
        ValueError: If lengths, shapes, dtypes or devices do not fit together.
    """

    c: Sequence[Tensor] | None = None

    def _check(self) -> None:
        finite_stages(self.A, self.B, self.Q, self.R, self.M, self.a, self.b, self.c)

    @property
    def N(self) -> int:
        """Number of stages."""
        return len(self.A)


def opened(cycle: CyclicLQR) -> FiniteLQR:
    """Return the horizon that the phases of an explicit network are.

    Phase 0 reads the output: its costs are those of the last state. Phase 1 does not look at its
    state, which is left out: x_0 has no entries, since the data do not change.
    """
    _, *A = cycle.A
    Q_last, Q_first, *Q = cycle.Q
    a_last, a_first, *a = cycle.a
    _, M_first, *M = cycle.M
    return FiniteLQR(
        [A[0][..., :0], *A[1:]],
        cycle.B[1:],
        [Q_first[..., :0, :0], *Q, Q_last],
        cycle.R[1:],
        [M_first[..., :0], *M],
        [a_first[..., :0], *a, a_last],
        cycle.b[1:],
        None if cycle.controls is None else cycle.controls[1:],
    )
