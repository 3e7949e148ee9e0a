"""Llama: no norms of heads; biases on q, k, v and o where `attention_bias` says so."""

from __future__ import annotations

from stages.errors import InputError
from stages.spec.blocks import attention, decoder_layer, swiglu
from stages.spec.config import FULL, ModelConfig, RawConfig, parse_decoder
from stages.spec.family import Family
from stages.spec.fields import flag, size
from stages.spec.stage import Block


def parse(raw: RawConfig, where: str) -> ModelConfig:
    """The checked meaning of a Llama's `config.json`; a `head_dim` of null is hidden_size / num_attention_heads."""
    if flag(raw, "mlp_bias", where, default=False):
        raise InputError(f"{where}: mlp_bias: true asks for biases in the feed-forward, which are not supported")
    hidden, heads = size(raw, "hidden_size", where), size(raw, "num_attention_heads", where)
    if hidden % heads:  # transformers' LlamaConfig refuses it too, whatever head_dim is
        raise InputError(f"{where}: num_attention_heads: {heads} does not divide hidden_size {hidden}")
    bias = flag(raw, "attention_bias", where, default=False)
    stated = {name: value for name, value in raw.items() if (name, value) != ("head_dim", None)}
    return parse_decoder(stated, where, qkv_bias=bias, o_bias=bias)


def _layer(*, bias: bool) -> Block:
    return decoder_layer(attention(qkv_bias=bias, o_bias=bias), swiglu())


FAMILY = Family("llama", "Llama", parse, lambda c: {FULL: _layer(bias=c.qkv_bias)}, widest=(_layer(bias=True),))
