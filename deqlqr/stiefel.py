"""Weights with orthonormal columns (the Stiefel manifold), as polar factors.

V = Q H with Q'Q = I and H = (V'V)^1/2 symmetric positive definite: Q is the closest orthonormal
matrix to V. Its derivative along E, which is self-adjoint in E, is

    dQ = Q X + (E - QQ'E) H^-1,     H X + X H = Q'E - E'Q                                     (P1)

The only function with a rule of its own besides is X of the Lyapunov equation, whose derivative is
another one, so that derivatives of every order are right, also where singular values of V are
equal, as they are at an orthonormal V.

Source: N. J. Higham (2008), Functions of Matrices, doi:10.1137/1.9780898717778, chapter 8.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deqlqr._checks import one_forward_level
from deqlqr._linalg import full_precision, sym, zeros_if_none
from deqlqr.held import held
from deqlqr.spectral_bound import parameter_of


def polar(V: Tensor) -> Tensor:
    """Return the orthonormal matrix closest to V, differentiable to every order.

    Args:
        V: (m, n) of full rank. Of a wide one the rows become orthonormal. Half precision is
            computed in float32.

    Raises:
        ValueError: If V is no real floating-point matrix.
        RuntimeError: Within a forward derivative of a forward derivative.

    Example:
        >>> polar(torch.tensor([[0.0, -2.0], [3.0, 0.0]])).tolist()
        [[0.0, -1.0], [1.0, 0.0]]
    """
    _require_matrix("V", V)
    one_forward_level("polar")
    return held("polar", lambda: _polar(V), V)


def _polar(V: Tensor) -> Tensor:
    wide = V.float() if torch.finfo(V.dtype).bits < 32 else V
    Q = _Polar.apply(wide) if V.shape[0] >= V.shape[1] else _Polar.apply(wide.mT).mT
    return Q.to(V.dtype)


class Stiefel(nn.Module):
    """Parametrisation W = polar(V), with W'W = I (WW' = I if wide), by retraction.

    A step of V in any direction d moves W to polar(V + d): for V = W the polar retraction of
    Riemannian optimisation. Take it where W is tall, where steps are large, or for second
    derivatives; take `torch.nn.utils.parametrizations.orthogonal` where det W is to stay as it is.
    The length of V has no effect on W but divides the gradient, as with every normalisation.

    Example:
        >>> layer = nn.Linear(3, 5)
        >>> _ = parametrize.register_parametrization(layer, "weight", Stiefel())
        >>> bool((layer.weight.mT @ layer.weight - torch.eye(3)).norm() < 1e-5)
        True
    """

    def forward(self, V: Tensor) -> Tensor:
        """Return W for V (m, n) of full rank."""
        return polar(V)

    def right_inverse(self, W: Tensor) -> Tensor:
        """Return V = W, of which an orthonormal W is made.

        Raises:
            ValueError: If W does not have full rank: no orthonormal matrix is closest then.
        """
        _require_matrix("W", W)
        S = torch.linalg.svdvals(W.detach().double())
        if not bool(S.min() > 1e-6 * S.max()):
            raise ValueError(f"W must have full rank, got singular values {S.tolist()}.")
        return W


def orthonormal(module: nn.Module, name: str = "weight") -> nn.Module:
    """Hold a module's matrix orthonormal, whatever training does to it.

    The present matrix is replaced by its polar factor.

    Args:
        module: Whose parameter is parametrised by `Stiefel`, in place.
        name: Of a floating-point matrix of full rank.

    Returns:
        The module.

    Raises:
        ValueError: If there is no such parameter, or it is no real matrix of full rank.

    Example:
        >>> layer = orthonormal(nn.Linear(3, 3))
        >>> bool((layer.weight @ layer.weight.mT - torch.eye(3)).norm() < 1e-5)
        True
    """
    _require_matrix(name, parameter_of(module, name))
    parametrize.register_parametrization(module, name, Stiefel())
    return module


class _Polar(torch.autograd.Function):
    """Q of V (m, n), m >= n; backward and jvp are (P1)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(V: Tensor) -> Tensor:
        with full_precision(V):
            U, _, Wh = torch.linalg.svd(V, full_matrices=False)
            return U @ Wh

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)
        ctx.save_for_forward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        V, Q = ctx.saved_tensors
        with full_precision(V):
            return _derivative(V, Q, cotangents[0])  # (P1) is self-adjoint

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        V, Q = ctx.saved_tensors
        with full_precision(V):
            return _derivative(V, Q, tangents[0])


def _derivative(V: Tensor, Q: Tensor, E: Tensor) -> Tensor:
    """Return (P1) in differentiable operations."""
    H, C = sym(Q.mT @ V), Q.mT @ E
    X = _Lyapunov.apply(H, C - C.mT)
    outside = torch.linalg.solve(H, E - Q @ C, left=False)
    return Q @ X + outside  # (P1)


class _Lyapunov(torch.autograd.Function):
    """X of H X + X H = C for a symmetric positive definite H (n, n)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(H: Tensor, C: Tensor) -> Tensor:
        s, R = torch.linalg.eigh(H)
        return R @ ((R.mT @ C @ R) / (s[:, None] + s)) @ R.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple:
        H, X = ctx.saved_tensors
        C_bar = _Lyapunov.apply(H, cotangents[0])
        return -(C_bar @ X.mT + X.mT @ C_bar), C_bar

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        H, X = ctx.saved_tensors
        dH, dC = (zeros_if_none(d, H) for d in tangents)
        return _Lyapunov.apply(H, dC - dH @ X - X @ dH)


def _require_matrix(name: str, value: Tensor) -> None:
    if value.dim() != 2 or not value.is_floating_point():
        raise ValueError(
            f"{name} must be a real floating-point matrix, got {value.dtype} of shape "
            f"{tuple(value.shape)}."
        )
