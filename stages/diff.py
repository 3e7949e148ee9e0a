"""The `svf.diff/1` document: rows into an outcome, a culprit, coverage and the original tool's gates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from stages.basis import of_basis, unexplained
from stages.compare import TensorComparison
from stages.precision import NATIVE
from stages.promise import RULES
from stages.replay import REPLAY
from stages.verdict import Verdict

STRICT_STAGE_TOLERANCES = "strict_stage_tolerances"
STRICT_CURRENT_PYTHON = "strict_current_python"
STRICT_REFERENCE = "strict_reference"


@dataclass(frozen=True)
class Gates:
    """Gates of the original comparator that were asked for, and the hashes they need.

    `current` is the reference side's current final bf16 hash, `historical` the stored one (None: unknown);
    `reference_hashes` and `replayed_hashes` are the final bf16 hashes that each side reached.
    """

    stage_tolerances: bool = False
    current_python: bool = False
    reference: bool = False
    current: str | None = None
    historical: str | None = None
    reference_hashes: tuple[str, ...] = ()
    replayed_hashes: tuple[str, ...] = ()

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
        return results


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
    settle: Callable[[Sequence[dict[str, Any]]], None] = lambda _rows: None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The whole `svf.diff/1` document of a finished comparison of replays; `settle` may change suspect rows."""
    comparisons = list(comparisons)
    rows = [*(row for comparison in comparisons for row in comparison.rows()), *more_rows]
    settle(rows)
    return finish(
        rows,
        a,
        b,
        gates=gates,
        expected=expected_tensors * sum(stage.required for stage in REPLAY.values()),
        zero_offset=[c.zero_offset() for c in comparisons if c.stages],
        basis=[c.basis.row(c.source_name) for c in comparisons if c.basis],
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
    explain: Explain = lambda _row, _side: None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A `svf.diff/1` document from its rows; `expected` is how many of them a complete comparison has at least.

    `explain` gives a hint at why a row's side, a or b, failed, where the row itself has none.
    """
    gate_results = gates.results(rows) if gates else {}
    compared = sum(row["verdict"] not in (Verdict.MISSING, Verdict.EXTRA) for row in rows)
    coverage = {"compared": compared, "expected": max(expected, len(rows))}
    culprit = find_culprit(rows, explain)
    verdict = sentence(rows, zero_offset, culprit, gate_results, a, b, coverage)
    return {
        "schema": "svf.diff/1",
        "outcome": "diverged" if unexplained(basis) else outcome(rows, zero_offset, gate_results, coverage),
        "verdict": " ".join(
            filter(None, [verdict, about_precision(a, b), of_basis(basis), of_gates(basis, gate_results)])
        ),
        "culprit": culprit,
        "rows": list(rows),
        "zero_offset": list(zero_offset),
        "basis": list(basis),
        "coverage": coverage,
        "gates": gate_results,
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


# A row and the letter of a side -> a hint at why that side failed.
Explain = Callable[[Mapping[str, Any], str], str | None]
# Graver first; within one verdict, the first in execution order.
GRAVE = (
    Verdict.BUG,
    Verdict.PRECISION,
    Verdict.SUSPECT,
    Verdict.NONFINITE,
    Verdict.SHAPE,
    Verdict.MISSING,
    Verdict.EXTRA,
)


def gravest(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The first row in execution order with the gravest isolated verdict: a bug, then lost bits, then the rest."""
    return next((row for grave in GRAVE for row in rows if row["verdict"] == grave), None)


def find_culprit(
    rows: Sequence[Mapping[str, Any]], explain: Explain = lambda _row, _side: None
) -> dict[str, Any] | None:
    """The gravest row, with the side that is wrong and a hint at the reason; None when nothing failed."""
    row = gravest(rows)
    if row is None:
        return None
    wrong = [name for name in ("a", "b") if row.get(f"verdict_{name}") == row["verdict"]]
    ratios = [row[f"ratio_{name}"] for name in wrong]
    hints = (row.get("note"), *(row.get(f"hint_{name}") or explain(row, name) for name in wrong[:1]))
    return {
        "side": wrong[0] if len(wrong) == 1 else ("both" if wrong else None),
        "layer": row["layer"],
        "tensor": row["tensor"],
        "stage": row["stage"],
        "verdict": row["verdict"],
        "ratio": max(ratios) if ratios else None,
        "hint": next((hint for hint in hints if hint), None),
    }


def about_precision(a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    """A sentence on what the sides' precisions make of their differences; None where these are as usual."""
    one, other = a["facts"].get("precision"), b["facts"].get("precision")
    if one is None or other is None or one == other == NATIVE:
        return None
    if one == other:
        return f"Both sides were computed in {one} precision, and each is held to it: {RULES[one]}."
    return f"The sides differ in precision: a was computed in {one}, b in {other}."


def of_gates(basis: Sequence[Mapping[str, Any]], gates: Mapping[str, bool]) -> str | None:
    """A sentence when a gate failed on sides with a decomposition each: it was made for one shared by both."""
    if not basis or all(gates.values()):
        return None
    return "The gates compare the numbers of one decomposition, and here each side has its own U, S, V."


def place_of(row: Mapping[str, Any]) -> str:
    """Where a row's stage is, in words: a tensor, a layer, or the whole model."""
    if row["tensor"] is not None:
        return str(row["tensor"])
    return "the model" if row["layer"] is None else f"layer {row['layer']}"


def sentence(
    rows: Sequence[Mapping[str, Any]],
    zero_offset: Sequence[Mapping[str, Any]],
    culprit: Mapping[str, Any] | None,
    gates: Mapping[str, bool],
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    coverage: Mapping[str, int],
) -> str:
    """The verdict as a sentence."""
    if not rows:
        return "Nothing was compared."
    miss = misfit(zero_offset)
    # A wrong contraction misses by about the weights' own size; less is a faulty stage, and the culprit says which.
    if miss is not None and (culprit is None or max(miss["relative_a"], miss["relative_b"]) > 0.1):
        letter = "a" if miss["fits_a"] is False else "b"
        who = {"a": a, "b": b}[letter]["source"] if miss["fits_a"] != miss["fits_b"] else "both sides"
        return (
            f"Zero offsets do not give {miss['tensor']} back: {who} misses it by {miss[f'max_abs_{letter}']:.3g} "
            f"(relative {miss[f'relative_{letter}']:.2g}, bound {miss['bound']:.2g}); V is contracted the wrong way, "
            "or U, S, V are not this tensor's."
        )
    if culprit is not None:
        where = f"{culprit['stage']} of {place_of(culprit)}"
        who = {"a": a["source"], "b": b["source"], "both": "both sides"}.get(culprit["side"] or "")
        how = "with fewer bits than declared" if culprit["verdict"] == Verdict.PRECISION else "wrong"
        blame = f"{who} computed it {how}" if who else "the sides differ"
        ratio = f", {culprit['ratio']:.3g} times the bound" if culprit["ratio"] and isfinite(culprit["ratio"]) else ""
        hint = f" ({culprit['hint']})" if culprit["hint"] else ""
        return f"{culprit['verdict'].capitalize()} at {where}: {blame}{ratio}{hint}."
    failed = [name for name, passed in gates.items() if not passed]
    if failed:
        return f"No bug found, but the gate {', '.join(failed)} failed."
    unjudged = sum(row["verdict"] == Verdict.UNJUDGED for row in rows)
    if unjudged and not gates.get(STRICT_STAGE_TOLERANCES):
        return f"{unjudged} of {len(rows)} rows differ and cannot be judged: their operands are not recorded."
    if coverage["compared"] < coverage["expected"]:
        return f"Only {coverage['compared']} of {coverage['expected']} stages were compared."
    different = sum(not row["byte_match"] for row in rows)
    if not different:
        return f"Bit-identical in all {len(rows)} stages."
    if unjudged:
        return f"Within the declared tolerances: {different} of {len(rows)} stages differ in some bits."
    return f"Rounding only: {different} of {len(rows)} stages differ in some bits, none beyond its bound."
