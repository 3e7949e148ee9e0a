"""Stages in float64, before their final rounding. Twin of svf_torch/wide.py.

A stage of neither table below is its native function, which computes in its arguments' dtype. Those here have a cast
in it, or a rounding inside that float64 has to perform itself, as stages/oracle/{components,decoder}.py do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from stages.spec.rope import RopeParameters
from stages.spec.stage import Functions
from svf_jax import components, decoder, experts, router

# What differs in float64 takes the place of the native function.
WIDE_STAGES: Functions[Callable[..., Array]] = Functions(
    {**components.REPLAY_STAGES, **decoder.FORWARD_STAGES, **experts.EXPERT_STAGES, **router.ROUTER_STAGES}
)


@WIDE_STAGES
def source_f32(source: Array) -> Array:
    """The weight as stored."""
    return source


@WIDE_STAGES
def offsets_f32(offsets: Array) -> Array:
    """One scale offset per singular value."""
    return offsets


@WIDE_STAGES
def scaled_s(offsets_f32: Array, s: Array) -> Array:
    """Singular values after the SVF step, S * (1 + offsets); the sum rounded to float32."""
    return s * _rounded(1 + offsets_f32, "float32")


@WIDE_STAGES
def zero_source_f32(u: Array, s: Array, v: Array, *, layout: str) -> Array:
    """(U * S) @ V^T: the replay with zero offsets; U * S rounded to float32."""
    return components.matmul_pre_norm(_rounded(u * s, "float32"), v, layout=layout)


@WIDE_STAGES
def final_bf16(final_f32: Array) -> Array:
    """final_f32; the boundary rounds it to bfloat16."""
    return final_f32


@WIDE_STAGES
def inv_freq(
    positions: Array, *, head_dim: int, rope_theta: float, rope_type: str, rope_parameters: RopeParameters
) -> Array:
    """Inverse frequencies of RoPE, theta^(-2i/head_dim); scaled as the rope_type says."""
    rope: dict[str, Any] = dict(rope_parameters)
    # float32 exponents and theta are part of the model's meaning: an error in 2i/d is multiplied by log(theta)
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    theta = jnp.float64(np.float32(rope_theta))
    if rope_type == "dynamic":
        theta = theta * _stretch(positions, rope) ** (head_dim / (head_dim - 2))
    frequencies = theta ** -exponents.astype(np.float64)
    if rope_type == "linear":
        return frequencies / float(np.float32(rope["factor"]))
    if rope_type == "yarn":
        kept = decoder._yarn_kept(head_dim, rope_theta, rope).astype(np.float64)
        return frequencies / rope["factor"] * (1 - kept) + frequencies * kept
    if rope_type == "longrope":
        return frequencies / decoder._longrope_factors(positions, rope).astype(np.float64)
    if rope_type == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        share = (rope["original_max_position_embeddings"] * frequencies / (2 * math.pi) - low) / (high - low)
        share = jnp.clip(share, 0, 1)
        return frequencies / rope["factor"] * (1 - share) + frequencies * share
    return frequencies


@WIDE_STAGES
def rope_cos(rope_angle: Array, *, attention_scaling: float, dtype: str) -> Array:
    """cos(rope_angle) times the attention factor."""
    return jnp.cos(rope_angle) * attention_scaling


@WIDE_STAGES
def rope_sin(rope_angle: Array, *, attention_scaling: float, dtype: str) -> Array:
    """sin(rope_angle) times the attention factor."""
    return jnp.sin(rope_angle) * attention_scaling


@WIDE_STAGES
def attn_norm(layer_input: Array, weight: Array, *, eps: float, dtype: str) -> Array:
    """RMSNorm of the layer's input."""
    return _rms_norm(layer_input, weight, eps, dtype)


@WIDE_STAGES
def q_norm(
    qkv_bias: Array, weight: Array, *, heads: int, kv_heads: int, head_dim: int, eps: float, dtype: str
) -> Array:
    """RMSNorm of the queries, head by head."""
    return _rms_norm(decoder._queries(qkv_bias, heads, head_dim), weight, eps, dtype)


@WIDE_STAGES
def k_norm(
    qkv_bias: Array, weight: Array, *, heads: int, kv_heads: int, head_dim: int, eps: float, dtype: str
) -> Array:
    """RMSNorm of the keys, head by head."""
    return _rms_norm(decoder._keys(qkv_bias, heads, kv_heads, head_dim), weight, eps, dtype)


@WIDE_STAGES
def q_post_rope(
    q: Array, rope_cos: Array, rope_sin: Array, *, heads: int, kv_heads: int, head_dim: int, dtype: str
) -> Array:
    """Queries turned by RoPE; from q_norm, or from qkv_bias where there is none."""
    return _turned(decoder._queries(q, heads, head_dim), rope_cos, rope_sin, dtype)


@WIDE_STAGES
def k_post_rope(
    k: Array, rope_cos: Array, rope_sin: Array, *, heads: int, kv_heads: int, head_dim: int, dtype: str
) -> Array:
    """Keys turned by RoPE; from k_norm, or from qkv_bias where there is none."""
    return _turned(decoder._keys(k, heads, kv_heads, head_dim), rope_cos, rope_sin, dtype)


@WIDE_STAGES
def attn_scores(q_post_rope: Array, k_post_rope: Array, *, scaling: float, dtype: str) -> Array:
    """q k^T * scaling, not masked."""
    keys = decoder._repeated(k_post_rope, q_post_rope.shape[1])
    scores = jnp.einsum("qhd,hkd->hqk", q_post_rope, keys)
    return _prescribed(scores, dtype) * float(np.float32(scaling))


@WIDE_STAGES
def attn_softmax(attn_scores: Array, *, window: int | None = None) -> Array:
    """Softmax over the keys up to each query, of a `window` the last so many alone."""
    return jax.nn.softmax(decoder._masked(attn_scores, window), axis=-1)


@WIDE_STAGES
def ffn_silu(ffn_gate: Array) -> Array:
    """ffn_gate * sigmoid(ffn_gate)."""
    # not jax.nn.silu, whose sigmoid XLA may take from tanh: all digits cancel far below 0
    return ffn_gate / (1 + jnp.exp(-ffn_gate))


@WIDE_STAGES
def ffn_norm(post_attn_residual: Array, weight: Array, *, eps: float, dtype: str) -> Array:
    """RMSNorm of post_attn_residual."""
    return _rms_norm(post_attn_residual, weight, eps, dtype)


@WIDE_STAGES
def final_norm(post_ffn_residual: Array, weight: Array, *, eps: float, dtype: str) -> Array:
    """RMSNorm of the last layer's output."""
    return _rms_norm(post_ffn_residual, weight, eps, dtype)


@WIDE_STAGES
def router_probs(router_logits: Array) -> Array:
    """Softmax over all experts."""
    return jax.nn.softmax(router_logits, axis=-1)


@WIDE_STAGES
def router_weights(router_probs: Array, router_topk: Array, *, renormalised: bool, dtype: str) -> Array:
    """The chosen experts' probabilities, over their sum where `renormalised`."""
    weights = jnp.take_along_axis(router_probs, router_topk, axis=-1)
    return weights / weights.sum(axis=-1, keepdims=True) if renormalised else weights


def _stretch(positions: Array, rope: Mapping[str, Any]) -> Array:
    """By how much dynamic RoPE's context is longer than the model's, 1 up to its length."""
    original = rope["original_max_position_embeddings"]
    beyond = jnp.maximum(positions.max() + 1 - original, 0).astype(np.float64)
    return 1 + rope["factor"] * beyond / original


def _rms_norm(x: Array, weight: Array, eps: float, dtype: str) -> Array:
    return _prescribed(x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps), dtype) * weight


def _turned(x: Array, cos: Array, sin: Array, dtype: str) -> Array:
    half = x.shape[-1] // 2
    rotated = jnp.concatenate((-x[..., half:], x[..., :half]), axis=-1)
    return _prescribed(x * cos[:, None], dtype) + _prescribed(rotated * sin[:, None], dtype)


def _prescribed(x: Array, dtype: str) -> Array:
    """`x` rounded to a dtype narrower than float32, still float64; to float32 it is left out (noise.prescribed)."""
    return x if dtype == "float32" else _rounded(x, dtype)


def _rounded(x: Array, dtype: str) -> Array:
    # not astype there and back, which XLA may leave out; one rounding from float64, that flushes below 2^-126
    return decoder._reduced(x, jnp.dtype(dtype))
