"""Judging through stages that were not recorded: their float64 values, and what right programs may differ by in them.

A hidden stage errs by its own noise, by what its inputs err, and by a rounding to the run's dtype, which a program may
do or leave out. `spread.carried` says what that becomes in the next stage as a variance, which sees much through long
sums; `carried` as an absolute bound, which holds for whatever errors there are and sees little. The smaller of both is
the bound; `floor` says how small an error it shows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from stages.oracle import spread
from stages.oracle.activations import Cell, Sums, Taken
from stages.oracle.bounds import RMS_THROUGH, U32, Lambdas, exact_bound, half_unit, rounding_unit
from stages.oracle.components import _v_transposed
from stages.oracle.decoder import _repeated, attn_softmax
from stages.oracle.experts import by_expert, router_probs
from stages.oracle.rounding import widened
from stages.oracle.spread import RECORDED, STEPS, Setting, Spread, by_heads
from stages.oracle.verdict import OPERANDS, Oracle, consult
from stages.spec.causal import up_to_query
from stages.spec.dtypes import stored_dtype
from stages.spec.noise import Noise
from stages.spec.stage import Stage

Options = Mapping[str, Any]
Errors = Sequence[np.ndarray]

# Standard deviations that right programs stay within, through stages of one layer and of more (docs/findings/spans.md:
# 9.9 and 16.9 were the most seen, where attention is sharp and the first order ends).
WITHIN_LAYER, BEYOND_LAYER = 10.0, 20.0
# What errs ten times more than that is no rounding, though no proof says so.
SURELY = 10.0
# A wrong step moves a stage by about its own size; of what differs by half of that among right programs, nothing.
LEAST_SEEN = 0.5


@dataclass(frozen=True)
class Value:
    """A stage's value as the next one gets it, and what another right program's may lie off: nothing if recorded.

    `far` is an absolute bound; infinite where none was carried.
    """

    array: np.ndarray
    spread: Spread = RECORDED
    far: np.ndarray | float = 0.0

    @property
    def sure(self) -> bool:
        """Whether no right program differs in it."""
        return self.spread.none and np.ndim(self.far) == 0 and self.far == 0.0

    def last(self, rows: int) -> Value:
        """The last rows of it."""
        far = self.far[-rows:] if isinstance(self.far, np.ndarray) else self.far
        return Value(self.array[-rows:], self.spread.last(rows), far)


@dataclass(frozen=True)
class Way:
    """How a span is judged: the run's dtype, its tokens, and how many standard deviations right programs stay within.

    Absolute bounds are carried where `absolute` says so: they say nothing of many stages. `taken`: what the stage takes
    its first input to before it computes anything; `least`: what its weights' codes are counted from (`Sums`). `cell`:
    what the stage's own recorded value may be off, of one that follows from others.
    """

    lambdas: Lambdas
    dtype: np.dtype
    tokens: np.ndarray | None = None
    deviations: float = WITHIN_LAYER
    absolute: bool = True
    taken: Taken | None = None
    least: Callable[[], np.ndarray | None] = lambda: None
    cell: Value | None = None


Doubts = Sequence[Sequence[np.ndarray]]


def oracle_through(
    stage: Stage,
    inputs: Sequence[Value],
    params: Sequence[np.ndarray],
    options: Options,
    way: Way,
    doubts: Doubts | None = None,
) -> Oracle:
    """The oracle of a stage some of whose inputs are not sure.

    Computed without the roundings that the model prescribes inside the stage; whether they were done is in the bounds.
    `doubts` are what the params may be off, by the calibrated and by the rigorous bounds.
    """
    sums = None
    if way.taken is not None:
        cell = way.taken.cell(before := inputs[0].array.astype(np.float64))
        inputs = [_as_taken(inputs[0], way.taken, cell), *inputs[1:]]
        ends = cell[::2] if inputs[0].spread.none else ()
        sums = way.taken.sums(before, inputs[0].array, way.least(), *ends)
    arguments = (*(widened(value.array) for value in inputs), *params)
    if not inputs and doubts is None:
        return consult(stage, arguments, options, way.lambdas)

    def unsure(given: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
        return unsure_itself() if given is arguments else unsure_of(given)

    @functools.cache
    def unsure_itself() -> tuple[np.ndarray, np.ndarray]:
        return unsure_of(arguments)

    def unsure_of(given: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
        if stage.noise is Noise.CHOICE:  # what it is made of: a choice itself is sure, or open
            probs = inputs[0]
            room = np.fmin(way.deviations * np.sqrt(probs.spread.variance(probs.array)), probs.far)
            return room, room
        same = given is arguments
        value = oracle.value if same else consult(stage, given, options, way.lambdas, sums=sums).value
        variance = (of_inputs() if same else moved(given)).variance(value)
        deviation = way.deviations * np.sqrt(variance + _of_cell(way, value))
        far = _far(stage, given, inputs, options, way, None if doubts is None else doubts[1])
        far = far if way.cell is None else far + way.cell.far + exact_bound(value, way.dtype)
        return np.fmin(deviation, far), np.fmin(SURELY * deviation, far)

    def moved(given: tuple[np.ndarray, ...]) -> Spread:
        found = _moved(stage, given, inputs, options, way, None if doubts is None else doubts[0])
        if sums is None or inputs[0].sure:
            return found
        return replace(found, own=found.own + sums.variance(_of_blocks(inputs[0], sums)))

    of_inputs = functools.cache(lambda: moved(arguments))
    oracle = consult(stage, arguments, options, way.lambdas, unsure, sums)

    @functools.cache
    def typical() -> np.ndarray:
        if stage.noise is Noise.CHOICE:
            return np.zeros(oracle.value.shape)
        own = _own(oracle, stored_dtype(stage.dtype))
        variance = of_inputs().variance(oracle.value) + own.variance(oracle.value)
        return np.sqrt(variance + _of_cell(way, oracle.value))

    return replace(oracle, typical=typical, carried=of_inputs)


def _of_cell(way: Way, value: np.ndarray) -> np.ndarray | float:
    """The variance of what a tensor's recorded value may be off, which in 16 bits may have been rounded before."""
    if way.cell is None:
        return 0.0
    rounded = half_unit(value, way.dtype) ** 2 / 3 if way.dtype.itemsize < 4 else 0.0
    return way.cell.spread.variance(value) + rounded


def _as_taken(value: Value, taken: Taken, cell: Cell) -> Value:
    """What a value is taken to; of one that is not sure, right programs may take numbers to others near by."""
    array, (least, middle, most) = value.array.astype(np.float64), cell
    if value.sure and np.array_equal(least, most):
        return Value(middle)
    of = taken.variance(array, np.asarray(value.spread.variance(array)))
    far = np.maximum(most - middle, middle - least) if value.sure else np.inf
    return Value(middle, Spread(of), far)


def _of_blocks(value: Value, sums: Sums) -> np.ndarray:
    """The variances of sums of blocks of a value."""
    return np.asarray(value.spread.variance(value.array)).reshape(*sums.own.shape, -1).sum(axis=-1)


def value_through(oracle: Oracle, inputs: Sequence[Value], way: Way) -> Value:
    """A hidden stage's value, with what it errs itself."""
    if oracle.stage.noise is Noise.CHOICE:
        open_ = RECORDED if oracle.carried is None else oracle.carried()
        far = np.where(np.isinf(np.broadcast_to(open_.own, oracle.value.shape)), np.inf, 0.0)
        return Value(oracle.value.astype(np.int32), open_, far)
    own = _own(oracle, way.dtype if oracle.stage.dtype != "float32" else np.dtype(np.float32))
    before = RECORDED if oracle.carried is None else oracle.carried()
    absolute = way.absolute and all(np.ndim(value.far) or value.far < np.inf for value in inputs)
    return Value(oracle.value, before.plus(own), oracle.rigorous() if absolute else np.inf)


@dataclass
class Floor:
    """The least error of a tensor, relative to it in RMS, that its statistic shows, or its bound where its inputs are
    sure; of one that comes in parts."""

    errors: float = 0.0
    values: float = 0.0

    def add(self, oracle: Oracle) -> None:
        seen = oracle.bound if oracle.typical is None else RMS_THROUGH * oracle.typical()
        self.errors += float(np.sum(np.square(np.broadcast_to(seen, oracle.value.shape))))
        self.values += float(np.sum(np.square(oracle.value)))

    @property
    def relative(self) -> float:
        return float(np.sqrt(self.errors / self.values)) if self.values else np.inf


def floor(oracles: Iterable[Oracle]) -> float:
    """The least error of a whole tensor, relative to it in RMS, that its statistic shows."""
    found = Floor()
    for oracle in oracles:
        found.add(oracle)
    return found.relative


def _own(oracle: Oracle, dtype: np.dtype) -> Spread:
    stage = oracle.stage
    operands: tuple[Any, ...] = oracle.arguments
    if stage.noise is not Noise.EXACT and stage.function in OPERANDS:
        operands = OPERANDS[stage.function](*oracle.arguments, **oracle.options)
    if oracle.sums is not None:
        operands = oracle.sums.operands(*operands)
    return spread.own(stage.noise, operands, oracle.value, dtype, oracle.lambdas)


def _moved(
    stage: Stage,
    arguments: tuple[np.ndarray, ...],
    inputs: Sequence[Value],
    options: Options,
    way: Way,
    doubts: Sequence[np.ndarray] | None,
) -> Spread:
    """What a stage's value differs by, of its inputs and of doubtful weights. A doubt is a bound: a third of it is what
    it errs by in RMS, if it is as likely as not."""
    found = RECORDED
    if inputs:
        found = spread.carried(stage, arguments, [v.spread for v in inputs], Setting(options, way.dtype, way.tokens))
    if doubts is None:
        return found
    x = arguments[0] ** 2 if stage.noise is Noise.PRODUCT else arguments[0]
    moved = doubted(stage, [x], [np.zeros(())], [doubt * doubt / 3 for doubt in doubts])
    return replace(found, own=found.own + moved)


def _far(
    stage: Stage,
    arguments: tuple[np.ndarray, ...],
    inputs: Sequence[Value],
    options: Options,
    way: Way,
    doubts: Sequence[np.ndarray] | None,
) -> np.ndarray | float:
    if not way.absolute or any(np.ndim(value.far) == 0 and value.far == np.inf for value in inputs):
        return np.inf
    pairs = zip(inputs, arguments, strict=False)
    wide = [np.broadcast_to(np.asarray(value.far, np.float64), x.shape) for value, x in pairs]
    unit = rounding_unit(way.dtype) if way.dtype.itemsize < 4 else 0.0
    moved = carried(stage, arguments, wide, options, unit) if inputs else np.zeros(())
    return moved if doubts is None else moved + doubted(stage, arguments, wide, doubts)


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
        a, e = (array if part is None else by_heads(array, part, options) for array in (x[0], errors[0]))
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
        q, e = (by_heads(array, part, options) for array in (q, e))
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
    product = np.abs(q.swapaxes(0, 1) @ _repeated(k, heads).swapaxes(1, 2))
    # q and k may be rounded once more, to be scaled.
    (q, eq), (k, ek) = ((np.abs(a), e + unit * (np.abs(a) + e)) for a, e in zip(x, errors, strict=True))
    (q, eq), (k, ek) = (a.swapaxes(0, 1) for a in (q, eq)), (_repeated(a, heads).swapaxes(1, 2) for a in (k, ek))
    moved = eq @ k + (q + eq) @ ek
    return float(options["scaling"]) * (moved + unit * (product + moved))


def _softmax(
    x: Sequence[np.ndarray], errors: Errors, _p: Sequence[np.ndarray], options: Options, _unit: float
) -> np.ndarray:
    """log p moves by the score's error and by the log of the sum's, which is the mean of exp(error) over p."""
    kept = up_to_query(x[0], options.get("window"))
    p, e = attn_softmax(x[0], **options), np.where(kept, errors[0], 0.0)
    widest = e.max(axis=-1, keepdims=True)
    mean = widest + np.log(np.sum(p * np.exp(e - widest), axis=-1, keepdims=True))
    return np.minimum(p * np.expm1(e + mean), 1.0) * kept


def _weighted(
    x: Sequence[np.ndarray], errors: Errors, _p: Sequence[np.ndarray], options: Options, unit: float
) -> np.ndarray:
    (p, qkv), (ep, eqkv) = x, errors
    if np.any(ep):  # not recorded: rounded before they are divided by their sum, perhaps, unless there is one key
        ep = ep + unit * (p + ep) * (p.max(axis=-1, keepdims=True) < 1)
    v, ev = (_repeated(by_heads(np.abs(a), 2, options), len(p)) for a in (qkv, eqkv))
    moved = ep @ v + (p + ep) @ ev
    return moved.swapaxes(0, 1).reshape(moved.shape[1], -1)


def _silu(x: Sequence[np.ndarray], errors: Errors, *_: Any) -> np.ndarray:
    """|silu'| e, and e^2 / 4 since |silu''| <= 1/2."""
    (gate,), (e,) = x, errors
    sigmoid = 1 / (1 + np.exp(-gate))
    return np.abs(sigmoid * (1 + gate * (1 - sigmoid))) * e + e * e / 4


def _distribution(x: Sequence[np.ndarray], errors: Errors, *_: Any) -> np.ndarray:
    """As `_softmax`, of which nothing is masked."""
    p, e = router_probs(x[0]), errors[0]
    widest = e.max(axis=-1, keepdims=True)
    mean = widest + np.log(np.sum(p * np.exp(e - widest), axis=-1, keepdims=True))
    return np.minimum(p * np.expm1(e + mean), 1.0)


def _choice(
    x: Sequence[np.ndarray], errors: Errors, _p: Sequence[np.ndarray], options: Options, _unit: float
) -> np.ndarray:
    """0 of a token whose choice no such error changes, else without limit."""
    k, order = options["top_k"], np.argsort(-x[0], axis=-1, kind="stable")
    low, high = (np.take_along_axis(a, order, axis=-1) for a in (x[0] - errors[0], x[0] + errors[0]))
    open_ = low[:, :k].min(axis=-1) <= high[:, k:].max(axis=-1, initial=-np.inf)
    return np.where(open_, np.inf, 0.0)[:, None] * np.ones(k)


def _unless_open(moved: np.ndarray, choice: np.ndarray) -> np.ndarray:
    open_ = np.isinf(choice).any(axis=-1)
    return np.where(open_.reshape(-1, *[1] * (moved.ndim - 1)), np.inf, moved)


def _shares(
    x: Sequence[np.ndarray], errors: Errors, _p: Sequence[np.ndarray], options: Options, _unit: float
) -> np.ndarray:
    number = x[1].astype(np.int64)
    p, e = (np.take_along_axis(a, number, axis=-1) for a in (x[0], errors[0]))
    if not options["renormalised"]:
        return _unless_open(e, errors[1])
    total, moved = p.sum(axis=-1, keepdims=True), e.sum(axis=-1, keepdims=True)
    below = np.where(moved < total, total - moved, 0.0)
    return _unless_open((e + p / total * moved) / below, errors[1])


def _experts(weight: int) -> Carried:
    def moved(x: Sequence[np.ndarray], errors: Errors, params: Sequence[np.ndarray], *_: Any) -> np.ndarray:
        found = by_expert(
            errors[0], x[1].astype(np.int64), params[weight], lambda e, w: e @ np.abs(w.astype(np.float64)).T
        )
        return _unless_open(found, errors[1])

    return moved


def _combined(
    x: Sequence[np.ndarray], errors: Errors, _p: Sequence[np.ndarray], _options: Options, unit: float
) -> np.ndarray:
    (y, _, w), (ey, open_, ew) = x, errors
    moved = np.sum(_multiplied([w[..., None], y], [ew[..., None], ey]), axis=1)
    size = np.sum(np.abs(w[..., None] * y), axis=1) + moved
    return _unless_open(moved + unit * (y.shape[1] + 1) * size, open_)


def _sigmoid(x: Sequence[np.ndarray], errors: Errors, *_: Any) -> np.ndarray:
    """Its slope is a quarter at most."""
    return np.minimum(errors[0] / 4, 1.0)


def _scaled_s(x: Sequence[np.ndarray], errors: Errors, params: Sequence[np.ndarray], *_: Any) -> np.ndarray:
    """S (1 + z), 1 + z rounded to float32 or not."""
    return np.abs(params[0].astype(np.float64)) * (errors[0] + U32 * (np.abs(1 + x[0]) + errors[0]))


def _ratio(x: Sequence[np.ndarray], errors: Errors, params: Sequence[np.ndarray], *_: Any) -> np.ndarray:
    """sum(S) / sum(scaled_s), whose sum below moves by that of the errors."""
    below, moved = np.abs(np.sum(x[0])), np.sum(errors[0])
    ratio = np.abs(np.sum(params[0], dtype=np.float64)) / below
    return np.reshape(ratio * moved / (below - moved) if moved < below else np.inf, 1)


def _columns(_x: Sequence[np.ndarray], errors: Errors, params: Sequence[np.ndarray], *_: Any) -> np.ndarray:
    return np.abs(params[0].astype(np.float64)) * errors[0]


def _contracted(
    x: Sequence[np.ndarray], errors: Errors, params: Sequence[np.ndarray], options: Options, unit: float
) -> np.ndarray:
    return _product(x, errors, [_v_transposed(params[0], options["layout"]).T], options, unit)


def _oriented(
    _x: Sequence[np.ndarray], errors: Errors, _p: Sequence[np.ndarray], options: Options, _u: float
) -> np.ndarray:
    return errors[0].T if options.get("transpose") else errors[0]


_RULES: Mapping[str, Carried] = {
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
CARRIED: Mapping[str, Carried] = MappingProxyType({stage: _RULES[step] for stage, step in STEPS.items()})
