"""Mutants: one thing changed in a recorded side; `svf diff` names the stage, the verdict and the exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import GATE, K_PROJ, Result, svf, tensors_of, with_json, with_tensors

from stages.files.bundle import ALL_STAGES_FILE, OFFSETS_FILE, offsets_key, tensor_stage_key
from stages.files.dump import MANIFEST_FILE
from stages.files.selection import safe_key
from stages.files.tensorfile import sha256, write_tensors
from stages.spec.replay import REPLAY

LAYER = "layer-2.safetensors"


def keys(name: str) -> dict[str, str]:
    return {stage: tensor_stage_key(name, stage) for stage in REPLAY}


G, K = keys(GATE), keys(K_PROJ)


@pytest.fixture(scope="session")
def dumps(made: Path) -> Path:
    """Dumps of gate_proj (192 x 64) and k_proj (square) from torch, jax and the reference."""
    folder = made / "dumps"
    for backend in ("torch", "jax", "reference"):
        command = ["replay", made / "components", "--backend", backend, "--select", "gate_proj", "--select", "k_proj"]
        done = svf(*command, "--out", folder / backend)
        assert done.code == 0, done.err
    return folder


@pytest.fixture
def changed(dumps: Path, tmp_path: Path) -> Path:
    """A copy of the jax dump, to be damaged."""
    return Path(shutil.copytree(dumps / "jax", tmp_path / "changed"))


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Change tensors of a dump and its manifest with them, as a program with a fault would have written both."""
    with_tensors(folder / LAYER, change)
    tensors = tensors_of(folder / LAYER)

    def described(manifest: dict[str, Any]) -> None:
        manifest["tensors"] = {
            key: {"file": LAYER, "dtype": a.dtype.name, "shape": list(a.shape), "sha256": sha256(a)}
            for key, a in tensors.items()
        }

    with_json(folder / MANIFEST_FILE, described)


def at(key: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors.update({key: change(tensors[key])})


def element(value: Callable[[float], float], index: tuple[int, ...] = (5, 7)) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[index] = value(array[index])
        return array

    return change


def swap(a: str, b: str) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda t: t.update({a: t[b], b: t[a]})


def culprit(document: dict[str, Any]) -> tuple[str, str, str, str | None]:
    found = document["culprit"]
    return found["tensor"], found["stage"], found["verdict"], found["side"]


def ulp(x: float) -> float:
    return float(np.nextafter(np.float32(x), np.float32(np.inf)))


def times(factor: float) -> Callable[[float], float]:
    return lambda x: x * factor


AFTER_PRODUCT = {"matmul_pre_norm", "adapted_source_f32", "final_f32", "final_bf16"}

# What is done to the tensors of a dump -> culprit (tensor, stage, verdict, side).
MUTANTS: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], tuple[str, str, str, str | None]]] = {
    "two axes of u_scaled swapped": (at(G["u_scaled"], lambda a: a.T), (GATE, "u_scaled", "shape", None)),
    "two axes of a product swapped": (
        at(G["matmul_pre_norm"], lambda a: a.T),
        (GATE, "matmul_pre_norm", "shape", None),
    ),
    "two axes of the last stage swapped": (at(G["final_bf16"], lambda a: a.T), (GATE, "final_bf16", "shape", None)),
    "a square product transposed": (at(K["matmul_pre_norm"], lambda a: a.T), (K_PROJ, "matmul_pre_norm", "bug", "b")),
    "a square u_scaled transposed": (at(K["u_scaled"], lambda a: a.T), (K_PROJ, "u_scaled", "bug", "b")),
    "one element of scaled_s": (at(G["scaled_s"], element(times(1.01), (3,))), (GATE, "scaled_s", "bug", "b")),
    "one ulp of scaled_s": (at(G["scaled_s"], element(ulp, (3,))), (GATE, "scaled_s", "bug", "b")),
    "normalization by 1e-4": (
        at(G["normalization"], element(times(1.0001), (0,))),
        (GATE, "normalization", "bug", "b"),
    ),
    "one ulp of u_scaled": (at(G["u_scaled"], element(ulp)), (GATE, "u_scaled", "bug", "b")),
    "one element of a product": (
        at(G["matmul_pre_norm"], element(lambda x: x + 0.01)),
        (GATE, "matmul_pre_norm", "bug", "b"),
    ),
    "one ulp of adapted_source_f32": (
        at(G["adapted_source_f32"], element(ulp)),
        (GATE, "adapted_source_f32", "bug", "b"),
    ),
    "one ulp of final_f32": (at(G["final_f32"], element(ulp)), (GATE, "final_f32", "bug", "b")),
    "one element of final_bf16": (at(G["final_bf16"], element(lambda x: x * 2)), (GATE, "final_bf16", "bug", "b")),
    "a NaN in a product and what follows": (
        lambda t: [at(G[name], element(lambda x: np.nan))(t) for name in list(REPLAY) if name in AFTER_PRODUCT],
        (GATE, "matmul_pre_norm", "nonfinite", "b"),
    ),
    "an infinity in the last stage": (
        at(G["final_bf16"], element(lambda x: np.inf)),
        (GATE, "final_bf16", "nonfinite", "b"),
    ),
    "a stage dropped": (lambda t: t.pop(G["u_scaled"]), (GATE, "u_scaled", "missing", None)),
    "the last stage dropped": (lambda t: t.pop(G["final_bf16"]), (GATE, "final_bf16", "missing", None)),
    "a tensor dropped": (lambda t: [t.pop(key) for key in G.values()], (GATE, "source_f32", "missing", None)),
    "a stage in float64": (
        at(G["final_f32"], lambda a: a.astype(np.float64)),
        (GATE, "final_f32", "shape", None),
    ),
    "a stage in bfloat16": (
        at(G["matmul_pre_norm"], lambda a: a.astype(np.dtype("bfloat16"))),
        (GATE, "matmul_pre_norm", "shape", None),
    ),
    "a row too few": (at(G["matmul_pre_norm"], lambda a: a[:-1]), (GATE, "matmul_pre_norm", "shape", None)),
    "two stages swapped": (
        swap(K["matmul_pre_norm"], K["adapted_source_f32"]),
        (K_PROJ, "matmul_pre_norm", "bug", "b"),
    ),
    "products of two values swapped in rows": (
        at(K["matmul_pre_norm"], lambda a: a[np.r_[1, 0, 2:64]]),
        (K_PROJ, "matmul_pre_norm", "bug", "b"),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_of_a_dump_is_named(dumps: Path, changed: Path, mutant: str) -> None:
    change, expected = MUTANTS[mutant]
    rewrite(changed, change)
    done = svf("diff", dumps / "torch", changed, "--json")
    assert done.code == 1, done.err
    assert done.json["outcome"] == "diverged"
    assert culprit(done.json) == expected
    # Turned round, the other side is to blame.
    tensor, stage, verdict, side = expected
    turned = svf("diff", changed, dumps / "torch", "--json")
    assert turned.code == 1
    other = {"missing": "extra"}.get(verdict, verdict)
    assert culprit(turned.json) == (tensor, stage, other, {"b": "a"}.get(side or ""))


@pytest.mark.parametrize("other", ["jax", "reference", "torch"])
def test_without_a_mutant_two_sides_agree(dumps: Path, other: str) -> None:
    done = svf("diff", dumps / "torch", dumps / other, "--json")
    assert (done.code, done.err) == (0, "")
    document = done.json
    assert (document["schema"], document["outcome"], document["culprit"]) == ("svf.diff/1", "agree", None)
    assert (document["coverage"]["compared"], document["coverage"]["expected"]) == (20, 20)
    rows = [(row["tensor"], row["stage"]) for row in document["rows"]]
    assert sorted(rows) == sorted((t, s) for t in (GATE, K_PROJ) for s in REPLAY)
    assert [s for t, s in rows if t == GATE] == list(REPLAY)
    assert {row["verdict"] for row in document["rows"]} <= {"exact", "rounding"}
    if other == "torch":
        assert all(row["byte_match"] for row in document["rows"])


ROW = """key layer tensor stage verdict verdict_a verdict_b ratio_a ratio_b max_abs max_abs_index mean_abs rms rel_l2
cosine mismatched count byte_match sha256_a sha256_b top"""


def test_a_row_has_every_field_of_its_schema(dumps: Path) -> None:
    document = svf("diff", dumps / "torch", dumps / "jax", "--json").json
    for row in document["rows"]:
        assert set(ROW.split()) <= row.keys()
        assert row["layer"] == 2
        assert row["key"] == tensor_stage_key(row["tensor"], row["stage"])
    for name, side in (("torch", "a"), ("jax", "b")):
        tensors = tensors_of(dumps / name / LAYER)
        assert all(row[f"sha256_{side}"] == sha256(tensors[row["key"]]) for row in document["rows"])
        assert document[side]["facts"]["backend"] == name


def test_a_nan_is_a_verdict_and_no_warning(dumps: Path, changed: Path, recwarn: pytest.WarningsRecorder) -> None:
    rewrite(changed, at(G["scaled_s"], element(lambda x: np.inf, (0,))))
    done = svf("diff", dumps / "torch", changed, "--json")
    assert (done.code, done.err) == (1, "")
    row = next(r for r in done.json["rows"] if r["key"] == G["scaled_s"])
    assert (row["verdict"], row["nonfinite_a"], row["nonfinite_b"]) == ("nonfinite", 0, 1)
    assert [w.message for w in recwarn if issubclass(w.category, RuntimeWarning)] == []


def test_inherited_error_is_not_blamed(dumps: Path, changed: Path) -> None:
    """A fault in scaled_s that everything after it inherits, each stage right from its own inputs."""

    def propagate(t: dict[str, np.ndarray]) -> None:
        t[G["scaled_s"]] = t[G["scaled_s"]] * np.float32(1.5)
        t[G["u_scaled"]] = t[G["u_scaled"]] * np.float32(1.5)
        t[G["matmul_pre_norm"]] = t[G["matmul_pre_norm"]] * np.float32(1.5)
        t[G["normalization"]] = t[G["normalization"]] / np.float32(1.5)

    rewrite(changed, propagate)
    document = svf("diff", dumps / "torch", changed, "--json").json
    bad = [row["stage"] for row in document["rows"] if row["verdict"] == "bug"]
    assert culprit(document) == (GATE, "scaled_s", "bug", "b")
    assert "matmul_pre_norm" not in bad
    assert "normalization" not in bad


def test_the_index_and_both_values_of_the_largest_difference(dumps: Path, changed: Path) -> None:
    rewrite(changed, at(G["final_f32"], element(lambda x: x + 8, (100, 33))))
    document = svf("diff", dumps / "torch", changed, "--json").json
    row = next(r for r in document["rows"] if r["key"] == G["final_f32"])
    assert row["max_abs_index"] == [100, 33]
    a = tensors_of(dumps / "torch" / LAYER)[G["final_f32"]][100, 33]
    b = tensors_of(changed / LAYER)[G["final_f32"]][100, 33]
    assert (row["max_abs_a"], row["max_abs_b"]) == (float(a), float(b))
    assert "[100, 33]" in svf("diff", dumps / "torch", changed, "--top", "3").out


@pytest.mark.parametrize("top", [0, 1, 7])
def test_top_says_how_many_differences_are_listed(dumps: Path, top: int) -> None:
    document = svf("diff", dumps / "torch", dumps / "jax", "--json", "--top", top).json
    lengths = {len(row["top"]) for row in document["rows"] if row["mismatched"] >= top}
    assert lengths == {top}


# Stage files and bundles.


def test_a_mutant_of_a_stage_file_is_named(made: Path, tmp_path: Path) -> None:
    good = made / "components" / ALL_STAGES_FILE
    bad = Path(shutil.copy(good, tmp_path / "stages.safetensors"))
    with_tensors(bad, at(G["u_scaled"], element(ulp)))
    done = svf("diff", good, bad, "--components", made / "components", "--json")
    assert done.code == 1
    assert culprit(done.json) == (GATE, "u_scaled", "bug", "b")
    assert svf("diff", good, good).code == 0


def test_without_operands_a_difference_is_incomplete_never_a_pass(made: Path, tmp_path: Path) -> None:
    good = Path(shutil.copy(made / "components" / ALL_STAGES_FILE, tmp_path / "a.safetensors"))
    bad = Path(shutil.copy(good, tmp_path / "b.safetensors"))
    assert svf("diff", good, bad).code == 0  # bit-identical needs no operands
    with_tensors(bad, at(G["u_scaled"], element(ulp)))
    done = svf("diff", good, bad, "--json")
    assert (done.code, done.json["outcome"]) == (5, "incomplete")
    assert {r["stage"] for r in done.json["rows"] if r["verdict"] == "unjudged"} >= {"u_scaled"}


def test_a_mutant_of_a_bundle_is_named(made: Path, bundle: Path) -> None:
    with_tensors(bundle / ALL_STAGES_FILE, at(K["zero_source_f32"], lambda a: a * np.float32(1.001)))
    done = svf("diff", made / "components", bundle, "--json")
    assert done.code == 1
    assert culprit(done.json) == (K_PROJ, "zero_source_f32", "bug", "b")


def test_a_replay_names_the_stage_that_was_recorded_wrongly(bundle: Path) -> None:
    with_tensors(bundle / ALL_STAGES_FILE, at(G["matmul_pre_norm"], element(lambda x: x + 0.01)))
    done = svf("replay", bundle, "--backend", "torch", "--json")
    assert done.code == 1
    assert culprit(done.json) == (GATE, "matmul_pre_norm", "bug", "a")


def test_the_sample_stage_file_faces_the_all_selected_one(made: Path) -> None:
    """One holds the final stages transposed; both are shown in one orientation."""
    done = svf("diff", made / "components", made / "sample", "--json")
    rows = [row for row in done.json["rows"] if row["tensor"] == GATE]
    assert {row["verdict"] for row in rows} == {"exact"} | ({"rounding"} & {row["verdict"] for row in rows})
    assert all(row["byte_match"] for row in rows)


def test_bundles_of_different_offsets_are_not_comparable(made: Path, bundle: Path) -> None:
    """Whoever replayed other offsets computed something else: that is no divergence."""
    name = safe_key(GATE)
    offsets = np.roll(tensors_of(bundle / OFFSETS_FILE)[offsets_key(GATE)], 1)
    with_tensors(bundle / OFFSETS_FILE, lambda t: t.update({offsets_key(GATE): offsets}))
    with_json(
        bundle / "trinity_svf_debug_manifest.json",
        lambda m: [e.update(offsets_sha256=sha256(offsets)) for e in m["selected_tensors"] if e["safe_key"] == name],
    )
    done = svf("diff", made / "components", bundle)
    assert done.code == 3
    assert "not comparable" in done.error
    assert "offsets_f32" in done.error


@pytest.mark.parametrize("stage", ["offsets_f32", "source_f32"])
def test_dumps_of_different_inputs_are_not_comparable(dumps: Path, changed: Path, stage: str) -> None:
    rewrite(changed, at(G[stage], lambda a: a * np.float32(2)))
    done = svf("diff", dumps / "torch", changed)
    assert done.code == 3
    assert stage in done.error
    assert GATE in done.error


# What a dump without its operands, without its tensors or without its manifest is worth.


def moved(folder: Path, target: Path) -> Path:
    """A copy of a dump that no longer finds its components."""
    shutil.copytree(folder, target)
    with_json(target / MANIFEST_FILE, lambda m: m.update(components="/nowhere"))
    return target


def test_a_dump_whose_components_moved_is_incomplete_unless_identical(dumps: Path, made: Path, tmp_path: Path) -> None:
    a, b = (moved(dumps / name, tmp_path / name) for name in ("torch", "jax"))
    done = svf("diff", a, b, "--json")
    assert (done.code, done.json["outcome"]) == (5, "incomplete")
    assert "cannot be judged" in done.json["verdict"]
    assert svf("diff", a, moved(dumps / "torch", tmp_path / "again")).code == 0
    assert svf("diff", a, b, "--components", made / "components").code == 0
    # One operand side is enough to judge nothing of the other.
    assert svf("diff", dumps / "torch", b).code in (0, 5)


def test_other_components_than_the_dumps_are_not_used(dumps: Path, bundle: Path, tmp_path: Path) -> None:
    a, b = (moved(dumps / name, tmp_path / name) for name in ("torch", "jax"))
    with_tensors(
        bundle / "trinity_svf_components.safetensors", lambda t: [t.update({k: t[k] * 2}) for k in t if ".S." in k]
    )
    assert svf("diff", a, b, "--components", bundle).code in (3, 5)


def hash_only(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    (target / LAYER).unlink()
    with_json(target / MANIFEST_FILE, lambda m: [e.update(file=None) for e in m["tensors"].values()])
    return target


def test_hash_dumps_agree_when_all_hashes_do_and_are_incomplete_otherwise(dumps: Path, tmp_path: Path) -> None:
    torch, jax = hash_only(dumps / "torch", tmp_path / "torch"), hash_only(dumps / "jax", tmp_path / "jax")
    again = hash_only(dumps / "torch", tmp_path / "again")
    same = svf("diff", torch, again, "--json")
    assert (same.code, same.json["outcome"]) == (0, "agree")
    assert {row["verdict"] for row in same.json["rows"]} == {"exact"}
    assert svf("diff", torch, dumps / "torch").code == 0
    different = svf("diff", torch, jax, "--json")
    assert (different.code, different.json["outcome"]) == (5, "incomplete")
    with_json(again / MANIFEST_FILE, lambda m: m["tensors"].pop(G["u_scaled"]))
    missing = svf("diff", torch, again, "--json")
    assert missing.code == 1
    assert culprit(missing.json)[:3] == (GATE, "u_scaled", "missing")


def test_a_dump_without_its_manifest_is_refused(dumps: Path, changed: Path) -> None:
    (changed / MANIFEST_FILE).unlink()
    done = svf("diff", dumps / "torch", changed)
    assert done.code == 3
    assert MANIFEST_FILE in done.error


def test_a_truncated_dump_is_refused(dumps: Path, changed: Path) -> None:
    (changed / LAYER).write_bytes((changed / LAYER).read_bytes()[:-4])
    done = svf("diff", dumps / "torch", changed)
    assert done.code == 3
    assert "truncated" in done.error


def test_nothing_compared_is_never_a_pass(dumps: Path, tmp_path: Path, changed: Path) -> None:
    write_tensors(tmp_path / "none.safetensors", {"weight": np.zeros(3, np.float32)})
    done = svf("diff", tmp_path / "none.safetensors", tmp_path / "none.safetensors")
    assert done.code == 3
    assert "no replay stages" in done.error
    with_json(changed / MANIFEST_FILE, lambda m: m.update(selected=[], tensors={}))
    done = svf("diff", changed, changed, "--json")
    assert (done.code, done.json["outcome"], done.json["coverage"]["compared"]) == (5, "incomplete", 0)


def test_tensors_that_do_not_meet_are_told_and_nothing_was_compared(dumps: Path, made: Path, tmp_path: Path) -> None:
    for name in ("up_proj", "q_proj"):
        command = ["replay", made / "components", "--backend", "reference", "--select", name]
        assert svf(*command, "--out", tmp_path / name).code == 0
    done = svf("diff", tmp_path / "up_proj", tmp_path / "q_proj", "--json")
    assert (done.code, done.json["coverage"]["compared"], done.json["rows"]) == (5, 0, [])
    assert [len(done.json["lacks"][letter]) for letter in "ab"] == [1, 1]
    assert done.json["verdict"].startswith(
        "Nothing was compared. a lacks tensor.model.layers.2.self_attn.q_proj.weight"
    )


def test_sides_that_are_not_there(dumps: Path, tmp_path: Path) -> None:
    done = svf("diff", dumps / "torch", tmp_path / "none")
    assert done.code == 4
    assert "no such file or folder" in done.error
    (tmp_path / "empty").mkdir()
    assert svf("diff", tmp_path / "empty", dumps / "torch").code == 4


# Gates, by name.


def test_the_stage_tolerance_gate(dumps: Path, changed: Path) -> None:
    done = svf("diff", dumps / "torch", dumps / "jax", "--strict-stage-tolerances", "--json")
    assert (done.code, done.json["gates"]) == (0, {"strict_stage_tolerances": True})
    # Far above rounding and still within the declared tolerance: the verdict fails, the gate does not.
    rewrite(changed, at(G["matmul_pre_norm"], element(lambda x: x + 5e-4)))
    done = svf("diff", dumps / "torch", changed, "--strict-stage-tolerances", "--json")
    assert (done.code, done.json["gates"]) == (1, {"strict_stage_tolerances": True})
    rewrite(changed, at(G["matmul_pre_norm"], element(lambda x: x + 0.1)))
    done = svf("diff", dumps / "torch", changed, "--strict-stage-tolerances", "--json")
    assert (done.code, done.json["gates"]) == (1, {"strict_stage_tolerances": False})


def test_the_current_hash_gate_takes_a_as_reference(dumps: Path, changed: Path) -> None:
    same = svf("diff", dumps / "torch", dumps / "torch", "--strict-current-python", "--json")
    assert (same.code, same.json["gates"]) == (0, {"strict_current_python": True})
    rewrite(changed, at(K["final_bf16"], element(lambda x: x * 2)))
    done = svf("diff", dumps / "torch", changed, "--strict-current-python", "--json")
    assert done.json["gates"] == {"strict_current_python": False}


def test_the_historical_hash_is_in_a_report_alone(dumps: Path) -> None:
    done = svf("diff", dumps / "torch", dumps / "torch", "--strict-reference", "--json")
    assert done.code in (1, 2)


def test_a_gate_that_finds_no_checks_fails(changed: Path) -> None:
    with_json(changed / MANIFEST_FILE, lambda m: m.update(selected=[], tensors={}))
    done = svf("diff", changed, changed, "--strict-stage-tolerances", "--json")
    assert (done.code, done.json["gates"]) == (1, {"strict_stage_tolerances": False})


# Two reports.


@pytest.fixture(scope="session")
def reports(made: Path) -> tuple[Path, Path]:
    """The reference side's report and torch's replay of it."""
    done = svf("replay", made / "components", "--backend", "torch", "--reference-report", made / "components.json",
               "--report", made / "replay.json")  # fmt: skip
    assert done.code == 0, done.err
    return made / "components.json", made / "replay.json"


def diff_reports(reports: tuple[Path, Path], *gates: str) -> Result:
    return svf("diff", *reports, "--json", *gates)


def test_two_reports_agree_with_81_required_checks(reports: tuple[Path, Path]) -> None:
    done = diff_reports(reports, "--strict-stage-tolerances", "--strict-current-python")
    assert (done.code, done.json["outcome"]) == (0, "agree")
    assert done.json["gates"] == {"strict_stage_tolerances": True, "strict_current_python": True}
    assert done.json["coverage"]["checks"] == 81


def test_a_historical_hash_that_nobody_reaches_fails_its_gate(reports: tuple[Path, Path]) -> None:
    done = diff_reports(reports, "--strict-reference")
    assert (done.code, done.json["gates"]) == (1, {"strict_reference": False})


def changed_report(reports: tuple[Path, Path], tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    path = Path(shutil.copy(reports[1], tmp_path / "changed.json"))
    with_json(path, change)
    return path


def first_check(report: dict[str, Any]) -> dict[str, Any]:
    variants = report["semantic_python_component_variants"]
    return next(v["stage_debug"]["checks"][2] for v in variants if v.get("stage_debug", {}).get("checks"))


def test_one_failed_check_diverges(reports: tuple[Path, Path], tmp_path: Path) -> None:
    bad = changed_report(reports, tmp_path, lambda r: first_check(r).update(functional_passed=False))
    done = svf("diff", reports[0], bad, "--json", "--strict-stage-tolerances")
    assert (done.code, done.json["gates"]) == (1, {"strict_stage_tolerances": False})
    assert [c["stage"] for c in done.json["failed_checks"]] == ["stage.scaled_s"]


def test_another_final_hash_fails_the_current_gate(reports: tuple[Path, Path], tmp_path: Path) -> None:
    def other(report: dict[str, Any]) -> None:
        for variant in report["semantic_python_component_variants"]:
            variant["observed_bf16_sha256"] = "1" * 64

    done = svf("diff", reports[0], changed_report(reports, tmp_path, other), "--json", "--strict-current-python")
    assert (done.code, done.json["gates"]) == (1, {"strict_current_python": False})


def test_reports_without_checks_or_hashes_are_incomplete_and_fail_the_gate(
    reports: tuple[Path, Path], tmp_path: Path
) -> None:
    empty = changed_report(reports, tmp_path, lambda r: r.update(semantic_python_component_variants=[]))
    assert svf("diff", reports[0], empty).code == 5
    done = svf("diff", reports[0], empty, "--strict-stage-tolerances", "--json")
    assert (done.code, done.json["gates"]) == (1, {"strict_stage_tolerances": False})


@pytest.mark.parametrize("other", ["dump", "bundle"])
def test_a_report_is_compared_with_a_report(reports: tuple[Path, Path], dumps: Path, made: Path, other: str) -> None:
    folder = dumps / "torch" if other == "dump" else made / "components"
    for pair in ((reports[0], folder), (folder, reports[0])):
        done = svf("diff", *pair)
        assert done.code == 2
        assert "report" in done.error


def test_a_json_file_that_is_no_report(reports: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"schema": "other"}))
    done = svf("diff", reports[0], tmp_path / "x.json")
    assert done.code == 3
    assert "other" in done.error
    (tmp_path / "x.json").write_text("{")
    assert svf("diff", reports[0], tmp_path / "x.json").code == 3
    (tmp_path / "x.json").write_text(json.dumps({"schema": "trinity_sakana_svd_parity_trace.v2", "reference": 7,
        "semantic_python_component_variants": 3, "large_tensor_chunk_checks": "x"}))  # fmt: skip
    assert svf("diff", reports[0], tmp_path / "x.json").code in (3, 5)
