"""Dumps: every stage tensor of one run, committed by a manifest that is written last."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import InputError, NotFoundError, UsageError, shown
from stages.files.bundle import tensor_stage_key
from stages.files.folders import ensure_space, new_folder, prepare_folder
from stages.files.jsonio import read_object, write_json
from stages.files.manifest import check_manifest
from stages.files.selection import layer_of
from stages.files.tensorfile import TensorFile, TensorWriter
from stages.spec.dtypes import stored_dtype
from stages.spec.replay import REPLAY
from stages.spec.stage import Stage
from stages.spec.values import Chunk, ReplayTask

SCHEMA = "svf.dump/1"
MANIFEST_FILE = "manifest.json"
MODES = ("full", "hash", "none")
# Folder of the components that a dump carries: those that its backend decomposed itself.
COMPONENTS_FOLDER = "components"


def changed(file: Path, key: str) -> InputError:
    """The refusal of a tensor whose bytes are not those that its dump committed."""
    return InputError(f"{file}: '{shown(key)}' has another sha256 than the manifest says; it was changed after the run")


def dump_file(source_name: str) -> str:
    """File of a tensor's stages: one per layer, one for whole-model tensors."""
    layer = layer_of(source_name)
    return "model.safetensors" if layer is None else f"layer-{layer}.safetensors"


class ReplayDump:
    """A replay dump being written, chunk by chunk; nothing counts until `commit`.

    Mode `full` writes tensors and their sha256, `hash` the sha256 alone. `resume` takes the folder of a killed run.
    """

    def __init__(self, folder: Path, tasks: Sequence[ReplayTask], mode: str = "full", *, resume: bool = False):
        if mode not in ("full", "hash"):
            raise UsageError(f"--dump {mode}: expected {', '.join(MODES)}")
        self._stack = ExitStack()
        self.folder, self.mode = self._stack.enter_context(new_folder(folder, resume=resume)), mode
        self._specs = {
            tensor_stage_key(task.source_name, stage.name): (
                dump_file(task.source_name),
                stage,
                task.stage_shape(stage),
            )
            for task in tasks
            for stage in REPLAY.values()
        }
        self._writers: dict[str, TensorWriter] = {}
        self._hashes = {key: hashlib.sha256() for key in self._specs} if mode == "hash" else {}
        if mode == "full":
            with self._stack:  # a failure here empties the folder again; success keeps the stack for __exit__
                self._open()
                self._stack = self._stack.pop_all()

    def _open(self) -> None:
        files: dict[str, dict[str, tuple[np.dtype, tuple[int, ...]]]] = {}
        for key, (file, stage, shape) in self._specs.items():
            files.setdefault(file, {})[key] = (stored_dtype(stage.dtype), shape)
        sizes = [np.prod(s, dtype=object) * d.itemsize for f in files.values() for d, s in f.values()]
        ensure_space(self.folder, int(sum(sizes)))
        for file, specs in files.items():
            self._writers[file] = TensorWriter(self.folder / file, specs, hashes=True)

    def add(self, task: ReplayTask, chunk: Chunk) -> None:
        """Write the stages of one chunk."""
        for name, array in chunk.values.items():
            key, stage = tensor_stage_key(task.source_name, name), REPLAY[name]
            if self.mode == "hash":
                self._hash(key, task, stage, array)
                continue
            axis = task.row_axis(stage)
            self._writers[dump_file(task.source_name)].write(key, array, chunk.start if stage.by_rows else 0, axis)

    def _hash(self, key: str, task: ReplayTask, stage: Stage, array: np.ndarray) -> None:
        if task.row_axis(stage) == 1 and array.shape != task.stage_shape(stage):
            raise UsageError(
                f"{task.source_name}: the sha256 of a transposed tensor needs all its rows at once; "
                "use --dump full, or a larger --chunk-rows"
            )
        self._hashes[key].update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def commit(self, manifest: Mapping[str, Any]) -> dict[str, str]:
        """Commit the files, then the manifest; returns every tensor's sha256."""
        digests = {key: h.hexdigest() for key, h in self._hashes.items()}
        for writer in self._writers.values():
            digests.update(writer.commit())
        tensors = {
            key: {
                "file": file if self.mode == "full" else None,
                "dtype": stage.dtype,
                "shape": list(shape),
                "sha256": digests[key],
            }
            for key, (file, stage, shape) in self._specs.items()
        }
        write_json(self.folder / MANIFEST_FILE, {"schema": SCHEMA, **manifest, "tensors": tensors})
        return digests

    def __enter__(self) -> ReplayDump:
        return self

    def __exit__(self, *exc: Any) -> None:
        """Stop; after a failure the folder is empty again."""
        for writer in self._writers.values():
            writer.close()
        self._stack.__exit__(*exc)


def keep_hashes(manifest: Path, folder: Path) -> None:
    """Write the manifest of a full dump into the new `folder` as that of a dump of hashes."""
    document = read_object(manifest)
    tensors = {key: {**entry, "file": None} for key, entry in document["tensors"].items()}
    own = {"components": None} if document.get("native_components") else {}  # they go with the full dump
    prepare_folder(folder)
    write_json(folder / MANIFEST_FILE, {**document, **own, "tensors": tensors})


class Dump:
    """A committed dump open for reading."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise NotFoundError(f"{folder}: no such folder")
        path = self.folder / MANIFEST_FILE
        if not path.is_file():
            raise InputError(f"{folder}: no {MANIFEST_FILE}: this dump was not written to its end; run it again")
        self.manifest = read_object(path)
        if self.manifest.get("schema") != SCHEMA:
            raise InputError(f"{path}: schema is {shown(self.manifest.get('schema'))}, expected {SCHEMA}")
        check_manifest(self.manifest, str(path))
        self.tensors: dict[str, Any] = self.manifest["tensors"]
        self._files: dict[str, TensorFile] = {}
        try:
            self._check(path)
        except BaseException:
            self.close()
            raise

    @property
    def facts(self) -> dict[str, str]:
        """What may have changed this run's results, its precision too."""
        facts = {k: str(v) for k, v in self.manifest.get("facts", {}).items()}
        precision = self.manifest.get("precision")
        return facts if precision is None else {**facts, "precision": str(precision)}

    @property
    def backend(self) -> str | None:
        """The backend that computed it, by name; None where the manifest does not tell."""
        name: str | None = self.manifest.get("backend")
        return name

    def _check(self, path: Path) -> None:
        for key, entry in self.tensors.items():
            if (file := entry["file"]) is None:  # a dump of hashes
                continue
            info = self.file(file).info(key)
            if info.dtype.name != entry["dtype"] or list(info.shape) != entry["shape"]:
                raise InputError(f"{path}: tensor '{shown(key)}' does not fit what {file} holds; the dump was changed")

    def file(self, name: str) -> TensorFile:
        """The open tensor file called `name` in this dump."""
        if name not in self._files:
            try:
                self._files[name] = TensorFile(self.folder / name)
            except NotFoundError as error:
                raise InputError(f"{error}, though {MANIFEST_FILE} names it; was the dump copied whole?") from None
        return self._files[name]

    def close(self) -> None:
        for file in self._files.values():
            file.close()
