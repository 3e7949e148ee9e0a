"""What a recorded forward may hold: dtypes, forms, given inputs, steps not recorded, and several faults at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from forward_models import MODELS, MemoryWeights, change_dump, dumped, tokens_of, write_model
from helpers import Result, svf, tensors_of

from stages.files.aprt import write_aprt
from stages.files.forward_dump import forward_key, parse_key
from stages.files.tensorfile import write_tensors
from stages.judge.recorded_run import order_of
from stages.run.forward import oracles
from stages.spec.forward import forward_pipeline, producers

pytestmark = pytest.mark.slow

TOKENS = tokens_of(9)
IDS = ",".join(map(str, TOKENS))
DTYPES = ("float32", "bfloat16", "float16")
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models and our right dumps of them: `<model>-<dtype>` and `<model>-<dtype>-dump`."""
    folder = tmp_path_factory.mktemp("recorded")
    for name in ("qwen3", "qwen2"):
        for dtype in DTYPES:
            model = write_model(folder / f"{name}-{dtype}", MODELS[name], dtype)
            command = ["forward", model, "--tokens", IDS, "--no-production", "--backend", "torch"]
            done = svf(*command, "--out", folder / f"{name}-{dtype}-dump")
            assert done.code == 0, done.err
    return folder


def changed(made: Path, out: Path, change: Callable[[Tensors], object], dtype: str = "float32") -> Path:
    """A copy of a right dump after `change(tensors)`."""
    return change_dump(Path(shutil.copytree(made / f"qwen3-{dtype}-dump", out)), change)


def recorded(made: Path, out: Path, change: Callable[[Tensors], object], name: str = "qwen3-float32") -> Result:
    """The audit of a right dump's stages after `change(tensors)`, handed over as another program's."""
    tensors = dumped(made / f"{name}-dump")
    change(tensors)
    write_tensors(out, {key: np.ascontiguousarray(a) for key, a in tensors.items()})
    return svf("audit", out, "--model", made / name, "--tokens", IDS, "--json")


def sound(done: Result) -> bool:
    assert (done.code, done.json["outcome"]) == (0, "sound"), done.json["verdict"]
    return True


def blamed(done: Result) -> tuple[str, int | None, str]:
    assert (done.code, done.json["outcome"]) == (1, "faulty"), done.json["verdict"]
    found = done.json["culprit"]
    return found["verdict"], found["layer"], found["stage"]


def rows(done: Result) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in done.json["rows"]}


# All faults, not the first.


def two_faults(t: Tensors) -> None:
    """A factor in a product of layer 0, and RoPE's result reversed in layer 1, which attn_scores do not see."""
    t["layers.0.ffn_gate"] = (t["layers.0.ffn_gate"].astype(np.float32) * 1.25).astype(t["layers.0.ffn_gate"].dtype)
    for name in ("q_post_rope", "k_post_rope"):
        t[f"layers.1.{name}"] = np.ascontiguousarray(t[f"layers.1.{name}"][..., ::-1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_fault_is_told(made: Path, tmp_path: Path, dtype: str) -> None:
    right, wrong = made / f"qwen3-{dtype}-dump", changed(made, tmp_path / "wrong", two_faults, dtype)
    first = [("bug", 0, "ffn_gate")]
    # What was made from the gate before it was changed is wrong from its recorded input too.
    rest = [("bug", 0, "ffn_silu"), ("bug", 1, "q_post_rope"), ("bug", 1, "k_post_rope")]
    for done in (svf("audit", wrong, "--json"), svf("diff", right, wrong, "--no-rerun", "--json")):
        assert done.code == 1
        found = [(c["verdict"], c["layer"], c["stage"]) for c in done.json["culprits"]]
        assert found == first + rest
        assert done.json["culprit"] == done.json["culprits"][0]
        assert all(c["hint"] for c in done.json["culprits"][:1])
        told = "; 3 more fail from their own inputs: ffn_silu of layer 0, q_post_rope of layer 1"
        assert told in done.json["verdict"]
    for done in (svf("audit", right, "--json"), svf("diff", right, right, "--json")):
        assert (done.code, done.json["culprit"], done.json["culprits"]) == (0, None, [])
        assert "more" not in done.json["verdict"]


# What the causal mask throws away.

BLANKS = (0.0, 1e30, np.nan, np.inf)


def blanked(value: float) -> Callable[[Tensors], object]:
    """Scores of keys after their query replaced, in every layer."""

    def change(t: Tensors) -> None:
        for key in [key for key in t if key.endswith("attn_scores")]:
            after = ~np.tri(len(TOKENS), dtype=bool)
            t[key] = np.where(after, np.asarray(value).astype(t[key].dtype), t[key])

    return change


def one_key_seen(t: Tensors) -> None:
    """A score that the mask keeps: the first key's, of the last query."""
    t["layers.1.attn_scores"][2, -1, 0] *= 2


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_keys_to_come_are_not_judged(made: Path, tmp_path: Path, dtype: str) -> None:
    right = made / f"qwen3-{dtype}-dump"
    for number, value in enumerate(BLANKS):
        other = changed(made, tmp_path / str(number), blanked(value), dtype)
        done = svf("audit", other, "--json")
        assert (done.code, done.json["outcome"]) == (0, "sound"), done.json["verdict"]
        done = svf("diff", right, other, "--no-rerun", "--json")
        assert done.code == 0, done.json["verdict"]
        row = rows(done)["layers.1.attn_scores"]
        assert (row["byte_match"], row["max_abs"], row["mismatched"]) == (False, 0, 0)
        assert row["sha256_a"] != row["sha256_b"]
        assert "the causal mask removes them" in row["note"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_that_the_mask_keeps_are_judged(made: Path, tmp_path: Path, dtype: str) -> None:
    def both(t: Tensors) -> None:
        blanked(0.0)(t)
        one_key_seen(t)

    wrong = changed(made, tmp_path / "wrong", both, dtype)
    for done in (svf("audit", wrong, "--json"), svf("diff", made / f"qwen3-{dtype}-dump", wrong, "--json")):
        assert (done.code, done.json["culprit"]["layer"], done.json["culprit"]["stage"]) == (1, 1, "attn_scores")
        assert "one element alone is wrong, at [2, 8, 0]" in done.json["culprit"]["hint"]


def test_a_hint_at_scores_needs_only_those_that_the_mask_keeps(made: Path, tmp_path: Path) -> None:
    def unscaled(t: Tensors) -> None:
        t["layers.0.attn_scores"] = t["layers.0.attn_scores"] * np.float32(32**0.5)
        blanked(np.nan)(t)

    done = svf("audit", changed(made, tmp_path / "wrong", unscaled), "--json")
    assert done.json["culprit"]["hint"] == "the scale 1/sqrt(head_dim) is missing"


# A dtype per stage.

NARROW = ("bfloat16", "float16")
STORED = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


def wide_logits(made: Path, dtype: str, t: Tensors) -> None:
    """Logits in float32 from narrow operands."""
    head = model_tensors(made, dtype)["model.embed_tokens.weight"].astype(np.float32)
    t["lm_head"] = t["final_norm"].astype(np.float32) @ head.T


def model_tensors(made: Path, dtype: str) -> Tensors:
    return tensors_of(made / f"qwen3-{dtype}" / "model.safetensors")


def widened(t: Tensors) -> None:
    t.update({key: a.astype(np.float32) for key, a in t.items()})


@pytest.mark.parametrize("dtype", NARROW)
def test_wide_logits_in_a_narrow_run_are_judged_as_stored(made: Path, tmp_path: Path, dtype: str) -> None:
    name = f"qwen3-{dtype}"
    for stored, change in {"as computed": lambda t: None, "in float32": widened}.items():

        def logits(t: Tensors, change: Callable[[Tensors], None] = change) -> None:
            wide_logits(made, dtype, t)
            change(t)

        done = recorded(made, tmp_path / "right.safetensors", logits, name)
        assert sound(done)
        assert done.json["facts"]["dtype"] == dtype
        assert done.json["facts"]["dtype taken"] == f"most stored values are of {dtype}; lm_head: float32", stored

        def wrong(t: Tensors, logits: Callable[[Tensors], None] = logits) -> None:
            logits(t)
            t["lm_head"] = t["lm_head"] * np.float32(1 + 2.0**-12)  # seen in float32, below half a narrow step

        assert blamed(recorded(made, tmp_path / "wrong.safetensors", wrong, name)) == ("bug", None, "lm_head")
    done = recorded(made, tmp_path / "all.safetensors", widened, name)
    assert sound(done)
    assert done.json["facts"]["dtype taken"] == f"every stored value is one of {dtype}"


def test_what_holds_no_finite_number_says_nothing_of_the_dtype(made: Path, tmp_path: Path) -> None:
    """Once most stages were taken as bfloat16, which holds NaN, and right float32 ones before them called wrong."""

    def broken(t: Tensors) -> None:
        after = [key for key in t if key in ("final_norm", "lm_head") or key.startswith(("layers.1.", "layers.2."))]
        t["layers.0.post_ffn_residual"][3, 5] = np.nan
        t.update({key: np.full_like(t[key], np.nan) for key in after})

    done = recorded(made, tmp_path / "broken.safetensors", broken, "qwen3-float32")
    assert done.json["facts"]["dtype"] == "float32"
    assert blamed(done) == ("nonfinite", 0, "post_ffn_residual")


@pytest.mark.parametrize("dtype", NARROW)
def test_our_own_dump_may_hold_wide_logits(made: Path, tmp_path: Path, dtype: str) -> None:
    assert sound(svf("audit", changed(made, tmp_path / "x", lambda t: wide_logits(made, dtype, t), dtype), "--json"))


@pytest.mark.parametrize("dtype", NARROW)
def test_float32_tables_in_a_narrow_run_are_judged_as_stored(made: Path, tmp_path: Path, dtype: str) -> None:
    """Whether the program turned with them as they are, or cast them first."""

    def wide_tables(t: Tensors) -> None:
        for name, function in (("rope_cos", np.cos), ("rope_sin", np.sin)):
            t[name] = function(t["rope_angle"].astype(np.float64)).astype(np.float32)

    def turned(t: Tensors) -> None:
        wide_tables(t)
        for key in [key for key in t if key.endswith("_post_rope")]:
            x = t[key.replace("_post_rope", "_norm")].astype(np.float32)
            half = x.shape[-1] // 2
            rotated = np.concatenate((-x[..., half:], x[..., :half]), axis=-1)
            t[key] = (x * t["rope_cos"][:, None] + rotated * t["rope_sin"][:, None]).astype(t[key].dtype)

    name = f"qwen3-{dtype}"
    assert sound(recorded(made, tmp_path / "cast.safetensors", wide_tables, name))

    def as_they_are(t: Tensors) -> None:
        turned(t)
        downstream(t)

    def downstream(t: Tensors) -> None:
        for key in [key for key in t if key.startswith("layers.") and not key.endswith(("_norm", "_post_rope"))]:
            del t[key]  # made from the rotation before

    done = recorded(made, tmp_path / "wide.safetensors", as_they_are, name)
    assert {row["verdict"] for key, row in rows(done).items() if key.endswith("_post_rope")} <= {"exact", "rounding"}

    def backwards(t: Tensors) -> None:
        wide_tables(t)
        t["layers.1.q_post_rope"] = t["layers.1.q_post_rope"][..., ::-1]

    assert blamed(recorded(made, tmp_path / "wrong.safetensors", backwards, name)) == ("bug", 1, "q_post_rope")


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("stage", ["attn_scores", "attn_softmax"])
def test_float32_attention_inside_a_narrow_run(made: Path, tmp_path: Path, dtype: str, stage: str) -> None:
    """Scores and probabilities kept in float32, as fused kernels do: not rounded before the scale, or cast after."""

    def wide(t: Tensors) -> None:
        for n in range(2):
            q, k = (
                t[f"layers.{n}.{name}"].astype(np.float32).swapaxes(0, 1) for name in ("q_post_rope", "k_post_rope")
            )
            scores = (q @ np.repeat(k, 2, axis=0).swapaxes(1, 2) * np.float32(32**-0.5)).astype(np.float32)
            if stage == "attn_softmax":
                scores = t[f"layers.{n}.attn_scores"].astype(np.float32)
            masked = np.where(np.tri(len(TOKENS), dtype=bool), scores, -np.inf)
            p = np.exp(masked - masked.max(axis=-1, keepdims=True))
            p = (p / p.sum(axis=-1, keepdims=True)).astype(np.float32)
            t[f"layers.{n}.attn_scores"] = scores if stage == "attn_scores" else t[f"layers.{n}.attn_scores"]
            narrow = STORED[dtype]
            t[f"layers.{n}.attn_softmax"] = p if stage == "attn_softmax" else p.astype(narrow)
            v = np.repeat(t[f"layers.{n}.qkv_bias"][:, -64:].reshape(-1, 2, 32).swapaxes(0, 1), 2, axis=0)
            out = p.astype(narrow).astype(np.float32) @ v.astype(np.float32)
            t[f"layers.{n}.attention"] = out.swapaxes(0, 1).reshape(len(TOKENS), -1).astype(narrow)
        only("q_post_rope k_post_rope qkv_bias attn_scores attn_softmax attention")(t)  # the rest is of the run before

    done = recorded(made, tmp_path / "right.safetensors", wide, f"qwen3-{dtype}")
    judged = {key: row["verdict"] for key, row in rows(done).items() if ".att" in key and "norm" not in key}
    assert len(judged) == 6
    assert set(judged.values()) <= {"exact", "rounding"}, done.json["verdict"]

    def half(t: Tensors) -> None:
        wide(t)
        t[f"layers.1.{stage}"] = t[f"layers.1.{stage}"] * np.float32(1 + 2.0**-10)

    # So little of the scores is within what q and k may have been before they were rounded, of which nothing was
    # recorded; but the probabilities are not of such scores.
    wrong = recorded(made, tmp_path / "wrong.safetensors", half, f"qwen3-{dtype}")
    assert blamed(wrong) == ("bug", 1, "attn_softmax")


def test_one_narrow_stage_does_not_make_a_narrow_run(made: Path, tmp_path: Path) -> None:
    def one(t: Tensors) -> None:
        gate = t["layers.1.ffn_gate"].astype(STORED["bfloat16"])
        t["layers.1.ffn_gate"] = gate.astype(np.float32)

    done = recorded(made, tmp_path / "x.safetensors", one)
    assert done.json["facts"]["dtype"] == "float32"
    assert ("precision", 1, "ffn_gate") in {(c["verdict"], c["layer"], c["stage"]) for c in done.json["culprits"]}


@pytest.mark.cover(1)
@pytest.mark.parametrize("stored", NARROW)
@pytest.mark.parametrize("stage", ["attn_norm", "attn_scores", "attention", "ffn_gate", "ffn_up", "post_attn_residual"])
def test_a_stage_stored_in_fewer_bits_than_were_used_is_no_fault(
    made: Path, tmp_path: Path, stage: str, stored: str
) -> None:
    """The program went on with float32; what reads the stage is judged with what storing it lost."""

    def narrow(t: Tensors) -> None:
        t[f"layers.1.{stage}"] = t[f"layers.1.{stage}"].astype(STORED[stored])

    done = recorded(made, tmp_path / "x.safetensors", narrow)
    assert sound(done)
    notes = [row["note"] for row in done.json["rows"] if row["note"]]
    assert any(f"{stage} before it was stored in fewer bits" in note for note in notes)
    reader = next(row["stage"] for row in done.json["rows"] if row["note"])

    def wrong(t: Tensors) -> None:
        narrow(t)
        t[f"layers.1.{reader}"] = t[f"layers.1.{reader}"] * np.float32(1.25)

    culprits = recorded(made, tmp_path / "x.safetensors", wrong).json["culprits"]
    assert ("bug", 1, reader) in {(c["verdict"], c["layer"], c["stage"]) for c in culprits}


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("way", ["row by row", "whole"])
def test_bytes_read_as_another_type_are_named(made: Path, tmp_path: Path, dtype: str, way: str) -> None:
    """Two-byte logits handed out as four-byte ones: half is garbage, the rest 0. All else is judged."""

    def misread(t: Tensors) -> None:
        a = t["lm_head"].reshape(len(TOKENS) if way == "row by row" else 1, -1)
        garbage = a.view(np.float32)
        t["lm_head"] = np.concatenate((garbage, np.zeros_like(garbage)), axis=-1).reshape(t["lm_head"].shape)

    done = recorded(made, tmp_path / "x.safetensors", misread, f"qwen3-{dtype}")
    assert blamed(done) == ("bug", None, "lm_head")
    assert f"{dtype} bytes were read as float32" in done.json["verdict"]
    assert {row["verdict"] for key, row in rows(done).items() if key != "lm_head"} <= {"exact", "rounding"}


def test_bfloat16_bytes_read_as_float16_are_named_and_what_follows_is_judged(made: Path, tmp_path: Path) -> None:
    def misread(t: Tensors) -> None:
        t["layers.0.ffn_gate"] = t["layers.0.ffn_gate"].view(np.float16)

    done = recorded(made, tmp_path / "x.safetensors", misread, "qwen3-bfloat16")
    assert blamed(done) == ("bug", 0, "ffn_gate")
    assert len(done.json["culprits"]) == 1
    assert "bfloat16 bytes were read as float16" in done.json["culprit"]["hint"]


# Float64.


def test_float64_that_holds_float32_is_judged_as_that(made: Path, tmp_path: Path) -> None:
    done = recorded(
        made, tmp_path / "x.safetensors", lambda t: t.update({k: a.astype(np.float64) for k, a in t.items()})
    )
    assert sound(done)
    assert (done.json["facts"]["dtype"], done.json["coverage"]["judged"]) == ("float32", 45)
    assert done.json["facts"]["dtype taken"] == "every stored value is one of float32"


def in_float64(made: Path, wrong: str | None = None) -> Callable[[Tensors], None]:
    """Everything computed again in float64 by the oracle's own functions, one of them wrong by 1e-5."""

    def change(t: Tensors) -> None:
        config = MODELS["qwen3"].config("float32")
        weights = MemoryWeights(model_tensors(made, "float32"))
        path = forward_pipeline(config, "float64")
        given = {"tokens": np.asarray(TOKENS, np.int32), "positions": np.arange(len(TOKENS), dtype=np.int32)}
        for place in order_of(path, [parse_key(key) for key in t]):
            stage = path[place[1]]
            sources = producers(path, stage, place[0], config.num_hidden_layers)
            inputs = {name: t[forward_key(source)] for name, source in sources.items()} | given
            parts = [oracle.value for _, oracle in oracles(path, config, stage, inputs, weights, place[0])]
            value = np.concatenate(parts, axis=-1)
            t[forward_key(place)] = value * (1 + 1e-5) if forward_key(place) == wrong else value

    return change


def test_a_float64_run_is_judged_as_far_as_the_bounds_of_float32_go(made: Path, tmp_path: Path) -> None:
    done = recorded(made, tmp_path / "x.safetensors", in_float64(made))
    assert sound(done)
    assert (done.json["facts"]["dtype"], done.json["coverage"]["judged"]) == ("float64", 45)
    assert "to float32's resolution" in done.json["facts"]["dtype taken"]
    for place in ((0, "ffn_gate"), (1, "post_attn_residual"), (1, "attention")):
        change = in_float64(made, forward_key(place))
        assert blamed(recorded(made, tmp_path / "x.safetensors", change)) == ("bug", *place), place


# The forms in which programs write.


def test_another_count_of_tokens_is_no_fault_of_a_stage(made: Path, tmp_path: Path) -> None:
    done = recorded(made, tmp_path / "x.safetensors", lambda t: None)
    assert sound(done)
    for ids in ("1,2,3,4,5,6,7,8", "1"):
        done = svf("audit", tmp_path / "x.safetensors", "--model", made / "qwen3-float32", "--tokens", ids)
        assert done.code == 3
        assert f"the dump has 9 tokens, but --tokens has {len(ids.split(','))}" in done.error


def heads_first(t: Tensors) -> None:
    """As attention has them: a batch axis, then heads; the output of attention before heads are joined."""
    for key, a in list(t.items()):
        if key.endswith(("q_norm", "k_norm", "_post_rope")):
            t[key] = a.swapaxes(0, 1)[None]
        elif key.endswith("attention"):
            t[key] = a.reshape(len(a), 4, 32).swapaxes(0, 1)[None]
        elif key.endswith(("attn_scores", "attn_softmax")):
            t[key] = a.swapaxes(0, 1)


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [9, 4])
def test_heads_first_is_sound(made: Path, tmp_path: Path, dtype: str, count: int) -> None:
    """Of 4 tokens and 4 heads the shape does not tell; the values do."""
    ids = ",".join(map(str, TOKENS[:count]))
    model = made / f"qwen3-{dtype}"
    command = ["forward", model, "--tokens", ids, "--no-production", "--backend", "reference"]
    assert svf(*command, "--out", tmp_path / "dump").code == 0
    right = dumped(tmp_path / "dump")
    heads_first(right)
    write_tensors(tmp_path / "x.safetensors", {key: np.ascontiguousarray(a) for key, a in right.items()})
    given = ("--model", model, "--tokens", ids, "--json")
    done = svf("audit", tmp_path / "x.safetensors", *given)
    assert sound(done)
    assert done.json["coverage"]["judged"] == 45
    assert all("recorded" in (rows(done)[f"layers.{n}.q_post_rope"]["note"] or "") for n in range(2))
    right["layers.1.q_post_rope"] = right["layers.1.q_post_rope"][..., ::-1]
    write_tensors(tmp_path / "x.safetensors", {key: np.ascontiguousarray(a) for key, a in right.items()})
    assert blamed(svf("audit", tmp_path / "x.safetensors", *given)) == ("bug", 1, "q_post_rope")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tree_of_the_last_position_is_no_fault(made: Path, tmp_path: Path, dtype: str) -> None:
    model = made / f"qwen3-{dtype}"
    command = ["forward", model, "--tokens", IDS, "--no-production", "--backend", "torch", "--positions", "last"]
    assert svf(*command, "--out", tmp_path / "dump").code == 0
    tensors = {key: a.astype(np.float32) for key, a in dumped(tmp_path / "dump").items()}
    for key, a in tensors.items():
        place = parse_key(key)
        assert place is not None
        file = tmp_path / "tree" / ("" if place[0] is None else f"layer-{place[0]}") / f"{place[1]}.bin"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_aprt(file, place[0], a.reshape(-1))
    given = ("--model", model, "--tokens", IDS)
    done = svf("audit", tmp_path / "tree", *given, "--json")
    assert done.json["culprit"] is None, done.json["verdict"]
    same = svf("audit", tmp_path / "dump", "--json")
    assert done.json["coverage"] == same.json["coverage"]
    assert svf("import", tmp_path / "tree", tmp_path / "back", *given).code == 0
    assert svf("audit", tmp_path / "back", "--json").json["coverage"] == same.json["coverage"]


# Inputs are not outputs, and steps that were not recorded.

# What people hand over of one operation.
OPERATIONS = (
    "q_norm k_norm rope_cos rope_sin q_post_rope k_post_rope",
    "q_post_rope k_post_rope qkv_bias attention",
    "ffn_norm ffn_gate ffn_up ffn_swigl ffn_out",
    "ffn_gate ffn_silu",
    "attn_norm qkv_bias",
    "q_post_rope k_post_rope attn_scores attn_softmax",
    "ffn_silu ffn_up ffn_swigl",
    "attention attn_out",
    "final_norm lm_head",
)


def only(stages: str) -> Callable[[Tensors], None]:
    def change(t: Tensors) -> None:
        for key in [key for key in t if key.rpartition(".")[2] not in stages.split()]:
            del t[key]

    return change


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("end", [0, -1], ids=["the first wrong", "the last wrong"])
@pytest.mark.parametrize("stages", OPERATIONS)
def test_one_operation_is_sound_and_its_inputs_are_judged_too(
    made: Path, tmp_path: Path, dtype: str, end: int, stages: str
) -> None:
    """What goes into it is judged from the tokens on, through whatever lies between."""
    name = f"qwen3-{dtype}"
    done = recorded(made, tmp_path / "x.safetensors", only(stages), name)
    assert sound(done)
    assert done.json["coverage"]["judged"] == len(done.json["rows"])
    first, at = stages.split()[0], stages.split()[end]
    assert "judged from" in rows(done)[f"layers.1.{first}" if first != "final_norm" else first]["note"]

    def wrong(t: Tensors) -> None:
        only(stages)(t)
        key = next(key for key in t if key.rpartition(".")[2] == at)
        t[key] = np.ascontiguousarray(t[key][..., ::-1])

    verdict, _, stage = blamed(recorded(made, tmp_path / "x.safetensors", wrong, name))
    assert (verdict, stage) == ("bug", at)


def test_a_stage_alone_is_judged_from_the_tokens(made: Path, tmp_path: Path) -> None:
    for stages in ("ffn_norm", "final_norm", "ffn_norm attn_norm", "lm_head"):
        assert sound(recorded(made, tmp_path / "x.safetensors", only(stages)))


def test_layer_outputs_alone_show_which_layer_is_wrong(made: Path, tmp_path: Path) -> None:
    outputs = "embedding post_ffn_residual final_norm lm_head"
    done = recorded(made, tmp_path / "x.safetensors", only(outputs))
    assert sound(done)
    row = rows(done)["layers.1.post_ffn_residual"]
    assert row["note"].startswith("judged from layers.0.post_ffn_residual through attn_norm, qkv_matmul, q_norm")
    assert 1e-7 < row["floor"] < 1e-5

    def wrong(t: Tensors) -> None:
        only(outputs)(t)
        t["layers.1.post_ffn_residual"] = t["layers.1.post_ffn_residual"] * np.float32(1 + 2e-4)

    assert blamed(recorded(made, tmp_path / "x.safetensors", wrong)) == ("bug", 1, "post_ffn_residual")


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "stage"),
    [(name, stage) for name in ("qwen3", "qwen2") for stage in forward_pipeline(MODELS[name].config("float32"))],
)
def test_any_one_stage_may_be_missing(made: Path, tmp_path: Path, name: str, stage: str, dtype: str) -> None:
    def without(t: Tensors) -> None:
        gone = [key for key in t if key.rpartition(".")[2] == stage]
        assert gone
        for key in gone:
            del t[key]

    done = recorded(made, tmp_path / "x.safetensors", without, f"{name}-{dtype}")
    assert sound(done)
    assert done.json["coverage"]["judged"] == len(done.json["rows"])


def test_a_copy_is_judged_as_its_original(made: Path, tmp_path: Path) -> None:
    """Qwen3 has no biases: `qkv_bias` is the product, also where that was recorded under one name alone."""

    def without(t: Tensors) -> None:
        for n in range(2):
            del t[f"layers.{n}.qkv_matmul"]

    done = recorded(made, tmp_path / "x.safetensors", without)
    assert sound(done)
    assert rows(done)["layers.0.qkv_bias"]["through"] == []

    def wrong(t: Tensors) -> None:
        without(t)
        t["layers.1.qkv_bias"] = t["layers.1.qkv_bias"] * np.float32(1.001)

    assert blamed(recorded(made, tmp_path / "x.safetensors", wrong)) == ("bug", 1, "qkv_bias")


# Steps that a program lacks, so that nothing of them was recorded: what is done to a right dump, who is blamed, why.


def no_final_norm(made: Path, dtype: str, t: Tensors) -> None:
    head = model_tensors(made, dtype)["model.embed_tokens.weight"].astype(np.float32)
    stored = t["lm_head"].dtype
    t["lm_head"] = (t["layers.1.post_ffn_residual"].astype(np.float32) @ head.T).astype(stored)
    del t["final_norm"]


def silu_of_the_product(made: Path, dtype: str, t: Tensors) -> None:
    for n in range(2):
        gate, up = (t[f"layers.{n}.{name}"].astype(np.float32) for name in ("ffn_gate", "ffn_up"))
        both = gate * up
        t[f"layers.{n}.ffn_swigl"] = (both / (1 + np.exp(-both))).astype(t[f"layers.{n}.ffn_swigl"].dtype)
        down = model_tensors(made, dtype)[f"model.layers.{n}.mlp.down_proj.weight"].astype(np.float32)
        out = t[f"layers.{n}.ffn_swigl"].astype(np.float32) @ down.T
        t[f"layers.{n}.ffn_out"] = out.astype(t[f"layers.{n}.ffn_swigl"].dtype)
        del t[f"layers.{n}.ffn_silu"], t[f"layers.{n}.post_ffn_residual"]


def no_q_norm(made: Path, dtype: str, t: Tensors) -> None:
    """The queries of layer 1 turned as they are, without their norm."""
    q = t["layers.1.qkv_bias"][:, :128].reshape(len(TOKENS), 4, 32).astype(np.float32)
    rotated = np.concatenate((-q[..., 16:], q[..., :16]), axis=-1)
    cos, sin = (t[name].astype(np.float32)[:, None] for name in ("rope_cos", "rope_sin"))
    t["layers.1.q_post_rope"] = (q * cos + rotated * sin).astype(t["rope_cos"].dtype)
    for name in ("q_norm", "attn_scores"):
        del t[f"layers.1.{name}"]


LACKING = {
    "the final norm": (no_final_norm, (None, "lm_head"), "as if final_norm were left out"),
    "silu before the product": (
        silu_of_the_product,
        (0, "ffn_swigl"),
        "as if layers.0.ffn_silu came after ffn_swigl, not before it",
    ),
    "a norm of the queries": (no_q_norm, (1, "q_post_rope"), "as if layers.1.q_norm were left out"),
}


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lacking", LACKING)
def test_a_step_that_the_program_lacks_is_named(made: Path, tmp_path: Path, dtype: str, lacking: str) -> None:
    change, (layer, stage), hint = LACKING[lacking]
    done = recorded(made, tmp_path / "x.safetensors", lambda t: change(made, dtype, t), f"qwen3-{dtype}")
    assert blamed(done) == ("bug", layer, stage)
    assert done.json["culprit"]["hint"] == hint


# What is no dump.


def test_files_of_other_kinds_are_told_by_their_kind(made: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", lm_head=np.zeros(3))
    np.save(tmp_path / "x.npy", np.zeros(3))
    (tmp_path / "x.json").write_text('{"lm_head": [1, 2, 3]}')
    (tmp_path / "short.safetensors").write_bytes((10**6).to_bytes(8, "little") + b"{}")
    for name, told in {
        "x.npz": "this is a zip archive, as .npz",
        "x.npy": "this is a .npy array",
        "x.json": "this is JSON",
        "short.safetensors": "truncated",
    }.items():
        done = svf("audit", tmp_path / name, "--model", made / "qwen3-float32", "--tokens", IDS)
        assert done.code == 3
        assert told in done.error


def test_a_folder_of_dumps_names_them(made: Path, tmp_path: Path) -> None:
    for name in ("torch", "jax"):
        shutil.copytree(made / "qwen3-float32-dump", tmp_path / "traces" / name)
    done = svf("audit", tmp_path / "traces")
    assert done.code == 2
    assert "holds 2 dumps, jax, torch; name one of them" in done.error


# What is asked for.


def test_less_may_be_asked_for(made: Path, tmp_path: Path) -> None:
    recorded(made, tmp_path / "x.safetensors", only("embedding post_ffn_residual final_norm lm_head"))
    given = ("--model", made / "qwen3-float32", "--tokens", IDS, "--json")
    done = svf("audit", tmp_path / "x.safetensors", *given, "--stages", "embedding,final_norm,lm_head")
    assert sound(done)
    assert [row["key"] for row in done.json["rows"]] == ["embedding", "final_norm", "lm_head"]
    wrong = changed(made, tmp_path / "wrong", two_faults)
    assert blamed(svf("audit", wrong, "--json")) == ("bug", 0, "ffn_gate")
    assert blamed(svf("audit", wrong, "--layers", "1", "--json")) == ("bug", 1, "q_post_rope")
    done = svf("audit", wrong, "--layers", "1", "--stages", "attn_norm,layer_output", "--json")
    assert sound(done)
    assert done.json["coverage"] == {"judged": 2, "unjudged": 0, "expected": 2, "given": 0}
    for option, value, told in (("--stages", "ffn_gat", "no stage 'ffn_gat'"), ("--layers", "7", "no layer 7")):
        done = svf("audit", wrong, option, value)
        assert done.code == 2
        assert told in done.error


def test_tokens_come_from_a_file_too(made: Path, tmp_path: Path) -> None:
    recorded(made, tmp_path / "x.safetensors", lambda t: None)
    (tmp_path / "ids.json").write_text(f"[{IDS}]")
    command = ("audit", tmp_path / "x.safetensors", "--model", made / "qwen3-float32")
    assert sound(svf(*command, "--tokens-file", tmp_path / "ids.json", "--json"))
    assert svf(*command, "--tokens-file", tmp_path / "ids.json", "--tokens", IDS).code == 2
    assert svf(*command, "--prompt", "x").code == 4  # this model has no tokenizer
    dump = made / "qwen3-float32-dump"
    assert sound(svf("audit", dump, "--tokens-file", tmp_path / "ids.json", "--json"))
    assert svf("audit", dump, "--tokens", "1,2").code == 3
    assert svf("audit", dump, "--layout", "vh").code == 2
    assert svf("audit", dump, "--adapted", tmp_path).code == 2


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_another_programs_adapted_run_is_judged(tmp_path: Path, dtype: str, backend: str) -> None:
    """Its adapted weights are within rounding those of the components: what they may be off is in the bounds."""
    model, bundle = write_model(tmp_path / "model", MODELS["qwen3"], dtype), tmp_path / "components"
    offsets = 0.2 * np.random.default_rng(5).standard_normal(4096).astype(np.float32)
    np.save(tmp_path / "router.npy", offsets)
    asked = ("--all-selected-tensors", "--decompose-all-selected-if-missing")
    done = svf("decompose", model, "--vector", tmp_path / "router.npy", "--layers", "0", *asked, "--out", bundle)
    assert done.code == 0, done.err
    command = ["forward", model, "--tokens", IDS, "--no-production", "--backend", backend, "--adapted", bundle]
    assert svf(*command, "--out", tmp_path / "dump").code == 0
    tensors = dumped(tmp_path / "dump")
    write_tensors(tmp_path / "x.safetensors", tensors)
    given = ("audit", tmp_path / "x.safetensors", "--model", model, "--tokens", IDS, "--json")
    done = svf(*given, "--adapted", bundle)
    assert sound(done)
    assert done.json["facts"]["adapted"].startswith("9 weights by")
    assert blamed(svf(*given))[0] == "bug"  # not the model's own weights
    tensors["layers.0.ffn_gate"] = tensors["layers.0.ffn_gate"] * tensors["layers.0.ffn_gate"].dtype.type(1.02)
    write_tensors(tmp_path / "x.safetensors", tensors)
    assert blamed(svf(*given, "--adapted", bundle)) == ("bug", 0, "ffn_gate")
