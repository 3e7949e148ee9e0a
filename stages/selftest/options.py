"""What the selftest may be asked."""

from __future__ import annotations

from dataclasses import dataclass

from stages.selftest.fault import Fault
from stages.spec.backend import SIDES


@dataclass(frozen=True)
class SelftestOptions:
    """What `svf selftest` was asked to do; see its `--help`."""

    faults: tuple[Fault, ...]
    backends: tuple[str, ...] = SIDES
    quick: bool = False
    recordings: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()  # kinds of recipes whose rows are planted (rows.py)
    profiles: tuple[str, ...] = ()  # recordings under which forward faults are planted again (profiles.py)
    clean: int = 40
    seed: int = 0
    scale: float = 1.0
