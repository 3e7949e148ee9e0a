"""JSON files, read with suspicion and written whole or not at all."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stages.errors import InputError, NotFoundError, OutputError, shown

# A manifest of 100,000 tensors is about 30 MB; more than this is not a manifest.
MAX_JSON_BYTES = 256 * 1024 * 1024
# Those tensors are 700,000 values, and a value takes up to 100 bytes of memory.
MAX_JSON_VALUES = 4_000_000
# No document of ours nests beyond 10; Python's recursion, which whoever walks a document shares, ends at 1,000.
MAX_JSON_DEPTH = 64


def parse_json(data: bytes, where: str) -> Any:
    """The JSON value in `data`; `InputError` naming `where` for bad syntax, bad UTF-8, half of a surrogate pair, a
    duplicate key, or more values or nesting than any document has."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise InputError(
                    f"{where}: duplicate key '{shown(key)}'; a file with two values for one key cannot be trusted"
                )
            result[key] = value
        return result

    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > MAX_JSON_VALUES:  # before any is made
        raise InputError(f"{where}: more than {MAX_JSON_VALUES} values in one JSON document")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=no_duplicates)
        _check_text(data, value)
    except (UnicodeError, json.JSONDecodeError, RecursionError, ValueError) as error:
        raise InputError(f"{where}: expected JSON, got {shown(error)}") from None
    _check_depth(value, where)
    return value


def _check_text(data: bytes, value: Any) -> None:
    """`UnicodeError` where an escape stands for half of a surrogate pair: such a text has no bytes."""
    if b"\\ud" in data or b"\\uD" in data:
        json.dumps(value, ensure_ascii=False).encode()


def _check_depth(value: Any, where: str) -> None:
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [item for holder in level for item in _items(holder) if isinstance(item, dict | list)]
        if not level:
            return
    raise InputError(f"{where}: JSON nested deeper than {MAX_JSON_DEPTH}")


def _items(holder: Any) -> Iterable[Any]:
    return holder.values() if isinstance(holder, dict) else holder if isinstance(holder, list) else ()


def read_json(path: str | os.PathLike[str]) -> Any:
    """The JSON value in the file at `path`."""
    return parse_json(read_bytes(path, MAX_JSON_BYTES), str(path))


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in the file at `path`; another kind of value is an `InputError`."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """All bytes of a regular file of at most `limit` bytes."""
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(limit + 1)  # a file may be longer than it says: those of /proc say 0
    if len(data) > limit:
        raise InputError(f"{path}: is larger than the {limit} bytes that such a file may have")
    return data


def open_regular(path: str | os.PathLike[str]) -> int:
    """A descriptor for reading the regular file at `path`; `NotFoundError` for anything else.

    What was opened is looked at, not the name again: a pipe or a device is neither waited for nor read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFoundError(f"{path}: does not exist") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise NotFoundError(f"{path}: cannot be read: {reason}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise NotFoundError(f"{path}: is not a regular file")
    return fd


def write_atomic(path: str | os.PathLike[str], write: Callable[[int], None]) -> None:
    """Create `path` by a temporary name in its folder: `write(fd)`, fsync, rename, fsync of the folder.

    At no moment does `path` hold a part of the file. `OutputError` when it cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            write(fd)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, target)
        fsync_folder(target.parent)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def copy_atomic(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copy a file in blocks, atomically."""

    def blocks(fd: int) -> None:
        with open(source, "rb") as file:
            while data := file.read(1 << 24):
                write_all(fd, data)

    write_atomic(target, blocks)


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write every byte of `data`; `os.write` may write fewer."""
    view = memoryview(data).cast("B")
    while view.nbytes:
        view = view[os.write(fd, view) :]


def to_json(value: Any) -> str:
    """`value` as one JSON document with a stable layout, in ASCII: what a name holds never reaches a terminal.

    NaN and infinity become null (JSON has neither).
    """
    return json.dumps(_finite(value), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def version_of(name: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import, and seldom needed

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def made_now() -> dict[str, str]:
    """By which version and when a document was made, in UTC; SOURCE_DATE_EPOCH is honoured."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    seconds = int(epoch) if epoch.isascii() and epoch.isdigit() else time.time()
    at = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"svf": version_of("svf") or "not installed", "at": at}


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` to `path` atomically."""
    write_atomic(path, lambda fd: write_all(fd, (to_json(value) + "\n").encode()))
