"""What the command line answers beside results: its version, errors as documents, settings that are none, choices in
any case, files that are there already, and its own modules whatever the path holds."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import typer.main
from helpers import ROOT, fresh, svf

import cli
from stages import errors
from stages.commands import settings
from stages.commands.program import COMMANDS
from stages.errors import NotFoundError, SvfError, exhausted
from stages.files.tensorfile import write_tensors
from stages.jobs.forward_one import ForwardCommand
from stages.progress import Progress
from stages.run.children import ChildResult, SideError, document_of, run_sides

pytestmark = pytest.mark.slow

GROUP: Any = typer.main.get_command(cli.app)
FUNCTIONS = {command.name: command.function for command in COMMANDS}


# Version, and what the environment may set.


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_the_version_is_printed_without_a_command(flag: str) -> None:
    done = svf(flag)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("svf ")


@pytest.mark.parametrize("name", [
    "SVF_VERSION", "SVF_HELP", "SVF_INSPECT_HELP", "SVF_SHOW_COMPLETION",
])  # fmt: skip
def test_what_acts_and_exits_or_is_hidden_is_no_setting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "some text")
    done = svf("inspect", "nowhere")
    assert (done.code, done.out) == (4, "")
    command = name.split("_")[1].lower()
    if command in GROUP.commands:
        assert settings.default_map(None, os.environ, {}, {command: settings.options_of(FUNCTIONS[command])}) == {
            command: {}
        }


def test_options_of_a_command_and_of_all_from_the_environment() -> None:
    options = settings.options_of(FUNCTIONS["replay"])
    environment = {"SVF_REPLAY_TOP": "1", "SVF_TOP": "2", "SVF_SELECT": "q_proj k_proj", "SVF_DEVICE": ""}
    found = settings.default_map(None, environment, settings.options_of(cli.main), {"replay": options})
    assert found == {"replay": {"top": "1", "select": ["q_proj", "k_proj"]}}


# Choices.


def test_every_choice_is_taken_in_any_case() -> None:
    options = [
        info
        for command in cli.app.registered_commands
        for hint in get_type_hints(command.callback, include_extras=True).values()
        for info in getattr(hint, "__metadata__", ())
        if any("StrEnum" in str(getattr(kind, "__mro__", "")) for kind in (hint.__origin__, *get_args(hint.__origin__)))
    ]
    assert len(options) > 20
    assert not [option.param_decls for option in options if option.case_sensitive]


@pytest.mark.parametrize("words", [("--backend", "REFERENCE"), ("--backend", "Reference", "--precision", "EXACT")])
def test_a_choice_in_any_case(made: Path, words: tuple[str, ...]) -> None:
    assert svf("replay", made / "components", "--select", "k_proj", *words).code == 0


def test_a_wrong_choice_is_told_in_plain_words() -> None:
    done = svf("replay", "--backend", "JAKS")
    assert done.code == 2
    assert done.error.startswith("svf: Invalid value for '--backend': 'JAKS' is not one of 'torch'")


# Errors as documents.


@pytest.mark.parametrize(("words", "code", "kind"), [
    (("inspect", "nowhere"), 4, "not found"),
    (("inspect", "--other"), 2, "usage"),
    (("no-such-command",), 2, "usage"),
    (("replay", "--backend", "JAKS"), 2, "usage"),
    (("forward", "--layout", "all"), 2, "usage"),
    (("inspect", ROOT / "README.md"), 3, "input"),
    (("replay", "--backend", "torch", "--html", ROOT / "README.md"), 6, "output"),
])  # fmt: skip
def test_with_json_an_error_is_a_document_too(words: tuple[object, ...], code: int, kind: str) -> None:
    done = svf(*words, "--json")
    assert done.code == code
    document = done.json
    assert document.keys() == {"schema", "exit_code", "error", "message", "command", "next"}
    assert (document["schema"], document["exit_code"], document["error"]) == (errors.SCHEMA, code, kind)
    assert done.error == f"svf: {document['message']}"
    assert document["command"].endswith("--json")
    plain = svf(*words)
    assert (plain.code, plain.out, plain.error) == (code, "", done.error)


def test_a_setting_asks_for_json_as_the_flag_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVF_INSPECT_JSON", "yes")
    assert svf("inspect", "nowhere").json["exit_code"] == 4
    assert svf("verify", "nowhere").out == ""


def test_an_internal_error_is_a_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.jobs.inspect.inspect", lambda _source: 1 / 0)
    done = svf("inspect", "x", "--json")
    assert (done.code, done.json["error"], done.json["exit_code"]) == (70, "internal", 70)
    assert done.json["next"] == ["svf --debug --no-progress inspect x --json"]


def test_next_of_an_error_is_what_its_message_quotes() -> None:
    assert svf("inspect", "--other", "--json").json["next"] == ["svf inspect --help"]
    assert svf("inspect", "nowhere", "--json").json["next"] == []


def test_every_error_has_a_kind() -> None:
    classes = {error.exit_code for error in [SvfError, *SvfError.__subclasses__()]}
    assert classes <= errors.KINDS.keys()
    assert all(json.dumps(errors.error_document("é\u2028", code, "svf")).isascii() for code in errors.KINDS)


# What a side says is said once.


def test_what_both_sides_refuse_is_said_once(made: Path) -> None:
    done = svf("forward", "--backend", "both", "--layers", "9", "--json")
    assert (done.code, done.error) == (2, "svf: --layers 9: no layer 9; there are 0-3")
    assert done.json["message"] == "--layers 9: no layer 9; there are 0-3"


def sides(monkeypatch: pytest.MonkeyPatch, **ends: ChildResult) -> str:
    results = iter(ends.values())
    monkeypatch.setattr("stages.run.children.run_child", lambda _request, timeout, progress: next(results))
    with pytest.raises(SvfError) as error:
        run_sides({name: ForwardCommand(backend=name) for name in ends}, Progress(False))
    return str(error.value)


def test_what_the_sides_say_apart_is_said_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    bad, worse, well = ChildResult(2, None, error="bad"), ChildResult(3, None, error="worse"), ChildResult(0, {})
    assert sides(monkeypatch, torch=bad, jax=bad) == "bad"
    assert sides(monkeypatch, torch=bad, jax=worse) == ("the torch side stopped: bad; the jax side stopped: worse")
    assert sides(monkeypatch, torch=well, jax=bad) == "the jax side stopped: bad"
    with pytest.raises(SideError) as error:
        document_of("jax", ChildResult(1, None))
    assert (error.value.exit_code, "stands above" in str(error.value)) == (70, True)


# Files that are there already.


def test_a_report_is_replaced_only_when_asked(made: Path, tmp_path: Path) -> None:
    page, report = tmp_path / "r.html", tmp_path / "r.json"
    command = ["replay", made / "components", "--backend", "reference", "--select", "k_proj", "--html", page]
    page.write_text("mine")
    report.write_text("mine too")
    for more in (["--html", page], ["--html", tmp_path / "new.html", "--report", report]):
        done = svf(*command, *more)
        assert (done.code, "--force" in done.error) == (6, True)
    assert (page.read_text(), report.read_text()) == ("mine", "mine too")
    assert svf(*command, "--report", report, "--force").code == 0
    assert page.read_text().startswith("<!doctype html>")
    assert json.loads(report.read_text())["schema"]
    link = tmp_path / "link.html"
    link.symlink_to(page)
    for other in (tmp_path, link):
        assert svf(*command, "--html", other, "--force").code == 6


def test_every_command_that_writes_a_page_can_replace_it() -> None:
    options = {name: {o for p in command.params for o in p.opts} for name, command in GROUP.commands.items()}
    with_page = {name for name, flags in options.items() if "--html" in flags}
    assert with_page >= {"replay", "forward", "diff", "audit", "report"}
    assert all("--force" in options[name] for name in {*with_page, "decompose", "route"})


# Its own modules.


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder with modules of this program's names, each of which ends the process."""
    for name in ("cli.py", "stages/__init__.py", "svf_jax/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit(99)")
    # First, whatever the installation's own .pth files put there.
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n")
    return tmp_path


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The console script, as pip writes it."""
    entry = (ROOT / "pyproject.toml").read_text().partition('[project.scripts]\nsvf = "')[2].partition('"')[0]
    module, _, attribute = entry.partition(":")
    (tmp_path / "svf").write_text(f"import sys\nfrom {module} import {attribute}\nsys.exit({attribute}())\n")
    return tmp_path / "svf"


def test_the_installed_program_finds_its_own_modules(made: Path, hostile: Path, script: Path) -> None:
    """In a folder of the user's that is first on the path; the sides' processes too."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(hostile), str(ROOT)))}
    command = [sys.executable, script, "-q", "replay", made / "components", "--select", "k_proj", "--json"]
    done = subprocess.run(command, cwd=hostile, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["outcome"] == "agree"
    seen = fresh("import cli", PYTHONPATH=env["PYTHONPATH"])
    assert seen.returncode == 99  # so this path is hostile indeed


# Little of everything.


def limited(script: Path, limit: str, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The installed program under a limit as a shell sets it."""
    command = ["sh", "-c", f'ulimit {limit}; exec "$@"', "sh", sys.executable, script, *map(str, words)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("limit", ["-n 6", "-v 45000", "-v 60000", "-v 120000"])
def test_without_handles_or_memory_it_says_so(script: Path, made: Path, limit: str) -> None:
    """At 120 MB OpenBLAS ends the process, with exit code 1 and a line of its own."""
    done = limited(script, limit, "inspect", made / "components", "--json")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("OpenBLAS")]
    assert done.returncode == 7, done.stderr
    assert len(lines) == 1
    assert lines[0].startswith("svf: no file handles left" if "-n" in limit else "svf: out of memory"), lines
    assert json.loads(done.stdout)["error"] == "resource"


def test_c_code_that_gave_up_without_a_word_ran_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython says "error return without exception set" where an allocation failed unreported (seen once, at 40 MB)."""
    silent = SystemError("error return without exception set")
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (40_000 * 1024, resource.RLIM_INFINITY))
    assert (exhausted(silent) or "").startswith("out of memory")
    assert exhausted(SystemError("bad argument to internal function")) is None
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert exhausted(silent) is None  # a bug, and told as one


def test_a_limit_that_suffices_changes_nothing(script: Path, made: Path) -> None:
    free, bound = (limited(script, limit, "inspect", made / "components") for limit in ("-n 64", "-v 2000000"))
    assert (bound.returncode, bound.stdout, bound.stderr) == (0, free.stdout, "")
    assert limited(script, "-v 2000000", "inspect", "nowhere").returncode == 4


def test_memory_that_ran_out_inside_an_error_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_handles(_source: str) -> None:
        try:
            raise OSError(24, "Too many open files")
        except OSError:
            raise NotFoundError("x: cannot be read") from None

    monkeypatch.setattr("stages.jobs.inspect.inspect", no_handles)
    assert (svf("inspect", "x").code, "handles" in svf("inspect", "x").error) == (7, True)


@pytest.mark.long
def test_optimised_python_changes_nothing(script: Path) -> None:
    plain, optimised = (limited(script, "-n 64", "diff", "--help", **env) for env in ({}, {"PYTHONOPTIMIZE": "2"}))
    assert (optimised.returncode, optimised.stdout) == (0, plain.stdout)
    words = ("forward", "--backend", "torch", "--tokens", "1,2", "--json")
    one, other = svf(*words).json, json.loads(limited(script, "-n 64", *words, PYTHONOPTIMIZE="2").stdout)
    assert one["production"]["agrees"]
    assert [one[key] for key in ("lm_head_sha256", "production")] == [
        other[key] for key in ("lm_head_sha256", "production")
    ]


# What a terminal would obey.

HOSTILE = "a\x1b[31mb\x9bc\u202ed\u2028e\nf\rg\u200fh"


def only_printable(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def test_no_name_commands_the_terminal(tmp_path: Path) -> None:
    """Names of tensors, files and folders, in a listing, a log, a document and an error."""
    folder = tmp_path / HOSTILE
    folder.mkdir()
    file = folder / "x.safetensors"
    write_tensors(file, {HOSTILE: np.zeros(1, np.float32), "plain": np.zeros(1, np.float32)})
    for words in (("inspect", file), ("verify", file), ("inspect", folder)):
        done = svf(*words)
        assert only_printable(done.out), done.out
        assert only_printable(done.err), done.err
        assert "f\\rg" in done.out + done.err
        # A newline in a name begins no line.
        assert not [line for line in (done.out + done.err).splitlines() if line.startswith("f")]
        assert svf(*words, "--json").out.isascii()
    assert svf("inspect", file, "--json").json["tensors"]
    log = subprocess.run(
        [sys.executable, ROOT / "svf_torch" / "start.py", "-v", "verify", file],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert only_printable(log)
    assert all(line.startswith("svf: ") for line in log.splitlines())
    assert "reading" in log


def test_what_is_written_while_it_works_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(True)
    progress._last = -1e9
    progress(HOSTILE, 0.5)
    progress.say(HOSTILE)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)


def test_every_text_of_a_document_is_made_printable_once() -> None:
    value = {HOSTILE: [HOSTILE, (HOSTILE, 1.5, None)], "n": float("inf")}
    clean = errors.all_shown(value)
    assert errors.all_shown(clean) == clean
    assert only_printable("".join(clean))
    assert (clean["n"], clean[errors.shown(HOSTILE)][1][1:]) == (float("inf"), (1.5, None))
