"""Faults and right ways out of the catalogue: each row is written in the place of a recorded stage, and audited.

A row is written by the emulator that the judge asks of it: this proves the search and the words. That the emulators
are what faults do is proved by faults that share nothing with them (apart.py).
"""

from __future__ import annotations

import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import InputError
from stages.files.replay_recorded import open_side
from stages.judge.audit import audit
from stages.judge.forward import oracles_of
from stages.judge.recorded_run import open_run
from stages.oracle.rounding import round_once
from stages.oracle.verdict import Oracle, consult, judged_part, measure
from stages.recipes.at import At, Unknown
from stages.recipes.catalogue import forms_of, kind_of, right_value, ways_of
from stages.recipes.fit import places_beyond
from stages.recipes.recipe import Class, Kind
from stages.recipes.value import Value
from stages.selftest.fault import FORWARD
from stages.selftest.fault import REPLAY as REPLAYED
from stages.selftest.specimens import SPECIMENS
from stages.selftest.trials import DECOMPOSED, SELECTED, path_of
from stages.selftest.uses import replaced
from stages.spec.dtypes import stored_dtype
from stages.spec.noise import Noise
from stages.spec.replay import REPLAY
from stages.spec.stage import Stage

# Whose recorded stages are replaced: every dtype, a norm of heads and biases, the components of a square weight.
MADE_OF = ("qwen3", "qwen3-bf16", "qwen3-f16", "qwen2-bf16", "square")
LAYER = 1
# Of a quick selftest, one row in so many, others for another seed.
_QUICK = 12
# What stands for a number that the judge is to estimate.
_OPEN: Mapping[str, float] = {"eps": 0.003, "temperature": 1.3, "theta": 3e5}
_VERDICTS = {Class.NARROWER: "precision", Class.OTHER: "bug"}


@dataclass(frozen=True)
class Rows:
    """All rows of one kind of stage, as one kind of fault."""

    kind: Kind
    path: str
    at: tuple[str, ...]
    size: None = None

    @property
    def name(self) -> str:
        return f"rows of {self.kind.name}"

    @property
    def doc(self) -> str:
        wrong = sum(Class.NARROWER in form.classes.values() for form in self.kind.forms)
        return f"{wrong} ways in fewer bits, {len(self.kind.mods)} other functions, and operands or results narrowed"


def _all() -> dict[str, Rows]:
    stages = [(stage, FORWARD) for name in MADE_OF[:-1] for stage in path_of(name).values() if not stage.identity]
    found: dict[str, Rows] = {}
    for stage, path in (*stages, *((stage, REPLAYED) for stage in REPLAY.values())):
        kind = kind_of(stage)
        if kind is not None and (kind.mods or stage.noise is not Noise.EXACT):
            rows = found.get(f"rows of {kind.name}") or Rows(kind, path, ())
            found[rows.name] = Rows(kind, path, tuple(dict.fromkeys((*rows.at, stage.name))))
    return found


ROWS: Mapping[str, Rows] = _all()


@dataclass(frozen=True)
class Written:
    """What one row writes, in words, of its class; `own`: of the stage's kind, not a general one of fewer bits."""

    words: str
    kind: Class
    array: np.ndarray
    own: bool


def written(oracle: Oracle, numbers: Mapping[str, float] = {}) -> Iterator[Written]:
    """What each row writes in the place of a stage, in its dtype; `numbers`: those that a row leaves open."""
    for way in ways_of(At(oracle, right=right_value), *Class, numbers=numbers):
        array = round_once(way.value, stored_dtype(oracle.stage.dtype))
        if np.isfinite(array).all():
            yield Written(way.words, way.kind, judged_part(oracle.stage, array), way.own)


def _value(kind: Kind, at: At, args: Mapping[str, Any]) -> Value | None:
    with suppress(Unknown), np.errstate(all="ignore"):
        value = kind.emulator(at, **args)
        return value if value is not None and value.mid.shape == at.oracle.value.shape else None
    return None


def _may_be_right(oracle: Oracle, array: np.ndarray) -> bool:
    """Whether a right way may give it, or it is within the stage's bound: then no fault was planted."""
    kind, at, dtype = kind_of(oracle.stage), At(oracle, right=right_value), oracle.stage.dtype
    assert kind is not None
    forms = (form for form in forms_of(kind, dtype, Class.PRESCRIBED, Class.EQUIVALENT) if not form.unseen)
    values = (_value(kind, at, form.args) for form in forms)
    fits = (value is not None and not places_beyond(value, array, oracle.stage)[1].any() for value in values)
    return measure(oracle, array).verdict.passes or any(fits)


# -- what is planted where ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A recorded stage of a right run: its key in the dump, and the oracle from its recorded inputs."""

    key: str
    layer: int | None
    tensor: str | None
    oracle: Oracle

    @property
    def stage(self) -> Stage:
        return self.oracle.stage


def _places(folder: Path, specimen: str, stack: ExitStack) -> Iterator[Place]:
    """Every stage of one layer and of the whole model, or of the replayed tensor, that rows describe."""
    if specimen in SELECTED:
        (tensor,) = stack.enter_context(open_side(folder, None)).tensors.values()
        (chunk,) = tensor.chunks([(0, tensor.rows)])
        options = {"layout": tensor.layout, "transpose": tensor.transpose}
        for stage in REPLAY.values():
            arguments = chunk.arguments(stage)
            if _described(stage) and arguments is not None:
                own = {name: options[name] for name in stage.options}
                yield Place(
                    tensor.stages[stage.name][1], DECOMPOSED, tensor.source_name, consult(stage, arguments, own)
                )
        return
    run = open_run(folder, None, stack)
    assert run.path is not None
    for place, key in run.side.places.items():
        if place[0] in (LAYER, None) and _described(run.path.at(place)):
            (oracle,) = (oracle for _, oracle in oracles_of(place, run, run.read(place)))
            yield Place(key, place[0], None, oracle)


def _described(stage: Stage) -> bool:
    kind = kind_of(stage)
    return kind is not None and f"rows of {kind.name}" in ROWS and not stage.identity


def judged(folder: Path, specimen: str, backend: str, chosen: Sequence[str], quick: bool, seed: int) -> list[dict]:
    """Rows of the kinds `chosen`, planted in a right run's dump one at a time: those that are faults, and right ways.

    A fault is planted once, in one of the stages of its kind; what narrows an operand or a result on one of the
    backends. A right way is planted in each. With `quick` one in so many.
    """
    rows, copy = [], folder.with_name(f"{folder.name}-rows")
    with ExitStack() as stack:
        places = [*_places(folder, specimen, stack)]
        for place in places:
            if _name_of(place) not in chosen:
                continue
            alike = [other for other in places if _name_of(other) == _name_of(place)]
            shutil.copytree(folder, copy)
            writes = [*written(place.oracle, _OPEN)]
            for row in writes:
                turn = zlib.crc32(f"{specimen} {row.words} {seed}".encode())
                here = row.kind.sound or alike[(turn // 2 + (backend == "jax")) % len(alike)] is place
                if here and (row.own or turn % 2 == (backend == "jax")) and (not quick or turn // 16 % _QUICK == 0):
                    rows.append(_row(copy, specimen, backend, place, row, writes))
            shutil.rmtree(copy)
    return rows


def _name_of(place: Place) -> str:
    kind = kind_of(place.stage)
    assert kind is not None
    return f"rows of {kind.name}"


def _row(
    copy: Path, specimen: str, backend: str, place: Place, row: Written, writes: Sequence[Written]
) -> dict[str, Any]:
    """One row planted and judged, as the document tells of it; a fault that a right way may give is `unseen`."""
    stage = place.stage.name
    fields = {
        "fault": _name_of(place),
        "row": row.words,
        "class": row.kind.value,
        "path": FORWARD if place.tensor is None else REPLAYED,
        "family": SPECIMENS[specimen].family,
        "dtype": place.stage.dtype,
        "specimen": specimen,
        "backend": backend,
        "layer": place.layer,
        "tensor": place.tensor,
        "changed": stage,
        "size": None,
        "expected_stage": stage,
        "expected_side": None,
        "changed_elements": int(np.count_nonzero(place.oracle.rounded != row.array)),
        "unseen": not row.kind.sound and (row.words in _NO_FAULT or _may_be_right(place.oracle, row.array)),
    }
    if fields["unseen"]:
        return fields
    replaced(copy, place.key, row.array)
    said = _audited(copy, place)
    culprit = said["culprit"] or dict.fromkeys(("layer", "tensor", "stage", "verdict", "ratio", "hint"))
    told_of = names_in(as_rows(stage, str(culprit["hint"])), [other.words for other in writes])
    same = [w for w in writes if w.words in told_of and np.array_equal(w.array, row.array)]
    at = (culprit["layer"], culprit["tensor"], culprit["stage"]) == (place.layer, place.tensor, stage)
    return {
        **fields,
        "outcome": said["outcome"],
        "found": said["outcome"] == "faulty",
        "named": at and any(culprit["verdict"] == _VERDICTS.get(w.kind) for w in same),
        "side": None,
        "stage": culprit["stage"],
        "named_layer": culprit["layer"],
        "verdict": culprit["verdict"],
        "ratio": culprit["ratio"],
        "hint": culprit["hint"],
    }


def _audited(copy: Path, place: Place) -> Mapping[str, Any]:
    layers = None if place.layer is None else str(place.layer)
    try:
        return audit(copy, layers=layers, stages=place.stage.name, top=0, rerun=False)
    except InputError as error:
        return {"outcome": "refused", "culprit": None, "verdict": str(error)}


# -- what was said ------------------------------------------------------------------------------------------------

# A run may begin at any position, and a row's angles then are right ones.
_NO_FAULT = ("positions are shifted by +1", "positions are shifted by -1")
# What RoPE's own judge (stages/judge/rope.py) says of a row: another word for the same.
_OTHER_WORDS: Mapping[str, str] = {
    "positions are 0 from token 1 on": "not turned by RoPE at all",
    "at all tokens as at positions 19, 18, 17, ...": "positions are counted from the end",
}
_TABLES = {"inv_freq": "inverse frequencies", "rope_angle": "angles", "rope_cos": "cos", "rope_sin": "sin"}
_FORMATS = {"bfloat16": "7 mantissa bits, bfloat16-like", "float16": "10 mantissa bits, float16-like (with its range)"}


def as_rows(stage: str, hint: str) -> str:
    """A hint in the words of the rows, where RoPE's judge has its own."""
    if hint in _OTHER_WORDS:
        return _OTHER_WORDS[hint]
    found = re.fullmatch(r"as if (.+) were in (\w+)", hint)
    if found is None or found[2] not in _FORMATS or stage not in _TABLES:
        return hint
    of_stage = _TABLES[stage] in found[1]
    before = " and " in found[1] if of_stage and "cos" not in found[1] else not of_stage
    what = "result has" if not before else "operands and its result have" if of_stage else "operands have"
    return f"its {what} {_FORMATS[found[2]]}"


def names_in(hint: str, rows: Sequence[str]) -> set[str]:
    """The rows that a hint names. Of several it says once what they begin with alike, up to a comma."""
    found, rest = set(), hint
    for words in sorted(set(rows), key=len, reverse=True):
        *start, end = words.split(", ")
        if end in rest and all(part in hint for part in start):
            found.add(words)
            rest = re.sub(re.escape(end), "", rest, count=1)
    return found
