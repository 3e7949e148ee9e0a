"""Judging one side of one stage by itself: its output against the oracle fed its own recorded inputs.

Inherited error is never blamed: the oracle starts from what the stage was given. Bounds are in noise.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np

from stages.oracle import bounds as noise
from stages.oracle import components as reference
from stages.oracle import decoder, experts
from stages.oracle import router as reference_router
from stages.oracle.activations import Sums
from stages.oracle.cores import Core
from stages.oracle.rounding import round_once
from stages.spec.causal import up_to_query
from stages.spec.dtypes import stored_dtype
from stages.spec.noise import Noise
from stages.spec.stage import Stage

# Every path's stages: the float64 value of each, and what its noise bound is computed from.
STAGES = {
    **reference.REPLAY_STAGES,
    **decoder.FORWARD_STAGES,
    **experts.EXPERT_STAGES,
    **reference_router.ROUTER_STAGES,
}
OPERANDS = {**reference.OPERANDS, **decoder.OPERANDS, **experts.OPERANDS, **reference_router.OPERANDS}


# Elements judged at a time: their float64 copies stay in the cache, and a dot product of fewer than 10,000 wakes no
# threads: on a busy machine that took 30 times as long.
_BLOCK = 1 << 13


class Verdict(StrEnum):
    """What a row says; later is worse."""

    EXACT = "exact"
    ROUNDING = "rounding"
    ACCEPTED = "accepted"  # fewer bits, as a library computes by itself: `precision` that the user lets pass
    GIVEN = "given"  # an input, which nothing recorded gives: not judged, and nothing to judge
    UNJUDGED = "unjudged"
    TIE = "tie"  # another choice of experts than exact arithmetic makes, which rounding could have made
    MISRECORDED = "misrecorded"  # not what the model went on with: the recording is to blame, not the model
    SUSPECT = "suspect"
    PRECISION = "precision"
    BUG = "bug"
    NONFINITE = "nonfinite"
    SHAPE = "shape"
    MISSING = "missing"
    EXTRA = "extra"

    @property
    def passes(self) -> bool:
        return self in (Verdict.EXACT, Verdict.ROUNDING, Verdict.ACCEPTED, Verdict.TIE)

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
    return np.where(up_to_query(array, stage.window), array, np.zeros((), array.dtype))


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
    # Of inputs that were computed by stages which were recorded with their own inputs: the oracle of each, by name.
    made: Mapping[str, Callable[[], Oracle | None]] = field(default_factory=dict)
    # Of a stage that is judged through others: the standard deviation of right programs, and the spread of its inputs'.
    typical: Callable[[], np.ndarray] | None = None
    carried: Callable[[], Any] | None = None
    hidden: tuple[str, ...] = ()  # inputs that were not recorded, and can be computed again by their makers
    sizes: Mapping[str, int] = field(default_factory=dict)  # the model's, by name: one may stand for another
    sums: Sums | None = None  # of a product: what its kernel adds to it
    # What codes of quantised weights are counted from, by the weight; None of types that count from 0.
    least: Mapping[str, Callable[[], np.ndarray | None]] = field(default_factory=dict)

    def of(self, arguments: tuple[np.ndarray, ...], options: Mapping[str, Any] | None = None) -> Oracle:
        """The oracle of the same stage for other arguments or options."""
        if self.again is not None:
            return self.again(arguments)
        options = self.options if options is None else options
        return consult(self.stage, arguments, options, self.lambdas, self.unsure, self.sums)

    def summing(self, sums: Sums) -> Oracle:
        """The oracle of a product whose kernel adds `sums` to it."""
        found = consult(self.stage, self.arguments, self.options, self.lambdas, self.unsure, sums)
        return replace(found, made=self.made, sizes=self.sizes, least=self.least)

    @cached_property
    def bound(self) -> np.ndarray:
        """The calibrated bound, per element."""
        return self.calibrated()

    @cached_property
    def room(self) -> np.ndarray:
        """As `bound`, where the value may be another of about that size: then any rounding to 16 bits is possible."""
        dtype = stored_dtype(self.stage.dtype)
        return self.bound if dtype.itemsize == 4 else self.bound + noise.exact_bound(self.value, dtype)

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
    sums: Sums | None = None,
) -> Oracle:
    """The oracle of `stage` for its `arguments` (inputs, then params, in declared order), and `sums` of a product."""
    dtype = stored_dtype(stage.dtype)

    def more(which: int) -> np.ndarray | float:
        return 0.0 if unsure is None else unsure(arguments)[which]

    if stage.identity:
        value = arguments[0].astype(np.float64)
    else:
        value = judged_part(stage, np.asarray(STAGES[stage.function](*arguments, **options), np.float64))
    operands: tuple[Any, ...] = arguments
    if stage.noise is not Noise.EXACT and stage.function in OPERANDS:
        operands = OPERANDS[stage.function](*arguments, **options)
    room = np.zeros(())
    if sums is not None:
        value, operands, room = value + sums.extra, sums.operands(*operands), sums.room
    return Oracle(
        stage,
        value,
        lambda: noise.calibrated(stage.noise, operands, value, dtype, lambdas, more(0) + room),
        lambda: noise.rigorous(stage.noise, operands, value, dtype, more(1) + room, core_of(stage, arguments, lambdas)),
        arguments,
        options,
        lambdas,
        unsure,
        sums=sums,
    )


def core_of(stage: Stage, arguments: tuple[np.ndarray, ...], lambdas: noise.Lambdas) -> Core | None:
    """The tensor core that may have summed a stage's product; None where operands have more bits than it takes."""
    # Inputs that were not recorded are float64.
    formats = {a.dtype.name for a in arguments} - {"float64"} or {stage.dtype}
    return lambdas.cores.get(formats.pop()) if len(formats) == 1 else None


@dataclass(frozen=True)
class Judged:
    """One output against its oracle: largest error / bound, sum of its squares and the elements summed over.

    Elements whose value is 0 (masked probabilities, padding) are not counted: nothing is rounded there. `bits` are
    the elements that are correctly rounded.
    """

    verdict: Verdict
    ratio: float = 0.0
    squares: float = 0.0
    count: int = 0
    bits: int = 0


def judge(oracle: Oracle, observed: np.ndarray) -> tuple[Verdict, float]:
    """Verdict of an output against its oracle, and its largest error / bound (0 where it is correctly rounded)."""
    judged = measure(oracle, observed)
    return judged.verdict, judged.ratio


def measure(oracle: Oracle, observed: np.ndarray) -> Judged:
    """An output against its oracle, element by element; all of it 0 where it is correctly rounded."""
    choice = oracle.stage.noise is Noise.CHOICE
    stored = observed.dtype.kind in "iuf" if choice else observed.dtype == stored_dtype(oracle.stage.dtype)
    if observed.shape != oracle.value.shape or not stored:
        return Judged(Verdict.SHAPE, np.inf)
    if choice:
        return _chosen(oracle, observed)
    observed = judged_part(oracle.stage, observed)
    expected, count = oracle.rounded, int(np.count_nonzero(oracle.value))
    if np.array_equal(expected, observed):  # as numbers: +0 and -0 are one value
        finite = bool(np.isfinite(observed).all())
        exact = Judged(Verdict.EXACT, count=count, bits=observed.size)
        return exact if finite else Judged(Verdict.NONFINITE, np.inf)
    if not np.isfinite(observed).all() or not np.isfinite(oracle.value).all():
        return Judged(Verdict.NONFINITE, np.inf)  # also a number where its inputs give none: nothing is near to a NaN
    got = canonical(observed)
    bits = int(np.count_nonzero(canonical(expected) == got))
    if bits == got.size:
        return Judged(Verdict.EXACT, count=count, bits=bits)
    ratio, squares = _ratios(got, oracle.value, oracle.bound)
    if oracle.typical is not None:
        _, squares = _ratios(got, oracle.value, oracle.typical())
    return Judged(_by_element(oracle, got, ratio), ratio, squares, count, bits)


def _chosen(oracle: Oracle, observed: np.ndarray) -> Judged:
    """A choice of experts, in whatever order: by whether rounding could have made it."""
    same = (np.sort(observed, axis=-1) == np.sort(oracle.value, axis=-1)).all(axis=-1)
    bits = int(same.sum()) * observed.shape[-1]
    room = 0.0 if oracle.unsure is None else oracle.unsure(oracle.arguments)[0]
    if not experts.admissible(oracle.arguments[0], observed, room).all():
        return Judged(Verdict.BUG, np.inf, count=observed.size, bits=bits)
    return Judged(Verdict.EXACT if same.all() else Verdict.TIE, count=observed.size, bits=bits)


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


def canonical(a: np.ndarray) -> np.ndarray:
    """`a` with subnormals as zero: XLA flushes them, torch keeps them, and neither is wrong."""
    tiny = np.abs(a.astype(np.float32, copy=False)) < np.float32(2.0**-126)
    return np.where(tiny, np.zeros((), a.dtype), a) if tiny.any() else a
