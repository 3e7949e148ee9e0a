"""How two arrays differ, accumulated chunk by chunk: nothing here knows what a stage is."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stages.judge.stats import Moments

# Elements handled at a time. Their float64 copies stay in the cache, and OpenBLAS computes a dot product of fewer
# than 10,000 on one thread: above it, waking threads cost 50 times the arithmetic here.
_BLOCK = 1 << 13


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of one dtype and shape are byte for byte equal."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(np.array_equal(_bits(a), _bits(b)))


def _bits(a: np.ndarray) -> np.ndarray:
    a = np.ascontiguousarray(a).reshape(-1)
    return a.view(np.uint64) if a.nbytes % 8 == 0 and a.nbytes else a.view(np.uint8)


@dataclass
class Difference:
    """Metrics of a against b; one chunk's can be merged into another's. Indices are whole-array coordinates."""

    top_k: int = 5
    count: int = 0
    mismatched: int = 0
    nonfinite_a: int = 0
    nonfinite_b: int = 0
    sum_abs: float = 0.0
    sum_sq: float = 0.0
    aa: float = 0.0
    bb: float = 0.0
    ab: float = 0.0
    byte_match: bool = True
    dtype: str | None = None
    moments_a: Moments = field(default_factory=Moments)
    moments_b: Moments = field(default_factory=Moments)
    top: list[tuple[float, tuple[int, ...], float, float]] = field(default_factory=list)

    def add(self, a: np.ndarray, b: np.ndarray, start: int = 0, axis: int = 0) -> None:
        """Add slices of both arrays (same shape and dtype) that begin at `start` along `axis`."""
        equal = same_bits(a, b)
        self.byte_match &= equal
        self.dtype = a.dtype.name
        self.count += a.size
        flat_a, flat_b = np.ascontiguousarray(a).reshape(-1), np.ascontiguousarray(b).reshape(-1)
        for at in range(0, flat_a.size, _BLOCK):
            block = flat_a[at : at + _BLOCK]
            if equal:
                self._add_equal(block)
            else:
                self._add_block(block, flat_b[at : at + _BLOCK], at, a.shape, start, axis)

    def _add_equal(self, a: np.ndarray) -> None:
        x = a.astype(np.float64)
        norm = float(x @ x)
        if not math.isfinite(norm):
            finite = np.isfinite(x)
            self.nonfinite_a += int((~finite).sum())
            self.nonfinite_b += int((~finite).sum())
            x = x[finite]
            norm = float(x @ x)
        self.aa, self.bb, self.ab = self.aa + norm, self.bb + norm, self.ab + norm
        self.moments_a.add(x)
        self.moments_b.add(x)

    def _add_block(self, a: np.ndarray, b: np.ndarray, at: int, shape: tuple[int, ...], start: int, axis: int) -> None:
        self.mismatched += int(np.count_nonzero(_uints(a) != _uints(b)))
        x, y = a.astype(np.float64), b.astype(np.float64)
        aa, bb = float(x @ x), float(y @ y)
        if not math.isfinite(aa + bb):
            finite = np.isfinite(x) & np.isfinite(y)
            self.nonfinite_a += int((~np.isfinite(x)).sum())
            self.nonfinite_b += int((~np.isfinite(y)).sum())
            x, y = np.where(finite, x, 0.0), np.where(finite, y, 0.0)
            aa, bb = float(x @ x), float(y @ y)
        self.aa += aa
        self.bb += bb
        self.ab += float(x @ y)
        self.moments_a.add(x)
        self.moments_b.add(y)
        d = np.subtract(x, y)
        np.abs(d, out=d)
        self.sum_abs += float(np.add.reduce(d))
        self.sum_sq += float(d @ d)
        self._keep_top(d, x, y, at, shape, start, axis)

    def _keep_top(
        self, d: np.ndarray, x: np.ndarray, y: np.ndarray, at: int, shape: tuple[int, ...], start: int, axis: int
    ) -> None:
        keep = max(self.top_k, 1)  # the largest one is always wanted
        floor = self.top[-1][0] if len(self.top) >= keep else 0.0
        largest = float(d.max(initial=0.0))
        # Ties go to the lower index; along rows that is the one seen before.
        if largest == 0 or largest < floor or (largest == floor and axis == 0):
            return
        k = min(keep, d.size)
        kth = max(float(np.partition(d, -k)[-k]), floor)
        ties = np.flatnonzero(d == kth)[:k] if kth else ()
        for i in (*np.flatnonzero(d > kth), *ties):
            index = [int(n) for n in np.unravel_index(at + int(i), shape)]
            if index:
                index[axis] += start
            self.top.append((float(d[i]), tuple(index), float(x[i]), float(y[i])))
        self._trim()

    def _trim(self) -> None:
        self.top.sort(key=lambda item: (-item[0], item[1]))
        del self.top[max(self.top_k, 1) :]

    def merge(self, other: Difference) -> None:
        """Add another chunk's metrics."""
        for name in ("count", "mismatched", "nonfinite_a", "nonfinite_b", "sum_abs", "sum_sq", "aa", "bb", "ab"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.byte_match &= other.byte_match
        self.dtype = other.dtype or self.dtype
        self.moments_a.merge(other.moments_a)
        self.moments_b.merge(other.moments_b)
        self.top = self.top + other.top
        self._trim()

    @property
    def finite(self) -> bool:
        """Whether both sides were finite in every element."""
        return not (self.nonfinite_a or self.nonfinite_b)

    @property
    def max_abs(self) -> float:
        """Largest |a - b| over elements finite on both sides."""
        return self.top[0][0] if self.top else 0.0

    @property
    def mean_abs(self) -> float:
        return self.sum_abs / self.count if self.count else 0.0

    def result(self) -> dict[str, Any]:
        """All metrics as plain values, named as in the `svf.diff/1` document."""
        worst = self.top[0] if self.top else None
        return {
            "max_abs": self.max_abs,
            "max_abs_index": list(worst[1]) if worst else None,
            "max_abs_a": worst[2] if worst else None,
            "max_abs_b": worst[3] if worst else None,
            "mean_abs": self.mean_abs,
            "rms": math.sqrt(self.sum_sq / self.count) if self.count else 0.0,
            "rel_l2": math.sqrt(self.sum_sq / self.aa) if self.aa else (math.inf if self.sum_sq else 0.0),
            "cosine": self._cosine(),
            "std_ratio": self.std_ratio,
            "dtype": self.dtype,
            "mismatched": self.mismatched,
            "count": self.count,
            "byte_match": self.byte_match,
            "nonfinite_a": self.nonfinite_a,
            "nonfinite_b": self.nonfinite_b,
            "top": [{"index": list(i), "abs": d, "a": x, "b": y} for d, i, x, y in self.top[: self.top_k]],
        }

    @property
    def std_ratio(self) -> float | None:
        """Standard deviation of b over a's; infinite where a is constant and b is not, None where neither tells."""
        if not self.finite:
            return None
        one, other = self.moments_a.std, self.moments_b.std
        return other / one if one else math.inf if other else None

    def _cosine(self) -> float:
        norm = math.sqrt(self.aa) * math.sqrt(self.bb)
        if not norm:
            return 1.0 if self.aa == self.bb else 0.0
        return 1.0 if self.byte_match else max(-1.0, min(1.0, self.ab / norm))


def walk(rows: Sequence[dict[str, Any]]) -> None:
    """Give each row `cosine_delta`: the change of its cosine from the stage before, in rows of execution order.

    A replay's tensors are walked one by one; a stage without a cosine is stepped over.
    """
    before: float | None = None
    for at, row in enumerate(rows):
        if at and row["tensor"] != rows[at - 1]["tensor"]:
            before = None
        here = row.get("cosine")
        if here is not None:
            row["cosine_delta"] = None if before is None else here - before
            before = here


class PairHash:
    """sha256 of both sides, chunk by chunk; equal bytes are hashed once."""

    def __init__(self) -> None:
        self._a = hashlib.sha256()
        self._b: Any = None  # None while all bytes so far are equal

    def add(self, a: np.ndarray, b: np.ndarray, *, equal: bool) -> None:
        if not equal and self._b is None:
            self._b = self._a.copy()
        self._a.update(_bytes(a))
        if self._b is not None:
            self._b.update(_bytes(b))

    def digests(self) -> tuple[str, str]:
        first = self._a.hexdigest()
        return first, first if self._b is None else self._b.hexdigest()


def _bytes(a: np.ndarray) -> memoryview:
    return np.ascontiguousarray(a).reshape(-1).view(np.uint8).data


def _uints(a: np.ndarray) -> np.ndarray:
    return a.view(np.dtype(f"u{a.dtype.itemsize}"))
