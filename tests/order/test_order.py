"""Orders of summation: text, evaluation, revealing and naming trees, inferring from bytes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.errors import InputError
from stages.order.probe import ProductProbe, SquaresProbe, softmax, total
from stages.order.recognise import recognise
from stages.order.reveal import NoTreeError, reveal
from stages.sums.candidates import family, family_of_sums
from stages.sums.evaluate import Products, Sum, evaluate, fma, product
from stages.sums.infer import ProductEvidence, SumEvidence, infer
from stages.sums.orders import Blocks, Chain, Explicit, Halves, Lanes, Order, Pairs, fused, lower, words
from stages.sums.text import format_order, parse_order

# Every kind of order, as libraries have them; the one table that the tests go through.
ORDERS = (
    "left",
    "right",
    "pairs",
    "halves",
    "blocks(192, left, left)",
    "blocks(100, left, right)",
    "blocks(32, left, left, centred)",
    "blocks(64, lanes(8, left, halves), left)",
    "lanes(4, left, halves)",
    "lanes(4, left, halves, head 4)",
    "lanes(16, blocks(4, left, left), halves)",
    "lanes(8, lanes(4, blocks(16, left, left), left, first), left, seed)",
)
simple = st.sampled_from([Chain(), Chain(backward=True), Pairs(), Halves(), Chain(fma=True)])
orders = st.recursive(
    simple,
    lambda inner: st.one_of(
        st.builds(Blocks, st.integers(2, 20), inner, inner, st.booleans()),
        st.builds(
            Lanes, st.integers(2, 9), inner, inner, st.sampled_from(["spread", "first", "seed"]), st.integers(0, 5)
        ),
    ),
    max_leaves=4,
)


def matrices(m: int, k: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((m, k), np.float32), rng.standard_normal((k, n), np.float32)


def black_box(order: Order, k: int) -> ProductProbe:
    return ProductProbe(lambda a, b: product(order, a, b), (6, 4, k))


@given(orders, st.integers(1, 60))
def test_an_order_adds_every_term_once(order: Order, size: int) -> None:
    program = lower(order, size)
    added = [step.of for step in program.steps]
    assert sorted([*added, program.root]) == list(range(size))


@given(orders)
def test_text_round_trips(order: Order) -> None:
    assert parse_order(format_order(order)) == order
    assert words(order)


def test_an_explicit_tree_round_trips() -> None:
    text = "tree(4; 1*0, 2+3, 1+2)"
    assert format_order(parse_order(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "chain",
        "blocks(192, fma)",
        "blocks(1, fma, left)",
        "blocks(192, fma, left, seed)",
        "lanes(99999999999, left, left)",
        "tree(3; 0+1, 0+1)",
        "tree(3; 0+1, 2*0)",
        "left left",
        "blocks(2, " * 20,
    ],
)
def test_no_order_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InputError) as error:
        parse_order(text)
    assert "\n" not in str(error.value)


def test_plain_words() -> None:
    said = words(parse_order("blocks(192, fma, left)"), "K")
    assert said == "K in blocks of 192, an FMA chain in each, blocks added left to right"


floats = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**60), max_value=2.0**60)


@settings(max_examples=200)
@given(floats, floats, floats)
def test_fma_is_rounded_once(a: float, b: float, c: float) -> None:
    got = fma(*(np.array([x], np.float32) for x in (a, b, c)))[0]
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    near = [float(x) for x in (np.nextafter(got, np.float32(-np.inf)), got, np.nextafter(got, np.float32(np.inf)))]
    errors = [abs(Fraction(x) - exact) for x in near]
    assert errors[1] == min(errors)
    if errors[1] in (errors[0], errors[2]):  # a tie: the even one
        assert np.float32(got).view(np.uint32) % 2 == 0


def test_fma_where_float64_rounds_twice() -> None:
    # a * b is 2^-24 and a little more: 1 + 2^-24 is the middle of two float32 numbers, and float64 loses the rest.
    a = np.float32([1 + 2020 * 2.0**-23])
    b = np.float32(1 / a.astype(np.float64)) * np.float32(2.0**-24)
    one = np.float32([1])
    assert Fraction(1, 1 << 24) < Fraction(float(a[0])) * Fraction(float(b[0])) < Fraction(1, 1 << 23)
    assert (a.astype(np.float64) * b + one).astype(np.float32)[0] == 1  # rounded twice: wrong
    assert fma(a, b, one)[0] == np.float32(1 + 2.0**-23)


@pytest.mark.parametrize("text", ORDERS)
@pytest.mark.parametrize("size", [5, 64, 250])
def test_probing_reveals_the_tree_and_its_name_makes_it_again(text: str, size: int) -> None:
    order = parse_order(text)

    def meeting(i: int, js: list[int]) -> np.ndarray:
        terms = np.ones((len(js), size), np.float32)
        terms[:, i] = 2.0**60
        terms[np.arange(len(js)), js] = -(2.0**60)
        return size - evaluate(order, Sum(terms)).astype(int)

    tree = reveal(size, meeting)
    assert tree == lower(order, size).tree()
    name = recognise(tree)
    assert lower(name, size).tree() == tree
    assert len(format_order(name)) <= len(text)


def test_a_tree_without_a_name_is_told_step_by_step() -> None:
    text = "tree(8; 0+5, 1+7, 2+3, 0+6, 1+2, 0+1, 0+4)"
    assert format_order(recognise(lower(parse_order(text), 8).tree())) == text


def test_answers_of_no_tree_are_refused() -> None:
    with pytest.raises(NoTreeError):
        reveal(4, lambda i, js: np.full(len(js), 3))


@pytest.mark.parametrize("text", ["fma", "left", "fma_right", "blocks(16, fma, left)", "lanes(4, fma, halves)"])
def test_products_are_probed_with_their_fma(text: str) -> None:
    (region,) = black_box(parse_order(text), 50).regions()
    assert format_order(region.order) == text
    assert (region.rows, region.cols) == ("0:6", "0:4")


def test_a_products_tree_without_a_name_is_probed_with_its_fma() -> None:
    """So sums torch's product of one row on a Xeon with AVX-512: the first term before 16 lanes, the rest halved."""
    text = "tree(8; 0*5, 1*7, 2+3, 0*6, 1+2, 0+1, 0*4)"
    (region,) = ProductProbe(lambda a, b: product(parse_order(text), a, b), (6, 4, 8)).regions()
    a, b = matrices(6, 8, 4)
    assert isinstance(region.order, Explicit)
    assert any(step.fused for step in region.order.program.steps)
    assert np.array_equal(product(region.order, a, b), product(parse_order(text), a, b))


def test_a_mixed_fma_is_told_step_by_step() -> None:
    order = parse_order("tree(4; 1*0, 1+2, 1*3)")
    (region,) = black_box(order, 4).regions()
    assert region.order == order


def test_margins_with_another_order_are_regions_of_their_own() -> None:
    def box(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        out = product(parse_order("blocks(16, fma, left)"), a, b)
        out[4:] = product(parse_order("lanes(4, left, halves)"), a[4:], b)
        return out

    found = {region.rows: format_order(region.order) for region in ProductProbe(box, (6, 4, 40)).regions()}
    assert found == {"0:4": "blocks(16, fma, left)", "4:6": "lanes(4, left, halves)"}


@pytest.mark.parametrize(
    "text", ["left", "lanes(8, lanes(4, left, left), left, seed)", "blocks(32, left, left, centred)"]
)
def test_sums_are_probed(text: str) -> None:
    order = parse_order(text)
    assert total(lambda terms: float(evaluate(order, Sum(terms))), 100) == order


@pytest.mark.parametrize("text", ["fma", "lanes(8, left, halves)"])
@pytest.mark.parametrize("size", [24, 64])
def test_mean_squares_are_probed_through_a_root(text: str, size: int) -> None:
    order = parse_order(text)

    def norm(x: np.ndarray) -> np.ndarray:
        mean = evaluate(order, Products(x, x)) / np.float32(size) + np.float32(0.3 / size)
        return x * (1 / np.sqrt(mean))[:, None]

    assert SquaresProbe(norm, size, rows=500).order() == order


@pytest.mark.parametrize(
    "text", ["left", "right", "lanes(16, left, halves)", "lanes(16, blocks(4, left, left), halves)"]
)
def test_a_softmax_denominator_is_probed(text: str) -> None:
    order = parse_order(text)

    def box(scores: np.ndarray) -> np.ndarray:
        exponentials = np.exp(scores)
        return exponentials / evaluate(order, Sum(exponentials))[:, None]

    assert lower(softmax(box, 100), 100).tree() == lower(order, 100).tree()


# Orders that nothing in the family or its tests was made for, and that lie in it.
@pytest.mark.parametrize(
    "text", ["blocks(192, fma, left)", "blocks(112, left, right)", "lanes(8, lanes(2, fma, left), pairs)", "right"]
)
def test_a_made_up_order_is_inferred_from_bytes(text: str) -> None:
    a, b = matrices(9, 300, 12)
    recorded = product(parse_order(text), a, b)
    found = infer(ProductEvidence(a, b, recorded), family)
    assert found.complete
    assert [format_order(part.order) for part in found.parts] == [text]


@pytest.mark.parametrize(
    "text", ["blocks(7, fma, left)", "lanes(5, left, left)", "blocks(90, lanes(3, fma, left), right)"]
)
def test_an_order_outside_the_family_fails_and_says_what_is_left(text: str) -> None:
    a, b = matrices(9, 64, 12)
    recorded = product(parse_order(text), a, b)
    found = infer(ProductEvidence(a, b, recorded), family)
    assert not found.complete
    assert found.best is not None
    again = product(found.best, a, b)
    assert found.remaining == int((again != recorded).sum()) > 0


def test_one_wrong_bit_is_not_explained() -> None:
    a, b = matrices(9, 64, 12)
    recorded = product(Chain(fma=True), a, b)
    recorded[3, 5] = np.nextafter(recorded[3, 5], np.float32(9))
    found = infer(ProductEvidence(a, b, recorded), family)
    assert found.remaining == 1
    assert found.best == Chain(fma=True)


def test_margins_are_inferred() -> None:
    a, b = matrices(10, 300, 20)
    recorded = product(parse_order("blocks(192, fma, left)"), a, b)
    recorded[8:] = product(parse_order("lanes(4, left, halves)"), a[8:], b)
    found = infer(ProductEvidence(a, b, recorded), family)
    assert found.complete
    assert [(format_order(p.order), p.rows.tolist()[0]) for p in found.parts] == [
        ("blocks(192, fma, left)", 0),
        ("lanes(4, left, halves)", 8),
    ]


def test_few_results_say_how_many_orders_fit() -> None:
    x = np.random.default_rng(0).uniform(0, 1, (2, 1, 64)).astype(np.float32)
    order = Chain()
    ratio = evaluate(order, Sum(x))
    found = infer(SumEvidence(x, ratio[:1] / ratio[1:], finish=lambda sums: sums[0] / sums[1]), family_of_sums)
    assert found.complete
    assert found.also > 0


def test_fused_touches_terms_alone() -> None:
    assert (
        format_order(fused(parse_order("blocks(8, lanes(4, left, left), left)")))
        == "blocks(8, lanes(4, fma, left), left)"
    )
