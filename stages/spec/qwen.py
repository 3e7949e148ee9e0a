"""Qwen3 and Qwen2/2.5: what a `config.json` means, and which parameters follow from it.

Every setting that changes the computation is honoured as `transformers` 5 honours it, or refused by name. What
`transformers` accepts with a warning, or fills in silently, is refused: two programs that fill a gap in two ways
differ, and the difference looks like a numeric one. Settings that change nothing in inference (dropout,
initializer, cache, token ids) are ignored.
Source: `transformers` 5.23, `models/qwen{2,3}/modeling_*.py`, `modeling_rope_utils.py`, `configuration_utils.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.errors import InputError, shown

FAMILIES = ("qwen3", "qwen2")
DTYPES = ("bfloat16", "float16", "float32")

# The keys that transformers reads for each rope_type, beside rope_theta, rope_type, type and partial_rotary_factor.
ROPE_KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
    "dynamic": frozenset({"factor"}),
    "longrope": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"}
    ),
    "llama3": frozenset({"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}),
}
RopeValue = float | int | bool | tuple[float, ...]
RopeParameters = tuple[tuple[str, RopeValue], ...]
_COMMON_ROPE_KEYS = frozenset({"rope_theta", "rope_type", "type", "partial_rotary_factor"})

# The default of transformers' Qwen3Config; it is not hidden_size / num_attention_heads.
QWEN3_HEAD_DIM = 128
# The default of transformers' Qwen2Config and Qwen3Config: layers from this one on slide.
MAX_WINDOW_LAYERS = 28
# Positions are float32 when they meet inv_freq, and float32 counts no further than this.
MAX_TOKENS = 2**24
# No tensor dimension is larger; a config beyond it is damaged, and its products would overflow a file offset.
_MAX_SIZE = 2**31 - 1
# The deepest Qwen has 94 layers; the limit only keeps a damaged config from filling the memory with names.
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
class QwenConfig:
    """A checked `config.json`. Sizes count elements; every default has been filled in.

    `rope_parameters` holds, as sorted pairs, what the `rope_type` needs beside `rope_theta`: nothing for
    `default`; `factor` for `linear` (inv_freq is divided by it); for `yarn` also `attention_factor` (multiplies
    cos and sin; computed from `factor`, `mscale` and `mscale_all_dim` where the file leaves it open), `beta_fast`,
    `beta_slow`, `original_max_position_embeddings` and `truncate`; for `dynamic` `factor`, and the length up to which
    it changes nothing as `original_max_position_embeddings`; for `longrope` `short_factor`, `long_factor`, one number
    a frequency each, `original_max_position_embeddings` and `attention_factor`; for `llama3` `factor`,
    `low_freq_factor`, `high_freq_factor` and `original_max_position_embeddings`.

    `sliding_window` is the window that some layer really applies, in tokens, or None; while it is set, only
    sequences that fit are computed, see `check_length`. `dtype` is the activations' and weights' dtype by name.
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
    use_sliding_window: bool
    sliding_window: int | None

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

        That is one without tokens, one longer than a sliding window that some layer applies, or one whose last
        position float32 cannot hold. More tokens than `max_position_embeddings` are computed, as `transformers`
        does: no formula of RoPE has an end.
        """
        if tokens < 1:
            raise InputError(f"expected at least one token, got {tokens}")
        if self.sliding_window is not None and tokens > self.sliding_window:
            raise InputError(
                f"{tokens} tokens do not fit the sliding window of {self.sliding_window} (use_sliding_window is true), "
                "and windowed attention is not supported; use fewer tokens"
            )
        if tokens > MAX_TOKENS:
            raise InputError(f"{tokens} tokens: float32 positions are exact only up to {MAX_TOKENS}; use fewer tokens")


def parse_config(raw: Mapping[str, Any], where: str) -> QwenConfig:
    """The checked meaning of `raw`, the object in a `config.json`.

    `InputError`, naming `where` and the field, for a field that is missing, of another type, out of range, in
    conflict with another, or that asks for something this tool does not compute.
    """
    for field, reason in _REFUSED.items():
        if raw.get(field) is not None:
            raise InputError(f"{where}: {field}: refused, {reason}")
    if not _flag(raw, "is_causal", where, default=True):
        raise InputError(f"{where}: is_causal: false asks for attention in both directions, which is not supported")
    family = _choice(raw, "model_type", FAMILIES, where)
    _choice(raw, "hidden_act", ("silu",), where)
    hidden, heads = _size(raw, "hidden_size", where), _size(raw, "num_attention_heads", where)
    key_value_heads = _size(raw, "num_key_value_heads", where)
    if heads % key_value_heads:
        raise InputError(f"{where}: num_key_value_heads: {key_value_heads} does not divide num_attention_heads {heads}")
    layers = _size(raw, "num_hidden_layers", where, limit=_MAX_LAYERS)
    positions = _size(raw, "max_position_embeddings", where)
    head_dim = _head_dim(raw, family, hidden, heads, where)
    theta, rope_type, parameters = _rope(raw, positions, head_dim, where)
    use_window, window = _window(raw, layers, where)
    # Qwen2's classes do not read attention_bias: q, k and v have a bias whatever the file says, o_proj has none.
    bias = _flag(raw, "attention_bias", where, default=False) if family == "qwen3" else True
    return QwenConfig(
        family=family,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        intermediate_size=_size(raw, "intermediate_size", where),
        vocab_size=_size(raw, "vocab_size", where),
        rms_norm_eps=_number(raw, "rms_norm_eps", where),
        rope_theta=theta,
        rope_type=rope_type,
        rope_parameters=parameters,
        tie_word_embeddings=_flag(raw, "tie_word_embeddings", where),
        qkv_bias=bias,
        o_bias=bias and family == "qwen3",
        qk_norm=family == "qwen3",
        max_position_embeddings=positions,
        dtype=_dtype(raw, where),
        use_sliding_window=use_window,
        sliding_window=window,
    )


def parameter_shapes(config: QwenConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's name and shape, in the order of `transformers`' `state_dict()`.

    Linear weights are `[out, in]`. `lm_head.weight` is always there and last, tied or not: the selection rule of
    SVF addresses it, though a tied checkpoint need not hold it.
    """
    c = config
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, c.hidden_size)}
    for layer in range(c.num_hidden_layers):
        at = f"model.layers.{layer}"
        for name, rows, columns, bias in (
            ("q_proj", queries, c.hidden_size, c.qkv_bias),
            ("k_proj", keys, c.hidden_size, c.qkv_bias),
            ("v_proj", keys, c.hidden_size, c.qkv_bias),
            ("o_proj", c.hidden_size, queries, c.o_bias),
        ):
            shapes[f"{at}.self_attn.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{at}.self_attn.{name}.bias"] = (rows,)
        if c.qk_norm:
            shapes[f"{at}.self_attn.q_norm.weight"] = (c.head_dim,)
            shapes[f"{at}.self_attn.k_norm.weight"] = (c.head_dim,)
        shapes[f"{at}.mlp.gate_proj.weight"] = (c.intermediate_size, c.hidden_size)
        shapes[f"{at}.mlp.up_proj.weight"] = (c.intermediate_size, c.hidden_size)
        shapes[f"{at}.mlp.down_proj.weight"] = (c.hidden_size, c.intermediate_size)
        shapes[f"{at}.input_layernorm.weight"] = (c.hidden_size,)
        shapes[f"{at}.post_attention_layernorm.weight"] = (c.hidden_size,)
    shapes["model.norm.weight"] = (c.hidden_size,)
    shapes["lm_head.weight"] = (c.vocab_size, c.hidden_size)
    return shapes


def _head_dim(raw: Mapping[str, Any], family: str, hidden: int, heads: int, where: str) -> int:
    if "head_dim" in raw:  # Qwen2's attention reads it too when it is there
        head_dim = _size(raw, "head_dim", where)
    elif family == "qwen3":
        head_dim = QWEN3_HEAD_DIM
    elif hidden % heads:
        raise InputError(f"{where}: num_attention_heads: {heads} does not divide hidden_size {hidden}")
    else:
        head_dim = hidden // heads
    if head_dim % 2:
        raise InputError(f"{where}: head_dim: {head_dim} is odd; RoPE rotates pairs, so it must be even")
    return head_dim


def _dtype(raw: Mapping[str, Any], where: str) -> str:
    fields = [field for field in ("dtype", "torch_dtype") if raw.get(field) is not None]
    names = [_choice(raw, field, DTYPES, where) for field in fields or ["dtype"]]
    if len(set(names)) > 1:
        raise InputError(f"{where}: dtype: '{names[0]}' contradicts torch_dtype '{names[1]}'; keep one")
    return names[0]


def _window(raw: Mapping[str, Any], layers: int, where: str) -> tuple[bool, int | None]:
    """`use_sliding_window`, and the window that some layer applies (None when none does)."""
    use = _flag(raw, "use_sliding_window", where, default=False)
    window = None
    if use:
        if "sliding_window" not in raw:
            raise InputError(f"{where}: sliding_window: absent, though use_sliding_window is true; state it, or null")
        window = None if raw["sliding_window"] is None else _size(raw, "sliding_window", where)
    slides = _some_layer_slides(raw, layers, where)
    if window is None and slides and raw.get("layer_types") is not None:
        raise InputError(f"{where}: layer_types: has 'sliding_attention', but no sliding window is in use")
    return use, window if slides else None


def _some_layer_slides(raw: Mapping[str, Any], layers: int, where: str) -> bool:
    types = raw.get("layer_types")
    if types is None:
        first = raw.get("max_window_layers", MAX_WINDOW_LAYERS)
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            raise InputError(f"{where}: max_window_layers: expected a number of layers, got {_got(first)}")
        return first < layers
    if not isinstance(types, list) or len(types) != layers:
        raise InputError(f"{where}: layer_types: expected a list of {layers} names, got {_got(types)}")
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            raise InputError(
                f"{where}: layer_types: expected full_attention or sliding_attention in each place, got {_got(name)}"
            )
    return "sliding_attention" in types


def _rope(raw: Mapping[str, Any], positions: int, head_dim: int, where: str) -> tuple[float, str, RopeParameters]:
    """rope_theta, rope_type and the sorted parameters of that type."""
    field, table = _rope_table(raw, where)
    theta = _rope_theta(raw, field, table, where)
    for place, holder in ((f"{field}.", table), ("", raw)):
        if (factor := holder.get("partial_rotary_factor")) is not None and (isinstance(factor, bool) or factor != 1):
            raise InputError(
                f"{where}: {place}partial_rotary_factor: only 1 is supported, got {_got(factor)}; transformers' Qwen "
                "turns whole heads"
            )
    kind = _rope_type(field, table, where)
    unknown = sorted(set(table) - ROPE_KEYS[kind] - _COMMON_ROPE_KEYS)
    if unknown:
        known = ", ".join(sorted(ROPE_KEYS[kind])) or "rope_theta only"
        raise InputError(
            f"{where}: {field}.{shown(unknown[0])}: transformers does not read it for rope_type '{kind}' ({known})"
        )
    values: dict[str, RopeValue] = {}
    if kind not in ("default", "longrope"):
        values["factor"] = _number(table, "factor", where, field, least=1.0)
    if kind in ("yarn", "longrope", "llama3"):
        values["original_max_position_embeddings"] = _original_length(raw, field, table, positions, where)
    if kind == "yarn":
        values |= _yarn(field, table, where)
    if kind == "dynamic":
        if head_dim == 2:
            raise InputError(f"{where}: head_dim: 2 has no dynamic RoPE: its exponent is head_dim / (head_dim - 2)")
        values["original_max_position_embeddings"] = positions
    if kind == "longrope":
        original = int(values["original_max_position_embeddings"])  # type: ignore[arg-type]
        values |= _longrope(field, table, positions, original, head_dim, where)
    if kind == "llama3":
        values |= _llama3(field, table, where)
    return theta, kind, tuple(sorted(values.items()))


def _rope_table(raw: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """The object that holds the rope settings, and its field: rope_parameters, or rope_scaling before version 5."""
    found: list[tuple[str, dict[str, Any]]] = []
    for field in ("rope_parameters", "rope_scaling"):
        value = raw.get(field)
        if value is not None and not isinstance(value, dict):
            raise InputError(f"{where}: {field}: expected an object, got {_got(value)}")
        if value:  # an empty object says nothing, and transformers passes over it
            found.append((field, value))
    if len(found) == 2 and found[0][1] != found[1][1]:
        raise InputError(f"{where}: rope_scaling: contradicts rope_parameters; keep one of them")
    return found[0] if found else ("rope_parameters", {})


def _rope_theta(raw: Mapping[str, Any], field: str, table: Mapping[str, Any], where: str) -> float:
    places = [(holder, prefix) for holder, prefix in ((table, field), (raw, "")) if "rope_theta" in holder]
    if not places:
        raise InputError(
            f"{where}: rope_theta: absent, at the top level and in rope_parameters; state it "
            "(transformers would silently take 10000)"
        )
    thetas = [_number(holder, "rope_theta", where, prefix) for holder, prefix in places]
    if len(set(thetas)) > 1:
        raise InputError(f"{where}: rope_theta: {thetas[1]} contradicts {thetas[0]} in {field}; keep one")
    if thetas[0] <= 1:  # at 1 every position turns alike, and yarn divides by log(theta)
        raise InputError(f"{where}: rope_theta: expected more than 1, got {thetas[0]}")
    return thetas[0]


def _rope_type(field: str, table: Mapping[str, Any], where: str) -> str:
    keys = [key for key in ("rope_type", "type") if key in table]
    names = [_choice(table, key, tuple(ROPE_KEYS), where, field) for key in keys] or ["default"]
    if len(set(names)) > 1:
        raise InputError(f"{where}: {field}.type: '{names[1]}' contradicts rope_type '{names[0]}'; keep one")
    return names[0]


def _yarn(field: str, table: Mapping[str, Any], where: str) -> dict[str, RopeValue]:
    """The settings of YaRN with transformers' defaults filled in (https://huggingface.co/papers/2309.00071)."""
    fast = _optional(field, table, "beta_fast", where) or 32.0
    slow = _optional(field, table, "beta_slow", where) or 1.0
    if fast < slow:
        raise InputError(f"{where}: {field}.beta_fast: {fast} is less than beta_slow {slow}")
    return {
        "attention_factor": _optional(field, table, "attention_factor", where)
        or _yarn_attention_factor(field, table, where),
        "beta_fast": fast,
        "beta_slow": slow,
        "truncate": _flag(table, "truncate", where, field, default=True),
    }


def _longrope(
    field: str, table: Mapping[str, Any], positions: int, original: int, head_dim: int, where: str
) -> dict[str, RopeValue]:
    """The settings of LongRoPE (https://huggingface.co/papers/2402.13753)."""
    lists = {key: _numbers(table, key, head_dim // 2, where, field) for key in ("short_factor", "long_factor")}
    given = table.get("factor") is not None
    factor = _number(table, "factor", where, field, least=1.0) if given else positions / original
    found = _optional(field, table, "attention_factor", where)
    if found is None:
        if factor > 1 and original == 1:  # its logarithm divides
            raise InputError(f"{where}: {field}.original_max_position_embeddings: expected more than 1, got 1")
        found = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {**lists, "attention_factor": found}


def _llama3(field: str, table: Mapping[str, Any], where: str) -> dict[str, RopeValue]:
    """The settings of Llama 3.1's RoPE: wavelengths between two lengths are blended."""
    low, high = (_number(table, key, where, field) for key in ("low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise InputError(f"{where}: {field}.high_freq_factor: expected more than low_freq_factor {low}, got {high}")
    return {"low_freq_factor": low, "high_freq_factor": high}


def _optional(field: str, table: Mapping[str, Any], key: str, where: str) -> float | None:
    return None if table.get(key) is None else _number(table, key, where, field)


def _numbers(table: Mapping[str, Any], key: str, count: int, where: str, field: str) -> tuple[float, ...]:
    """A list of `count` finite numbers above 0."""
    value, place = _value(table, key, where, field)
    if not isinstance(value, list) or len(value) != count:
        got = f"{len(value)} of them" if isinstance(value, list) else _got(value)
        raise InputError(f"{place}: expected a list of {count} numbers, one a frequency, got {got}")
    return tuple(_number({f"{key}[{i}]": x}, f"{key}[{i}]", where, field) for i, x in enumerate(value))


def _original_length(raw: Mapping[str, Any], field: str, table: Mapping[str, Any], positions: int, where: str) -> int:
    key = "original_max_position_embeddings"
    lengths = [_size(holder, key, where, at) for holder, at in ((table, field), (raw, "")) if key in holder]
    if len(set(lengths)) > 1:  # transformers lets the top level win over the table
        raise InputError(f"{where}: {key}: {lengths[1]} contradicts {lengths[0]} in {field}; keep one")
    return lengths[0] if lengths else positions


def _yarn_attention_factor(field: str, table: Mapping[str, Any], where: str) -> float:
    factor = float(table["factor"])
    # transformers takes 0 and null for absent, and reads neither unless both are there
    there = [key for key in ("mscale", "mscale_all_dim") if table.get(key) is False or table.get(key)]
    scales = [_number(table, key, where, field) for key in there]
    if len(scales) == 2:
        return _mscale(factor, scales[0]) / _mscale(factor, scales[1])
    return _mscale(factor, 1.0)


def _mscale(factor: float, scale: float) -> float:
    # The same operations in the same order as transformers, so that the double is the same.
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _got(value: object) -> str:
    names = {True: "true", False: "false", None: "null"}
    return names[value] if value is None or isinstance(value, bool) else shown(repr(value))


def _value(holder: Mapping[str, Any], field: str, where: str, within: str) -> tuple[Any, str]:
    place = f"{where}: {within}.{field}" if within else f"{where}: {field}"
    if field not in holder:
        raise InputError(f"{place}: absent; the computation depends on it, so state it")
    return holder[field], place


def _size(holder: Mapping[str, Any], field: str, where: str, within: str = "", *, limit: int = _MAX_SIZE) -> int:
    value, place = _value(holder, field, where, within)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
        raise InputError(f"{place}: expected an integer from 1 to {limit}, got {_got(value)}")
    return value


def _number(holder: Mapping[str, Any], field: str, where: str, within: str = "", *, least: float = 0.0) -> float:
    """A finite number above 0 and at least `least`."""
    value, place = _value(holder, field, where, within)
    wanted = f"a finite number of at least {least:g}" if least else "a finite number above 0"
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"{place}: expected {wanted}, got {_got(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and number > 0 and number >= least):
        raise InputError(f"{place}: expected {wanted}, got {_got(value)}")
    return number


def _flag(holder: Mapping[str, Any], field: str, where: str, within: str = "", *, default: bool | None = None) -> bool:
    if default is not None and field not in holder:
        return default
    value, place = _value(holder, field, where, within)
    if not isinstance(value, bool):
        raise InputError(f"{place}: expected true or false, got {_got(value)}")
    return value


def _choice(holder: Mapping[str, Any], field: str, allowed: tuple[str, ...], where: str, within: str = "") -> str:
    value, place = _value(holder, field, where, within)
    if value not in allowed:
        raise InputError(f"{place}: expected {' or '.join(allowed)}, got {_got(value)}")
    return value
