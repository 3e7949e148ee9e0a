"""Reports in the schemas of the original parity tool, so that its comparator can read them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.files.bundle import BundleEntry, sample_stage_key
from stages.files.selection import safe_key
from stages.jobs.replay_one import LayoutRun, ReplayResult
from stages.judge.document import Gates
from stages.judge.metrics import Difference
from stages.judge.replay import ChunkCheck, TensorComparison
from stages.judge.reports import REPLAY_SCHEMA
from stages.run.precision import PRECISION_FIELDS
from stages.spec.replay import REPLAY
from stages.spec.stage import Stage


@dataclass(frozen=True)
class _Writer:
    """A replay being reported; `side` names backend and device as the labels do."""

    result: ReplayResult
    gates: Gates
    backend: str
    side: str

    def variants(self) -> Iterator[dict[str, Any]]:
        """One variant per layout and tensor, each with a label of its own, and the sample as it is reported on."""
        for run in self.result.runs:
            for comparison in run.comparisons:
                yield self._variant(run, comparison)
            if run.sample_sha256 is not None and self.result.all_selected:
                yield self._sample(run)

    def _label(self, layout: str, name: str | None) -> str:
        """The original's comparator keeps the last of equal labels, and takes the first with `host_binary_v_layout_`
        for the sample's."""
        components = "native_svd" if self.result.document["native_components"] else "semantic_python_components"
        return f"{components}_{self.side}{'' if name is None else f'_tensor_{safe_key(name)}'}_v_layout_{layout}"

    def _variant(self, run: LayoutRun, comparison: TensorComparison) -> dict[str, Any]:
        layout, name = _layout(run, comparison), comparison.source_name
        declared = self._entry(name).layout
        variant = {
            **self._common(name, run.final_sha256[name], layout, None if not self.result.all_selected else name),
            "zero_offset_max_abs_error_vs_source": comparison.residual_b.max_abs,
            **run.finals.get(name, {}),
        }
        if layout == declared:
            path = run.sample_file if not self.result.all_selected else None
            variant["stage_debug"] = _stage_debug(comparison, path or self.result.stage_file(run, name))
        return variant

    def _sample(self, run: LayoutRun) -> dict[str, Any]:
        """The sample in the orientation that the reference side reports on, whether or not it is the source's own."""
        name, observed = self.result.sample_name, run.sample_sha256
        assert name is not None
        assert observed is not None
        comparison = next(c for c in run.comparisons if c.source_name == name)
        layout = _layout(run, comparison)
        variant = self._common(name, observed, layout, None)
        variant["label"] += "_sample_orientation"
        variant |= {"zero_offset_max_abs_error_vs_source": comparison.residual_b.max_abs, **run.sample_finals}
        if layout == self._entry(name).layout:  # its checks are those of the source-oriented one
            checked = _stage_debug(comparison, run.sample_file)
            variant["stage_debug"] = {**checked, "compared_to_python_stage_tensors": False, "checks": []}
        return variant

    def _common(self, name: str, observed: str, layout: str, in_label: str | None) -> dict[str, Any]:
        entry = self._entry(name)
        expected = self.gates.historical if name == self.result.sample_name else None
        return {
            "label": self._label(layout, in_label),
            "observed_bf16_sha256": observed,
            "expected_bf16_sha256": expected,
            "matches_expected": expected is not None and observed == expected,
            "v_layout": layout,
            "compute_backend": self.backend,
            "source_name": name,
            "elixir_name": entry.elixir_name,
            "safe_key": safe_key(name),
            "offset_start": entry.offset_start,
            "offset_end": entry.offset_end,
        }

    def _entry(self, name: str) -> BundleEntry:
        return next(e for e in self.result.entries if e.source_name == name)

    def chunk_checks(self) -> Iterator[dict[str, Any]]:
        """Checks of each chunk of the tensors that were replayed in several, of the declared layout alone."""
        for run in self.result.runs:
            for comparison in run.comparisons:
                if len(comparison.chunks) > 1 and comparison.options["layout"] == _layout(run, comparison):
                    file = self.result.stage_file(run, comparison.source_name)
                    for i, chunk in enumerate(comparison.chunks):
                        yield _chunk_entry(comparison, i, chunk, file)


def replay_report(result: ReplayResult, gates: Gates, backend: str, device: str) -> dict[str, Any]:
    """The replaying side's report: stage checks with the declared layout alone.

    On a CPU its side is `host_binary`, whose stage file the original's comparator reads; else `device_NAME`.
    """
    target = "host_binary" if device == "cpu" else f"device_{re.sub(r'[^a-z0-9]+', '_', device.lower())}"
    writer = _Writer(result, gates, backend, f"{backend}_{target}")
    native, variants = result.document["native_components"], list(writer.variants())
    return {
        "schema": REPLAY_SCHEMA,
        "reference": {
            "expected_bf16_sha256": gates.historical,
            "current_python_baseline_bf16_sha256": gates.current,
        },
        # The checks are of the numbers of one decomposition: of native components there are none.
        "native_elixir_svd_variants": variants if native else [],
        "semantic_python_component_variants": [] if native else variants,
        "large_tensor_chunk_checks": [] if native else list(writer.chunk_checks()),
        **{name: result.document[name] for name in PRECISION_FIELDS if name in result.document},
        **({"recorded_hash": account} if (account := result.document["recorded_hash"]) else {}),
    }


def _layout(run: LayoutRun, comparison: TensorComparison) -> str:
    return comparison.options["layout"] if run.layout == "declared" else run.layout


def _stage_debug(comparison: TensorComparison, stage_file: Path | None) -> dict[str, Any]:
    checks = [
        _check(c.stage, c.difference, c.shape_note is None) for c in comparison.stages.values() if c.difference.count
    ]
    checks += [_missing_check(REPLAY[name]) for name in comparison.missing]
    passed = [check["functional_passed"] for check in checks if check["required_for_functional_parity"]]
    return {
        "schema": "trinity_sakana_stage_debug.v1",
        "stage_tensor_file": _absolute(stage_file),
        "source_name": comparison.source_name,
        "compared_to_python_stage_tensors": bool(checks),
        "functional_parity_passed": bool(passed) and all(passed),
        "checks": checks,
    }


def _absolute(path: Path | None) -> str | None:
    """As the original's comparator, which looks from the current folder alone, finds it from anywhere."""
    return None if path is None else str(path.resolve())


def _chunk_entry(
    comparison: TensorComparison, index: int, chunk: ChunkCheck, stage_file: Path | None
) -> dict[str, Any]:
    checks = [_check(REPLAY[name], difference, True) for name, difference in chunk.differences.items()]
    passed = [check["functional_passed"] for check in checks if check["required_for_functional_parity"]]
    return {
        "label": f"large_tensor_chunk_{comparison.source_name}_rows_{chunk.start}_{chunk.stop}",
        "source_name": comparison.source_name,
        "chunk_index": index,
        "row_start": chunk.start,
        "row_end": chunk.stop,
        "stage_debug": {
            "stage_tensor_file": _absolute(stage_file),
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
