"""The forward's stages in PyTorch. Twin of svf_jax/decoder.py and stages/oracle/decoder.py.

Operation by operation what the eager modules of `transformers` 5 do, in the same memory layout, so that every
stage has the same bits: models/{qwen2,qwen3,llama,mistral}/modeling_*.py and modeling_rope_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.spec.rope import RopeParameters
from stages.spec.stage import Functions

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Real

# The declaration names the stages; a function has its stage's name.
FORWARD_STAGES: Functions[Callable[..., Tensor]] = Functions()


@FORWARD_STAGES
def inv_freq(
    positions: Real[Tensor, " tokens"],
    *,
    head_dim: int,
    rope_theta: float,
    rope_type: str,
    rope_parameters: RopeParameters,
) -> Float[Tensor, " frequencies"]:
    """Inverse frequencies of RoPE, theta^(-2i/head_dim); scaled as the rope_type says.

    The sequence's length, by which dynamic and longrope go, is one more than its last position.
    """
    rope: dict[str, Any] = dict(rope_parameters)
    # The CPU's whatever the device: transformers computes them when it builds the model. Those of a sequence longer
    # than the model's own are the device's: it computes them in the forward.
    device = positions.device if _is_long(positions, rope_type, rope) else torch.device("cpu")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    powers = _theta(positions, head_dim, rope_theta, rope_type, rope) ** exponents
    if rope_type == "linear":
        return 1.0 / powers / rope["factor"]
    if rope_type == "yarn":
        kept = _yarn_kept(head_dim, rope_theta, rope)
        return 1.0 / (rope["factor"] * powers) * (1 - kept) + 1.0 / powers * kept
    if rope_type == "longrope":
        return 1.0 / (_longrope_factors(positions, rope).to(device) * powers)
    if rope_type == "llama3":
        return _llama3(1.0 / powers, rope)
    return 1.0 / powers


@FORWARD_STAGES
def rope_angle(
    inv_freq: Float[Tensor, " frequencies"], positions: Real[Tensor, " tokens"]
) -> Float[Tensor, "tokens head_dim"]:
    """position * inv_freq: the frequencies twice over."""
    angle = positions[:, None].float() * inv_freq.to(positions.device)
    return torch.cat((angle, angle), dim=-1)


@FORWARD_STAGES
def rope_cos(
    rope_angle: Float[Tensor, "tokens head_dim"], *, attention_scaling: float, dtype: str
) -> Float[Tensor, "tokens head_dim"]:
    """cos(rope_angle) times the attention factor in float32, cast to `dtype`."""
    return (rope_angle.cos() * attention_scaling).to(getattr(torch, dtype))


@FORWARD_STAGES
def rope_sin(
    rope_angle: Float[Tensor, "tokens head_dim"], *, attention_scaling: float, dtype: str
) -> Float[Tensor, "tokens head_dim"]:
    """sin(rope_angle) times the attention factor in float32, cast to `dtype`."""
    return (rope_angle.sin() * attention_scaling).to(getattr(torch, dtype))


@FORWARD_STAGES
def embedding(tokens: Int[Tensor, " tokens"], weight: Float[Tensor, "vocab hidden"]) -> Float[Tensor, "tokens hidden"]:
    """Rows of the embedding."""
    return F.embedding(tokens, weight)


@FORWARD_STAGES
def attn_norm(
    layer_input: Float[Tensor, "tokens hidden"], weight: Float[Tensor, " hidden"], *, eps: float
) -> Float[Tensor, "tokens hidden"]:
    """RMSNorm of the layer's input."""
    return _rms_norm(layer_input, weight, eps)


@FORWARD_STAGES
def qkv_matmul(
    attn_norm: Float[Tensor, "tokens hidden"],
    q: Float[Tensor, "heads_head_dim hidden"],
    k: Float[Tensor, "kv_heads_head_dim hidden"],
    v: Float[Tensor, "kv_heads_head_dim hidden"],
) -> Float[Tensor, "tokens qkv"]:
    """q, k and v without bias, joined on the last axis."""
    return torch.cat([F.linear(attn_norm, w) for w in (q, k, v)], dim=-1)


@FORWARD_STAGES
def qkv_bias(
    attn_norm: Float[Tensor, "tokens hidden"],
    q: Float[Tensor, "heads_head_dim hidden"],
    k: Float[Tensor, "kv_heads_head_dim hidden"],
    v: Float[Tensor, "kv_heads_head_dim hidden"],
    q_bias: Float[Tensor, " heads_head_dim"],
    k_bias: Float[Tensor, " kv_heads_head_dim"],
    v_bias: Float[Tensor, " kv_heads_head_dim"],
) -> Float[Tensor, "tokens qkv"]:
    """q, k and v with bias, product and bias in one call, joined on the last axis."""
    pairs = ((q, q_bias), (k, k_bias), (v, v_bias))
    return torch.cat([F.linear(attn_norm, w, b) for w, b in pairs], dim=-1)


@FORWARD_STAGES
def q_norm(
    qkv_bias: Float[Tensor, "tokens qkv"],
    weight: Float[Tensor, " head_dim"],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    eps: float,
) -> Float[Tensor, "tokens {heads} {head_dim}"]:
    """RMSNorm of the queries, head by head."""
    return _rms_norm(_queries(qkv_bias, heads, head_dim), weight, eps)


@FORWARD_STAGES
def k_norm(
    qkv_bias: Float[Tensor, "tokens qkv"],
    weight: Float[Tensor, " head_dim"],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    eps: float,
) -> Float[Tensor, "tokens {kv_heads} {head_dim}"]:
    """RMSNorm of the keys, head by head."""
    return _rms_norm(_keys(qkv_bias, heads, kv_heads, head_dim), weight, eps)


@FORWARD_STAGES
def q_post_rope(
    q: Float[Tensor, "tokens heads head_dim"] | Float[Tensor, "tokens qkv"],
    rope_cos: Float[Tensor, "tokens head_dim"],
    rope_sin: Float[Tensor, "tokens head_dim"],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> Float[Tensor, "tokens {heads} {head_dim}"]:
    """Queries turned by RoPE; from q_norm, or from qkv_bias where there is none."""
    return _turned(_queries(q, heads, head_dim), rope_cos, rope_sin)


@FORWARD_STAGES
def k_post_rope(
    k: Float[Tensor, "tokens kv_heads head_dim"] | Float[Tensor, "tokens qkv"],
    rope_cos: Float[Tensor, "tokens head_dim"],
    rope_sin: Float[Tensor, "tokens head_dim"],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> Float[Tensor, "tokens {kv_heads} {head_dim}"]:
    """Keys turned by RoPE; from k_norm, or from qkv_bias where there is none."""
    return _turned(_keys(k, heads, kv_heads, head_dim), rope_cos, rope_sin)


@FORWARD_STAGES
def attn_scores(
    q_post_rope: Float[Tensor, "queries heads head_dim"],
    k_post_rope: Float[Tensor, "keys kv_heads head_dim"],
    *,
    scaling: float,
) -> Float[Tensor, "heads queries keys"]:
    """q k^T * scaling, not masked."""
    keys = _repeated(k_post_rope, q_post_rope.shape[1])
    return torch.matmul(q_post_rope.transpose(0, 1), keys.transpose(1, 2)) * scaling


@FORWARD_STAGES
def attn_softmax(
    attn_scores: Float[Tensor, "heads queries keys"], *, window: int | None = None
) -> Float[Tensor, "heads queries keys"]:
    """Softmax over the keys up to each query, of a `window` the last so many alone, in float32 and cast."""
    return F.softmax(attn_scores + _mask(attn_scores, window), dim=-1, dtype=torch.float32).to(attn_scores.dtype)


@FORWARD_STAGES
def attention(
    attn_softmax: Float[Tensor, "heads queries keys"],
    qkv_bias: Float[Tensor, "keys qkv"],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> Float[Tensor, "queries {heads}*{head_dim}"]:
    """attn_softmax @ v, heads joined."""
    values = _repeated(_values(qkv_bias, heads, kv_heads, head_dim), heads)
    return _joined(torch.matmul(attn_softmax, values))


@FORWARD_STAGES
def attn_out(
    attention: Float[Tensor, "tokens heads_head_dim"],
    weight: Float[Tensor, "hidden heads_head_dim"],
    bias: Float[Tensor, " hidden"] | None = None,
) -> Float[Tensor, "tokens hidden"]:
    """o_proj of attention."""
    return F.linear(attention, weight, bias)


@FORWARD_STAGES
def post_attn_residual(
    layer_input: Float[Tensor, "tokens hidden"], attn_out: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, "tokens hidden"]:
    """The layer's input + attn_out."""
    return layer_input + attn_out


@FORWARD_STAGES
def ffn_norm(
    post_attn_residual: Float[Tensor, "tokens hidden"], weight: Float[Tensor, " hidden"], *, eps: float
) -> Float[Tensor, "tokens hidden"]:
    """RMSNorm of post_attn_residual."""
    return _rms_norm(post_attn_residual, weight, eps)


@FORWARD_STAGES
def ffn_gate(
    ffn_norm: Float[Tensor, "tokens hidden"], weight: Float[Tensor, "intermediate hidden"]
) -> Float[Tensor, "tokens intermediate"]:
    """gate_proj of ffn_norm."""
    return F.linear(ffn_norm, weight)


@FORWARD_STAGES
def ffn_up(
    ffn_norm: Float[Tensor, "tokens hidden"], weight: Float[Tensor, "intermediate hidden"]
) -> Float[Tensor, "tokens intermediate"]:
    """up_proj of ffn_norm."""
    return F.linear(ffn_norm, weight)


@FORWARD_STAGES
def ffn_silu(ffn_gate: Float[Tensor, "tokens intermediate"]) -> Float[Tensor, "tokens intermediate"]:
    """ffn_gate * sigmoid(ffn_gate)."""
    return F.silu(ffn_gate)


@FORWARD_STAGES
def ffn_swigl(
    ffn_silu: Float[Tensor, "tokens intermediate"], ffn_up: Float[Tensor, "tokens intermediate"]
) -> Float[Tensor, "tokens intermediate"]:
    """ffn_silu * ffn_up."""
    return ffn_silu * ffn_up


@FORWARD_STAGES
def ffn_out(
    ffn_swigl: Float[Tensor, "tokens intermediate"], weight: Float[Tensor, "hidden intermediate"]
) -> Float[Tensor, "tokens hidden"]:
    """down_proj of ffn_swigl."""
    return F.linear(ffn_swigl, weight)


@FORWARD_STAGES
def post_ffn_residual(
    post_attn_residual: Float[Tensor, "tokens hidden"], ffn_out: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, "tokens hidden"]:
    """post_attn_residual + ffn_out: the layer's output."""
    return post_attn_residual + ffn_out


@FORWARD_STAGES
def final_norm(
    post_ffn_residual: Float[Tensor, "tokens hidden"], weight: Float[Tensor, " hidden"], *, eps: float
) -> Float[Tensor, "tokens hidden"]:
    """RMSNorm of the last layer's output."""
    return _rms_norm(post_ffn_residual, weight, eps)


@FORWARD_STAGES
def lm_head(
    final_norm: Float[Tensor, "tokens hidden"], weight: Float[Tensor, "vocab hidden"]
) -> Float[Tensor, "tokens vocab"]:
    """Logits; a chunk of the weight's rows gives those columns."""
    return F.linear(final_norm, weight)


def _is_long(positions: Tensor, rope_type: str, rope: Mapping[str, Any]) -> bool:
    """Whether the sequence is longer than the length from which on dynamic and longrope change."""
    if rope_type not in ("dynamic", "longrope"):
        return False
    return bool(positions.max() + 1 > rope["original_max_position_embeddings"])


def _theta(
    positions: Tensor, head_dim: int, rope_theta: float, rope_type: str, rope: Mapping[str, Any]
) -> Tensor | float:
    """rope_theta, stretched where dynamic RoPE's sequence is longer than the model's."""
    if rope_type != "dynamic":
        return rope_theta
    factor, original = rope["factor"], rope["original_max_position_embeddings"]
    # A tensor's arithmetic is float32, as transformers has it when it computes them anew; else Python's.
    length = positions.max() + 1 if _is_long(positions, rope_type, rope) else original
    return rope_theta * ((factor * length / original) - (factor - 1)) ** (head_dim / (head_dim - 2))


def _longrope_factors(positions: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Each frequency's divisor, float32: longrope has a set for short sequences and one for long ones."""
    long = _is_long(positions, "longrope", rope)
    return torch.tensor(rope["long_factor" if long else "short_factor"], dtype=torch.float32)


def _llama3(frequencies: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Slow frequencies divided by the factor, fast ones kept, those between blended by their wavelength."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    length = rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequencies
    slow, fast = wavelength > length / low, wavelength < length / high
    share = (length / wavelength - low) / (high - low)
    blend = (1 - share) * frequencies / factor + share * frequencies
    return torch.where(slow, frequencies / factor, torch.where(fast, frequencies, blend))


def _yarn_kept(head_dim: int, rope_theta: float, rope: Mapping[str, Any]) -> Tensor:
    length, theta = rope["original_max_position_embeddings"], rope_theta

    def dimension(rotations: float) -> float:
        return (head_dim * math.log(length / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low, high = dimension(rope["beta_fast"]), dimension(rope["beta_slow"])
    if rope["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)
    return 1 - torch.clamp(ramp, 0, 1)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.float32)
    variance = wide.pow(2).mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(variance + eps)).to(x.dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos[:, None] + rotated * sin[:, None]


def _mask(scores: Tensor, window: int | None) -> Tensor:
    queries, keys = scores.shape[-2:]
    # The dtype's least number, not -inf, as transformers adds it; the queries are the last of the keys' positions.
    least = torch.full((queries, keys), torch.finfo(scores.dtype).min, dtype=scores.dtype, device=scores.device)
    later = least.triu(keys - queries + 1)
    return later if window is None else later + least.tril(keys - queries - window)


def _queries(qkv: Tensor, heads: int, head_dim: int) -> Tensor:
    return qkv if qkv.ndim == 3 else qkv[:, : heads * head_dim].unflatten(-1, (heads, head_dim))


def _keys(qkv: Tensor, heads: int, kv_heads: int, head_dim: int) -> Tensor:
    if qkv.ndim == 3:
        return qkv
    return qkv[:, heads * head_dim : (heads + kv_heads) * head_dim].unflatten(-1, (kv_heads, head_dim))


def _values(qkv: Tensor, heads: int, kv_heads: int, head_dim: int) -> Tensor:
    return qkv[:, (heads + kv_heads) * head_dim :].unflatten(-1, (kv_heads, head_dim))


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Keys or values `[tokens, kv_heads, head_dim]` as `[heads, tokens, head_dim]`, each for consecutive heads."""
    tokens, kv_heads, head_dim = x.shape
    x = x.transpose(0, 1)
    if heads == kv_heads:
        return x
    return x[:, None].expand(kv_heads, heads // kv_heads, tokens, head_dim).reshape(heads, tokens, head_dim)


def _joined(x: Tensor) -> Tensor:
    return x.transpose(0, 1).reshape(x.shape[1], -1)
