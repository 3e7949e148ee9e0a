"""A `svf.plan/1` document as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from stages.errors import shown
from stages.judge.wording import number
from stages.show.console import console

_STYLES = {"seen": "green", "too long": "bold red", "not computed": "yellow"}
# Hidden stages that are named; of more, their count.
_NAMED = 4


def plan_document(document: Mapping[str, Any]) -> None:
    """One line per stage, the bluntest of its layers: from what it would be judged, and what would be seen."""
    out = console()
    profile, layers = document["profile"], document["layers"]
    said = f"{profile['name']} ({profile['doc']})" if profile else f"{len(document['stages'])} stages"
    out.print(
        f"If {said} were recorded of {shown(document['model'])} in {document['dtype']}: "
        f"{len(document['tokens'])} tokens, {len(layers['computed'])} of {layers['of']} layers computed",
        markup=False,
        soft_wrap=True,
    )
    table = Table("stage", "", "judged from", "through", "errors seen above", "shorter with", box=None)
    rows = document["rows"]
    for stage in dict.fromkeys(row["stage"] for row in rows):
        group = [row for row in rows if row["stage"] == stage]
        worst = max(group, key=lambda row: (row["verdict"] == "too long", row["floor"] or 0.0))
        more = worst["shorten"]
        table.add_row(
            stage,
            f"[{_STYLES[worst['verdict']]}]{worst['verdict']}[/]",
            escape(", ".join(worst["from"]) or "-"),
            escape(_through(worst["through"])),
            number(worst["floor"]) if worst["floor"] is not None else "-",
            f"{more['stage']}: {number(more['floor'])}" if more else "-",
        )
    out.print(table)
    out.print(escape(document["verdict"]), soft_wrap=True)


def _through(keys: list[str]) -> str:
    """Hidden stages in few words."""
    names = list(dict.fromkeys(key.rpartition(".")[2] for key in keys))
    layers = {key.rpartition(".")[0] for key in keys if key.startswith("layers.")}
    if len(layers) > 1:
        return f"{len(keys)} stages of {len(layers)} layers"
    return ", ".join(names) if len(names) <= _NAMED else f"{len(names)} stages, {names[0]} to {names[-1]}"
