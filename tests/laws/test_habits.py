"""What a project keeps to: one place for the version, one script for every check, no badge."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def _sources() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git: nothing says which files are the project's")
    kinds = (".py", ".md", ".cff", ".toml")
    return [ROOT / name for name in listed.stdout.splitlines() if name.endswith(kinds)]


def test_the_version_stands_in_one_place() -> None:
    """Only the changelog, which tells of all versions, may name it too."""
    version = re.compile(rf"(?<![\d.]){re.escape(PROJECT['project']['version'])}(?![\d.])")
    sources = _sources()
    assert len(sources) > 200
    named = [path.relative_to(ROOT).as_posix() for path in sources if version.search(path.read_text())]
    assert set(named) - {"CHANGELOG.md"} == {"pyproject.toml"}


def test_the_workflow_runs_the_contributors_script_on_the_oldest_and_the_newest_python() -> None:
    job = _yaml(".github/workflows/ci.yml")["jobs"]["check"]
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert job["strategy"]["matrix"]["python"] == [oldest, "3.x"]
    assert job["steps"][-1]["run"] == ".ci/run"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100


def test_hooks_are_the_checks_of_make() -> None:
    """Every hook is a line of `make check`; so is every line but those on the whole tree, imports and shapes."""
    (repo,) = _yaml(".pre-commit-config.yaml")["repos"]
    check = (ROOT / "Makefile").read_text().partition("check: .venv/dev\n")[2].partition("\n\n")[0]
    lines = {line.strip().removesuffix(" .") for line in check.splitlines()}
    assert {hook["entry"] for hook in repo["hooks"]} == {
        line for line in lines if "lint-imports" not in line and "pytest" not in line
    }


def test_an_issue_asks_for_what_reproduces_it() -> None:
    body = _yaml(".github/ISSUE_TEMPLATE/wrong-verdict.yml")["body"]
    required = " ".join(item["attributes"]["label"] for item in body if item.get("validations", {}).get("required"))
    assert "--json" in required
    assert "svf doctor --json" in required


def test_no_badge_can_lie() -> None:
    assert not re.search(r"shields\.io|badge\.svg|!\[[^]]*\]\(https?:", (ROOT / "README.md").read_text())


def test_what_make_quick_runs_is_there() -> None:
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    listed = next(line for line in text.splitlines() if line.startswith("QUICK =")).split()[2:]
    assert len(listed) > 8
    assert [path for path in listed if not (ROOT / path).exists()] == []
