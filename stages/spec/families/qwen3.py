"""Qwen3: norms of the query and key heads; biases on q, k, v and o where `attention_bias` says so."""

from __future__ import annotations

from stages.spec.blocks import attention, decoder_layer, swiglu
from stages.spec.config import ModelConfig, RawConfig, parse_decoder, parse_window
from stages.spec.family import FULL, Family
from stages.spec.fields import flag
from stages.spec.stage import Block

# The default of transformers' Qwen3Config; it is not hidden_size / num_attention_heads.
HEAD_DIM = 128


def parse(raw: RawConfig, where: str) -> ModelConfig:
    """The checked meaning of a Qwen3's `config.json`."""
    bias, window = flag(raw, "attention_bias", where, default=False), parse_window(raw, where)
    return parse_decoder(raw, where, head_dim=HEAD_DIM, qk_norm=True, qkv_bias=bias, o_bias=bias, window=window)


def _layer(*, bias: bool) -> Block:
    return decoder_layer(attention(qk_norm=True, qkv_bias=bias, o_bias=bias), swiglu())


FAMILY = Family("qwen3", "Qwen3", parse, lambda c: {FULL: _layer(bias=c.qkv_bias)}, widest=(_layer(bias=True),))
