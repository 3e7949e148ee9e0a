"""A random model's recorded stages, each with the oracles of what made its inputs: what the matcher is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache

import numpy as np
from forward_models import MODELS, MemoryWeights, random_weights, tokens_of

from stages.oracle.components import ReferenceBackend
from stages.oracle.verdict import Oracle
from stages.run.forward import Forwarder, oracles, recorded_inputs
from stages.spec.forward import forward_pipeline, producers

Place = tuple[int | None, str]


class Recorded:
    """One forward of a random model by the reference, every stage of it, and the oracle of each."""

    def __init__(self, model: str, dtype: str, count: int = 16):
        self.config = MODELS[model].config(dtype)
        self.path, self.weights = forward_pipeline(self.config), MemoryWeights(random_weights(self.config))
        self.tokens = tokens_of(count)
        results = Forwarder(ReferenceBackend(), self.config, self.weights).run(self.tokens)
        self.stages = {(r.layer, r.stage): r.array for r in results}
        self._oracles: dict[Place, Oracle] = {}

    def oracle(self, place: Place) -> Oracle:
        """A stage's oracle from its recorded inputs; of the first part of the vocabulary."""
        if place not in self._oracles:
            layer, stage = place[0], self.path[place[1]]
            inputs = recorded_inputs(self.path, stage, self.stages, self.tokens, layer, self.config.num_hidden_layers)
            assert inputs is not None
            found = next(o for _, o in oracles(self.path, self.config, stage, inputs, self.weights, layer))
            self._oracles[place] = dataclasses.replace(found, made=self._made(place))
        return self._oracles[place]

    def _made(self, place: Place) -> dict[str, Callable[[], Oracle]]:
        sources = producers(self.path, self.path[place[1]], place[0], self.config.num_hidden_layers)
        return {name: (lambda at=at: self.oracle(at)) for name, at in sources.items()}

    def places(self, layer: int = 1) -> list[Place]:
        """One layer's stages and the model's own."""
        return [place for place in self.stages if place[0] in (layer, None)]


@cache
def recorded(model: str, dtype: str, count: int = 16) -> Recorded:
    return Recorded(model, dtype, count)


__all__ = ["Recorded", "np", "recorded"]
