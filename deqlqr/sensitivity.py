"""A model linearised at its fixed points: y(u + du) = y + J du, for any number of DEQ layers.

    (J2)  J = dy/du,  through every layer's S = (I - A)^-1 B

J is never formed. Products with J' and J are one implicit differentiation each; a backward pass
also brings the cotangents from which every sample's rows of J are made (`rows`).
"""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from deqlqr.controls import Controls
from deqlqr.deq import layers_of
from deqlqr.uses import Use, Uses

_TOGETHER = 16  # cotangents whose adjoint solves are done, and kept, at a time


class Sensitivity:
    """J of (J2) on one batch, kept as the graph of one forward pass.

    Args:
        model: Any module; its `DEQ` layers are solved once, here.
        controls: Its parameters.
        x: Inputs `(batch, ...)`.

    Attributes:
        outputs: y, detached, in single precision at least.
        uses: Where the model uses its parameters.
        mixing: An operation that mixes the samples of a batch, if the model has one.

    Raises:
        ConvergenceError: If a sample has no fixed point.
    """

    def __init__(self, model: nn.Module, controls: Controls, x: Tensor) -> None:
        self.controls = controls
        recorder = Uses(len(x))
        recorder.mark(x)
        with ExitStack() as stack:
            for layer in layers_of(model):
                stack.enter_context(layer.pinning(recorder))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(recorder)
            self._y = model(x)
        self.outputs = self._y.detach().to(torch.promote_types(self._y.dtype, torch.float32))
        self.uses: list[Use] = recorder.found
        self.mixing = recorder.mixing
        self._refused, self._cut, self._pins = recorder.refused, recorder.cut, recorder.pins
        self._pulled: tuple[Tensor, Tensor] | None = None

    def pull(self, c: Tensor) -> Tensor:
        """Return J'c (m,) for cotangents c of the outputs."""
        return self.controls.pull(self._y, c.to(self._y.dtype))

    def push(self, v: Tensor) -> Tensor:
        """Return J v, with the shape of the outputs, for v (m,): the derivative of (J'w)'v in w."""
        if self._pulled is None:
            with torch.enable_grad():
                w = torch.zeros_like(self._y, requires_grad=True)
                self._pulled = self.controls.pull(self._y, w, again=True), w
        pulled, w = self._pulled
        (pushed,) = torch.autograd.grad(pulled, w, v, retain_graph=True)
        return pushed.to(self.outputs.dtype)

    def cotangents(self, c: Tensor, tol: float | None = None) -> list[Tensor | None]:
        """Return g of every use, for cotangents c of the outputs; `None` for one without effect.

        Args:
            c: Cotangents, of the shape of the outputs.
            tol: Relative residual of the adjoint solves; `None` takes the layers'.

        Raises:
            ValueError: If the model uses a parameter in a way that has no gradient of samples.
        """
        return self.cotangents_of_each([c], tol)[0]

    def cotangents_of_each(
        self, cs: Sequence[Tensor], tol: float | None = None
    ) -> list[list[Tensor | None]]:
        """Return `cotangents` of each c; every DEQ layer solves for several of them together (G4).

        Args:
            cs: Cotangents, each of the shape of the outputs.
            tol: As in `cotangents`.

        Returns:
            For each c the g of every use, `(batch, ...)`.

        Raises:
            ValueError: As in `cotangents`.
        """
        if self._refused is not None:
            raise ValueError(self._refused)
        found: list[list[Tensor | None]] = []
        for begin in range(0, len(cs), _TOGETHER):
            found += self._pulled_through(cs[begin : begin + _TOGETHER], tol)
        return [self._for_uses(row) for row in found]

    def _pulled_through(self, cs: Sequence[Tensor], tol: float | None) -> list[list[Tensor | None]]:
        """Return what comes to the uses and pins: from the outputs, then from the last pin, ..."""
        ends = [*(use.edge for use in self.uses), *(edge for edge, _ in self._pins)]
        total = [self._brought(self._y, ends, c.to(self._y.dtype)) for c in cs]
        for place in reversed(range(len(self.uses), len(ends))):
            met = [row[place] for row in total]
            like = next((g for g in met if g is not None), None)
            if like is None:
                continue
            pin = self._pins[place - len(self.uses)][1]
            given = [torch.zeros_like(like) if g is None else g for g in met]
            for row, lam in zip(total, pin.costates(given, tol), strict=True):
                row[:place] = _sums(row[:place], self._brought(pin.fz, ends[:place], lam))
        return total

    def _brought(self, y: Tensor, ends: Sequence[GradientEdge], c: Tensor) -> list[Tensor | None]:
        """Return what comes to the ends without passing through a DEQ layer."""
        if not ends:
            return []
        self._cut.on = True
        try:
            return list(torch.autograd.grad(y, ends, c, retain_graph=True, allow_unused=True))
        finally:
            self._cut.on = False

    def _for_uses(self, found: Sequence[Tensor | None]) -> list[Tensor | None]:
        kept: dict[tuple, Tensor] = {}  # what is one tensor stays one: its uses belong together
        result: list[Tensor | None] = []
        for use, g in zip(self.uses, found, strict=False):
            if g is not None and g.dtype != use.operand.dtype:
                key = g.data_ptr(), g.shape, g.stride(), use.operand.dtype
                g = kept.setdefault(key, g.to(use.operand.dtype))
            result.append(g)
        return result


def _sums(gs: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the sums of two lists; what is one tensor in both stays one."""
    kept: dict[tuple, Tensor] = {}
    found: list[Tensor | None] = []
    for g, h in zip(gs, others, strict=True):
        if g is None or h is None:
            found.append(g if h is None else h)
            continue
        key = tuple((v.data_ptr(), v.shape, v.stride()) for v in (g, h))
        if key not in kept:
            kept[key] = g + h
        found.append(kept[key])
    return found
