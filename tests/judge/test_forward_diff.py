"""Comparing forward dumps and APRT: a clean pair agrees, and each mutant is named with its stage, layer and side."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from forward_models import MODELS, Model, change_dump, dumped, random_weights, trace, write_model
from helpers import Result, one_line, some, svf, tensors_of, with_json
from rich.console import Console

from stages.errors import InputError
from stages.files.aprt import write_aprt
from stages.files.dump import MANIFEST_FILE
from stages.files.tensorfile import write_tensors
from stages.judge import stats
from stages.judge.forward_diff import AMPLIFICATION, amplification, diff_forward, growth
from stages.show import console as render
from stages.spec.backend import Backend

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("forward-diff")


@pytest.fixture(scope="module")
def source(place: Path) -> Path:
    """Two layers of Qwen3 in float32: 4 query heads, 2 key heads."""
    return write_model(place / "model", MODELS["qwen3"], "float32")


@pytest.fixture(scope="module")
def one(place: Path, source: Path, torch_backend: Backend) -> Path:
    """The torch side."""
    trace(source, torch_backend, out=place / "torch")
    return place / "torch"


@pytest.fixture(scope="module")
def two(place: Path, source: Path, jax_backend: Backend) -> Path:
    """The JAX side."""
    trace(source, jax_backend, out=place / "jax")
    return place / "jax"


def refused(done: Result, code: int, *words: str) -> None:
    assert (done.code, done.out) == (code, ""), (done.code, done.err, done.out[-300:])
    one_line(Exception(done.error), *words)


def rows_of(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in document["rows"]}


def failures(document: Mapping[str, Any]) -> dict[str, str]:
    return {row["key"]: row["verdict"] for row in document["rows"] if row["verdict"] not in ("exact", "rounding")}


# -- right runs agree ------------------------------------------------------------------------------------------


# fmt: off
CLEAN = [
    ("qwen3", "float32", 0, "7"), ("qwen2", "bfloat16", 1, "3,141"), ("qwen3-gqa7", "bfloat16", 2, "9,8,7,6,5,4,3"),
    ("qwen2-yarn", "float32", 3, "9,8,7,6,5,4,3"), ("qwen3-bias", "float32", 4, "3,141"),
    ("qwen2-tied", "bfloat16", 5, "7"),
]
# fmt: on


@pytest.mark.parametrize("of", some(CLEAN, CLEAN[1:4]), ids=str)
def test_torch_and_jax_agree(
    of: tuple[str, str, int, str], torch_backend: Backend, jax_backend: Backend, tmp_path: Path
) -> None:
    name, dtype, seed, tokens = of
    model = write_model(tmp_path / "model", MODELS[name], dtype, seed)
    for backend in (torch_backend, jax_backend):
        trace(model, backend, tokens=tokens, out=tmp_path / backend.name)
    document = diff_forward(tmp_path / "torch", tmp_path / "jax")
    assert (document["outcome"], document["culprit"], failures(document)) == ("agree", None, {})
    assert document["coverage"] == {"compared": len(document["rows"]), "expected": len(document["rows"])}
    assert len(document["rows"]) == len(dumped(tmp_path / "torch")) > 35
    assert all(row["verdict_a"] and row["verdict_b"] for row in document["rows"])
    assert (document["kind"], document["tokens"], document["flat"]) == ("forward", tokens.count(",") + 1, False)
    assert document["logits"]["top1_agreement"] == 1.0


def test_a_dump_and_itself_are_bit_identical(one: Path) -> None:
    document = diff_forward(one, one)
    assert document["outcome"] == "agree"
    assert all(row["byte_match"] and row["sha256_a"] == row["sha256_b"] for row in document["rows"])
    assert "Bit-identical" in document["verdict"]
    assert document["logits"]["kl"] == 0.0


def test_rows_are_in_execution_order(one: Path, two: Path) -> None:
    keys = [row["key"] for row in diff_forward(one, two)["rows"]]
    assert keys[:6] == ["inv_freq", "rope_angle", "rope_cos", "rope_sin", "embedding", "layers.0.attn_norm"]
    assert keys[-3:] == ["layers.1.post_ffn_residual", "final_norm", "lm_head"]
    assert keys.index("layers.0.post_ffn_residual") + 1 == keys.index("layers.1.attn_norm")


# -- mutants ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """A change of one dump: what the diff must say, and of which stages it may say something at all."""

    change: Callable[[Tensors], object]
    key: str
    verdict: str
    also: tuple[str, ...] = ()  # stages that read the changed one, and so no longer follow from their inputs
    side: bool = True  # whether one side can be blamed
    hint: str = ""


def altered(key: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({key: np.ascontiguousarray(change(tensors[key]))})


def at(place: tuple[int, ...], value: float, *, add: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    def change(x: np.ndarray) -> np.ndarray:
        x = x.copy()
        x[place] = x[place] + value if add else value
        return x

    return change


def ulp(place: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
    def change(x: np.ndarray) -> np.ndarray:
        x = x.copy()
        x[place] = np.nextafter(x[place], np.float32(np.inf))
        return x

    return change


L0, L1 = "layers.0.", "layers.1."
# fmt: off
MUTANTS = {
    "q heads swapped": Mutant(
        altered(L1 + "q_post_rope", lambda x: x[:, [1, 0, 2, 3]]), L1 + "q_post_rope", "bug", (L1 + "attn_scores",)
    ),
    "one element moved": Mutant(
        altered(L0 + "ffn_gate", at((2, 17), 0.5, add=True)), L0 + "ffn_gate", "bug", (L0 + "ffn_silu",)
    ),
    "one logit moved": Mutant(altered("lm_head", at((1, 299), 0.01, add=True)), "lm_head", "bug"),
    "an ulp in a product of elements": Mutant(
        altered(L1 + "ffn_swigl", ulp((0, 3))), L1 + "ffn_swigl", "bug"
    ),
    "an ulp in the embedding": Mutant(altered("embedding", ulp((4, 0))), "embedding", "bug"),
    "an ulp in a residual": Mutant(altered(L0 + "post_attn_residual", ulp((4, 63))), L0 + "post_attn_residual", "bug"),
    "an ulp in an angle": Mutant(altered("rope_angle", ulp((3, 2))), "rope_angle", "bug"),
    "an ulp in what is a copy": Mutant(altered(L0 + "qkv_bias", ulp((0, 0))), L0 + "qkv_bias", "bug"),
    "the mask forgotten": Mutant(
        altered(L0 + "attn_softmax", lambda p: np.full_like(p, 1 / 5)), L0 + "attn_softmax", "bug", (L0 + "attention",)
    ),
    "tokens in another order": Mutant(
        altered(L1 + "ffn_up", lambda x: x[::-1]), L1 + "ffn_up", "bug", (L1 + "ffn_swigl",)
    ),
    "a stage of zeros": Mutant(
        altered(L1 + "attn_out", np.zeros_like), L1 + "attn_out", "bug", (L1 + "post_attn_residual",)
    ),
    "a NaN": Mutant(
        altered(L0 + "ffn_gate", at((0, 0), np.nan)), L0 + "ffn_gate", "nonfinite", (L0 + "ffn_silu",)
    ),
    "an infinity": Mutant(altered("lm_head", at((0, 0), np.inf)), "lm_head", "nonfinite"),
    "another dtype": Mutant(
        altered(L1 + "ffn_up", lambda x: x.astype(ml_dtypes.bfloat16)), L1 + "ffn_up", "shape", (L1 + "ffn_swigl",),
        hint="bfloat16",
    ),
    "heads first": Mutant(
        altered(L0 + "q_post_rope", lambda x: x.transpose(1, 0, 2)), L0 + "q_post_rope", "shape",
        (L0 + "attn_scores",), hint='expected "tokens heads head_dim". Is one dump head-first?',
    ),
    "rows missing": Mutant(
        altered(L0 + "attn_norm", lambda x: x[:-1]), L0 + "attn_norm", "shape", (L0 + "qkv_matmul",),
        hint="tokens hidden",
    ),
    "a stage missing": Mutant(
        lambda t: t.pop(L1 + "attn_softmax"), L1 + "attn_softmax", "missing", (L1 + "attention",), side=False
    ),
    "a layer missing": Mutant(
        lambda t: [t.pop(key) for key in list(t) if key.startswith(L1)], L1 + "attn_norm", "missing",
        ("final_norm",), side=False,
    ),
}
# fmt: on


@pytest.mark.cover(1)
@pytest.mark.parametrize("letter", ["a", "b"])
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_named_with_stage_layer_and_side(
    name: str, letter: str, one: Path, two: Path, tmp_path: Path
) -> None:
    mutant = MUTANTS[name]
    changed = change_dump(Path(shutil.copytree(two, tmp_path / "changed")), mutant.change)
    pair = (changed, one) if letter == "a" else (one, changed)
    done = svf("diff", *pair, "--json")
    assert done.code == 1, (done.code, done.err)
    culprit = done.json["culprit"]
    verdict = "extra" if mutant.verdict == "missing" and letter == "a" else mutant.verdict
    stage = mutant.key.rpartition(".")[2]
    layer = int(mutant.key.split(".")[1]) if "." in mutant.key else None
    assert (culprit["stage"], culprit["layer"], culprit["verdict"]) == (stage, layer, verdict)
    assert culprit["side"] == (letter if mutant.side else None)
    assert mutant.hint in (culprit["hint"] or "")
    failed = failures(done.json)
    assert failed.pop(mutant.key) == verdict
    if name == "a layer missing":
        failed = {key: v for key, v in failed.items() if not key.startswith(L1)}
    assert failed.keys() <= set(mutant.also), failed
    # The other side is right everywhere.
    other = "b" if letter == "a" else "a"
    assert {row[f"verdict_{other}"] for row in done.json["rows"]} <= {"exact", "rounding", None}
    table = svf("diff", *pair)
    assert table.code == 1
    assert "DIVERGED" in table.out
    assert stage in table.out.splitlines()[-1]


def test_an_ulp_in_a_long_sum_is_rounding(one: Path, two: Path, tmp_path: Path) -> None:
    changed = change_dump(Path(shutil.copytree(two, tmp_path / "changed")), altered("lm_head", ulp((0, 0))))
    document = diff_forward(one, changed)
    assert (document["outcome"], rows_of(document)["lm_head"]["verdict"]) == ("agree", "rounding")


def test_both_sides_wrong_alike_is_both_and_not_agreement(one: Path, two: Path, tmp_path: Path) -> None:
    change = altered(L0 + "ffn_silu", lambda x: x * np.float32(1.01))
    pair = [change_dump(Path(shutil.copytree(p, tmp_path / p.name)), change) for p in (one, one, two)[1:]]
    document = diff_forward(*pair)
    culprit = document["culprit"]
    assert (document["outcome"], culprit["side"], culprit["stage"]) == ("diverged", "both", "ffn_silu")
    same = change_dump(Path(shutil.copytree(one, tmp_path / "same")), change)
    assert rows_of(diff_forward(same, same))[L0 + "ffn_silu"]["byte_match"]
    assert diff_forward(same, same)["outcome"] == "diverged"


def test_both_sides_head_first_is_a_shape_and_not_agreement(one: Path, tmp_path: Path) -> None:
    both = change_dump(Path(shutil.copytree(one, tmp_path / "both")), MUTANTS["heads first"].change)
    done = svf("diff", both, both, "--json")
    culprit = done.json["culprit"]
    assert (done.code, culprit["stage"], culprit["verdict"], culprit["side"]) == (1, "q_post_rope", "shape", "both")
    assert failures(done.json) == {L0 + "q_post_rope": "shape"}
    assert "inf" not in done.json["verdict"]


def test_rows_cut_from_everything_alike_are_not_agreement(one: Path, tmp_path: Path) -> None:
    """Every stage then follows from its inputs, but the first ones not from the tokens."""

    def cut(tensors: Tensors) -> None:
        for key, x in tensors.items():
            stage = key.rpartition(".")[2]
            if stage not in ("inv_freq", "attn_scores", "attn_softmax", "rope_cos"):
                tensors[key] = np.ascontiguousarray(x[:-1])

    done = svf("diff", *[change_dump(Path(shutil.copytree(one, tmp_path / name)), cut) for name in "ab"], "--json")
    assert (done.code, done.json["culprit"]["stage"]) == (1, "rope_angle"), done.err
    assert set(failures(done.json).values()) == {"shape"}


# -- dumps that are damaged ------------------------------------------------------------------------------------


def test_a_layers_file_that_is_gone(one: Path, tmp_path: Path) -> None:
    cut = Path(shutil.copytree(one, tmp_path / "cut"))
    (cut / "layer-1.safetensors").unlink()
    refused(svf("diff", one, cut), 3, "layer-1.safetensors", MANIFEST_FILE)


def test_a_dump_that_was_not_committed_is_refused(one: Path, tmp_path: Path) -> None:
    cut = Path(shutil.copytree(one, tmp_path / "cut"))
    (cut / MANIFEST_FILE).unlink()
    for pair in ((one, cut), (cut, one)):
        with pytest.raises(InputError, match="not written to its end"):
            diff_forward(*pair)


def test_svf_diff_says_that_a_dump_was_not_committed(one: Path, tmp_path: Path) -> None:
    cut = Path(shutil.copytree(one, tmp_path / "cut"))
    (cut / MANIFEST_FILE).unlink()
    for pair in ((one, cut), (cut, one), (cut, cut)):
        refused(svf("diff", *pair), 3, MANIFEST_FILE, "not written to its end")


def drop(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest.pop(key)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("model"), ["the manifest has no 'model'"]),
        (drop("tokens"), ["the manifest has no 'tokens'"]),
        (lambda m: m.update(tokens=[]), ["'tokens'", "[]"]),
        (lambda m: m.update(schema="svf.dump/9"), ["svf.dump/9"]),
        (lambda m: m["tensors"].update({"layers.x.ffn_up": m["tensors"]["lm_head"]}), ["layers.x.ffn_up"]),
        (lambda m: m["tensors"]["lm_head"].update(file="../x"), ["lm_head", "../x"]),
        (lambda m: m["tensors"]["lm_head"].update(shape=[1, 1500]), ["lm_head", "changed"]),
        (lambda m: m["tensors"]["lm_head"].update(file=None), ["lm_head"]),
        (lambda m: m["model"]["config"].update(hidden_act="gelu"), ["hidden_act"]),
    ],
)
def test_a_manifest_that_is_wrong_is_refused_in_one_line(
    change: Callable[[dict[str, Any]], object], words: list[str], one: Path, tmp_path: Path
) -> None:
    changed = Path(shutil.copytree(one, tmp_path / "changed"))
    with_json(changed / MANIFEST_FILE, change)
    refused(svf("diff", one, changed), 3, *words)


def test_a_stage_that_no_qwen_has_is_refused_by_name(one: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(one, tmp_path / "changed"))
    change_dump(changed, lambda t: t.update({"layers.0.ffn_gelu": t["layers.0.ffn_silu"]}))
    refused(svf("diff", one, changed), 3, "layers.0.ffn_gelu", "ffn_silu")


# -- what cannot be compared -----------------------------------------------------------------------------------


def test_other_runs_are_refused(one: Path, source: Path, model: Path, torch_backend: Backend, tmp_path: Path) -> None:
    others: dict[str, tuple[Path, dict[str, Any], list[str]]] = {
        "longer": (source, {"tokens": "3,141,59,26,53,58"}, ["different tokens", "5 and 6"]),
        "other": (source, {"tokens": "3,141,59,26,54"}, ["different tokens"]),
        "last": (source, {"positions": "last"}, ["positions all and last"]),
        "model": (model, {"dtype": "float32"}, ["different models"]),
    }
    for name, (folder, options, words) in others.items():
        trace(folder, torch_backend, out=tmp_path / name, **options)
        refused(svf("diff", one, tmp_path / name), 3, "not comparable", *words)


def test_a_model_of_the_same_shape_with_other_values_is_refused(
    one: Path, torch_backend: Backend, tmp_path: Path
) -> None:
    """Each side would be right on its own weights, in every stage."""
    folder = write_model(tmp_path / "other", MODELS["qwen3"], "float32", seed=1)
    trace(folder, torch_backend, out=tmp_path / "dump")
    refused(svf("diff", one, tmp_path / "dump"), 3, "not comparable", "different models", "model.embed_tokens.weight")
    folder = write_model(tmp_path / "fine-tuned", MODELS["qwen3"], "float32")
    name = "model.layers.1.mlp.up_proj.weight"
    tuned = tensors_of(folder / "model.safetensors")
    tuned[name] = tuned[name] * np.float32(1.01)
    write_tensors(folder / "model.safetensors", tuned, metadata={"format": "pt"})
    trace(folder, torch_backend, out=tmp_path / "tuned")
    refused(svf("diff", one, tmp_path / "tuned"), 3, name)
    # Judged by one of the two, the other side is wrong where it read the weight.
    document = diff_forward(one, tmp_path / "tuned", model=str(folder))
    assert (document["culprit"]["side"], document["culprit"]["stage"]) == ("a", "ffn_up")


def test_a_copy_of_the_model_is_the_same_model(one: Path, source: Path, torch_backend: Backend, tmp_path: Path) -> None:
    trace(Path(shutil.copytree(source, tmp_path / "copy")), torch_backend, out=tmp_path / "dump")
    assert diff_forward(one, tmp_path / "dump")["outcome"] == "agree"


def test_kinds_that_are_not_of_a_kind_are_exit_2(one: Path, source: Path, made: Path, tmp_path: Path) -> None:
    write_aprt(tmp_path / "file.bin", None, np.zeros(3, np.float32))
    kinds = {"forward": one, "checkpoint": source, "replay": made / "components", "aprt": tmp_path / "file.bin"}
    for a, path_a in kinds.items():
        for b, path_b in kinds.items():
            if a < b:
                article = {"aprt": "an APRT file", "forward": "a forward dump"}
                refused(svf("diff", path_a, path_b), 2, f"is {article.get(a, f'a {a}')}", article.get(b, f"a {b}"))


# -- weights that moved away -----------------------------------------------------------------------------------


def test_without_weights_products_are_unjudged_until_model_says_where_they_are(
    torch_backend: Backend, jax_backend: Backend, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "model", MODELS["qwen2"], "float32")
    for backend in (torch_backend, jax_backend):
        trace(folder, backend, out=tmp_path / backend.name)
    pair = (tmp_path / "torch", tmp_path / "jax")
    assert svf("diff", *pair).code == 0
    folder.rename(tmp_path / "moved")
    done = svf("diff", *pair, "--json")
    assert (done.code, done.json["outcome"]) == (5, "incomplete")
    unjudged = {row["stage"] for row in done.json["rows"] if row["verdict"] == "unjudged"}
    assert {"ffn_gate", "ffn_out", "lm_head", "qkv_bias"} <= unjudged
    # What needs no weights is judged all the same.
    judged = {row["stage"] for row in done.json["rows"] if row["verdict_a"] and row["verdict_b"]}
    assert {"attn_scores", "attn_softmax", "ffn_silu", "ffn_swigl", "post_ffn_residual", "rope_cos"} <= judged
    assert set(failures(done.json).values()) == {"unjudged"}
    assert "INCOMPLETE" in svf("diff", *pair).out
    assert svf("diff", *pair, "--model", tmp_path / "moved").code == 0
    # A wrong stage is found without weights where it needs none.
    change_dump(pair[1], altered(L0 + "ffn_swigl", ulp((0, 0))))
    assert svf("diff", *pair).code == 1
    other = write_model(tmp_path / "other", Model("qwen2"), "float32")
    refused(svf("diff", *pair, "--model", other), 3, str(other), "not the model")
    refused(svf("diff", *pair, "--model", tmp_path / "none"), 4, "none")


def test_a_model_that_was_replaced_is_not_judged_by(torch_backend: Backend, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", MODELS["qwen2"], "float32")
    trace(folder, torch_backend, out=tmp_path / "dump")
    with_json(folder / "config.json", lambda config: config.update(rms_norm_eps=1e-3))
    rows = rows_of(diff_forward(tmp_path / "dump", tmp_path / "dump"))
    assert rows["lm_head"]["verdict_a"] is None
    assert rows[L0 + "ffn_silu"]["verdict_a"] in ("exact", "rounding")


def test_the_last_position_alone_is_compared_and_attention_is_not_judged(
    source: Path, torch_backend: Backend, reference_side: Backend, tmp_path: Path
) -> None:
    for backend in (torch_backend, reference_side):
        trace(source, backend, positions="last", out=tmp_path / backend.name)
    rows = rows_of(document := diff_forward(tmp_path / "torch", tmp_path / "reference"))
    for row in rows.values():
        alone = row["stage"] not in ("attn_scores", "attn_softmax", "attention")
        assert (row["verdict_a"] is not None) == alone, row["key"]
    assert document["outcome"] == "incomplete"
    assert set(failures(document).values()) == {"unjudged"}


@pytest.fixture(scope="module")
def reference_side() -> Backend:
    from stages.oracle.components import ReferenceBackend

    return ReferenceBackend()


# -- statistics ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drifted(place: Path, one: Path) -> Path:
    """A dump in which each layer is a little larger than the one before."""

    def drift(tensors: Tensors) -> None:
        for key, array in tensors.items():
            if key.startswith("layers."):
                gain = {"ffn_gate": 1.01, "ffn_silu": 1.02, "ffn_swigl": 1.05}.get(key.rpartition(".")[2], 1.001)
                tensors[key] = (array * np.float32(gain ** (1 + int(key.split(".")[1])))).astype(array.dtype)

    return change_dump(Path(shutil.copytree(one, place / "drifted")), drift)


def test_statistics_of_every_row_are_numpys(one: Path, drifted: Path) -> None:
    a, b = dumped(one), dumped(drifted)
    for key, row in rows_of(diff_forward(one, drifted)).items():
        x, y = a[key].astype(np.float64), b[key].astype(np.float64)
        for letter, values in (("a", x), ("b", y)):
            found = row[f"stats_{letter}"]
            assert (found["min"], found["max"], found["count"]) == (values.min(), values.max(), values.size)
            assert found["mean"] == pytest.approx(values.mean(), rel=1e-12, abs=1e-15)
            assert found["std"] == pytest.approx(values.std(), rel=1e-12)
        if row["stage"] == "attn_scores":  # what the causal mask throws away is not compared, and counts as 0
            x, y = np.tril(x), np.tril(y)
        assert row["std_ratio"] == pytest.approx(y.std() / x.std(), rel=1e-12)
        d = np.abs(x - y)
        assert (row["max_abs"], row["mismatched"], row["count"]) == (d.max(), np.count_nonzero(x != y), x.size)
        assert row["rel_l2"] == pytest.approx(np.linalg.norm(d) / np.linalg.norm(x), rel=1e-9)
        assert row["cosine"] == pytest.approx(np.vdot(x, y) / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)
        if d.any():
            assert row["max_abs_index"] == [int(i) for i in np.unravel_index(np.argmax(d), d.shape)]


def test_growth_and_amplification_follow_the_rows(one: Path, drifted: Path) -> None:
    document = diff_forward(one, drifted)
    rows, a, b = rows_of(document), dumped(one), dumped(drifted)
    assert [g["layer"] for g in document["growth"]] == [0, 1]
    for found in document["growth"]:
        row = rows[f"layers.{found['layer']}.post_ffn_residual"]
        assert found == {name: row[name] for name in ("layer", "rel_l2", "max_abs", "cosine", "std_ratio")}
    assert document["growth"][1]["rel_l2"] > 1.9 * document["growth"][0]["rel_l2"] > 0
    assert AMPLIFICATION == ("ffn_gate", "ffn_silu", "ffn_swigl")
    for found in document["amplification"]:
        for stage in AMPLIFICATION:
            key = f"layers.{found['layer']}.{stage}"
            ratio = b[key].astype(np.float64).std() / a[key].astype(np.float64).std()
            assert found["std_ratio"][stage] == pytest.approx(ratio, rel=1e-12)
            assert found["rel_l2"][stage] == rows[key]["rel_l2"]
    first = document["amplification"][0]["std_ratio"]
    assert [round(first[stage], 4) for stage in AMPLIFICATION] == [1.01, 1.02, 1.05]


def test_growth_and_amplification_leave_out_what_was_not_compared(one: Path, drifted: Path, tmp_path: Path) -> None:
    rows = diff_forward(one, drifted)["rows"]
    kept = [row for row in rows if row["key"] != L0 + "ffn_silu" and row["key"] != L1 + "post_ffn_residual"]
    assert [g["layer"] for g in growth(kept)] == [0]
    assert [c["layer"] for c in amplification(kept)] == [1]
    assert growth([]) == amplification([]) == []


def test_logits_are_those_of_the_dumps(one: Path, two: Path, tmp_path: Path) -> None:
    a, b = dumped(one)["lm_head"], dumped(two)["lm_head"]
    assert diff_forward(one, two)["logits"] == stats.logits(a, b)
    # A next token that changes shows, and its margin says how near it was.
    runner_up = int(np.argsort(-a[-1])[1])
    changed = Path(shutil.copytree(two, tmp_path / "changed"))
    change_dump(changed, altered("lm_head", at((-1, runner_up), float(a[-1].max()) + 1)))
    found = diff_forward(one, changed)["logits"]
    assert (found["next_token_a"], found["next_token_b"]) == (int(np.argmax(a[-1])), runner_up)
    assert found["top1_agreement"] == 0.8
    assert found["margin"] == float(a[-1].max()) - float(a[-1][runner_up])
    assert found["kl"] > 1e-3
    assert "Top-1 tokens equal at 80% of them" in svf("diff", one, changed).out


def test_without_logits_nothing_is_said_of_them(source: Path, torch_backend: Backend, tmp_path: Path) -> None:
    trace(source, torch_backend, out=tmp_path / "some", stages="ffn_up", layers="1")
    document = diff_forward(tmp_path / "some", tmp_path / "some")
    assert (document["logits"], document["growth"], document["amplification"]) == (None, [], [])
    # ffn_up's input was not recorded: equal bytes are all that is known of it.
    assert [row["key"] for row in document["rows"]] == ["layers.1.ffn_up"]
    assert svf("diff", tmp_path / "some", tmp_path / "some").code == 0


def test_logits_that_are_not_finite_make_no_nan_in_json(one: Path, two: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(two, tmp_path / "changed"))
    change_dump(changed, altered("lm_head", at((0, 0), np.nan)))
    done = svf("diff", one, changed, "--json")
    assert done.code == 1
    json.loads(done.out, parse_constant=lambda name: pytest.fail(name))


# -- APRT ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trees(place: Path, source: Path, model: Path, torch_backend: Backend) -> Path:
    """`tree` beside `torch` (float32), and `tree16` beside `dump16` (the bfloat16 tiny model)."""
    trace(source, torch_backend, out=place / "tree", format="aprt")
    trace(model, torch_backend, out=place / "tree16", format="aprt")
    trace(model, torch_backend, out=place / "dump16")
    return place


def test_an_aprt_tree_and_a_dump_of_the_same_run_agree(trees: Path, one: Path) -> None:
    """Beside a dump the tree's model and tokens are known, so that both are judged; two trees alone stay flat."""
    for tree, dump in (("tree", one), ("tree16", trees / "dump16")):
        for pair in ((trees / tree, dump), (dump, trees / tree), (trees / tree, trees / tree)):
            done = svf("diff", *pair, "--json")
            flat = dump not in pair
            assert (done.code, done.json["outcome"], done.json["flat"]) == (0, "agree", flat), done.err
            assert all((row["verdict_a"] is None) == flat for row in done.json["rows"])
            assert done.json["coverage"]["compared"] == len(dumped(dump))
            assert all(row["byte_match"] for row in done.json["rows"])
            assert rows_of(done.json)["lm_head"]["count"] == dumped(dump)["lm_head"].shape[1]
            assert done.json["logits"]["top1_agreement"] == 1.0
            assert "APRT, flat" in "".join(done.json[letter]["source"] for letter in "ab")


def test_an_aprt_tree_that_differs(trees: Path, one: Path, tmp_path: Path) -> None:
    """Without operands nothing can be judged; beside a dump, whose model and tokens are known, both sides can."""
    changed = Path(shutil.copytree(trees / "tree", tmp_path / "tree"))
    values = dumped(one)[L1 + "ffn_silu"]
    write_aprt(changed / "layer-1" / "ffn_silu.bin", 1, at((2, 5), 0.25, add=True)(values))
    for other, code, verdict, index in ((trees / "tree", 5, "unjudged", [2 * 160 + 5]), (one, 1, "bug", [2, 5])):
        done = svf("diff", other, changed, "--json")
        assert done.code == code
        row = rows_of(done.json)[L1 + "ffn_silu"]
        assert (row["verdict"], row["max_abs_index"], row["max_abs"]) == (verdict, index, pytest.approx(0.25))
        assert row["mismatched"] == 1
    assert (row["verdict_b"], done.json["culprit"]["side"]) == ("bug", "b")
    assert row["verdict_a"] in ("exact", "rounding")


def test_an_aprt_tree_that_lacks_a_stage_or_is_shorter(trees: Path, one: Path, tmp_path: Path) -> None:
    cut = Path(shutil.copytree(trees / "tree", tmp_path / "cut"))
    (cut / "layer-0" / "ffn_up.bin").unlink()
    done = svf("diff", one, cut, "--json")
    assert (done.code, done.json["lacks"], failures(done.json)) == (0, {"a": [], "b": []}, {})
    assert rows_of(done.json)[L0 + "ffn_up"]["note"] == "a alone recorded it"
    short = Path(shutil.copytree(trees / "tree", tmp_path / "short"))
    write_aprt(short / "layer-0" / "ffn_up.bin", 0, dumped(one)[L0 + "ffn_up"][:-1])
    done = svf("diff", one, short, "--json")
    assert (done.code, failures(done.json)) == (1, {L0 + "ffn_up": "shape"})


def test_a_truncated_file_of_a_tree_is_refused(trees: Path, one: Path, tmp_path: Path) -> None:
    cut = Path(shutil.copytree(trees / "tree", tmp_path / "cut"))
    path = cut / "layer-1" / "ffn_up.bin"
    path.write_bytes(path.read_bytes()[:-1])
    refused(svf("diff", one, cut), 3, "layer-1/ffn_up.bin", "truncated")
    refused(svf("diff", path, trees / "tree" / "layer-1" / "ffn_up.bin"), 3, "truncated")


def test_two_aprt_files(trees: Path, tmp_path: Path) -> None:
    path = trees / "tree" / "layer-1" / "ffn_up.bin"
    assert svf("diff", path, path).code == 0
    (tmp_path / "layer-1").mkdir()
    other = tmp_path / "layer-1" / "ffn_up.bin"
    values = np.frombuffer(path.read_bytes()[12:], "<f4").copy()
    values[7] += 1
    write_aprt(other, 1, values)
    done = svf("diff", path, other, "--json")
    (row,) = done.json["rows"]
    assert (done.code, row["verdict"], row["max_abs_index"], row["mismatched"]) == (5, "unjudged", [7], 1)
    refused(svf("diff", path, trees / "tree" / "layer-0" / "ffn_up.bin"), 3, "layer 1", "layer 0")
    refused(svf("diff", path, trees / "tree" / "layer-1" / "ffn_out.bin"), 3, "elements")


# -- the view in a terminal ------------------------------------------------------------------------------------


def shown(document: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch, width: int) -> list[str]:
    """The lines of a terminal that is `width` columns wide."""
    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False, force_terminal=True, color_system=None)
    monkeypatch.setattr(render, "console", lambda: console)
    render.diff_document(document)
    return out.getvalue().splitlines()


def cells(lines: list[str], stage: str, table: int = 0) -> list[str]:
    """A stage's row of the grid: what stands in each layer's column."""
    rows = [line.replace("┃", "│").split("│") for line in lines if line.split("│")[0].strip() == stage and "│" in line]
    return [cell.strip() for cell in rows[table][1:]]


def test_the_grid_marks_equal_bytes_and_the_first_difference(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = Path(shutil.copytree(one, tmp_path / "changed"))
    change_dump(changed, altered(L1 + "ffn_up", lambda x: x * np.float32(1.001)))
    lines = shown(diff_forward(one, changed), monkeypatch, 160)
    assert cells(lines, "ffn_gate") == ["=", "="]
    assert cells(lines, "ffn_up") == ["=", "bug*"]
    assert "First difference in bytes: layers.1.ffn_up (marked *)" in "\n".join(lines)


def test_the_grid_shows_powers_of_ten(one: Path, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = diff_forward(one, two)
    lines, rows = shown(document, monkeypatch, 160), rows_of(document)
    for stage in ("ffn_gate", "post_ffn_residual"):
        for layer, cell in enumerate(cells(lines, stage)):
            row = rows[f"layers.{layer}.{stage}"]
            expected = "=" if row["byte_match"] else str(int(np.floor(np.log10(row["rel_l2"]))))
            assert cell.rstrip("*") == expected
    same = shown(diff_forward(one, one), monkeypatch, 160)
    assert "First difference" not in "\n".join(same)
    assert {c for stage in ("attn_norm", "ffn_out") for c in cells(same, stage)} == {"="}


def test_eighty_columns_show_every_layer(monkeypatch: pytest.MonkeyPatch, one: Path, two: Path) -> None:
    """A model of 28 layers, made of a row of two."""
    document = diff_forward(one, two)
    base = [row for row in document["rows"] if row["layer"] == 1]
    rows = [
        {**row, "layer": n, "key": f"layers.{n}.{row['stage']}", "rel_l2": 10.0**-n} for n in range(28) for row in base
    ]
    lines = shown({**document, "rows": rows}, monkeypatch, 80)
    grid = lines[: next(n for n, line in enumerate(lines) if "First difference" in line)]
    assert max(map(len, grid)) <= 80
    heads = [line for line in grid if line.startswith("stage ")]
    columns = [int(c) for line in heads for c in line.split("┃")[1:]]
    assert columns == list(range(28))
    for stage in ("post_attn_residual", "ffn_norm"):
        found = [c for table in range(len(heads)) for c in cells(lines, stage, table)]
        assert len(found) == 28
        assert not any("…" in c for c in found)
        assert found[20].rstrip("*") in ("-20", "=")


@pytest.mark.parametrize("width", [80, 110, 130, 160])
def test_the_stage_table_cuts_no_name_and_no_verdict(
    width: int, monkeypatch: pytest.MonkeyPatch, one: Path, two: Path
) -> None:
    lines = shown(diff_forward(one, two), monkeypatch, width)
    table = lines[next(n for n, line in enumerate(lines) if line.startswith("stage ") and "verdict" in line) :]
    (row,) = [line for line in table if line.startswith("post_attn_residual ")]
    assert "exact, inherits" in row
    assert "…" not in "".join(table)
    assert max(map(len, table[:20])) <= width


def test_a_failing_cell_says_why(one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, mutant in MUTANTS.items():
        if name in ("a NaN", "heads first", "a stage missing"):
            changed = change_dump(Path(shutil.copytree(one, tmp_path / mutant.verdict)), mutant.change)
            lines = shown(diff_forward(one, changed), monkeypatch, 120)
            layer, stage = mutant.key.split(".")[1:]
            assert cells(lines, stage)[int(layer)].rstrip("*") == mutant.verdict[:3]


def test_two_checkpoints_are_another_document(source: Path, tmp_path: Path) -> None:
    """A folder with config.json is a checkpoint, whatever else is in it."""
    other = Path(shutil.copytree(source, tmp_path / "other"))
    write_tensors(other / "model.safetensors", random_weights(MODELS["qwen3"].config("float32"), 1))
    assert svf("diff", source, other, "--json").json["schema"] == "svf.checkpoints/1"
    assert tensors_of(other / "model.safetensors").keys() == tensors_of(source / "model.safetensors").keys()


def test_an_empty_manifest_is_no_agreement(one: Path, tmp_path: Path) -> None:
    empty = change_dump(Path(shutil.copytree(one, tmp_path / "empty")), lambda t: t.clear())
    done = svf("diff", empty, empty, "--json")
    assert (done.code, done.json["outcome"]) == (5, "incomplete")
    assert svf("diff", one, empty).code == 1
    with pytest.raises(InputError):
        diff_forward(one, change_manifest(empty))


def change_manifest(folder: Path) -> Path:
    with_json(folder / MANIFEST_FILE, lambda manifest: manifest.pop("tensors"))
    return folder
