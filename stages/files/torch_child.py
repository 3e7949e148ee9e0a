"""Where the tensors of pickled torch files lie, found in a confined child by their opcodes; nothing is unpickled."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import InputError, shown
from stages.files.confined import Limits, ask, serve
from stages.files.pickle_listing import Stored, check_pickle, open_zip, stored_tensors
from stages.spec.dtypes import DTYPES, stored_dtype

# A pickle of 64 MiB is some 2 million placeholders of 200 bytes; numpy and its threads reserve the rest.
_MEMORY = 4 * 1024**3
# Processor time: the imports, then opcodes at 1 us each and checksums at 1 GB a second.
_SECONDS = 120
_BYTES_PER_SECOND = 100e6
_KNOWN = {dtype.name for dtype in DTYPES.values()}


@dataclass(frozen=True)
class Lying:
    """One tensor: `count` bytes at byte `at` of its file, which hold `shape` in steps of `stride` elements."""

    dtype: np.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    at: int
    count: int


def locate(paths: Sequence[Path]) -> list[dict[str, Lying]]:
    """The dense tensors of each file by name (see `stored_tensors`); one child for all of them.

    `InputError` naming the first file that is damaged or too old, or holds a tensor that its bytes do not.
    """
    size = sum(path.stat().st_size for path in paths)
    seconds = _SECONDS + int(size / _BYTES_PER_SECOND)
    request = {"path": str(paths[0]), "paths": [str(path.absolute()) for path in paths]}
    reply = ask(__spec__.name, request, paths[0], Limits(_MEMORY, seconds, 600 + seconds), plain="a file of tensors")
    return [{name: _lying(entry) for name, entry in file.items()} for file in reply["files"]]


def _lying(entry: Mapping[str, Any]) -> Lying:
    shape, stride = tuple(entry["shape"]), tuple(entry["stride"])
    return Lying(stored_dtype(entry["dtype"]), shape, stride, entry["at"], entry["count"])


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    return {"files": [_located(Path(path)) for path in request["paths"]]}


def _located(path: Path) -> dict[str, dict[str, Any]]:
    tensors = stored_tensors(path)
    check_pickle(path)
    with open_zip(path) as archive, path.open("rb") as stream:
        records = {info.filename: info for info in archive.infolist()}
        folder = next(name for name in records if name == "data.pkl" or name.endswith("/data.pkl"))[: -len("data.pkl")]
        if f"{folder}byteorder" in records and archive.read(f"{folder}byteorder") != b"little":
            raise InputError(f"{path}: written on a machine that stores numbers big end first")
        return {
            tensor.name: _placed(path, tensor, records.get(f"{folder}data/{tensor.storage}"), stream)
            for tensor in tensors
            if tensor.dtype in _KNOWN
        }


def _placed(path: Path, tensor: Stored, record: zipfile.ZipInfo | None, stream: Any) -> dict[str, Any]:
    if record is None or record.compress_type != zipfile.ZIP_STORED:
        raise InputError(f"{path}: '{shown(tensor.name)}': its storage is not in the file as torch.save writes it")
    size, elements = stored_dtype(tensor.dtype).itemsize, int(np.prod(tensor.shape, dtype=object))
    steps = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True))
    reach = steps + 1 if elements else 0
    if max(tensor.first + reach, elements) * size > record.file_size:
        raise InputError(
            f"{path}: '{shown(tensor.name)}' claims {elements} elements of {size} bytes, its storage holds "
            f"{record.file_size} bytes; record a contiguous copy"
        )
    # The names in a record's own header may be padded, so that its bytes begin at a multiple of 64.
    stream.seek(record.header_offset + 26)
    name, extra = (int.from_bytes(stream.read(2), "little") for _ in range(2))
    at = record.header_offset + 30 + name + extra + tensor.first * size
    place = {"at": at, "count": reach * size}
    return {"dtype": tensor.dtype, "shape": tensor.shape, "stride": tensor.stride, **place}


if __name__ == "__main__":
    serve(_answer)
