"""The comparison of two reports of the original tool as a person reads it: all that its own comparator prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from stages.judge.document import place_of
from stages.judge.wording import number
from stages.show.console import _table, console

_LIMIT = 40


def reports_document(document: Mapping[str, Any], *, top: bool = False) -> None:
    """Hashes, variants, stage checks, the worst of them, elements that differ most, gates, the sentence."""
    out, found = console(), document["reports"]
    out.print(f"a  {escape(document['a']['source'])}\nb  {escape(document['b']['source'])}", soft_wrap=True)
    stored, current = found["stored"], found["current"]
    again = "reproduced by a" if stored["reproducible"] else "not reproduced by a"
    out.print(f"Stored hash: {escape(str(stored['sha256'] or 'none'))} ({again})", soft_wrap=True)
    label = f" ({current['label']})" if current["label"] else ""
    out.print(f"Current hash of a: {escape(str(current['sha256'] or 'none') + label)}", soft_wrap=True)
    for letter in "ab":
        _variants(out, letter, found["variants"][letter])
    _identical(out, found["identical"])
    for name, title in (("checks", "Stage checks"), ("chunks", "Checks of row chunks")):
        _counts(out, title, found[name])
    _failed(out, document["culprits"])
    _elements(out, found["stage_files"], top=top)
    for name, passed in document["gates"].items():
        flag = "--" + name.replace("_", "-")
        out.print(f"{flag}: {'[green]passed[/]' if passed else '[red]failed[/]'}")
    style = {"agree": "bold green", "diverged": "bold red"}.get(document["outcome"], "bold yellow")
    out.print(f"[{style}]{document['outcome'].upper()}[/]  {escape(document['verdict'])}", soft_wrap=True)


def _variants(out: Console, letter: str, variants: Sequence[Mapping[str, Any]]) -> None:
    table = _table("variant", "final bf16", "stored", "current of a", "zero-offset error")
    table.title, table.title_justify = f"Variants of {letter}", "left"
    table.columns[0].justify, table.columns[0].overflow = "left", "fold"
    for row in variants[:_LIMIT]:
        same = ("equal" if row[f"matches_{name}"] else "differs" for name in ("stored", "current"))
        table.add_row(escape(row["label"]), escape(row["sha256"][:16]), *same, number(row["zero_offset_max_abs"]))
    if len(variants) > _LIMIT:
        table.add_row(f"... and {len(variants) - _LIMIT} more; --json has them all")
    out.print(table)


def _identical(out: Console, pairs: Sequence[Mapping[str, Any]]) -> None:
    out.print("Equal hashes of the two reports: " + ("" if pairs else "none"))
    for pair in pairs[:_LIMIT]:
        out.print(f"  {pair['a']} = {pair['b']}: {pair['sha256'][:16]}", markup=False, soft_wrap=True)


def _counts(out: Console, title: str, counts: Mapping[str, Any]) -> None:
    if not counts["total"]:
        out.print(f"{title}: none")
        return
    out.print(
        f"{title}: {counts['total']} of {counts['tensors']} tensors, {counts['required']} required, "
        f"{counts['failed']} of them failed. The largest differences:"
    )
    table = _table("tensor", "stage", "max |a - b|", "mean |a - b|", "of the tolerance", "required")
    for row in counts["worst"]:
        rows = "" if row["rows"] is None else f" rows {row['rows'][0]} to {row['rows'][1]}"
        numbers = (number(row[name]) for name in ("max_abs", "mean_abs", "ratio"))
        table.add_row(escape(row["tensor"] + rows), escape(row["stage"]), *numbers, "yes" if row["required"] else "no")
    out.print(table)


def _failed(out: Console, culprits: Sequence[Mapping[str, Any]]) -> None:
    if culprits:
        out.print("Required checks that failed:")
    for row in culprits[:_LIMIT]:
        out.print(f"  {row['stage']} of {place_of(row)}: {row['hint']}", markup=False, soft_wrap=True)
    if len(culprits) > _LIMIT:
        out.print(f"  ... and {len(culprits) - _LIMIT} more; --json has them all")


def _elements(out: Console, found: Mapping[str, Any], *, top: bool) -> None:
    """The sample's stages from the stage files; with `top`, their largest differences one by one."""
    if found["note"]:
        out.print(f"Stage files: {escape(found['note'])}", soft_wrap=True)
    if not found["stages"]:
        return
    out.print(f"The sample's stages in {escape(found['a'])} and {escape(found['b'])}:", soft_wrap=True)
    table = _table("stage", "max |a - b|", "at", "a", "b", "elements that differ", "cosine")
    for row in found["stages"]:
        at = str(row["max_abs_index"] or "-")
        pair = (f"{row[n]:.9g}" if row[n] is not None else "-" for n in ("max_abs_a", "max_abs_b"))
        differing = f"{row['mismatched']:,} of {row['count']:,}"
        table.add_row(row["stage"], number(row["max_abs"]), at, *pair, differing, f"{row['cosine']:.9g}")
    out.print(table)
    for row in found["stages"] if top else ():
        for item in row["top"]:
            values = f"|a - b| {item['abs']:.3g}  a {item['a']:.9g}  b {item['b']:.9g}"
            out.print(f"  {row['stage']} {item['index']}  {values}", markup=False)
