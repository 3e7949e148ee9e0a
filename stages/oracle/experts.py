"""Mixtures of experts in numpy float64, and what their bounds are computed from. Twin of svf_torch/experts.py.

Of a choice of experts the float64 value is the one that exact arithmetic makes; `admissible` says which others rounding
could have made. Whatever a run chose, what follows is judged by that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.oracle.bounds import U32
from stages.oracle.decoder import _f32, _linear, _linear_operands, _silu
from stages.spec.stage import Functions

if TYPE_CHECKING:
    from jaxtyping import Float, Int

EXPERT_STAGES: Functions[Callable[..., np.ndarray]] = Functions()
Operands = tuple[Any, ...]
# Below the largest logit by so much a float32 probability is 0, flushed or not: such experts are all alike.
_NOTHING = 87.0


@EXPERT_STAGES
def moe_logits(
    ffn_norm: Float[np.ndarray, "tokens hidden"], weight: Float[np.ndarray, "experts hidden"]
) -> Float[np.ndarray, "tokens experts"]:
    """The router's logits."""
    return _linear(ffn_norm, weight)


@EXPERT_STAGES
def router_probs(router_logits: Float[np.ndarray, "tokens experts"]) -> Float[np.ndarray, "tokens experts"]:
    """Softmax over all experts."""
    logits = router_logits.astype(np.float64)
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


@EXPERT_STAGES
def router_topk(router_probs: Float[np.ndarray, "tokens experts"], *, top_k: int) -> Int[np.ndarray, "tokens topk"]:
    """The experts with the largest probabilities."""
    # of equal ones the first
    return np.argsort(-router_probs, axis=-1, kind="stable")[:, :top_k].astype(np.int32)


@EXPERT_STAGES
def router_weights(
    router_probs: Float[np.ndarray, "tokens experts"],
    router_topk: Int[np.ndarray, "tokens topk"],
    *,
    renormalised: bool,
    dtype: str,
) -> Float[np.ndarray, "tokens topk"]:
    """The chosen experts' probabilities, over their sum where `renormalised`."""
    weights = np.take_along_axis(router_probs.astype(np.float64), _numbers(router_topk), axis=-1)
    return weights / weights.sum(axis=-1, keepdims=True) if renormalised else weights


@EXPERT_STAGES
def expert_gate(
    ffn_norm: Float[np.ndarray, "tokens hidden"],
    router_topk: Int[np.ndarray, "tokens topk"],
    gate: Float[np.ndarray, "chosen moe_intermediate hidden"],
    up: Float[np.ndarray, "chosen moe_intermediate hidden"],
) -> Float[np.ndarray, "tokens topk moe_intermediate"]:
    """gate_proj of ffn_norm."""
    return by_expert(ffn_norm, router_topk, gate, _linear)


@EXPERT_STAGES
def expert_up(
    ffn_norm: Float[np.ndarray, "tokens hidden"],
    router_topk: Int[np.ndarray, "tokens topk"],
    gate: Float[np.ndarray, "chosen moe_intermediate hidden"],
    up: Float[np.ndarray, "chosen moe_intermediate hidden"],
) -> Float[np.ndarray, "tokens topk moe_intermediate"]:
    """up_proj of ffn_norm."""
    return by_expert(ffn_norm, router_topk, up, _linear)


@EXPERT_STAGES
def expert_silu(
    expert_gate: Float[np.ndarray, "tokens topk moe_intermediate"],
) -> Float[np.ndarray, "tokens topk moe_intermediate"]:
    """expert_gate * sigmoid(expert_gate)."""
    return _silu(expert_gate)


@EXPERT_STAGES
def expert_swigl(
    expert_silu: Float[np.ndarray, "tokens topk moe_intermediate"],
    expert_up: Float[np.ndarray, "tokens topk moe_intermediate"],
) -> Float[np.ndarray, "tokens topk moe_intermediate"]:
    """expert_silu * expert_up."""
    return expert_silu.astype(np.float64) * expert_up.astype(np.float64)


@EXPERT_STAGES
def expert_out(
    expert_swigl: Float[np.ndarray, "tokens topk moe_intermediate"],
    router_topk: Int[np.ndarray, "tokens topk"],
    down: Float[np.ndarray, "chosen hidden moe_intermediate"],
) -> Float[np.ndarray, "tokens topk hidden"]:
    """down_proj of expert_swigl."""
    return by_expert(expert_swigl, router_topk, down, _linear)


@EXPERT_STAGES
def moe_out(
    expert_out: Float[np.ndarray, "tokens topk hidden"],
    router_topk: Int[np.ndarray, "tokens topk"],
    router_weights: Float[np.ndarray, "tokens topk"],
) -> Float[np.ndarray, "tokens hidden"]:
    """The sum of expert_out times router_weights."""
    return _terms(expert_out, router_weights).sum(axis=1)


@EXPERT_STAGES
def shared_gate(
    ffn_norm: Float[np.ndarray, "tokens hidden"], weight: Float[np.ndarray, "shared_intermediate hidden"]
) -> Float[np.ndarray, "tokens shared_intermediate"]:
    """The shared expert's gate_proj."""
    return _linear(ffn_norm, weight)


@EXPERT_STAGES
def shared_up(
    ffn_norm: Float[np.ndarray, "tokens hidden"], weight: Float[np.ndarray, "shared_intermediate hidden"]
) -> Float[np.ndarray, "tokens shared_intermediate"]:
    """The shared expert's up_proj."""
    return _linear(ffn_norm, weight)


@EXPERT_STAGES
def shared_silu(
    shared_gate: Float[np.ndarray, "tokens shared_intermediate"],
) -> Float[np.ndarray, "tokens shared_intermediate"]:
    """shared_gate * sigmoid(shared_gate)."""
    return _silu(shared_gate)


@EXPERT_STAGES
def shared_swigl(
    shared_silu: Float[np.ndarray, "tokens shared_intermediate"],
    shared_up: Float[np.ndarray, "tokens shared_intermediate"],
) -> Float[np.ndarray, "tokens shared_intermediate"]:
    """shared_silu * shared_up."""
    return shared_silu.astype(np.float64) * shared_up.astype(np.float64)


@EXPERT_STAGES
def shared_out(
    shared_swigl: Float[np.ndarray, "tokens shared_intermediate"],
    weight: Float[np.ndarray, "hidden shared_intermediate"],
) -> Float[np.ndarray, "tokens hidden"]:
    """The shared expert's down_proj."""
    return _linear(shared_swigl, weight)


@EXPERT_STAGES
def shared_score(
    ffn_norm: Float[np.ndarray, "tokens hidden"], weight: Float[np.ndarray, "one hidden"]
) -> Float[np.ndarray, "tokens one"]:
    """How much of the shared expert a token gets, before the sigmoid."""
    return _linear(ffn_norm, weight)


@EXPERT_STAGES
def shared_weight(shared_score: Float[np.ndarray, "tokens one"]) -> Float[np.ndarray, "tokens one"]:
    """sigmoid(shared_score)."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-shared_score.astype(np.float64)))


@EXPERT_STAGES
def shared_gated(
    shared_weight: Float[np.ndarray, "tokens one"], shared_out: Float[np.ndarray, "tokens hidden"]
) -> Float[np.ndarray, "tokens hidden"]:
    """shared_weight * shared_out."""
    return shared_weight.astype(np.float64) * shared_out.astype(np.float64)


@EXPERT_STAGES
def moe_and_shared(
    moe_out: Float[np.ndarray, "tokens hidden"], shared_gated: Float[np.ndarray, "tokens hidden"]
) -> Float[np.ndarray, "tokens hidden"]:
    """moe_out + shared_gated."""
    return moe_out.astype(np.float64) + shared_gated.astype(np.float64)


def sent(topk: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Of each chosen expert, ascending: its number among them, and the tokens and places that are sent to it."""
    for number, expert in enumerate(np.unique(topk)):
        token, place = np.nonzero(topk == expert)
        yield number, token, place


def admissible(probs: np.ndarray, topk: np.ndarray, room: np.ndarray | float = 0.0) -> np.ndarray:
    """Whether each token's experts, `[tokens, topk]`, are a choice that rounding could make of `probs`; `[tokens]`.

    They are if there are probabilities as near to these as float32 softmax may err, and by `room` where they were
    computed and not recorded, of which they are the largest: every one chosen reaches, at its upper end, every one left
    out at its lower end. Exact, since one set of probabilities takes all these ends at once.
    """
    topk, count = _numbers(topk), probs.shape[-1]
    ok = ((topk >= 0) & (topk < count)).all(axis=-1)
    inside = np.zeros(probs.shape, bool)
    np.put_along_axis(inside, np.clip(topk, 0, count - 1), True, axis=-1)
    p, nothing = probs.astype(np.float64), np.exp(-_NOTHING)
    logits = np.log(np.maximum(p, nothing))
    off = U32 * (logits.max(axis=-1, keepdims=True) - logits + 4)
    low, high = (np.log(np.clip(p + end, nothing, 1.0)) for end in (-room, room))
    least = np.where(inside, high + off, np.inf).min(axis=-1)
    most = np.where(inside, -np.inf, low - off).max(axis=-1)
    return ok & (least >= most) & (inside.sum(axis=-1) == topk.shape[-1])


def by_expert(
    x: np.ndarray,
    topk: np.ndarray,
    weights: np.ndarray,
    function: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    """`function` of the rows sent to each expert and its weight; `[tokens, topk, out]`, float64."""
    out = np.zeros((*topk.shape, weights.shape[1]))
    for number, token, place in sent(topk):
        rows = x[token] if x.ndim == 2 else x[token, place]
        out[token, place] = function(rows, weights[number])
    return out


def _terms(y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return y.astype(np.float64) * weights.astype(np.float64)[..., None]


def _numbers(topk: np.ndarray) -> np.ndarray:
    return topk.astype(np.int64)


def _expert_operands(x: np.ndarray, topk: np.ndarray, weights: np.ndarray) -> Operands:
    """The factors of each expert's product, and where its rows stand."""
    factors = []
    for number, token, place in sent(topk):
        rows = x[token] if x.ndim == 2 else x[token, place]
        factors.append((token, place, _f32(rows), _f32(weights[number]).T))
    return (factors,)


def _share_operands(probs: np.ndarray, topk: np.ndarray, *, renormalised: bool, dtype: str) -> Operands:
    """How far below the largest each chosen probability's logit is, and whether they are divided by their sum."""
    wide = np.maximum(probs.astype(np.float64), np.exp(-_NOTHING))
    of = np.take_along_axis(wide, _numbers(topk), axis=-1)
    return np.log(wide.max(axis=-1, keepdims=True) / of), renormalised


def _summed_in(y: np.ndarray) -> np.dtype:
    """What terms and sums may be rounded to; of an input that was not recorded, which is float64, float32."""
    return y.dtype if y.dtype.itemsize < 8 else np.dtype(np.float32)


OPERANDS: Mapping[str, Callable[..., Operands]] = MappingProxyType(
    {
        "moe_logits": _linear_operands,
        "router_probs": lambda logits: (logits.astype(np.float64),),
        "router_topk": lambda probs, *, top_k: (),
        "router_weights": _share_operands,
        "expert_gate": lambda x, topk, gate, up: _expert_operands(x, topk, gate),
        "expert_up": lambda x, topk, gate, up: _expert_operands(x, topk, up),
        "expert_silu": lambda gate: (gate.astype(np.float64),),
        "expert_out": _expert_operands,
        "moe_out": lambda y, _topk, weights: (
            _terms(y, weights),
            y.dtype if y.dtype.itemsize < 8 else np.dtype(np.float32),
        ),
        "shared_gate": _linear_operands,
        "shared_up": _linear_operands,
        "shared_silu": lambda gate: (gate.astype(np.float64),),
        "shared_out": _linear_operands,
        "shared_score": _linear_operands,
        "shared_weight": lambda _score: (),
    }
)
