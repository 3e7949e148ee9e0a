"""Stops an `svf` command at every point where it writes, one after the other, and looks at what it left.

python write_points.py kill|full FOLDER WORDS...     WORDS hold @ where the output folder stands

`kill`: SIGKILL at the n-th write, then the same command with --resume, which must give the bytes of a run that was
never stopped. `full`: the n-th write fails for want of space; exit code 6, and nothing may be left. Prints the number
of points as JSON. Forks for each point, when what commands on the reference backend import is there; nothing of it has
threads of its own.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers import load_all

import cli
from stages.files.dump import MANIFEST_FILE

# The calls by which this project changes a file system; those of the first list may want space.
TAKES_SPACE = ("write", "pwrite", "replace", "fsync", "ftruncate", "mkdir")
WRITES = (*TAKES_SPACE, "unlink", "rmdir")
# Exit code of a run that ended well before the point was reached: there are no more points.
NEVER = 99


def stop_at(point: int, stop: Callable[[], None]) -> Callable[[], bool]:
    """Make the `point`-th write of this process call `stop` first; returns whether it came to that.

    stdout and stderr are not counted.
    """
    seen = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *rest: Any, **named: Any) -> Any:
            nonlocal seen
            seen += target not in (1, 2)
            if seen == point and target not in (1, 2):
                stop()
            return real(target, *rest, **named)

        return call

    for name in WRITES if stop is kill else TAKES_SPACE:
        setattr(os, name, counted(getattr(os, name)))
    return lambda: seen >= point


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def run(words: list[str], out: Path, point: int = 0, stop: Callable[[], None] = kill) -> int:
    """The command in a fork: its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        reached = stop_at(point, stop) if point else lambda: True
        code: Any = 0
        try:
            cli.app(["--no-progress", *(str(out) if word == "@" else word for word in words)])
        except SystemExit as end:
            code = end.code
        os._exit(int(code or 0) if reached() else NEVER)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def killed(words: list[str], folder: Path, whole: dict[str, bytes]) -> int:
    """Points survived; a folder with a manifest is whole whatever happened, and --resume completes any other."""
    point = 0
    while True:
        point += 1
        out = folder / f"kill-{point}"
        if run(words, out, point) == NEVER:
            assert tree(out) == whole
            return point - 1
        left = tree(out) if out.exists() else {}
        if MANIFEST_FILE in left:
            assert {name: left[name] for name in whole} == whole, f"committed too early at {point}"
        if left == whole:  # stopped after its last word
            continue
        code = run([*words, "--resume"], out)
        assert code == 0, f"--resume after point {point} ended with {code}: {sorted(left)}"
        assert tree(out) == whole, f"other bytes after point {point}"


def full(words: list[str], folder: Path, whole: dict[str, bytes]) -> int:
    """Points survived; each ends with exit code 6 and an empty place, or with all of the result."""
    point = 0
    while True:
        point += 1
        out = folder / f"full-{point}"
        code = run(words, out, point, no_space)
        if code in (0, NEVER):  # 0: the failure did no harm
            assert tree(out) == whole
        if code == NEVER:
            return point - 1
        assert code in (0, 6), f"point {point} ended with {code}"
        assert code == 0 or not out.exists() or not tree(out), f"point {point} left {sorted(tree(out))}"


def main(mode: str, folder: Path, words: list[str]) -> None:
    load_all()
    assert run(words, folder / "whole") == 0
    whole = tree(folder / "whole")
    found = {"kill": killed, "full": full}[mode](words, folder, whole)
    print(json.dumps({"points": found, "files": len(whole)}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
