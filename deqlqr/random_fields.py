"""Random vector fields, frozen, and the few scalars that combine them: what is trained.

With C_i a random matrix, d_i a random vector and u_i a trained scalar,

    (RF1)  V_i(z) = sigma_i(C_i z + d_i)
    (RF2)  v(z) = sum_i u_i V_i(z)

is a vector field with a handful of trained numbers. Controls u_t that change with t steer
X' = sum_i u_t^i V_i(X) so that its flow interpolates any generic set of points; with polynomials
sigma_i, seven fields are enough, whatever the number of points.

Source: C. Cuchiero, M. Larsson, J. Teichmann (2020), Deep neural networks, generic universal
interpolation, and controlled ODEs, arXiv:1908.07838, the main theorem and its corollary on fields
of this form.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deqlqr._checks import at_least, choice, count, injection
from deqlqr.phases import PhaseMap
from deqlqr.runge_kutta import runge_kutta_step
from deqlqr.tableau import Tableau, make_tableau

Activation = Literal["tanh", "polynomial"]
_LINEAR = 3  # fields of "polynomial" with sigma_i(r) = r; the others have r^2


class RandomFields(nn.Module):
    """d random vector fields (RF1) on R^n, and their combination (RF2).

    The entries of C_i are normal with variance 1 / n, those of d_i standard normal. They are
    buffers: saved with the module, never trained, and a function of `seed` alone. The global
    generator is not touched.

    Args:
        state_size: n.
        fields: d, the number of fields.
        activation: `"tanh"`, or `"polynomial"`: sigma_i(r) = r for i <= 3 and r^2 for the others,
            as in the corollary. The squares are not Lipschitz: a flow may blow up in finite time,
            so they are for explicit nets with small controls on bounded data.
        seed: Of C and d.

    Attributes:
        C: The matrices, `(d, n, n)`.
        d: The vectors, `(d, n)`.

    Raises:
        ValueError: If an option is out of range, or `"polynomial"` is left without a square.

    Example:
        >>> fields = RandomFields(2, fields=5)
        >>> fields(torch.zeros(3, 2), torch.ones(5)).shape
        torch.Size([3, 2])
        >>> list(fields.state_dict()), list(fields.parameters())
        (['C', 'd'], [])
    """

    C: Tensor
    d: Tensor

    def __init__(
        self, state_size: int, fields: int = 7, *, activation: Activation = "tanh", seed: int = 0
    ) -> None:
        super().__init__()
        n, self.fields = count("state_size", state_size), count("fields", fields)
        self.state_size = n
        self.activation = choice("activation", activation, get_args(Activation))
        if activation == "polynomial" and fields <= _LINEAR:
            raise ValueError(
                f"fields must be at least {_LINEAR + 1} with activation 'polynomial', whose first "
                f"{_LINEAR} are linear, got {fields}."
            )
        self.seed = count("seed", seed, 0)
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("C", _normal(generator, fields, n, n) / n**0.5)
        self.register_buffer("d", _normal(generator, fields, n))

    def forward(self, z: Tensor, u: Tensor, shift: Tensor | None = None) -> Tensor:
        """Return v(z) (batch, n) of (RF2).

        Args:
            z: States `(batch, n)`.
            u: The scalars `(d,)`.
            shift: Added to all C_i z + d_i, `(batch, d, n)`.

        Raises:
            ValueError: If u does not have one entry for each field, or z not n columns.
        """
        if u.shape != (self.fields,):
            raise ValueError(f"u must have shape ({self.fields},), got {tuple(u.shape)}.")
        if z.dim() != 2 or z.shape[1] != self.state_size:
            raise ValueError(f"z must have shape (batch, {self.state_size}), got {tuple(z.shape)}.")
        r = F.linear(z, self.C.flatten(0, 1), self.d.flatten()).unflatten(1, self.d.shape)
        if shift is not None:
            r = r + shift
        return torch.einsum("bdn,d->bn", self._sigma(r), u)  # (RF2)

    def _sigma(self, r: Tensor) -> Tensor:
        """Return sigma_i of C_i z + d_i, for r (batch, d, n)."""
        if self.activation == "tanh":
            return torch.tanh(r)
        return torch.cat([r[:, :_LINEAR], r[:, _LINEAR:].square()], 1)

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"state_size={self.state_size}, fields={self.fields}, "
            f"activation={self.activation!r}, seed={self.seed}"
        )


class RandomFieldBlock(nn.Module):
    """A DEQ block of random fields, of which d scalars u_i are trained and all else is frozen.

    Without `input_size` the input is added to the fields, else it enters them,

        (RF3)  f(z, x) = sum_i w_i tanh(C_i z + d_i) + x
        (RF4)  f(z, x) = sum_i w_i tanh(C_i z + U_i x + d_i)

    with C_i, d_i of (RF1), and U_i random with entries of variance 1 / input_size. The C_i are
    divided by one number, the norm of all of them stacked, so that ||[C_1; ...; C_d]||_2 = 1, and

        (RF5)  w = u min(1, max_lipschitz / ||u||_2)

    The Jacobian in z is the product of [w_1 I, ..., w_d I], of the diagonal matrix of all tanh',
    and of the stacked C, so its norm is at most ||w||_2 <= `max_lipschitz`: the fixed point exists,
    is unique, and cannot be lost in training. For entries of similar size this bound is below
    sum_i |w_i| ||C_i||_2, and (RF5) has no kink where an entry changes its sign.

    With so few controls the exact step by the dense Riccati equation, `ImplicitNGD(route="dare")`,
    has a small system in u to solve.

    Args:
        state_size: n, the size of z.
        fields: d, the number of fields, and of trained scalars.
        input_size: Size of x for (RF4); `None` for (RF3), where x must have n components.
        max_lipschitz: Bound on the Lipschitz constant in z, in (0, 1); `None` lifts it, and with
            it the guarantee.
        gain: ||u||_2 at the start, above 0; its direction is random (the global generator's).
        seed: Of C, d and U.

    Attributes:
        contraction: `max_lipschitz`, which holds whatever u.
        u: The trained scalars, `(d,)`.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> from deqlqr import DEQ
        >>> layer = DEQ(RandomFieldBlock(4, input_size=2))
        >>> layer(torch.ones(3, 2)).shape, [p.shape for p in layer.parameters()]
        (torch.Size([3, 4]), [torch.Size([7])])

    Source: the fields of arXiv:1908.07838, with tanh for the polynomials.
    """

    U: Tensor

    def __init__(
        self,
        state_size: int,
        fields: int = 7,
        input_size: int | None = None,
        *,
        max_lipschitz: float | None = 0.9,
        gain: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if max_lipschitz is not None and not 0 < max_lipschitz < 1:
            raise ValueError(f"max_lipschitz must lie in (0, 1), got {max_lipschitz}.")
        gain = at_least("gain", gain, 0.0, strict=True)
        self.vector_fields = RandomFields(state_size, fields, seed=seed)
        self.state_size, self.input_size = state_size, input_size
        self.contraction = self.max_lipschitz = max_lipschitz
        C = self.vector_fields.C
        # A little more than the norm, so that rounding does not take the stacked C above 1.
        C /= torch.linalg.matrix_norm(C.flatten(0, 1), 2) * (1 + 1e-6)
        if input_size is not None:
            generator = torch.Generator().manual_seed(2**32 + seed)  # no other fields' stream
            U = _normal(generator, fields, state_size, count("input_size", input_size))
            self.register_buffer("U", U / input_size**0.5)
        u = torch.randn(fields)
        self.u = nn.Parameter(gain * u / torch.linalg.vector_norm(u))

    def state_shape(self, x: Tensor) -> tuple[int, ...]:
        """Return the shape of one sample's state, `(n,)`."""
        return (self.state_size,)

    def lipschitz_bound(self) -> Tensor:
        """Return ||u||_2, the bound on the Lipschitz constant in z before (RF5), a scalar."""
        return torch.linalg.vector_norm(self.u)

    @property
    def weights(self) -> Tensor:
        """The weights w (d,): u scaled down where its norm exceeds `max_lipschitz` (RF5)."""
        if self.max_lipschitz is None:
            return self.u
        # The larger one before the division: at u = 0 the derivative of 1 / ||u|| is not finite.
        L = self.lipschitz_bound().clamp(min=self.max_lipschitz)
        return self.u * (self.max_lipschitz / L)  # (RF5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Return f(z, x) (batch, n) for z (batch, n) and x (batch, input_size).

        Raises:
            ValueError: If x does not have shape `(batch, input_size)`.
        """
        width = self.state_size if self.input_size is None else self.input_size
        injection(x, width)
        if self.input_size is None:
            return self.vector_fields(z, self.weights) + x  # (RF3)
        injected = F.linear(x, self.U.flatten(0, 1)).unflatten(1, self.U.shape[:2])
        return self.vector_fields(z, self.weights, injected)  # (RF4)

    def phases(self, x: Tensor) -> list[PhaseMap]:
        """Return f(., x), which is one layer, as the one phase of a cyclic LQR."""
        return [lambda z: self(z, x)]


class ControlledODE(nn.Module):
    """Explicit net of random fields: X' = sum_i u_t^i V_i(X) in `depth` steps of 1 / depth.

    The fields V_i are the same in all steps, the controls u_t constant within each. By Euler's
    method, with h = 1 / depth,

        (RF6)  X_{t+h} = X_t + h sum_i u_t^i V_i(X_t),    X_0 = x
        (RF7)  y = lam (X_1 - x), or y = X_1 where not `relative`

    The controls u (depth x d) and the scalar lam are trained: depth d + 1 numbers, or depth d.

    Args:
        state_size: n.
        fields: d, the number of fields.
        depth: Number of steps.
        relative: Whether the output is (RF7)'s first form, the one of the theorem.
        activation: Of the fields (see `RandomFields`).
        init_scale: Standard deviation of the initial controls, above 0; they are normal, from the
            global generator.
        method: Of each step: `"euler"`, another name of `make_tableau`, or a `Tableau`.
        seed: Of the fields.

    Attributes:
        u: The controls, `(depth, d)`.
        lam: The scalar; `None` where not `relative`.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> net = ControlledODE(2, fields=7, depth=20)
        >>> net(torch.zeros(5, 2)).shape, sum(p.numel() for p in net.parameters())
        (torch.Size([5, 2]), 141)

    Source: arXiv:1908.07838: the controlled equation in Euler steps, and the theorem's readout.
    """

    def __init__(
        self,
        state_size: int,
        fields: int = 7,
        depth: int = 20,
        *,
        relative: bool = True,
        activation: Activation = "tanh",
        init_scale: float = 0.1,
        method: str | Tableau = "euler",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.vector_fields = RandomFields(state_size, fields, activation=activation, seed=seed)
        self.depth, self.tableau = count("depth", depth), make_tableau(method)
        scale = at_least("init_scale", init_scale, 0.0, strict=True)
        self.u = nn.Parameter(scale * torch.randn(depth, fields))
        self.lam = nn.Parameter(torch.ones(())) if relative else None

    def trajectory(self, x: Tensor) -> Tensor:
        """Return all states X_t (depth + 1, batch, n) of (RF6), from x (batch, n) on.

        Raises:
            ValueError: If x does not have n columns.
        """
        states = [x]
        for u in self.u:
            states.append(self._step(states[-1], u))
        return torch.stack(states)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (batch, n) of (RF7) for x (batch, n).

        Raises:
            ValueError: If x does not have n columns.
        """
        X = x
        for u in self.u:
            X = self._step(X, u)
        return X if self.lam is None else self.lam * (X - x)  # (RF7)

    def _step(self, X: Tensor, u: Tensor) -> Tensor:
        flow = lambda z: self.vector_fields(z, u)
        return runge_kutta_step(flow, X, 1 / self.depth, self.tableau)  # (RF6)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Return standard normal numbers that are the same, up to rounding, whatever the dtype."""
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return drawn.to(torch.get_default_dtype())
