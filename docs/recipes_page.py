"""docs/recipes.md and the table of floors: the rows of stages/recipes/ with the figures of docs/floors.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stages.jobs.stages import declared
from stages.recipes.catalogue import KINDS, kind_of
from stages.recipes.fewer_bits import NARROW
from stages.recipes.listing import ASKED, Line, form_lines, joined, joined_words, mod_lines
from stages.recipes.recipe import EVERY, Class, Kind
from stages.sums.candidates import BLOCK_SIZES, LANES, family
from stages.sums.orders import Blocks, Lanes, inside, joins
from stages.sums.orders import words as told

Floors = Sequence[Mapping[str, Any]]
# Sizes at which the benchmark ends; what is seen there is seen at any size.
_LEAST = -30


def row(cells: Sequence[str]) -> str:
    """A line of a table; a bar in a cell is told from one between cells."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def head(*cells: str) -> list[str]:
    return [row(cells), row(["---"] * len(cells))]


def page(recorded: Mapping[str, Any]) -> str:
    """docs/recipes.md, every kind of stage with its rows."""
    lines = [INTRODUCTION.replace("WORKED", "\n".join(worked(recorded["rows"]))).rstrip("\n"), ""]
    lines += [*head("stage", "section"), *contents(), ""]
    for kind in KINDS.values():
        lines += [
            f"## {kind.name}",
            "",
            kind.doc,
            "",
            f"Stages: {', '.join(f'`{name}`' for name in stages_of(kind))}.",
            "",
        ]
        lines += [*forms(kind, recorded["rows"]), *mods(kind)]
    lines += [FEWER.rstrip("\n"), "", *head("format", *EVERY, "of results too"), *formats(), ""]
    lines += [
        SUMMED.rstrip("\n"),
        "",
        *head("terms in", "of how many", "summed in each by", "their sums added"),
        *orders(),
    ]
    return "\n".join(lines) + "\n"


def stages_of(kind: Kind) -> list[str]:
    """The stages that have a kind's recipes, in any family."""
    found = [stage.name for _, stage in declared() if not stage.absent and kind_of(stage) is kind]
    return list(dict.fromkeys(found))


def dtypes_of(kind: Kind) -> list[str]:
    """In which dtypes the stages of a kind may be stored."""
    found = {stage.dtype for _, stage in declared() if not stage.absent and kind_of(stage) is kind}
    return [dtype for dtype in EVERY if "model" in found or dtype in found]


def contents() -> Iterator[str]:
    sections: dict[str, list[str]] = {}
    for kind in KINDS.values():
        for name in stages_of(kind):
            sections.setdefault(name, []).append(f"[{kind.name}](#{kind.name})")
    for name in dict.fromkeys(stage.name for _, stage in declared()):
        if name in sections:
            yield row([f"`{name}`", ", ".join(sections[name])])


def forms(kind: Kind, floors: Floors, only: str = "") -> Iterator[str]:
    """The table of a kind's forms, or of one; in a sound one's cell the smallest fault that is still seen beside it."""
    dtypes = dtypes_of(kind)
    yield from head(_shown_fault(kind, floors), *dtypes, "who does it")
    for line in joined(form_lines(kind)):
        if any(dtype in line.classes for dtype in dtypes) and only in ("", line.words):
            yield row([_words(line), *(_cell(kind, line, dtype, floors) for dtype in dtypes), _who(line)])
    yield ""


def _shown_fault(kind: Kind, floors: Floors) -> str:
    fault = next((one["fault"] for one in floors if one["kind"] == kind.name), None)
    return f"form (seen: {fault})" if fault else "form"


def _words(line: Line) -> str:
    return line.words + "".join(f" *({name})*" for name in line.asked)


def _who(line: Line) -> str:
    return "; ".join(text for text in (line.who, f"*usual*: {line.usual}" if line.usual else "") if text)


def _cell(kind: Kind, line: Line, dtype: str, floors: Floors) -> str:
    cls = line.classes.get(dtype)
    if cls is None:
        return "-"
    fault = next((one for one in floors if one["kind"] == kind.name and one["dtype"] == dtype), None)
    if fault is None or not cls.sound:
        return str(cls)
    alone = fault["prescribed"]
    if cls is Class.PRESCRIBED:
        return f"{cls}, {size(alone)}"
    if line.words not in fault["beside"]:
        return str(cls)
    beside = fault["beside"][line.words]
    said = f"{cls}, {size(beside)}"
    return f"**{said}**" if dear(alone, beside) else said


def dear(alone: int | None, beside: int | None) -> bool:
    """Whether a row costs more than a factor 2 of what is seen without it."""
    return alone is not None and (beside is None or beside > alone + 1)


def size(k: int | None) -> str:
    return "none" if k is None else "any" if k <= _LEAST else f"2^{k}"


def mods(kind: Kind) -> list[str]:
    words = joined_words(mod_lines(kind))
    return ["Other functions, each a `bug`:", "", *(f"- {text}" for text in words), ""] if words else []


def formats() -> Iterator[str]:
    for narrow in NARROW:
        holds = ["narrower" if dtype in narrow.dtypes else "-" for dtype in EVERY]
        yield row([narrow.words, *holds, "yes" if narrow.result else "no"])


def orders() -> Iterator[str]:
    """The orders of summation that are asked; in one line those that differ in numbers, or in how sums are added."""
    alike: dict[tuple[str, str], list[Blocks | Lanes]] = {}
    for order in family(max(BLOCK_SIZES) + 1):
        if "FMA" in told(order):
            continue
        match order:
            case Blocks(_, inner, _, centred):
                how = "consecutive blocks, the first and the last cut alike" if centred else "consecutive blocks"
                alike.setdefault((how, inside(inner)), []).append(order)
            case Lanes(_, inner, _, _, head):
                how = "interleaved lanes, as many terms before them in lane 0" if head else "interleaved lanes"
                alike.setdefault((how, inside(inner)), []).append(order)
            case _:
                yield row([told(order, "all"), "-", "-", "-"])
    for (how, inner), of in alike.items():
        sizes = sorted({one.size if isinstance(one, Blocks) else one.count for one in of} & {*BLOCK_SIZES, *LANES})
        said = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > len(LANES) else ", ".join(map(str, sizes))
        yield row([how, said, inner, "; ".join(dict.fromkeys(joins(one.outer) for one in of))])


def worked(floors: Floors) -> Iterator[str]:
    """Three rows as they stand below, each with how to read it; `AssertionError` where one stands there no more."""
    for name, words, read in WORKED:
        kind = KINDS[name]
        shown = list(forms(kind, floors, words))
        told = [f"- {text}" for text in mod_lines(kind) if text == words] or shown[2:-1]
        assert told, words
        seen = next(one["beside"].get(words) for one in floors if one["kind"] == name and one["dtype"] == "bfloat16")
        read = read.format(seen=size(seen))
        yield from [*(shown[:2] if told == shown[2:-1] else []), *told, "", f"[{name}](#{name}). {read}", ""]


WORKED = (
    (
        "norm",
        "times the weight in float32, rounded once",
        "A bfloat16 run that computes RMSNorm so is right, `exact` or `rounding`, although about a quarter of its "
        "numbers are not the prescribed ones (412 of 1,536 in a run of keras-hub). In float32 both are one recipe. A "
        "bfloat16 norm that is off by a factor of 1 + {seen} is still seen while this row is allowed.",
    ),
    (
        "scores",
        "the scale itself rounded to the storage dtype",
        "The right function in fewer bits: `precision`, which fails, with the words of this row. JAX does it by "
        "itself, so that with `--accept usual` the verdict is `accepted`, which passes.",
    ),
    (
        "rope",
        "pairs are interleaved (2i, 2i + 1), not halves (i, i + d/2)",
        "Another function, whoever computes it: `bug`, and these words are the hint.",
    ),
)

INTRODUCTION = """# Recipes: who rounds where

Generated by `make docs` from the rows in `stages/recipes/` and the figures in `docs/floors.json`; do not edit.

Two right programs seldom give the same bits. One rounds RMSNorm before it multiplies by the weight, another after;
one scales the scores, another q. A *recipe* is one way to compute a stage down to its roundings. `svf` asks which
recipe gives what was recorded. One that gives every number, within its own bound, explains the record: that is how a
right engine is told from a wrong one, and a lost bit from a wrong formula.

A recipe is a *form* and perhaps a *mod*. The form says where the stage is rounded, the mod which function stands in
its place. Three rows, to begin with.

WORKED
## How to read the tables

Each form has a *class* in each dtype in which a stage may be stored. The class decides the verdict:

| class | what it is | verdict |
|---|---|---|
| prescribed | rounded where the model's own code, `transformers`, rounds | `exact` with all bits, else `rounding` |
| equivalent | the same function, rounded elsewhere, in no fewer bits | `exact` or `rounding`; the recipe is named |
| narrower | the same function in fewer bits | `precision`, which fails; *usual* rows may be `accepted` |
| other | another function: every mod | `bug` |

Where no recipe gives the record, the verdict is `suspect`, or `bug` when no order of summation could give it
([verdicts.md](verdicts.md)).

- **-**: the row does not hold in that dtype; mostly, its numbers are there inside another row's bound.
- **2^-15** after a class: the smallest fault that is still seen while this row is allowed beside the prescribed one, in
  a small model (`benchmarks/floors.py`). The fault is the one in the head of the table, with s = 2^-15. *any*: as small
  as was tried, 2^-30, since it changes bits that are certain. **Bold**: beside this row a fault must be more than twice
  as large to be seen.
- **who does it**: *(ran)*: it was run, and its results are this recipe's. *(read)*: its source says so. A row without
  a name is one that nobody was yet seen to do. *usual*: which library does it by itself; the report says that too.
- *(deep)*: ASKED_DEEP. *(wider)*: ASKED_WIDER. *(unseen)*: ASKED_UNSEEN.

Beside the rows, any rounding between two stages may be left out in 16 bits: a fused kernel keeps in float32 what is
recorded rounded. The report says then *of unrounded* and the name of the input. Where no row fits, the narrower rows
of a norm, a softmax or an activation are asked once more, each with some of its roundings left out: *but not the
sum*. Two more explanations need no row: a weight of which a few elements, a row or a column are wrong, and one number
that all values are times what they should be. In float32 no row knows another library's exponential:
`--natives` asks PyTorch's and JAX's own functions for the last bits, and then [orders of
summation](#orders-of-summation). `svf stages NAME` prints the rows of one stage.

## Which section a stage is in
"""
for _name, _text in ASKED.items():
    INTRODUCTION = INTRODUCTION.replace(f"ASKED_{_name.upper()}", _text)

FEWER = """## Fewer bits

Any stage may have been computed in a narrower format: its operands, some of them, its result, or both. All of these
are *narrower*, and the words say what has how many bits: *its weights have 10 mantissa bits, TF32-like*. Where two
formats give the same numbers, both are told.
"""


SUMMED = """## Orders of summation

In float32 the last bits of a product, or of a norm's squares, tell the order of its sum. With `--natives`, where
neither backend's own functions give all bits, these orders are asked, of the products and norms of a float32 run: each
with products rounded before they are added, and by FMA. A stage that one of them gives to the last bit is `exact`, and
named by it (*K in blocks of 192, an FMA chain in each, blocks added left to right*). They are equivalent, like every
order: the bound of a product holds for them all. Blocks also have the sizes that part K into 2 to 8; the terms
that are left over when K is no multiple of the lanes are dealt on, chained to lane 0, or summed and added to it.
`svf infer` finds the same orders, margins too.
"""


def floors_table(recorded: Mapping[str, Any]) -> list[str]:
    """Old and new floors, for docs/selftest.md."""
    faults = list(dict.fromkeys((one["stage"], one["fault"]) for one in recorded["rows"]))
    found = {(one["stage"], one["fault"], one["dtype"]): one for one in recorded["rows"]}
    lines = [FLOORS.rstrip("\n"), "", *head("stage", "fault", *EVERY)]
    for stage, fault in faults:
        cells = [found.get((stage, fault, dtype)) for dtype in EVERY]
        lines.append(row([f"`{stage}`", fault, *(_old_and_new(cell) for cell in cells)]))
    return lines


def _old_and_new(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    old, new = (size(found[name]) for name in ("former", "judged"))
    return old if old == new else f"{old} to {new}"


FLOORS = """## The smallest fault that is seen

By the judge as it was before [recipes](recipes.md), and by the judge as it is: the least s = 2^k such that a fault of
that size and every larger one fails. One number: nothing changed. *any*: as small as was tried, 2^-30. Measured by
`benchmarks/floors.py` on a Qwen3 of hidden size 64 and 24 tokens, and a replay of rank 16; the worst of two layers.
"""
