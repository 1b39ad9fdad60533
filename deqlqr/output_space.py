"""The damped step in output space: without A, B, P or any m x m matrix.

Through the fixed point the outputs y of a sample depend on all controls by J = dy/du. With C a root
of the metric, C C' = Lambda, the curvature of (F3) is

    (W2)  S'QS + S'M' + M S + R = W'W,     W = C'J / sqrt(batch), all samples stacked

so that u of (F3), for damping D = delta I or one delta for each parameter, is

    (W3)  u = -D^-1 (g - W' v),    (I + W D^-1 W') v = W D^-1 g

a system of batch x rank(Lambda) unknowns in place of m. With one random c per sample in place of C,
E[c c'] = Lambda, the same formula has batch unknowns and an unbiased estimate of (W2).

If the loss of each sample has its gradient dJ_s/dy = C w in the metric's range, as the likelihood
has whose metric it is, the gradient in the controls is a sum of the rows, and takes no solve:

    (W5)  g = W'w / sqrt(batch),   J the mean of the samples' losses

Along u the outputs bend by y'' = d2 y(theta + h u) / dh2, which a trial evaluation shows. The
geodesic acceleration takes that back, to second order and as far as the damping lets it:

    (W4)  a = -(W'W + D)^-1 W' (C' y'' / sqrt(batch)) / 2,    theta <- theta + u + a

Source: Y. Ren, D. Goldfarb (2019), Efficient subsampled Gauss-Newton and natural gradient methods
for training neural networks, arXiv:1906.02353, for (W3); J. Martens (2020), New insights and
perspectives on the natural gradient method, JMLR 21(146), for the estimate; M. Transtrum,
J. Sethna (2012), Improvements to the Levenberg-Marquardt algorithm for nonlinear least-squares
minimization, arXiv:1201.5885, for (W4).
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deqlqr.batch import Batch, Chunk
from deqlqr.direction import Direction, expanded, promised
from deqlqr.divergence import OutputDivergence
from deqlqr.rows import Rows
from deqlqr.solver import FixedPointSolution

Draw = Callable[[Tensor], Tensor]

_ROUNDS = 3  # of refinement
_ENOUGH = 100  # times the rounding unit: no refinement below
_SMALL = 1e-3  # a cotangent that half precision may lose
_LARGEST = 10  # times a sum: its terms, which bring that much of their error


class OutputSpace:
    """A model's gradient and its rows W of (W2) on one batch.

    Attributes:
        loss: The mean loss.
        gradient: Its gradient `(m,)`.
        rows: W.
        outputs: y, `(batch, k)`.
        root: C / sqrt(batch), `(batch, k, r)`.
        solutions: The forward solves of the model's DEQ layers.
    """

    def __init__(
        self,
        loss: Tensor,
        gradient: Tensor,
        rows: Rows,
        outputs: Tensor,
        root: Tensor,
        solutions: Sequence[FixedPointSolution],
    ) -> None:
        self.loss, self.gradient, self.rows, self.solutions = loss, gradient, rows, solutions
        self.outputs, self.root = outputs, root
        self._grams: dict[tuple[int, ...], Tensor] = {}

    def solve(self, shifts: Sequence[float]) -> Direction:
        """Return u of (W3) for the damping of each parameter."""
        return self._solve(self.gradient, shifts)

    def correction(self, u: Tensor, after: Tensor, h: float, shifts: Sequence[float]) -> Tensor:
        """Return the geodesic acceleration of u (W4).

        Args:
            u: The direction `(m,)`.
            after: The outputs at theta + h u.
            h: Length of that trial.
            shifts: The damping of each parameter.
        """
        change = ((after - self.outputs)[:, None] @ self.root)[:, 0] / h
        bend = 2 / h * (change.to(u.dtype) - self.rows.times(u))
        a = self._solve(self.rows.transpose_times(bend), shifts).u
        return torch.zeros_like(u) if a is None else a / 2  # (W4)

    def _solve(self, g: Tensor, shifts: Sequence[float]) -> Direction:
        W = self.rows
        shift = expanded(shifts, W.sizes, g)
        few_controls = len(g) < W.count[0] * W.count[1]
        L, info = self._normal(shift) if few_controls else self._gram(shifts)
        if bool(info):
            return Direction(None, float("nan"), reason="the metric is not finite")
        best: Direction | None = None
        u, right = torch.zeros_like(g), -g
        for _ in range(_ROUNDS):
            if few_controls:
                u = u + torch.cholesky_solve(right[:, None], L)[:, 0]
            else:
                scaled = right / shift
                v = torch.cholesky_solve(W.times(scaled).view(-1, 1), L).view(W.count)
                u = u + scaled - W.transpose_times(v) / shift  # (W3)
            product = W.transpose_times(W.times(u))
            found = promised(u, g, product, shift)
            if best is not None and not found.residual < best.residual:
                break
            best = found
            if found.residual < _ENOUGH * torch.finfo(g.dtype).eps:
                break
            right = -(g + product + shift * u)
        assert best is not None  # noqa: S101
        return best

    def metric(self, d: Tensor) -> float:
        """Return d'C d."""
        return float(self.rows.times(d.to(self.gradient.dtype)).square().sum())

    def _gram(self, shifts: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return the Cholesky factor of I + W D^-1 W'."""
        places = defaultdict(list)
        for i, shift in enumerate(shifts):
            places[shift].append(i)
        total = None
        for shift, group in places.items():
            key = tuple(group)
            if key not in self._grams:
                self._grams[key] = self.rows.gram(group)
            part = self._grams[key] / shift
            total = part if total is None else total.add_(part)
        assert total is not None  # noqa: S101
        total.diagonal().add_(1.0)
        return torch.linalg.cholesky_ex(total)

    def _normal(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Return the Cholesky factor of W'W + D, for fewer controls than rows."""
        W = self.rows.dense().flatten(0, 1)
        return torch.linalg.cholesky_ex(W.mT @ W + torch.diag(shift))


def _rows(chunk: Chunk, C: Tensor, tol: float | None, dtype: torch.dtype) -> Rows:
    """Return the rows of the columns of C; small ones, of rare classes, are pulled as unit vectors.

    Otherwise they would vanish in half precision, or in the squares of single precision.
    """
    size = torch.linalg.vector_norm(C, dim=-2)
    if (size >= _SMALL).all():
        return Rows.of(chunk.at, C.unbind(-1), tol).to(dtype)
    size = torch.where(size > 0, size, 1.0)
    rows = Rows.of(chunk.at, (C / size[:, None]).unbind(-1), tol)
    return rows.to(dtype).scaled(size.to(dtype))


def _spans(C: Tensor, w: Tensor, c: Tensor) -> bool:
    """Return whether C w is c but for rounding, and no sum of terms that are much larger."""
    size = lambda v: torch.linalg.vector_norm(v, dim=-1)
    missing = size((C @ w[..., None])[..., 0] - c)
    terms = size(w * torch.linalg.vector_norm(C, dim=-2))
    # Of a sample that is right already c is all rounding: what counts is the sum over samples.
    rounding = _ENOUGH * torch.finfo(c.dtype).eps * size(c).amax()
    return bool(((missing <= rounding) & (terms <= _LARGEST * size(c) + rounding)).all())


def linearize_outputs(
    at: Batch,
    divergence: OutputDivergence,
    dtype: torch.dtype,
    draw: Draw | None = None,
    tol: float | None = None,
) -> OutputSpace:
    """Linearise the outputs of a model at its fixed points.

    Args:
        at: The batch.
        divergence: Gives the metric.
        dtype: Of the linear algebra.
        draw: Gives the random cotangents (batch, k, r) of outputs (batch, k); none for the
            metric's root C.
        tol: Relative residual of the rows' adjoint solves; `None` takes the layers'.

    Returns:
        An `OutputSpace`.

    Raises:
        ValueError: If data and model do not fit together, or the samples are not independent.
        ConvergenceError: If a sample has no fixed point, or an adjoint solve fails.
    """
    chunks: list[Rows] = []
    roots: list[Tensor] = []
    outputs: list[Tensor] = []

    def take(chunk: Chunk) -> Tensor | None:
        y = chunk.at.outputs
        C = (divergence.root(y) if draw is None else draw(y)) / at.count**0.5
        rows = _rows(chunk, C, tol, dtype)  # (W2)
        chunks.append(rows)
        roots.append(C)
        outputs.append(y)
        if draw is not None or not C.isfinite().all():
            return None
        c = chunk.cotangent.to(y.dtype)
        w = divergence.coordinates(y, c) * at.count**0.5
        return rows.transpose_times(w.to(dtype)) if _spans(C, w, c) else None  # (W5)

    loss, gradient, solutions = at.visit(take, gradient_first=draw is not None)
    return OutputSpace(
        loss, gradient.to(dtype), Rows.joined(chunks), torch.cat(outputs), torch.cat(roots),
        solutions,
    )  # fmt: skip
