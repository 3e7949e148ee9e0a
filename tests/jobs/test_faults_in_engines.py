"""`make engines` on one engine that is always there: right is sound, and each fault handed to it is found and named."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engines() -> Any:
    spec = importlib.util.spec_from_file_location("engines", ROOT / "benchmarks" / "engines.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules["engines"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_faults_handed_to_an_engine_are_found(engines: Any, tmp_path: Path) -> None:
    engine = next(engine for engine in engines.RUN if engine.name == "transformers, sdpa")
    (row,) = engines.rows([engine], "qwen2", "float32", tmp_path)
    assert (row.outcome, row.found, row.planted, row.missed) == ("sound", 10, 10, [])


def test_a_fault_that_is_not_found_is_told(engines: Any, tmp_path: Path) -> None:
    """The audit is handed the same wrong model as the engine."""
    engine = next(engine for engine in engines.RUN if engine.name == "transformers, sdpa")
    fault = engines.FAULTS[3]
    wrong = engines.handed(tmp_path / "wrong", "qwen2", "float32", fault)
    row = engines._row(engine, engines.Row(engine.name, "qwen2", "float32"), wrong, [(fault, wrong)])
    assert (row.found, row.planted, row.missed) == (0, 1, ["k and v swapped: sound at None"])
