"""GGUF files: their header, read with suspicion, and their tensors' bytes and values by rows.

The `gguf` package's own reader maps the file and believes its counts and offsets. Here each length is compared with
what the file has before it is used, and a tensor is read with `pread`, some rows at a time. Types, their sizes, and
what their bytes mean are the package's. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from stages.errors import InputError, shown
from stages.files.jsonio import open_regular
from stages.spec.fields import got

MAGIC = b"GGUF"
SUFFIX = ".gguf"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
# The longest tokenizers have 260,000 tokens and 500,000 merges; those of a header are walked one by one.
_MAX_STRINGS = 4_000_000
# A chat template has some kilobytes, a tokenizer kept as JSON 33 MB.
_MAX_STRING_BYTES = 128 * 1024 * 1024
# The largest models have some thousands; the limit keeps a damaged count from filling the memory with names.
_MAX_ENTRIES = 65_536
_MAX_NAME_BYTES = 65_535  # of a key, by the format
_MAX_AXES = 4  # of ggml
# Of a row; the widest have some hundred thousand. A row is what is decoded at once.
_MAX_COLUMNS = 2**24
# Bytes and values of one read: little beside the memory of the smallest machine.
_BLOCK_BYTES = 16 * 1024 * 1024

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d"}
_FLOAT32, _BOOL, _STRING, _ARRAY = 6, 7, 8, 9
# What is no block of quantised numbers, and the numpy dtype of its elements.
PLAIN = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}


@dataclass(frozen=True)
class GgufArray:
    """An array of the metadata, of which only its length is kept."""

    count: int

    def __repr__(self) -> str:
        return f"array of {self.count}"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor as the file has it. `type`: such as `Q4_K`. `shape`: slowest axis first, as numpy has it.

    `block`: how many elements of a row `block_bytes` bytes hold together. `offset`: from the start of the file.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    block: int
    block_bytes: int
    offset: int

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Rows of blocks; a vector has one."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return self.columns // self.block * self.block_bytes

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def dtype(self) -> np.dtype:
        """What its values are read as: what they are stored as, float32 for quantised ones."""
        return PLAIN.get(self.type, np.dtype(np.float32))


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF, by its first bytes, or by its name where these are damaged."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC or path.suffix == SUFFIX
    except (OSError, ValueError):
        return False


class GgufFile:
    """A GGUF file open for reading; close it, or use it as a context manager.

    `metadata`: key to value; a float32 as the shortest decimal that stands for it. `tensors`: by name, as stored.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._fd = open_regular(self.path)
        try:
            self.size = os.fstat(self._fd).st_size
            with open(self._fd, "rb", closefd=False, buffering=1 << 16) as stream:
                header = _Header(stream, self.size, str(self.path))
                self.metadata, self.tensors = header.read()
                self.data_start = header.data_start
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def header_sha256(self) -> str:
        """sha256 of everything before the tensors' bytes."""
        digest = hashlib.sha256()
        for at in range(0, self.data_start, _BLOCK_BYTES):
            digest.update(self._bytes(at, min(_BLOCK_BYTES, self.data_start - at), "the header").data)
        return digest.hexdigest()

    def raw(self, tensor: GgufTensor, start: int, stop: int) -> np.ndarray:
        """Rows `[start:stop]` as they are stored: uint8, `[rows, tensor.row_bytes]`."""
        width = tensor.row_bytes
        return self._bytes(tensor.offset + start * width, (stop - start) * width, tensor.name).reshape(-1, width)

    def _bytes(self, offset: int, count: int, name: str) -> np.ndarray:
        out = np.empty(count, np.uint8)
        view = out.data
        while view.nbytes:
            got = os.preadv(self._fd, [view], offset)
            if got == 0:
                raise InputError(f"{self.path}: truncated while reading '{shown(name)}' at byte {offset}")
            view, offset = view[got:], offset + got
        return out


def row_blocks(tensor: GgufTensor, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that cover `[start:stop]`, of about 16 MiB of values each."""
    step = max(1, _BLOCK_BYTES // (4 * tensor.columns))
    for at in range(start, stop, step):
        yield at, min(stop, at + step)


def values(raw: np.ndarray, tensor_type: str) -> np.ndarray:
    """The values of stored rows `[rows, bytes]`: `[rows, columns]`, in the type's own dtype, float32 of quantised ones.

    `InputError` for a type that the `gguf` package cannot read.
    """
    if tensor_type in PLAIN:
        return raw.view(PLAIN[tensor_type])
    import gguf

    try:
        with np.errstate(all="ignore"):  # scales may be NaN or infinite
            return gguf.dequantize(raw, gguf.GGMLQuantizationType[tensor_type])
    except NotImplementedError:
        raise InputError(
            f"the gguf package cannot read values of type {tensor_type}; requantise to a type that it can"
        ) from None


# Of types whose values are counted from a least one that is not 0: the bytes before a block's codes.
_BEFORE_CODES = {"Q4_0": 2, "Q4_1": 4, "Q5_0": 2, "Q5_1": 4, "Q4_K": 16, "Q5_K": 16}


def least(raw: np.ndarray, tensor: GgufTensor, size: int) -> np.ndarray | None:
    """What the codes of stored rows `[rows, bytes]` are counted from, by blocks of `size`: the values of codes of 0,
    float32 `[rows, blocks]`. None of a type that counts from 0."""
    if tensor.type not in _BEFORE_CODES:
        return None
    blocks = raw.reshape(len(raw), -1, tensor.block_bytes).copy()
    blocks[..., _BEFORE_CODES[tensor.type] :] = 0
    return values(blocks.reshape(raw.shape), tensor.type)[:, ::size]


@functools.cache
def block_sizes() -> Mapping[str, tuple[int, int]]:
    """Elements and bytes of a block, by type; of a plain type one element."""
    import gguf

    return {kind.name: sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}


class _Header:
    """One walk over a header. Whatever it announces is compared with the rest of the file first."""

    def __init__(self, stream: BinaryIO, size: int, where: str):
        self.stream, self.size, self.where = stream, size, where
        self.at, self.strings, self.data_start = 0, 0, 0

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        magic = self.take(min(4, self.size), "the magic")
        if magic != MAGIC:
            raise InputError(f"{self.where}: begins with {shown(magic)}, a GGUF file with {shown(MAGIC)}")
        version = self.number("<I", "the version")
        if version not in _VERSIONS:
            big = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            hint = "; it is big-endian, which is not read" if big else ""
            raise InputError(f"{self.where}: GGUF version {version}, expected {' or '.join(map(str, _VERSIONS))}{hint}")
        tensors, pairs = self.number("<Q", "the number of tensors"), self.number("<Q", "the number of keys")
        self.fits(tensors, 24, "tensors", limit=_MAX_ENTRIES)
        self.fits(pairs, 13, "keys", limit=_MAX_ENTRIES)
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.text("a key", limit=_MAX_NAME_BYTES)
            if key in metadata:
                raise InputError(f"{self.where}: two values of key '{shown(key)}'")
            metadata[key] = self.value(self.number("<I", f"the type of '{shown(key)}'"), key)
        alignment = self.alignment(metadata)
        found = [self.tensor(alignment) for _ in range(tensors)]
        self.data_start = -(-self.at // alignment) * alignment
        return metadata, self.placed(found, alignment)

    def take(self, count: int, what: str) -> bytes:
        data = self.stream.read(count) if count <= self.size - self.at else b""
        if len(data) != count:
            raise InputError(
                f"{self.where}: {what} at byte {self.at} needs {count} bytes, the file has {self.size - self.at} left; "
                "truncated or damaged"
            )
        self.at += count
        return data

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def fits(self, count: int, least: int, what: str, *, limit: int | None = None) -> None:
        """`InputError` unless the file can hold `count` things of `least` bytes each."""
        if count * least > self.size - self.at:
            raise InputError(f"{self.where}: {count} {what} announced in a file of {self.size} bytes; it is damaged")
        if limit is not None and count > limit:
            raise InputError(f"{self.where}: {count} {what}, at most {limit} are read")

    def text(self, what: str, *, limit: int = _MAX_STRING_BYTES) -> str:
        length = self.number("<Q", f"the length of {what}")
        if length > limit:
            raise InputError(f"{self.where}: {what} at byte {self.at} is {length} bytes long, at most {limit} may be")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise InputError(f"{self.where}: {what} at byte {self.at - length} is not UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        what = f"the value of '{shown(key)}'"
        if kind == _STRING:
            return self.text(what)
        if kind == _BOOL:
            flag = self.number("<B", what)
            if flag > 1:
                raise InputError(f"{self.where}: {what} is a bool of {flag}, expected 0 or 1")
            return bool(flag)
        if kind == _ARRAY:
            return self.array(what)
        if kind not in _SCALARS:
            raise InputError(f"{self.where}: {what} is of type {kind}, which GGUF has not")
        number = self.number(_SCALARS[kind], what)
        # 1e-6 is stored as 9.99999997e-07: any number that rounds to it says the same, and people mean the shortest.
        return float(str(np.float32(number))) if kind == _FLOAT32 else number

    def array(self, what: str) -> GgufArray:
        kind, count = self.number("<I", what), self.number("<Q", f"the length of {what}")
        if kind == _STRING:
            self.fits(count, 8, f"strings of {what}", limit=_MAX_STRINGS - self.strings)
            self.strings += count
            for _ in range(count):
                self.skip(self.number("<Q", what), what)
        elif kind == _BOOL or kind in _SCALARS:
            size = struct.calcsize(_SCALARS.get(kind, "<B"))
            self.fits(count, size, f"elements of {what}")
            self.skip(count * size, what)
        else:
            raise InputError(f"{self.where}: {what} is an array of type {kind}, expected numbers, bools or strings")
        return GgufArray(count)

    def skip(self, count: int, what: str) -> None:
        if count <= 1 << 12:
            self.take(count, what)
        else:
            self.fits(1, count, f"piece of {what}")
            self.stream.seek(count, os.SEEK_CUR)
            self.at += count

    def alignment(self, metadata: dict[str, Any]) -> int:
        found = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(found, int) or isinstance(found, bool) or found < 1 or found & (found - 1):
            raise InputError(f"{self.where}: general.alignment: expected a power of 2, got {got(found)}")
        return found

    def tensor(self, alignment: int) -> GgufTensor:
        """One entry, its offset as stored: from the start of the data."""
        import gguf

        name = self.text("a tensor's name", limit=_MAX_NAME_BYTES)
        place = f"{self.where}: tensor '{shown(name)}'"
        axes = self.number("<I", f"the axes of '{shown(name)}'")
        if not 1 <= axes <= _MAX_AXES:
            raise InputError(f"{place}: {axes} axes, expected 1 to {_MAX_AXES}")
        shape = struct.unpack(f"<{axes}Q", self.take(8 * axes, f"the shape of '{shown(name)}'"))[::-1]
        kind = self.number("<I", f"the type of '{shown(name)}'")
        offset = self.number("<Q", f"the offset of '{shown(name)}'")
        try:
            known = gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise InputError(f"{place}: type {kind} is none that the gguf package knows") from None
        block, width = block_sizes()[known.name]
        if shape[-1] > _MAX_COLUMNS:
            raise InputError(f"{place}: rows of {shape[-1]} elements, at most {_MAX_COLUMNS} may be")
        if 0 in shape:
            raise InputError(f"{place}: shape {list(shape)} has an axis of 0")
        if shape[-1] % block:
            raise InputError(
                f"{place}: a row of shape {list(shape)} is not whole blocks of {block}, as {known.name} has"
            )
        if offset % alignment:
            raise InputError(f"{place}: offset {offset} is not a multiple of the alignment {alignment}")
        return GgufTensor(name, known.name, shape, block, width, offset)

    def placed(self, found: list[GgufTensor], alignment: int) -> dict[str, GgufTensor]:
        """The tensors, their offsets from the start of the file: inside it, without overlaps or holes."""
        tensors: dict[str, GgufTensor] = {}
        position = self.data_start
        for tensor in sorted(found, key=lambda t: t.offset):
            place, start = f"{self.where}: tensor '{shown(tensor.name)}'", self.data_start + tensor.offset
            if tensor.name in tensors:
                raise InputError(f"{place}: stands twice in the header")
            if start != position:
                kind = "overlaps the tensor before it" if start < position else "leaves a hole before it"
                raise InputError(f"{place}: {kind} (byte {start}, expected {position})")
            if start + tensor.nbytes > self.size:
                raise InputError(
                    f"{place}: {tensor.type} {list(tensor.shape)} needs {tensor.nbytes} bytes at byte {start}, the "
                    f"file has {self.size}; truncated or damaged"
                )
            position = start + -(-tensor.nbytes // alignment) * alignment
            tensors[tensor.name] = GgufTensor(**{**vars(tensor), "offset": start})
        if tensors and self.size > position:
            raise InputError(f"{self.where}: {self.size - position} bytes after the last tensor; the file is damaged")
        return {tensor.name: tensors[tensor.name] for tensor in found}
