"""What the page says: a document's fields as headings, tables and words, in the order a person reads them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.culprit_data import chosen_row
from stages.diff import place_of
from stages.forward_job import sound
from stages.render import production_line
from stages.report.document import AUDIT, FORWARD
from stages.report.grid import BOTH, Grid, Row, grid, is_culprit
from stages.wording import number

Document = Mapping[str, Any]
TONES = {"agree": "good", "sound": "good", "diverged": "bad", "faulty": "bad"}
DIFFERENCE = {True: "max |error|", False: "max |a − b|"}  # of an audit, of a comparison
NO_COMMAND = "not recorded: this document was made by an older svf, or not by its command line"


@dataclass(frozen=True)
class Table:
    """A table of texts; `words` are columns of words, the others are numbers; `marked` rows need a look."""

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: frozenset[str] = frozenset()
    marked: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Card:
    """One stage looked at closely."""

    title: str
    facts: list[tuple[str, str]]
    hint: str | None
    worst: Table | None
    data: Mapping[str, Any] | None
    why_none: str


@dataclass(frozen=True)
class View:
    """The page: every part that a document does not have is empty."""

    outcome: str
    tone: str
    verdict: str
    coverage: str
    command: str
    sides: list[tuple[str, str]]
    kind: str = ""
    rows: Sequence[Row] = ()
    grid: Grid | None = None
    side: str = ""
    card: Card | None = None
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    all_rows: Table | None = None
    facts: Table | None = None


def view(document: Document) -> View:
    """The page of a document of any schema that has a report."""
    if document["schema"] == FORWARD:
        return _forward_view(document)
    return _rows_view(document, audit=document["schema"] == AUDIT)


def _rows_view(document: Document, *, audit: bool) -> View:
    rows, culprit, coverage = document["rows"], document["culprit"], document["coverage"]
    cells = grid(rows, culprit) if rows else None
    done = ("judged" if audit else "compared", coverage["judged" if audit else "compared"])
    return View(
        outcome=document["outcome"],
        tone=TONES.get(document["outcome"], "open"),
        verdict=document["verdict"],
        coverage=f"{done[1]} of {coverage['expected']} stages {done[0]}",
        command=document.get("command") or NO_COMMAND,
        sides=[("", document["source"])] if audit else [(s, document[s]["source"]) for s in "ab"],
        kind=document.get("kind", "replay"),
        rows=rows,
        grid=cells,
        side="" if cells is None or audit else (culprit["side"] if culprit and culprit["side"] in ("a", "b") else BOTH),
        card=_card(document, audit=audit),
        notes=_notes(document),
        tables=[t for t in (_layouts(document), _zero_offset(document), _basis(document)) if t is not None],
        all_rows=_all_rows(rows, culprit, audit=audit) if rows else None,
        facts=_facts([document] if audit else [document["a"], document["b"]]),
    )


def _card(document: Document, *, audit: bool) -> Card | None:
    chosen = chosen_row(document)
    if chosen is None:
        return None
    (row, why), data = chosen, document.get("culprit_data")
    data = data if data and data["key"] == row["key"] else None
    culprit = document["culprit"]
    heading = "The culprit" if why == "culprit" else why.capitalize()
    side = {"a": "a", "b": "b", "both": "both sides"}.get((culprit or {}).get("side") or "")
    facts = [("verdict", row["verdict"]), ("wrong side", side)] if side else [("verdict", row["verdict"])]
    names = ("ratio",) if audit else ("ratio_a", "ratio_b")
    facts += [(f"error / bound {n[6:]}".strip(), number(row.get(n))) for n in names]
    facts += [(DIFFERENCE[audit], number(row.get("max_abs"))), ("at", _index(row.get("max_abs_index")))]
    facts += [("relative L2", number(row.get("rel_l2"))), ("cosine", _cosine(row.get("cosine")))]
    facts += [("elements that differ", _of(row)), ("bytes", _bytes(row))]
    hint = (culprit or {}).get("hint") if why == "culprit" else None
    return Card(
        f"{heading}: {row['stage']} of {place_of(row)}", facts, hint, _worst(data), data, _why_no_data(row, document)
    )


def _why_no_data(row: Row, document: Document) -> str:
    if row["verdict"] in ("shape", "missing", "extra"):
        return f"No figures: the two sides have no elements in common here ({row['verdict']})."
    if "culprit_data" in document:
        return "No figures: the elements of this stage could not be read when the document was made."
    return "No figures: this document has no culprit_data. Make it again with --html, or from dumps with svf diff."


def _worst(data: Mapping[str, Any] | None) -> Table | None:
    if not data or not data["worst"]:
        return None
    a, b = data["labels"]
    rows = [
        (_index(x["index"]), f"{x['a']:.9g}", f"{x['b']:.9g}", number(float(x["abs"])), f"{x['ulps']:+,}")
        for x in data["worst"]
    ]
    return Table("Worst coordinates", ("index", a, b, "|difference|", "ULP"), rows, frozenset({"index"}))


def _notes(document: Document) -> list[str]:
    """Sentences about gates, logits and the production models."""
    notes = [f"Gate --{g.replace('_', '-')}: {'passed' if ok else 'failed'}" for g, ok in _items(document, "gates")]
    logits = document.get("logits")
    if logits:
        notes.append(
            f"Top-1 tokens equal at {logits['top1_agreement']:.0%} of positions, top-5 at "
            f"{logits['top5_agreement']:.0%}; KL at most {logits['kl']:.2g}; next token {logits['next_token_a']} and "
            f"{logits['next_token_b']}, margin {number(logits['margin'])}."
        )
    for letter in ("a", "b"):
        run = document.get(letter, {}).get("run")
        if run and "production" in run:
            notes.append(f"{letter}: {production_line(run)}")
    return notes


def _items(document: Document, name: str) -> Iterable[tuple[str, Any]]:
    return document.get(name, {}).items()


def _layouts(document: Document) -> Table | None:
    rows = document.get("layouts")
    if not rows:
        return None
    cells = [
        (
            r["tensor"],
            r["layout"],
            "no, by shape" if r["relative"] is None else "yes" if r["fits"] else "no",
            number(r["zero_offset_max_abs"]),
            number(r["relative"]),
            number(r["bound"]),
        )
        for r in rows
    ]
    columns = ("tensor", "layout", "gives the source back", "max error", "relative", "bound")
    return Table("Layouts of V, by the zero-offset replay", columns, cells, frozenset(columns[:3]))


def _zero_offset(document: Document) -> Table | None:
    """The zero-offset error of the layout that was used; in `layouts` where several were tried."""
    rows = document.get("zero_offset")
    if not rows or document.get("layouts"):
        return None
    letters = ("a", "b") if "fits_a" in rows[0] else ("",)
    names = [(letter, f"_{letter}" if letter else "") for letter in letters]
    columns = ("tensor", "layout", *(f"fits {x}".strip() for x in letters), *(f"relative {x}".strip() for x in letters))
    cells = [
        (
            r["tensor"],
            r["layout"],
            *(_yes(r[f"fits{end}"]) for _, end in names),
            *(number(r[f"relative{end}"]) for _, end in names),
            number(r["bound"]),
        )
        for r in rows
    ]
    bad = frozenset(i for i, r in enumerate(rows) if any(r[f"fits{end}"] is False for _, end in names))
    words = frozenset(columns[: 2 + len(letters)])
    return Table("Zero offsets give the source back", (*columns, "bound"), cells, words, bad)


def _basis(document: Document) -> Table | None:
    """What is known of the basis, field by field, when the run looked into it."""
    basis = document.get("basis")
    rows = basis if isinstance(basis, list) else [basis] if isinstance(basis, dict) else []
    if not rows:
        return None
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    cells = [tuple(_value(row.get(name)) for name in columns) for row in rows]
    words = frozenset(name for name in columns if any(isinstance(row.get(name), str) for row in rows))
    return Table("Basis of the decomposition", columns, cells, words)


def _all_rows(rows: Sequence[Row], culprit: Row | None, *, audit: bool) -> Table:
    ratios = ("ratio",) if audit else ("ratio_a", "ratio_b")
    verdicts = () if audit else ("verdict_a", "verdict_b")
    columns = ("where", "stage", "verdict", *(v[-1] for v in verdicts))
    columns += tuple(f"error / bound {r[6:]}".strip() for r in ratios)
    columns += (DIFFERENCE[audit], "at", "relative L2", "cosine", "differ", "bytes", "note")
    cells = [
        (
            place_of(row) + (" ◆ culprit" if is_culprit(row, culprit) else ""),
            row["stage"],
            row["verdict"],
            *(row.get(v) or "-" for v in verdicts),
            *(number(row.get(r)) for r in ratios),
            number(row.get("max_abs")),
            _index(row.get("max_abs_index")),
            number(row.get("rel_l2")),
            _cosine(row.get("cosine")),
            _of(row),
            _bytes(row),
            "; ".join(str(row[n]) for n in ("note", "hint", "hint_a", "hint_b") if row.get(n)),
        )
        for row in rows
    ]
    words = frozenset({"where", "stage", "verdict", "a", "b", "at", "bytes", "note"})
    marked = frozenset(i for i, row in enumerate(rows) if row["verdict"] not in ("exact", "rounding"))
    return Table("All rows, in execution order", columns, cells, words, marked)


def _facts(sides: Sequence[Mapping[str, Any]]) -> Table | None:
    facts = [side["facts"] for side in sides]
    names = list(dict.fromkeys(name for side in facts for name in side))
    if not names:
        return None
    rows, marked = [], set()
    for at, name in enumerate(names):
        values = [_value(side[name]) if name in side else "-" for side in facts]
        note = _unlike(name, facts)
        rows.append((name, *values, *([note] if len(facts) > 1 else [])))
        marked |= {at} if note.startswith("≠") else set()
    columns = ("fact", "value") if len(facts) == 1 else ("fact", "a", "b", "")
    caption = "Facts of the run" if len(facts) == 1 else "Facts of both sides"
    return Table(caption, columns, rows, frozenset(columns), frozenset(marked))


def _unlike(name: str, facts: Sequence[Mapping[str, Any]]) -> str:
    """How the sides' values of a fact differ, in words."""
    have = [letter for letter, side in zip("ab", facts, strict=False) if name in side]
    if len(have) < len(facts):
        return f"only {have[0]}"
    return "≠ differs" if len({str(side[name]) for side in facts}) > 1 else ""


def _forward_view(document: Document) -> View:
    """One backend's forward: nothing is judged stage by stage, so there is no map."""
    ran, good = document["production"]["ran"], sound(dict(document))
    top = [(str(t["token"]), number(float(t["logit"]))) for t in document["top5"]]
    tokens, layers, stages = (len(document[name]) for name in ("tokens", "layers", "stages"))
    notes = [
        f"{tokens} tokens, {layers} layers and {stages} stages traced, next token {document['next_token']}.",
        "No stage was judged here: write a dump with --out, then svf audit DUMP --html, or svf diff with another one.",
    ]
    repeated = document.get("deterministic")
    if repeated:
        different = f"{repeated['different_elements']:,} of {repeated['elements']:,}"
        notes.append(f"{repeated['runs']} runs: {different} elements differ from the first.")
    return View(
        outcome=("sound" if ran else "not compared") if good else "diverged",
        tone=("good" if ran else "open") if good else "bad",
        verdict=production_line(document),
        coverage="one side: production model " + ("compared" if ran else "not run"),
        command=document.get("command") or NO_COMMAND,
        sides=[("", f"{document['backend']} forward of {document['model']}, {document['dtype']}")],
        notes=notes,
        tables=[Table("Largest logits of the last position", ("token", "logit"), top)],
        facts=_facts([document]),
    )


def _index(value: Any) -> str:
    return "-" if value is None else "[" + ", ".join(str(int(i)) for i in value) + "]"


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.9f}"


def _of(row: Row) -> str:
    return f"{row['mismatched']:,} of {row['count']:,}" if row.get("count") else "-"


def _bytes(row: Row) -> str:
    return "-" if row.get("byte_match") is None else "equal" if row["byte_match"] else "differ"


def _yes(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "no"


def _value(value: Any) -> str:
    """A field's value in words, whatever it is: clusters of a basis are lists of objects."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(item)}" for name, item in value.items())
    if isinstance(value, list):
        return "; ".join(_value(item) for item in value) or "-"
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    return _yes(value) if isinstance(value, bool) else number(value)
