"""A `svf.logprobs/1` document as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from stages.judge.wording import number, ratio
from stages.show.console import console

_STYLES = {"rounding": "green", "unjudged": "yellow", "suspect": "yellow"}
_PARTS = {
    "rounding": "rounding of both sides",
    "declared": "declared processing and dtypes",
    "cause": "what was found",
    "rest": "the rest",
}


def logprobs_document(document: Mapping[str, Any]) -> None:
    """Both sides, the parts of their difference, the tokens that differ most, and the verdict."""
    out = console()
    sides = [(letter, document[letter]) for letter in "ab" if document[letter]]
    for letter, side in sides:
        said = f"{side['sequences']} sequences, {side['tokens']} sampled tokens, {side['dtype']}"
        out.print(escape(f"{letter}  {side['source']} ({said})"), soft_wrap=True)
    out.print(_sides(sides))
    if document["split"]:
        _split(document["split"], out)
    if document["worst"]:
        out.print(_worst(document["worst"], both=len(sides) == 2))
    for letter, side in sides:
        for note in _notes(side):
            out.print(escape(f"{letter}: {note}"), soft_wrap=True)
    style = {"agree": "bold green", "sound": "bold green", "incomplete": "bold yellow"}.get(
        document["outcome"], "bold red"
    )
    out.print(f"[{style}]{document['outcome'].upper()}[/]  {escape(document['verdict'])}", soft_wrap=True)


def _sides(sides: list[tuple[str, Mapping[str, Any]]]) -> Table:
    table = Table(
        "side",
        "verdict",
        "worst error / bound",
        "error / deviation, RMS",
        "beyond",
        "mean |error|",
        "seen above",
        box=None,
    )
    for letter, side in sides:
        table.add_row(
            letter,
            f"[{_STYLES.get(side['verdict'], 'bold red')}]{side['verdict']}[/]",
            ratio(side["ratio"]),
            number(side["rms"]),
            f"{side['beyond']:.1%}",
            number(side["mean_abs_error"]),
            number(side["floor"]),
        )
    return table


def _split(split: Mapping[str, Any], out: Any) -> None:
    out.print(
        f"a - b of {split['tokens']} tokens: mean {number(split['mean'])}, mean of sizes {number(split['mean_abs'])}, "
        f"largest {number(split['max_abs'])}; {split['beyond']:.1%} beyond rounding, {split['rest_beyond']:.1%} "
        f"unexplained. exp(a - b) {number(split['ratio_min'])} to {number(split['ratio_max'])}; KL(b, a): "
        f"k1 {number(split['k1'])}, k3 {number(split['k3'])}",
        markup=False,
        soft_wrap=True,
    )
    table = Table("part of a - b", "mean size", "largest", box=None)
    for name, part in split["parts"].items():
        table.add_row(_PARTS[name], number(part["mean_abs"]), number(part["max_abs"]))
    out.print(table)


def _worst(rows: list[Mapping[str, Any]], *, both: bool) -> Table:
    table = Table("line", "position", "token", "a", *(["b"] if both else []), "float64", "error / bound", box=None)
    for row in rows:
        cells = [row["line"], row["position"], row["token"], f"{row['a']:.6f}"]
        expected = [f"{row['expected_a']:.6f}"]
        if both:
            cells.append(f"{row['b']:.6f}")
            expected += [f"{row['expected_b']:.6f}"] if row["expected_b"] != row["expected_a"] else []
        table.add_row(*map(str, cells), " and ".join(expected), ratio(row["ratio"]))
    return table


def _notes(side: Mapping[str, Any]) -> list[str]:
    """What of the file a reader should know."""
    notes = []
    if side["stored"] and side["dtype"] != side["stored"]:
        # Of what was written to few decimals more is not known.
        notes.append(f"every logprob {'may be' if side['step'] else 'is'} a {side['stored']} number")
    if side["step"]:
        notes.append(f"written to {number(side['step'])}: half of that is allowed for")
    return notes
