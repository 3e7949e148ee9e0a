"""All kinds of fault by name: what implementations get wrong, planted by hand, and the rows of the catalogue."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from stages.selftest.apart import APART
from stages.selftest.expert_faults import EXPERT_FAULTS
from stages.selftest.fault import Fault
from stages.selftest.sized import SIZED
from stages.selftest.weight_faults import WEIGHT_FAULTS

# How they come about, for tables.
GROUPS: Mapping[str, tuple[Fault, ...]] = MappingProxyType(
    {
        "of a size, and single elements": SIZED,
        "reading weights": WEIGHT_FAULTS,
        "mixtures of experts": EXPERT_FAULTS,
        "described by a row, written apart": tuple(fault for fault in APART if fault.must),
        "described by no row": tuple(fault for fault in APART if not fault.must),
    }
)
FAULTS: Mapping[str, Fault] = MappingProxyType({f.name: f for faults in GROUPS.values() for f in faults})
if len(FAULTS) != sum(map(len, GROUPS.values())):
    raise ValueError("two kinds of fault have one name")


def group_of(name: str) -> str:
    """The group of a kind of fault; of what is not here, the rows of the catalogue."""
    return next((group for group, faults in GROUPS.items() if FAULTS.get(name) in faults), "rows of the catalogue")
