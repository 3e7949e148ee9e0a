"""Blocks that families are built of: stages with the parameters that they read, each declared once.

Stage names are those of `apr trace --save-tensor`, and the ones it lacked. One sequence, token axis first.
Semantics as the eager modules of `transformers` 5 have them: models/{qwen2,qwen3,llama,mistral}/modeling_*.py. Float32
whatever the model's dtype: the inverse frequencies and the angles. All else is stored in the activations' dtype,
`model`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from stages.spec.config import EMBEDDING, LM_HEAD
from stages.spec.noise import Noise
from stages.spec.stage import Block, Scope, Stage

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_QKV_WEIGHTS = tuple(f"{name}.weight" for name in _QKV)
_QKV_BIASES = tuple(f"{name}.bias" for name in _QKV)
_O_WEIGHT, _O_BIAS = "self_attn.o_proj.weight", "self_attn.o_proj.bias"
_HEADS = ("heads", "kv_heads", "head_dim")


def decoder_layer(attention: Block, feed_forward: Block) -> Block:
    """A layer: attention and feed-forward, each behind a norm and added to what came in."""
    norms = dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), "hidden")
    return Block((*attention.stages, *feed_forward.stages), {**attention.params, **feed_forward.params, **norms})


def attention(
    *, qk_norm: bool = False, qkv_bias: bool = False, o_bias: bool = False, window: int | None = None
) -> Block:
    """Causal attention, from the layer's norm to its residual; what a family lacks is absent or an identity.

    `window`: how many keys a query sees, None for all up to its own token.
    """
    rows = ("heads*head_dim", "kv_heads*head_dim", "kv_heads*head_dim")
    params: dict[str, str] = {}
    for weight, bias, size in zip(_QKV_WEIGHTS, _QKV_BIASES, rows, strict=True):
        params |= {weight: f"{size} hidden", **({bias: size} if qkv_bias else {})}
    params |= {_O_WEIGHT: "hidden heads*head_dim", **({_O_BIAS: "hidden"} if o_bias else {})}
    if qk_norm:
        params |= dict.fromkeys(("self_attn.q_norm.weight", "self_attn.k_norm.weight"), "head_dim")
    return Block(tuple(_attention(qk_norm=qk_norm, qkv_bias=qkv_bias, o_bias=o_bias, window=window)), params)


def swiglu() -> Block:
    """The dense feed-forward, from its norm to its residual."""
    up, down = "intermediate hidden", "hidden intermediate"
    params = {"mlp.gate_proj.weight": up, "mlp.up_proj.weight": up, "mlp.down_proj.weight": down}
    return Block(tuple(_feed_forward()), params)


def layer_stage(name: str, inputs: str, shape: str, noise: Noise, doc: str, **fields: Any) -> Stage:
    """A stage of a layer; its inputs as words."""
    fields = {"dtype": "model", "scope": Scope.LAYER, **fields}
    return Stage(name, inputs=tuple(inputs.split()), shape=shape, noise=noise, doc=doc, **fields)


_model = functools.partial(layer_stage, scope=Scope.MODEL)
_EXACT, _PRODUCT, _RMS_NORM = Noise.EXACT, Noise.PRODUCT, Noise.RMS_NORM


def _before() -> Iterator[Stage]:
    yield _model(
        "inv_freq", "", "frequencies", Noise.INV_FREQ,
        "Inverse frequencies of RoPE, theta^(-2i/head_dim), scaled as the rope_type says; "
        "dynamic and longrope go by the sequence's length",
        params=("positions",), options=("head_dim", "rope_theta", "rope_type", "rope_parameters"), dtype="float32",
    )  # fmt: skip
    doc = "position * inv_freq, the frequencies twice over"
    yield _model("rope_angle", "inv_freq", "tokens head_dim", _EXACT, doc, params=("positions",), dtype="float32")
    for name in ("cos", "sin"):
        doc = f"{name}(rope_angle) in float32, times the attention factor, cast to the activations' dtype"
        options = ("attention_scaling", "dtype")
        yield _model(f"rope_{name}", "rope_angle", "tokens head_dim", Noise.COS_SIN, doc, options=options)
    doc = "Rows of the embedding, one per token"
    yield _model("embedding", "", "tokens hidden", _EXACT, doc, params=("tokens", EMBEDDING))


def _attention(*, qk_norm: bool, qkv_bias: bool, o_bias: bool, window: int | None) -> Iterator[Stage]:
    doc = "RMSNorm of the layer's input: float32, cast, then times the weight"
    weight = ("input_layernorm.weight",)
    yield layer_stage("attn_norm", "layer_input", "tokens hidden", _RMS_NORM, doc, params=weight, options=("eps",))
    doc = "q, k and v without bias, joined on the last axis"
    doc += ": a side branch, production adds the bias inside the product" if qkv_bias else ""
    yield layer_stage("qkv_matmul", "attn_norm", "tokens qkv", _PRODUCT, doc, params=_QKV_WEIGHTS)
    if qkv_bias:
        doc = "q, k and v with bias, product and bias in one call as production has it"
        yield layer_stage("qkv_bias", "attn_norm", "tokens qkv", _PRODUCT, doc, params=(*_QKV_WEIGHTS, *_QKV_BIASES))
    else:
        doc = "qkv_matmul: there is no bias"
        yield layer_stage("qkv_bias", "qkv_matmul", "tokens qkv", _EXACT, doc, identity=True)
    for name, heads, of in (("q_norm", "heads", "queries"), ("k_norm", "kv_heads", "keys")):
        doc = f"RMSNorm of the {of}, head by head" if qk_norm else f"No norm of the {of} in this family"
        fields = {"params": (f"self_attn.{name}.weight",), "options": (*_HEADS, "eps"), "absent": not qk_norm}
        yield layer_stage(name, "qkv_bias", f"tokens {heads} head_dim", _RMS_NORM, doc, **fields)
    for name, heads, of in (("q", "heads", "Queries"), ("k", "kv_heads", "Keys")):
        inputs = f"{name}_norm rope_cos rope_sin" if qk_norm else "qkv_bias rope_cos rope_sin"
        doc = f"{of} turned by RoPE, halves paired"
        yield layer_stage(f"{name}_post_rope", inputs, f"tokens {heads} head_dim", Noise.ROPE, doc, options=_HEADS)
    yield layer_stage(
        "attn_scores", "q_post_rope k_post_rope", "heads queries keys", Noise.SCORES,
        "q k^T / sqrt(head_dim), not yet masked; each key head serves consecutive query heads",
        options=("scaling",), causal=True, window=window,
    )  # fmt: skip
    doc = "Causal mask, of a sliding layer its window's; softmax in float32, cast to the activations' dtype"
    fields = {"options": ("window",), "window": window}
    yield layer_stage("attn_softmax", "attn_scores", "heads queries keys", Noise.SOFTMAX, doc, **fields)
    doc = "attn_softmax @ v (v from qkv_bias), heads joined, before o_proj"
    shape = "tokens heads*head_dim"
    yield layer_stage("attention", "attn_softmax qkv_bias", shape, Noise.WEIGHTED, doc, options=_HEADS, window=window)
    params, doc = (
        (_O_WEIGHT, *((_O_BIAS,) if o_bias else ())),
        "o_proj of attention" + (", with bias" if o_bias else ""),
    )
    yield layer_stage("attn_out", "attention", "tokens hidden", _PRODUCT, doc, params=params)
    doc = "The layer's input + attn_out"
    yield layer_stage("post_attn_residual", "layer_input attn_out", "tokens hidden", _EXACT, doc)


def _feed_forward() -> Iterator[Stage]:
    wide, hidden, weight = "tokens intermediate", "tokens hidden", ("post_attention_layernorm.weight",)
    doc = "RMSNorm of post_attn_residual"
    yield layer_stage("ffn_norm", "post_attn_residual", hidden, _RMS_NORM, doc, params=weight, options=("eps",))
    for name in ("gate", "up"):
        doc, weight = f"{name}_proj of ffn_norm", (f"mlp.{name}_proj.weight",)
        yield layer_stage(f"ffn_{name}", "ffn_norm", wide, _PRODUCT, doc, params=weight)
    yield layer_stage("ffn_silu", "ffn_gate", wide, Noise.SILU, "ffn_gate * sigmoid(ffn_gate)")
    yield layer_stage("ffn_swigl", "ffn_silu ffn_up", wide, _EXACT, "ffn_silu * ffn_up")
    doc, weight = "down_proj of ffn_swigl", ("mlp.down_proj.weight",)
    yield layer_stage("ffn_out", "ffn_swigl", hidden, _PRODUCT, doc, params=weight)
    doc = "post_attn_residual + ffn_out: the layer's output"
    yield layer_stage("post_ffn_residual", "post_attn_residual ffn_out", hidden, _EXACT, doc)


def _after() -> Iterator[Stage]:
    doc, weight = "RMSNorm of the last layer's output", ("model.norm.weight",)
    yield _model("final_norm", "post_ffn_residual", "tokens hidden", _RMS_NORM, doc, params=weight, options=("eps",))
    yield _model("lm_head", "final_norm", "tokens vocab", _PRODUCT, "Logits", params=(LM_HEAD,))


# What comes before the layers, RoPE's tables and the embedding; and after them, the final norm and the logits.
EMBED = Block(tuple(_before()), {EMBEDDING: "vocab hidden"})
HEAD = Block(tuple(_after()), {"model.norm.weight": "hidden", LM_HEAD: "vocab hidden"})
