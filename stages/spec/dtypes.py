"""Dtypes by the names that declarations, manifests and safetensors give them."""

from __future__ import annotations

import ml_dtypes
import numpy as np

# In the order in which the package places tensors in a file.
DTYPES: dict[str, np.dtype] = {
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


_BY_NAME = {dtype.name: dtype for dtype in DTYPES.values()}


def stored_dtype(name: str) -> np.dtype:
    """The dtype called `float32`, `bfloat16`, ... in declarations and manifests."""
    return _BY_NAME[name]


def dtype_name(dtype: np.dtype | type) -> str:
    """The name used in manifests and reports: `float32`, `bfloat16`."""
    return np.dtype(dtype).name
