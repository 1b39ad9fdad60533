"""Tests for `deqlqr/optim.py`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import deqlqr.riccati_route
from deqlqr import (
    DEQ,
    Controls,
    ConvergenceError,
    Dare,
    DareResult,
    DenseBlock,
    ImplicitNGD,
    linearize,
    static_step,
)

from .problems import conv_batch, conv_model, dense_batch, dense_model, randn, relative


def fresh(**options):
    model, (x, y) = dense_model(), dense_batch(6)
    return model, ImplicitNGD(model, **({"lr": 0.5, "damping": 0.1} | options)), x, y


@pytest.mark.parametrize("divergence", [None, "euclidean", "gaussian", "newton"])
def test_a_step_is_lr_times_the_static_step_and_returns_the_loss_before_it(divergence):
    damping = 3.0 if divergence == "newton" else 0.1
    model, opt, x, y = fresh(divergence=divergence, damping=damping)
    lqr = linearize(model, x, y, divergence=divergence, damping=damping).to(torch.float64)
    before, loss = Controls(model).vector, F.cross_entropy(model(x), y)
    returned = opt.step(x, y)
    assert not returned.requires_grad and returned.dim() == 0
    assert returned.item() == pytest.approx(loss.item(), rel=1e-5)
    change = (Controls(model).vector - before).double()
    assert relative(change, 0.5 * static_step(lqr)) < 1e-3
    report = opt.last_step
    assert report.accepted and report.damping == damping and report.rejections == ()
    assert report.loss_after == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-4)
    assert 0 < report.closed_loop_radius < 1 and report.dare_residual < 1e-4


def test_euclidean_step_is_gradient_descent_with_step_lr_over_one_plus_damping():
    model, opt, x, y = fresh(divergence="euclidean", damping=0.25, linalg_dtype=torch.float64)
    gradient = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    before = [p.detach().clone() for p in model.parameters()]
    opt.step(x, y)
    for p, old, g in zip(model.parameters(), before, gradient, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.5 / 1.25 * g, rtol=1e-3, atol=1e-5)


def test_per_sample_step_is_the_mean_of_the_samples_own_steps(monkeypatch):
    model, opt, x, y = fresh(route=Dare("per-sample"), linalg_dtype=torch.float64)
    single = linearize(model, x, y, minibatch="per-sample", damping=0.1).to(torch.float64)
    before = Controls(model).vector
    opt.step(x, y)
    change = (Controls(model).vector - before).double()
    assert relative(change, 0.5 * static_step(single).mean(0)) < 1e-4


@pytest.mark.parametrize("minibatch", ["exact", "per-sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_lowers_the_loss(minibatch, dtype):
    model, opt, x, y = fresh()
    model.to(dtype)
    opt = ImplicitNGD(model, lr=0.5, damping=0.1, route=Dare(minibatch))
    losses = [float(opt.step(x.to(dtype), y)) for _ in range(15)]
    assert losses[-1] < 0.6 * losses[0]


def test_convolutional_model_and_least_squares_train():
    model, (x, y) = conv_model(), conv_batch(4)
    opt = ImplicitNGD(model, lr=0.5, damping=0.1)
    losses = [float(opt.step(x, y)) for _ in range(8)]
    assert losses[-1] < losses[0]
    model, (x, _) = dense_model(), dense_batch(6)
    target = randn(6, 3, seed=9).float()
    opt = ImplicitNGD(model, loss="mse", lr=0.5, damping=0.01)
    losses = [float(opt.step(x, target)) for _ in range(8)]
    assert losses[-1] < 0.7 * losses[0]


def test_a_users_loss_and_divergence_train():
    model, (x, y) = dense_model(), dense_batch(6)
    loss = lambda out, y: F.cross_entropy(out, y, label_smoothing=0.1)
    kl = lambda y, r: (r.softmax(-1) * (r.log_softmax(-1) - y.log_softmax(-1))).sum()
    opt = ImplicitNGD(model, loss=loss, divergence=kl, lr=0.5, damping=0.1)
    losses = [float(opt.step(x, y)) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_frozen_parameters_do_not_move():
    model, (x, y) = dense_model(), dense_batch(6)
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.clone()
    ImplicitNGD(model, lr=0.5, damping=0.1).step(x, y)
    assert torch.equal(model[0].weight, frozen)


def lossy_block():
    """A linear block that keeps its fixed point only while its one weight is below 1."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(0.9))

        def forward(self, z, x):
            return self.rate * z + 0.1 * x

    return Block()


def test_a_step_that_loses_the_fixed_point_is_rejected_and_damped():
    torch.manual_seed(0)
    model = nn.Sequential(DEQ(lossy_block(), solver="picard", max_steps=400), nn.Linear(3, 3))
    with torch.no_grad():
        model[1].weight.copy_(0.2 * torch.eye(3))
        model[1].bias.zero_()
    x, y = 10 * torch.eye(3), torch.arange(3)  # a larger rate means a larger margin
    opt = ImplicitNGD(model, lr=30.0, damping=1e-3)
    opt.step(x, y)
    report = opt.last_step
    assert report.rejections and report.damping > 1e-3
    assert any("fixed point" in reason or "rose" in reason for reason in report.rejections)
    assert model[0].block.rate.item() < 1
    assert opt.current_damping == report.damping


def test_giving_up_leaves_the_parameters_bit_for_bit(monkeypatch):
    model, opt, x, y = fresh(max_rejections=2)
    failing = lambda self, start: (float("nan"), "no fixed point")
    monkeypatch.setattr(ImplicitNGD, "_checked", failing)
    before = Controls(model).vector
    opt.step(x, y)
    assert torch.equal(Controls(model).vector, before)
    report = opt.last_step
    assert not report.accepted and len(report.rejections) == 3
    assert report.damping == pytest.approx(10.0)  # 0.1, 1, 10


def test_failed_linear_algebra_is_rejected_and_damped(monkeypatch):
    model, opt, x, y = fresh()
    solve = deqlqr.riccati_route.factored_dare
    calls = []

    def first_fails(*args, **options):
        dare = solve(*args, **options)
        calls.append(1)
        if len(calls) == 1:
            object.__setattr__(dare, "result", torch.tensor(int(DareResult.NONE)))
        return dare

    monkeypatch.setattr(deqlqr.riccati_route, "factored_dare", first_fails)
    opt.step(x, y)
    assert opt.last_step.accepted and opt.last_step.damping == pytest.approx(1.0)
    assert "NONE" in opt.last_step.rejections[0]
    monkeypatch.undo()
    opt.step(x, y)
    assert opt.current_damping == pytest.approx(1.0 / 10**0.5)  # falls back once steps succeed


def test_a_rising_loss_is_rejected():
    model, opt, x, y = fresh(lr=200.0, damping=1e-3, max_increase=0.0)
    for _ in range(4):
        opt.step(x, y)
        assert not opt.last_step.accepted or opt.last_step.loss_after <= opt.last_step.loss
    assert opt.last_step.damping > 1e-3


def test_a_batch_without_fixed_point_undoes_the_previous_step_or_raises():
    model = nn.Sequential(DEQ(lossy_block(), solver="picard", max_steps=400), nn.Linear(3, 3))
    x, y = randn(3, 3).float(), torch.arange(3)
    opt = ImplicitNGD(model, lr=0.1, damping=1.0)
    opt.step(x, y)
    good = opt._recall("previous").clone()
    with torch.no_grad():
        model[0].block.rate.fill_(1.5)
    opt.step(x, y)
    assert opt.last_step.rolled_back and opt.last_step.damping >= 10.0
    assert (Controls(model).vector - good).norm() < 1.0 and model[0].block.rate.item() < 1
    with torch.no_grad():
        model[0].block.rate.fill_(1.5)
    lost = Controls(model).vector
    with pytest.raises(ConvergenceError, match="fixed point"):
        ImplicitNGD(model).step(x, y)
    assert torch.equal(Controls(model).vector, lost)


def test_state_dict_resumes_bit_for_bit():
    model, opt, x, y = fresh()
    opt.step(x, y)
    opt.param_groups[0]["damping_factor"] = 7.0
    other = copy.deepcopy(model)
    twin = ImplicitNGD(other, lr=0.1, damping=5.0)
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert twin.current_damping == pytest.approx(0.7)
    for _ in range(3):
        assert torch.equal(opt.step(x, y), twin.step(x, y))
    assert torch.equal(Controls(model).vector, Controls(other).vector)


def test_learning_rate_schedulers_apply():
    _, opt, x, y = fresh()
    schedule = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
    opt.step(x, y)
    schedule.step()
    assert opt.param_groups[0]["lr"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": 0.0}, "lr must be finite and above 0"),
        ({"lr": float("nan")}, "lr must be finite"),
        ({"damping": 0.0}, "damping must be finite and above 0"),
        ({"route": "krylof"}, "route must be one of"),
        ({"route": Dare}, "route must be a name or an object"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"trust_region": 0.0}, "trust_region must be finite and above 0"),
        ({"acceleration": True}, "acceleration needs route"),
        ({"param_groups": [{"params": [nn.Parameter(torch.ones(1))]}]}, "parameters of the model"),
        ({"loss": "hinge"}, "loss must be"),
        ({"loss": F.mse_loss}, "divergence must be given"),
        ({"divergence": "fisher"}, "divergence must be one of"),
        ({"linalg_dtype": torch.float16}, "linalg_dtype must be"),
        ({"max_rejections": -1}, "max_rejections must be"),
        ({"damping_increase": 1.0}, "damping_increase must be"),
        ({"momentum": 1.0}, "momentum must be below 1"),
        ({"momentun": 0.9}, "momentun"),
    ],
)
def test_misuse_names_the_argument(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ImplicitNGD(dense_model(), **options)


def test_a_model_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="exactly one DEQ layer, found 0"):
        ImplicitNGD(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="model must be an nn.Module"):
        ImplicitNGD(torch.tanh)
    frozen = dense_model().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        ImplicitNGD(frozen)


@pytest.mark.parametrize(
    "x, y, message",
    [
        (torch.full((6, 6), float("inf")), torch.arange(6) % 3, "x holds NaN or infinite"),
        (torch.ones(6, 6), torch.arange(6), r"y must hold labels in \[0, 2\]"),
        (torch.ones(6, 6), torch.arange(5) % 3, "y must have batch size 6"),
        (torch.ones(6, 6).double(), torch.arange(6) % 3, "x must be torch.float32"),
    ],
)
def test_bad_data_is_refused_and_changes_nothing(x, y, message):
    model, opt, *_ = fresh()
    before = Controls(model).vector
    with pytest.raises(ValueError, match=message):
        opt.step(x, y)
    assert torch.equal(Controls(model).vector, before) and opt.last_step is None


@pytest.mark.gpu
def test_a_step_on_the_gpu_agrees_with_the_cpu():
    model, opt, x, y = fresh(linalg_dtype=torch.float64)
    twin = copy.deepcopy(model).cuda()
    opt.step(x, y)
    ImplicitNGD(twin, lr=0.5, damping=0.1, linalg_dtype=torch.float64).step(x.cuda(), y.cuda())
    torch.testing.assert_close(
        Controls(twin).vector.cpu(), Controls(model).vector, rtol=1e-3, atol=1e-4
    )


def test_dense_block_trains_without_ever_losing_its_fixed_point():
    torch.manual_seed(0)
    model = nn.Sequential(DEQ(DenseBlock(4, 6)), nn.Linear(4, 3))
    opt = ImplicitNGD(model, lr=1.0, damping=1e-2)
    for seed in range(10):
        x = randn(8, 6, seed=seed).float()
        opt.step(x, (x[:, 0] > 0).long())
        assert model[0].solution.converged.all() and not opt.last_step.rolled_back
