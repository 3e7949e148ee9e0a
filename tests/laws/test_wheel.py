"""A wheel built from the tree works outside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
def test_a_wheel_works_outside_the_tree(tmp_path: Path) -> None:
    """Built from what git would ship, installed alone, run in an empty folder: both sides, in child processes."""
    tree, site, empty = tmp_path / "tree", tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "cli.py"):
        shutil.copy(ROOT / name, tree)
    for package in ("stages", "svf_torch", "svf_jax", "svf_llama", "svf_onnx"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(tree)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    env = {**os.environ, "PYTHONPATH": str(site), "SVF_CACHE": str(tmp_path / "cache")}
    assert (site / "stages" / "show" / "skill" / "SKILL.md").is_file()
    assert (site / "stages" / "files" / "formats" / "transformers.toml").is_file()
    where = [sys.executable, "-P", "-c", "import cli, stages, svf_torch, svf_jax; print(stages.__file__)"]
    found = subprocess.run(where, env=env, cwd=empty, check=True, capture_output=True, text=True).stdout
    assert Path(found.strip()).is_relative_to(site)
    run = [sys.executable, str(site / "bin" / "svf"), "--no-progress", "replay", "--layout", "torch_v", "--json"]
    run += ["--html", str(tmp_path / "report.html")]
    done = subprocess.run(run, env=env, cwd=empty, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outcome"] == "agree"
    assert "<!doctype html>" in (tmp_path / "report.html").read_text()
    assert not list(empty.iterdir())
