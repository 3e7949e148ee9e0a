"""What `svf selftest` was asked for, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stages.errors import UsageError, shown
from stages.selftest.document import listing
from stages.selftest.fault import Fault
from stages.selftest.faults import FAULTS
from stages.selftest.options import SelftestOptions
from stages.selftest.recordings import RECORDINGS
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
    uses = tuple(USES) if names is None else ()
    return SelftestOptions(_faults(names), chosen, quick, recordings, uses, count, seed)


def listed(names: Sequence[str] | None) -> dict[str, Any]:
    """The `svf.faults/1` document: every kind of fault, or those of `names`."""
    return {"schema": "svf.faults/1", "faults": listing({fault.name: fault for fault in _faults(names)})}


def _faults(names: Sequence[str] | None) -> tuple[Fault, ...]:
    for name in names or ():
        if name not in FAULTS:
            raise UsageError(f"--fault '{shown(name)}': there is no such fault; 'svf selftest --list' names all")
    return tuple(FAULTS[name] for name in names or FAULTS)
