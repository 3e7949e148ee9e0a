"""The last bits: what the installed backends' own functions give of a recorded run's inputs, each in a child.

A recipe in numpy cannot know another library's exponential. Where a backend, run stage by stage from the recorded
inputs, gives the recorded bytes, every bit is explained, and the row is `exact`. Of what is left, float32 products and
norms are summed in the orders that libraries sum in (recipes/orders.py), in a child that needs no backend. Nothing
else changes: other bits prove nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from stages.errors import SvfError
from stages.files.forward_dump import Place, parse_key
from stages.files.kinds import Recording, one_recording
from stages.files.replay_recorded import open_side
from stages.judge.forward import oracles_of
from stages.judge.forward_pair import Named
from stages.judge.opened import open_forward
from stages.judge.recorded_run import ForwardRun, inputs_of
from stages.judge.rows import Row
from stages.oracle.verdict import Oracle, Verdict, canonical, consult, judged_part
from stages.progress import Progress, Report
from stages.recipes.orders import Asked
from stages.run.calibration import facts_of
from stages.run.children import document_of, run_child
from stages.run.forward import Forwarder
from stages.run.replay import Replayer, chunk_plan, default_chunk_rows
from stages.spec.backend import SIDES, Backend, Loader
from stages.spec.replay import REPLAY
from stages.spec.stage import Stage

# What is asked after the backends.
ORDERS = "orders"
# Of one stage: `bits`, elements given to the last bit, and the `recipe` in words.
Given = dict[str, Any]
# What a stage should give and what was recorded, by columns or by rows.
Parts = Iterable[tuple[Oracle, np.ndarray]]


@dataclass(frozen=True)
class NativesRequest:
    """The rows of a recorded run that a backend's own functions are asked for, and the run as `svf audit` names it.

    `backend` may be `ORDERS`, which asks the orders of summation.
    """

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
    everybody = (*SIDES, ORDERS)
    for number, name in enumerate(everybody):
        keys = tuple(row["key"] for row in rows if _open(row))
        if not keys:
            return
        progress(f"asking {name} for the last bits", number / len(everybody))
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
    found = document["stages"].get(row["key"])
    if found is None and (name in SIDES or "why" in document):
        said = f"{name} could not be asked: {document.get('why', 'its inputs were not recorded')}"
        row["note"] = "; ".join(filter(None, (row.get("note"), said)))
    elif found is not None and found["bits"] > row["bits"]:
        row |= {**found, "class": "equivalent"}
        if row["bits"] == row["elements"]:
            row["verdict"] = Verdict.EXACT.value


def natives(request: NativesRequest, load: Loader, progress: Progress) -> dict[str, Any]:
    """The child's side: how many elements of each stage are given to the last bit, and by what, in words."""
    replayed = one_recording(request.path) is Recording.REPLAY
    with ExitStack() as stack:
        if request.backend == ORDERS:
            found = _in_orders(_replay_oracles if replayed else _forward_oracles, request, stack, progress)
        else:
            backend = load(request.backend, "cpu", "native")
            by = f"as {request.backend} {facts_of(backend).get(request.backend, '')} computes it on this machine"
            given = (_replayed if replayed else _forward)(request, backend, stack, progress)
            found = {key: {"bits": bits, "recipe": by} for key, bits in given if bits is not None}
    return {"schema": "svf.natives/1", "stages": found}


def _in_orders(
    oracles: Callable[..., Iterator[tuple[str, Parts]]], request: NativesRequest, stack: ExitStack, progress: Progress
) -> dict[str, Given]:
    asked, found = Asked(), {}
    for key, parts in oracles(request, stack, progress):
        all_parts = list(parts)
        order = asked.of_all(all_parts)
        if order is not None:
            bits = sum(observed.size for _, observed in all_parts)
            found[key] = {"bits": bits, "recipe": f"summed in float32: {order}"}
    return found


def _places(request: NativesRequest, stack: ExitStack, progress: Progress) -> Iterator[tuple[str, Place, ForwardRun]]:
    named = Named(request.model, request.tokens, request.tokens_file, request.prompt)
    run = open_forward(request.path, named, request.adapted, request.layout, stack, progress)
    for number, key in enumerate(request.keys):
        progress(f"{request.backend}: {key}", number / len(request.keys))
        place = parse_key(key)
        assert place is not None
        yield key, place, run


def _forward_oracles(request: NativesRequest, stack: ExitStack, progress: Progress) -> Iterator[tuple[str, Parts]]:
    for key, place, run in _places(request, stack, progress):
        observed = run.read(place)
        yield key, ((oracle, observed[..., columns]) for columns, oracle in oracles_of(place, run, observed))


def _forward(
    request: NativesRequest, backend: Backend, stack: ExitStack, progress: Progress
) -> Iterator[tuple[str, int | None]]:
    forwarder = None
    for key, place, run in _places(request, stack, progress):
        assert run.path is not None
        assert run.config is not None
        assert run.weights is not None
        forwarder = forwarder or Forwarder(backend, run.config, run.weights, dtype=run.path.activations)
        stage = run.path.at(place)
        yield key, _alike(stage, forwarder.isolate(stage.name, inputs_of(place, run), place[0]), run.read(place))


def _chunks(
    request: NativesRequest, stack: ExitStack, progress: Progress
) -> Iterator[tuple[str, Stage, dict[str, Any], Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]]]:
    """Of each stage asked for: its options, and the arguments and the recorded values of each chunk."""
    side = stack.enter_context(open_side(request.path, request.components))
    for number, key in enumerate(request.keys):
        progress(f"{request.backend}: {key}", number / len(request.keys))
        safe, _, name = key.removeprefix("tensor.").rpartition(".")
        tensor, stage = side.tensors[safe], REPLAY[name]
        plan = chunk_plan(tensor.rows, default_chunk_rows(tensor.shape))
        parts = ((chunk.arguments(stage), chunk.values.get(name)) for chunk in tensor.chunks(plan))
        have = ((tuple(given), values) for given, values in parts if given is not None and values is not None)
        yield key, stage, {"layout": tensor.layout, "transpose": tensor.transpose}, have


def _replay_oracles(request: NativesRequest, stack: ExitStack, progress: Progress) -> Iterator[tuple[str, Parts]]:
    for key, stage, options, parts in _chunks(request, stack, progress):
        own = {name: options[name] for name in stage.options}
        yield key, ((consult(stage, given, own), values) for given, values in parts)


def _replayed(
    request: NativesRequest, backend: Backend, stack: ExitStack, progress: Progress
) -> Iterator[tuple[str, int | None]]:
    replayer = Replayer(backend)
    for key, stage, options, parts in _chunks(request, stack, progress):
        bits = (_alike(stage, replayer.isolate(stage, given, options), values) for given, values in parts)
        yield key, sum(count or 0 for count in bits)


def _alike(stage: Stage, native: np.ndarray, observed: np.ndarray) -> int | None:
    """Elements with the same bits, as far as they are judged; None of another shape or dtype."""
    if native.shape != observed.shape or native.dtype != observed.dtype:
        return None
    one, other = (canonical(judged_part(stage, a)) for a in (native, observed))
    return int(np.count_nonzero(one == other))
