"""`svf capture --engine llama.cpp`: what llama.cpp itself computes from a GGUF file is judged for what it is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forward_models import Model, dumped, random_weights, tokens_of
from gguf_files import write_gguf
from helpers import svf
from quantisers import quantised_file
from safetensors.numpy import save_file

from stages.files.source import open_model
from stages.judge.audit import audit
from stages.spec.config import ModelConfig

pytestmark = pytest.mark.slow

library = pytest.importorskip("svf_llama.library", reason="llama.cpp's wheels are not installed")
pytest.importorskip("xllamacpp", reason="its wheel is not installed")

SMALL = Model(tied=False, heads=4, kv_heads=2, head_dim=64, hidden=256, intermediate=256, vocab=64, layers=1)
TOKENS = tokens_of(9, SMALL.vocab)
EXACT = ("--attention", "eager", "--kv-cache", "float32")


def gguf_file(path: Path, kind: str, model: Model = SMALL, weights: dict[str, np.ndarray] | None = None) -> Path:
    """A model whose matrices ggml's own quantiser has made."""
    return quantised_file(path, kind, model, random_weights(model.config()) if weights is None else weights)


def captured(model: Path, out: Path, *options: str) -> Path:
    tokens = ",".join(map(str, TOKENS))
    done = svf("capture", model, "--engine", "llama.cpp", "--tokens", tokens, "--out", out, *options)
    assert done.code == 0, done.err
    return out


def failing(document: dict[str, Any]) -> dict[str, str]:
    """Of rows that do not pass, what the verdict and the recipe is, by stage."""
    rows = (row for row in document["rows"] if row["verdict"] not in ("exact", "rounding"))
    return {row["stage"]: f"{row['verdict']}: {row['recipe']}" for row in rows}


@pytest.mark.parametrize(
    ("kind", "family", "said"),
    [
        ("F32", "llama", ""),
        ("BF16", "qwen2", "bfloat16-like"),
        ("Q8_0", "qwen3", "ggml's Q8_0"),
        ("Q4_K", "qwen3", "ggml's Q8_K"),
        ("Q5_1", "qwen2", "ggml's Q8_1"),
    ],
)
def test_inputs_of_products_are_named_or_declared(kind: str, family: str, said: str, tmp_path: Path) -> None:
    model = dataclasses.replace(SMALL, family=family)
    out = captured(gguf_file(tmp_path / "m.gguf", kind, model), tmp_path / "dump", *EXACT, "--generate", "2")
    found = failing(audit(out))
    assert all(text.startswith("precision: ") and said in text for text in found.values()), found
    assert bool(found) == bool(said)
    declared = audit(out, activations="ggml")
    assert (declared["outcome"], failing(declared)) == ("sound", {})
    assert any(row["stage"] == "k_post_rope" for row in declared["rows"])


def test_a_float16_cache_is_named(tmp_path: Path) -> None:
    file = gguf_file(tmp_path / "m.gguf", "F32")
    flash = failing(audit(captured(file, tmp_path / "flash")))
    plain = failing(audit(captured(file, tmp_path / "plain", "--attention", "eager")))
    assert flash == {"attention": "precision: queries, keys and values in float16, and at each key the accumulators"}
    assert plain == {"attention": "precision: queries, keys, values and probabilities in float16"}


def test_a_wrong_weight_is_found_and_named(tmp_path: Path) -> None:
    """The engine is handed another file than the judge; both quantised by ggml."""
    weights = random_weights(SMALL.config())
    name = "model.layers.0.self_attn.o_proj.weight"
    wrong = {**weights, name: weights[name][[1, 0, *range(2, len(weights[name]))]]}
    right = gguf_file(tmp_path / "right.gguf", "Q4_K", weights=weights)
    out = captured(gguf_file(tmp_path / "wrong.gguf", "Q4_K", weights=wrong), tmp_path / "dump", *EXACT)
    save_file(dumped(out), recorded := tmp_path / "recorded.safetensors")
    how: dict[str, Any] = {"model": str(right), "tokens": ",".join(map(str, TOKENS))}
    found = audit(recorded, **how, activations="ggml")
    assert list(failing(found)) == ["attn_out"]
    assert "rows 0 and 1 of self_attn.o_proj.weight are swapped" in found["culprit"]["hint"]
    found = audit(recorded, **how)
    assert [stage for stage, text in failing(found).items() if text.startswith("bug")] == ["attn_out"]


def test_through_products_that_nobody_recorded(tmp_path: Path) -> None:
    """From the logits alone: declared a run is right, undeclared it is named what its kernels do."""
    file = gguf_file(tmp_path / "m.gguf", "Q8_0")
    logits = dumped(captured(file, tmp_path / "dump", *EXACT))["lm_head"]
    save_file({"lm_head": logits}, tmp_path / "logits.safetensors")
    how: dict[str, Any] = {"model": str(file), "tokens": ",".join(map(str, TOKENS))}
    assert audit(tmp_path / "logits.safetensors", **how, activations="ggml")["outcome"] == "sound"
    found = audit(tmp_path / "logits.safetensors", **how)
    assert list(failing(found)) == ["lm_head"]
    assert (found["culprit"]["verdict"], found["outcome"]) == ("precision", "faulty")
    assert found["culprit"]["hint"].endswith("take their inputs to what goes with their weights")
    assert audit(tmp_path / "logits.safetensors", **how, accepted="usual")["outcome"] == "sound"
    save_file({"lm_head": np.roll(logits, 1, axis=1)}, tmp_path / "logits.safetensors")
    assert audit(tmp_path / "logits.safetensors", **how)["culprit"]["verdict"] == "bug"


def test_the_dump_says_how_it_was_run(tmp_path: Path) -> None:
    out = captured(gguf_file(tmp_path / "m.gguf", "F16"), tmp_path / "dump", "--attention", "flash")
    facts = json.loads((out / "manifest.json").read_text())["facts"]
    said = {name: facts[name] for name in ("engine", "attention", "cache", "device", "xllamacpp")}
    version = library.WHEELS["xllamacpp"]
    assert said == {
        "engine": "llama.cpp",
        "attention": "flash",
        "cache": "float16",
        "device": "cpu",
        "xllamacpp": version,
    }
    assert "AVX" in facts["system"] or "NEON" in facts["system"]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--compile",), 2, "leave --compile, --deep, --device and --dtype out"),
        (("--attention", "sdpa"), 2, "llama.cpp has --attention eager or flash"),
        (("--kv-cache", "static"), 2, "and --kv-cache float32 or float16"),
    ],
)
def test_what_it_has_not_is_refused(options: tuple[str, ...], code: int, said: str, tmp_path: Path) -> None:
    file = gguf_file(tmp_path / "m.gguf", "F32")
    done = svf("capture", file, "--engine", "llama.cpp", "--tokens", "1", "--out", tmp_path / "dump", *options)
    assert done.code == code
    assert said in done.err


def test_what_llama_cpp_does_not_load_is_said_in_its_words(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", SMALL)  # without a tokenizer
    done = svf("capture", file, "--engine", "llama.cpp", "--tokens", "1", "--out", tmp_path / "dump")
    assert done.code == 3
    assert "llama.cpp does not load" in done.err
    assert "tokenizer" in done.err


def test_other_builds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(library.WHEELS, "xllamacpp", "1.2")
    with pytest.raises(library.NotFoundError, match=r"the structs that are read here are 1\.2's: pip install "):
        library.load()


def test_a_graph_without_a_node_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of another build's, which names its nodes otherwise."""
    from svf_llama import capture

    monkeypatch.setattr(capture, "_NODES", {**capture._NODES, ("renamed", None): ("attn_norm", 0)})
    file = gguf_file(tmp_path / "m.gguf", "F32")
    with open_model(str(file)) as model:
        config: ModelConfig = model.config
        with pytest.raises(capture.InputError, match=r"lacks layers\.0\.attn_norm \(node renamed\)"):
            capture.run(config, model.raw_config, model, str(file), [TOKENS])
