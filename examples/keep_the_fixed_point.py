"""Three ways to train with steps that are too long: without care, guarded, with a guarantee.

Run: python examples/keep_the_fixed_point.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import deqlqr


class Own(nn.Module):
    """A block of one's own that contracts by 0.95^2: both weights are bounded, tanh has slope 1."""

    def __init__(self, n: int, inputs: int, *, bounded: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(n, 2 * n), nn.Linear(2 * n, n)
        self.input = nn.Linear(inputs, 2 * n, bias=False)
        if bounded:
            deqlqr.bound_norm(self.first, max_norm=0.95)
            deqlqr.bound_norm(self.second, max_norm=0.95)

    def state_shape(self, x: torch.Tensor) -> tuple[int, ...]:
        """Return the shape of one sample's state."""
        return (self.second.out_features,)

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return f(z, x)."""
        return self.second(torch.tanh(self.first(z) + self.input(x)))


def train(*, bounded: bool, guarded: bool) -> tuple[int, nn.Module, str]:
    """Return how many steps went well, the model, and what happened."""
    torch.manual_seed(0)
    model = nn.Sequential(deqlqr.DEQ(Own(24, 64, bounded=bounded), tol=1e-4), nn.Linear(24, 10))
    sgd = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    stepper = deqlqr.GradientStep(model, sgd, "cross_entropy")
    guard = deqlqr.Guard(stepper, every=5)
    for step in range(STEPS):
        batch = torch.arange(64) + 64 * (step % 20)
        try:
            (guard if guarded else stepper).step(x[batch], y[batch])
        except deqlqr.ConvergenceError as error:
            return step, model, str(error)[:60] + "..."
    if guarded:
        guard.check(x[batch])  # of the last steps
    return STEPS, model, str(guard.counts) if guarded else "nothing to tell"


STEPS = 45
digits = load_digits()
x = torch.as_tensor(digits.data, dtype=torch.float32) / 8 - 1
y = torch.as_tensor(digits.target)

ended = {}
for name, options in {
    "free": {"bounded": False, "guarded": False},
    "free, guarded": {"bounded": False, "guarded": True},
    "bounded": {"bounded": True, "guarded": False},
}.items():
    steps, model, what = train(**options)
    ended[name] = steps
    print(f"{name:14} {steps:3d} of {STEPS} steps: {what}")
    if steps == STEPS:
        with torch.no_grad():
            accuracy = float((model(x[-500:]).argmax(1) == y[-500:]).float().mean())
            radius = deqlqr.jacobian_radius(model[0], model[0](x[:50]), x[:50])
        print(f"{'':14} accuracy {accuracy:.1%}, largest radius {float(radius.max()):.2f}")

if not (ended["free"] < STEPS and ended["free, guarded"] == ended["bounded"] == STEPS):
    raise SystemExit("FAILED")
print("without care the fixed point is lost; guarded or bounded it is not")
