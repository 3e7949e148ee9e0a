"""APRT stage files, as `apr trace --save-tensor` writes them: one stage of one layer per file, flat float32.

Little-endian throughout: `b"APRT"`, u32 layer (0xFFFFFFFF: the whole model), u32 element count, that many f32. A tree
holds `layer-<n>/<stage>.bin`, and `<stage>.bin` for whole-model stages; `embedding` sits in `layer-0/`, with layer 0 in
its header. Neither shape nor dtype is stored, so a comparison is flat.

The format has no commit marker. A tree written here is never seen in part all the same: it is written into a
temporary folder beside its place, synced, and renamed. Of a tree written by another program nobody can tell
whether it is whole; only its files can be checked, each against its header.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import struct
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import ml_dtypes
import numpy as np

from stages.errors import InputError, NotFoundError, OutputError, shown
from stages.files.folders import prepare_folder
from stages.files.jsonio import fsync_folder, open_regular, write_all, write_atomic

MAGIC = b"APRT"
WHOLE_MODEL = 0xFFFFFFFF
HEADER_BYTES = 12
MAX_COUNT = 2**32 - 1

Place = tuple[int | None, str]  # layer (None: whole model) and stage, as in forward dumps

_HEADER = struct.Struct("<4sII")
_F32 = np.dtype("<f4")
_BF16 = np.dtype(ml_dtypes.bfloat16)
# What float32 holds exactly, so that a file keeps every value.
HELD = (_F32, _BF16, np.dtype(np.float16))
# A stage's name becomes a file's name, so nothing that a path could be made of.
_STAGE = re.compile(r"[a-z_+]+", re.ASCII)
_LAYER_FOLDER = re.compile(r"layer-(0|[1-9][0-9]{0,9})", re.ASCII)
# Elements handled at a time: 16 MiB of float32.
_BLOCK = 1 << 22


def write_aprt(path: str | os.PathLike[str], layer: int | None, values: np.ndarray) -> None:
    """Write `values`, row-major, as the stage file of `layer` (None: the whole model), atomically.

    Float32 is written bit for bit, bfloat16 and float16 widened exactly, NaN payloads included. `TypeError` for any
    other dtype, `OutputError` for what the header cannot hold or a place that cannot be written.
    """
    _check(path, layer, values)
    write_atomic(path, lambda fd: _put(fd, layer, values))


def _check(path: str | os.PathLike[str], layer: int | None, values: np.ndarray) -> None:
    if values.dtype not in HELD:
        raise TypeError(f"{path}: APRT holds float32, got {values.dtype}; only bfloat16 and float16 are widened")
    if values.size > MAX_COUNT:
        raise OutputError(
            f"{path}: {values.size} elements do not fit, an APRT file holds at most {MAX_COUNT}; use safetensors"
        )
    if layer is not None and not 0 <= layer < WHOLE_MODEL:
        raise OutputError(f"{path}: layer {layer} does not fit, an APRT file has a layer from 0 to {WHOLE_MODEL - 1}")


def _put(fd: int, layer: int | None, values: np.ndarray) -> None:
    write_all(fd, _HEADER.pack(MAGIC, WHOLE_MODEL if layer is None else layer, values.size))
    flat = np.ascontiguousarray(values).reshape(-1)
    for at in range(0, flat.size, _BLOCK):
        write_all(fd, _float32(flat[at : at + _BLOCK]).view(np.uint8).data)


def _float32(values: np.ndarray) -> np.ndarray:
    if values.dtype == _F32:
        return values
    # A NaN by bits: a conversion instruction would make a signalling one quiet.
    bits = values.view(np.uint16).astype(np.uint32)
    if values.dtype == _BF16:
        return (bits << 16).view(np.float32)
    wide = values.astype(np.float32)
    nan = np.isnan(values)
    wide.view(np.uint32)[nan] = ((bits & 0x8000) << 16 | 0x7F800000 | (bits & 0x3FF) << 13)[nan]
    return wide


class AprtFile:
    """One stage file, its header and size checked; values are read by element range.

    `layer`: from the header, None for the whole model; `InputError` when a folder `layer-<n>` says otherwise. `count`:
    elements. `stage`: from the file's name, whatever it is. No descriptor is kept, since a tree may have more files
    than a process may open; the header is checked again at every read.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.stage = self.path.name.removesuffix(".bin")
        fd = open_regular(self.path)
        try:
            self.layer, self.count = self._header(fd)
        finally:
            os.close(fd)
        self._check_folder()

    @property
    def place(self) -> Place:
        """Layer and stage as forward dumps have them, where `embedding` belongs to the whole model."""
        return (None, self.stage) if (self.layer, self.stage) == (0, "embedding") else (self.layer, self.stage)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Elements `[start:stop]` as a fresh flat float32 array; `InputError` when there are not that many."""
        stop = self.count if stop is None else stop
        if not 0 <= start <= stop <= self.count:
            raise InputError(f"{self.path}: has {self.count} elements, but elements {start}:{stop} are asked for")
        fd = open_regular(self.path)
        try:
            if self._header(fd) != (self.layer, self.count):
                raise InputError(f"{self.path}: changed while it was read")
            return self._values(fd, start, stop)
        finally:
            os.close(fd)

    def blocks(self, size: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """First index and values of each run of `size` elements (16 MiB when not given), in order."""
        size = size or _BLOCK
        for start in range(0, self.count, size):
            yield start, self.read(start, min(self.count, start + size))

    def _header(self, fd: int) -> tuple[int | None, int]:
        size = os.fstat(fd).st_size
        raw = os.pread(fd, HEADER_BYTES, 0)
        if raw[:4] != MAGIC[: len(raw)]:
            raise InputError(f"{self.path}: expected an APRT file, which begins with 'APRT', got {shown(raw[:4])}")
        if len(raw) < HEADER_BYTES:
            raise InputError(f"{self.path}: {size} bytes is too short for an APRT file; is it truncated?")
        _, layer, count = _HEADER.unpack(raw)
        expected = HEADER_BYTES + 4 * count
        if size != expected:
            hint = "is it truncated?" if size < expected else "what follows the values?"
            raise InputError(
                f"{self.path}: header announces {count} elements, {expected} bytes in all; the file has {size}; {hint}"
            )
        return (None if layer == WHOLE_MODEL else layer), count

    def _check_folder(self) -> None:
        folder = os.path.basename(os.path.dirname(os.path.abspath(self.path)))
        match = _LAYER_FOLDER.fullmatch(folder)
        if match and self.layer != int(match[1]):
            raise InputError(
                f"{self.path}: header says {layer_text(self.layer)}, its folder says {folder}; was the file moved?"
            )

    def _values(self, fd: int, start: int, stop: int) -> np.ndarray:
        out = np.empty(stop - start, _F32)
        view, offset = out.view(np.uint8).data, HEADER_BYTES + 4 * start
        while view.nbytes:
            got = os.preadv(fd, [view], offset)
            if got == 0:
                raise InputError(f"{self.path}: truncated while reading byte {offset}")
            view, offset = view[got:], offset + got
        return out


def layer_text(layer: int | None) -> str:
    return "the whole model" if layer is None else f"layer {layer}"


class AprtTree:
    """The stage files under a folder, every header checked; `InputError` naming the first bad one.

    `files`: layer and stage -> file, whole-model stages first, then layer by layer, by name. `embedding` is a
    whole-model stage here, as in forward dumps, though it lies in `layer-0/`. `extra`: paths, relative to the folder,
    of what is there but is no stage file.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise NotFoundError(f"{folder}: {'is not a folder' if self.folder.exists() else 'no such folder'}")
        found: dict[Place, AprtFile] = {}
        self.extra: list[str] = []
        for layer, path in self._scan():
            file = AprtFile(path)
            if file.layer != layer:
                raise InputError(f"{path}: header says {layer_text(file.layer)}, but the file is in no layer's folder")
            if file.place in found:
                raise InputError(f"{path}: '{file.stage}' is also in {found[file.place].path}; keep one of them")
            found[file.place] = file
        if not found:
            more = f"; it has {shown(self.extra[0])}" if self.extra else ""
            raise InputError(f"{folder}: no stage files, expected layer-<n>/<stage>.bin or <stage>.bin{more}")
        self.files = dict(
            sorted(found.items(), key=lambda item: (-1 if item[0][0] is None else item[0][0], item[0][1]))
        )

    def _scan(self) -> list[tuple[int | None, Path]]:
        """Layer by folder (None: the root) and path of each stage file; the rest goes to `extra`."""
        stages: list[tuple[int | None, Path]] = []
        for entry in _entries(self.folder):
            match = _LAYER_FOLDER.fullmatch(entry.name)
            if match and entry.is_dir() and int(match[1]) < WHOLE_MODEL:
                stages += self._sort_out(int(match[1]), _entries(Path(entry.path)))
            else:
                stages += self._sort_out(None, [entry])
        return stages

    def _sort_out(self, layer: int | None, entries: list[os.DirEntry[str]]) -> list[tuple[int | None, Path]]:
        stages = [e for e in entries if e.is_file() and _is_stage_file(e.name)]
        self.extra += [os.path.relpath(e.path, self.folder) for e in entries if e not in stages]
        return [(layer, Path(e.path)) for e in stages]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise NotFoundError(f"{folder}: cannot be read: {error.strerror}") from None


def _is_stage_file(name: str) -> bool:
    return name.endswith(".bin") and _STAGE.fullmatch(name.removesuffix(".bin")) is not None


def is_aprt(path: str | os.PathLike[str]) -> bool:
    """Whether the file at `path` begins as an APRT file does; it may still be refused."""
    try:
        if not Path(path).is_file():
            return False
        with open(path, "rb") as stream:
            return stream.read(4) == MAGIC
    except OSError:
        return False


def is_aprt_tree(folder: str | os.PathLike[str]) -> bool:
    """Whether some stage file of the folder begins as an APRT file does."""
    if not Path(folder).is_dir():
        return False
    layers = [e for e in _entries(Path(folder)) if e.is_dir() and _LAYER_FOLDER.fullmatch(e.name)]
    places = [Path(folder), *(Path(e.path) for e in layers)]
    return any(is_aprt(e.path) for place in places for e in _entries(place) if _is_stage_file(e.name))


def tree_of(file: AprtFile) -> Path:
    """The folder of the tree that a stage file lies in."""
    folder = Path(os.path.abspath(file.path)).parent
    return folder.parent if _LAYER_FOLDER.fullmatch(folder.name) else folder


def tree_path(layer: int | None, stage: str) -> tuple[int | None, Path]:
    """The layer that a stage's header says, and its path inside a tree.

    Whole-model stages go to the root, but `embedding` to `layer-0/`. `InputError` for a name that is no stage's: it
    never becomes a path.
    """
    if not _STAGE.fullmatch(stage):
        raise InputError(
            f"'{shown(stage)}': expected a stage's name, which becomes a file name, of the characters a-z _ +"
        )
    if layer is None and stage == "embedding":
        layer = 0
    if layer is None:
        return None, Path(f"{stage}.bin")
    if not 0 <= layer < WHOLE_MODEL:
        raise OutputError(
            f"'{shown(stage)}': layer {layer} does not fit, an APRT file has a layer from 0 to {WHOLE_MODEL - 1}"
        )
    return layer, Path(f"layer-{layer}") / f"{stage}.bin"


def write_tree(
    folder: str | os.PathLike[str], stages: Iterable[tuple[int | None, str, np.ndarray]]
) -> dict[Place, Path]:
    """Write (layer or None, stage, values) as a tree at `folder`, whole or not at all; returns each one's path.

    `folder` is new or empty. Values are row-major with the token axis first; of `lm_head`, only the last token is
    written. One array is held at a time. `OutputError` when `folder` cannot take it, `InputError` for a stage's name
    that cannot be a file's; after any failure, also of the iterator, `folder` is as it was.
    """
    if _LAYER_FOLDER.fullmatch(Path(os.path.abspath(folder)).name):
        raise OutputError(f"{folder}: a folder of this name is read as one layer, not as a tree; choose another name")
    made = not os.path.lexists(folder)
    target = prepare_folder(folder).resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    written: dict[Place, Path] = {}
    try:
        _make(temporary)
        for layer, stage, values in stages:
            header_layer, inside = tree_path(layer, stage)
            if inside in written.values():
                raise ValueError(f"{inside}: given twice")
            _write_stage(temporary / inside, header_layer, values[-1] if _is_logits(stage, values) else values)
            written[layer, stage] = inside
        _commit(temporary, target, written.values())
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if made:
            with suppress(OSError):  # the first error is the one to tell
                target.rmdir()
        raise
    return {place: target / inside for place, inside in written.items()}


def _is_logits(stage: str, values: np.ndarray) -> bool:
    """Whether the values are logits of all tokens; those of one token have one axis."""
    return stage == "lm_head" and values.ndim > 1


def _write_stage(path: Path, layer: int | None, values: np.ndarray) -> None:
    _check(path, layer, values)
    _make(path.parent)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _put(fd, layer, values)
        finally:
            os.close(fd)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None


def _make(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from None


def _commit(temporary: Path, target: Path, files: Collection[Path]) -> None:
    """Sync all files, then their folders, then take the place of `target`."""
    try:
        for path in files:
            _sync_file(temporary / path)
        for folder in {(temporary / path).parent for path in files} | {temporary}:
            fsync_folder(folder)
        os.rename(temporary, target)  # takes the place of an empty folder, and of nothing else
        fsync_folder(target.parent)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror}") from None


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
