"""Checkpoints: round trip, atomic writing, and refusal of everything else."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from deqlqr.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"weights": torch.arange(5.0), "step": 3})
    return path


def refused(path: Path, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)


def test_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    content = {
        "weights": torch.randn(3, 4, dtype=torch.float64),
        "labels": torch.tensor([1, 2, 3]),
        "nested": {"list": [1, 2.5, "text", None], "flag": True},
    }
    save_checkpoint(tmp_path / "new" / "folder" / "a.pt", content)
    found = load_checkpoint(tmp_path / "new" / "folder" / "a.pt")
    for name in ("weights", "labels"):
        assert found[name].dtype == content[name].dtype
        assert torch.equal(found[name], content[name])
    assert found["nested"] == content["nested"]


def test_saving_again_replaces_the_file_and_leaves_no_other(file: Path) -> None:
    save_checkpoint(file, {"step": 4})
    assert load_checkpoint(file)["step"] == 4
    assert "weights" not in load_checkpoint(file)
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_crash_in_the_middle_leaves_the_old_file(
    file: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before = file.read_bytes()

    def crash(content: object, target: object) -> None:
        target.write(b"half a checkpoint")  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(type(error)):
        save_checkpoint(file, {"step": 9})
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "absent.pt", "does not exist")
    refused(tmp_path, "does not exist")


@pytest.mark.parametrize("junk", [b"", b"not a checkpoint", bytes(range(256)) * 9])
def test_a_corrupt_file_is_refused(file: Path, junk: bytes) -> None:
    file.write_bytes(junk)
    refused(file, "corrupt")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_refused(file: Path, part: float) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: int(part * len(whole))])
    refused(file, "corrupt")


@pytest.mark.parametrize("foreign", [{"weights": torch.ones(2)}, torch.ones(2), [1, 2]])
def test_a_foreign_torch_file_is_refused(tmp_path: Path, foreign: object) -> None:
    torch.save(foreign, tmp_path / "foreign.pt")
    refused(tmp_path / "foreign.pt", "not written by deqlqr")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused(file: Path, version: object) -> None:
    torch.save(torch.load(file, weights_only=True) | {"version": version}, file)
    refused(file, "version")


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.target,)


def test_a_malicious_file_is_refused_and_nothing_of_it_runs(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    content = {"format": "deqlqr-checkpoint", "version": 1, "step": Malicious(trap)}
    torch.save(content, tmp_path / "zip.pt")
    torch.save(content, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(content, protocol=2))
    for name in ("zip.pt", "legacy.pt", "plain.pt"):
        refused(tmp_path / name, "corrupt, or holds more than")
        assert not trap.exists()
    torch.load(tmp_path / "zip.pt", weights_only=False)
    assert trap.exists()  # the trap itself works
