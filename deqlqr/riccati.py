"""Discrete algebraic Riccati equation (DARE) by structure-preserving doubling, with certificates.

Shapes: A (*batch, n, n), B (*batch, n, m), Q and P (*batch, n, n), R (*batch, m, m),
M and K (*batch, m, n). Everything is matrix products and LU, on the tensors' own device.

    (R1)  P = A'PA + Q - (M + B'PA)' K,   K = (R + B'PB)^-1 (M + B'PA),   A_cl = A - B K
    (R4)  A_0 = A - B R^-1 M,   G_0 = B R^-1 B',   H_0 = Q - M' R^-1 M
    (R5)  W = I + G H,   A <- A W^-1 A,   G <- G + A W^-1 G A',   H <- H + A' H W^-1 A,   H -> P
    (R6)  P = alpha I + D, with D of the DARE (A, B, Q + alpha (A'A - I), R + alpha B'B,
          M + alpha B'A): the same closed loop, and an R that may be invertible where R was not
    (R7)  K = R^-1 M + R^-1 B' (I + P G)^-1 P A_0
          (R + B'PB)^-1 r = R^-1 r - R^-1 B' (I + P G)^-1 P B R^-1 r

Each step of (R5) squares the closed loop, so the error after k steps is O(rho(A_cl)^(2^k)).
(R7) is (R1)'s gain by the matrix inversion lemma: the m x m matrix R is factorised once, and
everything after it is n x n, which pays where controls outnumber states.

Source: Chu, Fan, Lin, Wang (2004), Structure-preserving algorithms for periodic discrete-time
algebraic Riccati equations, Int. J. Control 77(8). doi:10.1080/00207170410001714988.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from deqlqr.input_cost import InputCost, InputCostFactor
from deqlqr.solution import ConvergenceError, DareResult, describe_failures


class LUFactor(NamedTuple):
    """LU factors of a batch of square matrices, and whether each is singular."""

    LU: Tensor
    pivots: Tensor
    info: Tensor

    def solve(self, right: Tensor, *, adjoint: bool = False) -> Tensor:
        """Return X^-1 right (*batch, n, k), or X^-T right."""
        return torch.linalg.lu_solve(self.LU, self.pivots, right, adjoint=adjoint)


def lu_factor(X: Tensor) -> LUFactor:
    """Return the LU factors of X (*batch, n, n); a singular one is marked, not raised."""
    return LUFactor(*torch.linalg.lu_factor_ex(X))


@dataclass(frozen=True)
class _Eliminated:
    """A DARE with its input cost eliminated (R4), and what led there."""

    A: Tensor
    G: Tensor
    H: Tensor
    cost: InputCostFactor
    RB: Tensor  # R^-1 B'
    RM: Tensor  # R^-1 M

    @staticmethod
    def of(A: Tensor, B: Tensor, Q: Tensor, R: InputCost, M: Tensor) -> "_Eliminated":
        n = A.shape[-1]
        cost = R.factorise()
        solved = cost.solve(torch.cat([B.mT, M], dim=-1))
        RB, RM = solved[..., :n], solved[..., n:]
        A_0, H_0 = A - _times(B, RM), _sym(Q - _times(M.mT, RM))
        return _Eliminated(A_0, _sym(B @ RB), H_0, cost, RB, RM)  # (R4)


@dataclass(frozen=True)
class Gain:
    """What solves with R + B'PB: the factors that gave K, kept for the linear terms."""

    B: Tensor
    D: Tensor  # P, or P less the shift of (R6)
    eliminated: _Eliminated
    loop: LUFactor  # of I + D G

    def solve(self, right: Tensor) -> Tensor:
        """Return (R + B'PB)^-1 right (*batch, m, k) (R7)."""
        solved = self.eliminated.cost.solve(right)
        return solved - self.eliminated.RB @ self.loop.solve(self.D @ (self.B @ solved))


@dataclass(frozen=True)
class DareSolution:
    """A solution of the DARE with its certificate, per batch element.

    Attributes:
        P: Stabilising solution, symmetric, `(*batch, n, n)`. NaN where `result` is not 0: what
            is not a stabilising solution is never handed out as one.
        K: Feedback gain of u = -K x, `(*batch, m, n)`. NaN where `result` is not 0.
        closed_loop_radius: Spectral radius of A - BK (see `spectral_radius`), `(*batch,)`.
        residual: The larger relative residual of (R1)'s two equations: Frobenius norm over that
            of the largest term, `(*batch,)`.
        iterations: Doubling steps, `(*batch,)`.
        result: A `DareResult` code, int64, `(*batch,)`.
        gain: Solves with R + B'PB, from the factors that gave K; `steady_state` uses it.
    """

    P: Tensor
    K: Tensor
    closed_loop_radius: Tensor
    residual: Tensor
    iterations: Tensor
    result: Tensor
    gain: Gain = field(repr=False)

    @property
    def stabilising(self) -> Tensor:
        """Boolean per batch element: P is the stabilising solution."""
        return self.result == DareResult.STABILISING

    def raise_if_failed(self) -> "DareSolution":
        """Return `self`, or raise naming the elements that failed.

        Raises:
            ConvergenceError: If any element has no stabilising solution.
        """
        message = describe_failures(self.result, DareResult, "DARE")
        if message is not None:
            raise ConvergenceError(message, self)
        return self


@dataclass(frozen=True)
class Doubling:
    """Structure-preserving doubling (R5), retried with the exact shift (R6) where it fails.

    Attributes:
        rtol: Largest residual accepted; `None` takes 1e-4 in float32 and 1e-8 in float64.
        max_steps: Most doubling steps.
    """

    rtol: float | None = None
    max_steps: int = 40

    def tolerance(self, dtype: torch.dtype) -> float:
        """Return `rtol`, or the default for `dtype`."""
        if self.rtol is not None:
            return self.rtol
        return 1e-8 if dtype == torch.float64 else 1e-4

    def solve(self, A: Tensor, B: Tensor, Q: Tensor, R: InputCost, M: Tensor) -> DareSolution:
        """Solve a batch of DAREs; never raises for a failure."""
        plain = self._attempt(A, B, Q, R, M, None)
        if plain.stabilising.all():
            return plain
        alpha = _shift(Q, R, M).masked_fill(plain.stabilising, 0.0)
        shifted = self._attempt(A, B, Q, R, M, alpha)
        # Where both fail, the plain attempt's verdict is the one on the problem as posed.
        better = shifted.stabilising
        pick = lambda name: torch.where(better, getattr(shifted, name), getattr(plain, name))
        return replace(
            shifted,
            closed_loop_radius=pick("closed_loop_radius"),
            residual=pick("residual"),
            iterations=pick("iterations"),
            result=pick("result"),
        )

    def _attempt(
        self, A: Tensor, B: Tensor, Q: Tensor, R: InputCost, M: Tensor, alpha: Tensor | None
    ) -> DareSolution:
        """Solve, through the shift (R6) by alpha (*batch,) if there is one, and certify."""
        if alpha is None:
            eliminated = _Eliminated.of(A, B, Q, R, M)
        else:
            shift = alpha[..., None, None]
            eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
            R_shifted = InputCost.of(R.dense() + shift * B.mT @ B)
            eliminated = _Eliminated.of(
                A, B, Q + shift * (A.mT @ A - eye), R_shifted, M + shift * B.mT @ A
            )
        D, iterations, broken = self._double(eliminated)
        P = D if alpha is None else shift * eye + D  # (R6)
        return self._certify(A, B, Q, R, M, P, D, eliminated, iterations, broken)

    def _double(self, problem: _Eliminated) -> tuple[Tensor, Tensor, Tensor]:
        """Return the limit of (R5), its steps, and what broke: 0, or a `DareResult` code."""
        A, G, H = problem.A, problem.G, problem.H
        n = A.shape[-1]
        eye = torch.eye(n, dtype=A.dtype, device=A.device)
        broken = torch.where(problem.cost.singular, DareResult.NONE, 0).long()
        running = broken == 0
        iterations = torch.zeros_like(broken)
        # The next step would change H by about the square of this one's relative change.
        floor = torch.finfo(A.dtype).eps ** 0.75
        check_every = 1 if A.device.type == "cpu" else 3
        for step in range(self.max_steps):
            W_solved, _ = torch.linalg.solve_ex(eye + G @ H, torch.cat([A, G], dim=-1))
            WA, WG = W_solved[..., :n], W_solved[..., n:]
            dH = _sym(A.mT @ H @ WA)
            H_next = H + dH  # (R5)
            finite, converged = _norm(H_next).isfinite(), _norm(dH) <= floor * _norm(H_next)
            iterations += running
            broken = torch.where(running & ~finite, DareResult.NON_FINITE, broken)
            running = running & finite
            H = torch.where(running[..., None, None], H_next, H)
            running = running & ~converged
            if (step + 1) % check_every == 0 and not running.any():
                break
            keep = running[..., None, None]
            A_next, G_next = A @ WA, _sym(G + A @ WG @ A.mT)  # (R5)
            A, G = torch.where(keep, A_next, A), torch.where(keep, G_next, G)
        broken = torch.where(running, DareResult.NOT_CONVERGED, broken)
        return H, iterations, broken

    def _certify(
        self,
        A: Tensor,
        B: Tensor,
        Q: Tensor,
        R: InputCost,
        M: Tensor,
        P: Tensor,
        D: Tensor,
        problem: _Eliminated,
        iterations: Tensor,
        broken: Tensor,
    ) -> DareSolution:
        """Form K by (R7) and judge P and K on the original equations (R1)."""
        eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        gain = Gain(B, D, problem, lu_factor(eye + D @ problem.G))
        K = problem.RM + problem.RB @ gain.loop.solve(D @ problem.A)  # (R7)
        A_cl = A - B @ K
        PA = P @ A_cl
        APA, BPA, RK, MK = A.mT @ PA, B.mT @ PA, R @ K, _times(K.mT, M).mT
        residual = torch.maximum(  # (R1) in the form P = A'P A_cl + Q - M'K, R K = M + B'P A_cl
            _relative(APA + Q - MK - P, P, APA, Q, MK), _relative(RK - M - BPA, RK, M, BPA)
        )
        radius = spectral_radius(A_cl, atol=1e-3)
        if (radius > 0.9).any():  # the bound must not be what keeps a stable loop from passing
            radius = spectral_radius(A_cl, squarings=26)
        finite = torch.stack([_largest(X) for X in (A, B, Q, R.block, M)]).isfinite().all(0)
        finite = finite & R.diagonal.isfinite().all(-1)
        edge = 10 * torch.finfo(P.dtype).eps ** 0.5
        solves = residual <= self.tolerance(P.dtype)
        result = torch.where(broken != 0, broken, DareResult.NOT_CONVERGED)
        result = torch.where(solves & (radius >= 1), DareResult.NONE, result)
        result = torch.where(solves & ((radius - 1).abs() <= edge), DareResult.BOUNDARY, result)
        result = torch.where(solves & (radius < 1 - edge), DareResult.STABILISING, result)
        result = torch.where(finite, result, DareResult.NON_FINITE)
        bad = (result != DareResult.STABILISING)[..., None, None]
        P, K = P.masked_fill(bad, float("nan")), K.masked_fill(bad, float("nan"))
        return DareSolution(P, K, radius, residual, iterations, result, gain)


def solve_dare(
    A: Tensor,
    B: Tensor,
    Q: Tensor,
    R: Tensor | InputCost,
    M: Tensor | None = None,
    *,
    solver: Doubling = Doubling(),
    throw: bool = True,
) -> DareSolution:
    """Solve the DARE (R1) for its stabilising solution P.

    Works in the dtype and on the device of the tensors; tested in float64 and float32. The linear
    terms of an LQR do not enter here: see `steady_state`.

    Args:
        A: State matrix, `(*batch, n, n)`; (A, B) must be stabilisable.
        B: Input matrix, `(*batch, n, m)`.
        Q: State cost, symmetric, `(*batch, n, n)`.
        R: Input cost, symmetric, `(*batch, m, m)`; damping belongs here (R_bar). An `InputCost`
            saves finding out which controls it couples.
        M: Cross cost, `(*batch, m, n)`; zero if `None`. SciPy's `s` is its transpose.
        solver: The algorithm and its tolerances.
        throw: Raise if an element has no stabilising solution. If `False`, inspect `result`.

    Returns:
        A `DareSolution`.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, or Q or R is not symmetric.
        ConvergenceError: If `throw` and an element failed.

    Example:
        >>> A, B = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.0], [1.0]])
        >>> Q, R = torch.tensor([[1.0, 2.0], [2.0, 4.0]]), torch.tensor([[1.0]])
        >>> dare = solve_dare(A, B, Q, R)
        >>> residual = A.mT @ dare.P @ A + Q - (B.mT @ dare.P @ A).mT @ dare.K - dare.P
        >>> bool(residual.abs().max() < 1e-5), dare.closed_loop_radius.item() < 1
        (True, True)
    """
    with torch.no_grad():
        solution = solver.solve(*_checked(A, B, Q, R, M))
    return solution.raise_if_failed() if throw else solution


def spectral_radius(A: Tensor, squarings: int = 12, atol: float = 0.0) -> Tensor:
    """Return the spectral radius of A (*batch, n, n) from above, by repeated squaring.

    By Gelfand's formula rho(A) <= ||A^k||_F^(1/k) for every k; here k = 2^squarings, which is
    tight to a relative error of about log(n cond)/k. Products only, so it stays on the device;
    a value below 1 certifies stability. Returns NaN for a matrix that holds NaN or inf.

    Args:
        A: `(*batch, n, n)`.
        squarings: Most squarings.
        atol: Stop (on the CPU) once a squaring lowers no element's bound by more than this.

    Example:
        >>> float(spectral_radius(torch.diag(torch.tensor([0.5, -0.9])))) - 0.9 < 1e-3
        True
    """
    tiny = torch.finfo(A.dtype).tiny
    norm = _norm(A)
    log_bound = norm.clamp(min=tiny).log()
    for k in range(1, squarings + 1):
        # A^(2^k) is exp(2^k log_bound) times a matrix of norm 1, squared here without overflow.
        A = A / norm.clamp(min=tiny)[..., None, None]
        A = A @ A
        norm = _norm(A)
        before, log_bound = log_bound, log_bound + norm.clamp(min=tiny).log() / 2**k
        if (
            atol > 0
            and A.device.type == "cpu"
            and not (before.exp() - log_bound.exp() > atol).any()
        ):
            break
    return torch.where(log_bound.isnan() | norm.isnan(), float("nan"), log_bound.exp())


def _times(X: Tensor, Y: Tensor) -> Tensor:
    """Return X Y; rows of Y that are zero, as most of M in a training step, cost nothing."""
    rows = (Y != 0).any(-1).reshape(-1, Y.shape[-2]).any(0).nonzero()[:, 0]
    if 2 * len(rows) > Y.shape[-2]:
        return X @ Y
    return X[..., rows] @ Y[..., rows, :]


def _shift(Q: Tensor, R: InputCost, M: Tensor) -> Tensor:
    """Return alpha of (R6) at the scale of the costs; far above it costs digits."""
    costs = torch.stack([_norm(Q), R.norm(), _norm(M)]).amax(0)
    return torch.where(costs > 0, costs, torch.ones_like(costs))


def _relative(error: Tensor, *terms: Tensor) -> Tensor:
    """Return the norm of an equation's error over that of its largest term."""
    scale = torch.stack([_norm(term) for term in terms]).amax(0)
    return _norm(error) / scale.clamp(min=torch.finfo(error.dtype).tiny)


def _checked(
    A: Tensor, B: Tensor, Q: Tensor, R: Tensor | InputCost, M: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, InputCost, Tensor]:
    if not isinstance(B, Tensor) or B.dim() < 2:
        got = str(tuple(B.shape)) if isinstance(B, Tensor) else type(B).__name__
        raise ValueError(f"B must be a tensor of shape (*batch, n, m), got {got}.")
    *batch, n, m = B.shape
    if M is None:
        M = B.new_zeros(*batch, m, n)
    expected = {
        "A": (A, (*batch, n, n)),
        "B": (B, (*batch, n, m)),
        "Q": (Q, (*batch, n, n)),
        "R": (R, (*batch, m, m)),
        "M": (M, (*batch, m, n)),
    }
    for name, (X, shape) in expected.items():
        right_type = isinstance(X, (Tensor, InputCost) if name == "R" else Tensor)
        if not right_type or X.shape != shape:
            got = str(tuple(X.shape)) if right_type else type(X).__name__
            raise ValueError(f"{name} must have shape {shape} to match B, got {got}.")
        if X.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} must be float32 or float64, got {X.dtype}.")
        if X.dtype != B.dtype or X.device != B.device:
            raise ValueError(
                f"{name} must be {B.dtype} on {B.device} like B, got {X.dtype} on {X.device}."
            )
    Q = _symmetric("Q", Q)
    if not isinstance(R, InputCost):
        return A, B, Q, InputCost.of(_symmetric("R", R)), M
    return A, B, Q, replace(R, block=_symmetric("R", R.block)), M


def _symmetric(name: str, X: Tensor) -> Tensor:
    if (_norm(X - X.mT) > torch.finfo(X.dtype).eps ** 0.5 * _norm(X)).any():
        raise ValueError(f"{name} must be symmetric.")
    return _sym(X)


def _sym(X: Tensor) -> Tensor:
    return (X + X.mT) / 2


def _norm(X: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(X)


def _largest(X: Tensor) -> Tensor:
    """Return the largest magnitude in X (*batch, i, j); NaN and inf come through."""
    if X.numel() == 0:
        return X.new_zeros(X.shape[:-2])
    return torch.linalg.vector_norm(X, float("inf"), dim=(-2, -1))
