"""Faults in RoPE's tables and in norms."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stages.selftest.fault import (
    FLOAT32,
    Call,
    Fault,
    bfloat16,
    float16,
    float32,
)
from stages.selftest.making import (
    BFLOAT16,
    QWEN3,
    Plant,
    another,
    heads_of,
    narrow_first,
    of_operands,
    scaled,
    then,
    with_options,
)

NORMS = ("attn_norm", "ffn_norm", "final_norm")
HEAD_NORMS = ("q_norm", "k_norm")


def _tables() -> Iterator[Fault]:
    yield Fault("theta 1e4 for 1e6", ("inv_freq",), "rope_theta of another model", with_options(rope_theta=1e4))
    yield Fault(
        "theta x (1 + size)",
        ("inv_freq",),
        "rope_theta off by a relative `size`",
        lambda call: call.of(rope_theta=call.options["rope_theta"] * (1 + call.size)),
        size=1.2e-05,
    )
    yield Fault("inv_freq in bfloat16", ("inv_freq",), "the buffer was cast with the model", then(bfloat16))
    yield Fault("inv_freq in float16", ("inv_freq",), "the buffer was cast with the model", then(float16))
    yield Fault(
        "inv_freq of twice the head_dim",
        ("inv_freq",),
        "exponents 2i / 2d",
        lambda call: call.of(head_dim=2 * call.options["head_dim"])[: call.options["head_dim"] // 2],
    )
    yield Fault(
        "positions from the end", ("rope_angle",), "as if padded on the left", of_operands(lambda f, p: (f, p[::-1]))
    )
    yield Fault(
        "positions past a cache",
        ("rope_angle",),
        "from token 12 on one too few",
        of_operands(lambda f, p: (f, p - (p >= 12))),
    )
    yield Fault(
        "frequencies in pairs",
        ("rope_angle",),
        "each twice in a row, not the halves",
        another(lambda f, p: p[:, None] * np.repeat(f, 2)),
    )
    yield Fault("angle in bfloat16", ("rope_angle",), "positions past 256 are lost", then(bfloat16))
    yield Fault("cos for sin", ("rope_sin",), "the tables are swapped", another(lambda angle: np.cos(angle)))
    yield Fault("sin turned", ("rope_sin",), "the other sign", then(lambda r: -r))
    yield Fault("angle in degrees", ("rope_cos",), "180 for pi", another(lambda angle: np.cos(angle * np.pi / 180)))
    yield Fault(
        "cos of a bfloat16 angle",
        ("rope_cos", "rope_sin"),
        "the cast comes before the cosine",
        of_operands(lambda angle: (bfloat16(angle),)),
    )
    yield Fault(
        "table x (1 + size)",
        ("rope_cos", "rope_sin"),
        "an attention factor that is not there",
        lambda call: call.of(attention_scaling=call.options["attention_scaling"] * (1 + call.size)),
        on=FLOAT32,
        size=5e-07,
    )


def _normed(x: np.ndarray, axis: int | tuple[int, ...] = -1) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=axis, keepdims=True) + np.float32(1e-6))


def _layer_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return _normed(x - x.mean(axis=-1, keepdims=True)) * weight


def _eps_outside(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / (np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) + np.float32(1e-6)) * weight


def _half(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    half = x[..., : x.shape[-1] // 2]
    return x / np.sqrt(np.mean(half * half, axis=-1, keepdims=True) + np.float32(1e-6)) * weight


def _norms() -> Iterator[Fault]:
    for name, on in (("quiet", 4e-4), ("plain", 0.6), ("loud", 4.4)):
        yield Fault(
            f"eps 1e-5 for 1e-6, {name}",
            ("attn_norm", "ffn_norm"),
            f"at mean x^2 = {on:g}",
            with_options(eps=1e-5),
            on=(name,),
        )
    yield Fault("eps x (1 + size)", NORMS, "at mean x^2 = 4e-4", _other_eps, on=("quiet",), size=0.0008)
    yield Fault("no eps", NORMS, "at mean x^2 = 4e-4", with_options(eps=0.0), on=("quiet",))
    yield Fault("eps outside the root", NORMS, "at mean x^2 = 4e-4", another(_eps_outside), on=("quiet",))
    yield Fault("norm missing", NORMS, "its input passes", another(lambda x, w: x))
    yield Fault("norm without division", NORMS, "times the weight alone", another(lambda x, w: x * w))
    yield Fault("norm's weight missing", (*NORMS,), "as if all ones", of_operands(lambda x, w: (x, np.ones_like(w))))
    yield Fault("norm's weight 1 + w", NORMS, "as in Gemma", of_operands(lambda x, w: (x, 1 + float32(w))))
    yield Fault("norm's weight shifted", NORMS, "by one column", of_operands(lambda x, w: (x, np.roll(w, 1))))
    yield Fault("LayerNorm for RMSNorm", NORMS, "the mean is subtracted", another(_layer_norm))
    yield Fault("norm over the tokens", NORMS, "the other axis", another(lambda x, w: _normed(x, 0) * w))
    yield Fault("norm over everything", NORMS, "one number for all rows", another(lambda x, w: _normed(x, (0, 1)) * w))
    yield Fault("norm of half the columns", NORMS, "the mean is of the first half", another(_half))
    yield Fault(
        "mean over K - 1",
        NORMS,
        "a variance's denominator",
        lambda call: float32(call.right()) * np.sqrt(1 - 1 / call.arguments[0].shape[-1], dtype=np.float32),
    )
    yield Fault("norm's input in bfloat16", NORMS, "float32 was declared", narrow_first(bfloat16), on=FLOAT32)
    yield Fault("norm x (1 + size)", NORMS, "a constant factor", scaled, on=FLOAT32, size=8e-07)
    yield Fault(
        "norm x (1 + size), bfloat16",
        NORMS,
        "before it is rounded",
        lambda call: bfloat16(_normed(float32(call.arguments[0]))) * float32(call.arguments[1]) * (1 + call.size),
        on=BFLOAT16,
        size=1e-3,
    )
    yield Fault("norm of the row above", NORMS, "rows are divided by a neighbour's root", _neighbours_root)
    for stage, part in zip(HEAD_NORMS, (0, 1), strict=True):
        yield Fault(f"{stage} missing", (stage,), "queries or keys pass", _unnormed(part), on=QWEN3)
    yield Fault("head norms over all heads", HEAD_NORMS, "not head by head", _joined_norm, on=QWEN3)


def _other_eps(call: Call) -> np.ndarray:
    return call.of(eps=call.options["eps"] * (1 + call.size))


def _neighbours_root(call: Call) -> np.ndarray:
    x, weight = map(float32, call.arguments)
    root = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(1e-6))
    return x / np.roll(root, 1, axis=0) * weight


def _unnormed(part: int) -> Plant:
    return lambda call: heads_of(call, part)


def _joined_norm(call: Call) -> np.ndarray:
    right = call.right()
    part = 0 if right.shape[1] == call.options["heads"] else 1
    return _normed(heads_of(call, part), (-2, -1)) * float32(call.arguments[1])


NORM_FAULTS: tuple[Fault, ...] = (*_tables(), *_norms())
