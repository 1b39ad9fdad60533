"""Tests for `deqlqr/frozen.py`: one solve sees one map, and the backward pass the same."""

import copy
import pickle
import warnings

import pytest
import torch
import torch._functorch.config
from torch import nn

from deqlqr import DEQ, Anderson, DenseBlock

from .problems import randn, relative


class Noisy(nn.Module):
    """Dropout on the state, batch normalisation of both."""

    def __init__(self, n: int = 20) -> None:
        super().__init__()
        self.mix, self.drop = nn.Linear(n, n), nn.Dropout(0.3)
        self.norm = nn.BatchNorm1d(n)

    def forward(self, z, x):
        return 0.5 * torch.tanh(self.drop(self.mix(z)) + self.norm(x) + 0.1 * self.norm(z))


def noisy(n=20):
    torch.manual_seed(0)
    block = Noisy(n).double()
    return block, DEQ(block, tol=1e-11), randn(16, n)


def test_a_mask_is_held_within_a_solve_and_its_backward_and_drawn_anew_for_the_next():
    block, layer, x = noisy()
    block.norm.eval()
    state = torch.get_rng_state()

    def unrolled(x):
        z = torch.zeros_like(x)
        for _ in range(200):
            torch.set_rng_state(state)
            z = block(z, x)
        return z

    wanted = torch.autograd.grad(unrolled(x).square().sum(), block.mix.weight)[0]
    torch.set_rng_state(state)
    z = layer(x)
    torch.manual_seed(99)  # the backward pass must not depend on the moment
    before = torch.get_rng_state()
    ours = torch.autograd.grad(z.square().sum(), block.mix.weight)[0]
    assert relative(ours, wanted) < 1e-8
    assert torch.equal(torch.get_rng_state(), before)
    assert relative(layer(x).detach(), z.detach()) > 0.01
    assert layer.solution.rows == 16 * layer.solution.evaluations.max()  # masks have rows


def test_random_numbers_move_on_as_by_one_evaluation():
    block, layer, x = noisy()
    block.norm.eval()
    torch.manual_seed(3)
    layer(x)
    after_layer = torch.rand(1)
    torch.manual_seed(3)
    block(torch.zeros_like(x), x)
    assert torch.equal(after_layer, torch.rand(1))


def test_batch_statistics_are_updated_once_a_forward_and_not_in_backward_or_eval():
    block, layer, x = noisy()
    z = layer(x)
    assert block.norm.num_batches_tracked == 2  # the block applies its norm twice
    assert block.norm.training
    mean = block.norm.running_mean.clone()
    z.sum().backward()
    assert torch.equal(block.norm.running_mean, mean)
    layer.eval()
    layer(x)
    assert torch.equal(block.norm.running_mean, mean)


def test_the_backward_pass_sees_the_modes_of_the_forward_pass():
    block, layer, x = noisy()
    block.norm.eval()
    gradient = lambda z: torch.autograd.grad(z.square().sum(), block.mix.weight)[0]
    torch.manual_seed(1)
    wanted = gradient(layer(x))
    torch.manual_seed(1)
    z = layer(x)
    layer.eval()
    assert relative(gradient(z), wanted) < 1e-12
    assert not block.drop.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision_models_train(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), DEQ(DenseBlock(40)), nn.Linear(40, 5))
    x, y = randn(32, 30).float(), torch.arange(32) % 5
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    plain = copy.deepcopy(model)
    exact = torch.autograd.grad(nn.functional.cross_entropy(plain(x), y), plain.parameters())
    with torch.autocast("cpu", dtype):
        loss = nn.functional.cross_entropy(model(x), y)
    for a, b in zip(torch.autograd.grad(loss, model.parameters()), exact, strict=True):
        assert relative(a, b) < 0.1
    half = copy.deepcopy(model).to(dtype)
    half(x.to(dtype)).float().square().sum().backward()
    assert half[1].block.state.weight.grad.dtype == dtype


def test_a_layer_is_pickled_copied_saved_and_loaded():
    layer = DEQ(DenseBlock(3), solver=Anderson(memory=3, period=1), warm_start=True)
    x = randn(2, 3).float()
    z = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.solution is None and not other._warm and torch.equal(other(x), z)
    fresh = DEQ(DenseBlock(3))
    fresh.load_state_dict(layer.state_dict())
    assert relative(fresh(x).detach(), z.detach()) < 1e-4


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_block_works(backend):
    block, x = DenseBlock(8), randn(4, 8).float()
    # Old versions of torch refuse to run a compiled graph back twice without this.
    permitted = torch._functorch.config.patch(donated_buffer=False)
    with permitted, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = DEQ(torch.compile(block, backend=backend))
        ours = torch.autograd.grad(layer(x).sum(), block.parameters())
    wanted = torch.autograd.grad(DEQ(block)(x).sum(), block.parameters())
    assert all(relative(a, b) < 1e-5 for a, b in zip(ours, wanted, strict=True))


def test_data_parallel_replicas_pass_their_gradients_on():
    layer, x = DEQ(DenseBlock(6).double(), tol=1e-12), randn(3, 6)
    modules = list(layer.modules())  # what torch.nn.parallel.replicate does, on one device
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
        replica._former_parameters = {}
        for name, p in module._parameters.items():
            replica._parameters.pop(name, None)
            if p is not None:
                replica._former_parameters[name] = p.clone()
                setattr(replica, name, replica._former_parameters[name])
    ours = torch.autograd.grad(replicas[layer](x).sum(), list(layer.parameters()))
    wanted = torch.autograd.grad(layer(x).sum(), list(layer.parameters()))
    assert all(relative(a, b) < 1e-10 for a, b in zip(ours, wanted, strict=True))


def test_distributed_data_parallel_gives_the_same_gradients(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    layer, x = DEQ(DenseBlock(6).double(), tol=1e-12), randn(3, 6)
    wanted = torch.autograd.grad(layer(x).sum(), list(layer.parameters()))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parallel = nn.parallel.DistributedDataParallel(layer)
        parallel(x).sum().backward()
        for p, g in zip(layer.parameters(), wanted, strict=True):
            assert relative(p.grad, g) < 1e-10
    finally:
        torch.distributed.destroy_process_group()
