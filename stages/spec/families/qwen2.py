"""Qwen2 and Qwen2.5: biases on q, k and v, none on o, whatever the file's `attention_bias` says."""

from __future__ import annotations

from stages.spec.blocks import attention, decoder_layer, swiglu
from stages.spec.config import ModelConfig, RawConfig, parse_decoder, parse_window
from stages.spec.family import Family, windowed
from stages.spec.stage import Block


def parse(raw: RawConfig, where: str) -> ModelConfig:
    """The checked meaning of a Qwen2's `config.json`."""
    return parse_decoder(raw, where, qkv_bias=True, **parse_window(raw, where))


def _layer(window: int | None) -> Block:
    return decoder_layer(attention(qkv_bias=True, window=window), swiglu())


FAMILY = Family("qwen2", "Qwen2", parse, windowed(_layer), widest=(_layer(None),))
