"""Which tensors are adapted and which offsets they get: the rule, the manifest, and every way they contradict."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import manifest_of
from helpers import DOWN, EMBED, GATE, HEAD, K_PROJ, one_line, with_json
from hypothesis import given
from hypothesis import strategies as st

from stages.errors import InputError, NotFoundError, UsageError
from stages.files.selection import (
    ROUTER_VECTOR_KEY,
    Selection,
    elixir_name,
    layer_of,
    load_manifest,
    load_router_vector,
    safe_key,
    select_by_rule,
)
from stages.files.tensorfile import write_tensors
from stages.spec.selectors import parse_layers

PARTS = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


def test_nine_tensors_in_state_dict_order(selection: Selection) -> None:
    layer = [f"model.layers.2.self_attn.{p}.weight" for p in PARTS[0]]
    layer += [f"model.layers.2.mlp.{p}.weight" for p in PARTS[1]]
    assert [t.source_name for t in selection.tensors] == [EMBED, *layer, HEAD]
    assert selection.offset_count == 9 * 64
    assert [t.offset_start for t in selection.tensors] == list(range(0, 576, 64))
    assert all(t.offset_end - t.offset_start == min(t.shape) for t in selection.tensors)
    assert (selection.sample.source_name, selection.sample.target_shape) == (GATE, (64, 192))
    assert selection.sample.expected_bf16_sha256 is None


SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (8, 4),
    "model.layers.0.mlp.up_proj.weight": (6, 4),
    "model.layers.0.norm.weight": (4,),
    "model.layers.1.mlp.up_proj.weight": (6, 4),
    "model.layers.1.thin.weight": (1, 4),
    "model.layers.10.mlp.up_proj.weight": (6, 4),
    "model.norm.weight": (4,),
    "lm_head.weight": (8, 4),
}


def test_chosen_layers_alone_and_everything_outside_layers() -> None:
    up = "model.layers.{}.mlp.up_proj.weight"
    for layers in ([0], [1], [10], [0, 10], [10, 0]):
        expected = ["model.embed_tokens.weight", *(up.format(i) for i in sorted(layers)), "lm_head.weight"]
        assert [t.source_name for t in select_by_rule(SHAPES, layers).tensors] == expected


def test_a_layer_that_is_not_there_or_a_model_without_matrices() -> None:
    with pytest.raises(UsageError) as error:
        select_by_rule(SHAPES, [7])
    one_line(error.value, "layer 7", "0 to 2")
    with pytest.raises(UsageError):
        select_by_rule({"model.norm.weight": (4,)}, [])


@given(st.sets(st.integers(0, 99), min_size=1))
def test_layer_lists_are_sorted_sets(layers: set[int]) -> None:
    text = ",".join(str(n) for n in layers)
    assert parse_layers(text) == tuple(sorted(layers))
    assert parse_layers(f"{min(layers)}-{max(layers)}") == tuple(range(min(layers), max(layers) + 1))


@pytest.mark.parametrize("text", ["x", "1,", ",", "1-", "-1", "1-2-3", "1.5", "1;2", "9999999", "\x1b", "٣"])
def test_other_layer_lists_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_layers(text)
    one_line(error.value, "--layers")


def test_names() -> None:
    assert [layer_of(n) for n in ("model.layers.26.x", "model.norm.weight", "xmodel.layers.1.")] == [26, None, None]
    assert safe_key("model.layers.0-a_b") == "model.layers.0-a_b"
    assert safe_key("a/b:c d") == "a__b__c__d"
    assert elixir_name(GATE) == "decoder.blocks.2.ffn.gate.kernel"
    assert elixir_name("model.layers.2.unknown") == "decoder.blocks.2.unknown"


# Manifests.


@pytest.fixture
def manifest_copy(selection: Selection, tmp_path: Path) -> Path:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(manifest_of(selection)))
    return path


def test_a_manifest_says_what_the_rule_says(manifest_copy: Path, selection: Selection) -> None:
    loaded = load_manifest(manifest_copy)
    assert loaded.tensors == selection.tensors
    assert loaded.sample.expected_bf16_sha256 == "0" * 64
    assert (loaded.sample.source_name, loaded.sample.target_shape) == (GATE, (64, 192))


def first(m: dict[str, Any]) -> dict[str, Any]:
    return m["selected_tensors"][0]


CONTRADICTIONS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no list": (lambda m: m.pop("selected_tensors"), "selected_tensors"),
    "an empty list": (lambda m: m["selected_tensors"].clear(), "selected_tensors"),
    "an entry that is a string": (lambda m: m["selected_tensors"].insert(0, "x"), "selected_tensors[0]"),
    "no name": (lambda m: first(m).pop("source_name"), "source_name"),
    "three sizes": (lambda m: first(m).update(shape=[1, 2, 3]), EMBED),
    "a size of zero": (lambda m: first(m).update(shape=[0, 64]), EMBED),
    "a size that is text": (lambda m: first(m).update(shape=["512", 64]), EMBED),
    "another count of singular values": (lambda m: first(m).update(singular_values=63), "64 singular values"),
    "another count of offsets": (lambda m: first(m).update(offset_end=63), "63 offsets"),
    "offsets turned round": (lambda m: first(m).update(offset_start=64, offset_end=0), EMBED),
    "offsets that are text": (lambda m: first(m).update(offset_start="0"), EMBED),
    "no offsets": (lambda m: first(m).pop("offset_end"), EMBED),
    "a gap between offsets": (lambda m: m["selected_tensors"].pop(1), "128"),
    "a tensor twice": (lambda m: m["selected_tensors"][1].update(first(m)), "twice"),
    "no sample": (lambda m: m.pop("sample_adapted_tensor"), "sample_adapted_tensor"),
    "a sample that is not selected": (lambda m: m["sample_adapted_tensor"].update(source_name="other"), "'other'"),
    "a sample of another shape": (
        lambda m: m["sample_adapted_tensor"].update(sample_reconstructed_shape=[64, 191]),
        "[64, 191]",
    ),
    "a hash that is none": (
        lambda m: m["sample_adapted_tensor"].update(sample_reconstructed_bf16_sha256="abc"),
        "sha256",
    ),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_a_manifest_that_contradicts_itself_is_refused_by_name(manifest_copy: Path, kind: str) -> None:
    change, word = CONTRADICTIONS[kind]
    with_json(manifest_copy, change)
    with pytest.raises(InputError) as error:
        load_manifest(manifest_copy)
    one_line(error.value, str(manifest_copy), word)


# Router vectors.


def save(path: Path, values: np.ndarray) -> Path:
    np.save(path, values)
    return path


@pytest.mark.parametrize("rows", [0, 10])
def test_offsets_come_first_and_the_router_head_in_whole_rows(tmp_path: Path, selection: Selection, rows: int) -> None:
    values = np.linspace(-1, 1, 576 + rows * 64)
    vector = load_router_vector(save(tmp_path / "v.npy", values), selection, 64)
    assert vector.stored_dtype == "float64"
    joined = np.concatenate([vector.offsets(t) for t in selection.tensors])
    assert np.array_equal(joined, values[:576].astype(np.float32))
    write_tensors(tmp_path / "v.safetensors", {ROUTER_VECTOR_KEY: values.astype(np.float32)})
    again = load_router_vector(tmp_path / "v.safetensors", selection, 64)
    assert np.array_equal(again.values, vector.values)
    assert again.sha256 != vector.sha256  # of the file, which is another


@pytest.mark.parametrize("size", [0, 1, 575, 577, 576 + 63, 576 + 65])
def test_a_wrong_length_prints_the_expected_table(tmp_path: Path, selection: Selection, size: int) -> None:
    with pytest.raises(InputError) as error:
        load_router_vector(save(tmp_path / "v.npy", np.zeros(size)), selection, 64)
    names = [f"{t.source_name} {t.offset_start}:{t.offset_end}" for t in selection.tensors]
    one_line(error.value, f"{size} values", "576 offsets", "rows of 64", *names)


WRONG_VECTORS: dict[str, tuple[Callable[[], np.ndarray], str]] = {
    "two axes": (lambda: np.zeros((576, 1)), "[576, 1]"),
    "integers": (lambda: np.zeros(576, np.int64), "int64"),
    "complex": (lambda: np.zeros(576, np.complex64), "complex64"),
    "NaN": (lambda: np.r_[np.zeros(575), np.nan], "index 575"),
    "infinity": (lambda: np.r_[np.inf, np.zeros(575)], "index 0"),
    "a float64 beyond float32": (lambda: np.r_[0, 1e300, np.zeros(574)], "index 1"),
    "objects": (lambda: np.array([object()] * 576), ".npy"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", WRONG_VECTORS)
def test_a_vector_that_is_none_is_refused(tmp_path: Path, selection: Selection, kind: str) -> None:
    make, word = WRONG_VECTORS[kind]
    with pytest.raises(InputError) as error:
        load_router_vector(save(tmp_path / "v.npy", make()), selection, 64)
    one_line(error.value, word)


@pytest.mark.parametrize("data", [b"", b"junk", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f8'"])
def test_a_file_that_is_no_npy(tmp_path: Path, selection: Selection, data: bytes) -> None:
    (tmp_path / "v.npy").write_bytes(data)
    with pytest.raises(InputError) as error:
        load_router_vector(tmp_path / "v.npy", selection)
    one_line(error.value, "v.npy")
    (tmp_path / "v.safetensors").write_bytes(data)
    with pytest.raises(InputError):
        load_router_vector(tmp_path / "v.safetensors", selection)


def test_a_vector_that_is_not_there_or_under_another_name(tmp_path: Path, selection: Selection) -> None:
    with pytest.raises(NotFoundError):
        load_router_vector(tmp_path / "none.npy", selection)
    write_tensors(tmp_path / "v.safetensors", {"other": np.zeros(576, np.float32)})
    with pytest.raises(InputError) as error:
        load_router_vector(tmp_path / "v.safetensors", selection)
    one_line(error.value, ROUTER_VECTOR_KEY, "other")
    assert DOWN in selection.table()
    assert K_PROJ in selection.table()
