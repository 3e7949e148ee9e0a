"""The backends' own functions explain the last bits: of each, in each dtype, and never those of anything wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forward_models import MODELS, change_dump, dumped, trace, write_model
from helpers import svf

from stages.files.tensorfile import write_tensors
from stages.judge import natives
from stages.judge.audit import audit
from stages.spec.backend import Backend
from stages.spec.forward import DECLARED

TOKENS = "3,141,59,26,53,58,97,93"
BOTH = ["torch", "jax"]


@pytest.fixture(scope="module", params=[(name, dtype) for name in BOTH for dtype in ("float32", "bfloat16")])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in `model` and its dump in `dump`."""
    name, dtype = request.param
    folder = tmp_path_factory.mktemp(f"{name}-{dtype}")
    backend: Backend = request.getfixturevalue(f"{name}_backend")
    trace(write_model(folder / "model", MODELS["qwen3"], dtype), backend, out=folder / "dump", tokens=TOKENS)
    return folder


def test_every_bit_of_our_own_backends_is_explained(recorded: Path) -> None:
    document = audit(recorded / "dump", natives=True)
    assert document["outcome"] == "sound"
    found = document["explained"]
    assert found["bits"] == found["elements"] > 10_000
    assert {row["verdict"] for row in document["rows"]} == {"exact"}
    assert "all to the last bit by" in document["verdict"]


def test_so_is_another_programs_file_with_its_model_and_tokens(recorded: Path) -> None:
    """The same tensors without a manifest: neither the model nor the backend is told."""
    file = recorded / "foreign.safetensors"
    write_tensors(file, dumped(recorded / "dump"))
    given: dict[str, Any] = {"model": str(recorded / "model"), "tokens": TOKENS}
    document = audit(file, natives=True, **given)
    assert document["explained"]["bits"] == document["explained"]["elements"]


def test_what_is_wrong_stays_wrong(recorded: Path, tmp_path: Path) -> None:
    dump = Path(shutil.copytree(recorded / "dump", tmp_path / "dump"))
    key = "layers.1.ffn_gate"
    change_dump(dump, lambda tensors: tensors.update({key: (tensors[key] * 1.25).astype(tensors[key].dtype)}))
    document = audit(dump, natives=True)
    assert (document["outcome"], document["culprit"]["stage"], document["culprit"]["layer"]) == (
        "faulty",
        "ffn_gate",
        1,
    )


def test_a_replay_of_ours_is_explained(tmp_path: Path) -> None:
    for backend in BOTH:
        assert svf("replay", "--backend", backend, "--out", tmp_path / backend).code == 0
        document = svf("audit", tmp_path / backend, "--natives", "--json").json
        assert document["explained"]["bits"] == document["explained"]["elements"] > 1_000


def test_a_backend_that_cannot_be_asked_is_told_and_changes_nothing(
    recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, _child: Any) -> Any:
        raise natives.SvfError(f"{name} is not installed")

    plain = audit(recorded / "dump")
    monkeypatch.setattr(natives, "document_of", refuse)
    document = audit(recorded / "dump", natives=True)
    asked = [row for row in document["rows"] if row["verdict"] == "rounding"]
    assert all("torch could not be asked: torch is not installed" in row["note"] for row in asked)
    assert [row["verdict"] for row in document["rows"]] == [row["verdict"] for row in plain["rows"]]


def test_elements_alike_are_counted_as_far_as_they_are_judged() -> None:
    stage = DECLARED["ffn_gate"]
    x = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    assert natives._alike(stage, x, np.where(x == 3, 0, x).astype(np.float32)) == 3
    assert natives._alike(stage, x, x.astype(np.float64)) is None
