"""What JAX computes in one call where the pipeline has several stages. Twin of svf_torch/fused.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax
from jax import Array

from svf_jax.decoder import _values, seen

if TYPE_CHECKING:
    from jaxtyping import Float


def fused_attention(
    q: Float[Array, "queries heads head_dim"],
    k: Float[Array, "keys kv_heads head_dim"],
    qkv_bias: Float[Array, "keys qkv"],
    *,
    scaling: float,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None = None,
) -> Float[Array, "queries {heads}*{head_dim}"]:
    """Scores, softmax and weighted values in one call: jax.nn.dot_product_attention."""
    q, k, v = (x[None] for x in (q, k, _values(qkv_bias, heads, kv_heads, head_dim)))
    causal = q.shape[1] > 1  # one query sees all keys up to itself
    mask = None if window is None else seen(q.shape[1], k.shape[1], window)
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal and mask is None, scale=scaling)
    return out[0].reshape(out.shape[1], -1)


# What the framework computes in one call where the pipeline has several stages.
FUSED: Mapping[str, Callable[..., Array]] = {"attention": fused_attention}
