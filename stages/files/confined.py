"""A child process in which other people's parsers read other people's files: memory, processor time and reply limited.

A child is a module with `if __name__ == "__main__": serve(answer)`; `ask` starts it. One request goes in, one JSON
line comes out, and whatever else happens there (a crash, a panic, a loop without an end) ends in one line here.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.errors import InputError, NotFoundError, OutputError, ResourceError, SvfError, shown
from stages.files.jsonio import parse_json

_ROOT = str(Path(__file__).resolve().parents[2])
# Nothing in a child is computed in parallel, and each thread would reserve address space.
_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_ERRORS: dict[str, type[SvfError]] = {
    error.__name__: error for error in (InputError, NotFoundError, OutputError, ResourceError)
}
# What a failed allocation ends in: Rust's and C++'s abort; the kernel's out-of-memory killer.
_OUT_OF_MEMORY = (-signal.SIGABRT, -signal.SIGKILL)


@dataclass(frozen=True)
class Limits:
    """`memory`: the child's address space in bytes. `cpu`: processor time, `wall`: elapsed time, in seconds."""

    memory: int
    cpu: int
    wall: float


def ask(
    module: str,
    request: Mapping[str, Any],
    path: Path,
    limits: Limits,
    *,
    plain: str,
    ended: Callable[[int], object] = lambda _pid: None,
) -> dict[str, Any]:
    """What the child `python -P -m MODULE` replies to `request` about the file `path`, within `limits`.

    `plain` says what the file ought to be (`a plain file of tensors`); `ended(pid)` is called when the child is gone.
    `ResourceError` when memory runs out, `InputError` for everything else that goes wrong, time that runs out too,
    and whatever error the child answered with.
    """
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    message = json.dumps({**request, "memory_limit": limits.memory, "cpu_limit": limits.cpu}).encode()
    try:
        stdout, stderr = child.communicate(message, limits.wall)
    except subprocess.TimeoutExpired:
        raise InputError(f"{path}: not read after {limits.wall:g} s; it is not {plain}") from None
    finally:
        if child.poll() is None:
            child.kill()
            child.communicate()
        ended(child.pid)
    if child.returncode == -signal.SIGXCPU:
        raise InputError(f"{path}: not read in {limits.cpu} s of processor time; it is not {plain}")
    if child.returncode in _OUT_OF_MEMORY:
        raise ResourceError(f"{path}: the process that read it was killed (signal {-child.returncode}): out of memory?")
    if child.returncode != 0:
        lines = stderr.decode(errors="replace").strip().splitlines()
        reason = shown(lines[-1], 200) if lines else "no message"
        raise InputError(f"{path}: the process reading it failed ({child.returncode}): {reason}")
    reply = parse_json(stdout, f"{path}: reply of the process reading it")
    if not isinstance(reply, dict):
        raise InputError(f"{path}: the process reading it replied {shown(reply)}")
    if reply.get("error") in _ERRORS:
        raise _ERRORS[reply["error"]](str(reply.get("message")))
    return reply


def environment() -> dict[str, str]:
    """A child's environment variables: this process's, one thread, and our modules first."""
    inherited = os.environ.get("PYTHONPATH")
    path_of_modules = _ROOT + (os.pathsep + inherited if inherited else "")
    return {**os.environ, **_ONE_THREAD, "PYTHONPATH": path_of_modules}


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The child: one request on stdin, `answer(request)` as one JSON line on stdout.

    Libraries are imported before, so that a limit below what they take is an answer and not a failed import.
    """
    request = json.loads(sys.stdin.buffer.read())
    try:
        limit = _limit(resource.RLIMIT_AS, request["memory_limit"])
        _limit(resource.RLIMIT_CPU, request["cpu_limit"])
        _limit(resource.RLIMIT_CORE, 0)
        reply = answer(request)
    except SvfError as error:
        reply = {"error": type(error).__name__, "message": str(error)}
    except Exception as error:
        if not is_memory(error):
            raise
        message = f"{request['path']}: reading it takes more than the {limit // 2**20} MiB of address space it may use"
        reply = {"error": "ResourceError", "message": message}
    print(json.dumps(reply), flush=True)


def _limit(kind: int, value: int) -> int:
    """Set a limit, or leave a lower one that holds already; returns the one that holds."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))
    return value


def is_memory(error: BaseException | None) -> bool:
    """Whether memory ran out; torch says so in the text of a RuntimeError, or wraps the cause."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, MemoryError) or any(
            phrase in text for phrase in ("allocate memory", "not enough memory", "bad_alloc")
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
