"""Orders of summation as recipes: what gives the last bits of float32 products and norms, which no form knows.

An order is asked of a few elements first, those that are not correctly rounded: all of a tensor are summed again, step
by step, only where these have its bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import product as each
from types import MappingProxyType

import numpy as np

from stages.oracle import decoder
from stages.oracle.verdict import Oracle, canonical, judged_part
from stages.recipes import norm
from stages.recipes.at import At
from stages.recipes.product import factors
from stages.spec.causal import up_to_query
from stages.spec.noise import Noise
from stages.sums.candidates import family
from stages.sums.infer import Evidence, Finish, ProductEvidence, RowEvidence, as_summed, infer
from stages.sums.orders import Order, lower, words
from stages.sums.program import Program

# Elements that an order is asked first. An order agrees with another one in such an element by chance 1 in 3 times or
# fewer: not in 16 of them, whichever of a thousand. Where there are fewer nothing is said.
SAMPLE = 16
# A margin, the last columns say, may have another order: that many of the sample may lie in it.
_MARGIN = 4
_ONE = np.float32(1)


@dataclass(frozen=True)
class Sums:
    """Sums that were taken alike: of one weight, by its `name`, or of all heads.

    `ways`: what was recorded with what it was computed from, by the words of what is done besides summing. `open`
    `[rows, cols]`: what is not correctly rounded. `by_row`: all of a row is of one sum; by chance any order has some
    rows, so there none counts that has not all.
    """

    name: str
    ways: Mapping[str, Evidence]
    open: np.ndarray
    by_row: bool = False

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of what is open, of each sum one."""
        if not self.by_row:
            rows, cols = np.nonzero(self.open)
            return rows, cols
        rows = np.flatnonzero(self.open.any(axis=1))
        return rows, self.open[rows].argmax(axis=1)


def sums_of(oracle: Oracle, observed: np.ndarray) -> Iterator[Sums]:
    """The sums that a float32 stage is made of; none of a stage that no order is behind."""
    make, observed = _SUMS.get(oracle.stage.noise), judged_part(oracle.stage, observed)
    narrow = any(a.dtype != np.float32 and a.dtype.kind != "i" for a in (*oracle.arguments, observed))
    if make is not None and not narrow:
        yield from make(oracle, observed, canonical(observed) != canonical(oracle.rounded))


def _products(oracle: Oracle, observed: np.ndarray, open_: np.ndarray) -> Iterator[Sums]:
    start = 0
    for one in factors(At(oracle)):
        at = np.s_[:, start : start + one.w.shape[1]]
        start += one.w.shape[1]
        x, w = (a.astype(np.float32) for a in (one.x.mid, one.w))
        way, finish = ("", as_summed) if one.bias is None else ("the bias added last", _plus(one.bias))
        yield Sums(one.name, {way: ProductEvidence(x, w, observed[at], finish)}, open_[at])


def _plus(bias: np.ndarray) -> Finish:
    narrow = bias.astype(np.float32)
    return lambda sums, _rows, cols: sums + narrow[cols]


def _scores(oracle: Oracle, observed: np.ndarray, open_: np.ndarray) -> Iterator[Sums]:
    q, k = (x.swapaxes(0, 1) for x in oracle.arguments)
    rows, keys = q.shape[0] * q.shape[1], np.repeat(k, len(q) // len(k), axis=0).swapaxes(1, 2)
    recorded, masked = observed.reshape(rows, -1), np.tile(~up_to_query(observed, oracle.stage.window), (len(q), 1))
    scale = np.float32(oracle.options["scaling"])

    def finish(times: np.float32) -> Finish:
        return lambda sums, at, cols: np.where(masked[at, cols], np.float32(0), sums * times)

    yield Sums(
        "",
        {
            "": ProductEvidence(q.reshape(rows, -1), keys, recorded, finish(scale)),
            "of q times the scale": ProductEvidence(q.reshape(rows, -1) * scale, keys, recorded, finish(_ONE)),
        },
        open_.reshape(rows, -1),
    )


def _weighted(oracle: Oracle, observed: np.ndarray, open_: np.ndarray) -> Iterator[Sums]:
    probabilities, qkv = oracle.arguments
    heads, kv_heads, dim = (oracle.options[name] for name in ("heads", "kv_heads", "head_dim"))
    values = np.repeat(decoder._values(qkv, heads, kv_heads, dim).swapaxes(0, 1), heads // kv_heads, axis=0)
    recorded, open_ = (x.reshape(len(x), heads, dim).swapaxes(0, 1).reshape(-1, dim) for x in (observed, open_))
    yield Sums("", {"": ProductEvidence(probabilities.reshape(len(recorded), -1), values, recorded)}, open_)


def _norms(oracle: Oracle, observed: np.ndarray, open_: np.ndarray) -> Iterator[Sums]:
    at = At(oracle)
    x, w = (a.astype(np.float32) for a in (norm.inputs(at).mid, at.params()[-1][1]))
    rows, eps = x.reshape(-1, x.shape[-1]), np.float32(oracle.options["eps"])
    count, recorded = np.float32(rows.shape[1]), observed.reshape(rows.shape)

    def finish(mean: _Mean, end: _End) -> Finish:
        return lambda sums, at_rows, cols: end(rows[at_rows, cols], mean(sums, count) + eps, w[cols])

    ways = {
        ", ".join(filter(None, (first, last))): RowEvidence(rows, recorded, finish(mean, end))
        for (first, mean), (last, end) in each(_MEANS.items(), _ENDS.items())
    }
    yield Sums("", ways, open_.reshape(rows.shape), by_row=True)


_Mean = Callable[[np.ndarray, np.float32], np.ndarray]
_End = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
_MEANS: Mapping[str, _Mean] = {"": lambda s, k: s / k, "times 1/K": lambda s, k: s * (_ONE / k)}


def _root(under: np.ndarray) -> np.ndarray:
    """The inverse root by one rounding, as instructions for it have it once they are refined."""
    return (1 / np.sqrt(under.astype(np.float64))).astype(np.float32)


_ENDS: Mapping[str, _End] = {
    "": lambda x, under, w: x * (_ONE / np.sqrt(under)) * w,
    "the inverse root by one rounding": lambda x, under, w: x * _root(under) * w,
    "divided by the root": lambda x, under, w: x / np.sqrt(under) * w,
    "the weight folded into the inverse root": lambda x, under, w: x * (_ONE / np.sqrt(under) * w),
    "the inverse root by one rounding, the weight folded into it": lambda x, under, w: x * (_root(under) * w),
}
_SUMS: Mapping[Noise, Callable[[Oracle, np.ndarray, np.ndarray], Iterator[Sums]]] = MappingProxyType(
    {Noise.PRODUCT: _products, Noise.SCORES: _scores, Noise.WEIGHTED: _weighted, Noise.RMS_NORM: _norms}
)
# What the terms of a sum are called; of a product they are numbered along K.
_TERMS = {Noise.RMS_NORM: "squares"}


@dataclass
class Asked:
    """The search over the stages of one run: what explained one is asked first of the next, and a stage that nothing
    explained is not asked for the whole family again."""

    known: dict[Order, None] = field(default_factory=dict)
    lost: set[tuple[str, int]] = field(default_factory=set)

    def explain(self, oracle: Oracle, observed: np.ndarray) -> str | None:
        """In words the order that gives every bit of `observed`; None where none is known to."""
        said: dict[str, dict[str, None]] = {}
        all_sums = list(sums_of(oracle, observed))
        if sum(sums.places()[0].size for sums in all_sums) < SAMPLE:
            return None
        for sums in all_sums:
            found = self._one(oracle, sums)
            if found is None:
                return None
            said.setdefault(found, {})[sums.name] = None
        return "; ".join(f"{', '.join(names)}: {text}" if len(said) > 1 else text for text, names in said.items())

    def of_all(self, parts: Iterable[tuple[Oracle, np.ndarray]]) -> str | None:
        """As `explain`, of a stage by rows or columns: None unless each has an order, in the words of them all."""
        said: dict[str, None] = {}
        for oracle, observed in parts:
            found = self.explain(oracle, observed)
            if found is None:
                return None
            said[found] = None
        return "; ".join(said) or None

    def _one(self, oracle: Oracle, sums: Sums) -> str | None:
        size = next(iter(sums.ways.values())).terms
        key = (oracle.stage.function, size)
        orders = () if key in self.lost else tuple(family(size))
        for order in dict.fromkeys((*self.known, *orders)):
            for way in _likely(sums, lower(order, size)):
                found = infer(sums.ways[way], partial(_first, order, () if sums.by_row else orders))
                if found.complete and (len(found.parts) == 1 or not sums.by_row):
                    best = found.parts[0].order
                    self.known[best] = None
                    margins = "" if len(found.parts) == 1 else ", and at the margins otherwise"
                    return f"{words(best, _TERMS.get(oracle.stage.noise, 'K'))}{margins}{'; ' * bool(way)}{way}"
        self.lost.add(key)
        return None


def _first(order: Order, others: tuple[Order, ...], _terms: int) -> tuple[Order, ...]:
    """That one is asked first, the others at the margins."""
    return (order, *others)


def _likely(sums: Sums, program: Program) -> list[str]:
    """The ways in which an order has the bits of a sample, of products all but what may be a margin's."""
    rows, cols = sums.places()
    if not rows.size:
        rows, cols = np.nonzero(~sums.open)
    some = np.unique(np.linspace(0, rows.size - 1, SAMPLE).astype(np.intp))
    at, most = (rows[some], cols[some]), 0 if sums.by_row else _MARGIN
    found = ((way, evidence.compute(program, *at), evidence.recorded[at]) for way, evidence in sums.ways.items())
    return [way for way, values, recorded in found if np.count_nonzero(values != recorded) <= most]
