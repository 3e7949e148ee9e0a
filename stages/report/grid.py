"""The heat map's cells: layers, or tensors, by stages; what a row says of one side in one number and one word."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.culprit_data import ratio_of
from stages.diff import place_of
from stages.verdict import Verdict
from stages.wording import number

Row = Mapping[str, Any]
BOTH = "both"
# What a cell shows where there is no ratio to show.
MARKS = {
    Verdict.NONFINITE: "NaN",
    Verdict.SHAPE: "shape",
    Verdict.MISSING: "none",
    Verdict.EXTRA: "extra",
    Verdict.UNJUDGED: "?",
    Verdict.EXACT: "=",
}


@dataclass(frozen=True)
class Cell:
    """One stage of one layer or tensor, of one side."""

    verdict: Verdict
    ratio: float | None
    text: str  # all there is to say, for a person who points at it
    culprit: bool

    @property
    def log(self) -> float | None:
        """log10(error / bound); None where nothing was measured, or the result is exact."""
        return math.log10(self.ratio) if self.ratio and math.isfinite(self.ratio) else None

    @property
    def mark(self) -> str:
        """The cell in a word: a mark of its verdict, or the ratio."""
        return number(self.ratio) if self.log is not None else MARKS.get(self.verdict, self.verdict.value)


@dataclass(frozen=True)
class Grid:
    """Cells by side, then place, then stage; a stage that a place does not have is absent."""

    places: tuple[str, ...]
    stages: tuple[str, ...]
    cells: Mapping[str, Mapping[tuple[str, str], Cell]]

    @property
    def culprit(self) -> bool:
        """Whether there is one."""
        return any(cell.culprit for cells in self.cells.values() for cell in cells.values())

    @property
    def sides(self) -> tuple[str, ...]:
        return tuple(self.cells)


def grid(rows: Sequence[Row], culprit: Row | None) -> Grid:
    """The heat map of a document's rows, which are in execution order."""
    places = dict.fromkeys(place_of(row) for row in rows)
    stages = dict.fromkeys(str(row["stage"]) for row in rows)
    compared = any("ratio_a" in row for row in rows)
    return Grid(
        tuple(places),
        tuple(stages),
        {
            side: {(place_of(row), str(row["stage"])): _cell(row, side, culprit) for row in rows}
            for side in ((BOTH, "a", "b") if compared else ("",))
        },
    )


def is_culprit(row: Row, culprit: Row | None) -> bool:
    """Whether a row is the one that a document names."""
    return culprit is not None and all(row[name] == culprit[name] for name in ("layer", "tensor", "stage"))


def _cell(row: Row, side: str, culprit: Row | None) -> Cell:
    whole = Verdict(row["verdict"])
    verdict, ratio = whole, ratio_of(row)
    if side in ("a", "b"):
        verdict, ratio = _of_side(row, side, whole), row.get(f"ratio_{side}")
    error = f", error / bound {number(ratio)}" if ratio is not None else ""
    who = f"{side}: " if side in ("a", "b") else ""
    text = f"{row['stage']}, {place_of(row)}\n{who}{verdict.value}{error}"
    if row.get("max_abs") is not None:
        text += f"\nmax difference {number(row['max_abs'])}, relative {number(row.get('rel_l2'))}"
    if row.get("note"):
        text += f"\n{row['note']}"
    return Cell(verdict, ratio, text, is_culprit(row, culprit))


def _of_side(row: Row, side: str, whole: Verdict) -> Verdict:
    """A side's own verdict; what concerns the pair (a shape, a missing stage) is said of both."""
    own, other = (row.get(f"verdict_{letter}") for letter in (side, "b" if side == "a" else "a"))
    if own is None:
        return whole if other is None else Verdict.UNJUDGED
    return whole if whole in (Verdict.SHAPE, Verdict.MISSING, Verdict.EXTRA) else Verdict(own)
