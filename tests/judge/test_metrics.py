"""Each metric against its formula in plain numpy, over any cut into chunks, and in a case where it must not pass."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from stages.files.tensorfile import sha256
from stages.judge import metrics
from stages.judge.metrics import Difference, PairHash, same_bits
from stages.oracle.residual import Residual

F32 = st.floats(-(2.0**60), 2.0**60, width=32)
# Few distinct values make ties, which decide nothing but must be ordered.
COARSE = st.sampled_from([np.float32(x) for x in (-1, 0, 1, 2)])


def plain(a: np.ndarray, b: np.ndarray, k: int) -> dict[str, Any]:
    """The metrics as their definitions read."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    d = np.abs(x - y)
    order = sorted(((-d[i], i) for i in np.ndindex(d.shape) if d[i]), key=lambda item: item)[:k]
    norms = math.sqrt(np.sum(x * x)) * math.sqrt(np.sum(y * y))
    return {
        "max_abs": d.max(),
        "max_abs_index": list(order[0][1]) if order else None,
        "max_abs_a": x[order[0][1]] if order else None,
        "max_abs_b": y[order[0][1]] if order else None,
        "mean_abs": d.mean(),
        "rms": math.sqrt(np.mean(d * d)),
        "rel_l2": math.sqrt(np.sum(d * d) / np.sum(x * x)) if x.any() else (math.inf if d.any() else 0.0),
        "cosine": float(np.sum(x * y) / norms) if norms else float(not x.any() and not y.any()),
        "std_ratio": y.std() / x.std() if x.std() else math.inf if y.std() else None,
        "dtype": a.dtype.name,
        "mismatched": int(sum(a[i].tobytes() != b[i].tobytes() for i in np.ndindex(a.shape))),
        "count": a.size,
        "byte_match": a.tobytes() == b.tobytes(),
        "nonfinite_a": 0,
        "nonfinite_b": 0,
        "top": [{"index": list(i), "abs": d[i], "a": x[i], "b": y[i]} for _, i in order],
    }


@st.composite
def pairs(draw: st.DrawFn, values: st.SearchStrategy = F32) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(arrays.array_shapes(min_dims=2, max_dims=2, max_side=8))
    a = draw(arrays.arrays(np.float32, shape, elements=values))
    b = draw(st.one_of(st.just(a.copy()), arrays.arrays(np.float32, shape, elements=values)))
    return a, b


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, float):
            assert found[name] == pytest.approx(value, rel=1e-12, abs=1e-300), name
        else:
            assert found[name] == value, name


@given(pair=st.one_of(pairs(), pairs(COARSE)), k=st.integers(1, 6))
def test_every_metric_is_its_formula(pair: tuple[np.ndarray, np.ndarray], k: int) -> None:
    difference = Difference(k)
    difference.add(*pair)
    same(difference.result(), plain(*pair, k))


@given(pair=st.one_of(pairs(), pairs(COARSE)), k=st.integers(0, 6), axis=st.integers(0, 1), data=st.data())
def test_merged_chunks_are_the_whole(
    pair: tuple[np.ndarray, np.ndarray], k: int, axis: int, data: st.DataObject
) -> None:
    a, b = pair
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, a.shape[axis] - 1)), max_size=3)))
    whole, merged = Difference(k), Difference(k)
    whole.add(a, b)
    start = 0
    for x, y in zip(np.split(a, cuts, axis), np.split(b, cuts, axis), strict=True):
        part = Difference(k)
        part.add(x, y, start, axis)
        merged.merge(part)
        start += x.shape[axis]
    same(merged.result(), whole.result())


@given(pair=pairs(COARSE), block=st.integers(1, 9))
@settings(max_examples=30)
def test_the_size_of_a_block_changes_nothing(pair: tuple[np.ndarray, np.ndarray], block: int) -> None:
    whole, blocks = Difference(3), Difference(3)
    whole.add(*pair)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_BLOCK", block)
        blocks.add(*pair)
    same(blocks.result(), whole.result())


@pytest.mark.parametrize("k", [0, 1, 3])
def test_top_k_are_the_largest_in_falling_order_and_ties_by_index(k: int) -> None:
    a = np.zeros((3, 4), np.float32)
    b = a.copy()
    b[2, 1], b[0, 3], b[1, 0], b[1, 1] = 5, -7, 5, 1
    difference = Difference(k)
    difference.add(a, b, start=10, axis=0)
    result = difference.result()
    assert [(t["index"], t["abs"]) for t in result["top"]] == [([10, 3], 7), ([11, 0], 5), ([12, 1], 5)][:k]
    # The largest is known even when no list is wanted.
    assert (result["max_abs"], result["max_abs_index"], result["max_abs_b"]) == (7, [10, 3], -7)


def test_an_offset_along_columns_moves_the_column() -> None:
    difference = Difference()
    difference.add(np.float32([[0, 0]]), np.float32([[0, 1]]), start=30, axis=1)
    assert difference.result()["max_abs_index"] == [0, 31]


A = np.float32([[1, 2], [3, 4]])
# What each metric must not call equal: (a, b, metric, value that would be a pass).
FAILS = {
    "max_abs": (A, A + np.float32([[0, 0], [0, 1]]), 0.0),
    "mean_abs": (A, A + np.float32([[0, 0], [0, 1]]), 0.0),
    "rms": (A, A + np.float32([[0, 0], [0, 1]]), 0.0),
    "rel_l2": (A, A * np.float32(1.001), 0.0),
    "cosine": (A, A.T.copy(), 1.0),
    "std_ratio": (A, A * np.float32(1.001), 1.0),
    "dtype": (A.astype(ml_dtypes.bfloat16), A.astype(ml_dtypes.bfloat16), "float32"),
    "mismatched": (A, A.T.copy(), 0),
    "byte_match": (np.float32([0.0]), np.float32([-0.0]), True),
    "nonfinite_a": (np.float32([np.nan]), np.float32([1]), 0),
    "nonfinite_b": (np.float32([1]), np.float32([np.inf]), 0),
    "max_abs_index": (A, A + np.float32([[0, 0], [0, 1]]), None),
    "max_abs_a": (A, A + np.float32([[0, 0], [0, 1]]), None),
    "max_abs_b": (A, A + np.float32([[0, 0], [0, 1]]), None),
    "count": (A, A, 0),
    "top": (A, A + np.float32([[0, 0], [0, 1]]), []),
}


@pytest.mark.parametrize("name", FAILS)
def test_every_metric_has_a_case_in_which_it_fails(name: str) -> None:
    a, b, passing = FAILS[name]
    difference = Difference()
    difference.add(a, b)
    assert difference.result()[name] != passing


def test_that_list_has_every_metric() -> None:
    assert set(FAILS) == set(Difference().result())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("equal", [True, False])
def test_nan_and_infinity_are_counted_and_poison_no_other_metric(value: float, equal: bool) -> None:
    a = np.float32([1, value, 3, 4])
    b = a.copy() if equal else np.float32([1, 2, value, 5])
    difference = Difference()
    difference.add(a, b)
    result = difference.result()
    assert (result["nonfinite_a"], result["nonfinite_b"]) == (1, 1)
    assert result["count"] == 4
    assert result["byte_match"] is equal
    assert all(math.isfinite(result[name]) for name in ("max_abs", "mean_abs", "rms", "rel_l2", "cosine"))
    assert result["max_abs"] == (0 if equal else 1)


def test_zeros() -> None:
    zero, one = np.zeros(3, np.float32), np.ones(3, np.float32)
    results = {}
    for name, pair in {"equal": (zero, zero), "a": (zero, one), "b": (one, zero)}.items():
        difference = Difference()
        difference.add(*pair)
        results[name] = difference.result()
    assert [results[n]["cosine"] for n in results] == [1.0, 0.0, 0.0]
    assert [results[n]["rel_l2"] for n in results] == [0.0, math.inf, 1.0]


def test_nothing_added_is_zero_elements() -> None:
    assert Difference().result()["count"] == 0
    assert Difference().result()["max_abs_index"] is None


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (4, 2), (0, 3)])
def test_same_bits_is_about_bits(dtype: Any, shape: tuple[int, ...]) -> None:
    a = np.full(shape, np.nan, np.float32).astype(dtype)
    assert same_bits(a, a.copy())
    if a.size:
        assert not same_bits(np.zeros(shape, dtype), -np.zeros(shape, dtype))
    assert not same_bits(a, a.astype(np.float64))
    assert not same_bits(a, a.reshape(1, *shape))


@given(data=st.data())
@settings(max_examples=40)
def test_pair_hashes_are_those_of_the_whole_arrays(data: st.DataObject) -> None:
    chunks = data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=5))
    a = [np.full((2, 3), x, np.float32) for x, _ in chunks]
    b = [np.full((2, 3), y, np.float32) for _, y in chunks]
    pair = PairHash()
    for x, y in zip(a, b, strict=True):
        pair.add(x, y, equal=same_bits(x, y))
    assert pair.digests() == (sha256(np.concatenate(a)), sha256(np.concatenate(b)))


def test_a_residual_is_the_frobenius_distance_over_chunks() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((50, 30)).astype(np.float32)
    r = w + rng.standard_normal((50, 30)).astype(np.float32) / 100
    residual = Residual()
    residual.add(w[:20], r[:20])
    residual.add(w[20:], r[20:])
    d = w.astype(np.float64) - r
    assert residual.max_abs == np.abs(d).max()
    assert residual.relative == pytest.approx(np.linalg.norm(d) / np.linalg.norm(w.astype(np.float64)), rel=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_residual_with_nan_is_no_residual_of_zero(value: float) -> None:
    residual = Residual()
    residual.add(np.ones(3, np.float32), np.float32([1, value, 1]))
    assert not residual.relative <= 1
    assert not residual.max_abs <= 1


def test_a_zero_source_with_a_zero_reconstruction_fits() -> None:
    for wrong, expected in ((0, 0.0), (1, math.inf)):
        residual = Residual()
        residual.add(np.zeros(3, np.float32), np.full(3, wrong, np.float32))
        assert residual.relative == expected


def test_a_residual_below_what_is_flushed_to_zero_is_no_misfit() -> None:
    """Weights next to the smallest float32 come back as zeros where XLA flushes; ordinary ones must not."""
    w = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    for scale, lost in ((1e-37, True), (1e-30, False), (1.0, False)):
        residual = Residual()
        residual.add(w * np.float32(scale), np.zeros_like(w))
        assert (residual.relative <= residual.bound(4)) == lost
