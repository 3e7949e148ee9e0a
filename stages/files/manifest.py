"""What a dump's manifest may hold: each field's kind, declared once and checked when the dump is opened."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from stages.errors import InputError, shown
from stages.spec.dtypes import DTYPES, dtype_name

# A file of a dump lies beside its manifest, and its name is safe to print.
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_DTYPE_NAMES = {dtype_name(dtype) for dtype in DTYPES.values()}

Check = Callable[[Any], bool]


def _is(*kinds: type) -> Check:
    return lambda value: type(value) in kinds  # exactly: True is no number here


def _list_of(item: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(item, value))


def _dict_of(item: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(item, value.values()))


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _fields(required: Mapping[str, Check], optional: Mapping[str, Check]) -> Check:
    def check(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and all(name in value and good(value[name]) for name, good in required.items())
            and all(name not in value or good(value[name]) for name, good in optional.items())
        )

    return check


def _size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _file_name(value: Any) -> bool:
    return isinstance(value, str) and _FILE.fullmatch(value) is not None


_TEXT, _SIZES = _is(str), _list_of(_size)
_SELECTED = _fields(
    {"source_name": _TEXT},
    {"sha256": _dict_of(_sha256), "layout": _TEXT, "transpose": _is(bool), "shape": _SIZES},
)
_MODEL = _fields({"config": _dict_of(lambda _: True)}, {"source": _TEXT, "fingerprint": _dict_of(_is(str, int))})
_COMMON = {
    "facts": _dict_of(_is(str, int, float, bool)),
    "backend": _or_none(_TEXT),
    "precision": _or_none(_TEXT),
}
# Kind of dump -> fields it must have, and fields it may have.
_KINDS: dict[str, tuple[dict[str, Check], dict[str, Check]]] = {
    "replay": (
        {"selected": _list_of(_SELECTED)},
        {"components": _or_none(_TEXT), "native_components": _is(bool), "model": _or_none(_TEXT)},
    ),
    "forward": (
        {"model": _MODEL, "tokens": lambda value: bool(value) and _SIZES(value)},
        {
            "tokens_sha256": _sha256,
            "layers": _or_none(_SIZES),
            "stages": _or_none(_list_of(_TEXT)),
            "inputs": _or_none(_list_of(_TEXT)),
            "positions": _TEXT,
            "dtype": _TEXT,
            "layout": _or_none(_TEXT),
            "components": _or_none(_fields({"source": _TEXT, "sha256": _dict_of(_dict_of(_sha256))}, {})),
            "adapted": _or_none(_dict_of(_TEXT)),
            "adapted_sha256": _or_none(_dict_of(_sha256)),
        },
    ),
}
# What an entry of `tensors` has, and what that must be, in words.
_TENSOR: dict[str, tuple[Check, str]] = {
    "file": (_or_none(_file_name), "a file of this folder, or null"),
    "dtype": (lambda value: isinstance(value, str) and value in _DTYPE_NAMES, "a dtype's name"),
    "shape": (_SIZES, "a list of sizes"),
    "sha256": (_sha256, "a sha256"),
}


def check_manifest(manifest: Mapping[str, Any], where: str) -> None:
    """`InputError` naming the first field of a dump's manifest that is missing, or of another kind than it must be."""
    kind = manifest.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise InputError(f"{where}: kind is {shown(kind)}, expected {' or '.join(_KINDS)}")
    required, optional = _KINDS[kind]
    for name, good in ({"tensors": _is(dict)} | required | optional | _COMMON).items():
        if name not in manifest and (name in required or name == "tensors"):
            raise InputError(f"{where}: the manifest has no '{name}', which a {kind} dump must have")
        if name in manifest and not good(manifest[name]):
            raise InputError(f"{where}: the manifest's '{name}' is {shown(manifest[name])}, which no {kind} dump has")
    for key, entry in manifest["tensors"].items():
        if not isinstance(entry, dict):
            raise InputError(f"{where}: tensor '{shown(key)}' is {shown(entry)}, expected an object")
        for name, (good, words) in _TENSOR.items():
            if name not in entry or not good(entry[name]):
                found = shown(entry.get(name))
                raise InputError(f"{where}: tensor '{shown(key)}': {name} is {found}, expected {words}")
