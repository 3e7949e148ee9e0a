"""Faults in turning, scoring, softmax and weighing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from stages.selftest.fault import (
    FLOAT32,
    Call,
    Fault,
    bfloat16,
    cut,
    float16,
    float32,
)
from stages.selftest.making import (
    QWEN3,
    Plant,
    all_operands,
    another,
    heads_of,
    narrow_first,
    of_operands,
    scaled,
    then,
    with_options,
)

ROPED = ("q_post_rope", "k_post_rope")


def _ropes() -> Iterator[Fault]:
    yield Fault("not turned", ROPED, "RoPE was left out", lambda call: call.of(*_still(call)))
    yield Fault("pairs interleaved", ROPED, "2i with 2i + 1, not i with i + d/2", _interleaved)
    yield Fault("turned the other way", ROPED, "-sin", of_operands(lambda x, c, s: (x, c, -s)))
    yield Fault("sin and cos swapped", ROPED, "in the call", of_operands(lambda x, c, s: (x, s, c)))
    yield Fault("tables of the next token", ROPED, "a cache's offset", of_operands(lambda x, c, s: (x, _up(c), _up(s))))
    yield Fault("half of each head turned", ROPED, "as partial rotary models do", _partial)
    yield Fault(
        "table in bfloat16",
        ROPED,
        "float32 was declared",
        of_operands(lambda x, c, s: (x, bfloat16(c), bfloat16(s))),
        on=FLOAT32,
    )
    yield Fault("turned x (1 + size)", ROPED, "a constant factor", scaled, on=FLOAT32, size=6e-07)
    yield Fault("heads swapped after RoPE", ROPED, "0 and 1", then(_swap_heads(1)))


def _still(call: Call) -> tuple[np.ndarray, ...]:
    x, cos, sin = call.arguments
    return x, np.ones_like(cos), np.zeros_like(sin)


def _up(table: np.ndarray) -> np.ndarray:
    return np.roll(table, -1, axis=0)


def _by_heads(call: Call) -> np.ndarray:
    """What RoPE turns, by heads: normed queries or keys, or a part of the join."""
    x, heads = call.arguments[0], call.right().shape[1]
    return float32(x) if x.ndim == 3 else heads_of(call, 0 if heads == call.options["heads"] else 1)


def _interleaved(call: Call) -> np.ndarray:
    x, (cos, sin) = _by_heads(call), map(float32, call.arguments[1:])
    half = cos.shape[-1] // 2
    c, s = (np.repeat(table[:, None, :half], 2, axis=-1) for table in (cos, sin))
    partner = np.stack((-x[..., 1::2], x[..., ::2]), axis=-1).reshape(x.shape)
    return x * c + partner * s


def _partial(call: Call) -> np.ndarray:
    right, x = float32(call.right()), _by_heads(call)
    half = right.shape[-1] // 2
    right[..., half // 2 : half], right[..., half + half // 2 :] = x[..., half // 2 : half], x[..., half + half // 2 :]
    return right


def _swap_heads(axis: int) -> Callable[[np.ndarray], np.ndarray]:
    def swap(right: np.ndarray) -> np.ndarray:
        order = np.arange(right.shape[axis])
        order[:2] = 1, 0
        return np.take(right, order, axis)

    return swap


def _scores() -> Iterator[Fault]:
    at = ("attn_scores",)
    yield Fault("no 1/sqrt(d)", at, "scores are not scaled", with_options(scaling=1.0))
    yield Fault("1/d for 1/sqrt(d)", at, "scaled twice", lambda call: call.of(scaling=call.options["scaling"] ** 2))
    yield Fault("1/sqrt(hidden)", at, "the wrong dimension", with_options(scaling=64**-0.5), on=QWEN3)
    yield Fault(
        "scale x (1 + size)",
        at,
        "a constant factor",
        lambda call: call.of(scaling=call.options["scaling"] * (1 + call.size)),
        on=FLOAT32,
        size=5e-06,
    )
    yield Fault("key heads in turn", at, "head i reads i mod kv_heads", _keys_in_turn)
    yield Fault("scores capped", at, "30 tanh(s / 30), as in Gemma", then(lambda s: 30 * np.tanh(s / 30)))
    yield Fault("one head dropped", at, "its scores are 0", _drop_head(0))
    yield Fault("two heads swapped", at, "0 and 1", then(_swap_heads(0)))
    yield Fault("scores transposed", at, "keys by queries", then(lambda s: s.swapaxes(1, 2)))
    yield Fault("scores in TF32", at, "operands truncated", all_operands(cut), on=FLOAT32)
    yield Fault("scores in bfloat16", at, "operands cast", all_operands(bfloat16), on=FLOAT32)
    yield Fault("keys one token late", at, "a cache's offset", of_operands(lambda q, k: (q, np.roll(k, 1, axis=0))))


def _keys_in_turn(call: Call) -> np.ndarray:
    q, k = call.arguments
    heads, kv_heads = q.shape[1], k.shape[1]
    keys = k[:, [i % kv_heads for i in range(heads)]]
    return np.einsum("qhd,khd->hqk", float32(q), float32(keys)) * np.float32(call.options["scaling"])


def _drop_head(axis: int) -> Plant:
    def drop(call: Call) -> np.ndarray:
        right = call.right()
        np.moveaxis(right, axis, 0)[int(call.rng.integers(right.shape[axis]))] = 0
        return right

    return drop


def _softmaxed(scores: np.ndarray, mask: np.ndarray | None = None, axis: int = -1, base: float = math.e) -> np.ndarray:
    if mask is not None:
        scores = np.where(mask, scores, np.float32(-1e30))
    powers = np.exp((scores - scores.max(axis=axis, keepdims=True)) * np.float32(math.log(base)))
    return powers / powers.sum(axis=axis, keepdims=True)


def _causal(scores: np.ndarray, shift: int = 0) -> np.ndarray:
    n = scores.shape[-1]
    mask = np.tri(n, n, shift, dtype=bool)
    return mask | ~mask.any(axis=-1, keepdims=True)


def _softmaxes() -> Iterator[Fault]:
    at = ("attn_softmax",)
    yield Fault("no causal mask", at, "every key is seen", another(_softmaxed))
    yield Fault("mask hides the own token", at, "off by one", another(lambda s: _softmaxed(s, _causal(s, -1))))
    yield Fault("mask shows the next token", at, "off by one", another(lambda s: _softmaxed(s, _causal(s, 1))))
    yield Fault("softmax over the queries", at, "the wrong axis", another(lambda s: _softmaxed(s, _causal(s), -2)))
    yield Fault("softmax to base 2", at, "exp2 without log2(e)", another(lambda s: _softmaxed(s, _causal(s), base=2.0)))
    yield Fault(
        "window of 8",
        at,
        "a sliding window that is not configured",
        another(lambda s: _softmaxed(s, _causal(s) & ~_causal(s, -8))),
    )
    yield Fault("1 + in the denominator", at, "an attention sink", another(_with_sink))
    yield Fault("no maximum subtracted", at, "exp overflows where scores pass 88", another(_without_max), on=("sharp",))
    yield Fault("exponentials in bfloat16", at, "float32 was declared", another(_narrow_softmax), on=FLOAT32)
    yield Fault("temperature 1 + size", at, "scores are scaled once more", _warm, on=FLOAT32, size=6e-07)
    yield Fault("softmax not divided", at, "exponentials alone", another(_undivided))
    yield Fault("softmax in float16", at, "through float16", then(float16), on=FLOAT32)


def _with_sink(scores: np.ndarray) -> np.ndarray:
    powers = np.where(_causal(scores), np.exp(scores), 0)
    return powers / (1 + powers.sum(axis=-1, keepdims=True))


def _without_max(scores: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        powers = np.where(_causal(scores), np.exp(scores), np.float32(0))
        return powers / powers.sum(axis=-1, keepdims=True)


def _narrow_softmax(scores: np.ndarray) -> np.ndarray:
    masked = np.where(_causal(scores), scores, np.float32(-1e30))
    powers = bfloat16(np.exp(masked - masked.max(axis=-1, keepdims=True)))
    return powers / powers.sum(axis=-1, keepdims=True)


def _undivided(scores: np.ndarray) -> np.ndarray:
    masked = np.where(_causal(scores), scores, np.float32(-1e30))
    return np.exp(masked - masked.max(axis=-1, keepdims=True))


def _warm(call: Call) -> np.ndarray:
    return call.of(float32(call.arguments[0]) * np.float32(1 + call.size))


def _weighted() -> Iterator[Fault]:
    at = ("attention",)
    yield Fault(
        "values are the keys",
        at,
        "the wrong part of the join",
        _weigh(lambda call: heads_of(call, 1, call.arguments[1])),
    )
    yield Fault(
        "value heads in turn",
        at,
        "head i reads i mod kv_heads",
        _weigh(lambda call: heads_of(call, 2, call.arguments[1]), in_turn=True),
    )
    yield Fault("heads not joined", at, "reshaped without the transpose", _unjoined)
    yield Fault("values one token late", at, "a cache's offset", of_operands(lambda p, v: (p, np.roll(v, 1, axis=0))))
    yield Fault("a head's output dropped", at, "its columns are 0", _drop_columns)
    yield Fault("probabilities in bfloat16", at, "float32 was declared", narrow_first(bfloat16), on=FLOAT32)
    yield Fault("probabilities transposed", at, "queries for keys", of_operands(lambda p, v: (p.swapaxes(1, 2), v)))
    yield Fault("attention x (1 + size)", at, "a constant factor", scaled, on=FLOAT32, size=4e-06)


def _weigh(values_of: Callable[[Call], np.ndarray], *, in_turn: bool = False) -> Plant:
    def weigh(call: Call) -> np.ndarray:
        values, heads = values_of(call), call.options["heads"]
        kv_heads = values.shape[1]
        order = [i % kv_heads if in_turn else i * kv_heads // heads for i in range(heads)]
        out = np.einsum("hqk,khd->qhd", float32(call.arguments[0]), values[:, order])
        return out.reshape(len(values), -1)

    return weigh


def _unjoined(call: Call) -> np.ndarray:
    right = call.right()
    heads = right.reshape(len(right), call.options["heads"], -1).swapaxes(0, 1)
    return heads.reshape(right.shape)


def _drop_columns(call: Call) -> np.ndarray:
    right = call.right()
    right.reshape(len(right), call.options["heads"], -1)[:, int(call.rng.integers(call.options["heads"]))] = 0
    return right


ATTENTION_FAULTS: tuple[Fault, ...] = (*_ropes(), *_scores(), *_softmaxes(), *_weighted())
