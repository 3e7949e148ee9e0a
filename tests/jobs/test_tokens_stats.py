"""Token ids from every source, and statistics of stages and logits against plain numpy."""

from __future__ import annotations

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import one_line
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.errors import InputError, NotFoundError, SvfError, UsageError
from stages.files.tokens import DEFAULT_TOKENS, check_tokens, encode, parse_tokens, read_tokens
from stages.judge import stats

# -- token ids -------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 10**9 - 1), min_size=1, max_size=20), st.sampled_from([",", " ", "\n", ", ", "\r\n\t"]))
def test_ids_come_back_in_every_notation(ids: list[int], separator: str) -> None:
    assert parse_tokens(separator.join(map(str, ids))).tolist() == ids
    assert parse_tokens(f" {json.dumps(ids)}\n").tolist() == ids


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ",",
        "[]",
        "1,x",
        "-1",
        "1.5",
        "0x1",
        "1;2",
        "[1,",
        "[1, null]",
        "[[1]]",
        '{"a": 1}',
        "1" * 10,
        "[" * 10**5,
    ],
)
def test_what_is_no_list_of_ids_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_tokens(text, "--tokens")
    one_line(caught.value, "--tokens")


@pytest.mark.parametrize("text", ["٣", "１２", "[٣]"])
def test_digits_of_other_scripts_are_no_ids(text: str) -> None:
    with pytest.raises(UsageError):
        parse_tokens(text)


def test_a_file_may_be_text_or_json(tmp_path: Path) -> None:
    for text in ("1\n2\n3\n", "[1, 2, 3]\n", "1, 2, 3"):
        (tmp_path / "ids").write_text(text)
        assert read_tokens(tmp_path / "ids").tolist() == [1, 2, 3]


@pytest.mark.parametrize(("data", "error"), [(b"\xff\xfe", InputError), (b"one two", UsageError), (b"", UsageError)])
def test_a_file_of_something_else_is_refused_by_its_name(tmp_path: Path, data: bytes, error: type[SvfError]) -> None:
    (tmp_path / "ids").write_bytes(data)
    with pytest.raises(error) as caught:
        read_tokens(tmp_path / "ids")
    one_line(caught.value, str(tmp_path / "ids"))


def test_a_file_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(NotFoundError):
            read_tokens(path)


def test_ids_must_be_in_the_vocabulary() -> None:
    assert check_tokens([0, 511], 512).tolist() == [0, 511]
    for ids, where in (([0, 512], "token 512 at position 1"), ([-1], "token -1 at position 0")):
        with pytest.raises(UsageError) as caught:
            check_tokens(ids, 512)
        one_line(caught.value, where, "512 ids")


def test_the_default_ids_are_distinct_and_fit_the_tiny_model() -> None:
    assert len(set(DEFAULT_TOKENS)) == len(DEFAULT_TOKENS) > 1
    check_tokens(DEFAULT_TOKENS, 512)


def test_a_prompt_goes_through_the_checkpoints_tokenizer(model: Path) -> None:
    """The tiny model's ids are the bytes."""
    text = "Hi, Ünïcode"
    assert encode(text, model).tolist() == list(text.encode())
    with pytest.raises(UsageError, match="gives no token"):
        encode("", model)


def test_a_tokenizer_that_is_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"tokenizer\.json"):
        encode("x", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError) as caught:
        encode("x", tmp_path)
    one_line(caught.value, "tokenizer.json")


# -- statistics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_population_is_numpys_in_float64(dtype: type) -> None:
    x = np.random.default_rng(0).standard_normal((5, 7)).astype(dtype)
    wide = x.astype(np.float64)
    found = stats.population(x)
    assert found == {
        "mean": pytest.approx(wide.mean(), rel=1e-15),
        "std": pytest.approx(wide.std(), rel=1e-15),
        "min": wide.min(),
        "max": wide.max(),
        "count": 35,
        "nonfinite": 0,
    }
    # In float32 the mean of these would be lost altogether.
    assert stats.population(np.array([1e8, 1, -1e8], np.float32))["mean"] == pytest.approx(1 / 3)


def test_population_counts_what_is_not_finite_and_leaves_it_out() -> None:
    found = stats.population(np.array([1, np.nan, 3, np.inf, -np.inf], np.float32))
    assert (found["mean"], found["min"], found["max"], found["count"], found["nonfinite"]) == (2.0, 1.0, 3.0, 5, 3)
    nothing = stats.population(np.full(3, np.nan, np.float32))
    assert (nothing["mean"], nothing["std"], nothing["count"], nothing["nonfinite"]) == (None, None, 3, 3)


@given(
    pieces=st.lists(st.lists(st.floats(-(2.0**60), 2.0**60, width=32), max_size=9), min_size=1, max_size=5),
    offset=st.sampled_from([0.0, 1e6]),
)
def test_pieces_are_the_whole(pieces: list[list[float]], offset: float) -> None:
    found, arrays = stats.Population(), [np.array(piece, np.float64) + offset for piece in pieces]
    for array in arrays:
        found.add(array)
    whole = np.concatenate(arrays)
    if not whole.size:
        assert found.result()["mean"] is None
        return
    size = np.abs(whole).max()
    result = found.result()
    assert result["mean"] == pytest.approx(whole.mean(), rel=1e-12, abs=1e-12 * size)
    assert result["std"] == pytest.approx(whole.std(), rel=1e-9, abs=2e-12 * size)
    assert (result["min"], result["max"], result["count"]) == (whole.min(), whole.max(), whole.size)


def test_a_constant_has_no_spread_however_large_and_in_whatever_pieces() -> None:
    found = stats.Population()
    for size in (3, 7, 100_000):
        found.add(np.full(size, 0.1, np.float32))
    assert found.result()["std"] == 0.0


# -- logits ----------------------------------------------------------------------------------------------------


def plain(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """The same numbers, one position and one token at a time."""
    top1, top5, kl = [], [], []
    for x, y in zip(a.astype(np.float64), b.astype(np.float64), strict=True):
        p, q = np.exp(x) / np.exp(x).sum(), np.exp(y) / np.exp(y).sum()
        kl.append(sum(i * math.log(i / j) for i, j in zip(p, q, strict=True)))
        top1.append(np.argmax(x) == np.argmax(y))
        best = [sorted(range(len(z)), key=lambda i, z=z: (-z[i], i))[:5] for z in (x, y)]
        top5.append(len({*best[0]} & {*best[1]}) / len(best[0]))
    return {"top1_agreement": float(np.mean(top1)), "top5_agreement": float(np.mean(top5)), "kl": max(kl)}


@pytest.mark.parametrize("vocabulary", [2, 5, 300])
@pytest.mark.parametrize("apart", [0.0, 0.1, 3.0])
def test_logits_against_plain_numpy(vocabulary: int, apart: float) -> None:
    rng = np.random.default_rng(vocabulary)
    a = rng.standard_normal((6, vocabulary)).astype(np.float32) * 2
    b = (a + apart * rng.standard_normal(a.shape)).astype(np.float32)
    found, expected = stats.logits(a, b), plain(a, b)
    assert (found["top1_agreement"], found["top5_agreement"]) == (
        expected["top1_agreement"],
        pytest.approx(expected["top5_agreement"]),
    )
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-9, abs=1e-12)
    assert (found["next_token_a"], found["next_token_b"]) == (int(np.argmax(a[-1])), int(np.argmax(b[-1])))
    last = np.sort(a[-1].astype(np.float64))
    assert found["margin"] == last[-1] - last[-2]


def test_kl_of_two_known_distributions() -> None:
    a, b = np.log(np.array([[0.5, 0.5]])), np.log(np.array([[0.25, 0.75]]))
    assert stats.logits(a, b)["kl"] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-12)
    # a's distribution is the one that is averaged over; the other way round is another number
    assert stats.logits(b, a)["kl"] == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=1e-12)


def test_kl_is_the_worst_positions_and_large_logits_do_not_overflow() -> None:
    a = np.array([[1e4, 0, 0], [0, 0, 0]], np.float32)
    assert stats.logits(a, a)["kl"] == 0.0
    b = np.array([[1e4, 0, 0], [3, 0, 0]], np.float32)
    assert stats.logits(a, b)["kl"] == stats.logits(a[1:], b[1:])["kl"] > 0.1


def test_ties_go_to_the_lower_id_as_argmax_has_them() -> None:
    a = np.array([[1, 2, 2, 2, 0, 2, 2, 2]], np.float32)
    b = np.array([[2, 2, 2, 2, 2, 0, 0, 0]], np.float32)
    found = stats.logits(a, b)
    assert (found["next_token_a"], found["next_token_b"], found["margin"]) == (1, 0, 0.0)
    assert found["top1_agreement"] == 0.0
    assert found["top5_agreement"] == 3 / 5  # 1 2 3 5 6 and 0 1 2 3 4
    assert [t["token"] for t in stats.top_tokens(a[0])] == [1, 2, 3, 5, 6]
    assert stats.top_tokens(a[0], 2) == [{"token": 1, "logit": 2.0}, {"token": 2, "logit": 2.0}]


def test_a_vocabulary_of_one_has_no_margin() -> None:
    found = stats.logits(np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32))
    assert (found["margin"], found["top5_agreement"], found["kl"]) == (None, 1.0, 0.0)
