"""What `svf forward` does around a job: children for both sides, their diff."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from stages.checkpoint import open_checkpoint
from stages.children import run_svf
from stages.errors import SvfError, UsageError
from stages.forward_diff import diff_forward
from stages.forward_job import ForwardCommand, sound, token_ids, with_model
from stages.output import prepare_folder
from stages.progress import Progress


def forward_both(command: ForwardCommand, names: Sequence[str], progress: Progress) -> dict[str, Any]:
    """Trace on each backend in a process of its own, then compare their dumps: a is the first, b the second."""
    if command.format == "aprt":
        raise UsageError("--backend both compares safetensors dumps; write APRT trees one backend at a time")
    command = with_model(command, progress)
    with open_checkpoint(str(command.model)) as checkpoint:
        tokens = token_ids(command, checkpoint).tolist()
    with ExitStack() as stack:
        if command.out is not None:
            out = prepare_folder(command.out)
        else:
            out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="svf-forward-")))
        runs = tuple(_child(command, name, tokens, out / name, progress) for name in names)
        document = diff_forward(
            out / names[0], out / names[1], top=command.top, runs=(runs[0], runs[1]), progress=progress
        )
    document["a"]["source"], document["b"]["source"] = (f"{name} forward" for name in names)
    document["precision"] = command.precision
    document["out"] = str(command.out) if command.out is not None else None
    unsound = [name for name, run in zip(names, runs, strict=True) if not sound(run)]
    if unsound and document["outcome"] == "agree":
        document["outcome"] = "diverged"
        document["verdict"] = f"The stages agree, but on {' and '.join(unsound)} the production model does not."
    return document


def _child(command: ForwardCommand, name: str, tokens: list[int], out: Path, progress: Progress) -> Any:
    progress.say(f"forward on {name}")
    arguments = ["forward", str(command.model), "--backend", name, "--tokens", ",".join(map(str, tokens))]
    arguments += ["--layers", command.layers, "--stages", command.stages, "--positions", command.positions]
    arguments += ["--dtype", command.dtype, "--repeat", str(command.repeat), "--generate", str(command.generate)]
    arguments += ["--out", str(out), "--device", command.device, "--json"]
    arguments += ["--precision", command.precision]
    if name != "torch":
        arguments += ["--jit", command.jit]
    if command.adapted is not None:
        arguments += ["--adapted", str(command.adapted), "--layout", command.layout]
    if command.production is not None:
        arguments += ["--production" if command.production else "--no-production"]
    child = run_svf(arguments if progress.enabled else ["--no-progress", *arguments])
    if child.document is None:
        error = SvfError(f"the {name} side stopped with exit code {child.returncode}; its message stands above")
        error.exit_code = child.returncode if child.returncode > 1 else 70
        raise error
    return child.document
