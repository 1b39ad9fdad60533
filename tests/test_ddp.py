"""Tests of DDP: the recursion against the paper's augmented formulas, and against its bases."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from deqlqr import (
    DEQ,
    ConvergenceError,
    DenseBlock,
    ImplicitNGD,
    Kronecker,
    ddp_backward,
    solve_finite_lqr,
)
from deqlqr.bench_ddp import VARIANTS, bench_ddp, table
from deqlqr.data import load_data
from deqlqr.ddp import DDP
from deqlqr.ddp_backward import sweep
from deqlqr.ddp_base import EKFAC, SGD, Full, RMSprop
from deqlqr.ddp_forward import roll_out
from deqlqr.ddp_inverse import Diagonal, Turned
from deqlqr.ddp_rows import Affine
from deqlqr.ddp_value import Applied, Formed, regularised
from deqlqr.ddp_value import less as reduced

from .problems import randn, relative

CLASSES = 3


class Skip(nn.Module):
    """A residual layer with a normalisation."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(n, n), nn.LayerNorm(n)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(self.norm(x)))


def net(kind: str = "dense", seed: int = 0) -> nn.Sequential:
    """A network of three layers, in float64."""
    torch.manual_seed(seed)
    layers = {
        "dense": lambda: [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)],
        "residual": lambda: [nn.Linear(4, 4), nn.Tanh(), Skip(4), nn.Linear(4, 3)],
        "norm": lambda: [nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.Tanh(), nn.Linear(6, 3)],
        "nested": lambda: [
            nn.Linear(4, 4, bias=False), nn.Sequential(nn.Tanh(), nn.Linear(4, 5)), nn.Tanh(),
            nn.Linear(5, 3),
        ],
        "conv": lambda: [
            nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 2, padding=1), nn.Tanh(),
            nn.Conv2d(2, 2, 2), nn.BatchNorm2d(2).eval(), nn.Flatten(), nn.Linear(8, 3),
        ],
    }  # fmt: skip
    return nn.Sequential(*layers[kind]()).double()


KINDS = ("dense", "residual", "norm", "nested", "conv")


def batch(size: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    return randn(size, 4, seed=seed), torch.arange(size) % CLASSES


class Augmented:
    """The paper's augmented problem, formed densely: F_X, F_u, V_X^T, V_XX^T."""

    def __init__(self, model: nn.Sequential, x: Tensor, y: Tensor) -> None:
        groups: list[list[nn.Module]] = []
        flat = [m for m in model.modules() if not isinstance(m, nn.Sequential)]
        inner = {id(c) for m in flat for c in m.modules() if c is not m}
        for module in (m for m in flat if id(m) not in inner):
            trains = any(p.requires_grad for p in module.parameters())
            full = groups and any(p.requires_grad for m in groups[-1] for p in m.parameters())
            if not groups or (trains and full):
                groups.append([])
            groups[-1].append(module)
        self.F_X, self.F_u, value = [], [], x
        self.layers = [nn.Sequential(*group) for group in groups]
        for layer in self.layers:
            named = dict(layer.named_parameters())
            shapes = {n: p.shape for n, p in named.items()}
            u = torch.cat([p.detach().reshape(-1) for p in named.values()])

            def f(u, X, layer=layer, shapes=shapes, like=value):
                parts = u.split([s.numel() for s in shapes.values()])
                given = {n: v.view(s) for (n, s), v in zip(shapes.items(), parts, strict=True)}
                return functional_call(layer, given, (X.view_as(like),)).reshape(-1)

            F_u, F_X = jacrev(f, argnums=(0, 1))(u, value.reshape(-1))
            self.F_X.append(F_X)
            self.F_u.append(F_u)
            value = layer(value).detach()
        cost = lambda Y: F.cross_entropy(Y.view_as(value), y)
        self.V_X = jacrev(cost)(value.reshape(-1))
        self.V_XX = jacrev(jacrev(cost))(value.reshape(-1))
        self.m = [B.shape[1] for B in self.F_u]

    def sweep(self, D=None, delta=0.0, mu=0.0, decay=(0.0, None)):
        """Return k and K of (7), (8), for Q_uu^-1 given by D(t), or that of Q_uu + delta I."""
        V_X, V_XX, k, K = self.V_X, self.V_XX, [], []
        wd, u = decay
        for t in reversed(range(len(self.m))):
            V_XX = V_XX + mu * torch.eye(len(V_XX), dtype=V_XX.dtype)
            F_X, F_u = self.F_X[t], self.F_u[t]
            l_u = wd * u[t] if wd else 0.0
            Q_u, Q_uX = l_u + F_u.mT @ V_X, F_u.mT @ V_XX @ F_X
            eye = torch.eye(self.m[t], dtype=V_X.dtype)
            Q_uu = F_u.mT @ V_XX @ F_u + (delta + wd) * eye
            inverse = torch.linalg.inv(Q_uu) if D is None else D(t)
            k.insert(0, -inverse @ Q_u)
            K.insert(0, -inverse @ Q_uX)
            V_X = F_X.mT @ V_X - Q_uX.mT @ inverse @ Q_u
            V_XX = F_X.mT @ V_XX @ F_X - Q_uX.mT @ inverse @ Q_uX
        return k, K


def split(u: Tensor, m: list[int]) -> tuple[Tensor, ...]:
    return u.split(m)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mu", [0.0, 0.05])
def test_full_ddp_is_the_augmented_recursion(kind: str, mu: float) -> None:
    model, (x, y) = net(kind), batch()
    u = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    dense = Augmented(model, x, y)
    found = DDP(model, base="full", damping=0.1, state_damping=mu, weight_decay=0.2).policy(x, y)
    k, K = dense.sweep(delta=0.1, mu=mu, decay=(0.2, split(u, dense.m)))
    torch.testing.assert_close(found.k, torch.cat(k))
    assert found.gains[0] is None
    for gain, expected in zip(found.gains[1:], K[1:], strict=True):
        torch.testing.assert_close(gain.dense(), expected)
        dX = randn(6, expected.shape[1] // 6, seed=3)
        torch.testing.assert_close(gain.times(dX), expected @ dX.reshape(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_variant_is_the_recursion_with_its_own_inverse(kind: str) -> None:
    model, (x, y) = net(kind), batch()
    dense, lr = Augmented(model, x, y), 0.05
    found = DDP(model, base="sgd", lr=lr, damping=0.3).policy(x, y)
    D = lambda t: torch.eye(dense.m[t], dtype=x.dtype) / (1 / lr + 0.3)
    k, K = dense.sweep(D)
    assert found.regularised == 0
    for gain, expected in zip(found.gains[1:], K[1:], strict=True):
        torch.testing.assert_close(gain.dense(), expected)
        dX = randn(6, expected.shape[1] // 6, seed=3)
        torch.testing.assert_close(gain.times(dX), expected @ dX.reshape(-1))
    torch.testing.assert_close(found.k, torch.cat(k) * (1 / lr + 0.3) * lr)  # the base has no 0.3


def test_rmsprop_has_its_own_inverse_at_every_layer() -> None:
    model, (x, y) = net(), batch()
    opt = DDP(model, base=RMSprop(alpha=0.9, eps=1e-2), lr=0.003, damping=0.0)
    for _ in range(3):
        opt.step(x, y)
    dense, past = Augmented(model, x, y), [opt.state[p]["square_avg"] for p in model.parameters()]
    v = split(torch.cat([p.reshape(-1) for p in past]), dense.m)
    V_X, V_XX, found = dense.V_X, dense.V_XX, opt.policy(x, y)
    for t in reversed(range(3)):
        F_X, F_u = dense.F_X[t], dense.F_u[t]
        q, Q_uX = F_u.mT @ V_X, F_u.mT @ V_XX @ F_X
        d = 0.003 / ((0.9 * v[t] + 0.1 * q.square()).sqrt() + 1e-2)
        torch.testing.assert_close(split(found.k, dense.m)[t], -d * q)
        if t:
            torch.testing.assert_close(found.gains[t].dense(), -d[:, None] * Q_uX)
        V_X = F_X.mT @ V_X - Q_uX.mT @ (d * q)
        V_XX = F_X.mT @ V_XX @ F_X - Q_uX.mT @ (d[:, None] * Q_uX)


@pytest.mark.parametrize("kind", ["dense", "nested", "norm", "residual", "conv"])
def test_ekfac_has_its_own_inverse_at_every_layer(kind: str) -> None:
    model, (x, y) = net(kind), batch()
    opt = DDP(model, base=EKFAC(fisher="exact"), lr=0.02, damping=0.5)
    opt.step(x, y)
    dense, found = Augmented(model, x, y), opt.policy(x, y)
    # D from the policy's own products: symmetric, positive, and the gains follow from it.
    inverses = []
    for t, gain in enumerate(found.gains):
        if t:
            rows, unit = gain.D.rows, torch.eye(dense.m[t], dtype=x.dtype)
            D = rows.flat(gain.D.times(rows.matrix(unit)))
            torch.testing.assert_close(D, D.mT)
            assert float(torch.linalg.eigvalsh(D).min()) > 0
            assert float(torch.linalg.eigvalsh(D).max()) <= 0.02 / 0.5 + 1e-12
            inverses.append(D)
        else:
            inverses.append(torch.zeros(dense.m[0], dense.m[0], dtype=x.dtype))
    _, K = dense.sweep(lambda t: inverses[t])
    for gain, expected in zip(found.gains[1:], K[1:], strict=True):
        torch.testing.assert_close(gain.dense(), expected)
    # The base's own step for the corrected gradient, by its own code: block by block the same D.
    for D, k, q in zip(
        inverses[1:], split(found.k, dense.m)[1:], split(found.Q_u, dense.m)[1:], strict=True
    ):
        torch.testing.assert_close(k, -D @ q)


def run(opt, model: nn.Module, steps: int, data) -> list[Tensor]:
    for i in range(steps):
        opt.step(*data(i))
    return [p.detach().clone() for p in model.parameters()]


def torch_steps(opt: torch.optim.Optimizer, model: nn.Module, steps: int, data) -> list[Tensor]:
    for i in range(steps):
        x, y = data(i)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    return [p.detach().clone() for p in model.parameters()]


EVERY = lambda i: batch(seed=i)
PAIRS = {
    "sgd": (
        SGD(momentum=0.9),
        lambda m: torch.optim.SGD(m.parameters(), 0.1, 0.9, weight_decay=0.01),
    ),
    "rmsprop": (
        RMSprop(alpha=0.9, momentum=0.5),
        lambda m: torch.optim.RMSprop(m.parameters(), 0.1, 0.9, 1e-8, 0.01, 0.5),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("kind", ["norm", "residual"])
def test_without_feedback_a_variant_is_its_base_bit_for_bit(name: str, kind: str) -> None:
    base, make = PAIRS[name]
    one, two = net(kind), net(kind)
    opt = DDP(one, base=base, feedback=False, lr=0.1, weight_decay=0.01)
    found = run(opt, one, 12, EVERY)
    for a, b in zip(found, torch_steps(make(two), two, 12, EVERY), strict=True):
        assert torch.equal(a, b)
    assert opt.counts["steps"] == 12 and opt.last_step.feedback == 0


def ekfac_of(model: nn.Module) -> ImplicitNGD:
    route = Kronecker(update_every=2, refresh_every=3, corrected=True)
    return ImplicitNGD(
        model, lr=0.1, damping=0.3, route=route, momentum=0.5, weight_decay=0.01, max_increase=1e300
    )


def test_without_feedback_ekfac_is_the_librarys_bit_for_bit() -> None:
    one, two = net("norm"), net("norm")
    base = EKFAC(update_every=2, refresh_every=3, momentum=0.5)
    opt = DDP(one, base=base, feedback=False, lr=0.1, damping=0.3, weight_decay=0.01)
    found = run(opt, one, 12, EVERY)
    for a, b in zip(found, run(ekfac_of(two), two, 12, EVERY), strict=True):
        assert torch.equal(a, b)


def one_layer() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3)).double()


@pytest.mark.parametrize("name", [*PAIRS, "ekfac"])
def test_a_single_layer_has_no_feedback_and_takes_the_bases_steps(name: str) -> None:
    one, two = one_layer(), one_layer()
    if name == "ekfac":
        base, other = EKFAC(update_every=2, refresh_every=3, momentum=0.5), ekfac_of(two)
        expected = run(other, two, 12, EVERY)
    else:
        base, make = PAIRS[name]
        expected = torch_steps(make(two), two, 12, EVERY)
    opt = DDP(one, base=base, lr=0.1, damping=0.3, weight_decay=0.01)
    for a, b in zip(run(opt, one, 12, EVERY), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert opt.last_step.feedback == 0


@pytest.mark.parametrize("name", [*PAIRS, "ekfac", "full"])
@pytest.mark.parametrize("feedback", [True, False])
def test_training_goes_on_from_a_state_dict(name: str, feedback: bool) -> None:
    base = PAIRS[name][0] if name in PAIRS else name
    make = lambda m: DDP(m, base=base, feedback=feedback, lr=0.05, weight_decay=0.01)
    one, two = net(), net(seed=1)
    first = make(one)
    run(first, one, 4, EVERY)
    second = make(two)
    two.load_state_dict(one.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    later = lambda i: batch(seed=10 + i)
    for a, b in zip(run(first, one, 4, later), run(second, two, 4, later), strict=True):
        assert torch.equal(a, b)
    assert second.counts == first.counts and second.counts["steps"] == 8


def test_a_schedule_reaches_the_base() -> None:
    for feedback in (True, False):
        model = one_layer()
        opt = DDP(model, base="sgd", lr=1.0, feedback=feedback)
        opt.param_groups[0]["lr"] = 1e-3
        before, (x, y) = model[0].weight.detach().clone(), batch()
        (g,) = torch.autograd.grad(F.cross_entropy(model(x), y), model[0].weight)
        opt.step(x, y)
        torch.testing.assert_close(model[0].weight.detach(), before - 1e-3 * g)


def test_full_ddp_without_q_ux_is_stage_wise_newton() -> None:
    model, (x, y) = net(), batch()
    names = [f"{i}.{what}" for i in (0, 2, 4) for what in ("weight", "bias")]
    opt = DDP(model, base=Full(second_order=True), feedback=False, damping=0.5, weight_decay=0.1)
    found = opt.policy(x, y)
    sizes = [model.get_parameter(n).numel() for n in names]
    k = dict(zip(names, found.k.split(sizes), strict=True))
    for i in (0, 2, 4):
        own = [f"{i}.weight", f"{i}.bias"]
        u = torch.cat([model.get_parameter(n).detach().reshape(-1) for n in own])

        def J(u: Tensor, own: list[str] = own) -> Tensor:
            W, b = (model.get_parameter(n) for n in own)
            values = dict(zip(own, (u[: W.numel()].view_as(W), u[W.numel() :]), strict=True))
            return F.cross_entropy(functional_call(model, values, (x,)), y) + 0.05 * (u @ u)

        H = jacrev(jacrev(J))(u) + 0.5 * torch.eye(len(u), dtype=u.dtype)
        expected = -torch.linalg.solve(H, jacrev(J)(u))
        torch.testing.assert_close(torch.cat([k[n] for n in own]), expected)
    assert all(gain is None for gain in found.gains)


def test_second_order_ddp_has_the_second_derivatives_of_its_own_value() -> None:
    model, (x, y) = net(), batch(3)
    dense = Augmented(model, x, y)
    found = DDP(model, base=Full(second_order=True), damping=2.0).policy(x, y)
    V_X, V_XX, states = dense.V_X, dense.V_XX, [x]
    for layer in dense.layers:
        states.append(layer(states[-1]).detach())
    for t in reversed(range(3)):
        layer = dense.layers[t]
        named = dict(layer.named_parameters())
        u = torch.cat([p.detach().reshape(-1) for p in named.values()])
        m, like = len(u), states[t]

        def value(v: Tensor, named=named, like=like, layer=layer, m=m, V_X=V_X) -> Tensor:
            parts = v[:m].split([p.numel() for p in named.values()])
            given = {n: w.view_as(p) for (n, p), w in zip(named.items(), parts, strict=True)}
            return functional_call(layer, given, (v[m:].view_as(like),)).reshape(-1) @ V_X

        bend = jacrev(jacrev(value))(torch.cat([u, like.reshape(-1)]))
        F_X, F_u = dense.F_X[t], dense.F_u[t]
        Q_uu = F_u.mT @ V_XX @ F_u + bend[:m, :m] + 2.0 * torch.eye(m, dtype=u.dtype)
        Q_uX, Q_u = F_u.mT @ V_XX @ F_X + bend[:m, m:], F_u.mT @ V_X
        torch.testing.assert_close(split(found.k, dense.m)[t], -torch.linalg.solve(Q_uu, Q_u))
        K = -torch.linalg.solve(Q_uu, Q_uX)
        if t:
            torch.testing.assert_close(found.gains[t].dense(), K)
        V_XX = F_X.mT @ V_XX @ F_X + bend[m:, m:] + Q_uX.mT @ K
        V_X = F_X.mT @ V_X - Q_uX.mT @ torch.linalg.solve(Q_uu, Q_u)


def test_full_ddp_is_one_finite_lqr() -> None:
    model, (x, y) = net(), batch()
    dense = Augmented(model, x, y)
    eye = [0.1 * torch.eye(m, dtype=x.dtype) for m in dense.m]
    n = [A.shape[1] for A in dense.F_X]
    Q = [x.new_zeros(size, size) for size in n] + [dense.V_XX]
    a = [x.new_zeros(size) for size in n] + [dense.V_X]
    lqr = solve_finite_lqr(dense.F_X, dense.F_u, Q, eye, a=a)
    found = DDP(model, base="full", damping=0.1).policy(x, y)
    torch.testing.assert_close(found.k, -torch.cat(lqr.feedforward))
    for gain, K in zip(found.gains[1:], lqr.K[1:], strict=True):
        torch.testing.assert_close(gain.dense(), -K)


def test_with_the_exact_inverse_a_variants_recursion_is_that_of_full_ddp() -> None:
    model, (x, y) = net(), batch()
    dense, full = Augmented(model, x, y), DDP(model, base="full", damping=0.1).policy(x, y)
    opt = DDP(model, base="sgd")
    at = opt._linearized(x, y)
    rows, C = at.rows(lambda y: opt._cotangents(y, 1))

    class Exact(Diagonal):
        """(Q_uu + 0.1 I)^-1, found from K = -D Q_uX of full DDP's own V_XX."""

        def times(self, v: Tensor) -> Tensor:
            return self.rows.matrix(self.rows.flat(v) @ self.d)

        def gram(self, whole: bool) -> Tensor:
            G = self.rows.dense().flatten(0, 1)
            return (G @ self.d @ G.mT)[None]

    V_XX, inverses = dense.V_XX, {}
    for t in reversed(range(3)):
        F_X, F_u = dense.F_X[t], dense.F_u[t]
        Q_uu = F_u.mT @ V_XX @ F_u + 0.1 * torch.eye(dense.m[t], dtype=x.dtype)
        inverses[t], Q_uX = torch.linalg.inv(Q_uu), F_u.mT @ V_XX @ F_X
        V_XX = F_X.mT @ V_XX @ F_X - Q_uX.mT @ inverses[t] @ Q_uX
    found = sweep(
        rows, C, None, lambda t, rows, q: Exact(rows, inverses[t]), mu=0.0, whole=True
    )  # fmt: skip
    assert found.regularised == 0
    torch.testing.assert_close(at.network.joined(found.Q_u), full.Q_u)
    for gain, expected in zip(found.gains[1:], full.gains[1:], strict=True):
        torch.testing.assert_close(gain.dense(), expected.dense())


@pytest.mark.parametrize("base", ["sgd", "rmsprop", "ekfac", "full"])
def test_a_short_roll_out_is_the_linear_policy(base: str) -> None:
    model, (x, y) = net("residual"), batch()
    dense, opt = Augmented(model, x, y), DDP(model, base=base, lr=0.02, damping=0.1)
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    found, network = opt.policy(x, y), opt._known._found[1]
    length, dX, expected = 1e-6, torch.zeros_like(x).reshape(-1), []
    for t, k in enumerate(split(found.k, dense.m)):
        gain = found.gains[t]
        du = length * k + (gain.dense() @ dX if gain is not None else 0.0)
        dX = dense.F_X[t] @ dX + dense.F_u[t] @ du
        expected.append(du)
    outputs, answers = roll_out(network, found, x, length)
    after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    torch.testing.assert_close((after - before) / length, torch.cat(expected) / length,
                               rtol=1e-4, atol=1e-6)  # fmt: skip
    torch.testing.assert_close(outputs, model(x).detach())
    assert float(answers.norm()) > 1e-6 * length


class Product(nn.Module):
    """x W + b with the weight stored (in, out), and the bias first."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(outside))
        self.weight = nn.Parameter(torch.randn(outside, inside) / inside**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Transposed(Product):
    """The same without bias, as a product of matrices."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__(outside, inside)
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def six_outputs(seed: int = 0) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network of five layers whose Lambda has more columns than are pulled back one by one."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), Product(6, 5), nn.Tanh(), Transposed(5, 6), nn.Tanh(),
        nn.Linear(6, 5, bias=False), nn.Sigmoid(), nn.Linear(5, 6),
    )  # fmt: skip
    return model.double(), randn(7, 4, seed=seed), torch.arange(7) % 6


@pytest.mark.parametrize("standard", [False, True])
@pytest.mark.parametrize("base", ["sgd", "rmsprop"])
def test_layers_of_every_form_have_the_policy_of_the_recursion(base: str, standard: bool) -> None:
    model, x, y = six_outputs()
    if standard:
        model[2], model[4] = nn.Linear(6, 5).double(), nn.Linear(5, 6).double()
    dense = Augmented(model, x, y)
    opt = DDP(model, base=base, lr=0.05 if base == "sgd" else 1e-3, damping=0.3)
    found = opt.policy(x, y)
    diagonals = [torch.as_tensor(0.05 / (1 + 0.05 * 0.3), dtype=x.dtype)] * 5
    if base == "rmsprop":
        v = 0.01 * found.Q_u.square()
        d = 1e-3 / (v.sqrt() + 1e-8)
        diagonals = list(split(1 / (1 / d + 0.3), dense.m))
    _, K = dense.sweep(
        lambda t: (
            diagonals[t] * torch.eye(dense.m[t], dtype=x.dtype)
            if diagonals[t].dim() == 0
            else torch.diag(diagonals[t])
        )
    )
    assert found.regularised == 0
    for gain, expected in zip(found.gains[1:], K[1:], strict=True):
        torch.testing.assert_close(gain.dense(), expected)


def test_layers_of_every_form_have_the_inverse_of_ekfacs_own_step() -> None:
    model, x, y = six_outputs()
    opt = DDP(model, base=EKFAC(), lr=0.02, damping=0.5)
    opt.step(x, y)
    found, m = opt.policy(x, y), [part.m for part in opt._known._found[1].parts]
    for gain, k, q in zip(found.gains, split(found.k, m), split(found.Q_u, m), strict=True):
        if gain is not None:
            assert isinstance(gain.D, Turned)
            rows = gain.D.rows
            torch.testing.assert_close(rows.flat(gain.D.times(rows.matrix(-q))), k)


@pytest.mark.parametrize("base", ["sgd", "rmsprop", "ekfac"])
@pytest.mark.parametrize("mu", [0.0, 0.05])
def test_a_value_that_is_applied_is_the_one_that_is_formed(
    base: str, mu: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = six_outputs()
    lr = {"sgd": 0.05, "rmsprop": 1e-4, "ekfac": 0.02}[base]
    opt = DDP(model, base=base, lr=lr, damping=0.5, state_damping=mu)
    policies = []
    for applied in (True, False):
        monkeypatch.setattr("deqlqr.ddp_backward._sooner_applied", lambda *_, to=applied: to)
        policies.append(opt.policy(x, y))
    kinds = [{type(gain.S) for gain in found.gains[1:-1]} for found in policies]
    assert kinds == [{Applied}, {Formed}]
    torch.testing.assert_close(policies[0].Q_u, policies[1].Q_u)
    for gain, expected in zip(policies[0].gains[1:], policies[1].gains[1:], strict=True):
        torch.testing.assert_close(gain.dense(), expected.dense())


def test_a_value_that_may_lose_its_sign_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = six_outputs()
    monkeypatch.setattr("deqlqr.ddp_backward._sooner_applied", lambda *_: True)
    found = DDP(model, base="sgd", lr=50.0, damping=0.0).policy(x, y)
    assert found.regularised > 0 and all(isinstance(g.S, Formed) for g in found.gains[1:])


def test_what_is_applied_bounds_the_eigenvalues_of_n_from_above() -> None:
    model, x, y = six_outputs()
    for gain in DDP(model, base="rmsprop", lr=0.01).policy(x, y).gains[1:]:
        top = float(torch.linalg.eigvalsh(gain.D.gram(True))[0, -1])
        norm = float(torch.linalg.matrix_norm(gain.D.gram(True))[0])
        assert 0 < top <= norm * (1 + 1e-9) and norm <= float(gain.D.trace()) * (1 + 1e-9)
        c = randn(*gain.D.rows.count)
        torch.testing.assert_close(
            gain.D.inner(c).reshape(-1), gain.D.gram(True)[0] @ c.reshape(-1)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("others", [0, 2, 7, 11])
def test_columns_whose_diagonal_is_one_number_are_done_together(
    dtype: torch.dtype, r: int, others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, g = randn(6, 11), randn(6, r, 8, seed=1)
    d = torch.full((8, 11), 3.0).double()
    d = d * (1 - torch.finfo(dtype).eps * randn(8, 11, seed=2).abs().clamp(max=4))  # by rounding
    some = torch.arange(11)[3 : 3 + others]
    d[:, some] *= randn(8, len(some), seed=3).sigmoid()
    G = torch.einsum("sci,sj->scij", g, a).flatten(2).flatten(0, 1)
    expected = (G * d.flatten()) @ G.mT
    used = []
    gram = Affine.gram
    monkeypatch.setattr(
        Affine, "gram", lambda self, d, whole: used.append(d.dim()) or gram(self, d, whole)
    )
    rows = Affine(a.to(dtype), g.to(dtype), g[:, 0].to(dtype), 0, False, False)
    for large in (0.0, 1e9):
        monkeypatch.setattr("deqlqr.ddp_rows._LARGE", large)
        used.clear()
        found = rows.gram(d.to(dtype), True)[0].double()
        assert relative(found, expected) < 20 * torch.finfo(dtype).eps
        assert (0 in used) == (large == 0.0 and len(some) < 6)


def test_s_is_formed_where_it_is_small_or_the_layers_are_many() -> None:
    def rows(batch: int, r: int, width: int) -> Affine:
        a, g = torch.zeros(batch, width + 1), torch.zeros(batch, r, width)
        return Affine(a, g, g[:, 0], 0, False, True)

    chosen = lambda count, *size: ddp_backward._sooner_applied([rows(*size)] * count, False)
    assert chosen(4, 64, 9, 20) and chosen(4, 64, 9, 128) and chosen(4, 64, 1, 128)
    assert not chosen(4, 8, 9, 20) and not chosen(4, 64, 1, 20) and not chosen(19, 64, 9, 20)


def test_a_parameter_without_samples_gradients_is_refused() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6, 4, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    model = nn.Sequential(nn.Linear(4, 4).double(), Whole(), nn.Linear(4, 3).double())
    with pytest.raises(ValueError, match="a parameter of shape"):
        DDP(model, base="sgd", lr=0.1).step(*batch())
    with torch.nn.utils.parametrize.cached(), pytest.raises(ValueError, match="cached"):
        DDP(net(), base="sgd", lr=0.1).step(*batch())


def test_the_state_damping_of_a_variant_is_a_cost_of_what_the_outputs_see() -> None:
    model, (x, y) = net(), batch()
    dense, lr, mu = Augmented(model, x, y), 0.05, 0.3
    found = DDP(model, base="sgd", lr=lr, damping=0.0, state_damping=mu).policy(x, y)
    CC, V_XX = dense.V_XX, (1 + mu) * dense.V_XX
    for t in (2, 1):
        F_X, F_u = dense.F_X[t], dense.F_u[t]
        Q_uX = F_u.mT @ V_XX @ F_X
        torch.testing.assert_close(found.gains[t].dense(), -lr * Q_uX)
        CC = F_X.mT @ CC @ F_X
        V_XX = F_X.mT @ V_XX @ F_X - lr * Q_uX.mT @ Q_uX + mu * CC


@pytest.mark.parametrize(
    "layers, samples, coupling, taken",
    [(10, 60, "batch", "exact"), (11, 50, "batch", "exact"), (11, 51, "batch", "sampled"),
     (11, 51, "sample", "exact")],
)  # fmt: skip
def test_the_policy_is_exact_but_where_that_costs_many_times_as_much(
    layers, samples, coupling, taken
):
    torch.manual_seed(0)
    inner = [part for _ in range(layers - 1) for part in (nn.Linear(4, 4), nn.Tanh())]
    model = nn.Sequential(*inner, nn.Linear(4, 3)).double()  # the root of Lambda has two columns
    x, y = randn(samples, 4), torch.arange(samples) % 3
    gain = lambda **fisher: (
        DDP(model, base="sgd", lr=0.3, coupling=coupling, **fisher).policy(x, y).gains[-1].dense()
    )
    other = "sampled" if taken == "exact" else "exact"
    assert torch.equal(gain(), gain(fisher=taken))
    assert not torch.equal(gain(), gain(fisher=other))


def test_without_coupling_one_sample_has_the_same_policy_and_several_another() -> None:
    model = net()
    of = lambda x, y, c: DDP(model, base="sgd", lr=0.3, coupling=c).policy(x, y)
    for size, same in ((1, True), (5, False)):
        x, y = batch(size)
        gap = of(x, y, "batch").gains[1].dense() - of(x, y, "sample").gains[1].dense()
        assert (float(gap.abs().max()) < 1e-12) == same
        last = of(x, y, "batch").gains[2].dense() - of(x, y, "sample").gains[2].dense()
        assert float(last.abs().max()) < 1e-12  # S_T = I has no couplings to lose


def test_random_cotangents_have_the_feedback_as_their_mean() -> None:
    model, (x, y) = net(), batch(3)
    exact = DDP(model, base="sgd", lr=0.1).policy(x, y).gains[2].dense()
    drawn = [
        DDP(model, base="sgd", lr=0.1, fisher="sampled", seed=s).policy(x, y).gains[2].dense()
        for s in range(60)
    ]
    error = (torch.stack(drawn).mean(0) - exact).norm() / exact.norm()
    spread = (torch.stack(drawn) - exact).norm(dim=(1, 2)).mean() / exact.norm()
    assert 0.1 < float(spread) and float(error) < 3 * float(spread) / 60**0.5


@given(
    size=st.integers(1, 8), seed=st.integers(0, 10**6), scale=st.floats(-6.0, 6.0),
    rank=st.integers(1, 8),
)  # fmt: skip
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_value_hessian_stays_positive_semidefinite(
    size: int, seed: int, scale: float, rank: int
) -> None:
    L, G = randn(2, size, rank, seed=seed), 10**scale * randn(2, size, rank, seed=seed + 1)
    S, N = L @ L.mT, G @ G.mT
    damped = regularised(S, N)
    gain, less = (S, reduced(S, N)) if damped is None else damped
    values = torch.linalg.eigvalsh(less)
    top = torch.linalg.eigvalsh(S)[:, -1:]
    assert bool((values >= -1e-9 * top).all()) and bool((values <= top * (1 + 1e-9)).all())
    exact = S - S @ N @ S
    if bool((torch.linalg.eigvalsh(exact) > 1e-6 * top).all()):
        assert damped is None
        torch.testing.assert_close(less, exact)


def regression() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    x = randn(30, 2)
    return model.double(), x, torch.sin(2 * x[:, :1]) * x[:, 1:]


def test_full_ddp_needs_far_fewer_steps_than_gradient_descent() -> None:
    model, x, y = regression()
    opt = DDP(model, base="full", loss="mse", damping=1e-3, line_search=True, adaptive=True)
    losses = [float(opt.step(x, y)) for _ in range(25)]
    assert all(b <= a for a, b in zip(losses, losses[1:], strict=False))
    model, x, y = regression()
    sgd = torch.optim.SGD(model.parameters(), 0.2)
    for _ in range(250):
        sgd.zero_grad()
        F.mse_loss(model(x), y).backward()
        sgd.step()
    assert losses[-1] < 0.1 * F.mse_loss(model(x), y).item()


def test_a_line_search_shortens_the_step_until_the_loss_falls() -> None:
    for base in ("sgd", "full"):
        model, x, y = regression()
        opt = DDP(model, base=base, loss="mse", lr=30.0, damping=1e-4, line_search=True)
        losses = [float(opt.step(x, y)) for _ in range(6)]
        assert all(b < a for a, b in zip(losses, losses[1:], strict=False))
        assert opt.last_step.accepted and opt.last_step.loss_after < opt.last_step.loss
        whole = 30.0 if base == "full" else 1.0
        assert opt.last_step.length < whole


def test_a_rejected_step_leaves_everything_and_raises_the_damping() -> None:
    for base in ("sgd", "full", "ekfac"):
        model, x, y = regression()
        opt = DDP(model, base=base, loss="mse", lr=1e4, damping=1e-6, max_increase=0.0)
        before = [p.detach().clone() for p in model.parameters()]
        opt.step(x, y)
        report = opt.last_step
        assert report.rejections and opt.counts["rejected"] == len(report.rejections)
        assert opt.param_groups[0]["damping_factor"] == 10.0 ** len(
            report.rejections[: 6 if not report.accepted else None]
        )
        if not report.accepted:
            assert opt.counts["given up"] == 1
            for a, b in zip(before, model.parameters(), strict=True):
                assert torch.equal(a, b.detach())
        else:
            assert report.loss_after <= report.loss


def test_a_rejected_attempt_leaves_no_trace_in_the_bases_memory() -> None:
    x, y = batch()
    x, y = torch.cat([x, x]), torch.cat([y, (y + 1) % CLASSES])  # no weights are right for all
    for base in (SGD(momentum=0.9), EKFAC(momentum=0.9), RMSprop(momentum=0.9)):
        model, lr = one_layer(), 500.0
        before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        g = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        g = torch.cat([part.reshape(-1) for part in g])
        opt = DDP(model, base=base, lr=lr, damping=1e-3, max_increase=0.0)
        opt.step(x, y)
        factor = 10.0 ** len(opt.last_step.rejections)
        change = torch.cat([p.detach().reshape(-1) for p in model.parameters()]) - before
        assert opt.last_step.accepted and factor > 1
        if isinstance(base, SGD):
            torch.testing.assert_close(change, -lr / factor * g)
        elif isinstance(base, RMSprop):
            # v = 0.01 g^2 after one look at g, not after several
            torch.testing.assert_close(change, -lr / factor * g / (0.1 * g.abs() + 1e-8))
        else:
            # The velocity is the last attempt's u alone.
            v = torch.cat([opt.state[p]["velocity"].reshape(-1) for p in model.parameters()])
            torch.testing.assert_close(change, lr * v)
            assert float(v @ g) < 0 and float(v.norm()) < float(g.norm()) / (1e-3 * factor)


def test_a_bases_own_rejections_are_reported_and_counted_once() -> None:
    model, x, y = regression()
    opt = DDP(
        model, base="ekfac", feedback=False, loss="mse", lr=1e6, damping=1e-6, max_increase=0.0,
        max_rejections=2, damping_increase=4.0,
    )  # fmt: skip
    opt.step(x, y)
    assert len(opt.last_step.rejections) == 3 and not opt.last_step.accepted
    assert opt.counts == {"steps": 1, "rejected": 3, "rolled back": 0, "given up": 1}
    assert opt.param_groups[0]["damping_factor"] == 16.0


def test_adaptive_damping_follows_the_quadratic_model() -> None:
    model, x, y = regression()
    opt = DDP(model, base="full", loss="mse", damping=10.0, adaptive=True)
    for _ in range(4):
        opt.step(x, y)
        assert opt.last_step.ratio > 0.75
    assert opt.param_groups[0]["damping_factor"] == pytest.approx(3.0**-4)
    model, x, y = regression()
    opt = DDP(model, base="full", loss="mse", lr=1.9, damping=1e-6, adaptive=True)
    opt.step(x, y)
    assert opt.last_step.ratio < 0.25 and opt.param_groups[0]["damping_factor"] > 1


def test_feedback_keeps_a_long_step_from_overshooting() -> None:
    falls = {}
    for feedback in (True, False):
        model, x, y = regression()
        opt = DDP(model, base="sgd", loss="mse", lr=0.5, feedback=feedback)
        for _ in range(60):
            opt.step(x, y)
        falls[feedback] = F.mse_loss(model(x), y).item()
    assert falls[True] != falls[False] and falls[True] < 1.0
    assert torch.isfinite(torch.tensor(list(falls.values()))).all()


@pytest.mark.parametrize("base", ["sgd", "rmsprop", "ekfac", "full"])
@pytest.mark.parametrize("feedback", [True, False])
def test_nothing_fails_over_the_grid_of_learning_rates_and_dampings(
    base: str, feedback: bool
) -> None:
    data = load_data("iris")
    for lr in (1e-3, 1.0, 1e6):
        for damping in (1e-10, 1e4):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
            opt = DDP(model, base=base, lr=lr, damping=damping, feedback=feedback)
            for i in range(3):
                part = slice(30 * i, 30 * i + 8)
                assert math.isfinite(float(opt.step(data.train_x[part], data.train_y[part])))
            assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_parameters_without_a_finite_loss_are_taken_back() -> None:
    for feedback in (True, False):
        model, (x, y) = net(), batch()
        opt = DDP(model, base="sgd", lr=0.1, feedback=feedback)
        before = [p.detach().clone() for p in model.parameters()]
        opt.step(x, y)
        with torch.no_grad():
            model[4].weight.fill_(float("inf"))
        opt.step(x, y)
        assert opt.last_step.rolled_back and opt.counts["rolled back"] == 1
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        again = net()
        other = DDP(again, base="sgd", lr=0.1, feedback=feedback)
        with torch.no_grad():
            again[4].weight.fill_(float("nan"))
        with pytest.raises(ConvergenceError, match="loss is nan|not finite"):
            other.step(x, y)
        assert bool(again[4].weight.isnan().all())
        assert len(before) == 6


@pytest.mark.parametrize("base", ["sgd", "rmsprop", "ekfac", "full"])
def test_an_exception_in_the_middle_leaves_the_parameters(base: str) -> None:
    model, (x, y) = net(), batch()
    opt = DDP(model, base=base)
    opt.step(x, y)
    before = [p.detach().clone() for p in model.parameters()]
    forward, calls = model[4].forward, []

    def fail(value: Tensor) -> Tensor:
        calls.append(0)
        if not torch.is_grad_enabled():
            raise KeyboardInterrupt
        return forward(value)

    model[4].forward = fail
    with pytest.raises(KeyboardInterrupt):
        opt.step(x, y)
    for a, b in zip(before, model.parameters(), strict=True):
        assert torch.equal(a, b.detach())


@pytest.mark.parametrize("base", ["sgd", "rmsprop", "ekfac", "full"])
def test_a_policy_is_shown_without_a_change(base: str) -> None:
    one, two = net(), net()
    first, second = DDP(one, base=base, lr=0.05), DDP(two, base=base, lr=0.05)
    for i in range(4):
        first.policy(*batch(seed=i))
        first.step(*batch(seed=i))
        second.step(*batch(seed=i))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_spectrum_of_the_last_layer_has_the_rank_of_the_outputs_metric() -> None:
    model, (x, y) = net(), batch()
    found = DDP(model, base="sgd", lr=0.1).policy(x, y)
    values = torch.linalg.svdvals(found.gains[-1].dense())
    torch.testing.assert_close(found.spectrum(-1)[:6], values[:6])
    assert found.spectrum(0).numel() == 0
    # Q_uX = F_u'V_XX F_X: W and b act on 5 inputs, Lambda has rank 2.
    assert int((values > 1e-8 * values[0]).sum()) <= 2 * 5
    with pytest.raises(ValueError, match="3 layers, got 3"):
        found.spectrum(3)


def test_options_out_of_range_are_refused() -> None:
    model = net()
    bad = {
        "base must be one of": {"base": "adam"},
        "base must be a name or an object": {"base": SGD},
        "adaptive needs base": {"base": "sgd", "adaptive": True},
        "line_search needs feedback": {"base": "sgd", "line_search": True, "feedback": False},
        "adaptive needs feedback": {"base": "ekfac", "adaptive": True, "feedback": False},
        "coupling must be one of": {"coupling": "all"},
        "fisher must be one of": {"fisher": "all"},
        "divergence must be one of the output": {"divergence": "newton"},
        "divergence must be given": {"loss": lambda o, y: o.mean()},
        "lr must be": {"lr": 0.0},
        "damping must be finite and above": {"base": "full", "damping": 0.0},
        "damping must be finite and at least": {"base": "sgd", "damping": -1.0},
        "state_damping must": {"state_damping": -1.0},
        "weight_decay must": {"weight_decay": -1.0},
        "max_increase must": {"max_increase": -1.0},
        "damping_increase must": {"damping_increase": 1.0},
        "max_rejections must": {"max_rejections": -1},
        "seed must": {"seed": -1},
    }
    for message, options in bad.items():
        with pytest.raises(ValueError, match=message):
            DDP(model, **options)
    for message, make in {
        "momentum must be": lambda: SGD(momentum=-0.1),
        "alpha must lie": lambda: RMSprop(alpha=1.0),
        "eps must be": lambda: RMSprop(eps=0.0),
        "momentum must be finite": lambda: RMSprop(momentum=-1.0),
        "momentum must be below 1": lambda: EKFAC(momentum=1.0),
        "update_every must": lambda: EKFAC(update_every=0),
        "fisher must": lambda: EKFAC(fisher="some"),
        "max_states must": lambda: Full(max_states=0),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match=r"nn\.Module, got int"):
        DDP(3)
    with pytest.raises(ValueError, match="no DEQ layer, found 1"):
        DDP(nn.Sequential(DEQ(DenseBlock(4))))


def test_models_and_data_that_do_not_fit_are_refused() -> None:
    x, y = batch()
    shared = nn.Linear(4, 4).double()
    tied = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(4, 3).double())
    mixing = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    random = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3)).double()

    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    for message, model in {
        "one layer only, got 0.bias, 0.weight": tied,
        "mixes the samples": mixing,
        "active dropout": random,
        "no phases": Opaque().double(),
    }.items():
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(ValueError, match=message):
            DDP(model, base="sgd").step(x, y)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for options in ({"base": "sgd"}, {"base": "sgd", "feedback": False}, {"base": "full"}):
        opt = DDP(net(), **options)
        for wrong in ((lambda: 0.0,), (x,), ()):
            with pytest.raises(ValueError, match="step takes a batch"):
                opt.step(*wrong)
        with pytest.raises(ValueError, match="labels in"):
            opt.step(x, y + 2)
    with pytest.raises(ValueError, match="needs feedback"):
        DDP(net(), base="sgd", feedback=False).policy(x, y)
    with pytest.raises(ValueError, match="too many for full DDP"):
        DDP(net(), base=Full(max_states=29)).step(x, y)
    frozen = net()
    frozen[0].requires_grad_(False)
    opt = DDP(frozen, base="sgd")
    frozen[0].requires_grad_(True)
    with pytest.raises(ValueError, match="was not given"):
        opt.step(x, y)


def test_frozen_layers_stay_and_the_rest_is_trained() -> None:
    model, (x, y) = net(), batch()
    opt = DDP(model, base="sgd", lr=0.1)
    opt.step(x, y)
    model[2].requires_grad_(False)
    kept = [p.detach().clone() for p in model[2].parameters()]
    loss = float(opt.step(x, y))
    assert float(opt.step(x, y)) < loss
    assert all(torch.equal(a, b) for a, b in zip(kept, model[2].parameters(), strict=True))


def test_the_benchmark_has_a_row_for_each_network_and_base(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deqlqr.bench_ddp._STEPS", 1)
    monkeypatch.setattr("deqlqr.bench_ddp._ROUNDS", 1)
    found = list(bench_ddp([(4, 8, 3)], ["sgd", "ekfac"]))
    assert [(row.batch, row.width, row.depth, row.base) for row in found] == [
        (4, 8, 3, "sgd"), (4, 8, 3, "ekfac")
    ]  # fmt: skip
    assert all(row.seconds > 0 and set(row.over) == set(VARIANTS) for row in found)
    lines = list(table(found))
    assert all(
        set(row.backward) == (set(VARIANTS) if row.base == "ekfac" else set()) for row in found
    )
    assert all(
        0 < share < row.over[name] * 5 for row in found for name, share in row.backward.items()
    )
    assert len(lines) == 6 and all("x" in line for line in lines[1:4])
