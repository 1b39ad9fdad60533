"""Memory kept from solve to solve: nobody's results live in it, and nobody shares it."""

import threading

import torch

from deqlqr import fixed_point
from deqlqr.scratch import Scratch

LARGE = (64, 2048)  # float32: beyond what is not worth keeping


def test_a_block_that_is_given_back_serves_the_next_and_only_one_at_a_time():
    like = torch.zeros(1)
    first = Scratch(like, LARGE, LARGE, dtype=torch.float32)
    assert [X.shape for X in first.tensors] == [LARGE, LARGE]
    place = first.tensors[0].data_ptr()
    second = Scratch(like, LARGE, dtype=torch.float32)
    a, b = first.tensors
    a.fill_(1.0), b.fill_(2.0), second.tensors[0].fill_(3.0)
    assert (a == 1).all() and (b == 2).all()
    del a, b, first
    third = Scratch(like, LARGE, dtype=torch.float64)
    assert third.tensors[0].data_ptr() == place
    assert third.tensors[0].dtype == torch.float64 and third.tensors[0].shape == LARGE
    assert (second.tensors[0] == 3).all()


def test_memory_taken_in_inference_mode_serves_outside_of_it():
    Scratch._kept.clear()
    with torch.inference_mode():
        del Scratch(torch.zeros(1), LARGE, dtype=torch.float32).tensors[:]
    again = Scratch(torch.zeros(1), LARGE, dtype=torch.float32)
    again.tensors[0].add_(1.0)
    assert not again.tensors[0].is_inference()


def test_solves_side_by_side_and_inside_each_other_do_not_meet():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 2048, generator=g)
    turn = torch.linalg.qr(torch.randn(2048, 2048, generator=g))[0] * 0.8
    inner = lambda z, x: torch.tanh(z @ turn) + x
    outer = lambda z, x: (
        0.5 * z + 0.1 * fixed_point(inner, torch.zeros_like(x), inputs=(x,), tol=1e-4).value
    )
    solve = lambda f: fixed_point(f, torch.zeros_like(x), inputs=(x,), tol=1e-4).value
    alone = solve(inner)
    nested = solve(outer)
    assert torch.allclose(nested, 0.2 * alone, atol=1e-3)
    found: dict[int, torch.Tensor] = {}

    def work(k: int) -> None:
        found[k] = solve(inner)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(value, alone, atol=1e-5) for value in found.values())
    assert torch.equal(solve(inner), alone)
