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


def _by_name(faults: tuple[Fault, ...]) -> Mapping[str, Fault]:
    table = {fault.name: fault for fault in faults}
    if len(table) != len(faults):
        raise ValueError("two kinds of fault have one name")
    return MappingProxyType(table)


FAULTS = _by_name((*NORM_FAULTS, *PRODUCT_FAULTS, *ATTENTION_FAULTS, *ELEMENT_FAULTS, *WEIGHT_FAULTS, *REPLAY_FAULTS))
