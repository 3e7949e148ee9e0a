"""Qwen2-MoE: biases on q, k and v, and an expert that all tokens share; layers without experts are Qwen2's."""

from __future__ import annotations

from stages.spec.blocks import attention, decoder_layer, swiglu
from stages.spec.config import ModelConfig, RawConfig, parse_decoder, parse_window
from stages.spec.experts import MoeConfig, kind_of, mixture, parse_experts
from stages.spec.families import qwen2
from stages.spec.family import Family, window_of
from stages.spec.fields import flag
from stages.spec.stage import Block


def parse(raw: RawConfig, where: str) -> ModelConfig:
    """The checked meaning of a Qwen2-MoE's `config.json`."""
    window = parse_window(raw, where, lambda layer, first: layer % 2 == 0 and layer < first)
    decoder = parse_decoder(raw, where, qkv_bias=flag(raw, "qkv_bias", where, default=True), **window)
    return parse_experts(raw, where, decoder, shared=True)


def _kinds(config: ModelConfig) -> dict[str, Block]:
    assert isinstance(config, MoeConfig)
    found: dict[str, Block] = {}
    for layer, types in enumerate(config.layer_types):
        attending = attention(qkv_bias=config.qkv_bias, window=window_of(config, types))
        of_experts = mixture(experts=config.num_experts, renormalised=config.norm_topk_prob, shared=True)
        found[kind_of(config, layer)] = decoder_layer(attending, of_experts if config.sparse[layer] else swiglu())
    return found


_WIDEST = decoder_layer(attention(qkv_bias=True), mixture(experts=1, renormalised=True, shared=True))
FAMILY = Family("qwen2_moe", "Qwen2-MoE", parse, _kinds, widest=(_WIDEST, *qwen2.FAMILY.widest), kind_of=kind_of)
