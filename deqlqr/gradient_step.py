"""A step of any first-order torch optimizer, taken like a step of `ImplicitNGD`."""

import torch
from torch import Tensor, nn

from deqlqr._checks import at_least
from deqlqr._linalg import all_finite
from deqlqr.layer_calls import calls_recorded
from deqlqr.loss import LossLike, make_loss
from deqlqr.monitor import penalty_of
from deqlqr.solution import ConvergenceError


class GradientStep:
    """A torch optimizer behind the interface of `ImplicitNGD.step`.

    Args:
        model: The model.
        optimizer: Any `torch.optim.Optimizer` of its parameters.
        loss: As for `ImplicitNGD`.
        penalty: Factor on the Jacobian penalty (J1) of every DEQ layer, added to the loss.

    Attributes:
        taken: Steps taken; it seeds the random vectors of the penalty.

    Raises:
        ValueError: If `penalty` is negative, the loss is unknown, or model or optimizer are none.

    Example:
        >>> from deqlqr import DEQ, DenseBlock
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(DEQ(DenseBlock(4)), nn.Linear(4, 3))
        >>> adam = torch.optim.Adam(model.parameters(), lr=0.1)
        >>> stepper = GradientStep(model, adam, "cross_entropy", penalty=0.1)
        >>> x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> losses = [float(stepper.step(x, y)) for _ in range(5)]
        >>> losses[-1] < losses[0]
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: LossLike = "cross_entropy",
        *,
        penalty: float = 0.0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be an nn.Module, got {type(model).__name__}.")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(f"optimizer must be a torch one, got {type(optimizer).__name__}.")
        self.model, self.optimizer, self.loss = model, optimizer, make_loss(loss)
        self.penalty = at_least("penalty", penalty, 0.0)
        self.taken = 0

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Take one step; the parameters stay as they were if it fails.

        Args:
            x: Inputs `(batch, ...)`.
            y: Targets `(batch, ...)`.

        Returns:
            The loss before the step, without the penalty.

        Raises:
            ValueError: If outputs and targets do not fit the loss.
            ConvergenceError: If a sample has no fixed point, whatever the layers' `on_failure`, or
                loss or gradient are not finite.
        """
        first: list[Tensor] = []

        def closure() -> Tensor:
            with calls_recorded(self.model) as calls:
                outputs = self.model(x)
                self.loss.check(outputs, y)
                loss = self.loss(outputs, y)
            if not first:
                first.append(loss.detach())
            for call in calls:
                if call.solution is not None:
                    call.solution.raise_if_failed("fixed point of the block")
            if not bool(loss.isfinite()):
                raise ConvergenceError(f"the loss is {float(loss.detach())}.")
            if self.penalty:
                loss = loss + self.penalty * penalty_of(calls, self.taken)
            self.optimizer.zero_grad()
            loss.backward()
            if not all_finite(p.grad for p in parameters if p.grad is not None):
                raise ConvergenceError("the gradient is not finite.")
            return loss.detach()

        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if isinstance(self.optimizer, torch.optim.LBFGS):
            before = [p.detach().clone() for p in parameters]
            try:
                self.optimizer.step(closure)
            except BaseException:  # in the middle of a line search
                with torch.no_grad():
                    for p, value in zip(parameters, before, strict=True):
                        p.copy_(value)
                raise
        else:
            closure()
            self.optimizer.step()
        self.taken += 1
        return first[0]
