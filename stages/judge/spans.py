"""From what a recorded stage is judged, and the values of the stages on the way that were not recorded."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from stages.files.forward_dump import Place
from stages.judge.activations import joined, least_of, taken_at
from stages.judge.recorded_run import (
    ForwardRun,
    Span,
    chosen,
    find,
    flows,
    given,
    order_of,
    sources_of,
    weights_of,
)
from stages.oracle.bounds import exact_bound
from stages.oracle.rope import TABLES
from stages.oracle.span import BEYOND_LAYER, WITHIN_LAYER, Value, Way, oracle_through, value_through
from stages.oracle.spread import Spread
from stages.run.forward import parameters
from stages.spec.dtypes import stored_dtype
from stages.spec.experts import CHOSEN, is_each
from stages.spec.forward import (
    stage_options,
)
from stages.spec.stage import Pipeline

# Stages that absolute bounds are carried through: attention from q and k before their norms has six, a feed-forward
# five. A whole layer has more, and bounds that add up absolutely are blind there.
_MOST_ABSOLUTE = 8


def span_of(place: Place, run: ForwardRun) -> Span:
    """From what, and through what, a recorded stage is to be judged."""
    if place not in run.spans:
        run.spans[place] = _span_of(place, run)
    return run.spans[place]


def _span_of(place: Place, run: ForwardRun) -> Span:
    assert run.path is not None
    acting = place
    while run.path.at(acting).identity and find(run, _only(sources_of(acting, run))) is None:
        acting = _only(sources_of(acting, run))
    sources, recorded = sources_of(acting, run), dict[Place, None]()
    hidden = dict.fromkeys(_hidden_above(acting, run, recorded))
    from_start = any(name == "embedding" for _, name in hidden)
    missing = tuple(source for source in sources.values() if source in hidden)
    return Span(acting, tuple(recorded), tuple(order_of(run.path, hidden)), missing, from_start)


def _hidden_above(acting: Place, run: ForwardRun, recorded: dict[Place, None]) -> Iterator[Place]:
    """The hidden stages on the ways up from a stage, near ones first; `recorded` takes what ends these ways."""
    seen: set[Place] = set()
    waiting = deque(sources_of(acting, run).values())
    while waiting:
        source = waiting.popleft()
        if source in seen:
            continue
        seen.add(source)
        found = find(run, source)
        if found is not None:
            recorded[found] = None
        else:
            yield source
            waiting += sources_of(source, run).values()


def computed_between(place: Place, run: ForwardRun) -> list[Place]:
    """The hidden stages of a span that are computed from what was recorded: no copies, nor what the config gives."""
    hidden = span_of(place, run).hidden
    return [at for at in hidden if run.path and at[1] not in TABLES and not run.path.at(at).identity]


def _only(sources: Mapping[str, Place]) -> Place:
    (source,) = sources.values()
    return source


def way_of(place: Place, run: ForwardRun) -> Way:
    """How a place, which is no copy, is judged through the hidden stages that it needs."""
    assert run.path is not None
    layers, inside = {place[0]}, 0
    for layer, _ in _hidden_above(place, run, {}):
        layers |= {layer} if place[0] is None or layer is not None else set()
        inside += layer is not None
        if len(layers) > 1 and inside > _MOST_ABSOLUTE:
            break  # further ones change nothing
    within = len(layers) == 1
    return Way(
        run.lambdas,
        stored_dtype(run.path.activations),
        np.asarray(run.tokens)[chosen(run)],
        WITHIN_LAYER if within else BEYOND_LAYER,
        inside <= _MOST_ABSOLUTE,
        taken_at(run, place),
        cell=run.recovered.get(place),
    )


def given_at(run: ForwardRun, place: Place) -> dict[str, np.ndarray]:
    """What a stage's parameters go by: the run's tokens and positions, and which experts this layer's tokens chose."""
    assert run.path is not None
    of_experts = any(is_each(name) for name in run.path.at(place).params)
    return {**given(run), **({CHOSEN: value_of(run, (place[0], CHOSEN)).array} if of_experts else {})}


def value_of(run: ForwardRun, source: Place) -> Value:
    """A stage as recorded, or computed from what is."""
    return values_of(run, [source])[0]


def values_of(run: ForwardRun, sources: Iterable[Place]) -> list[Value]:
    """Stages as recorded, or computed from what is; what a later stage may need again is kept."""
    found: dict[Place, Value] = {}
    for source in sources:
        for at in _up_to(run, source):
            if at not in run.values:
                run.values[at] = _computed(run, at)
                _forget(run, at[0])
        found[source] = _recorded_value(run, source) or run.values[source]
    return list(found.values())


def _up_to(run: ForwardRun, source: Place) -> list[Place]:
    """The hidden stages that are still to be computed for a stage, and itself, in execution order."""
    assert run.path is not None
    hidden: set[Place] = set()
    waiting = [source]
    while waiting:
        at = waiting.pop()
        if at not in hidden and at not in run.values and find(run, at) is None:
            hidden.add(at)
            waiting += sources_of(at, run).values()
    return order_of(run.path, hidden)


# Bytes of hidden stages that are kept for the stages after them.
_MOST_KEPT = 1 << 29


def _forget(run: ForwardRun, layer: int | None) -> None:
    """Drop what no stage of this layer or a later one reads, once there is much of it."""
    if layer is not None and sum(value.array.nbytes for value in run.values.values()) > _MOST_KEPT:
        for at in [at for at in run.values if at[0] is not None and at[0] < layer - 1]:
            del run.values[at]


def _recorded_value(run: ForwardRun, source: Place) -> Value | None:
    assert run.path is not None
    found = find(run, source)
    if found is None:
        return None
    if found in run.recovered:
        return run.recovered[found]
    array, dtype = run.read(found), stored_dtype(run.path.activations)
    # A compiler may keep what it goes on with in more bits than what it stores.
    if not flows(run, source) or (array.dtype.itemsize >= dtype.itemsize and dtype.itemsize == 4):
        return Value(array)
    lost = exact_bound(array.astype(np.float64), min(array.dtype, dtype, key=lambda d: d.itemsize))
    return Value(array, Spread(lost * lost / 3), lost)


def _computed(run: ForwardRun, place: Place) -> Value:
    """A hidden stage from its inputs, which were recorded or computed."""
    return computed(run, place, [_recorded_value(run, at) or run.values[at] for at in sources_of(place, run).values()])


def computed(run: ForwardRun, place: Place, inputs: Sequence[Value]) -> Value:
    """A hidden stage from these inputs, with what right programs may differ by in it."""
    assert run.path is not None
    assert run.config is not None
    stage, dtype, way = run.path.at(place), stored_dtype(run.path.activations), way_of(place, run)
    if stage.identity:
        return inputs[0]
    own = {**given(run), **{name: value.array for name, value in zip(stage.inputs, inputs, strict=True)}}
    params = parameters(stage, own, weights_of(run), place[0], dtype)
    wide = np.dtype(np.float64)
    doubts = tuple(parameters(stage, own, doubt, place[0], wide) for doubt in run.doubts) or None
    if way.taken is not None:
        way = replace(way, least=partial(joined, least_of(run, place)))
    oracle = oracle_through(stage, inputs, params, stage_options(run.config, stage), way, doubts)
    return value_through(oracle, inputs, way)


def mixes_positions(path: Pipeline, place: Place) -> bool:
    """Whether one position's result needs another's: attention, whose axes are queries and keys."""
    stage, own = path.at(place), path.of(place[0])
    return any("keys" in own[name].shape.split() for name in (stage.name, *stage.inputs) if name in own)
