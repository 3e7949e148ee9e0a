"""Reports of the original parity tool: what its comparator reads of ours, and what svf says of two of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import manifest_of
from helpers import GATE, K_PROJ, Result, svf, tensors_of, with_json, with_tensors

from stages.files.selection import Selection
from stages.jobs.decompose import FLOAT64, decompose
from stages.jobs.decompose_options import DecomposeOptions
from stages.spec.backend import Backend
from stages.spec.replay import REPLAY

pytestmark = pytest.mark.slow

GATED = ("--strict-current-python", "--strict-stage-tolerances")
TARGETS = {GATE: [64, 192], K_PROJ: [64, 64]}  # a sample turned to its target, and a square one that is taken as it is


@dataclass(frozen=True)
class Made:
    """A bundle with its reference report."""

    components: Path
    report: Path


@pytest.fixture(scope="session", params=TARGETS, ids=["turned", "square"])
def reference(
    request: Any, model: Path, vector: Path, selection: Selection, workplace: Path, torch_backend: Backend
) -> Made:
    """All selected tensors, with a sample of either orientation."""
    folder, name = workplace / f"reports-{request.param}", request.param
    folder.mkdir()
    shape = next(list(t.shape) for t in selection.tensors if t.source_name == name)
    manifest = manifest_of(selection)
    manifest["sample_adapted_tensor"] |= {
        "source_name": name, "source_shape": shape, "sample_reconstructed_shape": TARGETS[name],
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    made = Made(folder / "components", folder / "reference.json")
    options = DecomposeOptions(str(model), vector, folder / "manifest.json", (), made.components, made.report, True)
    decompose(options, FLOAT64, torch_backend)
    return made


def replayed(reference: Made, report: Path, *arguments: object, backend: str = "torch") -> Result:
    return svf("replay", reference.components, "--backend", backend, "--reference-report", reference.report,
               "--report", report, *arguments)  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def original_hashes(report: dict[str, Any]) -> dict[str, str]:
    """As the original's comparator collects them: of equal labels the last one counts."""
    lists = ("variants", "native_elixir_svd_variants", "semantic_python_component_variants")
    return {v["label"]: v["observed_bf16_sha256"] for name in lists for v in report.get(name, [])}


def original_stage_file(report: dict[str, Any]) -> str | None:
    """As it looks for the replaying side's stage file: the first label with these words that has one."""
    for variant in report["semantic_python_component_variants"]:
        if "host_binary_v_layout_torch_v" in variant["label"] and variant.get("stage_debug", {}).get(
            "stage_tensor_file"
        ):
            return str(variant["stage_debug"]["stage_tensor_file"])
    return None


@pytest.mark.cover(1)
@pytest.mark.parametrize("layout", ["declared", "all"])
def test_the_current_hash_gate_passes_in_replay_diff_and_the_original_alike(
    reference: Made, tmp_path: Path, layout: str
) -> None:
    report = tmp_path / "replay.json"
    done = replayed(reference, report, "--layout", layout, "--strict-current-python", "--json")
    assert (done.code, done.json["gates"]) == (0, {"strict_current_python": True})
    compared = svf("diff", reference.report, report, "--json", *GATED)
    assert (compared.code, compared.json["outcome"]) == (0, "agree"), compared.json["verdict"]
    current = read(reference.report)["reference"]["current_python_baseline_bf16_sha256"]
    assert current in original_hashes(read(report)).values()


@pytest.mark.cover(1)
@pytest.mark.parametrize("layout", ["declared", "all"])
def test_each_variant_has_a_label_of_its_own_and_the_sample_one_more(
    reference: Made, tmp_path: Path, layout: str
) -> None:
    replayed(reference, tmp_path / "r.json", "--layout", layout)
    variants = read(tmp_path / "r.json")["semantic_python_component_variants"]
    labels = [v["label"] for v in variants]
    assert len(set(labels)) == len(labels)
    # Seven of nine V are square here, so two do not fit nx and vh.
    assert len(variants) == 10 if layout == "declared" else len(variants) > 20
    samples = [v for v in variants if v["label"].endswith("_sample_orientation")]
    assert {v["source_name"] for v in samples} == {read(reference.report)["reference"]["source_name"]}
    assert len([v for v in samples if v["v_layout"] == "torch_v"]) == 1
    for variant in variants:
        assert variant["final"]["sha256"] == variant["observed_bf16_sha256"]
        assert variant["final"]["sha256"] == variant["final_f32_before_bf16"]["sha256_as_bf16"]
        assert variant["final"]["size"] == int(np.prod(variant["final"]["shape"]))


@pytest.mark.cover(1)
@pytest.mark.parametrize("place", ["--out", "--stage-dir"])
def test_the_original_finds_the_samples_stages_as_the_reference_side_has_them(
    reference: Made, tmp_path: Path, place: str
) -> None:
    replayed(reference, tmp_path / "r.json", place, tmp_path / "stages")
    found = original_stage_file(read(tmp_path / "r.json"))
    assert found is not None
    ours = tensors_of(Path(found))
    theirs = tensors_of(Path(read(reference.report)["stage_debug"]["stage_tensor_file"].replace(
        "components", str(reference.components))))  # fmt: skip
    assert list(ours) == list(theirs)
    for key, array in theirs.items():
        assert np.array_equal(ours[key], array), key  # torch, the same machine and order
    document = svf("diff", reference.report, tmp_path / "r.json", "--json").json
    assert [s["stage"] for s in document["reports"]["stage_files"]["stages"]] == list(REPLAY)
    assert not any(s["mismatched"] for s in document["reports"]["stage_files"]["stages"])


def test_a_stage_folder_has_a_file_of_each_tensor_and_is_refused_when_taken(reference: Made, tmp_path: Path) -> None:
    replayed(reference, tmp_path / "r.json", "--stage-dir", tmp_path / "stages", "--chunk-rows", "32")
    files = [
        v["stage_debug"]["stage_tensor_file"] for v in read(tmp_path / "r.json")["semantic_python_component_variants"]
    ]
    assert len(set(files[:-1])) == 9
    for variant in read(tmp_path / "r.json")["semantic_python_component_variants"]:
        stages = tensors_of(Path(variant["stage_debug"]["stage_tensor_file"]))
        assert [key.removeprefix("stage.") for key in sorted(stages)] == sorted(REPLAY)
        assert list(stages["stage.final_bf16"].shape) == variant["final"]["shape"]
    again = replayed(reference, tmp_path / "again.json", "--stage-dir", tmp_path / "stages")
    assert again.code == 6
    assert "exists and is not empty" in again.error
    assert svf("replay", reference.components, "--stage-dir", tmp_path / "new").code == 2  # both sides, one folder


def test_without_a_place_for_stages_the_report_names_no_file(reference: Made, tmp_path: Path) -> None:
    replayed(reference, tmp_path / "r.json")
    assert original_stage_file(read(tmp_path / "r.json")) is None


@pytest.mark.cover(1)
@pytest.mark.parametrize(
    ("arguments", "step"), [((), "--order inferred"), (("--precision", "reference"), "--order inferred")]
)
def test_a_failed_gate_says_the_next_step(
    reference: Made, tmp_path: Path, arguments: tuple[str, ...], step: str
) -> None:
    other = Path(shutil.copy(reference.report, tmp_path / "other.json"))
    with_json(other, lambda r: r["reference"].update(current_python_baseline_bf16_sha256="1" * 64))
    done = replayed(Made(reference.components, other), tmp_path / "r.json", "--strict-current-python", *arguments)
    assert done.code == 1
    assert step in done.out
    compared = svf("diff", other, tmp_path / "r.json", "--strict-current-python")
    assert (compared.code, step in compared.out) == (1, True)
    assert "--order" not in svf("diff", reference.report, tmp_path / "r.json").out


# What svf says of two reports.


@pytest.fixture(scope="session")
def replayed_once(reference: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replayed")
    replayed(reference, folder / "replay.json", "--stage-dir", folder / "stages")
    return folder


@pytest.fixture
def pair(reference: Made, replayed_once: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The reference's report, and a copy of a replay's that names copies of its stage files."""
    shutil.copytree(replayed_once / "stages", tmp_path / "stages")
    report = (replayed_once / "replay.json").read_text()
    (tmp_path / "replay.json").write_text(report.replace(str(replayed_once), str(tmp_path)))
    return reference.report, tmp_path / "replay.json"


def check_of(report: dict[str, Any], tensor: str, stage: str) -> dict[str, Any]:
    """The check of one stage, in the variant that has it."""
    found: dict[str, Any] = next(
        check
        for variant in report["semantic_python_component_variants"]
        if variant["source_name"] == tensor
        for check in variant["stage_debug"]["checks"]
        if check["stage"] == f"stage.{stage}"
    )
    return found


def fail(tensor: str, stage: str, max_abs: float) -> Callable[[dict[str, Any]], None]:
    def change(report: dict[str, Any]) -> None:
        check_of(report, tensor, stage).update(functional_passed=False, byte_match=False, max_abs_error=max_abs,
                                               mean_abs_error=max_abs / 50, mismatched_element_count=77)  # fmt: skip

    return change


def test_a_failed_check_is_the_culprit_with_tensor_stage_and_numbers(pair: tuple[Path, Path]) -> None:
    with_json(pair[1], fail(K_PROJ, "matmul_pre_norm", 0.37))
    with_json(pair[1], fail(GATE, "final_f32", 0.5))
    done = svf("diff", *pair, "--json")
    assert (done.code, done.json["outcome"]) == (1, "diverged")
    culprit = done.json["culprit"]
    assert {k: culprit[k] for k in ("side", "layer", "tensor", "stage", "verdict")} == {
        "side": "b", "layer": 2, "tensor": K_PROJ, "stage": "matmul_pre_norm", "verdict": "bug",
    }  # fmt: skip
    assert culprit["ratio"] == pytest.approx(0.37 / 50 / 1e-5)  # the mean is further beyond its tolerance
    for words in ("0.37", "0.001", "77 elements"):
        assert words in culprit["hint"]
    assert [row["stage"] for row in done.json["rows"] if row["verdict"] == "bug"] == ["matmul_pre_norm", "final_f32"]
    text = svf("diff", *pair)
    assert text.code == 1
    for words in ("0.37", K_PROJ, "matmul_pre_norm", "2 of 81 required checks failed"):
        assert words in text.out


def test_reports_that_agree_have_no_culprit_and_say_the_largest_difference(pair: tuple[Path, Path]) -> None:
    with_json(pair[1], lambda r: check_of(r, GATE, "final_f32").update(max_abs_error=3e-7, byte_match=False))
    done = svf("diff", *pair, "--json", *GATED)
    assert (done.code, done.json["culprit"]) == (0, None)
    worst = done.json["reports"]["checks"]["worst"][0]
    assert (worst["tensor"], worst["stage"], worst["max_abs"]) == (GATE, "final_f32", 3e-7)
    assert "3e-07 at final_f32" in done.json["verdict"]
    # Within a declared tolerance is not the same as rounding.
    assert next(r["verdict"] for r in done.json["rows"] if r["max_abs"] == 3e-7) == "unjudged"


def test_all_that_the_original_prints_is_there(pair: tuple[Path, Path]) -> None:
    done = svf("diff", *pair)
    variants = read(pair[0])["variants"] + read(pair[1])["semantic_python_component_variants"]
    for variant in variants:
        assert variant["observed_bf16_sha256"][:16] in done.out
        assert f"{variant['zero_offset_max_abs_error_vs_source']:.3g}" in done.out
    for words in ("Stored hash", "Current hash of a", "Equal hashes of the two reports", "90 of 9 tensors, 81 required",
                  "Checks of row chunks: none", "The sample's stages in"):  # fmt: skip
        assert words in done.out


def test_elements_of_the_named_stage_files_are_compared(pair: tuple[Path, Path]) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["stage.matmul_pre_norm"][3, 5] += 1

    with_tensors(Path(original_stage_file(read(pair[1])) or ""), change)
    done = svf("diff", *pair, "--json", "--top", "1")
    found = {s["stage"]: s for s in done.json["reports"]["stage_files"]["stages"]}
    assert found["matmul_pre_norm"]["max_abs_index"] == [3, 5]
    assert found["matmul_pre_norm"]["mismatched"] == 1
    assert not any(s["mismatched"] for name, s in found.items() if name != "matmul_pre_norm")
    assert "matmul_pre_norm [3, 5]" in svf("diff", *pair, "--top", "1").out


@pytest.mark.parametrize("value", [7, "a\0b", ".", "/no/such/file", [], None])
def test_a_stage_file_that_is_none_is_told_and_the_rest_compared(pair: tuple[Path, Path], value: Any) -> None:
    def change(report: dict[str, Any]) -> None:
        for variant in report["semantic_python_component_variants"]:
            variant["stage_debug"]["stage_tensor_file"] = value

    with_json(pair[1], change)
    done = svf("diff", *pair, "--json")
    assert (done.code, done.json["reports"]["stage_files"]["stages"]) == (0, [])
    assert "elements are not compared" in done.json["reports"]["stage_files"]["note"]


def test_a_failed_chunk_is_named_with_its_rows(reference: Made, tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    replayed(reference, report, "--chunk-rows", "32")
    assert svf("diff", reference.report, report, "--json").json["reports"]["chunks"]["required"] > 100

    def change(document: dict[str, Any]) -> None:
        chunk = document["large_tensor_chunk_checks"][1]
        assert (chunk["row_start"], chunk["row_end"]) == (32, 64)
        chunk["stage_debug"]["checks"][5].update(functional_passed=False, max_abs_error=2.0, byte_match=False)

    with_json(report, change)
    done = svf("diff", reference.report, report, "--json", "--strict-stage-tolerances")
    assert done.code == 1
    assert "rows 32 to 64" in done.json["culprit"]["hint"]


def test_a_report_of_equal_labels_is_read_in_full(pair: tuple[Path, Path]) -> None:
    """As svf wrote them before: one label for nine variants."""

    def change(report: dict[str, Any]) -> None:
        variants = report["semantic_python_component_variants"]
        report["semantic_python_component_variants"] = [{**v, "label": "one"} for v in reversed(variants)]

    with_json(pair[1], change)
    assert svf("diff", *pair, "--strict-current-python").code == 0


def test_the_page_of_two_reports_is_written(pair: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    with_json(pair[1], fail(K_PROJ, "matmul_pre_norm", 0.37))
    done = svf("diff", *pair, "--html", tmp_path / "page.html")
    assert done.code == 1
    assert "matmul_pre_norm" in (tmp_path / "page.html").read_text()


def test_svf_report_says_what_to_do_with_what_report_writes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    for path in pair:
        done = svf("report", path, "--html", tmp_path / "page.html")
        assert done.code == 3
        assert "svf diff REFERENCE.json" in done.error
        assert "--html" in done.error
    assert not (tmp_path / "page.html").exists()
