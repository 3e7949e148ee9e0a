"""Settings: flags, SVF_<COMMAND>_<OPTION>, SVF_<OPTION>, files, defaults, in that order; what is wrong is named."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, svf

from stages.jobs.doctor import FrameworkRequest
from stages.run.children import run_child


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    for name in [name for name in os.environ if name.startswith("SVF_") and name != "SVF_CACHE"]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def seed(*flags: str) -> int:
    """The seed that `svf synth` runs with."""
    done = svf("synth", f"model-{os.urandom(4).hex()}", "--json", *flags)
    assert done.code == 0, done
    return int(done.json["seed"])


def test_each_source_wins_over_the_next(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert seed() == 0
    (folder / "svf.toml").write_text("seed = 1\n")
    assert seed() == 1
    (folder / "svf.toml").write_text("seed = 1\n[synth]\nseed = 2\n")
    assert seed() == 2
    monkeypatch.setenv("SVF_SEED", "3")
    assert seed() == 3
    monkeypatch.setenv("SVF_SYNTH_SEED", "4")
    assert seed() == 4
    assert seed("--seed", "5") == 5


def test_the_nearest_file_counts_and_svf_toml_before_pyproject(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "pyproject.toml").write_text("[tool.svf.synth]\nseed = 1\n")
    inner = folder / "a" / "b"
    inner.mkdir(parents=True)
    (folder / "a" / "pyproject.toml").write_text("[project]\nname = 'other'\n")  # says nothing, hides nothing
    monkeypatch.chdir(inner)
    assert seed() == 1
    (folder / "svf.toml").write_text("[synth]\nseed = 2\n")
    assert seed() == 2
    (folder / "a" / "svf.toml").write_text("[synth]\nseed = 3\n")
    assert seed() == 3


@pytest.mark.parametrize(("text", "words"), [
    ("sed = 1", ("svf.toml: sed", "is no option or command")),
    ("[synth]\nsed = 1", ("svf.toml: synth.sed", "is no option")),
    ("[sinth]\nseed = 1", ("svf.toml: sinth", "is no option or command")),
    ("[synth]\nseed = 'one'", ("svf.toml: synth.seed", "is a string, expected an integer")),
    ("[synth]\nseed = true", ("svf.toml: synth.seed", "true or false, expected an integer")),
    ("[synth]\njson = 1", ("svf.toml: synth.json", "expected true or false")),
    ("[replay]\nselect = [1]", ("svf.toml: replay.select", "expected a string")),
    ("verbose = 'yes'", ("svf.toml: verbose", "expected true or false")),
    ("version = true", ("svf.toml: version", "is no option")),
    ("seed = ", ("svf.toml", "expected TOML")),
    ("[synth]\npreset = 'huge'", ("preset", "huge")),
])  # fmt: skip
def test_a_wrong_setting_is_a_usage_error_that_names_it(folder: Path, text: str, words: tuple[str, ...]) -> None:
    (folder / "svf.toml").write_text(text)
    done = svf("synth", "model")
    assert done.code == 2
    assert all(word in done.error for word in words), done.error
    assert not (folder / "model").exists()


def test_a_damaged_pyproject_of_something_else_is_none_of_ours(folder: Path) -> None:
    (folder / "pyproject.toml").write_text("[project\n")
    assert seed() == 0
    (folder / "pyproject.toml").write_text("[tool.svf\n")
    assert "pyproject.toml" in svf("synth", "model").error


def test_dashes_and_underscores_are_alike(folder: Path) -> None:
    (folder / "svf.toml").write_text("[replay]\nchunk-rows = 3\n")
    assert "chunk" in svf("replay", "--backend", "reference").error
    (folder / "svf.toml").write_text("[replay]\nchunk_rows = 3\n")
    assert "chunk" in svf("replay", "--backend", "reference").error


def test_children_are_not_changed_by_settings(folder: Path) -> None:
    (folder / "svf.toml").write_text("no_such_option = 1\n")
    assert run_child(FrameworkRequest("jax")).document["devices"][0] == "cpu"


def process(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-P", "-m", "cli", *words], env=env, capture_output=True, text=True, check=False
    )


def test_verbose_logs_to_stderr_and_quiet_does_not(folder: Path) -> None:
    assert process("synth", "model").returncode == 0
    loud, quiet = process("-v", "verify", "model"), process("-q", "verify", "model")
    assert loud.stdout == quiet.stdout
    assert re.search(r"svf: reading model/model.safetensors: \d+ tensors", loud.stderr)
    assert re.search(r"svf: reading .*: \d+\.\d\d s", loud.stderr)
    assert quiet.stderr == ""


def test_no_color_is_honoured(folder: Path) -> None:
    (folder / "x.json").write_text("{}")
    colour = re.compile(r"\x1b\[[0-9;]*3\d")
    assert colour.search(process("verify", "x.json", FORCE_COLOR="1", TERM="xterm-256color").stdout)
    assert not colour.search(process("verify", "x.json", FORCE_COLOR="1", TERM="xterm-256color", NO_COLOR="1").stdout)


def test_completion_lists_commands_whatever_the_settings_say(folder: Path) -> None:
    (folder / "svf.toml").write_text("broken")
    done = process(_SVF_COMPLETE="complete_bash", COMP_WORDS="svf ver", COMP_CWORD="1")
    assert "verify" in done.stdout.split()
    assert "complete" in process(_SVF_COMPLETE="source_bash").stdout
