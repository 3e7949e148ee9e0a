"""Inputs of products as ggml's kernels take them: its own quantisers, in C, give what is computed here."""

from __future__ import annotations

import ctypes
import dataclasses

import numpy as np
import pytest
from quantisers import ggml, quantised

from stages.commands.options import TakenTo
from stages.files.gguf_file import GgufTensor, block_sizes, least, values
from stages.judge.activations import CHOICES, settled
from stages.oracle.activations import D4, DS4, Q8_0, Q8_1, Q8_K, TAKEN, Blocks, Sums
from stages.oracle.bounds import LAMBDA
from stages.oracle.span import Value, Way, oracle_through
from stages.oracle.spread import Spread
from stages.oracle.verdict import Oracle, consult, measure
from stages.spec.forward import DECLARED

STORED = {"q8_0": ("q8_0", 34), "q8_k": ("q8_K", 292)}  # as ggml spells it, and bytes of a block


def by_ggml(blocks: Blocks, x: np.ndarray) -> np.ndarray:
    """`x` quantised and back by ggml's reference code, a row at a time."""
    name, width = STORED[blocks.name]
    out = np.empty_like(x)
    for row, back in zip(x, out, strict=True):
        held = np.empty(len(row) // blocks.size * width, np.uint8)
        for function, given, to in ((f"quantize_row_{name}_ref", row, held), (f"dequantize_row_{name}", held, back)):
            call = getattr(ggml(), function)
            call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
            call(given.ctypes.data, to.ctypes.data, len(row))
    return out


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-7, 1e-20, 300.0])
@pytest.mark.parametrize("blocks", [Q8_0, Q8_K], ids=str)
def test_ggml_gives_these_numbers(blocks: Blocks, scale: float) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((400, 512)) * scale).astype(np.float32)
    x[0], x[1], x[2] = 0, x[1, 0], np.float32(scale) * np.arange(512) / 2  # zeros, all equal, ties
    x[3, :256] = -np.abs(x[3, :256])
    least, middle, most = (end.astype(np.float32) for end in blocks.cell(x))
    found = by_ggml(blocks, x)
    assert ((least <= found) & (found <= most)).all()
    assert (found == middle).mean() > 0.9999
    assert (least != most).mean() < 1e-3


def kept_by_ggml(x: np.ndarray) -> np.ndarray:
    """The sums of blocks that ggml's reference code for Q8_1 keeps, and its scales: `[rows, blocks, 2]`."""
    held = np.empty((len(x), x.shape[1] // 32, 36), np.uint8)
    for row, out in zip(x, held, strict=True):
        call = ggml().quantize_row_q8_1_ref
        call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        call(row.ctypes.data, out.ctypes.data, len(row))
    return np.ascontiguousarray(held[..., :4]).view(np.float16)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0])
def test_ggml_keeps_these_sums(scale: float) -> None:
    x = (np.random.default_rng(3).standard_normal((300, 256)) * scale).astype(np.float32)
    x[0] = 0
    taken = Q8_1.cell(x)[1]
    sums = Q8_1.sums(x, taken, np.ones((1, 8)))
    assert sums is not None
    assert np.array_equal(sums.kept, kept_by_ggml(x)[..., 1].astype(np.float64))
    assert not sums.doubt.any()


def stored(kind: str, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """A weight as a type has it, and what its codes are counted from."""
    raw = quantised(kind, weight)
    tensor = GgufTensor("w", kind, weight.shape, *block_sizes()[kind], 0)
    return values(raw, kind), least(raw, tensor, 32)


# Of products of one token and of many what CUDA's kernels keep for these weights, and what that is called here.
CUDA = [("Q4_0", True, DS4), ("Q4_1", True, DS4), ("Q4_K", True, DS4), ("Q8_0", False, Q8_0), ("Q6_K", False, D4)]


@pytest.mark.parametrize(("kind", "summed", "blocks"), CUDA, ids=[case[0] for case in CUDA])
def test_products_as_cuda_computes_them(kind: str, summed: bool, blocks: Blocks) -> None:
    """`quantize_q8_1` and `vec_dot_*_q8_1` of ggml-cuda in numpy, float32 where they have it."""
    rng = np.random.default_rng(4)
    x, (weight, counted) = (
        rng.standard_normal((6, 512)).astype(np.float32),
        stored(kind, rng.standard_normal((40, 512))),
    )
    by_blocks = x.reshape(6, -1, 32)
    scale = np.abs(by_blocks).max(-1, keepdims=True) / np.float32(127)
    codes = np.trunc(by_blocks / scale + np.copysign(np.float32(0.5), by_blocks))
    scale = (scale if blocks is D4 else scale.astype(np.float16).astype(np.float32))[..., 0]
    sums = by_blocks.sum(-1).astype(np.float16).astype(np.float32)
    observed = np.zeros((6, 40), np.float32)
    for b in range(16):
        own = weight[:, 32 * b : 32 * b + 32].astype(np.float64)
        from_least = 0.0 if counted is None or not summed else counted[:, b]
        observed += ((codes[:, b] @ (own.T - from_least)) * scale[:, b, None]).astype(np.float32)
        observed += sums[:, b, None] * np.float32(from_least)
    for other in (Q8_0, Q8_1, DS4, D4):
        oracle = product(other.cell(x)[1].astype(np.float32), weight)
        oracle = dataclasses.replace(oracle, least={"w": lambda: counted})
        passes = measure(settled(oracle, other, x, observed), observed).verdict.passes
        same = other is blocks or (not summed and counted is None and (other.half, blocks.half) == (True, True))
        assert passes == same, other


def test_sums_that_err_move_a_product_within_their_variance() -> None:
    rng = np.random.default_rng(5)
    x, counted = rng.standard_normal((64, 256)), rng.standard_normal((16, 8))
    sums = Q8_1.sums(x, Q8_1.cell(x)[1], counted)
    assert isinstance(sums, Sums)
    moved = x + 1e-4 * rng.standard_normal(x.shape)
    others = Q8_1.sums(moved, Q8_1.cell(moved)[1], counted)
    assert isinstance(others, Sums)
    own = Q8_1.variance(x, np.full(x.shape, 1e-8)).reshape(64, 8, 32).sum(axis=-1)
    apart = np.abs(others.extra - sums.extra) / np.sqrt(sums.variance(own))
    assert 0.1 < np.sqrt(np.mean(apart**2)) < 3
    assert apart.max() < 10


def product(x: np.ndarray, weight: np.ndarray) -> Oracle:
    stage = dataclasses.replace(DECLARED["attn_out"], dtype="float32")
    return consult(stage, (x, weight), {})


def test_a_number_on_the_edge_is_what_the_record_says() -> None:
    rng = np.random.default_rng(1)
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 256), (64, 256)))
    x[:, 0] = 127.0  # the scale is 1
    x[1, [5, 9]] = 2.5, -7.5
    low, middle, most = Q8_K.cell(x)
    assert np.argwhere(low != most).tolist() == [[1, 5], [1, 9]]
    other = middle.copy()
    other[1, 5], other[1, 9] = most[1, 5], low[1, 9]
    for taken in (middle, other):
        observed = (taken @ weight.T.astype(np.float64)).astype(np.float32)
        oracle = settled(product(middle.astype(np.float32), weight), Q8_K, x, observed)
        assert measure(oracle, observed).verdict.passes
    wrong = observed.copy()
    wrong[1, 3] += 0.01
    oracle = settled(product(middle.astype(np.float32), weight), Q8_K, x, wrong)
    assert not measure(oracle, wrong).verdict.passes


@pytest.mark.parametrize("name", TAKEN)
def test_inputs_that_err_are_taken_to_others(name: str) -> None:
    """Products of what a right program may have had instead stay within ten of the standard deviations."""
    rng, taken = np.random.default_rng(2), TAKEN[name]
    x, weight = rng.standard_normal((64, 256)), rng.standard_normal((32, 256)).astype(np.float32)
    error = 1e-5 * np.abs(x)
    stage = dataclasses.replace(DECLARED["attn_out"], dtype="float32")
    way = Way(LAMBDA, np.dtype(np.float32), absolute=False, taken=taken)
    oracle = oracle_through(stage, [Value(x, Spread(error**2), np.inf)], [weight], {}, way)
    flips = 0
    for _ in range(20):
        other = (x + error * rng.standard_normal(x.shape)).astype(np.float32)
        held = taken.cell(other)[1]
        flips += int((np.abs(held - taken.cell(x)[1]) > 5 * error).sum())
        assert measure(oracle, (held @ weight.T.astype(np.float64)).astype(np.float32)).verdict.passes
    assert flips


def test_the_choices_of_the_command_are_these() -> None:
    assert tuple(TakenTo) == CHOICES
