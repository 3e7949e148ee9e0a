"""Mistral: no biases, no norms of heads; all layers slide where `sliding_window` is a number."""

from __future__ import annotations

from stages.errors import InputError
from stages.spec.blocks import attention, decoder_layer, swiglu
from stages.spec.config import FULL, SLIDING, ModelConfig, RawConfig, layer_count, parse_decoder
from stages.spec.family import Family, windowed
from stages.spec.fields import got, size
from stages.spec.stage import Block


def parse(raw: RawConfig, where: str) -> ModelConfig:
    """The checked meaning of a Mistral's `config.json`; a `head_dim` of null is hidden_size / num_attention_heads."""
    if "sliding_window" not in raw:  # transformers fills in 4096, other readers none
        raise InputError(f"{where}: sliding_window: absent; the computation depends on it, so state it, or null")
    window = None if raw["sliding_window"] is None else size(raw, "sliding_window", where)
    kind = FULL if window is None else SLIDING
    types = raw.get("layer_types")  # transformers does not read them
    if types is not None and types != [kind] * layer_count(raw, where):
        raise InputError(
            f"{where}: layer_types: expected {kind} in each place, as sliding_window says, got {got(types)}"
        )
    stated = {name: value for name, value in raw.items() if (name, value) != ("head_dim", None)}
    return parse_decoder(stated, where, window=window)


def _layer(window: int | None) -> Block:
    return decoder_layer(attention(window=window), swiglu())


FAMILY = Family("mistral", "Mistral", parse, windowed(_layer), widest=(_layer(None),))
