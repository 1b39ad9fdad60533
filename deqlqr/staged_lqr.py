"""An LQR of several phases or stages as plain data: its controls, its damping, its parts."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from deqlqr._checks import phase_count
from deqlqr.input_cost import InputCost

Problem = TypeVar("Problem", bound="StagedLQR")


@dataclass(frozen=True)
class StagedLQR:
    """What the cyclic and the finite-horizon LQR have in common; see `CyclicLQR`, `FiniteLQR`.

    Attributes:
        A: State matrices.
        B: Input matrices.
        Q: State costs.
        R: Input costs.
        M: Cross costs.
        a: Linear state costs.
        b: Linear input costs.
        controls: Which entries of a model's u are the controls of each phase.
    """

    A: Sequence[Tensor]
    B: Sequence[Tensor]
    Q: Sequence[Tensor]
    R: Sequence[Tensor | InputCost]
    M: Sequence[Tensor]
    a: Sequence[Tensor]
    b: Sequence[Tensor]
    controls: Sequence[Tensor] | None = None

    def __post_init__(self) -> None:
        """Keep tuples, and check every shape.

        Raises:
            ValueError: If one does not fit.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Sequence):
                object.__setattr__(self, field.name, tuple(value))
        self._check()
        self._check_controls()

    def _check(self) -> None:
        raise NotImplementedError

    def _check_controls(self) -> None:
        if self.controls is None:
            return
        phase_count(B=self.B, controls=self.controls)
        if any(index.device != self.A[0].device for index in self.controls):
            raise ValueError(f"controls must be on {self.A[0].device} like A[0].")
        every = torch.cat(list(self.controls)).sort().values
        if [len(index) for index in self.controls] != [B.shape[-1] for B in self.B] or not (
            torch.equal(every, torch.arange(len(every), device=every.device))
        ):
            raise ValueError(
                f"controls must hold the numbers 0 to {sum(self.m) - 1} once, m = {self.m} in the "
                f"phases, got {[index.tolist() for index in self.controls]}."
            )

    @property
    def n(self) -> tuple[int, ...]:
        """Number of states of every phase."""
        return tuple(Q.shape[-1] for Q in self.Q)

    @property
    def m(self) -> tuple[int, ...]:
        """Number of controls of every phase."""
        return tuple(B.shape[-1] for B in self.B)

    def damped(self: Problem, delta: float | Sequence[float | Tensor]) -> Problem:
        """Return the problem with R_k + delta_k I.

        Args:
            delta: One number, or one for each phase; a phase's may be a tensor `(m_k,)`.
        """
        shifts = [delta] * len(self.A) if isinstance(delta, (int, float)) else delta
        phase_count(A=self.A, delta=shifts)
        return replace(
            self, R=tuple(_damped(R, shift) for R, shift in zip(self.R, shifts, strict=True))
        )

    def dense(self: Problem) -> Problem:
        """Return the problem with every R_k as a matrix."""
        return replace(self, R=self._dense_R)

    @property
    def _dense_R(self) -> list[Tensor]:
        return [R.dense() if isinstance(R, InputCost) else R for R in self.R]

    def to(self: Problem, dtype: torch.dtype) -> Problem:
        """Return the problem in another dtype."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "controls"}
        turned = {name: Xs and [X.to(dtype) for X in Xs] for name, Xs in given.items()}
        return replace(self, **turned)

    def join(self, u: Sequence[Tensor]) -> Tensor:
        """Return all controls in one vector `(*batch, m)`, in the order of the model's u.

        Args:
            u: Those of every phase, `(*batch, m_k)`.

        Raises:
            ValueError: If they are not one tensor of the right size for each phase.
        """
        phase_count(B=self.B, u=u)
        if any(part.shape[-1] != m for part, m in zip(u, self.m, strict=True)):
            raise ValueError(
                f"u must have {self.m} controls in the phases, got "
                f"{tuple(part.shape[-1] for part in u)}."
            )
        return torch.cat(list(u), dim=-1) if self.controls is None else joined(u, self.controls)

    def split(self, u: Tensor) -> list[Tensor]:
        """Return the controls of every phase from all of them: the reverse of `join`.

        Raises:
            ValueError: If u does not have m controls in its last dimension.
        """
        if u.dim() == 0 or u.shape[-1] != sum(self.m):
            raise ValueError(f"u must have {sum(self.m)} controls, got shape {tuple(u.shape)}.")
        if self.controls is None:
            return list(u.split(self.m, dim=-1))
        return split_up(u, self.controls)


def joined(u: Sequence[Tensor], controls: Sequence[Tensor]) -> Tensor:
    """Return all controls in one vector `(*batch, m)`, from those of every phase."""
    flat = torch.cat(list(u), dim=-1)
    return torch.empty_like(flat).index_copy_(-1, torch.cat(list(controls)), flat)


def split_up(u: Tensor, controls: Sequence[Tensor]) -> list[Tensor]:
    """Return the controls of every phase `(*batch, m_k)`, from all of them."""
    return [u[..., index] for index in controls]


def _damped(R: Tensor | InputCost, delta: float | Tensor) -> Tensor | InputCost:
    if isinstance(R, InputCost):
        return R.damped(delta)
    return R + delta * torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
