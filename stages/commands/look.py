"""What reads and computes nothing: inspect, stages, verify, report, stats, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages.commands.options import Dtype, Force, Json, compute, output
from stages.commands.program import STATE, answer, command, refuse_idle


@command(
    "Look",
    "svf inspect components",
    "svf inspect MODEL --json",
    "svf inspect model.gguf",
    "svf inspect pytorch_model.bin",
)
def inspect(
    source: Annotated[
        str,
        typer.Argument(help="Bundle, checkpoint or hub id, dump, GGUF, APRT, .safetensors, .npy, .pt, JSON result."),
    ],
    json: Json = False,
) -> None:
    """List what a file or folder holds, from its headers.

    Loads no framework and unpickles nothing.
    """
    from stages.jobs import inspect as job
    from stages.show import sources as render

    document = job.inspect(source)
    answer(document, json, render.inspect_document)


@command(
    "Look",
    "svf stages",
    "svf stages attn_norm",
    "svf stages ffn_silu --dtype bfloat16 --json",
)
def stages(
    name: Annotated[str | None, typer.Argument(help="A stage, such as attn_norm; none: list them all.")] = None,
    dtype: Annotated[Dtype | None, output("--dtype", help="Only recipes that hold for results stored so.")] = None,
    json: Json = False,
) -> None:
    """Say how a stage may be rounded, by whom, and what each way is called.

    Of one stage: its declaration, its recipes with their class, and the usual mistakes. Reads nothing.
    """
    from stages.jobs import stages as job
    from stages.show import recipes as render

    refuse_idle(
        {"--dtype chooses among the recipes of one stage; name it: svf stages attn_norm": bool(dtype and not name)}
    )
    document = job.stages() if name is None else job.one_stage(name, dtype and dtype.value)
    answer(document, json, render.stages_document)


@command(
    "Look",
    "svf verify components",
    "svf verify components --model MODEL --json",
    "svf verify dumps/torch",
)
def verify(
    source: Annotated[str, typer.Argument(help="What to verify: the same kinds as svf inspect.")],
    model: Annotated[str | None, compute(help="Model from whose weights the bundle was made.")] = None,
    json: Json = False,
) -> None:
    """Check schema, hashes and values of a file or folder.

    Exit code 0 when sound, 3 when malformed.
    """
    from stages.jobs import verify as job
    from stages.progress import Progress
    from stages.show import sources as render

    with Progress(STATE.progress) as progress:
        document = job.verify(source, model, progress)
    answer(document, json, render.verify_document)
    raise typer.Exit(job.EXIT_CODES[document["outcome"]])


@command(
    "Look",
    "svf report result.json --html result.html",
    "svf report result.json --html result.html --json",
)
def report(
    result: Annotated[
        Path, typer.Argument(help="File with what svf diff, audit, replay or forward printed with --json.")
    ],
    html: Annotated[Path, output("--html", help="New file for the report; needs svf[report].")],
    force: Force = False,
    json: Json = False,
) -> None:
    """Write the HTML report of a saved result.

    Nothing is computed again.
    """
    from stages.show import console as render
    from stages.show.html.page import report as write

    document = write(result, html, force=force)
    answer(document, json, render.report_document)


@command(
    "Look",
    "svf stats dumps/torch",
    "svf stats recorded.safetensors --json",
)
def stats(
    dump: Annotated[
        Path, typer.Argument(help="Dump, bundle or stage file; APRT; or another program's safetensors or folder.")
    ],
    json: Json = False,
) -> None:
    """Show mean, deviation and extremes of every stage.

    Needs no model.
    """
    from stages.jobs.stats import stats_of
    from stages.progress import Progress
    from stages.show import console as render

    with Progress(STATE.progress) as progress:
        document = stats_of(dump, progress)
    answer(document, json, render.stats_document)


@command(
    "Look",
    "svf doctor",
    "svf doctor --json",
)
def doctor(json: Json = False) -> None:
    """Show versions, devices, and settings that would change results.

    Anything that would stop a run or change its bits is a finding (exit code 1), shown with a remedy.
    """
    from stages.commands.backends import PROBES
    from stages.jobs import doctor as job
    from stages.show import sources as render

    document = job.examine(list(PROBES))
    answer(document, json, render.doctor_document)
    raise typer.Exit(job.EXIT_CODES[document["outcome"]])
