"""The order in which a recorded sum was made, from its inputs and its bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from stages.sums.evaluate import CHUNK_ELEMENTS, Products, Sum, Terms, execute
from stages.sums.orders import Order, lower
from stages.sums.program import Program

# Elements that every order is tried on first. Two orders agree in an element by chance, 1 in 3 times or fewer at
# K = 64: not in 200.
SAMPLE = 200
# With fewer results than this, other orders may fit by chance: all are tried and counted, and a margin of so few, a
# single wrong bit say, is not explained by an order of its own.
FEW = 32
# Wrong on less than this part of the sample, an order is right but for a margin; others are right by chance alone.
MOSTLY = 0.5
# A result's margins, rows or columns of a tail, may have orders of their own; more than this many is no margin.
MAX_PARTS = 6


class Evidence(Protocol):
    """Recorded results of one stage with what they were computed from: `[rows, cols]`, one row for plain sums."""

    @property
    def terms(self) -> int:
        """K, how many terms each result is the sum of."""

    @property
    def recorded(self) -> np.ndarray:
        """`[rows, cols]`, float32."""

    def compute(self, program: Program, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """The results at the points (rows[i], cols[i]) in the order of `program`."""

    def compute_all(self, program: Program, rows: np.ndarray, cols: np.ndarray) -> Iterator[np.ndarray]:
        """The results at the crossings of `rows` and `cols`, a few rows at a time."""


# What is done with sums afterwards, by element: (sums, their rows, their columns).
Finish = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def as_summed(sums: np.ndarray, _rows: np.ndarray, _cols: np.ndarray) -> np.ndarray:
    return sums


@dataclass(frozen=True)
class ProductEvidence:
    """`recorded` = `finish(a @ b)`: `[M, K]` by `[K, N]`, float32.

    Of a `b` `[heads, K, N]` each is the factor of as many rows of `a`, one head's after another's.
    """

    a: np.ndarray
    b: np.ndarray
    recorded: np.ndarray
    finish: Finish = as_summed

    @property
    def terms(self) -> int:
        return self.a.shape[1]

    def compute(self, program: Program, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        right = self.b.T[cols] if self.b.ndim == 2 else self.b[rows // self._each, :, cols]
        return self.finish(execute(program, Products(self.a[rows], right)), rows, cols)

    def compute_all(self, program: Program, rows: np.ndarray, cols: np.ndarray) -> Iterator[np.ndarray]:
        step = max(1, CHUNK_ELEMENTS // max(1, cols.size))
        head = rows // self._each
        for own in np.split(rows, np.flatnonzero(np.diff(head)) + 1):
            b = self.b if self.b.ndim == 2 else self.b[own[0] // self._each]
            right = b.T[cols][None]
            for start in range(0, own.size, step):
                some = own[start : start + step, None]
                yield self.finish(execute(program, Products(self.a[some], right)), some, cols)

    @property
    def _each(self) -> int:
        """Rows of `a` that one factor is of."""
        return len(self.a) // (1 if self.b.ndim == 2 else len(self.b))


@dataclass(frozen=True)
class RowEvidence:
    """`recorded` = `finish` of each row's sum of squares over `x` `[M, K]`: what norms do."""

    x: np.ndarray
    recorded: np.ndarray
    finish: Finish

    @property
    def terms(self) -> int:
        return self.x.shape[1]

    def compute(self, program: Program, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        some, which = np.unique(rows, return_inverse=True)
        return self.finish(self._sums(program, some)[which], rows, cols)

    def compute_all(self, program: Program, rows: np.ndarray, cols: np.ndarray) -> Iterator[np.ndarray]:
        yield self.finish(self._sums(program, rows)[:, None], rows[:, None], cols)

    def _sums(self, program: Program, rows: np.ndarray) -> np.ndarray:
        return execute(program, Products(self.x[rows], self.x[rows]))


@dataclass(frozen=True)
class SumEvidence:
    """`recorded[0, i]` = `finish(sums)[i]`, the sums over `x[parts, i, K]`: several sums may make one result."""

    x: np.ndarray
    recorded: np.ndarray
    finish: Callable[[np.ndarray], np.ndarray] = field(default=lambda sums: sums[0])
    squares: bool = False

    @property
    def terms(self) -> int:
        return self.x.shape[-1]

    def compute(self, program: Program, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        chosen = self.x[:, cols]
        terms: Terms = Products(chosen, chosen) if self.squares else Sum(chosen)
        return self.finish(execute(program, terms))

    def compute_all(self, program: Program, rows: np.ndarray, cols: np.ndarray) -> Iterator[np.ndarray]:
        yield self.compute(program, np.zeros_like(cols), cols)[None]


@dataclass(frozen=True)
class Part:
    """Rows and columns of a result that one order reproduces, byte by byte."""

    order: Order
    rows: np.ndarray
    cols: np.ndarray


@dataclass(frozen=True)
class Inference:
    """What was found: orders of the parts of a result, or the best order and how much it leaves.

    `remaining` of `elements` results are not reproduced; `also` counts other orders that fit as well, where there
    were too few results to tell; `tried` orders were tried.
    """

    elements: int
    remaining: int
    parts: tuple[Part, ...]
    best: Order | None
    tried: int
    also: int = 0

    @property
    def complete(self) -> bool:
        return self.remaining == 0


def infer(evidence: Evidence, orders: Callable[[int], Iterable[Order]]) -> Inference:
    """The order among `orders(K)` that reproduces every recorded byte; margins may have another one."""
    rows, cols = (np.arange(size) for size in evidence.recorded.shape)
    search = _Search(evidence, orders)
    search.run(rows, cols)
    return Inference(
        evidence.recorded.size, search.remaining, tuple(search.parts), search.best, search.tried, search.also
    )


class _Search:
    """The state of one inference: parts explained so far, and what could not be."""

    def __init__(self, evidence: Evidence, orders: Callable[[int], Iterable[Order]]):
        self.evidence, self.orders = evidence, orders
        self.parts: list[Part] = []
        self.remaining = self.also = self.tried = 0
        self.best: Order | None = None

    def run(self, rows: np.ndarray, cols: np.ndarray) -> None:
        """Explain the crossings of `rows` and `cols`: all by one order, or a part by one and margins by others."""
        fits = self._fitting(rows, cols)
        order, wrong = min(fits, key=lambda fit: int(fit[1].sum()))
        if not wrong.any():
            others = {lower(other, self.evidence.terms).steps for other, mask in fits if not mask.any()}
            self.also += len(others) - 1
        self.best = self.best or order
        margin = _margin(wrong)
        if not wrong.any():
            self.parts.append(Part(order, rows, cols))
        elif margin is None or len(self.parts) >= MAX_PARTS or _crossings(wrong, *margin) < FEW:
            self.remaining += int(wrong.sum())
        else:
            axis, chosen = margin
            kept = ~chosen
            self.parts.append(Part(order, rows[kept] if axis == 0 else rows, cols[kept] if axis == 1 else cols))
            self.run(rows[chosen] if axis == 0 else rows, cols[chosen] if axis == 1 else cols)

    def _fitting(self, rows: np.ndarray, cols: np.ndarray) -> list[tuple[Order, np.ndarray]]:
        """Orders with a mask of what each gets wrong: one that fits all but a margin, or the best on the sample."""
        at = _sample(rows, cols)
        expected = _bits(self.evidence.recorded[at])
        scores = []
        for order in self.orders(self.evidence.terms):
            program = lower(order, self.evidence.terms)
            self.tried += 1
            wrong = int((_bits(self.evidence.compute(program, *at)) != expected).sum())
            scores.append((wrong, order, program))
            if wrong < MOSTLY * expected.size and rows.size * cols.size > FEW:
                mask = self._wrong(program, rows, cols)
                if not mask.any() or _margin(mask) is not None:
                    return [(order, mask)]
        scores.sort(key=lambda score: score[0])
        perfect = [score for score in scores if score[0] == 0]
        return [(order, self._wrong(program, rows, cols)) for _, order, program in (perfect or scores[:2])]

    def _wrong(self, program: Program, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """`[rows, cols]`: what the order of `program` does not reproduce."""
        masks, start = [], 0
        for values in self.evidence.compute_all(program, rows, cols):
            recorded = self.evidence.recorded[np.ix_(rows[start : start + len(values)], cols)]
            masks.append(_bits(values) != _bits(recorded))
            start += len(values)
        return np.concatenate(masks)


def _sample(rows: np.ndarray, cols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points to try orders on, the same for every order: all of a few, random ones of many."""
    if rows.size * cols.size <= SAMPLE:
        grid = np.meshgrid(rows, cols, indexing="ij")
        return grid[0].ravel(), grid[1].ravel()
    rng = np.random.default_rng(0)
    return rng.choice(rows, SAMPLE), rng.choice(cols, SAMPLE)


def _margin(wrong: np.ndarray) -> tuple[int, np.ndarray] | None:
    """The rows (axis 0) or columns (1) that hold all that is wrong, as a mask: at most half, and few crossings."""
    found = []
    for axis in (0, 1):
        chosen = np.asarray(wrong.any(axis=1 - axis))
        if 0 < chosen.sum() <= chosen.size // 2:
            found.append((axis, chosen))
    return min(found, key=lambda margin: _crossings(wrong, *margin), default=None)


def _crossings(wrong: np.ndarray, axis: int, chosen: np.ndarray) -> int:
    """How many results a margin holds."""
    return int(chosen.sum()) * wrong.shape[1 - axis]


def _bits(values: np.ndarray) -> np.ndarray:
    """Float32 as its bytes: NaN equals itself, and 0 is not -0."""
    return np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
