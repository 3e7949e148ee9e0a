"""Checkpoints: what is opened, read and checked, and every refusal by name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import ROOT

from stages.errors import InputError, NotFoundError, SvfError
from stages.files import checkpoint as module
from stages.files import tensorfile
from stages.files.checkpoint import Checkpoint, open_checkpoint
from stages.files.tensorfile import TensorFile, write_tensors
from stages.jobs.synth import synthesize
from stages.spec.families import parameter_shapes

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
Q_NORM = "model.layers.0.self_attn.q_norm.weight"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checkpoint") / "tiny"
    synthesize(out, "tiny")
    return out


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    with TensorFile(folder / "model.safetensors") as file:
        return {name: file.read(name) for name in file.tensors}


def with_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = tensors_of(folder)
    change(tensors)
    write_tensors(folder / "model.safetensors", tensors)


def with_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(raw))


def shard(folder: Path) -> dict[str, Any]:
    """Split the checkpoint in two shards with an index, which is returned."""
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number, names in enumerate((list(tensors)[:20], list(tensors)[20:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        write_tensors(folder / file, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    write_index(folder, index)
    return index


def write_index(folder: Path, index: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def refused(error: type[SvfError], action: Callable[[], object], *words: str) -> str:
    with pytest.raises(error) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text
    return text


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


# -- opening and reading ---------------------------------------------------------------------------------------


def test_a_folder_is_opened_by_its_headers(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorFile, "read", lambda *_: pytest.fail("read a tensor"))
    with open_checkpoint(tiny) as checkpoint:
        assert (checkpoint.path, checkpoint.source, checkpoint.revision) == (tiny, str(tiny), None)
        assert checkpoint.raw_config["model_type"] == checkpoint.config.family == "qwen3"
        shapes = parameter_shapes(checkpoint.config)
        assert {name: info.shape for name, info in checkpoint.tensors.items()} | {HEAD: (512, 64)} == shapes
        checkpoint.check()


def test_rows_are_read_as_stored(tiny: Path) -> None:
    stored = tensors_of(tiny)
    with open_checkpoint(str(tiny)) as checkpoint:
        for name, array in stored.items():
            np.testing.assert_array_equal(checkpoint.read(name), array)
        np.testing.assert_array_equal(checkpoint.read(EMBED, 5, 9), stored[EMBED][5:9])
        np.testing.assert_array_equal(checkpoint.read(EMBED, 500), stored[EMBED][500:])
        assert checkpoint.read(EMBED, 5, 5).shape == (0, 64)
        assert checkpoint.read(EMBED).dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 513), (3, 2), (513, None), (0, -1)])
def test_rows_that_are_not_there_are_not_read_from_the_next_tensor(tiny: Path, start: int, stop: int | None) -> None:
    with open_checkpoint(tiny) as checkpoint, pytest.raises(ValueError, match="of 512"):
        checkpoint.read(EMBED, start, stop)


def test_a_closed_checkpoint_holds_no_file(folder: Path) -> None:
    shard(folder)
    before = open_files()
    with open_checkpoint(folder):
        assert open_files() == before + 2
    assert open_files() == before


def test_shards_read_like_one_file(tiny: Path, folder: Path) -> None:
    shard(folder)
    with open_checkpoint(tiny) as one, open_checkpoint(folder) as two:
        two.check()
        assert one.tensors.keys() == two.tensors.keys()
        assert one.weights_sha256(one.tensors) == two.weights_sha256(one.tensors)


def test_one_file_wins_over_an_index_as_in_transformers(folder: Path) -> None:
    write_index(folder, {"weight_map": {"x": "missing.safetensors"}})
    with open_checkpoint(folder) as checkpoint:
        checkpoint.check()


def test_a_tied_head_resolves_to_the_embedding(tiny: Path) -> None:
    with open_checkpoint(tiny) as checkpoint:
        assert checkpoint.resolve(HEAD) == EMBED
        assert checkpoint.info(HEAD) == checkpoint.info(EMBED)
        np.testing.assert_array_equal(checkpoint.read(HEAD, 3, 4), checkpoint.read(EMBED, 3, 4))
        assert checkpoint.weights_sha256([HEAD])[HEAD] == checkpoint.weights_sha256([EMBED])[EMBED]


def test_a_stored_head_resolves_to_itself_and_an_untied_one_must_be_stored(folder: Path) -> None:
    with_config(folder, tie_word_embeddings=False)
    with open_checkpoint(folder) as checkpoint:
        refused(InputError, lambda: checkpoint.resolve(HEAD), HEAD)
        refused(InputError, checkpoint.check, "missing", HEAD)
    with_tensors(folder, lambda t: t.update({HEAD: t[EMBED] * 2}))
    with open_checkpoint(folder) as checkpoint:
        checkpoint.check()
        assert checkpoint.resolve(HEAD) == HEAD


def test_a_missing_tensor_is_named_with_similar_ones(tiny: Path) -> None:
    with open_checkpoint(tiny) as checkpoint:
        wrong = "model.layers.0.self_attn.q_proj.wieght"
        for action in (checkpoint.resolve, checkpoint.read, checkpoint.info):
            refused(InputError, lambda a=action: a(wrong), wrong, "did you mean", wrong.replace("ie", "ei"))


# -- fingerprints ----------------------------------------------------------------------------------------------


def test_a_content_hash_is_that_of_the_raw_bytes(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in tensors_of(tiny).items()}
    with open_checkpoint(tiny) as checkpoint:
        assert checkpoint.weights_sha256(checkpoint.tensors) == expected
        monkeypatch.setattr(tensorfile, "_BLOCK_BYTES", 1000)  # several blocks for each matrix
        assert checkpoint.weights_sha256(checkpoint.tensors) == expected


def test_a_fingerprint_changes_with_config_header_and_shards_but_not_with_values(tiny: Path, folder: Path) -> None:
    def fingerprint(path: Path) -> dict[str, str | int]:
        with open_checkpoint(path) as checkpoint:
            return checkpoint.fingerprint()

    original = fingerprint(tiny)
    assert original["config_sha256"] == hashlib.sha256((tiny / "config.json").read_bytes()).hexdigest()
    assert original["bytes"] == (tiny / "model.safetensors").stat().st_size
    assert fingerprint(folder) == original
    before = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert fingerprint(folder) == original  # a header fingerprint, as documented
    with_tensors(folder, lambda t: t.update({NORM: t[NORM].astype(np.float32)}))
    assert fingerprint(folder)["headers_sha256"] != original["headers_sha256"]
    with_config(folder, rms_norm_eps=1e-5)
    assert fingerprint(folder)["config_sha256"] != original["config_sha256"]
    shard(folder)
    assert fingerprint(folder)["headers_sha256"] != original["headers_sha256"]


# -- check -----------------------------------------------------------------------------------------------------

CHECKS: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], tuple[str, ...]]] = {
    "a missing norm, which transformers fills with ones": (lambda t: t.pop(Q_NORM), ("missing", Q_NORM)),
    "a missing embedding": (lambda t: t.pop(EMBED), ("missing", EMBED)),
    "an unexpected bias": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t[NORM]}),
        ("unexpected", "model.layers.0.self_attn.q_proj.bias"),
    ),
    "a layer too many": (
        lambda t: t.update({"model.layers.4.mlp.up_proj.weight": t["model.layers.3.mlp.up_proj.weight"]}),
        ("unexpected", "model.layers.4.mlp.up_proj.weight"),
    ),
    "a renamed tensor": (
        lambda t: t.update({"norm.weight": t.pop(NORM)}),
        ("missing", NORM, "unexpected: norm.weight"),
    ),
    "a transposed matrix": (lambda t: t.update({EMBED: t[EMBED].T.copy()}), ("[64, 512]", "[512, 64]", EMBED)),
    "a norm with an axis too many": (lambda t: t.update({NORM: t[NORM][None]}), ("[1, 64]", "[64]", NORM)),
    "one float32 norm": (lambda t: t.update({NORM: t[NORM].astype(np.float32)}), ("mixed", NORM, "float32")),
    "another dtype than declared": (
        lambda t: t.update({n: a.astype(np.float16) for n, a in t.items()}),
        ("bfloat16", "float16"),
    ),
    "an integer tensor": (lambda t: t.update({NORM: t[NORM].astype(np.int32)}), (NORM, "int32")),
    "a double": (lambda t: t.update({NORM: t[NORM].astype(np.float64)}), (NORM, "float64")),
    "a tied head that differs in its last bit": (lambda t: t.update({HEAD: one_bit_off(t[EMBED])}), (HEAD, "row 511")),
    "a tied head of another shape": (lambda t: t.update({HEAD: t[EMBED][:511].copy()}), (HEAD, "[511, 64]")),
}


def one_bit_off(array: np.ndarray) -> np.ndarray:
    changed = array.copy()
    changed.view(np.uint16)[-1, -1] ^= 1
    return changed


@pytest.mark.parametrize("case", CHECKS)
def test_a_tensor_that_does_not_fit_the_config_is_named(folder: Path, case: str) -> None:
    change, words = CHECKS[case]
    with_tensors(folder, change)
    with open_checkpoint(folder) as checkpoint:
        refused(InputError, checkpoint.check, str(folder), *words)


def test_a_tied_head_may_be_stored_when_it_is_equal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_tensors(folder, lambda t: t.update({HEAD: t[EMBED].copy()}))
    for block in (tensorfile._BLOCK_BYTES, 1000):
        monkeypatch.setattr(tensorfile, "_BLOCK_BYTES", block)
        with open_checkpoint(folder) as checkpoint:
            checkpoint.check()


def test_many_wrong_tensors_still_make_one_short_line(folder: Path) -> None:
    with_config(folder, num_hidden_layers=1, layer_types=None)
    with open_checkpoint(folder) as checkpoint:
        assert len(refused(InputError, checkpoint.check, "and 29 more")) < 500


def test_a_refused_config_names_the_file_when_it_is_needed(folder: Path) -> None:
    with_config(folder, layer_types=None, hidden_act="gelu")
    with open_checkpoint(folder) as checkpoint:
        assert len(checkpoint.tensors) == 46
        refused(InputError, checkpoint.check, str(folder / "config.json"), "hidden_act")


# -- malformed folders -----------------------------------------------------------------------------------------


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


FOLDERS: dict[str, tuple[Callable[[Path], object], type[SvfError], tuple[str, ...]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), NotFoundError, ("config.json",)),
    "a broken config": (lambda f: (f / "config.json").write_text("{"), InputError, ("config.json", "JSON")),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[]"), InputError, ("config.json", "list")),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), NotFoundError, ("model.safetensors",)),
    "pickled weights": (_pickled, InputError, ("pytorch_model.bin", "convert")),
    "truncated weights": (lambda f: os.truncate(f / "model.safetensors", 9000), InputError, ("truncated",)),
    "weights that are a folder": (
        lambda f: [(f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()],
        NotFoundError,
        ("not a regular file",),
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_malformed_folder_is_refused(folder: Path, case: str) -> None:
    damage, error, words = FOLDERS[case]
    damage(folder)
    before = open_files()
    refused(error, lambda: open_checkpoint(folder), str(folder), *words)
    assert open_files() == before


def test_a_pickle_is_never_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pickled(folder)
    opened: list[str] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *a, **k: opened.append(str(path)) or real(path, *a, **k))
    refused(InputError, lambda: open_checkpoint(folder))
    assert not [path for path in opened if path.endswith(".bin")]


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def _map(folder: Path, name: str, file: Any) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = file
    write_index(folder, index)


def _outside(folder: Path, file: str) -> None:
    """Point the index at a valid shard outside the folder."""
    shutil.copy(folder / FIRST, folder.parent / "outside.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {n: file if s == FIRST else s for n, s in index["weight_map"].items()}
    write_index(folder, index)


def _drop(folder: Path, name: str) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"][name]
    write_index(folder, index)


def _link(folder: Path) -> None:
    (folder / FIRST).rename(folder.parent / "outside.safetensors")
    (folder / FIRST).symlink_to(folder.parent / "outside.safetensors")


INSIDE = "not a file inside the folder"
INDEXES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "a missing shard": (lambda f: (f / FIRST).unlink(), (FIRST,)),
    "a shard that is a folder": (lambda f: [(f / FIRST).unlink(), (f / FIRST).mkdir()], (FIRST, "regular")),
    "a path upwards": (lambda f: _outside(f, "../outside.safetensors"), ("../outside.safetensors", INSIDE)),
    "a path down and up": (lambda f: _outside(f, f"x/../../{FIRST}"), ("x/../../", INSIDE)),
    "a Windows path upwards": (lambda f: _outside(f, "..\\outside.safetensors"), ("outside", INSIDE)),
    "an absolute path": (lambda f: _outside(f, str(f.parent / "outside.safetensors")), ("outside.safetensors", INSIDE)),
    "a drive": (lambda f: _outside(f, "C:\\outside.safetensors"), ("C:", INSIDE)),
    "an empty name": (lambda f: _outside(f, ""), ("weight_map",)),
    "a NUL": (lambda f: _outside(f, "a\0b"), ("weight_map",)),
    "a control character": (lambda f: _outside(f, "a\x1b[31mb"), ("\\x1b",)),
    "a link outside": (_link, (FIRST, "outside")),
    "a tensor in another shard": (lambda f: _map(f, NORM, FIRST), (NORM, FIRST)),
    "a tensor nowhere": (lambda f: _map(f, "model.extra", SECOND), ("model.extra", SECOND)),
    "a tensor not listed": (lambda f: _drop(f, NORM), (NORM, "does not list")),
    "a shard that is a number": (lambda f: _map(f, NORM, 1), ("weight_map",)),
    "no map": (lambda f: write_index(f, {}), ("weight_map",)),
    "an empty map": (lambda f: write_index(f, {"weight_map": {}}), ("weight_map", "empty")),
    "a map that is a list": (lambda f: write_index(f, {"weight_map": [NORM]}), ("weight_map",)),
    "an index that is a list": (lambda f: write_index(f, []), ("object",)),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_disagrees_with_the_folder_is_refused(folder: Path, case: str) -> None:
    damage, words = INDEXES[case]
    shard(folder)
    damage(folder)
    before = open_files()
    text = refused(InputError, lambda: open_checkpoint(folder), "model.safetensors.index.json", *words)
    assert "\x1b" not in text
    assert open_files() == before


@pytest.mark.parametrize(
    "name", ["a/b/c", "nowhere", "/nowhere", "", "../x", "./x/y", "a/b@", "a/b@../c", "a\0b", "x" * 300]
)
def test_a_source_that_is_neither_folder_nor_hub_model_is_not_found(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(module, "_fetch", lambda *_: pytest.fail("asked the hub"))
    refused(NotFoundError, lambda: open_checkpoint(name), "folder" if len(name) < 300 else "too long")


def test_a_path_object_is_never_a_hub_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_fetch", lambda *_: pytest.fail("asked the hub"))
    refused(NotFoundError, lambda: open_checkpoint(Path("org/name")), "org/name")


def test_a_file_is_refused(tiny: Path) -> None:
    refused(InputError, lambda: open_checkpoint(tiny / "model.safetensors"), "folder")


# -- the hub ---------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def calls() -> list[tuple[str, dict[str, Any]]]:
    """Model and options of every call to `snapshot_download` under the `hub` fixture."""
    return []


@pytest.fixture
def hub(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[tuple[str, dict[str, Any]]]) -> Path:
    """A snapshot in the hub's cache, links into `blobs` and all, that `snapshot_download` returns."""
    import huggingface_hub

    snapshot = tmp_path / "hub/models--org--name/snapshots" / COMMIT
    blobs = tmp_path / "hub/models--org--name/blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(tiny, blobs)
    shard(blobs)
    for file in list(blobs.iterdir()):
        blob = blobs / hashlib.sha256(file.name.encode()).hexdigest()
        file.rename(blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))

    def download(model: str, **options: Any) -> str:
        calls.append((model, options))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_a_hub_model_is_fetched_without_pickles_and_code(hub: Path, calls: list[tuple[str, dict[str, Any]]]) -> None:
    with open_checkpoint("org/name@v1.0") as checkpoint:
        checkpoint.check()
        assert (checkpoint.path, checkpoint.source, checkpoint.revision) == (hub, "org/name@v1.0", COMMIT)
    ((model, options),) = calls
    assert (model, options["revision"], options["local_files_only"]) == ("org/name", "v1.0", False)
    from huggingface_hub.utils import filter_repo_objects

    files = [
        "config.json", "generation_config.json", "model.safetensors", "model-00001-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
        "special_tokens_map.json",
    ]  # fmt: skip
    others = ["pytorch_model.bin", "modeling.py", "onnx/model.safetensors", "adapter_model.safetensors", "README.md"]
    patterns = {key: options[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(files + others, **patterns)) == files


def test_a_local_folder_wins_over_a_hub_model(hub: Path, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "org/name")
    with open_checkpoint("org/name") as checkpoint:
        assert checkpoint.revision is None


@pytest.mark.parametrize(("value", "offline"), [("1", True), ("true", True), ("ON", True), ("0", False), ("", False)])
def test_offline_is_honoured(
    hub: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch, value: str, offline: bool
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    open_checkpoint("org/name").close()
    assert calls[0][1]["local_files_only"] == offline


def test_the_real_client_offline_names_the_model_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(
        NotFoundError,
        lambda: open_checkpoint("no-such-org/no-such-model@main"),
        "no-such-org/no-such-model@main",
        "HF_HUB_OFFLINE",
        "hf download no-such-org/no-such-model --revision main",
    )


@pytest.mark.parametrize("error", [ConnectionError("no\nroute"), OSError(28, "No space left"), ValueError("bad id")])
def test_a_failed_fetch_is_not_found_in_one_line(hub: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused(NotFoundError, lambda: open_checkpoint("org/name"), type(error).__name__, "hf download org/name")


@pytest.mark.parametrize("name", ["config.json", FIRST, "model.safetensors.index.json"])
def test_an_incomplete_snapshot_names_the_command(hub: Path, name: str) -> None:
    (hub / name).unlink()
    refused(NotFoundError, lambda: open_checkpoint("org/name"), name, "hf download org/name")


def test_a_snapshot_may_not_link_beyond_its_blobs(hub: Path, tmp_path: Path) -> None:
    (hub / FIRST).resolve().rename(tmp_path / "outside")
    (hub / FIRST).unlink()
    (hub / FIRST).symlink_to(tmp_path / "outside")
    refused(InputError, lambda: open_checkpoint("org/name"), FIRST, "outside")


# -- golden ----------------------------------------------------------------------------------------------------


def test_the_golden_checkpoint_is_whole() -> None:
    path = ROOT.parent / "shared/golden/trinity-tiny/model"
    if not path.is_dir():
        pytest.skip(f"no golden data at {path}")
    with open_checkpoint(path) as checkpoint:
        checkpoint.check()
        assert isinstance(checkpoint, Checkpoint)
        assert checkpoint.read(HEAD).shape == (512, 64)
