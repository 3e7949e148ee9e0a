"""The header of a `.npy` file, checked against the file's size; no array is made and no object unpickled."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.errors import InputError, NotFoundError, shown


@dataclass(frozen=True)
class NpyHeader:
    """Dtype, shape and order of a `.npy` file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fortran_order: bool

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def read_npy_header(path: Path) -> NpyHeader:
    """The header of the file at `path`; `InputError` for a damaged one, an object array, or a file of another size."""
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with path.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            if version not in read:
                raise InputError(f"{path}: .npy version {version[0]}.{version[1]}; expected 1.0 or 2.0")
            shape, fortran, dtype = read[version](stream)
            held = os.fstat(stream.fileno()).st_size - stream.tell()
    except OSError as error:
        raise NotFoundError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, EOFError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise InputError(f"{path}: not a readable .npy header: {shown(error)}") from None
    if dtype.hasobject:
        raise InputError(f"{path}: holds Python objects, which would have to be unpickled; refused")
    header = NpyHeader(dtype, tuple(shape), fortran)
    if header.nbytes != held:
        raise InputError(f"{path}: {dtype} {list(shape)} needs {header.nbytes} bytes, the file has {held}")
    return header
