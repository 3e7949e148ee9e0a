"""Other functions that a wrong stage is often found to be: what it would give without a term, or with parts rearranged.

Each table maps a stage to a function of its arguments and options that yields (what is wrong, the value that gives).
They are mistakes, in words and in numpy; the right functions are in stages/oracle/components.py and decoder.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from stages.oracle import bounds as noise
from stages.oracle.narrow import keep_bits
from stages.oracle.verdict import STAGES
from stages.spec.layouts import LAYOUTS
from stages.spec.stage import Stage

# What is wrong, the value that gives, and where that function cancels how far a right one may err beside the bound.
Wrong = tuple[str, np.ndarray] | tuple[str, np.ndarray, np.ndarray]
Arguments = tuple[np.ndarray, ...]
Alternatives = Callable[..., Iterator[Wrong]]


def _f64(*arrays: np.ndarray) -> list[np.ndarray]:
    return [array.astype(np.float64) for array in arrays]


def _split(qkv: np.ndarray, heads: int, kv_heads: int, head_dim: int) -> list[np.ndarray]:
    """q, k and v by heads, `[tokens, heads, head_dim]`, from their join on the last axis."""
    sizes = np.cumsum([heads * head_dim, kv_heads * head_dim])
    return [part.reshape(len(part), -1, head_dim) for part in np.split(qkv.astype(np.float64), sizes, axis=-1)]


def _tiled(x: np.ndarray, heads: int) -> np.ndarray:
    """Keys or values for the query heads, dealt out in turn: head i has i mod kv_heads, which is the wrong map."""
    return np.tile(x.astype(np.float64).swapaxes(0, 1), (heads // x.shape[1], 1, 1))


# -- a missing term ---------------------------------------------------------------------------------------------


def _norm_missing(x: np.ndarray, weight: np.ndarray, **options: Any) -> Iterator[Wrong]:
    yield "the norm is missing", x.astype(np.float64)
    yield "the norm divides nothing: its input times its weight", x.astype(np.float64) * weight.astype(np.float64)


def _head_norm_missing(part: int) -> Alternatives:
    def missing(qkv: np.ndarray, weight: np.ndarray, *, eps: float, **heads: int) -> Iterator[Wrong]:
        yield from _norm_missing(_split(qkv, **heads)[part], weight)

    return missing


def _rope_missing(part: int) -> Alternatives:
    def missing(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, **heads: int) -> Iterator[Wrong]:
        wide = _wide(part, x, heads)
        yield "not turned by RoPE at all", wide
        yield "the term with rope_sin is missing", wide * cos.astype(np.float64)[:, None]

    return missing


def _wide(part: int, x: np.ndarray, heads: Mapping[str, int]) -> np.ndarray:
    return x.astype(np.float64) if x.ndim == 3 else _split(x, **heads)[part]


def _sum_missing(x: np.ndarray, y: np.ndarray) -> Iterator[Wrong]:
    x, y = _f64(x, y)
    yield "the residual is missing: only what the block added is there", y
    yield "only the residual is there: what the block added is missing", x
    yield "the residual is added twice", x + x + y
    yield "what the block added is subtracted", x - y


# Wrong causal masks, of how far back a key is from its query: which keys they show.
MASKS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = MappingProxyType(
    {
        "the causal mask is missing": lambda back: np.ones(back.shape, bool),
        "the mask hides a query's own position": lambda back: back > 0,
        "the mask shows one position too many": lambda back: back >= -1,
    }
)


def _masked_otherwise(scores: np.ndarray) -> Iterator[Wrong]:
    s = scores.astype(np.float64)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    queries, keys = s.shape[-2:]
    back = np.arange(queries)[:, None] + keys - queries - np.arange(keys)
    for text, shows in MASKS.items():
        shown = shows(back)
        hidden = np.where(shown | ~shown.any(axis=-1, keepdims=True), p, 0.0)
        yield text, hidden / hidden.sum(axis=-1, keepdims=True)


def _silu_missing(gate: np.ndarray) -> Iterator[Wrong]:
    x = gate.astype(np.float64)
    with np.errstate(over="ignore"):
        sigmoid = 1 / (1 + np.exp(-x))
        quick = 1 / (1 + np.exp(-1.702 * x))
    yield "the activation is missing", x
    yield "sigmoid without the product with its argument", sigmoid
    yield "relu instead of silu", np.maximum(x, 0)
    # (1 + tanh) and (1 + erf) cancel below 0, as in noise.silu_rigorous: 8 u |x|.
    error = 8 * noise.U32 * np.abs(x)
    yield "gelu (by tanh) instead of silu", 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))), error
    yield "gelu (by erf) instead of silu", 0.5 * x * (1 + _erf(x / np.sqrt(2))), error
    yield "gelu (by sigmoid) instead of silu", x * quick


def _erf(x: np.ndarray) -> np.ndarray:
    import math

    return np.vectorize(math.erf, otypes=[np.float64])(x)


def _swigl_missing(silu: np.ndarray, up: np.ndarray) -> Iterator[Wrong]:
    silu, up = _f64(silu, up)
    yield "the product with ffn_up is missing", silu
    yield "the product with ffn_silu is missing", up
    yield "ffn_silu and ffn_up are added, not multiplied", silu + up


def _scaled_s_missing(offsets: np.ndarray, s: np.ndarray) -> Iterator[Wrong]:
    z, s = _f64(offsets, s)
    yield "the offsets are missing", s
    yield "S * offsets: the 1 + is missing", s * z
    yield "S + offsets instead of S * (1 + offsets)", s + z
    yield "S * exp(offsets) instead of S * (1 + offsets)", s * np.exp(z)


def _normalization_missing(scaled: np.ndarray, s: np.ndarray) -> Iterator[Wrong]:
    top, bottom = (float(np.sum(a, dtype=np.float64)) for a in (s, scaled))
    yield "the normalization is missing: it is 1", np.ones(1)
    yield "the quotient is upside down", np.array([bottom / top])
    norms = [float(np.linalg.norm(a.astype(np.float64))) for a in (s, scaled)]
    yield "the quotient is of norms, not of sums", np.array([norms[0] / norms[1]])


def _adapted_missing(product: np.ndarray, normalization: np.ndarray) -> Iterator[Wrong]:
    product, normalization = _f64(product, normalization)
    yield "the normalization is missing", product
    yield "divided by the normalization, not multiplied", product / normalization
    yield "normalized twice", product * normalization**2


def _bf16_missing(final: np.ndarray) -> Iterator[Wrong]:
    yield "truncated, not rounded to nearest even", keep_bits(final, 7, "truncate").astype(np.float64)
    yield "ties rounded away, not to even", keep_bits(final, 7, "away").astype(np.float64)


def _u_scaled_missing(scaled: np.ndarray, u: np.ndarray) -> Iterator[Wrong]:
    scaled, u = _f64(scaled, u)
    yield "the product with scaled_s is missing", u
    if len(u) == len(scaled):
        yield "rows of U are scaled, not columns", u * scaled[:, None]


MISSING: Mapping[str, Alternatives] = MappingProxyType(
    {
        "attn_norm": _norm_missing,
        "ffn_norm": _norm_missing,
        "final_norm": _norm_missing,
        "q_norm": _head_norm_missing(0),
        "k_norm": _head_norm_missing(1),
        "q_post_rope": _rope_missing(0),
        "k_post_rope": _rope_missing(1),
        "post_attn_residual": _sum_missing,
        "post_ffn_residual": _sum_missing,
        "ffn_silu": _silu_missing,
        "ffn_swigl": _swigl_missing,
        "scaled_s": _scaled_s_missing,
        "normalization": _normalization_missing,
        "u_scaled": _u_scaled_missing,
        "adapted_source_f32": _adapted_missing,
        "final_bf16": _bf16_missing,
    }
)


# What the tables call a step that is not done at all.
LEFT_OUT = ("the norm is missing", "the activation is missing", "not turned by RoPE at all")


# Of stages whose own values say more, and are asked instead where they were recorded (hints.py).
_UNSEEN: Mapping[str, Alternatives] = MappingProxyType({"attn_softmax": _masked_otherwise})


def wrong_values(stage: Stage, arguments: Arguments, options: Mapping[str, Any]) -> Iterator[Wrong]:
    """What every wrong function that is known gives in the place of a stage that was not recorded."""
    for table in (MISSING, REARRANGED, _UNSEEN):
        if stage.function in table:
            yield from table[stage.function](*arguments, **options)
    yield from without_a_parameter(stage, arguments, options)
    yield from with_parameters_rearranged(stage, arguments, options)


def without_a_parameter(stage: Stage, arguments: Arguments, options: Mapping[str, Any]) -> Iterator[Wrong]:
    """The stage without one bias, without all of them, or without a norm's weight."""
    inputs, params = len(stage.inputs), stage.params
    biases = [inputs + i for i, name in enumerate(params) if name.endswith(".bias")]
    sets = [biases] if len(biases) > 1 else []
    for chosen in [*sets, *([i] for i in biases)]:
        names = " and ".join(params[i - inputs] for i in chosen)
        changed = [np.zeros_like(a) if i in chosen else a for i, a in enumerate(arguments)]
        yield f"without {names}", STAGES[stage.function](*changed, **options)
    for i, name in enumerate(params, inputs):
        if name.endswith("norm.weight"):
            for text, weight in (("the norm's weight is missing", 0), ("the norm's weight is 1 + what is stored", 1)):
                other = (1 + weight * arguments[i].astype(np.float32)).astype(np.float32)
                yield text, STAGES[stage.function](*arguments[:i], other, *arguments[i + 1 :], **options)


# -- parts rearranged -------------------------------------------------------------------------------------------


def _rope_rearranged(part: int) -> Alternatives:
    def rearranged(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, **heads: int) -> Iterator[Wrong]:
        wide, half = _wide(part, x, heads), cos.shape[-1] // 2
        cos, sin = (a[:, None] for a in _f64(cos, sin))
        pairs = np.stack((-wide[..., 1::2], wide[..., ::2]), axis=-1).reshape(wide.shape)
        twice = [np.repeat(a[..., :half], 2, axis=-1) for a in (cos, sin)]
        halves = np.concatenate((-wide[..., half:], wide[..., :half]), axis=-1)
        yield "pairs are interleaved (2i, 2i + 1), not halves (i, i + d/2)", wide * twice[0] + pairs * twice[1]
        yield "pairs are interleaved, the frequencies by halves", wide * cos + pairs * sin
        yield "turned the other way: rope_sin has the other sign", wide * cos - halves * sin
        yield "rope_cos and rope_sin are swapped", wide * sin + halves * cos

    return rearranged


def _scores_rearranged(q: np.ndarray, k: np.ndarray, *, scaling: float) -> Iterator[Wrong]:
    heads = q.shape[1]
    queries = q.astype(np.float64).swapaxes(0, 1)
    if 1 < k.shape[1] < heads:
        keys = _tiled(k, heads)
        yield (
            "key heads are dealt out in turn, not each to consecutive query heads",
            queries @ keys.swapaxes(1, 2) * scaling,
        )
    keys = np.repeat(k.astype(np.float64).swapaxes(0, 1), heads // k.shape[1], axis=0)
    yield "queries and keys are swapped", keys @ queries.swapaxes(1, 2) * scaling


def _softmax_rearranged(scores: np.ndarray) -> Iterator[Wrong]:
    s = scores.astype(np.float64)
    masked = np.where(np.tri(s.shape[-2], s.shape[-1], dtype=bool), s, -np.inf)
    p = np.exp(masked - masked.max(axis=-2, keepdims=True))
    yield "softmax runs over the queries, not over the keys", p / p.sum(axis=-2, keepdims=True)


def _attention_rearranged(p: np.ndarray, qkv: np.ndarray, **options: int) -> Iterator[Wrong]:
    _, k, v = _split(qkv, **options)
    heads, wide = options["heads"], p.astype(np.float64)
    of_v, of_k = (np.repeat(x.swapaxes(0, 1), heads // x.shape[1], axis=0) for x in (v, k))

    def joined(x: np.ndarray) -> np.ndarray:
        return x.swapaxes(0, 1).reshape(x.shape[1], -1)

    yield "values are the keys", joined(wide @ of_k)
    yield "attn_softmax is transposed", joined(wide.swapaxes(1, 2) @ of_v)
    yield "heads are joined without bringing the tokens first", (wide @ of_v).reshape(len(qkv), -1)
    if 1 < v.shape[1] < heads:
        yield "value heads are dealt out in turn, not each to consecutive query heads", joined(wide @ _tiled(v, heads))


def _angle_rearranged(inv_freq: np.ndarray, positions: np.ndarray) -> Iterator[Wrong]:
    positions = positions.astype(np.float64)[:, None]
    twice = np.concatenate((inv_freq, inv_freq)).astype(np.float64)
    yield "frequencies are repeated in pairs, not as halves", positions * np.repeat(inv_freq.astype(np.float64), 2)
    for step in (1, -1):
        yield f"positions are shifted by {step:+d}", (positions + step) * twice
    yield "positions are counted from the end", positions[::-1] * twice


def _contracted(left: Callable[..., np.ndarray]) -> Alternatives:
    def rearranged(*operands: np.ndarray, layout: str) -> Iterator[Wrong]:
        *first, v = operands
        turned = LAYOUTS[layout].transposed
        other = (v if turned else v.T).astype(np.float64)
        product = left(*first).astype(np.float64)
        if product.shape[1] == other.shape[0]:
            names = ", ".join(name for name, row in LAYOUTS.items() if row.transposed != turned)
            yield f"V is contracted as {names}, the layout says {layout}", product @ other

    return rearranged


def _final_rearranged(adapted: np.ndarray, *, transpose: bool) -> Iterator[Wrong]:
    value = (adapted if transpose else adapted.T).astype(np.float64)
    yield ("labelled as transposed, the values are not" if transpose else "transposed"), value


REARRANGED: Mapping[str, Alternatives] = MappingProxyType(
    {
        "q_post_rope": _rope_rearranged(0),
        "k_post_rope": _rope_rearranged(1),
        "attn_scores": _scores_rearranged,
        "attn_softmax": _softmax_rearranged,
        "attention": _attention_rearranged,
        "rope_angle": _angle_rearranged,
        "rope_cos": lambda angle, **o: iter([("it is the sine", np.sin(angle.astype(np.float64)))]),
        "rope_sin": lambda angle, **o: iter([("it is the cosine", np.cos(angle.astype(np.float64)))]),
        "matmul_pre_norm": _contracted(lambda u_scaled: u_scaled),
        "zero_source_f32": _contracted(lambda u, s: u * s),
        "final_f32": _final_rearranged,
    }
)


def with_parameters_rearranged(stage: Stage, arguments: Arguments, options: Mapping[str, Any]) -> Iterator[Wrong]:
    """The stage with a square weight transposed, or two weights of one shape swapped."""
    inputs = len(stage.inputs)
    weights = [i for i, name in enumerate(stage.params, inputs) if name.endswith(("_proj.weight", "lm_head.weight"))]
    for i in weights:
        if arguments[i].shape == arguments[i].shape[::-1]:
            other = (*arguments[:i], arguments[i].T, *arguments[i + 1 :])
            yield f"{stage.params[i - inputs]} is transposed", STAGES[stage.function](*other, **options)
    for i, j in itertools.combinations(weights, 2):
        if arguments[i].shape == arguments[j].shape:
            swapped = list(arguments)
            swapped[i], swapped[j] = swapped[j], swapped[i]
            names = f"{stage.params[i - inputs]} and {stage.params[j - inputs]}"
            yield f"{names} are swapped", STAGES[stage.function](*swapped, **options)
