"""Stage files in the form of the original tool's replaying side: one tensor a file, keys `stage.<name>`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.files.bundle import sample_stage_key
from stages.files.folders import ensure_space
from stages.files.tensorfile import TensorWriter
from stages.spec.dtypes import stored_dtype
from stages.spec.replay import REPLAY
from stages.spec.values import Chunk, ReplayTask


@dataclass(frozen=True)
class _File:
    """One file being written, and the task in the orientation that the file has."""

    task: ReplayTask
    writer: TensorWriter


class StageFiles:
    """Stage files of one layout of a replay, written chunk by chunk; nothing counts until `commit`.

    `files` are the file of each task; `sample` that of the sample's task, its final stages in the target's orientation.
    """

    def __init__(self, folder: Path, name: str, tasks: Sequence[ReplayTask], sample: ReplayTask | None):
        self.files = {task.source_name: folder / f"{name}_tensor_{i}.safetensors" for i, task in enumerate(tasks)}
        alike = sample is not None and any(
            (task.source_name, task.transpose) == (sample.source_name, sample.transpose) for task in tasks
        )
        self.sample: Path | None = None
        if sample is not None:
            self.sample = self.files[sample.source_name] if alike else folder / f"{name}.safetensors"
        own = [(self.files[task.source_name], task) for task in tasks]
        if sample is not None and self.sample is not None and not alike:
            own.append((self.sample, sample))
        self._files: list[_File] = []
        try:
            for path, task in own:
                self._files.append(_File(task, _writer(path, task)))
            ensure_space(folder, sum(file.writer.nbytes for file in self._files))
        except BaseException:
            self.__exit__()
            raise

    def add(self, task: ReplayTask, chunk: Chunk) -> None:
        """Write the stages of one chunk of `task`."""
        for file in self._files:
            if file.task.source_name != task.source_name:
                continue
            for name, array in chunk.values.items():
                stage = REPLAY[name]
                axis = file.task.row_axis(stage)
                turned = array.T if axis != task.row_axis(stage) else array
                file.writer.write(sample_stage_key(name), turned, chunk.start if stage.by_rows else 0, axis)

    def commit(self) -> None:
        for file in self._files:
            file.writer.commit()

    def __enter__(self) -> StageFiles:
        return self

    def __exit__(self, *_exc: Any) -> None:
        for file in self._files:
            file.writer.close()


def _writer(path: Path, task: ReplayTask) -> TensorWriter:
    specs = {sample_stage_key(s.name): (stored_dtype(s.dtype), task.stage_shape(s)) for s in REPLAY.values()}
    return TensorWriter(path, specs)
