"""Every recorded stage of a forward from its own inputs, recorded or computed from what was."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

from stages.files.forward_dump import Place, forward_key
from stages.judge.activations import joined, least_of, settled, taken_at
from stages.judge.culprit import Piece
from stages.judge.guarantees import enforce_precision
from stages.judge.hints import Case, explain
from stages.judge.mix_ups import of_what_it_does_not_read
from stages.judge.recorded_run import (
    FLOATS,
    ForwardRun,
    Span,
    Turn,
    as_stored,
    find,
    fits,
    flows,
    inputs_of,
    sources_of,
    weights_of,
)
from stages.judge.rows import Row
from stages.judge.slight import slight
from stages.judge.spans import computed_between, given_at, mixes_positions, span_of, value_of, values_of, way_of
from stages.judge.through import Search
from stages.oracle import rope
from stages.oracle.bounds import RMS_THROUGH
from stages.oracle.span import LEAST_SEEN, floor, oracle_through
from stages.oracle.svd import single_threaded_blas
from stages.oracle.verdict import Oracle, Verdict, consult, judge, judged_part, measure, worst
from stages.recipes.elements import explain_rows
from stages.recipes.recipe import Class
from stages.recipes.side import SideVerdict
from stages.run.forward import Where, begin, oracles, parameters, part, vocabulary_plan
from stages.spec.backend import Weights
from stages.spec.config import EMBEDDING, LM_HEAD, ModelConfig
from stages.spec.dtypes import stored_dtype
from stages.spec.experts import CHOSEN
from stages.spec.forward import (
    ROUNDED_INSIDE,
    RUN_PARAMS,
    stage_options,
)
from stages.spec.stage import Stage


def why_unjudged(place: Place, run: ForwardRun) -> str | None:
    """What a stage's judging lacks, in words; None when it can be judged."""
    if run.path is None or run.config is None:
        return "the model is not known; give --model and --tokens"
    span = span_of(place, run)
    stages = [run.path.at(at) for at in (span.acting, *span.hidden)]
    params = [param for stage in stages for param in stage.params if param not in RUN_PARAMS]
    if run.weights is None and params:
        return f"the weights {', '.join(params)} are unavailable; give --model"
    if run.positions == "last" and any(map(functools.partial(mixes_positions, run.path), (span.acting, *span.hidden))):
        return "the dump holds the last position alone, and this stage needs them all"
    misshapen = [forward_key(at) for at in span.recorded if at in run.misshapen or not fits(run, at)]
    if misshapen:
        return f"recorded in another shape: {', '.join(misshapen)}"
    missing = f"not recorded: {', '.join(map(forward_key, span.missing))}"
    if span.from_start and not run.tokens:
        return missing
    if span.hidden and np.isinf(floor_of(place, run)) and any(name == CHOSEN for _, name in span.hidden):
        return (
            f"{missing}; rounding decides which experts some token goes to: record {CHOSEN}, which says what it chose"
        )
    if span.hidden and floor_of(place, run) > LEAST_SEEN:
        return (
            f"{missing}; too long to tell: through {len(span.hidden)} hidden stages right programs may differ by "
            + (f"{floor_of(place, run):.2g} of it")
        )
    return None


def floor_of(place: Place, run: ForwardRun) -> float:
    """The least error of a recorded stage, relative to it in RMS, that its statistic shows."""
    if place not in run.floors:
        run.floors[place] = floor(oracle for _, oracle in oracles_of(place, run, run.read(place)))
    return run.floors[place]


def through_words(place: Place, run: ForwardRun) -> str | None:
    """What a stage is judged through, in words, and what it can see; None where its inputs were recorded, or follow
    from the config."""
    span = span_of(place, run)
    hidden = computed_between(place, run)
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


def oracles_of(place: Place, run: ForwardRun, observed: np.ndarray) -> Iterator[tuple[Where, Oracle]]:
    """The oracle of a recorded stage from its own recorded inputs, part by part; `ValueError` if these do not fit."""
    assert run.path is not None
    assert run.config is not None
    span = span_of(place, run)
    stage = as_stored(run, run.path.at(span.acting), observed)
    of_rope = stage.name in rope.STAGES and all(name in rope.TABLES for _, name in span.hidden)
    with np.errstate(all="ignore"):  # a NaN among the inputs is their own row's verdict
        if of_rope:
            yield slice(None), _oracle_of_rope(place, run, stage, observed, span)
        elif span.hidden or not run.recovered.keys().isdisjoint(span.recorded):
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
) -> Iterator[tuple[Where, Oracle]]:
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
    made, taken = _made(acting, run), taken_at(run, acting)
    before = inputs[stage.inputs[0]] if taken is not None else None
    if taken is not None and before is not None:
        inputs = {**inputs, stage.inputs[0]: taken.cell(before)[1].astype(np.float32)}
    asked = (run.path, run.config, stage, inputs, weights_of(run), place[0], run.lambdas)
    for columns, oracle in oracles(*asked, by_heads=taken is None):
        # What makes an input makes all of it: of some heads there is none to be made.
        whole = stage.by_vocab or columns == slice(None)
        least = least_of(run, acting, columns) if isinstance(columns, slice) else {}
        oracle = dataclasses.replace(oracle, made=made if whole else {}, sizes=_sizes(run.config), least=least)
        if taken is not None and before is not None:
            oracle = settled(oracle, taken, before, part(observed, columns))
        yield columns, oracle


def _made(place: Place, run: ForwardRun) -> dict[str, Callable[[], Oracle | None]]:
    """Of each input, the oracle of the stage that made it, from its own recorded inputs; None where one is lacking."""
    return {name: functools.partial(_maker, source, run) for name, source in sources_of(place, run).items()}


def _maker(source: Place, run: ForwardRun) -> Oracle | None:
    if source not in run.makers:
        found = find(run, source)
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
    stage = run.path.at(source)
    arrays = [value_of(run, at).array for at in sources_of(source, run).values()]
    dtype = stored_dtype(run.path["embedding"].dtype)
    params = parameters(stage, given_at(run, source), weights_of(run), source[0], dtype)
    oracle = consult(stage, (*arrays, *params), stage_options(run.config, stage), run.lambdas)
    return dataclasses.replace(oracle, made=_made(source, run))


def _readings(
    place: Place, run: ForwardRun, stage: Stage, inputs: Mapping[str, np.ndarray]
) -> Iterator[tuple[str | None, dict[str, np.ndarray] | None]]:
    """The inputs as a right program may have read them, likeliest first, and what it then did, in words.

    One way where all have the run's dtype. Else they are brought to the widest among them and the result, as
    frameworks promote; or wider ones are cast to the run's dtype first; or, of a result or inputs wider than the run,
    the roundings inside are still to the run's dtype. None: roundings may have been done or not.
    """
    assert run.path is not None
    dtype, own = stored_dtype(run.path.activations), stored_dtype(stage.dtype)
    flow = [name for name, source in sources_of(place, run).items() if flows(run, source)]

    def promoted(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        common = _widest([own, *(arrays[name].dtype for name in flow)])
        return {**arrays, **{name: arrays[name].astype(common, copy=False) for name in flow}}

    yield None, promoted(inputs)
    wider = [name for name in flow if inputs[name].dtype.itemsize > dtype.itemsize]
    if wider:
        narrowed = {name: inputs[name].astype(dtype) for name in wider}
        yield f"right with {', '.join(wider)} cast to {dtype.name} first", promoted({**inputs, **narrowed})
        if stage.function in ROUNDED_INSIDE:
            yield f"right with its roundings inside to {dtype.name}", None
    if flow and not wider and own.itemsize > dtype.itemsize:
        yield f"right with its roundings inside to {dtype.name}", dict(inputs)
    lossy = [name for name in flow if inputs[name].dtype.itemsize < dtype.itemsize]
    if lossy:
        yield f"right from {', '.join(lossy)} before it was stored in fewer bits", None
    elif dtype.itemsize < 4 and any(_made_unseen(run, source) for source in sources_of(place, run).values()):
        yield f"right from {', '.join(flow)} before it was rounded to {dtype.name}", None


def _made_unseen(run: ForwardRun, source: Place) -> bool:
    """Whether a recorded stage is of stages that were not recorded: its values before their rounding are not known."""
    found = find(run, source)
    return found is not None and any(name not in rope.TABLES for _, name in span_of(found, run).hidden)


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
    if why_unjudged(place, run) is not None or run.recovered:
        return None
    assert run.path is not None
    span = span_of(place, run)
    for text, fault, turn in [(None, False, None), *_turns(place, run, observed)]:
        array = observed if turn is None else turn(observed)
        stage = as_stored(run, run.path.at(span.acting), array)
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
                    run.through.clear()
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
    key = (place, stage.dtype)
    if key in run.through:
        yield slice(None), run.through[key]
        return
    run.through.clear()  # one oracle holds a stage's weights
    assert run.path is not None
    assert run.config is not None
    values, way = values_of(run, sources_of(place, run).values()), way_of(place, run)
    if stage.by_vocab and observed.ndim == 2:
        values = [value.last(len(observed)) for value in values]
    options, dtype = stage_options(run.config, stage), stored_dtype(run.path.activations)
    weights, own = weights_of(run), given_at(run, place)
    plan = vocabulary_plan(run.config.vocab_size) if stage.by_vocab else [(0, None)]
    with np.errstate(all="ignore"):
        for start, stop in plan:
            columns = slice(None) if stop is None else slice(start, stop)

            def read(source: Weights, dtype: np.dtype, start: int = start, stop: int | None = stop) -> list[np.ndarray]:
                if stop is not None:
                    return [source.read(LM_HEAD, start, stop).astype(dtype)]
                return parameters(stage, own, source, place[0], dtype)

            if way.taken is not None:
                way = dataclasses.replace(way, least=functools.partial(joined, least_of(run, place, columns)))

            doubts = tuple(read(doubt, np.dtype(np.float64)) for doubt in run.doubts) if run.doubts else None
            oracle = oracle_through(stage, values, read(weights, dtype), options, way, doubts)
            gone = tuple(name for name, at in sources_of(place, run).items() if find(run, at) is None)
            oracle = dataclasses.replace(oracle, made=_made(place, run), hidden=() if run.doubts else gone)
            if not stage.by_vocab:
                run.through[key] = oracle
            yield columns, oracle


def pieces_of(place: Place, run: ForwardRun, observed: np.ndarray) -> Iterator[Piece]:
    """A recorded stage against what is correctly rounded from its own recorded inputs."""
    for columns, oracle in oracles_of(place, run, observed):
        shown = judged_part(oracle.stage, part(observed, columns))
        yield Piece(oracle.rounded, shown, *begin(columns, observed.ndim))


def judge_place(place: Place, run: ForwardRun, observed: np.ndarray, *, why: bool = True) -> SideVerdict | None:
    """The verdict on one recorded stage from its own recorded inputs; None where these, or weights, are not there.

    Without `why`, the cause of a failure in RoPE is not looked for.
    """
    if why_unjudged(place, run) is not None:
        return None
    try:
        verdict = _judged(place, run, observed)
        other = reread(place, run, observed) if verdict.verdict.fails else None
    except (ValueError, IndexError):  # numpy's, for operands whose shapes do not go together
        return SideVerdict(Verdict.SHAPE, np.inf)
    if verdict.verdict.passes:
        return slightly(place, run, observed, verdict)
    if other is None:
        if why:
            verdict.reason = rope_cause(place, run, observed, verdict) or verdict.reason
        return verdict
    if other.fault:
        return SideVerdict(Verdict.BUG, verdict.ratio, other.text)
    return _judged(place, run, other.array)


def slightly(place: Place, run: ForwardRun, observed: np.ndarray, verdict: SideVerdict) -> SideVerdict:
    """The verdict on a stage that passes: `suspect` with the reason where something moves it surely, by less than the
    bound of long spans sees. `run` keeps what was found."""
    if way_of(span_of(place, run).acting, run).absolute:
        return verdict
    if place in run.recovered:
        return verdict
    columns, oracle = next(oracles_of(place, run, observed))
    if oracle.typical is None or part(observed, columns).shape != oracle.value.shape:
        return verdict
    with np.errstate(all="ignore"), threads(run):
        found = slight(Search(place, run, oracle, part(observed, columns)))
    if found is None:
        return verdict
    run.found[place], sure = found
    run.hints[place] = f"{run.found[place].words}: in that direction alone it is off, by {sure:.3g} standard errors"
    return dataclasses.replace(verdict, elementwise=Verdict.SUSPECT, reason=run.hints[place])


# Products of models of less than this hidden size gain nothing by a second thread, and wait for it on a busy machine.
_THREADED = 1024


def threads(run: ForwardRun) -> AbstractContextManager[None]:
    """As many threads as products of this model gain by."""
    return single_threaded_blas() if is_small(run) else nullcontext()


def is_small(run: ForwardRun) -> bool:
    """Whether the products of this model gain nothing by a second thread."""
    return run.config is not None and run.config.hidden_size < _THREADED


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


def explain_place(place: Place, run: ForwardRun, observed: np.ndarray) -> str | None:
    """A hint at why a recorded stage failed; None when its error has no shape that is known."""
    if place in run.instead:
        found = explain_place(place, other := run.instead[place], observed)
        run.found |= other.found
        return found
    if place not in run.hints:
        run.hints[place] = _explained(place, run, observed)
    return run.hints[place]


# A row that is beyond its bound by more is not asked whether fewer bits explain it.
_FEWER_BITS = 10.0


def explain_suspects(rows: Sequence[Row], run: ForwardRun, end: str = "") -> None:
    """What was judged through hidden stages, of each stage the first that is suspect or a little beyond its bound, in
    place: fewer bits, where these explain it; or a bug, where another function does. `end` is that of a side's fields.
    """
    seen: set[str] = set()
    for row in rows:
        place = (row["layer"], row["stage"])
        if row["tensor"] is not None or not _doubtful(row, end) or row["stage"] in seen:
            continue
        if place not in run.side.places or through_words(place, run) is None:
            continue
        seen.add(row["stage"])
        explain_place(place, run, run.read(place))
        if place in run.found:
            found = run.found[place]
            narrower = found.kind is Class.NARROWER
            verdict = Verdict.PRECISION if narrower else Verdict.BUG
            row[f"verdict{end}"] = verdict.value
            if end:
                row["verdict"] = worst(verdict, Verdict(row["verdict"])).value
            if narrower:  # lost bits are told by the verdict itself
                row[f"hint{end}"] = found.words
                row[f"usual{end}"] = found.usual or None


def _doubtful(row: Row, end: str) -> bool:
    verdict, ratio = row.get(f"verdict{end}"), row.get(f"ratio{end}")
    return verdict == Verdict.SUSPECT or (verdict == Verdict.BUG and ratio is not None and ratio < _FEWER_BITS)


def _explained(place: Place, run: ForwardRun, observed: np.ndarray) -> str | None:
    if why_unjudged(place, run) is not None:
        return None
    for columns, oracle in oracles_of(place, run, observed):
        shown = part(observed, columns)
        if _errs(oracle, shown):
            cause = _rope_cause(place, run, observed)
            if cause is not None:
                return cause
            rows = columns if isinstance(columns, slice) else slice(None)
            others = functools.partial(of_what_it_does_not_read, place, run, oracle, rows)
            start, _ = begin(columns, observed.ndim)
            case = Case(oracle, shown, others, start)
            named = _wrong_rows(run, oracle, shown) or _in_hidden(place, run, oracle, shown, start)
            return named or explain(case)
    return None


def _errs(oracle: Oracle, observed: np.ndarray) -> bool:
    """Whether an element is beyond its bound; or all together err too much, through stages that were not recorded."""
    judged = measure(oracle, observed)
    together = oracle.typical is not None and judged.squares > RMS_THROUGH**2 * judged.count
    return not judged.verdict.passes or together


def _in_hidden(place: Place, run: ForwardRun, oracle: Oracle, observed: np.ndarray, start: int) -> str | None:
    """What is wrong in a stage on the way, where some were not recorded."""
    if oracle.typical is None or observed.shape != oracle.value.shape:
        return None
    with np.errstate(all="ignore"), threads(run):
        found = Search(place, run, oracle, observed, start).named()
    if found is None:
        return None
    run.found[place] = found
    return found.words


def _sizes(config: ModelConfig | None) -> dict[str, int]:
    """Sizes of a model that stand in the place of another one, by name."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return {name: getattr(config, name) for name in names} if config else {}


def _wrong_rows(run: ForwardRun, oracle: Oracle, observed: np.ndarray) -> str | None:
    """What stands in the place of the embedding's rows, which are looked for in all of it."""
    if oracle.stage.params != ("tokens", EMBEDDING) or run.config is None or observed.shape != oracle.value.shape:
        return None
    weights, tokens = weights_of(run), np.asarray(run.tokens)[-len(observed) :]
    plan = vocabulary_plan(run.config.vocab_size)
    chunks = ((start, weights.read(EMBEDDING, start, stop).astype(observed.dtype)) for start, stop in plan)
    return explain_rows(EMBEDDING, tokens, observed, oracle.rounded, chunks)
