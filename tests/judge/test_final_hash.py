"""A recorded hash of native arithmetic that a float64 run does not reach: how many elements differ, and by what."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import GATE, Result, svf, tensors_of, with_json, with_tensors

from stages.files.bundle import ALL_STAGES_FILE, SAMPLE_STAGES_FILE, tensor_stage_key
from stages.files.tensorfile import sha256

FINAL = tensor_stage_key(GATE, "final_bf16")


def replay(bundle: Path, report: Path, backend: str = "torch", *more: str) -> Result:
    return svf("replay", bundle, "--backend", backend, "--precision", "exact", "--select", "gate_proj",
               "--reference-report", report, "--strict-current-python", *more)  # fmt: skip


def recorded_as(folder: Path, bundle: Path, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """A report of a side whose final_bf16 was `change`d; the bundle's stages are its own."""
    found: dict[str, str] = {}

    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[FINAL] = change(tensors[FINAL].copy())
        found["hash"] = sha256(tensors[FINAL].T)  # the report's orientation

    with_tensors(bundle / ALL_STAGES_FILE, edit)
    report = folder / "report.json"
    reference = {"current_python_baseline_bf16_sha256": found["hash"], "expected_bf16_sha256": None}
    report.write_text(json.dumps({"schema": "trinity_sakana_python_svd_parity_trace.v2", "reference": reference}))
    return report


def ulps(n: int, places: int) -> Callable[[np.ndarray], np.ndarray]:
    """The first `places` elements moved by `n` units in the last place, from the bits of a bfloat16."""

    def change(array: np.ndarray) -> np.ndarray:
        array.view(np.uint16).reshape(-1)[:places] += np.uint16(n)
        return array

    return change


@pytest.mark.parametrize("backend", ["torch", "jax", "both"])
def test_the_originals_elements_differ_by_its_own_rounding(golden: Path, backend: str) -> None:
    tiny = golden / "trinity-tiny"
    done = replay(tiny / "python_components", tiny / "python_sample_trace.json", backend, "--json")
    account = done.json["recorded_hash"]
    assert (done.code, done.json["gates"]) == (1, {"strict_current_python": False})
    assert (account["count"], account["beyond_calibrated"], account["beyond_rigorous"]) == (64 * 192, 0, 0)
    assert 0 < account["differing"] < 50
    assert "each within that side's own float32 rounding" in account["note"]


@pytest.mark.parametrize("bundle_of", ["components", "sample"])
def test_elements_that_no_rounding_explains_are_counted(bundle_of: str, made: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(made / bundle_of, tmp_path / "bundle"))
    if bundle_of == "sample":  # final stages transposed, as the report has them
        with_tensors(bundle / SAMPLE_STAGES_FILE, lambda t: ulps(16, 5)(t["stage.final_bf16"]))
        report = Path(shutil.copy(made / "sample.json", tmp_path / "report.json"))
        moved = sha256(tensors_of(bundle / SAMPLE_STAGES_FILE)["stage.final_bf16"])
        with_json(report, lambda r: r["reference"].update(current_python_baseline_bf16_sha256=moved))
    else:
        report = recorded_as(tmp_path, bundle, ulps(16, 5))
    account = replay(bundle, report, "torch", "--json").json["recorded_hash"]
    assert account["source"].startswith("recorded in")
    assert account["beyond_rigorous"] == account["beyond_calibrated"] == 5
    assert account["differing"] >= 5
    assert "not rounding" in account["note"]


def test_a_hash_that_is_reached_needs_no_account(bundle: Path, tmp_path: Path) -> None:
    run = ("replay", bundle, "--backend", "torch", "--precision", "exact", "--select", "gate_proj", "--json")
    reached = svf(*run).json["sample_sha256"]
    report = recorded_as(tmp_path, bundle, lambda a: a)
    with_json(report, lambda r: r["reference"].update(current_python_baseline_bf16_sha256=reached))
    done = replay(bundle, report, "torch", "--json")
    assert (done.code, done.json["recorded_hash"]) == (1 if done.json["culprit"] else 0, None)
    assert done.json["gates"] == {"strict_current_python": True}


def test_without_recorded_elements_this_machine_computes_them_again(bundle: Path, made: Path, tmp_path: Path) -> None:
    native = svf("replay", bundle, "--backend", "torch", "--select", "gate_proj", "--json").json["sample_sha256"]
    report = recorded_as(tmp_path, bundle, lambda a: a)
    with_tensors(bundle / ALL_STAGES_FILE, lambda t: t.pop(FINAL))
    with_json(report, lambda r: r["reference"].update(current_python_baseline_bf16_sha256=native))
    account = replay(bundle, report, "torch", "--json").json["recorded_hash"]
    if account is not None:  # native torch differs from the exact result in at least one element of this tensor
        assert account["source"] == "computed again by torch on this machine"
        assert (account["count"], account["beyond_calibrated"]) == (64 * 192, 0)


def test_what_is_not_known_is_said_to_be_unknown(bundle: Path, tmp_path: Path) -> None:
    report = recorded_as(tmp_path, bundle, lambda a: a)
    with_json(report, lambda r: r["reference"].update(current_python_baseline_bf16_sha256="a" * 64))
    done = replay(bundle, report, "jax")
    assert done.code == 1
    assert "how many differ is not known" in " ".join(done.out.split())
    account: dict[str, Any] = replay(bundle, report, "jax", "--json").json["recorded_hash"]
    assert (account["source"], account["differing"], account["beyond_rigorous"]) == (None, None, None)


def test_the_replaying_sides_report_has_the_account(bundle: Path, tmp_path: Path) -> None:
    report = recorded_as(tmp_path, bundle, ulps(16, 3))
    replay(bundle, report, "torch", "--report", str(tmp_path / "replay.json"))
    assert json.loads((tmp_path / "replay.json").read_text())["recorded_hash"]["beyond_rigorous"] == 3


def test_native_precision_accounts_for_nothing(bundle: Path, tmp_path: Path) -> None:
    report = recorded_as(tmp_path, bundle, ulps(16, 3))
    done = svf("replay", bundle, "--backend", "torch", "--select", "gate_proj", "--reference-report", report, "--json")
    assert done.json["recorded_hash"] is None
