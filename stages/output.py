"""Output folders: refused, in one line and before anything is computed, when they cannot take a result."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.errors import OutputError, ResourceError


def prepare_folder(path: str | os.PathLike[str]) -> Path:
    """An empty, writable folder at `path`, created with its parents when it is not there.

    `OutputError` when `path` is a file, a device, a link to anything but a folder, a folder with content, or
    cannot be created or written. Nothing that exists is changed.
    """
    folder = Path(path)
    try:
        _refuse_other_than_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        first = next(os.scandir(folder), None)
        if first is not None:
            raise OutputError(
                f"{folder}: exists and is not empty (it has '{first.name}'); name a new folder, or empty this one"
            )
        _probe(folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from None
    except ValueError as error:  # a NUL byte in the name never reaches the system
        raise OutputError(f"{str(folder)!r}: is not a path: {error}") from None
    return folder


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`prepare_folder`, emptied again when the block fails: no half-written result stays behind."""
    made = not os.path.lexists(path)
    folder = prepare_folder(path)
    try:
        yield folder
    except BaseException:
        for entry in os.scandir(folder):
            shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
        if made:
            folder.rmdir()
        raise


def _refuse_other_than_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    if folder.is_symlink():
        raise OutputError(f"{folder}: is a link to '{os.readlink(folder)}', which is not a folder; name a new folder")
    if folder.exists():
        kind = "a file" if folder.is_file() else "a device, pipe or socket"
        raise OutputError(f"{folder}: is {kind}, expected a folder or nothing; name a new folder")


def _probe(folder: Path) -> None:
    """Write a file and remove it: permission bits say nothing to root, nor about a read-only file system."""
    probe = folder / f".svf-probe.{os.getpid()}.tmp"
    os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    probe.unlink()


def ensure_space(path: str | os.PathLike[str], needed: int) -> None:
    """`ResourceError`, naming both figures, when the disk under `path` has fewer than `needed` bytes free.

    `path` need not exist: its nearest existing parent is asked.
    """
    place = Path(os.path.abspath(path))
    while True:
        try:
            free = shutil.disk_usage(place).free
            break
        except OSError as error:
            if place == place.parent or error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise OutputError(f"{path}: free space cannot be read: {error.strerror}") from None
            place = place.parent
    if free < needed:
        raise ResourceError(
            f"{path}: needs {_size(needed)}, the disk has {_size(free)} free; free some space or name another disk"
        )


def _size(count: int) -> str:
    return f"{count:,} bytes ({count / 2**30:.2f} GiB)"
