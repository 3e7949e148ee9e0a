"""Comparing two forward dumps: every stage of every layer, judged from its own recorded inputs; needs no framework."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from stages.files.forward_dump import Place, forward_key
from stages.judge import document as diff
from stages.judge import stats
from stages.judge.adapted import STAGE as ADAPTED
from stages.judge.adapted import AdaptedPair, adaptation
from stages.judge.both import Judging, each, judging, share_weights
from stages.judge.culprit import ORACLE, Piece, against_oracle, chosen_row, culprit_data
from stages.judge.forward import (
    explain_place,
    explain_suspects,
    judge_place,
    oracles_of,
    pieces_of,
    through_words,
    why_unjudged,
)
from stages.judge.forward_pair import Named, check_comparable, open_pair
from stages.judge.inferred import infer_activations
from stages.judge.metrics import Difference, same_bits
from stages.judge.misrecorded import in_words, misrecorded, without
from stages.judge.recorded_run import ForwardRun, about, order_of, promised
from stages.judge.replay import holds_nan, row_verdict, same_bytes
from stages.judge.rerun import recorded_of, resolve_suspects
from stages.judge.rows import in_forward, pair_row
from stages.judge.wanted import Wanted
from stages.oracle.verdict import Verdict, judged_part
from stages.progress import Report
from stages.recipes.side import SideVerdict
from stages.run.forward import part
from stages.spec.dtypes import stored_dtype
from stages.spec.experts import CHOSEN
from stages.spec.forward import ALIASES
from stages.spec.stage import Stage

# Why nothing was judged where metrics alone were asked for.
NOT_ASKED = "verdicts were not asked for (--no-verdicts)"
# The chain along which two engines' activations drift apart fastest, in the order of computation.
AMPLIFICATION = ("ffn_gate", "ffn_silu", "ffn_swigl")


def diff_forward(
    path_a: Path,
    path_b: Path,
    *,
    model: str | None = None,
    named: Named | None = None,
    wanted: Wanted | None = None,
    components: Path | None = None,
    top: int = 5,
    runs: tuple[Any, Any] = (None, None),
    rerun: bool = True,
    gates: diff.Gates | None = None,
    verdicts: bool = True,
    progress: Report = lambda _label, _done: None,
) -> dict[str, Any]:
    """The `svf.diff/1` document of two recorded forwards: dumps, another program's, APRT trees.

    `named` says what another program's does not tell; `model` alone is short for it. That and `components` override
    where the weights, and what they were adapted with, are looked for (otherwise where each dump says). `wanted` are
    the rows asked for. `InputError` when the two ran another model, other tokens or positions: a ratio of statistics
    over different samples means nothing. With `rerun`, suspect stages of our own dumps are run again on their backend.
    Without `verdicts` stages are compared alone: the metrics, and nothing of which side is wrong.
    """
    named, wanted = named or Named(model), wanted or Wanted()
    with ExitStack() as stack:
        a, b = open_pair(path_a, path_b, named, stack)
        check_comparable(a, b)
        places = _chosen(a, b, wanted)
        lacks = {
            "a": [forward_key(p) for p in places if _lacks(a, p)],
            "b": [forward_key(p) for p in places if _lacks(b, p)],
        }
        share_weights(a, b)
        judge = stack.enter_context(judging(a, b)) if verdicts else None
        adapted = AdaptedPair(adaptation("a", a), adaptation("b", b), components, stack, top)
        rows: list[dict[str, Any]] = []
        logits: dict[str, Any] | None = None
        compared = [place for place in places if forward_key(place) not in (*lacks["a"], *lacks["b"])]
        row_of = functools.partial(_row, a=a, b=b, top=top, judge=judge)
        for number, (place, row) in enumerate(zip(compared, each(row_of, compared, verdicts), strict=True)):
            progress(f"comparing {forward_key(place)}", number / len(compared))
            rows.append(row)
            if place[1] == "lm_head" and row["verdict"] not in (Verdict.MISSING, Verdict.EXTRA, Verdict.SHAPE):
                x, y = (np.atleast_2d(run.read(place)) for run in (a, b))
                logits = stats.logits(x[-len(y) :], y[-len(x) :])
        if compared and verdicts:
            rows += [row for row in (_alone(place, a, b) for place in places if place not in compared) if row]
            judged = {row["key"] for row in rows}
            lacks = {letter: [key for key in keys if key not in judged] for letter, keys in lacks.items()}
            rows.sort(key=lambda row: places.index((row["layer"], row["stage"])))
        if judge is not None:
            _blame_recordings(rows, a, b, top, judge)
            for letter, run in (("a", a), ("b", b)):
                infer_activations(rows, run, f"_{letter}")
                explain_suspects(rows, run, f"_{letter}")
            for letter, run in (("a", a), ("b", b)) if rerun else ():
                resolve_suspects(rows, recorded_of(run, named.model), letter)
        progress("comparing adapted weights", 1.0)
        weights = adapted.rows() if adapted.comparable and verdicts else ()
        rows = [*(row for row in weights if wanted.has(row["layer"], row["stage"], ALIASES)), *rows]
        document = diff.finish(
            rows,
            diff.side(a.side.label, a.side.facts, runs[0]),
            diff.side(b.side.label, b.side.facts, runs[1]),
            expected=len(rows),
            lacks=lacks,
            gates=gates,
            explain=lambda row, side: _explain(row, {"a": a, "b": b}[side]),
            words=" ".join(filter(None, (of_dtypes(rows, a, b), of_positions(rows)))) or None,
            extra={
                "kind": "forward",
                "about": _about(a, b, named.model),
                "tokens": len(a.tokens) or len(b.tokens) or None,
                "flat": a.config is None or b.config is None,
                "logits": logits,
                "growth": growth(rows),
                "amplification": amplification(rows),
            },
        )
        return {**document, "culprit_data": _culprit_data(document, a, b, adapted)}


def _blame_recordings(rows: list[dict[str, Any]], a: ForwardRun, b: ForwardRun, top: int, judge: Judging) -> None:
    """Say which stages were recorded wrongly, and judge the others again as if these had not been recorded."""
    runs = {"a": a, "b": b}
    found = {
        letter: misrecorded(run, ((_at(run, (row["layer"], row["stage"])), row[f"verdict_{letter}"]) for row in rows))
        for letter, run in runs.items()
    }
    if not any(found.values()):
        return
    right_a, right_b = (without(run, found[letter]) for letter, run in runs.items())
    for number, row in enumerate(rows):
        place = (row["layer"], row["stage"])
        said = {letter: found[letter].get(at) for letter, run in runs.items() if (at := _at(run, place)) is not None}
        if any(said.values()):
            row |= {"verdict": Verdict.MISRECORDED.value}
            for letter, words in said.items():
                if words is not None:
                    row |= {f"verdict_{letter}": row["verdict"], f"hint_{letter}": in_words(row["key"], words)}
        elif row["verdict_a"] is not None and row["verdict_b"] is not None:
            rows[number] = _row(place, right_a, right_b, top, judge)


def _about(a: ForwardRun, b: ForwardRun, model: str | None) -> dict[str, Any]:
    """What was run: as the first side that tells of its model has it, and the components that either ran on."""
    one, other = about(a if a.config else b, model), about(b)
    return {**one, "components": one["components"] or other["components"]}


def _chosen(a: ForwardRun, b: ForwardRun, wanted: Wanted) -> list[Place]:
    """The places to compare, in execution order: those of either side that are asked for, one that goes by two names
    once."""
    have = a.side.places.keys() | b.side.places.keys()
    twice = [place for place in have if place[1] in ALIASES and (place[0], ALIASES[place[1]]) in have]
    for place in twice:  # a side that has both names has two rows, and both are compared
        if not any(place in r.side.places and (place[0], ALIASES[place[1]]) in r.side.places for r in (a, b)):
            have = have - {place}
    path = a.path or b.path
    order = order_of(path, have)
    known = tuple(path) if path else tuple(dict.fromkeys(name for _, name in order))
    wanted.check((*known, ADAPTED), ALIASES, [layer for layer, _ in order if layer is not None])
    return [place for place in order if wanted.has(*place, ALIASES)]


def _at(run: ForwardRun, place: Place) -> Place | None:
    """Where a side has a stage: under this name, or its other one; None when it has not."""
    layer, name = place
    names = (name, *(other for pair in ALIASES.items() if name in pair for other in pair))
    return next(((layer, n) for n in names if (layer, n) in run.side.places), None)


def _lacks(run: ForwardRun, place: Place) -> bool:
    """Whether a side was not to record a stage; one that its manifest promises is missing, which is worse."""
    return _at(run, place) is None and place not in promised(run)


_UNSEEN = (
    "only scores of keys that their query does not see differ; the causal mask removes them, so they are not compared"
)


def _row(place: Place, a: ForwardRun, b: ForwardRun, top: int, judge: Judging | None) -> dict[str, Any]:
    name = place[1]
    row = functools.partial(pair_row, in_forward(place))
    at_a, at_b = _at(a, place), _at(b, place)
    if at_a is None or at_b is None:
        return row(Verdict.MISSING if at_b is None else Verdict.EXTRA)
    recorded_a, recorded_b = a.side.read(at_a), b.side.read(at_b)
    side_a, side_b = judge([(at_a, a, recorded_a), (at_b, b, recorded_b)]) if judge else (None, None)
    values = a.values_of(at_a, recorded_a), b.values_of(at_b, recorded_b)
    x, y = _aligned(*values, flat=a.path is None or b.path is None, logits=name == "lm_head")
    alike = x.shape == y.shape and (x.dtype == y.dtype or judge is None or _typed(side_a, side_b))
    for run, side, at in ((a, side_a, at_a), (b, side_b, at_b)):
        if (side is None and not alike) or (side is not None and side.verdict is Verdict.SHAPE):
            run.misshapen.add(at)
    if not alike:
        expected = a.path.at(place).shape if a.path and name in a.path else "as many elements"
        note = f'a has {x.dtype} {list(x.shape)}, b has {y.dtype} {list(y.shape)}; expected "{expected}"'
        if same_bytes(x, y):
            note += "; both hold the same bytes, in the same order: only the label of the shape differs"
        elif x.shape[:2] == y.shape[:2][::-1] and x.ndim == y.ndim:
            note += ". Is one dump head-first?"
        return {**row(Verdict.SHAPE, side_a, side_b), "note": note}
    d = Difference(top)
    stage = a.path.at(place) if a.path and b.path else None
    if stage is not None and "topk" in stage.shape.split():
        y = _by_expert(y, place, a, b)
    wide = np.promote_types(x.dtype, y.dtype)
    one, other = (array.astype(wide, copy=False) for array in (x, y))
    compared = (judged_part(stage, one), judged_part(stage, other)) if stage else (one, other)
    d.add(*compared)
    all_compared = compared[0] is x and compared[1] is y  # as recorded, and nothing masked
    given = name == "inv_freq" or (name == "embedding" and not (a.adapted or b.adapted))
    given = given and judge is not None and side_a is None and a.path is not None and x.dtype == y.dtype
    equal = d.byte_match if all_compared else same_bits(x, y)
    verdict = row_verdict(d, side_a, side_b, given=given)
    unseen = _UNSEEN if d.byte_match and not equal and x.dtype == y.dtype and verdict.passes else None
    beyond = [n for n in (_beyond(at_a, a, side_a), _beyond(at_b, b, side_b)) if n is not None]
    judged = [(run, at) for run, at, side in ((a, at_a, side_a), (b, at_b, side_b)) if side is not None]
    how = [note for run, at in judged for note in (run.read_as.get(at), through_words(at, run))]
    notes = (unseen, holds_nan(d, verdict), *how)
    return {
        **row(verdict, side_a, side_b),
        "sha256_a": a.side.sha256(at_a),
        "sha256_b": b.side.sha256(at_b),
        "stats_a": stats.population(x, d.moments_a if all_compared and d.finite else None),
        "stats_b": stats.population(y, d.moments_b if all_compared and d.finite else None),
        **d.result(),
        "byte_match": equal,
        "first_difference": None if x.ndim == 1 else _first(stage, len(a.tokens), one != other),
        "first_position": min(beyond, default=None),
        "note": "; ".join(dict.fromkeys(note for note in notes if note)) or None,
        "unjudged_a": None if side_a else why_unjudged(at_a, a) if judge else NOT_ASKED,
        "unjudged_b": None if side_b else why_unjudged(at_b, b) if judge else NOT_ASKED,
        **({"dtypes": split(x, y)} if x.dtype != y.dtype else {}),
    }


def _alone(place: Place, a: ForwardRun, b: ForwardRun) -> dict[str, Any] | None:
    """The row of a stage that one side alone recorded, judged by itself; None where it cannot be."""
    (run, at), *_ = [(run, at) for run in (a, b) for at in [_at(run, place)] if at is not None]
    observed = run.read(at)
    side = judge_place(at, run, observed)
    if side is None:
        return None
    said = (f"{'a' if run is a else 'b'} alone recorded it", run.read_as.get(at), through_words(at, run))
    row = pair_row(in_forward(place), side.verdict, *((side, None) if run is a else (None, side)))
    return {**row, "byte_match": None, "note": "; ".join(filter(None, said))}


def _first(stage: Stage | None, tokens: int, wrong: np.ndarray) -> int | None:
    """The first position of the sequence that has a wrong element; None where none has, or the stage has no positions.

    Where fewer rows than tokens were recorded, they are the last ones.
    """
    names = stage.shape.split() if stage is not None else []
    axis = next((i for i, name in enumerate(names) if name in ("tokens", "queries")), None)
    if axis is None or wrong.ndim != len(names) or not wrong.any():
        return None
    rows = np.moveaxis(wrong, axis, 0).reshape(wrong.shape[axis], -1)
    return int(np.argmax(rows.any(axis=1))) + tokens - len(rows)


def _beyond(at: Place, run: ForwardRun, side: SideVerdict | None) -> int | None:
    """The first position at which a side that failed is beyond its bound."""
    if side is None or not side.verdict.fails or side.verdict is Verdict.SHAPE:
        return None
    observed = run.read(at)
    found = []
    with np.errstate(all="ignore"):
        for columns, oracle in oracles_of(at, run, observed):
            off = np.abs(judged_part(oracle.stage, part(observed, columns)).astype(np.float64) - oracle.value)
            found.append(_first(oracle.stage, len(run.tokens), ~(off <= oracle.bound)))
    return min((first for first in found if first is not None), default=None)


def of_positions(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """A sentence on the first position at which a side is wrong, where that is not the first of the sequence."""
    wrong = [row for row in rows if row.get("first_position") is not None and Verdict(row["verdict"]).fails]
    first = min(wrong, key=lambda row: row["first_position"], default=None)
    if first is None or first["first_position"] == 0:
        return None
    return f"The first position that differs by more than rounding is {first['first_position']}, in {first['key']}."


def _typed(*sides: SideVerdict | None) -> bool:
    """Whether every side was judged as it is stored: then two dtypes are two ways to run, and each is right or not."""
    return all(side is not None and side.verdict is not Verdict.SHAPE for side in sides)


def _aligned(x: np.ndarray, y: np.ndarray, *, flat: bool, logits: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The same part of both sides: flat where one is; of all tokens' logits the last ones' where one has them alone."""
    if flat:
        return _flat(x, y), _flat(y, x)
    if x.ndim == y.ndim == 2 and x.shape[1:] == y.shape[1:] and (logits or 1 in (len(x), len(y))):
        return x[-len(y) :], y[-len(x) :]
    return x, y


def _by_expert(y: np.ndarray, place: Place, a: ForwardRun, b: ForwardRun) -> np.ndarray:
    """b's places of each token in the order in which a has the same experts; those that a has not come as they are."""
    at_a, at_b = (_at(run, (place[0], CHOSEN)) for run in (a, b))
    if at_a is None or at_b is None:
        return y
    wanted, there = a.read(at_a), b.read(at_b)
    if wanted.shape != there.shape or wanted.shape != y.shape[:2]:
        return y
    same = wanted[:, :, None] == there[:, None, :]
    order = np.where(same.any(axis=-1), same.argmax(axis=-1), -1)
    for row, token in zip(order, same, strict=True):
        left = [n for n in range(len(row)) if not token[:, n].any()]
        row[row < 0] = left[: int((row < 0).sum())]
    return np.take_along_axis(y, order.reshape(*order.shape, *[1] * (y.ndim - 2)), axis=1)


def split(x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """What of the difference of two dtypes is the rounding to the narrower one here, and what is not.

    `rounding_rms`: of the wider side's values, from themselves stored in the narrower dtype; `rest_rms`: from these to
    the narrower side's, which is what that side computed and inherited.
    """
    narrow, wide = (x, y) if x.dtype.itemsize < y.dtype.itemsize else (y, x)
    with np.errstate(all="ignore"):
        stored = wide.astype(narrow.dtype).astype(np.float64)
        rounding, rest = stored - wide.astype(np.float64), narrow.astype(np.float64) - stored
    return {
        "a": x.dtype.name,
        "b": y.dtype.name,
        "rounding_rms": float(np.sqrt(np.mean(rounding * rounding))) if rounding.size else 0.0,
        "rest_rms": float(np.sqrt(np.mean(rest * rest))) if rest.size else 0.0,
    }


def of_dtypes(rows: Sequence[Mapping[str, Any]], a: ForwardRun, b: ForwardRun) -> str | None:
    """A sentence on two runs in two dtypes: how much of the last stage's difference storing it explains."""
    if a.path is None or b.path is None or a.path.activations == b.path.activations:
        return None
    last = next((row for row in reversed(rows) if "dtypes" in row and row["rms"]), None)
    said = f"a was computed in {a.path.activations}, b in {b.path.activations}; each is judged by its own"
    if last is None:
        return f"{said}."
    of = last["dtypes"]
    narrow = min((of["a"], of["b"]), key=lambda name: stored_dtype(name).itemsize)
    return (
        f"{said}. The RMS difference of {last['key']} is {last['rms']:.3g}; storing it in {narrow} explains "
        f"{of['rounding_rms']:.3g}; the rest, {of['rest_rms']:.3g}, was inherited or computed in fewer bits."
    )


def _culprit_data(
    document: Mapping[str, Any], a: ForwardRun, b: ForwardRun, adapted: AdaptedPair
) -> dict[str, Any] | None:
    """A close look at the culprit; None where a side lacks it, or holds it in another shape."""
    chosen = chosen_row(document)
    if chosen is None or chosen[0]["verdict"] in (Verdict.MISSING, Verdict.EXTRA):
        return None
    if chosen[0]["tensor"] is not None:
        name = chosen[0]["tensor"]
        return culprit_data(*chosen, adapted.pieces(name), shape=adapted.shape(name) or (0, 0), axes="rows cols")
    place, side = (chosen[0]["layer"], chosen[0]["stage"]), against_oracle(*chosen)
    there = {letter: (run, at) for letter, run in (("a", a), ("b", b)) for at in [_at(run, place)] if at is not None}
    axes = a.path.at(place).shape if a.path and b.path else ""
    if side is not None or len(there) == 1:
        letter = side or next(iter(there))
        run, at = there[letter]
        array = run.read(at)
        pieces = pieces_of(at, run, array)
        return culprit_data(*chosen, pieces, shape=array.shape, axes=axes, labels=(ORACLE, letter))
    x, y = _aligned(*(run.read(at) for run, at in there.values()), flat=not axes)
    return culprit_data(*chosen, [Piece(x, y)], shape=x.shape, axes=axes)


def _explain(row: Mapping[str, Any], run: ForwardRun) -> str | None:
    """A hint at why one side's stage failed."""
    place = None if row["tensor"] is not None else _at(run, (row["layer"], row["stage"]))
    return None if place is None else explain_place(place, run, run.read(place))


def _flat(x: np.ndarray, other: np.ndarray) -> np.ndarray:
    """`x` as APRT holds it: flat float32; of all tokens' logits, the last one's, if that is what the other side has."""
    if x.ndim == 2 and x.shape[0] > 1 and other.size == x.shape[1]:
        x = x[-1]
    return np.ascontiguousarray(x, np.float32).reshape(-1)


def growth(rows: Sequence[Mapping[str, Any]], stage: str = "post_ffn_residual") -> list[dict[str, Any]]:
    """How the difference of the layers' outputs grows with depth: propagated, so inherited error is in it."""
    fields = ("layer", "rel_l2", "max_abs", "cosine", "std_ratio")
    return [{f: row[f] for f in fields} for row in rows if row["stage"] == stage and row.get("rel_l2") is not None]


def amplification(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per layer, the ratio of standard deviations (b over a) and the relative difference along the FFN's chain."""
    by_place = {(row["layer"], row["stage"]): row for row in rows if row.get("rel_l2") is not None}
    layers = sorted({layer for layer, stage in by_place if layer is not None and stage in AMPLIFICATION})
    result = []
    for layer in layers:
        chain = [by_place.get((layer, stage)) for stage in AMPLIFICATION]
        steps = [row for row in chain if row is not None]
        if len(steps) == len(AMPLIFICATION):
            result.append(
                {
                    "layer": layer,
                    "std_ratio": {row["stage"]: row["std_ratio"] for row in steps},
                    "rel_l2": {row["stage"]: row["rel_l2"] for row in steps},
                }
            )
    return result
