"""Where PyTorch is not installed: what needs none runs, and what needs it says so in one line."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has all of this one's packages but torch."""
    folder = tmp_path_factory.mktemp("without-torch") / "venv"
    venv.create(folder, symlinks=True)
    there = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    for place in {Path(p) for p in sys.path if p.endswith("site-packages")}:
        for entry in place.iterdir():
            ours = entry.name.startswith(("torch", "functorch", "__editable__")) or entry.suffix == ".pth"
            if not ours and not (there / entry.name).exists():
                (there / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("replay --backend jax --select k_proj", 0, "AGREE"),
        pytest.param("layouts", 0, "AGREE", marks=pytest.mark.thorough),
        pytest.param("forward --backend jax --layers 0 --no-production", 0, "jax", marks=pytest.mark.thorough),
        ("replay --backend torch", 4, "torch is not installed, and this needs it: pip install torch"),
        pytest.param("forward --backend both", 4, "torch is not installed", marks=pytest.mark.thorough),
        ("doctor", 1, "torch is not installed"),
    ],
)
def test_what_needs_no_torch_runs_without_it(
    python: Path, tmp_path_factory: pytest.TempPathFactory, words: str, code: int, said: str
) -> None:
    env = {**os.environ, "SVF_CACHE": str(tmp_path_factory.getbasetemp() / "cache-without-torch"), "NO_COLOR": "1"}
    command = [python, "-P", ROOT / "svf_torch" / "start.py", "--no-progress", *words.split()]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
    assert "internal error" not in done.stdout + done.stderr
