"""The command that looks closer at one stage, from the command that a document was made by."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

# Options of the first command that the second one writes itself, and whether they take a value.
_DROPPED = {"--json": False, "--force": False, "--resume": False} | dict.fromkeys(
    ("--html", "--top", "--layers", "--stages"), True
)


def closer(document: Mapping[str, Any], row: Mapping[str, Any]) -> str | None:
    """`svf diff` or `svf audit` of the same things on one stage, with its figures; None for an unknown command."""
    words = _words(document.get("command"))
    if words[:1] != ["svf"]:  # a saved document may say anything, and a person will paste this
        return None
    name = next((word for word in words[1:] if not word.startswith("-")), None)
    layer = [] if row["layer"] is None else ["--layers", str(row["layer"])]
    look = ["--stages", str(row["stage"]), *layer, "--top", "20", "--html", "closer.html"]
    if name in ("diff", "audit"):
        return shlex.join([*words, *look])
    if name in ("forward", "replay") and "a" in document:
        out = _value(words, "--out")
        first = [] if out else [shlex.join([*words, "--out", "dumps"])]
        sides = [f"{out or 'dumps'}/{document[letter]['facts'].get('backend', letter)}" for letter in "ab"]
        return " && ".join([*first, shlex.join(["svf", "diff", *sides, *look])])
    return None


def _words(command: Any) -> list[str]:
    """The words of a command without the options that do not belong into the next one."""
    try:
        words = shlex.split(command) if isinstance(command, str) else []
    except ValueError:
        return []
    kept: list[str] = []
    skip = False
    for word in words:
        option, equals, _ = word.partition("=")
        if skip:
            skip = False
        elif option in _DROPPED:
            skip = _DROPPED[option] and not equals
        else:
            kept.append(word)
    return kept


def _value(words: list[str], option: str) -> str | None:
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word == option:
            return after
        if word.startswith(option + "="):
            return word.partition("=")[2]
    return None
