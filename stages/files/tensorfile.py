"""Safetensors files, read by row range and written as a stream.

The `safetensors` package maps whole files and writes from whole dictionaries; a stage bundle of a
151,936 x 1,024 embedding is 8 GB. Here a tensor is read with `pread`, any rows at a time (a file
truncated while open is an error, not a SIGBUS), and written chunk by chunk behind a header that is
known beforehand. The bytes are those that the package writes: tensors ordered by dtype, wide ones first,
then by name, without gaps. Format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import InputError, OutputError, shown
from stages.files.jsonio import fsync_folder, open_regular, parse_json
from stages.files.memory import aligned_empty
from stages.spec.dtypes import DTYPES

_LOG = logging.getLogger("svf")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Fixed by the format: a longer header is refused by every reader.
MAX_HEADER_BYTES = 100_000_000
# numpy's own limit.
MAX_AXES = 64
# What sizes other than 0 an empty tensor may have, multiplied: no byte of the file bounds them, and rows are walked.
MAX_EMPTY = 2**24
# Enough to keep the disk busy while the next chunk is computed, little beside the chunk itself.
MAX_PENDING_BYTES = 512 * 1024 * 1024
# One read: large enough for the disk, little beside the memory of the smallest machine.
_BLOCK_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class TensorInfo:
    """Name, dtype, shape and absolute byte position of one tensor in a file."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=object))

    def row_blocks(self) -> list[tuple[int, int | None]]:
        """Row ranges of about 16 MiB that cover the tensor; one without rows is one block."""
        if not self.shape:
            return [(0, None)]
        rows = self.shape[0]
        step = max(1, _BLOCK_BYTES * rows // max(1, self.nbytes))
        return [(start, min(rows, start + step)) for start in range(0, rows, step)]


class TensorFile:
    """A safetensors file open for reading; close it, or use it as a context manager."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._fd = open_regular(self.path)
        try:
            self.tensors, self.metadata = _read_header(self._fd, str(self.path))
        except BaseException:
            os.close(self._fd)
            raise
        _LOG.info("reading %s: %d tensors", self.path, len(self.tensors))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def info(self, name: str) -> TensorInfo:
        """The entry of tensor `name`; `InputError` listing what is there when it is not."""
        try:
            return self.tensors[name]
        except KeyError:
            there = ", ".join(shown(key, 60) for key in list(self.tensors)[:6])
            more = f" and {len(self.tensors) - 6} more" if len(self.tensors) > 6 else ""
            raise InputError(
                f"{self.path}: no tensor '{shown(name)}'; the file has {there or 'no tensors'}{more}"
            ) from None

    def read(self, name: str, start: int = 0, stop: int | None = None, axis: int = 0) -> np.ndarray:
        """Tensor `name`, or its slice `[start:stop]` along `axis` (0 or 1), as a fresh C-contiguous array.

        `InputError` when the tensor is not that long: the bytes behind it are another tensor's.
        """
        info = self.info(name)
        if not info.shape or (start == 0 and (stop is None or info.shape[axis : axis + 1] == (stop,))):
            return self._bytes(info.offset, info.nbytes, info).view(info.dtype).reshape(info.shape)
        size = info.shape[axis] if axis == 0 or len(info.shape) == 2 else 0
        stop = size if stop is None else stop
        if not 0 <= start <= stop <= size:
            raise InputError(
                f"{self.path}: tensor '{shown(name)}' is {list(info.shape)}, expected {start}:{stop} along axis {axis}"
            )
        if axis == 0:
            row = info.nbytes // max(1, info.shape[0])
            data = self._bytes(info.offset + start * row, (stop - start) * row, info)
            return data.view(info.dtype).reshape((stop - start, *info.shape[1:]))
        rows, columns = info.shape
        size = info.dtype.itemsize
        parts = [
            self._bytes(info.offset + (r * columns + start) * size, (stop - start) * size, info) for r in range(rows)
        ]
        return np.concatenate(parts).view(info.dtype).reshape(rows, stop - start)

    def sha256(self, name: str) -> str:
        """sha256 of the tensor's raw bytes, read a block at a time."""
        info, digest, block = self.info(name), hashlib.sha256(), 1 << 24
        for at in range(0, info.nbytes, block):
            digest.update(self._bytes(info.offset + at, min(block, info.nbytes - at), info).data)
        return digest.hexdigest()

    def _bytes(self, offset: int, count: int, info: TensorInfo) -> np.ndarray:
        out = aligned_empty((count,), np.dtype(np.uint8))
        view = out.data
        while view.nbytes:
            got = os.preadv(self._fd, [view], offset)
            if got == 0:
                raise InputError(f"{self.path}: truncated while reading '{shown(info.name)}' at byte {offset}")
            view, offset = view[got:], offset + got
        return out


# What other files begin with -> what they are, and what to do with one. No header of safetensors is so long.
_OTHERS = {
    b"version ": "a Git LFS pointer, run 'git lfs pull'",
    b"PK\x03\x04": "a zip archive, as .npz and .pt files are; write the tensors as safetensors (svf convert: a .pt)",
    b"\x93NUMPY": "a .npy array; write the tensors as safetensors",
    b"\x80\x02": "a pickle; write the tensors as safetensors (svf convert)",
    b"GGUF": "a GGUF file; write the tensors as safetensors",
    b"{": "JSON, not safetensors",
    b"[": "JSON, not safetensors",
}


def _read_header(fd: int, where: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    size = os.fstat(fd).st_size
    start = os.pread(fd, 8, 0)
    if len(start) < 8:
        raise InputError(f"{where}: {size} bytes is too short for a safetensors file")
    length = int.from_bytes(start, "little")
    if length > min(MAX_HEADER_BYTES, size - 8):
        other = next((what for magic, what in _OTHERS.items() if start.startswith(magic)), None)
        if other is not None:
            raise InputError(f"{where}: this is {other}")
        raise InputError(
            f"{where}: safetensors header of {length} bytes announced in a file of {size}; is it truncated?"
        )
    raw = os.pread(fd, length, 8)
    header = parse_json(raw, f"{where}: safetensors header")
    if not isinstance(header, dict):
        raise InputError(f"{where}: safetensors header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"{where}: safetensors __metadata__ must map names to strings")
    tensors = {name: _entry(name, value, 8 + length, where) for name, value in header.items()}
    position = 8 + length
    for info in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if info.offset != position:
            kind = "overlaps the tensor before it" if info.offset < position else "leaves a hole before it"
            raise InputError(f"{where}: tensor '{shown(info.name)}' {kind} (byte {info.offset}, expected {position})")
        position += info.nbytes
    if position != size:
        raise InputError(f"{where}: header describes {position} bytes, the file has {size}; truncated or damaged")
    return tensors, metadata


def _entry(name: str, value: Any, base: int, where: str) -> TensorInfo:
    place = f"{where}: tensor '{shown(name)}'"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{place}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{place}: dtype {shown(dtype)} is not supported; known: {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(_is_size(n) for n in shape):
        raise InputError(f"{place}: shape {shown(shape)} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise InputError(f"{place}: data_offsets {shown(offsets)} is not a pair of positions")
    info = TensorInfo(name, DTYPES[dtype], tuple(shape), base + offsets[0])
    if len(shape) > MAX_AXES or (0 in shape and math.prod(n for n in shape if n) > MAX_EMPTY):
        raise InputError(
            f"{place}: shape {shown(shape)} is impossible: too many axes, or sizes that are too large beside a "
            "size of 0"
        )
    if offsets[1] - offsets[0] != info.nbytes:
        raise InputError(
            f"{place}: {dtype} {shape} needs {info.nbytes} bytes, data_offsets give {offsets[1] - offsets[0]}"
        )
    return info


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


class TensorWriter:
    """A safetensors file written as a stream: shapes first, then slices in any order of tensors.

    Slices of one tensor along axis 0 come in order and leave no gap. Writing happens on a thread, so the
    caller may compute the next chunk meanwhile and must not change an array that it handed over. With
    `commit()` the file takes its name; without it nothing remains. `hashes` asks for sha256: of all tensors (True)
    or of those named. `keep_order` places tensors as `specs` lists them, not as the package would.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
        *,
        hashes: bool | Collection[str] = False,
        metadata: Mapping[str, str] | None = None,
        keep_order: bool = False,
    ):
        self.path = Path(path)
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        header, self._tensors, self.nbytes = _layout(
            specs, list(specs) if keep_order else _package_order(specs), metadata
        )
        wanted = (specs if hashes else ()) if isinstance(hashes, bool) else hashes
        self._hashes = {name: hashlib.sha256() for name in wanted}
        self._columnwise: set[str] = set()
        self._written = dict.fromkeys(specs, 0)
        self._pending: list[tuple[Future[None], int]] = []
        self._failure: OSError | None = None
        self._lock = threading.Lock()
        try:
            self._fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            os.pwrite(self._fd, header, 0)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tensor-writer")

    def write(self, name: str, array: np.ndarray, start: int = 0, axis: int = 0) -> None:
        """Write `array` at `[start:]` along `axis` (0 or 1) of tensor `name`."""
        info = self._tensors[name]
        # The numpy view of a transposed array would be written in memory order, so make it contiguous first.
        data = np.ascontiguousarray(array)
        if data.dtype != info.dtype:
            raise TypeError(f"{name}: expected {info.dtype}, got {data.dtype}")
        self._written[name] += data.nbytes
        while self._pending and sum(n for _, n in self._pending) + data.nbytes > MAX_PENDING_BYTES:
            self._settle()
        self._pending.append((self._thread.submit(self._put, info, data, start, axis), data.nbytes))
        while self._pending and self._pending[0][0].done():
            self._settle()

    def _settle(self) -> None:
        self._pending.pop(0)[0].result()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise OutputError(f"{self.path}: cannot be written: {self._failure.strerror}")

    def _put(self, info: TensorInfo, data: np.ndarray, start: int, axis: int) -> None:
        if self._failure is not None:
            return
        try:
            if axis == 0:
                row = info.nbytes // max(1, info.shape[0]) if info.shape else 0
                flat = data.reshape(-1).view(np.uint8)
                _pwrite_all(self._fd, flat.data, info.offset + start * row)
                if info.name in self._hashes:
                    self._hashes[info.name].update(flat.data)
            else:
                self._columnwise.add(info.name)
                size, columns = info.dtype.itemsize, info.shape[1]
                for r in range(info.shape[0]):
                    _pwrite_all(self._fd, data[r].view(np.uint8).data, info.offset + (r * columns + start) * size)
        except OSError as error:
            self._failure = error

    def commit(self) -> dict[str, str]:
        """Finish, fsync and rename; returns the sha256 of every tensor (empty without `hashes`)."""
        while self._pending:
            self._settle()
        short = [name for name, info in self._tensors.items() if self._written[name] != info.nbytes]
        if short:
            raise RuntimeError(f"{self.path}: tensors not written in full: {short[:3]}")
        try:
            digests = {name: self._digest(name) for name in self._hashes}
            os.fsync(self._fd)
            os.replace(self._temporary, self.path)
            fsync_folder(self.path.parent)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from None
        finally:
            self.close()
        return digests

    def _digest(self, name: str) -> str:
        if name in self._columnwise:  # written by columns: the row-major bytes exist only in the file
            info, block = self._tensors[name], 1 << 24
            ends = range(info.offset, info.offset + info.nbytes, block)
            for at in ends:
                self._hashes[name].update(os.pread(self._fd, min(block, info.offset + info.nbytes - at), at))
        return self._hashes[name].hexdigest()

    def close(self) -> None:
        """Stop; an uncommitted file disappears."""
        self._thread.shutdown(wait=True)
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _package_order(specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> list[str]:
    order = {dtype: i for i, dtype in enumerate(DTYPES.values())}
    return sorted(specs, key=lambda n: (order.get(np.dtype(specs[n][0]), -1), n))


def _layout(
    specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]], names: Iterable[str], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, TensorInfo], int]:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    tensors: dict[str, TensorInfo] = {}
    position = 0
    for name in names:
        dtype, shape = np.dtype(specs[name][0]), tuple(int(n) for n in specs[name][1])
        if dtype not in _NAMES:
            raise TypeError(f"{name}: safetensors has no dtype for {dtype}")
        info = TensorInfo(name, dtype, shape, position)
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, position + info.nbytes],
        }
        tensors[name] = info
        position += info.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    placed = {n: TensorInfo(n, t.dtype, t.shape, t.offset + base) for n, t in tensors.items()}
    return len(text).to_bytes(8, "little") + text, placed, base + position


def _pwrite_all(fd: int, view: memoryview, offset: int) -> None:
    while view.nbytes:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    *,
    hashes: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Write a whole dictionary of arrays atomically; returns their sha256 when asked."""
    specs = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    with TensorWriter(path, specs, hashes=hashes, metadata=metadata) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
        return writer.commit()


def sha256_by_rows(info: TensorInfo, read: Callable[[int, int | None], np.ndarray]) -> str:
    """sha256 over the bytes of a tensor that `read(start, stop)` gives by rows, a block at a time."""
    digest = hashlib.sha256()
    for start, stop in info.row_blocks():
        digest.update(read(start, stop).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def sha256(array: np.ndarray) -> str:
    """sha256 over the raw little-endian, row-major bytes of `array`."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()
