"""`transformers`' own models: the production model of the torch side. Twin of svf_jax/production.py.

The classes are taken by family, never by what a checkpoint's folder names, and nothing in the folder is executed.
Weights come through the same reader as the traced path's, so adapted ones work too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from stages.files.memory import ALIGNMENT, aligned_copy
from stages.run.production import (
    check_names,
    checked_tokens,
    greedy,
    parameters_of,
    stacked_experts,
    with_stored_head,
)
from stages.spec.backend import Weights
from stages.spec.config import ModelConfig
from stages.spec.experts import MoeConfig


def _windows(config: ModelConfig) -> dict[str, Any]:
    """The sliding window as the Qwens' configs have it."""
    use = config.sliding_window is not None
    types = list(config.layer_types)
    return {"use_sliding_window": use, "sliding_window": config.sliding_window, "layer_types": types}


def _experts(config: ModelConfig) -> dict[str, Any]:
    """The experts as the Qwens' configs have them."""
    assert isinstance(config, MoeConfig)
    return {
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "shared_expert_intermediate_size": config.shared_intermediate_size,
        "norm_topk_prob": config.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, sparse in enumerate(config.sparse) if not sparse],
        **_windows(config),
    }


# Experts one after the other: a grouped product sums in another order.
_EAGER = {"experts_implementation": "eager"}
_GATE_UP = ".gate_up_proj"
# A family's config, its model, and what its config has beside the fields of all.
CLASSES: Mapping[str, tuple[Any, Any, Callable[[ModelConfig], dict[str, Any]]]] = MappingProxyType(
    {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM, lambda c: {"attention_bias": c.qkv_bias, **_windows(c)}),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM, _windows),
        "llama": (LlamaConfig, LlamaForCausalLM, lambda c: {"attention_bias": c.qkv_bias}),
        "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, lambda c: {"attention_bias": c.qkv_bias, **_experts(c)}),
        "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM, lambda c: {"qkv_bias": c.qkv_bias, **_experts(c)}),
        "mistral": (MistralConfig, MistralForCausalLM, lambda c: {"sliding_window": c.sliding_window}),
    }
)


def load_model(
    config: ModelConfig,
    weights: Weights,
    dtype: str = "model",
    device: str = "cpu",
    raw_config: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """`transformers`' model, eager attention, whose every parameter was read from `weights`, one tensor at a time.

    `dtype`: what weights are cast to and activations computed in, `model` for the config's. `raw_config`: the object
    in `config.json`; with it `transformers` reads the config by itself, and a misreading of ours shows. The model has
    an LM head of its own where the weights have one, whatever the config ties. `InputError` for a tensor that is
    missing, unexpected or of another shape: `transformers` itself would fill in a missing norm with ones.
    """
    config = with_stored_head(config, weights)
    made, kind = getattr(torch, config.dtype if dtype == "model" else dtype), CLASSES[config.family][1]
    settings = transformers_config(config, raw_config)
    with torch.device("meta"):
        model = kind._from_config(settings, dtype=made, attn_implementation="eager", **_EAGER)
    # Not in any checkpoint, so not on the meta device: the inverse frequencies, float32 in every model.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    check_names(config, [part for name, _ in model.named_parameters() for part in _unpacked(name)])
    state = dict(_packed((n, _put(a).to(device, made)) for n, a in stacked_experts(parameters_of(config, weights))))
    model.load_state_dict(state, strict=not config.tie_word_embeddings, assign=True)
    model.tie_weights()
    return model.to(device).eval().requires_grad_(False)


def _unpacked(name: str) -> list[str]:
    """A parameter of `transformers`' model by the names of `stacked_experts`."""
    if name.endswith(_GATE_UP):
        return [name.replace(_GATE_UP, f".{part}_proj.weight") for part in ("gate", "up")]
    return [f"{name}.weight"] if name.endswith(".experts.down_proj") else [name]


def _packed(parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Stacked experts as `transformers` packs them: rows of the gate, then of up."""
    gate: Tensor | None = None
    for name, tensor in parameters:
        if ".experts.gate_proj" in name:
            gate = tensor
        elif ".experts.up_proj" in name:
            assert gate is not None
            yield name.replace(".up_proj.weight", _GATE_UP), torch.cat((gate, tensor), dim=1)
        else:
            yield name.removesuffix(".weight") if ".experts." in name else name, tensor


def transformers_config(config: ModelConfig, raw_config: Mapping[str, Any] | None = None) -> Any:
    """`config` as `transformers` has it, or its own reading of `raw_config`; tied as `config` is."""
    c, (kind, _, own) = config, CLASSES[config.family]
    if raw_config is not None:
        return kind.from_dict({**raw_config, "tie_word_embeddings": c.tie_word_embeddings})
    return kind(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters=_rope_parameters(c),
        tie_word_embeddings=c.tie_word_embeddings,
        **own(c),
    )


def _rope_parameters(config: ModelConfig) -> dict[str, Any]:
    rope = {name: list(value) if isinstance(value, tuple) else value for name, value in config.rope.items()}
    if config.rope_type == "dynamic":  # its length is max_position_embeddings
        del rope["original_max_position_embeddings"]
    return {"rope_type": config.rope_type, "rope_theta": config.rope_theta, **rope}


class TorchProduction:
    """`transformers`' model in numpy terms; see `stages.run.production.Production`."""

    def __init__(self, model: PreTrainedModel, config: ModelConfig):
        self.model, self.config = model, config

    def __call__(self, tokens: Sequence[int] | np.ndarray, *, last_only: bool = False) -> np.ndarray:
        """Logits `[tokens, vocab]`, or the last token's, `[1, vocab]`, from one call of the model."""
        return self._run(checked_tokens(self.config, tokens), last_only)

    def reordered(self, tokens: Sequence[int] | np.ndarray, *, last_only: bool = False) -> np.ndarray:
        """The same model with `sdpa` attention, `transformers`' default: other orders of rounding."""
        try:
            self.model.set_attn_implementation("sdpa")
            return self._run(checked_tokens(self.config, tokens), last_only)
        finally:
            self.model.set_attn_implementation("eager")

    def generate(self, tokens: Sequence[int] | np.ndarray, n: int) -> list[int]:
        """The `n` greedy tokens that follow, each from a forward of all before it: there is no cache.

        `generation_config.json` has no say: nothing is sampled, and no token ends the sequence.
        """
        ids = checked_tokens(self.config, tokens)
        for _ in range(n):
            self.config.check_length(len(ids))
            ids = np.append(ids, np.int32(greedy(self._run(ids, last_only=True))))
        return [int(token) for token in ids[len(tokens) :]]

    def _forget_length(self) -> None:
        """Dynamic RoPE keeps the frequencies of the longest sequence so far: each of ours is the first one."""
        rotary = self.model.model.rotary_emb
        if rotary.rope_type == "dynamic":
            rotary.inv_freq, rotary.max_seq_len_cached = rotary.original_inv_freq, rotary.original_max_seq_len

    def _run(self, ids: np.ndarray, last_only: bool) -> np.ndarray:
        put = torch.from_numpy(ids.astype(np.int64))[None].to(self.model.device)
        self._forget_length()
        with torch.inference_mode():
            out = self.model(put, use_cache=False, logits_to_keep=1 if last_only else 0).logits[0]
        out = out.contiguous().cpu()
        return out.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if out.dtype == torch.bfloat16 else out.numpy()


def production(
    config: ModelConfig,
    weights: Weights,
    *,
    dtype: str = "model",
    device: str = "cpu",
    raw_config: Mapping[str, Any] | None = None,
) -> TorchProduction:
    """The production model of `config`, with all `weights` loaded."""
    return TorchProduction(load_model(config, weights, dtype, device, raw_config), config)


def _put(array: np.ndarray) -> Tensor:
    array = np.require(array, requirements=("C", "W"))
    if array.ctypes.data % ALIGNMENT:  # MKL's products depend on it, see stages/files/memory.py
        array = aligned_copy(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
