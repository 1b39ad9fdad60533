"""Problems with known answers, and the one table of tolerances."""

import torch
from torch import Tensor, nn

from deqlqr import DEQ, LQR, Anderson, ConvBlock, DenseBlock

TOL = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.float64: {"rtol": 1e-9, "atol": 1e-9}}
DTYPES = (torch.float32, torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def linear_map(rho: float, batch: int = 4, n: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Symmetric A with spectral radius rho and c: f(z) = z A + c has z* = c (I - A)^-1."""
    X = randn(n, n, seed=seed)
    A = (X + X.mT) / 2
    return A * rho / torch.linalg.eigvalsh(A).abs().max(), randn(batch, n, seed=seed + 1)


def make_lqr(n: int, m: int, batch: tuple[int, ...] = (), rho: float = 0.9, seed: int = 0) -> LQR:
    """Random stable LQR with Q, [Q M'; M R] positive definite and all linear terms."""
    g = generator(seed)
    rand = lambda *s: torch.randn(*batch, *s, generator=g, dtype=torch.float64)
    A = rand(n, n)
    A = A * rho / torch.linalg.eigvals(A).abs().amax(-1)[..., None, None]
    C = rand(n + m, n + m)
    W = C @ C.mT / (n + m) + 0.1 * torch.eye(n + m, dtype=torch.float64)
    return LQR(A, rand(n, m), W[..., :n, :n], W[..., n:, n:], W[..., n:, :n], rand(n), rand(m))


class Cell(nn.Module):
    """A user's own block, unlike the library's."""

    def __init__(self, n: int = 3, scale: float = 0.5) -> None:
        super().__init__()
        self.mix = nn.Linear(n, n)
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, z, x):
        return self.scale * torch.tanh(self.mix(z) + x) + 0.1 * x * z


class Squared(nn.Module):
    """A weight that is no multiple of a parameter."""

    def __init__(self):
        super().__init__()
        self.root = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return nn.functional.linear(x, self.root @ self.root.mT)


def unrolled(block, x, steps=400):
    z = torch.zeros_like(x)
    for _ in range(steps):
        z = block(z, x)
    return z


def dense_model(seed: int = 0, encoder: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [DEQ(DenseBlock(4, 5)), nn.Linear(4, 3)]
    if encoder:
        layers.insert(0, nn.Linear(6, 5))
    return nn.Sequential(*layers)


def conv_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=2, padding=1),
        DEQ(ConvBlock(2, 12)),
        nn.Flatten(),
        nn.Linear(2 * 9, 3),
    )


def dense_batch(samples: int = 5, seed: int = 0, width: int = 6) -> tuple[Tensor, Tensor]:
    return randn(samples, width, seed=seed).float(), torch.arange(samples) % 3


def conv_batch(samples: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    return randn(samples, 1, 6, 6, seed=seed).float(), torch.arange(samples) % 3


def exact(model: nn.Module) -> nn.Module:
    """The model in float64, with fixed points to the last digits."""
    model = model.double()
    for module in model.modules():
        if isinstance(module, DEQ):
            module.solver = Anderson(tol=1e-13, max_steps=1000)
    return model


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())
