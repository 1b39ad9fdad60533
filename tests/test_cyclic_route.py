"""Tests for `deqlqr/cyclic_route.py` and the route "cyclic"."""

import copy

import pytest
import torch
from torch import nn

from deqlqr import (
    DEQ,
    CategoricalKL,
    Controls,
    Cyclic,
    Dare,
    DenseBlock,
    Euclidean,
    ImplicitNGD,
    Kronecker,
    Krylov,
    LayerDamping,
    NeumannInverse,
    Newton,
    Output,
    linearize,
    static_step,
)
from deqlqr.layer_inverse import ExactInverse

from .problems import Cell, conv_batch, conv_model, dense_batch, dense_model, exact, randn, relative
from .test_linearize_phases import Skip, around, problem
from .test_phases import Residual, layers
from .test_routes import local, step

KL = CategoricalKL()
BY_SWEEPS = {"tol": 1e-13, "max_sweeps": 2000}
ADAPTIVE = Cyclic(damping="adaptive-layer")
minibatches = pytest.mark.parametrize("minibatch", ["exact", "per-sample"])


def trained(route, model, x, y, steps=3, **options):
    twin = copy.deepcopy(model)
    optimizer = ImplicitNGD(twin, route=route, **({"lr": 0.5, "damping": 0.1} | options))
    losses = [float(optimizer.step(x, y)) for _ in range(steps)]
    return Controls(twin).vector, losses, optimizer


@pytest.mark.parametrize("name", ["dense", "conv", "residual", "both", "frozen", "tuple"])
@minibatches
def test_step_gradient_and_metric_are_those_of_the_dare(name, minibatch):
    model, x, y = problem(name)
    for divergence in (KL, Euclidean()):
        ours, dare = (
            local(kind(minibatch), model, x, y, divergence, pieces=2) for kind in (Cyclic, Dare)
        )
        v = randn(Controls(model).m)
        assert float(ours.loss) == pytest.approx(float(dare.loss), rel=1e-12)
        assert relative(ours.gradient, dare.gradient) < 1e-9
        assert ours.metric(v) == pytest.approx(dare.metric(v), rel=1e-9)
        shifts = [0.1 + 0.02 * i for i in range(len(Controls(model).parameters))]
        one, other = ours.solve(shifts), dare.solve(shifts)
        assert relative(one.u, other.u) < 1e-8 and one.residual < 1e-9
        assert one.slope == pytest.approx(other.slope, rel=1e-8)
        assert one.curvature == pytest.approx(other.curvature, rel=1e-7)
        assert one.truncation is None is one.layer_damping and one.reason is None


@pytest.mark.parametrize("name", ["residual", "both"])
@minibatches
def test_the_gradient_is_autograds(name, minibatch):
    model, x, y = problem(name)
    loss = nn.functional.cross_entropy(model(x), y)
    expected = Controls(model).pull(loss)
    for route in (Cyclic(minibatch), Cyclic(minibatch, inverse="neumann")):
        assert relative(local(route, model, x, y, KL).gradient, expected) < 1e-9


@minibatches
@pytest.mark.parametrize("name", ["dense", "residual"])
def test_the_series_leads_to_the_same_step_where_it_converges(name, minibatch):
    model, x, y = problem(name)
    route = Cyclic(minibatch, inverse=NeumannInverse(20), **BY_SWEEPS)
    high = 300.0
    ours = step(route, model, x, y, KL, high)
    dare = step(Dare(minibatch), model, x, y, KL, high)
    assert ours.reason is None and relative(ours.u, dare.u) < 1e-8
    assert 0 <= ours.truncation < 1e-8 and ours.residual < 1e-8
    assert ours.layer_damping == pytest.approx([high] * len(ours.layer_damping))


@minibatches
@pytest.mark.parametrize("name", ["dense", "residual"])
def test_damping_by_layer_gives_one_step_by_both_inverses(name, minibatch):
    model, x, y = problem(name)
    exact_one, series = (
        step(Cyclic(minibatch, inverse=how, damping="adaptive-layer"), model, x, y, KL, 1e-2)
        for how in ("exact", "neumann")
    )
    assert exact_one.reason is None and series.reason is None
    assert relative(series.u, exact_one.u) < 1e-5
    assert exact_one.truncation == 0 < series.truncation <= 2.0**-20
    for one, other in zip(exact_one.layer_damping, series.layer_damping, strict=True):
        assert one == pytest.approx(other, rel=1e-5) and one >= 1e-2


def test_damping_by_layer_is_the_step_of_the_problem_with_that_damping():
    model, x, y = problem("residual")
    found = step(ADAPTIVE, model, x, y, KL, 1e-2)
    cyclic = linearize(model, x, y, cyclic=True)
    shift = cyclic.join([
        torch.full((m,), d).double() for m, d in zip(cyclic.m, found.layer_damping, strict=True)
    ])  # fmt: skip
    expected = static_step(linearize(model, x, y).damped(shift))
    assert relative(found.u, expected) < 1e-6
    assert found.slope == pytest.approx(
        float(local(Dare(), model, x, y, KL).gradient @ found.u), rel=1e-6
    )
    assert found.curvature == pytest.approx(local(Dare(), model, x, y, KL).metric(found.u), 1e-6)


def test_a_margin_of_the_users_own():
    model, x, y = problem("residual")
    close, wide = (
        step(Cyclic(damping=LayerDamping(margin)), model, x, y, KL, 1e-6) for margin in (1.1, 8.0)
    )
    assert close.layer_damping[0] * 7 < wide.layer_damping[0]
    assert float(wide.u.norm()) < float(close.u.norm())


def test_a_frozen_readout_leaves_the_damping_by_layer_as_it_is():
    """Phase 0 has no controls then, and all rho are 0 in the first sweep."""
    model, x, y = problem("residual")
    model[2].requires_grad_(False)
    exact_one, series = (
        step(Cyclic(inverse=how, damping="adaptive-layer"), model, x, y, KL, 1e-3)
        for how in ("exact", "neumann")
    )
    assert exact_one.reason is None and series.reason is None
    assert relative(series.u, exact_one.u) < 1e-2


@minibatches
def test_single_precision_model_with_double_precision_algebra(minibatch):
    torch.manual_seed(0)
    model, x, y = around(Residual(*layers())), randn(5, 6).float(), torch.arange(5) % 3
    options = {"steps": 1, "linalg_dtype": torch.float64}
    before = Controls(model).vector
    routes = (
        Dare(minibatch), Cyclic(minibatch), Cyclic(minibatch, damping="adaptive-layer"),
        Cyclic(minibatch, inverse="neumann", damping="adaptive-layer"),
    )  # fmt: skip
    dare, ours, by_layer, series = (trained(r, model, x, y, **options) for r in routes)
    assert ours[0].dtype == torch.float32 and ours[2].last_step.step_residual < 1e-9
    assert relative(ours[0] - before, dare[0] - before) < 1e-4
    assert relative(series[0] - before, by_layer[0] - before) < 1e-4
    assert all(optimizer.last_step.accepted for _, _, optimizer in (dare, ours, by_layer, series))


@minibatches
@pytest.mark.parametrize("name", ["dense", "shared weight"])
def test_three_steps_are_those_of_the_route_dare(name, minibatch):
    model, x, y = problem(name, 4)
    ours, losses, optimizer = trained(Cyclic(minibatch), model, x, y)
    dare, expected, _ = trained(Dare(minibatch), model, x, y)
    assert relative(ours, dare) < 1e-8 and losses == pytest.approx(expected, rel=1e-8)
    report = optimizer.last_step
    assert report.accepted and 0 <= report.closed_loop_radius < 1 and report.dare_residual < 1e-8


ROUTES = {
    "doubling": "cyclic",
    "by layer": ADAPTIVE,
    "per sample, neumann": Cyclic("per-sample", "neumann", "adaptive-layer"),
}


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_the_loss_falls(route):
    model, x, y = dense_model(), *dense_batch(6)
    _, losses, optimizer = trained(route, model, x, y, steps=4, lr=1.0)
    assert losses[-1] < 0.9 * losses[0] and optimizer.counts["rejected"] == 0


def test_convolutional_blocks_train_by_sweeps():
    model, (x, y) = conv_model(), conv_batch(6)
    route = Cyclic("per-sample", damping="adaptive-layer")
    losses = trained(route, model, x, y, steps=4, lr=1.0)[1]
    assert losses[-1] < losses[0]


def test_the_report_has_truncation_and_damping_by_layer_on_this_route_alone():
    model, x, y = problem("residual")
    report = lambda route: trained(route, model, x, y, steps=1)[2].last_step
    series = report(Cyclic(inverse="neumann", damping="adaptive-layer"))
    assert 0 < series.truncation <= 2.0**-20 and len(series.layer_damping) == 4
    assert report(ADAPTIVE).truncation == 0 and min(report(ADAPTIVE).layer_damping) >= 0.1
    for route in ("dare", "cyclic", Output(), Krylov(), Kronecker()):
        assert report(route).truncation is None is report(route).layer_damping


def test_a_series_that_diverges_is_a_rejection_and_more_damping_ends_it():
    model, x, y = problem("residual")
    fixed = Cyclic(inverse="neumann", damping="fixed")
    _, _, optimizer = trained(fixed, model, x, y, steps=1, damping=0.05)
    report = optimizer.last_step
    assert report.accepted and report.truncation < 1 and report.damping >= 0.5
    assert len(report.rejections) >= 1
    assert "Neumann series diverges: rho / delta = " in report.rejections[0]
    assert "in phase" in report.rejections[0]
    _, _, optimizer = trained(fixed, model, x, y, steps=1, damping=0.05, max_rejections=0)
    assert not optimizer.last_step.accepted and optimizer.last_step.truncation >= 1


def test_too_few_sweeps_are_a_rejection():
    model, x, y = problem("residual")
    route = Cyclic(damping="adaptive-layer", max_sweeps=2)
    before, (after, _, optimizer) = (
        Controls(model).vector, trained(route, model, x, y, steps=1, max_rejections=0)
    )  # fmt: skip
    assert torch.equal(after, before) and not optimizer.last_step.accepted
    assert "P has not settled within 2 sweeps" in optimizer.last_step.rejections[0]


def test_groups_with_damping_of_their_own_are_for_the_doubling():
    model, x, y = problem("residual")
    groups = lambda twin: [{"params": [twin[1].block[0].weight], "damping": 5.0}]
    vectors = []
    for route in ("dare", "cyclic"):
        twin = copy.deepcopy(model)
        optimizer = ImplicitNGD(twin, route=route, damping=0.1, param_groups=groups(twin))
        optimizer.step(x, y)
        vectors.append(Controls(twin).vector)
    assert relative(vectors[1], vectors[0]) < 1e-9
    for route in (ADAPTIVE, Cyclic(inverse="neumann")):
        optimizer = ImplicitNGD(model, route=route, damping=0.1, param_groups=groups(model))
        before = Controls(model).vector
        with pytest.raises(ValueError, match="one damping for all parameters of a layer, got 0.1"):
            optimizer.step(x, y)
        assert torch.equal(Controls(model).vector, before)
    whole = [{"params": list(model[2].parameters()), "damping": 5.0}]  # a layer to itself
    optimizer = ImplicitNGD(model, route=ADAPTIVE, damping=0.1, param_groups=whole)
    optimizer.step(x, y)
    assert optimizer.last_step.layer_damping[0] >= 5.0 > optimizer.last_step.layer_damping[2]


@minibatches
def test_newton_steps_are_those_of_the_route_dare(minibatch):
    model, x, y = problem("residual")
    ours, dare = (step(kind(minibatch), model, x, y, Newton(), 5.0) for kind in (Cyclic, Dare))
    assert relative(ours.u, dare.u) < 1e-8 and ours.reason is None
    ngd = {"divergence": "newton", "damping": 5.0}
    vectors = [trained(kind(minibatch), model, x, y, **ngd)[0] for kind in (Cyclic, Dare)]
    assert relative(*vectors) < 1e-8


def test_newton_without_a_solution_is_a_rejection_and_with_a_shared_weight_an_error():
    model, x, y = problem("residual")
    found = step(Cyclic(), model, x, y, Newton(), 1e-2)
    assert found.u is None and "cyclic DARE: 1 of 1" in found.reason
    model, x, y = problem("shared weight")
    optimizer = ImplicitNGD(model, route="cyclic", divergence="newton", damping=5.0)
    with pytest.raises(ValueError, match="act in several phases.*no Newton problem layer by layer"):
        optimizer.step(x, y)


def test_a_block_without_phases_is_refused_by_the_first_step():
    model = exact(around(Cell(4)))
    optimizer = ImplicitNGD(model, route="cyclic", damping=0.1)
    before = Controls(model).vector
    with pytest.raises(ValueError, match="block Cell has no phases.*Route 'dare' takes any block"):
        optimizer.step(randn(3, 6), torch.arange(3))
    assert torch.equal(Controls(model).vector, before)


@pytest.mark.parametrize("count", [0, 2])
def test_a_model_without_or_with_two_layers_is_refused(count):
    parts = [DEQ(DenseBlock(4)) for _ in range(count)]
    model = nn.Sequential(nn.Linear(6, 4), *parts, nn.Linear(4, 3))
    with pytest.raises(ValueError, match=f"exactly one DEQ layer, found {count}"):
        ImplicitNGD(model, route="cyclic")


@pytest.mark.parametrize(
    "most, minibatch, fits",
    [
        (33, "exact", True),
        (32, "exact", False),
        (11, "per-sample", True),
        (10, "per-sample", False),
    ],
)
def test_the_route_refuses_what_would_fill_the_memory(most, minibatch, fits):
    model, x, y = problem("residual")  # up to 11 states between two layers
    for options in ({}, {"damping": "adaptive-layer"}):
        route = Cyclic(minibatch, max_states=most, **options)
        if fits:
            assert step(route, model, x, y, KL).reason is None
        else:
            with pytest.raises(ValueError, match="3 samples of up to 11 states between two layers"):
                step(route, model, x, y, KL)


@pytest.mark.parametrize("route", ["cyclic", ADAPTIVE], ids=["doubling", "sweeps"])
def test_state_dict_resumes_bit_for_bit(route):
    model, x, y = problem("residual")
    options = {"momentum": 0.5, "adaptive": True, "weight_decay": 1e-3}
    optimizer = ImplicitNGD(model, route=route, damping=0.1, lr=0.5, **options)
    for _ in range(3):
        optimizer.step(x, y)
    other = copy.deepcopy(model)
    twin = ImplicitNGD(other, route=route, lr=9.0, damping=9.0, adaptive=True)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        assert torch.equal(optimizer.step(x, y), twin.step(x, y))
    assert torch.equal(Controls(model).vector, Controls(other).vector)


def test_freezing_between_steps_and_a_trust_region():
    torch.manual_seed(0)
    model = exact(Skip(Residual(*layers())))
    x, y = randn(4, 6), torch.arange(4) % 3
    optimizer = ImplicitNGD(model, route="cyclic", damping=0.1, trust_region=1e-4)
    optimizer.step(x, y)
    assert optimizer.last_step.shortened < 1
    model.enc.requires_grad_(False)
    held = model.enc.weight.clone()
    optimizer.step(x, y)
    assert torch.equal(model.enc.weight, held) and optimizer.last_step.accepted


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Cyclic("mean"), "minibatch must be one of"),
        (lambda: Cyclic(inverse="newman"), "inverse must be one of.*Did you mean 'neumann'"),
        (lambda: Cyclic(inverse=20), "inverse must be 'exact', 'neumann' or NeumannInverse"),
        (lambda: Cyclic(inverse=NeumannInverse), "inverse must be"),  # the class
        (lambda: Cyclic(damping="adaptive"), "damping must be one of"),
        (lambda: Cyclic(damping=0.1), "damping must be one of"),
        (lambda: Cyclic(max_states=0), "max_states must be at least 1"),
        (lambda: Cyclic(max_sweeps=0), "max_sweeps must be at least 1"),
        (lambda: Cyclic(tol=0.0), "tol must be finite and above 0"),
        (lambda: LayerDamping(margin=1.0), "margin must be finite and above 1"),
        (lambda: LayerDamping(margin="two"), "margin must be a number"),
        (lambda: LayerDamping(refresh_every=0), "refresh_every must be at least 1"),
        (lambda: NeumannInverse(0), "terms must be at least 1"),
        (lambda: NeumannInverse(2.5), "terms must be an int"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_option_that_does_not_exist_is_named_with_the_nearest():
    for make, name in ((Cyclic, "max_sweep"), (LayerDamping, "margins"), (NeumannInverse, "term")):
        with pytest.raises(
            TypeError, match=f"{make.__name__} has no option '{name}'; did you mean"
        ):
            make(**{name: 3})
    assert Cyclic(inverse=ExactInverse()) == Cyclic(inverse=ExactInverse())


def test_a_series_damps_by_layer_unless_told_otherwise():
    model, x, y = problem("residual")
    _, _, optimizer = trained(Cyclic(inverse="neumann"), model, x, y, steps=1, damping=1e-3)
    report = optimizer.last_step
    assert report.accepted and not report.rejections and report.truncation <= 2**-20


def test_damping_by_layer_serves_an_indefinite_hessian_too():
    model, x, y = problem("residual")
    _, _, optimizer = trained(
        Cyclic(damping="adaptive-layer"), model, x, y, steps=1, damping=0.1, divergence="newton"
    )
    assert max(optimizer.last_step.layer_damping) < 100
