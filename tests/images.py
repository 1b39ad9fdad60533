"""Random images in the place of MNIST."""

import torch

from deqlqr.data import Data


def random_images(side: int, samples: int = 40) -> Data:
    """Noise and random labels, as many to train on as to test with."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * samples, 1, side, side, generator=generator)
    y = torch.randint(0, 10, (2 * samples,), generator=generator)
    return Data(x[:samples], y[:samples], x[samples:], y[samples:])
