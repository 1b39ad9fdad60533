"""Tests for `deqlqr/reproduce_ddp.py`, `ddp_runs.py` and `reproduce_ddp_spectrum.py`."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel

from deqlqr.data import load_data
from deqlqr.ddp import DDP
from deqlqr.ddp_runs import (
    Run,
    best_options,
    dense_network,
    failures,
    judged,
    last,
    paired_difference,
    pairs,
    train,
    trained,
)
from deqlqr.reproduce_ddp import (
    reproduce_ddp_fig5,
    reproduce_ddp_table3,
    reproduce_ddp_table4,
    variance_change,
)
from deqlqr.reproduce_ddp_spectrum import nontrivial, reproduce_ddp_fig3, spectra, widest_gap

IRIS = Run("iris", "sgd", True, 0.4, 0.0, seed=0, steps=6)


@pytest.fixture
def small(monkeypatch):
    """Iris only, two bases, three seeds, small grids."""
    grids = {"sgd": (0.4, 1e30), "rmsprop": (0.003,), "ekfac": (0.03,)}
    monkeypatch.setattr("deqlqr.ddp_runs.LRS", grids)
    monkeypatch.setattr("deqlqr.reproduce_ddp.LRS", grids)
    monkeypatch.setattr("deqlqr.reproduce_ddp.BASES", ("sgd", "rmsprop"))
    for name in ("SETS", "PERTURBED_SETS"):
        monkeypatch.setattr(f"deqlqr.reproduce_ddp.{name}", ("iris",))
    monkeypatch.setattr("deqlqr.reproduce_ddp.SEEDS", {"iris": 3})
    monkeypatch.setattr("deqlqr.reproduce_ddp.PERTURBED_SEEDS", 3)


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


def test_finished_runs_are_not_repeated(tmp_path, monkeypatch):
    rows = trained([IRIS], tmp_path, "")
    monkeypatch.setattr("deqlqr.ddp_runs.train", lambda run: pytest.fail("ran again"))
    assert trained([IRIS], tmp_path, "") == rows
    assert rows[0]["seed"] == 0 and rows[0]["steps"] == 6
    with pytest.raises(pytest.fail.Exception, match="ran again"):
        trained([Run("iris", "sgd", True, 0.4, 0.0, seed=0, steps=7)], tmp_path, "")


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


def test_the_base_chooses_its_learning_rate(tmp_path, monkeypatch):
    monkeypatch.setattr("deqlqr.ddp_runs.LRS", {"sgd": (1e-5, 0.4, 1e30), "ekfac": (0.03, 1e-6)})
    assert best_options("iris", "sgd", 6, tmp_path) == (0.4, 0.0)
    assert best_options("iris", "ekfac", 6, tmp_path)[0] == 0.03
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


def test_table_3_compares_pairs_and_counts_failures(small, tmp_path):
    line = reproduce_ddp_table3(None, tmp_path, 3)
    assert "iris" in line and "paper 94.8%" in line and "Of 6 runs" in line
    content = json.loads((tmp_path / "ddp-table3.json").read_text())
    first = content["rows"][0]
    assert content["line"] == line and first["lr"] == 0.4 and first["paper"][1] == [0.0505, 93.79]
    ends = last(pairs("iris", "sgd", 0.4, 0.0, 3, 3, tmp_path / "runs"), "loss")
    change = [f - p for p, f in zip(*ends.values(), strict=True)]
    assert first["loss"]["difference"] == pytest.approx(np.mean(change))
    assert first["loss"]["pairs"] == 3 and first["grid"]["runs"] == 4
    assert (tmp_path / "ddp-table3.png").stat().st_size > 10_000


def test_table_4_and_figure_5_share_the_runs_of_table_3(small, tmp_path, monkeypatch):
    reproduce_ddp_fig5(None, tmp_path, 3)
    monkeypatch.setattr("deqlqr.ddp_runs.train", lambda run: pytest.fail("ran again"))
    assert "the variance with feedback" in reproduce_ddp_table4(None, tmp_path, 3)
    line = reproduce_ddp_fig5(None, tmp_path, 3)
    rows = json.loads((tmp_path / "ddp-fig5.json").read_text())["rows"]
    assert [r["lr"] for r in rows[:3]] == [0.4, 0.8, 1.6] and "4 times the best" in line
    for name in ("ddp-fig5", "ddp-table4"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


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
