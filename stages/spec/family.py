"""What a family of models is: what its config means, and what a layer of each kind computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from stages.spec.blocks import EMBED, HEAD
from stages.spec.config import ModelConfig, RawConfig
from stages.spec.stage import Block

# The kind of a layer whose every query sees all keys before it, as `layer_types` in a config names it.
FULL = "full_attention"


@dataclass(frozen=True)
class Family:
    """A family, declared in a module of stages/spec/families/.

    `parse(raw, where)` gives the checked meaning of a `config.json`. `kinds(config)`: kind of layer -> what a layer of
    that kind computes and reads; `kind_of(config, layer)`: which one it is. `widest`: layers with every step that some
    model of the family has.
    """

    name: str  # `model_type` in a config
    title: str  # in a text
    parse: Callable[[RawConfig, str], ModelConfig]
    kinds: Callable[[ModelConfig], Mapping[str, Block]]
    widest: tuple[Block, ...]
    kind_of: Callable[[ModelConfig, int], str] = lambda _config, _layer: FULL
    before: Block = EMBED
    after: Block = HEAD
