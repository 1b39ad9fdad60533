"""Linear fixed points x = c + L x, i.e. (I - L)^-1, sample by sample, from products with L.

The adjoint (D1) and the tangent of an equilibrium are of this kind, with L = A' and L = A. Few
states: L is formed and I - L factorised once. Many: the generalised conjugate residual method

    (G1)  q = p - L p, orthonormal to the earlier q;   x <- x + (q'r) p,   r <- r - (q'r) q

whose pairs (p, q) are kept, so that every further right side starts from their span, as long as
that spares products: to orthogonalise against many of them costs more than a cheap product.

    (G2)  ||x - x*|| <= ||(I - L)^-1|| ||r||,   r = c - (I - L) x

Where a solve takes few products, a further right side that the pairs do not solve is given as many
at once, without a look at its residual in between:

    (G3)  p_k = L^k c,   q_k = p_k - p_(k+1),   x = sum gamma_k p_k,   ||c - sum gamma_k q_k|| least

Several right sides c_i that are there together get one power less each, if that comes near enough,
and then steps of (G1) in common, each along the combination of all residuals in which most of them
lies, measured by what is allowed:

    (G4)  p = sum_i w_i r_i / (tol ||c_i||),   w the leading left singular vector of these r_i

The norm in (G2) is exact where I - L is factorised, and (G2) then a bound. Where it is not, it is
estimated: by the pairs (p, q) if the solve converged, and by iterating r a little further if it did
not. A slow mode that is all but absent from the right side escapes that estimate.

Source: S. C. Eisenstat, H. C. Elman, M. H. Schultz (1983), Variational iterative methods for
nonsymmetric systems of linear equations, SIAM J. Numer. Anal. 20(2), doi:10.1137/0720023; for the
space of (G3) Y. Saad, M. H. Schultz (1986), GMRES, SIAM J. Sci. Stat. Comput. 7(3),
doi:10.1137/0907058.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from deqlqr._linalg import (
    LUFactor,
    full_precision,
    identity_like,
    least_norm,
    lu_factor,
    norm,
)
from deqlqr.linear_solution import LinearSolution, certified, side_by_side
from deqlqr.pairs import MOST_PAIRS, Pairs, leading
from deqlqr.powers import Powers

Product = Callable[[Tensor], Tensor]

_HELP = 0.8  # of the steps of a solve without pairs: what one with pairs may need
_TRIED = 2  # solves that need more, after which pairs are kept no longer, if states outnumber them
_WORTH = 0.95  # pairs at hand stay if they lower a residual to this share
_OWN = 0.5  # of a direction that no sample asked for: what earlier pairs must leave of it
_NEAR = 4.0  # times the goal: residuals that some common steps bring there
_DIGITS = 1e-2  # what normal equations may leave of the digits
_DRIFT = 0.1  # of the tolerance: how far the recursion's residual may be from the true one
_GOLDEN = 0.6180339887498949  # whose multiples differ most, less their whole parts
_SAID = 0.1  # of a right side's size: what a sum of several must have to speak for them
_REFINEMENTS = 3  # times the residual is formed anew
_FURTHER = 8  # products after a failure, to see how the error goes on


def matrix_of(product: Product, like: Tensor) -> Tensor:
    """Return the matrices (batch, n, n) of a product x (batch, n) -> L x, in n products."""
    columns = [product(e.expand_as(like)) for e in identity_like(like)]
    return torch.stack(columns, dim=-1)


class Resolvent:
    """(I - L)^-1, made once and applied to as many right sides as wanted.

    Args:
        product: x (batch, n) -> L x. Samples must be independent.
        tol: Largest `||c + L x - x|| / ||c||`.
        max_steps: Most products a right side may take.
        dense: Form L and factorise; costs n products.
    """

    def __init__(self, product: Product, *, tol: float, max_steps: int, dense: bool) -> None:
        self.product, self.tol, self.max_steps, self.dense = product, tol, max_steps, dense
        self.products = 0
        self._proven = 0  # most pairs with which a residual formed anew was the recursion's
        self._factor: tuple[LUFactor, Tensor] | None = None  # of I - L, and ||(I - L)^-1||
        self._pairs = Pairs()
        self._steps = 0  # of (G1)
        self._alone = 0  # steps of the last solve that had no pairs to start from
        self._unhelpful = 0  # solves in a row that the pairs did not help
        self._powers = Powers()
        self._at_once = 0  # powers of L that should do for this right side
        self._course: list[Tensor] = []  # of that solve: the largest residuals over the goal
        self._of = tol  # the tolerance of that solve
        self._jointly = True  # no attempt to solve for several has failed
        self._first: tuple[Tensor, Tensor, Tensor] | None = None  # c, x, r of an unchecked solve
        self._bound = torch.empty(0)  # of ||(I - L)^-1||, at the last right side

    def solve(
        self, right: Tensor, start: Tensor | None = None, tol: float | None = None
    ) -> LinearSolution:
        """Solve for right sides, by whatever earlier ones have left.

        Args:
            right: c, `(batch, n)` or `(batch, k, n)`.
            start: Where to start, of the same shape; zeros if `None`.
            tol: For this time, in place of the resolvent's.

        Returns:
            A `LinearSolution`.
        """
        tol = tol or self.tol
        several = right.dim() == 3
        rights = right if several else right[:, None]
        starts = None if start is None else start if several else start[:, None]
        if starts is not None:  # zero has the answer zero, which nothing else comes near enough to
            starts = starts.masked_fill((rights == 0).all(-1, keepdim=True), 0.0)
        if self.dense:
            found = self._solve_dense(rights, tol)
        else:
            found = self._solve_each(rights, starts, tol)
        return found if several else replace(found, value=found.value[:, 0])

    def _times(self, x: Tensor) -> Tensor:
        self.products += 1
        return self.product(x)

    def _solve_dense(self, rights: Tensor, tol: float) -> LinearSolution:
        batch, _, n = rights.shape
        spent = self.products
        if self._factor is None:
            L = matrix_of(self._times, rights[:, 0])
            unit = identity_like(L)
            lu = lu_factor(unit - L)
            self._factor = lu, norm(lu.solve(unit.expand(batch, n, n)))
        lu, size = self._factor
        x = lu.solve(rights.mT).mT
        # By a product, not by L: it shows a map that mixes the samples of the batch.
        r = self._residuals(rights, x)
        return certified(rights, x, r, size[:, None], self.products - spent, tol)

    def _residuals(self, rights: Tensor, x: Tensor) -> Tensor:
        sides = range(rights.shape[1])
        return torch.stack([rights[:, i] + self._times(x[:, i]) - x[:, i] for i in sides], 1)

    def _solve_each(self, rights: Tensor, starts: Tensor | None, tol: float) -> LinearSolution:
        """Solve right sides (batch, k, n), together (G4) if that will do."""
        count, spent = rights.shape[1], self.products
        found = self._solve_jointly(rights, starts, tol) if count > 1 else None
        if found is None or not found.converged.all():
            start = lambda i: None if starts is None else starts[:, i]
            parts = [self._solve_krylov(rights[:, i], start(i), tol) for i in range(count)]
            found = parts[0] if count == 1 else side_by_side(parts)
        return replace(found, evaluations=torch.full_like(found.result, self.products - spent))

    def _solve_jointly(
        self, rights: Tensor, starts: Tensor | None, tol: float
    ) -> LinearSolution | None:
        """Solve by (G4) where solves are short, which the first right side shows; else `None`."""
        if tol != self.tol or rights.shape[-1] <= MOST_PAIRS or not self._jointly:
            return None
        parts: list[LinearSolution] = []
        self._first = None
        if not self._alone:
            start = None if starts is None else starts[:, 0]
            parts.append(self._solve_krylov(rights[:, 0], start, tol, checked=False))
        if not self._is_short(rights[:, 0], tol):
            self._first = None
            return None
        spent, done = self.products, len(parts)
        c, x = rights[:, done:], None if starts is None else starts[:, done:]
        r = c if x is None else self._residuals(c, x)
        x, r = self._lowered_together(x, r, self._weights(c, tol))
        bound = self._inverse_norm(c)
        self._bound = bound.amax(-1)
        found = certified(c, x, r, bound, self.products - spent, tol)
        several = [(c, x, r), *([] if self._first is None else [self._first])]
        self._jointly = bool(found.converged.all()) and self._are_true(several, bound, tol)
        self._first = None
        if not self._jointly:
            self._pairs.clear()  # for they may be worn
            return None
        return side_by_side([*parts, found])

    @staticmethod
    def _weights(rights: Tensor, tol: float) -> Tensor:
        """Return 1 / (tol ||c||) of right sides (batch, k, n)."""
        return 1 / (tol * torch.linalg.vector_norm(rights, dim=-1).clamp(min=least_norm(rights)))

    def _lowered_together(
        self, x: Tensor | None, r: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Lower residuals (batch, k, n) by powers of their own and by common pairs."""
        self._powers.bound = None
        turn = lambda v: v.transpose(0, 1)
        count = self._powers_for(r, weights)
        if count:
            start, goal = None if x is None else turn(x), turn(_NEAR / weights)
            y, r = self._powers.reduce(start, turn(r), count, self._times, goal)
            x, r = turn(y), turn(r)
            self._powers.clear()
        elif x is None:
            x = torch.zeros_like(r)
        if self._pairs.count:
            with full_precision(r):
                x, r = self._pairs.reduce(x, r)
        for _ in range(min(r.shape[1], self.max_steps - count)):
            running = (torch.linalg.vector_norm(r, dim=-1) * weights > 1).any(-1)
            if not running.any():
                break
            with full_precision(r):
                p = leading(r, weights)
            self._next_pair(p, running)
            with full_precision(r):
                x, r = self._pairs.reduce(x, r, last=1)
        return x, r

    def _is_short(self, right: Tensor, tol: float) -> bool:
        """Return whether solves of right sides (batch, n) are known to take few products."""
        if right.shape[1] <= MOST_PAIRS or tol != self._of:
            return False
        if not 1 < self._alone <= min(Powers.most(right.dtype), self.max_steps):
            return False
        # Normal equations must leave enough digits.
        limit = _DIGITS / torch.finfo(right.dtype).eps ** 0.5
        return bool((self._bound <= limit).all())

    def _powers_for(self, r: Tensor, weights: Tensor) -> int:
        """Return how many powers bring residuals near the goal, by the course of a solve alone."""
        size = self._pairs.left(r) if self._pairs.count else torch.linalg.vector_norm(r, dim=-1)
        course, left = torch.stack(self._course), (size * weights).amax()
        done = ((course >= left).sum() - 1).clamp(min=0)
        return max(0, int(torch.where(left > _NEAR, (course > _NEAR).sum() - done, 0)))

    def _are_true(
        self, several: Sequence[tuple[Tensor, Tensor, Tensor]], bound: Tensor, tol: float
    ) -> bool:
        """Return whether the recursions' r are the residuals of x, by one product at most.

        Args:
            several: Right sides c, x and r, each (batch, k, n).
            bound: Of ||(I - L)^-1|| at the first of them.
            tol: Relative residual.
        """
        rights = several[0][0]
        if self._proven and len(several) == 1:
            size = torch.linalg.vector_norm(rights, dim=-1)
            goal = tol * size.clamp(min=least_norm(rights))
            if self._is_exact(bound, rights, goal, self._proven):
                return True
        count, totals = 0, [torch.zeros_like(rights[:, 0]) for _ in range(3)]
        asked = torch.zeros_like(rights[:, 0, 0], dtype=torch.bool)
        with full_precision(rights):
            for part in several:
                # Unequal shares: right sides that cancel in a plain sum do not in this.
                number = torch.arange(1, part[0].shape[1] + 1, device=rights.device) + count
                share = self._weights(part[0], tol) * (0.5 + (number * _GOLDEN) % 1.0)
                count += part[0].shape[1]
                asked |= (part[0] != 0).flatten(1).any(-1)
                for total, v in zip(totals, part, strict=True):
                    total += torch.bmm(share[:, None].to(v.dtype), v)[:, 0]
        c, x, r = totals
        said = tol * torch.linalg.vector_norm(c, dim=-1) >= _SAID
        drift = torch.linalg.vector_norm(c + self._times(x) - x - r, dim=-1)
        if not ((drift <= _DRIFT * count**0.5) & (said | ~asked)).all():
            return False
        if said.any():
            self._trust()
        return True

    def _trust(self) -> None:
        if self._pairs.count < MOST_PAIRS:
            self._proven = max(self._proven, self._pairs.count)

    def _solve_krylov(
        self, right: Tensor, start: Tensor | None, tol: float, *, checked: bool = True
    ) -> LinearSolution:
        """Solve from the pairs at hand, and from none if they lead nowhere: rounding wears them."""
        large = right.shape[1] > MOST_PAIRS
        if self._unhelpful == _TRIED and large:
            self._pairs.clear()
        self._at_once = self._alone if self._is_short(right, tol) else 0
        self._powers.bound = None
        worn, spent = self._pairs.count > 0, self._steps
        found = self._solve_once(right, start, tol, checked)
        if worn and not found.converged.all():
            self._pairs.clear()
            worn, spent = False, self._steps
            found = self._solve_once(right, start, tol, checked)
        if worn:
            helped = self._steps - spent <= _HELP * self._alone
            self._unhelpful = 0 if helped else self._unhelpful + 1
        else:
            self._alone, self._of = self._steps - spent, tol
        return found

    def _solve_once(
        self, right: Tensor, start: Tensor | None, tol: float, checked: bool
    ) -> LinearSolution:
        spent = self.products
        x = torch.zeros_like(right) if start is None else start.clone()
        r = right if start is None else right + self._times(x) - x
        goal = tol * torch.linalg.vector_norm(right, dim=-1).clamp(min=least_norm(right))
        true, rough = r, tol > torch.finfo(right.dtype).eps ** 0.5
        for again in range(_REFINEMENTS):
            x, r = self._reduced(x, true, goal, spent)
            self._bound = bound = self._inverse_norm(right)
            most = min(2 * self._proven, MOST_PAIRS - 1) if rough else self._proven
            trusted = not checked or (self._proven and self._is_exact(bound, right, goal, most))
            if trusted:
                true = r
                break
            true = right + self._times(x) - x
            drift = torch.linalg.vector_norm(true - r, dim=-1)
            if not again and (drift <= _DRIFT * goal).all() and right.any():
                self._trust()
            size = torch.linalg.vector_norm(true, dim=-1)
            if (size <= 2 * goal).all() or self.products - spent >= self.max_steps:
                break
        if not trusted:
            unseen = size > 2 * torch.linalg.vector_norm(r, dim=-1) + 2 * goal
            if len(right) > 1 and unseen.any() and self.products - spent < self.max_steps:
                return self._solve_together(right, x, spent, tol)
        if not checked:
            self._first = right[:, None], x[:, None], true[:, None]
        found = certified(
            right[:, None], x[:, None], true[:, None], bound[:, None], self.products - spent, tol
        )
        if found.converged.all():
            return found
        further = self._further(true) / torch.linalg.vector_norm(x, dim=-1).clamp(min=least_norm(x))
        return replace(found, error=torch.where(found.converged, found.error, further))

    def _is_exact(self, bound: Tensor, right: Tensor, goal: Tensor, most: int) -> bool:
        """Return whether the recursion's residual is as good as one formed anew.

        There are no more pairs than `most`, with as many as which, or half as many for a rough
        tolerance, it was compared, and rounding, which grows with them and their p, is far below
        the tolerance.
        """
        if self._pairs.count > most:
            return False
        terms = bound * torch.linalg.vector_norm(right, dim=-1)
        return bool((2 * torch.finfo(right.dtype).eps * terms <= _DRIFT * goal).all())

    def _reduced(self, x: Tensor, r: Tensor, goal: Tensor, spent: int) -> tuple[Tensor, Tensor]:
        """Lower the residual r of x: first by the pairs at hand, then by new ones."""
        fresh = not self._pairs.count and not self._at_once
        if self._pairs.count:
            with full_precision(r):
                x_next, r_next = (v[:, 0] for v in self._pairs.reduce(x[:, None], r[:, None]))
            size, before = (torch.linalg.vector_norm(v, dim=-1) for v in (r_next, r))
            # Pairs that do not help cost more than they save, now and later.
            if (size > _WORTH * before).all():
                self._pairs.clear()
            else:
                x, r = x_next, r_next
        if self._at_once and self.products - spent + self._at_once <= self.max_steps:
            x, r = self._shortly(x, r, goal)
        if fresh:
            self._course = []
        moved = True
        while moved and self.products - spent < self.max_steps:
            left = torch.linalg.vector_norm(r, dim=-1) / goal
            running = left > 1
            if fresh and len(left):
                self._course.append(left.amax())
            if not running.any():
                break
            x, r, moved = self._enlarge(x, r, running)
        return x, r

    def _shortly(self, x: Tensor, r: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """Lower the residual at once (G3), unless the pairs at hand spare products."""
        count, running = self._at_once, torch.linalg.vector_norm(r, dim=-1) > goal
        if not running.any():
            return x, r
        if self._pairs.count:
            x, r, _ = self._enlarge(x, r, running)
            two = self._course[:3][-1].clamp(min=1.0)
            if (torch.linalg.vector_norm(r, dim=-1) / goal).amax() <= two:
                return x, r  # one step from the pairs leaves no more than two from nothing
            self._pairs.clear()
            count -= 1
        self._steps += count
        one = self._powers.reduce(x[None], r[None], count, self._times, goal[None])
        return one[0][0], one[1][0]

    def _enlarge(self, x: Tensor, r: Tensor, running: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Take one step of (G1) in the samples `running`."""
        p, size_r = r, torch.linalg.vector_norm(r, dim=-1)
        for _ in range(2):
            p, q, usable = self._next_pair(p, running)
            step = torch.where(running, torch.linalg.vecdot(q, r), 0.0)[:, None]
            x, r_next = torch.addcmul(x, step, p), torch.addcmul(r, step, q, value=-1)
            size_next = torch.linalg.vector_norm(r_next, dim=-1)
            falls = size_next < 0.999 * size_r
            r, size_r = r_next, size_next
            moved = bool((usable & running).any())
            if falls.any() or not moved:
                break
            p = q  # r is orthogonal to (I - L) r: go on from the last direction instead
        return x, r, moved

    def _next_pair(self, p: Tensor, running: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add the pair of a direction p, zero where it is none; return it and where it is one."""
        self._steps += 1
        q = p - self._times(p)
        with full_precision(q):
            p, q, size, before = self._pairs.orthogonalise(p, q)
        # Where nobody asks for it p may be all rounding, and most of that lie in earlier pairs.
        lost = torch.where(running, 1e2 * torch.finfo(q.dtype).eps, _OWN)
        usable = size > lost * before
        inverse = torch.where(usable, 1 / size, 0.0)[:, None]
        p, q = p * inverse, q * inverse
        self._pairs.add(p, q)
        return p, q, usable

    def _solve_together(self, right: Tensor, x: Tensor, spent: int, tol: float) -> LinearSolution:
        """Solve for the whole batch as one sample, for its samples depend on each other."""
        shape, count = right.shape, len(right)
        joint = Resolvent(
            lambda v: self._times(v.view(shape)).view(1, -1),
            tol=tol,
            max_steps=self.max_steps - (self.products - spent),
            dense=False,
        )
        found = joint._solve_krylov(right.reshape(1, -1), x.reshape(1, -1), tol)
        each = lambda t: t.expand(count).clone()
        return LinearSolution(
            found.value.view(count, 1, -1), each(found.result),
            torch.full_like(each(found.result), self.products - spent),
            each(found.residual), each(found.error),
        )  # fmt: skip

    def _inverse_norm(self, right: Tensor) -> Tensor:
        """Return a bound of ||(I - L)^-1|| on the span of the q, which the p span as its image."""
        least, of_powers = torch.ones_like(right[..., 0]), self._powers.bound
        if of_powers is not None:
            least = of_powers.mT.view(least.shape)
        if not self._pairs.count:
            return least
        P = self._pairs.p
        # ||P||_2^2 is at most the largest row sum of |P P'|: no eigenvalues, which can fail.
        with full_precision(P):
            gram = P @ P.mT
        of_pairs = gram.abs().sum(-1).amax(-1).sqrt()
        return torch.maximum(of_pairs.view(-1, *[1] * (least.dim() - 1)), least)

    def _further(self, r: Tensor) -> Tensor:
        """Return about ||(I - L)^-1 r||: some terms of the series, and the tail by their ratio."""
        total, term = r, r
        sizes = [torch.linalg.vector_norm(r, dim=-1)]
        for _ in range(_FURTHER):
            term = self._times(term)
            total = total + term
            sizes.append(torch.linalg.vector_norm(term, dim=-1))
        ratio = (sizes[-1] / sizes[-4]) ** (1 / 3)
        tail = torch.where(ratio < 1, sizes[-1] * ratio / (1 - ratio), float("inf"))
        return torch.linalg.vector_norm(total, dim=-1) + tail
