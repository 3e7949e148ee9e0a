"""Which fault is planted where: every kind in several layers, families and on each backend."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.selftest.fault import REPLAY as REPLAYED
from stages.selftest.fault import Fault
from stages.selftest.specimens import SPECIMENS
from stages.spec.experts import reads
from stages.spec.forward import forward_pipeline
from stages.spec.replay import REPLAY
from stages.spec.stage import Pipeline, Scope

# The decomposed tensors that a fault of the replay is planted in: tall, square and wide.
TALL, SQUARE, WIDE = (
    "model.embed_tokens.weight",
    "model.layers.1.self_attn.k_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
)
TENSORS = (TALL, SQUARE, WIDE)  # in state-dict order, as a replay takes them
# What a replay of a bundle takes.
SELECTED = {"bundle": TENSORS, "square": (SQUARE,)}
DECOMPOSED = 1


@functools.cache
def path_of(specimen: str) -> Pipeline:
    """The stages of a specimen's forward."""
    return forward_pipeline(SPECIMENS[specimen].config())


@dataclass(frozen=True)
class Trial:
    """One planted fault: kind, specimen, backend, the stage or tensor changed, and which call of it."""

    fault: Fault
    specimen: str
    backend: str
    at: str
    call: int
    size: float
    seed: int

    @property
    def stage(self) -> str:
        """The stage that is to be named: the one changed, or the first that reads the tensor changed."""
        if self.fault.load is None:
            return self.at
        return next(s.name for s in path_of(self.specimen).values() if reads(s, self.at))

    @property
    def function(self) -> str:
        """What computes the stage that is changed, by a backend's name of it; or the tensor."""
        if self.fault.load is not None or self.fault.path == REPLAYED:
            return self.at
        return path_of(self.specimen)[self.at].function

    @property
    def layer(self) -> int | None:
        """The layer that is to be named; None for a stage of the whole model."""
        if self.tensor is not None:
            return DECOMPOSED if ".layers." in self.tensor else None
        scope = path_of(self.specimen)[self.stage].scope
        return self.call if scope is Scope.LAYER else None

    @property
    def tensor(self) -> str | None:
        """The tensor that is to be named; None in a forward."""
        return TENSORS[self.call] if self.fault.path == REPLAYED else None

    @property
    def side(self) -> str:
        """The side that is to be named: a is torch, b is jax."""
        return {"torch": "a", "jax": "b"}[self.backend]

    def fields(self) -> dict[str, Any]:
        """What the document says of where the fault was planted."""
        return {
            "fault": self.fault.name,
            "path": self.fault.path,
            "family": SPECIMENS[self.specimen].family,
            "dtype": SPECIMENS[self.specimen].dtype,
            "specimen": self.specimen,
            "backend": self.backend,
            "layer": self.layer,
            "tensor": self.tensor,
            "changed": self.at,
            "size": None if self.fault.size is None else self.size,
            "expected_stage": self.stage,
            "expected_side": self.side,
        }


def plan(
    faults: Iterable[Fault], backends: Sequence[str], *, quick: bool, seed: int, scale: float = 1.0
) -> list[Trial]:
    """All trials of `faults`, each at `scale` times its claimed size; with `quick`, one a kind."""
    trials: list[Trial] = []
    for fault in faults:
        of_kind = list(_trials(fault, backends, seed, scale))
        if quick:
            of_kind = [of_kind[zlib.crc32(f"{seed}:{fault.name}".encode()) % len(of_kind)]]
        trials += of_kind
    return trials


def _trials(fault: Fault, backends: Sequence[str], seed: int, scale: float) -> Iterator[Trial]:
    rng = np.random.default_rng((seed, zlib.crc32(fault.name.encode())))
    seen: set[tuple[str, str, str, int]] = set()
    for row, specimen in enumerate(fault.on):
        places = _places(fault, specimen)
        rng.shuffle(places)
        for number, (backend, call) in enumerate(_calls(fault, specimen, row, backends)):
            at, in_layer = places[number % len(places)]
            place = (specimen, backend, at, call if in_layer else 0)
            if place not in seen:
                seen.add(place)
                size = 1.0 if fault.size is None else fault.size * scale
                yield Trial(fault, specimen, backend, at, place[3], size, int(rng.integers(1 << 31)))


def _places(fault: Fault, specimen: str) -> list[tuple[str, bool]]:
    """The stages or tensors of `fault` that the specimen has, and whether each layer has one."""
    if fault.path == REPLAYED:
        return [(name, True) for name in fault.at if name in REPLAY]
    path = path_of(specimen)
    if fault.load is None:
        return [
            (name, path[name].scope is Scope.LAYER) for name in fault.at if name in path and not path[name].identity
        ]
    readers = {name: stage for stage in reversed(tuple(path.values())) for name in fault.at if reads(stage, name)}
    return [(name, readers[name].scope is Scope.LAYER) for name in fault.at if name in readers]


def _calls(fault: Fault, specimen: str, row: int, backends: Sequence[str]) -> list[tuple[str, int]]:
    """Backend and layer of each trial in a specimen: of the first one its first and last layer, of others one layer.

    The backends are taken in turn. A replay is planted in on each backend, in a tall, a square or a wide tensor.
    """
    turn = zlib.crc32(fault.name.encode()) + row
    if specimen in SELECTED:
        return [(backend, (turn + i) % len(SELECTED[specimen])) for i, backend in enumerate(backends)]
    layers = SPECIMENS[specimen].layers
    chosen = (0, layers - 1) if row == 0 else ((turn // 2) % layers,)
    return [(backends[(turn + i) % len(backends)], layer) for i, layer in enumerate(chosen)]
