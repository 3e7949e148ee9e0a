"""Qwen2 and Qwen2.5: biases on q, k and v, none on o, whatever the file's `attention_bias` says."""

from __future__ import annotations

from stages.spec.blocks import attention, decoder_layer, swiglu
from stages.spec.config import ModelConfig, RawConfig, parse_decoder, parse_window
from stages.spec.family import FULL, Family


def parse(raw: RawConfig, where: str) -> ModelConfig:
    """The checked meaning of a Qwen2's `config.json`."""
    return parse_decoder(raw, where, qkv_bias=True, window=parse_window(raw, where))


_LAYER = decoder_layer(attention(qkv_bias=True), swiglu())
FAMILY = Family("qwen2", "Qwen2", parse, lambda _: {FULL: _LAYER}, widest=(_LAYER,))
