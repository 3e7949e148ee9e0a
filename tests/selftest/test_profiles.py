"""Profiles: what engines record is judged, faults in what they did not record are found, right engines are sound."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import some

from stages.progress import Progress
from stages.selftest.clean import samples
from stages.selftest.document import document
from stages.selftest.engines import ENGINES
from stages.selftest.faults import FAULTS
from stages.selftest.options import SelftestOptions
from stages.selftest.profiles import (
    LARGER,
    PROFILES,
    clean_rows,
    first_recorded,
    judged,
    plan_profiles,
    reached,
    tallies,
)
from stages.selftest.recorded import audit_arrays
from stages.selftest.run import selftest
from stages.selftest.specimens import SPECIMENS
from stages.selftest.trials import path_of

pytestmark = pytest.mark.slow

BACKENDS = ("torch", "jax")
TINY = {"hidden": 32, "intermediate": 40, "heads": 2, "kv_heads": 1, "head_dim": 16, "layers": 2, "tokens": 9}


@pytest.mark.cover(1)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("of", ["qwen3", "qwen2", "qwen3-bf16", "qwen2-bf16"])
def test_right_engines_are_sound_under_every_profile(tmp_path: Path, of: str, engine: str) -> None:
    """Once called wrong: a stream in float32 beside bfloat16, of which norms round inside to bfloat16."""
    specimen = dataclasses.replace(SPECIMENS[of], **TINY)
    model = specimen.write(tmp_path / of)
    rows = clean_rows(specimen, model, list(PROFILES), [engine], [], tmp_path)
    assert len(rows) == len(PROFILES)
    assert [(row["profile"], row["engine"], row["verdict"]) for row in rows if row["outcome"] != "sound"] == []
    assert not any(tally["false_alarms"] for tally in tallies([], rows))


# Of clean runs: what a hidden score errs itself was not carried on; first order ended; q scaled in bfloat16, and
# probabilities rounded before they are divided, were beyond the absolute bound.
SHARP = (1847360244, 366198232, 548388677, 1637002334)


@pytest.mark.parametrize("seed", some(SHARP, SHARP[1:3]))
def test_right_engines_with_sharp_attention_are_sound(tmp_path: Path, seed: int) -> None:
    specimen = next(s.specimen for s in samples(40, 0) if s.specimen.seed == seed)
    model = specimen.write(tmp_path / "model")
    rows = clean_rows(specimen, model, ["seed", "engine"], ["backwards", "chained", "fused"], [], tmp_path)
    assert [(row["profile"], row["engine"], row["verdict"]) for row in rows if row["outcome"] == "faulty"] == []


@pytest.mark.parametrize("engine", some(ENGINES, ("backwards", "decode", "float32 stream")))
def test_an_engine_that_is_wrong_is_found(tmp_path: Path, engine: str) -> None:
    """Its norms do without eps; only layer outputs are recorded."""
    right = dataclasses.replace(SPECIMENS["qwen3"], **TINY)
    model = right.write(tmp_path / "model")
    arrays = ENGINES[engine].run(dataclasses.replace(right, eps=0.1))
    kept = PROFILES["hidden"].recorded(arrays, right)
    said = audit_arrays(tmp_path / "x.safetensors", kept, model, right.token_ids())
    assert said["outcome"] == "faulty"
    assert said["culprit"]["layer"] == 0


def test_engines_differ_in_bits_and_agree_otherwise() -> None:
    specimen = dataclasses.replace(SPECIMENS["qwen3"], **TINY)
    logits = {name: engine.run(specimen)["lm_head"] for name, engine in ENGINES.items()}
    assert len({array.tobytes() for array in logits.values()}) >= 5
    for array in logits.values():
        np.testing.assert_allclose(array, logits["flash"], rtol=1e-3, atol=1e-4)


def test_profiles_are_what_engines_record() -> None:
    arrays = {name: np.zeros(1) for name in path_of("qwen3")}
    kept = {name: set(profile.recorded(arrays, SPECIMENS["qwen3"])) for name, profile in PROFILES.items()}
    assert kept["all"] == set(arrays)
    assert len(kept["seed"] - {"qkv_bias", "lm_head"}) == 16
    hidden = {"rope_cos", "q_post_rope", "k_post_rope", "attn_scores", "attn_softmax"}
    assert not hidden & kept["hooks"]
    assert {"attention", "q_norm", "ffn_silu", "post_ffn_residual"} <= kept["hooks"]
    assert "ffn_gate" not in kept["engine"]
    assert kept["hidden"] == {"embedding", "post_ffn_residual", "final_norm"}


def test_a_fault_shows_at_the_first_recorded_tensors_after_it() -> None:
    path = path_of("qwen3")
    kept = ["layers.0.qkv_matmul", "layers.0.attention", "layers.0.post_ffn_residual", "layers.1.post_ffn_residual"]

    def shows(changed: tuple[int | None, str]) -> set[Any]:
        return first_recorded(path, 3, kept, changed)

    assert shows((0, "attention")) == {(0, "attention")}
    assert shows((0, "q_norm")) == {(0, "attention")}
    assert shows((0, "attn_norm")) == {(0, "qkv_matmul")}
    assert shows((0, "attn_out")) == {(0, "post_ffn_residual")}
    assert shows((None, "rope_cos")) == {(0, "attention"), (1, "post_ffn_residual")}
    assert shows((2, "ffn_out")) == set()


def said(**changed: Any) -> dict[str, Any]:
    row = {"key": "layers.0.attention", "verdict": "bug", "floor": 0.01, "through": ["layers.0.attn_scores"]}
    culprit = {"layer": 0, "stage": "attention", "verdict": "bug", "ratio": 9.0, "hint": None, "blamed": []}
    return {"outcome": "faulty", "rows": [row], "culprit": {**culprit, **changed}}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"blamed": ["layers.0.attn_scores"]}, (True, True, False)),
        ({"blamed": ["layers.0.q_norm", "layers.0.attn_scores"]}, (True, True, False)),
        ({"blamed": ["layers.0.q_norm"]}, (True, False, True)),
        ({}, (True, False, False)),
        ({"layer": 1}, (False, False, False)),
    ],
)
def test_the_span_and_the_stage_inside_are_named_or_not(
    changed: dict[str, Any], expected: tuple[bool, bool, bool]
) -> None:
    was = {"layers.0.attention": np.ones(4)}
    wrong = {"layers.0.attention": np.full(4, 1.02)}
    row = judged([(0, "attn_scores")], said(**changed), {(0, "attention")}, was, wrong)
    assert row["claimed"]
    assert (row["at_span"], row["named"], row["misnamed"]) == expected


def test_what_changes_less_than_the_floor_is_not_claimed() -> None:
    was, wrong = ({"layers.0.attention": np.full(4, value)} for value in (1.0, 1.005))
    row = judged([(0, "attn_scores")], said(), {(0, "attention")}, was, wrong)
    assert (row["claimed"], row["found"]) == (False, True)


def test_every_kind_is_planted_in_both_dtypes_and_sizes() -> None:
    planted = plan_profiles(FAULTS.values(), tuple(PROFILES), BACKENDS, quick=False, seed=0)
    forward = {fault.name for fault in FAULTS.values() if fault.path == "forward"}
    assert {one.trial.fault.name for one in planted} == forward
    assert {SPECIMENS[one.trial.specimen].dtype for one in planted} == {"float32", "bfloat16"}
    assert {one.trial.size for one in planted if one.trial.fault.name == "scale x (1 + size)"} == {5e-6, LARGER * 5e-6}
    quick = plan_profiles(FAULTS.values(), tuple(PROFILES), BACKENDS, quick=True, seed=0)
    assert 10 < len(quick) < 40
    assert {name for one in quick for name in one.profiles} == set(PROFILES)


# Once found and not named in stages that were not recorded: a mask over hidden scores, widths of windows that are no
# power of two, numbers inside softmax and SiLU, factors of tables and angles.
HIDDEN = (
    "scale x (1 + size)",
    "no causal mask",
    "window of 11",
    "sum of the exponentials + 0.01",
    "softmax to base 2",
    "silu of slope 1.1",
    "positions halved",
    "table x (1 + size)",
)


# One of the scores, one inside a function, one of the tables.
@pytest.mark.long
@pytest.mark.parametrize("fault", some(HIDDEN, ("no causal mask", "silu of slope 1.1", "table x (1 + size)")))
def test_a_fault_in_what_was_not_recorded_is_found_in_its_span_and_named(fault: str) -> None:
    options = SelftestOptions((FAULTS[fault],), profiles=("engine",), clean=0)
    found = selftest(options, Progress(False), judge=lambda _a, _b: found_nothing())
    rows = [row for row in found["profiled"] if row["claimed"]]
    assert {row["fault"] for row in rows} == {fault}
    assert [row for row in rows if not row["at_span"] or row["misnamed"]] == []
    assert [row["fault"] for row in rows if row["dtype"] == "float32" and not row["named"]] == []


@pytest.mark.parametrize("clean", some((1, 2), (1,)))
def test_clean_runs_raise_no_alarm_where_little_is_recorded(clean: int) -> None:
    options = SelftestOptions((), profiles=("engine",), clean=clean)
    found = selftest(options, Progress(False), judge=lambda _a, _b: found_nothing())
    assert len(found["profiled_clean"]) >= clean * len(ENGINES)
    assert not any(tally["false_alarms"] for tally in found["profiles"])


def found_nothing() -> dict[str, Any]:
    row = {"ratio_a": 0.0, "ratio_b": 0.0, "stage": "lm_head"}
    return {"outcome": "agree", "rows": [row], "culprit": None, "verdict": ""}


def test_a_false_alarm_or_too_few_found_fail() -> None:
    tally = {"profile": "hooks", "dtype": "float32", "claimed": 100, "at_span": 98, "false_alarms": 0}
    assert reached(tally)
    assert not reached({**tally, "false_alarms": 1})
    assert not reached({**tally, "at_span": 97})
    alarm = {"profile": "all", "dtype": "float32", "outcome": "faulty", "floor": None}
    assert not document(SelftestOptions(()), [], [], 0.0, under=[alarm])["passed"]
