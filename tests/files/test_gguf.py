"""GGUF as MODEL: every family and type is read as its Hugging Face twin is, run and judged; damage is one line."""

from __future__ import annotations

import dataclasses
import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from forward_models import LLAMA3, MODELS, Model, dumped, random_weights, trace, write_model
from gguf_files import llama3_divisors, write_gguf
from helpers import svf
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from stages.errors import InputError
from stages.files.gguf_config import FREQUENCIES
from stages.files.gguf_file import GgufFile
from stages.files.gguf_model import GgufModel
from stages.files.source import ModelSource, open_model
from stages.files.tensorfile import write_tensors
from stages.spec.backend import Backend

# What the converter can say: it has no words for these two RoPEs, nor for windows; mixtures of experts are not read.
SAID = {
    name: model
    for name, model in MODELS.items()
    if not name.endswith(("dynamic", "longrope"))
    and model.window is None
    and model.family in ("qwen3", "qwen2", "llama")
}
# Rows of 64: whole blocks of every type of 32 and 64.
SMALL = Model("llama", tied=False, heads=4, kv_heads=2, head_dim=16, hidden=64, intermediate=128)
WIDE = dataclasses.replace(SMALL, hidden=256, head_dim=64, intermediate=256, vocab=40, layers=1)
QUANTISED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "F16", "BF16"]


def same_config(one: ModelSource, other: ModelSource) -> bool:
    return dataclasses.replace(one.config, dtype="float32") == dataclasses.replace(other.config, dtype="float32")


@pytest.mark.parametrize("name", SAID)
def test_config_names_and_rows_are_those_of_the_folder(name: str, tmp_path: Path) -> None:
    folder, file = write_model(tmp_path / "hf", SAID[name], "float32"), write_gguf(tmp_path / "m.gguf", SAID[name])
    with open_model(folder) as hf, open_model(file) as found:
        found.check()
        assert found.config == hf.config
        assert set(found.tensors) == set(hf.tensors)
        for tensor in hf.tensors:
            assert np.array_equal(found.read(tensor), hf.read(tensor)), tensor
            assert np.array_equal(found.read(tensor, 3, 7), hf.read(tensor, 3, 7)), tensor
            if hf.info(tensor).shape[1:]:
                assert np.array_equal(found.columns(tensor, 3, 7), hf.columns(tensor, 3, 7)), tensor
        assert found.weights_sha256(hf.tensors) == hf.weights_sha256(hf.tensors)


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_tensor_is_what_its_blocks_stand_for(kind: str, tmp_path: Path) -> None:
    weights = random_weights(SMALL.config())
    with open_model(write_gguf(tmp_path / "m.gguf", SMALL, kind=kind)) as found:
        assert isinstance(found, GgufModel)
        found.check()
        for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
            known = gguf.GGMLQuantizationType[kind]
            # rows are quantised apart, so the turned rows of k have the values of the straight ones
            straight = gguf.dequantize(gguf.quantize(weights[name], known), known)
            assert np.array_equal(found.read(name).astype(np.float32), straight)
            assert np.array_equal(found.read(name, 5, 21).astype(np.float32), straight[5:21])
            assert np.array_equal(found.columns(name, 5, 41).astype(np.float32), straight[:, 5:41])


# The package knows the size of these, and not what their bytes mean.
UNREADABLE = ("Q8_1", "Q8_K", "Q1_0")


@pytest.mark.parametrize("kind", [t.name for t in gguf.GGMLQuantizationType])
def test_every_type_that_the_package_reads_is_read(kind: str, tmp_path: Path) -> None:
    known = gguf.GGMLQuantizationType[kind]
    block, width = gguf.GGML_QUANT_SIZES[known]
    name = "model.layers.0.mlp.up_proj.weight"
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 60, (256, 256 // block * width), np.uint8)
    if kind in ("F32", "F64"):
        raw = rng.standard_normal((256, 256)).astype(f"<f{width}").view(np.uint8)
    path = write_gguf(tmp_path / "m.gguf", WIDE, kind="F32")
    change_tensor(path, "blk.0.ffn_up.weight", known, raw)
    with open_model(path) as found:
        if kind in UNREADABLE or (kind.startswith("I") and kind[1:].isdecimal()):
            with pytest.raises(InputError, match=r"no weight is|cannot read values"):
                found.check()
        else:
            found.check()
            read = found.read(name)
            assert read.shape == (256, 256)
            assert np.array_equal(found.columns(name, 100, 140), read[:, 100:140])


def change_tensor(path: Path, name: str, kind: gguf.GGMLQuantizationType, raw: np.ndarray) -> None:
    """Store a tensor as other bytes of another type."""
    with GgufFile(path) as file:
        assert name in file.tensors
        writer = gguf.GGUFWriter(path.with_suffix(".new"), "llama")
        for key, value in file.metadata.items():
            if key != "general.architecture":
                (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
        for tensor in file.tensors.values():
            data = raw if tensor.name == name else file.raw(tensor, 0, tensor.rows).reshape(*tensor.shape[:-1], -1)
            own = kind if tensor.name == name else gguf.GGMLQuantizationType[tensor.type]
            writer.add_tensor(tensor.name, np.ascontiguousarray(data), raw_dtype=own)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    path.with_suffix(".new").rename(path)


@pytest.mark.parametrize("name", ["llama-gqa4", "llama-bias", "qwen2", "qwen3-gqa4"])
def test_transformers_own_reader_has_the_same_tensors(name: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", MODELS[name], kind="F16")
    with open_model(path) as found:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**found.raw_config))
        theirs = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
        assert set(theirs) == set(found.tensors)
        for tensor, array in theirs.items():
            assert np.array_equal(np.asarray(array, np.float32), found.read(tensor).astype(np.float32)), tensor


def test_llama_3_s_divisors_are_its_settings_and_others_stay_divisors(tmp_path: Path) -> None:
    real = {**LLAMA3, "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 8192}
    model = dataclasses.replace(SMALL, head_dim=64, rope=real, positions=131072)
    path = write_gguf(tmp_path / "m.gguf", model)
    with open_model(path) as found:
        assert found.config == model.config()
    divisors = llama3_divisors(model.config())
    divisors[-9] *= 1.01
    change_tensor(path, FREQUENCIES, gguf.GGMLQuantizationType.F32, divisors)
    with open_model(path) as found:
        assert found.config.rope_type == "longrope"
        assert found.config.rope["long_factor"] == tuple(map(float, divisors)) == found.config.rope["short_factor"]
        assert found.config.attention_factor == 1


@pytest.mark.parametrize("name", ["qwen3", "qwen2-yarn", "llama-tied"])
def test_a_forward_has_the_bits_of_the_folder_s(name: str, tmp_path: Path, torch_backend: Backend) -> None:
    folder, file = write_model(tmp_path / "hf", MODELS[name], "float32"), write_gguf(tmp_path / "m.gguf", MODELS[name])
    for model, out in ((folder, "a"), (file, "b")):
        done = trace(model, torch_backend, out=tmp_path / out, production=True)
        assert done["production"]["verdict"] in ("exact", "rounding")
    one, other = dumped(tmp_path / "a"), dumped(tmp_path / "b")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key].view(np.uint8), other[key].view(np.uint8)) for key in one)


def test_rows_are_read_without_the_rest(tmp_path: Path) -> None:
    weights = random_weights(SMALL.config())
    weights |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), np.zeros((200_000, 64), np.float32))
    path = write_gguf(tmp_path / "m.gguf", dataclasses.replace(SMALL, vocab=200_000), kind="Q8_0", weights=weights)
    with open_model(path) as found:
        whole = found.info("lm_head.weight").nbytes
        found.read("lm_head.weight", 0, 1)  # the package is loaded
        reads: list[tuple[Callable[[], object], float]] = [
            (lambda: found.read("lm_head.weight", 7, 9), whole / 100),
            (lambda: found.columns("lm_head.weight", 32, 34), whole),
            (lambda: found.read("lm_head.weight"), 2.5 * whole),  # itself, and one block at a time
        ]
        for read, most in reads:
            tracemalloc.start()
            read()
            assert tracemalloc.get_traced_memory()[1] < most
            tracemalloc.stop()


def test_both_backends_agree_and_their_dumps_are_sound(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", SMALL, kind="Q8_0")
    words = ("--tokens", "3,1,4,1,5", "--no-production", "--backend", "both", "--out", tmp_path / "runs", "--json")
    done = svf("forward", file, *words)
    assert (done.code, done.json["outcome"]) == (0, "agree"), done.err
    assert svf("audit", tmp_path / "runs" / "jax", "--json").json["outcome"] == "sound"
    assert svf("audit", tmp_path / "runs" / "torch", "--model", file, "--json").json["outcome"] == "sound"


def test_another_engine_s_run_of_the_dequantised_weights_is_sound_with_the_gguf(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", SMALL, kind="Q8_0")
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL.raw("float32")))
    with open_model(file) as found:
        write_tensors(folder / "model.safetensors", {n: np.ascontiguousarray(found.read(n)) for n in found.tensors})
    tokens = ("--tokens", "3,1,4,1,5")
    done = svf("capture", folder, "--engine", "transformers", *tokens, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    (tmp_path / "run" / "manifest.json").unlink()  # what another engine would hand over
    done = svf("audit", tmp_path / "run", "--model", file, *tokens, "--json")
    assert (done.code, done.json["outcome"]) == (0, "sound"), done.out
    done = svf("audit", tmp_path / "run", "--model", write_gguf(tmp_path / "q4.gguf", SMALL, kind="Q4_0"), *tokens)
    assert done.code == 1


def test_inspect_verify_and_decompose_take_one(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", SMALL, kind="Q4_0")
    seen = svf("inspect", file, "--json").json
    assert seen["kind"] == "GGUF file"
    assert seen["about"]["types"] == {"Q4_0": 16, "F32": 5}
    assert seen["about"]["config"]["family"] == "llama"
    assert svf("verify", file, "--json").json["outcome"] == "sound"
    np.save(tmp_path / "v.npy", np.zeros(3, np.float32))
    words = ("--vector", tmp_path / "v.npy", "--layers", "1", "--out", tmp_path / "components")
    needed = int(svf("decompose", file, *words).error.split("expected ")[1].split()[0])
    np.save(tmp_path / "v.npy", np.zeros(needed + 4 * SMALL.hidden, np.float32))
    done = svf("decompose", file, *words)
    assert done.code == 0, done.err
    assert svf("layouts", tmp_path / "components", "--model", file).code == 0
    assert "Hugging Face" in svf("apply", tmp_path / "components", file, "--out", tmp_path / "out").error


def test_help_does_not_load_the_package() -> None:
    import subprocess

    code = "import sys, stages.files.source, stages.files.kinds; sys.exit('gguf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
