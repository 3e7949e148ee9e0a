"""Every command that a page shows is run as shown, or, in an example of --help, at least understood."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer.main
from helpers import ROOT, fresh, svf

import cli

# The two commands that make what the pages take for granted are shown in guides/README.md.
SETUP = ROOT / "docs" / "guides" / "README.md"
# Python, not commands: tests/laws/test_library.py runs it.
LIBRARY = ROOT / "docs" / "guides" / "library.md"
PAGES = [
    ROOT / "README.md",
    *sorted(p for p in (ROOT / "docs" / "guides").glob("*.md") if p not in (SETUP, LIBRARY)),
]
NEEDS_GPU = "needs a GPU"


@dataclass(frozen=True)
class Shown:
    """A command line of a page, with the exit code that its comment tells."""

    line: str
    comment: str

    @property
    def code(self) -> int:
        told = re.search(r"exits (\d+)", self.comment)
        return int(told.group(1)) if told else 0

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line.partition(" > ")[0])[1:]

    @property
    def target(self) -> str:
        """The file that stdout goes to; empty for none."""
        return self.line.partition(" > ")[2]


def commands(text: str) -> list[Shown]:
    """The command lines of a page: indented or fenced, `svf ...` or `$ svf ...`, a backslash joins lines."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        match = re.match(r"(?: {4,}|\$ )\s*(?:\$ )?(svf [a-z][^#]*)(?:# *(.*))?$", line)
        if match:
            found.append(Shown(match.group(1).strip(), match.group(2) or ""))
    return found


@pytest.fixture(scope="session")
def set_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages' commands start from."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for shown in commands(SETUP.read_text()):
            assert svf(*shown.words).code == shown.code, shown.line
    program = [sys.executable, str(ROOT / "tests" / "support" / "foreign_program.py"), "1,2,3,4,5"]
    subprocess.run([*program, "MODEL", "float32", "port.safetensors", "none"], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_runs(
    page: Path, set_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = commands(page.read_text())
    if not any(command.words[0] == "synth" for command in shown):  # the README starts from nothing
        for source in set_up.iterdir():
            (tmp_path / source.name).symlink_to(source)
    assert shown, "no command found"
    for command in shown:
        done = svf(*command.words)
        if NEEDS_GPU in command.comment and done.code == 2:
            assert "device" in done.error
            continue
        assert done.code == command.code, f"{command.line}\n{done.out[-500:]}\n{done.err}"
        if command.target:
            Path(command.target).write_text(done.out)


def test_the_readme_names_every_command() -> None:
    group = typer.main.get_command(cli.app)
    named = set(re.findall(r"`svf ([a-z]+)", (ROOT / "README.md").read_text()))
    assert {name for name, command in group.commands.items() if not command.hidden} <= named  # type: ignore[attr-defined]


def test_commands_are_found() -> None:
    assert (commands("    svf a > b.json\n")[0].words, commands("    svf a > b.json\n")[0].target) == (["a"], "b.json")
    page = "x\n    svf a --b \\\n      c   # exits 1\n    $ svf d\n    svf is a tool\n`svf e`\n```\n$ svf f\n```\n"
    assert [(c.words, c.code) for c in commands(page)][:2] == [(["a", "--b", "c"], 1), (["d"], 0)]
    assert commands(page)[-1].words == ["f"]


@pytest.mark.parametrize("name", sorted(typer.main.get_command(cli.app).commands))  # type: ignore[attr-defined]
def test_examples_of_help_are_understood(name: str) -> None:
    """Options and arguments of every example exist; nothing is run."""
    group = typer.main.get_command(cli.app)
    command = group.commands[name]  # type: ignore[attr-defined]
    examples = commands((command.epilog or "").replace("  svf", "    svf"))
    assert examples or command.hidden, f"svf {name} --help has no example"
    for shown in examples:
        assert shown.words[0] == name
        command.make_context(name, shown.words[1:])


def test_the_reference_of_commands_is_what_help_prints() -> None:
    """docs/cli.md is generated in a fresh interpreter; here one command's help is looked up in it."""
    done = fresh("import cli; cli.app(['layouts', '--help'])", COLUMNS="100", TERMINAL_WIDTH="100")
    page = (ROOT / "docs" / "cli.md").read_text()
    assert done.stdout.splitlines()[0].strip() in page
