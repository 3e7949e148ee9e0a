"""Faults in products with weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from stages.selftest.fault import (
    FLOAT32,
    Call,
    Fault,
    bfloat16,
    cut,
    float16,
    float32,
    typical,
)
from stages.selftest.making import (
    BFLOAT16,
    QWEN2,
    QWEN3,
    Plant,
    all_operands,
    narrow_first,
    of_operands,
    scaled,
    then,
)

LINEAR = ("attn_out", "ffn_gate", "ffn_up", "ffn_out", "lm_head")


def _products() -> Iterator[Fault]:
    products = ("qkv_matmul", *LINEAR)
    for name, narrow in (("TF32", cut), ("bfloat16", bfloat16), ("float16", float16)):
        doc = f"operands of a product through {name}"
        yield Fault(f"product in {name}", products, doc, all_operands(narrow), on=FLOAT32)
    yield Fault("input in bfloat16", products, "activations alone were cast", narrow_first(bfloat16), on=FLOAT32)
    yield Fault("result in bfloat16", products, "float32 was declared", then(bfloat16), on=FLOAT32)
    yield Fault("partial sums in bfloat16", LINEAR, "two halves of K, rounded and added", _halves, on=FLOAT32)
    yield Fault("last term of K missing", products, "a loop ends too soon", _without_last_term)
    yield Fault("one output row of zeros", products, "a channel is dead", _dead_row)
    yield Fault("output columns shifted", products, "by one", then(lambda r: np.roll(r, 1, axis=-1)))
    yield Fault("product x (1 + size)", products, "a constant factor", scaled, on=FLOAT32, size=8e-06)
    yield Fault(
        "product x (1 + size), bfloat16",
        LINEAR,
        "before it is rounded",
        _scaled_before_rounding,
        on=BFLOAT16,
        size=1e-3,
    )
    yield Fault(
        "weight element x (1 + size)",
        products,
        "one of the larger half",
        _one_weight,
        on=FLOAT32,
        size=6e-05,
    )
    yield Fault("result element + size", products, "of the result's RMS", _one_element, on=FLOAT32, size=1.5e-05)
    yield Fault("product past token 12", products, "a factor of 1 + size", _late, on=FLOAT32, size=8e-06)
    yield Fault("rows repeated", products, "each token's row is the one before", then(lambda r: np.roll(r, 1, axis=0)))
    yield Fault("k_proj transposed", ("qkv_matmul",), "a square weight", _turned(2), on=QWEN3)
    yield Fault("v_proj transposed", ("qkv_matmul",), "a square weight", _turned(3), on=QWEN3)
    yield Fault("o_proj transposed", ("attn_out",), "a square weight", _turned(1), on=QWEN2)
    yield Fault(
        "k and v swapped", ("qkv_matmul",), "read in the wrong order", of_operands(lambda x, q, k, v: (x, q, v, k))
    )
    yield Fault("q, k, v by heads", ("qkv_matmul",), "joined as k, q, v", _other_join)
    biased = ("qkv_bias",)
    yield Fault("biases missing", biased, "all three", _biases(lambda q, k, v: (0 * q, 0 * k, 0 * v)), on=QWEN2)
    yield Fault("k bias missing", biased, "one of three", _biases(lambda q, k, v: (q, 0 * k, v)), on=QWEN2)
    yield Fault("v bias is the k bias", biased, "one of three", _biases(lambda q, k, v: (q, k, k)), on=QWEN2)
    yield Fault(
        "bias added twice", biased, "in the product and after", _biases(lambda q, k, v: (2 * q, k, v)), on=QWEN2
    )


def _scaled_before_rounding(call: Call) -> np.ndarray:
    x, weight = map(float32, call.arguments)
    return x @ weight.T * np.float32(1 + call.size)


def _halves(call: Call) -> np.ndarray:
    x, weight = map(float32, call.arguments)
    half = x.shape[-1] // 2
    return bfloat16(x[:, :half] @ weight[:, :half].T) + bfloat16(x[:, half:] @ weight[:, half:].T)


def _without_last_term(call: Call) -> np.ndarray:
    x = call.arguments[0].copy()
    x[:, -1] = 0
    return call.of(x, *call.arguments[1:])


def _dead_row(call: Call) -> np.ndarray:
    right = call.right()
    right[:, int(call.rng.integers(right.shape[-1]))] = 0
    return right


def _one_weight(call: Call) -> np.ndarray:
    weight = float32(call.arguments[1]).copy()
    weight[typical(weight, call.rng)] *= 1 + call.size
    return call.of(call.arguments[0], weight, *call.arguments[2:])


def _one_element(call: Call) -> np.ndarray:
    right = float32(call.right())
    right[typical(right, call.rng)] += call.size * float(np.sqrt(np.mean(right * right)))
    return right


def _late(call: Call) -> np.ndarray:
    right = float32(call.right())
    right[12:] *= np.float32(1 + call.size)
    return right


def _turned(place: int) -> Plant:
    return lambda call: call.of(*(a.T if i == place else a for i, a in enumerate(call.arguments)))


def _other_join(call: Call) -> np.ndarray:
    q, k = (len(weight) for weight in call.arguments[1:3])
    right = call.right()
    return np.concatenate((right[:, q : q + k], right[:, :q], right[:, q + k :]), axis=-1)


def _biases(change: Callable[..., tuple[np.ndarray, ...]]) -> Plant:
    return lambda call: call.of(*call.arguments[:4], *change(*call.arguments[4:]))


PRODUCT_FAULTS: tuple[Fault, ...] = tuple(_products())
