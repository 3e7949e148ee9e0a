"""Qwen3: norms of the query and key heads; biases on q, k, v and o where `attention_bias` says so."""

from __future__ import annotations

import functools

from stages.spec.blocks import attention, decoder_layer, swiglu
from stages.spec.config import ModelConfig, RawConfig, parse_decoder, parse_window
from stages.spec.family import Family, windowed
from stages.spec.fields import flag
from stages.spec.stage import Block

# The default of transformers' Qwen3Config; it is not hidden_size / num_attention_heads.
HEAD_DIM = 128


def parse(raw: RawConfig, where: str) -> ModelConfig:
    """The checked meaning of a Qwen3's `config.json`."""
    bias = flag(raw, "attention_bias", where, default=False)
    window = parse_window(raw, where)
    return parse_decoder(raw, where, head_dim=HEAD_DIM, qk_norm=True, qkv_bias=bias, o_bias=bias, **window)


def _layer(window: int | None, *, bias: bool) -> Block:
    return decoder_layer(attention(qk_norm=True, qkv_bias=bias, o_bias=bias, window=window), swiglu())


def _kinds(config: ModelConfig) -> dict[str, Block]:
    return windowed(functools.partial(_layer, bias=config.qkv_bias))(config)


FAMILY = Family("qwen3", "Qwen3", parse, _kinds, widest=(_layer(None, bias=True),))
