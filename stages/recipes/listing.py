"""The rows as a reader wants them: words without a stage at hand, rows that say the same in one line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stages.recipes.catalogue import held
from stages.recipes.fewer_bits import NARROW, Narrow, ways
from stages.recipes.recipe import EVERY, Class, Form, Kind
from stages.spec.stage import Stage


class _Word(str):
    """Stands for a number that only a stage at hand has, in whatever format."""

    def __format__(self, _: str) -> str:
        return str(self)


_ANY = "any number"
_NAMES = {
    **dict.fromkeys(("eps", "rope_theta"), "the model's"),
    "fit": _ANY,
    "other_layouts": "another layout has it",
    "layout": "otherwise",
    "turned": "transposed, or labelled as transposed",
}
# What may differ between two rows of one line.
_NUMBER = re.compile(rf"{_ANY}|(?<![\w.])\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.])")


@dataclass(frozen=True)
class Line:
    """A form in words: its class by storage dtype, who does it, and what `asked` says of when it is tried."""

    words: str
    classes: Mapping[str, Class]
    who: str = ""
    usual: str = ""
    asked: tuple[str, ...] = ()


def plain(words: str, dtype: str | None = None) -> str:
    """A row's words of no stage in particular, stored in `dtype`."""
    names = {**_NAMES, "dtype": dtype or "the storage dtype"}
    return words.format(**{name: _Word(word) for name, word in names.items()})


def form_lines(kind: Kind, dtype: str | None = None) -> list[Line]:
    """The forms of a kind in their order, of one storage dtype those that hold for it; alike in all but dtype: one."""
    found: dict[tuple[Any, ...], Line] = {}
    for form in kind.forms:
        asked = EVERY if dtype is None else (held(dtype),)
        classes = {name: cls for name in asked if (cls := form.of(name)) is not None}
        line = Line(plain(form.words, dtype), classes, form.who, _usual(form, dtype), _asked(form))
        if classes:
            key = (line.words, line.usual, line.asked)
            first = found.get(key)
            who = "; ".join(dict.fromkeys(w for of in (first, line) if of for w in of.who.split("; ") if w))
            both = {**(first.classes if first else {}), **classes}
            found[key] = replace(line, classes={name: both[name] for name in EVERY if name in both}, who=who)
    return list(found.values())


def _usual(form: Form, dtype: str | None) -> str:
    if dtype is not None:
        return plain(form.usual_of(held(dtype)), dtype)
    some = "" if set(form.classes) <= set(form.usual_in) else " and ".join(form.usual_in)
    return plain(form.usual, some or None)


# What a form's flags say of when it is asked, in words.
ASKED = {
    "deep": "computes again what is before its inputs",
    "wider": "has the prescribed one's numbers and a wider bound",
    "unseen": "asked only where inputs were not recorded",
}


def _asked(form: Form) -> tuple[str, ...]:
    return tuple(name for name in ASKED if getattr(form, name))


def mod_lines(kind: Kind) -> list[str]:
    """The other functions of a kind, in words."""
    return [plain(mod.words) for mod in kind.mods]


def bits_lines(stage: Stage, dtype: str | None = None) -> list[tuple[Narrow, list[str]]]:
    """Formats in which a stage may have been computed, and of each what of it may have had so few bits."""
    arguments = [True] * (len(stage.inputs) + len(stage.params))
    return [
        (
            narrow,
            [
                words.removesuffix(narrow.words).rsplit(maxsplit=1)[0]
                for words, _ in ways(stage.inputs, arguments, narrow)
            ],
        )
        for narrow in NARROW
        if narrow.holds(stage, narrow.dtypes[0] if dtype is None else held(dtype))
    ]


def joined(lines: Sequence[Line]) -> list[Line]:
    """Lines that differ by one number of their words as one, where the first of them stands."""
    found: list[list[Line]] = []
    for line in lines:
        same = next((one for one in found if _alike(one[0], line) and _words([*one, line]) is not None), None)
        if same is None:
            found.append([line])
        else:
            same.append(line)
    return [replace(lines[0], words=_words(lines) or lines[0].words) for lines in found]


def joined_words(words: Sequence[str]) -> list[str]:
    """As `joined`, of words alone."""
    return [line.words for line in joined([Line(text, {}) for text in words])]


def _alike(a: Line, b: Line) -> bool:
    return replace(a, words="") == replace(b, words="")


def _words(lines: Sequence[Line]) -> str | None:
    """One text for several that differ in one number; None where they differ in more."""
    texts, numbers = zip(*((_NUMBER.split(line.words), _NUMBER.findall(line.words)) for line in lines), strict=True)
    places = [n for n, column in enumerate(zip(*numbers, strict=False)) if len(set(column)) > 1]
    if len(lines) < 2 or any(text != texts[0] for text in texts) or len(places) != 1:
        return None
    some = [own[places[0]] for own in numbers]
    said = [*numbers[0]]
    said[places[0]] = f"{', '.join(some[:-1])} or {some[-1]}"
    return "".join(part for pair in zip(texts[0], [*said, ""], strict=True) for part in pair)
