"""A model linearised at its fixed points: y(u + du) = y + J du, for any number of DEQ layers.

    (J2)  J = dy/du,  through every layer's S = (I - A)^-1 B

J is never formed. Products with J' and J are one implicit differentiation each; a backward pass
also brings the cotangents from which every sample's rows of J are made (`rows`).
"""

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from deqlqr.controls import Controls
from deqlqr.deq import layers_of
from deqlqr.uses import Use, Uses


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
        self._refused, self._precision = recorder.refused, recorder.precision
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
        if self._refused is not None:
            raise ValueError(self._refused)
        edges = [use.edge for use in self.uses]
        self._precision.tol = tol
        try:
            found = torch.autograd.grad(
                self._y, edges, c.to(self._y.dtype), retain_graph=True, allow_unused=True
            )
        finally:
            self._precision.tol = None
        kept: dict[tuple, Tensor] = {}  # what is one tensor stays one: its uses belong together
        result: list[Tensor | None] = []
        for use, g in zip(self.uses, found, strict=True):
            if g is not None and g.dtype != use.operand.dtype:
                key = g.data_ptr(), g.shape, g.stride(), use.operand.dtype
                g = kept.setdefault(key, g.to(use.operand.dtype))
            result.append(g)
        return result
