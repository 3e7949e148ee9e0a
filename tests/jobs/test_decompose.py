"""Decomposing: the bundle that formats.md describes, the reference report, and what is refused before or while."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import DOWN, EMBED, GATE, HEAD, K_PROJ, Result, svf, tensors_of, tree, with_json, with_tensors

from stages.files.bundle import (
    ALL_STAGES_FILE,
    COMPONENTS_FILE,
    MANIFEST_FILE,
    OFFSETS_FILE,
    SAMPLE_STAGES_FILE,
    component_keys,
    offsets_key,
    tensor_stage_key,
)
from stages.files.checkpoint import open_checkpoint
from stages.files.selection import Selection
from stages.files.tensorfile import TensorFile, sha256
from stages.jobs import decompose as module
from stages.jobs.builtin import write_vector
from stages.jobs.decompose import FLOAT64, decompose
from stages.jobs.decompose_options import DecomposeOptions
from stages.judge.metrics import same_bits
from stages.spec.backend import Backend
from stages.spec.replay import REPLAY

ALL = ["--all-selected-tensors", "--decompose-all-selected-if-missing"]


def test_an_all_selected_bundle_has_these_files_and_keys(made: Path, selection: Selection) -> None:
    folder = made / "components"
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [COMPONENTS_FILE, OFFSETS_FILE, SAMPLE_STAGES_FILE, ALL_STAGES_FILE, MANIFEST_FILE]
    )
    components, offsets = tensors_of(folder / COMPONENTS_FILE), tensors_of(folder / OFFSETS_FILE)
    for t in selection.tensors:
        rank = min(t.shape)
        found = {part: components.pop(key) for part, key in component_keys(t.source_name).items()}
        assert {p: a.shape for p, a in found.items()} == {
            "u": (t.shape[0], rank),
            "s": (rank,),
            "v": (t.shape[1], rank),
        }
        assert {a.dtype.name for a in found.values()} == {"float32"}
        assert (np.diff(found["s"]) <= 0).all()
        assert offsets.pop(offsets_key(t.source_name)).shape == (rank,)
    assert (components, offsets) == ({}, {})


def test_the_stage_files_hold_every_stage_in_its_dtype_and_orientation(made: Path, selection: Selection) -> None:
    everything = tensors_of(made / "components" / ALL_STAGES_FILE)
    assert set(everything) == {tensor_stage_key(t.source_name, s) for t in selection.tensors for s in REPLAY}
    sample = tensors_of(made / "components" / SAMPLE_STAGES_FILE)
    assert set(sample) == {f"stage.{s}" for s in REPLAY}
    for name, stage in REPLAY.items():
        one, other = everything[tensor_stage_key(GATE, name)], sample[f"stage.{name}"]
        assert one.dtype.name == other.dtype.name == stage.dtype
        turned = other.T if name.startswith("final_") else other  # the sample's target is [64, 192]
        assert same_bits(np.ascontiguousarray(turned), one)
    assert sample["stage.normalization"].shape == (1,)
    assert sample["stage.final_bf16"].shape == (64, 192)


def test_the_manifest_describes_what_the_files_hold(made: Path, model: Path) -> None:
    manifest = json.loads((made / "components" / MANIFEST_FILE).read_text())
    assert manifest["schema"] == "trinity_sakana_selected_component_debug.v1"
    assert (manifest["source_name"], manifest["selected_tensor_count"]) == (GATE, 9)
    stages = tensors_of(made / "components" / ALL_STAGES_FILE)
    for entry in manifest["selected_tensors"]:
        keys = entry["stage_tensors"]
        assert list(keys) == list(REPLAY)
        assert entry["source_sha256_as_f32"] == sha256(stages[keys["source_f32"]])
        assert entry["offsets_sha256"] == sha256(stages[keys["offsets_f32"]])
        assert list(stages[keys["final_bf16"]].shape) == entry["stage_final_shape"] == entry["source_shape"]


def test_a_sample_only_bundle_has_the_sample_alone(made: Path) -> None:
    folder = made / "sample"
    assert not (folder / ALL_STAGES_FILE).exists()
    assert set(tensors_of(folder / COMPONENTS_FILE)) == set(component_keys(GATE).values())
    assert set(tensors_of(folder / OFFSETS_FILE)) == {offsets_key(GATE)}
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    assert manifest["schema"] == "trinity_sakana_sample_component_debug.v1"
    for file in (SAMPLE_STAGES_FILE,):
        assert (folder / file).read_bytes() == (made / "components" / file).read_bytes()
    assert svf("replay", folder, "--backend", "torch").code == 0


def test_source_and_offsets_are_those_of_model_and_vector(
    made: Path, model: Path, vector: Path, selection: Selection
) -> None:
    stages, values = tensors_of(made / "components" / ALL_STAGES_FILE), np.load(vector).astype(np.float32)
    with open_checkpoint(str(model)) as checkpoint:
        for t in selection.tensors:
            source = checkpoint.read(checkpoint.resolve(t.source_name)).astype(np.float32)
            assert same_bits(stages[tensor_stage_key(t.source_name, "source_f32")], source)
            offsets = stages[tensor_stage_key(t.source_name, "offsets_f32")]
            assert same_bits(offsets, values[t.offset_start : t.offset_end])
            zero = stages[tensor_stage_key(t.source_name, "zero_source_f32")]
            assert np.linalg.norm(zero - source) <= 1e-5 * np.linalg.norm(source)


def test_tied_tensors_are_decomposed_once_and_adapted_apart(
    model: Path, vector: Path, manifest: Path, tmp_path: Path, torch_backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    real = module.float64_svd

    def counted(name, rows, shape):
        names.append(name)
        return real(name, rows, shape)

    method = module.Method(**{**vars(FLOAT64), "decompose": counted})
    options = DecomposeOptions(str(model), vector, manifest, (), tmp_path / "out", None, True)
    decompose(options, method, torch_backend)
    assert names.count(EMBED) + names.count(HEAD) == 1
    parts = tensors_of(tmp_path / "out" / COMPONENTS_FILE)
    for one, other in zip(component_keys(EMBED).values(), component_keys(HEAD).values(), strict=True):
        assert same_bits(parts[one], parts[other])
    stages = tensors_of(tmp_path / "out" / ALL_STAGES_FILE)
    adapted = [stages[tensor_stage_key(n, "final_bf16")] for n in (EMBED, HEAD)]
    assert not same_bits(*adapted)  # each has offsets of its own


def test_rule_and_manifest_give_the_same_bundle(made: Path, model: Path, vector: Path, tmp_path: Path) -> None:
    done = svf("decompose", model, "--vector", vector, "--layers", "2", "--out", tmp_path / "out", *ALL, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["schema"] == "svf.decompose/1"
    for file in (COMPONENTS_FILE, OFFSETS_FILE, SAMPLE_STAGES_FILE, ALL_STAGES_FILE):
        assert (tmp_path / "out" / file).read_bytes() == (made / "components" / file).read_bytes()


# The report.


def test_the_report_names_the_baseline_and_the_historical_hash(made: Path) -> None:
    report = json.loads((made / "components.json").read_text())
    assert report["schema"] == "trinity_sakana_python_svd_parity_trace.v2"
    reference = report["reference"]
    assert (reference["expected_bf16_sha256"], reference["expected_hash_reproducible"]) == ("0" * 64, False)
    final = tensors_of(made / "components" / SAMPLE_STAGES_FILE)["stage.final_bf16"]
    assert reference["current_python_baseline_bf16_sha256"] == sha256(final)
    assert [v["v_layout"] for v in report["variants"]] == ["torch_v", "vh", "torch_v", "vh"]
    errors = [v["zero_offset_max_abs_error_vs_source"] for v in report["variants"]]
    assert max(errors[:3]) < 1e-5 < 1e-2 < errors[3]  # V of gate_proj is square: read as vh it fits and is wrong
    memory, read = report["component_bundle_before_write"], report["component_bundle_readback"]
    assert memory == read


def test_a_historical_hash_that_is_reached_is_reproducible(
    made: Path, model: Path, vector: Path, manifest: Path, tmp_path: Path, torch_backend: Backend
) -> None:
    baseline = json.loads((made / "sample.json").read_text())["reference"]["current_python_baseline_bf16_sha256"]
    copy = Path(shutil.copy(manifest, tmp_path / "manifest.json"))
    with_json(copy, lambda m: m["sample_adapted_tensor"].update(sample_reconstructed_bf16_sha256=baseline))
    options = DecomposeOptions(str(model), vector, copy, (), tmp_path / "out", tmp_path / "r.json", False)
    decompose(options, FLOAT64, torch_backend)
    assert json.loads((tmp_path / "r.json").read_text())["reference"]["expected_hash_reproducible"] is True
    done = svf("replay", tmp_path / "out", "--backend", "torch", "--reference-report", tmp_path / "r.json",
               "--strict-reference", "--strict-current-python", "--json")  # fmt: skip
    assert (done.code, done.json["gates"]) == (0, {"strict_current_python": True, "strict_reference": True})


# Original components.


def test_original_components_are_used_as_they_are(
    made: Path, model: Path, vector: Path, manifest: Path, tmp_path: Path
) -> None:
    import torch

    parts = tensors_of(made / "components" / COMPONENTS_FILE)
    saved = {}
    for name in (GATE, DOWN, K_PROJ):
        for part, key in component_keys(name).items():
            saved[f"{name}.{part.upper()}"] = torch.from_numpy(-parts[key] if part in "uv" else parts[key])
    torch.save(saved, tmp_path / "svd_weights.pt")
    command = [
        "decompose",
        model,
        "--vector",
        vector,
        "--manifest",
        manifest,
        "--svd-weights",
        tmp_path / "svd_weights.pt",
    ]
    done = svf(*command, "--out", tmp_path / "out", "--report", tmp_path / "r.json", "--json")
    assert done.code == 0, done.err
    assert done.json["component_source"] == "svd_weights_pt"
    found = tensors_of(tmp_path / "out" / COMPONENTS_FILE)
    assert same_bits(found[component_keys(GATE)["u"]], -parts[component_keys(GATE)["u"]])
    missing = svf(*command, "--out", tmp_path / "all", "--all-selected-tensors")
    assert missing.code == 3
    assert not (tmp_path / "all").exists() or not list((tmp_path / "all").iterdir())


# Refusals.


def run(model: Path, vector: Path, tmp_path: Path, *more: object) -> Result:
    return svf("decompose", model, "--vector", vector, "--layers", "2", "--out", tmp_path / "out", *more)


def refused(done: Result, code: int, tmp_path: Path, *words: str) -> None:
    assert done.code == code, (done.err, done.out)
    for word in words:
        assert word in done.error
    assert done.out == ""
    assert not (tmp_path / "out" / MANIFEST_FILE).exists()
    assert [p.name for p in tmp_path.glob("out/*.safetensors")] == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_a_weight_is_refused_by_name_and_place(model: Path, vector: Path, tmp_path: Path, value: float) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))

    def poison(tensors: dict[str, np.ndarray]) -> None:
        tensors[GATE][100, 33] = value

    with_tensors(copy / "model.safetensors", poison)
    refused(run(copy, vector, tmp_path, *ALL), 3, tmp_path, GATE, "NaN or infinity", "[100, 33]")


@pytest.mark.filterwarnings("error")
def test_offsets_that_sum_to_nothing_are_refused(model: Path, tmp_path: Path, selection: Selection) -> None:
    write_vector(tmp_path / "v.npy", np.full(selection.offset_count, -1.0))
    refused(run(model, tmp_path / "v.npy", tmp_path), 3, tmp_path, GATE, "sum to 0", "normalization")


def test_a_vector_of_a_wrong_length_prints_the_table(model: Path, tmp_path: Path, selection: Selection) -> None:
    write_vector(tmp_path / "v.npy", np.zeros(selection.offset_count - 1))
    done = run(model, tmp_path / "v.npy", tmp_path)
    refused(
        done,
        3,
        tmp_path,
        "575 values",
        "576 offsets",
        *(f"{t.source_name} {t.offset_start}:" for t in selection.tensors),
    )


def test_a_manifest_of_another_model_is_refused(model: Path, vector: Path, manifest: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(manifest, tmp_path / "m.json"))

    def rename(m: dict) -> None:
        next(e for e in m["selected_tensors"] if e["source_name"] == K_PROJ)["source_name"] = "model.layers.9.k.weight"

    with_json(copy, rename)
    done = svf("decompose", model, "--vector", vector, "--manifest", copy, "--out", tmp_path / "out")
    refused(done, 3, tmp_path, "model.layers.9.k.weight")
    with_json(copy, lambda m: m["selected_tensors"][0].update(source_name=EMBED, shape=[64, 512]))
    with_json(copy, lambda m: m["selected_tensors"][2].update(source_name=K_PROJ))
    done = svf("decompose", model, "--vector", vector, "--manifest", copy, "--out", tmp_path / "out")
    refused(done, 3, tmp_path, EMBED, "[64, 512]", "[512, 64]")


def test_an_output_folder_with_content_is_kept(model: Path, vector: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    before = tree(tmp_path / "out")
    refused(run(model, vector, tmp_path), 6, tmp_path, "not empty")
    assert tree(tmp_path / "out") == before


def test_usage(model: Path, vector: Path, manifest: Path, tmp_path: Path) -> None:
    base = ["decompose", model, "--vector", vector, "--out", tmp_path / "out"]
    for more, word in (
        ([], "--manifest"),
        (["--layers", "2", "--manifest", manifest], "--manifest"),
        (["--layers", "9"], "layer 9"),
        (["--layers", "x"], "--layers"),
        (["--layers", "2", "--all-selected-tensors"], "--decompose-all-selected-if-missing"),
    ):
        done = svf(*base, *more)
        refused(done, 2, tmp_path, word)
    done = svf(*base, "--layers", "2", "--report", tmp_path / "none" / "r.json")
    refused(done, 6, tmp_path, "its folder does not exist")


def test_what_is_not_there_is_exit_code_4(model: Path, vector: Path, tmp_path: Path) -> None:
    refused(run(tmp_path / "none", vector, tmp_path), 4, tmp_path)
    refused(run(model, tmp_path / "none.npy", tmp_path), 4, tmp_path, "none.npy")
    done = svf("decompose", model, "--vector", vector, "--manifest", tmp_path / "m.json", "--out", tmp_path / "out")
    refused(done, 4, tmp_path, "m.json")


def test_a_full_disk_is_exit_code_7_before_anything_is_written(
    model: Path, vector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.files import folders as output

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(run(model, vector, tmp_path), 7, tmp_path, "1,000 bytes")


def test_the_components_file_is_read_back_before_stages_are_recorded(made: Path) -> None:
    """Stages are those of the components as stored, so that whoever reads the file can reproduce them."""
    with TensorFile(made / "components" / COMPONENTS_FILE) as file:
        s = file.read(component_keys(GATE)["s"])
    stages = tensors_of(made / "components" / ALL_STAGES_FILE)
    scaled = s * (np.float32(1) + stages[tensor_stage_key(GATE, "offsets_f32")])
    assert same_bits(scaled, stages[tensor_stage_key(GATE, "scaled_s")])
