"""Weights adapted by the component replay, in the place of a checkpoint's own: what the forward runs on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.backend import Backend
from stages.bundle import Bundle
from stages.checkpoint import Checkpoint
from stages.errors import InputError
from stages.progress import Progress as Reporter
from stages.replay_run import Replayer, ReplayTask
from stages.tensorfile import TensorFile, TensorInfo, TensorWriter

Progress = Callable[[str, float], None]
ADAPTED_FILE = "adapted.safetensors"


class AdaptedWeights:
    """A checkpoint whose selected tensors are read from an adapted file; `read` and `info` as a `Checkpoint`'s."""

    def __init__(self, checkpoint: Checkpoint, file: TensorFile):
        self._checkpoint, self._file = checkpoint, file

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `[start:stop]` of parameter `name`, adapted where it was selected."""
        if name in self._file.tensors:
            return self._file.read(name, start, stop)
        return self._checkpoint.read(name, start, stop)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor that can be read, adapted ones in place of the checkpoint's."""
        return {**self._checkpoint.tensors, **self._file.tensors}


@dataclass(frozen=True)
class Adapted:
    """A bundle applied to a checkpoint: the weights, and of each adapted tensor, in the bundle's order, its layout
    and sha256."""

    weights: AdaptedWeights
    layouts: dict[str, str]
    sha256: dict[str, str]


def adapt(
    components: Path,
    layout: str,
    checkpoint: Checkpoint,
    backend: Backend,
    folder: Path,
    stack: ExitStack,
    progress: Reporter,
    dtype: np.dtype | None = None,
) -> Adapted:
    """`write_adapted` into `folder`, opened until `stack` ends; says which tensors do not fit `layout`."""
    path = folder / ADAPTED_FILE
    layouts, digests = write_adapted(components, layout, checkpoint, backend, path, progress, dtype)
    kept = [name for name, taken in layouts.items() if layout not in ("declared", taken)]
    if kept:
        progress.say(f"V of {', '.join(kept)} does not fit layout {layout} by shape: contracted as declared")
    file = TensorFile(path)
    stack.callback(file.close)
    return Adapted(AdaptedWeights(checkpoint, file), layouts, digests)


def write_adapted(
    components: Path,
    layout: str,
    checkpoint: Checkpoint,
    backend: Backend,
    path: Path,
    progress: Progress,
    dtype: np.dtype | None = None,
) -> tuple[dict[str, str], dict[str, str]]:
    """Replay every tensor of a bundle and store it at `path`, source-oriented, in `dtype` or the checkpoint's own.

    Returns tensor -> layout it was contracted under, and tensor -> sha256. A V whose shape does not fit `layout`
    is contracted as the bundle declares, since the wrong layout cannot be computed there; the caller says so.
    """
    with ExitStack() as stack:
        bundle = Bundle(components)
        stack.callback(bundle.close)
        tasks = [_task(bundle, i, layout, checkpoint) for i in range(len(bundle.entries))]
        specs = {task.source_name: (dtype or checkpoint.info(task.source_name).dtype, task.shape) for task in tasks}
        replayer = Replayer(backend)
        writer = stack.enter_context(TensorWriter(path, specs, hashes=True))
        for task in tasks:
            stored = specs[task.source_name][0]
            stage = final_stage(stored)
            for chunk in replayer.run(task):
                writer.write(task.source_name, chunk.values[stage].astype(stored, copy=False), chunk.start)
                progress(f"adapting {task.source_name}", chunk.stop / task.shape[0])
        digests = writer.commit()
        return {task.source_name: task.layout for task in tasks}, digests


def final_stage(dtype: np.dtype) -> str:
    """The stage that a weight of `dtype` is stored from; of any dtype but bfloat16 it is one rounding of final_f32."""
    return "final_bf16" if dtype.name == "bfloat16" else "final_f32"


def _task(bundle: Bundle, index: int, layout: str, checkpoint: Checkpoint) -> ReplayTask:
    entry = bundle.entries[index]
    name = checkpoint.resolve(entry.source_name)
    shape = checkpoint.info(name).shape
    if shape != entry.shape:
        raise InputError(
            f"{bundle.folder}: '{entry.source_name}' is {list(entry.shape)}, the model has {list(shape)}; "
            "are these components of another model?"
        )
    c = bundle.load(entry)

    def source(start: int, stop: int) -> np.ndarray:
        return checkpoint.read(name, start, stop).astype(np.float32)

    def task(chosen: str) -> ReplayTask:
        return ReplayTask(entry.source_name, entry.shape, c.u, c.s, c.v, c.offsets, source, chosen)

    asked = task(entry.layout if layout == "declared" else layout)
    try:
        asked.check_layout()
    except InputError:
        return task(entry.layout)
    return asked
