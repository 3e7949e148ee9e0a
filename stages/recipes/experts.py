"""Experts: the router's distribution and shares, each expert's product, and their sum; and what ports get wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from stages.oracle.bounds import TINY, U32
from stages.recipes.at import At, Unknown
from stages.recipes.elementwise import sigmoid
from stages.recipes.product import summed
from stages.recipes.recipe import FIT, Kind, Mod, equivalent, narrower, prescribed
from stages.recipes.value import Value, nearest, point, total
from stages.spec.noise import Noise


def distribution(
    at: At, *, chain: str = "float32", instead: str = "", temperature: float = 1.0, axis: int = -1
) -> Value | None:
    """Softmax over all experts; `instead` another function of the logits."""
    x = at.input(0) * (1 / temperature)
    if instead == "sigmoid":
        return x.map(sigmoid).soft(8)
    if instead == "logits":
        return x
    d = x - x.mid.max(axis=axis, keepdims=True)
    # u of the difference, which is an exponent, and of the product with log2(e).
    wide = d.off(U32 * (2 * np.abs(d.mid) + 4)) if chain == "float32" else at.stored(d, "difference")
    e = wide.map(np.exp)
    e = e.soft(1) if chain == "float32" else at.stored(e, "exponential")
    if axis != -1:
        e = e.map(lambda a: a.swapaxes(-1, -2))
    p = (e / total(e)).soft(1)
    p = p if axis == -1 else p.map(lambda a: a.swapaxes(-1, -2))
    return p if chain == "float32" else at.stored(p, "quotient")


DISTRIBUTION = Kind(
    "distribution",
    distribution,
    (
        prescribed("in float32", who="transformers (ran)"),
        narrower("difference, exponential and quotient each rounded to the activations' dtype", chain="narrow"),
    ),
    (
        Mod("sigmoid of the logits, not softmax", {"instead": "sigmoid"}),
        Mod("the logits themselves: the softmax is missing", {"instead": "logits"}),
        Mod("softmax runs over the tokens, not over the experts", {"axis": 0}),
        Mod("as if the logits were divided by {fit:.9g} before the softmax", {"temperature": FIT}),
    ),
    doc="exp(l - max) / sum over all experts, in float32 whatever the model's dtype.",
)


def shares(
    at: At, *, over: str = "own", more: float = 0.0, of: str = "probs", scaled: float = 1.0, rotated: int = 0
) -> Value | None:
    """The chosen experts' probabilities, divided by their sum or not; `of` the logits, or their sigmoid, instead."""
    numbers = at.whole(1).mid.astype(np.int64)
    source = at.input(0)
    if of != "probs":
        logits = at.maker(at.stage.inputs[0]).input(0)
        source = logits if of == "logits" else logits.map(sigmoid).soft(8)
    w = source.map(lambda a: np.take_along_axis(a, numbers, axis=-1))
    renormalised = at.options["renormalised"] if over == "own" else over == "sum"
    if over != "own" and renormalised == at.options["renormalised"]:
        raise Unknown("the model's own way")
    if renormalised:
        w = w.soft(2 + w.mid.shape[-1] / 2)
        w = (w / (total(w) + more)).soft(1)
    w = w * scaled
    if rotated:
        w = w.map(lambda a: np.roll(a, rotated, axis=-1))
    # The recorded probabilities are rounded; who takes the exponential again differs by what that errs.
    below = np.log(np.maximum(at.whole(0).mid.max(axis=-1, keepdims=True), TINY) / np.maximum(w.mid, TINY))
    return w.off(U32 * np.abs(w.mid) * np.clip(below, 0, 90)) if of == "probs" else w


SHARES = Kind(
    "shares",
    shares,
    (prescribed("of the recorded probabilities, in float32, cast", who="transformers (ran)"),),
    (
        Mod("not divided by their sum: norm_topk_prob is true", {"over": "none"}),
        Mod("divided by their sum: norm_topk_prob is false", {"over": "sum"}),
        Mod("the logits as weights", {"of": "logits", "over": "none"}),
        Mod("the sigmoid of the logits as weights", {"of": "sigmoid"}),
        *(Mod(f"{eps:g} is added to their sum", {"more": eps}) for eps in (1e-6, 1e-9, 1e-20)),
        Mod("each place has the weight of the one before it", {"rotated": 1}),
    ),
    doc="The chosen experts' probabilities, over their sum where norm_topk_prob says so, cast to the run's dtype.",
)


def experts(
    at: At, *, weight: str = "own", shift: int = 0, turned: bool = False, interleaved: bool = False, slot: int = 0
) -> Value | None:
    """x W^T by the expert of each place; `shift`: by the one after it, where that was chosen too."""
    names = at.stage.params
    own = {"expert_gate": 0, "expert_up": 1}.get(at.stage.function, 0)
    if weight == "other" and len(names) < 2:
        raise Unknown("two weights")
    stack = at.weight(names[1 - own if weight == "other" else own])
    if interleaved:
        stack = _interleaved(at, own)
    if turned:
        if stack.shape[1] != stack.shape[2]:
            raise Unknown("square experts")
        stack = stack.swapaxes(1, 2)
    topk = at.whole(1).mid.astype(np.int64)
    x = at.input(0)
    if x.mid.ndim == 2:
        x = x.map(lambda a: np.repeat(a[:, None], topk.shape[1], axis=1))
    number = _shifted(topk, shift)
    if slot:
        number = np.roll(number, slot, axis=1)
    lo, mid, hi = (np.zeros((*topk.shape, stack.shape[1])) for _ in range(3))
    for one in np.unique(number):
        at_ = np.nonzero(number == one)
        y = summed(at, _taken(x, at_), point(stack[one].T), at.lam(Noise.EXPERTS))
        lo[at_], mid[at_], hi[at_] = y.lo, y.mid, y.hi
    return Value(lo, mid, hi)


def _taken(x: Value, at: Any) -> Value:
    return x.map(lambda a: a[at])


def _shifted(topk: np.ndarray, shift: int) -> np.ndarray:
    """Which of the chosen experts computes each place; of the last one the one after it is the first."""
    chosen = np.unique(topk)
    number = np.searchsorted(chosen, topk) + shift
    inside = (number >= 0) & (number < len(chosen))
    number = number % len(chosen)
    if (chosen[number] != topk + shift)[inside].any():
        raise Unknown("an expert that no token is sent to")
    return np.asarray(number)


def _interleaved(at: At, own: int) -> np.ndarray:
    """Rows of a packed gate and up that were taken in turn."""
    names = at.stage.params
    if len(names) < 2:
        raise Unknown("two weights")
    packed = np.concatenate([at.weight(name) for name in names], axis=1)
    return packed[:, own::2]


EXPERTS = Kind(
    "experts",
    experts,
    (prescribed("summed in float32, rounded once", who="transformers, one expert after the other (ran)"),),
    (
        Mod("gate and up are swapped", {"weight": "other"}),
        Mod("rows of gate and up are taken in turn, not one half after the other", {"interleaved": True}),
        Mod("each place has the expert after its own", {"shift": 1}),
        Mod("each place has the expert before its own", {"shift": -1}),
        Mod("each place has the expert of the one before it", {"slot": 1}),
        Mod("the experts' matrices are transposed", {"turned": True}),
    ),
    doc="A product with the weight of the expert that each place of a token has. Engines compute it expert after "
    "expert, as one grouped product, or with the tokens sorted: the sums are those of a product.",
)


def combined(at: At, *, way: str = "experts", change: str = "") -> Value | None:
    """The sum over a token's experts of weight times output; `way`: rounded at each of them, or once."""
    y, w = at.input(0), at.input(2).map(lambda a: a[..., None])
    topk = at.whole(1).mid.astype(np.int64)
    terms = _changed(y, w, topk, change)
    if way == "once":
        t = terms.soft(1)
        out = Value(t.lo.sum(axis=1), t.mid.sum(axis=1), t.hi.sum(axis=1))
        return out.off(U32 * t.mid.shape[1] * np.abs(t.mid).sum(axis=1))
    terms = at.stored(terms, "product")
    rows, out = np.arange(len(topk))[:, None], point(np.zeros((len(topk), y.mid.shape[-1])))
    order = np.argsort(topk, axis=1, kind="stable")
    for place in range(topk.shape[1]):
        out = at.stored(out + _taken(terms, (rows[:, 0], order[:, place])), "sum")
    return out


def _changed(y: Value, w: Value, topk: np.ndarray, change: str) -> Value:
    """The terms that are summed, as a wrong program has them."""
    if change == "unweighted":
        return y
    if change == "sorted weights":  # of experts that were sorted, and weights that were not
        order = np.argsort(np.argsort(topk, axis=1, kind="stable"), axis=1)
        return y * w.map(lambda a: np.take_along_axis(a, order[..., None], axis=1))
    if change == "last missing":
        return (y * w).map(lambda a: a[:, :-1])
    if change == "first alone":
        return (y * w).map(lambda a: a[:, :1])
    if change == "mean":
        return y * (1 / topk.shape[1])
    if change == "squared":
        return y * (w * w)
    return y * w


_CHANGES = {
    "not weighted: the experts' plain sum": "unweighted",
    "the experts' mean, not weighted": "mean",
    "the weights are in the experts' order, not in the choice's": "sorted weights",
    "the last of a token's experts is missing": "last missing",
    "only the first of a token's experts": "first alone",
    "weighted twice": "squared",
}
COMBINED = Kind(
    "combined",
    combined,
    (
        prescribed("expert after expert, each product and each sum rounded", who="transformers, eager (ran)"),
        equivalent("summed in float32, rounded once", who="transformers, grouped_mm (read)", way="once"),
    ),
    tuple(Mod(f"{words}", {"way": "once", "change": change}) for words, change in _CHANGES.items()),
    doc="The sum of the chosen experts' outputs times their weights. Eager loops add expert after expert in the "
    "activations' dtype; grouped kernels sum in float32.",
)


def gate(at: At, *, instead: str = "") -> Value | None:
    """sigmoid of a score."""
    x = at.input(0)
    functions: dict[str, Callable[[np.ndarray], Any]] = {
        "": sigmoid,
        "silu": lambda a: a * sigmoid(a),
        "score": lambda a: a,
        "one": np.ones_like,
        "tanh": np.tanh,
    }
    y = x.map(functions[instead]) if instead in ("", "score", "tanh") else point(functions[instead](x.mid))
    mid = nearest(y.mid, "float32")
    return Value(y.lo, mid, y.hi).off(8 * U32 * np.abs(mid) + TINY)


SIGMOID = Kind(
    "sigmoid",
    gate,
    (prescribed("in float32, rounded once", who="torch F.sigmoid (ran)"),),
    (
        Mod("the score itself: the sigmoid is missing", {"instead": "score"}),
        Mod("1: the gate is missing", {"instead": "one"}),
        Mod("silu instead of sigmoid", {"instead": "silu"}),
        Mod("tanh instead of sigmoid", {"instead": "tanh"}),
    ),
    by_rows=True,
    doc="1 / (1 + exp(-x)).",
)


def choice(at: At, *, way: str = "largest") -> Value | None:
    """The experts that a token is sent to, the likeliest first."""
    p, k = at.whole(0).mid, at.options["top_k"]
    order = np.argsort(p if way == "smallest" else -p, axis=-1, kind="stable")
    start = {"after the first": 1}.get(way, 0)
    chosen = order[:, start : start + k]
    return point((chosen + {"next": 1, "previous": -1}.get(way, 0)) % p.shape[-1])


CHOICE = Kind(
    "choice",
    choice,
    (prescribed("the largest", who="torch.topk, lax.top_k (ran)"),),
    (
        Mod("the experts with the smallest probabilities", {"way": "smallest"}),
        Mod("the largest is left out", {"way": "after the first"}),
        Mod("each expert's number is one too large", {"way": "next"}),
        Mod("each expert's number is one too small", {"way": "previous"}),
    ),
    doc="The top k of the probabilities. Of equal ones frameworks choose different experts, and of nearly equal ones "
    "rounding decides: any choice that rounding could have made is right, a tie.",
)
