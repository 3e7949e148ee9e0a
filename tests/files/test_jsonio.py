"""JSON files: duplicate keys and other junk refused in one line, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers import one_line

from stages.errors import InputError, NotFoundError, OutputError, shown
from stages.files import jsonio
from stages.files.jsonio import parse_json, read_bytes, read_object, to_json, write_atomic, write_json

pytestmark = pytest.mark.faults

REFUSED = {
    "nothing": b"",
    "half an object": b'{"a": 1',
    "not UTF-8": b'{"a": "\xff"}',
    "a duplicate key": b'{"a": 1, "a": 2}',
    "a duplicate key deep inside": b'{"a": [{"b": {"c": 1, "c": 1}}]}',
    "two values": b"{} {}",
    "nesting without end": b"[" * 200_000,
    "an integer of 10,000 digits": b"1" * 10_000,
}


@pytest.mark.parametrize("kind", REFUSED)
def test_junk_is_refused_in_one_line_naming_the_place(kind: str) -> None:
    with pytest.raises(InputError) as error:
        parse_json(REFUSED[kind], "some/file.json")
    assert len(one_line(error.value, "some/file.json")) < 300


def test_a_good_document_is_read() -> None:
    assert parse_json(b'{"a": [1, 2.5, null, "\\u00fc"]}', "x") == {"a": [1, 2.5, None, "ü"]}


def test_only_an_object_is_an_object(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[1]")
    with pytest.raises(InputError) as error:
        read_object(path)
    one_line(error.value, "expected a JSON object, got list")


def test_what_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(NotFoundError) as error:
            read_object(path)
        one_line(error.value, str(path))
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    with pytest.raises(NotFoundError):
        read_bytes(tmp_path / "pipe", 10)
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(InputError):
        read_bytes(tmp_path / "large", 10)


def test_nan_and_infinity_become_null() -> None:
    text = to_json({"a": [float("nan"), float("inf"), -float("inf"), 1.5], "b": (1, float("nan"))})
    assert json.loads(text) == {"a": [None, None, None, 1.5], "b": [1, None]}


def test_one_layout_of_a_document(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": "ü"})
    assert (tmp_path / "a.json").read_bytes() == b'{\n "b": 1,\n "a": "\\u00fc"\n}\n'
    assert read_object(tmp_path / "a.json") == {"b": 1, "a": "ü"}


def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("kept")

    def half(fd: int) -> None:
        os.write(fd, b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError) as error:
        write_atomic(path, half)
    one_line(error.value, str(path), "No space left on device")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "kept")]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(jsonio.os, "write", lambda fd, data: real(fd, bytes(data[:3])))
    write_json(tmp_path / "a.json", {"key": "a longer value"})
    assert read_object(tmp_path / "a.json") == {"key": "a longer value"}


@pytest.mark.parametrize("text", ["\x00", "\x1b[2J", "a\r\nb", "\u202e", "\ud800", "ü", "x" * 1000], ids=ascii)
def test_shown_text_is_printable_and_short(text: str) -> None:
    assert shown(text).isprintable()
    assert len(shown(text)) <= 120
    assert shown("plain ü") == "plain ü"
