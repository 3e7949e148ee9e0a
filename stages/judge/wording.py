"""Numbers in words: as many digits as say something, and how far a finding goes. For people alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

# Beyond it a ratio says nothing more: float32 has 2^24 steps between a value and twice it, and a result that is off by
# a million bounds shares no digit with the right one, or comes from another formula.
ANOTHER_FUNCTION = 1e6


def number(value: Any) -> str:
    """A metric in three digits; a dash for what is not known."""
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def ratio(value: float | None) -> str:
    """error / bound for a table's cell."""
    return "> 1e6" if value is not None and value > ANOTHER_FUNCTION else number(value)


def times(value: float | None, verdict: str = "bug") -> str | None:
    """error / bound in a sentence, or what it means beyond all counting; None where nothing was measured."""
    if not value or not math.isfinite(value):
        return None
    if value < 1:  # what fails there fails by all elements together, or is proved
        return "within the bound of each element"
    if value <= ANOTHER_FUNCTION:
        return f"{value:.3g} times the bound"
    return "far beyond any rounding" if verdict == "bug" else "over a million times the bound"


def apart(a: float | None, b: float | None) -> tuple[str, str]:
    """Two values in the fewest digits, three at least, that tell them apart; a dash for None."""
    if a is None or b is None or a == b:
        return number(a), number(b)
    digits = next((d for d in range(3, 17) if f"{a:.{d}g}" != f"{b:.{d}g}"), 17)
    return f"{a:.{digits}g}", f"{b:.{digits}g}"


def cosine(value: float | None) -> str:
    """A cosine that is not taken for 1: near it as what it lacks, `1 - 3e-12`; float64 tells no less than 1e-15."""
    if value is None:
        return "-"
    return f"1 - {1 - value:.1g}" if 1e-15 < 1 - value < 1e-4 else f"{value:.5g}"


def change(value: float | None) -> str:
    """A cosine's change from the stage before; below what float64 tells from 0 it is 0."""
    return "-" if value is None else "0" if abs(value) < 1e-15 else f"{value:+.1e}"


def how_far(
    rows: Sequence[Mapping[str, Any]], culprit: Mapping[str, Any] | None, logits: Mapping[str, Any] | None = None
) -> str | None:
    """A sentence on how far a finding goes: in how many layers or tensors the stage fails alike, what it costs."""
    parts = [part for part in (_reach(rows, culprit), _cost(logits) if culprit else None) if part]
    return f"{'. '.join(parts)}." if parts else None


def _reach(rows: Sequence[Mapping[str, Any]], culprit: Mapping[str, Any] | None) -> str | None:
    if culprit is None or (culprit["layer"] is None and culprit["tensor"] is None):
        return None
    group = [row for row in rows if row["stage"] == culprit["stage"]]
    alike = sum(row["verdict"] == culprit["verdict"] for row in group)
    what = "layers" if culprit["tensor"] is None else "tensors"
    return f"{culprit['stage']} fails in the same way in {alike} of {len(group)} {what}" if len(group) > 1 else None


def _cost(logits: Mapping[str, Any] | None) -> str | None:
    if logits is None or logits["kl"] is None:
        return None
    return f"Top-1 tokens equal at {logits['top1_agreement']:.0%} of positions, KL up to {logits['kl']:.2g}"
