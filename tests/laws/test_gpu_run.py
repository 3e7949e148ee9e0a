"""The command that asks a GPU (benchmarks/gpu.sh), in its dry run on a CPU: some of its steps, and what it packs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow

STEPS = ("units", "synth", "torch-bfloat16")


@pytest.mark.long
@pytest.mark.processes
def test_its_steps_run_and_are_packed(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", "benchmarks/gpu.sh", str(tmp_path), "cpu", *STEPS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "all.tgz") as packed:
        packed.extractall(tmp_path, filter="data")
    log = (tmp_path / "log").read_text().splitlines()
    assert [line.partition(",")[0] for line in log] == [f"{step}: exit 0" for step in STEPS]
    rows = [json.loads(line) for line in (tmp_path / "units.json").read_text().splitlines()]
    # On a CPU no tensor core is all of it, and sums of 16 terms are a chain; a GPU's must be one unit's.
    assert {(row["library"], row["dtype"], row["k"]) for row in rows} == {
        (library, dtype, k)
        for library in ("torch", "jax")
        for dtype in ("bfloat16", "float16", "float32")
        for k in (16, 64)
    }
    assert all(len(row["equal"]) >= 3 and 0 <= min(row["equal"].values()) <= 1 for row in rows)
    forward = json.loads((tmp_path / "torch-bfloat16.json").read_text())
    assert forward["schema"].startswith("svf.forward/")
    assert "torch-bfloat16" in done.stdout.splitlines()[-1]
