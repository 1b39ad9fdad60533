"""The stages of a finite-horizon LQR (L3) as plain data, with shape checks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deqlqr.input_cost import InputCost


@dataclass(frozen=True)
class Stage:
    """The matrices of a stage; a, b, c are columns `(*batch, n, 1)`."""

    A: Tensor
    B: Tensor
    Q: Tensor
    R: Tensor | InputCost
    M: Tensor
    a: Tensor
    b: Tensor
    c: Tensor


@dataclass(frozen=True)
class LastCost:
    """The cost of the last state; a is a column."""

    Q: Tensor
    a: Tensor


def finite_stages(
    A: Any, B: Any, Q: Any, R: Any, M: Any, a: Any, b: Any, c: Any
) -> tuple[list[Stage], LastCost]:
    """Return the stages and the cost of the last state, zeros in place of what is `None`.

    Stages of the very same tensors are one object.

    Raises:
        ValueError: If something does not fit.
    """
    given = {"A": A, "B": B, "Q": Q, "R": R, "M": M, "a": a, "b": b, "c": c}
    like, shapes = _shapes(A, B)
    batch = like.shape[:-2]
    filled: dict[str, list[Any]] = {}
    for name, expected in shapes.items():
        if given[name] is None and name in ("M", "a", "b", "c"):
            zeros = {shape: like.new_zeros(*batch, *shape) for shape in expected}
            filled[name] = [zeros[shape] for shape in expected]
            continue
        filled[name] = list(_sequence(name, given[name], len(expected)))
        for k, (X, shape) in enumerate(zip(filled[name], expected, strict=True)):
            require_shape(f"{name}[{k}]", X, (*batch, *shape), like)
    *Qs, Q_last = filled["Q"]
    *vs, a_last = filled["a"]
    rows = zip(filled["A"], filled["B"], Qs, filled["R"], filled["M"], vs, filled["b"], filled["c"],
               strict=True)  # fmt: skip
    stages: list[Stage] = []
    known: dict[tuple[int, ...], Stage] = {}
    for row in rows:
        *matrices, a_k, b_k, c_k = row
        columns = (v[..., None] for v in (a_k, b_k, c_k))
        stages.append(known.setdefault(tuple(map(id, row)), Stage(*matrices, *columns)))
    return stages, LastCost(Q_last, a_last[..., None])


def _shapes(A: Any, B: Any) -> tuple[Tensor, dict[str, list[tuple[int, ...]]]]:
    """Return the first A, and the shape of every matrix.

    Raises:
        ValueError: If A or B are not matrices.
    """
    count = len(_sequence("A", A, None))
    for name, Xs in (("A", A), ("B", _sequence("B", B, count))):
        for k, X in enumerate(Xs):
            if not isinstance(X, Tensor) or X.dim() < 2:
                got = str(tuple(X.shape)) if isinstance(X, Tensor) else type(X).__name__
                raise ValueError(
                    f"{name}[{k}] must be a tensor (*batch, rows, columns), got {got}."
                )
    if A[0].dtype not in (torch.float32, torch.float64):
        raise ValueError(f"A[0] must be float32 or float64, got {A[0].dtype}.")
    n, m = [*(X.shape[-1] for X in A), A[-1].shape[-2]], [X.shape[-1] for X in B]
    return A[0], {
        "A": list(zip(n[1:], n[:-1], strict=True)),
        "B": list(zip(n[1:], m, strict=True)),
        "Q": [(size, size) for size in n],
        "R": [(size, size) for size in m],
        "M": list(zip(m, n[:-1], strict=True)),
        "a": [(size,) for size in n],
        "b": [(size,) for size in m],
        "c": [(size,) for size in n[1:]],
    }


def _sequence(name: str, Xs: Any, count: int | None) -> Sequence[Any]:
    """Return Xs.

    Raises:
        ValueError: If it is no sequence, empty, or of another length than `count`.
    """
    what = "one for each stage" + (", and one for the last state" if name in ("Q", "a") else "")
    if isinstance(Xs, Tensor) or not isinstance(Xs, Sequence):
        raise ValueError(f"{name} must be a sequence, {what}, got {type(Xs).__name__}.")
    if len(Xs) == 0 or count not in (None, len(Xs)):
        raise ValueError(f"{name} must hold {count or 'at least 1'}, {what}, got {len(Xs)}.")
    return Xs


def require_shape(name: str, X: Any, shape: Sequence[int], like: Tensor) -> None:
    """Check a matrix; that called R may be an `InputCost`.

    Raises:
        ValueError: If it has another shape, dtype or device.
    """
    kinds = (Tensor, InputCost) if name.startswith("R") else (Tensor,)
    if not isinstance(X, kinds) or tuple(X.shape) != tuple(shape):
        got = str(tuple(X.shape)) if isinstance(X, kinds) else type(X).__name__
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {got}.")
    if X.dtype != like.dtype or X.device != like.device:
        raise ValueError(
            f"{name} must be {like.dtype} on {like.device} like A[0], got {X.dtype} on {X.device}."
        )
