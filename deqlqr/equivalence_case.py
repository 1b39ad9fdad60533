"""A model with a batch, in float64, and the routes to its step that need no LQR."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from deqlqr.batch import Batch
from deqlqr.controls import Controls
from deqlqr.direction import Local
from deqlqr.divergence import Divergence, OutputDivergence
from deqlqr.equivalence_rows import EquivalenceRow, Skipped, compared
from deqlqr.kronecker import KroneckerMetric, dense_metric
from deqlqr.loss import Loss
from deqlqr.routes import Kronecker, Krylov, Memory, Output, Route, Sampled

GRADIENT_TOLERANCE = 1e-9
STEP_TOLERANCE = 1e-7
NO_LIMIT = 2**31  # what fits the composed problem is checked before
_TIGHT = Krylov(max_steps=2000, progress=0.0, tol=1e-11)


class Case:
    """A float64 copy of the model with its batch.

    Attributes:
        model: The copy.
        x: Inputs.
        y: Targets.
        loss: The loss.
        damping: delta.
        limit: Most controls for what forms an m x m matrix.
        max_states: Most states of the batch.
        controls: The copy's parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        loss: Loss,
        damping: float,
        limit: int,
        max_states: int,
    ) -> None:
        self.model = deepcopy(model).double()
        self.x = x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        self.y = y.double() if isinstance(y, Tensor) and y.is_floating_point() else y
        self.loss, self.damping, self.limit = loss, damping, limit
        self.max_states, self.controls = max_states, Controls(self.model)
        self.prepare()

    def prepare(self) -> None:
        """Look at the copy on its batch.

        Raises:
            ValueError: If there are more than `max_states` states.
        """
        raise NotImplementedError

    def require_states(self, states: int, what: str) -> None:
        """Refuse more than `max_states` states; `what` says which are counted.

        Raises:
            ValueError: If there are more.
        """
        if states > self.max_states:
            raise ValueError(
                f"x: batch x {what} must be at most max_states = {self.max_states}, got {states}; "
                "check fewer samples."
            )

    def rows(self, divergence: Divergence) -> list[EquivalenceRow]:
        """Return all rows.

        Args:
            divergence: That of the damped step.
        """
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """Return sizes and constants."""
        raise NotImplementedError

    def gradient(self) -> Tensor:
        """Return the gradient of the loss by autograd through the model as it is."""
        return self.controls.pull(self.loss(self.model(self.x), self.y))

    def matrix_free_rows(
        self, name: str, left: str, step: Callable[[], Tensor], divergence: OutputDivergence
    ) -> list[EquivalenceRow]:
        """Return the rows of the routes that need no LQR, compared with one that does.

        Args:
            name: What is computed.
            left: The route of `step`.
            step: The damped step.
            divergence: Its divergence.
        """
        row = lambda left, right, a, b: compared(name, left, right, a, b, STEP_TOLERANCE)
        output = lambda: self.step_by(Output(), divergence)
        krylov = lambda: self.step_by(_TIGHT, divergence)
        kron = self._local(Kronecker(), divergence)
        assert isinstance(kron, KroneckerMetric)  # noqa: S101
        sampled = lambda: self.step_by(Sampled(tol=None), divergence)
        same = lambda: self.explicit_step(divergence, sampled=True)
        solved = lambda: self._solved(kron)
        explicit = lambda: self._damped(dense_metric(kron.factors))
        return [
            row(left, "output space (W3)", step, output),
            row(left, "conjugate gradients (K2)", step, krylov),
            # Routes with a metric of their own, each beside it, explicit.
            row("sampled outputs (W3)", "explicit metric of the same samples", sampled, same),
            row("Kronecker factors (K5)", "explicit Kronecker products, dense", solved, explicit),
        ]

    def step_by(self, route: Route, divergence: Divergence) -> Tensor:
        """Return the step of `ImplicitNGD` by a route.

        Raises:
            Skipped: If the route has none.
        """
        return self._solved(self._local(route, divergence))

    def _local(self, route: Route, divergence: Divergence) -> Local:
        at = Batch(self.model, self.controls, self.loss, [(self.x, self.y)])
        return route.local(at, divergence, torch.float64, Memory())

    def _solved(self, local: Local) -> Tensor:
        found = local.solve([self.damping] * len(self.controls.parameters))
        if found.u is None:
            raise Skipped(str(found.reason))
        return found.u

    def explicit_step(self, divergence: OutputDivergence, *, sampled: bool = False) -> Tensor:
        """Return the step with the metric J'Lambda J / batch, J = dy/du by autograd.

        Lambda is c c' if sampled, c the random cotangents of the route `Sampled(tol=None)`.
        """
        self.require_few()
        y = self.model(self.x)
        rows = [self.controls.pull(output) for output in y.reshape(-1)]
        J = torch.stack(rows).reshape(*y.shape, self.controls.m)
        if sampled:
            generator = torch.Generator(y.device).manual_seed(0)
            c = divergence.sample(y.detach(), generator)
            Lambda = c[:, :, None] * c[:, None]
        else:
            Lambda = divergence.metric(y.detach())
        return self._damped(torch.einsum("bkm,bkl,bln->mn", J, Lambda, J) / y.shape[0])

    def _damped(self, C: Tensor) -> Tensor:
        """Return -(C + delta I)^-1 g."""
        self.require_few()
        eye = torch.eye(len(C), dtype=C.dtype, device=C.device)
        return -torch.linalg.solve(C + self.damping * eye, self.gradient())

    def require_few(self) -> None:
        """Skip what forms an m x m matrix where m is large.

        Raises:
            Skipped: If it is.
        """
        if self.controls.m > self.limit:
            raise self.too_many()

    def too_many(self) -> Skipped:
        """Return why an m x m matrix is not formed."""
        return Skipped(f"m = {self.controls.m} is above max_controls = {self.limit}")

    def probes(self) -> Tensor:
        """Return random directions, `(m, 3)`."""
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(self.controls.m, 3, generator=generator, dtype=torch.float64)
        return probes.to(self.controls.parameters[0].device)

    def hessian_products(self, directions: Tensor) -> Tensor:
        """Return the Hessian of the loss times directions (m, j), by double backward."""
        gradient = self.controls.pull(self.loss(self.model(self.x), self.y), again=True)
        products = [self.controls.pull(gradient @ v) for v in directions.T]
        return torch.stack(products, dim=1)
