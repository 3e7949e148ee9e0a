"""Child processes of commands, forked from a server that has imported the frameworks: they take 0.1 s, not 2 to 4.

`start(folder)` gives a program to stand in the place of `sys.executable`. Called to run `svf_torch/start.py`, or one of
the readers of pickles, it has a server fork, which changes into a process of the same environment, folder, handles and
arguments and ends as that one ends. For all else, and where the environment, a resource limit or the cores are not
those of the server, it becomes the interpreter itself. What is imported when, what a process weighs (`--max-memory`)
and how it dies need a real one.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from helpers import ROOT, load_all

from stages.files.confined import environment

# May differ between the server and a command: read when the command runs, not when a library is imported.
# TORCHINDUCTOR_CACHE_DIR is set by torch itself, in a process that has looked at a deeper part of it.
FREE = ("SVF_", "PYTEST_", "TMPDIR", "COLUMNS", "NO_COLOR", "TORCHINDUCTOR_CACHE_DIR")
LIMITS = (resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE)
READERS = ("svf_torch.convert_file", "svf_torch.weights_file")
CLIENT = """#!{python} -IS
import json, os, resource, signal, socket, sys

def main():
    kind = "commands" if sys.argv[1:3] == ["-P", {start!r}] else "readers"
    if kind == "readers" and (sys.argv[1:3] != ["-P", "-m"] or sys.argv[3] not in {readers!r}):
        return
    if sys.argv[-2] == "child":
        with open(sys.argv[-1]) as request:
            if json.load(request)["asked"].get("max_memory") is not None:
                return
    limits = [resource.getrlimit(kind) for kind in {limits}]
    about = {{"words": sys.argv[3:], "folder": os.getcwd(), "environment": dict(os.environ), "limits": limits,
             "cores": sorted(os.sched_getaffinity(0)), "umask": os.umask(0)}}
    os.umask(about["umask"])
    with socket.socket(socket.AF_UNIX) as server:
        server.connect({place!r} + kind)
        socket.send_fds(server, [b"."], [0, 1, 2])
        server.sendall(json.dumps(about).encode() + b"\\n")
        reply = server.recv(64)
    if reply == b"no":
        return
    code = int(reply)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)

main()
os.execv({real!r}, [{real!r}, *sys.argv[1:]])
"""


def start(folder: Path) -> tuple[Path, list[subprocess.Popen[bytes]]]:
    """A program in the place of `sys.executable`, and the servers behind it, which end with their stdin."""
    program, place = folder / "python", f"{folder}/"
    servers = [_serving(place, "commands", dict(os.environ)), _serving(place, "readers", environment())]
    # Not the environment's interpreter: without `site` any will do, and this path is short enough for a first line.
    python, begin = Path(sys.executable).resolve(), str(ROOT / "svf_torch" / "start.py")
    told = {"python": python, "start": begin, "place": place, "real": sys.executable, "limits": LIMITS}
    program.write_text(CLIENT.format(**told, readers=READERS))
    program.chmod(0o700)
    return program, servers


def _serving(place: str, kind: str, about: dict[str, str]) -> subprocess.Popen[bytes]:
    """A server of one kind of processes, whose environment is `about`."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(place + kind)
        listening.listen(16)
        env = {**about, "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), str(ROOT)))}
        env["SVF_TEST_PYTHONPATH"] = about.get("PYTHONPATH", "")
        command = [sys.executable, "-P", __file__, str(listening.fileno()), kind]
        return subprocess.Popen(command, stdin=subprocess.PIPE, env=env, pass_fds=[listening.fileno()])


class _Server:
    """Forks for one request after the other; the frameworks are imported at the first."""

    def __init__(self, listening: socket.socket, kind: str):
        self.listening, self.kind, self.ready = listening, kind, False
        self.watched = selectors.DefaultSelector()
        self.watched.register(listening, selectors.EVENT_READ)
        self.watched.register(0, selectors.EVENT_READ)
        self.children: dict[int, tuple[socket.socket, int]] = {}  # either handle of a child -> its client, its pid
        if path := os.environ.pop("SVF_TEST_PYTHONPATH"):
            os.environ["PYTHONPATH"] = path
        else:
            del os.environ["PYTHONPATH"]
        self.same = _same(dict(os.environ), _limits(), sorted(os.sched_getaffinity(0)))

    def serve(self) -> dict[str, Any] | None:
        """In a child: its request. In the server: None, at the end."""
        while True:
            for key, _ in self.watched.select():
                if key.fd == 0:
                    return None
                if key.fileobj is self.listening:
                    if (request := self.fork()) is not None:
                        return request
                elif key.fd in self.children:
                    self.end(key.fd)

    def fork(self) -> dict[str, Any] | None:
        client, _ = self.listening.accept()
        _, handles, _, _ = socket.recv_fds(client, 1, 3)
        with client.makefile("rb") as lines:
            request = json.loads(lines.readline())
        if _same(request["environment"], request["limits"], request["cores"]) != self.same:
            client.sendall(b"no")
            client.close()
            child = 0
        else:
            self.prepare()
            if not (child := os.fork()):
                return {**request, "handles": handles}
        for handle in handles:
            os.close(handle)
        if child:
            ended = os.pidfd_open(child)
            for handle in (ended, client.fileno()):
                self.children[handle] = (client, child)
                self.watched.register(handle, selectors.EVENT_READ)
        return None

    def prepare(self) -> None:
        if not self.ready:
            _import_all(self.kind)
            self.ready = True

    def end(self, handle: int) -> None:
        """A child ended, or the one who waits for it did."""
        client, child = self.children[handle]
        if handle == client.fileno():
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(b"%d" % os.waitstatus_to_exitcode(status))
        for other in [h for h, (_, pid) in self.children.items() if pid == child]:
            self.watched.unregister(other)
            del self.children[other]
            if other != client.fileno():
                os.close(other)
        client.close()


def _same(environment: dict[str, str], limits: Any, cores: list[int]) -> Any:
    kept = {name: value for name, value in environment.items() if not name.startswith(FREE)}
    return kept, [tuple(limit) for limit in limits], cores


def _limits() -> list[tuple[int, int]]:
    return [resource.getrlimit(kind) for kind in LIMITS]


def _import_all(kind: str) -> None:
    """Everything a command may import; nothing is computed, so that no library starts a thread or a device."""
    import warnings

    warnings.filterwarnings("ignore", message="os.fork", category=RuntimeWarning)  # JAX's, which has no thread yet
    if kind == "readers":
        importlib.import_module("torch")
        load_all()
        return
    for module in ("cli", "svf_torch.start", "svf_torch.backend", "svf_torch.production", "svf_torch.probe"):
        importlib.import_module(module)
    for module in ("svf_jax.backend", "svf_jax.production", "svf_jax.probe"):
        importlib.import_module(module)
    load_all()


def _become(request: dict[str, Any], kind: str) -> None:
    """In the fork: the command or the reader, and nothing after it."""
    code: Any = 1
    try:
        for number, handle in enumerate(request["handles"]):
            os.dup2(handle, number)
            os.close(handle)
        os.environ.clear()
        os.environ.update(request["environment"])
        if "SVF_WATCH_PARENT" in os.environ:
            os.environ["SVF_WATCH_PARENT"] = str(os.getppid())
        os.chdir(request["folder"])
        os.umask(request["umask"])
        tempfile.tempdir = None
        if kind == "readers":
            runpy.run_module(request["words"][0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [str(ROOT / "svf_torch" / "start.py"), *request["words"]]
            importlib.import_module("svf_torch.start").app()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        if isinstance(code, str):
            print(code, file=sys.stderr)
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    asked = _Server(socket.socket(fileno=int(sys.argv[1])), sys.argv[2]).serve()
    if asked is not None:
        _become(asked, sys.argv[2])
