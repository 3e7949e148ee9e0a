"""What `svf selftest` was asked for, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stages.errors import UsageError, shown
from stages.selftest.fault import Fault
from stages.selftest.faults import FAULTS
from stages.selftest.options import SelftestOptions
from stages.selftest.profiles import PROFILES
from stages.selftest.recordings import RECORDINGS
from stages.selftest.rows import ROWS, Rows
from stages.selftest.run import selftest
from stages.selftest.uses import USES
from stages.spec.backend import SIDES

__all__ = ["listed", "options", "selftest"]

_CLEAN, _CLEAN_QUICK = 40, 8


def options(backend: str, names: Sequence[str] | None, *, quick: bool, clean: int | None, seed: int) -> SelftestOptions:
    """The parsed options; `UsageError` for a fault or backend that nothing can be planted in."""
    if backend not in (*SIDES, "both"):
        raise UsageError(f"--backend {backend}: faults are planted in {' or '.join(SIDES)}, or both")
    chosen = tuple(SIDES) if backend == "both" else (backend,)
    count = (_CLEAN_QUICK if quick else _CLEAN) if clean is None else clean
    recordings = tuple(RECORDINGS) if names is None else ()
    uses, profiles = (tuple(USES), tuple(PROFILES)) if names is None else ((), ())
    faults, rows = _chosen(names)
    return SelftestOptions(faults, chosen, quick, recordings, uses, tuple(rows), profiles, count, seed)


def listed(names: Sequence[str] | None) -> dict[str, Any]:
    """The `svf.faults/1` document: every kind of fault, or those of `names`."""
    faults, rows = _chosen(names)
    kinds: list[Fault | Rows] = [*faults, *(ROWS[name] for name in rows)]
    return {
        "schema": "svf.faults/1",
        "faults": [
            {"kind": f.name, "path": f.path, "changes": list(f.at), "doc": f.doc, "size": f.size} for f in kinds
        ],
    }


def _chosen(names: Sequence[str] | None) -> tuple[tuple[Fault, ...], list[str]]:
    """The faults written by hand, and the kinds of recipes whose rows are planted."""
    for name in names or ():
        if name not in FAULTS and name not in ROWS:
            raise UsageError(f"--fault '{shown(name)}': there is no such fault; 'svf selftest --list' names all")
    chosen = names or (*FAULTS, *ROWS)
    return tuple(FAULTS[name] for name in chosen if name in FAULTS), [name for name in chosen if name in ROWS]
