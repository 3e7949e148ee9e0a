"""ggml's own quantisers, those that llama.cpp runs, from the library in the wheel of `pywhispercpp`."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from forward_models import Model
from gguf_files import write_gguf

from stages.files.gguf_file import block_sizes


@functools.cache
def ggml() -> ctypes.CDLL:
    """ggml's library, with what it declares of its quantiser of weights."""
    files = importlib.metadata.files("pywhispercpp") or []
    library = ctypes.CDLL(str(next(f.locate() for f in files if f.name == "libggml-base.so")))
    whole, place = ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, place, place, whole, whole, whole, place]
    return library


def quantised(kind: str, weights: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """Rows of weights `[n, columns]` as a type stores them, `[n, bytes]`. `importance`: of each column.

    Types without a search take no notice of it; F32, F16 and BF16 are the `gguf` package's.
    """
    rows = np.ascontiguousarray(weights, np.float32)
    if kind in ("F32", "F16", "BF16"):
        return gguf.quantize(rows, gguf.GGMLQuantizationType[kind]).view(np.uint8)
    block, width = block_sizes()[kind]
    out = np.empty((len(rows), rows.shape[1] // block * width), np.uint8)
    given = None if importance is None else np.ascontiguousarray(importance, np.float32)
    written = ggml().ggml_quantize_chunk(
        gguf.GGMLQuantizationType[kind].value,
        rows.ctypes.data,
        out.ctypes.data,
        0,
        *rows.shape,
        None if given is None else given.ctypes.data,
    )
    assert written == out.nbytes
    return out


def quantised_file(path: Path, kind: str, model: Model, weights: Mapping[str, np.ndarray]) -> Path:
    """A GGUF file that llama.cpp loads, its matrices as ggml's own quantiser makes them."""

    def edit(said: dict[str, Any]) -> None:
        said |= {"tokenizer.ggml.model": "none", f"{model.family}.vocab_size": model.vocab}

    if kind in ("F32", "F16", "BF16"):
        return write_gguf(path, model, kind=kind, weights=weights, edit=edit)
    raw = {name: quantised(kind, array) for name, array in weights.items() if array.ndim > 1}
    return write_gguf(path, model, kind=kind, weights=weights, raw=raw, edit=edit)
