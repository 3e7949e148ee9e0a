"""RoPE's settings in a `config.json`, as `transformers` 5.23 reads them in `modeling_rope_utils.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from stages.errors import InputError, shown
from stages.spec.fields import choice, flag, got, number, size, value_of

# The keys that transformers reads for each rope_type, beside rope_theta, rope_type, type and partial_rotary_factor.
ROPE_KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
    "dynamic": frozenset({"factor"}),
    "longrope": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"}
    ),
    "llama3": frozenset({"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}),
}
RopeValue = float | int | bool | tuple[float, ...]
RopeParameters = tuple[tuple[str, RopeValue], ...]
_COMMON_ROPE_KEYS = frozenset({"rope_theta", "rope_type", "type", "partial_rotary_factor"})


def parse_rope(raw: Mapping[str, Any], positions: int, head_dim: int, where: str) -> tuple[float, str, RopeParameters]:
    """rope_theta, rope_type and the sorted parameters of that type."""
    field, table = _rope_table(raw, where)
    theta = _rope_theta(raw, field, table, where)
    for place, holder in ((f"{field}.", table), ("", raw)):
        if (factor := holder.get("partial_rotary_factor")) is not None and (isinstance(factor, bool) or factor != 1):
            raise InputError(
                f"{where}: {place}partial_rotary_factor: only 1 is supported, got {got(factor)}; transformers "
                "turns whole heads in this family"
            )
    kind = _rope_type(field, table, where)
    unknown = sorted(set(table) - ROPE_KEYS[kind] - _COMMON_ROPE_KEYS)
    if unknown:
        known = ", ".join(sorted(ROPE_KEYS[kind])) or "rope_theta only"
        raise InputError(
            f"{where}: {field}.{shown(unknown[0])}: transformers does not read it for rope_type '{kind}' ({known})"
        )
    values: dict[str, RopeValue] = {}
    if kind not in ("default", "longrope"):
        values["factor"] = number(table, "factor", where, field, least=1.0)
    if kind in ("yarn", "longrope", "llama3"):
        values["original_max_position_embeddings"] = _original_length(raw, field, table, positions, where)
    if kind == "yarn":
        values |= _yarn(field, table, where)
    if kind == "dynamic":
        if head_dim == 2:
            raise InputError(f"{where}: head_dim: 2 has no dynamic RoPE: its exponent is head_dim / (head_dim - 2)")
        values["original_max_position_embeddings"] = positions
    if kind == "longrope":
        original = int(values["original_max_position_embeddings"])  # type: ignore[arg-type]
        values |= _longrope(field, table, positions, original, head_dim, where)
    if kind == "llama3":
        values |= _llama3(field, table, where)
    return theta, kind, tuple(sorted(values.items()))


def _rope_table(raw: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """The object that holds the rope settings, and its field: rope_parameters, or rope_scaling before version 5."""
    found: list[tuple[str, dict[str, Any]]] = []
    for field in ("rope_parameters", "rope_scaling"):
        value = raw.get(field)
        if value is not None and not isinstance(value, dict):
            raise InputError(f"{where}: {field}: expected an object, got {got(value)}")
        if value:  # an empty object says nothing, and transformers passes over it
            found.append((field, value))
    if len(found) == 2 and found[0][1] != found[1][1]:
        raise InputError(f"{where}: rope_scaling: contradicts rope_parameters; keep one of them")
    return found[0] if found else ("rope_parameters", {})


def _rope_theta(raw: Mapping[str, Any], field: str, table: Mapping[str, Any], where: str) -> float:
    places = [(holder, prefix) for holder, prefix in ((table, field), (raw, "")) if "rope_theta" in holder]
    if not places:
        raise InputError(
            f"{where}: rope_theta: absent, at the top level and in rope_parameters; state it "
            "(transformers would silently take 10000)"
        )
    thetas = [number(holder, "rope_theta", where, prefix) for holder, prefix in places]
    if len(set(thetas)) > 1:
        raise InputError(f"{where}: rope_theta: {thetas[1]} contradicts {thetas[0]} in {field}; keep one")
    if thetas[0] <= 1:  # at 1 every position turns alike, and yarn divides by log(theta)
        raise InputError(f"{where}: rope_theta: expected more than 1, got {thetas[0]}")
    return thetas[0]


def _rope_type(field: str, table: Mapping[str, Any], where: str) -> str:
    keys = [key for key in ("rope_type", "type") if key in table]
    names = [choice(table, key, tuple(ROPE_KEYS), where, field) for key in keys] or ["default"]
    if len(set(names)) > 1:
        raise InputError(f"{where}: {field}.type: '{names[1]}' contradicts rope_type '{names[0]}'; keep one")
    return names[0]


def _yarn(field: str, table: Mapping[str, Any], where: str) -> dict[str, RopeValue]:
    """The settings of YaRN with transformers' defaults filled in (https://huggingface.co/papers/2309.00071)."""
    fast = _optional(field, table, "beta_fast", where) or 32.0
    slow = _optional(field, table, "beta_slow", where) or 1.0
    if fast < slow:
        raise InputError(f"{where}: {field}.beta_fast: {fast} is less than beta_slow {slow}")
    return {
        "attention_factor": _optional(field, table, "attention_factor", where)
        or _yarn_attention_factor(field, table, where),
        "beta_fast": fast,
        "beta_slow": slow,
        "truncate": flag(table, "truncate", where, field, default=True),
    }


def _longrope(
    field: str, table: Mapping[str, Any], positions: int, original: int, head_dim: int, where: str
) -> dict[str, RopeValue]:
    """The settings of LongRoPE (https://huggingface.co/papers/2402.13753)."""
    lists = {key: _numbers(table, key, head_dim // 2, where, field) for key in ("short_factor", "long_factor")}
    given = table.get("factor") is not None
    factor = number(table, "factor", where, field, least=1.0) if given else positions / original
    found = _optional(field, table, "attention_factor", where)
    if found is None:
        if factor > 1 and original == 1:  # its logarithm divides
            raise InputError(f"{where}: {field}.original_max_position_embeddings: expected more than 1, got 1")
        found = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {**lists, "attention_factor": found}


def _llama3(field: str, table: Mapping[str, Any], where: str) -> dict[str, RopeValue]:
    """The settings of Llama 3.1's RoPE: wavelengths between two lengths are blended."""
    low, high = (number(table, key, where, field) for key in ("low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise InputError(f"{where}: {field}.high_freq_factor: expected more than low_freq_factor {low}, got {high}")
    return {"low_freq_factor": low, "high_freq_factor": high}


def _optional(field: str, table: Mapping[str, Any], key: str, where: str) -> float | None:
    return None if table.get(key) is None else number(table, key, where, field)


def _numbers(table: Mapping[str, Any], key: str, count: int, where: str, field: str) -> tuple[float, ...]:
    """A list of `count` finite numbers above 0."""
    value, place = value_of(table, key, where, field)
    if not isinstance(value, list) or len(value) != count:
        has = f"{len(value)} of them" if isinstance(value, list) else got(value)
        raise InputError(f"{place}: expected a list of {count} numbers, one a frequency, got {has}")
    return tuple(number({f"{key}[{i}]": x}, f"{key}[{i}]", where, field) for i, x in enumerate(value))


def _original_length(raw: Mapping[str, Any], field: str, table: Mapping[str, Any], positions: int, where: str) -> int:
    key = "original_max_position_embeddings"
    lengths = [size(holder, key, where, at) for holder, at in ((table, field), (raw, "")) if key in holder]
    if len(set(lengths)) > 1:  # transformers lets the top level win over the table
        raise InputError(f"{where}: {key}: {lengths[1]} contradicts {lengths[0]} in {field}; keep one")
    return lengths[0] if lengths else positions


def _yarn_attention_factor(field: str, table: Mapping[str, Any], where: str) -> float:
    factor = float(table["factor"])
    # transformers takes 0 and null for absent, and reads neither unless both are there
    there = [key for key in ("mscale", "mscale_all_dim") if table.get(key) is False or table.get(key)]
    scales = [number(table, key, where, field) for key in there]
    if len(scales) == 2:
        return _mscale(factor, scales[0]) / _mscale(factor, scales[1])
    return _mscale(factor, 1.0)


def _mscale(factor: float, scale: float) -> float:
    # The same operations in the same order as transformers, so that the double is the same.
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
