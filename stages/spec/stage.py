"""What a stage is: one named step of a computation, declared once; everything else derives from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from stages.spec.noise import Noise


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

    `shape` names the axes; an axis called `rows` may be computed in chunks, and one called `vocab` in chunks of
    the last parameter's rows. `options` are static keyword arguments (a layout, a target shape). `dtype` is what
    the stage stores, `model` meaning that of the activations. An `identity` stage is a copy of its one input, not
    computed; an `absent` one is a step that this family lacks. Of a `causal` stage, `.. queries keys`, the causal mask
    throws away what belongs to keys after their query: any value may stand there, and a decode computes none. In a
    layer with a sliding `window` each query sees that many keys, its own token's the last, and the rest is thrown away.
    `function` names what computes it, in every backend and in the oracle, where that is not the stage's own name.
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
    identity: bool = False
    absent: bool = False
    causal: bool = False
    window: int | None = None
    tolerance: Tolerance = Tolerance(0.0, 0.0)
    function: str = ""
    doc: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "function", self.function or self.name)

    @property
    def by_rows(self) -> bool:
        """Whether rows of the result depend on the same rows of the inputs alone."""
        return "rows" in self.shape.split()

    @property
    def by_vocab(self) -> bool:
        """Whether columns of the result depend on the same rows of the last parameter alone."""
        return "vocab" in self.shape.split()


Function = TypeVar("Function", bound=Callable[..., Any])


class Functions(dict[str, Function]):
    """Functions by name; as a decorator it adds one. What computes a stage has the name of its `function`."""

    def __call__(self, function: Function) -> Function:
        self[function.__name__] = function
        return function


@dataclass(frozen=True)
class Block:
    """Stages in execution order, and the parameters that they read: name -> axes, in the checkpoint's order."""

    stages: tuple[Stage, ...]
    params: Mapping[str, str]


@dataclass(frozen=True)
class Pipeline(Mapping[str, Stage]):
    """Stages in execution order, addressed by name; wrong wiring is an error at construction.

    `carried` are inputs that a layer has from the one before: name -> (the stage that layer 0 has it from, the
    stage of layer n - 1 that layer n has it from). `aliases` are other names of stages. `stages` holds the absent
    ones too; the mapping does not. `activations` is the dtype that activations are stored in. `layers` are the
    pipelines of a model's layers, each as its kind has them; the stages here are then those of all kinds.
    """

    name: str
    params: tuple[str, ...]
    stages: tuple[Stage, ...]
    carried: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    activations: str = "float32"
    layers: tuple[Pipeline, ...] = ()

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for stage in self.stages:
            if stage.name in seen:
                raise ValueError(f"{self.name}: stage '{stage.name}' is declared twice")
            if stage.absent:
                continue
            if stage.identity and (len(stage.inputs) != 1 or stage.params):
                raise ValueError(f"{self.name}.{stage.name}: an identity has one input and no parameters")
            for name in stage.inputs:
                first = self.carried.get(name, (name,))[0] if stage.scope is Scope.LAYER else name
                if first not in seen:
                    raise ValueError(f"{self.name}.{stage.name}: no earlier stage produces its input '{name}'")
            for name in stage.params:
                if name not in self.params:
                    raise ValueError(f"{self.name}.{stage.name}: '{name}' is not a parameter of this path")
            seen.add(stage.name)
        for name in [*(last for _, last in self.carried.values()), *self.aliases.values()]:
            if name not in seen:
                raise ValueError(f"{self.name}: no stage '{name}', which is carried on or has an alias")

    def __getitem__(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name and not stage.absent:
                return stage
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (stage.name for stage in self.stages if not stage.absent)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def of(self, layer: int | None) -> Pipeline:
        """The pipeline that a layer runs through; the whole for stages of the model, None."""
        return self if layer is None or not self.layers else self.layers[layer]

    def at(self, place: tuple[int | None, str]) -> Stage:
        """The stage of a layer and a name, which may be an alias; `KeyError` where that layer has none."""
        layer, name = place
        return self.of(layer)[self.aliases.get(name, name)]

    def of_model(self) -> tuple[list[Stage], list[Stage]]:
        """The stages of the whole model: those before the layers, and those after."""
        stages = list(self.values())
        first = next(i for i, stage in enumerate(stages) if stage.scope is Scope.LAYER)
        return stages[:first], [stage for stage in stages[first:] if stage.scope is Scope.MODEL]

    def of_layer(self, layer: int | None) -> list[Stage]:
        """The stages of a layer; of a layer of any kind, None."""
        return [stage for stage in self.of(layer).values() if stage.scope is Scope.LAYER]

    @property
    def absent(self) -> tuple[str, ...]:
        """Names of the steps that this family lacks."""
        return tuple(stage.name for stage in self.stages if stage.absent)
