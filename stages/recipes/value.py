"""Numbers with their doubt: between which two every implementation of a recipe lies, and what the plain one gives.

A recipe is written once, on these. Its bits are `mid`, every operation rounded as written; its bound is `lo` and
`hi`. An operation in float32 widens them by its units, so what compilers do to it (contract, reorder, take a
reciprocal root) is inside one recipe. A rounding to fewer bits is done to `lo` and `hi` themselves, so the bound of
what is stored in 16 bits is the set of numbers that it may be, not half a unit to both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stages.oracle import bounds
from stages.oracle.bounds import U32
from stages.oracle.rounding import round_once
from stages.spec.dtypes import stored_dtype

Function = Callable[[np.ndarray], np.ndarray]
# Of so few numbers a call costs more than what it does to them.
_FEW = 1 << 14


def keep(x: np.ndarray, bits: int, how: str = "even") -> np.ndarray:
    """float64 `x` with `bits` stored mantissa bits and float64's range, in one rounding.

    `how`: to nearest `even`, `away` on a tie, or `truncate`.
    """
    shift = 52 - bits
    raw = np.ascontiguousarray(x, np.float64).view(np.int64)
    if how == "even":
        raw = raw + ((1 << (shift - 1)) - 1 + ((raw >> shift) & 1))
    elif how == "away":
        raw = raw + (1 << (shift - 1))
    return ((raw >> shift) << shift).view(np.float64).reshape(np.shape(x))


def nearest(x: np.ndarray | float, dtype: str) -> np.ndarray:
    """float64 `x` rounded once to `dtype`, with its range; still float64."""
    with np.errstate(over="ignore"):
        return round_once(np.asarray(x, np.float64), stored_dtype(dtype)).astype(np.float64).reshape(np.shape(x))


@dataclass(frozen=True)
class Value:
    """lo <= what any implementation gives <= hi, elementwise; `mid` is the plain one. float64 of one shape."""

    lo: np.ndarray
    mid: np.ndarray
    hi: np.ndarray

    @property
    def sure(self) -> bool:
        """Whether it is one number: recorded, or a weight."""
        return self.lo is self.hi

    def off(self, error: np.ndarray) -> Value:
        """It, wider by `error` to both sides."""
        return Value(self.lo - error, self.mid, self.hi + error)

    def soft(self, units: float) -> Value:
        """After a float32 operation that errs by `units` u at most (1: correctly rounded, or contracted away)."""
        w = units * U32
        return Value(self.lo - w * np.abs(self.lo), nearest(self.mid, "float32"), self.hi + w * np.abs(self.hi))

    def once(self, dtype: str) -> Value:
        """Rounded to `dtype` once, by everybody; of few numbers all three at a time."""
        if self.sure or self.mid.size > _FEW:
            return self.map(lambda x: nearest(x, dtype))
        return Value(*nearest(np.stack([self.lo, self.mid, self.hi]), dtype))

    def to(self, dtype: str) -> Value:
        """A cast that a recipe names. To float32 compilers may leave it out, so there it only widens."""
        return self.soft(1) if dtype == "float32" else self.once(dtype)

    def map(self, f: Function) -> Value:
        """A growing function, or another arrangement of the places; it may not be called with NaN in mind."""
        mid = f(self.mid)
        return Value(mid, mid, mid) if self.sure else Value(f(self.lo), mid, f(self.hi))

    def falling(self, f: Function) -> Value:
        """A decreasing function."""
        mid = f(self.mid)
        return Value(mid, mid, mid) if self.sure else Value(f(self.hi), mid, f(self.lo))

    def __neg__(self) -> Value:
        return self.falling(np.negative)

    def __add__(self, other: Value | np.ndarray | float) -> Value:
        o = point(other)
        if self.sure and o.sure:
            return point(self.mid + o.mid)
        return Value(self.lo + o.lo, self.mid + o.mid, self.hi + o.hi)

    def __sub__(self, other: Value | np.ndarray | float) -> Value:
        return self + -point(other)

    def __mul__(self, other: Value | np.ndarray | float) -> Value:
        o = point(other)
        if self.sure and o.sure:
            return point(self.mid * o.mid)
        if self.sure:
            return o * self
        if o.sure:
            a, b = self.lo * o.mid, self.hi * o.mid
            return Value(np.minimum(a, b), self.mid * o.mid, np.maximum(a, b))
        ends = [self.lo * o.lo, self.lo * o.hi, self.hi * o.lo, self.hi * o.hi]
        return Value(np.minimum.reduce(ends), self.mid * o.mid, np.maximum.reduce(ends))

    def __truediv__(self, other: Value | np.ndarray | float) -> Value:
        """By a positive number."""
        o = point(other)
        ends = [self.lo / o.lo, self.lo / o.hi, self.hi / o.lo, self.hi / o.hi]
        return Value(np.minimum(*ends[:2]), self.mid / o.mid, np.maximum(*ends[2:]))


def point(x: Value | np.ndarray | float) -> Value:
    """A number known exactly."""
    if isinstance(x, Value):
        return x
    x = np.asarray(x, np.float64)
    return Value(x, x, x)


@dataclass(frozen=True)
class Pieces:
    """Operands as sums of `count` numbers of so many mantissa `bits`, multiplied by the tensor `core` of a format."""

    count: int
    bits: int
    core: str


def product(a: Value | np.ndarray, b: Value | np.ndarray, lam: float, pieces: Pieces | None = None) -> Value:
    """`a @ b` summed in float32 in any order, off by `lam` of the product's noise scale (bounds.product_bound).

    `pieces`: of n pieces, products of i and j are summed where i + j < n: what 3xTF32 and BF16x3 do.
    """
    a, b = point(a), point(b)
    mid = a.mid @ b.mid if pieces is None else _of_pieces(a.mid, b.mid, pieces)
    noise = lam * bounds.product_bound(a.mid.astype(np.float32), b.mid.astype(np.float32), mid)
    if not a.sure:
        noise = noise + np.maximum(a.hi - a.mid, a.mid - a.lo) @ np.abs(b.mid)
    if not b.sure:
        noise = noise + np.abs(a.mid) @ np.maximum(b.hi - b.mid, b.mid - b.lo)
    return Value(mid - noise, nearest(mid, "float32"), mid + noise)


def _of_pieces(a: np.ndarray, b: np.ndarray, pieces: Pieces) -> np.ndarray:
    split: list[list[np.ndarray]] = []
    for rest in (a, b):
        found = []
        for _ in range(pieces.count):
            found.append(keep(rest, pieces.bits))
            rest = rest - found[-1]
        split.append(found)
    pairs = [(x, y) for i, x in enumerate(split[0]) for y in split[1][: pieces.count - i]]
    return np.sum([x @ y for x, y in pairs], axis=0)


def total(x: Value, units: float | None = None) -> Value:
    """Sum of positive numbers over the last axis, kept: sqrt(n)/4 + 2 u of itself, in whatever order."""
    w = (np.sqrt(x.mid.shape[-1]) / 4 + 2 if units is None else units) * U32
    lo, mid, hi = (a.sum(axis=-1, keepdims=True) for a in (x.lo, x.mid, x.hi))
    return Value(lo * (1 - w), nearest(mid, "float32"), hi * (1 + w))


def any_of(ways: list[Value]) -> Value:
    """What one of several ways gives, in each element another perhaps; `mid` is the first one's."""
    return Value(np.minimum.reduce([v.lo for v in ways]), ways[0].mid, np.maximum.reduce([v.hi for v in ways]))


def joined(parts: list[Value]) -> Value:
    """Values side by side on the last axis."""
    return Value(*(np.concatenate([getattr(p, end) for p in parts], axis=-1) for end in ("lo", "mid", "hi")))
