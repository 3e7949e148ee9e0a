"""Fewer bits that a library is known for pass where that is asked for; elements are counted to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forward_models import MODELS, random_weights, tokens_of
from helpers import svf as program
from plain_forward import Plain, step

import svf
from stages.errors import UsageError
from stages.files.tensorfile import write_tensors
from stages.judge.explained import Explained

TOKENS = tokens_of(24)


def _half(plain: Plain, right: Any, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """x times a rounded sigmoid, as x * torch.sigmoid(x) is."""
    return plain.r(plain.r(1 / (1 + np.exp(-gate.astype(np.float64)))).astype(np.float32) * gate)


def _truncated(plain: Plain, right: Any, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """In 3 mantissa bits fewer than bfloat16 has: nobody's default."""
    y = np.ascontiguousarray(right(gate, up), np.float32)
    return (y.view(np.uint32) & np.uint32(0xFFF80000)).view(np.float32).reshape(y.shape)


def recorded(folder: Path, silu: Any) -> dict[str, Any]:
    """A plain bfloat16 forward's file, and what `svf.audit` needs beside it."""
    folder.mkdir()
    model = MODELS["qwen3-untied"]
    raw, weights = model.raw("bfloat16"), random_weights(model.config("bfloat16"))
    (folder / "config.json").write_text(json.dumps(raw))
    write_tensors(folder / "model.safetensors", weights, metadata={"format": "pt"})
    plain = Plain(raw, weights, "bfloat16", 0)
    if silu is not None:
        step("silu", silu)(plain)
    write_tensors(folder / "recorded.safetensors", plain.run(TOKENS))
    return {"path": folder / "recorded.safetensors", "model": folder, "tokens": TOKENS}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return recorded(tmp_path_factory.mktemp("half") / "m", _half)


def test_usual_fewer_bits_fail_unless_they_are_accepted(half: dict[str, Any]) -> None:
    given = {name: half[name] for name in ("model", "tokens")}
    plain, accepted = svf.audit(half["path"], **given), svf.audit(half["path"], **given, accept="usual")
    assert (plain.outcome, plain.culprit and plain.culprit["stage"]) == ("faulty", "ffn_silu")
    assert "as x * torch.sigmoid(x) does on bfloat16" in plain.verdict
    assert (accepted.outcome, accepted.culprit) == ("sound", None)
    assert {row["verdict"] for row in accepted.rows if row["stage"] == "ffn_silu"} == {"accepted"}
    assert ", 2 accepted. " in accepted.verdict
    assert "that --accept usual lets pass: ffn_silu as x * torch.sigmoid(x) does on bfloat16 (" in accepted.verdict


def test_what_no_library_does_is_never_accepted(tmp_path: Path) -> None:
    wrong = recorded(tmp_path / "m", _truncated)
    found = svf.audit(wrong["path"], model=wrong["model"], tokens=wrong["tokens"], accept="usual")
    assert (found.outcome, found.culprit and found.culprit["stage"]) == ("faulty", "ffn_silu")


def test_a_diff_accepts_by_side(half: dict[str, Any], tmp_path: Path) -> None:
    """The other side, computed right, stays as it is; the row passes."""
    right = recorded(tmp_path / "m", None)
    given = {"model": half["model"], "tokens": TOKENS}
    plain = svf.diff(half["path"], right["path"], **given)
    accepted = svf.diff(half["path"], right["path"], **given, accept="usual")
    assert (plain.outcome, plain.culprit and plain.culprit["side"]) == ("diverged", "a")
    assert accepted.outcome == "agree", accepted.verdict
    rows = [row for row in accepted.rows if row["stage"] == "ffn_silu"]
    assert {(row["verdict"], row["verdict_a"]) for row in rows} == {("accepted", "accepted")}
    assert all(row["verdict_b"] in ("exact", "rounding") for row in rows)


def test_settings_accept_too(half: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["audit", half["path"], "--model", half["model"], "--tokens", ",".join(map(str, TOKENS))]
    assert program(*arguments).code == 1
    (tmp_path / "svf.toml").write_text('accept = "usual"\n')
    assert program(*arguments).code == 0


def test_another_word_is_refused(half: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="there is usual alone"):
        svf.audit(half["path"], model=half["model"], tokens=half["tokens"], accept="all")


def test_elements_are_counted_over_all_rows(half: dict[str, Any]) -> None:
    result = svf.audit(half["path"], model=half["model"], tokens=half["tokens"], accept="usual")
    found = result.document["explained"]
    assert found["elements"] == sum(row.get("elements") or 0 for row in result.rows) > 20_000
    assert found["bits"] == sum(row.get("bits") or 0 for row in result.rows) > 0.999 * found["elements"]
    assert f"{found['elements']:,} elements, " in result.verdict


def test_not_quite_all_is_never_a_hundred_percent() -> None:
    assert Explained(10**9, 10**9 - 1, 3).words == "1,000,000,000 elements, 99.999% to the last bit by 3 recipes."
    assert Explained(10, 10, 1).words == "10 elements, all to the last bit by 1 recipe."
