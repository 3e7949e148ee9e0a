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
            mean = float(x.mean())
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


def population(values: np.ndarray) -> dict[str, Any]:
    """Mean, standard deviation, min, max and count of a stage's values."""
    found = Population()
    found.add(values)
    return found.result()


def logits(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """How two sets of logits `[positions, vocabulary]` agree: top-1, top-5, the last position's margin, KL.

    `kl` is KL(softmax(a) || softmax(b)) in nats, the largest over positions; `margin` is the distance between a's
    two largest logits at the last position: a greedy token that differs within it may be a tie.
    """
    x, y = a.astype(np.float64), b.astype(np.float64)
    top_a, top_b = _top(x, 5), _top(y, 5)
    log_p, log_q = _log_softmax(x), _log_softmax(y)
    kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    last = np.sort(x[-1])[::-1]
    overlap = [len(set(p) & set(q)) / len(p) for p, q in zip(top_a.tolist(), top_b.tolist(), strict=True)]
    return {
        "top1_agreement": float(np.mean(top_a[:, 0] == top_b[:, 0])),
        "top5_agreement": float(np.mean(overlap)),
        "next_token_a": int(top_a[-1, 0]),
        "next_token_b": int(top_b[-1, 0]),
        "margin": float(last[0] - last[1]) if last.size > 1 else None,
        "kl": float(max(kl.max(), 0.0)),
    }


def top_tokens(row: np.ndarray, count: int = 5) -> list[dict[str, Any]]:
    """The `count` largest logits of one position, largest first; ties by the lower id, as argmax has them."""
    return [{"token": int(i), "logit": float(row[i])} for i in _top(row.astype(np.float64)[None], count)[0]]


def _top(x: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-x, axis=-1, kind="stable")[:, :count]


def _log_softmax(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # an infinity gives a NaN, which the verdict on the logits has already named
        shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
