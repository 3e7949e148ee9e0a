"""Right forwards as engines record them: other tables, other dtypes, parts of a run; each must be judged sound.

Beside each stands its twin: the same recording with one recorded stage off by 1/32, which must be found there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from stages.selftest.fault import Call, float32
from stages.selftest.specimens import SPECIMENS, Specimen
from stages.spec.profiles import TABLES

Arrays = dict[str, np.ndarray]
Way = Callable[[Call], np.ndarray]
Writer = Callable[[Arrays, Specimen], Arrays]
Rope = Callable[[Specimen], dict[str, Any]]  # a model's rope_parameters, but for the theta that all have

# The specimens that every recording is made of: both families, and every dtype that activations may have.
MADE_OF = ("qwen3", "qwen2", "qwen3-bf16", "qwen2-bf16", "qwen3-f16")
# Layer and size of what is changed in a twin: far beyond every dtype's rounding, and no other power of two.
SPOILED_LAYER, SPOILED_BY = 1, 1 + 1 / 32


@dataclass(frozen=True)
class Recording:
    """One way to record a right forward.

    `ways` compute a stage otherwise than the backend does, and rightly, in every call; `write` makes of the run's
    arrays, by key, what the program records; `rope` are the model's rope_parameters. The twin is off at `spoiled`.
    """

    name: str
    doc: str
    ways: Mapping[str, Way] = field(default_factory=dict)
    write: Writer = lambda arrays, _specimen: arrays
    rope: Rope = lambda _specimen: {}
    spoiled: str = "attention"

    def specimen(self, name: str) -> Specimen:
        """The model that a run of this recording is made with."""
        return replace(SPECIMENS[name], rope=tuple(self.rope(SPECIMENS[name]).items()))

    def spoil(self, arrays: Mapping[str, np.ndarray]) -> Arrays:
        """What is recorded with `spoiled` off, in one layer where it has several."""
        key = next(k for k in (f"layers.{SPOILED_LAYER}.{self.spoiled}", self.spoiled) if k in arrays)
        array = arrays[key]
        return {**arrays, key: (float32(array) * np.float32(SPOILED_BY)).astype(array.dtype)}


# -- ways ---------------------------------------------------------------------------------------------------------


def _from(start: int) -> Way:
    return lambda call: call.of(call.arguments[0], call.arguments[1] + start)


def _angle_float64(call: Call) -> np.ndarray:
    frequencies, positions = call.arguments
    half = positions.astype(np.float64)[:, None] * frequencies.astype(np.float64)
    return np.concatenate((half, half), axis=-1)


def _by_log(call: Call) -> np.ndarray:
    """theta^(-2i/d) as exp(-log(theta) 2i/d), all in float32."""
    exponent = np.arange(0, call.options["head_dim"], 2, dtype=np.float32) / np.float32(call.options["head_dim"])
    return np.exp(-np.log(np.float32(call.options["rope_theta"])) * exponent)


def _float64_frequencies(call: Call) -> np.ndarray:
    size = call.options["head_dim"]
    return np.float64(call.options["rope_theta"]) ** -(np.arange(0, size, 2) / size)


def _table(function: Callable[[np.ndarray], np.ndarray]) -> Way:
    return lambda call: function(call.arguments[0].astype(np.float64)) * call.options["attention_scaling"]


_FLOAT64_TABLES = {"rope_cos": _table(np.cos), "rope_sin": _table(np.sin)}


# -- what is written ----------------------------------------------------------------------------------------------


def _without(*stages: str) -> Writer:
    return lambda arrays, _s: {key: a for key, a in arrays.items() if key.rpartition(".")[2] not in stages}


def _only(*stages: str) -> Writer:
    return lambda arrays, _s: {key: a for key, a in arrays.items() if key.rpartition(".")[2] in stages}


def _in_float32(arrays: Arrays, _specimen: Specimen) -> Arrays:
    return {key: float32(array) for key, array in arrays.items()}


def _wide_logits(arrays: Arrays, specimen: Specimen) -> Arrays:
    """Logits summed and kept in float32, from operands as the model has them."""
    weights = specimen.weights()
    head = float32(weights.get("lm_head.weight", weights["model.embed_tokens.weight"]))
    return {**arrays, "lm_head": float32(arrays["final_norm"]) @ head.T}


def _batched(arrays: Arrays, _specimen: Specimen) -> Arrays:
    return {key: array[None] for key, array in arrays.items()}


def _flat(arrays: Arrays, _specimen: Specimen) -> Arrays:
    return {key: array.reshape(-1) for key, array in arrays.items()}


def _heads_first(arrays: Arrays, _specimen: Specimen) -> Arrays:
    turned = ("q_norm", "k_norm", "q_post_rope", "k_post_rope")
    return {k: a.swapaxes(0, 1) if k.rpartition(".")[2] in turned else a for k, a in arrays.items()}


def _no_future(value: float) -> Writer:
    """Scores of keys to come as a decode with a cache leaves them: never computed."""

    def write(arrays: Arrays, _specimen: Specimen) -> Arrays:
        def masked(scores: np.ndarray) -> np.ndarray:
            later = np.logical_not(np.tri(*scores.shape[-2:], dtype=np.bool_))
            return np.where(later, np.asarray(value, scores.dtype), scores)

        return {k: masked(a) if k.endswith("attn_scores") else a for k, a in arrays.items()}

    return write


def _last_logits(arrays: Arrays, _specimen: Specimen) -> Arrays:
    return {**arrays, "lm_head": arrays["lm_head"][-1]}


def _rope(rope_type: str, **parameters: Any) -> Rope:
    return lambda _specimen: {"rope_type": rope_type, **parameters}


_LLAMA3 = _rope("llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)


def _longrope(specimen: Specimen) -> dict[str, Any]:
    """Past its original length, so that the long factors count; they grow over the frequencies."""
    half = specimen.head_dim // 2
    return {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": specimen.tokens // 2,
        "short_factor": tuple(1.0 + i / 64 for i in range(half)),
        "long_factor": tuple(1.0 + i / 4 for i in range(half)),
    }


RECORDINGS: Mapping[str, Recording] = {
    r.name: r
    for r in (
        Recording("all stages", "every stage, as it was computed"),
        Recording(
            "no tables", "no frequencies, angles, cosines or sines", write=_without(*TABLES), spoiled="q_post_rope"
        ),
        Recording("cosines alone", "cosines and sines without the angle", write=_without("inv_freq", "rope_angle")),
        Recording("tables of float64", "cosines and sines of float64, rounded once", _FLOAT64_TABLES),
        Recording(
            "tables of float64, no angle",
            "angles, cosines and sines of float64; the angle is not recorded",
            {"rope_angle": _angle_float64, **_FLOAT64_TABLES},
            _without("inv_freq", "rope_angle"),
        ),
        Recording("frequencies by exp", "exp(-log(theta) 2i/d) in float32", {"inv_freq": _by_log}),
        Recording(
            "frequencies by exp, no tables",
            "exp(-log(theta) 2i/d) in float32; no table recorded",
            {"inv_freq": _by_log},
            _without(*TABLES),
            spoiled="k_post_rope",
        ),
        Recording("frequencies of float64", "the power of float64, rounded once", {"inv_freq": _float64_frequencies}),
        Recording("from token 100", "a decode or a row whose positions begin at 100", {"rope_angle": _from(100)}),
        Recording(
            "from token 100, no tables",
            "the same, no table recorded",
            {"rope_angle": _from(100)},
            _without(*TABLES),
        ),
        Recording(
            "a padded row",
            "positions count five pads before it; cosines alone",
            {"rope_angle": _from(5)},
            _without("inv_freq", "rope_angle"),
        ),
        Recording("logits in float32", "the head sums and keeps float32", write=_wide_logits, spoiled="lm_head"),
        Recording("stored in float32", "a narrow run, value for value in float32", write=_in_float32),
        Recording(
            "stored in float32, logits wide",
            "the same, the head's logits real float32",
            write=lambda a, s: _in_float32(_wide_logits(a, s), s),
            spoiled="lm_head",
        ),
        Recording("a batch axis", "a batch of one", write=_batched),
        Recording("flat", "values without a shape", write=_flat),
        Recording(
            "heads first", "heads before tokens, where a stage has heads", write=_heads_first, spoiled="k_post_rope"
        ),
        Recording("scores masked", "scores of keys to come at -inf", write=_no_future(-np.inf), spoiled="attn_scores"),
        Recording(
            "scores of a decode",
            "scores of keys to come never computed: 0",
            write=_no_future(0.0),
            spoiled="attn_softmax",
        ),
        Recording("no qkv_matmul", "q, k and v once", write=_without("qkv_matmul")),
        Recording("last logits", "the logits of the last token", write=_last_logits, spoiled="final_norm"),
        Recording(
            "one operation: RoPE",
            "what goes into RoPE and what comes out",
            write=_only("q_norm", "k_norm", "qkv_bias", "rope_cos", "rope_sin", "q_post_rope", "k_post_rope"),
            spoiled="q_post_rope",
        ),
        Recording(
            "one operation: feed forward",
            "a feed-forward block's own steps",
            write=_only("ffn_norm", "ffn_gate", "ffn_up", "ffn_silu", "ffn_swigl", "ffn_out"),
            spoiled="ffn_up",
        ),
        Recording(
            "one operation: softmax",
            "scores and probabilities",
            write=_only("attn_scores", "attn_softmax"),
            spoiled="attn_softmax",
        ),
        Recording("linear", "rope_type linear", rope=_rope("linear", factor=4.0)),
        Recording("dynamic", "rope_type dynamic", rope=_rope("dynamic", factor=2.0)),
        Recording("yarn", "rope_type yarn", rope=_rope("yarn", factor=4.0, original_max_position_embeddings=256)),
        Recording("llama3", "rope_type llama3", rope=_LLAMA3),
        Recording("llama3, no tables", "the same, no table recorded", write=_without(*TABLES), rope=_LLAMA3),
        Recording("longrope", "rope_type longrope, past its original length", rope=_longrope),
    )
}
