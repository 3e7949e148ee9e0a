"""Which order a backend sums in, revealed by probing: products of several shapes, sums, mean squares, softmax."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from stages.order.black_boxes import ProductBox, RowBox
from stages.order.recognise import recognise
from stages.order.reveal import NoTreeError, reveal, reveal_positive
from stages.sums.orders import Explicit, Order, fused, lower
from stages.sums.program import Program, Step, Tree

# Swallows any sum of as many ones as a matrix has columns, and is far from overflow.
_LARGE = np.float32(2.0**60)
# 1 + 2^-12: its square, 1 + 2^-11 + 2^-24, is rounded to 1 + 2^-11 unless it is fused.
_ODD = np.float32(1 + 2.0**-12)
_ODD_SQUARE = np.float32(1 + 2.0**-11)
# Pairs of terms whose meeting tells parts of a product apart that are summed in different ways.
_SIGNATURE_PAIRS = 24
# Terms that are tested for FMA, spread over the K of them, in every region.
_FMA_TESTS = 12


@dataclass(frozen=True)
class Region:
    """Elements of a result that are summed alike: `rows` and `cols` as ranges, None where there is one sum."""

    rows: str
    cols: str
    elements: int
    order: Order


class ProductProbe:
    """Questions to a product of one shape."""

    def __init__(self, box: ProductBox, shape: tuple[int, int, int]):
        self._box, (self.m, self.n, self.k) = box, shape

    def regions(self) -> list[Region]:
        """The parts of the product that are summed alike, the largest first, and their orders."""
        label = self._labels()
        found = []
        for value in range(int(label.max()) + 1):
            rows, cols = np.nonzero(label == value)
            found.append(Region(ranges(rows), ranges(cols), rows.size, self._order(rows, cols)))
        return sorted(found, key=lambda region: -region.elements)

    def _labels(self) -> np.ndarray:
        """`[M, N]`: elements with the same number answered every sampled question alike."""
        rng = np.random.default_rng(0)
        pairs = [(0, 1), (0, self.k // 2), (0, self.k - 1)]
        pairs += [tuple(rng.choice(self.k, 2, replace=False)) for _ in range(_SIGNATURE_PAIRS)]
        answers = []
        for i, j in pairs:
            a = np.ones((self.m, self.k), np.float32)
            a[:, i], a[:, j] = _LARGE, -_LARGE
            answers.append(self._box(a, np.ones((self.k, self.n), np.float32)))
        _, label = np.unique(np.stack(answers).reshape(len(pairs), -1), axis=1, return_inverse=True)
        return label.reshape(self.m, self.n)

    def _order(self, rows: np.ndarray, cols: np.ndarray) -> Order:
        ask = _Region(self._box, (self.m, self.n, self.k), rows, cols)
        return with_fma(reveal(self.k, ask.meeting), ask.fuses)


class _Region:
    """Questions to the elements of one region: a row or a column of it takes one question each."""

    def __init__(self, box: ProductBox, shape: tuple[int, int, int], rows: np.ndarray, cols: np.ndarray):
        self._box, (self.m, self.n, self.k) = box, shape
        in_column, in_row = rows[cols == cols[0]], cols[rows == rows[0]]
        self._by_rows = in_column.size >= in_row.size
        self._slots, self._fixed = (in_column, cols[0]) if self._by_rows else (in_row, rows[0])

    def _ask(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """The sums of products of each question's `left` `[questions, K]` and the one `right` `[K]`."""
        answers: list[np.ndarray] = []
        slots, count = self._slots, self.m if self._by_rows else self.n
        for start in range(0, len(left), slots.size):
            part = left[start : start + slots.size]
            probes = np.repeat(part[:1], count, axis=0)
            probes[slots[: len(part)]] = part
            if self._by_rows:
                out = self._box(probes, np.repeat(right[:, None], self.n, axis=1))[:, self._fixed]
            else:
                out = self._box(np.repeat(right[None], self.m, axis=0), np.ascontiguousarray(probes.T))[self._fixed]
            answers.append(out[slots[: len(part)]])
        return np.concatenate(answers)

    def meeting(self, i: int, js: Sequence[int]) -> np.ndarray:
        probes = np.ones((len(js), self.k), np.float32)
        probes[:, i] = _LARGE
        probes[np.arange(len(js)), js] = -_LARGE
        return self.k - self._ask(probes, np.ones(self.k, np.float32)).astype(int)

    def fuses(self, term: int, other: int) -> bool:
        """Whether `term` is added unrounded to a sum that holds `other`."""
        left, right = np.zeros((1, self.k), np.float32), np.zeros(self.k, np.float32)
        left[0, term], right[term] = _ODD, _ODD
        left[0, other], right[other] = -_ODD_SQUARE, 1
        return bool(self._ask(left, right)[0] != 0)


def with_fma(tree: Tree, fuses: Callable[[int, int], bool]) -> Order:
    """The order of `tree`, its innermost chains by FMA when every tested term that such a chain fuses is fused.

    An explicit order, with every term tested, when some are and some are not; and when some are in an order without
    chains, as one without a name is.
    """
    plain = recognise(tree)
    chained = [(step.of, step.into) for step in lower(fused(plain), tree.size).steps if step.fused]
    asked = chained or [alone[0] for _, alone in _alone(tree) if alone]
    chosen = [asked[k] for k in np.linspace(0, len(asked) - 1, min(_FMA_TESTS, len(asked))).astype(int)]
    answers = {fuses(*question) for question in chosen}
    if True not in answers:
        return plain
    if chained and answers == {True}:
        return fused(plain)
    return Explicit(Program(tree.size, tuple(_tested(tree, fuses))))


def _tested(tree: Tree, fuses: Callable[[int, int], bool]) -> Iterable[Step]:
    slot = list(range(tree.size))  # by its least term, what an accumulator is called
    for (a, b), alone in _alone(tree):
        taken = next((question for question in alone if fuses(*question)), None)
        of, into = taken or (b, a)
        yield Step(slot[into], slot[of], fused=taken is not None)
        slot[a] = slot[into]


def _alone(tree: Tree) -> Iterable[tuple[tuple[int, int], list[tuple[int, int]]]]:
    """Each addition, by the least terms of its sides, with the (term, other side) of it where a side is one term."""
    lone = set(range(tree.size))
    for _, a, b in tree.merges:
        yield (a, b), [(of, into) for of, into in ((b, a), (a, b)) if of in lone]
        lone -= {a, b}


def total(box: Callable[[np.ndarray], float], size: int) -> Order:
    """The order of a sum of `size` terms of any sign."""

    def meeting(i: int, js: Sequence[int]) -> np.ndarray:
        sizes = []
        for j in js:
            terms = np.ones(size, np.float32)
            terms[i], terms[j] = _LARGE, -_LARGE
            sizes.append(size - int(box(terms)))
        return np.array(sizes)

    return recognise(reveal(size, meeting))


class SquaresProbe:
    """Questions to RMSNorm: terms are squares, and what comes out is the reciprocal root of their mean.

    An element x = 2^-40 adds nothing to the sum, and its result is 2^-40 times that root, exactly.
    """

    TINY = np.float32(2.0**-40)
    SMALL = np.float32(2.0**-12)  # its square is half the last bit of a number from 1 to 2

    def __init__(self, box: RowBox, size: int, rows: int):
        self._box, self._size, self._rows = box, size, rows
        self._large = self._visible()

    def order(self) -> Order:
        return with_fma(reveal_positive(self._size, self._apart), self._fuses)

    def _roots(self, terms: np.ndarray, at: np.ndarray) -> np.ndarray:
        """The reciprocal root of every row's mean; `at` is a place in each row whose element is a power of two."""
        out = []
        for start in range(0, len(terms), self._rows):
            part = terms[start : start + self._rows]
            padded = np.ones((self._rows, self._size), np.float32)
            padded[: len(part)] = part
            out.append(self._box(padded)[: len(part)])
        each = np.arange(len(terms))
        return np.concatenate(out)[each, at] / terms[each, at]

    def _visible(self) -> np.float32:
        """A number whose square's last bit shows in the result; roots have half as many values as their squares."""
        tries = np.arange(2048, 2890, dtype=np.float32) / 2048
        same = np.zeros((tries.size, self._size), np.float32)
        same[:, 0], same[:, -1] = tries, self.TINY
        more = same.copy()
        more[:, 1] = 1.25 * self.SMALL
        last = np.full(tries.size, self._size - 1)
        seen = np.flatnonzero(self._roots(same, last) != self._roots(more, last))
        if seen.size == 0:
            raise NoTreeError("a change in the last bit of a mean square never showed in the result")
        return tries[seen[0]]

    def _apart(self, i: np.ndarray, j: np.ndarray, k: np.ndarray) -> np.ndarray:
        terms = np.zeros((len(i), self._size), np.float32)
        each = np.arange(len(i))
        terms[each, i] = self._large
        terms[each, j] = terms[each, k] = self.SMALL
        alone = np.zeros_like(terms)
        alone[each, i], alone[each, j] = self._large, self.TINY
        return self._roots(terms, j) != self._roots(alone, j)

    def _fuses(self, term: int, other: int) -> bool:
        """Whether x^2 of `term` is added unrounded to a sum that holds `other`.

        With q odd, q^2 2^-24 + (1 + 2^-12)^2 / 4 lies 2^-26 above the middle of two float32 numbers, and the lower
        one is even: unfused it becomes `low`, fused `high`. A number whose own rounded square is one of them gives
        that one's root; another root than this must come from the other.
        """
        at = next(place for place in range(3) if place not in (term, other))
        pairs, singles, answers = [], [], []
        for q in range(4095, 3548, -2):
            middle = q * q + (1 << 22) + (1 << 11)  # in units of 2^-24
            for value, if_other in ((middle - 1, True), (middle + 1, False)):
                if (single := _root_of_square(value * 2.0**-24)) is not None:
                    pairs.append(self._row({at: self.TINY, other: np.float32(q / 4096), term: _ODD / 2}))
                    singles.append(self._row({at: self.TINY, other: single}))
                    answers.append(if_other)
        where = np.full(len(pairs), at)
        differ = self._roots(np.array(pairs), where) != self._roots(np.array(singles), where)
        told = set(np.array(answers)[differ].tolist())
        if len(told) != 1:
            raise NoTreeError(f"mean squares said {'nothing' if not told else 'yes and no'} about fused squares")
        return told.pop()

    def _row(self, elements: dict[int, np.float32]) -> np.ndarray:
        row = np.zeros(self._size, np.float32)
        for place, value in elements.items():
            row[place] = value
        return row


def _root_of_square(value: float) -> np.float32 | None:
    """A float32 number whose rounded square is `value`."""
    near = np.float32(np.sqrt(value))
    tries = (np.nextafter(near, np.float32(0)), near, np.nextafter(near, np.float32(4)))
    return next((x for x in tries if x * x == np.float32(value)), None)


def softmax(box: RowBox, size: int) -> Order:
    """The order of a softmax's denominator over `size` keys: exponentials, never negative.

    exp(0) = 1 takes the first half of the last bit without a change and two of them together with one; 3/4 of that
    half, so that an inexact exponential does not matter.
    """
    small = np.float32(np.log(0.75 * 2.0**-24))

    def apart(i: np.ndarray, j: np.ndarray, k: np.ndarray) -> np.ndarray:
        scores = np.full((len(i), size), -np.inf, np.float32)
        each = np.arange(len(i))
        scores[each, i], scores[each, j], scores[each, k] = 0, small, small
        out = [box(padded)[: stop - start] for start, stop, padded in _batches(scores)]
        return np.concatenate(out)[each, i] != 1

    return recognise(reveal_positive(size, apart))


def _batches(rows: np.ndarray, size: int = 256) -> Iterable[tuple[int, int, np.ndarray]]:
    """Parts of `size` rows, the last one padded with its first row: a compiled function sees one shape."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield start, start + len(part), np.concatenate([part, np.repeat(part[:1], size - len(part), axis=0)])


def ranges(numbers: np.ndarray) -> str:
    """Distinct numbers as ranges, `0:4, 8:10`."""
    distinct = np.unique(numbers)
    starts = np.flatnonzero(np.diff(distinct, prepend=distinct[0] - 2) != 1)
    parts = [f"{run[0]}:{run[-1] + 1}" for run in np.split(distinct, starts[1:])]
    return ", ".join(parts if len(parts) <= 4 else [*parts[:2], "...", parts[-1]])
