"""What has surely moved a recorded tensor, though by less than right programs differ by.

Right programs err in all directions a little, and so in any one direction very little. A wrong number, or a wrong
element of a weight, moves the tensor in one direction alone, its own. The tensor's error is carried back to all of them
at once (sensitivity.py). Where much more than noise arrives, the change is computed as it is, token by token; where the
tokens agree on its size, it is told. docs/findings/spans.md has what right programs did.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from stages.judge.sensitivity import FEW, Sensitivity, sensitivity_of
from stages.judge.through import OFF, Fit, Named, Search, told
from stages.judge.tried import Hypothesis, Number
from stages.judge.wrong_weights import Element
from stages.oracle.bounds import rounding_unit
from stages.recipes.elements import shortest
from stages.spec.dtypes import stored_dtype

# What moves a tensor less than right programs differ by: how many standard deviations it must be off, as estimated,
# and token by token, of a number or a function and of a weight's element, of which there are a million. Right programs
# were at most at 6.5 and 14.8 (docs/findings/spans.md). With fewer tokens nothing is said.
_SURE_AT_ONCE, _SURELY_NUMBER, _SURELY_WEIGHT, _LEAST_TOKENS = 10.0, 12.0, 30.0, 8
# Weights are asked of a stage of whose columns one is off by so much in RMS; of right ones at most by 5.6.
_OFF_COLUMN = 6.0
# Between these multiples of itself a change is there, and not another one that has something in common with it: one
# whose size was estimated, and one that has no size.
_AS_A_WHOLE, _EXACTLY = (0.5, 2.0), (0.8, 1.25)
# Among so many tokens a change must be spread, as their squares have it: two that see the same keys agree on anything.
_SPREAD = 4.0
# So many changes are computed at most, of so many of the first tokens.
_MOST, _MOST_TOKENS = 24, 24
# Two changes are told apart by so many units of what they leave: three standard deviations.
_APART = 9


@dataclass(frozen=True)
class _Try:
    """A change that may be there: how `sure` at a glance, about how large (0: of one size), and how sure it must be."""

    at_a_glance: float
    change: float
    made: Callable[..., Hypothesis]
    least: float


@dataclass(frozen=True)
class _Found:
    """A change that is there: how sure, in its standard errors; the mean square that it leaves, and the `unit` of that,
    so many of which tell two changes apart."""

    of: Hypothesis
    sure: float
    left: float
    unit: float


def slight(search: Search) -> tuple[Named, float] | None:
    """The change, with all that cannot be told from it, that is surely in a tensor which passes; and of how many
    standard errors. None where there is none, or too few tokens to tell."""
    few = len(search.case.got) < _LEAST_TOKENS
    carried = None if few or search.layers > 1 else sensitivity_of(search, FEW, most=_MOST_TOKENS)
    if carried is None or len(search.seen()[0]) < _LEAST_TOKENS:
        return None
    tries = sorted((*_numbers(search, carried), *_weights(search, carried)), key=lambda one: -one.at_a_glance)
    found = [one for one in (_computed(search, tried) for tried in tries[:_MOST]) if one is not None]
    if not found:
        return None
    best = min(found, key=lambda one: one.left)
    equal = [Fit(one.left, one.of.said, one.of) for one in found if one.left - best.left < _APART * best.unit]
    named = told(sorted(equal, key=lambda fit: fit.error))
    return None if named is None else (named, best.sure)


def _numbers(search: Search, carried: Sensitivity) -> Iterator[_Try]:
    dtype = stored_dtype(search.path.activations)
    clear = 2 * rounding_unit(dtype) if dtype.itemsize < 4 else OFF  # in 16 bits a constant may have been rounded
    for number, share in search.shares_of_numbers(carried):
        clearly = abs(share.change) > clear * (abs(number.right) or 1.0)
        asked = share.sure > _SURE_AT_ONCE and clearly and number.right + share.change >= number.least
        if asked and _moves(search, number, share.change) > OFF:
            yield _Try(share.sure, share.change, functools.partial(_at_number, number), _SURELY_NUMBER)


def _moves(search: Search, number: Number, change: float) -> float:
    """By how much of itself, in RMS, a number so changed moves the stage that it moves most."""
    sizes = ((at, np.linalg.norm(slope * change)) for at, slope in search.slopes(number).items())
    return max(float(size / np.linalg.norm(search.right_value_of(at))) for at, size in sizes)


def _at_number(number: Number, change: float, room: float = 0.0) -> Hypothesis:
    x = max(number.right + change, number.least)
    return number.hypothesis(x, shortest(x - room, x + room))


def _weights(search: Search, carried: Sensitivity) -> Iterator[_Try]:
    """In 16 bits: in float32 the bound sees an element, and right kernels that sum in another order look like one."""
    if stored_dtype(search.path.activations).itemsize == 4:
        return
    for one in carried.weights(_OFF_COLUMN):
        if one.share.sure > _SURE_AT_ONCE:
            change = one.share.change if isinstance(one, Element) else 0.0
            yield _Try(one.share.sure, change, functools.partial(search.weight_at, one), _SURELY_WEIGHT)


def _computed(search: Search, tried: _Try) -> _Found | None:
    """A change as it is, each token for itself: how alike these are in it says how sure it is."""
    hypothesis = tried.made(tried.change)
    value = search.value(hypothesis.instead)
    if value is None or not np.isfinite(value).all():
        return None
    got, weight = search.seen()
    moved, error = ((x - search.expected) * weight for x in (value, got))
    own, square = (np.sum((x * moved).reshape(len(moved), -1), axis=1) for x in (error, moved))
    multiple = float(own.sum() / square.sum()) if square.any() else 0.0
    others = 1 - square / square.sum()  # a token's own residual is as small as its share in the multiple is large
    off = float(np.sqrt(np.sum(((own - square * multiple) / others) ** 2))) if others.all() else np.inf
    sure = float(own.sum()) / off if off else 0.0
    least, most = _AS_A_WHOLE if tried.change else _EXACTLY
    spread = float(square.sum() ** 2 / np.sum(square * square)) if square.any() else 0.0
    if sure < tried.least or spread < _SPREAD or not least < multiple < most:
        return None
    left = float(np.sum(error * error) - own.sum() ** 2 / square.sum()) / error.size
    alone = multiple * float(np.sqrt(square.sum() / left))  # how sure it were, did elements err each for itself
    if tried.change:
        change = tried.change * multiple
        hypothesis = tried.made(change, 2 * abs(change) / sure)
    return _Found(hypothesis, sure, left, left / error.size * max(1.0, alone / sure) ** 2)
