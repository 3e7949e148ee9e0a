"""`svf capture --engine openvino`: what OpenVINO computes from a file of torch.onnx is judged for what it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import svf
from onnx_files import kept

from stages.judge.audit import audit

pytestmark = pytest.mark.slow

engine = pytest.importorskip("svf_onnx.openvino", reason="OpenVINO's wheel is not installed")

TOKENS = "3,1,4,1,5,9,2"


def captured(folder: Path, *options: str) -> Path:
    model, file = kept(folder / "m")
    words = ("--engine", "openvino", "--model", model, "--tokens", TOKENS, "--out", folder / "dump")
    done = svf("capture", file, *words, *options)
    assert done.code == 0, done.err
    return folder / "dump"


@pytest.mark.parametrize("options", [(), ("--deep",), ("--generate", "2")], ids=str)
def test_a_right_run_in_float32_is_sound(options: tuple[str, ...], tmp_path: Path) -> None:
    out = captured(tmp_path, "--dtype", "float32", *options)
    found = audit(out)
    assert found["outcome"] == "sound", found["verdict"]
    facts = json.loads((out / "manifest.json").read_text())["facts"]
    assert (facts["engine"], facts["precision hint"], facts["computed in"]) == ("openvino", "f32", "f32")


@pytest.mark.parametrize("options", [(), ("--deep",)], ids=str)
def test_a_hint_of_bfloat16_is_precision(options: tuple[str, ...], tmp_path: Path) -> None:
    """On a processor without units for it OpenVINO may take no notice of the hint; then the run is sound."""
    found = audit(captured(tmp_path, "--dtype", "bfloat16", *options))
    lost = {row["stage"]: row["recipe"] or row["hint"] for row in found["rows"] if row["verdict"] == "precision"}
    assert {row["verdict"] for row in found["rows"]} <= {"exact", "rounding", "precision"}, found["verdict"]
    assert all("bfloat16" in words for words in lost.values())
    assert ("lm_head" in lost) == (found["outcome"] == "faulty")


def test_what_numpy_has_no_type_for_is_read_by_its_bytes() -> None:
    import ml_dtypes
    import openvino

    rows = np.array([[1.5, -2.0, 3.25]], np.float32).astype(ml_dtypes.bfloat16)
    tensor = openvino.Tensor(rows.view(np.uint16), [1, 3], openvino.Type.bf16)
    assert engine._array(tensor).tolist() == rows.tolist()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, file = kept(tmp_path / "m")
    words = ("--engine", "openvino", "--tokens", TOKENS, "--model", model)
    for given, code, said in (
        ((file, *words, "--compile"), 2, "leave --attention, --kv-cache, --device and --compile out"),
        ((file, *words, "--dtype", "float16"), 2, "--dtype is its hint: float32 or bfloat16"),
        ((model, *words[:-2]), 2, "runs ONNX files"),
    ):
        done = svf("capture", *given, "--out", tmp_path / "dump")
        assert (done.code, said in done.err) == (code, True), done.err
