"""Commands as users of the original tool paste them: each flag with the meaning that it has there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import GATE, Result, rehash_offsets, svf, tensors_of, tree, with_json, with_tensors

from stages.files.bundle import ALL_STAGES_FILE, COMPONENTS_FILE, MANIFEST_FILE, OFFSETS_FILE, SAMPLE_STAGES_FILE
from stages.spec.dtypes import stored_dtype

ALL = ("--all-selected-tensors", "--decompose-all-selected-if-missing")
REPLAY_FLAGS = ("--semantic-only", "--device-semantic-only", "--preferred-layout-only", "--source-from-python-stage")
STAGE = "stage.source_f32"


@pytest.fixture(scope="session", params=["float32", "bfloat16", "float16"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A model whose weights and config are of one dtype."""
    folder = tmp_path_factory.mktemp("stored") / "model"
    assert svf("synth", folder, "--dtype", request.param).code == 0
    return folder, request.param


def decomposed(model: Path, vector: Path, manifest: Path, out: Path, *flags: object) -> Result:
    return svf("decompose", model, "--vector", vector, "--manifest", manifest, "--out", out, *flags)


def test_the_guides_commands_run_as_they_stand(model: Path, vector: Path, manifest: Path, tmp_path: Path) -> None:
    reference, components, report = tmp_path / "python.json", tmp_path / "components", tmp_path / "elixir.json"
    done = svf("decompose", model, "--model-torch-dtype", "float32", "--router-vector", vector, "--reference", manifest,
               *ALL, "--out", reference, "--write-components-dir", components, progress=True)  # fmt: skip
    assert done.code == 0, done.err
    assert f"--out {reference}: used as --report" in done.err
    assert json.loads(reference.read_text())["schema"] == "trinity_sakana_python_svd_parity_trace.v2"
    done = svf("replay", *REPLAY_FLAGS, "--all-selected-tensors", "--selected-source-filter", "model.layers.2.",
               "--components-dir", components, "--python-report", reference, "--stage-dir", tmp_path / "stages",
               "--out", report, progress=True)  # fmt: skip
    assert done.code == 0, done.err
    assert "XLA alone" in done.err
    variants = json.loads(report.read_text())["semantic_python_component_variants"]
    assert {v["compute_backend"] for v in variants} == {"jax"}
    assert {v["v_layout"] for v in variants} == {"torch_v"}
    assert len({v["source_name"] for v in variants}) == 7  # not embedding and LM head
    assert len(list((tmp_path / "stages").glob("*.safetensors"))) == 8
    assert svf("diff", "--strict-stage-tolerances", reference, report).code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--components-dir", "other"], "give one"),
        (["--semantic-only", "--components", "native"], "--semantic-only"),
        (["--preferred-layout-only", "--layout", "all"], "--preferred-layout-only"),
        (["--preferred-layout-only", "--layout", "vh"], "--preferred-layout-only"),
        (["--out", "a.json", "--report", "b.json"], "give one"),
    ],
)
def test_flags_that_contradict_the_command_are_refused(made: Path, arguments: list[str], words: str) -> None:
    done = svf("replay", made / "components", "--backend", "torch", *arguments)
    assert (done.code, words in done.error) == (2, True), done.err


def test_a_named_backend_stays_and_the_components_may_be_named_twice(made: Path) -> None:
    folder = made / "components"
    done = svf("replay", folder, "--components-dir", folder, "--backend", "torch", *REPLAY_FLAGS, "--json")
    assert (done.code, done.json["backend"]) == (0, "torch")


# The dtype that the model is loaded in.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_the_model_dtype_rounds_the_weights_before_they_are_widened(
    stored: tuple[Path, str], vector: Path, manifest: Path, tmp_path: Path, dtype: str
) -> None:
    model, own = stored
    report = tmp_path / "r.json"
    done = decomposed(model, vector, manifest, tmp_path / "c", "--model-torch-dtype", dtype, "--report", report)
    assert done.code == 0, done.err
    loaded = own if dtype == "auto" else dtype
    weight = tensors_of(model / "model.safetensors")[GATE]
    expected = weight.astype(stored_dtype(loaded)).astype(np.float32)
    assert np.array_equal(tensors_of(tmp_path / "c" / SAMPLE_STAGES_FILE)[STAGE], expected)
    told = json.loads(report.read_text())
    assert (told["inputs"]["model_torch_dtype_arg"], told["inputs"]["source_tensor_dtype"]) == (dtype, loaded)
    assert told["source_tensor"]["dtype"] == loaded
    assert told["source_tensor"]["sha256_as_f32"] == told["source_tensor_f32_svd_input"]["sha256"]
    assert svf("replay", tmp_path / "c", "--backend", "torch").code == 0
    assert svf("verify", tmp_path / "c").code == 0
    # Rounding shows where the weights have more bits than that.
    rounded = not np.array_equal(expected, weight.astype(np.float32))
    assert rounded == (loaded == "bfloat16" and own != "bfloat16")
    assert weight.dtype in (np.float32, np.float16, ml_dtypes.bfloat16)


def test_the_vector_dtype_changes_no_bit_and_says_so(model: Path, vector: Path, manifest: Path, tmp_path: Path) -> None:
    assert np.load(vector).dtype == np.float64
    for dtype in ("float32", "float64"):
        done = svf("decompose", model, "--vector", vector, "--manifest", manifest, "--out", tmp_path / dtype,
                   "--vector-dtype", dtype, progress=True)  # fmt: skip
        assert done.code == 0
        assert ("bit for bit" in done.err) == (dtype == "float64")
    assert tree(tmp_path / "float32") == tree(tmp_path / "float64")


# What is written and read back.


def test_without_stage_tensors_the_bundle_is_u_s_v_and_offsets(
    model: Path, vector: Path, manifest: Path, tmp_path: Path
) -> None:
    report = tmp_path / "r.json"
    done = decomposed(model, vector, manifest, tmp_path / "c", *ALL, "--no-write-stage-tensors", "--report", report)
    assert done.code == 0, done.err
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == sorted([COMPONENTS_FILE, OFFSETS_FILE, MANIFEST_FILE])
    inputs = json.loads(report.read_text())["inputs"]
    assert (inputs["stage_tensor_file"], inputs["all_selected_stage_tensor_file"]) == (None, None)
    assert svf("verify", tmp_path / "c", "--model", model).code == 0


def test_variants_are_read_back_from_another_bundle(
    model: Path, vector: Path, manifest: Path, made: Path, tmp_path: Path
) -> None:
    report, other = tmp_path / "r.json", Path(shutil.copytree(made / "components", tmp_path / "other"))

    def double(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"svf.scale_offsets.{GATE}"] *= 2

    with_tensors(other / OFFSETS_FILE, double)
    rehash_offsets(other)
    before = tree(other)
    done = decomposed(model, vector, manifest, tmp_path / "c", "--readback-components-dir", other, "--report", report)
    assert done.code == 0, done.err
    told = json.loads(report.read_text())
    hashes = {v["label"]: v["observed_bf16_sha256"] for v in told["variants"]}
    # The components in memory are the written ones, those read back the other bundle's.
    assert (
        hashes["python_recomputed_float64_svd_v_final_bf16"] != hashes["python_safetensors_readback_torch_v_final_bf16"]
    )
    assert (
        told["reference"]["current_python_baseline_bf16_sha256"]
        == (hashes["python_safetensors_readback_torch_v_final_bf16"])
    )
    assert told["inputs"]["readback_components_dir"] == "other"
    assert told["inputs"]["stage_tensor_file"] == f"other/{SAMPLE_STAGES_FILE}"
    assert told["component_bundle_readback"]["offsets"] != told["component_bundle_before_write"]["offsets"]
    assert tree(other) == before
    # What was written is of the written components, whatever was read back.
    assert (tmp_path / "c" / SAMPLE_STAGES_FILE).read_bytes() == (made / "sample" / SAMPLE_STAGES_FILE).read_bytes()
    assert svf("replay", tmp_path / "c", "--backend", "torch").code == 0


def test_reading_back_the_written_bundle_is_what_happens_anyway(
    model: Path, vector: Path, manifest: Path, made: Path, tmp_path: Path
) -> None:
    out = tmp_path / "c"
    assert decomposed(model, vector, manifest, out, *ALL, "--readback-components-dir", out).code == 0
    assert (out / ALL_STAGES_FILE).read_bytes() == (made / "components" / ALL_STAGES_FILE).read_bytes()


def test_a_bundle_without_the_sample_cannot_be_read_back(
    model: Path, vector: Path, manifest: Path, made: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(made / "sample", tmp_path / "other"))
    with_json(other / MANIFEST_FILE, lambda m: m["selected_tensors"][0].update(source_name="x"))
    done = decomposed(model, vector, manifest, tmp_path / "c", "--readback-components-dir", other)
    assert (done.code, GATE in done.error) == (3, True)
    assert not (tmp_path / "c").exists()
    assert decomposed(model, vector, manifest, tmp_path / "c", "--readback-components-dir", tmp_path / "no").code == 4


# The stored hash as a gate.


def test_the_stored_hash_is_a_gate(model: Path, vector: Path, manifest: Path, made: Path, tmp_path: Path) -> None:
    done = decomposed(model, vector, manifest, tmp_path / "no", "--strict-reference-hash", "--json")
    assert (done.code, done.json["gates"]) == (1, {"strict_reference": False})
    assert "--strict-reference-hash: failed" in decomposed(
        model, vector, manifest, tmp_path / "text", "--strict-reference-hash").out  # fmt: skip
    reached = Path(shutil.copy(manifest, tmp_path / "reached.json"))
    current = json.loads((made / "sample.json").read_text())["reference"]["current_python_baseline_bf16_sha256"]
    with_json(reached, lambda m: m["sample_adapted_tensor"].update(sample_reconstructed_bf16_sha256=current))
    done = decomposed(model, vector, reached, tmp_path / "yes", "--strict-reference-hash", "--json")
    assert (done.code, done.json["gates"]) == (0, {"strict_reference": True})
    done = svf("decompose", model, "--vector", vector, "--layers", "2", "--out", tmp_path / "none",
               "--strict-reference-hash")  # fmt: skip
    assert (done.code, "--manifest" in done.error) == (2, True)
    assert not (tmp_path / "none").exists()


def test_the_folder_is_named_once(model: Path, vector: Path, manifest: Path, tmp_path: Path) -> None:
    base = ["decompose", model, "--vector", vector, "--manifest", manifest]
    assert svf(*base).code == svf(*base, "--out", tmp_path / "r.json").code == 2
    done = svf(*base, "--out", tmp_path / "a", "--write-components-dir", tmp_path / "b")
    assert (done.code, "give one" in done.error) == (2, True)
    assert list(tmp_path.iterdir()) == []
