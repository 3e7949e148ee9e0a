"""A `svf.route/1` document as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from stages.errors import shown
from stages.judge.wording import number
from stages.show.console import console


def route_document(document: Mapping[str, Any]) -> None:
    """Logits of every agent and role, what was chosen, and the verdict."""
    out = console()
    model = f"{shown(document['model'])}{' adapted' if document['adapted'] else ''}"
    out.print(
        f"Router head of {document['head']['agents']} agents and 3 roles on {model}, hidden state of token "
        f"{document['position']} of {len(document['tokens'])}",
        markup=False,
        soft_wrap=True,
    )
    columns = [name for name in document["rows"][0] if name != "output"]
    table = Table("", *columns, box=None)
    chosen = _chosen(document)
    for row in document["rows"]:
        mark = f"[bold]{row['output']}[/]" if row["output"] in chosen else row["output"]
        table.add_row(mark, *(number(row[column]) for column in columns))
    out.print(table)
    style = "bold green" if document["outcome"] == "agree" else "bold red"
    out.print(f"[{style}]{document['outcome'].upper()}[/]  {escape(document['verdict'])}", soft_wrap=True)


def _chosen(document: Mapping[str, Any]) -> set[str]:
    parts = [document["agent"], document["role"]]
    return {choice["name"] for part in parts for choice in ([part["a"], part["b"]] if "a" in part else [part])}
