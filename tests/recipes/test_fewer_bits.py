"""Operands in fewer bits where a stage has more than those of its product."""

from __future__ import annotations

import numpy as np
from recorded_models import recorded

from stages.oracle.rounding import round_once
from stages.recipes.match import explain
from stages.recipes.recipe import Class
from stages.recipes.value import keep


def test_a_tensor_core_takes_a_products_operands_in_tf32_and_not_its_bias() -> None:
    oracle = recorded("qwen2", "float32").oracle((1, "qkv_bias"))
    x, *weights = (keep(a.astype(np.float64), 10, "truncate") if a.ndim == 2 else a for a in oracle.arguments)
    parts = [x @ w.T + bias for w, bias in zip(weights[:3], weights[3:], strict=True)]
    found = explain(oracle, round_once(np.concatenate(parts, axis=-1), np.dtype(np.float32)))
    assert found is not None
    assert found.kind is Class.NARROWER
    assert found.words == "its operands have 10 mantissa bits, TF32-like (truncated)"


def test_weights_read_in_bfloat16_beside_biases_that_were_not() -> None:
    oracle = recorded("qwen2", "float32").oracle((1, "qkv_bias"))
    x, q, k, v, *biases = (a.astype(np.float64) for a in oracle.arguments)
    weights = (q, k, keep(v, 7))
    parts = [x @ w.T + bias for w, bias in zip(weights, biases, strict=True)]
    found = explain(oracle, round_once(np.concatenate(parts, axis=-1), np.dtype(np.float32)))
    assert found is not None
    assert found.kind is Class.NARROWER
    assert found.words == "v_proj: its weights have 7 mantissa bits, bfloat16-like; its biases do not"
