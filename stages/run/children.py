"""One process per backend: a request, a file of one dataclass, is answered by this program run as a child."""

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
from typing import Any, ClassVar, Protocol

from stages import errors
from stages.errors import ResourceError, SvfError, shown
from stages.files.folders import Run
from stages.files.jsonio import parse_json, write_json
from stages.files.scratch import scratch_folder
from stages.progress import Progress
from stages.run.watch import FILE_VARIABLE, ISOLATED, PARENT_VARIABLE, last_place

_LOG = logging.getLogger("svf")
# Run as a file: no path of the user's can put another program in its place.
_START = Path(__file__).resolve().parents[2] / "svf_torch" / "start.py"


class Request(Protocol):
    """What a child is asked: a dataclass of plain fields; `job` names what answers it (stages/commands/child.py)."""

    job: ClassVar[str]


@dataclass(frozen=True)
class ChildResult:
    """How a child ended: exit code (negative: a signal), its JSON document (None: it printed none), the stage it was
    in last, the limit in seconds that it ran past, if that is why it ended, and the error that it told of."""

    returncode: int
    document: Any
    place: str | None = None
    timeout: float | None = None
    error: str | None = None


def asked(request: Request) -> dict[str, Any]:
    """A request as JSON has it."""
    from pydantic import TypeAdapter

    fields: dict[str, Any] = TypeAdapter(type(request)).dump_python(request, mode="json")
    return fields


def run_child(
    request: Request,
    environment: Mapping[str, str] | None = None,
    *,
    timeout: float | None = None,
    progress: Progress | None = None,
) -> ChildResult:
    """Have `request` answered in a fresh interpreter, within `timeout` seconds.

    Its stderr passes through, with its own progress where `progress` shows any; its stdout is the document. It ends
    with this process, however that ends.
    """
    with scratch_folder("watch") as folder:
        file, watch = folder / "request.json", str(folder / "place")
        write_json(file, {"job": request.job, "asked": asked(request)})
        Path(watch).touch()
        quiet = [] if progress is not None and progress.enabled else ["--no-progress"]
        # -P: nor is anything beside that file imported by name.
        command = [sys.executable, "-P", str(_START), *quiet, "child", str(file)]
        watched = {FILE_VARIABLE: watch, PARENT_VARIABLE: str(os.getpid())}
        env = {**os.environ, ISOLATED: "1", **watched, **(environment or {})}
        started = time.monotonic()
        try:
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=False, timeout=timeout)
        except subprocess.TimeoutExpired:
            return ChildResult(-signal.SIGKILL, None, last_place(watch), timeout)
        seconds = time.monotonic() - started
        _LOG.info("child for %s: exit code %d after %.1f s", request.job, done.returncode, seconds)
        place = last_place(watch)
    text = done.stdout.strip()
    document = parse_json(text, f"what the child for {request.job} printed") if text else None
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
            f"the {name} side was killed{where}, probably because the machine ran out of memory; try fewer tokens, "
            "--stages or --chunk-rows"
        )
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if child.error is None and limit != resource.RLIM_INFINITY:  # OpenBLAS and XLA end their process, with any code
        raise ResourceError(
            f"the {name} side ended{where} without a message; only {limit:,} bytes of address space are allowed"
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


def run_sides(
    requests: Mapping[str, Request], progress: Progress, *, run: Run | None = None, timeout: float | None = None
) -> tuple[Any, ...]:
    """The document of each side's request, in order; one that `run` has done is not run again.

    Every side runs before the first error is raised: one that crashes or hangs costs itself alone.
    """
    done: dict[str, Any] = {} if run is None else run.done
    failed: list[SvfError] = []
    for name, request in requests.items():
        if name in done:
            progress.say(f"{name} was finished by an earlier run")
            continue
        progress.say(f"{request.job} on {name}")
        try:
            document = document_of(name, run_child(request, timeout=timeout, progress=progress))
        except SvfError as error:
            failed.append(error)
            continue
        done[name] = document
        if run is not None:
            run.save()
    if failed:
        raise _with_kept(_as_one(failed, len(requests)), run)
    return tuple(done[name] for name in requests)


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
