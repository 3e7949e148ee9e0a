"""A specimen of the selftest with something planted in its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from stages.selftest.specimens import Specimen

Weights = dict[str, np.ndarray]
Change = Callable[[Weights], object]


class Changed:
    """A specimen with other weights."""

    def __init__(self, made: Specimen, change: Change):
        self.made, self.change = made, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.made, name)

    def weights(self) -> Weights:
        weights = {name: array.copy() for name, array in self.made.weights().items()}
        self.change(weights)
        return weights
