"""One recorded run against the oracle, each stage from its own recorded inputs; needs no other side."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import InputError, UsageError, shown
from stages.files.forward_dump import Place, forward_key
from stages.files.kinds import Recording, one_recording
from stages.files.replay_recorded import Side, open_side
from stages.files.source import ModelSource, open_model
from stages.judge import document as diff
from stages.judge import stats
from stages.judge.activations import declare
from stages.judge.adapted import AdaptedPair, adaptation
from stages.judge.arrangements import fitting_layouts
from stages.judge.culprit import ORACLE, chosen_row, culprit_data, oracle_pieces
from stages.judge.decomposition import SHOWN_BY, fault_of, in_words, not_known, parts_of, with_faults
from stages.judge.explained import Explained, accept, accepted_words, tie_words
from stages.judge.forward import (
    explain_place,
    explain_suspects,
    floor_of,
    given_places,
    oracles_of,
    pieces_of,
    reread,
    rope_cause,
    slightly,
    through_words,
    why_unjudged,
)
from stages.judge.forward_pair import Named
from stages.judge.inferred import infer_activations
from stages.judge.metrics import Difference
from stages.judge.misrecorded import in_words as as_misrecorded
from stages.judge.misrecorded import misrecorded, without
from stages.judge.natives import NativesRequest, ask
from stages.judge.opened import open_forward
from stages.judge.recorded_run import ForwardRun, about, order_of, promised
from stages.judge.recovered import FINAL_NORM, LOGITS, not_of_the_head, with_final_norm
from stages.judge.replay import judge_chunk
from stages.judge.replay_spans import Replayed, span_in
from stages.judge.rerun import Recorded, recorded_of, resolve_suspects
from stages.judge.rows import Row, alone_row, in_forward, in_replay
from stages.judge.spans import span_of
from stages.judge.spread import Spread
from stages.judge.wanted import Wanted
from stages.judge.wording import how_far, times
from stages.oracle.bounds import Lambdas
from stages.oracle.residual import Residual
from stages.oracle.span import LEAST_SEEN
from stages.oracle.verdict import Oracle, Verdict, judged_part
from stages.progress import Progress as Reporter
from stages.progress import Report
from stages.recipes.side import SideVerdict
from stages.run.calibration import lambdas_of
from stages.run.forward import begin, part
from stages.run.replay import chunk_plan, default_chunk_rows
from stages.spec.noise import Noise
from stages.spec.replay import REPLAY
from stages.spec.stage import Stage
from stages.spec.values import Chunk

EXIT_CODES = {"sound": 0, "faulty": 1, "incomplete": 5}


def audit(
    path: Path,
    *,
    model: str | None = None,
    tokens: str | None = None,
    tokens_file: Path | None = None,
    prompt: str | None = None,
    components: Path | None = None,
    adapted: Path | None = None,
    layout: str = "declared",
    layers: str | None = None,
    stages: str | None = None,
    top: int = 5,
    rerun: bool = True,
    accepted: str | None = None,
    natives: bool = False,
    activations: str | None = None,
    progress: Reporter | None = None,
) -> dict[str, Any]:
    """The `svf.audit/1` document of a dump, a component bundle, a stage file, or another program's forward.

    `model` and the tokens are needed for another program's, which does not name them, and `adapted` and `layout` where
    it ran on adapted weights. `layers` and `stages` ask for less. `InputError` for a key that is no stage. With
    `rerun`, suspect stages of our own dumps are run again on their backend. `accepted`: see `explained.accept`.
    With `natives`, what is within rounding is asked of the backends' own functions too. `activations`: what
    kernels take the inputs of products to, of `activations.CHOICES`; where it is not given, the verdict says it.
    """
    named, wanted = Named(model, tokens, tokens_file, prompt), Wanted.of(layers, stages)
    progress = progress or Reporter(False)
    asked = NativesRequest(path, "", (), **vars(named), adapted=adapted, layout=layout, components=components)
    how = _How(wanted, top, rerun, accepted, asked if natives else None)
    with ExitStack() as stack:
        kind = one_recording(path)
        if kind is Recording.APRT:
            raise UsageError(
                f"{path}: one APRT file does not hold the inputs that it is judged from; name the folder of the tree"
            )
        if kind is Recording.REPLAY:
            if named.ids or adapted is not None or activations is not None:
                raise UsageError(
                    f"--tokens, --adapted and --activations apply to forwards; {path} is a component replay"
                )
            return _audit_replay(path, named.model, components, how, stack, progress)
        if components is not None:
            raise UsageError(f"--components applies to component replays; {path} is a forward")
        run = open_forward(path, named, adapted, layout, stack, progress)
        declare(run, activations)
        return _audit_forward(run, named.model, how, progress)


@dataclass(frozen=True)
class _How:
    """What is asked of an audit, whatever it is of."""

    wanted: Wanted
    top: int
    rerun: bool
    accepted: str | None
    natives: NativesRequest | None

    def settled(
        self, rows: list[Row], progress: Report, named: Callable[[Row], bool] = lambda _row: False
    ) -> list[Row]:
        """Judged rows, with what was asked of the backends and what the user accepts; `named`: see `natives.ask`."""
        if self.natives is not None:
            ask(rows, self.natives, progress, named)
            # Logits that are explained to the last byte tell more than what they hold.
            whole = any(row["verdict"] == Verdict.EXACT or row.get("proved") for row in rows if _is(row, LOGITS))
            rows = [row for row in rows if not (whole and row.get("recovered"))]
        return accept(rows, self.accepted)


# -- a forward ----------------------------------------------------------------------------------------------------


def _audit_forward(run: ForwardRun, model: str | None, how: _How, progress: Report) -> dict[str, Any]:
    places = order_of(run.path, {*run.side.places, *promised(run)})
    if run.path is not None:
        how.wanted.check(run.path, run.path.aliases, (layer for layer, _ in places if layer is not None))
        places = [place for place in places if how.wanted.has(*place, run.path.aliases)]
    rows: list[Row] = []
    for number, place in enumerate(places):
        progress(f"auditing {forward_key(place)}", number / len(places))
        rows.append(_forward_row(place, run, how.top))
    run = _without_mistakes(rows, run, how.top)
    given = given_places(run)
    for row in rows:
        if (row["layer"], row["stage"]) in given:
            row |= {"verdict": Verdict.GIVEN.value, "note": f"taken as given, {row['note']}"}
    infer_activations(rows, run)
    run = _with_recovered(rows, run, how)
    explain_suspects(rows, run)
    if how.rerun:
        resolve_suspects(rows, recorded_of(run, model))
    with ExitStack() as stack:
        of_weights = AdaptedPair.alone(adaptation("", run), stack) if how.wanted == Wanted() else ()
        rows = [*of_weights, *rows]

    def explain(row: Mapping[str, Any]) -> str | None:
        place = (row["layer"], row["stage"])
        known = row["ratio"] is not None and row["tensor"] is None and not row.get("proved")
        return explain_place(place, run, run.read(place)) if known else None

    def named(row: Row) -> bool:
        explain(row)
        found = run.found.get((row["layer"], row["stage"]))
        return found is not None and len(found.places) == 1

    facts = {**run.side.facts, **({"model": model} if model else {})}
    rows = how.settled(rows, progress, named)
    result = document(rows, run.side.label, facts, kind="forward", explain=explain, notes=run.notes)
    for culprit in result["culprits"]:
        found = run.found.get((culprit["layer"], culprit["stage"]))
        culprit["blamed"] = [] if found is None else [forward_key(at) for at in found.places]
    return {**result, "about": about(run, model), "culprit_data": _forward_data(result, run)}


def _without_mistakes(rows: list[Row], run: ForwardRun, top: int) -> ForwardRun:
    """The run without the stages that were recorded wrongly, which their rows say; the others judged again from it."""
    found = misrecorded(run, (((row["layer"], row["stage"]), row["verdict"]) for row in rows))
    if not found:
        return run
    right = without(run, found)
    for number, row in enumerate(rows):
        place = (row["layer"], row["stage"])
        if place in found:
            row |= {"verdict": Verdict.MISRECORDED.value, "hint": as_misrecorded(row["key"], found[place])}
        elif place in right.side.places:
            rows[number] = _forward_row(place, right, top)
    return right


def _with_recovered(rows: list[Row], run: ForwardRun, how: _How) -> ForwardRun:
    """The run with the final norm that its logits hold, the rows of both in place; as it is where there is none."""
    found = with_final_norm(run)
    if found is None:
        return run
    right, condition = found
    head, norm = (_forward_row(place, right, how.top) for place in (LOGITS, FINAL_NORM))
    old = next((row for row in rows if _is(row, LOGITS)), None) or _forward_row(LOGITS, run, how.top)
    passes, passed = (Verdict(row["verdict"]).passes for row in (head, old))
    # Of a head that is wrong least squares gives nothing that the layers could be judged by, nor a name.
    if old["verdict"] not in _DOUBTED or (not passes and not passed):
        return run
    # What passes through all stages is not to be doubted by what follows from it.
    if passes and passed and not Verdict(norm["verdict"]).passes:
        return run
    through, floor = [forward_key(at) for at in span_of(LOGITS, run).hidden], floor_of(LOGITS, right)
    seen = f"errors below {floor:.2g} of it are not seen"
    head |= {"through": through, "floor": floor}
    head |= {"note": f"judged as the head's of one vector, the final norm that it holds; {seen}"}
    note = f"recovered from lm_head by least squares on the head, whose condition is {condition:.2g}"
    norm |= {"recovered": True, "note": f"{note}; {norm['note']}"}
    if not passes:
        head["hint"] = not_of_the_head(right)
    judged = [norm, head] if passes else [head]
    rows[:] = [row for row in rows if not _is(row, LOGITS)]
    rows += [row for row in judged if how.wanted.has(None, row["stage"], {})]
    return right if passes else run


# Verdicts of logits beside which those of what they hold say more.
_DOUBTED = (Verdict.EXACT, Verdict.ROUNDING, Verdict.SUSPECT, Verdict.BUG)


def _is(row: Row, place: Place) -> bool:
    return (row["layer"], row["stage"]) == place and row["tensor"] is None


def _forward_data(result: Mapping[str, Any], run: ForwardRun) -> dict[str, Any] | None:
    """A close look at the culprit, against what is correctly rounded."""
    chosen = chosen_row(result)
    place = (chosen[0]["layer"], chosen[0]["stage"]) if chosen else None
    if chosen is None or place not in run.side.places or why_unjudged(place, run) is not None:
        return None
    assert run.path is not None
    observed, axes = run.read(place), run.path.at(place).shape
    pieces = pieces_of(place, run, observed)
    return culprit_data(*chosen, pieces, shape=observed.shape, axes=axes, labels=(ORACLE, "recorded"))


def _forward_row(place: Place, run: ForwardRun, top: int) -> Row:
    assert run.path is not None
    stage = run.path.at(place)
    row = alone_row(in_forward(place, stage.required))
    if place not in run.side.places:
        return {**row, "verdict": Verdict.MISSING.value, "note": "the manifest says it was recorded"}
    observed = run.read(place)
    row |= {"sha256": run.side.sha256(place), "stats": stats.population(observed)}
    why = why_unjudged(place, run)
    if why is not None:
        return {**row, "verdict": Verdict.UNJUDGED.value, "note": why}
    judged = _forward_judged(place, run, observed, top)
    other = reread(place, run, observed) if judged.verdict.verdict.fails else None
    if other is not None and other.fault:
        fields = {"verdict": Verdict.BUG.value, "hint": other.text}
        return {**row, **judged.fields(), **fields}
    if other is not None:
        judged = _forward_judged(place, run, other.array, top)
    judged.verdict.reason = rope_cause(place, run, observed, judged.verdict) or judged.verdict.reason
    if judged.verdict.verdict.passes:
        judged.verdict = slightly(place, run, observed, judged.verdict)
    words = through_words(place, run)
    how = "; ".join(filter(None, (run.read_as.get(place), words)))
    through = [forward_key(at) for at in span_of(place, run).hidden]
    found = {"through": through, "floor": run.floors[place] if words else None}
    return {**row, **judged.fields(), **found, **({"note": how} if how else {})}


def _forward_judged(place: Place, run: ForwardRun, observed: np.ndarray, top: int) -> _Judged:
    assert run.path is not None
    judged = _Judged(run.path.at(place), top, run.side.facts.get("precision"))
    for columns, oracle in oracles_of(place, run, observed):
        judged.add(oracle, part(observed, columns), *begin(columns, observed.ndim))
    return judged


# -- a component replay -------------------------------------------------------------------------------------------


def _audit_replay(
    path: Path, model: str | None, components: Path | None, how: _How, stack: ExitStack, progress: Report
) -> dict[str, Any]:
    side = stack.enter_context(open_side(path, components))
    if side.unknown:
        raise InputError(
            f"{path}: '{shown(min(side.unknown))}' is no stage of the replay; there are {', '.join(REPLAY)}"
        )
    checkpoint = None if model is None else stack.enter_context(open_model(model))
    lambdas = lambdas_of(side.facts, str(path))
    judged = (checkpoint, how.top, lambdas, side.precision)
    audits = [_TensorAudit(side, key, *judged) for key in side.tensors]
    for number, tensor in enumerate(audits):
        tensor.run(lambda label, done, at=number: progress(label, (at + done) / len(audits)))  # type: ignore[misc]
    rows = [row for tensor in audits for row in tensor.rows()]
    how.wanted.check(REPLAY, {}, {row["layer"] for row in rows if row["layer"] is not None})
    rows = [row for row in rows if how.wanted.has_tensor(row["layer"], row["stage"])]
    if how.rerun:
        resolve_suspects(rows, Recorded(path, side.backend, side.facts, source=components))
    rows = how.settled(rows, progress)
    zero_offset = [t.zero_offset() for t in audits]
    faults = [row for t in audits for row in t.decomposition()]
    result = document(rows, side.label, side.facts, kind="replay", zero_offset=zero_offset, decomposition=faults)
    chosen = chosen_row(result)
    of = next((t for t in audits if chosen and t.tensor.source_name == chosen[0]["tensor"]), None)
    return {**result, "culprit_data": of.culprit_data(*chosen) if chosen and of else None}


class _TensorAudit:
    """One tensor of a replay, chunk by chunk."""

    def __init__(
        self,
        side: Side,
        key: str,
        checkpoint: ModelSource | None,
        top: int,
        lambdas: Lambdas,
        precision: str | None,
    ):
        self.key, self.tensor, self.checkpoint, self.top = key, side.tensors[key], checkpoint, top
        self.precision, self.promises = precision, side.promises
        # Judged by what it says it did; the zero-offset replay tells whether that was right.
        self.options = {"layout": self.tensor.layout, "transpose": self.tensor.transpose}
        self.replayed = Replayed(self.options, lambdas, functools.partial(side.components_but, key))
        self.judged: dict[str, _Judged] = {}
        self.residual, self.rank = Residual(), 1

    def run(self, progress: Report) -> None:
        if not self.tensor.stages:
            return
        shape = self.tensor.shape
        with np.errstate(all="ignore"):  # a NaN is a verdict, not a warning
            for chunk in self.tensor.chunks(chunk_plan(shape[0], default_chunk_rows(shape))):
                self._add(chunk)
                progress(f"auditing {self.tensor.source_name}", chunk.stop / shape[0])

    def _add(self, chunk: Chunk) -> None:
        chunk = self._with_source(chunk)
        for name, observed in chunk.values.items():
            stage = REPLAY[name]
            judged = self.judged.setdefault(name, _Judged(stage, self.top, self.precision))
            recorded = [name for _, name in span_in(chunk, stage).recorded]
            misshapen = [n for n in recorded if n in self.judged and self.judged[n].verdict.verdict is Verdict.SHAPE]
            lacking = self.replayed.lacking(chunk, stage)
            if misshapen:
                judged.note = f"of another shape: {', '.join(misshapen)}"
            elif lacking is not None:
                judged.note = lacking
            else:
                axis = int(self.tensor.transpose and name.startswith("final_"))
                try:
                    oracle = self.replayed.oracle(chunk, stage)
                except ValueError as error:  # numpy's, for operands whose shapes do not go together
                    judged.note = f"its recorded inputs do not fit each other: {error}"
                    continue
                named = functools.partial(self.replayed.named, chunk, oracle, observed)
                judged.add(oracle, observed, chunk.start if stage.by_rows else 0, axis, named)
        source, zero = chunk.values.get("source_f32"), chunk.values.get("zero_source_f32")
        if source is not None and zero is not None and source.shape == zero.shape:
            self.residual.add(source, zero)
        self.rank = chunk.shared.get("scaled_s", np.empty(self.rank)).size

    def _with_source(self, chunk: Chunk) -> Chunk:
        """The chunk with the source weight among its parameters: the model's, or known by its hash."""
        if self.checkpoint is not None:
            source = self._read_source(chunk.start, chunk.stop)
        elif self._source_is_known() and "source_f32" in chunk.values:
            source = chunk.values["source_f32"]
        else:
            return chunk
        return Chunk(chunk.start, chunk.stop, chunk.values, chunk.shared, {**chunk.params, "source": source})

    def culprit_data(self, row: Mapping[str, Any], why: str) -> dict[str, Any] | None:
        """A close look at one stage, against what is correctly rounded."""
        stage = REPLAY[row["stage"]]
        judged = self.judged.get(stage.name)
        if judged is None or not judged.difference.count:
            return None
        plan = chunk_plan(self.tensor.rows, default_chunk_rows(self.tensor.shape))
        chunks = (self._with_source(chunk) for chunk in self.tensor.chunks(plan))
        pieces = oracle_pieces(chunks, stage, self.options, int(self.tensor.turned(stage.name)))
        shape, labels = self.tensor.stage_shape(stage.name), (ORACLE, "recorded")
        return culprit_data(row, why, pieces, shape=shape, axes=stage.shape, labels=labels)

    def _source_is_known(self) -> bool:
        """Whether the recorded source is, by its sha256, the one that the components were made from."""
        c, place = self.tensor.components, self.tensor.stages.get("source_f32")
        known = c.entry.identity.get("source_f32") if c else None
        return known is not None and place is not None and place[0].sha256(place[1]) == known

    def rows(self) -> list[Row]:
        """One row per stage, in execution order."""
        name, rows = self.tensor.source_name, []
        for stage in REPLAY.values():
            row = alone_row(in_replay(name, self.key, stage.name, stage.required))
            if stage.name in self.judged:
                rows.append({**row, **self._judged_fields(stage)})
            elif stage.name in self.tensor.hashes and not self.tensor.stages:
                note = "the dump keeps hashes alone"
                rows.append({**row, "verdict": Verdict.UNJUDGED.value, "note": note})
            elif self.promises:
                rows.append({**row, "verdict": Verdict.MISSING.value})
        return rows

    def _judged_fields(self, stage: Stage) -> Row:
        judged, recorded = self.judged[stage.name].fields(), self.tensor.stages
        through = self.replayed.told(stage, recorded)
        words = self.replayed.words(stage, recorded)
        if words and through["floor"] > LEAST_SEEN:
            judged |= {"verdict": Verdict.UNJUDGED.value, "note": f"too long to tell: {words}"}
        elif words:
            judged |= {"note": "; ".join(filter(None, (words, judged["note"])))}
        return {**judged, **through}

    def decomposition(self) -> list[dict[str, Any]]:
        """The fault of the components, as far as they and the source are to be had; none when they are right."""
        zero, c, fault = self.zero_offset(), self.tensor.components, None
        source = self._source()
        if c is not None and source is not None:
            shown, parts = self.judged.get(SHOWN_BY), parts_of(c, *source)
            # Without the replay of zero offsets the components are asked themselves.
            fits = zero["fits"] if self.residual.known else self.tensor.layout in fitting_layouts(parts)
            # One that fails is not of these components, and says nothing of them.
            fits = False if shown is not None and shown.verdict.verdict.fails else fits
            fault = fault_of(parts, c.entry, self.tensor.layout, fits=fits)
        elif zero["fits"] is False:
            fault = not_known(self.tensor.source_name)
        ratio = zero["relative"] / zero["bound"] if zero["fits"] is False else None
        return [] if fault is None else [fault.row(None, ratio)]

    def _source(self) -> tuple[Callable[[int, int], np.ndarray], tuple[int, int]] | None:
        """Rows of the float32 weight and its shape: as recorded, or the model's; None when neither is there."""
        known = self.tensor.source()
        if known is None and self.checkpoint is not None and self.tensor.components is not None:
            known = self._read_source, self.tensor.components.entry.shape
        return known

    def _read_source(self, start: int, stop: int) -> np.ndarray:
        """Rows of the model's weight, float32."""
        assert self.checkpoint is not None
        return self.checkpoint.read(self.checkpoint.resolve(self.tensor.source_name), start, stop).astype(np.float32)

    def zero_offset(self) -> dict[str, Any]:
        """How well the zero-offset replay gives the source back: the test of a layout."""
        bound, known = self.residual.bound(self.rank), self.residual.known
        return {
            "tensor": self.tensor.source_name,
            "layout": self.tensor.layout,
            "max_abs": self.residual.max_abs,
            "relative": self.residual.relative,
            "bound": bound,
            "fits": self.residual.relative <= bound if known else None,
        }


# -- rows and the document ----------------------------------------------------------------------------------------


@dataclass
class _Judged:
    """A stage's verdict and its difference from the correctly rounded result, over all chunks."""

    stage: Stage
    top: int
    precision: str | None  # what the dump says it was computed in; more than native is held to its promise
    note: str | None = None
    verdict: SideVerdict = field(default_factory=SideVerdict)
    difference: Difference = field(init=False)
    spread: Spread = field(init=False)

    def __post_init__(self) -> None:
        self.difference, self.spread = Difference(self.top), Spread(self.stage.shape)

    def add(
        self,
        oracle: Oracle,
        observed: np.ndarray,
        start: int,
        axis: int,
        named: Callable[[], str | None] | None = None,
    ) -> None:
        """Judge one chunk, which begins at `start` along `axis`; where it fails, `named` or its error may say why."""
        judge_chunk(self.verdict, oracle, observed, self.precision, start=start, named=named)
        expected = oracle.rounded
        if expected.shape != observed.shape or expected.dtype != observed.dtype:
            self.note = (
                f"expected {expected.dtype.name} {list(expected.shape)} ({self.stage.shape}), it is "
                f"{observed.dtype.name} {list(observed.shape)}{_turned(expected, observed)}"
            )
            return
        shown = judged_part(self.stage, observed)
        self.difference.add(expected, shown, start, axis)
        if self.stage.noise is not Noise.EXACT and np.isfinite(shown).all():
            self.spread.add(shown, oracle.value, oracle.bound, start, axis)

    def fields(self) -> Row:
        if self.difference.count == 0 and self.verdict.verdict is not Verdict.SHAPE:
            return {"verdict": Verdict.UNJUDGED.value, "note": self.note}
        of_oracle = {"max_abs_a": "max_abs_expected", "max_abs_b": "max_abs_got"}
        return {
            "verdict": self.verdict.verdict.value,
            "ratio": self.verdict.ratio,
            "rms_ratio": self.verdict.rms_ratio,
            "hint": self.verdict.hint,
            "note": self.note,
            **self.verdict.recipe_fields(),
            **{of_oracle.get(name, name): value for name, value in self.difference.result().items()},
            **self.spread.result(),
        }


def _turned(expected: np.ndarray, observed: np.ndarray) -> str:
    if expected.shape != observed.shape and sorted(expected.shape) == sorted(observed.shape):
        return "; are two axes swapped?"
    return ""


def document(
    rows: Sequence[Row],
    source: str,
    facts: Mapping[str, str],
    *,
    kind: str,
    zero_offset: Sequence[Mapping[str, Any]] = (),
    decomposition: Sequence[Mapping[str, Any]] = (),
    explain: Callable[[Mapping[str, Any]], str | None] = lambda _row: None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The whole `svf.audit/1` document of finished rows; `notes` say how the run was judged."""
    unjudged, missing, given = (
        sum(row["verdict"] == verdict for row in rows) for verdict in (Verdict.UNJUDGED, Verdict.MISSING, Verdict.GIVEN)
    )
    expected = len(rows) - given
    coverage = {"judged": expected - unjudged - missing, "unjudged": unjudged, "expected": expected, "given": given}
    culprits = with_faults(decomposition, _culprits(rows, explain))
    miss = next((z for z in zero_offset if z["fits"] is False), None)
    explained = Explained.of(rows)
    outcome = "faulty" if culprits else "incomplete" if unjudged or not coverage["judged"] else "sound"
    return {
        "schema": "svf.audit/1",
        "outcome": outcome,
        "verdict": " ".join(
            (
                in_words(decomposition, "") or _sentence(rows, culprits, miss, coverage),
                *filter(None, (None if culprits else explained.words, accepted_words(rows), tie_words(rows))),
                *(f"{n[0].upper()}{n[1:]}." for n in notes),
            )
        ),
        "notes": list(notes),
        "culprit": culprits[0] if culprits else None,
        "culprits": culprits,
        "rows": list(rows),
        "zero_offset": list(zero_offset),
        "decomposition": list(decomposition),
        "coverage": coverage,
        "explained": explained.document(),
        "kind": kind,
        "source": source,
        "facts": dict(facts),
    }


def _culprits(rows: Sequence[Row], explain: Callable[[Mapping[str, Any]], str | None]) -> list[dict[str, Any]]:
    def describe(row: Row, first: bool) -> dict[str, Any]:
        fields = {name: row[name] for name in ("layer", "tensor", "stage", "verdict", "ratio")}
        why = diff.hint_of(row["verdict"], row["hint"], lambda: explain(row) if first else None)
        return {"side": None, **fields, "hint": why or row["note"]}

    return diff.culprits_of(rows, describe)


def _sentence(
    rows: Sequence[Mapping[str, Any]],
    culprits: Sequence[Mapping[str, Any]],
    miss: Mapping[str, Any] | None,
    coverage: Mapping[str, int],
) -> str:
    """The verdict as a sentence."""
    if miss is not None and not diff.failing(rows):
        return (
            f"Each stage is right from its inputs, but zero offsets do not give {miss['tensor']} back: relative "
            f"{miss['relative']:.2g}, bound {miss['bound']:.2g}; {culprits[0]['hint']}."
        )
    if culprits:
        culprit = culprits[0]
        ratio = times(culprit["ratio"], culprit["verdict"]) or "nothing to measure"
        hint = f": {culprit['hint']}" if culprit["hint"] else ""
        where = f"{culprit['stage']} of {diff.place_of(culprit)}"
        found = f"{culprit['verdict'].capitalize()} at {where}, {ratio}{hint}{diff.more_faults(culprits)}."
        return " ".join(filter(None, [found, how_far(rows, culprit)]))
    if not coverage["judged"]:
        return "Nothing could be judged" + (f": {rows[0]['note']}." if rows and rows[0]["note"] else ".")
    if coverage["unjudged"]:
        first = next(row for row in rows if row["verdict"] == Verdict.UNJUDGED)
        return (
            f"{coverage['judged']} of {coverage['expected']} stages are right from their own inputs; "
            f"{coverage['unjudged']} could not be judged, first {first['key']} ({first['note']})."
        )
    exact = sum(row["verdict"] == Verdict.EXACT for row in rows)
    passed = sum(row["verdict"] == Verdict.ACCEPTED for row in rows)
    inexact = coverage["judged"] - exact - passed
    right = f"{coverage['judged']} stages are right from their own inputs: {exact} exact, {inexact} within rounding"
    right += f", {passed} accepted" if passed else ""
    through = [row for row in rows if row.get("floor") is not None]
    if through:
        blind = max(row["floor"] for row in through)
        unseen = f"where errors below {blind:.2g} of a stage may not be seen"
        right += f"; {len(through)} of them through stages that were not recorded, {unseen}"
    given = [row for row in rows if row["verdict"] == Verdict.GIVEN]
    if given:
        right += f"; {len(given)} input{'s' * (len(given) > 1)} taken as given: {diff.listed(given)}"
    return f"{right}."
