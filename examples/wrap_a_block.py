"""Wrap a residual block of your own as a DEQ layer, and check its gradient.

Shows the certificate of the forward solve (`layer.solution`), the gradient against autograd
through the unrolled iteration, and that both backward paths, "implicit" and "lqr", agree.

Run: python examples/wrap_a_block.py
"""

import torch
from torch import Tensor, nn

from deqlqr import DEQ

BATCH, INPUTS, STATES = 4, 5, 6


class RelaxedBlock(nn.Module):
    """f(z, x) = z + h (tanh(W z + U x) - z): a residual block; its fixed point does not need h."""

    def __init__(self, h: float = 0.5) -> None:
        super().__init__()
        self.h = h
        self.W = nn.Linear(STATES, STATES)
        self.U = nn.Linear(INPUTS, STATES, bias=False)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Return f(z, x) (batch, STATES)."""
        return z + self.h * (torch.tanh(self.W(z) + self.U(x)) - z)


def gradients(z: Tensor, x: Tensor, block: nn.Module) -> Tensor:
    """Return the gradient of a test loss with respect to x and all parameters, as one vector."""
    loss = (z.sin() * torch.linspace(1, 2, STATES, dtype=z.dtype)).sum()
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, [x, *block.parameters()])])


def relative(a: Tensor, b: Tensor) -> float:
    """Return ||a - b|| / ||b||."""
    return float((a - b).norm() / b.norm())


torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
block = RelaxedBlock()
x = torch.randn(BATCH, INPUTS, requires_grad=True)

# The state has another size than the input, so its shape is given.
layer = DEQ(block, tol=1e-13, state_shape=(STATES,))
z = layer(x)
implicit = gradients(z, x, block)

solution = layer.solution
print("converged:  ", solution.converged.tolist())
print("evaluations:", solution.evaluations.tolist())
print("residual:   ", [f"{r:.1e}" for r in solution.residual.tolist()])

layer.backward = "lqr"  # the same gradient from the LQR of theorem 4.2.1
lqr = gradients(layer(x), x, block)

z = torch.zeros(BATCH, STATES)
for _ in range(300):
    z = block(z, x)
unrolled = gradients(z, x, block)

errors = {
    "implicit against unrolled autograd": relative(implicit, unrolled),
    "lqr against implicit": relative(lqr, implicit),
}
for name, error in errors.items():
    print(f"gradient, {name}: relative error {error:.1e}")

if not bool(solution.converged.all()):
    raise SystemExit("a sample has no fixed point")
for name, error in errors.items():
    if not error <= 1e-8:
        raise SystemExit(f"gradient, {name}: {error:.1e} is above 1e-8")
print("ok: all three gradients agree to 1e-8")
