"""Mistakes of recording: a tensor under the name of one stage that is not what the model went on with.

What was computed from a stage tells: where it is right from the value that the stage should have, and wrong from the
one that was recorded, the model had the right one, and the recording is to blame. A stage that the model itself got
wrong is the other way round: what was computed from it is right from what was recorded.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import permutations

import numpy as np

from stages.files.forward_dump import ForwardSide, Place, forward_key
from stages.files.tensorfile import sha256
from stages.judge.forward import judge_place, oracles_of
from stages.judge.recorded_run import ForwardRun, Recorded, sources_of
from stages.judge.spans import span_of, value_of
from stages.oracle.verdict import Oracle, Verdict
from stages.run.forward import Where, part
from stages.spec.forward import recorded_shape

# What another value under a stage's name is called before it is known.
_FAR_OFF = (Verdict.BUG, Verdict.SHAPE)
# Whole rows are looked for in sequences up to this long: the search is quadratic.
_LONGEST = 4096
# What right programs' values of one stage, in any dtype and through any layers, are not apart, relative.
_APART = 0.25


@dataclass
class _Supposed:
    """A recording with something else under the name of one stage."""

    side: Recorded
    places: dict[Place, str]
    place: Place
    array: np.ndarray
    label: str = ""
    facts: dict[str, str] = field(default_factory=dict)

    def read(self, place: Place) -> np.ndarray:
        return self.array if place == self.place else self.side.read(place)

    def shape(self, place: Place) -> list[int]:
        return list(self.array.shape) if place == self.place else self.side.shape(place)

    def sha256(self, place: Place) -> str:
        return sha256(self.read(place))

    def close(self) -> None:
        """Nothing to close: whoever opened the recording closes it."""


@dataclass
class _Suspicion:
    """A run whose failed stages are asked for whether the recording is to blame, and what was found so far."""

    run: ForwardRun
    failed: list[Place]
    found: dict[Place, str] = field(default_factory=dict)
    judged: dict[tuple[Place, frozenset[Place]], bool | None] = field(default_factory=dict)

    def passes(self, place: Place, hidden: Collection[Place]) -> bool | None:
        """Whether a stage is right where others were not recorded; None where it cannot be judged."""
        key = (place, frozenset(hidden))
        if key not in self.judged:
            run = without(self.run, hidden)
            verdict = judge_place(place, run, run.read(place), why=False)
            self.judged[key] = None if verdict is None else verdict.verdict.passes
        return self.judged[key]

    def readers(self, places: Collection[Place]) -> list[Place]:
        """What was recorded and computed from some stages, as far as they were recorded rightly."""
        run = without(self.run, {*self.found})
        others = [place for place in run.side.places if place not in places and place not in self.found]
        return [place for place in others if set(places) & set(span_of(place, run).recorded)]

    def cleared(self, places: Collection[Place]) -> bool | None:
        """Whether what was computed from stages says that the model had the right values there, not the recorded.

        None where it does not tell: nothing reads them, or what does is right, or wrong, from either.
        """
        hidden, right = {*self.found}, None
        for place in self.readers(places):
            used, other = self.passes(place, hidden), self.passes(place, {*hidden, *places})
            if used and not other:
                return False
            right = right or (other and not used) or None
        return right


def misrecorded(run: ForwardRun, judged: Iterable[tuple[Place | None, str | None]]) -> dict[Place, str]:
    """Of judged stages, with their verdicts, those that were recorded wrongly: what each holds, in words.

    Nothing of a dump that a backend of ours wrote: it records what it hands on.
    """
    if run.path is None or run.config is None or _ours(run):
        return {}
    failed = [place for place, verdict in judged if verdict in _FAR_OFF and place in run.side.places and place]
    asked = _Suspicion(run, failed)
    for place in failed:
        if place in asked.found or (asked.found and asked.passes(place, {*asked.found})):
            continue  # exchanged with an earlier one, or right but for one that was recorded wrongly
        asked.found |= _blamed(place, asked)
    return asked.found


def in_words(key: str, holds: str) -> str:
    """What is said of a stage that was recorded wrongly."""
    return f"recorded as {key}, {holds}; the model went on with the right value"


def without(run: ForwardRun, hidden: Collection[Place]) -> ForwardRun:
    """The run as if some of its stages had not been recorded."""
    if not hidden:
        return run
    side = copy.copy(run.side)
    side.places = {place: key for place, key in run.side.places.items() if place not in hidden}
    return run.of(side)


def _ours(run: ForwardRun) -> bool:
    return isinstance(run.side, ForwardSide) and run.side.dump.backend is not None


def _blamed(place: Place, asked: _Suspicion) -> dict[Place, str]:
    """The failed stage, and one that it was exchanged with, where the recording is to blame for them.

    What is nothing that is known stays what its row says, whatever was computed from it.
    """
    cleared = bool(np.isfinite(asked.run.read(place)).all()) and asked.cleared([place])
    if cleared is False:
        return {}
    holds = _held(place, asked)
    if holds is not None and holds in asked.failed and _held(holds, asked) == place:
        both = {place: _said(holds), holds: _said(place)}
        return both if asked.cleared(both) else {}
    words = _said(holds) if holds is not None else _in_part(place, asked) or _rows_of_others(place, asked)
    if words is None:
        return {}
    # A model that had not got it right could not have computed what comes after it, nor what belongs to another token.
    after = not asked.readers([place]) if holds is None else _before(place, holds, asked.run)
    return {place: words} if cleared or after else {}


def _said(holds: Place) -> str:
    return f"it holds what {forward_key(holds)} should be"


def _held(place: Place, asked: _Suspicion) -> Place | None:
    """Which other stage's value was recorded in the place of a stage; the nearest where several fit."""
    run = without(asked.run, {place, *asked.found})
    array, found = asked.run.read(place), {}
    for other in _alike(place, run, array.size):
        left = _error(other, run, array) if _may_hold(array, other, run, asked) else None
        if left is not None:
            found[other] = left
    return min(found, key=lambda at: found[at], default=None)


def _may_hold(array: np.ndarray, other: Place, run: ForwardRun, asked: _Suspicion) -> bool:
    """Whether a recorded array is anywhere near another stage's value, as far as that is known without judging it."""
    if other in run.side.places:
        return other in asked.failed or _near(array, run.read(other))
    if run.weights is None or run.positions == "last" or run.misshapen:
        return True
    return _near(array, value_of(run, other).array)


def _near(array: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays of one size are so alike that one may be the other up to rounding."""
    one, two = (x.reshape(-1).astype(np.float64) for x in (array, other))
    return bool(np.linalg.norm(one - two) <= _APART * np.linalg.norm(two))


def _alike(place: Place, run: ForwardRun, size: int) -> Iterator[Place]:
    """Stages of as many elements, of the same layer, of those beside it and of the whole model."""
    assert run.path is not None
    assert run.config is not None
    layer, layers = place[0], range(run.config.num_hidden_layers)
    beside = (layers[0], layers[-1]) if layer is None else (layer, layer - 1, layer + 1)
    near = dict.fromkeys(n for n in beside if n in layers)
    for n in (*near, None):
        for name in run.path.of(n):
            other = (n, name)
            stage = run.path.at(other)
            same = (stage.scope.value == "layer") == (n is not None) and not stage.identity and other != place
            if (
                same
                and np.prod(recorded_shape(run.config, stage, len(run.tokens), run.positions), dtype=object) == size
            ):
                yield other


def _error(other: Place, run: ForwardRun, array: np.ndarray) -> float | None:
    """How far a recorded array is from what another stage should be, relative; None where it is not that."""
    assert run.path is not None
    assert run.config is not None
    shape = recorded_shape(run.config, run.path.at(other), len(run.tokens), run.positions)
    given = array.reshape(shape)
    side = _Supposed(run.side, {**run.side.places, other: forward_key(other)}, other, given)
    supposed = run.of(side)
    verdict = judge_place(other, supposed, given, why=False)
    if verdict is None or not verdict.verdict.passes:
        return None
    error = size = 0.0
    for columns, oracle in oracles_of(other, supposed, given):
        error += float(np.sum(np.square(part(given, columns).astype(np.float64) - oracle.value)))
        size += float(np.sum(np.square(oracle.value)))
    return error / size if size else None


def _before(place: Place, other: Place, run: ForwardRun) -> bool:
    """Whether a stage is computed from another, through whatever stages."""
    waiting, seen = [other], set()
    while waiting:
        at = waiting.pop()
        if at == place:
            return True
        if at not in seen:
            seen.add(at)
            waiting += sources_of(at, run).values()
    return False


def _in_part(place: Place, asked: _Suspicion) -> str | None:
    """Which part of q, k and v joined stands in the place of a stage, or in which order they were joined there."""
    run = without(asked.run, {place, *asked.found})
    assert run.path is not None
    assert run.config is not None
    array, layer = asked.run.read(place), place[0]
    n = len(array)
    joined = next((s for s in run.path.of(layer).values() if s.shape == "tokens qkv" and not s.identity), None)
    if joined is None or layer is None or n != len(run.tokens):
        return None
    d, heads = run.config.head_dim, run.config.num_attention_heads
    ends = [heads * d, (heads + run.config.num_key_value_heads) * d]
    ((_, oracle),) = oracles_of((layer, joined.name), run, array)
    parts = dict(zip("qkv", np.split(np.arange(oracle.value.shape[1]), ends), strict=True))
    orders = {", ".join(order): np.concatenate([parts[name] for name in order]) for order in permutations("qkv")}
    own = place[1] == joined.name
    found = array.reshape(n, -1)
    for words, columns in (orders if own else parts).items():
        if found.shape[1] == len(columns) and words != "q, k, v" and _within(oracle, columns, found):
            of = forward_key((layer, joined.name))
            return f"q, k and v are joined in the order {words}" if own else f"it holds the {words} of {of}"
    return None


def _within(oracle: Oracle, columns: np.ndarray, array: np.ndarray) -> bool:
    bound = np.broadcast_to(oracle.bound, oracle.value.shape)[:, columns]
    return bool((np.abs(array.astype(np.float64) - oracle.value[:, columns]) <= bound).all())


def _rows_of_others(place: Place, asked: _Suspicion) -> str | None:
    """What stands in the rows of a stage by token, where these are the right rows of other tokens."""
    run = without(asked.run, {*asked.found})
    assert run.path is not None
    array = run.read(place)
    n = len(array)
    if not run.path.at(place).shape.startswith("tokens") or n != len(run.tokens) or not 2 < n <= _LONGEST:
        return None
    try:
        oracles = list(oracles_of(place, run, array))
    except (ValueError, IndexError):
        return None
    right = np.concatenate([oracle.value.reshape(n, -1) for _, oracle in oracles], axis=1)
    got = array.reshape(n, -1).astype(np.float64)
    if got.shape != right.shape:
        return None
    nearest = np.argmax(got @ right.T - np.sum(right * right, axis=1) / 2, axis=1)
    order = np.where(_fits(oracles, nearest, array), nearest, -1)
    return _order_said(order)


def _fits(oracles: Iterable[tuple[Where, Oracle]], nearest: np.ndarray, array: np.ndarray) -> np.ndarray:
    """Which rows are, within rounding, those that stand at `nearest` in the right value."""
    fits = np.ones(len(nearest), bool)
    for columns, oracle in oracles:
        bound = np.broadcast_to(oracle.bound, oracle.value.shape)
        off = np.abs(part(array, columns).astype(np.float64) - oracle.value[nearest])
        fits &= (off <= 2 * bound[nearest]).reshape(len(nearest), -1).all(axis=1)
    return fits


def _order_said(order: np.ndarray) -> str | None:
    """In words which tokens' rows stand where, -1 for none's; None where they are not another order of the same."""
    n, known = len(order), order >= 0
    wrong = known & (order != np.arange(n))
    if wrong.sum() < 2:
        return None
    if known.all() and len(set(order.tolist())) == 1:
        which = "the last" if order[0] == n - 1 else f"token {order[0]}"
        return f"every token has the row of {which}"
    steps, counts = np.unique((order - np.arange(n))[wrong], return_counts=True)
    step, count = int(steps[counts.argmax()]), int(counts.max())
    if count >= n - abs(step):
        return f"the rows are {abs(step)} too {'early' if step > 0 else 'late'}"
    first = int(np.argmax(wrong))
    rest = "" if known.all() else f", and {int((~known).sum())} rows are of no token of this sequence"
    return f"the rows of tokens are in another order: token {first}'s place holds token {int(order[first])}'s{rest}"
