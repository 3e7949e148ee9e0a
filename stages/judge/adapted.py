"""Judging adapted weights: results, of the whole replay at once. A forward inherits what is rounding there.

A weight is W = P n with P = (U * scaled_s) V^T and n = sum(S) / sum(scaled_s). Of the replay's stages scaled_s and
U * scaled_s are exact, so both sides have the same factors, and what a right W may be off is

    |dW| <= |n| dP + (|P| + dP) dn + u |W|, then the rounding to the stored dtype,

dP and dn the bounds of the product and of the ratio (noise.py), calibrated or rigorous as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from stages.errors import InputError, NotFoundError
from stages.files.bundle import Bundle, Components
from stages.files.forward_dump import ForwardSide
from stages.files.source import ModelSource
from stages.files.tensorfile import TensorFile, TensorInfo
from stages.judge.culprit import Piece
from stages.judge.metrics import Difference, PairHash
from stages.judge.recorded_run import ForwardRun
from stages.judge.replay import row_verdict
from stages.judge.rows import of_tensor, pair_row
from stages.oracle import bounds as noise
from stages.oracle import components as reference
from stages.oracle.contraction import look
from stages.oracle.rounding import round_once
from stages.oracle.verdict import Oracle, Verdict
from stages.recipes.side import SideVerdict
from stages.run.adapted import sums
from stages.run.precision import EXACT
from stages.run.replay import chunk_plan, default_chunk_rows
from stages.spec.layouts import LAYOUTS
from stages.spec.noise import Noise
from stages.spec.stage import Stage
from stages.spec.values import ReplayTask

DECLARED = Stage(
    "adapted_weight",
    ("u_scaled",),
    ("v",),
    shape="rows cols",
    dtype="model",
    noise=Noise.PRODUCT,
    doc="A whole adapted weight as a side has it, judged from the bundle",
)
STAGE = DECLARED.name
_F32 = np.dtype(np.float32)
# A cause explains a wrong weight when that lies within twice the bound of what the cause gives: its own rounding, and
# what the cause was estimated from.
_EXPLAINED = 2.0


@dataclass(frozen=True)
class Adaptation:
    """One side of a comparison: its adapted weights as kept, the model's own, and what its manifest says of both."""

    letter: str
    file: TensorFile | None  # of adapted weights; None: it ran on the model's own, or they were not kept
    checkpoint: ModelSource | None
    layouts: Mapping[str, str]  # tensor -> layout
    components: Mapping[str, Any]
    precision: str | None
    lambdas: noise.Lambdas
    tells: bool = True  # whether it has a manifest at all; another program's forward has none

    def info(self, name: str) -> TensorInfo | None:
        """Shape and dtype of a weight that the side ran on; None when it is unavailable."""
        if self.file is not None and name in self.file.tensors:
            return self.file.info(name)
        return None if self.checkpoint is None or name in self.layouts else self.checkpoint.info(name)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a weight that the side ran on."""
        if self.file is not None and name in self.file.tensors:
            return self.file.read(name, start, stop)
        assert self.checkpoint is not None
        return self.checkpoint.read(name, start, stop)


def adaptation(letter: str, run: ForwardRun) -> Adaptation:
    """What a side's weights were adapted with, as its manifest says; nothing where it has none."""
    manifest = run.side.dump.manifest if isinstance(run.side, ForwardSide) else None
    layouts, made_of = ((manifest or {}).get(name) or {} for name in ("adapted", "components"))
    precision = run.side.facts.get("precision")
    return Adaptation(
        letter, run.adapted, run.checkpoint, layouts, made_of, precision, run.lambdas, tells=manifest is not None
    )


@dataclass(frozen=True)
class Chain:
    """The operands of one adapted weight: rows of U, the factors of its columns, V^T, and the ratio's two sums."""

    u: Callable[[int, int], np.ndarray]
    scaled: np.ndarray
    vt: np.ndarray
    top: np.ndarray
    bottom: np.ndarray

    def oracle(self, start: int, stop: int, dtype: np.dtype, lambdas: noise.Lambdas) -> Oracle:
        """What rows `[start:stop]` should be, and how far off in `dtype` a right replay may leave them."""
        us = (self.u(start, stop) * self.scaled).astype(np.float32)
        return self._of((us, self.vt), dtype, lambdas)

    def _of(self, arguments: tuple[np.ndarray, ...], dtype: np.dtype, lambdas: noise.Lambdas) -> Oracle:
        us, vt = arguments
        product = us.astype(np.float64) @ vt.astype(np.float64)
        ratio = np.asarray(np.sum(self.top, dtype=np.float64) / np.sum(self.bottom, dtype=np.float64))
        value = product * ratio

        def bound(of_product: np.ndarray, of_ratio: np.ndarray) -> np.ndarray:
            total = of_product * np.abs(ratio) + (np.abs(product) + of_product) * of_ratio + noise.U32 * np.abs(value)
            return noise.stored_bound(total, value, dtype)

        def calibrated() -> np.ndarray:
            lam, lam_ratio = lambdas[Noise.PRODUCT], lambdas[Noise.SUM_RATIO]
            of_ratio = lam_ratio * noise.sum_ratio_bound(self.top, self.bottom, ratio)
            return bound(lam * noise.product_bound(us, vt, product), of_ratio)

        def rigorous() -> np.ndarray:
            of_ratio = noise.sum_ratio_rigorous(self.top, self.bottom, ratio)
            return bound(noise.product_rigorous(us, vt, product), of_ratio)

        stage = replace(DECLARED, dtype=dtype.name)
        again = lambda other: self._of(other, dtype, lambdas)  # noqa: E731
        off = lambdas[Noise.SUM_RATIO] * noise.sum_ratio_bound(self.top, self.bottom, ratio)
        options = {"ratio": float(ratio), "ratio_off": float(np.max(off))}
        return Oracle(stage, value, calibrated, rigorous, arguments, options, lambdas, again=again)


def chain_of(c: Components, layout: str) -> Chain:
    """The operands of a bundle's tensor, contracted under `layout`."""
    scaled = round_once(reference.scaled_s(c.offsets, c.s), _F32)
    return Chain(c.u, scaled, _vt(c.v, layout), c.s, scaled)


def _vt(v: np.ndarray, layout: str) -> np.ndarray:
    return v.T if LAYOUTS[layout].transposed else v


@dataclass
class Judged:
    """One adapted tensor of both sides in the making."""

    name: str
    shape: tuple[int, int]
    difference: Difference
    hashes: PairHash = field(default_factory=PairHash)
    verdicts: dict[str, SideVerdict] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """The row of `svf.diff/1`."""
        a, b = self.verdicts.get("a"), self.verdicts.get("b")
        digest_a, digest_b = self.hashes.digests()
        return {
            **_row(self.name, row_verdict(self.difference, a, b, given=False), a, b),
            "sha256_a": digest_a,
            "sha256_b": digest_b,
            **self.difference.result(),
        }


def _row(name: str, verdict: Verdict, a: SideVerdict | None = None, b: SideVerdict | None = None) -> dict[str, Any]:
    return {**pair_row(of_tensor(name, f"adapted.{name}", STAGE), verdict, a, b), "byte_match": None}


class AdaptedPair:
    """The adapted weights of two forwards, judged by the bundle they were made of as far as that is to be had.

    `components` is where it is, if not where the manifests say.
    """

    def __init__(self, a: Adaptation, b: Adaptation, components: Path | None, stack: ExitStack, top: int):
        self.sides = {"a": a, "b": b}
        self.top = top
        self.names = tuple(dict.fromkeys([*a.layouts, *b.layouts]))
        self.bundle, self.lost = _open(a, b, components, stack) if self.names else (None, None)

    @classmethod
    def alone(cls, side: Adaptation, stack: ExitStack) -> Iterator[dict[str, Any]]:
        """Rows of `svf.audit/1` on one side's adapted weights; none where the bundle is unavailable."""
        pair = cls(side, side, None, stack, 0)
        for row in pair.rows() if pair.bundle is not None else ():
            hint = row["hint_a"]
            yield {
                **{name: row[name] for name in ("key", "layer", "tensor", "stage", "required")},
                "verdict": row["verdict_a"] or row["verdict"],
                "ratio": row["ratio_a"],
                "rms_ratio": row["rms_ratio_a"],
                "hint": hint and hint.removeprefix("both sides "),
                "note": row.get("note"),
                "sha256": row.get("sha256_a"),
            }

    @property
    def comparable(self) -> bool:
        """Whether both sides tell what they ran on."""
        return all(side.tells for side in self.sides.values())

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each tensor that either side ran on adapted."""
        return (self._row(name) for name in self.names)

    def pieces(self, name: str) -> Iterator[Piece]:
        """A tensor of both sides, as many rows at a time as a replay takes."""
        for start, stop in _plan(self.shape(name) or (0, 0)):
            one, other = (side.read(name, start, stop) for side in self.sides.values())
            yield Piece(one, other, start)

    def shape(self, name: str) -> tuple[int, int] | None:
        """The tensor's shape; None unless both sides have it, alike."""
        found = [side.info(name) for side in self.sides.values()]
        kinds = {(i.shape, i.dtype) for i in found if i is not None}
        if None in found or len(kinds) != 1:
            return None
        ((shape, _),) = kinds
        return (shape[0], shape[1]) if len(shape) == 2 else None

    def _row(self, name: str) -> dict[str, Any]:
        shape = self.shape(name)
        if shape is None:
            lost = "an adapted weight is unavailable in one shape on both sides; give --model"
            return {**_row(name, Verdict.UNJUDGED), "note": lost}
        judged = Judged(name, shape, Difference(self.top))
        components = self._components(name)
        if components is None:
            return self._unexplained(judged)
        right = self._right(components)
        self._judge(judged, chain_of(components, right))
        wrong = [letter for letter, verdict in judged.verdicts.items() if not verdict.verdict.passes]
        causes = {letter: self._cause(letter, judged, components, right) for letter in wrong}
        for letter, cause in causes.items():
            who = "both sides" if len(causes) == 2 and len(set(causes.values())) == 1 else letter
            judged.verdicts[letter].reason = f"{who} {cause}" if cause else judged.verdicts[letter].reason
        row = judged.row()
        if self._exactly() and not row["byte_match"] and Verdict(row["verdict"]).passes:
            row |= {"verdict": Verdict.BUG.value, "note": "exact precision has one result, and the sides' differ"}
        return row

    def _unexplained(self, judged: Judged) -> dict[str, Any]:
        """The row without the bundle: the sides against each other, within what two replays of one bundle may be."""
        beyond, row = self._judge(judged, None), judged.row()
        if row["byte_match"] or row["verdict"] == Verdict.NONFINITE:
            return row
        if beyond:
            return {**row, "verdict": Verdict.BUG.value, "note": self._difference_in_words(judged.name)}
        assumed = (
            "if V is orthonormal and the scaled S positive, the weights differ by at most twice the error that a "
            "replay may have"
        )
        return {**row, "verdict": Verdict.ROUNDING.value, "note": f"{self.lost}; {assumed}"}

    def _exactly(self) -> bool:
        return all(side.precision == EXACT for side in self.sides.values())

    def _components(self, name: str) -> Components | None:
        entries = () if self.bundle is None else self.bundle.entries
        entry = next((e for e in entries if e.source_name == name), None)
        return None if entry is None or self.bundle is None else self.bundle.load(entry)

    def _right(self, c: Components) -> str:
        """The layout that gives the model's own weights back, or the declared one where these are unavailable."""
        checkpoint = next((s.checkpoint for s in self.sides.values() if s.checkpoint is not None), None)
        entry = c.entry
        if checkpoint is None or checkpoint.info(entry.source_name).shape != entry.shape:
            return entry.layout

        def source(start: int, stop: int) -> np.ndarray:
            return checkpoint.read(entry.source_name, start, stop).astype(np.float32)

        task = ReplayTask(entry.source_name, entry.shape, c.u, c.s, c.v, c.offsets, source, entry.layout)
        return look(task, entry.layout).right

    def _judge(self, judged: Judged, chain: Chain | None) -> bool:
        """Compare and judge, chunk by chunk; whether, without a `chain`, the sides differ beyond what replays may."""
        beyond = False
        for start, stop in _plan(judged.shape):
            values = {letter: side.read(judged.name, start, stop) for letter, side in self.sides.items()}
            difference = Difference(self.top)
            difference.add(values["a"], values["b"], start)
            judged.difference.merge(difference)
            judged.hashes.add(values["a"], values["b"], equal=difference.byte_match)
            if chain is None:
                beyond = beyond or _too_far(values["a"], values["b"])
                continue
            oracle: Oracle | None = None
            for letter, side in self.sides.items():
                if oracle is None or oracle.lambdas != side.lambdas:
                    oracle = chain.oracle(start, stop, values[letter].dtype, side.lambdas)
                verdict = judged.verdicts.setdefault(letter, SideVerdict())
                verdict.add(oracle, values[letter])
                verdict.rms_limit = np.inf  # the ratio's error is one number's, common to all elements
        return beyond

    # -- causes ---------------------------------------------------------------------------------------------------

    def _cause(self, letter: str, judged: Judged, c: Components, right: str) -> str | None:
        """Why a side's weight is wrong: what would give it, in words; None when nothing that is known does."""
        side = self.sides[letter]
        if judged.name not in side.layouts:
            return "ran on the model's own weight, without the components"
        words = f"the bundle declares {right}" if right == c.entry.layout else f"the weights tell {right}"
        for text, chain in _suspects(c, right, side.layouts.get(judged.name)):
            if self._explains(letter, judged, chain):
                return f"{text}; {words}" if "layout" in text else text
        return self._other_offsets(letter, judged, c, right)

    def _explains(self, letter: str, judged: Judged, chain: Chain, slack: float = 0.0) -> bool:
        side = self.sides[letter]
        for start, stop in _plan(judged.shape):
            got = side.read(judged.name, start, stop)
            oracle = chain.oracle(start, stop, got.dtype, side.lambdas)
            if not (np.abs(got.astype(np.float64) - oracle.value) <= _EXPLAINED * oracle.bound + slack).all():
                return False
        return True

    def _other_offsets(self, letter: str, judged: Judged, c: Components, right: str) -> str | None:
        """Whether U and V are the bundle's and the factors between them are not: those are u_k^T W v_k."""
        side, vt = self.sides[letter], _vt(c.v, right).astype(np.float64)
        found, squares, dtype = np.zeros(c.s.size), 0.0, _F32
        for start, stop in _plan(judged.shape):
            stored = side.read(judged.name, start, stop)
            got, dtype = stored.astype(np.float64), stored.dtype
            squares += float(np.sum(got * got))
            found += np.einsum("rk,rk->k", c.u(start, stop).astype(np.float64), got @ vt.T)
        own = chain_of(c, right)
        as_found = replace(own, scaled=found.astype(np.float32), top=np.ones(1), bottom=np.ones(1))
        # Each factor has the weight's own rounding in it, averaged over its elements: 0.4 u rms(W), and K of them come
        # back into each element with weights of about 1 / sqrt(rows cols): ten times that is allowed.
        rows, cols = judged.shape
        slack = 4 * noise.rounding_unit(dtype) * np.sqrt(squares * c.s.size) / (rows * cols)
        if not np.isfinite(found).all() or not self._explains(letter, judged, as_found, slack):
            return None
        wanted = own.scaled * (np.sum(own.top, dtype=np.float64) / np.sum(own.bottom, dtype=np.float64))
        off = np.abs(found - wanted) / np.maximum(np.abs(wanted), noise.TINY)
        at = int(np.argmax(off))
        return (
            f"was adapted with other offsets: U and V are the bundle's, the scaled S is not (most at {at}: "
            f"{found[at]:.6g}, the bundle gives {wanted[at]:.6g})"
        )

    def _difference_in_words(self, name: str) -> str:
        """What the manifests tell of two sides whose weights are too far apart to come from one replay."""
        taken = [side.layouts.get(name) for side in self.sides.values()]
        if None in taken:
            letter = "ab"[taken.index(None)]
            return f"{letter} ran on the model's own weight, the other on an adapted one"
        one, other = (side.components.get("sha256", {}).get(name, {}) for side in self.sides.values())
        parts = [part for part in ("u", "s", "v", "offsets") if one.get(part) != other.get(part)]
        if parts:
            return f"the sides were adapted with different {', '.join(p.upper() if len(p) == 1 else p for p in parts)}"
        if taken[0] is not None and taken[1] is not None and not LAYOUTS[taken[0]].like(taken[1]):
            return f"a used layout {taken[0]}, b {taken[1]}"
        return f"the sides' adapted weights differ by more than twice the error that a replay may have; {self.lost}"


def _suspects(c: Components, right: str, said: str | None) -> Iterator[tuple[str, Chain]]:
    """What a wrong replay is often found to be, in words, and the operands that give it."""
    own, ones = chain_of(c, right), np.ones(1)
    others = [layout for layout in LAYOUTS if not LAYOUTS[layout].like(right)]
    if c.v.shape[0] == c.v.shape[1]:
        used = said if said in others else others[0]
        yield f"used layout {used}", chain_of(c, used)
    yield "did not apply the offsets", replace(own, scaled=c.s, top=ones, bottom=ones)
    yield "did not normalize", replace(own, top=ones, bottom=ones)


def _open(a: Adaptation, b: Adaptation, components: Path | None, stack: ExitStack) -> tuple[Bundle | None, str | None]:
    """The bundle that both sides were made of, or what there is to say of its loss."""
    recorded = [side.components for side in (a, b) if side.components]
    places = [Path(str(one["source"])) for one in recorded if isinstance(one.get("source"), str)]
    where = components or next(iter(places), None)
    if where is None:
        return None, "the dumps do not say which components they ran on; give --components"
    try:
        bundle = stack.enter_context(Bundle(where))
    except (InputError, NotFoundError):
        if components is not None:
            raise
        return None, f"the components in {where} are unavailable; give --components"
    now = {entry.source_name: sums(bundle, entry) for entry in bundle.entries}
    for one in recorded:
        for name, then in dict(one.get("sha256", {})).items():
            changed = [part for part, digest in then.items() if now.get(name, {}).get(part) != digest]
            if changed:
                found = f"the components in {where} are not those it ran on: other {', '.join(changed)} of {name}"
                if components is not None:
                    raise InputError(f"--components: {found}")
                return None, found
    return bundle, None


def _plan(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    return chunk_plan(shape[0], default_chunk_rows((shape[0], shape[1])))


def _too_far(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two adapted weights' rows differ by more than two replays of one bundle may.

    Without U, S, V their sizes are taken from the weight: for V with orthonormal columns, (U S)^2 (V^T)^2 is at most
    the squared norm of W's row; for positive scaled S a sum's noise is at most 1 + sqrt(K).
    """
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return True
    apart = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return bool((apart > _allowed(a) + _allowed(b)).any())


def _allowed(w: np.ndarray) -> np.ndarray:
    value = w.astype(np.float64)
    rank = np.sqrt(value.shape[1])  # at least the rank's root
    row = np.sqrt(np.sum(value * value, axis=1, keepdims=True) + value * value)
    product = noise.LAMBDA[Noise.PRODUCT] * noise.U32 * (rank * row + np.abs(value))
    ratio = noise.LAMBDA[Noise.SUM_RATIO] * noise.U32 * (3 + 2 * rank)
    total = product + (np.abs(value) + product) * ratio + noise.U32 * np.abs(value)
    return total + noise.exact_bound(np.abs(value) + total, w.dtype)
