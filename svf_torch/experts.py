"""Mixtures of experts in PyTorch, as `transformers`' eager modules compute them. Twin of svf_jax/experts.py.

Experts are computed one after the other, each for the tokens that chose it, as the loop of `experts_implementation=
"eager"` does: a product of other rows may sum in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.spec.stage import Functions

if TYPE_CHECKING:
    from jaxtyping import Float, Int

EXPERT_STAGES: Functions[Callable[..., Tensor]] = Functions()


@EXPERT_STAGES
def moe_logits(
    ffn_norm: Float[Tensor, "tokens hidden"], weight: Float[Tensor, "experts hidden"]
) -> Float[Tensor, "tokens experts"]:
    """The router's logits."""
    return F.linear(ffn_norm, weight)


@EXPERT_STAGES
def router_probs(router_logits: Float[Tensor, "tokens experts"]) -> Float[Tensor, "tokens experts"]:
    """Softmax over all experts."""
    return F.softmax(router_logits, dim=-1, dtype=torch.float32)


@EXPERT_STAGES
def router_topk(router_probs: Float[Tensor, "tokens experts"], *, top_k: int) -> Int[Tensor, "tokens topk"]:
    """The experts with the largest probabilities."""
    return torch.topk(router_probs, top_k, dim=-1).indices.to(torch.int32)


@EXPERT_STAGES
def router_weights(
    router_probs: Float[Tensor, "tokens experts"],
    router_topk: Int[Tensor, "tokens topk"],
    *,
    renormalised: bool,
    dtype: str,
) -> Float[Tensor, "tokens topk"]:
    """The chosen experts' probabilities, over their sum where `renormalised`."""
    weights = router_probs.gather(-1, router_topk.long())
    if renormalised:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.to(getattr(torch, dtype))


@EXPERT_STAGES
def expert_gate(
    ffn_norm: Float[Tensor, "tokens hidden"],
    router_topk: Int[Tensor, "tokens topk"],
    gate: Float[Tensor, "chosen moe_intermediate hidden"],
    up: Float[Tensor, "chosen moe_intermediate hidden"],
) -> Float[Tensor, "tokens topk moe_intermediate"]:
    """gate_proj of ffn_norm."""
    return _gate_up(ffn_norm, router_topk, gate, up)[..., : gate.shape[1]]


@EXPERT_STAGES
def expert_up(
    ffn_norm: Float[Tensor, "tokens hidden"],
    router_topk: Int[Tensor, "tokens topk"],
    gate: Float[Tensor, "chosen moe_intermediate hidden"],
    up: Float[Tensor, "chosen moe_intermediate hidden"],
) -> Float[Tensor, "tokens topk moe_intermediate"]:
    """up_proj of ffn_norm."""
    return _gate_up(ffn_norm, router_topk, gate, up)[..., gate.shape[1] :]


@EXPERT_STAGES
def expert_silu(
    expert_gate: Float[Tensor, "tokens topk moe_intermediate"],
) -> Float[Tensor, "tokens topk moe_intermediate"]:
    """expert_gate * sigmoid(expert_gate)."""
    return F.silu(expert_gate)


@EXPERT_STAGES
def expert_swigl(
    expert_silu: Float[Tensor, "tokens topk moe_intermediate"], expert_up: Float[Tensor, "tokens topk moe_intermediate"]
) -> Float[Tensor, "tokens topk moe_intermediate"]:
    """expert_silu * expert_up."""
    return expert_silu * expert_up


@EXPERT_STAGES
def expert_out(
    expert_swigl: Float[Tensor, "tokens topk moe_intermediate"],
    router_topk: Int[Tensor, "tokens topk"],
    down: Float[Tensor, "chosen hidden moe_intermediate"],
) -> Float[Tensor, "tokens topk hidden"]:
    """down_proj of expert_swigl."""
    out = expert_swigl.new_empty((*router_topk.shape, down.shape[1]))
    for number, place, token in _sent(router_topk):
        out[token, place] = F.linear(expert_swigl[token, place], down[number])
    return out


@EXPERT_STAGES
def moe_out(
    expert_out: Float[Tensor, "tokens topk hidden"],
    router_topk: Int[Tensor, "tokens topk"],
    router_weights: Float[Tensor, "tokens topk"],
) -> Float[Tensor, "tokens hidden"]:
    """The sum of expert_out times router_weights."""
    # expert after expert, each sum rounded to the activations' dtype
    out = torch.zeros_like(expert_out[:, 0])
    for _, place, token in _sent(router_topk):
        out.index_add_(0, token, expert_out[token, place] * router_weights[token, place, None])
    return out


@EXPERT_STAGES
def shared_gate(
    ffn_norm: Float[Tensor, "tokens hidden"], weight: Float[Tensor, "shared_intermediate hidden"]
) -> Float[Tensor, "tokens shared_intermediate"]:
    """The shared expert's gate_proj."""
    return F.linear(ffn_norm, weight)


@EXPERT_STAGES
def shared_up(
    ffn_norm: Float[Tensor, "tokens hidden"], weight: Float[Tensor, "shared_intermediate hidden"]
) -> Float[Tensor, "tokens shared_intermediate"]:
    """The shared expert's up_proj."""
    return F.linear(ffn_norm, weight)


@EXPERT_STAGES
def shared_silu(
    shared_gate: Float[Tensor, "tokens shared_intermediate"],
) -> Float[Tensor, "tokens shared_intermediate"]:
    """shared_gate * sigmoid(shared_gate)."""
    return F.silu(shared_gate)


@EXPERT_STAGES
def shared_swigl(
    shared_silu: Float[Tensor, "tokens shared_intermediate"], shared_up: Float[Tensor, "tokens shared_intermediate"]
) -> Float[Tensor, "tokens shared_intermediate"]:
    """shared_silu * shared_up."""
    return shared_silu * shared_up


@EXPERT_STAGES
def shared_out(
    shared_swigl: Float[Tensor, "tokens shared_intermediate"], weight: Float[Tensor, "hidden shared_intermediate"]
) -> Float[Tensor, "tokens hidden"]:
    """The shared expert's down_proj."""
    return F.linear(shared_swigl, weight)


@EXPERT_STAGES
def shared_score(
    ffn_norm: Float[Tensor, "tokens hidden"], weight: Float[Tensor, "one hidden"]
) -> Float[Tensor, "tokens one"]:
    """How much of the shared expert a token gets, before the sigmoid."""
    return F.linear(ffn_norm, weight)


@EXPERT_STAGES
def shared_weight(shared_score: Float[Tensor, "tokens one"]) -> Float[Tensor, "tokens one"]:
    """sigmoid(shared_score)."""
    return F.sigmoid(shared_score)


@EXPERT_STAGES
def shared_gated(
    shared_weight: Float[Tensor, "tokens one"], shared_out: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, "tokens hidden"]:
    """shared_weight * shared_out."""
    return shared_weight * shared_out


@EXPERT_STAGES
def moe_and_shared(
    moe_out: Float[Tensor, "tokens hidden"], shared_gated: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, "tokens hidden"]:
    """moe_out + shared_gated."""
    return moe_out + shared_gated


def _gate_up(x: Tensor, topk: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Both, joined: in one product, which may sum in another order than two of half as many columns."""
    out = x.new_empty((*topk.shape, 2 * gate.shape[1]))
    for number, place, token in _sent(topk):
        out[token, place] = F.linear(x[token], torch.cat((gate[number], up[number])))
    return out


def _sent(topk: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of each chosen expert, ascending: its number among them, and the places and tokens that are sent to it."""
    for number, expert in enumerate(topk.unique()):
        place, token = torch.where((topk == expert).T)
        yield number, place, token
