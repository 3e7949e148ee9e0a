"""Qwen configs: honoured as transformers computes them, or refused by field name."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from helpers import ROOT

from stages.errors import InputError
from stages.spec.config import FULL, MAX_TOKENS, SLIDING, ModelConfig
from stages.spec.families import parameter_shapes, parse_config

QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "attention_bias": False,
    "dtype": "bfloat16",
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "max_window_layers": 28,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 512,
}
QWEN2 = {k: v for k, v in QWEN3.items() if k not in ("attention_bias", "head_dim")} | {"model_type": "qwen2"}
ABSENT = object()
WINDOWED = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 128,
    "short_factor": [1 + i / 100 for i in range(16)],
    "long_factor": [1.5 + i for i in range(16)],
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8,
    "low_freq_factor": 1,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def changed(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (base | changes).items() if value is not ABSENT}


def parse(base: dict[str, Any] = QWEN3, **changes: Any) -> ModelConfig:
    return parse_config(changed(base, **changes), "x/config.json")


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {key: value for key, value in parameters.items() if value is not ABSENT}}


# -- what is honoured ------------------------------------------------------------------------------------------


def test_qwen3_is_read_field_by_field() -> None:
    assert parse() == ModelConfig(
        family="qwen3",
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=96,
        vocab_size=512,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        rope_type="default",
        rope_parameters=(),
        tie_word_embeddings=True,
        qkv_bias=False,
        o_bias=False,
        qk_norm=True,
        max_position_embeddings=512,
        dtype="bfloat16",
        sliding_window=None,
        layer_types=(FULL,) * 2,
    )


@pytest.mark.parametrize(
    ("base", "changes", "qkv_bias", "o_bias", "qk_norm"),
    [
        (QWEN3, {}, False, False, True),
        (QWEN3, {"attention_bias": ABSENT}, False, False, True),
        (QWEN3, {"attention_bias": True}, True, True, True),
        (QWEN2, {}, True, False, False),
        (QWEN2, {"attention_bias": False}, True, False, False),
    ],
)
def test_biases_and_norms_follow_the_family(
    base: dict[str, Any], changes: dict[str, Any], qkv_bias: bool, o_bias: bool, qk_norm: bool
) -> None:
    config = parse(base, **changes)
    assert (config.qkv_bias, config.o_bias, config.qk_norm) == (qkv_bias, o_bias, qk_norm)


def test_head_dim_is_128_for_qwen3_and_a_quotient_for_qwen2_unless_stated() -> None:
    assert parse(QWEN3, head_dim=ABSENT).head_dim == 128
    assert parse(QWEN2).head_dim == 16
    assert parse(QWEN2, head_dim=32).head_dim == 32


ROPE_PLACES = {
    "nested": rope(rope_theta=5000, rope_type="default"),
    "nested without a type": rope(rope_theta=5000),
    "top level": {"rope_parameters": ABSENT, "rope_theta": 5000.0},
    "top level beside null": {"rope_parameters": None, "rope_scaling": None, "rope_theta": 5000.0},
    "top level beside empty": {"rope_parameters": {}, "rope_theta": 5000.0},
    "both, agreeing": rope(rope_theta=5000, rope_type="default") | {"rope_theta": 5000.0},
    "type by its old name": rope(rope_theta=5000, type="default"),
    "a whole rotary factor": rope(rope_theta=5000, partial_rotary_factor=1.0) | {"partial_rotary_factor": 1},
}


@pytest.mark.parametrize("place", ROPE_PLACES)
def test_rope_theta_is_found_in_every_place(place: str) -> None:
    config = parse(**ROPE_PLACES[place])
    assert (config.rope_theta, config.rope_type, config.rope) == (5000.0, "default", {})


def test_a_legacy_rope_scaling_means_the_same_as_rope_parameters() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    legacy = parse(rope_parameters=ABSENT, rope_theta=1e6, rope_scaling=scaling)
    assert legacy == parse(**rope(**YARN))


def test_dtype_has_an_old_name() -> None:
    assert parse(dtype=ABSENT, torch_dtype="float32").dtype == "float32"
    assert parse(dtype="float16", torch_dtype="float16").dtype == "float16"


def test_a_config_is_frozen_and_hashable() -> None:
    config = parse(**rope(**YARN))
    assert hash(config) == hash(parse(**rope(**YARN)))
    with pytest.raises(FrozenInstanceError):
        config.hidden_size = 1  # type: ignore[misc]


ROPE_CASES = {
    "default": rope(rope_theta=1e6, rope_type="default"),
    "linear": rope(**LINEAR),
    "linear 1": rope(**LINEAR | {"factor": 1}),
    "yarn": rope(**YARN),
    "yarn, no original length": rope(**YARN | {"original_max_position_embeddings": ABSENT}),
    "yarn, original length on top": rope(**YARN | {"original_max_position_embeddings": ABSENT})
    | {"original_max_position_embeddings": 64},
    "yarn, factor 1": rope(**YARN | {"factor": 1.0}),
    "yarn, attention_factor": rope(**YARN, attention_factor=0.5),
    "yarn, attention_factor and mscales": rope(**YARN, attention_factor=0.5, mscale=2.0, mscale_all_dim=0.5),
    "yarn, null settings": rope(**YARN, attention_factor=None, beta_fast=None, beta_slow=None, mscale=None),
    "yarn, both mscales": rope(**YARN, mscale=0.707, mscale_all_dim=1.5),
    "yarn, one mscale": rope(**YARN, mscale=0.707),
    "yarn, mscale_all_dim 0": rope(**YARN, mscale=0.707, mscale_all_dim=0),
    "yarn, betas": rope(**YARN, beta_fast=16, beta_slow=2.5),
    "yarn, not truncated": rope(**YARN, truncate=False),
    "dynamic": rope(**DYNAMIC),
    "dynamic, old name": {
        "rope_parameters": ABSENT,
        "rope_theta": 1e4,
        "rope_scaling": {"type": "dynamic", "factor": 2},
    },
    "longrope": rope(**LONGROPE),
    "longrope, factor": rope(**LONGROPE, factor=32),
    "longrope, factor 1": rope(**LONGROPE, factor=1.0),
    "longrope, attention_factor": rope(**LONGROPE, factor=32, attention_factor=1.25),
    "longrope, no original length": rope(**LONGROPE | {"original_max_position_embeddings": ABSENT}),
    "longrope, original length on top": rope(**LONGROPE | {"original_max_position_embeddings": ABSENT})
    | {"original_max_position_embeddings": 64},
    "llama3": rope(**LLAMA3),
    "llama3, narrow": rope(**LLAMA3 | {"low_freq_factor": 3.9}),
    "llama3, no original length": rope(**LLAMA3 | {"original_max_position_embeddings": ABSENT}),
}


def reference_rope(config: ModelConfig, tokens: int) -> tuple[list[float], float]:
    """inv_freq and cos/sin factor from nothing but the parsed config, by the formulas of the papers."""
    dim, theta = config.head_dim, config.rope_theta
    r: dict[str, Any] = dict(config.rope)
    if config.rope_type == "dynamic":
        length = r["original_max_position_embeddings"]
        theta *= (r["factor"] * max(tokens, length) / length - r["factor"] + 1) ** (dim / (dim - 2))
        return [theta ** -(i / dim) for i in range(0, dim, 2)], 1.0
    plain = [theta ** -(i / dim) for i in range(0, dim, 2)]
    if config.rope_type == "default":
        return plain, 1.0
    if config.rope_type == "linear":
        return [f / r["factor"] for f in plain], 1.0
    if config.rope_type == "longrope":
        divisors = r["long_factor" if tokens > r["original_max_position_embeddings"] else "short_factor"]
        return [f / divisor for f, divisor in zip(plain, divisors, strict=True)], float(r["attention_factor"])
    if config.rope_type == "llama3":
        low, high, length = r["low_freq_factor"], r["high_freq_factor"], r["original_max_position_embeddings"]
        kept = [min(max((length * f / (2 * math.pi) - low) / (high - low), 0), 1) for f in plain]
        return [f * k + f / r["factor"] * (1 - k) for f, k in zip(plain, kept, strict=True)], 1.0

    def turns(count: float) -> float:
        length = r["original_max_position_embeddings"]
        return dim * math.log(length / (count * 2 * math.pi)) / (2 * math.log(theta))

    low, high = turns(r["beta_fast"]), turns(r["beta_slow"])
    if r["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    ramp = [min(max((i - low) / (high - low), 0), 1) for i in range(dim // 2)]
    return [f * (1 - t) + f / r["factor"] * t for f, t in zip(plain, ramp, strict=True)], float(r["attention_factor"])


@pytest.mark.parametrize("base", [QWEN3, QWEN2], ids=["qwen3", "qwen2"])
@pytest.mark.parametrize("case", ROPE_CASES)
def test_the_parsed_rope_gives_transformers_frequencies(case: str, base: dict[str, Any]) -> None:
    raw = changed(base, **ROPE_CASES[case] | {"head_dim": 32})  # as many as longrope's lists are for
    config = parse_config(raw, "config.json")
    rotary = transformers_model(raw, rotary_only=True)
    # At, before and beyond the lengths where dynamic and longrope change.
    for tokens in (1, 64, 65, 128, 129, config.max_position_embeddings, config.max_position_embeddings + 1, 5000):
        frequencies, factor = reference_rope(config, tokens)
        rotary(torch.zeros(1), torch.arange(tokens)[None])
        assert rotary.attention_scaling == config.attention_factor == factor
        assert rotary.inv_freq.tolist() == pytest.approx(frequencies, rel=1e-5)


# -- what is refused -------------------------------------------------------------------------------------------

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
REQUIRED = (*SIZES, "model_type", "hidden_act", "rms_norm_eps", "tie_word_embeddings", "dtype")


@pytest.mark.parametrize("field", REQUIRED)
def test_a_missing_field_is_refused(field: str) -> None:
    refuses(field, changed(QWEN3, **{field: ABSENT}))


@pytest.mark.parametrize("field", [*SIZES, "head_dim"])
@pytest.mark.parametrize("value", [0, -1, True, 4.0, "4", None, [4], 2**31, 10**40], ids=repr)
def test_a_size_that_is_no_positive_integer_is_refused(field: str, value: Any) -> None:
    refuses(field, changed(QWEN3, **{field: value}))


BAD_NUMBERS = [0, -1e-6, math.nan, math.inf, -math.inf, True, "1e-6", None, [1], 10**400]


@pytest.mark.parametrize("value", BAD_NUMBERS, ids=lambda v: repr(v)[:8])
def test_a_number_that_is_not_finite_and_positive_is_refused(value: Any) -> None:
    refuses("rms_norm_eps", changed(QWEN3, rms_norm_eps=value))
    refuses("rope_theta", changed(QWEN3, **rope(rope_theta=value)))
    refuses("rope_theta", changed(QWEN3, rope_parameters=ABSENT, rope_theta=value))
    for kind in (LINEAR, YARN):
        refuses("factor", changed(QWEN3, **rope(**kind | {"factor": value})))


REFUSED = {
    "another family": ("model_type", {"model_type": "gemma3"}),
    "a family of another type": ("model_type", {"model_type": ["qwen3"]}),
    "another activation": ("hidden_act", {"hidden_act": "gelu"}),
    "code": ("auto_map", {"auto_map": {"AutoModel": "modeling.Model"}}),
    "empty code": ("auto_map", {"auto_map": {}}),
    "quantised": ("quantization_config", {"quantization_config": {"bits": 4}}),
    "other weights": ("transformers_weights", {"transformers_weights": "other.safetensors"}),
    "per layer": ("per_layer_config", {"per_layer_config": {}}),
    "both directions": ("is_causal", {"is_causal": False}),
    "too many layers": ("num_hidden_layers", {"num_hidden_layers": 5000}),
    "KV heads that do not divide": ("num_key_value_heads", {"num_key_value_heads": 3}),
    "more KV heads than heads": ("num_key_value_heads", {"num_key_value_heads": 8}),
    "an odd head": ("head_dim", {"head_dim": 31}),
    "a small odd head, which transformers lets pass": ("head_dim", {"head_dim": 3}),
    "a bias of another type": ("attention_bias", {"attention_bias": 0}),
    "ties of another type": ("tie_word_embeddings", {"tie_word_embeddings": "true"}),
    "quantised dtype": ("dtype", {"dtype": "float8_e4m3fn"}),
    "double": ("dtype", {"dtype": "float64"}),
    "a spelled dtype": ("dtype", {"dtype": "torch.bfloat16"}),
    "two dtypes": ("torch_dtype", {"dtype": "bfloat16", "torch_dtype": "float32"}),
    "window flag of another type": ("use_sliding_window", {"use_sliding_window": 1}),
    "a window without size": ("sliding_window", {"use_sliding_window": True, "sliding_window": ABSENT}),
    "a window of zero": ("sliding_window", {"use_sliding_window": True, "sliding_window": 0}),
    "window layers of another type": ("max_window_layers", WINDOWED | {"max_window_layers": -1}),
    "sliding layers without a window": ("layer_types", {"layer_types": ["full_attention", "sliding_attention"]}),
    "sliding layers with a null window": (
        "layer_types",
        {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": True, "sliding_window": None},
    ),
    "too few layer types": ("layer_types", {"layer_types": ["full_attention"]}),
    "unknown layer types": ("layer_types", {"layer_types": ["full_attention", "linear_attention"]}),
    "layer types of another type": ("layer_types", {"layer_types": "full_attention"}),
    "no theta": ("rope_theta", {"rope_parameters": ABSENT}),
    "no theta in the table": ("rope_theta", rope(rope_type="default")),
    "two thetas": ("rope_theta", rope(rope_theta=1e4) | {"rope_theta": 1e6}),
    "theta 1": ("rope_theta", rope(rope_theta=1.0)),
    "rope of another type": ("rope_parameters", {"rope_parameters": [1e6]}),
    "a false rope": ("rope_scaling", {"rope_scaling": False}),
    "two ropes": ("rope_scaling", {"rope_scaling": YARN}),
    "rope by layer type": ("rope_theta", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}),
    "rope by layer type and theta": (
        "full_attention",
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}, "rope_theta": 1e6},
    ),
    "two types": ("rope_parameters.type", rope(rope_theta=1e6, rope_type="default", type="linear", factor=2.0)),
    "a null type": ("rope_type", rope(rope_theta=1e6, rope_type=None)),
    "half a rotary factor": ("partial_rotary_factor", rope(rope_theta=1e6, partial_rotary_factor=0.5)),
    "half a rotary factor on top": ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    "a true rotary factor": ("partial_rotary_factor", {"partial_rotary_factor": True}),
    "a factor for default": ("factor", rope(rope_theta=1e6, rope_type="default", factor=2.0)),
    "no factor for linear": ("factor", rope(**LINEAR | {"factor": ABSENT})),
    "no factor for yarn": ("factor", rope(**YARN | {"factor": ABSENT})),
    "a shrinking factor": ("factor", rope(**LINEAR | {"factor": 0.5})),
    "a shrinking yarn": ("factor", rope(**YARN | {"factor": 0.5})),
    "yarn's keys for linear": ("beta_fast", rope(**LINEAR, beta_fast=32)),
    "an original length for linear": (
        "original_max_position_embeddings",
        rope(**LINEAR, original_max_position_embeddings=128),
    ),
    "an unknown key": ("finetuned", rope(**YARN, finetuned=True)),
    "two original lengths": (
        "original_max_position_embeddings",
        rope(**YARN) | {"original_max_position_embeddings": 64},
    ),
    "fast below slow": ("beta_fast", rope(**YARN, beta_fast=1, beta_slow=2)),
    "truncate of another type": ("truncate", rope(**YARN, truncate=0)),
    "a false mscale": ("mscale", rope(**YARN, mscale=False)),
    "no factor for dynamic": ("factor", rope(**DYNAMIC | {"factor": ABSENT})),
    "dynamic of two": ("head_dim", rope(**DYNAMIC) | {"head_dim": 2}),
    "an attention factor for dynamic": ("attention_factor", rope(**DYNAMIC, attention_factor=1.2)),
    "no long factors": ("long_factor", rope(**LONGROPE | {"long_factor": ABSENT})),
    "too few long factors": ("long_factor", rope(**LONGROPE | {"long_factor": [1.0] * 15})),
    "one short factor for all": ("short_factor", rope(**LONGROPE | {"short_factor": 2.0})),
    "a short factor of 0": ("short_factor[3]", rope(**LONGROPE | {"short_factor": [1, 1, 1, 0, *[1] * 12]})),
    "a short factor that is a word": ("short_factor[15]", rope(**LONGROPE | {"short_factor": [*[1] * 15, "1"]})),
    "longrope of one position": ("original_max", rope(**LONGROPE | {"original_max_position_embeddings": 1})),
    "llama3, high below low": ("high_freq_factor", rope(**LLAMA3 | {"high_freq_factor": 0.5})),
    "llama3, high equals low": ("high_freq_factor", rope(**LLAMA3 | {"high_freq_factor": 1})),
    "no low factor": ("low_freq_factor", rope(**LLAMA3 | {"low_freq_factor": ABSENT})),
    "part of the head for llama3": ("partial_rotary_factor", rope(**LLAMA3, partial_rotary_factor=0.5)),
}
REFUSED |= {f"rope_type {kind}": ("rope_type", rope(rope_theta=1e6, rope_type=kind)) for kind in (
    "proportional", "axial", "mrope", "su", "Linear", 1, ["yarn"]
)}  # fmt: skip
REFUSED |= {
    f"yarn {key} {value}": (key, rope(**YARN | {key: value}))
    for key in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    for value in (-1.0, math.nan, math.inf, True, "1")
}
LENGTH = "original_max_position_embeddings"
REFUSED |= {f"yarn length {value}": (LENGTH, rope(**YARN | {LENGTH: value})) for value in (0, -1, 128.0, True, None)}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused_by_name(case: str) -> None:
    field, changes = REFUSED[case]
    refuses(field, changed(QWEN3, **changes))


def test_heads_that_do_not_divide_are_refused_for_qwen2_only() -> None:
    refuses("num_attention_heads", changed(QWEN2, num_attention_heads=6))
    assert parse(QWEN3, num_attention_heads=6).head_dim == 32


def refuses(field: str, raw: dict[str, Any]) -> None:
    with pytest.raises(InputError) as error:
        parse_config(raw, "x/config.json")
    text = str(error.value)
    assert text.startswith("x/config.json: ")
    assert field in text
    assert "\n" not in text
    assert len(text) < 400


# -- sequences -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({}, None),
        ({"sliding_window": 16}, None),
        ({"use_sliding_window": True, "sliding_window": None}, None),
        (WINDOWED, 16),
        (WINDOWED | {"max_window_layers": 0}, 16),
        (WINDOWED | {"max_window_layers": 2}, None),
        (WINDOWED | {"layer_types": ["full_attention"] * 2}, None),
        (WINDOWED | {"layer_types": ["sliding_attention", "full_attention"], "max_window_layers": 2}, 16),
    ],
)
def test_a_window_counts_when_some_layer_applies_it(changes: dict[str, Any], window: int | None) -> None:
    config = parse(**changes)
    assert config.sliding_window == window
    raw = changed(QWEN3, **changes)
    layers = transformers_model(raw).model.layers
    used = [layer.self_attn.sliding_window for layer in layers]
    assert used == [window if kind == SLIDING else None for kind in config.layer_types]


def test_a_window_that_cuts_nothing_changes_nothing() -> None:
    import torch

    raw = changed(QWEN3, dtype="float32")
    plain, windowed = transformers_model(raw), transformers_model(changed(raw, **WINDOWED))
    windowed.load_state_dict(plain.state_dict())
    for tokens, same in ((16, True), (17, False)):
        ids = torch.arange(tokens)[None] + 5
        with torch.no_grad():
            assert torch.equal(plain(ids).logits, windowed(ids).logits) == same


@pytest.mark.parametrize("tokens", [0, -1, MAX_TOKENS + 1])
def test_a_sequence_of_impossible_length_is_refused(tokens: int) -> None:
    with pytest.raises(InputError):
        parse().check_length(tokens)


def test_a_sequence_may_exceed_the_trained_length() -> None:
    parse().check_length(513)
    parse().check_length(MAX_TOKENS)


# -- parameters ------------------------------------------------------------------------------------------------

SHAPE_CASES = {
    "qwen3": QWEN3,
    "qwen3, untied": changed(QWEN3, tie_word_embeddings=False),
    "qwen3, biases": changed(QWEN3, attention_bias=True),
    "qwen3, head_dim by default": changed(QWEN3, head_dim=ABSENT, num_hidden_layers=1),
    "qwen3, one head, one layer": changed(QWEN3, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1),
    "qwen2": QWEN2,
    "qwen2, untied": changed(QWEN2, tie_word_embeddings=False, num_hidden_layers=11),
    "qwen2, head_dim": changed(QWEN2, head_dim=32, num_key_value_heads=4),
    "qwen2, attention_bias ignored": changed(QWEN2, attention_bias=False),
}


@pytest.mark.parametrize("case", SHAPE_CASES)
def test_parameters_are_those_of_transformers_in_state_dict_order(case: str) -> None:
    raw = SHAPE_CASES[case]
    state = transformers_model(raw).state_dict()
    assert list(parameter_shapes(parse_config(raw, "config.json")).items()) == [
        (name, tuple(tensor.shape)) for name, tensor in state.items()
    ]


def transformers_model(raw: dict[str, Any], *, rotary_only: bool = False) -> Any:
    """The real class, randomly initialised; the config goes through JSON as a file would."""
    import torch
    import transformers
    from transformers.models.qwen2 import modeling_qwen2
    from transformers.models.qwen3 import modeling_qwen3

    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(raw)))
    if rotary_only:
        rotary = (
            modeling_qwen3.Qwen3RotaryEmbedding if raw["model_type"] == "qwen3" else modeling_qwen2.Qwen2RotaryEmbedding
        )
        return rotary(config)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def test_the_golden_config_is_read() -> None:
    path = ROOT.parent / "shared/golden/trinity-tiny/model/config.json"
    if not path.is_file():
        pytest.skip(f"no golden data at {path}")
    config = parse_config(json.loads(path.read_text()), str(path))
    assert (config.family, config.hidden_size, config.head_dim, config.vocab_size) == ("qwen3", 64, 32, 512)
    assert len(parameter_shapes(config)) == 4 * 11 + 3
