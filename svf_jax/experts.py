"""Mixtures of experts in JAX. Twin of svf_torch/experts.py and stages/oracle/experts.py.

Experts are computed one after the other, each for all tokens, of which those keep the result that chose it: shapes
under `jit` cannot go by how many these are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array, lax

from stages.spec.stage import Functions
from svf_jax.decoder import _accumulator, _linear

if TYPE_CHECKING:
    from jaxtyping import Float, Int

EXPERT_STAGES: Functions[Callable[..., Array]] = Functions()


@EXPERT_STAGES
def moe_logits(
    ffn_norm: Float[Array, "tokens hidden"], weight: Float[Array, "experts hidden"]
) -> Float[Array, "tokens experts"]:
    """The router's logits."""
    return _linear(ffn_norm, weight)


@EXPERT_STAGES
def router_probs(router_logits: Float[Array, "tokens experts"]) -> Float[Array, "tokens experts"]:
    """Softmax over all experts."""
    return jax.nn.softmax(router_logits.astype(_accumulator(router_logits.dtype)), axis=-1)


@EXPERT_STAGES
def router_topk(router_probs: Float[Array, "tokens experts"], *, top_k: int) -> Int[Array, "tokens topk"]:
    """The experts with the largest probabilities."""
    return lax.top_k(router_probs, top_k)[1].astype(jnp.int32)


@EXPERT_STAGES
def router_weights(
    router_probs: Float[Array, "tokens experts"],
    router_topk: Int[Array, "tokens topk"],
    *,
    renormalised: bool,
    dtype: str,
) -> Float[Array, "tokens topk"]:
    """The chosen experts' probabilities, over their sum where `renormalised`."""
    weights = jnp.take_along_axis(router_probs, router_topk, axis=-1)
    if renormalised:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return weights.astype(dtype)


@EXPERT_STAGES
def expert_gate(
    ffn_norm: Float[Array, "tokens hidden"],
    router_topk: Int[Array, "tokens topk"],
    gate: Float[Array, "chosen moe_intermediate hidden"],
    up: Float[Array, "chosen moe_intermediate hidden"],
) -> Float[Array, "tokens topk moe_intermediate"]:
    """gate_proj of ffn_norm."""
    return _by_expert(_placed(ffn_norm, router_topk), router_topk, gate)


@EXPERT_STAGES
def expert_up(
    ffn_norm: Float[Array, "tokens hidden"],
    router_topk: Int[Array, "tokens topk"],
    gate: Float[Array, "chosen moe_intermediate hidden"],
    up: Float[Array, "chosen moe_intermediate hidden"],
) -> Float[Array, "tokens topk moe_intermediate"]:
    """up_proj of ffn_norm."""
    return _by_expert(_placed(ffn_norm, router_topk), router_topk, up)


@EXPERT_STAGES
def expert_silu(
    expert_gate: Float[Array, "tokens topk moe_intermediate"],
) -> Float[Array, "tokens topk moe_intermediate"]:
    """expert_gate * sigmoid(expert_gate)."""
    return jax.nn.silu(expert_gate.astype(_accumulator(expert_gate.dtype))).astype(expert_gate.dtype)


@EXPERT_STAGES
def expert_swigl(
    expert_silu: Float[Array, "tokens topk moe_intermediate"], expert_up: Float[Array, "tokens topk moe_intermediate"]
) -> Float[Array, "tokens topk moe_intermediate"]:
    """expert_silu * expert_up."""
    return expert_silu * expert_up


@EXPERT_STAGES
def expert_out(
    expert_swigl: Float[Array, "tokens topk moe_intermediate"],
    router_topk: Int[Array, "tokens topk"],
    down: Float[Array, "chosen hidden moe_intermediate"],
) -> Float[Array, "tokens topk hidden"]:
    """down_proj of expert_swigl."""
    return _by_expert(expert_swigl, router_topk, down)


@EXPERT_STAGES
def moe_out(
    expert_out: Float[Array, "tokens topk hidden"],
    router_topk: Int[Array, "tokens topk"],
    router_weights: Float[Array, "tokens topk"],
) -> Float[Array, "tokens hidden"]:
    """The sum of expert_out times router_weights."""
    wide = _accumulator(expert_out.dtype)
    terms = expert_out.astype(wide) * router_weights.astype(wide)[..., None]
    return terms.sum(axis=1).astype(expert_out.dtype)


@EXPERT_STAGES
def shared_gate(
    ffn_norm: Float[Array, "tokens hidden"], weight: Float[Array, "shared_intermediate hidden"]
) -> Float[Array, "tokens shared_intermediate"]:
    """The shared expert's gate_proj."""
    return _linear(ffn_norm, weight)


@EXPERT_STAGES
def shared_up(
    ffn_norm: Float[Array, "tokens hidden"], weight: Float[Array, "shared_intermediate hidden"]
) -> Float[Array, "tokens shared_intermediate"]:
    """The shared expert's up_proj."""
    return _linear(ffn_norm, weight)


@EXPERT_STAGES
def shared_silu(
    shared_gate: Float[Array, "tokens shared_intermediate"],
) -> Float[Array, "tokens shared_intermediate"]:
    """shared_gate * sigmoid(shared_gate)."""
    return jax.nn.silu(shared_gate.astype(_accumulator(shared_gate.dtype))).astype(shared_gate.dtype)


@EXPERT_STAGES
def shared_swigl(
    shared_silu: Float[Array, "tokens shared_intermediate"], shared_up: Float[Array, "tokens shared_intermediate"]
) -> Float[Array, "tokens shared_intermediate"]:
    """shared_silu * shared_up."""
    return shared_silu * shared_up


@EXPERT_STAGES
def shared_out(
    shared_swigl: Float[Array, "tokens shared_intermediate"], weight: Float[Array, "hidden shared_intermediate"]
) -> Float[Array, "tokens hidden"]:
    """The shared expert's down_proj."""
    return _linear(shared_swigl, weight)


@EXPERT_STAGES
def shared_score(
    ffn_norm: Float[Array, "tokens hidden"], weight: Float[Array, "one hidden"]
) -> Float[Array, "tokens one"]:
    """How much of the shared expert a token gets, before the sigmoid."""
    return _linear(ffn_norm, weight)


@EXPERT_STAGES
def shared_weight(shared_score: Float[Array, "tokens one"]) -> Float[Array, "tokens one"]:
    """sigmoid(shared_score)."""
    return jax.nn.sigmoid(shared_score.astype(_accumulator(shared_score.dtype))).astype(shared_score.dtype)


@EXPERT_STAGES
def shared_gated(
    shared_weight: Float[Array, "tokens one"], shared_out: Float[Array, "tokens hidden"]
) -> Float[Array, "tokens hidden"]:
    """shared_weight * shared_out."""
    return shared_weight * shared_out


@EXPERT_STAGES
def moe_and_shared(
    moe_out: Float[Array, "tokens hidden"], shared_gated: Float[Array, "tokens hidden"]
) -> Float[Array, "tokens hidden"]:
    """moe_out + shared_gated."""
    return moe_out + shared_gated


def _placed(x: Array, topk: Array) -> Array:
    """A token's row at each of its places, `[tokens, topk, in]`."""
    return jnp.broadcast_to(x[:, None], (*topk.shape, x.shape[-1]))


def _by_expert(x: Array, topk: Array, weights: Array) -> Array:
    """x W^T, `[tokens, topk, out]`, at each place with the weight of its expert; x `[tokens, topk, in]`."""
    number = jnp.searchsorted(jnp.unique(topk, size=len(weights)), topk)

    def one(out: Array, given: tuple[Array, Array]) -> tuple[Array, None]:
        expert, weight = given
        y = _linear(x.reshape(-1, x.shape[-1]), weight).reshape(out.shape)
        return jnp.where((number == expert)[..., None], y, out), None

    out = jnp.zeros((*topk.shape, weights.shape[1]), x.dtype)
    return lax.scan(one, out, (jnp.arange(len(weights)), weights))[0]
