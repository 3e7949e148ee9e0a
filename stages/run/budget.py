"""Memory that a run takes: estimated before anything is loaded, and held to `--max-memory`."""

from __future__ import annotations

import math
import re
import resource
from collections.abc import Sequence

from stages.errors import ResourceError, UsageError, shown
from stages.files.memory import available_bytes
from stages.run.forward import LM_HEAD_CHUNK
from stages.run.replay import default_chunk_rows
from stages.spec.config import ModelConfig
from stages.spec.dtypes import stored_dtype
from stages.spec.families import layer_blocks, shape_of
from stages.spec.forward import stage_shape
from stages.spec.replay import REPLAY
from stages.spec.stage import Pipeline

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
# What a tiny model's forward peaks at: torch with `transformers` 0.41 GB, JAX 0.35 GB.
_BASE = 420_000_000
# Copies of what is worked on: read ahead, as numpy's array, as the framework's.
_COPIES = 3
# A chunk's stages, the recorded ones beside them, and the oracle's in float64 with their bounds. An embedding of
# 151,936 x 1,024 peaked at 1.42 GB on torch and at 1.82 GB on JAX.
_CHUNK_COPIES = 10


def parse_size(text: str) -> int:
    """Bytes of `500M`, `2G`, `1.5GiB`; `UsageError` for anything else."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*(K|M|G|KI|MI|GI)?B?", text.strip().upper(), re.ASCII)
    if match is None:
        raise UsageError(f"--max-memory '{shown(text)}': expected a size such as 500M, 2G or 1.5GiB")
    return int(float(match.group(1)) * _UNITS[match.group(2) or ""])


def hold_memory(needed: int, limit: int | None, advice: str) -> None:
    """Hold this process's data to `limit` bytes, so that an allocation beyond fails; without one, do nothing.

    `ResourceError`, naming both figures, when `needed` is more than `limit`, or than what is free.
    """
    check_memory(needed, limit, advice)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def check_memory(needed: int, limit: int | None, advice: str) -> None:
    """`ResourceError`, naming both figures, when `needed` bytes are more than `limit`, or than what is free."""
    free = available_bytes()
    allowed, whose = (limit, "--max-memory allows") if limit is not None and limit < free else (free, "the machine has")
    if needed > allowed:
        raise ResourceError(f"needs about {needed / 1e9:.2f} GB of memory, {whose} {allowed / 1e9:.2f} GB; {advice}")


def forward_bytes(config: ModelConfig, path: Pipeline, tokens: int) -> int:
    """What tracing a forward takes: a layer's weights and stages, a chunk of the LM head, and the logits."""
    size = stored_dtype(path.activations).itemsize
    blocks, vocab = layer_blocks(config), config.vocab_size
    layer = max(sum(math.prod(shape_of(axes, config.sizes)) for axes in block.params.values()) for block in blocks)
    kinds = {id(kind): kind.of_layer(None) for kind in path.layers}.values()
    values = max(sum(math.prod(stage_shape(config, stage, tokens)) for stage in kind) for kind in kinds)
    head = min(vocab, LM_HEAD_CHUNK) * config.hidden_size
    return _BASE + size * (_COPIES * max(layer, head) + 2 * values + tokens * vocab)


def replay_bytes(shapes: Sequence[tuple[int, int]], chunk_rows: int | None) -> int:
    """What replaying tensors of these shapes takes, one after the other: a chunk of the largest, and its V."""
    return _BASE + max(_CHUNK_COPIES * _chunk_bytes(shape, chunk_rows) + _COPIES * _v_bytes(shape) for shape in shapes)


def _chunk_bytes(shape: tuple[int, int], chunk_rows: int | None) -> int:
    rows = min(shape[0], chunk_rows or default_chunk_rows(shape))
    return 4 * rows * sum(shape[1] if "cols" in s.shape else min(shape) for s in REPLAY.values() if s.by_rows)


def _v_bytes(shape: tuple[int, int]) -> int:
    return 4 * shape[1] * min(shape)
