"""Inputs of products as ggml's kernels take them: its own quantisers, in C, give what is computed here."""

from __future__ import annotations

import ctypes
import dataclasses

import numpy as np
import pytest
from quantisers import ggml

from stages.commands.options import TakenTo
from stages.judge.activations import CHOICES, settled
from stages.oracle.activations import Q8_0, Q8_K, TAKEN, Blocks
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


def product(x: np.ndarray, weight: np.ndarray) -> Oracle:
    stage = dataclasses.replace(DECLARED["attn_out"], dtype="float32")
    return consult(stage, (x, weight), {})


def test_a_number_on_the_edge_is_what_the_record_says() -> None:
    rng = np.random.default_rng(1)
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 256), (64, 256)))
    x[:, 0] = 127.0  # the scale is 1
    x[1, [5, 9]] = 2.5, -7.5
    least, middle, most = Q8_K.cell(x)
    assert np.argwhere(least != most).tolist() == [[1, 5], [1, 9]]
    other = middle.copy()
    other[1, 5], other[1, 9] = most[1, 5], least[1, 9]
    for taken in (middle, other):
        observed = (taken @ weight.T.astype(np.float64)).astype(np.float32)
        oracle = settled(product(middle.astype(np.float32), weight), (least, middle, most), observed)
        assert measure(oracle, observed).verdict.passes
    wrong = observed.copy()
    wrong[1, 3] += 0.01
    oracle = settled(product(middle.astype(np.float32), weight), (least, middle, most), wrong)
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
