"""`svf inspect`: what a file or folder holds, from headers and small vectors alone (`svf.inspect/1`)."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import InputError
from stages.files.aprt import AprtFile, AprtTree
from stages.files.bundle import Bundle, BundleEntry, component_keys, offsets_key
from stages.files.checkpoint import open_checkpoint
from stages.files.dump import Dump
from stages.files.forward_dump import forward_key
from stages.files.gguf_file import GgufArray, GgufFile
from stages.files.gguf_model import GgufModel
from stages.files.jsonio import read_object
from stages.files.kinds import Kind, kind_of_source
from stages.files.npy import read_npy_header
from stages.files.pickle_listing import list_pickle, record_faults
from stages.files.source import ModelSource
from stages.files.tensorfile import TensorFile, TensorInfo
from stages.files.tool_dumps import open_recorded, raw_tensors, table_of
from stages.spec.config import EMBEDDING, LM_HEAD
from stages.spec.dtypes import DTYPES, dtype_name

SCHEMA = "svf.inspect/1"
# A float32 SVD moves singular values by a few u s_max (u = 2^-24), so the vectors of two closer than this
# are a choice of the decomposition: with nonzero offsets W' depends on it (numerics.md, "SVD").
CLUSTER_GAP = 2.0**-20
_ITEM_SIZES = {dtype_name(dtype): dtype.itemsize for dtype in DTYPES.values()}


def inspect(source: str) -> dict[str, Any]:
    """The document of whatever `source` is; `InputError` when its header, manifest or opcodes are damaged.

    `tensors`: rows of name, dtype, shape, bytes and file. `about`: what this kind tells beside them. `notes`: what a
    person should know.
    """
    kind = kind_of_source(source)
    rows, about, notes = _READERS[kind](source)
    sizes = [row["bytes"] for row in rows if row["bytes"] is not None]
    return {
        "schema": SCHEMA,
        "source": source,
        "kind": kind.value,
        "count": len(rows),
        "bytes": sum(sizes),
        "about": about,
        "notes": notes,
        "tensors": rows,
    }


Rows = list[dict[str, Any]]
Found = tuple[Rows, dict[str, Any], list[str]]


def _row(info: TensorInfo, file: Path) -> dict[str, Any]:
    shape = list(info.shape)
    return {"name": info.name, "dtype": dtype_name(info.dtype), "shape": shape, "bytes": info.nbytes, "file": file.name}


def _rows(file: TensorFile) -> Rows:
    return [_row(info, file.path) for info in file.tensors.values()]


def _safetensors(source: str) -> Found:
    with TensorFile(source) as file:
        return _rows(file), {"metadata": file.metadata}, []


def _bundle(source: str) -> Found:
    with Bundle(Path(source)) as bundle:
        rows = [*_rows(bundle.components), *_rows(bundle.offsets)]
        for recorded in (bundle.recorded(all_selected=True), bundle.recorded(all_selected=False)):
            if recorded is not None:
                rows += _rows(recorded.file)
                recorded.close()
        manifest = {k: v for k, v in bundle.manifest.items() if not isinstance(v, list | dict)}
        about = {"manifest": manifest, "per_tensor": [_component(bundle, entry) for entry in bundle.entries]}
        return rows, about, []


def _component(bundle: Bundle, entry: BundleEntry) -> dict[str, Any]:
    s = bundle.components.read(component_keys(entry.source_name)["s"])
    return {
        "tensor": entry.source_name,
        "shape": list(entry.shape),
        "layout": entry.layout,
        "source": entry.component_source,
        "offset_start": entry.offset_start,
        "offset_end": entry.offset_end,
        "spectrum": spectrum(s),
        "offsets": offsets_summary(bundle.offsets.read(offsets_key(entry.source_name))),
    }


def spectrum(s: np.ndarray) -> dict[str, Any]:
    """Largest and smallest of the singular values `s`, `ratio` smallest / largest, and `clusters`: groups of two or
    more of which each is closer than `CLUSTER_GAP` times the largest to the next."""
    values = np.sort(s.astype(np.float64).reshape(-1))[::-1]
    if not values.size or not np.isfinite(values).all():
        return dict.fromkeys(("count", "max", "min", "ratio", "clusters")) | {"count": values.size}
    close = np.append(np.diff(values) > -CLUSTER_GAP * values[0], False)
    clusters = int(np.sum(close & ~np.append(False, close[:-1])))
    ratio = float(values[-1] / values[0]) if values[0] else None
    return {
        "count": values.size,
        "max": float(values[0]),
        "min": float(values[-1]),
        "ratio": ratio,
        "clusters": clusters,
    }


def offsets_summary(offsets: np.ndarray) -> dict[str, Any]:
    """Number, smallest, largest and RMS of scale offsets; None for what NaN or infinity leaves undefined."""
    values = offsets.astype(np.float64).reshape(-1)
    if not values.size or not np.isfinite(values).all():
        return {"count": values.size, "min": None, "max": None, "rms": None}
    rms = float(np.sqrt(np.mean(values**2)))
    return {"count": values.size, "min": float(values.min()), "max": float(values.max()), "rms": rms}


def _checkpoint(source: str) -> Found:
    with open_checkpoint(source) as checkpoint:
        rows = [row for file in checkpoint.files for row in _rows(file)]
        config, notes = _config(checkpoint)
        shards = list(dict.fromkeys(row["file"] for row in rows))
        head = {EMBEDDING: EMBEDDING in checkpoint.tensors, LM_HEAD: LM_HEAD in checkpoint.tensors}
        about = {"config": config, "revision": checkpoint.revision, "files": shards, "stored": head}
        return rows, {**about, "fingerprint": checkpoint.fingerprint()}, notes


def _config(checkpoint: ModelSource) -> tuple[dict[str, Any] | None, list[str]]:
    """The config's meaning; a model that this tool does not compute is listed all the same, with the reason."""
    try:
        return {**asdict(checkpoint.config), "rope_parameters": checkpoint.config.rope}, []
    except InputError as error:
        return None, [str(error)]


def _gguf(source: str) -> Found:
    with GgufFile(source) as file:
        rows = [
            {"name": t.name, "dtype": t.type, "shape": list(t.shape), "bytes": t.nbytes, "file": file.path.name}
            for t in file.tensors.values()
        ]
        metadata = {k: repr(v) if isinstance(v, GgufArray) else v for k, v in file.metadata.items()}
        types = dict(Counter(tensor.type for tensor in file.tensors.values()))
    try:
        with GgufModel(Path(source), source) as model:
            config, notes = _config(model)
    except InputError as error:
        config, notes = None, [str(error)]
    return rows, {"config": config, "types": types, "metadata": metadata}, notes


def _dump(source: str) -> Found:
    dump = Dump(Path(source))
    try:
        rows = [{"name": name, **_entry(entry)} for name, entry in dump.tensors.items()]
        manifest = dump.manifest
        about = {k: v for k, v in manifest.items() if k not in ("tensors", "model", "tokens", "facts", "selected")}
        model = manifest.get("model")
        about["model"] = model.get("source") if isinstance(model, dict) else model
        tokens = manifest.get("tokens")
        about["tokens"] = len(tokens) if isinstance(tokens, list) else None
        notes = [] if all(row["file"] for row in rows) else ["hashes alone: some tensors' values were not kept"]
        return rows, {**about, "facts": dump.facts}, notes
    finally:
        dump.close()


def _entry(entry: dict[str, Any]) -> dict[str, Any]:
    """The manifest's own words on a tensor."""
    size = _ITEM_SIZES[entry["dtype"]] * math.prod(entry["shape"])
    return {"dtype": entry["dtype"], "shape": entry["shape"], "bytes": size, "file": entry["file"]}


def _aprt_row(file: AprtFile, name: str, path: str) -> dict[str, Any]:
    return {"name": name, "dtype": "float32", "shape": [file.count], "bytes": 4 * file.count, "file": path}


_FLAT = "APRT stores no shape or dtype: elements are counted, not shaped"


def _aprt(source: str) -> Found:
    file = AprtFile(source)
    return [_aprt_row(file, file.stage, file.path.name)], {"layer": file.layer}, [_FLAT]


def _aprt_tree(source: str) -> Found:
    tree = AprtTree(source)
    rows = [
        _aprt_row(file, forward_key(place), str(file.path.relative_to(tree.folder)))
        for place, file in tree.files.items()
    ]
    layers = sorted({layer for layer, _ in tree.files if layer is not None})
    return rows, {"layers": layers, "extra": tree.extra}, [_FLAT]


def _npy(source: str) -> Found:
    header, path = read_npy_header(Path(source)), Path(source)
    row = {"name": path.stem, "dtype": str(header.dtype), "shape": list(header.shape), "bytes": header.nbytes}
    return [{**row, "file": path.name}], {"fortran_order": header.fortran_order}, []


def _pickle(source: str) -> Found:
    listing = list_pickle(Path(source))
    rows = [{**row, "file": Path(source).name} for row in listing.tensors]
    notes = record_faults(listing)
    if listing.runs:
        notes.append(f"unpickling this imports {', '.join(listing.runs)}, which plain tensors do not need")
    return rows, {"globals": listing.globals, "unexpected": listing.runs}, notes


def _json(source: str) -> Found:
    value = read_object(source)
    plain = {
        k: v if isinstance(v, str | int | float | None) else f"{type(v).__name__} of {len(v)}" for k, v in value.items()
    }
    return [], plain, [] if isinstance(value.get("schema"), str) else ["it names no schema"]


def _tool(source: str) -> Found:
    path = Path(source)
    table = table_of(path)
    assert table is not None
    with ExitStack() as stack:
        raws = raw_tensors(table, path, stack)
        rows = [
            {
                "name": name,
                "dtype": dtype_name(raw.dtype),
                "shape": list(raw.shape),
                "bytes": math.prod(raw.shape) * raw.dtype.itemsize,
                "file": raw.file.name,
            }
            for name, raw in raws.items()
        ]
        try:
            recorded = open_recorded(table, path, None, stack)
        except InputError as error:
            return rows, {"tool": table.title, "stages": []}, [str(error)]
    notes = [f"{name}: {said}" for name, said in recorded.facts.items() if name != "recorded by"]
    judged = f"svf audit {shlex.quote(source)} --model MODEL --tokens TOKENS judges it"
    return rows, {"tool": table.title, "stages": [forward_key(place) for place in recorded.pieces]}, [*notes, judged]


_READERS: dict[Kind, Callable[[str], Found]] = {
    Kind.BUNDLE: _bundle,
    Kind.CHECKPOINT: _checkpoint,
    Kind.GGUF: _gguf,
    Kind.DUMP: _dump,
    Kind.APRT_TREE: _aprt_tree,
    Kind.APRT: _aprt,
    Kind.TOOL: _tool,
    Kind.SAFETENSORS: _safetensors,
    Kind.NPY: _npy,
    Kind.PICKLE: _pickle,
    Kind.JSON: _json,
}
