"""Where a stage's error lies and how it compares with its bound: what a clean verdict rests on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Axes that are one position or one row of a weight; all others together are a column.
_ROWS = ("tokens", "queries", "rows")
# Elements at a time, as in metrics.py.
_BLOCK = 1 << 13


@dataclass
class Spread:
    """Error and bound of one stage, summed by token (or row) and by column, over pieces.

    `axes` names the axes as the stage declares them. A piece begins at `start` along `axis` of the whole.
    """

    axes: str
    count: int = 0
    errors: float = 0.0
    bounds: float = 0.0
    by_row: np.ndarray = field(default_factory=lambda: np.zeros(0))
    by_column: np.ndarray = field(default_factory=lambda: np.zeros(0))
    rows: int = 0
    columns: tuple[int, ...] = ()

    def add(self, observed: np.ndarray, value: np.ndarray, bound: np.ndarray, start: int = 0, axis: int = 0) -> None:
        """Add a piece: what was recorded, its unrounded float64 value, and the bound, all of one shape."""
        at = self._row_axis(observed.ndim)
        planes = [_plane(x, at) for x in (observed, value, np.broadcast_to(bound, value.shape))]
        shape = observed.shape if at is None else (*observed.shape[:at], *observed.shape[at + 1 :])
        each = math.prod(shape[1:])  # columns of one head, where a piece is of some heads
        first = (start, 0) if axis == at else (0, start * each)
        errors, columns = np.zeros(len(planes[0])), np.zeros(planes[0].shape[1])
        step = max(1, _BLOCK // max(len(columns), 1))
        for row in range(0, len(errors), step):
            got, want, limit = (plane[row : row + step] for plane in planes)
            error = got.astype(np.float64) - want
            self.errors += float(np.square(error).sum())
            self.bounds += float(np.square(limit).sum())
            error /= np.maximum(limit, np.finfo(np.float64).tiny)
            error *= error
            errors[row : row + step] = error.sum(axis=1)
            columns += error.sum(axis=0)
        self.by_row, self.by_column = _added(self.by_row, errors, first[0]), _added(self.by_column, columns, first[1])
        self.count += observed.size
        self.columns = (len(self.by_column) // each, *shape[1:])

    def _row_axis(self, ndim: int) -> int | None:
        names = self.axes.split()
        return next((i for i, name in enumerate(names) if name in _ROWS and ndim == len(names) > 1), None)

    def result(self) -> dict[str, Any]:
        """RMS of error and bound, and the token and the column whose errors are the largest of their bounds."""
        if not self.count:
            return {}
        return {
            "error_rms": math.sqrt(self.errors / self.count),
            "bound_rms": math.sqrt(self.bounds / self.count),
            "worst_token": _worst(self.by_row, self.count, (len(self.by_row),)),
            "worst_column": _worst(self.by_column, self.count, self.columns),
        }


def _plane(x: np.ndarray, at: int | None) -> np.ndarray:
    """`[rows, columns]`, one row where no axis is one."""
    return x.reshape(1, -1) if at is None else np.moveaxis(x, at, 0).reshape(x.shape[at], -1)


def _added(total: np.ndarray, part: np.ndarray, start: int) -> np.ndarray:
    if len(total) < start + len(part):
        total = np.concatenate([total, np.zeros(start + len(part) - len(total))])
    total[start : start + len(part)] += part
    return total


def _worst(squares: np.ndarray, count: int, shape: tuple[int, ...]) -> dict[str, Any] | None:
    """The line with the largest RMS of error / bound; None where there is one line alone, or no error."""
    if len(squares) < 2 or not squares.any():
        return None
    at = int(squares.argmax())
    index = [int(i) for i in np.unravel_index(at, shape)]
    return {"index": index, "rms_ratio": math.sqrt(float(squares[at]) * len(squares) / count)}
