"""Faults of a size, each at the smallest that is claimed to be found, and the smallest change there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from stages.selftest.fault import BUNDLE, FLOAT32, REPLAY, Call, Fault, Load, bfloat16, float32, next_value, typical
from stages.selftest.making import BFLOAT16, Plant, scaled

NORMS = ("attn_norm", "ffn_norm", "final_norm")
LINEAR = ("attn_out", "ffn_gate", "ffn_up", "ffn_out", "lm_head")
PRODUCTS = ("qkv_matmul", *LINEAR)
SUMS = ("post_attn_residual", "post_ffn_residual")
REPLAYED = ("matmul_pre_norm", "zero_source_f32")
EXACT_REPLAYED = ("scaled_s", "u_scaled", "adapted_source_f32", "final_f32", "final_bf16")


def with_more(option: str) -> Plant:
    """The right function of one option times 1 + size."""
    return lambda call: call.of(**{option: call.options[option] * (1 + call.size)})


def of_more(place: int, *, one: bool = False) -> Plant:
    """The right function of one operand times 1 + size, or of `one` of its elements so."""

    def plant(call: Call) -> np.ndarray:
        arguments = list(call.arguments)
        changed = float32(arguments[place]).copy()
        at = typical(changed, call.rng) if one else ...
        changed[at] *= np.float32(1 + call.size)
        arguments[place] = changed
        return call.of(*arguments)

    return plant


def _norm_before_rounding(call: Call) -> np.ndarray:
    x, weight = map(float32, call.arguments)
    normed = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(1e-6))
    return bfloat16(normed) * weight * np.float32(1 + call.size)


def _product_before_rounding(call: Call) -> np.ndarray:
    x, weight = map(float32, call.arguments)
    return x @ weight.T * np.float32(1 + call.size)


def _one_element(call: Call) -> np.ndarray:
    right = float32(call.right())
    right[typical(right, call.rng)] += call.size * float(np.sqrt(np.mean(right * right)))
    return right


def _late(call: Call) -> np.ndarray:
    right = float32(call.right())
    right[12:] *= np.float32(1 + call.size)
    return right


def _next(call: Call) -> np.ndarray:
    right = call.right()
    return next_value(right, typical(right, call.rng))


def put(value: float) -> Plant:
    def plant(call: Call) -> np.ndarray:
        right = call.right()
        right[typical(right, call.rng)] = value
        return right

    return plant


def _loaded(load: Load) -> np.ndarray:
    array = load.right()
    place = typical(array, load.rng)
    array[place] = array[place].astype(np.float32) * np.float32(1 + load.size)
    return array


# Name, where, of what, how it is planted, its size.
Sized = tuple[str, tuple[str, ...], str, Callable[[Call], np.ndarray], float]


def _in_float32() -> Iterator[Sized]:
    yield "table x (1 + size)", ("rope_cos", "rope_sin"), "an attention factor", with_more("attention_scaling"), 5e-07
    yield "norm x (1 + size)", NORMS, "a constant factor", scaled, 8e-07
    yield "turned x (1 + size)", ("q_post_rope", "k_post_rope"), "a constant factor", scaled, 6e-07
    yield "scale x (1 + size)", ("attn_scores",), "a constant factor", with_more("scaling"), 5e-06
    yield "temperature 1 + size", ("attn_softmax",), "scores are scaled once more", of_more(0), 6e-07
    yield "attention x (1 + size)", ("attention",), "a constant factor", scaled, 4e-06
    yield "product x (1 + size)", PRODUCTS, "a constant factor", scaled, 8e-06
    yield "weight element x (1 + size)", PRODUCTS, "one of the larger half", of_more(1, one=True), 6e-05
    yield "result element + size", PRODUCTS, "of the result's RMS", _one_element, 1.5e-05
    yield "product past token 12", PRODUCTS, "a factor of 1 + size", _late, 8e-06
    yield "block x (1 + size)", SUMS, "scaled before it is added", of_more(1), 1.2e-07
    yield "silu x (1 + size)", ("ffn_silu",), "a constant factor", scaled, 1e-06


def _in_bfloat16() -> Iterator[Sized]:
    yield "norm x (1 + size), bfloat16", NORMS, "before it is rounded", _norm_before_rounding, 1e-3
    yield "product x (1 + size), bfloat16", LINEAR, "before it is rounded", _product_before_rounding, 1e-3


def _in_replays() -> Iterator[Sized]:
    yield "normalization x (1 + size)", ("normalization",), "a constant factor", scaled, 3e-6
    yield "replay x (1 + size)", REPLAYED, "a constant factor", scaled, 5e-6
    yield "element of V x (1 + size)", REPLAYED, "one of the larger half", of_more(-1, one=True), 2.5e-5


def _faults() -> Iterator[Fault]:
    for rows, path, on in (
        (_in_float32, "forward", FLOAT32),
        (_in_bfloat16, "forward", BFLOAT16),
        (_in_replays, REPLAY, BUNDLE),
    ):
        for name, at, doc, plant, size in rows():
            yield Fault(name, at, doc, plant, path=path, on=on, size=size)
    yield Fault("theta x (1 + size)", ("inv_freq",), "off by a relative size", with_more("rope_theta"), size=1.2e-05)
    yield Fault("eps x (1 + size)", NORMS, "at mean x^2 = 4e-4", with_more("eps"), on=("quiet",), size=0.0008)
    matrices = tuple(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
    yield Fault("loaded element x (1 + size)", matrices, "in reading", load=_loaded, on=FLOAT32, size=6e-05)
    exact = ("rope_angle", "embedding", *SUMS, "ffn_swigl")
    yield Fault("one element + 1 ulp", exact, "the smallest change there is", _next)
    yield Fault("one element of the replay + 1 ulp", EXACT_REPLAYED, "the same", _next, path=REPLAY, on=BUNDLE)
    anywhere = (*PRODUCTS, *NORMS, "k_post_rope", "attn_scores", "attention")
    yield Fault("one NaN", anywhere, "a single element", put(np.nan))
    yield Fault("one infinity", anywhere, "a single element", put(np.inf))


SIZED: tuple[Fault, ...] = tuple(_faults())
