"""Forward dumps: stages by layer, one file a layer and one for the whole model, committed by the manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import InputError, shown
from stages.files.aprt import AprtTree
from stages.files.dump import MANIFEST_FILE, SCHEMA, Dump, changed
from stages.files.folders import new_folder
from stages.files.jsonio import write_json
from stages.files.source import ModelSource
from stages.files.tensorfile import sha256, write_tensors
from stages.spec.forward import ANY_MODEL
from stages.spec.sites import stage_of_module
from stages.spec.values import StageResult

MODEL_FILE = "model.safetensors"
Place = tuple[int | None, str]  # layer (None: whole model) and stage


def forward_key(place: Place) -> str:
    """Key of a stage in a forward dump: `layers.<n>.<stage>`, or `<stage>` for the whole model."""
    layer, stage = place
    return stage if layer is None else f"layers.{layer}.{stage}"


def parse_key(key: str) -> Place | None:
    """Layer and stage of a key; None for a key of another kind."""
    if not key.startswith("layers."):
        return (None, key) if "." not in key else None
    layer, _, stage = key.removeprefix("layers.").partition(".")
    return (int(layer), stage) if layer.isascii() and layer.isdigit() and stage and "." not in stage else None


_PARTS = tuple(f"{name}{end}" for name in "qkv" for end in ("", "_proj"))


def advice(key: str) -> str:
    """What to write instead of a key that is none, `: ...`; "" where nothing is known of it."""
    prefix, _, rest = key.partition(".")
    last = rest.rpartition(".")[2]
    found = ["drop 'model.'"] if prefix == "model" and rest else []
    if last in _PARTS:
        found.append("join q, k, v on the last axis as qkv_bias")
    elif (stage := stage_of_module(last, ANY_MODEL)) is not None:
        found.append(f"call it {stage}")
    return f": {', '.join(found)}" if found else ""


def layer_file(layer: int | None) -> str:
    """File of a layer's stages."""
    return MODEL_FILE if layer is None else f"layer-{layer}.safetensors"


def run_fields(checkpoint: ModelSource, source: str, tokens: Sequence[int]) -> dict[str, Any]:
    """What a manifest says of the model and the tokens: by these two dumps are comparable. `source`: as named."""
    return {
        "model": {
            "source": str(checkpoint.path.resolve()) if checkpoint.revision is None else source,
            "fingerprint": checkpoint.fingerprint(),
            "config": checkpoint.raw_config,
        },
        "tokens": list(tokens),
        "tokens_sha256": hashlib.sha256(np.asarray(tokens, "<i8").tobytes()).hexdigest(),
    }


class ForwardDump:
    """A forward dump being written, one layer at a time; nothing counts until `commit`.

    `resume` takes the folder of a killed run.
    """

    def __init__(self, folder: Path, *, resume: bool = False):
        self._stack = ExitStack()
        self.folder = self._stack.enter_context(new_folder(folder, resume=resume))
        self._tensors: dict[str, dict[str, Any]] = {}
        self._model: dict[str, np.ndarray] = {}

    def record(self, results: Iterable[StageResult]) -> Iterator[StageResult]:
        """Pass results on, writing each layer's when the next one begins."""
        layer: int | None = None
        held: dict[str, np.ndarray] = {}
        for result in results:
            if result.layer is None:
                self._model[result.stage] = result.array
            else:
                if result.layer != layer and held:
                    self._write(layer_file(layer), held)
                    held = {}
                layer = result.layer
                held[forward_key((result.layer, result.stage))] = result.array
            yield result
        if held:
            self._write(layer_file(layer), held)
        if self._model:
            self._write(MODEL_FILE, self._model)

    def _write(self, file: str, arrays: Mapping[str, np.ndarray]) -> None:
        digests = write_tensors(self.folder / file, arrays, hashes=True)
        for key, array in arrays.items():
            entry = {"file": file, "dtype": array.dtype.name, "shape": list(array.shape), "sha256": digests[key]}
            self._tensors[key] = entry

    def commit(self, manifest: Mapping[str, Any]) -> dict[str, str]:
        """Write the manifest; returns every tensor's sha256."""
        document = {"schema": SCHEMA, "kind": "forward", **manifest, "tensors": self._tensors}
        write_json(self.folder / MANIFEST_FILE, document)
        return {key: entry["sha256"] for key, entry in self._tensors.items()}

    def __enter__(self) -> ForwardDump:
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.__exit__(*exc)


def is_forward_dump(path: Path) -> bool:
    """Whether the folder is a committed forward dump."""
    if not (path / MANIFEST_FILE).is_file():
        return False
    dump = Dump(path)
    dump.close()
    return dump.manifest.get("kind") == "forward"


class ForwardSide:
    """A committed forward dump, read by place."""

    def __init__(self, folder: Path):
        self.dump = Dump(folder)
        self.label = str(folder)
        manifest = self.dump.manifest
        if manifest.get("kind") != "forward":
            raise InputError(f"{folder}: is a dump of kind {shown(manifest.get('kind'))}, expected forward")
        self.facts = self.dump.facts
        self.places: dict[Place, str] = {}
        self._checked: set[str] = set()
        for key in self.dump.tensors:
            place = parse_key(key)
            if place is None:
                raise InputError(f"{folder}: '{shown(key)}' is no key of a forward dump")
            if self.dump.tensors[key]["file"] is None:
                raise InputError(f"{folder}: '{shown(key)}' has no file, but a forward is compared by its values")
            self.places[place] = key

    def read(self, place: Place) -> np.ndarray:
        """A recorded stage; `InputError` when it is not what the manifest's sha256 says."""
        key = self.places[place]
        file = self.dump.file(self.dump.tensors[key]["file"])
        array = file.read(key)
        if key not in self._checked:
            if sha256(array) != self.sha256(place):
                raise changed(file.path, key)
            self._checked.add(key)
        return array

    def shape(self, place: Place) -> list[int]:
        return list(self.dump.tensors[self.places[place]]["shape"])

    def sha256(self, place: Place) -> str:
        return str(self.dump.tensors[self.places[place]]["sha256"])

    def close(self) -> None:
        self.dump.close()


class AprtSide:
    """An APRT tree with the face of a `ForwardSide`: values are flat float32, `lm_head` the last token's alone."""

    def __init__(self, folder: Path):
        self.tree = AprtTree(folder)
        self.label = f"{folder} (APRT, flat)"
        self.facts: dict[str, str] = {}
        self.places: dict[Place, str] = {place: forward_key(place) for place in self.tree.files}

    def read(self, place: Place) -> np.ndarray:
        return self.tree.files[place].read()

    def shape(self, place: Place) -> list[int]:
        return [self.tree.files[place].count]

    def sha256(self, place: Place) -> str:
        return sha256(self.read(place))

    def close(self) -> None:
        """Nothing to close: a file of a tree is opened for each read."""
