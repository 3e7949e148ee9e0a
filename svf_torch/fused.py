"""What PyTorch computes in one call where the pipeline has several stages. Twin of svf_jax/fused.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
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
    window: int | None = None,
) -> Float[Tensor, "queries {heads}*{head_dim}"]:
    """Scores, softmax and weighted values in one call, `transformers`' default: scaled_dot_product_attention."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, _values(qkv_bias, heads, kv_heads, head_dim)))
    queries, keys = q.shape[-2], k.shape[-2]
    causal = queries > 1  # one query sees all keys up to itself
    if window is None or window > keys:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scaling, enable_gqa=heads != kv_heads)
    else:  # a mask and repeated heads, as transformers passes them
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        every = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
        mask = every.tril(keys - queries).triu(keys - queries + 1 - window)
        out = F.scaled_dot_product_attention(q, k, v, mask, scale=scaling)
    return _joined(out[0])


# What the framework computes in one call where the pipeline has several stages.
FUSED: Mapping[str, Callable[..., Tensor]] = {"attention": fused_attention}
