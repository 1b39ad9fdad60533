"""The metrics file: one JSON object a line, flushed at once, cut back to the step of a resume."""

import json
from math import isfinite
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends JSON lines to a file.

    Args:
        path: The file; created if missing.
        keep_steps: Lines of later steps are dropped first: a resumed run writes them again.
    """

    def __init__(self, path: Path, keep_steps: int) -> None:
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= keep_steps]
        if keep_steps == 0:
            kept = []
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(path)

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; JSON has no inf and NaN, they become null."""
        plain = {
            key: None if isinstance(value, float) and not isfinite(value) else value
            for key, value in line.items()
        }
        with self.path.open("a") as file:
            file.write(json.dumps(plain, allow_nan=False) + "\n")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file; a last line cut off by a crash is left out."""
    path = Path(path)
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
