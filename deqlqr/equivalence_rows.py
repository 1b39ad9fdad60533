"""Rows of an equivalence check: two routes to one vector, compared, and the table of them."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from torch import Tensor

from deqlqr.solution import ConvergenceError

Vector = Tensor | Callable[[], Tensor]  # a vector, or what computes it and may fail


@dataclass(frozen=True)
class EquivalenceRow:
    """Two routes to one vector, and how far apart they are.

    Attributes:
        quantity: What is computed.
        left: First route.
        right: Second route.
        error: `||left - right|| / ||right||`; NaN where the row was skipped.
        tolerance: Largest error that counts as equal.
        passed: Whether the row holds; `None` where it was skipped.
        note: What else was measured, or why the row was skipped.
    """

    quantity: str
    left: str
    right: str
    error: float
    tolerance: float
    passed: bool | None
    note: str = ""


@dataclass(frozen=True)
class EquivalenceReport:
    """The rows of one check; `print` shows them as a table.

    Attributes:
        rows: The comparisons.
        facts: Sizes and constants of the checked problem.
    """

    rows: tuple[EquivalenceRow, ...]
    facts: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether every row that ran holds."""
        return all(row.passed is not False for row in self.rows)

    @property
    def complete(self) -> bool:
        """Whether every row ran."""
        return all(row.passed is not None for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "passed": self.passed,
            "complete": self.complete,
            "facts": self.facts,
            "rows": [
                asdict(row) | {"error": row.error if isfinite(row.error) else None}
                for row in self.rows
            ],
        }

    def __str__(self) -> str:
        """Return the table."""
        cells = [("quantity", "route", "compared with", "error", "limit", "")]
        words = {True: "holds", False: "FAILS", None: "skipped"}
        for r in self.rows:
            error = "-" if r.passed is None else f"{r.error:.1e}"
            cells.append((
                r.quantity,
                r.left,
                r.right,
                error,
                f"{r.tolerance:.0e}",
                words[r.passed],
            ))
        widths = [max(len(row[i]) for row in cells) for i in range(6)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        notes = [f"  {r.quantity}, {r.left}: {r.note}" for r in self.rows if r.note]
        facts = ", ".join(f"{k} = {v}" for k, v in self.facts.items())
        verdict = "every row holds" if self.passed else "NOT every row holds"
        if not self.complete:
            verdict += ", some were skipped"
        return "\n".join([*lines, *notes, f"{facts}: {verdict}"])


class Skipped(Exception):
    """A row cannot run, and why."""


def raising(error: Exception) -> Tensor:
    """Raise, where an expression is wanted."""
    raise error


def compared(
    quantity: str,
    left: str,
    right: str,
    a: Vector,
    b: Vector,
    tolerance: float,
    note: str = "",
) -> EquivalenceRow:
    """Return the row of two vectors.

    Args:
        quantity: What is computed.
        left: First route.
        right: Second route.
        a: Its vector.
        b: That of the second.
        tolerance: Largest relative error that counts as equal.
        note: What else was measured.
    """
    try:
        error = relative_gap(a() if callable(a) else a, b() if callable(b) else b)
    except Skipped as skip:
        return EquivalenceRow(quantity, left, right, float("nan"), tolerance, None, str(skip))
    except ConvergenceError as failure:
        return EquivalenceRow(
            quantity, left, right, float("nan"), tolerance, False, f"failed: {failure}"
        )
    return EquivalenceRow(quantity, left, right, error, tolerance, error <= tolerance, note)


def relative_gap(a: Tensor, b: Tensor) -> float:
    """Return ||a - b|| / ||b||."""
    scale = float(b.norm())
    return float((a - b).norm()) / (scale if scale > 0 else 1.0)
