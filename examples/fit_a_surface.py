"""Fit a surface to high accuracy: least squares by implicit natural gradient, beside Adam.

A dense DEQ with 32 states (1,185 parameters) learns sin(3 x1) cos(2 x2) + 0.3 x1 x2 from 400
points, full batch, float64. The step is the exact damped one, from output space; the damping
follows the quadratic model, and the geodesic acceleration takes the bend of the outputs back.

Run: python examples/fit_a_surface.py [seeds]
"""

import sys
import time

import torch
from torch import nn

import deqlqr

torch.set_default_dtype(torch.float64)
seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 1

axis = torch.linspace(-1, 1, 20)
x = torch.cartesian_prod(axis, axis)
y = ((3 * x[:, 0]).sin() * (2 * x[:, 1]).cos() + 0.3 * x[:, 0] * x[:, 1])[:, None]


def make_model(seed: int) -> nn.Module:
    """Return a freshly initialised model."""
    torch.manual_seed(seed)
    # max_norm=None: the block may lose its fixed point; a step that does so is taken back.
    block = deqlqr.DenseBlock(32, max_norm=None)
    return nn.Sequential(nn.Linear(2, 32), deqlqr.DEQ(block), nn.Linear(32, 1))


for seed in range(seeds):
    model = make_model(seed)
    optimizer = deqlqr.ImplicitNGD(
        model, loss="mse", route="output", damping=0.1, adaptive=True, acceleration=True,
        max_increase=0.0, damping_increase=3.0, max_rejections=12,
    )  # fmt: skip
    start, steps, error = time.perf_counter(), 0, float("inf")
    while error > 1e-8 and steps < 40:
        optimizer.step(x, y)
        error, steps = optimizer.last_step.loss_after, steps + 1
    seconds = time.perf_counter() - start
    print(f"seed {seed}: implicit natural gradient {error:.1e} in {steps} steps, {seconds:.1f} s")
    assert error <= 1e-8

model = make_model(0)
adam = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(steps):
    loss = nn.functional.mse_loss(model(x), y)
    adam.zero_grad()
    loss.backward()
    adam.step()
print(f"Adam after as many steps: {float(loss.detach()):.1e}")
