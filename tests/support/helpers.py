"""What several test files need: the command line in this process, and files changed by a small function."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

import cli
from stages.files.tensorfile import TensorFile, sha256, write_tensors

# Typer makes its commands anew at every call, from 24 signatures; the program does not change between two of them.
typer.main.get_command = functools.cache(typer.main.get_command)
ROOT = Path(cli.__file__).resolve().parent
# Every module of the rooms, by its dotted name.
MODULES = sorted(".".join(p.relative_to(ROOT).with_suffix("").parts) for p in (ROOT / "stages").rglob("*.py"))
GATE = "model.layers.2.mlp.gate_proj.weight"  # 192 x 64, the sample
DOWN = "model.layers.2.mlp.down_proj.weight"  # 64 x 192, wide
K_PROJ = "model.layers.2.self_attn.k_proj.weight"  # 64 x 64, square
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # 512 x 64, tied


@dataclass(frozen=True)
class Result:
    """What a command ended with."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on stdout; fails when there is anything else."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line on stderr; fails when there are more, or a traceback."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("svf: "), self.err
        return lines[0]


def svf(*arguments: object, progress: bool = False) -> Result:
    """`svf ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    words = [str(a) for a in arguments]
    code: Any = 0
    handler = signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.app(words if progress else ["--no-progress", *words])
        except SystemExit as end:
            code = end.code
        finally:
            signal.signal(signal.SIGTERM, handler)  # the app's would outlive it
    return Result(int(code or 0), out.getvalue(), err.getvalue())


def load_all() -> None:
    """Have this process import what commands import when they run, but frameworks, before others are forked from it."""
    for module in MODULES:
        if not module.endswith("_child"):
            importlib.import_module(module)
    typer.main.get_command(cli.app)
    for words in (["layouts"], ["inspect"], ["diff", "/nowhere"], ["audit"], ["forward", "--tokens", "1"], ["replay"]):
        assert svf(*words, "/nowhere", "--json").code == 4, words
    gc.freeze()


def some(cases: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """Cases for `parametrize`, of which `make test` runs those that are `kept`, and `make thorough` the others."""
    assert kept
    return [case if case in kept else pytest.param(case, marks=pytest.mark.thorough) for case in cases]


def fresh(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python `code` in a fresh interpreter that imports this source tree."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file."""
    with TensorFile(path) as file:
        return {name: file.read(name) for name in file.tensors}


def rehash_offsets(bundle: Path) -> None:
    """Let a bundle's manifest tell of the offsets as they are now: their hashes follow a change."""
    from stages.files.bundle import MANIFEST_FILE, OFFSETS_FILE

    tensors = tensors_of(bundle / OFFSETS_FILE)
    hashes = {name.removeprefix("svf.scale_offsets."): sha256(array) for name, array in tensors.items()}
    manifest = json.loads((bundle / MANIFEST_FILE).read_text())
    for entry in manifest["selected_tensors"]:
        entry["offsets_sha256"] = hashes[entry["safe_key"]]
    (bundle / MANIFEST_FILE).write_text(json.dumps(manifest))


def with_tensors(path: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Rewrite the safetensors file at `path` after `change(tensors)`."""
    tensors = tensors_of(path)
    change(tensors)
    write_tensors(path, tensors)


def with_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the JSON object at `path` after `change(value)`."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under `folder` with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def one_line(error: Exception, *words: str) -> str:
    """The message: one line, printable, with each of `words`."""
    text = str(error)
    assert text.isprintable(), repr(text)
    for word in words:
        assert word in text, text
    return text
