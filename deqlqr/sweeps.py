"""Backward sweeps over phases with a choice of inverse and of damping, layer by layer.

    (V1)  K = (delta I + R + B'P+B)^-1 (M + B'P+A),   A_cl = A - B K,
          P = Q + A'P+A - (M + B'P+A)' K
    (V2)  without R and M:  A_cl = (I + B B'P+/delta)^-1 A,   P = Q + A'P+ A_cl
    (V3)  (delta I + C)^-1 = 1/delta sum_{j < terms} (-C/delta)^j,   C = R + B'P+B,
          with a relative error of at most (rho/delta)^terms, rho = rho(C) < delta
    (V4)  delta_k = max(least, margin rho_k)

In (V2) the series of (V3) becomes that of B B'P+/delta, term by term, on n+ x n rather than m x n.
B enters by products only. Sweeps around a cycle are value iteration: P_k grows from 0 to the
stabilising solution, and with it delta_k of (V4). Over an open chain one sweep is the finite
horizon's recursion.

Source: thesis section 5.1, with 1/delta as a factor in eq. 5.1.4.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from deqlqr._checks import Options, at_least, choice, count
from deqlqr._linalg import identity_like, norm, sym
from deqlqr.cyclic_steady_state import worst_residual
from deqlqr.input_cost import InputCost
from deqlqr.input_map import InputMap
from deqlqr.spectral import spectral_radius

_SETTLED = 1e-3  # relative change of a damping that is taken for none
_NEAR = 1e-2  # relative change of P in a sweep from which the damping may settle
_POWER_STEPS = 8  # of a look; the vector is kept from one look to the next


@dataclass(frozen=True)
class Phase:
    """One phase of a chain or a cycle; its R holds no damping.

    Attributes:
        A: `(*batch, n+, n)`.
        B: `(*batch, n+, m)`, by its products.
        Q: `(*batch, n, n)`.
        R: `(*batch, m, m)`.
        M: `(*batch, m, n)`.
        a: `(*batch, n)`.
        b: `(*batch, m)`.
    """

    A: Tensor
    B: InputMap
    Q: Tensor
    R: InputCost
    M: Tensor
    a: Tensor
    b: Tensor


class Inverse(Protocol):
    """How (delta I + C)^-1 is applied."""

    def closed_loop(self, A: Tensor, BBP: Tensor, delta: Tensor) -> Tensor:
        """Return A_cl of (V2) for BBP = B B'P+."""

    def solve(self, system: "System", right: Tensor) -> Tensor:
        """Return (delta I + R + B'P+B)^-1 right."""

    def truncation(self, rho: Tensor, delta: Tensor) -> Tensor:
        """Return a bound on the relative error of `solve`, `(*batch,)`, for rho of (V3)."""


@dataclass(frozen=True)
class System:
    """delta I + C of a phase, C = R + B'P+B.

    Attributes:
        phase: The phase.
        P: P+.
        delta: Damping, `(*batch,)`.
        BBP: B B'P+ where R and M are 0, else `None`.
    """

    phase: Phase
    P: Tensor
    delta: Tensor
    BBP: Tensor | None

    def curved(self, v: Tensor) -> Tensor:
        """Return C v."""
        Cv = self.phase.B.adjoint(self.P @ self.phase.B.times(v))
        return Cv if self.BBP is not None else Cv + self.phase.R @ v


@dataclass(frozen=True)
class ExactInverse:
    """The inverse itself, by factorisation: of an m x m matrix where R or M is not 0."""

    def closed_loop(self, A: Tensor, BBP: Tensor, delta: Tensor) -> Tensor:
        """Return A_cl of (V2)."""
        return torch.linalg.solve_ex(identity_like(BBP) + BBP / delta[..., None, None], A)[0]

    def solve(self, system: System, right: Tensor) -> Tensor:
        """Return (delta I + R + B'P+B)^-1 right."""
        wide, B = system.delta[..., None, None], system.phase.B
        if system.BBP is not None:  # by the n+ x n+ matrix of (V2)
            loop = wide * identity_like(system.BBP) + system.BBP
            inner = torch.linalg.solve_ex(loop, B.times(right))[0]
            return (right - B.adjoint(system.P @ inner)) / wide
        m = right.shape[-2]
        eye = torch.eye(m, dtype=right.dtype, device=right.device)
        eye = eye.expand(*right.shape[:-2], m, m)
        return torch.linalg.solve_ex(wide * eye + sym(system.curved(eye)), right)[0]

    def truncation(self, rho: Tensor, delta: Tensor) -> Tensor:
        """Return 0."""
        return torch.zeros_like(rho)


@dataclass(frozen=True)
class NeumannInverse(Options):
    """The truncated series (V3): products only.

    Attributes:
        terms: Number of terms.

    Raises:
        ValueError: If it is below 1.
    """

    terms: int = 20

    def __post_init__(self) -> None:
        count("terms", self.terms)

    def closed_loop(self, A: Tensor, BBP: Tensor, delta: Tensor) -> Tensor:
        """Return A_cl of (V2)."""
        step, total, term = -BBP / delta[..., None, None], A, A
        for _ in range(self.terms):
            term = step @ term
            total = total + term
        return total

    def solve(self, system: System, right: Tensor) -> Tensor:
        """Return (delta I + R + B'P+B)^-1 right."""
        wide = system.delta[..., None, None]
        total = term = right / wide
        for _ in range(self.terms - 1):
            term = -system.curved(term) / wide
            total = total + term
        return total

    def truncation(self, rho: Tensor, delta: Tensor) -> Tensor:
        """Return the bound (V3)."""
        return (rho / delta) ** self.terms


@dataclass(frozen=True)
class LayerDamping(Options):
    """delta_k by the layer's own curvature (V4), rho_k by power iteration.

    For a block with rho(A) < 1; without, P and with it delta may grow without limit. The power
    iteration comes from below; at the end rho_k is bounded from above by repeated squaring and the
    damping raised if need be, so that the margin is kept and not only aimed at.

    Attributes:
        margin: delta_k / rho_k, above 1.
        refresh_every: Sweeps between two looks at rho_k.

    Raises:
        ValueError: If an option is out of range.
    """

    margin: float = 2.0
    refresh_every: int = 1

    def __post_init__(self) -> None:
        at_least("margin", self.margin, 1.0, strict=True)
        count("refresh_every", self.refresh_every)


INVERSES = ("exact", "neumann")
InverseLike = Literal["exact", "neumann"] | Inverse


def make_inverse(inverse: str | Inverse) -> Inverse:
    """Return the inverse that a name or an object stands for.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(inverse, str):
        choice("inverse", inverse, INVERSES)
        return ExactInverse() if inverse == "exact" else NeumannInverse()
    if isinstance(inverse, type) or not hasattr(inverse, "closed_loop"):
        raise ValueError(
            f"inverse must be 'exact', 'neumann' or NeumannInverse(), got {inverse!r}."
        )
    return inverse


@dataclass(frozen=True)
class Swept:
    """P and the optimal controls of a chain or a cycle of phases, by sweeps.

    Attributes:
        u: Controls of every phase, `(*batch, m_k)`.
        x: States, `(*batch, n_k)`.
        lam: Linear parts of the costates, `(*batch, n_k)`.
        P: `(*batch, n_k, n_k)`.
        delta: Damping of every phase, `(*batch,)`.
        rho: Bound on the spectral radius of R_k + B_k'P_{k+1}B_k, `(*batch,)`.
        truncation: Bound on the relative error of every inverse: the largest over the phases,
            `(*batch,)`; 0 where it is exact, 1 or more where the series diverges.
        closed_loop_radius: Spectral radius of the closed loop around a cycle, `(*batch,)`.
        residual: Largest relative residual of the optimality conditions (C5), `(*batch,)`.
        sweeps: Sweeps taken.
        converged: Whether P, and the damping, had settled, `(*batch,)`.
    """

    u: tuple[Tensor, ...]
    x: tuple[Tensor, ...]
    lam: tuple[Tensor, ...]
    P: tuple[Tensor, ...]
    delta: tuple[Tensor, ...]
    rho: tuple[Tensor, ...]
    truncation: Tensor
    closed_loop_radius: Tensor | None
    residual: Tensor
    sweeps: int
    converged: Tensor


class _Backward:
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
            torch.where(low, (1 + _SETTLED) * e, d)
            for low, d, e in zip(short, deltas, asked, strict=True)
        ]
        return raised, torch.stack(short).any(0)

    def diverges(self, P_next: list[Tensor], deltas: list[Tensor]) -> Tensor:
        """Return where a series diverges, as it will for the larger P of later sweeps too."""
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
        """Return the spectral radius of R + B'P+B by power iteration, from below.

        The Rayleigh quotient of P+^(1/2) B B' P+^(1/2); the vector is kept for the next sweep.
        """
        v, gram, tiny = self._vectors[k], self._grams[k], torch.finfo(P_next.dtype).tiny
        rho = torch.zeros_like(v[..., 0, 0])
        for _ in range(_POWER_STEPS):
            Pv = P_next @ v
            w = gram @ Pv
            rho = (w.mT @ Pv)[..., 0, 0] / (v.mT @ Pv)[..., 0, 0].clamp(min=tiny)
            v = w / norm(w).clamp(min=tiny)[..., None, None]
        dead = (norm(v) == 0)[..., None, None]  # P+ = 0, in the first sweep
        self._vectors[k] = torch.where(dead, self._vectors[k], v)
        return rho + self._R_radius[k]

    def radius(self, k: int, P_next: Tensor) -> Tensor:
        """Return a bound on the spectral radius of R + B'P+B, from above."""
        rho = spectral_radius(self._grams[k] @ P_next) + self._R_radius[k]
        return torch.nan_to_num(rho, nan=float("inf"))

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


def sweep_cycle(
    phases: Sequence[Phase],
    damping: Sequence[Tensor],
    *,
    inverse: InverseLike = "exact",
    adapt: LayerDamping | None = None,
    P0: Tensor | None = None,
    tol: float = 1e-12,
    max_sweeps: int = 1000,
) -> Swept:
    """Solve a cyclic LQR (infinite horizon) by value iteration, and return its steady state.

    Args:
        phases: Its phases.
        damping: delta_k `(*batch,)` of every phase; the least, with `adapt`.
        inverse: `"exact"`, `"neumann"` or a `NeumannInverse`.
        adapt: Damping by layer (V4); `None` keeps `damping`.
        P0: P of phase 0 of a nearby problem to start from; zero if `None`.
        tol: Relative change of P in a sweep that counts as converged; what the type can resolve,
            1e-5 in float32, if that is more.
        max_sweeps: Most sweeps.

    Returns:
        A `Swept`; inspect `converged` and `truncation`.
    """
    like = phases[0].A
    tol = max(tol, 100 * torch.finfo(like.dtype).eps)
    back = _Backward(phases, make_inverse(inverse))
    P = torch.zeros_like(phases[0].Q) if P0 is None else sym(P0)
    least, deltas = list(damping), list(damping)
    margin = 0.0 if adapt is None else adapt.margin
    settled = torch.tensor(adapt is None, device=like.device).expand(like.shape[:-2])

    def held(k: int, _: Tensor) -> Tensor:
        return deltas[k]

    def looked_at(k: int, P_next: Tensor) -> Tensor:
        # What has settled stays: P converges for a damping that is held.
        wanted = torch.maximum(least[k], margin * back.estimate(k, P_next))
        return torch.where(settled, deltas[k], wanted)

    for sweeps in range(1, max_sweeps + 1):
        look = adapt is not None and (sweeps - 1) % adapt.refresh_every == 0
        look = look and not bool(settled.all())
        Ps, loops, new = back.sweep(P, looked_at if look else held)
        change, size = norm(Ps[0] - P), norm(Ps[0])
        P = Ps[0]
        if look:
            moved = [(e - d).abs() > _SETTLED * d for d, e in zip(deltas, new, strict=True)]
            # In the first sweeps P, and all curvature with it, may not have reached all layers.
            near = change <= _NEAR * size
            deltas, settled = new, settled | (near & ~torch.stack(moved).any(0))
        done = settled & (change <= tol * size)
        if adapt is not None and done.any():
            raised, short = back.widened(_next(Ps), deltas, least, margin)
            deltas = [torch.where(done, r, d) for r, d in zip(raised, deltas, strict=True)]
            done = done & ~short
        hopeless = ~size.isfinite()
        if adapt is None and sweeps & (sweeps - 1) == 0:
            hopeless = hopeless | back.diverges(_next(Ps), deltas)
        if bool((done | hopeless).all()):
            break
    systems = [back.system(*of) for of in zip(range(len(phases)), _next(Ps), deltas, strict=True)]
    whole = loops[0]
    for loop in loops[1:]:
        whole = loop @ whole
    lam = _costates(back, systems, loops)
    x = _states(back, systems, loops, lam)
    return _finished(
        back, systems, Ps, (lam, _next(lam)), (x, _next(x)), sweeps, done, spectral_radius(whole)
    )


def sweep_chain(
    phases: Sequence[Phase],
    damping: Sequence[Tensor],
    P_end: Tensor,
    lam_end: Tensor,
    *,
    x0: Tensor | None = None,
    inverse: InverseLike = "exact",
    adapt: LayerDamping | None = None,
) -> Swept:
    """Solve a finite-horizon LQR by one backward sweep, and return its optimal controls.

    Args:
        phases: Its stages, first to last.
        damping: delta_k `(*batch,)` of every stage; the least, with `adapt`.
        P_end: Quadratic cost of the final state, `(*batch, n, n)`.
        lam_end: Its linear cost, `(*batch, n)`.
        x0: First state, `(*batch, n)`; zero if `None`.
        inverse: `"exact"`, `"neumann"` or a `NeumannInverse`.
        adapt: Damping by layer (V4); `None` keeps `damping`.

    Returns:
        A `Swept`, with no closed loop around a cycle.
    """
    back = _Backward(phases, make_inverse(inverse))

    def layer_damping(k: int, P_next: Tensor) -> Tensor:
        if adapt is None:
            return damping[k]
        return torch.maximum(damping[k], adapt.margin * back.radius(k, P_next))

    Ps, loops, deltas = back.sweep(P_end, layer_damping)
    ahead = [*Ps[1:], P_end]
    systems = [back.system(*of) for of in zip(range(len(phases)), ahead, deltas, strict=True)]
    lam = [lam_end[..., None]]
    for system, A_cl in zip(reversed(systems), reversed(loops), strict=True):
        lam.insert(0, A_cl.mT @ lam[0] + back.linear(system))
    x = [torch.zeros_like(lam[0]) if x0 is None else x0[..., None]]
    for system, lam_next in zip(systems, lam[1:], strict=True):
        u = back.control(system, lam_next, x[-1])
        x.append(system.phase.A @ x[-1] + system.phase.B.times(u))
    done = torch.ones(P_end.shape[:-2], dtype=torch.bool, device=P_end.device)
    return _finished(back, systems, Ps, (lam[:-1], lam[1:]), (x[:-1], x[1:]), 1, done, None)


def _next(values: Sequence[Tensor]) -> list[Tensor]:
    """Return what belongs to the phase that follows each, around the cycle."""
    return [*values[1:], values[0]]


def _costates(back: _Backward, systems: list[System], loops: list[Tensor]) -> list[Tensor]:
    """Return lam_k of (C3) around the cycle."""
    p = len(loops)
    steps = [(A_cl.mT, back.linear(s)) for s, A_cl in zip(systems, loops, strict=True)]
    lam = _closed(steps[::-1])  # against the sense of the cycle
    return [lam[-k % p] for k in range(p)]


def _states(
    back: _Backward, systems: list[System], loops: list[Tensor], lam: list[Tensor]
) -> list[Tensor]:
    """Return x_k of (C4) around the cycle."""
    steps = []
    for system, A_cl, lam_next in zip(systems, loops, _next(lam), strict=True):
        at_rest = torch.zeros_like(system.phase.a)[..., None]
        u = back.control(system, lam_next, at_rest)
        steps.append((A_cl, system.phase.B.times(u)))
    return _closed(steps)


def _closed(steps: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Return y_k with y_{k+1} = F_k y_k + c_k around the cycle, by products.

    With F = F_{p-1} ... F_0 and the drift c of a round, y_0 = c + F c + F^2 c + ..., summed by
    squaring; the spectral radius of F must be below 1.
    """
    F, c = steps[0]
    for F_k, c_k in steps[1:]:
        F, c = F_k @ F, F_k @ c + c_k
    eps = torch.finfo(F.dtype).eps
    for _ in range(60):
        c = c + F @ c
        F = F @ F
        if not bool((norm(F) > eps).any()):  # NaN counts as done
            break
    y = [c]
    for F_k, c_k in steps[:-1]:
        y.append(F_k @ y[-1] + c_k)
    return y


def _finished(
    back: _Backward,
    systems: list[System],
    P: list[Tensor],
    costates: tuple[list[Tensor], list[Tensor]],
    states: tuple[list[Tensor], list[Tensor]],
    sweeps: int,
    done: Tensor,
    radius: Tensor | None,
) -> Swept:
    """Return the controls and what is known of them, from lam and x at both ends of each phase."""
    u, rho, kinds = [], [], []
    for k, (system, P_k, lam, lam_next, x, x_next) in enumerate(
        zip(systems, P, *costates, *states, strict=True)
    ):
        phase, wide = system.phase, system.delta[..., None, None]
        u_k = back.control(system, lam_next, x)
        p, p_next = P_k @ x + lam, system.P @ x_next + lam_next
        kinds.append((
            (phase.A.mT @ p_next, phase.Q @ x, phase.M.mT @ u_k, phase.a[..., None], -p),
            (phase.B.adjoint(p_next), phase.M @ x, phase.R @ u_k + wide * u_k, phase.b[..., None]),
            (phase.A @ x, phase.B.times(u_k), -x_next),
        ))
        u.append(u_k)
        rho.append(back.radius(k, system.P))
    deltas = [system.delta for system in systems]
    truncation = torch.stack([
        back.inverse.truncation(r, d) for r, d in zip(rho, deltas, strict=True)
    ]).amax(0)  # fmt: skip
    flat = lambda Xs: tuple(X[..., 0] for X in Xs)
    return Swept(
        flat(u), flat(states[0]), flat(costates[0]), tuple(P), tuple(deltas), tuple(rho),
        truncation, radius, worst_residual(kinds), sweeps, done,
    )  # fmt: skip
