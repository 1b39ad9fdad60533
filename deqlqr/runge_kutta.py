"""Residual blocks and networks that are Runge-Kutta steps along a vector field.

    (RK1)  Y_i = z + h sum_j a_ij v(Y_j, x),    z+ = z + h sum_i b_i v(Y_i, x)

With the constants of (VF1) and r of (RK2), two states with difference dz go to two with dz+,

    (RK4)  |dz+|^2 <= |dz|^2 - h sum_i b_i (2 alpha |dY_i|^2 + (2 beta - h / r) |dv_i|^2)
                   <= (1 - h b_1 (2 alpha + (2 beta - h / r) t^2)) |dz|^2

where t is the lower bound on |dv| / |dY| if h <= 2 r beta and the upper one if not, and the last
bracket is not negative; as Y_1 = z in an explicit method.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from deqlqr._checks import at_least, choice, count
from deqlqr.fields import ConvGradientField, Field, GradientField, LayerField, Monotonicity
from deqlqr.phases import PhaseMap
from deqlqr.tableau import Tableau, make_tableau

_STEPS = ("fixed", "learned", "simplex")


def runge_kutta_step(
    v: Callable[[Tensor], Tensor], z: Tensor, h: float | Tensor, tableau: Tableau
) -> Tensor:
    """Return z+ of (RK1), of the shape of z; differentiable in all that v, z and h depend on.

    Args:
        v: Vector field, from states to tensors of their shape.
        z: State, of any shape.
        h: Step size, a number or a scalar tensor.
        tableau: The method.

    Example:
        >>> z = runge_kutta_step(lambda z: -z, torch.ones(1), 0.1, make_tableau("kutta4"))
        >>> bool(abs(z - torch.exp(torch.tensor(-0.1))) < 1e-6)
        True
    """
    slopes: list[Tensor] = []
    for row in tableau.a:
        slopes.append(v(moved(z, h, row, slopes)))
    return moved(z, h, tableau.b, slopes)


def contraction_constant(
    promise: Monotonicity, step: float, method: str | Tableau = "euler"
) -> float | None:
    """Return the q < 1 of |dz+| <= q |dz| (RK4), rounded up; `None` if there is none.

    For Euler's method on a gradient field it is max(|1 - h mu|, |1 - h L|), the best there is, with
    mu and L the `slopes` of the promise.

    Args:
        promise: Constants of the field.
        step: h, above 0.
        method: Name or table of the method.

    Raises:
        ValueError: If the step is not positive or there is no such method.

    Example:
        >>> field = Monotonicity(alpha=0.75, beta=0.25)
        >>> [round(contraction_constant(field, h), 3) for h in (0.1, 0.5, 0.6)]
        [0.9, 0.5, 0.8]
    """
    h, tableau = at_least("step", step, 0.0, strict=True), make_tableau(method)
    if min(tableau.b) <= 0:
        return None
    excess = 2 * promise.beta - h / tableau.contractivity_radius
    low, high = promise.slopes
    t = low if excess >= 0 else high
    fall = h * float(tableau.b[0]) * (2 * promise.alpha + excess * t**2)
    square = max(1 - fall, 0.0) + 1e-15  # (RK4)
    return square**0.5 if square < 1 else None


class RungeKuttaBlock(nn.Module):
    """f(z, x) = z+ of (RK1): a residual block that is one step along a vector field.

    A zero of the field is a fixed point of f; with Euler's method there are no others. Where f is a
    contraction (`contraction`) its fixed point exists and is unique, so it is the field's zero.

    Args:
        field: v.
        method: `"euler"`, `"improved-euler"`, `"kutta3"`, `"kutta4"`, or a `Tableau`.
        step: h, above 0. `None` takes the largest that is known to keep states from parting,
            2 r beta with r of (RK2) and beta of (VF1), and needs a field that has a beta.
        learn_step: Train log h. For explicit networks: at a fixed point in which v is 0, z+ does
            not depend on h, so in a DEQ it gets no gradient.

    Attributes:
        field: v.
        tableau: The method's table.
        contraction: The Lipschitz constant q < 1 of f in z that holds whatever the parameters, by
            (RK4); `None` if the field promises nothing, the step is too long for a promise, or
            learned.

    Raises:
        ValueError: If the field is no `Field`, there is no such method, or the step is missing or
            out of range.

    Example:
        >>> block = RungeKuttaBlock(GradientField(4), method="kutta4")
        >>> round(block.contraction, 3), block(torch.zeros(3, 4), torch.ones(3, 4)).shape
        (0.953, torch.Size([3, 4]))
    """

    def __init__(
        self,
        field: Field,
        method: str | Tableau = "euler",
        *,
        step: float | None = None,
        learn_step: bool = False,
    ) -> None:
        super().__init__()
        self.field, self.tableau = _field("field", field), make_tableau(method)
        promise, name = field.monotonicity(), type(field).__name__
        if step is None:
            if promise is None or min(self.tableau.b) <= 0:
                raise ValueError(
                    f"step must be given: for {name} and the method {self.tableau.name!r} no safe "
                    "one is known, got None."
                )
            step = 2 * self.tableau.contractivity_radius * promise.beta
        self._step = at_least("step", step, 0.0, strict=True)
        self.log_step = nn.Parameter(torch.tensor(self._step).log()) if learn_step else None
        self.contraction: float | None = None
        if promise is not None and not learn_step:
            self.contraction = contraction_constant(promise, self._step, self.tableau)

    @property
    def step(self) -> float | Tensor:
        """h, a scalar tensor if it is learned."""
        return self._step if self.log_step is None else self.log_step.exp()

    def state_shape(self, x: Tensor) -> tuple[int, ...]:
        """Return the shape of one sample's state."""
        return self.field.state_shape(x)

    def forward(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """Return f(z, x), of the shape of z (batch, *state).

        Raises:
            ValueError: If x is not what the field takes.
        """
        return runge_kutta_step(self.field.at(x), z, self.step, self.tableau)

    def phases(self, x: Tensor) -> list[PhaseMap]:
        """Return f(., x) as the one phase of a cyclic LQR."""
        return [lambda z: self(z, x)]

    def extra_repr(self) -> str:
        """Show the method, the step and what is promised."""
        step = "learned" if self.log_step is not None else f"{self._step:.4g}"
        return f"method={self.tableau.name!r}, step={step}, contraction={self.contraction}"


class GradientBlock(RungeKuttaBlock):
    """A Runge-Kutta step along a `GradientField`: a residual block with a fixed point for certain.

        f(z, x) = z + h (-leak z - A' sigma(A z + W x + b) + U x + c)      (Euler's method)

    With mu = leak and L = leak + max_norm^2 Euler's method takes h = 2 / (mu + L) and contracts by
    (L - mu) / (L + mu), whatever the parameters and however large: no training step can lose the
    fixed point. Other methods take the h and have the constant of `RungeKuttaBlock`; all have the
    same fixed point, and Euler's evaluates the field once.

    Args:
        state_size: n, the size of z.
        hidden: Rows of A; `None` takes n.
        input_size: Size of x. `None`: x is added as it is (U = I), there is no W.
        method: As for `RungeKuttaBlock`.
        step: h; `None` takes the one above.
        activation: sigma, `"tanh"` or `"relu"`.
        leak: mu, above 0.
        max_norm: Bound on ||A||_2, above 0. A larger one lets z depend on x less linearly, and
            contracts less.
        skew: Bound on the norm of a term (S - S') z, as for `GradientField`.
        gain: Norm of the initial A, above 0.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> from deqlqr import DEQ
        >>> block = GradientBlock(4, input_size=2)
        >>> z = DEQ(block)(torch.ones(3, 2))
        >>> round(block.contraction, 3), bool(block.field(z, torch.ones(3, 2)).norm() < 1e-4)
        (0.667, True)
    """

    def __init__(
        self,
        state_size: int,
        hidden: int | None = None,
        input_size: int | None = None,
        *,
        method: str | Tableau = "euler",
        step: float | None = None,
        activation: str = "tanh",
        leak: float = 1.0,
        max_norm: float = 2.0,
        skew: float = 0.0,
        gain: float = 1.0,
    ) -> None:
        at_least("leak", leak, 0.0, strict=True)
        field = GradientField(
            state_size,
            hidden,
            input_size,
            activation=activation,
            leak=leak,
            max_norm=max_norm,
            skew=skew,
            gain=gain,
        )
        super().__init__(field, method, step=step)


class ConvGradientBlock(RungeKuttaBlock):
    """A Runge-Kutta step along a `ConvGradientField`: `GradientBlock` on images of any size.

    The step and the constant are those of `GradientBlock`.

    Args:
        channels: Channels of the state z.
        hidden_channels: Channels of A z; `None` takes `channels`.
        input_channels: Channels of x. `None`: x is added as it is, there is no W.
        kernel_size: Odd.
        method: As for `RungeKuttaBlock`.
        step: h; `None` takes the largest safe one.
        activation: sigma, `"tanh"` or `"relu"`.
        leak: mu, above 0.
        max_norm: Bound on the norm of A, above 0.
        skew: Bound on the norm of S - S'.
        gain: Bound on the norm of the initial A, above 0.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> from deqlqr import DEQ
        >>> DEQ(ConvGradientBlock(4, 8, input_channels=1))(torch.ones(2, 1, 6, 6)).shape
        torch.Size([2, 4, 6, 6])
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: int | None = None,
        input_channels: int | None = None,
        kernel_size: int = 3,
        *,
        method: str | Tableau = "euler",
        step: float | None = None,
        activation: str = "tanh",
        leak: float = 1.0,
        max_norm: float = 2.0,
        skew: float = 0.0,
        gain: float = 1.0,
    ) -> None:
        at_least("leak", leak, 0.0, strict=True)
        field = ConvGradientField(
            channels,
            hidden_channels,
            input_channels,
            kernel_size,
            activation=activation,
            leak=leak,
            max_norm=max_norm,
            skew=skew,
            gain=gain,
        )
        super().__init__(field, method, step=step)


class RungeKuttaNet(nn.Module):
    """An explicit network: layer l is a Runge-Kutta step (RK1) of length h_l along its own field.

    The step sizes are `"fixed"`, h_l = total / N; `"learned"`, N free numbers that start there; or
    `"simplex"`, h = total softmax(w), so that they are positive, their sum is `total`, and layers
    that do nothing for the loss can vanish.

    Args:
        fields: v_1, ..., v_N, which take no injection; they may be the same, for tied weights.
        method: As for `RungeKuttaBlock`.
        total: Sum of the initial step sizes, above 0.
        steps: `"fixed"`, `"learned"` or `"simplex"`.

    Raises:
        ValueError: If there is no field, one is no `Field`, or an option is out of range.

    Source: M. Benning, E. Celledoni, M. Ehrhardt, B. Owren and C.-B. Schoenlieb (2019). Deep
    learning as optimal control problems: models and numerical methods. arXiv:1904.05657, where
    `"learned"` and `"simplex"` are called ODENet and ODENet+simplex.

    Example:
        >>> net = RungeKuttaNet.of_layers(2, 5, "kutta4", steps="simplex")
        >>> net(torch.ones(3, 2)).shape, net.trajectory(torch.ones(3, 2)).shape
        (torch.Size([3, 2]), torch.Size([6, 3, 2]))
    """

    def __init__(
        self,
        fields: Sequence[Field],
        method: str | Tableau = "euler",
        *,
        total: float = 1.0,
        steps: str = "fixed",
    ) -> None:
        super().__init__()
        if len(fields) == 0:
            raise ValueError("fields must have at least one field, got none.")
        self.fields = nn.ModuleList(_field(f"fields[{i}]", v) for i, v in enumerate(fields))
        self.tableau, self.steps = make_tableau(method), choice("steps", steps, _STEPS)
        self.total = at_least("total", total, 0.0, strict=True)
        self.raw_steps = None
        if steps == "learned":
            self.raw_steps = nn.Parameter(torch.full((len(fields),), self.total / len(fields)))
        elif steps == "simplex":
            self.raw_steps = nn.Parameter(torch.zeros(len(fields)))

    @classmethod
    def of_layers(
        cls,
        state_size: int,
        layers: int,
        method: str | Tableau = "euler",
        *,
        activation: str = "tanh",
        total: float = 1.0,
        steps: str = "fixed",
    ) -> "RungeKuttaNet":
        """Return a network of `layers` fields sigma(K z + b), a `LayerField` for each.

        Raises:
            ValueError: If an option is out of range.
        """
        fields = [
            LayerField(state_size, activation=activation) for _ in range(count("layers", layers))
        ]
        return cls(fields, method, total=total, steps=steps)

    @property
    def step_sizes(self) -> Tensor:
        """h_1, ..., h_N, `(N,)`."""
        if self.raw_steps is None:
            like, layers = next(self.parameters(), torch.empty(0)), len(self.fields)
            return like.new_full((layers,), self.total / layers)
        return self.raw_steps if self.steps == "learned" else self.total * self.raw_steps.softmax(0)

    def forward(self, z: Tensor) -> Tensor:
        """Return the state after the last layer, of the shape of z (batch, *state)."""
        return self._states(z)[-1]

    def trajectory(self, z: Tensor) -> Tensor:
        """Return the states before, between and after the layers, `(N + 1, batch, *state)`."""
        return torch.stack(self._states(z))

    def _states(self, z: Tensor) -> list[Tensor]:
        states = [z]
        for field, h in zip(self.fields, self.step_sizes, strict=True):
            assert isinstance(field, Field)  # noqa: S101
            states.append(runge_kutta_step(field.at(), states[-1], h, self.tableau))
        return states


def moved(
    z: Tensor, h: float | Tensor, weights: Sequence[float | Fraction], slopes: Sequence[Tensor]
) -> Tensor:
    """Return z + h sum_j weights_j slopes_j over the slopes there are, of the shape of z."""
    for weight, slope in zip(weights, slopes, strict=False):
        if weight != 0:
            z = z + h * float(weight) * slope  # (RK1)
    return z


def _field(name: str, value: Field) -> Field:
    if not isinstance(value, Field):
        raise ValueError(f"{name} must be a deqlqr.fields.Field, got {type(value).__name__}.")
    return value
