"""The diff command on the component replay: two recorded sides, read chunk by chunk; needs no framework."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stages import bundle as bundles
from stages import diff
from stages.aprt import AprtFile, compare_files, is_aprt, is_aprt_tree
from stages.calibration import lambdas_of
from stages.checkpoint import CONFIG, open_checkpoint
from stages.checkpoint_diff import diff_checkpoints
from stages.compare import TensorComparison, empty_row
from stages.culprit_data import ORACLE, Piece, against_oracle, chosen_row, culprit_data, oracle_pieces
from stages.dump import MANIFEST_FILE
from stages.errors import InputError, UsageError
from stages.forward_diff import diff_forward
from stages.forward_dump import is_forward_dump
from stages.noise import Lambdas
from stages.promise import require_precision
from stages.replay import REPLAY
from stages.replay_run import chunk_plan, default_chunk_rows
from stages.report_diff import diff_reports, is_report
from stages.rerun import Recorded, settle
from stages.sides import Side, SideTensor, check_comparable, open_side, pair_samples
from stages.stage import Stage
from stages.verdict import Verdict

Progress = Callable[[str, float], None]


def diff_recorded(
    path_a: Path,
    path_b: Path,
    *,
    components: Path | None = None,
    top: int = 5,
    gates: diff.Gates | None = None,
    runs: tuple[Any, Any] = (None, None),
    more_rows: Sequence[dict[str, Any]] = (),
    rerun: bool = True,
    progress: Progress = lambda _label, _done: None,
) -> dict[str, Any]:
    """The `svf.diff/1` document of two dumps, component bundles or stage files.

    `runs` are the documents of the runs that made them, `more_rows` what these know of tensors without a dump.
    With `rerun`, suspect stages of our own dumps are run again on their backend.
    `InputError` when the two replayed different weights.
    """
    with open_side(path_a, components) as a, open_side(path_b, components) as b:
        a, b = _same_kind(a, b, path_a, path_b, components)
        check_comparable(a, b)
        pair_samples(a, b)
        lambdas = lambdas_of(a.facts, a.label), lambdas_of(b.facts, b.label)
        comparisons: list[TensorComparison] = []
        hash_rows: list[dict[str, Any]] = [*more_rows, *_unknown_rows(a, b)]
        keys = [*a.tensors, *(key for key in b.tensors if key not in a.tensors)]
        for key in keys:
            one, other = a.tensors.get(key), b.tensors.get(key)
            if one and other and (_hashes_only(one) or _hashes_only(other)):
                hash_rows += _hash_rows(key, one, other)
            else:
                comparisons.append(_compare(key, one, other, top, lambdas, (a.precision, b.precision), progress))
        if gates is not None and gates.current_python and gates.current is None:
            gates = _gates_of_pair(gates, [row for c in comparisons for row in c.rows()] + hash_rows)
            step = diff.sum_alike(f"svf replay COMPONENTS --order {path_a}")
            gates = replace(gates, next_step=gates.next_step or step)
        document = diff.document(
            comparisons,
            diff.side(a.label, a.facts, runs[0]),
            diff.side(b.label, b.facts, runs[1]),
            gates=gates,
            expected_tensors=len(keys),
            more_rows=hash_rows,
            settle=lambda rows: _settle(rows, {"a": a, "b": b}, components) if rerun else None,
        )
        return {**document, "culprit_data": _culprit_data(document, a, b)}


def _settle(rows: Sequence[dict[str, Any]], sides: Mapping[str, Side], components: Path | None) -> None:
    for letter, side in sides.items():
        settle(rows, Recorded(Path(side.label), side.backend, side.facts, source=components), letter)


def diff_any(
    path_a: Path,
    path_b: Path,
    *,
    components: Path | None,
    model: str | None = None,
    precision: str | None = None,
    top: int,
    gates: diff.Gates,
    rerun: bool = True,
    progress: Progress,
) -> dict[str, Any]:
    """The document of two things of one kind: recorded replays, forward dumps, APRT, checkpoints or reports.

    `precision` is what both must have been computed in; None: whatever they tell.
    """
    require_precision(precision, path_a, path_b)
    kinds = {kind_of(path_a), kind_of(path_b)}
    if gates.std_ratio and kinds & {"report", "checkpoint"}:
        raise UsageError(f"--std-ratio is about the values of stages, and a {min(kinds)} has none; leave it out")
    if kinds == {"report"}:
        return diff_reports(path_a, path_b, gates, top=top)
    if kinds == {"checkpoint"}:
        with open_checkpoint(path_a) as a, open_checkpoint(path_b) as b:
            return diff_checkpoints(a, b, top=top, progress=progress)
    if kinds == {"aprt"}:
        return diff_aprt_files(path_a, path_b, top=top, gates=gates)
    if kinds <= {"forward", "aprt tree"}:
        only = diff.Gates(std_ratio=gates.std_ratio)
        return diff_forward(path_a, path_b, model=model, top=top, rerun=rerun, gates=only, progress=progress)
    if kinds == {"replay"}:
        return diff_recorded(
            path_a, path_b, components=components, top=top, gates=gates, rerun=rerun, progress=progress
        )
    one, other = kind_of(path_a), kind_of(path_b)
    raise UsageError(f"{path_a} is a {one} and {path_b} a {other}; compare two of one kind")


_MANIFESTS = (MANIFEST_FILE, bundles.MANIFEST_FILE)


def kind_of(path: Path) -> str:
    """What a path holds, by its files' names and first bytes: replay, forward, aprt, aprt tree, checkpoint, report."""
    if is_report(path):
        return "report"
    if path.is_dir():
        if is_forward_dump(path):
            return "forward"
        if (path / CONFIG).is_file():
            return "checkpoint"
        if is_aprt_tree(path):
            return "aprt tree"
        if not any((path / name).is_file() for name in _MANIFESTS) and any(path.glob("*.safetensors")):
            raise InputError(f"{path}: no {MANIFEST_FILE}: this dump was not written to its end; run it again")
        return "replay"
    return "aprt" if is_aprt(path) else "replay"


def diff_aprt_files(path_a: Path, path_b: Path, *, top: int, gates: diff.Gates | None = None) -> dict[str, Any]:
    """Two APRT files, flat: the format stores neither shape nor dtype."""
    row = compare_files(AprtFile(path_a), AprtFile(path_b), top=top)
    only = diff.Gates(std_ratio=gates.std_ratio if gates else None)
    return diff.finish([row], diff.side(str(path_a)), diff.side(str(path_b)), gates=only, expected=1)


def _same_kind(a: Side, b: Side, path_a: Path, path_b: Path, components: Path | None) -> tuple[Side, Side]:
    """A bundle's all-selected stages face another's; where one side is a sample alone, both show the sample."""
    if len(a.tensors) > 1 and len(b.tensors) == 1 and path_a.is_dir() and _turned(b):
        return a._stack.enter_context(open_side(path_a, components, sample=True)), b
    if len(b.tensors) > 1 and len(a.tensors) == 1 and path_b.is_dir() and _turned(a):
        return a, b._stack.enter_context(open_side(path_b, components, sample=True))
    return a, b


def _turned(side: Side) -> bool:
    return any(tensor.transpose for tensor in side.tensors.values())


def _compare(
    key: str,
    a: SideTensor | None,
    b: SideTensor | None,
    top: int,
    lambdas: tuple[Lambdas, Lambdas],
    precisions: tuple[str | None, str | None],
    progress: Progress,
) -> TensorComparison:
    known = a or b
    assert known is not None
    options = _options(a, b)
    comparison = TensorComparison(known.source_name, key, options, top=top, lambdas=lambdas, precisions=precisions)
    comparison.expect(set(a.stages) if a else set(), set(b.stages) if b else set())
    if a is None or b is None:
        return comparison
    if a.components and b.components and a.layout == b.layout and not a.components.same_as(b.components):
        comparison.diagnose_basis(a.components, b.components)
    rows = a.rows
    plan = chunk_plan(rows, default_chunk_rows(a.shape)) if rows == b.rows else [(0, rows)]
    for one, other in zip(a.chunks(plan), b.chunks(plan if rows == b.rows else [(0, b.rows)]), strict=True):
        comparison.add(one, other)
        progress(known.source_name, one.stop / rows)
    return comparison


def _options(a: SideTensor | None, b: SideTensor | None) -> dict[str, Any]:
    """What the oracle computes.

    Two sides that contracted V alike are judged by what they did; otherwise by what the components declare.
    """
    known = a or b
    assert known is not None
    same = a is None or b is None or a.layout == b.layout
    declared = known.components.entry.layout if known.components else known.layout
    return {"layout": known.layout if same else declared, "transpose": known.transpose}


def _culprit_data(document: Mapping[str, Any], a: Side, b: Side) -> dict[str, Any] | None:
    """A close look at the culprit; None where a side has no elements of it."""
    chosen = chosen_row(document)
    if chosen is None or chosen[0]["stage"] not in REPLAY:
        return None
    stage = REPLAY[chosen[0]["stage"]]
    key = chosen[0]["key"].removeprefix("tensor.").rpartition(".")[0]
    one, other = a.tensors.get(key), b.tensors.get(key)
    if one is None or other is None or stage.name not in one.stages or stage.name not in other.stages:
        return None
    shapes = [tensor.stage_shape(stage.name) for tensor in (one, other)]
    if shapes[0] != shapes[1] or len(shapes[0]) != len(stage.shape.split()):
        return None
    side = against_oracle(*chosen)
    if side is None:
        return culprit_data(*chosen, _pieces(one, other, stage), shape=shapes[0], axes=stage.shape)
    tensor = one if side == "a" else other
    chunks = tensor.chunks(chunk_plan(tensor.rows, default_chunk_rows(tensor.shape)))
    pieces = oracle_pieces(chunks, stage, _options(one, other), int(tensor.turned(stage.name)))
    return culprit_data(*chosen, pieces, shape=shapes[0], axes=stage.shape, labels=(ORACLE, side))


def _pieces(a: SideTensor, b: SideTensor, stage: Stage) -> Iterator[Piece]:
    """One stage of both sides, as many rows at a time as a comparison takes."""
    axis = int(a.turned(stage.name))
    rows = a.stage_shape(stage.name)[axis]
    for start, stop in chunk_plan(rows, default_chunk_rows(a.shape)) if stage.by_rows else [(0, rows)]:
        x, y = (file.read(key, start, stop, axis) for file, key in (a.stages[stage.name], b.stages[stage.name]))
        yield Piece(x, y, start, axis)


def _hashes_only(tensor: SideTensor) -> bool:
    return not tensor.stages and bool(tensor.hashes)


def _hash_rows(key: str, a: SideTensor, b: SideTensor) -> list[dict[str, Any]]:
    """Rows of a dump that kept hashes alone: equal bytes are known to be equal, nothing more can be said."""
    rows = []
    for stage in REPLAY.values():
        one, other = a.sha256(stage.name), b.sha256(stage.name)
        if one is None and other is None:
            continue
        equal = one == other
        verdict = Verdict.EXACT if equal else Verdict.UNJUDGED
        verdict = Verdict.EXTRA if one is None else Verdict.MISSING if other is None else verdict
        row = empty_row(a.source_name, key, stage, verdict)
        row.update(byte_match=equal, sha256_a=one, sha256_b=other, tolerance_passed=equal)
        rows.append(row)
    return rows


def _unknown_rows(a: Side, b: Side) -> list[dict[str, Any]]:
    """Rows of stages that no replay has and one side alone holds: an unknown stage is not passed over."""
    rows = []
    for keys, verdict in ((a.unknown - b.unknown, Verdict.MISSING), (b.unknown - a.unknown, Verdict.EXTRA)):
        for key in sorted(keys):
            stage = Stage(key.rpartition(".")[2], required=False)
            rows.append({**empty_row(key, key, stage, verdict), "key": key, "note": "no stage of the replay"})
    return rows


def _gates_of_pair(gates: diff.Gates, rows: list[dict[str, Any]]) -> diff.Gates:
    """Without a report the reference side is a: every tensor's final bf16 hash must be a's."""
    finals = [(row.get("sha256_a"), row.get("sha256_b")) for row in rows if row["stage"] == "final_bf16"]
    equal = bool(finals) and all(one is not None and one == other for one, other in finals)
    one = finals[0][0] if finals else None
    return diff.Gates(**{**vars(gates), "current": one, "replayed_hashes": (one,) if equal and one else ()})
