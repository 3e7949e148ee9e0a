"""One process per backend: the command line runs itself as a child."""

from __future__ import annotations

import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages import errors
from stages.errors import ResourceError, SvfError, shown
from stages.files.folders import Run
from stages.files.jsonio import parse_json
from stages.files.scratch import scratch_folder
from stages.progress import Progress
from stages.run.watch import FILE_VARIABLE, PARENT_VARIABLE, last_place

_LOG = logging.getLogger("svf")
# Run as a file: no path of the user's can put another program in its place.
_START = Path(__file__).resolve().parents[2] / "svf_torch" / "start.py"


@dataclass(frozen=True)
class ChildResult:
    """How a child ended: exit code (negative: a signal), its JSON document (None: it printed none), the stage it was
    in last, the limit in seconds that it ran past, if that is why it ended, and the error that it told of."""

    returncode: int
    document: Any
    place: str | None = None
    timeout: float | None = None
    error: str | None = None


def run_svf(
    arguments: Sequence[str], environment: Mapping[str, str] | None = None, *, timeout: float | None = None
) -> ChildResult:
    """Run `svf ARGUMENTS` in a fresh interpreter, for `timeout` seconds at most.

    Its stderr passes through, its stdout is the document. It ends with this process, however that ends.
    """
    command = [sys.executable, "-P", str(_START), *arguments]  # -P: nor is anything beside that file imported by name
    with scratch_folder("watch") as folder:
        watch = str(folder / "place")
        Path(watch).touch()
        watched = {FILE_VARIABLE: watch, PARENT_VARIABLE: str(os.getpid())}
        env = {**os.environ, ISOLATED: "1", **watched, **(environment or {})}
        started = time.monotonic()
        try:
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=False, timeout=timeout)
        except subprocess.TimeoutExpired:
            return ChildResult(-signal.SIGKILL, None, last_place(watch), timeout)
        _LOG.info("svf %s: exit code %d after %.1f s", arguments[0], done.returncode, time.monotonic() - started)
        place = last_place(watch)
    text = done.stdout.strip()
    document = parse_json(text, f"output of svf {arguments[0]}") if text else None
    if isinstance(document, dict) and document.get("schema") == errors.SCHEMA:
        return ChildResult(done.returncode, None, place, error=document["message"])
    return ChildResult(done.returncode, document, place)


def document_of(name: str, child: ChildResult) -> Any:
    """What the side called `name` printed; otherwise an `SvfError` that says how it ended, in which stage.

    The exit code is the child's own, 7 when it ran out of time or memory, 70 when it crashed.
    """
    if child.document is not None and child.returncode >= 0:
        return child.document
    where = f" in {shown(child.place)}" if child.place else ""
    if child.timeout is not None:
        raise ResourceError(f"the {name} side was stopped after {child.timeout:g} s (--timeout){where}")
    if child.returncode == -signal.SIGKILL:
        raise ResourceError(
            f"the {name} side was killed{where}, which is what a machine out of memory does; try fewer tokens, "
            "--stages or --chunk-rows"
        )
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if child.error is None and limit != resource.RLIM_INFINITY:  # OpenBLAS and XLA end their process, with any code
        raise ResourceError(
            f"the {name} side ended{where} without a word: {limit:,} bytes of address space are allowed"
        )
    if child.returncode < 0:
        raise SvfError(f"the {name} side crashed with {signal.Signals(-child.returncode).name}{where}")
    raise SideError(name, child.returncode if child.returncode > 1 else 70, where, child.error)


class SideError(SvfError):
    """A side ended by itself without its document; `said` is its own message, None where it told of none."""

    def __init__(self, name: str, exit_code: int, where: str, said: str | None):
        self.exit_code, self.said = exit_code, said
        ending = f": {said}" if said else f" with exit code {exit_code}; its message stands above"
        super().__init__(f"the {name} side stopped{where}{ending}")


def command_line(arguments: Mapping[str, Sequence[str]]) -> list[str]:
    """What all sides are asked, as one list: the same when two commands ask the same."""
    return [word for words in arguments.values() for word in words]


def run_sides(
    arguments: Mapping[str, Sequence[str]], folder: Path, run: Run | None, timeout: float | None, progress: Progress
) -> tuple[Any, ...]:
    """The documents of `svf ARGUMENTS --out FOLDER/NAME` for each name; one that `run` has done is not run again.

    Every side runs before the first error is raised: one that crashes or hangs costs itself alone.
    """
    done: dict[str, Any] = {} if run is None else run.done
    failed: list[SvfError] = []
    for name, words in arguments.items():
        if name in done:
            progress.say(f"{name} was finished by an earlier run")
            continue
        progress.say(f"{words[0]} on {name}")
        flags = [] if progress.enabled else ["--no-progress"]
        try:
            document = document_of(name, run_svf([*flags, *words, "--out", str(folder / name)], timeout=timeout))
        except SvfError as error:
            failed.append(error)
            continue
        done[name] = document
        if run is not None:
            run.save()
    if failed:
        raise _with_kept(_as_one(failed, len(arguments)), run)
    return tuple(done[name] for name in arguments)


def _as_one(failed: Sequence[SvfError], sides: int) -> SvfError:
    """One error for all that failed: what every side says alike is about what was asked, and is said once."""
    first, said = failed[0], {getattr(error, "said", None) for error in failed}
    alike = len(said) == 1 and len(failed) == sides > 1
    first.args = (said.pop() or str(first),) if alike else ("; ".join(map(str, failed)),)
    return first


def _with_kept(error: SvfError, run: Run | None) -> SvfError:
    """The error, saying too which side's dump is kept."""
    if run is not None and run.done:
        kept = ", ".join(str(run.folder / name) for name in run.done)
        error.args = (f"{error}; {kept} is kept: --resume runs the other side alone",)
    return error


# Set for child processes: what a command asks of its own child is complete, and no setting may change it.
ISOLATED = "SVF_ISOLATED"
