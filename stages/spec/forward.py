"""The forward of a model: every intermediate from token ids to logits, put together of its family's blocks."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from stages.spec.config import ModelConfig
from stages.spec.families import FAMILIES, layer_param, shape_of
from stages.spec.noise import Noise
from stages.spec.stage import Pipeline, Scope, Stage

# Parameters that come with the run, not with the weights: token ids and their positions, int32.
RUN_PARAMS = ("tokens", "positions")
# What a layer has from the one before it.
CARRIED = MappingProxyType({"layer_input": ("embedding", "post_ffn_residual")})
ALIASES = MappingProxyType({"layer_output": "post_ffn_residual"})


def merged(sequences: Iterable[Iterable[Stage]], by: Callable[[Stage], str]) -> tuple[Stage, ...]:
    """Stages of several sequences in one order; of those that are one `by` that name, the first that is computed."""
    order: list[str] = []
    found: dict[str, Stage] = {}
    for sequence in sequences:
        place = 0
        for stage in sequence:
            name = by(stage)
            if name not in found:
                order.insert(place, name)
            place = order.index(name) + 1
            held = found.get(name, stage)
            found[name] = stage if held.absent or (held.identity and not stage.absent) else held
    return tuple(found[name] for name in order)


_BY_NAME, _BY_FUNCTION = operator.attrgetter("name"), operator.attrgetter("function")

_WIDEST = [
    (*family.before.stages, *layer.stages, *family.after.stages)
    for family in FAMILIES.values()
    for layer in family.widest
]
# Every stage that some model may have, for what is recorded of a model that nobody knows.
EVERY_STAGE: tuple[Stage, ...] = merged(_WIDEST, _BY_NAME)
ANY_MODEL = Pipeline(
    "any model", tuple({name: None for stage in EVERY_STAGE for name in stage.params}), EVERY_STAGE, CARRIED, ALIASES
)
# The declaration of every function that computes one.
DECLARED: Mapping[str, Stage] = MappingProxyType({s.function: s for s in merged(_WIDEST, _BY_FUNCTION)})
# Functions with a rounding to the activations' dtype inside: the cast before a norm's weight, the scores' before the
# scale, the two products of RoPE.
ROUNDED_INSIDE: frozenset[str] = frozenset(
    name for name, stage in DECLARED.items() if stage.noise in (Noise.RMS_NORM, Noise.SCORES, Noise.ROPE)
)


def forward_pipeline(config: ModelConfig, dtype: str = "model") -> Pipeline:
    """The pipeline of a model whose activations are computed in `dtype`, `model` for the config's."""
    family, activations = FAMILIES[config.family], config.dtype if dtype == "model" else dtype

    def resolved(stages: Iterable[Stage]) -> Pipeline:
        found = tuple(dataclasses.replace(s, dtype=activations) if s.dtype == "model" else s for s in stages)
        params = tuple(dict.fromkeys(name for stage in found for name in stage.params))
        return Pipeline(f"forward {config.family}", params, found, CARRIED, ALIASES, activations)

    kinds = {
        kind: resolved((*family.before.stages, *block.stages, *family.after.stages))
        for kind, block in family.kinds(config).items()
    }
    layers = tuple(kinds[family.kind_of(config, layer)] for layer in range(config.num_hidden_layers))
    return dataclasses.replace(resolved(merged((kind.stages for kind in kinds.values()), _BY_NAME)), layers=layers)


def stage_options(config: ModelConfig, stage: Stage) -> dict[str, Any]:
    """The static keyword arguments of one stage of a pipeline of `config`."""
    values = {**config.options, "dtype": stage.dtype, "window": stage.window}
    return {name: values[name] for name in stage.options}


def stage_shape(config: ModelConfig, stage: Stage, tokens: int) -> tuple[int, ...]:
    """The shape of a stage's whole result for a sequence of `tokens`."""
    return shape_of(stage.shape, {**config.sizes, **dict.fromkeys(("tokens", "queries", "keys"), tokens)})


def recorded_shape(
    config: ModelConfig, stage: Stage, tokens: int, positions: str = "all", *, joined: bool = True
) -> tuple[int, ...]:
    """The shape of a stage recorded at `positions`, all or the last; not `joined`: an axis `a*b` as two, a and b."""
    axes = (stage.shape if joined else stage.shape.replace("*", " ")).split()
    shape = stage_shape(config, dataclasses.replace(stage, shape=" ".join(axes)), tokens)
    last = positions == "last"
    return tuple(1 if last and axis in ("tokens", "queries") else n for axis, n in zip(axes, shape, strict=True))


def parameter_name(stage: Stage, param: str, layer: int | None) -> str:
    """The checkpoint's name of a stage's parameter in a layer."""
    return param if layer is None or stage.scope is Scope.MODEL else layer_param(layer, param)


def producers(path: Pipeline, stage: Stage, layer: int | None, layers: int) -> dict[str, tuple[int | None, str]]:
    """Where each input of a stage comes from: input name -> (layer, stage), layer None for the whole model's.

    What must have been recorded to run `stage` of `layer` in isolation, in a model of `layers` layers.
    """
    found: dict[str, tuple[int | None, str]] = {}
    for name in stage.inputs:
        source, at = name, layer
        if stage.scope is Scope.LAYER and name in path.carried:
            assert layer is not None
            first, last = path.carried[name]
            source, at = (first, None) if layer == 0 else (last, layer - 1)
        elif stage.scope is Scope.MODEL and path[name].scope is Scope.LAYER:
            at = layers - 1
        found[name] = (at if path.of(at)[source].scope is Scope.LAYER else None, source)
    return found
