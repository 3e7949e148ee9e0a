"""Mixtures of experts: the router, the experts that it chooses, and the expert that all tokens share.

Semantics as `transformers` 5 has them with `experts_implementation="eager"`: models/{qwen3,qwen2}_moe/modeling_*.py.
An expert's weights go by the names of published checkpoints, `mlp.experts.3.gate_proj.weight`; a stage reads those of
the chosen experts, `mlp.experts.*.gate_proj.weight`, stacked in ascending order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from stages.errors import InputError
from stages.spec.blocks import layer_stage, swiglu
from stages.spec.config import ModelConfig, RawConfig
from stages.spec.fields import flag, got, size
from stages.spec.noise import Noise
from stages.spec.stage import Block, Stage

# The stage that says which experts a token is sent to, int32 `[tokens, topk]`.
CHOSEN = "router_topk"
# What stands for the number of an expert in a stage's parameter: those of the chosen ones, ascending.
EACH = ".*."
_GATE_UP = tuple(f"mlp.experts{EACH}{name}_proj.weight" for name in ("gate", "up"))
_DOWN = f"mlp.experts{EACH}down_proj.weight"


@dataclass(frozen=True)
class MoeConfig(ModelConfig):
    """A config with experts. `sparse`: which layers have them; `shared_intermediate_size`: 0 without a shared expert.

    `norm_topk_prob`: whether the chosen experts' probabilities are divided by their sum.
    """

    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_intermediate_size: int = 0
    norm_topk_prob: bool = False
    sparse: tuple[bool, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        return {
            **super().sizes,
            "experts": self.num_experts,
            "topk": self.num_experts_per_tok,
            "moe_intermediate": self.moe_intermediate_size,
            "shared_intermediate": self.shared_intermediate_size,
            "one": 1,
        }

    @property
    def options(self) -> dict[str, Any]:
        return {**super().options, "top_k": self.num_experts_per_tok, "renormalised": self.norm_topk_prob}


def parse_experts(raw: RawConfig, where: str, decoder: ModelConfig, *, shared: bool = False) -> MoeConfig:
    """`decoder` with the experts' fields; `InputError`, naming the field, for one that is missing or contradicts."""
    name = "num_local_experts" if "num_experts" not in raw and "num_local_experts" in raw else "num_experts"
    experts, top = size(raw, name, where), size(raw, "num_experts_per_tok", where)
    if (other := raw.get("num_local_experts", experts)) != experts:
        raise InputError(f"{where}: num_local_experts: {got(other)} contradicts num_experts {experts}")
    if top > experts:
        raise InputError(f"{where}: num_experts_per_tok: {top} of num_experts {experts}")
    return MoeConfig(
        **{field.name: getattr(decoder, field.name) for field in fields(ModelConfig)},
        num_experts=experts,
        num_experts_per_tok=top,
        moe_intermediate_size=size(raw, "moe_intermediate_size", where),
        shared_intermediate_size=size(raw, "shared_expert_intermediate_size", where) if shared else 0,
        norm_topk_prob=flag(raw, "norm_topk_prob", where, default=False),
        sparse=_sparse(raw, where, decoder.num_hidden_layers),
    )


def _sparse(raw: RawConfig, where: str, layers: int) -> tuple[bool, ...]:
    """Each `decoder_sparse_step`-th layer has experts, but for `mlp_only_layers`."""
    step = size(raw, "decoder_sparse_step", where) if "decoder_sparse_step" in raw else 1
    dense = raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in dense):
        raise InputError(f"{where}: mlp_only_layers: expected a list of layers, got {got(dense)}")
    return tuple((layer + 1) % step == 0 and layer not in dense for layer in range(layers))


def kind_of(config: ModelConfig, layer: int) -> str:
    """The kind of a layer: how it attends, and whether it has experts."""
    assert isinstance(config, MoeConfig)
    return config.layer_types[layer] + (", experts" if config.sparse[layer] else "")


def is_each(param: str) -> bool:
    """Whether a stage's parameter is that of each chosen expert."""
    return EACH in param


def reads(stage: Stage, name: str) -> bool:
    """Whether a stage reads a parameter, of one expert too."""
    before_after = (param.split(EACH) for param in stage.params if is_each(param))
    of_one = any(name.startswith(before) and name.endswith(after) for before, after in before_after)
    return name in stage.params or of_one


def of_expert(param: str, expert: int) -> str:
    """The checkpoint's name of a stage's parameter for one expert."""
    return param.replace(EACH, f".{expert}.")


def chosen_experts(topk: np.ndarray) -> list[int]:
    """The experts that some token is sent to, ascending."""
    return [int(expert) for expert in np.unique(topk)]


def mixture(*, experts: int, renormalised: bool, shared: bool = False) -> Block:
    """A feed-forward of experts, from its norm to its residual."""
    up, down = "moe_intermediate hidden", "hidden moe_intermediate"
    params: dict[str, str] = {"mlp.gate.weight": "experts hidden"}
    for expert in range(experts):
        params |= {of_expert(name, expert): up for name in _GATE_UP} | {of_expert(_DOWN, expert): down}
    if shared:
        up, down = "shared_intermediate hidden", "hidden shared_intermediate"
        params |= {f"mlp.shared_expert.{name}_proj.weight": up for name in ("gate", "up")}
        params |= {"mlp.shared_expert.down_proj.weight": down, "mlp.shared_expert_gate.weight": "one hidden"}
    dense = {stage.name: stage for stage in swiglu().stages}
    return Block(tuple(_stages(dense, renormalised=renormalised, shared=shared)), params)


def _stages(dense: Mapping[str, Stage], *, renormalised: bool, shared: bool) -> Iterator[Stage]:
    hidden, each = "tokens hidden", "tokens topk moe_intermediate"
    yield dense["ffn_norm"]
    doc = "The router's logits, in the activations' dtype"
    fields: dict[str, Any] = {"params": ("mlp.gate.weight",), "function": "moe_logits"}  # another one is TRINITY's
    yield layer_stage("router_logits", "ffn_norm", "tokens experts", Noise.PRODUCT, doc, **fields)
    doc = "Softmax of router_logits over all experts, in float32"
    yield layer_stage("router_probs", "router_logits", "tokens experts", Noise.DISTRIBUTION, doc, dtype="float32")
    doc = "The experts with the largest router_probs, the largest first; of equal ones any"
    yield layer_stage(CHOSEN, "router_probs", "tokens topk", Noise.CHOICE, doc, options=("top_k",), dtype="int32")
    doc = "The chosen experts' router_probs" + (", divided by their sum in float32" if renormalised else "")
    options = ("renormalised", "dtype")
    doc += ", cast to the activations' dtype"
    yield layer_stage("router_weights", f"router_probs {CHOSEN}", "tokens topk", Noise.SHARES, doc, options=options)
    for name in ("gate", "up"):  # in one product, as production has them: hence both weights
        doc = f"{name}_proj of ffn_norm by each chosen expert"
        yield layer_stage(f"expert_{name}", f"ffn_norm {CHOSEN}", each, Noise.EXPERTS, doc, params=_GATE_UP)
    yield layer_stage("expert_silu", "expert_gate", each, Noise.SILU, "expert_gate * sigmoid(expert_gate)")
    yield layer_stage("expert_swigl", "expert_silu expert_up", each, Noise.EXACT, "expert_silu * expert_up")
    doc, inputs = "down_proj of expert_swigl by each chosen expert", f"expert_swigl {CHOSEN}"
    yield layer_stage("expert_out", inputs, "tokens topk hidden", Noise.EXPERTS, doc, params=(_DOWN,))
    doc = "The sum of expert_out times router_weights"
    yield layer_stage("moe_out", f"expert_out {CHOSEN} router_weights", hidden, Noise.COMBINED, doc)
    yield from _shared() if shared else _no_shared()
    yield dense["post_ffn_residual"]


def _shared() -> Iterator[Stage]:
    wide, hidden, of = "tokens shared_intermediate", "tokens hidden", "mlp.shared_expert"
    for name in ("gate", "up"):
        doc, weight = f"The shared expert's {name}_proj of ffn_norm", (f"{of}.{name}_proj.weight",)
        yield layer_stage(f"shared_{name}", "ffn_norm", wide, Noise.PRODUCT, doc, params=weight)
    yield layer_stage("shared_silu", "shared_gate", wide, Noise.SILU, "shared_gate * sigmoid(shared_gate)")
    yield layer_stage("shared_swigl", "shared_silu shared_up", wide, Noise.EXACT, "shared_silu * shared_up")
    doc, weight = "The shared expert's down_proj of shared_swigl", (f"{of}.down_proj.weight",)
    yield layer_stage("shared_out", "shared_swigl", hidden, Noise.PRODUCT, doc, params=weight)
    doc, weight = "How much of the shared expert a token gets, before the sigmoid", (f"{of}_gate.weight",)
    yield layer_stage("shared_score", "ffn_norm", "tokens one", Noise.PRODUCT, doc, params=weight)
    doc = "sigmoid(shared_score)"
    yield layer_stage("shared_weight", "shared_score", "tokens one", Noise.SIGMOID, doc)
    doc = "shared_weight * shared_out"
    yield layer_stage("shared_gated", "shared_weight shared_out", hidden, Noise.EXACT, doc)
    doc = "moe_out + shared_gated"
    yield layer_stage("ffn_out", "moe_out shared_gated", hidden, Noise.EXACT, doc, function="moe_and_shared")


def _no_shared() -> Iterator[Stage]:
    doc = "moe_out: no expert is shared"
    yield layer_stage("ffn_out", "moe_out", "tokens hidden", Noise.EXACT, doc, identity=True)
