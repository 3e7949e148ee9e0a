"""The original tool's summary of a tensor, whole or chunk by chunk."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from stages.spec.dtypes import stored_dtype
from stages.spec.values import Chunk

_BF16 = stored_dtype("bfloat16")


class Summary:
    """The summary of an array whose elements come in row-major order; `sum` is accumulated in float64."""

    def __init__(self, prefix: int):
        self._prefix = prefix
        self._first: list[float] = []
        self._hashes = {name: hashlib.sha256() for name in ("sha256", "sha256_as_bf16", "sha256_as_f32")}
        self._min, self._max, self._sum, self._size = np.inf, -np.inf, 0.0, 0

    def add(self, array: np.ndarray) -> None:
        wide = array.astype(np.float32)
        self._min = float(np.minimum(self._min, wide.min(initial=np.inf)))
        self._max = float(np.maximum(self._max, wide.max(initial=-np.inf)))
        self._sum += float(wide.sum(dtype=np.float64))
        self._size += array.size
        self._first += [float(x) for x in wide.reshape(-1)[: max(0, self._prefix - len(self._first))]]
        for name, same in (("sha256", array), ("sha256_as_bf16", wide.astype(_BF16)), ("sha256_as_f32", wide)):
            self._hashes[name].update(np.ascontiguousarray(same).reshape(-1).view(np.uint8).data)

    def result(self, dtype: str, shape: tuple[int, ...], device: str = "cpu") -> dict[str, Any]:
        """The fields of the summary; `device` is where the tensor was computed."""
        digests = {name: found.hexdigest() for name, found in self._hashes.items()}
        values = {"max": self._max, "min": self._min, "sum": self._sum, "prefix_f32": self._first}
        return {"device": device, "dtype": dtype, "shape": list(shape), "size": self._size, **values, **digests}


def summary(array: np.ndarray, prefix: int) -> dict[str, Any]:
    """The summary of a whole array, with its first `prefix` elements."""
    whole = Summary(prefix)
    whole.add(array)
    return whole.result(array.dtype.name, array.shape)


# Report field -> stage.
FINALS = {"final": "final_bf16", "final_f32_before_bf16": "final_f32"}


class FinalSummaries:
    """Summaries of a replay's final stages, whose chunks lie along `axis`; `turn` asks for them transposed, too."""

    def __init__(self, axis: int, *, turn: bool):
        self._axis, self._turn = axis, turn
        self._summaries = {stage: Summary(16) for stage in FINALS.values()}
        self._parts: dict[str, list[np.ndarray]] = {stage: [] for stage in FINALS.values()}
        self._shapes: dict[str, tuple[str, tuple[int, ...]]] = {}

    def add(self, chunk: Chunk) -> None:
        for stage in FINALS.values():
            array = chunk.values[stage]
            if self._axis or self._turn:
                self._parts[stage].append(array)
            if not self._axis:
                self._summaries[stage].add(array)
            rows = self._shapes[stage][1][self._axis] if stage in self._shapes else 0
            shape = list(array.shape)
            shape[self._axis] += rows
            self._shapes[stage] = array.dtype.name, tuple(shape)

    def results(self) -> dict[str, Any]:
        """Per report field the summary of its stage, in the replay's own orientation."""
        if self._axis:
            return {name: summary(self._whole(stage), 16) for name, stage in FINALS.items()}
        return {name: self._summaries[stage].result(*self._shapes[stage]) for name, stage in FINALS.items()}

    def turned(self) -> dict[str, Any]:
        """The same, in the orientation that the reference side reports on."""
        if not self._turn:
            return self.results()
        return {name: summary(self._whole(stage).T, 16) for name, stage in FINALS.items()}

    def _whole(self, stage: str) -> np.ndarray:
        return np.concatenate(self._parts[stage], axis=self._axis)
