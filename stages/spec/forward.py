"""The Qwen forward path: every intermediate of Qwen3 and Qwen2/2.5, from token ids to logits, declared once.

Stage names are those of `apr trace --save-tensor`, and the ones it lacked. One sequence, token axis first.
Semantics as the eager modules of `transformers` 5 have them: models/qwen{2,3}/modeling_*.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from stages.spec.noise import Noise
from stages.spec.qwen import EMBEDDING, LM_HEAD, QwenConfig
from stages.spec.stage import Path, Scope, Stage

# Parameters that come with the run, not with the weights: token ids and their positions, int32.
RUN_PARAMS = ("tokens", "positions")
# What a layer has from the one before it.
CARRIED = MappingProxyType({"layer_input": ("embedding", "post_ffn_residual")})
ALIASES = MappingProxyType({"layer_output": "post_ffn_residual"})

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_QKV_WEIGHTS = tuple(f"{name}.weight" for name in _QKV)
_QKV_BIASES = tuple(f"{name}.bias" for name in _QKV)
_HEADS = ("heads", "kv_heads", "head_dim")
_ROPE_TABLE = ("attention_scaling", "dtype")


def declare(*, qk_norm: bool, qkv_bias: bool, o_bias: bool) -> tuple[Stage, ...]:
    """The stages in execution order; what the family lacks is there as absent or identity.

    Float32 whatever the model's dtype: the inverse frequencies and the angles. All else is stored in the
    activations' dtype, `model`.
    """
    q, k = ("q_norm", "k_norm") if qk_norm else ("qkv_bias", "qkv_bias")
    return (
        *_before(),
        *_attention(q, k, qk_norm=qk_norm, qkv_bias=qkv_bias, o_bias=o_bias),
        *_feed_forward(),
        *_after(),
    )


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


def _attention(q: str, k: str, *, qk_norm: bool, qkv_bias: bool, o_bias: bool) -> Iterator[Stage]:
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
        params=("self_attn.o_proj.weight", *(("self_attn.o_proj.bias",) if o_bias else ())),
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


# Declared dtype of every stage; it is the same in all families.
DTYPES: Mapping[str, str] = MappingProxyType(
    {stage.name: stage.dtype for stage in declare(qk_norm=True, qkv_bias=True, o_bias=True)}
)


# Stages with a rounding to the activations' dtype inside: the cast before a norm's weight, the scores' before the
# scale, the two products of RoPE.
ROUNDED_INSIDE: frozenset[str] = frozenset(
    stage.name
    for stage in declare(qk_norm=True, qkv_bias=True, o_bias=True)
    if stage.noise in (Noise.RMS_NORM, Noise.SCORES, Noise.ROPE)
)


def forward_path(config: QwenConfig, dtype: str = "model") -> Path:
    """The path of a model, its stages' dtype resolved: activations are computed in `dtype`, `model` the config's."""
    activations = config.dtype if dtype == "model" else dtype
    stages = tuple(
        dataclasses.replace(stage, dtype=activations) if stage.dtype == "model" else stage
        for stage in declare(qk_norm=config.qk_norm, qkv_bias=config.qkv_bias, o_bias=config.o_bias)
    )
    params = tuple(dict.fromkeys(name for stage in stages for name in stage.params))
    return Path(f"forward {config.family}", params, stages, CARRIED, ALIASES)


def stage_options(config: QwenConfig, stage: Stage) -> dict[str, Any]:
    """The static keyword arguments of one stage of a path of `config`."""
    values = {
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "eps": config.rms_norm_eps,
        "scaling": config.head_dim**-0.5,
        "rope_theta": config.rope_theta,
        "rope_type": config.rope_type,
        "rope_parameters": config.rope_parameters,
        "attention_scaling": config.attention_factor,
        "dtype": stage.dtype,
    }
    return {name: values[name] for name in stage.options}


def stage_shape(config: QwenConfig, stage: Stage, tokens: int) -> tuple[int, ...]:
    """The shape of a stage's whole result for a sequence of `tokens`."""
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    sizes = {
        **dict.fromkeys(("tokens", "queries", "keys"), tokens),
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "vocab": config.vocab_size,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "heads*head_dim": heads * head_dim,
        "qkv": (heads + 2 * kv_heads) * head_dim,
        "frequencies": head_dim // 2,
    }
    return tuple(sizes[axis] for axis in stage.shape.split())


def recorded_shape(
    config: QwenConfig, stage: Stage, tokens: int, positions: str = "all", *, joined: bool = True
) -> tuple[int, ...]:
    """The shape of a stage recorded at `positions`, all or the last; not `joined`: an axis `a*b` as two, a and b."""
    axes = (stage.shape if joined else stage.shape.replace("*", " ")).split()
    shape = stage_shape(config, dataclasses.replace(stage, shape=" ".join(axes)), tokens)
    last = positions == "last"
    return tuple(1 if last and axis in ("tokens", "queries") else n for axis, n in zip(axes, shape, strict=True))


def parameter_name(stage: Stage, param: str, layer: int | None) -> str:
    """The checkpoint's name of a stage's parameter in a layer."""
    return f"model.layers.{layer}.{param}" if stage.scope is Scope.LAYER else param


def producers(path: Path, stage: Stage, layer: int | None, layers: int) -> dict[str, tuple[int | None, str]]:
    """Where each input of a stage comes from: input name -> (layer, stage), layer None for the whole model's.

    What must have been recorded to run `stage` of `layer` in isolation, in a model of `layers` layers.
    """
    found: dict[str, tuple[int | None, str]] = {}
    for name in stage.inputs:
        source, at = name, layer
        if stage.scope is Scope.LAYER and name in path.carried:
            assert layer is not None
            first, last = path.carried[name]
            source, at = (first, None) if layer == 0 else (last, layer - 1)
        elif stage.scope is Scope.MODEL and path[name].scope is Scope.LAYER:
            at = layers - 1
        found[name] = (at if path[source].scope is Scope.LAYER else None, source)
    return found
