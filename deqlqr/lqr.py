"""The LQR problem as plain data, with shape checks.

    (L1)  min sum_i  a'x_i + b'u_i + 1/2 x_i'Q x_i + u_i'M x_i + 1/2 u_i'R u_i
          with x_{i+1} = A x_i + B u_i

Source: thesis eq. 2.3.1 with the one-halves of eq. 3.2.5.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from deqlqr.input_cost import InputCost


@dataclass(frozen=True)
class LQR:
    """A time-invariant infinite-horizon LQR (L1); leading batch dimensions are free.

    Attributes:
        A: State matrix, `(*batch, n, n)`.
        B: Input matrix, `(*batch, n, m)`.
        Q: State cost, symmetric, `(*batch, n, n)`.
        R: Input cost, symmetric, `(*batch, m, m)`; what the package forms for itself is an
            `InputCost`, which does not store the zeros.
        M: Cross cost, `(*batch, m, n)` (SciPy's `s` is its transpose).
        a: Linear state cost, `(*batch, n)`.
        b: Linear input cost, `(*batch, m)`.

    Raises:
        ValueError: If the shapes, dtypes or devices do not fit together.
    """

    A: Tensor
    B: Tensor
    Q: Tensor
    R: Tensor | InputCost
    M: Tensor
    a: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        """Check every shape against that of B.

        Raises:
            ValueError: If one does not fit.
        """
        if self.B.dim() < 2:
            raise ValueError(f"B must have shape (*batch, n, m), got {tuple(self.B.shape)}.")
        *batch, n, m = self.B.shape
        shapes = {"A": (n, n), "Q": (n, n), "R": (m, m), "M": (m, n), "a": (n,), "b": (m,)}
        for name, shape in shapes.items():
            tensor, expected = getattr(self, name), (*batch, *shape)
            if tensor.shape != expected:
                raise ValueError(
                    f"{name} must have shape {expected} to match B {tuple(self.B.shape)}, "
                    f"got {tuple(tensor.shape)}."
                )
            if tensor.dtype != self.B.dtype or tensor.device != self.B.device:
                raise ValueError(
                    f"{name} must be {self.B.dtype} on {self.B.device} like B, got "
                    f"{tensor.dtype} on {tensor.device}."
                )

    @property
    def n(self) -> int:
        """Number of states."""
        return self.B.shape[-2]

    @property
    def m(self) -> int:
        """Number of controls."""
        return self.B.shape[-1]

    def damped(self, delta: float | Tensor) -> "LQR":
        """Return the problem with R_bar = R + delta I, or R + diag(delta) for a delta (m,)."""
        if isinstance(self.R, InputCost):
            return replace(self, R=self.R.damped(delta))
        eye = torch.eye(self.m, dtype=self.R.dtype, device=self.R.device)
        return replace(self, R=self.R + delta * eye)

    def dense(self) -> "LQR":
        """Return the problem with R as a matrix."""
        return replace(self, R=self.R.dense()) if isinstance(self.R, InputCost) else self

    def to(self, dtype: torch.dtype) -> "LQR":
        """Return the problem in another dtype."""
        return LQR(**{field.name: getattr(self, field.name).to(dtype) for field in fields(self)})
