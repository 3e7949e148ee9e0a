"""The TRINITY router's head: route."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stages.commands.backends import load_backend
from stages.commands.options import (
    ON_BOTH,
    Adapted,
    AdaptedLayout,
    Backend,
    ComputeDtype,
    Device,
    Force,
    InPrecision,
    Json,
    OneLayout,
    Precision,
    RunDtype,
    Tokens,
    TokensFile,
    compute,
    output,
)
from stages.commands.program import STATE, answer, before, command


@command(
    "Route",
    "svf route MODEL --adapted components --head router.npy --prompt 'user: 6 times 7?'",
    "svf route adapted --head router_head.safetensors --tokens 1,2,3",
    "svf route MODEL --head router.npy --layers 26 --tokens 1,2,3 --precision exact",
)
def route(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, GGUF file or hub id.")],
    head: Annotated[
        Path,
        compute(help="Router vector, .npy or safetensors; or trinity_router_head.safetensors."),
    ],
    adapted: Adapted = None,
    layers: Annotated[
        str | None,
        compute(help="Layers that the router vector adapts, such as 26; by default those of --adapted."),
    ] = None,
    layout: AdaptedLayout = OneLayout.declared,
    tokens: Tokens = None,
    tokens_file: TokensFile = None,
    prompt: Annotated[
        str | None,
        compute(help="The transcript, taken as it is; TRINITY's has lines like 'user: ...'."),
    ] = None,
    backend: Backend = ON_BOTH,
    dtype: ComputeDtype = RunDtype.model,
    precision: InPrecision = Precision.native,
    device: Device = "cpu",
    out: Annotated[
        Path | None,
        output(help="Safetensors file for the hidden state and logits of one side."),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Route with the TRINITY head: logits of agents and roles.

    They are computed from the hidden state of the second-to-last token.
    """
    from stages.jobs import route as job
    from stages.judge.document import EXIT_CODES as outcomes
    from stages.progress import Progress
    from stages.show import route as render_route

    before(force, file=out)
    command = job.RouteCommand(
        model=model,
        head=head,
        adapted=adapted,
        layers=layers,
        layout=layout.value,
        tokens=tokens,
        tokens_file=tokens_file,
        prompt=prompt,
        backend=backend.value,
        dtype=dtype.value,
        device=device,
        precision=precision.value,
        out=out,
    )
    with Progress(STATE.progress) as progress:
        document = job.route(command, load_backend, progress)
    answer(document, json, render_route.route_document)
    raise typer.Exit(outcomes[document["outcome"]])
