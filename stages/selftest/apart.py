"""Faults written apart from the catalogue, in plain numpy or by the backend's own function of wrong operands.

Of those that a row describes the row must be named: this shows that its emulator is what the fault does. Those that no
row describes must be found, and nothing may be named that they are not: a hint says what is allowed here, or nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from stages.selftest.fault import BUNDLE, FLOAT32, REPLAY, Call, Fault, Load, bfloat16, cut, float16, float32
from stages.selftest.making import (
    QWEN2,
    Plant,
    all_operands,
    another,
    by_heads,
    heads_of,
    narrow_first,
    of_operands,
    then,
    with_options,
)

NORMS = ("attn_norm", "ffn_norm", "final_norm")
ROPED, SCORES, SOFTMAX, ATTENTION = ("q_post_rope", "k_post_rope"), ("attn_scores",), ("attn_softmax",), ("attention",)
PRODUCTS, QKV, HEAD = ("attn_out", "ffn_gate", "ffn_up", "ffn_out"), ("qkv_matmul",), ("lm_head",)
ANGLE, EMBEDDING = ("rope_angle",), ("embedding",)
SUMS, SILU, SWIGL = ("post_attn_residual", "post_ffn_residual"), ("ffn_silu",), ("ffn_swigl",)
REPLAYED = ("matmul_pre_norm", "zero_source_f32")
# Both families, all dtypes; of a described one, one family in two dtypes.
ALL, TWO = ("qwen3", "qwen2", "qwen3-bf16", "qwen3-f16"), ("qwen3", "qwen3-bf16")
# A name, where it is planted, how, and words: that must be said, or what more than a place may be said.
Row = tuple[str, tuple[str, ...], Plant, str]


# -- plain functions ----------------------------------------------------------------------------------------------


def _rms(x: np.ndarray, axis: int | tuple[int, ...] = -1) -> np.ndarray:
    return np.sqrt(np.mean(x * x, axis=axis, keepdims=True) + np.float32(1e-6))


def _over(root: Callable[[np.ndarray], np.ndarray]) -> Plant:
    """A norm that divides by another root."""
    return another(lambda x, w: x / root(x) * w)


def _rms_of_fewer(x: np.ndarray) -> np.ndarray:
    return _rms(x) * np.float32(x.shape[-1] / (x.shape[-1] - 1)) ** 0.5


def _of_halves(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    halves = x.reshape(len(x), 2, -1)
    return (halves / _rms(halves)).reshape(x.shape) * w


def _back(scores: np.ndarray) -> np.ndarray:
    """How far back each key is from its query."""
    at = np.arange(scores.shape[-1])
    return at[:, None] - at


def _powers(scores: np.ndarray, mask: np.ndarray | None = None, axis: int = -1) -> np.ndarray:
    mask = _back(scores) >= 0 if mask is None else mask
    scores = np.where(mask | ~mask.any(axis=-1, keepdims=True), scores, np.float32(-1e30))
    return np.exp(scores - scores.max(axis=axis, keepdims=True))


def _softmax(
    mask: Callable[[np.ndarray], np.ndarray], axis: int = -1, more: float = 0.0, base: float = math.e
) -> Plant:
    """Softmax where `mask` of how far back a key is says so, with `more` in the sum, to another `base`."""

    def softmax(scores: np.ndarray) -> np.ndarray:
        powers = _powers(scores * np.float32(math.log(base)), mask(_back(scores)), axis)
        return powers / (powers.sum(axis=axis, keepdims=True) + np.float32(more))

    return another(softmax)


def _causal(back: np.ndarray) -> np.ndarray:
    return back >= 0


def _sink(s: np.ndarray) -> np.ndarray:
    powers, top = _powers(s), np.where(_back(s) >= 0, s, -np.inf).max(axis=-1, keepdims=True)
    sinks = np.linspace(-1.3, 0.7, len(s), dtype=np.float32)[:, None, None]
    return powers / (powers.sum(axis=-1, keepdims=True) + np.exp(sinks - top))


def _capped(at: float) -> Plant:
    return then(lambda s: np.float32(at) * np.tanh(s / np.float32(at)))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def _silu(x: np.ndarray) -> np.ndarray:
    return x * _sigmoid(x)


def _gelu_erf(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf, otypes=[np.float32])(x / math.sqrt(2)))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.05 * x**3)))


def _whole_numbers(x: np.ndarray, bits: int = 3) -> np.ndarray:
    """Of so many bits and a sign, with a scale for each row."""
    scale = np.maximum(np.abs(x).max(axis=-1, keepdims=True), 1e-30) / (2**bits - 1)
    return np.asarray(np.rint(x / scale) * scale, np.float32)


def _blocks(x: np.ndarray) -> np.ndarray:
    return np.concatenate([_whole_numbers(x[:, at : at + 32], 4) for at in range(0, x.shape[-1], 32)], axis=-1)


def _pruned(w: np.ndarray) -> np.ndarray:
    """Two of four weights are 0."""
    fours = w.reshape(len(w), -1, 4)
    return np.where(np.argsort(np.argsort(np.abs(fours))) < 2, 0, fours).reshape(w.shape)


def _adapted(w: np.ndarray) -> np.ndarray:
    left, right = (np.random.default_rng(1).standard_normal(n).astype(np.float32) for n in ((len(w), 1), w.shape[1]))
    return w + np.float32(0.02) * left * right


def _weights(change: Callable[[np.ndarray], np.ndarray]) -> Plant:
    """The right product of other weights."""
    return lambda call: call.of(call.arguments[0], *(change(float32(w)) for w in call.arguments[1:]))


def _summed_by_64(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Each 64 terms are added to those before in bfloat16."""
    found = np.zeros((len(x), len(w)), np.float32)
    for at in range(0, x.shape[-1], 64):
        found = bfloat16(found + x[:, at : at + 64] @ w[:, at : at + 64].T)
    return found


def _with(place: int, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """A change of one slice of the first axis."""

    def changed(x: np.ndarray) -> np.ndarray:
        x = x.copy()
        x[place] = change(x[place].copy())
        return x

    return changed


def _in_heads(change: Callable[[np.ndarray], np.ndarray]) -> Plant:
    """A change of the joined heads, `[heads, tokens, head_dim]`."""

    def plant(call: Call) -> np.ndarray:
        right = float32(call.right())
        heads = right.reshape(len(right), call.options["heads"], -1).swapaxes(0, 1)
        return change(heads).swapaxes(0, 1).reshape(right.shape)

    return plant


def _three_eighths(call: Call) -> np.ndarray:
    """The other pairs of each head are not turned."""
    right, x = float32(call.right()), by_heads(call)
    half = right.shape[-1] // 2
    return np.where(np.arange(right.shape[-1]) % half >= 3 * half // 8, x, right)


def _interleaved(call: Call) -> np.ndarray:
    x, (cos, sin) = by_heads(call), map(float32, call.arguments[1:])
    c, s = (np.repeat(table[:, None, : cos.shape[-1] // 2], 2, axis=-1) for table in (cos, sin))
    return x * c + np.stack((-x[..., 1::2], x[..., ::2]), axis=-1).reshape(x.shape) * s


def _scaled_by_more(call: Call) -> np.ndarray:
    return call.of(scaling=(call.options["scaling"] ** -2 + 1) ** -0.5)


def _tiled_keys(call: Call) -> np.ndarray:
    q, k = map(float32, call.arguments)
    keys = k[:, np.arange(q.shape[1]) % k.shape[1]]
    return np.einsum("qhd,khd->hqk", q, keys) * np.float32(call.options["scaling"])


def _of_keys(call: Call) -> np.ndarray:
    keys, p = heads_of(call, 1, call.arguments[1]), float32(call.arguments[0])
    return np.einsum("hqk,khd->qhd", p, np.repeat(keys, len(p) // keys.shape[1], axis=1)).reshape(len(keys), -1)


def _replayed_in_tf32(call: Call) -> np.ndarray:
    """Of U times S, where that is made inside, and of V."""
    *left, v = call.arguments
    if len(left) == 1:
        return call.of(cut(left[0]), cut(v))
    return call.of(cut(left[0] * left[1]), np.ones_like(left[1]), cut(v))


# -- described by a row -------------------------------------------------------------------------------------------


def _described() -> Iterator[Row]:
    yield "eps 1e-3", NORMS, with_options(eps=1e-3), "eps were 0.001"
    yield "norm missing", NORMS, another(lambda x, w: x), "the norm is missing"
    yield "norm not divided", NORMS, another(lambda x, w: x * w), "divides nothing"
    yield "norm's weight of ones", NORMS, of_operands(lambda x, w: (x, np.ones_like(w))), "weight is missing"
    yield "norm's weight 1 + w", NORMS, of_operands(lambda x, w: (x, 1 + float32(w))), "is 1 . what is stored"
    yield "LayerNorm", NORMS, another(lambda x, w: _centred(x) / _rms(_centred(x)) * w), "LayerNorm"
    yield "mean over K - 1", NORMS, _over(_rms_of_fewer), "one column fewer"
    yield "normalised twice", NORMS, another(lambda x, w: _twice(x / _rms(x) * w)), "normalised twice"
    yield "norm of each half of the columns", NORMS, another(_of_halves), "each half of the columns"
    yield "norm by the mean magnitude", NORMS, _over(lambda x: np.abs(x).mean(-1, keepdims=True) + 1e-6), "magnitudes"
    yield "norm by the first half of the columns", NORMS, _over(lambda x: _rms(x[:, : x.shape[1] // 2])), "first half"
    yield "norm over all tokens", NORMS, _over(lambda x: _rms(x, (0, 1))), "over all tokens"
    yield "3/8 of each head turned", ROPED, _three_eighths, "first 3 of 8 pairs"
    yield "heads of the scores rotated", SCORES, then(lambda s: np.roll(s, 1, axis=0)), "of the one before it"
    yield "softmax not divided", SOFTMAX, another(_powers), "not divided"
    yield "heads of the output rotated", ATTENTION, _in_heads(lambda y: np.roll(y, 1, axis=0)), "of the one before it"
    yield "mish", SILU, another(lambda x: x * np.tanh(np.log1p(np.exp(x)))), "mish instead"
    yield "hard swish", SILU, another(lambda x: x * np.clip(x + 3, 0, 6) / 6), "hard swish instead"
    yield "angle in degrees", ("rope_cos",), another(lambda a: np.cos(a * np.pi / 180)), "taken for degrees"
    yield "pairs interleaved", ROPED, _interleaved, "pairs are interleaved"
    yield "turned the other way", ROPED, of_operands(lambda x, c, s: (x, c, -s)), "the other way|other sign"
    yield "sin and cos swapped", ROPED, of_operands(lambda x, c, s: (x, s, c)), "are swapped"
    yield "not turned", ROPED, of_operands(lambda x, c, s: (x, 0 * c + 1, 0 * s)), "not turned|positions are 0"
    yield "no scale", SCORES, with_options(scaling=1.0), "is missing"
    yield "key heads in turn", SCORES, _tiled_keys, "dealt out in turn"
    yield "no causal mask", SOFTMAX, _softmax(lambda back: back == back), "mask is missing"
    yield "own token hidden", SOFTMAX, _softmax(lambda back: back > 0), "own position"
    yield "softmax over the queries", SOFTMAX, _softmax(_causal, axis=-2), "over the queries"
    yield "window of 8", SOFTMAX, _softmax(lambda back: (back >= 0) & (back < 8)), "last 8 keys"
    yield "values are the keys", ATTENTION, _of_keys, "values are the keys"
    yield "probabilities transposed", ATTENTION, of_operands(lambda p, v: (p.swapaxes(1, 2), v)), "transposed"
    yield "k and v swapped", QKV, of_operands(lambda x, q, k, v: (x, q, v, k)), "k_proj and v_proj are swapped"
    yield "residual missing", SUMS, another(lambda x, y: y), "residual is missing"
    yield "block subtracted", SUMS, another(lambda x, y: x - y), "is subtracted"
    yield "gelu by erf", SILU, another(_gelu_erf), "by erf"
    yield "relu", SILU, another(lambda x: np.maximum(x, 0)), "relu instead"
    yield "gate and up added", SWIGL, another(lambda s, u: s + u), "added, not multiplied"
    yield "theta 1e4", ("inv_freq",), with_options(rope_theta=1e4), "rope_theta were 10000"


def _centred(x: np.ndarray) -> np.ndarray:
    return np.asarray(x - x.mean(axis=-1, keepdims=True))


def _described_in_float32() -> Iterator[Row]:
    yield "scores capped at 30", SCORES, _capped(30), "capped softly at 30"
    yield "scores capped at 17.3", SCORES, _capped(17.3), "capped softly at 17"
    yield "products in TF32", PRODUCTS, all_operands(cut), "its (operands|inputs) have 10 "
    yield "products in bfloat16", PRODUCTS, all_operands(bfloat16), "its (operands|inputs) have 7 "
    yield "products in float16", PRODUCTS, all_operands(float16), "its (operands|inputs) have 10 "
    yield "activations in bfloat16", PRODUCTS, narrow_first(bfloat16), "its (operands|inputs) have 7 "
    yield "result in bfloat16", (*PRODUCTS, *SUMS), then(bfloat16), "its result has 7 "
    yield "probabilities in bfloat16", ATTENTION, narrow_first(bfloat16), "attn_softmax have 7 "


def _described_in_replay() -> Iterator[Row]:
    yield "S x offsets", ("scaled_s",), another(lambda z, s: s * z), "the 1 . is missing"
    yield "S + offsets", ("scaled_s",), another(lambda z, s: s + z), "offsets instead of"
    yield "S exp(offsets)", ("scaled_s",), another(lambda z, s: s * np.exp(z)), "exp.offsets. instead of"
    yield "no normalization", ("normalization",), another(lambda t, s: np.ones(1, np.float32)), "it is 1"
    yield "U not scaled", ("u_scaled",), another(lambda t, u: u), "with scaled_s is missing"
    yield "replay in TF32", REPLAYED, _replayed_in_tf32, "its operands have 10 "
    yield "normalized twice", ("adapted_source_f32",), another(lambda p, n: p * n * n), "normalized twice"
    yield "bfloat16 towards zero", ("final_bf16",), lambda call: cut(call.arguments[0], 7), "truncated"


# -- described by none --------------------------------------------------------------------------------------------

# What may be said of where it is.
_PLACE = (
    r"only (token|head|heads|query|key|column|row|key/value head)s? .*|right up to token .*|one element alone .*"
    r"|no element is beyond .*|no known recipe gives it.*"
)
_FACTORS, _ORDER, _MASK = r".* off by a factor each.*", r".* in another order: .*", r"another mask: .*"
_ANGLES = r"turned by other angles .*|.*(positions?|angles?|frequencies|scaled?|factor|times) .*"


def _norms() -> Iterator[Row]:
    yield "norm by the row above", NORMS, _over(lambda x: np.roll(_rms(x), 1, axis=0)), _FACTORS
    yield "norm's weight of 5 bits", NORMS, of_operands(lambda x, w: (x, cut(float32(w), 4))), r".*columns? .*"


def _twice(y: np.ndarray) -> np.ndarray:
    return y / _rms(y)


def _ropes() -> Iterator[Row]:
    yield (
        "tables of the next token",
        ROPED,
        of_operands(lambda x, c, s: (x, np.roll(c, -1, 0), np.roll(s, -1, 0))),
        _ANGLES,
    )
    yield "positions halved", ANGLE, of_operands(lambda f, p: (f / 2, p)), _ANGLES
    yield "positions past a cache", ANGLE, of_operands(lambda f, p: (f, p - (p >= 12))), _ANGLES


def _attentions() -> Iterator[Row]:
    yield "one head's q and k exchanged", SCORES, then(_with(0, np.transpose)), ""
    yield "scores biased by distance", SCORES, then(lambda s: s - np.float32(2.0**-7) * _back(s)), ""
    yield "scores times log(n)", SCORES, then(lambda s: s * np.log(np.arange(len(s[0])) + 3)[:, None]), r"queries .*"
    yield "queries and keys of 4 bits", SCORES, all_operands(_whole_numbers), ""
    yield "scale 1/sqrt(d + 1)", SCORES, _scaled_by_more, r"every value is 0\.9.*"
    yield "window of 6", SOFTMAX, _softmax(lambda back: (back >= 0) & (back < 6)), r".* last 6 keys .*"
    yield "window of 11", SOFTMAX, _softmax(lambda back: (back >= 0) & (back < 11)), r".* last 11 keys .*"
    yield "a sink of each head's own", SOFTMAX, another(_sink), r"queries .*"
    yield "softmax to base 2", SOFTMAX, _softmax(_causal, base=2.0), r".* divided by 1\.44.*"
    yield "small probabilities flushed", SOFTMAX, then(lambda p: np.where(p < 0.05, 0, p)), _MASK
    yield "a padded key hidden", SOFTMAX, _softmax(lambda back: (back >= 0) & (np.arange(len(back)) != 3)), _MASK
    yield "a key to come seen", SOFTMAX, _softmax(lambda back: (back >= 0) | (np.arange(len(back)) == 15)), _MASK
    yield "sum of the exponentials + 0.01", SOFTMAX, _softmax(_causal, more=0.01), _FACTORS
    yield "a head of zeros", ATTENTION, _in_heads(_with(1, lambda h: 0 * h)), r".* columns .*"
    yield "a stale row of the cache", ATTENTION, of_operands(lambda p, v: (p, _with(7, lambda _: v[6])(v))), ""
    yield "values one token late", ATTENTION, of_operands(lambda p, v: (p, np.roll(v, 1, axis=0))), ""


def _products() -> Iterator[Row]:
    yield "operands of 4 bits", PRODUCTS, all_operands(lambda x: _whole_numbers(float32(x))), ""
    yield "weights of 5 mantissa bits", PRODUCTS, _weights(lambda w: cut(w, 5)), ""
    yield "weights of 5 bits, 32 to a scale", PRODUCTS, _weights(_blocks), ""
    yield "sums by 64 in bfloat16", ("ffn_out",), another(_summed_by_64), ""
    yield "two of four weights pruned", PRODUCTS, _weights(_pruned), ""
    yield "weights clipped at twice their RMS", PRODUCTS, _weights(lambda w: np.clip(w, -2 * w.std(), 2 * w.std())), ""
    yield "an adapter of rank 1 left in", PRODUCTS, _weights(_adapted), r".*low rank.*|.*rank 1.*"
    yield "last term of K missing", PRODUCTS, of_operands(_without_last), r".*column.*|.*low rank.*"
    yield "logits shifted by one", HEAD, then(lambda r: np.roll(r, 1, axis=-1)), _ORDER
    yield "logits capped at 1.7", HEAD, _capped(1.7), ""


def _without_last(x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x * (np.arange(x.shape[-1]) < x.shape[-1] - 1), w


def _others() -> Iterator[Row]:
    yield "gelu by tanh, of 0.05 for 0.044715", SILU, another(_gelu_tanh), ""
    yield "silu, its argument cut at 0.55", SILU, another(lambda x: _silu(np.minimum(x, 0.55))), ""
    yield "silu of slope 1.1", SILU, another(lambda x: x * _sigmoid(np.float32(1.1) * x)), ""
    yield "silu times up + 1", SWIGL, another(lambda s, u: s * (u + 1)), ""
    yield "residual x 0.9", SUMS, another(lambda x, y: np.float32(0.9) * x + y), ""
    yield "block x 1.1", SUMS, another(lambda x, y: x + np.float32(1.1) * y), ""
    yield "last token's residual dropped", SUMS, another(lambda x, y: y + _with(-1, lambda r: 0 * r)(x)), ""
    yield "block normed before the sum", SUMS, another(lambda x, y: x + _twice(y)), ""
    yield "ids of the next tokens", EMBEDDING, of_operands(lambda t, w: (np.roll(t, -1), w)), r".*order.*|.*token.*"
    yield "embedding halved", EMBEDDING, then(lambda r: r * np.float32(0.5)), r"every value is 0\.5 times .*"


def _mixed(load: Load) -> np.ndarray:
    gate, up = load.right(), load.beside("mlp.up_proj.weight")
    gate[1::2] = up[1::2]
    return gate


def _faults() -> Iterator[Fault]:
    for rows, on in ((_described, TWO), (_described_in_float32, FLOAT32), (_described_in_replay, BUNDLE)):
        for name, at, plant, says in rows():
            path = REPLAY if on is BUNDLE else "forward"
            yield Fault(name, at, f"named: {says}", plant, path=path, on=on, says=says, must=True)
    for rows in (_norms, _ropes, _attentions, _products, _others):
        for name, at, plant, says in rows():
            yield Fault(name, at, "", plant, on=ALL, says=f"{_PLACE}|{says}" if says else _PLACE)
    says = rf"{_PLACE}|.*(rows?|columns?|up_proj) .*"
    yield Fault("every second row of the gate is up's", ("mlp.gate_proj.weight",), "", load=_mixed, says=says)
    says = "the same is added to every token, as if the bias of .*"
    yield Fault("bias of another layer", ("self_attn.q_proj.bias",), "", load=Load.of_neighbour, on=QWEN2, says=says)
    eps = with_options(eps=2e-6)
    yield Fault("eps added twice", NORMS[:2], "", eps, on=("quiet",), says=r"as if eps were 2e-06.*")


APART: tuple[Fault, ...] = tuple(_faults())
