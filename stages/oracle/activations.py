"""What kernels take the input of a product to before they multiply: a narrower float, or blocks of 8-bit numbers.

A kernel of ggml for quantised weights first quantises its input: whole numbers from -127 to 127, and one scale for each
block of a row. It sums products of whole numbers, which are exact, and in float32 their blocks. So the product of the
quantised input is exact to the order of that sum, and its bound is the product's own. What may differ between right
kernels is the whole number of a value that lies within their roundings of the middle between two: of that both are
given, as the ends of a cell.

Weights of some types are `scale * code + least`. Their kernels sum codes and numbers without `least`, and add `least`
times the sum of the block, which the type Q8_1 keeps beside its numbers, in float16 (`Sums`).

Facts: `quantize_row_q8_0`, `quantize_row_q8_1` and `quantize_row_q8_K` in `ggml/src/ggml-quants.c` and
`ggml/src/ggml-cpu/arch/*/quants.c`, `ggml_vec_dot_q4_1_q8_1` there; `quantize_q8_1` and `quantize_mmq_q8_1` in
`ggml/src/ggml-cuda/quantize.cu`, `vec_dot_q4_0_q8_1_impl` and its like in `ggml/src/ggml-cuda/vecdotq.cuh`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Literal, Protocol

import numpy as np

from stages.oracle.bounds import U32, half_unit
from stages.oracle.rounding import round_once
from stages.spec.dtypes import stored_dtype

_MOST = np.float32(127)
# The quotient that is rounded is a product with an inverse of a quotient at most: three roundings to float32.
_ROUNDINGS = 3 * U32
# What lies so many standard deviations from the middle between two numbers is not taken to the other one.
_CLEAR = 6.0
# A number that may be taken to either weighs so much of its step's square at least: a fifth of a step is one standard
# deviation, so that a single step is well within the ten that right programs stay within (span.WITHIN_LAYER).
_LEAST = 4e-2

# The variance of the difference of two roundings that know nothing of each other, in squares of their step.
_OF_TWO_ROUNDINGS = 1 / 6

Cell = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Sums:
    """Sums of blocks of a product's input, `[rows, blocks]`: as they were `kept` beside the numbers, those numbers'
    `own`, and how far the difference of both may be another in right kernels. `least`: what the weights' codes are
    counted from, `[columns, blocks]`. All float64.

    A kernel that multiplies `kept` with `least`, and numbers with codes, computes the product and `extra`.
    """

    kept: np.ndarray
    own: np.ndarray
    doubt: np.ndarray
    least: np.ndarray
    follows: bool  # whether what is kept is of the numbers, so that it moves with them

    @cached_property
    def extra(self) -> np.ndarray:
        """What it adds to the product, `[rows, columns]`."""
        return (self.kept - self.own) @ self.least.T

    @property
    def room(self) -> np.ndarray:
        """How far `extra` may be another in right kernels."""
        return self.doubt @ np.abs(self.least).T

    def variance(self, of_own: np.ndarray) -> np.ndarray:
        """The variance of `extra` where `own` has one: what is kept is rounded otherwise, and does not follow."""
        ulp = 2 * half_unit(self.kept, np.dtype(np.float16))
        rounded = ulp**2 * np.minimum(_taken_to_another(self.own / ulp, of_own / ulp**2), _OF_TWO_ROUNDINGS)
        return (rounded if self.follows else rounded + of_own) @ (self.least**2).T

    def operands(self, x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The factors of all that is summed, of those of the product, `[rows, K]` and `[K, columns]`: what `least` is
        left out of, it is also subtracted from."""
        least = self.least.T.astype(w.dtype)
        kept = self.kept.astype(x.dtype)
        return np.concatenate([x, kept, kept], axis=-1), np.concatenate([w, least, least])


class Taken(Protocol):
    """What inputs are taken to; `name` as users write it."""

    @property
    def name(self) -> str: ...

    def divides(self, x: np.ndarray) -> bool:
        """Whether rows of `x` can be taken so."""

    def cell(self, x: np.ndarray) -> Cell:
        """What rows of float32 values are taken to: least, as the plain C code has it, and most; float64, as `x`."""

    def variance(self, x: np.ndarray, of_x: np.ndarray) -> np.ndarray:
        """The variance of what `x` is taken to, whose own is `of_x`."""

    def sums(self, x: np.ndarray, held: np.ndarray, least: np.ndarray | None, *others: np.ndarray) -> Sums | None:
        """The sums of blocks of `x`, which was taken to `held`, perhaps to `others`, for weights of this `least`; None
        where none is kept."""


@dataclass(frozen=True)
class Blocks:
    """A ggml type of activations. `size`: elements of a block. `half`: its scale is kept in float16, else float32.

    `summed`: sums of blocks are kept in float16, of its `numbers`, or of the `inputs` as they were.
    """

    name: str
    size: int
    half: bool
    summed: Literal["", "numbers", "inputs"] = ""

    def divides(self, x: np.ndarray) -> bool:
        return x.ndim > 1 and not x.shape[-1] % self.size

    def cell(self, x: np.ndarray) -> Cell:
        blocks, peak = self._blocks(x)
        whole = blocks * (127.0 / peak)
        doubt = _ROUNDINGS * np.abs(whole)
        plain = np.rint((blocks.astype(np.float32) * (_MOST / peak.astype(np.float32))).astype(np.float64))
        low, high = np.rint(whole - doubt), np.rint(whole + doubt)
        scale = self._scale(peak)
        with np.errstate(invalid="ignore"):  # of a scale that float16 has not
            least, middle, most = (end * scale for end in (np.minimum(low, plain), plain, np.maximum(high, plain)))
        return least.reshape(x.shape), middle.reshape(x.shape), most.reshape(x.shape)

    def variance(self, x: np.ndarray, of_x: np.ndarray) -> np.ndarray:
        blocks, peak = self._blocks(x)
        own = np.broadcast_to(of_x, x.shape).reshape(blocks.shape)
        largest = np.abs(blocks).argmax(axis=-1, keepdims=True)
        of_peak = np.take_along_axis(own, largest, axis=-1) / peak**2  # relative to it
        whole, step = blocks * (127.0 / peak), self._scale(peak)
        of_whole = (127.0 / peak) ** 2 * own + whole**2 * of_peak
        found = step**2 * _taken_to_another(whole, of_whole) + blocks**2 * of_peak
        if self.half:
            ulp = 2 * half_unit(peak / 127, np.dtype(np.float16))
            another = _taken_to_another(peak / 127 / ulp, (peak / 127 / ulp) ** 2 * of_peak)
            found = found + (whole * ulp) ** 2 * another
        return found.reshape(x.shape)

    def sums(self, x: np.ndarray, held: np.ndarray, least: np.ndarray | None, *others: np.ndarray) -> Sums | None:
        if not self.summed or least is None:
            return None
        blocks, peak = self._blocks(x)
        kept, own = self._kept_and_own(blocks, peak, held)
        ends = [self._kept_and_own(blocks, peak, other) for other in (held, *others)]
        doubt = np.maximum.reduce([np.abs(a - b - (kept - own)) for a, b in ends])
        if self.summed == "inputs":  # in float32, in an order of its own
            off = self.size * U32 * np.abs(blocks).sum(axis=-1)
            exact = blocks.sum(axis=-1)
            doubt = doubt + _half(exact + off) - _half(exact - off)
        return Sums(kept, own, doubt, least.astype(np.float64), self.summed == "numbers")

    def _kept_and_own(self, blocks: np.ndarray, peak: np.ndarray, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sums of blocks that were taken to `held`, as they are kept, and these numbers' own."""
        own = held.reshape(blocks.shape).astype(np.float64)
        if self.summed == "inputs":
            return _half(blocks.sum(axis=-1)), own.sum(axis=-1)
        whole = np.rint(own / self._scale(peak)).sum(axis=-1).astype(np.float32)
        return _half(whole * (peak[..., 0].astype(np.float32) / _MOST)), own.sum(axis=-1)

    def _blocks(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`x` by blocks, and of each the largest magnitude; of one that is 0 throughout any number is."""
        blocks = np.ascontiguousarray(x, np.float64).reshape(*x.shape[:-1], -1, self.size)
        peak = np.abs(blocks).max(axis=-1, keepdims=True).astype(np.float32).astype(np.float64)
        return blocks, np.where(peak > 0, peak, 1.0)

    def _scale(self, peak: np.ndarray) -> np.ndarray:
        """The scale of blocks whose largest magnitude is `peak`."""
        largest = peak.astype(np.float32)
        if not self.half:
            return (np.float32(1) / (_MOST / largest)).astype(np.float64)
        with np.errstate(over="ignore"):
            return (largest / _MOST).astype(np.float16).astype(np.float64)


@dataclass(frozen=True)
class Cast:
    """A float of 16 bits, as kernels for weights of that type have their input."""

    name: str

    def divides(self, x: np.ndarray) -> bool:
        return x.ndim > 1

    def cell(self, x: np.ndarray) -> Cell:
        taken = round_once(np.asarray(x, np.float64), stored_dtype(self.name)).astype(np.float64)
        return taken, taken, taken

    def variance(self, x: np.ndarray, of_x: np.ndarray) -> np.ndarray:
        step = 2 * half_unit(x, stored_dtype(self.name))
        return step**2 * _taken_to_another(x / step, of_x / step**2)

    def sums(self, x: np.ndarray, held: np.ndarray, least: np.ndarray | None, *others: np.ndarray) -> None:
        return None


def _half(x: np.ndarray) -> np.ndarray:
    """Rounded to float16."""
    with np.errstate(over="ignore"):
        return round_once(np.asarray(x, np.float64), np.dtype(np.float16)).astype(np.float64)


def _taken_to_another(whole: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """How likely numbers of that variance are rounded to another whole one than these; `_LEAST` where they may be."""
    far = np.abs(whole - np.floor(whole) - 0.5)
    deviation = np.sqrt(variance)
    near = far <= _CLEAR * deviation + _ROUNDINGS * np.abs(whole)
    with np.errstate(divide="ignore", invalid="ignore"):
        tail = 0.5 * np.exp(-0.5 * (far / deviation) ** 2)  # no less than the normal distribution's
    moved = np.where(deviation < 1, tail, variance)  # by many steps it moves as its input does
    return np.where(near, np.maximum(np.nan_to_num(moved), _LEAST), 0.0)


Q8_0, Q8_K = Blocks("q8_0", 32, half=True), Blocks("q8_k", 256, half=False)
Q8_1 = Blocks("q8_1", 32, half=True, summed="numbers")
# Layouts of CUDA's Q8_1: the block's scale and its sum, or its scale alone.
DS4, D4 = Blocks("q8_1_ds4", 32, half=True, summed="inputs"), Blocks("q8_1_d4", 32, half=False)
TAKEN: Mapping[str, Taken] = MappingProxyType(
    {one.name: one for one in (Cast("float16"), Cast("bfloat16"), Q8_0, Q8_1, Q8_K, DS4, D4)}
)
