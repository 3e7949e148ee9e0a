"""The last bits: what the installed backends' own functions give of a recorded run's inputs, each in a child.

A recipe in numpy cannot know another library's exponential nor the order of its sums. Where a backend, run stage by
stage from the recorded inputs, gives the recorded bytes, every bit is explained, and the row is `exact`. Nothing else
changes: no other bits on this machine prove anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from stages.errors import SvfError
from stages.files.forward_dump import parse_key
from stages.files.kinds import Recording, one_recording
from stages.files.replay_recorded import open_side
from stages.judge.forward import inputs_of
from stages.judge.forward_pair import Named
from stages.judge.opened import open_forward
from stages.judge.rows import Row
from stages.oracle.verdict import Verdict, canonical, judged_part
from stages.progress import Progress, Report
from stages.run.calibration import facts_of
from stages.run.children import document_of, run_child
from stages.run.forward import Forwarder
from stages.run.replay import Replayer, chunk_plan, default_chunk_rows
from stages.spec.backend import SIDES, Backend, Loader
from stages.spec.replay import REPLAY
from stages.spec.stage import Stage


@dataclass(frozen=True)
class NativesRequest:
    """The rows of a recorded run that a backend's own functions are asked for, and the run as `svf audit` names it."""

    job: ClassVar[str] = "natives"

    path: Path
    backend: str
    keys: tuple[str, ...]
    model: str | None = None
    tokens: str | None = None
    tokens_file: Path | None = None
    prompt: str | None = None
    adapted: Path | None = None
    layout: str = "declared"
    components: Path | None = None


def ask(rows: Sequence[Row], asked: NativesRequest, progress: Report) -> None:
    """Rows that are within rounding, in place: `exact` where a backend gives every bit; `backend` of `asked` is open.

    A backend that is not installed, or cannot run them, is told in the rows' notes.
    """
    keys = tuple(row["key"] for row in rows if _open(row))
    for number, name in enumerate(SIDES if keys else ()):
        progress(f"asking {name} for the last bits", number / len(SIDES))
        try:
            request = NativesRequest(**{**vars(asked), "backend": name, "keys": keys})
            document = document_of(name, run_child(request))
        except SvfError as error:
            document = {"stages": {}, "why": str(error)}
        for row in rows:
            if row["key"] in keys and _open(row):
                _take(row, name, document)


def _open(row: Row) -> bool:
    return row["verdict"] == Verdict.ROUNDING and not row.get("through") and row.get("bits") != row.get("elements")


def _take(row: Row, name: str, document: dict[str, Any]) -> None:
    """What one backend gave, where it explains more than is explained."""
    bits = document["stages"].get(row["key"])
    if bits is None:
        said = f"{name} could not be asked: {document.get('why', 'its inputs were not recorded')}"
        row["note"] = "; ".join(filter(None, (row.get("note"), said)))
    elif bits > row["bits"]:
        version = document["facts"].get(name, "")
        row |= {"bits": bits, "recipe": f"as {name} {version} computes it on this machine", "class": "equivalent"}
        if bits == row["elements"]:
            row["verdict"] = Verdict.EXACT.value


def natives(request: NativesRequest, load: Loader, progress: Progress) -> dict[str, Any]:
    """The child's side: how many elements of each stage the backend gives to the last bit."""
    backend = load(request.backend, "cpu", "native")
    with ExitStack() as stack:
        of = _replayed if one_recording(request.path) is Recording.REPLAY else _forward
        found = {key: bits for key, bits in of(request, backend, stack, progress) if bits is not None}
    return {"schema": "svf.natives/1", "stages": found, "facts": facts_of(backend)}


def _forward(
    request: NativesRequest, backend: Backend, stack: ExitStack, progress: Progress
) -> Iterator[tuple[str, int | None]]:
    named = Named(request.model, request.tokens, request.tokens_file, request.prompt)
    run = open_forward(request.path, named, request.adapted, request.layout, stack, progress)
    assert run.path is not None
    assert run.config is not None
    assert run.weights is not None
    forwarder = Forwarder(backend, run.config, run.weights, dtype=run.path.activations)
    for number, key in enumerate(request.keys):
        progress(f"{request.backend}: {key}", number / len(request.keys))
        place = parse_key(key)
        assert place is not None
        stage = run.path.at(place)
        yield key, _alike(stage, forwarder.isolate(stage.name, inputs_of(place, run), place[0]), run.read(place))


def _replayed(
    request: NativesRequest, backend: Backend, stack: ExitStack, progress: Progress
) -> Iterator[tuple[str, int | None]]:
    side, replayer = stack.enter_context(open_side(request.path, request.components)), Replayer(backend)
    for number, key in enumerate(request.keys):
        progress(f"{request.backend}: {key}", number / len(request.keys))
        safe, _, name = key.removeprefix("tensor.").rpartition(".")
        tensor, stage, bits = side.tensors[safe], REPLAY[name], 0
        options = {"layout": tensor.layout, "transpose": tensor.transpose}
        for chunk in tensor.chunks(chunk_plan(tensor.rows, default_chunk_rows(tensor.shape))):
            arguments = chunk.arguments(stage)
            if arguments is not None and name in chunk.values:
                bits += _alike(stage, replayer.isolate(stage, arguments, options), chunk.values[name]) or 0
        yield key, bits


def _alike(stage: Stage, native: np.ndarray, observed: np.ndarray) -> int | None:
    """Elements with the same bits, as far as they are judged; None of another shape or dtype."""
    if native.shape != observed.shape or native.dtype != observed.dtype:
        return None
    one, other = (canonical(judged_part(stage, a)) for a in (native, observed))
    return int(np.count_nonzero(one == other))
