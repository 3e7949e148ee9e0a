"""All kinds of fault by name: what implementations get wrong, never what the judging code looks for."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from stages.selftest.attention_faults import ATTENTION_FAULTS
from stages.selftest.element_faults import ELEMENT_FAULTS
from stages.selftest.fault import Fault
from stages.selftest.norm_faults import NORM_FAULTS
from stages.selftest.product_faults import PRODUCT_FAULTS
from stages.selftest.replay_faults import REPLAY_FAULTS
from stages.selftest.weight_faults import WEIGHT_FAULTS

# What they touch, for tables.
GROUPS: Mapping[str, tuple[Fault, ...]] = MappingProxyType(
    {
        "RoPE's tables and norms": NORM_FAULTS,
        "products": PRODUCT_FAULTS,
        "attention": ATTENTION_FAULTS,
        "sums, activation, single elements": ELEMENT_FAULTS,
        "reading weights": WEIGHT_FAULTS,
        "component replay": REPLAY_FAULTS,
    }
)


def _by_name() -> Mapping[str, Fault]:
    table: dict[str, Fault] = {}
    for fault in (fault for faults in GROUPS.values() for fault in faults):
        if fault.name in table:
            raise ValueError(f"two kinds of fault are called '{fault.name}'")
        table[fault.name] = fault
    return MappingProxyType(table)


FAULTS = _by_name()


def group_of(name: str) -> str:
    """The group of a kind of fault."""
    return next(group for group, faults in GROUPS.items() if any(fault.name == name for fault in faults))
