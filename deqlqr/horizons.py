"""What finite horizons of one LQR converge to (F10): rows that link them to its steady state.

(E3)  N steps, one tied control, terminal cost: the step (F3) with
S_N = (I + A + ... + A^(N-1)) B in place of S; it approaches (F3) like rho(A)^N
(E4)  N steps, free controls, running cost: the control in the middle approaches (F3) like
rho(A_cl)^(N/2), the turnpike
(E5)  N steps, free controls, terminal cost: the sum of the controls does not. It approaches
-R^-1 S'(a + Q x + M'v) + v,   x = -W (a + Q x + M'v),   v = -R_bar^-1 (b + M x),
with R = delta I before the end and W = sum_k A^k B R^-1 B'A'^k, by a Stein equation
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import log

import torch
from torch import Tensor

from deqlqr._linalg import identity_like
from deqlqr.equivalence_rows import EquivalenceRow, Skipped, compared, raising, relative_gap
from deqlqr.finite_riccati import solve_finite_lqr
from deqlqr.input_cost import InputCost
from deqlqr.lqr import LQR
from deqlqr.riccati import solve_dare
from deqlqr.solution import ConvergenceError, DareResult, describe_failures
from deqlqr.spectral import spectral_radius
from deqlqr.steady_state import curvature, static_step
from deqlqr.stein import solve_stein

_TOLERANCE = 1e-7
_FLOOR = 1e-10  # below which an error is rounding
_MOST_STEPS = 512  # of a horizon with free controls
_MOST_STATES = 256  # of one sample there
_SAMPLES = 2  # whose own problems are looked at there


@dataclass(frozen=True)
class _Approach:
    """Errors by the number of steps, and what is known of their fall."""

    errors: list[tuple[int, float]]
    rate: float
    name: str

    @property
    def note(self) -> str:
        """What was measured."""
        N, error = self.errors[-1]
        found = self._measured
        text = f"error {error:.1e} at N = {N}"
        if found is not None:
            text += f"; falls by {found:.4f} per step, {self.name} = {self.rate:.4f}"
        return text

    @property
    def fast_enough(self) -> bool:
        """Whether the errors fall as they must."""
        found = self._measured
        if found is None:
            return True
        (n1, _), (n2, _) = self._above
        # The constant in front may move by a factor of ten between n1 and n2.
        return found <= self.rate * 10 ** (1 / (n2 - n1))

    @property
    def _above(self) -> list[tuple[int, float]]:
        return [(n, e) for n, e in self.errors if e > _FLOOR][-2:]

    @property
    def _measured(self) -> float | None:
        if len(self._above) < 2:
            return None
        (n1, e1), (n2, e2) = self._above
        return (e2 / e1) ** (1 / (n2 - n1))


def tied_row(name: str, lqr: LQR, static: Tensor, rho: float) -> EquivalenceRow:
    """Return the row of (E3), with N = 1, 2, 4, ... until the error is at its floor.

    Args:
        name: Of the step.
        lqr: Its LQR, damped.
        static: u of (F3).
        rho: Spectral radius of A.
    """
    against = "N steps, tied control", "static problem (F3)"
    if rho >= 1:
        reason = lambda: raising(Skipped("rho(A) is not below 1: the unrolled network diverges"))
        return compared(name, *against, reason, static, _TOLERANCE)
    power, S, N = lqr.A, lqr.B, 1
    errors: list[tuple[int, float]] = []
    while True:
        u = -torch.linalg.solve(curvature(lqr, S), S.mT @ lqr.a + lqr.b)
        errors.append((N, relative_gap(u, static)))
        if errors[-1][1] < _FLOOR or N >= 2**24:
            break
        S, power, N = S + power @ S, power @ power, 2 * N
    return _row(name, against, u, static, _Approach(errors, rho, "rho(A)"))


def free_rows(name: str, lqr: LQR, delta: float) -> list[EquivalenceRow]:
    """Return the rows of (E4) and (E5).

    Args:
        name: Of the step.
        lqr: LQRs of single samples, `(batch, ...)`, not damped.
        delta: Damping.
    """
    first = LQR(*(getattr(lqr, part)[:_SAMPLES] for part in ("A", "B", "Q", "R", "M", "a", "b")))
    damped = first.damped(delta)
    return [_running(name, damped), _terminal(name, first, damped, delta)]


def _running(name: str, lqr: LQR) -> EquivalenceRow:
    against = "N steps, running cost, middle", "static problem (F3), by sample"
    if reason := _too_large(lqr):
        return compared(name, *against, *_skips(reason), _TOLERANCE)
    static = static_step(lqr)
    dare = solve_dare(lqr.A, lqr.B, lqr.Q, lqr.R, lqr.M, throw=False)
    if failure := describe_failures(dare.result, DareResult, "DARE"):
        failed = lambda: raising(ConvergenceError(failure))
        return compared(name, *against, failed, failed, _TOLERANCE)
    rate = float(dare.closed_loop_radius.max()) ** 0.5
    return _grown(name, against, lambda N: _middle(lqr, N), static, rate, "rho(A_cl)^(1/2)")


def _middle(lqr: LQR, N: int) -> Tensor:
    """Return the control in the middle of N steps that all carry the cost."""
    none, zero = torch.zeros_like(lqr.Q), torch.zeros_like(lqr.a)
    found = solve_finite_lqr(
        [lqr.A] * N, [lqr.B] * N, [*[lqr.Q] * N, none], [lqr.R] * N, [lqr.M] * N,
        [*[lqr.a] * N, zero], [lqr.b] * N,
    )  # fmt: skip
    return found.u[N // 2]


def _terminal(name: str, lqr: LQR, damped: LQR, delta: float) -> EquivalenceRow:
    against = "N steps, terminal cost, sum", "by the Gramian (E5), not (F3)"
    if reason := _too_large(lqr):
        return compared(name, *against, *_skips(reason), _TOLERANCE)
    rho = float(spectral_radius(lqr.A, squarings=26).max())
    if rho >= 1:
        return compared(name, *against, *_skips("rho(A) is not below 1"), _TOLERANCE)
    limit = _by_gramian(damped, delta)
    row = _grown(name, against, lambda N: _summed(lqr, damped, delta, N), limit, rho, "rho(A)")
    cosine = torch.nn.functional.cosine_similarity(limit, static_step(damped), dim=-1)
    other = ", ".join(f"{value:.3f}" for value in cosine.tolist())
    return replace(row, note=f"{row.note}; cosine to the step of (F3): {other}")


def _summed(lqr: LQR, damped: LQR, delta: float, N: int) -> Tensor:
    """Return the sum of the controls of N steps and of a last stage, which alone has a cost."""
    none = torch.arange(0, device=lqr.A.device)
    diagonal = torch.full_like(lqr.b, delta)
    free = InputCost(diagonal, none, diagonal.new_zeros(*diagonal.shape[:-1], 0, 0))
    zeros = [torch.zeros_like(X) for X in (lqr.Q, lqr.M, lqr.a, lqr.b)]
    found = solve_finite_lqr(
        [*[lqr.A] * N, torch.zeros_like(lqr.A)], [*[lqr.B] * N, torch.zeros_like(lqr.B)],
        [*[zeros[0]] * N, lqr.Q, zeros[0]], [*[free] * N, damped.R], [*[zeros[1]] * N, lqr.M],
        [*[zeros[2]] * N, lqr.a, zeros[2]], [*[zeros[3]] * N, lqr.b],
    )  # fmt: skip
    return torch.stack(found.u).sum(0)


def _by_gramian(lqr: LQR, delta: float) -> Tensor:
    """Return the limit of (E5) for a damped LQR."""
    assert isinstance(lqr.R, InputCost)  # noqa: S101  of a model
    A, B, M = lqr.A, lqr.B, lqr.M
    a, b = lqr.a[..., None], lqr.b[..., None]
    W = solve_stein(A.mT, B @ B.mT / delta).X
    R = lqr.R.factorise()
    RM, Rb = R.solve(M), R.solve(b)
    I = identity_like(A)
    x = torch.linalg.solve(I + W @ (lqr.Q - M.mT @ RM), -W @ (a - M.mT @ Rb))
    v = -Rb - RM @ x
    p = torch.linalg.solve(I - A.mT, a + lqr.Q @ x + M.mT @ v)
    return (v - B.mT @ p / delta)[..., 0]


def _grown(
    name: str,
    against: tuple[str, str],
    control: Callable[[int], Tensor],
    limit: Tensor,
    rate: float,
    what: str,
) -> EquivalenceRow:
    """Return a row of longer and longer horizons, N = 4, 8, 16, ..."""
    steps = log(_TOLERANCE / 100) / log(rate) if 0 < rate < 1 else float(rate >= 1) * 1e9
    if steps > _MOST_STEPS:
        reason = f"{what} = {rate:.4f} is too close to 1 for horizons of {_MOST_STEPS} steps"
        return compared(name, *against, *_skips(reason), _TOLERANCE)
    errors, N = [], 2
    while True:
        N = 2 * N
        u = control(N)
        errors.append((N, relative_gap(u, limit)))
        if errors[-1][1] < _FLOOR or N >= _MOST_STEPS:
            return _row(name, against, u, limit, _Approach(errors, rate, what))


def _row(
    name: str, against: tuple[str, str], u: Tensor, limit: Tensor, approach: _Approach
) -> EquivalenceRow:
    row = compared(name, *against, u, limit, _TOLERANCE, approach.note)
    return replace(row, passed=bool(row.passed) and approach.fast_enough)


def _too_large(lqr: LQR) -> str:
    if lqr.n <= _MOST_STATES:
        return ""
    return f"a sample has {lqr.n} states, above {_MOST_STATES}"


def _skips(reason: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    skip = lambda: raising(Skipped(reason))
    return skip, skip
