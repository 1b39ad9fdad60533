"""Check, on a model and a batch of your own, that every route to the same step agrees.

The model has an encoder before its DEQ layer and a readout after it; the parameters of all three
are controls of the one LQR. `check_equivalence` works in float64 on a copy of the model.

Run: python examples/check_equivalence.py
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deqlqr import DEQ, ImplicitNGD, check_equivalence


class GatedBlock(nn.Module):
    """f(z, x) = tanh(W z + x) * sigmoid(V z): any differentiable block can be checked."""

    def __init__(self, states: int) -> None:
        super().__init__()
        self.W, self.V = nn.Linear(states, states), nn.Linear(states, states)

    def phases(self, x: Tensor) -> list[Callable]:
        """Return the block's layers: optional, for the cyclic LQR's row of the table."""
        candidate = lambda z: (torch.tanh(self.W(z) + x), z)
        gate = lambda state: state[0] * torch.sigmoid(self.V(state[1]))
        return [candidate, gate]

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Return f(z, x), of the shape of z."""
        for phase in self.phases(x):
            z = phase(z)
        return z


torch.manual_seed(0)
model = nn.Sequential(
    nn.Sequential(nn.Linear(7, 5), nn.Tanh()),  # encoder
    DEQ(GatedBlock(5)),
    nn.Linear(5, 3),  # readout
)
x, y = torch.randn(6, 7), torch.randint(3, (6,))

print("At the initial parameters")
before = check_equivalence(model, x, y, damping=1e-2)
print(before)

opt = ImplicitNGD(model, lr=0.5, damping=0.1)
for _ in range(10):
    opt.step(x, y)
print(f"\nAfter ten steps (loss {opt.last_step.loss_after:.3f})")
after = check_equivalence(model, x, y, damping=1e-2)
print(after)

for when, report in (("before", before), ("after", after)):
    for row in report.rows:
        if row.passed is None:
            raise SystemExit(f"{when}: {row.quantity}, {row.left} was skipped: {row.note}")
        if not row.passed:
            raise SystemExit(f"{when}: {row.quantity}, {row.left}: error {row.error:.1e}")
print("\nok: every row holds, before and after training")
