"""Where the installed program starts, `svf` itself and its child processes.

What a user's path holds may have our names: a `cli.py`, a folder `stages`. Ours are taken from beside this package,
whatever the path says; all else is imported as the path has it. It is here because nobody else's module is `svf_torch`.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_MODULES = ("stages", "svf_jax", "svf_torch", "cli")


def app() -> Any:
    """The command line, on this program's own modules."""
    for name in _MODULES:
        _own(name)
    return sys.modules["cli"].app()


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
