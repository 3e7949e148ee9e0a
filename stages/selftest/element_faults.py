"""Faults in sums, the activation, the embedding and the logits, and single elements anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from stages.selftest.fault import (
    FLOAT32,
    Call,
    Fault,
    bfloat16,
    float16,
    float32,
    next_value,
    typical,
)
from stages.selftest.making import (
    Plant,
    another,
    of_operands,
    scaled,
    then,
)

SUMS = ("post_attn_residual", "post_ffn_residual")


def _sums() -> Iterator[Fault]:
    yield Fault("residual missing", SUMS, "the block alone", another(lambda x, y: y))
    yield Fault("block missing", SUMS, "the residual alone", another(lambda x, y: x))
    yield Fault("residual twice", SUMS, "added again", another(lambda x, y: x + y + x))
    yield Fault("block subtracted", SUMS, "the other sign", another(lambda x, y: x - y))
    yield Fault("block x (1 + size)", SUMS, "scaled before it is added", _scaled_block, on=FLOAT32, size=1.2e-07)
    yield Fault("sum in bfloat16", SUMS, "float32 was declared", then(bfloat16), on=FLOAT32)
    exact = ("rope_angle", "embedding", *SUMS, "ffn_swigl")
    yield Fault("one element + 1 ulp", exact, "the smallest change there is", _next)
    yield Fault("token 0 of zeros", ("embedding", *SUMS, "ffn_swigl"), "one row", _zero_first)


def _scaled_block(call: Call) -> np.ndarray:
    x, y = call.arguments
    return call.of(x, float32(y) * np.float32(1 + call.size))


def _next(call: Call) -> np.ndarray:
    right = call.right()
    return next_value(right, typical(right, call.rng))


def _zero_first(call: Call) -> np.ndarray:
    right = call.right()
    right[0] = 0
    return right


def _sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf, otypes=[np.float32])(x / math.sqrt(2)))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _activations() -> Iterator[Fault]:
    at = ("ffn_silu",)
    yield Fault("gelu for silu", at, "by erf", another(_gelu))
    yield Fault("gelu by tanh for silu", at, "gelu_pytorch_tanh", another(_gelu_tanh))
    yield Fault("quick gelu for silu", at, "x sigmoid(1.702 x)", another(lambda x: x * _sigmoid(1.702 * x)))
    yield Fault("relu for silu", at, "max(x, 0)", another(lambda x: np.maximum(x, 0)))
    yield Fault("hard swish for silu", at, "x relu6(x + 3) / 6", another(lambda x: x * np.clip(x + 3, 0, 6) / 6))
    yield Fault("sigmoid for silu", at, "the product is missing", another(_sigmoid))
    yield Fault("activation missing", at, "the gate passes", another(lambda x: x))
    yield Fault(
        "sigmoid in bfloat16", at, "float32 was declared", another(lambda x: x * bfloat16(_sigmoid(x))), on=FLOAT32
    )
    yield Fault("silu x (1 + size)", at, "a constant factor", scaled, on=FLOAT32, size=1e-06)
    at = ("ffn_swigl",)
    yield Fault("gate and up added", at, "not multiplied", another(lambda s, u: s + u))
    yield Fault("up missing", at, "silu passes", another(lambda s, u: s))
    yield Fault("gate missing", at, "up passes", another(lambda s, u: u))
    yield Fault("product of bfloat16", at, "float32 was declared", then(bfloat16), on=FLOAT32)


def _anywhere() -> Iterator[Fault]:
    places = (
        "attn_norm",
        "qkv_matmul",
        "k_post_rope",
        "attn_scores",
        "attention",
        "attn_out",
        "ffn_norm",
        "ffn_gate",
        "ffn_up",
    )
    yield Fault("one NaN", (*places, "final_norm", "lm_head"), "a single element", put(np.nan))
    yield Fault("one infinity", (*places, "final_norm", "lm_head"), "a single element", put(np.inf))
    yield Fault(
        "tokens' next ids",
        ("embedding",),
        "the row of the following token",
        of_operands(lambda t, w: (np.roll(t, -1), w)),
    )
    yield Fault("embedding x sqrt(hidden)", ("embedding",), "as in Gemma", then(lambda r: r * math.sqrt(r.shape[-1])))
    yield Fault("embedding in float16", ("embedding",), "through float16", then(float16), on=FLOAT32)
    yield Fault(
        "logits capped",
        ("lm_head",),
        "30 tanh(x / 30), as in Gemma",
        then(lambda r: 30 * np.tanh(r / 30)),
        on=("qwen3", "qwen2-untied"),
    )
    yield Fault("logits over a temperature", ("lm_head",), "0.7", then(lambda r: r / np.float32(0.7)))
    yield Fault("vocabulary in another order", ("lm_head",), "columns reversed", then(lambda r: r[:, ::-1]))


def put(value: float) -> Plant:
    def put(call: Call) -> np.ndarray:
        right = call.right()
        right[typical(right, call.rng)] = value
        return right

    return put


ELEMENT_FAULTS: tuple[Fault, ...] = (*_sums(), *_activations(), *_anywhere())
