"""Memory: estimated before anything is loaded, and an allocation beyond --max-memory ends with exit code 7."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, one_line, svf

from stages.errors import ResourceError, UsageError
from stages.jobs.synth import config_json
from stages.run.budget import forward_bytes, hold_memory, parse_size, replay_bytes
from stages.spec.families import parse_config
from stages.spec.forward import forward_pipeline

pytestmark = pytest.mark.faults


@pytest.mark.parametrize(
    ("text", "size"), [("500M", 500_000_000), ("2G", 2_000_000_000), ("1.5GiB", 3 * 2**29), ("7", 7), (" 1 kb ", 1000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "1T", "1e9", "nan", "٣G", "9" * 40])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_size(text)
    one_line(error.value, "--max-memory")


def test_estimates_follow_what_is_asked() -> None:
    """More tokens, wider dtypes and larger chunks take more; the 0.6B shape is near what was measured."""
    config = parse_config(config_json("qwen3-0.6b"), "x")
    one, two = (forward_bytes(config, forward_pipeline(config, dtype), 64) for dtype in ("bfloat16", "float32"))
    assert one < two < forward_bytes(config, forward_pipeline(config, "float32"), 4096)
    assert 0.72e9 < two < 1.1e9  # `svf forward`, torch: 0.72 GB peak
    assert 1.3e9 < replay_bytes([(151_936, 1024)], None) < 2.5e9  # judged replays: 1.42 and 1.82 GB peak
    assert replay_bytes([(151_936, 1024)], 256) < replay_bytes([(151_936, 1024)], None)


def test_too_much_is_refused_before_it_is_loaded(model: Path, made: Path) -> None:
    for words in (("forward", model, "--tokens", "1"), ("replay", made / "components")):
        done = svf(*words, "--backend", "reference", "--max-memory", "100M")
        assert done.code == 7
        assert "--max-memory allows 0.10 GB" in done.error


def test_more_than_the_machine_has() -> None:
    with pytest.raises(ResourceError) as error:
        hold_memory(1 << 60, None, "try something else")
    one_line(error.value, "the machine has", "try something else")


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
def test_an_allocation_beyond_the_limit_is_exit_code_7(framework: str) -> None:
    """However each framework says that it got no memory."""
    ones = {
        "numpy": "import numpy; numpy.ones(1 << 30)",
        "torch": "import torch; torch.ones(1 << 30)",
        "jax": "import jax.numpy as n; n.ones(1 << 30).block_until_ready()",
    }
    code = (
        "import cli, sys\nfrom stages.run.budget import hold_memory\n"
        "@cli.app.command()\ndef grow() -> None:\n"
        f"    hold_memory(0, 1 << 30, '')\n    {ones[framework]}\n"
        "cli.app(['grow'])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert "out of memory" in done.stderr
