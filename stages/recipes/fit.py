"""How well a recipe gives what was recorded: to the last bit, and within its bound."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stages.oracle.bounds import RMS_COUNT, TINY
from stages.oracle.rounding import round_once
from stages.oracle.verdict import canonical
from stages.recipes.recipe import Class
from stages.recipes.value import Value
from stages.spec.causal import up_to_query
from stages.spec.stage import Stage


@dataclass(frozen=True)
class Fit:
    """A recipe against the record: elements that have its bits, and elements that it cannot give.

    Of one that fits, `ratio` is the largest distance in parts of what it may be, `off` the sum of the squares of what
    the record is off its stored numbers.
    """

    words: str
    kind: Class
    bits: int
    beyond: int
    elements: int
    usual: str = ""
    ratio: float = 0.0
    off: float = 0.0

    @property
    def missed(self) -> float:
        """Which part of the elements it cannot give."""
        return self.beyond / max(self.elements, 1)

    @property
    def fits(self) -> bool:
        return self.beyond == 0


def places_beyond(value: Value, observed: np.ndarray, stage: Stage | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Which elements do not have the bits of `value`, and which it cannot give; both flat."""
    dtype = observed.dtype
    with np.errstate(all="ignore"):
        differs = canonical(round_once(value.mid, dtype)) != canonical(observed)
        if stage is not None and stage.causal:
            differs &= up_to_query(observed, stage.window)
        differs = differs.reshape(-1)
        at = np.flatnonzero(differs)
        lo, hi = (np.broadcast_to(end, observed.shape).reshape(-1)[at] for end in (value.lo, value.hi))
        got = observed.reshape(-1)[at].astype(np.float64)
        # What is stored in 16 bits is one of the roundings of what lies between.
        low, high = (round_once(end, dtype).astype(np.float64) for end in (lo - TINY, hi + TINY))
        beyond = np.zeros(differs.shape, bool)
        beyond[at] = ~((low <= got) & (got <= high))
    return differs, beyond


def fit(
    words: str,
    kind: Class,
    value: Value,
    observed: np.ndarray,
    stage: Stage,
    usual: str = "",
    rms: float = np.inf,
) -> Fit | None:
    """`value` against what was recorded; None of another shape. Errors of a larger `rms` fit nowhere."""
    if value.mid.shape != observed.shape:
        return None
    differs, beyond = places_beyond(value, observed, stage)
    if rms < np.inf and observed.size >= RMS_COUNT and _rms(value, observed) > rms:
        beyond = np.ones_like(beyond)
    ratio, off = (0.0, 0.0) if beyond.any() else _distance(value, observed, differs)
    return Fit(words, kind, int((~differs).sum()), int(beyond.sum()), observed.size, usual, ratio, off)


def _rms(value: Value, observed: np.ndarray) -> float:
    """The root mean square of all errors, in parts of half of what lies between the ends."""
    middle, half = (value.lo + value.hi) / 2, np.maximum((value.hi - value.lo) / 2, TINY)
    return float(np.sqrt(np.mean(np.square((observed.astype(np.float64) - middle) / half))))


def _distance(value: Value, observed: np.ndarray, differs: np.ndarray) -> tuple[float, float]:
    """The largest distance from the recipe's own number in parts of the largest that it may have, and `Fit.off`."""
    at = np.flatnonzero(differs)
    lo, mid, hi = (np.broadcast_to(x, observed.shape).reshape(-1)[at] for x in (value.lo, value.mid, value.hi))
    got = observed.reshape(-1)[at].astype(np.float64)
    with np.errstate(all="ignore"):
        low, high = (round_once(end, observed.dtype).astype(np.float64) for end in (lo, hi))
        reach = np.maximum(np.maximum(high - mid, mid - low), TINY)
        off = got - round_once(mid, observed.dtype).astype(np.float64)
        return float((np.abs(got - mid) / reach).max(initial=0.0)), float(off @ off)
