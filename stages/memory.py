"""Where arrays begin in memory, which changes bits: MKL peels a product's head up to its vectors' alignment."""

from __future__ import annotations

import numpy as np

# Bytes; where torch's own allocator places every tensor. numpy's places large arrays 16 bytes behind a page.
ALIGNMENT = 64


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that begins at a multiple of `ALIGNMENT`."""
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(count + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + count].view(dtype).reshape(shape)


def aligned_copy(array: np.ndarray, dtype: np.dtype | None = None) -> np.ndarray:
    """A copy of `array`, cast to `dtype`, that begins at a multiple of `ALIGNMENT`."""
    out = aligned_empty(array.shape, array.dtype if dtype is None else dtype)
    np.copyto(out, array, casting="unsafe")
    return out
