"""Train a small DEQ on the 8x8 digits by implicit natural gradient, next to gradient descent.

Both see the same model and the same minibatches for the same number of steps; gradient descent
may choose the best of several step lengths. A natural-gradient step costs more time than a
gradient step: the comparison is by steps.

Run: python examples/train_ingd.py
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deqlqr import DEQ, DenseBlock, ImplicitNGD
from deqlqr.data import load_data

STEPS, BATCH = 20, 20

data = load_data("digits")
torch.manual_seed(0)
start = nn.Sequential(nn.Flatten(), DEQ(DenseBlock(12, 64)), nn.Linear(12, data.outputs))
order = torch.randperm(len(data.train_x))[: STEPS * BATCH].split(BATCH)
batches = [(data.train_x[samples], data.train_y[samples]) for samples in order]


@torch.no_grad()
def measure(model: nn.Module) -> tuple[float, float]:
    """Return the loss on the whole training set and the accuracy on the test set."""
    loss = F.cross_entropy(model(data.train_x), data.train_y)
    hits = model(data.test_x).argmax(-1) == data.test_y
    return float(loss), float(hits.float().mean())


def gradient_descent(model: nn.Module, lr: float) -> nn.Module:
    """Take one plain gradient step on every minibatch."""
    parameters: list[Tensor] = list(model.parameters())
    for x, y in batches:
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p -= lr * g
    return model


print(f"before: training loss {measure(start)[0]:.3f}")

model = deepcopy(start)
opt = ImplicitNGD(model, loss="cross_entropy", lr=0.5, damping=0.1)
for number, (x, y) in enumerate(batches):
    opt.step(x, y)
    report = opt.last_step
    if number % 5 == 0:
        print(
            f"step {number:2d}: loss {report.loss:.3f} -> {report.loss_after:.3f}, "
            f"accepted {report.accepted}, damping {report.damping:g}, "
            f"rho(A - BK) {report.closed_loop_radius:.3f}, "
            f"DARE residual {report.dare_residual:.0e}"
        )
natural, accuracy = measure(model)
print(f"implicit natural gradient: training loss {natural:.3f}, test accuracy {accuracy:.1%}")

losses = []
for lr in (0.1, 0.3, 1.0, 3.0):
    loss, accuracy = measure(gradient_descent(deepcopy(start), lr))
    losses.append(loss)
    print(f"gradient descent, lr {lr}: training loss {loss:.3f}, test accuracy {accuracy:.1%}")

if not natural < min(losses):
    raise SystemExit(f"after {STEPS} steps gradient descent is ahead: {min(losses)} < {natural}")
print(f"ok: after {STEPS} steps the natural gradient's training loss is the lowest")
