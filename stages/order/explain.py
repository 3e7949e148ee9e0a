"""How much of the difference between two recorded runs is the order of summation, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stages.errors import UsageError
from stages.files.kinds import Recording
from stages.judge.diff import kind_of
from stages.oracle.verdict import Verdict
from stages.order.infer_recorded import infer_recorded
from stages.spec.replay import REPLAY

ORDER, INHERITED = "order", "inherited"
# A sum's own name in a report: a tensor's stage in a replay, a key in a forward.
Name = tuple[str | None, str]


def explain_recorded(
    document: dict[str, Any],
    path_a: Path,
    path_b: Path,
    *,
    components: Path | None = None,
    model: str | None = None,
    progress: Callable[[str, float], None],
) -> dict[str, Any]:
    """The `svf.diff/1` document with `explained` in every row, and the sum of it in `explained` and the verdict.

    `order`: each side's bytes, all of them, are its own inputs summed in one order (margins may have another), so
    that either side replayed in the other's order leaves no element that differs; `order_a` and `order_b` name them,
    and `also_fit` counts others that do the same, where there are few results.
    `inherited`, in a replay: the stage is exact, and all that differs in its inputs is explained. `UsageError` for
    what is neither two replays nor two forward dumps.
    """
    kinds = {kind_of(path_a), kind_of(path_b)}
    if kinds not in ({Recording.REPLAY}, {Recording.FORWARD}):
        raise UsageError("--explain-order applies to two replays or two forward dumps")
    sides = [
        _inferred(infer_recorded(path, components=components, model=model, progress=progress)["rows"])
        for path in (path_a, path_b)
    ]
    rows = {(row["tensor"], row["stage"]): row for row in document["rows"]}
    for row in document["rows"]:
        row["explained"] = _reason(row, rows, sides) if row["byte_match"] is False else None
    differing = [row for row in document["rows"] if row["byte_match"] is False]
    if kinds == {Recording.FORWARD}:  # norms, exponentials and rotations have functions in them that no order is behind
        differing = [row for row in differing if _name(row) in sides[0]]
    explained = [row for row in differing if row["explained"]]
    document["explained"] = {"differing": len(differing), "explained": len(explained)}
    if differing:
        what = "product stages" if kinds == {Recording.FORWARD} else "stages"
        document["verdict"] = f"{document['verdict']} {_sentence(differing, explained, what)}"
    return document


def _inferred(rows: list[dict[str, Any]]) -> dict[Name, dict[str, Any]]:
    return {(name, row["stage"]): row for row in rows for name in row["tensors"]}


def _name(row: Mapping[str, Any]) -> Name:
    return (row["tensor"] or row["key"], row["stage"])


def _reason(row: dict[str, Any], rows: Mapping[Any, dict[str, Any]], sides: list[dict[Name, Any]]) -> str | None:
    """Why the bytes of a row differ, where it is known; rows are taken in execution order, inputs first."""
    found = [side[_name(row)] for side in sides if _name(row) in side]
    stage = REPLAY.get(row["stage"])
    if len(found) == len(sides):
        if any(one["remaining"] for one in found):
            return None
        row["order_a"], row["order_b"] = (one["order"] for one in found)
        row["also_fit"] = max(one["also_fit"] for one in found)
        return ORDER
    if row["verdict"] == Verdict.EXACT and stage is not None and stage.inputs and row["tensor"] is not None:
        inputs = [rows.get((row["tensor"], name)) for name in stage.inputs]
        if all(one is not None and (one["byte_match"] or one["explained"]) for one in inputs):
            return INHERITED
    return None


def _sentence(differing: list[dict[str, Any]], explained: list[dict[str, Any]], what: str) -> str:
    """`All 26 differing stages are explained by the order of summation: normalization left against pairs.`"""
    pairs: dict[tuple[str, str], dict[str, None]] = {}
    for row in explained:
        if row["explained"] == ORDER:
            pairs.setdefault((row["order_a"], row["order_b"]), {})[row["stage"]] = None
    told = [f"{', '.join(stages)}: {a if a == b else f'{a} against {b}'}" for (a, b), stages in pairs.items()]
    count, total = len(explained), len(differing)
    share = f"All {total} differing {what} are" if count == total else f"{count} of {total} differing {what} are"
    few = sorted({row["stage"] for row in explained if row.get("also_fit")})
    rest = f"; {', '.join(few)}: too few results to tell it from other orders" if few else ""
    return f"{share} explained by the order of summation{' (' + '; '.join(told) + rest + ')' if told else ''}."
