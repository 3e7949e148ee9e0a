"""Where the installed program starts, `svf` itself and its child processes.

What a user's path holds may have our names: a `cli.py`, a folder `stages`. Ours are taken from beside this package,
whatever the path says; all else is imported as the path has it. It is here because nobody else's module is `svf_torch`.
"""

import os
import resource
import shlex
import signal
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# The handle by which a watched process says that it ended by itself.
_ENDED = "SVF_ENDED"
_MODULES = ("stages", "svf_jax", "svf_llama", "svf_onnx", "svf_torch", "cli")


def app() -> Any:
    """The command line, on this program's own modules."""
    if sys.flags.optimize:  # help is docstrings, and transformers does not even import without its own
        os.environ.pop("PYTHONOPTIMIZE", None)
        os.execv(sys.executable, [sys.executable, "-P", __file__, *sys.argv[1:]])
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    end = os.environ.pop(_ENDED, None)
    if limited and end is None and "SVF_ISOLATED" not in os.environ:
        sys.exit(_watched())
    try:
        for name in _MODULES:
            _own(name)
        sys.modules["cli"].app()
    except (ImportError, OSError, MemoryError) as error:  # of what is imported before the command line is there
        from stages.errors import exhausted

        if (out := exhausted(error)) is None:
            raise
        sys.exit(_starved(out))
    finally:
        if end is not None:
            os.write(int(end), b".")


def _watched() -> int:
    """The exit code of this program in a process of its own, which must say that it came to its end.

    Where little address space is allowed, OpenBLAS and XLA end their process: with code 1, which here is "diverged".
    """
    import subprocess

    ended, end = os.pipe()
    command = [sys.executable, "-P", __file__, *sys.argv[1:]]
    about = {**os.environ, _ENDED: str(end), "SVF_WATCH_PARENT": str(os.getpid())}
    with subprocess.Popen(command, env=about, pass_fds=[end]) as child:
        os.close(end)
        told: list[int] = []

        def tell(number: int, _frame: object) -> None:
            told.append(number)
            if number == signal.SIGTERM:  # a terminal sends SIGINT to both
                child.terminate()

        signal.signal(signal.SIGTERM, tell)
        signal.signal(signal.SIGINT, tell)
        code = child.wait()
    if os.read(ended, 1) or told or code == -signal.SIGKILL:
        return code if code >= 0 else 128 - code
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return _starved(f"out of memory: {limit:,} bytes of address space are allowed here (ulimit -v)")


def _starved(line: str) -> int:
    """Say what ran out, as the command line would have."""
    _own("stages")
    import json

    from stages.errors import ResourceError, error_document

    print(f"svf: {line}", file=sys.stderr)
    if "--json" in sys.argv:
        print(json.dumps(error_document(line, ResourceError.exit_code, shlex.join(["svf", *sys.argv[1:]]))))
    return ResourceError.exit_code


def _own(name: str) -> None:
    spec = PathFinder.find_spec(name, [str(ROOT)])
    if spec is None or spec.loader is None:
        raise ImportError(f"svf: {name} is not in {ROOT}: the installation is damaged, install svf again")
    there = sys.modules.get(name)
    if getattr(there, "__file__", None) != spec.origin:
        sys.modules[name] = module = module_from_spec(spec)
        spec.loader.exec_module(module)


if __name__ == "__main__":
    app()
