"""Skips what this machine cannot run."""

import os

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests without CUDA, and MNIST tests without the data."""
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    no_mnist = pytest.mark.skip(reason="needs DEQLQR_MNIST_ROOT")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "mnist" in item.keywords and "DEQLQR_MNIST_ROOT" not in os.environ:
            item.add_marker(no_mnist)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
