"""`svf apply`: what it writes is what `svf forward --adapted` runs on, as `transformers` loads it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from forward_models import MODELS, dumped, trace, write_model
from helpers import DOWN, EMBED, HEAD, rehash_offsets, svf, tensors_of, tree, with_json, with_tensors
from transformers import AutoModelForCausalLM

from stages.errors import OutputError
from stages.files.checkpoint import INDEX, WEIGHTS, open_checkpoint
from stages.files.folders import RUN_FILE
from stages.files.selection import select_by_rule
from stages.files.tensorfile import TensorFile, sha256, write_tensors
from stages.jobs import apply as module
from stages.jobs.apply import ApplyCommand, apply
from stages.jobs.builtin import write_vector
from stages.jobs.decompose import FLOAT64, decompose
from stages.jobs.decompose_options import DecomposeOptions
from stages.progress import Progress
from stages.spec.backend import Backend
from stages.spec.families import parameter_shapes

TOKENS = [3, 141, 59, 26, 53]  # what `trace` runs on
Case = tuple[Path, Path]  # a checkpoint and components of it


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory, torch_backend: Backend) -> Callable[[str], Case]:
    """A model of `forward_models.MODELS` by name and dtype, `qwen3 bfloat16`, with components of its layer 1."""
    made: dict[str, Case] = {}

    def case(which: str) -> Case:
        if which not in made:
            name, dtype = which.split()
            folder = tmp_path_factory.mktemp("apply")
            model = write_model(folder / "model", MODELS[name], dtype)
            (model / "tokenizer_config.json").write_text("{}")
            selected = select_by_rule(parameter_shapes(MODELS[name].config(dtype)), (1,))
            offsets = 0.3 * np.random.default_rng(1).standard_normal(selected.offset_count)
            write_vector(folder / "router.npy", offsets)
            options = DecomposeOptions(str(model), folder / "router.npy", None, (1,), folder / "components", None, True)
            decompose(options, FLOAT64, torch_backend)
            made[which] = model, folder / "components"
        return made[which]

    return case


def applied(case: Case, backend: Backend, out: Path, tied: str = "untie", dtype: str = "model") -> dict[str, Any]:
    """`svf apply` in this process."""
    command = ApplyCommand(case[1], str(case[0]), out, tied, dtype, "declared")
    return apply(command, lambda: backend, Progress(False))


def logits_of(folder: Path) -> np.ndarray:
    """The logits of the checkpoint in `transformers`, which misses no tensor and finds none too many."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.inference_mode():
        out = model.eval()(torch.tensor([TOKENS]), use_cache=False).logits[0].contiguous()
    return out.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if out.dtype == torch.bfloat16 else out.numpy()


# -- the law ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "which", ["qwen3 bfloat16", "qwen3 float32", "qwen3-untied bfloat16", "qwen2 float32", "qwen2-tied bfloat16"]
)
def test_transformers_on_the_result_gives_the_bits_of_the_adapted_forward(
    which: str, cases: Callable[[str], Case], torch_backend: Backend, tmp_path: Path
) -> None:
    model, components = case = cases(which)
    trace(model, torch_backend, adapted=components, stages="lm_head", out=tmp_path / "trace")
    expected = dumped(tmp_path / "trace")["lm_head"]
    document = applied(case, torch_backend, tmp_path / "out")
    got = logits_of(tmp_path / "out")
    assert got.dtype == expected.dtype
    assert got.tobytes() == expected.tobytes()
    assert logits_of(model).tobytes() != expected.tobytes()  # the unadapted model is another
    tied = MODELS[which.split()[0]].tied
    assert document["tied"] == {**document["tied"], "source": tied, "result": False, "last": None}
    assert (document["tied"]["note"] is not None) == tied


def test_one_more_ulp_in_one_weight_is_seen(
    cases: Callable[[str], Case], torch_backend: Backend, tmp_path: Path
) -> None:
    applied(cases("qwen3 float32"), torch_backend, tmp_path / "out")
    before = logits_of(tmp_path / "out")

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.norm.weight"].view(np.int32)[0] += 1

    with_tensors(tmp_path / "out" / WEIGHTS, change)
    assert logits_of(tmp_path / "out").tobytes() != before.tobytes()


def test_tied_last_is_what_copying_into_a_tied_module_gives(
    cases: Callable[[str], Case], torch_backend: Backend, tmp_path: Path
) -> None:
    """The experiment: every adapted weight copied, in the manifest's order, into the state dict of a tied model."""
    model, components = case = cases("qwen3 bfloat16")
    applied(case, torch_backend, tmp_path / "apart")
    apart = tensors_of(tmp_path / "apart" / WEIGHTS)
    module_ = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    state = module_.state_dict()
    order = [
        e["source_name"] for e in json.loads(next(components.glob("*manifest.json")).read_text())["selected_tensors"]
    ]
    assert order[0] == EMBED
    assert order[-1] == HEAD
    with torch.no_grad():
        for name in order:
            state[name].copy_(torch.from_numpy(apart[name].view(np.int16)).view(torch.bfloat16))
        expected = module_.eval()(torch.tensor([TOKENS]), use_cache=False).logits[0].contiguous()
    document = applied(case, torch_backend, tmp_path / "last", tied="last")
    assert document["tied"] == {**document["tied"], "source": True, "result": True, "last": HEAD}
    assert document["config_changes"] == {}
    assert logits_of(tmp_path / "last").tobytes() == expected.view(torch.int16).numpy().tobytes()
    last = tensors_of(tmp_path / "last" / WEIGHTS)
    assert HEAD not in last
    assert last[EMBED].tobytes() == apart[HEAD].tobytes() != apart[EMBED].tobytes()


# -- what is written ----------------------------------------------------------------------------------------------


def test_untouched_tensors_are_copied_byte_for_byte_and_told_by_hash(
    cases: Callable[[str], Case], torch_backend: Backend, tmp_path: Path
) -> None:
    model, _ = case = cases("qwen3-untied bfloat16")
    document = applied(case, torch_backend, tmp_path / "out")
    source, result = tensors_of(model / WEIGHTS), tensors_of(tmp_path / "out" / WEIGHTS)
    assert result.keys() == source.keys() == document["tensors"].keys()
    for name, array in result.items():
        assert document["tensors"][name]["sha256"] == sha256(array)
        assert (array.tobytes() == source[name].tobytes()) == (name not in document["adapted"]), name
    assert len(document["adapted"]) == 9
    assert header(tmp_path / "out" / WEIGHTS) == header(model / WEIGHTS)
    assert (tmp_path / "out" / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert document["copied"] == ["tokenizer_config.json"]


def header(path: Path) -> bytes:
    raw = path.read_bytes()
    return raw[: 8 + int.from_bytes(raw[:8], "little")]


def sharded(model: Path, folder: Path) -> Path:
    """The checkpoint in two shards, the bytes of the second in another order than the package's."""
    shutil.copytree(model, folder)
    tensors = tensors_of(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = list(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2][::-1]}
    for file, held in parts.items():
        specs = {name: (tensors[name].dtype, tensors[name].shape) for name in held}
        with module.TensorWriter(folder / file, specs, metadata={"format": "pt"}, keep_order=True) as writer:
            for name in held:
                writer.write(name, tensors[name])
            writer.commit()
    total = sum(array.nbytes for array in tensors.values())
    weight_map = {name: file for file, held in parts.items() for name in held}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("which", ["qwen3-untied bfloat16", "qwen3 bfloat16"])
def test_shards_stay_as_they_were(
    which: str, cases: Callable[[str], Case], torch_backend: Backend, tmp_path: Path
) -> None:
    model, components = cases(which)
    whole = applied((model, components), torch_backend, tmp_path / "whole")
    source = sharded(model, tmp_path / "sharded")
    document = applied((source, components), torch_backend, tmp_path / "out")
    assert {n: t["sha256"] for n, t in document["tensors"].items()} == {
        n: t["sha256"] for n, t in whole["tensors"].items()
    }
    first, second = sorted(p.name for p in source.glob("*.safetensors"))
    assert header(tmp_path / "out" / first) == header(source / first)
    before, after = (json.loads((folder / INDEX).read_text()) for folder in (source, tmp_path / "out"))
    if "untied" in which:
        assert (tmp_path / "out" / INDEX).read_bytes() == (source / INDEX).read_bytes()
        assert header(tmp_path / "out" / second) == header(source / second)
    else:
        assert after["weight_map"] == {**before["weight_map"], HEAD: second}
        assert list(TensorFile(tmp_path / "out" / second).tensors)[-1] == HEAD
    with open_checkpoint(tmp_path / "out") as checkpoint:
        checkpoint.check()
        assert after["metadata"]["total_size"] == sum(info.nbytes for info in checkpoint.tensors.values())
    assert logits_of(tmp_path / "out").tobytes() == logits_of(tmp_path / "whole").tobytes()


def test_a_model_that_is_not_adapted_apart_stays_tied(
    cases: Callable[[str], Case], torch_backend: Backend, tmp_path: Path
) -> None:
    model, components = cases("qwen3 bfloat16")
    same = Path(shutil.copytree(components, tmp_path / "same"))

    def equal(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"svf.scale_offsets.{HEAD}"] = tensors[f"svf.scale_offsets.{EMBED}"]

    with_tensors(same / "trinity_svf_scale_offsets.safetensors", equal)
    rehash_offsets(same)
    document = applied((model, same), torch_backend, tmp_path / "out")
    assert (document["tied"]["result"], document["tied"]["note"]) == (True, None)
    assert HEAD not in document["tensors"]
    assert (tmp_path / "out" / "config.json").read_bytes() == (model / "config.json").read_bytes()


@pytest.mark.parametrize("which", ["qwen3 bfloat16", "qwen2 float32"])
def test_another_dtype_is_one_rounding_of_the_float32_stage(
    which: str, cases: Callable[[str], Case], torch_backend: Backend, tmp_path: Path
) -> None:
    case = cases(which)
    wide = applied(case, torch_backend, tmp_path / "wide", dtype="float32")
    narrow = applied(case, torch_backend, tmp_path / "narrow", dtype="bfloat16")
    assert (wide["stage"], narrow["stage"]) == ("final_f32", "final_bf16")
    x, y = tensors_of(tmp_path / "wide" / WEIGHTS), tensors_of(tmp_path / "narrow" / WEIGHTS)
    assert x.keys() == y.keys()
    assert all(x[name].astype(ml_dtypes.bfloat16).tobytes() == y[name].tobytes() for name in x)
    assert (
        x[DOWN.replace("2", "1")].astype(ml_dtypes.bfloat16).astype(np.float32).tobytes()
        != x[DOWN.replace("2", "1")].tobytes()
    )
    for folder in ("wide", "narrow"):
        with open_checkpoint(tmp_path / folder) as checkpoint:
            checkpoint.check()


def test_both_backends_write_the_same_bytes_in_exact_precision(cases: Callable[[str], Case], tmp_path: Path) -> None:
    model, components = cases("qwen3 float32")
    for name in ("torch", "jax"):
        done = svf("apply", components, model, "--out", tmp_path / name, "--backend", name, "--precision", "exact")
        assert done.code == 0, done.err
    assert tree(tmp_path / "torch") == tree(tmp_path / "jax")


# -- what is left out, refused, and cleaned up ---------------------------------------------------------------------


def test_stale_weights_links_and_folders_are_left_out_and_named(
    cases: Callable[[str], Case], torch_backend: Backend, tmp_path: Path
) -> None:
    model, components = cases("qwen3 bfloat16")
    source = Path(shutil.copytree(model, tmp_path / "model"))
    (tmp_path / "secret").write_text("secret")
    (source / "merges.txt").symlink_to(tmp_path / "secret")
    (source / "vocab.json").symlink_to("tokenizer_config.json")
    (source / "code.py").write_text("raise SystemExit('executed')")
    (source / "pytorch_model.bin").write_bytes(b"stale")
    write_tensors(source / "other.safetensors", {"x": np.zeros(1, np.float32)})
    (source / "deep").mkdir()
    os.mkfifo(source / "pipe")
    done = svf("apply", components, source, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert done.json["copied"] == ["code.py", "tokenizer_config.json", "vocab.json"]
    left_out = done.json["left_out"]
    assert left_out.keys() == {"merges.txt", "pytorch_model.bin", "other.safetensors", "deep", "pipe"}
    assert "link out of" in left_out["merges.txt"]
    assert not (tmp_path / "out" / "vocab.json").is_symlink()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*done.json["copied"], "config.json", WEIGHTS}


def test_the_tie_is_told_aloud(cases: Callable[[str], Case], tmp_path: Path) -> None:
    model, components = cases("qwen3 bfloat16")
    done = svf("apply", components, model, "--out", tmp_path / "out", progress=True)
    assert done.code == 0
    assert "untied" in done.err
    assert "untied" in done.out
    assert f"  {svf_json(tmp_path, components, model)['tensors'][EMBED]['sha256'][:16]}  {EMBED}" in done.out


def svf_json(tmp_path: Path, components: Path, model: Path) -> Any:
    return svf("apply", components, model, "--out", tmp_path / "again", "--json").json


def test_bad_input_is_refused_in_one_line_and_leaves_nothing(cases: Callable[[str], Case], tmp_path: Path) -> None:
    model, components = cases("qwen3 bfloat16")
    other, _ = cases("qwen2 float32")
    untied, apart = cases("qwen3-untied bfloat16")
    there = tmp_path / "there"
    there.mkdir()
    (there / "x").write_text("x")
    for code, word, arguments in [
        (6, "not empty", (components, model, "--out", there)),
        (2, "not tied", (apart, untied, "--out", tmp_path / "o", "--tied", "last")),
        (2, "'--layout': 'all'", (components, model, "--out", tmp_path / "o", "--layout", "all")),
        (4, "no such folder", (tmp_path / "none", model, "--out", tmp_path / "o")),
        (3, "components of another model", (components, changed_shape(model, tmp_path), "--out", tmp_path / "o")),
    ]:
        done = svf("apply", *arguments)
        assert done.code == code, (done.code, done.err)
        assert word in done.error
        assert not (tmp_path / "o").exists()
    assert tree(there) == {"x": b"x"}
    assert other.is_dir()


def changed_shape(model: Path, tmp_path: Path) -> Path:
    """The model with a smaller vocabulary."""
    if not (tmp_path / "smaller").exists():
        folder = Path(shutil.copytree(model, tmp_path / "smaller"))
        with_json(folder / "config.json", lambda c: c.update(vocab_size=200))
        with_tensors(folder / WEIGHTS, lambda t: t.update({EMBED: t[EMBED][:200]}))
    return tmp_path / "smaller"


@pytest.mark.parametrize("step", ["_write_shards", "_copy_others", "_write_index", "_config_changes"])
def test_a_failure_on_the_way_leaves_no_folder(
    step: str, cases: Callable[[str], Case], torch_backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OutputError("disk full")

    monkeypatch.setattr(module, step, fail)
    with pytest.raises(OutputError):
        applied(cases("qwen3 bfloat16"), torch_backend, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_config_is_written_last(
    cases: Callable[[str], Case], torch_backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what commits: a run killed before has no config.json, and `transformers` loads nothing."""
    seen: list[set[str]] = []
    changes = module._config_changes
    monkeypatch.setattr(module, "_config_changes", lambda *a: seen.append(set(tree(tmp_path / "out"))) or changes(*a))
    applied(cases("qwen3 bfloat16"), torch_backend, tmp_path / "out")
    assert seen == [{WEIGHTS, "tokenizer_config.json", RUN_FILE}]
    assert set(tree(tmp_path / "out")) == {WEIGHTS, "tokenizer_config.json", "config.json"}
