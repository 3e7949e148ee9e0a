"""Every command that a page shows is run as shown, or, in an example of --help, at least understood."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import typer.main
from gguf_files import gguf_of
from helpers import ROOT, fresh, some, svf
from logprob_files import write_examples
from onnx_files import kept
from plain_forward import gelu_tanh
from tool_dumps import nx_safetensors

import cli

pytestmark = pytest.mark.slow

# The two commands that make what the pages take for granted are shown in guides/README.md.
SETUP = ROOT / "docs" / "guides" / "README.md"
README = (ROOT / "README.md").read_text()
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
    gguf_of(folder / "MODEL", folder / "model.gguf", "Q8_0")
    kept(folder / "CHECKPOINT")[1].rename(folder / "model.onnx")
    nx_safetensors(folder / "MODEL", [1, 2, 3, 4, 5], folder / "nx")
    (folder / "nx" / "hooks.safetensors").rename(folder / "hooks.safetensors")
    ports = {"port.safetensors": "none", "my-port.safetensors": "gate and up swapped"}
    runs = [word for out, fault in ports.items() for word in ("MODEL", "float32", out, fault)]
    subprocess.run([*program, *runs], cwd=folder, check=True)
    write_examples(folder)
    return folder


@pytest.mark.long
@pytest.mark.parametrize(
    "page", some(PAGES, [page for page in PAGES if page.name != "bit-mismatch.md"]), ids=lambda page: page.name
)
def test_every_command_of_a_page_runs(
    page: Path, set_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = commands(page.read_text())
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


def test_the_readme_is_a_page_and_leads_to_every_command() -> None:
    assert len(README.splitlines()) <= 140
    group = typer.main.get_command(cli.app)
    named = set(re.findall(r"^## svf ([a-z]+)$", (ROOT / "docs" / "cli.md").read_text(), re.MULTILINE))
    assert named == {name for name, command in group.commands.items() if not command.hidden}  # type: ignore[attr-defined]
    assert "(docs/cli.md)" in README


def is_shown(cells: list[str], line: str) -> bool:
    """Whether a printed line has these cells, the share of its bound that a rounding takes within a fifth."""
    *names, last = cells
    if names[1:] != ["rounding"]:
        return all(cell in line for cell in cells)
    shares = [cell.strip() for cell in line.split("│")]
    return shares[:2] == names and float(shares[3]) == pytest.approx(float(last), rel=0.2)


def test_the_session_of_the_readme_is_what_happens(set_up: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line shown is printed, in this order; rows with the columns that a narrow terminal has.

    How far a row that rounds is from its bound goes by the CPU: 0.436 of it on one, 0.425 on another.
    """
    monkeypatch.chdir(set_up)
    shown = README.partition("## A session")[2].partition("\n## ")[0]
    (command,) = commands(shown)
    lines = [line.strip() for line in shown.partition(command.comment)[2].splitlines() if line.startswith("    ")]
    printed = svf(*command.words).out.replace("svf --no-progress", "svf").splitlines()
    for line in lines:
        cells = [cell.strip() for cell in re.split("[│┃]", line.removesuffix("..."))]
        while not is_shown(cells, printed[0]):
            printed.pop(0)  # IndexError: the line is nowhere after those before
    assert len(lines) > 8


def test_the_library_of_the_readme_is_what_happens(set_up: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(set_up)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(block.splitlines()) <= 10
    gate = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    wrong = gelu_tanh(gate).astype(np.float32)

    def norm(x: np.ndarray, weight: np.ndarray, *, eps: float) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight

    given = {"x": gate, "weight": gate[0], "torch_norm": norm, "jax_norm": norm, "gate": gate, "y": wrong}
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(block, given)
    told = re.findall(r"print\(found\)  # (.*)", block)[0].split("...")
    assert [part in out.getvalue() for part in told] == [True, True]
    assert "faulty" in out.getvalue()


def test_links_lead_somewhere() -> None:
    """Every relative link of every page, and nothing that a page names lies outside the project."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "stages").rglob("*.md")]
    assert len(pages) > 20
    for page in pages:
        text = page.read_text()
        for target in re.findall(r"\]\(([^)\s]+)\)", text.replace("\n", " ")):
            if not target.startswith(("http://", "https://", "#")):
                place = (page.parent / target.partition("#")[0]).resolve()
                assert place.exists(), f"{page}: {target}"
                assert place.is_relative_to(ROOT), f"{page}: {target}"


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
    shown = (command.help or "").partition("Examples:\n")[2].replace(r"\[", "[")
    examples = commands("".join(f"    {line}\n" for line in shown.splitlines()))
    assert examples or command.hidden, f"svf {name} --help has no example"
    for shown in examples:
        assert shown.words[0] == name
        command.make_context(name, shown.words[1:])


def test_the_reference_of_commands_is_what_help_prints() -> None:
    """docs/cli.md is generated in a fresh interpreter; here one command's help is looked up in it."""
    done = fresh("import cli; cli.app(['layouts', '--help'])", COLUMNS="100", TERMINAL_WIDTH="100")
    page = (ROOT / "docs" / "cli.md").read_text()
    assert done.stdout.splitlines()[0].strip() in page
