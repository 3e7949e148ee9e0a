"""llama.cpp's attention on a CPU, in plain loops as its source has it, is named: of a float16 cache, by keys or tiles.

ggml-cpu/ops.cpp of October 2026 (commit 0c1e5709, in llama-cpp-python 0.3.36): key by key up to 63 tokens, in tiles of
64 keys from there on. Older versions have the first alone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from forward_models import MODELS, change_dump, trace, write_model
from recorded_models import recorded

from stages.judge.audit import audit
from stages.oracle.verdict import consult
from stages.recipes.side import SideVerdict
from stages.spec.backend import Backend
from stages.spec.forward import DECLARED

KEY_BY_KEY = "queries, keys and values in float16, and at each key the accumulators"
TILES = "keys and values in float16, divided by the sum of float32 numerators at the end"
GIVEN = Path(__file__).with_name("llama_attention.npz")
F, H, D = np.float32, np.float16, np.float64


def exp(x: np.ndarray) -> np.ndarray:
    return np.exp(x.astype(D)).astype(F)


def plain(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A sum of products rounded once, where an engine has some order."""
    return (x.astype(D) @ y.astype(D)).astype(F)


def key_by_key(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: np.float32) -> np.ndarray:
    """`ggml_compute_forward_flash_attn_ext_f16_one_chunk` of a query `[d]`, the keys that it sees and their values."""
    q, k, v = (x.astype(H) for x in (q, k, v))
    sums, largest, acc = F(0), F(-np.inf), np.zeros(v.shape[1], H)
    for key, value in zip(k, v, strict=True):
        s, ms, vs = plain(key, q) * scale, F(1), F(1)
        if s > largest:
            ms, largest = exp(largest - s), s
            acc = (acc.astype(F) * ms).astype(H)
        else:
            vs = exp(s - largest)
        acc = (acc.astype(D) + value.astype(D) * D(vs)).astype(F).astype(H)
        sums = F(sums * ms + vs)
    return acc.astype(F) * (F(1) / sums)


def in_tiles(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: np.float32) -> np.ndarray:
    """`ggml_compute_forward_flash_attn_ext_tiled`: queries stay in float32, and so do the accumulators."""
    k, v = (x.astype(H).astype(F) for x in (k, v))
    sums, largest, acc = F(0), F(-np.inf), np.zeros(v.shape[1], F)
    for at in range(0, len(k), 64):
        s = plain(k[at : at + 64], q) * scale
        most = max(largest, s.max())
        ms, largest = exp(largest - most), most
        p = exp(s - most)
        acc, sums = acc * ms + plain(p, v[at : at + 64]), sums * ms + p.sum(dtype=F)
    return acc * (F(1) / sums)


def attended(one, q: np.ndarray, k: np.ndarray, qkv: np.ndarray, scale: float, *, seen: int = 1) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Attention by `one` of queries, each of which sees the keys up to it and `seen` - 1 more."""
    tokens, heads, dim = q.shape
    group, v = heads // k.shape[1], qkv[:, -k.shape[1] * dim :].reshape(k.shape)
    rows = [
        [one(q[t, h], k[: t + seen, h // group], v[: t + seen, h // group], F(scale)) for h in range(heads)]
        for t in range(tokens)
    ]
    return np.array(rows, F).reshape(tokens, -1)


@pytest.mark.parametrize(("one", "words", "least"), [(key_by_key, KEY_BY_KEY, 1.0), (in_tiles, TILES, 0.2)])
def test_it_is_named_as_what_llama_does_by_default(one, words: str, least: float) -> None:  # type: ignore[no-untyped-def]
    oracle = recorded("qwen3-gqa4", "float32").oracle((1, "attention"))
    of_scores = oracle.made["attn_softmax"]().made["attn_scores"]()
    q, k = of_scores.arguments
    wrote = attended(one, q, k, oracle.arguments[1], of_scores.options["scaling"])
    side = SideVerdict()
    side.add(oracle, wrote)
    assert (side.verdict, side.recipe) == ("precision", words)
    assert (side.usual or "").startswith("as llama.cpp does by default")
    assert side.bits >= least * side.elements
    # The same with a key too many is another function, or nothing that is known.
    wrong = SideVerdict()
    wrong.add(oracle, attended(one, q, k, oracle.arguments[1], of_scores.options["scaling"], seen=2))
    assert wrong.verdict in ("bug", "suspect")


@pytest.mark.parametrize(
    ("name", "sizes", "words"), [("keys", (12, 2, 1, 32), KEY_BY_KEY), ("tiles", (64, 1, 1, 32), TILES)]
)
def test_what_the_engine_itself_gave_is_named(name: str, sizes: tuple[int, int, int, int], words: str) -> None:
    """Bits of ggml's own kernel, built from that commit for AVX2, called by `ggml_flash_attn_ext` on one thread."""
    tokens, heads, kv_heads, dim = sizes
    rng = np.random.default_rng(tokens)
    q, k, qkv = (
        rng.standard_normal(shape, F)
        for shape in ((tokens, heads, dim), (tokens, kv_heads, dim), (tokens, (heads + 2 * kv_heads) * dim))
    )
    float32 = {stage: replace(DECLARED[stage], dtype="float32") for stage in ("attn_scores", "attn_softmax")}
    scores = consult(float32["attn_scores"], (q, k), {"scaling": dim**-0.5})
    softmax = consult(float32["attn_softmax"], (scores.rounded,), {})
    softmax = replace(softmax, made={"attn_scores": lambda: scores})
    options = {"heads": heads, "kv_heads": kv_heads, "head_dim": dim}
    oracle = consult(replace(DECLARED["attention"], dtype="float32"), (softmax.rounded, qkv), options)
    side = SideVerdict()
    side.add(replace(oracle, made={"attn_softmax": lambda: softmax}), np.load(GIVEN)[name])
    assert (side.verdict, side.recipe) == ("precision", words)


@pytest.mark.parametrize(("one", "words"), [(key_by_key, KEY_BY_KEY), (in_tiles, TILES)])
def test_so_it_is_where_scores_and_probabilities_were_not_recorded(  # type: ignore[no-untyped-def]
    one, words: str, tmp_path: Path, torch_backend: Backend
) -> None:
    model = write_model(tmp_path / "model", MODELS["qwen3"], "float32")
    trace(model, torch_backend, out=tmp_path / "dump", tokens="3,141,59,26,53,58,97,93")
    key = "layers.1.attention"

    def replaced(tensors: dict[str, np.ndarray]) -> None:
        q, k, qkv = (tensors[f"layers.1.{name}"] for name in ("q_post_rope", "k_post_rope", "qkv_matmul"))
        tensors[key] = attended(one, q, k, qkv, q.shape[-1] ** -0.5)
        for name in ("attn_scores", "attn_softmax"):
            del tensors[f"layers.1.{name}"]

    change_dump(tmp_path / "dump", replaced)
    row = next(row for row in audit(tmp_path / "dump")["rows"] if row["key"] == key)
    assert (row["verdict"], row["recipe"]) == ("precision", words)
    accepted = next(row for row in audit(tmp_path / "dump", accepted="usual")["rows"] if row["key"] == key)
    assert accepted["verdict"] == "accepted"
