"""Which hidden stage of a failing span is wrong: each is given another function, number or weight, one at a time.

What brings the recorded tensor back within what right programs differ by is named, with the stage in which it was
tried; of several that do so equally, all. Nothing is named that does not explain every element.
"""

from __future__ import annotations

import functools
import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from stages.files.forward_dump import Place
from stages.judge.sensitivity import MANY, SOME, Sensitivity, sensitivity_of
from stages.judge.tried import Function, Hypothesis, Number, Tried, in_words
from stages.judge.wrong_weights import Element, Line, Share, beside
from stages.oracle.bounds import RMS_THROUGH, U32
from stages.oracle.rope import TABLES
from stages.oracle.rounding import widened
from stages.oracle.span import Value, oracle_through
from stages.oracle.verdict import Oracle, judged_part, measure
from stages.recipes.elements import shortest, stored_as, usual
from stages.recipes.recipe import Class

# Seconds of this thread that are spent on one group of hypotheses, so that a busy machine names the same.
_SECONDS = 20.0
# Of hypotheses that explain a tensor, those are told that leave no more than so many times the least error.
_AS_GOOD = 1.15
# The best so many are asked whether they explain all; more rows that do so equally than this are no name.
_MOST_PROVED, _MOST_TOLD = 12, 3
# Through several layers an error of less than this, relative to the tensor, is likelier a number's than a function's.
_SMALL = 1e-2
# So many of its first tokens are asked first of what several layers compute.
_FIRST = 8
# What is worth asking leaves so many times less error than the right function.
_LESS = 1.5
# A number that is fitted must exclude the right one by so many of its own standard deviations, and by 8 u.
_SURE, OFF = 6.0, 8 * U32
_STEPS = 4
# A number is shown with the fewest digits that are as near as this, relative to it: it was computed with in float32.
_SHOWN = 16 * U32
# Factors that are tried with a framework's own functions: those of three digits after the point, so many at most.
_STEP, _MOST_STEPS = 1e-3, 40
# What gives every byte leaves no more error than the right function, but for chance; and by its derivative a constant
# moves the tensor by what it is off by, within such a factor, where that is more than its deviation.
_NO_FURTHER, _ROUGHLY = 1.05, 4.0
# Changes that are likely to explain so much of the error's square are computed, at most so many; after one that leaves
# as little error as right programs do, those that are likely to explain so much of what it does.
_LIKELY, _MOST_LIKELY, _AS_RIGHT, _AS_MUCH = 0.1, 32, 1.25, 0.5


# How much of a difference some hypotheses explain, and what gives them.
_Edits = tuple[float, Callable[[], Iterable[Hypothesis]]]


@dataclass(frozen=True)
class Fit:
    """A hypothesis and the RMS of the error that it leaves, in standard deviations; `row`: its words less a number."""

    error: float
    row: str
    of: Hypothesis


@dataclass(frozen=True)
class Named:
    """What explains a failing span, in words, of which class it is, and the stages that it blames, each as likely.

    `usual`: who computes so by itself, of fewer bits.
    """

    words: str
    kind: Class
    places: tuple[Place, ...]
    usual: str = ""


class Search(Tried):
    """One recorded tensor that fails through hidden stages, or a part of it that an oracle speaks of."""

    # -- what explains --------------------------------------------------------------------------------------------

    def error(self, value: np.ndarray | None) -> float:
        """RMS of what is left, in standard deviations of right programs."""
        got, weight = self.seen()
        if value is None or value.shape != got.shape or not np.isfinite(value).all():
            return np.inf
        return float(np.sqrt(np.sum(((got - value) * weight) ** 2) / max(np.count_nonzero(value), 1)))

    def named(self) -> Named | None:
        """What explains the tensor best, with all that explain it as well; the likelier kinds are asked first."""
        first = _FIRST if self.layers > 1 and self._seen_early() else None
        groups: list[Callable[[], Iterator[Fit]]] = [
            lambda: self._fitted(number for number in self.numbers() if number.of_config),
            self._likeliest,
            lambda: self._tried(itertools.chain(self.functions(Class.OTHER), self.other_weights())),
            lambda: self._fitted(number for number in self.numbers() if not number.of_config),
            lambda: self._tried(self.functions(Class.NARROWER)),
        ]
        error, size = (float(np.linalg.norm(x)) for x in (self.case.got - self.oracle.value, self.oracle.value))
        if self.layers > 1 and error < _SMALL * size:
            groups[2:4] = groups[3:1:-1]  # another number moves a tensor a little, another function a lot
        for group in groups:
            self.until = time.thread_time() + _SECONDS
            self.ask(first)
            self.before = self.error(self.expected)
            ranked = sorted(group(), key=lambda fit: fit.error)[:_MOST_PROVED]
            self.ask(None)
            found = [fit for fit in ranked if self._explains(fit.of)]
            if found:
                return told([fit for fit in found if fit.error <= _AS_GOOD * found[0].error])
        return None

    def _seen_early(self) -> bool:
        """Whether the first tokens alone show what is wrong: of all tokens, one of the first ones is."""
        wrong = self._wrong_rows()
        return len(self.run.tokens) == len(self.case.got) and len(wrong) > 0 and bool(wrong[0] < _FIRST // 2)

    def _likeliest(self) -> Iterator[Fit]:
        """What explains most of the error as far as this is carried back to where it may begin."""
        carried = sensitivity_of(self, MANY)
        if carried is None or any(at not in carried.of and at[1] not in TABLES for at in self.places):
            return  # what is wrong there would be blamed on another
        self.before = self.error(self.expected)
        fixed = itertools.chain(self.functions(Class.OTHER), self.other_weights())
        found: list[tuple[Share, Callable[[], Iterator[Fit]]]] = []
        for tried, share in self.shares(carried, fixed):
            found.append((share, functools.partial(self._tried, [tried])))
        for number, share in self.shares_of_numbers(carried):
            if not number.of_config:
                found.append((share, functools.partial(self._fitted, [number])))
        for one in carried.weights():
            found.append((one.share, functools.partial(self._of_weight, one)))
        likely, least = sorted(found, key=lambda one: -one[0].gain), _LIKELY
        for share, fits in likely[:_MOST_LIKELY]:
            if share.gain < least:
                return
            for fit in fits():
                yield fit
                if fit.error < _AS_RIGHT:  # what explains all, too, explains about as much to first order
                    least = max(least, share.gain * _AS_MUCH)

    def shares(self, carried: Sensitivity, fixed: Iterable[Hypothesis]) -> Iterator[tuple[Hypothesis, Share]]:
        """Of functions and weights, what they explain, if they move the tensor to the side on which it is."""
        for tried in fixed:
            share = carried.explained(self.changes(tried.instead))
            if share is not None and share.change > 0:
                yield tried, share

    def shares_of_numbers(self, carried: Sensitivity) -> Iterator[tuple[Number, Share]]:
        """Of numbers, what they explain."""
        for number in self.numbers():
            share = carried.explained(self.slopes(number))
            if share is not None:
                yield number, share

    def _of_weight(self, one: Element | Line) -> Iterator[Fit]:
        """A line, or an element changed by what leaves the least error: to what it usually is, if that is as good."""
        if isinstance(one, Line):
            yield from self._tried([self.with_line(one)])
            return
        old = float(self.params(one.at)[one.param][one.index])

        def of(change: float) -> Mapping[Place, Function]:
            return self.with_element(one, old + change, "").instead

        x, error, deviation = self._newton(Number("", "", of, (one.share.change,), 0.0, least=-np.inf))
        room = _SURE * deviation * max(1.0, error)
        if abs(x) > room and error * _LESS <= self.before:
            yield Fit(error, self.named_element(one), self.weight_at(one, x, room))

    def _tried(self, hypotheses: Iterable[Hypothesis]) -> Iterator[Fit]:
        for tried in hypotheses:
            if time.thread_time() > self.until:
                return
            error = self.error(self.value(tried.instead))
            if error * _LESS <= self.before:
                yield Fit(error, tried.said, tried)

    def _fitted(self, numbers: Iterable[Number]) -> Iterator[Fit]:
        for number in numbers:
            if time.thread_time() > self.until:
                return
            x, error, deviation = self._newton(number)
            off = abs(x - number.right)
            sure = off > _SURE * deviation * max(1.0, error) and off > OFF * abs(number.right)
            if sure and error * _LESS <= self.before:
                room = 2 * deviation * max(1.0, error) + _SHOWN * abs(x)
                shown = shortest(x - room, x + room)
                yield Fit(error, number.said, number.hypothesis(x, shown))

    def edited(self, native: np.ndarray) -> Iterator[tuple[float, Hypothesis]]:
        """What can be tried with a framework's own functions, where the tensor is `native` of the right ones, and how
        much of the difference it explains, that which explains most first: constants, weights, stages left out."""
        carried = sensitivity_of(self, SOME, judged_part(self.oracle.stage, native))
        found = list(self._edited_constants(carried))
        if carried is not None:
            for number, share in self.shares_of_numbers(carried):
                if not self._always_asked(number) and number.edits is not None:
                    found.append((share.gain, functools.partial(self._edited_numbers, number, share)))
            for tried, share in self.shares(carried, itertools.chain(self.other_weights(), self.each_left_out())):
                found.append((share.gain, functools.partial(iter, [tried])))
            for one in carried.weights():
                found.append((one.share.gain, functools.partial(self._edited_weight, one)))
        for gain, tries in sorted(found, key=lambda one: -one[0]):
            for hypothesis in tries():
                yield gain, hypothesis

    def _always_asked(self, number: Number) -> bool:
        """Constants move a tensor the least, and are few: those of the config, and of one layer all, are asked."""
        return number.of_config or (self.layers == 1 and _is_constant(number))

    def _edited_constants(self, carried: Sensitivity | None) -> Iterator[_Edits]:
        """Of one layer all, before anything else: its roundings are more than what a constant does. Of more those that
        bring the tensor no further from what was recorded, as a right one would not."""
        before = self.error(self.expected)
        for number in self.numbers():
            if number.edits is None or not self._always_asked(number):
                continue
            tries = {x: number.hypothesis(x) for x in _constants(number)}
            if self.layers == 1:
                yield 1.0, functools.partial(iter, tries.values())
                continue
            share = None if carried is None else carried.explained(self.slopes(number))
            for x, hypothesis in tries.items():
                if share is not None and not _may_be(share, x - number.right):
                    continue
                left = self.error(self.value(hypothesis.instead)) / before
                if left <= _NO_FURTHER:
                    gain = max(1 - left * left, share.gain if share is not None else 0.0)
                    yield gain, functools.partial(iter, [hypothesis])

    def _edited_numbers(self, number: Number, share: Share) -> Iterator[Hypothesis]:
        """Values of a number that programs have; of a factor, all of few digits about the likeliest."""
        own = number.right
        if _is_constant(number):
            near: Iterable[float] = _constants(number)
        else:
            x, room = own + share.change, max(4 * share.deviation, 3 * _STEP)
            reach = min(room, _STEP * _MOST_STEPS)  # of a factor that hardly moves the tensor there are millions
            steps = np.arange(np.ceil((x - reach) / _STEP), np.floor((x + reach) / _STEP) + 1) * _STEP
            near = (shortest(x - room, x + room), *steps[np.argsort(abs(steps - x))][:_MOST_STEPS])
        yield from (number.hypothesis(x) for x in dict.fromkeys(round(float(y), 12) for y in near) if x != own)

    def _edited_weight(self, one: Element | Line) -> Iterator[Hypothesis]:
        """A line; or what a wrong element usually is, as far as the difference allows it."""
        if isinstance(one, Line):
            yield self.with_line(one)
            return
        weight = self.params(one.at)[one.param]
        old, change = float(weight[one.index]), one.share.change
        room = 5 * one.share.deviation + abs(change) / 2
        for new, text in usual(self.named_element(one), old, beside(weight, one.index), stored_as(weight)):
            if abs(new - old - change) <= room and new != old:
                yield self.with_element(one, new, text)

    def _newton(self, number: Number) -> tuple[float, float, float]:
        """The number that leaves the least error, by Gauss and Newton; that error, and the number's deviation."""
        _, x = min((self.error(self.value(number.of(start))), start) for start in number.starts)
        for _ in range(_STEPS):
            step = 1e-4 * (abs(x) or 1e-9)
            here, there = self.value(number.of(x)), self.value(number.of(x + step))
            if here is None or there is None:
                break
            got, weight = self.seen()
            slope = (there - here) / step * weight
            square = float(np.sum(slope * slope))
            if not 0 < square < np.inf:
                break
            move = float(np.sum((got - here) * weight * slope)) / square
            if not np.isfinite(move):
                break
            x = max(x + move, number.least)
            if abs(move) < 1e-2 * square**-0.5:
                return x, self.error(self.value(number.of(x))), square**-0.5
        else:
            return x, self.error(self.value(number.of(x))), square**-0.5
        return x, np.inf, 0.0

    def _explains(self, tried: Hypothesis) -> bool:
        """Whether all of the tensor is within what programs may differ by that compute so."""
        if self.span.acting in tried.instead:
            value = self.value(tried.instead)
            return value is not None and self.error(value) <= RMS_THROUGH and self.case.explained_by(value)
        oracle = self._oracle(tried)
        if oracle is None:
            return False
        judged = measure(oracle, self.case.observed)
        return judged.verdict.passes and judged.squares <= RMS_THROUGH**2 * max(judged.count, 1)

    def _oracle(self, tried: Hypothesis) -> Oracle | None:
        """The oracle of the tensor where some stages have another function; they err in proportion to their values."""
        changed: dict[Place, Value] = {}

        def value(at: Place) -> Value:
            return changed[at] if at in changed else self._unmasked(at, self.known(at))

        for at in self.span.hidden:
            sources = self.sources(at)
            if at not in tried.instead and changed.keys().isdisjoint(sources):
                continue
            inputs = [value(source) for source in sources]
            changed[at] = self.computed(at, inputs)
            if self.stage(at).causal:
                changed[at] = replace(changed[at], array=self.right(at, [one.array for one in inputs]))
            if at in tried.instead:
                array = tried.instead[at]([widened(one.array) for one in inputs])
                if array is None:
                    return None
                changed[at] = _with_array(changed[at], array)
        inputs = [value(at) for at in self.sources(self.span.acting)]
        if self.oracle.stage.by_vocab:
            inputs = [one.last(len(self.oracle.value)) for one in inputs]
        params = self.params(self.span.acting)
        return oracle_through(self.oracle.stage, inputs, params, self.oracle.options, self.way())

    def _unmasked(self, at: Place, value: Value) -> Value:
        """With what a right mask hides, and another may not."""
        hidden = at in self.span.hidden and self.stage(at).causal
        return replace(value, array=self.values(at)) if hidden else value


def _is_constant(number: Number) -> bool:
    """Whether programs have it of a few values: no factor."""
    return number.starts != (number.right,)


def _constants(number: Number) -> Iterable[float]:
    return dict.fromkeys((number.right * 10, number.right / 10, *number.starts))


def _may_be(share: Share, change: float) -> bool:
    """Whether a constant may be off by `change`, as roughly as its derivative tells it."""
    room = 5 * share.deviation
    if abs(share.change) <= room:
        return abs(change) <= _ROUGHLY * (abs(share.change) + room)
    near = (abs(share.change) - room) / _ROUGHLY <= abs(change) <= _ROUGHLY * (abs(share.change) + room)
    return near and (change > 0) == (share.change > 0)


def _with_array(right: Value, array: np.ndarray) -> Value:
    """Another value of a stage, which errs more where it is larger."""
    sizes = [float(np.linalg.norm(np.where(np.isfinite(x), x, 0.0))) for x in (array, right.array)]
    more = max(1.0, sizes[0] / sizes[1]) ** 2 if sizes[1] else 1.0
    s = right.spread
    of_log = None if s.of_log is None else s.of_log * more
    if of_log is not None and array.shape == of_log.shape:  # keys that a right mask hides err as the most that is seen
        of_log = np.where((right.array == 0) & (array > 0), of_log.max(axis=-1, keepdims=True), of_log)
    return replace(right, array=array, spread=replace(s, own=s.own * more, of_log=of_log, added=s.added * more))


def told(found: Sequence[Fit]) -> Named | None:
    """Equal hypotheses in words: those of one row, and of about one number, with all the places that it may be at."""
    rows: dict[str, list[Hypothesis]] = {}
    for fit in sorted(found, key=lambda fit: all(layer is None for layer, _ in fit.of.instead)):
        about = re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.4g}", fit.of.said)
        rows.setdefault(about, []).append(fit.of)
    if len({fit.row for fit in found}) > _MOST_TOLD:
        return None
    narrower = all(fit.of.kind is Class.NARROWER for fit in found)
    places = tuple(dict.fromkeys(place for fit in found for place in fit.of.instead))
    usual = found[0].of.usual if narrower else ""
    return Named(", or ".join(map(in_words, rows.values())), Class.NARROWER if narrower else Class.OTHER, places, usual)
