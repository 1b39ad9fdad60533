"""Tests for `deqlqr/guard.py`, `deqlqr/gradient_step.py`, and the penalty of `ImplicitNGD`."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from deqlqr import DEQ, Controls, DenseBlock, ImplicitNGD
from deqlqr.deq import layers_of
from deqlqr.gradient_step import GradientStep
from deqlqr.guard import Guard
from deqlqr.solution import ConvergenceError

from .problems import randn, relative

SAMPLES = 12


def free(seed=0, max_steps=60):
    """A layer whose block promises nothing, solved by plain iteration."""
    torch.manual_seed(seed)
    block = DenseBlock(4, max_norm=None, gain=0.8)
    return DEQ(block, solver="picard", max_steps=max_steps, tol=1e-6)


def free_model(seed=0):
    layer = free(seed=seed)
    return nn.Sequential(layer, nn.Linear(4, 3)).double()


def batch(samples=SAMPLES):
    x = randn(samples, 4)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def sgd(model, lr=3.0, momentum=0.0, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    return GradientStep(model, optimizer, **options)


def adam(model, lr=0.3, **options):
    return GradientStep(model, torch.optim.Adam(model.parameters(), lr=lr), **options)


def lbfgs(model, lr=2.0):
    optimizer = torch.optim.LBFGS(model.parameters(), lr=lr, max_iter=4)
    return GradientStep(model, optimizer)


def natural(route, check_every=1000):
    # Checks of its own would keep the step from being taken.
    return lambda model: ImplicitNGD(
        model, lr=3.0, damping=0.1, route=route, check_every=check_every
    )


STEPPERS = {
    "sgd": sgd,
    "momentum": lambda model: sgd(model, lr=2.0, momentum=0.9),
    "adam": adam,
    "lbfgs": lbfgs,
    "output": natural("output"),
    "kronecker": natural("kronecker"),
}
SEEDS = {"sgd": 2, "momentum": 2}  # of models that such steps bring to lose their fixed points


class Failing:
    """A stepper that fails after some steps, and again at every attempt."""

    def __init__(self, stepper, after, error, limit=200):
        self.stepper, self.model, self.optimizer = stepper, stepper.model, stepper.optimizer
        self.left, self.error, self.limit, self.attempts = after, error, limit, 0

    def step(self, x, y):
        if self.left > 0:
            self.left -= 1
            return self.stepper.step(x, y)
        self.attempts += 1
        assert self.attempts < self.limit, "the guard never gives up"
        raise self.error


def parameters(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def finite(state):
    if isinstance(state, torch.Tensor):
        return bool(state.isfinite().all())
    if isinstance(state, dict | list | tuple):
        return all(map(finite, state.values() if isinstance(state, dict) else state))
    return True


def loss_of(model, x, y):
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(x), y))


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


# --- far too long steps ----------------------------------------------------------------------


@pytest.mark.parametrize("name", STEPPERS)
def test_far_too_long_steps_lose_the_fixed_points_and_guarded_ones_do_not(name):
    x, y = batch()
    model = free_model(SEEDS.get(name, 1))
    stepper, watcher = STEPPERS[name](model), Guard(sgd(model))
    lost = False
    for _ in range(6):
        try:
            stepper.step(x, y)
        except ConvergenceError:
            lost = True
            break
        found = watcher.look(x)
        lost = lost or found.failed > 0 or not found.finite
    assert lost, "the steps are not too long for this test"

    model = free_model(SEEDS.get(name, 1))
    before = loss_of(model, x, y)
    guard = Guard(STEPPERS[name](model), every=1, samples=SAMPLES)
    for _ in range(6):
        guard.step(x, y)
        events = dict(guard.counts)
        found = guard.look(x)
        assert found.reason is None and found.failed == 0 and found.finite
        assert found.radius <= guard.max_radius
    assert loss_of(model, x, y) < before
    assert events["looks"] > 6
    assert events["shortened"] + events["taken back"] + events["calmed"] > 0
    assert finite(guard.optimizer.state_dict())


@pytest.mark.parametrize("every", [1, 4])
def test_short_steps_are_those_of_the_optimizer_itself(every):
    x, y = batch()
    ends = []
    for guarded in (False, True):
        model = free_model()
        stepper = sgd(model, lr=0.05, momentum=0.9)
        guard = Guard(stepper, every=every)
        losses = [(guard if guarded else stepper).step(x, y) for _ in range(8)]
        ends.append((parameters(model), torch.stack(losses)))
    assert torch.equal(ends[0][0], ends[1][0]) and torch.equal(ends[0][1], ends[1][1])
    assert guard.scale == 1.0
    assert guard.counts == {"looks": 1 + 8 // every, "shortened": 0, "taken back": 0, "calmed": 0}


def test_the_way_is_shortened_along_the_way_that_was_gone():
    x, y = batch()
    model = free_model()
    guard = Guard(sgd(model, lr=1e-3), every=1)
    guard.step(x, y)
    start = parameters(model)
    with torch.no_grad():  # the outputs overflow: no matter of A
        model[1].weight.add_(1.7e308 * model[0](x)[0].sign())
    end = parameters(model)
    assert guard.check(x).reason == "outputs are not finite"
    assert guard.look(x).reason is None
    gone = parameters(model)
    assert any(torch.allclose(gone, torch.lerp(start, end, 2.0**-j)) for j in range(1, 20))
    assert (guard.counts["shortened"], guard.counts["taken back"]) == (1, 0)
    assert guard.scale < 1


def test_the_scale_goes_on_the_step_and_recovers():
    x, y = batch()
    model = free_model()
    guard = Guard(sgd(model, lr=1e-3), every=1)
    guard.step(x, y)
    guard.load_state_dict(guard.state_dict() | {"scale": 0.25})
    start, g = parameters(model), gradient(model, x, y)
    guard.step(x, y)
    assert relative(parameters(model) - start, -0.25e-3 * g) < 1e-9
    assert guard.optimizer.param_groups[0]["lr"] == 1e-3
    scales = [guard.scale]
    for _ in range(30):
        guard.step(x, y)
        scales.append(guard.scale)
    assert scales[0] > 0.25 and scales == sorted(scales) and scales[-1] == 1.0


def gradient(model, x, y):
    loss = nn.functional.cross_entropy(model(x), y)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])


# --- when it cannot go on --------------------------------------------------------------------


def assert_held(guard, x):
    """The model has fixed points, and nothing in the optimizer is lost."""
    assert guard.look(x).reason is None
    assert finite(guard.optimizer.state_dict()) and finite(guard.model.state_dict())
    assert all(group["lr"] > 1e-3 for group in guard.optimizer.param_groups)


def test_where_no_step_can_be_taken_the_last_good_parameters_are_back():
    x, y = batch()
    model = free_model()
    inner = adam(model, lr=0.01)
    guard = Guard(Failing(inner, 3, ConvergenceError("no way")), every=1)
    for _ in range(3):
        guard.step(x, y)
    with pytest.raises(ConvergenceError, match="cannot go on.*no way.*last parameters"):
        guard.step(x, y)
    assert_held(guard, x)


def test_a_start_without_fixed_points_is_calmed_and_training_goes_on():
    x, y = batch()
    model = free_model()
    with torch.no_grad():
        model[0].block.state.weight.mul_(2.5)
    guard = Guard(sgd(model))
    assert guard.look(x).reason is not None
    guard.step(x, y)
    assert guard.counts["calmed"] > 0 and guard.look(x).reason is None


def test_training_does_not_start_where_that_fails():
    x, y = batch()
    model = free_model()
    with torch.no_grad():
        model[0].block.state.weight.mul_(10.0)
    for p in model[0].block.parameters():
        p.requires_grad_(False)
    before = parameters(model)
    guard = Guard(sgd(model))
    with pytest.raises(ConvergenceError, match="training cannot start.*no fixed point"):
        guard.step(x, y)
    assert torch.equal(parameters(model), before)
    with pytest.raises(ConvergenceError, match="no parameters to go back to: why"):
        guard.take_back("why")


def test_parameters_that_are_not_finite_fail_a_look_and_are_taken_back():
    x, y = batch()
    model = nn.Sequential(DEQ(DenseBlock(4)), nn.Linear(4, 3)).double()
    guard = Guard(sgd(model, lr=1e-3), every=10)
    guard.step(x, y)
    with torch.no_grad():
        model[0].block.state.weight[0, 0] = float("nan")  # which an SVD does not take
    assert guard.look(x).reason == "parameters are not finite"
    guard.check(x)
    assert guard.look(x).reason is None and guard.counts["taken back"] == 1


def test_what_a_look_sees_it_leaves_alone_and_every_call_of_a_layer_counts():
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            layer = DEQ(DenseBlock(4, gain=0.8), solver="picard", max_steps=3)
            self.layer, self.last = layer, nn.Linear(4, 3)

        def forward(self, x):
            return self.last(self.layer(x) + self.layer(0 * x))  # only the first call fails

    x, _ = batch()
    model = Twice().double()
    guard = Guard(sgd(model))
    assert guard.look(x).failed == 1.0
    assert model.layer.solution is None


@pytest.mark.parametrize("where", ["inputs", "targets"])
def test_a_batch_with_nan_changes_nothing_for_good_and_training_goes_on_after_it(where):
    x, y = batch()
    target = randn(SAMPLES, 3, seed=3)
    model = free_model()
    model[0].block.requires_grad_(False)  # which leaves (GU2) nothing to try: quicker
    guard = Guard(Failing(sgd(model, lr=0.01, loss="mse"), 10**9, ValueError()), every=1)
    for _ in range(3):
        guard.step(x, target)
    wrong = (x if where == "inputs" else target).clone()
    wrong[0, 0] = torch.nan
    inner = guard.stepper.stepper
    guard.stepper.step = limited(inner.step, 200)
    with pytest.raises((ValueError, ConvergenceError)):
        guard.step(*((wrong, target) if where == "inputs" else (x, wrong)))
    assert_held(guard, x)
    guard.stepper.step = inner.step
    guard.step(x, target)
    assert_held(guard, x)


def limited(step, most):
    """Return a step that may be attempted so many times."""
    attempts = []

    def counted(x, y):
        attempts.append(1)
        assert len(attempts) < most, "the guard never gives up"
        return step(x, y)

    return counted


@pytest.mark.parametrize("make", [sgd, natural("output")], ids=["sgd", "output"])
def test_data_that_do_not_fit_are_refused_and_nothing_changes(make):
    x, y = batch()
    model = free_model()
    guard = Guard(make(model), every=1)
    guard.step(x, y)
    guard.load_state_dict(guard.state_dict() | {"scale": 0.25})
    lr = guard.optimizer.param_groups[0]["lr"]
    before = copy.deepcopy((model.state_dict(), guard.state_dict()))
    with pytest.raises((ValueError, RuntimeError), match="Float|float"):
        guard.step(x, y.float())
    assert same(model.state_dict(), before[0]) and same(guard.state_dict(), before[1])
    assert guard.optimizer.param_groups[0]["lr"] == lr


def test_an_error_of_the_stepper_passes_through():
    x, y = batch()
    model = free_model()
    guard = Guard(Failing(sgd(model, lr=0.01), 1, ValueError("not today")), every=1)
    guard.step(x, y)
    before = copy.deepcopy((model.state_dict(), guard.state_dict()))
    with pytest.raises(ValueError, match="not today"):
        guard.step(x, y)
    assert same(model.state_dict(), before[0]) and same(guard.state_dict(), before[1])


@pytest.mark.parametrize("number", [0, 3])
def test_taking_back_returns_a_state_that_passed_and_the_memory_it_had(number):
    x, y = batch()
    model = free_model()
    guard = Guard(adam(model, lr=0.01), every=1)
    states = []
    for _ in range(5):
        guard.step(x, y)
        states.append(copy.deepcopy((model.state_dict(), guard.optimizer.state_dict()["state"])))
    for _ in range(number):
        guard.take_back("a test")
    guard.take_back("a test")
    now = (dict(model.state_dict()), guard.optimizer.state_dict()["state"])
    passed = [i for i, s in enumerate(states) if same(now, (dict(s[0]), s[1]))]
    assert passed and passed[0] < 4 and guard.counts["taken back"] == number + 1


# --- models and batches of all kinds ---------------------------------------------------------


class Pair(nn.Module):
    """A block with two states."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def state_shape(self, x):
        return (4,), (4,)

    def forward(self, z, x):
        a, b = z
        return torch.tanh(0.5 * self.first(b) + x), torch.tanh(0.5 * self.second(a))


class Sum(nn.Module):
    def forward(self, z):
        return z[0] + z[1]


class Scaled(nn.Module):
    """A block with a keyword."""

    def __init__(self):
        super().__init__()
        self.inner = DenseBlock(4, max_norm=None, gain=0.8)

    def forward(self, z, x, *, shift):
        return self.inner(z, x + shift)


class Shifting(nn.Module):
    """Gives its layer a keyword that depends on a parameter."""

    def __init__(self):
        super().__init__()
        self.layer, self.readout = DEQ(Scaled(), tol=1e-12), nn.Linear(4, 3)
        self.shift = nn.Parameter(torch.full((4,), 0.3))

    def forward(self, x):
        return self.readout(self.layer(x, shift=self.shift))


def kinds():
    torch.manual_seed(0)
    yield "no layer", nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    yield "two layers", nn.Sequential(free(), free(seed=1), nn.Linear(4, 3))
    yield "tuple state", nn.Sequential(DEQ(Pair()), Sum(), nn.Linear(4, 3))
    yield "keyword", Shifting()
    yield "batch norm", nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), free(), nn.Linear(4, 3))
    yield "dropout", nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), free(), nn.Linear(4, 3))


KINDS = dict(kinds())


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_all_kinds_are_looked_at_and_trained(kind):
    model = copy.deepcopy(KINDS[kind]).double()
    x, y = batch()
    guard = Guard(adam(model, lr=0.1), every=1, samples=SAMPLES)
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    found = guard.look(x)
    assert found.reason is None and same(model.state_dict(), before)
    assert torch.equal(random, torch.get_rng_state())
    assert (found.radius != found.radius) == (kind == "no layer")
    assert all(layer.on_failure == "raise" for layer in layers_of(model))
    for size in (SAMPLES, 5, 1 if kind != "batch norm" else 2, SAMPLES):
        guard.step(x[:size], y[:size])
    if kind != "dropout":  # where a look and the next are at two models
        assert guard.look(x).reason is None
    assert not torch.equal(parameters(model), Controls(KINDS[kind]).vector.double())


def test_a_look_is_at_the_sample_that_is_worst():
    """Of a model with one sample near the bifurcation, and of two layers the worse one."""
    weak, strong = free(max_steps=500), free(max_steps=500)
    for layer, w in ((weak, 0.1), (strong, 0.9)):
        with torch.no_grad():
            layer.block.state.weight.copy_(w * torch.eye(4))
    model = nn.Sequential(weak, strong).double()
    x = 5.0 + randn(SAMPLES, 4).abs()  # saturated: A is nearly 0 ...
    x[7] = 0.01  # ... but here
    assert Guard(sgd(model), samples=1).look(x).radius == pytest.approx(0.9, abs=0.03)
    assert Guard(sgd(model), samples=1).look(x[:7]).radius < 0.7
    assert Guard(sgd(model), max_radius=0.8).look(x).reason.startswith("the spectral radius")


def test_samples_without_a_fixed_point_are_counted_and_some_may_be_allowed():
    model = free_model()
    x, _ = batch()
    x[3] = torch.nan
    with pytest.raises(ConvergenceError):
        model(x)
    found = Guard(sgd(model)).look(x)
    assert found.failed == pytest.approx(1 / SAMPLES) and found.reason is not None
    with torch.no_grad():
        model[0].block.state.weight.copy_(-1.5 * torch.eye(4))
    x = 5.0 + randn(SAMPLES, 4).abs()
    x[3] = 0.5
    strict = Guard(sgd(model), max_radius=100.0)
    lenient = Guard(sgd(model), max_radius=100.0, max_failed=0.1)
    assert strict.look(x).failed == pytest.approx(1 / SAMPLES) and strict.look(x).finite
    assert "have no fixed point" in strict.last_look.reason
    assert lenient.look(x).reason is None


def test_a_sample_of_huge_values_does_no_harm():
    x, y = batch()
    model = free_model()
    guard = Guard(sgd(model, lr=0.5), every=1)
    x[2] = 1e100
    for _ in range(3):
        guard.step(x, y)
    assert_held(guard, x)


# --- saving and resuming ---------------------------------------------------------------------


def through_a_file(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


RESUMED = {
    "adam": adam,
    "lbfgs": lbfgs,
    "output": natural("output", check_every=1),
    "kronecker": natural("kronecker", check_every=1),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_the_uninterrupted_one(name):
    x, y = batch()
    whole = Guard(RESUMED[name](free_model(seed=1)), every=2)
    for _ in range(3):
        whole.step(x, y)
    content = through_a_file({
        "model": whole.model.state_dict(),
        "optimizer": whole.optimizer.state_dict(),
        "guard": whole.state_dict(),
    })
    parts = Guard(RESUMED[name](free_model(seed=5)), every=2)
    parts.model.load_state_dict(content["model"])
    parts.optimizer.load_state_dict(content["optimizer"])
    parts.load_state_dict(content["guard"])
    for _ in range(3):
        assert torch.equal(whole.step(x, y), parts.step(x, y))
    assert same(whole.state_dict(), parts.state_dict())
    assert torch.equal(parameters(whole.model), parameters(parts.model))
    assert whole.counts["looks"] > 3


def test_a_state_dict_is_not_changed_by_steps_after_it():
    x, y = batch()
    guard = Guard(adam(free_model(), lr=0.01), every=1)
    guard.step(x, y)
    state = guard.state_dict()
    held = copy.deepcopy(state)
    for _ in range(3):
        guard.step(x, y)
    guard.take_back("a test")
    assert same(state, held)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("max_radius", v) for v in (0.0, -1.0, float("nan"), float("inf"), "x")],
        *[(name, v) for name in ("every", "samples") for v in (0, -1, 2.5, True, None)],
        *[("max_failed", v) for v in (-0.1, float("nan"), float("inf"), "x")],
    ],
)
def test_options_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} must"):
        Guard(sgd(free_model()), **{name: value})


# --- the penalty -----------------------------------------------------------------------------


def dense_penalty(layer, z, x, seed, **shared):
    """(J1) from every sample's own A."""
    f = lambda v, s: layer.block(v[None], x[s : s + 1], **shared)[0]
    A = torch.stack([torch.func.jacrev(f)(z[s], s) for s in range(len(z))])
    e = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), dtype=z.dtype)
    return (A.mT @ e[..., None]).square().sum() / z.numel()


def penalty_gradient(model, layer, x, seed, **shared):
    value = dense_penalty(layer, layer(x, **shared), x, seed, **shared)
    found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    pairs = zip(found, model.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs])


def tight_model():
    torch.manual_seed(0)
    layer = DEQ(DenseBlock(4, max_norm=None, gain=0.8), tol=1e-12)
    return nn.Sequential(layer, nn.Linear(4, 3)).double()


def test_the_gradient_of_a_step_is_that_of_loss_and_penalty():
    x, y = batch()
    model = tight_model()
    stepper = sgd(model, lr=1.0, penalty=0.7)
    for taken in range(2):  # with other random vectors at every step
        before = parameters(model)
        loss = nn.functional.cross_entropy(model(x), y).detach()
        g = gradient(model, x, y) + 0.7 * penalty_gradient(model, model[0], x, taken)
        assert float(stepper.step(x, y)) == pytest.approx(float(loss))
        assert relative(parameters(model) - before, -g) < 1e-7


def test_the_penalty_of_a_layer_with_a_keyword_reaches_what_the_keyword_is_made_from():
    x, y = batch()
    torch.manual_seed(0)
    model = Shifting().double()
    g = gradient(model, x, y)
    g = g + 0.7 * penalty_gradient(model, model.layer, x, 0, shift=model.shift)
    before = parameters(model)
    sgd(model, lr=1.0, penalty=0.7).step(x, y)
    assert relative(parameters(model) - before, -g) < 1e-7
    assert g[:4].norm() > 0  # the shift


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("route", ["output", "dare"])
def test_the_natural_step_takes_the_penalty_off(route, chunk_size):
    x, y = batch()
    if route == "dare" and chunk_size is not None:
        pytest.skip("one LQR takes the batch whole")
    steps = []
    for penalty in (0.0, 0.1):
        model = tight_model()
        optimizer = ImplicitNGD(
            model, lr=1.0, damping=0.5, route=route, penalty=penalty, chunk_size=chunk_size,
            max_increase=1e3,
        )  # fmt: skip
        before = parameters(model)
        optimizer.step(x, y)
        assert optimizer.last_step.accepted and not optimizer.last_step.rejections
        steps.append(parameters(model) - before)
    model = tight_model()
    pieces = [x] if chunk_size is None else list(x.split(chunk_size))
    g = sum(len(p) / len(x) * penalty_gradient(model, model[0], p, 0) for p in pieces)
    assert relative(steps[1] - steps[0], -0.1 * g) < 1e-6


@pytest.mark.parametrize("make", ["adam", "output"])
def test_training_with_the_penalty_leaves_a_smaller_jacobian(make):
    x, y = batch()
    norms = []
    for penalty in (0.0, 1.0):
        model = tight_model()
        if make == "adam":
            stepper = adam(model, lr=0.02, penalty=penalty)
        else:
            stepper = ImplicitNGD(model, lr=0.3, damping=0.5, route="output", penalty=penalty)
        for _ in range(12):
            stepper.step(x, y)
        z = model[0](x).detach()
        values = [dense_penalty(model[0], z, x, seed).detach() for seed in range(10)]
        norms.append(float(torch.stack(values).mean()))
    start = tight_model()
    z = start[0](x).detach()
    first = torch.stack([dense_penalty(start[0], z, x, seed).detach() for seed in range(10)]).mean()
    assert norms[1] < 0.7 * norms[0] and norms[1] < 0.8 * float(first)


def test_a_run_with_penalty_resumes_bit_for_bit():
    x, y = batch()
    for natural_step in (False, True):
        make = lambda model, natural_step=natural_step: (
            ImplicitNGD(model, lr=0.3, damping=0.5, route="output", penalty=0.2, momentum=0.5)
            if natural_step
            else adam(model, lr=0.02, penalty=0.2)
        )
        model, twin = tight_model(), free_model(seed=3)
        twin[0].solver = model[0].solver
        stepper, other = make(model), make(twin)
        for _ in range(2):
            stepper.step(x, y)
        twin.load_state_dict(model.state_dict())
        of = lambda s: s if isinstance(s, torch.optim.Optimizer) else s.optimizer
        of(other).load_state_dict(through_a_file(of(stepper).state_dict()))
        if not natural_step:
            other.taken = stepper.taken
        for _ in range(2):
            assert torch.equal(stepper.step(x, y), other.step(x, y))
        assert torch.equal(parameters(model), parameters(twin))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "x"])
def test_a_penalty_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match="^penalty must"):
        sgd(free_model(), penalty=value)
    with pytest.raises(ValueError, match="^penalty must"):
        ImplicitNGD(free_model(), penalty=value)


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="loss"):
        sgd(free_model(), loss="no such")


# --- torch's cache of parametrised weights ---------------------------------------------------


class Doubled(nn.Module):
    def forward(self, X):
        return 2.0 * X


@pytest.mark.parametrize("route", ["dare", "output", "krylov", "kronecker"])
def test_a_natural_step_within_the_cache_of_parametrised_weights_is_refused(route):
    x, y = batch()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), DEQ(DenseBlock(4)), nn.Linear(4, 3)).double()
    parametrize.register_parametrization(model[0], "weight", Doubled())
    optimizer = ImplicitNGD(model, lr=0.5, damping=0.5, route=route)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with parametrize.cached():
        model(x)
        with pytest.raises(ValueError, match="outside torch.nn.utils.parametrize.cached"):
            optimizer.step(x, y)
    assert same(model.state_dict(), before[0]) and same(optimizer.state_dict(), before[1])
    loss = loss_of(model, x, y)
    for _ in range(3):
        optimizer.step(x, y)
    assert loss_of(model, x, y) < loss


def test_what_is_no_stepper_is_refused_by_name():
    model = free_model()
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="stepper must be .* got Adam; put a torch optimizer into"):
        Guard(adam)
    with pytest.raises(ValueError, match="model must be an nn.Module, got Adam"):
        GradientStep(adam, model)
    with pytest.raises(ValueError, match="optimizer must be a torch one, got Sequential"):
        GradientStep(model, model)
