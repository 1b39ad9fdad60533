"""The iterations: plain, Anderson and Broyden. Each is a `Solver` and what it remembers.

    (FP2)  Picard:    z <- z + relaxation r,   r = f(z) - z
    (FP3)  Anderson:  z <- f(z) - gamma' dF,   gamma = argmin || r - gamma' dR ||_2
    (FP4)  Broyden:   z <- z + H r,   H <- H + (dz - H y) (dz' H) / (dz' H y),   y = r_old - r

H of (FP4) approximates (I - A)^-1 and starts as I.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from deqlqr._checks import count
from deqlqr._linalg import full_precision, identity_like
from deqlqr.scratch import Scratch
from deqlqr.solver import Iterate, Memory, RowMap, Solver

# sin^2 of the angle between a difference and the span of others, below which it says nothing new.
_DEPENDENT = 1e-5
_FIRST = 2  # differences after which the first extrapolation comes, if not sooner
_RISEN = 1.1  # growth of a residual over its best that asks for an extrapolation at once
_WITHOUT_BLAS = 400  # terms of a product below which torch forms it slowly on the CPU
_TRAFFIC = 2**17  # numbers in a state, above which the time of a step is that of reading memory


@dataclass(frozen=True)
class Picard(Solver):
    """Plain iteration (FP2), damped where `relaxation` is below 1.

    Converges at the rate of the spectral radius of (1 - relaxation) I + relaxation A.

    Attributes:
        relaxation: Share of the step taken, in (0, 1].
    """

    relaxation: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a relaxation out of range.

        Raises:
            ValueError: If `relaxation` is not in (0, 1].
        """
        super().__post_init__()
        if not 0 < self.relaxation <= 1:
            raise ValueError(f"relaxation must lie in (0, 1], got {self.relaxation}.")

    def start(self, z: Tensor) -> Memory:
        """Return a memory of nothing."""
        return _Picard(self.relaxation)


class _Picard(Memory):
    def __init__(self, relaxation: float) -> None:
        self.relaxation = relaxation

    def propose(self, f: RowMap, at: Iterate) -> Tensor:
        if self.relaxation == 1:
            return at.fz
        return torch.add(at.z, at.r, alpha=self.relaxation)  # (FP2)


@dataclass(frozen=True)
class Anderson(Solver):
    """Anderson acceleration (FP3), type II, per sample, alternating with plain steps.

    The third step and every `period`-th after it are extrapolated, the others are plain: about as
    few evaluations as extrapolating always, at a fraction of the work. A sample whose residual has
    risen is extrapolated at once; one that is done if it falls once more as it did last is not.
    The least-squares problem is solved from normal equations with a ridge relative to each column;
    a difference that depends on newer ones is dropped. A sample whose residual exceeds
    `restart_ratio` times its best restarts from its best iterate with an empty memory.

    Attributes:
        memory: Differences kept. Each takes twice the size of a state.
        period: Steps from one extrapolation to the next; 1 is the classical method.
        ridge: Ridge relative to the columns' squares; `None` takes the machine epsilon.
        restart_ratio: Growth over the best residual that triggers a restart.

    References:
        H. Walker and P. Ni (2011). Anderson acceleration for fixed-point iterations.
        SIAM J. Numer. Anal. 49(4). doi:10.1137/10078356X.
        P. Pratapa, P. Suryanarayana and J. Pask (2016). Anderson acceleration of the Jacobi
        iterative method: an efficient alternative to Krylov methods. J. Comput. Phys. 306.
        doi:10.1016/j.jcp.2015.11.018.
    """

    memory: int = 16
    period: int = 4
    ridge: float | None = None
    restart_ratio: float = 10.0

    def __post_init__(self) -> None:
        """Refuse a memory that does not fit.

        Raises:
            ValueError: If `period` or `memory` is below 1, or `ridge` below 0.
        """
        super().__post_init__()
        count("period", self.period)
        count("memory", self.memory)
        if self.ridge is not None and not self.ridge >= 0:
            raise ValueError(f"ridge must be at least 0, got {self.ridge}.")

    def start(self, z: Tensor) -> Memory:
        """Return an empty memory for iterates like z (batch, n)."""
        return _Anderson(self, z)


class _Anderson(Memory):
    rows = ("gram", "fz", "r")

    def __init__(self, solver: Anderson, z: Tensor) -> None:
        batch, n, m = *z.shape, solver.memory
        # The differences only steer: float32 keeps the digits they need, at half the traffic.
        dtype = torch.float32 if z.numel() > _TRAFFIC and m > 1 else z.dtype
        self.scratch = Scratch(z, (m, batch, n), (m, batch, n), dtype=dtype)
        self.dF, self.dR = self.scratch.tensors  # of f(z), and of f(z) - z
        self.gram = z.new_empty(batch, m, m, dtype=dtype)
        ridge = torch.finfo(z.dtype).eps if solver.ridge is None else solver.ridge
        self.ridged = self.gram.new_ones(m, m).fill_diagonal_(1 + ridge)
        self.solver, self.fz, self.r = solver, z, z
        self.step = self.turn = 0  # iterates so far; differences at the last turn
        self.known = 0  # differences known to the Gram matrix
        self.least_growth = min(_RISEN, solver.restart_ratio)  # that asks for more than a step

    def pick(self, keep: Tensor) -> None:
        super().pick(keep)
        used = min(self.step, self.solver.memory)
        for name in ("dF", "dR"):
            old = getattr(self, name)
            new = old.new_empty(len(old), len(keep), old.shape[-1])
            torch.index_select(old[:used], 1, keep, out=new[:used])
            setattr(self, name, new)

    def place(self) -> Tensor | None:
        # After a plain step z is the last f(z), and the difference of f(z) is f(z) - z itself.
        in_place = self.step > 0 and self.fz.dtype == self.dF.dtype and self.solver.memory > 1
        return self.dF[self._slot()] if in_place else None

    def _slot(self) -> int:
        return (self.step - 1) % self.solver.memory

    def propose(self, f: RowMap, at: Iterate) -> Tensor:
        r = at.r
        if self.step > 0:
            dF, dR = self.dF[self._slot()], self.dR[self._slot()]
            if not at.plain or self.place() is None:
                dF.copy_(r if at.plain else at.fz - self.fz)
            if r.dtype != dF.dtype:
                r = dF if at.plain else r.to(dF.dtype)
            torch.sub(r, self.r, out=dR)
        elif r.dtype != self.dF.dtype:
            r = r.to(self.dF.dtype)
        self.fz, self.r, self.step = at.fz, r, self.step + 1
        z, new = at.fz, self.step - 1 - self.turn
        risen = at.growth is not None and (at.growth > self.least_growth).any()
        worse = at.growth if risen else None
        restart = None if worse is None else self._restart(worse)
        if new == self.solver.period or (self.turn == 0 and new == _FIRST):
            self.turn, z = self.step - 1, self._in_turn(at)
        elif worse is not None and new > 0:
            rows = (worse > _RISEN).nonzero()[:, 0]
            if len(rows):
                z = z.index_copy(0, rows, self._extrapolated_rows(rows))
        return z if restart is None else torch.where(restart[:, None], at.best_fz, z)

    def _in_turn(self, at: Iterate) -> Tensor:
        """Return the extrapolated iterates, and f(z) where that will do."""
        near = at.nearly_done()
        if near is None or not near.any():
            return self._extrapolated()
        return at.fz if near.all() else torch.where(near[:, None], at.fz, self._extrapolated())

    def _extrapolated(self) -> Tensor:
        """Return the iterates of (FP3), and take the new differences into the Gram matrix."""
        memory, last = self.solver.memory, self.step - 1
        used, begin = min(last, memory), max(self.known, last - memory)
        self.known = last
        dF, dR = (X[:used].transpose(0, 1) for X in (self.dF, self.dR))
        gram = self.gram[:, :used, :used]
        with full_precision(self.fz):
            for new in _slices(begin, last, memory):
                # Rows times a matrix: BLAS takes ten times as long over a matrix times columns.
                products = torch.bmm(dR[:, new], dR.mT) * self.ridged[new, :used]
                gram[:, new] = products
                gram[:, :, new] = products.mT
            return _mixed(self.fz, self.r, dF, dR, gram, (last - 1) % memory)

    def _extrapolated_rows(self, rows: Tensor) -> Tensor:
        """Return the iterates of (FP3) of some rows, out of turn: the others must not notice."""
        memory, last = self.solver.memory, self.step - 1
        used = min(last, memory)
        dF, dR = (X[:used].index_select(1, rows).transpose(0, 1) for X in (self.dF, self.dR))
        fz, r = self.fz.index_select(0, rows), self.r.index_select(0, rows)
        with full_precision(fz):
            gram = torch.bmm(dR, dR.mT) * self.ridged[:used, :used]
            return _mixed(fz, r, dF, dR, gram, (last - 1) % memory)

    def _restart(self, growth: Tensor) -> Tensor | None:
        """Empty the memory of the rows whose residual has grown too far; return which."""
        restart = growth > self.solver.restart_ratio
        if not restart.any():
            return None
        self.r = self.r.clone()  # it may lie in dF
        self.dF[:, restart], self.dR[:, restart] = 0.0, 0.0
        self.gram[restart] = identity_like(self.gram)
        return restart


def _slices(begin: int, end: int, size: int) -> list[slice]:
    """Return the places of begin ... end - 1, at most `size` of them, in a ring of that size."""
    first, last = begin % size, (end - 1) % size
    if first <= last:
        return [slice(first, last + 1)]
    return [slice(first, size), slice(0, last + 1)]


def _mixed(fz: Tensor, r: Tensor, dF: Tensor, dR: Tensor, gram: Tensor, newest: int) -> Tensor:
    """Return f(z) - gamma' dF (FP3) for the Gram matrix of dR."""
    right = torch.bmm(r[:, None], dR.mT).mT
    L, _ = torch.linalg.cholesky_ex(gram)  # where it fails, a diagonal entry is not positive
    left, whole = (X.diagonal(dim1=-2, dim2=-1) for X in (L, gram))
    good = left.square() > _DEPENDENT * whole  # what newer differences leave of a difference
    gamma = torch.cholesky_solve(right, L)
    if not good.all():
        bad = ~good.all(-1)
        gamma[bad] = _without_dependent(gram[bad], right[bad], newest)
    if dF[0].numel() < _WITHOUT_BLAS:
        return fz - (gamma * dF).sum(1)
    if fz.dtype == dF.dtype:
        return torch.baddbmm(fz[:, None], gamma.mT, dF, alpha=-1)[:, 0]
    return fz - torch.bmm(gamma.mT, dF)[:, 0]


def _without_dependent(gram: Tensor, right: Tensor, newest: int) -> Tensor:
    """Solve by elimination from the newest column to the oldest, past those that depend."""
    used = gram.shape[-1]
    scale = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    system = torch.cat([gram * inverse[..., None] * inverse[..., None, :],
                        right * inverse[..., None]], dim=-1)  # fmt: skip
    for age in range(used):
        p = (newest - age) % used
        pivot = system[:, p, p]
        row = system[:, p] * torch.where(pivot > _DEPENDENT, 1 / pivot, 0.0)[:, None]
        system = system - system[:, :, p, None] * row[:, None]
        system[:, p] = row
    return system[:, :, -1:] * inverse[..., None]


@dataclass(frozen=True)
class Broyden(Solver):
    """Broyden's good method (FP4), per sample, with limited memory.

    Attributes:
        memory: Updates kept; when they are used up the iteration restarts with H = I.
        restart_ratio: Growth over the best residual that triggers a restart of a sample.

    References:
        C. G. Broyden (1965). A class of methods for solving nonlinear simultaneous equations.
        Math. Comp. 19. doi:10.1090/S0025-5718-1965-0198670-6.
    """

    memory: int = 30
    restart_ratio: float = 10.0

    def __post_init__(self) -> None:
        """Refuse an empty memory.

        Raises:
            ValueError: If `memory` is below 1.
        """
        super().__post_init__()
        count("memory", self.memory)

    def start(self, z: Tensor) -> Memory:
        """Return an empty memory for iterates like z (batch, n)."""
        return _Broyden(self, z)


class _Broyden(Memory):
    rows = ("U", "V", "z", "r")

    def __init__(self, solver: Broyden, z: Tensor) -> None:
        self.solver, self.used = solver, 0
        batch, n, m = *z.shape, solver.memory
        self.scratch = Scratch(z, (batch, m, n), (batch, m, n), dtype=z.dtype)
        self.U, self.V = self.scratch.tensors  # H = I + U'V
        self.z, self.r, self.first = z, z, True

    def propose(self, f: RowMap, at: Iterate) -> Tensor:
        with full_precision(at.z):
            return self._proposed(at)

    def _proposed(self, at: Iterate) -> Tensor:
        if not self.first:
            self._update(at.z - self.z, self.r - at.r)
        self.z, self.r, self.first = at.z, at.r, False
        if at.growth is None:
            return at.z + self._times(at.r)  # (FP4)
        restart = at.growth > self.solver.restart_ratio
        if restart.any():
            self.U[restart], self.V[restart] = 0.0, 0.0
        return torch.where(restart[:, None], at.best_fz, at.z + self._times(at.r))

    def _update(self, dz: Tensor, y: Tensor) -> None:
        if self.used == self.solver.memory:
            self.used = 0
        Hy = self._times(y)
        U, V = self.U[:, : self.used], self.V[:, : self.used]
        dzH = torch.baddbmm(dz[:, None], torch.bmm(dz[:, None], U.mT), V)[:, 0]
        slope = (dzH * y).sum(-1, keepdim=True)
        tiny = (
            torch.finfo(y.dtype).eps * dzH.norm(dim=-1, keepdim=True) * y.norm(dim=-1, keepdim=True)
        )
        safe = slope.abs() > tiny
        self.U[:, self.used] = torch.where(safe, (dz - Hy) / slope, 0.0)
        self.V[:, self.used] = dzH
        self.used += 1

    def _times(self, r: Tensor) -> Tensor:
        """Return H r."""
        U, V = self.U[:, : self.used], self.V[:, : self.used]
        return torch.baddbmm(r[:, None], torch.bmm(r[:, None], V.mT), U)[:, 0]
