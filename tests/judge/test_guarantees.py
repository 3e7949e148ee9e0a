"""Dumps of `reference` and `exact` precision are held to them: what native rounding would excuse is a bug there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import GATE, svf, tensors_of, with_json, with_tensors
from test_diff import G, at, culprit, element, rewrite, ulp

from stages.files.bundle import tensor_stage_key
from stages.files.replay_recorded import INPUT_STAGES
from stages.files.tensorfile import sha256
from stages.judge.guarantees import RULES, breaches
from stages.oracle.exact import tie_band
from stages.oracle.verdict import consult
from stages.spec.replay import REPLAY

MODES = ("reference", "exact")


@pytest.fixture(scope="session")
def precise(made: Path) -> Path:
    """Dumps of gate_proj: torch and jax in both modes, torch in native."""
    folder = made / "precise"
    for backend, mode in (*((b, m) for m in MODES for b in ("torch", "jax")), ("torch", "native")):
        command = ["replay", made / "components", "--backend", backend, "--select", "gate_proj", "--precision", mode]
        assert svf(*command, "--out", folder / f"{backend}-{mode}").code == 0
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_two_dumps_of_one_precision_agree_and_every_row_names_its_rule(precise: Path, mode: str) -> None:
    done = svf("diff", precise / f"torch-{mode}", precise / f"jax-{mode}", "--precision", mode, "--json")
    assert (done.code, done.json["outcome"]) == (0, "agree"), done.err
    judged = [row for row in done.json["rows"] if row["verdict_a"] is not None]
    assert {(row["rule_a"], row["rule_b"]) for row in judged} == {(RULES[mode], RULES[mode])}
    assert {row["stage"] for row in judged} >= set(REPLAY) - set(INPUT_STAGES)
    assert f"computed in {mode} precision" in done.json["verdict"]


CHANGES: dict[str, Callable[[float], float]] = {"one ulp up": ulp, "one ulp down": lambda x: -ulp(-x)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", CHANGES)
def test_one_ulp_of_a_product_is_a_bug(precise: Path, tmp_path: Path, mode: str, change: str) -> None:
    changed = Path(shutil.copytree(precise / f"jax-{mode}", tmp_path / "changed"))
    rewrite(changed, at(G["matmul_pre_norm"], element(CHANGES[change])))
    done = svf("diff", precise / f"torch-{mode}", changed, "--json")
    assert done.code == 1
    assert culprit(done.json) == (GATE, "matmul_pre_norm", "bug", "b")
    assert done.json["culprit"]["hint"] == f"1 of 12,288 elements are not what {mode} precision gives"
    assert culprit(svf("diff", changed, precise / f"torch-{mode}", "--json").json)[-1] == "a"


def test_natively_the_same_ulp_is_rounding(precise: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(precise / "torch-native", tmp_path / "changed"))
    rewrite(changed, at(G["matmul_pre_norm"], element(ulp)))
    row = next(
        r
        for r in svf("diff", precise / "torch-native", changed, "--json").json["rows"]
        if r["key"] == tensor_stage_key(GATE, "matmul_pre_norm")
    )
    assert (row["verdict"], row["rule_b"]) == ("rounding", None)


def test_a_native_side_is_not_held_to_the_other_sides_precision(precise: Path) -> None:
    done = svf("diff", precise / "torch-native", precise / "jax-exact", "--json")
    assert (done.code, done.json["outcome"]) == (0, "agree")
    judged = [row for row in done.json["rows"] if row["verdict_a"] is not None]
    assert {(row["rule_a"], row["rule_b"]) for row in judged} == {(None, RULES["exact"])}


@pytest.mark.parametrize("pair", [("torch-native", "torch-exact"), ("torch-exact", "torch-reference")])
def test_a_precision_that_a_dump_does_not_have_is_refused(precise: Path, pair: tuple[str, str]) -> None:
    done = svf("diff", *(precise / name for name in pair), "--precision", "exact")
    assert done.code == 3
    assert "expected exact" in done.error


def test_a_bundle_does_not_tell_its_precision(made: Path) -> None:
    done = svf("diff", made / "components", made / "components", "--precision", "exact")
    assert done.code == 2
    assert "--precision applies to dumps" in done.error


def test_forward_dumps_are_held_to_theirs(model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run = ("forward", model, "--backend", "reference", "--no-production", "--precision", "exact", "--tokens", "1,2")
        assert svf(*run, "--dtype", "float32", "--layers", "1", "--out", tmp_path / name).code == 0
    agree = svf("diff", tmp_path / "a", tmp_path / "b", "--precision", "exact", "--json")
    assert (agree.code, agree.json["outcome"]) == (0, "agree")
    assert sum(row["rule_a"] == RULES["exact"] for row in agree.json["rows"]) > 10
    with_ulp(tmp_path / "b", "layers.1.ffn_gate")
    done = svf("diff", tmp_path / "a", tmp_path / "b", "--json")
    found = done.json["culprit"]
    assert (done.code, found["stage"], found["verdict"], found["side"]) == (1, "ffn_gate", "bug", "b")
    audited = [svf("audit", tmp_path / name, "--json") for name in ("a", "b")]
    assert [done.code for done in audited] == [0, 1]  # layer 1 alone: judged from the tokens
    assert (audited[1].json["culprit"]["stage"], audited[1].json["culprit"]["verdict"]) == ("ffn_gate", "bug")


def test_a_replay_dump_is_audited_by_its_promise(precise: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(precise / "torch-exact", tmp_path / "changed"))
    rewrite(changed, at(G["matmul_pre_norm"], element(ulp)))
    assert [svf("audit", folder).code for folder in (precise / "torch-exact", changed)] == [0, 1]


def with_ulp(folder: Path, key: str) -> None:
    (file,) = [f for f in folder.glob("*.safetensors") if key in tensors_of(f)]
    with_tensors(file, at(key, element(ulp, (0, 0))))
    digest = sha256(tensors_of(file)[key])
    with_json(folder / "manifest.json", lambda m: m["tensors"][key].update(sha256=digest))


def beside_a_tie(step: float) -> tuple[np.ndarray, np.ndarray]:
    """Factors of a product that is a float32 midpoint and `step`."""
    return np.float32([[1, 2.0**-24, step]]), np.ones((1, 3), np.float32)


@pytest.mark.parametrize(("mode", "allowed"), [("reference", 2), ("exact", 1)])
def test_only_beside_a_tie_reference_has_two_results(mode: str, allowed: int) -> None:
    for step, expected in ((2.0**-70, allowed), (2.0**-30, 1)):
        oracle = consult(REPLAY["matmul_pre_norm"], beside_a_tie(step), {"layout": "torch_v"})
        near = [np.float32([[x]]) for x in (1 - 2.0**-24, 1, 1 + 2.0**-23, 1 + 2.0**-22)]
        assert sum(breaches(mode, oracle, result) == 0 for result in near) == expected


def test_the_tie_band_of_one_operation_is_its_rounding() -> None:
    value = np.float64([1 + 2.0**-9, 3.1])
    low, high = tie_band("final_bf16", value, (value,), {}, np.dtype(ml_dtypes.bfloat16))
    assert np.array_equal(low, high)
