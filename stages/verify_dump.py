"""What must hold of a committed dump: every tensor has its sha256, every declared stage is there in its shape."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from stages.bundle import tensor_stage_key
from stages.dump import Dump
from stages.errors import shown
from stages.forward import forward_path, stage_shape
from stages.forward_dump import Place, forward_key, parse_key
from stages.progress import Progress
from stages.qwen import parse_config
from stages.replay import REPLAY
from stages.stage import Scope
from stages.verify_values import Check


def dump_checks(folder: Path, progress: Progress) -> Iterator[Check]:
    """The checks of the dump in `folder`; its manifest, which commits it, is read first."""
    with closing(Dump(folder)) as dump:  # schema, and shapes and dtypes against the files' headers
        yield "manifest against files", _strangers(dump)
        kind = dump.manifest.get("kind")
        if kind == "forward":
            yield "token ids", _tokens(dump)
            yield "stages of the forward", _forward_stages(dump)
        elif kind == "replay":
            yield "stages of the replay", _replay_stages(dump)
        else:
            yield "kind", iter([f"{folder}: kind is {shown(kind)}, expected forward or replay"])
        yield "sha256 of every tensor", _hashes(dump, progress)


def _strangers(dump: Dump) -> Iterator[str]:
    """Tensors that lie in the dump's files and not in its manifest."""
    for file in sorted({entry["file"] for entry in dump.tensors.values() if entry.get("file")}):
        for key in dump.file(file).tensors:
            if dump.tensors.get(key, {}).get("file") != file:
                yield f"{dump.folder / file}: '{shown(key)}' is not in the manifest"


def _hashes(dump: Dump, progress: Progress) -> Iterator[str]:
    for done, (key, entry) in enumerate(dump.tensors.items()):
        progress(f"hashing {shown(key)}", done / len(dump.tensors))
        expected = entry.get("sha256")
        if not isinstance(expected, str):
            yield f"{dump.folder}: '{shown(key)}' has no sha256 in the manifest"
        elif entry.get("file") and dump.file(entry["file"]).sha256(key) != expected:
            yield f"{dump.folder / entry['file']}: '{shown(key)}' has another sha256 than the manifest says"


def _replay_stages(dump: Dump) -> Iterator[str]:
    """Stages that a selected tensor lacks, and keys that are no stage of a selected tensor."""
    selected = dump.manifest.get("selected")
    items = selected if isinstance(selected, list) else []
    names = [str(item["source_name"]) for item in items if isinstance(item, dict) and "source_name" in item]
    if not names or len(names) != len(items):
        yield f"{dump.folder}: the manifest's 'selected' names no tensors"
        return
    expected = {tensor_stage_key(name, stage) for name in names for stage in REPLAY}
    yield from _key_faults(dump, expected)


def _key_faults(dump: Dump, expected: set[str]) -> Iterator[str]:
    for key in sorted(expected - set(dump.tensors)):
        yield f"{dump.folder}: '{shown(key)}' is missing"
    for key in sorted(set(dump.tensors) - expected):
        yield f"{dump.folder}: '{shown(key)}' is no stage that the manifest declares"


def _token_ids(dump: Dump) -> list[int] | None:
    tokens = dump.manifest.get("tokens")
    good = isinstance(tokens, list) and tokens and all(isinstance(t, int) and 0 <= t < 2**63 for t in tokens)
    return tokens if good else None


def _tokens(dump: Dump) -> Iterator[str]:
    tokens = _token_ids(dump)
    if tokens is None:
        yield f"{dump.folder}: the manifest's 'tokens' is no list of token ids"
    elif hashlib.sha256(np.array(tokens, "<i8").tobytes()).hexdigest() != dump.manifest.get("tokens_sha256"):
        yield f"{dump.folder}: the token ids have another sha256 than the manifest says"


def _forward_stages(dump: Dump) -> Iterator[str]:
    """Asked stages that are missing, of another shape or dtype, or were not asked for."""
    manifest, tokens = dump.manifest, _token_ids(dump)
    model = manifest.get("model")
    raw = model.get("config") if isinstance(model, dict) else None
    layers, stages, dtype = (manifest.get(name) for name in ("layers", "stages", "dtype"))
    lists = isinstance(layers, list) and isinstance(stages, list)
    if tokens is None or not lists or not isinstance(dtype, str) or not isinstance(raw, dict):
        yield f"{dump.folder}: the manifest does not say which model, layers, stages and dtype were recorded"
        return
    config = parse_config(raw, f"{dump.folder}: the manifest's model.config")
    path = forward_path(config, dtype)
    expected = {place: path[place[1]] for place in _places(path, list(layers or ()), list(stages or ()))}
    # What the asked stages read may be there too: it is recorded so that they can be judged.
    named = manifest.get("inputs")
    inputs = [place for key in (named if isinstance(named, list) else ()) if (place := parse_key(str(key)))]
    expected |= {place: path[place[1]] for place in inputs if place[1] in path}
    yield from _key_faults(dump, {forward_key(place) for place in expected} | {"lm_head"} & set(dump.tensors))
    for place, stage in expected.items():
        entry = dump.tensors.get(forward_key(place))
        if entry is None:
            continue
        full = stage_shape(config, stage, len(tokens))
        shape = _recorded_shape(stage.shape, full, manifest.get("positions") == "last")
        if entry.get("shape") != shape or entry.get("dtype") != stage.dtype:
            yield (
                f"{dump.folder}: '{forward_key(place)}' is {shown(entry.get('dtype'))} {shown(entry.get('shape'))}, "
                f"expected {stage.dtype} {shape}"
            )


def _places(path: Any, layers: list[Any], stages: list[Any]) -> Iterator[Place]:
    for name in path:
        if name in stages:
            yield from (((n, name) for n in layers) if path[name].scope is Scope.LAYER else ((None, name),))


def _recorded_shape(axes: str, shape: tuple[int, ...], last: bool) -> list[int]:
    """The whole shape, or with the last position alone on the axis of queries."""
    names = axes.split()
    return [1 if last and axis in ("tokens", "queries") else size for axis, size in zip(names, shape, strict=True)]
