"""All kinds of fault by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from stages.selftest.fault import Fault
from stages.selftest.forward_faults import FORWARD_FAULTS
from stages.selftest.replay_faults import REPLAY_FAULTS
from stages.selftest.weight_faults import WEIGHT_FAULTS


def _by_name(faults: tuple[Fault, ...]) -> Mapping[str, Fault]:
    table = {fault.name: fault for fault in faults}
    if len(table) != len(faults):
        raise ValueError("two kinds of fault have one name")
    return MappingProxyType(table)


FAULTS = _by_name((*FORWARD_FAULTS, *WEIGHT_FAULTS, *REPLAY_FAULTS))
