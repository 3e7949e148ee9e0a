"""Dumps: committed by their manifest, written last; what was changed or not written to its end is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import EMBED, GATE, HEAD, K_PROJ, one_line, svf, tensors_of, with_json, with_tensors
from replays import factors, make_offsets, task_of

from stages.errors import InputError, NotFoundError, OutputError, SvfError, UsageError
from stages.files import dump as module
from stages.files.bundle import tensor_stage_key
from stages.files.dump import MANIFEST_FILE, Dump, ReplayDump
from stages.files.folders import RUN_FILE
from stages.files.tensorfile import sha256
from stages.run.replay import Replayer
from stages.spec.backend import Backend
from stages.spec.dtypes import dtype_name
from stages.spec.replay import REPLAY
from stages.spec.values import ReplayTask


def task(name: str = GATE, rows: int = 40, cols: int = 24, *, transpose: bool = False) -> ReplayTask:
    u, s, v = factors(rows, cols, 0)
    made = task_of(u, s, v, make_offsets("small", s.size, 0), "torch_v", transpose)
    return replace(made, source_name=name)


def write(folder: Path, backend: Backend, tasks: list[ReplayTask], mode: str = "full", chunk_rows: int = 1000) -> Path:
    with ReplayDump(folder, tasks, mode) as dump:
        for one in tasks:
            for chunk in Replayer(backend).run(one, chunk_rows):
                dump.add(one, chunk)
        dump.commit({"kind": "replay", "selected": []})
    return folder


@pytest.fixture
def folder(tmp_path: Path, torch_backend: Backend) -> Path:
    """A full dump of three tensors."""
    return write(tmp_path / "dump", torch_backend, [task(EMBED), task(GATE), task(HEAD)])


def test_one_file_per_layer_one_for_the_model_and_the_manifest(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["layer-2.safetensors", MANIFEST_FILE, "model.safetensors"]
    assert len(tensors_of(folder / "layer-2.safetensors")) == 10
    assert set(tensors_of(folder / "model.safetensors")) == {
        tensor_stage_key(name, stage) for name in (EMBED, HEAD) for stage in REPLAY
    }


def test_the_manifest_says_of_every_tensor_what_the_file_holds(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    assert manifest["schema"] == "svf.dump/1"
    assert manifest["kind"] == "replay"
    assert len(manifest["tensors"]) == 30
    for key, entry in manifest["tensors"].items():
        array = tensors_of(folder / entry["file"])[key]
        assert entry == {
            "file": entry["file"],
            "dtype": dtype_name(array.dtype),
            "shape": list(array.shape),
            "sha256": sha256(array),
        }


@pytest.mark.parametrize("transpose", [False, True])
def test_bytes_and_hashes_do_not_depend_on_chunks(tmp_path: Path, torch_backend: Backend, transpose: bool) -> None:
    tasks = [task(transpose=transpose)]
    one = write(tmp_path / "whole", torch_backend, tasks)
    other = write(tmp_path / "chunks", torch_backend, tasks, chunk_rows=16)
    for file in (MANIFEST_FILE, "layer-2.safetensors"):
        assert (one / file).read_bytes() == (other / file).read_bytes()


def test_a_hash_dump_has_the_same_hashes_and_no_tensors(tmp_path: Path, torch_backend: Backend) -> None:
    full, hashed = (write(tmp_path / mode, torch_backend, [task()], mode, 16) for mode in ("full", "hash"))
    assert [p.name for p in hashed.iterdir()] == [MANIFEST_FILE]
    one, other = (Dump(folder).tensors for folder in (full, hashed))
    assert {k: e["sha256"] for k, e in one.items()} == {k: e["sha256"] for k, e in other.items()}
    assert {e["file"] for e in other.values()} == {None}


def test_a_transposed_tensor_in_chunks_has_no_hash_by_parts(tmp_path: Path, torch_backend: Backend) -> None:
    with pytest.raises(UsageError) as error:
        write(tmp_path / "x", torch_backend, [task(transpose=True)], "hash", 16)
    one_line(error.value, "--dump full")


def test_the_manifest_is_written_last(tmp_path: Path, torch_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    present: list[str] = []
    real = module.write_json

    def spy(path: Path, value: Any) -> None:
        present.extend(p.name for p in path.parent.iterdir())
        real(path, value)

    monkeypatch.setattr(module, "write_json", spy)
    write(tmp_path / "dump", torch_backend, [task(EMBED), task(GATE)])
    assert sorted(present) == [RUN_FILE, "layer-2.safetensors", "model.safetensors"]


def test_an_interrupted_dump_leaves_no_file_and_is_refused(tmp_path: Path, torch_backend: Backend) -> None:
    one = task()
    chunk = next(iter(Replayer(torch_backend).run(one, 16)))

    def interrupted() -> None:
        with ReplayDump(tmp_path / "dump", [one]) as dump:
            dump.add(one, chunk)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.glob("dump/*"))
    with pytest.raises((InputError, NotFoundError)):
        Dump(tmp_path / "dump")


def test_an_incomplete_dump_is_not_committed(tmp_path: Path, torch_backend: Backend) -> None:
    one = task()
    with ReplayDump(tmp_path / "dump", [one]) as dump:
        dump.add(one, next(iter(Replayer(torch_backend).run(one, 16))))
        with pytest.raises(RuntimeError, match="not written in full"):
            dump.commit({})
    assert not list(tmp_path.glob("dump/*"))


def test_a_folder_with_content_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "dump").mkdir()
    (tmp_path / "dump" / "mine").write_text("kept")
    with pytest.raises(OutputError):
        ReplayDump(tmp_path / "dump", [task()])
    with pytest.raises(UsageError):
        ReplayDump(tmp_path / "new", [task()], "all")


KEY = tensor_stage_key(GATE, "u_scaled")


def manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda folder: with_json(folder / MANIFEST_FILE, change)


def layer(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], object]:
    return lambda folder: with_tensors(folder / "layer-2.safetensors", change)


TAMPERED: dict[str, tuple[Callable[[Path], object], type[SvfError], str]] = {
    "no manifest": (lambda f: (f / MANIFEST_FILE).unlink(), InputError, "not written to its end"),
    "half a manifest": (lambda f: (f / MANIFEST_FILE).write_text("{"), InputError, "JSON"),
    "another schema": (manifest(lambda m: m.update(schema="svf.dump/9")), InputError, "svf.dump/9"),
    "no tensors": (manifest(lambda m: m.pop("tensors")), InputError, "'tensors'"),
    "tensors that are a list": (manifest(lambda m: m.update(tensors=[])), InputError, "'tensors'"),
    "an entry that is a number": (manifest(lambda m: m["tensors"].update({KEY: 1})), InputError, KEY),
    "a file outside": (manifest(lambda m: m["tensors"][KEY].update(file="../x.safetensors")), InputError, KEY),
    "an absolute file": (manifest(lambda m: m["tensors"][KEY].update(file="/etc/passwd")), InputError, KEY),
    "a file that is a number": (manifest(lambda m: m["tensors"][KEY].update(file=7)), InputError, KEY),
    "another shape": (manifest(lambda m: m["tensors"][KEY].update(shape=[24, 40])), InputError, KEY),
    "another dtype": (manifest(lambda m: m["tensors"][KEY].update(dtype="bfloat16")), InputError, KEY),
    "a tensor removed": (layer(lambda t: t.pop(KEY)), InputError, KEY),
    "a tensor turned": (layer(lambda t: t.update({KEY: t[KEY].T})), InputError, KEY),
    "a tensor of another dtype": (layer(lambda t: t.update({KEY: t[KEY].astype(np.float64)})), InputError, KEY),
    "a file removed": (lambda f: (f / "layer-2.safetensors").unlink(), InputError, "layer-2.safetensors"),
    "a file truncated": (
        lambda f: (f / "layer-2.safetensors").write_bytes((f / "layer-2.safetensors").read_bytes()[:-1]),
        InputError,
        "truncated",
    ),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_a_dump_that_was_changed_is_refused(folder: Path, kind: str) -> None:
    change, expected, word = TAMPERED[kind]
    change(folder)
    with pytest.raises(expected) as error:
        Dump(folder)
    one_line(error.value, word)


def test_the_changed_ones_start_from_a_good_one(folder: Path) -> None:
    assert len(Dump(folder).tensors) == 30


def test_a_dump_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        Dump(tmp_path / "none")


def test_a_replays_manifest_says_what_was_computed_and_on_what(made: Path, tmp_path: Path) -> None:
    done = svf("replay", made / "components", "--backend", "torch", "--select", "k_proj", "--out", tmp_path / "d")
    assert done.code == 0, done.err
    manifest = json.loads((tmp_path / "d" / MANIFEST_FILE).read_text())
    assert manifest["backend"] == "torch"
    assert {"torch", "device", "threads"} <= manifest["facts"].keys()
    assert manifest["precision"] == "native"
    assert Path(manifest["components"]) == (made / "components").resolve()
    (selected,) = manifest["selected"]
    assert selected["source_name"] == K_PROJ
    assert (selected["shape"], selected["layout"], selected["transpose"]) == ([64, 64], "torch_v", False)
    assert selected["sha256"].keys() >= {"s", "v"}
