"""Faults in stages of the component replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from stages.selftest.fault import BUNDLE, REPLAY, Call, Fault, bfloat16, cut, float16, next_value, typical
from stages.selftest.making import Plant, another, of_operands, scaled, then

PRODUCTS = ("matmul_pre_norm", "zero_source_f32")
EXACT = ("scaled_s", "u_scaled", "adapted_source_f32", "final_f32")


def _of_v(change: Callable[[np.ndarray], np.ndarray]) -> Plant:
    return lambda call: call.of(*call.arguments[:-1], change(call.arguments[-1]))


def _one_of_v(call: Call) -> np.ndarray:
    v = call.arguments[-1].copy()
    v[typical(v, call.rng)] *= np.float32(1 + call.size)
    return call.of(*call.arguments[:-1], v)


def _next(call: Call) -> np.ndarray:
    right = call.right()
    return next_value(right, typical(right, call.rng))


def _scaled_s() -> Iterator[tuple[str, tuple[str, ...], str, Plant]]:
    at = ("scaled_s",)
    yield "offsets off by one", at, "the slice begins one late", of_operands(lambda z, s: (np.roll(z, -1), s))
    yield (
        "another tensor's offsets",
        at,
        "a wrong place in the vector",
        lambda c: c.of(c.rng.permutation(c.arguments[0]), c.arguments[1]),
    )
    yield "S x offsets", at, "the 1 + is missing", another(lambda z, s: s * z)
    yield "S + offsets", at, "a sum", another(lambda z, s: s + z)
    yield "S exp(offsets)", at, "another parametrisation", another(lambda z, s: s * np.exp(z))
    yield "offsets missing", at, "S itself", another(lambda z, s: s)
    yield "offsets in bfloat16", at, "float32 was declared", of_operands(lambda z, s: (bfloat16(z), s))
    yield "singular values reversed", at, "ascending", of_operands(lambda z, s: (z, s[::-1]))
    at = ("normalization",)
    yield "no normalization", at, "it is 1", another(lambda t, s: np.ones(1, np.float32))
    yield "normalization upside down", at, "the inverse", another(lambda t, s: np.array([t.sum() / s.sum()]))
    yield "mean for sum", at, "in the denominator", another(lambda t, s: np.array([s.sum() / t.mean()]))
    yield (
        "norms for sums",
        at,
        "Frobenius norms",
        another(lambda t, s: np.array([np.linalg.norm(s) / np.linalg.norm(t)])),
    )
    yield "normalization in bfloat16", at, "float32 was declared", then(bfloat16)
    yield (
        "normalization without the last",
        at,
        "a sum ends too soon",
        of_operands(lambda t, s: (t * (np.arange(t.size) < t.size - 1), s)),
    )
    at = ("u_scaled",)
    yield "U not scaled", at, "U itself", another(lambda t, u: u)
    yield (
        "columns of U in another order",
        at,
        "two singular vectors swapped",
        of_operands(lambda t, u: (t, _swapped(u, 1))),
    )
    yield "U scaled in float16", at, "float32 was declared", then(float16)


def _swapped(x: np.ndarray, axis: int) -> np.ndarray:
    order = np.arange(x.shape[axis])
    order[:2] = 1, 0
    return np.take(x, order, axis)


def _products() -> Iterator[tuple[str, tuple[str, ...], str, Plant]]:
    yield "V in another order", PRODUCTS, "two singular vectors swapped", _of_v(lambda v: _swapped(v, 1))
    yield "rank one less", PRODUCTS, "the first term is missing", _of_v(lambda v: v * (np.arange(v.shape[1]) > 0))
    yield "replay in TF32", PRODUCTS, "operands truncated", lambda c: c.of(*map(cut, c.arguments))
    yield "replay in bfloat16", PRODUCTS, "operands cast", lambda c: c.of(*map(bfloat16, c.arguments))
    yield "V in bfloat16", PRODUCTS, "one operand cast", _of_v(bfloat16)
    yield "product through float16", PRODUCTS, "the result", then(float16)
    yield (
        "rows of a chunk repeated",
        PRODUCTS,
        "off by one from row 16 on",
        then(lambda r: np.concatenate((r[:16], r[15:-1]))),
    )
    yield (
        "a sign of V",
        PRODUCTS,
        "one singular vector turned",
        _of_v(lambda v: v * np.where(np.arange(v.shape[1]) == 1, -1, 1)),
    )
    at = ("adapted_source_f32",)
    yield "not normalized", at, "the product passes", another(lambda p, n: p)
    yield "divided by the normalization", at, "the inverse", another(lambda p, n: p / n)
    yield "normalized twice", at, "a factor too many", another(lambda p, n: p * n * n)
    yield "adapted in bfloat16", at, "float32 was declared", then(bfloat16)
    at = ("final_bf16",)
    yield "bfloat16 towards zero", at, "the lower half word dropped", lambda c: cut(c.arguments[0], 7)
    yield "rounded twice", at, "through float16's 10 bits", lambda c: bfloat16(float16(c.arguments[0]))
    yield "rounded at random", at, "stochastically", _at_random
    yield "one element of the replay + 1 ulp", (*EXACT, "final_bf16"), "the smallest change there is", _next


def _at_random(call: Call) -> np.ndarray:
    words = np.ascontiguousarray(call.arguments[0]).view(np.uint32)
    noise = call.rng.integers(0, 1 << 16, words.shape, np.uint32)
    return cut((words + noise).view(np.float32), 7)


def _others() -> Iterator[Fault]:
    yield _fault("V read as nx", PRODUCTS, "V for V^T of a square tensor", _of_v(np.transpose), square=True)
    yield _fault("target transposed", ("final_f32",), "of a square tensor", then(np.transpose), square=True)
    yield _fault("normalization x (1 + size)", ("normalization",), "a constant factor", scaled, size=3e-6)
    yield _fault("replay x (1 + size)", PRODUCTS, "a constant factor", scaled, size=5e-6)
    yield _fault("element of V x (1 + size)", PRODUCTS, "one of the larger half", _one_of_v, size=2.5e-5)


def _fault(
    name: str, at: tuple[str, ...], doc: str, plant: Plant, *, size: float | None = None, square: bool = False
) -> Fault:
    return Fault(name, at, doc, plant, path=REPLAY, on=BUNDLE, size=size, square=square)


REPLAY_FAULTS: tuple[Fault, ...] = (*(_fault(*row) for row in (*_scaled_s(), *_products())), *_others())
