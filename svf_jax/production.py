"""A decoder in `flax.nnx`, of every family here: the production model of the JAX side. Twin of svf_torch/production.py.

Written for itself, from `transformers` 5's eager modules (models/{qwen2,qwen3,llama,mistral}/modeling_*.py), and not
from the traced stages in svf_jax/decoder.py: agreeing with them shows something. Module and parameter names are the
checkpoint's, so the paths of the nnx state are its tensor names. The only function shared is `inv_freq`, see
`RotaryEmbedding`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from stages.run.production import (
    bucket,
    check_names,
    checked_tokens,
    greedy,
    parameters_of,
    stacked_experts,
    with_stored_head,
)
from stages.spec.backend import Weights
from stages.spec.config import SLIDING, ModelConfig
from stages.spec.experts import MoeConfig
from svf_jax.decoder import inv_freq


class Buffer(nnx.Variable):
    """An array of the model that no checkpoint holds."""


class Linear(nnx.Module):
    """`x @ weight.T + bias`, weight `[out, in]`; summed in float32 and rounded once, after the bias."""

    def __init__(self, features_in: int, features_out: int, rngs: nnx.Rngs, dtype: str, *, bias: bool = False):
        init = nnx.initializers.normal(features_in**-0.5)
        self.weight = nnx.Param(init(rngs.params(), (features_out, features_in), dtype))
        self.bias = nnx.Param(jnp.zeros(features_out, dtype)) if bias else None

    def __call__(self, x: Array) -> Array:
        return _linear(x, self.weight[...], None if self.bias is None else self.bias[...])


class Embedding(nnx.Module):
    """Rows of `weight`, `[vocab, hidden]`."""

    def __init__(self, vocab: int, features: int, rngs: nnx.Rngs, dtype: str):
        self.weight = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (vocab, features), dtype))

    def __call__(self, tokens: Array) -> Array:
        return self.weight[...][tokens]


class RMSNorm(nnx.Module):
    """RMSNorm over the last axis: float32, cast, then times the weight; `nnx.RMSNorm` casts after the weight."""

    def __init__(self, features: int, eps: float, dtype: str):
        self.weight = nnx.Param(jnp.ones(features, dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        normed = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return self.weight[...] * normed.astype(x.dtype)


class RotaryEmbedding(nnx.Module):
    """cos and sin of every position's angles, `[tokens, head_dim]` each, in the activations' dtype."""

    def __init__(self, config: ModelConfig, dtype: str):
        # The traced path's own: one ulp here is 3e-5 in the angle at position 500, which would drown all other
        # rounding. The stage is judged by its oracle. A variable, not a constant, lest XLA fold cos and sin.
        self.inv_freq = Buffer(frequencies(config, 1))
        self.config = config
        self.dtype = dtype

    def __call__(self, tokens: int, inv_freq: Array | None) -> tuple[Array, Array]:
        if inv_freq is None:
            by_length = self.config.rope_type in ("dynamic", "longrope")
            inv_freq = frequencies(self.config, tokens) if by_length else self.inv_freq[...]
        half = jnp.arange(tokens, dtype=jnp.float32)[:, None] * inv_freq
        angle = jnp.concatenate((half, half), axis=-1)
        scaling = self.config.attention_factor
        return (jnp.cos(angle) * scaling).astype(self.dtype), (jnp.sin(angle) * scaling).astype(self.dtype)


class Attention(nnx.Module):
    """Causal self-attention, in a window or not, with grouped key and value heads and, in some families, head norms."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype: str, window: int | None):
        c = config
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, queries, rngs, dtype, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, keys, rngs, dtype, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, keys, rngs, dtype, bias=c.qkv_bias)
        self.o_proj = Linear(queries, c.hidden_size, rngs, dtype, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps, dtype) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps, dtype) if c.qk_norm else None
        self.head_dim = c.head_dim
        self.scaling = c.head_dim**-0.5
        self.window = window

    def __call__(self, x: Array, cos: Array, sin: Array) -> Array:
        q, k, v = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        tokens, heads, _ = q.shape
        # Consecutive query heads share a key head: kv, then the group within it.
        q = q.reshape(tokens, k.shape[1], -1, self.head_dim)
        scores = jnp.einsum("qngd,knd->ngqk", q, k, preferred_element_type=jnp.float32).astype(x.dtype)
        # float32: the scale is no number of bfloat16
        scores = (scores.astype(jnp.float32) * self.scaling).astype(x.dtype)
        back = jnp.arange(tokens)[:, None] - jnp.arange(tokens)
        seen = (back >= 0) & (back < (self.window or tokens))
        scores = jnp.where(seen, scores, jnp.finfo(x.dtype).min)
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(x.dtype)
        mixed = jnp.einsum("ngqk,knd->qngd", weights, v, preferred_element_type=jnp.float32).astype(x.dtype)
        return self.o_proj(mixed.reshape(tokens, heads * self.head_dim))

    def _heads(self, x: Array) -> Array:
        return x.reshape(x.shape[0], -1, self.head_dim)


class MLP(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, hidden: int, intermediate: int, rngs: nnx.Rngs, dtype: str):
        self.gate_proj = Linear(hidden, intermediate, rngs, dtype)
        self.up_proj = Linear(hidden, intermediate, rngs, dtype)
        self.down_proj = Linear(intermediate, hidden, rngs, dtype)

    def __call__(self, x: Array) -> Array:
        gate = self.gate_proj(x)
        # float32: in bfloat16 the sigmoid would be rounded before the product
        return self.down_proj(jax.nn.silu(gate.astype(jnp.float32)).astype(x.dtype) * self.up_proj(x))


class Experts(nnx.Module):
    """The matrices of all experts, `[experts, out, in]`."""

    def __init__(self, config: MoeConfig, rngs: nnx.Rngs, dtype: str):
        c, wide = config, config.moe_intermediate_size
        self.gate_proj = Stack(c.num_experts, c.hidden_size, wide, rngs, dtype)
        self.up_proj = Stack(c.num_experts, c.hidden_size, wide, rngs, dtype)
        self.down_proj = Stack(c.num_experts, wide, c.hidden_size, rngs, dtype)

    def __call__(self, x: Array, shares: Array) -> Array:
        """The sum of what each expert makes of x, times its share `[tokens, experts]`, float32, rounded once."""

        def one(total: Array, of: tuple[Array, ...]) -> tuple[Array, None]:
            gate, up, down, share = of
            act = jax.nn.silu(_linear(x, gate).astype(jnp.float32)).astype(x.dtype)
            y = _linear(act * _linear(x, up), down)
            return total + jnp.where(share[:, None] > 0, y.astype(jnp.float32) * share[:, None], 0), None

        weights = tuple(stack.weight[...] for stack in (self.gate_proj, self.up_proj, self.down_proj))
        total, _ = lax.scan(one, jnp.zeros(x.shape, jnp.float32), (*weights, shares.T.astype(jnp.float32)))
        return total.astype(x.dtype)


class Stack(nnx.Module):
    """A linear layer's weight for each expert."""

    def __init__(self, experts: int, features_in: int, features_out: int, rngs: nnx.Rngs, dtype: str):
        init = nnx.initializers.normal(features_in**-0.5)
        self.weight = nnx.Param(init(rngs.params(), (experts, features_out, features_in), dtype))


class MoE(nnx.Module):
    """Experts that a router chooses for each token, and one that all share where the family has it."""

    def __init__(self, config: MoeConfig, rngs: nnx.Rngs, dtype: str):
        c, wide = config, config.shared_intermediate_size
        self.gate = Linear(c.hidden_size, c.num_experts, rngs, dtype)
        self.experts = Experts(c, rngs, dtype)
        self.shared_expert = MLP(c.hidden_size, wide, rngs, dtype) if wide else None
        self.shared_expert_gate = Linear(c.hidden_size, 1, rngs, dtype) if wide else None
        self.top_k, self.renormalised = c.num_experts_per_tok, c.norm_topk_prob

    def __call__(self, x: Array) -> Array:
        probs = jax.nn.softmax(self.gate(x).astype(jnp.float32), axis=-1)
        top, index = lax.top_k(probs, self.top_k)
        top = (top / top.sum(axis=-1, keepdims=True) if self.renormalised else top).astype(x.dtype)
        shares = jnp.zeros_like(probs, x.dtype).at[jnp.arange(len(x))[:, None], index].set(top)
        y = self.experts(x, shares)
        if self.shared_expert is None or self.shared_expert_gate is None:
            return y
        weight = jax.nn.sigmoid(self.shared_expert_gate(x).astype(jnp.float32)).astype(x.dtype)
        return y + weight * self.shared_expert(x)


class DecoderLayer(nnx.Module):
    """Attention and MLP, each behind a norm and added to what came in."""

    def __init__(self, config: ModelConfig, layer: int, rngs: nnx.Rngs, dtype: str):
        window = config.sliding_window if config.layer_types[layer] == SLIDING else None
        self.self_attn = Attention(config, rngs, dtype, window)
        if isinstance(config, MoeConfig) and config.sparse[layer]:
            self.mlp: MLP | MoE = MoE(config, rngs, dtype)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, rngs, dtype)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def __call__(self, x: Array, cos: Array, sin: Array) -> Array:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nnx.Module):
    """From token ids to the final norm, `[tokens, hidden]`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype: str):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, rngs, dtype)
        self.layers = nnx.List([DecoderLayer(config, n, rngs, dtype) for n in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.rotary_emb = RotaryEmbedding(config, dtype)

    def before(self, tokens: Array, inv_freq: Array | None) -> tuple[Array, Array, Array]:
        """What the first layer takes: embedding, cos and sin."""
        return self.embed_tokens(tokens), *self.rotary_emb(tokens.shape[0], inv_freq)

    def __call__(self, tokens: Array, inv_freq: Array | None = None) -> Array:
        x, cos, sin = self.before(tokens, inv_freq)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class CausalLM(nnx.Module):
    """A model for causal language modelling, one sequence at a time, without a cache.

    Randomly initialised; `load_model` gives one with a checkpoint's weights. `dtype`: of weights and activations,
    `model` for the config's. A tied model has no `lm_head`: the embedding serves.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, dtype: str = "model"):
        dtype = config.dtype if dtype == "model" else dtype
        self.model = Decoder(config, rngs, dtype)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, rngs, dtype)

    def __call__(self, tokens: Array, rows: Array | None = None, inv_freq: Array | None = None) -> Array:
        """Logits `[tokens, vocab]` of token ids `[tokens]`, or of the positions `rows` only, `[len(rows), vocab]`.

        `inv_freq`: RoPE's frequencies, where the sequence has other ones than its tokens' number says: a padded one.
        """
        return self.logits(self.model(tokens, inv_freq), rows)

    def logits(self, hidden: Array, rows: Array | None) -> Array:
        """Logits of the final norm's output, of all positions or of `rows`."""
        if rows is not None:
            hidden = hidden[rows]
        return _linear(hidden, self.model.embed_tokens.weight[...]) if self.lm_head is None else self.lm_head(hidden)


def load_model(config: ModelConfig, weights: Weights, dtype: str = "model", device: str = "cpu") -> CausalLM:
    """A `CausalLM` whose every parameter was read from `weights`, one tensor at a time.

    `dtype`: what weights are cast to and activations computed in, `model` for the config's. The model has an LM head
    of its own where the weights have one, whatever the config ties. `InputError` for a tensor that is missing,
    unexpected or of another shape.
    """
    config = with_stored_head(config, weights)
    dtype = config.dtype if dtype == "model" else dtype
    place = _device(device)
    model = nnx.eval_shape(lambda: CausalLM(config, nnx.Rngs(0), dtype=dtype))
    with jax.default_device(place):
        model.model.rotary_emb = RotaryEmbedding(config, dtype)
    parameters = {".".join(map(str, path)): v for path, v in nnx.iter_graph(model) if isinstance(v, nnx.Param)}
    check_names(config, list(parameters))
    for name, array in stacked_experts(parameters_of(config, weights)):
        # Read, cast on the device and let go one by one, so that no second copy of the model exists.
        parameters[name].set_raw_value(jax.device_put(np.ascontiguousarray(array), place).astype(dtype))
    return model


class JaxProduction:
    """A compiled `CausalLM` in numpy terms; see `stages.run.production.Production`.

    A layer is compiled once for all that are built alike: whole, 28 layers took nine times as long to compile and gave
    the same bits (docs/findings/speed.md).

    `precision` is that of products. XLA may not keep bfloat16 values in float32 between operations
    (`xla_allow_excess_precision`): the model prescribes those roundings, and without them a bfloat16 model cannot
    be told from one with a changed constant (docs/findings/production.md).
    """

    def __init__(self, model: CausalLM, config: ModelConfig, device: str, precision: str):
        self.model, self.config = model, config
        self._place, self._precision = _device(device), precision
        compiled = functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_allow_excess_precision": False})
        self._layers = [nnx.split(layer) for layer in model.model.layers]
        self._before, self._layer, self._after = map(compiled, (_before, _layer, _after))
        self._graph, self._state = nnx.split(model)

    def __call__(self, tokens: Sequence[int] | np.ndarray, *, last_only: bool = False) -> np.ndarray:
        """Logits `[tokens, vocab]`, or the last token's, `[1, vocab]`, from layers compiled once."""
        ids = checked_tokens(self.config, tokens)
        return self._run(self._by_layers, ids, [len(ids) - 1] if last_only else None)

    def reordered(self, tokens: Sequence[int] | np.ndarray, *, last_only: bool = False) -> np.ndarray:
        """The same model operation by operation, each compiled alone: nothing fused, other orders of rounding."""
        ids = checked_tokens(self.config, tokens)
        return self._run(self._by_operations, ids, [len(ids) - 1] if last_only else None)

    def generate(self, tokens: Sequence[int] | np.ndarray, n: int) -> list[int]:
        """The `n` greedy tokens that follow, each from a forward of all before it: there is no cache.

        Sequences are padded on the right, which the causal mask hides from every real position, to a power of two:
        one compilation serves all lengths up to it.
        """
        ids = checked_tokens(self.config, tokens)
        for _ in range(n):
            self.config.check_length(len(ids))
            padded = np.zeros(bucket(len(ids)), np.int32)
            padded[: len(ids)] = ids
            logits = self._run(self._by_layers, padded, [len(ids) - 1], len(ids))
            ids = np.append(ids, np.int32(greedy(logits)))
        return [int(token) for token in ids[len(tokens) :]]

    def _run(
        self, forward: Callable[..., Array], ids: np.ndarray, rows: list[int] | None, length: int | None = None
    ) -> np.ndarray:
        """Logits of `ids`, of which the first `length` are the sequence and the rest padding."""
        put = [None if x is None else jax.device_put(x, self._place) for x in (ids, rows and np.array(rows, np.int32))]
        with jax.default_matmul_precision(self._precision), jax.default_device(self._place):
            inv_freq = frequencies(self.config, length or len(ids))
            return np.ascontiguousarray(np.asarray(forward(*put, inv_freq)))

    def _by_layers(self, tokens: Array, rows: Array | None, inv_freq: Array) -> Array:
        x, cos, sin = self._before(self._graph, self._state, tokens, inv_freq)
        for graph, state in self._layers:
            x = self._layer(graph, state, x, cos, sin)
        return self._after(self._graph, self._state, x, rows)

    def _by_operations(self, tokens: Array, rows: Array | None, inv_freq: Array) -> Array:
        logits: Array = self.model(tokens, rows, inv_freq)
        return logits


def production(
    config: ModelConfig, weights: Weights, *, dtype: str = "model", device: str = "cpu", precision: str = "highest"
) -> JaxProduction:
    """The production model of `config`, with all `weights` loaded."""
    return JaxProduction(load_model(config, weights, dtype, device), config, device, precision)


def _before(
    graph: nnx.GraphDef[CausalLM], state: nnx.State, tokens: Array, inv_freq: Array
) -> tuple[Array, Array, Array]:
    return nnx.merge(graph, state).model.before(tokens, inv_freq)


def _layer(graph: nnx.GraphDef[DecoderLayer], state: nnx.State, x: Array, cos: Array, sin: Array) -> Array:
    return nnx.merge(graph, state)(x, cos, sin)


def _after(graph: nnx.GraphDef[CausalLM], state: nnx.State, x: Array, rows: Array | None) -> Array:
    model = nnx.merge(graph, state)
    return model.logits(model.model.norm(x), rows)


def _device(device: str) -> jax.Device:
    platform, _, index = device.replace("cuda", "gpu").partition(":")
    return jax.devices(platform)[int(index or 0)]


@functools.partial(jax.jit, static_argnums=0)
def _inv_freq(config: ModelConfig, positions: Array) -> Array:
    c = config
    return inv_freq(
        positions,
        head_dim=c.head_dim,
        rope_theta=c.rope_theta,
        rope_type=c.rope_type,
        rope_parameters=c.rope_parameters,
    )


def frequencies(config: ModelConfig, length: int) -> Array:
    """RoPE's inverse frequencies for a sequence of `length` tokens, `[head_dim / 2]`."""
    # The last position alone: it gives the length, and one compilation serves all.
    return _inv_freq(config, np.array([length - 1], np.int32))


def _linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    out = lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return (out if bias is None else out + bias.astype(jnp.float32)).astype(x.dtype)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    half = x.shape[-1] // 2
    turned = jnp.concatenate((-x[..., half:], x[..., :half]), axis=-1)
    return x * cos[:, None] + turned * sin[:, None]
