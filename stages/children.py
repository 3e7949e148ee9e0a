"""One process per backend: the command line runs itself as a child."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.jsonio import parse_json

# Where this package is imported from: an installed wheel or a source tree.
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class ChildResult:
    """Exit code of a child and the JSON document it printed (None when it printed none)."""

    returncode: int
    document: Any


def run_svf(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> ChildResult:
    """Run `svf ARGUMENTS` in a fresh interpreter; its stderr passes through, its stdout is the document."""
    # -P keeps the current folder off sys.path: a user's own cli.py must not be what runs.
    command = [sys.executable, "-P", "-m", "cli", *arguments]
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))
    env = {**os.environ, "PYTHONPATH": path, **(environment or {})}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=False)
    text = done.stdout.strip()
    return ChildResult(done.returncode, parse_json(text, f"output of svf {arguments[0]}") if text else None)
