"""Population statistics of a stage, and what logits say: for people, beside the verdict, never instead of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Values at a time, as in metrics.py.
_BLOCK = 1 << 13


@dataclass
class Moments:
    """Mean and spread of float64 values, piece by piece, without the cancellation that sums of squares have.

    T. Chan, G. Golub, R. LeVeque, Algorithms for computing the sample variance, The American Statistician 37 (1983).
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # of the distances from the mean

    def add(self, x: np.ndarray) -> None:
        """Add one flat piece, finite."""
        if x.size:
            mean = float(np.add.reduce(x)) / x.size  # as x.mean(), without what that does around it
            apart = x - mean
            self.merge(Moments(x.size, mean, float(apart @ apart)))

    def merge(self, other: Moments) -> None:
        count = self.count + other.count
        if not count:
            return
        step = other.mean - self.mean
        self.squares += other.squares + step * step * self.count * other.count / count
        self.mean += step * other.count / count
        self.count = count

    @property
    def std(self) -> float:
        """Standard deviation; 0 where a mean's own rounding in float64 is all there is of it."""
        std = math.sqrt(self.squares / self.count) if self.count else 0.0
        # A step of float32 in one of 2^30 values is 2e-12 of the mean.
        return std if std > 1e-12 * abs(self.mean) else 0.0


@dataclass
class Population:
    """Statistics of a stage's values, piece by piece, in float64; non-finite ones are counted and left out."""

    moments: Moments = field(default_factory=Moments)
    count: int = 0
    nonfinite: int = 0
    low: float = math.inf
    high: float = -math.inf

    def add(self, values: np.ndarray) -> None:
        """Add a piece, of any shape and dtype."""
        flat = values.reshape(-1)
        self.count += flat.size
        for at in range(0, flat.size, _BLOCK):
            x = flat[at : at + _BLOCK].astype(np.float64)
            finite = np.isfinite(x)
            if not finite.all():
                self.nonfinite += int(x.size - np.count_nonzero(finite))
                x = x[finite]
            self.moments.add(x)
            self.low, self.high = min(self.low, x.min(initial=math.inf)), max(self.high, x.max(initial=-math.inf))

    def result(self) -> dict[str, Any]:
        """As plain values; None where nothing is finite."""
        known = self.moments.count > 0
        return {
            "mean": self.moments.mean if known else None,
            "std": self.moments.std if known else None,
            "min": float(self.low) if known else None,
            "max": float(self.high) if known else None,
            "count": self.count,
            "nonfinite": self.nonfinite,
        }


def population(values: np.ndarray, moments: Moments | None = None) -> dict[str, Any]:
    """Mean, standard deviation, min, max and count of a stage's values; `moments` are theirs, if these are known."""
    if moments is not None and moments.count == values.size > 0:
        return Population(moments, values.size, 0, float(values.min()), float(values.max())).result()
    found = Population()
    found.add(values)
    return found.result()


def logits(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """How two sets of logits `[positions, vocabulary]` agree: top-1, top-5, the last position's margin, KL.

    `kl` is KL(softmax(a) || softmax(b)) in nats, the largest over positions; `margin` is the distance between a's
    two largest logits at the last position: a greedy token that differs within it may be a tie.
    """
    rows = [(x.astype(np.float64), y.astype(np.float64)) for x, y in zip(a, b, strict=True)]
    tops = [(_top(x, 5), _top(y, 5)) for x, y in rows]
    last = np.sort(np.partition(rows[-1][0], -2)[-2:]) if a.shape[-1] > 1 else None
    return {
        "top1_agreement": float(np.mean([p[0] == q[0] for p, q in tops])),
        "top5_agreement": float(np.mean([len(set(p) & set(q)) / len(p) for p, q in tops])),
        "next_token_a": tops[-1][0][0],
        "next_token_b": tops[-1][1][0],
        "margin": None if last is None else float(last[1] - last[0]),
        "kl": float(max(np.max([_kl(x, y) for x, y in rows]), 0.0)),
    }


def top_tokens(row: np.ndarray, count: int = 5) -> list[dict[str, Any]]:
    """The `count` largest logits of one position, largest first; ties by the lower id, as argmax has them."""
    return [{"token": i, "logit": float(row[i])} for i in _top(row.astype(np.float64), count)]


def _top(x: np.ndarray, count: int) -> list[int]:
    """The places of a row's `count` largest values, falling; of equal ones the first, and a NaN after all others."""
    places = np.arange(x.size)
    if count < x.size:  # a row of a vocabulary is not sorted for a few of it
        least = np.partition(-x, count - 1)[count - 1]
        places = places if np.isnan(least) else np.flatnonzero(-x <= least)
    found: list[int] = places[np.argsort(-x[places], kind="stable")[:count]].tolist()
    return found


def _kl(x: np.ndarray, y: np.ndarray) -> float:
    log_p, log_q = _log_softmax(x), _log_softmax(y)
    return float(np.sum(np.exp(log_p) * (log_p - log_q)))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # an infinity gives a NaN, which the verdict on the logits has already named
        shifted = x - x.max()
    return shifted - np.log(np.sum(np.exp(shifted)))
