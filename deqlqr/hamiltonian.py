"""Hamiltonian descent: a system that loses energy, and integrators with one gradient a step.

    (HD1)  p' = -grad J(u) - gamma p,   u' = grad K(p),   H = K(p) + J(u)

J is what is minimised, u the parameters, p their momentum, K the kinetic energy, gamma the
friction. Energy falls, dH/dt = -gamma p'grad K(p), and every area dp du shrinks like
e^(-gamma t): with Omega = [0 I; -I 0] and F the derivative of the flow over a time t in (u, p),
F' Omega F = e^(-gamma t) Omega. A step that has this property at t = h is conformal symplectic.
An underdamped oscillation near a minimum then loses energy at the rate gamma, whatever h.

Sources: G. Franca, J. Sulam, D. P. Robinson, R. Vidal (2020), Conformal symplectic and relativistic
optimization, arXiv:1903.04100; R. McLachlan, M. Perlmutter (2001), Conformal Hamiltonian systems,
J. Geom. Phys. 39, doi:10.1016/S0393-0440(01)00020-1.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp

import torch
from torch import Tensor

from deqlqr._checks import Options, at_least, choice

SCHEMES = ("heavy-ball", "nesterov", "leapfrog")

Gradient = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Kinetic(Options, ABC):
    """Kinetic energy of a momentum p, by the inertia M(|p|).

        (HD2)  grad K(p) = p / M,   K(p) = |p|^2 / (M + m)

    |p| is the Euclidean norm over all entries. K(0) = 0: the energy at rest is left out.

    Attributes:
        mass: m, above 0.
    """

    mass: float = 1.0

    def __post_init__(self) -> None:
        """Check the mass.

        Raises:
            ValueError: If `mass` is not finite and above 0.
        """
        at_least("mass", self.mass, 0.0, strict=True)

    @abstractmethod
    def inertia(self, size: Tensor) -> Tensor:
        """Return M, a scalar, from |p|, a scalar."""

    def velocity(self, p: Tensor) -> Tensor:
        """Return grad K(p), of the shape of p."""
        return p / self.inertia(total_norm([p]))

    def energy(self, p: Tensor) -> Tensor:
        """Return K(p), a scalar."""
        size = total_norm([p])
        return size.square() / (self.inertia(size) + self.mass)  # (HD2)


@dataclass(frozen=True)
class Classical(Kinetic):
    """K(p) = |p|^2 / (2 m): M = m.

    Example:
        >>> p = torch.tensor([3.0, 4.0])
        >>> Classical(mass=2.0).velocity(p), Classical(mass=2.0).energy(p)
        (tensor([1.5000, 2.0000]), tensor(6.2500))
    """

    def inertia(self, size: Tensor) -> Tensor:
        """Return m, a scalar like |p|."""
        return torch.full_like(size, self.mass)


@dataclass(frozen=True)
class Relativistic(Kinetic):
    """K(p) = c (|p|^2 + m^2 c^2)^(1/2) - m c^2: M = (m^2 + |p|^2 / c^2)^(1/2).

    The velocity stays below c. As c grows this becomes `Classical`; with c = 1 and m^2 = eps it is
    the (|p|^2 + eps)^(1/2) of the slides.

    Attributes:
        mass: m, above 0.
        speed: c, above 0: no step is longer than h c.

    Example:
        >>> p = torch.tensor([3e6, 4e6])
        >>> Relativistic(mass=2.0, speed=0.5).velocity(p)
        tensor([0.3000, 0.4000])
    """

    speed: float = 1.0

    def __post_init__(self) -> None:
        """Check mass and speed.

        Raises:
            ValueError: If one is not finite and above 0.
        """
        super().__post_init__()
        at_least("speed", self.speed, 0.0, strict=True)

    def inertia(self, size: Tensor) -> Tensor:
        """Return M, a scalar, from |p|, a scalar."""
        return torch.hypot(size / self.speed, torch.full_like(size, self.mass))


def total_norm(parts: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm over all entries of all tensors, on the device of the first."""
    norms = [torch.linalg.vector_norm(part) for part in parts]
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))


def kick(scheme: str, h: float, friction: float, before: float) -> tuple[float, float]:
    """Return decay a and weight w with which a gradient changes the momentum.

        (HD3)  p <- a p - w grad J,   u <- u + h grad K(p)

    `"heavy-ball"` and `"nesterov"` take a = e^(-gamma h), w = h. `"leapfrog"` joins the last part
    of the step before, of length h_b, to the first of this one, as both want the gradient at u:
    a = e^(-gamma (h_b + h)/2), w = (a h_b + h)/2.

    Args:
        scheme: One of `SCHEMES`.
        h: Step length.
        friction: gamma.
        before: h_b; 0 at the start.
    """
    if scheme != "leapfrog":
        return exp(-friction * h), h
    decay = exp(-friction * (before + h) / 2)
    return decay, (decay * before + h) / 2


@dataclass(frozen=True)
class Integrator(Options):
    """One step of (HD1), (u_n, p_n) -> (u_{n+1}, p_{n+1}), with mu = e^(-gamma h).

    `"heavy-ball"`, the conformal symplectic Euler method, of order 1:

        (HD4)  p_{n+1} = mu p_n - h grad J(u_n),   u_{n+1} = u_n + h grad K(p_{n+1})

    `"nesterov"`, of order 1 and not conformal symplectic:

        (HD5)  y = u_n + h grad K(mu p_n),   p_{n+1} = mu p_n - h grad J(y),
               u_{n+1} = u_n + h grad K(p_{n+1})

    Volumes of (u, p), m numbers each, shrink by mu^m det(I - h^2 J''(y) K''(mu p_n)) instead of
    mu^m: damping of order h^2 a step in addition, which grows with the curvature. On a quadratic of
    frequency w energy falls at the rate gamma - log(1 - h^2 w^2)/h = gamma + h w^2 + ...

    `"leapfrog"`, symmetric, of order 2, conformal symplectic:

        (HD6)  p = mu^(1/2) p_n - h/2 grad J(u_n),   u_{n+1} = u_n + h grad K(p),
               p_{n+1} = mu^(1/2) (p - h/2 grad J(u_{n+1}))

    It is stable on a quadratic while h w < 2 m^(1/2), with any friction. The gradient that ends a
    step begins the next: one gradient a step, at u_n itself (`kick`). The source's relativistic
    gradient descent with alpha = 1 splits the drift instead of the gradient, with the same order
    and damping; its gradient is at a point between u_n and u_{n+1}.

    Attributes:
        h: Step length, above 0.
        friction: gamma, at least 0.
        kinetic: `Classical` or `Relativistic`.
        scheme: One of `SCHEMES`.

    Example:
        >>> step = Integrator(h=0.1, friction=1.0, scheme="leapfrog").step
        >>> u, p = torch.tensor([1.0, -2.0]), torch.zeros(2)
        >>> for _ in range(200):
        ...     u, p = step(u, p, lambda u: 4 * u)  # J = 2 |u|^2
        >>> float(u.norm()) < 1e-3
        True
    """

    h: float
    friction: float
    kinetic: Kinetic = Classical()
    scheme: str = "heavy-ball"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: If one is unknown or out of range.
        """
        at_least("h", self.h, 0.0, strict=True)
        at_least("friction", self.friction, 0.0)
        choice("scheme", self.scheme, SCHEMES)
        require_kinetic(self.kinetic)

    def step(self, u: Tensor, p: Tensor, gradient: Gradient) -> tuple[Tensor, Tensor]:
        """Take one step.

        Args:
            u: Position u_n, any shape.
            p: Momentum p_n, of the same shape.
            gradient: grad J.

        Returns:
            u_{n+1} and p_{n+1}.
        """
        h, mu, velocity = self.h, exp(-self.friction * self.h), self.kinetic.velocity
        if self.scheme == "leapfrog":
            p = mu**0.5 * p - h / 2 * gradient(u)
            u = u + h * velocity(p)
            return u, mu**0.5 * (p - h / 2 * gradient(u))  # (HD6)
        at = u if self.scheme == "heavy-ball" else u + h * velocity(mu * p)
        p = mu * p - h * gradient(at)  # (HD4), (HD5)
        return u + h * velocity(p), p


def require_kinetic(kinetic: object) -> None:
    """Refuse what is no kinetic energy of this module.

    Raises:
        ValueError: If it is neither `Classical` nor `Relativistic`.
    """
    if not isinstance(kinetic, Classical | Relativistic):
        raise ValueError(
            f"kinetic must be Classical() or Relativistic(), got {type(kinetic).__name__}."
        )
