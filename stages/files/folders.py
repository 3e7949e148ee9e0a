"""Output folders: refused, in one line and before anything is computed, when they cannot take a result.

One run at a time; of a run that failed nothing stays but its finished sides.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.errors import InputError, OutputError, ResourceError, SvfError, shown
from stages.files.jsonio import read_object, write_json

# What a run that is not finished keeps in its folder: who it is, what it was asked, which sides are done.
RUN_FILE = ".svf-run.json"
_PROBE = ".svf-probe."


def prepare_folder(path: str | os.PathLike[str]) -> Path:
    """An empty, writable folder at `path`, created with its parents when it is not there.

    `OutputError` when `path` is a file, a device, a link to anything but a folder, a folder with content, or
    cannot be created or written. Nothing that exists is changed.
    """
    folder = _existing_folder(path)
    with _told(folder), _locked(folder):
        _refuse_content(folder)
        _probe(folder)
    return folder


def check_folder(path: str | os.PathLike[str]) -> None:
    """Refuse what `prepare_folder` refuses, before anything is computed, and leave nothing behind."""
    made = not os.path.lexists(path)
    folder = prepare_folder(path)
    if made:
        folder.rmdir()


def _refuse_content(folder: Path) -> None:
    if (folder / RUN_FILE).is_file():
        raise OutputError(
            f"{folder}: holds an unfinished run ({_who(folder)}); add --resume to finish it, or empty the folder"
        )
    for entry in os.scandir(folder):
        if not entry.name.startswith((_PROBE, f".{RUN_FILE}.")):  # of a run killed before it could say who it is
            raise OutputError(
                f"{folder}: exists and is not empty (it has '{shown(entry.name)}'), and holds no unfinished run; name "
                "a new folder, or empty this one"
            )
        os.unlink(entry.path)


def _existing_folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    with _told(folder):
        _refuse_other_than_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def prepare_file(path: str | os.PathLike[str], *, force: bool | None = None) -> Path:
    """`path`, where a new file can be written. `OutputError` when something is there, or it cannot be written.

    With `force` a regular file may be there; None where the command has no such option. Nothing that exists is changed.
    """
    file = Path(path)
    try:
        replaceable = file.is_file() and not file.is_symlink()
        if os.path.lexists(file) and not (force and replaceable):
            also = "" if force is None else ", or add --force" if replaceable else "; --force is for plain files"
            raise OutputError(f"{file}: exists; name a new file, or remove this one{also}")
        if not file.name or not file.parent.is_dir():
            raise OutputError(f"{file}: its folder does not exist, or it names no file")
        _probe(file.parent)
    except OSError as error:
        raise OutputError(f"{file}: cannot be written: {error.strerror}") from None
    except ValueError as error:  # a NUL byte in the name never reaches the system
        raise OutputError(f"{str(file)!r}: is not a path: {error}") from None
    return file


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """The system's refusals as one line."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from None
    except ValueError as error:  # a NUL byte in the name never reaches the system
        raise OutputError(f"{str(folder)!r}: is not a path: {error}") from None


@dataclass
class Run:
    """A folder that one run holds; `done` are the documents of the sides that are finished, by name."""

    folder: Path
    asked: Mapping[str, Any]
    done: dict[str, Any]

    def save(self) -> None:
        """Write the run file, so that a resumed run need not compute again what is done."""
        about = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        record = {"schema": "svf.run/1", **about, "asked": self.asked, "done": self.done}
        write_json(self.folder / RUN_FILE, record)


@contextmanager
def claimed(path: str | os.PathLike[str], asked: Mapping[str, Any], *, resume: bool = False) -> Iterator[Run]:
    """Hold the folder `path` for this run alone, new or, with `resume`, that of the same `asked` cut short.

    Of a run cut short the sides that are done are kept, and all else is thrown away; when the block fails, too. After
    success the folder says nothing of the run any more. `OutputError` as in `prepare_folder`, and when another run
    holds the folder, naming it; `InputError` when the run cut short was asked something else.
    """
    made = not os.path.lexists(path)
    folder = _existing_folder(path)
    with _locked(folder):
        if resume and (folder / RUN_FILE).is_file():
            run = _resumed(folder, asked)
        else:
            _refuse_content(folder)
            run = Run(folder, asked, {})
        try:
            run.save()
            yield run
            with _told(folder):
                (folder / RUN_FILE).unlink()
        except BaseException:
            _empty(folder, keep=(RUN_FILE, *run.done) if run.done else ())
            if made and not run.done:
                folder.rmdir()
            raise


@contextmanager
def new_folder(path: str | os.PathLike[str], *, resume: bool = False) -> Iterator[Path]:
    """A claimed folder of one result: all of it, or nothing. With `resume`, that of a run that was killed."""
    with claimed(path, {}, resume=resume) as run:
        yield run.folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """An advisory lock on the folder itself; the system lets go of it however this process ends."""
    with _told(folder):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise OutputError(f"{folder}: another run is writing here ({_who(folder)}); name another folder") from None
    finally:
        os.close(fd)


def _resumed(folder: Path, asked: Mapping[str, Any]) -> Run:
    record = read_object(folder / RUN_FILE)
    begun = record.get("asked")
    if begun != asked or not isinstance(record.get("done"), dict):
        raise InputError(
            f"{folder}: the unfinished run was begun with other options ({shown(_first_difference(begun, asked))}); "
            "give the same options, or name a new folder without --resume, or empty this one"
        )
    done = dict(record["done"])
    _empty(folder, keep=(RUN_FILE, *done))
    return Run(folder, asked, done)


def _first_difference(begun: Any, asked: Any, name: str = "") -> str:
    """Which option differs, and how: `layers: 0, now all`."""
    if isinstance(begun, dict) and isinstance(asked, Mapping):
        for key in dict.fromkeys([*begun, *asked]):
            if begun.get(key) != asked.get(key):
                return _first_difference(begun.get(key), asked.get(key), str(key))
    return f"{name}: {begun}, now {asked}"


def _who(folder: Path) -> str:
    """Process, host and start of the run that a folder tells of."""
    try:
        record = read_object(folder / RUN_FILE)
    except SvfError:
        return "it has not said who it is"
    return shown(f"process {record.get('pid')} on {record.get('host')}, started {record.get('started')}")


def _empty(folder: Path, keep: Sequence[str] = ()) -> None:
    for entry in os.scandir(folder):
        if entry.name not in keep:
            shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)


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
    probe = folder / f"{_PROBE}{os.getpid()}.tmp"
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
