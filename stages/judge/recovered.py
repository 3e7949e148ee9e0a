"""A stage that was not recorded, recovered from one that was: the final norm from logits, by least squares on the head.

Logits are the head times the final norm. Where the vocabulary is larger than the model is wide, the rows of the head
say more of the final norm than it has numbers: least squares gives it, off by what the logits' rounding makes of it,
and the logits must then be the head's of one vector. So a mistake of the head is told from one before it, and with the
head's precision, whatever the layers do. What is recovered is judged as if it had been recorded, in cells that wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from stages.files.forward_dump import ForwardSide, Place, forward_key
from stages.files.tensorfile import sha256
from stages.judge.activations import FLOAT32
from stages.judge.forward import oracles_of
from stages.judge.recorded_run import ForwardRun, Recorded, as_stored, fits, weights_of
from stages.judge.spans import span_of
from stages.oracle.bounds import exact_bound
from stages.oracle.span import Value, Way, value_through
from stages.oracle.spread import Spread
from stages.oracle.verdict import consult
from stages.run.forward import part
from stages.spec.config import LM_HEAD
from stages.spec.dtypes import stored_dtype

FINAL_NORM: Place = (None, "final_norm")
LOGITS: Place = (None, "lm_head")
# So many rows of the head for each number of the final norm are enough, and so many at least: with fewer least squares
# takes the logits' rounding for the final norm's. Wider models cost more than their judging.
_ROWS, _LEAST_ROWS, _WIDEST, _BLOCKS = 4, 1.5, 1536, 16
# As many columns are told, if no others are as far off.
_FEW = 4
# A head that is worse conditioned says little of some directions.
_CONDITION = 1e3


@dataclass
class _WithRecovered:
    """A recording with what was recovered from it under its name."""

    side: Recorded
    place: Place
    array: np.ndarray
    label: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    places: dict[Place, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.label, self.facts = self.side.label, self.side.facts
        self.places = {**self.side.places, self.place: forward_key(self.place)}

    def read(self, place: Place) -> np.ndarray:
        return self.array if place == self.place else self.side.read(place)

    def shape(self, place: Place) -> list[int]:
        return list(self.array.shape) if place == self.place else self.side.shape(place)

    def sha256(self, place: Place) -> str:
        return sha256(self.array) if place == self.place else self.side.sha256(place)

    def close(self) -> None:
        """Nothing to close: whoever opened the recording closes it."""


def with_final_norm(run: ForwardRun) -> tuple[ForwardRun, float] | None:
    """The run with the final norm that its logits hold, and the condition of the head; None where nothing is gained:
    it, or what it is computed from, was recorded, or the head does not tell it."""
    if not _tells(run):
        return None
    assert run.config is not None
    columns = _columns(run.side.shape(LOGITS)[-1], _ROWS * run.config.hidden_size)
    head = _head(run, columns)
    squares = head.T @ head
    sizes = np.linalg.eigvalsh(squares)
    condition = float(np.sqrt(sizes[-1] / sizes[0])) if sizes[0] > 0 else np.inf
    if not condition <= _CONDITION:
        return None
    logits = np.concatenate([run.read(LOGITS)[:, part] for part in columns], axis=1)
    inverse = np.linalg.solve(squares, head.T).T
    array = (logits.astype(np.float64) @ inverse).astype(np.float32)
    found = run.of(_WithRecovered(run.side, FINAL_NORM, array))
    found.values.update(run.values)  # of stages before it, which do not change
    found.recovered[FINAL_NORM] = _cell(run, array, head, inverse, logits)
    return found, condition


def not_of_the_head(run: ForwardRun) -> str:
    """Logits that no final norm gives by the head, in words, with the few columns that are furthest off."""
    logits, off = run.read(LOGITS), np.zeros(run.side.shape(LOGITS)[-1])
    for columns, oracle in oracles_of(LOGITS, run, logits):
        off[columns] = np.max(np.abs(part(logits, columns) - oracle.value) / oracle.bound, axis=0)
    worst = np.flatnonzero(off > off.max() / 2)
    few = f"; furthest off: column {', '.join(map(str, worst))}" if len(worst) <= _FEW else ""
    return f"no final norm gives these logits by this head{few}"


def _cell(run: ForwardRun, array: np.ndarray, head: np.ndarray, inverse: np.ndarray, logits: np.ndarray) -> Value:
    """What a recovered final norm may be off: what logits err, through the inverse, and its own rounding to float32."""
    assert run.path is not None
    stage = as_stored(run, run.path.at(LOGITS), logits)
    given = Value(array.astype(np.float64))
    way = Way(run.lambdas, stored_dtype(run.path.activations))
    off = value_through(consult(stage, (given.array, head), {}, run.lambdas), [given], way)
    rounded = exact_bound(given.array, np.dtype(np.float32))
    variance = off.spread.variance(off.array) @ inverse**2 + rounded**2 / 3
    return Value(array, Spread(variance), np.asarray(off.far) @ np.abs(inverse) + rounded)


def _tells(run: ForwardRun) -> bool:
    """Whether another program recorded logits and nothing between them and its last layers, and multiplied what it had
    by the head as it is."""
    if run.path is None or run.config is None or run.weights is None or run.doubts or not run.tokens:
        return False
    if isinstance(run.side, ForwardSide) or LOGITS not in run.side.places or LOGITS in run.turned:
        return False
    if run.activations not in (None, FLOAT32) or LOGITS in run.misshapen or not fits(run, LOGITS):
        return False
    width, vocabulary = run.config.hidden_size, run.side.shape(LOGITS)[-1]
    hidden = {name for _, name in span_of(LOGITS, run).hidden}
    tells = {"final_norm", "post_ffn_residual"} <= hidden and _LEAST_ROWS * width <= vocabulary and width <= _WIDEST
    return tells and bool(np.isfinite(run.read(LOGITS)).all())


def _columns(vocabulary: int, count: int) -> list[slice]:
    """About so many columns of logits, in blocks that lie evenly."""
    if vocabulary <= count:
        return [slice(0, vocabulary)]
    size = -(-count // _BLOCKS)
    return [slice(int(start), int(start) + size) for start in np.linspace(0, vocabulary - size, _BLOCKS)]


def _head(run: ForwardRun, columns: Sequence[slice]) -> np.ndarray:
    """Rows of the head, float64, as the run's dtype has them."""
    assert run.path is not None
    dtype, weights = stored_dtype(run.path.activations), weights_of(run)
    parts = [weights.read(LM_HEAD, part.start, part.stop).astype(dtype) for part in columns]
    return np.concatenate(parts).astype(np.float64)
