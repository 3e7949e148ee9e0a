"""What the kernels of a run took the inputs of products to that were not recorded, where its user does not say.

A recorded product is explained by itself. Of one that was not recorded only later stages tell: where they fail, they
are judged as of each kind of ggml's kernels for the weights of the model's file. A kind that explains one of them is
the run's: a wrong run of other kernels passes by no bound that is narrow, and where numbers on the edge make it wide,
it is not nearer to this kind's values than to those of float32.

Where all recorded products have 16-bit operands, what was not recorded may be of that type too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from stages.files.forward_dump import Place
from stages.judge.activations import FLOAT32, KERNELS, inferable, taken_at
from stages.judge.forward import judge_place, oracles_of, why_unjudged
from stages.judge.recorded_run import ForwardRun
from stages.judge.rows import Row
from stages.judge.spans import computed_between, span_of
from stages.oracle.verdict import Verdict, worst
from stages.recipes.recipe import NARROW
from stages.run.forward import part
from stages.spec.forward import forward_pipeline
from stages.spec.noise import Noise

# Of other kernels a tensor is further from a kind's values than from float32's, as what a kind loses has little in
# common with what a mistake does; right ones were nearer by 1.6 and more where most numbers had flipped.
_NEARER = 1.25


@dataclass(frozen=True)
class _Judged:
    """A recorded stage by some kind of kernels: whether it passes, its largest error over the bound, its error, and why
    nothing can be told, if so."""

    passes: bool
    ratio: float
    error: float
    unknown: str | None


def infer_activations(rows: Sequence[Row], run: ForwardRun, end: str = "") -> None:
    """Judge rows that fail through products that were not recorded by the kernels that the run seems to have had, in
    place: `precision` where these explain it, `unjudged` where it cannot be told. `end` is that of a side's fields."""
    failing = [row for row in rows if _fails(row, run, end)]
    kinds = _kinds(rows, run, end) if failing else []
    plain = {_place(row): _judge(_place(row), run) for row in failing} if kinds else {}
    chosen = next((kind for kind in kinds if any(_explains(kind, at, by) for at, by in plain.items())), None)
    for row in failing if chosen is not None else ():
        assert chosen is not None
        _rejudge(row, run, chosen, end)


@dataclass(frozen=True)
class _Kind:
    """How the kernels of a run may compute what was not recorded, in words, and who does so by itself; whether what
    they lose moves values, or only lets them differ."""

    run: ForwardRun
    words: str
    usual: str | None = None
    moves: bool = True

    def concerns(self, place: Place) -> bool:
        """Whether a stage is judged through what this kind computes in another way."""
        span = span_of(place, self.run)
        if not self.moves:
            return bool(computed_between(place, self.run))
        return any(taken_at(self.run, at) is not None for at in (*span.hidden, *([span.acting] if span.hidden else [])))


def _kinds(rows: Sequence[Row], run: ForwardRun, end: str) -> list[_Kind]:
    kinds = [
        _Kind(dataclasses.replace(run, activations=kind), f"products before it that were not recorded {words}", usual)
        for kind in inferable(run)
        for words, usual in [KERNELS[kind]]
    ]
    dtype = _common_type(rows, run, end)
    if dtype is not None and run.config is not None:
        narrow = dataclasses.replace(run, path=forward_pipeline(run.config, dtype))
        words = f"what was not recorded before it is in {dtype}, as the operands of all recorded products"
        kinds.append(_Kind(narrow, words, moves=False))
    return kinds


def _common_type(rows: Sequence[Row], run: ForwardRun, end: str) -> str | None:
    """The 16-bit type that the operands of all recorded products of a float32 run have; None where there is none."""
    if run.path is None or run.path.activations != FLOAT32 or run.adapted is not None:
        return None
    products = [row for row in rows if row["stage"] in run.path and run.path[row["stage"]].noise is Noise.PRODUCT]
    said = [str(row.get(f"recipe{end}")) for row in products if not computed_between(_place(row), run)]
    return next((dtype for dtype in NARROW if said and all(f" {dtype}-like" in words for words in said)), None)


def _place(row: Row) -> Place:
    return row["layer"], row["stage"]


def _fails(row: Row, run: ForwardRun, end: str) -> bool:
    if row["tensor"] is not None or _place(row) not in run.side.places or run.path is None:
        return False
    return Verdict(row.get(f"verdict{end}") or Verdict.UNJUDGED).fails and why_unjudged(_place(row), run) is None


def _judge(place: Place, run: ForwardRun) -> _Judged:
    unknown = why_unjudged(place, run)
    observed, squares = run.read(place), 0.0
    for columns, oracle in oracles_of(place, run, observed):
        shown = part(observed, columns)
        if shown.shape != oracle.value.shape:
            return _Judged(False, np.inf, np.inf, unknown)
        squares += float(np.sum((shown.astype(np.float64) - oracle.value) ** 2))
    judged = None if unknown else judge_place(place, run, observed, why=False)
    ratio = np.inf if judged is None else judged.ratio
    return _Judged(judged is not None and judged.verdict.passes, ratio, squares**0.5, unknown)


def _explains(kind: _Kind, place: Place, plain: _Judged) -> bool:
    if not kind.concerns(place):
        return False
    found = _judge(place, kind.run)
    if not kind.moves:
        return found.passes
    return (found.passes or found.unknown is not None) and _NEARER * found.error < plain.error


def _rejudge(row: Row, run: ForwardRun, kind: _Kind, end: str) -> None:
    place = _place(row)
    if not kind.concerns(place):
        return
    run.instead[place] = kind.run
    found = _judge(place, kind.run)
    if found.unknown is not None:
        row |= dict(_fields(Verdict.UNJUDGED, end, row))
        row["note"] = f"{kind.words}; {found.unknown}"
    elif found.passes:
        row |= dict(_fields(Verdict.PRECISION, end, row))
        row |= {f"hint{end}": kind.words, f"usual{end}": kind.usual}
    else:
        row |= {f"ratio{end}": found.ratio, f"hint{end}": None}


def _fields(verdict: Verdict, end: str, row: Row) -> Iterator[tuple[str, str]]:
    yield f"verdict{end}", verdict.value
    if end:  # of both sides the worse one
        other = {"_a": "_b", "_b": "_a"}[end]
        both = (verdict, *([Verdict(row[f"verdict{other}"])] if row.get(f"verdict{other}") else []))
        yield "verdict", worst(*both).value
