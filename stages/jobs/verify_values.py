"""What the checks of `svf verify` share."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stages.errors import shown
from stages.files.source import ModelSource
from stages.files.tensorfile import TensorFile
from stages.spec.dtypes import dtype_name

# A check's name, and its findings, one line each, found while they are drawn.
Check = tuple[str, Iterator[str]]


def nonfinite(file: TensorFile | ModelSource, name: str) -> Iterator[str]:
    """The first NaN or infinity of a tensor of floats, read in blocks of rows."""
    info = file.info(name)
    if "float" not in dtype_name(info.dtype):
        return
    for start, stop in info.row_blocks():
        block = file.read(name, start, stop)
        bad = ~np.isfinite(block.astype(np.float32) if block.dtype.itemsize == 2 else block)
        if bad.any():
            index = [int(i) for i in np.argwhere(bad)[0]]
            index[:1] = [index[0] + start] if index else []
            yield f"{file.path}: '{shown(name)}' has NaN or infinity at index {index}"
            return
