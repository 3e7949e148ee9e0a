"""What must hold of a component bundle: U and V orthonormal, S descending, U S V^T the source, stages as declared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import shown
from stages.files.bundle import Bundle, BundleEntry, RecordedStages, component_keys, offsets_key
from stages.files.tensorfile import TensorFile
from stages.jobs.layouts import diagnose
from stages.jobs.verify_values import Check, nonfinite
from stages.judge.decomposition import own_faults, parts_of
from stages.progress import Progress
from stages.spec.dtypes import stored_dtype
from stages.spec.layouts import LAYOUTS
from stages.spec.replay import REPLAY
from stages.spec.values import ReplayTask


def bundle_checks(folder: Path, model: str | None, progress: Progress) -> Iterator[Check]:
    """The checks of the bundle in `folder`; `model` gives the source where no `source_f32` is recorded."""
    with ExitStack() as stack:
        bundle = stack.enter_context(Bundle(folder))
        yield "manifest and keys", _keys(bundle)
        for number, entry in enumerate(bundle.entries):
            progress(f"verifying {shown(entry.source_name)}", number / len(bundle.entries))
            yield f"components of {shown(entry.source_name)}", _components(bundle, entry)
        for everything in (True, False):
            recorded = bundle.recorded(all_selected=everything)
            if recorded is not None:
                stack.callback(recorded.close)
                yield f"recorded stages in {recorded.path.name}", _stages(bundle, recorded)
        rows = diagnose(folder, model, progress)["tensors"]
        judged = [row for row in rows if row["fits"] is not None]
        yield f"U S V^T against the source, for {len(judged)} of {len(rows)} tensors", _sources(folder, judged)


def _keys(bundle: Bundle) -> Iterator[str]:
    """Entries that stand twice, offsets that leave holes, tensors that belong to no entry."""
    seen: set[str] = set()
    position: int | None = None
    for entry in bundle.entries:
        name = f"{bundle.folder}: '{shown(entry.source_name)}'"
        if entry.source_name in seen:
            yield f"{name} stands twice in the manifest"
        seen.add(entry.source_name)
        start, end = entry.offset_start, entry.offset_end
        if start is None and end is None:
            continue
        if not isinstance(start, int) or not isinstance(end, int) or end - start != min(entry.shape):
            yield f"{name}: offset_start {shown(start)}, offset_end {shown(end)}; expected {min(entry.shape)} offsets"
        elif position is not None and start != position:
            yield f"{name}: offset_start is {start}, the tensor before it ends at {position}"
        position = end if isinstance(end, int) else None
    parts = {key for e in bundle.entries for key in component_keys(e.source_name).values()}
    yield from _strangers(bundle.components, parts)
    yield from _strangers(bundle.offsets, {offsets_key(e.source_name) for e in bundle.entries})


def _strangers(file: TensorFile, expected: set[str]) -> Iterator[str]:
    for key in file.tensors:
        if key not in expected:
            yield f"{file.path}: '{shown(key)}' belongs to no tensor of the manifest"


def _components(bundle: Bundle, entry: BundleEntry) -> Iterator[str]:
    c = bundle.load(entry)  # shapes, dtypes, finite V, S and offsets, S >= 0, as many offsets as singular values
    where = f"{bundle.folder}: '{shown(entry.source_name)}'"
    expected = LAYOUTS[entry.layout].expected_shape(entry.shape[1], c.s.size)
    if c.v.shape != expected:
        yield f"{where}: layout {entry.layout} needs V {list(expected)}, it is {list(c.v.shape)}"
    unknown = list(nonfinite(bundle.components, component_keys(entry.source_name)["u"]))
    yield from unknown or (f"{where}: {fault}" for fault in own_faults(parts_of(c, _no_rows, entry.shape)))


def _stages(bundle: Bundle, recorded: RecordedStages) -> Iterator[str]:
    """Recorded stages that are missing, of another shape or dtype, or whose hash is not the manifest's."""
    known: set[str] = set()
    for entry in bundle.entries:
        if recorded.sample_name not in (None, entry.source_name):
            continue
        infos, where = recorded.infos(entry.source_name), f"{recorded.path}: '{shown(entry.source_name)}'"
        known |= {info.name for info in infos.values()}
        shapes = _declared(bundle, entry, recorded.sample_name is not None)
        for name, stage in REPLAY.items():
            if name not in infos:
                yield f"{where}: stage {name} is missing"
                continue
            info = infos[name]
            if info.dtype != stored_dtype(stage.dtype) or list(info.shape) not in shapes[name]:
                expected = " or ".join(map(str, shapes[name]))
                yield f"{where}: {name} is {info.dtype} {list(info.shape)}, expected {stage.dtype} {expected}"
                continue
            yield from nonfinite(recorded.file, info.name)
            if name in entry.identity and recorded.file.sha256(info.name) != entry.identity[name]:
                yield f"{where}: {name} has another sha256 than the manifest says"
    yield from _strangers(recorded.file, known)


def _declared(bundle: Bundle, entry: BundleEntry, sample: bool) -> dict[str, list[list[int]]]:
    """Per stage the shapes it may have; a sample's final ones may be turned to the target's orientation."""
    s = bundle.components.info(component_keys(entry.source_name)["s"])
    none = np.empty(s.shape, np.float32)

    def shapes(transpose: bool) -> dict[str, list[int]]:
        task = ReplayTask(
            *(entry.source_name, entry.shape, _no_rows, none, none, none, _no_rows, entry.layout, transpose)
        )
        return {name: list(task.stage_shape(stage)) for name, stage in REPLAY.items()}

    both = [shapes(turned) for turned in ((False, True) if sample else (False,))]
    return {name: [list(x) for x in dict.fromkeys(tuple(one[name]) for one in both)] for name in REPLAY}


def _no_rows(start: int, stop: int) -> np.ndarray:
    raise AssertionError("shapes alone are asked for")


def _sources(folder: Path, judged: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Tensors that U, S, V under the declared layout do not give back."""
    for row in judged:
        if not row["fits"]:
            yield f"{folder}: '{shown(row['tensor'])}': U S V^T is not the source: {row['note']}"
