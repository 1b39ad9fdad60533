"""Tests for `deqlqr/hamiltonian.py` and `deqlqr/hamiltonian_descent.py`."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from torch import nn

from deqlqr import DEQ, DenseBlock, ImplicitNGD
from deqlqr.checkpoint import load_checkpoint, save_checkpoint
from deqlqr.gradient_step import GradientStep
from deqlqr.guard import Guard
from deqlqr.hamiltonian import SCHEMES, Classical, Integrator, Relativistic
from deqlqr.hamiltonian_descent import HamiltonianDescent, OuterMomentum
from deqlqr.solution import ConvergenceError

from .problems import randn

CURVATURES = torch.tensor([1.0, 25.0], dtype=torch.float64)
KINETICS = (Classical(1.5), Relativistic(1.5, 2.0))
SYMPLECTIC = ("heavy-ball", "leapfrog")
START = torch.tensor([-1.2, 1.0, 0.3, -0.5], dtype=torch.float64)  # (u, p)


def quadratic(u):
    return (CURVATURES * u.square()).sum() / 2


def rosenbrock(u):
    return (1 - u[0]) ** 2 + 100 * (u[1] - u[0] ** 2) ** 2


def rosenbrock_gradient(u):
    inner = 200 * (u[1] - u[0].square())
    return torch.stack([2 * (u[0] - 1) - 2 * u[0] * inner, inner])


OBJECTIVES = {"quadratic": quadratic, "rosenbrock": rosenbrock}
GRADIENTS = {"quadratic": lambda u: CURVATURES * u, "rosenbrock": rosenbrock_gradient}
MINIMA = {"quadratic": torch.zeros(2).double(), "rosenbrock": torch.ones(2).double()}
objectives = pytest.mark.parametrize("objective", OBJECTIVES)
kinetics = pytest.mark.parametrize("kinetic", KINETICS, ids=lambda k: type(k).__name__)
schemes = pytest.mark.parametrize("scheme", SCHEMES)


def run(step, z, gradient, steps):
    """All (u, p) of a run, (steps + 1, 2 m)."""
    u, p = z.chunk(2)
    path = [z]
    for _ in range(steps):
        u, p = step(u, p, gradient)
        path.append(torch.cat([u, p]))
    return torch.stack(path)


def step_jacobian(integrator, J, z):
    gradient = torch.func.grad(J)
    of = lambda z: torch.cat(integrator.step(*z.chunk(2), gradient))
    return torch.func.jacrev(of)(z)


def omega(m):
    zero, one = torch.zeros(m, m, dtype=torch.float64), torch.eye(m, dtype=torch.float64)
    return torch.cat([torch.cat([zero, one], 1), torch.cat([-one, zero], 1)])


# --- the system ------------------------------------------------------------------------------


@kinetics
def test_the_velocity_is_the_gradient_of_the_energy(kinetic):
    p = 3 * randn(4)
    assert torch.allclose(torch.func.grad(kinetic.energy)(p), kinetic.velocity(p), rtol=1e-12)
    assert float(kinetic.energy(0 * p)) == 0 and not kinetic.velocity(0 * p).any()


def test_the_relativistic_energy_is_the_textbooks_and_classical_for_a_fast_light():
    p, m, c = randn(4), 0.7, 1.3
    textbook = c * (p.square().sum() + m**2 * c**2).sqrt() - m * c**2
    assert torch.allclose(Relativistic(m, c).energy(p), textbook, rtol=1e-13)
    assert torch.allclose(Relativistic(m, 1e9).velocity(p), Classical(m).velocity(p), rtol=1e-15)
    assert torch.allclose(Relativistic(m, 1e9).energy(p), Classical(m).energy(p), rtol=1e-15)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(mass=st.floats(1e-3, 1e3), speed=st.floats(1e-3, 1e3), size=st.floats(0, 1e12))
def test_the_relativistic_velocity_stays_below_its_speed(mass, speed, size):
    velocity = Relativistic(mass, speed).velocity(size * randn(3))
    assert float(velocity.norm()) <= speed * (1 + 1e-15)


@objectives
@kinetics
def test_energy_falls_like_the_power_of_the_friction(objective, kinetic):
    """dH/dt = -gamma p'grad K(p): the slides have half of it."""
    J, gamma = OBJECTIVES[objective], 0.7
    u, p = START.chunk(2)
    velocity = kinetic.velocity(p)
    H = lambda u, p: kinetic.energy(p) + J(u)
    rates = (velocity, -torch.func.grad(J)(u) - gamma * p)
    _, dH = torch.func.jvp(H, (u, p), rates)
    assert torch.allclose(dH, -gamma * p @ velocity, rtol=1e-10)


# --- the integrators -------------------------------------------------------------------------


@objectives
@kinetics
@schemes
def test_the_order_of_convergence(objective, kinetic, scheme):
    gradient, gamma = GRADIENTS[objective], 0.7
    assert torch.allclose(gradient(START[:2]), torch.func.grad(OBJECTIVES[objective])(START[:2]))

    def right(t, z):
        u, p = torch.as_tensor(z).chunk(2)
        return torch.cat([kinetic.velocity(p), -gradient(u) - gamma * p]).numpy()

    time, order = 0.05, 2 if scheme == "leapfrog" else 1
    exact = solve_ivp(right, (0, time), START.numpy(), "DOP853", rtol=1e-13, atol=1e-13).y[:, -1]
    errors = []
    for steps in (200, 400):
        integrator = Integrator(time / steps, gamma, kinetic, scheme)
        end = run(integrator.step, START, gradient, steps)[-1]
        errors.append(float((end - torch.as_tensor(exact)).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    objective=st.sampled_from(sorted(OBJECTIVES)),
    scheme=st.sampled_from(SYMPLECTIC),
    kinetic=st.sampled_from(KINETICS),
    h=st.floats(1e-3, 0.1),
    friction=st.floats(0, 10),
    seed=st.integers(0, 99),
)
def test_areas_shrink_by_the_friction_alone(objective, scheme, kinetic, h, friction, seed):
    integrator = Integrator(h, friction, kinetic, scheme)
    F = step_jacobian(integrator, OBJECTIVES[objective], randn(4, seed=seed))
    mu, Omega = math.exp(-friction * h), omega(2)
    assert (F.mT @ Omega @ F - mu * Omega).abs().max() < 1e-12 * max(1, float(F.norm()) ** 2)
    assert float(torch.linalg.det(F)) == pytest.approx(mu**2, rel=1e-10)


@objectives
@kinetics
def test_nesterovs_method_damps_more_by_the_square_of_the_step(objective, kinetic):
    J, friction = OBJECTIVES[objective], 0.7
    ratios, defects = [], []
    for h in (4e-3, 2e-3):
        mu = math.exp(-friction * h)
        F = step_jacobian(Integrator(h, friction, kinetic, "nesterov"), J, START)
        u, p = START.chunk(2)
        y = u + h * kinetic.velocity(mu * p)
        known = torch.func.hessian(J)(y) @ torch.func.jacrev(kinetic.velocity)(mu * p)
        extra = torch.linalg.det(torch.eye(2, dtype=torch.float64) - h**2 * known)
        assert float(torch.linalg.det(F)) == pytest.approx(mu**2 * float(extra), rel=1e-11)
        ratios.append(1 - float(extra))
        defects.append(float((F.mT @ omega(2) @ F - mu * omega(2)).norm()))
    assert math.log2(ratios[0] / ratios[1]) == pytest.approx(2, abs=0.02)
    assert math.log2(defects[0] / defects[1]) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("frequency", [0.5, 2.0])
@schemes
def test_an_oscillation_loses_energy_at_the_rate_of_the_friction(scheme, frequency):
    """Both eigenvalues of a step have the size e^(-rate h / 2) on a quadratic."""
    h, gamma, mass = 0.05, 0.3, 1.7
    J = lambda u: frequency**2 * mass * u.square().sum() / 2
    F = step_jacobian(Integrator(h, gamma, Classical(mass), scheme), J, randn(2))
    sizes = torch.linalg.eigvals(F).abs()
    extra = -math.log(1 - (h * frequency) ** 2) / h if scheme == "nesterov" else 0.0
    assert torch.allclose(-2 / h * sizes.log(), sizes.new_tensor(gamma + extra), rtol=1e-10)


def log_slope(energy, h):
    """Rate at which the energy falls, from least squares over a whole run."""
    t = h * np.arange(len(energy))
    return -np.polyfit(t, energy.log().numpy(), 1)[0]


@objectives
@kinetics
@schemes
def test_energy_near_a_minimum_falls_at_the_rate_of_the_friction(objective, kinetic, scheme):
    J, gradient, minimum = OBJECTIVES[objective], GRADIENTS[objective], MINIMA[objective]
    along = torch.linalg.eigh(torch.func.hessian(J)(minimum)).eigenvectors[:, 0]
    # Nesterov's damping in addition, h w^2, must be small beside gamma: short steps, and w the
    # smaller of the two frequencies.
    h, gamma = (0.004 if scheme == "nesterov" else 0.02), 0.6
    z = torch.cat([minimum + 1e-3 * along, torch.zeros(2, dtype=torch.float64)])
    every = round(0.1 / h)
    path = run(Integrator(h, gamma, kinetic, scheme).step, z, gradient, 250 * every)[::every]
    # With the last term, 0 on average over an oscillation, H falls without waves.
    energy = torch.stack([
        kinetic.energy(p) + J(u) + gamma / 2 * p @ (u - minimum)
        for u, p in (z.chunk(2) for z in path)
    ])
    assert log_slope(energy, h * every) == pytest.approx(gamma, rel=0.01)


@objectives
def test_a_bounded_velocity_oscillates_where_heavy_ball_diverges(objective):
    """It does not converge at such step lengths either."""
    gradient, h, friction = GRADIENTS[objective], 0.5, 0.5
    for scheme in SYMPLECTIC:
        free = run(Integrator(h, friction, Classical(), scheme).step, START, gradient, 100)
        held = run(Integrator(h, friction, Relativistic(speed=0.5), scheme).step, START, gradient,
                   1000)  # fmt: skip
        assert not bool((free[-1].abs() < 1e12).all())
        steps = held[:, :2].diff(dim=0).norm(dim=1)
        assert float(steps.max()) <= 0.5 * h + 1e-12  # of length h c at most
        assert float(held[:, :2].norm(dim=1).max()) < 10
        assert float((held[-100:, :2] - held[-100:, :2].mean(0)).norm(dim=1).max()) > 0.01


@pytest.mark.parametrize("scheme, limit", [("heavy-ball", None), ("leapfrog", 2.0)])
def test_the_largest_step_on_a_quadratic(scheme, limit):
    friction, J = 0.8, lambda u: u.square().sum() / 2

    def radius(h):
        return float(
            torch.linalg.eigvals(step_jacobian(Integrator(h, friction, scheme=scheme), J, randn(2)))
            .abs().max()
        )  # fmt: skip

    if limit is None:  # h^2 = 2 (1 + mu)
        limit = 1.5
        for _ in range(50):
            limit = (2 * (1 + math.exp(-friction * limit))) ** 0.5
    assert radius(0.999 * limit) < 1 < radius(1.001 * limit)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Classical(0.0), "mass must be finite and above 0"),
        (lambda: Relativistic(speed=-1.0), "speed must be finite and above 0"),
        (lambda: Relativistic(mass=math.inf), "mass must be"),
        (lambda: Integrator(0.0, 1.0), "h must be"),
        (lambda: Integrator(0.1, -1.0), "friction must be"),
        (lambda: Integrator(0.1, 1.0, scheme="verlet"), "scheme must be one of"),
        (lambda: Integrator(0.1, 1.0, kinetic="classical"), "kinetic must be"),
    ],
)
def test_bad_options_of_the_system_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- the optimizer ---------------------------------------------------------------------------


def pieces(dtype=torch.float64):
    """A problem of two parameters that needs both."""
    a, b = randn(3, seed=1).to(dtype), randn(2, 2, seed=2).to(dtype)
    parameters = [nn.Parameter(a), nn.Parameter(b)]
    target = randn(2, 3, seed=3).to(dtype)
    loss = lambda: (
        (parameters[1] @ target @ parameters[0] - 1).square().sum()
        + sum(p.square().sum() for p in parameters)
    )
    return parameters, loss


def train(optimizer, loss, steps, schedule=None):
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


def flat(parameters):
    return torch.cat([p.detach().reshape(-1).clone() for p in parameters])


@kinetics
@schemes
def test_the_optimizer_goes_through_the_integrators_positions(kinetic, scheme):
    h, friction = 0.1, 0.8
    parameters, loss = pieces()
    optimizer = HamiltonianDescent(parameters, h, friction=friction, kinetic=kinetic, scheme=scheme)
    shapes = [p.shape for p in parameters]

    def gradient(u):
        parts = [v.view(s) for v, s in zip(u.split([3, 4]), shapes, strict=True)]
        with torch.enable_grad():
            others, other_loss = pieces()
            for p, v in zip(others, parts, strict=True):
                p.data.copy_(v)
            return flat(torch.autograd.grad(other_loss(), others))

    z = torch.cat([flat(parameters), torch.zeros(7, dtype=torch.float64)])
    path = run(Integrator(h, friction, kinetic, scheme).step, z, gradient, 12)
    for u, p in zip(*path[1:].split(7, dim=1), strict=True):
        train(optimizer, loss, 1)
        position = flat(parameters)
        if scheme == "nesterov":
            position -= flat(optimizer.state[q]["ahead"] for q in parameters)
        assert torch.allclose(position, u, rtol=1e-10, atol=1e-12)
        if scheme != "leapfrog":
            energy = float(kinetic.energy(p))
            assert optimizer.kinetic_energy() == pytest.approx(energy, rel=1e-10)


@pytest.mark.parametrize("nesterov", [False, True])
def test_classical_descent_is_torchs_momentum(nesterov):
    h, friction, mass = 0.2, 1.1, 1.7
    ours, our_loss = pieces()
    theirs, their_loss = pieces()
    scheme = "nesterov" if nesterov else "heavy-ball"
    sgd = torch.optim.SGD(
        theirs, lr=h**2 / mass, momentum=math.exp(-friction * h), nesterov=nesterov
    )
    optimizer = HamiltonianDescent(
        ours, h, friction=friction, kinetic=Classical(mass), scheme=scheme
    )
    for _ in range(30):
        train(optimizer, our_loss, 1)
        train(sgd, their_loss, 1)
        assert torch.allclose(flat(ours), flat(theirs), rtol=1e-10, atol=1e-13)


@schemes
def test_a_resumed_run_repeats_the_other_bit_for_bit(scheme, tmp_path):
    def start():
        parameters, loss = pieces(torch.float32)
        optimizer = HamiltonianDescent(
            parameters, 0.2, friction=0.5, kinetic=Relativistic(2.0, 3.0), scheme=scheme
        )
        return parameters, loss, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    whole, loss, optimizer, schedule = start()
    train(optimizer, loss, 6, schedule)
    saved = {
        "optimizer": optimizer.state_dict(),
        "parameters": [p.detach().clone() for p in whole],
        "schedule": schedule.state_dict(),
    }
    save_checkpoint(tmp_path / "state.pt", saved)
    clone = copy.deepcopy(optimizer)
    pickled = pickle.loads(pickle.dumps(optimizer))
    train(optimizer, loss, 6, schedule)
    parts, loss, optimizer, schedule = start()
    saved = load_checkpoint(tmp_path / "state.pt")
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    for p, value in zip(parts, saved["parameters"], strict=True):
        p.data.copy_(value)
    train(optimizer, loss, 6, schedule)
    assert torch.equal(flat(whole), flat(parts)) and bool(flat(parts).isfinite().all())
    for other in (clone, pickled):
        assert other.kinetic == Relativistic(2.0, 3.0) and other.kinetic_energy() > 0
        other.restart()


def test_frozen_parameters_stay_and_schedules_and_groups_act():
    for scheme in SCHEMES:
        parameters, loss = pieces()
        groups = [{"params": parameters[:1], "lr": 0.0}, {"params": parameters[1:]}]
        optimizer = HamiltonianDescent(groups, 0.1, friction=0.5, scheme=scheme)
        before = flat(parameters[:1])
        train(optimizer, loss, 3)
        assert torch.equal(before, flat(parameters[:1]))  # of step length 0
        optimizer.param_groups[0]["lr"] = 0.1
        train(optimizer, loss, 3)
        assert not torch.equal(before, flat(parameters[:1]))
        before, energy = flat(parameters[1:]), optimizer.kinetic_energy()
        optimizer.zero_grad()
        loss().backward()
        parameters[1].grad = None
        optimizer.step()
        assert torch.equal(before, flat(parameters[1:])) and optimizer.kinetic_energy() != energy
    parameters, loss = pieces()
    optimizer = HamiltonianDescent(parameters, 0.1)
    before = flat(parameters)
    assert optimizer.step() is None and torch.equal(before, flat(parameters))  # no gradient


@schemes
def test_a_restart_forgets_the_momentum_and_comes_back_to_the_position(scheme):
    parameters, loss = pieces()
    optimizer = HamiltonianDescent(parameters, 0.1, friction=0.5, scheme=scheme)
    train(optimizer, loss, 5)
    ahead = flat(optimizer.state[p].get("ahead", 0 * p) for p in parameters)
    assert bool(ahead.any()) == (scheme == "nesterov") and optimizer.kinetic_energy() > 0
    before = flat(parameters)
    optimizer.restart()
    assert torch.equal(flat(parameters), before - ahead) and optimizer.kinetic_energy() == 0
    closure_calls = []

    def closure():
        closure_calls.append(1)
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    value = float(loss().detach())
    assert float(optimizer.step(closure).detach()) == value and len(closure_calls) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": -1.0}, "lr must be"),
        ({"friction": -1.0}, "friction must be"),
        ({"friction": math.nan}, "friction must be"),
        ({"scheme": "leap-frog"}, "scheme must be.*leapfrog"),
        ({"kinetic": Relativistic}, "kinetic must be"),
    ],
)
def test_bad_options_of_optimizer_and_outer_momentum_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HamiltonianDescent(pieces()[0], **options)
    with pytest.raises(ValueError, match=message):
        OuterMomentum(sgd_step(model_of()), **options)


def test_groups_share_scheme_and_kinetic_energy():
    parameters, _ = pieces()
    with pytest.raises(ValueError, match="mass must be 1.0 in all groups, got 2.0"):
        HamiltonianDescent([{"params": parameters, "mass": 2.0}])
    with pytest.raises(ValueError, match="friction must be"):
        HamiltonianDescent([{"params": parameters, "friction": -2.0}])


# --- outer momentum --------------------------------------------------------------------------


def model_of(seed=0, max_norm=0.9):
    torch.manual_seed(seed)
    block = DenseBlock(4, max_norm=max_norm, gain=0.8)
    return nn.Sequential(DEQ(block, tol=1e-6), nn.Linear(4, 3)).double()


def batch(samples=12):
    x = randn(samples, 4)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def sgd_step(model, lr=0.3, **options):
    return GradientStep(model, torch.optim.SGD(model.parameters(), lr=lr, **options))


def natural(model, **options):
    options = {"lr": 0.5, "damping": 0.1, "route": "output"} | options
    return ImplicitNGD(model, **options)


INNER = {
    "natural": natural,
    "sgd": sgd_step,
    "adam": lambda model: GradientStep(model, torch.optim.Adam(model.parameters(), lr=0.05)),
}


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("scheme", ["heavy-ball", "nesterov"])
def test_with_all_friction_it_is_the_inner_step_bit_for_bit(name, scheme):
    x, y = batch()
    ends = []
    for wrapped in (False, True):
        model = model_of()
        stepper = INNER[name](model)
        if wrapped:
            stepper = OuterMomentum(stepper, friction=1e4, scheme=scheme)
        losses = [float(stepper.step(x, y)) for _ in range(4)]
        ends.append(torch.cat([flat(model.parameters()), torch.tensor(losses).double()]))
    assert torch.equal(*ends)


@pytest.mark.parametrize("nesterov", [False, True])
def test_around_gradient_steps_it_is_gradient_descent_with_momentum(nesterov):
    x, y = batch()
    ours, theirs = model_of(), model_of()
    outer = OuterMomentum(
        sgd_step(ours), friction=0.5, scheme="nesterov" if nesterov else "heavy-ball"
    )
    peer = sgd_step(theirs, momentum=math.exp(-0.5), nesterov=nesterov)
    for _ in range(10):
        at = flat(theirs.parameters())
        ahead = 0.0
        if nesterov and outer.momentum:
            ahead = math.exp(-0.5) * flat(outer.momentum.values())
        assert torch.allclose(flat(ours.parameters()) + ahead, at, rtol=1e-8, atol=1e-10)
        assert float(outer.step(x, y)) == pytest.approx(float(peer.step(x, y)), rel=1e-8)


@kinetics
@schemes
def test_with_any_step_length_it_is_the_optimizer_on_the_same_system(kinetic, scheme):
    """With inner gradient steps of h^2 the impulse d/h is -h grad J."""
    x, y = batch()
    h, ours, theirs = 0.4, model_of(), model_of()
    options = {"friction": 0.9, "kinetic": kinetic, "scheme": scheme, "lr": h}
    outer = OuterMomentum(sgd_step(ours, lr=h**2), **options)
    optimizer = HamiltonianDescent(theirs.parameters(), **options)
    peer = GradientStep(theirs, optimizer)
    for _ in range(8):
        outer.step(x, y)
        peer.step(x, y)
        assert outer.kinetic_energy() == pytest.approx(optimizer.kinetic_energy(), rel=1e-6)
    optimizer.restart()
    assert torch.allclose(flat(ours.parameters()), flat(theirs.parameters()), rtol=1e-7, atol=1e-9)


def test_no_relativistic_step_is_longer_than_its_speed():
    x, y = batch()
    model = model_of()
    outer = OuterMomentum(natural(model, lr=2.0), kinetic=Relativistic(speed=0.05), lr=2.0)
    for _ in range(6):
        before = flat(model.parameters())
        outer.step(x, y)
        assert float((flat(model.parameters()) - before).norm()) <= 2.0 * 0.05 * (1 + 1e-12)


class Failing:
    """A stepper that moves the parameters and then fails."""

    def __init__(self, stepper):
        self.stepper, self.model, self.optimizer = stepper, stepper.model, stepper.optimizer
        self.error = None

    def step(self, x, y):
        loss = self.stepper.step(x, y)
        if self.error is not None:
            raise self.error
        return loss


@pytest.mark.parametrize("error", [ConvergenceError("lost"), KeyboardInterrupt()])
@schemes
def test_a_failed_inner_step_leaves_parameters_and_momentum_alone(scheme, error):
    x, y = batch()
    model = model_of()
    inner = Failing(sgd_step(model))
    outer = OuterMomentum(inner, friction=0.5, scheme=scheme)
    outer.step(x, y)
    before, momentum = flat(model.parameters()), dict(outer.momentum)
    inner.error = error
    with pytest.raises(type(error)):
        outer.step(x, y)
    assert torch.equal(before, flat(model.parameters())) and outer.momentum == momentum
    inner.error = None
    outer.step(x, y)
    assert not torch.equal(before, flat(model.parameters()))


def test_a_step_that_is_not_finite_is_not_taken():
    x, y = batch()
    model = model_of()
    outer = OuterMomentum(sgd_step(model), friction=0.5)
    outer.step(x, y)
    before = flat(model.parameters())
    outer.inner.optimizer.param_groups[0]["lr"] = math.inf
    with pytest.raises(ConvergenceError, match="not finite"):
        outer.step(x, y)
    assert torch.equal(before, flat(model.parameters())) and outer.kinetic_energy() < math.inf


def test_after_a_rejected_step_the_momentum_decays_and_carries_on():
    x, y = batch()
    model = model_of()
    inner = natural(model, max_rejections=0)
    outer = OuterMomentum(inner, friction=0.5)
    for _ in range(3):
        outer.step(x, y)
    inner.step_tolerance = 1e-300  # no direction is good enough
    before, momentum = flat(model.parameters()), flat(outer.momentum.values())
    outer.step(x, y)
    assert not inner.last_step.accepted
    assert torch.allclose(flat(outer.momentum.values()), math.exp(-0.5) * momentum, rtol=1e-12)
    assert torch.allclose(
        flat(model.parameters()), before + math.exp(-0.5) * momentum, rtol=1e-12, atol=1e-14
    )


def test_where_the_inner_step_goes_back_the_momentum_restarts():
    x, y = batch()
    model = model_of()
    inner = natural(model, check_every=1000)
    outer = OuterMomentum(inner, friction=0.05)
    for _ in range(3):
        outer.step(x, y)
    with torch.no_grad():
        model[1].bias += 100 * torch.eye(3, dtype=torch.float64)[0]  # far worse than before
    outer.step(x, y)
    assert inner.last_step.rolled_back and not outer.momentum
    assert float(model[1].bias.detach().abs().max()) < 50
    outer.step(x, y)
    assert outer.momentum and not inner.last_step.rolled_back


@pytest.mark.parametrize("scheme", ["heavy-ball", "nesterov"])
def test_a_guard_around_it_keeps_the_fixed_points(scheme):
    x, y = batch()
    torch.manual_seed(2)
    layer = DEQ(DenseBlock(4, max_norm=None, gain=0.8), solver="picard", max_steps=60, tol=1e-6)
    start = nn.Sequential(layer, nn.Linear(4, 3)).double()

    def outer(model):
        return OuterMomentum(sgd_step(model, lr=3.0), friction=0.5, scheme=scheme)

    model = copy.deepcopy(start)
    lost = outer(model)
    with pytest.raises(ConvergenceError):
        for _ in range(25):
            lost.step(x, y)
    model = copy.deepcopy(start)
    guard = Guard(outer(model), every=2)
    before = float(guard.step(x, y))
    for _ in range(25):
        last = float(guard.step(x, y))
    guard.check(x)
    assert guard.look(x).reason is None and last < before
    assert guard.counts["shortened"] + guard.counts["taken back"] + guard.counts["calmed"] > 0


def test_going_back_restores_the_inner_memory_and_restarts_the_momentum():
    x, y = batch()
    model = model_of()
    outer = OuterMomentum(INNER["adam"](model), friction=0.1)
    guard = Guard(outer, every=100)
    guard.step(x, y)
    adam = outer.inner.optimizer
    guard.check(x)
    memory = copy.deepcopy(adam.state_dict()["state"])
    good = flat(model.parameters())
    guard.step(x, y)
    guard.take_back("a test")
    assert torch.equal(good, flat(model.parameters())) and not outer.momentum
    now = adam.state_dict()["state"]
    assert all(torch.equal(now[k]["exp_avg"], memory[k]["exp_avg"]) for k in memory)
    assert guard.scale == 0.5 and outer.kinetic_energy() == 0


@pytest.mark.parametrize("name", INNER)
@schemes
def test_a_resumed_outer_momentum_repeats_the_other(name, scheme):
    x, y = batch()
    make = lambda model: OuterMomentum(INNER[name](model), friction=0.3, scheme=scheme)
    model = model_of()
    outer = make(model)
    for _ in range(3):
        outer.step(x, y)
    file = io.BytesIO()
    torch.save({"outer": outer.state_dict(), "model": model.state_dict()}, file)
    for _ in range(3):
        outer.step(x, y)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = model_of(seed=1)
    other.load_state_dict(saved["model"])
    resumed = make(other)
    resumed.load_state_dict(saved["outer"])
    for _ in range(3):
        resumed.step(x, y)
    assert torch.equal(flat(model.parameters()), flat(other.parameters()))
    with pytest.raises(ValueError, match="momentum of the model's parameters"):
        resumed.load_state_dict(saved["outer"] | {"momentum": {"0.block": torch.ones(1)}})


def test_a_parameter_frozen_on_the_way_stays_and_starts_anew():
    x, y = batch()
    model = model_of()
    outer = OuterMomentum(sgd_step(model), friction=0.1)
    outer.step(x, y)
    bias = model[1].bias
    bias.requires_grad_(False)
    before = bias.detach().clone()
    outer.step(x, y)
    assert torch.equal(before, bias) and "1.bias" not in outer.momentum
    bias.requires_grad_(True)
    outer.step(x, y)
    assert not torch.equal(before, bias)


@pytest.mark.gpu
@kinetics
@schemes
def test_the_gpu_agrees_with_the_cpu(kinetic, scheme):
    ends = []
    for device in ("cpu", "cuda"):
        x, y = (t.to(device) for t in batch())
        model = model_of().to(device)
        outer = OuterMomentum(natural(model), friction=0.5, kinetic=kinetic, scheme=scheme)
        optimizer = HamiltonianDescent(model.parameters(), 0.3, kinetic=kinetic, scheme=scheme)
        for stepper in (outer, GradientStep(model, optimizer)):
            for _ in range(3):
                stepper.step(x, y)
        ends.append(flat(model.parameters()).cpu())
    assert torch.allclose(*ends, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.1), "must be an ImplicitNGD or a"),
        (lambda m: OuterMomentum(sgd_step(m)), "must be an ImplicitNGD or a"),
        (lambda m: Guard(sgd_step(m)), "put the OuterMomentum into the Guard"),
        (lambda m: GradientStep(m, torch.optim.LBFGS(m.parameters())), "must not be L-BFGS"),
        (lambda m: natural(m, momentum=0.5), "momentum 0.*OuterMomentum.*momentum 0.5"),
    ],
)
def test_steppers_that_do_not_go_with_it_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        OuterMomentum(make(model_of()))


def test_the_outer_step_length_must_be_above_zero():
    with pytest.raises(ValueError, match="lr must be finite and above 0"):
        OuterMomentum(sgd_step(model_of()), lr=0.0)
