"""`svf inspect`: every kind is told apart and listed from its header; hostile files end in one line."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import GATE, Result, svf
from test_convert import Canary

from stages.files.aprt import write_aprt
from stages.files.kinds import Kind, kind_of_source
from stages.files.pickle_listing import list_pickle
from stages.files.tensorfile import write_tensors
from stages.jobs.inspect import offsets_summary, spectrum


@pytest.fixture(scope="module")
def dumps(made: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a replay dump, a forward dump and an APRT tree."""
    folder = tmp_path_factory.mktemp("dumps")
    assert svf("replay", made / "components", "--backend", "reference", "--out", folder / "replay").code == 0
    forward = ("forward", model, "--tokens", "1,2,3", "--backend", "reference", "--no-production")
    assert svf(*forward, "--out", folder / "forward").code == 0
    assert svf(*forward, "--format", "aprt", "--out", folder / "tree").code == 0
    return folder


def inspected(source: Path) -> dict[str, Any]:
    done = svf("inspect", source, "--json")
    assert (done.code, done.err) == (0, "")
    assert svf("inspect", source).code == 0
    return dict(done.json)


def test_a_bundle_shows_spectrum_offsets_and_manifest(made: Path) -> None:
    found = inspected(made / "components")
    assert found["kind"] == "component bundle"
    row = next(row for row in found["about"]["per_tensor"] if row["tensor"] == GATE)
    assert (row["spectrum"]["count"], row["layout"], row["offsets"]["count"]) == (64, "torch_v", 64)
    assert 0 < row["spectrum"]["min"] < row["spectrum"]["max"]
    assert found["about"]["manifest"]["schema"].startswith("trinity_sakana_selected")
    assert len(found["tensors"]) == found["count"] == 9 * 4 + 9 * 10 + 10


def test_a_checkpoint_shows_its_config_and_files(model: Path) -> None:
    found = inspected(model)
    config = found["about"]["config"]
    assert (found["kind"], config["family"], config["num_hidden_layers"]) == ("checkpoint", "qwen3", 4)
    assert found["about"]["files"] == sorted(p.name for p in model.glob("*.safetensors"))
    assert found["bytes"] < found["about"]["fingerprint"]["bytes"]


def test_a_model_that_is_not_computed_is_listed_with_the_reason(model: Path, tmp_path: Path) -> None:
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "gemma3"}))
    found = inspected(tmp_path)
    assert found["about"]["config"] is None
    assert "gemma3" in found["notes"][0]
    assert found["count"]


def test_dumps_and_trees_show_where_they_come_from(dumps: Path) -> None:
    replay, forward = inspected(dumps / "replay"), inspected(dumps / "forward")
    assert (replay["kind"], replay["about"]["kind"], replay["count"]) == ("dump", "replay", 90)
    assert (forward["about"]["tokens"], forward["about"]["backend"]) == (3, "reference")
    tree = inspected(dumps / "tree")
    assert tree["kind"] == "APRT tree"
    assert tree["about"]["layers"] == [0, 1, 2, 3]


def test_single_files(tmp_path: Path) -> None:
    write_aprt(tmp_path / "x.bin", 3, np.ones(5, np.float32))
    np.save(tmp_path / "x.npy", np.ones((2, 3)))
    (tmp_path / "x.json").write_text('{"schema": "svf.diff/1", "rows": [1, 2]}')
    write_tensors(tmp_path / "x.safetensors", {"w": np.ones((2, 2), np.float32)})
    assert inspected(tmp_path / "x.bin")["about"]["layer"] == 3
    assert inspected(tmp_path / "x.npy")["tensors"][0]["shape"] == [2, 3]
    assert inspected(tmp_path / "x.json")["about"] == {"schema": "svf.diff/1", "rows": "list of 2"}
    assert inspected(tmp_path / "x.safetensors")["bytes"] == 16


def test_a_name_with_control_characters_is_shown_escaped(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {"\x1b[31mred\n[bold]": np.ones(1, np.float32)})
    done = svf("inspect", tmp_path / "x.safetensors")
    assert "\\x1b[31mred\\n[bold]" in done.out
    assert "\x1b" not in done.out


@pytest.mark.parametrize(("values", "clusters"), [
    ([3, 2, 1], 0),
    ([3, 2, 2, 1], 1),
    ([3, 3, 2, 2, 2, 1], 2),
    ([1, 1, 1], 1),
    ([1, 0, 0], 1),
    ([1 + 2**-19, 1], 0),
    ([1 + 2**-21, 1], 1),
    ([5], 0),
])  # fmt: skip
def test_clusters_are_runs_of_values_too_close_to_tell_apart(values: list[float], clusters: int) -> None:
    found = spectrum(np.array(values, np.float64))
    assert (found["clusters"], found["max"], found["min"]) == (clusters, max(values), min(values))


def test_statistics_of_nothing_and_of_nan_are_unknown() -> None:
    for array in (np.empty(0, np.float32), np.array([np.nan], np.float32)):
        assert spectrum(array)["max"] is None
        assert offsets_summary(array)["rms"] is None
    assert offsets_summary(np.array([3, -4], np.float32)) == {"count": 2, "min": -4.0, "max": 3.0, "rms": 12.5**0.5}


# Pickles, listed and not run.


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_is_listed_without_running_it(tmp_path: Path, legacy: bool) -> None:
    canary = tmp_path / "ran"
    given = {
        "w": torch.ones(3, 4, dtype=torch.bfloat16),
        "p": torch.nn.Parameter(torch.ones(2)),
        "in": {"x": torch.ones(5, dtype=torch.uint16)},
        "c": Canary(canary),
        "s": torch.eye(3).to_sparse(),
    }
    torch.save(given, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    found = inspected(tmp_path / "x.pt")
    rows = {row["name"]: (row["dtype"], row["shape"], row["bytes"]) for row in found["tensors"]}
    assert rows["w"] == ("bfloat16", [3, 4], 24)
    assert rows["p"] == ("float32", [2], 8)
    assert rows["in.x"] == ("uint16", [5], 10)
    assert rows["s"][1] is None
    assert "posix.system" in found["about"]["unexpected"]
    assert "posix.system" in found["notes"][-1]
    assert not canary.exists()


def test_a_plain_state_dict_asks_for_nothing_unexpected(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "x.pt")
    listing = list_pickle(tmp_path / "x.pt")
    assert [row["name"] for row in listing.tensors] == ["weight", "bias"]
    assert listing.runs == []


def test_a_repeated_view_is_noted(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "x.pt")
    assert "claims 4000000000000 bytes, its storage holds 4" in inspected(tmp_path / "x.pt")["notes"][0]


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    value = {"a": Canary(tmp_path / "ran"), "b": {1, 2}, "f": 1.5, "y": b"a", "l": [1, (2, 3, 4, 5)], "n": None}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value, protocol=protocol))
    assert "posix.system" in list_pickle(tmp_path / "x.pkl").runs


# Hostile and damaged files.


def deflated(records: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return buffer.getvalue()


HOSTILE = {
    "empty.pt": b"",
    "text.pt": b"hello",
    "cut.pt": b"\x80\x02}q\x00X",
    "stack.pt": b"\x80\x02.",
    "memo.pt": b"\x80\x02h\x07.",
    "zip.pt": b"PK\x03\x04 and no zip",
    "nopkl.pt": deflated({"a/version": b"3"}),
    "bomb.pt": deflated({"a/data.pkl": b"\x80\x02" + b"N0" * 3_000_000}),
    "global.pt": b"\x80\x04](K\x01K\x02e\x8c\x01a\x93.",  # a global whose module is a list
    "big.npy": b"\x93NUMPY\x01\x00\x76\x00"
    + b"{'descr': '<f8', 'fortran_order': False, 'shape': (9223372036854775807,), }".ljust(117)
    + b"\n",
    "object.npy": b"\x93NUMPY\x01\x00\x76\x00"
    + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117)
    + b"\n",
    "short.npy": b"\x93NUMPY\x01",
    "x.json": b'{"a": 1, "a": 2}',
    "list.json": b"[1]",
    "deep.json": b"[" * 100_000,
    "x.safetensors": b"\xff" * 8 + b"{",
    "lfs.safetensors": b"version https://git-lfs.github.com/spec/v1\n",
    "aprt.bin": b"APRT\x00\x00\x00\x00\xff\xff\xff\xff",
    "what": b"\x00\x01\x02",
    "\x1b[31m.what": b"\x1b]0;title\x07",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_hostile_file_ends_in_one_line(tmp_path: Path, command: str, name: str) -> None:
    (tmp_path / name).write_bytes(HOSTILE[name])
    done = svf(command, tmp_path / name)
    assert done.code == 3, done
    first = one_of(done)
    assert first.isprintable()
    assert "Traceback" not in done.out + done.err


def one_of(done: Result) -> str:
    """The one line of an error, or the first finding of `svf verify`."""
    return done.error if done.err else done.out.splitlines()[0]


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_what_is_not_there_is_not_found(tmp_path: Path, command: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    for source in (tmp_path / "none", tmp_path / "pipe", "nul\0byte", ""):
        assert svf(command, source).code == 4, source


def test_a_folder_of_nothing_known_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert "notes.txt" in svf("inspect", tmp_path).error
    assert svf("inspect", tmp_path).code == 3


def test_magic_bytes_win_over_the_suffix(tmp_path: Path) -> None:
    write_aprt(tmp_path / "pytorch_model.bin", None, np.ones(1, np.float32))
    assert kind_of_source(str(tmp_path / "pytorch_model.bin")) is Kind.APRT
    torch.save({}, tmp_path / "y.safetensors")
    assert kind_of_source(str(tmp_path / "y.safetensors")) is Kind.PICKLE
