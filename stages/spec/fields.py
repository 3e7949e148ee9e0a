"""Fields of a `config.json`, read and checked; an `InputError` names the file (`where`) and the field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from stages.errors import InputError, shown

# No tensor dimension is larger; a config beyond it is damaged, and its products would overflow a file offset.
MAX_SIZE = 2**31 - 1


def got(value: object) -> str:
    names = {True: "true", False: "false", None: "null"}
    return names[value] if value is None or isinstance(value, bool) else shown(repr(value))


def value_of(holder: Mapping[str, Any], field: str, where: str, within: str) -> tuple[Any, str]:
    place = f"{where}: {within}.{field}" if within else f"{where}: {field}"
    if field not in holder:
        raise InputError(f"{place}: absent; the computation depends on it, so state it")
    return holder[field], place


def size(holder: Mapping[str, Any], field: str, where: str, within: str = "", *, limit: int = MAX_SIZE) -> int:
    value, place = value_of(holder, field, where, within)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
        raise InputError(f"{place}: expected an integer from 1 to {limit}, got {got(value)}")
    return value


def number(holder: Mapping[str, Any], field: str, where: str, within: str = "", *, least: float = 0.0) -> float:
    """A finite number above 0 and at least `least`."""
    value, place = value_of(holder, field, where, within)
    wanted = f"a finite number of at least {least:g}" if least else "a finite number above 0"
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"{place}: expected {wanted}, got {got(value)}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not (math.isfinite(found) and found > 0 and found >= least):
        raise InputError(f"{place}: expected {wanted}, got {got(value)}")
    return found


def flag(holder: Mapping[str, Any], field: str, where: str, within: str = "", *, default: bool | None = None) -> bool:
    if default is not None and field not in holder:
        return default
    value, place = value_of(holder, field, where, within)
    if not isinstance(value, bool):
        raise InputError(f"{place}: expected true or false, got {got(value)}")
    return value


def choice(holder: Mapping[str, Any], field: str, allowed: tuple[str, ...], where: str, within: str = "") -> str:
    value, place = value_of(holder, field, where, within)
    if value not in allowed:
        raise InputError(f"{place}: expected {' or '.join(allowed)}, got {got(value)}")
    return value
