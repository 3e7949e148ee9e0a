"""What shows the tool itself, and this machine: selftest, calibrate, probe, infer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages.commands.backends import load_backend
from stages.commands.options import CALIBRATE_BOTH, ON_BOTH, BackendName, CalibrateName, Device, Json, compute, output
from stages.commands.program import STATE, answer, command


@command(
    "Prove",
    "svf selftest --quick",
    "svf selftest --clean 300 --json",
    "svf selftest --fault 'no causal mask' --backend jax",
)
def selftest(
    backend: Annotated[BackendName, compute(help="Backend in which faults are planted.")] = ON_BOTH,
    quick: Annotated[
        bool, compute("--quick", help="Plant each kind of fault once, and make fewer clean runs.")
    ] = False,
    fault: Annotated[list[str] | None, compute(help="Plant only this kind of fault; --list shows all.")] = None,
    clean: Annotated[
        int | None, compute(min=0, help="Number of clean comparisons; default 40, or 8 with --quick.")
    ] = None,
    seed: Annotated[int, compute(min=0, help="Seed for places, weights and shapes.")] = 0,
    list_faults: Annotated[bool, output("--list", help="List the kinds of fault and run nothing.")] = False,
    json: Json = False,
) -> None:
    """Plant known faults and check that each is named.

    Also checks that runs without a fault raise no alarm.
    """
    from stages.progress import Progress
    from stages.selftest import command
    from stages.selftest.document import exit_code
    from stages.show import selftest as view

    if list_faults:
        document = command.listed(fault)
        answer(document, json, lambda d: view.fault_list(d["faults"]))
        return
    options = command.options(backend.value, fault, quick=quick, clean=clean, seed=seed)
    with Progress(STATE.progress) as progress:
        document = command.selftest(options, progress)
    answer(document, json, view.selftest_document)
    raise typer.Exit(exit_code(document))


@command(
    "Prove",
    "svf calibrate",
    "svf calibrate --backend jax --device gpu --json",
)
def calibrate(
    backend: Annotated[CalibrateName, compute(help="Backend to measure.")] = CALIBRATE_BOTH,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Measure how each kind of stage rounds on this machine.

    Dumps made on this machine afterwards are judged by the result.
    """
    from stages.jobs import calibrate as job
    from stages.progress import Progress
    from stages.show import console as render

    with Progress(STATE.progress) as progress:
        document = job.calibrate(job.CalibrateCommand(backend.value, device), load_backend, progress)
    answer(document, json, render.calibrate_document)
    raise typer.Exit(job.EXIT_CODES[document["outcome"]])


@command(
    "Prove",
    "svf probe",
    "svf probe --backend jax --threads 1 --json",
)
def probe(
    backend: Annotated[BackendName, compute(help="Backend to probe.")] = ON_BOTH,
    device: Device = "cpu",
    threads: Annotated[
        int | None, compute(min=1, help="Number of threads; by default all, then one in a second run.")
    ] = None,
    fresh: Annotated[bool, compute("--fresh", help="Probe again even what the cache already holds.")] = False,
    json: Json = False,
) -> None:
    """Reveal the order in which each backend sums.

    Probes products of several shapes, sums, mean squares and softmax.
    """
    from stages.jobs import probe as probe_run
    from stages.progress import Progress
    from stages.show import console as render
    from stages.spec.backend import SIDES

    with Progress(STATE.progress) as progress:
        names = SIDES if backend is ON_BOTH else (backend.value,)
        document = probe_run.probe_all(probe_run.ProbeCommand(names, device, threads, fresh), progress)
    answer(document, json, render.probe_document)
    raise typer.Exit(0 if document["complete"] else 5)


@command(
    "Prove",
    "svf infer components",
    "svf infer dumps/jax --rows 256 --json",
)
def infer(
    side: Annotated[Path, typer.Argument(help="Dump, component bundle or stage file of a replay; dump of a forward.")],
    components: Annotated[Path | None, compute(help="Bundle with U, S and V, the operands of products.")] = None,
    model: Annotated[
        str | None, compute(help="Weights of a forward dump; by default those that were recorded.")
    ] = None,
    rows: Annotated[int | None, compute(min=1, help="Read only this many rows of each tensor of a replay.")] = None,
    columns: Annotated[
        int | None, compute(min=1, help="Read only this many columns of each product of a forward.")
    ] = None,
    json: Json = False,
) -> None:
    """Find the order in which a recorded run summed.

    Needs nothing but the recorded bytes. Loads no framework.
    """
    from stages.order.infer_recorded import infer_recorded
    from stages.progress import Progress
    from stages.show import console as render

    with Progress(STATE.progress) as progress:
        document = infer_recorded(
            side, components=components, model=model, rows=rows, columns=columns, check=True, progress=progress
        )
    answer(document, json, render.orders_document)
    raise typer.Exit(0 if document["outcome"] == "complete" else 5)
