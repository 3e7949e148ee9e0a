"""Whether two runs are of one model: what a manifest records of it, and where these are to be had, the checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from stages.errors import InputError, shown
from stages.files.source import ModelSource
from stages.spec.config import ModelConfig
from stages.spec.families import parse_config


def other_model(
    one: Mapping[str, Any], other: Mapping[str, Any], a: ModelSource | None = None, b: ModelSource | None = None
) -> str | None:
    """What makes two recorded models (fingerprint, config) two, in words; None when they are one.

    Fields that change no number, and the order of a config's lines, do not; nor how tensors are spread over files,
    where both checkpoints are to be had to compare their values.
    """
    differing = list(_config_fields(one.get("config"), other.get("config")))
    if differing:
        return f"config.json differs in {', '.join(differing)}"
    prints = [dict(model.get("fingerprint") or {}) for model in (one, other)]
    headers = [found.get("headers_sha256") for found in prints]
    if a is not None and b is not None:
        return _other_tensor(a, b)
    if headers[0] == headers[1]:
        return None
    return "the tensor headers differ (names, shapes, dtypes or order in the files); give --model to see which"


def _config_fields(one: Any, other: Any) -> Iterator[str]:
    """The fields, with both values, in which two configs say different things."""
    try:
        both = parse_config(one, "a"), parse_config(other, "b")
    except InputError:
        if one != other:
            yield "fields that are not understood"
        return
    for field in fields(ModelConfig):
        x, y = (getattr(config, field.name) for config in both)
        if x != y:
            yield f"{field.name} ({shown(x)} and {shown(y)})"


def _other_tensor(a: ModelSource, b: ModelSource) -> str | None:
    """The first tensor in which two checkpoints differ: a name, a shape, a dtype, or values.

    A fingerprint is the same for two fine-tunes: each stage would be right on its own weights, and all would agree.
    """
    if a.path.resolve() == b.path.resolve():
        return None
    for name in dict.fromkeys([*a.tensors, *b.tensors]):
        one, other = a.tensors.get(name), b.tensors.get(name)
        if one is None or other is None:
            return f"'{shown(name)}' is in {'b' if one is None else 'a'} alone"
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            kinds = (f"{info.dtype.name} {list(info.shape)}" for info in (one, other))
            return f"'{shown(name)}' is {' and '.join(kinds)}"
        if a.weights_sha256([name]) != b.weights_sha256([name]):
            return f"'{shown(name)}' has other values"
    return None
