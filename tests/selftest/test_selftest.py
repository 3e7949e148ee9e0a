"""The selftest: it finds what it plants, fails when it should, and neither side of it knows of the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, fresh, svf

from stages.errors import InputError
from stages.progress import Progress
from stages.selftest.apart import APART
from stages.selftest.clean import samples
from stages.selftest.document import document, exit_code
from stages.selftest.fault import FORWARD, Fault
from stages.selftest.faults import FAULTS
from stages.selftest.options import SelftestOptions
from stages.selftest.planted import Plant, PlantedWeights
from stages.selftest.rows import ROWS, as_rows, names_in
from stages.selftest.run import selftest, verdict_on
from stages.selftest.specimens import SPECIMENS
from stages.selftest.tables import digest, page
from stages.selftest.trials import Trial, path_of, plan
from stages.spec.replay import REPLAY

pytestmark = pytest.mark.slow

PACKAGE = ROOT / "stages" / "selftest"
# One stage fault of each path, one of a weight, one of a size.
FEW = ("positions past a cache", "gate and up swapped", "S x offsets", "theta x (1 + size)", "products in TF32")
# What was misnamed, or not named, before.
ONCE_WRONG = ("3/8 of each head turned", "bias of another layer", "normalized twice", "replay in TF32")
ROW = "rows of swigl"
BACKENDS = ("torch", "jax")


def few(names: tuple[str, ...] = FEW, **changed: Any) -> SelftestOptions:
    return SelftestOptions(tuple(FAULTS[name] for name in names), **{"quick": True, "clean": 2, **changed})


@pytest.mark.thorough
def test_what_was_once_misnamed_is_named() -> None:
    found = selftest(few(ONCE_WRONG, clean=0), Progress(False))
    assert (found["planted"], found["named"], found["misnamed"]) == (len(ONCE_WRONG), len(ONCE_WRONG), 0)
    assert found["passed"]


@pytest.mark.long
def test_what_is_planted_is_named_and_clean_runs_raise_no_alarm() -> None:
    """Of a few kinds, judged as `svf diff` does, and of one kind of rows, as `svf audit` does."""
    found = selftest(few(rows=(ROW,)), Progress(False))
    rows_are_planted_on_every_dtype_and_right_ways_are_clean_runs(found)
    assert [row["fault"] for row in found["faults"] if not row["named"]] == []
    assert all(row["changed_elements"] > 0 for row in found["faults"])
    assert (found["planted"] - found["rows"], found["misnamed"], found["false_alarms"]) == (
        len(FEW),
        0,
        0,
    )
    assert found["passed"]
    assert exit_code(found) == 0


def rows_are_planted_on_every_dtype_and_right_ways_are_clean_runs(found: dict[str, Any]) -> None:
    rows = [row for row in found["faults"] if row["fault"] == ROW]
    assert len(rows) == found["rows"] >= 3
    assert {row["changed"] for row in rows} == {"ffn_swigl"}
    right = [row for row in found["clean"] if "row" in row]
    assert {(row["class"], row["outcome"]) for row in right} <= {("prescribed", "agree"), ("equivalent", "agree")}
    assert found["clean_runs"] == len(right) + 2


def test_a_fault_below_the_floor_is_not_found_and_fails() -> None:
    found = selftest(few(("theta x (1 + size)",), clean=0, scale=0.05), Progress(False))
    assert [(row["found"], row["named"]) for row in found["faults"]] == [(False, False)]
    assert not found["passed"]
    assert exit_code(found) == 1


def culprit(trial: Trial, **changed: Any) -> dict[str, Any]:
    """The document of a judge that names `trial`, but for what is `changed`."""
    right = {"side": trial.side, "layer": trial.layer, "tensor": trial.tensor, "stage": trial.stage}
    return {"outcome": "diverged", "culprit": {"verdict": "bug", "ratio": 9.0, "hint": None, **right, **changed}}


CONTENT = {"outcome": "agree", "culprit": None}


def rows_of(judge: Callable[[Trial], dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all trials of a full selftest, judged without running anything."""
    trials = plan([f for f in FAULTS.values() if not f.must], BACKENDS, quick=False, seed=0)
    return [{**t.fields(), **verdict_on(t, lambda _a, _b, t=t: judge(t), Path(), Path())} for t in trials]


def test_a_judge_that_names_everything_passes_and_one_that_is_always_content_fails() -> None:
    options = SelftestOptions(tuple(FAULTS.values()))
    assert document(options, rows_of(culprit), [], 0.0)["passed"]
    content = document(options, rows_of(lambda _trial: CONTENT), [], 0.0)
    assert (content["found"], content["named"], content["passed"]) == (0, 0, False)


@pytest.mark.parametrize(
    "wrong", [{"side": "both"}, {"side": None}, {"layer": 7}, {"stage": "lm_heat"}, {"tensor": "another"}], ids=str
)
def test_a_culprit_with_one_thing_wrong_is_found_and_not_named(wrong: dict[str, Any]) -> None:
    rows = rows_of(lambda trial: culprit(trial, **wrong))
    assert all(row["found"] for row in rows)
    assert not any(row["named"] for row in rows)


def test_what_is_said_of_a_fault_must_be_true_of_it() -> None:
    alone, row = FAULTS["silu of slope 1.1"], FAULTS["LayerNorm"]
    assert alone.told_by(None)
    assert not alone.told_by("gelu (by erf) instead of silu")
    assert row.told_by("its mean is subtracted first: LayerNorm")
    assert not row.told_by(None)
    said = rows_of(lambda trial: culprit(trial, hint="relu instead of silu"))
    misnamed = {r["fault"] for r in said if r["misnamed"]}
    assert "silu of slope 1.1" in misnamed
    assert not document(few(), [r for r in said if r["misnamed"]], [], 0.0)["passed"]


@pytest.mark.parametrize(
    ("hint", "names"),
    [
        ("its operands have 10 mantissa bits, TF32-like", ["its operands have 10 mantissa bits, TF32-like"]),
        (
            "its operands have 10 mantissa bits, TF32-like (truncated)",
            ["its operands have 10 mantissa bits, TF32-like (truncated)"],
        ),
        (
            "its operands have 10 mantissa bits, TF32-like or TF32-like (truncated)",
            [
                "its operands have 10 mantissa bits, TF32-like",
                "its operands have 10 mantissa bits, TF32-like (truncated)",
            ],
        ),
        ("the mask shows one position too many", ["the mask shows one position too many"]),
        ("only heads 0 of 4 are wrong", []),
    ],
)
def test_a_hint_names_the_rows_that_it_names(hint: str, names: list[str]) -> None:
    ends = ("TF32-like", "TF32-like (truncated)", "TF32-like (ties away)")
    rows = [f"its operands have 10 mantissa bits, {end}" for end in ends]
    assert names_in(hint, [*rows, "the mask shows one position too many"]) == set(names)


def test_ropes_judge_has_other_words_for_rows() -> None:
    as_of = {
        ("inv_freq", "as if the inverse frequencies were in bfloat16"): "its result has 7 mantissa bits, bfloat16-like",
        ("rope_angle", "as if the inverse frequencies were in bfloat16"): "its operands have 7 mantissa bits, ",
        ("rope_angle", "as if the inverse frequencies and the angles were in float16"): "its operands and its result",
        ("rope_cos", "as if cos and sin were in float16"): "its result has 10 mantissa bits, float16-like",
        ("q_post_rope", "positions are 0 from token 1 on"): "not turned by RoPE at all",
    }
    for (stage, hint), words in as_of.items():
        assert as_rows(stage, hint).startswith(words)


def test_a_refusal_to_compare_finds_nothing() -> None:
    def refuse(_trial: Trial) -> dict[str, Any]:
        raise InputError("not comparable")

    assert {(row["found"], row["named"], row["verdict"]) for row in rows_of(refuse)} == {(False, False, "refused")}


def test_a_false_alarm_fails_whatever_was_named() -> None:
    alarm = {"outcome": "diverged", "worst_ratio": 2.0}
    assert document(few(), [], [{"outcome": "agree"}], 0.0)["passed"]
    assert not document(few(), [], [{"outcome": "agree"}, alarm], 0.0)["passed"]
    assert not document(few(), [], [], 0.0)["passed"]


def test_one_in_a_hundred_may_be_missed_and_no_more() -> None:
    kind = next(iter(FAULTS.values()))
    row = {"fault": kind.name, "found": True, "ratio": 1.0, "expected_stage": "x", "size": None, "verdict": "bug"}
    rows = [{**row, "named": number > 0} for number in range(100)]
    options = SelftestOptions((kind,))
    assert document(options, rows, [], 0.0)["passed"]
    assert not document(options, rows[:99], [], 0.0)["passed"]


def test_the_record_of_several_selftests_adds_clean_runs_and_keeps_the_last_of_a_kind() -> None:
    kinds = list(FAULTS.values())[:2]
    row = {"found": True, "ratio": 1.0, "expected_stage": "x", "size": None, "verdict": "bug", "fault": kinds[0].name}
    rows = [{**row, "named": False}, {**row, "fault": kinds[1].name, "named": True}]
    first = document(SelftestOptions(tuple(kinds)), rows, [{"outcome": "agree"}], 0.0)
    again = document(
        SelftestOptions((kinds[0],), seed=7), [{**row, "named": True}] * 3, [{"outcome": "agree"}] * 2, 0.0
    )
    kept = digest([first, again])
    assert (kept["planted"], kept["found"], kept["named"]) == (4, 4, 4)
    assert (kept["clean_runs"], kept["seeds"]) == (3, [0, 7])
    assert f"| {kinds[0].name} | {kinds[0].doc} | - | `x` | 1 | 3 of 3 | 3 of 3 |" in page(kept)


def test_judging_loads_no_fault_and_listing_faults_no_framework() -> None:
    code = (
        "import sys, stages.judge.diff, stages.judge.audit, stages.judge.hints\n"
        "assert not [m for m in sys.modules if 'selftest' in m]\n"
        "import stages.selftest.command\n"
        "assert stages.selftest.command.listed(None)\n"
        "assert not {'torch', 'jax'} & set(sys.modules)"
    )
    done = fresh(code)
    assert done.returncode == 0, done.stderr


# The plan.


def test_every_kind_is_planted_at_a_stage_that_exists_and_there_are_many() -> None:
    trials = plan(FAULTS.values(), BACKENDS, quick=False, seed=0)
    assert len(FAULTS) >= 40
    assert sum(not f.must for f in APART) >= 25
    assert {trial.fault.name for trial in trials} == set(FAULTS)
    for trial in trials:
        assert trial.stage in (path_of(trial.specimen) if trial.fault.path == FORWARD else REPLAY)


def test_faults_are_planted_in_all_layers_families_backends_and_stages() -> None:
    trials = plan(FAULTS.values(), BACKENDS, quick=False, seed=0)
    of_layers = [t for t in trials if t.fault.path == FORWARD and t.layer is not None]
    layers = {"qwen3": 3, "qwen2": 3, "qwen3_moe": 2, "qwen2_moe": 2}
    assert {(t.backend, t.layer, SPECIMENS[t.specimen].family) for t in of_layers} == {
        (backend, layer, family) for family, count in layers.items() for backend in BACKENDS for layer in range(count)
    }
    stages = {t.stage for t in trials} | {stage for rows in ROWS.values() for stage in rows.at}
    for path in (path_of("qwen3"), path_of("qwen2-moe")):
        assert stages >= {name for name in path if not path[name].identity}
    assert stages >= set(REPLAY) - {"source_f32", "offsets_f32"}


@pytest.mark.parametrize("backends", [("torch",), ("jax",)])
def test_one_backend_alone_is_planted_in_when_asked(backends: tuple[str, ...]) -> None:
    assert {t.backend for t in plan(FAULTS.values(), backends, quick=False, seed=0)} == set(backends)


def test_a_seed_gives_the_same_plan_and_samples() -> None:
    assert plan(FAULTS.values(), BACKENDS, quick=True, seed=3) == plan(FAULTS.values(), BACKENDS, quick=True, seed=3)
    assert samples(9, 1) == samples(9, 1) != samples(9, 2)


def test_clean_samples_are_of_many_shapes() -> None:
    chosen = samples(300, 0)
    specimens = [sample.specimen for sample in chosen]
    assert {s.dtype for s in specimens} == {"float32", "bfloat16", "float16"}
    assert {s.heads // s.kv_heads for s in specimens} >= {1, 2, 4, 7, 8}
    assert min(s.tokens for s in specimens) == 1
    assert max(s.tokens for s in specimens) == 500
    assert sum(s.hidden == 1024 for s in specimens) >= 10
    assert sum(sample.replay for sample in chosen) >= 50


# Planting.


def test_a_planted_weight_is_wrong_and_its_neighbours_are_right() -> None:
    specimen = SPECIMENS["qwen3"]
    weights = specimen.weights()

    class Memory:
        def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
            return weights[name][start:stop]

    fault = FAULTS["a row of zeros"]
    planted = PlantedWeights(Memory(), Plant(fault, "mlp.up_proj.weight", 1, 1.0, 0), specimen.layers)
    for name in weights:
        same = np.array_equal(planted.read(name), weights[name])
        assert same == (name != "model.layers.1.mlp.up_proj.weight")
    assert planted.changed == specimen.hidden


def test_a_fault_changes_a_call_or_a_tensor() -> None:
    with pytest.raises(ValueError, match="one of them"):
        Fault("nothing", ("attn_norm",), "neither")


# The command.


def test_the_list_names_every_kind() -> None:
    listed = svf("selftest", "--list", "--json").json
    assert listed["schema"] == "svf.faults/1"
    assert [row["kind"] for row in listed["faults"]] == [*FAULTS, *ROWS]


@pytest.mark.parametrize(
    ("words", "said"), [(("--fault", "gremlins"), "no such fault"), (("--backend", "reference"), "torch or jax")]
)
def test_what_cannot_be_planted_is_refused(words: tuple[str, ...], said: str) -> None:
    result = svf("selftest", *words)
    assert result.code == 2
    assert said in result.error
