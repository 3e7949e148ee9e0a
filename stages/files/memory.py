"""Where arrays begin in memory. It changes bits, MKL peels a product's head up to its vectors' alignment; and time,
JAX takes an aligned array as it is and copies any other. And what becomes of their memory when they end."""

from __future__ import annotations

import ctypes
import math
import sys

import numpy as np

# Bytes; where torch's own allocator places every tensor. numpy's places large arrays 16 bytes behind a page.
ALIGNMENT = 64


def available_bytes() -> int:
    """Memory that may still be taken, by the system's own estimate; a very large number where it gives none."""
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 1 << 62


# glibc's mallopt: how much free memory at its end the heap keeps, and from which size a block is mapped by itself.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def reuse_heap() -> None:
    """Have this process's large arrays take memory that earlier ones left; with another C library nothing changes.

    glibc maps each array of a megabyte, and the system fills it with zeros, anew: a quarter of a judge's time. For a
    process whose arrays come and go; one that holds a model loses more than that (docs/findings/speed.md).
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        for parameter in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            mallopt(parameter, 2**31 - 1)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that begins at a multiple of `ALIGNMENT`."""
    count = math.prod(shape) * dtype.itemsize
    buffer = np.empty(count + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + count].view(dtype).reshape(shape)


def is_aligned(array: np.ndarray) -> bool:
    """Whether `array` begins at a multiple of `ALIGNMENT`."""
    return array.ctypes.data % ALIGNMENT == 0


def aligned_copy(array: np.ndarray, dtype: np.dtype | None = None) -> np.ndarray:
    """A copy of `array`, cast to `dtype`, that begins at a multiple of `ALIGNMENT`."""
    out = aligned_empty(array.shape, array.dtype if dtype is None else dtype)
    np.copyto(out, array, casting="unsafe")
    return out
