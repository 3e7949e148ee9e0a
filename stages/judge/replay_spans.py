"""From what a recorded stage of a component replay is judged: the nearest recorded ones, or U, S, V and offsets alone.

Row chunk by row chunk; what has no rows, the scaled singular values and the normalization, is computed once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from stages.files.bundle import Components
from stages.files.forward_dump import Place
from stages.judge.recorded_run import Span
from stages.judge.through import Search
from stages.judge.tried import Hypothesis
from stages.oracle.bounds import Lambdas
from stages.oracle.rounding import round_once
from stages.oracle.span import Floor, Value, Way, oracle_through, value_through
from stages.oracle.verdict import STAGES, Oracle, consult
from stages.recipes.recipe import Class
from stages.spec.dtypes import stored_dtype
from stages.spec.replay import REPLAY
from stages.spec.stage import Stage
from stages.spec.values import Chunk

# Parameters of the replay by the name that a reader knows.
_PARTS = {"u": "U", "s": "S", "v": "V", "offsets": "offsets", "source": "the source"}
# Stages that move numbers and round none.
_COPIES = ("offsets_f32", "final_f32")

Others = Callable[[], Iterable[tuple[str, Components]]]


@functools.cache
def replay_span(name: str, recorded: frozenset[str]) -> Span:
    """From which recorded stages one is judged and through which hidden ones, in execution order."""
    hidden: set[str] = set()
    found: set[str] = set()
    waiting = list(REPLAY[name].inputs)
    while waiting:
        source = waiting.pop()
        (found if source in recorded else hidden).add(source)
        if source not in recorded:
            waiting += REPLAY[source].inputs
    missing = [source for source in REPLAY[name].inputs if source in hidden]
    return Span((None, name), _places(found), _places(hidden), _places(missing), "offsets_f32" in hidden)


def _places(names: Iterable[str]) -> tuple[Place, ...]:
    return tuple((None, name) for name in REPLAY if name in set(names))


class Replayed:
    """A recorded tensor as its stages are judged: by its options, with what was not recorded computed.

    `others` are the components of other tensors of the recording, by name, which may have been taken for these.
    """

    def __init__(self, options: Mapping[str, Any], lambdas: Lambdas, others: Others = tuple):
        self.options, self.others, self.way = options, others, Way(lambdas, np.dtype(np.float32))
        self.floors: dict[str, Floor] = {}  # of the stages judged through others
        self._shared: dict[str, Value] = {}
        self._rows: dict[str, Value] = {}
        self._chunk: Chunk | None = None

    def lacking(self, chunk: Chunk, stage: Stage) -> str | None:
        """What a stage's judging lacks, in words; None when it can be judged."""
        stages = [stage, *(REPLAY[name] for _, name in span_in(chunk, stage).hidden)]
        read = {param for one in stages for param in one.params}
        needed = [param for param in REPLAY.params if param in read and param not in chunk.params]
        if not needed:
            return None
        missing = [name for _, name in span_in(chunk, stage).missing]
        option = "--model" if needed == ["source"] else "--components"
        unavailable = f"{', '.join(needed)} unavailable; give {option}"
        return "; ".join([f"not recorded: {', '.join(missing)}", unavailable] if missing else [unavailable])

    def oracle(self, chunk: Chunk, stage: Stage) -> Oracle:
        """The oracle of a stage's rows; `ValueError` where recorded inputs do not fit each other."""
        inputs, params = self.inputs(chunk, stage), [chunk.params[name] for name in stage.params]
        if all(value.sure for value in inputs):
            return consult(stage, (*(value.array for value in inputs), *params), self.of(stage), self.way.lambdas)
        oracle = oracle_through(stage, inputs, params, self.of(stage), self.way)
        self.floors.setdefault(stage.name, Floor()).add(oracle)
        return replace(oracle, hidden=tuple(name for _, name in span_in(chunk, stage).missing))

    def of(self, stage: Stage) -> dict[str, Any]:
        """The options of one stage."""
        return {name: self.options[name] for name in stage.options}

    def inputs(self, chunk: Chunk, stage: Stage) -> list[Value]:
        return [self.value(chunk, name) for name in stage.inputs]

    def value(self, chunk: Chunk, name: str) -> Value:
        """A stage's rows as recorded, or computed from what is."""
        recorded = _recorded(chunk, name)
        if recorded is not None:
            return Value(recorded)
        if chunk is not self._chunk:
            self._chunk, self._rows = chunk, {}
        kept = self._rows if REPLAY[name].by_rows else self._shared
        if name not in kept:
            kept[name] = self.computed(chunk, name, self.inputs(chunk, REPLAY[name]))
        return kept[name]

    def computed(self, chunk: Chunk, name: str, inputs: Sequence[Value]) -> Value:
        """A hidden stage's rows from these inputs, with what right programs may differ by in it."""
        stage = REPLAY[name]
        params = [chunk.params[param] for param in stage.params]
        oracle = oracle_through(stage, inputs, params, self.of(stage), self.way)
        if name in _COPIES and all(value.sure for value in inputs):
            return Value(oracle.rounded)
        return value_through(oracle, inputs, self.way)

    def named(self, chunk: Chunk, oracle: Oracle, observed: np.ndarray) -> str | None:
        """What is wrong in a stage on the way, where some were not recorded and one fails."""
        if oracle.typical is None or observed.shape != oracle.value.shape or not np.isfinite(observed).all():
            return None
        with np.errstate(all="ignore"):
            found = _Search(self, chunk, oracle, observed).named()
        return None if found is None else found.words

    def told(self, stage: Stage, recorded: Iterable[str]) -> dict[str, Any]:
        """The fields of a row that say from what it was judged."""
        span = replay_span(stage.name, frozenset(recorded))
        through = [name for _, name in span.hidden]
        floor = self.floors[stage.name].relative if stage.name in self.floors else None
        return {"through": through, "floor": floor}

    def words(self, stage: Stage, recorded: Iterable[str]) -> str | None:
        """What a stage was judged through, in words, and what it can see; None where its inputs are sure."""
        if stage.name not in self.floors:
            return None
        span = replay_span(stage.name, frozenset(recorded))
        hidden = [name for _, name in span.hidden if name != "offsets_f32"]
        params = {param for name in (stage.name, *hidden) for param in REPLAY[name].params}
        params |= {"offsets"} if span.from_start else set()
        parts = [words for param, words in _PARTS.items() if param in params]
        since = ", ".join([*(name for _, name in span.recorded), *parts])
        unseen = f"errors below {self.floors[stage.name].relative:.2g} of it are not seen"
        return f"judged from {since} through {', '.join(hidden)}, not recorded; {unseen}"


def _recorded(chunk: Chunk, name: str) -> np.ndarray | None:
    return chunk.values.get(name, chunk.shared.get(name))


def span_in(chunk: Chunk, stage: Stage) -> Span:
    """The span of a stage in what was recorded of a chunk."""
    return replay_span(stage.name, frozenset((*chunk.values, *chunk.shared)))


class _Search(Search):
    """Which hidden stage of a replay is wrong, by one chunk of it."""

    def __init__(self, tensor: Replayed, chunk: Chunk, oracle: Oracle, observed: np.ndarray):
        self.tensor, self.chunk = tensor, chunk
        self.begin(span_in(chunk, oracle.stage), oracle, observed)

    @property
    def count(self) -> int:
        return 0

    def sources(self, at: Place) -> list[Place]:
        return [(None, name) for name in REPLAY[at[1]].inputs]

    def known(self, at: Place) -> Value:
        return self.tensor.value(self.chunk, at[1])

    def computed(self, at: Place, inputs: Sequence[Value]) -> Value:
        return self.tensor.computed(self.chunk, at[1], inputs)

    def way(self) -> Way:
        return self.tensor.way

    def kernel(self, at: Place) -> None:
        """None of a replay is known to take fewer bits."""

    def stage(self, at: Place) -> Stage:
        return REPLAY[at[1]]

    def options(self, at: Place) -> Mapping[str, Any]:
        return self.tensor.of(self.stage(at))

    def _params(self, at: Place) -> Sequence[np.ndarray]:
        return [self.chunk.params[name] for name in self.stage(at).params]

    def _where(self, at: Place) -> str:
        return "" if at == self.span.acting else at[1]

    def other_weights(self) -> Iterator[Hypothesis]:
        """U, S, V or offsets of another tensor."""
        for param, words in _PARTS.items():
            own = self.chunk.params.get(param)
            places = [at for at in (*self.span.hidden, self.span.acting) if param in self.stage(at).params]
            if own is None or not places or param == "source":
                continue
            for name, other in self.tensor.others():
                if param == "u" and other.entry.shape[0] < self.chunk.stop:
                    continue
                taken = other.u(self.chunk.start, self.chunk.stop) if param == "u" else getattr(other, param)
                if taken.shape == own.shape and not np.array_equal(taken, own):
                    said = f"{words} of {name} in the place of its own"
                    where = " and ".join(self._where(at) or at[1] for at in places)
                    functions = {at: functools.partial(self._with, at, param, taken) for at in places}
                    yield Hypothesis(where, said, Class.OTHER, functions)

    def _with(self, at: Place, param: str, taken: np.ndarray, inputs: Sequence[np.ndarray]) -> np.ndarray:
        stage = self.stage(at)
        params = [taken if name == param else self.chunk.params[name] for name in stage.params]
        return np.asarray(STAGES[stage.function](*inputs, *params, **self.options(at)), np.float64)

    def _functions(self, places: Sequence[Place], where: str, classes: Sequence[Class]) -> Iterator[Hypothesis]:
        """Bits that a copy or a cast lost, its maker lost: that is told once."""
        copied = all(at[1] in (*_COPIES, "final_bf16") for at in places)
        told = [kind for kind in classes if not (copied and kind is Class.NARROWER)]
        return super()._functions(places, where, told)

    def error(self, value: np.ndarray | None) -> float:
        """As rounded to be stored: what goes before that is known to float32, and its bits tell more than its size."""
        dtype = stored_dtype(self.oracle.stage.dtype)
        narrow = value is not None and dtype.itemsize < 4
        return super().error(round_once(value, dtype).astype(np.float64) if narrow and value is not None else value)

    def _explains(self, tried: Hypothesis) -> bool:
        return super()._explains(tried) or self._between(tried)

    def _between(self, tried: Hypothesis) -> bool:
        """Whether bits lost in an elementwise step give every element, of some value that it may have had before."""
        at, *more = tried.instead
        if more or at[1] not in ("adapted_source_f32", "final_bf16"):
            return False
        acting = at == self.span.acting
        value, *factor = (self.known(source).array.astype(np.float64) for source in self.sources(at))
        spread = self.oracle.carried() if acting and self.oracle.carried else self.known(at).spread
        times = np.abs(factor[0]) if factor else 1.0
        off = self.way().deviations * np.sqrt(spread.variance(value * times)) / times
        ends = [self._way(tried.said, tried.kind, at, [value + sign * off, *factor]) for sign in (-1, 1)]
        low, high = (self._stored(at, end) for end in ends)
        if low is None or high is None:
            return False
        return bool(((np.fmin(low, high) <= self.case.got) & (self.case.got <= np.fmax(low, high))).all())

    def _stored(self, at: Place, value: np.ndarray | None) -> np.ndarray | None:
        """The tensor as stored, had a stage this value."""
        found = None if value is None else self.value({at: lambda _inputs: value})
        return None if found is None else round_once(found, stored_dtype(self.oracle.stage.dtype)).astype(np.float64)
