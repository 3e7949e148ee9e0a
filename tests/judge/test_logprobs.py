"""`svf logprobs`: right systems agree; each mistake is found and named, on the side that made it."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import some, svf
from logprob_files import (
    WAYS,
    Sampled,
    clean,
    engine,
    prefill,
    processed,
    sampled,
    taken,
    write,
    write_sharp,
)

from stages.judge.logprobs import LogprobsCommand, judge

pytestmark = pytest.mark.slow

Rows = list[dict[str, Any]]


def judged(a: Path, b: Path | None, model: Path, **options: Any) -> dict[str, Any]:
    return judge(LogprobsCommand(a, b, str(model), **options), lambda _label, _done: None)


# -- right systems --------------------------------------------------------------------------------------------------

RIGHT = [
    ("qwen3", "float32", 1.0),
    ("qwen2", "float32", 8.0),
    ("llama", "float32", 1.0),
    ("qwen3-gqa4", "float32", 8.0),
    ("qwen3", "bfloat16", 8.0),
    ("qwen2", "bfloat16", 1.0),
    ("llama", "bfloat16", 8.0),
    ("qwen3", "float16", 1.0),
    ("llama", "float16", 8.0),
]
SEQUENCES = 3
Right = tuple[str, str, float]


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, ...]]:
    """A model, and the file of each right system that is asked for."""

    @functools.cache
    def folder_of(of: Right) -> Path:
        family, dtype, sharp = of
        return write_sharp(tmp_path_factory.mktemp("right"), family, dtype, sharp=sharp)

    def make(of: Right, *ways: str) -> tuple[Path, ...]:
        folder = folder_of(of)
        sequences = sampled(engine(folder, of[1]), SEQUENCES)
        files = (write(folder / f"{way}.jsonl", clean(folder, of[1], sequences, way)) for way in ways)
        return folder, *files

    return make


@pytest.mark.cover(1)
@pytest.mark.parametrize("of", RIGHT, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_right_systems_agree_with_the_oracle(of: Right, way: str, right: Callable[..., tuple[Path, ...]]) -> None:
    """Whatever the attention, the order, the cache, the batch and the way to take a logprob."""
    folder, file = right(of, way)
    alone = judged(file, None, folder)
    assert alone["outcome"] == "sound", alone["verdict"]
    # Far from the limits of 1 and 2.5, as docs/guides/logprobs.md says.
    assert alone["a"]["ratio"] < 0.25
    assert alone["a"]["rms"] < 1.5


@pytest.mark.parametrize("of", some(RIGHT, RIGHT[2:6]), ids=str)
def test_right_systems_agree_with_each_other(of: Right, right: Callable[..., tuple[Path, ...]]) -> None:
    folder, eager, batch = right(of, "eager", "batch")
    both = judged(eager, batch, folder)
    assert both["outcome"] == "agree"
    assert both["split"]["beyond"] == 0
    assert both["split"]["parts"]["rest"]["max_abs"] == 0


def test_that_is_more_than_a_hundred_sequences() -> None:
    assert len(RIGHT) * 6 * SEQUENCES > 150


# -- planted mistakes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of both dtypes, those of the step before, and another one."""
    folder = tmp_path_factory.mktemp("planted")
    for dtype in ("float32", "bfloat16"):
        write_sharp(folder / dtype, "qwen3", dtype, sharp=3.0)
        write_sharp(folder / f"stale-{dtype}", "qwen3", dtype, sharp=3.0, moved=1e-3)
        write_sharp(folder / f"other-{dtype}", "qwen3", dtype, sharp=3.0, seed=7)
    return folder


def _right(model: Any, one: Sampled) -> list[float]:
    return taken(prefill(model, one).float(), one)


def _of(**how: Any) -> Callable[[Any, Sampled], list[float]]:
    return lambda model, one: taken(prefill(model, one).float(), one, **how)


def _times(factor: float) -> Callable[[Any, Sampled], list[float]]:
    return lambda model, one: [factor * x for x in _right(model, one)]


def _likeliest(model: Any, one: Sampled) -> list[float]:
    logprobs = torch.log_softmax(prefill(model, one).float(), -1)
    found: list[float] = logprobs[one.start - 1 : -1].max(-1).values.tolist()
    return found


def _without_first(model: Any, one: Sampled) -> list[float]:
    return _right(model, Sampled(one.tokens[1:], one.start - 1))


def _lacking(model: Any, one: Sampled) -> list[float]:
    """The logprobs of one token before, in a list that lacks the last."""
    return taken(prefill(model, one).float(), one, row=-1, token=-1)


# How logprobs are wrong, what must have been sampled from for that, and what has to be said.
PLANTED: dict[str, tuple[Callable[[Any, Sampled], list[float]], dict[str, Any], str]] = {
    "temperature 0.7": (_of(temperature=0.7), {}, "as if temperature 0.7 had"),
    "temperature 1.3": (_of(temperature=1.3), {}, "as if temperature 1.3 had"),
    "top-k": (_of(top_k=5), {"top_k": 5}, "as if top-k 5 had"),
    "top-p": (_of(top_p=0.8), {"top_p": 0.8}, "as if top-p 0.8 had"),
    "temperature and top-p": (
        _of(temperature=0.7, top_p=0.9),
        {"temperature": 0.7, "top_p": 0.9},
        "as if temperature 0.7 and top-p 0.9 had",
    ),
    "temperature and top-k": (
        _of(temperature=0.8, top_k=20),
        {"temperature": 0.8, "top_k": 20},
        "as if temperature 0.8 and top-k 20 had",
    ),
    "log2": (_times(1 / math.log(2)), {}, "log2, not natural logarithms"),
    "log10": (_times(1 / math.log(10)), {}, "log10, not natural logarithms"),
    "logprobs divided": (_times(1 / 0.6), {}, "the logprobs, not the logits, had been divided by temperature 0.6"),
    "next token": (_of(row=1, token=1), {}, "off by one: each is the logprob of the next token"),
    "token before": (_lacking, {}, "off by one: each is the logprob of the token before"),
    "not shifted": (_of(row=1), {}, "logits not shifted"),
    "shifted twice": (_of(row=-1), {}, "logits shifted twice"),
    "likeliest": (_likeliest, {}, "the logprobs of the most likely tokens"),
    "prompt without its first token": (_without_first, {}, "the first token of every prompt had been left out"),
}
# In bfloat16 what moves less than its rounding is not seen, and what moves little more may have other names.
_CLEAR = [
    "temperature 0.7",
    "temperature 1.3",
    "log2",
    "log10",
    "logprobs divided",
    "next token",
    "token before",
    "not shifted",
    "shifted twice",
    "likeliest",
]
CASES = [("float32", name) for name in PLANTED] + [("bfloat16", name) for name in _CLEAR]


@pytest.mark.cover(1)
@pytest.mark.parametrize("letter", ["a", "b"])
@pytest.mark.parametrize(("dtype", "name"), CASES)
def test_a_planted_mistake_is_named(dtype: str, name: str, letter: str, made: Path, tmp_path: Path) -> None:
    wrong, how, words = PLANTED[name]
    model = engine(made / dtype, dtype)
    sequences = sampled(model, 4, **how)
    if name == "next token":  # what the last one has instead is nothing
        rows = [one.row([*wrong(model, one)[:-1], None]) for one in sequences]  # type: ignore[list-item]
    else:
        rows = [one.row(wrong(model, one)) for one in sequences]
    bad = write(tmp_path / "bad.jsonl", rows)
    good = write(tmp_path / "good.jsonl", [one.row(_right(model, one)) for one in sequences])
    document = judged(*((bad, good) if letter == "a" else (good, bad)), made / dtype)
    assert document["outcome"] == "diverged"
    assert document["verdict"].startswith(f"{letter}: bug, "), document["verdict"]
    assert words in document["verdict"]
    if name.startswith("temperature 0"):
        assert " or " not in document["verdict"]
    assert document["b" if letter == "a" else "a"]["verdict"] == "rounding"
    parts = document["split"]["parts"]
    assert parts["rest"]["max_abs"] == 0
    assert parts["cause"]["mean_abs"] > 5 * parts["rounding"]["mean_abs"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_weights_are_named_where_they_are_given(dtype: str, made: Path, tmp_path: Path) -> None:
    model, other = engine(made / dtype, dtype), engine(made / f"other-{dtype}", dtype)
    sequences = sampled(model, 4)
    bad = write(tmp_path / "bad.jsonl", [one.row(_right(other, one)) for one in sequences])
    document = judged(bad, None, made / dtype)
    assert "as other weights (a stale step?) would do" in document["verdict"]
    named = judged(bad, None, made / dtype, other_model=str(made / f"other-{dtype}"))
    assert f"bug, the weights of {made}/other-{dtype}" in named["verdict"]


def test_weights_of_a_step_before(made: Path, tmp_path: Path) -> None:
    """A change of 1e-3 of every weight: as large as what bfloat16 does, so both are told, unless it is given."""
    stale, sequences = engine(made / "stale-float32", "float32"), sampled(engine(made / "float32", "float32"), 4)
    bad = write(tmp_path / "bad.jsonl", [one.row(_right(stale, one)) for one in sequences])
    document = judged(bad, None, made / "float32")
    assert document["outcome"] == "faulty"
    assert "a stale step?" in document["verdict"]
    done = svf("logprobs", bad, "--model", made / "float32")
    assert f"Next: svf logprobs {bad} --model {made}/float32 --other-model OLDER" in done.out.replace(
        "--no-progress ", ""
    )
    named = judged(bad, None, made / "float32", other_model=str(made / "stale-float32"))
    assert "bug, the weights of" in named["verdict"]
    assert " or " not in named["verdict"]


@pytest.mark.parametrize(("logits", "stored"), [("bfloat16", False), ("float16", False), ("bfloat16", True)])
def test_fewer_bits_of_logits_are_precision(logits: str, stored: bool, made: Path, tmp_path: Path) -> None:
    model = engine(made / "float32", "float32")
    rows = []
    for one in sampled(model, 4):
        narrow = prefill(model, one).to(getattr(torch, logits))
        rows.append(one.row(taken(narrow if stored else narrow.float(), one)))
    document = judged(write(tmp_path / "bad.jsonl", rows), None, made / "float32")
    assert document["a"]["verdict"] == "precision"
    assert f"the logits had been rounded to {logits}" in document["verdict"]
    assert (f"the logprobs had been rounded to {logits}" in document["verdict"]) == stored


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_in_fewer_bits_is_precision(dtype: str, made: Path, tmp_path: Path) -> None:
    model = engine(made / "float32", dtype)
    rows = [one.row(_right(model, one)) for one in sampled(engine(made / "float32", "float32"), 4)]
    path = write(tmp_path / "bad.jsonl", rows)
    document = judged(path, None, made / "float32")
    assert document["a"]["verdict"] in ("precision", "suspect")
    assert f"as if computed in {dtype}, not float32" in document["verdict"]
    assert judged(path, None, made / "float32", a_dtype=dtype)["outcome"] == "sound"


def test_one_line_and_one_token(made: Path, tmp_path: Path) -> None:
    model = engine(made / "float32", "float32")
    sequences = sampled(model, 5)
    rows = [one.row(_right(model, one)) for one in sequences]
    third = sequences[2]
    wrong = [*rows[:2], third.row(_of(temperature=0.7)(model, third)), *rows[3:]]
    document = judged(write(tmp_path / "line.jsonl", wrong), None, made / "float32")
    assert document["a"]["lines"] == [3]
    assert "line 3: as if temperature 0.7 had" in document["verdict"]

    other = (third.tokens[third.start + 4] + 11) % 300
    value = float(torch.log_softmax(prefill(model, third).float(), -1)[third.start + 3, other])
    moved = [*_right(model, third)]
    moved[4] = value
    wrong = [*rows[:2], third.row(moved), *rows[3:]]
    document = judged(write(tmp_path / "token.jsonl", wrong), None, made / "float32")
    place = third.start + 4
    assert f"line 3, position {place}: the logprob of token {other}, not {third.tokens[place]}" in document["verdict"]
    assert document["worst"][0]["position"] == place


def test_masked_tokens_that_were_written_as_zero(made: Path, tmp_path: Path) -> None:
    """What a rollout keeps for tokens of tools, which nobody sampled."""
    model = engine(made / "float32", "float32")
    rows = [one.row([0.0, 0.0, *_right(model, one)[2:]]) for one in sampled(model, 3)]
    document = judged(write(tmp_path / "a.jsonl", rows), None, made / "float32")
    assert "6 logprobs are 0, those of all others are right: masked tokens? write null there" in document["verdict"]
    warm = [
        one.row([0.0, *taken(prefill(model, one).double(), one, temperature=1 + 1e-5)[1:]]) for one in sampled(model, 5)
    ]
    document = judged(write(tmp_path / "warm.jsonl", warm), None, made / "float32")
    assert "5 logprobs are 0, and all others together err more than rounding does" in document["verdict"]
    masked = [{**row, "logprobs": [None, None, *row["logprobs"][2:]]} for row in rows]
    found = judged(write(tmp_path / "b.jsonl", masked), None, made / "float32")
    assert found["outcome"] == "sound"
    assert found["a"]["tokens"] == 3 * 14


def test_zeros_alone_are_no_logprobs_that_were_written_to_whole_numbers(made: Path, tmp_path: Path) -> None:
    """Of the likeliest tokens they are what top-k 1 gives; of others nothing."""
    model = engine(made / "float32", "float32")
    greedy = sampled(model, 3, top_k=1)
    top = judged(write(tmp_path / "k.jsonl", [one.row([0.0] * 16) for one in greedy]), None, made / "float32")
    assert "bug, as if top-k 1 had been applied" in top["verdict"]
    none = judged(
        write(tmp_path / "z.jsonl", [one.row([0.0] * 16) for one in sampled(model, 3)]), None, made / "float32"
    )
    assert "bug, every logprob is 0: were they recorded?" in none["verdict"]
    assert none["a"]["step"] is None
    # The likeliest of all tokens: 0 is less than 1 off, and wrong.
    model_name, one = made / "float32", greedy[0]
    likely = max(range(16), key=lambda n: _right(model, one)[n])
    row = {"tokens": one.tokens[: one.start + likely + 1], "start": one.start + likely, "logprobs": [0.0]}
    assert judged(write(tmp_path / "one.jsonl", [row]), None, model_name)["outcome"] == "faulty"


def test_numbers_far_beyond_any_logprob_are_judged(made: Path, tmp_path: Path) -> None:
    rows = [one.row([-1e300] * 16) for one in sampled(engine(made / "float32", "float32"), 3)]
    document = judged(write(tmp_path / "a.jsonl", rows), None, made / "float32")
    assert "bug, none of the known causes; 100% of the tokens" in document["verdict"]


def test_a_side_that_rules_its_own_tokens_out(made: Path, tmp_path: Path) -> None:
    """Raw logprobs of a file that says top-k 1: what is left beside that is a number."""
    model = engine(made / "float32", "float32")
    sequences = sampled(model, 3)
    a = write(tmp_path / "a.jsonl", [one.row(_right(model, one), top_k=1) for one in sequences])
    b = write(tmp_path / "b.jsonl", [one.row(_right(model, one)) for one in sequences])
    document = judged(a, b, made / "float32")
    assert document["verdict"].startswith("a: bug, as if nothing was applied to the logits, against what is declared (")
    assert document["split"]["parts"]["rest"]["max_abs"] == 0


def test_a_head_of_zeros(tmp_path: Path) -> None:
    """As some models begin their training: every function of it gives the same logprobs."""
    folder = write_sharp(tmp_path / "model", "qwen3", "float32", sharp=0.0)
    rows = [Sampled(list(range(20)), 4).row([-math.log(300)] * 16)]
    document = judged(write(tmp_path / "a.jsonl", rows), None, folder)
    assert document["outcome"] == "incomplete"
    assert "nothing to tell: the logits of a row are all the same" in document["verdict"]


def test_the_floor_is_of_the_tokens_and_decimals_at_hand(made: Path, tmp_path: Path) -> None:
    """Errors of a little more in every token are seen, those of much less are not."""
    model = engine(made / "float32", "float32")
    for count, decimals in ((3, 16), (5, 16), (3, 1), (5, 2)):
        sequences = sampled(model, count)

        def off_by(size: float, decimals: int = decimals, sequences: tuple[Sampled, ...] = sequences) -> dict[str, Any]:
            rows = [one.row([round(x - size, decimals) for x in _right(model, one)]) for one in sequences]
            return judged(write(tmp_path / "a.jsonl", rows), None, made / "float32")

        floor = off_by(0.0)["a"]["floor"]
        assert off_by(1.5 * floor)["outcome"] == "faulty"
        if decimals == 16:
            assert off_by(0.01 * floor)["outcome"] == "sound"
        else:  # half of the last decimal, or what all of them do together
            assert floor > 0.28 * 10**-decimals


def test_what_is_declared_is_what_is_asked(made: Path, tmp_path: Path) -> None:
    """Raw logprobs of a file that says 0.7 are wrong; two sides that declare different things are of two policies."""
    model = engine(made / "float32", "float32")
    sequences = sampled(model, 4)
    raw = write(tmp_path / "raw.jsonl", [one.row(_right(model, one)) for one in sequences])
    cold = write(
        tmp_path / "cold.jsonl", [one.row(_of(temperature=0.7)(model, one), temperature=0.7) for one in sequences]
    )
    lying = write(tmp_path / "lying.jsonl", [one.row(_right(model, one), temperature=0.7) for one in sequences])
    assert judged(cold, None, made / "float32")["outcome"] == "sound"
    for other in (None, raw):
        verdict = judged(lying, other, made / "float32")["verdict"]
        assert "bug, as if nothing was applied to the logits, against what is declared (" in verdict
    document = judged(raw, cold, made / "float32")
    assert document["outcome"] == "diverged"
    assert "a has nothing applied, b temperature 0.7" in document["verdict"]
    some = [json.loads(text) for text in (*raw.read_text().splitlines()[:2], *cold.read_text().splitlines()[2:])]
    document = judged(raw, write(tmp_path / "some.jsonl", some), made / "float32")
    assert "a has nothing applied, b temperature 0.7" in document["verdict"]
    document = judged(raw, cold, made / "float32")
    assert document["split"]["parts"]["declared"]["mean_abs"] > 100 * document["split"]["parts"]["rounding"]["max_abs"]


def test_parts_add_up(made: Path, tmp_path: Path) -> None:
    """A trainer in float32 and a rollout in bfloat16 at temperature 0.7, and one token of it that is nonsense."""
    trainer, rollout = engine(made / "float32", "float32"), engine(made / "float32", "bfloat16")
    sequences = sampled(trainer, 4)
    a = write(tmp_path / "a.jsonl", [one.row(_right(trainer, one)) for one in sequences])
    rows = [one.row(_right(rollout, one)) for one in sequences]
    rows[1]["logprobs"][2] -= 20
    document = judged(a, write(tmp_path / "b.jsonl", rows), made / "float32", b_dtype="bfloat16")
    split, place = document["split"], sequences[1].start + 2
    assert document["verdict"].startswith("b: bug, none of the known causes")
    assert f"line 2, position {place}" in document["verdict"]
    assert 15 < split["parts"]["rest"]["max_abs"] < 20
    assert split["rest_beyond"] == pytest.approx(1 / split["tokens"])
    assert split["max_abs"] == pytest.approx(20, abs=0.5)
    assert document["b"]["dtype"] == "bfloat16"


def test_files_that_do_not_match(made: Path, tmp_path: Path) -> None:
    model = engine(made / "float32", "float32")
    rows = [one.row(_right(model, one)) for one in sampled(model, 3)]
    a = write(tmp_path / "a.jsonl", rows)
    model_name = str(made / "float32")
    done = svf("logprobs", a, write(tmp_path / "order.jsonl", rows[::-1]), "--model", model_name)
    assert done.code == 0, done.err
    done = svf("logprobs", a, write(tmp_path / "few.jsonl", rows[:2]), "--model", model_name)
    assert done.code == 5
    assert "1 sequences are in one file only" in done.out
    other = [{**row, "prompt": [5, *row["prompt"][1:]]} for row in rows]
    done = svf("logprobs", a, write(tmp_path / "other.jsonl", other), "--model", model_name)
    assert done.code == 3
    assert "of the first lines position 0 is token" in done.err
    wide = [{**rows[0], "prompt": [300]}]
    done = svf("logprobs", write(tmp_path / "wide.jsonl", wide), "--model", model_name)
    assert done.code == 3
    assert "line 1: token 300 at position 0; the vocabulary has 300 ids" in done.err


def test_decimals_are_allowed_for(made: Path, tmp_path: Path) -> None:
    model = engine(made / "float32", "float32")
    rows = [one.row([round(x, 3) for x in _right(model, one)]) for one in sampled(model, 3)]
    path = write(tmp_path / "a.jsonl", rows)
    document = judged(path, None, made / "float32")
    assert document["outcome"] == "sound"
    assert document["a"]["step"] == 1e-3
    wrong = [one.row([round(x, 3) for x in _of(temperature=0.9)(model, one)]) for one in sampled(model, 3)]
    assert judged(write(tmp_path / "b.jsonl", wrong), None, made / "float32")["outcome"] == "faulty"


def test_what_cannot_be_told_is_said(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.judge.logprobs.LEAST_SEEN", 1e-9)
    model = engine(made / "float32", "float32")
    path = write(tmp_path / "a.jsonl", [one.row(_right(model, one)) for one in sampled(model, 2)])
    document = judged(path, None, made / "float32")
    assert document["outcome"] == "incomplete"
    assert "too long to tell: rounding alone may move the logits by" in document["verdict"]


def test_text_and_json(made: Path, tmp_path: Path) -> None:
    model = engine(made / "float32", "float32")
    sequences = sampled(model, 3)
    a = write(tmp_path / "a.jsonl", [one.row(_right(model, one)) for one in sequences])
    b = write(tmp_path / "b.jsonl", [one.row(_of(temperature=0.7)(model, one)) for one in sequences])
    done = svf("logprobs", a, b, "--model", made / "float32", "--top", "2")
    assert done.code == 1
    assert "DIVERGED  b: bug, as if temperature 0.7 had been applied" in done.out
    assert "part of a - b" in done.out
    document = svf("logprobs", a, b, "--model", made / "float32", "--json").json
    assert document["schema"] == "svf.logprobs/1"
    assert document["next"] == []
    assert document["b"]["found"]["temperature"] == 0.7
    assert len(document["worst"]) == 5
    json.dumps(document, allow_nan=False)
    assert svf("logprobs", a, "--b-dtype", "float32", "--model", made / "float32").code == 2
    assert svf("logprobs", a).code == 2


def test_processing_is_what_transformers_does() -> None:
    """The helper that plants top-k and top-p against transformers' own warpers."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(5, 1, dtype=torch.long)
    theirs = TopPLogitsWarper(0.8)(ids, TopKLogitsWarper(20)(ids, TemperatureLogitsWarper(0.7)(ids, logits)))  # type: ignore[no-untyped-call]
    assert torch.equal(theirs, processed(logits, temperature=0.7, top_k=20, top_p=0.8))
