"""The rooms of `stages/`: what each may import, as pyproject.toml has it, and that a breach is seen."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import MODULES, ROOT

LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_logo=True, cache_dir=None))"


def lint(folder: Path) -> tuple[int, str]:
    """What import-linter says of the packages in `folder`, by its contracts there: exit code and text."""
    env = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", LINT], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("stages/spec/stage.py", "from stages.jobs.replay import ReplayCommand"),
        ("stages/show/files.py", "import stages.run.budget"),
        ("stages/judge/diff.py", "import torch"),
        ("svf_torch/decoder.py", "import jax"),
        ("stages/selftest/apart.py", "from stages.recipes import norm"),
        ("stages/oracle/rope.py", "if TYPE_CHECKING:\n    import stages.judge.audit"),
        ("stages/judge/stats.py", "import stages.judge.audit"),
    ],
)
def test_a_forbidden_import_is_refused(tmp_path: Path, room: str, line: str) -> None:
    for name in ("stages", "svf_torch", "svf_jax", "svf_llama", "svf_onnx"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file = tmp_path / room
    file.write_text(f"{file.read_text()}\n{line}\n")
    code, text = lint(tmp_path)
    assert code == 1, text
    assert "BROKEN" in text


def test_every_module_lies_in_a_room() -> None:
    assert len(MODULES) > 150
    assert sorted(name for name in MODULES if name.count(".") < 2 and not (ROOT / name.replace(".", "/")).is_dir()) == [
        "stages.__init__",
        "stages.errors",
        "stages.progress",
    ]


def test_no_package_imports_the_program_or_the_library() -> None:
    for folder in ("stages", "svf_torch", "svf_jax", "svf_llama", "svf_onnx"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not {"cli", "svf"} & {name.partition(".")[0] for name in names}, file
