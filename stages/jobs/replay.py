"""What `svf replay` does around a job: the default source, the gates' report, children for both sides, files."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from stages.errors import UsageError
from stages.files.dump import MANIFEST_FILE, keep_hashes
from stages.files.folders import claimed
from stages.files.jsonio import write_json
from stages.files.scratch import scratch_folder
from stages.jobs.builtin import default_source
from stages.jobs.replay_one import ReplayCommand, ReplayJob
from stages.jobs.trinity_report import replay_report
from stages.judge.diff import diff_recorded
from stages.judge.document import Gates
from stages.judge.next_steps import Step, sum_alike
from stages.judge.reports import reference_hashes
from stages.oracle.verdict import Verdict
from stages.order.ordered_backend import with_order
from stages.order.resolve import NATIVE, orders_for
from stages.progress import Progress
from stages.run.budget import check_memory, hold_memory, replay_bytes
from stages.run.children import asked, run_sides
from stages.spec.backend import BOTH, SIDES, Backend, Loader, check_device


def replay(command: ReplayCommand, load: Loader, progress: Progress) -> dict[str, Any]:
    """Replay as asked; the `svf.diff/1` document of both backends' dumps, or of one and what was recorded."""
    if command.backend == BOTH:
        return replay_both(command, progress)
    return replay_one(command, lambda: load(command.backend, command.device, command.precision), progress)


def with_source(command: ReplayCommand, progress: Progress) -> ReplayCommand:
    """The command with the built-in bundle filled in when it names none."""
    if command.components is not None:
        return command
    folder, fresh = default_source()
    progress.say(f"no bundle given: using the built-in tiny one {'made now ' if fresh else ''}in {folder}")
    report = command.reference_report
    if report is None and command.backend != BOTH:  # with both, the reference side is this run's own torch side
        report = folder / "reference.json"
    return replace(command, components=folder / "components", reference_report=report)


def _gates(command: ReplayCommand) -> Gates:
    """The gates asked for, with the hashes of the reference side's report."""
    gates = replace(command.gates, next_step=_next_step(command))
    if command.reference_report is None:
        if gates.reference:
            raise UsageError("--strict-reference needs --reference-report, which holds the historical hash")
        if gates.current_python and command.backend != BOTH:
            raise UsageError("--strict-current-python needs --reference-report, or --backend both")
        return gates
    known = reference_hashes(command.reference_report)
    return replace(
        known,
        stage_tolerances=gates.stage_tolerances,
        current_python=gates.current_python,
        reference=gates.reference,
        next_step=gates.next_step,
    )


def _next_step(command: ReplayCommand) -> Step | None:
    """What leads to the reference side's bytes, unless it was tried or another layout was asked for."""
    if command.order != NATIVE or command.layout not in ("declared", "all") or command.native_components:
        return None
    words = ["svf", "replay", str(command.components)]
    words += ["--backend", "jax" if command.backend == BOTH else command.backend, "--order", "inferred"]
    words += ["--reference-report", str(command.reference_report)] if command.reference_report else []
    if command.precision != NATIVE:
        why = "The recorded hash is of native arithmetic: leave --precision out and take its order"
        return Step(why, shlex.join(words))
    return sum_alike(shlex.join(words))


def _check(command: ReplayCommand) -> None:
    if command.native_components and command.layout == "all":
        raise UsageError("--layout all tries the layouts of given components; leave it out with --components native")
    if command.dump != "none" and command.out is None:
        raise UsageError(f"--dump {command.dump} needs --out DIR")


def replay_one(command: ReplayCommand, backend: Callable[[], Backend], progress: Progress) -> dict[str, Any]:
    """Replay on one backend, in this process; the `svf.diff/1` document against the recorded stages."""
    _check(command)
    command = with_source(command, progress)
    assert command.components is not None
    gates = _gates(command)
    with ExitStack() as stack:
        job = ReplayJob(replace(command, gates=gates), stack)
        _hold(hold_memory, job, command)
        orders = orders_for(
            command.order,
            backend=command.backend,
            components=command.components,
            device=command.device,
            progress=progress,
        )
        side = with_order(backend(), orders, command.order)
        result = job.run(side, progress)
    if command.report is not None:
        write_json(command.report, replay_report(result, gates, side.name, command.device))
    return result.document


def _hold(hold: Callable[[int, int | None, str], None], job: ReplayJob, command: ReplayCommand) -> None:
    needed = replay_bytes([entry.shape for entry in job.entries], command.chunk_rows)
    hold(needed, command.max_memory, "try a smaller --chunk-rows")


def replay_both(command: ReplayCommand, progress: Progress) -> dict[str, Any]:
    """Replay on each backend in a process of its own, then compare their dumps: a is the first, b the second."""
    _check(command)
    for flag, value in (("--report", command.report), ("--stage-dir", command.stage_dir)):
        if value is not None:
            raise UsageError(f"{flag} is for one side alone: use --backend torch or --backend jax")
    check_device(command.device)
    command = with_source(command, progress)
    assert command.components is not None
    with ExitStack() as stack:  # what a side would refuse before it computes is said once
        job = ReplayJob(command, stack)
        _hold(check_memory, job, command)
    with ExitStack() as stack:
        run = None
        if (out := command.out) is not None:
            what = {name: asked(_side(command, name, None)) for name in SIDES}
            run = stack.enter_context(claimed(out, what, resume=command.resume))
        # A dump of hashes alone cannot be compared stage by stage: full ones are, and their hashes kept.
        full = run if command.dump == "full" else None
        work = full.folder if full is not None else stack.enter_context(scratch_folder("replay"))
        gates = _gates(command)
        requests = {name: _side(command, name, work / name) for name in SIDES}
        one, other = run_sides(requests, progress, run=full, timeout=command.timeout)
        runs = (one, other)
        # Of all layouts the sides are compared on the one that gives the weights back.
        layout = runs[0]["main_layout"] if command.layout == "all" else "."
        folders = [work / name / layout for name in SIDES]
        document = runs[0]  # its shape rows say it all when no tensor's V fits the layout
        if all(folder.is_dir() for folder in folders):
            document = diff_recorded(
                folders[0],
                folders[1],
                components=None if command.native_components else command.components,  # each dump has its own
                top=command.top,
                gates=_pair_gates(gates, runs, command),
                runs=runs,
                more_rows=[row for row in runs[0]["rows"] if row["verdict"] == Verdict.SHAPE],
                progress=progress,
            )
        if out is not None and command.dump == "hash":
            for manifest in work.rglob(MANIFEST_FILE):
                keep_hashes(manifest, out / manifest.parent.relative_to(work))
    document["a"]["source"], document["b"]["source"] = (f"{name} replay" for name in SIDES)
    document["layouts"] = _layouts(runs)
    document["precision"] = command.precision
    document["recorded_hash"] = runs[0]["recorded_hash"]
    document["native_components"] = command.native_components
    document["components"] = str(command.components)
    document["out"] = str(out) if out is not None else None
    return document


def _side(command: ReplayCommand, name: str, out: Path | None) -> ReplayCommand:
    """What one side's process is asked: a full dump, which the parent judges."""
    return replace(
        command,
        backend=name,
        out=out,
        dump="full",
        gates=Gates(),
        verdicts=False,
        timeout=None,
        resume=False,
        close_up=False,
    )


def _pair_gates(gates: Gates, runs: tuple[Any, Any], command: ReplayCommand) -> Gates:
    """With a report, both sides are replaying sides: a hash counts when each of them reached it."""
    if command.reference_report is None:
        return gates
    reached = [run["sample_sha256"] for run in runs]
    return replace(gates, replayed_hashes=(reached[0],) if reached[0] and reached[0] == reached[1] else ())


def _layouts(runs: tuple[Any, Any]) -> list[dict[str, Any]]:
    """Both sides' layout rows: a layout fits a tensor when it does on both."""
    merged = []
    for one, other in zip(runs[0]["layouts"], runs[1]["layouts"], strict=True):
        pair = [row for row in (one, other) if row["relative"] is not None]
        worst = max(pair, key=lambda row: row["relative"]) if pair else one
        merged.append({**worst, "fits": one["fits"] and other["fits"], "backends": list(SIDES)})
    return merged
