"""Stages in float64, before their final rounding. Twin of svf_jax/wide.py.

A stage of neither table below is its native function, which computes in its arguments' dtype. Those here have a cast
in it, or a rounding inside that float64 has to perform itself, as stages/oracle/{components,decoder}.py do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stages.spec.rope import RopeParameters
from stages.spec.stage import Functions
from svf_torch import components, decoder, experts, router

# What differs in float64 takes the place of the native function.
WIDE_STAGES: Functions[Callable[..., Tensor]] = Functions(
    {**components.REPLAY_STAGES, **decoder.FORWARD_STAGES, **experts.EXPERT_STAGES, **router.ROUTER_STAGES}
)


@WIDE_STAGES
def source_f32(source: Tensor) -> Tensor:
    """The weight as stored."""
    return source


@WIDE_STAGES
def offsets_f32(offsets: Tensor) -> Tensor:
    """One scale offset per singular value."""
    return offsets


@WIDE_STAGES
def scaled_s(offsets_f32: Tensor, s: Tensor) -> Tensor:
    """Singular values after the SVF step, S * (1 + offsets); the sum rounded to float32."""
    return s * _rounded(1 + offsets_f32, "float32")


@WIDE_STAGES
def zero_source_f32(u: Tensor, s: Tensor, v: Tensor, *, layout: str) -> Tensor:
    """(U * S) @ V^T: the replay with zero offsets; U * S rounded to float32."""
    return components.matmul_pre_norm(_rounded(u * s, "float32"), v, layout=layout)


@WIDE_STAGES
def final_bf16(final_f32: Tensor) -> Tensor:
    """final_f32; the boundary rounds it to bfloat16."""
    return final_f32


@WIDE_STAGES
def inv_freq(
    positions: Tensor, *, head_dim: int, rope_theta: float, rope_type: str, rope_parameters: RopeParameters
) -> Tensor:
    """Inverse frequencies of RoPE, theta^(-2i/head_dim); scaled as the rope_type says."""
    rope: dict[str, Any] = dict(rope_parameters)
    # float32 exponents and theta are part of the model's meaning: an error in 2i/d is multiplied by log(theta)
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    theta = torch.tensor(np.float32(rope_theta), dtype=torch.float64)
    if rope_type == "dynamic":
        theta = theta * _stretch(positions, rope) ** (head_dim / (head_dim - 2))
    frequencies = theta ** -torch.from_numpy(exponents).double()
    if rope_type == "linear":
        return frequencies / float(np.float32(rope["factor"]))
    if rope_type == "yarn":
        kept = decoder._yarn_kept(head_dim, rope_theta, rope).double()
        return frequencies / rope["factor"] * (1 - kept) + frequencies * kept
    if rope_type == "longrope":
        return frequencies / decoder._longrope_factors(positions, rope).double()
    if rope_type == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        share = (rope["original_max_position_embeddings"] * frequencies / (2 * math.pi) - low) / (high - low)
        share = share.clamp(0, 1)
        return frequencies / rope["factor"] * (1 - share) + frequencies * share
    return frequencies


@WIDE_STAGES
def rope_cos(rope_angle: Tensor, *, attention_scaling: float, dtype: str) -> Tensor:
    """cos(rope_angle) times the attention factor."""
    return rope_angle.cos() * attention_scaling


@WIDE_STAGES
def rope_sin(rope_angle: Tensor, *, attention_scaling: float, dtype: str) -> Tensor:
    """sin(rope_angle) times the attention factor."""
    return rope_angle.sin() * attention_scaling


@WIDE_STAGES
def attn_norm(layer_input: Tensor, weight: Tensor, *, eps: float, dtype: str) -> Tensor:
    """RMSNorm of the layer's input."""
    return _rms_norm(layer_input, weight, eps, dtype)


@WIDE_STAGES
def q_norm(
    qkv_bias: Tensor, weight: Tensor, *, heads: int, kv_heads: int, head_dim: int, eps: float, dtype: str
) -> Tensor:
    """RMSNorm of the queries, head by head."""
    return _rms_norm(decoder._queries(qkv_bias, heads, head_dim), weight, eps, dtype)


@WIDE_STAGES
def k_norm(
    qkv_bias: Tensor, weight: Tensor, *, heads: int, kv_heads: int, head_dim: int, eps: float, dtype: str
) -> Tensor:
    """RMSNorm of the keys, head by head."""
    return _rms_norm(decoder._keys(qkv_bias, heads, kv_heads, head_dim), weight, eps, dtype)


@WIDE_STAGES
def q_post_rope(
    q: Tensor, rope_cos: Tensor, rope_sin: Tensor, *, heads: int, kv_heads: int, head_dim: int, dtype: str
) -> Tensor:
    """Queries turned by RoPE; from q_norm, or from qkv_bias where there is none."""
    return _turned(decoder._queries(q, heads, head_dim), rope_cos, rope_sin, dtype)


@WIDE_STAGES
def k_post_rope(
    k: Tensor, rope_cos: Tensor, rope_sin: Tensor, *, heads: int, kv_heads: int, head_dim: int, dtype: str
) -> Tensor:
    """Keys turned by RoPE; from k_norm, or from qkv_bias where there is none."""
    return _turned(decoder._keys(k, heads, kv_heads, head_dim), rope_cos, rope_sin, dtype)


@WIDE_STAGES
def attn_scores(q_post_rope: Tensor, k_post_rope: Tensor, *, scaling: float, dtype: str) -> Tensor:
    """q k^T * scaling, not masked."""
    keys = decoder._repeated(k_post_rope, q_post_rope.shape[1])
    scores = torch.matmul(q_post_rope.transpose(0, 1), keys.transpose(1, 2))
    return _prescribed(scores, dtype) * float(np.float32(scaling))


@WIDE_STAGES
def attn_softmax(attn_scores: Tensor, *, window: int | None = None) -> Tensor:
    """Softmax over the keys up to each query, of a `window` the last so many alone."""
    return F.softmax(attn_scores + decoder._mask(attn_scores, window), dim=-1)


@WIDE_STAGES
def ffn_silu(ffn_gate: Tensor) -> Tensor:
    """ffn_gate * sigmoid(ffn_gate)."""
    return ffn_gate / (1 + torch.exp(-ffn_gate))


@WIDE_STAGES
def ffn_norm(post_attn_residual: Tensor, weight: Tensor, *, eps: float, dtype: str) -> Tensor:
    """RMSNorm of post_attn_residual."""
    return _rms_norm(post_attn_residual, weight, eps, dtype)


@WIDE_STAGES
def final_norm(post_ffn_residual: Tensor, weight: Tensor, *, eps: float, dtype: str) -> Tensor:
    """RMSNorm of the last layer's output."""
    return _rms_norm(post_ffn_residual, weight, eps, dtype)


@WIDE_STAGES
def router_probs(router_logits: Tensor) -> Tensor:
    """Softmax over all experts."""
    return F.softmax(router_logits, dim=-1)


@WIDE_STAGES
def router_weights(router_probs: Tensor, router_topk: Tensor, *, renormalised: bool, dtype: str) -> Tensor:
    """The chosen experts' probabilities, over their sum where `renormalised`."""
    weights = router_probs.gather(-1, router_topk.long())
    return weights / weights.sum(dim=-1, keepdim=True) if renormalised else weights


def _stretch(positions: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """By how much dynamic RoPE's context is longer than the model's, 1 up to its length."""
    original = rope["original_max_position_embeddings"]
    beyond = (positions.max() + 1 - original).clamp(min=0).double()
    return 1 + rope["factor"] * beyond / original


def _rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: str) -> Tensor:
    return _prescribed(x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps), dtype) * weight


def _turned(x: Tensor, cos: Tensor, sin: Tensor, dtype: str) -> Tensor:
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return _prescribed(x * cos[:, None], dtype) + _prescribed(rotated * sin[:, None], dtype)


def _prescribed(x: Tensor, dtype: str) -> Tensor:
    """`x` rounded to a dtype narrower than float32, still float64; to float32 it is left out (noise.prescribed)."""
    return x if dtype == "float32" else _rounded(x, dtype)


def _rounded(x: Tensor, dtype: str) -> Tensor:
    if dtype == "float32":
        return x.to(torch.float32).to(torch.float64)
    # torch rounds by way of float32: rounded to odd there, it keeps the side of a tie (stages/oracle/rounding.py)
    single = x.to(torch.float32)
    away = (single.double().abs() > x.abs()).to(torch.int32)
    odd = (single.view(torch.int32) - away) | (single.double() != x).to(torch.int32)
    return odd.view(torch.float32).to(getattr(torch, dtype)).to(torch.float64)
