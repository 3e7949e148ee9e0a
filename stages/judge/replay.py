"""Comparing two sides of the component replay, tensor by tensor, chunk by chunk, stage by stage."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from stages.files.bundle import BundleEntry
from stages.judge.arrangements import Parts
from stages.judge.basis import BasisComparison
from stages.judge.decomposition import SHOWN_BY, Fault, fault_of, not_known
from stages.judge.guarantees import enforce_precision
from stages.judge.hints import Case, explain
from stages.judge.metrics import Difference, PairHash, same_bits
from stages.judge.replay_spans import Others, Replayed, span_in
from stages.judge.rows import Row, in_replay, pair_row
from stages.oracle.bounds import LAMBDA, Lambdas
from stages.oracle.residual import Residual
from stages.oracle.verdict import Oracle, Verdict, worst
from stages.recipes.side import SideVerdict
from stages.spec.layouts import LAYOUTS
from stages.spec.noise import Noise
from stages.spec.replay import REPLAY
from stages.spec.stage import Stage
from stages.spec.values import Chunk


class Operands(Protocol):
    """S, V as stored, and offsets of one side: `Components` or a `ReplayTask`."""

    @property
    def s(self) -> np.ndarray: ...

    @property
    def v(self) -> np.ndarray: ...

    @property
    def offsets(self) -> np.ndarray: ...


@dataclass
class StageComparison:
    """One row in the making: metrics of a against b and both sides' verdicts."""

    stage: Stage
    difference: Difference
    hashes: PairHash = field(default_factory=PairHash)
    side_a: SideVerdict | None = None
    side_b: SideVerdict | None = None
    shape_note: str | None = None


@dataclass(frozen=True)
class ChunkCheck:
    """What one chunk of rows of one tensor showed, per stage: for `large_tensor_chunk_checks`."""

    start: int
    stop: int
    differences: Mapping[str, Difference]


class TensorComparison:
    """Both sides of one tensor; feed it chunks of the same rows, then ask for rows.

    `options` say what the oracle computes (layout, transpose). `verdicts=False` skips the oracle. Of a and b: `lambdas`
    are what their noise is judged by, `precisions` what they were computed in; more than native is held to its promise;
    `others` the components of their other tensors.
    """

    def __init__(
        self,
        source_name: str,
        key: str,
        options: Mapping[str, Any],
        *,
        top: int = 5,
        verdicts: bool = True,
        lambdas: tuple[Lambdas, Lambdas] = (LAMBDA, LAMBDA),
        precisions: tuple[str | None, str | None] = (None, None),
        others: tuple[Others, Others] = (tuple, tuple),
    ):
        self.source_name, self.key, self.options = source_name, key, options
        self.lambdas, self.precisions = lambdas, precisions
        self.verdicts, self.top = verdicts, top
        self.replayed = {
            x: Replayed(options, *of) for x, of in zip("ab", zip(lambdas, others, strict=True), strict=True)
        }
        self.recorded: dict[str, set[str]] = {"a": set(), "b": set()}
        self.stages: dict[str, StageComparison] = {}
        self.missing: dict[str, Verdict] = {}
        self.lacks: dict[str, list[str]] = {"a": [], "b": []}  # stages of the other side, which nothing promised
        self.alone = False  # whether a has nothing, and b is judged by itself
        self.chunks: list[ChunkCheck] = []
        self.residual_a, self.residual_b = Residual(), Residual()
        self.other, self.other_turned = Residual(), False  # of the contraction of V that a side which misses has not
        self.rank = 1
        self.basis: BasisComparison | None = None
        self.faults: dict[str, Fault | None] = {}  # of a side's components, where they were looked at

    def expect(
        self, stages_a: set[str], stages_b: set[str], promises: tuple[bool, bool] = (True, True), *, alone: bool = False
    ) -> None:
        """Note the stages that one side lacks: missing in b or extra in b, where the side promises to have all.

        `alone`: a has no stage at all, so that b is judged by itself.
        """
        self.alone, self.recorded = alone, {"a": stages_a, "b": stages_b}
        for name in REPLAY if not alone else ():
            one, other = name in stages_a, name in stages_b
            if one != other:
                letter = "b" if one else "a"
                if promises["ab".index(letter)]:
                    self.missing[name] = Verdict.MISSING if one else Verdict.EXTRA
                else:
                    self.lacks[letter].append(name)
            elif not one and any(promises) and REPLAY[name].required:
                self.missing[name] = Verdict.MISSING

    def add(self, a: Chunk, b: Chunk) -> None:
        """Compare and judge one chunk of rows."""
        if self.basis is not None:
            self._add_basis(self.basis, a, b)
        with np.errstate(all="ignore"):  # a NaN on a side is a verdict, not a warning
            self.chunks.append(ChunkCheck(a.start, a.stop, self._add(a, b)))

    def _add(self, a: Chunk, b: Chunk) -> dict[str, Difference]:
        differences: dict[str, Difference] = {}
        for stage in REPLAY.values():
            if stage.name in a.values and stage.name in b.values and stage.name not in self.missing:
                row = self.stages.setdefault(stage.name, StageComparison(stage, Difference(self.top)))
                difference = self._compare(row, a, b)
                if difference is not None:
                    differences[stage.name] = difference
                self._judge(row, a, b)
            elif self._is_alone(stage.name) and (stage.name in a.values or stage.name in b.values):
                self._judge(self.stages.setdefault(stage.name, StageComparison(stage, Difference(self.top))), a, b)
        self.rank = {**a.shared, **b.shared}.get("scaled_s", np.empty(1)).size
        for residual, chunk in ((self.residual_a, a), (self.residual_b, b)):
            source, zero = chunk.values.get("source_f32"), chunk.values.get("zero_source_f32")
            if source is not None and zero is not None and source.shape == zero.shape:
                residual.add(source, zero)
                if not residual.relative <= residual.bound(self.rank):
                    self._add_other(source, zero, chunk.params)
        return differences

    def _is_alone(self, name: str) -> bool:
        """Whether one side alone has a stage, and the other one never promised it."""
        return self.alone or any(name in lacking for lacking in self.lacks.values())

    def _add_other(self, source: np.ndarray, zero: np.ndarray, params: Mapping[str, np.ndarray]) -> None:
        """Add (U * S) V^T with V contracted as `zero` was not, where its shape allows both."""
        if any(name not in params for name in ("u", "s", "v")):
            return
        us, v = params["u"] * params["s"], params["v"]
        if v.shape[0] != v.shape[1] or us.shape[1] != len(v) or source.shape[1] != len(v):
            return
        again = {turned: us @ (v.T if turned else v) for turned in (True, False)}
        self.other_turned = max(again, key=lambda turned: float(np.linalg.norm(again[turned] - zero)))
        self.other.add(source, again[self.other_turned])

    def _compare(self, row: StageComparison, a: Chunk, b: Chunk) -> Difference | None:
        x, y = a.values[row.stage.name], b.values[row.stage.name]
        if x.shape != y.shape or x.dtype != y.dtype:
            row.shape_note = f"a has {x.dtype} {list(x.shape)}, b has {y.dtype} {list(y.shape)}; {_turned(x, y, row)}"
            return None
        transposed = self.options["transpose"] and row.stage.name.startswith("final_")
        difference = Difference(self.top)
        difference.add(x, y, a.start if row.stage.by_rows else 0, int(transposed))
        row.difference.merge(difference)
        row.hashes.add(x, y, equal=difference.byte_match)
        return difference

    def _judge(self, row: StageComparison, a: Chunk, b: Chunk) -> None:
        if not self.verdicts or row.shape_note is not None:
            return
        read = {name for chunk in (a, b) for _, name in span_in(chunk, row.stage).recorded}
        if any(name in self.stages and self.stages[name].shape_note for name in read):
            return  # an input of a wrong shape or dtype is that input's fault; nothing can be said of this stage
        oracle: Oracle | None = None
        given: tuple[np.ndarray, ...] | None = None
        try:
            for letter, chunk in (("a", a), ("b", b)):
                replayed, own = self.replayed[letter], chunk.arguments(row.stage)
                if row.stage.name not in chunk.values or replayed.lacking(chunk, row.stage) is not None:
                    continue
                alike = self.lambdas[0] == self.lambdas[1] and own is not None and _same(given, own)
                oracle = oracle if alike and oracle is not None else replayed.oracle(chunk, row.stage)
                given = own
                self._judge_side(row, letter, chunk, oracle)
        except ValueError as error:  # numpy's, for operands whose shapes do not go together
            row.shape_note = f"its recorded inputs do not fit each other: {error}"

    def _judge_side(self, row: StageComparison, letter: str, chunk: Chunk, oracle: Oracle) -> None:
        observed, start = chunk.values[row.stage.name], chunk.start if row.stage.by_rows else 0
        named = functools.partial(self.replayed[letter].named, chunk, oracle, observed)
        before, precision = (row.side_a, self.precisions[0]) if letter == "a" else (row.side_b, self.precisions[1])
        judged = judge_chunk(before, oracle, observed, precision, start=start, named=named)
        if letter == "a":
            row.side_a = judged
        else:
            row.side_b = judged

    def diagnose_basis(self, a: Operands, b: Operands) -> None:
        """From the first chunk on, ask whether the sides' different U, S, V explain their adapted weights."""
        turned = LAYOUTS[self.options["layout"]].transposed
        v = (a.v, b.v) if turned else (a.v.T, b.v.T)
        self.basis = BasisComparison((a.s, b.s), v, a.offsets)

    def _add_basis(self, basis: BasisComparison, a: Chunk, b: Chunk) -> None:
        names = ("source_f32", "adapted_source_f32")
        arrays = [chunk.values.get(name) for name in names for chunk in (a, b)]
        shapes = {array.shape for array in arrays if array is not None}
        if len(shapes) != 1 or any(array is None for array in arrays):
            self.basis = None  # a stage is missing or of another shape, and its own row says so
            return
        source, _, one, other = (array for array in arrays if array is not None)
        basis.add(source, (a.params["u"], b.params["u"]), (one, other))

    def rows(self) -> list[dict[str, Any]]:
        """One `svf.diff/1` row per stage that either side has, in execution order."""
        result: list[Row | None] = []
        for stage in REPLAY.values():
            if stage.name in self.missing:
                result.append(self._row(stage, self.missing[stage.name]))
            elif stage.name in self.stages:
                row = self.stages[stage.name]
                result.append(self._row_alone(row) if self._is_alone(stage.name) else self._compared_row(row))
        return [row for row in result if row is not None]

    def unjudged(self, letter: str) -> list[str]:
        """Stages that a side lacks, and that could not be judged by themselves where they are."""
        judged = {row["stage"] for row in self.rows()}
        return [name for name in self.lacks[letter] if name not in judged]

    def _row(self, stage: Stage, verdict: Verdict, a: SideVerdict | None = None, b: SideVerdict | None = None) -> Row:
        return pair_row(in_replay(self.source_name, self.key, stage.name, stage.required), verdict, a, b)

    def _row_alone(self, row: StageComparison) -> dict[str, Any] | None:
        if row.shape_note is not None:
            return {**self._row(row.stage, Verdict.SHAPE), "note": row.shape_note}
        side = row.side_b or row.side_a
        if side is None and not self.alone:
            return None
        verdict = Verdict.UNJUDGED if side is None else side.verdict
        said = {} if self.alone else {"note": f"{'b' if row.side_b else 'a'} alone recorded it"}
        found = {**self._row(row.stage, verdict, row.side_a, row.side_b), **said, "byte_match": None}
        return {**found, **self._through(row.stage, found)}

    def _through(self, stage: Stage, row: Mapping[str, Any]) -> dict[str, Any]:
        """What a row's sides were judged through, in words, where their inputs were not recorded."""
        words = {letter: self.replayed[letter].words(stage, self.recorded[letter]) for letter in "ab"}
        own = [f"{letter} {said}" for letter, said in words.items() if said]
        return {"note": "; ".join(filter(None, (row.get("note"), *own)))} if own else {}

    def _compared_row(self, row: StageComparison) -> dict[str, Any]:
        if row.shape_note is not None:
            return {**self._row(row.stage, Verdict.SHAPE), "note": row.shape_note}
        d, tolerance = row.difference, row.stage.tolerance
        given = row.stage.noise is Noise.EXACT and not row.stage.inputs
        digest_a, digest_b = row.hashes.digests()
        verdict = row_verdict(d, row.side_a, row.side_b, given=given)
        found = self._row(row.stage, verdict, row.side_a, row.side_b)
        return {
            **found,
            **self._through(row.stage, found),
            **({"note": note} if (note := holds_nan(d, verdict)) else {}),
            "tolerance_passed": d.finite and d.max_abs <= tolerance.max_abs and d.mean_abs <= tolerance.mean_abs,
            "sha256_a": digest_a,
            "sha256_b": digest_b,
            **d.result(),
        }

    def zero_offset(self) -> dict[str, Any]:
        """How well each side's zero-offset replay gives the source back: the test of a layout."""
        bound = max(residual.bound(self.rank) for residual in (self.residual_a, self.residual_b))
        return {
            "tensor": self.source_name,
            "layout": self.options["layout"],
            "max_abs_a": self.residual_a.max_abs,
            "max_abs_b": self.residual_b.max_abs,
            "relative_a": self.residual_a.relative,
            "relative_b": self.residual_b.relative,
            "bound": bound,
            "fits_a": self.residual_a.relative <= bound if self.residual_a.known else None,
            "fits_b": self.residual_b.relative <= bound if self.residual_b.known else None,
            "right": self._right(bound),
        }

    def _right(self, bound: float) -> list[str]:
        """Layouts that give the source back where a side's does not; none where that is not known."""
        if not (self.other.known and self.other.relative <= bound):
            return []
        return [name for name, row in LAYOUTS.items() if row.transposed == self.other_turned]

    def blame(self, letter: str, parts: Parts, entry: BundleEntry, layout: str) -> None:
        """After the last chunk, see whether a side's components are the weight's decomposition."""
        shown, fits = self.stages.get(SHOWN_BY), self.zero_offset()[f"fits_{letter}"]
        judged = {"a": shown.side_a, "b": shown.side_b}[letter] if shown else None
        if judged is not None and not judged.verdict.passes:
            fits = False  # it is not these components that it was made of, so that it says nothing of them
        self.faults[letter] = fault_of(parts, entry, layout, fits=fits)

    def decomposition(self) -> list[dict[str, Any]]:
        """The faults of both sides' components, one row when they are the same; of a misfit nobody looked into, too."""
        zero, found = self.zero_offset(), {}
        for letter in "ab":
            missed = zero[f"fits_{letter}"] is False
            fault = self.faults.get(letter, not_known(self.source_name) if missed else None)
            if fault is not None:
                found[letter] = fault, zero[f"relative_{letter}"] / zero["bound"] if missed else None
        both = len(found) == 2 and found["a"][0] == found["b"][0]
        return [f.row("both" if both else side, ratio) for side, (f, ratio) in found.items() if side == "a" or not both]


def judge_chunk(
    verdict: SideVerdict | None,
    oracle: Oracle,
    observed: np.ndarray,
    precision: str | None = None,
    *,
    start: int = 0,
    named: Callable[[], str | None] | None = lambda: None,
) -> SideVerdict:
    """The verdict on a side's stage with one chunk more; the first one that fails without a reason is explained.

    `precision` is what the side was computed in, `start` the chunk's first row. `named` may say what is wrong in a
    stage on the way, before the error is looked at; where it is None, nothing is explained.
    """
    verdict = verdict or SideVerdict()
    failed = verdict.add(oracle, observed) in (Verdict.BUG, Verdict.SUSPECT)
    if failed and named is not None and verdict.reason is None:
        verdict.reason = named() or explain(Case(oracle, observed, start=start, asked=True))
    enforce_precision(verdict, precision, oracle, observed)
    return verdict


def row_verdict(d: Difference, a: SideVerdict | None, b: SideVerdict | None, *, given: bool) -> Verdict:
    """A row's verdict from its sides' (None: not judged); `given` says that the stage copies what a side was given."""
    sides = [side.verdict for side in (a, b) if side is not None]
    if not d.finite and not d.byte_match:
        return Verdict.NONFINITE
    if given and not d.byte_match:
        return Verdict.BUG  # the two sides were given different things
    if len(sides) < 2 and not d.byte_match:
        return worst(Verdict.UNJUDGED, *sides)
    return worst(Verdict.EXACT, *sides)


def holds_nan(d: Difference, verdict: Verdict) -> str | None:
    """A note on equal bytes that are not all finite; None where there is nothing to say, or it is a fault."""
    return (
        f"{d.nonfinite_a:,} values are NaN or infinite, the same on both sides"
        if not d.finite and verdict.passes
        else None
    )


def same_bytes(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether two arrays of different shape hold the same elements in the same order."""
    return x.dtype == y.dtype and x.shape != y.shape and x.size == y.size and same_bits(x.reshape(-1), y.reshape(-1))


def _same(a: tuple[np.ndarray, ...] | None, b: tuple[np.ndarray, ...]) -> bool:
    if a is None:
        return False
    return all(x is y or (x.shape == y.shape and np.array_equal(x, y)) for x, y in zip(a, b, strict=True))


def _turned(x: np.ndarray, y: np.ndarray, row: StageComparison) -> str:
    if same_bytes(x, y):
        return f'the same bytes in the same order, only the label of the shape differs; expected "{row.stage.shape}"'
    turned = x.shape == y.shape[::-1] and x.shape != y.shape
    return f'is one side transposed? expected "{row.stage.shape}"' if turned else f'expected "{row.stage.shape}"'
