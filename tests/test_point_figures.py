"""Tests for `deqlqr/point_figures.py`: what is drawn where, and what is refused."""

import struct
from dataclasses import replace

import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from torch import nn

from deqlqr.data import load_data
from deqlqr.point_figures import plot_accuracy_by_size, plot_points, plot_transition

DATA = load_data("donut2d").first(40)


class Shift(nn.Module):
    """Four layers that each move the points by one to the right."""

    def __init__(self, layers=4, width=2):
        super().__init__()
        self.layers, self.width = layers, width

    def trajectory(self, z):
        move = torch.tensor([1.0, 0.0])
        states = torch.stack([z + layer * move for layer in range(self.layers + 1)])
        return states[..., : self.width]


@pytest.fixture
def drawn(monkeypatch):
    """Every figure that is saved."""
    figures, save = [], Figure.savefig

    def keep(self, path, **options):
        figures.append(self)
        save(self, path, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def points_of(axis):
    (scatter,) = [c for c in axis.collections if isinstance(c, PathCollection)]
    return torch.as_tensor(scatter.get_offsets()).double(), scatter.get_facecolors()


def background_of(axis):
    (image,) = axis.images
    return torch.as_tensor(image.get_array()), image.get_extent()


def at(values, box, places):
    """Values of a background at places (batch, 2), from the nearest of its points."""
    left, right, bottom, top = box
    low, size = torch.tensor([left, bottom]), torch.tensor([right - left, top - bottom])
    column, row = ((places - low) / size * (len(values) - 1)).round().long().unbind(1)
    return values[row, column]


def size_of(path):
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


def model(features, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, features), nn.Tanh(), nn.Linear(features, 2))


@pytest.mark.parametrize("features", [2, 5])
def test_both_rows_show_the_points_on_the_probability_of_class_1(features, drawn, tmp_path):
    net = model(features)
    plot_points([("one", net, DATA), ("two", model(3), DATA)], tmp_path / "p.png", "Title")
    assert min(size_of(tmp_path / "p.png")) > 400
    axes = drawn[0].axes
    assert len(axes) == 4 and axes[0].get_title() == "one" and axes[1].get_title() == "two"
    assert all(axis.get_aspect() == 1 for axis in axes)
    with torch.no_grad():
        hidden = net[:-1](DATA.train_x)
        probability = net(DATA.train_x).softmax(1)[:, 1].double()
    top, bottom = axes[0], axes[2]
    assert torch.allclose(points_of(top)[0], DATA.train_x.double())
    if features == 2:
        assert torch.allclose(points_of(bottom)[0], hidden.double())
    for axis in (top, bottom):
        places, colors = points_of(axis)
        assert len({tuple(c) for c in colors[::2]}) == len({tuple(c) for c in colors[1::2]}) == 1
        assert tuple(colors[0]) != tuple(colors[1])
        values, box = background_of(axis)
        assert box[1] - box[0] == pytest.approx(box[3] - box[2])
        assert torch.allclose(at(values, box, places).double(), probability, atol=0.02)


def test_many_features_are_projected_orthogonally_on_normal_and_main_direction(drawn, tmp_path):
    net = model(6, seed=1)
    plot_points([("", net, DATA)], tmp_path / "p.png")
    flat, _ = points_of(drawn[0].axes[1])
    with torch.no_grad():
        hidden = net[:-1](DATA.train_x).double()
        w = (net[-1].weight[1] - net[-1].weight[0]).double()
    normal = w / w.norm()
    assert torch.allclose(flat[:, 0], hidden @ normal, atol=1e-5)
    centred = hidden - hidden.mean(0)
    rest = centred - torch.outer(centred @ normal, normal)
    values, vectors = torch.linalg.eigh(rest.mT @ rest)
    principal = vectors[:, -1]
    assert abs(float(principal @ normal)) < 1e-6
    up = rest @ principal
    assert torch.allclose(flat[:, 1].abs(), up.abs(), atol=1e-5)
    assert float(flat[:, 1].square().sum()) == pytest.approx(float(values[-1]), rel=1e-4)


def test_a_transition_shows_the_first_layer_to_the_last(drawn, tmp_path):
    plot_transition(Shift(), DATA, tmp_path / "t.png", steps=3, title="Shift")
    assert min(size_of(tmp_path / "t.png")) > 150
    axes = drawn[0].axes
    assert [axis.get_title() for axis in axes] == ["input", "layer 2", "layer 4"]
    for axis, layer in zip(axes, (0, 2, 4), strict=True):
        expected = DATA.train_x.double() + layer * torch.tensor([1.0, 0.0])
        assert torch.allclose(points_of(axis)[0], expected, atol=1e-6)
        assert axis.get_aspect() == 1
        assert axis.get_xlim()[0] < expected[:, 0].min() < expected[:, 0].max() < axis.get_xlim()[1]


def test_a_short_net_shows_all_its_layers_once(drawn, tmp_path):
    plot_transition(Shift(layers=2), DATA, tmp_path / "t.png", steps=6)
    assert [axis.get_title() for axis in drawn[0].axes] == ["input", "layer 1", "layer 2"]


def test_accuracy_by_size_draws_mean_and_range(drawn, tmp_path):
    curves = {"frozen": {100: [0.8, 0.9], 7: [0.2, 0.4], 8: [0.3, 0.3]}, "trained": {657: [0.95]}}
    plot_accuracy_by_size(curves, tmp_path / "a.png", "Digits")
    assert min(size_of(tmp_path / "a.png")) > 400
    (axis,) = drawn[0].axes
    frozen, trained = axis.lines
    assert list(frozen.get_xdata()) == [7, 8, 100]
    assert list(frozen.get_ydata()) == pytest.approx([0.3, 0.3, 0.85])
    assert list(trained.get_ydata()) == [0.95] and axis.get_xscale() == "log"
    band = axis.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 0.2 and band[:, 1].max() == 0.9
    labels = [text.get_text() for text in axis.get_xticklabels()]
    assert labels == ["7", "100", "657"]  # 8 would overlap 7
    assert [t.get_text() for t in axis.get_legend().get_texts()] == ["frozen", "trained"]


class Features(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize("net, found", [
    (nn.Linear(2, 2), "Linear"),
    (nn.Sequential(), "Sequential"),
    (nn.Sequential(nn.Linear(2, 2), nn.Tanh()), "Tanh"),
    (nn.Sequential(Features(), nn.Linear(2, 3)), "out_features=3"),
    (nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 2)), "in_features=1"),
])  # fmt: skip
def test_a_model_without_a_linear_readout_of_two_classes_is_refused(net, found, tmp_path):
    with pytest.raises(ValueError, match=f"model of panel 'mine'.*{found}"):
        plot_points([("mine", net, DATA)], tmp_path / "p.png")


def test_a_readout_that_is_the_same_for_both_classes_is_refused(tmp_path):
    net = model(4)
    nn.init.zeros_(net[-1].weight)
    with pytest.raises(ValueError, match="'mine' has a readout that is the same"):
        plot_points([("mine", net, DATA)], tmp_path / "p.png")


def test_data_that_are_no_points_of_two_classes_are_refused(tmp_path):
    for data, message in (
        (load_data("digits").first(9), r"shape \(9, 1, 8, 8\)"),
        (load_data("sine2d"), "float64"),
        (replace(DATA, outputs=3), "2 classes, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            plot_points([("mine", model(2), data)], tmp_path / "p.png")
        with pytest.raises(ValueError, match=message):
            plot_transition(Shift(), data, tmp_path / "t.png")


def test_pictures_of_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="panels must have"):
        plot_points([], tmp_path / "p.png")
    with pytest.raises(ValueError, match="steps must be at least 2, got 1"):
        plot_transition(Shift(), DATA, tmp_path / "t.png", steps=1)
    with pytest.raises(ValueError, match=r"must return \(layers \+ 1, 40, 2\), got \(5, 40, 1\)"):
        plot_transition(Shift(width=1), DATA, tmp_path / "t.png")
    for curves in ({}, {"a": {}}, {"a": {7: []}}):
        with pytest.raises(ValueError, match="curves must have"):
            plot_accuracy_by_size(curves, tmp_path / "a.png")
