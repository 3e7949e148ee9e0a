"""Faults in stages of the forward: what each computes instead, in numpy or by the right function of wrong operands.

Written from what implementations get wrong, never from what the judging code looks for.
"""

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
    next_value,
    typical,
)

QWEN3, QWEN2 = ("qwen3", "qwen3-bf16"), ("qwen2", "qwen2-untied", "qwen2-bf16")
NORMS = ("attn_norm", "ffn_norm", "final_norm")
HEAD_NORMS = ("q_norm", "k_norm")
LINEAR = ("attn_out", "ffn_gate", "ffn_up", "ffn_out", "lm_head")
ROPED = ("q_post_rope", "k_post_rope")
SUMS = ("post_attn_residual", "post_ffn_residual")
Plant = Callable[[Call], np.ndarray]


def with_options(**changed: float) -> Plant:
    """The right function with other options."""
    return lambda call: call.of(**changed)


def of_operands(change: Callable[..., tuple[np.ndarray, ...]]) -> Plant:
    """The right function of other operands."""
    return lambda call: call.of(*change(*call.arguments))


def then(change: Callable[[np.ndarray], np.ndarray]) -> Plant:
    """The right result, changed."""
    return lambda call: change(float32(call.right()))


def another(function: Callable[..., np.ndarray]) -> Plant:
    """Another function of the operands, in float32."""
    return lambda call: function(*map(float32, call.arguments))


def scaled(call: Call) -> np.ndarray:
    """The right result times 1 + size."""
    return float32(call.right()) * np.float32(1 + call.size)


# -- RoPE's tables ------------------------------------------------------------------------------------------------


def _tables() -> Iterator[Fault]:
    yield Fault("theta 1e4 for 1e6", ("inv_freq",), "rope_theta of another model", with_options(rope_theta=1e4))
    yield Fault(
        "theta x (1 + size)",
        ("inv_freq",),
        "rope_theta off by a relative `size`",
        lambda call: call.of(rope_theta=call.options["rope_theta"] * (1 + call.size)),
        size=1e-6,
        sized=True,
    )
    yield Fault("inv_freq in bfloat16", ("inv_freq",), "the buffer was cast with the model", then(bfloat16))
    yield Fault("inv_freq in float16", ("inv_freq",), "the buffer was cast with the model", then(float16))
    yield Fault(
        "inv_freq of twice the head_dim",
        ("inv_freq",),
        "exponents 2i / 2d",
        lambda call: call.of(head_dim=2 * call.options["head_dim"])[: call.options["head_dim"] // 2],
    )
    yield Fault("positions + 1", ("rope_angle",), "counted from one", of_operands(lambda f, p: (f, p + 1)))
    yield Fault(
        "positions from the end", ("rope_angle",), "as if padded on the left", of_operands(lambda f, p: (f, p[::-1]))
    )
    yield Fault(
        "positions past a cache",
        ("rope_angle",),
        "from token 12 on one too few",
        of_operands(lambda f, p: (f, p - (p >= 12))),
    )
    yield Fault(
        "frequencies in pairs",
        ("rope_angle",),
        "each twice in a row, not the halves",
        another(lambda f, p: p[:, None] * np.repeat(f, 2)),
    )
    yield Fault("angle in bfloat16", ("rope_angle",), "positions past 256 are lost", then(bfloat16))
    yield Fault(
        "cos for sin", ("rope_sin",), "the tables are swapped", another(lambda angle: np.cos(angle))
    )
    yield Fault("sin turned", ("rope_sin",), "the other sign", then(lambda r: -r))
    yield Fault("angle in degrees", ("rope_cos",), "180 for pi", another(lambda angle: np.cos(angle * np.pi / 180)))
    yield Fault(
        "cos of a bfloat16 angle",
        ("rope_cos", "rope_sin"),
        "the cast comes before the cosine",
        of_operands(lambda angle: (bfloat16(angle),)),
    )
    yield Fault(
        "table x (1 + size)",
        ("rope_cos", "rope_sin"),
        "an attention factor that is not there",
        lambda call: call.of(attention_scaling=call.options["attention_scaling"] * (1 + call.size)),
        on=FLOAT32,
        size=1e-6,
        sized=True,
    )


# -- norms --------------------------------------------------------------------------------------------------------


def _normed(x: np.ndarray, axis: int | tuple[int, ...] = -1) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=axis, keepdims=True) + np.float32(1e-6))


def _layer_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return _normed(x - x.mean(axis=-1, keepdims=True)) * weight


def _eps_outside(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / (np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) + np.float32(1e-6)) * weight


def _half(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    half = x[..., : x.shape[-1] // 2]
    return x / np.sqrt(np.mean(half * half, axis=-1, keepdims=True) + np.float32(1e-6)) * weight


def _norms() -> Iterator[Fault]:
    for name, on in (("quiet", 4e-4), ("plain", 0.6), ("loud", 4.4)):
        yield Fault(
            f"eps 1e-5 for 1e-6, {name}",
            ("attn_norm", "ffn_norm"),
            f"at mean x^2 = {on:g}",
            with_options(eps=1e-5),
            on=(name,),
        )
    yield Fault("eps x (1 + size)", NORMS, "at mean x^2 = 4e-4", _other_eps, on=("quiet",), size=0.02, sized=True)
    yield Fault("no eps", NORMS, "at mean x^2 = 4e-4", with_options(eps=0.0), on=("quiet",))
    yield Fault("eps outside the root", NORMS, "at mean x^2 = 4e-4", another(_eps_outside), on=("quiet",))
    yield Fault("norm missing", NORMS, "its input passes", another(lambda x, w: x))
    yield Fault("norm without division", NORMS, "times the weight alone", another(lambda x, w: x * w))
    yield Fault("norm's weight missing", (*NORMS,), "as if all ones", of_operands(lambda x, w: (x, np.ones_like(w))))
    yield Fault("norm's weight 1 + w", NORMS, "as in Gemma", of_operands(lambda x, w: (x, 1 + float32(w))))
    yield Fault("norm's weight shifted", NORMS, "by one column", of_operands(lambda x, w: (x, np.roll(w, 1))))
    yield Fault("LayerNorm for RMSNorm", NORMS, "the mean is subtracted", another(_layer_norm))
    yield Fault("norm over the tokens", NORMS, "the other axis", another(lambda x, w: _normed(x, 0) * w))
    yield Fault("norm over everything", NORMS, "one number for all rows", another(lambda x, w: _normed(x, (0, 1)) * w))
    yield Fault("norm of half the columns", NORMS, "the mean is of the first half", another(_half))
    yield Fault(
        "mean over K - 1",
        NORMS,
        "a variance's denominator",
        lambda call: float32(call.right()) * np.sqrt(1 - 1 / call.arguments[0].shape[-1], dtype=np.float32),
    )
    yield Fault("norm's input in bfloat16", NORMS, "float32 was declared", _narrow_first(bfloat16), on=FLOAT32)
    yield Fault("norm x (1 + size)", NORMS, "a constant factor", scaled, on=FLOAT32, size=2e-6, sized=True)
    yield Fault("norm of the row above", NORMS, "rows are divided by a neighbour's root", _neighbours_root)
    for stage, part in zip(HEAD_NORMS, (0, 1), strict=True):
        yield Fault(f"{stage} missing", (stage,), "queries or keys pass", _unnormed(part), on=QWEN3)
    yield Fault("head norms over all heads", HEAD_NORMS, "not head by head", _joined_norm, on=QWEN3)


def _other_eps(call: Call) -> np.ndarray:
    return call.of(eps=call.options["eps"] * (1 + call.size))


def _narrow_first(narrow: Callable[[np.ndarray], np.ndarray]) -> Plant:
    return lambda call: call.of(narrow(call.arguments[0]), *call.arguments[1:])


def _neighbours_root(call: Call) -> np.ndarray:
    x, weight = map(float32, call.arguments)
    root = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(1e-6))
    return x / np.roll(root, 1, axis=0) * weight


def _heads_of(call: Call, part: int, qkv: np.ndarray | None = None) -> np.ndarray:
    """Queries (0), keys (1) or values (2) by heads, out of their join."""
    o = call.options
    sizes = [o["heads"], o["kv_heads"], o["kv_heads"]]
    joined = float32(call.arguments[0] if qkv is None else qkv)
    return joined.reshape(len(joined), -1, o["head_dim"])[:, sum(sizes[:part]) : sum(sizes[: part + 1])]


def _unnormed(part: int) -> Plant:
    return lambda call: _heads_of(call, part)


def _joined_norm(call: Call) -> np.ndarray:
    right = call.right()
    part = 0 if right.shape[1] == call.options["heads"] else 1
    return _normed(_heads_of(call, part), (-2, -1)) * float32(call.arguments[1])


# -- products -----------------------------------------------------------------------------------------------------


def _products() -> Iterator[Fault]:
    products = ("qkv_matmul", *LINEAR)
    for name, narrow in (("TF32", cut), ("bfloat16", bfloat16), ("float16", float16)):
        doc = f"operands of a product through {name}"
        yield Fault(f"product in {name}", products, doc, _all_operands(narrow), on=FLOAT32)
    yield Fault("input in bfloat16", products, "activations alone were cast", _narrow_first(bfloat16), on=FLOAT32)
    yield Fault("result in bfloat16", products, "float32 was declared", then(bfloat16), on=FLOAT32)
    yield Fault("partial sums in bfloat16", LINEAR, "two halves of K, rounded and added", _halves, on=FLOAT32)
    yield Fault("last term of K missing", products, "a loop ends too soon", _without_last_term)
    yield Fault("one output row of zeros", products, "a channel is dead", _dead_row)
    yield Fault("output columns shifted", products, "by one", then(lambda r: np.roll(r, 1, axis=-1)))
    yield Fault("product x (1 + size)", products, "a constant factor", scaled, on=FLOAT32, size=1e-4, sized=True)
    yield Fault(
        "weight element x (1 + size)", products, "one of the larger half", _one_weight, on=FLOAT32, size=4e-3, sized=True
    )
    yield Fault("result element + size", products, "of the result's RMS", _one_element, on=FLOAT32, size=2e-4, sized=True)
    yield Fault("product past token 12", products, "a factor of 1 + size", _late, on=FLOAT32, size=1e-4, sized=True)
    yield Fault("rows repeated", products, "each token's row is the one before", then(lambda r: np.roll(r, 1, axis=0)))
    yield Fault("k_proj transposed", ("qkv_matmul",), "a square weight", _turned(2), on=QWEN3)
    yield Fault("v_proj transposed", ("qkv_matmul",), "a square weight", _turned(3), on=QWEN3)
    yield Fault("o_proj transposed", ("attn_out",), "a square weight", _turned(1), on=QWEN2)
    yield Fault("k and v swapped", ("qkv_matmul",), "read in the wrong order", of_operands(lambda x, q, k, v: (x, q, v, k)))
    yield Fault("q, k, v by heads", ("qkv_matmul",), "joined as k, q, v", _other_join)
    biased = ("qkv_bias",)
    yield Fault("biases missing", biased, "all three", _biases(lambda q, k, v: (0 * q, 0 * k, 0 * v)), on=QWEN2)
    yield Fault("k bias missing", biased, "one of three", _biases(lambda q, k, v: (q, 0 * k, v)), on=QWEN2)
    yield Fault("v bias is the k bias", biased, "one of three", _biases(lambda q, k, v: (q, k, k)), on=QWEN2)
    yield Fault("bias added twice", biased, "in the product and after", _biases(lambda q, k, v: (2 * q, k, v)), on=QWEN2)


def _all_operands(narrow: Callable[[np.ndarray], np.ndarray]) -> Plant:
    return lambda call: call.of(*map(narrow, call.arguments))


def _halves(call: Call) -> np.ndarray:
    x, weight = map(float32, call.arguments)
    half = x.shape[-1] // 2
    return bfloat16(x[:, :half] @ weight[:, :half].T) + bfloat16(x[:, half:] @ weight[:, half:].T)


def _without_last_term(call: Call) -> np.ndarray:
    x = call.arguments[0].copy()
    x[:, -1] = 0
    return call.of(x, *call.arguments[1:])


def _dead_row(call: Call) -> np.ndarray:
    right = call.right()
    right[:, int(call.rng.integers(right.shape[-1]))] = 0
    return right


def _one_weight(call: Call) -> np.ndarray:
    weight = float32(call.arguments[1]).copy()
    weight[typical(weight, call.rng)] *= 1 + call.size
    return call.of(call.arguments[0], weight, *call.arguments[2:])


def _one_element(call: Call) -> np.ndarray:
    right = float32(call.right())
    right[typical(right, call.rng)] += call.size * float(np.sqrt(np.mean(right * right)))
    return right


def _late(call: Call) -> np.ndarray:
    right = float32(call.right())
    right[12:] *= np.float32(1 + call.size)
    return right


def _turned(place: int) -> Plant:
    return lambda call: call.of(*(a.T if i == place else a for i, a in enumerate(call.arguments)))


def _other_join(call: Call) -> np.ndarray:
    q, k = (len(weight) for weight in call.arguments[1:3])
    right = call.right()
    return np.concatenate((right[:, q : q + k], right[:, :q], right[:, q + k :]), axis=-1)


def _biases(change: Callable[..., tuple[np.ndarray, ...]]) -> Plant:
    return lambda call: call.of(*call.arguments[:4], *change(*call.arguments[4:]))


# -- attention ----------------------------------------------------------------------------------------------------


def _ropes() -> Iterator[Fault]:
    yield Fault("not turned", ROPED, "RoPE was left out", lambda call: call.of(*_still(call)))
    yield Fault("pairs interleaved", ROPED, "2i with 2i + 1, not i with i + d/2", _interleaved)
    yield Fault("turned the other way", ROPED, "-sin", of_operands(lambda x, c, s: (x, c, -s)))
    yield Fault("sin and cos swapped", ROPED, "in the call", of_operands(lambda x, c, s: (x, s, c)))
    yield Fault("tables of the next token", ROPED, "a cache's offset", of_operands(lambda x, c, s: (x, _up(c), _up(s))))
    yield Fault("half of each head turned", ROPED, "as partial rotary models do", _partial)
    yield Fault("table in bfloat16", ROPED, "float32 was declared", of_operands(lambda x, c, s: (x, bfloat16(c), bfloat16(s))), on=FLOAT32)
    yield Fault("turned x (1 + size)", ROPED, "a constant factor", scaled, on=FLOAT32, size=2e-6, sized=True)
    yield Fault("heads swapped after RoPE", ROPED, "0 and 1", then(_swap_heads(1)))


def _still(call: Call) -> tuple[np.ndarray, ...]:
    x, cos, sin = call.arguments
    return x, np.ones_like(cos), np.zeros_like(sin)


def _up(table: np.ndarray) -> np.ndarray:
    return np.roll(table, -1, axis=0)


def _by_heads(call: Call) -> np.ndarray:
    """What RoPE turns, by heads: normed queries or keys, or a part of the join."""
    x, heads = call.arguments[0], call.right().shape[1]
    return float32(x) if x.ndim == 3 else _heads_of(call, 0 if heads == call.options["heads"] else 1)


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
    yield Fault("scale x (1 + size)", at, "a constant factor", lambda call: call.of(scaling=call.options["scaling"] * (1 + call.size)), on=FLOAT32, size=5e-5, sized=True)
    yield Fault("key heads in turn", at, "head i reads i mod kv_heads", _keys_in_turn)
    yield Fault("scores capped", at, "30 tanh(s / 30), as in Gemma", then(lambda s: 30 * np.tanh(s / 30)))
    yield Fault("one head dropped", at, "its scores are 0", _drop_head(0))
    yield Fault("two heads swapped", at, "0 and 1", then(_swap_heads(0)))
    yield Fault("scores transposed", at, "keys by queries", then(lambda s: s.swapaxes(1, 2)))
    yield Fault("scores in TF32", at, "operands truncated", _all_operands(cut), on=FLOAT32)
    yield Fault("scores in bfloat16", at, "operands cast", _all_operands(bfloat16), on=FLOAT32)
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
    yield Fault("window of 8", at, "a sliding window that is not configured", another(lambda s: _softmaxed(s, _causal(s) & ~_causal(s, -8))))
    yield Fault("1 + in the denominator", at, "an attention sink", another(_with_sink))
    yield Fault("no maximum subtracted", at, "exp overflows where scores pass 88", another(_without_max), on=("sharp",))
    yield Fault("exponentials in bfloat16", at, "float32 was declared", another(_narrow_softmax), on=FLOAT32)
    yield Fault("temperature 1 + size", at, "scores are scaled once more", _warm, on=FLOAT32, size=2e-6, sized=True)
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
    yield Fault("values are the keys", at, "the wrong part of the join", _weigh(lambda call: _heads_of(call, 1, call.arguments[1])))
    yield Fault("value heads in turn", at, "head i reads i mod kv_heads", _weigh(lambda call: _heads_of(call, 2, call.arguments[1]), in_turn=True))
    yield Fault("heads not joined", at, "reshaped without the transpose", _unjoined)
    yield Fault("values one token late", at, "a cache's offset", of_operands(lambda p, v: (p, np.roll(v, 1, axis=0))))
    yield Fault("a head's output dropped", at, "its columns are 0", _drop_columns)
    yield Fault("probabilities in bfloat16", at, "float32 was declared", _narrow_first(bfloat16), on=FLOAT32)
    yield Fault("probabilities transposed", at, "queries for keys", of_operands(lambda p, v: (p.swapaxes(1, 2), v)))
    yield Fault("attention x (1 + size)", at, "a constant factor", scaled, on=FLOAT32, size=5e-5, sized=True)


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


# -- sums, the activation, elements -------------------------------------------------------------------------------


def _sums() -> Iterator[Fault]:
    yield Fault("residual missing", SUMS, "the block alone", another(lambda x, y: y))
    yield Fault("block missing", SUMS, "the residual alone", another(lambda x, y: x))
    yield Fault("residual twice", SUMS, "added again", another(lambda x, y: x + y + x))
    yield Fault("block subtracted", SUMS, "the other sign", another(lambda x, y: x - y))
    yield Fault("block x (1 + size)", SUMS, "scaled before it is added", _scaled_block, on=FLOAT32, size=1e-6, sized=True)
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
    yield Fault("sigmoid in bfloat16", at, "float32 was declared", another(lambda x: x * bfloat16(_sigmoid(x))), on=FLOAT32)
    yield Fault("silu x (1 + size)", at, "a constant factor", scaled, on=FLOAT32, size=2e-6, sized=True)
    at = ("ffn_swigl",)
    yield Fault("gate and up added", at, "not multiplied", another(lambda s, u: s + u))
    yield Fault("up missing", at, "silu passes", another(lambda s, u: s))
    yield Fault("gate missing", at, "up passes", another(lambda s, u: u))
    yield Fault("product of bfloat16", at, "float32 was declared", then(bfloat16), on=FLOAT32)


def _anywhere() -> Iterator[Fault]:
    places = ("attn_norm", "qkv_matmul", "k_post_rope", "attn_scores", "attention", "attn_out", "ffn_norm", "ffn_gate", "ffn_up")
    yield Fault("one NaN", (*places, "final_norm", "lm_head"), "a single element", _put(np.nan))
    yield Fault("one infinity", (*places, "final_norm", "lm_head"), "a single element", _put(np.inf))
    yield Fault("tokens' next ids", ("embedding",), "the row of the following token", of_operands(lambda t, w: (np.roll(t, -1), w)))
    yield Fault("embedding x sqrt(hidden)", ("embedding",), "as in Gemma", then(lambda r: r * math.sqrt(r.shape[-1])))
    yield Fault("embedding in float16", ("embedding",), "through float16", then(float16), on=FLOAT32)
    yield Fault("logits capped", ("lm_head",), "30 tanh(x / 30), as in Gemma", then(lambda r: 30 * np.tanh(r / 30)), on=("qwen3", "qwen2-untied"))
    yield Fault("logits over a temperature", ("lm_head",), "0.7", then(lambda r: r / np.float32(0.7)))
    yield Fault("vocabulary in another order", ("lm_head",), "columns reversed", then(lambda r: r[:, ::-1]))


def _put(value: float) -> Plant:
    def put(call: Call) -> np.ndarray:
        right = call.right()
        right[typical(right, call.rng)] = value
        return right

    return put


FORWARD_FAULTS: tuple[Fault, ...] = (
    *_tables(),
    *_norms(),
    *_products(),
    *_ropes(),
    *_scores(),
    *_softmaxes(),
    *_weighted(),
    *_sums(),
    *_activations(),
    *_anywhere(),
)
