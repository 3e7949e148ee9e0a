"""Tensor cores: what their accumulators cut off, by the generation of a GPU and the format of the operands.

A step adds some products and the accumulator: each is cut towards zero to so many bits below the largest exponent among
them, their sum to 24 bits. Nothing is rounded to nearest, so errors have one sign and grow with the number of steps.
arXiv 2511.10909 and 2512.07004 found it bit by bit; docs/findings/gpu.md has what was measured here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Core:
    """A step adds `products` of operands and the accumulator, cut to `bits` below the largest exponent among them."""

    products: int
    bits: int

    @property
    def lost(self) -> tuple[float, float]:
        """What K steps cut off in K u: in parts of the root of all terms' squares, and of the result's size."""
        return 1 / self.products, 2.0 ** (23 - self.bits)

    def worst(self, k: int) -> float:
        """No sum of `k` products loses more, in u of the sum of their sizes.

        Each step loses 2 u of the sum by its last cut and 2^-F of the largest addend by each of the others. Slices of K
        that are added in float32 lose no more than one accumulator and one addition.
        """
        return (k / self.products + 1) * (2 + (self.products + 1) * 2.0 ** (24 - self.bits)) + 1


# By the operands' format.
Cores = Mapping[str, Core]
VOLTA: Cores = MappingProxyType({"float16": Core(4, 23)})
AMPERE: Cores = MappingProxyType({"float16": Core(8, 24), "bfloat16": Core(8, 24), "tf32": Core(4, 24)})
HOPPER: Cores = MappingProxyType({"float16": Core(16, 25), "bfloat16": Core(16, 25), "tf32": Core(8, 25)})
# Of a device that is not known, for each format the one that cuts most off.
WIDEST: Cores = MappingProxyType({**AMPERE, **VOLTA})
NONE: Cores = MappingProxyType({})

# By the names that drivers give. Turing's (T4) are in no table that was read: taken as Volta's, which cut most off.
_GENERATIONS: tuple[tuple[str, Cores], ...] = (
    (r"\bV100|\bT4\b", VOLTA),
    (r"\bA(100|800|10G?|30|40)\b|\bL(4|40S?)\b|\bAda\b|\bRTX [34]0\d\d\b", AMPERE),
    (r"\b(GH|H)(100|200|800)\b|\b(GB|B)(100|200)\b", HOPPER),
)


def cores_of(device: str | None) -> Cores:
    """The tensor cores of a device by its fact: `cpu` has none; of one that is not known, the widest."""
    if device is None:
        return WIDEST
    if device == "cpu":
        return NONE
    return next((cores for names, cores in _GENERATIONS if re.search(names, device)), WIDEST)
