"""One backward sweep over phases: P and the closed loop of each, from P at the end.

    (V1)  K = (delta I + R + B'P+B)^-1 (M + B'P+A),   A_cl = A - B K,
          P = Q + A'P+A - (M + B'P+A)' K

and what is asked of a sweep: a bound on rho(R_k + B_k'P_{k+1}B_k), costs and controls.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deqlqr._linalg import norm, sym
from deqlqr.layer_inverse import ExactInverse, Inverse, Phase, System
from deqlqr.spectral import spectral_radius

_POWER_STEPS = 8  # of a look; the vector is kept from one look to the next
_SPARE = 1e-3  # by which a damping that has lost its margin is raised further


class BackwardSweep:
    """One sweep against the sense of the phases, from P at the end to P at the start."""

    def __init__(self, phases: Sequence[Phase], inverse: Inverse) -> None:
        self.phases, self.inverse = phases, inverse
        self._grams = [phase.B.gram() for phase in phases]
        self._R_radius = [phase.R.radius() for phase in phases]
        generator = torch.Generator().manual_seed(0)
        self._vectors = [
            torch.randn(*gram.shape[:-1], 1, generator=generator).to(gram) for gram in self._grams
        ]
        self._plain = [
            not any(bool((X != 0).any()) for X in (phase.R.diagonal, phase.R.block, phase.M))
            for phase in phases
        ]

    def sweep(
        self, P_end: Tensor, damping: Callable[[int, Tensor], Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return P and the closed loop of every phase, and the damping.

        Args:
            P_end: P at the end.
            damping: `(k, P+)` -> delta_k.
        """
        P, found = P_end, []
        for k in reversed(range(len(self.phases))):
            delta = damping(k, P)
            P, A_cl = self._step(self.system(k, P, delta))
            found.append((P, A_cl, delta))
        Ps, loops, deltas = (list(column) for column in zip(*reversed(found), strict=True))
        return Ps, loops, deltas

    def widened(
        self, P_next: list[Tensor], deltas: list[Tensor], least: list[Tensor], margin: float
    ) -> tuple[list[Tensor], Tensor]:
        """Return the damping, raised where it keeps the margin no longer, and where it was."""
        asked = [
            torch.maximum(lowest, margin * self.radius(k, P))
            for k, (P, lowest) in enumerate(zip(P_next, least, strict=True))
        ]
        short = [d < e for d, e in zip(deltas, asked, strict=True)]
        raised = [
            torch.where(low, (1 + _SPARE) * e, d)
            for low, d, e in zip(short, deltas, asked, strict=True)
        ]
        return raised, torch.stack(short).any(0)

    def diverges(self, P_next: list[Tensor], deltas: list[Tensor]) -> Tensor:
        """Return where a series diverges."""
        if isinstance(self.inverse, ExactInverse):
            return torch.zeros_like(deltas[0], dtype=torch.bool)
        bounds = [
            self.inverse.truncation(self.radius(k, P), delta)
            for k, (P, delta) in enumerate(zip(P_next, deltas, strict=True))
        ]
        return (torch.stack(bounds) >= 1).any(0)

    def system(self, k: int, P_next: Tensor, delta: Tensor) -> System:
        """Return what phase k inverts."""
        BBP = self._grams[k] @ P_next if self._plain[k] else None
        return System(self.phases[k], P_next, delta, BBP)

    def estimate(self, k: int, P_next: Tensor) -> Tensor:
        """Return rho(R) + rho(B'P+B), the second by power iteration, from below.

        The Rayleigh quotient of (B B')^(1/2) P+ (B B')^(1/2), for a P+ of any sign; the vector is
        kept for the next sweep.
        """
        v, gram, tiny = self._vectors[k], self._grams[k], torch.finfo(P_next.dtype).tiny
        rho = torch.zeros_like(v[..., 0, 0])
        for _ in range(_POWER_STEPS):
            Gv = gram @ v
            w = P_next @ Gv
            rho = (Gv.mT @ w)[..., 0, 0].abs() / (v.mT @ Gv)[..., 0, 0].clamp(min=tiny)
            v = w / norm(w).clamp(min=tiny)[..., None, None]
        dead = (norm(v) == 0)[..., None, None]  # P+ = 0, in the first sweep
        self._vectors[k] = torch.where(dead, self._vectors[k], v)
        return rho + self._R_radius[k]

    def radius(self, k: int, P_next: Tensor) -> Tensor:
        """Return a bound on the spectral radius of R + B'P+B: that of R plus that of B'P+B."""
        rho = spectral_radius(self._grams[k] @ P_next) + self._R_radius[k]
        return torch.nan_to_num(rho, nan=float("inf"))

    def systems(self, P_next: Sequence[Tensor], deltas: Sequence[Tensor]) -> list[System]:
        """Return what every phase inverts."""
        pairs = enumerate(zip(P_next, deltas, strict=True))
        return [self.system(k, P, delta) for k, (P, delta) in pairs]

    def _step(self, system: System) -> tuple[Tensor, Tensor]:
        """Return P and the closed loop."""
        phase = system.phase
        if system.BBP is not None:
            A_cl = self.inverse.closed_loop(phase.A, system.BBP, system.delta)
            return sym(phase.Q + phase.A.mT @ (system.P @ A_cl)), A_cl  # (V2)
        PA = system.P @ phase.A
        X = phase.M + phase.B.adjoint(PA)
        K = self.inverse.solve(system, X)
        P = sym(phase.Q + phase.A.mT @ PA - X.mT @ K)  # (V1)
        return P, phase.A - phase.B.times(K)

    def linear(self, system: System) -> Tensor:
        """Return a - K'b, `(*batch, n, 1)`."""
        phase = system.phase
        a, b = phase.a[..., None], phase.b[..., None]
        if not bool((b != 0).any()):
            return a
        y = self.inverse.solve(system, b)
        return a - phase.M.mT @ y - phase.A.mT @ (system.P @ phase.B.times(y))

    def control(self, system: System, lam_next: Tensor, x: Tensor) -> Tensor:
        """Return u of (C4), `(*batch, m, 1)`, for x `(*batch, n, 1)`."""
        phase = system.phase
        costate = system.P @ (phase.A @ x) + lam_next
        right = phase.M @ x + phase.B.adjoint(costate) + phase.b[..., None]
        return -self.inverse.solve(system, right)
