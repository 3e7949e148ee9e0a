"""The `svf.selftest/1` document: what was planted, what was found and named, and false alarms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stages.selftest.faults import FAULTS, group_of
from stages.selftest.profiles import reached, tallies
from stages.selftest.rows import ROWS

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
    profiled: Sequence[Mapping[str, Any]] = (),
    under: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The whole document; `passed` when enough faults are named and no clean run or right recording raised an alarm.

    `profiled` are faults, and `under` right runs, judged under profiles.
    """
    profiles = tallies(profiled, under)
    unseen, faults = [r for r in faults if r.get("unseen")], [r for r in faults if not r.get("unseen")]
    misnamed = sum(row.get("misnamed", False) for row in faults)
    alarms = [row for row in clean if row["outcome"] != "agree"]
    sound = sum(row["outcome"] == "sound" for row in recorded)
    twins = sum(row["twin"]["named"] for row in recorded)
    agreeing = sum(row["outcome"] == "agree" for row in used)
    other = sum(row["twin"]["outcome"] in ("diverged", "refused") for row in used)
    named = sum(row["named"] for row in faults)
    return {
        "schema": "svf.selftest/1",
        "passed": not alarms
        and not misnamed
        and named >= LEAST_NAMED * len(faults)
        and sound == twins == len(recorded)
        and agreeing == other == len(used)
        and all(map(reached, profiles))
        and bool(faults or clean or recorded or used),
        "backends": list(options.backends),
        "quick": options.quick,
        "seed": options.seed,
        "scale": options.scale,
        "planted": len(faults),
        "found": sum(row["found"] for row in faults),
        "named": named,
        "misnamed": misnamed,
        "rows": sum("row" in row for row in faults),
        "rows_unseen": len(unseen),
        "clean_runs": len(clean),
        "false_alarms": len(alarms),
        "recordings": len(recorded),
        "recordings_sound": sound,
        "recordings_twins_named": twins,
        "uses": len(used),
        "uses_agreeing": agreeing,
        "uses_twins_told": other,
        "kinds": [_kind(name, rows) for name, rows in _grouped(faults).items()],
        "faults": list(faults),
        "clean": list(clean),
        "recorded": list(recorded),
        "used": list(used),
        "profiles": profiles,
        "profiled": list(profiled),
        "profiled_clean": list(under),
        "seconds": round(seconds, 1),
    }


def _grouped(faults: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in faults:
        groups.setdefault(row["fault"], []).append(row)
    return groups


def _kind(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    fault = FAULTS.get(name) or ROWS[name]
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


def exit_code(document: Mapping[str, Any]) -> int:
    """0 when the selftest passed, otherwise 1."""
    return 0 if document["passed"] else 1
