"""The families, by the `model_type` of their configs."""

from __future__ import annotations

import math
from collections.abc import Mapping

from stages.spec.config import ModelConfig, RawConfig, refuse_unsupported
from stages.spec.families import llama, mistral, qwen2, qwen2_moe, qwen3, qwen3_moe
from stages.spec.family import Family
from stages.spec.fields import choice
from stages.spec.stage import Block

_MODULES = (qwen3, qwen2, llama, mistral, qwen3_moe, qwen2_moe)
FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in _MODULES}


def parse_config(raw: RawConfig, where: str) -> ModelConfig:
    """The checked meaning of `raw`, the object in a `config.json`, as its family reads it.

    `InputError`, naming `where` and the field, for one that cannot be obeyed.
    """
    refuse_unsupported(raw, where)
    return FAMILIES[choice(raw, "model_type", tuple(FAMILIES), where)].parse(raw, where)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's name and shape, in the order of `transformers`' `state_dict()`.

    Linear weights are `[out, in]`. `lm_head.weight` is always there and last, tied or not: the selection rule of
    SVF addresses it, though a tied checkpoint need not hold it.
    """
    family = FAMILIES[config.family]
    named = dict(family.before.params)
    for layer, block in enumerate(layer_blocks(config)):
        named |= {layer_param(layer, name): axes for name, axes in block.params.items()}
    named |= family.after.params
    return {name: shape_of(axes, config.sizes) for name, axes in named.items()}


def layer_blocks(config: ModelConfig) -> list[Block]:
    """What each layer of a model computes and reads, by its kind."""
    family = FAMILIES[config.family]
    kinds = family.kinds(config)
    return [kinds[family.kind_of(config, layer)] for layer in range(config.num_hidden_layers)]


def layer_param(layer: int, name: str) -> str:
    """The checkpoint's name of a layer's parameter."""
    return f"model.layers.{layer}.{name}"


def shape_of(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape that names of axes stand for; `a*b` is one axis of a times b."""
    return tuple(math.prod(sizes[name] for name in axis.split("*")) for axis in axes.split())
