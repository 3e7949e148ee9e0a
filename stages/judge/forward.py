"""One recorded forward with what judging it needs: its path, weights and tokens. Every stage from its own inputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stages.errors import InputError, NotFoundError, UsageError, shown
from stages.files.aprt import is_aprt_tree
from stages.files.dump import Dump, changed
from stages.files.forward_dump import AprtSide, ForwardSide, Place, advice, forward_key
from stages.files.source import ModelSource, open_model
from stages.files.tensorfile import TensorFile
from stages.judge.culprit import Piece
from stages.judge.guarantees import enforce_precision
from stages.judge.hints import Case, Wrong, explain, first_fitting
from stages.judge.rope import RopeRun
from stages.judge.same_model import other_model
from stages.oracle import rope
from stages.oracle.bounds import LAMBDA, Lambdas, exact_bound
from stages.oracle.span import BEYOND_LAYER, WITHIN_LAYER, Value, Way, floor, oracle_through, value_through
from stages.oracle.spread import Spread
from stages.oracle.verdict import STAGES, Oracle, Verdict, consult, judge, judged_part
from stages.recipes.catalogue import LEFT_OUT, wrong_values
from stages.recipes.elements import explain_rows
from stages.recipes.side import SideVerdict
from stages.run.adapted import ADAPTED_FILE, AdaptedWeights
from stages.run.calibration import lambdas_of
from stages.run.forward import POSITIONS, oracles, parameters, vocabulary_plan
from stages.spec.backend import Weights
from stages.spec.config import EMBEDDING, LM_HEAD, ModelConfig
from stages.spec.dtypes import stored_dtype
from stages.spec.families import parse_config
from stages.spec.forward import (
    ANY_MODEL,
    DECLARED,
    RUN_PARAMS,
    forward_pipeline,
    parameter_name,
    producers,
    recorded_shape,
    stage_options,
)
from stages.spec.stage import Pipeline, Scope, Stage

# What a stage may be stored in.
FLOATS = ("bfloat16", "float16", "float32", "float64")
# What a forward may say it was computed in; `model` is what its config says.
RUN_DTYPES = ("model", "float32", "bfloat16", "float16")


Turn = Callable[[np.ndarray], np.ndarray]


class Recorded(Protocol):
    """A recorded forward, read by layer and stage."""

    label: str
    facts: dict[str, str]
    places: dict[Place, str]

    def read(self, place: Place) -> np.ndarray: ...

    def shape(self, place: Place) -> list[int]: ...

    def sha256(self, place: Place) -> str: ...

    def close(self) -> None: ...


@dataclass
class ForwardRun:
    """One side: its recorded stages, and its config, path, weights and tokens as far as they are known."""

    side: Recorded
    config: ModelConfig | None  # None: an APRT tree, which says nothing of its model
    path: Pipeline | None
    tokens: list[int]
    positions: str
    weights: Weights | None  # None: unavailable
    checkpoint: ModelSource | None = None  # what `weights` come from, adapted or not
    adapted: TensorFile | None = None  # the adapted ones among them
    misshapen: set[Place] = field(default_factory=set)  # nothing can be said of a stage that reads one of these
    lambdas: Lambdas = field(default_factory=lambda: LAMBDA)
    read_as: dict[Place, str] = field(default_factory=dict)  # how a stage was read, where not simply as it was recorded
    orders: dict[Place, Turn] = field(default_factory=dict)  # another order of axes, where the shape does not tell
    turned: dict[Place, Turn] = field(default_factory=dict)  # what is done to a recorded array to get its values
    readings: dict[Place, int] = field(default_factory=dict)  # which of `_readings` a stage was computed by
    makers: dict[Place, Oracle | None] = field(default_factory=dict)  # of inputs that recipes compute again

    # What adapted weights may be off that another program adapted itself, by the calibrated and the rigorous bounds.
    doubts: tuple[Weights, ...] = ()
    floors: dict[Place, float] = field(default_factory=dict)  # of stages judged through others: what they can see
    spans: dict[Place, Span] = field(default_factory=dict)
    values: dict[Place, Value] = field(default_factory=dict)  # of hidden stages, as far as they are needed again

    def read(self, place: Place) -> np.ndarray:
        """A recorded stage's values."""
        array = self.side.read(place)
        return self.turned[place](array) if place in self.turned else array

    @functools.cached_property
    def rope(self) -> RopeRun:
        """RoPE as this run has it: its positions, and the tables that were not recorded."""
        assert self.path is not None
        assert self.config is not None
        # One run wrote a dump of ours; what was imported into one may be of two programs.
        of_one = isinstance(self.side, ForwardSide) and "imported from" not in self.side.facts
        numbers = np.arange(len(self.tokens), dtype=np.int32)[_chosen(self)]
        return RopeRun(
            self.config,
            self.path,
            self.lambdas,
            numbers,
            frozenset(self.side.places),
            lambda place: _recorded(self, place),
            lambda stage, observed: _as_stored(self, stage, observed),
            of_one,
        )

    @property
    def notes(self) -> list[str]:
        """What a reader of the verdict should know of how the run was judged."""
        return [] if self.path is None or self.config is None else self.rope.notes


def _chosen(run: ForwardRun) -> slice:
    return slice(-1, None) if run.positions == "last" else slice(None)


def _recorded(run: ForwardRun, place: Place) -> np.ndarray | None:
    """A recorded stage of the declared shape; None where there is none."""
    there = place in run.side.places and place not in run.misshapen and fits(run, place)
    return run.read(place) if there else None


def open_run(folder: Path, model: str | None, stack: ExitStack) -> ForwardRun:
    """A forward dump with the model it names, or that of `model`; or an APRT tree, of which nothing is known."""
    if is_aprt_tree(folder):
        return ForwardRun(AprtSide(folder), None, None, [], "all", None)
    side = ForwardSide(folder)
    stack.callback(side.close)
    manifest = side.dump.manifest
    recorded = manifest["model"]
    config = parse_config(recorded["config"], f"{folder}: model config")
    path = forward_pipeline(config, _checked_dtype(folder, manifest))
    _check_manifest(folder, manifest, config, path)
    tokens: list[int] = manifest["tokens"]
    checkpoint = _checkpoint(folder, recorded, model, stack)
    adapted = _adapted(side.dump)
    weights = checkpoint if checkpoint is None or adapted is None else AdaptedWeights(checkpoint, adapted)
    positions, lambdas = str(manifest.get("positions", "all")), lambdas_of(side.facts, str(folder))
    return ForwardRun(side, config, path, tokens, positions, weights, checkpoint, adapted, lambdas=lambdas)


def _checked_dtype(folder: Path, manifest: Mapping[str, Any]) -> str:
    dtype = manifest.get("dtype", "model")
    if dtype not in RUN_DTYPES:
        raise InputError(f"{folder}: the manifest's dtype is {shown(dtype)}, expected {', '.join(RUN_DTYPES)}")
    return str(dtype)


def _check_manifest(folder: Path, manifest: Mapping[str, Any], config: ModelConfig, path: Pipeline) -> None:
    """`InputError` naming the first field of a forward's manifest that is not of this model."""
    layers, stages = manifest.get("layers"), manifest.get("stages")
    known = {*path, *path.aliases}
    for name, good in {
        "tokens": max(manifest["tokens"]) < config.vocab_size,
        "layers": max(layers or (0,)) < config.num_hidden_layers,
        "stages": stages is None or known.issuperset(stages),
        "positions": manifest.get("positions", "all") in POSITIONS,
    }.items():
        if not good:
            raise InputError(
                f"{folder}: the manifest's '{name}' is {shown(manifest.get(name))}, which no forward dump has"
            )


def _checkpoint(folder: Path, recorded: Mapping[str, Any], model: str | None, stack: ExitStack) -> ModelSource | None:
    """The model a dump was made from: the given one, or the recorded one if it is on this disk and still the same."""
    try:
        found = open_model(str(recorded.get("source")), recorded=True) if model is None else open_model(model)
        checkpoint = stack.enter_context(found)
    except (InputError, NotFoundError):
        if model is not None:
            raise
        return None
    if checkpoint.fingerprint() != recorded.get("fingerprint"):
        if model is None:
            return None
        now = {"fingerprint": checkpoint.fingerprint(), "config": checkpoint.raw_config}
        what = other_model(now, recorded) or "the tensor headers differ"
        raise InputError(f"{model}: is not the model that {folder} was made from: {what}")
    return checkpoint


def _adapted(dump: Dump) -> TensorFile | None:
    """The adapted weights that a dump keeps; `InputError` naming one that is not as its manifest says."""
    digests = dump.manifest.get("adapted_sha256") or {}
    if not digests:
        return None
    file = dump.file(ADAPTED_FILE)
    for name, digest in digests.items():
        if file.sha256(name) != digest:
            raise changed(file.path, name)
    return file


def about(run: ForwardRun, model: str | None = None) -> dict[str, Any]:
    """What was run, for a reader: the model as the dump or the user (`model`) names it, dtype, tokens, layers."""
    manifest = run.side.dump.manifest if isinstance(run.side, ForwardSide) else {}
    named = model or (manifest.get("model") or {}).get("source")
    layers = {layer for layer, _ in run.side.places if layer is not None}
    components = manifest.get("components") or {}
    return {
        "model": named,
        "dtype": manifest.get("dtype") or run.side.facts.get("dtype"),
        "tokens": len(run.tokens) or None,
        "layers": len(layers),
        "components": components.get("source"),
    }


def order_of(path: Pipeline | None, have: Iterable[Place]) -> list[Place]:
    """The places that are there, in execution order; `InputError` naming one that the model, or any model, has not."""
    have = set(have)
    # Of an APRT tree nothing is known: the order of every stage that there is serves for any.
    path = path or ANY_MODEL
    before, after = path.of_model()
    order: list[Place] = [(None, s.name) for s in before]
    for layer in sorted({layer for layer, _ in have if layer is not None}):
        order += [(layer, name) for name in (*(s.name for s in path.of_layer(layer)), *path.aliases)]
    order += [(None, s.name) for s in after]
    unknown = sorted(have - set(order), key=str)
    if unknown:
        key, names = forward_key(unknown[0]), ", ".join(path)
        raise InputError(f"'{key}' is no stage of this model{advice(key) or f'; there are {names}'}")
    return [place for place in order if place in have]


def promised(run: ForwardRun) -> set[Place]:
    """What a dump's manifest says was recorded: a stage that is not there is missing. Nothing of another program's."""
    if not isinstance(run.side, ForwardSide) or run.path is None:
        return set()
    manifest, path = run.side.dump.manifest, run.path
    stages = [path.at((None, name)) for name in manifest.get("stages") or []]
    layers: list[int] = manifest.get("layers") or []
    places = {(n, s.name) for s in stages for n in (layers if s.scope is Scope.LAYER else [None])}
    return {(n, name) for n, name in places if name in path.of(n)}


def why_unjudged(place: Place, run: ForwardRun) -> str | None:
    """What a stage's judging lacks, in words; None when it can be judged."""
    if run.path is None or run.config is None:
        return "the model is not known; give --model and --tokens"
    span = span_of(place, run)
    stages = [run.path.at(at) for at in (span.acting, *span.hidden)]
    params = [param for stage in stages for param in stage.params if param not in RUN_PARAMS]
    if run.weights is None and params:
        return f"the weights {', '.join(params)} are unavailable; give --model"
    if run.positions == "last" and any(map(functools.partial(_mixes_positions, run.path), (span.acting, *span.hidden))):
        return "the dump holds the last position alone, and this stage needs them all"
    misshapen = [forward_key(at) for at in span.recorded if at in run.misshapen or not fits(run, at)]
    if misshapen:
        return f"recorded in another shape: {', '.join(misshapen)}"
    missing = f"not recorded: {', '.join(map(forward_key, span.missing))}"
    if span.from_start and not run.tokens:
        return missing
    if span.hidden and _floor(place, run) > _LEAST_SEEN:
        return (
            f"{missing}; too long to tell: through {len(span.hidden)} hidden stages right programs may differ by "
            + (f"{_floor(place, run):.2g} of it")
        )
    return None


# Stages that absolute bounds are carried through: attention from q and k before their norms has six, a feed-forward
# five. A whole layer has more, and bounds that add up absolutely are blind there.
_MOST_ABSOLUTE = 8
# A wrong step moves a stage by about its own size; of what differs by half of that among right programs, nothing.
_LEAST_SEEN = 0.5


@dataclass(frozen=True)
class Span:
    """From what a recorded stage is judged: recorded stages, through hidden ones, which were not recorded.

    `acting` is the stage that it is judged as: of a copy whose original was not recorded, the original. `missing` are
    the inputs of that which are hidden; `from_start` says that a way up ends at the model's input, not at a recorded
    stage.
    """

    acting: Place
    recorded: tuple[Place, ...]
    hidden: tuple[Place, ...]
    missing: tuple[Place, ...]
    from_start: bool


def span_of(place: Place, run: ForwardRun) -> Span:
    """From what, and through what, a recorded stage is to be judged."""
    if place not in run.spans:
        run.spans[place] = _span_of(place, run)
    return run.spans[place]


def _span_of(place: Place, run: ForwardRun) -> Span:
    assert run.path is not None
    acting = place
    while run.path.at(acting).identity and _find(run, _only(sources_of(acting, run))) is None:
        acting = _only(sources_of(acting, run))
    sources = sources_of(acting, run)
    hidden: dict[Place, None] = {}
    recorded: dict[Place, None] = {}
    waiting, from_start = list(sources.values()), False
    while waiting:
        source = waiting.pop()
        found = _find(run, source)
        if found is not None:
            recorded[found] = None
        elif source not in hidden:
            hidden[source] = None
            from_start |= source[1] == "embedding"
            waiting += sources_of(source, run).values()
    missing = tuple(source for source in sources.values() if source in hidden)
    return Span(acting, tuple(recorded), tuple(order_of(run.path, hidden)), missing, from_start)


def _only(sources: Mapping[str, Place]) -> Place:
    (source,) = sources.values()
    return source


def _floor(place: Place, run: ForwardRun) -> float:
    if place not in run.floors:
        run.floors[place] = floor(oracle for _, oracle in oracles_of(place, run, run.read(place)))
    return run.floors[place]


def through_words(place: Place, run: ForwardRun) -> str | None:
    """What a stage is judged through, in words, and what it can see; None where its inputs were recorded, or follow
    from the config."""
    span = span_of(place, run)
    hidden = [at for at in span.hidden if at[1] not in rope.TABLES and not run.path.at(at).identity] if run.path else []
    if not hidden:
        return None
    since = ", ".join(map(forward_key, span.recorded)) or "the tokens"
    named = ", ".join(dict.fromkeys(stage for _, stage in hidden))
    layers = {layer for layer, _ in hidden if layer is not None}
    through = named if len(layers) < 2 else f"{len(hidden)} stages of {len(layers)} layers"
    unseen = f"errors below {run.floors[place]:.2g} of it are not seen"
    return f"judged from {since} through {through}, not recorded; {unseen}"


def given_places(run: ForwardRun) -> set[Place]:
    """The recorded stages that are inputs: nothing recorded gives them, and others are judged from them."""
    if run.path is None or run.config is None:
        return set()
    judged = [place for place in run.side.places if why_unjudged(place, run) is None]
    read = {source for place in judged for source in span_of(place, run).recorded}
    return {place for place in read if place not in judged and span_of(place, run).from_start}


def fits(run: ForwardRun, place: Place) -> bool:
    """Whether a recorded stage has the shape that the model and the tokens give it."""
    assert run.path is not None
    assert run.config is not None
    stage = run.path.at(place)
    return run.side.shape(place) == list(recorded_shape(run.config, stage, len(run.tokens), run.positions))


def oracles_of(place: Place, run: ForwardRun, observed: np.ndarray) -> Iterator[tuple[slice, Oracle]]:
    """The oracle of a recorded stage from its own recorded inputs, by columns; `ValueError` if these do not fit."""
    assert run.path is not None
    assert run.config is not None
    span = span_of(place, run)
    stage = _as_stored(run, run.path.at(span.acting), observed)
    of_rope = stage.name in rope.STAGES and all(name in rope.TABLES for _, name in span.hidden)
    with np.errstate(all="ignore"):  # a NaN among the inputs is their own row's verdict
        if of_rope:
            yield slice(None), _oracle_of_rope(place, run, stage, observed, span)
        elif span.hidden:
            yield from _oracles_through(span.acting, run, stage, observed)
        else:
            yield from _oracles_of_recorded(place, run, stage, observed, run.readings.get(place, 0))


def _oracle_of_rope(place: Place, run: ForwardRun, stage: Stage, observed: np.ndarray, span: Span) -> Oracle:
    """From the recorded inputs, however they may be read; where these do not explain the stage, from other tables."""
    if span.hidden:
        return run.rope.oracle(place, stage, observed, None)
    readings = range(len(list(_readings(place, run, stage, inputs_of(place, run)))))
    recorded = [next(_oracles_of_recorded(place, run, stage, observed, number))[1] for number in readings]
    chosen = recorded[run.readings.get(place, 0)]
    if any(judge(oracle, observed)[0].passes for oracle in recorded):
        return chosen
    return run.rope.oracle(place, stage, observed, chosen)


def _oracles_of_recorded(
    place: Place, run: ForwardRun, stage: Stage, observed: np.ndarray, reading: int
) -> Iterator[tuple[slice, Oracle]]:
    """As `oracles_of`, where all inputs were recorded, by one of the `_readings` of them."""
    assert run.path is not None
    assert run.config is not None
    acting = span_of(place, run).acting
    _, inputs = list(_readings(acting, run, stage, inputs_of(acting, run)))[reading]
    if inputs is None or (run.doubts and stage.params):
        yield from _oracles_through(acting, run, stage, observed)
        return
    if stage.by_vocab and observed.ndim == 2:  # logits may be recorded of the last tokens alone
        inputs = {name: array[-len(observed) :] if name in stage.inputs else array for name, array in inputs.items()}
    made = _made(acting, run)
    for columns, oracle in oracles(run.path, run.config, stage, inputs, _weights_of(run), place[0], run.lambdas):
        yield columns, dataclasses.replace(oracle, made=made, sizes=_sizes(run.config))


def _made(place: Place, run: ForwardRun) -> dict[str, Callable[[], Oracle | None]]:
    """Of each input, the oracle of the stage that made it, from its own recorded inputs; None where one is lacking."""
    return {name: functools.partial(_maker, source, run) for name, source in sources_of(place, run).items()}


def _maker(source: Place, run: ForwardRun) -> Oracle | None:
    if source not in run.makers:
        found = _find(run, source)
        oracle = None
        with np.errstate(all="ignore"):
            if found is None:
                oracle = _hidden_maker(source, run)
            elif why_unjudged(found, run) is None and not span_of(found, run).hidden:
                oracle = next((o for _, o in oracles_of(found, run, run.read(found)) if o.unsure is None), None)
        run.makers[source] = oracle
    return run.makers[source]


def _hidden_maker(source: Place, run: ForwardRun) -> Oracle | None:
    """A stage that was not recorded, from its inputs as far as these were."""
    assert run.path is not None
    assert run.config is not None
    stage = run.path[source[1]]
    arrays = [_value(run, at).array for at in sources_of(source, run).values()]
    params = parameters(stage, _given(run), _weights_of(run), source[0], stored_dtype(run.path["embedding"].dtype))
    oracle = consult(stage, (*arrays, *params), stage_options(run.config, stage), run.lambdas)
    return dataclasses.replace(oracle, made=_made(source, run))


def _as_stored(run: ForwardRun, stage: Stage, observed: np.ndarray) -> Stage:
    """The stage with the dtype in which its values are there: logits may be float32 in a bfloat16 run.

    A dump of ours says what it was computed in; what is stored there in less does not fit, and stays as declared.
    """
    less = observed.dtype.itemsize < stored_dtype(stage.dtype).itemsize and isinstance(run.side, ForwardSide)
    known = observed.dtype.name in FLOATS and not less
    return dataclasses.replace(stage, dtype=observed.dtype.name) if known else stage


def _readings(
    place: Place, run: ForwardRun, stage: Stage, inputs: Mapping[str, np.ndarray]
) -> Iterator[tuple[str | None, dict[str, np.ndarray] | None]]:
    """The inputs as a right program may have read them, likeliest first, and what it then did, in words.

    One way where all have the run's dtype. Else they are brought to the widest among them and the result, as
    frameworks promote; or wider ones are cast to the run's dtype first; or, of a result wider than the run, the
    roundings inside are still to the run's dtype. None: it had more bits than were stored.
    """
    assert run.path is not None
    dtype, own = stored_dtype(run.path.activations), stored_dtype(stage.dtype)
    flow = [name for name, source in sources_of(place, run).items() if _flows(run, source)]

    def promoted(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        common = _widest([own, *(arrays[name].dtype for name in flow)])
        return {**arrays, **{name: arrays[name].astype(common, copy=False) for name in flow}}

    yield None, promoted(inputs)
    wider = [name for name in flow if inputs[name].dtype.itemsize > dtype.itemsize]
    if wider:
        narrowed = {name: inputs[name].astype(dtype) for name in wider}
        yield f"right with {', '.join(wider)} cast to {dtype.name} first", promoted({**inputs, **narrowed})
    if flow and not wider and own.itemsize > dtype.itemsize:
        yield f"right with its roundings inside to {dtype.name}", dict(inputs)
    lossy = [name for name in flow if inputs[name].dtype.itemsize < dtype.itemsize]
    if lossy:
        yield f"right from {', '.join(lossy)} before it was stored in fewer bits", None


def _flows(run: ForwardRun, place: Place) -> bool:
    """Whether a stage is stored in the activations' dtype, whatever that is."""
    assert run.path is not None
    return DECLARED[run.path.at(place).function].dtype == "model"


def _widest(dtypes: Sequence[np.dtype]) -> np.dtype:
    """The dtype that holds the values of all: of bfloat16 and float16 neither does."""
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    return np.dtype(np.float32) if widest.itemsize == 2 and len(set(dtypes)) > 1 else widest


@dataclass(frozen=True)
class Reread:
    """Another way to read a stage in which it is right: its values so read, what was done, and whether that is a fault
    of the recording."""

    array: np.ndarray
    text: str
    fault: bool


def reread(place: Place, run: ForwardRun, observed: np.ndarray) -> Reread | None:
    """How else a stage that failed may be read so that it is right; `run` remembers, for stages judged from it."""
    if why_unjudged(place, run) is not None:
        return None
    assert run.path is not None
    span = span_of(place, run)
    for text, fault, turn in [(None, False, None), *_turns(place, run, observed)]:
        array = observed if turn is None else turn(observed)
        stage = _as_stored(run, run.path.at(span.acting), array)
        # Where inputs were computed, all ways to read them are within the bound.
        ways = (
            [None]
            if span.hidden
            else [way for way, _ in _readings(span.acting, run, stage, inputs_of(span.acting, run))]
        )
        for number, way in enumerate(ways):
            run.readings[place] = number
            if (turn is not None or number) and _right(place, run, array):
                said = "; ".join(filter(None, (run.read_as.get(place), text, way)))
                if turn is not None:
                    run.turned[place] = turn
                    run.values.clear()
                if not fault:
                    run.read_as[place] = said
                return Reread(array, said, fault)
    run.readings[place] = 0
    return None


def _right(place: Place, run: ForwardRun, array: np.ndarray) -> bool:
    return all(judge(oracle, part(array, columns))[0].passes for columns, oracle in oracles_of(place, run, array))


def _turns(place: Place, run: ForwardRun, observed: np.ndarray) -> Iterator[tuple[str, bool, Turn]]:
    """Other values that the same bytes may stand for, in words, and whether having written them so is a fault."""
    if place in run.orders:
        yield "recorded with its first two axes in the other order", False, run.orders[place]
    own = observed.dtype
    for dtype in map(stored_dtype, FLOATS):
        if dtype != own and dtype.itemsize <= own.itemsize:
            text = f"{dtype.name} bytes were read as {own.name}"
            yield text, True, functools.partial(_as_bytes_of, dtype, 1)
            if dtype.itemsize < own.itemsize:
                yield f"{text}, row by row", True, functools.partial(_as_bytes_of, dtype, observed.shape[-1])


def _as_bytes_of(dtype: np.dtype, row: int, array: np.ndarray) -> np.ndarray:
    """`array` as what its bytes are in `dtype`: rows of `row` elements (1: the whole) hold as many of these first."""
    rows = np.ascontiguousarray(array).reshape(1 if row == 1 else -1, array.size if row == 1 else row)
    return np.ascontiguousarray(rows.view(dtype)[:, : rows.shape[1]]).reshape(array.shape)


def _oracles_through(
    place: Place, run: ForwardRun, stage: Stage, observed: np.ndarray
) -> Iterator[tuple[slice, Oracle]]:
    """As `oracles_of`, where some inputs have to be computed."""
    assert run.path is not None
    assert run.config is not None
    values, way = _values(run, sources_of(place, run).values()), _way(place, run)
    if stage.by_vocab and observed.ndim == 2:
        values = [value.last(len(observed)) for value in values]
    options, dtype = stage_options(run.config, stage), stored_dtype(run.path.activations)
    weights, given = _weights_of(run), _given(run)
    plan = vocabulary_plan(run.config.vocab_size) if stage.by_vocab else [(0, None)]
    with np.errstate(all="ignore"):
        for start, stop in plan:
            columns = slice(None) if stop is None else slice(start, stop)

            def read(source: Weights, dtype: np.dtype, start: int = start, stop: int | None = stop) -> list[np.ndarray]:
                if stop is not None:
                    return [source.read(LM_HEAD, start, stop).astype(dtype)]
                return parameters(stage, given, source, place[0], dtype)

            doubts = tuple(read(doubt, np.dtype(np.float64)) for doubt in run.doubts) if run.doubts else None
            oracle = oracle_through(stage, values, read(weights, dtype), options, way, doubts)
            gone = tuple(name for name, at in sources_of(place, run).items() if _find(run, at) is None)
            yield columns, dataclasses.replace(oracle, made=_made(place, run), hidden=() if run.doubts else gone)


def _way(place: Place, run: ForwardRun) -> Way:
    """How a place is judged through those of its span."""
    assert run.path is not None
    span = span_of(place, run)
    layers = {layer for layer, _ in (*span.hidden, span.acting)} - ({None} if span.acting[0] is not None else set())
    within = len(layers) == 1
    return Way(
        run.lambdas,
        stored_dtype(run.path.activations),
        np.asarray(run.tokens)[_chosen(run)],
        WITHIN_LAYER if within else BEYOND_LAYER,
        sum(layer is not None for layer, _ in span.hidden) <= _MOST_ABSOLUTE,
    )


def _value(run: ForwardRun, source: Place) -> Value:
    """A stage as recorded, or computed from what is."""
    return _values(run, [source])[0]


def _values(run: ForwardRun, sources: Iterable[Place]) -> list[Value]:
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
        if at not in hidden and at not in run.values and _find(run, at) is None:
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
    found = _find(run, source)
    if found is None:
        return None
    array, dtype = run.read(found), stored_dtype(run.path.activations)
    if not _flows(run, source) or array.dtype.itemsize >= dtype.itemsize:
        return Value(array)
    lost = exact_bound(array.astype(np.float64), array.dtype)
    return Value(array, Spread(lost * lost / 3), lost)


def _computed(run: ForwardRun, place: Place) -> Value:
    """A hidden stage from its inputs, which were recorded or computed."""
    assert run.path is not None
    assert run.config is not None
    inputs = [_recorded_value(run, at) or run.values[at] for at in sources_of(place, run).values()]
    stage, dtype, way = run.path.at(place), stored_dtype(run.path.activations), _way(place, run)
    if stage.identity:
        return inputs[0]
    params = parameters(stage, _given(run), _weights_of(run), place[0], dtype)
    wide = np.dtype(np.float64)
    doubts = tuple(parameters(stage, _given(run), doubt, place[0], wide) for doubt in run.doubts) or None
    oracle = oracle_through(stage, inputs, params, stage_options(run.config, stage), way, doubts)
    return value_through(oracle, inputs, way)


def pieces_of(place: Place, run: ForwardRun, observed: np.ndarray) -> Iterator[Piece]:
    """A recorded stage against what is correctly rounded from its own recorded inputs."""
    for columns, oracle in oracles_of(place, run, observed):
        shown = judged_part(oracle.stage, part(observed, columns))
        yield Piece(oracle.rounded, shown, columns.start or 0, observed.ndim - 1)


def judge_place(place: Place, run: ForwardRun, observed: np.ndarray) -> SideVerdict | None:
    """The verdict on one recorded stage from its own recorded inputs; None where these, or weights, are not there."""
    if why_unjudged(place, run) is not None:
        return None
    try:
        verdict = _judged(place, run, observed)
        other = reread(place, run, observed) if verdict.verdict.fails else None
    except (ValueError, IndexError):  # numpy's, for operands whose shapes do not go together
        return SideVerdict(Verdict.SHAPE, np.inf)
    if other is None:
        verdict.reason = rope_cause(place, run, observed, verdict) or verdict.reason
        return verdict
    if other.fault:
        return SideVerdict(Verdict.BUG, verdict.ratio, other.text)
    return _judged(place, run, other.array)


def rope_cause(place: Place, run: ForwardRun, observed: np.ndarray, verdict: SideVerdict) -> str | None:
    """What of RoPE's positions, frequencies or config explains a failed stage; None where nothing does."""
    return _rope_cause(place, run, observed) if verdict.verdict.fails else None


def _rope_cause(place: Place, run: ForwardRun, observed: np.ndarray) -> str | None:
    if place[1] not in rope.STAGES:
        return None
    with np.errstate(all="ignore"):
        return run.rope.cause(place, observed)


def _judged(place: Place, run: ForwardRun, observed: np.ndarray) -> SideVerdict:
    verdict = SideVerdict()
    for columns, oracle in oracles_of(place, run, observed):
        verdict.add(oracle, part(observed, columns))
        enforce_precision(verdict, run.side.facts.get("precision"), oracle, part(observed, columns))
    return verdict


def part(observed: np.ndarray, columns: slice) -> np.ndarray:
    """The columns of a result that an oracle speaks of."""
    return observed if columns == slice(None) else observed[..., columns]


def explain_place(place: Place, run: ForwardRun, observed: np.ndarray) -> str | None:
    """A hint at why a recorded stage failed; None when its error has no shape that is known."""
    if why_unjudged(place, run) is not None:
        return None
    for columns, oracle in oracles_of(place, run, observed):
        shown = part(observed, columns)
        if not judge(oracle, shown)[0].passes:
            cause = _rope_cause(place, run, observed)
            if cause is not None:
                return cause
            others = functools.partial(_others, place, run, oracle, columns)
            case = Case(oracle, shown, others, columns.start or 0)
            named = _wrong_rows(run, oracle, shown) or first_fitting(case, _of_hidden(place, run, oracle))
            return named or explain(case)
    return None


def _sizes(config: ModelConfig | None) -> dict[str, int]:
    """Sizes of a model that stand in the place of another one, by name."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return {name: getattr(config, name) for name in names} if config else {}


def _wrong_rows(run: ForwardRun, oracle: Oracle, observed: np.ndarray) -> str | None:
    """What stands in the place of the embedding's rows, which are looked for in all of it."""
    if oracle.stage.params != ("tokens", EMBEDDING) or run.config is None or observed.shape != oracle.value.shape:
        return None
    weights, tokens = _weights_of(run), np.asarray(run.tokens)[-len(observed) :]
    plan = vocabulary_plan(run.config.vocab_size)
    chunks = ((start, weights.read(EMBEDDING, start, stop).astype(observed.dtype)) for start, stop in plan)
    return explain_rows(EMBEDDING, tokens, observed, oracle.rounded, chunks)


def _of_hidden(place: Place, run: ForwardRun, oracle: Oracle) -> Iterator[Wrong]:
    """What the stage would give if a stage on the way, which was not recorded, were left out or another function."""
    assert run.path is not None
    assert run.config is not None
    span, stage = span_of(place, run), oracle.stage
    sources, params = sources_of(span.acting, run), oracle.arguments[len(stage.inputs) :]

    def result(instead: Mapping[Place, np.ndarray]) -> np.ndarray:
        arrays = _arrays(run, span, sources.values(), instead)
        if stage.by_vocab:
            arrays = [array[-len(oracle.value) :] for array in arrays]
        return STAGES[stage.function](*(array.astype(np.float64) for array in arrays), *params, **oracle.options)

    for at in span.hidden:
        hidden = run.path.at(at)
        options = stage_options(run.config, hidden)
        if hidden.identity or not hidden.inputs:
            continue
        inputs = [_value(run, source).array.astype(np.float64) for source in sources_of(at, run).values()]
        own = parameters(hidden, _given(run), _weights_of(run), at[0], stored_dtype(run.path.activations))
        if inputs[0].shape == _value(run, at).array.shape:
            yield f"as if {forward_key(at)} were left out", result({at: inputs[0]})
        if at in span.missing and len(inputs) == 1 and not own and not params and inputs[0].shape == oracle.value.shape:
            swapped = STAGES[hidden.function](result({at: inputs[0]}), **options)
            yield f"as if {forward_key(at)} came after {stage.name}, not before it", swapped
        for text, value in wrong_values(hidden, (*inputs, *own), options):
            left_out = f"as if {forward_key(at)} were left out"
            said = left_out if text in LEFT_OUT else f"in {forward_key(at)}, which was not recorded: {text}"
            yield said, result({at: value})


def _arrays(
    run: ForwardRun, span: Span, wanted: Iterable[Place], instead: Mapping[Place, np.ndarray]
) -> list[np.ndarray]:
    """Stages as they would be, had hidden ones of the span given something else."""
    assert run.path is not None
    assert run.config is not None
    changed = dict(instead)
    for at in span.hidden:
        sources = list(sources_of(at, run).values())
        if at in changed or changed.keys().isdisjoint(sources):
            continue
        stage = run.path.at(at)
        inputs = [changed[s] if s in changed else _value(run, s).array.astype(np.float64) for s in sources]
        params = parameters(stage, _given(run), _weights_of(run), at[0], stored_dtype(run.path.activations))
        options = stage_options(run.config, stage)
        changed[at] = inputs[0] if stage.identity else STAGES[stage.function](*inputs, *params, **options)
    return [changed[at] if at in changed else _value(run, at).array for at in wanted]


# Parameters of one shape that a loader may mix up.
_ALIKE = (
    ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    ("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
    ("input_layernorm.weight", "post_attention_layernorm.weight"),
)


def _others(place: Place, run: ForwardRun, oracle: Oracle, columns: slice) -> Iterator[Wrong]:
    """What the stage would give from what it does not read: other stages, and other weights of the model."""
    yield from _of_other_stages(place, run, oracle.stage)
    yield from _of_fused_rows(run, oracle)
    yield from _of_other_weights(place, run, oracle, columns)


# A stage -> what it may be instead: words, of which recorded stages, and their function.
_INSTEAD: Mapping[str, tuple[tuple[str, tuple[str, ...], Callable[..., np.ndarray]], ...]] = {
    "ffn_silu": (("silu of ffn_up, not of ffn_gate: on the wrong branch", ("ffn_up",), STAGES["ffn_silu"]),),
    "ffn_swigl": (
        ("ffn_silu times ffn_gate, not times ffn_up", ("ffn_silu", "ffn_gate"), STAGES["ffn_swigl"]),
        (
            "silu of ffn_up, times ffn_gate: on the wrong branch",
            ("ffn_up", "ffn_gate"),
            lambda up, gate: STAGES["ffn_silu"](up) * gate.astype(np.float64),
        ),
        (
            "silu of the product of ffn_gate and ffn_up",
            ("ffn_gate", "ffn_up"),
            lambda gate, up: STAGES["ffn_silu"](gate.astype(np.float64) * up.astype(np.float64)),
        ),
    ),
}


def _of_other_stages(place: Place, run: ForwardRun, stage: Stage) -> Iterator[Wrong]:
    for text, names, function in _INSTEAD.get(stage.name, ()):
        found = [_find(run, (place[0], name)) for name in names]
        if all(at is not None and fits(run, at) for at in found):
            yield text, function(*(run.side.read(at) for at in found if at is not None))


def _of_fused_rows(run: ForwardRun, oracle: Oracle) -> Iterator[Wrong]:
    """q, k and v of weights joined as rows, and read in the other order: block by block, or key head by key head."""
    if oracle.stage.name not in ("qkv_matmul", "qkv_bias") or run.config is None:
        return
    d, kv_heads = run.config.head_dim, run.config.num_key_value_heads
    if kv_heads == 1:
        return
    rows = np.arange(oracle.value.shape[-1])
    group = len(rows) // (kv_heads * d)
    blocks = rows.reshape(kv_heads, group, d)
    by_head = np.concatenate([blocks[:, part].reshape(-1) for part in (slice(-2), slice(-2, -1), slice(-1, None))])
    for text, order in (
        ("joined as all of q, k, v and read key head by key head", by_head),
        ("joined key head by key head and read as all of q, k, v", np.argsort(by_head)),
    ):
        yield f"the rows of q, k and v are in another order: {text}", oracle.value[:, order]


def _of_other_weights(place: Place, run: ForwardRun, oracle: Oracle, columns: slice) -> Iterator[Wrong]:
    """What the stage would give with another weight of the model of the same shape: a mix-up while loading."""
    assert run.path is not None
    assert run.config is not None
    layer, stage, weights = place[0], oracle.stage, run.weights
    if weights is None or stage.params[:1] == ("tokens",):
        return
    inputs, dtype = oracle.arguments[: len(stage.inputs)], stored_dtype(run.path.activations)
    for one, other in (*_ALIKE, *(pair[::-1] for pair in _ALIKE)):
        if stage.params == (one,):
            weight = weights.read(parameter_name(stage, other, layer)).astype(dtype)
            yield f"{other} in the place of {one}", STAGES[stage.function](*inputs, weight, **oracle.options)
    if stage.by_vocab and not run.config.tie_word_embeddings:
        weight = weights.read(EMBEDDING, columns.start or 0, columns.stop).astype(dtype)
        yield f"the embedding in the place of {LM_HEAD}", STAGES[stage.function](*inputs, weight)
    if layer is None or not stage.params:
        return
    for step in (-1, 1):
        if 0 <= layer + step < run.config.num_hidden_layers:
            others = parameters(stage, {}, weights, layer + step, dtype)
            value = STAGES[stage.function](*inputs, *others, **oracle.options)
            yield f"the weights of layer {layer + step} in the place of layer {layer}'s", value


def _find(run: ForwardRun, source: Place) -> Place | None:
    """Where a stage is recorded: under its own name, or an alias; a copy's values also under the original's."""
    assert run.path is not None
    names = (source[1], *(alias for alias, name in run.path.aliases.items() if name == source[1]))
    found = next(((source[0], name) for name in names if (source[0], name) in run.side.places), None)
    copied = found is None and run.path.at(source).identity
    return _find(run, (source[0], run.path.at(source).inputs[0])) if copied else found


def sources_of(place: Place, run: ForwardRun) -> dict[str, Place]:
    """Where each input of a stage would be recorded."""
    assert run.path is not None
    assert run.config is not None
    return producers(run.path, run.path.at(place), place[0], run.config.num_hidden_layers)


def inputs_of(place: Place, run: ForwardRun) -> dict[str, np.ndarray]:
    """The recorded inputs of a stage by declared name, and the run's tokens and positions."""
    inputs: dict[str, np.ndarray] = {}
    for name, source in sources_of(place, run).items():
        found = _find(run, source)
        assert found is not None
        inputs[name] = run.read(found)
    return inputs | _given(run)


def _given(run: ForwardRun) -> dict[str, np.ndarray]:
    """The run's tokens and their positions."""
    return {"tokens": np.asarray(run.tokens, np.int32)[_chosen(run)], "positions": run.rope.positions}


def _weights_of(run: ForwardRun) -> Weights:
    return run.weights if run.weights is not None else _NoWeights()


class _NoWeights:
    """Stands for weights in stages that take none."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        raise UsageError(f"{name}: the weights are unavailable")


def _mixes_positions(path: Pipeline, place: Place) -> bool:
    """Whether one position's result needs another's: attention, whose axes are queries and keys."""
    stage, own = path.at(place), path.of(place[0])
    return any("keys" in own[name].shape.split() for name in (stage.name, *stage.inputs) if name in own)
