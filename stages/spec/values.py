"""What runs hand on: a tensor to replay, a chunk of its stages, a captured array."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.errors import InputError
from stages.spec.layouts import LAYOUTS
from stages.spec.stage import Stage


@dataclass(frozen=True)
class ReplayTask:
    """One tensor's operands. `u` and `source` give rows `[start:stop]`; float32 all."""

    source_name: str
    shape: tuple[int, int]
    u: Callable[[int, int], np.ndarray]
    s: np.ndarray
    v: np.ndarray
    offsets: np.ndarray
    source: Callable[[int, int], np.ndarray]
    layout: str
    transpose: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {"layout": self.layout, "transpose": self.transpose}

    def stage_shape(self, stage: Stage) -> tuple[int, ...]:
        """Shape of a stage's whole result."""
        sizes = {"rows": self.shape[0], "cols": self.shape[1], "rank": self.s.size, "one": 1}
        shape = tuple(sizes[axis] for axis in stage.shape.split())
        return shape[::-1] if self.row_axis(stage) == 1 else shape

    def row_axis(self, stage: Stage) -> int:
        """Axis of the result that the weight's rows lie on: 1 for transposed final stages, otherwise 0."""
        return int(self.transpose and stage.name.startswith("final_"))

    def check_layout(self) -> None:
        """`InputError` when V's shape does not fit the layout."""
        expected = LAYOUTS[self.layout].expected_shape(self.shape[1], self.s.size)
        if self.v.shape != expected:
            raise InputError(
                f"{self.source_name}: layout {self.layout} needs V {list(expected)}, the bundle has "
                f"{list(self.v.shape)}; try another --layout"
            )


@dataclass(frozen=True)
class Chunk:
    """Results of rows `[start:stop]`: stage -> array, and the parameter rows they came from.

    Stages without a row axis are in the first chunk's `values` alone, and in every chunk's `shared`.
    """

    start: int
    stop: int
    values: Mapping[str, np.ndarray]
    shared: Mapping[str, np.ndarray]
    params: Mapping[str, np.ndarray]

    def arguments(self, stage: Stage) -> tuple[np.ndarray, ...] | None:
        """Inputs and params of `stage` for these rows, in declared order; None when one was not recorded."""
        inputs = [self.values.get(name, self.shared.get(name)) for name in stage.inputs]
        found = [*inputs, *(self.params.get(name) for name in stage.params)]
        return None if any(array is None for array in found) else tuple(found)  # type: ignore[arg-type]


@dataclass(frozen=True)
class StageResult:
    """One captured array, in the stage's dtype; `layer` is None for stages of the whole model."""

    layer: int | None
    stage: str
    array: np.ndarray
