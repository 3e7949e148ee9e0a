"""A forked child is what a process of its own would have been: the other tests stand on it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from forward_models import forward_command

from stages.run.children import run_child

pytestmark = pytest.mark.slow

REAL = sys.executable


@pytest.mark.cover(1)
@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.parametrize("there", [True, False])
def test_it_answers_as_a_process_of_its_own(
    model: Path, monkeypatch: pytest.MonkeyPatch, backend: str, there: bool
) -> None:
    request = forward_command(model if there else Path("/nowhere"), backend=backend, layers="0", stages="ffn_gate")
    assert sys.executable != REAL
    forked = run_child(request)
    assert (forked.returncode == 0) is there
    monkeypatch.setattr(sys, "executable", REAL)
    assert forked == run_child(request)


@pytest.mark.processes
def test_a_test_may_ask_for_real_ones() -> None:
    assert sys.executable == REAL
