"""What a side of --backend both would refuse is refused before any side starts, in one line; what sides are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import svf

from stages.run import children


@pytest.fixture
def no_children(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("a child was started")

    monkeypatch.setattr(children, "run_child", started)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["forward", "--layers", "9"], 2, "no layer 9; there are 0-3"),
        (["forward", "--stages", "nope"], 2, "no stage 'nope'"),
        (["forward", "--adapted", "/no/bundle"], 4, "no such folder"),
        (["forward", "--device", "abacus"], 2, "expected cpu, or a GPU"),
        (["forward", "--layout", "vh"], 2, "needs --adapted"),
        (["forward", "--tokens", "1,99999999"], 2, "99999999"),
        (["forward", "--max-memory", "1M"], 7, "--max-memory allows 0.00 GB"),
        (["replay", "--device", "abacus"], 2, "expected cpu, or a GPU"),
        (["replay", "--select", "zzz"], 2, "matches none of the tensors"),
        (["replay", "--max-memory", "1M"], 7, "--max-memory allows 0.00 GB"),
        (["replay", "/no/bundle"], 4, "no such folder"),
    ],
)
def test_what_can_be_known_is_refused_before_a_side_starts(
    no_children: None, arguments: list[str], code: int, words: str
) -> None:
    done = svf(*arguments, "--backend", "both")
    assert (done.code, words in done.error) == (code, True), done.err
    assert "side" not in done.error


def test_each_side_is_held_to_its_memory(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def seen(request: Any, *_: object, **__: object) -> children.ChildResult:
        asked.append(request)
        return children.ChildResult(7, None)

    monkeypatch.setattr(children, "run_child", seen)
    assert svf("replay", made / "components", "--max-memory", "2G").code == 7
    assert svf("forward", "--max-memory", "2G").code == 7
    assert len(asked) == 4
    assert all(request.max_memory == 2_000_000_000 for request in asked)
