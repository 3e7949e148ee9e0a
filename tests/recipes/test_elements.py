"""Elements of a weight: each planted one is named for what it is; errors of another kind are not taken for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from forward_models import MODELS, MemoryWeights, random_weights, tokens_of

from stages.judge.low_rank import explain_low_rank
from stages.oracle.components import ReferenceBackend
from stages.oracle.rounding import round_once
from stages.oracle.verdict import STAGES, Oracle, consult, judge
from stages.recipes.elements import Explanation, explain_elements, explain_rows, interval, shortest, stored_as
from stages.recipes.recorded_product import cell
from stages.run.forward import Forwarder, oracles, recorded_inputs
from stages.spec.dtypes import stored_dtype
from stages.spec.forward import forward_pipeline
from stages.spec.replay import REPLAY

DTYPES = ["float32", "bfloat16", "float16"]
# Stage -> which of its parameters is changed.
PRODUCTS = {"qkv_matmul": 1, "attn_out": 0, "ffn_gate": 0, "ffn_up": 0, "ffn_out": 0, "lm_head": 0}
Change = Callable[[np.ndarray], None]


@cache
def oracle_of(model: str, dtype: str, stage_name: str, count: int = 24) -> Oracle:
    """The oracle of a stage, of layer 1 where it has one, in a random model; of the first part of the vocabulary."""
    config = MODELS[model].config(dtype)
    path, weights, tokens = forward_pipeline(config), MemoryWeights(random_weights(config)), tokens_of(count)
    recorded = {(r.layer, r.stage): r.array for r in Forwarder(ReferenceBackend(), config, weights).run(tokens)}
    stage = path[stage_name]
    layer = 1 if stage.scope.value == "layer" else None
    inputs = recorded_inputs(path, stage, recorded, tokens, layer, 2)
    assert inputs is not None
    return next(oracle for _, oracle in oracles(path, config, stage, inputs, weights, layer))


def with_weight(oracle: Oracle, param: int, change: Callable[[np.ndarray], Any]) -> np.ndarray:
    """The stage's result, correctly rounded, with a weight changed in place."""
    at = len(oracle.stage.inputs) + param
    weight = oracle.arguments[at].astype(np.float32)
    change(weight)
    arguments = [weight.astype(a.dtype) if i == at else a for i, a in enumerate(oracle.arguments)]
    return round_once(STAGES[oracle.stage.name](*arguments, **oracle.options), oracle.rounded.dtype)


def step(value: float, dtype: np.dtype) -> float:
    return float(np.nextafter(np.array(value, dtype), np.array(np.inf * np.sign(value), dtype)))


def assign(place: Any, value: Any) -> Change:
    return lambda w: w.__setitem__(place, value(w) if callable(value) else value)


def kinds(w: np.ndarray, rng: np.random.Generator, dtype: np.dtype) -> Iterator[tuple[str, Change, str]]:
    """Each kind of wrong element or row: its name, the change, and the words wanted, N the weight's name."""
    j, i = int(rng.integers(1, w.shape[0] - 1)), int(rng.integers(1, w.shape[1] - 1))
    a, b = sorted(map(int, rng.choice(w.shape[1], 2, replace=False)))
    r, q = sorted(map(int, rng.choice(w.shape[0], 2, replace=False)))
    at = f"N[{j}, {i}]"
    yield "sign", assign((j, i), -w[j, i]), f"the sign of {at} is flipped"
    yield "zero", assign((j, i), 0), f"{at} is 0, not"
    yield "step", assign((j, i), step(w[j, i], dtype)), f"{at} differs by one {dtype.name} step"
    yield "exponent", assign((j, i), 4 * w[j, i]), f"{at} is 2^2 times"
    yield "left", assign((j, i), w[j, i - 1]), f"{at} equals its neighbour's on the left"
    yield "above", assign((j, i), w[j - 1, i]), f"{at} equals its neighbour's above"
    yield "another", assign((j, i), float(np.float32(0.7).astype(dtype))), f"{at} is "
    yield "swapped", assign((j, [a, b]), w[j, [b, a]]), f"N[{j}, {a}] and N[{j}, {b}] are swapped"
    yield "rows swapped", assign([r, q], w[[q, r]]), f"rows {r} and {q} of N are swapped"
    yield "another row", assign(r, w[q]), f"row {r} of N is row {q}'s"
    yield "row of zeros", assign(r, 0), f"row {r} of N is 0"
    yield "row scaled", assign(r, 1.25 * w[r]), f"row {r} of N is 1.25 times what it should be"
    yield "row negated", assign(r, -w[r]), f"row {r} of N has its sign flipped"


def planted(model: str, dtype: str, stage_name: str, param: int) -> Iterator[tuple[str, str, Oracle, np.ndarray]]:
    oracle = oracle_of(model, dtype, stage_name)
    weight = oracle.arguments[len(oracle.stage.inputs) + param].astype(np.float32)
    for kind, change, words in kinds(weight, np.random.default_rng(len(stage_name)), stored_dtype(dtype)):
        yield kind, words.replace("N", oracle.stage.params[param]), oracle, with_weight(oracle, param, change)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("model", "stage", "param"),
    [
        *(("qwen3-untied", name, p) for name, p in PRODUCTS.items()),
        ("qwen2", "qkv_bias", 2),
        ("qwen3-bias", "attn_out", 0),
    ],
)
def test_a_wrong_element_or_row_is_told_as_what_it_is(model: str, stage: str, param: int, dtype: str) -> None:
    for kind, words, oracle, observed in planted(model, dtype, stage, param):
        found = explain_elements(oracle, observed)
        if judge(oracle, observed)[0].passes:
            assert kind == "step"  # below the bound: nothing is wrong
            assert found is None
        elif kind == "step" and found is None:
            pass  # just beyond the bound at one token or two: not enough to tell which element
        else:
            assert found is not None, kind
            assert words in found.text, (kind, found)
            assert found.left <= 1
            assert found.next_best is None or found.next_best > 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_is_told_from_its_weight(dtype: str) -> None:
    oracle = oracle_of("qwen2", dtype, "qkv_bias")
    found = explain_elements(oracle, with_weight(oracle, 4, assign(7, lambda b: -b[7])))
    assert found is not None
    assert found.text == "the sign of self_attn.k_proj.bias[7] is flipped"


def test_elements_of_a_chunk_go_by_the_whole_weight_s_rows() -> None:
    oracle = oracle_of("qwen3-untied", "float32", "lm_head")
    found = explain_elements(oracle, with_weight(oracle, 0, assign((5, 9), lambda w: -w[5, 9])), start=128)
    assert found is not None
    assert found.text == "the sign of lm_head.weight[133, 9] is flipped"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda w: -w[5], "the sign of N[5] is flipped"),
        (lambda w: 0, "N[5] is 0, not"),
        (lambda w: w[4], "N[5] equals its neighbour's before"),
        (lambda w: 2 * w[5], "N[5] is 2^1 times"),
        (lambda w: 0.3125, "N[5] is "),
    ],
)
@pytest.mark.parametrize("stage", ["attn_norm", "k_norm", "final_norm"])
def test_an_element_of_a_norm_is_told_as_what_it_is(stage: str, value: Any, words: str, dtype: str) -> None:
    oracle = oracle_of("qwen3", dtype, stage)
    found = explain_elements(oracle, with_weight(oracle, 0, assign(5, value)))
    assert found is not None
    assert words.replace("N", oracle.stage.params[0]) in found.text
    assert found.left <= 1


def test_the_weight_of_a_replay_is_named_by_its_layout() -> None:
    rng = np.random.default_rng(2)
    u, v = rng.standard_normal((40, 12)).astype(np.float32), rng.standard_normal((20, 12)).astype(np.float32)
    wrong = v.copy()
    wrong[3, 7] *= -1
    for layout, stored, place in (("torch_v", lambda a: a, "V[3, 7]"), ("vh", lambda a: a.T.copy(), "V[7, 3]")):
        stage = REPLAY["matmul_pre_norm"]
        oracle = consult(stage, (u, stored(v)), {"layout": layout})
        out = consult(stage, (u, stored(wrong)), {"layout": layout}).rounded
        assert str(explain_elements(oracle, out)).startswith(f"the sign of {place} is flipped; that leaves 0")


# What is no element.


def unrelated(oracle: Oracle, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Results that are wrong in a column, or a row, in a way that no element or two of a weight explain."""
    j = int(rng.integers(oracle.value.shape[-1]))
    for size in (float(oracle.value.std()), 8 * float(np.median(oracle.bound))):
        out = oracle.value.copy()
        out[..., j] += size * rng.standard_normal(out[..., j].shape)
        yield round_once(out, oracle.rounded.dtype)
    out = oracle.value.copy()
    out[rng.integers(len(out))] += 0.1 * rng.standard_normal(out.shape[1:])
    yield round_once(out, oracle.rounded.dtype)
    if oracle.stage.name in PRODUCTS:
        many = rng.choice(oracle.arguments[-1].shape[1], 6, replace=False)
        row = int(rng.integers(len(oracle.arguments[-1])))
        scale = float(oracle.arguments[-1].astype(np.float32).std())
        yield with_weight(oracle, len(oracle.stage.params) - 1, assign((row, many), scale * rng.standard_normal(6)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 8, 24])
def test_an_unrelated_error_is_no_element(count: int, dtype: str) -> None:
    rng = np.random.default_rng(count)
    for stage in ("qkv_matmul", "ffn_up", "ffn_out", "attn_norm", "final_norm"):
        oracle = oracle_of("qwen3-untied", dtype, stage, count)
        for _ in range(4):
            for observed in unrelated(oracle, rng):
                assert explain_elements(oracle, observed) is None
                assert explain_low_rank(oracle, observed) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_results_in_another_order_have_no_explanation(dtype: str) -> None:
    oracle = oracle_of("qwen3-untied", dtype, "ffn_out")
    x, w = (a.astype(np.float32) for a in oracle.arguments)
    blocks = sum(x[:, at : at + 7] @ w[:, at : at + 7].T for at in reversed(range(0, x.shape[1], 7)))
    assert isinstance(blocks, np.ndarray)
    observed = blocks.astype(oracle.rounded.dtype)
    assert explain_elements(oracle, observed) is None
    assert explain_low_rank(oracle, observed) is None


# Low rank.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_a_lost_adaptation_is_told_by_its_rank(rank: int, dtype: str) -> None:
    oracle = oracle_of("qwen3-untied", dtype, "ffn_gate")

    def lose(weight: np.ndarray) -> None:
        rng = np.random.default_rng(1)
        left, right = rng.standard_normal((len(weight), rank)), rng.standard_normal((rank, weight.shape[1]))
        weight += (0.1 * left @ right).astype(np.float32)

    oracle = consult(oracle.stage, tuple(a.astype(stored_dtype(dtype)) for a in oracle.arguments), {})
    text = explain_low_rank(oracle, with_weight(oracle, 0, lose))
    assert text == f"as if mlp.gate_proj.weight lacked a matrix of low rank ({rank}), or had one too many"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_difference_of_full_rank_is_no_adaptation(dtype: str) -> None:
    oracle = oracle_of("qwen3-untied", dtype, "ffn_gate")
    rng = np.random.default_rng(1)
    for change in (
        lambda w: w.__iadd__(0.1 * rng.standard_normal(w.shape).astype(np.float32)),
        lambda w: w.__imul__(1.1),
        lambda w: w.__setitem__(slice(None), w[::-1].copy()),
    ):
        assert explain_low_rank(oracle, with_weight(oracle, 0, change)) is None


# Rows of the embedding.

NAME = "model.embed_tokens.weight"


def rows_said(wrong: Callable[[np.ndarray, np.ndarray], np.ndarray], dtype: str) -> str | None:
    weight = np.random.default_rng(0).standard_normal((90, 16)).astype(np.float32).astype(stored_dtype(dtype))
    tokens = np.array([3, 17, 3, 80, 41, 5])
    chunks = [(0, weight[:50]), (50, weight[50:])]
    return explain_rows(NAME, tokens, wrong(weight, tokens), weight[tokens], chunks)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_stands_in_the_place_of_an_embedding_s_row_is_told(dtype: str) -> None:
    def one(place: tuple[int, int], value: Any) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        def wrong(weight: np.ndarray, tokens: np.ndarray) -> np.ndarray:
            out = weight.copy()
            out[place] = value(weight)
            return out[tokens]

        return wrong

    assert rows_said(lambda w, t: w[t], dtype) is None
    assert rows_said(lambda w, t: w[t + 1], dtype) == "each wrong token has the row of its id +1"
    assert rows_said(lambda w, t: w[np.roll(t, 1)][np.arange(6)], dtype) is None or dtype
    assert rows_said(one((17, 0), lambda w: 0), dtype).startswith(f"{NAME}[17, 0] is 0, not")  # type: ignore[union-attr]
    assert rows_said(one((17, 3), lambda w: -w[17, 3]), dtype) == f"the sign of {NAME}[17, 3] is flipped"
    assert rows_said(one((17, slice(None)), lambda w: 0), dtype) == f"row 17 of {NAME} is 0"
    assert rows_said(one((80, slice(None)), lambda w: w[4]), dtype) == f"row 80 of {NAME} is row 4's"
    noise = np.random.default_rng(1).standard_normal(16)
    assert rows_said(one((80, slice(None)), lambda w: noise), dtype) is None


# The arithmetic.


def test_the_dtype_of_a_weight_is_the_narrowest_that_holds_it() -> None:
    x = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    for dtype in (ml_dtypes.bfloat16, np.float16, np.float32):
        assert stored_as(x.astype(dtype).astype(np.float32)) == np.dtype(dtype)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_a_cell_holds_what_rounds_to_its_number_and_nothing_else(dtype: Any) -> None:
    values = np.concatenate([np.random.default_rng(0).standard_normal(200), [1.0, -1.0, 2.0, 0.5]])
    y = values.astype(dtype)
    least, most = cell(y)
    assert (least < most).all()
    inside, outside = np.nextafter(most, least), np.nextafter(most, np.inf)
    assert np.array_equal(round_once(inside, np.dtype(dtype)), y)
    assert (round_once(outside, np.dtype(dtype)) != y).all()


def test_an_interval_is_that_of_every_token() -> None:
    x = np.array([[1.0, -2.0, 0.0], [2.0, 1.0, 1.0]])
    least, most = interval(np.array([[1.0], [4.0]]), np.array([[2.0], [6.0]]), x)
    assert (least[0], most[0]) == (2, 2)
    assert least[1] > most[1]  # -1 to -0.5, and 4 to 6
    assert least[2] > most[2]  # 0 is not between 1 and 2


@pytest.mark.parametrize(("least", "most", "number"), [(0.71, 0.74, 0.72), (1.2499, 1.2501, 1.25), (-3.2, -2.9, -3)])
def test_the_shortest_number_between_two(least: float, most: float, number: float) -> None:
    assert least <= shortest(least, most) <= most
    assert shortest(least, most) == pytest.approx(number, abs=0.011)


def test_an_explanation_says_what_is_left_after_it() -> None:
    assert str(Explanation("it is 0", 0.412, 57.31)) == (
        "it is 0; that leaves 0.41 of the bound, the next best element 57.3"
    )
    assert str(Explanation("it is 0", 0.412)) == "it is 0; that leaves 0.41 of the bound"
