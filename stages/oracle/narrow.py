"""Formats narrower than float32, by the bits that they keep: what a value looks like after one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_FLOAT32_BITS = 23


def keep_bits(x: np.ndarray, bits: int, rounding: str = "even") -> np.ndarray:
    """`x` as float32 with `bits` stored mantissa bits; `rounding` is to nearest `even`, `away` on a tie, or `truncate`.

    The range stays float32's. On the bits of a float32, a carry from the mantissa into the exponent is right.
    """
    shift = _FLOAT32_BITS - bits
    raw = np.ascontiguousarray(x, np.float32).view(np.uint32)
    half = np.uint32(1 << (shift - 1))
    if rounding == "even":
        raw = raw + (half - np.uint32(1) + ((raw >> np.uint32(shift)) & np.uint32(1)))
    elif rounding == "away":
        raw = raw + half
    return (raw >> np.uint32(shift) << np.uint32(shift)).view(np.float32)


@dataclass(frozen=True)
class Narrow:
    """One way in which a kernel loses bits: `round` does to an array what the kernel does to it."""

    name: str
    bits: int
    round: Callable[[np.ndarray], np.ndarray]

    def holds(self, x: np.ndarray) -> bool:
        """Whether every value of `x` is one that this format has."""
        return bool(np.array_equal(self.round(x), x.astype(np.float32)))


def _narrow(name: str, bits: int, rounding: str) -> Narrow:
    return Narrow(name, bits, lambda x: keep_bits(x, bits, rounding))


def _through_float16(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # beyond its range is infinity
        return x.astype(np.float16).astype(np.float32)


TF32 = _narrow("TF32-like", 10, "even")
FLOAT16 = Narrow("float16-like, with its range", 10, _through_float16)
# Nearest even is what a cast does, truncation what a tensor core does to operands that were not cast before.
NARROW = (
    _narrow("bfloat16-like", 7, "even"),
    _narrow("bfloat16-like, truncated", 7, "truncate"),
    TF32,
    _narrow("TF32-like, ties away", 10, "away"),
    _narrow("TF32-like, truncated", 10, "truncate"),
    FLOAT16,
)
