"""Hamiltonian descent: heavy ball, Nesterov and leapfrog, with and without a largest speed.

On a quadratic of frequencies 1 and 10, and on Rosenbrock's function, a table of

- rate: at which energy falls near the minimum, over the friction (a step of 0.02, friction 0.3);
- order: of convergence to the exact path;
- diverges from: step lengths, of those tried up to 4, that lead beyond 1e6 within 300 steps;
- steps: to J < 1e-6 from (-1.2, 1), with friction 1 and the best of some step lengths.

Then the same momentum around implicit natural gradient, on the digits.

Run: python examples/hamiltonian_descent.py [--figure FILE.png]
"""

import argparse
from math import log2

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from deqlqr import DEQ, DenseBlock, ImplicitNGD
from deqlqr.data import load_data
from deqlqr.guard import Guard
from deqlqr.hamiltonian import SCHEMES, Classical, Integrator, Kinetic, Relativistic
from deqlqr.hamiltonian_descent import OuterMomentum

KINETICS: dict[str, Kinetic] = {"none": Classical(), "2": Relativistic(speed=2.0)}
START = torch.tensor([-1.2, 1.0], dtype=torch.float64)


class Quadratic:
    """J = (u_1^2 + 100 u_2^2) / 2."""

    minimum = torch.zeros(2, dtype=torch.float64)
    slow = torch.tensor([1.0, 0.0], dtype=torch.float64)  # direction of the lower frequency
    curvatures = torch.tensor([1.0, 100.0], dtype=torch.float64)

    def value(self, u: Tensor) -> Tensor:
        """Return J for u (..., 2)."""
        return (self.curvatures * u.square()).sum(-1) / 2

    def gradient(self, u: Tensor) -> Tensor:
        """Return grad J at u (2,)."""
        return self.curvatures * u


class Rosenbrock:
    """J = (1 - u_1)^2 + 100 (u_2 - u_1^2)^2."""

    minimum = torch.ones(2, dtype=torch.float64)
    slow = torch.tensor([0.447, 0.894], dtype=torch.float64)

    def value(self, u: Tensor) -> Tensor:
        """Return J for u (..., 2)."""
        return (1 - u[..., 0]) ** 2 + 100 * (u[..., 1] - u[..., 0] ** 2) ** 2

    def gradient(self, u: Tensor) -> Tensor:
        """Return grad J at u (2,)."""
        inner = 200 * (u[1] - u[0] ** 2)
        return torch.stack([2 * (u[0] - 1) - 2 * u[0] * inner, inner])


Objective = Quadratic | Rosenbrock
OBJECTIVES: dict[str, Objective] = {"quadratic": Quadratic(), "rosenbrock": Rosenbrock()}


def path(integrator: Integrator, J: Objective, u: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return positions and momenta (steps + 1, 2) from rest; fewer once u is beyond 1e6."""
    p, us, ps = torch.zeros_like(u), [u], [torch.zeros_like(u)]
    for _ in range(steps):
        u, p = integrator.step(u, p, J.gradient)
        us.append(u)
        ps.append(p)
        if not float(u.abs().max()) < 1e6:
            break
    return torch.stack(us), torch.stack(ps)


def energies(integrator: Integrator, J: Objective, us: Tensor, ps: Tensor) -> Tensor:
    """Return H + gamma/2 p'(u - minimum), whose last term only takes the waves out of the fall."""
    kinetic = torch.stack([integrator.kinetic.energy(p) for p in ps])
    return kinetic + J.value(us) + integrator.friction / 2 * (ps * (us - J.minimum)).sum(-1)


def rate(J: Objective, kinetic: Kinetic, scheme: str) -> float:
    """Return the rate at which energy falls near the minimum, over the friction."""
    integrator = Integrator(0.02, 0.3, kinetic, scheme)
    us, ps = path(integrator, J, J.minimum + 1e-3 * J.slow, 500)
    energy = energies(integrator, J, us[::10], ps[::10]).log().numpy()
    return -float(np.polyfit(0.2 * np.arange(len(energy)), energy, 1)[0]) / 0.3


def order(J: Objective, kinetic: Kinetic, scheme: str) -> float:
    """Return the slope of the error against the step length, on a logarithmic scale."""

    def right(t: float, z: np.ndarray) -> np.ndarray:
        u, p = torch.as_tensor(z).chunk(2)
        return torch.cat([kinetic.velocity(p), -J.gradient(u) - p]).numpy()

    z = np.concatenate([START.numpy(), np.zeros(2)])
    exact = solve_ivp(right, (0, 0.2), z, "DOP853", rtol=1e-12, atol=1e-12).y[:2, -1]
    errors = []
    for steps in (200, 400):
        us, _ = path(Integrator(0.2 / steps, 1.0, kinetic, scheme), J, START, steps)
        errors.append(float((us[-1] - torch.as_tensor(exact)).norm()))
    return log2(errors[0] / errors[1])


def diverges_from(J: Objective, kinetic: Kinetic, scheme: str) -> float:
    """Return the first step length of a grid up to 4 that diverges; infinity if none does."""
    ratio = 1.15 if isinstance(kinetic, Classical) else 3.0  # for speed: the latter never does
    h = 0.03
    while h < 4:
        us, _ = path(Integrator(h, 1.0, kinetic, scheme), J, START, 300)
        if len(us) <= 300:
            return h
        h *= ratio
    return float("inf")


def steps_needed(J: Objective, kinetic: Kinetic, scheme: str) -> tuple[int, float]:
    """Return the fewest steps to J < 1e-6, and their length."""
    best, length = 2000, float("nan")
    for h in (0.03, 0.05, 0.08, 0.18):
        us, _ = path(Integrator(h, 1.0, kinetic, scheme), J, START, best - 1)
        arrived = (J.value(us) < 1e-6).nonzero()
        if len(arrived):
            best, length = int(arrived[0]), h
    return best, length


def draw(file: str) -> None:
    """Draw energies on the quadratic, and paths on Rosenbrock's function, into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    J = OBJECTIVES["quadratic"]
    for scheme in SCHEMES:
        integrator = Integrator(0.05, 0.3, scheme=scheme)
        us, ps = path(integrator, J, START, 500)
        kinetic = torch.stack([integrator.kinetic.energy(p) for p in ps])
        left.plot(0.05 * np.arange(501), kinetic + J.value(us), linewidth=1, label=scheme)
    t = np.linspace(0, 25, 2)
    left.plot(
        t, float(J.value(START)) * np.exp(-0.3 * t), "k--", linewidth=1, label="$e^{-\\gamma t}$"
    )
    left.set(xlabel="t", ylabel="H", yscale="log", title="quadratic, h = 0.05, friction 0.3")
    J = OBJECTIVES["rosenbrock"]
    x, y = torch.meshgrid(torch.linspace(-2, 2, 200), torch.linspace(-1, 3, 200), indexing="xy")
    levels = np.logspace(-1, 3.4, 12)
    right.contour(x, y, J.value(torch.stack([x, y], -1)), levels, colors="0.8", linewidths=0.7)
    for name, kinetic in (("no limit", Classical()), ("speed 2", Relativistic(speed=2.0))):
        us, _ = path(Integrator(0.08, 1.0, kinetic, "leapfrog"), J, START, 300)
        inside = us[: 5 if name == "no limit" else None]
        right.plot(*inside.T, marker=".", markersize=3, linewidth=0.8, label=f"leapfrog, {name}")
    right.plot(1, 1, "k*")
    right.set(xlim=(-2, 2), ylim=(-1, 3), title="Rosenbrock, h = 0.08, friction 1")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(file, dpi=120)


parser = argparse.ArgumentParser()
parser.add_argument("--figure", metavar="FILE.png", help="also draw energies and paths")
figure = parser.parse_args().figure

print("objective   scheme      speed  rate/friction  order  diverges from  steps (their length)")
rates, limits = {}, {}
for name, J in OBJECTIVES.items():
    for scheme in SCHEMES:
        for speed, kinetic in KINETICS.items():
            row = name, scheme, speed
            rates[row], limits[row] = rate(J, kinetic, scheme), diverges_from(J, kinetic, scheme)
            steps, length = steps_needed(J, kinetic, scheme)
            arrived = f"{steps} ({length:g})" if length == length else "over 2000"
            print(
                f"{name:10}  {scheme:10}  {speed:>5}  {rates[row]:13.3f}  "
                f"{order(J, kinetic, scheme):5.2f}  {limits[row]:13.3g}  {arrived}"
            )
if figure:
    draw(figure)

data = load_data("digits")
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), DEQ(DenseBlock(12, 64)), nn.Linear(12, data.outputs))
natural = ImplicitNGD(model, lr=0.5, damping=0.3, route="output")
guard = Guard(OuterMomentum(natural, friction=0.7, kinetic=Relativistic(speed=1.0)))
losses = []
for samples in torch.randperm(len(data.train_x))[:1000].split(25):
    losses.append(float(guard.step(data.train_x[samples], data.train_y[samples])))
print(f"digits, natural gradient with momentum: loss {losses[0]:.3f} -> {losses[-1]:.3f}")

if not all(abs(r - 1) < 0.01 for row, r in rates.items() if row[1] != "nesterov"):
    raise SystemExit(f"energy does not fall at the rate of the friction: {rates}")
if not all((limit < 4) == (row[2] == "none") for row, limit in limits.items()):
    raise SystemExit(f"a bounded speed diverges, or none does: {limits}")
if not sum(losses[-5:]) < 0.5 * sum(losses[:5]):
    raise SystemExit(f"the loss on the digits did not halve: {losses}")
print("ok: rates within 1 % of the friction but Nesterov's, no divergence with a bounded speed")
