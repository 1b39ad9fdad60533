"""Every block with a `contraction` keeps its promise, whatever its parameters and inputs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deqlqr import Picard, fixed_point
from deqlqr.blocks import ConvBlock, DenseBlock
from deqlqr.monotone import ConvMonotoneBlock, MonotoneBlock
from deqlqr.random_fields import RandomFieldBlock
from deqlqr.runge_kutta import ConvGradientBlock, GradientBlock

TOL = 1e-6  # of (FP1)
METHODS = ("euler", "improved-euler", "kutta3", "kutta4")
IMAGE = (3, 4)
BLOCKS = {
    "dense tanh": (lambda: DenseBlock(5, 3), (3,)),
    "dense relu": (lambda: DenseBlock(5, 3, activation="relu", max_norm=0.7), (3,)),
    "conv": (lambda: ConvBlock(2, 4), (2, *IMAGE)),
    "monotone FB": (lambda: MonotoneBlock(5, 3), (3,)),
    "monotone PR": (lambda: MonotoneBlock(5, 3, splitting="peaceman-rachford"), (3,)),
    "conv monotone": (lambda: ConvMonotoneBlock(2, 1), (1, *IMAGE)),
    "circular monotone PR": (
        lambda: ConvMonotoneBlock(2, 1, splitting="peaceman-rachford", padding="circular"),
        (1, *IMAGE),
    ),
    **{
        f"gradient {method}": (lambda method=method: GradientBlock(5, 4, 3, method=method), (3,))
        for method in METHODS
    },
    "gradient relu": (lambda: GradientBlock(5, 7, 3, activation="relu"), (3,)),
    "gradient skew": (lambda: GradientBlock(5, 4, 3, max_norm=1.0, skew=0.5), (3,)),
    "conv gradient": (lambda: ConvGradientBlock(2, 3, 1, max_norm=1.5), (1, *IMAGE)),
    "conv gradient kutta4": (
        lambda: ConvGradientBlock(2, 3, 1, method="kutta4", max_norm=1.0),
        (1, *IMAGE),
    ),
    "random fields": (lambda: RandomFieldBlock(5, 4), (5,)),
    "random fields of the input": (lambda: RandomFieldBlock(5, 4, 3), (3,)),
}
sizes = st.floats(-3, 3).map(lambda e: 10.0**e)


def rows(v):
    """Norm of each sample."""
    return v.flatten(1).norm(dim=1)


def zero_state(block, x):
    """A zero state, and the size of f there, which sets the rounding of other values."""
    shape = (len(x), *block.state_shape(x)) if hasattr(block, "state_shape") else x.shape
    zero = torch.zeros(shape, dtype=x.dtype)
    return zero, rows(block(zero, x))


@pytest.mark.parametrize("name", BLOCKS)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(scale=sizes, input_scale=sizes, state_scale=sizes, seed=st.integers(0, 2**16))
def test_a_fixed_point_found_in_time_and_alone(name, scale, input_scale, state_scale, seed):
    block, x, normal = drawn(name, scale, seed)
    with torch.no_grad():
        x = input_scale * x
        zero, injected = zero_state(block, x)
        far = state_scale * normal(*zero.shape)
        q = block.contraction
        assert 0 < q < 1
        rounding = 1e-13 * (1 + injected + rows(far))
        apart = rows(block(far, x) - block(zero, x))
        assert (apart <= q * rows(far) + rounding).all()
        near = far * (1 + 1e-3 * normal(*far.shape))
        apart = rows(block(near, x) - block(far, x))
        assert (apart <= q * rows(near - far) + rounding).all()
        found = [solved(block, x, start, q) for start in (zero, far)]
    one, other = (s.value for s in found)
    error = (found[0].residual + found[1].residual + 2 * rounding) / (1 - q)
    assert (rows(one - other) <= error).all()
    assert (error <= 3 * TOL * (1 + rows(one)) / (1 - q)).all()  # so that the last line says much


@pytest.mark.parametrize("name", BLOCKS)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(scale=sizes, seed=st.integers(0, 2**16))
def test_the_jacobian_is_no_larger_where_nothing_saturates(name, scale, seed):
    block, x, normal = drawn(name, scale, seed, biases=0.0)
    zero, _ = zero_state(block, x)
    n = zero[0].numel()
    for strength in (0.0, 1e-6):
        z = strength * normal(*zero.shape)
        f = lambda z, x: block(z[None], x[None])[0]
        with torch.no_grad():
            J = torch.func.jacrev(f)(z[0], strength * x[0]).reshape(n, n)
        assert torch.linalg.matrix_norm(J, 2) <= block.contraction + 1e-12


def drawn(name, scale, seed, biases=1.0):
    """A block with normal parameters of this size, an input, and the source of more."""
    make, shape = BLOCKS[name]
    block, g = make().double(), torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)
    with torch.no_grad():
        for key, p in block.named_parameters():
            p.copy_(scale * normal(*p.shape) * (biases if key.endswith("bias") else 1.0))
    return block, normal(2, *shape), normal


def solved(block, x, start, q):
    """The fixed point, with no more evaluations than q allows from the first residual."""
    first = rows(block(start, x) - start)
    found = fixed_point(block, start, inputs=(x,), solver=Picard(tol=TOL, max_steps=3000))
    enough = TOL * (0.99 * rows(found.value)).clamp(min=1.0)  # (FP1)
    falls = ((enough / first).log() / math.log(q)).ceil().clamp(min=0)
    assert (found.evaluations <= falls + 2).all()
    return found


def test_the_registry_has_every_block_with_a_promise():
    known = {type(make()) for make, _ in BLOCKS.values()}
    modules = ("blocks", "monotone", "runge_kutta", "random_fields")
    promising = {
        value
        for module in modules
        for value in vars(__import__(f"deqlqr.{module}", fromlist=[module])).values()
        if isinstance(value, type) and value.__name__.endswith("Block")
    }
    assert {block.__name__ for block in promising - known} == {"RungeKuttaBlock"}
