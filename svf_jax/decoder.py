"""The forward's stages in JAX. Twin of svf_torch/decoder.py and stages/oracle/decoder.py.

Each function is compiled by itself: fused over a stage boundary, XLA would drop the rounding there. Inside a
stage it may still contract x*y+z to one rounding and skip a cast to bfloat16 and back; the first lies within the
bounds of noise.py, the second does not, so casts inside a stage are `lax.reduce_precision`, which XLA keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from stages.spec.rope import RopeParameters
from stages.spec.stage import Functions

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Real

# The declaration names the stages; a function has its stage's name.
FORWARD_STAGES: Functions[Callable[..., Array]] = Functions()


@FORWARD_STAGES
def inv_freq(
    positions: Real[Array, " tokens"],
    *,
    head_dim: int,
    rope_theta: float,
    rope_type: str,
    rope_parameters: RopeParameters,
) -> Float[Array, " frequencies"]:
    """Inverse frequencies of RoPE, theta^(-2i/head_dim); scaled as the rope_type says.

    The sequence's length, by which dynamic and longrope go, is one more than its last position.
    """
    rope: dict[str, Any] = dict(rope_parameters)
    # numpy, not jnp: XLA divides by a constant as a product with its reciprocal
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = _theta(positions, head_dim, rope_theta, rope_type, rope) ** exponents
    if rope_type == "linear":
        return 1.0 / powers / rope["factor"]
    if rope_type == "yarn":
        kept = _yarn_kept(head_dim, rope_theta, rope)
        return 1.0 / (rope["factor"] * powers) * (1 - kept) + 1.0 / powers * kept
    if rope_type == "longrope":
        return 1.0 / (_longrope_factors(positions, rope) * powers)
    if rope_type == "llama3":
        return _llama3(1.0 / powers, rope)
    return 1.0 / powers


@FORWARD_STAGES
def rope_angle(
    inv_freq: Float[Array, " frequencies"], positions: Real[Array, " tokens"]
) -> Float[Array, "tokens head_dim"]:
    """position * inv_freq: the frequencies twice over."""
    angle = positions[:, None].astype(jnp.float32) * inv_freq
    return jnp.concatenate((angle, angle), axis=-1)


@FORWARD_STAGES
def rope_cos(
    rope_angle: Float[Array, "tokens head_dim"], *, attention_scaling: float, dtype: str
) -> Float[Array, "tokens head_dim"]:
    """cos(rope_angle) times the attention factor in float32, cast to `dtype`."""
    return (jnp.cos(rope_angle) * attention_scaling).astype(dtype)


@FORWARD_STAGES
def rope_sin(
    rope_angle: Float[Array, "tokens head_dim"], *, attention_scaling: float, dtype: str
) -> Float[Array, "tokens head_dim"]:
    """sin(rope_angle) times the attention factor in float32, cast to `dtype`."""
    return (jnp.sin(rope_angle) * attention_scaling).astype(dtype)


@FORWARD_STAGES
def embedding(tokens: Int[Array, " tokens"], weight: Float[Array, "vocab hidden"]) -> Float[Array, "tokens hidden"]:
    """Rows of the embedding."""
    return weight[tokens]


@FORWARD_STAGES
def attn_norm(
    layer_input: Float[Array, "tokens hidden"], weight: Float[Array, " hidden"], *, eps: float
) -> Float[Array, "tokens hidden"]:
    """RMSNorm of the layer's input."""
    return _rms_norm(layer_input, weight, eps)


@FORWARD_STAGES
def qkv_matmul(
    attn_norm: Float[Array, "tokens hidden"],
    q: Float[Array, "heads_head_dim hidden"],
    k: Float[Array, "kv_heads_head_dim hidden"],
    v: Float[Array, "kv_heads_head_dim hidden"],
) -> Float[Array, "tokens qkv"]:
    """q, k and v without bias, joined on the last axis."""
    return jnp.concatenate([_linear(attn_norm, w) for w in (q, k, v)], axis=-1)


@FORWARD_STAGES
def qkv_bias(
    attn_norm: Float[Array, "tokens hidden"],
    q: Float[Array, "heads_head_dim hidden"],
    k: Float[Array, "kv_heads_head_dim hidden"],
    v: Float[Array, "kv_heads_head_dim hidden"],
    q_bias: Float[Array, " heads_head_dim"],
    k_bias: Float[Array, " kv_heads_head_dim"],
    v_bias: Float[Array, " kv_heads_head_dim"],
) -> Float[Array, "tokens qkv"]:
    """q, k and v with bias, product and bias in one call, joined on the last axis."""
    pairs = ((q, q_bias), (k, k_bias), (v, v_bias))
    return jnp.concatenate([_linear(attn_norm, w, b) for w, b in pairs], axis=-1)


@FORWARD_STAGES
def q_norm(
    qkv_bias: Float[Array, "tokens qkv"],
    weight: Float[Array, " head_dim"],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    eps: float,
) -> Float[Array, "tokens {heads} {head_dim}"]:
    """RMSNorm of the queries, head by head."""
    return _rms_norm(_queries(qkv_bias, heads, head_dim), weight, eps)


@FORWARD_STAGES
def k_norm(
    qkv_bias: Float[Array, "tokens qkv"],
    weight: Float[Array, " head_dim"],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    eps: float,
) -> Float[Array, "tokens {kv_heads} {head_dim}"]:
    """RMSNorm of the keys, head by head."""
    return _rms_norm(_keys(qkv_bias, heads, kv_heads, head_dim), weight, eps)


@FORWARD_STAGES
def q_post_rope(
    q: Float[Array, "tokens heads head_dim"] | Float[Array, "tokens qkv"],
    rope_cos: Float[Array, "tokens head_dim"],
    rope_sin: Float[Array, "tokens head_dim"],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> Float[Array, "tokens {heads} {head_dim}"]:
    """Queries turned by RoPE; from q_norm, or from qkv_bias where there is none."""
    return _turned(_queries(q, heads, head_dim), rope_cos, rope_sin)


@FORWARD_STAGES
def k_post_rope(
    k: Float[Array, "tokens kv_heads head_dim"] | Float[Array, "tokens qkv"],
    rope_cos: Float[Array, "tokens head_dim"],
    rope_sin: Float[Array, "tokens head_dim"],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> Float[Array, "tokens {kv_heads} {head_dim}"]:
    """Keys turned by RoPE; from k_norm, or from qkv_bias where there is none."""
    return _turned(_keys(k, heads, kv_heads, head_dim), rope_cos, rope_sin)


@FORWARD_STAGES
def attn_scores(
    q_post_rope: Float[Array, "queries heads head_dim"],
    k_post_rope: Float[Array, "keys kv_heads head_dim"],
    *,
    scaling: float,
) -> Float[Array, "heads queries keys"]:
    """q k^T * scaling, not masked."""
    keys = _repeated(k_post_rope, q_post_rope.shape[1])
    scores = jnp.einsum("qhd,hkd->hqk", q_post_rope, keys, preferred_element_type=jnp.float32)
    # float32: a scale of the activations' dtype would be rounded to bfloat16 first
    return (_prescribed(scores, q_post_rope.dtype) * np.float32(scaling)).astype(q_post_rope.dtype)


@FORWARD_STAGES
def attn_softmax(
    attn_scores: Float[Array, "heads queries keys"], *, window: int | None = None
) -> Float[Array, "heads queries keys"]:
    """Softmax over the keys up to each query, of a `window` the last so many alone, in float32 and cast."""
    return jax.nn.softmax(_masked(attn_scores, window).astype(jnp.float32), axis=-1).astype(attn_scores.dtype)


@FORWARD_STAGES
def attention(
    attn_softmax: Float[Array, "heads queries keys"],
    qkv_bias: Float[Array, "keys qkv"],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> Float[Array, "queries {heads}*{head_dim}"]:
    """attn_softmax @ v, heads joined."""
    values = _repeated(_values(qkv_bias, heads, kv_heads, head_dim), heads)
    product = jnp.matmul(attn_softmax, values, preferred_element_type=_accumulator(values.dtype))
    return _joined(product).astype(qkv_bias.dtype)


@FORWARD_STAGES
def attn_out(
    attention: Float[Array, "tokens heads_head_dim"],
    weight: Float[Array, "hidden heads_head_dim"],
    bias: Float[Array, " hidden"] | None = None,
) -> Float[Array, "tokens hidden"]:
    """o_proj of attention."""
    return _linear(attention, weight, bias)


@FORWARD_STAGES
def post_attn_residual(
    layer_input: Float[Array, "tokens hidden"], attn_out: Float[Array, "tokens hidden"]
) -> Float[Array, "tokens hidden"]:
    """The layer's input + attn_out."""
    return layer_input + attn_out


@FORWARD_STAGES
def ffn_norm(
    post_attn_residual: Float[Array, "tokens hidden"], weight: Float[Array, " hidden"], *, eps: float
) -> Float[Array, "tokens hidden"]:
    """RMSNorm of post_attn_residual."""
    return _rms_norm(post_attn_residual, weight, eps)


@FORWARD_STAGES
def ffn_gate(
    ffn_norm: Float[Array, "tokens hidden"], weight: Float[Array, "intermediate hidden"]
) -> Float[Array, "tokens intermediate"]:
    """gate_proj of ffn_norm."""
    return _linear(ffn_norm, weight)


@FORWARD_STAGES
def ffn_up(
    ffn_norm: Float[Array, "tokens hidden"], weight: Float[Array, "intermediate hidden"]
) -> Float[Array, "tokens intermediate"]:
    """up_proj of ffn_norm."""
    return _linear(ffn_norm, weight)


@FORWARD_STAGES
def ffn_silu(ffn_gate: Float[Array, "tokens intermediate"]) -> Float[Array, "tokens intermediate"]:
    """ffn_gate * sigmoid(ffn_gate)."""
    # float32: in bfloat16 the sigmoid would be rounded before the product
    return jax.nn.silu(ffn_gate.astype(jnp.float32)).astype(ffn_gate.dtype)


@FORWARD_STAGES
def ffn_swigl(
    ffn_silu: Float[Array, "tokens intermediate"], ffn_up: Float[Array, "tokens intermediate"]
) -> Float[Array, "tokens intermediate"]:
    """ffn_silu * ffn_up."""
    return ffn_silu * ffn_up


@FORWARD_STAGES
def ffn_out(
    ffn_swigl: Float[Array, "tokens intermediate"], weight: Float[Array, "hidden intermediate"]
) -> Float[Array, "tokens hidden"]:
    """down_proj of ffn_swigl."""
    return _linear(ffn_swigl, weight)


@FORWARD_STAGES
def post_ffn_residual(
    post_attn_residual: Float[Array, "tokens hidden"], ffn_out: Float[Array, "tokens hidden"]
) -> Float[Array, "tokens hidden"]:
    """post_attn_residual + ffn_out: the layer's output."""
    return post_attn_residual + ffn_out


@FORWARD_STAGES
def final_norm(
    post_ffn_residual: Float[Array, "tokens hidden"], weight: Float[Array, " hidden"], *, eps: float
) -> Float[Array, "tokens hidden"]:
    """RMSNorm of the last layer's output."""
    return _rms_norm(post_ffn_residual, weight, eps)


@FORWARD_STAGES
def lm_head(
    final_norm: Float[Array, "tokens hidden"], weight: Float[Array, "vocab hidden"]
) -> Float[Array, "tokens vocab"]:
    """Logits; a chunk of the weight's rows gives those columns."""
    return _linear(final_norm, weight)


def _theta(positions: Array, head_dim: int, rope_theta: float, rope_type: str, rope: Mapping[str, Any]) -> Array:
    """rope_theta, stretched where dynamic RoPE's sequence is longer than the model's."""
    theta = jnp.float32(rope_theta)
    if rope_type != "dynamic":
        return theta
    original = rope["original_max_position_embeddings"]
    # Not transformers' difference of two larger numbers: positions are traced, so this is float32 at any length.
    stretch = 1 + np.float32(rope["factor"]) * jnp.maximum(positions.max() + 1 - original, 0) / original
    return theta * stretch ** (head_dim / (head_dim - 2))


def _longrope_factors(positions: Array, rope: Mapping[str, Any]) -> Array:
    """Each frequency's divisor, float32: longrope has a set for short sequences and one for long ones."""
    long, short = (np.asarray(rope[f"{which}_factor"], np.float32) for which in ("long", "short"))
    return jnp.where(positions.max() + 1 > rope["original_max_position_embeddings"], long, short)


def _llama3(frequencies: Array, rope: Mapping[str, Any]) -> Array:
    """Slow frequencies divided by the factor, fast ones kept, those between blended by their wavelength."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    length = rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequencies
    slow, fast = wavelength > length / low, wavelength < length / high
    share = (length / wavelength - low) / (high - low)
    blend = (1 - share) * frequencies / factor + share * frequencies
    return jnp.where(slow, frequencies / factor, jnp.where(fast, frequencies, blend))


def _yarn_kept(head_dim: int, rope_theta: float, rope: Mapping[str, Any]) -> np.ndarray:
    length, theta = rope["original_max_position_embeddings"], rope_theta

    def dimension(rotations: float) -> float:
        return (head_dim * math.log(length / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low, high = dimension(rope["beta_fast"]), dimension(rope["beta_slow"])
    if rope["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    return np.float32(1) - np.clip(ramp, np.float32(0), np.float32(1))


def _rms_norm(x: Array, weight: Array, eps: float) -> Array:
    wide = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (weight.astype(jnp.float32) * _prescribed(wide * lax.rsqrt(variance + eps), x.dtype)).astype(x.dtype)


def _linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    # Summed in float32 and rounded once, after the bias, as torch's bfloat16 products are.
    out = lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=_accumulator(x.dtype))
    return (out if bias is None else out + bias.astype(out.dtype)).astype(x.dtype)


def _accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """What products are summed in: float32, and float64 for float64 operands."""
    return jnp.promote_types(dtype, jnp.float32)


def _turned(x: Array, cos: Array, sin: Array) -> Array:
    half, wide = x.shape[-1] // 2, x.astype(jnp.float32)
    rotated = jnp.concatenate((-wide[..., half:], wide[..., :half]), axis=-1)
    direct, turned = wide * cos[:, None].astype(jnp.float32), rotated * sin[:, None].astype(jnp.float32)
    return (_prescribed(direct, x.dtype) + _prescribed(turned, x.dtype)).astype(x.dtype)


def _prescribed(x: Array, dtype: jnp.dtype) -> Array:
    return x if dtype == jnp.float32 else _reduced(x, dtype)


def _reduced(x: Array, dtype: jnp.dtype) -> Array:
    """`x` rounded to `dtype`, still in its own."""
    kind = jnp.finfo(dtype)
    normal = lax.reduce_precision(x, exponent_bits=kind.nexp, mantissa_bits=kind.nmant)
    if dtype != jnp.float16:
        return normal
    # reduce_precision flushes what is below 2^-14, where float16 still counts in steps of 2^-24.
    return jnp.where(jnp.abs(x) < 2.0**-14, jnp.round(x * 2.0**24) * 2.0**-24, normal)


def seen(queries: int, keys: int, window: int | None) -> Array:
    """Which keys each query sees, `[queries, keys]`: those up to it, of a `window` the last so many alone."""
    # The queries are the last of the keys' positions.
    causal = jnp.tri(queries, keys, keys - queries, dtype=bool)
    return causal if window is None else causal & ~jnp.tri(queries, keys, keys - queries - window, dtype=bool)


def _masked(scores: Array, window: int | None) -> Array:
    return jnp.where(seen(scores.shape[-2], scores.shape[-1], window), scores, jnp.finfo(scores.dtype).min)


def _queries(qkv: Array, heads: int, head_dim: int) -> Array:
    return qkv if qkv.ndim == 3 else qkv[:, : heads * head_dim].reshape(-1, heads, head_dim)


def _keys(qkv: Array, heads: int, kv_heads: int, head_dim: int) -> Array:
    if qkv.ndim == 3:
        return qkv
    return qkv[:, heads * head_dim : (heads + kv_heads) * head_dim].reshape(-1, kv_heads, head_dim)


def _values(qkv: Array, heads: int, kv_heads: int, head_dim: int) -> Array:
    return qkv[:, (heads + kv_heads) * head_dim :].reshape(-1, kv_heads, head_dim)


def _repeated(x: Array, heads: int) -> Array:
    """Keys or values `[tokens, kv_heads, head_dim]` as `[heads, tokens, head_dim]`, each for consecutive heads."""
    return jnp.repeat(x.swapaxes(0, 1), heads // x.shape[1], axis=0)


def _joined(x: Array) -> Array:
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)
