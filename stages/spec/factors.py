"""Where U, S and V come from: a decomposition's results, and the ways to get them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Factors(Protocol):
    """U by rows in order, S and V (layout `torch_v`) of one weight."""

    @property
    def s(self) -> np.ndarray: ...

    @property
    def v(self) -> np.ndarray: ...

    def u_chunks(self) -> Iterator[tuple[int, int, np.ndarray]]: ...


# Where components come from: `rows(start, stop)` of the float32 source, its shape and name.
Decomposer = Callable[[str, Callable[[int, int], np.ndarray], tuple[int, int]], Factors]


@dataclass(frozen=True)
class Method:
    """A way to get U, S and V, and the names that the original's reports give it.

    `vh` is the same from the framework's other entry point, which returns V^H; None: the same V, transposed.
    """

    component_source: str
    label: str
    decompose: Decomposer
    vh_source: str
    vh_label: str
    vh: Decomposer | None = None
    stored: bool = False
    parallel: bool = False  # whether its bits stay the same when several run at once
