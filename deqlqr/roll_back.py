"""Parameters that a step has spoilt are found out at the next one, and left for those before."""

from collections.abc import Callable

from torch import Tensor

from deqlqr.batch import Batch
from deqlqr.controls import Controls
from deqlqr.direction import Local
from deqlqr.solution import ConvergenceError

_SUSPICIOUS = 2.0  # times the loss before: an unchecked step is looked at, and undone


def linearized_or_rolled_back(
    linearize: Callable[[], Local],
    at: Batch,
    controls: Controls,
    previous: Tensor | None,
    loss_before: float | None,
) -> tuple[Local, bool]:
    """Linearise at the current parameters, or, if they are bad, at those before the last step.

    Bad are parameters without a fixed point, and those of an unchecked step after which the loss
    is twice that of the same batch before it.

    Args:
        linearize: What linearises the model as it stands.
        at: The batch.
        controls: The parameters.
        previous: Those before the last step; `None` where there are none.
        loss_before: Loss before the last step if it was not checked, else `None`.

    Returns:
        The linearisation, and whether the previous parameters are back.

    Raises:
        ConvergenceError: If there is no fixed point here nor there; the parameters are as before.
    """
    current = controls.vector
    try:
        local: Local | None = linearize()
    except ConvergenceError:
        if previous is None:
            raise
        local = None
    if local is not None and (
        previous is None or not _worse(at, local, controls, current, previous, loss_before)
    ):
        return local, False
    assert previous is not None  # noqa: S101
    controls.assign(previous)
    try:
        return linearize(), True
    except BaseException:
        controls.assign(current)
        raise


def _worse(
    at: Batch,
    local: Local,
    controls: Controls,
    current: Tensor,
    previous: Tensor,
    last: float | None,
) -> bool:
    now = float(local.loss)
    if last is None or now <= _SUSPICIOUS * max(last, 1e-6):
        return False
    controls.try_out(previous)
    try:
        return not now <= _SUSPICIOUS * at.loss_now()
    except ConvergenceError:
        return False
    finally:
        controls.try_out(current)
