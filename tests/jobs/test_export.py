"""`svf export` and `svf import`: APRT and safetensors, there and back byte for byte, and what is lost is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forward_models import MODELS, dumped, trace, write_model
from helpers import svf, tensors_of, tree, with_tensors

from stages.files import aprt
from stages.files.aprt import write_aprt
from stages.files.dump import MANIFEST_FILE
from stages.files.tensorfile import write_tensors
from stages.jobs.export import FLAT_FILE
from stages.spec.backend import Backend

TOKENS = "3,141,59,26,53"  # what `trace` runs on


@pytest.fixture(scope="session", params=["float32", "bfloat16", "float16"])
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, torch_backend: Backend) -> Path:
    """A folder with a `model` of two layers and the `dump` of its forward."""
    folder = tmp_path_factory.mktemp("export")
    write_model(folder / "model", MODELS["qwen2"], request.param)
    trace(folder / "model", torch_backend, out=folder / "dump")
    return folder


def run(*arguments: object) -> Any:
    done = svf(*arguments, "--json")
    assert done.code == 0, done.err
    return done.json


def values(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def test_a_dump_comes_back_byte_for_byte_when_model_and_tokens_are_told(traced: Path, tmp_path: Path) -> None:
    exported = run("export", traced / "dump", tmp_path / "aprt")
    imported = run("import", tmp_path / "aprt", tmp_path / "back", "--model", traced / "model", "--tokens", TOKENS)
    before, after = dumped(traced / "dump"), dumped(tmp_path / "back")
    assert before.keys() == after.keys()
    assert exported["cut"] == ["lm_head"]
    assert imported["flat"] == []
    before["lm_head"] = before["lm_head"][-1:]
    for key, array in before.items():
        assert (after[key].dtype, after[key].shape) == (array.dtype, array.shape), key
        assert values(after[key]) == values(array), key
    assert svf("audit", tmp_path / "back").code == 0
    # The logits, of which one side has the last token's alone, are compared in that row.
    rows = svf("diff", traced / "dump", tmp_path / "back", "--json").json["rows"]
    assert [row["stage"] for row in rows if row["verdict"] != "exact" and row["verdict"] != "rounding"] == []
    assert all(row["byte_match"] for row in rows if row["stage"] != "lm_head")


@pytest.mark.parametrize("told", [True, False], ids=["told", "flat"])
def test_a_tree_comes_back_byte_for_byte(told: bool, traced: Path, tmp_path: Path) -> None:
    run("export", traced / "dump", tmp_path / "aprt")
    more = ["--model", traced / "model", "--tokens", TOKENS] if told else []
    run("import", tmp_path / "aprt", tmp_path / "st", *more)
    run("export", tmp_path / "st", tmp_path / "again")
    assert tree(tmp_path / "again") == tree(tmp_path / "aprt")


def test_one_bit_is_seen_in_a_round_trip(traced: Path, tmp_path: Path) -> None:
    run("export", traced / "dump", tmp_path / "aprt")
    run("import", tmp_path / "aprt", tmp_path / "st")

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["final_norm"].view(np.uint32)[3] ^= 1

    with_tensors(tmp_path / "st" / FLAT_FILE, change)
    run("export", tmp_path / "st", tmp_path / "again")
    before, after = tree(tmp_path / "aprt"), tree(tmp_path / "again")
    assert [name for name in before if before[name] != after[name]] == ["final_norm.bin"]


def test_what_is_not_kept_is_told(traced: Path, tmp_path: Path) -> None:
    document = run("export", traced / "dump", tmp_path / "aprt")
    narrow = {key: array.dtype.name for key, array in dumped(traced / "dump").items() if array.dtype.itemsize == 2}
    assert set(document["widened"]) == set(narrow)
    told = " ".join(document["not_kept"])
    assert "shapes and dtypes" in told
    assert "manifest" in told
    assert "lm_head of all tokens but the last" in told
    assert [name for name in ("bfloat16", "float16") if f"tensors are {name}:" in told] == sorted(set(narrow.values()))
    done = svf("export", traced / "dump", tmp_path / "more")
    assert done.out.count("APRT does not keep") == len(document["not_kept"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_forward_writes_the_tree_that_export_writes(traced: Path, tmp_path: Path, dtype: str) -> None:
    common = ("forward", traced / "model", "--tokens", TOKENS, "--backend", "torch", "--dtype", dtype)
    run(*common, "--no-production", "--format", "aprt", "--out", tmp_path / "direct")
    run(*common, "--no-production", "--out", tmp_path / "dump")
    run("export", tmp_path / "dump", tmp_path / "tree")
    assert tree(tmp_path / "direct") == tree(tmp_path / "tree")


def test_nan_payloads_and_subnormals_survive(tmp_path: Path) -> None:
    bits = np.array([0x7FC00001, 0x7F800001, 0xFFC12345, 0x00000001, 0x80000000, 0x7F800000], np.uint32)
    write_aprt_tree(tmp_path / "aprt", bits.view(np.float32))
    run("import", tmp_path / "aprt", tmp_path / "st")
    assert tensors_of(tmp_path / "st" / FLAT_FILE)["final_norm"].view(np.uint32).tolist() == bits.tolist()
    run("export", tmp_path / "st", tmp_path / "again")
    assert tree(tmp_path / "again") == tree(tmp_path / "aprt")


def write_aprt_tree(folder: Path, array: np.ndarray) -> None:
    folder.mkdir()
    write_aprt(folder / "final_norm.bin", None, array)


def test_large_tensors_are_imported_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_aprt_tree(tmp_path / "aprt", np.arange(1000, dtype=np.float32))
    monkeypatch.setattr(aprt, "_BLOCK", 64)
    run("import", tmp_path / "aprt", tmp_path / "st")
    assert tensors_of(tmp_path / "st" / FLAT_FILE)["final_norm"].tolist() == list(range(1000))


def test_other_files_of_a_tree_are_named(tmp_path: Path) -> None:
    write_aprt_tree(tmp_path / "aprt", np.zeros(4, np.float32))
    (tmp_path / "aprt" / "notes.txt").write_text("x")
    assert run("import", tmp_path / "aprt", tmp_path / "st")["not_kept"] == ["notes.txt: is no stage file"]


def test_what_has_no_place_is_refused_and_leaves_nothing(made: Path, traced: Path, tmp_path: Path) -> None:
    run("export", traced / "dump", tmp_path / "aprt")
    write_tensors(tmp_path / "f64.safetensors", {"final_norm": np.zeros(2)})
    write_tensors(tmp_path / "name.safetensors", {"layers.0.../up": np.zeros(2, np.float32)})
    write_tensors(tmp_path / "case.safetensors", {"Final_Norm": np.zeros(2, np.float32)})
    out = tmp_path / "out"
    for code, word, arguments in [
        (3, "float64", ("export", tmp_path / "f64.safetensors", out)),
        (3, "no key of a forward", ("export", tmp_path / "name.safetensors", out)),
        (3, "Final_Norm", ("export", tmp_path / "case.safetensors", out)),
        (3, "APRT tree already", ("export", tmp_path / "aprt", out)),
        (3, "no key of a forward", ("export", made / "components", out)),
        (4, "does not exist", ("export", tmp_path / "none", out)),
        (6, "not empty", ("export", traced / "dump", tmp_path / "aprt")),
        (4, "is not a folder", ("import", tmp_path / "f64.safetensors", out)),
        (2, "go together", ("import", tmp_path / "aprt", out, "--model", traced / "model")),
        (
            3,
            "has 5 tokens",
            ("import", tmp_path / "aprt", out, "--model", traced / "model", "--tokens", "1"),
        ),
        (6, "not empty", ("import", tmp_path / "aprt", traced / "dump")),
    ]:
        done = svf(*arguments)
        assert (done.code, done.out) == (code, ""), (arguments, done.code, done.err)
        assert word in done.error
        assert not out.exists()
    assert (traced / "dump" / MANIFEST_FILE).is_file()
