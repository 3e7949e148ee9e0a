"""The precision of a run: native kernels, float64 rounded at stage boundaries, or correctly rounded by Ziv's test."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from stages.backend import Backend, Production, Weights
from stages.errors import UsageError
from stages.exact import decide
from stages.forward import DTYPES, ROUNDED_INSIDE
from stages.memory import aligned_copy
from stages.qwen import QwenConfig
from stages.replay import REPLAY
from stages.rounding import round_once
from stages.router import ROUTER
from stages.tensorfile import stored_dtype

NATIVE, REFERENCE, EXACT = "native", "reference", "exact"
MODES = (NATIVE, REFERENCE, EXACT)


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


class PreciseBackend:
    """A backend whose stages take and give numpy arrays as stored, computed in float64 by the backend inside.

    The framework computes a stage's float64 value (`Backend.wide`) from the stored inputs. The host widens these and
    rounds that value, once, for all backends alike: XLA counts float32 numbers below 2^-126 as zero when it converts.
    """

    def __init__(self, inside: Backend, mode: str):
        self.inside, self.mode = inside.widened(), mode
        self.name = inside.name
        self.counts: dict[str, Count] = {}
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self.replay = {name: functools.partial(self._stage, name) for name in REPLAY}
        self.forward = {name: functools.partial(self._stage, name) for name in DTYPES if name in self.inside.forward}
        self.router = {name: functools.partial(self._stage, name) for name in ROUTER}
        self.wide = self.inside.wide

    def widened(self) -> Backend:
        return self.inside

    def put(self, array: np.ndarray) -> np.ndarray:
        """The array itself."""
        return array

    def get(self, array: np.ndarray) -> np.ndarray:
        """The array, C-contiguous."""
        return np.asarray(array, order="C")

    def compile(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn` itself: what the backend inside computes is compiled stage by stage."""
        return fn

    def production(
        self, config: QwenConfig, weights: Weights, *, dtype: str = "model", raw_config: Mapping[str, Any] | None = None
    ) -> Production | None:
        """There is none: production computes natively."""

    def facts(self) -> dict[str, str]:
        return {**self.inside.facts(), "precision": self.mode}

    def _stage(self, name: str, *arguments: np.ndarray, **options: Any) -> np.ndarray:
        dtype = boundary_dtype(name, arguments, options)
        value = self._value(name, arguments, options, dtype)
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
        inner = {"dtype": dtype.name} if name in ROUNDED_INSIDE else {}
        key = (name, *sorted(options.items()), *inner.values())
        if key not in self._compiled:
            self._compiled[key] = self.inside.compile(functools.partial(self.inside.wide[name], **options, **inner))
        wide = [self.inside.put(_widened(array)) for array in arguments]
        value = self.inside.get(self._compiled[key](*wide))
        if value.dtype != np.float64:
            raise TypeError(f"{self.name}.{name} gave {value.dtype}, expected float64")
        return value


def boundary_dtype(name: str, arguments: Sequence[np.ndarray], options: Mapping[str, Any]) -> np.dtype:
    """What a stage is stored in: as declared, or as the activations are, by its option or its last argument."""
    fixed = REPLAY if name in REPLAY else ROUTER
    declared = fixed[name].dtype if name in fixed else DTYPES[name]
    return stored_dtype(declared if declared != "model" else options.get("dtype") or arguments[-1].dtype.name)


def _widened(array: np.ndarray) -> np.ndarray:
    """Numbers in float64; token ids and positions are left as they are."""
    return array if array.dtype.kind in "iu" else aligned_copy(array, np.dtype(np.float64))
