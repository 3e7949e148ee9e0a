"""The `svf.diff/1` document: rows into an outcome, a culprit, coverage and the original tool's gates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, nan
from types import MappingProxyType
from typing import Any, TypeVar

from stages.errors import InputError, UsageError, shown
from stages.files.selection import layer_of
from stages.judge.basis import of_basis, unexplained
from stages.judge.decomposition import in_words, with_faults
from stages.judge.explained import Explained, accept, accepted_words, tie_words
from stages.judge.guarantees import RULES
from stages.judge.metrics import walk
from stages.judge.next_steps import Step
from stages.judge.replay import TensorComparison
from stages.judge.wanted import Wanted
from stages.judge.wording import how_far, times
from stages.oracle.verdict import Verdict
from stages.run.precision import NATIVE
from stages.spec.replay import REPLAY

STRICT_STAGE_TOLERANCES = "strict_stage_tolerances"
STRICT_CURRENT_PYTHON = "strict_current_python"
STRICT_REFERENCE = "strict_reference"
STD_RATIO = "std_ratio"


@dataclass(frozen=True)
class Gates:
    """Gates that were asked for, and the hashes that the original comparator's need.

    `accept` is which failures pass (explained.py).
    `current` is the reference side's current final bf16 hash, `historical` the stored one (None: unknown);
    `reference_hashes` and `replayed_hashes` are the final bf16 hashes that each side reached; `next_step` is what to
    do when the current one is not among these. `std_ratio` is between what b's standard deviation over a's must be in
    every stage.
    """

    stage_tolerances: bool = False
    current_python: bool = False
    reference: bool = False
    current: str | None = None
    historical: str | None = None
    reference_hashes: tuple[str, ...] = ()
    replayed_hashes: tuple[str, ...] = ()
    std_ratio: tuple[float, float] | None = None
    accept: str | None = None
    next_step: Step | None = None

    def results(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
        """Gate name -> passed, for the gates asked for. No check found is a failure, as in the original."""
        results: dict[str, bool] = {}
        if self.stage_tolerances:
            required = [row for row in rows if row["required"]]
            results[STRICT_STAGE_TOLERANCES] = bool(required) and all(row["tolerance_passed"] for row in required)
        if self.current_python:
            results[STRICT_CURRENT_PYTHON] = self.current is not None and self.current in self.replayed_hashes
        if self.reference:
            reached = self.historical in self.reference_hashes and self.historical in self.replayed_hashes
            results[STRICT_REFERENCE] = self.historical is not None and reached
        if self.std_ratio is not None:
            found = std_ratios(rows, self.std_ratio)
            results[STD_RATIO] = bool(found["checked"]) and found["first"] is None
        return results


def parse_std_ratio(text: str) -> tuple[float, float]:
    """Bounds such as `0.5:2` of a ratio of standard deviations; `UsageError` otherwise."""
    low, colon, high = text.partition(":")
    try:
        bounds = float(low), float(high)
    except ValueError:
        bounds = (nan, nan)
    if not colon or not 0 <= bounds[0] <= 1 <= bounds[1] < inf:
        raise UsageError(f"--std-ratio {shown(text)}: expected LOW:HIGH around 1, such as 0.5:2")
    return bounds


def std_ratios(rows: Sequence[Mapping[str, Any]], bounds: tuple[float, float]) -> dict[str, Any]:
    """How many stages have a ratio of b's standard deviation over a's, and the first one outside `bounds`.

    `InputError` where the sides hold different counts of values: their statistics are of different things.
    """
    unlike = next((row for row in rows if row["verdict"] == Verdict.SHAPE), None)
    if unlike is not None:
        raise InputError(f"--std-ratio: {unlike['key']} has another shape on each side; {unlike.get('note')}")
    known = [row for row in rows if row.get("std_ratio") is not None]
    first = next((row for row in known if not bounds[0] <= row["std_ratio"] <= bounds[1]), None)
    place = {name: first[name] for name in ("key", "layer", "tensor", "stage", "std_ratio")} if first else None
    return {"low": bounds[0], "high": bounds[1], "checked": len(known), "first": place}


def std_ratio_words(document: Mapping[str, Any], gate: str = STD_RATIO) -> str | None:
    """What the gate on standard deviations found; None for another gate."""
    if gate != STD_RATIO or STD_RATIO not in document:
        return None
    found = document[STD_RATIO]
    if found["first"] is None:
        return f"{found['checked']} stages are within {found['low']:g} to {found['high']:g}"
    first = found["first"]
    times = "infinite" if first["std_ratio"] is None else f"{first['std_ratio']:.4g}"
    return f"first at {first['stage']} of {place_of(first)}: the standard deviation of b over a's is {times}"


def side(source: str, facts: Mapping[str, str] | None = None, run: Any = None) -> dict[str, Any]:
    """What one side is: where it comes from, what may have changed its results, its own document."""
    document: dict[str, Any] = {"source": source, "facts": dict(facts or {})}
    if run is not None:
        document["run"] = run
    return document


def document(
    comparisons: Iterable[TensorComparison],
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    *,
    gates: Gates | None = None,
    expected_tensors: int,
    more_rows: Sequence[dict[str, Any]] = (),
    lacks: Mapping[str, Sequence[str]] = MappingProxyType({}),
    wanted: Wanted | None = None,
    resolve_suspects: Callable[[Sequence[dict[str, Any]]], None] = lambda _rows: None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The whole `svf.diff/1` document of a finished comparison of replays; suspect rows may change."""
    wanted = wanted or Wanted()
    comparisons = list(comparisons)
    rows = [*(row for comparison in comparisons for row in comparison.rows()), *more_rows]
    rows = [row for row in rows if wanted.has_tensor(row["layer"], row["stage"])]
    resolve_suspects(rows)
    own = {
        letter: [
            f"tensor.{c.key}.{stage}"
            for c in comparisons
            for stage in c.unjudged(letter)
            if wanted.has_tensor(layer_of(c.source_name), stage)
        ]
        for letter in "ab"
    }
    of_any = Wanted(None, wanted.stages)
    return finish(
        rows,
        a,
        b,
        gates=gates,
        expected=expected_tensors * sum(s.required and of_any.has_tensor(None, s.name) for s in REPLAY.values()),
        zero_offset=[c.zero_offset() for c in comparisons if c.stages and of_any.has_tensor(None, "zero_source_f32")],
        basis=[c.basis.row(c.source_name) for c in comparisons if c.basis],
        lacks={letter: [*lacks.get(letter, ()), *own[letter]] for letter in "ab"},
        decomposition=[
            row
            for c in comparisons
            if c.stages and of_any.has_tensor(None, "zero_source_f32")
            for row in c.decomposition()
        ],
        extra=extra,
    )


def finish(
    rows: Sequence[dict[str, Any]],
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    *,
    gates: Gates | None = None,
    expected: int,
    zero_offset: Sequence[Mapping[str, Any]] = (),
    basis: Sequence[Mapping[str, Any]] = (),
    lacks: Mapping[str, Sequence[str]] = MappingProxyType({}),
    decomposition: Sequence[Mapping[str, Any]] = (),
    explain: Explain = lambda _row, _side: None,
    words: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A `svf.diff/1` document from its rows; `expected` is how many of them a complete comparison has at least.

    `lacks` are, by side, the keys that the other one alone holds and nothing promised, so that they have no row.
    `explain` gives a hint at why a row's side, a or b, failed, where the row itself has none; `words` are said too.
    """
    rows = accept(rows, gates.accept if gates else None)
    walk(rows)
    gate_results = gates.results(rows) if gates else {}
    spread = {STD_RATIO: std_ratios(rows, gates.std_ratio)} if gates and gates.std_ratio else {}
    compared = sum(row["verdict"] not in (Verdict.MISSING, Verdict.EXTRA) for row in rows)
    coverage = {"compared": compared, "expected": max(expected, len(rows) + sum(map(len, lacks.values())))}
    culprits = with_faults(decomposition, find_culprits(rows, explain))
    verdict = _of_components(decomposition, a, b)
    verdict = verdict or sentence(rows, zero_offset, culprits, gate_results, a, b, coverage, lacks, decomposition)
    explained = Explained.of(rows)
    step = gates.next_step if gates and not culprits and gate_results.get(STRICT_CURRENT_PYTHON) is False else None
    step = None if basis else step
    return {
        "schema": "svf.diff/1",
        "outcome": "diverged"
        if unexplained(basis) or decomposition
        else outcome(rows, zero_offset, gate_results, coverage),
        "verdict": " ".join(
            filter(
                None,
                [
                    verdict,
                    None if culprits else explained.words,
                    accepted_words(rows),
                    tie_words(rows),
                    how_far(rows, culprits[0] if culprits else None, (extra or {}).get("logits")),
                    f"Gate --std-ratio: {std_ratio_words(spread)}." if gate_results.get(STD_RATIO) is False else None,
                    about_precision(a, b),
                    words,
                    of_basis(basis),
                    of_gates(basis, gate_results),
                    str(step) if step else None,
                ],
            )
        ),
        "culprit": culprits[0] if culprits else None,
        "culprits": culprits,
        "rows": list(rows),
        "zero_offset": list(zero_offset),
        "basis": list(basis),
        "decomposition": list(decomposition),
        "coverage": coverage,
        "explained": explained.document(),
        "lacks": {letter: list(lacks.get(letter, ())) for letter in "ab"},
        "gates": gate_results,
        "next": [step.command] if step else [],
        **spread,
        "a": dict(a),
        "b": dict(b),
        **(extra or {}),
    }


def outcome(
    rows: Sequence[Mapping[str, Any]],
    zero_offset: Sequence[Mapping[str, Any]],
    gates: Mapping[str, bool],
    coverage: Mapping[str, int],
) -> str:
    """`agree`, `diverged` or `incomplete`; nothing compared is never a pass, nor is a replay that misses its source."""
    if any(Verdict(row["verdict"]).fails for row in rows) or misfit(zero_offset) or not all(gates.values()):
        return "diverged"
    # A stage without operands cannot be judged by its bound; the declared tolerance judges it if asked to.
    unjudged = any(row["verdict"] == Verdict.UNJUDGED for row in rows) and not gates.get(STRICT_STAGE_TOLERANCES)
    complete = coverage["compared"] and coverage["compared"] >= coverage["expected"]
    return "incomplete" if unjudged or not complete else "agree"


EXIT_CODES = {"agree": 0, "diverged": 1, "incomplete": 5}


def misfit(zero_offset: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The first tensor whose zero-offset replay does not give its source back, on either side."""
    return next((z for z in zero_offset if z["fits_a"] is False or z["fits_b"] is False), None)


_Row = TypeVar("_Row", bound=Mapping[str, Any])
# A row and the letter of a side -> a hint at why that side failed.
Explain = Callable[[Mapping[str, Any], str], str | None]
# Graver first; within one verdict, the first in execution order.
GRAVE = (
    Verdict.BUG,
    Verdict.PRECISION,
    Verdict.SUSPECT,
    Verdict.MISRECORDED,
    Verdict.NONFINITE,
    Verdict.SHAPE,
    Verdict.MISSING,
    Verdict.EXTRA,
)


def failing(rows: Sequence[_Row]) -> list[_Row]:
    """The rows that failed: bugs, then lost bits, then the rest; each in execution order."""
    return sorted((row for row in rows if row["verdict"] in GRAVE), key=lambda row: GRAVE.index(row["verdict"]))


def culprits_of(rows: Sequence[_Row], describe: Callable[[_Row, bool], dict[str, Any]]) -> list[dict[str, Any]]:
    """`describe` of every row that failed, the gravest first; its second argument is true once a stage and verdict.

    So a hint, which may take long, is looked for where a stage fails first, not in each layer again.
    """
    seen: set[tuple[str, str]] = set()
    found = []
    for row in failing(rows):
        kind = (row["stage"], row["verdict"])
        found.append(describe(row, kind not in seen))
        seen.add(kind)
    return found


# Lost bits are told by the verdict itself; what is missing or misshapen has no error that could be explained.
_EXPLAINED = (Verdict.BUG, Verdict.SUSPECT, Verdict.NONFINITE)


def hint_of(verdict: str, hint: str | None, explain: Callable[[], str | None]) -> str | None:
    """All that is known of a failed row's reason: what its error explains, and what its judging said."""
    why = explain() if verdict in _EXPLAINED else None
    return "; ".join(filter(None, dict.fromkeys((why, hint)))) or None


def find_culprits(
    rows: Sequence[Mapping[str, Any]], explain: Explain = lambda _row, _side: None
) -> list[dict[str, Any]]:
    """Every row that failed, the gravest first, with the side that is wrong and a hint at the reason."""

    def describe(row: Mapping[str, Any], first: bool) -> dict[str, Any]:
        wrong = [name for name in ("a", "b") if row.get(f"verdict_{name}") == row["verdict"]]
        ratios = [row[f"ratio_{name}"] for name in wrong]
        side = wrong[0] if wrong else ""
        why = hint_of(row["verdict"], row.get(f"hint_{side}"), lambda: explain(row, side) if side and first else None)
        return {
            "side": wrong[0] if len(wrong) == 1 else ("both" if wrong else None),
            "layer": row["layer"],
            "tensor": row["tensor"],
            "stage": row["stage"],
            "verdict": row["verdict"],
            "ratio": max(ratios) if ratios else None,
            "hint": why or row.get("note"),
        }

    return culprits_of(rows, describe)


# Stages that a sentence names beside the culprit; the JSON has them all.
_NAMED = 4


def more_faults(culprits: Sequence[Mapping[str, Any]]) -> str:
    """The rest of a sentence about the first culprit: what else failed, stage by stage; "" when nothing did."""
    others = culprits[1:]
    if not others:
        return ""
    judged = all(culprit["verdict"] not in (Verdict.MISSING, Verdict.EXTRA) for culprit in others)
    fails, whose = ("fails", "its") if len(others) == 1 else ("fail", "their")
    inputs = f" from {whose} own inputs" if judged else ""
    more = f"; {len(others)} more {fails}{inputs}: {listed(others, _NAMED)}"
    return more + _not_finite(culprits)


def _not_finite(culprits: Sequence[Mapping[str, Any]]) -> str:
    """Why a later stage is not finite, which may say more of the first fault than that itself; "" when none is."""
    told = [culprit for culprit in culprits if culprit["verdict"] == Verdict.NONFINITE and culprit["hint"]]
    if not told or told[0] is culprits[0]:
        return ""
    return f"; {told[0]['stage']} of {place_of(told[0])}: {told[0]['hint']}"


def listed(rows: Sequence[Mapping[str, Any]], limit: int | None = None) -> str:
    """Rows, or culprits, in words: stage by stage, `limit` of them at most, with the layers of each."""
    places: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        places.setdefault(row["stage"], []).append(row)
    named = [f"{stage} of {_places(found)}" for stage, found in list(places.items())[:limit]]
    return ", ".join([*named, *(["..."] if limit is not None and len(places) > limit else [])])


def _places(found: Sequence[Mapping[str, Any]]) -> str:
    layers = [culprit["layer"] for culprit in found]
    if len(found) == 1 or None in layers or any(culprit["tensor"] is not None for culprit in found):
        return place_of(found[0]) + (f" and {len(found) - 1} others" if len(found) > 1 else "")
    runs = layers[-1] - layers[0] == len(layers) - 1 and len(layers) > 2
    return f"layers {layers[0]} to {layers[-1]}" if runs else f"layers {', '.join(map(str, layers))}"


def about_precision(a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    """A sentence on what the sides' precisions make of their differences; None where these are as usual."""
    one, other = a["facts"].get("precision"), b["facts"].get("precision")
    if one is None or other is None or one == other == NATIVE:
        return None
    if one == other:
        return f"Both sides were computed in {one} precision, and each is checked against it: {RULES[one]}."
    return f"The sides differ in precision: a was computed in {one}, b in {other}."


def of_gates(basis: Sequence[Mapping[str, Any]], gates: Mapping[str, bool]) -> str | None:
    """A sentence when a gate failed on sides with a decomposition each: what it was made for."""
    if not basis or all(gates.values()):
        return None
    return "The gates compare numbers of the same decomposition, but here each side has its own U, S, V."


def place_of(row: Mapping[str, Any]) -> str:
    """Where a row's stage is, in words: a tensor, a layer, or the whole model."""
    if row["tensor"] is not None:
        return str(row["tensor"])
    return "the model" if row["layer"] is None else f"layer {row['layer']}"


def _of_components(
    decomposition: Sequence[Mapping[str, Any]], a: Mapping[str, Any], b: Mapping[str, Any]
) -> str | None:
    sides = {"a": f" in a ({a['source']})", "b": f" in b ({b['source']})"}
    return in_words(decomposition, sides.get(decomposition[0]["side"], "") if decomposition else "")


def sentence(
    rows: Sequence[Mapping[str, Any]],
    zero_offset: Sequence[Mapping[str, Any]],
    culprits: Sequence[Mapping[str, Any]],
    gates: Mapping[str, bool],
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    coverage: Mapping[str, int],
    lacks: Mapping[str, Sequence[str]] = MappingProxyType({}),
    decomposition: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The verdict as a sentence."""
    if not rows:
        return f"Nothing was compared. {_lacking(lacks)}".strip()
    culprit = culprits[0] if culprits else None
    miss = misfit(zero_offset)
    # A wrong contraction misses by about the weights' own size; less is a faulty stage, and the culprit says which.
    cause = next((row["reason"] for row in decomposition if miss and row["tensor"] == miss["tensor"]), None)
    if miss and cause and (not failing(rows) or max(miss["relative_a"], miss["relative_b"]) > 0.1):
        letter = "a" if miss["fits_a"] is False else "b"
        alone = miss["fits_a"] != miss["fits_b"]
        missing = f"{(a if letter == 'a' else b)['source']} misses" if alone else "both sides miss"
        right = " or ".join(miss["right"])
        cause = f"{right} is the right layout of V" if right else cause
        return (
            f"Zero offsets do not give {miss['tensor']} back: {missing} it by {miss[f'max_abs_{letter}']:.3g} "
            f"(relative {miss[f'relative_{letter}']:.2g}, bound {miss['bound']:.2g}); {cause}."
        )
    if culprit is not None:
        where = f"{culprit['stage']} of {place_of(culprit)}"
        who = {"a": f"a ({a['source']})", "b": f"b ({b['source']})", "both": "both sides"}.get(culprit["side"] or "")
        how = "with fewer bits than declared" if culprit["verdict"] == Verdict.PRECISION else "wrong"
        blame = f"{who} computed it {how}" if who else "the sides differ"
        ratio = f", {by}" if (by := times(culprit["ratio"], culprit["verdict"])) else ""
        hint = f" ({culprit['hint']})" if culprit["hint"] else ""
        return f"{culprit['verdict'].capitalize()} at {where}: {blame}{ratio}{hint}{more_faults(culprits)}."
    failed = [name for name, passed in gates.items() if not passed]
    if failed:
        return f"No bug found, but the gate {', '.join(failed)} failed."
    unjudged = sum(row["verdict"] == Verdict.UNJUDGED for row in rows)
    if unjudged and not gates.get(STRICT_STAGE_TOLERANCES):
        why = next((row[f"unjudged_{x}"] for row in rows for x in "ab" if row.get(f"unjudged_{x}")), None)
        flat = next((row["note"] for row in rows if row.get("flat")), None)
        why = why or flat or "their operands are not recorded"
        said = f"{unjudged} of {len(rows)} rows differ and cannot be judged: {why}."
        return f"{said} {_lacking(lacks)}".strip()
    if any(lacks.values()):
        return f"{_alike(rows, unjudged)} Only stages of both sides were compared: {_lacking(lacks)}"
    if coverage["compared"] < coverage["expected"]:
        return f"Only {coverage['compared']} of {coverage['expected']} stages were compared."
    return _alike(rows, unjudged)


def _alike(rows: Sequence[Mapping[str, Any]], unjudged: int) -> str:
    """The sentence about rows none of which failed."""
    if all(row["byte_match"] is None for row in rows):
        return f"Nothing is recorded to compare with; all {len(rows)} stages are right from their own inputs."
    pairs = [row for row in rows if row["byte_match"] is not None]
    different = sum(not row["byte_match"] for row in pairs)
    nan = sum(bool(row.get("nonfinite_a")) for row in rows)
    more = f"; {nan} hold NaN or infinity, in the same places on both sides" if nan else ""
    alone = len(rows) - len(pairs)
    more += f"; {alone} that one side alone recorded are right by themselves" if alone else ""
    if not different:
        return f"Bit-identical in all {len(pairs)} stages{more}."
    if unjudged:
        return f"Within the declared tolerances: {different} of {len(pairs)} stages differ in some bits{more}."
    return f"Rounding only: {different} of {len(pairs)} stages differ in some bits, none beyond its bound{more}."


# Keys that a sentence about missing ones names; the JSON has them all.
_LISTED = 6


def _lacking(lacks: Mapping[str, Sequence[str]]) -> str:
    """What each side lacks that the other one has, and what to do about it; "" when nothing is."""
    parts = []
    for letter, keys in lacks.items():
        if keys:
            more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
            parts.append(f"{letter} lacks {', '.join(map(str, keys[:_LISTED]))}{more}")
    return f"{'; '.join(parts)}. --stages and --layers restrict the comparison." if parts else ""
