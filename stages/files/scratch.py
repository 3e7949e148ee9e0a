"""Folders for what a run needs and nobody keeps. Of a run that was killed the next one clears them away."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_PREFIX = "svf-"
# In a folder whose process holds its lock, or has died. Without it a folder is another program's, or not locked yet.
_MARK = ".svf-scratch"


@contextmanager
def scratch_folder(name: str, place: Path | None = None) -> Iterator[Path]:
    """An empty folder until the context ends, in the system's temporary folder or in `place`."""
    _reap(Path(tempfile.gettempdir()) if place is None else place)
    with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{name}-", dir=place) as made:
        fd = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it however this process ends
            Path(made, _MARK).touch()
            inside = Path(made, "in")
            inside.mkdir()
            yield inside
        finally:
            os.close(fd)


@cache
def _reap(place: Path) -> None:
    """Remove this user's folders under `place` whose process has ended; once a process."""
    try:
        ours = [e for e in os.scandir(place) if e.name.startswith(_PREFIX) and e.is_dir(follow_symlinks=False)]
    except OSError:  # it says so itself where a folder is to be made
        return
    for entry in ours:
        try:
            if entry.stat(follow_symlinks=False).st_uid == os.geteuid() and Path(entry.path, _MARK).is_file():
                _remove_if_left(entry.path)
        except OSError:  # another run clears it away just now
            continue


def _remove_if_left(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:  # its process lives
        return
    finally:
        os.close(fd)
