"""A cycle of Riccati equations: one phase after the other, the last leading back to the first.

    (C1)  P_k = A_k'P_{k+1}A_k + Q_k - (M_k + B_k'P_{k+1}A_k)' K_k,   k = 0 ... p-1 and P_p = P_0
          K_k = (R_k + B_k'P_{k+1}B_k)^-1 (M_k + B_k'P_{k+1}A_k)

that is (R1) at every phase with P = P_k and P+ = P_{k+1}. States and controls may differ in number
from phase to phase. The closed loop around the cycle is the product of all A_k - B_k K_k; its
eigenvalues are the Floquet multipliers, and P is stabilising if all lie inside the unit disc.

Source: S. Bittanti, P. Colaneri, G. De Nicolao (1988), The difference periodic Riccati equation
for the periodic prediction problem, IEEE Trans. Automat. Control 33(8), doi:10.1109/9.1291.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from deqlqr._linalg import norm
from deqlqr.dare import Dare, Eliminated, Gain, error_of, gain_of
from deqlqr.input_cost import InputCost
from deqlqr.scan import Chain, following
from deqlqr.solution import DareResult
from deqlqr.spectral import closed_loop_radius


class Group(NamedTuple):
    """Phases of equal shapes, in one batch: with several, the phase is the first dimension."""

    phases: tuple[int, ...]
    dare: Dare

    def gather(self, X: Sequence[Tensor]) -> Tensor:
        """Return what belongs to the phases of the group, from what belongs to all."""
        return gathered(X, self.phases)

    def unbind(self, X: Tensor) -> Sequence[Tensor]:
        """Return what belongs to each phase of the group."""
        return (X,) if len(self.phases) == 1 else X.unbind(0)


def gathered(X: Sequence[Any], phases: Sequence[int]) -> Tensor:
    """Return one phase's tensor, or those of several stacked."""
    return X[phases[0]] if len(phases) == 1 else torch.stack([X[k] for k in phases])


class Cycle:
    """The equations (C1), phases of equal shapes in one batch.

    Attributes:
        groups: The phases.
        batch: Shape of the batch.
        sizes: n_k of every phase.
    """

    def __init__(self, groups: Sequence[Group], batch: torch.Size, sizes: Sequence[int]) -> None:
        self.groups, self.batch, self.sizes = tuple(groups), batch, tuple(sizes)

    @staticmethod
    def of(
        A: Sequence[Tensor],
        B: Sequence[Tensor],
        Q: Sequence[Tensor],
        R: Sequence[Tensor | InputCost],
        M: Sequence[Tensor],
    ) -> "Cycle":
        """Return the cycle of phases of matching shapes."""
        by_shape: dict[tuple, list[int]] = {}
        for k in range(len(A)):
            alone = (k,) if isinstance(R[k], InputCost) else ()
            by_shape.setdefault((A[k].shape, B[k].shape, *alone), []).append(k)
        groups = []
        for members in by_shape.values():
            phases = tuple(members)
            cost = InputCost.of(R[phases[0]] if len(phases) == 1 else gathered(R, phases))
            A_g, B_g, Q_g, M_g = (gathered(X, phases) for X in (A, B, Q, M))
            groups.append(Group(phases, Dare(A_g, B_g, Q_g, cost, M_g)))
        return Cycle(groups, A[0].shape[:-2], [X.shape[-1] for X in A])

    @property
    def dtype(self) -> torch.dtype:
        """Type of the coefficients."""
        return self.groups[0].dare.A.dtype

    @property
    def device(self) -> torch.device:
        """Device of the coefficients."""
        return self.groups[0].dare.A.device

    def _map(self, function: Callable[[Dare], Dare], batch: torch.Size) -> "Cycle":
        groups = [Group(g.phases, function(g.dare)) for g in self.groups]
        return Cycle(groups, batch, self.sizes)

    def to(self, dtype: torch.dtype) -> "Cycle":
        """Return the cycle in another dtype."""
        return self._map(lambda dare: dare.to(dtype), self.batch)

    def pick(self, index: Tensor | slice) -> "Cycle":
        """Return elements of the flattened batch, with one batch dimension."""
        every = range(self.batch.numel())
        count = len(every[index] if isinstance(index, slice) else index)
        return self._map(lambda dare: dare.pick(index, len(self.batch)), torch.Size([count]))

    def unbind(self, by_group: Iterable[Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
        """Return phase by phase what is given group by group."""
        found: list[tuple[Tensor, ...]] = [()] * len(self.sizes)
        for group, tensors in zip(self.groups, by_group, strict=True):
            parts = zip(*map(group.unbind, tensors), strict=True)
            for k, part in zip(group.phases, parts, strict=True):
                found[k] = part
        return found

    def reduce(self, by_group: Iterable[Tensor], how: Callable[..., Tensor]) -> Tensor:
        """Return a number of every phase, reduced to one for each element of the batch."""
        if len(self.sizes) == 1:
            return next(iter(by_group))
        dim = -1 - len(self.batch)
        return how(torch.cat([X if X.dim() > len(self.batch) else X[None] for X in by_group]), dim)

    def is_finite(self) -> Tensor:
        """Return per batch element whether all coefficients are finite."""
        return self.reduce((group.dare.is_finite() for group in self.groups), torch.all)

    def phases(self) -> list[Dare]:
        """Return the equations one by one."""
        tensors = ((*g.dare[:3], g.dare.R.diagonal, g.dare.R.block, g.dare.M) for g in self.groups)
        coupled = {k: g.dare.R.coupled for g in self.groups for k in g.phases}
        return [
            Dare(A, B, Q, InputCost(diagonal, coupled[k], block), M)
            for k, (A, B, Q, diagonal, block, M) in enumerate(self.unbind(tensors))
        ]


class Certificate(NamedTuple):
    """What is known of a P: see `CyclicDareSolution` for the fields."""

    A_cl: list[Tensor]
    defect: list[Tensor]  # right side less left side of (C1)
    loop: Tensor  # the closed loop around the cycle, from the first phase
    closed_loop_radius: Tensor
    residual: Tensor
    result: Tensor


def certify(
    cycle: Cycle, P: list[Tensor], gains: Sequence[Gain], broken: Tensor, rtol: float
) -> Certificate:
    """Judge P on (C1) and on the closed loop; how it was found does not matter.

    Args:
        cycle: The equations.
        P: Candidates `(*batch, n_k, n_k)`.
        gains: The gains, group by group.
        broken: 0, or the `DareResult` code with which the algorithm gave up, `(*batch,)`.
        rtol: Largest residual accepted.

    Returns:
        A `Certificate`.
    """
    ahead = following(P)
    errors = [
        error_of(group.dare, group.gather(P), group.gather(ahead), gain)
        for group, gain in zip(cycle.groups, gains, strict=True)
    ]
    A_cl, defect = map(list, zip(*cycle.unbind(error[:2] for error in errors), strict=True))
    residual = cycle.reduce((error.residual for error in errors), torch.amax)
    loop, log_scale = around(A_cl)
    bound, radius = closed_loop_radius(loop, log_scale)
    edge = 10 * torch.finfo(P[0].dtype).eps ** 0.5
    result = torch.where(broken != 0, broken, DareResult.NOT_CONVERGED)
    solves = (residual <= rtol) & (broken != DareResult.NONE)
    result = result.masked_fill(solves & (bound < 1 - edge), DareResult.STABILISING)
    if bool((result != 0).any()):
        result = result.masked_fill(solves & (bound >= 1 - edge), DareResult.BOUNDARY)
        result = result.masked_fill(solves & (bound > 1 + edge), DareResult.NONE)
        # What is not finite in the equation is not in its residual.
        result = torch.where(cycle.is_finite(), result, DareResult.NON_FINITE)
    whole = loop if len(A_cl) == 1 else loop * log_scale.exp()[..., None, None]
    return Certificate(A_cl, defect, whole, radius, residual, result)


def around(A_cl: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the product A_{p-1} ... A_0 and the log of a factor that it lacks, `(*batch,)`."""
    if len(A_cl) == 1:
        return A_cl[0], A_cl[0].new_zeros(A_cl[0].shape[:-2])

    def product(first: tuple[Tensor, ...], then: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        both = then[0] @ first[0]
        size = norm(both)
        size = torch.where(size > 0, size, torch.ones_like(size))
        return both / size[..., None, None], first[1] + then[1] + size.log()

    none = A_cl[0].new_zeros(A_cl[0].shape[:-2])
    loop, log_scale = Chain([(A, none) for A in A_cl], product).whole
    return loop, log_scale


class Found(NamedTuple):
    """A candidate P with its gain and certificate."""

    P: list[Tensor]
    K: list[Tensor]
    certificate: Certificate
    iterations: Tensor
    gains: Sequence[Gain] | None = None  # absent where elements come from different solves

    @property
    def stabilising(self) -> Tensor:
        """Boolean per batch element."""
        return self.certificate.result == DareResult.STABILISING

    def with_result(self, result: Tensor) -> "Found":
        """Return the candidate with other codes."""
        return self._replace(certificate=self.certificate._replace(result=result))

    def zip_with(self, combine: Callable[[Tensor, Tensor], Tensor], other: "Found") -> "Found":
        """Return the candidate whose tensors are `combine(mine, theirs)`."""
        mine, theirs = ((c.P, c.K, *c.certificate, c.iterations) for c in (self, other))
        P, K, *certificate, iterations = (
            tree_map(combine, *pair) for pair in zip(mine, theirs, strict=True)
        )
        return Found(P, K, Certificate(*certificate), iterations)


def judge(
    cycle: Cycle,
    P: list[Tensor],
    iterations: Tensor,
    broken: Tensor,
    rtol: float,
    eliminated: Sequence[Eliminated] | None = None,
) -> Found:
    """Return a candidate P with its gain and certificate."""
    ahead = following(P)
    gains = [
        gain_of(group.dare, group.gather(ahead), None if eliminated is None else eliminated[i])
        for i, group in enumerate(cycle.groups)
    ]
    K = [K for (K,) in cycle.unbind((gain.K,) for gain in gains)]
    return Found(P, K, certify(cycle, P, gains, broken, rtol), iterations, gains)


def choose(take: Tensor, a: Found, b: Found) -> Found:
    """Return a in the elements `take`, else b."""
    if take.all():
        return a
    if not take.any():
        return b

    def pick(x: Tensor, y: Tensor) -> Tensor:
        return torch.where(take.reshape(take.shape + (1,) * (x.dim() - take.dim())), x, y)

    return a.zip_with(pick, b)
