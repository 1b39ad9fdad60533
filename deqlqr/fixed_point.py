"""Fixed points z = f(z) of batched maps: the verb, its solvers, and the solution they return.

Shapes: z and f(z) are (batch, *state). A solver works on z flattened to (batch, n). Every solver
judges each sample alone: one that has converged or failed is frozen and never spoils the others.

    (FP1)  residual_s = ||f(z_s) - z_s||_2,   converged:  residual_s <= tol * max(1, ||f(z_s)||_2)
    (FP2)  Picard:    z <- f(z)
    (FP3)  Anderson:  z <- f(z) - gamma' dF,   gamma = argmin || r - gamma' dR ||_2,   r = f(z) - z
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deqlqr.solution import ConvergenceError, FixedPointResult, describe_failures

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FixedPointSolution:
    """A fixed point per sample, with its certificate.

    Attributes:
        value: z, shape `(batch, *state)`. Where `result` is not 0: the best iterate seen.
        result: A `FixedPointResult` code per sample, int64, shape `(batch,)`.
        evaluations: Evaluations of f each sample needed, int64, shape `(batch,)`.
        residual: `||f(z) - z||_2` of `value`, per sample, shape `(batch,)`.
    """

    value: Tensor
    result: Tensor
    evaluations: Tensor
    residual: Tensor

    @property
    def converged(self) -> Tensor:
        """Boolean per sample, shape `(batch,)`."""
        return self.result == FixedPointResult.CONVERGED

    def raise_if_failed(self, what: str = "fixed point") -> "FixedPointSolution":
        """Return `self`, or raise naming the samples that failed.

        Raises:
            ConvergenceError: If any sample did not converge.
        """
        message = describe_failures(self.result, FixedPointResult, what)
        if message is not None:
            worst = float(self.residual.nan_to_num(nan=float("inf")).max())
            raise ConvergenceError(f"{message} Largest residual {worst:.2e}.", self)
        return self


@dataclass(frozen=True)
class Solver:
    """Base of all solvers: tolerances, and the loop that is written once.

    Attributes:
        tol: Tolerance of (FP1). `None` takes 1e-5 in float32 and 1e-10 in float64.
        max_steps: Most evaluations of f per sample.
        divergence_ratio: A residual this many times the first one is a divergence.
    """

    tol: float | None = None
    max_steps: int = 200
    divergence_ratio: float = 1e8

    def __post_init__(self) -> None:
        """Refuse tolerances that no solve can meet.

        Raises:
            ValueError: If `tol` is not positive or `max_steps` is below 1.
        """
        if self.tol is not None and not self.tol > 0:
            raise ValueError(f"tol must be positive, got {self.tol}.")
        if isinstance(self.max_steps, bool) or not isinstance(self.max_steps, int):
            raise ValueError(f"max_steps must be an int, got {self.max_steps!r}.")
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}.")

    def tolerance(self, dtype: torch.dtype) -> float:
        """Return `tol`, or the default for `dtype`."""
        if self.tol is not None:
            return self.tol
        return 1e-10 if dtype == torch.float64 else 1e-5

    @abstractmethod
    def start(self, z: Tensor) -> Any:
        """Return the solver's state before the first step; z is (batch, n)."""

    @abstractmethod
    def propose(self, state: Any, z: Tensor, fz: Tensor, residual: Tensor) -> Tensor:
        """Return the next iterate (batch, n) and update `state` in place."""

    def solve(self, f: Map, z: Tensor) -> FixedPointSolution:
        """Iterate from z (batch, n) until every sample has converged or failed."""
        tol = self.tolerance(z.dtype)
        # On a GPU reading the test on the host stalls the queue, so it is read now and then.
        check_every = 1 if z.device.type == "cpu" else 4
        batch = z.shape[0]
        result = torch.full((batch,), FixedPointResult.MAX_STEPS, device=z.device)
        running = torch.ones(batch, dtype=torch.bool, device=z.device)
        evaluations = torch.zeros(batch, dtype=torch.long, device=z.device)
        best = z.clone()
        best_residual = torch.full((batch,), float("inf"), dtype=z.dtype, device=z.device)
        first: Tensor | None = None
        state = self.start(z)
        for step in range(self.max_steps):
            fz = f(z)
            residual = torch.linalg.vector_norm(fz - z, dim=-1)
            finite = residual.isfinite()
            first = residual.clamp(min=1.0) if first is None else first
            done = residual <= tol * torch.linalg.vector_norm(fz, dim=-1).clamp(min=1.0)  # (FP1)
            diverged = finite & (residual > self.divergence_ratio * first)
            evaluations += running
            for code, mask in (
                (FixedPointResult.CONVERGED, done),
                (FixedPointResult.DIVERGED, diverged),
                (FixedPointResult.NON_FINITE, ~finite),
            ):
                result = torch.where(running & mask, code, result)
            improved = running & (done | (residual < best_residual))
            best = torch.where(improved[:, None], z, best)
            best_residual = torch.where(improved, residual, best_residual)
            running = running & ~(done | diverged | ~finite)
            if step % check_every == check_every - 1 and not running.any():
                break
            # A stopped sample stays where it is finite, and out of the solver's arithmetic.
            keep = running[:, None]
            z = torch.where(keep, self.propose(state, z, torch.where(keep, fz, z), residual), best)
        return FixedPointSolution(best, result, evaluations, best_residual)


@dataclass(frozen=True)
class Picard(Solver):
    """Plain iteration (FP2); converges at the rate of the spectral radius of df/dz."""

    def start(self, z: Tensor) -> None:
        """Plain iteration has no memory."""

    def propose(self, state: None, z: Tensor, fz: Tensor, residual: Tensor) -> Tensor:
        """Return f(z) (FP2)."""
        return fz


@dataclass
class _AndersonState:
    z: Tensor
    fz: Tensor
    dF: Tensor  # (batch, memory, n) differences of f(z); a row of zeros is unused
    dR: Tensor  # (batch, memory, n) differences of f(z) - z
    best_fz: Tensor
    best_residual: Tensor
    step: int = 0


@dataclass(frozen=True)
class Anderson(Solver):
    """Anderson acceleration (FP3), type II, per sample, with restarts.

    The small least-squares problem is solved from normal equations with unit columns and a ridge
    relative to them, in float64 whatever the type of z. A sample whose residual exceeds
    `restart_ratio` times its best restarts from its best iterate with an empty memory.

    Attributes:
        memory: Differences kept.
        ridge: Ridge relative to the unit columns; `None` takes 1e3 times the machine epsilon.
        restart_ratio: Growth over the best residual that triggers a restart.

    References:
        H. Walker and P. Ni (2011). Anderson acceleration for fixed-point iterations.
        SIAM J. Numer. Anal. 49(4). doi:10.1137/10078356X.
    """

    memory: int = 5
    ridge: float | None = None
    restart_ratio: float = 10.0

    def __post_init__(self) -> None:
        """Refuse an empty memory.

        Raises:
            ValueError: If `memory` is below 1.
        """
        super().__post_init__()
        if self.memory < 1:
            raise ValueError(f"memory must be at least 1, got {self.memory}.")

    def start(self, z: Tensor) -> _AndersonState:
        """Return an empty memory for iterates like z (batch, n)."""
        empty = z.new_zeros(z.shape[0], self.memory, z.shape[1])
        infinite = torch.full((z.shape[0],), float("inf"), dtype=z.dtype, device=z.device)
        return _AndersonState(z, z, empty, empty.clone(), z, infinite)

    def propose(self, state: _AndersonState, z: Tensor, fz: Tensor, residual: Tensor) -> Tensor:
        """Return the iterate of (FP3), or the best f(z) seen where the residual jumped."""
        restart = residual > self.restart_ratio * state.best_residual
        better = residual < state.best_residual
        state.best_fz = torch.where(better[:, None], fz, state.best_fz)
        state.best_residual = torch.where(better, residual, state.best_residual)
        r = fz - z
        if state.step > 0:
            slot = (state.step - 1) % self.memory
            state.dF[:, slot] = fz - state.fz
            state.dR[:, slot] = r - (state.fz - state.z)
            state.dF[restart] = 0
            state.dR[restart] = 0
        state.z, state.fz, state.step = z, fz, state.step + 1
        gamma = self._mix(state.dR, r)
        accelerated = fz - torch.einsum("bk,bkn->bn", gamma, state.dF)  # (FP3)
        return torch.where(restart[:, None], state.best_fz, accelerated)

    def _mix(self, dR: Tensor, r: Tensor) -> Tensor:
        """Return gamma (batch, memory) of (FP3); unused rows get 0."""
        ridge = 1e3 * torch.finfo(dR.dtype).eps if self.ridge is None else self.ridge
        scale = torch.linalg.vector_norm(dR, dim=-1).double()
        used = scale > 0
        inverse = torch.where(used, 1 / scale.where(used, torch.ones_like(scale)), 0.0)
        columns = dR.double() * inverse[..., None]
        gram = columns @ columns.mT
        gram.diagonal(dim1=-2, dim2=-1).add_(ridge + (~used).double())
        right = columns @ r.double()[..., None]
        gamma, _ = torch.linalg.solve_ex(gram, right)
        return (gamma[..., 0] * inverse).to(dR.dtype)


_TORCHDEQ = ("anderson", "broyden", "fixed_point_iter", "simple_fixed_point_iter")


@dataclass(frozen=True)
class TorchDEQ(Solver):
    """A solver of the package torchdeq, certified like our own.

    torchdeq iterates the batch until its slowest sample is done, so `evaluations` is one number
    for all samples (the last one is the certificate's). Its `tol` is taken on the relative
    residual; (FP1) then decides what counts as converged.

    Attributes:
        name: `"anderson"`, `"broyden"`, `"fixed_point_iter"` or `"simple_fixed_point_iter"`.
    """

    name: str = "anderson"

    def __post_init__(self) -> None:
        """Refuse names torchdeq does not have.

        Raises:
            ValueError: If `name` is unknown.
        """
        super().__post_init__()
        if self.name not in _TORCHDEQ:
            raise ValueError(f"name must be one of {_TORCHDEQ}, got {self.name!r}.")

    def start(self, z: Tensor) -> None:
        """Nothing: torchdeq keeps its own state."""

    def propose(self, state: None, z: Tensor, fz: Tensor, residual: Tensor) -> Tensor:
        """Not used: torchdeq runs its own loop."""
        raise NotImplementedError

    def solve(self, f: Map, z: Tensor) -> FixedPointSolution:
        """Run torchdeq from z (batch, n), then evaluate f once more for the certificate.

        Returns:
            A `FixedPointSolution`; `MAX_STEPS` where (FP1) does not hold.

        Raises:
            ConvergenceError: If torchdeq itself raises (its Anderson does on overflow).
        """
        from torchdeq.solver import get_solver

        count = 0

        def counted(z: Tensor, tau: float = 1.0) -> Tensor:  # one solver passes its damping, 1
            nonlocal count
            count += 1
            return f(z)

        tol = self.tolerance(z.dtype)
        steps = max(self.max_steps - 1, 1)
        try:
            value, _, _ = get_solver(self.name)(
                counted, z, max_iter=steps, tol=tol, stop_mode="rel"
            )
        except RuntimeError as error:
            raise ConvergenceError(f"torchdeq's solver {self.name!r} raised: {error}") from error
        fz = counted(value)
        residual = torch.linalg.vector_norm(fz - value, dim=-1)
        done = residual <= tol * torch.linalg.vector_norm(fz, dim=-1).clamp(min=1.0)  # (FP1)
        result = torch.where(done, FixedPointResult.CONVERGED, FixedPointResult.MAX_STEPS)
        result = torch.where(residual.isfinite(), result, FixedPointResult.NON_FINITE)
        return FixedPointSolution(value, result, torch.full_like(result, count), residual)


_BY_NAME: dict[str, Solver] = {
    "anderson": Anderson(),
    "picard": Picard(),
    **{f"torchdeq:{name}": TorchDEQ(name=name) for name in _TORCHDEQ},
}


def make_solver(
    solver: str | Solver, tol: float | None = None, max_steps: int | None = None
) -> Solver:
    """Return a solver object from an object or a name, with tolerances replaced where given.

    Raises:
        ValueError: If the name is unknown or a tolerance is out of range.
    """
    if isinstance(solver, str):
        if solver not in _BY_NAME:
            raise ValueError(f"solver must be one of {sorted(_BY_NAME)}, got {solver!r}.")
        solver = _BY_NAME[solver]
    if not isinstance(solver, Solver):
        raise ValueError(f"solver must be a name or a Solver, got {type(solver).__name__}.")
    changes: dict[str, Any] = {}
    if tol is not None:
        changes["tol"] = tol
    if max_steps is not None:
        changes["max_steps"] = max_steps
    return replace(solver, **changes)


def fixed_point(
    f: Map,
    z0: Tensor,
    *,
    solver: str | Solver = "anderson",
    tol: float | None = None,
    max_steps: int | None = None,
    throw: bool = True,
) -> FixedPointSolution:
    """Solve z = f(z) for every sample of a batch; no gradient is recorded.

    Args:
        f: Map from `(batch, *state)` to the same shape. Samples must not depend on each other.
        z0: Start, shape `(batch, *state)`, floating point.
        solver: A solver object, or `"anderson"`, `"picard"`, `"torchdeq:anderson"`,
            `"torchdeq:broyden"`, `"torchdeq:fixed_point_iter"`,
            `"torchdeq:simple_fixed_point_iter"`.
        tol: Overrides the solver's tolerance of (FP1).
        max_steps: Overrides the solver's limit on evaluations.
        throw: Raise if a sample fails. If `False`, inspect `FixedPointSolution.result`.

    Returns:
        A `FixedPointSolution`.

    Raises:
        ValueError: If z0 is not floating point, f changes its shape, or an option is unknown.
        ConvergenceError: If `throw` and a sample did not converge.

    Example:
        >>> solution = fixed_point(torch.cos, torch.zeros(2, 3))
        >>> bool((torch.cos(solution.value) - solution.value).abs().max() < 1e-4)
        True
        >>> solution.converged
        tensor([True, True])
    """
    chosen = make_solver(solver, tol, max_steps)
    if z0.dim() < 1 or not z0.is_floating_point():
        raise ValueError(
            f"z0 must be a floating-point tensor (batch, *state), got {z0.dtype} "
            f"of shape {tuple(z0.shape)}."
        )
    shape = z0.shape
    flat_shape = (shape[0], math.prod(shape[1:]))

    def flat(z: Tensor) -> Tensor:
        fz = f(z.reshape(shape))
        if fz.shape != shape:
            raise ValueError(
                f"f must keep the shape of z: expected {tuple(shape)}, got {tuple(fz.shape)}."
            )
        return fz.reshape(flat_shape)

    with torch.no_grad():
        found = chosen.solve(flat, z0.detach().reshape(flat_shape))
    solution = replace(found, value=found.value.reshape(shape))
    return solution.raise_if_failed() if throw else solution
