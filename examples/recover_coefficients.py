"""A reaction-diffusion equation as the equilibrium: its coefficients recovered from steady states.

    D u'' - k(x) u^3 + s(x) = 0  on (0, 1),   u = 0 at both ends

The state is u on 40 points; the sample is the source s. The data are 16 steady states, solved by
SciPy; D and the profile k(x) (41 numbers) are recovered from them by implicit natural gradient,
which for least squares is Gauss-Newton with adapted damping. Adam has the same model beside it.

Run: python examples/recover_coefficients.py
"""

import time

import numpy as np
import torch
from scipy.optimize import root
from torch import Tensor, nn

import deqlqr

torch.set_default_dtype(torch.float64)
n, samples = 40, 16
x = torch.linspace(0, 1, n + 2)[1:-1]
laplacian = (torch.diag(torch.ones(n - 1), 1) + torch.diag(torch.ones(n - 1), -1)
             - 2 * torch.eye(n)) * (n + 1) ** 2  # fmt: skip
true_D, true_k = 0.05, 2 + torch.sin(2 * torch.pi * x)

generator = torch.Generator().manual_seed(0)
waves = torch.stack([torch.sin(j * torch.pi * x) for j in range(1, 6)])
sources = 2 * torch.randn(samples, 5, generator=generator) @ waves


def steady_states() -> Tensor:
    """Return the solutions for the true coefficients, by SciPy."""
    A, k = true_D * laplacian.numpy(), true_k.numpy()
    solve = lambda s: root(lambda u: A @ u - k * u**3 + s, np.zeros(n), tol=1e-13)
    found = [solve(s) for s in sources.numpy()]
    assert all(f.success for f in found)
    return torch.as_tensor(np.stack([f.x for f in found]))


class ReactionDiffusion(nn.Module):
    """f(u, s) = (c - D L)^-1 (s + c u - k u^3): an implicit step, c = 1.5 k in place of 3 k u^2.

    Its fixed point is the steady state, whatever c is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_D = nn.Parameter(torch.tensor(0.0))
        self.log_k = nn.Parameter(torch.zeros(n))

    def forward(self, u: Tensor, s: Tensor) -> Tensor:
        """Return f(u, s) (batch, n)."""
        D, k = self.log_D.exp(), self.log_k.exp()
        slope = 1.5 * k
        matrix = torch.diag(slope) - D * laplacian
        return torch.linalg.solve(matrix, (s + slope * u - k * u**3)[..., None])[..., 0]


def errors(model: nn.Module) -> str:
    """Return the relative errors of the coefficients."""
    block = model.block
    D = abs(block.log_D.exp().item() / true_D - 1)
    k = ((block.log_k.exp() - true_k).norm() / true_k.norm()).item()
    return f"D to {D:.1e}, k(x) to {k:.1e}"


data = steady_states()
model = deqlqr.DEQ(ReactionDiffusion(), solver="fallback")
optimizer = deqlqr.ImplicitNGD(
    model, loss="mse", route="output", damping=1e-4, adaptive=True, acceleration=True
)
start = time.perf_counter()
error, steps = float("inf"), 0
while error > 1e-20 and steps < 30:
    optimizer.step(sources, data)
    error, steps = optimizer.last_step.loss_after, steps + 1
seconds = time.perf_counter() - start
print(f"implicit natural gradient: {errors(model)} after {steps} steps, {seconds:.1f} s")
assert error < 1e-14

model, steps = deqlqr.DEQ(ReactionDiffusion(), solver="fallback"), 0
adam = torch.optim.Adam(model.parameters(), lr=0.1)
start = time.perf_counter()
while time.perf_counter() - start < seconds:
    loss = nn.functional.mse_loss(model(sources), data)
    adam.zero_grad()
    loss.backward()
    adam.step()
    steps += 1
print(f"Adam: {errors(model)} after {steps} steps, {seconds:.1f} s")
