"""Which recipe is it? The first class that has one which gives the whole record, in it the one with the most bits.

Sound recipes are asked first, then a few wrong elements, then roundings left out before the stage, fewer bits, other
functions: a right run asks one recipe. A recipe that fits is a proof, for right and for wrong; its bound is never
loosened to make it fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations, takewhile
from typing import Any

import numpy as np

from stages.oracle.bounds import TINY
from stages.oracle.rounding import round_once
from stages.oracle.verdict import Oracle, canonical, judged_part
from stages.recipes.at import At, Unknown
from stages.recipes.catalogue import forms_of, held, kind_of, right_value, told
from stages.recipes.elements import explain_elements
from stages.recipes.fewer_bits import NARROW as NARROWER
from stages.recipes.fewer_bits import Narrow, ways
from stages.recipes.fit import Fit, fit
from stages.recipes.open_numbers import filled, one_factor
from stages.recipes.recipe import FIT, NARROW, Class, Form, Kind, Mod
from stages.recipes.value import Value
from stages.spec.noise import Noise

# Rows and columns that are asked first, whether a recipe is worth the whole.
_ROWS = 3
_COLUMNS = 48
_FEWEST = 8
# A product of fewer multiplications wakes no threads: on a busy machine that took 30 times as long.
_UNTHREADED = 200_000
# Numbers of an argument that are looked at together, for bits that a format has not.
_SCANNED = 1 << 16
# float64's own noise, many times over.
_SAME = 1e-12
# Numbers of so few do not show whether bits were lost.
_NUMBERS = 4
# How many stages back roundings are left out.
_DEPTH = 4
# Of recipes of one class that fit, those are told that have as many bits, or nearly.
_AS_GOOD = 0.98
# Where few bits fit, those whose squared distance is as near: what accumulators cut off is common to all.
_NEAR = 0.9
# A recipe that gives fewer of the bits may not be the one.
_SURE = 0.9

SOUND = (Class.PRESCRIBED, Class.EQUIVALENT)


@dataclass(frozen=True)
class Tried:
    """A recipe to be asked: its words and class, the emulator's arguments, the stage at hand; see Form for the rest."""

    words: str
    kind: Class
    args: Mapping[str, Any]
    at: At
    usual: str = ""
    rms: float = np.inf


@dataclass(frozen=True)
class Found:
    """What explains a record: recipes in words that cannot be told apart, their class, elements to the last bit of all.

    `usual`: which library does that by itself, of a narrower one. `nearest`: what comes next, or, where nothing
    fits (`kind` None), nearest.
    """

    ways: tuple[str, ...]
    kind: Class | None
    bits: int
    elements: int
    usual: str = ""
    nearest: str = ""
    ratio: float = 0.0

    @property
    def words(self) -> str:
        return either(self.ways)


def either(ways: Sequence[str]) -> str:
    """Ways in words, joined by "or"; what they begin with alike is said once."""
    if len(ways) < 2:
        return "".join(ways)
    alike = list(
        takewhile(lambda parts: len(set(parts)) == 1, zip(*(way.split(", ")[:-1] for way in ways), strict=False))
    )
    start = "".join(f"{parts[0]}, " for parts in alike)
    return start + (" or " if start else ", or ").join(way[len(start) :] for way in ways)


class Match:
    """One stage of a record, or one projection of a joined product, and the search for its recipe."""

    def __init__(self, at: At, observed: np.ndarray, value: np.ndarray, bound: np.ndarray):
        """`value` and `bound` are the oracle's of what was `observed`."""
        kind = kind_of(at.stage)
        if kind is None:
            raise Unknown(at.stage.function)
        self.kind: Kind = kind
        self.at, self.observed, self.value, self.dtype = at, observed, value, held(observed.dtype.name)
        self.bound = bound
        self.fits: list[Fit] = []
        self.nearest: Fit | None = None
        self.few = None
        if at.oracle.hidden:
            return
        self.few = self._worst_places(np.abs(observed.astype(np.float64) - value), bound)
        self._known(bound)

    def search(self) -> Found:
        """The recipe that explains the record."""
        self._as_prescribed()
        if not self.fits or (self.kind.cheap and self.fits[0].bits < self.fits[0].elements):
            self._ask(self._plain((Class.EQUIVALENT,), deep=False), enough=True)
        # Of a number or two anything may be a rounding.
        less = (self._narrower, self._others) if self.observed.size > _NUMBERS else (self._others, self._narrower)
        for more in (self._elements, self._unrounded, self._deep, *less, self._times, self._placements):
            if self.fits:
                break
            more()
        if self.fits and max(fit.bits for fit in self.fits) < _SURE * self.observed.size:
            self._by_more_bits()
        return self._found()

    def _by_more_bits(self) -> None:
        """Fewer bits have wide bounds: what they explain with few bits may be another function that gives most."""
        narrow, self.fits = self.fits, []
        if narrow[0].kind is Class.NARROWER:
            for more in (self._others, self._times):
                if not self.fits:
                    more()
        best = max(fit.bits for fit in narrow)
        # One or two that agree are chance.
        self.fits = [fit for fit in self.fits if fit.bits * _AS_GOOD > best + _NUMBERS] or narrow

    def through_hidden(self) -> Found:
        """Of inputs that were not recorded: each recipe of them computed again, rounded to be stored or not.

        Where a right one gave less, only those in fewer bits are asked that begin before these inputs.
        """
        if (np.abs(self.observed.astype(np.float64) - self.value) > self.bound).any():
            self._ask(self._plain((Class.NARROWER,), deep=True))
            return self._found() if self.fits else Found((), None, 0, self.observed.size)
        hidden = self.at.oracle.hidden
        for rounded, words in ((True, ""), (False, f"; of unrounded {' and '.join(hidden)}")):
            at = self.at.but(unrounded=hidden, rounded=rounded)
            self._ask(
                self._of(form, at, words, Class.EQUIVALENT)
                for form in forms_of(self.kind, self.dtype, *SOUND)
                if rounded or not form.deep
            )
        return self._found()

    def _worst_places(self, error: np.ndarray, bound: np.ndarray) -> dict[str, np.ndarray] | None:
        """A few rows, of a product also columns, that are furthest off: a recipe is asked for these first."""
        if not self.kind.by_rows or not self.at.stage.inputs or error.ndim < 2 or len(error) <= 2 * _ROWS:
            return None
        off = (error / np.maximum(bound, TINY)).reshape(len(error), -1)
        rows = np.sort(np.argsort(-off.max(axis=1), kind="stable")[:_ROWS])
        if self.kind.cheap or not self.at.stage.params or "layout" in self.at.options:
            return {"rows": rows}
        count = min(_COLUMNS, max(_FEWEST, _UNTHREADED // (_ROWS * self.at.array(0).shape[-1])))
        columns = np.argsort(-off[rows].max(axis=0), kind="stable")[:count]
        return {"rows": rows, "columns": np.sort(columns)}

    def _sample(self, x: np.ndarray) -> np.ndarray:
        """Of an array of the result's shape, what is asked first."""
        if self.few is None:
            return x
        return x[self.few["rows"]][..., self.few["columns"]] if "columns" in self.few else x[self.few["rows"]]

    def _known(self, bound: np.ndarray) -> None:
        """`Unknown` where the prescribed row is not the declared stage's function: another family's may be no row's."""
        at = self.at if self.few is None else self.at.but(**self.few)
        own = self._value(forms_of(self.kind, self.dtype, Class.PRESCRIBED)[0].args, at)
        value = self._sample(self.value)
        if own is None or own.mid.shape != value.shape:
            raise Unknown(self.at.stage.function)
        limit = self._sample(np.broadcast_to(bound, self.value.shape)) + np.abs(own.hi - own.lo)
        off = np.abs(value - own.mid) > limit + _SAME * np.abs(value)
        if judged_part(self.at.stage, off).any():
            raise Unknown(self.at.stage.function)

    # -- what is tried, in order -----------------------------------------------------------------------------------

    def _as_prescribed(self) -> None:
        """The prescribed recipe: its value and its bound are the oracle's, which right kernels were measured by."""
        form = forms_of(self.kind, self.dtype, Class.PRESCRIBED)[0]
        got = canonical(self.observed)
        same = canonical(round_once(self.value, self.observed.dtype)) == got
        ratio = np.abs(got.astype(np.float64) - self.value) / np.maximum(self.bound, TINY)
        # What is correctly rounded everywhere has no other bits.
        beyond = ~same & ((ratio > 1) | (self.at.stage.noise is Noise.EXACT))
        beyond = judged_part(self.at.stage, beyond)
        words, largest = self._words(form), float(np.where(same, 0.0, ratio).max(initial=0.0))
        off = float(np.square(np.where(same, 0.0, got.astype(np.float64) - self.value)).sum())
        found = Fit(words, Class.PRESCRIBED, int(same.sum()), int(beyond.sum()), got.size, ratio=largest, off=off)
        if found.fits:
            self.fits.append(found)
        self._note(found)

    def _plain(self, classes: tuple[Class, ...], *, deep: bool) -> Iterator[Tried]:
        for form in forms_of(self.kind, self.dtype, *classes):
            if form.deep == deep and not form.unseen:
                yield self._of(form)

    def _unrounded(self) -> None:
        """Any rounding between stages may be left out: fused kernels, XLA's excess precision."""
        for at, words in self._without_roundings():
            self._ask(
                self._of(form, at, f"; of {words}", Class.EQUIVALENT)
                for form in forms_of(self.kind, self.dtype, *SOUND)
                if not form.deep
            )
            if self.fits:
                return

    def _without_roundings(self) -> Iterator[tuple[At, str]]:
        if self.dtype not in NARROW and self.at.run not in NARROW:
            return
        known = [name for name in self.at.stage.inputs if name in self.at.oracle.made]
        for name in known:
            yield self.at.but(unrounded=(name,)), f"unrounded {name}"
        for depth in range(1 if len(known) > 1 else 2, _DEPTH + 1):
            far = f", {depth} stages back" if depth > 1 else ""
            yield self.at.but(unrounded=tuple(known), depth=depth), f"unrounded {' and '.join(known)}{far}"

    def _deep(self) -> None:
        self._ask(self._plain(SOUND, deep=True))

    def _narrower(self) -> None:
        self._ask(self._plain((Class.NARROWER,), deep=False))
        self._ask(self._in_fewer_bits())
        if not self.fits:
            self._ask(self._plain((Class.NARROWER,), deep=True))
        for at, words in self._without_roundings() if not self.fits else ():
            self._ask(
                self._of(form, at, f"; of {words}")
                for form in forms_of(self.kind, self.dtype, Class.NARROWER)
                if not form.deep
            )
            if self.fits:
                return
        if not self.fits:
            self._kept_in_fewer_bits()

    def _kept_in_fewer_bits(self) -> None:
        """All numbers are those of a narrow format, and as near as steps in that may leave them."""
        got = self.observed.astype(np.float64)
        for narrow in NARROWER:
            fewer = self.dtype in narrow.dtypes and narrow.result and got.size > _NUMBERS
            if fewer and np.array_equal(narrow.of(got), got):
                allowed = self.bound + 2.0**-narrow.bits * (np.abs(self.value) + self.bound)
                if (np.abs(got - self.value) <= allowed).all():
                    bits = int(np.count_nonzero(narrow.of(self.value) == got))
                    self.fits.append(Fit(f"its result has {narrow.words}", Class.NARROWER, bits, 0, got.size))
                    return

    def _in_fewer_bits(self) -> Iterator[Tried]:
        """The prescribed recipe with operands or a result in fewer bits."""
        args, arguments = forms_of(self.kind, self.dtype, Class.PRESCRIBED)[0].args, self.at.oracle.arguments
        for narrow in NARROWER:
            if narrow.holds(self.at.stage, self.dtype):
                changed = [_loses(narrow, a) for a in arguments]
                for words, lost in ways(self.at.stage.inputs, changed, narrow, self.at.biases):
                    yield Tried(words, Class.NARROWER, args, self.at.but(lost=lost), narrow.usual)

    def _others(self) -> None:
        for form in forms_of(self.kind, self.dtype, *SOUND):
            if not form.deep and not form.wider and not self.fits:
                self._ask(self._with_mods(form))
        for form in forms_of(self.kind, self.dtype, Class.NARROWER) if self.kind.cheap else ():
            if not form.deep and not self.fits:
                self._ask(self._with_mods(form))

    def _times(self) -> None:
        """All values are the right ones times one number."""
        at = self.at.but(**(self.few or {}))
        some = self.few is None or one_factor(at, self._sample(self.observed), self._sample(self.value))
        # In float32 a product's bound is its noise, which need not be computed again.
        known = self.bound if self.kind.name == "product" and self.observed.dtype == np.float32 else None
        found = one_factor(self.at, self.observed, self.value, known) if some else None
        if found is not None:
            words, bits = found
            self.fits.append(Fit(words, Class.OTHER, bits, 0, self.observed.size))

    def _placements(self) -> None:
        """Where no row fits: the narrower rows with some of their roundings left out, all that there are."""
        for form in forms_of(self.kind, self.dtype, Class.NARROWER) if self.kind.cheap and self.dtype in NARROW else ():
            at = self.at.but(**(self.few or {}))
            if form.deep or self._value(form.args, at) is None:
                continue
            some = (steps for n in range(1, len(at.steps)) for steps in combinations(at.steps, n))
            self._ask(
                self._of(form, self.at.but(left_out=frozenset(steps)), f", but not the {' nor the '.join(steps)}")
                for steps in some
            )

    def _with_mods(self, form: Form) -> Iterator[Tried]:
        said = "" if _class(form, self.dtype) is Class.PRESCRIBED else f"; {self._words(form)}"
        for mod in self.kind.mods:
            if self.fits and FIT in mod.args.values():
                continue
            args, number = self._numbers(mod)
            if args is not None:
                yield Tried(f"{self._words(mod, number)}{said}", Class.OTHER, {**form.args, **args}, self.at)

    def _numbers(self, mod: Mod) -> tuple[Mapping[str, Any] | None, float]:
        if FIT not in mod.args.values():
            return mod.args, 0.0
        name = next(name for name, value in mod.args.items() if value == FIT)
        number = filled(self.at, name, self.observed, self.value)
        return (None, 0.0) if number is None else ({**mod.args, name: number}, number)

    def _elements(self) -> None:
        """A few elements of a weight: fewer columns than a function's fault shows in."""
        found = explain_elements(self.at.oracle, self.observed) if self.at.part is None else None
        if found is not None:
            bits = int(np.count_nonzero(self.at.oracle.rounded == self.observed))
            self.fits.append(Fit(str(found), Class.OTHER, bits, 0, self.observed.size))

    # -- asking ------------------------------------------------------------------------------------------------------

    def _words(self, row: Form | Mod, number: float = 0.0) -> str:
        return told(row, self.at, number)

    def _of(self, form: Form, at: At | None = None, words: str = "", kind: Class | None = None) -> Tried:
        """A form as a row of this stage; `words` are added to its own."""
        kind = kind or _class(form, self.dtype)
        said = f"{self._words(form)}{words}"
        return Tried(said, kind, form.args, at or self.at, form.usual_of(self.dtype), form.rms)

    def _ask(self, tried: Iterable[Tried], *, enough: bool = False) -> None:
        """Compute recipes and keep those that fit; `enough`: stop at one that gives every bit."""
        for one in tried:
            found = self._one(one)
            if found is not None and enough and found.fits and (found.bits == found.elements or not self.kind.cheap):
                return

    def _one(self, tried: Tried) -> Fit | None:
        if self.few is not None:
            some = replace(tried, at=tried.at.but(**self.few), rms=np.inf)
            near = self._against(some, self._sample(self.observed))
            if near is None or not near.fits:
                self._note(near)
                return None
        found = self._against(tried, self.observed)
        if found is not None and found.fits:
            self.fits.append(found)
        self._note(found)
        return found

    def _against(self, tried: Tried, observed: np.ndarray) -> Fit | None:
        value = self._value(tried.args, tried.at)
        if value is None:
            return None
        return fit(tried.words, tried.kind, value, observed, self.at.stage, tried.usual, tried.rms)

    def _note(self, found: Fit | None) -> None:
        """Keep what came nearest, by the part of the elements asked that it cannot give."""
        if found is not None and not found.fits and (self.nearest is None or found.missed < self.nearest.missed):
            self.nearest = found

    def _value(self, args: Mapping[str, Any], at: At) -> Value | None:
        with suppress(Unknown):
            value = self.kind.emulator(at, **args)
            return None if value is None else at.result(value)
        return None

    def _found(self) -> Found:
        if not self.fits:
            return Found((), None, 0, self.observed.size, nearest=self.nearest.words if self.nearest else "")
        # Where few have all bits, as of accumulators that truncate, the distance tells more.
        few = max(f.bits for f in self.fits) < _SURE * self.observed.size
        order = sorted(self.fits, key=lambda f: (list(Class).index(f.kind), f.off if few else -f.bits))
        best = order[0]
        alike = [f for f in order[1:] if f.kind is best.kind and not best.kind.sound and _as_good(f, best, few=few)]
        # The likelier ones were asked first.
        told = [f for f in self.fits if f is best or f in alike] if few else [best, *alike]
        ways = tuple(dict.fromkeys(f.words for f in told))
        after = next((f.words for f in order if f.words not in ways), self.nearest.words if self.nearest else "")
        usual = best.usual.format(dtype=self.dtype)
        return Found(ways, best.kind, best.bits, best.elements, usual, after, best.ratio)


def _as_good(fit: Fit, best: Fit, *, few: bool) -> bool:
    return _NEAR * fit.off <= best.off if few else fit.bits >= _AS_GOOD * best.bits


def _loses(narrow: Narrow, a: np.ndarray) -> bool:
    """Whether an argument has more bits than a format keeps: mostly its first numbers tell."""
    if a.dtype.kind == "i" or not a.size:
        return False
    if a.ndim > 1 and narrow.changes(a[: _ROWS + 1]):
        return True
    if narrow.keeps(a):
        return False
    step = len(a) if narrow.whole or a.ndim < 2 else max(1, _SCANNED // max(1, a[0].size))
    return any(narrow.changes(a[at : at + step]) for at in range(0, len(a), step))


def _class(form: Form, dtype: str) -> Class:
    found = form.of(dtype)
    assert found is not None
    return found


def explain(oracle: Oracle, observed: np.ndarray) -> Found | None:
    """Which recipe gives `observed`; None where none could be asked. Of a joined product, of each projection."""
    asked = oracle.unsure is None or oracle.hidden
    observed = judged_part(oracle.stage, observed)
    if not asked or observed.shape != oracle.value.shape or not np.isfinite(observed).all():
        return None
    bound = np.broadcast_to(oracle.bound, oracle.value.shape)
    at, parts = At(oracle, right=right_value), _parts(oracle)
    with suppress(Unknown), np.errstate(all="ignore"):  # what overflows, or is not a number, fits nothing
        if oracle.hidden:
            return Match(at, observed, oracle.value, bound).through_hidden()
        if parts is None:
            return Match(at, observed, oracle.value, bound).search()
        element = explain_elements(oracle, observed)
        if element is not None:
            bits = int(np.count_nonzero(oracle.rounded == observed))
            return Found((str(element),), Class.OTHER, bits, observed.size)
        found = [
            Match(at.but(part=n), *(x[..., columns] for x in (observed, oracle.value, bound))).search()
            for n, columns in enumerate(parts)
        ]
        return _together(found, oracle)
    return None


def _parts(oracle: Oracle) -> list[slice] | None:
    """The columns of each projection that a stage joins; None where there is one."""
    weights = [a for a in oracle.arguments[len(oracle.stage.inputs) :] if a.ndim == 2]
    if len(weights) < 2 or not oracle.stage.inputs:
        return None
    ends = np.cumsum([len(w) for w in weights]).tolist()
    return [slice(end - len(w), end) for end, w in zip(ends, weights, strict=True)]


def _together(found: list[Found], oracle: Oracle) -> Found:
    """The parts' recipes as one: the worst class, in the words of each part that is of it, by its weight's name."""
    arguments = zip(oracle.stage.params, oracle.arguments[len(oracle.stage.inputs) :], strict=True)
    names = [name.removesuffix(".weight").rsplit(".", 1)[-1] for name, a in arguments if a.ndim == 2]
    bits, elements, ratio = sum(f.bits for f in found), sum(f.elements for f in found), max(f.ratio for f in found)
    lost = [(name, f) for name, f in zip(names, found, strict=True) if f.kind is None]
    if lost:
        return Found((), None, bits, elements, nearest=f"{lost[0][0]}: {lost[0][1].nearest}")
    kind = max((f.kind for f in found if f.kind is not None), key=list(Class).index)
    usual, nearest = (next((getattr(f, name) for f in found if getattr(f, name)), "") for name in ("usual", "nearest"))
    ways = _ways([(name, one.ways) for name, one in zip(names, found, strict=True) if one.kind is kind], len(found))
    return Found(ways, kind, bits, elements, usual, nearest, ratio)


def _ways(said: list[tuple[str, tuple[str, ...]]], parts: int) -> tuple[str, ...]:
    """What explains the parts that are of the worst class: in common where it can be, else each by its name."""
    common = tuple(way for way in said[0][1] if all(way in ways for _, ways in said))
    if not common:
        alike: dict[str, list[str]] = {}
        for name, ways in said:
            alike.setdefault(either(ways), []).append(name)
        return ("; ".join(f"{', '.join(names)}: {words}" for words, names in alike.items()),)
    names = [name for name, _ in said]
    # Two that hold each other's weights say the same of both.
    if len(said) == parts or all(name in common[0] for name in names):
        return common
    return tuple(f"{', '.join(names)}: {way}" for way in common)
