"""What would be seen of a forward of which some stages were recorded: `svf audit --plan`, before anything is recorded.

One forward of the first layers in float64, rounded as it would be stored, is asked as a recorded run is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stages.errors import UsageError
from stages.files.forward_dump import Place, forward_key
from stages.files.source import ModelSource, open_model
from stages.files.tensorfile import sha256
from stages.files.tokens import check_tokens, token_ids
from stages.judge.forward import oracles_of
from stages.judge.forward_pair import Named
from stages.judge.recorded_run import ForwardRun, order_of
from stages.judge.spans import computed_between, span_of
from stages.judge.wording import number
from stages.oracle.components import ReferenceBackend
from stages.oracle.span import LEAST_SEEN, Floor
from stages.progress import Report
from stages.run.forward import Forwarder
from stages.spec.forward import forward_pipeline
from stages.spec.profiles import PROFILES
from stages.spec.selectors import resolve_layers, resolve_stages
from stages.spec.stage import Pipeline, Scope

# Layers that are computed where --layers does not say: floors of one layer are much like those of another.
_FIRST = 4
# Where no tokens are given: so many ids, no two alike in a vocabulary of 16 or more, the step being odd.
_TOKENS, _STEP = 16, 37
# A stage more is worth recording where it brings a floor down to less than this share of it, its own floor too: the
# last stage of a long span, recorded, would only move the span.
_WORTH = 0.8
# What a span that is too long counts as, when gains are weighed.
_BLIND = 1e3

SEEN, TOO_LONG, NOT_COMPUTED = "seen", "too long", "not computed"


@dataclass
class _Planned:
    """Stages of a forward that nobody recorded, with the face of a recorded side."""

    arrays: Mapping[Place, np.ndarray]
    label: str = "plan"
    facts: dict[str, str] = field(default_factory=dict)
    places: dict[Place, str] = field(init=False)

    def __post_init__(self) -> None:
        self.places = {place: forward_key(place) for place in self.arrays}

    def read(self, place: Place) -> np.ndarray:
        return self.arrays[place]

    def shape(self, place: Place) -> list[int]:
        return list(self.arrays[place].shape)

    def sha256(self, place: Place) -> str:
        return sha256(self.arrays[place])

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True)
class _Forward:
    """One computed forward: every stage of some layers by place, and what it is of."""

    checkpoint: ModelSource
    path: Pipeline
    tokens: list[int]
    arrays: Mapping[Place, np.ndarray]

    def run(self, stages: Iterable[str]) -> ForwardRun:
        """As if these stages alone had been recorded."""
        kept = frozenset(stages)
        side = _Planned({place: array for place, array in self.arrays.items() if place[1] in kept})
        return ForwardRun(side, self.checkpoint.config, self.path, self.tokens, "all", self.checkpoint, self.checkpoint)


def plan(
    named: Named, stages: str | None, layers: str | None, *, dtype: str = "model", progress: Report
) -> dict[str, Any]:
    """The `svf.plan/1` document of a set of stages, or of the profile of that name, on a model.

    `layers`: those that are computed, by default the first four. `UsageError` for a stage or layer that is not there.
    """
    if named.model is None:
        raise UsageError("--plan needs --model MODEL, to compute one forward of it")
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_model(named.model))
        checkpoint.check()
        config = checkpoint.config
        path = forward_pipeline(config, dtype)
        profile = PROFILES.get((stages or "hooks").strip())
        chosen = resolve_stages(stages or "", path) if profile is None else profile.stages(path)
        count = config.num_hidden_layers
        wanted = tuple(range(min(_FIRST, count))) if layers is None else resolve_layers(layers, count)
        tokens = _tokens(named, checkpoint)
        config.check_length(len(tokens))
        forward = _computed(checkpoint, path, tokens, wanted, chosen, progress)
        run = forward.run(chosen)
        rows = [_row(place, run) for place in order_of(path, run.side.places)]
        progress("weighing one stage more", 0.5)
        shorter = _shorter(forward, chosen, rows)
        rows = [{**row, "shorten": shorter.best.get(row["key"])} for row in rows]
        rows += [
            _not_computed(name, wanted, count)
            for name in chosen
            if (None, name) not in forward.arrays and path[name].scope is Scope.MODEL
        ]
        return {
            "schema": "svf.plan/1",
            "outcome": "planned",
            "verdict": _sentence(rows, shorter.record),
            "model": named.model,
            "dtype": path.activations,
            "profile": None if profile is None else {"name": profile.name, "doc": profile.doc},
            "stages": list(chosen),
            "tokens": tokens,
            "layers": {"computed": list(wanted), "of": count},
            "rows": rows,
            "record": shorter.record,
        }


def _tokens(named: Named, checkpoint: ModelSource) -> list[int]:
    if named.ids:
        found: list[int] = token_ids(named, checkpoint).tolist()
        return found
    vocabulary = checkpoint.config.vocab_size
    return check_tokens([(3 + _STEP * i) % vocabulary for i in range(_TOKENS)], vocabulary).tolist()


def _computed(
    checkpoint: ModelSource,
    path: Pipeline,
    tokens: list[int],
    layers: Sequence[int],
    chosen: Sequence[str],
    progress: Report,
) -> _Forward:
    """Every stage of the layers, and of the whole model as far as these layers are all of it."""
    progress(f"computing {len(layers)} layers", 0.0)
    config = checkpoint.config
    whole = len(layers) == config.num_hidden_layers
    before, after = path.of_model()
    names = [stage.name for stage in (*before, *path.of_layer(None))]
    names += [stage.name for stage in after if whole and (stage.name in chosen or not stage.by_vocab)]
    forwarder = Forwarder(ReferenceBackend(), config, checkpoint, dtype=path.activations)
    results = forwarder.run(tokens, layers=layers, stages=names)
    return _Forward(checkpoint, path, tokens, {(r.layer, r.stage): r.array for r in results})


def _row(place: Place, run: ForwardRun) -> dict[str, Any]:
    """From what a stage would be judged, and how small an error of it would be seen."""
    span = span_of(place, run)
    hidden = computed_between(place, run)
    found = _floor(place, run)
    return {
        "key": forward_key(place),
        "layer": place[0],
        "stage": place[1],
        "verdict": SEEN if found <= LEAST_SEEN else TOO_LONG,
        "from": [*map(forward_key, span.recorded), *(["tokens"] if span.from_start or not span.recorded else [])],
        "through": [forward_key(at) for at in hidden],
        "floor": found if math.isfinite(found) else None,
        "note": None,
    }


def _not_computed(name: str, layers: Sequence[int], count: int) -> dict[str, Any]:
    note = f"{len(layers)} of {count} layers were computed; --layers all computes it"
    where: dict[str, Any] = {"key": name, "layer": None, "stage": name}
    return {**where, "verdict": NOT_COMPUTED, "from": [], "through": [], "floor": None, "note": note, "shorten": None}


def _floor(place: Place, run: ForwardRun, parts: int | None = None) -> float:
    """The floor of a stage; of `parts` of the vocabulary alone, where it comes in parts."""
    found = Floor()
    for _, oracle in itertools.islice(oracles_of(place, run, run.read(place)), parts):
        found.add(oracle)
    return found.relative


@dataclass(frozen=True)
class _Shorter:
    """By key of each stage's bluntest row, the one stage more that brings its floor down most; and that for all."""

    best: Mapping[str, dict[str, Any]]
    record: dict[str, Any] | None


def _shorter(forward: _Forward, chosen: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> _Shorter:
    """Each hidden stage is recorded too, in turn, and the bluntest row of every stage is asked again."""
    bluntest: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row["through"] and _size(row) >= _size(bluntest.get(row["stage"], {})):
            bluntest[row["stage"]] = row
    candidates = {name for row in bluntest.values() for name in _candidates(row)}
    found: dict[str, list[dict[str, Any]]] = {}  # by what is recorded too
    for name in (name for name in forward.path if name in candidates):
        run = forward.run((*chosen, name))
        shorter = [_shortened(name, row, run) for row in bluntest.values() if name in _candidates(row)]
        found[name] = [one for one in shorter if max(one["floor"], one["own"]) < _WORTH * one["before"]]
    best: dict[str, dict[str, Any]] = {}
    for one in sorted((one for some in found.values() for one in some), key=_gain):
        best[one["key"]] = one
    found = {name: some for name, some in found.items() if some}
    if not found:
        return _Shorter({}, None)
    most = max(found, key=lambda name: math.fsum(map(_gain, found[name])))
    return _Shorter(best, {"stage": most, "rows": found[most]})


def _shortened(name: str, row: Mapping[str, Any], run: ForwardRun) -> dict[str, Any]:
    """A row's floor where `name` was recorded too, and the floor of that, which is then judged itself.

    Of many layers the first and the last are asked, and of logits the first part: the others are much like these.
    """
    floor = _floor((row["layer"], row["stage"]), run, 1)
    recorded = [at for at in run.side.places if at[1] == name and forward_key(at) in row["through"]]
    own = max(_floor(at, run, 1) for at in {recorded[0], recorded[-1]})
    return {"key": row["key"], "stage": name, "before": _size(row), "floor": floor, "own": own}


def _gain(one: Mapping[str, Any]) -> float:
    """How much less of a span is blind, as the logarithm of a factor."""
    return math.log(one["before"] / max(one["floor"], one["own"]))


def _candidates(row: Mapping[str, Any]) -> set[str]:
    """The hidden stages of a row that may shorten its span: of one over several layers, what each layer has."""
    places = [key.rpartition(".") for key in row["through"]]
    layers = {layer for layer, _, _ in places if layer}
    return {name for layer, _, name in places if layer or len(layers) < 2}


def _size(row: Mapping[str, Any]) -> float:
    """A row's floor, as it is weighed."""
    floor = row.get("floor", 0.0)
    return _BLIND if floor is None else float(floor)


def _sentence(rows: Sequence[Mapping[str, Any]], record: Mapping[str, Any] | None) -> str:
    seen, blind = ([row for row in rows if row["verdict"] == verdict] for verdict in (SEEN, TOO_LONG))
    open_ones = [row for row in rows if row["verdict"] == NOT_COMPUTED]
    said = f"{len(seen)} of {len(rows) - len(open_ones)} recorded tensors would be judged"
    if seen:
        worst = max(seen, key=_size)
        said += f"; least is seen in {worst['key']}, errors above {number(worst['floor'])} of it"
    if blind:
        said += f"; of {len(blind)} nothing could be told, first {blind[0]['key']}: too long"
    if open_ones:
        said += f"; {', '.join(row['key'] for row in open_ones)} not computed (--layers all)"
    if record is not None:
        first = max(record["rows"], key=_gain)
        said += f". Record {record['stage']} too: {first['key']} then shows errors above {number(first['floor'])}"
        said += f", not {number(first['before'])}" if first["before"] < _BLIND else ""
    return f"{said}."
