"""A recorded side of a comparison: a dump, a component bundle or a stage file, read chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import InputError, NotFoundError, shown
from stages.files import bundle as bundles
from stages.files.bundle import Bundle, BundleEntry, Components
from stages.files.dump import MANIFEST_FILE, Dump, changed
from stages.files.selection import safe_key
from stages.files.tensorfile import TensorFile
from stages.spec.layouts import LAYOUTS
from stages.spec.noise import Noise
from stages.spec.replay import REPLAY
from stages.spec.values import Chunk

# Stages that copy what a replay was given: two sides that differ here were given different things.
INPUT_STAGES = tuple(s.name for s in REPLAY.values() if not s.inputs and s.noise is Noise.EXACT)


@dataclass(frozen=True)
class SideTensor:
    """One tensor of a side: where each stage is, and how it was contracted and oriented."""

    source_name: str
    stages: dict[str, tuple[TensorFile, str]]
    hashes: dict[str, str]  # of stages, as a dump recorded them
    identity: dict[str, str]  # sha256 of the stages that are inputs: what was replayed
    layout: str
    transpose: bool
    components: Components | None
    back: bool = False  # whether final stages, recorded transposed, are read as the source has them

    @property
    def rows(self) -> int:
        """Rows of the weight: the components', or from any stage that has them."""
        if self.components is not None:
            return self.components.entry.shape[0]
        for name, (file, key) in self.stages.items():
            axis, shape = self._axis(name), file.info(key).shape
            if REPLAY[name].by_rows and len(shape) > axis:  # one without it has no rows to tell
                return shape[axis]
        return 1

    def check(self) -> None:
        """`InputError` naming a stage that is not what the manifest's sha256 says."""
        for stage, (file, key) in self.stages.items():
            if stage in self.hashes and file.sha256(key) != self.hashes[stage]:
                raise changed(file.path, key)

    def turned_back(self) -> SideTensor:
        """The same tensor with its final stages as the source has them."""
        return replace(self, transpose=False, back=True) if self.transpose else self

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight; columns are 1 when nothing tells."""
        if self.components is not None:
            return self.components.entry.shape
        for name, (file, key) in self.stages.items():
            shape = file.info(key).shape
            if REPLAY[name].shape == "rows cols" and not self.turned(name) and len(shape) == 2:
                return self.rows, shape[1]
        return self.rows, 1

    def sha256(self, stage: str) -> str | None:
        """Hash of a stage: the recorded one, or of the file's bytes; None when the side lacks the stage."""
        if stage in self.hashes:
            return self.hashes[stage]
        if stage not in self.stages:
            return None
        file, key = self.stages[stage]
        return file.sha256(key)

    def stage_shape(self, stage: str) -> tuple[int, ...]:
        """Shape of a recorded stage."""
        file, key = self.stages[stage]
        shape = file.info(key).shape
        return shape[::-1] if self._back(stage) else shape

    def read(self, stage: str, start: int, stop: int) -> np.ndarray:
        """Rows of the weight in a recorded stage."""
        file, key = self.stages[stage]
        array = file.read(key, start, stop, self._axis(stage))
        return np.ascontiguousarray(array.T) if self._back(stage) else array

    def _back(self, stage: str) -> bool:
        return self.back and stage.startswith("final_")

    def _axis(self, stage: str) -> int:
        """Axis of the recorded array that the weight's rows lie on."""
        return int(self.turned(stage) or self._back(stage))

    def turned(self, stage: str) -> bool:
        """Whether a stage is recorded transposed: rows of the weight on axis 1."""
        return self.transpose and stage.startswith("final_")

    def source(self) -> tuple[Callable[[int, int], np.ndarray], tuple[int, int]] | None:
        """Rows of the recorded float32 weight and its shape; None when it was not recorded as a matrix."""
        if "source_f32" not in self.stages:
            return None
        file, key = self.stages["source_f32"]
        shape = file.info(key).shape
        return (lambda start, stop: file.read(key, start, stop), (shape[0], shape[1])) if len(shape) == 2 else None

    def chunks(self, plan: list[tuple[int, int]]) -> Iterator[Chunk]:
        """Recorded stages of each row range of `plan`, with the operands where they are known."""
        self.check()
        c = self.components
        fixed = {"s": c.s, "v": c.v, "offsets": c.offsets} if c else {}
        shared = {n: f.read(k) for n, (f, k) in self.stages.items() if not REPLAY[n].by_rows}
        rows = plan[-1][1]
        for i, (start, stop) in enumerate(plan):
            values = dict(shared) if i == 0 else {}
            for name, (file, key) in self.stages.items():
                axis = self._axis(name)
                if REPLAY[name].by_rows and file.info(key).shape[axis : axis + 1] == (rows,):
                    values[name] = self.read(name, start, stop)
                elif REPLAY[name].by_rows and i == 0:  # of another shape than its neighbours: shown whole, once
                    values[name] = file.read(key)
            params = {**fixed, "u": c.u(start, stop)} if c else fixed
            yield Chunk(start, stop, values, shared, params)


class Side:
    """All tensors of one side by safe key, with what is known of how they came about."""

    def __init__(self, label: str, stack: ExitStack):
        self.label = label
        self.facts: dict[str, str] = {}
        self.backend: str | None = None  # what computed a dump of ours
        self.tensors: dict[str, SideTensor] = {}
        self.unknown: set[str] = set()  # keys that are no stage of the replay
        self.bundle: Bundle | None = None  # where components are
        self.promises = False  # whether a stage that is not there was promised: a dump of ours has them all
        self._stack = stack

    @property
    def precision(self) -> str | None:
        """What the side was computed in, as far as it tells."""
        return self.facts.get("precision")

    def components_but(self, key: str) -> Iterator[tuple[str, Components]]:
        """The components of the bundle's other tensors, by source name."""
        for entry in self.bundle.entries if self.bundle is not None else ():
            if safe_key(entry.source_name) != key and self.bundle is not None:
                yield entry.source_name, self.bundle.load(entry)

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_side(path: Path, components: Path | None = None, *, sample: bool = False) -> Side:
    """The side at `path`: a dump folder, a component bundle folder, or a stage file.

    `components` overrides where U, S and V are looked for. `sample=True` takes a bundle's sample stages.
    """
    stack = ExitStack()
    try:
        if path.is_dir() and (path / MANIFEST_FILE).is_file():
            return _from_dump(path, components, stack)
        if path.is_dir() and (path / bundles.MANIFEST_FILE).is_file():
            return _from_bundle(path, components, stack, sample)
        if path.is_dir():
            raise InputError(
                f"{path}: is neither a finished dump ({MANIFEST_FILE}) nor a component bundle ({bundles.MANIFEST_FILE})"
            )
        if path.is_file():
            return _from_file(path, components, stack)
        raise NotFoundError(f"{path}: no such file or folder")
    except BaseException:
        stack.close()
        raise


def _from_dump(path: Path, components: Path | None, stack: ExitStack) -> Side:
    dump = Dump(path)
    stack.callback(dump.close)
    side = Side(str(path), stack)
    side.facts, side.backend, side.promises = dump.facts, dump.backend, True
    bundle = _open_bundle(components or _recorded_path(dump), stack, required=components is not None)
    side.bundle, side.unknown = bundle, set(dump.tensors)
    for item in dump.manifest.get("selected", []):
        name = item["source_name"]
        keys = {stage: bundles.tensor_stage_key(name, stage) for stage in REPLAY}
        side.unknown -= set(keys.values())
        entries = {stage: dump.tensors[key] for stage, key in keys.items() if key in dump.tensors}
        identity: dict[str, str] = item.get("sha256", {})
        side.tensors[safe_key(name)] = SideTensor(
            name,
            {s: (dump.file(e["file"]), keys[s]) for s, e in entries.items() if e["file"]},
            {s: e["sha256"] for s, e in entries.items()},
            {s: e["sha256"] for s, e in entries.items() if s in INPUT_STAGES},
            _layout(item, path),
            item.get("transpose", False),
            _matching_components(bundle, name, identity),
        )
    return side


def _layout(item: Mapping[str, Any], path: Path) -> str:
    layout = item.get("layout", "torch_v")
    if layout not in LAYOUTS:
        raise InputError(f"{path / MANIFEST_FILE}: layout '{shown(layout)}' is none of {', '.join(LAYOUTS)}")
    return str(layout)


def _recorded_path(dump: Dump) -> Path | None:
    """Where the dump's components are: its recorded path, from the dump's folder or from the current one."""
    recorded = dump.manifest.get("components")
    if not recorded:
        return None
    candidates = (dump.folder / recorded, Path(recorded))  # a dump's own components are those beside it
    return next((c for c in candidates if (c / bundles.MANIFEST_FILE).is_file()), None)


def _matching_components(bundle: Bundle | None, name: str, identity: dict[str, str]) -> Components | None:
    """The bundle's components of `name` if they are those the dump was made from, by their sha256."""
    entry = _entry(bundle, safe_key(name))
    if bundle is None or entry is None:
        return None
    components = bundle.load(entry)
    return components if all(identity.get(part) == found for part, found in components.sha256().items()) else None


def _from_bundle(path: Path, components: Path | None, stack: ExitStack, sample: bool) -> Side:
    bundle = Bundle(path)
    stack.callback(bundle.close)
    everything = None if sample else bundle.recorded(all_selected=True)
    recorded = everything or bundle.recorded(all_selected=False)
    if recorded is None:
        raise InputError(f"{path}: has no recorded stages ({bundles.ALL_STAGES_FILE} or {bundles.SAMPLE_STAGES_FILE})")
    stack.callback(recorded.close)
    return _from_stages(str(path), recorded.file, _open_bundle(components, stack) or bundle, stack)


def _from_file(path: Path, components: Path | None, stack: ExitStack) -> Side:
    file = TensorFile(path)
    stack.callback(file.close)
    beside = path.parent if (path.parent / bundles.MANIFEST_FILE).is_file() else None
    bundle = _open_bundle(components or beside, stack, required=components is not None)
    return _from_stages(str(path), file, bundle, stack)


def _from_stages(label: str, file: TensorFile, bundle: Bundle | None, stack: ExitStack) -> Side:
    side = Side(label, stack)
    side.bundle = bundle
    found = bundles.stages_in(file)
    if not found:
        keys = ", ".join(shown(key, 40) for key in list(file.tensors)[:4])
        raise InputError(f"{file.path}: holds no replay stages ('stage.<name>' or 'tensor.<tensor>.<name>'): {keys}")
    side.unknown = set(file.tensors) - {key for stages in found.values() for key in stages.values()}
    for key, stages in found.items():
        safe = key or (safe_key(bundle.sample_name) if bundle and bundle.sample_name else "")
        entry = _entry(bundle, safe)
        side.tensors[safe] = SideTensor(
            entry.source_name if entry else safe or "(sample)",
            {stage: (file, name) for stage, name in stages.items()},
            {},
            entry.identity if entry else {},
            entry.layout if entry else "torch_v",
            _is_turned(file, stages, entry),
            bundle.load(entry) if bundle and entry else None,
        )
    return side


def _is_turned(file: TensorFile, stages: dict[str, str], entry: BundleEntry | None) -> bool:
    """Whether final stages have the other orientation than the weight, whose shape another stage or the bundle says."""
    adapted = stages.get("adapted_source_f32")
    source = file.info(adapted).shape if adapted else entry.shape if entry else None
    final = next((file.info(stages[name]).shape for name in ("final_f32", "final_bf16") if name in stages), None)
    return source is not None and final is not None and final != source and final == source[::-1]


def _open_bundle(path: Path | None, stack: ExitStack, *, required: bool = True) -> Bundle | None:
    if path is None:
        return None
    try:
        bundle = Bundle(path)
    except (InputError, NotFoundError):
        if required:
            raise
        return None
    stack.callback(bundle.close)
    return bundle


def _entry(bundle: Bundle | None, safe: str) -> BundleEntry | None:
    return next((e for e in bundle.entries if safe_key(e.source_name) == safe), None) if bundle else None


def check_comparable(a: Side, b: Side) -> None:
    """`InputError` when two dumps replayed different weights or offsets: their difference means nothing."""
    for key in sorted(a.tensors.keys() & b.tensors.keys()):
        for stage in INPUT_STAGES:
            one, other = a.tensors[key].identity.get(stage), b.tensors[key].identity.get(stage)
            if one and other and one != other:
                raise InputError(
                    f"not comparable: {a.label} and {b.label} replayed different {stage} of "
                    f"{a.tensors[key].source_name}"
                )


def pair_samples(a: Side, b: Side) -> None:
    """Give a nameless sample (a stage file without a manifest beside it) the other side's sample name."""
    for one, other in ((a, b), (b, a)):
        if list(one.tensors) == [""] and len(other.tensors) == 1:
            one.tensors = {next(iter(other.tensors)): one.tensors[""]}
