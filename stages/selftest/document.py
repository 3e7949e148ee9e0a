"""The `svf.selftest/1` document: what was planted, what was found and named, and false alarms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stages.selftest.faults import group_of

if TYPE_CHECKING:
    from stages.selftest.options import SelftestOptions

# The share of planted faults that must be named; a false alarm is never allowed.
LEAST_NAMED = 0.99


def document(
    options: SelftestOptions,
    faults: Sequence[Mapping[str, Any]],
    clean: Sequence[Mapping[str, Any]],
    seconds: float,
    recorded: Sequence[Mapping[str, Any]] = (),
    used: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The whole document; `passed` when enough faults are named and no clean run or right recording raised an alarm."""
    alarms = [row for row in clean if row["outcome"] != "agree"]
    sound = sum(row["outcome"] == "sound" for row in recorded)
    twins = sum(row["twin"]["named"] for row in recorded)
    agreeing = sum(row["outcome"] == "agree" for row in used)
    other = sum(row["twin"]["outcome"] in ("diverged", "refused") for row in used)
    named = sum(row["named"] for row in faults)
    return {
        "schema": "svf.selftest/1",
        "passed": not alarms
        and named >= LEAST_NAMED * len(faults)
        and sound == twins == len(recorded)
        and agreeing == other == len(used)
        and bool(faults or clean or recorded or used),
        "backends": list(options.backends),
        "quick": options.quick,
        "seed": options.seed,
        "scale": options.scale,
        "planted": len(faults),
        "found": sum(row["found"] for row in faults),
        "named": named,
        "clean_runs": len(clean),
        "false_alarms": len(alarms),
        "recordings": len(recorded),
        "recordings_sound": sound,
        "recordings_twins_named": twins,
        "uses": len(used),
        "uses_agreeing": agreeing,
        "uses_twins_told": other,
        "kinds": [_kind(options, name, rows) for name, rows in _grouped(faults).items()],
        "faults": list(faults),
        "clean": list(clean),
        "recorded": list(recorded),
        "used": list(used),
        "seconds": round(seconds, 1),
    }


def _grouped(faults: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in faults:
        groups.setdefault(row["fault"], []).append(row)
    return groups


def _kind(options: SelftestOptions, name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    fault = next(fault for fault in options.faults if fault.name == name)
    ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
    return {
        "kind": name,
        "group": group_of(name),
        "path": fault.path,
        "doc": fault.doc,
        "stages": sorted({row["expected_stage"] for row in rows}),
        "size": rows[0]["size"],
        "planted": len(rows),
        "found": sum(row["found"] for row in rows),
        "named": sum(row["named"] for row in rows),
        "verdicts": sorted({str(row["verdict"]) for row in rows}),
        "least_ratio": min(ratios) if ratios else None,
    }


def listing(faults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every kind of fault, as `--list` shows it."""
    return [
        {"kind": f.name, "path": f.path, "changes": list(f.at), "doc": f.doc, "size": f.size} for f in faults.values()
    ]


def exit_code(document: Mapping[str, Any]) -> int:
    """0 when the selftest passed, otherwise 1."""
    return 0 if document["passed"] else 1
