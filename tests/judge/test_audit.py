"""`svf audit`: one dump against the oracle from its own inputs; ours, bundles', and those of programs unknown to us."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from forward_models import MODELS, tokens_of, write_model
from helpers import GATE, K_PROJ, ROOT, Result, fresh, svf, tensors_of, with_json, with_tensors

import svf as library
from stages.files import dump
from stages.files.bundle import ALL_STAGES_FILE, COMPONENTS_FILE, MANIFEST_FILE, tensor_stage_key
from stages.files.tensorfile import sha256, write_tensors
from stages.spec.replay import REPLAY

TOKENS = ",".join(map(str, tokens_of(9)))
PROGRAM = ROOT / "tests" / "support" / "foreign_program.py"
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random checkpoints by name and dtype, of two layers."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("qwen3", "qwen2"):
        for dtype in ("float32", "bfloat16"):
            write_model(folder / f"{name}-{dtype}", MODELS[name], dtype)
    return folder


@pytest.fixture(scope="session")
def ours(models: Path) -> Path:
    """The tiny Qwen3's forward as our dump and as an APRT tree, in both dtypes, and in float32 on jax."""
    folder = models / "ours"
    for backend, dtype, format in (
        ("reference", "float32", "safetensors"),
        ("reference", "bfloat16", "safetensors"),
        ("torch", "float32", "aprt"),
        ("torch", "bfloat16", "aprt"),
        ("jax", "float32", "safetensors"),
    ):
        command = ["forward", models / f"qwen3-{dtype}", "--tokens", TOKENS, "--no-production", "--backend", backend]
        done = svf(*command, "--format", format, "--out", folder / f"{backend}-{dtype}")
        assert done.code == 0, done.err
    return folder


def culprit(done: Result) -> tuple[int, str | None, int | None, str]:
    found = done.json["culprit"]
    assert done.code == 1
    assert done.json["outcome"] == "faulty"
    return done.code, found["verdict"], found["layer"], found["stage"]


def rows(done: Result) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in done.json["rows"]}


# Our own forward dumps.


@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", "float32"), ("reference", "bfloat16"), ("jax", "float32")]
)
def test_our_dumps_are_sound(ours: Path, backend: str, dtype: str) -> None:
    done = svf("audit", ours / f"{backend}-{dtype}", "--json")
    document = done.json
    assert (done.code, document["outcome"], document["schema"]) == (0, "sound", "svf.audit/1")
    assert (document["culprit"], document["coverage"]["unjudged"]) == (None, 0)
    # 7 stages of the whole model, 19 of each layer.
    assert (document["coverage"]["judged"], document["coverage"]["expected"]) == (45, 45)
    assert {row["verdict"] for row in document["rows"]} <= {"exact", "rounding"}
    if backend == "reference":
        assert {row["verdict"] for row in document["rows"]} == {"exact"}
    assert document["facts"]["backend"] == backend


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_aprt_tree_is_sound_with_its_model_and_tokens(models: Path, ours: Path, dtype: str) -> None:
    done = svf("audit", ours / f"torch-{dtype}", "--model", models / f"qwen3-{dtype}", "--tokens", TOKENS, "--json")
    assert (done.code, done.json["outcome"], done.json["coverage"]["judged"]) == (0, "sound", 45)
    assert done.json["facts"]["dtype"] == dtype
    other = svf("audit", ours / f"torch-{dtype}", "--model", models / f"qwen3-{dtype}", "--tokens", "1,2,3")
    assert other.code == 3
    assert "the dump has 9 tokens, but --tokens has 3" in other.error


@pytest.fixture
def changed(ours: Path, tmp_path: Path) -> Path:
    """A copy of the float32 reference dump, to be damaged."""
    return Path(shutil.copytree(ours / "reference-float32", tmp_path / "changed"))


def rewrite(folder: Path, file: str, change: Callable[[Tensors], object]) -> None:
    """Change tensors of a dump and its manifest with them, as a program with a fault would have written both."""
    with_tensors(folder / file, change)
    tensors = tensors_of(folder / file)

    def described(manifest: dict[str, Any]) -> None:
        others = {key: entry for key, entry in manifest["tensors"].items() if entry["file"] != file}
        manifest["tensors"] = others | {
            key: {"file": file, "dtype": a.dtype.name, "shape": list(a.shape), "sha256": sha256(a)}
            for key, a in tensors.items()
        }

    with_json(folder / dump.MANIFEST_FILE, described)


def test_inherited_error_is_not_blamed_on_attention(changed: Path, ours: Path) -> None:
    """The history: a cosine drop at attention was inherited, and grew; each stage was right from what it was given."""
    jax, torch = ours / "jax-float32", ours / "reference-float32"
    growing = svf("diff", torch, jax, "--json").json
    differences = [row["rel_l2"] for row in growing["rows"] if row["stage"] in ("attention", "post_ffn_residual")]
    assert differences[-1] > 0  # propagated, there is a difference
    assert growing["culprit"] is None
    assert {row["verdict"] for row in rows(svf("audit", jax, "--json")).values()} <= {"exact", "rounding"}
    # A fault in layer 0 that everything after it inherits: attention of layer 1 is right from its inputs.

    def worse(t: Tensors) -> None:
        t["layers.0.ffn_out"] = t["layers.0.ffn_out"] * np.float32(1.01)

    rewrite(changed, "layer-0.safetensors", worse)
    done = svf("audit", changed, "--json")
    assert culprit(done) == (1, "bug", 0, "ffn_out")
    assert done.json["culprit"]["hint"] == "every value is 1.01 times what it should be"
    assert rows(done)["layers.1.attention"]["verdict"] == "exact"


def test_a_missing_stage_and_what_needed_it(changed: Path) -> None:
    rewrite(changed, "model.safetensors", lambda t: t.pop("rope_cos"))
    done = svf("audit", changed, "--json")
    assert culprit(done) == (1, "missing", None, "rope_cos")  # the manifest promised it
    turned = rows(done)["layers.0.q_post_rope"]
    assert turned["verdict"] == "exact"  # the cosine follows from the angle
    assert "RoPE tables computed from the config" in done.json["notes"]
    assert (turned["through"], turned["note"]) == (["rope_cos"], None)


def test_without_weights_nothing_is_sound(changed: Path, models: Path) -> None:
    with_json(changed / dump.MANIFEST_FILE, lambda m: m["model"].update(source="/nowhere"))
    done = svf("audit", changed, "--json")
    assert (done.code, done.json["outcome"]) == (5, "incomplete")
    assert "give --model" in rows(done)["layers.0.attn_norm"]["note"]
    assert rows(done)["layers.0.ffn_silu"]["verdict"] == "exact"  # which has no weights
    assert svf("audit", changed, "--model", models / "qwen3-float32").code == 0
    assert svf("audit", changed, "--model", models / "qwen2-float32").code == 3


def test_a_recording_of_the_last_position_is_judged_as_far_as_it_goes(models: Path, tmp_path: Path) -> None:
    command = ["forward", models / "qwen3-float32", "--tokens", TOKENS, "--no-production", "--backend", "reference"]
    assert svf(*command, "--positions", "last", "--out", tmp_path / "last").code == 0
    done = svf("audit", tmp_path / "last", "--json")
    assert (done.code, done.json["outcome"]) == (5, "incomplete")
    unjudged = {row["stage"] for row in done.json["rows"] if row["verdict"] == "unjudged"}
    assert unjudged == {"attn_scores", "attn_softmax", "attention"}


# Programs that know nothing of us.


# What is wrong with the program -> verdict, layer, stage and words of the hint.
FAULTS: dict[str, tuple[str, int | None, str, str]] = {
    "no 1/sqrt(d)": ("bug", 1, "attn_scores", "the scale 1/sqrt(head_dim) is missing"),
    "eps": ("bug", 1, "ffn_norm", "as if eps were 0.001, not 1e-06"),
    "wrong kv head map": ("bug", 1, "attn_scores", "key heads are dealt out in turn"),
    "no mask": ("bug", 0, "attn_softmax", "the causal mask is missing"),
    "sin has the other sign": ("bug", 1, "q_post_rope", "turned the other way"),
    "gate and up swapped": ("bug", 1, "ffn_gate", "mlp.up_proj.weight in the place of mlp.gate_proj.weight"),
    "one weight": ("bug", 0, "ffn_out", "mlp.down_proj.weight[3, 5]"),
    "theta": ("bug", None, "inv_freq", "as if rope_theta were"),
    "bfloat16 inside": ("precision", 1, "ffn_gate", "its operands and its result have 7 mantissa bits"),
}

# Those that are seen in bfloat16 too, by the same words.
BFLOAT16_FAULTS = ("no 1/sqrt(d)", "eps", "wrong kv head map", "no mask", "sin has the other sign")

# Model and dtype -> file or folder, and what is wrong with it.
RUNS: dict[tuple[str, str], dict[str, str]] = {
    ("qwen3", "float32"): {"folder": "", "cos": "no cos", "unknown.safetensors": "unknown key", "decode": "decode"}
    | {"sdpa.safetensors": "sdpa"}
    | {"heads.safetensors": "head-first"}
    | {f"{number}.safetensors": fault for number, fault in enumerate(FAULTS)},
    ("qwen3", "bfloat16"): {
        "one.safetensors": "",
        "wide.safetensors": "as float32",
        "batch": "a batch axis",
        "decode": "decode",
        "heads.safetensors": "head-first",
        "sdpa.safetensors": "sdpa",
    }
    | {f"{number}.safetensors": fault for number, fault in enumerate(BFLOAT16_FAULTS)},
    ("qwen2", "float32"): {"one.safetensors": ""},
}


@pytest.fixture(scope="session")
def programs(models: Path) -> Path:
    """Folders `<model>-<dtype>` of dumps that the program wrote, in a process that cannot import this project."""
    made = models / "programs"
    words: list[str] = []
    for (name, dtype), runs in RUNS.items():
        (made / f"{name}-{dtype}").mkdir(parents=True)
        for out, fault in runs.items():
            words += [str(models / f"{name}-{dtype}"), dtype, str(made / f"{name}-{dtype}" / out), fault]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-P", str(PROGRAM), TOKENS, *words]
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return made


def audited(models: Path, programs: Path, fault: str = "", name: str = "qwen3", dtype: str = "float32") -> Result:
    """The audit of that program's dump with that fault."""
    out = next(out for out, what in RUNS[name, dtype].items() if what == fault)
    given = ("--model", models / f"{name}-{dtype}", "--tokens", TOKENS)
    return svf("audit", programs / f"{name}-{dtype}" / out, *given, "--json")


def test_that_program_imports_nothing_of_this_project() -> None:
    text = PROGRAM.read_text()
    assert not any(f"{word} {name}" in text for word in ("import", "from") for name in ("stages", "svf", "cli"))
    assert str(ROOT) not in text


@pytest.mark.parametrize(("name", "dtype"), RUNS)
def test_its_dump_is_sound(models: Path, programs: Path, name: str, dtype: str) -> None:
    done = audited(models, programs, name=name, dtype=dtype)
    assert (done.code, done.json["outcome"]) == (0, "sound"), done.json["verdict"]
    assert done.json["coverage"]["unjudged"] == 0
    assert done.json["facts"]["dtype"] == dtype
    assert done.json["coverage"]["judged"] == (45 if name == "qwen3" else 39)
    assert svf("audit", done.json["source"]).code == 2  # which model, and which tokens?


@pytest.mark.parametrize("attention", ["", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_is_explained_to_the_last_bit(models: Path, programs: Path, dtype: str, attention: str) -> None:
    """Eager and sdpa, by rows alone; of float32, where a sum's order decides, every bit by PyTorch's own functions."""
    out = next(out for out, what in RUNS["qwen3", dtype].items() if what == attention)
    given: dict[str, Any] = {"model": models / f"qwen3-{dtype}", "tokens": [int(token) for token in TOKENS.split(",")]}
    path = programs / f"qwen3-{dtype}" / out
    document = library.audit(path, **given, natives=dtype == "float32" and not attention).document
    verdicts = {row["verdict"] for row in document["rows"]}
    assert verdicts <= {"exact", "rounding", "unjudged"}, document["verdict"]
    found = document["explained"]
    if dtype == "bfloat16":
        assert found["bits"] >= 0.999 * found["elements"] > 10_000
    elif not attention:
        assert found["bits"] == found["elements"] > 10_000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_decode_through_a_cache_is_sound(models: Path, programs: Path, dtype: str) -> None:
    """It computes no scores of keys to come, which the causal mask throws away anyway."""
    done = audited(models, programs, "decode", dtype=dtype)
    scores = tensors_of(programs / f"qwen3-{dtype}" / "decode" / "layers.1.safetensors")["layers.1.attn_scores"]
    assert np.isnan(scores.astype(np.float32)).any()
    assert (done.code, done.json["outcome"]) == (0, "sound"), done.json["verdict"]
    assert done.json["coverage"]["judged"] == 45


@pytest.mark.parametrize("fault", FAULTS)
def test_its_fault_is_named(models: Path, programs: Path, fault: str) -> None:
    check_fault(audited(models, programs, fault), fault)


@pytest.mark.parametrize("fault", BFLOAT16_FAULTS)
def test_its_fault_is_named_in_bfloat16(models: Path, programs: Path, fault: str) -> None:
    check_fault(audited(models, programs, fault, dtype="bfloat16"), fault)


def check_fault(done: Result, fault: str) -> None:
    verdict, layer, stage, hint = FAULTS[fault]
    assert culprit(done) == (1, verdict, layer, stage)
    assert hint in done.json["culprit"]["hint"]
    assert hint in done.json["verdict"]
    failing = {row["stage"] for row in done.json["rows"] if row["verdict"] in ("bug", "precision", "suspect")}
    # Nothing else is blamed, though all that follows has inherited the fault.
    also = {"sin has the other sign": {"k_post_rope"}, "gate and up swapped": {"ffn_up"}}
    assert failing <= {stage} | also.get(fault, set())


def test_what_a_dump_lacks_is_said_and_counted(models: Path, programs: Path) -> None:
    done = audited(models, programs, "no cos")
    assert (done.code, done.json["outcome"]) == (0, "sound")
    assert done.json["coverage"] == {"judged": 44, "unjudged": 0, "expected": 44, "given": 0}
    assert "RoPE tables computed from the config" in done.json["verdict"]
    assert rows(done)["layers.1.k_post_rope"]["through"] == ["rope_cos"]


def test_a_key_that_is_no_stage_is_refused_by_name(models: Path, programs: Path, tmp_path: Path) -> None:
    out = programs / "qwen3-float32" / "unknown.safetensors"
    given = ["--model", models / "qwen3-float32", "--tokens", TOKENS]
    done = svf("audit", out, *given)
    assert done.code == 3
    assert "'layers.0.attn_bias'" in done.error
    tensors = tensors_of(out)
    for key in ("layers.2.attn_norm", "blocks.0.attn_norm", "layers.x.attn_norm"):
        write_tensors(tmp_path / "bad.safetensors", {key: tensors["embedding"]})
        done = svf("audit", tmp_path / "bad.safetensors", *given)
        assert done.code == 3
        assert f"'{key}'" in done.error
    for key, told in {
        "layers.0.k_proj": "join q, k, v on the last axis as qkv_bias",
        "model.layers.0.input_layernorm": "drop 'model.', call it attn_norm",
        "model.norm": "drop 'model.', call it final_norm",
    }.items():
        write_tensors(tmp_path / "bad.safetensors", {key: tensors["embedding"]})
        done = svf("audit", tmp_path / "bad.safetensors", *given)
        assert done.code == 3
        assert told in done.error
    write_tensors(tmp_path / "bad.safetensors", {"embedding": tensors["embedding"].astype(np.int32)})
    done = svf("audit", tmp_path / "bad.safetensors", *given)
    assert done.code == 3
    assert "int32" in done.error


@pytest.mark.parametrize("form", ["as float32", "a batch axis"])
def test_other_forms_of_the_same_values_are_understood(models: Path, programs: Path, form: str) -> None:
    done = audited(models, programs, form, dtype="bfloat16")
    assert (done.code, done.json["outcome"]) == (0, "sound"), done.json["verdict"]
    assert done.json["facts"]["dtype"] == "bfloat16"
    assert done.json["facts"]["dtype taken"] == (
        "every stored value is one of bfloat16" if form == "as float32" else "as stored"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_first_is_turned_and_said(models: Path, programs: Path, dtype: str) -> None:
    done = audited(models, programs, "head-first", dtype=dtype)
    assert (done.code, done.json["outcome"]) == (0, "sound"), done.json["verdict"]
    told = "recorded heads first, heads tokens head_dim: judged as tokens heads head_dim"
    assert rows(done)["layers.1.q_post_rope"]["note"] == told
    assert rows(done)["layers.0.q_post_rope"]["note"] is None


# Component replays.


def test_a_replay_a_bundle_and_a_stage_file_are_sound(made: Path, tmp_path: Path) -> None:
    command = ["replay", made / "components", "--backend", "reference", "--select", "k_proj", "--select", "gate_proj"]
    assert svf(*command, "--out", tmp_path / "dump").code == 0
    for path, count in (
        (tmp_path / "dump", 20),
        (made / "components", 90),
        (made / "sample", 10),
        (made / "components" / ALL_STAGES_FILE, 90),
    ):
        done = svf("audit", path, "--json")
        assert (done.code, done.json["outcome"]) == (0, "sound"), (path, done.json["verdict"])
        assert done.json["coverage"] == {"judged": count, "unjudged": 0, "expected": count, "given": 0}
        assert [row["stage"] for row in done.json["rows"]][:10] == list(REPLAY)


def at(stage: str, change: Callable[[np.ndarray], np.ndarray], name: str = GATE) -> Callable[[Tensors], object]:
    key = tensor_stage_key(name, stage)
    return lambda t: t.update({key: np.ascontiguousarray(change(t[key]))})


def with_a_product_in_bfloat16(t: Tensors) -> None:
    """And all that follows from it, as the program would have gone on."""
    keys = {stage: tensor_stage_key(GATE, stage) for stage in REPLAY}
    product = t[keys["matmul_pre_norm"]].astype(ml_dtypes.bfloat16).astype(np.float32)
    adapted = product * t[keys["normalization"]]
    after = {"matmul_pre_norm": product, "adapted_source_f32": adapted, "final_f32": adapted}
    t.update({keys[stage]: array for stage, array in after.items()})
    t[keys["final_bf16"]] = adapted.astype(ml_dtypes.bfloat16)


REPLAY_FAULTS: dict[str, tuple[Callable[[Tensors], object], tuple[str, str], str]] = {
    "one ulp of u_scaled": (
        at("u_scaled", lambda a: np.where(np.arange(a.size).reshape(a.shape) == 70, np.nextafter(a, a + 1), a)),
        ("bug", "u_scaled"),
        "one element alone is wrong, at [1, 6]",
    ),
    "a product in bfloat16": (
        with_a_product_in_bfloat16,
        ("precision", "matmul_pre_norm"),
        "its result has 7 mantissa bits",
    ),
    "the wrong contraction": (
        at("zero_source_f32", lambda a: a, K_PROJ),
        ("bug", "zero_source_f32"),
        "V is contracted as nx, vh, the layout says torch_v",
    ),
    "a NaN": (at("final_bf16", lambda a: a * a.dtype.type(np.nan)), ("nonfinite", "final_bf16"), ""),
    "a row short": (at("final_f32", lambda a: a[:-1]), ("shape", "final_f32"), "[191, 64]"),
}


@pytest.mark.parametrize("fault", REPLAY_FAULTS)
def test_a_fault_of_a_replay_is_named(bundle: Path, fault: str) -> None:
    change, (verdict, stage), hint = REPLAY_FAULTS[fault]
    if fault == "the wrong contraction":
        parts = tensors_of(bundle / COMPONENTS_FILE)
        u, s, v = (parts[f"svd.{p}.{K_PROJ}"] for p in "USV")
        change = at("zero_source_f32", lambda _: (u * s) @ v, K_PROJ)
    with_tensors(bundle / ALL_STAGES_FILE, change)
    done = svf("audit", bundle, "--json")
    assert done.code == 1
    found = done.json["culprit"]
    assert (found["verdict"], found["stage"]) == (verdict, stage)
    assert hint in (found["hint"] or "")


def test_another_source_than_the_components_is_found_by_hash_or_by_the_model(bundle: Path, model: Path) -> None:
    with_tensors(bundle / ALL_STAGES_FILE, at("source_f32", lambda a: a * 2))
    done = svf("audit", bundle, "--json")
    assert (done.code, done.json["culprit"]["tensor"], done.json["culprit"]["stage"]) == (1, GATE, "source_f32")
    assert "another sha256 than the bundle's manifest says" in done.json["culprit"]["hint"]
    assert "do not give" in done.json["verdict"]
    assert rows(done)[tensor_stage_key(GATE, "source_f32")]["verdict"] == "unjudged"
    named = svf("audit", bundle, "--model", model, "--json")
    assert (named.json["culprit"]["stage"], named.json["culprit"]["verdict"]) == ("source_f32", "bug")
    assert "2 times" in named.json["culprit"]["hint"]


def test_a_transpose_label_without_transposed_values_is_not_believed(bundle: Path) -> None:
    """The history: a square tensor labelled as stored the other way, its values as before."""

    def relabelled(manifest: dict[str, Any]) -> None:
        for entry in manifest["selected_tensors"]:
            if entry["source_name"] == K_PROJ:
                entry["component_v_layout"] = "vh"

    with_json(bundle / MANIFEST_FILE, relabelled)
    done = svf("audit", bundle, "--json")
    assert done.code == 1
    assert done.json["culprit"]["tensor"] == K_PROJ
    assert done.json["culprit"]["hint"] == "the label is wrong: V is stored as torch_v"


def test_a_key_that_is_no_replay_stage_is_refused(bundle: Path) -> None:
    with_tensors(bundle / ALL_STAGES_FILE, lambda t: t.update({f"tensor.{GATE}.other": np.zeros(1, np.float32)}))
    done = svf("audit", bundle)
    assert done.code == 3
    assert "other" in done.error


def test_hashes_alone_cannot_be_judged(made: Path, tmp_path: Path) -> None:
    command = ["replay", made / "components", "--backend", "reference", "--select", "k_proj", "--dump", "hash"]
    assert svf(*command, "--out", tmp_path / "hash").code == 0
    done = svf("audit", tmp_path / "hash", "--json")
    assert (done.code, done.json["outcome"], done.json["coverage"]["judged"]) == (5, "incomplete", 0)


def test_without_components_products_are_unjudged(made: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copy(made / "components" / ALL_STAGES_FILE, tmp_path / "alone.safetensors"))
    done = svf("audit", alone, "--json")
    assert (done.code, done.json["outcome"]) == (5, "incomplete")
    assert "give --components" in rows(done)[tensor_stage_key(GATE, "matmul_pre_norm")]["note"]
    assert rows(done)[tensor_stage_key(GATE, "adapted_source_f32")]["verdict"] == "exact"
    assert svf("audit", alone, "--components", made / "components").code == 0


# Usage.

LOADED = """
import sys
import cli
try:
    cli.app(["--no-progress", *sys.argv[1:]])
except SystemExit as end:
    code = end.code
print(sorted({"torch", "jax", "transformers"} & sys.modules.keys()), code)
"""


def test_neither_audit_nor_layouts_loads_a_framework(made: Path, ours: Path) -> None:
    for command in (
        ("audit", ours / "reference-float32", "--json"),
        ("audit", made / "components", "--json"),
        ("layouts", made / "components", "--json"),
    ):
        done = fresh(LOADED, *command)
        assert done.stdout.splitlines()[-1] == "[] 0", done.stderr


def test_what_does_not_fit_together_is_refused(made: Path, ours: Path, tmp_path: Path) -> None:
    assert svf("audit", tmp_path / "none").code == 4
    assert svf("audit", made / "components", "--tokens", "1,2").code == 2
    assert svf("audit", ours / "reference-float32", "--components", made / "components").code == 2
    assert svf("audit", ours / "reference-float32", "--tokens", "1,2").code == 3
    assert svf("audit", ours / "torch-float32" / "layer-0" / "ffn_gate.bin").code == 2
    assert svf("audit", ours / "torch-float32").code == 2
    (tmp_path / "empty").mkdir()
    done = svf("audit", tmp_path / "empty", "--model", ours.parent / "qwen3-float32", "--tokens", "1")
    assert done.code == 4  # as of a side of svf diff


def test_a_table_says_the_verdict(ours: Path, changed: Path) -> None:
    text = svf("audit", ours / "reference-float32")
    assert (text.code, text.err) == (0, "")
    assert "SOUND" in text.out
    rewrite(changed, "layer-1.safetensors", lambda t: t.update({"layers.1.ffn_up": t["layers.1.ffn_up"] * 2}))
    text = svf("audit", changed)
    assert text.code == 1
    assert "every value is 2 times what it should be" in text.out
