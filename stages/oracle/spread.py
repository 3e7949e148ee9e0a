"""How much right programs differ in a value that they compute through stages nobody recorded: variances, carried on.

First order, element by element, with what errs as one factor of a whole row apart from the rest: the root of a norm
is common to its row, is divided out by the next norm, and moves a product as a factor. Each hidden stage adds what it
may err itself: in float32 what right kernels do, in 16 bits a rounding of the stored format, which a program may leave
out. docs/findings/spans.md has what right programs did, in units of these variances.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from stages.oracle.bounds import BOUNDS, LAMBDA, RMS, U32, half_unit, rounding_unit
from stages.oracle.components import _v_transposed
from stages.oracle.decoder import _repeated, attn_softmax
from stages.oracle.experts import by_expert, router_probs
from stages.spec.noise import Noise
from stages.spec.stage import Stage

Array = np.ndarray | float
# A choice is sure if so many standard deviations do not change it.
SURE_CHOICE = 20.0
# A rounding to a format of unit roundoff u errs by 0.43 u in RMS, relative to the value.
_TYPICAL = 0.43


@dataclass(frozen=True)
class Spread:
    """Variances of a value: of each element by itself, and, relative to the value, of a factor common to its row.

    `of_log` is of scores, less what all keys of a query share, and of the logarithms of probabilities before these are
    normalised: both move together, which `own` does not say. `added` is what the stage itself has added to `own`.
    """

    own: Array = 0.0
    row: Array = 0.0
    of_log: np.ndarray | None = None
    added: Array = 0.0

    @property
    def none(self) -> bool:
        """Whether the value was recorded: no right program differs in it."""
        return np.ndim(self.own) == 0 and np.ndim(self.row) == 0 and self.own == 0.0 == self.row

    def variance(self, value: np.ndarray) -> np.ndarray:
        """The variance of each element of `value`."""
        return np.broadcast_to(np.asarray(self.own + self.row * value * value), value.shape)

    def plus(self, added: Spread) -> Spread:
        """With what the stage itself errs."""
        return replace(self, own=self.own + added.own, row=self.row + added.row, added=added.own)

    def last(self, rows: int) -> Spread:
        """Of the last rows."""
        own, row = (error[-rows:] if isinstance(error, np.ndarray) else error for error in (self.own, self.row))
        return Spread(own, row)


RECORDED = Spread()


@dataclass(frozen=True)
class Setting:
    """What rules need beside values: the stage's options, the run's dtype, and which tokens are equal, as numbers."""

    options: Mapping[str, Any]
    dtype: np.dtype
    tokens: np.ndarray | None = None

    @property
    def narrow(self) -> bool:
        """Whether the run rounds to 16 bits."""
        return self.dtype.itemsize < 4

    def rounding(self, x: np.ndarray) -> Array:
        """The variance of a rounding inside a stage, which may be done or not; in float32 it is in the stage's own."""
        return half_unit(x, self.dtype) ** 2 / 3 if self.narrow else 0.0


Rule = Callable[[Sequence[np.ndarray], Sequence[Spread], Sequence[np.ndarray], Setting], Spread]


def carried(stage: Stage, arguments: Sequence[np.ndarray], spreads: Sequence[Spread], setting: Setting) -> Spread:
    """The spread of a stage's value that comes of its inputs', and of roundings that may have been done inside.

    `arguments` are the float64 inputs, then the params, in declared order.
    """
    count = len(stage.inputs)
    with np.errstate(all="ignore"):  # an error too large for its stage is infinite
        return RULES[stage.function](arguments[:count], spreads, arguments[count:], setting)


def own(
    kind: Noise, operands: tuple[Any, ...], value: np.ndarray, dtype: np.dtype, lambdas: Mapping[Noise, float] = LAMBDA
) -> Spread:
    """What a stage of that kind errs by itself, stored in `dtype`; `operands` are those of its bound."""
    if kind is Noise.CHOICE:
        return RECORDED
    stored = half_unit(value, dtype) ** 2 / 3
    if kind is Noise.EXACT:
        return Spread(stored)
    # Of a device that was calibrated, kernels may err more.
    typical = RMS.get(kind, 1.0) * lambdas[kind] / LAMBDA[kind]
    if kind is Noise.RMS_NORM:  # the root is common to the row, two products are not
        width = operands[0].shape[-1]
        row = (typical * U32 * (np.sqrt(width) / 8 + 6)) ** 2
        return Spread((U32 * value) ** 2 / 4 + (stored if dtype.itemsize < 4 else 0.0), row)
    # A kind of which no RMS was measured errs by its scale at most.
    square = (typical * BOUNDS[kind][0](1.0, *operands, value)) ** 2
    if dtype.itemsize == 4:
        return Spread(square)
    # What is exactly 0 or 1 is so in every format: a probability of one key, or of none.
    exact = (value == 0) | (value == 1) if kind is Noise.SOFTMAX else False
    return Spread(np.where(exact, 0.0, square + stored))


# -- rules --------------------------------------------------------------------------------------------------------


def _summed(x: Sequence[np.ndarray], s: Sequence[Spread], _p: Sequence[np.ndarray], _setting: Setting) -> Spread:
    return Spread(s[0].variance(x[0]) + s[1].variance(x[1]))


def _multiplied(x: Sequence[np.ndarray], s: Sequence[Spread], _p: Sequence[np.ndarray], _setting: Setting) -> Spread:
    """Factors common to a row may be the same ones: their amplitudes add."""
    (a, b), (of_a, of_b) = x, s
    own = b * b * of_a.own + a * a * of_b.own + of_a.own * of_b.own
    return Spread(own, (np.sqrt(of_a.row) + np.sqrt(of_b.row)) ** 2)


def _product(_x: Sequence[np.ndarray], s: Sequence[Spread], params: Sequence[np.ndarray], _setting: Setting) -> Spread:
    """(W * W) times the variances, by float32 products, ample for a variance; brought to 1 first, lest they vanish."""
    if np.ndim(s[0].own) == 0:
        return Spread(0.0, s[0].row)
    top = float(np.max(s[0].own, initial=0.0)) or 1.0
    if not np.isfinite(top):
        return Spread(np.inf)
    scaled = np.asarray(s[0].own / top, np.float32)
    weights = (w.astype(np.float32, copy=False) for w in params if w.ndim == 2)
    return Spread(np.concatenate([scaled @ (w * w).T for w in weights], axis=-1).astype(np.float64) * top, s[0].row)


def _angle(x: Sequence[np.ndarray], s: Sequence[Spread], params: Sequence[np.ndarray], _setting: Setting) -> Spread:
    positions = params[0].astype(np.float64)[:, None]
    return Spread(positions * positions * np.tile(np.broadcast_to(s[0].own, x[0].shape), 2))


def _wave(_x: Sequence[np.ndarray], s: Sequence[Spread], _p: Sequence[np.ndarray], setting: Setting) -> Spread:
    return Spread(np.minimum(s[0].own, 1.0) * float(setting.options["attention_scaling"]) ** 2)


def _normed(part: int | None) -> Rule:
    """n = x / root: an element moves by its own error less what it moves the root by; the root moves all of the row.

    A factor common to the row is divided out, but for the share that eps has in the root.
    """

    def rule(x: Sequence[np.ndarray], s: Sequence[Spread], params: Sequence[np.ndarray], setting: Setting) -> Spread:
        a, spread = x[0], s[0]
        if part is not None:
            a, spread = by_heads(a, part, setting.options), _by_heads(spread, x[0], part, setting.options)
        weight, width = params[0].astype(np.float64), a.shape[-1]
        square = np.mean(a * a, axis=-1, keepdims=True)
        root2 = square + setting.options["eps"]
        n2 = a * a / root2
        moved = spread.own / root2
        inside = setting.rounding(np.sqrt(n2))
        own = weight * weight * (moved * np.maximum(1 - n2 / width, 0) ** 2 + inside)
        row = np.sum(n2 * moved, axis=-1, keepdims=True) / width**2 + spread.row * (1 - square / root2) ** 2
        return Spread(own, row)

    return rule


def _turned(part: int) -> Rule:
    """Of x cos + x' sin: each product moves by what its factors do."""

    def rule(x: Sequence[np.ndarray], s: Sequence[Spread], _p: Sequence[np.ndarray], setting: Setting) -> Spread:
        q, spread = by_heads(x[0], part, setting.options), _by_heads(s[0], x[0], part, setting.options)
        half = q.shape[-1] // 2
        other = np.roll(q, half, axis=-1)
        cos, sin = (table[:, None] for table in x[1:])
        of_cos, of_sin = (np.asarray(t.own)[:, None] if np.ndim(t.own) else t.own for t in s[1:])
        own = q * q * of_cos + other * other * of_sin
        own = own + setting.rounding(q * cos) + setting.rounding(other * sin)
        if np.ndim(spread.own):
            own = own + cos * cos * spread.own + sin * sin * np.roll(spread.own, half, axis=-1)
        return Spread(own, spread.row)

    return rule


def _scores(x: Sequence[np.ndarray], s: Sequence[Spread], _p: Sequence[np.ndarray], setting: Setting) -> Spread:
    """What moves q moves all keys' scores, and softmax sees differences of scores alone: of the mean key it is free.

    Without that a large bias of the keys would hide everything. q and k may be rounded once more, to be scaled.
    """
    (q, k), heads, scale = x, x[0].shape[1], float(setting.options["scaling"])
    q, k = q.swapaxes(0, 1), _repeated(k, heads)
    of_q = np.broadcast_to(np.asarray(s[0].own), x[0].shape).swapaxes(0, 1)
    of_k = _repeated(np.broadcast_to(np.asarray(s[1].own), x[1].shape), heads)
    row_q, row_k = _row(s[0]), _row(s[1])
    row_k = _repeated(row_k, heads) if np.ndim(row_k) == 3 and row_k.shape[1] > 1 else _leading(row_k)
    if setting.narrow:
        unit = (_TYPICAL * rounding_unit(setting.dtype)) ** 2
        of_q, of_k = of_q + unit * q * q, of_k + unit * k * k
    product = q @ k.swapaxes(1, 2)
    scores = product * scale
    p = attn_softmax(scores)
    mean = p @ k
    k2 = (k * k).swapaxes(1, 2)
    by_key = (q * q + of_q) @ of_k.swapaxes(1, 2) * scale**2 + np.swapaxes(row_k, -1, -2) * scores**2
    by_key = by_key + setting.rounding(product) * scale**2
    by_query = of_q @ k2 * scale**2
    centred = by_query - 2 * scale**2 * ((of_q * mean) @ k.swapaxes(1, 2))
    centred = np.maximum(centred + scale**2 * np.sum(of_q * mean * mean, axis=-1, keepdims=True), 0)
    middle = scores - np.sum(p * np.where(p > 0, scores, 0), axis=-1, keepdims=True)
    row_q = _leading(row_q)
    return Spread(by_query + row_q * scores**2 + by_key, of_log=centred + row_q * middle**2 + by_key)


def _row(spread: Spread) -> np.ndarray:
    """The variance of the row's factor as `[tokens, heads or 1, 1]`."""
    row = np.asarray(spread.row, np.float64)
    return row.reshape(1, 1, 1) if row.ndim == 0 else row if row.ndim == 3 else row[:, None]


def _leading(row: np.ndarray) -> np.ndarray:
    """`[tokens, heads, 1]` as `[heads, tokens, 1]`."""
    return row.swapaxes(0, 1)


def _softmax(x: Sequence[np.ndarray], s: Sequence[Spread], _p: Sequence[np.ndarray], setting: Setting) -> Spread:
    """log p moves by its score, with what the score errs itself, less the mean of all scores over p.

    Where a score errs by more than a little, p moves by exp of it, whose second moment is larger; by 1 at most.
    """
    p = attn_softmax(x[0], window=setting.options.get("window"))
    of_log = s[0].of_log + s[0].added if s[0].of_log is not None else s[0].variance(x[0])
    far = np.minimum(of_log, 30.0)
    of_log = np.maximum(of_log, np.expm1(2 * far) - 2 * np.expm1(far / 2))
    of_log = np.where(p > 0, np.minimum(of_log, 1 / np.maximum(p * p, 1e-300)), 0.0)
    mean = np.sum(p * p * of_log, axis=-1, keepdims=True)
    return Spread(p * p * (of_log * np.maximum(1 - 2 * p, 0) + mean), of_log=of_log)


def _weighted(x: Sequence[np.ndarray], s: Sequence[Spread], _p: Sequence[np.ndarray], setting: Setting) -> Spread:
    """Probabilities that move together move the mean of the values only by how far these lie from it.

    Keys of equal tokens err alike, so their amplitudes add, where those of others add as squares.
    """
    p, heads = x[0], len(x[0])
    v = _repeated(by_heads(x[1], 2, setting.options), heads)
    of_v = _by_heads(s[1], x[1], 2, setting.options)
    mean, own = p @ v, np.zeros((heads, p.shape[1], v.shape[-1]))
    alike = _alike(setting.tokens, p.shape[-1])
    if s[0].of_log is not None:
        moved = p * p * s[0].of_log
        own = _about(moved, v, mean)
        if alike is not None:
            grouped = (alike.T @ v) / alike.sum(axis=0)[:, None]
            own = np.maximum(own, _about(((p * np.sqrt(s[0].of_log)) @ alike) ** 2, grouped, mean))
        own = own + np.broadcast_to(np.asarray(s[0].added), p.shape) @ (v * v)
        if setting.narrow:  # rounded before they are divided by their sum, unless there is one key
            unit = (_TYPICAL * rounding_unit(setting.dtype)) ** 2
            own = own + unit * mean * mean * (p.max(axis=-1, keepdims=True) < 1)
    elif not s[0].none:
        own = own + s[0].variance(p) @ (v * v)
    if not of_v.none:
        moved = _repeated(of_v.variance(by_heads(x[1], 2, setting.options)), heads)
        if alike is None:
            own = own + (p * p) @ moved
        else:
            own = own + (p @ alike) ** 2 @ ((alike.T @ moved) / alike.sum(axis=0)[:, None])
    return Spread(own.swapaxes(0, 1).reshape(own.shape[1], -1))


def _about(moved: np.ndarray, v: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """sum of moved * (v - mean)^2 over keys."""
    total = moved.sum(axis=-1, keepdims=True)
    return np.maximum(moved @ (v * v) - 2 * mean * (moved @ v) + mean * mean * total, 0)


def _alike(tokens: np.ndarray | None, keys: int) -> np.ndarray | None:
    """A column for each token, with 1 at its places; None where no token comes twice."""
    if tokens is None or len(tokens) != keys:
        return None
    kinds, number = np.unique(tokens, return_inverse=True)
    return np.eye(len(kinds))[number.reshape(-1)] if len(kinds) < keys else None


def _silu(x: Sequence[np.ndarray], s: Sequence[Spread], _p: Sequence[np.ndarray], _setting: Setting) -> Spread:
    """A factor of the gate's row moves silu by gate * silu', of which silu itself is a factor again."""
    gate = x[0]
    sigmoid = 1 / (1 + np.exp(-gate))
    slope, value = sigmoid * (1 + gate * (1 - sigmoid)), gate * sigmoid
    return Spread(slope * slope * s[0].own + (slope * gate - value) ** 2 * s[0].row, s[0].row)


def _distribution(x: Sequence[np.ndarray], s: Sequence[Spread], _p: Sequence[np.ndarray], _setting: Setting) -> Spread:
    """Softmax over the whole row: as `_softmax`, of which nothing is masked."""
    p, of_log = router_probs(x[0]), s[0].variance(x[0])
    mean = np.sum(p * p * of_log, axis=-1, keepdims=True)
    return Spread(p * p * (of_log * np.maximum(1 - 2 * p, 0) + mean))


def _choice(x: Sequence[np.ndarray], s: Sequence[Spread], _p: Sequence[np.ndarray], setting: Setting) -> Spread:
    """Sure, or not at all: of a token whose last chosen expert another one may displace nothing is known."""
    k, variance = setting.options["top_k"], s[0].variance(x[0])
    order = np.argsort(-x[0], axis=-1, kind="stable")
    p, deviation = (np.take_along_axis(a, order, axis=-1) for a in (x[0], np.sqrt(variance)))
    # the lowest that a chosen one may be, the highest that another may
    low = (p - SURE_CHOICE * deviation)[:, :k].min(axis=-1)
    high = (p + SURE_CHOICE * deviation)[:, k:].max(axis=-1, initial=-np.inf)
    return Spread(np.where(low > high, 0.0, np.inf)[:, None] * np.ones(k))


def _unless_open(own: Array, choice: Spread, value: np.ndarray) -> Array:
    """Nothing is known of what follows an open choice."""
    if choice.none or np.ndim(choice.own) == 0:
        return own
    open_ = np.isinf(choice.own).any(axis=-1)
    return np.where(open_.reshape(-1, *[1] * (value.ndim - 1)), np.inf, np.broadcast_to(own, value.shape))


def _shares(x: Sequence[np.ndarray], s: Sequence[Spread], _p: Sequence[np.ndarray], setting: Setting) -> Spread:
    """w = p / sum p: a probability moves its own share, less what it moves the sum by."""
    number = x[1].astype(np.int64)
    p, of = (np.take_along_axis(a, number, axis=-1) for a in (x[0], s[0].variance(x[0])))
    if not setting.options["renormalised"]:
        return Spread(_unless_open(of, s[1], p))
    w, of_log = p / p.sum(axis=-1, keepdims=True), of / np.maximum(p * p, 1e-300)
    mean = np.sum(w * w * of_log, axis=-1, keepdims=True)
    return Spread(_unless_open(w * w * (of_log * np.maximum(1 - 2 * w, 0) + mean), s[1], w))


def _experts(weight: int) -> Rule:
    """(W * W) times the variances, of each expert's rows."""

    def rule(x: Sequence[np.ndarray], s: Sequence[Spread], params: Sequence[np.ndarray], _: Setting) -> Spread:
        row = s[0].row[:, None] if isinstance(s[0].row, np.ndarray) and x[0].ndim == 2 else s[0].row
        topk, weights = x[1].astype(np.int64), params[weight]
        value = np.zeros((*topk.shape, weights.shape[1]))
        if np.ndim(s[0].own):
            own = np.broadcast_to(s[0].own, x[0].shape)
            value = by_expert(own, topk, weights, lambda v, w: v @ np.square(w.astype(np.float64)).T)
        return Spread(_unless_open(value if np.ndim(s[0].own) else 0.0, s[1], value), row)

    return rule


def _combined(x: Sequence[np.ndarray], s: Sequence[Spread], _p: Sequence[np.ndarray], setting: Setting) -> Spread:
    """Each term moves by what its factors do; in 16 bits each term and each sum of them may be rounded."""
    y, w = x[0], x[2][..., None]
    of_y, of_w = s[0].variance(y), s[2].variance(x[2])[..., None]
    terms = w * y
    own = np.sum(w * w * of_y + y * y * of_w + of_y * of_w, axis=1)
    if setting.narrow:
        result, squares = terms.sum(axis=1), np.sum(terms * terms, axis=1)
        unit = (_TYPICAL * rounding_unit(setting.dtype)) ** 2
        own = own + unit * (squares + y.shape[1] * (squares + result * result))
    return Spread(_unless_open(own, s[1], own))


def _sigmoid(x: Sequence[np.ndarray], s: Sequence[Spread], _p: Sequence[np.ndarray], _setting: Setting) -> Spread:
    value = 1 / (1 + np.exp(-x[0]))
    return Spread(np.square(value * (1 - value)) * s[0].variance(x[0]))


def _scaled_s(x: Sequence[np.ndarray], s: Sequence[Spread], params: Sequence[np.ndarray], _: Setting) -> Spread:
    """S (1 + z): 1 + z may be rounded to float32 before the product."""
    (z,), singular = x, params[0].astype(np.float64)
    return Spread(singular * singular * (s[0].own + half_unit(1 + z, np.dtype(np.float32)) ** 2 / 3))


def _ratio(x: Sequence[np.ndarray], s: Sequence[Spread], params: Sequence[np.ndarray], _setting: Setting) -> Spread:
    """sum(S) / sum(scaled_s): what moves the sum below moves the quotient as a factor, common to all it multiplies."""
    below = np.sum(x[0])
    ratio = np.sum(params[0], dtype=np.float64) / below
    return Spread(np.reshape(np.sum(np.broadcast_to(s[0].own, x[0].shape)) * (ratio / below) ** 2, 1))


def _columns(_x: Sequence[np.ndarray], s: Sequence[Spread], params: Sequence[np.ndarray], _setting: Setting) -> Spread:
    """A factor of each column, which moves all of it."""
    u = params[0].astype(np.float64)
    return Spread(u * u * s[0].own)


def _contracted(x: Sequence[np.ndarray], s: Sequence[Spread], params: Sequence[np.ndarray], setting: Setting) -> Spread:
    return _product(x, s, [_v_transposed(params[0], setting.options["layout"]).T], setting)


def _oriented(_x: Sequence[np.ndarray], s: Sequence[Spread], _p: Sequence[np.ndarray], setting: Setting) -> Spread:
    turn = np.transpose if setting.options.get("transpose") else np.asarray
    return Spread(turn(s[0].own), turn(s[0].row))


def by_heads(x: np.ndarray, part: int, options: Mapping[str, Any]) -> np.ndarray:
    """q, k or v of their join by heads, `[tokens, heads, head_dim]`; what is by heads already stays."""
    if x.ndim == 3:
        return x
    ends = np.cumsum([options[name] * options["head_dim"] for name in ("heads", "kv_heads")])
    return np.split(x, ends, axis=-1)[part].reshape(len(x), -1, options["head_dim"])


def _by_heads(spread: Spread, x: np.ndarray, part: int, options: Mapping[str, Any]) -> Spread:
    own = by_heads(np.broadcast_to(spread.own, x.shape), part, options) if np.ndim(spread.own) else spread.own
    row = spread.row
    return Spread(own, row[:, None] if isinstance(row, np.ndarray) and row.ndim == 2 else row)


# What a stage with inputs does to their errors: its rule by name, here and in span.py.
STEPS: Mapping[str, str] = MappingProxyType(
    {
        "rope_angle": "angle",
        "rope_cos": "wave",
        "rope_sin": "wave",
        "attn_norm": "norm",
        "qkv_matmul": "product",
        "qkv_bias": "product",
        "q_norm": "norm of queries",
        "k_norm": "norm of keys",
        "q_post_rope": "turned queries",
        "k_post_rope": "turned keys",
        "attn_scores": "scores",
        "attn_softmax": "softmax",
        "attention": "weighted",
        "attn_out": "product",
        "post_attn_residual": "sum",
        "ffn_norm": "norm",
        "ffn_gate": "product",
        "ffn_up": "product",
        "ffn_silu": "silu",
        "ffn_swigl": "elementwise product",
        "ffn_out": "product",
        "post_ffn_residual": "sum",
        "final_norm": "norm",
        "lm_head": "product",
        "moe_logits": "product",
        "router_probs": "distribution",
        "router_topk": "choice",
        "router_weights": "shares",
        "expert_gate": "experts",
        "expert_up": "experts by the second weight",
        "expert_silu": "silu",
        "expert_swigl": "elementwise product",
        "expert_out": "experts",
        "moe_out": "combined",
        "shared_gate": "product",
        "shared_up": "product",
        "shared_silu": "silu",
        "shared_swigl": "elementwise product",
        "shared_out": "product",
        "shared_score": "product",
        "shared_weight": "sigmoid",
        "shared_gated": "elementwise product",
        "moe_and_shared": "sum",
        "scaled_s": "singular values",
        "normalization": "ratio",
        "u_scaled": "columns",
        "matmul_pre_norm": "contraction",
        "adapted_source_f32": "elementwise product",
        "final_f32": "orientation",
        "final_bf16": "orientation",
    }
)
_RULES: Mapping[str, Rule] = {
    "angle": _angle,
    "wave": _wave,
    "norm": _normed(None),
    "product": _product,
    "norm of queries": _normed(0),
    "norm of keys": _normed(1),
    "turned queries": _turned(0),
    "turned keys": _turned(1),
    "scores": _scores,
    "softmax": _softmax,
    "weighted": _weighted,
    "sum": _summed,
    "silu": _silu,
    "elementwise product": _multiplied,
    "distribution": _distribution,
    "choice": _choice,
    "shares": _shares,
    "experts": _experts(0),
    "experts by the second weight": _experts(1),
    "combined": _combined,
    "sigmoid": _sigmoid,
    "singular values": _scaled_s,
    "ratio": _ratio,
    "columns": _columns,
    "contraction": _contracted,
    "orientation": _oriented,
}
RULES: Mapping[str, Rule] = MappingProxyType({stage: _RULES[step] for stage, step in STEPS.items()})
