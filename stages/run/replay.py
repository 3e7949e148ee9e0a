"""Running the component replay on any backend, one chunk of rows at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from stages.errors import UsageError
from stages.run.watch import entering
from stages.spec.backend import Backend
from stages.spec.dtypes import stored_dtype
from stages.spec.replay import REPLAY
from stages.spec.stage import Stage
from stages.spec.values import Chunk, ReplayTask

# MKL sums products of 9 to 11 rows in another order than larger ones (docs/findings/row-chunks.md), so a
# chunk, the tail included, has at least this many rows.
MIN_CHUNK_ROWS = 16
# A chunk holds about this many bytes of stages: 4,681 rows of a 1,024-column embedding, 19 MB a stage. Above 32 MB an
# array's memory comes fresh from the system each time, and clearing its pages costs as much as the product.
CHUNK_BYTES = 128 * 1024 * 1024


def chunk_plan(rows: int, chunk_rows: int) -> list[tuple[int, int]]:
    """Row ranges of `chunk_rows`, the last one taking a tail that would be shorter than `MIN_CHUNK_ROWS`."""
    if chunk_rows < MIN_CHUNK_ROWS:
        raise UsageError(f"--chunk-rows {chunk_rows}: at least {MIN_CHUNK_ROWS}; shorter products sum in another order")
    plan = [(start, min(start + chunk_rows, rows)) for start in range(0, rows, chunk_rows)]
    if len(plan) > 1 and plan[-1][1] - plan[-1][0] < MIN_CHUNK_ROWS:
        plan[-2:] = [(plan[-2][0], rows)]
    return plan


def default_chunk_rows(shape: tuple[int, int], budget: int = CHUNK_BYTES) -> int:
    """Rows of a chunk whose stages fill `budget` bytes."""
    row_bytes = 4 * sum(shape[1] if "cols" in s.shape else min(shape) for s in REPLAY.values() if s.by_rows)
    return max(MIN_CHUNK_ROWS, budget // row_bytes)


class Replayer:
    """A backend's stages, each compiled once per options and reused over tensors and chunks."""

    def __init__(self, backend: Backend):
        self.backend = backend
        self._compiled: dict[tuple[str, tuple[tuple[str, Any], ...]], Callable[..., Any]] = {}

    def _function(self, stage: Stage, options: Mapping[str, Any]) -> Callable[..., Any]:
        chosen = tuple((name, options[name]) for name in stage.options)
        key = (stage.name, chosen)
        if key not in self._compiled:
            function = functools.partial(self.backend.replay[stage.name], **dict(chosen))
            self._compiled[key] = self.backend.compile(function)
        return self._compiled[key]

    def isolate(self, stage: Stage, arguments: Sequence[np.ndarray], options: Mapping[str, Any]) -> np.ndarray:
        """One stage of recorded inputs and parameters, in declared order."""
        put = [self.backend.put(array) for array in arguments]
        return self._checked(stage, self._function(stage, options)(*put))

    def run(self, task: ReplayTask, chunk_rows: int | None = None) -> Iterator[Chunk]:
        """Replay one tensor, propagated, in row chunks. Chunked and whole results are bit-identical."""
        task.check_layout()
        put = self.backend.put
        fixed = {"s": put(task.s), "v": put(task.v), "offsets": put(task.offsets)}
        shared: dict[str, Any] = {}
        shared_np: dict[str, np.ndarray] = {}
        for start, stop in chunk_plan(task.shape[0], chunk_rows or default_chunk_rows(task.shape)):
            rows = {"u": task.u(start, stop), "source": task.source(start, stop)}
            params = {**fixed, **{name: put(array) for name, array in rows.items()}}
            values: dict[str, Any] = {}
            results: dict[str, np.ndarray] = {}
            for stage in REPLAY.values():
                if not stage.by_rows and stage.name in shared:
                    continue
                where = values if stage.by_rows else shared
                inputs = [values.get(name, shared.get(name)) for name in stage.inputs]
                entering(f"{task.source_name} {stage.name}")
                out = self._function(stage, task.options)(*inputs, *(params[name] for name in stage.params))
                where[stage.name] = out
                results[stage.name] = self._checked(stage, out)
                if not stage.by_rows:
                    shared_np[stage.name] = results[stage.name]
            host = {"s": task.s, "v": task.v, "offsets": task.offsets, **rows}
            yield Chunk(start, stop, results, shared_np, host)

    def _checked(self, stage: Stage, out: Any) -> np.ndarray:
        array = self.backend.get(out)
        if array.dtype != stored_dtype(stage.dtype):
            raise TypeError(f"{self.backend.name}.{stage.name} gave {array.dtype}, declared {stage.dtype}")
        return array
