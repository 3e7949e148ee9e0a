"""The one grammar of --layers and --stages: `0,3-5`, `ffn_gate,ffn_swigl`, `all`."""

from __future__ import annotations

import re

from stages.errors import UsageError, shown
from stages.spec.stage import Pipeline

ALL = "all"


def parse_layers(text: str | None, count: int | None = None) -> tuple[int, ...]:
    """`26`, `0,3-5` as sorted layer numbers; `UsageError` for anything else, or a layer not below `count`."""
    there = "" if count is None else f"; there are 0-{count - 1}"
    layers: set[int] = set()
    for part in (text or "").split(",") if text else ():
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part, re.ASCII)
        if match is None:
            raise UsageError(f"--layers '{shown(text)}': expected numbers and ranges, such as 26 or 0,3-5{there}")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise UsageError(f"--layers {part.strip()}: {first} comes after {last}{there}")
        if count is not None and last >= count:
            raise UsageError(f"--layers {part.strip()}: no layer {last}{there}")
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


def resolve_layers(text: str, count: int) -> tuple[int, ...]:
    """The layers that `text` names, of a model of `count`; `all` is every one."""
    if text.strip() == ALL:
        return tuple(range(count))
    if not text.strip():
        raise UsageError(f"--layers is empty; there are 0-{count - 1}, or all")
    return parse_layers(text, count)


def resolve_stages(text: str, path: Pipeline) -> tuple[str, ...]:
    """The stages that `text` names (`ffn_gate,ffn_swigl`, or `all`), in execution order; aliases are resolved."""
    if text.strip() == ALL:
        return tuple(path)
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name in path.absent:
            raise UsageError(f"--stages {name}: {path.name} has no such step; it has {', '.join(path)}")
        if name not in path and name not in path.aliases:
            also = "".join(f", {alias} (= {stage})" for alias, stage in path.aliases.items())
            raise UsageError(f"--stages: no stage '{shown(name)}'; there are {', '.join(path)}{also}")
    if not names:
        raise UsageError(f"--stages is empty; there are {', '.join(path)}, or all")
    wanted = {path.aliases.get(name, name) for name in names}
    return tuple(name for name in path if name in wanted)
