"""Sweeps over phases with a choice of inverse and of damping, layer by layer.

    (V4)  delta_k = max(least, margin rho_k),   rho_k = rho(R_k) + rho(B_k'P_{k+1}B_k)

Sweeps around a cycle are value iteration: P_k grows from 0 to the stabilising solution, and with it
delta_k. Over an open chain one sweep is the finite horizon's recursion. See `backward_sweep` (V1)
and `layer_inverse` (V2), (V3).

Source: thesis section 5.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deqlqr._checks import Options, at_least, count
from deqlqr._linalg import norm, sym
from deqlqr.backward_sweep import BackwardSweep
from deqlqr.cyclic_lqr import CyclicLQR
from deqlqr.cyclic_steady_state import worst_residual
from deqlqr.layer_inverse import InverseLike, Phase, System, make_inverse
from deqlqr.scan import following
from deqlqr.spectral import spectral_radius

_SETTLED = 1e-3  # relative change of a damping that is taken for none
_NEAR = 1e-2  # relative change of P in a sweep from which the damping may settle

Damping = float | Tensor | Sequence[float | Tensor]


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


@dataclass(frozen=True)
class Swept:
    """P and the optimal controls of a chain or a cycle of phases, by sweeps.

    Attributes:
        u: Controls of every phase, `(*batch, m_k)`.
        x: States, `(*batch, n_k)`; of a chain one more, the last.
        lam: Linear parts of the costates, `(*batch, n_k)`.
        P: `(*batch, n_k, n_k)`.
        delta: Damping of every phase, `(*batch,)`.
        rho: Bound on the spectral radius of R_k + B_k'P_{k+1}B_k, `(*batch,)`.
        truncation: Bound on the relative error of every inverse: the largest over the phases,
            `(*batch,)`; 0 where it is exact, 1 or more where the series diverges.
        closed_loop_radius: Spectral radius of the closed loop around a cycle, `(*batch,)`.
        residual: Largest relative residual of the optimality conditions (C5), `(*batch,)`.
        sweeps: Sweeps taken.
        converged: Whether P, and the damping, had settled, and the closed loop is stable,
            `(*batch,)`.
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


def sweep_cycle(
    problem: CyclicLQR | Sequence[Phase],
    damping: Damping,
    *,
    inverse: InverseLike = "exact",
    adapt: LayerDamping | None = None,
    P0: Tensor | None = None,
    tol: float = 1e-12,
    max_sweeps: int = 1000,
) -> Swept:
    """Solve a cyclic LQR (infinite horizon) by value iteration, and return its steady state.

    Args:
        problem: The cyclic LQR, without damping, or its phases.
        damping: delta, or delta_k of every phase, numbers or `(*batch,)`; the least, with `adapt`.
        inverse: `"exact"`, `"neumann"` or a `NeumannInverse`.
        adapt: Damping by layer (V4); `None` keeps `damping`.
        P0: P of phase 0 of a nearby problem to start from; zero if `None`.
        tol: Relative change of P in a sweep that counts as converged; what the type can resolve,
            1e-5 in float32, if that is more.
        max_sweeps: Most sweeps.

    Returns:
        A `Swept`; inspect `converged` and `truncation`.

    Raises:
        ValueError: If an option is out of range or there is not one damping for each phase.

    Example:
        >>> I, O, one = torch.eye(1), torch.zeros(1, 1), torch.ones(1)
        >>> a, b = [one, 0 * one], [0 * one, 0 * one]
        >>> lqr = CyclicLQR([I / 2, I], [I, I], [I, O], [O, O], [O, O], a, b)
        >>> swept = sweep_cycle(lqr, 1e-3, inverse="neumann", adapt=LayerDamping(margin=2.0))
        >>> [d.item() >= 2 * r.item() for d, r in zip(swept.delta, swept.rho)]
        [True, True]
        >>> swept.truncation.item() <= 2**-20
        True
    """
    phases = as_phases(problem)
    damping = _as_damping(damping, phases)
    at_least("tol", tol, 0.0, strict=True)
    count("max_sweeps", max_sweeps)
    like = phases[0].A
    tol = max(tol, 100 * torch.finfo(like.dtype).eps)
    back = BackwardSweep(phases, make_inverse(inverse))
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
            raised, short = back.widened(following(Ps), deltas, least, margin)
            deltas = [torch.where(done, r, d) for r, d in zip(raised, deltas, strict=True)]
            done = done & ~short
        hopeless = ~size.isfinite()
        # From P = 0 on P grows, so that a series that diverges now does so to the end.
        if adapt is None and P0 is None and sweeps & (sweeps - 1) == 0:
            hopeless = hopeless | back.diverges(following(Ps), deltas)
        if bool((done | hopeless).all()):
            break
    systems = back.systems(following(Ps), deltas)
    whole = loops[0]
    for loop in loops[1:]:
        whole = loop @ whole
    radius = spectral_radius(whole)
    lam = _costates(back, systems, loops)
    x = _states(back, systems, loops, lam)
    u = [back.control(s, p, y) for s, p, y in zip(systems, following(lam), x, strict=True)]
    return _finished(
        back,
        systems,
        Ps,
        (lam, following(lam)),
        (x, following(x)),
        u,
        [back.radius(k, system.P) for k, system in enumerate(systems)],
        sweeps,
        done & (radius < 1),
        radius,
    )


def sweep_chain(
    phases: Sequence[Phase],
    damping: Damping,
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
        damping: delta, or delta_k of every stage, numbers or `(*batch,)`; the least, with `adapt`.
        P_end: Quadratic cost of the final state, `(*batch, n, n)`.
        lam_end: Its linear cost, `(*batch, n)`.
        x0: First state, `(*batch, n)`; zero if `None`.
        inverse: `"exact"`, `"neumann"` or a `NeumannInverse`.
        adapt: Damping by layer (V4), rho_k bounded by squaring; `refresh_every` is of no
            consequence in a single sweep. `None` keeps `damping`.

    Returns:
        A `Swept`, with no closed loop around a cycle.

    Raises:
        ValueError: If there is not one damping for each stage.
    """
    damping = _as_damping(damping, phases)
    back = BackwardSweep(phases, make_inverse(inverse))

    rho: list[Tensor] = []

    def layer_damping(k: int, P_next: Tensor) -> Tensor:
        rho.insert(0, back.radius(k, P_next))
        return damping[k] if adapt is None else torch.maximum(damping[k], adapt.margin * rho[0])

    Ps, loops, deltas = back.sweep(P_end, layer_damping)
    systems = back.systems([*Ps[1:], P_end], deltas)
    lam = [lam_end[..., None]]
    for system, A_cl in zip(reversed(systems), reversed(loops), strict=True):
        lam.insert(0, A_cl.mT @ lam[0] + back.linear(system))
    x = [torch.zeros_like(lam[0]) if x0 is None else x0[..., None]]
    u = []
    for system, lam_next in zip(systems, lam[1:], strict=True):
        u.append(back.control(system, lam_next, x[-1]))
        x.append(system.phase.A @ x[-1] + system.phase.B.times(u[-1]))
    done = torch.ones(P_end.shape[:-2], dtype=torch.bool, device=P_end.device)
    costates, states = (lam[:-1], lam[1:]), (x[:-1], x[1:])
    swept = _finished(back, systems, Ps, costates, states, u, rho, 1, done, None)
    return replace(swept, x=(*swept.x, x[-1][..., 0]))


def as_phases(problem: CyclicLQR | Sequence[Phase]) -> Sequence[Phase]:
    """Return the phases of a problem, B and R among their matrices."""
    if not isinstance(problem, CyclicLQR):
        return problem
    rows = zip(
        problem.A, problem.B, problem.Q, problem.R, problem.M, problem.a, problem.b, strict=True
    )
    return [Phase.of(*row) for row in rows]


def _as_damping(damping: Damping, phases: Sequence[Phase]) -> list[Tensor]:
    like = phases[0].A
    each = damping if isinstance(damping, Sequence) else [damping] * len(phases)
    if len(each) != len(phases):
        raise ValueError(f"damping must have one number for each of {len(phases)} phases, got "
                         f"{len(each)}.")  # fmt: skip
    numbers = [torch.as_tensor(delta, dtype=like.dtype, device=like.device) for delta in each]
    return [number.expand(like.shape[:-2]) for number in numbers]


def _costates(back: BackwardSweep, systems: list[System], loops: list[Tensor]) -> list[Tensor]:
    """Return lam_k of (C3) around the cycle."""
    p = len(loops)
    steps = [(A_cl.mT, back.linear(s)) for s, A_cl in zip(systems, loops, strict=True)]
    lam = _closed(steps[::-1])  # against the sense of the cycle
    return [lam[-k % p] for k in range(p)]


def _states(
    back: BackwardSweep, systems: list[System], loops: list[Tensor], lam: list[Tensor]
) -> list[Tensor]:
    """Return x_k of (C4) around the cycle."""
    steps = []
    for system, A_cl, lam_next in zip(systems, loops, following(lam), strict=True):
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
    back: BackwardSweep,
    systems: list[System],
    P: list[Tensor],
    costates: tuple[list[Tensor], list[Tensor]],
    states: tuple[list[Tensor], list[Tensor]],
    u: list[Tensor],
    rho: list[Tensor],
    sweeps: int,
    done: Tensor,
    radius: Tensor | None,
) -> Swept:
    """Return the controls with what is known of them; lam and x are those at both ends."""
    kinds = []
    for system, P_k, lam, lam_next, x, x_next, u_k in zip(
        systems, P, *costates, *states, u, strict=True
    ):
        phase, wide = system.phase, system.delta[..., None, None]
        p, p_next = P_k @ x + lam, system.P @ x_next + lam_next
        kinds.append((
            (phase.A.mT @ p_next, phase.Q @ x, phase.M.mT @ u_k, phase.a[..., None], -p),
            (phase.B.adjoint(p_next), phase.M @ x, phase.R @ u_k + wide * u_k, phase.b[..., None]),
            (phase.A @ x, phase.B.times(u_k), -x_next),
        ))
    deltas = [system.delta for system in systems]
    truncation = torch.stack([
        back.inverse.truncation(r, d) for r, d in zip(rho, deltas, strict=True)
    ]).amax(0)  # fmt: skip
    flat = lambda Xs: tuple(X[..., 0] for X in Xs)
    return Swept(
        flat(u), flat(states[0]), flat(costates[0]), tuple(P), tuple(deltas), tuple(rho),
        truncation, radius, worst_residual(kinds), sweeps, done,
    )  # fmt: skip
