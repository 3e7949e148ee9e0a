"""Documents as a person reads them in a terminal: plain tables through rich, nothing computed here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from stages.judge import wording
from stages.judge.document import place_of, std_ratio_words
from stages.judge.wording import number
from stages.oracle.verdict import Verdict

# Rows of a table in a terminal; --json has them all.
_MOST = 30
# Bits that are rounded off when a result is stored: of these dtypes that is nearly all of a stage's bound.
_NARROW = ("bfloat16", "float16")
_STYLES = {
    "exact": "green",
    "rounding": "green",
    "given": "default",
    **dict.fromkeys(("accepted", "tie", "unjudged", "suspect"), "yellow"),
}


def console() -> Console:
    """A console on stdout; a file or pipe gets plain text as wide as the tables need."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=160)


def diff_document(document: Mapping[str, Any], *, top: bool = False) -> None:
    """The verdict table of a `svf.diff/1` document, then the layouts, the gates and the verdict sentence."""
    out = console()
    a, b = document["a"]["source"], document["b"]["source"]
    out.print(f"a  {escape(str(a))}\nb  {escape(str(b))}", soft_wrap=True)
    rows = document["rows"]
    if document.get("kind") == "forward":
        _forward_view(document, out)
    elif rows:
        out.print(_stage_table(rows, out.width))
    if rows:
        problems = [row for row in rows if row["verdict"] not in ("exact", "rounding", "given")]
        if problems:
            _print_rows(problems, out)
        if top:
            _print_top(out, rows)
    layouts(document.get("layouts", []), out)
    for name, passed in document["gates"].items():
        flag = "--" + name.replace("_", "-")
        why = f", {escape(words)}" if (words := std_ratio_words(document, name)) else ""
        out.print(f"{flag}: {'[green]passed[/]' if passed else '[red]failed[/]'}{why}", soft_wrap=True)
    _precision_lines(document, out)
    if document.get("recorded_hash"):
        out.print(escape(document["recorded_hash"]["note"]), soft_wrap=True)
    for row in document.get("orders", []):
        out.print(f"{row['stage']}, {row['terms']} terms: {row['order'] or 'no order'}, {row['words']}", soft_wrap=True)
    coverage = document["coverage"]
    style = {"agree": "bold green", "diverged": "bold red"}.get(document["outcome"], "bold yellow")
    out.print(f"Compared {coverage['compared']} of {coverage['expected']} stages.")
    out.print(f"[{style}]{document['outcome'].upper()}[/]  {escape(document['verdict'])}", soft_wrap=True)


def next_lines(document: Mapping[str, Any]) -> None:
    """The commands that would tell more, but for those that the verdict names already."""
    for command in document["next"]:
        if command not in str(document.get("verdict")):
            console().print(f"Next: {command}", markup=False, soft_wrap=True)


def audit_document(document: Mapping[str, Any]) -> None:
    """A `svf.audit/1` document: one line per stage, what needs a look, the sentence."""
    out = console()
    told = ("dtype", "dtype taken", "recorded by", "call", "in part")
    facts = ", ".join(f"{name} {value}" for name, value in document["facts"].items() if name in told)
    out.print(escape(f"{document['source']}{f' ({facts})' if facts else ''}"), soft_wrap=True)
    rows = document["rows"]
    if rows:
        out.print(_audit_table(rows, out.width))
        if any(_stored_narrow(row) for row in rows):
            out.print(_HALF_A_STEP, soft_wrap=True)
    problems = [row for row in rows if row["verdict"] not in ("exact", "rounding", "given")]
    if problems:
        _print_audit_rows(problems, out)
    coverage = document["coverage"]
    style = {"sound": "bold green", "faulty": "bold red"}.get(document["outcome"], "bold yellow")
    given = coverage.get("given", 0)
    more = f"; {given} input{'s' * (given > 1)} taken as given" if given else ""
    out.print(f"Judged {coverage['judged']} of {coverage['expected']} stages{more}.")
    out.print(f"[{style}]{document['outcome'].upper()}[/]  {escape(document['verdict'])}", soft_wrap=True)


def _audit_table(rows: Sequence[Mapping[str, Any]], width: int) -> Table:
    """One line per stage, the worst over layers or tensors, and what a clean verdict rests on."""
    columns = {name: _Column(name, *rank) for name, rank in _AUDIT_COLUMNS.items()}
    for stage in dict.fromkeys(row["stage"] for row in rows):
        group = [row for row in rows if row["stage"] == stage]
        verdict = max((row["verdict"] for row in group), key=_severity)
        different, count = sum(row.get("mismatched", 0) for row in group), sum(row.get("count", 0) for row in group)
        worst = max(group, key=lambda row: row["ratio"] or 0.0)
        furthest = max(group, key=lambda row: (row.get("worst_token") or {}).get("rms_ratio") or 0.0)
        cells = {
            "stage": stage,
            "verdict": _styled(verdict),
            "cosine": wording.cosine(_lowest(group, "cosine")),
            "worst error / bound": _ratio(worst["ratio"], worst) if worst["ratio"] else "-",
            "error RMS": number(_highest(group, "error_rms")),
            "bound RMS": number(_highest(group, "bound_rms")),
            "worst token": _whereabouts(furthest, "worst_token"),
            "worst column": _whereabouts(furthest, "worst_column"),
            "max |error|": number(_highest(group, "max_abs")),
            "errors seen above": number(_highest(group, "floor")),
            "not correctly rounded": f"{different:,} of {count:,}" if count else "-",
            "of": str(len(group)),
        }
        for name, cell in cells.items():
            columns[name].cells.append(cell)
    if not any(row.get("floor") for row in rows):  # nothing was judged through stages that were not recorded
        del columns["errors seen above"]
    return _fitted(columns.values(), width)


# Column -> whether it is words, and when it is left out where the terminal is narrow: the highest first, 0 never.
_AUDIT_COLUMNS = {
    "stage": (True, 0),
    "verdict": (True, 0),
    "cosine": (False, 4),
    "worst error / bound": (False, 0),
    "error RMS": (False, 2),
    "bound RMS": (False, 2),
    "worst token": (False, 5),
    "worst column": (False, 6),
    "max |error|": (False, 3),
    "errors seen above": (False, 1),
    "not correctly rounded": (False, 8),
    "of": (False, 7),
}
_HALF_A_STEP = (
    "(half step): storing a value in so few bits may change it by half a step, which is nearly the whole bound there; "
    "so a right result comes close to 1."
)


def _stored_narrow(row: Mapping[str, Any]) -> bool:
    """Whether what is left of a row's error may be the rounding of its storing alone."""
    ratios = [row.get(name) for name in ("ratio", "ratio_a", "ratio_b")]
    return row["verdict"] == "rounding" and row.get("dtype") in _NARROW and any(ratios)


def _ratio(value: float | None, row: Mapping[str, Any]) -> str:
    """error / bound; of a stage stored in few bits, that this is the storing."""
    return wording.ratio(value) + (" (half step)" if _stored_narrow(row) else "")


def _whereabouts(row: Mapping[str, Any], field: str) -> str:
    """The token or column that errs the most, and the RMS of its error / bound."""
    found = row.get(field)
    return "-" if not found else f"{','.join(map(str, found['index']))} ({number(found['rms_ratio'])})"


def _lowest(rows: Sequence[Mapping[str, Any]], field: str) -> float | None:
    return min((row[field] for row in rows if row.get(field) is not None), default=None)


def _highest(rows: Sequence[Mapping[str, Any]], field: str) -> float | None:
    return max((row[field] for row in rows if row.get(field) is not None), default=None)


def _print_audit_rows(rows: Sequence[Mapping[str, Any]], out: Console) -> None:
    columns = [
        _Column("where", True),
        _Column("stage", True),
        _Column("verdict", True),
        _Column("error / bound"),
        _Column("at", least=2),
        _Column("expected", least=1),
        _Column("got", least=1),
    ]
    for row in rows[:_MOST]:
        pair = wording.apart(row.get("max_abs_expected"), row.get("max_abs_got"))
        cells = (escape(place_of(row)), row["stage"], _styled(row["verdict"]), _ratio(row["ratio"], row))
        for column, cell in zip(columns, (*cells, str(row.get("max_abs_index") or "-"), *pair), strict=True):
            column.cells.append(cell)
    out.print(_fitted(columns, out.width, "Rows that need a look"))
    _notes(rows, out)


def _notes(rows: Sequence[Mapping[str, Any]], out: Console) -> None:
    """What is known of the reasons, once for all rows that have the same; and how many rows were not shown."""
    texts: dict[str, list[str]] = {}
    for row in rows[:_MOST]:
        for name in ("hint", "note", "hint_a", "hint_b"):
            if row.get(name):
                side = f"{name[-1]}: " if name.endswith(("_a", "_b")) else ""
                texts.setdefault(f"{side}{row[name]}", []).append(row["key"])
    for text, keys in texts.items():
        more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        out.print(f"  {escape(keys[0])}{more}: {escape(text)}", soft_wrap=True)
    if len(rows) > _MOST:
        out.print(f"... and {len(rows) - _MOST} more; --json has them all")


@dataclass
class _Column:
    """A column of a table and when it is left out where the terminal is narrow: the highest first, 0 never."""

    name: str
    words: bool = False
    least: int = 0
    cells: list[str] = field(default_factory=list)

    @property
    def width(self) -> int:
        return max(len(self.name), *(Text.from_markup(cell).cell_len for cell in self.cells))


def _fitted(columns: Iterable[_Column], width: int, title: str | None = None) -> Table:
    """A table of as many columns as fit: one that is not needed is left out rather than a name cut short."""
    kept = list(columns)
    while sum(column.width + 3 for column in kept) - 3 > width and any(column.least for column in kept):
        kept.remove(max(kept, key=lambda column: column.least))
    table = Table(title=title, title_justify="left", header_style="bold", show_edge=False, pad_edge=False)
    for column in kept:
        table.add_column(column.name, justify="left" if column.words else "right", overflow="fold")
    for row in zip(*(column.cells for column in kept), strict=True):
        table.add_row(*row)
    return table


def _table(*columns: str) -> Table:
    """A plain table; what is words stands left, what is a number right."""
    table = Table(header_style="bold", show_edge=False, pad_edge=False)
    words = ("stage", "where", "verdict", "note", "tensor", "declared", "fits", "order")
    for name in columns:
        table.add_column(name, justify="left" if name in words else "right")
    return table


def _precision_lines(document: Mapping[str, Any], out: Console) -> None:
    """What Ziv's test found, of a run or of both sides' runs; nothing for a precision without it."""
    for run in (document, document.get("a", {}).get("run"), document.get("b", {}).get("run")):
        if run and "flagged" in run:
            out.print(
                f"{run.get('backend') or 'exact'}: {run['flagged']:,} of {run['elements']:,} elements undecided in "
                f"float64, {run['recomputed']:,} computed again exactly, {run['corrected']:,} of them changed"
            )


def _forward_view(document: Mapping[str, Any], out: Console) -> None:
    """Stages by layers, then one line per stage, the growth over depth, the FFN's amplification, the logits."""
    rows = document["rows"]
    _grid(rows, out)
    out.print(_stage_table(rows, out.width))
    if document["growth"]:
        line = "  ".join(f"{g['layer']}: {g['rel_l2']:.1e}" for g in document["growth"])
        out.print(f"Relative difference of the layers' outputs, by depth (inherited error included):\n  {line}")
    chain = [c for c in document["amplification"] if any(c["rel_l2"].values())]
    if chain:
        worst = max(chain, key=lambda c: max(c["rel_l2"].values()))
        steps = " -> ".join(f"{stage} {value:.1e}" for stage, value in worst["rel_l2"].items())
        ratios = ", ".join(f"{stage} {number(value)}" for stage, value in worst["std_ratio"].items())
        out.print(f"Along the FFN of layer {worst['layer']}, where it is largest: {steps}; std of b over a: {ratios}")
    logits = document["logits"]
    if logits is not None:
        out.print(
            f"Top-1 tokens equal at {logits['top1_agreement']:.0%} of them, top-5 at {logits['top5_agreement']:.0%}; "
            f"KL at most {logits['kl']:.2g}; next token {logits['next_token_a']} and {logits['next_token_b']}, "
            f"margin {number(logits['margin'])}"
        )
    for letter in ("a", "b"):
        run = document[letter].get("run")
        if run:
            out.print(f"{letter}: {production_line(run)}", soft_wrap=True, markup=False)


def _grid(rows: Sequence[Mapping[str, Any]], out: Console) -> None:
    """Worst relative difference per stage and layer as a power of ten; `=` equal bytes, a verdict where one failed."""
    rows = [row for row in rows if row["tensor"] is None]  # adapted weights are no stages
    layers = sorted({row["layer"] for row in rows if row["layer"] is not None})
    by_place = {(row["layer"], row["stage"]): row for row in rows}
    stages = list(dict.fromkeys(row["stage"] for row in rows if row["layer"] is not None))
    differ = [row for row in rows if row.get("byte_match") is False]
    first = next((row["key"] for row in differ if row["layer"] is not None), None)
    fit = max(1, (out.width - 20) // 6)  # three characters, a space on either side, a line; one cell has the mark too
    for at in range(0, len(layers), fit):
        table = Table(title="Relative difference per layer, 10^n ('=' equal bytes)" if not at else None)
        table.title_justify, table.show_edge, table.pad_edge, table.header_style = "left", False, False, "bold"
        table.add_column("stage", no_wrap=True)
        for layer in layers[at : at + fit]:
            table.add_column(str(layer), justify="right", no_wrap=True, min_width=3)
        for stage in stages:
            table.add_row(stage, *(_cell(by_place.get((n, stage)), first) for n in layers[at : at + fit]))
        out.print(table)
    if differ:
        whole = differ[0]["key"]  # of the whole model, perhaps, which the table does not have
        mark = "" if first is None else " (marked *)" if first == whole else f"; of a layer, {escape(first)} (marked *)"
        out.print(f"First difference in bytes: {escape(whole)}{mark}")


def _cell(row: Mapping[str, Any] | None, first: str | None) -> str:
    if row is None:
        return ""
    mark = "*" if row["key"] == first else ""
    if row["verdict"] not in ("exact", "rounding", "given", "unjudged"):
        return f"[bold red]{row['verdict'][:3]}{mark}[/]"
    if row.get("byte_match"):
        return "[dim]=[/]"
    relative = row.get("rel_l2")
    if not relative:
        return f"0{mark}"
    return f"{math.floor(math.log10(relative))}{mark}" if math.isfinite(relative) else f"inf{mark}"


def production_line(run: Mapping[str, Any]) -> str:
    """What the comparison with the production model showed, in one line."""
    production = run["production"]
    if not production["ran"]:
        return f"{run['backend']}: production model not run ({production['why']})"
    line = (
        f"{run['backend']}: production model {production['verdict']}, max |traced - production| "
        f"{number(production['max_abs'])}, greedy token {'the same' if production['agrees'] else 'DIFFERS'}"
    )
    if "generated_agrees" in production:
        line += f", {len(run['generated'])} generated tokens {'agree' if production['generated_agrees'] else 'DIFFER'}"
    return line


def forward_document(document: Mapping[str, Any]) -> None:
    """A `svf.forward/1` document."""
    out = console()
    layers, count = document["layers"], len(document["tokens"])
    out.print(
        f"{document['backend']} forward, {document['dtype']}: {count} tokens, {len(layers)} layers recorded, "
        f"{len(document['stages'])} stages"
    )
    top = "  ".join(f"{t['token']} ({t['logit']:.4g})" for t in document["top5"])
    out.print(f"Next token {document['next_token']}; top 5: {top}")
    if document["adapted"]:
        layouts_used = ", ".join(sorted(set(document["adapted"].values())))
        out.print(f"{len(document['adapted'])} weights adapted, V contracted as {layouts_used}")
    if document["generated"] is not None:
        out.print(f"Generated: {document['generated']}")
    _precision_lines(document, out)
    out.print(production_line(document), markup=False, soft_wrap=True)
    repeated = document["deterministic"]
    if repeated is not None:
        first = f", first at {repeated['first']}" if repeated["first"] else ""
        out.print(
            f"{repeated['runs']} runs: {repeated['different_elements']:,} of {repeated['elements']:,} elements differ "
            f"from the first{first}"
        )
    if document["out"]:
        out.print(f"Dump: {document['out']}", markup=False, soft_wrap=True)


def stats_document(document: Mapping[str, Any]) -> None:
    """A `svf.stats/1` document: one line per stage and layer, or tensor."""
    out = console()
    out.print(document["source"], markup=False, soft_wrap=True)
    columns = [_Column("where", True), _Column("stage", True), *map(_Column, ("mean", "std", "min", "max"))]
    columns += [_Column("count", least=1), _Column("not finite", least=0), _Column("dtype", True, 2)]
    for row in document["rows"]:
        cells = (escape(place_of(row)), row["stage"], *(number(row[name]) for name in ("mean", "std", "min", "max")))
        more = (f"{row['count']:,}", f"{row['nonfinite']:,}" if row["nonfinite"] else "-", row["dtype"])
        for column, cell in zip(columns, (*cells, *more), strict=True):
            column.cells.append(cell)
    if not any(row["nonfinite"] for row in document["rows"]):
        columns.pop(-2)
    out.print(_fitted(columns, out.width))


def checkpoints_document(document: Mapping[str, Any]) -> None:
    """A `svf.checkpoints/1` document: tensors that are not identical, fields that differ, the sentence."""
    out = console()
    blocks = [row for row in document["rows"] if row["status"] == "quantised"]
    odd = [row for row in document["rows"] if row["status"] not in ("identical", "quantised")]
    odd.sort(key=lambda row: row["status"] in ("dtype", "tied"))  # what agrees comes last
    if odd:
        table = Table(header_style="bold", show_edge=False, pad_edge=False)
        for name in ("tensor", "status", "max |a - b|", "note"):
            table.add_column(name)
        for row in odd[:40]:
            name = row.get("tensor") or row.get("name") or ""
            table.add_row(escape(str(name)), row["status"], number(row.get("max_abs")), escape(row.get("note") or ""))
        out.print(table)
    for kind in dict.fromkeys(row["quantised"]["type"] for row in blocks):
        told = [row["quantised"] for row in blocks if row["quantised"]["type"] == kind]
        beyond = sum(one["wrong"] for one in told)
        most = f"at most {number(max(one['worst'] for one in told))} of what their codes allow"
        most = f"{beyond:,} as scales that were fitted after the codes leave them" if beyond else most
        out.print(f"{kind}: {len(told)} tensors, {sum(one['blocks'] for one in told):,} blocks, {most}", markup=False)
    for difference in document["config"]["differences"]:
        out.print(f"config {difference['field']}: {difference['a']} and {difference['b']}", markup=False)
    out.print(", ".join(f"{count} {status}" for status, count in document["counts"].items() if count))
    style = {"agree": "bold green", "diverged": "bold red"}.get(document["outcome"], "bold yellow")
    out.print(f"[{style}]{document['outcome'].upper()}[/]  {escape(document['verdict'])}", soft_wrap=True)


# As _AUDIT_COLUMNS.
_STAGE_COLUMNS = {
    "stage": (True, 0),
    "verdict": (True, 0),
    "cosine": (False, 1),
    "delta": (False, 2),
    "error / bound": (False, 0),
    "max |a - b|": (False, 3),
    "rms": (False, 4),
    "elements that differ": (False, 8),
    "bytes": (False, 5),
    "std b / a": (False, 6),
    "of": (False, 7),
}


def _stage_table(rows: Sequence[Mapping[str, Any]], width: int) -> Table:
    """One line per stage, the worst over layers or tensors: what a newcomer reads first."""
    columns = {name: _Column(name, *rank) for name, rank in _STAGE_COLUMNS.items()}
    for stage in dict.fromkeys(row["stage"] for row in rows):
        group = [row for row in rows if row["stage"] == stage]
        pairs = [row for row in group if row.get("byte_match") is not None]
        same = sum(bool(row["byte_match"]) for row in pairs)
        verdict = max((row["verdict"] for row in group), key=_severity)
        ratios = [(r, row) for row in group for r in (row["ratio_a"], row["ratio_b"]) if r is not None]
        different, count = sum(row.get("mismatched", 0) for row in group), sum(row.get("count", 0) for row in group)
        cells = {
            "stage": stage,
            "verdict": _styled(verdict, inherits=verdict == "exact" and same < len(pairs)),
            "cosine": wording.cosine(_lowest(group, "cosine")),
            "delta": wording.change(_steepest(group)),
            "error / bound": _ratio(*max(ratios, key=lambda r: r[0])) if ratios and verdict != "exact" else "-",
            "max |a - b|": number(_highest(group, "max_abs")),
            "rms": number(_highest(group, "rms")),
            "elements that differ": f"{different:,} of {count:,}" if count else "-",
            "bytes": _bytes(same, pairs, group),
            "std b / a": _furthest([row["std_ratio"] for row in group if row.get("std_ratio")]),
            "of": str(len(group)),
        }
        for name, cell in cells.items():
            columns[name].cells.append(cell)
    return _fitted(columns.values(), width)


def _steepest(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The largest fall of the cosine from the stage before; where it falls nowhere, the largest rise."""
    changes = [row["cosine_delta"] for row in rows if row.get("cosine_delta") is not None]
    return min(changes, default=None) if any(c < 0 for c in changes) else max(changes, default=None)


def _furthest(ratios: Sequence[float]) -> str:
    """The ratio furthest from 1, in enough digits to see that it is not 1."""
    return f"{max(ratios, key=lambda r: abs(math.log(r))):.6g}" if ratios else "-"


def _print_rows(rows: Sequence[Mapping[str, Any]], out: Console) -> None:
    columns = [
        _Column("where", True),
        _Column("stage", True),
        _Column("verdict", True),
        _Column("a / bound"),
        _Column("b / bound"),
        _Column("cosine", least=5),
        _Column("delta", least=6),
        _Column("max |a - b|", least=4),
        _Column("at", least=3),
        _Column("a", least=2),
        _Column("b", least=2),
    ]
    for row in rows[:_MOST]:
        cells = (
            escape(place_of(row)),
            row["stage"],
            _styled(row["verdict"]),
            wording.ratio(row["ratio_a"]),
            wording.ratio(row["ratio_b"]),
            wording.cosine(row.get("cosine")),
            wording.change(row.get("cosine_delta")),
            number(row.get("max_abs")),
            str(row.get("max_abs_index") or "-"),
            *wording.apart(row.get("max_abs_a"), row.get("max_abs_b")),
        )
        for column, cell in zip(columns, cells, strict=True):
            column.cells.append(cell)
    out.print(_fitted(columns, out.width, "Rows that need a look"))
    _notes(rows, out)


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


def layouts_document(document: Mapping[str, Any]) -> None:
    """A `svf.layouts/1` document: each tensor's residuals in units of its bound, and what fits."""
    out = console()
    names = list(document["tensors"][0]["residuals"]) if document["tensors"] else []
    table = _table("tensor", "declared", *names, "fits")
    for row in document["tensors"]:
        values = (number(row["residuals"][name]) for name in names)
        fits = "[yellow]unjudged[/]" if row["fits"] is None else ", ".join(row["matches"]) or "[bold red]none[/]"
        wrong = row["fits"] is False
        table.add_row(escape(row["tensor"]), row["declared"], *values, f"[bold red]{fits}[/]" if wrong else fits)
    out.print("Zero-offset residuals in units of their bound: at most 1 fits; a dash means no fit by shape.")
    out.print(table)
    for note in dict.fromkeys(row["note"] for row in document["tensors"] if row["note"]):
        of = [row["tensor"] for row in document["tensors"] if row["note"] == note]
        out.print(f"{of[0]}{f' and {len(of) - 1} more' if len(of) > 1 else ''}: {note}", markup=False, soft_wrap=True)
    style = {"agree": "bold green", "contradicted": "bold red"}.get(document["outcome"], "bold yellow")
    out.print(f"[{style}]{document['outcome'].upper()}[/]  {escape(document['verdict'])}", soft_wrap=True)


def calibrate_document(document: Mapping[str, Any]) -> None:
    """A `svf.calibrate/1` document: what each kind of stage was seen to do, and the lambda it is judged by."""
    out = console()
    for backend in document["backends"]:
        table = _table("kind", "worst error / noise", "lambda", "shipped", "RMS", "shipped RMS")
        for row in backend["kinds"]:
            changed = "yellow" if row["lambda"] > row["shipped"] else "default"
            shown = (number(row[name]) for name in ("shipped", "rms", "rms_shipped"))
            table.add_row(row["kind"], number(row["seen"]), f"[{changed}]{number(row['lambda'])}[/]", *shown)
        facts = backend["facts"]
        out.print(f"{backend['backend']} on {facts['device']}, {facts['cpu']}", markup=False)
        out.print(table)
        for fault in backend["faults"]:
            out.print(
                f"[bold red]FAULTY[/]  {escape(fault)}; the calibration is not kept, the shipped constants hold",
                soft_wrap=True,
            )
        if backend["file"]:
            out.print(f"[bold green]CALIBRATED[/]  kept in {escape(backend['file'])}", soft_wrap=True)


def report_document(document: Mapping[str, Any]) -> None:
    """What `svf report` wrote."""
    console().print(f"Report: {document['out']} ({document['bytes']:,} bytes)", markup=False, soft_wrap=True)


def probe_document(document: Mapping[str, Any]) -> None:
    """A `svf.probe/1` document: per backend, each stage's shapes and the order that each is summed in."""
    out = console()
    for backend, changed in document["threads_change"].items():
        runs = [run for run in document["runs"] if run["backend"] == backend]
        table = _table("stage", "M x N x K", "rows", "columns", "order")
        for item in runs[0]["items"]:
            shape = " x ".join(map(str, item["shape"]))
            for part in item["parts"]:
                table.add_row(item["what"], shape, part.get("rows", "-"), part.get("cols", "-"), part["words"])
            if item["note"]:
                table.add_row(item["what"], shape, "-", "-", f"[bold yellow]not revealed[/]: {escape(item['note'])}")
        threads = [str(run["threads"]) for run in runs]
        out.print(f"[bold]{backend}[/] on {runs[0]['device']}, on {' and '.join(threads)} threads")
        out.print(table)
        said = f"changes {', '.join(changed)}" if changed else "changes nothing here"
        if len(runs) > 1:
            out.print(f"Another count of threads {said}.")


def orders_document(document: Mapping[str, Any]) -> None:
    """A `svf.orders/1` document: each sum's order, or the best one and what it leaves."""
    out = console()
    table = _table("stage", "tensor", "K", "results", "not reproduced", "order")
    for row in document["rows"]:
        names = row["tensors"]
        tensor = names[0] if len(names) == 1 else f"{len(names)} tensors"
        order = row["words"] + (f" ({row['also_fit']} other orders fit as well)" if row["also_fit"] else "")
        if row["remaining"]:
            order = f"[bold yellow]none of {row['tried']} tried; best:[/] {order}"
        table.add_row(
            row["stage"], escape(tensor), f"{row['terms']:,}", f"{row['elements']:,}", f"{row['remaining']:,}", order
        )
        for part in row["parts"][1:]:
            table.add_row(
                "",
                "",
                "",
                f"{part['elements']:,}",
                "0",
                f"rows {part['rows']}, columns {part['cols']}: {part['order']}",
            )
    out.print(table)
    style = "bold green" if document["outcome"] == "complete" else "bold yellow"
    explained = f"the order explains every byte of {document['explained']} of {len(document['rows'])} sums"
    out.print(f"[{style}]{document['outcome'].upper()}[/]  {explained}", soft_wrap=True)


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
    for passed in document["gates"].values():
        out.print(f"--strict-reference-hash: {'[green]passed[/]' if passed else '[red]failed[/]'}")
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


def _bytes(same: int, pairs: Sequence[Any], group: Sequence[Mapping[str, Any]]) -> str:
    """How many of a stage's pairs have the same bytes; or which side alone has it."""
    if not pairs:
        sides = [side for side in "ab" if any(row[f"verdict_{side}"] for row in group)]
        return f"{sides[0]} alone" if len(sides) == 1 else "-"
    return "equal" if same == len(pairs) else f"equal in {same}" if same else "differ"


def _styled(verdict: str, *, inherits: bool = False) -> str:
    """`inherits`: right from its inputs, which differed already."""
    return f"[{_STYLES.get(verdict, 'bold red')}]{verdict}[/]" + (", inherits" if inherits else "")


def _severity(verdict: str) -> int:
    return list(Verdict).index(Verdict(verdict))
