"""`svf doctor`: a broken framework is a finding, and so is whatever would change results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, svf

from stages.commands.backends import PROBES
from stages.commands.frameworks import framework
from stages.jobs import doctor
from stages.run.children import ChildResult

WELL = {"devices": ["cpu"], "settings": {"default_dtype": "float32", "tf32_matmul": False}}


@pytest.fixture(autouse=True)
def _well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without findings; each test adds one."""
    for name in doctor.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SVF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "run_child", lambda _, timeout: ChildResult(0, WELL))
    monkeypatch.setattr(doctor, "available_bytes", lambda: 2**40)
    monkeypatch.setattr(doctor, "_free", lambda _: 2**40)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: range(doctor.os.cpu_count() or 1), raising=False)


def findings(code: int) -> list[dict[str, Any]]:
    done = svf("doctor", "--json")
    assert (done.code, done.json["schema"]) == (code, "svf.doctor/1")
    text = svf("doctor")
    assert text.code == code
    assert all(f["what"] in text.out and f["remedy"] in text.out for f in done.json["findings"])
    return list(done.json["findings"])


def test_a_machine_without_findings_is_well() -> None:
    assert findings(0) == []
    assert "WELL" in svf("doctor").out


@pytest.mark.processes
def test_both_frameworks_are_probed_in_children(monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.run.children import run_child

    monkeypatch.setattr(doctor, "run_child", run_child)
    done = svf("doctor", "--json")
    for name in ("torch", "jax"):
        assert done.json["frameworks"][name]["devices"][0] == "cpu"
        assert done.json["versions"][name]
    assert done.json["frameworks"]["torch"]["settings"]["float32_matmul_precision"] == "highest"


@pytest.mark.parametrize(
    "child", [ChildResult(-11, None), ChildResult(0, {"error": "ImportError: libfoo"}), ChildResult(0, 3)]
)
def test_a_framework_that_does_not_start_is_reported(monkeypatch: pytest.MonkeyPatch, child: ChildResult) -> None:
    monkeypatch.setattr(doctor, "run_child", lambda _, timeout: child)
    found = findings(1)
    assert [f["effect"] for f in found] == ["stops", "stops"]
    assert "does not start" in found[0]["what"]


def test_a_framework_that_cannot_be_imported_is_told_by_its_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROBES, "torch", "no_such_module:probe")
    assert "no_such_module" in framework(doctor.FrameworkRequest("torch"), None, None)["error"]


@pytest.mark.parametrize(("name", "value", "effect"), [
    ("XLA_FLAGS", "--xla_cpu_enable_fast_math=true", "changes"),
    ("XLA_FLAGS", "--xla_force_host_platform_device_count=2", None),
    ("NVIDIA_TF32_OVERRIDE", "1", "changes"),
    ("NVIDIA_TF32_OVERRIDE", "0", None),
    ("ONEDNN_DEFAULT_FPMATH_MODE", "BF16", "changes"),
    ("MKL_CBWR", "COMPATIBLE", "changes"),
    ("JAX_PLATFORMS", "cuda", "stops"),
    ("JAX_PLATFORMS", "cuda,cpu", None),
    ("HF_HUB_OFFLINE", "1", "know"),
    ("OMP_NUM_THREADS", "1", "know"),
])  # fmt: skip
def test_variables_that_change_results_are_found(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, effect: str | None
) -> None:
    monkeypatch.setenv(name, value)
    found = findings(1 if effect in ("changes", "stops") else 0)
    assert [f["effect"] for f in found] == ([effect] if effect else [])
    assert all(name in f["what"] for f in found)


def test_settings_of_a_framework_and_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = {"devices": ["cpu", "cuda:0 H200"], "settings": {"tf32_matmul": True}}
    monkeypatch.setattr(doctor, "run_child", lambda _, timeout: ChildResult(0, probe))
    assert [f["effect"] for f in findings(1)] == ["changes", "know"] * 2


def test_little_memory_and_disk_stop_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "available_bytes", lambda: 2**30)
    monkeypatch.setattr(doctor, "_free", lambda _: 2**20)
    assert [f["effect"] for f in findings(1)] == ["stops"] * 3


def test_a_missing_package_stops_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("numpy", "no-such-package"))
    (found,) = findings(1)
    assert "no-such-package" in found["what"]


def test_what_was_tested_with_is_what_the_tests_run_with() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert {name: pinned[name] for name in doctor.TESTED} == doctor.TESTED
    assert svf("doctor", "--json").json["tested_with"] == doctor.TESTED
