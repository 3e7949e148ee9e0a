"""JSON lines of logprobs: one grammar, and one line of error that names the place for all else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.errors import InputError, NotFoundError
from stages.files.logprobs import read_logprobs

GOOD: dict[str, Any] = {"prompt": [1, 2], "completion": [3, 4, 5], "logprobs": [-0.5, -1.25, None]}


def written(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_a_sequence_in_each_spelling(tmp_path: Path) -> None:
    rest = {"logprobs": GOOD["logprobs"]}
    ways = [
        GOOD,
        {"prompt_ids": [1, 2], "completion_ids": [3, 4, 5], **rest},
        {"prompt_token_ids": [1, 2], "token_ids": [3, 4, 5], **rest},
        {"tokens": [1, 2, 3, 4, 5], "start": 2, **rest, "id": "seven", "temperature": None},
    ]
    found = read_logprobs(written(tmp_path / "a.jsonl", *ways, ""))
    assert len({line.key for line in found.lines}) == 1
    assert [line.number for line in found.lines] == [1, 2, 3, 4]
    line = found.lines[0]
    assert line.tokens.tolist() == [1, 2, 3, 4, 5]
    assert line.start == 2
    assert np.isnan(line.logprobs).tolist() == [False, False, True]
    assert (line.temperature, line.top_k, line.top_p) == (1.0, None, None)
    # Engines write 0 or -1 for no top-k, and 1 for no top-p.
    none = read_logprobs(written(tmp_path / "b.jsonl", {**GOOD, "top_k": -1, "top_p": 1.0})).lines[0]
    assert (none.top_k, none.top_p) == (None, None)
    some = read_logprobs(written(tmp_path / "b.jsonl", {**GOOD, "top_k": 20, "top_p": 0.9, "temperature": 0.7}))
    assert (some.lines[0].temperature, some.lines[0].top_k, some.lines[0].top_p) == (0.7, 20, 0.9)


def test_what_all_numbers_say_of_how_they_were_stored(tmp_path: Path) -> None:
    def of(*values: float) -> Any:
        row = {"prompt": [1], "completion": [2] * len(values), "logprobs": list(values)}
        return read_logprobs(written(tmp_path / "a.jsonl", row))

    assert of(-1.5, -0.0078125).stored == "bfloat16"
    assert of(-1.0009765625, -3.5).stored == "float16"
    assert of(-1.2345678806304932).stored is None
    assert of(-1.2345678806304932).step == 0
    assert of(-1.234, -0.5).step == 1e-3
    assert of(-1.0078, -3.5).stored == "bfloat16"  # 1.0078125, written to four decimals


BAD = {
    "no JSON": ("{", "line 1: expected JSON"),
    "no object": ("[1]", "line 1: expected a JSON object with prompt, completion and logprobs"),
    "another field": ({**GOOD, "temprature": 1}, "field 'temprature' is not known; a line may have prompt"),
    "a field twice": ({**GOOD, "prompt_ids": [1]}, "field 'prompt_ids' is given twice"),
    "duplicate": ('{"prompt": [1], "prompt": [2]}', "duplicate key 'prompt'"),
    "no tokens": ({"logprobs": []}, "expected prompt and completion, or tokens and start; it has logprobs"),
    "both": ({**GOOD, "tokens": [1], "start": 1}, "expected prompt and completion, or tokens and start"),
    "half": ({"prompt": [1], "start": 1, "logprobs": []}, "expected prompt and completion"),
    "ids that are text": ({**GOOD, "prompt": ["a"]}, "line 1: prompt: expected token ids, got a"),
    "ids below 0": ({**GOOD, "completion": [-1, 2, 3]}, "completion: expected token ids, got -1"),
    "huge ids": ({**GOOD, "completion": [2**40, 2, 3]}, "expected token ids, got 1099511627776"),
    "true as an id": ({**GOOD, "prompt": [True]}, "expected token ids, got True"),
    "ids that are no list": ({**GOOD, "prompt": "1,2"}, "prompt: expected a list of token ids, got str"),
    "no prompt": ({**GOOD, "prompt": []}, "begin at 0 of 3; expected one before them"),
    "no completion": ({**GOOD, "completion": [], "logprobs": []}, "begin at 2 of 2"),
    "start beyond": ({"tokens": [1, 2], "start": 9, "logprobs": []}, "begin at 9 of 2"),
    "start as text": ({"tokens": [1, 2], "start": "1", "logprobs": []}, "start: expected a whole number, got 1"),
    "too few": ({**GOOD, "logprobs": [-1.0]}, "expected 3 logprobs, one for each sampled token, got 1"),
    "no list": ({**GOOD, "logprobs": -1.0}, "logprobs: expected a list of numbers, got float"),
    "NaN": ('{"prompt": [1], "completion": [2], "logprobs": [NaN]}', "is nan, expected finite numbers"),
    "infinite": ('{"prompt": [1], "completion": [2], "logprobs": [-Infinity]}', "is -inf, expected finite numbers"),
    "too long a number": ('{"prompt": [1], "completion": [2], "logprobs": [-1e999]}', "is -inf"),
    "a very long number": ({**GOOD, "logprobs": [-(10**400), -1, -1]}, "expected finite numbers"),
    "text": ({**GOOD, "logprobs": ["-1", -1, -1]}, "is -1, expected finite numbers"),
    "positive": ({**GOOD, "logprobs": [-1, 0.5, -1]}, "logprob 1: is 0.5, expected a number of 0 or less; write"),
    "probabilities": ({**GOOD, "logprobs": [0.2, 0.5, 0.1]}, "are these probabilities? write logarithms"),
    "temperature 0": ({**GOOD, "temperature": 0}, "temperature: is 0.0, expected 0.001 to 1000"),
    "top_p": ({**GOOD, "top_p": 1.5}, "top_p: is 1.5, expected more than 0 and at most 1"),
    "top_k": ({**GOOD, "top_k": 2.5}, "top_k: expected a whole number, got 2.5"),
    "nothing": ("", "expected JSON lines with logprobs, got none"),
    "all null": ({**GOOD, "logprobs": [None, None, None]}, "expected JSON lines with logprobs, got none"),
}


@pytest.mark.parametrize("name", BAD)
def test_all_else_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    text, words = BAD[name]
    with pytest.raises(InputError) as refused:
        read_logprobs(written(tmp_path / "a.jsonl", text))
    message = str(refused.value)
    assert words in message
    assert str(tmp_path / "a.jsonl") in message
    assert "\n" not in message
    assert len(message) < 500


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_logprobs(tmp_path / "nowhere.jsonl")
