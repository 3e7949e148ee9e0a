"""`svf verify`: what is sound passes, and every planted damage is named, with the place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import GATE, K_PROJ, svf, with_json, with_tensors
from test_convert import Canary

from stages.files.bundle import (
    ALL_STAGES_FILE,
    COMPONENTS_FILE,
    MANIFEST_FILE,
    OFFSETS_FILE,
    component_keys,
    offsets_key,
    tensor_stage_key,
)
from stages.files.checkpoint import CONFIG, WEIGHTS

U, S, V = (component_keys(GATE)[part] for part in "usv")


def sound(source: Path, *more: object) -> dict[str, Any]:
    done = svf("verify", source, *more, "--json")
    assert done.code == 0, done
    assert done.json["findings"] == []
    assert done.json["checks"]
    return dict(done.json)


def malformed(source: Path, *words: str, more: tuple[object, ...] = ()) -> list[str]:
    """Exit code 3, the first line of the text is the first finding of the JSON, and some finding has all `words`."""
    done, text = svf("verify", source, *more, "--json"), svf("verify", source, *more)
    assert (done.code, text.code, done.err, text.err) == (3, 3, "", "")
    findings: list[str] = done.json["findings"]
    assert all(line.isprintable() for line in findings)
    assert findings[0][:40] in text.out.splitlines()[0]
    assert any(all(word in line for word in words) for line in findings), findings
    return findings


# Bundles.


def test_a_bundle_is_sound(made: Path, model: Path) -> None:
    for name in ("components", "sample"):
        assert "for" in sound(made / name)["checks"][-1]
    assert sound(made / "components", "--model", model)["checks"][-1].endswith("for 9 of 9 tensors")


def test_the_original_tool_s_bundle_is_sound(golden: Path) -> None:
    sound(golden / "trinity-tiny" / "python_components", "--model", golden / "trinity-tiny" / "model")


def change(file: str, key: str, how: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def damage(bundle: Path) -> None:
        with_tensors(bundle / file, lambda tensors: tensors.update({key: np.ascontiguousarray(how(tensors[key]))}))

    return damage


def entry(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(bundle: Path) -> None:
        def apply(manifest: dict[str, Any]) -> None:
            change(next(item for item in manifest["selected_tensors"] if item["source_name"] == GATE))

        with_json(bundle / MANIFEST_FILE, apply)

    return damage


def with_value(value: float, at: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
    def how(array: np.ndarray) -> np.ndarray:
        array[at] = value
        return array

    return how


DAMAGES = [
    ("column scaled", change(COMPONENTS_FILE, U, lambda u: u * np.float32(1.0001)), ("U^T U", GATE)),
    ("V scaled", change(COMPONENTS_FILE, V, lambda v: v * np.float32(1.0001)), ("V^T V", GATE)),
    ("S not descending", change(COMPONENTS_FILE, S, lambda s: s[::-1]), ("not descending at index 1", GATE)),
    ("S negative", change(COMPONENTS_FILE, S, with_value(-1, (63,))), ("negative singular value", GATE)),
    ("NaN in U", change(COMPONENTS_FILE, U, with_value(np.nan, (3, 4))), ("NaN or infinity at index [3, 4]",)),
    ("S of another tensor", change(COMPONENTS_FILE, S, lambda s: s * 2), ("U S V^T is not the source", GATE)),
    ("offsets changed", change(OFFSETS_FILE, offsets_key(GATE), lambda z: z + 1), ("offsets have another sha256",)),
    ("offsets too few", change(OFFSETS_FILE, offsets_key(GATE), lambda z: z[1:]), ("63 offsets and 64 singular",)),
    ("layout label", entry(lambda e: e.update(component_v_layout="vh")), ("U S V^T is not the source",)),
    ("offset range", entry(lambda e: e.update(offset_end=e["offset_end"] + 1)), ("expected 64 offsets", GATE)),
    ("source hash", entry(lambda e: e.update(source_sha256_as_f32="0" * 64)), ("source_f32 has another sha256",)),
    ("stage NaN", change(ALL_STAGES_FILE, tensor_stage_key(GATE, "u_scaled"), with_value(np.inf, (2, 1))), ("[2, 1]",)),
    ("shape", change(ALL_STAGES_FILE, tensor_stage_key(GATE, "u_scaled"), np.transpose), ("u_scaled is float32",)),
    ("manifest cut", lambda bundle: (bundle / MANIFEST_FILE).write_text("{"), ("expected JSON",)),
    ("file cut", lambda bundle: (bundle / COMPONENTS_FILE).write_bytes(b"abc"), ("too short",)),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), [case[1:] for case in DAMAGES], ids=[case[0] for case in DAMAGES])
def test_a_damaged_bundle_is_named(bundle: Path, damage: Callable[[Path], None], words: tuple[str, ...]) -> None:
    damage(bundle)
    malformed(bundle, *words)


def test_stages_and_tensors_that_are_missing_or_belong_nowhere(bundle: Path) -> None:
    with_tensors(bundle / ALL_STAGES_FILE, lambda t: t.pop(tensor_stage_key(K_PROJ, "final_bf16")))
    with_tensors(bundle / OFFSETS_FILE, lambda t: t.update(other=np.ones(1, np.float32)))
    findings = malformed(bundle, K_PROJ, "stage final_bf16 is missing")
    assert any("'other' belongs to no tensor" in line for line in findings)


def test_another_model_s_components_are_found(made: Path, tmp_path: Path) -> None:
    assert svf("synth", tmp_path / "other", "--seed", 5).code == 0
    malformed(made / "components", "U S V^T is not the source", more=("--model", tmp_path / "other"))


# Checkpoints.


@pytest.fixture
def checkpoint(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "checkpoint"))


def test_a_checkpoint_is_sound_until_something_is_changed(checkpoint: Path) -> None:
    sound(checkpoint)
    with_tensors(checkpoint / WEIGHTS, lambda t: t["model.norm.weight"].__setitem__(3, np.nan))
    malformed(checkpoint, "model.norm.weight", "NaN or infinity at index [3]")
    with_tensors(checkpoint / WEIGHTS, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    findings = malformed(checkpoint, "missing tensors", "model.layers.1.mlp.up_proj.weight")
    assert any("NaN" in line for line in findings)  # one finding does not hide another
    with_json(checkpoint / CONFIG, lambda config: config.update(hidden_act="gelu"))
    malformed(checkpoint, CONFIG)


# Dumps.


@pytest.fixture(scope="module")
def runs(made: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert svf("replay", made / "components", "--backend", "reference", "--out", folder / "replay").code == 0
    forward = ("forward", model, "--tokens", "1,2,3", "--backend", "reference", "--no-production", "--out")
    assert svf(*forward, folder / "forward").code == 0
    assert (
        svf(
            *forward, folder / "part", "--layers", "1,2", "--stages", "ffn_gate,attn_scores", "--positions", "last"
        ).code
        == 0
    )
    return folder


@pytest.mark.parametrize("name", ["replay", "forward", "part"])
def test_a_dump_is_sound_and_one_changed_bit_is_found(runs: Path, tmp_path: Path, name: str) -> None:
    sound(runs / name)
    dump = Path(shutil.copytree(runs / name, tmp_path / name))
    file = next(dump.glob("layer-*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (finding,) = malformed(dump, file.name, "another sha256")
    assert str(dump) in finding


def drop(manifest: dict[str, Any]) -> None:
    key = next(key for key in manifest["tensors"] if "ffn_gate" in key or key.endswith("u_scaled"))
    del manifest["tensors"][key]


MANIFESTS = [
    ("replay", drop, ("u_scaled' is missing",)),
    ("replay", lambda m: m.update(selected=[]), ("'selected' names no tensors",)),
    ("replay", lambda m: m.update(kind="other"), ("kind is other",)),
    ("forward", drop, ("ffn_gate' is missing",)),
    ("forward", lambda m: m["tokens"].append(7), ("token ids have another sha256",)),
    ("forward", lambda m: m.update(tokens="1,2"), ("'tokens' is 1,2",)),
    ("forward", lambda m: m.update(layers=[0]), ("is no stage that the manifest declares",)),
    ("forward", lambda m: m.update(dtype="float32"), ("expected float32",)),
    ("forward", lambda m: m.update(positions="last"), ("expected bfloat16 [1, 64]",)),
    ("forward", lambda m: m["model"].update(config={}), ("model.config",)),
    ("forward", lambda m: m.update(schema="svf.dump/9"), ("schema is svf.dump/9",)),
    ("forward", lambda m: m["tensors"].update(x={"file": "../x"}), ("expected a file of this folder",)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "how", "words"), MANIFESTS)
def test_a_changed_manifest_is_named(runs: Path, tmp_path: Path, name: str, how: Any, words: tuple[str, ...]) -> None:
    dump = Path(shutil.copytree(runs / name, tmp_path / name))
    with_json(dump / "manifest.json", how)
    malformed(dump, *words)


def test_a_dump_without_its_manifest_is_refused(runs: Path, tmp_path: Path) -> None:
    dump = Path(shutil.copytree(runs / "forward", tmp_path / "dump"))
    (dump / "manifest.json").unlink()
    assert svf("verify", dump).code == 3


# Files.


def test_a_pickle_is_sound_unless_it_would_run_something_or_is_damaged(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1000)}, tmp_path / "x.pt")
    sound(tmp_path / "x.pt")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "x.pt").write_bytes(data)
    malformed(tmp_path / "x.pt", "checksum")
    torch.save({"w": torch.ones(2), "c": Canary(tmp_path / "ran")}, tmp_path / "y.pt")
    malformed(tmp_path / "y.pt", "posix.system")
    assert not (tmp_path / "ran").exists()


def test_a_tree_with_a_moved_file_is_malformed(model: Path, tmp_path: Path) -> None:
    run = (
        "forward",
        model,
        "--tokens",
        "1,2",
        "--backend",
        "reference",
        "--no-production",
        "--format",
        "aprt",
        "--out",
    )
    assert svf(*run, tmp_path / "tree").code == 0
    sound(tmp_path / "tree")
    (tmp_path / "tree" / "layer-1" / "ffn_gate.bin").rename(tmp_path / "tree" / "layer-2" / "ffn_gate.bin")
    malformed(tmp_path / "tree", "ffn_gate.bin", "was the file moved?")


def test_a_result_without_a_schema_is_malformed(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"schema": "svf.diff/1"}))
    sound(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{}")
    malformed(tmp_path / "x.json", "names no schema")


def test_a_model_goes_with_a_bundle_alone(model: Path) -> None:
    assert svf("verify", model, "--model", model).code == 2
