"""What a `config.json` means: `ModelConfig`, and the fields that all decoders share.

Every setting that changes the computation is honoured as `transformers` 5 honours it, or refused by name. What
`transformers` accepts with a warning, or fills in silently, is refused: two programs that fill a gap in two ways
differ, and the difference looks like a numeric one. Settings that change nothing in inference (dropout,
initializer, cache, token ids) are ignored. Fields that a family reads in its own way: stages/spec/families/.
Source: `transformers` 5.23, `models/{qwen2,qwen3,llama,mistral}/modeling_*.py`, `configuration_utils.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.errors import InputError
from stages.spec.fields import choice, flag, got, number, size
from stages.spec.rope import RopeParameters, RopeValue, parse_rope

# The object in a `config.json`.
RawConfig = Mapping[str, Any]
DTYPES = ("bfloat16", "float16", "float32")
# Kinds of layers as `layer_types` names them: every query sees all keys before it, or a window of the last ones.
FULL, SLIDING = "full_attention", "sliding_attention"
# The default of transformers' Qwen2Config and Qwen3Config: layers from this one on slide.
MAX_WINDOW_LAYERS = 28
# Positions are float32 when they meet inv_freq, and float32 counts no further than this.
MAX_TOKENS = 2**24
# The deepest models have some 130 layers; the limit only keeps a damaged config from filling the memory with names.
_MAX_LAYERS = 4096

# Fields that replace code, weights or whole layers; `transformers` obeys them, and this tool does not.
_REFUSED = {
    "auto_map": "it names code to run from the checkpoint, which is never done",
    "quantization_config": "quantised weights are not supported; use the unquantised checkpoint",
    "transformers_weights": "it names another weight file; rename that file to model.safetensors",
    "per_layer_config": "layers of different shapes are not supported",
}

# The two parameters that a tied checkpoint stores once.
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class ModelConfig:
    """A checked `config.json`. Sizes count elements; every default has been filled in.

    `rope_parameters` holds, as sorted pairs, what the `rope_type` needs beside `rope_theta`: nothing for
    `default`; `factor` for `linear` (inv_freq is divided by it); for `yarn` also `attention_factor` (multiplies
    cos and sin; computed from `factor`, `mscale` and `mscale_all_dim` where the file leaves it open), `beta_fast`,
    `beta_slow`, `original_max_position_embeddings` and `truncate`; for `dynamic` `factor`, and the length up to which
    it changes nothing as `original_max_position_embeddings`; for `longrope` `short_factor`, `long_factor`, one number
    a frequency each, `original_max_position_embeddings` and `attention_factor`; for `llama3` `factor`,
    `low_freq_factor`, `high_freq_factor` and `original_max_position_embeddings`.

    `layer_types` is each layer's kind; `sliding_window` the window of those that slide, in tokens, None where none
    does. `dtype` is the activations' and weights' dtype by name.
    """

    family: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_type: str
    rope_parameters: RopeParameters
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    max_position_embeddings: int
    dtype: str
    sliding_window: int | None
    layer_types: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Axis name -> its size, of parameters and of stages; `tokens`, `queries` and `keys` are the sequence's."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        return {
            "hidden": self.hidden_size,
            "intermediate": self.intermediate_size,
            "vocab": self.vocab_size,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": self.head_dim,
            "qkv": (heads + 2 * kv_heads) * self.head_dim,
            "frequencies": self.head_dim // 2,
        }

    @property
    def options(self) -> dict[str, Any]:
        """Static keyword arguments of stages, by name; a stage's `dtype` is its own."""
        return {
            "heads": self.num_attention_heads,
            "kv_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "eps": self.rms_norm_eps,
            "scaling": self.head_dim**-0.5,
            "rope_theta": self.rope_theta,
            "rope_type": self.rope_type,
            "rope_parameters": self.rope_parameters,
            "attention_scaling": self.attention_factor,
        }

    @property
    def rope(self) -> dict[str, RopeValue]:
        """`rope_parameters` as a dictionary."""
        return dict(self.rope_parameters)

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by."""
        factor = self.rope.get("attention_factor", 1.0)
        assert not isinstance(factor, tuple)
        return float(factor)

    def check_length(self, tokens: int) -> None:
        """`InputError` for a sequence that cannot be computed faithfully.

        That is one without tokens, or one whose last position float32 cannot hold. More tokens than
        `max_position_embeddings` are computed, as `transformers` does: no formula of RoPE has an end.
        """
        if tokens < 1:
            raise InputError(f"expected at least one token, got {tokens}")
        if tokens > MAX_TOKENS:
            raise InputError(f"{tokens} tokens: float32 positions are exact only up to {MAX_TOKENS}; use fewer tokens")


def refuse_unsupported(raw: RawConfig, where: str) -> None:
    """`InputError` for a field that no family here supports."""
    for field, reason in _REFUSED.items():
        if raw.get(field) is not None:
            raise InputError(f"{where}: {field}: refused, {reason}")
    if not flag(raw, "is_causal", where, default=True):
        raise InputError(f"{where}: is_causal: false asks for attention in both directions, which is not supported")


def parse_decoder(
    raw: RawConfig,
    where: str,
    *,
    head_dim: int | None = None,
    qk_norm: bool = False,
    qkv_bias: bool = False,
    o_bias: bool = False,
    window: int | None = None,
    slides: Sequence[bool] | None = None,
) -> ModelConfig:
    """The fields that all decoders share, and what the family says of its own.

    `head_dim`: what it is where the file does not say; None for hidden_size / num_attention_heads. `window`: of the
    layers that slide, by `slides`; None for all of them. `InputError`, naming `where` and the field, for a field that
    is missing, of another type, out of range, in conflict with another, or that asks for something this tool
    does not compute.
    """
    choice(raw, "hidden_act", ("silu",), where)
    hidden, heads = size(raw, "hidden_size", where), size(raw, "num_attention_heads", where)
    key_value_heads = size(raw, "num_key_value_heads", where)
    if heads % key_value_heads:
        raise InputError(f"{where}: num_key_value_heads: {key_value_heads} does not divide num_attention_heads {heads}")
    positions = size(raw, "max_position_embeddings", where)
    head_dim = _head_dim(raw, head_dim, hidden, heads, where)
    theta, rope_type, parameters = parse_rope(raw, positions, head_dim, where)
    layers = layer_count(raw, where)
    slides = [window is not None] * layers if slides is None else slides
    return ModelConfig(
        family=str(raw["model_type"]),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        intermediate_size=size(raw, "intermediate_size", where),
        vocab_size=size(raw, "vocab_size", where),
        rms_norm_eps=number(raw, "rms_norm_eps", where),
        rope_theta=theta,
        rope_type=rope_type,
        rope_parameters=parameters,
        tie_word_embeddings=flag(raw, "tie_word_embeddings", where),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        qk_norm=qk_norm,
        max_position_embeddings=positions,
        dtype=_dtype(raw, where),
        sliding_window=window,
        layer_types=tuple(SLIDING if one else FULL for one in slides),
    )


def layer_count(raw: RawConfig, where: str) -> int:
    """`num_hidden_layers`."""
    return size(raw, "num_hidden_layers", where, limit=_MAX_LAYERS)


def _head_dim(raw: RawConfig, default: int | None, hidden: int, heads: int, where: str) -> int:
    if "head_dim" in raw:  # Qwen2's attention reads it too when it is there
        head_dim = size(raw, "head_dim", where)
    elif default is not None:
        head_dim = default
    elif hidden % heads:
        raise InputError(f"{where}: num_attention_heads: {heads} does not divide hidden_size {hidden}")
    else:
        head_dim = hidden // heads
    if head_dim % 2:
        raise InputError(f"{where}: head_dim: {head_dim} is odd; RoPE rotates pairs, so it must be even")
    return head_dim


def _dtype(raw: RawConfig, where: str) -> str:
    fields = [field for field in ("dtype", "torch_dtype") if raw.get(field) is not None]
    names = [choice(raw, field, DTYPES, where) for field in fields or ["dtype"]]
    if len(set(names)) > 1:
        raise InputError(f"{where}: dtype: '{names[0]}' contradicts torch_dtype '{names[1]}'; keep one")
    return names[0]


def parse_window(
    raw: RawConfig, where: str, unstated: Callable[[int, int], bool] = lambda layer, first: layer >= first
) -> dict[str, Any]:
    """`window` and `slides` for `parse_decoder` as a Qwen's config has them.

    `unstated(layer, max_window_layers)`: whether a layer slides where there are no `layer_types`.
    """
    use = flag(raw, "use_sliding_window", where, default=False)
    window = None
    if use:
        if "sliding_window" not in raw:
            raise InputError(f"{where}: sliding_window: absent, though use_sliding_window is true; state it, or null")
        window = None if raw["sliding_window"] is None else size(raw, "sliding_window", where)
    slides = _slides(raw, layer_count(raw, where), where, unstated)
    if window is None and any(slides) and raw.get("layer_types") is not None:
        raise InputError(f"{where}: layer_types: has '{SLIDING}', but no sliding window is in use")
    return {"window": window, "slides": slides} if window is not None and any(slides) else {}


def _slides(raw: RawConfig, layers: int, where: str, unstated: Callable[[int, int], bool]) -> list[bool]:
    """Which layers slide, where there is a window."""
    types = raw.get("layer_types")
    if types is None:
        first = raw.get("max_window_layers", MAX_WINDOW_LAYERS)
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            raise InputError(f"{where}: max_window_layers: expected a number of layers, got {got(first)}")
        return [unstated(layer, first) for layer in range(layers)]
    if not isinstance(types, list) or len(types) != layers:
        raise InputError(f"{where}: layer_types: expected a list of {layers} names, got {got(types)}")
    for name in types:
        if name not in (FULL, SLIDING):
            raise InputError(f"{where}: layer_types: expected {FULL} or {SLIDING} in each place, got {got(name)}")
    return [name == SLIDING for name in types]
