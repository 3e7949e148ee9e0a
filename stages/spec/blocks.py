"""Blocks that families are built of: stages with the parameters that they read, each declared once.

Stage names are those of `apr trace --save-tensor`, and the ones it lacked. One sequence, token axis first.
Semantics as the eager modules of `transformers` 5 have them: models/{qwen2,qwen3,llama}/modeling_*.py. Float32 whatever
the model's dtype: the inverse frequencies and the angles. All else is stored in the activations' dtype, `model`.
"""

from __future__ import annotations

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
_ROPE_TABLE = ("attention_scaling", "dtype")


def decoder_layer(attention: Block, feed_forward: Block) -> Block:
    """A layer: attention and feed-forward, each behind a norm and added to what came in."""
    norms = dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), "hidden")
    return Block((*attention.stages, *feed_forward.stages), {**attention.params, **feed_forward.params, **norms})


def attention(*, qk_norm: bool = False, qkv_bias: bool = False, o_bias: bool = False) -> Block:
    """Full causal attention, from the layer's norm to its residual; what a family lacks is absent or an identity."""
    rows = ("heads*head_dim", "kv_heads*head_dim", "kv_heads*head_dim")
    params: dict[str, str] = {}
    for weight, bias, size in zip(_QKV_WEIGHTS, _QKV_BIASES, rows, strict=True):
        params |= {weight: f"{size} hidden", **({bias: size} if qkv_bias else {})}
    params |= {_O_WEIGHT: "hidden heads*head_dim", **({_O_BIAS: "hidden"} if o_bias else {})}
    if qk_norm:
        params |= dict.fromkeys(("self_attn.q_norm.weight", "self_attn.k_norm.weight"), "head_dim")
    return Block(tuple(_attention(qk_norm=qk_norm, qkv_bias=qkv_bias, o_bias=o_bias)), params)


def swiglu() -> Block:
    """The dense feed-forward, from its norm to its residual."""
    up, down = "intermediate hidden", "hidden intermediate"
    params = {"mlp.gate_proj.weight": up, "mlp.up_proj.weight": up, "mlp.down_proj.weight": down}
    return Block(tuple(_feed_forward()), params)


def _model(name: str, **fields: Any) -> Stage:
    return Stage(name, **({"dtype": "model", "scope": Scope.MODEL} | fields))


def _layer(name: str, **fields: Any) -> Stage:
    return Stage(name, **({"dtype": "model", "scope": Scope.LAYER} | fields))


def _before() -> Iterator[Stage]:
    yield _model(
        "inv_freq",
        params=("positions",),
        options=("head_dim", "rope_theta", "rope_type", "rope_parameters"),
        shape="frequencies",
        dtype="float32",
        noise=Noise.INV_FREQ,
        doc="Inverse frequencies of RoPE, theta^(-2i/head_dim), scaled as the rope_type says; "
        "dynamic and longrope go by the sequence's length",
    )
    yield _model(
        "rope_angle",
        inputs=("inv_freq",),
        params=("positions",),
        shape="tokens head_dim",
        dtype="float32",
        doc="position * inv_freq, the frequencies twice over",
    )
    yield _model(
        "rope_cos",
        inputs=("rope_angle",),
        options=_ROPE_TABLE,
        shape="tokens head_dim",
        noise=Noise.COS_SIN,
        doc="cos(rope_angle) in float32, times the attention factor, cast to the activations' dtype",
    )
    yield _model(
        "rope_sin",
        inputs=("rope_angle",),
        options=_ROPE_TABLE,
        shape="tokens head_dim",
        noise=Noise.COS_SIN,
        doc="sin(rope_angle) in float32, times the attention factor, cast to the activations' dtype",
    )
    yield _model(
        "embedding", params=("tokens", EMBEDDING), shape="tokens hidden", doc="Rows of the embedding, one per token"
    )


def _attention(*, qk_norm: bool, qkv_bias: bool, o_bias: bool) -> Iterator[Stage]:
    q, k = ("q_norm", "k_norm") if qk_norm else ("qkv_bias", "qkv_bias")
    yield _layer(
        "attn_norm",
        inputs=("layer_input",),
        params=("input_layernorm.weight",),
        options=("eps",),
        shape="tokens hidden",
        noise=Noise.RMS_NORM,
        doc="RMSNorm of the layer's input: float32, cast, then times the weight",
    )
    yield _layer(
        "qkv_matmul",
        inputs=("attn_norm",),
        params=_QKV_WEIGHTS,
        shape="tokens qkv",
        noise=Noise.PRODUCT,
        doc="q, k and v without bias, joined on the last axis"
        + (": a side branch, production adds the bias inside the product" if qkv_bias else ""),
    )
    yield (
        _layer(
            "qkv_bias",
            inputs=("attn_norm",),
            params=(*_QKV_WEIGHTS, *_QKV_BIASES),
            shape="tokens qkv",
            noise=Noise.PRODUCT,
            doc="q, k and v with bias, product and bias in one call as production has it",
        )
        if qkv_bias
        else _layer(
            "qkv_bias", inputs=("qkv_matmul",), shape="tokens qkv", identity=True, doc="qkv_matmul: there is no bias"
        )
    )
    for name, heads, of in (("q_norm", "heads", "queries"), ("k_norm", "kv_heads", "keys")):
        yield _layer(
            name,
            inputs=("qkv_bias",),
            params=(f"self_attn.{name}.weight",),
            options=(*_HEADS, "eps"),
            shape=f"tokens {heads} head_dim",
            noise=Noise.RMS_NORM,
            absent=not qk_norm,
            doc=f"RMSNorm of the {of}, head by head" if qk_norm else f"No norm of the {of} in this family",
        )
    yield _layer(
        "q_post_rope",
        inputs=(q, "rope_cos", "rope_sin"),
        options=_HEADS,
        shape="tokens heads head_dim",
        noise=Noise.ROPE,
        doc="Queries turned by RoPE, halves paired",
    )
    yield _layer(
        "k_post_rope",
        inputs=(k, "rope_cos", "rope_sin"),
        options=_HEADS,
        shape="tokens kv_heads head_dim",
        noise=Noise.ROPE,
        doc="Keys turned by RoPE, halves paired",
    )
    yield _layer(
        "attn_scores",
        inputs=("q_post_rope", "k_post_rope"),
        options=("scaling",),
        shape="heads queries keys",
        noise=Noise.SCORES,
        causal=True,
        doc="q k^T / sqrt(head_dim), not yet masked; each key head serves consecutive query heads",
    )
    yield _layer(
        "attn_softmax",
        inputs=("attn_scores",),
        shape="heads queries keys",
        noise=Noise.SOFTMAX,
        doc="Causal mask, softmax in float32, cast to the activations' dtype",
    )
    yield _layer(
        "attention",
        inputs=("attn_softmax", "qkv_bias"),
        options=_HEADS,
        shape="tokens heads*head_dim",
        noise=Noise.WEIGHTED,
        doc="attn_softmax @ v (v from qkv_bias), heads joined, before o_proj",
    )
    yield _layer(
        "attn_out",
        inputs=("attention",),
        params=(_O_WEIGHT, *((_O_BIAS,) if o_bias else ())),
        shape="tokens hidden",
        noise=Noise.PRODUCT,
        doc="o_proj of attention" + (", with bias" if o_bias else ""),
    )
    yield _layer(
        "post_attn_residual",
        inputs=("layer_input", "attn_out"),
        shape="tokens hidden",
        doc="The layer's input + attn_out",
    )


def _feed_forward() -> Iterator[Stage]:
    yield _layer(
        "ffn_norm",
        inputs=("post_attn_residual",),
        params=("post_attention_layernorm.weight",),
        options=("eps",),
        shape="tokens hidden",
        noise=Noise.RMS_NORM,
        doc="RMSNorm of post_attn_residual",
    )
    for name, projection in (("ffn_gate", "gate_proj"), ("ffn_up", "up_proj")):
        yield _layer(
            name,
            inputs=("ffn_norm",),
            params=(f"mlp.{projection}.weight",),
            shape="tokens intermediate",
            noise=Noise.PRODUCT,
            doc=f"{projection} of ffn_norm",
        )
    yield _layer(
        "ffn_silu",
        inputs=("ffn_gate",),
        shape="tokens intermediate",
        noise=Noise.SILU,
        doc="ffn_gate * sigmoid(ffn_gate)",
    )
    yield _layer("ffn_swigl", inputs=("ffn_silu", "ffn_up"), shape="tokens intermediate", doc="ffn_silu * ffn_up")
    yield _layer(
        "ffn_out",
        inputs=("ffn_swigl",),
        params=("mlp.down_proj.weight",),
        shape="tokens hidden",
        noise=Noise.PRODUCT,
        doc="down_proj of ffn_swigl",
    )
    yield _layer(
        "post_ffn_residual",
        inputs=("post_attn_residual", "ffn_out"),
        shape="tokens hidden",
        doc="post_attn_residual + ffn_out: the layer's output",
    )


def _after() -> Iterator[Stage]:
    yield _model(
        "final_norm",
        inputs=("post_ffn_residual",),
        params=("model.norm.weight",),
        options=("eps",),
        shape="tokens hidden",
        noise=Noise.RMS_NORM,
        doc="RMSNorm of the last layer's output",
    )
    yield _model(
        "lm_head",
        inputs=("final_norm",),
        params=(LM_HEAD,),
        shape="tokens vocab",
        noise=Noise.PRODUCT,
        doc="Logits",
    )


# What comes before the layers, RoPE's tables and the embedding; and after them, the final norm and the logits.
EMBED = Block(tuple(_before()), {EMBEDDING: "vocab hidden"})
HEAD = Block(tuple(_after()), {"model.norm.weight": "hidden", LM_HEAD: "vocab hidden"})
