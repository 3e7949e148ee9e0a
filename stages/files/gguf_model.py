"""A GGUF file as a model: its tensors by the names, and in the order of rows, that Hugging Face's files have.

Names are those of the `gguf` package's tensor map. The converter turns the rows of a Llama's q and k from halves to
pairs; reading turns them back. A quantised tensor is read as what its blocks stand for, in float32.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from stages.errors import InputError
from stages.files.checkpoint import check_parameters, held_by
from stages.files.gguf_config import FREQUENCIES, raw_config
from stages.files.gguf_file import PLAIN, GgufFile, GgufTensor, least, row_blocks, values
from stages.files.memory import aligned_empty
from stages.files.tensorfile import TensorInfo, sha256_by_rows
from stages.spec.config import ModelConfig
from stages.spec.dtypes import dtype_name
from stages.spec.families import layer_param, parameter_shapes, parse_config

# Families of which llama.cpp rotates neighbouring rows of a head, where Hugging Face rotates its halves.
PAIRED_FAMILIES = frozenset({"llama"})
PAIRED_ROWS = ("self_attn.q_proj", "self_attn.k_proj")


@dataclass(frozen=True)
class GgufInfo(TensorInfo):
    """A tensor by the name of its parameter. `dtype`: what it is read as. `stored`: the file's own entry.

    `pairs`: the length of the heads whose rows are stored in pairs, 0 where rows are stored as they are read.
    """

    stored: GgufTensor
    pairs: int = 0

    @property
    def quantised(self) -> bool:
        return self.stored.type not in PLAIN


class GgufModel:
    """An open GGUF file as a `ModelSource`; close it, or use it as a context manager."""

    revision: str | None = None

    def __init__(self, path: Path, source: str):
        self.path, self.source = path, source
        self.file = GgufFile(path)
        try:
            self.raw_config: dict[str, Any] = raw_config(self.file)
            self._infos = self._named()
            self.tensors: Mapping[str, TensorInfo] = MappingProxyType(self._infos)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> GgufModel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @cached_property
    def config(self) -> ModelConfig:
        """The checked meaning of the metadata; `InputError` naming what is refused."""
        return parse_config(self.raw_config, str(self.path))

    def resolve(self, name: str) -> str:
        """The tensor that parameter `name` has its values from: itself, or the embedding of a tied LM head."""
        return name if name in self.tensors else held_by(name, self.tensors, self.config, self.path)

    def info(self, name: str) -> GgufInfo:
        """Dtype, shape and stored form of the tensor that `name` resolves to."""
        return self._infos[self.resolve(name)]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Elements `[start:stop]` along axis 0 of the tensor that `name` resolves to, as a fresh array of its dtype."""
        info = self.info(name)
        stop = info.shape[0] if stop is None else stop
        if not 0 <= start <= stop <= info.shape[0]:
            raise ValueError(f"{name}: rows {start}:{stop} of {info.shape[0]}")
        if len(info.shape) == 1:
            whole = values(self.file.raw(info.stored, 0, 1), info.stored.type).reshape(-1)
            return halves(whole, info.pairs)[start:stop].copy()
        each = info.stored.rows // info.shape[0]  # rows of blocks in one index of axis 0
        out = aligned_empty(((stop - start) * each, info.stored.columns), info.dtype)
        for first, last in row_blocks(info.stored, start * each, stop * each):
            out[first - start * each : last - start * each] = values(self.raw(info, first, last), info.stored.type)
        return out.reshape((stop - start, *info.shape[1:]))

    def least(self, name: str, size: int, start: int = 0, stop: int | None = None) -> np.ndarray | None:
        """What codes of a matrix's rows `[start:stop]` are counted from, by blocks of `size`: float32 `[rows, blocks]`.
        None of a type that counts from 0."""
        info = self.info(name)
        stop = info.shape[0] if stop is None else stop
        parts = [least(self.raw(info, *block), info.stored, size) for block in row_blocks(info.stored, start, stop)]
        found = [part for part in parts if part is not None]
        return np.concatenate(found) if found else None

    def columns(self, name: str, start: int, stop: int) -> np.ndarray:
        """Columns `[start:stop]` of the matrix that `name` resolves to; only the blocks that hold them are decoded."""
        info = self.info(name)
        stored = info.stored
        first, last = start // stored.block, -(-stop // stored.block)
        held = slice(first * stored.block_bytes, last * stored.block_bytes)
        out = np.empty((stored.rows, stop - start), info.dtype)
        for top, end in row_blocks(stored, 0, stored.rows):
            part = values(np.ascontiguousarray(self.raw(info, top, end)[:, held]), stored.type)
            out[top:end] = part[:, start - first * stored.block : stop - first * stored.block]
        return out

    def raw(self, info: GgufInfo, start: int, stop: int) -> np.ndarray:
        """Stored rows `[start:stop]` in the order in which they are read: uint8, `[rows, bytes]`."""
        if not info.pairs:
            return self.file.raw(info.stored, start, stop)
        first = start // info.pairs * info.pairs
        last = -(-stop // info.pairs) * info.pairs
        return halves(self.file.raw(info.stored, first, last), info.pairs)[start - first : stop - first]

    def check(self) -> None:
        """`InputError`, naming tensors, unless names, shapes and types are what the metadata asks for."""
        check_parameters(self.path, self.config, self.tensors, "its metadata")
        for name, info in self._infos.items():
            if "float" not in dtype_name(info.dtype):
                raise InputError(f"{self.path}: '{name}' is of type {info.stored.type}, which no weight is")
            values(np.zeros((1, info.stored.block_bytes), np.uint8), info.stored.type)  # refuses what cannot be read

    def fingerprint(self) -> dict[str, str | int]:
        """What the model is, without reading its weights: digests of the config and of the header, and `bytes`."""
        config = json.dumps(self.raw_config, sort_keys=True).encode()
        digest = hashlib.sha256(config).hexdigest()
        return {"config_sha256": digest, "headers_sha256": self.file.header_sha256(), "bytes": self.file.size}

    def weights_sha256(self, names: Iterable[str]) -> dict[str, str]:
        """sha256 over the values of each named tensor, as it is read."""
        return {name: sha256_by_rows(self.info(name), functools.partial(self.read, name)) for name in names}

    def _named(self) -> dict[str, GgufInfo]:
        """The tensors by the names of the parameters that they are; one that is none keeps its own."""
        names = {stored: name for name, stored in gguf_names(self.config).items()}
        heads = self.config.head_dim if self.config.family in PAIRED_FAMILIES else 0
        found = {}
        for stored in self.file.tensors.values():
            name = names.get(stored.name, stored.name)
            turned = any(f"{part}." in name for part in PAIRED_ROWS)
            whole = heads if turned and not stored.shape[0] % self.config.head_dim else 0
            if stored.name != FREQUENCIES:  # read with the config
                found[name] = GgufInfo(name, stored.dtype, stored.shape, stored.offset, stored, whole)
        return found


def gguf_names(config: ModelConfig) -> dict[str, str]:
    """Parameter -> the tensor's name in GGUF, by the package's map of one layer; the other layers' follow from it."""
    import gguf

    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == config.family)
    of_one = gguf.get_tensor_name_map(arch, 1)
    found = {}
    for name in parameter_shapes(config):
        number = name.removeprefix(layer_param(0, "").removesuffix("0.")).partition(".")[0]
        layer = number if number.isdecimal() else None
        first = name if layer is None else name.replace(f".{layer}.", ".0.", 1)
        stored = of_one.get_name(first, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        found[name] = stored if layer is None else stored.replace("blk.0.", f"blk.{layer}.", 1)
    return found


def halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of heads that hold pairs, turned to hold halves: row `2 i + j` of a head becomes row `j head_dim/2 + i`."""
    if not head_dim:
        return rows
    turned = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(turned).reshape(rows.shape)


def pairs(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """What `halves` turns back."""
    turned = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(turned).reshape(rows.shape)
