"""Sums over tensor-parallel ranks, whose partial sums travel in bfloat16: named where right, a bug where not."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import numpy as np
import pytest
from recorded_models import recorded
from tensor_core import STORED, Array, stored

from stages.oracle.verdict import Oracle, Verdict
from stages.recipes.product import _in_orders
from stages.recipes.side import SideVerdict

MODEL = "qwen3-bias"  # its attn_out has a bias, its ffn_out has none
COUNT = 24
RANKS = (2, 4, 8)
Add = Callable[[Array, Array], Array]


def ring(parts: list[Array], add: Add) -> Array:
    """gloo's: of the flat array's i-th piece the sum begins with rank i - 1 and goes down."""
    pieces = [np.array_split(part.reshape(-1), len(parts)) for part in parts]
    done = [reduce(add, [pieces[i - 1 - n][i] for n in range(len(parts))]) for i in range(len(parts))]
    return np.concatenate(done).reshape(parts[0].shape)


def tree(parts: list[Array], add: Add) -> Array:
    while len(parts) > 1:
        parts = [add(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


ORDERS: dict[str, Callable[[list[Array], Add], Array]] = {
    "as ranked": lambda parts, add: reduce(add, parts),
    "reversed": lambda parts, add: reduce(add, parts[::-1]),
    "ring": ring,
    "tree": tree,
}


def partials(x: Array, w: Array, ranks: int, shift: int = 0) -> list[Array]:
    """Of each rank, stored in bfloat16; `shift`: the weight's columns are those of another rank."""
    slices = np.array_split(np.arange(x.shape[1]), ranks)
    weights = np.roll(np.arange(ranks), -shift)
    return [stored(x[:, at] @ w[:, slices[n]].T, "bfloat16") for at, n in zip(slices, weights, strict=True)]


def operands(oracle: Oracle) -> tuple[Array, Array, Array]:
    x, w, *bias = (a.astype(np.float32) for a in oracle.arguments)
    return x, w, bias[0] if bias else np.zeros(len(w), np.float32)


def in_bfloat16(a: Array, b: Array) -> Array:
    return stored(a + b, "bfloat16")


def judged(oracle: Oracle, result: Array) -> SideVerdict:
    side = SideVerdict()
    side.add(oracle, result.astype(STORED[oracle.stage.dtype]))
    return side


@pytest.mark.parametrize("stage", ["attn_out", "ffn_out"])
@pytest.mark.parametrize("added", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", RANKS)
def test_a_right_sum_over_ranks_is_named(ranks: int, added: str, stage: str) -> None:
    oracle = recorded(MODEL, "bfloat16", COUNT).oracle((1, stage))
    x, w, bias = operands(oracle)
    for order, total in ORDERS.items():
        sums = total(partials(x, w, ranks), in_bfloat16 if added == "bfloat16" else np.add)
        side = judged(oracle, stored(stored(sums, "bfloat16") + bias, "bfloat16"))
        assert side.verdict is Verdict.PRECISION, (order, side)
        assert f"partial sums of {ranks} slices of K rounded to bfloat16" in (side.recipe or ""), (order, side)
        assert side.usual, order


@pytest.mark.parametrize("ranks", RANKS)
def test_a_float32_run_summed_in_bfloat16_is_named(ranks: int) -> None:
    oracle = recorded(MODEL, "float32", COUNT).oracle((1, "ffn_out"))
    x, w, _ = operands(oracle)
    for order, total in ORDERS.items():
        side = judged(oracle, total(partials(x, w, ranks), in_bfloat16))
        assert side.verdict is Verdict.PRECISION, (order, side)
        assert f"partial sums of {ranks} slices of K rounded to bfloat16" in (side.recipe or ""), (order, side)


# What a rank does wrong: of its partial sums, of their sum, and of the bias that is added.
FAULTS: dict[str, Callable[[Array, Array, Array, int], Array]] = {
    "a rank left out": lambda x, w, bias, n: reduce(in_bfloat16, partials(x, w, n)[:-1]) + bias,
    "the bias on every rank": lambda x, w, bias, n: reduce(in_bfloat16, [p + bias for p in partials(x, w, n)]),
    "reduced twice": lambda x, w, bias, n: n * reduce(in_bfloat16, partials(x, w, n)) + bias,
    "columns of the next rank": lambda x, w, bias, n: reduce(in_bfloat16, partials(x, w, n, shift=1)) + bias,
}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_sum_over_ranks_is_a_bug(fault: str, ranks: int) -> None:
    for stage in ("attn_out", "ffn_out"):
        oracle = recorded(MODEL, "bfloat16", COUNT).oracle((1, stage))
        x, w, bias = operands(oracle)
        if bias.any() or "bias" not in fault:
            side = judged(oracle, stored(FAULTS[fault](x, w, bias, ranks), "bfloat16"))
            assert side.verdict is Verdict.BUG, (stage, side)


@pytest.mark.parametrize("count", range(3, 9))
def test_trees_of_any_number_of_partial_sums_have_them_all(count: int) -> None:
    """Of an odd number the last one waits for the next round."""
    x = np.random.default_rng(count).standard_normal((count, 3, 2, 5))
    sums = _in_orders(x, "float32")
    assert len(sums) == 2 * count + 2  # a ring from each rank, either way, and two trees
    np.testing.assert_allclose(sums, np.broadcast_to(x.sum(axis=0), sums.shape), rtol=1e-5, atol=1e-5)
