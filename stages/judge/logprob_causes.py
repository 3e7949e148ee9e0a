"""What may have been done to logprobs that are not the model's: candidates, their numbers found from the logprobs.

A candidate is only proposed here, from a few tokens. It is a finding where it brings every token back within its bound.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from stages.files.logprobs import Line
from stages.judge.wording import number
from stages.oracle.logprobs import PLAIN, Logprobs, Processing

How = Callable[[Line], Processing]
Words = Callable[[Processing], str]

# Temperatures that are tried where one has to be found together with top-k or top-p, and values of top-p: the numbers
# that people write. A temperature by itself is fitted.
_TEMPERATURES = tuple(round(0.05 * n, 2) for n in range(2, 41))
_TOP_P = (*(round(0.01 * n, 2) for n in range(30, 100)), 0.995, 0.999)
_TOP_K = (1, 2, 5, 8, 10, 16, 20, 30, 32, 40, 50, 64, 100, 128, 200, 256, 500, 1000, 1024)
# Among so many values of a search by hand; from the best of them Newton's method goes on.
_GRID = np.geomspace(0.05, 20, 61)
_STEPS = 30
NOTHING = "as if nothing was applied to the logits, against what is declared"
# Rows for which top-p is searched at every temperature.
_FEW, _FEW_LOGITS = 128, 1 << 21


@dataclass(frozen=True)
class Sample:
    """Some tokens of a side: their logits `[tokens, vocab]`, ids, observed logprobs, and typical deviations."""

    logits: np.ndarray
    targets: np.ndarray
    observed: np.ndarray
    plain: Logprobs

    @cached_property
    def ordered(self) -> np.ndarray:
        """The logits of each token's row, largest first."""
        found: np.ndarray = -np.sort(-self.logits, axis=-1)
        return found

    @property
    def weight(self) -> np.ndarray:
        return 1 / np.maximum(self.plain.deviation, 1e-12)

    def few(self) -> Sample:
        """Some of the tokens, evenly."""
        count = min(_FEW, max(8, _FEW_LOGITS // self.logits.shape[-1]), len(self.targets))
        kept = np.unique(np.linspace(0, len(self.targets) - 1, count).astype(int))
        return Sample(self.logits[kept], self.targets[kept], self.observed[kept], _part(self.plain, kept))


def _part(found: Logprobs, kept: np.ndarray) -> Logprobs:
    return Logprobs(*(array[kept] for array in (found.value, found.low, found.high, found.deviation, found.own)))


@dataclass(frozen=True)
class Cause:
    """What may explain a side: in words, as what to compute for each line, and how many digits of it were found from
    the logprobs: each costs the logarithm of 10, as the logprobs' likelihood is counted.

    `narrower`: fewer bits, not another function. `model` and `dtype` name another forward, where it is one; `left_out`
    are tokens that the prompt lacked.
    """

    words: str
    how: How = field(repr=False)
    digits: int = 0
    narrower: bool = False
    model: str | None = None
    dtype: str | None = None
    left_out: int = 0

    @property
    def kind(self) -> str:
        """The words without their numbers."""
        return re.sub(r"[\d.]+", "#", self.words)


def declared(line: Line) -> Processing:
    """What a line says was applied."""
    return Processing(line.temperature, line.top_k, line.top_p)


def simple(lines: Iterable[Line], others: Iterable[Line], dtype: str, stored: str | None) -> list[Cause]:
    """Causes with no number to be found: what a side declares, or the other side, left out or applied; another row or
    token; fewer bits. `stored`: the 16-bit format that holds all its logprobs."""
    found = []
    own, theirs = (list(dict.fromkeys(map(declared, some))) for some in (lines, others))
    if own != [PLAIN]:
        found.append(Cause(NOTHING, lambda _line: PLAIN))
    found += [applied(way) for way in theirs if way not in (*own, PLAIN)]
    parts = dict.fromkeys(part for way in (*own, *theirs) for part in _parts(way))
    found += [applied(part) for part in parts if part not in (*own, *theirs)]
    found += [Cause(words, but(row=row, token=token)) for row, token, words in _MOVED]
    found.append(Cause("the logprobs of the most likely tokens, not of those sampled", but(likeliest=True)))
    for narrow in (None, "bfloat16", "float16") if dtype == "float32" else ():
        for kept in {None, stored} - ({None} if narrow is None else set()):
            said = [] if narrow is None else [f"the logits had been rounded to {narrow} before the logprobs were taken"]
            said += [] if kept is None else [f"the logprobs had been rounded to {kept}"]
            found.append(Cause(f"as if {', and '.join(said)}", but(logits=narrow, stored=kept), narrower=True))
    return found


def but(**changes: Any) -> How:
    """What a line says was applied, with some of it changed."""
    return lambda line: replace(declared(line), **changes)


_MOVED = (
    (1, 1, "off by one: each is the logprob of the next token"),
    (-1, -1, "off by one: each is the logprob of the token before"),
    (1, 0, "logits not shifted: each token is scored by the logits that follow it"),
    (-1, 0, "logits shifted twice: each token is scored by the logits of one place before"),
)


def _parts(way: Processing) -> Iterator[Processing]:
    """What is applied with one step left out."""
    for part in (replace(way, temperature=1.0), replace(way, top_k=None), replace(way, top_p=None)):
        if part not in (way, PLAIN):
            yield part


def applied(way: Processing, digits: int = 0, words: str | None = None) -> Cause:
    return Cause(f"as if {words or words_of(way)} had been applied", lambda _line: way, digits)


def words_of(way: Processing) -> str:
    """Temperature, top-k and top-p in words."""
    said = [] if way.temperature == 1 else [f"temperature {way.temperature:.4g}"]
    said += [] if way.top_k is None else [f"top-k {way.top_k}"]
    said += [] if way.top_p is None else [f"top-p {way.top_p:.4g}"]
    return " and ".join(said) or "nothing"


def fitted(sample: Sample) -> list[Cause]:
    """Causes of one number that the logprobs give: a temperature, another unit, top-k, top-p."""
    found = _temperatures(sample) + _units(sample)
    return found + [applied(way, _digits(way)) for way in (*_top_k(sample, 1.0), *_top_p(sample, 1.0))]


# Digits of what people write, and of any number.
_ROUND, _ANY = 2, 4


def _digits(way: Processing) -> int:
    p = 0 if way.top_p is None else _ROUND if way.top_p in _TOP_P else _ANY
    k = 0 if way.top_k is None else _ROUND if way.top_k in _TOP_K else 1 + _ROUND
    return p + k + (_ROUND if way.temperature != 1 else 0)


def joined(sample: Sample, temperatures: Iterable[float]) -> list[Cause]:
    """Top-k or top-p together with a temperature: the best of each."""
    few, ways = sample.few(), []
    for temperature in dict.fromkeys((*temperatures, *_TEMPERATURES)):
        if temperature != 1:
            ways += [*_top_k(few, temperature), *_top_p(few, temperature)]
    best: dict[tuple[bool, int], tuple[float, Processing]] = {}
    for way in ways:
        kind, off = (way.top_k is None, _digits(way)), _off(few, way)
        if kind not in best or off < best[kind][0]:
            best[kind] = (off, way)
    return [applied(way, _digits(way)) for _, way in best.values()]


# -- a temperature --------------------------------------------------------------------------------------------------


def _temperatures(sample: Sample) -> list[Cause]:
    """The temperature that fits best, and a rounder number near it."""
    ladder = [(float(np.median(np.abs(_residual(sample, 1 / t)))), 1 / t) for t in _GRID]
    beta = min(ladder)[1]
    for _ in range(_STEPS):
        slope = _slope(sample, beta)
        power = float(np.sum(slope * slope))
        if not power > 0:
            return []
        beta = float(np.clip(beta + np.sum(slope * _residual(sample, beta)) / power, beta / 2, beta * 2))
    if not math.isfinite(beta):
        return []
    error = 1 / math.sqrt(power)
    # As many digits as the tokens tell: the deviation of 1 / beta is error / beta^2.
    digits = 1 + max(0, -math.floor(math.log10(error / beta**2)))
    found = [applied(replace(PLAIN, temperature=1 / beta), _ANY, f"temperature {1 / beta:.{digits}f}")]
    for digits in (1, 2, 3):
        near = round(1 / beta, digits)
        if 0 < near != 1 and abs(1 / near - beta) < 20 * error:
            found.append(applied(replace(PLAIN, temperature=near), _ROUND))
            break
    return found


def _residual(sample: Sample, beta: float) -> np.ndarray:
    """(observed - logprob at inverse temperature beta) / deviation."""
    x = beta * sample.logits
    top = x.max(axis=-1)
    lse = top + np.log(np.sum(np.exp(x - top[:, None]), axis=-1))
    value = x[np.arange(len(x)), sample.targets] - lse
    found: np.ndarray = (sample.observed - value) * sample.weight
    return found


def _slope(sample: Sample, beta: float) -> np.ndarray:
    """What a logprob moves by with beta: the logit less the mean logit."""
    x = beta * sample.logits
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    mean = np.sum(e * sample.logits, axis=-1) / np.sum(e, axis=-1)
    found: np.ndarray = (sample.logits[np.arange(len(x)), sample.targets] - mean) * sample.weight
    return found


def _units(sample: Sample) -> list[Cause]:
    """A factor of all logprobs: of another base, or of a temperature that was applied to the wrong thing."""
    value, weight = sample.plain.value, sample.weight
    factor = float(np.sum(sample.observed * value * weight**2) / np.sum(np.square(value * weight)))
    if not 1e-3 < factor < 1e3:
        return []
    bases = {"log2, not natural logarithms": 1 / math.log(2), "log10, not natural logarithms": 1 / math.log(10)}
    found = [Cause(words, but(unit=unit)) for words, unit in bases.items()]
    for divisor, digits in ((round(1 / factor, 2), _ROUND), (1 / factor, _ANY)):
        if divisor not in (0, 1):
            words = f"as if the logprobs, not the logits, had been divided by temperature {number(float(divisor))}"
            found.append(Cause(words, but(unit=1 / divisor), digits))
    return found


# -- top-k and top-p ------------------------------------------------------------------------------------------------


def _below(sample: Sample, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """At a temperature, how far each token's logit lies below the largest, `[tokens]`, and the sums of the 1, 2, 3, ...
    largest exponentials, `[tokens, vocab]`."""
    ordered = sample.ordered
    target = sample.logits[np.arange(len(ordered)), sample.targets] - ordered[:, 0]
    return target / temperature, np.cumsum(np.exp((ordered - ordered[:, :1]) / temperature), axis=-1)


def _top_k(sample: Sample, temperature: float) -> Iterator[Processing]:
    """The k whose largest logits, normalised, give the observed logprobs best."""
    target, sums = _below(sample, temperature)
    off = np.square((sample.observed[:, None] - target[:, None] + np.log(sums)) * sample.weight[:, None])
    total = np.sum(off, axis=0)
    best = 1 + int(np.argmin(total))
    usual = min((k for k in _TOP_K if k <= len(total)), key=lambda k: total[k - 1])
    for k in {best, usual}:
        if k < len(total):
            yield Processing(temperature, top_k=k)


def _top_p(sample: Sample, temperature: float) -> Iterator[Processing]:
    """The p whose nuclei, normalised, give the observed logprobs best: one that people write, or of those between
    which the nuclei that were kept leave it."""
    target, sums = _below(sample, temperature)
    share = sums / sums[:, -1:]
    with np.errstate(over="ignore"):
        kept = np.exp(np.minimum(target - sample.observed, 700.0))  # the sum that was divided by
    nearest = np.argmin(np.abs(np.log(sums) - np.log(kept)[:, None]), axis=-1)
    rows = np.arange(len(sums))
    most = float(np.min(share[rows, nearest]))
    least = float(np.max(np.where(nearest > 0, share[rows, nearest - 1], 0.0)))
    middle = (least + most) / 2
    for p in (min(_TOP_P, key=lambda p: _off_top_p(sample, target, share, sums, p)), middle):
        if 0 < p < 1:
            yield Processing(temperature, top_p=p)


def _off_top_p(sample: Sample, target: np.ndarray, share: np.ndarray, sums: np.ndarray, p: float) -> float:
    last = np.argmax(share >= p * (1 - 1e-12), axis=-1)
    off = (sample.observed - target + np.log(sums[np.arange(len(sums)), last])) * sample.weight
    # Where p is near to a sum one token more may be among them: such rows are to count little.
    return float(np.sum(np.minimum(np.square(off), 1e4)))


def _off(sample: Sample, way: Processing) -> float:
    """How far a way is from the observed logprobs of a sample."""
    target, sums = _below(sample, way.temperature)
    if way.top_p is not None:
        return _off_top_p(sample, target, sums / sums[:, -1:], sums, way.top_p)
    off = (sample.observed - target + np.log(sums[:, (way.top_k or 0) - 1])) * sample.weight
    return float(np.sum(np.minimum(np.square(off), 1e4)))
