"""`svf forward` on one backend: what is captured, written, repeated, adapted, and compared with production."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from forward_models import LINEAR, MODELS, YARN, Model, dumped, forward_command, random_weights, trace, write_model
from helpers import DOWN, EMBED, HEAD, Result, one_line, svf, tensors_of, tree, with_json, with_tensors

import svf_jax.production
import svf_torch.production
from stages.errors import InputError, OutputError, UsageError
from stages.files.bundle import ALL_STAGES_FILE, tensor_stage_key
from stages.files.checkpoint import open_checkpoint
from stages.files.dump import MANIFEST_FILE
from stages.files.forward_dump import ForwardSide
from stages.files.tensorfile import sha256, write_tensors
from stages.jobs import forward_one as forward_job
from stages.judge.forward_diff import diff_forward
from stages.judge.production import sound
from stages.judge.stats import top_tokens
from stages.oracle.components import ReferenceBackend
from stages.progress import Progress
from stages.run.adapted import ADAPTED_FILE
from stages.spec.backend import Backend
from svf_jax.backend import JaxBackend

# The stages of `apr trace --save-tensor`, and those it lacked.
# fmt: off
ORIGINAL = [
    "embedding", "attn_norm", "qkv_matmul", "qkv_bias", "q_post_rope", "k_post_rope", "attention", "attn_out",
    "post_attn_residual", "ffn_norm", "ffn_gate", "ffn_up", "ffn_silu", "ffn_swigl", "ffn_out", "post_ffn_residual",
    "layer_output", "final_norm", "lm_head",
]
ADDED = ["inv_freq", "rope_angle", "rope_cos", "rope_sin", "q_norm", "k_norm", "attn_scores", "attn_softmax"]
WHOLE_MODEL = ["inv_freq", "rope_angle", "rope_cos", "rope_sin", "embedding", "final_norm", "lm_head"]
# fmt: on
TOKENS = [3, 141, 59, 26, 53]  # what `trace` runs on
NEW_FIELDS = {"schema", "tokens", "next_token", "top5", "production", "deterministic", "out"}  # of svf.forward/1


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, untied, with QKV bias, in float32."""
    return write_model(tmp_path_factory.mktemp("qwen2") / "model", MODELS["qwen2"], "float32")


@pytest.fixture(scope="session")
def reference() -> Backend:
    return ReferenceBackend()


def keys_of(layers: int, family: str) -> set[str]:
    """Every key of a full dump."""
    names = {*ORIGINAL, *ADDED} - {"layer_output", *({"q_norm", "k_norm"} if family == "qwen2" else ())}
    in_layer = names - set(WHOLE_MODEL)
    return {*WHOLE_MODEL, *(f"layers.{n}.{name}" for n in range(layers) for name in in_layer)}


def refused(done: Result, code: int, *words: str) -> None:
    assert (done.code, done.out) == (code, ""), (done.code, done.err, done.out[-300:])
    for word in words:
        assert word in done.error, done.error


# -- what is captured and written ------------------------------------------------------------------------------


@pytest.mark.parametrize(("which", "layers", "dtype"), [("model", 4, "bfloat16"), ("qwen2", 2, "float32")])
def test_a_full_dump_holds_every_stage_and_its_manifest_the_truth(
    which: str, layers: int, dtype: str, backend: Backend, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, out = request.getfixturevalue(which), tmp_path / "out"
    document = trace(folder, backend, out=out)
    manifest = json.loads((out / MANIFEST_FILE).read_text())
    family = manifest["model"]["config"]["model_type"]
    tensors = dumped(out)
    assert tensors.keys() == manifest["tensors"].keys() == keys_of(layers, family)
    files = {"model.safetensors", *(f"layer-{n}.safetensors" for n in range(layers))}
    assert {p.name for p in out.iterdir()} == {*files, MANIFEST_FILE}
    for file in files:
        held = tensors_of(out / file)
        assert {manifest["tensors"][key]["file"] for key in held} == {file}
        layer = file.removesuffix(".safetensors").removeprefix("layer-")
        assert all(
            key.startswith(f"layers.{layer}.") if file != "model.safetensors" else "." not in key for key in held
        )
    for key, array in tensors.items():
        entry = manifest["tensors"][key]
        raw = hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()
        assert (entry["dtype"], entry["shape"], entry["sha256"]) == (array.dtype.name, list(array.shape), raw)
        assert array.dtype.name == ("float32" if key in ("inv_freq", "rope_angle") else dtype)
    assert (manifest["schema"], manifest["kind"]) == ("svf.dump/1", "forward")
    assert (manifest["backend"], manifest["dtype"], manifest["positions"]) == (backend.name, dtype, "all")
    assert (manifest["tokens"], manifest["layers"]) == (TOKENS, list(range(layers)))
    assert manifest["tokens_sha256"] == hashlib.sha256(np.array(TOKENS, "<i8").tobytes()).hexdigest()
    assert manifest["model"]["source"] == str(folder.resolve())
    assert manifest["model"]["config"] == json.loads((folder / "config.json").read_text())
    assert manifest["model"]["fingerprint"].keys() == {"config_sha256", "headers_sha256", "bytes"}
    assert (manifest["adapted"], manifest["layout"]) == (None, None)
    assert manifest["facts"].items() >= {**backend.facts(), "jit": manifest["facts"]["jit"]}.items()
    # The document says the same.
    logits = tensors["lm_head"]
    assert document.keys() >= NEW_FIELDS
    assert (document["schema"], document["tokens"], document["out"]) == ("svf.forward/1", TOKENS, str(out))
    assert document["next_token"] == int(np.argmax(logits[-1].astype(np.float32))) == document["top5"][0]["token"]
    assert document["top5"] == top_tokens(logits[-1].astype(np.float32))
    assert document["lm_head_sha256"] == manifest["tensors"]["lm_head"]["sha256"]
    assert (document["deterministic"], document["production"]["ran"]) == (None, False)


def test_each_stage_of_apr_trace_and_each_added_one_can_be_asked_for_by_name(
    model: Path, reference: Backend, tmp_path: Path
) -> None:
    assert len(set(ORIGINAL)) == 19
    trace(model, reference, out=tmp_path / "all")
    everything = dumped(tmp_path / "all")
    for name in ORIGINAL + ADDED:
        trace(model, reference, out=tmp_path / name, stages=name, layers="2")
        (found,) = dumped(tmp_path / name).items()
        stage = "post_ffn_residual" if name == "layer_output" else name
        assert found[0] == (stage if stage in WHOLE_MODEL else f"layers.2.{stage}")
        assert np.array_equal(found[1], everything[found[0]])


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_exactly_what_was_asked_for_is_captured(
    name: str, model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    backend = request.getfixturevalue(f"{name}_backend")
    trace(model, backend, out=tmp_path / "all")
    asked = {"layers": "1,3", "stages": "ffn_swigl, ffn_gate,layer_output,rope_cos", "positions": "last"}
    document = trace(model, backend, out=tmp_path / "some", **asked)
    everything, some = dumped(tmp_path / "all"), dumped(tmp_path / "some")
    stages = ("ffn_gate", "ffn_swigl", "post_ffn_residual")
    assert some.keys() == {"rope_cos", *(f"layers.{n}.{stage}" for n in (1, 3) for stage in stages)}
    for key, array in some.items():
        assert array.shape[0] == 1
        assert np.array_equal(array, everything[key][-1:]), key
    assert (document["layers"], document["positions"]) == ([1, 3], "last")
    assert document["stages"] == ["rope_cos", *stages]
    assert {p.name for p in (tmp_path / "some").iterdir()} == {
        MANIFEST_FILE, "model.safetensors", "layer-1.safetensors", "layer-3.safetensors"
    }  # fmt: skip


def test_the_last_position_of_scores_is_the_last_query_of_every_head(
    model: Path, reference: Backend, tmp_path: Path
) -> None:
    trace(model, reference, out=tmp_path / "all")
    trace(model, reference, out=tmp_path / "last", positions="last")
    everything, last = dumped(tmp_path / "all"), dumped(tmp_path / "last")
    assert everything.keys() == last.keys()
    for key, array in last.items():
        stage, whole = key.rpartition(".")[2], everything[key]
        expected = whole if stage == "inv_freq" else whole[:, -1:] if stage.startswith("attn_s") else whole[-1:]
        assert np.array_equal(array, expected), key


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--stages", "ffn_gat"), ("ffn_gat", "ffn_gate", "lm_head", "layer_output")),
        (("--stages", ""), ("--stages", "embedding")),
        (("--layers", "4"), ("no layer 4", "0-3")),
        (("--layers", "2-9"), ("no layer 9", "0-3")),
        (("--layers", "-1"), ("0-3",)),
        (("--layers", "x"), ("'x'", "0-3")),
        (("--positions", "first"), ("first", "all", "last")),
        (("--layout", "vh"), ("--layout vh", "--adapted")),
        (("--layout", "all"), ("'--layout': 'all'",)),
        (("--repeat", "0"), ("--repeat",)),
        (("--jit", "none"), ("--jit none", "JAX")),
        (("--jit", "layer"), ("--jit layer", "JAX")),
        (("--device", "nowhere"), ("nowhere",)),
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_does_not_exist_is_exit_2_with_what_there_is(
    model: Path, tmp_path: Path, option: tuple[str, str], words: tuple[str, ...]
) -> None:
    name = "torch" if option[0] != "--jit" else "reference"
    done = svf("forward", model, "--backend", name, "--tokens", "1,2", *option, "--out", tmp_path / "out")
    refused(done, 2, *words)
    assert not list(tmp_path.glob("out/*"))


def test_jit_is_about_jax(model: Path) -> None:
    refused(svf("forward", model, "--backend", "torch", "--jit", "layer"), 2, "--jit layer", "--backend jax")


def test_a_step_that_the_family_lacks_is_refused_by_name(qwen2: Path) -> None:
    refused(
        svf("forward", qwen2, "--backend", "reference", "--tokens", "1", "--stages", "q_norm"), 2, "q_norm", "no such"
    )


def test_a_dump_without_its_manifest_is_refused(model: Path, reference: Backend, tmp_path: Path) -> None:
    trace(model, reference, out=tmp_path / "out", stages="embedding")
    ForwardSide(tmp_path / "out").close()
    (tmp_path / "out" / MANIFEST_FILE).unlink()
    with pytest.raises(InputError) as caught:
        ForwardSide(tmp_path / "out")
    one_line(caught.value, "not written to its end")


@dataclasses.dataclass
class Altered:
    """A backend with one stage passed through `change(result, call number)`; calls are counted from 0."""

    inner: Any
    stage: str
    change: Callable[[Any, int], Any]
    calls: int = 0

    def _changed(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        return self.change(self.inner.forward[self.stage](*args, **options), self.calls - 1)

    @property
    def forward(self) -> Mapping[str, Callable[..., Any]]:
        return {**self.inner.forward, self.stage: self._changed}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def test_a_run_that_fails_leaves_no_dump(model: Path, torch_backend: Backend, tmp_path: Path) -> None:
    def fail(result: Any, call: int) -> Any:
        if call == 2:
            raise ZeroDivisionError
        return result

    for format in ("safetensors", "aprt"):
        with pytest.raises(ZeroDivisionError):
            trace(model, Altered(torch_backend, "ffn_up", fail), out=tmp_path / "out", format=format)
        assert not list(tmp_path.glob("out/*"))


def test_a_folder_with_content_is_refused_before_anything_is_computed(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")

    def never() -> Backend:
        raise AssertionError

    with pytest.raises(OutputError):
        forward_job.forward_one(forward_command(model, out=tmp_path), never, Progress(False))
    assert tree(tmp_path) == {"mine": b"kept"}


# -- tokens ----------------------------------------------------------------------------------------------------


def test_every_source_of_tokens_gives_the_same_run(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("72\n101\n121\n")
    (tmp_path / "json").write_text("[72, 101, 121]\n")
    (tmp_path / "commas").write_text("72,101, 121")
    sources: list[list[object]] = [["--tokens", "72,101,121"], ["--prompt", "Hey"]]
    sources += [["--tokens-file", tmp_path / name] for name in ("text", "json", "commas")]
    command = ("forward", model, "--backend", "reference", "--json")
    documents = [svf(*command, *source).json for source in sources]
    for document in documents:
        assert document.pop("command").startswith("svf ")  # the one thing that differs
    assert all(document == documents[0] for document in documents)
    assert documents[0]["tokens"] == [72, 101, 121]
    assert svf(*command, "--tokens", "72,101,122").json["lm_head_sha256"] != documents[0]["lm_head_sha256"]


def test_without_tokens_there_is_a_default(model: Path) -> None:
    assert svf("forward", model, "--backend", "reference", "--json").json["tokens"] == [3, 141, 59, 26, 53, 58, 97, 93]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--tokens", "1,512"], 2, ["token 512 at position 1", "512 ids"]),
        (["--tokens", "1,-2"], 2, ["1,2,3"]),
        (["--tokens", "one"], 2, ["one"]),
        (["--tokens", ""], 2, ["--tokens"]),
        (["--prompt", ""], 2, ["--prompt"]),
        (["--tokens", "1", "--prompt", "x"], 2, ["one of --tokens, --tokens-file, --prompt"]),
        (["--tokens-file", "no/such/file"], 4, ["no/such/file"]),
    ],
)
def test_bad_tokens_are_one_line(model: Path, options: list[str], code: int, words: list[str]) -> None:
    refused(svf("forward", model, "--backend", "reference", *options), code, *words)


def test_a_prompt_needs_a_tokenizer(qwen2: Path) -> None:
    refused(svf("forward", qwen2, "--backend", "reference", "--prompt", "x"), 4, "tokenizer.json", "--tokens")


# -- repeated runs ---------------------------------------------------------------------------------------------


def test_repeated_runs_are_byte_identical(backend: Backend, qwen2: Path) -> None:
    document = trace(qwen2, backend, repeat=3)
    found = document["deterministic"]
    elements = 2 * sum(a.size for a in record(qwen2, backend).values())
    assert found == {"runs": 3, "identical": True, "different_elements": 0, "elements": elements, "first": None}
    assert sound(document)


def record(folder: Path, backend: Backend) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as scratch:
        trace(folder, backend, out=Path(scratch) / "out")
        return dumped(Path(scratch) / "out")


def plus_one(place: tuple[int, ...], call: int) -> Callable[[Any, int], Any]:
    def change(result: Any, number: int) -> Any:
        if number == call:
            result = result.clone()
            result[place] += 1
        return result

    return change


@pytest.mark.parametrize("out", [False, True])
def test_noise_in_a_side_branch_is_counted_to_the_element(
    qwen2: Path, torch_backend: Backend, tmp_path: Path, out: bool
) -> None:
    """Nothing reads qkv_matmul in a family with a bias: call 3 is layer 1 of the second run."""
    backend = Altered(torch_backend, "qkv_matmul", plus_one((2, 5), 3))
    document = trace(qwen2, backend, repeat=2, out=tmp_path / "out" if out else None)
    found = document["deterministic"]
    assert (found["identical"], found["different_elements"], found["first"]) == (False, 1, "layers.1.qkv_matmul")
    assert not sound(document)


def test_noise_that_spreads_is_named_where_it_began(qwen2: Path, torch_backend: Backend) -> None:
    clean, noisy = record(qwen2, torch_backend), Altered(torch_backend, "ffn_up", plus_one((2, 5), 1))
    spread = record(qwen2, noisy)
    expected = sum(int((clean[k].view(np.uint32) != spread[k].view(np.uint32)).sum()) for k in clean)
    document = trace(qwen2, Altered(torch_backend, "ffn_up", plus_one((2, 5), 3)), repeat=2)
    found = document["deterministic"]
    assert (found["different_elements"], found["first"]) == (expected, "layers.1.ffn_up")
    assert expected > 300  # a row of logits at least


def test_noise_in_the_logits_alone_is_seen_though_they_were_not_asked_for_by_layer(
    qwen2: Path, torch_backend: Backend
) -> None:
    found = trace(qwen2, Altered(torch_backend, "lm_head", plus_one((0, 0), 1)), repeat=2)["deterministic"]
    assert (found["different_elements"], found["first"]) == (1, "lm_head")


def test_an_unsound_run_is_exit_1_and_says_so(
    qwen2: Path, torch_backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Altered(torch_backend, "qkv_matmul", plus_one((2, 5), 3))
    monkeypatch.setattr("stages.commands.compare.load_backend", lambda *_args, **_options: backend)
    done = svf("forward", qwen2, "--backend", "torch", "--tokens", "1,2,3", "--repeat", 2, "--no-production")
    assert done.code == 1
    assert "2 runs: 1 of " in done.out
    assert "first at layers.1.qkv_matmul" in done.out


def test_aprt_keeps_too_little_to_repeat(model: Path, tmp_path: Path) -> None:
    done = svf("forward", model, "--backend", "reference", "--format", "aprt", "--repeat", 2, "--out", tmp_path / "out")
    refused(done, 2, "--repeat", "aprt")
    assert not list(tmp_path.glob("out/*"))


# -- production ------------------------------------------------------------------------------------------------


# Every length compiles anew on JAX, so there on one model.
@pytest.mark.parametrize(("name", "which"), [("torch", "model"), ("torch", "qwen2"), ("jax", "qwen2")])
def test_the_traced_path_is_what_production_runs(name: str, which: str, request: pytest.FixtureRequest) -> None:
    folder, backend = (request.getfixturevalue(fixture) for fixture in (which, f"{name}_backend"))
    document = trace(folder, backend, production=True, generate=2)
    production = document["production"]
    assert (production["ran"], production["agrees"], production["tie"]) == (True, True, False)
    assert production["verdict"] in (("exact",) if name == "torch" else ("exact", "rounding"))
    assert document["generated"] == production["generated"]
    assert (len(document["generated"]), production["generated_agrees"]) == (2, True)
    assert document["generated"][0] == document["next_token"] == production["next_token"]
    assert sound(document)


def test_generated_tokens_are_each_the_next_of_all_before_it(qwen2: Path, reference: Backend) -> None:
    generated = trace(qwen2, reference, generate=3)["generated"]
    tokens = list(TOKENS)
    for token in generated:
        document = trace(qwen2, reference, tokens=",".join(map(str, tokens)))
        assert document["next_token"] == token
        tokens.append(token)


def test_generated_tokens_that_differ_from_productions_are_exit_1(
    qwen2: Path, torch_backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = svf_torch.production.TorchProduction.generate

    def wrong(self: Any, tokens: Any, n: int) -> list[int]:
        found = real(self, tokens, n)
        return [*found[:-1], (found[-1] + 1) % 300]

    monkeypatch.setattr(svf_torch.production.TorchProduction, "generate", wrong)
    done = svf("forward", qwen2, "--backend", "torch", "--tokens", "3,141,59", "--production", "--generate", 2)
    assert done.code == 1
    assert "2 generated tokens DIFFER" in done.out


def scale(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 1.05


def torch_eps(model: Any) -> None:
    model.model.norm.variance_epsilon = 1e-3


def jax_eps(model: Any) -> None:
    model.model.norm.eps = 1e-3


EDITS = {
    "torch": {"attention scale": scale, "norm eps": torch_eps},
    "jax": {"attention scale": scale, "norm eps": jax_eps},
}
MODULES = {"torch": svf_torch.production, "jax": svf_jax.production}


@pytest.mark.parametrize(("name", "which", "edit"), [
    *((name, "qwen2", edit) for name in EDITS for edit in EDITS[name]),
    ("torch", "model", "attention scale"), ("torch", "model", "norm eps"),
    pytest.param("jax", "model", "attention scale", marks=pytest.mark.thorough),
])  # fmt: skip
def test_a_production_model_that_was_edited_is_a_bug(
    name: str, edit: str, which: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    real, change = MODULES[name].load_model, EDITS[name][edit]

    def edited(*args: Any, **options: Any) -> Any:
        change(loaded := real(*args, **options))
        return loaded

    monkeypatch.setattr(MODULES[name], "load_model", edited)
    done = svf(
        "forward",
        request.getfixturevalue(which),
        "--backend",
        name,
        "--tokens",
        "3,141,59,26,53",
        "--production",
        "--json",
    )
    assert done.code == 1, done.err
    production = done.json["production"]
    assert production["verdict"] == "bug"
    # In bfloat16 the change is no larger than rounding, and float32 decides.
    ratio = production["float32"]["ratio"] if production["ratio"] <= 1 else production["ratio"]
    assert ratio > 1
    assert (which == "qwen2") <= ("float32" not in production)


def test_whether_production_ran_is_always_said(
    qwen2: Path, reference: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("forward", qwen2, "--backend", "torch", "--tokens", "1,2")
    done = svf(*command, "--no-production")
    assert done.code == 0
    assert "production model not run (--no-production)" in done.out
    assert trace(qwen2, reference, production=True)["production"]["ran"] is False
    assert "no production model" in svf("forward", qwen2, "--backend", "reference", "--production").out
    assert svf(*command, "--json").json["production"]["ran"] is True
    assert "production model exact" in svf(*command).out
    monkeypatch.setattr(forward_job, "available_bytes", lambda: 1000)
    done = svf(*command)
    assert done.code == 0
    assert "production model not run (the weights need about" in done.out
    assert "--production forces" in done.out
    assert svf(*command, "--json").json["production"]["ran"] is False
    assert svf(*command, "--production", "--json").json["production"]["verdict"] == "exact"


def test_the_memory_that_production_takes_is_at_least_its_weights(model: Path, qwen2: Path) -> None:
    for folder, dtype, size in ((model, "model", 2), (model, "float32", 4), (qwen2, "model", 4)):
        with open_checkpoint(folder) as checkpoint:
            stored = sum(int(np.prod(info.shape)) for info in checkpoint.tensors.values())
            assert stored * size < forward_job.production_bytes(checkpoint.config, dtype) < 2 * stored * size


# -- dtype -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("which", "dtype"), [("model", "float32"), ("qwen2", "bfloat16")])
def test_a_run_in_another_dtype_than_the_checkpoints(
    which: str, dtype: str, torch_backend: Backend, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(which)
    document = trace(folder, torch_backend, dtype=dtype, out=tmp_path / "out", production=True)
    assert document["dtype"] == json.loads((tmp_path / "out" / MANIFEST_FILE).read_text())["dtype"] == dtype
    always = {"inv_freq", "rope_angle"}
    assert {a.dtype.name for key, a in dumped(tmp_path / "out").items() if key not in always} == {dtype}
    assert document["production"]["verdict"] == "exact"
    assert document["lm_head_sha256"] != trace(folder, torch_backend)["lm_head_sha256"]
    assert diff_forward(tmp_path / "out", tmp_path / "out")["outcome"] == "agree"


# -- adapted weights -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(made: Path, model: Path, torch_backend: Backend, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dumps of the adapted tiny model, `declared` and `vh`, and of the model as it is, `plain`."""
    folder = tmp_path_factory.mktemp("adapted")
    for layout in ("declared", "vh"):
        trace(model, torch_backend, adapted=made / "components", layout=layout, out=folder / layout)
    trace(model, torch_backend, out=folder / "plain")
    return folder


def test_adapted_weights_are_what_the_replay_ends_with(adapted: Path, made: Path) -> None:
    weights = tensors_of(adapted / "declared" / ADAPTED_FILE)
    recorded = tensors_of(made / "components" / ALL_STAGES_FILE)
    manifest = json.loads((adapted / "declared" / MANIFEST_FILE).read_text())
    assert len(weights) == 9
    assert manifest["adapted"] == dict.fromkeys(weights, "torch_v")
    for name, array in weights.items():
        final = recorded[tensor_stage_key(name, "final_bf16")]
        assert array.dtype == ml_dtypes.bfloat16
        assert array.tobytes() == final.tobytes(), name
        assert manifest["adapted_sha256"][name] == sha256(array)


def test_a_tied_embedding_and_head_become_two_tensors(adapted: Path, model: Path) -> None:
    weights, stages = tensors_of(adapted / "declared" / ADAPTED_FILE), dumped(adapted / "declared")
    embedding, head = weights[EMBED], weights[HEAD]
    assert not np.array_equal(embedding, head)
    assert not np.array_equal(embedding, tensors_of(model / "model.safetensors")[EMBED])
    assert np.array_equal(stages["embedding"], embedding[TOKENS])
    x = stages["final_norm"].astype(np.float64)
    right, wrong = (x @ w.astype(np.float64).T for w in (head, embedding))
    logits = stages["lm_head"].astype(np.float64)
    # One rounding to bfloat16 is 2^-9 of a value; the embedding in the head's place is far from that.
    assert np.abs(logits - right).max() <= 2.0**-8 * np.abs(right).max()
    assert np.abs(logits - wrong).max() > 0.1


def test_a_float32_checkpoint_stores_one_rounding_of_final_f32(
    made: Path, model: Path, torch_backend: Backend, tmp_path: Path
) -> None:
    """The same components beside the same values in another dtype: no bfloat16 in between."""
    wide = {name: array.astype(np.float32) for name, array in tensors_of(model / "model.safetensors").items()}
    (tmp_path / "model").mkdir()
    write_tensors(tmp_path / "model" / "model.safetensors", wide)
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    trace(tmp_path / "model", torch_backend, adapted=made / "components", out=tmp_path / "out")
    weights, recorded = tensors_of(tmp_path / "out" / ADAPTED_FILE), tensors_of(made / "components" / ALL_STAGES_FILE)
    for name, array in weights.items():
        assert array.dtype == np.float32
        assert np.array_equal(array, recorded[tensor_stage_key(name, "final_f32")]), name


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_production_runs_on_adapted_weights_too(
    name: str, made: Path, model: Path, request: pytest.FixtureRequest
) -> None:
    backend = request.getfixturevalue(f"{name}_backend")
    document = trace(model, backend, adapted=made / "components", production=True)
    assert document["production"]["verdict"] in ("exact", "rounding")
    assert document["adapted"].keys() >= {EMBED, HEAD}


def test_a_wrong_layout_is_watched_travelling(adapted: Path) -> None:
    done = svf("diff", adapted / "declared", adapted / "vh", "--json")
    assert (done.code, done.json["outcome"]) == (1, "diverged")
    failed = [row for row in done.json["rows"] if row["verdict"] not in ("exact", "rounding")]
    culprit = done.json["culprit"]
    assert (culprit["side"], culprit["stage"], culprit["tensor"]) == ("b", "adapted_weight", EMBED)
    assert culprit["hint"] == "b used layout vh; the bundle declares torch_v"
    # Every weight that was contracted the wrong way is named; what reads it only inherits.
    layouts = json.loads((adapted / "vh" / MANIFEST_FILE).read_text())["adapted"]
    assert {row["key"] for row in failed} == {f"adapted.{name}" for name, layout in layouts.items() if layout == "vh"}
    drift = {row["stage"]: row["rel_l2"] for row in done.json["rows"] if row["layer"] == 1}
    assert min(drift[s] for s in ("attn_norm", "ffn_gate", "post_ffn_residual")) > 0.01
    table = svf("diff", adapted / "declared", adapted / "vh")
    assert "b used layout vh; the bundle declares torch_v" in table.out


def test_a_v_that_does_not_fit_the_layout_is_said(made: Path, model: Path) -> None:
    done = svf("forward", model, "--backend", "torch", "--tokens", "1,2", "--adapted", made / "components",
               "--layout", "vh", "--no-production", "--json", progress=True)  # fmt: skip
    assert done.code == 0
    assert DOWN in done.err
    assert "does not fit layout vh" in done.err
    assert done.json["adapted"][DOWN] == "torch_v"
    assert done.json["adapted"][EMBED] == "vh"


def test_adapted_beside_plain_names_the_weights(adapted: Path) -> None:
    document = diff_forward(adapted / "plain", adapted / "declared")
    assert (document["outcome"], document["culprit"]["stage"]) == ("diverged", "adapted_weight")
    assert document["culprit"]["hint"] == "a ran on the model's own weight, without the components"
    assert diff_forward(adapted / "declared", adapted / "declared")["outcome"] == "agree"


def test_components_of_another_model_are_refused(made: Path, qwen2: Path) -> None:
    done = svf("forward", qwen2, "--backend", "torch", "--tokens", "1", "--adapted", made / "components")
    refused(done, 3, "components of another model?")


# -- jit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jit", ["layer", "none"])
def test_other_extents_of_jit_stay_within_rounding(
    jit: str, qwen2: Path, torch_backend: Backend, tmp_path: Path
) -> None:
    backend = JaxBackend(jit=jit != "none")
    document = trace(qwen2, backend, jit=jit, out=tmp_path / "jax", production=True)
    assert document["production"]["verdict"] in ("exact", "rounding")
    assert json.loads((tmp_path / "jax" / MANIFEST_FILE).read_text())["facts"]["jit"] == jit == document["jit"]
    trace(qwen2, torch_backend, out=tmp_path / "torch")
    assert diff_forward(tmp_path / "torch", tmp_path / "jax")["outcome"] == "agree"
    assert dumped(tmp_path / "jax").keys() == dumped(tmp_path / "torch").keys()


def test_jit_reaches_the_backend(qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(Exception):
        pass

    def load(name: str, device: str, _precision: str, **options: Any) -> Backend:
        raise Seen(f"{name} {options}")

    monkeypatch.setattr("stages.commands.compare.load_backend", load)
    for jit, on in (("none", False), ("layer", True), ("stage", True)):
        done = svf("forward", qwen2, "--backend", "jax", "--tokens", "1", "--jit", jit)
        assert f"Seen: jax {{'jit': {on}}}" in done.error
    assert JaxBackend(jit=False).facts()["jit"] == "False"


# -- what the loader honours changes the result, and what it does not is refused -------------------------------


@dataclasses.dataclass(frozen=True)
class Twin:
    """Two models with the same tensors, or nearly so, that differ in one field."""

    one: Model
    other: Model
    change: Callable[[dict[str, np.ndarray]], object] = lambda tensors: None


def stored_head(tensors: dict[str, np.ndarray]) -> None:
    tensors[HEAD] = tensors[EMBED][::-1].copy()


def biases(tensors: dict[str, np.ndarray]) -> None:
    shapes = {"q_proj": 128, "k_proj": 64, "v_proj": 64, "o_proj": 64}
    for layer in (0, 1):
        for name, size in shapes.items():
            tensors[f"model.layers.{layer}.self_attn.{name}.bias"] = np.full(size, 0.1, np.float32)


def with_rope(**changes: Any) -> Model:
    return Model(rope={"rope_type": "default", "rope_theta": 1e6, **changes})


TWINS = {
    "rope_theta": Twin(Model(), with_rope(rope_theta=1e4)),
    "rms_norm_eps": Twin(Model(), Model(eps=1e-3)),
    "heads and head_dim": Twin(Model("qwen2"), Model("qwen2", heads=8, kv_heads=4, head_dim=16)),
    "tie_word_embeddings": Twin(Model(), Model(tied=False), stored_head),
    "attention_bias": Twin(Model(), Model(attention_bias=True), biases),
    "rope_type linear": Twin(Model(), Model(rope={**LINEAR, "rope_theta": 1e6})),
    "linear factor": Twin(Model(rope=LINEAR), Model(rope={**LINEAR, "factor": 2.0})),
    "rope_type yarn": Twin(Model(), Model(rope=YARN)),
    "yarn factor": Twin(Model(rope=YARN), Model(rope={**YARN, "factor": 8.0})),
    "yarn beta_fast": Twin(Model(rope=YARN), Model(rope={**YARN, "beta_fast": 4.0})),
    "yarn attention_factor": Twin(Model(rope=YARN), Model(rope={**YARN, "attention_factor": 1.0})),
    "yarn original_max_position_embeddings": Twin(
        Model(rope=YARN), Model(rope={**YARN, "original_max_position_embeddings": 16})
    ),
}


@pytest.mark.parametrize("field", TWINS)
def test_a_field_that_is_honoured_changes_the_logits_as_production_has_them(
    field: str, torch_backend: Backend, reference: Backend, tmp_path: Path
) -> None:
    """`transformers` reads the file by itself: a field that both of us read wrongly alike would be its bug too."""
    twin, found = TWINS[field], []
    tensors = random_weights(twin.one.config("float32"))
    for place, config in enumerate((twin.one, twin.other)):
        folder = tmp_path / str(place)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config.raw("float32")))
        if place:
            twin.change(tensors)
        write_tensors(folder / "model.safetensors", tensors)
        document = trace(folder, torch_backend, production=True, out=folder / "torch")
        assert document["production"]["verdict"] == "exact"
        trace(folder, reference, out=folder / "reference")
        assert diff_forward(folder / "reference", folder / "torch")["outcome"] == "agree"
        found.append(dumped(folder / "torch")["lm_head"].astype(np.float64))
    # Beyond any rounding: a field that is read and dropped would give the same bits.
    assert np.abs(found[0] - found[1]).max() > 1e-4 * np.abs(found[0]).max()


def test_that_law_can_fail(torch_backend: Backend, tmp_path: Path) -> None:
    """A field that means nothing in inference leaves every bit as it is."""
    write_model(tmp_path / "a", Model(), "float32")
    write_model(tmp_path / "b", Model(), "float32")
    with_json(tmp_path / "b" / "config.json", lambda c: c.update(attention_dropout=0.5, use_cache=False))
    one, other = (trace(tmp_path / name, torch_backend) for name in ("a", "b"))
    assert one["lm_head_sha256"] == other["lm_head_sha256"]


# fmt: off
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "code": ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "family": ({"model_type": "gemma3"}, "model_type"),
    "no theta": ({"rope_parameters": {"rope_type": "default"}}, "rope_theta"),
    "rope_type": ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e6}}, "rope_type"),
    "old rope type": ({"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": {"type": "su"}}, "type"),
    "kv heads that do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads"),
    "kv heads not stated": ({"num_key_value_heads": None}, "num_key_value_heads"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
}
# fmt: on


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_exit_3_naming_the_field(case: str, tmp_path: Path) -> None:
    changes, field = REFUSED[case]
    folder = write_model(tmp_path / "model", Model(), "float32")
    with_json(folder / "config.json", lambda c: c.update(changes))
    done = svf("forward", folder, "--backend", "reference", "--tokens", "1,2,3,4,5", "--out", tmp_path / "out")
    refused(done, 3, field)
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("tokens", ["1,2,3,4,5", "1,2,3,4,5,6,7,8,9"])
def test_a_window_is_production_s_whether_it_cuts_or_not(tokens: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", Model(), "float32")
    with_json(
        folder / "config.json", lambda c: c.update(use_sliding_window=True, sliding_window=5, max_window_layers=0)
    )
    done = svf("forward", folder, "--backend", "torch", "--tokens", tokens, "--production", "--json")
    assert (done.code, done.json["production"]["verdict"]) == (0, "exact")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t.pop("model.layers.1.input_layernorm.weight"), "model.layers.1.input_layernorm.weight"),
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.zeros((160, 64), np.float32)}), "model.layers.2"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(128, np.float32)}), "q_proj.bias"),
    ],
)
def test_a_missing_or_unexpected_tensor_is_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, np.ndarray]], object], word: str
) -> None:
    folder = write_model(tmp_path / "model", Model(), "float32")
    with_tensors(folder / "model.safetensors", change)
    refused(svf("forward", folder, "--backend", "torch", "--tokens", "1"), 3, word)


def shard(folder: Path) -> Path:
    """The checkpoint in three files, dealt out one tensor at a time."""
    tensors = tensors_of(folder / "model.safetensors")
    files = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        write_tensors(folder / file, {name: tensors[name] for name in tensors if files[name] == file})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def test_a_sharded_checkpoint_gives_the_same_bytes(torch_backend: Backend, tmp_path: Path) -> None:
    write_model(tmp_path / "one", Model(tied=False), "bfloat16")
    shard(write_model(tmp_path / "three", Model(tied=False), "bfloat16"))
    for name in ("one", "three"):
        document = trace(tmp_path / name, torch_backend, out=tmp_path / f"dump-{name}", production=True)
        assert document["production"]["verdict"] == "exact"
    one, three = (tree(tmp_path / f"dump-{name}") for name in ("one", "three"))
    one.pop(MANIFEST_FILE), three.pop(MANIFEST_FILE)
    assert one == three
    assert len(one) == 3


@pytest.mark.parametrize("place", ["../{}", "/tmp/{}", "a/../../{}"])
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, place: str) -> None:
    folder = shard(write_model(tmp_path / "model", Model(), "float32"))
    file = "model-00002-of-00003.safetensors"
    (tmp_path / file).write_bytes((folder / file).read_bytes())
    with_json(
        folder / "model.safetensors.index.json",
        lambda index: index["weight_map"].update(
            {name: place.format(file) for name, at in index["weight_map"].items() if at == file}
        ),
    )
    refused(svf("forward", folder, "--backend", "reference", "--tokens", "1"), 3, file, "not a file inside the folder")


def test_a_link_that_leads_outside_is_refused(tmp_path: Path) -> None:
    folder = shard(write_model(tmp_path / "model", Model(), "float32"))
    file = folder / "model-00002-of-00003.safetensors"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    refused(svf("forward", folder, "--backend", "reference", "--tokens", "1"), 3, file.name, "outside the folder")


# -- APRT ------------------------------------------------------------------------------------------------------


def test_an_aprt_tree_holds_the_dumps_values(model: Path, torch_backend: Backend, tmp_path: Path) -> None:
    trace(model, torch_backend, out=tmp_path / "dump")
    trace(model, torch_backend, out=tmp_path / "tree", format="aprt")
    tensors = dumped(tmp_path / "dump")
    files = tree(tmp_path / "tree")
    paths = {
        key: f"layer-{key.split('.')[1]}/{key.split('.')[2]}.bin" if "." in key else f"{key}.bin" for key in tensors
    }
    paths["embedding"] = "layer-0/embedding.bin"
    assert files.keys() == set(paths.values())
    for key, path in paths.items():
        values = tensors[key][-1] if key == "lm_head" else tensors[key]
        assert files[path][12:] == values.astype("<f4").tobytes()
        layer = 0 if key == "embedding" else int(key.split(".")[1]) if "." in key else 0xFFFFFFFF
        assert files[path][:12] == b"APRT" + np.array([layer, values.size], "<u4").tobytes()


def test_aprt_cannot_hold_two_sides(model: Path, tmp_path: Path) -> None:
    done = svf("forward", model, "--backend", "both", "--format", "aprt", "--out", tmp_path / "out")
    refused(done, 2, "--backend both", "APRT")


def test_an_unknown_positions_or_format_never_reaches_a_backend(model: Path, reference: Backend) -> None:
    with pytest.raises(UsageError):
        trace(model, reference, positions="first")
