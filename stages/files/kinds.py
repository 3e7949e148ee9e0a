"""What kind of thing a path holds, by its files' names and first bytes; nothing is parsed."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path

from stages.errors import InputError, NotFoundError, shown
from stages.files import bundle, dump
from stages.files.aprt import MAGIC as APRT_MAGIC
from stages.files.aprt import is_aprt_tree
from stages.files.checkpoint import CONFIG


class Kind(StrEnum):
    """Everything that `svf inspect` and `svf verify` understand."""

    BUNDLE = "component bundle"
    CHECKPOINT = "checkpoint"
    DUMP = "dump"
    APRT_TREE = "APRT tree"
    APRT = "APRT file"
    SAFETENSORS = "safetensors file"
    NPY = "npy file"
    PICKLE = "pickled torch file"
    JSON = "JSON document"


_FOLDERS = {bundle.MANIFEST_FILE: Kind.BUNDLE, CONFIG: Kind.CHECKPOINT, dump.MANIFEST_FILE: Kind.DUMP}
_SUFFIXES = {
    ".safetensors": Kind.SAFETENSORS,
    ".npy": Kind.NPY,
    ".json": Kind.JSON,
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt", ".pkl"), Kind.PICKLE),
}
# A zip and a pickle of protocol 2 or later.
_MAGICS = {APRT_MAGIC: Kind.APRT, b"\x93NUMPY": Kind.NPY, b"PK\x03\x04": Kind.PICKLE, b"\x80": Kind.PICKLE}
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
    there = ", ".join(shown(name, 40) for name in sorted(os.listdir(path))[:4]) or "nothing"
    raise InputError(
        f"{path}: no {', '.join(_FOLDERS)} nor APRT stage files, so it is no bundle, checkpoint or finished dump; "
        f"it has {there}"
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
        raise InputError(f"{path}: begins with {shown(start)}; expected safetensors, APRT, .npy, .pt or JSON")
    return found
