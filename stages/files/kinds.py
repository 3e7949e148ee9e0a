"""What kind of thing a path holds, by its files' names, first bytes and keys; no tensor is read."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path

from stages.errors import InputError, NotFoundError, UsageError, shown
from stages.files import bundle, dump, gguf_file
from stages.files.aprt import MAGIC as APRT_MAGIC
from stages.files.aprt import is_aprt, is_aprt_tree
from stages.files.bundle import stages_in
from stages.files.checkpoint import CONFIG
from stages.files.folders import RUN_FILE
from stages.files.forward_dump import is_forward_dump
from stages.files.tensorfile import TensorFile
from stages.files.tool_dumps import table_of


class Kind(StrEnum):
    """Everything that `svf inspect` and `svf verify` understand."""

    BUNDLE = "component bundle"
    CHECKPOINT = "checkpoint"
    GGUF = "GGUF file"
    DUMP = "dump"
    APRT_TREE = "APRT tree"
    APRT = "APRT file"
    TOOL = "another tool's dump"
    SAFETENSORS = "safetensors file"
    NPY = "npy file"
    PICKLE = "pickled torch file"
    JSON = "JSON document"


_FOLDERS = {bundle.MANIFEST_FILE: Kind.BUNDLE, CONFIG: Kind.CHECKPOINT, dump.MANIFEST_FILE: Kind.DUMP}
_SUFFIXES = {
    ".safetensors": Kind.SAFETENSORS,
    gguf_file.SUFFIX: Kind.GGUF,
    ".npy": Kind.NPY,
    ".json": Kind.JSON,
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt", ".pkl"), Kind.PICKLE),
}
# A zip and a pickle of protocol 2 or later.
_MAGICS = {
    gguf_file.MAGIC: Kind.GGUF,
    APRT_MAGIC: Kind.APRT,
    b"\x93NUMPY": Kind.NPY,
    b"PK\x03\x04": Kind.PICKLE,
    b"\x80": Kind.PICKLE,
}
# The length of a safetensors header, then its brace.
_HEADER_START = 9


def kind_of_source(source: str) -> Kind:
    """The kind of a file, a folder, or, where nothing has that name, a hub model.

    `InputError` for a folder or file of no known kind, naming what would make it one.
    """
    path = Path(source)
    if not source:
        raise NotFoundError("the source's name is empty; name a file, a folder or a hub model")
    try:
        if path.is_dir():
            return _folder(path)
        if not path.exists():
            return Kind.CHECKPOINT  # a hub model's id, or the error that says it is none
        if not path.is_file():
            raise NotFoundError(f"{path}: is not a regular file")
        with path.open("rb") as stream:
            return _file(path, stream.read(_HEADER_START))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise NotFoundError(f"{shown(source)}: cannot be read: {reason}") from None


def _folder(path: Path) -> Kind:
    for name, kind in _FOLDERS.items():
        if (path / name).is_file():
            return kind
    if is_aprt_tree(path):
        return Kind.APRT_TREE
    if table_of(path) is not None:
        return Kind.TOOL
    there = ", ".join(shown(name, 40) for name in sorted(os.listdir(path))[:4]) or "nothing"
    raise InputError(
        f"{path}: no {', '.join(_FOLDERS)} nor APRT stage files, so it is no bundle, checkpoint or finished dump, "
        f"nor does a tool that is known write so; it has {there}"
    )


def _file(path: Path, start: bytes) -> Kind:
    if start.startswith(b"version "):
        raise InputError(f"{path}: is a Git LFS pointer, not the file itself; run 'git lfs pull'")
    # A magic before the suffix: APRT and torch both use .bin. A header may begin with any byte, hence its brace first.
    if start[8:] == b"{":
        return Kind.SAFETENSORS
    found = next((kind for magic, kind in _MAGICS.items() if start.startswith(magic)), None)
    found = found or _SUFFIXES.get(path.suffix)
    if found is None and start.lstrip()[:1] in (b"{", b"["):
        found = Kind.JSON
    if found is None:
        raise InputError(f"{path}: begins with {shown(start)}; expected safetensors, GGUF, APRT, .npy, .pt or JSON")
    return found


class Recording(StrEnum):
    """What can be compared or judged, as a sentence calls it."""

    REPLAY = "a replay"
    FORWARD = "a forward dump"
    FOREIGN = "another program's forward"
    APRT_TREE = "an APRT tree"
    APRT = "an APRT file"
    CHECKPOINT = "a checkpoint"
    REPORT = "a report"


def recording_at(path: Path) -> Recording:
    """What was recorded at a path; another program's is what a tool of `tool_dumps` wrote, or safetensors without our
    stages.

    `NotFoundError` where nothing is, or nothing that a run finished.
    """
    if path.suffix == ".json" and path.is_file():
        return Recording.REPORT
    if not path.exists():
        raise NotFoundError(f"{path}: no such file or folder")
    if path.is_dir():
        return _recording_in(path)
    if gguf_file.is_gguf(path):
        return Recording.CHECKPOINT
    if is_aprt(path):
        return Recording.APRT
    if table_of(path) is not None:
        return Recording.FOREIGN
    with TensorFile(path) as file:
        return Recording.REPLAY if stages_in(file) else Recording.FOREIGN


def one_recording(path: Path) -> Recording:
    """`recording_at`, where a folder of several dumps is refused: `UsageError` with their names."""
    one = (path / dump.MANIFEST_FILE).is_file() or is_aprt_tree(path)
    if path.is_dir() and not one and (inside := dumps_in(path)):
        names = ", ".join(shown(found.name) for found in sorted(inside))
        raise UsageError(f"{path}: holds {len(inside)} dumps, {names}; name one of them")
    return recording_at(path)


def _recording_in(folder: Path) -> Recording:
    if is_forward_dump(folder):
        return Recording.FORWARD
    if (folder / CONFIG).is_file():
        return Recording.CHECKPOINT
    if is_aprt_tree(folder):
        return Recording.APRT_TREE
    if any((folder / name).is_file() for name in (dump.MANIFEST_FILE, bundle.MANIFEST_FILE)):
        return Recording.REPLAY
    if (folder / RUN_FILE).is_file():
        raise NotFoundError(f"{folder}: holds an unfinished run and no dump; finish the run with --resume")
    if any(folder.glob("*.safetensors")) or table_of(folder) is not None:
        return Recording.FOREIGN
    inside = [found.name for found in dumps_in(folder)]
    hint = f"; it has the dumps {', '.join(map(shown, inside))} inside" if inside else ""
    raise NotFoundError(f"{folder}: holds no dump, bundle, APRT tree or checkpoint{hint}")


def dumps_in(folder: Path) -> list[Path]:
    """The finished dumps right under a folder; torch's first, as where both sides are run."""
    if not folder.exists():
        raise NotFoundError(f"{folder}: no such file or folder")
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    dumps = [e for e in entries if e.is_dir() and ((e / dump.MANIFEST_FILE).is_file() or is_aprt_tree(e))]
    return sorted(dumps, key=lambda path: (path.name != "torch", path.name))
