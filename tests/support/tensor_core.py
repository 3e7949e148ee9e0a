"""Products as NVIDIA's tensor cores sum them, in numpy: bit by bit what arXiv 2511.10909 and 2512.07004 found.

A step adds L products and the accumulator. With E the largest exponent among them (of a product: the sum of its
operands', not normalised), each is cut towards zero to a multiple of 2^(E - F), summed exactly, and cut to 24 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Unit:
    """A tensor core of a `device` for operands in a format: `L` products a step, `F` bits kept below the largest."""

    device: str
    format: str
    L: int
    F: int


UNITS = (
    Unit("Tesla V100-SXM2-16GB", "float16", 4, 23),
    *(Unit("NVIDIA A100-SXM4-80GB", name, L, 24) for name, L in (("float16", 8), ("bfloat16", 8), ("tf32", 4))),
    *(Unit("NVIDIA H200", name, L, 25) for name, L in (("float16", 16), ("bfloat16", 16), ("tf32", 8))),
)
STORED = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "tf32": np.float32, "float32": np.float32}


def tf32(x: Array, how: str = "truncated") -> Array:
    """float32 with 10 stored bits: `truncated` by the unit, or rounded before, to `even` or `away` on a tie."""
    raw = np.ascontiguousarray(x, np.float32).view(np.uint32)
    more = {"truncated": 0, "away": 1 << 12, "even": (1 << 12) - 1 + ((raw >> 13) & 1)}[how]
    return ((raw + np.asarray(more, np.uint32)) >> 13 << 13).view(np.float32)


def product(a: Array, b: Array, unit: Unit) -> Array:
    """`a @ b`, `[M, K]` and `[K, N]` of the unit's format as float32, with one float32 accumulator an element."""
    smallest = -14 if unit.format == "float16" else -126
    ea, eb = _exponents(a, smallest), _exponents(b, smallest)
    a, b, sums = a.astype(np.float64), b.astype(np.float64), np.zeros((len(a), b.shape[1]), np.float32)
    for k in range(0, a.shape[1], unit.L):
        at = slice(k, k + unit.L)
        largest = np.maximum((ea[:, at, None] + eb[at]).max(axis=1), _exponents(sums, -126))
        step = np.ldexp(1.0, unit.F - largest)
        total = np.trunc(a[:, at, None] * b[at] * step[:, None]).sum(axis=1) + np.trunc(sums * step)
        sums = _towards_zero(total / step)
    return sums


def in_slices(a: Array, b: Array, unit: Unit, slices: int, kept: str, added: str = "float32") -> Array:
    """A split K: each slice has its accumulator, stored as `kept`, and they are added one by one in `added`."""
    total = None
    for at in np.array_split(np.arange(len(b)), slices):
        part = stored(product(a[:, at], b[at], unit), kept)
        total = part if total is None else stored(total + part, added)
    assert total is not None
    return total


def in_pieces(a: Array, b: Array, unit: Unit, narrow: Callable[[Array], Array], count: int) -> Array:
    """Operands as sums of `count` narrow numbers, products of pieces from the smallest on: 3xTF32, BF16x3, BF16x6."""
    left, right = _pieces(a, narrow, count), _pieces(b, narrow, count)
    pairs = [(i, order - i) for order in reversed(range(count)) for i in range(order + 1)]
    a = np.concatenate([left[i] for i, _ in pairs], axis=1)
    return product(a, np.concatenate([right[j] for _, j in pairs]), unit)


def stored(x: Array, dtype: str) -> Array:
    with np.errstate(over="ignore"):
        return x.astype(STORED[dtype]).astype(np.float32)


def _pieces(x: Array, narrow: Callable[[Array], Array], count: int) -> list[Array]:
    found = []
    for _ in range(count):
        found.append(narrow(x))
        x = x - found[-1]
    return found


def _exponents(x: Array, smallest: int) -> Array:
    return np.where(x == 0, smallest, np.maximum(np.frexp(x)[1] - 1, smallest))


def _towards_zero(x: Array) -> Array:
    y = x.astype(np.float32)
    return np.where(np.abs(y.astype(np.float64)) > np.abs(x), np.nextafter(y, np.float32(0)), y)


# -- operands: seven kinds of data, `[M, K]` and `[K, N]`, float32 ---------------------------------------------------

_KINDS: dict[str, Callable[[np.random.Generator, Array, Array], tuple[Array, Array]]] = {
    "normal": lambda rng, a, b: (a, b),
    "one sign": lambda rng, a, b: (np.abs(a), np.abs(b)),
    "offset": lambda rng, a, b: (a + 2, b + 0.5),
    "massive": lambda rng, a, b: (a * np.where(np.arange(a.shape[1]) == 3, 300, 1), b),
    "cancelling": lambda rng, a, b: (_mirrored(a) * (1 + 1e-3 * rng.standard_normal(a.shape)), _negated(b)),
    "outliers": lambda rng, a, b: (a * np.exp(2 * rng.standard_normal(a.shape)), b),
    "attention": lambda rng, a, b: (np.exp(2 * a) / np.exp(2 * a).sum(axis=1, keepdims=True), b + 0.5),
}
KINDS = tuple(_KINDS)


def operands(kind: str, m: int, k: int, n: int, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng([seed, k, KINDS.index(kind)])
    a, b = _KINDS[kind](rng, rng.standard_normal((m, k)), rng.standard_normal((k, n)))
    return a.astype(np.float32), (b / np.sqrt(k)).astype(np.float32)


def _mirrored(a: Array) -> Array:
    half = a[:, : a.shape[1] // 2]
    return np.concatenate([half, half], axis=1)


def _negated(b: Array) -> Array:
    half = b[: len(b) // 2]
    return np.concatenate([half, -half])
