"""What the commands that look at files and at the machine say, as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from stages.errors import shown
from stages.judge.wording import number
from stages.show.console import console

# Rows of a table on a terminal; --json has them all.
_MOST = 40


def _table(*columns: str) -> Table:
    table = Table(header_style="bold", show_edge=False, pad_edge=False)
    for name in columns:
        words = name in ("tensor", "dtype", "shape", "file", "layout")
        table.add_column(name, justify="left" if words else "right")
    return table


def _line(text: str, style: str | None = None) -> None:
    console().print(text, markup=False, soft_wrap=True, style=style)


def _escaped(value: Any) -> str:
    return "-" if value is None else escape(shown(value))


def inspect_document(document: Mapping[str, Any]) -> None:
    """A `svf.inspect/1` document: what it is, what its kind tells, its tensors."""
    _line(
        f"{shown(document['source'], 400)}: {document['kind']}, {document['count']} tensors, "
        f"{document['bytes']:,} bytes"
    )
    bundle = document["kind"] == "component bundle"
    for name, value in document["about"].items():
        if bundle and name == "per_tensor":
            console().print(_components(value))
        else:
            _about(name, value)
    table = _table("tensor", "dtype", "shape", "bytes", "file")
    for row in document["tensors"][:_MOST]:
        size = "-" if row["bytes"] is None else f"{row['bytes']:,}"
        table.add_row(*map(_escaped, (row["name"], row["dtype"], row["shape"])), size, _escaped(row["file"]))
    if document["tensors"]:
        console().print(table)
    if document["count"] > _MOST:
        _line(f"... and {document['count'] - _MOST} more; --json has them all")
    for note in document["notes"]:
        _line(f"note: {shown(note, 400)}")


def _about(name: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _line(f"  {shown(name)}.{shown(key)}  {shown(item)}")
    elif value not in (None, [], {}):
        _line(f"  {shown(name)}  {shown(', '.join(map(str, value)) if isinstance(value, list) else value)}")


def _components(components: list[Mapping[str, Any]]) -> Table:
    names = ("tensor", "shape", "layout", "s max", "s min", "min / max", "clusters", "offsets min", "max", "rms")
    table = _table(*names)
    for row in components:
        s, offsets = row["spectrum"], row["offsets"]
        values = (s["max"], s["min"], s["ratio"], s["clusters"], offsets["min"], offsets["max"], offsets["rms"])
        table.add_row(*map(_escaped, (row["tensor"], row["shape"], row["layout"])), *map(number, values))
    return table


def verify_document(document: Mapping[str, Any]) -> None:
    """A `svf.verify/1` document: findings first, then the checks."""
    for finding in document["findings"]:
        _line(f"MALFORMED  {shown(finding, 600)}", style="red")
    for check in document["checks"]:
        _line(f"checked: {shown(check, 200)}")
    if not document["findings"]:
        _line(f"SOUND  {shown(document['source'], 400)} ({document['kind']})", style="bold green")


def convert_document(document: Mapping[str, Any]) -> None:
    """What `svf convert` wrote."""
    dtypes = ", ".join(f"{count} {name}" for name, count in document["dtypes"].items())
    _line(
        f"Wrote {document['tensors']} tensors ({dtypes}), {document['bytes']:,} bytes to {shown(document['out'], 400)}"
    )


def doctor_document(document: Mapping[str, Any]) -> None:
    """A `svf.doctor/1` document: what is here, then the findings with what to do."""
    for part in ("versions", "machine", "environment"):
        for name, value in document[part].items():
            if isinstance(value, int) and name.endswith(("_free", "_available")):
                value = f"{value / 2**30:.1f} GiB"
            tested = document["tested_with"].get(name, value) if part == "versions" else value
            _line(f"  {name}  {shown(value, 200)}{'' if tested == value else f' (tested with {tested})'}")
    for name, probe in document["frameworks"].items():
        for key, value in {"devices": probe.get("devices"), **probe.get("settings", {})}.items():
            _line(f"  {name}.{key}  {shown(value, 200)}")
    styles = {"stops": "bold red", "changes": "bold yellow"}
    for finding in document["findings"]:
        effect = finding["effect"]
        label = {"stops": "STOPS A RUN", "changes": "CHANGES RESULTS", "know": "good to know"}[effect]
        _line(f"{label}  {finding['what']}\n    {finding['remedy']}", style=styles.get(effect))
    if document["outcome"] == "well":
        _line("WELL  Nothing here stops a run or changes results.", style="bold green")
