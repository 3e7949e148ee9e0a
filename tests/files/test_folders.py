"""Output folders: what is accepted, and every refusal before work starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stages.errors import OutputError, ResourceError
from stages.files.folders import ensure_space, prepare_folder

pytestmark = pytest.mark.faults


def _one_line(error: pytest.ExceptionInfo[Exception], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text


@pytest.mark.parametrize("name", ["new", "a/b/c", "with space", "ünicode"])
def test_a_new_folder_is_created_with_its_parents(tmp_path: Path, name: str) -> None:
    folder = prepare_folder(tmp_path / name)
    assert folder == tmp_path / name
    assert list(folder.iterdir()) == []


def test_an_empty_folder_and_a_link_to_one_are_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert prepare_folder(tmp_path / "empty") == tmp_path / "empty"
    assert prepare_folder(str(tmp_path / "link")) == tmp_path / "link"
    assert list((tmp_path / "empty").iterdir()) == []


def _full(path: Path) -> None:
    path.mkdir()
    (path / ".hidden").touch()


REFUSED = {
    "a folder with content": (_full, "not empty"),
    "a file": (lambda path: path.write_text("kept"), "a file"),
    "a pipe": (os.mkfifo, "pipe"),
    "a dangling link": (lambda path: path.symlink_to("nowhere"), "link to 'nowhere'"),
    "a link to a file": (lambda path: path.symlink_to("/etc/hostname"), "not a folder"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "link"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_there_is_refused_and_kept(tmp_path: Path, kind: str) -> None:
    make, word = REFUSED[kind]
    path = tmp_path / "out"
    make(path)
    before = path.lstat()
    with pytest.raises(OutputError) as error:
        prepare_folder(path)
    _one_line(error, str(path), word)
    assert (path.lstat().st_ino, path.lstat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


# /proc and /sys take no new files, not even from root.
@pytest.mark.parametrize(
    "path", ["/proc/out", "/sys/out", "/proc/sys/out", "/dev/null", "/dev/null/out", "a\0b", "x" * 300]
)
def test_a_place_that_cannot_be_written_is_refused(path: str) -> None:
    with pytest.raises(OutputError) as error:
        prepare_folder(path)
    _one_line(error)


def test_an_empty_folder_that_takes_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object, **__: object) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(OutputError) as error:
        prepare_folder(tmp_path)
    _one_line(error, str(tmp_path), "Read-only file system")


def test_too_little_space_is_refused_with_both_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> object:
        asked.append(path)
        if not path.exists():
            raise FileNotFoundError(2, "No such file or directory")
        return type("Usage", (), {"free": 1000})()

    monkeypatch.setattr("stages.files.folders.shutil.disk_usage", usage)
    ensure_space(tmp_path, 1000)
    with pytest.raises(ResourceError) as error:
        ensure_space(tmp_path / "not" / "yet", 1001)
    _one_line(error, "1,001 bytes", "1,000 bytes")
    assert asked[-1] == tmp_path


def test_the_real_disk_is_asked(tmp_path: Path) -> None:
    ensure_space(tmp_path / "new" / "folder", 1)
    with pytest.raises(ResourceError):
        ensure_space(tmp_path / "new" / "folder", 2**62)
