"""Judging through stages that were not recorded: their float64 values, and what right programs may differ by in them.

A hidden stage errs by its own bound, by what its inputs err, and by a rounding to the run's dtype, which a program may
do or leave out. `carried` says what that becomes in the next stage: absolute bounds, element by element, which hold for
whatever errors lie within those of the inputs, also ones that agree in sign. So a right program is never beyond them;
of what passed through long sums they see little, and `floor` says how little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from stages.oracle.bounds import Lambdas, rounding_unit
from stages.oracle.verdict import Oracle, consult
from stages.spec.causal import up_to_query
from stages.spec.noise import Noise
from stages.spec.stage import Stage

Options = Mapping[str, Any]
Errors = Sequence[np.ndarray]


@dataclass(frozen=True)
class Value:
    """A stage's value as the next one gets it, and what another right program's may lie off: 0 where it was recorded.

    `near` is by the calibrated bounds, `far` by the rigorous ones; `hidden` names the stages that were computed.
    """

    array: np.ndarray
    near: np.ndarray | float = 0.0
    far: np.ndarray | float = 0.0
    hidden: tuple[str, ...] = ()

    def last(self, rows: int) -> Value:
        """The last rows of it."""
        near, far = (error if isinstance(error, float) else error[-rows:] for error in (self.near, self.far))
        return Value(self.array[-rows:], near, far, self.hidden)


def oracle_through(
    stage: Stage,
    inputs: Sequence[Value],
    params: Sequence[np.ndarray],
    options: Options,
    lambdas: Lambdas,
    run: np.dtype,
    doubts: Sequence[Sequence[np.ndarray]] | None = None,
) -> Oracle:
    """The oracle of a stage some of whose inputs are not sure, in a run of dtype `run`.

    Computed without the roundings that the model prescribes inside the stage; whether they were done is in the bounds.
    `doubts` are what the params may be off, by the calibrated and by the rigorous bounds.
    """
    arguments = (*(value.array.astype(np.float64) for value in inputs), *params)
    unit = rounding_unit(run) if run.itemsize < 4 else 0.0

    def unsure(arguments: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
        given = arguments[: len(inputs)]

        def of(errors: Sequence[np.ndarray | float], which: int) -> np.ndarray:
            wide = [np.broadcast_to(np.asarray(e), x.shape) for e, x in zip(errors, given, strict=True)]
            moved = carried(stage, arguments, wide, options, unit) if inputs else np.zeros(())
            return moved if doubts is None else moved + doubted(stage, arguments, wide, doubts[which])

        return of([value.near for value in inputs], 0), of([value.far for value in inputs], 1)

    return consult(stage, arguments, options, lambdas, unsure if inputs or doubts is not None else None)


def value_through(oracle: Oracle, inputs: Iterable[Value]) -> Value:
    """A hidden stage's value; its stored rounding is in the oracle's bounds."""
    before = dict.fromkeys(name for value in inputs for name in value.hidden)
    return Value(oracle.value, oracle.bound, oracle.rigorous(), (*before, oracle.stage.name))


def floor(oracles: Iterable[Oracle]) -> float:
    """The bounds of a stage's parts relative to their values, in RMS: of errors that are smaller nothing is seen."""
    bounds = values = 0.0
    for oracle in oracles:
        bounds += float(np.sum(np.square(np.broadcast_to(oracle.bound, oracle.value.shape))))
        values += float(np.sum(np.square(oracle.value)))
    return float(np.sqrt(bounds / values)) if values else np.inf


# -- what an error of the inputs becomes in the result --------------------------------------------------------------


def carried(stage: Stage, arguments: Sequence[np.ndarray], errors: Errors, options: Options, unit: float) -> np.ndarray:
    """How far the stage's float64 value may move when its inputs move by `errors`, each at most.

    `unit` is the roundoff of roundings inside the stage that may have been done, 0 of none.
    """
    count = len(stage.inputs)
    with np.errstate(all="ignore"):  # an error too large for its stage is infinite
        moved = CARRIED[stage.function](arguments[:count], errors, arguments[count:], options, unit)
    return np.where(np.isnan(moved), np.inf, moved)


def doubted(stage: Stage, arguments: Sequence[np.ndarray], errors: Errors, doubts: Sequence[np.ndarray]) -> np.ndarray:
    """How far a product or a copy may move when its weights move by `doubts` while its inputs move by `errors`."""
    if stage.noise is Noise.PRODUCT:
        x = np.abs(arguments[0]) + errors[0]
        return np.concatenate([x @ doubt.T for doubt in doubts if doubt.ndim == 2], axis=-1)
    return doubts[-1][arguments[0]] if stage.name == "embedding" else np.zeros(())


Carried = Callable[[Sequence[np.ndarray], Errors, Sequence[np.ndarray], Options, float], np.ndarray]


def _summed(_x: Sequence[np.ndarray], errors: Errors, *_: Any) -> np.ndarray:
    return errors[0] + errors[1]


def _multiplied(x: Sequence[np.ndarray], errors: Errors, *_: Any) -> np.ndarray:
    (a, b), (ea, eb) = x, errors
    return np.abs(a) * eb + np.abs(b) * ea + ea * eb


def _product(_x: Sequence[np.ndarray], errors: Errors, params: Sequence[np.ndarray], *_: Any) -> np.ndarray:
    """|W| times the error; biases add none."""
    weights = [np.abs(w.astype(np.float64)) for w in params if w.ndim == 2]
    return np.concatenate([errors[0] @ w.T for w in weights], axis=-1)


def _angle(
    x: Sequence[np.ndarray], errors: Errors, params: Sequence[np.ndarray], _options: Options, _unit: float
) -> np.ndarray:
    return np.abs(params[0].astype(np.float64))[:, None] * np.tile(errors[0], 2)


def _wave(
    _x: Sequence[np.ndarray], errors: Errors, _p: Sequence[np.ndarray], options: Options, _u: float
) -> np.ndarray:
    return np.minimum(errors[0], 2.0) * float(options["attention_scaling"])


def _normed(part: int | None) -> Carried:
    """n = x / R with R = sqrt(mean(x^2) + eps), which moves by the error's root mean square d at most:
    |x + e| / (R - d) - |x| / R <= (e + |n| d) / (R - d)."""

    def normed(
        x: Sequence[np.ndarray], errors: Errors, params: Sequence[np.ndarray], options: Options, unit: float
    ) -> np.ndarray:
        a, e = (array if part is None else _by_heads(array, part, options) for array in (x[0], errors[0]))
        root = np.sqrt(np.mean(a * a, axis=-1, keepdims=True) + options["eps"])
        d = np.sqrt(np.mean(e * e, axis=-1, keepdims=True))
        size = np.abs(a) / root
        moved = np.where(d < root, (e + size * d) / (root - d), np.inf)
        return (moved + unit * (size + moved)) * np.abs(params[0].astype(np.float64))

    return normed


def _turned(part: int) -> Carried:
    """Of x cos + x' sin: each product moves by what its factors do."""

    def turned(
        x: Sequence[np.ndarray], errors: Errors, _p: Sequence[np.ndarray], options: Options, unit: float
    ) -> np.ndarray:
        (q, cos, sin), (e, ecos, esin) = x, errors
        q, e = (_by_heads(array, part, options) for array in (q, e))
        half = q.shape[-1] // 2
        other, eother = (np.roll(array, half, axis=-1) for array in (np.abs(q), e))
        cos, sin, ecos, esin = (array[:, None] for array in (np.abs(cos), np.abs(sin), ecos, esin))
        direct, turned = np.abs(q) * cos, other * sin
        moved = cos * e + (np.abs(q) + e) * ecos + sin * eother + (other + eother) * esin
        return moved + unit * (direct + turned + moved)

    return turned


def _scores(
    x: Sequence[np.ndarray], errors: Errors, _p: Sequence[np.ndarray], options: Options, unit: float
) -> np.ndarray:
    (q, k), heads = x, x[0].shape[1]
    product = np.abs(q.swapaxes(0, 1) @ _for_heads(k, heads).swapaxes(1, 2))
    (q, eq), (k, ek) = ((np.abs(a), e) for a, e in zip(x, errors, strict=True))
    (q, eq), (k, ek) = (a.swapaxes(0, 1) for a in (q, eq)), (_for_heads(a, heads).swapaxes(1, 2) for a in (k, ek))
    moved = eq @ k + (q + eq) @ ek
    return float(options["scaling"]) * (moved + unit * (product + moved))


def _softmax(x: Sequence[np.ndarray], errors: Errors, *_: Any) -> np.ndarray:
    """log p moves by the score's error and by the log of the sum's, which is the mean of exp(error) over p."""
    kept = up_to_query(x[0])
    scores, e = np.where(kept, x[0], -np.inf), np.where(kept, errors[0], 0.0)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    widest = e.max(axis=-1, keepdims=True)
    mean = widest + np.log(np.sum(p * np.exp(e - widest), axis=-1, keepdims=True))
    return np.minimum(p * np.expm1(e + mean), 1.0) * kept


def _weighted(
    x: Sequence[np.ndarray], errors: Errors, _p: Sequence[np.ndarray], options: Options, _unit: float
) -> np.ndarray:
    (p, qkv), (ep, eqkv) = x, errors
    v, ev = (_for_heads(_by_heads(np.abs(a), 2, options), len(p)) for a in (qkv, eqkv))
    moved = ep @ v + (p + ep) @ ev
    return moved.swapaxes(0, 1).reshape(moved.shape[1], -1)


def _silu(x: Sequence[np.ndarray], errors: Errors, *_: Any) -> np.ndarray:
    """|silu'| e, and e^2 / 4 since |silu''| <= 1/2."""
    (gate,), (e,) = x, errors
    sigmoid = 1 / (1 + np.exp(-gate))
    return np.abs(sigmoid * (1 + gate * (1 - sigmoid))) * e + e * e / 4


def _by_heads(x: np.ndarray, part: int, options: Options) -> np.ndarray:
    """q, k or v of their join by heads, `[tokens, heads, head_dim]`; what is by heads already stays."""
    if x.ndim == 3:
        return x
    ends = np.cumsum([options[name] * options["head_dim"] for name in ("heads", "kv_heads")])
    return np.split(x, ends, axis=-1)[part].reshape(len(x), -1, options["head_dim"])


def _for_heads(x: np.ndarray, heads: int) -> np.ndarray:
    """Keys or values `[tokens, kv_heads, head_dim]` as `[heads, tokens, head_dim]`, each for consecutive heads."""
    return np.repeat(x.swapaxes(0, 1), heads // x.shape[1], axis=0)


CARRIED: Mapping[str, Carried] = MappingProxyType(
    {
        "rope_angle": _angle,
        "rope_cos": _wave,
        "rope_sin": _wave,
        "attn_norm": _normed(None),
        "qkv_matmul": _product,
        "qkv_bias": _product,
        "q_norm": _normed(0),
        "k_norm": _normed(1),
        "q_post_rope": _turned(0),
        "k_post_rope": _turned(1),
        "attn_scores": _scores,
        "attn_softmax": _softmax,
        "attention": _weighted,
        "attn_out": _product,
        "post_attn_residual": _summed,
        "ffn_norm": _normed(None),
        "ffn_gate": _product,
        "ffn_up": _product,
        "ffn_silu": _silu,
        "ffn_swigl": _multiplied,
        "ffn_out": _product,
        "post_ffn_residual": _summed,
        "final_norm": _normed(None),
        "lm_head": _product,
    }
)
