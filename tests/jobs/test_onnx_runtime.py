"""`svf capture --engine onnxruntime`: what ONNX Runtime computes from a file of torch.onnx is judged for what it is."""

from __future__ import annotations

import ast
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from forward_models import dumped, write_model
from helpers import svf
from onnx import numpy_helper
from onnx_files import SMALL, export, kept

from stages.judge.audit import audit
from stages.spec.forward import forward_pipeline
from svf_onnx import capture
from svf_onnx.graph import Graph

pytestmark = pytest.mark.slow

TOKENS = "3,1,4,1,5,9,2"
PLAIN = {"inv_freq", "rope_angle", "q_post_rope", "k_post_rope", "attn_scores", "attn_softmax", "qkv_matmul"}


def captured(model: Path, file: Path, out: Path, *options: str) -> Path:
    words = ("--engine", "onnxruntime", "--model", model, "--tokens", TOKENS, "--out", out)
    done = svf("capture", file, *words, *options)
    assert done.code == 0, done.err
    return out


@pytest.mark.parametrize(
    "options", [(), ("--deep",), ("--deep", "--compile"), ("--compile", "--generate", "3")], ids=str
)
def test_a_right_run_is_sound(options: tuple[str, ...], tmp_path: Path) -> None:
    out = captured(*kept(tmp_path / "m"), tmp_path / "dump", *options)
    found = audit(out)
    assert found["outcome"] == "sound", found["verdict"]
    stages = {row["stage"] for row in found["rows"]}
    assert stages == {*forward_pipeline(SMALL.config())} - ({"inv_freq"} if "--deep" in options else PLAIN)
    said = json.loads((out / "manifest.json").read_text())
    assert said["facts"]["optimisation"] == ("all" if "--compile" in options else "none")
    assert len(said["tokens"]) == 7 + 3 * ("--generate" in options)


def edited(file: Path, name: str) -> None:
    """Make one element of the first tensor that has this name, or ends with it, another."""
    model = onnx.load(file)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name.endswith(name))
    array = numpy_helper.to_array(tensor).copy()
    array.flat[3] += 0.25
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, file)


@pytest.mark.parametrize("deep", [(), ("--deep",)], ids=["modules", "deep"])
@pytest.mark.parametrize(
    ("name", "stage"),
    [("layers.1.post_attention_layernorm.weight", "ffn_norm"), ("layers.0.self_attn.k_proj.bias", "qkv_bias")],
)
def test_a_wrong_weight_is_found(name: str, stage: str, deep: tuple[str, ...], tmp_path: Path) -> None:
    model, file = kept(tmp_path / "m")
    edited(file, name)
    found = audit(captured(model, file, tmp_path / "dump", *deep))
    wrong = [(row["layer"], row["stage"]) for row in found["rows"] if row["verdict"] == "bug"]
    assert (found["outcome"], wrong) == ("faulty", [(int(name.split(".")[1]), stage)])


def test_names_of_a_torchscript_export_are_modules(tmp_path: Path) -> None:
    """Which has no metadata; a node's name is the path of its module."""
    model = onnx.load(kept(tmp_path / "m")[1])
    path = forward_pipeline(SMALL.config())
    by_scope = Graph(model.graph).values(path, deep=True)
    for node in model.graph.node:
        entry = next(entry for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes")
        scopes = ast.literal_eval(entry.value)[:-1]
        parts = [scope.removeprefix(f"{outer}.") for outer, scope in itertools.pairwise(scopes)]
        node.name = "/".join(["", *parts, node.op_type])
        node.metadata_props.remove(entry)
    assert Graph(model.graph).values(path, deep=True) == by_scope


def test_what_it_is_given() -> None:
    def given(name: str, shape: list[object], kind: str = "tensor(int64)") -> np.ndarray:
        return capture._argument(SimpleNamespace(name=name, shape=shape, type=kind)).given([5, 6])

    assert given("input_ids", ["b", "n"], "tensor(int32)").tolist() == [[5, 6]]
    assert given("attention_mask", ["b", "n"]).tolist() == [[1, 1]]
    assert given("position_ids", ["b", "n"]).tolist() == [[0, 1]]
    past = given("past_key_values.0.key", ["b", 2, "past", 8], "tensor(float)")
    assert (past.shape, past.dtype) == ((1, 2, 0, 8), np.float32)
    with pytest.raises(capture.InputError, match=r"an input use_cache_branch of tensor\(bool\)"):
        given("use_cache_branch", [1], "tensor(bool)")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model, file = kept(tmp_path / "m")
    (tmp_path / "cut.onnx").write_bytes(file.read_bytes()[:5000])
    (tmp_path / "empty.onnx").write_bytes(b"")
    deeper = write_model(tmp_path / "deeper", replace(SMALL, layers=3), "float32")
    wider = write_model(tmp_path / "wider", replace(SMALL, hidden=32), "float32")
    engine = ("--engine", "onnxruntime", "--tokens", TOKENS)
    for words, code, said in (
        ((file, *engine, "--model", deeper), 3, "has 2 layers, and the model 3"),
        ((file, *engine, "--model", wider), 3, "is [1, 7, 16], expected [7, 32] (tokens hidden)"),
        ((file, *engine, "--model", model, "--kv-cache", "dynamic"), 2, "leave --attention, --kv-cache, --device"),
        ((file, *engine), 4, "config.json"),
        ((tmp_path / "cut.onnx", *engine, "--model", model), 3, "is no ONNX file"),
        ((tmp_path / "empty.onnx", *engine, "--model", model), 3, "no module of this model"),
        ((tmp_path / "none.onnx", *engine, "--model", model), 4, "is not there"),
        ((file, "--tokens", TOKENS), 2, "try --engine onnxruntime"),
        ((model, *engine), 2, "runs ONNX files"),
        ((model, "--tokens", TOKENS, "--model", model), 2, "says what an ONNX file was made of"),
    ):
        done = svf("capture", *words, "--out", tmp_path / "dump")
        assert (done.code, said in done.err) == (code, True), f"{words}: {done.err}"


def test_without_the_wheel_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.commands.backends import attribute
    from stages.errors import NotFoundError

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "svf_onnx.capture")
    with pytest.raises(NotFoundError, match="onnxruntime is not installed, and this needs it: pip install onnxruntime"):
        attribute("svf_onnx.capture:run")


@pytest.mark.thorough
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_torch_exports_now_is_sound(attention: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", SMALL, "float32")
    file = export(model, tmp_path / "m.onnx", attention)
    arrays = dumped(captured(model, file, tmp_path / "dump", "--deep"))
    assert {name.rpartition(".")[2] for name in arrays} == {*forward_pipeline(SMALL.config())} - {"inv_freq"}
    assert audit(tmp_path / "dump")["outcome"] == "sound"
