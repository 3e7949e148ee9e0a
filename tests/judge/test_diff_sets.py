"""Sides that hold different things, other programs' sides, sums, and options that would do nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forward_models import MODELS, change_dump, dumped, trace, write_model
from helpers import GATE, Result, one_line, svf, tensors_of, with_json, with_tensors

from stages.files.aprt import write_aprt
from stages.files.bundle import COMPONENTS_FILE, OFFSETS_FILE, offsets_key
from stages.files.dump import MANIFEST_FILE
from stages.files.tensorfile import write_tensors
from stages.spec.backend import Backend

TOKENS = "3,141,59,26,53"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, torch_backend: Backend, jax_backend: Backend) -> Path:
    """`model` (float32), its dumps `both/torch` and `both/jax`, trees `tree` and `tree-jax`; `narrow`, bfloat16."""
    folder = tmp_path_factory.mktemp("sets")
    for name, dtype in (("model", "float32"), ("narrow", "bfloat16")):
        write_model(folder / name, MODELS["qwen3"], dtype)
    for backend in (torch_backend, jax_backend):
        trace(folder / "model", backend, out=folder / "both" / backend.name)
    trace(folder / "model", torch_backend, out=folder / "tree", format="aprt")
    trace(folder / "model", jax_backend, out=folder / "tree-jax", format="aprt")
    return folder


def refused(done: Result, code: int, *words: str) -> None:
    assert (done.code, done.out) == (code, ""), (done.code, done.err, done.out[-300:])
    one_line(Exception(done.error), *words)


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def foreign(dump: Path, file: Path, change: Callable[[dict[str, np.ndarray]], object] = lambda _t: None) -> Path:
    """A dump's stages as another program would write them: one file, no manifest."""
    tensors = dumped(dump)
    change(tensors)
    write_tensors(file, tensors)
    return file


# -- sets -------------------------------------------------------------------------------------------------------


def test_a_tree_that_lacks_stages_is_compared_in_what_both_have(place: Path, tmp_path: Path) -> None:
    cut = copy(place / "tree", tmp_path / "cut")
    for name in ("inv_freq.bin", "layer-0/ffn_up.bin"):
        (cut / name).unlink()
    for pair, letter in (((place / "tree", cut), "b"), ((cut, place / "tree"), "a")):
        done = svf("diff", *pair, "--json")
        assert (done.code, done.json["outcome"], done.json["culprit"]) == (5, "incomplete", None)
        assert done.json["lacks"] == {letter: ["inv_freq", "layers.0.ffn_up"], "ab".replace(letter, ""): []}
        assert f"{letter} lacks inv_freq, layers.0.ffn_up." in done.json["verdict"]
    asked = svf("diff", place / "tree", cut, "--stages", "ffn_gate,ffn_out", "--json")
    assert (asked.code, {row["stage"] for row in asked.json["rows"]}) == (0, {"ffn_gate", "ffn_out"})
    both = svf("diff", place / "tree", cut, "--layers", "1", "--json")
    assert (both.code, {row["layer"] for row in both.json["rows"]}) == (0, {1})


def test_a_wrong_value_among_the_shared_ones_is_still_found(place: Path, tmp_path: Path) -> None:
    """Twin of the above: what is missing does not hide what is wrong."""
    cut = copy(place / "tree", tmp_path / "cut")
    (cut / "inv_freq.bin").unlink()
    values = dumped(place / "both" / "torch")["layers.1.ffn_silu"].copy()
    values[2, 5] += 0.25
    write_aprt(cut / "layer-1" / "ffn_silu.bin", 1, values)
    done = svf("diff", place / "tree", cut, "--model", place / "model", "--tokens", TOKENS, "--json")
    assert (done.code, done.json["culprit"]["stage"], done.json["culprit"]["side"]) == (1, "ffn_silu", "b")
    away = svf("diff", place / "tree", cut, "--layers", "0", "--model", place / "model", "--tokens", TOKENS)
    assert away.code == 0


def test_dumps_of_fewer_layers_and_stages(place: Path, jax_backend: Backend, tmp_path: Path) -> None:
    trace(place / "model", jax_backend, layers="0", out=tmp_path / "few")
    done = svf("diff", place / "both" / "torch", tmp_path / "few", "--json")
    assert (done.code, done.json["outcome"], done.json["culprit"]) == (0, "agree", None)
    rows = {row["key"]: row for row in done.json["rows"]}
    assert rows["layers.1.attn_norm"]["note"] == "a alone recorded it"
    assert (rows["layers.1.attn_norm"]["verdict_b"], rows["layers.1.attn_norm"]["byte_match"]) == (None, None)
    assert svf("diff", place / "both" / "torch", tmp_path / "few", "--layers", "0").code == 0
    refused(svf("diff", place / "both" / "torch", tmp_path / "few", "--layers", "7"), 2, "no layer 7")
    refused(svf("diff", place / "both" / "torch", tmp_path / "few", "--stages", "ffn_gelu"), 2, "ffn_gelu", "ffn_silu")


def test_sides_that_recorded_different_stages_are_judged_each_by_its_own(place: Path, tmp_path: Path) -> None:
    """What one side alone has is judged by itself; a fault between two recorded stages is named where it is."""
    seed = "embedding attn_norm qkv_bias q_post_rope k_post_rope attention attn_out post_attn_residual ffn_norm"
    hooks = "embedding attn_norm qkv_bias q_norm k_norm attention attn_out ffn_norm ffn_up ffn_swigl post_ffn_residual"

    def keep(names: str) -> Callable[[dict[str, np.ndarray]], object]:
        return lambda t: [t.pop(key) for key in list(t) if key.rpartition(".")[2] not in names.split()]

    a = foreign(place / "both" / "torch", tmp_path / "a.safetensors", keep(seed))
    b = foreign(place / "both" / "jax", tmp_path / "b.safetensors", keep(hooks))
    given = ("--model", place / "model", "--tokens", TOKENS, "--json")
    done = svf("diff", a, b, *given)
    assert done.code == 0, done.error
    assert (done.code, done.json["outcome"]) == (0, "agree"), done.json["verdict"]
    assert "one side alone recorded are right by themselves" in done.json["verdict"]

    def wrong(t: dict[str, np.ndarray]) -> None:
        keep(hooks)(t)
        t["layers.1.ffn_swigl"] = t["layers.1.ffn_swigl"] * np.float32(1.01)

    done = svf("diff", a, foreign(place / "both" / "jax", tmp_path / "b.safetensors", wrong), *given)
    assert (done.code, done.json["culprit"]["side"], done.json["culprit"]["stage"]) == (1, "b", "ffn_swigl")


def test_a_stage_that_a_manifest_promises_is_missing(place: Path, tmp_path: Path) -> None:
    cut = change_dump(copy(place / "both" / "jax", tmp_path / "cut"), lambda t: t.pop("layers.0.ffn_up"))
    done = svf("diff", place / "both" / "torch", cut, "--json")
    assert (done.code, done.json["culprit"]["verdict"], done.json["culprit"]["stage"]) == (1, "missing", "ffn_up")


def test_layer_output_is_post_ffn_residual(place: Path, tmp_path: Path) -> None:
    other = copy(place / "tree", tmp_path / "other")
    (other / "layer-0" / "post_ffn_residual.bin").rename(other / "layer-0" / "layer_output.bin")
    for pair in ((place / "tree", other), (other, place / "tree"), (place / "both" / "torch", other)):
        done = svf("diff", *pair, "--json")
        assert (done.code, done.json["outcome"]) == (0, "agree"), done.json["verdict"]
        assert [row["stage"] for row in done.json["rows"]].count("layer_output") == 0
    # A side with both names has them compared both.
    twice = copy(place / "tree", tmp_path / "twice")
    shutil.copy(twice / "layer-0" / "post_ffn_residual.bin", twice / "layer-0" / "layer_output.bin")
    assert svf("diff", place / "tree", twice).code == 0
    values = np.frombuffer((twice / "layer-0" / "layer_output.bin").read_bytes()[12:], "<f4").copy()
    values[3] += 1
    write_aprt(twice / "layer-0" / "layer_output.bin", 0, values)
    done = svf("diff", place / "both" / "torch", twice, "--json")
    assert (done.code, done.json["culprit"]["stage"], done.json["culprit"]["side"]) == (1, "layer_output", "b")


def test_equal_files_with_nan_are_equal_and_said_to_hold_it(place: Path, tmp_path: Path) -> None:
    tree = copy(place / "tree", tmp_path / "tree")
    path = tree / "layer-0" / "ffn_up.bin"
    values = np.frombuffer(path.read_bytes()[12:], "<f4").copy()
    values[[4, 9]] = np.nan
    write_aprt(path, 0, values)
    for pair in ((tree, tree), (path, path)):
        done = svf("diff", *pair, "--json")
        assert (done.code, done.json["outcome"]) == (0, "agree")
        assert "NaN or infinity, in the same places" in done.json["verdict"]
        (row,) = [row for row in done.json["rows"] if row["stage"] == "ffn_up" and row["layer"] == 0]
        assert "2 values are NaN or infinite" in row["note"]
    alone = svf("diff", path, place / "tree" / "layer-0" / "ffn_up.bin", "--json")
    assert (alone.code, alone.json["culprit"]["verdict"]) == (1, "nonfinite")


def test_replays_of_different_tensors(made: Path, tmp_path: Path) -> None:
    components = made / "components"
    for name, options in (("all", ()), ("gate", ("--select", "gate_proj"))):
        done = svf("replay", components, "--backend", "torch", "--out", tmp_path / name, *options)
        assert done.code == 0
    pair = (tmp_path / "all", tmp_path / "gate")
    done = svf("diff", *pair, "--json")
    assert (done.code, done.json["outcome"], done.json["culprit"]) == (5, "incomplete", None)
    assert len(done.json["rows"]) == 10
    assert len(done.json["lacks"]["b"]) == 8
    assert svf("diff", *pair, "--stages", "final_bf16").code == 5  # of eight tensors it is not there
    # Both of the same tensors, fewer stages asked for.
    asked = svf("diff", tmp_path / "all", components, "--layers", "2", "--stages", "final_f32", "--json")
    assert (asked.code, {row["stage"] for row in asked.json["rows"]}) == (0, {"final_f32"})
    assert len(asked.json["rows"]) == 7


def test_a_sample_bundle_against_a_dump_of_all(made: Path, tmp_path: Path) -> None:
    """The sample's final stages are the source's transpose."""
    done = svf("replay", made / "components", "--backend", "torch", "--out", tmp_path / "all")
    assert done.code == 0
    for pair, letter in (((tmp_path / "all", made / "sample"), "b"), ((made / "sample", tmp_path / "all"), "a")):
        done = svf("diff", *pair, "--json")
        assert (done.code, done.json["outcome"], done.json["culprit"]) == (5, "incomplete", None), done.json["verdict"]
        assert {row["tensor"] for row in done.json["rows"]} == {GATE}
        assert len(done.json["lacks"][letter]) == 8


def test_a_bundle_without_recorded_stages_is_judged_by_itself(model: Path, bundle: Path) -> None:
    for path in bundle.glob("*stage_debug*"):
        path.unlink()
    done = svf("replay", bundle, "--backend", "torch", "--model", model, "--json")
    assert (done.code, done.json["outcome"]) == (0, "agree")
    assert "Nothing is recorded to compare with" in done.json["verdict"]
    assert all(row["verdict_b"] in ("exact", "rounding") for row in done.json["rows"])
    assert len(done.json["rows"]) == 90
    wrong = svf("replay", bundle, "--backend", "torch", "--model", model, "--layout", "vh", "--json")
    assert (wrong.code, wrong.json["outcome"]) == (1, "diverged")
    assert "torch_v is the right layout" in wrong.json["verdict"]


# -- two dtypes -------------------------------------------------------------------------------------------------


def test_a_run_in_float32_against_one_in_bfloat16(
    place: Path, torch_backend: Backend, jax_backend: Backend, tmp_path: Path
) -> None:
    trace(place / "narrow", torch_backend, dtype="float32", out=tmp_path / "wide")
    trace(place / "narrow", jax_backend, out=tmp_path / "narrow")
    for pair in ((tmp_path / "wide", tmp_path / "narrow"), (tmp_path / "narrow", tmp_path / "wide")):
        done = svf("diff", *pair, "--json")
        assert (done.code, done.json["outcome"]) == (0, "agree"), done.json["verdict"]
        row = next(row for row in done.json["rows"] if row["stage"] == "lm_head")
        wide, narrow = (dumped(tmp_path / name)["lm_head"] for name in ("wide", "narrow"))
        stored = wide.astype(narrow.dtype).astype(np.float64)
        rounding = float(np.sqrt(np.mean((stored - wide) ** 2)))
        rest = float(np.sqrt(np.mean((narrow.astype(np.float64) - stored) ** 2)))
        assert row["dtypes"]["rounding_rms"] == pytest.approx(rounding)
        assert row["dtypes"]["rest_rms"] == pytest.approx(rest)
        assert "each is judged by its own" in done.json["verdict"]
    # A fault in the narrow run is found, and named, all the same.
    change_dump(
        tmp_path / "narrow",
        lambda t: t.update({"layers.1.ffn_silu": t["layers.1.ffn_silu"] * t["layers.1.ffn_silu"].dtype.type(1.25)}),
    )
    done = svf("diff", tmp_path / "wide", tmp_path / "narrow", "--json")
    assert (done.code, done.json["culprit"]["stage"], done.json["culprit"]["side"]) == (1, "ffn_silu", "b")


# -- other programs' sides --------------------------------------------------------------------------------------


def test_another_programs_file_is_a_side_like_any_other(place: Path, tmp_path: Path) -> None:
    ours = place / "both" / "torch"
    file = foreign(place / "both" / "jax", tmp_path / "right.safetensors")
    for pair in ((ours, file), (file, ours), (file, place / "tree")):
        given = () if ours in pair else ("--model", place / "model", "--tokens", TOKENS)
        done = svf("diff", *pair, *given, "--json")
        assert (done.code, done.json["outcome"], done.json["flat"]) == (0, "agree", False), done.json["verdict"]
        assert all(row["verdict_a"] and row["verdict_b"] for row in done.json["rows"])
    (tmp_path / "ids").write_text(TOKENS)
    assert svf("diff", file, file, "--model", place / "model", "--tokens-file", tmp_path / "ids").code == 0
    refused(svf("diff", file, file), 2, "--model and --tokens")
    refused(svf("diff", ours, file, "--tokens", "3,141"), 3, "tokens")
    refused(svf("diff", ours, place / "both" / "jax", "--tokens", TOKENS), 2, "--tokens")

    def wrong(tensors: dict[str, np.ndarray]) -> None:
        tensors["layers.0.ffn_out"] = tensors["layers.0.ffn_out"] * np.float32(1.01)

    bad = foreign(place / "both" / "jax", tmp_path / "wrong.safetensors", wrong)
    done = svf("diff", ours, bad, "--json")
    assert (done.code, done.json["culprit"]["stage"], done.json["culprit"]["side"]) == (1, "ffn_out", "b")
    done = svf("diff", bad, file, "--model", place / "model", "--tokens", TOKENS, "--json")
    assert (done.code, done.json["culprit"]["side"]) == (1, "a")


def test_trees_are_judged_when_model_and_tokens_are_told(place: Path) -> None:
    pair = (place / "tree", place / "tree-jax")
    flat = svf("diff", *pair, "--json")
    assert (flat.code, flat.json["outcome"]) == (5, "incomplete")
    assert "give --model and --tokens" in flat.json["verdict"]
    told = svf("diff", *pair, "--model", place / "model", "--tokens", TOKENS, "--json")
    assert (told.code, told.json["outcome"]) == (0, "agree"), told.json["verdict"]
    refused(svf("diff", *pair, "--model", place / "model"), 2, "--model and --tokens")


def test_two_stage_files_are_judged_from_the_files_beside_them(place: Path, tmp_path: Path) -> None:
    pair = [place / name / "layer-1" / "ffn_out.bin" for name in ("tree", "tree-jax")]
    alone = svf("diff", *pair, "--json")
    assert alone.code == 5
    assert "bits (relative difference" in alone.json["verdict"]
    told = ("--model", place / "model", "--tokens", TOKENS, "--json")
    done = svf("diff", *pair, *told)
    assert (done.code, [row["key"] for row in done.json["rows"]]) == (0, ["layers.1.ffn_out"])
    changed = copy(place / "tree-jax", tmp_path / "tree")
    values = np.frombuffer(pair[1].read_bytes()[12:], "<f4") * np.float32(1.001)
    write_aprt(changed / "layer-1" / "ffn_out.bin", 1, values)
    done = svf("diff", pair[0], changed / "layer-1" / "ffn_out.bin", *told)
    assert (done.code, done.json["culprit"]["side"]) == (1, "b")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.reshape(5, -1).T.reshape(-1), "the same values in another order"),
        (lambda x: -x, "as far from a as zero would be"),
    ],
)
def test_two_files_that_no_rounding_makes_diverge(place: Path, tmp_path: Path, change: Any, words: str) -> None:
    path = place / "tree" / "layer-1" / "ffn_out.bin"
    values = np.frombuffer(path.read_bytes()[12:], "<f4")
    (tmp_path / "layer-1").mkdir()
    write_aprt(tmp_path / "layer-1" / "ffn_out.bin", 1, np.ascontiguousarray(change(values)))
    done = svf("diff", path, tmp_path / "layer-1" / "ffn_out.bin", "--json")
    assert (done.code, done.json["outcome"]) == (1, "diverged")
    assert words in done.json["verdict"]


def test_the_same_bytes_under_another_label_are_told_as_that(place: Path, tmp_path: Path) -> None:
    def relabel(tensors: dict[str, np.ndarray]) -> None:
        stage = tensors["layers.0.ffn_out"]
        tensors["layers.0.ffn_out"] = stage.reshape(stage.shape[::-1])

    changed = change_dump(copy(place / "both" / "torch", tmp_path / "changed"), relabel)
    done = svf("diff", place / "both" / "torch", changed, "--json")
    (row,) = [row for row in done.json["rows"] if row["key"] == "layers.0.ffn_out"]
    assert row["verdict"] == "shape"
    assert "the same bytes, in the same order: only the label of the shape differs" in row["note"]


def test_checkpoints_under_a_swapped_label(place: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    for how, words in (
        (lambda w: w.reshape(w.shape[::-1]), "the same bytes in the same order"),
        (lambda w: np.ascontiguousarray(w.T), "b holds a's transpose"),
    ):
        other = copy(place / "model", tmp_path / words[:4].strip())
        with_tensors(other / "model.safetensors", lambda t, how=how: t.update({name: how(t[name])}))
        (row,) = [r for r in svf("diff", place / "model", other, "--json").json["rows"] if r["tensor"] == name]
        assert words in row["note"]
        assert row["status"] == ("shape" if "bytes" in words else "transposed")


# -- what is where ----------------------------------------------------------------------------------------------


def test_a_folder_of_two_dumps_is_compared(place: Path, tmp_path: Path) -> None:
    done = svf("diff", place / "both", "--json")
    assert done.code == 0
    assert [Path(done.json[letter]["source"]).name for letter in "ab"] == ["torch", "jax"]
    refused(svf("diff", place / "both" / "torch"), 2, "two dumps")
    refused(svf("diff", tmp_path / "none"), 4, "no such")


def test_what_is_not_there_or_not_finished(place: Path, tmp_path: Path) -> None:
    ours = place / "both" / "torch"
    refused(svf("diff", ours, tmp_path / "missing"), 4, "missing")
    refused(svf("diff", tmp_path / "missing", ours), 4, "missing")
    (tmp_path / "empty").mkdir()
    refused(svf("diff", ours, tmp_path / "empty"), 4, "empty", "holds no dump")
    (tmp_path / "empty" / ".svf-run.json").write_text("{}")
    refused(svf("diff", ours, tmp_path / "empty"), 4, "unfinished run", "--resume")
    killed = copy(ours, tmp_path / "killed")
    (killed / MANIFEST_FILE).unlink()
    refused(svf("diff", ours, killed), 3, "not written to its end")


def test_another_model_is_told_by_its_field(place: Path, torch_backend: Backend, tmp_path: Path) -> None:
    other = copy(place / "model", tmp_path / "model")
    with_json(other / "config.json", lambda config: config.update(rms_norm_eps=1e-3))
    trace(other, torch_backend, out=tmp_path / "dump")
    refused(svf("diff", place / "both" / "torch", tmp_path / "dump"), 3, "different models", "rms_norm_eps", "0.001")
    refused(
        svf("diff", place / "both" / "torch", place / "both" / "jax", "--model", other),
        3,
        "not the model",
        "rms_norm_eps",
    )
    same = copy(place / "model", tmp_path / "same")
    with_json(same / "config.json", lambda config: config.update(transformers_version="9"))
    trace(same, torch_backend, out=tmp_path / "again")
    assert svf("diff", place / "both" / "torch", tmp_path / "again").code == 0


# -- sums -------------------------------------------------------------------------------------------------------


def test_a_tensor_that_is_not_what_the_manifest_says_is_refused_by_name(place: Path, tmp_path: Path) -> None:
    changed = copy(place / "both" / "jax", tmp_path / "changed")

    def move(tensors: dict[str, np.ndarray]) -> None:
        tensors["layers.1.ffn_up"][0, 0] += 1

    with_tensors(changed / "layer-1.safetensors", move)
    refused(svf("diff", place / "both" / "torch", changed), 3, "layer-1.safetensors", "layers.1.ffn_up", "sha256")
    refused(svf("audit", changed), 3, "layer-1.safetensors", "layers.1.ffn_up", "sha256")


def test_a_replays_tensor_and_offsets_are_held_to_their_sums(made: Path, bundle: Path, tmp_path: Path) -> None:
    assert svf("replay", made / "components", "--backend", "torch", "--out", tmp_path / "dump").code == 0
    key = f"tensor.{GATE}.scaled_s"
    file = tmp_path / "dump" / "layer-2.safetensors"
    assert key in tensors_of(file)
    with_tensors(file, lambda t: t.update({key: t[key] * np.float32(2)}))
    refused(svf("diff", made / "components", tmp_path / "dump"), 3, "layer-2.safetensors", key, "sha256")
    # A rolled offsets file: the recorded stages are right.
    name = offsets_key(GATE)
    with_tensors(bundle / OFFSETS_FILE, lambda t: t.update({name: np.roll(t[name], 1)}))
    refused(svf("replay", bundle, "--backend", "torch"), 3, OFFSETS_FILE, GATE, "sha256")
    assert COMPONENTS_FILE != OFFSETS_FILE


# -- options that would do nothing ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    ["--strict-reference", "--strict-stage-tolerances", "--strict-current-python"],
)
def test_gates_of_replays_say_nothing_to_forwards(place: Path, option: str) -> None:
    refused(svf("diff", place / "both" / "torch", place / "both" / "jax", option), 2, option, "forward dump")
    refused(svf("diff", place / "tree", place / "tree", option), 2, option)


def test_options_that_say_nothing_to_a_kind_are_refused(place: Path, made: Path) -> None:
    report, model = made / "components.json", place / "model"
    for pair, options in (
        ((report, report), ("--model", model)),
        ((report, report), ("--components", made / "components")),
        ((report, report), ("--layers", "1")),
        ((report, report), ("--no-rerun",)),
        ((model, model), ("--stages", "ffn_gate")),
        ((model, model), ("--precision", "exact")),
        ((model, model), ("--strict-reference",)),
        ((made / "components", made / "components"), ("--tokens", "1,2")),
        ((made / "components", made / "components"), ("--model", model)),
        ((place / "tree", place / "tree"), ("--explain-order",)),
    ):
        refused(svf("diff", *pair, *options), 2, options[0])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("forward", "--layout", "vh"), "--layout vh needs --adapted"),
        (("forward", "--layout", "vh", "--backend", "torch"), "--layout vh needs --adapted"),
        (("forward", "--resume"), "--resume needs --out"),
        (("forward", "--resume", "--backend", "jax"), "--resume needs --out"),
        (("forward", "--format", "aprt", "--backend", "jax"), "--format aprt needs --out"),
        (("forward", "--timeout", "5", "--backend", "jax"), "--timeout applies to the two processes"),
        (("forward", "--top", "5", "--backend", "jax"), "--top applies to"),
        (("replay", "--resume"), "--resume needs --out"),
        (("replay", "--chunk-rows", "0"), "--chunk-rows"),
        (("replay", "--dump", "none", "--out", "x"), "--dump none"),
        (("replay", "--timeout", "5", "--backend", "jax"), "--timeout applies to the two processes"),
    ],
)
def test_an_option_without_effect_is_refused(words: tuple[str, ...], said: str) -> None:
    refused(svf(*words), 2, said)


def test_a_stage_alone_on_both_backends_is_judged(place: Path) -> None:
    run = ("forward", place / "model", "--tokens", TOKENS, "--no-production", "--json")
    done = svf(*run, "--stages", "ffn_gate,attn_norm", "--layers", "1")
    assert (done.code, done.json["outcome"]) == (0, "agree"), done.json["verdict"]
    assert [row["key"] for row in done.json["rows"]] == ["layers.1.attn_norm", "layers.1.ffn_gate"]
    assert all(row["verdict_a"] and row["verdict_b"] for row in done.json["rows"])
