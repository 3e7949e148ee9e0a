"""The precision of a run: native kernels, float64 rounded at stage boundaries, or correctly rounded by Ziv's test."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from stages.errors import UsageError
from stages.files.memory import aligned_copy, aligned_empty
from stages.oracle.exact import NOISE, decide
from stages.oracle.rounding import round_once
from stages.oracle.verdict import STAGES
from stages.spec.backend import Backend, Delegate
from stages.spec.dtypes import stored_dtype
from stages.spec.forward import DECLARED, ROUNDED_INSIDE
from stages.spec.noise import Noise
from stages.spec.replay import REPLAY
from stages.spec.router import ROUTER

NATIVE, REFERENCE, EXACT = "native", "reference", "exact"
MODES = (NATIVE, REFERENCE, EXACT)
# Stages `x @ weight.T`, one weight or several joined: a row of a weight, and of its bias, gives a column.
LINEAR = frozenset(name for name in DECLARED if NOISE[name] is Noise.PRODUCT)
# Bytes of weights in float64 at a time. They stay in the cache and in memory that is used again: clearing the pages
# of a whole weight's copy takes longer than the product with 16 tokens (docs/findings/precision.md).
BLOCK_BYTES = 16 << 20
# And at least this many times the bytes of the input, which every block reads.
BLOCK_INPUTS = 4


@dataclass
class Count:
    """Elements of a stage over a run: all, left open by Ziv's test, computed again exactly, and changed by that."""

    elements: int = 0
    flagged: int = 0
    recomputed: int = 0
    corrected: int = 0


def with_precision(backend: Backend, mode: str) -> Backend:
    """`backend` as it is for `native`; otherwise one that computes its stages in `mode`."""
    if mode not in MODES:
        raise UsageError(f"--precision {mode}: there are {', '.join(MODES)}")
    return backend if mode == NATIVE else PreciseBackend(backend, mode)


def native(backend: Backend) -> Backend:
    """`backend` computing natively, whatever precision it has."""
    return backend.plain if isinstance(backend, PreciseBackend) else backend


# What a report says of a run's precision; all but the first in `exact` alone.
PRECISION_FIELDS = ("precision", "elements", "flagged", "recomputed", "corrected", "ziv")


def precision_fields(backend: Backend) -> dict[str, Any]:
    """What a report says of a run's precision; in `exact`, also what Ziv's test found, in all and per stage."""
    if not isinstance(backend, PreciseBackend):
        return {"precision": NATIVE}
    fields: dict[str, Any] = {"precision": backend.mode}
    if backend.mode == EXACT:
        for name in PRECISION_FIELDS[1:-1]:
            fields[name] = sum(getattr(count, name) for count in backend.counts.values())
        fields["ziv"] = {stage: asdict(count) for stage, count in backend.counts.items()}
    return fields


class PreciseBackend(Delegate):
    """A backend whose stages take and give numpy arrays as stored, computed in float64 by the backend inside.

    The framework computes a stage's float64 value (`Backend.wide`) from the stored inputs. The host widens these and
    rounds that value, once, for all backends alike: XLA counts float32 numbers below 2^-126 as zero when it converts.
    """

    def __init__(self, inside: Backend, mode: str):
        super().__init__(inside.widened())
        self.plain, self.mode = inside, mode
        self.counts: dict[str, Count] = {}
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._scratch: list[np.ndarray] = []
        self.replay = {name: functools.partial(self._stage, name) for name in REPLAY}
        self.forward = {name: functools.partial(self._stage, name) for name in DECLARED if name in self.inside.forward}
        self.router = {name: functools.partial(self._stage, name) for name in ROUTER}
        self.svd = inside.svd  # a decomposition is native in every precision: it is an input of the stages

    def widened(self) -> Backend:
        return self.inside

    def put(self, array: np.ndarray) -> np.ndarray:
        """The array itself."""
        return array

    def get(self, array: np.ndarray) -> np.ndarray:
        """The array, C-contiguous."""
        return np.asarray(array, order="C")

    def facts(self) -> dict[str, str]:
        return {**self.inside.facts(), "precision": self.mode}

    def _stage(self, name: str, *arguments: np.ndarray, **options: Any) -> np.ndarray:
        if NOISE[name] is Noise.CHOICE:  # of equal numbers frameworks choose different ones
            return np.asarray(STAGES[name](*arguments, **options))
        dtype = boundary_dtype(name, arguments, options)
        if name in LINEAR:
            return self._linear(name, arguments, options, dtype)
        return self._rounded(name, self._value(name, arguments, options, dtype), arguments, options, dtype)

    def _linear(
        self, name: str, arguments: Sequence[np.ndarray], options: Mapping[str, Any], dtype: np.dtype
    ) -> np.ndarray:
        """A linear stage, some rows of its weights at a time."""
        x, *params = arguments
        wide = _widened(x)
        out = np.empty((len(x), sum(len(p) for p in params if p.ndim == 2)), dtype)
        for rows, columns in linear_blocks(params, max(BLOCK_BYTES, BLOCK_INPUTS * wide.nbytes)):
            value = self._wide_value(name, (wide, *self._widened_again(rows)), options, dtype)
            part = self._rounded(name, value, (x, *rows), options, dtype)
            ends = np.cumsum([c.stop - c.start for c in columns])[:-1]
            for place, joined in zip(columns, np.split(part, ends, axis=1), strict=True):
                out[:, place] = joined
        return out

    def _rounded(
        self,
        name: str,
        value: np.ndarray,
        arguments: Sequence[np.ndarray],
        options: Mapping[str, Any],
        dtype: np.dtype,
    ) -> np.ndarray:
        """A stage's float64 value as this mode stores it; in `exact`, counted."""
        if self.mode == REFERENCE:
            with np.errstate(over="ignore"):
                return round_once(value, dtype)
        decided = decide(name, value, arguments, options, dtype)
        count = self.counts.setdefault(name, Count())
        count.elements += value.size
        count.flagged += decided.flagged
        count.recomputed += decided.recomputed
        count.corrected += decided.corrected
        return decided.array

    def _value(
        self, name: str, arguments: Sequence[np.ndarray], options: Mapping[str, Any], dtype: np.dtype
    ) -> np.ndarray:
        """The float64 value of a stage, computed by the backend inside."""
        return self._wide_value(name, [_widened(array) for array in arguments], options, dtype)

    def _wide_value(
        self, name: str, wide: Sequence[np.ndarray], options: Mapping[str, Any], dtype: np.dtype
    ) -> np.ndarray:
        inner = {"dtype": dtype.name} if name in ROUNDED_INSIDE else {}
        key = (name, *sorted(options.items()), *inner.values())
        if key not in self._compiled:
            self._compiled[key] = self.inside.compile(functools.partial(self.inside.wide[name], **options, **inner))
        value = self.inside.get(self._compiled[key](*map(self.inside.put, wide)))
        if value.dtype != np.float64:
            raise TypeError(f"{self.name}.{name} gave {value.dtype}, expected float64")
        return value

    def _widened_again(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """`arrays` in float64, in memory that the next call overwrites."""
        for place, array in enumerate(arrays):
            if place == len(self._scratch) or self._scratch[place].size < array.size:
                self._scratch[place : place + 1] = [aligned_empty((array.size,), np.dtype(np.float64))]
        wide = [held[: array.size].reshape(array.shape) for held, array in zip(self._scratch, arrays, strict=False)]
        for held, array in zip(wide, arrays, strict=True):
            np.copyto(held, array, casting="unsafe")
        return wide


def linear_blocks(params: Sequence[np.ndarray], limit: int) -> Iterator[tuple[list[np.ndarray], list[slice]]]:
    """Rows of a linear stage's weights and biases, `limit` bytes of float64 at a time; the columns these give."""
    lengths = [len(array) for array in params]
    firsts = np.cumsum([0, *(len(array) for array in params if array.ndim == 2)]).tolist()[:-1]
    count = max(1, min(-(-8 * sum(array.size for array in params) // limit), min(lengths) // 8))
    for block in range(count):
        spans = [(_cut(n, block, count), _cut(n, block + 1, count)) for n in lengths]
        rows = [array[start:stop] for array, (start, stop) in zip(params, spans, strict=True)]
        yield rows, [slice(at + start, at + stop) for at, (start, stop) in zip(firsts, spans, strict=False)]


def _cut(length: int, block: int, count: int) -> int:
    """Where block `block` of `count` begins: at multiples of 8 rows, for few shapes, as XLA compiles for each."""
    return length if block == count else length * block // count // 8 * 8


def boundary_dtype(name: str, arguments: Sequence[np.ndarray], options: Mapping[str, Any]) -> np.dtype:
    """What a stage is stored in: as declared, or as the activations are, by its option or its last argument."""
    fixed = REPLAY if name in REPLAY else ROUTER
    declared = fixed[name].dtype if name in fixed else DECLARED[name].dtype
    return stored_dtype(declared if declared != "model" else options.get("dtype") or arguments[-1].dtype.name)


def _widened(array: np.ndarray) -> np.ndarray:
    """Numbers in float64; token ids and positions are left as they are."""
    return array if array.dtype.kind in "iu" else aligned_copy(array, np.dtype(np.float64))
