"""Activations as ggml's kernels multiply them: whole numbers from -127 to 127, and one scale for each block of a row.

A kernel for quantised weights first quantises its input, then sums products of whole numbers, which are exact, and in
float32 their blocks. So the product of the quantised input is exact to the order of that sum, and its bound is the
product's own. What may differ between right kernels is the whole number of a value that lies within their roundings of
the middle between two: of that both are given, as the ends of a cell. Facts: `quantize_row_q8_0`, `quantize_row_q8_1`
and `quantize_row_q8_K` in `ggml/src/ggml-quants.c`, `ggml/src/ggml-cpu/arch/*/quants.c` and `ggml-cuda/quantize.cu`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from stages.oracle.bounds import U32

_MOST = np.float32(127)
# The quotient that is rounded is a product with an inverse of a quotient at most: three roundings to float32.
_ROUNDINGS = 3 * U32


@dataclass(frozen=True)
class Blocks:
    """A ggml type of activations. `size`: elements of a block. `half`: its scale is kept in float16, else float32."""

    name: str
    size: int
    half: bool

    def divides(self, x: np.ndarray) -> bool:
        """Whether rows of `x` are whole blocks."""
        return x.ndim > 1 and not x.shape[-1] % self.size

    def quantised(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What rows of float32 values are taken to: least, as the plain C code has it, and most; float64, as `x`."""
        blocks = np.ascontiguousarray(x, np.float64).reshape(*x.shape[:-1], -1, self.size)
        peak = np.abs(blocks).max(axis=-1, keepdims=True).astype(np.float32)
        safe = np.where(peak > 0, peak, np.float32(1))
        whole = blocks * (127.0 / safe.astype(np.float64))
        doubt = _ROUNDINGS * np.abs(whole)
        plain = np.rint((blocks.astype(np.float32) * (_MOST / safe)).astype(np.float64))
        low, high = np.rint(whole - doubt), np.rint(whole + doubt)
        scale = self._scale(safe).astype(np.float64)
        found = (np.minimum(low, plain), plain, np.maximum(high, plain))
        least, middle, most = (np.where(peak > 0, end * scale, 0.0).reshape(x.shape) for end in found)
        return least, middle, most

    def _scale(self, peak: np.ndarray) -> np.ndarray:
        """The float32 scale of blocks whose largest magnitude is `peak`."""
        if not self.half:
            return np.float32(1) / (_MOST / peak)
        with np.errstate(over="ignore"):
            return (peak / _MOST).astype(np.float16).astype(np.float32)


Q8_0, Q8_K = Blocks("Q8_0", 32, half=True), Blocks("Q8_K", 256, half=False)
BLOCKS: Mapping[str, Blocks] = MappingProxyType({blocks.name: blocks for blocks in (Q8_0, Q8_K)})
