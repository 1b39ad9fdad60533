"""The norm of a dense or convolutional layer, and weights whose norm cannot exceed a bound.

For W = U S V', a function f of the singular values that is odd makes f(W) = U f(S) V'. Its
derivative along E is, with F = U'EV, F+ and F- the symmetric and skew parts of F (Daleckii, Krein),

    U (G- o F+ + G+ o F-) V'  +  (I - UU') E V (f/s) V'  +  U (f/s) U'E (I - VV')             (SB2)
    G-_ij = (f_i - f_j) / (s_i - s_j),    G+_ij = (f_i + f_j) / (s_i + s_j)

with f' in place of a quotient 0/0: it stays finite where singular values are equal, or zero.
"""

from collections.abc import Callable
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from deqlqr._checks import at_least, choice, one_forward_level
from deqlqr._linalg import full_precision
from deqlqr.held import held

How = Literal["scale", "project", "normalise"]

_TIE = 1e3  # machine precisions, relative: singular values this close to the largest equal it
_SMALLEST = 1e-12  # norm below which a matrix has no direction


def operator_norm(weight: Tensor) -> Tensor:
    """Return the norm of the linear map with this weight, or a bound on it, as a scalar tensor.

    Of a matrix the exact 2-norm. Of a kernel (out, in, *k) a bound on the convolution's norm on
    images of any size, zero-padded or circular, of any stride and dilation:

        prod(k)^1/2  min_r ||weight as the matrix r||_2                                       (SB1)

    over the 2^d matrices r that take each of the d kernel axes to the rows, with `out`, or to the
    columns, with `in`. Half precision is computed in float32. Where the largest singular value is
    not alone, the derivative is the mean over its singular vectors.

    Args:
        weight: (out, in), or (out, in, *k) with one to three kernel axes.

    Raises:
        ValueError: If the weight does not have 2 to 5 dimensions or is not real floating point.
        RuntimeError: Within a forward derivative of a forward derivative.

    Source: S. Singla, S. Feizi (2021), Fantastic Four: differentiable bounds on singular values of
    convolution layers, arXiv:1911.10258, theorem 1.

    Example:
        >>> operator_norm(torch.tensor([[3.0, 0.0], [0.0, -4.0]])).item()
        4.0
    """
    _require_weight("weight", weight)
    one_forward_level("operator_norm")
    # Over all frequencies w the convolution is the matrix sum_k K_k exp(i w'k), which is one of
    # the matrices r between two stacks of phases of norms prod(k of the rows)^1/2, and of the
    # columns. Zero padding is a part of a circular convolution of a larger image, a stride drops
    # outputs, a dilation multiplies w.
    return held("operator_norm", lambda: _wide_norm(weight), weight).to(weight.dtype)


def _wide_norm(weight: Tensor) -> Tensor:
    """Return the norm in float32 at least."""
    norms = torch.stack([_Norm.apply(matrix) for matrix in _matrices(_wide(weight))])
    return norms.amin(0) * prod(weight.shape[2:]) ** 0.5  # (SB1)


def within(weight: Tensor, max_norm: float) -> Tensor:
    """Return weight min(1, max_norm / operator_norm(weight)).

    It has at most that norm, up to rounding of its entries to their dtype.

    Args:
        weight: As for `operator_norm`.
        max_norm: Above 0.

    Raises:
        ValueError: If the weight does not fit.
    """
    _require_weight("weight", weight)
    one_forward_level("within")
    factor = lambda: max_norm / _wide_norm(weight).clamp(min=max_norm)
    scaled = lambda: (_wide(weight) * factor()).to(weight.dtype)
    return held(("within", max_norm), scaled, weight)


def clipped(weight: Tensor, max_norm: float) -> Tensor:
    """Return the weight nearest to this one with norm at most `max_norm`.

    Of a matrix, singular values above `max_norm` are set to it. Of a kernel (out, in, *k) those of
    the matrix (out, in prod(k)) above max_norm / prod(k)^1/2: by (SB1) the convolution's norm is
    then at most `max_norm`. Second derivatives are right where the singular values differ from each
    other and from the bound; where they do not, they may be NaN.

    Args:
        weight: As for `operator_norm`.
        max_norm: Above 0.

    Raises:
        ValueError: If the weight does not fit.
        RuntimeError: Within a forward derivative of a forward derivative.
    """
    _require_weight("weight", weight)
    one_forward_level("clipped")
    bound = _Clip(max_norm / prod(weight.shape[2:]) ** 0.5)
    matrix = lambda: _SpectralMap.apply(_wide(weight).flatten(1), bound)
    return held(("clipped", max_norm), matrix, weight).to(weight.dtype).view(weight.shape)


class _Bounded(nn.Module):
    """Base of the parametrisations: a bound, and a weight assigned is what it is made from."""

    def __init__(self, max_norm: float) -> None:
        super().__init__()
        self.max_norm = at_least("max_norm", max_norm, 0.0, strict=True)

    def right_inverse(self, W: Tensor) -> Tensor:
        """Return W: what makes it, if it is within the bound."""
        return W

    def extra_repr(self) -> str:
        """Show the bound."""
        return f"max_norm={self.max_norm:g}"


class SpectralBound(_Bounded):
    """Parametrisation W = V min(1, max_norm / ||V||): as a whole scaled down, where it exceeds.

    ||V|| is `operator_norm(V)`. A weight within the bound is V itself, to the last digit.

    Args:
        max_norm: Bound on `operator_norm(W)`, above 0.

    Raises:
        ValueError: If `max_norm` is not above 0.

    Example:
        >>> layer = nn.Linear(3, 3)
        >>> _ = parametrize.register_parametrization(layer, "weight", SpectralBound(0.5))
        >>> layer.weight = 2 * torch.eye(3)
        >>> layer.weight.diag().tolist()
        [0.5, 0.5, 0.5]
    """

    def forward(self, V: Tensor) -> Tensor:
        """Return W for V of its shape."""
        return within(V, self.max_norm)


class SpectralProjection(_Bounded):
    """Parametrisation by the nearest W with norm at most max_norm: singular values clipped.

    Those within the bound stay as they are, so W keeps more of V than scaled as a whole. A clipped
    one no longer depends on V, and its gradient is zero. See `clipped`.

    Args:
        max_norm: Bound on `operator_norm(W)`, above 0.

    Raises:
        ValueError: If `max_norm` is not above 0.

    Example:
        >>> SpectralProjection(0.5)(torch.tensor([[4.0, 0.0], [0.0, 0.25]])).diag().tolist()
        [0.5, 0.25]
    """

    def forward(self, V: Tensor) -> Tensor:
        """Return W for V of its shape."""
        return clipped(V, self.max_norm)


class SpectralSphere(_Bounded):
    """Parametrisation W = max_norm V / ||V||: on the bound always.

    What is known as spectral normalisation, with the exact norm in place of power iterations. W
    does not depend on the length of V, which must not be zero.

    Args:
        max_norm: `operator_norm(W)`, above 0.

    Raises:
        ValueError: If `max_norm` is not above 0.

    Example:
        >>> SpectralSphere(0.5)(torch.tensor([[4.0, 0.0], [0.0, 2.0]])).diag().tolist()
        [0.5, 0.25]
    """

    def forward(self, V: Tensor) -> Tensor:
        """Return W for V of its shape."""
        _require_weight("V", V)
        one_forward_level("SpectralSphere")
        return (_wide(V) * (self.max_norm / _wide_norm(V).clamp(min=_SMALLEST))).to(V.dtype)


_KINDS: dict[str, type[_Bounded]] = {
    "scale": SpectralBound,
    "project": SpectralProjection,
    "normalise": SpectralSphere,
}


def bound_norm(
    module: nn.Module, name: str = "weight", *, max_norm: float, how: How = "scale"
) -> nn.Module:
    """Hold the norm of a module's weight at `max_norm`, whatever training does to it.

    For linear layers and for convolutions, transposed ones too, of any stride, dilation and groups,
    zero-padded, or circular without repeated outputs: as maps they are then Lipschitz with
    `max_norm`. With groups the bound is not tight: it is that of all groups' kernels stacked. A
    parameter of another module is taken as a matrix (out, in) or a kernel (out, in, *k).

    Args:
        module: Whose weight is parametrised, in place.
        name: Of a floating-point parameter with 2 to 5 dimensions.
        max_norm: Bound on its `operator_norm`, above 0.
        how: `"scale"` (`SpectralBound`), `"project"` (`SpectralProjection`) or `"normalise"`
            (`SpectralSphere`).

    Returns:
        The module.

    Raises:
        ValueError: If an option is out of range, there is no such parameter, or the bound does not
            hold for the module.

    Example:
        >>> layer = bound_norm(nn.Conv2d(2, 2, 3, padding=1), max_norm=0.9)
        >>> bool(operator_norm(100 * layer.weight) <= 90.001)
        True
    """
    kind = _KINDS[choice("how", how, get_args(How))](max_norm)
    weight = parameter_of(module, name)
    _require_weight(name, weight)
    if isinstance(module, nn.Bilinear) and name == "weight":
        raise ValueError("module must be linear, and nn.Bilinear is not.")
    if isinstance(module, nn.modules.conv._ConvNd) and name == "weight":
        _require_bounded(module)
    if how == "normalise" and not float(operator_norm(weight.detach())) > _SMALLEST:
        raise ValueError(f"{name} must not be zero with how='normalise': it has no direction.")
    parametrize.register_parametrization(module, name, kind)
    return module


def parameter_of(module: nn.Module, name: str) -> Tensor:
    """Return a parameter of a module, or the value of a parametrised one.

    Raises:
        ValueError: If there is none of the name, or it has no shape yet.
    """
    own = dict(module.named_parameters(recurse=False))
    if name not in own and not parametrize.is_parametrized(module, name):
        raise ValueError(f"name must be that of a parameter of the module, got {name!r}.")
    value = getattr(module, name)
    if isinstance(value, UninitializedParameter):
        raise ValueError(f"{name} has no shape before the lazy module's first call.")
    return value


def _require_bounded(conv: nn.modules.conv._ConvNd) -> None:
    """Refuse a padding that repeats outputs or pixels, for which (SB1) is no bound."""
    if conv.padding_mode not in ("zeros", "circular"):
        raise ValueError(
            "module must have padding_mode 'zeros' or 'circular', got "
            f"{conv.padding_mode!r}, which can raise the norm above that of the kernel."
        )
    if conv.padding_mode == "zeros" or isinstance(conv.padding, str):
        return
    for p, k, d in zip(conv.padding, conv.kernel_size, conv.dilation, strict=True):
        if 2 * int(p) > d * (k - 1):
            raise ValueError(
                f"module must have padding at most dilation (kernel_size - 1) / 2 where it is "
                f"circular, got {conv.padding}: outputs come twice."
            )


class _Clip:
    """f(s) = min(s, bound)."""

    def __init__(self, bound: float) -> None:
        self.bound = bound

    def __call__(self, S: Tensor) -> tuple[Tensor, Tensor]:
        return S.clamp(max=self.bound), (S <= self.bound).to(S.dtype)


def _top(S: Tensor) -> tuple[Tensor, Tensor]:
    """Return f(s) = 1/k at the k largest values, which are equal, and 0 at others."""
    largest = (S >= S[:1] * (1 - _TIE * torch.finfo(S.dtype).eps)).to(S.dtype)
    return largest / largest.sum(), torch.zeros_like(S)


class _Norm(torch.autograd.Function):
    """||W||_2 of a matrix; its gradient is U f(S) V' with f of `_top`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(W: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(W, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return cotangents[0] * _SpectralMap.apply(ctx.saved_tensors[0], _top)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return (tangents[0] * _SpectralMap.apply(ctx.saved_tensors[0], _top)).sum()


class _SpectralMap(torch.autograd.Function):
    """U f(S) V' of a matrix, f giving the values and what stands for 0/0 in (SB2)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(W: Tensor, f: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        with full_precision(W):
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            value = f(S)[0]
            return torch.where((value == S).all(), W, (U * value) @ Vh)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        W, ctx.f = inputs
        ctx.save_for_backward(W)
        ctx.save_for_forward(W)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        (W,) = ctx.saved_tensors
        with full_precision(W):
            return _derivative(W, cotangents[0], ctx.f), None  # (SB2) is self-adjoint

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (W,) = ctx.saved_tensors
        with full_precision(W):
            return _derivative(W, tangents[0], ctx.f)


def _derivative(W: Tensor, E: Tensor, f: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Return (SB2) in differentiable operations."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    value, slope = f(S)
    F = U.mT @ E @ Vh.mT
    minus = _quotient(value[:, None] - value, S[:, None] - S, slope)
    plus = _quotient(value[:, None] + value, S[:, None] + S, slope)
    inner = U @ (minus * (F + F.mT) + plus * (F - F.mT)) @ Vh / 2
    ratio = _quotient(value, S, slope)
    left = ((E @ Vh.mT - U @ F) * ratio) @ Vh
    right = (U * ratio) @ (U.mT @ E - F @ Vh)
    return inner + left + right  # (SB2)


def _quotient(above: Tensor, below: Tensor, otherwise: Tensor) -> Tensor:
    """Return above / below, and the third where below is zero."""
    zero = below == 0
    return torch.where(zero, otherwise, above / torch.where(zero, torch.ones_like(below), below))


def _matrices(weight: Tensor) -> list[Tensor]:
    """Return the matrices r of (SB1); of a matrix itself."""
    axes = [axis for axis in range(2, weight.dim()) if weight.shape[axis] > 1]
    matrices = []
    for chosen in range(2 ** len(axes)):
        rows = [axis for i, axis in enumerate(axes) if chosen >> i & 1]
        columns = [axis for axis in range(2, weight.dim()) if axis not in rows]
        ordered = weight.permute(0, *rows, 1, *columns)
        matrices.append(ordered.flatten(len(rows) + 1).flatten(0, len(rows)))
    return matrices


def _wide(weight: Tensor) -> Tensor:
    return weight.float() if torch.finfo(weight.dtype).bits < 32 else weight


def _require_weight(name: str, weight: Tensor) -> None:
    if not weight.is_floating_point():
        raise ValueError(f"{name} must be real and floating-point, got {weight.dtype}.")
    if not 2 <= weight.dim() <= 5:
        raise ValueError(f"{name} must have 2 to 5 dimensions, got shape {tuple(weight.shape)}.")
