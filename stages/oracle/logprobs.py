"""Logprobs of tokens in float64, what may have been done to the logits before, and what right programs differ by.

A logprob is a logit less the logarithm of the sum of all exponentials: errors of the final norm that move all logits
alike are not in it. So its variance is that of the final norm through the row of the head less the mean row over the
probabilities, and each logit's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from stages.oracle import spread
from stages.oracle.bounds import LAMBDA, RMS, U32, Lambdas, after_prescribed, half_unit, prescribed
from stages.oracle.decoder import OPERANDS
from stages.oracle.span import BEYOND_LAYER
from stages.oracle.spread import Spread
from stages.spec.dtypes import stored_dtype
from stages.spec.noise import Noise

# The rows of an LM head a few at a time, `[vocab part, hidden]`, in the run's dtype, with their place.
Chunks = Callable[[], Iterator[tuple[slice, np.ndarray]]]


@dataclass(frozen=True)
class Processing:
    """What was done between the logits and a token's logprob: nothing, unless a field says so.

    Logits are rounded to `logits`, divided by `temperature`, cut to the `top_k` largest, then to the fewest whose
    probabilities reach `top_p`, and normalised; the logprob is multiplied by `unit` and rounded to `stored`. `row` and
    `token` say which row of logits and which token of the sequence were taken instead of the right ones; `likeliest`:
    the most likely token.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    unit: float = 1.0
    logits: str | None = None
    stored: str | None = None
    row: int = 0
    token: int = 0
    likeliest: bool = False


PLAIN = Processing()


@dataclass(frozen=True)
class Logits:
    """Float64 logits `[rows, vocab]` of final norms `[rows, hidden]`, the variance of each logit's own error, and what
    the norms may be off by."""

    values: np.ndarray
    own: np.ndarray
    hidden: np.ndarray
    of_hidden: Spread
    chunks: Chunks
    dtype: np.dtype

    @property
    def row(self) -> np.ndarray:
        """Variance of the factor of each row, `[rows]`."""
        return np.broadcast_to(np.asarray(self.of_hidden.row, np.float64).reshape(-1), len(self.values))

    def mean_row(self, p: np.ndarray) -> np.ndarray:
        """The head's rows averaged over weights `p`, `[rows, hidden]`; by float32 products, ample for a variance."""
        narrow, mean = p.astype(np.float32), np.zeros(self.hidden.shape)
        for columns, weight in self.chunks():
            mean += narrow[:, columns] @ weight.astype(np.float32)
        return mean

    def head_rows(self, ids: np.ndarray) -> np.ndarray:
        """The head's rows of these tokens, `[rows, hidden]`."""
        found = np.empty(self.hidden.shape)
        for columns, weight in self.chunks():
            here = (ids >= columns.start) & (ids < columns.stop)
            found[here] = weight[ids[here] - columns.start]
        return found

    def variance(self) -> np.ndarray:
        """Of each logit by itself."""
        own = np.broadcast_to(np.asarray(self.of_hidden.own, np.float64), self.hidden.shape)
        moved = [own @ np.square(weight.astype(np.float64)).T for _, weight in self.chunks()]
        return np.concatenate(moved, axis=-1) + self.row[:, None] * np.square(self.values) + self.own


@dataclass(frozen=True)
class Logprobs:
    """Float64 logprobs `[tokens]`, the least and most they may be where a choice is uncertain, the standard deviation
    of right programs, and what taking and storing a logprob errs by at most."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    deviation: np.ndarray
    own: np.ndarray

    @property
    def bound(self) -> np.ndarray:
        return BEYOND_LAYER * self.deviation + self.own

    def error(self, observed: np.ndarray) -> np.ndarray:
        """How far observed logprobs lie off."""
        return np.maximum(np.maximum(observed - self.high, self.low - observed), 0.0)


def logits_of(hidden: np.ndarray, of_hidden: Spread, chunks: Chunks, dtype: np.dtype, lambdas: Lambdas) -> Logits:
    """Logits of final norms by a head, in a run of `dtype`."""
    values, own = [], []
    for _, weight in chunks():
        part = hidden @ weight.astype(np.float64).T
        operands = OPERANDS["lm_head"](hidden, weight)
        err = spread.own(Noise.PRODUCT, operands, part, dtype, lambdas)
        values.append(part)
        own.append(np.broadcast_to(np.asarray(err.own), part.shape))
    return Logits(np.concatenate(values, axis=-1), np.concatenate(own, axis=-1), hidden, of_hidden, chunks, dtype)


def logprobs_of(logits: Logits, targets: np.ndarray, how: Processing) -> Logprobs:
    """The logprob of one token in each row."""
    plain, slack = logits.values, np.zeros(len(targets))
    at = np.arange(len(targets))
    own_logit = logits.own
    if how.logits is not None:
        plain, flips = _narrowed(logits, stored_dtype(how.logits))
    x = plain / how.temperature
    if how.temperature != 1 and logits.dtype.itemsize < 4:  # the quotient may be stored too
        own_logit = own_logit + np.square(how.temperature * half_unit(x, logits.dtype)) / 3
    if how.likeliest:
        targets = x.argmax(axis=-1)
    top = x.max(axis=-1, keepdims=True)
    e = np.exp(x - top)
    ties = np.zeros(len(targets))
    if how.top_k is not None and how.top_k < e.shape[-1]:
        e, outside, ties = _top_k(e, x, targets, how, logits)
        slack = np.where(outside, np.inf, slack)
    low = np.sum(e, axis=-1)
    high = low + ties
    if how.top_p is not None:
        e, low, high = _top_p(e, ties, how, logits)
        slack = np.where(e[at, targets] == 0, np.inf, slack)
    total = np.sum(e, axis=-1)
    p = e / total[:, None]
    if how.logits is not None:
        slack = (
            slack + flips[at, targets] / how.temperature + np.log(np.sum(p * np.exp(flips / how.temperature), axis=-1))
        )
    below = x[at, targets] - top[:, 0]
    value = below - np.log(total)
    lse = np.abs(top[:, 0] + np.log(total))
    variance = _variance(logits, targets, p, own_logit) / how.temperature**2
    # The quotient, the difference from the largest, exponentials and their sum as in softmax, the logarithm and what it
    # is subtracted from: either the logit, or its difference from the largest.
    each = np.abs(x[at, targets]) + np.abs(below) + np.sqrt(e.shape[-1]) + 4 + 2 * lse + np.abs(value)
    taken = LAMBDA[Noise.SOFTMAX] * U32 * each * abs(how.unit)
    stored = np.zeros(len(targets))
    if how.stored is not None:  # torch rounds what it subtracts too, the logarithm of the sum
        dtype = stored_dtype(how.stored)
        stored = half_unit(how.unit * value, dtype) + half_unit(how.unit * lse, dtype)
    deviation = np.sqrt(variance * how.unit**2 + (RMS[Noise.SOFTMAX] * taken) ** 2 + np.square(stored) / 3)
    most = below - np.log(low) + slack
    least = below - np.log(high) - slack
    # A token that was cut off cannot have been sampled.
    value = np.where(np.isinf(slack), -np.inf, value)
    least, most = (np.where(np.isinf(slack), -np.inf, end) for end in (least, most))
    return Logprobs(how.unit * value, how.unit * least, how.unit * most, deviation, taken + stored)


def _variance(logits: Logits, targets: np.ndarray, p: np.ndarray, own_logit: np.ndarray) -> np.ndarray:
    """Of a logit less the mean logit over p, which is what a logprob moves by."""
    at = np.arange(len(targets))
    p_t, own_t = p[at, targets], own_logit[at, targets]
    row = logits.head_rows(targets) - logits.mean_row(p)
    moved = np.sum(row * row * logits.of_hidden.own, axis=-1)
    middle = logits.values[at, targets] - np.sum(p * logits.values, axis=-1)
    own = np.maximum(1 - 2 * p_t, 0) * own_t + np.sum(p * p * own_logit, axis=-1)
    return moved + logits.row * middle**2 + own


def _narrowed(logits: Logits, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Logits rounded to `dtype`, and how far each may lie off for having been rounded the other way."""
    error = BEYOND_LAYER * np.sqrt(logits.variance())
    return prescribed(logits.values, dtype), after_prescribed(logits.values, error, dtype)


def _top_k(
    e: np.ndarray, x: np.ndarray, targets: np.ndarray, how: Processing, logits: Logits
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Exponentials of the k largest; whether a target is surely not among them; and what those add that are kept too,
    for being equal to the last of them after rounding."""
    assert how.top_k is not None
    at = np.arange(len(targets))
    order = np.argpartition(x, -how.top_k, axis=-1)[:, -how.top_k]
    last = x[at, order]
    gap = (last - x[at, targets]) * how.temperature
    row = logits.head_rows(order) - logits.head_rows(targets)
    own = np.sum(row * row * logits.of_hidden.own, axis=-1) + logits.own[at, order] + logits.own[at, targets]
    noise = BEYOND_LAYER * np.sqrt(own + logits.row * gap**2)
    ties = np.zeros(len(targets))
    if logits.dtype.itemsize < 4:
        ties = _ties(x, last, 2 * half_unit(last, logits.dtype), noise / how.temperature) * e[at, order]
    return np.where(x >= last[:, None], e, 0.0), gap > noise, ties


def _ties(x: np.ndarray, last: np.ndarray, step: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """How many logits a step of the stored format may hold beside one, near the last of the k largest."""
    found = np.zeros(len(x))
    for number, (row, middle) in enumerate(zip(np.sort(x, axis=-1), last, strict=True)):
        start, stop = np.searchsorted(row, (middle - noise[number], middle + noise[number]))
        near = row[max(start - 1, 0) : stop + 1]
        held = np.searchsorted(row, near + step[number], side="right") - np.searchsorted(row, near)
        found[number] = held.max(initial=1) - 1
    return found


def _top_p(
    e: np.ndarray, ties: np.ndarray, how: Processing, logits: Logits
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Exponentials of the fewest that reach p, and the least and most that their sum may be: where the sum up to a
    token is as near to p as it errs, the token may be among them or not. `ties` are what may be in the whole sum too.
    """
    assert how.top_p is not None
    rows = np.arange(len(e))
    order = np.argsort(-e, axis=-1, kind="stable")
    ordered = np.take_along_axis(e, order, axis=-1)
    sums = np.cumsum(ordered, axis=-1)
    total = sums[:, -1]
    reached = sums / total[:, None]
    last = np.argmax(reached >= how.top_p * (1 - 1e-12), axis=-1)
    share = reached[rows, last]
    # The share moves by what the logits of those inside do against all.
    inside = np.where(e >= ordered[rows, last][:, None], e, 0.0)
    moved = inside / total[:, None] - share[:, None] * e / total[:, None]
    through = np.sum(np.square(logits.mean_row(moved)) * logits.of_hidden.own, axis=-1)
    own = np.sum(moved * moved * logits.own, axis=-1) + logits.row * np.square(np.sum(moved * logits.values, axis=-1))
    # Shares are summed in float32, one after the other at worst.
    error = BEYOND_LAYER * (np.sqrt(through + own) / how.temperature + U32 * np.sqrt(e.shape[-1]))
    first = np.argmax(reached >= (how.top_p - error)[:, None], axis=-1)
    reach = np.minimum(how.top_p * (1 + ties / total) + error, 1) * (1 - 1e-12)
    most = np.argmax(reached >= reach[:, None], axis=-1)
    kept = np.zeros_like(e)
    np.put_along_axis(kept, order, np.where(np.arange(e.shape[-1]) <= most[:, None], ordered, 0.0), axis=-1)
    # The value is of the likeliest choice; a token of the widest one counts as kept.
    scale = sums[rows, last] / sums[rows, most]
    return kept * scale[:, None], sums[rows, first], sums[rows, most]
