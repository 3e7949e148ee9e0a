"""What `svf stages` says, as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stages.recipes.listing import ASKED, Line, joined, joined_words
from stages.show.console import console


def stages_document(document: Mapping[str, Any]) -> None:
    """A `svf.stages/1` document: every stage in a line each, or one stage with its recipes."""
    lines = _list(document["stages"]) if "stages" in document else _one(document)
    for line in lines:
        console().print(line, markup=False, highlight=False, soft_wrap=True)


def _list(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    wide = max(len(row["stage"]) for row in rows)
    for row in rows:
        yield f"{row['stage']:{wide}}  {row['doc']}"


def _one(document: Mapping[str, Any]) -> Iterator[str]:
    yield document["stage"]
    for row in document["declared"]:
        yield from _declaration(row)
    for recipes in document["recipes"]:
        yield from _recipes(recipes)


def _declaration(row: Mapping[str, Any]) -> Iterator[str]:
    yield f"  {', '.join(row['in'])}: {row['doc']}"
    if row["absent"]:
        return
    noise = row["noise"] if row["lambda"] is None else f"{row['noise']}, lambda {row['lambda']:g}"
    facts = {
        "from": ", ".join(row["inputs"]),
        "with": ", ".join(row["params"]),
        "options": ", ".join(row["options"]),
        "shape": f"{row['shape']}, {'in the dtype of the activations' if row['dtype'] == 'model' else row['dtype']}",
        "rounding": noise,
    }
    for name, value in facts.items():
        if value:
            yield f"    {name:10}{value}"


def _recipes(recipes: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield f"Recipes: {recipes['kind']}. {recipes['doc']}"
    for line in joined([Line(**form) for form in recipes["forms"]]):
        yield f"  {line.words}"
        yield f"    {by_class(line)}{said(line)}"
    fewer = [f"{row['format']}: {', '.join(row['of'])}" for row in recipes["fewer_bits"]]
    mods = joined_words(recipes["mods"])
    for title, words in (("Another function (class other)", mods), ("In fewer bits (class narrower)", fewer)):
        if words:
            yield f"{title}:"
            yield from (f"  {text}" for text in words)


def by_class(line: Line) -> str:
    """A form's class, by dtype where it is not the same in all that it holds for."""
    classes: dict[str, list[str]] = {}
    for dtype, cls in line.classes.items():
        classes.setdefault(str(cls), []).append(dtype)
    return "; ".join(f"{cls} in {', '.join(dtypes)}" for cls, dtypes in classes.items())


def said(line: Line) -> str:
    """Who computes so, and when it is asked."""
    usual = f"usual: {line.usual}" if line.usual else ""
    asked = ", ".join(ASKED[name] for name in line.asked)
    return "".join(f". {text}" for text in (line.who, usual, asked) if text)
