"""The stats command: mean, standard deviation, smallest, largest and count of every recorded stage; no model needed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import InputError
from stages.files.aprt import AprtFile
from stages.files.forward_dump import AprtSide, ForwardSide, Place, forward_key
from stages.files.kinds import Recording, one_recording
from stages.files.replay_recorded import Side, open_side
from stages.files.selection import layer_of
from stages.files.tensorfile import TensorFile
from stages.judge.foreign import open_side as open_foreign_side
from stages.judge.recorded_run import Recorded, order_of
from stages.judge.stats import Population
from stages.progress import Report
from stages.spec.replay import REPLAY

# What a row says of its place, and the pieces of its values.
Item = tuple[dict[str, Any], Callable[[], Iterable[np.ndarray]]]


def stats_of(path: Path, progress: Report = lambda _label, _done: None) -> dict[str, Any]:
    """The `svf.stats/1` document of a dump, bundle, stage file, APRT tree or file, or another program's forward.

    `InputError` for what holds no stages, or their hashes alone.
    """
    with ExitStack() as stack:
        kind, facts, items = _open(path, stack)
        rows = []
        for number, (place, pieces) in enumerate(items):
            progress(f"measuring {place['key']}", number / len(items))
            found, dtype = Population(), None
            for piece in pieces():
                found.add(piece)
                dtype = piece.dtype.name
            rows.append({**place, "dtype": dtype, **found.result()})
    if not rows:
        raise InputError(f"{path}: holds no values of a stage (a dump of hashes has none); nothing to measure")
    return {"schema": "svf.stats/1", "source": str(path), "kind": kind, "facts": facts, "rows": rows}


def _open(path: Path, stack: ExitStack) -> tuple[str, dict[str, str], list[Item]]:
    """What a path holds, the facts that it tells, and its stages in execution order."""
    kind = one_recording(path)
    if kind is Recording.APRT:
        file = AprtFile(path)
        return "aprt", {}, [(_row(file.place), lambda: [file.read()])]
    if kind is Recording.APRT_TREE:
        return "aprt tree", {}, _forward_items(AprtSide(path))
    if kind is Recording.REPLAY:
        side = stack.enter_context(open_side(path))
        return "replay", side.facts, list(_replay_items(side))
    if kind is Recording.FORWARD:
        dump = ForwardSide(path)
        stack.callback(dump.close)
        return "forward", dump.facts, _forward_items(dump)
    other = open_foreign_side(path, stack)
    return "forward", {}, _forward_items(other, other.raw)


def _forward_items(side: Recorded, read: Callable[[Place], np.ndarray] | None = None) -> list[Item]:
    read = read or side.read
    return [(_row(place), functools.partial(_whole, read, place)) for place in order_of(None, side.places)]


def _row(place: Place) -> dict[str, Any]:
    layer, stage = place
    return {"key": forward_key(place), "layer": layer, "tensor": None, "stage": stage}


def _whole(read: Callable[[Place], np.ndarray], place: Place) -> list[np.ndarray]:
    return [read(place)]


def _replay_items(side: Side) -> Iterator[Item]:
    for key, tensor in side.tensors.items():
        for stage in REPLAY:
            if stage in tensor.stages:
                name = tensor.source_name
                row = {"key": f"tensor.{key}.{stage}", "layer": layer_of(name), "tensor": name, "stage": stage}
                yield row, functools.partial(_by_rows, *tensor.stages[stage])


def _by_rows(file: TensorFile, name: str) -> Iterator[np.ndarray]:
    """A tensor a few rows at a time: an embedding's stages are larger than memory need be."""
    for start, stop in file.info(name).row_blocks():
        yield file.read(name, start, stop)
