"""Orders of summation as recipes: each writes a float32 product or norm, and is read back as what gives every bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product as each

import numpy as np
import pytest
from helpers import some

from stages.oracle.verdict import Oracle, consult
from stages.recipes.orders import Asked
from stages.spec.forward import DECLARED
from stages.sums.candidates import family
from stages.sums.evaluate import Products, evaluate, product
from stages.sums.orders import Order, words
from stages.sums.text import parse_order

K = 72
ORDERS = [parse_order(text) for text in ("fma", "blocks(24, fma, left)", "lanes(8, left, halves)", "pairs")]
F = np.float32


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)


def oracle(name: str, *arguments: np.ndarray, **options: object) -> Oracle:
    return consult(replace(DECLARED[name], dtype="float32"), arguments, options)


def explained(of: Oracle, wrote: np.ndarray) -> str | None:
    return Asked().explain(of, wrote)


@pytest.mark.parametrize("order", some([*family(K)][::29], [*family(K)][::87]), ids=lambda order: words(order))
def test_each_order_of_the_family_is_read_back_from_what_it_writes(order: Order) -> None:
    x, w = normal(16, K), normal(24, K)
    found = explained(oracle("ffn_gate", x, w), product(order, x, w.T))
    assert found is not None
    # Some are the same additions: the first is named.
    named = next(one for one in family(K) if words(one, "K") == found)
    more = normal(90, K)
    assert np.array_equal(product(named, more, more.T), product(order, more, more.T))


ROOTS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "": lambda x, m, w: x * (F(1) / np.sqrt(m)) * w,
    "divided by the root": lambda x, m, w: x / np.sqrt(m) * w,
    "the weight folded into the inverse root": lambda x, m, w: x * (F(1) / np.sqrt(m) * w),
}


@pytest.mark.parametrize(("way", "order"), list(each(ROOTS, ORDERS)))
def test_a_norm_is_by_the_order_of_its_squares(way: str, order: Order) -> None:
    x, w, eps = normal(40, K), normal(K), 1e-6
    mean = evaluate(order, Products(x, x))[:, None] / F(K) + F(eps)
    found = explained(oracle("attn_norm", x, w, eps=eps), ROOTS[way](x, mean, w))
    assert found == words(order, "squares") + (f"; {way}" if way else "")


@pytest.mark.parametrize("order", ORDERS)
def test_scores_and_values_are_by_the_order_of_each_heads_product(order: Order) -> None:
    q, k = normal(40, 4, K), normal(40, 2, K) + F(1)
    scores = np.stack([product(order, q[:, head], k[:, head // 2].T) for head in range(4)])
    of = oracle("attn_scores", q, k, scaling=K**-0.5)
    assert explained(of, scores * F(K**-0.5)) == words(order, "K")
    folded = np.stack([product(order, q[:, head] * F(K**-0.5), k[:, head // 2].T) for head in range(4)])
    assert explained(of, folded) == f"{words(order, 'K')}; of q times the scale"
    p, qkv = np.abs(normal(4, 80, 80)), normal(80, 8 * 16)
    values = qkv[:, 6 * 16 :].reshape(80, 2, 16)
    weighted = np.concatenate([product(order, p[head], values[:, head // 2]) for head in range(4)], axis=1)
    found = explained(oracle("attention", p, qkv, heads=4, kv_heads=2, head_dim=16), weighted)
    assert found == words(order, "K")


def test_of_a_joined_product_each_weight_may_have_its_own_order_and_a_bias_is_added_last() -> None:
    x, weights, biases = normal(20, K), [normal(n, K) for n in (48, 24, 24)], [normal(n) for n in (48, 24, 24)]
    summed = [product(order, x, w.T) for order, w in zip([ORDERS[0], ORDERS[1], ORDERS[1]], weights, strict=True)]
    found = explained(oracle("qkv_matmul", x, *weights), np.concatenate(summed, axis=1))
    assert found is not None
    first, second = found.split("; ")
    assert first.endswith(f"q_proj.weight: {words(ORDERS[0], 'K')}")
    assert second.endswith(words(ORDERS[1], "K"))
    assert "k_proj" in second
    assert "v_proj" in second
    params = [name.replace("weight", "bias") for name in DECLARED["qkv_matmul"].params]
    stage = replace(DECLARED["qkv_bias"], dtype="float32")
    assert set(params) <= set(stage.params)
    own = dict(zip((*DECLARED["qkv_matmul"].params, *params), (*weights, *biases), strict=True))
    of = consult(stage, (x, *(own[name] for name in stage.params)), {})
    plus = [y + bias for y, bias in zip(summed, biases, strict=True)]
    assert "the bias added last" in (explained(of, np.concatenate(plus, axis=1)) or "")


def test_too_few_bits_tell_no_order_and_a_changed_bit_is_none() -> None:
    x, w = normal(16, K), normal(24, K)
    of = oracle("ffn_gate", x, w)
    few = of.rounded.copy()
    few[0, :3] = product(ORDERS[0], x, w.T)[0, :3]
    assert explained(of, few) is None
    wrote = product(ORDERS[0], x, w.T)
    wrote[5, 7] = np.nextafter(wrote[5, 7], F(np.inf))
    assert explained(of, wrote) is None


def test_what_explained_one_stage_is_asked_first_and_a_stage_without_an_order_is_asked_once() -> None:
    x, w, asked = normal(16, K), normal(24, K), Asked()
    of = oracle("ffn_gate", x, w)
    off = np.nextafter(of.rounded, F(np.inf))
    assert asked.explain(of, off) is None
    assert asked.lost == {("ffn_gate", K)}
    assert asked.explain(of, product(ORDERS[0], x, w.T)) is None  # not asked for again, and nothing is known
    assert asked.explain(oracle("ffn_up", x, w), product(ORDERS[0], x, w.T)) == words(ORDERS[0], "K")
    assert asked.explain(of, product(ORDERS[0], x, w.T)) == words(ORDERS[0], "K")
