"""The diff command on the component replay: two recorded sides, read chunk by chunk; needs no framework."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stages.errors import InputError, UsageError
from stages.files.aprt import AprtFile, tree_of
from stages.files.dump import MANIFEST_FILE
from stages.files.forward_dump import parse_key
from stages.files.kinds import Recording, dumps_in, recording_at
from stages.files.replay_recorded import Side, SideTensor, check_comparable, open_side, pair_samples
from stages.files.selection import layer_of
from stages.files.source import open_model
from stages.files.tensorfile import TensorFile
from stages.judge import document as diff
from stages.judge.aprt import compare_files
from stages.judge.checkpoints import diff_checkpoints
from stages.judge.culprit import ORACLE, Piece, against_oracle, chosen_row, culprit_data, oracle_pieces
from stages.judge.decomposition import parts_of
from stages.judge.forward_diff import diff_forward
from stages.judge.forward_pair import Named
from stages.judge.guarantees import require_precision
from stages.judge.next_steps import sum_alike
from stages.judge.replay import TensorComparison
from stages.judge.report_diff import diff_reports
from stages.judge.rerun import Recorded, resolve_suspects
from stages.judge.rows import in_replay, pair_row
from stages.judge.wanted import Wanted
from stages.oracle.bounds import Lambdas
from stages.oracle.verdict import Verdict
from stages.progress import Report
from stages.run.calibration import lambdas_of
from stages.run.replay import chunk_plan, default_chunk_rows
from stages.spec.forward import ANY_MODEL
from stages.spec.replay import REPLAY
from stages.spec.stage import Stage


def diff_recorded(
    path_a: Path,
    path_b: Path,
    *,
    components: Path | None = None,
    wanted: Wanted | None = None,
    top: int = 5,
    gates: diff.Gates | None = None,
    runs: tuple[Any, Any] = (None, None),
    more_rows: Sequence[dict[str, Any]] = (),
    rerun: bool = True,
    progress: Report = lambda _label, _done: None,
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
        wanted = wanted or Wanted()
        known = [layer_of(t.source_name) for side in (a, b) for t in side.tensors.values()]
        wanted.check(REPLAY, {}, [layer for layer in known if layer is not None])
        keys = [k for k in dict.fromkeys([*a.tensors, *b.tensors]) if _is_wanted(k, a, b, wanted)]
        lacks: dict[str, list[str]] = {"a": [], "b": []}
        for key in keys:
            one, other = a.tensors.get(key), b.tensors.get(key)
            if one is None or other is None:
                lacks["a" if one is None else "b"].append(f"tensor.{key}")
            elif _hashes_only(one) or _hashes_only(other):
                hash_rows += _hash_rows(key, one, other)
            else:
                if one.transpose != other.transpose:
                    a.tensors[key], b.tensors[key] = one, other = one.turned_back(), other.turned_back()
                comparison = _compare(key, one, other, top, lambdas, (a, b), progress)
                comparisons.append(comparison)
        if gates is not None and gates.current_python and gates.current is None:
            gates = _gates_of_pair(gates, [row for c in comparisons for row in c.rows()] + hash_rows)
            step = sum_alike(f"svf replay COMPONENTS --order {path_a}")
            gates = replace(gates, next_step=gates.next_step or step)
        document = diff.document(
            comparisons,
            diff.side(a.label, a.facts, runs[0]),
            diff.side(b.label, b.facts, runs[1]),
            gates=gates,
            expected_tensors=len(keys) if a.promises or b.promises else 0,
            more_rows=hash_rows,
            lacks=lacks,
            wanted=wanted,
            resolve_suspects=lambda rows: _resolve_suspects(rows, {"a": a, "b": b}, components) if rerun else None,
        )
        return {**document, "culprit_data": _culprit_data(document, a, b)}


def _resolve_suspects(rows: Sequence[dict[str, Any]], sides: Mapping[str, Side], components: Path | None) -> None:
    for letter, side in sides.items():
        resolve_suspects(rows, Recorded(Path(side.label), side.backend, side.facts, source=components), letter)


@dataclass(frozen=True)
class DiffCommand:
    """The parsed command; fields as in `svf diff --help`. `b` None: `a` is a folder of two dumps."""

    a: Path
    b: Path | None
    components: Path | None = None
    named: Named = field(default_factory=Named)
    layers: str | None = None
    stages: str | None = None
    precision: str | None = None
    top: int | None = None
    gates: diff.Gates = field(default_factory=diff.Gates)
    explain_order: bool = False
    rerun: bool = True
    verdicts: bool = True
    html: bool = False

    @property
    def given(self) -> dict[str, bool]:
        """Option -> whether it was given, for those that some kinds of sides know nothing of."""
        gates = self.gates
        return {
            "--components": self.components is not None,
            "--model": self.named.model is not None,
            "--tokens": self.named.tokens is not None,
            "--tokens-file": self.named.tokens_file is not None,
            "--prompt": self.named.prompt is not None,
            "--layers": self.layers is not None,
            "--stages": self.stages is not None,
            "--precision": self.precision is not None,
            "--explain-order": self.explain_order,
            "--strict-stage-tolerances": gates.stage_tolerances,
            "--strict-current-python": gates.current_python,
            "--strict-reference": gates.reference,
            "--std-ratio": gates.std_ratio is not None,
            "--accept": gates.accept is not None,
            "--no-rerun": not self.rerun,
            "--no-verdicts": not self.verdicts,
            "--html": self.html,
        }


_STRICT = ("--strict-stage-tolerances", "--strict-current-python", "--strict-reference")
_TOKENS = ("--model", "--tokens", "--tokens-file", "--prompt")
_ROWS = ("--components", "--layers", "--stages", "--precision", "--std-ratio", "--accept", "--no-rerun", "--html")
# Kinds that go together, how one of them is called, and the options that say something to them.
_GROUPS: tuple[tuple[frozenset[Recording], tuple[str, ...]], ...] = (
    (frozenset({Recording.REPLAY}), (*_ROWS, *_STRICT, "--explain-order")),
    (frozenset({Recording.FORWARD}), (*_ROWS, *_TOKENS, "--no-verdicts", "--explain-order")),
    (frozenset({Recording.FORWARD, Recording.FOREIGN, Recording.APRT_TREE}), (*_ROWS, *_TOKENS, "--no-verdicts")),
    (frozenset({Recording.APRT}), ("--std-ratio", "--html", *_TOKENS)),
    (frozenset({Recording.CHECKPOINT}), ()),
    (frozenset({Recording.REPORT}), (*_STRICT, "--html")),
)


def diff_any(command: DiffCommand, progress: Report) -> dict[str, Any]:
    """The document of two things of one kind: recorded replays, forwards, APRT, checkpoints or reports.

    `UsageError` for two of different kinds, and for an option that has no meaning for theirs.
    """
    command = with_sides(command)
    assert command.b is not None
    a, b, top = command.a, command.b, 5 if command.top is None else command.top
    kinds = check_options(command)
    require_precision(command.precision, a, b)
    wanted = Wanted.of(command.layers, command.stages)
    if kinds == {Recording.REPORT}:
        return diff_reports(a, b, command.gates, top=top)
    if kinds == {Recording.CHECKPOINT}:
        with open_model(a) as one, open_model(b) as other:
            return diff_checkpoints(one, other, top=top, progress=progress)
    if kinds == {Recording.APRT}:
        return diff_aprt_files(a, b, command.named, top=top, gates=command.gates, progress=progress)
    if kinds == {Recording.REPLAY}:
        return diff_recorded(
            a,
            b,
            components=command.components,
            wanted=wanted,
            top=top,
            gates=command.gates,
            rerun=command.rerun,
            progress=progress,
        )
    return diff_forward(
        a,
        b,
        named=command.named,
        wanted=wanted,
        components=command.components,
        top=top,
        rerun=command.rerun,
        verdicts=command.verdicts,
        gates=command.gates,
        progress=progress,
    )


def with_sides(command: DiffCommand) -> DiffCommand:
    """The command with both sides: a folder alone stands for the two dumps in it."""
    if command.b is not None:
        return command
    found = dumps_in(command.a)
    if len(found) != 2:
        there = f"; it has {', '.join(f.name for f in found)}" if found else ""
        raise UsageError(f"{command.a}: name two sides, or a folder that holds two dumps{there}")
    return replace(command, a=found[0], b=found[1])


def check_options(command: DiffCommand) -> set[Recording]:
    """The kinds of both sides; `UsageError` when they do not go together, or an option has no meaning for them."""
    assert command.b is not None
    one, other = kind_of(command.a), kind_of(command.b)
    known = next((options for kinds, options in _GROUPS if {one, other} <= kinds), None)
    if known is None:
        for path, kind in ((command.a, one), (command.b, other)):
            if kind is Recording.REPLAY and path.is_file():
                open_side(path).close()  # what can be read as nothing is damaged, not of another kind
        raise UsageError(f"{command.a} is {one} and {command.b} is {other}; compare two of the same kind")
    idle = [option for option, given in command.given.items() if given and option not in known]
    if idle:
        raise UsageError(f"{idle[0]} has no meaning for {one}, which {command.a} is; leave it out")
    return {one, other}


def kind_of(path: Path) -> Recording:
    """What a path holds; a file without any stage is a replay's, whose reader says what it lacks.

    `InputError` for a folder of a dump cut short.
    """
    found = recording_at(path)
    if found is not Recording.FOREIGN:
        return found
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if all(_is_foreign(file) for file in files):
        return found
    if path.is_dir():
        raise InputError(f"{path}: no {MANIFEST_FILE}: this dump was not written to its end; run it again")
    return Recording.REPLAY


def _is_foreign(path: Path) -> bool:
    """Whether a safetensors file has keys of a forward, one that is a stage at least, and of nothing else."""
    with TensorFile(path) as file:
        places = [parse_key(key) for key in file.tensors]
    return None not in places and any(place[1] in {*ANY_MODEL, *ANY_MODEL.aliases} for place in places if place)


def diff_aprt_files(
    path_a: Path,
    path_b: Path,
    named: Named | None = None,
    *,
    top: int,
    gates: diff.Gates | None = None,
    progress: Report = lambda _label, _done: None,
) -> dict[str, Any]:
    """Two APRT files. With a model and tokens, each is judged from its inputs, the files beside it in its tree;
    otherwise they are compared flat: the format stores neither shape nor dtype."""
    a, b = AprtFile(path_a), AprtFile(path_b)
    only = diff.Gates(std_ratio=gates.std_ratio, accept=gates.accept) if gates else None
    if named is not None and named.given:
        if a.place != b.place:
            raise InputError(f"{path_a} and {path_b} are files of two stages; give two files of the same stage")
        layer, stage = a.place
        wanted = Wanted(None if layer is None else str(layer), stage)
        return diff_forward(tree_of(a), tree_of(b), named=named, wanted=wanted, top=top, gates=only, progress=progress)
    row = compare_files(a, b, top=top)
    side_a, side_b = diff.side(str(path_a)), diff.side(str(path_b))
    return diff.finish([row], side_a, side_b, gates=only, expected=1)


def _same_kind(a: Side, b: Side, path_a: Path, path_b: Path, components: Path | None) -> tuple[Side, Side]:
    """A bundle's all-selected stages face another's; where one side is a sample alone, both show the sample."""
    if len(a.tensors) > 1 and len(b.tensors) == 1 and path_a.is_dir() and _turned(b):
        return a._stack.enter_context(open_side(path_a, components, sample=True)), b
    if len(b.tensors) > 1 and len(a.tensors) == 1 and path_b.is_dir() and _turned(a):
        return a, b._stack.enter_context(open_side(path_b, components, sample=True))
    return a, b


def _turned(side: Side) -> bool:
    return any(tensor.transpose for tensor in side.tensors.values())


def _is_wanted(key: str, a: Side, b: Side, wanted: Wanted) -> bool:
    tensor = a.tensors[key] if key in a.tensors else b.tensors[key]
    return any(wanted.has_tensor(layer_of(tensor.source_name), stage) for stage in REPLAY)


def _compare(
    key: str,
    a: SideTensor,
    b: SideTensor,
    top: int,
    lambdas: tuple[Lambdas, Lambdas],
    sides: tuple[Side, Side],
    progress: Report,
) -> TensorComparison:
    options, precisions = _options(a, b), (sides[0].precision, sides[1].precision)
    others = (functools.partial(sides[0].components_but, key), functools.partial(sides[1].components_but, key))
    comparison = TensorComparison(
        a.source_name, key, options, top=top, lambdas=lambdas, precisions=precisions, others=others
    )
    comparison.expect(set(a.stages), set(b.stages), (sides[0].promises, sides[1].promises))
    if a.components and b.components and a.layout == b.layout and not a.components.same_as(b.components):
        comparison.diagnose_basis(a.components, b.components)
    rows = a.rows
    plan = chunk_plan(rows, default_chunk_rows(a.shape)) if rows == b.rows else [(0, rows)]
    for one, other in zip(a.chunks(plan), b.chunks(plan if rows == b.rows else [(0, b.rows)]), strict=True):
        comparison.add(one, other)
        progress(a.source_name, one.stop / rows)
    for letter, side in (("a", a), ("b", b)):
        if side.components is not None and (source := side.source()) is not None:
            comparison.blame(letter, parts_of(side.components, *source), side.components.entry, side.layout)
    return comparison


def _options(a: SideTensor, b: SideTensor) -> dict[str, Any]:
    """What the oracle computes.

    Two sides that contracted V alike are judged by what they did; otherwise by what the components declare.
    """
    declared = a.components.entry.layout if a.components else a.layout
    return {"layout": a.layout if a.layout == b.layout else declared, "transpose": a.transpose}


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
        x, y = (tensor.read(stage.name, start, stop) for tensor in (a, b))
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
        row = pair_row(in_replay(a.source_name, key, stage.name, stage.required), verdict)
        row.update(byte_match=equal, sha256_a=one, sha256_b=other, tolerance_passed=equal)
        rows.append(row)
    return rows


def _unknown_rows(a: Side, b: Side) -> list[dict[str, Any]]:
    """Rows of stages that no replay has and one side alone holds: an unknown stage is not passed over."""
    rows = []
    for keys, verdict in ((a.unknown - b.unknown, Verdict.MISSING), (b.unknown - a.unknown, Verdict.EXTRA)):
        for key in sorted(keys):
            where = in_replay(key, key, key.rpartition(".")[2], required=False)
            rows.append({**pair_row({**where, "key": key}, verdict), "note": "no stage of the replay"})
    return rows


def _gates_of_pair(gates: diff.Gates, rows: list[dict[str, Any]]) -> diff.Gates:
    """Without a report the reference side is a: every tensor's final bf16 hash must be a's."""
    finals = [(row.get("sha256_a"), row.get("sha256_b")) for row in rows if row["stage"] == "final_bf16"]
    equal = bool(finals) and all(one is not None and one == other for one, other in finals)
    one = finals[0][0] if finals else None
    return diff.Gates(**{**vars(gates), "current": one, "replayed_hashes": (one,) if equal and one else ()})
