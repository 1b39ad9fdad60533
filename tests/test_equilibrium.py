"""Tests for `deqlqr/equilibrium.py`: derivatives of the layer under torch.func, by unrolling."""

import pytest
import torch
from torch import nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    vjp,
    vmap,
)

from deqlqr import DEQ, DenseBlock, Implicit, Neumann

from .problems import Cell, randn, relative


def both(n=3, seed=0, backward="implicit"):
    """Return the layer and the unrolled iteration as functions (parameters, x) -> z."""
    torch.manual_seed(seed)
    block = Cell(n).double()
    layer = DEQ(block, tol=1e-13, max_steps=1000, backward=backward)
    parameters = {name: p.detach() for name, p in block.named_parameters()}

    def unrolled(parameters, x):
        z = torch.zeros_like(x)
        for _ in range(120):
            z = functional_call(block, parameters, (z, x))
        return z

    def ours(parameters, x):
        return functional_call(layer, {f"block.{k}": v for k, v in parameters.items()}, (x,))

    return ours, unrolled, parameters


def leaves(tree):
    return torch.cat([t.reshape(-1) for t in torch.utils._pytree.tree_leaves(tree)])


X, V, W = (randn(4, 3, seed=s) for s in (1, 2, 3))
X = 0.3 * X


def ones(parameters):
    return {k: torch.ones_like(p) for k, p in parameters.items()}


def stacked(parameters):
    return {k: torch.stack([p, 1.1 * p, 0.9 * p]) for k, p in parameters.items()}


def loss_of(F):
    return lambda p, x: (F(p, x) * W).sum() + F(p, x).square().sum()


TRANSFORMS = {
    "jvp in x": lambda F, p: jvp(lambda x: F(p, x), (X,), (V,))[1],
    "jvp in parameters": lambda F, p: jvp(lambda p: F(p, X), (p,), (ones(p),))[1],
    "vjp": lambda F, p: vjp(F, p, X)[1](W),
    "grad": lambda F, p: grad(loss_of(F))(p, X),
    "jacrev": lambda F, p: jacrev(F)(p, X),
    "jacfwd": lambda F, p: jacfwd(F)(p, X),
    "hessian": lambda F, p: hessian(loss_of(F))(p, X),
    "jacrev of jacrev": lambda F, p: jacrev(jacrev(loss_of(F)))(p, X),
    "jacrev of jacfwd": lambda F, p: jacrev(jacfwd(loss_of(F)))(p, X),
    "Hessian product": lambda F, p: jvp(grad(loss_of(F)), (p, X), (ones(p), V))[1],
    "vmap over batches": lambda F, p: vmap(lambda x: F(p, x))(torch.stack([X, X + 0.1, X - 0.2])),
    "vmap over parameters": lambda F, p: vmap(lambda p: F(p, X))(stacked(p)),
    "vmap over parameters and batches": lambda F, p: vmap(F)(
        stacked(p), torch.stack([X, X + 0.1, X - 0.2])
    ),
    "gradients per sample": lambda F, p: vmap(
        lambda x, w: grad(lambda p: (F(p, x[None]) * w).sum())(p)
    )(X, W),
    "gradients of an ensemble": lambda F, p: vmap(lambda p: grad(loss_of(F))(p, X))(stacked(p)),
    "vmap of jvp": lambda F, p: vmap(lambda v: jvp(lambda x: F(p, x), (X,), (v,))[1])(
        torch.stack([V, 2 * V])
    ),
    "vmap of hessian": lambda F, p: vmap(hessian(lambda x: F(p, x).square().sum()))(
        torch.stack([X, X + 0.1])
    ),
    "nested vmap": lambda F, p: vmap(lambda p: vmap(lambda x: F(p, x[None])[0])(X))(stacked(p)),
}


@pytest.mark.parametrize("backward", ["implicit", "lqr", Implicit(method="krylov")], ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_equal_those_of_the_unrolled_iteration(name, backward):
    ours, unrolled, parameters = both(backward=backward)
    transform = TRANSFORMS[name]
    assert (
        relative(leaves(transform(ours, parameters)), leaves(transform(unrolled, parameters)))
        < 1e-10
    )


def test_double_backward_equals_the_unrolled_one():
    ours, unrolled, parameters = both()

    def second(F):
        x = X.clone().requires_grad_()
        p = {k: v.clone().requires_grad_() for k, v in parameters.items()}
        first = torch.autograd.grad(F(p, x).square().sum(), [x, *p.values()], create_graph=True)
        return leaves(torch.autograd.grad(sum(g.square().sum() for g in first), [x, *p.values()]))

    assert relative(second(ours), second(unrolled)) < 1e-10


def test_forward_over_forward_is_refused():
    ours, _, parameters = both()
    with pytest.raises(RuntimeError, match="DEQ layer has no forward derivative of a forward"):
        jacfwd(jacfwd(lambda x: ours(parameters, x).sum()))(X)


def test_forward_mode_without_torch_func_passes_gradcheck_and_batched_grads_are_refused():
    torch.manual_seed(0)
    layer, x = DEQ(DenseBlock(3).double(), tol=1e-13), randn(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,), check_forward_ad=True)
    with pytest.raises(RuntimeError, match="use torch.vmap over torch.func.vjp"):
        torch.autograd.grad(layer(x), x, torch.ones(4, 2, 3).double(), is_grads_batched=True)


@pytest.mark.parametrize("terms", [0, 1, 4])
def test_truncated_gradients_are_what_their_name_says_to_second_order(terms):
    ours, unrolled, parameters = both(backward=Neumann(terms))
    block = Cell().double()

    def truncated(p, x):  # z* without a gradient, then terms + 1 evaluations with one
        z = unrolled(parameters, x).detach()
        for _ in range(terms + 1):
            z = functional_call(block, p, (z, x))
        return z

    gradient = lambda F: leaves(grad(lambda p: (F(p, X) * W).sum())(parameters))
    assert relative(gradient(ours), gradient(truncated)) < 1e-10
    exact = gradient(unrolled)
    assert relative(gradient(ours), exact) > 1e-6
    tangent = lambda F: jvp(lambda p: F(p, X), (parameters,), (ones(parameters),))[1]
    assert relative(tangent(ours), tangent(truncated)) < 1e-10


def test_inexact_gradients_are_had_by_name_only():
    errors = {}
    for backward in ("implicit", "one-step", "neumann"):
        ours, unrolled, parameters = both(backward=backward)
        pair = [leaves(grad(loss_of(F))(parameters, X)) for F in (ours, unrolled)]
        errors[backward] = relative(*pair)
    assert errors["implicit"] < 1e-10 < 1e-6 < errors["neumann"] < errors["one-step"]
    assert errors["one-step"] > 0.1


def test_curvlinops_ggn_of_a_deq_equals_the_dense_one():
    curvlinops = pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    block, head = DenseBlock(4, 3).double(), nn.Linear(4, 2).double()
    model = nn.Sequential(DEQ(block, tol=1e-13), head)
    x, y = randn(5, 3), randn(5, 2, seed=1)
    parameters = list(model.parameters())
    operator = curvlinops.GGNLinearOperator(
        model, nn.MSELoss(), parameters, [(x, y)], check_deterministic=False
    )
    m = sum(p.numel() for p in parameters)
    ggn = operator @ torch.eye(m, dtype=torch.float64)

    def outputs(values):
        z = torch.zeros(5, 4, dtype=torch.float64)
        named = {k: v for k, v in values.items()}
        inner = {k.removeprefix("0.block."): v for k, v in named.items() if k.startswith("0.")}
        for _ in range(300):
            z = functional_call(block, inner, (z, x))
        return functional_call(head, {k[2:]: v for k, v in named.items() if k[0] == "1"}, (z,))

    named = {name: p.detach() for name, p in model.named_parameters()}
    J = torch.cat([v.reshape(10, -1) for v in jacrev(outputs)(named).values()], dim=1)
    assert relative(ggn, J.mT @ J * (2 / 10)) < 1e-10
