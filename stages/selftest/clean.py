"""Clean runs: models of many shapes, lengths, dtypes and kinds of weights, without any fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.selftest.specimens import MANNERS, Specimen

# heads and key/value heads: 1, 2, 4, 7 and 8 query heads to a key head.
_GROUPS = ((4, 4), (4, 2), (8, 2), (7, 1), (14, 2), (8, 1), (16, 8))
_HEAD_DIMS = (8, 16, 24, 32, 64, 128)
_HIDDEN = (32, 64, 96, 112, 160, 256)
_INTERMEDIATE = (40, 96, 160, 200, 384)
_SHORT = (1, 2, 3, 4, 5, 8, 13, 20, 31, 32, 33, 64, 100)
_LONG = (128, 200, 257, 350, 500)
_DTYPES = ("float32", "float32", "bfloat16", "float32", "bfloat16", "float32", "float16")
_OFFSETS = (0.01, 0.17, 0.5, 0.9, 3.0)
# So many in a row have one shape: XLA compiles each shape anew, and that takes longer than the run.
_ALIKE = 3
# One shape in so many is long, or that of a layer of the 0.6B model; one run in so many is a component replay.
_EVERY_LONG, _EVERY_LARGE, _EVERY_REPLAY = 10, 20, 4
_LARGE: Mapping[str, Any] = {
    "heads": 16,
    "kv_heads": 8,
    "head_dim": 128,
    "hidden": 1024,
    "intermediate": 3072,
    "layers": 1,
    "vocab": 512,
}


@dataclass(frozen=True)
class Sample:
    """One clean comparison: a forward of a specimen, or the replay of its decomposed layer."""

    specimen: Specimen
    replay: bool
    offsets: float

    @property
    def label(self) -> str:
        s = self.specimen
        return f"a clean {'replay' if self.replay else 'forward'}, {s.family} {s.dtype} {s.hidden} x {s.tokens}"

    def fields(self) -> dict[str, Any]:
        """What the document says of the run."""
        return {"path": "replay" if self.replay else "forward", **vars(self.specimen), "offsets": self.offsets}


def samples(count: int, seed: int) -> list[Sample]:
    """`count` samples, the same for the same seed."""
    rng = np.random.default_rng((seed, 3))
    shapes = [_shape(number, rng) for number in range(-(-count // _ALIKE))]
    return [_sample(number, shapes[number // _ALIKE], rng) for number in range(count)]


def _shape(number: int, rng: np.random.Generator) -> dict[str, Any]:
    """What XLA compiles for: family, dtype, sizes and length."""
    heads, kv_heads = _one(_GROUPS, rng)
    long, large = number % _EVERY_LONG == _EVERY_LONG // 2, number % _EVERY_LARGE == _EVERY_LARGE // 3
    shape = {
        "family": ("qwen3", "qwen2")[number % 2],
        "dtype": _DTYPES[number % len(_DTYPES)],
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": _one(_HEAD_DIMS, rng),
        "hidden": _one(_HIDDEN, rng),
        "intermediate": _one(_INTERMEDIATE, rng),
        "layers": 1 if long else 2,
        "vocab": _one((100, 300, 512), rng),
        "tokens": _one(_LONG if long else _SHORT, rng),
    }
    return {**shape, **_LARGE, "tokens": _one((16, 64, 200), rng)} if large else shape


def _sample(number: int, shape: Mapping[str, Any], rng: np.random.Generator) -> Sample:
    # What would overflow float16 is no clean run in it.
    manners = ("plain", "sparse") if shape["dtype"] == "float16" else tuple(MANNERS)
    specimen = Specimen(
        **shape,
        tied=bool(rng.integers(2)),
        seed=int(rng.integers(1 << 31)),
        embedding=_one((0.02, 0.05, 0.8, 2.0, 50.0), rng),
        sharpness=_one((1.0, 1.0, 1.0, 10.0), rng),
        manner=_one(manners, rng) if rng.random() < 0.6 else "plain",
    )
    return Sample(specimen, number % _EVERY_REPLAY == _EVERY_REPLAY - 1, _one(_OFFSETS, rng))


def _one(values: Sequence[Any], rng: np.random.Generator) -> Any:
    return values[int(rng.integers(len(values)))]
