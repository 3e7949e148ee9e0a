"""The hidden command that answers one request of a parent process: `svf child REQUEST.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_type_hints

import typer

from stages.commands.backends import attribute, load_backend
from stages.commands.program import STATE, command, emit

# A job's name, as its request class has it -> the function that answers it: (request, loader of backends, progress).
JOBS = {
    "calibrate": "stages.jobs.calibrate:calibrate",
    "capture": "stages.commands.frameworks:captured",
    "decompose": "stages.commands.frameworks:decomposed",
    "forward": "stages.jobs.forward:forward",
    "framework": "stages.commands.frameworks:framework",
    "natives": "stages.judge.natives:natives",
    "probe": "stages.jobs.probe:probe_request",
    "replay": "stages.jobs.replay:replay",
    "rerun": "stages.judge.rerun:run_again",
    "route": "stages.jobs.route:route",
    "selftest": "stages.selftest.child:run_job",
    "sizes": "stages.order.probe_sizes:probe_sizes",
}


@command(None)
def child(request: Annotated[Path, typer.Argument(help="The request, as stages/run/children.py writes it.")]) -> None:
    """Answer one request of a parent process."""
    from pydantic import TypeAdapter

    from stages.files.jsonio import made_now, read_object
    from stages.progress import Progress

    given = read_object(request)
    answer = attribute(JOBS[given["job"]])
    kind = next(iter(get_type_hints(answer).values()))
    with Progress(STATE.progress) as progress:
        document = answer(TypeAdapter(kind).validate_python(given["asked"]), load_backend, progress)
    emit({**document, "made": made_now()})
