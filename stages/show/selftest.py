"""A selftest as a person reads it in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from stages.judge.wording import number
from stages.show.console import console


def selftest_document(document: Mapping[str, Any]) -> None:
    """One line a kind of fault, what was missed, false alarms, and the outcome."""
    out = console()
    if document["kinds"]:
        out.print(_kinds(document["kinds"]))
    for row in document["faults"]:
        if row.get("misnamed"):
            out.print(f"[red]misnamed[/]  {escape(_missed(row))}", soft_wrap=True)
        elif not row.get("unseen") and not row["named"]:
            out.print(f"[red]missed[/]  {escape(_missed(row))}", soft_wrap=True)
    for row in document["clean"]:
        if row["outcome"] != "agree":
            out.print(f"[red]false alarm[/]  {escape(_alarm(row))}", soft_wrap=True)
    for row in document["recorded"]:
        if row["outcome"] != "sound":
            out.print(f"[red]false alarm[/]  {escape(_recording(row, row))}", soft_wrap=True)
        if not row["twin"]["named"]:
            out.print(f"[red]missed[/]  {escape(_recording(row, row['twin']))}", soft_wrap=True)
    for row in document["used"]:
        if row["outcome"] != "agree":
            out.print(f"[red]false alarm[/]  {escape(_use(row, row))}", soft_wrap=True)
        if row["twin"]["outcome"] not in ("diverged", "refused"):
            out.print(f"[red]missed[/]  {escape(_use(row, row['twin']))}", soft_wrap=True)
    for row in document["profiled_clean"]:
        if row["outcome"] in ("faulty", "refused"):
            out.print(f"[red]false alarm[/]  {escape(_under(row))}", soft_wrap=True)
    for row in document["profiled"]:
        if row["misnamed"] or (row["claimed"] and not row["at_span"]):
            out.print(
                f"[red]{'misnamed' if row['misnamed'] else 'missed'}[/]  {escape(_profiled(row))}", soft_wrap=True
            )
    if document["profiles"]:
        out.print(_profiles(document["profiles"]))
    style, word = ("bold green", "PASSED") if document["passed"] else ("bold red", "FAILED")
    out.print(
        f"[{style}]{word}[/]  {document['named']} of {document['planted']} planted faults of {len(document['kinds'])} "
        f"kinds named, {document['found']} found, {document['misnamed']} called what they are not; "
        f"{document['false_alarms']} false alarms in {document['clean_runs']} clean comparisons; "
        f"{document['recordings_sound']} of {document['recordings']} recordings sound, "
        f"{document['recordings_twins_named']} of their twins named; {document['uses_agreeing']} of {document['uses']} "
        f"uses agree, {document['uses_twins_told']} of their twins told; {document['seconds']:.0f} s.",
        soft_wrap=True,
    )


def fault_list(rows: Sequence[Mapping[str, Any]]) -> None:
    """Every kind of fault, for `--list`."""
    table = _table("fault", "path", "what it is", "size")
    for row in rows:
        table.add_row(row["kind"], row["path"], escape(row["doc"]), number(row["size"]))
    console().print(table)


def _kinds(kinds: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("fault", "size", "first wrong stages", "verdict", "least error / bound", "named")
    for kind in kinds:
        stages = ", ".join(kind["stages"][:3]) + (", ..." if len(kind["stages"]) > 3 else "")
        style = "green" if kind["named"] == kind["planted"] else "red"
        share = f"[{style}]{kind['named']} of {kind['planted']}[/]"
        table.add_row(
            kind["kind"], number(kind["size"]), stages, ", ".join(kind["verdicts"]), number(kind["least_ratio"]), share
        )
    return table


def _missed(row: Mapping[str, Any]) -> str:
    place = row["tensor"] or ("the model" if row["layer"] is None else f"layer {row['layer']}")
    of = f": {row['row']}" if "row" in row else ""
    where = f"{row['fault']}{of} in {row['changed']} of {place}, {row['specimen']}, {row['backend']}"
    side, expected = (f" of side {row[name]}" if row[name] else "" for name in ("side", "expected_side"))
    what = f"{row['verdict']} at {row['stage']}{side}" if row["found"] else "not found"
    return f"{where}: {what}, expected {row['expected_stage']}{expected} ({row['hint']})"


def _alarm(row: Mapping[str, Any]) -> str:
    if "row" in row:
        return f"{row['changed']}, {row['row']}, {row['specimen']}, {row['backend']}: {row['verdict']} ({row['hint']})"
    what = f"{row['path']} of {row['family']}, {row['dtype']}, {row['manner']} weights, seed {row['seed']}"
    return f"{what}, {row['tokens']} tokens: {row['verdict']}"


def _recording(row: Mapping[str, Any], said: Mapping[str, Any]) -> str:
    return f"recording '{row['recording']}', {row['family']}, {row['dtype']}, {row['backend']}: {said['verdict']}"


def _use(row: Mapping[str, Any], said: Mapping[str, Any]) -> str:
    return f"{row['use']}, {row['dtype']}: {said['outcome']}: {said['verdict']}"


def _under(row: Mapping[str, Any]) -> str:
    return (
        f"profile '{row['profile']}', {row['engine']}, {row['family']}, {row['dtype']}, {row['manner']} weights, "
        f"seed {row['seed']}, {row['tokens']} tokens: {row['verdict']}"
    )


def _profiled(row: Mapping[str, Any]) -> str:
    place = "the model" if row["layer"] is None else f"layer {row['layer']}"
    what = f"{row['verdict']} at {row['stage']} ({row['hint']})" if row["found"] else "not found"
    return f"profile '{row['profile']}', {row['fault']} in {row['changed']} of {place}, {row['specimen']}: {what}"


def _profiles(tallies: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("profile", "dtype", "claimed", "found", "in the span", "stage named", "floor", "right", "alarms")
    for t in tallies:
        counts = (f"{t[name]} of {t['claimed']}" for name in ("found", "at_span", "named"))
        claimed = f"{t['claimed']} of {t['planted']}"
        right = (str(t["clean"]), str(t["false_alarms"]))
        table.add_row(t["profile"], t["dtype"], claimed, *counts, number(t["floor"]), *right)
    return table


def _table(*columns: str) -> Table:
    return Table(*columns, box=box.SIMPLE_HEAVY)
