"""Reports in the schemas of the original parity tool, so that its comparator can read them (`formats.md`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stages.bundle import sample_stage_key
from stages.compare import ChunkCheck, TensorComparison
from stages.diff import Gates
from stages.errors import InputError, shown
from stages.jsonio import read_object
from stages.metrics import Difference
from stages.precision import PRECISION_FIELDS
from stages.replay import REPLAY
from stages.replay_job import LayoutRun, ReplayResult
from stages.selection import safe_key
from stages.stage import Stage
from stages.tensorfile import sha256, stored_dtype

REFERENCE_SCHEMA = "trinity_sakana_python_svd_parity_trace.v2"
REPLAY_SCHEMA = "trinity_sakana_svd_parity_trace.v2"
_BF16 = stored_dtype("bfloat16")


def summary(array: np.ndarray, prefix: int) -> dict[str, Any]:
    """The original's summary of a tensor; `sum` is accumulated in float64."""
    wide = array.astype(np.float32)
    return {
        "device": "cpu",
        "dtype": array.dtype.name,
        "max": float(wide.max()),
        "min": float(wide.min()),
        "prefix_f32": [float(x) for x in wide.reshape(-1)[:prefix]],
        "sha256": sha256(array),
        "sha256_as_bf16": sha256(wide.astype(_BF16)),
        "sha256_as_f32": sha256(wide),
        "shape": list(array.shape),
        "size": array.size,
        "sum": float(wide.sum(dtype=np.float64)),
    }


def reference_hashes(path: Path) -> Gates:
    """Hashes that gates need, from a reference-side report."""
    report = read_object(path)
    if report.get("schema") != REFERENCE_SCHEMA:
        raise InputError(f"{path}: schema is {shown(report.get('schema'))}, expected {REFERENCE_SCHEMA}")
    reference = report.get("reference")
    if not isinstance(reference, dict):
        raise InputError(f"{path}: expected an object 'reference'")
    return Gates(
        current=_text(reference.get("current_python_baseline_bf16_sha256")),
        historical=_text(reference.get("expected_bf16_sha256")),
        reference_hashes=tuple(observed_hashes(report, "variants").values()),
    )


def observed_hashes(report: Mapping[str, Any], *lists: str) -> dict[str, str]:
    """Label -> final bf16 hash of the report's variants in `lists`."""
    found: dict[str, str] = {}
    for name in lists:
        for item in _items(report, name):
            if isinstance(item, dict) and isinstance(item.get("observed_bf16_sha256"), str):
                found[str(item.get("label"))] = item["observed_bf16_sha256"]
    return found


def _items(report: Mapping[str, Any], name: str) -> list[Any]:
    value = report.get(name)
    return value if isinstance(value, list) else []


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def replay_report(result: ReplayResult, gates: Gates, backend: str, stage_file: str | None) -> dict[str, Any]:
    """The replaying side's report: one variant per layout and tensor; stage checks with the declared layout alone."""
    native = result.document["native_components"]
    variants: list[dict[str, Any]] = []
    chunk_checks: list[dict[str, Any]] = []
    for run in result.runs:
        for comparison in run.comparisons:
            variants.append(_variant(result, run, comparison, gates, backend, stage_file))
            if len(comparison.chunks) > 1 and comparison.options["layout"] == _layout(run, comparison):
                chunk_checks += [
                    _chunk_entry(comparison, i, chunk, stage_file) for i, chunk in enumerate(comparison.chunks)
                ]
        if run.sample_sha256 is not None and run.sample_sha256 not in run.final_sha256.values():
            variants.append(_sample_variant(run, gates, backend))
    return {
        "schema": REPLAY_SCHEMA,
        "reference": {
            "expected_bf16_sha256": gates.historical,
            "current_python_baseline_bf16_sha256": gates.current,
        },
        # The checks are of the numbers of one decomposition: of native components there are none.
        "native_elixir_svd_variants": variants if native else [],
        "semantic_python_component_variants": [] if native else variants,
        "large_tensor_chunk_checks": [] if native else chunk_checks,
        **{name: result.document[name] for name in PRECISION_FIELDS if name in result.document},
        **({"recorded_hash": account} if (account := result.document["recorded_hash"]) else {}),
    }


def _layout(run: LayoutRun, comparison: TensorComparison) -> str:
    return comparison.options["layout"] if run.layout == "declared" else run.layout


def _variant(
    result: ReplayResult,
    run: LayoutRun,
    comparison: TensorComparison,
    gates: Gates,
    backend: str,
    stage_file: str | None,
) -> dict[str, Any]:
    layout, name = _layout(run, comparison), comparison.source_name
    entry = next(e for e in result.entries if e.source_name == name)
    observed = run.final_sha256[name]
    components = "native_svd" if result.document["native_components"] else "semantic_python_components"
    variant: dict[str, Any] = {
        "label": f"{components}_{backend}_v_layout_{layout}",
        "observed_bf16_sha256": observed,
        "expected_bf16_sha256": gates.historical,
        "matches_expected": observed == gates.historical,
        "v_layout": layout,
        "compute_backend": backend,
        "source_name": name,
        "elixir_name": entry.elixir_name,
        "safe_key": safe_key(name),
        "offset_start": entry.offset_start,
        "offset_end": entry.offset_end,
        "zero_offset_max_abs_error_vs_source": comparison.residual_b.max_abs,
    }
    if layout == entry.layout:
        variant["stage_debug"] = _stage_debug(comparison, stage_file)
    return variant


def _sample_variant(run: LayoutRun, gates: Gates, backend: str) -> dict[str, Any]:
    """The sample's final hash in the orientation that the reference side reports on, beside the source-oriented one."""
    return {
        "label": f"semantic_python_components_{backend}_v_layout_{run.layout}_sample_orientation",
        "observed_bf16_sha256": run.sample_sha256,
        "expected_bf16_sha256": gates.historical,
        "matches_expected": run.sample_sha256 == gates.historical,
        "compute_backend": backend,
    }


def _stage_debug(comparison: TensorComparison, stage_file: str | None) -> dict[str, Any]:
    checks = [
        _check(c.stage, c.difference, c.shape_note is None) for c in comparison.stages.values() if c.difference.count
    ]
    checks += [_missing_check(REPLAY[name]) for name in comparison.missing]
    passed = [check["functional_passed"] for check in checks if check["required_for_functional_parity"]]
    return {
        "schema": "trinity_sakana_stage_debug.v1",
        "stage_tensor_file": stage_file,
        "source_name": comparison.source_name,
        "compared_to_python_stage_tensors": bool(checks),
        "functional_parity_passed": bool(passed) and all(passed),
        "checks": checks,
    }


def _chunk_entry(comparison: TensorComparison, index: int, chunk: ChunkCheck, stage_file: str | None) -> dict[str, Any]:
    checks = [_check(REPLAY[name], difference, True) for name, difference in chunk.differences.items()]
    passed = [check["functional_passed"] for check in checks if check["required_for_functional_parity"]]
    return {
        "label": f"large_tensor_chunk_{comparison.source_name}_rows_{chunk.start}_{chunk.stop}",
        "source_name": comparison.source_name,
        "chunk_index": index,
        "row_start": chunk.start,
        "row_end": chunk.stop,
        "stage_debug": {
            "stage_tensor_file": stage_file,
            "functional_parity_passed": bool(passed) and all(passed),
            "checks": checks,
        },
        "checks": checks,
    }


def _check(stage: Stage, d: Difference, shape_match: bool) -> dict[str, Any]:
    tolerance = stage.tolerance
    finite = not (d.nonfinite_a or d.nonfinite_b)
    passed = shape_match and finite and d.max_abs <= tolerance.max_abs and d.mean_abs <= tolerance.mean_abs
    return {
        "stage": sample_stage_key(stage.name),
        "required_for_functional_parity": stage.required,
        "functional_passed": passed,
        "byte_match": d.byte_match,
        "shape_match": shape_match,
        "max_abs_error": d.max_abs,
        "mean_abs_error": d.mean_abs,
        "mismatched_element_count": d.mismatched,
        "tolerance": {"max_abs_error": tolerance.max_abs, "mean_abs_error": tolerance.mean_abs},
    }


def _missing_check(stage: Stage) -> dict[str, Any]:
    return {**_check(stage, Difference(), False), "byte_match": False, "max_abs_error": None, "mean_abs_error": None}


def required_checks(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every stage check of a replaying side's report, chunk checks included, as the original comparator does."""
    holders: Iterable[Any] = [
        *(v.get("stage_debug") for v in _items(report, "semantic_python_component_variants") if isinstance(v, dict)),
        *(c.get("stage_debug", c) for c in _items(report, "large_tensor_chunk_checks") if isinstance(c, dict)),
    ]
    checks: list[Mapping[str, Any]] = []
    for holder in holders:
        if isinstance(holder, dict):
            checks += [check for check in _items(holder, "checks") if isinstance(check, dict)]
    return [check for check in checks if check.get("required_for_functional_parity") is True]


def diff_reports(path_a: Path, path_b: Path, gates: Gates) -> dict[str, Any]:
    """The `svf.diff/1` document of two reports; a is the reference side's, b the replaying side's (or reference-like).

    Reports hold hashes and check results, no tensors: rows are the final hashes that both sides name.
    """
    a, b = read_object(path_a), read_object(path_b)
    for path, report in ((path_a, a), (path_b, b)):
        if report.get("schema") not in (REFERENCE_SCHEMA, REPLAY_SCHEMA):
            raise InputError(f"{path}: schema is {shown(report.get('schema'))}; expected a parity report")
    lists = ("variants", "native_elixir_svd_variants", "semantic_python_component_variants")
    hashes_a, hashes_b = observed_hashes(a, *lists), observed_hashes(b, *lists)
    reference = a.get("reference") if isinstance(a.get("reference"), dict) else {}
    current = _text(reference.get("current_python_baseline_bf16_sha256")) if reference else None
    historical = _text(reference.get("expected_bf16_sha256")) if reference else None
    checks = required_checks(b)
    failed = [check for check in checks if check.get("functional_passed") is not True]
    results = Gates(
        current_python=gates.current_python,
        reference=gates.reference,
        current=current,
        historical=historical,
        reference_hashes=tuple(hashes_a.values()),
        replayed_hashes=tuple(hashes_b.values()),
    ).results([])
    if gates.stage_tolerances:
        results["strict_stage_tolerances"] = bool(checks) and not failed
    reached = current is not None and current in hashes_b.values()
    compared = len(checks) + len(set(hashes_a.values()) & set(hashes_b.values()))
    # Hashes that differ are only evidence with an equal one or passed checks beside them; alone they judge nothing.
    outcome = "diverged" if failed or not all(results.values()) else "agree" if compared else "incomplete"
    if outcome == "diverged":
        sentence = f"{len(failed)} of {len(checks)} required checks failed; gates: {results}."
    elif outcome == "incomplete":
        sentence = "Nothing comparable: no stage checks, and no final hash that both reports have."
    else:
        sentence = f"{len(checks)} required checks, none failed; final bf16 hash {'equal' if reached else 'differs'}."
    return {
        "schema": "svf.diff/1",
        "outcome": outcome,
        "verdict": sentence,
        "culprit": None,
        "rows": [],
        "hashes": {"a": hashes_a, "b": hashes_b, "current": current, "historical": historical},
        "failed_checks": failed,
        "coverage": {"compared": compared, "expected": max(compared, 1), "checks": len(checks)},
        "gates": results,
        "a": {"source": str(path_a), "facts": {}},
        "b": {"source": str(path_b), "facts": {}},
    }


def is_report(path: Path) -> bool:
    """Whether `path` is to be read as a parity report."""
    return path.suffix == ".json" and path.is_file()
