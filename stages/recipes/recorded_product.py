"""A recorded product as y = a @ b: its operands, the cells its sums lay in, and the names of the weight's elements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.oracle import bounds as noise
from stages.oracle.verdict import OPERANDS, Oracle
from stages.spec.layouts import LAYOUTS
from stages.spec.noise import Noise


def cell(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Between which numbers a value lay before it was rounded to nearest in the dtype of `y`: least and most, float64.

    Of float32 the value itself: there the rounding is part of a kind's noise.
    """
    at = y.astype(np.float64)
    if y.dtype == np.float32:
        return at, at
    infinite = np.asarray(np.inf, y.dtype)
    below, above = (np.nextafter(y, side).astype(np.float64) for side in (-infinite, infinite))
    return (at + below) / 2, (at + above) / 2


def beyond(oracle: Oracle, observed: np.ndarray) -> np.ndarray:
    """Which elements are beyond their bound."""
    return np.abs(observed.astype(np.float64) - oracle.value) > np.broadcast_to(oracle.bound, oracle.value.shape)


def is_product(oracle: Oracle, observed: np.ndarray) -> bool:
    """Whether a stage can be taken apart so."""
    return oracle.stage.noise is Noise.PRODUCT and oracle.stage.function in OPERANDS and observed.ndim == 2


@dataclass(frozen=True)
class Part:
    """One weight of a product, by its name in the checkpoint, and the columns of the result that it gives."""

    name: str
    weight: np.ndarray
    columns: slice


class Product:
    """What was recorded and both factors, `[tokens, K]` and `[K, columns]`; a bias is one more row of b, times 1.

    `start` is the weight's first row, where the oracle speaks of a part of them.
    """

    def __init__(self, oracle: Oracle, observed: np.ndarray, start: int = 0):
        self.oracle, self.observed, self.start = oracle, observed, start
        operands: Any = OPERANDS[oracle.stage.function](*oracle.arguments, **oracle.options)
        self.narrow, self.b = operands
        self.a = self.narrow.astype(np.float64)
        params, arguments = oracle.stage.params, oracle.arguments[len(oracle.stage.inputs) :]
        layout = oracle.options.get("layout")
        # V as stored may have the product's columns as its own.
        self.by_rows = layout is None or LAYOUTS[layout].transposed
        self.has_bias = any(name.endswith(".bias") for name in params)
        if layout is not None:
            self.parts = [Part("V", arguments[-1], slice(0, self.b.shape[1]))]
        else:
            weights = [(name, a) for name, a in zip(params, arguments, strict=True) if a.ndim == 2]
            ends = np.cumsum([len(weight) for _, weight in weights]).tolist()
            self.parts = [Part(*w, slice(end - len(w[1]), end)) for w, end in zip(weights, ends, strict=True)]

    def part(self, j: int) -> Part:
        """The weight that gives column `j`."""
        return next(part for part in self.parts if j < part.columns.stop)

    def index(self, j: int) -> int:
        """The row of its weight that gives column `j`."""
        return j - self.part(j).columns.start + self.start

    def place(self, j: int, k: int) -> str:
        """An element of b, by the checkpoint's name and indices."""
        row, name = self.index(j), self.part(j).name
        if self.has_bias and k == self.b.shape[0] - 1:
            return f"{name.removesuffix('weight')}bias[{row}]"
        return f"{name}[{row}, {k}]" if self.by_rows else f"{name}[{k}, {row}]"

    def whole(self, j: int) -> str:
        """The row of the weight that gives column `j`, in words."""
        return f"{'row' if self.by_rows else 'column'} {self.index(j)} of {self.part(j).name}"

    def cells(self, j: int) -> tuple[np.ndarray, np.ndarray]:
        """Where column `j` lay before it was rounded, `[tokens]` each: the recorded cell and the sum's noise."""
        y = self.observed[:, j]
        least, most = cell(y)
        # Of the sum with the wrong element in it: its own share of the noise is in the difference.
        size = np.hypot(y.astype(np.float64), y.astype(np.float64) - self.oracle.value[:, j])
        scale = noise.product_bound(self.narrow, self.b[:, j : j + 1], size[:, None])[:, 0]
        e = self.oracle.lambdas[Noise.PRODUCT] * scale
        return least - e, most + e
