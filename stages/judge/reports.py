"""Reports of the original parity tool: schemas, and what is read of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.errors import InputError, shown
from stages.files.jsonio import read_object
from stages.judge.document import Gates

REFERENCE_SCHEMA = "trinity_sakana_python_svd_parity_trace.v2"
REPLAY_SCHEMA = "trinity_sakana_svd_parity_trace.v2"
VARIANT_LISTS = ("variants", "native_elixir_svd_variants", "semantic_python_component_variants")


def reference_hashes(path: Path) -> Gates:
    """Hashes that gates need, from a reference-side report."""
    report = read_object(path)
    if report.get("schema") != REFERENCE_SCHEMA:
        raise InputError(f"{path}: schema is {shown(report.get('schema'))}, expected {REFERENCE_SCHEMA}")
    reference = report.get("reference")
    if not isinstance(reference, dict):
        raise InputError(f"{path}: expected an object 'reference'")
    return Gates(
        current=_text(reference.get("current_python_baseline_bf16_sha256")),
        historical=_text(reference.get("expected_bf16_sha256")),
        reference_hashes=tuple(v["observed_bf16_sha256"] for v in variants_of(report)),
    )


def variants_of(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every variant of a report of either side that has a final bf16 hash, those of equal labels too."""
    found = [item for name in VARIANT_LISTS for item in items_of(report, name)]
    return [item for item in found if isinstance(item.get("observed_bf16_sha256"), str)]


def items_of(report: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The objects of a list in a report; none where it is something else."""
    value = report.get(name)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
