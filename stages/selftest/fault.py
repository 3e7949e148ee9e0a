"""What a fault is: a change of what one stage computes, or of what one tensor is read as, of a size that is claimed.

Nothing here knows how a run is judged; no judging module imports this package.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

FORWARD, REPLAY = "forward", "replay"
# Specimens (specimens.py) that a fault is planted in unless it says otherwise: the first two in all layers.
FLOAT32 = ("qwen3", "qwen2")
EVERYWHERE = (*FLOAT32, "qwen2-untied", "qwen3-bf16", "qwen2-bf16")
BUNDLE = ("bundle",)


@dataclass(frozen=True)
class Call:
    """The call of a stage that a fault changes: the right function, natively computed, and its operands in numpy.

    `compute(*arguments, **options)` is the right function of other operands. `size` is the fault's.
    """

    compute: Callable[..., np.ndarray]
    arguments: tuple[np.ndarray, ...]
    options: Mapping[str, Any]
    size: float
    rng: np.random.Generator

    def right(self) -> np.ndarray:
        """The right result, writable."""
        return self.compute(*self.arguments, **self.options).copy()

    def of(self, *arguments: np.ndarray, **options: Any) -> np.ndarray:
        """The right function of other arguments (cast to the dtype of the right ones) or options."""
        pairs = zip(arguments or self.arguments, self.arguments, strict=True)
        return self.compute(*(np.asarray(x).astype(y.dtype) for x, y in pairs), **{**self.options, **options})


@dataclass(frozen=True)
class Load:
    """The reading of a tensor that a fault changes; `read` gives any tensor of the model, right."""

    name: str
    layer: int | None
    layers: int
    read: Callable[[str], np.ndarray]
    size: float
    rng: np.random.Generator

    def right(self) -> np.ndarray:
        """The right tensor, writable."""
        return self.read(self.name).copy()

    def beside(self, tensor: str) -> np.ndarray:
        """Another tensor of the same layer, by its name within it."""
        return self.read(f"model.layers.{self.layer}.{tensor}").copy()

    def of_neighbour(self) -> np.ndarray:
        """The same tensor of the layer before, or after the first."""
        assert self.layer is not None
        other = self.layer - 1 if self.layer else 1
        return self.read(self.name.replace(f"layers.{self.layer}.", f"layers.{other}.")).copy()


@dataclass(frozen=True)
class Fault:
    """One kind of fault: `plant` changes a call of one of the stages `at`, or `load` a tensor called one of `at`.

    `size` is the smallest that is claimed to be found, relative unless `doc` says otherwise; None where it has none.
    `says` is what a hint of it may say, a regular expression of all of it; where it `must`, of a part that is said.
    """

    name: str
    at: tuple[str, ...]
    doc: str
    plant: Callable[[Call], np.ndarray] | None = None
    load: Callable[[Load], np.ndarray] | None = None
    path: str = FORWARD
    on: tuple[str, ...] = EVERYWHERE
    size: float | None = None
    says: str | None = None
    must: bool = False

    def __post_init__(self) -> None:
        if (self.plant is None) == (self.load is None):
            raise ValueError(f"{self.name}: a fault changes a call or a tensor, one of them")

    def told_by(self, hint: str | None) -> bool:
        """Whether a hint says what the fault is, or nothing that it is not."""
        if self.says is None:
            return True
        if self.must:
            return hint is not None and re.search(self.says, hint) is not None
        return hint is None or re.fullmatch(self.says, hint) is not None


# -- what many faults are made of ---------------------------------------------------------------------------------


def float32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Through bfloat16, to nearest even."""
    import ml_dtypes

    return float32(float32(x).astype(ml_dtypes.bfloat16))


def float16(x: np.ndarray) -> np.ndarray:
    """Through float16, range included."""
    with np.errstate(over="ignore"):
        return float32(float32(x).astype(np.float16))


def cut(x: np.ndarray, bits: int = 10) -> np.ndarray:
    """Towards zero to `bits` mantissa bits: TF32 as a tensor core reads it, or bfloat16 by dropping half a word."""
    mask = np.uint32(0xFFFFFFFF) << np.uint32(23 - bits)
    return (np.ascontiguousarray(float32(x)).view(np.uint32) & mask).view(np.float32)


def next_value(x: np.ndarray, place: tuple[int, ...]) -> np.ndarray:
    """`x` with one element moved by one unit in the last place of its own dtype."""
    words = x.view({2: np.int16, 4: np.int32}[x.dtype.itemsize])
    words[place] += 1
    return x


def typical(x: np.ndarray, rng: np.random.Generator) -> tuple[int, ...]:
    """A random element among the larger half of `x`: neither an outlier nor next to nothing."""
    size = np.abs(float32(x)).reshape(-1)
    order = np.argsort(size)
    at = order[int(rng.integers(size.size // 2, max(size.size // 2 + 1, size.size * 3 // 4)))]
    return tuple(int(i) for i in np.unravel_index(at, x.shape))
