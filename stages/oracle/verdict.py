"""Judging one side of one stage by itself: its output against the oracle fed its own recorded inputs.

Inherited error is never blamed: the oracle starts from what the stage was given. Bounds are in noise.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np

from stages.oracle import bounds as noise
from stages.oracle import components as reference
from stages.oracle import decoder
from stages.oracle import router as reference_router
from stages.oracle.narrow import FLOAT16, NARROW, TF32, Narrow
from stages.oracle.rounding import round_once
from stages.spec.causal import up_to_query
from stages.spec.dtypes import stored_dtype
from stages.spec.noise import Noise
from stages.spec.stage import Stage

# Every path's stages: the float64 value of each, and what its noise bound is computed from.
STAGES = {**reference.REPLAY_STAGES, **decoder.FORWARD_STAGES, **reference_router.ROUTER_STAGES}
OPERANDS = {**reference.OPERANDS, **decoder.OPERANDS, **reference_router.OPERANDS}


# Elements judged at a time: their float64 copies stay in the cache, and a dot product of fewer than 10,000 wakes no
# threads: on a busy machine that took 30 times as long.
_BLOCK = 1 << 13


class Verdict(StrEnum):
    """What a row says; later is worse."""

    EXACT = "exact"
    ROUNDING = "rounding"
    GIVEN = "given"  # an input, which nothing recorded gives: not judged, and nothing to judge
    UNJUDGED = "unjudged"
    SUSPECT = "suspect"
    PRECISION = "precision"
    BUG = "bug"
    NONFINITE = "nonfinite"
    SHAPE = "shape"
    MISSING = "missing"
    EXTRA = "extra"

    @property
    def passes(self) -> bool:
        return self in (Verdict.EXACT, Verdict.ROUNDING)

    @property
    def fails(self) -> bool:
        return not self.passes and self not in (Verdict.UNJUDGED, Verdict.GIVEN)


def worst(*verdicts: Verdict) -> Verdict:
    """The worst of several verdicts."""
    order = list(Verdict)
    return max(verdicts, key=order.index)


def judged_part(stage: Stage, array: np.ndarray) -> np.ndarray:
    """`array` with 0 where the causal mask throws it away; that is not judged."""
    if not stage.causal or array.ndim < 2:
        return array
    return np.where(up_to_query(array), array, np.zeros((), array.dtype))


# What a stage's arguments may be off by themselves adds this to its calibrated and to its rigorous bound.
Unsure = Callable[[tuple[np.ndarray, ...]], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Oracle:
    """What a stage should give from certain inputs: the unrounded float64 value and its noise.

    `bound` is the calibrated bound, `rigorous()` the one that no summation order exceeds; both computed on demand.
    `unsure` is of arguments that were computed, not recorded.
    """

    stage: Stage
    value: np.ndarray
    calibrated: Callable[[], np.ndarray]
    rigorous: Callable[[], np.ndarray]
    arguments: tuple[np.ndarray, ...]
    options: Mapping[str, Any]
    lambdas: noise.Lambdas
    unsure: Unsure | None = None
    again: Callable[[tuple[np.ndarray, ...]], Oracle] | None = None  # of other arguments, where no table has the stage

    def of(self, arguments: tuple[np.ndarray, ...], options: Mapping[str, Any] | None = None) -> Oracle:
        """The oracle of the same stage for other arguments or options."""
        if self.again is not None:
            return self.again(arguments)
        options = self.options if options is None else options
        return consult(self.stage, arguments, options, self.lambdas, self.unsure)

    @cached_property
    def bound(self) -> np.ndarray:
        """The calibrated bound, per element."""
        return self.calibrated()

    @property
    def rounded(self) -> np.ndarray:
        """The correctly rounded result in the stage's stored dtype."""
        return round_once(self.value, stored_dtype(self.stage.dtype))


def consult(
    stage: Stage,
    arguments: tuple[np.ndarray, ...],
    options: Mapping[str, Any],
    lambdas: noise.Lambdas = noise.LAMBDA,
    unsure: Unsure | None = None,
) -> Oracle:
    """The oracle of `stage` for its `arguments` (inputs, then params, in declared order)."""
    dtype = stored_dtype(stage.dtype)

    def widened(bound: np.ndarray, which: int) -> np.ndarray:
        # What is added is rounded to the stored dtype with the rest.
        return bound if unsure is None else bound + (1 + noise.rounding_unit(dtype)) * unsure(arguments)[which]

    if stage.identity:
        value = arguments[0].astype(np.float64)
    else:
        value = judged_part(stage, np.asarray(STAGES[stage.function](*arguments, **options), np.float64))
    operands: tuple[Any, ...] = arguments
    if stage.noise is not Noise.EXACT and stage.function in OPERANDS:
        operands = OPERANDS[stage.function](*arguments, **options)
    return Oracle(
        stage,
        value,
        lambda: widened(noise.calibrated(stage.noise, operands, value, dtype, lambdas), 0),
        lambda: widened(noise.rigorous(stage.noise, operands, value, dtype), 1),
        arguments,
        options,
        lambdas,
        unsure,
    )


@dataclass(frozen=True)
class Judged:
    """One output against its oracle: largest error / bound, sum of its squares and the elements summed over.

    Elements whose value is 0 (masked probabilities, padding) are not counted: nothing is rounded there.
    """

    verdict: Verdict
    ratio: float = 0.0
    squares: float = 0.0
    count: int = 0


@dataclass
class SideVerdict:
    """Verdict of one side on one stage, over all chunks added; `ratio` is the largest error / bound.

    `elementwise` is the worst verdict on any element, `reason` what is known of it: of `precision`, in which way bits
    were lost. `verdict` is also `suspect` when every element is within its bound and all together err too much.
    `rule` is what a side's own precision promises (promise.py).
    """

    elementwise: Verdict = Verdict.EXACT
    ratio: float = 0.0
    reason: str | None = None
    rule: str | None = None
    squares: float = 0.0
    count: int = 0
    rms_limit: float = np.inf

    @property
    def verdict(self) -> Verdict:
        return worst(self.elementwise, Verdict.SUSPECT) if self.systematic else self.elementwise

    @property
    def hint(self) -> str | None:
        if self.reason is None and self.elementwise.passes and self.systematic:
            times = self.rms_ratio / self.rms_limit
            return f"no element is beyond its bound, but all together err {times:.2g} times as much as rounding may"
        return self.reason

    @property
    def rms_ratio(self) -> float:
        """RMS of error / bound over the stage's elements."""
        return float(np.sqrt(self.squares / max(self.count, 1)))

    @property
    def systematic(self) -> bool:
        """Whether the errors of all elements together are larger than right kernels' rounding."""
        return self.count >= noise.RMS_COUNT and self.rms_ratio > self.rms_limit

    def add(self, oracle: Oracle, observed: np.ndarray) -> Verdict:
        """Judge one chunk, and return its verdict; where it is beyond its bound, ask whether only bits were lost."""
        observed = judged_part(oracle.stage, observed)
        judged = measure(oracle, observed)
        verdict = judged.verdict
        bits = fewer_bits(oracle, observed) if verdict in (Verdict.SUSPECT, Verdict.BUG) else None
        if bits is not None:
            verdict = Verdict.PRECISION
        if worst(self.elementwise, verdict) is not self.elementwise:
            self.elementwise, self.reason = verdict, bits
        self.ratio = max(self.ratio, judged.ratio)
        self.squares, self.count = self.squares + judged.squares, self.count + judged.count
        # Of what was carried from stages before, which may err alike, no RMS was measured.
        sure = oracle.unsure is None
        self.rms_limit = noise.rms_limit(oracle.stage.noise, observed.dtype, oracle.lambdas) if sure else np.inf
        return verdict


def judge(oracle: Oracle, observed: np.ndarray) -> tuple[Verdict, float]:
    """Verdict of an output against its oracle, and its largest error / bound (0 where it is correctly rounded)."""
    judged = measure(oracle, observed)
    return judged.verdict, judged.ratio


def measure(oracle: Oracle, observed: np.ndarray) -> Judged:
    """An output against its oracle, element by element; all of it 0 where it is correctly rounded."""
    if observed.shape != oracle.value.shape or observed.dtype != stored_dtype(oracle.stage.dtype):
        return Judged(Verdict.SHAPE, np.inf)
    observed = judged_part(oracle.stage, observed)
    expected, count = oracle.rounded, int(np.count_nonzero(oracle.value))
    if np.array_equal(expected, observed):  # as numbers: +0 and -0 are one value
        finite = bool(np.isfinite(observed).all())
        return Judged(Verdict.EXACT, count=count) if finite else Judged(Verdict.NONFINITE, np.inf)
    if not np.isfinite(observed).all() or not np.isfinite(oracle.value).all():
        return Judged(Verdict.NONFINITE, np.inf)  # also a number where its inputs give none: nothing is near to a NaN
    got = canonical(observed)
    if np.array_equal(canonical(expected), got):
        return Judged(Verdict.EXACT, count=count)
    ratio, squares = _ratios(got, oracle.value, oracle.bound)
    return Judged(_by_element(oracle, got, ratio), ratio, squares, count)


def _by_element(oracle: Oracle, got: np.ndarray, ratio: float) -> Verdict:
    """The verdict on a finite output that is not correctly rounded, by its largest error / bound."""
    if oracle.stage.noise is Noise.EXACT and oracle.unsure is None:
        return Verdict.BUG
    if ratio <= 1:
        return Verdict.ROUNDING
    beyond = np.abs(got.astype(np.float64) - oracle.value) > oracle.rigorous()
    return Verdict.BUG if bool(beyond.any()) else Verdict.SUSPECT


def _ratios(got: np.ndarray, value: np.ndarray, bound: np.ndarray) -> tuple[float, float]:
    """Largest |got - value| / bound and the sum of its squares, by blocks that stay in the cache."""
    x, y = got.reshape(-1), value.reshape(-1)
    limit = np.broadcast_to(bound, value.shape).reshape(-1)
    largest = squares = 0.0
    for at in range(0, x.size, _BLOCK):
        error = np.abs(x[at : at + _BLOCK] - y[at : at + _BLOCK])
        ratios = error / np.maximum(limit[at : at + _BLOCK], np.finfo(np.float64).tiny)
        largest = max(largest, float(ratios.max(initial=0.0)))
        squares += float(ratios @ ratios)
    return largest, squares


def fewer_bits(oracle: Oracle, observed: np.ndarray) -> str | None:
    """In which way the right function lost bits, if rounding its operands, its result or both explains the output.

    None when no narrow format does. Explained means within the calibrated bound of the function of rounded operands.
    """
    if oracle.stage.noise in _LONG_SUMS and _relative(oracle, observed) > _MOST_LOST:
        return None
    for narrow in NARROW:
        what = _lost(oracle, observed, narrow)
        if what is not None:
            # Values within float16's range do not tell it from TF32, which keeps as many bits.
            alike = narrow is TF32 and _lost(oracle, observed, FLOAT16) == what
            return f"its {what} {narrow.bits} mantissa bits, {narrow.name}{' or float16-like' if alike else ''}"
    return None


def _lost(oracle: Oracle, observed: np.ndarray, narrow: Narrow) -> str | None:
    """What `narrow` must round to explain the output: the result, operands or both, with their verb; or None."""
    stored = observed.dtype == np.float32 and narrow.holds(observed)
    if stored and _within(oracle, observed, narrow):
        return "result has"
    for which, arguments in _narrowed(oracle, narrow):
        rounded = oracle.of(arguments)
        if judge(rounded, observed)[0].passes:
            return f"{which} have"
        if stored and _within(rounded, observed, narrow):
            return f"{which} and its result have"
    return None


# Bits lost in the operands of a long sum lose as many of the result's, not all: more is another function, and it is
# not worth six more products to find that out.
_LONG_SUMS = (Noise.PRODUCT, Noise.SCORES, Noise.WEIGHTED)
_MOST_LOST = 0.05


def _relative(oracle: Oracle, observed: np.ndarray) -> float:
    return float(np.linalg.norm(observed - oracle.value) / max(float(np.linalg.norm(oracle.value)), noise.TINY))


def _within(oracle: Oracle, observed: np.ndarray, narrow: Narrow) -> bool:
    """Whether a result that `narrow` holds is as near as truncation to it allows."""
    allowed = oracle.bound + 2.0**-narrow.bits * (np.abs(oracle.value) + oracle.bound)
    return bool((np.abs(observed - oracle.value) <= allowed).all())


def _narrowed(oracle: Oracle, narrow: Narrow) -> Iterator[tuple[str, tuple[np.ndarray, ...]]]:
    """The stage's arguments in fewer bits, where that differs: all, inputs or parameters alone, each input alone."""
    given, inputs = oracle.arguments, len(oracle.stage.inputs)
    rounded = tuple(narrow.round(a).astype(a.dtype) if a.dtype.kind != "i" else a for a in given)
    changed = [not np.array_equal(a, b) for a, b in zip(rounded, given, strict=True)]
    if any(changed):
        yield "operands", rounded
    if any(changed[:inputs]) and any(changed[inputs:]):
        yield "inputs", (*rounded[:inputs], *given[inputs:])
        yield "weights", (*given[:inputs], *rounded[inputs:])
    if sum(changed[:inputs]) > 1:
        for i, name in enumerate(oracle.stage.inputs):
            yield f"values of {name}", (*given[:i], rounded[i], *given[i + 1 :])


def canonical(a: np.ndarray) -> np.ndarray:
    """`a` with subnormals as zero: XLA flushes them, torch keeps them, and neither is wrong."""
    tiny = np.abs(a.astype(np.float32, copy=False)) < np.float32(2.0**-126)
    return np.where(tiny, np.zeros((), a.dtype), a) if tiny.any() else a
