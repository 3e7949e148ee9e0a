"""Numbers that a row leaves open are read off the record, and one factor is told only where it explains more."""

from __future__ import annotations

import numpy as np
import pytest
from recorded_models import recorded

from stages.oracle.rounding import round_once
from stages.recipes.match import explain
from stages.recipes.recipe import EVERY
from stages.selftest.rows import written

MODEL = "qwen3-gqa4"


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("eps", [0.03, 0.2])
def test_another_eps_is_the_one_that_no_value_excludes(dtype: str, eps: float) -> None:
    oracle = recorded(MODEL, dtype).oracle((1, "ffn_norm"))
    (row,) = (row for row in written(oracle, {"eps": eps}) if row.words == f"as if eps were {eps:g}, not 1e-06")
    found = explain(oracle, row.array)
    assert found is not None
    assert found.words == row.words


def test_a_factor_that_gives_fewer_bits_than_none_is_not_told() -> None:
    """Scores capped softly, far above most of them: a few are one unit less, which a factor of 0.997 would allow."""
    oracle = recorded(MODEL, "bfloat16").oracle((1, "attn_scores"))
    right = oracle.rounded.astype(np.float64)
    cap = 8 * np.abs(right).max()
    observed = round_once(cap * np.tanh(right / cap), oracle.rounded.dtype)
    assert 0 < np.count_nonzero(observed != oracle.rounded) < 0.1 * right.size
    found = explain(oracle, observed)
    assert found is None or "every value" not in found.words
