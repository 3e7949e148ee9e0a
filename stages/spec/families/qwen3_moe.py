"""Qwen3-MoE: norms of the query and key heads, no expert that all tokens share; layers without experts are Qwen3's."""

from __future__ import annotations

from stages.spec.blocks import attention, decoder_layer, swiglu
from stages.spec.config import ModelConfig, RawConfig, parse_decoder, parse_window
from stages.spec.experts import MoeConfig, kind_of, mixture, parse_experts
from stages.spec.families import qwen3
from stages.spec.family import Family, window_of
from stages.spec.fields import flag
from stages.spec.stage import Block


def parse(raw: RawConfig, where: str) -> ModelConfig:
    """The checked meaning of a Qwen3-MoE's `config.json`."""
    bias = flag(raw, "attention_bias", where, default=False)
    window = parse_window(raw, where, lambda _layer, _first: True)  # max_window_layers is not read
    decoder = parse_decoder(raw, where, qk_norm=True, qkv_bias=bias, o_bias=bias, **window)
    return parse_experts(raw, where, decoder)


def _kinds(config: ModelConfig) -> dict[str, Block]:
    assert isinstance(config, MoeConfig)
    found: dict[str, Block] = {}
    for layer, types in enumerate(config.layer_types):
        attending = attention(
            qk_norm=True, qkv_bias=config.qkv_bias, o_bias=config.o_bias, window=window_of(config, types)
        )
        of_experts = mixture(experts=config.num_experts, renormalised=config.norm_topk_prob)
        found[kind_of(config, layer)] = decoder_layer(attending, of_experts if config.sparse[layer] else swiglu())
    return found


_WIDEST = decoder_layer(attention(qk_norm=True, qkv_bias=True, o_bias=True), mixture(experts=1, renormalised=True))
FAMILY = Family("qwen3_moe", "Qwen3-MoE", parse, _kinds, widest=(_WIDEST, *qwen3.FAMILY.widest), kind_of=kind_of)
