"""What `svf forward` does around a job: children for both sides, their diff."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from stages.errors import UsageError
from stages.files.folders import check_folder, claimed
from stages.files.scratch import scratch_folder
from stages.files.source import open_model
from stages.files.tokens import token_ids
from stages.jobs.forward_one import ForwardCommand, check_forward, forward_one, with_model
from stages.judge.adapted import STAGE
from stages.judge.forward_diff import diff_forward
from stages.judge.production import sound
from stages.judge.wanted import Wanted
from stages.order.resolve import NATIVE
from stages.progress import Progress
from stages.run.children import command_line, run_sides
from stages.spec.backend import Backend, check_device


def forward_both(command: ForwardCommand, names: Sequence[str], progress: Progress) -> dict[str, Any]:
    """Trace on each backend in a process of its own, then compare their dumps: a is the first, b the second."""
    if command.format == "aprt":
        raise UsageError("--backend both compares safetensors dumps; write APRT trees one backend at a time")
    check_device(command.device)
    command = with_model(command, progress)
    with open_model(str(command.model)) as checkpoint:
        tokens = check_forward(command, checkpoint)
    arguments = {name: [*_arguments(command, name, tokens), "--with-inputs"] for name in names}
    with ExitStack() as stack:
        run = None
        if command.out is not None:
            run = stack.enter_context(claimed(command.out, command_line(arguments), resume=command.resume))
            out = run.folder
        else:
            out = stack.enter_context(scratch_folder("forward"))
        runs = run_sides(arguments, out, run, command.timeout, progress)
        stages = f"{command.stages},{STAGE}" if command.adapted is not None else command.stages
        wanted = Wanted.of(command.layers, None if command.stages.strip() == "all" else stages, whole=True)
        document = diff_forward(
            out / names[0],
            out / names[1],
            wanted=wanted,
            top=command.top,
            runs=(runs[0], runs[1]),
            progress=progress,
        )
    document["a"]["source"], document["b"]["source"] = (f"{name} forward" for name in names)
    document["precision"] = command.precision
    document["out"] = str(command.out) if command.out is not None else None
    unsound = [name for name, run in zip(names, runs, strict=True) if not sound(run)]
    if unsound and document["outcome"] == "agree":
        document["outcome"] = "diverged"
        document["verdict"] = f"The stages agree, but on {' and '.join(unsound)} the production model does not."
    return document


def forward_alone(
    command: ForwardCommand, backend: Callable[[], Backend], others: Iterable[str], progress: Progress
) -> dict[str, Any]:
    """Trace on one backend; `--order NAME` of one of the `others` runs that one first, to infer its orders from."""
    name = command.order
    if name in (NATIVE, command.backend):
        command, name = replace(command, order=None), None
    if name is None or name not in others:
        return forward_one(command, backend, progress)
    if command.out is not None and not command.resume:
        check_folder(command.out)  # before the other backend runs
    command = with_model(command, progress)
    with open_model(str(command.model)) as checkpoint:
        tokens = token_ids(command, checkpoint).tolist()
    with scratch_folder("order") as work:
        native = replace(command, order=None, layers="all", stages="all", positions="all", repeat=1, generate=0)
        asked = {name: _arguments(replace(native, production=False), name, tokens)}
        run_sides(asked, work, None, command.timeout, progress)
        return forward_one(replace(command, order_at=work / name), backend, progress)


def _arguments(command: ForwardCommand, name: str, tokens: list[int]) -> list[str]:
    """What one side's process is asked, but for its folder."""
    arguments = ["forward", str(command.model), "--backend", name, "--tokens", ",".join(map(str, tokens))]
    arguments += ["--layers", command.layers, "--stages", command.stages, "--positions", command.positions]
    arguments += ["--dtype", command.dtype, "--repeat", str(command.repeat), "--generate", str(command.generate)]
    arguments += ["--device", command.device, "--json", "--precision", command.precision]
    arguments += ["--order", command.order] if command.order is not None else []
    if name != "torch":
        arguments += ["--jit", command.jit]
    if command.adapted is not None:
        arguments += ["--adapted", str(command.adapted), "--layout", command.layout]
    if command.max_memory is not None:
        arguments += ["--max-memory", str(command.max_memory)]
    if command.production is not None:
        arguments += ["--production" if command.production else "--no-production"]
    return arguments
