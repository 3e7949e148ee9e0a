"""A checkpoint in Hugging Face layout, opened by its headers and read by tensor and row range.

Nothing in the folder is executed, and only `config.json`, `*.safetensors` and their index are opened; pickled
weights (`.bin`, `.pt`) never are, since unpickling runs code.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from stages.errors import InputError, NotFoundError, shown
from stages.files.gguf_file import is_gguf
from stages.files.jsonio import MAX_JSON_BYTES, parse_json, read_bytes, read_object
from stages.files.tensorfile import TensorFile, TensorInfo, sha256_by_rows
from stages.spec.config import DTYPES, EMBEDDING, LM_HEAD, ModelConfig
from stages.spec.dtypes import dtype_name
from stages.spec.families import parameter_shapes, parse_config

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# What is fetched from the hub: no pickles, no code, nothing in subfolders.
HUB_PATTERNS = (
    CONFIG,
    "generation_config.json",
    "model*.safetensors",
    INDEX,
    "tokenizer*.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
_PACKED = re.compile(r"(?P<before>.*\.mlp\.experts)\.(?P<which>gate_up|down)_proj", re.ASCII)
_NO_FOLDER = f"a file; name the folder that holds it and {CONFIG}"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Checkpoint:
    """An open checkpoint; close it, or use it as a context manager.

    `path`: its folder. `source`: what the user named. `revision`: the hub's commit, None for a local folder.
    `raw_config`: the object in `config.json`. `tensors`: name to dtype, shape and position, as the files have them.
    """

    def __init__(self, path: Path, source: str, revision: str | None):
        self.path, self.source, self.revision = path, source, revision
        self._config_bytes = read_bytes(path / CONFIG, MAX_JSON_BYTES)
        raw = parse_json(self._config_bytes, str(path / CONFIG))
        if not isinstance(raw, dict):
            raise InputError(f"{path / CONFIG}: expected a JSON object, got {type(raw).__name__}")
        self.raw_config: dict[str, Any] = raw
        self._files: list[TensorFile] = []
        try:
            self._holder = self._open_files()
        except BaseException:
            self.close()
            raise
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: file.tensors[name] for name, file in self._holder.items()}
        )

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @cached_property
    def config(self) -> ModelConfig:
        """The checked meaning of `config.json`; `InputError` naming what is refused."""
        return parse_config(self.raw_config, str(self.path / CONFIG))

    @property
    def config_bytes(self) -> bytes:
        """`config.json` as it was read."""
        return self._config_bytes

    @property
    def files(self) -> tuple[TensorFile, ...]:
        """The open weight files: one, or the shards by name."""
        return tuple(self._files)

    def resolve(self, name: str) -> str:
        """The stored tensor that parameter `name` has its values from.

        That is `name`, or the embedding for an LM head that is tied to it and not stored. `InputError`, with
        similar names that are there, for any other.
        """
        return name if name in self.tensors else held_by(name, self.tensors, self.config, self.path)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and position of the tensor that `name` resolves to."""
        return self.tensors[self.resolve(name)]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `[start:stop]` along axis 0 of the tensor that `name` resolves to, as a fresh array of its dtype."""
        stored = self.resolve(name)
        shape = self.tensors[stored].shape
        if shape and not 0 <= start <= (shape[0] if stop is None else stop) <= shape[0]:
            raise ValueError(f"{name}: rows {start}:{stop} of {shape[0]}")
        return self._holder[stored].read(stored, start, stop)

    def columns(self, name: str, start: int, stop: int) -> np.ndarray:
        """Columns `[start:stop]` of the matrix that `name` resolves to, gathered row by row."""
        stored = self.resolve(name)
        return self._holder[stored].read(stored, start, stop, axis=1)

    def check(self) -> None:
        """`InputError`, naming tensors, unless names, shapes and dtypes are what the config asks for.

        Headers suffice for that; only a tied checkpoint that stores an LM head as well is read, to see that it
        equals the embedding.
        """
        check_parameters(self.path, self.config, self.tensors, CONFIG)
        self._check_dtypes()
        if self.config.tie_word_embeddings and LM_HEAD in self.tensors:
            self._check_tied()

    def fingerprint(self) -> dict[str, str | int]:
        """What the checkpoint is, without reading its weights.

        `config_sha256`: of the bytes of `config.json`. `headers_sha256`: over every safetensors file in name order,
        its size and its header (names, dtypes, shapes, positions). `bytes`: the size of those files. Two
        fine-tunes of one model share this fingerprint; `weights_sha256` tells them apart.
        """
        headers, total = hashlib.sha256(), 0
        for file in sorted(self._files, key=lambda f: f.path.name):
            with file.path.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                start = stream.read(8)
                headers.update(size.to_bytes(8, "little") + start + stream.read(int.from_bytes(start, "little")))
            total += size
        config = hashlib.sha256(self._config_bytes).hexdigest()
        return {"config_sha256": config, "headers_sha256": headers.hexdigest(), "bytes": total}

    def weights_sha256(self, names: Iterable[str]) -> dict[str, str]:
        """sha256 over the raw bytes of each named tensor, read in blocks; names resolve as in `read`."""
        return {name: sha256_by_rows(self.info(name), functools.partial(self.read, name)) for name in names}

    def _check_dtypes(self) -> None:
        declared = self.config.dtype
        for name, info in self.tensors.items():
            if (stored := dtype_name(info.dtype)) not in DTYPES:
                raise InputError(f"{self.path}: '{shown(name)}' is {stored}, expected {' or '.join(DTYPES)}")
        others = [f"{n} is {t}" for n, i in self.tensors.items() if (t := dtype_name(i.dtype)) != declared]
        if others:
            what = "all tensors have another" if len(others) == len(self.tensors) else "mixed dtypes are not supported"
            raise InputError(f"{self.path}: config.json has dtype '{declared}', but {what}: {_listed(others)}")

    def _check_tied(self) -> None:
        for start, stop in self.info(EMBEDDING).row_blocks():
            head, embedding = (self.read(name, start, stop) for name in (LM_HEAD, EMBEDDING))
            same = head.view(np.uint8) == embedding.view(np.uint8)
            if not same.all():
                row = start + int(np.argmin(same.all(axis=1)))
                raise InputError(
                    f"{self.path}: tie_word_embeddings is true, but {LM_HEAD} differs from {EMBEDDING} from row {row} "
                    "on; which one is used would depend on the loader: set it to false, or drop one"
                )

    def _open_files(self) -> dict[str, TensorFile]:
        """The file that holds each tensor, in the files' order. As in transformers, one file wins over an index."""
        if (self.path / WEIGHTS).exists():
            return dict.fromkeys((file := self._open(self.path / WEIGHTS)).tensors, file)
        if (self.path / INDEX).exists():
            return self._open_shards(self.path / INDEX)
        raise self._no_weights()

    def _open(self, path: Path) -> TensorFile:
        self._files.append(file := TensorFile(path))
        file.tensors = {part.name: part for info in file.tensors.values() for part in _experts_of(info)}
        return file

    def _open_shards(self, index: Path) -> dict[str, TensorFile]:
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise InputError(f"{index}: weight_map: expected an object of tensor names and file names")
        if not weight_map:
            raise InputError(f"{index}: weight_map: is empty, so the checkpoint has no tensors")
        holder: dict[str, TensorFile] = {}
        for shard in sorted(set(weight_map.values())):
            file = self._open(self._shard_path(index, shard))
            mapped = {name for name, place in weight_map.items() if place == shard}
            for name in [*file.tensors, *sorted(mapped)]:
                if name not in mapped:
                    said = f"says '{shown(weight_map[name])}'" if name in weight_map else "does not list it"
                    raise InputError(f"{index}: '{shown(name)}' is in {file.path.name}, but weight_map {said}")
                if name not in file.tensors:
                    raise InputError(
                        f"{index}: weight_map says that {file.path.name} has '{shown(name)}', but the file does "
                        "not have it"
                    )
            holder.update(dict.fromkeys(file.tensors, file))
        return holder

    def _shard_path(self, index: Path, shard: str) -> Path:
        """The file of a shard; `InputError` when its name leads out of the folder."""
        parts = re.split(r"[/\\]", shard)  # an absolute path has an empty first part, or a drive
        if ".." in parts or "" in parts or "\0" in shard or ":" in parts[0]:
            raise InputError(f"{index}: weight_map names '{shown(shard)}', which is not a file inside the folder")
        path = self.path / shard
        if not path.is_file():
            if self.revision is not None:
                raise NotFoundError(f"{path}: is not in the hub's cache; run: {_fetch_command(self.source)}")
            state = "is not a regular file" if path.exists() else "is not there; is the download complete?"
            raise InputError(f"{index}: weight_map names '{shown(shard)}', which {state}")
        if not any(path.resolve().is_relative_to(root) for root in self.roots()):
            raise InputError(
                f"{index}: '{shown(shard)}' is a link to {path.resolve()}, outside the folder; copy the file into it"
            )
        return path

    def roots(self) -> list[Path]:
        """Folders that a shard may lie in; in the hub's cache a snapshot is links into `blobs` beside it."""
        folder = self.path.resolve()
        snapshot = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
        return [folder, folder.parent.parent / "blobs"] if snapshot else [folder]

    def _no_weights(self) -> InputError | NotFoundError:
        names = sorted(os.listdir(self.path))
        pickles = [name for name in names if name.endswith(PICKLES)]
        if pickles:
            return InputError(
                f"{self.path}: has only pickled weights ({_listed(pickles)}), which are never opened because "
                "unpickling runs code; "
                "convert them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            )
        if self.revision is not None:
            return NotFoundError(
                f"{self.source}: no {WEIGHTS} or {INDEX} in {self.path}; if the hub has one, "
                f"run: {_fetch_command(self.source)}"
            )
        there = f"; the folder has {_listed(names)}" if names else "; the folder is empty"
        return NotFoundError(f"{self.path}: no {WEIGHTS} or {INDEX}{there}")


def held_by(name: str, tensors: Mapping[str, TensorInfo], config: ModelConfig, path: Path) -> str:
    """The one of `tensors`, those of the model at `path`, that has the values of parameter `name`, which is not stored.

    That is the embedding for an LM head that is tied to it. `InputError`, with similar names, for any other.
    """
    if name == LM_HEAD and EMBEDDING in tensors and config.tie_word_embeddings:
        return EMBEDDING
    similar = difflib.get_close_matches(name, tensors, n=3)
    hint = f"; did you mean {' or '.join(shown(s) for s in similar)}?" if similar else ""
    raise InputError(f"{path}: no tensor '{shown(name)}' among its {len(tensors)}{hint}")


def check_parameters(path: Path, config: ModelConfig, tensors: Mapping[str, TensorInfo], asks: str) -> None:
    """`InputError`, naming tensors of the model at `path`, unless their names and shapes are those of the parameters
    that `asks`, which holds the config, asks for."""
    wanted, tied = parameter_shapes(config), config.tie_word_embeddings
    missing = [name for name in wanted if name not in tensors and not (tied and name == LM_HEAD)]
    unexpected = [name for name in tensors if name not in wanted]
    if missing:
        also = f"; there but unexpected: {_listed(unexpected)}" if unexpected else ""
        raise InputError(f"{path}: missing tensors: {_listed(missing)}{also}")
    if unexpected:
        raise InputError(
            f"{path}: unexpected tensors: {_listed(unexpected)}; {config.family} with this {asks.removeprefix('its ')} "
            "has no such parameters"
        )
    wrong = [
        f"{name} is {list(info.shape)}, {asks} asks for {list(wanted[name])}"
        for name, info in tensors.items()
        if info.shape != wanted[name]
    ]
    if wrong:
        raise InputError(f"{path}: wrong shapes: {_listed(wrong)}")


def _experts_of(info: TensorInfo) -> Iterator[TensorInfo]:
    """Experts packed in one tensor as the tensors of each, by their published names; any other as it is.

    `gate_up_proj` is `[experts, gate rows then up rows, hidden]`, `down_proj` `[experts, hidden, intermediate]`.
    """
    match = _PACKED.fullmatch(info.name)
    parts = {"gate_up": ("gate", "up"), "down": ("down",)}[match["which"]] if match else ()
    if match is None or len(info.shape) != 3 or info.shape[1] % len(parts) or 0 in info.shape:
        yield info
        return
    experts, rows, columns = info.shape[0], info.shape[1] // len(parts), info.shape[2]
    size = rows * columns * info.dtype.itemsize
    for number in range(experts * len(parts)):
        expert, part = divmod(number, len(parts))
        name = f"{match['before']}.{expert}.{parts[part]}_proj.weight"
        yield TensorInfo(name, info.dtype, (rows, columns), info.offset + number * size)


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Open a local folder, or a hub model `org/name[@revision]`, which is fetched unless `HF_HUB_OFFLINE` is set.

    For what the user named; a name that a file records goes to `open_recorded`. A folder that exists wins over a hub
    model of that name. Reads `config.json` and the headers only, and checks neither against the other: see
    `Checkpoint.check`. `NotFoundError` when something is not there or the hub is out of reach, `InputError` when it is
    malformed.
    """
    return _open(source, fetch=True)


def open_recorded(source: str) -> Checkpoint:
    """Open the model that a file names: a folder, or what was fetched before. A file's word reaches no network."""
    return _open(source, fetch=False)


def _open(source: str | os.PathLike[str], *, fetch: bool) -> Checkpoint:
    text = os.fspath(source)
    path = Path(text)
    try:
        if text and path.is_dir():
            return Checkpoint(path, text, None)
        if text and path.exists():
            what = "a GGUF file, and a Hugging Face folder is needed here" if is_gguf(path) else _NO_FOLDER
            raise InputError(f"{text}: is {what}")
    except OSError as error:
        raise NotFoundError(f"{shown(text)}: cannot be read: {error.strerror}") from None
    match = _HUB_ID.fullmatch(text) if isinstance(source, str) and ".." not in text else None
    if match is None:
        raise NotFoundError(f"{shown(text)}: no such folder, and not a hub model, which is written org/name[@revision]")
    snapshot = _fetch(text, match["id"], match["revision"], fetch=fetch)
    if not (snapshot / CONFIG).is_file():
        raise NotFoundError(f"{text}: no {CONFIG} in {snapshot}; if the hub has one, run: {_fetch_command(text)}")
    return Checkpoint(snapshot, text, snapshot.name)


def _fetch(source: str, model: str, revision: str | None, *, fetch: bool) -> Path:
    import huggingface_hub

    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model,
                revision=revision,
                allow_patterns=list(HUB_PATTERNS),
                ignore_patterns=["*/*"],
                local_files_only=offline or not fetch,
            )
        )
    except Exception as error:  # the client raises its own, the HTTP library's and the system's; all mean: not here
        state = "is not in the cache, and HF_HUB_OFFLINE is set" if offline else f"cannot be fetched ({_reason(error)})"
        raise NotFoundError(
            f"{source}: no such folder, and the hub model {state}; run this where the hub can be reached: "
            f"{_fetch_command(source)}"
        ) from None


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shown(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__, 160)


def _fetch_command(source: str) -> str:
    model, _, revision = source.partition("@")
    return f"hf download {model}" + (f" --revision {revision}" if revision else "")


def _listed(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown(name) for name in names[:most]) + more
