"""What may be wrong with a weight: an element of it, a row or a column; and how much of an error that explains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from stages.files.forward_dump import Place

_IN_LINE = ("before", "after")


@dataclass(frozen=True)
class Share:
    """What a change explains: the share of the error's square that some multiple of it does, that multiple, `change`,
    and its standard deviation."""

    gain: float
    change: float
    deviation: float

    @property
    def sure(self) -> float:
        """How many standard deviations the multiple is from none."""
        return abs(self.change) / self.deviation


@dataclass(frozen=True)
class Element:
    """An element of param number `param` of the stage `at`, at `index`, and what changing it explains."""

    share: Share
    at: Place
    param: int
    index: tuple[int, ...]


@dataclass(frozen=True)
class Line:
    """A row (`axis` 0) or column (1) of param number `param` of the stage `at` that is another one, `other`, or one of
    two that are `swapped`; without another, `factor` times itself."""

    share: Share
    at: Place
    param: int
    axis: int
    index: int
    other: int | None = None
    swapped: bool = False
    factor: float = 1.0

    def changed(self, weight: np.ndarray) -> np.ndarray:
        """The weight, so changed."""
        new = weight.copy()
        was, own = np.moveaxis(weight, self.axis, 0), np.moveaxis(new, self.axis, 0)
        own[self.index] = self.factor * was[self.index] if self.other is None else was[self.other]
        if self.swapped:
            own[self.other] = was[self.index]
        return new

    def said(self, name: str, start: int = 0) -> str:
        """That in words, of a weight of this name, or of its part from line `start` on."""
        word, index = ("row", "column")[self.axis], self.index + start
        other = None if self.other is None else self.other + start
        if self.swapped:
            return f"{word}s {index} and {other} of {name} are swapped"
        whole = f"{word} {index} of {name}"
        if other is not None:
            return f"{whole} is {word} {other}'s"
        return f"{whole} is 0" if self.factor == 0 else f"{whole} has its sign flipped"


def beside(weight: np.ndarray, index: tuple[int, ...]) -> Iterator[tuple[str, float]]:
    """The elements next to one, with where they are."""
    words = (("above", "below"), ("on the left", "on the right"))[-weight.ndim :] if weight.ndim > 1 else (_IN_LINE,)
    for axis, pair in enumerate(words):
        for word, step in zip(pair, (-1, 1), strict=True):
            if 0 <= index[axis] + step < weight.shape[axis]:
                other = (*index[:axis], index[axis] + step, *index[axis + 1 :])
                yield word, float(weight[other])
