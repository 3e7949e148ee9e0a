"""What `svf decompose` says of a bundle: the debug manifest that commits it, and the reference side's report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.files import bundle as bundles
from stages.files.bundle import component_keys, offsets_key, sample_stage_key, tensor_stage_key
from stages.files.selection import RouterVector, SelectedTensor, Selection
from stages.files.summaries import summary
from stages.files.tensorfile import TensorFile, sha256
from stages.judge.reports import REFERENCE_SCHEMA
from stages.oracle.residual import Residual
from stages.spec.dtypes import stored_dtype
from stages.spec.replay import REPLAY
from stages.spec.values import ReplayTask

if TYPE_CHECKING:
    from stages.jobs.decompose_options import DecomposeOptions
    from stages.spec.factors import Method

BASELINE_LABEL = "python_safetensors_readback_torch_v_final_bf16"


@dataclass(frozen=True)
class Hashes:
    """sha256 of the float32 source and the offsets of each tensor."""

    source: Mapping[str, str]
    offsets: Mapping[str, str]


@dataclass(frozen=True)
class BundleReport:
    """A written bundle as its manifest and its report describe it; `in_memory` has the sample's components."""

    options: DecomposeOptions
    method: Method
    folder: Path
    vector: RouterVector
    selection: Selection
    tensors: Sequence[SelectedTensor]
    hashes: Hashes
    variants: Sequence[Mapping[str, Any]]
    in_memory: Mapping[str, np.ndarray]
    model_dtype: str = "float32"  # what the model was loaded in

    def manifest(self) -> dict[str, Any]:
        """The debug manifest, which commits the bundle."""
        expected = self.selection.sample.expected_bf16_sha256
        return {
            "all_selected_tensors": self.options.all_selected,
            "baseline_label": self.variants[0]["label"],
            "baseline_observed_bf16_sha256": self.variants[0]["observed_bf16_sha256"],
            "component_source": self.method.component_source,
            "component_v_layout": "torch_v",
            "decomposed_all_selected_if_missing": self.options.all_selected and self.options.svd_weights is None,
            "schema": bundles.SELECTED_SCHEMA if self.options.all_selected else bundles.SAMPLE_SCHEMA,
            "selected_tensor_count": len(self.tensors),
            "selected_tensors": self._entries(),
            "source_name": self.selection.sample.source_name,
            "stored_reference_bf16_sha256": expected or "",
            "stored_reference_hash_reproducible": any(v["matches_expected"] for v in self.variants),
            "svd_weights_path": str(self.options.svd_weights) if self.options.svd_weights else None,
            "warning": None,
        }

    def _entries(self) -> list[dict[str, Any]]:
        entries, everything = [], self.options.all_selected
        for t in self.tensors:
            key = tensor_stage_key if everything else lambda _name, stage: sample_stage_key(stage)
            turned = not everything and is_turned(t, self.selection)
            entries.append(
                {
                    "component_source": self.method.component_source,
                    "component_tensors": component_keys(t.source_name),
                    "component_v_layout": "torch_v",
                    "elixir_name": t.elixir_name,
                    "index": self.selection.tensors.index(t),
                    "offset_end": t.offset_end,
                    "offset_start": t.offset_start,
                    "offsets_sha256": self.hashes.offsets[t.source_name],
                    "s_shape": [min(t.shape)],
                    "safe_key": t.safe_key,
                    "scale_tensor": offsets_key(t.source_name),
                    "singular_values": t.singular_values,
                    "source_dtype": self.model_dtype,
                    "source_name": t.source_name,
                    "source_sha256_as_f32": self.hashes.source[t.source_name],
                    "source_shape": list(t.shape),
                    "stage_final_orientation": "target" if turned else "source",
                    "stage_final_shape": list(t.shape[::-1] if turned else t.shape),
                    "stage_tensors": {stage: key(t.source_name, stage) for stage in REPLAY},
                    "u_shape": [t.shape[0], min(t.shape)],
                    "v_shape": [t.shape[1], min(t.shape)],
                }
            )
        return entries

    def document(self, source: np.ndarray) -> dict[str, Any]:
        """The reference side's report in its schema; `source` is the sample's float32 weight."""
        sample = next(t for t in self.tensors if t.source_name == self.selection.sample.source_name)
        entries = self._entries()
        brief = ["elixir_name", "index", "offset_end", "offset_start", "safe_key", "source_name"]
        brief += ["stage_final_orientation", "stage_final_shape", "stage_tensors"]
        memory, prefixes = self.in_memory, {"offsets": 16, "s": 16, "u": 4, "v": 4}
        written = _written(self.options.readback or self.folder, sample)
        return {
            "schema": REFERENCE_SCHEMA,
            "inputs": self._inputs(),
            "reference": _reference(self.options, self.selection, sample, self.variants),
            "source_tensor": summary(source.astype(stored_dtype(self.model_dtype)), 16),
            "source_tensor_f32_svd_input": summary(source, 16),
            "scale_offsets": summary(memory["offsets"], 16),
            "component_bundle_before_write": {part: summary(memory[part], n) for part, n in prefixes.items()},
            "component_bundle_readback": {part: summary(written[part], n) for part, n in prefixes.items()},
            "selected_tensor_components": entries,
            "selected_tensor_stage_debug": [{k: e[k] for k in brief} for e in entries if self.options.all_selected],
            "stage_debug": self._stage_debug(),
            "variants": list(self.variants),
        }

    def _inputs(self) -> dict[str, Any]:
        place = self.options.report.parent if self.options.report is not None else Path.cwd()
        relative = os.path.relpath(self.folder, place)
        readback = self.options.readback or self.folder
        stages = {name: readback / name for name in (bundles.SAMPLE_STAGES_FILE, bundles.ALL_STAGES_FILE)}
        found = {name: os.path.relpath(path, place) if path.is_file() else None for name, path in stages.items()}
        return {
            "all_selected_stage_tensor_file": found[bundles.ALL_STAGES_FILE] if self.options.all_selected else None,
            "all_selected_tensors_written": self.options.all_selected,
            "component_source_written": self.method.component_source,
            "model_name": self.options.model,
            "model_torch_dtype_arg": self.options.model_dtype,
            "readback_components_dir": os.path.relpath(readback, place),
            "router_vector": str(self.options.vector),
            "router_vector_dtype_after_load": "float32",
            "router_vector_sha256": self.vector.sha256,
            "source_tensor_dtype": self.model_dtype,
            "stage_tensor_file": found[bundles.SAMPLE_STAGES_FILE],
            "svd_weights": str(self.options.svd_weights) if self.options.svd_weights else None,
            "write_components_dir": relative,
        }

    def _stage_debug(self) -> dict[str, Any]:
        inputs = self._inputs()
        keys = sorted(tensor_stage_key(t.source_name, stage) for t in self.tensors for stage in REPLAY)
        return {
            "all_selected_stage_keys": keys if self.options.all_selected else [],
            "all_selected_stage_tensor_file": inputs["all_selected_stage_tensor_file"],
            "baseline_label": BASELINE_LABEL,
            "interpretation": "Stages of the components as read back: the baseline of stage-by-stage parity.",
            "schema": "trinity_sakana_stage_debug.v1",
            "stage_keys": sorted(sample_stage_key(stage) for stage in REPLAY),
            "stage_tensor_file": inputs["stage_tensor_file"],
        }


def _written(folder: Path, tensor: SelectedTensor) -> dict[str, np.ndarray]:
    """U, S, V and offsets of one tensor as they are in the written files."""
    with TensorFile(folder / bundles.COMPONENTS_FILE) as file:
        parts = {part: file.read(key) for part, key in component_keys(tensor.source_name).items()}
    with TensorFile(folder / bundles.OFFSETS_FILE) as file:
        return {**parts, "offsets": file.read(offsets_key(tensor.source_name))}


def is_turned(sample: SelectedTensor, selection: Selection) -> bool:
    """Whether the sample's target is the source's transpose; a square one is taken as it is."""
    return sample.shape != selection.sample.target_shape


def variant(
    label: str, component_source: str, task: ReplayTask, values: Mapping[str, np.ndarray], expected: str | None
) -> dict[str, Any]:
    """One way of replaying the sample, as the report lists it."""
    observed = sha256(values["final_bf16"])
    s, scaled = task.s, values["scaled_s"]
    source, zero = values["source_f32"], values["zero_source_f32"]
    residual, roundtrip = Residual(), Residual()
    residual.add(source, zero)
    roundtrip.add(source.astype(stored_dtype("bfloat16")).astype(np.float32), zero)
    return {
        "component_source": component_source,
        "expected_bf16_sha256": expected or "",
        "final": summary(values["final_bf16"], 16),
        "final_f32_before_bf16": summary(values["final_f32"], 16),
        "label": label,
        "matches_expected": observed == expected,
        "observed_bf16_sha256": observed,
        "s": {
            "normalization": float(values["normalization"][0]),
            "scaled_s": summary(scaled, 16),
            "singular_values": summary(s, 16),
            "sum_s": float(s.sum(dtype=np.float64)),
            "sum_scaled_s": float(scaled.sum(dtype=np.float64)),
            "typed_offsets": summary(task.offsets, 16),
        },
        "v_layout": task.layout,
        "zero_offset_max_abs_error_vs_source": residual.max_abs,
        "zero_offset_max_abs_error_vs_source_bf16_roundtrip": roundtrip.max_abs,
    }


def _reference(
    options: DecomposeOptions, selection: Selection, sample: SelectedTensor, variants: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    expected = selection.sample.expected_bf16_sha256
    reproducible = any(v["matches_expected"] for v in variants)
    baseline = next((v for v in variants if v["matches_expected"]), None)
    baseline = baseline or next(v for v in variants if v["label"] == BASELINE_LABEL)
    if expected is None:
        diagnosis = "there is no stored reference hash; compare with current_python_baseline_bf16_sha256"
    elif reproducible:
        diagnosis = "stored reference hash was reproduced"
    else:
        diagnosis = (
            "stored reference hash was not reproduced; use current_python_baseline_bf16_sha256 for same-run parity, "
            "or provide the original svd_weights.pt"
        )
    return {
        "current_python_baseline_bf16_sha256": baseline["observed_bf16_sha256"],
        "current_python_baseline_label": baseline["label"],
        "diagnosis": diagnosis,
        "elixir_name": sample.elixir_name,
        "expected_bf16_sha256": expected or "",
        "expected_hash_reproducible": reproducible,
        "path": str(options.manifest) if options.manifest else None,
        "sample_reconstructed_shape": list(selection.sample.target_shape),
        "source_name": sample.source_name,
        "source_shape": list(sample.shape),
    }
