"""Forward dumps as APRT trees; APRT trees and what other tools write as safetensors. What is not kept is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import InputError, UsageError, shown
from stages.files.aprt import HELD, AprtTree, is_aprt_tree, write_tree
from stages.files.folders import ensure_space, new_folder
from stages.files.forward_dump import ForwardDump, ForwardSide, Place, forward_key, is_forward_dump, run_fields
from stages.files.source import ModelSource, open_model
from stages.files.tensorfile import TensorWriter, write_tensors
from stages.files.tokens import check_tokens, parse_tokens
from stages.files.tool_dumps import table_of
from stages.judge.foreign import open_foreign, open_side
from stages.judge.recorded_run import ForwardRun, order_of
from stages.progress import Progress
from stages.spec.forward import recorded_shape
from stages.spec.values import StageResult

FLAT_FILE = "stages.safetensors"
_F32 = np.dtype(np.float32)


# -- to APRT ------------------------------------------------------------------------------------------------------


def export_aprt(source: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """Write the forward dump at `source`, or another program's safetensors, as an APRT tree; `svf.export/1`."""
    if is_aprt_tree(source):
        raise InputError(f"{source}: is an APRT tree already; 'svf import' turns it into safetensors")
    with ExitStack() as stack:
        kept = _Kept(progress)
        if is_forward_dump(source):
            dump = ForwardSide(source)
            stack.callback(dump.close)
            files = write_tree(out, kept.of(dump.places, dump.read))
        else:
            side = open_side(source, stack)
            files = write_tree(out, kept.of(side.places, side.raw))
        return {
            "schema": "svf.export/1",
            "source": str(source),
            "out": str(out),
            "files": len(files),
            "elements": kept.elements,
            "widened": list(kept.widened),
            "cut": kept.cut,
            "not_kept": [*kept.lost(), *_manifest_loss(source)],
        }


class _Kept:
    """The stages of a dump on their way into a tree, and what of them APRT does not hold."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.elements = 0
        self.widened: dict[str, str] = {}
        self.cut: list[str] = []

    def of(
        self, places: Iterable[Place], read: Callable[[Place], np.ndarray]
    ) -> Iterator[tuple[int | None, str, np.ndarray]]:
        """Layer, stage and values of each place; `InputError` for a dtype that float32 does not hold."""
        places = list(places)
        for done, (layer, stage) in enumerate(places):
            key, array = forward_key((layer, stage)), read((layer, stage))
            if array.dtype not in HELD:
                raise InputError(
                    f"{shown(key)} is {array.dtype}; APRT holds float32, and only bfloat16 and float16 are widened"
                )
            if array.dtype != _F32:
                self.widened[key] = array.dtype.name
            if stage == "lm_head" and array.ndim > 1 and len(array) > 1:
                self.cut.append(key)
                array = array[-1:]
            self.elements += array.size
            self.progress(f"writing {key}", (done + 1) / len(places))
            yield layer, stage, array

    def lost(self) -> list[str]:
        """What an APRT tree does not hold of these stages, in words."""
        found = ["shapes and dtypes (svf import --model --tokens gives them back)"]
        if self.widened:
            dtypes = " or ".join(dict.fromkeys(self.widened.values()))
            found.append(f"that {len(self.widened)} tensors are {dtypes}: stored as float32, value for value")
        if self.cut:
            found.append(f"{', '.join(self.cut)} of all tokens but the last")
        return found


def _manifest_loss(source: Path) -> list[str]:
    return ["the manifest: model, tokens, precision, facts, adapted weights"] if is_forward_dump(source) else []


# -- to safetensors -----------------------------------------------------------------------------------------------


def import_recording(
    source: Path, out: Path, model: str | None, tokens: str | None, progress: Progress
) -> dict[str, Any]:
    """Write an APRT tree, or what another tool recorded, as safetensors; `svf.import/1`.

    A forward dump where model and tokens are told, else the documented keys: flat of a tree, as recorded of a tool's.
    """
    if (model is None) != (tokens is None):
        raise UsageError("--model and --tokens go together: shapes follow from both")
    if table_of(source) is not None:
        about: dict[str, Any] = {"schema": "svf.import/1", "source": str(source), "out": str(out)}
        if model is None or tokens is None:
            return about | _as_recorded(source, out, progress)
        return about | _dump(source, out, model, tokens, progress)
    tree = AprtTree(source)
    document = {
        "schema": "svf.import/1",
        "source": str(source),
        "out": str(out),
        "tensors": len(tree.files),
        "elements": sum(file.count for file in tree.files.values()),
        "not_kept": [f"{name}: is no stage file" for name in tree.extra],
    }
    if model is None or tokens is None:
        return document | {"dtype": "float32", "sha256": _flat(tree, out, progress), "flat": _keys(tree.files)}
    return _dump(source, out, model, tokens, progress) | document


def _keys(places: Iterable[Place]) -> list[str]:
    return [forward_key(place) for place in places]


def _flat(tree: AprtTree, out: Path, progress: Progress) -> dict[str, str]:
    """One file of flat float32 tensors, a block at a time; their sha256."""
    specs = {forward_key(place): (_F32, (file.count,)) for place, file in tree.files.items()}
    with new_folder(out) as folder:
        ensure_space(folder, sum(4 * file.count for file in tree.files.values()))
        with TensorWriter(folder / FLAT_FILE, specs, hashes=True) as writer:
            for done, (key, file) in enumerate(zip(specs, tree.files.values(), strict=True)):
                for start, values in file.blocks():
                    writer.write(key, values, start)
                progress(f"writing {key}", (done + 1) / len(specs))
            return writer.commit()


def _as_recorded(source: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """One file of the stages that a tool recorded, under the documented keys."""
    with ExitStack() as stack:
        side = open_side(source, stack)
        folder = stack.enter_context(new_folder(out))
        arrays = {forward_key(place): side.raw(place) for place in side.places}
        progress(f"writing {FLAT_FILE}", 0.5)
        digests = write_tensors(folder / FLAT_FILE, arrays, hashes=True)
        return {
            "tensors": len(arrays),
            "elements": sum(array.size for array in arrays.values()),
            "not_kept": _not_read(side.facts),
            "dtype": ", ".join(sorted({array.dtype.name for array in arrays.values()})),
            "sha256": digests,
            "flat": [],
        }


def _not_read(facts: Mapping[str, str]) -> list[str]:
    return [facts[name] for name in ("not read", "in part", "call") if name in facts]


def _dump(source: Path, out: Path, model: str, tokens: str, progress: Progress) -> dict[str, Any]:
    """A committed forward dump: every stage in the shape and dtype that the model declares."""
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_model(model))
        ids = check_tokens(parse_tokens(tokens), checkpoint.config.vocab_size)
        run = open_foreign(source, checkpoint.config, checkpoint, ids.tolist(), stack)
        _check_sizes(run, source)
        places = order_of(run.path, run.side.places)
        dump = stack.enter_context(ForwardDump(out))
        for done, _ in enumerate(dump.record(StageResult(*place, run.side.read(place)) for place in places)):
            progress(f"writing {forward_key(places[done])}", (done + 1) / len(places))
        return {
            "tensors": len(places),
            "elements": sum(int(np.prod(run.side.shape(place), dtype=object)) for place in places),
            "not_kept": _not_read(run.side.facts),
            "dtype": run.side.facts["dtype"],
            "sha256": dump.commit(_manifest(run, checkpoint, model, source)),
            "flat": [],
        }


def _manifest(run: ForwardRun, checkpoint: ModelSource, model: str, source: Path) -> dict[str, Any]:
    places = run.side.places
    return {
        "backend": "aprt" if is_aprt_tree(source) else "another tool",
        "facts": {**run.side.facts, "imported from": str(source)},
        **run_fields(checkpoint, model, run.tokens),
        "dtype": run.side.facts["dtype"],
        "positions": run.positions,
        "layers": sorted({layer for layer, _ in places if layer is not None}),
        "stages": list(dict.fromkeys(stage for _, stage in places)),
    }


def _check_sizes(run: ForwardRun, source: Path) -> None:
    """`InputError` naming a stage without as many elements as the model and tokens give it.

    Of the logits the last token's alone are in a tree.
    """
    assert run.path is not None
    assert run.config is not None
    for place in run.side.places:
        shape = list(recorded_shape(run.config, run.path.at(place), len(run.tokens), run.positions))
        if place[1] == "lm_head" and run.side.shape(place) != shape:
            shape[0] = 1
        found = run.side.shape(place)
        if found != shape:
            raise InputError(
                f"{source}: {forward_key(place)} has {np.prod(found, dtype=object)} elements, but "
                f"{len(run.tokens)} tokens of this model give it {np.prod(shape, dtype=object)}; do --tokens and "
                "--model belong to this recording?"
            )
