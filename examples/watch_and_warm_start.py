"""Train a DEQ with any optimiser, watch it, keep it stable, and start each solve from the last.

Trains a dense DEQ without any bound on its weights on 8 x 8 digits, in a fixed order of the data,
with Adam and a penalty on the Jacobian. The monitor prints evaluations, residual and spectral
radius; training again from cold starts shows what the warm ones save.

Run: python examples/watch_and_warm_start.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from deqlqr import DEQ, DenseBlock, Monitor, jacobian_penalty

BATCH, EPOCHS, STATES = 100, 8, 64


def train(warm_start: bool) -> tuple[float, float, float]:
    """Return the last loss, and the mean evaluations and backward products of a sample."""
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.data[:1000], dtype=torch.float32) / 16
    y = torch.tensor(digits.target[:1000])
    layer = DEQ(DenseBlock(STATES, 64, max_norm=None, gain=0.8), warm_start=warm_start)
    model = nn.Sequential(layer, nn.Linear(STATES, 10))
    optimizer = torch.optim.Adam(model.parameters(), 5e-4)
    monitor = Monitor(layer, alarm=1.0)
    forward = backward = 0.0
    for epoch in range(EPOCHS):
        for number, start in enumerate(range(0, len(x), BATCH)):
            part = slice(start, start + BATCH)
            optimizer.zero_grad()
            z = layer(x[part], key=number)  # the same samples every time this number comes
            forward += float(layer.solution.evaluations.float().mean())
            penalty = jacobian_penalty(layer, z, x[part])
            loss = nn.functional.cross_entropy(model[1](z), y[part]) + 5.0 * penalty
            loss.backward()
            backward += float(layer.backward_solution.evaluations.float().mean())
            optimizer.step()
        seen = monitor.observe(x[part])
        print(
            f"epoch {epoch}  loss {loss.item():.4f}  evaluations {seen.evaluations:.1f}  "
            f"residual {seen.residual:.1e}  radius {seen.radius:.3f}  failed {seen.failed:.0%}"
        )
        assert seen.radius < 1 and seen.failed == 0
    steps = EPOCHS * (len(x) // BATCH)
    return loss.item(), forward / steps, backward / steps


loss, evaluations, products = train(warm_start=True)
cold_loss, cold_evaluations, cold_products = train(warm_start=False)
print(f"evaluations of f a sample: {evaluations:.2f} warm, {cold_evaluations:.2f} cold")
print(f"backward products a sample: {products:.2f} warm, {cold_products:.2f} cold")
assert evaluations < cold_evaluations
assert abs(loss - cold_loss) < 1e-3 * cold_loss
