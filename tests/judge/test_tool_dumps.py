"""Dumps of other tools, read as they are: known by what they hold, sound where right, and the planted fault named."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tool_dumps
import torch
from forward_models import MODELS, tokens_of, write_model
from helpers import svf
from tool_dumps import WRITERS

from stages.files.tool_dumps import TOKENS as TOKENS_KEY
from stages.files.tool_dumps import read_lying, tables
from stages.files.torch_child import locate
from stages.spec.forward import ANY_MODEL

pytestmark = pytest.mark.slow

TOKENS = ",".join(map(str, tokens_of(9)))
# Stages that a tool records of two layers, of Qwen3 and of Qwen2.
STAGES = {
    "transformers": (33, 29),
    "sglang_hooks": (28, 24),
    "sglang_dumper": (32, 28),
    "msprobe": (35, 31),
    "msprobe_fused": (28, 24),
    "nx_safetensors": (21, 17),
    "nx_npy": (21, 17),
    "npy": (26, 22),
    "tensorrt_llm": (26, 22),
    "tensorrt_edge": (26, 26),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random checkpoints of two layers by name and dtype."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("qwen3", "qwen2"):
        for dtype in ("float32", "bfloat16"):
            write_model(folder / f"{name}-{dtype}", MODELS[name], dtype)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen3", "qwen2"])
@pytest.mark.parametrize("tool", WRITERS)
def test_a_right_dump_is_sound(tool: str, name: str, dtype: str, models: Path, tmp_path: Path) -> None:
    model = models / f"{name}-{dtype}"
    WRITERS[tool](model, tokens_of(9), tmp_path / "dump")
    done = svf("audit", tmp_path / "dump", "--model", model, "--tokens", TOKENS, "--json")
    assert (done.code, done.json["outcome"]) == (0, "sound"), done.err or done.json["sentence"]
    coverage = done.json["coverage"]
    assert (coverage["judged"], coverage["unjudged"]) == (STAGES[tool][name == "qwen2"], 0)
    assert done.json["facts"]["dtype"] == dtype


@pytest.mark.parametrize("tool", WRITERS)
def test_a_planted_fault_is_named(tool: str, models: Path, tmp_path: Path) -> None:
    model = models / "qwen3-float32"
    WRITERS[tool](model, tokens_of(9), tmp_path / "dump", tool_dumps.swapped)
    done = svf("audit", tmp_path / "dump", "--model", model, "--tokens", TOKENS, "--json")
    found = done.json["culprit"]
    assert (done.code, found["verdict"], found["layer"], found["stage"]) == (1, "bug", 1, "ffn_gate")
    assert "mlp.up_proj.weight in the place of mlp.gate_proj.weight" in found["hint"]


@pytest.mark.parametrize("tool", WRITERS)
def test_what_is_imported_is_judged_alike(tool: str, models: Path, tmp_path: Path) -> None:
    model, dump = models / "qwen3-bfloat16", tmp_path / "dump"
    WRITERS[tool](model, tokens_of(9), dump)
    told = ("--model", model, "--tokens", TOKENS)
    verdicts = [{row["key"]: row["verdict"] for row in svf("audit", dump, *told, "--json").json["rows"]}]
    assert svf("import", dump, tmp_path / "ours", *told).code == 0
    assert svf("import", dump, tmp_path / "plain").code == 0
    for again in (("audit", tmp_path / "ours"), ("audit", tmp_path / "plain", *told)):
        done = svf(*again, "--json")
        assert done.code == 0, done.err
        verdicts.append({row["key"]: row["verdict"] for row in done.json["rows"]})
    assert verdicts[0] == verdicts[1]
    last = "layers.1.post_ffn_residual"  # which layer is the last one only the model tells
    assert verdicts[2] in (verdicts[0], {key: verdict for key, verdict in verdicts[0].items() if key != last})


@pytest.mark.parametrize("tool", WRITERS)
def test_inspect_and_verify_know_it(tool: str, models: Path, tmp_path: Path) -> None:
    WRITERS[tool](models / "qwen3-float32", tokens_of(9), dump := tmp_path / "dump")
    found = svf("inspect", dump, "--json")
    assert (found.code, found.json["kind"]) == (0, "another tool's dump"), found.err
    assert found.json["count"] >= len(found.json["about"]["stages"]) > 20
    assert "svf audit " in found.json["notes"][-1]
    sound = svf("verify", dump, "--json")
    assert (sound.code, sound.json["outcome"]) == (0, "sound"), sound.err
    for file in (file for file in sorted(dump.rglob("*")) if file.suffix in (".npy", ".pt", ".safetensors")):
        file.write_bytes(file.read_bytes()[:70])
        break
    assert svf("verify", dump, "--json").code == 3


def test_a_debugger_that_kept_only_text_says_how_to_keep_tensors(models: Path, tmp_path: Path) -> None:
    tool_dumps.transformers_debugger(models / "qwen3-float32", tokens_of(9), tmp_path / "dump", use_repr=True)
    done = svf("audit", tmp_path / "dump", "--model", models / "qwen3-float32", "--tokens", TOKENS)
    assert done.code == 3
    assert "use_repr=False" in done.error


def test_other_tokens_than_were_run_are_refused(models: Path, tmp_path: Path) -> None:
    tool_dumps.transformers_debugger(models / "qwen3-float32", tokens_of(9), tmp_path / "dump")
    done = svf("audit", tmp_path / "dump", "--model", models / "qwen3-float32", "--tokens", "1,2,3,4,5,6,7,8,9")
    assert done.code == 3
    assert "ran 9 tokens" in done.error
    assert "--tokens" in done.error


def test_passes_and_ranks_of_sglang_are_told_apart(models: Path, tmp_path: Path) -> None:
    model, dump = models / "qwen3-float32", tmp_path / "dump"
    tool_dumps.sglang_hooks(model, tokens_of(9), dump)
    (inside,) = dump.iterdir()
    shutil.copy(inside / "Pass00001.pt", inside / "Pass00002.pt")
    told = ("--model", model, "--tokens", TOKENS)
    done = svf("audit", dump, *told)
    assert (done.code, "name one" in done.error) == (3, True)
    assert svf("audit", inside / "Pass00002.pt", *told).code == 0
    tool_dumps.sglang_dumper(model, tokens_of(9), tmp_path / "ranks")
    tool_dumps.sglang_dumper(model, tokens_of(9), tmp_path / "ranks", rank=1)
    done = svf("audit", tmp_path / "ranks", *told)
    assert (done.code, "2 processes" in done.error) == (3, True)


class Runs:
    """A pickle that would run a command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/svf-was-run",)


def test_a_hostile_pickle_is_not_run(models: Path, tmp_path: Path) -> None:
    model, dump, ran = models / "qwen3-float32", tmp_path / "dump", Path("/tmp/svf-was-run")
    ran.unlink(missing_ok=True)
    tool_dumps.sglang_dumper(model, tokens_of(9), dump)
    told = ("--model", model, "--tokens", TOKENS)
    victim = next(dump.glob("step=0*layer_id=1.pt"))
    right = victim.read_bytes()
    torch.save({"value": torch.load(victim)["value"], "meta": Runs()}, victim)
    assert svf("audit", dump, *told).code == 0  # what it would run is passed over, and the tensor is there
    wide = torch.zeros(1).expand(1 << 40)
    for damage in (right[:-100], b"\x80\x04garbage", b"", _saved({"value": wide})):
        victim.write_bytes(damage)
        done = svf("audit", dump, *told)
        assert done.code == 3, done.out + done.err
        assert victim.name[:60] in done.error
    assert not ran.exists()


def _saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def test_views_are_read_as_they_lie(tmp_path: Path) -> None:
    whole = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    views = {"turned": whole.permute(2, 0, 1), "part": whole[1:, ::2], "one": whole[2, 3, 4], "none": whole[:0]}
    torch.save({"a": [views["turned"], (views["part"],)], "b": views}, tmp_path / "x.pt")
    torch.save(whole.bfloat16(), tmp_path / "y.pt")
    first, second = locate([tmp_path / "x.pt", tmp_path / "y.pt"])
    expected = {"a.0": views["turned"], "a.1.0": views["part"], **{f"b.{name}": view for name, view in views.items()}}
    assert {name: read_lying(tmp_path / "x.pt", lying).tolist() for name, lying in first.items()} == {
        name: view.tolist() for name, view in expected.items()
    }
    assert read_lying(tmp_path / "y.pt", second[""]).tolist() == whole.tolist()


def test_every_table_is_whole() -> None:
    """Each row is a stage that some model has, or the tokens, and every part of what is joined has a row."""
    for table in tables():
        parts: dict[str, set[int]] = {}
        for target in (target for row in table.rows for target in row.targets):
            name = target.key.rpartition(".")[2]
            assert target.key == TOKENS_KEY or name in {*ANY_MODEL, *ANY_MODEL.aliases} or "{" in name, target
            parts.setdefault(f"{target.key} of {target.part[1]}", set()).add(target.part[0])
        assert all(found == set(range(int(key.rpartition(" ")[2]))) for key, found in parts.items()), table.title


def test_a_file_that_is_no_stage_is_refused_where_names_are_the_documented_ones(models: Path, tmp_path: Path) -> None:
    model, dump = models / "qwen3-float32", tmp_path / "dump"
    WRITERS["npy"](model, tokens_of(9), dump)
    told = ("--model", model, "--tokens", TOKENS)
    shutil.copy(dump / "embedding.npy", dump / "layers.0.attn_bias.npy")
    done = svf("audit", dump, *told)
    assert (done.code, "layers.0.attn_bias" in done.error) == (3, True)
    (dump / "layers.0.attn_bias.npy").unlink()
    np.save(dump / "lm_head.npy", np.array([{}], object), allow_pickle=True)
    done = svf("audit", dump, *told)
    assert (done.code, "unpickled" in done.error) == (3, True)
    np.save(dump / "lm_head.npy", np.zeros((9, 300), np.int64))
    done = svf("audit", dump, *told)
    assert (done.code, "int64" in done.error) == (3, True)


def test_what_writes_two_names_for_one_stage_is_refused(models: Path, tmp_path: Path) -> None:
    model, dump = models / "qwen3-float32", tmp_path / "dump"
    WRITERS["tensorrt_llm"](model, tokens_of(9), dump)
    shutil.copy(dump / "transformer.layers.1.mlp.ffn_up.npy", dump / "transformer.layers.1.ffn_up.npy")
    done = svf("audit", dump, "--model", model, "--tokens", TOKENS)
    assert (done.code, "both layers.1.ffn_up" in done.error) == (3, True)


def test_the_names_of_an_onnx_graph_are_those_of_torch(models: Path, tmp_path: Path) -> None:
    (table,) = (table for table in tables() if "Edge" in table.title)
    plain = {row.name.format(n=1, profile="") for row in table.rows if "Plugin" not in row.name}
    biases = {name for name in plain if "proj/Add_" in name}
    assert plain - biases <= tool_dumps.onnx_names(models / "qwen3-float32", tokens_of(9), tmp_path / "q3.onnx")
    assert plain <= tool_dumps.onnx_names(models / "qwen2-float32", tokens_of(9), tmp_path / "q2.onnx")
