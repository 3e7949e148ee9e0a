"""The heat map's cells: layers, or tensors, by stages; what a row says of one side in a shade and a few characters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.judge.culprit import ratio_of
from stages.judge.document import place_of
from stages.oracle.verdict import Verdict

Row = Mapping[str, Any]
BOTH = "both"
# What a cell shows where there is no ratio to show.
MARKS = {
    Verdict.NONFINITE: "NaN",
    Verdict.SHAPE: "shape",
    Verdict.MISSING: "none",
    Verdict.EXTRA: "extra",
    Verdict.UNJUDGED: "?",
    Verdict.GIVEN: "given",
    Verdict.TIE: "tie",
    Verdict.EXACT: "=",
}
# Largest error / bound of each shade: blue up to the bound, orange beyond it, and nothing in between.
SHADES = {"b1": 0.01, "b2": 0.1, "b3": 0.3, "b4": 0.6, "b5": 1.0, "o1": 10.0, "o2": 1000.0, "o3": math.inf}


@dataclass(frozen=True)
class Cell:
    """One stage of one layer or tensor, of one side; `row` is its place among the document's rows."""

    verdict: Verdict
    ratio: float | None
    row: int
    culprit: bool

    @property
    def measured(self) -> bool:
        """Whether there is an error to show: something was measured, and the result is not exact."""
        return bool(self.ratio and math.isfinite(self.ratio))

    @property
    def shade(self) -> str:
        """The CSS class that colours the cell."""
        if self.measured and self.ratio is not None:
            return next(shade for shade, most in SHADES.items() if self.ratio <= most)
        return "calm" if self.verdict in (Verdict.EXACT, Verdict.GIVEN, Verdict.UNJUDGED) else "odd"

    @property
    def mark(self) -> str:
        """What stands in the cell: error / bound in two characters, its power of ten from 10 on, or a mark."""
        if not self.measured or self.ratio is None:
            return MARKS.get(self.verdict, self.verdict.value)
        if self.ratio >= 10:
            return f"+{math.floor(math.log10(self.ratio))}"
        return "0" if self.ratio < 0.005 else f"{self.ratio:.2f}"[1:] if self.ratio < 0.995 else f"{self.ratio:.1f}"


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
            side: {(place_of(row), str(row["stage"])): _cell(row, at, side, culprit) for at, row in enumerate(rows)}
            for side in ((BOTH, "a", "b") if compared else ("",))
        },
    )


def is_culprit(row: Row, culprit: Row | None) -> bool:
    """Whether a row is the one that a document names."""
    return culprit is not None and all(row[name] == culprit[name] for name in ("layer", "tensor", "stage"))


def _cell(row: Row, at: int, side: str, culprit: Row | None) -> Cell:
    whole = Verdict(row["verdict"])
    verdict, ratio = whole, ratio_of(row)
    if side in ("a", "b"):
        verdict, ratio = _of_side(row, side, whole), row.get(f"ratio_{side}")
    return Cell(verdict, None if ratio is None else float(ratio), at, is_culprit(row, culprit))


def _of_side(row: Row, side: str, whole: Verdict) -> Verdict:
    """A side's own verdict; what concerns the pair (a shape, a missing stage) is said of both."""
    own, other = (row.get(f"verdict_{letter}") for letter in (side, "b" if side == "a" else "a"))
    if own is None:
        return whole if other is None else Verdict.UNJUDGED
    return whole if whole in (Verdict.SHAPE, Verdict.MISSING, Verdict.EXTRA) else Verdict(own)
