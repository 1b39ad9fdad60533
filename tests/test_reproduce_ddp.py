"""Tests for `deqlqr/reproduce_ddp.py`, `ddp_runs.py` and `reproduce_ddp_spectrum.py`."""

import json
from dataclasses import asdict
from math import log10

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel
from torch import nn

from deqlqr import GradientStep, ImplicitNGD
from deqlqr.data import Data, load_data
from deqlqr.ddp import DDP
from deqlqr.ddp_runs import (
    LADDER,
    Choice,
    Run,
    Study,
    _loaded,
    dense_network,
    failures,
    judged,
    last,
    paired_difference,
    train,
)
from deqlqr.reproduce_ddp import (
    reproduce_ddp_fig5,
    reproduce_ddp_table3,
    reproduce_ddp_table4,
    variance_change,
)
from deqlqr.reproduce_ddp_spectrum import nontrivial, reproduce_ddp_fig3, spectra, widest_gap
from deqlqr.routes import Kronecker

IRIS = Run("iris", "sgd", True, 0.4, 0.0, seed=0, steps=6)


@pytest.fixture
def small(monkeypatch):
    """Iris only, two bases and KFAC, three seeds, small grids that do not grow."""
    grids = {"sgd": (0.4,), "rmsprop": (0.003, 0.03), "kfac": (0.03,), "full": (0.3,)}
    monkeypatch.setattr("deqlqr.ddp_runs.LRS", grids)
    monkeypatch.setattr("deqlqr.ddp_runs.DAMPINGS", {"kfac": (0.3,), "full": (1.0,)})
    monkeypatch.setattr("deqlqr.ddp_runs.LADDER", ())
    monkeypatch.setattr("deqlqr.reproduce_ddp.BASES", ("sgd", "rmsprop"))
    monkeypatch.setattr("deqlqr.reproduce_ddp.SETS", ("iris", "mnist"))
    monkeypatch.setattr("deqlqr.reproduce_ddp.PERTURBED_SETS", ("iris",))
    monkeypatch.setattr("deqlqr.reproduce_ddp.SEEDS", {"iris": 3, "mnist": 2})
    monkeypatch.setattr("deqlqr.reproduce_ddp.PERTURBED_SEEDS", 3)


@pytest.fixture
def images(monkeypatch):
    """Random images in place of MNIST."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, 1, 28, 28, generator=draw)
    y = torch.arange(40) % 10
    asked = []

    def load(name, root):
        asked.append(root)
        return Data(x, y, x[:10], y[:10]) if name == "mnist" else load_data(name)

    monkeypatch.setattr("deqlqr.ddp_runs.load_data", load)
    _loaded.cache_clear()
    yield asked
    _loaded.cache_clear()


def row(loss, accuracy=(0.5, 0.5), failure=None):
    counts = {"rejected": 1, "given up": 0}
    return {"loss": list(loss), "accuracy": list(accuracy), "failure": failure, **counts}


def test_the_network_depends_on_its_seed_only():
    state = torch.get_rng_state()
    model, again = (dense_network(4, 7, 5, 3, 1, squashed=True) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    both = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in both)
    assert [p.shape[0] for p in model.parameters() if p.dim() == 2] == [7, 7, 7, 7, 3]
    assert 0 < float(model(torch.randn(5, 4)).detach().min()) < 1
    other = dense_network(4, 7, 5, 3, 2)
    assert not torch.equal(next(other.parameters()), next(model.parameters()))


@pytest.mark.parametrize("base", ["sgd", "rmsprop", "ekfac"])
def test_a_pair_begins_alike_and_only_feedback_parts_it(base):
    options = {"lr": 0.003, "damping": 0.3, "seed": 3, "steps": 4}
    plain, feedback = (train(Run("iris", base, on, **options)) for on in (False, True))
    assert plain["loss"][0] == feedback["loss"][0] and plain["loss"][1:] != feedback["loss"][1:]
    assert feedback["at"] == [0, 1, 2, 3, 4] and feedback["failure"] is None
    assert feedback["loss"][-1] == pytest.approx(plain["loss"][-1], rel=0.1)


def test_the_bases_of_a_pair_are_the_optimizers_they_are_named_for():
    data, options = load_data("iris"), {"lr": 0.1, "damping": 0.3}
    no_limit = {**options, "max_increase": 1e300}
    makes = {
        "sgd": lambda m: GradientStep(m, torch.optim.SGD(m.parameters(), 0.1), "cross_entropy"),
        "rmsprop": lambda m: GradientStep(
            m, torch.optim.RMSprop(m.parameters(), 0.1), "cross_entropy"
        ),
        "kfac": lambda m: ImplicitNGD(m, route=Kronecker(), **no_limit),
        "ekfac": lambda m: ImplicitNGD(m, route=Kronecker(corrected=True), **no_limit),
    }
    ends = {}
    for base, make in makes.items():
        model, generator = dense_network(4, 10, 5, 3, seed=2), torch.Generator().manual_seed(2)
        optimizer = make(model)
        for _ in range(12):  # from step 10 on "corrected" matters
            chosen = torch.randint(len(data.train_x), (32,), generator=generator)
            optimizer.step(data.train_x[chosen], data.train_y[chosen])
        with torch.no_grad():
            loss = nn.functional.cross_entropy(model(data.train_x), data.train_y)
        ends[base] = train(Run("iris", base, False, **options, seed=2, steps=12))["loss"][-1]
        assert ends[base] == pytest.approx(float(loss), rel=1e-6)
    assert len(set(ends.values())) == 4


def test_mnist_is_half_of_it_and_its_network_has_relu(images):
    row = train(Run("mnist", "sgd", True, 0.1, 0.0, seed=0, steps=2), "somewhere")
    assert images == ["somewhere"] and len(_loaded("mnist", "somewhere").train_x) == 20
    model = dense_network(784, 32, 5, 10, 0, activation=nn.ReLU)
    assert sum(isinstance(m, nn.ReLU) for m in model) == 4
    data = _loaded("mnist", "somewhere")
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(model(data.train_x), data.train_y))
    assert row["loss"][0] == pytest.approx(loss, rel=1e-6) and row["loss"][2] != row["loss"][0]


def test_finished_runs_are_not_repeated(tmp_path, monkeypatch):
    study = Study(tmp_path, 6)
    rows = study.trained([IRIS], "")
    monkeypatch.setattr("deqlqr.ddp_runs.train", lambda *_: pytest.fail("ran again"))
    assert study.trained([IRIS], "") == rows
    assert rows[0]["seed"] == 0 and rows[0]["steps"] == 6
    with pytest.raises(pytest.fail.Exception, match="ran again"):
        study.trained([Run("iris", "sgd", True, 0.4, 0.0, seed=0, steps=7)], "")


def test_an_error_of_the_optimizer_is_a_failure_and_no_other_is(monkeypatch):
    def failing(error):
        def step(self, x, y):
            raise error

        return step

    monkeypatch.setattr(DDP, "step", failing(torch.linalg.LinAlgError("singular")))
    failed = train(IRIS)
    assert failed["failure"].endswith("LinAlgError: singular") and failed["at"] == [0]
    assert judged(failed) == float("inf") and failures([failed])["errors"] == 1
    monkeypatch.setattr(DDP, "step", failing(RuntimeError("a mistake")))
    with pytest.raises(RuntimeError, match="a mistake"):
        train(IRIS)


def test_runs_are_judged_by_their_last_losses_and_counted():
    good, risen, lost = row([3.0, 2.0, 1.0, 0.0]), row([1.0, 2.0, 3.0]), row([1.0, None])
    assert judged(good) == 1.0 and judged(lost) == float("inf")
    assert failures([good, risen, lost]) == {
        "runs": 3, "errors": 0, "not finite": 1, "above the start": 2, "steps rejected": 3,
        "steps given up": 0,
    }  # fmt: skip
    pair = {"plain": [good, risen, lost], "feedback": [risen, row([1.0], failure="it"), good]}
    assert last(pair, "loss") == {"plain": [0.0], "feedback": [3.0]}


def bowl(lr, damping):
    """Stand in for `train`: a final loss with its minimum at an lr and a damping."""

    def train(run, data_root):
        away = (log10(run.lr / lr)) ** 2 + (log10(run.damping / damping) if run.damping else 0) ** 2
        assert not run.feedback and run.seed == 100
        return {**asdict(run), "loss": [away], "failure": None}

    return train


@pytest.mark.parametrize(
    ("base", "lr", "damping"),
    [("sgd", 30.0, 0.0), ("sgd", 0.3, 0.0), ("rmsprop", 1e-4, 0.0), ("ekfac", 0.003, 3.0)],
)
def test_a_grid_grows_until_its_best_lies_within(tmp_path, monkeypatch, base, lr, damping):
    monkeypatch.setattr("deqlqr.ddp_runs.train", bowl(lr, damping))
    found = Study(tmp_path, 6).best("iris", base)
    assert (found.lr, found.damping) == (lr, damping) and not found.at_the_edge
    assert found.lrs[0] < lr < found.lrs[-1] and len(found.lrs) < 8
    assert set(found.lrs) <= set(LADDER) and list(found.lrs) == sorted(set(found.lrs))
    assert len(list(tmp_path.iterdir())) == len(found.lrs) * len(found.dampings)


def test_failures_are_looked_for_beyond_the_best_options(tmp_path, monkeypatch):
    monkeypatch.setattr("deqlqr.ddp_runs.train", lambda run, root: asdict(run))
    study = Study(tmp_path, 6)
    rows = study.feedback_grid("iris", "sgd", (0.1, 0.3, 1.0), (0.0,))
    assert {row["lr"] for row in rows} == {0.1, 0.3, 1.0, 3.0, 10.0}
    assert {row["damping"] for row in rows} == {0.0, 1.0} and len(rows) == 10
    rows = study.feedback_grid("iris", "ekfac", (0.1,), (0.3, 3.0))
    assert all(row["feedback"] for row in rows)
    assert [(row["lr"], row["damping"]) for row in rows[-2:]] == [(1.0, 0.3), (1.0, 3.0)]


def test_a_best_at_the_end_of_the_ladder_is_said_to_be_at_the_edge(tmp_path, monkeypatch):
    monkeypatch.setattr("deqlqr.ddp_runs.train", bowl(1e9, 0.0))
    found = Study(tmp_path, 6).best("iris", "sgd")
    assert found.at_the_edge and found.lr == LADDER[-1]
    assert Choice(0.1, 0.3, (0.03, 0.1, 0.3), (0.1, 0.3)).at_the_edge
    assert not Choice(0.1, 0.0, (0.03, 0.1, 0.3), (0.0,)).at_the_edge


def test_a_base_chooses_by_itself_among_real_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("deqlqr.ddp_runs.LRS", {"sgd": (1e-5, 0.4, 1e30)})
    assert Study(tmp_path, 6).best("iris", "sgd") == Choice(0.4, 0.0, (1e-5, 0.4, 1e30), (0.0,))
    assert all("plain" in path.name for path in tmp_path.iterdir())


def test_the_interval_is_that_of_a_paired_t_test():
    values = torch.randn(2, 10, generator=torch.Generator().manual_seed(0)).tolist()
    found = ttest_rel(values[1], values[0]).confidence_interval(0.95)
    middle, half = paired_difference(*values)
    assert (middle - half, middle + half) == pytest.approx((found.low, found.high))
    for plain, feedback in (([1.0], [2.0]), ([1.0, 2.0], [1.0])):
        with pytest.raises(ValueError, match="pairs, at least two"):
            paired_difference(plain, feedback)


def test_the_variance_is_over_seeds_and_the_mean_over_looks():
    values = np.random.default_rng(0).normal(size=(2, 6, 5))
    values[1] *= 2
    pair = {
        way: [row(v, v) for v in own.tolist()]
        for way, own in zip(("plain", "feedback"), values, strict=True)
    }
    found = variance_change(pair, "loss")
    plain, feedback = values[:, :, 1:].var(1, ddof=1).mean(-1)
    assert found["change"] == pytest.approx(feedback / plain - 1)
    assert found["low"] < found["change"] < found["high"] and found["pairs"] == 6
    same = variance_change({"plain": pair["plain"], "feedback": pair["plain"]}, "loss")
    assert same == pytest.approx({"change": 0, "low": 0, "high": 0, "pairs": 6})
    assert variance_change({way: own[:2] for way, own in pair.items()}, "loss") is None
    alike = {way: [row([1.0, 1.0])] * 3 for way in pair}
    assert variance_change(alike, "loss") is None


def table(path):
    """Return the cells of a Markdown table."""
    head, rule, *lines = path.read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines)]
    assert all(len(row) == len(cells[0]) for row in cells) and "---" in rule
    return cells


def test_table_3_compares_pairs_and_counts_failures(small, tmp_path):
    line = reproduce_ddp_table3(None, tmp_path, 3)
    assert "paper 94.8%" in line and "Of 6 runs" in line
    assert "edge of what was compared: iris" in line and "MNIST is left out" in line
    content = json.loads((tmp_path / "ddp-table3.json").read_text())
    first, _, kfac = content["rows"]
    assert content["line"] == line and first["lr"] == 0.4 and first["paper"][1] == [0.0505, 93.79]
    pair = Study(tmp_path / "runs", 3).pairs("iris", "sgd", 0.4, 0.0, 3)
    ends = last(pair, "loss")
    change = [f - p for p, f in zip(*ends.values(), strict=True)]
    assert first["loss"]["difference"] == pytest.approx(np.mean(change))
    assert first["loss"]["pairs"] == 3 and first["grid"]["runs"] == 2
    runs = [train(Run("iris", "kfac", False, 0.03, 0.3, seed, 3)) for seed in range(3)]
    assert kfac["loss"]["plain"] == pytest.approx(np.mean([run["loss"][-1] for run in runs]))
    head, *rows = table(tmp_path / "ddp-table3.md")
    assert [row[1] for row in rows] == ["sgd", "rmsprop", "kfac"] and len(head) == 12
    assert rows[0][4] == f"{np.mean(ends['plain']):.4f}" and rows[0][11] == "0.0505 (93.8%)"
    assert rows[2][5] == rows[2][11] == "" and rows[2][10] == "0.0588 (94.3%)"


def test_with_a_data_root_mnist_has_its_rows(small, images, tmp_path):
    line = reproduce_ddp_table3("root", tmp_path, 3)
    assert "mnist" in line and "left out" not in line and "Of 6 runs" in line
    assert [row[:2] for row in table(tmp_path / "ddp-table3.md")[4:]] == [
        ["mnist", base] for base in ("sgd", "rmsprop", "kfac")
    ]
    line = reproduce_ddp_table4("root", tmp_path, 3)  # of two seeds no variance is compared
    assert "left out" not in line and table(tmp_path / "ddp-table4.md")[3][2:4] == ["", ""]


def test_at_full_scale_full_ddp_is_among_them(small, tmp_path, monkeypatch):
    monkeypatch.setattr("deqlqr.reproduce_ddp.FULL_STEPS", 3)
    reproduce_ddp_table3(None, tmp_path, 3)
    full = table(tmp_path / "ddp-table3.md")[3]
    assert full[1] == "full" and "+-" in full[6] and full[10:] == ["", "0.0552 (94.4%)"]


def test_table_4_and_figure_5_share_the_runs_of_table_3(small, tmp_path, monkeypatch):
    reproduce_ddp_fig5(None, tmp_path, 3)
    monkeypatch.setattr("deqlqr.ddp_runs.train", lambda *_: pytest.fail("ran again"))
    assert "the variance with feedback" in reproduce_ddp_table4(None, tmp_path, 3)
    line = reproduce_ddp_fig5(None, tmp_path, 3)
    rows = json.loads((tmp_path / "ddp-fig5.json").read_text())["rows"]
    assert [r["lr"] for r in rows[:3]] == [0.4, 0.8, 1.6] and "4 times the best" in line
    assert (tmp_path / "ddp-fig5.png").stat().st_size > 10_000
    first = table(tmp_path / "ddp-table4.md")[1]
    pair = Study(tmp_path / "runs", 3).pairs("iris", "sgd", 0.4, 0.0, 3)
    assert first[2].startswith(f"{variance_change(pair, 'loss')['change']:+.0%} (")
    assert first[4:] == ["-2.5%", "-4.0%"]


def test_the_spectrum_is_that_of_the_dense_policy():
    found = spectra("clusters5", 8)
    assert [shot["step"] for shot in found] == [0, 1, 4, 8]
    data = load_data("clusters5")
    policy = DDP(dense_network(30, 20, 3, 5, 0), base="full", damping=0.1).policy(
        data.train_x[:20], data.train_y[:20]
    )
    values = torch.linalg.svdvals(policy.gains[-1].dense().double())
    assert torch.tensor(found[0]["spectrum"])[:40].tolist() == pytest.approx(
        values[:40].tolist(), rel=1e-3
    )
    assert found[-1]["loss"] < found[0]["loss"]


def test_figure_3_counts_singular_values(tmp_path, monkeypatch):
    monkeypatch.setattr("deqlqr.reproduce_ddp_spectrum.CLUSTER_SETS", ("clusters5", "clusters8"))
    shot = {"step": 2, "loss": 0.1, "error": 0.0, "spectrum": [1.0, 0.5, 0.4, 0.3, 0.2, 1e-5]}
    monkeypatch.setattr("deqlqr.reproduce_ddp_spectrum.spectra", lambda name, steps: [shot])
    line = reproduce_ddp_fig3(None, tmp_path, 2)
    assert (
        "k = 5: 5 (5 / 5 / 5; widest gap after 1; training error 0.0%)" in line
        and "k in 1 of 2 cases" in line
    )
    rows = json.loads((tmp_path / "ddp-fig3.json").read_text())["rows"]
    assert [r["k"] for r in rows] == [5, 8] and rows[0]["counts"]["0.001"] == 5
    assert (tmp_path / "ddp-fig3.png").stat().st_size > 10_000
    monkeypatch.setattr("deqlqr.reproduce_ddp_spectrum.spectra", lambda *_: pytest.fail("again"))
    assert reproduce_ddp_fig3(None, tmp_path, 2) == line
    assert nontrivial([4.0, 2.0, 1.0], 0.3) == 2 and widest_gap([4.0, 2.0, 0.1, 0.06]) == 2
