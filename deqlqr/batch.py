"""A batch as the optimizer takes it: in chunks of samples, each linearised, used, and let go."""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from deqlqr._linalg import full_precision
from deqlqr.controls import Controls
from deqlqr.deq import DEQ, layers_of
from deqlqr.linearize_samples import check_input
from deqlqr.loss import Loss
from deqlqr.sensitivity import Sensitivity
from deqlqr.solver import FixedPointSolution


@dataclass(frozen=True)
class Chunk:
    """Some samples of a batch, linearised.

    Attributes:
        at: J of (J2).
        x: Inputs.
        y: Targets.
        cotangent: Gradient of the whole batch's mean loss in the chunk's outputs, `(count, k)`.
    """

    at: Sensitivity
    x: Tensor
    y: Tensor
    cotangent: Tensor


@dataclass(frozen=True)
class Batch:
    """The samples of a step.

    Attributes:
        model: The model.
        controls: Its parameters.
        loss: The loss.
        pieces: Inputs and targets of each chunk.
    """

    model: nn.Module
    controls: Controls
    loss: Loss
    pieces: Sequence[tuple[Tensor, Tensor]]

    @property
    def count(self) -> int:
        """Samples in all chunks."""
        return sum(len(x) for x, _ in self.pieces)

    @property
    def layers(self) -> list[DEQ]:
        """The model's DEQ layers."""
        return layers_of(self.model)

    def visit(
        self, take: Callable[[Chunk], Tensor | None], *, gradient_first: bool = True
    ) -> tuple[Tensor, Tensor, list[FixedPointSolution]]:
        """Linearise one chunk after the other and hand each to `take`, which autocast leaves alone.

        Args:
            take: What is to be done with a chunk. It may return the gradient of the chunk's share
                of the loss if that is not formed first.
            gradient_first: Form that gradient before `take`, else after it, if it has none.

        Returns:
            Mean loss, its gradient (m,), and the forward solves of the DEQ layers.

        Raises:
            ValueError: If data, model and loss do not fit together.
            ConvergenceError: If a sample has no fixed point, or an adjoint solve fails.
        """
        losses, gradients, solutions = [], [], []
        for x, y in self.pieces:
            chunk, cost = self.linearized(x, y)
            losses.append(cost)
            gradient = chunk.at.pull(chunk.cotangent) if gradient_first else None
            with full_precision(x):
                taken = take(chunk)
            gradient = taken if gradient is None else gradient
            gradients.append(chunk.at.pull(chunk.cotangent) if gradient is None else gradient)
            solutions += self.solutions()
        return torch.stack(losses).sum(), torch.stack(gradients).sum(0), solutions

    def linearized(self, x: Tensor, y: Tensor) -> tuple[Chunk, Tensor]:
        """Return one chunk linearised, and its share of the mean loss."""
        check_input(x, self.controls)
        at = Sensitivity(self.model, self.controls, x)
        self.solutions()
        self.loss.check(at.outputs, y)
        share = len(x) / self.count
        outputs = at.outputs.clone().requires_grad_()
        with torch.enable_grad():
            cost = self.loss(outputs, y) * share
        (cotangent,) = torch.autograd.grad(cost, outputs)
        return Chunk(at, x, y, cotangent), cost.detach()

    def loss_now(self) -> float:
        """Return the mean loss at the current parameters.

        Raises:
            ConvergenceError: If a sample has no fixed point.
        """
        pairs = self.outputs_now()
        return sum(float(self.loss(outputs, y)) * len(y) / self.count for outputs, y in pairs)

    @torch.no_grad()
    def outputs_now(self, near: Sequence[FixedPointSolution] = ()) -> list[tuple[Tensor, Tensor]]:
        """Return the outputs at the current parameters, with the targets, chunk by chunk.

        Args:
            near: Fixed points to start from: of every layer, chunk by chunk.

        Raises:
            ConvergenceError: If a sample has no fixed point.
        """
        layers, found = self.layers, []
        starts: Sequence[Any] = [s.value for s in near]
        if len(starts) != len(layers) * len(self.pieces):
            starts = [None] * (len(layers) * len(self.pieces))
        with statistics_held(self.model):
            for i, (x, y) in enumerate(self.pieces):
                with ExitStack() as stack:
                    own = starts[i * len(layers) : (i + 1) * len(layers)]
                    for layer, start in zip(layers, own, strict=True):
                        stack.enter_context(layer.starting_near(start))
                    found.append((self.model(x), y))
                self.solutions()
        return found

    def solutions(self) -> list[FixedPointSolution]:
        """Return the last forward solves.

        Raises:
            ConvergenceError: If a sample has no fixed point.
        """
        found = []
        for layer in self.layers:
            if layer.solution is not None:
                found.append(layer.solution.raise_if_failed("fixed point of the block"))
        return found


@contextmanager
def statistics_held(model: nn.Module) -> Generator[None, None, None]:
    """Leave the running statistics of batch normalisation as they are."""
    tracking = [
        module for module in model.modules()
        if isinstance(module, _NormBase) and module.training and module.track_running_stats
    ]  # fmt: skip
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


def require_independent(at: Batch) -> None:
    """Refuse a model in which one sample's output depends on another.

    Raises:
        ValueError: If it does, as with batch statistics.
    """
    x, y = max(at.pieces, key=lambda piece: len(piece[0]))
    if len(x) < 2:
        return
    with statistics_held(at.model):
        chunk, _ = at.linearized(x, y)
    half = torch.ones_like(chunk.at.outputs)
    half[: len(x) // 2] = 0.0
    worst, largest = 0.0, 0.0
    for g in chunk.at.cotangents(half):
        if g is not None:
            worst = max(worst, float(g[: len(x) // 2].abs().max()))
            largest = max(largest, float(g.abs().max()))
    if chunk.at.mixing is not None or not worst <= 1e-5 * largest:
        raise ValueError(
            "model mixes the samples of a batch, so that single samples have no gradient: switch "
            "batch statistics off with model.eval(), or take route='krylov'."
        )
