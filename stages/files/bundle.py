"""The TRINITY component bundle: a folder of U, S, V, scale offsets and recorded stages (`formats.md`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import InputError, NotFoundError, shown
from stages.files.jsonio import read_object
from stages.files.selection import safe_key
from stages.files.tensorfile import TensorFile, TensorInfo, sha256
from stages.spec.layouts import LAYOUTS
from stages.spec.replay import REPLAY

COMPONENTS_FILE = "trinity_svf_components.safetensors"
OFFSETS_FILE = "trinity_svf_scale_offsets.safetensors"
SAMPLE_STAGES_FILE = "trinity_svf_stage_debug.safetensors"
ALL_STAGES_FILE = "trinity_svf_all_selected_stage_debug.safetensors"
MANIFEST_FILE = "trinity_svf_debug_manifest.json"
SAMPLE_SCHEMA = "trinity_sakana_sample_component_debug.v1"
SELECTED_SCHEMA = "trinity_sakana_selected_component_debug.v1"

_IDENTITY = {"source_f32": "source_sha256_as_f32", "offsets_f32": "offsets_sha256"}


def component_keys(source_name: str) -> dict[str, str]:
    """Keys of U, S and V in the components file."""
    return {part: f"svd.{part.upper()}.{safe_key(source_name)}" for part in ("u", "s", "v")}


def offsets_key(source_name: str) -> str:
    """Key of the offsets in the scale-offsets file."""
    return f"svf.scale_offsets.{safe_key(source_name)}"


def component_specs(
    source_name: str, shape: tuple[int, int], layout: str
) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Key -> dtype and shape of U, S and V of a `shape` weight in the components file."""
    (rows, cols), rank, keys = shape, min(shape), component_keys(source_name)
    shapes = {"u": (rows, rank), "s": (rank,), "v": LAYOUTS[layout].expected_shape(cols, rank)}
    return {keys[part]: (np.dtype(np.float32), size) for part, size in shapes.items()}


def sample_stage_key(stage: str) -> str:
    """Key of a stage in the sample's stage file."""
    return f"stage.{stage}"


def tensor_stage_key(source_name: str, stage: str) -> str:
    """Key of a stage in the all-selected stage file and in dumps."""
    return f"tensor.{safe_key(source_name)}.{stage}"


class Components:
    """U, S, V and offsets of one tensor, read when asked for; U by rows."""

    def __init__(self, bundle: Bundle, entry: BundleEntry):
        self.entry = entry
        self._file, keys = bundle.components, component_keys(entry.source_name)
        self._keys, self._u = keys, keys["u"]
        self.s = _checked(bundle.components, keys["s"])
        self.v = _checked(bundle.components, keys["v"])
        self.offsets = _checked(bundle.offsets, offsets_key(entry.source_name))
        self._check(bundle)

    @property
    def stored_u(self) -> tuple[TensorFile, str]:
        """The file of U and its key in it."""
        return self._file, self._u

    def u(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `[start:stop]` of U, `[rows, rank]` float32."""
        rows = self._file.read(self._u, start, stop)
        return finite(rows, f"{self._file.path}: {self._u}")

    def sha256(self) -> dict[str, str]:
        """sha256 of U, S and V, as a dump records what it was made from."""
        return {part: self._file.sha256(key) for part, key in self._keys.items()}

    def same_as(self, other: Components) -> bool:
        """Whether U, S and V are those of `other`, by file and otherwise by their bytes."""
        if self._file.path.resolve() == other._file.path.resolve():
            return True
        if not np.array_equal(self.s, other.s) or not np.array_equal(self.v, other.v):
            return False
        return self._file.sha256(self._u) == other._file.sha256(other._u)

    def _check(self, bundle: Bundle) -> None:
        where, name = bundle.folder, shown(self.entry.source_name)
        u, rank = self._file.info(self._u).shape, self.s.size
        rows, cols = self.entry.shape
        fits = len(u) == 2 and self.v.ndim == 2 and self.s.ndim == 1 and u == (rows, rank) and rank == min(rows, cols)
        if not fits or self.v.shape not in ((cols, rank), (rank, cols)):
            raise InputError(
                f"{where}: '{name}' {[rows, cols]}: U {list(u)}, S {list(self.s.shape)}, V {list(self.v.shape)} do not "
                f"fit; expected U [{rows}, {min(rows, cols)}], S [{min(rows, cols)}], V [{cols}, {min(rows, cols)}]"
            )
        if self.offsets.shape != (rank,):
            table = ", ".join(f"{e.source_name}: {min(e.shape)}" for e in bundle.entries)
            raise InputError(
                f"{where}: '{name}' has {self.offsets.size} offsets and {rank} singular values; expected {table}"
            )
        told = self.entry.identity.get("offsets_f32")
        if told is not None and sha256(self.offsets) != told:
            raise InputError(
                f"{bundle.offsets.path}: '{name}': offsets have another sha256 than the manifest says; they changed "
                "after the bundle was made"
            )
        if self.s.min(initial=0) < 0:
            raise InputError(f"{where}: '{name}' has a negative singular value at index {int(self.s.argmin())}")
        check_normalization(self.s, self.offsets, f"{where}: '{name}'")


def check_normalization(s: np.ndarray, offsets: np.ndarray, where: str) -> None:
    """`InputError` unless the scaled singular values have a float32 sum that can be divided by."""
    with np.errstate(over="ignore"):  # refused below; backends sum in float32
        total = np.float32(np.sum(s * (np.float32(1) + offsets), dtype=np.float64))
    if not np.isfinite(total) or total == 0:
        raise InputError(f"{where}: the scaled singular values sum to {total}, normalization is undefined")


@dataclass(frozen=True)
class BundleEntry:
    """One selected tensor as the bundle describes it."""

    source_name: str
    elixir_name: str
    shape: tuple[int, int]
    layout: str
    component_source: str
    offset_start: int | None
    offset_end: int | None
    identity: dict[str, str]  # sha256 of source_f32 and offsets_f32, where the manifest has them


def manifest_of(entries: Sequence[BundleEntry], sample_name: str | None) -> dict[str, Any]:
    """The manifest of a bundle that reads back as `entries`; written last, it commits the bundle."""
    items = [
        {
            "source_name": entry.source_name,
            "elixir_name": entry.elixir_name,
            "component_source": entry.component_source,
            "component_v_layout": entry.layout,
            "component_tensors": component_keys(entry.source_name),
            "scale_tensor": offsets_key(entry.source_name),
            "source_shape": list(entry.shape),
            "offset_start": entry.offset_start,
            "offset_end": entry.offset_end,
            **{_IDENTITY[stage]: digest for stage, digest in entry.identity.items()},
        }
        for entry in entries
    ]
    sample = {} if sample_name is None else {"source_name": sample_name}
    return {"schema": SELECTED_SCHEMA, **sample, "selected_tensor_count": len(items), "selected_tensors": items}


class Bundle:
    """A component bundle open for reading: tensors lazily, the manifest checked."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise NotFoundError(f"{folder}: no such folder; 'svf decompose' writes a component bundle")
        if not (self.folder / MANIFEST_FILE).is_file():
            raise InputError(
                f"{folder}: no {MANIFEST_FILE}; this is not a component bundle, or it was not written to its end"
            )
        self.manifest = read_object(self.folder / MANIFEST_FILE)
        self.components = TensorFile(self.folder / COMPONENTS_FILE)
        self.offsets = TensorFile(self.folder / OFFSETS_FILE)
        self.entries = self._entries()

    def close(self) -> None:
        self.components.close()
        self.offsets.close()

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _entries(self) -> tuple[BundleEntry, ...]:
        where = self.folder / MANIFEST_FILE
        schema = self.manifest.get("schema")
        if schema not in (SELECTED_SCHEMA, SAMPLE_SCHEMA):
            raise InputError(f"{where}: schema is {shown(schema)}; expected {SELECTED_SCHEMA} or {SAMPLE_SCHEMA}")
        raw = self.manifest.get("selected_tensors")
        if raw is None and schema == SAMPLE_SCHEMA:
            raw = [self.manifest]
        if not isinstance(raw, list) or not raw:
            raise InputError(f"{where}: expected a list 'selected_tensors'")
        return tuple(self._entry(item, f"{where}: selected_tensors[{i}]") for i, item in enumerate(raw))

    def _entry(self, item: Any, where: str) -> BundleEntry:
        name = item.get("source_name") if isinstance(item, dict) else None
        if not isinstance(name, str):
            raise InputError(f"{where}: source_name is missing")
        layout = item.get("component_v_layout", self.manifest.get("component_v_layout", "torch_v"))
        if not isinstance(layout, str) or layout not in LAYOUTS:
            raise InputError(f"{where}: component_v_layout '{shown(layout)}' is none of {', '.join(LAYOUTS)}")
        shape = item.get("source_shape")
        if shape is None:  # a sample manifest may lack it; U and V of a known layout tell
            keys = component_keys(name)
            v = self.components.info(keys["v"]).shape
            shape = [self.components.info(keys["u"]).shape[0], v[0] if LAYOUTS[layout].transposed else v[1]]
        if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(n, int) and n > 0 for n in shape):
            raise InputError(f"{where} ({shown(name)}): source_shape is {shown(shape)}, expected two positive sizes")
        return BundleEntry(
            name,
            str(item.get("elixir_name") or ""),
            (shape[0], shape[1]),
            layout,
            str(item.get("component_source") or self.manifest.get("component_source") or "unknown"),
            item.get("offset_start"),
            item.get("offset_end"),
            {stage: item[key] for stage, key in _IDENTITY.items() if isinstance(item.get(key), str)},
        )

    @property
    def sample_name(self) -> str | None:
        """Source name of the sample tensor, which the sample's stage file is about."""
        name = self.manifest.get("source_name")
        return name if isinstance(name, str) else None

    def load(self, entry: BundleEntry) -> Components:
        """The tensor's components, checked: shapes, finite values, non-negative S, a defined normalization."""
        return Components(self, entry)

    def recorded(self, *, all_selected: bool) -> RecordedStages | None:
        """The recorded stages of all tensors, or of the sample; None when that file is not there."""
        path = self.folder / (ALL_STAGES_FILE if all_selected else SAMPLE_STAGES_FILE)
        if not path.is_file():
            return None
        return RecordedStages(path, None if all_selected else self.sample_name)


class RecordedStages:
    """A stage bundle file: `tensor.<safe>.<stage>` keys, or `stage.<stage>` keys of one sample tensor."""

    def __init__(self, path: Path, sample_name: str | None = None):
        self.path = path
        self.file = TensorFile(path)
        self.sample_name = sample_name

    def close(self) -> None:
        self.file.close()

    def key(self, source_name: str, stage: str) -> str:
        is_sample = self.sample_name is not None
        return sample_stage_key(stage) if is_sample else tensor_stage_key(source_name, stage)

    def infos(self, source_name: str) -> dict[str, TensorInfo]:
        """Stage name -> entry, for the stages of that tensor which the file has."""
        if self.sample_name is not None and source_name != self.sample_name:
            return {}
        found = {stage: self.file.tensors.get(self.key(source_name, stage)) for stage in REPLAY}
        return {stage: info for stage, info in found.items() if info is not None}

    def read(self, source_name: str, stage: str, start: int = 0, stop: int | None = None, axis: int = 0) -> np.ndarray:
        """Slice `[start:stop]` along `axis` of a recorded stage."""
        return self.file.read(self.key(source_name, stage), start, stop, axis)


def stages_in(file: TensorFile) -> Mapping[str, dict[str, str]]:
    """Safe tensor name -> {stage: key} of a stage bundle file; the sample's `stage.*` keys are under ''."""
    result: dict[str, dict[str, str]] = {}
    for key in file.tensors:
        for stage in REPLAY:
            if key == sample_stage_key(stage):
                result.setdefault("", {})[stage] = key
            elif key.startswith("tensor.") and key.endswith(f".{stage}"):
                result.setdefault(key[len("tensor.") : -len(stage) - 1], {})[stage] = key
    return result


def _checked(file: TensorFile, key: str) -> np.ndarray:
    return finite(file.read(key), f"{file.path}: {key}")


def finite(array: np.ndarray, where: str) -> np.ndarray:
    """`array`; `InputError` unless it is float32 without NaN and infinity."""
    if array.dtype != np.float32:
        raise InputError(f"{where}: expected float32, got {array.dtype}")
    if not np.isfinite(array).all():
        index = [int(i) for i in np.argwhere(~np.isfinite(array))[0]]
        raise InputError(f"{where}: NaN or infinity at index {index}")
    return array
