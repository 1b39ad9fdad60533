"""The verb: solve z = f(z) for every sample of a batch, by a solver named or made."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deqlqr._checks import choice
from deqlqr.fallback import Fallback
from deqlqr.newton_krylov import NewtonKrylov
from deqlqr.solver import FixedPointSolution, RowMap, Solver
from deqlqr.solvers import Anderson, Broyden, Picard
from deqlqr.state import StateShape
from deqlqr.torchdeq_solver import TORCHDEQ, TorchDEQ

_BY_NAME: dict[str, Solver] = {
    "anderson": Anderson(),
    "picard": Picard(),
    "broyden": Broyden(),
    "newton-krylov": NewtonKrylov(),
    "fallback": Fallback(),
    **{f"torchdeq:{name}": TorchDEQ(name=name) for name in TORCHDEQ},
}


def make_solver(
    solver: str | Solver, tol: float | None = None, max_steps: int | None = None
) -> Solver:
    """Return a solver object from an object or a name, with tolerances replaced where given.

    Raises:
        ValueError: If the name is unknown or a tolerance is out of range.
    """
    if isinstance(solver, str):
        solver = _BY_NAME[choice("solver", solver, tuple(_BY_NAME))]
    if not isinstance(solver, Solver):
        raise ValueError(f"solver must be a name or a Solver, got {type(solver).__name__}.")
    changes: dict[str, Any] = {}
    if tol is not None:
        changes["tol"] = tol
    if max_steps is not None:
        changes["max_steps"] = max_steps
    return replace(solver, **changes)


def fixed_point(
    f: Callable[..., Any],
    z0: Any,
    *,
    inputs: Sequence[Tensor] = (),
    solver: str | Solver = "anderson",
    tol: float | None = None,
    max_steps: int | None = None,
    throw: bool = True,
) -> FixedPointSolution:
    """Solve z = f(z, *inputs) for every sample of a batch; no gradient is recorded.

    Samples that are done leave the batch, if what else f needs of a sample comes by `inputs`; a
    function of z alone is always given all samples.

    Args:
        f: Map of z, and the inputs, to the shape of z. Samples should not depend on each other.
        z0: Start, floating point, `(batch, *state)`, or a tuple of such tensors.
        inputs: Tensors `(batch, ...)` that f takes after z, sample by sample.
        solver: A solver object, or `"anderson"`, `"picard"`, `"broyden"`, `"newton-krylov"`,
            `"fallback"` (Anderson, damped, Newton-Krylov), `"torchdeq:anderson"`,
            `"torchdeq:broyden"`, `"torchdeq:fixed_point_iter"`,
            `"torchdeq:simple_fixed_point_iter"`.
        tol: Overrides the solver's tolerance of (FP1).
        max_steps: Overrides the solver's limit on evaluations.
        throw: Raise if a sample fails. If `False`, inspect `FixedPointSolution.result`.

    Returns:
        A `FixedPointSolution`.

    Raises:
        ValueError: If z0 is not floating point, f changes its shape, or an option is unknown.
        ConvergenceError: If `throw` and a sample did not converge.

    Example:
        >>> solution = fixed_point(torch.cos, torch.zeros(2, 3))
        >>> bool((torch.cos(solution.value) - solution.value).abs().max() < 1e-4)
        True
        >>> solution.converged
        tensor([True, True])
    """
    chosen = make_solver(solver, tol, max_steps)
    shape = StateShape.of(z0, "z0")
    batch = (z0 if shape.single else z0[0]).shape[0]
    for i, x in enumerate(inputs):
        if not isinstance(x, Tensor) or x.dim() < 1 or x.shape[0] != batch:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"inputs[{i}] must be a tensor of batch size {batch}, got {got}.")

    def flat(z: Tensor, *x: Tensor) -> Tensor:
        return shape.require(f(shape.unflatten(z), *x), len(z), "f must keep the shape of z")

    start = shape.flatten(z0).detach()
    rows = RowMap(flat, tuple(inputs), None if inputs else False)
    solution = solve_flat(rows, start, chosen)
    solution = replace(solution, value=shape.unflatten(solution.value))
    return solution.raise_if_failed() if throw else solution


def solve_flat(f: RowMap, z: Tensor, solver: Solver) -> FixedPointSolution:
    """Solve from z (batch, n), in float32 where z is in half precision; f sees the dtype of z."""
    dtype = z.dtype
    half = torch.finfo(dtype).bits < 32
    if half:
        inner = f.f
        f.f = lambda z, *x: inner(z.to(dtype), *x)
        z = z.float()
    with torch.no_grad():
        found = solver.solve(f, z)
    return replace(found, value=found.value.to(dtype)) if half else found
