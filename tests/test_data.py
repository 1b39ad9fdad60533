"""Data sets: shapes, split, determinism, and refusal of folders without MNIST."""

import math
import os
import shutil
from pathlib import Path

import pytest
import torch

from deqlqr.data import CLUSTER_SETS, DATASETS, POINT_SETS, Data, load_data


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


def test_digits_have_the_promised_shapes_types_and_range(digits: Data) -> None:
    for x, y in ((digits.train_x, digits.train_y), (digits.test_x, digits.test_y)):
        assert x.shape == (len(y), 1, 8, 8) and x.dtype == torch.float32
        assert y.dtype == torch.int64 and set(y.tolist()) == set(range(digits.outputs))
    pixels = torch.cat([digits.train_x, digits.test_x])
    assert float(pixels.max() - pixels.min()) == pytest.approx(1.0)
    assert abs(float(digits.train_x.mean())) < 1e-6


def test_the_split_of_digits_is_a_partition(digits: Data) -> None:
    from sklearn.datasets import load_digits

    original = torch.as_tensor(load_digits().images, dtype=torch.float32)
    assert len(digits.train_x) + len(digits.test_x) == len(original)
    assert len(digits.test_x) == pytest.approx(0.2 * len(original), abs=1)
    pixels = torch.cat([digits.train_x, digits.test_x])
    pixels = ((pixels - pixels.min()) * 16).round().flatten(1)
    rows = lambda t: sorted(map(tuple, t.tolist()))
    assert rows(pixels) == rows(original.flatten(1))


def test_digits_are_the_same_every_time(digits: Data) -> None:
    again = load_data("digits")
    for name in ("train_x", "train_y", "test_x", "test_y"):
        assert torch.equal(getattr(digits, name), getattr(again, name))


def test_first_keeps_the_first_training_samples_and_the_whole_test_set(digits: Data) -> None:
    few = digits.first(7)
    assert torch.equal(few.train_x, digits.train_x[:7])
    assert torch.equal(few.train_y, digits.train_y[:7])
    assert torch.equal(few.test_x, digits.test_x)
    assert digits.first(None) is digits
    assert len(digits.first(len(digits.train_x)).train_x) == len(digits.train_x)


def test_first_refuses_a_size_out_of_range(digits: Data) -> None:
    for samples in (0, -1, len(digits.train_x) + 1):
        with pytest.raises(ValueError, match="train_size"):
            digits.first(samples)


def test_the_sine_is_a_sine_on_the_whole_interval() -> None:
    data = load_data("sine")
    assert data.loss == "mse" and data.outputs == 1
    for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y)):
        assert x.shape == y.shape == (1000, 1) and x.dtype == y.dtype == torch.float64
        assert torch.equal(y, torch.sin(x)) and len(torch.unique(x)) == 1000
        assert -math.pi <= float(x.min()) < -3.1 and 3.1 < float(x.max()) <= math.pi
    assert not torch.isin(data.test_x, data.train_x).any()


def test_the_surface_is_the_promised_one() -> None:
    data = load_data("sine2d")
    assert data.train_x.shape == (400, 2) and data.test_x.shape == (1000, 2)
    assert data.train_y.shape == (400, 1) and data.loss == "mse" and data.outputs == 1
    for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y)):
        x1, x2 = x.unbind(1)
        assert x.dtype == y.dtype == torch.float64 and float(x.abs().max()) <= 1
        expected = torch.sin(3 * x1) * torch.cos(2 * x2) + 0.3 * x1 * x2
        assert torch.allclose(y[:, 0], expected, atol=1e-14)
    assert len(torch.unique(data.train_x, dim=0)) == 400


@pytest.mark.parametrize("name", POINT_SETS)
def test_points_have_two_classes_that_take_turns(name: str) -> None:
    data, again = load_data(name), load_data(name)
    assert name in DATASETS and data.outputs == 2 and data.loss == "cross_entropy"
    assert data.train_x.shape == (500, 2) and data.test_x.shape == (1000, 2)
    for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y)):
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        assert torch.equal(y, torch.arange(len(y)) % 2)
        assert float(x.norm(dim=1).max()) <= math.hypot(1, 1) and len(torch.unique(x, dim=0)) > 490
    for part in ("train_x", "train_y", "test_x", "test_y"):
        assert torch.equal(getattr(data, part), getattr(again, part))
    assert not torch.equal(data.train_x, data.test_x[:500])
    both = torch.cat([data.train_x, data.test_x])
    assert bool((both.amax(0) > -both.amin(0) / 2).all())  # about as far to either side


def both_parts(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    data = load_data(name)
    points = torch.cat([data.train_x, data.test_x]).double()
    return points, torch.cat([data.train_y, data.test_y])


def test_the_inner_interval_of_donut1d_lies_between_its_two_sides() -> None:
    points, label = both_parts("donut1d")
    t, spread = points.abs().unbind(1)
    inner, sides = t[label == 1], t[label == 0]
    assert 0.43 < float(inner.max()) <= 0.45 and float(spread.max()) <= 0.05
    assert 0.55 <= float(sides.min()) < 0.57 and 0.98 < float(sides.max()) <= 1
    for c in (0, 1):
        assert 0.4 < float((points[label == c, 0] > 0).double().mean()) < 0.6
        assert float(points[label == c, 0].double().abs().mean()) == pytest.approx(
            (0.775, 0.225)[c], abs=0.02
        )


def test_the_disk_of_donut2d_lies_in_its_ring_and_both_are_uniform_in_area() -> None:
    points, label = both_parts("donut2d")
    square = points.square().sum(1)
    disk, ring = square[label == 1], square[label == 0]
    assert 0.24 < float(disk.max()) <= 0.25 and 0.36 <= float(ring.min()) < 0.37
    assert 0.98 < float(ring.max()) <= 1 + 1e-6
    assert float(disk.mean()) == pytest.approx(0.125, abs=0.01)
    assert float(ring.mean()) == pytest.approx(0.68, abs=0.02)
    assert float(points.mean(0).abs().max()) < 0.05


def test_the_class_of_squares_is_the_sign_of_the_product() -> None:
    points, label = both_parts("squares")
    assert torch.equal((points.prod(1) > 0).long(), label)
    assert 0.05 <= float(points.abs().min()) < 0.06 and 0.98 < float(points.abs().max()) <= 1
    corners = torch.unique(points.sign(), dim=0, return_counts=True)[1]
    assert corners.numel() == 4 and int(corners.min()) > 300


def test_the_arms_of_the_spiral_are_the_promised_ones() -> None:
    points, label = both_parts("spiral")
    radius, angle = points.norm(dim=1), torch.atan2(points[:, 1], points[:, 0])

    def distance(c: int) -> torch.Tensor:
        turn = 2 * math.pi * torch.arange(-1, 3)
        r = (angle[:, None] - math.pi * c + turn) / (3 * math.pi)
        on_arm = (r >= 0.1 - 1e-6) & (r <= 1 + 1e-6)
        return torch.where(on_arm, (radius[:, None] - r).abs(), torch.inf).amin(1)

    own = torch.where(label == 1, distance(1), distance(0))
    other = torch.where(label == 1, distance(0), distance(1))
    assert 0.038 < float(own.max()) <= 0.04 + 1e-6 and float(other.min()) > 0.25
    for c in (0, 1):
        arm = radius[label == c]
        assert float(arm.min()) < 0.2 and float(arm.max()) > 0.95
        assert float(arm.square().mean()) == pytest.approx(0.505, abs=0.04)


@pytest.mark.parametrize(("name", "inputs", "samples"), [("wine", 13, 178), ("iris", 4, 150)])
def test_tables_are_standardised_by_their_training_rows(
    name: str, inputs: int, samples: int
) -> None:
    import sklearn.datasets

    data, again = load_data(name), load_data(name)
    assert name in DATASETS and data.outputs == 3 and data.loss == "cross_entropy"
    assert len(data.train_x) + len(data.test_x) == samples
    assert len(data.test_x) == pytest.approx(0.2 * samples, abs=1)
    assert torch.allclose(data.train_x.mean(0), torch.zeros(inputs), atol=1e-5)
    assert torch.allclose(data.train_x.std(0), torch.ones(inputs), atol=1e-5)
    # Stretched back to the range of each column, the rows are those of the table.
    rows, classes = getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)
    x, y = torch.as_tensor(rows), torch.as_tensor(classes)
    both, labels = torch.cat([data.train_x, data.test_x]), torch.cat([data.train_y, data.test_y])
    low, high = both.double().aminmax(dim=0)
    back = x.amin(0) + (both - low) / (high - low) * (x.amax(0) - x.amin(0))
    nearest = torch.cdist(back.double() / x.std(0), x / x.std(0)).min(1)
    assert float(nearest.values.max()) < 1e-5 and len(both) == len(x)
    assert torch.equal(y[nearest.indices], labels)
    assert torch.equal(labels.bincount(), y.bincount())
    for label in range(3):
        share = (data.test_y == label).double().mean() - (labels == label).double().mean()
        assert abs(float(share)) < 0.05
    assert torch.equal(data.train_x, again.train_x) and torch.equal(data.test_y, again.test_y)


@pytest.mark.parametrize("name", CLUSTER_SETS)
def test_clusters_are_normal_about_their_centres(name: str) -> None:
    k, data, again = int(name.removeprefix("clusters")), load_data(name), load_data(name)
    assert name in DATASETS and data.outputs == k and data.loss == "cross_entropy"
    centres = torch.stack([data.train_x[data.train_y == c].mean(0) for c in range(k)])
    for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y)):
        assert x.shape == (40 * k, 30) and x.dtype == torch.float32 and y.dtype == torch.int64
        assert torch.equal(y.bincount(), torch.full((k,), 40))
        assert torch.equal(torch.cdist(x, centres).argmin(1), y)
        assert float((x - centres[y]).std()) == pytest.approx(1.0, abs=0.05)
    assert float(centres.std()) == pytest.approx(2.0, abs=0.3)
    assert torch.equal(data.train_x, again.train_x)
    assert not torch.equal(data.train_x, data.test_x)


def test_an_unknown_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="data .*'cifar'"):
        load_data("cifar")


def test_mnist_without_a_root_is_refused() -> None:
    with pytest.raises(ValueError, match="data root"):
        load_data("mnist")


def test_mnist_in_a_missing_or_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "absent", tmp_path / "file", tmp_path):
        with pytest.raises(ValueError, match="data root") as caught:
            load_data("mnist", root)
        assert repr(str(root)) in str(caught.value)


_NAMES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


@pytest.mark.parametrize("junk", [b"", b"\x00\x00\x08\x03", b"not MNIST at all" * 9])
def test_damaged_mnist_files_are_refused(tmp_path: Path, junk: bytes) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in _NAMES:
        (raw / f"{name}-ubyte").write_bytes(junk)
    with pytest.raises(ValueError, match="MNIST") as caught:
        load_data("mnist", tmp_path)
    assert repr(str(tmp_path)) in str(caught.value)


@pytest.mark.mnist
def test_mnist_is_loaded_and_standardised() -> None:
    mnist = load_data("mnist", os.environ["DEQLQR_MNIST_ROOT"])
    assert mnist.train_x.shape == (60000, 1, 28, 28) and mnist.test_x.shape == (10000, 1, 28, 28)
    assert mnist.train_x.dtype == torch.float32 and mnist.train_y.dtype == torch.int64
    assert set(mnist.test_y.tolist()) == set(range(10))
    assert abs(float(mnist.train_x.mean())) < 1e-3
    assert float(mnist.train_x.std()) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.mnist
def test_truncated_mnist_is_refused(tmp_path: Path) -> None:
    shutil.copytree(Path(os.environ["DEQLQR_MNIST_ROOT"]) / "MNIST", tmp_path / "MNIST")
    images = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.chmod(0o644)
    images.write_bytes(images.read_bytes()[:1_000_000])
    with pytest.raises(ValueError, match="data root"):
        load_data("mnist", tmp_path)
