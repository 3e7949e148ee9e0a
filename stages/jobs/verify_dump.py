"""What must hold of a committed dump: every tensor has its sha256, every declared stage is there in its shape."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import shown
from stages.files.bundle import tensor_stage_key
from stages.files.dump import Dump
from stages.files.forward_dump import Place, forward_key, parse_key
from stages.jobs.verify_values import Check
from stages.progress import Progress
from stages.spec.families import parse_config
from stages.spec.forward import forward_pipeline, recorded_shape
from stages.spec.replay import REPLAY
from stages.spec.stage import Scope


def dump_checks(folder: Path, progress: Progress) -> Iterator[Check]:
    """The checks of the dump in `folder`; its manifest, which commits it, is read first."""
    with closing(Dump(folder)) as dump:  # schema, and shapes and dtypes against the files' headers
        yield "manifest against files", _strangers(dump)
        if dump.manifest["kind"] == "forward":
            yield "token ids", _tokens(dump)
            yield "stages of the forward", _forward_stages(dump)
        else:
            yield "stages of the replay", _replay_stages(dump)
        yield "sha256 of every tensor", _hashes(dump, progress)


def _strangers(dump: Dump) -> Iterator[str]:
    """Tensors that lie in the dump's files and not in its manifest."""
    for file in sorted({entry["file"] for entry in dump.tensors.values() if entry["file"]}):
        for key in dump.file(file).tensors:
            if dump.tensors.get(key, {}).get("file") != file:
                yield f"{dump.folder / file}: '{shown(key)}' is not in the manifest"


def _hashes(dump: Dump, progress: Progress) -> Iterator[str]:
    for done, (key, entry) in enumerate(dump.tensors.items()):
        progress(f"hashing {shown(key)}", done / len(dump.tensors))
        if entry["file"] and dump.file(entry["file"]).sha256(key) != entry["sha256"]:
            yield f"{dump.folder / entry['file']}: '{shown(key)}' has another sha256 than the manifest says"


def _replay_stages(dump: Dump) -> Iterator[str]:
    """Stages that a selected tensor lacks, and keys that are no stage of a selected tensor."""
    names = [item["source_name"] for item in dump.manifest["selected"]]
    if not names:
        yield f"{dump.folder}: the manifest's 'selected' names no tensors"
    expected = {tensor_stage_key(name, stage) for name in names for stage in REPLAY}
    yield from _key_faults(dump, expected)


def _key_faults(dump: Dump, expected: set[str]) -> Iterator[str]:
    for key in sorted(expected - set(dump.tensors)):
        yield f"{dump.folder}: '{shown(key)}' is missing"
    for key in sorted(set(dump.tensors) - expected):
        yield f"{dump.folder}: '{shown(key)}' is no stage that the manifest declares"


def _tokens(dump: Dump) -> Iterator[str]:
    tokens = np.array(dump.manifest["tokens"], "<i8")
    if hashlib.sha256(tokens.tobytes()).hexdigest() != dump.manifest.get("tokens_sha256"):
        yield f"{dump.folder}: the token ids have another sha256 than the manifest says"


def _forward_stages(dump: Dump) -> Iterator[str]:
    """Asked stages that are missing, of another shape or dtype, or were not asked for."""
    manifest = dump.manifest
    if any(manifest.get(name) is None for name in ("layers", "stages", "dtype")):
        yield f"{dump.folder}: the manifest does not say which layers, stages and dtype were recorded"
        return
    config = parse_config(manifest["model"]["config"], f"{dump.folder}: the manifest's model.config")
    path = forward_pipeline(config, manifest["dtype"])
    expected = {place: path.at(place) for place in _places(path, manifest["layers"], manifest["stages"])}
    # What the asked stages read may be there too: it is recorded so that they can be judged.
    inputs = [place for key in manifest.get("inputs") or () if (place := parse_key(key))]
    expected |= {place: path.at(place) for place in inputs if place[1] in path.of(place[0])}
    yield from _key_faults(dump, {forward_key(place) for place in expected} | {"lm_head"} & set(dump.tensors))
    for place, stage in expected.items():
        entry = dump.tensors.get(forward_key(place))
        if entry is None:
            continue
        shape = [*recorded_shape(config, stage, len(manifest["tokens"]), manifest.get("positions", "all"))]
        if entry["shape"] != shape or entry["dtype"] != stage.dtype:
            yield (
                f"{dump.folder}: '{forward_key(place)}' is {entry['dtype']} {shown(entry['shape'])}, "
                f"expected {stage.dtype} {shape}"
            )


def _places(path: Any, layers: list[Any], stages: list[Any]) -> Iterator[Place]:
    for name in path:
        if name in stages:
            yield from (
                ((n, name) for n in layers if name in path.of(n))
                if path[name].scope is Scope.LAYER
                else ((None, name),)
            )
