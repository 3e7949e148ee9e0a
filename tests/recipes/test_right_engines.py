"""Right engines round where they like: each such forward, by somebody's plain numpy, is judged right and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from forward_models import MODELS, tokens_of, write_model
from helpers import svf, tensors_of
from plain_forward import Array, Plain
from safetensors.numpy import save_file

import svf as library

MODEL = "qwen3-gqa4"
COUNT = 16


def weight_in_float32(p: Plain, x: Array, w: Array, name: str = "") -> Array:
    mean = np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32)
    return p.r(x / np.sqrt(mean + np.float32(p.eps)) * w)


def weight_in_the_root(p: Plain, x: Array, w: Array, name: str = "") -> Array:
    mean = np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32)
    return p.r(x * (np.float32(1) / np.sqrt(mean + np.float32(p.eps)) * w))


def scaled_once(p: Plain, q: Array, k: Array) -> Array:
    k = np.repeat(k, p.heads // p.kv_heads, axis=1)
    return p.r(p.dot(q.swapaxes(0, 1), k.transpose(1, 2, 0)) * np.float32(p.dim**-0.5))


def scale_in_q(p: Plain, q: Array, k: Array) -> Array:
    k = np.repeat(k, p.heads // p.kv_heads, axis=1)
    return p.r(p.dot(p.r(q * np.float32(p.dim**-0.5)).swapaxes(0, 1), k.transpose(1, 2, 0)))


def turned_once(p: Plain, x: Array, cos: Array, sin: Array) -> Array:
    half = x.shape[-1] // 2
    turned = np.concatenate((-x[..., half:], x[..., :half]), axis=-1)
    return p.r(x * cos[:, None] + turned * sin[:, None])


def narrow_scale(p: Plain, q: Array, k: Array) -> Array:
    k = np.repeat(k, p.heads // p.kv_heads, axis=1)
    product = p.r(p.dot(q.swapaxes(0, 1), k.transpose(1, 2, 0)))
    return p.r(product * p.r(np.array(p.dim**-0.5, np.float32)))


def silu_in_steps(p: Plain, gate: Array, up: Array) -> Array:
    return p.r(p.r(1 / p.r(1 + p.r(np.exp(-gate)))) * gate)


def two_ranks(p: Plain, x: Array, w: Array, bias: Array | None = None, name: str = "") -> Array:
    if name not in ("o_proj", "down_proj"):
        return p.linear(x, w, bias, name)
    half = x.shape[1] // 2
    return p.r(p.r(x[:, :half] @ w[:, :half].T) + p.r(x[:, half:] @ w[:, half:].T))


Step = Callable[..., Any]
# What an engine does otherwise: which step, the stage it shows in, and words of its recipe. A weight folded into the
# root gives, but for an element in thousands, the numbers of one that is multiplied in float32.
SOUND: dict[str, tuple[str, Step, str, str]] = {
    "norm, weight in float32": ("norm", weight_in_float32, "attn_norm", "times the weight in float32, rounded once"),
    "norm, weight in the root": ("norm", weight_in_the_root, "ffn_norm", "the weight"),
    "scores scaled once": ("scores", scaled_once, "attn_scores", "scaled in float32, rounded once"),
    "scale folded into q": ("scores", scale_in_q, "attn_scores", "the scale folded into q, which is rounded"),
    "rope rounded once": ("rope", turned_once, "q_post_rope", "in float32, rounded once"),
}
NARROWER: dict[str, tuple[str, Step, str, str]] = {
    "scale rounded": ("scores", narrow_scale, "attn_scores", "the scale itself rounded to bfloat16"),
    "silu in steps": ("silu", silu_in_steps, "ffn_silu", "in bfloat16: exponential, sum, inverse and product"),
    "partial sums of ranks": ("linear", two_ranks, "attn_out", "partial sums of 2 slices of K rounded to bfloat16"),
}


def audited(folder: Path, dtype: str, step: str, does: Step) -> Any:
    model = write_model(folder / "model", MODELS[MODEL], "bfloat16")
    weights = {k: v for file in model.glob("*.safetensors") for k, v in tensors_of(file).items()}
    plain = Plain(json.loads((model / "config.json").read_text()), weights, dtype)
    plain.steps[step] = lambda *a, **k: does(plain, *a, **k)
    tokens = tokens_of(COUNT)
    save_file(plain.run(tokens), folder / "dump.safetensors")
    ids = ",".join(map(str, tokens))
    done = svf("audit", folder / "dump.safetensors", "--model", model, "--tokens", ids, "--json")
    return done.code, json.loads(done.out)


def row_of(document: Any, stage: str) -> Any:
    return next(row for row in document["rows"] if row["stage"] == stage)


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("engine", SOUND)
def test_another_place_to_round_is_right(tmp_path: Path, engine: str, dtype: str) -> None:
    step, does, stage, words = SOUND[engine]
    code, document = audited(tmp_path, dtype, step, does)
    assert (code, document["outcome"]) == (0, "sound"), document["verdict"]
    row = row_of(document, stage)
    assert row["class"] in ("prescribed", "equivalent")
    if dtype != "float32":  # there both are one to what a bound of float32 can tell
        assert words in row["recipe"]
        assert row["bits"] >= 0.99 * row["elements"]


@pytest.mark.parametrize("engine", NARROWER)
def test_fewer_bits_are_named_with_who_computes_so(tmp_path: Path, engine: str) -> None:
    step, does, stage, words = NARROWER[engine]
    code, document = audited(tmp_path, "bfloat16", step, does)
    assert (code, document["outcome"]) == (1, "faulty")
    assert document["culprit"]["stage"] == stage
    row = row_of(document, stage)
    assert (row["verdict"], row["class"]) == ("precision", "narrower")
    assert words in row["recipe"]
    assert row["usual"]
    assert row["bits"] >= 0.99 * row["elements"]


def test_roundings_left_out_between_stages_are_found(tmp_path: Path) -> None:
    """An engine that multiplies silu and up without rounding silu, which it records rounded."""

    def fused(p: Plain, silu: Array, up: Array, gate: Array) -> Array:
        return p.r(gate / (1 + np.exp(-gate)) * up)

    code, document = audited(tmp_path, "bfloat16", "swigl", fused)
    assert (code, document["outcome"]) == (0, "sound"), document["verdict"]
    assert row_of(document, "ffn_swigl")["recipe"] == "the recorded silu times up, rounded once; of unrounded ffn_silu"


def test_roundings_that_no_row_has_are_found_by_leaving_out_some() -> None:
    """A silu that rounds its exponential and its inverse, but not the sum between them."""
    rng = np.random.default_rng(3)
    r = lambda a: a.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)  # noqa: E731
    gate = r(2 * rng.standard_normal((32, 64)))
    written = r(r(1 / (1 + r(np.exp(-gate.astype(np.float64))))) * gate).astype(ml_dtypes.bfloat16)
    found = library.judge("ffn_silu", written, gate.astype(ml_dtypes.bfloat16))
    words = "exponential, sum, inverse and product each rounded, but not the sum"
    assert (found.verdict, words in (found.hint or "")) == ("precision", True), found
