"""The forward's stages in numpy float64: reference and oracle. Twin of svf_torch/decoder.py and svf_jax/decoder.py.

A function takes stage values as stored and returns the float64 value before its final rounding. Roundings that the
model prescribes *inside* a stage are performed, those to a dtype narrower than float32 (noise.prescribed).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.oracle.bounds import U32, by_columns, prescribed
from stages.oracle.rounding import widened
from stages.spec.causal import up_to_query
from stages.spec.rope import RopeParameters
from stages.spec.stage import Functions

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Real

# The declaration names the stages; a function has its stage's name.
FORWARD_STAGES: Functions[Callable[..., np.ndarray]] = Functions()


@FORWARD_STAGES
def inv_freq(
    positions: Real[np.ndarray, " tokens"],
    *,
    head_dim: int,
    rope_theta: float,
    rope_type: str,
    rope_parameters: RopeParameters,
) -> Float[np.ndarray, " frequencies"]:
    """Inverse frequencies of RoPE, theta^(-2i/head_dim); scaled as the rope_type says.

    The sequence's length, by which dynamic and longrope go, is one more than its last position.
    """
    rope: dict[str, Any] = dict(rope_parameters)
    frequencies = _unscaled(positions, head_dim, rope_theta, rope_type, rope)
    if rope_type == "linear":
        return frequencies / np.float64(np.float32(rope["factor"]))
    if rope_type == "yarn":
        kept = _yarn_kept(head_dim, rope_theta, rope).astype(np.float64)
        return frequencies / rope["factor"] * (1 - kept) + frequencies * kept
    if rope_type == "longrope":
        return frequencies / _longrope_factors(positions, rope).astype(np.float64)
    if rope_type == "llama3":
        kept = np.clip(_llama3_share(frequencies, rope), 0, 1)
        return frequencies / rope["factor"] * (1 - kept) + frequencies * kept
    return frequencies


@FORWARD_STAGES
def rope_angle(
    inv_freq: Float[np.ndarray, " frequencies"], positions: Real[np.ndarray, " tokens"]
) -> Float[np.ndarray, "tokens head_dim"]:
    """position * inv_freq: the frequencies twice over."""
    angle = positions.astype(np.float64)[:, None] * inv_freq
    return np.concatenate((angle, angle), axis=-1)


@FORWARD_STAGES
def rope_cos(
    rope_angle: Float[np.ndarray, "tokens head_dim"], *, attention_scaling: float, dtype: str
) -> Float[np.ndarray, "tokens head_dim"]:
    """cos(rope_angle) times the attention factor in float32, cast to `dtype`."""
    return np.cos(rope_angle.astype(np.float64)) * attention_scaling


@FORWARD_STAGES
def rope_sin(
    rope_angle: Float[np.ndarray, "tokens head_dim"], *, attention_scaling: float, dtype: str
) -> Float[np.ndarray, "tokens head_dim"]:
    """sin(rope_angle) times the attention factor in float32, cast to `dtype`."""
    return np.sin(rope_angle.astype(np.float64)) * attention_scaling


@FORWARD_STAGES
def embedding(
    tokens: Int[np.ndarray, " tokens"], weight: Float[np.ndarray, "vocab hidden"]
) -> Float[np.ndarray, "tokens hidden"]:
    """Rows of the embedding."""
    return weight[tokens].astype(np.float64)


@FORWARD_STAGES
def attn_norm(
    layer_input: Float[np.ndarray, "tokens hidden"], weight: Float[np.ndarray, " hidden"], *, eps: float
) -> Float[np.ndarray, "tokens hidden"]:
    """RMSNorm of the layer's input."""
    return _rms_norm(layer_input, weight, eps)


@FORWARD_STAGES
def qkv_matmul(
    attn_norm: Float[np.ndarray, "tokens hidden"],
    q: Float[np.ndarray, "heads_head_dim hidden"],
    k: Float[np.ndarray, "kv_heads_head_dim hidden"],
    v: Float[np.ndarray, "kv_heads_head_dim hidden"],
) -> Float[np.ndarray, "tokens qkv"]:
    """q, k and v without bias, joined on the last axis."""
    return np.concatenate([_linear(attn_norm, w) for w in (q, k, v)], axis=-1)


@FORWARD_STAGES
def qkv_bias(
    attn_norm: Float[np.ndarray, "tokens hidden"],
    q: Float[np.ndarray, "heads_head_dim hidden"],
    k: Float[np.ndarray, "kv_heads_head_dim hidden"],
    v: Float[np.ndarray, "kv_heads_head_dim hidden"],
    q_bias: Float[np.ndarray, " heads_head_dim"],
    k_bias: Float[np.ndarray, " kv_heads_head_dim"],
    v_bias: Float[np.ndarray, " kv_heads_head_dim"],
) -> Float[np.ndarray, "tokens qkv"]:
    """q, k and v with bias, product and bias in one call, joined on the last axis."""
    pairs = ((q, q_bias), (k, k_bias), (v, v_bias))
    return np.concatenate([_linear(attn_norm, w, b) for w, b in pairs], axis=-1)


@FORWARD_STAGES
def q_norm(
    qkv_bias: Float[np.ndarray, "tokens qkv"],
    weight: Float[np.ndarray, " head_dim"],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    eps: float,
) -> Float[np.ndarray, "tokens {heads} {head_dim}"]:
    """RMSNorm of the queries, head by head."""
    return _rms_norm(_queries(qkv_bias, heads, head_dim), weight, eps)


@FORWARD_STAGES
def k_norm(
    qkv_bias: Float[np.ndarray, "tokens qkv"],
    weight: Float[np.ndarray, " head_dim"],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    eps: float,
) -> Float[np.ndarray, "tokens {kv_heads} {head_dim}"]:
    """RMSNorm of the keys, head by head."""
    return _rms_norm(_keys(qkv_bias, heads, kv_heads, head_dim), weight, eps)


@FORWARD_STAGES
def q_post_rope(
    q: Float[np.ndarray, "tokens heads head_dim"] | Float[np.ndarray, "tokens qkv"],
    rope_cos: Float[np.ndarray, "tokens head_dim"],
    rope_sin: Float[np.ndarray, "tokens head_dim"],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> Float[np.ndarray, "tokens {heads} {head_dim}"]:
    """Queries turned by RoPE; from q_norm, or from qkv_bias where there is none."""
    return _turned(_queries(q, heads, head_dim), rope_cos, rope_sin)


@FORWARD_STAGES
def k_post_rope(
    k: Float[np.ndarray, "tokens kv_heads head_dim"] | Float[np.ndarray, "tokens qkv"],
    rope_cos: Float[np.ndarray, "tokens head_dim"],
    rope_sin: Float[np.ndarray, "tokens head_dim"],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> Float[np.ndarray, "tokens {kv_heads} {head_dim}"]:
    """Keys turned by RoPE; from k_norm, or from qkv_bias where there is none."""
    return _turned(_keys(k, heads, kv_heads, head_dim), rope_cos, rope_sin)


@FORWARD_STAGES
def attn_scores(
    q_post_rope: Float[np.ndarray, "queries heads head_dim"],
    k_post_rope: Float[np.ndarray, "keys kv_heads head_dim"],
    *,
    scaling: float,
) -> Float[np.ndarray, "heads queries keys"]:
    """q k^T * scaling, not masked."""
    q, k = _score_factors(q_post_rope, k_post_rope)
    return prescribed(q.astype(np.float64) @ k.astype(np.float64), q_post_rope.dtype) * np.float32(scaling)


@FORWARD_STAGES
def attn_softmax(
    attn_scores: Float[np.ndarray, "heads queries keys"], *, window: int | None = None
) -> Float[np.ndarray, "heads queries keys"]:
    """Softmax over the keys up to each query, of a `window` the last so many alone, in float32 and cast."""
    scores = _masked(attn_scores, window)
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


@FORWARD_STAGES
def attention(
    attn_softmax: Float[np.ndarray, "heads queries keys"],
    qkv_bias: Float[np.ndarray, "keys qkv"],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> Float[np.ndarray, "queries {heads}*{head_dim}"]:
    """attn_softmax @ v, heads joined."""
    values = _repeated(_values(qkv_bias, heads, kv_heads, head_dim), heads)
    return _joined(attn_softmax.astype(np.float64) @ values.astype(np.float64))


@FORWARD_STAGES
def attn_out(
    attention: Float[np.ndarray, "tokens heads_head_dim"],
    weight: Float[np.ndarray, "hidden heads_head_dim"],
    bias: Float[np.ndarray, " hidden"] | None = None,
) -> Float[np.ndarray, "tokens hidden"]:
    """o_proj of attention."""
    return _linear(attention, weight, bias)


@FORWARD_STAGES
def post_attn_residual(
    layer_input: Float[np.ndarray, "tokens hidden"], attn_out: Float[np.ndarray, "tokens hidden"]
) -> Float[np.ndarray, "tokens hidden"]:
    """The layer's input + attn_out."""
    return layer_input.astype(np.float64) + attn_out.astype(np.float64)


@FORWARD_STAGES
def ffn_norm(
    post_attn_residual: Float[np.ndarray, "tokens hidden"], weight: Float[np.ndarray, " hidden"], *, eps: float
) -> Float[np.ndarray, "tokens hidden"]:
    """RMSNorm of post_attn_residual."""
    return _rms_norm(post_attn_residual, weight, eps)


@FORWARD_STAGES
def ffn_gate(
    ffn_norm: Float[np.ndarray, "tokens hidden"], weight: Float[np.ndarray, "intermediate hidden"]
) -> Float[np.ndarray, "tokens intermediate"]:
    """gate_proj of ffn_norm."""
    return _linear(ffn_norm, weight)


@FORWARD_STAGES
def ffn_up(
    ffn_norm: Float[np.ndarray, "tokens hidden"], weight: Float[np.ndarray, "intermediate hidden"]
) -> Float[np.ndarray, "tokens intermediate"]:
    """up_proj of ffn_norm."""
    return _linear(ffn_norm, weight)


@FORWARD_STAGES
def ffn_silu(ffn_gate: Float[np.ndarray, "tokens intermediate"]) -> Float[np.ndarray, "tokens intermediate"]:
    """ffn_gate * sigmoid(ffn_gate)."""
    return _silu(ffn_gate)


@FORWARD_STAGES
def ffn_swigl(
    ffn_silu: Float[np.ndarray, "tokens intermediate"], ffn_up: Float[np.ndarray, "tokens intermediate"]
) -> Float[np.ndarray, "tokens intermediate"]:
    """ffn_silu * ffn_up."""
    return ffn_silu.astype(np.float64) * ffn_up.astype(np.float64)


@FORWARD_STAGES
def ffn_out(
    ffn_swigl: Float[np.ndarray, "tokens intermediate"], weight: Float[np.ndarray, "hidden intermediate"]
) -> Float[np.ndarray, "tokens hidden"]:
    """down_proj of ffn_swigl."""
    return _linear(ffn_swigl, weight)


@FORWARD_STAGES
def post_ffn_residual(
    post_attn_residual: Float[np.ndarray, "tokens hidden"], ffn_out: Float[np.ndarray, "tokens hidden"]
) -> Float[np.ndarray, "tokens hidden"]:
    """post_attn_residual + ffn_out: the layer's output."""
    return post_attn_residual.astype(np.float64) + ffn_out.astype(np.float64)


@FORWARD_STAGES
def final_norm(
    post_ffn_residual: Float[np.ndarray, "tokens hidden"], weight: Float[np.ndarray, " hidden"], *, eps: float
) -> Float[np.ndarray, "tokens hidden"]:
    """RMSNorm of the last layer's output."""
    return _rms_norm(post_ffn_residual, weight, eps)


@FORWARD_STAGES
def lm_head(
    final_norm: Float[np.ndarray, "tokens hidden"], weight: Float[np.ndarray, "vocab hidden"]
) -> Float[np.ndarray, "tokens vocab"]:
    """Logits; a chunk of the weight's rows gives those columns."""
    return _linear(final_norm, weight)


def _exponents(head_dim: int) -> np.ndarray:
    # float32 exponents and theta are part of the model's meaning: an error in 2i/d is multiplied by log(theta)
    return (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)).astype(np.float64)


def _unscaled(
    positions: np.ndarray, head_dim: int, rope_theta: float, rope_type: str, rope: Mapping[str, Any]
) -> np.ndarray:
    """The frequencies before any scaling but dynamic's, which is one of theta."""
    theta = np.float64(np.float32(rope_theta))
    if rope_type == "dynamic":
        theta = theta * _stretch(positions, rope) ** (head_dim / (head_dim - 2))
    return theta ** -_exponents(head_dim)


def _stretch(positions: np.ndarray, rope: Mapping[str, Any]) -> float:
    """By how much dynamic RoPE's context is longer than the model's, 1 up to its length.

    factor * length / original - (factor - 1) in transformers, here without its cancellation.
    """
    original = rope["original_max_position_embeddings"]
    return float(1 + rope["factor"] * max(int(positions.max()) + 1 - original, 0) / original)


def _longrope_factors(positions: np.ndarray, rope: Mapping[str, Any]) -> np.ndarray:
    """Each frequency's divisor, float32: longrope has a set for short sequences and one for long ones."""
    long = int(positions.max()) + 1 > rope["original_max_position_embeddings"]
    return np.asarray(rope["long_factor" if long else "short_factor"], np.float32)


def _llama3_share(frequencies: np.ndarray, rope: Mapping[str, Any]) -> np.ndarray:
    """How much of each frequency llama3 keeps before it is cut to 0..1: by its turns in the original length."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    return (rope["original_max_position_embeddings"] * frequencies / (2 * math.pi) - low) / (high - low)


def _yarn_range(head_dim: int, rope_theta: float, rope: Mapping[str, Any]) -> tuple[float, float]:
    """The frequencies between which yarn blends."""
    length, theta = rope["original_max_position_embeddings"], rope_theta

    def dimension(rotations: float) -> float:
        return (head_dim * math.log(length / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low, high = dimension(rope["beta_fast"]), dimension(rope["beta_slow"])
    if rope["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high + 0.001 if low == high else high


def _yarn_kept(head_dim: int, rope_theta: float, rope: Mapping[str, Any]) -> np.ndarray:
    """How much of each frequency yarn keeps, float32 `[head_dim / 2]`: 1 for fast ones, falling to 0.

    https://huggingface.co/papers/2309.00071. Subtractions and divisions of small numbers, rounded to float32
    one by one as transformers does; part of the model's meaning, and the same on every IEEE machine.
    """
    low, high = _yarn_range(head_dim, rope_theta, rope)
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    return np.float32(1) - np.clip(ramp, np.float32(0), np.float32(1))


def _rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return prescribed(_normed(x, eps), x.dtype) * weight.astype(np.float64)


def _normed(x: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def _linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    product = by_columns(x.astype(np.float64, copy=False), weight.T, widened)
    return product if bias is None else product + bias.astype(np.float64)


def _silu(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    with np.errstate(over="ignore"):  # exp(-x) = inf gives 0, which is right
        return x / (1 + np.exp(-x))


def _turned(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    direct, turned = _rope_products(x, cos, sin)
    return prescribed(direct, x.dtype) + prescribed(turned, x.dtype)


def _rope_products(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    wide, half = x.astype(np.float64), x.shape[-1] // 2
    rotated = np.concatenate((-wide[..., half:], wide[..., :half]), axis=-1)
    return wide * cos.astype(np.float64)[:, None], rotated * sin.astype(np.float64)[:, None]


def _masked(scores: np.ndarray, window: int | None) -> np.ndarray:
    return np.where(up_to_query(scores, window), scores.astype(np.float64), -np.inf)


def _queries(qkv: np.ndarray, heads: int, head_dim: int) -> np.ndarray:
    return qkv if qkv.ndim == 3 else qkv[:, : heads * head_dim].reshape(-1, heads, head_dim)


def _keys(qkv: np.ndarray, heads: int, kv_heads: int, head_dim: int) -> np.ndarray:
    if qkv.ndim == 3:
        return qkv
    return qkv[:, heads * head_dim : (heads + kv_heads) * head_dim].reshape(-1, kv_heads, head_dim)


def _values(qkv: np.ndarray, heads: int, kv_heads: int, head_dim: int) -> np.ndarray:
    return qkv[:, (heads + kv_heads) * head_dim :].reshape(-1, kv_heads, head_dim)


def _repeated(x: np.ndarray, heads: int) -> np.ndarray:
    """Keys or values `[tokens, kv_heads, head_dim]` as `[heads, tokens, head_dim]`, each for consecutive heads."""
    return np.repeat(x.swapaxes(0, 1), heads // x.shape[1], axis=0)


def _joined(x: np.ndarray) -> np.ndarray:
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)


def _score_factors(q: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return q.swapaxes(0, 1), _repeated(k, q.shape[1]).swapaxes(1, 2)


# -- what the noise bounds are computed from --------------------------------------------------------------------

Operands = tuple[np.ndarray | float | np.dtype, ...]


def _f32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32, copy=False)


def _linear_operands(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> Operands:
    """The two factors of a product; a bias is one more term, 1 * bias."""
    if bias is None:
        return _f32(x), _f32(weight).T
    ones = np.ones((len(x), 1), np.float32)
    return np.concatenate((_f32(x), ones), axis=1), np.concatenate((_f32(weight), _f32(bias)[:, None]), axis=1).T


def _qkv_operands(x: np.ndarray, *params: np.ndarray) -> Operands:
    weight = np.concatenate([_f32(w) for w in params[:3]])
    return _linear_operands(x, weight, np.concatenate([_f32(b) for b in params[3:]]) if params[3:] else None)


def _norm_operands(x: np.ndarray, weight: np.ndarray, *, eps: float) -> Operands:
    return _normed(x, eps), weight.astype(np.float64), x.dtype


def _attention_operands(p: np.ndarray, qkv: np.ndarray, *, heads: int, kv_heads: int, head_dim: int) -> Operands:
    return _f32(p), _f32(_repeated(_values(qkv, heads, kv_heads, head_dim), heads))


def _inv_freq_operands(
    positions: np.ndarray, *, head_dim: int, rope_theta: float, rope_type: str, rope_parameters: RopeParameters
) -> Operands:
    """|log| of the unscaled frequencies, their number in the row, and what their scaling errs by in float32 units.

    A blend of f and f/factor errs by its share's error times f - f/factor. yarn's share is a ramp of four float32
    operations, between ends that are logarithms unless they are cut to integers. llama3's is a frequency with its
    error and four operations more. dynamic's theta goes into the power: the stretch is taken by a difference of
    larger numbers in transformers, 4 u of the larger one, and by a power.
    """
    rope: dict[str, Any] = dict(rope_parameters)
    f = _unscaled(positions, head_dim, rope_theta, rope_type, rope)
    logarithm, number, extra = np.abs(np.log(f)), np.arange(f.size, dtype=np.float64), np.zeros(f.size)
    if rope_type == "yarn":
        low, high = _yarn_range(head_dim, rope_theta, rope)
        ends = 0.0 if rope["truncate"] else 4 * (abs(low) + abs(high)) / (high - low)
        extra = (4 + ends) * (f - f / rope["factor"])
    if rope_type == "llama3":
        width = rope["high_freq_factor"] - rope["low_freq_factor"]
        turns = rope["original_max_position_embeddings"] * f / (2 * math.pi)
        error = turns * (10 + 4 * logarithm + 2 * number) / width + 2
        share = _llama3_share(f, rope)
        blended = (share > -error * U32) & (share < 1 + error * U32)
        extra = np.where(blended, error, 0) * (f - f / rope["factor"])
    if rope_type == "dynamic":
        stretch = _stretch(positions, rope)
        error = (4 * (stretch + rope["factor"] - 1) / stretch + 2) * head_dim / (head_dim - 2) + 6
        extra = f * _exponents(head_dim) * (error if stretch > 1 else 0)
    return logarithm, number, extra


OPERANDS: Mapping[str, Callable[..., Operands]] = MappingProxyType(
    {
        "inv_freq": _inv_freq_operands,
        "rope_cos": lambda angle, *, attention_scaling, dtype: (attention_scaling,),
        "rope_sin": lambda angle, *, attention_scaling, dtype: (attention_scaling,),
        "attn_norm": _norm_operands,
        "qkv_matmul": _qkv_operands,
        "qkv_bias": _qkv_operands,
        "q_norm": lambda qkv, weight, *, heads, kv_heads, head_dim, eps: _norm_operands(
            _queries(qkv, heads, head_dim), weight, eps=eps
        ),
        "k_norm": lambda qkv, weight, *, heads, kv_heads, head_dim, eps: _norm_operands(
            _keys(qkv, heads, kv_heads, head_dim), weight, eps=eps
        ),
        "q_post_rope": lambda q, cos, sin, *, heads, kv_heads, head_dim: _rope_products(
            _queries(q, heads, head_dim), cos, sin
        ),
        "k_post_rope": lambda k, cos, sin, *, heads, kv_heads, head_dim: _rope_products(
            _keys(k, heads, kv_heads, head_dim), cos, sin
        ),
        "attn_scores": lambda q, k, *, scaling: (*map(_f32, _score_factors(q, k)), scaling, q.dtype),
        "attn_softmax": lambda scores, *, window=None: (_masked(scores, window),),
        "attention": _attention_operands,
        "attn_out": _linear_operands,
        "ffn_norm": _norm_operands,
        "ffn_gate": _linear_operands,
        "ffn_up": _linear_operands,
        "ffn_silu": lambda gate: (gate.astype(np.float64),),
        "ffn_out": _linear_operands,
        "final_norm": _norm_operands,
        "lm_head": _linear_operands,
    }
)
