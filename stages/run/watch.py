"""Where a child process is: the stage it computes, in a small file that outlives a crash of any kind."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

# Set by the parent: the file to write to, and the process that must not die before its child.
FILE_VARIABLE = "SVF_WATCH_FILE"
PARENT_VARIABLE = "SVF_WATCH_PARENT"
# Set for child processes: what is asked of them is complete, and no setting may change it.
ISOLATED = "SVF_ISOLATED"
# One write of fixed size is never seen half done; the longest key is a layer, a dot and a stage name.
_SIZE = 256
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class _Watch:
    """The open file; -1 until the first call, -2 when there is none to write."""

    fd = -1


def entering(place: str) -> None:
    """Say that `place` (a stage, its layer or tensor) is about to be computed; about a microsecond."""
    if _Watch.fd == -1:
        path = os.environ.get(FILE_VARIABLE)
        _Watch.fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC) if path else -2
    if _Watch.fd >= 0:
        os.pwrite(_Watch.fd, place.encode()[:_SIZE].ljust(_SIZE), 0)


def last_place(path: str) -> str | None:
    """What a child said last; None when it said nothing."""
    with open(path, "rb") as file:
        return file.read(_SIZE).decode(errors="replace").strip() or None


def end_with_parent() -> None:
    """End this process when the one that started it ends, even by SIGKILL; Linux only, nothing elsewhere."""
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it ended before the call
        os.kill(os.getpid(), signal.SIGTERM)
