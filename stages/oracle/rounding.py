"""Rounding float64 once to a narrower type."""

from __future__ import annotations

import ml_dtypes
import numpy as np


def round_once(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`value` rounded to nearest, ties to even, in one step.

    ml_dtypes takes float64 to bfloat16 by way of float32, and a value just beyond a tie then goes the wrong way.
    A float32 rounded to odd in between (S. Boldo and G. Melquiond, 2008) keeps the side of the tie.
    """
    if dtype != ml_dtypes.bfloat16 or value.dtype != np.float64:
        return value.astype(dtype)
    with np.errstate(over="ignore"):  # beyond float32's range is infinity in bfloat16 too
        single = np.ascontiguousarray(value).astype(np.float32)
    inexact = single != value
    bits = single.view(np.uint32) - (np.abs(single) > np.abs(value))
    return (bits | inexact).view(np.float32).astype(dtype)


def widened(x: np.ndarray) -> np.ndarray:
    """`x` in float64; counts, numbers of experts, as they are."""
    return x if x.dtype.kind in "iu" else x.astype(np.float64, copy=False)
