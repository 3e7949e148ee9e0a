"""The command line in forked processes, limited in memory and time, its network watched: where hostile files are tried.

A server that has imported everything but the frameworks forks for each command, so that a try takes milliseconds and a
crash, a hang or a flood of memory ends that try alone.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import ROOT, Result, load_all

# Address space of a command; what it may really take, and for how long it may compute and wait.
SPACE, MEMORY, SECONDS, PATIENCE = 8 * 1024**3, 1024**3, 20, 600


@dataclass(frozen=True)
class Ended(Result):
    """How a command ended: with its processor time in seconds, its largest memory in bytes, and whom it asked.

    `code` is negative for a signal.
    """

    seconds: float
    memory: int
    asked: list[str]


class Confined:
    """The server; `run` is `svf WORDS` in a process of its own. Close it, or use it as a context manager."""

    def __init__(self) -> None:
        self._hub = socket.create_server(("127.0.0.1", 0))  # any request to the hub comes here, a grandchild's too
        self._asked: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(Path(__file__).parent))),
            "HF_ENDPOINT": f"http://127.0.0.1:{self._hub.getsockname()[1]}",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._server = subprocess.Popen(
            [sys.executable, "-P", "-m", "confined"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._hub.accept()
            except OSError:  # closed
                return
            with connection:
                self._asked.append(connection.recv(4096).decode(errors="replace").partition("\r\n")[0])

    def run(self, *words: object, folder: Path | None = None, **environment: str) -> Ended:
        """`svf WORDS`, from `folder`."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._asked.clear()
        request = {"words": [str(w) for w in words], "folder": str(folder or ROOT), "environment": environment}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Ended(**json.loads(self._server.stdout.readline()), asked=list(self._asked))

    def close(self) -> None:
        self._hub.close()
        self._server.terminate()
        self._server.communicate()

    def __enter__(self) -> Confined:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _serve() -> None:
    """In the server: one forked process for each line of stdin."""
    import cli

    load_all()
    for line in sys.stdin:
        print(json.dumps(_fork(cli.app, json.loads(line))), flush=True)


def _fork(app: Any, request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            _become(app, request, out.fileno(), err.fileno())
        deadline = time.monotonic() + PATIENCE
        while not (ended := os.wait4(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.002)
        _, status, usage = ended
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "backslashreplace"))
        return {
            "code": os.waitstatus_to_exitcode(status),
            "out": texts[0],
            "err": texts[1],
            "seconds": usage.ru_utime + usage.ru_stime,
            "memory": usage.ru_maxrss * 1024,
        }


def _become(app: Any, request: dict[str, Any], out: int, err: int) -> None:
    """In the fork: the command, and nothing after it."""
    code: Any = 120
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        resource.setrlimit(resource.RLIMIT_AS, (SPACE, SPACE))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        app(["--no-progress", *request["words"]])
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code if isinstance(code, int) else 121)


if __name__ == "__main__":
    _serve()
