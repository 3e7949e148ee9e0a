"""What `svf forward` does around a job: children for both sides, their diff."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
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
from stages.run.children import asked, run_sides
from stages.spec.backend import BOTH, SIDES, Backend, Loader, check_device


def forward(command: ForwardCommand, load: Loader, progress: Progress) -> dict[str, Any]:
    """Trace as asked: the `svf.diff/1` document of both backends, or the `svf.forward/1` of one."""
    if command.backend == BOTH:
        return forward_both(command, progress)
    options = {"jit": command.jit != "none"} if command.backend == "jax" else {}
    return forward_alone(command, lambda: load(command.backend, command.device, command.precision, **options), progress)


def forward_both(command: ForwardCommand, progress: Progress) -> dict[str, Any]:
    """Trace on each backend in a process of its own, then compare their dumps: a is the first, b the second."""
    if command.format == "aprt":
        raise UsageError("--backend both compares safetensors dumps; write APRT trees one backend at a time")
    check_device(command.device)
    command = with_model(command, progress)
    with open_model(str(command.model)) as checkpoint:
        tokens = check_forward(command, checkpoint)
    with ExitStack() as stack:
        run = None
        if command.out is not None:
            what = {name: asked(_side(command, name, tokens, None)) for name in SIDES}
            run = stack.enter_context(claimed(command.out, what, resume=command.resume))
            out = run.folder
        else:
            out = stack.enter_context(scratch_folder("forward"))
        requests = {name: replace(_side(command, name, tokens, out / name), with_inputs=True) for name in SIDES}
        runs = run_sides(requests, progress, run=run, timeout=command.timeout)
        stages = f"{command.stages},{STAGE}" if command.adapted is not None else command.stages
        wanted = Wanted.of(command.layers, None if command.stages.strip() == "all" else stages, whole=True)
        document = diff_forward(
            out / SIDES[0],
            out / SIDES[1],
            wanted=wanted,
            top=command.top,
            runs=(runs[0], runs[1]),
            progress=progress,
        )
    document["a"]["source"], document["b"]["source"] = (f"{name} forward" for name in SIDES)
    document["precision"] = command.precision
    document["out"] = str(command.out) if command.out is not None else None
    unsound = [name for name, run in zip(SIDES, runs, strict=True) if not sound(run)]
    if unsound and document["outcome"] == "agree":
        document["outcome"] = "diverged"
        document["verdict"] = f"The stages agree, but on {' and '.join(unsound)} the production model does not."
    return document


def forward_alone(command: ForwardCommand, backend: Callable[[], Backend], progress: Progress) -> dict[str, Any]:
    """Trace on one backend; `--order NAME` of the other one runs that one first, to infer its orders from."""
    name = command.order
    if name in (NATIVE, command.backend):
        command, name = replace(command, order=None), None
    if name is None or name not in SIDES:
        return forward_one(command, backend, progress)
    if command.out is not None and not command.resume:
        check_folder(command.out)  # before the other backend runs
    command = with_model(command, progress)
    with open_model(str(command.model)) as checkpoint:
        tokens = token_ids(command, checkpoint).tolist()
    with scratch_folder("order") as work:
        native = replace(command, order=None, layers="all", stages="all", positions="all", repeat=1, generate=0)
        first = _side(replace(native, production=False), name, tokens, work / name)
        run_sides({name: first}, progress, timeout=command.timeout)
        return forward_one(replace(command, order_at=work / name), backend, progress)


def _side(command: ForwardCommand, name: str, tokens: list[int], out: Path | None) -> ForwardCommand:
    """What one side's process is asked."""
    return replace(
        command,
        backend=name,
        tokens=",".join(map(str, tokens)),
        tokens_file=None,
        prompt=None,
        jit=command.jit if name == "jax" else "stage",
        out=out,
        top=ForwardCommand.top,  # the parent compares
        timeout=None,
        resume=False,
        close_up=False,
    )
