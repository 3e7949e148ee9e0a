"""What a recipe is: one way to compute a stage down to its roundings, a form and perhaps another function.

A *form* says where it is rounded, a *mod* which function is computed instead of the right one. Both are rows of data:
words for a reader and keyword arguments of the one emulator that all recipes of a kind share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from stages.recipes.value import Value

NARROW = ("bfloat16", "float16")
EVERY = ("float32", *NARROW)
# An argument that is estimated from the record.
FIT = "fit"


class Class(StrEnum):
    """What a recipe is to the declared stage; later is worse."""

    PRESCRIBED = "prescribed"  # as the model's own code rounds
    EQUIVALENT = "equivalent"  # the same function, rounded elsewhere, in no fewer bits
    NARROWER = "narrower"  # the same function in fewer bits
    OTHER = "other"  # another function

    @property
    def sound(self) -> bool:
        return self in (Class.PRESCRIBED, Class.EQUIVALENT)


@dataclass(frozen=True)
class Form:
    """Where a stage is rounded.

    `classes` is its class by the dtype in which the stage is stored; where a dtype is not there, the row does not
    hold. `who` does it, each with how that is known: (ran) here, or its source (read). `usual` says who does it by
    itself, of a narrower row, and `usual_in` on which dtypes. A `deep` one computes what is before the stage's
    inputs again by itself; an `unseen` one is asked only of inputs that were not recorded, since beside recorded
    ones its bound would hide faults; a `wider` one has the prescribed one's numbers and a wider bound. `rms`: its
    errors' root mean square, in parts of its bound, is no larger where there are many elements: half as much again
    as was measured of who does it, so that a wide bound hides no fault of that size.
    """

    words: str
    classes: Mapping[str, Class]
    args: Mapping[str, Any] = field(default_factory=dict)
    who: str = ""
    usual: str = ""
    usual_in: tuple[str, ...] = EVERY
    deep: bool = False
    wider: bool = False
    unseen: bool = False
    rms: float = np.inf

    def of(self, dtype: str) -> Class | None:
        return self.classes.get(dtype)

    def usual_of(self, dtype: str) -> str:
        """Who computes so by itself on `dtype`, in words that have that for `{dtype}`; empty for nobody."""
        return self.usual if dtype in self.usual_in else ""


@dataclass(frozen=True)
class Mod:
    """Another function: its words, and what it changes in the emulator's arguments.

    An argument that is `FIT` is estimated from the record (open_numbers.py); its words have `{fit}` for it.
    """

    words: str
    args: Mapping[str, Any] = field(default_factory=dict)


def prescribed(words: str, *, who: str = "", **args: Any) -> Form:
    return Form(words, dict.fromkeys(EVERY, Class.PRESCRIBED), args, who)


def equivalent(
    words: str,
    *,
    who: str = "",
    dtypes: tuple[str, ...] = EVERY,
    deep: bool = False,
    wider: bool = False,
    unseen: bool = False,
    rms: float = np.inf,
    **args: Any,
) -> Form:
    classes = dict.fromkeys(dtypes, Class.EQUIVALENT)
    return Form(words, classes, args, who, deep=deep, wider=wider, unseen=unseen, rms=rms)


def narrower(
    words: str,
    *,
    who: str = "",
    usual: str = "",
    usual_in: tuple[str, ...] = EVERY,
    dtypes: tuple[str, ...] = EVERY,
    sound: tuple[str, ...] = (),
    deep: bool = False,
    **args: Any,
) -> Form:
    """`sound`: dtypes in which the same roundings lose nothing."""
    classes = {**dict.fromkeys(dtypes, Class.NARROWER), **dict.fromkeys(sound, Class.EQUIVALENT)}
    return Form(words, classes, args, who, usual, usual_in, deep)


@dataclass(frozen=True)
class Kind:
    """The recipes of a stage: an emulator of the value before its last rounding, its forms and its mods.

    `cheap`: its recipes cost little beside a product, so that all are asked for more bits. `by_rows`: rows of the
    result are of the same rows of the inputs. `doc`: what the stages compute, and where they may differ.
    """

    name: str
    emulator: Callable[..., Value | None]
    forms: tuple[Form, ...]
    mods: tuple[Mod, ...] = ()
    cheap: bool = True
    by_rows: bool = False
    doc: str = ""
