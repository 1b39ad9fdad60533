"""Tests for `deqlqr/feedback.py`: (DD11) against K by SciPy and fixed points by plain iteration."""

import copy
import math
from pathlib import Path

import pytest
import scipy.linalg
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import deqlqr.feedback
from deqlqr import (
    DEQ,
    Controls,
    ConvergenceError,
    Cyclic,
    Dare,
    DenseBlock,
    ImplicitNGD,
    Picard,
    linearize,
)
from deqlqr.batch import Batch
from deqlqr.cli import main
from deqlqr.divergence import make_divergence
from deqlqr.loss import make_loss
from deqlqr.riccati_route import RiccatiProblem
from deqlqr.routes import Memory
from deqlqr.training import TrainConfig

from .problems import conv_batch, conv_model, dense_batch, dense_model, exact, randn, relative


def dense_case() -> tuple[nn.Module, Tensor, Tensor]:
    x, y = dense_batch(6)
    return exact(dense_model()), x.double(), y


def conv_case() -> tuple[nn.Module, Tensor, Tensor]:
    x, y = conv_batch(3)
    return exact(conv_model()), x.double(), y


def encoded(model: nn.Module, x: Tensor, u: Tensor) -> Tensor:
    """The fixed points, by plain iteration, with parameters u of the encoder, model[0]."""
    named = {
        name.removeprefix("0."): value
        for name, value in Controls(model).unflatten(u).items()
        if name.startswith("0.")
    }
    inputs = torch.func.functional_call(model[0], named, (x,))
    z = torch.zeros_like(model[1].initial_state(inputs))
    for _ in range(300):
        z = model[1].block(z, inputs)
    return z.reshape(-1)


def expected_answer(
    model: nn.Module, x: Tensor, y: Tensor, d: Tensor, damping: float, **options: str
) -> Tensor:
    """-K_2 e, with K by SciPy, z* by iteration, S d_1 by forward derivatives of the iteration."""
    controls = Controls(model)
    before = controls.vector
    first = torch.cat([
        torch.full((size,), name.startswith("0."))
        for name, size in zip(controls.names, controls.sizes, strict=True)
    ])
    lqr = linearize(model, x, y, damping=damping, **options).dense()
    A, B, Q, R, M = (getattr(lqr, name).detach().numpy() for name in "ABQRM")
    P = scipy.linalg.solve_discrete_are(A, B, Q, R, s=M.T)
    K = scipy.linalg.solve(R + B.T @ P @ B, M + B.T @ P @ A)
    ahead = torch.where(first, d, 0.0)
    z, foreseen = torch.func.jvp(lambda u: encoded(model, x, u), (before,), (ahead,))
    e = encoded(model, x, before + ahead) - z - foreseen
    return torch.where(first, 0.0, -torch.from_numpy(K) @ e.detach())


def change(model: nn.Module, x: Tensor, y: Tensor, **options: object) -> tuple[Tensor, ImplicitNGD]:
    model = copy.deepcopy(model)
    opt = ImplicitNGD(model, **({"max_increase": 100.0} | options))
    before = Controls(model).vector
    opt.step(x, y)
    return Controls(model).vector - before, opt


@pytest.mark.parametrize("case", [dense_case, conv_case])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.3, "weight_decay": 0.1},
        {"lr": 2.0, "trust_region": 1e-2},
        {"adaptive": True, "penalty": 0.1},
        {"chunk_size": 2},
        {"divergence": "gaussian"},
    ],
    ids=str,
)
def test_the_answer_is_that_of_scipys_gain_and_iterated_fixed_points(case, options):
    model, x, y = case()
    plan, _ = change(model, x, y, damping=0.05, **options)
    d, opt = change(model, x, y, damping=0.05, feedback=True, **options)
    named = {k: v for k, v in options.items() if k == "divergence"}
    answer = expected_answer(model, x, y, plan, 0.05, **named)
    size = float(answer.norm() / plan.norm())
    assert size > 1e-3  # there is something to compare
    assert relative(d - plan, answer) < 1e-6
    assert opt.last_step.feedback == pytest.approx(size, rel=1e-6)


def test_newtons_gain_answers_too():
    model, x, y = dense_case()
    options = {"divergence": "newton", "damping": 3.0, "lr": 4.0}
    plan, _ = change(model, x, y, **options)
    d, _ = change(model, x, y, feedback=True, **options)
    answer = expected_answer(model, x, y, plan, 3.0, divergence="newton")
    assert relative(d - plan, answer) < 1e-6


def test_the_velocity_holds_the_step_and_not_the_answer():
    model, x, y = dense_case()
    options = {"damping": 0.05, "momentum": 0.5, "max_increase": 100.0}
    opt = ImplicitNGD(model, feedback=True, **options)
    opt.step(x, y)
    plain, before = copy.deepcopy(model), Controls(model).vector
    other = ImplicitNGD(plain, **options)
    other.load_state_dict(opt.state_dict())
    other.step(x, y)
    plan = Controls(plain).vector - before
    answer = expected_answer(model, x, y, plan, 0.05)
    opt.step(x, y)
    assert relative(Controls(model).vector - before - plan, answer) < 1e-6
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(opt.state[p]["velocity"], other.state[q]["velocity"])


class Linear(nn.Module):
    """f(z, x) = W z + U x, whose fixed point is linear in x."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(0.15 * torch.randn(4, 4))
        self.U = nn.Parameter(torch.randn(4, 5))

    def forward(self, z, x):
        return z @ self.W.mT + x @ self.U.mT


def test_where_the_encoder_acts_linearly_there_is_nothing_to_answer():
    _, x, y = dense_case()
    model = exact(nn.Sequential(nn.Linear(6, 5), DEQ(Linear(), state_shape=(4,)), nn.Linear(4, 3)))
    plan, _ = change(model, x, y, damping=0.05)
    d, opt = change(model, x, y, damping=0.05, feedback=True)
    assert float((d - plan).norm()) < 1e-10 * float(plan.norm())
    assert opt.last_step.feedback < 1e-10


def test_the_answer_shrinks_with_the_square_of_the_step():
    model, x, y = dense_case()
    sizes = []
    for lr in (0.08, 0.04, 0.02, 0.01):
        _, opt = change(model, x, y, damping=0.05, lr=lr, feedback=True)
        sizes.append(lr * opt.last_step.feedback)  # |d| is lr times one number
    slopes = [math.log2(a / b) for a, b in zip(sizes, sizes[1:], strict=False)]
    assert slopes == pytest.approx([2.0] * 3, abs=0.05)
    assert abs(slopes[2] - 2) < abs(slopes[0] - 2)


def linearized(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Batch, RiccatiProblem]:
    at = Batch(model, Controls(model), make_loss("cross_entropy"), [(x, y)])
    return at, Dare().local(at, make_divergence("categorical"), torch.float64, Memory())


def moved_first(model: nn.Module, x: Tensor, y: Tensor) -> set[str]:
    at, local = linearized(model, x, y)
    mask = deqlqr.feedback.injected(at, local)
    return {n for n, part in at.controls.unflatten(mask).items() if bool(part.all())}


class Shared(nn.Module):
    """An encoder whose second half is the block's too, and whose first half is read out again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 4)
        self.layer = DEQ(DenseBlock(4))
        self.layer.block.inner = self.second
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        z = self.layer(self.second(torch.tanh(self.first(x))))
        return self.out(z + self.first(x))


def test_what_reaches_f_by_its_inputs_only_moves_first():
    model, x, y = dense_case()
    assert moved_first(model, x, y) == {"0.weight", "0.bias"}
    with torch.no_grad():
        model[1].block.input.weight.zero_()  # B has no column for them now; they stand there still
    assert moved_first(model, x, y) == {"0.weight", "0.bias"}
    assert moved_first(exact(Shared()), x, y) == {"first.weight", "first.bias"}


def test_options_that_do_not_fit_are_refused():
    model, x, y = dense_case()
    for route, reason in [
        ("output", "no gain K"),
        ("krylov", "no gain K"),
        (Cyclic(), "between the block's layers"),
        (Dare("per-sample"), "not the mean"),
    ]:
        with pytest.raises(ValueError, match=rf"feedback needs route 'dare'.*got .*{reason}"):
            ImplicitNGD(model, route=route, feedback=True)
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with pytest.raises(ValueError, match="feedback needs route 'dare'.*that of DDP"):
        ImplicitNGD(net, route="riccati", feedback=True)
    with pytest.raises(ValueError, match="feedback needs a divergence .*K is 0"):
        ImplicitNGD(model, divergence="euclidean", feedback=True)
    groups = [{"params": model[0].parameters(), "lr": 0.1}]
    with pytest.raises(ValueError, match=r"feedback takes one lr for all groups, got \[0.1, 1.0\]"):
        ImplicitNGD(model, param_groups=groups, feedback=True).step(x, y)


def test_a_model_without_encoder_or_without_any_to_answer_is_refused_unchanged():
    _, x, y = dense_case()
    bare = exact(nn.Sequential(DEQ(DenseBlock(4, 6)), nn.Linear(4, 3)))
    frozen = exact(dense_model())
    frozen[0].requires_grad_(False)
    alone = exact(dense_model())
    alone[1:].requires_grad_(False)
    for model, reason in [
        (bare, "before the DEQ layer: take"), (frozen, "before the DEQ layer: take"),
        (alone, "to answer, in the block or after it: take"),
    ]:  # fmt: skip
        before, opt = Controls(model).vector, ImplicitNGD(model, feedback=True)
        with pytest.raises(ValueError, match=f"no trainable parameter {reason} feedback=False"):
            opt.step(x, y)
        assert torch.equal(Controls(model).vector, before)


def test_parameters_frozen_between_steps_neither_move_nor_answer():
    model, x, y = dense_case()
    opt = ImplicitNGD(model, damping=0.05, feedback=True)
    opt.step(x, y)
    model[2].requires_grad_(False)
    held = model[2].weight.clone()
    plan, _ = change(model, x, y, damping=0.05)
    answer, before = expected_answer(model, x, y, plan, 0.05), Controls(model).vector
    opt.step(x, y)
    assert torch.equal(model[2].weight, held)
    assert relative(Controls(model).vector - before - plan, answer) < 1e-6


class Gated(nn.Module):
    """f(z, x) = rate z + 0.1: has a fixed point while the rate, an input, is below 1."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.full((2,), 0.1))

    def forward(self, z, x):
        return x * z + self.c


def gated_case() -> tuple[nn.Module, Tensor, Tensor]:
    """A loss that falls with the rates, which are x times the encoder's one parameter."""
    torch.manual_seed(0)
    layer = DEQ(Gated(), solver=Picard(tol=1e-12, max_steps=2000))
    model = nn.Sequential(nn.Linear(1, 2, bias=False), layer, nn.Linear(2, 2)).double()
    with torch.no_grad():
        model[0].weight.fill_(0.9)
        model[2].weight.copy_(0.2 * torch.eye(2))
        model[2].bias.zero_()
    return model, torch.ones(3, 1, dtype=torch.float64), torch.tensor([0, 0, 0])


@pytest.mark.parametrize("check_every", [1, 100])
def test_an_encoders_move_that_loses_the_fixed_point_is_rejected(check_every):
    model, x, y = gated_case()
    opt = ImplicitNGD(
        model, damping=1e-3, lr=5.0, feedback=True, check_every=check_every, max_increase=100.0
    )
    opt.step(x, y)
    report = opt.last_step
    assert report.accepted and report.rejections and report.damping > 1e-3
    assert report.rejections[0].startswith("the encoder's part of the step: fixed point")
    assert float(model[0].weight.detach().max()) < 1
    assert opt.counts["rejected"] == len(report.rejections)
    model, x, y = gated_case()
    before = Controls(model).vector
    opt = ImplicitNGD(model, damping=1e-3, lr=5.0, feedback=True, max_rejections=0)
    opt.step(x, y)
    assert not opt.last_step.accepted and opt.last_step.feedback is None
    assert torch.equal(Controls(model).vector, before)


def test_parameters_survive_an_interrupt_in_the_middle_of_the_answer(monkeypatch):
    model, x, y = dense_case()
    before = Controls(model).vector

    def interrupted(_):
        assert not torch.equal(Controls(model).vector, before)  # the encoder has moved
        raise KeyboardInterrupt

    monkeypatch.setattr("deqlqr.feedback.statistics_held", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ImplicitNGD(model, feedback=True).step(x, y)
    assert torch.equal(Controls(model).vector, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_and_restored_run_goes_on_bit_for_bit(dtype):
    x, y = dense_batch(6)
    x = x.to(dtype)
    options = {"damping": 0.05, "momentum": 0.3, "adaptive": True, "check_every": 3}
    model = dense_model().to(dtype)
    opt = ImplicitNGD(model, feedback=True, linalg_dtype=torch.float64, **options)
    for _ in range(3):
        opt.step(x, y)
    other = copy.deepcopy(model)
    again = ImplicitNGD(other, feedback=True, linalg_dtype=torch.float64, **options)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(4):
        opt.step(x, y)
        again.step(x, y)
        assert opt.last_step.feedback == again.last_step.feedback > 0
    assert torch.equal(Controls(model).vector, Controls(other).vector)


def test_what_lies_within_the_layers_tolerance_is_hardly_a_deviation():
    model, (x, y) = dense_model(), dense_batch(6)
    at, local = linearized(model, x, y)
    z, d = local.solutions[0].value.norm(), 1e-6 * randn(at.controls.m).float()
    e = deqlqr.feedback.deviation(at, local, d)
    assert float(e.norm()) < 1e-5 * float(z)  # tol of float32


def test_training_with_feedback_lowers_the_loss_and_says_its_size():
    model, x, y = dense_case()
    opt = ImplicitNGD(model, damping=0.05, feedback=True)
    losses = [float(opt.step(x, y)) for _ in range(10)]
    assert losses[-1] < 0.2 * losses[0] and 0 < opt.last_step.feedback < 1
    _, plain = change(model, x, y)
    assert plain.last_step.feedback is None


def test_the_command_line_takes_it_and_refuses_what_has_no_gain(tmp_path: Path):
    with pytest.raises(ValueError, match="feedback is an option of route 'dare'"):
        TrainConfig(route="output", feedback=True)
    with pytest.raises(ValueError, match="with minibatch 'exact', not of 'dare' with 'per-sample'"):
        TrainConfig(minibatch="per-sample", feedback=True)
    base = ["train", "--train-size", "32", "--batch-size", "4", "--max-steps", "2", "--feedback"]
    done = CliRunner().invoke(main, [*base, "--log-every", "1", "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert '"feedback": 0.' in (tmp_path / "run" / "metrics.jsonl").read_text()
    refused = CliRunner().invoke(main, [*base, "--optimizer", "sgd"])
    assert refused.exit_code == 2 and "--feedback has no effect" in refused.output


def test_an_error_of_a_lost_fixed_point_at_the_start_stays_what_it_was():
    model, x, y = gated_case()
    with torch.no_grad():
        model[0].weight.fill_(1.5)
    with pytest.raises(ConvergenceError, match="fixed point"):
        ImplicitNGD(model, feedback=True).step(x, randn(3).long() * 0)
