"""What the page says: a document's fields as headings, tables and words, in the order a person reads them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.judge import wording
from stages.judge.culprit import chosen_row
from stages.judge.document import place_of
from stages.judge.next_steps import closer
from stages.judge.production import sound
from stages.judge.wording import number
from stages.show.console import production_line
from stages.show.html.document import AUDIT, FORWARD
from stages.show.html.grid import BOTH, SHADES, Grid, Row, grid, is_culprit

Document = Mapping[str, Any]
TONES = {"agree": "good", "sound": "good", "diverged": "bad", "faulty": "bad"}
DIFFERENCE = {True: "max |error|", False: "max |a − b|"}  # of an audit, of a comparison
# What the shades of the map mean, in their order.
LEGEND = (
    *((shade, f"to {most:g}" if most != 1 else "to 1, the bound") for shade, most in SHADES.items() if most < math.inf),
    ("o3", "more"),
    ("calm", "= exact, ? not judged"),
    ("odd", "no number"),
)
NO_COMMAND = "not recorded: this document was made by an older svf, or not by its command line"


@dataclass(frozen=True)
class Table:
    """A table of texts; `words` are columns of words, the others are numbers; `marked` rows need a look.

    `refs` are the document's rows that the table's are of, so that a click shows one; `long` has a box of its own.
    """

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: frozenset[str] = frozenset()
    marked: frozenset[int] = frozenset()
    refs: Sequence[int] = ()
    long: bool = False


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
    strip: list[tuple[str, str]]
    markdown: str = ""
    failed: Table | None = None
    details: list[dict[str, Any]] = field(default_factory=list)
    kind: str = ""
    rows: Sequence[Row] = ()
    grid: Grid | None = None
    side: str = ""
    card: Card | None = None
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    all_rows: Table | None = None
    facts: Table | None = None
    one_sided: bool = False
    legend: tuple[tuple[str, str], ...] = LEGEND


def view(document: Document) -> View:
    """The page of a document of any schema that has a report."""
    if document["schema"] == FORWARD:
        return _forward_view(document)
    return _rows_view(document, audit=document["schema"] == AUDIT)


def _rows_view(document: Document, *, audit: bool) -> View:
    rows, culprit, coverage = document["rows"], document["culprit"], document["coverage"]
    cells = grid(rows, culprit) if rows else None
    sides = [("", document["source"])] if audit else [(s, document[s]["source"]) for s in "ab"]
    strip = _strip(document, [document] if audit else [document["a"], document["b"]])
    done = ("judged" if audit else "compared", coverage["judged" if audit else "compared"])
    return View(
        outcome=document["outcome"],
        tone=TONES.get(document["outcome"], "open"),
        verdict=document["verdict"],
        coverage=f"{done[1]} of {coverage['expected']} stages {done[0]}",
        command=document.get("command") or NO_COMMAND,
        sides=sides,
        strip=strip,
        markdown=_markdown(document, sides, strip, audit=audit),
        failed=_failed(rows, document, audit=audit),
        details=[_detail(row, document, audit=audit) for row in rows],
        kind=document.get("kind", "replay"),
        rows=rows,
        grid=cells,
        side="" if cells is None or audit else (culprit["side"] if culprit and culprit["side"] in ("a", "b") else BOTH),
        card=_card(document, audit=audit),
        notes=_notes(document),
        tables=[t for t in (_layouts(document), _zero_offset(document), _basis(document)) if t is not None],
        all_rows=_all_rows(rows, culprit, audit=audit) if rows else None,
        facts=_facts([document] if audit else [document["a"], document["b"]]),
        one_sided=audit,
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
    facts += [(f"error / bound {n[6:]}".strip(), wording.ratio(row.get(n))) for n in names]
    facts += _numbers(row, audit=audit)
    hint = (culprit or {}).get("hint") if why == "culprit" else None
    return Card(
        f"{heading}: {row['stage']} of {place_of(row)}", facts, hint, _worst(data), data, _why_no_data(row, document)
    )


def _numbers(row: Row, *, audit: bool) -> list[tuple[str, str]]:
    """What is known of a row's error beside its bound; nothing for what the row does not have."""
    one, other = ("expected", "got") if audit else ("a", "b")
    pair = wording.apart(row.get(f"max_abs_{one}"), row.get(f"max_abs_{other}"))
    facts = [(DIFFERENCE[audit], number(row.get("max_abs"))), ("at", _index(row.get("max_abs_index")))]
    facts += [(one, pair[0]), (other, pair[1]), ("relative L2", number(row.get("rel_l2")))]
    facts += [("RMS", number(row.get("rms"))), ("cosine", wording.cosine(row.get("cosine")))]
    facts += [("change of cosine", wording.change(row.get("cosine_delta"))), ("elements that differ", _of(row))]
    facts += [
        ("bytes", _bytes(row)),
        (f"std {other} / {one}", number(row.get("std_ratio"))),
        ("dtype", row.get("dtype") or "-"),
    ]
    facts += [("error RMS", number(row.get("error_rms"))), ("bound RMS", number(row.get("bound_rms")))]
    for name in ("worst_token", "worst_column"):
        if row.get(name):
            line = row[name]
            facts.append(
                (name.replace("_", " "), f"{_index(line['index'])}, RMS {number(line['rms_ratio'])} of its bound")
            )
    return [(name, value) for name, value in facts if value != "-"]


def _detail(row: Row, document: Document, *, audit: bool) -> dict[str, Any]:
    """What a click on a cell shows: numbers, worst elements, hints, the command that looks closer."""
    facts = [("verdict", str(row["verdict"]))]
    for side in ("",) if audit else ("a", "b"):
        end = f"_{side}" if side else ""
        if row.get(f"ratio{end}") is not None:
            verdict = f", {row[f'verdict{end}']}" if side else ""
            facts.append((f"error / bound {side}".strip(), f"{wording.ratio(row[f'ratio{end}'])}{verdict}"))
    names = ("expected", "got") if audit else ("a", "b")
    culprits = document.get("culprits") or [document["culprit"]]
    found = next((c for c in culprits if is_culprit(row, c)), None)
    hints = [found.get("hint") if found else None, *(row.get(n) for n in ("note", "hint", "hint_a", "hint_b"))]
    return {
        "title": f"{row['stage']} of {place_of(row)}",
        "facts": [*facts, *_numbers(row, audit=audit)],
        "hints": list(dict.fromkeys(str(hint) for hint in hints if hint)),
        "columns": ["index", *names, "|difference|"],
        "worst": [
            [_index(x["index"]), *wording.apart(x["a"], x["b"]), number(float(x["abs"]))]
            for x in (row.get("top") or [])[:_WORST]
        ],
        "command": " && ".join(closer(document, row, "--html", "closer.html")) or None,
    }


# Worst elements of a cell: the culprit's card has more.
_WORST = 3


def _failed(rows: Sequence[Row], document: Document, *, audit: bool) -> Table | None:
    """The rows that need a look, the gravest first, each with what is known of the reason."""
    at = {id(row): n for n, row in enumerate(rows)}
    grave = sorted((r for r in rows if r["verdict"] not in ("exact", "rounding", "given")), key=lambda r: -_grave(r))
    if not grave:
        return None
    ends = ("",) if audit else ("_a", "_b")
    cells = [
        (
            row["stage"],
            place_of(row),
            row["verdict"],
            *(wording.ratio(row.get(f"ratio{end}")) for end in ends),
            number(row.get("max_abs")),
            "; ".join(_detail(row, document, audit=audit)["hints"]) or "-",
        )
        for row in grave
    ]
    columns = (
        "stage",
        "where",
        "verdict",
        *(f"error / bound {end[1:]}".strip() for end in ends),
        DIFFERENCE[audit],
        "why",
    )
    caption = f"{len(grave)} of {len(rows)} rows need a look"
    words = frozenset({"stage", "where", "verdict", "why"})
    return Table(caption, columns, cells, words, refs=[at[id(row)] for row in grave], long=True)


def _grave(row: Row) -> int:
    order = ["bug", "precision", "suspect", "misrecorded"]
    return len(order) - order.index(row["verdict"]) if row["verdict"] in order else 0 - (row["verdict"] == "unjudged")


def _strip(document: Document, sides: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What was run, on what, and when: what a reader wants to know before the verdict is worth anything."""
    about, made = document.get("about") or {}, document.get("made") or {}
    tensors = {row["tensor"] for row in document.get("rows") or () if row.get("tensor") is not None}
    strip = [("Model", about.get("model")), ("dtype", about.get("dtype")), ("Tokens", about.get("tokens"))]
    strip += [("Tensors", len(tensors) or None), ("Layers", about.get("layers"))]
    for letter, side in zip(("",) if len(sides) == 1 else ("a", "b"), sides, strict=True):
        strip.append((f"Computed by {letter}".strip(), _engine(side.get("facts") or {})))
    strip += [("svf", made.get("svf")), ("Made", made.get("at"))]
    return [(name, _value(value)) for name, value in strip if value not in (None, "")]


def _engine(facts: Mapping[str, Any]) -> str:
    backend = str(facts.get("backend") or "")
    if not backend:
        return "another program" if facts else ""
    version = facts.get(backend) or facts.get("numpy") or ""
    precision = facts.get("precision")
    parts = [f"{backend} {version}".strip(), f"on {facts['device']}" if facts.get("device") else ""]
    return " ".join(filter(None, parts)) + (f", {precision} precision" if precision not in (None, "native") else "")


def _markdown(
    document: Document, sides: Sequence[tuple[str, str]], strip: Sequence[tuple[str, str]], *, audit: bool
) -> str:
    """The finding for an issue. Every text of the document is a code span: nothing in it is markup, link or mention."""
    lines = [f"**svf: {document['outcome']}**", "", _code(document["verdict"]), ""]
    lines += [f"- {f'side {letter}' if letter else 'source'}: {_code(source)}" for letter, source in sides]
    lines += [f"- {name}: {_code(value)}" for name, value in strip]
    chosen = chosen_row(document)
    if chosen is not None:
        detail = _detail(chosen[0], document, audit=audit)
        lines += ["", f"{chosen[1].capitalize()}: {_code(detail['title'])}", ""]
        lines += [f"- {name}: {_code(value)}" for name, value in detail["facts"]]
        lines += [f"- hint: {_code(hint)}" for hint in detail["hints"]]
    return "\n".join([*lines, "", f"Command: {_code(document.get('command') or NO_COMMAND)}", ""])


def _code(text: str) -> str:
    """A Markdown code span; its fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}"


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
    columns += (DIFFERENCE[audit], "at", "relative L2", "cosine", "delta", "differ", "bytes", "note")
    cells = [
        (
            place_of(row) + (" ◆ culprit" if is_culprit(row, culprit) else ""),
            row["stage"],
            row["verdict"],
            *(row.get(v) or "-" for v in verdicts),
            *(wording.ratio(row.get(r)) for r in ratios),
            number(row.get("max_abs")),
            _index(row.get("max_abs_index")),
            number(row.get("rel_l2")),
            wording.cosine(row.get("cosine")),
            wording.change(row.get("cosine_delta")),
            _of(row),
            _bytes(row),
            "; ".join(str(row[n]) for n in ("note", "hint", "hint_a", "hint_b") if row.get(n)),
        )
        for row in rows
    ]
    words = frozenset({"where", "stage", "verdict", "a", "b", "at", "bytes", "note"})
    marked = frozenset(i for i, row in enumerate(rows) if row["verdict"] not in ("exact", "rounding", "given"))
    return Table("All rows, in execution order", columns, cells, words, marked, range(len(rows)), long=True)


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
    rows = document.get("stats") or []
    about = {"model": document["model"], "dtype": document["dtype"], "tokens": tokens, "layers": layers}
    strip = _strip({**document, "about": about, "rows": ()}, [document])
    sides = [("", f"{document['backend']} forward of {document['model']}, {document['dtype']}")]
    outcome = ("sound" if ran else "not compared") if good else "diverged"
    repeated = document.get("deterministic")
    if repeated:
        different = f"{repeated['different_elements']:,} of {repeated['elements']:,}"
        notes.append(f"{repeated['runs']} runs: {different} elements differ from the first.")
    return View(
        outcome=outcome,
        tone=("good" if ran else "open") if good else "bad",
        verdict=production_line(document),
        coverage="one side: production model " + ("compared" if ran else "not run"),
        command=document.get("command") or NO_COMMAND,
        sides=sides,
        strip=strip,
        markdown=_forward_markdown(document, outcome, strip, notes),
        rows=rows,
        kind="statistics",
        notes=notes,
        tables=[Table("Largest logits of the last position", ("token", "logit"), top)],
        all_rows=_statistics(rows) if rows else None,
        facts=_facts([document]),
        one_sided=True,
    )


def _forward_markdown(document: Document, outcome: str, strip: Sequence[tuple[str, str]], notes: Sequence[str]) -> str:
    lines = [f"**svf: {outcome}**", "", _code(production_line(document)), ""]
    lines += [f"- {name}: {_code(value)}" for name, value in strip] + [f"- {_code(note)}" for note in notes]
    return "\n".join([*lines, "", f"Command: {_code(document.get('command') or NO_COMMAND)}", ""])


def _statistics(rows: Sequence[Row]) -> Table:
    columns = ("where", "stage", "mean", "std", "min", "max", "count", "not finite")
    numbers = ("mean", "std", "min", "max", "count", "nonfinite")
    cells = [(place_of(row), row["stage"], *(number(row[name]) for name in numbers)) for row in rows]
    marked = frozenset(i for i, row in enumerate(rows) if row["nonfinite"])
    return Table("Statistics of every stage", columns, cells, frozenset(columns[:2]), marked, long=True)


def _index(value: Any) -> str:
    return "-" if value is None else "[" + ", ".join(str(int(i)) for i in value) + "]"


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
