"""How much of what was recorded the recipes give to the last bit, and which fewer bits were accepted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

from stages.errors import UsageError, shown
from stages.judge.rows import Row
from stages.oracle.verdict import Verdict

# What `--accept` takes.
USUAL = "usual"
_ENDS = ("", "_a", "_b")  # an audit's row has one side, a diff's two


@dataclass(frozen=True)
class Explained:
    """Elements judged, of all sides; how many of them a recipe gives to the last bit, and how many recipes that took.

    A recipe counts once for each stage that it explains, whichever layers have it.
    """

    elements: int
    bits: int
    recipes: int

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Explained:
        sides = [(row, end) for row in rows for end in _ENDS if row.get(f"elements{end}")]
        recipes = {(row["stage"], row[f"recipe{end}"]) for row, end in sides if row[f"recipe{end}"]}
        elements, bits = (sum(row[f"{name}{end}"] for row, end in sides) for name in ("elements", "bits"))
        return cls(elements, bits, len(recipes))

    def document(self) -> dict[str, int]:
        return {"elements": self.elements, "bits": self.bits, "recipes": self.recipes}

    @property
    def words(self) -> str | None:
        """As a sentence; None where nothing was judged. Never "100%" of fewer than all."""
        if not self.elements or not self.recipes:
            return None
        part = "all" if self.bits == self.elements else f"{floor(1e5 * self.bits / self.elements) / 1e3:g}%"
        return f"{self.elements:,} elements, {part} to the last bit by {self.recipes} recipe{'s' * (self.recipes > 1)}."


def accept(rows: Sequence[Row], accepted: str | None) -> list[Row]:
    """The rows, `precision` that a library is known for as `accepted` where that is asked for."""
    if accepted not in (None, USUAL):
        raise UsageError(f"accept {shown(accepted)}: there is {USUAL} alone")
    return [_accepted(row) for row in rows] if accepted else list(rows)


def _accepted(row: Row) -> Row:
    found = {
        f"verdict{end}": Verdict.ACCEPTED.value
        for end in _ENDS
        if row.get(f"verdict{end}") == Verdict.PRECISION and row.get(f"usual{end}")
    }
    sides = [{**row, **found}.get(f"verdict{end}") for end in _ENDS[1:]]
    lost = Verdict.PRECISION.value in sides or Verdict.ACCEPTED.value not in sides
    if row["verdict"] == Verdict.PRECISION and "verdict" not in found and not lost:
        found["verdict"] = Verdict.ACCEPTED.value
    return {**row, **found}


def tie_words(rows: Iterable[Row]) -> str | None:
    """A sentence on choices that rounding decided; None where there were none."""
    tied = [row["key"] for row in rows if Verdict.TIE in [row.get(f"verdict{end}") for end in _ENDS]]
    if not tied:
        return None
    layers = f"{len(tied)} layers" if len(tied) > 1 else f"one layer ({tied[0]})"
    return f"A tie in {layers}: rounding decided which experts some token goes to, and any that it can choose is right."


def accepted_words(rows: Iterable[Row]) -> str | None:
    """A sentence on what was accepted; None where nothing was."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        for end in _ENDS:
            if row.get(f"verdict{end}") == Verdict.ACCEPTED and row.get(f"usual{end}"):
                found.setdefault(f"{row['stage']} {row[f'usual{end}']}", []).append(row["key"])
    if not found:
        return None
    said = "; ".join(f"{what} ({len(keys)})" for what, keys in found.items())
    return f"Fewer bits that --accept {USUAL} lets pass: {said}."
