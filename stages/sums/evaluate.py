"""Sums in a declared order, bit by bit: float32 with every rounding where the order puts it. Slow, and exact.

Denormals are kept. A library that flushes them (XLA) can differ below 2^-126, by the denormal and not by the order.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from stages.sums.orders import Order, lower
from stages.sums.program import Program

# Elements whose accumulators, float64 temporaries included, stay in a core's second-level cache.
CHUNK_ELEMENTS = 1 << 15
# So few sums are taken level by level: there a step of an order costs more than its numbers do.
_FEW = 512
_LOW = np.uint64((1 << 29) - 1)  # the bits of a float64 that float32 has no room for
_MIDPOINT = np.uint64(1 << 28)
_LEAST_NORMAL = 2.0**-126


class Terms(Protocol):
    """K terms of each of many sums."""

    @property
    def size(self) -> int:
        """K."""

    @property
    def count(self) -> int:
        """How many sums there are."""

    def rounded(self, k: int | np.ndarray) -> np.ndarray:
        """Term k of every sum, float32; of several, one after another on the first axis."""

    def fused(self, accumulator: np.ndarray, k: int | np.ndarray) -> np.ndarray:
        """accumulator + term k, the term not rounded before."""


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32 arrays with one rounding, to nearest, ties to even."""
    product = a.astype(np.float64) * b  # exact: 24 + 24 bits fit 53
    wide = product + c
    return _rounded_once(wide, product, c)


def _rounded_once(wide: np.ndarray, product: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32(product + c), where `wide` is that sum in float64.

    Rounding twice errs only where `wide` is a midpoint of two float32 numbers and was rounded itself. There, and
    among denormals, whose midpoints lie elsewhere, the sum is rounded to odd before: then the last rounding is right.
    """
    with np.errstate(over="ignore"):
        out = wide.astype(np.float32)
    doubtful = (wide.view(np.uint64) & _LOW) == _MIDPOINT
    doubtful |= np.abs(wide) < _LEAST_NORMAL
    if doubtful.any():
        at = np.nonzero(doubtful)
        c_at = np.broadcast_to(c, wide.shape)[at].astype(np.float64)
        out[at] = _to_odd(wide[at], product[at], c_at).astype(np.float32)
    return out


def _to_odd(wide: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b rounded to odd: towards zero or away, whichever makes the last bit 1, unless the sum is exact."""
    back = wide - a  # Knuth's TwoSum: error is a + b - wide, exactly
    error = (a - (wide - back)) + (b - back)
    even = (wide.view(np.uint64) & np.uint64(1)) == 0
    away = np.where(error > 0, np.inf, -np.inf)
    return np.where(even & (error != 0), np.nextafter(wide, away), wide)


class Sum:
    """Terms `x[..., k]` as they are."""

    def __init__(self, x: np.ndarray):
        self._x = np.ascontiguousarray(np.moveaxis(x, -1, 0))
        self.size, self.count = x.shape[-1], int(np.prod(x.shape[:-1]))

    def rounded(self, k: int | np.ndarray) -> np.ndarray:
        return self._x[k]

    def fused(self, accumulator: np.ndarray, k: int | np.ndarray) -> np.ndarray:
        return accumulator + self._x[k]


class Products:
    """Terms `a[..., k] * b[..., k]`, the leading axes broadcast against each other; `Products(x, x)` are squares."""

    def __init__(self, a: np.ndarray, b: np.ndarray):
        self._a, self._b = (np.ascontiguousarray(np.moveaxis(x, -1, 0)) for x in (a, b))
        self.size = a.shape[-1]
        self.count = int(np.prod(np.broadcast_shapes(a.shape[:-1], b.shape[:-1])))

    def rounded(self, k: int | np.ndarray) -> np.ndarray:
        return self._a[k] * self._b[k]

    def fused(self, accumulator: np.ndarray, k: int | np.ndarray) -> np.ndarray:
        return fma(self._a[k], self._b[k], accumulator)


def execute(program: Program, terms: Terms) -> np.ndarray:
    """The sums, float32, in the program's order."""
    if terms.count <= _FEW:
        return _by_levels(program, terms)
    kept: dict[int, np.ndarray] = {}

    def take(slot: int) -> np.ndarray:
        return kept.pop(slot) if slot in kept else terms.rounded(slot)

    with np.errstate(over="ignore", invalid="ignore"):
        for into, of, fused in program.steps:
            kept[into] = terms.fused(take(into), of) if fused else take(into) + take(of)
    return take(program.root)


def _by_levels(program: Program, terms: Terms) -> np.ndarray:
    """Of few sums, all additions at once that wait for none of each other."""
    sums = terms.rounded(np.arange(terms.size))
    with np.errstate(over="ignore", invalid="ignore"):
        for into, of, fused in program.levels:
            sums[into] = terms.fused(sums[into], of) if fused else sums[into] + sums[of]
    return sums[program.root]


def evaluate(order: Order, terms: Terms) -> np.ndarray:
    """The sums of `terms`, float32, in `order`."""
    return execute(lower(order, terms.size), terms)


def product(order: Order, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`a @ b`, `[M, N]`, of float32 `[M, K]` and `[K, N]`, in `order`, a few rows at a time."""
    program = lower(order, a.shape[1])
    rows = max(1, CHUNK_ELEMENTS // max(1, b.shape[1]))
    parts = [execute(program, Products(a[r : r + rows, None], b.T[None])) for r in range(0, a.shape[0], rows)]
    return np.concatenate(parts)
