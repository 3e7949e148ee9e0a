"""Rows of documents: which fields a stage's row has, whoever writes it."""

from __future__ import annotations

from typing import Any

from stages.files.forward_dump import Place, forward_key
from stages.files.selection import layer_of
from stages.oracle.verdict import Verdict
from stages.recipes.side import SideVerdict

Row = dict[str, Any]


def in_forward(place: Place, required: bool = True) -> Row:
    """Where a stage of a forward stands."""
    layer, stage = place
    return {"key": forward_key(place), "layer": layer, "tensor": None, "stage": stage, "required": required}


def in_replay(source_name: str, key: str, stage: str, required: bool = True) -> Row:
    """Where a stage of a replayed tensor stands; `key` is the tensor's safe name."""
    return of_tensor(source_name, f"tensor.{key}.{stage}", stage, required)


def of_tensor(source_name: str, key: str, stage: str, required: bool = True) -> Row:
    """Where something of one tensor stands."""
    where = {"key": key, "layer": layer_of(source_name), "tensor": source_name, "stage": stage}
    return {**where, "required": required}


def pair_row(where: Row, verdict: Verdict, a: SideVerdict | None = None, b: SideVerdict | None = None) -> Row:
    """A row of two sides, without metrics."""
    return {**where, "verdict": verdict.value, **side_fields(a, b), "tolerance_passed": False}


def alone_row(where: Row) -> Row:
    """A row of one side, not yet judged."""
    return {**where, "verdict": Verdict.UNJUDGED.value, **dict.fromkeys(("ratio", "rms_ratio", "hint", "note"))}


def side_fields(a: SideVerdict | None, b: SideVerdict | None) -> dict[str, Any]:
    """Each side's verdict, largest error / bound and what is known of the reason, as row fields."""
    return {
        "verdict_a": a.verdict.value if a else None,
        "verdict_b": b.verdict.value if b else None,
        "ratio_a": a.ratio if a else None,
        "ratio_b": b.ratio if b else None,
        "rms_ratio_a": a.rms_ratio if a else None,
        "rms_ratio_b": b.rms_ratio if b else None,
        "hint_a": a.hint if a else None,
        "hint_b": b.hint if b else None,
        "rule_a": a.rule if a else None,
        "rule_b": b.rule if b else None,
        **{f"{name}_a": value for name, value in (a or SideVerdict()).recipe_fields().items()},
        **{f"{name}_b": value for name, value in (b or SideVerdict()).recipe_fields().items()},
    }
