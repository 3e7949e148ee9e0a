"""Which elements of a weight explain a wrong stage, what became of them, and how alone that explanation is.

Every recorded number says in which cell the sum lay before it was rounded. If one number of a weight is wrong, by d,
then d x_t lies in cell_t - value_t at every token t: d is in the intersection of (cell_t - value_t) / x_t, and few
elements of the row have one. What a wrong number usually is (its sign, 0, a neighbour) is asked before what fits best.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from stages.oracle import bounds as noise
from stages.oracle.rounding import round_once
from stages.oracle.verdict import OPERANDS, Oracle
from stages.recipes.recorded_product import Product, beyond, cell, is_product
from stages.spec.noise import Noise

# A fitted number is told only if it differs from the right one by this much of it, or of the row's largest: less is
# what the rounding of a sum may be taken for.
CLEAR = 256 * noise.U32
# Bits by which the record must exclude an unrelated error for an explanation to be told flatly: one in 1,000.
EVIDENT = 10
# Of more wrong columns than these, or than a 16th of all, a few elements are not the reason.
_FEW = 4
# Rows explained at most; further ones are counted.
_TOLD = 3
# Longest row in which all pairs of elements are tried as swapped: their number is squared.
_PAIRS = 4096
# Columns looked at together, so that tokens x columns of float64 stay small.
_BLOCK = 512

_NARROWEST = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32))


@dataclass(frozen=True)
class Explanation:
    """What became of an element, or a few, in words.

    `left` is the largest error / bound after it, `next_best` the same for the next best element of that row; None
    where no other was asked.
    """

    text: str
    left: float
    next_best: float | None = None

    def __str__(self) -> str:
        after = f"{self.text}; that leaves {self.left:.2g} of the bound"
        return after if self.next_best is None else f"{after}, the next best element {self.next_best:.3g}"


def stored_as(weight: np.ndarray) -> np.dtype:
    """The narrowest dtype that holds every value of a weight: what it is stored in, whatever it was cast to."""
    with np.errstate(over="ignore"):
        return next(
            dtype
            for dtype in _NARROWEST
            if dtype == np.float32 or np.array_equal(weight.astype(dtype).astype(np.float32), weight.astype(np.float32))
        )


def interval(least: np.ndarray, most: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each column of `x` `[tokens, columns]` the numbers d with least <= d x <= most at every token.

    `least` and `most` are `[tokens, 1]` or as `x`. Where there are none, the least is larger than the most.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b = least / x, most / x
    free = (least <= 0) & (most >= 0)
    zero = x == 0
    low = np.where(zero, np.where(free, -np.inf, np.inf), np.minimum(a, b))
    high = np.where(zero, np.where(free, np.inf, -np.inf), np.maximum(a, b))
    return low.max(axis=0, initial=-np.inf), high.min(axis=0, initial=np.inf)


def shortest(least: float, most: float) -> float:
    """The number between the two that has the fewest decimal digits."""
    middle = (least + most) / 2
    short = (float(f"{middle:.{digits}g}") for digits in range(1, 17))
    return next((value for value in short if least <= value <= most), middle)


def explain_elements(oracle: Oracle, observed: np.ndarray, start: int = 0) -> Explanation | None:
    """The elements of its weight that explain a wrong product or norm; None where a few do not.

    `start` is the weight's first row, where the oracle speaks of a part of them.
    """
    if is_product(oracle, observed):
        return _of_product(Product(oracle, observed, start))
    if oracle.stage.noise is Noise.RMS_NORM:
        return _of_norm(oracle, observed)
    return None


def _few(wrong: np.ndarray) -> list[int]:
    """The wrong columns of `[tokens, columns]`, if these are few."""
    columns = np.flatnonzero(wrong.any(axis=0))
    return [int(j) for j in columns] if len(columns) <= max(_FEW, wrong.shape[1] // 16) else []


# -- products -------------------------------------------------------------------------------------------------------


def _of_product(product: Product) -> Explanation | None:
    columns = _few(beyond(product.oracle, product.observed))
    found: list[tuple[int, Explanation, int | None]] = []
    for j in columns[: 2 * _TOLD]:
        one = next((one for explain in _ROWS for one in [explain(_Row(product, j))] if one is not None), None)
        if one is None:
            return None
        found.append((j, *one))
    return _joined(product, found, len(columns)) if found else None


class _Row:
    """One wrong column j of a product: the weight's row j and the cells in which the sums lay."""

    def __init__(self, product: Product, j: int):
        self.product, self.j = product, j
        self.weights, self.x = product.b[:, j].astype(np.float64), product.a
        self.length = len(self.weights) - product.has_bias  # of the weight's row, without its bias
        self.least, self.most = product.cells(j)
        value = product.oracle.value[:, j]
        # What must be added to the right sums: between these.
        self.low, self.high = self.least - value, self.most - value
        self.error, self.half = (self.low + self.high) / 2, np.maximum((self.high - self.low) / 2, noise.TINY)

    def holds(self, sums: np.ndarray) -> np.ndarray:
        """For each column of sums `[tokens, n]`, whether all lie in their cells."""
        inside = (self.least[:, None] <= sums) & (sums <= self.most[:, None])
        return np.asarray(inside.all(axis=0))

    def left(self, change: np.ndarray) -> float:
        """The largest error / bound when `change` is added to the right sums."""
        return float((np.abs(self.error - change) / self.half).max())

    def evidence(self, freedom: int, candidates: float) -> float:
        return _evidence(self.error, self.half, freedom, candidates)


def _evidence(error: np.ndarray, half: np.ndarray, freedom: int, candidates: float) -> float:
    """Bits by which the record excludes an unrelated error as large: of all tokens but as many as were fitted."""
    gains = np.sort(np.log2(np.maximum(np.abs(error) / half, 1)))
    return float(gains[: len(gains) - freedom].sum() - np.log2(max(candidates, 1)))


_Found = tuple[Explanation, int | None]  # and the row that this one is, if another


def _zero_row(row: _Row) -> _Found | None:
    weights = row.weights.copy()
    weights[: row.length] = 0
    sums = row.x @ weights
    if not row.weights.any() or not row.holds(sums[:, None])[0] or not row.evidence(0, 1) > EVIDENT:
        return None
    return Explanation(f"{row.product.whole(row.j)} is 0", row.left(sums - row.x @ row.weights)), None


def _one_element(row: _Row) -> _Found | None:
    least, most = _open(row)
    fitting = np.flatnonzero(least <= most)
    if not len(fitting) or len(row.x) < 2:
        return None
    residuals = _residuals(row)
    k = int(fitting[np.argmin(residuals[fitting])])
    at, old = row.product.place(row.j, k), float(row.weights[k])
    weight = row.product.part(row.j).weight
    new, text = become(at, old, old + float(least[k]), old + float(most[k]), _neighbours(row, k), stored_as(weight))
    if abs(new - old) < CLEAR * abs(old):
        return None
    others = np.delete(residuals, k)
    next_best = float(others.min()) if len(others) else None
    certain = row.evidence(1, len(row.weights)) >= EVIDENT
    # An error about as large as its cells says little of its size, and a bit at each token by where it lies.
    if not certain and (len(fitting) > 1 or len(row.x) - 1 - np.log2(len(row.weights)) < EVIDENT):
        return None
    if len(fitting) > len(row.weights) // 4:
        return None
    if len(fitting) > 1:
        text = f"{text} (or one of {len(fitting) - 1} others in that row, which fit too)"
    return Explanation(text if certain else f"perhaps {text}", row.left((new - old) * row.x[:, k]), next_best), None


def _open(row: _Row) -> tuple[np.ndarray, np.ndarray]:
    """For each element of the row what may have been added to it: least and most."""
    parts = [
        interval(row.low[:, None], row.high[:, None], row.x[:, at : at + _BLOCK])
        for at in range(0, row.x.shape[1], _BLOCK)
    ]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def _residuals(row: _Row) -> np.ndarray:
    """For each element of the row the largest error / bound that its best change leaves."""
    worst = np.empty(row.x.shape[1])
    error = row.error / row.half
    for at in range(0, row.x.shape[1], _BLOCK):
        x = row.x[:, at : at + _BLOCK] / row.half[:, None]
        d = (error @ x) / np.maximum((x * x).sum(axis=0), noise.TINY)
        worst[at : at + _BLOCK] = np.abs(error[:, None] - x * d).max(axis=0)
    return worst


def _neighbours(row: _Row, k: int) -> list[tuple[str, float]]:
    """The elements beside one, with where they are."""
    product, j = row.product, row.j
    if k >= row.length:
        return []
    columns = product.part(j).columns
    in_row, across = ("on the left", "on the right"), ("above", "below")
    if not product.by_rows:
        in_row, across = across, in_row
    found = [(word, row.weights[i]) for word, i in zip(in_row, (k - 1, k + 1), strict=True) if 0 <= i < row.length]
    rows = [(word, i) for word, i in zip(across, (j - 1, j + 1), strict=True) if columns.start <= i < columns.stop]
    return [(word, float(v)) for word, v in [*found, *((word, product.b[k, i]) for word, i in rows)]]


def _another_row(row: _Row) -> _Found | None:
    product, j = row.product, row.j
    columns = product.part(j).columns
    sums = product.oracle.value[:, columns]
    spread = np.maximum(sums.std(axis=1), noise.TINY)
    bits = np.log2(np.maximum(spread / row.half, 1)).sum() - np.log2(sums.shape[1])
    if product.has_bias:  # the bias is another tensor, and stays
        sums = sums + (product.b[-1, j].astype(np.float64) - product.b[-1, columns])
    fitting = [int(k) for k in np.flatnonzero(row.holds(sums)) if k + columns.start != j]
    if len(fitting) != 1 or bits < EVIDENT:
        return None
    k = fitting[0]
    left = row.left(sums[:, k] - product.oracle.value[:, j])
    other = product.index(k + columns.start)
    return Explanation(f"{product.whole(j)} is row {other}'s", left), k + columns.start


def _row_times(row: _Row) -> _Found | None:
    if row.evidence(1, 1) < EVIDENT:
        return None
    bias = row.weights[-1] if row.product.has_bias else 0.0
    weights = row.weights[: row.length]
    sums = row.x[:, : len(weights)] @ weights
    edges = interval((row.least - bias)[:, None], (row.most - bias)[:, None], sums[:, None])
    low, high = (float(edge[0]) for edge in edges)
    factor, changed = shortest(low, high), None
    if low <= high:
        changed = factor * sums
    else:  # of a narrow weight each element was rounded, and no factor fits as it is
        x = sums / row.half
        estimate, dtype = 1 + float(x @ (row.error / row.half) / (x @ x)), stored_as(row.product.part(row.j).weight)
        for factor in _short_near(estimate):
            rounded = row.x[:, : len(weights)] @ round_once(weights * factor, dtype).astype(np.float64)
            if row.holds((rounded + bias)[:, None])[0]:
                changed, low, high = rounded, factor, factor
                break
    if changed is None or not clear_of_one(low, high):
        return None
    text = "has its sign flipped" if factor == -1 else f"is {factor:.9g} times what it should be"
    return Explanation(f"{row.product.whole(row.j)} {text}", row.left(changed - sums)), None


def _short_near(x: float) -> list[float]:
    """Numbers of three digits or fewer near `x`: a row of rounded elements tells its factor to a few percent."""
    unit = 10.0 ** (np.floor(np.log10(max(abs(x), noise.TINY))) - 2)
    near = np.rint(x / unit) + np.arange(-3, 4)
    return sorted((float(f"{n * unit:.3g}") for n in near), key=lambda value: (len(f"{value:g}"), abs(value - x)))


def _two_swapped(row: _Row) -> _Found | None:
    n = row.length
    if n > _PAIRS or row.evidence(0, n * n / 2) < EVIDENT:
        return None
    w = row.weights[:n]
    # At the token that excludes most, then the few pairs left at all the others.
    t = int(np.argmax(np.abs(row.error) / row.half))
    moved = (w[None] - w[:, None]) * (row.x[t, :n][:, None] - row.x[t, :n][None])
    pairs = np.argwhere(np.triu((row.low[t] <= moved) & (moved <= row.high[t]), 1))
    if not len(pairs):
        return None
    a, b = pairs.T
    changes = (w[b] - w[a]) * (row.x[:, a] - row.x[:, b])
    inside = ((row.low[:, None] <= changes) & (changes <= row.high[:, None])).all(axis=0)
    if inside.sum() != 1:
        return None
    one, other = (int(i) for i in pairs[int(np.argmax(inside))])
    places = row.product.place(row.j, one), row.product.place(row.j, other)
    return Explanation(f"{places[0]} and {places[1]} are swapped", row.left(changes[:, int(np.argmax(inside))])), None


def _two_elements(row: _Row) -> _Found | None:
    if row.evidence(2, len(row.weights) ** 2 / 2) < EVIDENT:
        return None
    weight = row.product.part(row.j).weight
    dtype = stored_as(weight)
    x, error = row.x / row.half[:, None], row.error / row.half
    squares = np.maximum((x * x).sum(axis=0), noise.TINY)
    for a in map(int, np.argsort(-np.abs(error @ x) / np.sqrt(squares))[:6]):
        rest = x - np.outer(x[:, a], x[:, a] @ x / squares[a])
        norms = (rest * rest).sum(axis=0)
        b = int(np.argmax(np.where(norms > 1e-9 * squares, (error @ rest) ** 2 / np.maximum(norms, noise.TINY), 0)))
        change = np.linalg.lstsq(x[:, [a, b]], error, rcond=None)[0]
        new = [float(round_once(row.weights[k : k + 1] + d, dtype)[0]) for k, d in zip((a, b), change, strict=True)]
        added = (new[0] - row.weights[a]) * row.x[:, a] + (new[1] - row.weights[b]) * row.x[:, b]
        if a != b and ((row.low <= added) & (added <= row.high)).all():
            both = sorted(zip((a, b), new, strict=True))
            text = " and ".join(
                become(row.product.place(row.j, k), float(row.weights[k]), value, value, _neighbours(row, k), dtype)[1]
                for k, value in both
            )
            return Explanation(text, row.left(added)), None
    return None


# In the order in which they are asked.
_ROWS: tuple[Callable[[_Row], _Found | None], ...] = (
    _zero_row,
    _one_element,
    _another_row,
    _row_times,
    _two_swapped,
    _two_elements,
)


def _joined(product: Product, found: list[tuple[int, Explanation, int | None]], count: int) -> Explanation:
    """All rows' explanations as one; two that hold each other's values are swapped."""
    left = max(one.left for _, one, _ in found)
    if count == len(found) == 2 and [other for *_, other in found] == [found[1][0], found[0][0]]:
        one, other = (product.index(j) for j, *_ in found)
        return Explanation(f"rows {one} and {other} of {product.part(found[0][0]).name} are swapped", left)
    text = "; ".join(one.text for _, one, _ in found[:_TOLD])
    text += f"; and {count - _TOLD} rows more" if count > _TOLD else ""
    return Explanation(text, left, found[0][1].next_best if count == 1 else None)


# -- what a number became -------------------------------------------------------------------------------------------


def become(
    at: str, old: float, least: float, most: float, neighbours: Iterable[tuple[str, float]], dtype: np.dtype
) -> tuple[float, str]:
    """What the element `at` is instead of `old`, and that in words, if it lies between `least` and `most`.

    Flatly only if the record leaves one number of `dtype`, or a 16th of the change; about so much otherwise.
    """
    likely = next((u for u in usual(at, old, neighbours, dtype) if least <= u[0] <= most and u[0] != old), None)
    middle = (least + most) / 2
    nearest = float(round_once(np.array([middle]), dtype)[0])
    alone = least <= nearest <= most and not any(least <= _step(nearest, n, dtype) <= most for n in (-1, 1))
    sharp = alone or most - least <= abs(middle - old) / 16
    if likely is not None:
        new, text = likely
        return new, text if sharp else f"{at} is about {shortest(least, most):.6g}, not {old:.6g}: perhaps {text}"
    if alone:
        return nearest, f"{at} is {nearest:.6g}, not {old:.6g}"
    return middle, f"{at} is about {shortest(least, most):.6g}, not {old:.6g}"


def usual(at: str, old: float, neighbours: Iterable[tuple[str, float]], dtype: np.dtype) -> Iterator[tuple[float, str]]:
    """What a wrong number most often is."""
    yield -old, f"the sign of {at} is flipped"
    yield 0.0, f"{at} is 0, not {old:.6g}"
    for word, value in neighbours:
        yield value, f"{at} equals its neighbour's {word}: {value:.6g}, not {old:.6g}"
    for n, word in ((1, "one"), (-1, "one"), (2, "two"), (-2, "two")):
        new = _step(old, n, dtype)
        yield new, f"{at} differs by {word} {dtype.name} step{'s' * (word == 'two')}: {new:.9g}, not {old:.9g}"
    for power in (1, -1, 2, -2, 4, -4, 8, -8, 16, -16):
        new = old * 2.0**power
        yield new, f"{at} is 2^{power} times what it should be: {new:.6g}, not {old:.6g}"


def _step(x: float, n: int, dtype: np.dtype) -> float:
    """`x`, a number of `dtype`, and `n` steps of that dtype away from 0."""
    bits = np.array([x], dtype).view(f"u{dtype.itemsize}")
    return float((bits.astype(np.int64) + n).astype(bits.dtype).view(dtype)[0])


def clear_of_one(least: float, most: float) -> bool:
    """Whether a factor between the two is surely another number than 1."""
    return most < 1 - CLEAR or least > 1 + CLEAR


# -- norms ----------------------------------------------------------------------------------------------------------


def _of_norm(oracle: Oracle, observed: np.ndarray) -> Explanation | None:
    """Elements of a norm's weight: each gives one column by itself, y = normed * weight."""
    operands: Any = OPERANDS[oracle.stage.function](*oracle.arguments, **oracle.options)
    normed, weight, dtype = operands
    wide = weight.shape[-1]
    y, n = observed.reshape(-1, wide), normed.reshape(-1, wide)
    columns = _few(beyond(oracle, observed).reshape(-1, wide))
    texts, left, stored = [], 0.0, stored_as(oracle.arguments[-1])
    for j in columns[: 2 * _TOLD]:
        factor = noise.prescribed(n[:, j], dtype)
        # The noise of the normed value, to which the weight is a factor: the same part of what was recorded.
        lam = oracle.lambdas[Noise.RMS_NORM]
        error = noise.norm_bound(lam, n, np.ones(wide), dtype, n)[:, j]
        part = error / np.maximum(np.abs(factor), noise.TINY)
        least, most = cell(y[:, j])
        e = (part + noise.U32) * np.abs(y[:, j].astype(np.float64)) + noise.TINY
        low, high = interval((least - e)[:, None], (most + e)[:, None], factor[:, None])
        if not low[0] <= high[0]:
            return None
        at, old = f"{oracle.stage.params[-1]}[{j}]", float(weight[j])
        half = np.maximum((most - least) / 2 + e, noise.TINY)
        if _evidence((least + most) / 2 - factor * old, half, 1, 1) < EVIDENT:
            return None
        beside = [(word, float(weight[i])) for word, i in (("before", j - 1), ("after", j + 1)) if 0 <= i < wide]
        new, text = become(at, old, float(low[0]), float(high[0]), beside, stored)
        if abs(new - old) < CLEAR * abs(old):
            return None
        texts.append(text)
        left = max(left, float((np.abs(y[:, j].astype(np.float64) - factor * new) / half).max()))
    if not texts:
        return None
    more = f"; and {len(columns) - _TOLD} elements more" if len(columns) > _TOLD else ""
    return Explanation("; ".join(texts[:_TOLD]) + more, left)


# -- rows of the embedding ------------------------------------------------------------------------------------------


def explain_rows(
    name: str,
    tokens: np.ndarray,
    observed: np.ndarray,
    expected: np.ndarray,
    chunks: Iterable[tuple[int, np.ndarray]],
) -> str | None:
    """What stands in the place of the wrong rows of an embedding `[tokens, hidden]`; None where that is no row of it.

    `chunks` yields all rows of the embedding in the dtype of `observed`, each part with its first row's number.
    """
    wrong = np.flatnonzero((observed != expected).any(axis=1))
    if not len(wrong):
        return None
    found = _rows_of(observed[wrong], chunks)
    held = [found.get(observed[t].tobytes()) for t in wrong]
    if all(row is not None for row in held):
        rows = np.array(held)
        if len(wrong) > 1 and len(set(rows - tokens[wrong])) == 1:
            return f"each wrong token has the row of its id {rows[0] - tokens[wrong[0]]:+d}"
        for shift in (1, -1):
            if len(wrong) > 1 and np.array_equal(rows, tokens[np.clip(wrong + shift, 0, len(tokens) - 1)]):
                return f"each wrong token has the row of the token {'after' if shift == 1 else 'before'} it"
    told: dict[int, str] = {}
    for t, row in zip(wrong, held, strict=True):
        text = _row_said(name, int(tokens[t]), observed[t], expected[t], row)
        if text is None:
            return None
        told.setdefault(int(tokens[t]), text)
    more = f"; and {len(told) - _TOLD} rows more" if len(told) > _TOLD else ""
    return "; ".join(itertools.islice(told.values(), _TOLD)) + more


def _rows_of(wanted: np.ndarray, chunks: Iterable[tuple[int, np.ndarray]]) -> dict[bytes, int]:
    """The first row of a matrix that is each of the wanted ones, by bytes."""
    found: dict[bytes, int] = {}
    for start, rows in chunks:
        # By the first number, which leaves few to be compared as a whole.
        for at in np.flatnonzero(np.isin(rows[:, 0].astype(np.float32), wanted[:, 0].astype(np.float32))):
            found.setdefault(rows[at].tobytes(), start + int(at))
    return {row.tobytes(): found[row.tobytes()] for row in wanted if row.tobytes() in found}


def _row_said(name: str, token: int, got: np.ndarray, right: np.ndarray, row: int | None) -> str | None:
    if row is not None and got.any():
        return f"row {token} of {name} is row {row}'s"
    if not got.any():
        return f"row {token} of {name} is 0"
    places = np.flatnonzero(got != right)
    if len(places) > 2:
        return None
    texts = []
    for k in map(int, places):
        sides = [
            (w, float(right[i])) for w, i in (("on the left", k - 1), ("on the right", k + 1)) if 0 <= i < len(right)
        ]
        new = float(got[k])
        texts.append(become(f"{name}[{token}, {k}]", float(right[k]), new, new, sides, stored_as(right))[1])
    return " and ".join(texts)
