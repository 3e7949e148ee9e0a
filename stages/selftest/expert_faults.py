"""Faults in mixtures of experts, taken from what ports did: of the router, of the choice, of experts and their sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from stages.selftest.fault import Fault, Load, bfloat16, float32
from stages.selftest.making import Plant, another, narrow_first, of_operands, then

# Specimens: experts alone, weights renormalised; and with a shared one, weights as they are.
EXPERTS = ("qwen3-moe", "qwen3-moe-bf16", "qwen2-moe", "qwen2-moe-bf16")
RENORMALISED, SHARED = EXPERTS[:2], EXPERTS[2:]
_WIDE = ("qwen3-moe", "qwen2-moe")
PRODUCTS = ("expert_gate", "expert_up", "expert_out")
# A name, where it is planted, how, words that must be said, and in which specimens.
Row = tuple[str, tuple[str, ...], Plant, str, tuple[str, ...]]


def _softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return np.asarray(e / e.sum(axis=axis, keepdims=True))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))


def _gelu(x: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))), np.float32)


def _of_chosen(p: np.ndarray, topk: np.ndarray) -> np.ndarray:
    return np.take_along_axis(p, topk.astype(np.int64), axis=-1)


def _over_sum(w: np.ndarray, more: float = 0.0) -> np.ndarray:
    return np.asarray(w / (w.sum(axis=-1, keepdims=True) + np.float32(more)), np.float32)


def _router() -> Iterator[Row]:
    probs, weights = ("router_probs",), ("router_weights",)
    yield "sigmoid for the router's softmax", probs, another(_sigmoid), "sigmoid of the logits", EXPERTS
    yield "the router's softmax missing", probs, another(lambda x: x), "the softmax is missing", EXPERTS
    yield "the router's softmax over tokens", probs, another(lambda x: _softmax(x, 0)), "over the tokens", EXPERTS
    yield "router temperature 2", probs, another(lambda x: _softmax(x / 2)), "divided by 2 before", EXPERTS
    narrow = narrow_first(bfloat16)
    yield "the router in bfloat16", ("router_logits",), narrow, "bfloat16", _WIDE
    bare = another(_of_chosen)
    yield "weights not renormalised", weights, bare, "not divided by their sum", RENORMALISED
    summed = another(lambda p, t: _over_sum(_of_chosen(p, t)))
    yield "weights renormalised", weights, summed, "divided by their sum: norm_topk_prob is false", SHARED
    plus = another(lambda p, t: _over_sum(_of_chosen(p, t), 1e-6))
    yield "1e-6 in the weights' sum", weights, plus, "1e-06 is added to their sum", RENORMALISED[:1]
    yield "weights one place late", weights, then(lambda w: np.roll(w, 1, axis=-1)), "the one before it", EXPERTS


def _choices() -> Iterator[Row]:
    topk = ("router_topk",)

    def of_probs(change: Callable[[np.ndarray, int], np.ndarray]) -> Plant:
        return lambda call: change(float32(call.arguments[0]), call.options["top_k"])

    least = of_probs(lambda p, k: np.argsort(p, axis=-1, kind="stable")[:, :k])
    yield "the least likely experts", topk, least, "smallest probabilities", EXPERTS
    second = of_probs(lambda p, k: np.argsort(-p, axis=-1, kind="stable")[:, 1 : k + 1])
    yield "the likeliest expert left out", topk, second, "the largest is left out", EXPERTS
    after = of_probs(lambda p, k: (np.argsort(-p, axis=-1, kind="stable")[:, :k] + 1) % p.shape[-1])
    yield "experts counted from 1", topk, after, "number is one too large", EXPERTS
    yield "the next token's experts", topk, then(lambda t: np.roll(t, -1, axis=0)), "", EXPERTS
    yield "a full expert's tokens to expert 0", topk, then(_capacity), "", EXPERTS


def _capacity(topk: np.ndarray) -> np.ndarray:
    """Of more than four tokens that an expert is sent, the later ones go to the first that the token has not."""
    out, count = topk.astype(np.int64), dict.fromkeys(range(int(topk.max()) + 1), 0)
    for token, place in np.ndindex(*out.shape):
        expert = int(out[token, place])
        count[expert] += 1
        if count[expert] > 4:
            out[token, place] = next(e for e in count if e not in out[token])
    return out


def _products() -> Iterator[Row]:
    swapped = of_operands(lambda x, t, gate, up: (x, t, up, gate))
    yield "experts' gate and up swapped", PRODUCTS[:2], swapped, "gate and up are swapped", EXPERTS
    yield "packed rows taken in turn", PRODUCTS[:2], of_operands(_in_turn), "taken in turn", EXPERTS
    yield "experts' matrices transposed", PRODUCTS, of_operands(_turned), "matrices are transposed", EXPERTS
    yield "the expert after its own", PRODUCTS, of_operands(_neighbour(-1)), "the expert after its own", EXPERTS
    yield "the expert before its own", PRODUCTS, of_operands(_neighbour(1)), "the expert before its own", EXPERTS
    gelu = another(_gelu)
    yield "gelu in the experts", ("expert_silu", "shared_silu"), gelu, "gelu", EXPERTS
    alone = another(lambda silu, up: silu)
    yield "experts without up", ("expert_swigl", "shared_swigl"), alone, "the product with up is missing", EXPERTS


def _in_turn(x: np.ndarray, topk: np.ndarray, gate: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, ...]:
    packed = np.concatenate((gate, up), axis=1)
    return x, topk, packed[:, ::2], packed[:, 1::2]


def _turned(x: np.ndarray, topk: np.ndarray, *weights: np.ndarray) -> tuple[np.ndarray, ...]:
    return x, topk, *(w.swapaxes(1, 2) for w in weights)


def _neighbour(by: int) -> Callable[..., tuple[np.ndarray, ...]]:
    """The experts' weights moved on by one: all are chosen in these specimens."""
    return lambda x, topk, *weights: (x, topk, *(np.roll(w, by, axis=0) for w in weights))


def _sums() -> Iterator[Row]:
    out = ("moe_out",)

    def of_terms(change: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Plant:
        return another(lambda y, topk, w: change(y, topk, w[..., None]))

    yield "experts not weighted", out, of_terms(lambda y, _, w: y.sum(axis=1)), "not weighted", EXPERTS
    yield "the experts' mean", out, of_terms(lambda y, _, w: y.mean(axis=1)), "the experts' mean", EXPERTS
    yield "weights in the experts' order", out, of_terms(_sorted), "in the experts' order", EXPERTS
    less = of_terms(lambda y, _, w: (y * w)[:, :-1].sum(axis=1))
    yield "the last expert missing", out, less, "the last of a token's experts is missing", EXPERTS
    yield "the first expert alone", out, of_terms(lambda y, _, w: (y * w)[:, 0]), "only the first", EXPERTS
    yield "experts weighted twice", out, of_terms(lambda y, _, w: (y * w * w).sum(axis=1)), "weighted twice", EXPERTS


def _sorted(y: np.ndarray, topk: np.ndarray, w: np.ndarray) -> np.ndarray:
    order = np.argsort(topk, axis=1, kind="stable")[..., None]
    return np.asarray((np.take_along_axis(y, order, axis=1) * w).sum(axis=1))


def _shared() -> Iterator[Row]:
    gated, weight, whole = ("shared_gated",), ("shared_weight",), ("ffn_out",)
    yield "the shared gate missing", gated, another(lambda g, y: y), "the gate is missing", SHARED
    yield "the shared gate without sigmoid", weight, another(lambda s: s), "the sigmoid is missing", SHARED
    yield "the shared gate by tanh", weight, another(np.tanh), "tanh instead of sigmoid", SHARED
    yield "the shared gate by silu", weight, another(lambda s: s * _sigmoid(s)), "silu instead of sigmoid", SHARED
    yield "the shared expert missing", whole, another(lambda x, y: x), "the shared expert is missing", SHARED
    yield "the shared expert twice", whole, another(lambda x, y: x + 2 * y), "added twice", SHARED
    narrow = narrow_first(bfloat16)
    yield "the shared expert in bfloat16", ("shared_gate", "shared_up"), narrow, "bfloat16", SHARED[:1]
    yield "the shared output in bfloat16", ("shared_out", "shared_score"), narrow, "bfloat16", SHARED[:1]
    yield "the shared expert alone", whole, another(lambda x, y: y), "only the shared expert", SHARED


def _other_expert(load: Load) -> np.ndarray:
    """The same matrix of the next expert."""
    return load.read(load.name.replace(".experts.1.", ".experts.2.")).copy()


def _faults() -> Iterator[Fault]:
    for rows in (_router, _choices, _products, _sums, _shared):
        for name, at, plant, says, on in rows():
            yield Fault(name, at, f"named: {says}" if says else "", plant, on=on, says=says or None, must=bool(says))
    names = tuple(f"mlp.experts.1.{name}_proj.weight" for name in ("gate", "down"))
    yield Fault("one matrix of another expert", names, "a loop off by one", load=_other_expert, on=EXPERTS)
    yield Fault("the router of another layer", ("mlp.gate.weight",), "", load=Load.of_neighbour, on=EXPERTS)


EXPERT_FAULTS: tuple[Fault, ...] = tuple(_faults())
