"""Logprobs of sampled tokens as JSON lines: one sequence a line, with its token ids and a number a sampled one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from stages.errors import InputError, shown
from stages.files.jsonio import MAX_JSON_BYTES, parse_json, read_bytes

# What each field is also called: by TRL, and by vLLM's outputs.
_NAMES = {
    "prompt_ids": "prompt",
    "prompt_token_ids": "prompt",
    "completion_ids": "completion",
    "token_ids": "completion",
}
_FIELDS = ("prompt", "completion", "tokens", "start", "logprobs", "temperature", "top_k", "top_p", "id")
# A logit less the logarithm of a sum of exponentials, both float32 numbers of up to 2^12, may come out above 0 by this.
_MOST_ABOVE_ZERO = 1e-3
_MOST_DIGITS = 9


@dataclass(frozen=True)
class Line:
    """One sequence: all `tokens`, of which those from `start` on were sampled, each with its logprob; NaN where the
    file has null, which is not compared. `temperature`, `top_k` and `top_p` are what the file says was applied."""

    number: int
    tokens: np.ndarray
    start: int
    logprobs: np.ndarray
    temperature: float
    top_k: int | None
    top_p: float | None

    @property
    def key(self) -> tuple[int, bytes]:
        """What two lines of the same sequence have in common."""
        return self.start, self.tokens.tobytes()


@dataclass(frozen=True)
class LogprobFile:
    """All sequences of one system."""

    path: Path
    lines: tuple[Line, ...]

    @cached_property
    def values(self) -> np.ndarray:
        found = np.concatenate([line.logprobs for line in self.lines])
        return found[~np.isnan(found)]

    @cached_property
    def step(self) -> float:
        """The decimals to which all logprobs were written, as a number; 0 where they have more than any format shows.

        Of a few numbers it says what these have; zeros alone, which every format writes alike, say nothing.
        """
        if not self.values.any():
            return 0.0
        digits = (d for d in range(_MOST_DIGITS) if np.all(np.abs(np.round(self.values, d) - self.values) < 1e-12))
        found = next(digits, None)
        return 0.0 if found is None else 10.0**-found

    @cached_property
    def stored(self) -> str | None:
        """The 16-bit format that held every logprob before it was written; None where no such format does."""
        values = self.values.astype(np.float32)
        formats = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
        off = ((f.name, np.abs(values.astype(f).astype(np.float64) - self.values)) for f in formats)
        return next((name for name, error in off if np.all(error <= self.step / 2 + 1e-12)), None)


def read_logprobs(path: Path) -> LogprobFile:
    """The file at `path`; `InputError` naming the line for anything but the grammar of docs/guides/logprobs.md."""
    lines = [
        _line(path, number, text)
        for number, text in enumerate(read_bytes(path, MAX_JSON_BYTES).split(b"\n"), 1)
        if text.strip()
    ]
    found = LogprobFile(path, tuple(lines))
    if not lines or not len(found.values):
        raise InputError(f"{path}: expected JSON lines with logprobs, got none")
    return found


def _line(path: Path, number: int, text: bytes) -> Line:
    where = f"{path}: line {number}"
    value = parse_json(text, where)
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object with prompt, completion and logprobs, one sequence a line")
    row: dict[str, Any] = {}
    for name, item in value.items():
        known = _NAMES.get(name, name)
        if known not in _FIELDS or known in row:
            what = "given twice" if known in row else "not known"
            raise InputError(f"{where}: field '{shown(name, 40)}' is {what}; a line may have {', '.join(_FIELDS)}")
        row[known] = item
    tokens, start = _tokens(row, where)
    logprobs = _logprobs(row, where)
    if len(logprobs) != len(tokens) - start:
        raise InputError(
            f"{where}: expected {len(tokens) - start} logprobs, one for each sampled token, got {len(logprobs)}"
        )
    return Line(number, tokens, start, logprobs, *_declared(row, where))


def _tokens(row: Mapping[str, Any], where: str) -> tuple[np.ndarray, int]:
    split, whole = {"prompt", "completion"} & row.keys(), {"tokens", "start"} & row.keys()
    if len(split) + len(whole) != 2 or len(split) == 1:
        given = ", ".join(row) or "none"
        raise InputError(f"{where}: expected prompt and completion, or tokens and start; it has {given}")
    if split:
        prompt, completion = (_ids(row[name], f"{where}: {name}") for name in ("prompt", "completion"))
        tokens, start = np.concatenate([prompt, completion]), len(prompt)
    else:
        tokens, start = _ids(row["tokens"], f"{where}: tokens"), _whole(row["start"], f"{where}: start")
    if not 1 <= start < len(tokens):
        raise InputError(
            f"{where}: the sampled tokens begin at {start} of {len(tokens)}; expected one before them and one of them"
        )
    return tokens, start


def _ids(value: Any, where: str) -> np.ndarray:
    if not isinstance(value, list):
        raise InputError(f"{where}: expected a list of token ids, got {type(value).__name__}")
    bad = next((item for item in value if type(item) is not int or not 0 <= item < 2**31), None)
    if bad is not None:
        raise InputError(f"{where}: expected token ids, got {shown(bad, 40)}")
    return np.array(value, np.int64)


def _whole(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise InputError(f"{where}: expected a whole number, got {shown(value, 40)}")
    return value


def _logprobs(row: Mapping[str, Any], where: str) -> np.ndarray:
    value = row.get("logprobs")
    if not isinstance(value, list):
        raise InputError(f"{where}: logprobs: expected a list of numbers, got {type(value).__name__}")
    found = np.array([math.nan if item is None else _number(item, f"{where}: logprobs") for item in value], np.float64)
    above = np.flatnonzero(found > _MOST_ABOVE_ZERO)
    if above.size:
        what = "are these probabilities? " if np.all(found[~np.isnan(found)] >= 0) else ""
        _refuse(f"{where}: logprob {int(above[0])}", found[above[0]], f"a number of 0 or less; {what}write logarithms")
    return found


def _number(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not abs(value) <= 1e300:
        _refuse(where, value, "finite numbers; null for a token that is not to be compared")
    return float(value)


def _refuse(where: str, value: Any, expected: str) -> NoReturn:
    raise InputError(f"{where}: is {shown(value, 40)}, expected {expected}")


def _declared(row: Mapping[str, Any], where: str) -> tuple[float, int | None, float | None]:
    """What the line says was applied; 0 and -1 of top_k and 1 of top_p are none, as engines have it."""
    temperature = row.get("temperature")
    temperature = 1.0 if temperature is None else _number(temperature, f"{where}: temperature")
    if not 1e-3 <= temperature <= 1e3:
        _refuse(f"{where}: temperature", temperature, "0.001 to 1000; of greedy sampling leave it out")
    top_k, top_p = row.get("top_k"), row.get("top_p")
    top_k = None if top_k in (None, 0, -1) else _whole(top_k, f"{where}: top_k")
    top_p = None if top_p is None else _number(top_p, f"{where}: top_p")
    if top_p is not None and not 0 < top_p <= 1:
        _refuse(f"{where}: top_p", top_p, "more than 0 and at most 1")
    return temperature, top_k, None if top_p == 1 else top_p
