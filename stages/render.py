"""Documents as a person reads them in a terminal: plain tables through rich, nothing computed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_STYLES = {"exact": "green", "rounding": "green", "unjudged": "yellow", "suspect": "yellow"}


def console() -> Console:
    """A console on stdout; a file or pipe gets plain text as wide as the tables need."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=160)


def number(value: Any) -> str:
    """A metric in three digits; a dash for what is not known."""
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def diff_document(document: Mapping[str, Any], *, top: bool = False) -> None:
    """The verdict table of a `svf.diff/1` document, then the layouts, the gates and the verdict sentence."""
    out = console()
    a, b = document["a"]["source"], document["b"]["source"]
    out.print(f"a  {escape(str(a))}\nb  {escape(str(b))}", soft_wrap=True)
    rows = document["rows"]
    if rows:
        out.print(_stage_table(rows))
        problems = [row for row in rows if row["verdict"] not in ("exact", "rounding")]
        if problems:
            out.print(_row_table(problems, "Rows that need a look"))
        if top:
            _print_top(out, rows)
    layouts(document.get("layouts", []), out)
    for name, passed in document["gates"].items():
        flag = "--" + name.replace("_", "-")
        out.print(f"{flag}: {'[green]passed[/]' if passed else '[red]failed[/]'}")
    coverage = document["coverage"]
    style = {"agree": "bold green", "diverged": "bold red"}.get(document["outcome"], "bold yellow")
    out.print(f"Compared {coverage['compared']} of {coverage['expected']} stages.")
    out.print(f"[{style}]{document['outcome'].upper()}[/]  {escape(document['verdict'])}", soft_wrap=True)


def _stage_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line per stage, the worst over tensors: what a newcomer reads first."""
    table = Table(title=None, header_style="bold", show_edge=False, pad_edge=False)
    for name in ("stage", "tensors", "verdict", "worst error / bound", "max |a - b|", "elements that differ", "bytes"):
        table.add_column(name, justify="left" if name in ("stage", "verdict") else "right", no_wrap=True)
    for stage in dict.fromkeys(row["stage"] for row in rows):
        group = [row for row in rows if row["stage"] == stage]
        same = sum(bool(row.get("byte_match")) for row in group)
        worst = max(group, key=lambda row: _severity(row["verdict"]))
        ratios = [r for row in group for r in (row["ratio_a"], row["ratio_b"]) if r is not None]
        errors = [row["max_abs"] for row in group if row.get("max_abs") is not None]
        different, count = sum(row.get("mismatched", 0) for row in group), sum(row.get("count", 0) for row in group)
        table.add_row(
            stage,
            str(len(group)),
            _styled(worst["verdict"], inherits=worst["verdict"] == "exact" and same < len(group)),
            number(max(ratios)) if ratios and worst["verdict"] != "exact" else "-",
            number(max(errors)) if errors else "-",
            f"{different:,} of {count:,}" if count else "-",
            "equal" if same == len(group) else f"equal in {same}" if same else "differ",
        )
    return table


def _row_table(rows: Sequence[Mapping[str, Any]], title: str, limit: int = 30) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", show_edge=False, pad_edge=False)
    for name in ("tensor", "stage", "verdict", "a / bound", "b / bound", "max |a - b|", "at", "a", "b"):
        table.add_column(name, justify="left" if name in ("tensor", "stage", "verdict") else "right")
    for row in rows[:limit]:
        table.add_row(
            escape(str(row["tensor"])),
            row["stage"],
            _styled(row["verdict"]),
            number(row["ratio_a"]),
            number(row["ratio_b"]),
            number(row.get("max_abs")),
            str(row.get("max_abs_index") or "-"),
            number(row.get("max_abs_a")),
            number(row.get("max_abs_b")),
        )
        if row.get("note"):
            table.add_row("", "", escape(row["note"]))
    if len(rows) > limit:
        table.add_row(f"... and {len(rows) - limit} more; --json has them all")
    return table


def _print_top(out: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        if row.get("top"):
            out.print(f"[bold]{escape(row['key'])}[/]: largest differences")
            for item in row["top"]:
                out.print(f"  {item['index']}  |a - b| {item['abs']:.3g}  a {item['a']:.9g}  b {item['b']:.9g}")


def layouts(rows: Sequence[Mapping[str, Any]], out: Console | None = None) -> None:
    """One line per layout: for how many tensors V fits and gives the source back with zero offsets."""
    if not rows:
        return
    out = out or console()
    table = Table(title="Layouts of V, by the zero-offset replay", title_justify="left", header_style="bold")
    table.show_edge = table.pad_edge = False
    for name in ("layout", "gives the source back", "worst zero-offset error", "worst relative", "bound"):
        table.add_column(name, justify="left" if name == "layout" else "right")
    for layout in dict.fromkeys(row["layout"] for row in rows):
        group = [row for row in rows if row["layout"] == layout]
        fits = sum(bool(row["fits"]) for row in group)
        errors = [row["zero_offset_max_abs"] for row in group if row["zero_offset_max_abs"] is not None]
        relative = [row["relative"] for row in group if row["relative"] is not None]
        bounds = [row["bound"] for row in group if row["bound"] is not None]
        no_shape = sum(row["relative"] is None for row in group)
        verdict = (
            f"[green]{fits} of {len(group)} tensors[/]" if fits == len(group) else f"[red]{fits} of {len(group)}[/]"
        )
        table.add_row(
            layout,
            verdict + (f" ({no_shape} do not fit by shape)" if no_shape else ""),
            number(max(errors)) if errors else "-",
            number(max(relative)) if relative else "-",
            number(max(bounds)) if bounds else "-",
        )
    out.print(table)


def decompose_document(document: Mapping[str, Any]) -> None:
    """What `svf decompose` wrote."""
    out = console()
    reference = document["reference"]
    out.print(f"Wrote {len(document['tensors'])} tensors ({document['component_source']}) to {document['out']}")
    for variant in document["variants"]:
        error = number(variant["zero_offset_max_abs_error_vs_source"])
        out.print(f"  {variant['label']}: {variant['observed_bf16_sha256'][:16]}  zero-offset error {error}")
    out.print(f"Current baseline: {reference['current_python_baseline_bf16_sha256']}")
    out.print(f"Historical hash reproducible: {reference['expected_hash_reproducible']} ({reference['diagnosis']})")
    if document["report"]:
        out.print(f"Report: {document['report']}")


def synth_document(document: Mapping[str, Any]) -> None:
    """What `svf synth` wrote."""
    console().print(
        f"Wrote {document['preset']} (seed {document['seed']}, {document['dtype']}): {document['tensors']} tensors, "
        f"{document['parameters']:,} parameters, {document['bytes']:,} bytes to {document['out']}",
        markup=False,
        soft_wrap=True,
    )


def _styled(verdict: str, *, inherits: bool = False) -> str:
    """`inherits`: right from its inputs, which differed already."""
    return f"[{_STYLES.get(verdict, 'bold red')}]{verdict}[/]" + (", inherits" if inherits else "")


def _severity(verdict: str) -> int:
    from stages.verdict import Verdict

    return list(Verdict).index(Verdict(verdict))
