"""Mistakes that real people made, planted in a plain forward: the stage and the cause in words, and its twins sound."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forward_models import MODELS, Model, random_weights, tokens_of
from plain_forward import MISTAKES, NAMED, Mistake, Plain, step, weight

from stages.files.tensorfile import write_tensors
from stages.judge.audit import audit

DTYPES = ["float32", "bfloat16", "float16"]
TOKENS = tokens_of(24)


def audited(
    folder: Path,
    dtype: str,
    mistake: Mistake | None,
    model: Model = MODELS["qwen3-untied"],
    block: int = 0,
    **weights: Any,
) -> dict[str, Any]:
    """The audit of a plain forward with a mistake; `weights` change the model itself, by name."""
    raw, right = model.raw(dtype), random_weights(model.config(dtype))
    for name, change in weights.items():
        change(right[name])
    (folder / "config.json").write_text(json.dumps(raw))
    write_tensors(folder / "model.safetensors", right, metadata={"format": "pt"})
    plain = Plain(raw, right, dtype, block)
    if mistake is not None:
        mistake(plain)
    with np.errstate(all="ignore"):
        write_tensors(folder / "recorded.safetensors", plain.run(TOKENS))
    return audit(folder / "recorded.safetensors", model=str(folder), tokens=",".join(map(str, TOKENS)))


# Roundings inside a stage: the stage is found, and of the cause nothing is said that is not so.
FOUND = {
    "1/rms in bfloat16": "attn_norm",
    "softmax in bfloat16": "attn_softmax",
    "silu in bfloat16": "ffn_silu",
}


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", NAMED)
def test_a_mistake_is_named_with_its_stage_and_cause(mistake: str, dtype: str, tmp_path: Path) -> None:
    stage, words = NAMED[mistake]
    document = audited(tmp_path, dtype, MISTAKES[mistake])
    found = document["culprit"]
    assert (document["outcome"], found["stage"], found["layer"]) == (
        "faulty",
        stage,
        None if stage == "lm_head" else 0,
    )
    assert words in found["hint"]
    assert words in document["verdict"]


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", FOUND)
def test_a_rounding_inside_a_stage_has_no_false_cause(mistake: str, dtype: str, tmp_path: Path) -> None:
    found = audited(tmp_path, dtype, MISTAKES[mistake])["culprit"]
    assert found["stage"] == FOUND[mistake]
    assert all(word not in (found["hint"] or "") for word in ("RoPE", "mask", "eps", "missing", "instead"))


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", ["qwen3-untied", "qwen3-gqa4", "qwen2", "qwen2-gqa7"])
@pytest.mark.parametrize("block", [0, 7])
def test_right_twins_in_other_orders_of_summation_are_sound(model: str, block: int, dtype: str, tmp_path: Path) -> None:
    document = audited(tmp_path, dtype, None, MODELS[model], block)
    assert (document["outcome"], document["culprits"]) == ("sound", [])


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "place", "value", "stage", "words"),
    [
        ("mlp.down_proj.weight", (17, 33), lambda w: -w[17, 33], "ffn_out", "the sign of N[17, 33] is flipped"),
        ("mlp.up_proj.weight", (17, 33), lambda w: 0, "ffn_up", "N[17, 33] is 0, not"),
        (
            "self_attn.k_proj.weight",
            (3, 9),
            lambda w: w[3, 8],
            "qkv_matmul",
            "N[3, 9] equals its neighbour's",
        ),
        ("self_attn.q_norm.weight", 9, lambda w: -w[9], "q_norm", "the sign of N[9] is flipped"),
        ("mlp.gate_proj.weight", [3, 5], lambda w: w[[5, 3]], "ffn_gate", "rows 3 and 5 of N are swapped"),
    ],
)
def test_a_wrong_element_of_a_loaded_weight_is_told(
    name: str, place: Any, value: Any, stage: str, words: str, dtype: str, tmp_path: Path
) -> None:
    def change(w: np.ndarray) -> None:
        w[place] = value(w)

    document = audited(tmp_path, dtype, weight(f"model.layers.1.{name}", change))
    found = document["culprit"]
    assert (found["stage"], found["layer"], len(document["culprits"])) == (stage, 1, 1)
    assert words.replace("N", name) in found["hint"]
    assert " of the bound" in found["hint"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_an_embedding_are_told(dtype: str, tmp_path: Path) -> None:
    token = TOKENS[5]

    def change(w: np.ndarray) -> None:
        w[token] = w[token - 1]

    found = audited(tmp_path, dtype, weight("model.embed_tokens.weight", change))["culprit"]
    assert (found["stage"], found["hint"]) == (
        "embedding",
        f"row {token} of model.embed_tokens.weight is row {token - 1}'s",
    )


def test_operands_in_float16_are_told_from_tf32_by_what_overflows(tmp_path: Path) -> None:
    """Layer 0 has ten mantissa bits; layer 1, whose norm gives larger values, is infinite."""

    def large(w: np.ndarray) -> None:
        w[3] = 2e5

    document = audited(
        tmp_path, "float32", MISTAKES["products in float16"], **{"model.layers.1.input_layernorm.weight": large}
    )
    found = document["culprit"]
    assert (found["verdict"], found["stage"], found["layer"]) == ("precision", "qkv_matmul", 0)
    assert found["hint"] == "its operands have 10 mantissa bits, TF32-like or float16-like (with its range)"
    assert (
        "; qkv_matmul of layer 1: not finite where an operand is beyond 65504, the range of float16: "
        in (document["verdict"])
    )
    assert "not to TF32 or bfloat16, which have float32's range" in document["verdict"]


def test_a_suspect_keeps_its_hint(tmp_path: Path) -> None:
    """Another program's suspect cannot be run again, which is said beside what its error explains."""

    def wrong(plain: Plain, right: Any, x: np.ndarray, w: np.ndarray, bias: Any = None, name: str = "") -> np.ndarray:
        y = right(x, w, bias, name=name)
        some = np.random.default_rng(5).uniform(-1, 1, y.shape)  # no recipe gives that
        return (y * (1 + 4e-5 * some)).astype(np.float32) if name == "gate_proj" else y

    # So long a sum that the rigorous bound is far above the calibrated one.
    wide = dataclasses.replace(MODELS["qwen3-untied"], hidden=512, layers=1)
    found = audited(tmp_path, "float32", step("linear", wrong), wide)["culprit"]
    assert (found["verdict"], found["stage"], found["layer"]) == ("suspect", "ffn_gate", 0)
    assert found["hint"].startswith("no known recipe gives it; the nearest is: ")
    assert "; not run again: " in found["hint"]
