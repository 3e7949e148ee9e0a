"""A backend with a fault at one call of one stage, and weights with a fault in one tensor; all else is right."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stages.errors import SvfError
from stages.selftest.fault import Call, Fault, Load
from stages.spec.backend import Backend, Delegate, Weights


@dataclass(frozen=True)
class Plant:
    """A fault at its place: the stage or tensor it changes, in which call (a layer, or the nth tensor); its size."""

    fault: Fault
    at: str
    call: int
    size: float
    seed: int

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)


class CompiledStages:
    """A backend's stages, each compiled once per options and kept over runs: thousands of them share a process."""

    def __init__(self, inside: Backend):
        self.inside = inside
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, name: str, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        key = (name, *sorted(options.items()))
        if key not in self._compiled:
            stage = {**self.inside.replay, **self.inside.forward}[name]
            self._compiled[key] = self.inside.compile(functools.partial(stage, **options))
        return self._compiled[key](*arguments)


class PlantedBackend(Delegate):
    """The backend that `stages` computes on, with `plant` in it, if any. One run each: it counts the calls.

    `ways` are other right ways to compute a stage, taken in every call of it.
    """

    def __init__(
        self, stages: CompiledStages, plant: Plant | None = None, ways: Mapping[str, Callable[[Call], np.ndarray]] = {}
    ):
        super().__init__(stages.inside)
        self._stages, self._plant, self._ways = stages, plant, ways
        self._calls: dict[str, int] = {}
        self.changed: int | None = None  # elements that the fault changed; None: its call did not come
        self.replay = {name: functools.partial(self._stage, name) for name in self.inside.replay}
        self.forward = {name: functools.partial(self._stage, name) for name in self.inside.forward}

    def _stage(self, name: str, *arguments: Any, **options: Any) -> Any:
        number = self._calls.get(name, 0)
        self._calls[name] = number + 1
        right = self._stages(name, arguments, options)
        if name in self._ways:
            return self.put(self._changed(self._ways[name], self._call(name, arguments, options), right))
        plant = self._plant
        if plant is None or plant.fault.plant is None or (name, number) != (plant.at, plant.call):
            return right
        call = self._call(name, arguments, options, plant.size, plant.rng())
        wrong = self._changed(plant.fault.plant, call, right)
        self.changed = _different(self.get(right), wrong)
        return self.put(wrong)

    def _call(
        self,
        name: str,
        arguments: tuple[Any, ...],
        options: Mapping[str, Any],
        size: float = 0.0,
        rng: np.random.Generator | None = None,
    ) -> Call:
        def compute(*given: np.ndarray, **changed: Any) -> np.ndarray:
            return self.get(self._stages(name, tuple(self.put(a) for a in given), changed))

        return Call(compute, tuple(map(self.get, arguments)), options, size, rng or np.random.default_rng(0))

    def _changed(self, way: Callable[[Call], np.ndarray], call: Call, right: Any) -> np.ndarray:
        """What `way` gives, in the dtype of the right result."""
        with np.errstate(all="ignore"):  # a fault may overflow; that is its point
            return np.asarray(way(call)).astype(self.get(right).dtype, order="C")


@dataclass
class PlantedWeights:
    """`inside` with the fault of `plant` in one tensor."""

    inside: Weights
    plant: Plant
    layers: int
    changed: int | None = None
    _wrong: np.ndarray | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The tensor's name in the checkpoint."""
        at = self.plant.at
        return at if at.startswith(("model.", "lm_head.")) else f"model.layers.{self.plant.call}.{at}"

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        if name != self.name:
            return self.inside.read(name, start, stop)
        if self._wrong is None:
            self._wrong = self._load()
        return self._wrong[start:stop]

    def _load(self) -> np.ndarray:
        right = self.inside.read(self.name)
        layer = self.plant.call if self.name.startswith("model.layers.") else None
        load = Load(self.name, layer, self.layers, self.inside.read, self.plant.size, self.plant.rng())
        assert self.plant.fault.load is not None
        wrong = np.asarray(self.plant.fault.load(load)).astype(right.dtype, order="C")
        self.changed = _different(right, wrong)
        return wrong


def _different(right: np.ndarray, wrong: np.ndarray) -> int:
    if right.shape != wrong.shape:
        raise SvfError(f"a planted fault gives {list(wrong.shape)}, the right result is {list(right.shape)}")
    return int(np.count_nonzero(~((right == wrong) | ((right != right) & (wrong != wrong)))))
