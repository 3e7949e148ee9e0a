"""A close look at one stage's elements, small enough for a JSON document: what a report draws of the culprit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stages.judge.metrics import Difference
from stages.oracle.verdict import consult
from stages.spec.stage import Stage
from stages.spec.values import Chunk

# What a document keeps at most, whatever the tensor's size: some 200 kB of JSON.
SCATTER_POINTS = 2_000
MAP_ROWS, MAP_COLS = 64, 128
WORST = 10
_WIDEST = 65  # bits of a distance between two float64
ORACLE = "correctly rounded"


@dataclass(frozen=True)
class Piece:
    """The same part of both arrays, which begins at `start` along `axis` of the whole."""

    a: np.ndarray
    b: np.ndarray
    start: int = 0
    axis: int = 0


def ratio_of(row: Mapping[str, Any]) -> float | None:
    """A row's largest finite error / bound over its sides; None when no side was judged."""
    ratios = [row.get(name) for name in ("ratio", "ratio_a", "ratio_b")]
    return max((r for r in ratios if r is not None and math.isfinite(r)), default=None)


def chosen_row(document: Mapping[str, Any]) -> tuple[Mapping[str, Any], str] | None:
    """The row worth a close look, and why: the culprit, else the largest error / bound, else the largest difference.

    None when nothing was judged to err and nothing differs.
    """
    culprit = document["culprit"]
    if culprit is not None:
        place = [culprit[name] for name in ("layer", "tensor", "stage")]
        row = next((r for r in document["rows"] if [r["layer"], r["tensor"], r["stage"]] == place), None)
        return None if row is None else (row, "culprit")
    for why, measure in (("largest error / bound", ratio_of), ("largest difference", _relative)):
        best = max(document["rows"], key=lambda row: measure(row) or 0.0, default=None)
        if best is not None and measure(best):
            return best, why
    return None


def _relative(row: Mapping[str, Any]) -> float | None:
    value = row.get("rel_l2")
    return value if value is not None and math.isfinite(value) else None


def against_oracle(row: Mapping[str, Any], why: str) -> str | None:
    """The side, a or b, to be shown against what is correctly rounded; None: show b against a.

    A culprit is shown as the sides differ, unless both hold the same bytes; else it is the side of the larger ratio.
    """
    if why == "largest difference" or (why == "culprit" and not row.get("byte_match")):
        return None
    ratios = {side: row.get(f"ratio_{side}") for side in ("b", "a")}
    judged = {side: ratio for side, ratio in ratios.items() if ratio}
    return max(judged, key=lambda side: judged[side], default=None)


def oracle_pieces(chunks: Iterable[Chunk], stage: Stage, options: Mapping[str, Any], axis: int) -> Iterator[Piece]:
    """One stage of a replay against what is correctly rounded from its own inputs, where these are known."""
    chosen = {option: options[option] for option in stage.options}
    for chunk in chunks:
        arguments = chunk.arguments(stage)
        if stage.name in chunk.values and arguments is not None:
            expected = consult(stage, arguments, chosen).rounded
            yield Piece(expected, chunk.values[stage.name], chunk.start if stage.by_rows else 0, axis)


def signed_ulps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How many floats of their dtype b is above a, as float64, for finite elements; +0 and -0 are one float."""
    return _ordered(b) - _ordered(a)


def _ordered(x: np.ndarray) -> np.ndarray:
    """The place of each float in the order of all floats of its dtype; exact up to 53 bits."""
    bits = x.view(np.dtype(f"i{x.dtype.itemsize}"))
    # Floats are sign and magnitude: below zero the order of the integers is the other way round, and -0 comes to 0.
    places = (bits ^ ((bits >> (8 * x.dtype.itemsize - 1)) & np.iinfo(bits.dtype).max)) + (bits < 0)
    return places.astype(np.float64)


@dataclass
class CulpritData:
    """Histogram, sample, residual map and worst elements of b against a, accumulated piece by piece.

    `axes` names the whole array's axes as the stage declares them; the map's rows are the first axis where that is
    `tokens` or `rows`, otherwise all but the last (heads by queries, against keys).
    """

    shape: tuple[int, ...]
    axes: str
    dtype: np.dtype = field(default_factory=lambda: np.dtype(np.float32))
    bins: dict[int, int] = field(default_factory=dict)
    nonfinite: int = 0
    difference: Difference = field(default_factory=lambda: Difference(WORST))

    def __post_init__(self) -> None:
        names = self.axes.split()
        by_row = len(self.shape) > 1 and names[:1] in (["tokens"], ["rows"])
        self._lead = 1 if by_row else max(len(self.shape) - 1, 0)
        self.plane = math.prod(self.shape[: self._lead]), math.prod(self.shape[self._lead :])
        self.block = math.ceil(self.plane[0] / MAP_ROWS) or 1, math.ceil(self.plane[1] / MAP_COLS) or 1
        size = [math.ceil(n / step) for n, step in zip(self.plane, self.block, strict=True)]
        self._high, self._low = np.zeros(size), np.zeros(size)
        self._sample: list[tuple[np.ndarray, np.ndarray]] = []
        self._random = np.random.default_rng(0)  # the same document for the same dumps

    def add(self, piece: Piece) -> None:
        """Add one piece of both arrays."""
        a, b = (np.ascontiguousarray(x) for x in (piece.a, piece.b))
        self.dtype = a.dtype
        self.difference.add(a, b, piece.start, piece.axis)
        self._count_ulps(a.reshape(-1), b.reshape(-1))
        self._take_sample(a.reshape(-1), b.reshape(-1))
        self._add_to_map(a, b, piece)

    def _count_ulps(self, a: np.ndarray, b: np.ndarray) -> None:
        finite = np.isfinite(a) & np.isfinite(b)
        self.nonfinite += int(a.size - np.count_nonzero(finite))
        ulps = signed_ulps(a[finite], b[finite])
        # frexp's exponent of n is its number of bits: 1 is 1, 2 and 3 are 2, 4 to 7 are 3.
        size = np.frexp(ulps)[1]
        counts = np.bincount(np.where(ulps < 0, _WIDEST - size, _WIDEST + size))
        for at in np.flatnonzero(counts):
            self.bins[int(at) - _WIDEST] = self.bins.get(int(at) - _WIDEST, 0) + int(counts[at])

    def _take_sample(self, a: np.ndarray, b: np.ndarray) -> None:
        total = max(math.prod(self.shape), 1)
        if total <= SCATTER_POINTS:
            chosen = np.arange(a.size)
        else:
            chosen = np.sort(self._random.integers(0, a.size, math.ceil(SCATTER_POINTS * a.size / total)))
        self._sample.append((a[chosen].astype(np.float64), b[chosen].astype(np.float64)))

    def _add_to_map(self, a: np.ndarray, b: np.ndarray, piece: Piece) -> None:
        lead = math.prod(a.shape[: self._lead])
        with np.errstate(invalid="ignore"):  # inf - inf: shown as not finite
            d = (b.astype(np.float64) - a.astype(np.float64)).reshape(lead, -1)
        first = piece.start * math.prod(self.shape[piece.axis + 1 : self._lead if piece.axis < self._lead else None])
        at = (first, 0) if piece.axis < self._lead else (0, first)
        index = [(begin + np.arange(n)) // step for begin, n, step in zip(at, d.shape, self.block, strict=True)]
        starts = [np.flatnonzero(np.diff(i, prepend=-1)) for i in index]
        cells = np.ix_(*(i[s] for i, s in zip(index, starts, strict=True)))
        for grid, reduce in ((self._high, np.maximum), (self._low, np.minimum)):
            grid[cells] = reduce(grid[cells], reduce.reduceat(reduce.reduceat(d, starts[0], axis=0), starts[1], axis=1))

    def result(self) -> dict[str, Any]:
        """As plain values; a map cell is its block's signed difference of largest size, None where not finite."""
        a, b = (np.concatenate(part)[:SCATTER_POINTS] for part in zip(*self._sample, strict=True))
        finite = np.isfinite(a) & np.isfinite(b)
        signed = np.where(self._high > -self._low, self._high, self._low)
        return {
            "axes": self.axes,
            "shape": list(self.shape),
            "dtype": self.dtype.name,
            "ulp": [{"from": low, "to": high, "count": n} for low, high, n in self._histogram()],
            "nonfinite": self.nonfinite,
            "scatter": {"a": _short(a[finite]), "b": _short(b[finite])},
            "map": {"values": [_short(row, 3) for row in signed], "block": list(self.block), "of": list(self.plane)},
            "worst": self._worst(),
        }

    def _histogram(self) -> Iterable[tuple[int, int, int]]:
        """First and last signed distance of each bin and its count, bins between the outermost ones all there."""
        for i in range(min(self.bins, default=0), max(self.bins, default=-1) + 1):
            ends = (2 ** (abs(i) - 1), 2 ** abs(i) - 1) if i else (0, 0)
            low, high = ends if i >= 0 else (-ends[1], -ends[0])
            yield low, high, self.bins.get(i, 0)

    def _worst(self) -> list[dict[str, Any]]:
        top: list[dict[str, Any]] = self.difference.result()["top"]
        a, b = (np.array([item[name] for item in top], self.dtype) for name in ("a", "b"))
        return [{**item, "ulps": int(n)} for item, n in zip(top, signed_ulps(a, b), strict=True)]


def culprit_data(
    row: Mapping[str, Any],
    why: str,
    pieces: Iterable[Piece],
    *,
    shape: tuple[int, ...],
    axes: str,
    labels: tuple[str, str] = ("a", "b"),
) -> dict[str, Any] | None:
    """The `culprit_data` of a document: a close look at `row`; None when it has no elements to look at."""
    data = CulpritData(shape, axes)
    for piece in pieces:
        if piece.a.shape != piece.b.shape or piece.a.dtype != piece.b.dtype:
            return None
        if piece.a.size:
            data.add(piece)
    if not data.difference.count:
        return None
    return {"key": row["key"], "why": why, "labels": list(labels), **data.result()}


def _short(values: np.ndarray, digits: int = 5) -> list[float | None]:
    """Values in so many digits as a picture needs; None where not finite."""
    return [float(f"{v:.{digits}g}") if math.isfinite(v) else None for v in values.tolist()]
