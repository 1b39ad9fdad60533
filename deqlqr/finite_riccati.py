"""The finite-horizon LQR on plain matrices: the Riccati recursion, feedback, and its optimum.

    (L3)  min sum_{k < N} (a_k'x_k + b_k'u_k + 1/2 x_k'Q_k x_k + u_k'M_k x_k + 1/2 u_k'R_k u_k)
                + a_N'x_N + 1/2 x_N'Q_N x_N,     x_{k+1} = A_k x_k + B_k u_k + c_k,  x_0 given

    (L4)  K_k = (R_k + B_k'P_{k+1}B_k)^-1 (M_k + B_k'P_{k+1}A_k),     P_N = Q_N,
          P_k = Q_k + A_k'P_{k+1}A_k - (M_k + B_k'P_{k+1}A_k)'K_k,
          lam_k = a_k + A_k'l - K_k'(b_k + B_k'l),   l = lam_{k+1} + P_{k+1}c_k,   lam_N = a_N
    (L5)  u_k = -K_k x_k - (R_k + B_k'P_{k+1}B_k)^-1 (b_k + B_k'l)

With more controls than states, as in a network's layers, an R_k given as `InputCost` is eliminated
first, and what is inverted is of the size of the states:

    (L6)  F = A - B R^-1 M,  G = B R^-1 B',  H = Q - M'R^-1 M,  W = I + G P+,  A_cl = W^-1 F,
          P = H + F'P+ A_cl,   lam = a - M'R^-1 b + A_cl'(lam+ + P+ (c - B R^-1 b))

Source: thesis eq. 2.3.1 to 2.3.11 and 3.2.5 to 3.2.10, with the one-halves of docs/maths.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deqlqr._linalg import identity_like, is_finite, lu_factor, norm, sym
from deqlqr.cyclic_steady_state import worst_residual
from deqlqr.finite_stages import LastCost, Stage, finite_stages, require_shape
from deqlqr.input_cost import InputCost, InputCostFactor
from deqlqr.solution import ConvergenceError, FiniteResult, describe_failures


@dataclass(frozen=True)
class FiniteLQRSolution:
    """The optimum of a finite-horizon LQR; all NaN where `result` is not 0.

    Attributes:
        u: Controls of every stage, `(*batch, m_k)`.
        x: States, `(*batch, n_k)`, N + 1 of them.
        P: Of the optimal cost to go x'P x/2 + lam'x + constant, `(*batch, n_k, n_k)`, N + 1.
        lam: `(*batch, n_k)`, N + 1.
        cost: The least cost, `(*batch,)`.
        residual: Largest relative residual of the optimality conditions, `(*batch,)`.
        result: A `FiniteResult` code, `(*batch,)`.
    """

    u: tuple[Tensor, ...]
    x: tuple[Tensor, ...]
    P: tuple[Tensor, ...]
    lam: tuple[Tensor, ...]
    cost: Tensor
    residual: Tensor
    result: Tensor
    _steps: "tuple[_Step, ...]" = field(repr=False)

    @property
    def K(self) -> tuple[Tensor, ...]:
        """Feedback gains of the policy u = -K x - k, `(*batch, m_k, n_k)`; formed when asked for.

        u = u_k - K (x - x_k) is the same policy.
        """
        failed = self.result != FiniteResult.SOLVED
        return tuple(_blanked(step.gain(), failed) for step in self._steps)

    @property
    def feedforward(self) -> tuple[Tensor, ...]:
        """Constant part k of the policy, `(*batch, m_k)`; formed when asked for."""
        failed = self.result != FiniteResult.SOLVED
        return tuple(_blanked(step.feedforward, failed)[..., 0] for step in self._steps)

    @property
    def solved(self) -> Tensor:
        """Whether there is an optimum, boolean `(*batch,)`."""
        return self.result == FiniteResult.SOLVED


def solve_finite_lqr(
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    Q: Sequence[Tensor],
    R: Sequence[Tensor | InputCost],
    M: Sequence[Tensor] | None = None,
    a: Sequence[Tensor] | None = None,
    b: Sequence[Tensor] | None = None,
    *,
    c: Sequence[Tensor] | None = None,
    x0: Tensor | None = None,
    throw: bool = True,
) -> FiniteLQRSolution:
    """Solve the finite-horizon LQR (L3) of N stages by the Riccati recursion (L4), (L5).

    Any leading batch dimensions, float32 or float64, on the tensors' device; all results can be
    differentiated, any number of times. Stages may differ in size. Under `torch.vmap` pass
    `throw=False`, and R as matrices.

    Args:
        A: State matrices, `(*batch, n_{k+1}, n_k)`, N of them.
        B: Input matrices, `(*batch, n_{k+1}, m_k)`, N.
        Q: State costs, symmetric, `(*batch, n_k, n_k)`: N + 1, the last that of x_N.
        R: Input costs, symmetric, `(*batch, m_k, m_k)`, N; an `InputCost` for many controls.
        M: Cross costs, `(*batch, m_k, n_k)`, N; zero if `None`, like all below.
        a: Linear state costs, `(*batch, n_k)`, N + 1.
        b: Linear input costs, `(*batch, m_k)`, N.
        c: Drifts of the states, `(*batch, n_{k+1})`, N.
        x0: First state, `(*batch, n_0)`.
        throw: Raise where an element has no optimum; if not, inspect `result`.

    Returns:
        A `FiniteLQRSolution`.

    Raises:
        ValueError: If lengths, shapes, dtypes or devices do not fit together.
        ConvergenceError: If `throw` and an element has no optimum: R_k + B_k'P_{k+1}B_k is not
            positive definite at a stage, or something is not finite.

    Example:
        >>> I = torch.eye(1)
        >>> found = solve_finite_lqr([I] * 2, [I] * 2, [I] * 3, [I] * 2, x0=torch.ones(1))
        >>> [round(u.item(), 4) for u in found.u], round(found.cost.item(), 4)
        ([-0.6, -0.2], 0.8)
    """
    stages, last = finite_stages(A, B, Q, R, M, a, b, c)
    x = [_first_state(x0, stages[0])]
    P, lam = [sym(last.Q)], [last.a]
    steps: list[_Step] = []
    reduced: _Reduced | None = None
    for stage in reversed(stages):
        # The same matrices at every stage, as in a time-invariant problem, are reduced once.
        if reduced is None or reduced.stage is not stage:
            reduced = _Reduced.of(stage)
        step: _Step
        if reduced is None:
            step = _ByControls(stage, P[0], lam[0])
        else:
            step = _ByStates(stage, reduced, P[0], lam[0])
        steps.insert(0, step)
        P.insert(0, step.P)
        lam.insert(0, step.lam)
    u = []
    for step in steps:
        u_k, x_next = step.forward(x[-1])
        u.append(u_k)
        x.append(x_next)
    result = _result(stages, last, steps, u)
    if throw:
        reason = describe_failures(result, FiniteResult, "finite LQR")
        if reason is not None:
            raise ConvergenceError(reason)
    failed = result != FiniteResult.SOLVED
    columns = lambda Xs: tuple(_blanked(X, failed)[..., 0] for X in Xs)
    cost, residual = _judged(stages, last, u, x, P, lam)
    return FiniteLQRSolution(
        columns(u),
        columns(x),
        tuple(_blanked(X, failed) for X in P),
        columns(lam),
        cost.masked_fill(failed, float("nan")),
        residual.masked_fill(failed, float("nan")),
        result,
        tuple(steps),
    )


class _ByControls:
    """A stage with its optimal cost to go by (L4): what is inverted is m x m.

    Attributes:
        P: `(*batch, n, n)`.
        lam: `(*batch, n, 1)`.
        feedforward: k of u = -K x - k, `(*batch, m, 1)`.
        indefinite: Where R + B'P+B is not positive definite, boolean `(*batch,)`.
    """

    def __init__(self, stage: Stage, P_next: Tensor, lam_next: Tensor) -> None:
        A, B = stage.A, stage.B
        R = stage.R.dense() if isinstance(stage.R, InputCost) else stage.R
        PA, costate = P_next @ A, lam_next + P_next @ stage.c
        inverted = sym(R + B.mT @ P_next @ B)
        L, info = torch.linalg.cholesky_ex(inverted)
        X, g = stage.M + B.mT @ PA, stage.b + B.mT @ costate
        self._stage, self._K = stage, torch.cholesky_solve(X, L)
        self.indefinite = (info != 0) & is_finite(inverted)
        self.feedforward = torch.cholesky_solve(g, L)
        self.P = sym(stage.Q + A.mT @ PA - X.mT @ self._K)
        self.lam = stage.a + A.mT @ costate - X.mT @ self.feedforward

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (L5), and the next state."""
        stage = self._stage
        u = -(self._K @ x) - self.feedforward
        return u, stage.A @ x + stage.B @ u + stage.c

    def gain(self) -> Tensor:
        """Return K."""
        return self._K


@dataclass(frozen=True)
class _Reduced:
    """A stage without its controls (L6), for a positive definite R.

    Attributes:
        stage: The stage.
        factor: R factorised.
        F: A - B R^-1 M.
        G: B R^-1 B'.
        H: Q - M'R^-1 M.
        a: a - M'R^-1 b.
        c: c - B R^-1 b.
    """

    stage: Stage
    factor: InputCostFactor
    F: Tensor
    G: Tensor
    H: Tensor
    a: Tensor
    c: Tensor

    @staticmethod
    def of(stage: Stage) -> "_Reduced | None":
        """Return the reduced stage, or `None` where it would be no gain."""
        n, m = stage.B.shape[-2:]
        if not isinstance(stage.R, InputCost) or m <= n:
            return None
        factor = stage.R.factorise()
        positive = (stage.R.diagonal > 0).index_fill(-1, stage.R.coupled, True).all(-1)
        if not bool((positive & ~factor.indefinite).all()):
            return None
        RB, RM = factor.solve(stage.B.mT), factor.solve(stage.M)
        Rb = factor.solve(stage.b)
        return _Reduced(
            stage,
            factor,
            stage.A - stage.B @ RM,
            sym(stage.B @ RB),
            sym(stage.Q - stage.M.mT @ RM),
            stage.a - stage.M.mT @ Rb,
            stage.c - stage.B @ Rb,
        )


class _ByStates:
    """The same by (L6): what is inverted is n x n.

    Attributes:
        P: As above, like lam.
        lam: See there.
        doubtful: Where `indefinite` has to be asked, boolean `(*batch,)`.
    """

    def __init__(self, stage: Stage, reduced: _Reduced, P_next: Tensor, lam_next: Tensor) -> None:
        self._stage, self._reduced = stage, reduced
        self._P_next, self._lam_next = P_next, lam_next
        self._W = lu_factor(identity_like(P_next) + reduced.G @ P_next)
        self._A_cl = self._W.solve(reduced.F)
        self.P = sym(reduced.H + reduced.F.mT @ (P_next @ self._A_cl))
        costate = lam_next + P_next @ reduced.c
        self.lam = reduced.a + self._A_cl.mT @ costate
        _, info = torch.linalg.cholesky_ex(_raised(P_next))
        # P+ is positive semidefinite, as it is but for a bad Hessian, where this is False.
        self.doubtful = (info != 0) & is_finite(P_next)

    def indefinite(self) -> Tensor:
        """Return where R + B'P+B, with R > 0 and G = B R^-1 B', is not positive definite."""
        P, G = self._P_next, self._reduced.G
        root, _ = torch.linalg.cholesky_ex(_raised(G))
        _, info = torch.linalg.cholesky_ex(identity_like(P) + root.mT @ P @ root)
        return self.doubtful & (info != 0)

    @property
    def feedforward(self) -> Tensor:
        """Constant part k of u = -K x - k."""
        return -self.forward(torch.zeros_like(self.lam))[0]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the optimal control at x, and the next state."""
        stage, reduced = self._stage, self._reduced
        drive = reduced.c - reduced.G @ self._lam_next
        x_next = self._A_cl @ x + self._W.solve(drive)
        costate = self._P_next @ x_next + self._lam_next
        u = -reduced.factor.solve(stage.B.mT @ costate + stage.M @ x + stage.b)
        return u, x_next

    def gain(self) -> Tensor:
        """Return K."""
        stage = self._stage
        right = stage.M + stage.B.mT @ (self._P_next @ self._A_cl)
        return self._reduced.factor.solve(right)


_Step = _ByControls | _ByStates


def _indefinite(steps: Sequence[_Step]) -> Tensor:
    """Return where R + B'P+B of a stage is not positive definite, `(*batch,)`."""
    found = [step.indefinite for step in steps if isinstance(step, _ByControls)]
    by_states = [step for step in steps if isinstance(step, _ByStates)]
    doubtful = [step.doubtful for step in by_states]
    # The device is looked at once, after all stages.
    if doubtful and bool(torch.stack(doubtful).any()):
        doubtful = [step.indefinite() for step in by_states]
    return torch.stack([*found, *doubtful]).any(0)


def _raised(X: Tensor) -> Tensor:
    """Return X with its eigenvalues raised by what rounding may have lowered them."""
    info = torch.finfo(X.dtype)
    shift = (info.eps * X.shape[-1] * norm(X)).clamp(min=info.tiny)
    return X + shift[..., None, None] * identity_like(X)


def _result(
    stages: Sequence[Stage], last: LastCost, steps: Sequence[_Step], u: Sequence[Tensor]
) -> Tensor:
    """Return the `FiniteResult` of every element."""
    given = [last.Q, last.a]
    for stage in stages:
        R = stage.R
        parts = [R] if isinstance(R, Tensor) else [R.block, R.diagonal[..., None]]
        given += [stage.A, stage.B, stage.Q, *parts, stage.M, stage.a, stage.b, stage.c]
    finite = lambda Xs: torch.stack([is_finite(X) for X in Xs]).all(0)
    well_given, found = finite(given), finite([*u, *(step.P for step in steps)])
    indefinite = _indefinite(steps)
    result = torch.where(found, int(FiniteResult.SOLVED), int(FiniteResult.NON_FINITE))
    result = torch.where(indefinite, int(FiniteResult.INDEFINITE), result)
    return torch.where(well_given, result, int(FiniteResult.NON_FINITE))


def _judged(
    stages: Sequence[Stage],
    last: LastCost,
    u: Sequence[Tensor],
    x: Sequence[Tensor],
    P: Sequence[Tensor],
    lam: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the cost and the residual of the optimality conditions, `(*batch,)` each."""
    cost = last.a.mT @ x[-1] + x[-1].mT @ (last.Q @ x[-1]) / 2
    p = [P_k @ x_k + lam_k for P_k, x_k, lam_k in zip(P, x, lam, strict=True)]
    kinds = []
    for k, (s, u_k) in enumerate(zip(stages, u, strict=True)):
        Ru, Mx, Qx, p_next = s.R @ u_k, s.M @ x[k], s.Q @ x[k], p[k + 1]
        cost = cost + s.a.mT @ x[k] + s.b.mT @ u_k
        cost = cost + (x[k].mT @ Qx + u_k.mT @ Ru) / 2 + u_k.mT @ Mx
        kinds.append((
            (s.A.mT @ p_next, Qx, s.M.mT @ u_k, s.a, -p[k]),
            (s.B.mT @ p_next, Mx, Ru, s.b),
            (s.A @ x[k], s.B @ u_k, s.c, -x[k + 1]),
        ))
    return cost[..., 0, 0], worst_residual(kinds)


def _blanked(X: Tensor, failed: Tensor) -> Tensor:
    return X.masked_fill(failed[..., None, None], float("nan"))


def _first_state(x0: Tensor | None, first: Stage) -> Tensor:
    if x0 is None:
        return torch.zeros_like(first.a)
    require_shape("x0", x0, first.a.shape[:-1], first.A)
    return x0[..., None]
