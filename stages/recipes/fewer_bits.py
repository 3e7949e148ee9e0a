"""The right function in fewer bits: of its operands, some of them, its result, or both; rows of every stage alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from stages.oracle.activations import D4, DS4, Q8_0, Q8_1, Q8_K, Blocks
from stages.recipes.value import Value, keep, nearest, point
from stages.spec.noise import Noise
from stages.spec.stage import Stage


@dataclass(frozen=True)
class Narrow:
    """One way in which a kernel loses bits: `round` does to float64 numbers what it does. In words, and how many stay.

    `dtypes`: storage in which that loses something. `result`: whether a kernel would keep its result so. `whole`: it
    goes by the largest magnitude of a tensor, as a scale does: `round` takes that too. `core`: the format of the tensor
    core that takes such operands. `cast`: a dtype, to which a product's bias is cast too. `blocks`: a product's inputs
    alone are taken so, block by block. `usual`: who does that by itself.
    """

    name: str
    bits: int
    round: Callable[..., np.ndarray]
    dtypes: tuple[str, ...]
    result: bool = True
    whole: bool = False
    core: str | None = None
    cast: bool = False
    blocks: Blocks | None = None
    usual: str = ""

    def holds(self, stage: Stage, dtype: str) -> bool:
        """Whether it loses something of a stage that is stored in `dtype`."""
        return dtype in self.dtypes and (self.blocks is None or (stage.noise is Noise.PRODUCT and bool(stage.inputs)))

    def value(self, x: np.ndarray, peak: float | None = None) -> Value:
        """What `x` is taken to, with the numbers between which right kernels' lie."""
        if self.blocks is None:
            return point(self.of(x, peak))
        least, middle, most = self.blocks.cell(x)
        return point(middle) if np.array_equal(least, most) else Value(least, middle, most)

    def of(self, x: np.ndarray, peak: float | None = None) -> np.ndarray:
        """What `x` is taken to; `peak` is the largest magnitude of the tensor that `x` is part of, or its own."""
        if not self.whole:
            return self.round(x)
        return self.round(x, largest(x) if peak is None else peak)

    def changes(self, x: np.ndarray) -> bool:
        """Whether it takes any of these numbers to another one."""
        if self.blocks is not None and not self.blocks.divides(x):
            return False
        wide = x.astype(np.float64, copy=False)
        return not np.array_equal(self.of(wide), wide)

    def keeps(self, a: np.ndarray) -> bool:
        """Whether the mantissas of stored numbers alone show that they lose nothing."""
        stored = _MANTISSAS.get(a.dtype.name)
        if stored is None or not self.bits or self.whole:
            return False
        raw = np.ravel(a).view(f"u{a.dtype.itemsize}")
        if self.cast and self.bits == 10:  # float16's range is less
            size = raw & np.iinfo(raw.dtype).max // 2
            low, high = (np.array(x, a.dtype).view(raw.dtype) for x in (2.0**-14, 65504.0))
            if int((size - 1).min()) + 1 < low or size.max() > high:  # less 1, what is 0 is the largest
                return False
        return not int(np.bitwise_or.reduce(raw)) & ((1 << max(stored - self.bits, 0)) - 1)

    @property
    def words(self) -> str:
        return f"{self.bits} mantissa bits, {self.name}" if self.bits else self.name


def largest(x: np.ndarray) -> float:
    """The largest magnitude, 0 of nothing."""
    x = x.astype(np.float32) if x.dtype.itemsize == 2 else x  # whose own comparisons are slow
    return float(max(x.max(initial=0), -x.min(initial=0)))


def _by_rows(x: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers times one scale per row: the largest is 2^bits - 1."""
    scale = np.maximum(np.abs(x).max(axis=-1, keepdims=True), 1e-300) / (2**bits - 1)
    return np.rint(x / scale) * scale


def _scaled(x: np.ndarray, peak: float, bits: int, top: float, least: float) -> np.ndarray:
    """Numbers of few bits, scaled so that `peak` is the format's largest."""
    scale = max(peak, 1e-300) / top
    y = x / scale
    return np.where(np.abs(y) < least, np.rint(y / least * 2**bits) * least / 2**bits, keep(y, bits)) * scale


# Stored mantissa bits by dtype.
_MANTISSAS = {"float32": 23, "bfloat16": 7, "float16": 10}
_WIDE = ("float32",)
_EVERY = ("float32", "bfloat16", "float16")
# Nearest even is what a cast does, truncation what a tensor core does to operands that were not cast before. TF32 and
# what is only cut keep float32's range.
NARROW: tuple[Narrow, ...] = (
    Narrow("bfloat16-like", 7, lambda x: nearest(x, "bfloat16"), ("float32", "float16"), core="bfloat16", cast=True),
    Narrow("bfloat16-like (truncated)", 7, lambda x: keep(x, 7, "truncate"), _WIDE, core="bfloat16"),
    Narrow("TF32-like", 10, lambda x: keep(x, 10), _WIDE, core="tf32"),
    Narrow("TF32-like (ties away)", 10, lambda x: keep(x, 10, "away"), _WIDE, core="tf32"),
    Narrow("TF32-like (truncated)", 10, lambda x: keep(x, 10, "truncate"), _WIDE, core="tf32"),
    Narrow("float16-like (with its range)", 10, lambda x: nearest(x, "float16"), ("float32", "bfloat16"), cast=True),
    Narrow(
        "float8-like (e4m3), scaled",
        3,
        lambda x, peak: _scaled(x, peak, 3, 448.0, 2.0**-6),
        _EVERY,
        result=False,
        whole=True,
    ),
    Narrow(
        "float8-like (e5m2), scaled",
        2,
        lambda x, peak: _scaled(x, peak, 2, 57344.0, 2.0**-14),
        _EVERY,
        result=False,
        whole=True,
    ),
    *(
        Narrow(
            f"8-bit whole numbers with a scale for {blocks.size} of them, ggml's {name}",
            0,
            lambda x, blocks=blocks: blocks.cell(x)[1],
            _WIDE,
            result=False,
            blocks=blocks,
            usual=f"as ggml does on {device} before it multiplies with {weights}",
        )
        for blocks, name, device, weights in (
            (Q8_0, "Q8_0", "a CPU", "Q4_0, Q5_0 and Q8_0"),
            (Q8_1, "Q8_1", "a CPU", "Q4_1 and Q5_1"),
            (Q8_K, "Q8_K", "a CPU", "K-quants"),
            (DS4, "Q8_1 with sums of the inputs (CUDA's layout DS4)", "CUDA", "Q4_0, Q4_1, Q5_0, Q5_1, Q4_K and Q5_K"),
            (D4, "Q8_1 with float32 scales (CUDA's layout D4)", "CUDA", "Q8_0, Q5_0, Q3_K, Q6_K and IQ types"),
        )
    ),
    Narrow(
        "8-bit whole numbers with a scale per row",
        0,
        lambda x: _by_rows(x, 7),
        _EVERY,
        result=False,
    ),
)
BY_NAME: Mapping[str, Narrow] = MappingProxyType({narrow.name: narrow for narrow in NARROW})


@dataclass(frozen=True)
class Lost:
    """What `narrow` takes: arguments by their numbers, the result, or both."""

    narrow: Narrow
    which: tuple[int, ...] = ()
    result: bool = False


def ways(
    inputs: tuple[str, ...], changed: list[bool], narrow: Narrow, biases: tuple[int, ...] = ()
) -> Iterator[tuple[str, Lost]]:
    """In which ways `narrow` may have lost bits of a stage, likeliest first, in words.

    `changed`: which of its arguments have more bits than that, the inputs first; `biases`: which are a product's.
    """
    numbers = tuple(i for i, more in enumerate(changed) if more)
    own, weights = (tuple(i for i in numbers if (i < len(inputs)) == first) for first in (True, False))
    if narrow.blocks is not None:
        if own:
            yield f"its inputs are {narrow.words}", Lost(narrow, own)
        return
    if narrow.result:
        yield f"its result has {narrow.words}", Lost(narrow, result=True)
    if not numbers:
        return
    yield f"its operands have {narrow.words}", Lost(narrow, numbers)
    if own and weights:
        yield f"its inputs have {narrow.words}", Lost(narrow, own)
        yield f"its weights have {narrow.words}", Lost(narrow, weights)
    matrices = tuple(i for i in weights if i not in biases)
    if narrow.cast and matrices and matrices != weights:
        if own:
            yield f"its operands have {narrow.words}; its biases do not", Lost(narrow, (*own, *matrices))
        yield f"its weights have {narrow.words}; its biases do not", Lost(narrow, matrices)
    if len(own) > 1:
        for i in own:
            yield f"its values of {inputs[i]} have {narrow.words}", Lost(narrow, (i,))
        if narrow.cast:  # a fused kernel reads and writes it so, and computes between in float32
            first = own[0]
            yield f"its values of {inputs[first]} and its result have {narrow.words}", Lost(narrow, (first,), True)
    if narrow.result:
        yield f"its operands and its result have {narrow.words}", Lost(narrow, numbers, result=True)
