"""What was inferred of recorded sums, row by row of a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from stages.order.probe import ranges
from stages.sums.infer import Inference, Part
from stages.sums.orders import Order, words
from stages.sums.text import format_order

SCHEMA = "svf.orders/1"


@dataclass
class Found:
    """What was inferred of one stage over its chunks; a part counts once for every chunk that it was found in."""

    stage: str
    tensors: tuple[str, ...]
    terms: int
    elements: int = 0
    remaining: int = 0
    also: int = 0
    tried: int = 0
    best: Order | None = None
    parts: list[tuple[Order, str, str, int]] = field(default_factory=list)

    def add(self, result: Inference, first_row: int = 0) -> None:
        """Take in one chunk's inference; its rows begin at `first_row` of the whole."""
        self.elements += result.elements
        self.remaining += result.remaining
        self.also, self.tried = max(self.also, result.also), self.tried + result.tried
        self.best = self.best or result.best
        for part in result.parts:
            self._add_part(part, first_row)

    def _add_part(self, part: Part, first_row: int) -> None:
        rows, cols = ranges(part.rows + first_row), ranges(part.cols)
        self.parts.append((part.order, rows, cols, part.rows.size * part.cols.size))

    def row(self) -> dict[str, Any]:
        """The document's row."""
        return {
            "stage": self.stage,
            "tensors": list(self.tensors),
            "terms": self.terms,
            "elements": self.elements,
            "remaining": self.remaining,
            "order": format_order(self.best) if self.best is not None else None,
            "words": words(self.best, "K") if self.best is not None else None,
            "parts": [
                {"order": format_order(order), "rows": rows, "cols": cols, "elements": count}
                for order, rows, cols, count in self.parts
            ],
            "also_fit": self.also,
            "tried": self.tried,
        }


def document(source: str, found: Iterable[Found]) -> dict[str, Any]:
    """`svf.orders/1`: `complete` when one order, or one for each margin, reproduces every byte of every stage."""
    rows = [one.row() for one in found]
    explained = sum(row["remaining"] == 0 for row in rows)
    return {
        "schema": SCHEMA,
        "source": source,
        "outcome": "complete" if explained == len(rows) else "incomplete",
        "explained": explained,
        "rows": rows,
    }


def known_first(found: Iterable[Found], orders: Callable[[int], Iterable[Order]]) -> Callable[[int], Iterable[Order]]:
    """`orders`, those first that were found before: the sums of a run are likely alike."""
    known = [one.best for one in found if one.best is not None]
    return lambda terms: dict.fromkeys([*known, *orders(terms)])
