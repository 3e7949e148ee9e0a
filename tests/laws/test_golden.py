"""Against real files of the original tool: what it computed, both backends compute, and its files are our files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import GATE, svf, tensors_of, with_json

from stages.files.bundle import ALL_STAGES_FILE, COMPONENTS_FILE, MANIFEST_FILE, OFFSETS_FILE, SAMPLE_STAGES_FILE
from stages.jobs.decompose import decompose
from stages.jobs.decompose_options import DecomposeOptions
from stages.judge.metrics import same_bits
from stages.spec.backend import Backend

FILES = [COMPONENTS_FILE, OFFSETS_FILE, SAMPLE_STAGES_FILE, ALL_STAGES_FILE]


@pytest.fixture(scope="session")
def tiny(golden: Path) -> Path:
    return golden / "trinity-tiny"


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_both_backends_pass_all_81_required_checks(tiny: Path, tmp_path: Path, name: str) -> None:
    report = tmp_path / "replay.json"
    done = svf("replay", tiny / "python_components", "--backend", name, "--all-selected-tensors", "--json",
               "--reference-report", tiny / "python_sample_trace.json", "--report", report,
               "--strict-stage-tolerances")  # fmt: skip
    assert done.code == 0, done.err
    document = done.json
    assert document["gates"] == {"strict_stage_tolerances": True}
    assert {row["verdict"] for row in document["rows"]} <= {"exact", "rounding"}
    variants = json.loads(report.read_text())["semantic_python_component_variants"]
    checks = [c for v in variants for c in v.get("stage_debug", {}).get("checks", [])]
    required = [c for c in checks if c["required_for_functional_parity"]]
    assert len(required) == 81
    assert [c for c in required if not c["functional_passed"]] == []
    for row in document["rows"]:
        if row["stage"] in ("source_f32", "offsets_f32", "scaled_s"):
            assert row["byte_match"], row["key"]
    gates = ["--strict-stage-tolerances"] + (["--strict-current-python"] if name == "torch" else [])
    assert svf("diff", tiny / "python_sample_trace.json", report, *gates).code == 0


def test_torchs_final_hash_is_the_plain_formulas_and_the_originals(tiny: Path) -> None:
    import torch

    parts = tensors_of(tiny / "python_components" / COMPONENTS_FILE)
    u, s, v = (torch.from_numpy(parts[f"svd.{p}.{GATE}"]) for p in "USV")
    z = torch.from_numpy(tensors_of(tiny / "python_components" / OFFSETS_FILE)[f"svf.scale_offsets.{GATE}"])
    scaled = s * (1 + z)
    adapted = ((u * scaled) @ v.T) * (s.sum() / scaled.sum())
    plain = adapted.T.contiguous().to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    document = svf("replay", tiny / "python_components", "--backend", "torch", "--json").json
    assert document["sample_sha256"] == hashlib.sha256(plain).hexdigest()
    baseline = json.loads((tiny / "python_sample_trace.json").read_text())["reference"]
    recorded = tensors_of(tiny / "python_components" / SAMPLE_STAGES_FILE)["stage.matmul_pre_norm"]
    if not np.array_equal(((u * scaled) @ v.T).numpy(), recorded):
        pytest.skip("this machine's torch sums a product in another order than the original's did")
    assert document["sample_sha256"] == baseline["current_python_baseline_bf16_sha256"]


@pytest.fixture(scope="session")
def ours(tiny: Path, torch_backend: Backend, workplace: Path) -> Path:
    """What `svf decompose --svd torch` writes of the golden model."""
    from svf_torch.svd import TORCH_SVD

    out = workplace / "golden"
    out.mkdir()
    options = DecomposeOptions(
        str(tiny / "model"), tiny / "router_vector.npy", tiny / "reference_manifest.json", (),
        out / "python_components", out / "python_sample_trace.json", True,
    )  # fmt: skip
    decompose(options, TORCH_SVD, torch_backend)
    return out


@pytest.mark.parametrize("file", FILES)
def test_the_safetensors_files_are_the_originals(tiny: Path, ours: Path, file: str) -> None:
    theirs, mine = tiny / "python_components" / file, ours / "python_components" / file
    a, b = tensors_of(theirs), tensors_of(mine)
    assert list(a) == list(b)
    assert all(a[k].shape == b[k].shape and a[k].dtype == b[k].dtype for k in a)
    s = [tensors_of(f / "python_components" / COMPONENTS_FILE)[f"svd.U.{GATE}"] for f in (tiny, ours)]
    if same_bits(*s):
        assert theirs.read_bytes() == mine.read_bytes()
    else:  # another machine's LAPACK: other signs and last bits, the same values
        for key in a:
            if "svd.U" not in key and "svd.V" not in key and "u_scaled" not in key:
                assert np.allclose(a[key].astype(np.float32), b[key].astype(np.float32), rtol=1e-2, atol=1e-4), key


def fields(value: Any, place: str = "") -> set[str]:
    """Every key of a document, lists by their items."""
    if isinstance(value, dict):
        return {p for k, v in value.items() for p in ({f"{place}.{k}"} | fields(v, f"{place}.{k}"))}
    if isinstance(value, list):
        return {p for v in value for p in fields(v, f"{place}[]")}
    return set()


@pytest.mark.parametrize("file", ["python_sample_trace.json", f"python_components/{MANIFEST_FILE}"])
def test_the_documents_have_exactly_the_originals_fields(tiny: Path, ours: Path, file: str) -> None:
    theirs, mine = (json.loads((folder / file).read_text()) for folder in (tiny, ours))
    assert fields(mine) == fields(theirs)
    kinds = {k: type(v) for k, v in theirs.items() if v is not None and mine[k] is not None}
    assert {k: type(mine[k]) for k in kinds} == kinds


def test_what_the_manifest_says_of_each_tensor_is_what_the_original_said(tiny: Path, ours: Path) -> None:
    theirs, mine = (json.loads((f / "python_components" / MANIFEST_FILE).read_text()) for f in (tiny, ours))
    for a, b in zip(theirs["selected_tensors"], mine["selected_tensors"], strict=True):
        assert a == b
    for key in ("schema", "source_name", "component_source", "component_v_layout", "selected_tensor_count",
                "all_selected_tensors", "stored_reference_bf16_sha256", "baseline_label"):  # fmt: skip
        assert mine[key] == theirs[key], key


def test_the_field_comparer_can_fail(tiny: Path, tmp_path: Path) -> None:
    theirs = json.loads((tiny / "python_sample_trace.json").read_text())
    (tmp_path / "x.json").write_text(json.dumps(theirs))
    assert fields(json.loads((tmp_path / "x.json").read_text())) == fields(theirs)
    with_json(tmp_path / "x.json", lambda r: [v["s"].pop("sum_s", None) for v in r["variants"]])
    assert fields(json.loads((tmp_path / "x.json").read_text())) != fields(theirs)


def test_the_rule_selects_what_the_published_manifest_selects(golden: Path) -> None:
    from stages.files.selection import load_manifest, load_router_vector, select_by_rule
    from stages.jobs.synth import config_json
    from stages.spec.families import parameter_shapes, parse_config

    published = load_manifest(golden / "trinity-qwen3-0.6b" / "reference_manifest.json")
    rule = select_by_rule(parameter_shapes(parse_config(config_json("qwen3-0.6b"), "qwen3-0.6b")), (26,))
    assert [(t.source_name, t.shape, t.offset_start, t.offset_end) for t in rule.tensors] == [
        (t.source_name, t.shape, t.offset_start, t.offset_end) for t in published.tensors
    ]
    assert rule.sample.source_name == published.sample.source_name
    assert rule.sample.target_shape == published.sample.target_shape
    assert published.offset_count == 9216
    folder = golden / "trinity-qwen3-0.6b"
    npy = load_router_vector(folder / "sakana_model_iter_60.npy", published, 1024)
    other = load_router_vector(folder / "trinity_router_es_vector.safetensors", published, 1024)
    assert npy.values.size == other.values.size == 19_456
    assert (npy.stored_dtype, other.stored_dtype) == ("float64", "float32")
    assert same_bits(npy.values, other.values)
