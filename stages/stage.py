"""What a stage is: one named step of a computation, declared once; everything else derives from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from stages.noise import Noise


class Scope(StrEnum):
    """What a stage is computed for once: a weight tensor, a decoder layer, or the whole model."""

    TENSOR = "tensor"
    LAYER = "layer"
    MODEL = "model"


@dataclass(frozen=True)
class Tolerance:
    """Largest max-abs and mean-abs error that the original tool's gate allows; for that gate alone."""

    max_abs: float
    mean_abs: float


@dataclass(frozen=True)
class Stage:
    """One step: a pure function of earlier stages (`inputs`) and of weights (`params`).

    `shape` names the axes; an axis called `rows` may be computed in chunks. `options` are static keyword
    arguments (a layout, a target shape). `dtype` is what the stage stores, `model` meaning the checkpoint's.
    """

    name: str
    inputs: tuple[str, ...] = ()
    params: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    shape: str = ""
    dtype: str = "float32"
    noise: Noise = Noise.EXACT
    scope: Scope = Scope.TENSOR
    required: bool = True
    tolerance: Tolerance = Tolerance(0.0, 0.0)
    doc: str = ""

    @property
    def by_rows(self) -> bool:
        """Whether rows of the result depend on the same rows of the inputs alone."""
        return "rows" in self.shape.split()


@dataclass(frozen=True)
class Path(Mapping[str, Stage]):
    """Stages in execution order, addressed by name; wrong wiring is an error at construction."""

    name: str
    params: tuple[str, ...]
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for stage in self.stages:
            if stage.name in seen:
                raise ValueError(f"{self.name}: stage '{stage.name}' is declared twice")
            for name in stage.inputs:
                if name not in seen:
                    raise ValueError(f"{self.name}.{stage.name}: no earlier stage produces its input '{name}'")
            for name in stage.params:
                if name not in self.params:
                    raise ValueError(f"{self.name}.{stage.name}: '{name}' is not a parameter of this path")
            seen.add(stage.name)

    def __getitem__(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (stage.name for stage in self.stages)

    def __len__(self) -> int:
        return len(self.stages)
