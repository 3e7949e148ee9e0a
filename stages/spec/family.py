"""What a family of models is: what its config means, and what a layer of each kind computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from stages.spec.blocks import EMBED, HEAD
from stages.spec.config import SLIDING, ModelConfig, RawConfig
from stages.spec.stage import Block


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
    kind_of: Callable[[ModelConfig, int], str] = lambda config, layer: config.layer_types[layer]
    before: Block = EMBED
    after: Block = HEAD


def windowed(layer: Callable[[int | None], Block]) -> Callable[[ModelConfig], dict[str, Block]]:
    """The kinds of a family whose layers may slide: `layer` of no window, and of the config's."""

    def kinds(config: ModelConfig) -> dict[str, Block]:
        return {kind: layer(window_of(config, kind)) for kind in dict.fromkeys(config.layer_types)}

    return kinds


def window_of(config: ModelConfig, kind: str) -> int | None:
    """The window of a kind of layer, as `layer_types` names it."""
    return config.sliding_window if kind == SLIDING else None
