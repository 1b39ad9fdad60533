"""Tests for `deqlqr/phases.py` and the phases of the package's blocks."""

import pytest
import torch
from torch import nn

from deqlqr import DEQ, ConvBlock, DenseBlock, check_equivalence, linearize
from deqlqr.phases import LayerPhases, phases_of

from .problems import Cell, exact, randn


class Plain(nn.Sequential):
    def forward(self, z, x):
        return super().forward(z + x)


class Residual(nn.Sequential):
    def forward(self, z, x):
        return 0.5 * z + 0.3 * super().forward(z + x)


class Scaled(nn.Sequential):
    """Has a keyword, a trained number of its own, and an input that is used after the layers."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.register_parameter("shift", nn.Parameter(torch.tensor(0.1)))

    def forward(self, z, x, y=None, *, scale):
        y = x if y is None else y
        return scale * super().forward(z + x) + self.shift * y


class Halves(nn.Sequential):
    """Its state is a tuple."""

    def forward(self, z, x):
        y = 0.4 * super().forward(torch.cat(z, dim=-1) + x)
        return y[:, :3], y[:, 3:] + 0.2 * z[1]


class Twice(nn.Module):
    """Phases with a common weight, the injection in two of them."""

    def __init__(self, n=4):
        super().__init__()
        self.a, self.c, self.d = nn.Linear(n, n), nn.Linear(n, 5), nn.Linear(5, n)

    def phases(self, x):
        return [
            lambda z: (z, torch.tanh(self.a(z))),
            lambda s: (s[0], torch.tanh(self.c(s[1] + x))),
            lambda s: 0.2 * s[0] + 0.3 * torch.tanh(self.a(self.d(s[1]) + x)),
        ]

    def forward(self, z, x):
        return in_turn(self.phases(x), z)


def layers(n=4):
    return nn.Linear(n, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, n), nn.Tanh()


def in_turn(phases, value):
    for phase in phases:
        value = phase(value)
    return value


def frozen(block, *numbers):
    for number in numbers:
        block[number].requires_grad_(False)
    return block


# name: block, z, inputs, keywords, number of phases
X = randn(3, 4, seed=1)
IMAGE = randn(3, 2, 5, 5, seed=1)
CASES = {
    "dense": lambda: (DenseBlock(4, 6), randn(3, 4), (randn(3, 6),), {}, 1),
    "dense, no bound": lambda: (DenseBlock(4, max_norm=None), randn(3, 4), (X,), {}, 1),
    "conv": lambda: (ConvBlock(2, 8), randn(3, 2, 5, 5), (IMAGE,), {}, 3),
    "conv, no bound": lambda: (
        ConvBlock(2, 8, max_lipschitz=None), randn(3, 2, 5, 5), (IMAGE,), {}, 3,
    ),
    "plain": lambda: (Plain(*layers()), randn(3, 4), (X,), {}, 3),
    "residual": lambda: (Residual(*layers()), randn(3, 4), (X,), {}, 3),
    "leading activation": lambda: (Residual(nn.Tanh(), *layers()), randn(3, 4), (X,), {}, 3),
    "two activations": lambda: (
        Plain(nn.Linear(4, 4), nn.Tanh(), nn.Softplus(), nn.Linear(4, 4)), randn(3, 4), (X,), {}, 2,
    ),
    "no parameters": lambda: (Residual(nn.Tanh(), nn.Sigmoid()), randn(3, 4), (X,), {}, 1),
    "frozen in the middle": lambda: (
        frozen(Residual(*layers()), 2), randn(3, 4), (X,), {}, 2,
    ),
    "frozen at the start": lambda: (frozen(Residual(*layers()), 0), randn(3, 4), (X,), {}, 2),
    "all frozen": lambda: (frozen(Plain(*layers()), 0, 2, 4), randn(3, 4), (X,), {}, 1),
    "keyword": lambda: (Scaled(*layers()), randn(3, 4), (X, -X), {"scale": 0.3}, 3),
    "tuple": lambda: (Halves(*layers(5)), (randn(3, 3), randn(3, 2)), (randn(3, 5),), {}, 3),
    "declared": lambda: (Twice(), randn(3, 4), (X,), {}, 3),
    "nested": lambda: (
        Residual(nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 4)),
        randn(3, 4), (X,), {}, 2,
    ),
}  # fmt: skip
cases = pytest.mark.parametrize("case", CASES)


def make(case):
    block, z, inputs, shared, count = CASES[case]()
    return block.double(), z, inputs, shared, count


def parts(value):
    return (value,) if torch.is_tensor(value) else value


def flat(value):
    return torch.cat([part.flatten(1) for part in parts(value)], dim=1)


@cases
def test_phases_in_turn_are_the_block_at_any_state(case):
    block, z, inputs, shared, count = make(case)
    phases = phases_of(block, z, inputs, shared).phases(*inputs, **shared)
    assert len(phases) == count
    for scale in (1.0, -0.3, 0.0):
        other = scale * z if torch.is_tensor(z) else tuple(scale * half for half in z)
        result, expected = in_turn(phases, other), block(other, *inputs, **shared)
        assert torch.is_tensor(result) == torch.is_tensor(expected)
        torch.testing.assert_close(flat(result), flat(expected), rtol=1e-13, atol=1e-14)


@cases
def test_their_gradients_are_the_blocks(case):
    block, z, inputs, shared, _ = make(case)
    state = [part.requires_grad_() for part in parts(z)]
    inputs = tuple(part.clone().requires_grad_() for part in inputs)
    wanted = [*state, *inputs, *(p for p in block.parameters() if p.requires_grad)]
    phases = phases_of(block, z, inputs, shared).phases(*inputs, **shared)
    both = [
        torch.autograd.grad(flat(value).square().sum(), wanted, allow_unused=True)
        for value in (in_turn(phases, z), block(z, *inputs, **shared))
    ]
    for ours, expected, of in zip(*both, wanted, strict=True):
        zero = torch.zeros_like(of)
        ours, expected = (zero if g is None else g for g in (ours, expected))
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


@cases
def test_the_derivatives_of_the_phases_multiply_to_the_blocks(case):
    block, z, inputs, shared, _ = make(case)
    along = z if torch.is_tensor(z) else tuple(-2 * part for part in z)
    whole = torch.func.jvp(lambda z: block(z, *inputs, **shared), (z,), (along,))[1]
    for phase in phases_of(block, z, inputs, shared).phases(*inputs, **shared):
        owned = z.clone() if torch.is_tensor(z) else tuple(part.clone() for part in z)
        z, along = torch.func.jvp(phase, (owned,), (along,))
    torch.testing.assert_close(flat(along), flat(whole), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", [DenseBlock(3), ConvBlock(2, 4), Twice()])
def test_a_block_that_has_phases_is_what_gives_them(kind):
    assert phases_of(kind, None, (), {}) is kind


def test_a_residual_block_carries_z_and_a_plain_one_does_not():
    z = randn(3, 4)
    for kind, carried in ((Plain, False), (Residual, True)):
        block = kind(*layers()).double()
        phases = phases_of(block, z, (X,), {})
        state = phases.phases(X)[0](z)
        assert isinstance(phases, LayerPhases) and isinstance(state, tuple) == carried
        if carried:
            assert torch.equal(state[0], z)
        assert (state[-1] if carried else state).shape == (3, 7)


def test_the_block_is_left_as_it_was():
    block = Residual(*layers()).double()
    before = list(block), list(block.state_dict())
    in_turn(phases_of(block, randn(3, 4), (X,), {}).phases(X), randn(3, 4))
    assert (list(block), list(block.state_dict())) == before
    with pytest.raises(RuntimeError):
        in_turn(phases_of(block, randn(3, 4), (X,), {}).phases(X), randn(3, 9))
    assert list(block) == before[0]


def test_phases_are_of_the_parameters_of_the_moment():
    block, z = Residual(*layers()).double(), randn(3, 4)
    chain = phases_of(block, z, (X,), {})
    with torch.no_grad():
        block[0].weight.mul_(2)
    assert torch.equal(in_turn(chain.phases(X), z), block(z, X))


class Repeats(nn.Sequential):
    def forward(self, z, x):
        return 0.3 * super().forward(super().forward(z + x))


class Ignores(nn.Sequential):
    def forward(self, z, x):
        return 0.3 * z + x


class Between(nn.Sequential):
    """Does something between its layers."""

    def forward(self, z, x):
        for layer in self:
            z = 0.5 * torch.tanh(layer(z) + x)
        return z


class Indexed(nn.Sequential):
    """Runs its layers by their numbers."""

    def forward(self, z, x):
        return 0.5 * torch.tanh(self[1](torch.tanh(self[0](z) + x)))


class Masked(nn.Sequential):
    """z is used after the layers, but has no derivative there."""

    def forward(self, z, x):
        return torch.where(z > 0, 0.3, 0.2) * super().forward(z + x)


class Listed(nn.Module):
    """`phases` is a list of modules, no method."""

    def __init__(self):
        super().__init__()
        self.phases = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, z, x):
        return 0.3 * torch.tanh(self.phases[1](torch.tanh(self.phases[0](z)) + x))


class Wrong(Twice):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def phases(self, x):
        return self.change(super().phases(x))

    def forward(self, z, x):
        return in_turn(super().phases(x), z)


def two():
    torch.manual_seed(0)  # not what the tests collected before have left
    return nn.Linear(4, 4), nn.Linear(4, 4)


@pytest.mark.parametrize(
    "block, message",
    [
        (Cell(4), "block Cell has no phases.*Route 'dare' takes any block"),
        (Repeats(*two()), "Repeats.forward runs its layers 2 times.*method phases"),
        (Ignores(*two()), "Ignores.forward does not run its layers"),
        (Between(*two()), "phases of Between, one after the other, must give"),
        (Masked(*two()), "phases of Masked, one after the other, must give"),
        (Indexed(*two()), "Indexed"),
        (Listed(), "Listed"),
        (Wrong(lambda phases: []), "Wrong.phases must return a list of at least one"),
        (Wrong(lambda phases: phases[:2]), "phases of Wrong must end in the shape of"),
        (Wrong(lambda phases: phases[:1]), "phases of Wrong must end in the shape of"),
        (
            Wrong(lambda phases: [*phases, lambda z: 1.001 * z]),
            "phases of Wrong, one after the other, must give",
        ),
        (
            Wrong(lambda phases: [*phases, lambda z: z[:, :3]]),
            r"end in the shape of f\(z, x\), \(\(4,\),\); got \(\(3,\),\)",
        ),
        (Wrong(lambda phases: [lambda z: None, *phases]), "state of phase 1 of Wrong must be"),
        (Wrong(lambda phases: [lambda z: [z], *phases]), "state of phase 1 of Wrong must be"),
        (
            Wrong(lambda phases: [*phases, lambda z: "z"]),
            r"f\(z, x\) by the block's phases must be",
        ),
    ],
)  # fmt: skip
def test_what_is_no_chain_of_phases_is_refused_by_name(block, message):
    torch.manual_seed(0)
    model = exact(nn.Sequential(nn.Linear(6, 4), DEQ(block), nn.Linear(4, 3)))
    y = torch.tensor([0, 1, 2])
    assert linearize(model, randn(3, 6), y).n == 12  # any block has the one-phase problem
    with pytest.raises(ValueError, match=message):
        linearize(model, randn(3, 6), y, cyclic=True)


def test_an_empty_sequential_has_no_phases():
    with pytest.raises(ValueError, match="block Sequential has no phases"):
        phases_of(nn.Sequential(), randn(3, 4), (), {})


class Detached(nn.Module):
    """Phases with the value of the block and another derivative."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 4)

    def phases(self, x):
        return [lambda z: torch.tanh(self.first(z)).detach(), lambda s: 0.3 * self.second(s) + x]

    def forward(self, z, x):
        return 0.3 * self.second(torch.tanh(self.first(z))) + x


class Halved(Detached):
    """Phases with another value."""

    def phases(self, x):
        return [lambda z: torch.tanh(self.first(z)), lambda s: 0.15 * self.second(s) + x]


def test_phases_with_another_derivative_are_refused():
    model = exact(nn.Sequential(nn.Linear(6, 4), DEQ(Detached()), nn.Linear(4, 3)))
    with pytest.raises(ValueError, match="phases of Detached have another derivative"):
        linearize(model, randn(3, 6), torch.tensor([0, 1, 2]), cyclic=True)


def test_the_check_fails_on_wrong_phases_and_skips_where_there_are_none():
    x, y = randn(3, 6), torch.tensor([0, 1, 2])
    around = lambda block: exact(nn.Sequential(nn.Linear(6, 4), DEQ(block), nn.Linear(4, 3)))
    report = check_equivalence(around(Halved()), x, y)
    (failed,) = [row for row in report.rows if row.passed is False]
    assert "phases of Halved, one after the other, must give" in failed.note
    report = check_equivalence(around(Cell(4)), x, y)
    skipped = [row for row in report.rows if row.passed is None]
    assert report.passed and [row.note for row in skipped] == ["the block Cell has no phases"]


def test_a_plain_sequential_is_refused_with_what_to_write_instead():
    with pytest.raises(ValueError, match="subclass it with def forward"):
        DEQ(nn.Sequential(nn.Linear(3, 3)))
