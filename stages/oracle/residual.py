"""How far a reconstruction lies from its source."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stages.oracle.bounds import TINY, residual_bound

# Numbers looked at together: their float64 copies stay in a cache near the processor.
_BLOCK = 1 << 13


@dataclass
class Residual:
    """Largest and relative (Frobenius) distance of a reconstruction from its source, over chunks."""

    known: bool = False
    max_abs: float = 0.0
    _error: float = 0.0
    _norm: float = 0.0
    _count: int = 0

    def add(self, source: np.ndarray, reconstruction: np.ndarray) -> None:
        self.known = True
        x, y = source.reshape(-1), reconstruction.reshape(-1)
        self._count += x.size
        for at in range(0, x.size, _BLOCK):
            w = x[at : at + _BLOCK].astype(np.float64)
            d = w - y[at : at + _BLOCK]
            self.max_abs = float(np.maximum(self.max_abs, np.abs(d).max(initial=0.0)))  # which keeps a NaN
            self._error += float(d @ d)
            self._norm += float(w @ w)

    @property
    def relative(self) -> float:
        """|W - USV^T|_F / |W|_F."""
        return math.sqrt(self._error / self._norm) if self._norm else (math.inf if self._error else 0.0)

    def bound(self, rank: int) -> float:
        """The largest relative residual of a right replay of `rank`: `residual_bound`, and what is flushed to zero.

        XLA counts numbers below 2^-126 as zero. U and V are at most 1, so each of `rank` terms of an element loses
        2^-126 at most in U * S, in its product and in the sum (docs/findings/detection-floor.md).
        """
        flushed = 3 * rank * TINY * math.sqrt(self._count / self._norm) if self._norm else 0.0
        return residual_bound(rank) + flushed
