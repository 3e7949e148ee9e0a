"""Scratch folders: gone with their run; of a run that was killed, cleared away by the next one, and nothing else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from helpers import ROOT

from stages.files import scratch
from stages.files.scratch import scratch_folder


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of the system's, empty."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    scratch._reap.cache_clear()
    return tmp_path / "tmp"


HOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from stages.files.scratch import scratch_folder
with scratch_folder("held") as work:
    (work / "big").write_bytes(b"x")
    print(work, flush=True)
    time.sleep(60)
"""


def holder() -> tuple[subprocess.Popen[str], Path]:
    """A process that holds a folder."""
    child = subprocess.Popen([sys.executable, "-c", HOLD, ROOT], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    return child, Path(child.stdout.readline().strip())


def test_a_folder_is_empty_and_gone_afterwards(place: Path) -> None:
    with scratch_folder("one") as one, scratch_folder("two") as two:
        assert (list(one.iterdir()), list(two.iterdir())) == ([], [])
        assert one.parent.parent == place
        (one / "x").mkdir()
    assert list(place.iterdir()) == []


def test_what_a_killed_run_left_is_cleared_away_and_what_a_live_one_holds_is_not(place: Path, tmp_path: Path) -> None:
    killed, left = holder()
    alive, held = holder()
    killed.kill()
    killed.wait()
    # Of other programs, of another version, a link with our name, and one not locked yet.
    (place / "svf-other").mkdir()
    (place / "svf-other" / "precious").touch()
    (place / "unrelated").mkdir()
    (place / "unrelated" / scratch._MARK).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / scratch._MARK).touch()
    (place / "svf-link").symlink_to(tmp_path / "elsewhere")
    try:
        with scratch_folder("next"):
            assert not left.parent.exists()
            assert (held / "big").exists()
            assert (place / "svf-other" / "precious").exists()
            assert (place / "unrelated").exists()
            assert (tmp_path / "elsewhere" / scratch._MARK).exists()
    finally:
        alive.send_signal(signal.SIGKILL)
        alive.wait()


def test_a_killed_command_leaves_nothing_for_long(place: Path, model: Path) -> None:
    command = [
        sys.executable,
        ROOT / "svf_torch" / "start.py",
        "forward",
        model,
        "--backend",
        "both",
        "--tokens",
        "1,2",
    ]
    child = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(place)}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(place.glob("svf-watch-*/in/place")) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.kill()
    child.wait()
    assert list(place.glob("svf-forward-*"))
    time.sleep(1)  # its child ends with it
    after = [*command[:3], model, "--backend", "reference", "--tokens", "1"]
    subprocess.run(after, env=os.environ | {"TMPDIR": str(place)}, capture_output=True, check=True)
    assert not list(place.glob("svf-forward-*"))
