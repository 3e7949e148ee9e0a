"""Comparing two reports of the original parity tool: hashes, stage checks, and the stage files they name."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stages.errors import InputError, SvfError, shown
from stages.files.bundle import sample_stage_key
from stages.files.jsonio import read_object
from stages.files.selection import safe_key
from stages.files.tensorfile import TensorFile
from stages.judge.document import (
    STRICT_CURRENT_PYTHON,
    STRICT_STAGE_TOLERANCES,
    Gates,
    culprits_of,
    place_of,
)
from stages.judge.metrics import Difference
from stages.judge.next_steps import Step, sum_alike
from stages.judge.reports import REFERENCE_SCHEMA, REPLAY_SCHEMA, items_of, variants_of
from stages.judge.rows import in_replay, pair_row
from stages.oracle.verdict import Verdict
from stages.spec.replay import REPLAY
from stages.spec.stage import Stage

Report = Mapping[str, Any]
_WORST = 5  # as many as the original's comparator prints


@dataclass(frozen=True)
class Check:
    """One stage of one tensor that the replaying side compared; `rows` of it in a chunk, None: all."""

    tensor: str
    stage: str
    required: bool
    passed: bool
    fields: Report
    rows: tuple[int, int] | None = None

    def number(self, name: str) -> float | None:
        return _number(self.fields.get(name))

    @property
    def ratio(self) -> float | None:
        """The larger of max and mean |a - b| over what the report's tolerance allows; None where it demands nothing."""
        allowed = self.fields.get("tolerance") if self.required else None
        pairs = [(self.number(n), _number(allowed.get(n))) for n in _TOLERATED] if isinstance(allowed, dict) else []
        known = [(value, limit) for value, limit in pairs if value is not None and limit is not None]
        over = [value / limit if limit else math.inf if value else 0.0 for value, limit in known]
        return max(over, default=None)

    @property
    def note(self) -> str | None:
        """Why the check failed, in numbers."""
        if self.passed:
            return None
        where = "" if self.rows is None else f"in rows {self.rows[0]} to {self.rows[1]} "
        if self.fields.get("shape_match") is False:
            known = self.number("max_abs_error") is not None
            return f"{where}the shapes differ" if known else f"{where}the replaying side has none to compare with"
        said = [
            f"{name} |a - b| {_digits(self.number(f'{name}_abs_error'))} where {_digits(limit)} is allowed"
            for name in ("max", "mean")
            if (limit := _number(_object(self.fields, "tolerance").get(f"{name}_abs_error"))) is not None
        ]
        count = self.number("mismatched_element_count")
        return where + ", ".join([*said, *([f"{count:,.0f} elements differ"] if count else [])])

    def row(self) -> dict[str, Any]:
        """The check as a `svf.diff/1` row. What passed a declared tolerance is not thereby rounding."""
        stage = REPLAY[self.stage] if self.stage in REPLAY else Stage(self.stage, required=self.required)
        if self.fields.get("shape_match") is False:
            verdict = Verdict.SHAPE if self.number("max_abs_error") is not None else Verdict.MISSING
        elif self.fields.get("byte_match") is True:
            verdict = Verdict.EXACT
        else:
            verdict = Verdict.BUG if self.required and not self.passed else Verdict.UNJUDGED
        row = pair_row(in_replay(self.tensor, safe_key(self.tensor), stage.name, stage.required), verdict)
        return {
            **row,
            "key": row["key"] + ("" if self.rows is None else f"[{self.rows[0]}:{self.rows[1]}]"),
            "required": self.required,
            "tolerance_passed": self.passed,
            "ratio": self.ratio,
            "max_abs": self.number("max_abs_error"),
            "mean_abs": self.number("mean_abs_error"),
            "mismatched": int(self.number("mismatched_element_count") or 0),
            "byte_match": self.fields.get("byte_match") is True,
            "note": self.note,
        }


_TOLERATED = ("max_abs_error", "mean_abs_error")


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _digits(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


def _object(report: Report, name: str) -> Report:
    value = report.get(name)
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _true(value: Any) -> bool:
    """As the original's comparator takes it."""
    return value.strip().lower() in ("1", "true", "yes") if isinstance(value, str) else bool(value)


def checks_of(report: Report) -> list[Check]:
    """Every stage check of a replaying side's report, then those of chunks."""
    found: list[Check] = []
    for variant in items_of(report, "semantic_python_component_variants"):
        name = _text(variant.get("source_name")) or _text(_object(variant, "stage_debug").get("source_name"))
        found += _checks(_object(variant, "stage_debug"), name or "", None)
    for chunk in items_of(report, "large_tensor_chunk_checks"):
        holder = _object(chunk, "stage_debug") if "stage_debug" in chunk else chunk
        start, stop = _number(chunk.get("row_start")), _number(chunk.get("row_end"))
        rows = None if start is None or stop is None else (int(start), int(stop))
        found += _checks(holder, _text(chunk.get("source_name")) or "", rows or (0, 0))
    return found


def _checks(holder: Report, tensor: str, rows: tuple[int, int] | None) -> Iterator[Check]:
    for check in items_of(holder, "checks"):
        required, passed = (_true(check.get(n)) for n in ("required_for_functional_parity", "functional_passed"))
        yield Check(tensor, str(check.get("stage")).removeprefix("stage."), required, passed, check, rows)


def diff_reports(path_a: Path, path_b: Path, gates: Gates, *, top: int = 5) -> dict[str, Any]:
    """The `svf.diff/1` document of two reports; a is the reference side's, b the replaying side's (or reference-like).

    Rows are the stage checks that b made; `reports` has all else that the original's comparator prints. Elements are
    compared where both name a stage file that is there.
    """
    a, b = read_object(path_a), read_object(path_b)
    for path, report in ((path_a, a), (path_b, b)):
        if report.get("schema") not in (REFERENCE_SCHEMA, REPLAY_SCHEMA):
            raise InputError(f"{path}: schema is {shown(report.get('schema'))}; expected a parity report")
    reference = _object(a, "reference")
    stored = _text(reference.get("expected_bf16_sha256")) or _text(_object(b, "reference").get("expected_bf16_sha256"))
    hashes_a, hashes_b = ([v["observed_bf16_sha256"] for v in variants_of(report)] for report in (a, b))
    current = _text(reference.get("current_python_baseline_bf16_sha256")) or next(iter(hashes_a), None)
    asked = replace(
        gates, current=current, historical=stored, reference_hashes=tuple(hashes_a), replayed_hashes=tuple(hashes_b)
    )
    checks = checks_of(b)
    required = [check for check in checks if check.required]
    failed = [check for check in required if not check.passed]
    results = replace(asked, stage_tolerances=False).results([])
    if gates.stage_tolerances:
        results = {STRICT_STAGE_TOLERANCES: bool(checks) and not failed, **results}
    rows = [check.row() for check in checks if check.rows is None or check in failed]
    compared = len(required) + len(set(hashes_a) & set(hashes_b))
    # Hashes that differ are only evidence with an equal one or passed checks beside them; alone they judge nothing.
    outcome = "diverged" if failed or not all(results.values()) else "agree" if compared else "incomplete"
    culprits = _culprits(rows)
    document = {
        "schema": "svf.diff/1",
        "outcome": outcome,
        "verdict": "",
        "culprit": culprits[0] if culprits else None,
        "culprits": culprits,
        "rows": rows,
        "kind": "reports",
        "hashes": {
            "a": {str(v.get("label")): v["observed_bf16_sha256"] for v in variants_of(a)},
            "b": {str(v.get("label")): v["observed_bf16_sha256"] for v in variants_of(b)},
            "current": current,
            "historical": stored,
        },
        "failed_checks": [check.fields for check in failed],
        "coverage": {"compared": compared, "expected": max(compared, 1), "checks": len(required)},
        "gates": results,
        "a": {"source": str(path_a), "facts": {}},
        "b": {"source": str(path_b), "facts": {}},
        "reports": {
            "stored": {"sha256": stored, "reproducible": _true(reference.get("expected_hash_reproducible"))},
            "current": {"label": _text(reference.get("current_python_baseline_label")), "sha256": current},
            "variants": {"a": _variants(a, stored, current), "b": _variants(b, stored, current)},
            "identical": _identical(a, b),
            "checks": _counts([check for check in checks if check.rows is None]),
            "chunks": _counts([check for check in checks if check.rows is not None]),
            "stage_files": _elements(a, b, (path_a, path_b), top),
        },
    }
    step = _in_its_order(path_a) if results.get(STRICT_CURRENT_PYTHON) is False and not failed else None
    sentence = " ".join(filter(None, [_sentence(document, failed, len(required)), str(step) if step else None]))
    return {**document, "verdict": sentence, "next": [step.command] if step else []}


def _in_its_order(reference: Path) -> Step:
    words = ["svf", "replay", "COMPONENTS", "--backend", "jax", "--order", "inferred"]
    return sum_alike(shlex.join([*words, "--reference-report", str(reference)]))


def _variants(report: Report, stored: str | None, current: str | None) -> list[dict[str, Any]]:
    """Every variant with its hash, whose it is, and its zero-offset error."""
    return [
        {
            "label": str(v.get("label")),
            "tensor": _text(v.get("source_name")),
            "sha256": v["observed_bf16_sha256"],
            "matches_stored": stored is not None and v["observed_bf16_sha256"] == stored,
            "matches_current": current is not None and v["observed_bf16_sha256"] == current,
            "zero_offset_max_abs": _number(v.get("zero_offset_max_abs_error_vs_source")),
        }
        for v in variants_of(report)
    ]


def _identical(a: Report, b: Report) -> list[dict[str, str]]:
    """Pairs of variants with one hash, one of each report."""
    return [
        {"a": str(x.get("label")), "b": str(y.get("label")), "sha256": x["observed_bf16_sha256"]}
        for x in variants_of(a)
        for y in variants_of(b)
        if x["observed_bf16_sha256"] == y["observed_bf16_sha256"]
    ]


def _counts(checks: Sequence[Check]) -> dict[str, Any]:
    """How many checks of how many tensors, how many failed, and which found the largest differences."""
    measured = [check for check in checks if check.number("max_abs_error") is not None]
    worst = sorted(measured, key=lambda check: -(check.number("max_abs_error") or 0.0))[:_WORST]
    fields = ("tensor", "stage", "max_abs", "mean_abs", "ratio", "required", "tolerance_passed")
    return {
        "tensors": len({check.tensor for check in checks}),
        "total": len(checks),
        "required": sum(check.required for check in checks),
        "failed": sum(check.required and not check.passed for check in checks),
        "worst": [{**{name: c.row()[name] for name in fields}, "rows": c.rows and list(c.rows)} for c in worst],
    }


def _culprits(rows: Sequence[Report]) -> list[dict[str, Any]]:
    """The required checks that failed, the gravest first; of a row, as of a chunk, b is the side that was checked."""

    def describe(row: Report, _first: bool) -> dict[str, Any]:
        place = {name: row[name] for name in ("layer", "tensor", "stage", "verdict", "ratio")}
        return {"side": "b", **place, "hint": row["note"]}

    return culprits_of([row for row in rows if row["required"] and not row["tolerance_passed"]], describe)


def _elements(a: Report, b: Report, paths: tuple[Path, Path], top: int) -> dict[str, Any]:
    """The sample's stages element by element, from the stage files that the reports name."""
    sample = _text(_object(a, "reference").get("source_name"))
    asked = [_object(a, "stage_debug").get("stage_tensor_file") or _object(a, "inputs").get("stage_tensor_file")]
    others = [
        _object(v, "stage_debug").get("stage_tensor_file")
        for v in items_of(b, "semantic_python_component_variants")
        if sample is None or v.get("source_name") in (None, sample)
    ]
    result: dict[str, Any] = {"a": None, "b": None, "stages": []}
    try:
        with ExitStack() as stack:
            sides = [
                [stack.enter_context(TensorFile(path)) for path in _existing(names, report)]
                for names, report in zip((asked, others), paths, strict=True)
            ]
            lacking = " and ".join(letter for letter, files in zip("ab", sides, strict=True) if not files)
            if lacking:
                return {**result, "note": f"{lacking} names no stage file that is here; elements are not compared"}
            # b may name the sample's stages in both orientations.
            a_file, b_file = max(itertools.product(*sides), key=lambda pair: len(_common(*pair)))
            result |= {"a": str(a_file.path), "b": str(b_file.path)}
            result["stages"] = list(_stage_elements(a_file, b_file, top))
    except SvfError as error:
        return {**result, "note": f"elements are not compared: {error}"}
    return {**result, "note": None if result["stages"] else "the stage files have no stage of one shape in common"}


def _existing(named: Sequence[Any], report: Path) -> list[Path]:
    """The named files that are there, each from the current folder or else from the report's."""
    found = []
    for name in named:
        if isinstance(name, str) and "\0" not in name:
            places = (Path(folder, name) for folder in ("", report.parent))
            found += [place for place in places if place.is_file()][:1]
    return list(dict.fromkeys(found))


def _common(a: TensorFile, b: TensorFile) -> list[str]:
    """The replay's stages that both files have in one shape and dtype."""

    def spec(file: TensorFile, name: str) -> tuple[Any, ...] | None:
        info = file.tensors.get(sample_stage_key(name))
        return None if info is None else (info.shape, info.dtype)

    return [name for name in REPLAY if spec(a, name) is not None and spec(a, name) == spec(b, name)]


def _stage_elements(a: TensorFile, b: TensorFile, top: int) -> Iterator[dict[str, Any]]:
    for name in _common(a, b):
        key = sample_stage_key(name)
        difference = Difference(top)
        difference.add(a.read(key), b.read(key))
        yield {"stage": name, **difference.result()}


def _sentence(document: Report, failed: Sequence[Check], required: int) -> str:
    culprit, results = document["culprit"], document["gates"]
    refused = [name for name, passed in results.items() if not passed]
    if culprit is not None:
        more = f"{len(failed)} of {required} required checks failed"
        place = f"{culprit['stage']} of {place_of(culprit)}"
        return f"{str(culprit['verdict']).capitalize()} at {place}: {culprit['hint']}; {more}."
    if STRICT_CURRENT_PYTHON in refused:
        current = document["reports"]["current"]["sha256"]
        told = f"the reference side's final bf16 hash is {current[:12]}" if current else "a names no current hash"
        return f"{_passed(required)}The gate {' and '.join(refused)} failed: {told}, and no variant of b has it."
    if refused:
        return f"{_passed(required)}The gate {' and '.join(refused)} failed."
    if document["outcome"] == "incomplete":
        return "Nothing comparable: no stage checks, and no final hash that both reports have."
    equal = bool(document["reports"]["identical"])
    worst = next(iter(document["reports"]["checks"]["worst"]), None)
    largest = (
        f"; the largest |a - b| is {worst['max_abs']:.3g} at {worst['stage']} of {worst['tensor']}"
        if worst and worst["max_abs"]
        else ""
    )
    return f"{required} required checks, none failed{largest}; final bf16 hash {'equal' if equal else 'differs'}."


def _passed(required: int) -> str:
    return f"{required} required checks, none failed. " if required else ""
