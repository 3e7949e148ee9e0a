"""Comparing two forward dumps: every stage of every layer, judged from its own recorded inputs; needs no framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from stages import diff, stats
from stages.checkpoint import Checkpoint
from stages.compare import row_verdict, side_fields
from stages.culprit_data import ORACLE, Piece, against_oracle, chosen_row, culprit_data
from stages.errors import InputError, shown
from stages.forward import parameter_name
from stages.forward_dump import ForwardSide, Place, forward_key
from stages.forward_judge import ForwardRun, about, explain_place, judge_place, open_run, order_of, pieces_of, stage_of
from stages.metrics import Difference, same_bits
from stages.rerun import recorded_of, settle
from stages.verdict import Verdict, judged_part

Progress = Callable[[str, float], None]
# The chain along which two engines' activations drift apart fastest, in the order of computation.
AMPLIFICATION = ("ffn_gate", "ffn_silu", "ffn_swigl")


def diff_forward(
    path_a: Path,
    path_b: Path,
    *,
    model: str | None = None,
    top: int = 5,
    runs: tuple[Any, Any] = (None, None),
    rerun: bool = True,
    gates: diff.Gates | None = None,
    progress: Progress = lambda _label, _done: None,
) -> dict[str, Any]:
    """The `svf.diff/1` document of two forward dumps.

    `model` overrides where the weights are looked for (otherwise where each dump says). `InputError` when the two
    ran another model, other tokens or positions: a ratio of statistics over different samples means nothing.
    With `rerun`, suspect stages of our own dumps are run again on their backend.
    """
    with ExitStack() as stack:
        a, b = (open_run(path, model, stack) for path in (path_a, path_b))
        check_comparable(a, b)
        places = order_of(a.path or b.path, a.side.places.keys() | b.side.places.keys())
        rows: list[dict[str, Any]] = []
        logits: dict[str, Any] | None = None
        for number, place in enumerate(places):
            progress(f"comparing {forward_key(place)}", number / len(places))
            rows.append(_row(place, a, b, top))
            if place[1] == "lm_head" and rows[-1]["verdict"] not in (Verdict.MISSING, Verdict.EXTRA, Verdict.SHAPE):
                x, y = a.side.read(place), b.side.read(place)
                logits = stats.logits(
                    np.atleast_2d(x)[-len(np.atleast_2d(y)) :], np.atleast_2d(y)[-len(np.atleast_2d(x)) :]
                )
        for letter, run in (("a", a), ("b", b)) if rerun else ():
            settle(rows, recorded_of(run, model), letter)
        document = diff.finish(
            rows,
            diff.side(a.side.label, a.side.facts, runs[0]),
            diff.side(b.side.label, b.side.facts, runs[1]),
            expected=len(places),
            gates=gates,
            explain=lambda row, side: _explain(row, {"a": a, "b": b}[side]),
            extra={
                "kind": "forward",
                "about": about(a if a.config else b, model),
                "tokens": len(a.tokens) or len(b.tokens) or None,
                "flat": a.config is None or b.config is None,
                "logits": logits,
                "growth": growth(rows),
                "amplification": amplification(rows),
            },
        )
        return {**document, "culprit_data": _culprit_data(document, a, b)}


def check_comparable(a: ForwardRun, b: ForwardRun) -> None:
    """`InputError` unless both ran the same model on the same tokens, positions and dtype, as far as they tell."""
    if a.path is None or b.path is None:
        return
    assert isinstance(a.side, ForwardSide)
    assert isinstance(b.side, ForwardSide)
    pair = f"{a.side.label} and {b.side.label}"
    if a.tokens != b.tokens:
        raise InputError(
            f"not comparable: {pair} ran different tokens ({len(a.tokens)} and {len(b.tokens)} of them); "
            "statistics over different samples cannot be compared"
        )
    if a.positions != b.positions:
        raise InputError(f"not comparable: {pair} hold positions {a.positions} and {b.positions}")
    one, other = (side.dump.manifest["model"].get("fingerprint") for side in (a.side, b.side))
    if one != other:
        raise InputError(f"not comparable: {pair} ran different models (config or tensor headers differ)")
    if a.path["embedding"].dtype != b.path["embedding"].dtype:
        raise InputError(
            f"not comparable: {pair} computed in {a.path['embedding'].dtype} and {b.path['embedding'].dtype}"
        )
    other = _other_tensor(a.checkpoint, b.checkpoint)
    if other is not None:
        raise InputError(f"not comparable: {pair} ran different models: '{shown(other)}' has other values")


def _other_tensor(a: Checkpoint | None, b: Checkpoint | None) -> str | None:
    """The first tensor whose values differ in two checkpoints of one shape; None where one is not to be had.

    A fingerprint is the same for two fine-tunes: each stage would be right on its own weights, and all would agree.
    """
    if a is None or b is None or a.path.resolve() == b.path.resolve():
        return None
    return next((name for name in a.tensors if a.weights_sha256([name]) != b.weights_sha256([name])), None)


_UNSEEN = "only scores of keys after their query differ; the causal mask throws them away, they are not compared"


def _row(place: Place, a: ForwardRun, b: ForwardRun, top: int) -> dict[str, Any]:
    layer, name = place
    row: dict[str, Any] = {
        "key": forward_key(place),
        "layer": layer,
        "tensor": None,
        "stage": name,
        "required": True,
        "verdict": Verdict.EXACT.value,
        **side_fields(None, None),
        "tolerance_passed": False,
    }
    if place not in b.side.places or place not in a.side.places:
        verdict = Verdict.MISSING if place not in b.side.places else Verdict.EXTRA
        return {**row, "verdict": verdict.value}
    recorded_a, recorded_b = a.side.read(place), b.side.read(place)
    x, y = recorded_a, recorded_b
    if a.path is None or b.path is None:
        x, y = _flat(x, y), _flat(y, x)
    side_a, side_b = (judge_place(place, run, array) for run, array in ((a, recorded_a), (b, recorded_b)))
    alike = x.shape == y.shape and x.dtype == y.dtype
    for run, side in ((a, side_a), (b, side_b)):
        if (side is None and not alike) or (side is not None and side.verdict is Verdict.SHAPE):
            run.misshapen.add(place)
    if not alike:
        expected = a.path[name].shape if a.path else "as many elements"
        note = f'a has {x.dtype} {list(x.shape)}, b has {y.dtype} {list(y.shape)}; expected "{expected}"'
        if x.shape[:2] == y.shape[:2][::-1] and x.ndim == y.ndim:
            note += ". Is one dump head-first?"
        return {**row, "verdict": Verdict.SHAPE.value, **side_fields(side_a, side_b), "note": note}
    d = Difference(top)
    stage = stage_of(a.path, place) if a.path and b.path else None
    d.add(*((judged_part(stage, x), judged_part(stage, y)) if stage else (x, y)))
    given = name == "embedding" or (name == "inv_freq" and a.path is not None)
    other_weights = _other_weights(place, a, b)
    equal = same_bits(x, y)
    verdict = row_verdict(d, side_a, side_b, given=given and side_a is None and a.path is not None)
    return {
        **row,
        "verdict": verdict.value,
        **side_fields(side_a, side_b),
        "sha256_a": a.side.sha256(place),
        "sha256_b": b.side.sha256(place),
        "stats_a": stats.population(x),
        "stats_b": stats.population(y),
        **d.result(),
        "byte_match": equal,
        "note": _UNSEEN if d.byte_match and not equal and verdict.passes else None,
        **({"verdict": Verdict.BUG.value, "note": other_weights} if other_weights else {}),
    }


def _culprit_data(document: Mapping[str, Any], a: ForwardRun, b: ForwardRun) -> dict[str, Any] | None:
    """A close look at the culprit; None where a side lacks it, or holds it in another shape."""
    chosen = chosen_row(document)
    if chosen is None or chosen[0]["verdict"] in (Verdict.MISSING, Verdict.EXTRA):
        return None
    place, side = (chosen[0]["layer"], chosen[0]["stage"]), against_oracle(*chosen)
    x, y = a.side.read(place), b.side.read(place)
    axes = stage_of(a.path, place).shape if a.path and b.path else ""
    if side is not None:
        run, array = {"a": (a, x), "b": (b, y)}[side]
        pieces = pieces_of(place, run, array)
        return culprit_data(*chosen, pieces, shape=array.shape, axes=axes, labels=(ORACLE, side))
    if not axes:
        x, y = _flat(x, y), _flat(y, x)
    return culprit_data(*chosen, [Piece(x, y)], shape=x.shape, axes=axes)


def _explain(row: Mapping[str, Any], run: ForwardRun) -> str | None:
    """A hint at why one side's stage failed."""
    place = (row["layer"], row["stage"])
    return explain_place(place, run, run.side.read(place)) if place in run.side.places else None


def _other_weights(place: Place, a: ForwardRun, b: ForwardRun) -> str | None:
    """A note when the two sides' stage read differently adapted weights: each may be right, they are not one model."""
    if a.path is None or b.path is None or place[1] not in a.path:
        return None
    assert isinstance(a.side, ForwardSide)
    assert isinstance(b.side, ForwardSide)
    adapted_a, adapted_b = (side.dump.manifest.get("adapted_sha256") or {} for side in (a.side, b.side))
    stage = a.path[place[1]]
    names = [parameter_name(stage, param, place[0]) for param in stage.params]
    other = [name for name in names if adapted_a.get(name) != adapted_b.get(name)]
    layouts = [side.dump.manifest.get("layout") or "not adapted" for side in (a.side, b.side)]
    return f"the sides ran on different {', '.join(other)} ({layouts[0]}, {layouts[1]})" if other else None


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
