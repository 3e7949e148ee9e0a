"""What PyTorch computes in one call where the pipeline has several stages. Twin of svf_jax/fused.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from svf_torch.decoder import _joined, _values

if TYPE_CHECKING:
    from jaxtyping import Float


def fused_attention(
    q: Float[Tensor, "queries heads head_dim"],
    k: Float[Tensor, "keys kv_heads head_dim"],
    qkv_bias: Float[Tensor, "keys qkv"],
    *,
    scaling: float,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> Float[Tensor, "queries {heads}*{head_dim}"]:
    """Scores, softmax and weighted values in one call, `transformers`' default: scaled_dot_product_attention."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, _values(qkv_bias, heads, kv_heads, head_dim)))
    causal = q.shape[-2] > 1  # one query sees all keys up to itself
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scaling, enable_gqa=heads != kv_heads)
    return _joined(out[0])


# What the framework computes in one call where the pipeline has several stages.
FUSED: Mapping[str, Callable[..., Tensor]] = {"attention": fused_attention}
