"""Skips what this machine cannot run; one thread, so that tests side by side do not starve."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start too

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


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
