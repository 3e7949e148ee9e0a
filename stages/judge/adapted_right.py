"""A bundle applied to a checkpoint as the oracle has it, for a forward that did not keep its own adapted weights.

Another program adapted them itself: within rounding they are these, and what they may be off goes into the bound of
every stage that reads them.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.files.bundle import Bundle
from stages.files.source import ModelSource
from stages.judge.adapted import Chain, chain_of
from stages.oracle.bounds import U32, Lambdas, after_prescribed
from stages.oracle.components import ReferenceBackend
from stages.progress import Progress
from stages.run.adapted import Adapted, AdaptedWeights, adapt
from stages.spec.backend import Weights

_F32 = np.dtype(np.float32)


@dataclass(frozen=True)
class RightWeights:
    """Adapted weights and how far a right program's may lie from them; `read` and `info` as a `ModelSource`'s."""

    weights: AdaptedWeights
    chains: dict[str, Chain]
    lambdas: Lambdas

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `[start:stop]` of a parameter."""
        return self.weights.read(name, start, stop)

    def doubt(self, *, rigorous: bool) -> Weights:
        """What each weight may be off, by the calibrated bounds or the rigorous ones, read as the weights are."""
        return _Doubt(self, rigorous)


@dataclass(frozen=True)
class _Doubt:
    of: RightWeights
    rigorous: bool

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        stored = self.of.read(name, start, stop)
        chain = self.of.chains.get(name)
        if chain is None:
            return np.zeros(stored.shape)
        oracle = chain.oracle(start, start + len(stored), _F32, self.of.lambdas)
        off = oracle.rigorous() if self.rigorous else oracle.bound
        if stored.dtype == _F32:
            return off + U32 * np.abs(oracle.value)
        return after_prescribed(oracle.value, off, stored.dtype)  # 0, or a step where rounding may go either way


def right_weights(
    components: Path, layout: str, checkpoint: ModelSource, lambdas: Lambdas, stack: ExitStack, progress: Progress
) -> tuple[RightWeights, Adapted]:
    """The bundle applied in float64, rounded once a stage; `InputError` as `adapt` has it. Kept until `stack` ends."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="svf-audit-")))
    found = adapt(components, layout, checkpoint, ReferenceBackend(), folder, stack, progress)
    bundle = stack.enter_context(Bundle(components))
    entries = {entry.source_name: entry for entry in bundle.entries}
    chains = {name: chain_of(bundle.load(entries[name]), taken) for name, taken in found.layouts.items()}
    return RightWeights(found.weights, chains, lambdas), found
