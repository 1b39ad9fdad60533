"""Tests for `deqlqr/random_field_study.py`: a small study, and what is trained in it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from deqlqr.data import Data, load_data
from deqlqr.random_field_study import STUDY_MODELS, StudyOptions, study, study_model


def blobs() -> Data:
    """Three classes around three far corners of R^6."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    corners = 2 * torch.eye(6)[:3]
    x = corners[labels] + 0.3 * torch.randn(90, 6, generator=generator)
    return Data(x[:60], labels[:60], x[60:], labels[60:], outputs=3)


def test_a_small_study_is_deterministic_learns_and_leaves_the_global_generator():
    options = StudyOptions(steps=6, batch_size=30)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = study([28], [0, 1], options=options, data=blobs(), quiet=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(found) == list(STUDY_MODELS)
    again = study([28], [1], models=["deq"], options=options, data=blobs(), quiet=True)
    assert again["deq"][28] == found["deq"][28][1:]
    for name, trained in (("layers", 29), ("fields", 29), ("deq", 28)):
        assert list(found[name]) == [trained] and len(found[name][trained]) == 2
        assert min(found[name][trained]) > 0.8  # a third by chance


def test_only_the_scalars_are_trained_unless_the_readout_is():
    data = blobs()
    for name, n, own in (("layers", 6, 43), ("fields", 6, 43), ("deq", 16, 42)):
        for readout, more in (("frozen", 0), ("trained", 3 * (n + 1))):
            options = StudyOptions(readout=readout, scale=5.0)
            model = study_model(name, 42, data, options=options)
            count = sum(p.numel() for p in model.parameters() if p.requires_grad)
            assert count == own + more
            G = model[-1].weight.detach().double()
            gram = 25.0 * torch.eye(3).double() if readout == "frozen" else torch.zeros(3, 3)
            assert torch.allclose(G @ G.mT, gram.double(), atol=1e-5)
    net, wide = (study_model(name, 42, data)[0] for name in ("layers", "fields"))
    assert net.u.shape == (6, 7) and wide.u.shape == (2, 21)


def test_a_model_depends_on_its_seed_alone():
    for name in STUDY_MODELS:
        states = []
        for seed in (0, 0, 1):
            torch.manual_seed(len(states))
            states.append(nn.utils.parameters_to_vector(
                study_model(name, 14, blobs(), seed=seed).parameters()
            ))  # fmt: skip
        assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


@pytest.mark.parametrize("options, message", [
    ({"readout": "none"}, "readout"),
    ({"route": "dar"}, "route"),
    ({"steps": 0}, "steps"),
    ({"batch_size": 0}, "batch_size"),
    ({"scale": 0.0}, "scale"),
    ({"lr": 0.0}, "lr"),
    ({"damping": 0.0}, "damping"),
])  # fmt: skip
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StudyOptions(**options)


@pytest.mark.parametrize("given, message", [
    ({"sizes": [15]}, "sizes must be multiples of 14, got 15"),
    ({"sizes": [0]}, "sizes must be at least 1"),
    ({"sizes": []}, "sizes must hold at least one"),
    ({"seeds": []}, "seeds must hold at least one"),
    ({"seeds": [-1]}, "seed"),
    ({"models": []}, "models must hold at least one"),
    ({"models": ["deqs"]}, "models must be one of"),
    ({"options": StudyOptions(batch_size=61)}, "batch_size must be at most the 60"),
    ({"data": load_data("sine2d")}, "data must have labels"),
    ({"data": replace(blobs(), outputs=7)}, "at most 6 classes"),
])  # fmt: skip
def test_studies_that_cannot_run_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        study(**({"sizes": [14], "seeds": [0], "data": blobs(), "quiet": True} | given))
