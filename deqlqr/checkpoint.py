"""Checkpoints: written atomically, read without unpickling anything but tensors and plain data."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

_FORMAT = "deqlqr-checkpoint"
_VERSION = 1


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write a checkpoint so that a crash leaves the old file or the new one, never a part.

    Args:
        path: Target file.
        content: Tensors, numbers, strings, and lists and dicts of these.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"format": _FORMAT, "version": _VERSION, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_checkpoint(path: str | Path, *, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint with `torch.load(weights_only=True)`.

    Returns:
        The content given to `save_checkpoint`, with the format's own keys.

    Raises:
        ValueError: If the file is missing, corrupt, or not a checkpoint of this library.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {str(path)!r} does not exist.")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many types for a damaged or unsafe file
        raise ValueError(
            f"checkpoint {str(path)!r} is corrupt, or holds more than tensors and plain data: "
            f"{type(error).__name__}."
        ) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"checkpoint {str(path)!r} was not written by deqlqr.")
    if content.get("version") != _VERSION:
        raise ValueError(
            f"checkpoint {str(path)!r} has version {content.get('version')}, this deqlqr reads "
            f"{_VERSION}."
        )
    return content
