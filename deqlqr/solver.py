"""What every fixed-point solver shares: the map it is given, the loop, the verdict per sample.

A solver works on states flattened to (batch, n), and judges each sample alone:

    (FP1)  residual_s = ||f(z_s) - z_s||_2,   converged:  residual_s <= tol * max(1, ||f(z_s)||_2)

A sample that has converged or failed leaves the batch that f is given, so its neighbours cost
nothing and never see it.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from deqlqr._checks import Options, count
from deqlqr.solution import ConvergenceError, FixedPointResult, describe_failures

_PROBED = 8  # rows, of those that go on, which show by themselves whether rows are independent
# The rows that run are gathered into a smaller batch where they are fewer than this share of those
# given to f, and those that do not would be more than this share of all that f was ever given.
_SHRINK, _IDLE = 7 / 8, 0.05


@dataclass(frozen=True)
class FixedPointSolution:
    """A fixed point per sample, with its certificate.

    Attributes:
        value: z, shape `(batch, *state)`, or a tuple of such. Where `result` is not 0: the best
            iterate seen.
        result: A `FixedPointResult` code per sample, int64, shape `(batch,)`.
        evaluations: Evaluations of f (and products with its Jacobian) each sample needed, int64,
            shape `(batch,)`.
        residual: `||f(z) - z||_2` of `value`, per sample, shape `(batch,)`.
        rows: Samples given to f, summed over all evaluations; at least the sum of `evaluations`.
    """

    value: Any
    result: Tensor
    evaluations: Tensor
    residual: Tensor
    rows: int

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
            worst = float(self.residual.nan_to_num(nan=float("inf"), posinf=float("inf")).max())
            raise ConvergenceError(f"{message} Largest residual {worst:.2e}.", self)
        return self


class RowMap:
    """A map f(z, *inputs) of z (batch, n) that can be restricted to some of its rows.

    Attributes:
        rows: Rows evaluated so far, over all restrictions.
        divisible: Whether rows may be left out: `None` until the first restriction has been
            compared with the whole. A map that mixes rows is not divisible.
        mixes: That comparison has shown that rows depend on each other.
    """

    def __init__(
        self,
        f: Callable[..., Tensor],
        inputs: tuple[Any, ...] = (),
        divisible: bool | None = None,
    ) -> None:
        self.f, self.inputs = f, inputs
        self.divisible, self.mixes = divisible, False
        self.rows = 0

    def __call__(self, z: Tensor) -> Tensor:
        """Return f(z); z may be a part of the batch after `restrict`."""
        self.rows += len(z)
        return self.f(z, *self.inputs)

    def f_at(self, z: Tensor) -> Tensor:
        """Return f(z) outside the accounts, for what is differentiated."""
        return self.f(z, *self.inputs)

    def restricted(self, keep: Tensor) -> "RowMap":
        """Return the map of the rows `keep`, as a part of this one's accounts."""
        part = RowMap(self.f, tuple(x.index_select(0, keep) for x in self.inputs), self.divisible)
        part.rows = self.rows
        return part

    def split(self, keep: Tensor, z: Tensor, fz: Tensor, tol: float) -> "RowMap":
        """Return the map of the rows `keep`, or this one if rows turn out to depend on others.

        Args:
            keep: Indices of rows.
            z: State of all rows.
            fz: f(z).
            tol: Relative change of f that would matter.
        """
        if self.divisible is False:
            return self
        if self.divisible is None:
            few = keep[:: max(1, len(keep) // _PROBED)]
            part = self.restricted(few)
            self.divisible = self._agrees(part, few, z, fz, tol)
            self.rows, self.mixes = part.rows, not self.divisible
        return self.restricted(keep) if self.divisible else self

    @staticmethod
    def _agrees(part: "RowMap", keep: Tensor, z: Tensor, fz: Tensor, tol: float) -> bool:
        try:
            alone = part(z.index_select(0, keep)).to(fz.dtype)
        except (RuntimeError, ValueError, IndexError):  # it insists on the whole batch's size
            return False
        together, norm = fz.index_select(0, keep), lambda v: torch.linalg.vector_norm(v, dim=-1)
        level = max(0.1 * tol, _resolution(fz.dtype))
        return bool((norm(alone - together) <= level * norm(together).clamp(min=1.0)).all())


def _resolution(dtype: torch.dtype) -> float:
    return 30 * torch.finfo(dtype).eps


@dataclass(frozen=True)
class Solver(Options):
    """Base of all solvers: tolerances, and the loop that is written once.

    Attributes:
        tol: Tolerance of (FP1). `None` takes 1e-10 where f returns float64, 1e-5 for float32,
            and twice the machine epsilon for half precision.
        max_steps: Most evaluations of f per sample.
        divergence_ratio: A residual this many times the first one is a divergence.
        patience: Every so many evaluations the best residual must have fallen by a thousandth,
            or the sample has stalled.
    """

    tol: float | None = None
    max_steps: int = 200
    divergence_ratio: float = 1e8
    patience: int = 50

    every_step: ClassVar[bool] = False  # the memory wants a verdict after each step

    def __post_init__(self) -> None:
        """Refuse tolerances that no solve can meet.

        Raises:
            ValueError: If `tol` is not positive or a number of steps is below 1.
        """
        if self.tol is not None and not self.tol > 0:
            raise ValueError(f"tol must be positive, got {self.tol}.")
        count("max_steps", self.max_steps)
        count("patience", self.patience)

    def tolerance(self, dtype: torch.dtype) -> float:
        """Return `tol`, or the default where f returns `dtype`."""
        if self.tol is not None:
            return self.tol
        if dtype in (torch.float64, torch.float32):
            return 1e-10 if dtype == torch.float64 else 1e-5
        return 2 * torch.finfo(dtype).eps

    @abstractmethod
    def start(self, z: Tensor) -> "Memory":
        """Return the memory before the first step; z is (batch, n)."""

    def solve(self, f: RowMap, z: Tensor) -> FixedPointSolution:
        """Iterate from z (batch, n) until every sample has converged or failed."""
        run = _Run(self, f, z)
        memory = self.start(z)
        for step in range(1, self.max_steps + 1):
            fz_raw = run.f(run.z)
            fz = fz_raw.to(z.dtype)
            growth, kept = run.judge(step, fz_raw, fz, memory)
            if kept is not None:
                memory.pick(kept)
                fz = fz.index_select(0, kept)
            if run.f.mixes or (run.over and run.fails_by_mixing(fz)):
                return self._solve_together(run, step)
            if run.over:
                break
            nearly_done = partial(run.nearly_done, fz)
            at = Iterate(run.z, fz, run.r, growth, run.best_fz, run.plain, nearly_done)
            z = memory.propose(run.f, at)
            run.advance(z, plain=z is fz)
        return run.solution()

    def _solve_together(self, run: "_Run", steps: int) -> FixedPointSolution:
        """Solve for the whole batch as one sample, for its samples depend on each other."""
        whole, batch = run.f, run.z.shape
        joint = RowMap(lambda z: whole(z.view(batch)).view(1, -1), divisible=False)
        found = self.solve(joint, run.z.reshape(1, -1))
        value = found.value.view(batch)
        residual = torch.linalg.vector_norm(whole(value).to(value.dtype) - value, dim=-1)
        result = found.result.repeat(batch[0])
        evaluations = (found.evaluations + steps).repeat(batch[0])
        return FixedPointSolution(value, result, evaluations, residual, whole.rows)


class Iterate(NamedTuple):
    """Where a solve stands: tensors (batch, n) unless said otherwise.

    Attributes:
        z: Iterate.
        fz: f(z).
        r: f(z) - z.
        growth: Residual over the best one seen before, `(batch,)`; `None` where all rows improved.
        best_fz: f at the best iterate of each row.
        plain: z is the last f(z), of all rows.
        nearly_done: Returns which rows are done if the residual falls once more as it did in this
            step, boolean, `(batch,)`; `None` where that is not known.
    """

    z: Tensor
    fz: Tensor
    r: Tensor
    growth: Tensor | None
    best_fz: Tensor
    plain: bool
    nearly_done: Callable[[], Tensor | None]


class Memory:
    """What a solver remembers of its past iterates.

    Attributes:
        rows: Names of the attributes that have a row for each sample.
        work: Products with the Jacobian so far.
    """

    rows: tuple[str, ...] = ()
    work: int = 0

    def pick(self, keep: Tensor) -> None:
        """Keep the rows `keep` only."""
        _pick(self, self.rows, keep)

    def place(self) -> Tensor | None:
        """Return where f(z) - z of a plain step should be formed, if that matters."""
        return None

    @abstractmethod
    def propose(self, f: RowMap, at: Iterate) -> Tensor:
        """Return the next iterate (batch, n); f is for products with its Jacobian."""


def _pick(owner: object, names: tuple[str, ...], keep: Tensor) -> None:
    for name in names:
        setattr(owner, name, getattr(owner, name).index_select(0, keep))


class _Run:
    """One solve: the rows still running, and the verdicts on those that are not."""

    rows = ("z", "r", "size", "before", "best_z", "best_fz", "best", "anchor", "index", "limit")

    def __init__(self, solver: Solver, f: RowMap, z: Tensor) -> None:
        batch, device = len(z), z.device
        self.solver, self.f, self.z = solver, f, z
        self.tol: float | None = None
        # On a GPU reading the test on the host stalls the queue, so it is read now and then.
        self.check_every = 1 if device.type == "cpu" or solver.every_step else 4
        self.value = torch.empty_like(z)  # every row is given in the end
        self.result = torch.full((batch,), int(FixedPointResult.MAX_STEPS), device=device)
        self.evaluations = torch.zeros(batch, dtype=torch.long, device=device)
        self.residual = torch.full((batch,), float("inf"), dtype=z.dtype, device=device)
        self.index = torch.arange(batch, device=device)  # of the rows in z
        self.frozen: Tensor | None = None  # rows of z that have their verdict
        self.idle = 0  # times that f was given such a row
        self.best_z, self.best_fz, self.best = z, z, self.residual
        self.size: Tensor | None = None  # residual of each row
        self.before = self.residual  # the best residual before it
        self.anchor = self.residual  # the best residual `patience` steps ago
        self.bound: Tensor | None = None  # of the residual that is enough, from above
        self.plain = False  # z is the last f(z)
        self.running, self.over = batch, batch == 0
        self.r: Tensor = None  # type: ignore[assignment]
        self._own: list[Tensor] = []  # memory of two residuals

    def judge(
        self, step: int, fz_raw: Tensor, fz: Tensor, memory: Memory
    ) -> tuple[Tensor | None, Tensor | None]:
        """Test every row by (FP1); return its growth, and the rows kept if some left."""
        self._subtract(fz, memory)
        last = step == self.solver.max_steps
        if step % self.check_every and not last and step != 1:
            self.bound = self.size = None
            return None, None
        self.size = size = torch.linalg.vector_norm(self.r, dim=-1)
        self.before = self.best
        if self.tol is None:
            self.tol = self.solver.tolerance(fz_raw.dtype)
            self.limit = self.solver.divergence_ratio * size.clamp(min=1.0)
        bound, self.bound = self.bound, None
        ordinary = self.frozen is None and not last and step % self.solver.patience
        if ordinary and self.plain and bound is not None:
            # |f(z)| <= |z| + |r|, and z is the last f(z): mostly that spares reading f(z).
            bound = torch.add(bound, size, alpha=self.tol)
            if self._goes_on(size, fz, bound):
                return None, None
        enough = self._enough(fz)
        if ordinary and self._goes_on(size, fz, enough):
            return None, None
        if self.frozen is not None and self._depends(size, enough):
            self.f.mixes = True
            return None, None
        return self._sort(step, fz, size, enough, memory)

    def _enough(self, fz: Tensor) -> Tensor:
        """Return the residual that is enough (FP1), of each row."""
        return torch.linalg.vector_norm(fz, dim=-1).clamp_(min=1.0).mul_(self.tol)

    def nearly_done(self, fz: Tensor) -> Tensor | None:
        """Return which rows are done if the residual falls once more as it did in this step."""
        if self.size is None or self.check_every > 1:  # then it is not the last step's rate
            return None
        return self.size.square() <= self.before * self._enough(fz)

    def _goes_on(self, size: Tensor, fz: Tensor, enough: Tensor) -> bool:
        """Take the iterate as the best one if every row has improved, and none has converged."""
        if not ((size > enough) & (size < self.best)).all():
            return False
        self.best_z, self.best_fz, self.best, self.bound = self.z, fz, size, enough
        return True

    def _depends(self, size: Tensor, enough: Tensor) -> bool:
        """Return whether a row that had converged, and has stayed, has lost it: rows mix."""
        assert self.frozen is not None  # noqa: S101  asked only where rows have stayed
        moved = self.frozen > (size <= 2 * enough)
        if not moved.any():
            return False
        return bool((self.result[self.index[moved]] == FixedPointResult.CONVERGED).any())

    def fails_by_mixing(self, fz: Tensor) -> bool:
        """Return whether samples failed and f, given only as a whole, makes them depend on others.

        Found out by moving one row, in one more evaluation.
        """
        failed = (self.result == FixedPointResult.STALLED) | (
            self.result == FixedPointResult.MAX_STEPS
        )
        if self.f.divisible is not False or len(self.z) < 2 or not failed.any():
            return False
        moved = self.z.clone()
        moved[0] = 1.5 * moved[0] + 0.1
        change = (self.f(moved).to(fz.dtype) - fz)[1:]
        return bool(torch.linalg.vector_norm(change) > _resolution(fz.dtype) * fz.norm())

    def _subtract(self, fz: Tensor, memory: Memory) -> None:
        """Form r = f(z) - z where it is wanted, or over the last but one: fresh pages cost much."""
        place = memory.place() if self.plain else None
        if place is not None:
            self.r = torch.sub(fz, self.z, out=place)
            return
        out = self._own.pop(0) if len(self._own) == 2 else None
        fits = out is not None and out.shape == fz.shape
        self.r = torch.sub(fz, self.z, out=out) if fits else fz - self.z
        self._own.append(self.r)

    def _sort(
        self, step: int, fz: Tensor, size: Tensor, enough: Tensor, memory: Memory
    ) -> tuple[Tensor | None, Tensor | None]:
        """Give their verdict to the rows that are done or lost, and let them leave."""
        growth, done = size / self.best, (size <= enough) & (size < float("inf"))
        better = done | (size < self.best)
        if self.frozen is not None:  # those rows are where they were best
            better, done = better | self.frozen, done > self.frozen
        improved = bool(better.all())
        if improved:
            self.best_z, self.best_fz, self.best = self.z, fz, size
        else:
            self.best_z = torch.where(better[:, None], self.z, self.best_z)
            self.best_fz = torch.where(better[:, None], fz, self.best_fz)
            self.best = torch.where(better, size, self.best)
        leaving, result = done, None
        if not improved or step == self.solver.max_steps or step % self.solver.patience == 0:
            result = self._verdict(step, size, done)
            leaving = result >= 0 if self.frozen is None else (result >= 0) > self.frozen
        gone = leaving.nonzero()[:, 0]
        if len(gone) == 0 and self.frozen is None:
            return growth, None
        if len(gone):
            self._leave(gone, result, step + memory.work)
        if self.over:
            return None, None
        frozen = leaving if self.frozen is None else self.frozen | leaving
        # The start is often zero, where no dependence would show.
        known = step > 1 or self.f.divisible is not None
        idle = self.idle + (len(frozen) - self.running) * self.check_every
        many = self.running <= _SHRINK * len(frozen) and idle > _IDLE * self.f.rows
        if known and many:
            left = (~frozen).nonzero()[:, 0]
            if self._shrink(left, fz):
                return growth.index_select(0, left), left
        self.frozen, self.idle = frozen, idle
        return growth, None

    def _leave(self, gone: Tensor, result: Tensor | None, evaluations: int) -> None:
        """Note the best iterates of the rows `gone`, and their codes; `None` is converged."""
        self.running -= len(gone)
        self.over = self.running == 0
        if len(gone) == len(self.value):
            # A copy, for an iterate may be the start, or what f returned, which are not ours.
            self.value, self.residual = self.best_z.clone(), self.best
            rows = gone
        else:
            rows = self.index.index_select(0, gone)
            self.value.index_copy_(0, rows, self.best_z.index_select(0, gone))
            self.residual.index_copy_(0, rows, self.best.index_select(0, gone))
        if result is None:
            self.result.index_fill_(0, rows, int(FixedPointResult.CONVERGED))
        else:
            self.result.index_copy_(0, rows, result.index_select(0, gone))
        self.evaluations.index_fill_(0, rows, evaluations)

    def _verdict(self, step: int, size: Tensor, done: Tensor) -> Tensor:
        """Return the code of each row, or -1 where it goes on."""
        more = int(FixedPointResult.MAX_STEPS) if step == self.solver.max_steps else -1
        result = torch.full_like(self.index, more)
        if step % self.solver.patience == 0:
            stalled = self.best > 0.999 * self.anchor
            result = result.masked_fill(stalled, int(FixedPointResult.STALLED))
            self.anchor = self.best
        lost = ~(size <= self.limit)
        if lost.any():
            result = result.masked_fill(lost, int(FixedPointResult.DIVERGED))
            result = result.masked_fill(~size.isfinite(), int(FixedPointResult.NON_FINITE))
        return result.masked_fill(done, int(FixedPointResult.CONVERGED))

    def _shrink(self, left: Tensor, fz: Tensor) -> bool:
        """Keep only the rows `left` in the batch, if the map allows it."""
        assert self.tol is not None  # noqa: S101  set by the first verdict
        part = self.f.split(left, self.z, fz, self.tol)
        if part is self.f:
            return False
        self.f, self.frozen = part, None
        _pick(self, _Run.rows, left)
        return True

    def advance(self, z: Tensor, plain: bool) -> None:
        """Take the next iterate, plainly f(z) or not; a row with its verdict stays."""
        self.plain = plain and self.frozen is None
        self.z = z if self.frozen is None else torch.where(self.frozen[:, None], self.best_z, z)

    def solution(self) -> FixedPointSolution:
        return FixedPointSolution(
            self.value, self.result, self.evaluations, self.residual, self.f.rows
        )
