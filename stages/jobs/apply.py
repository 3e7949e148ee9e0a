"""A checkpoint with a bundle's adapted weights in it, written in Hugging Face layout: what `transformers` then loads.

The weights are those that `svf forward --adapted` runs on. `config.json` is written last: without it nothing loads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import UsageError
from stages.files.bundle import Bundle
from stages.files.checkpoint import CONFIG, INDEX, PICKLES, WEIGHTS, Checkpoint, open_checkpoint
from stages.files.folders import ensure_space, new_folder
from stages.files.jsonio import copy_atomic, read_object, write_all, write_atomic, write_json
from stages.files.tensorfile import TensorFile, TensorInfo, TensorWriter
from stages.progress import Progress
from stages.run.adapted import Adapted, adapt, final_stage
from stages.run.precision import precision_fields
from stages.run.production import with_stored_head
from stages.spec.backend import Backend, Weights
from stages.spec.config import EMBEDDING, LM_HEAD
from stages.spec.dtypes import stored_dtype

LAST = "last"  # of --tied
# Weights in other formats are the unadapted model's, so they are left out.
_WEIGHTS = (".safetensors", *PICKLES, ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True)
class ApplyCommand:
    """The parsed command; fields as in `svf apply --help`."""

    components: Path
    model: str
    out: Path
    tied: str
    dtype: str
    layout: str
    resume: bool = False


@dataclass(frozen=True)
class Tie:
    """Whether LM head and embedding are one parameter, in the source and in the result.

    `last`: of the two, the one whose adapted values both have, under `--tied last`; None otherwise.
    """

    source: bool
    result: bool
    last: str | None = None

    def reads(self, name: str) -> str:
        """The parameter whose values `name` is written from."""
        return self.last if self.last is not None and name in (EMBEDDING, LM_HEAD) else name

    @property
    def note(self) -> str | None:
        """What became of the tie, in words; None when there was none or nothing happened to it."""
        if self.source and not self.result:
            return (
                f"{EMBEDDING} and {LM_HEAD} were tied and are adapted apart: untied, {LM_HEAD} stored by itself and "
                "tie_word_embeddings false"
            )
        if self.last is not None:
            return f"{EMBEDDING} and {LM_HEAD} stay tied: both have the values of {self.last}, which was copied last"
        return None


def apply(command: ApplyCommand, load: Callable[[], Backend], progress: Progress) -> dict[str, Any]:
    """Write the adapted checkpoint to a new folder; the `svf.apply/1` document."""
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(command.model))
        checkpoint.check()
        if command.tied == LAST and not checkpoint.config.tie_word_embeddings:
            raise UsageError(f"--tied {LAST}: {command.model} is not tied, its LM head is a parameter of its own")
        dtype = stored_dtype(checkpoint.config.dtype if command.dtype == "model" else command.dtype)
        folder = stack.enter_context(new_folder(command.out, resume=command.resume))
        ensure_space(folder, _space(command.components, checkpoint, dtype))
        return _write(command, checkpoint, load(), dtype, folder, progress)


def _write(
    command: ApplyCommand, checkpoint: Checkpoint, backend: Backend, dtype: np.dtype, folder: Path, progress: Progress
) -> dict[str, Any]:
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".adapted-", dir=folder)))
        adapted = adapt(
            command.components,
            command.layout,
            checkpoint,
            backend,
            scratch,
            stack,
            progress,
            _unlike(checkpoint, dtype),
        )
        tie = _tie(command, checkpoint, adapted)
        if tie.note is not None:
            progress.say(tie.note)
        shards = plan(checkpoint, dtype, untied=tie.source and not tie.result)
        tensors = _write_shards(folder, shards, adapted.weights, tie, progress)
    copied, left_out = _copy_others(checkpoint, folder)
    _write_index(checkpoint, folder, shards)
    changes = _config_changes(checkpoint, tie, dtype)
    if changes:
        write_json(folder / CONFIG, {**checkpoint.raw_config, **changes})
    else:
        write_atomic(folder / CONFIG, lambda fd: write_all(fd, checkpoint.config_bytes))
    return {
        "schema": "svf.apply/1",
        "components": str(command.components),
        "model": command.model,
        "out": str(command.out),
        "backend": backend.name,
        **precision_fields(backend),
        "dtype": dtype.name,
        "stage": final_stage(dtype),
        "adapted": {name: {"layout": layout} for name, layout in adapted.layouts.items()},
        "tied": {"source": tie.source, "result": tie.result, "last": tie.last, "note": tie.note},
        "tensors": tensors,
        "config_changes": changes,
        "copied": copied,
        "left_out": left_out,
        "facts": backend.facts(),
    }


def _unlike(checkpoint: Checkpoint, dtype: np.dtype) -> np.dtype | None:
    """`dtype` where it is not the checkpoint's own."""
    return None if dtype == stored_dtype(checkpoint.config.dtype) else dtype


def _space(components: Path, checkpoint: Checkpoint, dtype: np.dtype) -> int:
    """Bytes on disk at most: every tensor in `dtype`, the adapted ones twice, for a while."""
    with Bundle(components) as bundle:
        apart = sum(int(np.prod(entry.shape, dtype=object)) for entry in bundle.entries)
    elements = sum(int(np.prod(info.shape, dtype=object)) for info in checkpoint.tensors.values())
    return (elements + 2 * apart) * dtype.itemsize


def _tie(command: ApplyCommand, checkpoint: Checkpoint, adapted: Adapted) -> Tie:
    if not checkpoint.config.tie_word_embeddings:
        return Tie(source=False, result=False)
    if command.tied == LAST:
        # The original copies in the manifest's order, which is the state dict's: the LM head comes last.
        copied = [name for name in adapted.layouts if name in (EMBEDDING, LM_HEAD)]
        return Tie(source=True, result=True, last=copied[-1] if copied else None)
    return Tie(source=True, result=with_stored_head(checkpoint.config, adapted.weights).tie_word_embeddings)


# -- weight files -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """One weight file to write: its path inside the folder, and its tensors in the order of their bytes."""

    path: str
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def plan(checkpoint: Checkpoint, dtype: np.dtype, *, untied: bool) -> list[Shard]:
    """The source's weight files, their tensors in `dtype`; an untied LM head comes last in the last one."""
    shards = []
    for file in checkpoint.files:
        ordered = sorted(file.tensors.values(), key=lambda info: (info.offset, info.nbytes))
        tensors = {info.name: TensorInfo(info.name, dtype, info.shape, 0) for info in ordered}
        shards.append(Shard(_inside(checkpoint, file), tensors, file.metadata))
    if untied and LM_HEAD not in checkpoint.tensors:
        head = TensorInfo(LM_HEAD, dtype, checkpoint.info(EMBEDDING).shape, 0)
        last = shards[-1]
        shards[-1] = Shard(last.path, {**last.tensors, LM_HEAD: head}, last.metadata)
    return shards


def _inside(checkpoint: Checkpoint, file: TensorFile) -> str:
    return file.path.relative_to(checkpoint.path).as_posix()


def _write_shards(
    folder: Path, shards: list[Shard], weights: Weights, tie: Tie, progress: Progress
) -> dict[str, dict[str, str]]:
    """Write every shard, a block of rows at a time; tensor -> file, dtype and sha256."""
    total, done = sum(info.nbytes for shard in shards for info in shard.tensors.values()), 0
    written: dict[str, dict[str, str]] = {}
    for shard in shards:
        path = folder / shard.path
        path.parent.mkdir(parents=True, exist_ok=True)
        specs = {name: (info.dtype, info.shape) for name, info in shard.tensors.items()}
        with TensorWriter(path, specs, hashes=True, metadata=shard.metadata, keep_order=True) as writer:
            for name, info in shard.tensors.items():
                for start, stop in info.row_blocks():
                    block = weights.read(tie.reads(name), start, stop).astype(info.dtype, copy=False)
                    writer.write(name, block, start)
                    done += block.nbytes
                    progress(f"writing {shard.path}", done / max(1, total))
            digests = writer.commit()
        for name, info in shard.tensors.items():
            written[name] = {"file": shard.path, "dtype": info.dtype.name, "sha256": digests[name]}
    return written


def _write_index(checkpoint: Checkpoint, folder: Path, shards: list[Shard]) -> None:
    """The index of a sharded checkpoint: its own bytes, unless tensors were added or changed their dtype."""
    if shards[0].path == WEIGHTS:
        return
    index = read_object(checkpoint.path / INDEX)
    infos = [info for shard in shards for info in shard.tensors.values()]
    changed = {name: shard.path for shard in shards for name in shard.tensors if name not in checkpoint.tensors}
    if not changed and all(info.dtype == checkpoint.tensors[info.name].dtype for info in infos):
        copy_atomic(checkpoint.path / INDEX, folder / INDEX)
        return
    sizes = {
        "total_size": sum(info.nbytes for info in infos),
        "total_parameters": sum(int(np.prod(info.shape, dtype=object)) for info in infos),
    }
    metadata = index.get("metadata")
    if isinstance(metadata, dict):
        index["metadata"] = {key: sizes.get(key, value) for key, value in metadata.items()}
    write_json(folder / INDEX, {**index, "weight_map": {**index["weight_map"], **changed}})


# -- everything else ----------------------------------------------------------------------------------------------


def _copy_others(checkpoint: Checkpoint, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Copy what is neither weights nor config; the names copied, and name -> why of what was left out."""
    used = {CONFIG, INDEX, *(_inside(checkpoint, file) for file in checkpoint.files)}
    copied: list[str] = []
    left_out: dict[str, str] = {}
    for source in sorted(checkpoint.path.iterdir()):
        if source.name in used:
            continue
        why = _why_not(source, checkpoint)
        if why is None:
            copy_atomic(source, folder / source.name)
            copied.append(source.name)
        else:
            left_out[source.name] = why
    return copied, left_out


def _why_not(source: Path, checkpoint: Checkpoint) -> str | None:
    """Why a file of a checkpoint is not copied; None when it is."""
    if source.name.endswith((*_WEIGHTS, *(f"{suffix}.index.json" for suffix in _WEIGHTS))):
        return "weights that were not adapted"
    if source.is_symlink() and not any(source.resolve().is_relative_to(root) for root in checkpoint.roots()):
        return "a link out of the folder"
    if source.is_dir():
        return "a folder"
    return None if source.is_file() else "not a regular file"


def _config_changes(checkpoint: Checkpoint, tie: Tie, dtype: np.dtype) -> dict[str, Any]:
    """The fields of `config.json` that are no longer true, as they are now."""
    changes: dict[str, Any] = {} if tie.source == tie.result else {"tie_word_embeddings": tie.result}
    if _unlike(checkpoint, dtype) is not None:
        stated = [field for field in ("dtype", "torch_dtype") if checkpoint.raw_config.get(field) is not None]
        changes |= dict.fromkeys(stated, dtype.name)
    return changes
