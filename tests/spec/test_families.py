"""Families: what each declares, Llama's configs, and a family whose layers are of two kinds, run and judged."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forward_models import MODELS, change_dump, dumped, stages_of, trace, write_model
from helpers import svf

from stages.errors import InputError
from stages.oracle.components import ReferenceBackend
from stages.run.budget import forward_bytes
from stages.spec.blocks import attention, decoder_layer, swiglu
from stages.spec.config import FULL, ModelConfig
from stages.spec.families import FAMILIES, parameter_shapes, parse_config
from stages.spec.family import Family
from stages.spec.forward import DECLARED, forward_pipeline

RAW = MODELS["llama-tied"].raw("float32")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_no_stage_that_its_family_did_not_announce(name: str) -> None:
    config = MODELS[name].config("float32")
    family = FAMILIES[config.family]
    announced = {stage.name for block in (family.before, *family.widest, family.after) for stage in block.stages}
    path = forward_pipeline(config)
    assert set(path) <= announced
    for _, stage in stages_of(config):
        if not stage.identity:
            declared = DECLARED[stage.function]
            assert (declared.noise, declared.shape, declared.options) == (stage.noise, stage.shape, stage.options)


# -- Llama --------------------------------------------------------------------------------------------------------


def llama_config(**changes: Any) -> ModelConfig:
    return parse_config({**RAW, **changes}, "x/config.json")


def test_llama_reads_its_biases_and_head_dim() -> None:
    plain = llama_config(attention_bias=False)
    assert (plain.qk_norm, plain.qkv_bias, plain.o_bias, plain.sliding_window) == (False, False, False, None)
    assert (plain.head_dim, llama_config(head_dim=None).head_dim) == (32, 16)
    biased = llama_config(attention_bias=True)
    assert (biased.qkv_bias, biased.o_bias) == (True, True)
    names = [name for name in parameter_shapes(biased) if name.endswith(".bias")]
    assert names[:4] == [f"model.layers.0.self_attn.{x}_proj.bias" for x in "qkvo"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_bias": True}, "mlp_bias: true asks for biases in the feed-forward"),
        ({"mlp_bias": 1}, "mlp_bias: expected true or false, got 1"),
        ({"attention_bias": None}, "attention_bias: expected true or false, got null"),
        ({"num_attention_heads": 6}, "num_attention_heads: 6 does not divide hidden_size 64"),
        ({"head_dim": 5}, "head_dim: 5 is odd"),
        ({"hidden_act": "gelu"}, "hidden_act: expected silu"),
        ({"model_type": "gemma3"}, "model_type: expected qwen3 or .*, got 'gemma3'"),
    ],
)
def test_what_llama_does_not_compute_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"x/config.json: {message}"):
        llama_config(**changes)


# -- two kinds of layers ------------------------------------------------------------------------------------------


def _plain_attention() -> Any:
    """No norms of heads, no q and k biases; its first norm is computed by another stage's function."""
    block = attention()
    first = dataclasses.replace(block.stages[0], function="ffn_norm")
    return dataclasses.replace(block, stages=(first, *block.stages[1:]))


TWO_KINDS = Family(
    "qwen3",
    "two kinds",
    FAMILIES["qwen3"].parse,
    lambda _: {
        FULL: decoder_layer(attention(qk_norm=True), swiglu()),
        "plain": decoder_layer(_plain_attention(), swiglu()),
    },
    widest=FAMILIES["qwen3"].widest,
    kind_of=lambda _, layer: "plain" if layer % 2 else FULL,
)


@pytest.fixture
def two_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The forward of a model whose layers 0 and 2 norm their heads, and layer 1 does not; beside its checkpoint."""
    monkeypatch.setitem(FAMILIES, "qwen3", TWO_KINDS)
    model = write_model(tmp_path / "model", dataclasses.replace(MODELS["qwen3"], layers=3), "float32")
    trace(model, ReferenceBackend(), out=tmp_path / "dump")
    return tmp_path


def test_each_layer_has_the_stages_and_parameters_of_its_kind(two_kinds: Path) -> None:
    config = dataclasses.replace(MODELS["qwen3"], layers=3).config("float32")
    path = forward_pipeline(config)
    assert ["q_norm" in path.of(layer) for layer in range(3)] == [True, False, True]
    assert (path.at((0, "q_post_rope")).inputs[0], path.at((1, "q_post_rope")).inputs[0]) == ("q_norm", "qkv_bias")
    assert "q_norm" in path
    assert path.at((1, "layer_output")).name == "post_ffn_residual"
    normed = [name for name in parameter_shapes(config) if name.endswith("self_attn.q_norm.weight")]
    assert normed == ["model.layers.0.self_attn.q_norm.weight", "model.layers.2.self_attn.q_norm.weight"]
    recorded = dumped(two_kinds / "dump")
    assert [f"layers.{n}.q_norm" in recorded for n in range(3)] == [True, False, True]
    assert recorded["layers.1.q_post_rope"].shape == recorded["layers.0.q_post_rope"].shape


def test_memory_is_that_of_the_largest_kind(two_kinds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(MODELS["qwen3"], layers=3).config("float32")
    both = forward_bytes(config, forward_pipeline(config), 512)
    for kind, least in ((FULL, both), ("plain", both - 1)):
        monkeypatch.setitem(FAMILIES, "qwen3", dataclasses.replace(TWO_KINDS, kind_of=lambda *_, kind=kind: kind))
        assert forward_bytes(config, forward_pipeline(config), 512) <= least
    monkeypatch.setitem(FAMILIES, "qwen3", dataclasses.replace(TWO_KINDS, kind_of=lambda _, n: ("plain", FULL)[n % 2]))
    assert forward_bytes(config, forward_pipeline(config), 512) == both


def test_a_stage_asked_of_all_layers_is_recorded_where_there_is_one(two_kinds: Path) -> None:
    trace(two_kinds / "model", ReferenceBackend(), out=two_kinds / "few", stages="q_norm,ffn_out", layers="0-1")
    assert sorted(dumped(two_kinds / "few")) == ["layers.0.ffn_out", "layers.0.q_norm", "layers.1.ffn_out"]
    assert svf("verify", two_kinds / "few", "--json").code == 0


def test_layers_of_two_kinds_are_judged_each_by_its_own(two_kinds: Path) -> None:
    done = svf("audit", two_kinds / "dump", "--json")
    assert (done.code, done.json["outcome"]) == (0, "sound")
    judged = {(row["layer"], row["stage"]) for row in done.json["rows"]}
    assert (0, "q_norm") in judged
    assert (1, "q_norm") not in judged

    def as_of_the_other_kind(tensors: dict[str, np.ndarray]) -> None:
        tensors["layers.1.q_post_rope"] = tensors["layers.1.q_post_rope"] / 2

    change_dump(two_kinds / "dump", as_of_the_other_kind)
    done = svf("audit", two_kinds / "dump", "--json")
    assert (done.code, done.json["culprit"]["layer"], done.json["culprit"]["stage"]) == (1, 1, "q_post_rope")
